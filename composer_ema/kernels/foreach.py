"""The foreach backend, fast on every device: one ``torch._foreach_lerp_`` per dtype, and no allocation per update.

Sources whose dtype or device differs from their shadow's pass through one scratch buffer of bounded size, chunk by
chunk. Small shadows that lie side by side on a CPU are moved as one tensor, which gives the same bits. On a CPU,
several averages take turns on one piece of the sources before the next, so that memory is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from composer_ema.kernels import finite
from composer_ema.kernels.backend import Steps
from composer_ema.kernels.layout import (
    Pair,
    Row,
    Scratch,
    as_part,
    can_be_bundled,
    carve,
    columns,
    detached,
    flat,
    grouped,
    is_lazy,
    packed,
    pieces,
    split_bundles,
)
from composer_ema.kernels.rules import Rules

# Elements of the sources that are read at a time, and so of the scratch buffer. On a CPU: of 2**14 to 2**22 this was
# the fastest, or within 3 % of it, with 1 and 2 threads, for 2 to 8 averages and sources of both widths. Less costs
# calls (6 µs each with 2 threads), and more no longer stays in the cache. On an accelerator: what fills the device.
_CHUNK_CPU = 2**20
_CHUNK_ACCELERATOR = 2**24
# Largest source, in elements, that is gathered faster than it is summed in a call of its own.
_GATHERED = 2**14


@dataclass(frozen=True)
class _Chunk:
    """Sources that are read together, once for all averages of their dtype.

    Attributes:
        averages: for each of these averages its shadows.
        sources: what the shadows move towards, in their dtype and on their device.
        read: fills what is scratch in ``sources`` and ``looked_at``.
        originals: the sources before they were cast.
        looked_at: tensors that are finite only if all originals are.
    """

    averages: list[list[Tensor]]
    sources: list[Tensor]
    read: Callable[[], object] | None
    originals: list[Tensor]
    looked_at: list[Tensor]


def refusal_of_device(device: torch.device, *, is_asked: bool) -> str | None:
    """Foreach kernels run on every device."""
    del device, is_asked
    return None


def refusal(shadow: Tensor, source: Tensor, rules: Rules) -> str | None:
    """Foreach kernels follow the formula alone, and round to the nearest. On a CPU they skip."""
    del source
    if is_lazy(shadow):
        return 'foreach kernels do not write conjugated or negated views'
    if rules.skip_nonfinite and shadow.device.type != 'cpu':
        return 'the host would wait to hear whether weights are finite'
    if rules.stochastic and shadow.dtype is torch.bfloat16:
        return 'foreach kernels round to the nearest'
    if rules.compensated:
        return 'foreach kernels keep no Kahan term'
    return None


def refusal_to_copy(copy: Tensor, source: Tensor) -> str | None:
    """Foreach kernels copy every pair, but not into conjugated or negated views."""
    del source
    return 'foreach kernels do not write conjugated or negated views' if is_lazy(copy) else None


def keeps_address(shadow: Tensor, source: Tensor) -> bool:
    """A step gathers small vectors from the sources themselves; of other sources it may hold views."""
    return not (can_be_bundled(shadow, source) and source.dim() == 1)


def prepare(
    shadow_sets: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    rules: Rules,
    copied: Sequence[Pair],
    are_mended: Sequence[bool],
    compensations: Sequence[Sequence[Tensor]] | None,
) -> Steps:
    """Groups the pairs by dtype and returns a step that makes one fused call per group or chunk, for each average."""
    del compensations  # pairs that have them were refused
    calls = list(_calls([detached(shadows) for shadows in shadow_sets], sources, rules, are_mended))
    copies = list(_copies(copied))

    def step(weights: Sequence[float]) -> None:
        if len(weights) != len(shadow_sets):
            raise ValueError(f'weights must be one for each of {len(shadow_sets)} averages, got {len(weights)}.')
        with torch.no_grad():  # a source that requires a gradient would record the update
            for call in calls:
                call(weights)
            for copy in copies:
                copy()

    def copy_alone(weights: Sequence[float]) -> None:
        del weights
        for copy in copies:
            copy()

    # Copies are of detached tensors, so alone they need no guard, which takes longer than a few of them.
    return step if sources else copy_alone


def _copies(copied: Sequence[Pair]) -> Iterator[Callable[[], object]]:
    bundles, singles = split_bundles((copy.detach(), source.detach()) for copy, source in copied)
    for (bundle,), parts in bundles:
        yield partial(torch.cat, parts, out=bundle)
    # CUDA has one kernel for many tensors only where both lists are of one dtype.
    for group in grouped(singles, lambda row: _kind(*row)).values():
        yield partial(torch._foreach_copy_, *columns(group))


def _calls(
    shadow_sets: Sequence[Sequence[Tensor]], sources: Sequence[Tensor], rules: Rules, are_mended: Sequence[bool]
) -> Iterator[Steps]:
    scratch = rules.scratch or Scratch()
    rows: list[tuple[Row, bool]] = list(zip(zip(*shadow_sets, sources, strict=True), are_mended, strict=True))
    for (kinds, is_mended), group in grouped(rows, _kinds).items():
        for kind in dict.fromkeys(kinds):
            which = [number for number, other in enumerate(kinds) if other == kind]
            of_kind = [(*(row[number] for number in which), row[-1]) for row, _ in group]
            for chunk in _chunks(of_kind, kind, scratch, is_guarded=rules.skip_nonfinite):
                yield _call(chunk, which, rules, is_mended)


def _kinds(row: tuple[Row, bool]) -> tuple[tuple[tuple[torch.device, torch.dtype, bool], ...], bool]:
    (*shadows, source), is_mended = row
    return tuple(_kind(shadow, source) for shadow in shadows), is_mended


def _kind(shadow: Tensor, source: Tensor) -> tuple[torch.device, torch.dtype, bool]:
    return shadow.device, shadow.dtype, shadow.dtype == source.dtype and shadow.device == source.device


def _chunks(
    rows: list[Row], kind: tuple[torch.device, torch.dtype, bool], scratch: Scratch, *, is_guarded: bool
) -> Iterator[_Chunk]:
    device, dtype, is_alike = kind
    limit = _CHUNK_CPU if device.type == 'cpu' else _CHUNK_ACCELERATOR
    if not is_alike:
        yield from _through_scratch(rows, scratch, device, dtype, limit)
        return
    bundles, singles = split_bundles(rows)
    yield from _gathered(bundles, scratch)
    # Chunks serve the cache of a CPU, and only where a source is read more than once.
    has_turns = device.type == 'cpu' and (len(rows[0]) > 2 or is_guarded)
    chunks = packed(_cut(singles, limit), _size, limit) if has_turns else [singles]
    for chunk in filter(None, chunks):
        *averages, sources = columns(chunk)
        read, looked_at = _looks(sources) if is_guarded else (None, [])
        yield _Chunk(averages, sources, read, sources, looked_at)


def _looks(sources: list[Tensor]) -> tuple[Callable[[], object] | None, list[Tensor]]:
    """Returns what to look at in place of ``sources``, and what gathers the small ones of them into it."""
    small = [source for source in sources if source.numel() <= _GATHERED and flat(source.detach()) is not None]
    if len(small) < 2:
        return None, sources
    gathered = torch.empty(sum(source.numel() for source in small), dtype=small[0].dtype)
    others = [source for source in sources if not any(source is other for other in small)]
    return partial(torch.cat, list(map(as_part, small)), out=gathered), [gathered, *others]


def _cut(rows: Sequence[Row], limit: int) -> Iterator[Row]:
    for row in rows:
        # A source that is not cut stays itself, which a step may follow to other memory.
        yield from pieces(row, limit) if _size(row) > limit else (row,)


def _gathered(bundles: list[tuple[list[Tensor], list[Tensor]]], scratch: Scratch) -> Iterator[_Chunk]:
    for shadows, parts in bundles:
        gathered = [scratch.take(shadows[0].numel(), shadows[0].dtype, shadows[0].device)]
        read = partial(torch.cat, parts, out=gathered[0])
        yield _Chunk([[shadow] for shadow in shadows], gathered, read, gathered, gathered)


def _through_scratch(
    rows: list[Row], scratch: Scratch, device: torch.device, dtype: torch.dtype, limit: int
) -> Iterator[_Chunk]:
    cut = [piece for row in rows for piece in pieces(tuple(detached(row)), limit)]
    chunks = list(packed(cut, _size, limit))
    memory = scratch.take(max(sum(map(_size, chunk)) for chunk in chunks), dtype, device)
    for chunk in chunks:
        *averages, originals = columns(chunk)
        casts = carve(memory, averages[0])
        read = partial(torch._foreach_copy_, casts, originals)
        yield _Chunk(averages, casts, read, originals, [memory[: sum(map(_size, chunk))]])


def _size(row: Row) -> int:
    return row[-1].numel()


def _call(chunk: _Chunk, which: list[int], rules: Rules, is_mended: bool) -> Steps:
    """A step of the averages numbered ``which``, that takes the weights of all."""
    moves = [
        (number, shadows, list(map(finite.mending, shadows, chunk.sources)) if is_mended else [])
        for number, shadows in zip(which, chunk.averages, strict=True)
    ]
    sources, read = chunk.sources, chunk.read

    def average(weights: Sequence[float]) -> None:
        for number, shadows, mends in moves:
            weight = weights[number]
            _lerp(shadows, sources, weight)
            if 0 < weight < 1:
                for mend in mends:
                    mend()

    step = average
    if rules.skip_nonfinite:
        skipped = rules.skipped if 0 in which else None  # counted once, whatever the number of averages
        step = finite.skipping(average, chunk.averages, chunk.originals, chunk.looked_at, skipped)
    if read is None:
        return step

    def read_and_average(weights: Sequence[float]) -> None:
        if rules.skip_nonfinite or max(weights) > 0:
            read()
            step(weights)

    return read_and_average


def _lerp(shadows: list[Tensor], sources: list[Tensor], weight: float) -> None:
    # A lerp would turn what is not finite into NaN, so the ends are exact: 0 keeps the shadow, 1 copies the source.
    if weight == 1:
        torch._foreach_copy_(shadows, sources)
    elif weight != 0:
        torch._foreach_lerp_(shadows, sources, weight)
