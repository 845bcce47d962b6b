"""Describes what a checkpoint holds: whose weights, which averages, how far training had come. Executes nothing."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composer_ema.checkpoints import formats
from composer_ema.checkpoints.formats import Format
from composer_ema.checkpoints.reading import CheckpointError, is_of_composer, read_file
from composer_ema.model.sharding import canonical_name
from composer_ema.shadow import foreign
from composer_ema.shadow.foreign import Foreign

TRAINING_WEIGHTS, AVERAGE, UNKNOWN, NOT_READ = 'training weights', 'average', 'weights', 'not read'
Tensors = Mapping[str, Tensor]
#: What a tensor of the model is to an average.
PARAMETER, BUFFER, COPY = 'averaged parameter', 'averaged buffer', 'copied buffer'
ALIAS, UNTRACKED, OF_AVERAGE = 'tied to another', 'not averaged', 'of the average'
# The oldest format does not tell buffers from parameters, but these are buffers in every model.
_NAMES_OF_BUFFERS = ('running_mean', 'running_var', 'num_batches_tracked')


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the model.

    Args:
        name: Canonical, as a plain model would name it.
        shape: Of the model's tensor, or of the average's where the model slot has none of that name.
        dtype: Of the tensor in the model slot, ``'float32'``; None where the slot has none.
        num_bytes: Of the tensor in the model slot.
        role: :data:`PARAMETER`, :data:`BUFFER`, :data:`COPY`, :data:`ALIAS`, :data:`UNTRACKED`; :data:`OF_AVERAGE`
            where the file does not tell parameters from buffers.
        average_dtype: Of the average; None where it is not averaged.
        average_bytes: Of the average.
        relative_distance: Norm of average minus training weights over norm of the training weights; None where it is
            not averaged, or not floating.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str | None
    num_bytes: int
    role: str
    average_dtype: str | None = None
    average_bytes: int = 0
    relative_distance: float | None = None

    @property
    def num_elements(self) -> int:
        """The product of the shape."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class AverageInfo:
    """One average in a checkpoint.

    Args:
        algorithm: Whose state it is in: ``'EMA'``, ``'SWA'``, or the library that kept it.
        written_as: The format of that state, in words.
        is_started: Whether there is an average yet.
        config: The algorithm's arguments, as far as the format keeps them.
        num_updates: None where the format does not count.
        last_update: When the last update was, by unit (``'ep'``, ``'ba'``, ``'sp'``, ...); None where it is not kept.
        relative_distance: Norm of average minus training weights over norm of the training weights, over all averaged
            parameters, as ``ema/relative_distance`` is logged; None where there is nothing to compare.
        tensors: Every tensor of the model, and of the average.
        label: What the algorithm calls the average; None for another library.
    """

    algorithm: str
    written_as: str
    is_started: bool
    config: dict[str, Any]
    num_updates: int | None
    last_update: dict[str, float] | None
    relative_distance: float | None
    tensors: list[TensorInfo]
    label: str | None = None


@dataclass(frozen=True)
class Description:
    """What a checkpoint holds.

    Args:
        path: The file.
        num_bytes: Its size.
        run_name: The run that saved it; None where it does not say.
        trained: How far training had come: ``{'epoch': 2, 'batch': 936, 'sample': ..., 'token': ...}``.
        versions: Of Composer and torch that saved it.
        model_slot: Whose weights the model's place holds: :data:`TRAINING_WEIGHTS`, :data:`AVERAGE`, :data:`UNKNOWN`
            where only the run that saved it could tell, or :data:`NOT_READ` for a file of another library.
        has_stash: Whether the training weights lie beside an average in the model slot.
        averages: None, one or several.
        tensors: Every tensor in the model slot, where there is no average to compare it with.
        optimizers, schedulers, algorithms, callbacks: Names of what has state in it.
    """

    path: str
    num_bytes: int
    run_name: str | None
    trained: dict[str, int]
    versions: dict[str, str]
    model_slot: str
    has_stash: bool
    averages: list[AverageInfo]
    tensors: list[TensorInfo]
    optimizers: list[str] = field(default_factory=list)
    schedulers: list[str] = field(default_factory=list)
    algorithms: list[str] = field(default_factory=list)
    callbacks: list[str] = field(default_factory=list)


def describe(checkpoint: str | os.PathLike[str]) -> Description:
    """Reads what a checkpoint holds, without a model and without executing anything in the file.

    Reads Composer's checkpoints with the states of :class:`composer_ema.EMA`, of :class:`composer_ema.SWA` and of
    Composer's built-in algorithms of these names, whichever weights their model slot holds; Composer's checkpoints
    without an average; and the averages of other libraries that :func:`composer_ema.load_average` reads.

    Args:
        checkpoint: a file that one of them saved.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or would run code.

    Example:
        .. code:: python

            found = describe('runs/fashion_mnist/checkpoints/latest-rank0.pt')
            print(found.model_slot, found.averages[0].relative_distance)
    """
    path = Path(checkpoint)
    held = read_file(path)
    try:
        return _describe(path, held['state']) if is_of_composer(held) else _describe_foreign(path, foreign.read(held))
    # The file is sound, so something that we do not know wrote what it holds.
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f'{path} holds a state that cannot be read: {error}') from error


@dataclass(frozen=True)
class Share:
    """Tensors of one role and dtype, counted together.

    Args:
        role: As of :class:`TensorInfo`.
        dtype: In the model slot, and behind an arrow the average's where that differs.
        num_tensors: How many.
        num_elements: Of all of them.
        num_bytes: In the model slot.
        average_bytes: Of their averages.
    """

    role: str
    dtype: str
    num_tensors: int
    num_elements: int
    num_bytes: int
    average_bytes: int


def summarise(tensors: Iterable[TensorInfo]) -> list[Share]:
    """Counts tensors by role and dtype, averaged ones first."""
    groups: dict[tuple[str, str], list[TensorInfo]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.role, dtypes(tensor)), []).append(tensor)
    order = sorted(groups, key=lambda key: (_ROLES.index(key[0]), key[1]))
    return [
        Share(
            role,
            dtype,
            num_tensors=len(groups[role, dtype]),
            num_elements=sum(tensor.num_elements for tensor in groups[role, dtype]),
            num_bytes=sum(tensor.num_bytes for tensor in groups[role, dtype]),
            average_bytes=sum(tensor.average_bytes for tensor in groups[role, dtype]),
        )
        for role, dtype in order
    ]


def dtypes(tensor: TensorInfo) -> str:
    """The dtype in the model slot, and behind an arrow the average's where that differs.

    Example:
        >>> dtypes(TensorInfo('weight', (2,), 'bfloat16', 4, PARAMETER, 'float32', 8))
        'bfloat16 → float32'
    """
    both = dict.fromkeys(each for each in (tensor.dtype, tensor.average_dtype) if each is not None)
    return ' → '.join(both)


_ROLES = (PARAMETER, BUFFER, COPY, OF_AVERAGE, ALIAS, UNTRACKED)


def _describe(path: Path, state: Mapping[str, Any]) -> Description:
    model = {
        canonical_name(name): tensor for name, tensor in _mapping(state, 'model').items() if isinstance(tensor, Tensor)
    }
    algorithms = dict(state.get('algorithms') or {})
    rows = formats.find(algorithms)
    buffers = {name for name in model if name.rpartition('.')[2] in _NAMES_OF_BUFFERS}
    averages, has_stash = [], False
    for algorithm, row in rows.items():
        saved = formats.upgrade(
            algorithms[algorithm], model_slot=model, buffers=buffers, what=f'the saved {algorithm} state'
        )
        has_stash |= formats.STASH in saved
        averages += [_average(algorithm, row, saved, label, model) for label in saved['averages']]
    return Description(
        path=str(path),
        num_bytes=path.stat().st_size,
        run_name=state.get('run_name'),
        trained=_trained(state),
        versions=_versions(state),
        model_slot=_model_slot(state, rows, has_stash),
        has_stash=has_stash,
        averages=averages,
        tensors=[] if averages else [_info(name, tensor, UNTRACKED) for name, tensor in model.items()],
        optimizers=list(_mapping(state, 'optimizers', optional=True)),
        schedulers=list(_mapping(state, 'schedulers', optional=True)),
        algorithms=list(algorithms),
        callbacks=list(_mapping(state, 'callbacks', optional=True)),
    )


def _describe_foreign(path: Path, found: Foreign) -> Description:
    """An average of another library, of which nothing but the average is read."""
    weights = found.weights
    named = weights if isinstance(weights, Mapping) else {str(i): tensor for i, tensor in enumerate(weights)}
    average = AverageInfo(
        algorithm=found.source,
        written_as=found.source if found.has_names else f'{found.source}, which numbers the parameters',
        is_started=found.num_updates != 0,
        config={} if found.smoothing is None else {'smoothing': found.smoothing},
        num_updates=found.num_updates,
        last_update=None,
        relative_distance=None,
        tensors=[_info(name, None, OF_AVERAGE, tensor) for name, tensor in named.items()],
    )
    size = path.stat().st_size
    return Description(str(path), size, None, {}, {}, NOT_READ, has_stash=False, averages=[average], tensors=[])


def _model_slot(state: Mapping[str, Any], rows: Mapping[str, Format], has_stash: bool) -> str:
    if has_stash:
        return AVERAGE
    # Saved without the algorithms, as for inference, it may be either.
    is_told = 'algorithms' in state and all(row.tells_slot for row in rows.values())
    return TRAINING_WEIGHTS if is_told else UNKNOWN


def _average(algorithm: str, row: Format, saved: Mapping[str, Any], label: str, model: Tensors) -> AverageInfo:
    average = saved['averages'][label]
    training = {**model, **saved.get(formats.STASH, {})}
    parameters, buffers, aliases = average['parameters'], average['buffers'], average['aliases']
    tensors, distances = [], []
    for name in dict.fromkeys([*model, *parameters, *buffers]):
        averaged = {**parameters, **buffers}.get(aliases.get(name, name))
        role = ALIAS if name in aliases else PARAMETER if name in parameters else UNTRACKED
        if name in buffers:
            role = COPY if row.copies_whole_buffers and _is_copied(buffers[name], saved['config']) else BUFFER
        norms = _norms(averaged, training.get(name))
        if role == PARAMETER and norms is not None:
            distances.append(norms)
        tensors.append(_info(name, model.get(name), role, averaged, norms))
    return AverageInfo(
        algorithm=algorithm,
        written_as=row.written_as,
        is_started=saved['started'],
        config=dict(saved['config']),
        num_updates=average['num_updates'] if row.counts_updates else None,
        last_update=average['last_update'],
        relative_distance=_ratio(*(math.hypot(*each) for each in zip(*distances, strict=True))) if distances else None,
        tensors=tensors,
        label=label,
    )


def _is_copied(buffer: Tensor, config: Mapping[str, Any]) -> bool:
    return not buffer.dtype.is_floating_point or config.get('buffers') == 'copy'


def _info(
    name: str,
    tensor: Tensor | None,
    role: str,
    average: Tensor | None = None,
    norms: tuple[float, float] | None = None,
) -> TensorInfo:
    some = tensor if tensor is not None else average
    assert some is not None
    return TensorInfo(
        name=name,
        shape=tuple(some.shape),
        dtype=None if tensor is None else _name_of(tensor.dtype),
        num_bytes=0 if tensor is None else tensor.nbytes,
        role=role,
        average_dtype=None if average is None else _name_of(average.dtype),
        # A tied tensor is averaged once.
        average_bytes=0 if average is None or role == ALIAS else average.nbytes,
        relative_distance=None if norms is None else _ratio(*norms),
    )


def _norms(average: Tensor | None, training: Tensor | None) -> tuple[float, float] | None:
    """Norms of average minus training weights and of the training weights; None for what has no distance."""
    if average is None or training is None or average.shape != training.shape or not average.dtype.is_floating_point:
        return None
    wide = training.to(average.dtype)
    difference, size = (torch.linalg.vector_norm(each, dtype=torch.float64) for each in (average - wide, wide))
    return difference.item(), size.item()


def _ratio(distance: float, size: float) -> float:
    return 0.0 if distance == 0 else distance / size if size > 0 else math.inf


def _trained(state: Mapping[str, Any]) -> dict[str, int]:
    timestamp = _mapping(_mapping(state, 'timestamp', optional=True), 'Timestamp', optional=True)
    return {
        unit: timestamp[unit] for unit in ('epoch', 'batch', 'sample', 'token') if isinstance(timestamp.get(unit), int)
    }


def _versions(state: Mapping[str, Any]) -> dict[str, str]:
    metadata = _mapping(state, 'metadata', optional=True)
    composer = _mapping(metadata, 'composer_env_info', optional=True).get('composer_version')
    found = {'composer': composer, 'torch': metadata.get('torch_version')}
    return {name: str(version) for name, version in found.items() if version is not None}


def _mapping(of: Mapping[str, Any], key: str, *, optional: bool = False) -> Mapping[str, Any]:
    value = of.get(key, {} if optional else None)
    if value is None and optional:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f'its {key!r} is a {type(value).__name__}.')
    return value


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')
