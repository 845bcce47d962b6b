"""An optimizer that stands in for another one: it steps as the wrapped optimizer does, and subclasses act around it.

Invariants: the wrapped optimizer does to the weights exactly what it would do alone; subclasses hear only of steps that
really happen.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from composer_ema import plain
from composer_ema.model.sharding import any_nonzero
from composer_ema.model.wrappers import canonical_name
from composer_ema.wording import shown

#: The attributes in which ``torch.optim.Optimizer`` keeps its hooks.
_HOOKS = (
    '_optimizer_step_pre_hooks',
    '_optimizer_step_post_hooks',
    '_optimizer_state_dict_pre_hooks',
    '_optimizer_state_dict_post_hooks',
    '_optimizer_load_state_dict_pre_hooks',
    '_optimizer_load_state_dict_post_hooks',
)
# A scheduler replaces step by a method that is bound to the one instance it was given.
_NOT_COPIED = {*_HOOKS, 'step', '_opt_called'}
# These optimizers call the closure before they write. Any other may write before its closure.
_CLOSURE_COMES_FIRST = ('torch.optim.', 'composer.optim.')


class OptimizerWrapper(Optimizer):
    """Wraps an optimizer and behaves as it does, for subclasses that act before or after each of its steps.

    ``param_groups``, ``state`` and ``defaults`` are the wrapped optimizer's own objects, so schedulers, gradient
    scalers and clipping work on either. Hooks registered on the wrapper run once, with the wrapper as their argument;
    hooks of the wrapped optimizer, and those registered for all optimizers, run with the wrapped optimizer.

    Subclasses override ``_before_step``, ``_before_write``, ``_after_step``, ``_shown_state``, ``_saved`` and ``_load``
    as they need. The wrapper leaves out ``_after_step`` where a ``GradScaler`` skips the step. It leaves out both
    ``_before_step`` and ``_after_step`` at the step on zero gradients that ``torch.distributed.checkpoint.state_dict``
    makes to build an empty state.

    Args:
        optimizer: the optimizer that moves the weights. Call the wrapper's ``step`` in its place.

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``.

    Example:
        >>> import torch
        >>> weight = torch.ones(1, requires_grad=True)
        >>> optimizer = OptimizerWrapper(torch.optim.SGD([weight], lr=1.0))
        >>> weight.grad = torch.full((1,), 0.25)
        >>> optimizer.step()
        >>> weight.item()
        0.75
    """

    def __init__(self, optimizer: Optimizer) -> None:
        # Not super().__init__(): that would build groups and state of its own. Only its hooks are needed.
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f'optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}. '
                'Pass for example torch.optim.Adam(model.parameters()).'
            )
        self._optimizer = optimizer
        self._make_hooks()

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
        return self._shown_state()

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
        """Read by GradScaler: whether ``step`` itself unscales and checks ``found_inf``, as fused optimizers do."""
        return getattr(self._optimizer, '_step_supports_amp_scaling', False)

    # GradScaler sets the next two before such a step and deletes them after it.

    @property
    def grad_scale(self) -> Tensor | None:
        """The factor in the gradients, while GradScaler calls :meth:`step` of a fused optimizer."""
        return self._optimizer.grad_scale  # pyright: ignore[reportAttributeAccessIssue]

    @grad_scale.setter
    def grad_scale(self, scale: Tensor | None) -> None:
        self._optimizer.grad_scale = scale  # pyright: ignore[reportAttributeAccessIssue]

    @grad_scale.deleter
    def grad_scale(self) -> None:
        del self._optimizer.grad_scale  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def found_inf(self) -> Tensor:
        """Above zero if a gradient is infinite or NaN, while GradScaler calls :meth:`step` of a fused optimizer."""
        return self._optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]

    @found_inf.setter
    def found_inf(self, found_inf: Tensor) -> None:
        self._optimizer.found_inf = found_inf  # pyright: ignore[reportAttributeAccessIssue]

    @found_inf.deleter
    def found_inf(self) -> None:
        del self._optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients to None, or to zeros.

        Args:
            set_to_none: False fills the gradients with zeros. Default: True.
        """
        self._optimizer.zero_grad(plain.flag('set_to_none', set_to_none))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters to the wrapped optimizer."""
        self._optimizer.add_param_group(param_group)

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[..., Any] | None = None
    ) -> Any:
        """Takes one step of the wrapped optimizer.

        Args:
            closure: recomputes the loss, for optimizers that need it.

        Returns:
            What the wrapped optimizer returns.
        """
        if closure is not None and not callable(closure):
            raise TypeError(f'closure must be a function that recomputes the loss, got {shown(closure)}.')
        is_phantom = self._is_phantom(closure)
        if not is_phantom:
            self._before_step()
        arguments = (self,) if closure is None else (self, closure)
        keywords: dict[str, Any] = {}
        for hook in list(self._optimizer_step_pre_hooks.values()):
            self._before_write()  # a hook may write the weights
            changed = hook(self, arguments, keywords)
            if changed is not None:
                arguments, keywords = changed
        closure = keywords.get('closure', arguments[1] if len(arguments) > 1 else None)

        loss = self._step_wrapped(closure)

        for hook in list(self._optimizer_step_post_hooks.values()):
            hook(self, arguments, keywords)
        if not is_phantom and not self._was_skipped():
            self._after_step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Returns the wrapped optimizer's state."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict = self._saved()
        for hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = _or(hook(self, state_dict), state_dict)
        return state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned."""
        loaded = dict(plain.mapping('state_dict', state_dict, 'Pass what state_dict() returned.'))
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            loaded = dict(_or(hook(self, loaded), loaded))
        _check_parts(loaded)
        self._load(loaded)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: everything but the hooks, which torch's optimizers leave out too."""
        return {key: value for key, value in self.__dict__.items() if key not in _NOT_COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if '_optimizer' in state:
            self.__dict__.update(state)
            self._make_hooks()
        else:  # torch's own code passes a new ``state`` and new ``param_groups``
            for key, value in state.items():
                setattr(self, key, value)

    def __repr__(self) -> str:
        return f'{type(self).__name__} of {self._optimizer!r}'

    def _before_step(self) -> None:
        """Called before a step and its hooks."""

    def _before_write(self) -> None:
        """Called on the current stream before anything writes the weights, several times a step perhaps."""

    def _after_step(self) -> None:
        """Called after a step and its hooks."""

    def _shown_state(self) -> Any:
        """Returns what :attr:`state` is to its reader."""
        return self._optimizer.state

    def _saved(self) -> dict[str, Any]:
        """Returns the state that :meth:`state_dict` passes to its hooks."""
        return self._optimizer.state_dict()

    def _load(self, state: dict[str, Any]) -> None:
        """Loads what :meth:`_saved` returned; ``state`` is a copy that may be changed."""
        self._optimizer.load_state_dict(state)

    def _make_hooks(self) -> None:
        for name in _HOOKS:
            setattr(self, name, OrderedDict())

    def _is_phantom(self, closure: Callable[..., Any] | None) -> bool:
        """Whether this is the step at lr 0 on zero gradients that turns an empty state into one of zeros.

        Gradients are read, and the host waits for them, only where state and learning rates leave it open. Where they
        are sharded that is a collective call, so that every process comes to the same answer.
        """
        if closure is not None or self._optimizer.state:
            return False
        rates = [group['lr'] for group in self.param_groups if 'lr' in group]
        if not rates or not all(map(_is_zero_on_host, rates)):
            return False
        gradients = (p.grad for group in self.param_groups for p in group['params'])
        return not any_nonzero(grad for grad in gradients if grad is not None)

    def _step_wrapped(self, closure: Callable[..., Any] | None) -> Any:
        if closure is None:
            self._before_write()
            return self._optimizer.step()
        if not type(self._optimizer).__module__.startswith(_CLOSURE_COMES_FIRST) or _has_pre_hooks(self._optimizer):
            self._before_write()

        def then_write(*args: Any, **kwargs: Any) -> Any:
            loss = closure(*args, **kwargs)
            self._before_write()
            return loss

        return self._optimizer.step(then_write)

    def _was_skipped(self) -> bool:
        """Whether GradScaler told a fused optimizer to leave the weights alone. The host waits for that number."""
        found_inf = getattr(self._optimizer, 'found_inf', None)
        return isinstance(found_inf, Tensor) and found_inf.item() > 0


class ParameterGroups(nn.Module):
    """Presents an optimizer's groups as a module.

    Its parameters have the names that the optimizer was given, as with ``SGD(model.named_parameters())`` of torch 2.6.
    Without names, or with one name for two parameters, group ``i`` is the child ``'i'`` with parameters ``'0'``,
    ``'1'``...

    Args:
        optimizer: the optimizer whose groups to present.

    Attributes:
        has_names: whether the names are those that the optimizer was given.
        positions: group and position of each parameter, as in ``'0.3'``, to the name that it has here.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__()
        self._optimizer = optimizer
        self._flat: list[Tensor] = []
        self._sizes: list[int] = []
        self._names: list[str] = []
        self.positions: dict[str, str] = {}
        self.has_names = False
        self.refresh()

    def refresh(self) -> None:
        """Registers what has changed since the last call. When nothing has, this compares a few lists."""
        groups = self._optimizer.param_groups
        flat = [parameter for group in groups for parameter in group['params']]
        sizes = [len(group['params']) for group in groups]
        if sizes == self._sizes and all(map(is_, flat, self._flat)):
            return
        # Known names stay: the optimizer's load_state_dict takes over the saved ones, whatever the order here.
        named = {**self._given_names(), **dict(zip(map(id, self._flat), self._names, strict=True))}
        names = [named.get(id(parameter), '') for parameter in flat]
        self._flat, self._sizes, self._names = flat, sizes, names
        self._modules.clear()
        self._parameters.clear()
        places = [f'{index}.{position}' for index, size in enumerate(sizes) for position in range(size)]
        self.has_names = all(names) and len(set(names)) == len(names)
        self.positions = dict(zip(places, names if self.has_names else places, strict=True))
        if self.has_names:
            # Not register_parameter: names have dots, and optimizers take any leaf tensor, not only nn.Parameter.
            parameters: dict[str, Any] = dict(zip(names, flat, strict=True))
            self._parameters.update(parameters)
            return
        for index, group in enumerate(groups):
            child = nn.Module()
            child._parameters.update({str(position): tensor for position, tensor in enumerate(group['params'])})
            self.add_module(str(index), child)

    def _given_names(self) -> dict[int, str]:
        return {
            id(parameter): canonical_name(name)
            for group in self._optimizer.param_groups
            for parameter, name in zip(group['params'], group.get('param_names', ()), strict=False)
        }


def _check_parts(state: Mapping[str, Any]) -> None:
    """Raises a ValueError unless a state has the parts of an optimizer's."""
    groups = state.get('param_groups')
    are_groups = isinstance(groups, list | tuple) and all(
        isinstance(each, Mapping) and 'params' in each for each in groups
    )
    if not are_groups or not isinstance(state.get('state'), Mapping):
        raise ValueError(
            f"state_dict must have the 'state' and the 'param_groups' of an optimizer, got the keys "
            f'{shown(list(state))}. Nothing was loaded. Pass what state_dict() returned.'
        )


def _is_zero_on_host(rate: float | Tensor) -> bool:
    return bool(rate == 0) if not isinstance(rate, Tensor) or rate.device.type == 'cpu' else False


def _has_pre_hooks(optimizer: Optimizer) -> bool:
    """Whether a hook that may write the weights runs before the closure."""
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    return bool(optimizer._optimizer_step_pre_hooks or _global_optimizer_pre_hooks)


def _or(result: Any, otherwise: Any) -> Any:
    return otherwise if result is None else result
