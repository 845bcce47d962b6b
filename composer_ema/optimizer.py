"""An optimizer that averages the weights after each of its steps, for training loops without a Trainer.

Invariants: the wrapped optimizer writes only after the last update has read the weights; a step that did not happen is
not averaged.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

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
from composer_ema.model.sharding import refuse_sharded, unwrap
from composer_ema.model.untraced import aside, is_traced, untraced
from composer_ema.settings import OptimizerSettings, Settings, takes_settings
from composer_ema.shadow import state as states
from composer_ema.shadow.interrupts import Block
from composer_ema.shadow.shadow_model import ShadowModel
from composer_ema.wording import counted
from composer_ema.wrapper import OptimizerWrapper, ParameterGroups

#: Version of what :meth:`EMAOptimizer.ema_state_dict` returns. Version 1 is still read.
EMA_STATE_VERSION = 2

DEFAULT_DECAY = 0.9999

_EMA = 'ema'
_VERSION, _NUM_STEPS, _LAST_UPDATE, _STARTED_AT, _SETTINGS, _PROFILE, _AVERAGE = (
    'version', 'num_steps', 'last_update', 'started_at', 'settings', 'profile', 'average'
)  # fmt: skip
_POSITION = re.compile(r'\d+\.\d+', re.ASCII)
# Settings that a state of version 1 may lack, and the values that were in force then.
_DEFAULT_SETTINGS = {'average': 'exponential', 'start': 0}


@takes_settings
class EMAOptimizer(OptimizerWrapper):
    """Wraps an optimizer and averages the weights after each of its steps::

        average += (1 - decay ** n) * (weights - average)      # n steps after the last update

    The average starts from the weights before the first step, and from the buffers as the first batch left them. On
    CUDA each update runs on a side stream and is joined before the next step writes: after the closure's first call if
    there is a closure. Joining does not block the host. Before you write the weights between two steps, call
    :meth:`wait`.

    ``param_groups``, ``state`` and ``defaults`` are the wrapped optimizer's own objects, so schedulers, gradient
    scalers and clipping work on either. Two kinds of step are not averaged: one that a ``GradScaler`` skips, and the
    one on zero gradients that ``torch.distributed.checkpoint.state_dict`` makes to build an empty state. With a fused
    optimizer under a ``GradScaler``, and only then, the host waits for the number that says whether the step was
    skipped. ``torch.compile`` compiles the wrapped optimizer's step and leaves the average to run eagerly after it.

    Args:
        optimizer: the optimizer that moves the weights. Call the wrapper's ``step`` in its place.
        device: where the average lives. Default: beside each tensor.
        decay: share of the old average that one step keeps, in [0, 1]: 0 copies, 1 freezes. Default: 0.9999.
        every_n_steps: steps between two updates, at least 1. The weight is compensated, so a larger number only saves
            work. Default: 1.
        half_life: number of steps after which a weight's share has halved, at least 0; 0 averages nothing. Replaces
            ``decay``.
        model: the model whose parameters ``optimizer`` moves. The average then has the model's names and covers its
            buffers. Default: names are those that the optimizer was given, as by ``SGD(model.named_parameters())`` of
            torch 2.6. Without these, names are group and position; ``'0.3'`` is the fourth parameter of the first
            group, and the order of the parameters must be the same when a state is loaded.
        power: width of a power function average as a share of the steps so far, above 0 and at most 0.2887. Replaces
            ``decay``; see :class:`composer_ema.averages.Power`. The first update copies.
        bias_correction: divides each weight by one minus the product of all decays so far. The average forgets where
            it started, and the first update copies. Default: False.
        average: ``'exponential'``, or ``'equal'`` for the mean of the weights after every ``every_n_steps`` steps:
            ``average += (weights - average) / (n + 1)``, where n counts earlier updates. The first update copies.
            ``'equal'`` excludes ``decay``, ``half_life``, ``power`` and ``bias_correction``. Default:
            ``'exponential'``.
        start: the first step to average, at least 0; if no update is due then, the next step that is due. The first
            update copies, and until then the average is the weights. Default: 0, an average from the beginning.
        settings: which tensors to average and how: ``buffers``, ``include``, ``exclude``, ``dtype``,
            ``skip_nonfinite``, ``rounding``, ``compensated``, ``seed``, ``backend``, and ``avg_fn`` or ``multi_avg_fn``
            in place of ``average``; see :class:`composer_ema.settings.Settings`.

    Raises:
        NotImplementedError: a parameter is sharded by FSDP or tensor parallelism.
        TypeError: an argument has the wrong type or is unknown.
        ValueError: an argument is out of range, has no effect or contradicts another one, or ``model`` lacks some of
            the optimizer's parameters.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 4.0)
        >>> optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), decay=0.5)
        >>> model.weight.grad = torch.full((1, 1), 2.0)
        >>> optimizer.step()
        >>> model.weight.item()
        2.0
        >>> with optimizer.swap_ema_weights():
        ...     model.weight.item()
        3.0
    """

    def __init__(
        self,
        optimizer: Optimizer,
        device: torch.device | str | None = None,
        decay: float = DEFAULT_DECAY,
        every_n_steps: int = 1,
        *,
        half_life: float | None = None,
        power: float | None = None,
        model: nn.Module | None = None,
        bias_correction: bool = False,
        average: Literal['exponential', 'equal'] = 'exponential',
        start: int = 0,
        **settings: Unpack[OptimizerSettings],
    ) -> None:
        if isinstance(optimizer, EMAOptimizer):
            raise TypeError(
                'the optimizer is an EMAOptimizer already. For a second average keep a ShadowModel beside it and '
                'update that after each step.'
            )
        super().__init__(optimizer)
        kept = Settings.of({'device': device, **settings})
        _check_average(average, kept.function_name, {
            'decay': None if decay == DEFAULT_DECAY else decay,
            'half_life': half_life,
            'power': power,
            'bias_correction': bias_correction or None,
        })  # fmt: skip
        if half_life is not None and decay != DEFAULT_DECAY:
            raise ValueError(f'pass either half_life or decay, got half_life={half_life} and decay={decay}.')
        if power is not None:
            _check_power_alone(power, None if decay == DEFAULT_DECAY else decay, half_life, bias_correction)
        if not isinstance(bias_correction, bool):
            raise TypeError(f'bias_correction must be True or False, got {bias_correction!r}.')
        if model is None and kept.buffers != 'statistics':
            raise ValueError(f'buffers={kept.buffers!r} has no effect: without a model there are none. Pass model=.')
        is_by_decay = half_life is None and power is None and average == 'exponential' and not kept.has_function
        arguments = {
            'decay': _plain(decay) if is_by_decay else None,
            'half_life': _plain(half_life),
            'power': _plain(power),
            'every_n_steps': _check_interval(every_n_steps),
            'bias_correction': bias_correction,
            'average': kept.function_name or average,
            'start': _check_start(start),
        }
        self._module = ParameterGroups(optimizer) if model is None else unwrap(model)
        self._average = _StepAverage(arguments, kept, self._module, optimizer.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer. Its parameters join the average at the next update, at their value.

        Args:
            param_group: ``'params'`` and the options that differ from the optimizer's defaults.

        Raises:
            NotImplementedError: a parameter is sharded. Nothing was added.
            ValueError: a parameter does not belong to ``model``. Nothing was added.
        """
        parameters = param_group['params']
        # A list, since a generator can be read only once.
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        refuse_sharded({f'{len(self.param_groups)}.{i}': _tensor_of(entry) for i, entry in enumerate(parameters)})
        if not isinstance(self._module, ParameterGroups):
            _check_covered(self._module, [*self.param_groups, {'params': parameters}])
        super().add_param_group({**param_group, 'params': parameters})

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[..., Any] | None = None
    ) -> Any:
        """Takes one step of the wrapped optimizer and then, every ``every_n_steps``, updates the average.

        Hooks registered here run once, with this optimizer: pre-hooks before the step, post-hooks between the step and
        the update, so their changes to the weights are averaged. Hooks of the wrapped optimizer, and those registered
        for all optimizers, run around the wrapped optimizer's step, with the wrapped optimizer.

        Args:
            closure: recomputes the loss, for optimizers that need it.

        Returns:
            What the wrapped optimizer returns.

        Raises:
            RuntimeError: the model holds this average or another, be it that a checkpoint which was saved like that was
                loaded into the optimizer first and into the model afterwards.
        """
        return super().step(closure)

    def wait(self) -> None:
        """Orders the current stream after the last update; see :meth:`ShadowModel.wait`. Does nothing on a CPU."""
        self._average.shadow.wait()

    @property
    def num_steps(self) -> int:
        """Number of steps that the average has followed; skipped steps do not count."""
        return self._average.num_steps

    @property
    def shadow(self) -> ShadowModel:
        """The average. Before the first step, and before ``start``, it holds the current weights."""
        if not self._average.shadow.is_swapped:
            self._average.refresh()
        return self._average.shadow

    @untraced
    def swap_ema_weights(self, enabled: bool = True) -> AbstractContextManager[None]:
        """Puts the average into the model for the block, then restores every bit of the training weights.

        After an interrupt, too; see :meth:`ShadowModel.swapped`.

        Args:
            enabled: whether to swap at all. Default: True.

        Raises:
            RuntimeError: the model holds the average already.
        """
        if not enabled:
            return nullcontext()
        shadow = self._average.shadow
        lent = shadow.swapped(self._module)

        def enter() -> None:
            if shadow.is_swapped:
                raise RuntimeError(
                    'the model holds the average already. Leave the outer swap_ema_weights block first, or pass '
                    'enabled=False to the inner one.'
                )
            self._average.refresh()
            lent.__enter__()

        return Block(enter, functools.partial(lent.__exit__, None, None, None))

    @untraced
    def ema_state_dict(self) -> dict[str, Any]:
        """Returns the average and its counters in plain types; tensors alias the average.

        For checkpoints that keep only ``state`` and ``param_groups`` of an optimizer, as those of
        ``torch.distributed.checkpoint.state_dict`` do. While the model holds the average, the training weights are in
        the state too, aliased.
        """
        return self._average.state_dict()

    def averaged_state_dict(self) -> dict[str, Any]:
        """The state dict that the model would have with the average in it; all copies, with the model's own names.

        See :meth:`ShadowModel.averaged_state_dict`. The optimizer must have been built with ``model``, whose names
        these are.

        Raises:
            ValueError: it was built without.
        """
        if isinstance(self._module, ParameterGroups):
            raise ValueError(
                'without the model the optimizer does not know the names of the parameters. Build it as '
                'EMAOptimizer(optimizer, model=model), or copy model.state_dict() inside swap_ema_weights().'
            )
        return self.shadow.averaged_state_dict(self._module)

    @untraced
    def load_ema_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what :meth:`ema_state_dict` returned. This object keeps its own settings, and warns if they differ.

        A state that was taken while the model held the average puts the training weights back into the model. Load the
        model first: its part of such a checkpoint holds the average.

        Args:
            state: of this release, or of one that wrote version 1. Not changed.

        Raises:
            RuntimeError: the model holds the average.
            ValueError: the state does not fit. Nothing was loaded.
        """
        self._refuse_while_swapped('load_ema_state_dict()')
        self._average.shadow.refuse_on_loan(self._module)
        self._average.assign(*self._average.checked(state), stacklevel=4)

    @untraced
    def state_dict(self) -> dict[str, Any]:
        """Returns the wrapped optimizer's state, which that can load by itself, and under ``'ema'`` the average.

        While the model holds the average, the training weights are in the state too, and ``model.state_dict()`` is
        that of the average: whoever saves both then, as at a preemption, resumes from them as from any other pair.
        """
        return super().state_dict()

    @untraced
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned; training continues bit for bit.

        The state of a bare optimizer loads too: a warning says so, and a new average starts from the weights before
        the next step. A state that was taken while the model held the average puts the training weights back into the
        model. Load the model first: its part of such a checkpoint holds the average. After an error neither the
        optimizer nor the average has changed.

        The state of an optimizer without ``model`` has no buffers. With ``model``, their average then starts at the
        model's values, with a warning.

        Args:
            state_dict: not changed.

        Raises:
            RuntimeError: the model holds the average.
            ValueError: the state does not fit.
        """
        self._refuse_while_swapped('load_state_dict()')
        self._average.shadow.refuse_on_loan(self._module)
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: everything but the hooks; the model is copied too."""
        self._refuse_while_swapped('copying')
        self.wait()
        return super().__getstate__()

    def __repr__(self) -> str:
        arguments = ', '.join(f'{name}={value}' for name, value in self._average.arguments.items() if value is not None)
        return f'{type(self).__name__} ({arguments}, {counted(self.num_steps, "step")}) of {self._optimizer!r}'

    def _refuse_while_swapped(self, what: str) -> None:
        if self._average.shadow.is_swapped:
            raise RuntimeError(
                f'{what} needs the training weights, but the model holds the average. '
                'Leave the swap_ema_weights block first.'
            )

    def _before_step(self) -> None:
        if is_traced():
            aside(EMAOptimizer._before_step, self)
            return
        self._refuse_while_swapped('step()')
        self._average.shadow.refuse_on_loan(self._module)
        self._average.refuse_overwritten()
        self._average.start()

    def _before_write(self) -> None:
        self._average.shadow.wait_for_reads()

    def _after_step(self) -> None:
        if is_traced():
            aside(EMAOptimizer._after_step, self)
            return
        self._average.follow()

    def _saved(self) -> dict[str, Any]:
        return {**super()._saved(), _EMA: self.ema_state_dict()}

    def _load(self, state: dict[str, Any]) -> None:
        ema = state.pop(_EMA, None)
        checked = None if ema is None else self._average.checked(ema)
        super()._load(state)
        if checked is not None:
            self._average.assign(*checked, stacklevel=6)
            return
        warnings.warn(
            'the loaded state has no average: it was saved by a bare optimizer, or without its ema_state_dict(). '
            'A new average starts from the weights before the next step. If you have the old one, pass it to '
            'load_ema_state_dict().',
            stacklevel=5,
        )
        self._average.reset()


class _StepAverage:
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
        _check_covered(module, groups)
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
            _VERSION: EMA_STATE_VERSION,
            _NUM_STEPS: self.num_steps,
            _LAST_UPDATE: self._last_update,
            _STARTED_AT: self._started_at,
            _SETTINGS: dict(self.arguments),
            _PROFILE: self._rule.state_dict(),
            _AVERAGE: self.shadow.state_dict(),
        }

    def checked(self, state: Mapping[str, Any]) -> tuple[Mapping[str, Any], _ByProfile | _ByFunction, list[str]]:
        """Returns ``state`` in the current version, the rule that continues from it, and the buffers it lacked.

        Raises:
            ValueError: it does not fit.
        """
        state = _upgraded(state)
        _check_state(state)
        self._refresh_groups()
        if isinstance(self._module, ParameterGroups):
            state = {**state, _AVERAGE: _renamed(state[_AVERAGE], self._module.positions)}
        rule = self._new_rule()
        if state[_SETTINGS] == self.arguments or state[_PROFILE].keys() == rule.state_dict().keys():
            _load_profile(rule, state[_PROFILE])
        else:  # written by another kind of profile
            rule.catch_up(state[_LAST_UPDATE])
        # A shadow without memory finds out whether the average fits, before the real one takes any value.
        outline = self.shadow.outline(self._module)
        outline.leave_out(self._still_to_join(outline, state[_AVERAGE]))
        _check_naming(state[_AVERAGE], [name for name, _ in outline.named_parameters()], self._module)
        average, lacking = self._with_buffers(state[_AVERAGE], outline)
        outline.load_state_dict(average)
        return {**state, _AVERAGE: average}, rule, lacking

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
        saved = {name: state[_SETTINGS].get(name) for name in self.arguments}
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
        still_to_join = self._still_to_join(outline, state[_AVERAGE])
        if isinstance(self._module, ParameterGroups) and not self._module.has_names and not self._has_warned:
            self._has_warned = self._warn_of_positions(stacklevel + 1)
        self.shadow.resolve(self._module, joining=True)
        self.shadow.leave_out(still_to_join)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # the check has given these warnings already
            self.shadow.load_state_dict(state[_AVERAGE])
        self.num_steps, self._last_update, self._rule = state[_NUM_STEPS], state[_LAST_UPDATE], rule
        self._started_at = state[_STARTED_AT]
        self._returned = None
        if states.TRAINING_WEIGHTS in state[_AVERAGE]:
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


def _check_average(average: str, function: str | None, without_effect: Mapping[str, Any]) -> None:
    """Raises unless ``average`` is known, and comes without what has no effect on it."""
    if average not in ('exponential', 'equal'):
        raise ValueError(
            f"average must be 'exponential' or 'equal', got {average!r}. For any other pass avg_fn or multi_avg_fn."
        )
    if function is None and average == 'exponential':
        return
    if function is not None and average != 'exponential':
        raise ValueError(f'pass either average={average!r} or a function, got both.')
    kind = 'an average by a function of yours' if function is not None else 'an equal average'
    for name, value in without_effect.items():
        if value is not None:
            raise ValueError(f'{name}={value} has no effect on {kind}. Leave it out.')


def _check_power_alone(power: float, decay: float | None, half_life: float | None, bias_correction: bool) -> None:
    for name, value in (('decay', decay), ('half_life', half_life)):
        if value is not None:
            raise ValueError(f'pass either power or {name}, got power={power} and {name}={value}.')
    if bias_correction:
        raise ValueError(
            f'bias_correction has no effect on a power average, got power={power}: it forgets where it started anyway. '
            'Leave bias_correction out.'
        )


def _plain(number: Any) -> Any:
    """A number of another library as Python's own, so that ``torch.load(weights_only=True)`` reads it."""
    return float(number) if isinstance(number, Real) and not isinstance(number, int) else number


def _check_start(start: int) -> int:
    if isinstance(start, bool) or not isinstance(start, int):
        raise TypeError(f'start must be a whole number of steps, got {start!r}.')
    if start < 0:
        raise ValueError(f'start must be at least 0 steps, got {start}. 0 averages from the beginning.')
    return start


def _check_interval(every_n_steps: int) -> int:
    if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int):
        raise TypeError(f'every_n_steps must be a whole number of at least 1, got {every_n_steps!r}.')
    if every_n_steps < 1:
        raise ValueError(f'every_n_steps must be at least 1, got {every_n_steps}. To freeze the average pass decay=1.')
    return every_n_steps


def _check_covered(module: nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises unless ``module`` has every parameter of ``groups``, unsharded."""
    refuse_sharded(dict(module.named_parameters()))
    known = {id(parameter) for parameter in module.parameters()}
    unknown = [
        f'{index}.{position}'
        for index, group in enumerate(groups)
        for position, entry in enumerate(group['params'])
        if id(_tensor_of(entry)) not in known
    ]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of the optimizer's parameters are not in the model, by group and position: "
            f'{listed(unknown)}. Pass the model that the optimizer was built for, or leave model out.'
        )


def _are_equal(live: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return all(name in live and torch.equal(live[name], other.to(live[name])) for name, other in others.items())


def _tensor_of(entry: Tensor | tuple[str, Tensor]) -> Tensor:
    """The tensor of an entry of ``params``, which may come with its name."""
    return entry[1] if isinstance(entry, tuple) else entry


def _upgraded(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns ``state`` in the current version, or raises a ValueError. Version 1 had one number for all profiles."""
    version = state.get(_VERSION) if isinstance(state, Mapping) else None
    if type(version) is not int or version not in (1, EMA_STATE_VERSION):
        raise ValueError(
            f'the state has format version {version!r}, this release reads 1 and {EMA_STATE_VERSION}. '
            'Nothing was loaded.'
            + (' Pass what ema_state_dict() returned; this is something else.' if version is None else '')
        )
    if version == EMA_STATE_VERSION:
        return state
    log_kept, settings = state.get('log_kept'), state.get(_SETTINGS)
    if not isinstance(log_kept, float) or not log_kept <= 0:
        raise ValueError(f"the state's 'log_kept' is {log_kept!r}, not a number of at most 0. Nothing was loaded.")
    if not isinstance(settings, Mapping):
        raise ValueError(f"the state's 'settings' is a {type(settings).__name__}, not a Mapping. Nothing was loaded.")
    return {
        **{name: value for name, value in state.items() if name != 'log_kept'},
        _VERSION: EMA_STATE_VERSION,
        _STARTED_AT: 0,  # the age of an average does not matter to the profiles of version 1
        _SETTINGS: {**_DEFAULT_SETTINGS, **settings},
        _PROFILE: {'log_kept': log_kept} if settings.get('bias_correction') else {},
    }


def _check_state(state: Mapping[str, Any]) -> None:
    """Raises a ValueError unless every entry of ``state`` has the right kind and range; the average checks itself."""
    kinds: dict[str, Any] = dict.fromkeys((_NUM_STEPS, _LAST_UPDATE, _STARTED_AT), int)
    kinds |= dict.fromkeys((_SETTINGS, _PROFILE, _AVERAGE), Mapping)
    for key, kind in kinds.items():
        if not isinstance(value := state.get(key), kind) or isinstance(value, bool):
            raise ValueError(
                f"the state's {key!r} is a {type(value).__name__}, not a {kind.__name__}. Nothing was loaded."
            )
    if not 0 <= state[_LAST_UPDATE] <= state[_NUM_STEPS]:
        raise ValueError(
            f'the state has its last update at step {state[_LAST_UPDATE]} of {state[_NUM_STEPS]}; the update must lie '
            'in [0, steps]. Nothing was loaded.'
        )
    if not 0 <= state[_STARTED_AT] <= state[_LAST_UPDATE]:
        raise ValueError(
            f'the state has its start at step {state[_STARTED_AT]} and its last update at step {state[_LAST_UPDATE]}; '
            'the start must lie in [0, last update]. Nothing was loaded.'
        )


def _check_naming(average: Mapping[str, Any], names: Sequence[str], module: nn.Module) -> None:
    """Raises a ValueError if names are loaded where there is only position, or positions where there are names."""
    saved = average.get('parameters')
    if not isinstance(saved, Mapping) or not saved or not names or not saved.keys().isdisjoint(names):
        return
    is_numbered = all(isinstance(name, str) and _POSITION.fullmatch(name) for name in saved)
    shown = listed(sorted(map(str, saved)), limit=3)
    if isinstance(module, ParameterGroups) and not module.has_names and not is_numbered:
        raise ValueError(
            f'the saved average has the names of its parameters, {shown}, and this optimizer knows only their order. '
            'Build EMAOptimizer with model=, or the wrapped optimizer from model.named_parameters() (torch 2.6). '
            'Nothing was loaded.'
        )
    if not isinstance(module, ParameterGroups) and is_numbered:
        raise ValueError(
            f'the saved average has no names, only group and position, {shown}: it was saved by an optimizer without '
            'model=, and this one goes by name. Build the wrapped optimizer from model.named_parameters() (torch 2.6) '
            'and leave model= out, which takes it over by position; what that saves has names. Nothing was loaded.'
        )


def _renamed(average: Mapping[str, Any], positions: Mapping[str, str]) -> Mapping[str, Any]:
    """A saved average under the names of now, where it was saved under group and position."""
    saved = average.get('parameters')
    if (
        not isinstance(saved, Mapping)
        or saved.keys() <= set(positions.values())
        or not saved.keys() <= positions.keys()
    ):
        return average
    kinds = [kind for kind in ('parameters', states.TRAINING_WEIGHTS) if isinstance(average.get(kind), Mapping)]
    return {
        **average,
        **{kind: {positions.get(name, name): tensor for name, tensor in average[kind].items()} for kind in kinds},
    }


def _load_profile(rule: _ByProfile | _ByFunction, state: Mapping[str, Any]) -> None:
    try:
        rule.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f'{error} Nothing was loaded.') from error
