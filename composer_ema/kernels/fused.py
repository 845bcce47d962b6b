"""The fused path on CUDA: one Triton launch for all tensors of a device, whatever their number, dtypes and averages.

A table on the device, built once, gives each program a piece of one tensor: where it starts, how long it is, and where
the same piece starts in each of k averages. The program reads its piece of the source once and updates all k, so k
float32 averages move 4 + 8k bytes per parameter. Tensors that are copied, such as BatchNorm's counters, are rows of the
same table. Weights, seed and step are read from device memory, so a captured CUDA graph replays with whatever stands
there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from composer_ema.kernels.layout import Pair, flat
from composer_ema.kernels.rules import PHILOX_ROUNDS, PIECE, Rules, Steps

_SOURCE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SHADOW_CODES = {torch.float32: 0, torch.bfloat16: 1}
# One code for all rows of the table, or this: the table says it row by row.
_MIXED = -1
# Codes of rows that are copied as they are, whatever their dtype: in units of four bytes, or of one.
_WORDS, _BYTES = 3, 4
# Columns: address and length of the source's piece and its code; then k addresses and k codes of averages. A row that
# is copied uses the first address of them.
_HEAD = 3
_NUM_WARPS = 8


def refusal(shadow: Tensor, source: Tensor, rules: Rules) -> str | None:
    """Why this pair cannot be fused, in words; None if it can."""
    del rules  # all of them are kept
    if source.dtype not in _SOURCE_CODES:
        return f'weights of {source.dtype} are not fused'
    if shadow.dtype not in _SHADOW_CODES:
        return f'averages of {shadow.dtype} are not fused'
    return _refusal_of_memory(shadow, source)


def refusal_to_copy(copy: Tensor, source: Tensor) -> str | None:
    """Why ``copy`` cannot become a copy of ``source`` in the launch that averages others; None if it can."""
    if copy.dtype != source.dtype:
        return f'the copy is {copy.dtype}, the source is {source.dtype}'
    return _refusal_of_memory(copy, source)


def _refusal_of_memory(shadow: Tensor, source: Tensor) -> str | None:
    # Triton's interpreter runs the same kernel on a CPU: for tests, and only when it is asked for by name.
    is_interpreted = os.environ.get('TRITON_INTERPRET') == '1'
    if shadow.device != source.device:
        return f'the average is on {shadow.device}, the weights are on {source.device}'
    if shadow.device.type != 'cuda' and not is_interpreted:
        return f'Triton runs on CUDA devices, not on {shadow.device}'
    if any(tensor.is_conj() or tensor.is_neg() for tensor in (shadow, source)):
        return 'memory holds the conjugate or the negative of what the tensor is'
    if shadow.stride() != source.stride() or flat(shadow) is None:
        return 'average and weights do not lie densely in the same order'
    return None


def prepare(
    shadow_sets: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    rules: Rules,
    copied: Sequence[Pair] = (),
) -> Steps:
    """Builds the table and returns a step of one launch. All tensors are on one device.

    The step has two attributes for who captures it in a CUDA graph: ``weights``, k float32 on the device, which a step
    fills when they change and a replay only reads; ``control``, int64: seed, next step, and one of its own.

    Args:
        shadow_sets: k lists of averages; ``refusal`` let each pass.
        sources: as many as each of these.
        rules: see there.
        copied: pairs of a copy and its source, of any dtype, copied whatever the weights; ``refusal_to_copy`` let
            each pass.
    """
    num_averages = len(shadow_sets)
    device = (*sources, *(source for _, source in copied))[0].device
    rows = _rows(shadow_sets, sources)
    copied_rows = _rows_of_copies(copied, num_averages)
    shadow_codes = rows[:, _HEAD + num_averages :]
    addresses = torch.cat([rows[:, :1], rows[:, _HEAD : _HEAD + num_averages]], dim=1)
    meta: dict[str, Any] = {
        'K': num_averages,
        'SOURCE': _common(rows[:, 2]),
        'SHADOW': _common(shadow_codes),
        'GUARD': rules.skip_nonfinite,
        'STOCHASTIC': rules.stochastic and bool((shadow_codes == _SHADOW_CODES[torch.bfloat16]).any()),
        'COPIES': len(copied_rows) > 0,
        'ALIGNED': bool((addresses % 16 == 0).all()),
        'PIECE': PIECE,
        'ROUNDS': PHILOX_ROUNDS,
        'num_warps': _NUM_WARPS,
    }
    # Random bits are counted by row, so copies come last.
    return _Launch(torch.cat([rows, copied_rows]).to(device), num_averages, rules, meta)


class _Launch:
    def __init__(self, table: Tensor, num_averages: int, rules: Rules, meta: dict[str, Any]) -> None:
        self.weights = torch.zeros(num_averages, device=table.device)
        self.control = torch.tensor([rules.seed, rules.first_step, 0], device=table.device)
        self._skipped = (
            torch.zeros((), dtype=torch.int64, device=table.device) if rules.skipped is None else rules.skipped
        )
        self._table, self._meta, self._last = table, meta, None

    def __call__(self, weights: Sequence[float]) -> None:
        weights = tuple(weights)
        if weights != self._last:
            for slot, weight in zip(self.weights, weights, strict=True):
                slot.fill_(weight)
            self._last = weights
        # The launch goes to the current device, whichever it is; one that is current already costs nothing.
        with torch.cuda.device(self._table.device if self._table.is_cuda else -1):
            _update[(len(self._table),)](self._table, self.weights, self.control, self._skipped, **self._meta)


def _rows(shadow_sets: Sequence[Sequence[Tensor]], sources: Sequence[Tensor]) -> Tensor:
    """The table on the host, int64: a row for each piece of each source."""
    parts = [_no_rows(len(shadow_sets))]
    for source, *shadows in zip(sources, *shadow_sets, strict=True):
        starts = torch.arange(0, source.numel(), PIECE)
        part = torch.empty(len(starts), _HEAD + 2 * len(shadows), dtype=torch.int64)
        part[:, 0] = source.data_ptr() + starts * source.element_size()
        part[:, 1] = (source.numel() - starts).clamp(max=PIECE)
        part[:, 2] = _SOURCE_CODES[source.dtype]
        for k, shadow in enumerate(shadows):
            part[:, _HEAD + k] = shadow.data_ptr() + starts * shadow.element_size()
            part[:, _HEAD + len(shadows) + k] = _SHADOW_CODES[shadow.dtype]
        parts.append(part)
    return torch.cat(parts)


def _rows_of_copies(copied: Sequence[Pair], num_averages: int) -> Tensor:
    parts = [_no_rows(num_averages)]
    for copy, source in copied:
        size, addresses = source.numel() * source.element_size(), (source.data_ptr(), copy.data_ptr())
        unit = 1 if any(number % 4 for number in (size, *addresses)) else 4
        starts = torch.arange(0, size, PIECE * unit)
        part = torch.zeros(len(starts), _HEAD + 2 * num_averages, dtype=torch.int64)
        part[:, 0], part[:, _HEAD] = addresses[0] + starts, addresses[1] + starts
        part[:, 1] = ((size - starts) // unit).clamp(max=PIECE)
        part[:, 2] = _WORDS if unit == 4 else _BYTES
        parts.append(part)
    return torch.cat(parts)


def _no_rows(num_averages: int) -> Tensor:
    return torch.empty(0, _HEAD + 2 * num_averages, dtype=torch.int64)


def _common(codes: Tensor) -> int:
    distinct = codes.unique()
    return int(distinct) if distinct.numel() == 1 else _MIXED


@triton.jit
def _update(
    table, weights, control, skipped,
    K: tl.constexpr, SOURCE: tl.constexpr, SHADOW: tl.constexpr, GUARD: tl.constexpr, STOCHASTIC: tl.constexpr,
    COPIES: tl.constexpr, ALIGNED: tl.constexpr, PIECE: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    row = table + number.to(tl.int64) * (3 + 2 * K)
    count = tl.load(row + 1).to(tl.int32)
    seed, step = tl.load(control), tl.load(control + 1).to(tl.uint32)
    number = number.to(tl.uint32)
    code = tl.load(row + 2) if COPIES else 0
    # Whole pieces need no mask, and without one the loads are vectors.
    if code >= 3:
        _copy_piece(row, count, code, PIECE)
    elif count == PIECE:
        _average_piece(
            row, count, weights, skipped, seed, number, step, K, SOURCE, SHADOW, GUARD, STOCHASTIC, False, ALIGNED,
            PIECE, ROUNDS,
        )  # fmt: skip
    else:
        _average_piece(
            row, count, weights, skipped, seed, number, step, K, SOURCE, SHADOW, GUARD, STOCHASTIC, True, ALIGNED,
            PIECE, ROUNDS,
        )  # fmt: skip
    if STOCHASTIC:
        # When the last program arrives, all have read the step; it alone moves it on.
        arrived = tl.atomic_add(control + 2, 1)
        if arrived == tl.num_programs(0) - 1:
            tl.atomic_add(control + 1, 1)
            tl.atomic_xchg(control + 2, 0)


@triton.jit
def _copy_piece(row, count, code, PIECE: tl.constexpr):
    offsets = tl.arange(0, PIECE)
    source, copy = tl.load(row), tl.load(row + 3)
    if code == 3:
        words = tl.load(source.to(tl.pointer_type(tl.int32)) + offsets, mask=offsets < count)
        tl.store(copy.to(tl.pointer_type(tl.int32)) + offsets, words, mask=offsets < count)
    else:
        single = tl.load(source.to(tl.pointer_type(tl.int8)) + offsets, mask=offsets < count)
        tl.store(copy.to(tl.pointer_type(tl.int8)) + offsets, single, mask=offsets < count)


@triton.jit
def _average_piece(
    row, count, weights, skipped, seed, number, step,
    K: tl.constexpr, SOURCE: tl.constexpr, SHADOW: tl.constexpr, GUARD: tl.constexpr, STOCHASTIC: tl.constexpr,
    MASKED: tl.constexpr, ALIGNED: tl.constexpr, PIECE: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, PIECE)
    address = tl.load(row)
    if SOURCE >= 0:
        new = _read(address, offsets, count, SOURCE, MASKED, ALIGNED)
    else:
        code = tl.load(row + 2)
        if code == 0:
            new = _read(address, offsets, count, 0, MASKED, ALIGNED)
        elif code == 1:
            new = _read(address, offsets, count, 1, MASKED, ALIGNED)
        else:
            new = _read(address, offsets, count, 2, MASKED, ALIGNED)
    # A comparison with NaN is false. Kept as numbers: Triton 3.3's interpreter cannot negate booleans.
    is_bad = tl.where(tl.abs(new) <= 3.4028234663852886e38, 0, 1)
    if GUARD:
        tl.atomic_add(skipped + offsets * 0, is_bad.to(tl.int64), mask=is_bad != 0)
    for k in tl.static_range(K):
        weight, shadow = tl.load(weights + k), tl.load(row + 3 + k)
        if SHADOW >= 0:
            _average(
                shadow, offsets, count, new, is_bad, weight, seed, number, step, k, SHADOW, GUARD, STOCHASTIC,
                MASKED, ALIGNED, ROUNDS,
            )  # fmt: skip
        else:
            if tl.load(row + 3 + K + k) == 0:
                _average(
                    shadow, offsets, count, new, is_bad, weight, seed, number, step, k, 0, GUARD, STOCHASTIC, MASKED,
                    ALIGNED, ROUNDS,
                )  # fmt: skip
            else:
                _average(
                    shadow, offsets, count, new, is_bad, weight, seed, number, step, k, 1, GUARD, STOCHASTIC, MASKED,
                    ALIGNED, ROUNDS,
                )  # fmt: skip


@triton.jit
def _average(
    shadow, offsets, count, new, is_bad, weight, seed, number, step, which,
    CODE: tl.constexpr, GUARD: tl.constexpr, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    old = _read(shadow, offsets, count, CODE, MASKED, ALIGNED)
    # The two forms of torch.lerp: each is exact at its own end.
    value = tl.where(weight < 0.5, old + weight * (new - old), new - (new - old) * (1.0 - weight))
    value = tl.where(weight >= 1.0, new, tl.where(weight <= 0.0, old, value))
    if CODE == 1:
        # bfloat16 is float32 without its lower 16 bits: what is added before they are cut decides which carry.
        bits = value.to(tl.uint32, bitcast=True)
        if STOCHASTIC:
            random, _, _, _ = tl.philox(seed, offsets.to(tl.uint32), number, step, which, ROUNDS)
            rounded = (bits + (random & 0xFFFF)) & 0xFFFF0000
        else:
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(tl.abs(value) <= 3.3895313892515355e38, rounded.to(tl.float32, bitcast=True), value)
    if GUARD:
        value = tl.where(is_bad != 0, old, value)
    pointer = _pointer(shadow, CODE, ALIGNED) + offsets
    if MASKED:
        tl.store(pointer, value, mask=offsets < count)
    else:
        tl.store(pointer, value)


@triton.jit
def _read(address, offsets, count, CODE: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = _pointer(address, CODE, ALIGNED) + offsets
    value = tl.load(pointer, mask=offsets < count, other=0.0) if MASKED else tl.load(pointer)
    return value.to(tl.float32)


@triton.jit
def _pointer(address, CODE: tl.constexpr, ALIGNED: tl.constexpr):
    if CODE == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif CODE == 1:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    else:
        pointer = address.to(tl.pointer_type(tl.float16))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer
