"""The models of timm as one family of plug-ins, ``timm/resnet18d``; timm is imported where a recipe names one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from composer_ema.wording import suggestion
from composer_ema.zoo.checks import check_whole
from composer_ema.zoo.plugins import Family, PluginError

PREFIX = 'timm/'


def names() -> list[str]:
    """The names of all models of the installed timm, with the prefix."""
    return [f'{PREFIX}{name}' for name in _timm().list_models()]


def find(name: str) -> Callable[..., torch.nn.Module]:
    """A builder of one model, which takes what `timm.create_model` takes.

    Args:
        name: One of :func:`names`, perhaps with the tag of pretrained weights: `timm/resnet18d.ra2_in1k`.

    Raises:
        PluginError: timm has no such model, or is not installed.
    """
    timm, architecture = _timm(), name.removeprefix(PREFIX)
    if not timm.is_model(architecture):
        raise PluginError(f'timm has no model {architecture!r}. {suggestion(name, names())}')

    def build(
        *, pretrained: bool = False, num_classes: int | None = None, in_chans: int = 3, **arguments: Any
    ) -> torch.nn.Module:
        if num_classes is not None:
            check_whole('num_classes', num_classes, 1, 'Pass the number of classes of the data set.')
            arguments['num_classes'] = num_classes
        return timm.create_model(architecture, pretrained=pretrained, in_chans=in_chans, **arguments)

    build.__name__ = name
    return build


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise PluginError(f'it needs timm: {error}. Install it with: pip install timm') from error
    return timm


#: Registered under ``composer_ema.models_families`` in setup.cfg.
MODELS = Family(names, find, PREFIX)
