"""The key ``parallelism_config`` of a recipe: how the processes of a run share its model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal, get_args

from composer.distributed.activation_checkpointing import generate_composer_model_check_fn
from composer.models import ComposerModel
from composer.utils import FSDPConfig
from composer.utils.parallelism import FSDP2Config, ParallelismConfig

from composer_ema.recipe.arguments import Place, check_arguments, check_value, signature
from composer_ema.wording import suggestion

KEY = 'parallelism_config'
# What Composer annotates as any string: it refuses a wrong one late, after the data were read.
_STATE_DICT_TYPE = Literal['sharded', 'full']
_MIXED_PRECISION = Literal['DEFAULT', 'PURE', 'FULL']  # in lower case, too
_RECOMPUTES = ('activation_checkpointing', 'activation_cpu_offload')


def check(section: Any, place: Place, *, has_average: bool) -> None:
    """Checks every key and the kind of every value against the signature of Composer's ``FSDP2Config``.

    Args:
        section: What the recipe says under :data:`KEY`; null for a model that every process holds whole.
        place: Its place.
        has_average: Whether the recipe averages weights.

    Raises:
        RecipeError: An unknown key, a value of the wrong kind, tensor parallelism, or FSDP1 with an average.
    """
    if section is None:
        return
    if not isinstance(section, dict):
        raise place.error(f'must map a kind of parallelism to its settings, as in fsdp2: {{}}, got {section!r}.')
    for key in section:
        if key not in ('fsdp', 'fsdp2', 'tp'):
            raise (place / key).error(f'there is no such kind. {suggestion(key, ["fsdp2"], "Write")}')
    if section.get('tp') is not None:
        raise (place / 'tp').error(
            'a recipe cannot ask for tensor parallelism: with FSDP2, Composer 0.32.1 replaces the parameters without '
            'telling the optimizer, and then refuses to train. Write fsdp2: {} alone, or call parallelize_module '
            'in a loop of your own, where ShadowModel and EMAOptimizer(model=...) follow it.'
        )
    if section.get('fsdp') is not None:
        _check_fsdp(section, place, has_average=has_average)
    if section.get('fsdp2') is not None:
        _check_fsdp2(section['fsdp2'], place / 'fsdp2')


def built(section: Mapping[str, Any] | None) -> ParallelismConfig | Mapping[str, Any] | None:
    """What the Trainer takes for a section that :func:`check` has passed."""
    if section is None or section.get('fsdp2') is None:
        return section
    return ParallelismConfig(fsdp2=FSDP2Config(**section['fsdp2']))


def loads(section: Mapping[str, Any] | None) -> str | None:
    """The kind of checkpoint that a run loads and saves: ``'full'``, a file, or ``'sharded'``, a folder.

    None for FSDP1, of which only Composer can tell.
    """
    if section is None or all(each is None for each in section.values()):
        return 'full'
    if section.get('fsdp2') is None:
        return None
    return section['fsdp2'].get('state_dict_type', signature(FSDP2Config)['state_dict_type'].default)


def check_model(section: Mapping[str, Any] | None, model: ComposerModel, place: Place) -> None:
    """Refuses to recompute or offload the activations of a model that does not tell which.

    Raises:
        RecipeError: The recipe asks for it, and Composer would find no module to do it for.
    """
    asked = [key for key in _RECOMPUTES if section and (section.get('fsdp2') or {}).get(key)]
    if asked and not any(map(generate_composer_model_check_fn(model), model.modules())):
        raise (place / 'fsdp2' / asked[0]).error(
            'the model names no block whose activations it could be done for. Leave it out, or give the network a '
            'method activation_checkpointing_fn(module) that returns whether to do it for that module.'
        )


def _check_fsdp(section: Mapping[str, Any], place: Place, *, has_average: bool) -> None:
    if section.get('fsdp2') is not None:
        raise (place / 'fsdp').error('a model is sharded in one way, and the recipe asks for two. Keep fsdp2.')
    # Composer takes the key for FSDP2 where this variable says so.
    if has_average and os.environ.get('FSDP_VERSION', '1') != '2':
        raise (place / 'fsdp').error(
            'this is FSDP1, whose flat shards no average can follow to another number of processes. Write fsdp2: '
            'instead; of its settings, reshard_after_forward stands for sharding_strategy, and the blocks are chosen '
            'in the same way.'
        )
    known = [each.name for each in dataclasses.fields(FSDPConfig) if each.init]
    arguments = section['fsdp']
    if not isinstance(arguments, dict):
        raise (place / 'fsdp').error(f'the arguments of fsdp must be a mapping, got {arguments!r}.')
    for key in arguments:
        if key not in known:
            raise (place / 'fsdp' / key).error(f'FSDPConfig has no such argument. {suggestion(key, known, "It takes")}')


def _check_fsdp2(arguments: Any, place: Place) -> None:
    checked = check_arguments(FSDP2Config, arguments, place)
    if 'state_dict_type' in checked:
        check_value(_STATE_DICT_TYPE, checked['state_dict_type'], place / 'state_dict_type')
    if checked.get('mixed_precision', 'DEFAULT').upper() not in get_args(_MIXED_PRECISION):
        check_value(_MIXED_PRECISION, checked['mixed_precision'], place / 'mixed_precision')
