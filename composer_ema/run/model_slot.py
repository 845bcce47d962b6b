"""The place for the model in a checkpoint: it holds the training weights, also while the model holds an average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from composer_ema.model.inventory import Inventory
from composer_ema.model.sharding import whole
from composer_ema.model.wrappers import canonical_name, unwrap
from composer_ema.shadow import loan


def put_training_weights(
    saved: dict[str, Any], model: nn.Module, stash: Mapping[str, Tensor], *, is_full: bool
) -> None:
    """Puts the training weights of a model that is on loan into its state dict. A collective call if it is sharded.

    Args:
        saved: the state dict. Changed; the tensors that it refers to are not.
        model: of which it was taken.
        stash: the training weights by canonical name; none while the model holds its own.
        is_full: whether the state dict holds whole tensors of a sharded model, on the one process that saves it.
    """
    if not stash:
        return
    aliases = Inventory.of(unwrap(model)).aliases
    keys: dict[str, list[str]] = {}
    for key in saved:
        name = canonical_name(key)
        keys.setdefault(aliases.get(name, name), []).append(key)
    for name, weight in stash.items():
        value = whole(weight) if is_full else weight  # in all processes, although only rank 0 saves it
        for key in keys.get(name, ()):
            held = saved[key]
            # A buffer that the model has replaced by one of another kind keeps its new value, as when a loan ends.
            if isinstance(held, Tensor) and loan.obstacle(held, value) is None:
                saved[key] = value.to(held.device, held.dtype)
