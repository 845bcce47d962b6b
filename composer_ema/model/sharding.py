"""The few places that know how PyTorch wraps a model: DDP, FSDP, torch.compile, activation checkpointing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import cast

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

# Wrappers that hold the whole model are undone by type: a user's own sub-module may be called `module` too
# (ComposerClassifier's is), so the prefix alone cannot tell.
_WHOLE_MODEL_WRAPPERS = (DistributedDataParallel, DataParallel, AveragedModel)
# Wrappers inside the model leave a segment in every name that no user would choose.
_INNER_SEGMENTS = re.compile(r'(?:^|(?<=\.))(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.')


def unwrap(model: nn.Module) -> nn.Module:
    """The module that the user built: DDP, DataParallel, AveragedModel and torch.compile taken off.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f'model must be a torch.nn.Module, got {type(model).__name__}. Pass the module itself, as in '
            'ShadowModel(model), not its parameters: an average goes by their names, and covers buffers too.'
        )
    while True:
        if isinstance(model, _WHOLE_MODEL_WRAPPERS):
            model = model.module
        elif '_orig_mod' in model._modules:  # no get(): that of a scripted module has none
            model = cast(nn.Module, model._modules['_orig_mod'])
        else:
            return model


def wrapper_prefix(model: nn.Module) -> str:
    """What stands before the names of :func:`unwrap`'s module in the state dict of ``model``, canonically."""
    prefix, module = '', unwrap(model)
    while model is not module:
        name = 'module' if isinstance(model, _WHOLE_MODEL_WRAPPERS) else '_orig_mod'
        model, prefix = model.get_submodule(name), f'{prefix}{name}.'
    return canonical_name(prefix)


def canonical_name(name: str) -> str:
    """A parameter's name as the user wrote it, with the segments of inner wrappers taken out.

    Example:
        >>> canonical_name('blocks.0._checkpoint_wrapped_module.fc._orig_mod.weight')
        'blocks.0.fc.weight'
    """
    return _INNER_SEGMENTS.sub('', name)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP or tensor parallelism holds only a part of the parameters in this process."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        kind_of_shard(parameter) is not None for parameter in model.parameters()
    )


def kind_of_shard(tensor: Tensor) -> str | None:
    """How processes share a tensor, in words; None for one that each process holds whole."""
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        return f'a DTensor of FSDP2 or tensor parallelism, {tensor.placements} over {tensor.device_mesh}'
    # FSDP1 marks its flat parameters so, and with use_orig_params the views of them that optimizers see.
    if getattr(tensor, '_fsdp_flattened', False):
        return 'a parameter of FSDP1, which holds it in one flat parameter with others'
    return None


def refuse_sharded(tensors: Mapping[str, Tensor]) -> None:
    """Raises a NotImplementedError that names the first sharded tensor and its kind, or returns.

    Every way into an average passes here: a shard is read and written under other rules than a whole tensor.

    Args:
        tensors: what is to be averaged, lent or overwritten, by name.
    """
    for name, tensor in tensors.items():
        kind = kind_of_shard(tensor)
        if kind is not None:
            raise NotImplementedError(
                f'{name} is sharded: {kind}. This release does not average sharded models. Train with DDP, or leave '
                'the average out.'
            )


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Overwrites ``tensors`` in every process with those of rank 0. A collective call; nothing with one process."""
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)
