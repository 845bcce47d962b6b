"""An optimizer that averages the weights after each of its steps, for training loops without a Trainer.

Invariants: the wrapped optimizer does to the weights what it would do alone; it writes only after the last update has
been joined; a step that did not happen is not averaged.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from composer_ema.averages import Equal, check_share
from composer_ema.model.names import listed
from composer_ema.model.sharding import is_sharded, unwrap
from composer_ema.settings import OptimizerSettings, Settings, takes_settings
from composer_ema.shadow.shadow_model import ShadowModel

#: Version of what :meth:`EMAOptimizer.ema_state_dict` returns.
EMA_STATE_VERSION = 1

DEFAULT_DECAY = 0.9999

# What a state that does not say it was saved with.
_DEFAULT_SETTINGS = {'average': 'exponential', 'start': 0}

_EMA = 'ema'
_VERSION, _NUM_STEPS, _LAST_UPDATE, _LOG_KEPT, _SETTINGS, _AVERAGE = (
    'version', 'num_steps', 'last_update', 'log_kept', 'settings', 'average'
)  # fmt: skip
# These call the closure before they write. Another optimizer may write first, so it is joined before it starts.
_CLOSURE_COMES_FIRST = ('torch.optim.', 'composer.optim.')


@takes_settings
class EMAOptimizer(Optimizer):
    """Wraps an optimizer and averages the weights after each of its steps::

        average += (1 - decay ** n) * (weights - average)      # n steps after the last update

    The average starts from the weights before the first step, and from the buffers as the first batch left them. Each
    update is forked onto a side stream of its own on CUDA and joined before the next step writes, after the closure's
    first call where there is a closure, without making the host wait. What else writes the weights between two steps
    calls :meth:`wait` first. On a CPU all runs in line.

    ``param_groups``, ``state`` and ``defaults`` are the wrapped optimizer's own objects, so schedulers, gradient
    scalers and clipping work on either. Not averaged are a step that a ``GradScaler`` skips, and the step on zero
    gradients that ``torch.distributed.checkpoint.state_dict`` makes to build an empty state. Only with a fused
    optimizer under a ``GradScaler`` does the host wait: for the number that says whether the step was skipped.

    Args:
        optimizer: the optimizer that moves the weights. From now on call this one's ``step`` in its place.
        device: where the average lives. Default: beside each tensor.
        decay: share of the old average kept by one step, in [0, 1]. Default: 0.9999.
        every_n_steps: steps between two updates, at least 1. The decay is compensated, so this only saves work.
        half_life: instead of ``decay``, the number of steps after which a weight's share has halved, at least 0;
            0 averages nothing.
        model: the model whose parameters ``optimizer`` moves; the average is then kept by name and covers buffers.
            Default: by group and position, ``'0.3'`` being the fourth parameter of the first group.
        bias_correction: divides each weight by one minus the product of all decays so far: the average forgets where
            it started, and the first update copies.
        average: ``'exponential'``, or ``'equal'`` for the mean of the weights after every ``every_n_steps`` steps:
            ``average += (weights - average) / (n + 1)``, with n weights in it already. The first update copies. Then
            neither ``decay``, ``half_life`` nor ``bias_correction`` is given.
        start: the first update is that of step ``start``, or of the next one that ``every_n_steps`` asks for, and
            copies. Before it the average is the weights. Default: 0, an average from the beginning.
        settings: which tensors are averaged and how: ``buffers``, ``include``, ``exclude``, ``dtype``,
            ``skip_nonfinite``, ``rounding``, ``seed``, ``backend``, and ``avg_fn`` or ``multi_avg_fn`` in place of
            ``average``; see :class:`composer_ema.settings.Settings`.

    Raises:
        TypeError, ValueError: an argument out of range, two that contradict each other, one that cannot take effect,
            or a ``model`` without the optimizer's parameters.

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
        model: nn.Module | None = None,
        bias_correction: bool = False,
        average: Literal['exponential', 'equal'] = 'exponential',
        start: int = 0,
        **settings: Unpack[OptimizerSettings],
    ) -> None:
        # The base class's __init__ would make groups and state of its own; the hooks are all that is needed of it.
        _check_optimizer(optimizer)
        self._optimizer = optimizer
        kept = Settings.of({'device': device, **settings})
        function = kept.function_name
        _check_average(average, function, {
            'decay': None if decay == DEFAULT_DECAY else decay,
            'half_life': half_life,
            'bias_correction': bias_correction or None,
        })  # fmt: skip
        is_exponential = function is None and average == 'exponential'
        self._log_decay = _log_decay(decay, half_life)
        self._is_equal = function is None and average == 'equal'
        self._start_step = _check_start(start)
        self._copies_first = start > 0 or not is_exponential
        self._settings = {
            'decay': decay if is_exponential and half_life is None else None,
            'half_life': half_life,
            'every_n_steps': _check_interval(every_n_steps),
            'bias_correction': bias_correction,
            'average': average if function is None else function,
            'start': start,
        }
        self._every_n_steps = every_n_steps
        self._bias_correction = bias_correction
        if bias_correction and self._log_decay == 0:
            raise ValueError(
                'bias_correction needs a decay below 1, got 1: an average that never moves has nothing to correct.'
            )
        if model is None and kept.buffers != 'average':
            raise ValueError(f'buffers={kept.buffers!r} has no effect: without a model there are none. Pass model=.')

        self._module = _Groups(optimizer) if model is None else unwrap(model)
        _check_covered(self._module, optimizer.param_groups)
        self._kept = kept
        self._shadow = ShadowModel(self._module, overlap=True, **kept.as_arguments())
        self._num_steps = 0
        self._last_update = 0
        self._log_kept = 0.0
        self._make_hooks()

    # What is the wrapped optimizer's

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's own list of groups."""
        return self._optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's own state by parameter."""
        return self._optimizer.state

    @state.setter
    def state(self, state: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The wrapped optimizer's own default options."""
        return self._optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self._optimizer.defaults = defaults

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Read by GradScaler: whether step itself unscales, and skips by ``found_inf``, as fused optimizers do."""
        return getattr(self._optimizer, '_step_supports_amp_scaling', False)

    # GradScaler sets these two before such a step and deletes them after it.

    @property
    def grad_scale(self) -> Tensor | None:
        """What GradScaler has multiplied the gradients by, while it calls :meth:`step` of a fused optimizer."""
        return self._optimizer.grad_scale  # pyright: ignore[reportAttributeAccessIssue]

    @grad_scale.setter
    def grad_scale(self, scale: Tensor | None) -> None:
        self._optimizer.grad_scale = scale  # pyright: ignore[reportAttributeAccessIssue]

    @grad_scale.deleter
    def grad_scale(self) -> None:
        del self._optimizer.grad_scale  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def found_inf(self) -> Tensor:
        """Above zero where GradScaler met an infinite gradient, while it calls :meth:`step` of a fused optimizer."""
        return self._optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]

    @found_inf.setter
    def found_inf(self, found_inf: Tensor) -> None:
        self._optimizer.found_inf = found_inf  # pyright: ignore[reportAttributeAccessIssue]

    @found_inf.deleter
    def found_inf(self) -> None:
        del self._optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients: to None, or to zeros."""
        self._optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer. Its parameters join the average at their value, at the next update.

        Raises:
            ValueError: with a ``model``, one of the parameters is not the model's. Nothing was added.
        """
        parameters = param_group['params']
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if not isinstance(self._module, _Groups):
            _check_covered(self._module, [*self.param_groups, {'params': parameters}])
        # The list in place of what may have been a generator.
        self._optimizer.add_param_group({**param_group, 'params': parameters})

    # Stepping

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[..., Any] | None = None
    ) -> Any:
        """Takes one step of the wrapped optimizer and then, every ``every_n_steps``, one update of the average.

        Hooks registered here run once, with this optimizer: pre-hooks before the step, post-hooks after it and before
        the update, so what they do to the weights is averaged. Hooks of the wrapped optimizer, and those registered
        for all optimizers, run around the wrapped optimizer's step, with it as their argument.

        Args:
            closure: computes the loss anew, for optimizers that take one.

        Returns:
            What the wrapped optimizer returns.

        Raises:
            RuntimeError: the model holds the average.
        """
        is_phantom = self._is_phantom(closure)
        if not is_phantom:
            self._refuse_while_swapped('step()')
            self._start()
        arguments = (self,) if closure is None else (self, closure)
        keywords: dict[str, Any] = {}
        for hook in list(self._optimizer_step_pre_hooks.values()):
            # Without a closure to wait in, or with a hook that may write, the last update is joined here.
            self._shadow.wait_for_reads()
            changed = hook(self, arguments, keywords)
            if changed is not None:
                arguments, keywords = changed
        closure = keywords.get('closure', arguments[1] if len(arguments) > 1 else None)

        loss = self._step_wrapped(closure)

        for hook in list(self._optimizer_step_post_hooks.values()):
            hook(self, arguments, keywords)
        if not is_phantom and not self._was_skipped():
            self._follow()
        return loss

    def wait(self) -> None:
        """Orders the current stream after the last update; see :meth:`ShadowModel.wait`. Nothing to do on a CPU."""
        self._shadow.wait()

    # The average

    @property
    def num_steps(self) -> int:
        """How many steps the average has followed, skipped ones not counted."""
        return self._num_steps

    @property
    def shadow(self) -> ShadowModel:
        """The average. Up to the first step, and before ``start``, it holds the weights; then those averaged last."""
        if not self._shadow.is_swapped:
            if self._num_steps == 0:
                self._start()
            elif self._copies_first and self._shadow.num_updates == 0:
                self._copy_weights()
        return self._shadow

    @contextmanager
    def swap_ema_weights(self, enabled: bool = True) -> Iterator[None]:
        """Puts the average into the model for the block, and every bit of the training weights back after it.

        Args:
            enabled: whether to swap at all.

        Raises:
            RuntimeError: the average is swapped in already.
        """
        if not enabled:
            yield
            return
        if self._shadow.is_swapped:
            raise RuntimeError(
                'the model holds the average already. Leave the outer swap_ema_weights block first, or pass '
                'enabled=False to the inner one.'
            )
        with self.shadow.swapped(self._module):
            yield

    # Saving

    def ema_state_dict(self) -> dict[str, Any]:
        """The average and its counters in plain types; tensors alias the average.

        For checkpoints that keep only ``state`` and ``param_groups`` of an optimizer, as those of
        ``torch.distributed.checkpoint.state_dict`` do.

        Raises:
            RuntimeError: the model holds the average.
        """
        self._refuse_while_swapped('ema_state_dict()')
        return {
            _VERSION: EMA_STATE_VERSION,
            _NUM_STEPS: self._num_steps,
            _LAST_UPDATE: self._last_update,
            _LOG_KEPT: self._log_kept,
            _SETTINGS: dict(self._settings),
            _AVERAGE: self.shadow.state_dict(),
        }

    def load_ema_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what :meth:`ema_state_dict` returned. The settings stay this object's; a warning names those saved.

        Raises:
            RuntimeError: the model holds the average.
            ValueError: the state does not fit. Nothing was loaded.
        """
        self._refuse_while_swapped('load_ema_state_dict()')
        self._check_ema_state(state)
        self._assign_ema_state(state)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, which it can load by itself, and under ``'ema'`` the average.

        Raises:
            RuntimeError: the model holds the average.
        """
        self._refuse_while_swapped('state_dict()')
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict = {**self._optimizer.state_dict(), _EMA: self.ema_state_dict()}
        for hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = _or(hook(self, state_dict), state_dict)
        return state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned; training continues bit for bit.

        The state of a bare optimizer loads too: with a warning, a new average starts from the weights before the next
        step. After an error neither the optimizer nor the average has changed.

        Raises:
            RuntimeError: the model holds the average.
            ValueError: the state does not fit.
        """
        self._refuse_while_swapped('load_state_dict()')
        loaded = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            loaded = dict(_or(hook(self, loaded), loaded))
        ema = loaded.pop(_EMA, None)
        if ema is not None:
            self._check_ema_state(ema)
        self._optimizer.load_state_dict(loaded)
        if ema is not None:
            self._assign_ema_state(ema)
        else:
            warnings.warn(
                'the loaded state has no average: it was saved by a bare optimizer, or without its ema_state_dict(). '
                'A new average starts from the weights before the next step. If you have the old one, pass it to '
                'load_ema_state_dict().',
                stacklevel=2,
            )
            self._num_steps, self._last_update, self._log_kept = 0, 0, 0.0
            self._shadow.num_updates = 0
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: all but the hooks, as torch's optimizers do; the model, too, is copied."""
        self._refuse_while_swapped('copying')
        self.wait()
        return {key: value for key, value in self.__dict__.items() if key not in _NOT_COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if '_optimizer' in state:
            self.__dict__.update(state)
            self._make_hooks()
        else:  # torch's own code passes state and param_groups, to be the new ones
            for key, value in state.items():
                setattr(self, key, value)

    def __repr__(self) -> str:
        settings = ', '.join(f'{key}={value}' for key, value in self._settings.items() if value is not None)
        return f'{type(self).__name__} ({settings}, {self._num_steps} steps) of {self._optimizer!r}'

    # Helpers, in call order

    def _make_hooks(self) -> None:
        for name in _HOOKS:
            setattr(self, name, OrderedDict())

    def _is_phantom(self, closure: Callable[..., Any] | None) -> bool:
        """Whether this is the step on zero gradients at lr 0 that makes an empty state into one of zeros.

        Only then are gradients read, for which the host waits.
        """
        if closure is not None or self.state:
            return False
        rates = [group['lr'] for group in self.param_groups if 'lr' in group]
        if not rates or not all(map(_is_zero_on_host, rates)):
            return False
        gradients = (p.grad for group in self.param_groups for p in group['params'])
        return not any(grad is not None and (grad.is_sparse or bool(grad.any())) for grad in gradients)

    def _refuse_while_swapped(self, what: str) -> None:
        if self._shadow.is_swapped:
            raise RuntimeError(
                f'{what} needs the training weights, but the model holds the average. '
                'Leave the swap_ema_weights block first.'
            )

    def _start(self) -> None:
        """Before the first step the average is the weights, whenever those were loaded."""
        if self._num_steps == 0:
            self._register_new()
            if self._shadow.num_updates > 0:
                return  # an average was loaded into the shadow, from another library perhaps: it goes on
            self._copy_weights()
            self._shadow.resolve(self._module)  # random rounding counts from num_updates when it is prepared

    def _copy_weights(self) -> None:
        self._register_new()
        self._shadow.num_updates = 0  # a function copies then
        self._shadow.update(self._module, weight=None if self._shadow.has_function else 1.0)
        self._shadow.num_updates = 0

    def _register_new(self) -> None:
        if isinstance(self._module, _Groups):
            self._module.register_new(self.param_groups)

    def _step_wrapped(self, closure: Callable[..., Any] | None) -> Any:
        if closure is None:
            self._shadow.wait_for_reads()
            return self._optimizer.step()
        if not type(self._optimizer).__module__.startswith(_CLOSURE_COMES_FIRST) or _has_pre_hooks(self._optimizer):
            self._shadow.wait_for_reads()

        def joined(*args: Any, **kwargs: Any) -> Any:
            loss = closure(*args, **kwargs)
            self._shadow.wait_for_reads()
            return loss

        return self._optimizer.step(joined)

    def _was_skipped(self) -> bool:
        """Whether GradScaler told a fused optimizer to leave the weights alone. The host waits for that number."""
        found_inf = getattr(self._optimizer, 'found_inf', None)
        return isinstance(found_inf, Tensor) and found_inf.item() > 0

    def _follow(self) -> None:
        """Counts a step, and updates the average when it is due."""
        self._num_steps += 1
        if self._num_steps % self._every_n_steps or self._num_steps < self._start_step:
            return
        self._register_new()
        if self._shadow.has_function:
            self._shadow.update(self._module)
        elif self._is_equal:
            self._shadow.update(self._module, weight=Equal().weight_at(self._shadow.num_updates))
        else:
            self._follow_exponentially()
        self._last_update = self._num_steps

    def _follow_exponentially(self) -> None:
        is_copy = self._copies_first and self._shadow.num_updates == 0
        if is_copy:
            self._last_update = self._num_steps - self._every_n_steps
        log_smoothing = self._log_decay * (self._num_steps - self._last_update)
        log_kept = self._log_kept + log_smoothing
        weight = 1.0 if is_copy else _weight(log_smoothing, log_kept if self._bias_correction else None)
        self._shadow.update(self._module, weight=weight)
        self._log_kept = log_kept

    def _check_ema_state(self, state: Mapping[str, Any]) -> None:
        """Raises unless ``state`` can be loaded."""
        version = state.get(_VERSION) if isinstance(state, Mapping) else None
        if type(version) is not int or version != EMA_STATE_VERSION:
            raise ValueError(
                f'the state has format version {version!r}, this release reads {EMA_STATE_VERSION}. Nothing was loaded.'
            )
        for key, kind in ((_NUM_STEPS, int), (_LAST_UPDATE, int), (_LOG_KEPT, float), (_SETTINGS, Mapping)):
            if not isinstance(value := state.get(key), kind) or isinstance(value, bool):
                raise ValueError(
                    f"the state's {key!r} is a {type(value).__name__}, not a {kind.__name__}. Nothing was loaded."
                )
        if not 0 <= state[_LAST_UPDATE] <= state[_NUM_STEPS] or not state[_LOG_KEPT] <= 0:
            raise ValueError(
                f'the state has its last update at step {state[_LAST_UPDATE]} of {state[_NUM_STEPS]} and a logarithm '
                f'of {state[_LOG_KEPT]}: they must lie in [0, steps] and at most at zero. Nothing was loaded.'
            )
        average = state.get(_AVERAGE)
        if isinstance(average, Mapping) and 'training_weights' in average:
            raise ValueError(
                'the state is that of a swapped model. Nothing was loaded. Save outside of swap_ema_weights.'
            )
        self._register_new()
        # A shadow without storage finds out what fits; only then does the real one take the values.
        ShadowModel(self._module, **self._kept.replace(device='meta').as_arguments()).load_state_dict(average)  # pyright: ignore[reportArgumentType]

    def _assign_ema_state(self, state: Mapping[str, Any]) -> None:
        saved = {key: state[_SETTINGS].get(key, _DEFAULT_SETTINGS.get(key)) for key in self._settings}
        if saved != self._settings:
            warnings.warn(
                f'the saved average used {saved}, this one uses {self._settings}, and will from here on. '
                'Pass the saved settings to continue as before.',
                stacklevel=3,
            )
        self._copy_weights()  # lets in what has joined since the last update
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # said when the state was checked
            self._shadow.load_state_dict(state[_AVERAGE])
        self._num_steps, self._last_update, self._log_kept = (state[k] for k in (_NUM_STEPS, _LAST_UPDATE, _LOG_KEPT))


#: The dictionaries that ``torch.optim.Optimizer`` keeps its hooks in.
_HOOKS = (
    '_optimizer_step_pre_hooks',
    '_optimizer_step_post_hooks',
    '_optimizer_state_dict_pre_hooks',
    '_optimizer_state_dict_post_hooks',
    '_optimizer_load_state_dict_pre_hooks',
    '_optimizer_load_state_dict_post_hooks',
)
# A scheduler replaces step by a method of the one instance that it was given.
_NOT_COPIED = {*_HOOKS, 'step', '_opt_called'}


class _Groups(nn.Module):
    """Makes the groups of an optimizer look like a model: group ``i`` is a child ``'i'`` with parameters ``'0'``..."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__()
        self._flat: list[Tensor] = []
        self._sizes: list[int] = []
        self.register_new(optimizer.param_groups)

    def register_new(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Registers what has changed since the last call; when nothing has, a few comparisons of lists."""
        flat = [parameter for group in groups for parameter in group['params']]
        sizes = [len(group['params']) for group in groups]
        if sizes == self._sizes and all(map(is_, flat, self._flat)):
            return
        self._flat, self._sizes = flat, sizes
        self._modules.clear()
        for index, group in enumerate(groups):
            child = nn.Module()
            # Not register_parameter: optimizers take any leaf tensor, not only nn.Parameter.
            child._parameters.update({str(position): tensor for position, tensor in enumerate(group['params'])})
            self.add_module(str(index), child)


def _check_optimizer(optimizer: Optimizer) -> None:
    if isinstance(optimizer, EMAOptimizer):
        raise TypeError(
            'the optimizer is an EMAOptimizer already. For a second average keep a ShadowModel beside it and update '
            'that after each step.'
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f'optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}. '
            'Pass for example torch.optim.Adam(model.parameters()).'
        )


def _check_average(average: str, function: Any, without_effect: Mapping[str, Any]) -> None:
    """Raises unless ``average`` is known, and stands alone if it is not exponential."""
    if average not in ('exponential', 'equal'):
        raise ValueError(
            f"average must be 'exponential' or 'equal', got {average!r}. Any other one is an avg_fn or multi_avg_fn."
        )
    if function is None and average == 'exponential':
        return
    if function is not None and average != 'exponential':
        raise ValueError(f'pass either average={average!r} or a function, got both.')
    kind = 'an average by a function of yours' if function is not None else 'an equal average'
    for name, value in without_effect.items():
        if value is not None:
            raise ValueError(f'{name}={value} has no effect on {kind}. Leave it out.')


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


def _log_decay(decay: float, half_life: float | None) -> float:
    """The logarithm of the share of the old average kept by one step: 0 freezes, minus infinity copies."""
    if half_life is None:
        check_share('decay', decay, 'For a half-life of n steps pass half_life=n.')
        return math.log(decay) if decay > 0 else -math.inf
    if decay != DEFAULT_DECAY:
        raise ValueError(f'pass either half_life or decay, got half_life={half_life} and decay={decay}.')
    if isinstance(half_life, bool) or not isinstance(half_life, int | float):
        raise TypeError(f'half_life must be a number of steps, got {half_life!r} of type {type(half_life).__name__}.')
    if not (math.isfinite(half_life) and half_life >= 0):
        raise ValueError(
            f'half_life must be finite and at least 0 steps, got {half_life}. To freeze the average pass decay=1.'
        )
    return -math.log(2.0) / half_life if half_life > 0 else -math.inf


def _weight(log_smoothing: float, log_kept: float | None) -> float:
    """The weight ``1 - smoothing``, divided by ``1 - product of all smoothings`` if its logarithm is given."""
    weight = -math.expm1(log_smoothing)
    return weight if log_kept is None else min(1.0, weight / -math.expm1(log_kept))


def _check_covered(module: nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises unless ``module`` has every parameter of ``groups``, unsharded."""
    if is_sharded(module):
        raise ValueError(
            'the parameters are sharded with FSDP or tensor parallelism, which EMAOptimizer does not average yet. '
            'Use DDP, or leave the average out.'
        )
    known = {id(parameter) for parameter in module.parameters()}
    strangers = [
        f'{index}.{position}'
        for index, group in enumerate(groups)
        for position, entry in enumerate(group['params'])
        if id(entry[1] if isinstance(entry, tuple) else entry) not in known
    ]
    if strangers:
        raise ValueError(
            f"{len(strangers)} of the optimizer's parameters are not in the model, by group and position: "
            f'{listed(strangers)}. Pass the model that the optimizer was built for, or leave model out.'
        )


def _is_zero_on_host(rate: float | Tensor) -> bool:
    return bool(rate == 0) if not isinstance(rate, Tensor) or rate.device.type == 'cpu' else False


def _has_pre_hooks(optimizer: Optimizer) -> bool:
    """Whether a hook that may write weights comes before the closure."""
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    return bool(optimizer._optimizer_step_pre_hooks or _global_optimizer_pre_hooks)


def _or(result: Any, otherwise: Any) -> Any:
    return otherwise if result is None else result
