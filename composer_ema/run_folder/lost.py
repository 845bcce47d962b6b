"""Checkpoints that somebody removes while the run trains: noticed, and said at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from composer import State
from composer.callbacks import CheckpointSaver

from composer_ema.model.names import listed
from composer_ema.wording import counted


class LostCheckpoints:
    """Checkpoints of a run that are no longer there."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def before_rotation(self, state: State) -> None:
        """Keeps Composer from removing a checkpoint a second time. Call it before its saver saves.

        With ``num_checkpoints_to_keep`` the saver removes its oldest one, and fails if that is gone (Composer 0.32.1).
        """
        for saver in savers(state):
            if saver.num_checkpoints_to_keep >= 0:  # else there may be thousands, and the saver removes none
                self._look(saver)

    def in_words(self, state: State) -> str | None:
        """Which checkpoints of this run somebody has removed; None where they are all there."""
        for saver in savers(state):
            self._look(saver)
        return f'{counted(len(self._names), "checkpoint")} ({listed(self._names)})' if self._names else None

    def _look(self, saver: CheckpointSaver) -> None:
        gone = [path for path in saver.saved_checkpoints if not os.path.exists(path)]
        if gone:
            self._names += [Path(path).name for path in gone]
            saver.saved_checkpoints = [path for path in saver.saved_checkpoints if path not in gone]


def savers(state: State) -> Iterator[CheckpointSaver]:
    """What writes the checkpoints of a run."""
    return (callback for callback in state.callbacks if isinstance(callback, CheckpointSaver))
