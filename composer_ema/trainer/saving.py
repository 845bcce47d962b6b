"""Checkpoints whose model slot holds the training weights, whatever stands in the model while they are taken.

All savers of Composer checkpoints ask ``State`` for the model, callbacks that save at EVAL_END included. Nobody else
does, so ``model.state_dict()`` and exports still show what the model holds.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from composer.core import State
from composer.utils import dist
from torch import Tensor, nn

from composer_ema.checkpoints import formats
from composer_ema.run.model_slot import put_training_weights
from composer_ema.shadow.state import gathered
from composer_ema.trainer import shards


class Lender(Protocol):
    """An algorithm that lends averages to the model."""

    def stashed_weights(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The training weights of ``model`` that lie in a stash, by canonical name; none while it holds its own."""
        ...


def save_training_weights(state: State, lenders: Sequence[Lender]) -> None:
    """Makes ``state`` save the training weights as its model also while the model holds an average.

    The states of ``lenders``, all algorithms of the run that lend averages, then need no stash. While the model holds
    its own weights, ``state`` saves what it would save without this. A second call replaces the first.
    """
    state.get_model_state_dict = functools.partial(_model_state_dict, state, lenders)
    state.state_dict = functools.partial(_state_dict, state, lenders)


def _model_state_dict(state: State, lenders: Sequence[Lender]) -> dict[str, Any]:
    saved = type(state).get_model_state_dict(state)
    stash: dict[str, Tensor] = {}
    for lender in lenders:
        stash = {**lender.stashed_weights(state.model), **stash}
    put_training_weights(saved, state.model, stash, is_full=state.fsdp_state_dict_type == 'full')
    return saved


def _state_dict(state: State, lenders: Sequence[Lender]) -> dict[str, Any]:
    saved = type(state).state_dict(state)
    names = {type(lender).__qualname__ for lender in lenders}
    for name, of_algorithm in saved.get('algorithms', ()):
        if name in names:
            of_algorithm.pop(formats.STASH, None)  # the model slot holds it
    if state.fsdp_sharded_state_dict_enabled:
        shards.set_apart(saved, names)
    elif 'algorithms' in saved:  # one file, which rank 0 writes
        is_kept = dist.get_global_rank() == 0
        saved['algorithms'] = [
            (name, gathered(of_algorithm, is_kept=is_kept) if name in names else of_algorithm)
            for name, of_algorithm in saved['algorithms']
        ]
    return saved
