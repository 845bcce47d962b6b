"""An experiment: AdamW, and an average of the weights inside its step, in one Triton launch for all tensors.

AdamW reads weight, gradient and two moments and writes three of them, 28 bytes per float32 parameter. An average of its
own launch reads the weight again, and the average, and writes the average: 12 bytes more. Here the new weight is still
in a register, so the average adds only 8.

Importing this module imports Triton.
"""

# Triton reads its own annotations:
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Elements that one program steps.
PIECE = 4096
NUM_WARPS = 8
_ALIGNMENT = 16  # bytes of a vector load


class AdamW:
    """Steps float32 parameters as ``torch.optim.AdamW`` does, and keeps an average of them if asked to.

    For weight w, gradient g, moments m and v, and step t, counted from 1::

        w -= lr * weight_decay * w
        m += (1 - beta1) * (g - m)
        v += (1 - beta2) * (g * g - v)
        w -= lr / (1 - beta1**t) * m / (sqrt(v) / sqrt(1 - beta2**t) + eps)
        average += (1 - decay) * (w - average)

    Args:
        parameters: contiguous float32 tensors of one device, each with its gradient. A step reads and writes at the
            addresses that these have now.
        lr: learning rate.
        betas: of the moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled.
        decay: share of the average that a step keeps, in [0, 1]. None: there is no average.

    Attributes:
        exp_avgs, exp_avg_sqs: the moments, one tensor for each parameter, zero at first.
        averages: likewise, copies of the parameters at first; empty without an average.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        decay: float | None = None,
    ) -> None:
        weights = [parameter.detach() for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters]
        for tensor in (*weights, *gradients):
            _check(tensor)
        self.exp_avgs, self.exp_avg_sqs = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
        self.averages = [] if decay is None else [weight.clone() for weight in weights]
        self._lr, self._betas, self._eps, self._weight_decay, self._decay = lr, betas, eps, weight_decay, decay
        self._steps = 0
        # The table holds addresses, so the memory must live as long as it does.
        self._columns = [weights, gradients, self.exp_avgs, self.exp_avg_sqs]
        if decay is not None:
            self._columns.append(self.averages)
        self._table = _table(self._columns)
        self._meta: dict[str, Any] = {'AVERAGES': decay is not None, 'PIECE': PIECE, 'num_warps': NUM_WARPS}

    def step(self) -> None:
        """Steps all parameters, and the average, on the current stream."""
        self._steps += 1
        beta_1, beta_2 = self._betas
        # In float64, as torch computes them; the kernel gets them rounded to float32.
        shrinkage = self._lr * self._weight_decay
        step_size = self._lr / (1 - beta_1**self._steps)
        correction = math.sqrt(1 - beta_2**self._steps)
        share = 0.0 if self._decay is None else 1 - self._decay
        scalars = (shrinkage, 1 - beta_1, 1 - beta_2, step_size, correction, self._eps, share)
        # Triton launches on the current device.
        with torch.cuda.device(self._table.device if self._table.is_cuda else -1):
            step[(len(self._table),)](self._table, *scalars, **self._meta)


def _check(tensor: Tensor | None) -> None:
    if tensor is None:
        raise ValueError('a parameter has no gradient. Run a backward pass first.')
    if tensor.dtype is not torch.float32 or not tensor.is_contiguous() or tensor.data_ptr() % _ALIGNMENT:
        raise ValueError(
            f'the kernel steps contiguous float32 tensors whose address is a multiple of {_ALIGNMENT}, got '
            f'{tensor.dtype} with strides {tensor.stride()} at {tensor.data_ptr():#x}. Clone the tensor.'
        )


def _table(columns: Sequence[Sequence[Tensor]]) -> Tensor:
    """A row for each piece of each parameter: its length, then where it starts in each of ``columns``."""
    parts = []
    for tensors in zip(*columns, strict=True):
        starts = torch.arange(0, tensors[0].numel(), PIECE)
        lengths = (tensors[0].numel() - starts).clamp(max=PIECE)
        addresses = [tensor.data_ptr() + starts * tensor.element_size() for tensor in tensors]
        parts.append(torch.stack([lengths, *addresses], dim=1))
    return torch.cat(parts).to(columns[0][0].device)


@triton.jit
def step(
    table, shrinkage, share_1, share_2, step_size, correction, eps, share,
    AVERAGES: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    row = table + tl.program_id(0).to(tl.int64) * (6 if AVERAGES else 5)
    count = tl.load(row).to(tl.int32)
    # Whole pieces need no mask, and without one the loads are vectors.
    if count == PIECE:
        _step_piece(
            row, count, shrinkage, share_1, share_2, step_size, correction, eps, share, AVERAGES, False, PIECE
        )  # fmt: skip
    else:
        _step_piece(
            row, count, shrinkage, share_1, share_2, step_size, correction, eps, share, AVERAGES, True, PIECE
        )  # fmt: skip


@triton.jit
def _step_piece(
    row, count, shrinkage, share_1, share_2, step_size, correction, eps, share,
    AVERAGES: tl.constexpr, MASKED: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, PIECE)
    weight = _read(row + 1, offsets, count, MASKED)
    gradient = _read(row + 2, offsets, count, MASKED)
    first = _read(row + 3, offsets, count, MASKED)
    second = _read(row + 4, offsets, count, MASKED)
    average = _read(row + 5, offsets, count, MASKED) if AVERAGES else weight
    weight -= shrinkage * weight
    # torch multiplies by beta2 in float64. In float32 0.999 is off by 1e-8, which a thousand steps make 1e-5 of the
    # moment. 1 - 0.999 is off by no more than its own last place, so we write both moments with it.
    first += share_1 * (gradient - first)
    second += share_2 * (gradient * gradient - second)
    denominator = tl.div_rn(tl.sqrt_rn(second), correction) + eps
    weight -= tl.div_rn(step_size * first, denominator)
    _write(row + 1, weight, offsets, count, MASKED)
    _write(row + 3, first, offsets, count, MASKED)
    _write(row + 4, second, offsets, count, MASKED)
    if AVERAGES:
        _write(row + 5, average + share * (weight - average), offsets, count, MASKED)


@triton.jit
def _read(place, offsets, count, MASKED: tl.constexpr):
    pointer = _pointer(place) + offsets
    return tl.load(pointer, mask=offsets < count, other=0.0) if MASKED else tl.load(pointer)


@triton.jit
def _write(place, value, offsets, count, MASKED: tl.constexpr):
    pointer = _pointer(place) + offsets
    if MASKED:
        tl.store(pointer, value, mask=offsets < count)
    else:
        tl.store(pointer, value)


@triton.jit
def _pointer(place):
    return tl.multiple_of(tl.load(place).to(tl.pointer_type(tl.float32)), 16)
