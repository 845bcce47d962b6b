"""The fused backend for CUDA: one Triton launch updates all tensors of a device, whatever their number and dtypes.

A table on the device, built once, assigns each program a piece of one tensor: where the piece starts, how long it is,
and where the same piece starts in each of k averages. The program reads its piece of the source once and updates all k
averages, so k float32 averages move 4 + 8k bytes per parameter, and compensated ones 4 + 16k. Tensors that are copied,
such as BatchNorm's counters, are rows of the same table. The kernel reads weights, seed and step from device memory, so
a captured CUDA graph replays with the values that are there at the time.

This module imports Triton only to prepare a step: CPU builds of torch come without it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from composer_ema.kernels.backend import Steps
from composer_ema.kernels.layout import Pair, flat
from composer_ema.kernels.rules import PHILOX_ROUNDS, PIECE, Rules

_SOURCE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SHADOW_CODES = {torch.float32: 0, torch.bfloat16: 1}
# Stands for the one code that all rows share where they do not share one: the kernel then reads each row's own code.
_MIXED = -1
# Codes of rows that are copied without regard to dtype, in units of four bytes or of one.
_WORDS, _BYTES = 3, 4
# Added to the code of a source whose elements are copied where average or source is not finite.
_MENDED = 8
# The columns of a row: address, length and code of the source's piece, then k addresses and k codes of averages, and
# where these are compensated k addresses of their Kahan terms.
# A row that is copied has its target in the first of the k addresses.
_HEAD = 3
# Warps of a program. On an H100 two to sixteen take equally long, but where bits are drawn, four take 5 % less.
_NUM_WARPS, _NUM_WARPS_DRAWING = 8, 4


def refusal_of_device(device: torch.device, *, is_asked: bool) -> str | None:
    """Triton compiles for CUDA only, and may be missing."""
    # Triton's interpreter runs the same kernel on a CPU. It is for tests, so we use it only when asked.
    is_interpreted = is_asked and os.environ.get('TRITON_INTERPRET') == '1'
    if device.type != 'cuda' and not is_interpreted:
        return f'Triton runs on CUDA devices, not on {device}'
    try:
        from composer_ema.kernels import fused_kernel  # noqa: F401
    except ModuleNotFoundError as error:
        return f'{error.name} is not installed'
    return None


def refusal(shadow: Tensor, source: Tensor, rules: Rules) -> str | None:
    """The kernel knows a few dtypes, and walks both tensors by one offset."""
    del rules  # the kernel follows all of them
    if source.dtype not in _SOURCE_CODES:
        return f'weights of {source.dtype} are not fused'
    if shadow.dtype not in _SHADOW_CODES:
        return f'averages of {shadow.dtype} are not fused'
    return _refusal_of_memory(shadow, source)


def refusal_to_copy(copy: Tensor, source: Tensor) -> str | None:
    """The kernel copies bytes, so the dtypes must be equal; any will do."""
    if copy.dtype != source.dtype:
        return f'the copy is {copy.dtype}, the source is {source.dtype}'
    return _refusal_of_memory(copy, source)


def keeps_address(shadow: Tensor, source: Tensor) -> bool:
    """The table holds addresses."""
    del shadow, source
    return True


def prepare(
    shadow_sets: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    rules: Rules,
    copied: Sequence[Pair],
    are_mended: Sequence[bool],
    compensations: Sequence[Sequence[Tensor]] | None,
) -> Steps:
    """Builds the table and returns a step of one launch.

    To capture the step in a CUDA graph, use its two attributes. ``weights`` is k float32 on the device: a call fills
    them when they change, a replay only reads them. ``control`` is three int64: the seed, the number of the first
    update, and how many programs have finished since.
    """
    num_averages = len(shadow_sets)
    device = (*sources, *(source for _, source in copied))[0].device
    rows = _rows(shadow_sets, sources, are_mended, compensations)
    copied_rows = _rows_of_copies(copied, rows.shape[1])
    shadow_codes = rows[:, _HEAD + num_averages : _HEAD + 2 * num_averages]
    addresses = rows[:, [0, *range(_HEAD, _HEAD + num_averages), *range(_HEAD + 2 * num_averages, rows.shape[1])]]
    meta: dict[str, Any] = {
        'K': num_averages,
        'SOURCE': _common(rows[:, 2] % _MENDED),
        'SHADOW': _common(shadow_codes),
        'GUARD': rules.skip_nonfinite,
        'STOCHASTIC': rules.stochastic and bool((shadow_codes == _SHADOW_CODES[torch.bfloat16]).any()),
        'COPIES': len(copied_rows) > 0,
        'MENDS': any(are_mended),
        'ALIGNED': bool((addresses % 16 == 0).all()),
        'PIECE': PIECE,
        'ROUNDS': PHILOX_ROUNDS,
        'FIRST': rules.first_piece if rules.stochastic else 0,
        'COMPENSATED': rules.compensated,
    }
    meta['num_warps'] = _NUM_WARPS_DRAWING if meta['STOCHASTIC'] else _NUM_WARPS
    # Random bits are counted by row, so copies come last: then they do not change the bits.
    return _Launch(torch.cat([rows, copied_rows]).to(device), num_averages, rules, meta)


def _refusal_of_memory(shadow: Tensor, source: Tensor) -> str | None:
    if shadow.device != source.device:
        return f'the average is on {shadow.device}, the weights are on {source.device}'
    if any(tensor.is_conj() or tensor.is_neg() for tensor in (shadow, source)):
        return 'the tensor is a lazy conjugate or negative of its memory'
    if shadow.stride() != source.stride() or flat(shadow) is None:
        return 'average and weights do not lie densely in the same order'
    return None


class _Launch:
    """A step of one launch; :func:`prepare` documents the attributes."""

    def __init__(self, table: Tensor, num_averages: int, rules: Rules, meta: dict[str, Any]) -> None:
        from composer_ema.kernels import fused_kernel

        self.weights = torch.zeros(num_averages, device=table.device)
        self._slots = list(self.weights)
        self.control = torch.tensor([rules.seed, rules.first_step, 0], device=table.device)
        self._skipped = (
            torch.zeros((), dtype=torch.int64, device=table.device) if rules.skipped is None else rules.skipped
        )
        self._kernel = fused_kernel.update
        self._table, self._meta, self._last = table, meta, None

    def __call__(self, weights: Sequence[float]) -> None:
        weights = tuple(weights)
        if weights != self._last:
            self._fill(weights)
            self._last = weights
        # Triton launches on the current device, so we make the table's device current; if it already is, that is free.
        with torch.cuda.device(self._table.device if self._table.is_cuda else -1):
            self._kernel[(len(self._table),)](self._table, self.weights, self.control, self._skipped, **self._meta)

    def _fill(self, weights: Sequence[float]) -> None:
        """In one launch or two, whose arguments are the numbers: the host never waits, and a graph can capture them."""
        if len(weights) == 1:
            self.weights.fill_(weights[0])
        else:
            torch._foreach_zero_(self._slots)
            torch._foreach_add_(self._slots, weights)


def _rows(
    shadow_sets: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    are_mended: Sequence[bool],
    compensations: Sequence[Sequence[Tensor]] | None,
) -> Tensor:
    """The table on the host, int64: a row for each piece of each source."""
    width = _HEAD + (2 if compensations is None else 3) * len(shadow_sets)
    parts = [torch.empty(0, width, dtype=torch.int64)]
    for index, (is_mended, source) in enumerate(zip(are_mended, sources, strict=True)):
        shadows = [shadows[index] for shadows in shadow_sets]
        terms = [terms[index] for terms in compensations or ()]
        starts = torch.arange(0, source.numel(), PIECE)
        part = torch.empty(len(starts), width, dtype=torch.int64)
        part[:, 0] = source.data_ptr() + starts * source.element_size()
        part[:, 1] = (source.numel() - starts).clamp(max=PIECE)
        part[:, 2] = _SOURCE_CODES[source.dtype] + (_MENDED if is_mended else 0)
        for k, shadow in enumerate(shadows):
            part[:, _HEAD + k] = shadow.data_ptr() + starts * shadow.element_size()
            part[:, _HEAD + len(shadows) + k] = _SHADOW_CODES[shadow.dtype]
        for k, term in enumerate(terms):
            part[:, _HEAD + 2 * len(shadows) + k] = term.data_ptr() + starts * term.element_size()
        parts.append(part)
    return torch.cat(parts)


def _rows_of_copies(copied: Sequence[Pair], width: int) -> Tensor:
    """The table's rows for pairs that are copied, as wide as those of averages."""
    parts = [torch.empty(0, width, dtype=torch.int64)]
    for copy, source in copied:
        size, addresses = source.numel() * source.element_size(), (source.data_ptr(), copy.data_ptr())
        unit = 1 if any(number % 4 for number in (size, *addresses)) else 4
        starts = torch.arange(0, size, PIECE * unit)
        part = torch.zeros(len(starts), width, dtype=torch.int64)
        part[:, 0], part[:, _HEAD] = addresses[0] + starts, addresses[1] + starts
        part[:, 1] = ((size - starts) // unit).clamp(max=PIECE)
        part[:, 2] = _WORDS if unit == 4 else _BYTES
        parts.append(part)
    return torch.cat(parts)


def _common(codes: Tensor) -> int:
    """The one code in ``codes``, or that for several."""
    distinct = codes.unique()
    return int(distinct) if distinct.numel() == 1 else _MIXED
