"""The foreach backend, fast on every device: one ``torch._foreach_lerp_`` per dtype, and no allocation per update.

Sources whose dtype or device differs from their shadow's pass through one scratch buffer of bounded size, chunk by
chunk. Small shadows that lie side by side on a CPU are moved as one tensor, which gives the same bits.
"""

from __future__ import annotations

import cmath
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from composer_ema.kernels.backend import Steps
from composer_ema.kernels.layout import (
    Pair,
    can_be_bundled,
    carve,
    detached,
    grouped,
    is_lazy,
    packed,
    pieces,
    split_bundles,
    unzip,
)
from composer_ema.kernels.rules import Rules

_Call = Callable[[float], None]
# A call, the shadows that it moves, and their sources as it sees them.
_Move = tuple[_Call, list[Tensor], list[Tensor]]
# Elements of the scratch buffer: on a CPU, what stays in a core's cache; on an accelerator, what fills the device.
_CHUNK_CPU = 2**18
_CHUNK_ACCELERATOR = 2**24


def refusal_of_device(device: torch.device, *, is_asked: bool) -> str | None:
    """Foreach kernels run on every device."""
    del device, is_asked
    return None


def refusal(shadow: Tensor, source: Tensor, rules: Rules) -> str | None:
    """Foreach kernels follow the formula alone, and round to the nearest."""
    del source
    if is_lazy(shadow):
        return 'foreach kernels do not write conjugated or negated views'
    if rules.skip_nonfinite:
        return 'skipping non-finite weights would take a second pass'
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
    """Groups the pairs by dtype and returns a step that makes one fused call per group or chunk."""
    del rules, compensations  # pairs to which any of them applies were refused
    calls = [_calls(detached(shadows), sources, are_mended) for shadows in shadow_sets]
    copies = list(_copies(*unzip(copied)))

    def step(weights: Sequence[float]) -> None:
        with torch.no_grad():  # a source that requires a gradient would record the update
            for calls_of_one, weight in zip(calls, weights, strict=True):
                for call in calls_of_one:
                    call(weight)
            for copy in copies:
                copy()

    def copy_alone(weights: Sequence[float]) -> None:
        del weights
        for copy in copies:
            copy()

    # Copies are of detached tensors, so alone they need no guard, which takes longer than a few of them.
    return step if sources else copy_alone


def _copies(copies: Sequence[Tensor], sources: Sequence[Tensor]) -> Iterator[Callable[[], object]]:
    bundles, singles = split_bundles(detached(copies), detached(sources))
    for bundle, parts in bundles:
        yield partial(torch.cat, parts, out=bundle)
    # CUDA has one kernel for many tensors only where both lists are of one dtype.
    for group in grouped(zip(*singles, strict=True), _target_and_likeness).values():
        yield partial(torch._foreach_copy_, *unzip(group))


def _calls(
    shadows: Sequence[Tensor], sources: Sequence[Tensor], are_mended: Sequence[bool]
) -> list[Callable[[float], None]]:
    calls: list[_Call] = []
    triples = zip(shadows, sources, are_mended, strict=True)
    for (device, dtype, is_alike, is_mended), group in grouped(triples, _kind).items():
        group_shadows, group_sources = unzip((shadow, source) for shadow, source, _ in group)
        if is_alike:
            found = _in_place(group_shadows, group_sources)
        else:
            found = _through_scratch(group_shadows, detached(group_sources), device, dtype)
        calls.extend(_then_mending(*each) if is_mended else each[0] for each in found)
    return calls


def _kind(triple: tuple[Tensor, Tensor, bool]) -> tuple[torch.device, torch.dtype, bool, bool]:
    shadow, source, is_mended = triple
    return *_target_and_likeness((shadow, source)), is_mended


def _target_and_likeness(pair: Pair) -> tuple[torch.device, torch.dtype, bool]:
    shadow, source = pair
    return shadow.device, shadow.dtype, shadow.dtype == source.dtype and shadow.device == source.device


def _in_place(shadows: list[Tensor], sources: list[Tensor]) -> Iterator[_Move]:
    bundles, singles = split_bundles(shadows, sources)
    if bundles:
        scratch = torch.empty(max(bundle.numel() for bundle, _ in bundles), dtype=shadows[0].dtype)
        for bundle, parts in bundles:
            gathered = scratch[: bundle.numel()]
            yield partial(_gather_then_lerp, bundle, parts, gathered), [bundle], [gathered]
    if singles[0]:
        yield partial(_lerp, *singles), *singles


def _through_scratch(
    shadows: list[Tensor], sources: list[Tensor], device: torch.device, dtype: torch.dtype
) -> Iterator[_Move]:
    limit = _CHUNK_CPU if device.type == 'cpu' else _CHUNK_ACCELERATOR
    cut = [piece for pair in zip(shadows, sources, strict=True) for piece in pieces(*pair, limit)]
    chunks = list(packed(cut, lambda piece: piece[0].numel(), limit))
    scratch = torch.empty(max(map(_total, chunks)), device=device, dtype=dtype)
    for chunk in chunks:
        piece_shadows, piece_sources = unzip(chunk)
        casts = carve(scratch, piece_shadows)
        yield partial(_cast_then_lerp, piece_shadows, piece_sources, casts), piece_shadows, casts


def _lerp(shadows: list[Tensor], sources: list[Tensor], weight: float) -> None:
    # A lerp would turn what is not finite into NaN, so the ends are exact: 0 keeps the shadow, 1 copies the source.
    if weight == 1:
        torch._foreach_copy_(shadows, sources)
    elif weight != 0:
        torch._foreach_lerp_(shadows, sources, weight)


def _gather_then_lerp(bundle: Tensor, parts: list[Tensor], scratch: Tensor, weight: float) -> None:
    if weight != 0:
        torch.cat(parts, out=scratch)
        _lerp([bundle], [scratch], weight)


def _cast_then_lerp(shadows: list[Tensor], sources: list[Tensor], casts: list[Tensor], weight: float) -> None:
    torch._foreach_copy_(casts, sources)
    _lerp(shadows, casts, weight)


def _then_mending(call: _Call, shadows: Sequence[Tensor], sources: Sequence[Tensor]) -> _Call:
    """Calls, then copies each source element whose average is not finite: it or the average was not."""
    mends = [_mend(shadow, source) for shadow, source in zip(shadows, sources, strict=True)]

    def call_and_mend(weight: float) -> None:
        call(weight)
        if 0 < weight < 1:
            for mend in mends:
                mend()

    return call_and_mend


def _mend(shadow: Tensor, source: Tensor) -> Callable[[], object]:
    if shadow.device.type == 'cpu':
        total, dims = shadow.new_zeros(()), list(range(shadow.dim()))

        def mend_if_need_be() -> None:
            if not cmath.isfinite(torch.sum(shadow, dims, out=total).item()):
                torch.where(shadow.isfinite(), shadow, source, out=shadow)

        return mend_if_need_be

    difference, is_finite = torch.empty_like(shadow), torch.empty_like(shadow, dtype=torch.bool)

    def mend() -> None:  # asks nothing, since an answer from the device would make the host wait
        torch.sub(shadow, shadow, out=difference)  # 0 where it is finite, and else NaN
        torch.eq(difference, 0, out=is_finite)
        torch.where(is_finite, shadow, source, out=shadow)

    return mend


def _total(chunk: list[Pair]) -> int:
    return sum(shadow.numel() for shadow, _ in chunk)
