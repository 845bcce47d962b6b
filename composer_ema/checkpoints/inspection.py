"""Describes what a checkpoint holds: whose weights, which averages, how far training had come. Executes nothing."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composer_ema.checkpoints import formats, others, search, states
from composer_ema.checkpoints.formats import Format
from composer_ema.checkpoints.lazy_tensor import in_memory, is_dense
from composer_ema.checkpoints.opening import UNKNOWN_CONTENT, checkpoint_of, files_of, is_safetensors, read_file
from composer_ema.checkpoints.others import Found
from composer_ema.checkpoints.reading import (
    CheckpointError,
    algorithms_of,
    check_texts,
    is_of_composer,
    mapping_in,
    run_name_of,
    trained,
)
from composer_ema.checkpoints.weights_folder import files_of_weights
from composer_ema.model.wrappers import canonical_name

TRAINING_WEIGHTS, AVERAGE, UNKNOWN, NOT_READ = 'training weights', 'average', 'weights', 'not read'
SAME, ABSENT = 'equal to the average', 'absent'
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
        label: What the algorithm calls the average; None where there is no algorithm.
        key: Where it stands in a file that Composer did not write, as ``load_average(key=...)`` takes it; None for the
            whole file, and in Composer's checkpoints.
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
    key: str | None = None


@dataclass(frozen=True)
class Description:
    """What a checkpoint holds.

    Args:
        path: The file, or the folder of a sharded checkpoint.
        num_bytes: Its size.
        run_name: The run that saved it; None where it does not say.
        trained: How far training had come: ``{'epoch': 2, 'batch': 936, 'sample': ..., 'token': ...}``.
        versions: Of Composer and torch that saved it.
        model_slot: Whose weights the model's place holds: :data:`TRAINING_WEIGHTS`, :data:`AVERAGE`, :data:`UNKNOWN`
            where only the run that saved it could tell, or :data:`NOT_READ` for a file of another library. In the file
            of a script, :data:`SAME` where they equal the average bit for bit, or :data:`ABSENT`.
        has_stash: Whether a model held an average when it was saved, so that the training weights lie beside it.
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


def describe(checkpoint: str | os.PathLike[str], *, key: str | None = None) -> Description:
    """Reads what a checkpoint holds, without a model and without executing anything in the file.

    Reads Composer's checkpoints with the states of :class:`composer_ema.EMA`, of :class:`composer_ema.SWA` and of
    Composer's built-in algorithms of these names, whichever weights their model slot holds; Composer's checkpoints
    without an average; and all else that :func:`composer_ema.load_average` reads. Every average in a file is described.

    Args:
        checkpoint: a file that one of them saved, or the folder of a sharded checkpoint.
        key: as for :func:`composer_ema.load_average`.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or would run code.
        TypeError: an argument has the wrong type.

    Example:
        .. code:: python

            found = describe('runs/fashion_mnist/checkpoints/latest-rank0.pt')
            print(found.model_slot, found.averages[0].relative_distance)
    """
    path = checkpoint_of(checkpoint, 'checkpoint')
    check_texts(key=key)
    held = read_file(path)
    try:
        if key is not None or not is_of_composer(held):
            if key is None and _is_of_weights_alone(path, held):
                return _describe_weights(path, held)
            return _describe_others(path, others.find(held, key))
        described = _describe(path, held['state'])
        if described.averages or not search.averages(held):
            return described
        elsewhere = _describe_others(path, others.find(held))
        return dataclasses.replace(described, averages=elsewhere.averages, tensors=[])
    except CheckpointError:
        raise
    # The file is sound, so something that we do not know wrote what it holds.
    except UNKNOWN_CONTENT as error:
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
    model = {canonical_name(name): tensor for name, tensor in _tensors(mapping_in(state, 'model')).items()}
    algorithms = algorithms_of(state)
    rows = formats.find(algorithms)
    buffers = {name for name in model if name.rpartition('.')[2] in _NAMES_OF_BUFFERS}
    averages, stashes = [], {}
    for algorithm, row in rows.items():
        saved = formats.upgrade(
            algorithms[algorithm], model_slot=model, buffers=buffers, what=f'the saved {algorithm} state'
        )
        stashes |= saved.get(formats.STASH, {})
        averages += [_average(algorithm, row, saved, label, model) for label in saved['averages']]
    return Description(
        path=str(path),
        num_bytes=_bytes_of(path),
        run_name=run_name_of(state),
        trained=trained(state),
        versions=_versions(state),
        model_slot=_model_slot(state, rows, stashes, model),
        has_stash=bool(stashes),
        averages=averages,
        tensors=[] if averages else [_info(name, tensor, UNTRACKED) for name, tensor in model.items()],
        optimizers=list(map(str, mapping_in(state, 'optimizers', optional=True))),
        schedulers=list(map(str, mapping_in(state, 'schedulers', optional=True))),
        algorithms=list(algorithms),
        callbacks=list(map(str, mapping_in(state, 'callbacks', optional=True))),
    )


def _describe_others(path: Path, found: Sequence[Found]) -> Description:
    """Averages that Composer did not write, and of the rest of the file the model's weights beside them."""
    first = found[0]
    stash = first.average.stash or {}
    if first.foreign is not None:
        slot = NOT_READ
    elif not first.model_slot or not first.average.has_names:
        slot = ABSENT if not first.model_slot else UNKNOWN
    else:
        slot = _slot_of_script(first)
    size = _bytes_of(path)
    averages = [_average_of_others(each) for each in found]
    return Description(str(path), size, None, {}, {}, slot, has_stash=bool(stash), averages=averages, tensors=[])


# Who saves the training weights as the model's, and the average beside them.
_OURS = ('EMAOptimizer', 'ShadowModel', 'WeightAverage')


def _slot_of_script(found: Found) -> str:
    model, average = _tensors(found.model_slot), found.average
    if average.stash and not _is_in(average.stash, model):
        return AVERAGE
    if not average.stash and _is_in(average.parameters, model):
        return SAME
    return TRAINING_WEIGHTS if average.source in _OURS else UNKNOWN


def _is_of_weights_alone(path: Path, held: Any) -> bool:
    """Whether a file or a folder of safetensors has weights of which nothing says what they are."""
    is_read_so = is_safetensors(path) or (bool(files_of_weights(path)) and search.is_weights(held))
    return is_read_so and states.exported_with(held) is None


def _describe_weights(path: Path, held: Tensors) -> Description:
    """Safetensors that we did not export."""
    tensors = [_info(name, tensor, UNTRACKED) for name, tensor in held.items()]
    size = _bytes_of(path)
    return Description(str(path), size, None, {}, {}, UNKNOWN, has_stash=False, averages=[], tensors=tensors)


def _average_of_others(found: Found) -> AverageInfo:
    average = found.average
    model = _tensors(found.model_slot) if average.has_names else {}
    averaged, stash = _tensors(average.tensors), average.stash or {}
    roles = dict.fromkeys(averaged, OF_AVERAGE)
    if average.source in _TELLS_ROLES or average.label is not None:
        roles = dict.fromkeys(average.parameters, PARAMETER)
        roles |= {n: COPY if _is_copied(n, b, average.config) else BUFFER for n, b in average.buffers.items()}
    roles |= dict.fromkeys(average.aliases, ALIAS)
    tensors, distances = [], []
    for name in dict.fromkeys([*model, *averaged]):
        tensor, role = averaged.get(name), roles.get(name, UNTRACKED)
        norms = _norms(tensor, {**model, **stash}.get(name))
        is_parameter = role == PARAMETER or (role == OF_AVERAGE and name.rpartition('.')[2] not in _NAMES_OF_BUFFERS)
        if norms is not None and is_parameter:
            distances.append(norms)
        tensors.append(_info(name, model.get(name), role, tensor, norms))
    return AverageInfo(
        algorithm=average.source,
        written_as=average.written_as,
        is_started=average.num_updates != 0,
        config=dict(average.config),
        num_updates=average.num_updates,
        last_update=average.last_update,
        relative_distance=_overall(distances),
        tensors=tensors,
        label=average.label,
        key=found.key or None,
    )


# What keeps parameters and buffers apart.
_TELLS_ROLES = ('EMAOptimizer', 'ShadowModel')


def _model_slot(state: Mapping[str, Any], rows: Mapping[str, Format], stash: Tensors, model: Tensors) -> str:
    if stash:
        # A run that was asked for its state while a model held the average may still have saved the training weights.
        return TRAINING_WEIGHTS if _is_in(stash, model) else AVERAGE
    # Saved without the algorithms, as for inference, it may be either.
    is_told = 'algorithms' in state and all(row.tells_slot for row in rows.values())
    return TRAINING_WEIGHTS if is_told else UNKNOWN


def _is_in(tensors: Tensors, model: Tensors) -> bool:
    """Whether ``model`` has these tensors, bit for bit in its own dtypes, as far as it has their names."""
    shared = [(tensor, model[name]) for name, tensor in tensors.items() if name in model]
    dense = [(one, other) for one, other in shared if is_dense(one) and is_dense(other)]
    pairs = ((in_memory(one), in_memory(other)) for one, other in dense)
    return bool(dense) and all(_is_same(_computable(one.to(other.dtype)), _computable(other)) for one, other in pairs)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal; a NaN equals a NaN, or a run that diverged would hold neither."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


def _average(algorithm: str, row: Format, saved: Mapping[str, Any], label: str, model: Tensors) -> AverageInfo:
    average = saved['averages'][label]
    training = {**model, **saved.get(formats.STASH, {})}
    parameters, buffers, aliases = average['parameters'], average['buffers'], average['aliases']
    aliases = {**states.tied(model, {*parameters, *buffers, *aliases}), **aliases}
    tensors, distances = [], []
    for name in dict.fromkeys([*model, *parameters, *buffers]):
        averaged = {**parameters, **buffers}.get(aliases.get(name, name))
        role = ALIAS if name in aliases else PARAMETER if name in parameters else UNTRACKED
        if name in buffers:
            role = COPY if row.copies_whole_buffers and _is_copied(name, buffers[name], saved['config']) else BUFFER
        norms = _norms(averaged, training.get(name))
        if role == PARAMETER and norms is not None:
            distances.append(norms)
        tensors.append(_info(name, model.get(name), role, averaged, norms))
    return AverageInfo(
        algorithm=algorithm,
        written_as=row.written_as,
        is_started=saved['started'],
        config=formats.config_in(saved, label),
        num_updates=average['num_updates'] if row.counts_updates else None,
        last_update=average['last_update'],
        relative_distance=_overall(distances),
        tensors=tensors,
        label=label,
    )


def _overall(distances: Sequence[tuple[float, float]]) -> float | None:
    return _ratio(*(math.hypot(*each) for each in zip(*distances, strict=True))) if distances else None


def _is_copied(name: str, buffer: Tensor, config: Mapping[str, Any]) -> bool:
    """Whether a buffer is copied, as far as its name tells: a file does not say the types of the layers.

    The patterns of a mapping are not evaluated, since a file could bring one that takes for ever.
    """
    if not buffer.dtype.is_floating_point or config.get('buffers') == 'copy':
        return True
    is_statistic = name.rpartition('.')[2] in ('running_mean', 'running_var')
    return config.get('buffers') != 'average' and not is_statistic


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
        dtype=None if tensor is None else _name_of(tensor),
        num_bytes=0 if tensor is None else _size(tensor),
        role=role,
        average_dtype=None if average is None else _name_of(average),
        # A tied tensor is averaged once.
        average_bytes=0 if average is None or role == ALIAS else _size(average),
        relative_distance=None if norms is None else _ratio(*norms),
    )


def _norms(average: Tensor | None, training: Tensor | None) -> tuple[float, float] | None:
    """Norms of average minus training weights and of the training weights; None for what has no distance."""
    if average is None or training is None or average.shape != training.shape or not average.dtype.is_floating_point:
        return None
    if not is_dense(average) or not is_dense(training):
        return None
    average, training = in_memory(average), in_memory(training)
    average, wide = _computable(average), _computable(training.to(average.dtype))
    difference, size = (torch.linalg.vector_norm(each, dtype=torch.float64) for each in (average - wide, wide))
    return difference.item(), size.item()


def _computable(tensor: Tensor) -> Tensor:
    """The tensor in a dtype that torch computes in, which those of 8 bits are not."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


def _ratio(distance: float, size: float) -> float:
    return 0.0 if distance == 0 else distance / size if size > 0 else math.inf


def _bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in files_of(path))


def _versions(state: Mapping[str, Any]) -> dict[str, str]:
    metadata = mapping_in(state, 'metadata', optional=True)
    composer = mapping_in(metadata, 'composer_env_info', optional=True).get('composer_version')
    found = {'composer': composer, 'torch': metadata.get('torch_version')}
    return {name: str(version) for name, version in found.items() if version is not None}


def _tensors(of: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in of.items() if isinstance(value, Tensor)}


def _size(tensor: Tensor) -> int:
    """Bytes of the values and, where a tensor is sparse, of the indices."""
    return sum(part.nbytes for part in _parts(tensor))


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)


def _name_of(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix('torch.')
    return dtype if tensor.layout is torch.strided else f'{dtype} {str(tensor.layout).removeprefix("torch.")}'
