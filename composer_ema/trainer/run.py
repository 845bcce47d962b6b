"""A Composer run as averages see it: its clock, its length and what it counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from composer.core import State, Time, Timestamp
from composer.utils import dist

from composer_ema.run.clock import START_OF_TRAINING, Clock, Look
from composer_ema.spans import Span

# The units in which Composer's timestamp counts the whole run.
_COUNTED = {'ba': 'batch', 'sp': 'sample', 'tok': 'token'}


def look_at(state: State) -> Look:
    """A look at the clock of a Composer run, now."""
    return Look(ComposerRun(state))


class ComposerRun:
    """See :class:`composer_ema.run.clock.Run`.

    Args:
        state: of the run.
    """

    __slots__ = ('_state',)

    remedies: ClassVar[Mapping[str, str]] = {
        'tok': 'the dataloader reports none. Pass samples or batches, or a DataSpec with get_num_tokens_in_batch.',
        'ep': 'the dataloader has no length. Pass batches or samples, or set train_subset_num_batches.',
        'iter': 'this run has none. Pass epochs or batches.',
        'dur': 'the run has no max_duration. Set it.',
    }

    def __init__(self, state: State) -> None:
        self._state = state

    @property
    def max_duration(self) -> Span | None:
        """The length of the run; None if it has none."""
        end = self._state.max_duration
        return None if end is None else Span(end.value, end.unit.value)

    def clock(self) -> Clock:
        """The time trained so far."""
        return self._read(self._state.timestamp)

    def clock_before(self) -> Mapping[str, float]:
        """The clock one batch, epoch or iteration ago."""
        previous = self._state.previous_timestamp
        return START_OF_TRAINING if previous is None else self._read(previous)

    def time(self, unit: str) -> float | None:
        """The time trained so far in a unit that Composer counts itself; else None."""
        counted = _COUNTED.get(unit)
        return None if counted is None else getattr(self._state.timestamp, counted).value

    def length(self, unit: str) -> float | None:
        """The length of the whole run in one unit; None if it is not known before training."""
        state = self._state
        if state.max_duration is None:
            return None
        end, end_unit = state.max_duration.value, state.max_duration.unit.value
        if end_unit == unit:
            return end
        if unit == 'iter' and (length := state._iteration_length) is not None:
            whole = self.length(length.unit.value)
            return None if whole is None else whole / length.value
        epoch_length = state.dataloader_len.value if state.dataloader_len is not None else None
        samples, tokens = self._samples_per_epoch(), self._tokens_per_sample()
        per_epoch = {'ep': 1, 'ba': epoch_length, 'sp': samples}
        if samples is not None and tokens is not None:
            per_epoch['tok'] = samples * tokens
        if per_epoch.get(unit) is None or per_epoch.get(end_unit) is None:
            return None
        return end / per_epoch[end_unit] * per_epoch[unit]

    def counts(self, unit: str) -> bool:
        """Whether the run counts a unit at all."""
        if unit == 'tok':
            now = self._state.timestamp
            return now.token.value > 0 or now.batch.value == 0
        return unit != 'iter' or self._state._iteration_length is not None

    def counts_fractions(self, unit: str) -> bool:
        """Whether the clock counts fractions of a unit."""
        if unit == 'ep':
            return self._state.dataloader_len is not None
        if unit == 'iter':
            length = self._state._iteration_length
            return length is not None and (length.unit.value == 'tok' or self._state.dataloader_len is not None)
        return True

    def _read(self, now: Timestamp) -> Clock:
        state = self._state
        epochs = now.epoch.value
        batch_in_epoch, epoch_length = now.batch_in_epoch.value, state.dataloader_len
        epoch_fraction = (
            batch_in_epoch / epoch_length.value if epoch_length is not None and epoch_length.value > 0 else 0
        )
        iterations = now.iteration.value
        iteration_length: Time | None = state._iteration_length
        if iteration_length is not None and iteration_length.value > 0:
            is_epochs = iteration_length.unit.value == 'ep'
            done = now.epoch_in_iteration.value + epoch_fraction if is_epochs else now.token_in_iteration.value
            iterations += done / iteration_length.value
        return {
            'iter': iterations,
            'ep': epochs + epoch_fraction,
            'ba': now.batch.value,
            'sp': now.sample.value,
            'tok': now.token.value,
        }

    def _samples_per_epoch(self) -> int | None:
        state = self._state
        dataset: Any = getattr(state.dataloader, 'dataset', None)
        batch_size: Any = getattr(state.dataloader, 'batch_size', None)
        if not hasattr(dataset, '__len__'):
            return None
        if (
            isinstance(batch_size, int) and state.dataloader_len is not None
        ):  # a subset, or a last batch that is dropped
            return min(len(dataset), state.dataloader_len.value * batch_size * dist.get_world_size())
        return len(dataset)

    def _tokens_per_sample(self) -> int | None:
        """Tokens in each sample, as the data set tells Composer, padding included; None where it does not."""
        tokens: Any = getattr(getattr(self._state.dataloader, 'dataset', None), 'max_seq_len', None)
        return tokens if isinstance(tokens, int) and tokens > 0 else None
