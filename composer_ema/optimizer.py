"""An optimizer that averages the weights after each of its steps, for training loops without a Trainer.

Invariants: the wrapped optimizer writes only after the last update has read the weights; a step that did not happen is
not averaged.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from composer_ema import optimizer_entries, plain
from composer_ema.averages import CopiesFirst, Profile
from composer_ema.labelled import CHANGES, by_label, chosen, is_given
from composer_ema.model.sharding import refuse_placeholders
from composer_ema.model.untraced import aside, is_traced, untraced
from composer_ema.model.wrappers import refuse_other_ranks, unwrap
from composer_ema.optimizer_average import StepAverages, check_covered, tensor_of
from composer_ema.optimizer_state import SINGLE
from composer_ema.profiles import Kind, check_kind, refuse_without_effect
from composer_ema.settings import OptimizerSettings, Settings, takes_settings
from composer_ema.shadow.interrupts import Block
from composer_ema.shadow.shadow_model import ShadowModel
from composer_ema.shadow.shadow_models import ShadowModels
from composer_ema.wording import counted, shown
from composer_ema.wrapper import OptimizerWrapper, ParameterGroups

DEFAULT_DECAY = 0.9999
# What a state keeps of arguments that were not given, where that is not None; and values that say so of an argument.
_NOT_KEPT: Mapping[str, Any] = {'average': 'exponential', 'bias_correction': False}
_NOT_GIVEN: Mapping[str, Any] = {'decay': DEFAULT_DECAY, **_NOT_KEPT}

_EMA = 'ema'


@takes_settings
class EMAOptimizer(OptimizerWrapper):
    """Wraps an optimizer and averages the weights after each of its steps::

        average += (1 - decay ** n) * (weights - average)      # n steps after the last update

    The average starts from the weights before the first step, and from the buffers as the first batch left them. On
    CUDA an update that moves a gibibyte or more runs on a side stream, and is joined before the next step writes: after
    the closure's first call if there is a closure. Joining does not block the host. Before you write the weights
    between two steps, call :meth:`wait`.

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
            buffers. Parameters that are sharded by FSDP2 or tensor parallelism need it: between two steps other tensors
            may stand in their place. Default: names are those that the optimizer was given, as by
            ``SGD(model.named_parameters())`` of torch 2.6. Without these, names are group and position; ``'0.3'`` is
            the fourth parameter of the first group, and the order of the parameters must be the same when a state is
            loaded.
        power: width of a power function average as a share of the steps so far, above 0 and at most 0.2887. Replaces
            ``decay``; see :class:`composer_ema.averages.Power`. The first update copies.
        gamma: instead of ``power``, the exponent that it stands for, at least 0.
        warmup: upper limit of the half-life as a share of the steps so far, above 0: 0.1 is a good value. The average
            soon forgets where it started, however long the half-life. Default: None, no limit.
        bias_correction: divides each weight by one minus the product of all decays so far. The average forgets where
            it started, and the first update copies. Excludes ``warmup``, which does the same. Default: False.
        average: ``'exponential'``, or ``'equal'`` for the mean of the weights after every ``every_n_steps`` steps:
            ``average += (weights - average) / (n + 1)``, where n counts earlier updates. The first update copies.
            ``'equal'`` excludes all of the above that choose or change an average. Default: ``'exponential'``.
        start: the first step to average, at least 0; the next update comes ``every_n_steps`` later. The first update
            copies, and until then the average is the weights. Default: 0, an average from the beginning.
        settings: which tensors to average and how: ``buffers``, ``include``, ``exclude``, ``dtype``,
            ``skip_nonfinite``, ``rounding``, ``compensated``, ``shard_over_ranks``, ``seed``, ``backend``, and
            ``avg_fn`` or ``multi_avg_fn`` in place of ``average``; see :class:`composer_ema.settings.Settings`.

    To keep several averages, map labels to values: ``half_life={'short': 100, 'long': 1000}``, in any of ``decay``,
    ``half_life``, ``power``, ``gamma`` and ``average`` at once; ``warmup`` and ``bias_correction`` are for all
    exponential ones, or for some by label. The weights are read once for all. ``swap_ema_weights(average='long')``,
    ``averaged_state_dict('long')`` and ``shadows['long']`` take one of them; without a label they take the first.

    Raises:
        NotImplementedError: a parameter is sharded by FSDP1 or DeepSpeed.
        TypeError: an argument has the wrong type or is unknown.
        ValueError: an argument is out of range, has no effect or contradicts another one, ``model`` lacks some of the
            optimizer's parameters, or is not given although they are sharded.

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

    # What a call of torch's checkpoint functions reads as ``state``, until it loads or a step is made.
    _shown: optimizer_entries.WithEntries | None = None

    def __init__(
        self,
        optimizer: Optimizer,
        device: torch.device | str | None = None,
        decay: float | Mapping[str, float] = DEFAULT_DECAY,
        every_n_steps: int = 1,
        *,
        half_life: float | Mapping[str, float] | None = None,
        power: float | Mapping[str, float] | None = None,
        gamma: float | Mapping[str, float] | None = None,
        model: nn.Module | None = None,
        warmup: float | Mapping[str, float] | None = None,
        bias_correction: bool | Mapping[str, bool] = False,
        average: Kind | Mapping[str, Literal['equal']] = 'exponential',
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
        if model is None and kept.buffers != 'statistics':
            raise ValueError(f'buffers={kept.buffers!r} has no effect: without a model there are none. Pass model=.')
        module = None if model is None else unwrap(model)  # refuses what is no module
        if model is not None and kept.shard_over_ranks:
            refuse_other_ranks(model)
        profile_arguments = {
            'half_life': half_life, 'decay': decay, 'power': power, 'gamma': gamma, 'average': average,
            'warmup': warmup, 'bias_correction': bias_correction,
        }  # fmt: skip
        remedy = '0 averages from the beginning.'
        start = plain.whole('start', start, remedy=remedy)
        remedy = 'To freeze the average pass decay=1.'
        every_n_steps = plain.whole('every_n_steps', every_n_steps, least=1, remedy=remedy)
        profiles, chosen = _profiles(profile_arguments, kept.function_name, copies_first=start > 0)
        arguments = {**chosen, 'every_n_steps': every_n_steps, 'start': start}
        self._module = ParameterGroups(optimizer) if module is None else module
        self._averages = StepAverages(arguments, profiles, kept, self._module, optimizer.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer. Its parameters join the average at the next update, at their value.

        Args:
            param_group: ``'params'`` and the options that differ from the optimizer's defaults.

        Raises:
            NotImplementedError: a parameter is sharded by FSDP1 or DeepSpeed. Nothing was added.
            TypeError: no dictionary with ``'params'``, or these are no tensors. Nothing was added.
            ValueError: a parameter does not belong to ``model``, or is sharded and ``model`` was not given. Nothing was
                added.
        """
        parameters = _params_of(param_group)
        refuse_placeholders({f'{len(self.param_groups)}.{i}': tensor_of(each) for i, each in enumerate(parameters)})
        check_covered(self._module, [*self.param_groups, {'params': parameters}])
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
        self._averages.shadows.wait()

    @property
    def num_steps(self) -> int:
        """Number of steps that the averages have followed; skipped steps do not count."""
        return self._averages.num_steps

    @property
    def shadows(self) -> ShadowModels:
        """All averages by label; a single one without a label is called ``'ema'``. See :attr:`shadow`."""
        if not self._averages.is_swapped:
            self._averages.refresh()
        return self._averages.shadows

    @property
    def shadow(self) -> ShadowModel:
        """The average, the first of several. Before the first step, and before ``start``, it holds the weights."""
        return next(iter(self.shadows.values()))

    @untraced
    def swap_ema_weights(self, enabled: bool = True, *, average: str | None = None) -> AbstractContextManager[None]:
        """Puts an average into the model for the block, then restores every bit of the training weights.

        After an interrupt, too; see :meth:`ShadowModel.swapped`. With ``shard_over_ranks`` every rank must enter the
        block, since entering gathers the average.

        Args:
            enabled: whether to swap at all. Default: True.
            average: label of the average. Default: the first, or only, one.

        Raises:
            RuntimeError: the model holds an average of this optimizer already.
            TypeError: ``enabled`` is neither True nor False.
            ValueError: no average is called so.

        Warns:
            UserWarning: the average still holds more than a hundredth of its start. Said once.
        """
        label = self._label(average)
        if not plain.flag('enabled', enabled):
            return nullcontext()
        lent = self._averages.shadows[label].swapped(self._module)

        def enter() -> None:
            if self._averages.is_swapped:
                raise RuntimeError(
                    'the model holds the average already. Leave the outer swap_ema_weights block first, or pass '
                    'enabled=False to the inner one.'
                )
            self._averages.refresh()
            self._averages.tell_of_start(label)
            lent.__enter__()

        return Block(enter, functools.partial(lent.__exit__, None, None, None))

    @untraced
    def ema_state_dict(self) -> dict[str, Any]:
        """Returns the averages and their counters in plain types; tensors alias the averages.

        For checkpoints that keep the average apart from the optimizer. While the model holds an average, the training
        weights are in the state too, aliased. Several averages stand in it under ``'averages'`` by their labels.
        """
        return self._averages.state_dict()

    def averaged_state_dict(self, average: str | None = None) -> dict[str, Any]:
        """The state dict that the model would have with an average in it; all copies, with the model's own names.

        See :meth:`ShadowModel.averaged_state_dict`. The optimizer must have been built with ``model``, whose names
        these are.

        Args:
            average: label of the average. Default: the first, or only, one.

        Raises:
            ValueError: it was built without, or no average is called so.

        Warns:
            UserWarning: the average still holds more than a hundredth of its start. Said once.
        """
        if isinstance(self._module, ParameterGroups):
            raise ValueError(
                'without the model the optimizer does not know the names of the parameters. Build it as '
                'EMAOptimizer(optimizer, model=model), or copy model.state_dict() inside swap_ema_weights().'
            )
        label = self._label(average)
        shadow = self.shadows[label]
        self._averages.tell_of_start(label)
        return shadow.averaged_state_dict(self._module)

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
        plain.mapping('state', state, 'Pass what ema_state_dict() returned.')
        self._refuse_while_swapped('load_ema_state_dict()')
        self._averages.shadows.refuse_on_loan(self._module)
        self._averages.assign(self._averages.checked(state), stacklevel=4)

    @untraced
    def state_dict(self) -> dict[str, Any]:
        """Returns the wrapped optimizer's state, which that can load by itself, and under ``'ema'`` the average.

        While the model holds the average, the training weights are in the state too, and ``model.state_dict()`` is
        that of the average: whoever saves both then, as at a preemption, resumes from them as from any other pair.

        The functions of ``torch.distributed.checkpoint.state_dict`` keep nothing but ``'state'`` and
        ``'param_groups'``. They get the average in ``'state'``, each tensor beside the ``exp_avg`` of its parameter,
        and put it back by name on any number of processes.

        With ``shard_over_ranks`` the state has this rank's pieces of the average, and ``torch.save`` refuses it. Call
        :func:`composer_ema.gather_state_dict` with it on every rank, and save what rank 0 gets.

        Raises:
            RuntimeError: one of those functions calls while the model holds an average.
        """
        return super().state_dict()

    @untraced
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned; training continues bit for bit.

        The state of a bare optimizer loads too: a warning says so, and a new average starts from the weights before
        the next step. A state that was taken while the model held the average puts the training weights back into the
        model. Load the model first: its part of such a checkpoint holds the average. After an error neither the
        optimizer nor the average has changed.

        Where the parameters are sharded, whole tensors of a state, as of
        :func:`composer_ema.gather_state_dict`, are cut alike; every rank must have them.

        The state of an optimizer without ``model`` has no buffers. With ``model``, their average then starts at the
        model's values, with a warning.

        Args:
            state_dict: not changed.

        Raises:
            RuntimeError: the model holds the average.
            ValueError: the state does not fit.
        """
        plain.mapping('state_dict', state_dict, 'Pass what state_dict() returned.')
        self._refuse_while_swapped('load_state_dict()')
        self._averages.shadows.refuse_on_loan(self._module)
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: everything but the hooks; the model is copied too."""
        self._refuse_while_swapped('copying')
        self.wait()
        return {**super().__getstate__(), '_shown': None}

    def __repr__(self) -> str:
        arguments = ', '.join(
            f'{name}={value}' for name, value in self._averages.arguments.items() if value is not None
        )
        return f'{type(self).__name__} ({arguments}, {counted(self.num_steps, "step")}) of {self._optimizer!r}'

    def _label(self, average: str | None) -> str:
        """The label that was given, or that of the first average."""
        labels = list(self._averages.shadows)
        return labels[0] if average is None else plain.label('average', average, labels)

    def _refuse_while_swapped(self, what: str) -> None:
        if self._averages.is_swapped:
            raise RuntimeError(
                f'{what} needs the training weights, but the model holds the average. '
                'Leave the swap_ema_weights block first.'
            )

    def _before_step(self) -> None:
        if is_traced():
            aside(EMAOptimizer._before_step, self)
            return
        self._shown = None
        self._refuse_while_swapped('step()')
        self._averages.shadows.refuse_on_loan(self._module)
        self._averages.refuse_overwritten()
        self._averages.start()

    def _before_write(self) -> None:
        self._averages.shadows.wait_for_reads()

    def _after_step(self) -> None:
        if is_traced():
            aside(EMAOptimizer._after_step, self)
            return
        self._averages.follow()

    def _shown_state(self) -> Any:
        state, asker = super()._shown_state(), optimizer_entries.asker()
        if asker is None:
            return state
        if self._shown is None or self._shown.asker is not asker:  # one call may ask for each parameter by itself
            self._shown = optimizer_entries.WithEntries(state, self._shown_entries, asker)
        return self._shown

    def _saved(self) -> dict[str, Any]:
        saved = super()._saved()
        if optimizer_entries.asker() is not None:
            entries = self._entries(self.ema_state_dict())
            return optimizer_entries.joined(saved, entries, self.param_groups)
        return {**saved, _EMA: self.ema_state_dict()}

    def _shown_entries(self) -> dict[Tensor, dict[str, Any]]:
        # A state that is about to be loaded may lie in the very memory of the averages, so these keep their values.
        return self._entries(self._averages.state_dict(refreshed=False))

    def _entries(self, state: Mapping[str, Any]) -> dict[Tensor, dict[str, Any]]:
        """The averages by parameter, as torch's checkpoint functions keep them."""
        self._refuse_while_swapped('the state for a distributed checkpoint')
        return optimizer_entries.entries_of(state, self._averages.names(), self.param_groups)

    def _load(self, state: dict[str, Any]) -> None:
        self._shown = None
        ema = state.pop(_EMA, None)
        state, found = optimizer_entries.split(state, self.param_groups)
        if ema is None and found:
            ema = self._averages.from_entries(found)
        checked = None if ema is None else self._averages.checked(ema)
        super()._load(optimizer_entries.laid_out(state, self.param_groups))
        if checked is not None:
            self._averages.assign(checked, stacklevel=6, has_names=bool(found))
            return
        warnings.warn(
            'the loaded state has no average: it was saved by a bare optimizer, or without its ema_state_dict(). '
            'A new average starts from the weights before the next step. If you have the old one, pass it to '
            'load_ema_state_dict().',
            stacklevel=5,
        )
        self._averages.reset()


def _profiles(
    arguments: Mapping[str, Any], function: str | None, *, copies_first: bool
) -> tuple[dict[str, Profile | None], dict[str, Any]]:
    """The profiles by label that the arguments ask for, and the arguments as a state keeps them.

    Args:
        arguments: those that choose profiles, in the order in which averages stand.
        function: the user's function that makes the average in place of a profile; None if there is none.
        copies_first: whether the first update copies whatever the profile says.
    """
    given: dict[str, Any] = {
        name: value
        for name, value in arguments.items()
        if isinstance(value, Mapping) or is_given(value, _NOT_GIVEN.get(name))
    }
    if function is not None:
        average = given.pop('average', None)
        if average is not None:
            shown_average = f'average={shown(check_kind(average) if not isinstance(average, Mapping) else average)}'
            raise ValueError(f'pass either {shown_average} or a function, got both.')
        refuse_without_effect(given, 'an average by a function of yours')
        return {SINGLE: None}, {**_plain_of({}, arguments), 'average': function}
    own = by_label(given)
    if own is None:
        if given.keys() <= set(CHANGES):
            given['decay'] = arguments['decay']
        own = {SINGLE: dict(given)}
    profiles: dict[str, Profile | None] = {}
    for label, one in own.items():
        named = {'smoothing' if name == 'decay' else name: value for name, value in one.items()}
        profile = chosen(None if label == SINGLE else label, unit='steps', smoothing_name='decay', **named)
        profiles[label] = CopiesFirst(profile) if copies_first else profile
    return profiles, _plain_of(given, arguments)


def _plain_of(given: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Arguments that have been checked, as a state keeps them."""
    return {name: _plain(given.get(name, _NOT_KEPT.get(name))) for name in names}


def _plain(value: Any) -> Any:
    """An argument, perhaps by label, as ``torch.load(weights_only=True)`` reads it."""
    if isinstance(value, Mapping):
        return {str.__str__(label): _plain(each) for label, each in value.items()}
    return plain.scalar(value)


def _params_of(param_group: Any) -> list[Any]:
    """The parameters of a new group, a list since a generator can be read only once."""
    if not isinstance(param_group, dict) or 'params' not in param_group:
        raise TypeError(
            f"param_group must be a dictionary with 'params', got {shown(param_group)}. Pass for example "
            "{'params': layer.parameters(), 'lr': 0.1}."
        )
    params: Any = param_group['params']
    is_ordered = isinstance(params, Iterable) and not isinstance(params, set | frozenset | Mapping)
    found: list[Any] = list(params) if is_ordered and not isinstance(params, Tensor) else [params]
    for each in found:
        if not isinstance(tensor := tensor_of(each), Tensor):
            raise TypeError(f"'params' of param_group must be tensors, got {shown(params)}. Pass layer.parameters().")
        if not (tensor.is_leaf or tensor.retains_grad):
            raise ValueError("'params' of param_group must be leaf tensors, got one that was computed. Detach it.")
    return found
