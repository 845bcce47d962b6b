"""Reads the average out of a checkpoint, Composer's or another library's.

Invariant: what a file holds is never executed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from composer_ema.checkpoints import formats, others, search, sharded_format, states, trainer_folder
from composer_ema.checkpoints.lazy_tensor import in_memory
from composer_ema.checkpoints.opening import UNKNOWN_CONTENT, checkpoint_of, described, read_file
from composer_ema.checkpoints.safely import CheckpointError
from composer_ema.model.names import check_same, listed
from composer_ema.model.wrappers import canonical_name, unwrap
from composer_ema.shadow.foreign import is_extra_state, under_names_of

# Where accelerate's save_state puts optimizers, and what register_for_checkpointing was given.
_OF_ACCELERATE = ('optimizer*.bin', 'custom_checkpoint_*.pkl')


def load_average(
    checkpoint: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    average: str | None = None,
    key: str | None = None,
) -> dict[str, Tensor]:
    """Returns the averaged weights in a file, for ``model.load_state_dict``.

    Reads checkpoints of :class:`composer_ema.EMA`, of :class:`composer_ema.SWA` and of Composer's built-in algorithms
    of these names, whichever weights their model slot holds. Frozen parameters, and buffers that were not averaged,
    come from the model slot. Also reads

    - the states of :class:`composer_ema.EMAOptimizer` and :class:`composer_ema.ShadowModel`, alone or under any key, as
      in ``{'model': ..., 'optimizer': optimizer.state_dict()}`` or in Lightning's ``optimizer_states``; what is not
      averaged comes from the model's state dict in the same file, or else from ``model``;
    - what :func:`composer_ema.export` wrote;
    - sharded checkpoints, the folders that Composer and ``torch.distributed.checkpoint`` write, on any number of ranks:
      in one process, chunk by chunk;
    - what other libraries save, recognised by its keys; see :meth:`composer_ema.ShadowModel.load_foreign`;
    - with ``key=``, plain weights by name, as in ``{'model': ..., 'ema': weights}``.

    Args:
        checkpoint: a ``.pt`` file or a sharded folder that Composer's Trainer saved, with one or several processes, or
            another file or folder with an average.
        model: what the weights are for. All names and shapes are checked against it; they may stand in another
            outermost module, so a checkpoint of a ComposerModel also fits the bare network. Files without names need
            it: diffusers, torch-ema, and EMAOptimizer without ``model=`` keep only the order of the parameters. Only
            read.
        average: which average to take if the checkpoint holds several, such as ``'ema'``. Default: the only one.
        key: where in the file to look, keys joined with dots: ``'ema'``, ``'state.ema'``, ``'optimizer_states.1'``.
            Default: everywhere.

    Returns:
        Canonical names and CPU tensors, in the order of the model. Averaged ones have the average's dtype, float32
        for a 16-bit model.

    Raises:
        CheckpointError: the file is missing, damaged, or of another kind; it would run code; it holds no average,
            several, or one that does not fit ``model`` or needs one.
        TypeError: an argument has the wrong type.
        ValueError: ``model`` has a lazy parameter, which has no shape yet.

    Example:
        .. code:: python

            model.load_state_dict(load_average('runs/fashion_mnist/checkpoints/latest-rank0.pt'))
    """
    path = checkpoint_of(checkpoint, 'checkpoint')
    _check_model(model)
    check_texts(average=average, key=key)
    weights, _ = read_average(path, model, label=average, key=key)
    return {name: in_memory(value) for name, value in weights.items()}


def check_texts(**arguments: Any) -> None:
    """Raises a TypeError for an argument that is neither a string nor None."""
    for name, value in arguments.items():
        if not isinstance(value, (str, NoneType)):
            raise TypeError(f'{name} must be a string, got {described(value)}. {_TEXTS[name]}')


_TEXTS = {
    'average': "Pass what the algorithm calls the average, as in average='ema'.",
    'key': "Pass the keys in the file, joined with dots, as in key='optimizer_states.1'.",
    'format': "Pass one of those in the docstring of export, as in format='huggingface'.",
    'max_shard_size': "Pass a size with its unit, as in max_shard_size='5GB'.",
    'strip_prefix': "Pass the module to take off the names, as in strip_prefix='module', or 'auto'.",
}


def _check_model(model: Any) -> None:
    if model is None:
        return
    if not isinstance(model, nn.Module):
        raise TypeError(
            f'model must be the torch.nn.Module that the weights are for, got {described(model)}. Pass the module '
            'itself, not its parameters or state dict. To choose among several averages in the file pass average= or '
            'key=.'
        )
    lazy = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if is_lazy(tensor)]
    if lazy:
        raise ValueError(f'{listed(lazy)} in model are lazy and have no shape yet. Run one forward pass first.')


def read_average(
    path: Path, model: nn.Module | None = None, *, label: str | None = None, key: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The averaged weights in a file, and what the file says of them: whose they are, how averaged, how often.

    Args:
        path: of the file.
        model: as for :func:`load_average`.
        label: as ``average`` for :func:`load_average`.
        key: as for :func:`load_average`.

    Raises:
        CheckpointError: as for :func:`load_average`.
    """
    return average_in(read_file(path), path, model, label=label, key=key)


def average_in(
    held: Any, path: Path, model: nn.Module | None = None, *, label: str | None = None, key: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same, of what :func:`read_file` returned for ``path``. No tensor is read unless ``model`` needs it."""
    try:
        if key is None and is_of_composer(held) and not _is_elsewhere(held):
            if not has_averages(held['state']):
                _refuse_without_average(held, path)
            weights, facts = _average_in(held['state'], path, label)
            return (weights if model is None else _fitted(weights, model)), facts
        return _average_of_others(held, path, model, label, key)
    except CheckpointError:
        raise
    # The file is sound, so something other than a Trainer with an average wrote what it holds.
    except UNKNOWN_CONTENT as error:
        raise CheckpointError(f'{path} holds no average that can be read: {error}{_beside(path)}') from error


def _beside(path: Path) -> str:
    """In an error: which other file of the same checkpoint holds an average, where there is one."""
    folder = path if path.is_dir() else path.parent
    if trainer_folder.is_trainer_folder(folder):
        return f' The average is beside it: pass the folder, {folder}.'
    for file in (each for pattern in _OF_ACCELERATE for each in sorted(folder.glob(pattern)) if each != path):
        with contextlib.suppress(CheckpointError):
            if search.averages(read_file(file, mmap=True)):
                return f' accelerate saves in several files, and this one has an average: {file}.'
    return ''


def is_of_composer(checkpoint: Any) -> bool:
    """Whether what :func:`read_file` returned was saved by Composer's Trainer, as far as its outermost keys tell."""
    # An optimizer's state dict has a 'state', too.
    return (
        isinstance(checkpoint, Mapping)
        and isinstance(checkpoint.get('state'), Mapping)
        and 'param_groups' not in checkpoint
    )


def has_averages(state: Mapping[str, Any]) -> bool:
    """Whether an algorithm of a Composer checkpoint's ``state`` keeps an average."""
    algorithms = state.get('algorithms')
    return isinstance(algorithms, (list, Mapping)) and bool(formats.find(algorithms_of(state)))


def _is_elsewhere(checkpoint: Mapping[str, Any]) -> bool:
    """Whether the average is not in the state of an algorithm, but for example in that of the optimizer."""
    return not has_averages(checkpoint['state']) and bool(search.averages(checkpoint))


def _average_of_others(
    held: Any, path: Path, model: nn.Module | None, label: str | None, key: str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    averages = others.find(held, key)
    try:
        found = others.choose(averages, label)
    except ValueError as error:
        raise CheckpointError(f'{path}: {error}') from error
    average = found.average
    if average.num_updates == 0:
        raise CheckpointError(f'{path} holds no average yet: {average.source} counts no update.')
    if model is None and not average.has_names:
        raise CheckpointError(
            f'{path} holds an average of {average.source}, which keeps the order of the parameters and no names. '
            'Pass the model that was averaged: load_average(file, model=model).'
        )
    weights = others.named(found) if model is None else others.fit(found, model)
    facts = {'weights': average.kind, 'source': average.source, 'key': found.key or None}
    return weights, {**facts, 'num_updates': average.num_updates, **average.facts}


def _fitted(average: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The average under the names of ``model``, in its order."""
    state = unwrap(model).state_dict()
    names = [canonical_name(name) for name in state]
    found = under_names_of(average, names)
    check_same(
        'the average',
        others.tensors_of(model),
        {name: value for name, value in found.items() if not is_extra_state(name)},
        remedy='Pass the model that was trained.',
    )
    return {name: found[name] for name in names if name in found}


@dataclass(frozen=True)
class _Saved:
    """An average in a checkpoint, and the state that it stands in."""

    algorithm: str
    label: str
    row: formats.Format
    state: Mapping[str, Any]

    @property
    def average(self) -> Mapping[str, Any]:
        return self.state['averages'][self.label]

    @property
    def is_hidden(self) -> bool:
        """Whether it is kept for another purpose than to be used, so that it is read only by its label."""
        return self.label in self.state.get(formats.HIDDEN, ())


def _average_in(state: Mapping[str, Any], path: Path, label: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model = {canonical_name(name): tensor for name, tensor in mapping_in(state, 'model').items()}
    saved = _choose(_saved_in(state, model, path), label, path)
    parameters, aliases = saved.average['parameters'], saved.average['aliases']
    buffers = {name: buffer for name, buffer in saved.average['buffers'].items() if name in model}
    averaged = {**parameters, **buffers}
    check_same('the average', model, averaged, optional=model, remedy='The checkpoint is damaged.')
    # Composer's own have one name for a tied weight.
    aliases = {**states.tied(model, {*averaged, *aliases}), **aliases}
    averaged |= {alias: averaged[name] for alias, name in aliases.items() if name in averaged}
    weights = {name: averaged.get(name, tensor) for name, tensor in model.items()}
    others.check_readable(weights)
    return weights, _facts(state, saved)


def _refuse_without_average(checkpoint: Mapping[str, Any], path: Path) -> NoReturn:
    algorithms = algorithms_of(checkpoint['state'])
    listing = ', '.join(f'{name} ({_outline(state)})' for name, state in algorithms.items())
    found = f'the algorithms {listing}, whose states are of no known format' if algorithms else 'no algorithms'
    others_weights = [place for place in search.weights(checkpoint) if place != 'state.model']
    raise CheckpointError(
        f'{path} holds no average: it was saved with {found}. Train with algorithms=[EMA()] or [SWA()], and without '
        f'save_weights_only.{others.advice(others_weights)}'
    )


def _saved_in(state: Mapping[str, Any], model: Mapping[str, Tensor], path: Path) -> list[_Saved]:
    """Every average of a checkpoint that has started."""
    algorithms = algorithms_of(state)
    rows = formats.find(algorithms)
    upgraded = {
        name: formats.upgrade(algorithms[name], model_slot=model, what=f'the saved {name} state') for name in rows
    }
    saved = [_Saved(name, label, rows[name], upgraded[name]) for name in rows for label in upgraded[name]['averages']]
    started = [each for each in saved if each.state['started']]
    if not started:
        starts = ' and '.join(dict.fromkeys(f'{each.algorithm.lower()}_start' for each in saved)) or 'the start'
        raise CheckpointError(f'{path} holds no average yet: {starts} had not come when it was saved.')
    return started


def _outline(state: Any) -> str:
    """What a state looks like, in a few words."""
    return f'keys: {", ".join(map(str, state)) or "none"}' if isinstance(state, Mapping) else type(state).__name__


def _choose(saved: Sequence[_Saved], label: str | None, path: Path) -> _Saved:
    chosen = [each for each in saved if (not each.is_hidden if label is None else each.label == label)]
    if len(chosen) == 1:
        return chosen[0]
    names = ', '.join(f'{each.label!r} of {each.algorithm}' for each in chosen or saved)
    if chosen:
        raise CheckpointError(
            f'{path} holds {len(chosen)} averages: {names}. Say which to take, for example '
            f'average={chosen[0].label!r} (--average {chosen[0].label}).'
        )
    raise CheckpointError(f'{path} holds no average called {label!r}, but {names}.')


def algorithms_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The states of a checkpoint's algorithms by name, with the tensors that a sharded one keeps beside them.

    Composer writes a list of pairs, older releases a dictionary.
    """
    algorithms = state.get('algorithms')
    if not isinstance(algorithms, (list, Mapping, NoneType)):
        raise TypeError(f"its 'algorithms' is a {type(algorithms).__name__}.")
    is_pairs = all(isinstance(each, (list, tuple)) and len(each) == 2 for each in algorithms or ())
    if not isinstance(algorithms, Mapping) and not is_pairs:
        raise TypeError("its 'algorithms' is no list of pairs.")
    states_by_name = dict(algorithms or {})
    if wrong := [name for name in states_by_name if not isinstance(name, str)]:
        raise TypeError(f"its 'algorithms' has a {type(wrong[0]).__name__} in place of a name.")
    beside = mapping_in(state, sharded_format.AVERAGES, optional=True)
    for name, own in states_by_name.items():
        if sharded_format.is_split(own):
            tensors = mapping_in(beside, name, optional=True)
            states_by_name[name] = sharded_format.joined(own, tensors, f'the saved {name} state')
    return states_by_name


def run_name_of(state: Mapping[str, Any]) -> str | None:
    """The run that saved a checkpoint; None where it does not say."""
    name = state.get('run_name')
    if not isinstance(name, (str, NoneType)):
        raise TypeError(f"its 'run_name' is a {type(name).__name__}.")
    return name


def trained(state: Mapping[str, Any]) -> dict[str, int]:
    """How far training had come, by unit."""
    timestamp = mapping_in(mapping_in(state, 'timestamp', optional=True), 'Timestamp', optional=True)
    counts = {unit: timestamp.get(unit) for unit in ('epoch', 'batch', 'sample', 'token')}
    for unit, count in counts.items():
        if count is not None:
            formats.check_count(count, unit, "its 'timestamp'")
    return {unit: count for unit, count in counts.items() if count is not None}


# Arguments that an export says of its average.
_OF_PROFILE = ('half_life', 'smoothing', 'power', 'gamma', 'warmup', 'update_interval')


def _facts(state: Mapping[str, Any], saved: _Saved) -> dict[str, Any]:
    config = formats.config_in(saved.state, saved.label)
    start = f'{saved.algorithm.lower()}_start'
    return {
        'weights': formats.kind(config, saved.average['profile']['description']),
        'run_name': run_name_of(state),
        'num_updates': saved.average['num_updates'] if saved.row.counts_updates else None,
        **{name: config.get(name) for name in _OF_PROFILE},
        start: config.get(start),
        'buffers': config.get('buffers'),
        **{f'trained_{unit}': count for unit, count in trained(state).items()},
    }


def mapping_in(of: Mapping[str, Any], key: str, *, optional: bool = False) -> Mapping[str, Any]:
    """The dictionary under ``key``; an empty one where it is ``optional`` and there is none.

    Raises:
        TypeError: there is something else.
    """
    value = of.get(key)
    if value is None and optional:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f'its {key!r} is a {type(value).__name__}.')
    return value
