"""Lays small tensors side by side in memory, and finds those that are, so that one call moves many of them.

On a CPU, the overhead of one call equals the arithmetic on some thousand elements. Shadows that lie side by side form
one flat tensor, and a single ``torch.cat`` gathers their sources into another.
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

#: A tensor that is written, and the source that it averages or copies.
Pair = tuple[Tensor, Tensor]
#: The shadows of one tensor in each of k averages, and last the tensor itself, their source. A pair is a row of one.
Row = tuple[Tensor, ...]

#: Largest tensor, in elements, that a CPU gathers faster than it makes a separate call.
SMALL = 2**11
#: Most elements that lie side by side. Above this torch splits a call over threads, which slows down so little work.
BUNDLE = 2**15


class Scratch:
    """Memory for what a step writes and reads within one call, so that all its calls can take the same.

    Other steps can share it if no two of them run at the same time.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def take(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a vector of ``size`` elements, whose memory it shares with all others of its dtype and device."""
        memory = self._memory.setdefault((device, dtype), torch.empty(0, dtype=dtype, device=device))
        if memory.numel() < size:
            memory.resize_(size)  # vectors that were taken before are views, and move with it
        return memory[:size]


def flat(tensor: Tensor) -> Tensor | None:
    """Returns a flat view in memory order, or None if the tensor has gaps or overlaps itself."""
    outermost_first = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    in_memory_order = tensor.permute(outermost_first)
    return in_memory_order.view(-1) if in_memory_order.is_contiguous() else None


def side_by_side(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns ``tensors`` with the small ones on the CPU replaced by copies that lie one behind the other.

    Copies keep shape and strides. Those of one dtype share allocations of at most :data:`BUNDLE` elements each.
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
    """Whether both tensors are small, on the CPU, and of equal dtype and strides."""
    lie_alike = shadow.dtype == source.dtype and shadow.stride() == source.stride()
    return lie_alike and _is_small(shadow) and _is_small(source)


def split_bundles(rows: Iterable[Row]) -> tuple[list[tuple[list[Tensor], list[Tensor]]], list[Row]]:
    """Finds the rows whose shadows lie :func:`side_by_side` and have the dtype and strides of their sources.

    Returns:
        The bundles, and the rows that are in none. A bundle is one flat view of several shadows for each average, and
        the sources whose concatenation it corresponds to: vectors themselves, flat views of other sources.
    """
    bundles: list[tuple[list[Tensor], list[Tensor]]] = []
    singles: list[Row] = []
    candidates: defaultdict[torch.dtype, list[Row]] = defaultdict(list)
    for row in rows:
        *shadows, source = row
        is_candidate = all(can_be_bundled(shadow, source) for shadow in shadows)
        (candidates[source.dtype] if is_candidate else singles).append(row)
    for run in itertools.chain.from_iterable(map(_runs, candidates.values())):
        if len(run) > 1:
            *firsts, _ = run[0]
            *_, sources = columns(run)
            size = sum(source.numel() for source in sources)
            bundles.append(([first.as_strided((size,), (1,)) for first in firsts], list(map(as_part, sources))))
        else:
            singles.extend(run)
    return bundles, singles


def as_part(source: Tensor) -> Tensor:
    """Returns what ``torch.cat`` is to gather: a vector itself, a flat view in memory order of a dense other tensor."""
    return source if source.dim() == 1 else _flattened(source)


def pieces(row: Row, limit: int) -> Iterator[Row]:
    """Cuts the row into flat views of at most ``limit`` elements, if all its tensors lie densely in the same order.

    Otherwise yields the row as it is.
    """
    *shadows, source = row
    lie_alike = all(shadow.stride() == source.stride() for shadow in shadows)
    if lie_alike and flat(source) is not None:
        yield from zip(*(_flattened(tensor).split(limit) for tensor in row), strict=True)
    else:
        yield row


def carve(scratch: Tensor, shadows: list[Tensor]) -> list[Tensor]:
    """Returns views of ``scratch``, one behind the other, in the shapes of ``shadows``."""
    views, start = [], 0
    for shadow in shadows:
        views.append(scratch[start : start + shadow.numel()].view(shadow.shape))
        start += shadow.numel()
    return views


def detached(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns aliases of the same memory that autograd does not track."""
    return [tensor.detach() for tensor in tensors]


def is_lazy(tensor: Tensor) -> bool:
    """Whether the memory holds the conjugates or the negatives of the tensor's elements, as ``conj()`` leaves it."""
    return tensor.is_conj() or tensor.is_neg()


def resolved(target: Tensor, value: Tensor) -> Pair:
    """A copy of ``value`` into ``target`` in terms of what ``target`` has in memory.

    Torch copies many tensors in one call, but not into any that :func:`is_lazy`.
    """
    if target.is_conj():
        target, value = target.conj(), value.conj()
    if target.is_neg():
        target, value = torch._neg_view(target), value.neg()
    return target, value


def columns(rows: Iterable[Row]) -> list[list[Tensor]]:
    """Returns the shadows of each average, and last the sources, as lists. There must be at least one row."""
    return [list(column) for column in zip(*rows, strict=True)]


def unzip(pairs: Iterable[Pair]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the first tensors of all pairs and the second ones, as two lists, which may be empty."""
    pairs = list(pairs)
    return [first for first, _ in pairs], [second for _, second in pairs]


def grouped(items: Iterable[_T], key: Callable[[_T], _K]) -> defaultdict[_K, list[_T]]:
    """Groups ``items`` by key, in order. A key that no item has maps to an empty list."""
    groups: defaultdict[_K, list[_T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def packed(items: Iterable[_T], size_of: Callable[[_T], int], limit: int) -> Iterator[list[_T]]:
    """Splits ``items``, in order, into lists whose sizes add up to at most ``limit``.

    An item larger than that gets a list of its own.
    """
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


def _runs(rows: list[Row]) -> Iterator[list[Row]]:
    """Splits rows where a shadow does not lie right behind the one before, and where a bundle is full."""
    run, size = [], 0
    for row in rows:
        *shadows, source = row
        if run and not (size + source.numel() <= BUNDLE and all(map(_lies_behind, run[-1], shadows))):
            yield run
            run, size = [], 0
        run.append(row)
        size += source.numel()
    if run:
        yield run


def _lies_behind(before: Tensor, shadow: Tensor) -> bool:
    return (
        shadow.data_ptr() == before.data_ptr() + before.numel() * before.element_size()
        and shadow.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()
    )
