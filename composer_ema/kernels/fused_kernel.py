"""The Triton kernel of the fused backend: each program averages, or copies, the tensors of one row of the table.

:mod:`composer_ema.kernels.fused` builds the table and documents its columns and codes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def update(
    table, weights, control, skipped,
    K: tl.constexpr, SOURCE: tl.constexpr, SHADOW: tl.constexpr, GUARD: tl.constexpr, STOCHASTIC: tl.constexpr,
    COPIES: tl.constexpr, MENDS: tl.constexpr, ALIGNED: tl.constexpr, PIECE: tl.constexpr, ROUNDS: tl.constexpr,
    FIRST: tl.constexpr, COMPENSATED: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    row = table + number.to(tl.int64) * (3 + (3 if COMPENSATED else 2) * K)
    count = tl.load(row + 1).to(tl.int32)
    # Of the programs that have finished so far, all of earlier launches and some of this one, but not this one.
    finished = tl.load(control + 2) if STOCHASTIC else 0
    seed, step = tl.load(control), (tl.load(control + 1) + finished // tl.num_programs(0)).to(tl.uint32)
    number = number.to(tl.uint32) + FIRST
    code = tl.load(row + 2) % 8 if COPIES else 0
    # Whole pieces need no mask, and without one the loads are vectors.
    if code >= 3:
        _copy_piece(row, count, code, PIECE)
    elif count == PIECE:
        _average_piece(
            row, count, weights, skipped, seed, number, step, K, SOURCE, SHADOW, GUARD, STOCHASTIC, MENDS, False,
            ALIGNED, PIECE, ROUNDS, COMPENSATED,
        )  # fmt: skip
    else:
        _average_piece(
            row, count, weights, skipped, seed, number, step, K, SOURCE, SHADOW, GUARD, STOCHASTIC, MENDS, True,
            ALIGNED, PIECE, ROUNDS, COMPENSATED,
        )  # fmt: skip
    if STOCHASTIC:
        tl.debug_barrier()  # until all of this program's warps have read how many have finished
        tl.atomic_add(control + 2, 1)


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
    MENDS: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr, PIECE: tl.constexpr, ROUNDS: tl.constexpr,
    COMPENSATED: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, PIECE)
    address = tl.load(row)
    if SOURCE >= 0:
        new = _read(address, offsets, count, SOURCE, MASKED, ALIGNED)
    else:
        code = tl.load(row + 2) % 8
        if code == 0:
            new = _read(address, offsets, count, 0, MASKED, ALIGNED)
        elif code == 1:
            new = _read(address, offsets, count, 1, MASKED, ALIGNED)
        else:
            new = _read(address, offsets, count, 2, MASKED, ALIGNED)
    # A comparison with NaN is false. We keep numbers because Triton 3.3's interpreter cannot negate booleans.
    is_bad = tl.where(tl.abs(new) <= 3.4028234663852886e38, 0, 1)
    is_mended = tl.load(row + 2) // 8 if MENDS else 0
    for k in tl.static_range(K):
        weight, shadow = tl.load(weights + k), tl.load(row + 3 + k)
        term = tl.load(row + 3 + 2 * K + k) if COMPENSATED else shadow
        if SHADOW >= 0:
            _average(
                shadow, term, offsets, count, new, is_bad, is_mended, weight, seed, number, step, k, SHADOW, GUARD,
                STOCHASTIC, MENDS, MASKED, ALIGNED, PIECE, ROUNDS, COMPENSATED,
            )  # fmt: skip
        else:
            if tl.load(row + 3 + K + k) == 0:
                _average(
                    shadow, term, offsets, count, new, is_bad, is_mended, weight, seed, number, step, k, 0, GUARD,
                    STOCHASTIC, MENDS, MASKED, ALIGNED, PIECE, ROUNDS, COMPENSATED,
                )  # fmt: skip
            else:
                _average(
                    shadow, term, offsets, count, new, is_bad, is_mended, weight, seed, number, step, k, 1, GUARD,
                    STOCHASTIC, MENDS, MASKED, ALIGNED, PIECE, ROUNDS, COMPENSATED,
                )  # fmt: skip
    if GUARD:
        # Last, since a sum is a barrier, behind which no load may wait. Where all is well, nothing is written.
        count_bad = tl.sum(is_bad).to(tl.int64)
        tl.atomic_add(skipped, count_bad, mask=count_bad > 0)


@triton.jit
def _average(
    shadow, term, offsets, count, new, is_bad, is_mended, weight, seed, number, step, which,
    CODE: tl.constexpr, GUARD: tl.constexpr, STOCHASTIC: tl.constexpr, MENDS: tl.constexpr, MASKED: tl.constexpr,
    ALIGNED: tl.constexpr, PIECE: tl.constexpr, ROUNDS: tl.constexpr, COMPENSATED: tl.constexpr,
):  # fmt: skip
    old = _read(shadow, offsets, count, CODE, MASKED, ALIGNED)
    if COMPENSATED:
        # What the average shall move by, with what rounding left out so far. At weight 1 this is exactly new - old.
        left_out = _read(term, offsets, count, 0, MASKED, ALIGNED)
        move = _lerp(left_out, new - old, weight)
        value = tl.where(weight >= 1.0, new, tl.where(weight <= 0.0, old, old + move))
    else:
        value = tl.where(weight >= 1.0, new, tl.where(weight <= 0.0, old, _lerp(old, new, weight)))
    is_copied = tl.where(weight >= 1.0, 1, 0)
    if MENDS:
        is_lost = tl.where(tl.abs(value) <= 3.4028234663852886e38, 0, 1)
        takes_source = is_lost * is_mended * tl.where(weight > 0.0, 1, 0)
        value = tl.where(takes_source != 0, new, value)
        is_copied = is_copied + takes_source
    if CODE == 1:
        # bfloat16 is float32 without its lower 16 bits. What we add before cutting them off decides what carries.
        bits = value.to(tl.uint32, bitcast=True)
        if STOCHASTIC:
            rounded = (bits + _random_bits(seed, number, step, which, PIECE, ROUNDS)) & 0xFFFF0000
        else:
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(tl.abs(value) <= 3.3895313892515355e38, rounded.to(tl.float32, bitcast=True), value)
    if GUARD:
        value = tl.where(is_bad != 0, old, value)
    _write(shadow, value, offsets, count, CODE, MASKED, ALIGNED)
    if COMPENSATED:
        # Exact where the average is larger than its move (Dekker 1971).
        rest = tl.where(is_copied != 0, 0.0, tl.where(weight <= 0.0, left_out, move - (value - old)))
        if GUARD:
            rest = tl.where(is_bad != 0, left_out, rest)
        _write(term, rest, offsets, count, 0, MASKED, ALIGNED)


@triton.jit
def _random_bits(seed, number, step, which, PIECE: tl.constexpr, ROUNDS: tl.constexpr):
    """16 random bits for each element of a piece: eight elements share the four words of one Philox."""
    groups = tl.arange(0, PIECE // 8).to(tl.uint32)
    drawn = tl.philox(seed, groups, number, step, which, ROUNDS)
    words = tl.join(tl.join(drawn[0], drawn[2]), tl.join(drawn[1], drawn[3]))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (PIECE,))


@triton.jit
def _lerp(old, new, weight):
    # The two forms of torch.lerp; each is exact at its own end.
    return tl.where(weight < 0.5, old + weight * (new - old), new - (new - old) * (1.0 - weight))


@triton.jit
def _read(address, offsets, count, CODE: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = _pointer(address, CODE, ALIGNED) + offsets
    value = tl.load(pointer, mask=offsets < count, other=0.0) if MASKED else tl.load(pointer)
    return value.to(tl.float32)


@triton.jit
def _write(address, value, offsets, count, CODE: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = _pointer(address, CODE, ALIGNED) + offsets
    if MASKED:
        tl.store(pointer, value, mask=offsets < count)
    else:
        tl.store(pointer, value)


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
