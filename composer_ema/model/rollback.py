"""A module as it was before its code ran: what a forward may have written in Python, put back in place.

Invariant: nothing is replaced by a copy. Whoever refers to an attribute, a list or a tensor of the module, such as a
hook or an optimizer, still refers to it while the module runs and afterwards.
"""

from __future__ import annotations

import datetime
import enum
import functools
import inspect
import logging
import numbers
import pathlib
import random
import re
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

# What cannot change, or does not belong to the module: code, other programs' records, references that hold nothing.
_ATOMS = (
    type(None), bool, int, float, str, numbers.Number, bytes, range, slice, enum.Enum, re.Pattern, pathlib.PurePath,
    type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, functools.partial,
    datetime.date, datetime.time, datetime.timedelta, inspect.Signature, logging.Logger, weakref.ref,
    np.generic, np.dtype, torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_LEAVES = (*_ATOMS, nn.Module, Tensor)
_SEQUENCES = (list, tuple, set, frozenset, deque)
_GENERATORS = (random.Random, np.random.Generator, np.random.BitGenerator, np.random.RandomState, torch.Generator)
# What a run owns: a pass over the data moves these forward itself, and may be there to write an average.
_OF_THE_RUN = (Optimizer, Dataset, DataLoader, Sampler)
_ELSEWHERE = ('composer_ema.', 'threading', 'torch._', 'torch.distributed')


class Rollback:
    """Notes a module and puts it back.

    Covered are, in the module and every module that it leads to: attributes and training flags, registered names and
    hooks; buffers and other tensors but no parameters, except embeddings that are renormalized when they are read;
    arrays; lists, dictionaries, sets and deques; random generators; and objects of plain classes that consist of all
    these. An object that leads to anything else, such as a lock, a file, a data loader or a Trainer, stands around the
    module: it is left alone, and so is what code keeps elsewhere, in closures, classes or globals.

    Args:
        module: only read. Takes memory for a copy of its tensors that are no parameters, of them only.

    Attributes:
        left_alone: attributes that hold an object that is not covered, each with its class.
    """

    def __init__(self, module: nn.Module) -> None:
        self.left_alone: list[str] = []
        self._dictionaries: list[tuple[dict, dict]] = []
        self._undo: list[Callable[[], object]] = []
        self._tensors: list[tuple[Tensor, Tensor, int]] = []
        self._seen: dict[int, Any] = {}  # holds what it names, so that no name is given twice
        self._covered: set[int] = set()
        registered = [*module.parameters(), *module.buffers()]
        self._registered = {id(tensor) for tensor in registered}
        self._storages = {_storage(tensor) for tensor in registered if _is_plain(tensor)}
        self._note(module, '')

    def restore(self, *, but: Iterable[Tensor] = ()) -> None:
        """Puts back all but the values of these tensors."""
        exempt = {id(tensor) for tensor in but}
        for dictionary, held in self._dictionaries:
            _restore_dictionary(dictionary, held)
        for undo in self._undo:
            undo()
        for tensor, value, version in self._tensors:
            if id(tensor) not in exempt:
                _restore_tensor(tensor, value, version)

    def _note(self, value: Any, path: str) -> None:
        waiting = [(value, path)]
        while waiting:
            value, path = waiting.pop()
            if isinstance(value, _ATOMS) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            if isinstance(value, nn.Module):
                for name, child in value.named_modules(prefix=path):
                    self._seen[id(child)] = child
                    self._note_module(child)
                    # Scripted modules do not keep their buffers among their attributes.
                    held = {**vars(child), **dict(child.named_buffers(recurse=False))}
                    waiting += [(each, f'{name}.{key}' if name else key) for key, each in held.items()]
            elif isinstance(value, Tensor):
                self._note_tensor(value)
            elif (parts := _parts(value)) is not None and self._is_covered(value):
                self._note_object(value)
                waiting += [(part, path) for part in parts if not isinstance(part, _ATOMS)]
            elif not type(value).__module__.startswith('torch'):  # what torch keeps there is not the model's
                self.left_alone.append(f'{path} ({type(value).__name__})')

    def _note_module(self, module: nn.Module) -> None:
        self._dictionaries.append((vars(module), dict(vars(module))))
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            self._keep_value(module.weight)

    def _note_tensor(self, tensor: Tensor) -> None:
        is_view = id(tensor) not in self._registered and _is_plain(tensor) and _storage(tensor) in self._storages
        if not isinstance(tensor, nn.Parameter) and not is_view:
            self._keep_value(tensor)

    def _keep_value(self, tensor: Tensor) -> None:
        if tensor.device.type == 'meta' or tensor.is_inference():
            return
        strides = zip(tensor.shape, tensor.stride(), strict=True) if _is_plain(tensor) else ()
        if any(size > 1 and stride == 0 for size, stride in strides):
            return  # expanded: torch refuses to write it
        self._tensors.append((tensor, tensor.detach().clone(), tensor._version))

    def _note_object(self, value: Any) -> None:
        if isinstance(value, dict):
            self._dictionaries.append((value, dict(value)))
            self._undo.append(functools.partial(_restore_order, value, list(value)))
        elif isinstance(value, list):
            self._undo.append(functools.partial(_restore_list, value, list(value)))
        elif isinstance(value, bytearray):
            self._undo.append(functools.partial(bytearray.__setitem__, value, slice(None), bytes(value)))
        elif isinstance(value, (set, deque)):
            self._undo.append(functools.partial(_refill, value, list(value)))
        elif isinstance(value, np.ndarray):
            if value.flags.writeable:
                self._undo.append(functools.partial(np.copyto, value, value.copy()))
        elif isinstance(value, _GENERATORS):
            self._undo.append(_rewinding(value))
        if hasattr(value, '__dict__'):
            self._dictionaries.append((vars(value), dict(vars(value))))

    def _is_covered(self, value: Any) -> bool:
        """Whether an object of a class of its own leads to nothing but what is covered. Containers always are."""
        if not _is_instance(value) or id(value) in self._covered:
            return True
        found, waiting = {id(value): value}, [value]
        while waiting:
            parts = _parts(waiting.pop())
            if parts is None:
                return False
            for part in parts:
                if not isinstance(part, _LEAVES) and id(part) not in found:
                    found[id(part)] = part
                    waiting.append(part)
        self._covered |= found.keys()
        return True


def _parts(value: Any) -> Collection[Any] | None:
    """What an object holds; None where we do not know all of it."""
    held = list(vars(value).values()) if hasattr(value, '__dict__') else []
    if isinstance(value, dict):
        return [*held, *value.values()]
    if isinstance(value, _SEQUENCES):
        return [*held, *value]
    if isinstance(value, (np.ndarray, bytearray)):
        return []
    if isinstance(value, _GENERATORS):
        return None if isinstance(value, random.SystemRandom) else []
    return held if _is_instance(value) and not isinstance(value, _OF_THE_RUN) else None


def _is_instance(value: Any) -> bool:
    """Whether it is an object of a class written in Python, whose state is its dictionary."""
    if isinstance(value, (dict, *_SEQUENCES, *_GENERATORS, np.ndarray, bytearray)):
        return False
    kind = type(value)
    owns_more = hasattr(kind, '__del__') or kind.__module__.startswith(_ELSEWHERE)
    return hasattr(value, '__dict__') and not owns_more


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type != 'meta'


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _restore_dictionary(dictionary: dict, held: dict) -> None:
    kind = _kind(dictionary)
    for key in [key for key in dictionary if key not in held]:
        kind.__delitem__(dictionary, key)
    for key, value in held.items():
        if key not in dictionary or kind.__getitem__(dictionary, key) is not value:
            kind.__setitem__(dictionary, key, value)


def _restore_order(dictionary: dict, keys: list) -> None:
    if list(dictionary) != keys:
        kind, held = _kind(dictionary), {key: dictionary[key] for key in keys}
        kind.clear(dictionary)
        kind.update(dictionary, held)


def _kind(dictionary: dict) -> type[dict]:
    """The class whose methods write the dictionary itself, whatever a subclass makes of them."""
    return OrderedDict if isinstance(dictionary, OrderedDict) else dict


def _restore_list(items: list, held: list) -> None:
    list.__setitem__(items, slice(None), held)


def _refill(items: set | deque, held: list) -> None:
    items.clear()
    items.extend(held) if isinstance(items, deque) else items.update(held)


def _rewinding(generator: Any) -> Callable[[], object]:
    if isinstance(generator, np.random.Generator):
        generator = generator.bit_generator
    if isinstance(generator, np.random.BitGenerator):
        return functools.partial(setattr, generator, 'state', generator.state)
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    return functools.partial(generator.set_state, generator.get_state())


def _restore_tensor(tensor: Tensor, value: Tensor, version: int) -> None:
    data = tensor.data  # unseen by autograd: a graph that waits for its backward stays valid
    if (data.shape, data.dtype, data.device) != (value.shape, value.dtype, value.device):
        tensor.data = value
    elif tensor._version != version or (_is_plain(tensor) and not _is_equal(data, value)):
        data.copy_(value)


def _is_equal(data: Tensor, value: Tensor) -> bool:
    try:
        return torch.equal(data, value)
    except RuntimeError:  # not for every dtype
        return False
