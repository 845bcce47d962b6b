"""Whether a checkpoint fits the run that loads it, told before any of it is loaded; and what Composer could not load.

Composer loads a checkpoint inside of the Trainer's constructor, after algorithms have changed the model and while more
of them do. So the checks stand in the way of the load: they take the place of functions of Composer's while a Trainer
is built.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import composer.core.state
import composer.utils.checkpoint
from composer.core import State
from composer.utils import FSDPConfig
from torch.distributed.checkpoint.api import CheckpointException

from composer_ema.checkpoints.safely import CheckpointError, UnsafeCheckpointError
from composer_ema.checkpoints.sharded import open_folder
from composer_ema.model.names import listed
from composer_ema.model.wrappers import canonical_name
from composer_ema.recipe.arguments import Place, RecipeError, said
from composer_ema.recipe.schema import Plan
from composer_ema.recipe.trust import Trust
from composer_ema.run_folder.resuming import Found
from composer_ema.trainer.safe_loading import replaced

_SOME = 4  # of the names that do not fit
_LONGEST = 300  # letters of an error that is not ours


class _MisfitError(Exception):
    """The checkpoint is of another model or optimizer. The message says how they differ, and what to do."""


@dataclass(frozen=True)
class Load:
    """How a run loads a checkpoint.

    Args:
        place: The key of the recipe that asks for it, ``load_path`` or ``autoresume``.
        path: The checkpoint, for errors.
        is_strict: Whether the model and the checkpoint must have the same names. Shapes must agree in any case.
        ignores: Whether a part of it is left out, so that names may be missing.
    """

    place: Place
    path: str
    is_strict: bool
    ignores: bool


def how_loaded(checked: Plan, resumed: Found | None) -> Load | None:
    """How the Trainer of a recipe loads; None where it loads nothing, as far as we know.

    Args:
        checked: The recipe.
        resumed: What autoresume has found on this machine's disks.
    """
    given = checked.trainer
    is_strict = given.get('load_strict_model_weights', True)
    if resumed is not None:
        return Load(checked.place / 'autoresume', str(resumed.path), is_strict, ignores=False)
    if path := given.get('load_path'):
        return Load(checked.place / 'load_path', path, is_strict, ignores=bool(given.get('load_ignore_keys')))
    if given.get('autoresume'):
        return Load(checked.place / 'autoresume', 'the checkpoint in the object store', is_strict, ignores=False)
    return None


@contextlib.contextmanager
def refusing_misfits(how: Load | None) -> Iterator[None]:
    """Inside, a Trainer refuses a checkpoint that does not fit its model or its optimizer before it loads either.

    Composer itself ignores missing and unexpected weights unless ``load_weights_only``, and leaves the state of another
    optimizer out with a warning.

    Args:
        how: The load; None for a run that loads nothing.

    Raises:
        RecipeError: At ``how.place``, for whatever Composer or torch raise while they load.
    """
    if how is None:
        yield
        return
    load = composer.utils.checkpoint.load_checkpoint

    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        try:
            with _checks(how, kwargs['state']):
                if kwargs['state'].fsdp_sharded_state_dict_enabled and kwargs.get('object_store') is None:
                    _check_folder(Path(kwargs['path']), kwargs['state'], how)
                return load(*args, **kwargs)
        except RecipeError:
            raise
        except _MisfitError as error:
            raise how.place.error(f'{how.path} {error}') from error
        except UnsafeCheckpointError as error:
            raise how.place.error(f'{error} {Trust.remedy(error.names)}') from error
        except CheckpointError as error:
            raise how.place.error(str(error)) from error
        # What is damaged or of another kind fails in as many ways as there are bytes in it.
        except (Exception, CheckpointException) as error:
            raise how.place.error(f'{how.path} could not be loaded: {_in_short(error, _remedy(how))}') from error

    with replaced(composer.utils.checkpoint, 'load_checkpoint', load_checkpoint):
        yield


@contextlib.contextmanager
def _checks(how: Load, state: State) -> Iterator[None]:
    load_model, load_optimizers = composer.core.state.set_model_state_dict, State.load_optim_state

    def set_model_state_dict(model: Any, model_state_dict: Any, **kwargs: Any) -> Any:
        if not isinstance(state.fsdp_config, FSDPConfig):  # its flat shards have other names
            _check_model(_shapes(model_state_dict), _shapes(model.state_dict()), how)
        return load_model(model, model_state_dict, **kwargs)

    def load_optim_state(self: State, state_dict: Any, strict: bool = True) -> None:
        _check_optimizers(state_dict['optimizers'], self, how)
        load_optimizers(self, state_dict, strict)

    with (
        replaced(composer.core.state, 'set_model_state_dict', set_model_state_dict),
        replaced(State, 'load_optim_state', load_optim_state),
    ):
        yield


def _check_folder(folder: Path, state: State, how: Load) -> None:
    """Checks a sharded checkpoint by its index: Composer loads into the model itself, and stops at the first name."""
    held = open_folder(folder)['state']
    if 'model' in held:
        _check_model(_shapes(held['model']), _shapes(state.model.state_dict()), how)
    if 'optimizers' in held:
        _check_optimizers(held['optimizers'], state, how)


def _check_model(saved: Mapping[str, Any], own: Mapping[str, Any], how: Load) -> None:
    other_shapes = sorted(name for name in saved.keys() & own.keys() if saved[name] != own[name])
    differences = [f'{name} ({saved[name]} in the checkpoint, {own[name]} in the model)' for name in other_shapes]
    missing = sorted(own.keys() - saved.keys()) if how.is_strict and not how.ignores else []
    unexpected = sorted(saved.keys() - own.keys()) if how.is_strict else []
    problems = [
        f'{len(names)} {label}: {listed(names, _SOME)}'
        for label, names in (('missing', missing), ('unexpected', unexpected), ('of another shape', differences))
        if names
    ]
    if not problems:
        return
    keys = 'load_strict_model_weights: false'
    if other_shapes:
        keys = f'load_weights_only: true, {keys} and load_ignore_keys: [state/model/{other_shapes[0]}, ...]'
    raise _MisfitError(
        f'was saved with another model. Of its weights {"; ".join(problems)}. Build the model that was trained, or '
        + (f'load what fits of it with {keys}.' if how.place.key == 'load_path' else 'give another run_name.')
    )


def _check_optimizers(saved: Any, state: State, how: Load) -> None:
    if not isinstance(saved, Mapping) or not saved:
        return
    own = [type(each).__qualname__ for each in state.optimizers]
    if missing := [name for name in own if name not in saved]:
        raise _MisfitError(
            f'was saved with the optimizer {listed(sorted(map(str, saved)))}, of whose state {listed(missing)} can use '
            f'none. Train with the same optimizer, or {_begin_anew(how)}.'
        )


def _begin_anew(how: Load) -> str:
    if how.place.key == 'load_path':
        return 'begin with an empty state: load_ignore_keys: [state/optimizers, state/schedulers]'
    return 'give another run_name, and this file as load_path with load_ignore_keys: [state/optimizers]'


def _remedy(how: Load) -> str:
    if how.place.key == 'load_path':
        return 'Load another one, or leave out what does not fit, as in load_ignore_keys: [state/optimizers].'
    return 'Go on with the recipe that the run began with, or give another run_name.'


def _shapes(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of each weight, by its name without wrappers; of what is no tensor, its type."""
    return {
        canonical_name(name): tuple(value.shape) if hasattr(value, 'shape') else type(value).__name__
        for name, value in weights.items()
    }


def _in_short(error: BaseException, remedy: str) -> str:
    """An error on one line. One that is not ours needs its type, without which a KeyError is a name, and a remedy."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if _is_ours(error):
        return said(error)
    text = f'{type(error).__name__}: {said(error)}'.rstrip('.')
    return f'{text[:_LONGEST]}... {remedy}' if len(text) > _LONGEST else f'{text}. {remedy}'


def _is_ours(error: BaseException) -> bool:
    if isinstance(error, LookupError | AttributeError | AssertionError):  # what they say is not for the user
        return False
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and frames[-1][0].f_globals.get('__name__', '').startswith('composer_ema.')
