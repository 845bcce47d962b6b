"""An optimizer that averages the weights after each of its steps, for training loops without a Trainer.

Invariants: the wrapped optimizer writes only after the last update has read the weights; a step that did not happen is
not averaged.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from composer_ema.model.sharding import refuse_sharded, unwrap
from composer_ema.model.untraced import aside, is_traced, untraced
from composer_ema.optimizer_average import StepAverage, check_covered, tensor_of
from composer_ema.settings import OptimizerSettings, Settings, takes_settings
from composer_ema.shadow.interrupts import Block
from composer_ema.shadow.shadow_model import ShadowModel
from composer_ema.wording import counted
from composer_ema.wrapper import OptimizerWrapper, ParameterGroups

DEFAULT_DECAY = 0.9999

_EMA = 'ema'


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
        self._average = StepAverage(arguments, kept, self._module, optimizer.param_groups)

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
        refuse_sharded({f'{len(self.param_groups)}.{i}': tensor_of(entry) for i, entry in enumerate(parameters)})
        if not isinstance(self._module, ParameterGroups):
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
