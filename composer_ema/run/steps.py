"""Which batches moved the weights: a GradScaler leaves the step out where a gradient is infinite or NaN.

The scaler has waited for that number already, so the host knows it for nothing: it calls the optimizer's step, or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from composer_ema.wrapper import OptimizerWrapper


class Steps:
    """Whether the optimizer has stepped since the gradients of a batch were there.

    Attributes:
        is_watching: whether the run scales its gradients, so that steps may be left out.
        skipped: whether the step of the last batch was left out; False in a run that is not watched.
    """

    def __init__(self) -> None:
        self.is_watching = self.skipped = False
        self._handles: list[Any] = []

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """Watches the optimizers of a run that scales its gradients; none of a run that does not.

        An optimizer whose step tells nobody is not watched: every batch counts as a step then.
        """
        self.release()
        optimizers = [_stepping(optimizer) for optimizer in optimizers]
        if optimizers and all(map(_runs_hooks, optimizers)):
            self._handles = [optimizer.register_step_post_hook(self._note) for optimizer in optimizers]
            self.is_watching = True

    def release(self) -> None:
        """Watches no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.is_watching = self.skipped = False

    def begin(self) -> None:
        """A batch has begun, and nothing has stepped yet.

        Call it once a batch, such as when its gradients are there. A step before that, such as the one by which torch
        builds an empty state for a checkpoint, does not count.
        """
        self.skipped = self.is_watching

    def _note(self, *_: Any) -> None:
        self.skipped = False

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the copy watches nobody."""
        return Steps().__dict__


def _stepping(optimizer: Optimizer) -> Optimizer:
    """The optimizer that moves the weights: Composer's SAM also returns from a step in which its own was left out."""
    inner = getattr(optimizer, 'base_optimizer', None)
    return _stepping(inner) if isinstance(inner, Optimizer) else optimizer


def _runs_hooks(optimizer: Optimizer) -> bool:
    # torch.optim.Optimizer.__init__ marks the step that it has wrapped.
    return isinstance(optimizer, OptimizerWrapper) or getattr(type(optimizer).step, 'hooked', False)
