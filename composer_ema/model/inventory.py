"""Which tensors a module has, by the names that the user gave them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from composer_ema.model.apart import named_parts
from composer_ema.model.sharding import refuse_unsupported, reshard
from composer_ema.model.wrappers import canonical_name

_STATISTICS = ('running_mean', 'running_var')


def is_normalisation(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm or InstanceNorm of torch or of a subclass; of a scripted one the name tells."""
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, 'original_name', None) in {kind.__name__ for kind in _subclasses(_NormBase)}
    return isinstance(module, _NormBase)


def _subclasses(kind: type) -> Iterator[type]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


@dataclass
class Inventory:
    """A module's tensors by canonical name, each once, without those of modules that compute with an average of it.

    Attributes:
        parameters: name to parameter; tied parameters under the first of their names.
        buffers: name to buffer, likewise.
        persistent: names of the buffers that the module's own ``state_dict`` holds.
        statistics: names of the running means and variances of normalisation layers.
        aliases: further names of a tied tensor, each with the name it stands under.
    """

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    persistent: set[str] = field(default_factory=set)
    statistics: set[str] = field(default_factory=set)
    aliases: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> Inventory:
        """Walks ``module``, which :func:`~composer_ema.model.wrappers.unwrap` has freed of outer wrappers.

        Under FSDP2 it has its shards afterwards; see :func:`~composer_ema.model.sharding.reshard`.

        Raises:
            NotImplementedError: a tensor is sharded by FSDP1 or DeepSpeed.
            ValueError: a lazy parameter or buffer has no shape yet.
        """
        reshard(module)
        inventory, first_names = cls(), {}
        for prefix, child in named_parts(module):
            path = f'{prefix}.' if prefix else ''
            for key, parameter in child._parameters.items():
                if parameter is not None:
                    name = canonical_name(path + key)
                    if is_lazy(parameter):
                        raise ValueError(f'{name} is a lazy parameter without a shape. Run one forward pass first.')
                    inventory._add(inventory.parameters, first_names, name, parameter)
            for key, buffer in child._buffers.items():
                if buffer is not None:
                    name = canonical_name(path + key)
                    if is_lazy(buffer):
                        raise ValueError(f'{name} is a lazy buffer without a shape. Run one forward pass first.')
                    inventory._add(inventory.buffers, first_names, name, buffer)
                    if key not in child._non_persistent_buffers_set:
                        inventory.persistent.add(name)
                    if key in _STATISTICS and is_normalisation(child):
                        inventory.statistics.add(first_names[id(buffer)])
        refuse_unsupported(inventory.tensors())
        return inventory

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return {**self.parameters, **self.buffers}

    def _add(self, tensors: dict, first_names: dict[int, str], name: str, tensor: Tensor) -> None:
        first_name = first_names.setdefault(id(tensor), name)
        if first_name != name:
            self.aliases[name] = first_name
        else:
            tensors[name] = tensor
