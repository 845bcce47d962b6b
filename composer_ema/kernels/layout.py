"""How tensors lie in memory: each by itself, and small ones side by side, so that one call moves many of them.

On a CPU a call on a tensor takes as long as the arithmetic on some thousand of its elements. Shadows that lie side by
side are one flat tensor, and their sources are gathered into another by a single ``torch.cat``.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar('_T')
_K = TypeVar('_K', bound=Hashable)

#: What is averaged or copied into, and where that comes from.
Pair = tuple[Tensor, Tensor]

#: Elements up to which gathering a tensor on a CPU costs less than a call of its own.
SMALL = 2**11
#: Elements of tensors that lie side by side: from here on torch splits a call over threads, which so little work loses.
BUNDLE = 2**15


def flat(tensor: Tensor) -> Tensor | None:
    """The elements in the order in which memory holds them, as a view; None where there are gaps or overlaps."""
    outermost_first = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    in_memory_order = tensor.permute(outermost_first)
    return in_memory_order.view(-1) if in_memory_order.is_contiguous() else None


def side_by_side(tensors: Sequence[Tensor]) -> list[Tensor]:
    """``tensors``, with small ones on the CPU replaced by copies that lie one behind the other, dtype by dtype.

    Shapes and strides stay. Copies of one dtype share allocations of at most :data:`BUNDLE` elements each.
    """
    placed = list(tensors)
    small = [index for index, tensor in enumerate(tensors) if _is_small(tensor)]
    for indices in grouped(small, lambda index: tensors[index].dtype).values():
        for bundle in packed(indices, lambda index: tensors[index].numel(), BUNDLE):
            memory = torch.cat([_flattened(tensors[index]) for index in bundle])
            start = 0
            for index in bundle:
                placed[index] = memory.as_strided(tensors[index].size(), tensors[index].stride(), start)
                start += tensors[index].numel()
    return placed


def can_be_bundled(shadow: Tensor, source: Tensor) -> bool:
    """Whether the two are small, on the CPU, and lie alike in one dtype."""
    lie_alike = shadow.dtype == source.dtype and shadow.stride() == source.stride()
    return lie_alike and _is_small(shadow) and _is_small(source)


def split_bundles(
    shadows: Sequence[Tensor], sources: Sequence[Tensor]
) -> tuple[list[tuple[Tensor, list[Tensor]]], tuple[list[Tensor], list[Tensor]]]:
    """Finds the pairs whose shadows lie :func:`side_by_side`, and which lie as their sources do, in one dtype.

    Returns:
        Bundles: one flat view of several shadows, and their sources, whose concatenation it follows: those of one
        dimension themselves, of others flat views. And the shadows and sources that are left.
    """
    bundles: list[tuple[Tensor, list[Tensor]]] = []
    singles: list[Pair] = []
    candidates: defaultdict[torch.dtype, list[Pair]] = defaultdict(list)
    for shadow, source in zip(shadows, sources, strict=True):
        (candidates[shadow.dtype] if can_be_bundled(shadow, source) else singles).append((shadow, source))
    for run in itertools.chain.from_iterable(map(_runs, candidates.values())):
        if len(run) > 1:
            size = sum(shadow.numel() for shadow, _ in run)
            parts = [source if source.dim() == 1 else _flattened(source) for _, source in run]
            bundles.append((run[0][0].as_strided((size,), (1,)), parts))
        else:
            singles.extend(run)
    return bundles, unzip(singles)


def pieces(shadow: Tensor, source: Tensor, limit: int) -> Iterator[Pair]:
    """Flat views of at most ``limit`` elements where both tensors lie densely in the same order, else the pair."""
    if shadow.stride() == source.stride() and (flat_shadow := flat(shadow)) is not None:
        flat_source = flat(source)
        assert flat_source is not None
        yield from zip(flat_shadow.split(limit), flat_source.split(limit), strict=True)
    else:
        yield shadow, source


def carve(scratch: Tensor, shadows: list[Tensor]) -> list[Tensor]:
    """Views of ``scratch``, one behind the other, with the shapes of ``shadows``."""
    views, start = [], 0
    for shadow in shadows:
        views.append(scratch[start : start + shadow.numel()].view(shadow.shape))
        start += shadow.numel()
    return views


def detached(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Aliases of the same memory that autograd does not follow."""
    return [tensor.detach() for tensor in tensors]


def unzip(pairs: Iterable[Pair]) -> tuple[list[Tensor], list[Tensor]]:
    """The first tensors and the second ones; two empty lists for no pairs."""
    pairs = list(pairs)
    return [first for first, _ in pairs], [second for _, second in pairs]


def grouped(items: Iterable[_T], key: Callable[[_T], _K]) -> defaultdict[_K, list[_T]]:
    """``items`` by their key, in order; a key that none has stands for an empty list."""
    groups: defaultdict[_K, list[_T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def packed(items: Iterable[_T], size_of: Callable[[_T], int], limit: int) -> Iterator[list[_T]]:
    """Splits ``items``, in order, into lists of at most ``limit`` in size; a larger item has a list of its own."""
    together, size = [], 0
    for item in items:
        if together and size + size_of(item) > limit:
            yield together
            together, size = [], 0
        together.append(item)
        size += size_of(item)
    if together:
        yield together


def _is_small(tensor: Tensor) -> bool:
    return (
        tensor.device.type == 'cpu'
        and tensor.layout is torch.strided
        and 0 < tensor.numel() <= SMALL
        and flat(tensor) is not None
    )


def _flattened(tensor: Tensor) -> Tensor:
    view = flat(tensor.detach())
    assert view is not None
    return view


def _runs(pairs: list[Pair]) -> Iterator[list[Pair]]:
    """Splits pairs where the next shadow does not lie right behind the one before, or a bundle is full."""
    run, size = [], 0
    for pair in pairs:
        if run and not (size + pair[0].numel() <= BUNDLE and _lies_behind(run[-1][0], pair[0])):
            yield run
            run, size = [], 0
        run.append(pair)
        size += pair[0].numel()
    if run:
        yield run


def _lies_behind(before: Tensor, shadow: Tensor) -> bool:
    return (
        shadow.data_ptr() == before.data_ptr() + before.numel() * before.element_size()
        and shadow.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()
    )
