"""The backends that move ``shadow += weight * (source - shadow)``, and the choice between them.

Every backend is a module with two functions: ``refusal`` says in words why it cannot take a pair of tensors, and
``prepare`` inspects tensors once and returns a step to call with a weight at each update. A step holds the tensors'
storage: prepare again when one is replaced.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from composer_ema.kernels import foreach, reference
from composer_ema.kernels.layout import Pair, unzip
from composer_ema.kernels.rules import Rules, Steps, is_inexact

#: Performs one update of one average in place; takes the weight of the current parameters: 0 keeps, 1 copies.
Step = Callable[[float], None]

_NAMES = ('fused', 'foreach', 'reference')


def prepare(
    shadows: Sequence[Tensor],
    sources: Sequence[Tensor],
    *,
    copied: Sequence[Pair] = (),
    backend: str = 'auto',
    rules: Rules | None = None,
) -> Step:
    """Prepares ``shadow += weight * (source - shadow)`` over pairs of tensors.

    Args:
        shadows: floating or complex tensors, written in place.
        sources: as many, of equal shapes, any floating dtype and device; only read.
        copied: further pairs, of equal shapes and any dtypes and devices, whose first becomes a copy of the second
            whatever the weight; the fused backend does that in the same launch.
        backend: ``'fused'``, ``'foreach'``, ``'reference'``, or ``'auto'``: for each pair the first of them that can.
        rules: how elements are guarded and rounded. Default: not at all, and to the nearest.

    Returns:
        A step that takes the weight. It runs on the current stream of each shadow's device and, but for the
        reference, allocates nothing.

    Raises:
        ValueError: an unknown backend, lists that do not pair up, or a pair that the backend cannot take.
    """
    steps = prepare_many([shadows], sources, copied=copied, backend=backend, rules=rules)
    return lambda weight: steps((weight,))


def prepare_many(
    averages: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    *,
    copied: Sequence[Pair] = (),
    backend: str = 'auto',
    rules: Rules | None = None,
) -> Steps:
    """Prepares k averages of the same sources, which the fused backend reads once for all of them.

    Args:
        averages: k lists of shadows, each as :func:`prepare` takes them.
        sources: as for :func:`prepare`.
        copied: as for :func:`prepare`.
        backend: as for :func:`prepare`.
        rules: as for :func:`prepare`.

    Returns:
        A step that takes k weights.

    Raises:
        ValueError: as for :func:`prepare`.
    """
    rules = rules or Rules()
    _check_backend(backend)
    _check(averages, sources)
    _check_copied(copied)
    groups: defaultdict[tuple[str, torch.device], list[int]] = defaultdict(list)
    for index, source in enumerate(sources):
        if source.numel():
            shadows = [average[index] for average in averages]
            groups[choose(shadows, source, backend, rules)[0], shadows[0].device].append(index)
    fused_copies, other_copies = _split_copies(copied, backend)
    for device in fused_copies:
        groups.setdefault(('fused', device), [])  # without averages it is a launch of copies alone
    steps: list[Steps] = []
    for (name, device), indices in groups.items():
        extra = (fused_copies.get(device, []),) if name == 'fused' else ()
        of_group = [[average[i] for i in indices] for average in averages], [sources[i] for i in indices]
        steps.append(_module(name).prepare(*of_group, rules, *extra))
    if other_copies:
        copy = foreach.prepare_copy(*unzip(other_copies))
        steps.append(lambda weights: copy())
    if len(steps) == 1:
        return steps[0]

    def run(weights: Sequence[float]) -> None:
        for step in steps:
            step(weights)

    return run


def keeps_address(shadow: Tensor, source: Tensor, *, backend: str = 'auto', rules: Rules | None = None) -> bool:
    """Whether a prepared step must be prepared anew when ``source`` moves to other memory without being replaced."""
    is_foreach = choose([shadow], source, backend, rules or Rules())[0] == 'foreach'
    return not is_foreach or foreach.keeps_address(shadow, source)


def lerp_(shadows: Sequence[Tensor], sources: Sequence[Tensor], weight: float, *, backend: str = 'auto') -> None:
    """One update of ``shadows`` towards ``sources``; :func:`prepare` and its step in one call.

    Args:
        shadows: written in place.
        sources: of equal shapes; only read.
        weight: share of the way to go, in [0, 1]: 0 leaves the shadows, 1 copies the sources.
        backend: see :func:`prepare`.

    Example:
        >>> import torch
        >>> shadow = torch.zeros(2)
        >>> lerp_([shadow], [torch.ones(2)], 0.25)
        >>> shadow
        tensor([0.2500, 0.2500])
    """
    prepare(shadows, sources, backend=backend)(weight)


def choose(shadows: Sequence[Tensor], source: Tensor, backend: str, rules: Rules) -> tuple[str, dict[str, str]]:
    """The backend for one source and its averages, and why each faster one was refused, in words.

    Raises:
        ValueError: an unknown backend, or one that was asked for by name and refuses.
    """
    _check_backend(backend)
    refusals: dict[str, str] = {}
    for name in _NAMES if backend == 'auto' else (backend,):
        reason = _refusal(name, shadows, source, rules, is_asked=backend == name)
        if reason is None:
            return name, refusals
        refusals[name] = reason
    raise ValueError(f"the backend {backend!r} cannot take this pair: {refusals[backend]}. Pass backend='auto'.")


def describe(
    averages: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    *,
    backend: str = 'auto',
    rules: Rules | None = None,
) -> str:
    """Which backend averages how many tensors, and in words why faster ones were refused."""
    counts: defaultdict[tuple[str, tuple[str, ...]], int] = defaultdict(int)
    for index, source in enumerate(sources):
        if source.numel():
            name, refusals = choose([average[index] for average in averages], source, backend, rules or Rules())
            counts[name, tuple(f'no {other}: {reason}' for other, reason in refusals.items())] += 1
    return '; '.join(
        f'{count} tensors by {name}' + (f' ({", ".join(reasons)})' if reasons else '')
        for (name, reasons), count in counts.items()
    )


def _split_copies(copied: Sequence[Pair], backend: str) -> tuple[dict[torch.device, list[Pair]], list[Pair]]:
    """Pairs that the fused backend copies, by device, and the others."""
    fused: defaultdict[torch.device, list[Pair]] = defaultdict(list)
    others = []
    for copy, source in copied:
        if source.numel() and _can_fuse_copy(copy, source, backend):
            fused[source.device].append((copy, source))
        else:
            others.append((copy, source))
    return fused, others


def _can_fuse_copy(copy: Tensor, source: Tensor, backend: str) -> bool:
    if backend not in ('auto', 'fused') or _refusal_of_triton(source.device, is_asked=backend == 'fused'):
        return False
    return _module('fused').refusal_to_copy(copy, source) is None


def _refusal(name: str, shadows: Sequence[Tensor], source: Tensor, rules: Rules, *, is_asked: bool) -> str | None:
    if name == 'fused' and (reason := _refusal_of_triton(source.device, is_asked=is_asked)):
        return reason
    reasons = (_module(name).refusal(shadow, source, rules) for shadow in shadows)
    return next((reason for reason in reasons if reason is not None), None)


def _refusal_of_triton(device: torch.device, *, is_asked: bool) -> str | None:
    if device.type != 'cuda' and not is_asked:
        return f'Triton runs on CUDA devices, not on {device}'
    try:
        _module('fused')
    except ModuleNotFoundError as error:
        return f'{error.name} is not installed'
    return None


def _module(name: str) -> ModuleType:
    if name == 'fused':  # imports Triton, which CPU builds of torch do not have
        from composer_ema.kernels import fused

        return fused
    return {'foreach': foreach, 'reference': reference}[name]


def _check_backend(backend: str) -> None:
    if backend != 'auto' and backend not in _NAMES:
        raise ValueError(f'backend must be one of auto, {", ".join(_NAMES)}, got {backend!r}.')


def _check_copied(copied: Sequence[Pair]) -> None:
    for index, (copy, source) in enumerate(copied):
        if copy.shape != source.shape:
            raise ValueError(f'copy {index} has shape {tuple(copy.shape)}, its source {tuple(source.shape)}.')


def _check(averages: Sequence[Sequence[Tensor]], sources: Sequence[Tensor]) -> None:
    for shadows in averages:
        if len(shadows) != len(sources):
            raise ValueError(f'shadows and sources must pair up, got {len(shadows)} and {len(sources)} tensors.')
        for index, (shadow, source) in enumerate(zip(shadows, sources, strict=True)):
            if shadow.shape != source.shape:
                raise ValueError(f'shadow {index} has shape {tuple(shadow.shape)}, its source {tuple(source.shape)}.')
            if not is_inexact(shadow):
                raise ValueError(
                    f'shadow {index} is {shadow.dtype}; only floating and complex tensors are averaged. Copy it.'
                )
            if source.is_complex() != shadow.is_complex():
                raise ValueError(
                    f'shadow {index} is {shadow.dtype}, its source {source.dtype}: both or neither are complex.'
                )
