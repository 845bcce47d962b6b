"""Tells, at the cost of a few list comparisons, whether a module is still what it was."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter, is_

from torch import Tensor, nn

from composer_ema.model.inventory import Inventory


class Watch:
    """Tells at the cost of a few list comparisons whether a module still is what it was.

    Compared are every parameter, buffer and sub-module by identity, in their order but not by name, the storage of
    ``addressed``, and ``requires_grad`` where it was False: unfrozen parameters join an average, while frozen ones
    stay. Keeps the module's tensors alive, not the module: drop the watch when ``on_gone`` is called.

    Args:
        module: what to watch.
        inventory: its tensors.
        on_gone: called when the module has been collected.
        addressed: those of its tensors whose memory must stay where it is. Default: all.
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
        self._views = [registry.values() for registry in registries if registry]
        self._entries = list(chain.from_iterable(self._views))
        self._frozen = [parameter for parameter in inventory.parameters.values() if not parameter.requires_grad]
        self._tensors = list(inventory.tensors().values() if addressed is None else addressed)
        self._pointers = list(map(_pointer, self._tensors))

    def is_current(self, module: nn.Module) -> bool:
        """Whether ``module`` is the watched one, with the same tensors at the same places."""
        entries = list(chain.from_iterable(self._views))
        return (
            self._module() is module
            and len(entries) == len(self._entries)
            and all(map(is_, entries, self._entries))
            and not any(self._empty)
            and not any(map(_requires_grad, self._frozen))
            and list(map(_pointer, self._tensors)) == self._pointers
        )


_requires_grad = attrgetter('requires_grad')
_pointer = Tensor.data_ptr
