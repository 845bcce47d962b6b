"""The averages of a run: for each its profile, its shadow and the clock at its last update; and the model they follow.

Updates read the model, loans put an average into it and take it out. When either happens is decided elsewhere.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from composer_ema.averages import UPDATES, BiasCorrected, Moment, Profile
from composer_ema.kernels.rules import is_inexact
from composer_ema.model.inventory import Inventory
from composer_ema.model.names import check_same
from composer_ema.model.sharding import laid_out_as
from composer_ema.model.wrappers import unwrap
from composer_ema.profiles import StartShare, check_start_share, described, record_update
from composer_ema.run.clock import START_OF_TRAINING, Clock, Look, Run, TimeArgument, check_clock
from composer_ema.run.due import Interval
from composer_ema.settings import Settings
from composer_ema.shadow import loan
from composer_ema.shadow import state as states
from composer_ema.shadow.shadow_model import ShadowModel
from composer_ema.shadow.shadow_models import ShadowModels
from composer_ema.spans import CLOCK_UNITS

# Keys of the state that do not belong to the shadow.
_LAST_UPDATE, _STARTED_AT, _FIRST_UPDATE = 'last_update', 'started_at', 'first_update'
_PROFILE, _DESCRIPTION, _START_SHARE = 'profile', 'description', 'start_share'
_OF_THE_AVERAGE = frozenset({_LAST_UPDATE, _STARTED_AT, _FIRST_UPDATE, _PROFILE, _START_SHARE})
_VERSION, _STASH = 'version', 'training_weights'

#: The profile of an average, None where a function makes it, and the argument that gives the profile its unit of time.
Kept = tuple[Profile | None, TimeArgument | None]
#: The weight and the moment of an update; None for both where a function makes the average.
Move = tuple[float | None, Moment | None]


@dataclass
class Average:
    """An average that a run keeps.

    Args:
        profile: chooses the weight of each update. None: the shadow's own function makes the average.
        horizon: the argument that gives the profile its unit, for errors. None: the profile counts updates.
        shadow: the averaged tensors.
        last_update: the clock at the last update, moved on by every batch since then whose step was left out; None
            before the first update, and where a loaded state does not say.
        started_at: the clock from which the age of the average counts, moved on likewise. None counts from the start of
            training.
        first_update: the clock at the first update, from which the interval counts; None where the interval counts from
            the start of training.
        start: how much of the average is still its start.
        has_begun: whether it was updated; the first update copies the weights.
        last_move: the weight and the moment of the last update since it was built or loaded; None for both before one,
            or if a function makes it.
    """

    profile: Profile | None
    horizon: TimeArgument | None
    shadow: ShadowModel
    last_update: Clock | None = None
    started_at: Clock | None = None
    first_update: Clock | None = None
    start: StartShare = field(default_factory=StartShare)
    has_begun: bool = False
    last_move: Move = (None, None)

    @property
    def description(self) -> str:
        """The profile in one word, as states keep it."""
        return described(self.profile)

    def next_move(self, look: Look, interval: Interval, *, is_from_start: bool) -> Move:
        """The weight and the moment of an update now; None for both where a function makes the average.

        Before the first update, which copies, this sets the clocks that the age and the interval count from.

        Args:
            look: at the clock of the run, now.
            interval: of the updates; how much time passed if the last update is unknown.
            is_from_start: for a first update, whether the interval counts from the start of training, and the age of
                the average from where training began with it, see :meth:`Averages.count_from`. Otherwise the age counts
                from one interval ago, so that the first update stands for as much time as each later one, and the
                interval from now.
        """
        if not self.has_begun:
            if not is_from_start:
                self.started_at, self.first_update = interval.before(look), look.now
            elif self.started_at is None:
                self.started_at = dict(START_OF_TRAINING)
        if self.profile is None:
            return None, None
        moment = self._moment(self.profile.unit, look, interval)
        return self.profile.weight(moment) if self.has_begun else 1.0, moment

    def record(self, look: Look, move: Move) -> None:
        """Records that the update was made that :meth:`next_move` gave."""
        weight, moment = move
        record_update(self.profile, self.start, moment, weight, has_copied=not self.has_begun)
        self.has_begun, self.last_update, self.last_move = True, look.now, move

    def _moment(self, unit: str, look: Look, interval: Interval) -> Moment:
        """The moment of an update now, in the unit of the profile."""
        num_updates = self.shadow.num_updates
        if unit == UPDATES:
            return Moment.of_update(num_updates)
        length, unit = _unit_of_clock(unit, look.run)
        if self.horizon is not None:
            look.check_counts(unit, self.horizon)
        now = look.now[unit]
        age = now - (self.started_at or START_OF_TRAINING)[unit]
        if self.last_update is not None:
            elapsed = now - self.last_update[unit]
        elif not self.has_begun:
            elapsed = age  # in all units alike
        elif unit == interval.span.unit:
            # An average that came without its clock: Composer's own, or one that the user set.
            elapsed = interval.span.value
        else:
            elapsed = now - look.before[unit]
        elapsed = max(elapsed, 0.0)
        return Moment(elapsed / length, max(age, elapsed) / length, num_updates)

    def pass_over_batch(self, look: Look) -> None:
        """Makes the batch that has just ended, which moved no weight, no part of any elapsed time and of no age."""
        length = {unit: look.now[unit] - look.before[unit] for unit in CLOCK_UNITS}
        started = self.started_at or START_OF_TRAINING
        self.started_at = {unit: started[unit] + length[unit] for unit in CLOCK_UNITS}
        if (last := self.last_update) is not None:
            # Not beyond now by a rounding error: that would look like a clock that was set back.
            self.last_update = {unit: min(last[unit] + length[unit], look.now[unit]) for unit in CLOCK_UNITS}

    def follow_clock(self, now: Clock) -> None:
        """If the run's clock was set back, counts from ``now`` on. The average keeps its age."""
        last = self.last_update
        if last is not None and any(last[unit] > now[unit] for unit in CLOCK_UNITS):
            self.started_at = _set_back(self.started_at or START_OF_TRAINING, last, now)
            if self.first_update is not None:
                self.first_update = _set_back(self.first_update, last, now)
            self.last_update = now

    def state_dict(self) -> dict[str, Any]:
        """The average as plain types and tensors, which alias the shadow; see ``checkpoints.formats``.

        The state of the shadow without its version: what an algorithm saves has one version, that of its own format.
        """
        state = self.shadow.state_dict()
        del state[_VERSION]
        return {
            **state,
            _LAST_UPDATE: self.last_update,
            _STARTED_AT: self.started_at,
            _FIRST_UPDATE: self.first_update,
            _START_SHARE: self.start.value,
            _PROFILE: self._profile_state(),
        }

    def loaded(self, state: Mapping[str, Any], what: str) -> Average:
        """This average with the clocks and the memory that :meth:`state_dict` returned; the shadow is left as it is.

        A profile other than the saved one goes on as one that has forgotten its start.

        Args:
            state: of the current format.
            what: the state, in the words of an error.

        Raises:
            ValueError: a part that does not fit.
        """
        profile = copy.deepcopy(self.profile)
        if profile is not None:
            memory = {key: value for key, value in state[_PROFILE].items() if key != _DESCRIPTION}
            is_same = state[_PROFILE][_DESCRIPTION] == self.description
            if is_same or memory.keys() == profile.state_dict().keys():
                profile.load_state_dict(memory)
            elif isinstance(profile, BiasCorrected):
                profile.log_kept = -math.inf
        return dataclasses.replace(
            self,
            profile=profile,
            last_move=(None, None),
            last_update=check_clock(state[_LAST_UPDATE], f'{_LAST_UPDATE} of {what}'),
            # Negative where the clock was set back since.
            started_at=check_clock(state[_STARTED_AT], f'{_STARTED_AT} of {what}', least=-math.inf),
            first_update=check_clock(state[_FIRST_UPDATE], f'{_FIRST_UPDATE} of {what}', least=-math.inf),
            start=StartShare(check_start_share(state[_START_SHARE], f'{_START_SHARE} of {what}')),
        )

    def _profile_state(self) -> dict[str, Any]:
        memory = {} if self.profile is None else self.profile.state_dict()
        return {_DESCRIPTION: self.description, **memory}


def _of_shadow(state: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an average's state that its shadow takes."""
    return {**{key: value for key, value in state.items() if key not in _OF_THE_AVERAGE}, _VERSION: states.VERSION}


def _set_back(moment: Clock | Mapping[str, float], last: Clock, now: Clock) -> Clock:
    """A moment as far before ``now`` as it was before ``last``."""
    return {unit: now[unit] - (last[unit] - moment[unit]) for unit in CLOCK_UNITS}


def _unit_of_clock(unit: str, run: Run) -> tuple[float, str]:
    """How much one ``unit`` of a profile is in a unit that the clock counts, and that unit."""
    if unit != 'dur':
        return 1, unit
    whole = run.max_duration
    assert whole is not None  # checked when training started
    return whole.value, whole.unit


class Averages:
    """The averages of the model in training, by label, over one :class:`~composer_ema.ShadowModels`.

    There are none before :meth:`build`. All are updated together. Iteration goes over the averages that the run shows:
    those that it evaluates, exports and logs. Hidden ones are updated and saved beside them, for a second holder, such
    as one that writes snapshots; :meth:`all` has them, too.

    Args:
        profiles: for each label the profile, or None for a function's average, and the argument that gives its unit.
        settings: which tensors are kept, and how; the same for all.
        hidden: likewise, of averages that are kept for a second holder, under other labels. Default: none.
    """

    def __init__(self, profiles: Mapping[str, Kept], settings: Settings, *, hidden: Mapping[str, Kept] = {}) -> None:
        self._profiles, self._settings = {**profiles, **hidden}, settings
        self._hidden = frozenset(hidden)
        self._averages: dict[str, Average] = {}
        self._shadows: ShadowModels | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self._overlap = True

    def __bool__(self) -> bool:
        return bool(self._averages)

    def __iter__(self) -> Iterator[tuple[str, Average]]:
        return ((label, average) for label, average in self._averages.items() if label not in self._hidden)

    def __getitem__(self, label: str) -> Average:
        return self._averages[label]

    def all(self) -> Mapping[str, Average]:
        """All averages by label, the hidden ones last."""
        return self._averages

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the averages that the run shows, whether they are built or not."""
        return tuple(label for label in self._profiles if label not in self._hidden)

    @property
    def hidden(self) -> tuple[str, ...]:
        """The labels of the hidden averages."""
        return tuple(label for label in self._profiles if label in self._hidden)

    @property
    def live(self) -> nn.Module | None:
        """The model in training; None if there is none or it is gone."""
        return None if self._model is None else self._model()

    @live.setter
    def live(self, model: nn.Module) -> None:
        self._model = weakref.ref(unwrap(model))

    def shadow(self, label: str) -> ShadowModel | None:
        """The averaged tensors; None before :meth:`build`."""
        return self._averages[label].shadow if self._averages else None

    def required(self, label: str) -> ShadowModel:
        """The averaged tensors.

        Raises:
            RuntimeError: there are none yet.
        """
        if not self._averages:
            raise RuntimeError('there is no average yet. Build a Trainer with this algorithm first.')
        return self._averages[label].shadow

    def take_over(self, label: str, shadow: ShadowModel | None) -> None:
        """Replaces the only average that the run shows; None takes all away.

        Of the new one it is not known when it was updated. Beside hidden ones it is copied, since they share updates.
        """
        if shadow is None:
            self._averages, self._shadows = {}, None
            return
        if len(self._profiles) > 1 and self._shadows is not None:
            self._shadows[label].load_state_dict(shadow.state_dict())
            shadow = self._shadows[label]
        else:
            self._shadows = ShadowModels.of_one(label, shadow)
        self._averages[label] = average = self._new(label, shadow)
        average.start.value, average.has_begun = None, True

    def build(self, model: nn.Module, *, overlap: bool) -> None:
        """Starts every average anew, at the weights of ``model``.

        Args:
            model: the model in training.
            overlap: as for :class:`~composer_ema.ShadowModel`.
        """
        self._overlap, self.live = overlap, model
        arguments, labels = self._settings.as_arguments(), list(self._profiles)
        if len(labels) == 1:
            self._shadows = ShadowModels.of_one(labels[0], ShadowModel(model, overlap=overlap, **arguments))
        else:
            self._shadows = ShadowModels(model, labels, overlap=overlap, **arguments)
        self._averages = {label: self._new(label, shadow) for label, shadow in self._shadows.items()}

    def drop(self) -> None:
        """Forgets all averages, and the model; :meth:`build` starts them anew."""
        self._averages, self._shadows, self._model = {}, None, None

    def _new(self, label: str, shadow: ShadowModel) -> Average:
        profile, horizon = self._profiles[label]
        return Average(copy.deepcopy(profile), horizon, shadow)

    @property
    def _built(self) -> ShadowModels:
        assert self._shadows is not None, 'build comes first'
        return self._shadows

    def update(self, model: nn.Module, look: Look, interval: Interval, *, is_from_start: bool) -> None:
        """Moves every average, hidden ones too, towards the weights of ``model`` in one update.

        Args:
            model: in training. Only read.
            look: at the clock of the run, now.
            interval: of the updates.
            is_from_start: of averages whose first update this is; see :meth:`Average.next_move`.
        """
        moves = {
            label: average.next_move(look, interval, is_from_start=is_from_start)
            for label, average in self._averages.items()
        }
        if self._built.has_function:
            self._built.update(model)
        else:
            self._built.update(model, weight={label: weight for label, (weight, _) in moves.items()})  # pyright: ignore[reportArgumentType]: without a function there are weights
        for label, average in self._averages.items():
            average.record(look, moves[label])

    def follow_surgery(self, model: nn.Module, *, may_rebuild: bool) -> None:
        """Pairs the averages with ``model``, in which another algorithm may have replaced layers.

        Args:
            model: the model in training.
            may_rebuild: whether nothing has been averaged yet, so that a model that does not fit starts them anew.

        Raises:
            ValueError: the averages do not fit and may not be built anew.
        """
        if self._shadows is None:
            return
        try:
            self._shadows.resolve(model)
        except ValueError:
            if not may_rebuild:
                raise
            self.build(model, overlap=self._overlap)

    def count_from(self, look: Look) -> None:
        """Makes the age of averages that are still to begin count from now, unless it counts from earlier already."""
        for average in self._averages.values():
            if not average.has_begun and average.started_at is None:
                average.started_at = look.now

    def follow_clock(self, look: Look) -> None:
        """See :meth:`Average.follow_clock`."""
        for average in self._averages.values():
            average.follow_clock(look.now)

    def pass_over_batch(self, look: Look) -> None:
        """See :meth:`Average.pass_over_batch`."""
        for average in self._averages.values():
            average.pass_over_batch(look)

    # Beside training

    @property
    def is_pending(self) -> bool:
        """Whether an update may still be reading the weights."""
        return self._shadows is not None and self._shadows.is_pending

    def wait_for_reads(self) -> None:
        """Orders what follows after the last update has read the weights; see :class:`~composer_ema.ShadowModel`."""
        if self._shadows is not None:
            self._shadows.wait_for_reads()

    def poll_skipped(self) -> int:
        """How many elements of the model were left out so far; see :class:`~composer_ema.ShadowModels`."""
        return self._built.poll_skipped()

    def share_buffers(self) -> None:
        """Waits for the last update and, under DDP, gives every rank the averaged buffers of rank 0.

        A checkpoint keeps those of rank 0. A collective call.
        """
        self._built.wait()
        for average in self._averages.values():
            average.shadow.broadcast_buffers()

    # Loans

    @property
    def lent(self) -> str | None:
        """The label of an average that a model holds; None if every model holds its training weights."""
        for label, average in self._averages.items():
            if average.shadow.is_swapped:
                return label
        return None

    def stash(self) -> dict[str, torch.Tensor]:
        """The training weights that belong into a checkpoint taken while any average stands in the model in training.

        Those of the tensors that these averages track and the model saves, aliased; none if it holds its own weights.
        """
        live = self.live
        if live is None or not loan.borrowers(live):
            return {}
        stash: dict[str, torch.Tensor] = {}
        for average in self._averages.values():
            state, weights = average.shadow.state_dict(), average.shadow.training_weights(live)
            names = (*state['parameters'], *state['buffers'])
            stash |= {name: weights[name] for name in names if name in weights and is_inexact(weights[name])}
        return stash

    def stashed_weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The training weights of ``model`` that lie in a stash, whoever lent it an average, by name, aliased."""
        stash = loan.training_weights(model)
        if self.live is unwrap(model) and (lent := self.lent) is not None:
            # A state that was loaded by hand may hold the stash of a model that is not on loan here.
            stash = {**self._averages[lent].shadow.training_weights(model), **stash}
        return stash

    def lend(self, label: str, model: nn.Module) -> None:
        """Puts an average into ``model`` in place of any other of these, over a stash of its training weights.

        Under DDP every rank shows the averaged buffers of rank 0: a collective call. Nothing if ``model`` holds the
        average already.
        """
        shadow = self._averages[label].shadow
        if shadow.is_swapped:
            return
        self._built.wait()
        shadow.broadcast_buffers()
        self.take_back(model)
        shadow.swap_in(model)

    def take_back(self, model: nn.Module) -> None:
        """Restores the training weights of ``model`` if it holds an average."""
        for average in self._averages.values():
            if average.shadow.is_swapped:
                average.shadow.swap_out(model)

    def put(self, label: str, model: nn.Module) -> nn.Module:
        """Puts an average into ``model`` and returns it.

        The model in training is lent the average; any other model of the architecture is overwritten.

        Raises:
            RuntimeError: there is no average yet.
            ValueError: ``model`` does not fit. Nothing is written then.
        """
        shadow = self.required(label)
        if self.live is not unwrap(model):
            shadow.copy_to(model)
        elif not shadow.is_shown_by(model):
            self.take_back(model)  # it may stand behind another average
            shadow.swap_in(model)
        return model

    def put_training_weights(self, label: str, model: nn.Module) -> nn.Module:
        """Puts the training weights that the average ``label`` follows into ``model`` and returns it.

        Raises:
            RuntimeError: there is no average yet, the model in training is gone, or it holds an average that is not
                among these.
            ValueError: ``model`` does not fit. Nothing is written then.
        """
        shadow, live = self.required(label), self.live
        if live is not None and live is unwrap(model):
            self.take_back(model)
            loan.refuse(live)
            return model
        if live is None:
            raise RuntimeError('the model in training is gone, and its weights with it. Load them from a checkpoint.')
        weights, tensors = shadow.training_weights(live), Inventory.of(unwrap(model)).tensors()
        tensors = {name: tensors[name] for name in weights if name in tensors}
        check_same('the given model', weights, tensors, remedy='Nothing was changed. Pass the same architecture.')
        with torch.no_grad():
            for name, weight in weights.items():
                tensors[name].copy_(laid_out_as(weight, tensors[name]))
        return model

    # State

    def state_dict(self, *, only_begun: bool) -> dict[str, dict[str, Any]]:
        """The state of each average by label, as plain types and tensors, which alias the shadows.

        Args:
            only_begun: whether to leave out those that no update has reached, in a run that has others.
        """
        return {
            label: average.state_dict()
            for label, average in self._averages.items()
            if average.has_begun or not only_begun
        }

    def load_state_dict(
        self,
        saved: Mapping[str, Mapping[str, Any]],
        what: str,
        *,
        has_begun: bool,
        stash: Mapping[str, torch.Tensor] | None = None,
        read: Callable[[dict[str, dict[str, Any]]], dict[str, dict[str, Any]]] | None = None,
    ) -> None:
        """Loads the state of each average; all is checked first. Those that are not among them start anew.

        Args:
            saved: by label, of the current format.
            what: the state, in the words of an error.
            has_begun: whether those that are saved were updated before.
            stash: the training weights of a model that holds an average. Default: none.
            read: gives the states their values, once all is checked. Default: they have them.

        Raises:
            ValueError: a part that does not fit. Nothing is changed then.
        """
        averages = {
            label: average.loaded(saved[label], what) if label in saved else self._new(label, average.shadow)
            for label, average in self._averages.items()
        }
        of_shadows = {label: _of_shadow(state) for label, state in saved.items()}
        if stash is not None and of_shadows:
            of_shadows[next(iter(of_shadows))][_STASH] = stash  # whichever stood there
        if read is not None:
            self._built.check_averages(of_shadows)
            of_shadows = read(of_shadows)
        self._built.load_averages(of_shadows)
        for label, average in averages.items():
            average.has_begun = has_begun and label in saved
            if label not in saved:
                average.shadow.num_updates = 0
            elif not has_begun and average.started_at is None:
                average.started_at = dict(START_OF_TRAINING)  # as releases that did not say so had it
        self._averages = averages

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: without the tie to the model in training."""
        # The shadows share their updates, so they are copied together.
        averages = {label: dataclasses.replace(each, shadow=None) for label, each in self._averages.items()}
        return {**self.__dict__, '_model': None, '_averages': averages}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        for label, average in self._averages.items():
            average.shadow = self._built[label]
