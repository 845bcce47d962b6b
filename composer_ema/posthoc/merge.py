"""Merges checkpoints: one file with the weighted sum of the weights in several.

Invariant: of the checkpoints no more than a group of tensors is in memory, whatever their number; the merge is whole.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composer_ema import plain
from composer_ema.checkpoints.lazy import TRAINING_WEIGHTS, UNITS, LazyWeights, open_weights
from composer_ema.checkpoints.opening import checkpoint_of, path_of
from composer_ema.checkpoints.reading import CheckpointError, check_texts
from composer_ema.checkpoints.writing import refuse_overwriting, write_weights
from composer_ema.model.names import listed
from composer_ema.posthoc import coefficients, shares
from composer_ema.posthoc.snapshot_files import is_snapshot
from composer_ema.spans import NOUNS, ArgumentError, Span
from composer_ema.version import __version__
from composer_ema.wording import counted, shown, suggestion

# Bytes of each file that are worked on at a time.
_AT_ONCE = 64 * 2**20
# Beyond this, coefficients that the user typed do not sum to 1.
_ROUNDING = 1e-9
_MEAN, _VARIANCE = 'running_mean', 'running_var'


@dataclass(frozen=True)
class Part:
    """A checkpoint in a merge.

    Attributes:
        path: the file.
        coefficient: what its weights were multiplied with.
        trained: how far training had come, by unit, as far as the file or ``times=`` tells.
        run_name: the run that wrote it; None where it does not tell.
    """

    path: Path
    coefficient: float
    trained: dict[str, float]
    run_name: str | None


@dataclass(frozen=True)
class Merged:
    """What :func:`merge` wrote.

    Attributes:
        out: the file.
        parts: what it was merged from, in the order of their training times.
        weights: what the coefficients follow, in words.
        metadata: what was written with the tensors.
        batchnorm: names of BatchNorm layers, whose merged statistics fit the merged weights badly:
            :func:`composer_ema.update_bn` computes those that fit.
    """

    out: Path
    parts: tuple[Part, ...]
    weights: str
    metadata: dict[str, str]
    batchnorm: tuple[str, ...]


def merge(
    checkpoints: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    equal: bool = False,
    half_life: str | Span | None = None,
    schedule: str | None = None,
    weights: Sequence[float] | None = None,
    times: Sequence[float] | None = None,
    average: str | None = None,
    key: str | None = None,
    overwrite: bool = False,
) -> Merged:
    r"""Writes the weighted sum of the weights in several checkpoints to ``out``::

        merged = sum_m c_m weights_m,    sum_m c_m = 1

    One of ``equal``, ``half_life``, ``schedule`` and ``weights`` says how ``c`` is chosen. Products and sums are
    float64 and are rounded once, to float32 for weights of at most 32 bits. Each file is read once, a few tensors at a
    time. Whole numbers, and what modules keep besides tensors, are the newest checkpoint's.

    Checkpoints are ordered by their training time where all files tell it, else they are taken in the order given, the
    newest last. A file that is given twice, such as through the link ``latest-rank0.pt``, counts once.

    Args:
        checkpoints: two or more files with the same names, shapes and dtypes: checkpoints of Composer, files of
            safetensors, state dicts, and what else :func:`composer_ema.load_average` reads, sharded folders included.
        out: file to write; its folder is made if it is missing. One that ends in ``.pt``, ``.pth`` or ``.ckpt`` is a
            state dict that ``torch.load(out, weights_only=True)`` returns; any other is a safetensors file.
        equal: each checkpoint counts the same.
        half_life: an exponential average over the time of the checkpoints, as ``'500ba'``, ``'2ep'``, ``'50000sp'``,
            ``'1000000tok'``, or a share of the newest one's training time, ``'0.1dur'``. See
            :func:`composer_ema.posthoc.coefficients.halving`.
        schedule: ``'linear'``, ``'cosine'`` or ``'1-sqrt'``: what decaying the learning rate in this way from the
            first checkpoint to the last would have led to, if it had only scaled the steps. See
            :func:`composer_ema.posthoc.coefficients.decaying`.
        weights: one coefficient for each checkpoint, in the order given; they sum to 1. A negative one moves away from
            that checkpoint.
        times: training time of each checkpoint in the unit of ``half_life``, else in batches, in the order given, for
            files that do not tell it.
        average: merge the averages that are called so, such as ``'ema'``. Default: the training weights.
        key: where in each file to look; see :func:`composer_ema.load_average`.
        overwrite: whether a file at ``out`` may be replaced. One of the checkpoints is never replaced.

    Returns:
        The coefficients, and what was written with the tensors.

    Raises:
        CheckpointError: a file cannot be read; files do not fit together or do not tell what is asked for; ``out`` is
            one of the checkpoints or exists. Nothing was written.
        ArgumentError: an argument cannot have its value.
        TypeError: an argument has the wrong type.

    Example:
        .. code:: python

            merged = merge(['ep8.pt', 'ep9.pt', 'ep10.pt'], 'merged.safetensors', schedule='1-sqrt')
            print([part.coefficient for part in merged.parts])
    """
    paths, out = _paths(checkpoints), path_of(out, 'out')
    check_texts(average=average, key=key)
    equal, overwrite = plain.flag('equal', equal), plain.flag('overwrite', overwrite)
    weights, times = _numbers('weights', weights, paths), _numbers('times', times, paths)
    rule = _Rule.of(equal=equal, half_life=half_life, schedule=schedule, weights=weights)
    _check_out(paths, out, overwrite=overwrite)
    places = _distinct(paths, is_refused=weights is not None or times is not None)
    files = _in_order([_File.open(paths[place], average, key, place, times, rule.unit) for place in places], rule)
    _check_alike(files, average or key)
    merging = _Merging(files, rule.coefficients(files))
    metadata = _metadata(merging, rule)
    write_weights(merging.tensors(), metadata, 'the merge', out)
    merging.warn_of_clamped()
    parts = tuple(
        Part(file.path, float(coefficient), dict(file.trained), file.source.run_name)
        for file, coefficient in zip(files, merging.coefficients, strict=True)
    )
    return Merged(out, parts, rule.words, metadata, tuple(_batchnorm(merging.newest)))


@dataclass(frozen=True)
class _File:
    """A checkpoint, its place among those given, and its training time."""

    source: LazyWeights
    place: int
    trained: dict[str, float]

    @property
    def path(self) -> Path:
        return self.source.path

    @classmethod
    def open(
        cls, path: Path, average: str | None, key: str | None, place: int, times: Sequence[float] | None, unit: str
    ) -> _File:
        source = open_weights(path, average, key)
        if is_snapshot(source.metadata):
            raise CheckpointError(
                f'{path} is a snapshot, which may hold differences to other weights. Pass its folder to '
                'composer-ema reconstruct.'
            )
        if odd := [name for name in source.odd if _is_averaged(source.describe(name)[1])]:
            raise CheckpointError(
                f'{path} holds tensors that are sparse, quantized or nested, and dense ones alone are merged: '
                f'{listed(odd)}. Save them as dense tensors.'
            )
        # Reading the next file must not add to the memory of this one.
        source.close()
        return cls(source, place, dict(source.trained) if times is None else {unit: times[place]})


@dataclass(frozen=True)
class _Rule:
    """How coefficients are chosen.

    Args:
        words: the rule, as ``half_life=500ba``.
        unit: the training time that it counts, a key of :data:`composer_ema.checkpoints.lazy.UNITS`.
        half_life, schedule, weights: as for :func:`merge`; none where all count the same.
    """

    words: str
    unit: str = 'ba'
    half_life: Span | None = None
    schedule: str | None = None
    weights: tuple[float, ...] | None = None

    @classmethod
    def of(cls, *, equal: bool, half_life: Any, schedule: Any, weights: Any) -> _Rule:
        given = {'half_life': half_life, 'schedule': schedule, 'weights': weights}
        chosen = [name for name, value in given.items() if value is not None] + ['equal'] * bool(equal)
        if len(chosen) != 1:
            raise ArgumentError(
                'one of equal, half_life, schedule and weights says how much each checkpoint counts, got '
                f"{' and '.join(chosen) or 'none of them'}. Pass one, for example half_life='500ba'."
            )
        if half_life is not None:
            span = Span.parse(half_life, name='half_life', units=(*UNITS, 'dur'), positive=True)
            return cls(f'half_life={span}', 'ba' if span.unit == 'dur' else span.unit, half_life=span)
        if schedule is not None:
            legal = list(shares.SCHEDULES)
            if not isinstance(schedule, str) or schedule not in legal:
                remedy = suggestion(schedule, legal) if isinstance(schedule, str) else ''
                raise ArgumentError(
                    f'schedule must be one of {listed(legal)}, got {shown(schedule)}. {remedy}', 'schedule'
                )
            return cls(f'schedule={schedule}', schedule=schedule)
        if weights is not None:
            return cls('weights', weights=_checked_weights(weights))
        return cls('equal')

    @property
    def needs_times(self) -> bool:
        return self.half_life is not None or self.schedule is not None

    def coefficients(self, files: Sequence[_File]) -> list[float]:
        """One for each file, given in the order of their training times; they sum to 1."""
        if self.weights is not None:
            return [self.weights[file.place] for file in files]
        if not self.needs_times:
            return coefficients.equal(len(files)).tolist()
        times = [file.trained[self.unit] for file in files]
        batches = [file.trained['ba'] for file in files if 'ba' in file.trained]
        known = batches if len(set(batches)) == len(files) else None
        if self.half_life is None:
            assert self.schedule is not None
            return coefficients.decaying(times, shares.SCHEDULES[self.schedule]).tolist()
        span = self.half_life.value * (times[-1] if self.half_life.unit == 'dur' else 1)
        if known is None and self.unit == 'ep':
            return coefficients.halving(times, span, coefficients.finely(times)).tolist()
        return coefficients.halving(times, span, known).tolist()


def _numbers(name: str, given: Any, paths: Sequence[Path]) -> tuple[float, ...] | None:
    """An argument that gives one number for each checkpoint, or None."""
    if given is None:
        return None
    kind = 'numbers, one for each checkpoint'
    numbers = tuple(float(plain.number(f'each of {name}', each)) for each in plain.several(name, given, kind))
    if len(numbers) != len(paths):
        raise ArgumentError(
            f'{name} must be one number for each checkpoint, got {len(numbers)} for {len(paths)} checkpoints.', name
        )
    return numbers


def _checked_weights(numbers: tuple[float, ...]) -> tuple[float, ...]:
    total = math.fsum(numbers)
    if not all(map(math.isfinite, numbers)):
        raise ArgumentError(f'weights must be finite, got {list(numbers)}.', 'weights')
    if abs(total - 1) > _ROUNDING:
        remedy = f' Divided by their sum they are {",".join(repr(each / total) for each in numbers)}.' if total else ''
        raise ArgumentError(f'weights must sum to 1, got {list(numbers)}, which sum to {total:g}.{remedy}', 'weights')
    return numbers


def _paths(checkpoints: Any) -> list[Path]:
    given = plain.several('checkpoints', checkpoints, 'a list of files', 'Pass two or more.')
    paths = [checkpoint_of(each, 'each of checkpoints') for each in given]
    if len(paths) < 2:
        raise ArgumentError(f'a merge takes two or more checkpoints, got {len(paths)}. Pass more.', 'checkpoints')
    return paths


def _check_out(paths: Sequence[Path], out: Path, *, overwrite: bool) -> None:
    for path in paths:
        refuse_overwriting(path, out, 'the merge')
    if out.exists() and not overwrite:
        raise CheckpointError(
            f'{out} exists, and the merge would replace it. The file to write comes last; pass another one, or '
            'overwrite=True (--overwrite).'
        )


def _distinct(paths: Sequence[Path], *, is_refused: bool) -> list[int]:
    """Places of the files, each file once, with a warning about those that are left out."""
    first: dict[Any, int] = {}
    repeated = []
    for place, path in enumerate(paths):
        # What does not exist is reported when it is opened.
        status = path.stat() if path.exists() else None
        earlier = first.setdefault((status.st_dev, status.st_ino) if status else path, place)
        if earlier != place:
            repeated.append(f'{path} is {paths[earlier]}' if path != paths[earlier] else f'{path} comes twice')
    if repeated and is_refused:
        raise CheckpointError(f'a checkpoint counts once, but {"; ".join(repeated)}. Leave it out.')
    if len(first) < 2:
        raise CheckpointError(f'a merge takes two or more checkpoints, but {"; ".join(repeated)}. Pass more.')
    if repeated:
        warnings.warn(f'each checkpoint counts once: {"; ".join(repeated)}.', stacklevel=3)
    return list(first.values())


def _in_order(files: list[_File], rule: _Rule) -> list[_File]:
    """The files by training time where all of them tell it, else as they are."""
    units = [rule.unit, *(unit for unit in UNITS if unit != rule.unit)]
    unit = next((unit for unit in units if all(unit in file.trained for file in files)), None)
    if rule.needs_times:
        _check_times(files, rule)
    if unit is None:
        return files
    return sorted(files, key=lambda file: file.trained[unit])


def _check_times(files: Sequence[_File], rule: _Rule) -> None:
    noun = NOUNS[rule.unit]
    if silent := [str(file.path) for file in files if rule.unit not in file.trained]:
        told = sorted({unit for file in files for unit in file.trained}, key=list(UNITS).index)
        others = f' They tell {listed(told)}.' if told else ''
        raise CheckpointError(
            f'{rule.words} counts the training time in {counted(2, noun)[2:]}, which {listed(silent)} '
            f'do not tell.{others} Pass times=, the training time of each checkpoint (--times 1000,2000).'
        )
    seen: dict[float, Path] = {}
    for file in files:
        time = file.trained[rule.unit]
        if not math.isfinite(time):
            raise ArgumentError(f'times must be finite, got {time} for {file.path}.', 'times')
        if time in seen:
            raise CheckpointError(
                f'{rule.words} needs checkpoints of different training times, but {seen[time]} and {file.path} were '
                f'both taken at {noun} {time:,}. Leave one of them out, or pass equal (--equal).'
            )
        seen[time] = file.path


def _check_alike(files: Sequence[_File], asked: str | None) -> None:
    """Raises unless all files have the newest one's names, shapes and dtypes; warns of what else sets them apart."""
    newest = files[-1].source
    expected = {name: newest.describe(name) for name in newest.names}
    for file in files[:-1]:
        got = {name: file.source.describe(name) for name in file.source.names}
        differing = [
            f'{name} ({_outline(got[name])}, not {_outline(expected[name])})'
            for name in expected
            if name in got and got[name] != expected[name]
        ]
        problems = [
            f'{len(names)} {label}: {listed(names)}'
            for label, names in (
                ('missing', [name for name in expected if name not in got]),
                ('unexpected', [name for name in got if name not in expected]),
                ('of another shape or dtype', differing),
            )
            if names
        ]
        if problems:
            raise CheckpointError(
                f'{file.path} does not fit {newest.path}. {"; ".join(problems)}. Merge checkpoints of one model.'
            )
    runs = list(dict.fromkeys(file.source.run_name for file in files if file.source.run_name is not None))
    if len(runs) > 1:
        warnings.warn(
            f'the checkpoints are of {len(runs)} runs, {listed(runs)}. Weights of runs that did not start from the '
            'same trained weights usually do not merge into a good model.',
            stacklevel=3,
        )
    kinds = list(dict.fromkeys(file.source.weights for file in files))
    if asked is None and (len(kinds) > 1 or kinds != [TRAINING_WEIGHTS]):
        warnings.warn(f'some of the checkpoints hold averages alone, which are merged: {listed(kinds)}.', stacklevel=3)


def _outline(described: tuple[tuple[int, ...], torch.dtype]) -> str:
    shape, dtype = described
    return f'{shape} {str(dtype).removeprefix("torch.")}'


class _Merging:
    """The sums, a group of tensors at a time."""

    def __init__(self, files: Sequence[_File], factors: Sequence[float]) -> None:
        self._files = files
        self.coefficients = factors
        self._clamped: list[str] = []

    @property
    def newest(self) -> LazyWeights:
        return self._files[-1].source

    def tensors(self) -> dict[str, Any]:
        """All of the merge, by name."""
        merged: dict[str, Any] = {}
        for group in self._groups():
            merged |= self._summed(group)
        return {name: merged[name] for name in self.newest.names} | dict(self.newest.extra_state)

    def warn_of_clamped(self) -> None:
        """Says which variances negative coefficients took below zero."""
        if self._clamped:
            warnings.warn(
                f'negative coefficients took running variances below zero: {listed(self._clamped)}. There they are the '
                'smallest of the checkpoints. Compute them anew with update_bn(model, dataloader).',
                stacklevel=3,
            )

    def _groups(self) -> list[list[str]]:
        groups: list[list[str]] = [[]]
        size = 0
        for name in self.newest.names:
            shape, dtype = self.newest.describe(name)
            size += math.prod(shape) * dtype.itemsize
            groups[-1].append(name)
            if size >= _AT_ONCE:
                groups.append([])
                size = 0
        return [group for group in groups if group]

    def _summed(self, names: Sequence[str]) -> dict[str, Tensor]:
        averaged = [name for name in names if _is_averaged(self.newest.describe(name)[1])]
        sums: dict[str, Tensor] = {}
        smallest: dict[str, Tensor] = {}
        infinite: dict[str, Tensor] = {}  # the newest of what is infinite in every file, as a mask may be; else 0
        for file, factor in zip(self._files, self.coefficients, strict=True):
            if factor == 0:  # times 0, what is infinite in it would become NaN
                continue
            for name in averaged:
                tensor = file.source.tensor(name)
                wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
                if name not in sums:
                    infinite |= {name: wide} if bool(wide.isinf().any()) else {}
                elif name in infinite:
                    infinite[name] = torch.where(infinite[name].isinf(), wide, 0)
                sums[name] = wide * factor if name not in sums else sums[name].add_(wide, alpha=factor)
                if name.endswith(_VARIANCE) and min(self.coefficients) < 0:
                    smallest[name] = torch.minimum(smallest.get(name, wide), wide)
            file.source.close()
        for name, mask in infinite.items():
            sums[name] = torch.where(mask.isinf(), mask, sums[name])
        for name, bound in smallest.items():
            if bool((sums[name] < 0).any()):
                self._clamped.append(name)
                sums[name] = torch.where(sums[name] < 0, bound, sums[name])
        found = {name: sums[name].to(_written_as(self.newest.describe(name)[1])) for name in averaged}
        found |= {name: self.newest.tensor(name).clone() for name in names if name not in found}
        self.newest.close()
        return found


def _is_averaged(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _written_as(dtype: torch.dtype) -> torch.dtype:
    """Averages have at least 32 bits, as everywhere in this package."""
    if dtype.is_complex:
        return dtype if dtype.itemsize >= torch.complex64.itemsize else torch.complex64
    return dtype if dtype.itemsize >= torch.float32.itemsize else torch.float32


def _batchnorm(weights: LazyWeights) -> list[str]:
    """Layers with running statistics."""
    names = set(weights.names)
    layers = [name.removesuffix(_MEAN) for name in weights.names if name.rpartition('.')[2] == _MEAN]
    return [layer.rstrip('.') for layer in layers if f'{layer}{_VARIANCE}' in names]


def _metadata(merging: _Merging, rule: _Rule) -> dict[str, str]:
    newest = merging._files[-1]
    runs = {file.source.run_name for file in merging._files}
    facts = {
        'format': 'pt',
        'weights': f'merge of {counted(len(merging._files), "checkpoint")}',
        'written_by': f'composer_ema {__version__}',
        'merged_by': rule.words,
        'of': newest.source.weights,
        'checkpoints': json.dumps([file.path.name for file in merging._files]),
        'coefficients': json.dumps(list(merging.coefficients)),
        **({'run_name': newest.source.run_name} if len(runs) == 1 and newest.source.run_name else {}),
    }
    return facts | {f'trained_{UNITS[unit]}': str(count) for unit, count in newest.source.trained.items()}
