"""What is known here alone: how PyTorch wraps a model, and what that does to names."""

from __future__ import annotations

import re
from typing import cast

import torch.distributed
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from composer_ema.model.sharding import num_ranks

# Wrappers that hold the whole model are undone by type: a user's own sub-module may be called `module` too
# (ComposerClassifier's is), so the prefix alone cannot tell.
_WHOLE_MODEL_WRAPPERS = (DistributedDataParallel, DataParallel, AveragedModel)
# Wrappers inside the model leave a segment in every name that no user would choose.
_INNER_SEGMENTS = re.compile(r'(?:^|(?<=\.))(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.')


def unwrap(model: nn.Module, call: str = 'ShadowModel(model)') -> nn.Module:
    """The module that the user built: DDP, DataParallel, AveragedModel and torch.compile taken off.

    Args:
        model: wrapped or not.
        call: how a module is passed, for the error. Default: to a ShadowModel.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        if isinstance(model, type):
            got = f'the class {model.__name__}, which is to be called first'
        raise TypeError(
            f'model must be a torch.nn.Module, got {got}. Pass the module itself, as in {call}, not its parameters: an '
            'average goes by their names, and covers buffers too.'
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


def refuse_other_ranks(model: nn.Module) -> None:
    """Raises a ValueError if DDP joins fewer ranks than those over which ``shard_over_ranks`` splits an average.

    The others may have other weights, and a gathered average would be made of pieces of both.

    Args:
        model: wrapped or not.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            joined = torch.distributed.get_world_size(module.process_group)
            if joined != num_ranks():
                raise ValueError(
                    f'shard_over_ranks=True splits the average over all {num_ranks()} ranks of the default process '
                    f'group, but DistributedDataParallel joins {joined} of them, and the others may have other '
                    'weights. Leave shard_over_ranks out, or wrap the model without process_group=.'
                )
