"""Callbacks that come with the package; each is registered under ``composer_ema.callbacks`` in setup.cfg."""

from __future__ import annotations

from typing import Any

import torch
from composer.core import Callback, Precision, State
from composer.loggers import Logger

from composer_ema.model.sharding import is_sharded
from composer_ema.model.wrappers import canonical_name, unwrap
from composer_ema.spans import ArgumentError

_VELOCITY = 'velocity'


class GradientMomentum(Callback):
    """Adds momentum to an optimizer that has none, by carrying each gradient over into the next batch.

    Before every step ``gradient <- momentum * last gradient + gradient``, where the last gradient is the one that the
    last step used. With :class:`torch.optim.SGD` without momentum this is, to the bit, SGD with ``momentum=momentum``.
    A loop that multiplies the gradients by ``momentum`` between batches, where others zero them, does the same.

    Algorithms run before callbacks, so the gradients have been clipped by then. The carried gradients are part of the
    state: a resumed run equals an uninterrupted one.

    Args:
        momentum: Share of the last gradient that is kept, in [0, 1). Default: 0.85.

    Raises:
        ValueError: ``momentum`` is out of range, or the run scales its losses: the gradients of a skipped step would
            still be carried.
        RuntimeError: Gradients came twice within one batch, as under SAM.

    Example:
        >>> GradientMomentum(momentum=0.85).momentum
        0.85
    """

    def __init__(self, momentum: float = 0.85) -> None:
        if not 0 <= momentum < 1:
            message = f'momentum must lie in [0, 1), got {momentum}. Pass 0.85, or 0 for no momentum.'
            raise ArgumentError(message, 'momentum')
        self.momentum = momentum
        self._velocity: dict[str, torch.Tensor] = {}
        self._last_batch = -1

    def state_dict(self) -> dict[str, Any]:
        return {_VELOCITY: {name: tensor.detach().clone() for name, tensor in self._velocity.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._velocity = dict(state[_VELOCITY])

    def fit_start(self, state: State, logger: Logger) -> None:
        if state.precision == Precision.AMP_FP16:
            raise ValueError(
                'GradientMomentum cannot follow the steps that the gradient scaler of precision amp_fp16 skips. '
                'Take amp_bf16 or fp32, or the momentum of the optimizer.'
            )
        if is_sharded(state.model):
            raise ValueError(
                'GradientMomentum cannot save what it carries of a model that processes share, as parallelism_config '
                'asks. Take the momentum of the optimizer.'
            )

    @torch.no_grad()
    def after_train_batch(self, state: State, logger: Logger) -> None:
        batch = int(state.timestamp.batch)
        if batch == self._last_batch:
            raise RuntimeError(
                f'GradientMomentum saw the gradients of batch {batch} twice, and would carry them twice. '
                'Leave out the algorithm or optimizer that goes over a batch again, or take its own momentum.'
            )
        self._last_batch = batch
        for wrapped_name, parameter in unwrap(state.model).named_parameters():
            if parameter.grad is None:
                continue
            name = canonical_name(wrapped_name)
            velocity = self._velocity.get(name)
            if velocity is None:
                self._velocity[name] = parameter.grad.detach().clone()
                continue
            if velocity.device != parameter.device:  # a checkpoint is loaded on the CPU
                velocity = self._velocity[name] = velocity.to(parameter.device)
            velocity.mul_(self.momentum).add_(parameter.grad)
            parameter.grad.copy_(velocity)
