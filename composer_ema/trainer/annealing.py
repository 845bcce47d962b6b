"""Anneals learning rates to a constant value, along the curve of ``torch.optim.swa_utils.SWALR``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from composer_ema import plain
from composer_ema.spans import ArgumentError, Span
from composer_ema.wording import counted, shown

Strategy = Literal['linear', 'cos']

_RATES = 'a number of at least 0, or one for each parameter group'
_STRATEGIES: dict[str, Strategy] = {'linear': 'linear', 'lin': 'linear', 'cos': 'cos', 'cosine': 'cos'}


class Annealing:
    """Sets the learning rate of every parameter group from some moment on::

        lr = (1 - a) * lr_at_start + a * swa_lr        t = min(1, elapsed / length)
        a = t (linear)                                 a = (1 - cos(pi t)) / 2 (cos)

    After ``length`` the learning rate stays at ``swa_lr``. Call :meth:`apply` after anything else that sets learning
    rates, such as a scheduler that is still running.

    Args:
        swa_lr: learning rate to end at, at least 0; a list gives one for each parameter group.
        strategy: ``'linear'`` or ``'cos'``.
        length: time to get there; 0 jumps.

    Attributes:
        length: as given.
        since: the clock when it started; None before.

    Raises:
        TypeError, ValueError: an argument out of range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> annealing = Annealing(0.2, 'linear', Span(4, 'ep'))
        >>> annealing.start({'ep': 6}, [optimizer])
        >>> annealing.apply({'ep': 7}, Span(4, 'ep'), [optimizer])
        >>> optimizer.param_groups[0]['lr']
        0.8
    """

    def __init__(self, swa_lr: float | Sequence[float], strategy: str, length: Span) -> None:
        self._final = check_rates(swa_lr)
        self._strategy = check_strategy(strategy)
        self.length = length
        self.since: dict[str, float] | None = None
        self._initial: list[float] = []

    def check(self, optimizers: Iterable[Optimizer]) -> None:
        """Raises a ValueError unless ``swa_lr`` is a single number or gives one for each parameter group."""
        count = len(_groups(optimizers))
        if isinstance(self._final, list) and len(self._final) != count:
            raise ArgumentError(
                f'swa_lr gives {counted(len(self._final), "learning rate")}, but the optimizer has '
                f'{counted(count, "parameter group")}. '
                'Pass one for each, or a single number for all.',
                'swa_lr',
            )

    def start(self, clock: Mapping[str, float], optimizers: Iterable[Optimizer]) -> None:
        """Starts at ``clock`` from the current learning rates."""
        self.since = dict(clock)
        self._initial = [float(group['lr']) for group in _groups(optimizers)]

    def apply(self, clock: Mapping[str, float], length: Span, optimizers: Iterable[Optimizer]) -> None:
        """Sets the learning rates for ``clock``; ``length`` is in a unit that the clock counts."""
        assert self.since is not None
        elapsed = clock[length.unit] - self.since[length.unit]
        share = self.share(elapsed / length.value if length.value else 1.0)
        groups = _groups(optimizers)
        final = self._final if isinstance(self._final, list) else [self._final] * len(groups)
        # A group that was added after the start keeps its own learning rate.
        for group, end, start in zip(groups, final, self._initial, strict=False):
            _set(group, end * share + start * (1 - share))

    def share(self, t: float) -> float:
        """The annealed share of the difference after the share ``t`` of the time."""
        t = min(max(t, 0.0), 1.0)
        return t if self._strategy == 'linear' else (1 - math.cos(math.pi * t)) / 2

    def state_dict(self) -> dict[str, Any] | None:
        """When it started and from which learning rates; None before it has started."""
        return None if self.since is None else {'since': dict(self.since), 'learning_rates': list(self._initial)}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Loads what :meth:`state_dict` returned and :func:`check_state` let through."""
        self.since = None if state is None else dict(state['since'])
        self._initial = [] if state is None else list(state['learning_rates'])


def check_strategy(strategy: str) -> Strategy:
    """Returns ``'linear'`` or ``'cos'``, which may be spelled ``'lin'`` and ``'cosine'``, or raises a ValueError."""
    known = _STRATEGIES.get(strategy.lower()) if isinstance(strategy, str) else None
    if known is None:
        raise ValueError(f"anneal_strategy must be 'linear' or 'cos', got {shown(strategy)}.")
    return known


def check_state(state: Any) -> Mapping[str, Any] | None:
    """Returns ``state`` if it is a state of :class:`Annealing`, or raises a ValueError. Does not check its clock."""
    if state is None:
        return None
    rates = state.get('learning_rates') if isinstance(state, Mapping) else None
    if not isinstance(rates, list) or not all(_is_rate(rate) for rate in rates) or state.get('since') is None:
        raise ValueError(f"'annealing' of the saved SWA state must give since and learning_rates, got {state!r}.")
    return state


def check_rates(swa_lr: float | Sequence[float]) -> float | list[float]:
    """Returns ``swa_lr`` as a float, or a list of them, or raises a TypeError or ValueError."""
    is_list = isinstance(swa_lr, (list, tuple))
    rates = [plain.number('swa_lr', rate, kind=_RATES) for rate in (swa_lr if is_list else [swa_lr])]
    if not rates or not all(map(_is_rate, rates)):
        raise ArgumentError(f'swa_lr must be {_RATES}, got {shown(swa_lr)}.', 'swa_lr')
    return [float(rate) for rate in rates] if is_list else float(rates[0])


def _is_rate(rate: Any) -> bool:
    return isinstance(rate, (int, float)) and not isinstance(rate, bool) and 0 <= rate < math.inf


def _groups(optimizers: Iterable[Optimizer]) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def _set(group: dict[str, Any], rate: float) -> None:
    if isinstance(group['lr'], Tensor):
        group['lr'].fill_(rate)
    else:
        group['lr'] = rate
