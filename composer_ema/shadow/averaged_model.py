"""torch's ``AveragedModel`` in terms of our settings, and the other way round."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import AveragedModel

from composer_ema import plain
from composer_ema.model.inventory import Inventory
from composer_ema.model.sharding import any_nonzero, difference
from composer_ema.model.wrappers import unwrap
from composer_ema.settings import Settings, check_device_is_here, parse_device
from composer_ema.wording import shown, suggestion

_FUNCTIONS = ('avg_fn', 'multi_avg_fn')
#: The arguments of AveragedModel besides the model.
_ARGUMENTS = ('device', *_FUNCTIONS, 'use_buffers')


def module_of(averaged: AveragedModel) -> nn.Module:
    """The module with the average in it.

    Raises:
        TypeError: ``averaged`` is no AveragedModel.
    """
    if not isinstance(averaged, AveragedModel):
        raise TypeError(
            f"averaged must be torch's AveragedModel, got {type(averaged).__name__}. load_foreign takes a state dict."
        )
    return averaged.module


def settings_of(averaged: AveragedModel, options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by which a shadow averages as ``averaged`` does; ``options`` win, and one function replaces both."""
    kept: dict[str, Any] = {'buffers': 'average' if averaged.use_buffers else 'copy'}
    if not options.keys() & set(_FUNCTIONS):
        kept |= {name: getattr(averaged, name) for name in _FUNCTIONS}
    return {**kept, **options}


def copy_of(model: nn.Module, settings: Settings, arguments: Mapping[str, Any], *, use_buffers: bool) -> AveragedModel:
    """An AveragedModel over a copy of ``model`` that averages as ``settings`` say; ``arguments`` of its own win."""
    bare, arguments = unwrap(model), _checked(arguments)
    if any(isinstance(module, FSDPModule) for module in bare.modules()):
        raise NotImplementedError(
            'AveragedModel(model) copies a model, and torch cannot copy one that is sharded by FSDP2. Pass a model of '
            'the same architecture that is not, or save averaged_state_dict(model).'
        )
    kept: dict[str, Any] = {'use_buffers': use_buffers}
    if not arguments.keys() & set(_FUNCTIONS):
        kept |= {name: getattr(settings, name) for name in _FUNCTIONS}
    try:
        return AveragedModel(bare, **{**kept, **arguments})
    except Exception as error:
        raise ValueError(
            f'AveragedModel(model) copies a model, and this one cannot be copied: {error}. Pass one that copy.deepcopy '
            'copies, or save averaged_state_dict(model).'
        ) from error


def _checked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    for name in arguments:
        if name not in _ARGUMENTS:
            raise TypeError(f'AveragedModel takes no argument {name!r}. {suggestion(name, _ARGUMENTS, "It takes")}')
    for name in _FUNCTIONS:
        if arguments.get(name) is not None and not callable(arguments[name]):
            raise TypeError(f'{name} must be a function, got {shown(arguments[name])}.')
    if all(arguments.get(name) is not None for name in _FUNCTIONS):
        raise ValueError('pass either avg_fn or multi_avg_fn, got both. multi_avg_fn is the faster one.')
    checked = dict(arguments)
    if 'device' in checked and (device := parse_device(checked['device'])) is not None:
        if device.type == 'meta':
            raise ValueError("device must hold values, got 'meta'. Pass 'cpu' or 'cuda', or leave the device out.")
        check_device_is_here(device)
        checked['device'] = device
    if 'use_buffers' in checked:
        checked['use_buffers'] = plain.flag('use_buffers', checked['use_buffers'])
    return checked


def warn_of_lost_digits(averaged: AveragedModel, average: Mapping[str, Tensor]) -> None:
    """Warns, on behalf of the caller's caller, where ``averaged`` is too narrow to hold ``average``."""
    held = Inventory.of(unwrap(averaged)).tensors()
    narrowed = [name for name, kept in average.items() if any_nonzero([difference(kept, held[name])])]
    if narrowed:
        warnings.warn(
            f'the average is {average[narrowed[0]].dtype}, the model {held[narrowed[0]].dtype}: digits are lost. '
            'Pass the model in the wider dtype, for example copy.deepcopy(model).float().',
            stacklevel=4,
        )
