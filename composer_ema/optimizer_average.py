"""The average that follows an optimizer: when its steps make an update, and by which rule."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from composer_ema.averages import (
    BiasCorrected,
    CopiesFirst,
    Equal,
    HalfLife,
    Moment,
    Power,
    Profile,
    Smoothing,
    check_numbers,
)
from composer_ema.kernels.rules import is_inexact
from composer_ema.model.inventory import Inventory
from composer_ema.model.names import listed
from composer_ema.model.sharding import refuse_sharded
from composer_ema.model.untraced import untraced
from composer_ema.optimizer_state import (
    AVERAGE,
    EMA_STATE_VERSION,
    LAST_UPDATE,
    NUM_STEPS,
    PROFILE,
    SETTINGS,
    STARTED_AT,
    VERSION,
    check_naming,
    check_state,
    renamed,
    upgraded,
)
from composer_ema.settings import Settings
from composer_ema.shadow import state as states
from composer_ema.shadow.shadow_model import ShadowModel
from composer_ema.wrapper import ParameterGroups


class StepAverage:
    """The average that follows an optimizer: it counts the steps and updates the shadow when an update is due.

    Args:
        arguments: EMAOptimizer's own, checked; they stand in the state.
        kept: what the shadow keeps and how.
        module: the parameters to average.
        groups: the optimizer's groups, whose parameters ``module`` must have.
    """

    def __init__(
        self, arguments: dict[str, Any], kept: Settings, module: nn.Module, groups: Sequence[Mapping[str, Any]]
    ) -> None:
        self.arguments = arguments
        self._kept = kept
        self._rule = self._new_rule()
        self._module = module
        check_covered(module, groups)
        self.shadow = ShadowModel(module, overlap=True, **kept.as_arguments())
        self.num_steps = 0
        self._last_update = 0
        self._started_at = 0
        #: Training weights that a loaded state has put back into the model, until the next step.
        self._returned: dict[str, Tensor] | None = None
        self._has_warned = False

    def start(self) -> None:
        """Before the first step, makes the average the weights, whenever those were loaded."""
        if self.num_steps > 0:
            return
        self._refresh_groups()
        if self.shadow.num_updates > 0:
            return  # the shadow was given an average, perhaps another library's, which goes on
        self._copy_weights()
        self.shadow.resolve(self._module)  # stochastic rounding counts from the num_updates of this moment

    @untraced
    def refresh(self) -> None:
        """Makes the average the weights, unless it has started."""
        if self.num_steps == 0:
            self.start()
        elif self._has_to_start:
            self._copy_weights()

    def follow(self) -> None:
        """Counts a step, and updates the average if an update is due."""
        self.num_steps += 1
        interval = self.arguments['every_n_steps']
        if self.num_steps % interval or self.num_steps < self.arguments['start']:
            return
        self._refresh_groups()
        if self._has_to_start:
            # The first update stands for as much time as each later one.
            self._last_update = self._started_at = self.num_steps - interval
        since_start = max(self.num_steps - self._started_at, self.num_steps - self._last_update)
        moment = Moment(self.num_steps - self._last_update, since_start, self.shadow.num_updates)
        self._rule.update(self.shadow, self._module, moment)
        self._last_update = self.num_steps

    def reset(self) -> None:
        """Forgets the average; a new one starts from the weights before the next step."""
        self.num_steps, self._last_update, self._started_at, self._rule = 0, 0, 0, self._new_rule()
        self.shadow.num_updates = 0
        self._returned = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the average and its counters; see :meth:`EMAOptimizer.ema_state_dict`."""
        if not self.shadow.is_swapped:
            self.refresh()
        return {
            VERSION: EMA_STATE_VERSION,
            NUM_STEPS: self.num_steps,
            LAST_UPDATE: self._last_update,
            STARTED_AT: self._started_at,
            SETTINGS: dict(self.arguments),
            PROFILE: self._rule.state_dict(),
            AVERAGE: self.shadow.state_dict(),
        }

    def checked(self, state: Mapping[str, Any]) -> tuple[Mapping[str, Any], _ByProfile | _ByFunction, list[str]]:
        """Returns ``state`` in the current version, the rule that continues from it, and the buffers it lacked.

        Raises:
            ValueError: it does not fit.
        """
        state = upgraded(state)
        check_state(state)
        self._refresh_groups()
        if isinstance(self._module, ParameterGroups):
            state = {**state, AVERAGE: renamed(state[AVERAGE], self._module.positions)}
        rule = self._new_rule()
        if state[SETTINGS] == self.arguments or state[PROFILE].keys() == rule.state_dict().keys():
            load_profile(rule, state[PROFILE])
        else:  # written by another kind of profile
            rule.catch_up(state[LAST_UPDATE])
        # A shadow without memory finds out whether the average fits, before the real one takes any value.
        outline = self.shadow.outline(self._module)
        outline.leave_out(self._still_to_join(outline, state[AVERAGE]))
        check_naming(state[AVERAGE], [name for name, _ in outline.named_parameters()], self._module)
        average, lacking = self._with_buffers(state[AVERAGE], outline)
        outline.load_state_dict(average)
        return {**state, AVERAGE: average}, rule, lacking

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

    def assign(
        self, state: Mapping[str, Any], rule: _ByProfile | _ByFunction, lacking: Sequence[str], stacklevel: int
    ) -> None:
        """Takes over what :meth:`checked` returned. Warnings, at ``stacklevel``, name what differs and what lacked."""
        saved = {name: state[SETTINGS].get(name) for name in self.arguments}
        if saved != self.arguments:
            warnings.warn(
                f'the saved average used {saved}, this one uses {self.arguments}, and will from here on. '
                'Pass the saved settings to continue as before.',
                stacklevel=stacklevel,
            )
        if lacking:
            warnings.warn(
                f'the saved average has no buffers, since it was saved by an optimizer without model=: the average of '
                f'{listed(lacking)} starts at the values that the model has now. '
                'update_bn(model, loader, shadow=optimizer.shadow) recomputes the statistics of BatchNorm for the '
                'average.',
                stacklevel=stacklevel,
            )
        outline = self.shadow.outline(self._module)
        still_to_join = self._still_to_join(outline, state[AVERAGE])
        if isinstance(self._module, ParameterGroups) and not self._module.has_names and not self._has_warned:
            self._has_warned = self._warn_of_positions(stacklevel + 1)
        self.shadow.resolve(self._module, joining=True)
        self.shadow.leave_out(still_to_join)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # the check has given these warnings already
            self.shadow.load_state_dict(state[AVERAGE])
        self.num_steps, self._last_update, self._rule = state[NUM_STEPS], state[LAST_UPDATE], rule
        self._started_at = state[STARTED_AT]
        self._returned = None
        if states.TRAINING_WEIGHTS in state[AVERAGE]:
            self.shadow.swap_out(self._module)
            tracked = self.shadow.training_weights(self._module)
            self._returned = {name: tracked[name].clone() for name, _ in self.shadow.named_parameters()}

    def _warn_of_positions(self, stacklevel: int) -> bool:
        """Warns where the shapes do not tell whether the saved parameters had the same order."""
        shapes = Counter(tuple(tensor.shape) for tensor in self.shadow.parameters())
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
        """Raises if the model has got the average again after a loaded state had put the training weights back."""
        returned, self._returned = self._returned, None
        if returned is None:
            return
        live = self.shadow.training_weights(self._module)
        average = {name: tensor.to(live[name]) for name, tensor in self.shadow.named_parameters() if name in live}
        if _are_equal(live, average) and not _are_equal(live, returned):
            self._returned = returned
            raise RuntimeError(
                'the model holds the average, not its training weights: the checkpoint was saved while the average was '
                'swapped in, and the optimizer, which put the training weights back, was loaded before the model. Load '
                'the model first, then the optimizer.'
            )

    def _still_to_join(self, outline: ShadowModel, average: Mapping[str, Any]) -> set[str]:
        """What the next update will take in, and the saved average does not know either."""
        kinds = [average.get(kind) for kind in ('parameters', 'buffers')]
        saved = {name for kind in kinds if isinstance(kind, Mapping) for name in kind}
        tracked = {name for name, _ in (*self.shadow.named_parameters(), *self.shadow.named_buffers())}
        return {n for n, _ in (*outline.named_parameters(), *outline.named_buffers())} - tracked - saved

    @property
    def _has_to_start(self) -> bool:
        """Whether the average starts with its first update, and that is still to come."""
        is_exponential = self.arguments['average'] == 'exponential' and not self._kept.has_function
        return (self.arguments['start'] > 0 or not is_exponential) and self.shadow.num_updates == 0

    def _new_rule(self) -> _ByProfile | _ByFunction:
        return _ByFunction() if self._kept.has_function else _ByProfile(_profile_of(self.arguments))

    def _copy_weights(self) -> None:
        self._refresh_groups()
        self._returned = None  # the average is made of the weights, so they hold no other
        self.shadow.num_updates = 0  # the update of a user's function copies then
        self._rule.copy(self.shadow, self._module)
        self.shadow.num_updates = 0

    def _refresh_groups(self) -> None:
        if isinstance(self._module, ParameterGroups):
            self._module.refresh()


class _ByProfile:
    """Updates with the weights that a profile chooses."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile

    def copy(self, shadow: ShadowModel, module: nn.Module) -> None:
        """Makes the average the weights."""
        shadow.update(module, weight=1.0)

    def update(self, shadow: ShadowModel, module: nn.Module, moment: Moment) -> None:
        """Updates the average; the profile records it."""
        shadow.update(module, weight=self._profile.weight(moment))
        self._profile.record(moment)

    def catch_up(self, num_steps: int) -> None:
        """Continues an average of ``num_steps`` steps that another profile has made, as if by this one."""
        self._profile.record(Moment(num_steps, num_steps, 0))

    def state_dict(self) -> dict[str, float]:
        """Returns what the profile remembers."""
        return self._profile.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned, or raises a ValueError."""
        self._profile.load_state_dict(state)


class _ByFunction:
    """Updates by the user's function, which needs no weight: the shadow passes it the number of updates."""

    def copy(self, shadow: ShadowModel, module: nn.Module) -> None:
        """Makes the average the weights; ``shadow.num_updates`` must be 0."""
        shadow.update(module)

    def update(self, shadow: ShadowModel, module: nn.Module, moment: Moment) -> None:
        """Updates the average."""
        del moment
        shadow.update(module)

    def catch_up(self, num_steps: int) -> None:
        """Does nothing: a function sees the average itself."""

    def state_dict(self) -> dict[str, float]:
        """Returns an empty state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises a ValueError unless ``state`` is empty."""
        check_numbers(state, ())


def _profile_of(arguments: Mapping[str, Any]) -> Profile:
    if arguments['average'] == 'equal':
        return Equal('steps')
    if arguments['power'] is not None:
        return Power(arguments['power'], 'steps')
    if arguments['half_life'] is None:
        exponential = Smoothing(arguments['decay'], 'steps', 'decay')
    else:
        exponential = HalfLife(arguments['half_life'], 'steps')
    profile = BiasCorrected(exponential) if arguments['bias_correction'] else exponential
    return CopiesFirst(profile) if arguments['start'] > 0 else profile


def check_covered(module: nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises unless ``module`` has every parameter of ``groups``, unsharded."""
    refuse_sharded(dict(module.named_parameters()))
    known = {id(parameter) for parameter in module.parameters()}
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


def _are_equal(live: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return all(name in live and torch.equal(live[name], other.to(live[name])) for name, other in others.items())


def tensor_of(entry: Tensor | tuple[str, Tensor]) -> Tensor:
    """The tensor of an entry of ``params``, which may come with its name."""
    return entry[1] if isinstance(entry, tuple) else entry


def load_profile(rule: _ByProfile | _ByFunction, state: Mapping[str, Any]) -> None:
    try:
        rule.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f'{error} Nothing was loaded.') from error
