"""The averages of one run, without its events: when they are updated, what they lend, and what a state keeps of them.

A trainer's door turns its events into these calls and adds what only that trainer has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from torch import nn

from composer_ema.averages import BiasCorrected, Exponential
from composer_ema.checkpoints import formats, labels
from composer_ema.model.inventory import Inventory
from composer_ema.run import asked, limits
from composer_ema.run.asked import TRAINING
from composer_ema.run.average import Averages, Kept
from composer_ema.run.clock import Look, Run
from composer_ema.run.due import Interval, Start, first_update
from composer_ema.run.harm import Harm
from composer_ema.run.limits import Limit, warn
from composer_ema.run.shards import Outline
from composer_ema.settings import Settings

log = logging.getLogger(__name__)

#: What an exponential average is called that has no label.
NAME = 'ema'


class Keeper:
    """Keeps the averages of one run.

    Args:
        name: what a single average is called, and the door's word for an average in messages: ``'ema'``.
        kept: by label, for each average the profile, which chooses the weight of each update, and the argument that
            gives the profile its unit of time. Without such an argument the profile counts updates; without a profile
            a function among the ``settings`` makes the average.
        arguments: of the door, in plain types, for the state.
        compared: names of those whose values are compared with a loaded state's.
        start: before which nothing is averaged.
        interval: between two updates.
        settings: which tensors are averaged and how.
        log_interval: between two measurements of the distance. Default: None, none is measured.
        default_log_interval: time string of the interval where nobody asks for one.
        hidden: as ``kept``, of averages that are updated and saved beside the others, and not used. Default: none.

    Attributes:
        averages: their tensors, profiles and clocks.
        has_started: whether an update was made.
    """

    def __init__(
        self,
        name: str,
        kept: Mapping[str, Kept],
        arguments: Mapping[str, Any],
        *,
        compared: tuple[str, ...],
        start: Start,
        interval: Interval,
        settings: Settings,
        log_interval: Interval | None = None,
        default_log_interval: str,
        hidden: Mapping[str, Kept] = {},
    ) -> None:
        self.name, self.kept, self.arguments = name, dict(kept), dict(arguments)
        self.start, self.interval, self.settings = start, interval, settings
        self.log_interval = log_interval
        self._default_log_interval = default_log_interval
        self.averages = Averages(kept, settings, hidden=hidden)
        self.has_started = False
        self._compared = compared
        self._harm = Harm(name)
        self._loaded: Mapping[str, Any] = {}
        self._waiting: Mapping[str, Any] | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """What evaluations and checkpoints call the averages, the one used by default first."""
        return self.averages.labels

    @property
    def has_average(self) -> bool:
        """Whether there is something to lend."""
        return bool(self.averages) and self.has_started

    def forget(self) -> None:
        """Drops all averages, for another run. A state that waits for them is kept."""
        self.averages.drop()
        self.has_started, self._loaded = False, {}

    # Training

    def limits(self, run: Run) -> list[Limit]:
        """The times that a run must be able to count."""
        horizons = [horizon for _, horizon in self.kept.values() if horizon is not None]
        found = [
            *(Limit(horizon, measured_at=self.interval) for horizon in horizons),
            Limit(self.interval, limits.effect_of_rare_updates(self.interval, run)),
            Limit(self.start, 'no average will be kept'),
        ]
        if self.log_interval is not None:
            found.append(Limit(self.log_interval, 'no distance will be logged' if self._is_log_asked else None))
        return found

    @property
    def _is_log_asked(self) -> bool:
        """Whether somebody asks for the log interval, so that one without effect is worth a warning."""
        return self.log_interval is not None and str(self.log_interval.span) != self._default_log_interval

    def build(self, model: nn.Module, *, overlap: bool = True) -> Mapping[str, Any] | None:
        """Starts every average anew, at the weights of ``model``; returns a state that was waiting for them."""
        self.averages.build(model, overlap=overlap)
        waiting, self._waiting = self._waiting, None
        return waiting

    def begin(self, model: nn.Module, run: Run, *, kind: str) -> None:
        """Training starts, or goes on from a state that has been loaded.

        Args:
            model: in training, wrapped as it will be trained.
            run: at its start.
            kind: of the door, for the log: ``'EMA'``.

        Raises:
            ValueError: the averages do not fit ``model``.
        """
        limits.warn_of_other_arguments(self._compared, self._loaded, self.arguments)
        self._loaded = {}
        self.averages.follow_surgery(model, may_rebuild=not self.has_started)
        self.averages.live = model
        look = Look(run)
        for average in self.averages.all().values():
            if average.has_begun and average.first_update is None and self.start.span.value > 0:
                average.first_update = first_update(self.start, self.interval, look, average.started_at)
        self.averages.follow_clock(look)
        if self.start.span.value == 0 and not self.has_started:
            self.averages.count_from(look)  # a run that was resumed without these averages is older than they are
        self._harm.foresee(self.averages, self.start, self.interval, run)
        for label, average in self.averages.all().items():
            profile = 'a function' if average.profile is None else average.profile
            log.info('%s %s with %s: %s', kind, label, profile, average.shadow)

    def is_due(self, unit: str, look: Look) -> bool:
        """Whether an update is due at the end of a batch, an epoch or an iteration.

        Args:
            unit: ``'ba'``, ``'ep'`` or ``'iter'``, of what has just ended.
            look: at the clock, now.
        """
        if unit != self.interval.ends:
            return False
        if not self.has_started:
            return self.start.has_come(look)
        for average in self.averages.all().values():
            if self.interval.has_passed(look, average.last_update, average.first_update):
                return True
        return False

    def after(self, unit: str, model: nn.Module, look: Look, *, is_skipped: bool = False) -> bool:
        """Something has ended: moves every average towards the weights of ``model``, in one update, if that is due.

        Args:
            unit: ``'ba'``, ``'ep'`` or ``'iter'``, of what has ended. Each batch ends once, before its epoch does.
            model: in training.
            look: at the clock, now.
            is_skipped: of a batch, whether its step was left out, as a gradient scaler does. It is no time then.

        Returns:
            Whether there was an update.
        """
        if is_skipped and unit == 'ba':
            self.averages.pass_over_batch(look)
            return False
        if not self.is_due(unit, look):
            return False
        is_from_start = self.start.span.value == 0 and not self.has_started
        self.averages.update(model, look, self.interval, is_from_start=is_from_start)
        self.has_started = True
        return True

    def end(self) -> None:
        """Training has ended: waits for the last update, and warns of averages that are still their start.

        A collective call.
        """
        # Once training has ended the weights may be written.
        self.averages.share_buffers()
        if not self.has_started:
            limits.warn_of_no_update(self.start, self.interval)
        self._harm.tell(self.averages)

    # What is logged

    def is_log_due(self, unit: str, look: Look) -> bool:
        """Whether the distance is to be measured at the end of a batch, an epoch or an iteration, once updated.

        Args:
            unit: ``'ba'``, ``'ep'`` or ``'iter'``, of what has just ended.
            look: at the clock, now.
        """
        interval = self.log_interval
        return interval is not None and unit == interval.ends and self.has_average and interval.has_passed(look)

    def warn_unlogged(self, why: str, remedy: str) -> None:
        """Warns, if somebody asks for the log interval, that nothing is logged in this run.

        Args:
            why: as a clause.
            remedy: as the beginning of a sentence.
        """
        if self._is_log_asked:
            warn(f'{self.log_interval} logs nothing: {why}. {remedy}, or log_interval=None.')

    def progress(self) -> dict[str, float]:
        """What the last update was and how many there were, by name of the metric. Never waits for a device."""
        metrics: dict[str, float] = {}
        for label, average in self.averages:
            weight, _ = average.last_move
            if weight is not None and isinstance(average.profile, Exponential | BiasCorrected):
                metrics[f'{label}/smoothing'] = 1.0 - weight
            metrics[f'{label}/num_updates'] = average.shadow.num_updates
        if self.settings.skip_nonfinite:
            metrics[f'{self.name}/skipped_elements'] = self.averages.poll_skipped()
        return metrics

    def distances(self, model: nn.Module) -> dict[str, float]:
        """How far each average is from the training weights of ``model``, by name of the metric.

        Makes the host wait for the device. A collective call where tensors are sharded.
        """
        return {
            f'{label}/relative_distance': average.shadow.relative_distance(model).item()
            for label, average in self.averages
        }

    def measured(self, model: nn.Module) -> dict[str, float]:
        """The :meth:`progress` and the :meth:`distances`."""
        return {**self.progress(), **self.distances(model)}

    # Loans

    def use(self, weights: str, model: nn.Module) -> None:
        """Makes ``model`` hold the average called ``weights`` once there is one, else its training weights."""
        if weights != TRAINING and self.has_average and self.averages[weights].has_begun:
            self.averages.lend(weights, model)
            self._harm.lent(weights, self.averages[weights])
        else:
            self.averages.take_back(model)

    # State

    def state_dict(self) -> dict[str, Any]:
        """The averages, their counters and, while a model holds one, the training weights; see ``formats``.

        Tensors alias the averages.
        """
        state: dict[str, Any] = {
            formats.VERSION_KEY: formats.VERSION,
            'config': dict(self.arguments),
            'started': self.has_started,
            'averages': self.averages.state_dict(only_begun=self.has_started),
            **({formats.HIDDEN: list(self.averages.hidden)} if self.averages.hidden else {}),
        }
        for average in state['averages'].values():
            if formats.STASH in average:
                state[formats.STASH] = average.pop(formats.STASH)
        if formats.STASH not in state and (stash := self.averages.stash()):
            state[formats.STASH] = stash  # somebody else's average stands in the model
        return state

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        what: str,
        *,
        check: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> Mapping[str, Any] | None:
        """Loads a state, of an older format too. All of it is checked first. It waits where nothing is built yet.

        A state that was saved while the model held an average leaves the model swapped.

        Args:
            state: what :meth:`state_dict` returned, or an algorithm of Composer; or an
                :class:`~composer_ema.run.shards.Outline`, whose tensors are read once the rest is checked.
            what: the state, in the words of an error.
            check: raises if what a door added to the state does not fit, before anything is changed; it gets the state
                in the current format. Default: nothing.

        Returns:
            The state in the current format; None where it waits, or holds no average.

        Raises:
            ValueError: names, shapes, or a version that do not fit, all listed. Nothing is changed then.
        """
        if not self.averages:
            self._waiting = state
            return None
        live = self.averages.live
        if live is not None:
            self.averages.follow_surgery(live, may_rebuild=not self.has_started)
        inventory = Inventory() if live is None else Inventory.of(live)
        upgraded = formats.upgrade(
            state,
            model_slot={name: tensor.detach() for name, tensor in inventory.tensors().items()},
            tracked={name for each in self.averages.all().values() for name, _ in each.shadow.named_parameters()},
            buffers=inventory.buffers,
            what=what,
        )
        saved, hidden = upgraded['averages'], upgraded.get(formats.HIDDEN, ())
        if not saved:
            return None
        shown = {label: each['profile']['description'] for label, each in saved.items() if label not in hidden}
        wanted = {label: average.description for label, average in self.averages}
        continuation = labels.continued(shown, wanted, what)
        sources = {**continuation.sources, **{label: label for label in self.averages.hidden if label in hidden}}
        if continuation.remark:
            warn(continuation.remark)
        if check is not None:
            check(upgraded)
        self.averages.load_state_dict(
            {label: saved[source] for label, source in sources.items()},
            what,
            has_begun=upgraded['started'],
            stash=upgraded.get(formats.STASH),
            read=partial(state.read, sources=sources, like=inventory.tensors()) if isinstance(state, Outline) else None,
        )
        self.has_started = upgraded['started']
        # What the remark told already need not be told again.
        is_told = self._compared if continuation.remark else ()
        self._loaded = {name: value for name, value in upgraded['config'].items() if name not in is_told}
        return upgraded


def keeper_of(
    settings: Mapping[str, Any],
    *,
    taken: Collection[str],
    ema_start: Any,
    update_interval: Any,
    log_interval: Any,
    default_log_interval: str,
    **arguments: Any,
) -> Keeper:
    """The keeper that a door's arguments ask for, those of :class:`composer_ema.EMA`.

    Args:
        settings: what the door has collected.
        taken: names of the settings that the door takes.
        ema_start: time string before which nothing is averaged.
        update_interval: time string between two updates.
        log_interval: time string between two measurements of what is logged, or None.
        default_log_interval: that of the door.
        arguments: ``half_life``, by default :data:`~composer_ema.run.asked.DEFAULT_HALF_LIFE`, ``smoothing``,
            ``power``, ``gamma``, ``average``, ``warmup`` and ``bias_correction``, all of them.

    Raises:
        TypeError, ValueError: an argument out of range, or without effect.
    """
    has_function = settings.get('avg_fn') is not None or settings.get('multi_avg_fn') is not None
    wanted = asked.read(NAME, arguments, has_function=has_function)
    start = Start.of('ema_start', ema_start)
    interval = Interval.of('update_interval', update_interval)
    log_at = None if log_interval is None else Interval.of('log_interval', log_interval)
    chosen = Settings.of(settings)
    written = {
        **wanted.arguments,
        'ema_start': str(start.span),
        'update_interval': str(interval.span),
        'log_interval': None if log_at is None else str(log_at.span),
        **chosen.as_plain(taken),
    }
    compared = (*asked.OF_PROFILES, 'avg_fn', 'multi_avg_fn')
    return Keeper(
        NAME,
        wanted.kept,
        written,
        compared=compared,
        start=start,
        interval=interval,
        settings=chosen,
        log_interval=log_at,
        default_log_interval=default_log_interval,
    )
