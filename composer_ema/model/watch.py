"""Tells, at the cost of a few list comparisons, whether a module is still what it was."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from composer_ema.model.inventory import Inventory
from composer_ema.model.sharding import is_shard, local, reshard

#: Ends a list of entries, so that neither one more nor one less goes unseen.
_END = object()


class Watch:
    """Tells at the cost of a few list comparisons whether a module still is what it was.

    Compared are every parameter, buffer and sub-module by identity, in their order but not by name, the number of
    elements and the strides of each tensor, the storage of ``addressed``, and ``requires_grad`` where it was False:
    unfrozen parameters join an average, while frozen ones stay. Of a sharded tensor all this is asked of the part that
    this process holds, and whether it still is the same part: FSDP2 moves uneven shards at the first forward. Keeps
    the module's tensors alive, not the module: drop the watch when ``on_gone`` is called.

    Args:
        module: what to watch.
        inventory: its tensors.
        on_gone: called when the module has been collected.
        addressed: those of its tensors, or of their parts, whose memory must stay where it is. Default: all.
    """

    def __init__(
        self,
        module: nn.Module,
        inventory: Inventory,
        on_gone: Callable[[], None],
        *,
        addressed: Iterable[Tensor] | None = None,
    ) -> None:
        self._module = weakref.ref(module, lambda _: on_gone())
        registries = [r for child in module.modules() for r in (child._modules, child._parameters, child._buffers)]
        self._empty = [registry for registry in registries if not registry]
        self._views = [_values(registry) for registry in registries if registry]
        self._entries = [*chain.from_iterable(self._views), _END]
        self._frozen = [parameter for parameter in inventory.parameters.values() if not parameter.requires_grad]
        tensors = list(inventory.tensors().values())
        self._shared = list(filter(is_shard, tensors))
        self._parts = list(map(_part, self._shared))
        sized = list(map(local, tensors))
        self._sized = list(filter(_has_memory, sized))
        self._sizes, self._strides = list(map(_size, self._sized)), list(map(_stride, self._sized))
        self._addressed = list(filter(_has_memory, sized if addressed is None else map(local, addressed)))
        self._pointers = list(map(_pointer, self._addressed))

    def is_current(self, module: nn.Module) -> bool:
        """Whether ``module`` is the watched one, with the same tensors at the same places.

        Under FSDP2 it has its shards afterwards: after a forward without a backward, whole parameters are in the place
        of those that are watched.
        """
        return self._sees_the_same(module) or (reshard(module) and self._sees_the_same(module))

    def _sees_the_same(self, module: nn.Module) -> bool:
        return (
            self._module() is module
            and all(map(is_, chain(chain.from_iterable(self._views), (_END,)), self._entries))
            and not any(self._empty)
            and not any(map(_requires_grad, self._frozen))
            and all(map(is_, map(_part, self._shared), self._parts))
            and list(map(_pointer, self._addressed)) == self._pointers
            and list(map(_size, self._sized)) == self._sizes
            and list(map(_stride, self._sized)) == self._strides
        )


class _Fresh:
    """The values of a registry whose ``values()`` is a list of the moment, as those of scripted modules are."""

    def __init__(self, registry: Any) -> None:
        self._registry = registry

    def __iter__(self) -> Iterator[Any]:
        return iter(self._registry.values())


def _values(registry: Any) -> Iterable[Any]:
    return registry.values() if isinstance(registry, dict) else _Fresh(registry)


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


_requires_grad, _part = attrgetter('requires_grad'), attrgetter('_local_tensor')
_pointer, _size, _stride = Tensor.data_ptr, Tensor.numel, Tensor.stride
