"""The few places that know how PyTorch wraps a model: DDP, FSDP, torch.compile, activation checkpointing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import cast

import torch
import torch.distributed
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

# Wrappers that hold the whole model are undone by type: a user's own sub-module may be called `module` too
# (ComposerClassifier's is), so the prefix alone cannot tell.
_WHOLE_MODEL_WRAPPERS = (DistributedDataParallel, DataParallel, AveragedModel)
# Wrappers inside the model leave a segment in every name that no user would choose.
_INNER_SEGMENTS = re.compile(r'(?:^|(?<=\.))(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.')


def unwrap(model: nn.Module) -> nn.Module:
    """The module that the user built: DDP, DataParallel, AveragedModel and torch.compile taken off."""
    while True:
        if isinstance(model, _WHOLE_MODEL_WRAPPERS):
            model = model.module
        elif '_orig_mod' in model._modules:  # no get(): that of a scripted module has none
            model = cast(nn.Module, model._modules['_orig_mod'])
        else:
            return model


def canonical_name(name: str) -> str:
    """A parameter's name as the user wrote it, with the segments of inner wrappers taken out.

    Example:
        >>> canonical_name('blocks.0._checkpoint_wrapped_module.fc._orig_mod.weight')
        'blocks.0.fc.weight'
    """
    return _INNER_SEGMENTS.sub('', name)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP or tensor parallelism holds only a part of the parameters in this process."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


def broadcast_(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrites ``tensors`` in every process with those of rank 0. A collective call; nothing with one process."""
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)
