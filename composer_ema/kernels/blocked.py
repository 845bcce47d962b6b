"""The blocked backend, for compensated averages: a few torch calls a piece, on pieces that stay in a core's cache.

A compensated average is the sum of its shadow and of a Kahan term, which holds what rounding the shadow has left out
(Kahan 1965). One update moves the sum, then splits it anew::

    move = term + weight * ((source - shadow) - term)
    shadow, term = round(shadow + move), (shadow + move) - round(shadow + move)

A call of torch reads and writes memory, so a tensor larger than the cache would pass through it once a call. Here all
calls, for all averages, are made on one piece before the next. Nothing is allocated per update, except where an element
is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from composer_ema.kernels import finite
from composer_ema.kernels.backend import Steps
from composer_ema.kernels.layout import Pair, Row, detached, grouped, is_lazy, pieces
from composer_ema.kernels.rules import Rules

# Elements of a piece for each thread of torch on a CPU: the four tensors of an average then take 1 MiB. Of 2**13 to
# 2**24 this was the fastest but for 2**17, which needs a larger cache. On an accelerator: what fills the device.
_PIECE_CPU = 2**16
_PIECE_ACCELERATOR = 2**24


@dataclass(frozen=True)
class _Piece:
    """A piece of one source and the same piece of its averages.

    Attributes:
        averages: shadow and Kahan term in each of k averages.
        source: what they average, as it lies in the model.
        current: the source in the dtype of the terms and on their device; scratch, unless it is the source itself.
    """

    averages: list[Pair]
    source: Tensor
    current: Tensor


@dataclass(frozen=True)
class _Scratch:
    """Views of the memory in which pieces of one shape are computed."""

    difference: Tensor
    old: Tensor
    is_finite: Tensor


def refusal_of_device(device: torch.device, *, is_asked: bool) -> str | None:
    """Torch's functions run on every device."""
    del device, is_asked
    return None


def refusal(shadow: Tensor, source: Tensor, rules: Rules) -> str | None:
    """Only compensated averages need more than one call."""
    del source
    if not rules.compensated:
        return 'the average has no Kahan term'
    if is_lazy(shadow):
        return 'it does not write conjugated or negated views'
    if rules.skip_nonfinite and shadow.device.type != 'cpu':
        return 'the host would wait to hear whether weights are finite'
    return None


def refusal_to_copy(copy: Tensor, source: Tensor) -> str | None:
    """A copy is one call, and so of no use to this backend."""
    del copy, source
    return 'copies need no pieces'


def keeps_address(shadow: Tensor, source: Tensor) -> bool:
    """A step holds views of its sources."""
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
    """Cuts the sources and their averages into pieces and returns a step that goes through them."""
    assert compensations is not None
    assert not copied
    updates: list[Callable[[Sequence[float]], None]] = []
    # A row is k shadows, k terms and the source; what is computed is of the kind of the terms.
    count = len(shadow_sets)
    sets = zip(*shadow_sets, *compensations, sources, strict=True)
    rows: list[tuple[Row, bool]] = [(tuple(detached(row)), each) for row, each in zip(sets, are_mended, strict=True)]
    for (device, dtype), of_kind in grouped(rows, lambda row: (row[0][count].device, row[0][count].dtype)).items():
        limit = _PIECE_CPU * torch.get_num_threads() if device.type == 'cpu' else _PIECE_ACCELERATOR
        cut = [(piece, is_mended) for row, is_mended in of_kind for piece in pieces(row, limit)]
        size = max(source.numel() for (*_, source), _ in cut)
        memory = [torch.empty(size, dtype=each, device=device) for each in (dtype, dtype, dtype, torch.bool)]
        for (*averages, source), is_mended in cut:
            current, *others = (each[: source.numel()].view(source.shape) for each in memory)
            is_alike = source.dtype == dtype and source.device == device
            pairs = list(zip(averages[:count], averages[count:], strict=True))
            piece = _Piece(pairs, source, source if is_alike else current)
            updates.append(_update_of(piece, _Scratch(*others), rules, is_mended))

    @torch.no_grad()
    def step(weights: Sequence[float]) -> None:
        if len(weights) != count:
            raise ValueError(f'weights must be one for each of {count} averages, got {len(weights)}.')
        for update in updates:
            update(weights)

    return step


def _update_of(piece: _Piece, scratch: _Scratch, rules: Rules, is_mended: bool) -> Callable[[Sequence[float]], None]:
    """Returns what updates all averages of a piece by their weights."""
    source, current = piece.source, piece.current
    moves = [(shadow, term, _move_of(shadow, term, current, scratch)) for shadow, term in piece.averages]
    mends = [_mend_of(shadow, term, current, scratch) if is_mended else None for shadow, term in piece.averages]

    def update(weights: Sequence[float]) -> None:
        if current is not source and max(weights) > 0:
            current.copy_(source)
        for weight, (shadow, term, move), mend in zip(weights, moves, mends, strict=True):
            if weight == 1:  # exactly, also over what is not finite
                shadow.copy_(source)
                term.zero_()
            elif weight != 0:
                move(weight)
                if mend is not None:
                    mend()

    if not rules.skip_nonfinite:
        return update
    tensors = [[tensor] for pair in piece.averages for tensor in pair]
    return finite.skipping(update, tensors, [source], [source], rules.skipped)


def _move_of(shadow: Tensor, term: Tensor, current: Tensor, scratch: _Scratch) -> Callable[[float], object]:
    """Returns what moves one average towards ``current``. Every tensor is of the term's dtype, but perhaps the shadow.

    ``new - old`` is exact if the average is at least as large as its move (Dekker 1971). If it is not, the error is of
    the size of what rounding the move itself leaves out.
    """
    difference = scratch.difference

    if shadow.dtype == term.dtype:

        def move(weight: float) -> None:
            torch.sub(current, shadow, out=difference)
            term.lerp_(difference, weight)  # now the move
            difference.copy_(shadow)
            shadow.add_(term)
            difference.sub_(shadow)  # now old - new
            term.add_(difference)

        return move

    old = scratch.old

    def move_narrow(weight: float) -> None:
        old.copy_(shadow)
        torch.sub(current, old, out=difference)
        term.lerp_(difference, weight)
        torch.add(old, term, out=difference)
        shadow.copy_(difference)
        difference.copy_(shadow)
        old.sub_(difference)
        term.add_(old)

    return move_narrow


def _mend_of(shadow: Tensor, term: Tensor, current: Tensor, scratch: _Scratch) -> Callable[[], object]:
    """Returns what copies each element whose average is not finite: it or the source was not."""
    value, is_finite, zero = scratch.difference, scratch.is_finite, term.new_zeros(())

    def mend() -> None:  # asks nothing, since an answer from a device would make the host wait
        value.copy_(shadow)
        value.sub_(value)  # 0 where it is finite, and else NaN
        torch.eq(value, 0, out=is_finite)
        torch.where(is_finite, term, zero, out=term)
        value.copy_(shadow)
        torch.where(is_finite, value, current, out=value)
        shadow.copy_(value)

    if shadow.device.type != 'cpu':
        return mend
    is_all_finite = finite.look(shadow)

    def mend_if_need_be() -> None:
        if not is_all_finite():
            mend()

    return mend_if_need_be
