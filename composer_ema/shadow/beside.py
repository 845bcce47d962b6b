"""The average as a module of its own beside the model: the model's modules again, around the average's memory.

Invariant: during a forward each parameter lies in the memory of the average, or of the model if that is not averaged,
and each buffer is a copy of what the average, or the model, holds when the forward begins. Whatever cannot be made so
raises before the forward.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from composer_ema.kernels.rules import is_inexact
from composer_ema.model.apart import is_apart, named_parts, set_apart
from composer_ema.model.inventory import Inventory
from composer_ema.model.names import listed
from composer_ema.model.sharding import is_sharded
from composer_ema.model.untraced import aside, is_traced
from composer_ema.model.wrappers import canonical_name
from composer_ema.shadow import loan
from composer_ema.shadow.beside_tensors import BufferSource, Copies, OwnBuffers, OwnParameter
from composer_ema.shadow.follower import Follower
from composer_ema.shadow.plan import Plan
from composer_ema.shadow.storage import Storage, views_of_parameters

#: The first attribute of the module, so that copies find its buffers up to date.
_MARK = '_composer_ema_average'


def module_beside(model: nn.Module, storage: Storage, follower: Follower, keeper: Any, *, may_copy: bool) -> nn.Module:
    """The module; see :meth:`composer_ema.ShadowModel.module`.

    Args:
        model: the model followed, unwrapped. Only read.
        storage: the average.
        follower: moves it.
        keeper: the object that holds the average, which is not copied where the model refers to it.
        may_copy: whether parameters that the model has in another dtype or on another device may be copies.
    """
    _refuse_unsupported(model, storage)
    with torch.inference_mode(False):
        link = _Link(model, storage, follower, may_copy=may_copy)
        module = _copied(model, link.parameters_for(model), keeper)
        link.take_in(module)
    return module


def _refuse_unsupported(model: nn.Module, storage: Storage) -> None:
    if is_apart(model):
        raise ValueError('model computes with an average itself. Pass the model that the average follows.')
    if storage.settings.shard_over_ranks:
        raise NotImplementedError(
            'shard_over_ranks=True: this rank keeps a piece of the average, so no module can compute with its memory. '
            'Leave shard_over_ranks out, or keep a second model and call shadow.copy_to(it) on every rank.'
        )
    if is_sharded(model):
        raise NotImplementedError(
            'the model is sharded (FSDP2 or tensor parallelism), and torch cannot copy its modules. Build a second '
            'model, shard it alike, and call shadow.copy_to(it) after each update: every rank copies its own shards, '
            'and nothing is sent.'
        )
    for path, module in named_parts(model):
        if isinstance(module, torch.jit.ScriptModule):
            raise NotImplementedError(
                f'{path or "the model"} is scripted, and torch cannot copy it without its tensors. Build the average '
                'over the model before torch.jit.script, or lend the average: with shadow.swapped(model).'
            )


def _copied(model: nn.Module, parameters: Mapping[int, nn.Parameter], keeper: Any) -> nn.Module:
    """The modules of ``model`` again, in evaluation mode, with other parameters and with copies of its buffers."""
    memo: dict[int, Any] = {**parameters, id(keeper): keeper}
    for module in model.modules():
        if is_apart(module):
            memo[id(module)] = None
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor) and value.grad_fn is not None:  # which deepcopy refuses; as of old weight_norm
                memo[id(value)] = value.detach().clone()
    try:
        module = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f'module(model) copies the modules of a model, and these cannot be copied: {error}. Pass a model that '
            'copy.deepcopy copies, or lend the average: with shadow.swapped(model).'
        ) from error
    if {id(each) for each in module.parameters()} != {id(each) for each in parameters.values()}:
        raise ValueError(
            'module(model) copies the modules of a model around other parameters, and a __deepcopy__ of this one makes '
            'parameters of its own. Let it pass memo on, or lend the average: with shadow.swapped(model).'
        )
    return module.eval()


class _Link:
    """What ties a module to an average and to the model that the average follows.

    Args:
        model: not kept alive.
        storage, follower: the average.
        may_copy: see :func:`module_beside`.
    """

    def __init__(self, model: nn.Module, storage: Storage, follower: Follower, *, may_copy: bool) -> None:
        self._model = weakref.ref(model)
        self._storage, self._follower, self._may_copy = storage, follower, may_copy
        self._types = _types_of(model)
        self._parameters: dict[str, OwnParameter] = {}
        #: The modules around these parameters, by canonical path.
        self._modules: dict[str, nn.Module] = {}
        self._buffers: list[OwnBuffers] = []
        self._plan: weakref.ref[Plan] | None = None
        #: By thread, the module whose forward is the outermost, and the number of updates when it began.
        self._inside: dict[int, tuple[nn.Module, int]] = {}
        #: Whether the forward of the whole module runs.
        self._is_open = False
        #: Whether a graph may have saved the copies of buffers.
        self._may_be_saved = False

    def parameters_for(self, model: nn.Module) -> dict[int, nn.Parameter]:
        """By the identity of each parameter of the model, that of the module."""
        self._follow(model)
        for each in self._parameters.values():
            each.bind(self._storage, {})
        parameters = Inventory.of(model).parameters
        return {id(live): self._parameters[name].parameter for name, live in parameters.items()}  # pyright: ignore[reportReturnType]: bound above

    def take_in(self, module: nn.Module) -> None:
        """Brings ``module`` up to date, now and before each forward of it or of a part of it."""
        self._modules = {_canonical(path): part for path, part in named_parts(module)}
        self._plan = None
        self.refresh()
        set_apart(module)
        for part in module.modules():
            if any(True for _ in part.parameters()) or any(True for _ in part.buffers()):
                before, after = (self._before_all, self._after_all) if part is module else (self._before, self._after)
                part.register_forward_pre_hook(_Hook(before), prepend=True)
                part.register_forward_hook(_Hook(after), always_call=True)
        module.register_state_dict_pre_hook(_Hook(self._before_state_dict))
        module.register_state_dict_post_hook(_Hook(_leave_out_of_others))
        module.register_load_state_dict_pre_hook(_Hook(_refuse_to_load))
        module.__dict__ = {_MARK: _Hook(_nothing, on_copy=self.refresh), **vars(module)}

    def refresh(self) -> None:
        """Makes the module hold what the average and the model hold.

        Raises:
            RuntimeError: the model is no longer what it was, or the module was moved away from the average.
            ValueError: as for an update, or a parameter needs a copy and may not have one.
        """
        with torch.inference_mode(False), torch.no_grad():
            model = self._model()
            if model is not None:
                self._follow(model)
            self._follower.wait()
            stash = {} if model is None or not loan.is_open(model) else loan.training_weights(model)
            for parameter in self._parameters.values():
                parameter.bind(self._storage, stash)
            copies = Copies(in_place=not self._may_be_saved)
            for buffers in self._buffers:
                buffers.refresh(self._storage, stash, copies)
            copies.run()
        self._may_be_saved = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

    # Hooks

    def _before(self, module: nn.Module, _: Any) -> None:
        if not is_traced():
            self._begin(module)
        elif not self._is_open:  # a part inside breaks no graph
            aside(self._begin, module)

    def _begin(self, module: nn.Module) -> None:
        thread, count = threading.get_ident(), self._storage.num_updates
        inside = self._inside.get(thread)
        # After an interrupt, a forward that was inside has not ended.
        if inside is None or inside[0] is module or inside[1] != count:
            self.refresh()
            self._inside[thread] = module, count
            self._is_open = self._is_open or module is self._modules['.']

    def _before_all(self, module: nn.Module, _: Any) -> None:
        aside(self._begin, module)

    def _after(self, module: nn.Module, *_: Any) -> None:
        if not is_traced():
            self._end(module)
        elif not self._is_open:
            aside(self._end, module)

    def _after_all(self, module: nn.Module, *_: Any) -> None:
        aside(self._end, module)

    def _end(self, module: nn.Module) -> None:
        thread = threading.get_ident()
        if thread in self._inside and self._inside[thread][0] is module:
            del self._inside[thread]
            self._is_open = self._is_open and module is not self._modules['.']
            self._follower.was_read()

    def _before_state_dict(self, *_: Any) -> None:
        self.refresh()

    # The model

    def _follow(self, model: nn.Module) -> None:
        """Finds the tensors of the model again if it has changed.

        Raises:
            RuntimeError: it has other modules or parameters.
            ValueError: as for an update.
        """
        plan = self._follower.plan_for(model)
        if self._plan is not None and self._plan() is plan:
            return
        inventory = Inventory.of(model)
        if self._parameters:
            self._check_is_the_same(model, inventory)
        for name, live in inventory.parameters.items():
            parameter = self._parameters.setdefault(name, OwnParameter(name, live, may_copy=self._may_copy))
            parameter.follow(live, is_averaged=name in plan.sources)
        self._buffers = self._buffers_of(model, inventory, plan)
        self._plan = weakref.ref(plan)

    def _check_is_the_same(self, model: nn.Module, inventory: Inventory) -> None:
        types, names = _types_of(model), inventory.parameters.keys()
        changed = sorted(path for path in types.keys() | self._types if types.get(path) is not self._types.get(path))
        if changed or names != self._parameters.keys():
            paths = [path.removesuffix('.') or 'the model itself' for path in changed]
            raise RuntimeError(
                'the model has changed since its average became a module: '
                f'{listed(paths or sorted(names ^ self._parameters.keys()))}. Call shadow.module(model) again.'
            )

    def _buffers_of(self, model: nn.Module, inventory: Inventory, plan: Plan) -> list[OwnBuffers]:
        names = {id(buffer): name for name, buffer in inventory.buffers.items()}
        parents = self._parents_of(inventory)
        found = {}
        for path, part in named_parts(model):
            if (own := self._modules.get(_canonical(path))) is not None:
                sources: dict[str, BufferSource | None] = {}
                for key, live in part._buffers.items():
                    sources[key] = None
                    if live is not None:
                        name = names[id(live)]
                        is_averaged = name in plan.sources and is_inexact(live)
                        sources[key] = BufferSource(live, name, is_averaged=is_averaged, parent=parents.get(name))
                found[id(own)] = OwnBuffers(own, sources, set(part._non_persistent_buffers_set))
        return list(found.values())

    def _parents_of(self, inventory: Inventory) -> dict[str, tuple[nn.Parameter, int]]:
        """For buffers in the memory of a parameter, that of the module in its place, and how far into it they begin.

        Raises:
            NotImplementedError: that has other strides, so that no view of it shows the same elements.
        """
        found = {}
        for view in views_of_parameters(inventory.parameters.values(), inventory.buffers):
            buffer = inventory.buffers[view]
            name = next(n for n, p in inventory.parameters.items() if views_of_parameters([p], {view: buffer}))
            live, own = inventory.parameters[name], self._parameters[name].parameter
            if own is None:
                continue  # before there is a module
            if own.stride() != live.stride() or own.dtype != buffer.dtype:
                raise NotImplementedError(
                    f'the buffer {view} is a view of {name}, whose average lies otherwise in memory. Make {name} '
                    'contiguous before the average is built, or lend the average: with shadow.swapped(model).'
                )
            found[view] = own, buffer.storage_offset() - live.storage_offset()
        return found


class _Hook:
    """A hook that copies of a module lack: they call a function that does nothing.

    Args:
        function: the hook.
        on_copy: called when a module that has the hook is copied or pickled. Default: nothing.
    """

    def __init__(self, function: Callable[..., None], *, on_copy: Callable[[], None] | None = None) -> None:
        self._function, self._on_copy = function, on_copy

    def __call__(self, *args: Any) -> None:
        self._function(*args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        del protocol
        if self._on_copy is not None:
            self._on_copy()
        return _without_link, ()


def _without_link() -> Callable[..., None]:
    return _nothing


def _nothing(*_: Any) -> None:
    """A hook of a copy, which has no link to an average."""


def _leave_out_of_others(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Takes the module out of the state dict of a model in which it stands."""
    del module
    paths, own = getattr(state, '_metadata', {}), prefix.removesuffix('.')
    if not any(path != own and (not path or prefix.startswith(f'{path}.')) for path in paths):
        return  # its own state dict
    for key in [key for key in state if key.startswith(prefix)]:
        del state[key]
    for path in [path for path in paths if path == own or path.startswith(prefix)]:
        del paths[path]


def _refuse_to_load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Raises where a state dict is loaded into the module; of one for a model in which it stands it takes nothing."""
    if not prefix:
        raise RuntimeError(
            'the module computes with the memory of the average, so a state dict loaded into it would overwrite parts '
            'of that. Nothing was loaded. Load the average: shadow.load_state_dict(state).'
        )
    for key in [key for key in state if key.startswith(prefix)]:
        del state[key]
    state.update(module.state_dict(prefix=prefix, keep_vars=True))


def _types_of(model: nn.Module) -> dict[str, type]:
    """The class of the innermost module at each canonical path."""
    return {_canonical(path): type(module) for path, module in named_parts(model)}


def _canonical(path: str) -> str:
    return canonical_name(f'{path}.')
