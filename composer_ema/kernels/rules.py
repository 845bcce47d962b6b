"""The rules by which every backend guards and rounds an element, and the constants that make their bits agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from composer_ema.kernels.layout import Scratch

#: Elements in a piece of a tensor. Random bits are counted by piece and group of places in it, so that all backends
#: draw the same bits.
PIECE = 4096
#: First piece of the buffers of a model, where their step is not that of its parameters. A launch has fewer rows.
FIRST_PIECE_OF_BUFFERS = 2**31
#: Places that share one call of Philox: its four words give each 16 bits, the lower half of a word before the upper.
#: The kernel has this number built in.
GROUP = 8
#: Rounds of Philox. With seven, it passes the statistical tests of its authors.
PHILOX_ROUNDS = 7


@dataclass(frozen=True)
class Rules:
    """How an update guards and rounds elements, and what it shares with other updates.

    Attributes:
        skip_nonfinite: where a source is NaN or infinite, leave the averages of that element alone and count it.
        stochastic: round a bfloat16 average up or down at random, in proportion to the distance, so that small updates
            survive on average. Rounding to the nearest drops them. The bits are those of Philox (Salmon et al. 2011),
            counted by group of places, piece, step and average.
        seed: key of the random bits, at least 0.
        first_step: number of the next update, at least 0.
        first_piece: number of the step's first piece, in [0, 2**32). Steps that differ in it draw
            different bits.
        compensated: beside each average lies a Kahan term, which holds what rounding the average has left out, so that
            no small update is lost.
        skipped: int64 scalar on the averages' device, to which skipped elements are added without synchronising.
            Default: they are not counted.
        scratch: what the foreach backend casts sources in, shared with steps that never run at the same time. Default:
            the step has its own.
    """

    skip_nonfinite: bool = False
    stochastic: bool = False
    seed: int = 0
    first_step: int = 0
    first_piece: int = 0
    compensated: bool = False
    skipped: Tensor | None = None
    scratch: Scratch | None = None


def is_inexact(tensor: Tensor) -> bool:
    """Whether the tensor holds floating or complex numbers. Only these can be averaged; others can be copied."""
    return tensor.is_floating_point() or tensor.is_complex()


def dtype_of_compensation(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the Kahan term of an average of ``dtype``: that dtype, or float32 for 16 bits.

    A term of 16 bits would leave a 16-bit average with fewer digits than float32 has, in as much memory.
    """
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
