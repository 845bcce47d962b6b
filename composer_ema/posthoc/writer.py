"""Writes the snapshots of a run: when they are due, under which identity, and packed at the end."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from composer_ema.averages import Moment
from composer_ema.files import readable
from composer_ema.posthoc.snapshot_files import WEIGHTS, Header, Identity, checked_clock, files_in
from composer_ema.posthoc.snapshot_folder import Folder, Tensors
from composer_ema.posthoc.updates import Updates
from composer_ema.spans import CLOCK_UNITS, ArgumentError, Span
from composer_ema.wording import counted

_RUN_NAME, _RUN_ID, _UPDATES, _WRITTEN = 'run_name', 'run_id', 'updates', 'last_written'
# Fractions of epochs come with rounding errors.
_SAME_TIME = 1e-9


@dataclass(frozen=True)
class Spacing:
    """When the files of a run are due: evenly apart, and closer towards its end.

    Args:
        every: time between two files, above 0, in a unit of the clock.
        end: of the run in that unit; None where it is not known.
        halvings: how many more files halve what is left of the run after the last but one: half an interval before the
            end, a quarter, an eighth, and so on.

    Example:
        >>> spacing = Spacing(Span(10, 'ba'), end=100, halvings=2)
        >>> [batch for batch in range(100) if spacing.is_due({'ba': batch}, {'ba': batch + 1})]
        [9, 19, 29, 39, 49, 59, 69, 79, 89, 94, 97, 99]
    """

    every: Span
    end: float | None = None
    halvings: int = 0

    def is_due(self, since: Mapping[str, float], now: Mapping[str, float]) -> bool:
        """Whether the time of a file lies after ``since`` and not after ``now``."""
        unit = self.every.unit
        earlier, later = since[unit], now[unit]
        return self._passed(later) > self._passed(earlier)

    def count(self) -> int | None:
        """How many files there will be in a whole run; None where its end is not known."""
        return None if self.end is None else max(1, self._passed(self.end))

    def _passed(self, time: float) -> int:
        """How many due times there are up to ``time``."""
        passed = math.floor(time / self.every.value + _SAME_TIME)
        if self.end is not None:
            passed += sum(
                self.end - self.every.value / 2**each <= time + _SAME_TIME * self.end
                for each in range(1, self.halvings + 1)
            )
        return passed


#: How often the last interval is halved by default, where the end of the run is known.
HALVINGS = 5


def spacing_of(every: Span, max_duration: Span | None, halvings: int | None) -> Spacing:
    """When files are due in a run.

    Args:
        every: time between two files, maybe a share of the run.
        max_duration: of the run; None where it is not known.
        halvings: see :class:`Spacing`. None chooses :data:`HALVINGS` where the end is known in the unit of ``every``.

    Raises:
        ArgumentError: a share of a run of unknown length, or an end to come closer to that is not known in the unit.
    """
    if every.unit == 'dur':
        if max_duration is None:
            raise ArgumentError(
                f"snapshots every {every} is a share of the run, whose length is not known. Give it, or pass '100ba'.",
                'snapshots',
            )
        every = Span(every.value * max_duration.value, max_duration.unit)
    end = max_duration.value if max_duration is not None and max_duration.unit == every.unit else None
    if halvings and end is None:
        raise ArgumentError(
            f'halvings={halvings} needs the length of the run in {every.unit}, the unit of every={every}. Pass '
            "every='0.05dur', or leave halvings out.",
            'snapshots',
        )
    return Spacing(every, end, (HALVINGS if end is not None else 0) if halvings is None else halvings)


class SnapshotWriter:
    """Writes the snapshots of one run.

    The order of calls is :meth:`begin`, then for each update :meth:`record` and, if :meth:`is_due`, :meth:`write`, and
    :meth:`finish`. A resumed run loads its state before it begins. Every process keeps a writer and makes the same
    calls, whichever of them writes the files.

    Args:
        folder: for the files, and who writes them.
        run_name: for people; a loaded state brings its own.
        profiles: description of each average's profile by label.
    """

    def __init__(self, folder: Folder, run_name: str, profiles: Mapping[str, str]) -> None:
        self._folder = folder
        self.identity = Identity(run_name, secrets.token_hex(8))  # draws from no generator of the training
        self.updates = Updates(profiles)
        self.max_duration: str | None = None
        self._last_update: dict[str, float] | None = None
        self._last_written: dict[str, float] | None = None
        self._spacing: Spacing | None = None
        self._is_clear = True

    # The run

    def begin(
        self,
        spacing: Spacing,
        now: Mapping[str, float],
        *,
        max_duration: str | None = None,
        overwrite: bool = False,
        may_restart: bool = False,
    ) -> None:
        """Checks that the folder is fit for the run. The first update then removes what lies after ``now``.

        Nothing is removed before that update, because something else may still stop the run, such as a checkpoint
        that is in its way.

        Args:
            spacing: when files are due.
            now: the clock of the run, which a resumed one goes on from.
            max_duration: of the run, for those who read the files.
            overwrite: whether files of other runs may be removed.
            may_restart: whether those of an unfinished run of the same name may be, since it left no checkpoint that
                this one could have resumed from.

        Raises:
            ArgumentError: the folder holds the snapshots of another run. Nothing is changed.
        """
        self._spacing, self.max_duration = spacing, max_duration
        self.identity = self._folder.prepare(self.identity, now, overwrite=overwrite, may_restart=may_restart)
        self._is_clear = False

    def _clear_folder(self) -> None:
        """Makes the folder fit for the run, at its first update."""
        if not self._is_clear:
            self._folder.clear(self.identity, self.updates)
            self._is_clear = True

    def record(self, clock: Mapping[str, float], made: Mapping[str, tuple[float, Moment | None]]) -> None:
        """Records an update of every average; see :meth:`composer_ema.posthoc.updates.Updates.append`."""
        self._clear_folder()
        self.updates.append(clock, made)
        self._last_update = dict(clock)

    def is_due(self) -> bool:
        """Whether a file is due at the last update: the first one, whose weights are kept, or one of the spacing."""
        assert self._spacing is not None, 'begin() comes first'
        if self._last_update is None:
            return False
        if self._last_written is None:
            return True
        return self._spacing.is_due(self._last_written, self._last_update)

    def write(self, averages: Mapping[str, Tensors], weights: Tensors, facts: Mapping[str, Any]) -> None:
        """Writes what is due at the last update: the averages, or for the first one the weights, of which all begin.

        Args:
            averages: label to the averaged tensors by canonical name.
            weights: the tensors of the model's state dict by canonical name, with the training weights.
            facts: further fields of the :class:`~composer_ema.posthoc.snapshot_files.Header`.
        """
        assert self._last_update is not None, 'record() comes first'
        if self._last_written is None:
            header = self._header(self._last_update, facts, holds_weights=True)
            self._folder.write(header, {WEIGHTS: weights})
        if len(self.updates) > 1:
            header = self._header(self._last_update, facts)
            self._folder.write(header, averages)
        self._last_written = self._last_update

    def finish(
        self, now: Mapping[str, float], averages: Mapping[str, Tensors], weights: Tensors, facts: Mapping[str, Any]
    ) -> None:
        """Writes the last averages and the last weights, then packs every file that is still in full.

        Args:
            now: the clock at the end of the run.
            averages, weights, facts: as for :meth:`write`.
        """
        if self._last_update is None:
            return
        self._clear_folder()
        if self._last_written != self._last_update:
            self.write(averages, weights, facts)
        is_update = self._last_update['ba'] == now['ba']
        header = self._header(now, facts, holds_weights=True, is_update=is_update, is_last=True)
        self._folder.write(header, {WEIGHTS: weights})
        self._folder.pack(header)

    def _header(self, clock: Mapping[str, float], facts: Mapping[str, Any], **kinds: bool) -> Header:
        times = {unit: clock.get(unit, 0) for unit in CLOCK_UNITS}
        return Header(self.identity, self.updates, times, self.max_duration, **kinds, **facts)

    # Disk use

    def announcement(self, spacing: Spacing, bytes_of_averages: int, bytes_of_weights: int) -> str:
        """How much disk the snapshots of the run will take, in a sentence.

        Args:
            spacing: when files are due.
            bytes_of_averages: of the averages of one moment.
            bytes_of_weights: of the training weights.
        """
        count, size = spacing.count(), readable(bytes_of_averages)
        if count is None:
            return f'snapshots: a file of {size} every {spacing.every} in {self._folder.path}'
        whole = count * bytes_of_averages + 2 * bytes_of_weights
        packed = whole // 2 + bytes_of_weights // 2
        return (
            f'snapshots: {counted(count, "file")} of {size} and the first and the last weights in {self._folder.path}: '
            f'{readable(whole)} at the end of the run, then packed into about {readable(packed)}'
        )

    def disk_use(self) -> str:
        """What the folder takes now, in a sentence."""
        folder = self._folder.path
        files = files_in(folder)
        total = sum(path.stat().st_size for path in files)
        return f'snapshots: {counted(len(files), "file")} of {readable(total)} in {folder}'

    def lost(self) -> list[str]:
        """The names of files that this process has written and somebody has removed."""
        return self._folder.lost()

    # State

    def state_dict(self) -> dict[str, Any]:
        """The identity and the updates in plain types, for the run's checkpoints."""
        return {
            _RUN_NAME: self.identity.run_name,
            _RUN_ID: self.identity.run_id,
            _UPDATES: self.updates.as_plain(),
            _WRITTEN: None if self._last_written is None else dict(self._last_written),
            'last_update': None if self._last_update is None else dict(self._last_update),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the run that :meth:`state_dict` is of. Averages that are new here join.

        Raises:
            ValueError: it is no such state. Nothing is changed.
        """
        try:
            identity = Identity(str(state[_RUN_NAME]), str(state[_RUN_ID]))
            updates = Updates.of_plain(state[_UPDATES], 'the saved state of the snapshots')
            clocks = (state[_WRITTEN], state['last_update'])
            written, last = (None if clock is None else checked_clock(clock) for clock in clocks)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'the saved state of the snapshots is damaged: {error!r}. Nothing was loaded.') from error
        updates.set_profiles(self.updates.profiles)
        self.identity, self.updates = identity, updates
        self._last_written, self._last_update = written, last


def run_id_of(state: Mapping[str, Any]) -> str:
    """The identity of the run in a state of :class:`SnapshotWriter`."""
    return str(state[_RUN_ID])
