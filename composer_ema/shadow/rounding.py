"""Tells once when an average is kept too narrow for the weight of its updates, and by how much it may be off."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch

log = logging.getLogger(__name__)

#: Relative errors of which the log tells and of which a warning does, by the bits of a number. At 1e-3, rounding is
#: twice what TF32 matrices round in every forward pass; the usual decay of 0.9999 stays below it. The errors of 16 bits
#: are common at any decay, and of the size of what averaging gains.
_LOGGED = {16: 0.02, 32: 1e-4, 64: 1e-4}
_WARNED = {16: 0.02, 32: 1e-3, 64: 1e-3}


def largest_error(dtype: torch.dtype, weight: float) -> float:
    """How far updates of this weight may leave an average from the exact one, relative to its size::

        eps / 2 / weight

    An update of less than half a unit in the last place is rounded away. An average therefore stops moving where
    ``weight * |source - average| < eps / 2 * |average|``. The error is that large where weights rest after a move; on
    weights that fluctuate it is smaller.

    Args:
        dtype: floating or complex, of the average.
        weight: share of the source in the new average, in (0, 1].
    """
    return torch.finfo(dtype).eps / 2 / weight


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype | None:
    """The floating or complex dtype of the fewest digits; None if there is none."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def least_weight(dtype: torch.dtype | None) -> float:
    """The weight of updates below which a warning is due for an average of this dtype; 0 for None."""
    return _weight_for(dtype, _WARNED)


def in_words(dtype: torch.dtype, weight: float) -> str:
    """What rounding does to an average of this dtype whose updates have this weight: the end of a sentence."""
    percent = min(100 * largest_error(dtype, weight), 100)  # an average that is off by its own size has not moved
    off = f'{percent:.0f}' if percent > 10 else f'{percent:.2g}'
    name = str(dtype).removeprefix('torch.')
    return f'kept in {name}, which rounds updates of weight {weight:.1g} away in part: it may be {off} % off'


class RoundingNotice:
    """Compares the weight of each update with what the dtype of an average can hold, and tells once.

    Attributes:
        limit: a positive weight below this one is worth a :meth:`tell`; 0 while nothing is.
    """

    def __init__(self) -> None:
        self.limit = 0.0
        self._dtype: torch.dtype | None = None
        self._has_logged = self._has_warned = False

    def follow(self, dtypes: Iterable[torch.dtype]) -> None:
        """Watches updates of averages of these dtypes, which round to the nearest."""
        self._dtype = coarsest(dtypes)
        self._set_limit()

    def tell(self, weights: Sequence[float], labels: Sequence[str]) -> None:
        """Logs and warns of the smallest positive weight, if it is below what was not told yet.

        The warning names the line that called the caller's caller, which is the user's.

        Args:
            weights: of one update of each average.
            labels: of these averages; none for a single one without a label.
        """
        weight = min((weight for weight in weights if weight > 0), default=1.0)
        if self._dtype is None or weight >= self.limit:
            return
        name = f'the average {labels[weights.index(weight)]!r}' if labels else 'the average'
        what = f'{name} is {in_words(self._dtype, weight)}.'
        self._has_logged = True
        if weight < least_weight(self._dtype):
            self._has_warned = True
            rounds = "round bfloat16 with rounding='stochastic', " if self._dtype is torch.bfloat16 else ''
            remedy = f'Pass compensated=True, keep it in a wider dtype, {rounds}or update less often.'
            warnings.warn(f'{what} {remedy}', stacklevel=4)
        else:
            log.info('%s compensated=True keeps what is rounded away.', what)
        self._set_limit()

    def _set_limit(self) -> None:
        errors = _WARNED if self._has_logged else _LOGGED
        self.limit = 0.0 if self._has_warned else _weight_for(self._dtype, errors)


def _weight_for(dtype: torch.dtype | None, errors: Mapping[int, float]) -> float:
    return 0.0 if dtype is None else largest_error(dtype, errors[torch.finfo(dtype).bits])
