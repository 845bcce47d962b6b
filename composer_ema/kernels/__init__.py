"""Prepares updates ``shadow += weight * (source - shadow)`` of many tensors, and chooses a backend for each tensor.

A prepared step holds on to the tensors' memory, so prepare again when a tensor is replaced.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from composer_ema.kernels import blocked, foreach, fused, reference
from composer_ema.kernels.backend import Backend, Steps
from composer_ema.kernels.layout import Pair, grouped
from composer_ema.kernels.rules import Rules, dtype_of_compensation, is_inexact
from composer_ema.wording import counted

#: The backends by name, fastest first.
BACKENDS: Mapping[str, Backend] = {'fused': fused, 'foreach': foreach, 'blocked': blocked, 'reference': reference}


def prepare(
    averages: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    *,
    mended: Collection[int] = (),
    copied: Sequence[Pair] = (),
    backend: str = 'auto',
    rules: Rules | None = None,
    compensations: Sequence[Sequence[Tensor]] | None = None,
) -> Steps:
    """Prepares an update of k averages of the same sources.

    For each average and its weight, the returned step computes ``shadow += weight * (source - shadow)`` in place.

    Args:
        averages: k >= 1 lists of shadows: floating or complex tensors, written in place. For copies alone pass
            ``[[]]``.
        sources: as many tensors as each list of shadows has, of equal shapes and any floating dtypes (complex ones for
            complex shadows) and devices; only read. The fused backend reads them once for all averages.
        mended: indices of sources of which an element is copied where it or its average is not finite, by every weight
            but 0. Other averages become NaN or infinite there.
        copied: pairs of a tensor and its source, of equal shapes and any dtypes and devices. Every update copies them,
            whatever the weights; on CUDA, in the launch that averages.
        backend: ``'fused'``, ``'foreach'``, ``'blocked'``, ``'reference'``, or ``'auto'``, which takes for each tensor
            the first of these that can. A backend named here must take every average; copies that it cannot take go to
            the next.
        rules: how elements are guarded and rounded. Default: not guarded, rounded to the nearest.
        compensations: for rules that are compensated k lists of Kahan terms, one beside each shadow: of its shape,
            strides and device, and of the dtype that :func:`composer_ema.kernels.rules.dtype_of_compensation` says.
            Written in place: the average is the sum of both, and a weight of 1 makes the term zero.

    Returns:
        A step that takes a sequence of k weights, each in [0, 1]: 0 keeps the average, 1 copies the source. It runs on
        the current stream of each shadow's device. Apart from the reference, it allocates nothing.

    Raises:
        ValueError: the backend is unknown or cannot take a pair, there is no list of shadows, or tensors do not pair
            up.

    Example:
        >>> fast, slow, source = torch.zeros(2), torch.zeros(2), torch.ones(2)
        >>> step = prepare([[fast], [slow]], [source])
        >>> step((0.5, 0.25))
        >>> fast, slow
        (tensor([0.5000, 0.5000]), tensor([0.2500, 0.2500]))
    """
    rules = rules or Rules()
    _check_backend(backend)
    _check_averages(averages, sources)
    _check_copies(copied)
    _check_compensations(averages, compensations, rules)

    def choice(index: int) -> tuple[str, torch.device]:
        shadows = _shadows_of(index, averages)
        return _choose(shadows, sources[index], backend, rules)[0], shadows[0].device

    indices_by_choice = grouped((index for index, source in enumerate(sources) if source.numel()), choice)
    copies_by_choice = grouped(
        (pair for pair in copied if pair[0].numel()), lambda pair: (_choose_for_copy(*pair, backend), pair[0].device)
    )
    steps: list[Steps] = []
    for name, device in {**indices_by_choice, **copies_by_choice}:
        indices = indices_by_choice[name, device]
        shadow_sets = [[shadows[index] for index in indices] for shadows in averages]
        of_group = [sources[index] for index in indices]
        are_mended = [index in mended for index in indices]
        copies = copies_by_choice[name, device]
        terms = None if compensations is None else [[each[index] for index in indices] for each in compensations]
        steps.append(BACKENDS[name].prepare(shadow_sets, of_group, rules, copies, are_mended, terms))
    return steps[0] if len(steps) == 1 else _one_after_the_other(steps)


def keeps_address(shadow: Tensor, source: Tensor, *, backend: str = 'auto', rules: Rules | None = None) -> bool:
    """Whether a step must be prepared again when ``source`` moves to other memory without being replaced.

    Args:
        shadow: the average of ``source``. Of several averages, ask for each; one that says yes decides.
        source: as for :func:`prepare`.
        backend: as for :func:`prepare`.
        rules: as for :func:`prepare`.
    """
    _check_backend(backend)
    name, _ = _choose([shadow], source, backend, rules or Rules())
    return BACKENDS[name].keeps_address(shadow, source)


def describe(
    averages: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    *,
    backend: str = 'auto',
    rules: Rules | None = None,
) -> str:
    """Says how many tensors each backend averages, and why faster ones cannot.

    Args:
        averages: as for :func:`prepare`.
        sources: as for :func:`prepare`.
        backend: as for :func:`prepare`.
        rules: as for :func:`prepare`.

    Example:
        >>> describe([[torch.zeros(2), torch.zeros(3)]], [torch.ones(2), torch.ones(3)])
        '2 tensors by foreach (no fused: Triton runs on CUDA devices, not on cpu)'
    """
    _check_backend(backend)
    counts: defaultdict[tuple[str, tuple[str, ...]], int] = defaultdict(int)
    for index, source in enumerate(sources):
        if source.numel():
            name, refusals = _choose(_shadows_of(index, averages), source, backend, rules or Rules())
            counts[name, tuple(f'no {other}: {reason}' for other, reason in refusals.items())] += 1
    return '; '.join(
        f'{counted(count, "tensor")} by {name}' + (f' ({", ".join(reasons)})' if reasons else '')
        for (name, reasons), count in counts.items()
    )


def _shadows_of(index: int, averages: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [shadows[index] for shadows in averages]


def _choose(shadows: Sequence[Tensor], source: Tensor, backend: str, rules: Rules) -> tuple[str, dict[str, str]]:
    """Returns the backend for one source and its averages, and why each faster one refuses.

    Raises:
        ValueError: the backend was named, and refuses.
    """
    refusals: dict[str, str] = {}
    for name in _in_question(rules) if backend == 'auto' else (backend,):
        reason = BACKENDS[name].refusal_of_device(source.device, is_asked=name == backend) or _first(
            BACKENDS[name].refusal(shadow, source, rules) for shadow in shadows
        )
        if reason is None:
            return name, refusals
        refusals[name] = reason
    raise ValueError(f"the backend {backend!r} cannot take this pair: {refusals[backend]}. Pass backend='auto'.")


def _in_question(rules: Rules) -> list[str]:
    """The backends to choose from: of those that move tensors by torch's functions, one compensates."""
    return [name for name in BACKENDS if name != ('foreach' if rules.compensated else 'blocked')]


def _choose_for_copy(copy: Tensor, source: Tensor, backend: str) -> str:
    """Returns the first backend, from the named one on, that takes the copy. All backends copy the same bits."""
    names = list(BACKENDS)
    return next(
        name
        for name in names[0 if backend == 'auto' else names.index(backend) :]
        if BACKENDS[name].refusal_of_device(source.device, is_asked=name == backend) is None
        and BACKENDS[name].refusal_to_copy(copy, source) is None
    )


def _first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


def _one_after_the_other(steps: Sequence[Steps]) -> Steps:
    def run(weights: Sequence[float]) -> None:
        for step in steps:
            step(weights)

    return run


def _check_backend(backend: str) -> None:
    if backend != 'auto' and backend not in BACKENDS:
        raise ValueError(f'backend must be one of auto, {", ".join(BACKENDS)}, got {backend!r}.')


def _check_averages(averages: Sequence[Sequence[Tensor]], sources: Sequence[Tensor]) -> None:
    if not averages:
        raise ValueError('averages must hold at least one list of shadows, got none. For copies alone pass [[]].')
    for shadows in averages:
        if len(shadows) != len(sources):
            raise ValueError(f'shadows and sources must pair up, got {len(shadows)} and {len(sources)} tensors.')
        for index, (shadow, source) in enumerate(zip(shadows, sources, strict=True)):
            if shadow.shape != source.shape:
                raise ValueError(f'shadow {index} has shape {tuple(shadow.shape)}, its source {tuple(source.shape)}.')
            if not is_inexact(shadow):
                raise ValueError(
                    f'shadow {index} is {shadow.dtype}, but only floating and complex tensors can be averaged. Copy it.'
                )
            if source.is_complex() != shadow.is_complex():
                raise ValueError(
                    f'shadow {index} is {shadow.dtype}, its source {source.dtype}. Both or neither must be complex.'
                )


def _check_compensations(
    averages: Sequence[Sequence[Tensor]], compensations: Sequence[Sequence[Tensor]] | None, rules: Rules
) -> None:
    if rules.compensated != (compensations is not None):
        raise ValueError(
            f'compensations belong to compensated rules, got {"none" if compensations is None else "some"} with '
            f'compensated={rules.compensated}. Pass both or neither.'
        )
    if compensations is None:
        return
    if [len(terms) for terms in compensations] != [len(shadows) for shadows in averages]:
        raise ValueError('each average must have a list of as many compensations as shadows.')
    for shadows, terms in zip(averages, compensations, strict=True):
        for index, (shadow, term) in enumerate(zip(shadows, terms, strict=True)):
            expected = (shadow.shape, shadow.stride(), shadow.device, dtype_of_compensation(shadow.dtype))
            if (term.shape, term.stride(), term.device, term.dtype) != expected:
                raise ValueError(
                    f'compensation {index} is {term.dtype} on {term.device} of shape {tuple(term.shape)} and strides '
                    f'{term.stride()}, but its shadow needs one of {expected[3]} on {shadow.device} of shape '
                    f'{tuple(shadow.shape)} and strides {shadow.stride()}. Pass torch.zeros_like(shadow, dtype=...).'
                )


def _check_copies(copied: Sequence[Pair]) -> None:
    for index, (copy, source) in enumerate(copied):
        if copy.shape != source.shape:
            raise ValueError(f'copy {index} has shape {tuple(copy.shape)}, its source {tuple(source.shape)}.')
