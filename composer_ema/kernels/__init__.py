"""The backends that move ``shadow += weight * (source - shadow)``, and the choice between them.

Every backend is a module with one function, ``prepare(shadows, sources)``, that inspects the tensors once and returns
a step to call with a weight at each update. The step holds the tensors' storage: prepare again when one is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from composer_ema.kernels import foreach, reference

#: Performs one update in place; takes the weight of the current parameters, in [0, 1]: 0 keeps, 1 copies.
Step = Callable[[float], None]

_BACKENDS = {'foreach': foreach, 'reference': reference}


def prepare(shadows: Sequence[Tensor], sources: Sequence[Tensor], *, backend: str = 'auto') -> Step:
    """Prepares ``shadow += weight * (source - shadow)`` over pairs of tensors.

    Args:
        shadows: floating or complex tensors, written in place.
        sources: as many, of equal shapes, any floating dtype and device; only read.
        backend: ``'auto'``, ``'foreach'`` or ``'reference'``.

    Returns:
        A step that takes the weight. It runs on the current stream of each shadow's device and allocates nothing.

    Raises:
        ValueError: an unknown backend, or lists that do not pair up.
    """
    name = 'foreach' if backend == 'auto' else backend
    if name not in _BACKENDS:
        raise ValueError(f'backend must be one of auto, {", ".join(_BACKENDS)}, got {backend!r}.')
    if len(shadows) != len(sources):
        raise ValueError(f'shadows and sources must pair up, got {len(shadows)} and {len(sources)} tensors.')
    for index, (shadow, source) in enumerate(zip(shadows, sources, strict=True)):
        if shadow.shape != source.shape:
            raise ValueError(f'shadow {index} has shape {tuple(shadow.shape)}, its source {tuple(source.shape)}.')
        if not (shadow.is_floating_point() or shadow.is_complex()):
            raise ValueError(
                f'shadow {index} is {shadow.dtype}; only floating and complex tensors are averaged. Copy it.'
            )
        if source.is_complex() != shadow.is_complex():
            raise ValueError(
                f'shadow {index} is {shadow.dtype}, its source {source.dtype}: both or neither are complex.'
            )
    return _BACKENDS[name].prepare(shadows, sources)


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
