"""What the ordinary checkpoints of a run keep: training weights, and averages with the weights of their updates.

The moments are the batches of the run. Which of them updated an average follows from its settings, is simulated from
one checkpoint to the next, and must come out as the checkpoint counted it; else the average is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from composer_ema.averages import UPDATES, BiasCorrected, Moment, Profile, Smoothing
from composer_ema.checkpoints import formats
from composer_ema.checkpoints.lazy_tensor import in_memory
from composer_ema.checkpoints.opening import UNKNOWN_CONTENT, read_file
from composer_ema.checkpoints.reading import (
    CheckpointError,
    algorithms_of,
    is_of_composer,
    mapping_in,
    run_name_of,
    trained,
)
from composer_ema.checkpoints.sharded import METADATA, SUFFIX
from composer_ema.model.names import listed
from composer_ema.model.wrappers import canonical_name
from composer_ema.posthoc.moments import History, KeptAverage
from composer_ema.posthoc.snapshot_files import WEIGHTS
from composer_ema.posthoc.updates import Array
from composer_ema.profiles import of_description
from composer_ema.settings import Settings
from composer_ema.spans import CLOCK_UNITS, Span, has_crossed

_IN_RUN, _RECIPE = 'checkpoints', 'recipe.yaml'
_MAX_DURATION = re.compile(r'^max_duration:\s*[\'"]?([^\s\'"#]+)', re.MULTILINE)
_COUNTERS = {'ba': 'batch', 'sp': 'sample', 'tok': 'token'}
_STATISTICS = ('.running_mean', '.running_var')
_BUILTIN = "Composer's own"
# In these, updates after a late start came at multiples of the interval since the start of training.
_COUNT_FROM_START = ('composer_ema, version 1', 'composer_ema, version 2')


@dataclass(frozen=True)
class Ordinary:
    """What ordinary checkpoints do not say; see :func:`composer_ema.posthoc.history.read_run`."""

    half_life: str | None
    update_interval: str | None
    max_duration: str | None


@dataclass
class _Checkpoint:
    """A checkpoint, its tensors on the disk."""

    path: Path
    run_name: str
    clock: dict[str, float]
    model: dict[str, Tensor]
    averages: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    configs: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    are_builtin: set[str] = field(default_factory=set)
    count_from_start: set[str] = field(default_factory=set)

    @property
    def batch(self) -> int:
        return int(self.clock['ba'])


@dataclass
class _Course:
    """An average as it comes from checkpoint to checkpoint.

    Args:
        weights: of its updates, by batch; 0 where there was none, 1 up to the first.
        num_updates: so far.
        last_update: the clock of the last one.
        started_at: the clock from which its age counts.
        first_update: the clock from which the interval counts; None for the start of training.
        memory: what the profile remembers of earlier updates.
    """

    weights: Array
    num_updates: int = 0
    last_update: Mapping[str, float] | None = None
    started_at: Mapping[str, float] | None = None
    first_update: Mapping[str, float] | None = None
    memory: Mapping[str, float] = field(default_factory=dict)


def checkpoints_in(folder: Path) -> list[Path]:
    """The torch files and sharded checkpoints of a run folder or of a folder of checkpoints.

    Each comes once however many links lead to it. A sharded checkpoint is one, not a folder of some.
    """
    inner = folder / _IN_RUN
    root = inner if inner.is_dir() else folder
    # Also those without the index that is written last, to be named among what cannot be read.
    folders = {path.parent.resolve() for pattern in (METADATA, f'*{SUFFIX}') for path in root.rglob(pattern)}
    return sorted({path.resolve() for path in root.rglob('*.pt')} | folders)


def read_checkpoints(folder: Path, paths: Sequence[Path], given: Ordinary) -> History:
    """Reads the checkpoints of the run that wrote the newest one.

    Raises:
        CheckpointError: none can be read.
        ValueError: an argument is out of range.
    """
    left_out: list[str] = []
    found: list[_Checkpoint] = []
    for path in paths:
        try:
            found.append(_read(path))
        except CheckpointError as error:
            left_out.append(str(error))
    found = _of_one_run(found, left_out)
    if not found:
        raise CheckpointError(f'{folder} holds no checkpoint that can be read. {" ".join(left_out)}')
    max_duration = given.max_duration or _recipe_says(folder)
    clocks = _clocks(found)
    kept = [_kept(each, WEIGHTS, np.ones(each.batch), each.model) for each in found]
    for label in dict.fromkeys(label for each in found for label in each.averages):
        kept += _follow(label, found, clocks, given, max_duration, left_out)
    kept.sort(key=lambda each: len(each.weights))
    newest = found[-1]
    aliases = {alias: name for average in newest.averages.values() for alias, name in average['aliases'].items()}
    return History(
        folder=newest.path.parent,
        run_name=newest.run_name,
        run_id=None,
        clocks=clocks,
        kept=kept,
        max_duration=max_duration,
        is_finished=False,
        aliases=aliases,
        statistics=frozenset(name for name in newest.model if name.endswith(_STATISTICS)),
        newest={name: partial(in_memory, tensor) for name, tensor in newest.model.items()},
        left_out=left_out,
        copied=frozenset(_copied(newest)),
    )


def _copied(checkpoint: _Checkpoint) -> Iterator[str]:
    """Names of the buffers that averages of this package copied; Composer's own averages them all."""
    for label in checkpoint.averages.keys() - checkpoint.are_builtin:
        settings = Settings(buffers=checkpoint.configs[label].get('buffers') or 'statistics')
        for name in checkpoint.averages[label]['buffers']:
            if not settings.averages_buffer(name, is_statistic=name.endswith(_STATISTICS)):
                yield name


def _read(path: Path) -> _Checkpoint:
    try:
        held = read_file(path, mmap=True)
        if not is_of_composer(held):
            raise CheckpointError(f'{path} is no checkpoint of a Composer Trainer.')
        return _of_state(path, held['state'])
    except CheckpointError:
        raise
    # The file is sound, so something that we do not know wrote what it holds.
    except UNKNOWN_CONTENT as error:
        raise CheckpointError(f'{path} cannot be read: {error}') from error


def _of_state(path: Path, state: Mapping[str, Any]) -> _Checkpoint:
    model = {
        canonical_name(name): each for name, each in mapping_in(state, 'model').items() if isinstance(each, Tensor)
    }
    counts = trained(state)
    if not counts.get('batch'):
        raise CheckpointError(f'{path} was saved before the first batch, so it holds nothing to average.')
    clock: dict[str, float] = {unit: counts.get(name, 0) for unit, name in _COUNTERS.items()}
    timestamp = mapping_in(mapping_in(state, 'timestamp', optional=True), 'Timestamp', optional=True)
    for name in ('batch_in_epoch', 'sample_in_epoch'):
        formats.check_count(timestamp.get(name, 0), name, "its 'timestamp'")
        clock[name] = timestamp.get(name, 0)
    batch_in_epoch, epoch = clock['batch_in_epoch'], counts.get('epoch', 0)
    clock['ep'] = epoch + (batch_in_epoch / ((clock['ba'] - batch_in_epoch) / epoch) if epoch else 0)
    clock['epochs_done'] = epoch
    checkpoint = _Checkpoint(path, run_name_of(state) or '', clock, model)
    algorithms = algorithms_of(state)
    for name, row in formats.find(algorithms).items():
        upgraded = formats.upgrade(algorithms[name], model_slot=model, what=f'the saved {name} state')
        if upgraded['started']:
            checkpoint.averages |= upgraded['averages']
            checkpoint.configs |= dict.fromkeys(upgraded['averages'], upgraded['config'])
            if row.written_as in _COUNT_FROM_START:
                checkpoint.count_from_start |= upgraded['averages'].keys()
            if row.written_as.startswith(_BUILTIN):
                checkpoint.are_builtin |= upgraded['averages'].keys()
        checkpoint.model |= upgraded.get(formats.STASH, {})
    return checkpoint


def _of_one_run(found: list[_Checkpoint], left_out: list[str]) -> list[_Checkpoint]:
    """The checkpoints of the run that wrote last, one of each batch, in order."""
    if not found:
        return []
    own = max(found, key=lambda each: (each.path.stat().st_mtime, each.batch)).run_name
    by_batch: dict[int, _Checkpoint] = {}
    for each in found:
        if each.run_name != own:
            left_out.append(f'{each.path} belongs to another run: {each.run_name!r}, not {own!r}.')
        else:
            by_batch[each.batch] = each
    return [by_batch[batch] for batch in sorted(by_batch)]


def _recipe_says(folder: Path) -> str | None:
    """The max_duration of the recipe in a run folder."""
    recipe = next((each / _RECIPE for each in (folder, folder.parent) if (each / _RECIPE).is_file()), None)
    match = _MAX_DURATION.search(recipe.read_text()) if recipe is not None else None
    if match is None:
        return None
    return f'{match[1]}ep' if match[1].isdecimal() else match[1]  # as Composer reads a bare number


def _clocks(found: Sequence[_Checkpoint]) -> dict[str, Array]:
    """The time after every batch: exact at checkpoints, in proportion between them."""
    batches = np.arange(1, found[-1].batch + 1, dtype=np.float64)
    known = [0.0, *(each.clock['ba'] for each in found)]
    clocks = {
        unit: np.interp(batches, known, [0.0, *(each.clock.get(unit, 0) for each in found)]) for unit in CLOCK_UNITS
    }
    length = _epoch_length(found)
    if length is not None:
        epochs, in_epoch = np.divmod(batches, length)
        clocks['ep'] = epochs + in_epoch / length
        batch_size, epoch_size = _sizes(found, clocks['sp'], length)
        samples = epochs * epoch_size + np.minimum(in_epoch * batch_size, epoch_size)
        if all(samples[each.batch - 1] == each.clock['sp'] for each in found):
            clocks['sp'] = samples
    clocks['ba'] = batches
    return clocks


def _epoch_length(found: Sequence[_Checkpoint]) -> int | None:
    """Batches in an epoch, if all checkpoints agree on a whole number."""
    lengths = {
        (each.clock['ba'] - each.clock['batch_in_epoch']) / each.clock['epochs_done']
        for each in found
        if each.clock['epochs_done']
    }
    (length,) = lengths if len(lengths) == 1 else (0.5,)
    return int(length) if length.is_integer() and length > 0 else None


def _sizes(found: Sequence[_Checkpoint], samples: Array, length: int) -> tuple[float, float]:
    """The samples in a batch and in an epoch, whose last batch may be smaller, as far as the checkpoints tell."""
    inside = [each for each in found if 0 < each.clock['batch_in_epoch'] < length]
    batch_size = inside[-1].clock['sample_in_epoch'] / inside[-1].clock['batch_in_epoch'] if inside else 0.0
    whole = [each for each in found if each.clock['epochs_done']]
    if not whole:
        return batch_size, batch_size * length
    last = whole[-1].clock
    epoch_size = (last['sp'] - last['sample_in_epoch']) / last['epochs_done']
    return batch_size or epoch_size / length, epoch_size


def _kept(checkpoint: _Checkpoint, label: str, weights: Array, tensors: Mapping[str, Tensor]) -> KeptAverage:
    clock = {unit: checkpoint.clock.get(unit, 0) for unit in CLOCK_UNITS}
    return KeptAverage(
        label=label,
        weights=weights,
        path=checkpoint.path,
        clock=clock,
        _names=partial(sorted, tensors),
        _tensor=lambda name: in_memory(tensors[name]),
        _outline=lambda name: (tensors[name].dtype, tuple(tensors[name].shape)),
    )


def _follow(
    label: str,
    found: Sequence[_Checkpoint],
    clocks: Mapping[str, Array],
    given: Ordinary,
    max_duration: str | None,
    left_out: list[str],
) -> list[KeptAverage]:
    """The averages of one label, as far as the weights of their updates come out as the checkpoints counted them."""
    course = _Course(np.zeros(found[-1].batch))
    kept, start, problem, unused, is_before_end, had_none = [], 0, '', [], False, False
    for checkpoint in found:
        average, stop = checkpoint.averages.get(label), checkpoint.batch
        if average is None:
            course, start, had_none = _Course(course.weights), stop, True
            continue
        if not problem:
            try:
                made = _made_by(checkpoint, label, given, max_duration, clocks)
                # Saved after the last batch of an epoch, and before what the end of the epoch does.
                is_before_end = made.is_at_ends and checkpoint.clock['batch_in_epoch'] > 0
                if had_none and made.is_at_ends:
                    start -= 1  # the end of the epoch came after that checkpoint
                had_none = False
                if not course.num_updates:
                    course.started_at = average['started_at']  # later than training, where a resumed run began it
                _remember(made.profile, course)
                _simulate(course, made, start, stop - is_before_end)
                course.memory = made.profile.state_dict()
                _check(course, average, is_builtin=label in checkpoint.are_builtin)
            except _Unknown as error:
                problem = str(error)
        if problem:
            unused.append(str(checkpoint.path))
            continue
        tensors = {**average['parameters'], **average['buffers']}
        first = int(np.argmax(course.weights[:stop] > 0))
        course.weights[:first] = 1.0  # what was before the first update has no share
        weights = course.weights[:stop]
        kept.append(_kept(checkpoint, label, weights.copy() if is_before_end else weights, tensors))
        start = stop - is_before_end
    if unused:
        left_out.append(f'the average {label!r} is left out of {listed(unused, 1)}: {problem}')
    return kept


class _Unknown(ValueError):
    """The weights of an average's updates cannot be told."""


@dataclass(frozen=True)
class _Made:
    """How an average is updated.

    Args:
        profile: chooses the weights.
        length: how much one unit of the profile is in ``unit``.
        unit: of the clock, that the profile is measured in.
        start: the time before which nothing is averaged.
        interval: between two updates.
        clocks: of every batch, by unit.
        counts_from_first: whether the interval counts from a first update that is later than the start of training.
    """

    profile: Profile
    length: float
    unit: str
    start: Span
    interval: Span
    clocks: Mapping[str, Array]
    counts_from_first: bool = True

    @property
    def is_at_ends(self) -> bool:
        """Whether updates come at the ends of epochs, not of batches."""
        return self.interval.unit == 'ep' and float(self.interval.value).is_integer()

    def at(self, batch: int) -> dict[str, float]:
        """The clock after ``batch``, counted from 0."""
        return {unit: float(times[batch]) for unit, times in self.clocks.items()}


def _made_by(
    checkpoint: _Checkpoint, label: str, given: Ordinary, max_duration: str | None, clocks: Mapping[str, Array]
) -> _Made:
    if label in checkpoint.are_builtin:
        if given.half_life is None:
            raise _Unknown("Composer's own EMA does not save its half-life. Pass half_life as the run had it.")
        half_life = Span.parse(given.half_life, name='half_life', units=('ba', 'ep'), positive=True)
        interval = Span.parse(
            given.update_interval or f'1{half_life.unit}', name='update_interval', units=('ba', 'ep'), positive=True
        )
        if interval.unit != half_life.unit:
            raise ValueError(
                f'half_life and update_interval must have one unit, as in Composer, got {half_life} and {interval}.'
            )
        profile = Smoothing(2 ** -(interval.value / half_life.value))
        return _Made(profile, 1.0, UPDATES, Span(0, 'ba'), interval, clocks)
    config, average = checkpoint.configs[label], checkpoint.averages[label]
    text, written = config.get('update_interval'), config.get(f'{_algorithm_name(config, label)}_start')
    if not isinstance(text, str) or not isinstance(written, str):
        raise _Unknown('the checkpoint does not say when it was updated.')
    try:
        profile = of_description(average['profile']['description'], unit='ba')
    except ValueError as error:
        raise _Unknown(f'the weights of its updates are not known: {error}') from error
    length, unit = 1.0, profile.unit
    if unit == 'dur':
        whole = _resolved(Span(1.0, 'dur'), max_duration)
        length, unit = whole.value, whole.unit
    interval = _resolved(Span.parse(text, name='update_interval'), max_duration)
    start = _resolved(Span.parse(written, name='start'), max_duration)
    return _Made(profile, length, unit, start, interval, clocks, label not in checkpoint.count_from_start)


def _algorithm_name(config: Mapping[str, Any], label: str) -> str:
    """What the algorithm calls its averages: the prefix of its start."""
    return next((key.removesuffix('_start') for key in config if key in ('ema_start', 'swa_start')), label)


def _resolved(span: Span, max_duration: str | None) -> Span:
    if span.unit != 'dur' or span.value == 0:
        return Span(0, 'ba') if span.value == 0 else span
    if max_duration is None:
        raise _Unknown(f'{span} is a share of the run, whose length checkpoints do not say. Pass max_duration.')
    whole = Span.parse(max_duration, name='max_duration', positive=True)
    return Span(span.value * whole.value, whole.unit)


def _remember(profile: Profile, course: _Course) -> None:
    """Gives a profile its memory of earlier updates, or that of one that has forgotten its start, as a resumed run."""
    if course.memory.keys() == profile.state_dict().keys():
        profile.load_state_dict(course.memory)
    elif isinstance(profile, BiasCorrected) and course.num_updates:
        profile.log_kept = -math.inf


def _simulate(course: _Course, made: _Made, start: int, stop: int) -> None:
    """Makes the updates that the batches after ``start`` up to ``stop`` made."""
    interval, times = made.interval, made.clocks[made.interval.unit]
    starts = made.clocks[made.start.unit]
    last = None if course.last_update is None else course.last_update[interval.unit]
    for batch in range(start, stop):
        if made.is_at_ends and not float(times[batch]).is_integer():
            continue
        if course.num_updates == 0:
            is_due = starts[batch] >= made.start.value - 1e-9
        else:
            begin = 0.0 if course.first_update is None else course.first_update[interval.unit]
            is_due = last is not None and has_crossed(last - begin, times[batch] - begin, interval.value)
        if is_due:
            _update(course, made, batch)
            last = times[batch]


def _update(course: _Course, made: _Made, batch: int) -> None:
    clock = made.at(batch)
    if course.num_updates == 0 and made.start.value != 0 and made.counts_from_first:
        course.first_update = clock
    if made.unit == UPDATES:
        moment = Moment.of_update(course.num_updates)
    else:
        started = 0.0
        if made.start.value != 0 and course.started_at is None:
            span = made.interval
            share = max(0.0, 1 - span.value / clock[span.unit])
            course.started_at = {unit: time * share for unit, time in clock.items()}
        if course.started_at is not None:
            started = course.started_at[made.unit]
        now = clock[made.unit]
        last = started if course.last_update is None else course.last_update[made.unit]
        elapsed = max(now - last, 0.0)
        moment = Moment(elapsed / made.length, max(now - started, elapsed) / made.length, course.num_updates)
    course.weights[batch] = 1.0 if course.num_updates == 0 else made.profile.weight(moment)
    made.profile.record(moment)
    course.num_updates += 1
    course.last_update = clock


def _check(course: _Course, average: Mapping[str, Any], *, is_builtin: bool) -> None:
    """Raises where the checkpoint counted other updates; else goes on from what it says."""
    if is_builtin:
        return
    counted, last = average['num_updates'], average['last_update']
    if course.num_updates != counted:
        raise _Unknown(
            f'it was updated {counted} times, and by its settings {course.num_updates}. They were changed on the way, '
            'or steps were skipped.'
        )
    if last is not None:
        course.last_update = last
    for name in ('started_at', 'first_update'):
        if average[name] is not None:
            setattr(course, name, average[name])
