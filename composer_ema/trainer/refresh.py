"""BatchNorm statistics for an average, computed from the training data when a Composer run ends."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from typing import Any

from composer.core import DataSpec, Event, State, Time, get_precision_context

from composer_ema import plain
from composer_ema.batchnorm import statistics_of, unfrozen_statistics_of, update_bn
from composer_ema.model.names import listed
from composer_ema.model.wrappers import unwrap
from composer_ema.run.limits import warn
from composer_ema.shadow.shadow_model import ShadowModel
from composer_ema.spans import ArgumentError, Span
from composer_ema.trainer import calls
from composer_ema.wording import shown

log = logging.getLogger(__name__)

#: Where an update may have been the last one, and evaluators, checkpoints or nothing follow.
MAY_END = frozenset({
    Event.BATCH_END, Event.EPOCH_END, Event.ITERATION_END, Event.FIT_END,
    Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT,  # an evaluation before these may have stopped the run
})  # fmt: skip
_REFRESHED_AT = 'refreshed_at'


class Refresh:
    """Runs the training data through the model with the average in it, once, when the run ends.

    Args:
        setting: False for never, True for as many batches as an epoch has, a number of batches, or a time string in
            batches or of at most one epoch.

    Attributes:
        setting: as given; a :class:`~composer_ema.spans.Span` for a share of an epoch.

    Raises:
        TypeError, ValueError: ``setting`` is out of range.
    """

    def __init__(self, setting: bool | int | str | Time) -> None:
        self.setting = _parse(setting)
        self._refreshed_at: list[int] | None = None
        self._tried_at: list[int] | None = None

    @property
    def argument(self) -> bool | int | str:
        """The setting in plain types."""
        return str(self.setting) if isinstance(self.setting, Span) else self.setting

    def reset(self) -> None:
        """Forgets what was refreshed: another run begins."""
        self._refreshed_at = self._tried_at = None

    def check(self, shadow: ShadowModel, state: State) -> None:
        """Raises a ValueError or RuntimeError if the statistics cannot be computed in this run."""
        module = unwrap(state.model)
        if self.setting is False or not (statistics := statistics_of(module)):
            return
        tracked = {name for name, _ in shadow.named_buffers()}
        if statistics.keys() <= tracked:
            untracked = []
        else:
            untracked = [name for name in unfrozen_statistics_of(module) if name not in tracked]
        if untracked:
            raise ArgumentError(
                f'refresh_batchnorm={self.argument} needs statistics that include and exclude '
                f'leave out: {listed(untracked)}. Let them pass, or set refresh_batchnorm=False.',
                'refresh_batchnorm',
            )
        self.num_batches(state)  # raises if the length of an epoch is unknown
        _training_data(state)  # raises if there is none

    def is_due(self, event: Event, shadow: ShadowModel, state: State) -> bool:
        """Whether the run ends at ``event`` and the statistics are not those of the final average yet."""
        if self.setting is False or event not in MAY_END or self._tried_at == _moment(shadow, state):
            return False
        has_ended = state.max_duration is not None and state.timestamp >= state.max_duration
        return has_ended or event is Event.FIT_END

    def run(self, shadow: ShadowModel, state: State) -> None:
        """Computes the statistics into ``shadow``. The model, its flags and random numbers stay as they are.

        Warns:
            UserWarning: they could not be computed. The shadow keeps those that it has, and the run goes on: it has
                yet to save.
        """
        self._tried_at = _moment(shadow, state)
        if not statistics_of(unwrap(state.model)):
            log.info('refresh_batchnorm: the model has no BatchNorm layer with statistics, so none are computed')
        else:
            try:
                self._compute(shadow, state)
            except Exception as error:
                log.warning('the BatchNorm statistics could not be computed', exc_info=True)
                cause = str(error).rstrip('.') or 'no message'
                warn(
                    'the BatchNorm statistics of the averaged weights could not be computed, so the average keeps '
                    f'those gathered in training. {type(error).__name__}: {cause}. Compute them after training: '
                    'update_bn(model, data, shadow=swa.swa_model).'
                )
                return
        self._refreshed_at = self._tried_at

    def _compute(self, shadow: ShadowModel, state: State) -> None:
        batches = self.num_batches(state)
        log.info('computing the BatchNorm statistics of the averaged weights over %d batches', batches)
        with get_precision_context(state.precision, state.precision_config, fp8_autocast_enabled=False):
            update_bn(
                state.model,
                _training_data(state),
                shadow=shadow,
                num_batches=batches,
                microbatch_size=state.device_train_microbatch_size,
                progress_bar=False,
            )

    def num_batches(self, state: State) -> int:
        """How many batches of the training data the setting asks for."""
        setting, epoch = self.setting, state.dataloader_len
        if isinstance(setting, int) and not isinstance(setting, bool):
            return setting if epoch is None else min(setting, epoch.value)
        if epoch is None:
            raise ArgumentError(
                f'refresh_batchnorm={self.argument!r} is a share of an epoch, but the '
                "dataloader has no length. Pass a number of batches, such as refresh_batchnorm='100ba'.",
                'refresh_batchnorm',
            )
        share = setting.value if isinstance(setting, Span) else 1.0
        return max(1, math.ceil(share * epoch.value - 1e-9))

    def state_dict(self) -> dict[str, Any]:
        """When the statistics were computed last."""
        return {_REFRESHED_AT: self._refreshed_at}

    def load_state_dict(self, refreshed_at: list[int] | None) -> None:
        """Loads what :func:`check_state` returned."""
        self._refreshed_at = self._tried_at = refreshed_at


def check_state(state: Mapping[str, Any]) -> list[int] | None:
    """The part of an algorithm's state that :meth:`Refresh.state_dict` wrote; None if there is none.

    Raises:
        ValueError: it is not such a part.
    """
    refreshed_at = state.get(_REFRESHED_AT)
    is_moment = isinstance(refreshed_at, list) and [type(count) for count in refreshed_at] == [int, int]
    if refreshed_at is not None and not is_moment:
        raise ValueError(
            f'{_REFRESHED_AT!r} of the saved SWA state must give numbers of updates and batches, got {refreshed_at!r}.'
        )
    return refreshed_at


def _parse(setting: bool | int | str | Time) -> bool | int | Span:
    number = setting if plain.is_time(setting) else plain.scalar(setting)
    if isinstance(number, bool):
        return number
    if isinstance(number, int):
        if not 1 <= number < sys.maxsize:
            raise ArgumentError(
                f'refresh_batchnorm must be at least 1 batch, got {shown(number)}. Pass False for none.',
                'refresh_batchnorm',
            )
        return number
    span = Span.parse(setting, name='refresh_batchnorm', units=('ba', 'ep'), positive=True)
    if span.unit == 'ba':
        return int(span.value)
    if span.value > 1:
        raise ArgumentError(
            f"refresh_batchnorm takes at most one epoch, got '{span}'. Pass True for a whole one.", 'refresh_batchnorm'
        )
    return span


def _moment(shadow: ShadowModel, state: State) -> list[int]:
    """Distinguishes two computed statistics: by the average, and by the order of the data."""
    return [shadow.num_updates, state.timestamp.batch.value]


def _training_data(state: State) -> DataSpec:
    """The data of the Trainer that runs the event, which alone knows how a batch is transformed and split."""
    for names in calls.of_trainer(state):
        if (data := names['self']._train_data_spec) is not None:
            return data
    raise RuntimeError(
        'refresh_batchnorm needs the training data of a Trainer, but none runs this event. '
        'Set refresh_batchnorm=False, and call update_bn(model, data, shadow=swa.swa_model) after training.'
    )
