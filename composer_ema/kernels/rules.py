"""What an update does to an element besides the formula, and what every backend must agree on to do the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Performs one update in place; takes one weight for each average, in [0, 1]: 0 keeps, 1 copies.
Steps = Callable[[Sequence[float]], None]

#: Elements of a piece. Random bits are counted by piece and place in it, so that every backend draws the same.
PIECE = 4096
#: Rounds of Philox: with seven, it passes the tests that its authors set for random numbers.
PHILOX_ROUNDS = 7


@dataclass(frozen=True)
class Rules:
    """How elements are guarded and rounded.

    Attributes:
        skip_nonfinite: an element whose source is NaN or infinite leaves its averages alone and is counted.
        stochastic: a bfloat16 average is rounded up or down at random, in proportion to what lies between, so that
            small updates are kept on average; otherwise to the nearest, which drops them. The bits are those of Philox
            (Salmon et al. 2011), counted by place, piece, step and average.
        seed: key of these bits, at least 0.
        first_step: the number of the next update.
        skipped: int64 scalar on the averages' device that counts skipped elements; counting never synchronises.
    """

    skip_nonfinite: bool = False
    stochastic: bool = False
    seed: int = 0
    first_step: int = 0
    skipped: Tensor | None = None


def is_inexact(tensor: Tensor) -> bool:
    """Whether the tensor holds floating or complex numbers, which can be averaged; others can only be copied."""
    return tensor.is_floating_point() or tensor.is_complex()


def smallest_weight(averages: Iterable[Tensor]) -> float:
    """The weight below which an update of some of ``averages`` is under half a unit in the last place; 0 for none.

    So small an update is rounded away even where source and average differ as much as they are large.
    """
    return max((torch.finfo(average.dtype).eps / 2 for average in averages), default=0.0)
