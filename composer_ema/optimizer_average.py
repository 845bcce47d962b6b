"""The averages that follow an optimizer: when its steps make an update, and by which profile."""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from composer_ema.averages import CopiesFirst, Equal, Moment, Profile, check_numbers
from composer_ema.checkpoints.labels import continued
from composer_ema.kernels.rules import is_inexact
from composer_ema.model.inventory import Inventory
from composer_ema.model.names import listed
from composer_ema.model.sharding import any_nonzero, difference, is_shard, local, refuse_placeholders, share_of
from composer_ema.model.untraced import untraced
from composer_ema.optimizer_entries import Entries, state_of
from composer_ema.optimizer_state import (
    AVERAGE,
    AVERAGES,
    DESCRIPTION,
    EMA_STATE_VERSION,
    LAST_UPDATE,
    NUM_STEPS,
    PROFILE,
    SETTINGS,
    SINGLE,
    START_SHARE,
    STARTED_AT,
    VERSION,
    check_naming,
    check_state,
    renamed,
    upgraded,
)
from composer_ema.profiles import StartShare, described, record_update, start_remedy
from composer_ema.settings import Settings
from composer_ema.shadow import state as states
from composer_ema.shadow.shadow_model import ShadowModel
from composer_ema.shadow.shadow_models import ShadowModels
from composer_ema.wording import counted
from composer_ema.wrapper import ParameterGroups

# Frames of these lie between a user's line and the function that warns.
_INSIDE = ('composer_ema', 'torch', 'contextlib')


@dataclass
class Followed:
    """What is known of one average besides its tensors.

    Args:
        profile: chooses the weight of each update; None where a function does.
        start: how much of the average is still its start.
        started_at: the step from which its age counts.
    """

    profile: Profile | None
    start: StartShare = field(default_factory=StartShare)
    started_at: int = 0

    @property
    def starts_with_an_update(self) -> bool:
        """Whether the first update copies whatever it finds, so that the average is the weights until then."""
        return self.profile is None or isinstance(self.profile, Equal | CopiesFirst)

    def __str__(self) -> str:
        return described(self.profile)


@dataclass(frozen=True)
class Checked:
    """A state that fits, ready to be taken over.

    Args:
        state: in the current version.
        followed: by label, of the averages that continue from it.
        averages: likewise, their tensors.
        lacking: buffers that it had no average of.
        remark: what becomes of averages that it has under other labels, or has not.
    """

    state: Mapping[str, Any]
    followed: dict[str, Followed]
    averages: dict[str, Mapping[str, Any]]
    lacking: list[str]
    remark: str


class StepAverages:
    """The averages that follow an optimizer: counts the steps and updates all of them when an update is due.

    Args:
        arguments: EMAOptimizer's own, checked; they stand in the state.
        profiles: by label; None where a function makes the average.
        kept: what is averaged and how.
        module: the parameters to average.
        groups: the optimizer's groups, whose parameters ``module`` must have.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        profiles: Mapping[str, Profile | None],
        kept: Settings,
        module: nn.Module,
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        self.arguments = arguments
        self._profiles, self._kept, self._module = dict(profiles), kept, module
        self._followed = self._new()
        check_covered(module, groups)
        #: All averages by label.
        self.shadows = _shadows(module, list(profiles), kept)
        self.num_steps = 0
        self._last_update = 0
        #: Training weights that a loaded state has put back into the model, until the next step.
        self._returned: dict[str, Tensor] | None = None
        self._has_warned = False
        self._told: set[str] = set()

    @property
    def is_swapped(self) -> bool:
        """Whether any of the averages stands in a model."""
        return any(shadow.is_swapped for shadow in self.shadows.values())

    def start(self) -> None:
        """Before the first step, makes the averages the weights, whenever those were loaded."""
        if self.num_steps > 0:
            return
        self._refresh_groups()
        fresh = [label for label, shadow in self.shadows.items() if shadow.num_updates == 0]
        for label in self.shadows.keys() - set(fresh):
            self._followed[label].start.value = None  # given, perhaps another library's, and goes on
        if fresh:
            self._copy_weights(fresh)
            self.shadows.resolve(self._module)  # stochastic rounding counts from the num_updates of this moment

    @untraced
    def refresh(self) -> None:
        """Makes those averages the weights that have not started."""
        if self.num_steps == 0:
            self.start()
        elif waiting := [label for label in self.shadows if self._has_to_start(label)]:
            self._copy_weights(waiting)

    def follow(self) -> None:
        """Counts a step, and updates the averages if an update is due."""
        self.num_steps += 1
        interval, start = self.arguments['every_n_steps'], self.arguments['start']
        if self.num_steps < start or (self.num_steps - start) % interval:
            return
        self._refresh_groups()
        if all(map(self._has_to_start, self.shadows)):
            self._last_update = max(0, self.num_steps - interval)
        moments: dict[str, Moment] = {}
        for label, followed in self._followed.items():
            if self._has_to_start(label):
                # The first update stands for as much time as each later one.
                followed.started_at = max(0, self.num_steps - interval)
            elapsed = self.num_steps - self._last_update
            age = max(self.num_steps - followed.started_at, elapsed)
            moments[label] = Moment(elapsed, age, self.shadows[label].num_updates)
        weights = {
            label: followed.profile.weight(moments[label])
            for label, followed in self._followed.items()
            if followed.profile is not None
        }
        self._update(weights)
        for label, followed in self._followed.items():
            moment, profile = moments[label], followed.profile
            has_copied = isinstance(profile, CopiesFirst) and moment.num_updates == 0
            record_update(profile, followed.start, moment, weights.get(label), has_copied=has_copied)
        self._last_update = self.num_steps

    def reset(self) -> None:
        """Forgets the averages; new ones start from the weights before the next step."""
        self.num_steps, self._last_update, self._followed = 0, 0, self._new()
        for shadow in self.shadows.values():
            shadow.num_updates = 0
        self._returned = None

    def tell_of_start(self, label: str) -> None:
        """Warns the caller of this package, once for each average, if it still holds much of its start."""
        share = self._followed[label].start.value
        if share is None or label in self._told or self.shadows[label].num_updates == 0:
            return
        name = 'the average' if len(self.shadows) == 1 else f'the average {label!r}'
        if said := start_remedy(share, self._followed[label].profile, average=name):
            self._told.add(label)
            warnings.warn(f'After {counted(self.num_steps, "step")} {said}', stacklevel=_level_of_caller())

    def state_dict(self, *, refreshed: bool = True) -> dict[str, Any]:
        """Returns the averages and their counters; see :meth:`EMAOptimizer.ema_state_dict`.

        Args:
            refreshed: whether averages that have not started become the weights first. Default: True.
        """
        if not self.is_swapped:
            self.refresh() if refreshed else self.shadows.pair(self._module)
        state = {
            VERSION: EMA_STATE_VERSION,
            NUM_STEPS: self.num_steps,
            LAST_UPDATE: self._last_update,
            SETTINGS: dict(self.arguments),
        }
        averages = {
            label: {
                STARTED_AT: followed.started_at,
                START_SHARE: followed.start.value,
                DESCRIPTION: str(followed),
                PROFILE: {} if followed.profile is None else followed.profile.state_dict(),
                AVERAGE: self.shadows[label].state_dict(),
            }
            for label, followed in self._followed.items()
        }
        return {**state, **averages[SINGLE]} if averages.keys() == {SINGLE} else {**state, AVERAGES: averages}

    def names(self) -> dict[Tensor, str]:
        """The canonical name of each parameter that may be averaged."""
        self._refresh_groups()
        return {parameter: name for name, parameter in Inventory.of(self._module).parameters.items()}

    def from_entries(self, found: Entries) -> dict[str, Any]:
        """The state that :meth:`state_dict` returned, from its entries by parameter.

        Raises:
            ValueError: the entries hold no counters.
        """
        return state_of(found, self.names(), self.arguments, [str(each) for each in self._new().values()])

    def checked(self, state: Mapping[str, Any]) -> Checked:
        """Returns ``state`` in the current version, and what continues from it.

        Raises:
            ValueError: it does not fit.
        """
        state = upgraded(state)
        check_state(state)
        self._refresh_groups()
        saved = state[AVERAGES]
        wanted = {label: str(followed) for label, followed in self._new().items()}
        sources, remark = {label: label for label in wanted}, ''
        if saved.keys() != wanted.keys():
            continuation = continued(
                {label: each[DESCRIPTION] for label, each in saved.items()},
                wanted,
                'the saved state of EMAOptimizer',
                to_start_anew="call state.pop('ema') before load_state_dict(state)",
            )
            sources, remark = continuation.sources, continuation.remark
        followed, averages, lacking = {}, {}, []
        for label, source in sources.items():
            followed[label] = self._continuing(label, saved[source], state)
            averages[label], lacking = self._fitting(label, saved[source][AVERAGE])
        return Checked(state, followed, averages, lacking, remark)

    def _continuing(self, label: str, saved: Mapping[str, Any], state: Mapping[str, Any]) -> Followed:
        """What is known of the average ``label`` when it goes on from a saved one."""
        followed = Followed(copy.deepcopy(self._profiles[label]), StartShare(saved[START_SHARE]), saved[STARTED_AT])
        profile, memory = followed.profile, saved[PROFILE]
        own = {} if profile is None else profile.state_dict()
        if saved[DESCRIPTION] == str(followed) or memory.keys() == own.keys():
            _load_profile(profile, memory)
        elif profile is not None:  # written by another kind of profile: goes on as if by this one from the start
            profile.record(Moment(state[LAST_UPDATE], state[LAST_UPDATE], 0))
        return followed

    def _fitting(self, label: str, average: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
        """A saved average under the names of now, and the buffers it lacked, once it is known to fit."""
        if isinstance(self._module, ParameterGroups):
            average = renamed(average, self._module.positions)
        # A shadow without memory finds out whether the average fits, before the real one takes any value.
        outline = self.shadows[label].outline(self._module)
        outline.leave_out(self._still_to_join(label, outline, average))
        check_naming(average, [name for name, _ in outline.named_parameters()], self._module)
        average, lacking = self._with_buffers(average, outline)
        outline.load_state_dict(average)
        return average, lacking

    def _with_buffers(self, average: Mapping[str, Any], outline: ShadowModel) -> tuple[Mapping[str, Any], list[str]]:
        """A saved average with the model's buffers if it has none, and those of them that are averaged.

        An optimizer without ``model`` knows no buffers, so its state has none.
        """
        inventory = Inventory() if isinstance(self._module, ParameterGroups) else Inventory.of(self._module)
        tracked = {name for name, _ in outline.named_buffers()} & inventory.persistent
        averaged = [
            name
            for name, buffer in inventory.buffers.items()
            if name in tracked
            and is_inexact(buffer)
            and self._kept.averages_buffer(name, is_statistic=name in inventory.statistics)
        ]
        if not averaged or average.get('buffers') != {}:
            return average, []
        buffers = {name: buffer.detach() for name, buffer in inventory.buffers.items() if name in tracked}
        filled = {**average, 'buffers': buffers}
        stash = average.get(states.TRAINING_WEIGHTS)
        if isinstance(stash, Mapping):
            filled[states.TRAINING_WEIGHTS] = {**buffers, **stash}
        return filled, averaged

    def assign(self, checked: Checked, stacklevel: int, *, has_names: bool = False) -> None:
        """Takes over what :meth:`checked` returned. Warnings, at ``stacklevel``, name what differs and what lacked.

        Args:
            checked: what to take over.
            stacklevel: of the warnings.
            has_names: whether names have told which tensor is which where this optimizer itself knows none.
        """
        state = checked.state
        saved = {name: state[SETTINGS].get(name) for name in self.arguments}
        if checked.remark:
            warnings.warn(f'{checked.remark[0].upper()}{checked.remark[1:]}', stacklevel=stacklevel)
        elif saved != self.arguments:
            used = saved if state[SETTINGS] else 'other settings, of which only a digest was saved'
            warnings.warn(
                f'the saved average used {used}, this one uses {self.arguments}, and will from here on. '
                'Pass the saved settings to continue as before.',
                stacklevel=stacklevel,
            )
        if checked.lacking:
            warnings.warn(
                f'the saved average has no buffers, since it was saved by an optimizer without model=: the average of '
                f'{listed(checked.lacking)} starts at the values that the model has now. '
                'update_bn(model, loader, shadow=optimizer.shadow) recomputes the statistics of BatchNorm for the '
                'average.',
                stacklevel=stacklevel,
            )
        still_to_join: set[str] = set()
        for label, average in checked.averages.items():
            still_to_join |= self._still_to_join(label, self.shadows[label].outline(self._module), average)
        goes_by_position = isinstance(self._module, ParameterGroups) and not (self._module.has_names or has_names)
        if goes_by_position and not self._has_warned:
            self._has_warned = self._warn_of_positions(stacklevel + 1)
        self.shadows.resolve(self._module, joining=True)
        self.shadows.leave_out(still_to_join)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # the check has given these warnings already
            for label, average in checked.averages.items():
                self.shadows[label].load_state_dict(average)
        self.num_steps, self._last_update = state[NUM_STEPS], state[LAST_UPDATE]
        self._followed = {**self._new(), **checked.followed}
        self._returned = None
        for label, average in checked.averages.items():
            if states.TRAINING_WEIGHTS in average:
                self._return_weights(self.shadows[label])
        if new := [label for label in self.shadows if label not in checked.averages]:
            returned = self._returned
            for label in new:
                self._followed[label].started_at = self._last_update
            self._copy_weights(new)
            self._returned = returned

    def _return_weights(self, shadow: ShadowModel) -> None:
        """Puts the training weights of a loaded state back into the model, and notes them."""
        shadow.swap_out(self._module)
        tracked = shadow.training_weights(self._module)
        self._returned = {name: tracked[name].clone() for name, _ in shadow.named_parameters()}

    def _warn_of_positions(self, stacklevel: int) -> bool:
        """Warns where the shapes do not tell whether the saved parameters had the same order."""
        shapes = Counter(tuple(tensor.shape) for tensor in next(iter(self.shadows.values())).parameters())
        alike = sum(count for count in shapes.values() if count > 1)
        if alike:
            warnings.warn(
                f'the saved average is taken over by position, and {alike} of {shapes.total()} parameters share their '
                'shape with others: in another order than in the saved run, each would get the average of another. '
                'To go by name, build EMAOptimizer with model=, or the wrapped optimizer from model.named_parameters() '
                '(torch 2.6).',
                stacklevel=stacklevel,
            )
        return alike > 0

    def refuse_overwritten(self) -> None:
        """Raises if the model has got an average again after a loaded state had put the training weights back."""
        returned, self._returned = self._returned, None
        if returned is None:
            return
        for shadow in self.shadows.values():
            live = shadow.training_weights(self._module)
            average = {name: tensor for name, tensor in shadow.named_parameters() if name in live}
            if _are_equal(live, average) and not _are_equal(live, returned):
                self._returned = returned
                raise RuntimeError(
                    'the model holds the average, not its training weights: the checkpoint was saved while the average '
                    'was swapped in, and the optimizer, which put the training weights back, was loaded before the '
                    'model. Load the model first, then the optimizer.'
                )

    def _still_to_join(self, label: str, outline: ShadowModel, average: Mapping[str, Any]) -> set[str]:
        """What the next update will take in, and the saved average does not know either."""
        kinds = [average.get(kind) for kind in ('parameters', 'buffers')]
        saved = {name for kind in kinds if isinstance(kind, Mapping) for name in kind}
        tracked = {name for name, _ in (*self.shadows[label].named_parameters(), *self.shadows[label].named_buffers())}
        return {n for n, _ in (*outline.named_parameters(), *outline.named_buffers())} - tracked - saved

    def _has_to_start(self, label: str) -> bool:
        """Whether the average starts with its first update, and that is still to come."""
        return self.shadows[label].num_updates == 0 and self._followed[label].starts_with_an_update

    def _new(self) -> dict[str, Followed]:
        return {label: Followed(copy.deepcopy(profile)) for label, profile in self._profiles.items()}

    def _copy_weights(self, labels: Collection[str]) -> None:
        """Makes some of the averages the weights, as no update of theirs."""
        self._refresh_groups()
        self._returned = None  # the average is made of the weights, so they hold no other
        if len(labels) < len(self.shadows):
            for label in labels:
                self._copy_into(self.shadows[label])
            return
        for shadow in self.shadows.values():
            shadow.num_updates = 0  # the update of a user's function copies then
        self._update(dict.fromkeys(self.shadows, 1.0))
        for shadow in self.shadows.values():
            shadow.num_updates = 0

    @torch.no_grad()
    def _copy_into(self, shadow: ShadowModel) -> None:
        """Makes one average the weights and leaves the others alone, their copied buffers as well."""
        weights = shadow.training_weights(self._module)
        for name, tensor in (*shadow.named_parameters(), *shadow.named_buffers()):
            if name in weights and weights[name].shape == tensor.shape:
                local(tensor).copy_(share_of(weights[name], tensor))
        shadow.num_updates = 0

    def _update(self, weights: Mapping[str, float]) -> None:
        """Moves every average by its weight, or by the user's function."""
        if self._kept.has_function:
            self.shadows.update(self._module)
        else:
            self.shadows.update(self._module, weight=weights)

    def _refresh_groups(self) -> None:
        if isinstance(self._module, ParameterGroups):
            self._module.refresh()


def _shadows(module: nn.Module, labels: Sequence[str], kept: Settings) -> ShadowModels:
    settings = kept.as_arguments()
    if list(labels) == [SINGLE]:
        return ShadowModels.of_one(SINGLE, ShadowModel(module, overlap=True, **settings))
    return ShadowModels(module, labels, overlap=True, **settings)


def _level_of_caller() -> int:
    """The stack level, for a warning of the function that asks, of the code that called this package."""
    frame, level = sys._getframe(1), 1
    while frame is not None and frame.f_globals.get('__name__', '').partition('.')[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    return level


def _load_profile(profile: Profile | None, memory: Mapping[str, Any]) -> None:
    try:
        if profile is None:
            check_numbers(memory, ())
        else:
            profile.load_state_dict(memory)
    except ValueError as error:
        raise ValueError(f'{error} Nothing was loaded.') from error


def check_covered(module: nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises unless the average can cover every parameter of ``groups``.

    Args:
        module: the model, or the groups themselves where it is not known.
        groups: of the optimizer.

    Raises:
        NotImplementedError: a parameter is sharded in a way that cannot be averaged.
        ValueError: ``module`` lacks some of them, or they are sharded and the model is not known.
    """
    if isinstance(module, ParameterGroups):
        _refuse_shards_without_model(groups)
        return
    known = {id(parameter) for parameter in Inventory.of(module).parameters.values()}
    unknown = [
        f'{index}.{position}'
        for index, group in enumerate(groups)
        for position, entry in enumerate(group['params'])
        if id(tensor_of(entry)) not in known
    ]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of the optimizer's parameters are not in the model, by group and position: "
            f'{listed(unknown)}. Pass the model that the optimizer was built for, or leave model out.'
        )


def _refuse_shards_without_model(groups: Sequence[Mapping[str, Any]]) -> None:
    tensors = {
        f'{index}.{position}': tensor_of(entry)
        for index, group in enumerate(groups)
        for position, entry in enumerate(group['params'])
    }
    refuse_placeholders(tensors)
    if shards := [place for place, tensor in tensors.items() if is_shard(tensor)]:
        raise ValueError(
            f"{len(shards)} of the optimizer's parameters are sharded by FSDP2 or tensor parallelism, by group and "
            f'position: {listed(shards)}. Their average must follow the model, which has other tensors in their place '
            'after some forwards. Build EMAOptimizer(optimizer, model=model).'
        )


def _are_equal(live: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether all ``others`` are the live tensors, in their dtype. A collective call where these are sharded."""
    if any(name not in live or live[name].shape != other.shape for name, other in others.items()):
        return False
    return not any_nonzero(difference(live[name], other) for name, other in others.items())


def tensor_of(entry: Tensor | tuple[str, Tensor]) -> Tensor:
    """The tensor of an entry of ``params``, which may come with its name."""
    return entry[1] if isinstance(entry, tuple) else entry
