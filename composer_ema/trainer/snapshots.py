"""Snapshots of a Composer run: from the argument of EMA and the events of the run to files in a folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.callbacks import CheckpointSaver
from composer.core import State, Time
from composer.utils import dist
from composer.utils.file_helpers import format_name_with_dist
from torch import nn

from composer_ema import plain
from composer_ema.averages import Power
from composer_ema.model.names import listed
from composer_ema.posthoc.snapshot_files import SNAPSHOT_FOLDER
from composer_ema.posthoc.snapshot_folder import Folder, NoFolder, SnapshotFolder
from composer_ema.posthoc.snapshots import (
    DEFAULT_POWER,
    averages_in,
    check_contents,
    check_halvings,
    facts_of,
    folder_of,
    profiles_of,
    sizes_of,
    weights_in,
)
from composer_ema.posthoc.writer import SnapshotWriter, Spacing, run_id_of, spacing_of
from composer_ema.run.average import Averages, Kept
from composer_ema.run.clock import Look
from composer_ema.spans import UNITS, ArgumentError, Span
from composer_ema.trainer.run import ComposerRun
from composer_ema.wording import counted, shown, suggestion

log = logging.getLogger(__name__)

_CHECKPOINTS = 'checkpoints'
_KEYS = ('every', 'power', 'halvings', 'folder')


@dataclass(frozen=True)
class AskedSnapshots:
    """What the argument ``snapshots`` asks for.

    Args:
        every: time between two files, maybe a share of the run.
        power: widths of the averages to keep.
        halvings: see :class:`composer_ema.Snapshots`.
        folder: for the files; may hold ``{run_name}``, as Composer's ``save_folder``. None chooses one.
    """

    every: Span
    power: tuple[float, ...] = DEFAULT_POWER
    halvings: int | None = None
    folder: str | None = None

    @classmethod
    def of(cls, snapshots: str | Time | Mapping[str, Any] | None, *, has_function: bool) -> AskedSnapshots | None:
        """Reads a time string, or a mapping of ``every``, ``power``, ``halvings`` and ``folder``; None stays None.

        Args:
            snapshots: what the user passed.
            has_function: whether a function makes the averages of the run, beside which no other can be kept.

        Raises:
            TypeError, ArgumentError: another key, a value out of range, or a function.
        """
        if snapshots is None:
            return None
        if has_function:
            raise ArgumentError(
                'snapshots keep power averages, and avg_fn or multi_avg_fn makes every average of this algorithm. '
                'Leave one of them out.',
                'snapshots',
            )
        given = dict(snapshots) if isinstance(snapshots, Mapping) else {'every': snapshots}
        for key in given:
            if key not in _KEYS:
                remedy = suggestion(key, _KEYS, 'It takes')
                raise ArgumentError(f'snapshots takes no {shown(key)}. {remedy}', 'snapshots')
        if given.get('every') is None:
            raise ArgumentError("snapshots needs every, the time between two files: every='0.05dur'.", 'snapshots')
        every = Span.parse(given['every'], name='snapshots', positive=True)
        if every.unit == 'dur' and every.value > 1:
            raise ArgumentError(f'snapshots must come within the run, 1dur, got every {every}.', 'snapshots')
        folder = given.get('folder')
        if folder is not None:
            folder = plain.text('the folder of snapshots', folder)
        widths = DEFAULT_POWER if given.get('power') is None else given['power']
        try:
            power = tuple(profile.sigma_rel for profile in profiles_of(widths).values())
            halvings = check_halvings(given.get('halvings'))
        except TypeError as error:
            raise TypeError(f'snapshots: {error}') from error
        except ValueError as error:
            raise ArgumentError(f'snapshots: {error}', 'snapshots') from error
        return cls(every, power, halvings, folder)

    def as_plain(self) -> str | dict[str, Any]:
        """The argument in plain types, for the state of the algorithm: what differs from the defaults."""
        if self == AskedSnapshots(self.every):
            return str(self.every)
        power = list(self.power)
        return {'every': str(self.every), 'power': power, 'halvings': self.halvings, 'folder': self.folder}


class RunSnapshots:
    """Writes the snapshots of a Composer run, on rank 0, whose state is the one that checkpoints keep.

    Every rank makes every call. Of a model that ranks share, tensors are gathered at the moment of a file; see
    :class:`composer_ema.posthoc.snapshot_folder.SharedFolder`.

    Args:
        asked: what the user wants.

    Attributes:
        default_folder: where the files go if the user names no folder; None for the place of the checkpoints. A recipe
            sets it to a folder of the run.
    """

    def __init__(self, asked: AskedSnapshots) -> None:
        self.asked = asked
        self.default_folder: Path | None = None
        self._profiles: dict[str, Power] = profiles_of(asked.power)
        self._writer: SnapshotWriter | None = None
        self._loaded: Mapping[str, Any] | None = None

    @property
    def hidden(self) -> dict[str, Kept]:
        """The averages to keep, by label, beside those that the run shows."""
        return {label: (profile, None) for label, profile in self._profiles.items()}

    def forget(self) -> None:
        """Starts anew, for another run."""
        self._writer = self._loaded = None

    # Events

    def begin(self, state: State, averages: Averages) -> None:
        """Prepares the folder, and says how much disk the run will take.

        Args:
            state: when training starts.
            averages: those of the run, built.

        Raises:
            ArgumentError: no place for the files, another run's files in it, or a time that the run does not count.
        """
        problems: list[str | None] = [None]
        if self._writer is None:
            folder, spacing = self.folder_in(state), self._spacing(state)
            self._writer = self._new_writer(_folder_for(state, folder, self._shadows(averages)), state.run_name)
            if self._loaded is not None:
                self._writer.load_state_dict(self._loaded)
        else:
            spacing = self._spacing(state)
        whole = _whole(state)
        try:
            check_contents(state.model)
            self._writer.begin(
                spacing,
                ComposerRun(state).clock(),
                max_duration=None if whole is None else str(whole),
                overwrite=any(saver.overwrite for saver in _savers(state)),
                # A saver stops a run that is not resumed where there is a checkpoint.
                may_restart=bool(_savers(state)),
            )
        except ValueError as error:
            problems[0] = str(error)
        # All processes must stop together.
        dist.broadcast_object_list(problems)
        if problems[0] is not None:
            raise ArgumentError(problems[0], 'snapshots')
        if dist.get_global_rank() == 0:
            log.info('%s', self.announcement(state, averages))

    def after_update(self, look: Look, averages: Averages, model: nn.Module) -> None:
        """Records an update of the averages, and writes a file if one is due.

        Args:
            look: at the clock, at the update.
            averages: those of the run, updated.
            model: that they follow.
        """
        writer = self._writer
        if writer is None:
            return
        moves = {label: averages[label].last_move for label in self._profiles}
        writer.record(look.now, {label: (weight, at) for label, (weight, at) in moves.items() if weight is not None})
        if writer.is_due():
            writer.write(averages_in(self._shadows(averages)), weights_in(model), facts_of(model))

    def end(self, state: State, averages: Averages) -> None:
        """Writes the last averages and the last weights, and packs all files."""
        if self._writer is None:
            return
        self._writer.finish(
            ComposerRun(state).clock(),
            averages_in(self._shadows(averages)),
            weights_in(state.model),
            facts_of(state.model),
        )
        if dist.get_global_rank() == 0:
            log.info('%s', self.disk_use())

    # What it takes

    def folder_in(self, state: State) -> Path:
        """Where the files of the run go.

        Raises:
            ArgumentError: nothing says it.
        """
        if self.asked.folder is not None:
            return Path(format_name_with_dist(self.asked.folder, state.run_name))
        if self.default_folder is not None:
            return self.default_folder
        for saver in _savers(state):
            folder = Path(format_name_with_dist(saver.folder, state.run_name))
            return (folder.parent if folder.name == _CHECKPOINTS else folder) / SNAPSHOT_FOLDER
        raise ArgumentError(
            f"snapshots='{self.asked.every}' has no folder to write to, since the Trainer has no save_folder. Pass "
            f"save_folder, or snapshots={{'every': '{self.asked.every}', 'folder': 'runs/{{run_name}}/snapshots'}}.",
            'snapshots',
        )

    def announcement(self, state: State, averages: Averages) -> str:
        """How much disk the snapshots will take, in a sentence."""
        writer = self._writer
        if writer is None:
            writer = self._new_writer(SnapshotFolder(self.folder_in(state)), state.run_name)
        return writer.announcement(self._spacing(state), *sizes_of(self._shadows(averages), state.model))

    def disk_use(self) -> str | None:
        """Where the snapshots lie and what they take, in a sentence; None before training."""
        return None if self._writer is None else self._writer.disk_use()

    def is_over(self, state: State) -> bool:
        """Whether the folder holds the last files of a run that has trained to its end, all of them packed."""
        return self._loaded is None or SnapshotFolder(self.folder_in(state)).is_over(run_id_of(self._loaded))

    def lost(self) -> str | None:
        """Which files of this run somebody has removed, in words; None where they are all there."""
        names = [] if self._writer is None else self._writer.lost()
        return f'{counted(len(names), "snapshot")} ({listed(names)})' if names else None

    def _spacing(self, state: State) -> Spacing:
        return spacing_of(self.asked.every, _whole(state), self.asked.halvings)

    def _new_writer(self, folder: Folder, run_name: str) -> SnapshotWriter:
        return SnapshotWriter(folder, run_name, {label: str(profile) for label, profile in self._profiles.items()})

    def _shadows(self, averages: Averages) -> dict[str, Any]:
        return {label: averages[label].shadow for label in self._profiles}

    # State

    def state_dict(self) -> Mapping[str, Any] | None:
        """The identity of the run and its updates, in plain types; None before training."""
        return self._loaded if self._writer is None else self._writer.state_dict()

    def check(self, state: Any) -> None:
        """Raises a ValueError unless ``state`` is one of :meth:`state_dict`; None is, too."""
        if state is not None:
            self._new_writer(NoFolder(Path()), '').load_state_dict(state)

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Goes on with the run that :meth:`state_dict` is of; None is a run that wrote none so far."""
        self._writer, self._loaded = None, state


def _folder_for(state: State, path: Path, shadows: Mapping[str, Any]) -> Folder:
    found = folder_of(path, state.model, shadows.values())
    # The ranks of a Trainer train one model, also where nothing of it is trainable, so that it stands in no DDP.
    return NoFolder(path) if isinstance(found, SnapshotFolder) and dist.get_global_rank() != 0 else found


def _savers(state: State) -> list[CheckpointSaver]:
    return [callback for callback in state.callbacks if isinstance(callback, CheckpointSaver)]


def _whole(state: State) -> Span | None:
    """The length of the run; None where it is not counted, but timed."""
    end = state.max_duration
    return None if end is None or end.unit.value not in UNITS else Span(end.value, end.unit.value)
