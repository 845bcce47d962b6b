"""A module as it was before its code ran: what a forward may have written in Python, put back in place.

Invariant: nothing is replaced by a copy. Whoever refers to an attribute, a list or a tensor of the module, such as a
hook or an optimizer, still refers to it while the module runs and afterwards.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from composer_ema.model.sharding import is_shard, local

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
_MOST_TRANSFORMS = 1000  # a container of more entries holds samples, not what transforms them


class Rollback:
    """Notes a module and puts it back.

    Covered are, in the module and every module that it leads to: attributes and training flags, registered names and
    hooks; parameters, buffers and other tensors; arrays; lists, dictionaries, sets and deques; random generators; and
    objects of plain classes, with ``__slots__`` or without, that consist of all these. An object that leads to anything
    else, such as an iterator, a lock, a file, a data loader or a Trainer, stands around the module: it is left alone,
    and so is what code keeps elsewhere, in closures, classes or globals.

    Args:
        module: only read. Takes memory for a copy of its tensors, on their devices, until :meth:`restore` returns.
        stashed: parameters whose values somebody else keeps and puts back afterwards. They are not copied.

    Attributes:
        left_alone: attributes that hold an object that is not covered, each with its class.
    """

    def __init__(self, module: nn.Module, *, stashed: Iterable[Tensor] = ()) -> None:
        self.left_alone: list[str] = []
        self._dictionaries: list[tuple[dict, dict]] = []
        self._undo: list[Callable[[], object]] = []
        self._tensors: list[_Noted | _NotedShard] = []
        self._stashed = {id(tensor) for tensor in stashed}
        self._seen: dict[int, Any] = {}  # holds what it names, so that no name is given twice
        self._covered: set[int] = set()
        registered = [*module.parameters(), *module.buffers()]
        self._registered = {id(tensor) for tensor in registered}
        self._storages = {_storage(part) for part in map(local, registered) if _is_plain(part)}
        self._note(module, '')

    def restore(self, *, but: Iterable[Tensor] = ()) -> None:
        """Puts back all but the values of these tensors."""
        exempt = {id(tensor) for tensor in but}
        for dictionary, held in self._dictionaries:
            _restore_dictionary(dictionary, held)
        for undo in self._undo:
            undo()
        for noted in self._tensors:
            if id(noted.tensor) not in exempt:
                noted.restore()
        self._tensors.clear()  # frees the copies

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
                    self._dictionaries.append((vars(child), dict(vars(child))))
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

    def _note_tensor(self, tensor: Tensor) -> None:
        if tensor.device.type == 'meta' or is_lazy(tensor):
            return
        if is_shard(tensor):
            self._tensors.append(_NotedShard.of(tensor, copied=id(tensor) not in self._stashed))
            return
        if id(tensor) not in self._registered and _is_plain(tensor) and _storage(tensor) in self._storages:
            return  # a view of one that is noted
        strides = zip(tensor.shape, tensor.stride(), strict=True) if _is_plain(tensor) else ()
        if any(size > 1 and stride == 0 for size, stride in strides):
            return  # expanded: torch refuses to write it
        self._tensors.append(_Noted.of(tensor, copied=id(tensor) not in self._stashed))

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
        if slots := _slots(type(value)):
            self._undo.append(functools.partial(_restore_slots, value, slots, _filled(value, slots)))

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


class _Noted(NamedTuple):
    """A tensor as it was.

    Args:
        tensor: what code refers to.
        place: shares its memory, whatever memory the tensor is given.
        value: a copy; None where somebody else puts the value back.
        version: counts what autograd has seen of writes; None for an inference tensor.
    """

    tensor: Tensor
    place: Tensor
    value: Tensor | None
    version: int | None

    @classmethod
    def of(cls, tensor: Tensor, *, copied: bool) -> _Noted:
        value = tensor.detach().clone() if copied else None
        return cls(tensor, tensor.data, value, None if tensor.is_inference() else tensor._version)

    def restore(self) -> None:
        data = self.tensor.data  # unseen by autograd: a graph that waits for its backward stays valid
        if _layout(data) != _layout(self.place):
            self.tensor.data = data = self.place
        if self.value is None:
            return
        if data.layout is not torch.strided:
            if self._was_written():  # a copy into a sparse tensor's data would not reach the tensor
                self.tensor.data = self.value
        elif self._was_written() or not _is_equal(data, self.value):
            data.copy_(self.value)

    def _was_written(self) -> bool:
        """Whether autograd saw it; it does not see what is written through ``data``."""
        return self.version is not None and self.tensor._version != self.version


class _NotedShard(NamedTuple):
    """The part of a sharded tensor in this process, as it was.

    Args:
        tensor: what code refers to. FSDP2 may move its part to other memory at the first forward.
        value: a copy of the part; None where somebody else puts the value back.
    """

    tensor: Tensor
    value: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor, *, copied: bool) -> _NotedShard:
        return cls(tensor, local(tensor).detach().clone() if copied else None)

    def restore(self) -> None:
        if self.value is not None:
            local(self.tensor).data.copy_(self.value)  # unseen by autograd


def rewinding(owners: Iterable[Any]) -> list[Callable[[], object]]:
    """Notes the random generators that objects lead to. Each of the functions returned puts one back.

    Args:
        owners: data loaders, data sets, samplers, transforms; only read. Looked through are attributes, containers of
            no more than a thousand entries, bound methods and partial functions.
    """
    return [_rewinding(generator) for generator in _generators(owners)]


def _generators(owners: Iterable[Any]) -> Iterator[Any]:
    waiting, seen = list(owners), {}
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, _GENERATORS):
            if not isinstance(value, random.SystemRandom):
                yield value
        elif isinstance(value, types.MethodType):
            waiting.append(value.__self__)
        elif isinstance(value, functools.partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif not isinstance(value, (*_ATOMS, Tensor, np.ndarray)):
            waiting += _held(value)
            if isinstance(value, (dict, *_SEQUENCES)) and len(value) <= _MOST_TRANSFORMS:
                waiting += dict.values(value) if isinstance(value, dict) else value


def _parts(value: Any) -> Collection[Any] | None:
    """What an object holds; None where we do not know all of it."""
    held = _held(value)
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
    """Whether it is an object of a class written in Python, whose state is its dictionary and its slots."""
    if isinstance(value, (dict, *_SEQUENCES, *_GENERATORS, np.ndarray, bytearray)):
        return False
    kind = type(value)
    owns_more = hasattr(kind, '__del__') or kind.__module__.startswith(_ELSEWHERE)
    is_known = hasattr(value, '__dict__') or all('__slots__' in vars(each) for each in kind.__mro__[:-1])
    return is_known and not owns_more


def _held(value: Any) -> list[Any]:
    """What the attributes of an object refer to."""
    held = list(vars(value).values()) if hasattr(value, '__dict__') else []
    return [*held, *_filled(value, _slots(type(value))).values()]


def _slots(kind: type) -> tuple[types.MemberDescriptorType, ...]:
    """The ``__slots__`` of a class and of its bases; those of the same name, too, which hide one another."""
    slotted = [vars(each) for each in kind.__mro__ if '__slots__' in vars(each)]
    return tuple(each for names in slotted for each in names.values() if isinstance(each, types.MemberDescriptorType))


def _filled(value: Any, slots: Iterable[types.MemberDescriptorType]) -> dict[types.MemberDescriptorType, Any]:
    """The slots that hold something, with that."""
    filled = {}
    for slot in slots:
        with contextlib.suppress(AttributeError):
            filled[slot] = slot.__get__(value)
    return filled


def _restore_slots(value: Any, slots: Iterable[types.MemberDescriptorType], held: dict) -> None:
    for slot in slots:
        if slot in held:
            slot.__set__(value, held[slot])  # the object may be frozen
        else:
            with contextlib.suppress(AttributeError):
                slot.__delete__(value)


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has memory of its own at one place. A sparse tensor and one that wraps others have not."""
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.device.type == 'meta':
        return False
    try:
        _storage(tensor)
    except RuntimeError:
        return False
    return True


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies and how; sparse ones have no one place."""
    place = (_storage(tensor), tensor.storage_offset(), tensor.stride()) if _is_plain(tensor) else ()
    return (tensor.shape, tensor.dtype, tensor.device, *place)


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


def _is_equal(data: Tensor, value: Tensor) -> bool:
    try:
        return torch.equal(data, value)
    except (RuntimeError, TypeError):  # not for every dtype and class
        return False
