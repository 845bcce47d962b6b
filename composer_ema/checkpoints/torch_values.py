"""What the pickle of a torch file may name, and what is made of it.

Invariant: whatever the arguments are, no function of the table runs code of the file, reaches memory outside of it, or
takes more memory than it is long.
"""

from __future__ import annotations

import argparse
import datetime
import math
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch._utils import _set_obj_state, set_tensor_metadata
from torch.torch_version import TorchVersion

from composer_ema.checkpoints.inert_pickle import Global, InertPickleError, Known, Record, are_keys

# As many as torch has, and what its sizes are counted with.
_MAX_DIMENSIONS, _MAX_COUNT = 64, 2**63


@dataclass(frozen=True)
class Storage:
    """The bytes of a tensor or of several, and the dtype that the file says they have."""

    untyped: torch.UntypedStorage
    dtype: torch.dtype


@dataclass(frozen=True)
class SavedShard:
    """A DTensor in a file.

    Attributes:
        part: what the process held that saved it.
        shape: of the whole.
    """

    part: Tensor
    shape: tuple[int, ...]


def known(trusted: Mapping[str, Any]) -> Known:
    """The table: from a module and a name to what is made of it, or None for what is not in it.

    Args:
        trusted: by full name, further classes and functions, which are called with whatever the file says.
    """

    def find(module: str, name: str) -> Global | None:
        # As Python 2 named it, and as protocol 2 therefore names it still.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        if (module, name) in _TABLE:
            return _TABLE[module, name]
        if module in _OF_SHARDS or module.startswith(_OF_SHARDS_IN):
            return Global(module, name)
        chosen = trusted.get(f'{module}.{name}')
        return None if chosen is None else _trusted(module, name, chosen)

    return find


def without_tensors(table: Known) -> Known:
    """A table that makes no tensors, only None where they belong."""

    def find(module: str, name: str) -> Global | None:
        found = table(module, name)
        is_tensor = found is not None and module in ('torch._utils', 'torch._tensor')
        return Global(module, name, lambda *_: None) if is_tensor else found

    return find


def dtype_of_storage(kind: Any) -> torch.dtype:
    """The dtype of what a pickle names as the class of a storage."""
    if type(kind) is not Global or kind.name not in _STORAGES:
        raise InertPickleError('it holds a storage of no known class.')
    return _STORAGES[kind.name]


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number that torch can count with."""
    return type(value) is int and 0 <= value < _MAX_COUNT


def _refuse(what: str) -> InertPickleError:
    return InertPickleError(f'it is damaged: {what}.')


# Tensors


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > _MAX_DIMENSIONS or not all(map(is_count, value)):
        raise _refuse('a shape in it is none')
    if math.prod(each for each in value if each) >= _MAX_COUNT:
        raise _refuse('a tensor in it has more elements than torch can count')
    return tuple(value)


def _extent(size: tuple[int, ...], stride: Any) -> int:
    """How many elements lie between the first and the last one, these included."""
    if not isinstance(stride, (tuple, list)) or len(stride) != len(size) or not all(map(is_count, stride)):
        raise _refuse('a tensor in it has no strides')
    return 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None) -> Tensor:
    """torch's ``_rebuild_tensor``, which takes any size, and enlarges a storage that is too small for it."""
    if type(storage) is not Storage or not is_count(offset):
        raise _refuse('a tensor in it has no storage')
    dtype = storage.dtype if dtype is None else dtype
    if dtype not in _DTYPES.values():
        raise _refuse('a tensor in it has no dtype')
    return _placed(torch.empty(0, dtype=dtype, device='cpu'), storage, offset, _shape(size), stride)


def _placed(tensor: Tensor, storage: Storage, offset: int, size: tuple[int, ...], stride: Any) -> Tensor:
    """The tensor with this size and these strides in a storage, which has room for it."""
    extent = _extent(size, stride)
    if (offset + extent) * tensor.itemsize > storage.untyped.nbytes() and extent:
        raise _refuse('a tensor in it is larger than its storage')
    return tensor.set_(storage.untyped, offset if extent else 0, size, tuple(stride))  # pyright: ignore[reportArgumentType]: torch takes untyped storages


def _tensor_2(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any = None, metadata: Any = None
) -> Tensor:
    return _with_metadata(_with_grad(_tensor(storage, offset, size, stride), requires_grad), metadata)


def _tensor_3(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Tensor:
    return _with_metadata(_with_grad(_tensor(storage, offset, size, stride, dtype), requires_grad), metadata)


def _with_grad(tensor: Tensor, requires_grad: Any) -> Tensor:
    may = tensor.is_floating_point() or tensor.is_complex()
    return tensor.requires_grad_() if requires_grad is True and may else tensor


def _with_metadata(tensor: Tensor, metadata: Any) -> Tensor:
    """The tensor, negative or conjugate where its values lie so in the storage."""
    if not metadata:
        return tensor
    marks = {name for name, is_set in metadata.items() if is_set is True}
    if marks - {'conj', 'neg'} or not (tensor.is_complex() or (tensor.is_floating_point() and marks <= {'neg'})):
        raise _refuse('a tensor in it is marked as none can be')
    set_tensor_metadata(tensor, dict.fromkeys(marks, True))
    return tensor


def _meta_tensor(dtype: Any, size: Any, stride: Any, requires_grad: Any) -> Tensor:
    size = _shape(size)
    if dtype not in _DTYPES.values() or _extent(size, stride) * dtype.itemsize >= _MAX_COUNT:
        raise _refuse('a tensor in it has more bytes than torch can count')
    return _with_grad(torch.empty_strided(size, tuple(stride), dtype=dtype, device='meta'), requires_grad)


def _sparse_tensor(layout: Any, data: Any) -> Tensor:
    """torch's ``_rebuild_sparse_tensor``, with its check before anybody can use the tensor."""
    coordinates = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
    count = {torch.sparse_coo: 2}.get(layout, 3 if layout in coordinates else 0)
    if not count or type(data) is not tuple or len(data) not in ({3, 4} if count == 2 else {4}):
        raise _refuse('a sparse tensor in it is none')
    parts: Any = data[:count]
    size = _shape(data[count])
    if not all(map(_is_dense, parts)):
        raise _refuse('a sparse tensor in it has no indices or values')
    if count == 2:
        coalesced = data[3] if len(data) == 4 and type(data[3]) is bool else None
        return torch.sparse_coo_tensor(parts[0], parts[1], size, is_coalesced=coalesced, check_invariants=True)
    return torch.sparse_compressed_tensor(parts[0], parts[1], parts[2], size, layout=layout, check_invariants=True)


def _quantized_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, scheme: Any, requires_grad: Any = False, hooks: Any = None
) -> Tensor:
    """torch's ``_rebuild_qtensor``, with as many scales as there are channels."""
    if type(storage) is not Storage or storage.dtype not in _QUANTIZED or not is_count(offset):
        raise _refuse('a quantized tensor in it has no storage')
    size, dtype = _shape(size), storage.dtype
    if scheme[0] is torch.per_tensor_affine:
        _, scale, zero = scheme
        empty = torch._empty_affine_quantized((0,), scale=scale, zero_point=zero, dtype=dtype, device='cpu')
        return _placed(empty, storage, offset, size, stride)
    if scheme[0] not in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
        raise _refuse('a quantized tensor in it has no known scheme')
    _, scales, zeros, axis = scheme
    if not is_count(axis) or axis >= len(size) or not _is_dense(scales) or not _is_dense(zeros):
        raise _refuse('a quantized tensor in it has no scales')
    if not scales.shape == zeros.shape == size[axis : axis + 1]:
        raise _refuse('a quantized tensor in it has not as many scales as channels')
    # Of this many elements along the axis and of none along the others, so that it takes no memory of its own.
    of_channels = tuple(n if dimension == axis else 0 for dimension, n in enumerate(size))
    empty = torch._empty_per_channel_affine_quantized(
        of_channels, scales=scales, zero_points=zeros, axis=axis, dtype=dtype, device='cpu'
    )
    return _placed(empty, storage, offset, size, stride)


def _is_dense(value: Any) -> bool:
    """Whether a value is a tensor that takes no more memory, and no more time to go through, than its storage."""
    return (
        isinstance(value, Tensor)
        and (value.layout, value.device.type) == (torch.strided, 'cpu')
        and value.numel() * value.itemsize <= value.untyped_storage().nbytes()
    )


def _parameter(data: Any, requires_grad: Any, hooks: Any = None, state: Any = None) -> Any:
    """A parameter, without what else was written on it."""
    if type(data) is SavedShard:
        return data
    if not isinstance(data, Tensor):
        raise _refuse('a parameter in it is no tensor')
    may = data.is_floating_point() or data.is_complex()
    return nn.Parameter(data.detach(), requires_grad is True and may)


def _of_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor of another class: a plain one without what else was written on it, or a DTensor."""
    if type(function) is not Global or type(kind) not in (Global, Record) or type(arguments) is not tuple:
        raise _refuse('a tensor in it has no class')
    if kind.name == 'DTensor' and function.name == '_rebuild_wrapper_subclass':
        # The attributes of the object, and those in slots, where some releases of torch have them.
        parts = state if type(state) is tuple else (state,)
        attributes = {name: value for each in parts if type(each) is dict for name, value in each.items()}
        part, shape = attributes.get('_local_tensor'), _shape(arguments[2])
        if not isinstance(part, Tensor):
            raise _refuse('a DTensor in it has no part of this process')
        return SavedShard(part, shape)
    if function.make is None or function.name not in _REBUILDS:
        raise _refuse('a tensor in it is rebuilt by no known function')
    made = function.make(*arguments)
    if kind.is_trusted:
        return _set_obj_state(made.as_subclass(kind.make), state)
    if (kind.module, kind.name) not in _TENSOR_CLASSES:
        raise InertPickleError(f'it holds a tensor of the class {kind.module}.{kind.name}, which is not read.')
    return made


def _moved(data: Any, dtype: Any, device: Any, requires_grad: Any) -> Tensor:
    """A tensor of a device that saves copies on the host."""
    if isinstance(data, np.ndarray):
        data = torch.from_numpy(data.copy())
    if not _is_dense(data) or dtype not in _DTYPES.values() or data.itemsize * 16 < dtype.itemsize:
        raise _refuse('a tensor of a device in it has no values')
    return _with_grad(data.to(dtype=dtype), requires_grad)


# Arrays


_CODES = re.compile(r'[<>=|]?(\?|[bBhHiIlLqQefdFD]|b1|[iu][1248]|f[248]|c(8|16)|[SU]\d{1,9})')


def _dtype(code: Any, align: Any = False, copy: Any = True) -> np.dtype[Any]:
    """A dtype of its own, whose order of bytes :func:`_ordered` sets. None holds objects or fields."""
    if type(code) is not str or not _CODES.fullmatch(code):
        raise InertPickleError(f'it holds an array of the dtype {code!r}, which is not read.')
    return np.dtype(code, copy=True)


def _ordered(dtype: Any, state: Any) -> None:
    order, rest = state[1], state[2:5]
    if order not in ('<', '>', '=', '|') or rest != (None, None, None) or (dtype.kind in 'SU' and order == '>'):
        raise InertPickleError('it holds an array with fields, or of a dtype that is not read.')
    if dtype.kind not in 'SU':
        dtype.__setstate__((3, order, None, None, None, -1, -1, 0))


def _array(kind: Any, shape: Any, code: Any) -> np.ndarray[Any, Any]:
    """An array that :func:`_filled` fills."""
    if type(kind) is not Global or (kind.module, kind.name) != ('numpy', 'ndarray'):
        raise _refuse('an array in it has no class')
    return np.empty(0, np.int8)


def _filled(array: Any, state: Any) -> None:
    _, shape, dtype, is_fortran, data = state
    shape = _shape(shape)
    if not isinstance(dtype, np.dtype) or dtype.hasobject or type(is_fortran) is not bool or type(data) is not bytes:
        raise _refuse('an array in it has no values')
    if len(data) != math.prod(shape) * dtype.itemsize or len(shape) > 32:
        raise _refuse('the shape of an array in it is not that of its values')
    array.__setstate__((1, shape, dtype, is_fortran, data))


def _scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, np.dtype) or dtype.hasobject or type(data) is not bytes or len(data) != dtype.itemsize:
        raise _refuse('a number in it has no value')
    return np.frombuffer(data, dtype, count=1)[0] if dtype.itemsize else dtype.type()


# Everything else


def _encoded(text: Any, code: Any = 'latin1') -> bytes:
    if type(text) is not str or code not in ('latin1', 'latin-1'):
        raise _refuse('bytes in it are written in no known way')
    return text.encode('latin1')


def _bytes() -> bytes:
    return b''


def _bytearray(data: Any = b'', code: Any = None) -> bytearray:
    return bytearray(data if type(data) is bytes else _encoded(data, code))  # of a number it has as many zeros


def _members(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    def make(members: Any = ()) -> Any:
        if type(members) not in (list, tuple) or not are_keys(members):
            raise _refuse('a set in it has no members')
        return kind(members)

    return make


def _ordered_dict(pairs: Any = ()) -> OrderedDict[Any, Any]:
    made: OrderedDict[Any, Any] = OrderedDict()
    if type(pairs) not in (list, tuple) or not are_keys([key for key, _ in pairs]):
        raise _refuse('a dictionary in it has no items')
    for key, value in pairs:
        made[key] = value
    return made


def _with_attributes(made: OrderedDict[Any, Any], state: Any) -> None:
    """As modules write versions beside a state dict, and ``export`` its metadata; none takes the place of a method."""
    if type(state) is not dict or not all(type(name) is str for name in state):
        raise _refuse('the attributes of a dictionary in it have no names')
    vars(made).update({name: value for name, value in state.items() if name not in _METHODS})


_METHODS = frozenset(dir(OrderedDict))


def _counter(counts: Any = None) -> Counter[Any]:
    made: Counter[Any] = Counter()
    dict.update(made, counts if type(counts) is dict else {})
    return made


_FACTORIES = {'list': list, 'dict': dict, 'set': set, 'int': int, 'float': float, 'str': str, 'tuple': tuple}


def _default_dict(factory: Any = None) -> defaultdict[Any, Any]:
    if factory is not None and (type(factory) is not Global or factory.module != 'builtins'):
        raise _refuse('a dictionary in it makes what is not known')
    return defaultdict(None if factory is None else _FACTORIES[factory.name])


def _complex(real: Any = 0.0, imaginary: Any = 0.0) -> complex:
    if not all(type(part) in (int, float) for part in (real, imaginary)):
        raise _refuse('a complex number in it is none')
    return complex(real, imaginary)


def _size(dimensions: Any = ()) -> torch.Size:
    return torch.Size(_shape(dimensions))


def _device(kind: Any, index: Any = None) -> torch.device:
    if type(kind) is not str or not (index is None or is_count(index)):
        raise _refuse('a device in it is none')
    return torch.device(kind) if index is None else torch.device(kind, index)


def _layout(name: Any) -> torch.layout:
    layout = vars(torch).get(name.removeprefix('torch.'))
    if not isinstance(layout, torch.layout):
        raise _refuse('a layout in it is none')
    return layout


def _time(days: Any = 0, seconds: Any = 0, microseconds: Any = 0) -> datetime.timedelta:
    if not all(type(part) is int and abs(part) < 10**9 for part in (days, seconds, microseconds)):
        raise _refuse('a time in it is none')
    return datetime.timedelta(days, seconds, microseconds)


def _version(text: Any) -> TorchVersion:
    if type(text) is not str:
        raise _refuse('a version in it is none')
    return TorchVersion(text)


def _namespace() -> argparse.Namespace:
    return argparse.Namespace()


def _named_attributes(made: argparse.Namespace, state: Any) -> None:
    if type(state) is not dict or not all(type(name) is str for name in state):
        raise _refuse('the arguments in it have no names')
    vars(made).update(state)


def _never(*_: Any) -> Any:
    raise _refuse('it calls what is no function')


def _not_read(what: str) -> Callable[..., Any]:
    def make(*_: Any) -> Any:
        raise InertPickleError(f'it holds {what}, which are not read.')

    return make


_REBUILDS: dict[str, Callable[..., Any]] = {
    '_rebuild_tensor': _tensor,
    '_rebuild_tensor_v2': _tensor_2,
    '_rebuild_tensor_v3': _tensor_3,
    '_rebuild_parameter': _parameter,
    '_rebuild_parameter_with_state': _parameter,
    '_rebuild_sparse_tensor': _sparse_tensor,
    '_rebuild_meta_tensor_no_storage': _meta_tensor,
    '_rebuild_device_tensor_from_numpy': _moved,
    '_rebuild_xla_tensor': _moved,
    '_rebuild_device_tensor_from_cpu_tensor': _moved,
    '_rebuild_qtensor': _quantized_tensor,
    # torch builds them from sizes and offsets that it does not check.
    '_rebuild_nested_tensor': _not_read('nested tensors'),
    # Of a DTensor alone, see _of_type.
    '_rebuild_wrapper_subclass': _not_read('tensors of a class of their own'),
}

_STORAGES = {
    'DoubleStorage': torch.float64, 'FloatStorage': torch.float32, 'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16, 'LongStorage': torch.int64, 'IntStorage': torch.int32,
    'ShortStorage': torch.int16, 'CharStorage': torch.int8, 'ByteStorage': torch.uint8, 'BoolStorage': torch.bool,
    'QInt8Storage': torch.qint8, 'QUInt8Storage': torch.quint8, 'QInt32Storage': torch.qint32,
    'ComplexDoubleStorage': torch.complex128, 'ComplexFloatStorage': torch.complex64, 'UntypedStorage': torch.uint8,
}  # fmt: skip

# Those that torch computes with: not the quantized ones, nor those that are names only.
_DTYPES = {
    name: value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype)
    and re.fullmatch(r'bool|u?int(8|16|32|64)|bfloat16|b?float(16|32|64)|float[48]_\w+|complex(32|64|128)', name)
}
_QUANTIZED = (torch.qint8, torch.quint8, torch.qint32)
_CONSTANTS = {
    name: value
    for name, value in vars(torch).items()
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format, torch.qscheme))
}

_TENSOR_CLASSES = {('torch', 'Tensor'), ('torch._tensor', 'Tensor'), ('torch.nn.parameter', 'Parameter')}
# What a DTensor says of its mesh and its placements, of which only the shape is asked for.
_OF_SHARDS, _OF_SHARDS_IN = (
    ('torch.distributed.device_mesh', 'torch.distributed._mesh_layout'),
    ('torch.distributed.tensor',),
)


def _row(module: str, name: str, make: Callable[..., Any], build: Any = None) -> dict[tuple[str, str], Global]:
    return {(module, name): Global(module, name, make, build=build)}


_TABLE: dict[tuple[str, str], Global] = {
    **_row('collections', 'OrderedDict', _ordered_dict, _with_attributes),
    **_row('collections', 'Counter', _counter),
    **_row('collections', 'defaultdict', _default_dict),
    **_row('_codecs', 'encode', _encoded),
    **_row('builtins', 'bytes', _bytes),
    **_row('builtins', 'bytearray', _bytearray),
    **_row('builtins', 'set', _members(set)),
    **_row('builtins', 'frozenset', _members(frozenset)),
    **_row('builtins', 'complex', _complex),
    **_row('torch', 'Size', _size),
    **_row('torch', 'device', _device),
    **_row('torch.serialization', '_get_layout', _layout),
    **_row('torch.torch_version', 'TorchVersion', _version),
    **_row('torch._tensor', '_rebuild_from_type_v2', _of_type),
    **_row('datetime', 'timedelta', _time),
    **_row('argparse', 'Namespace', _namespace, _named_attributes),
    **_row('numpy', 'ndarray', _never),
    **_row('numpy', 'dtype', _dtype, _ordered),
    **{
        key: value
        for module in ('numpy.core.multiarray', 'numpy._core.multiarray')
        for key, value in (
            *_row(module, '_reconstruct', _array, _filled).items(),
            *_row(module, 'scalar', _scalar).items(),
        )
    },
    **{key: row for name, make in _REBUILDS.items() for key, row in _row('torch._utils', name, make).items()},
    **{('torch', name): Global('torch', name, value=value) for name, value in _CONSTANTS.items()},
    **{key: row for each in sorted(_TENSOR_CLASSES) for key, row in _row(*each, _never).items()},
    **{key: row for name in _FACTORIES if name != 'set' for key, row in _row('builtins', name, _never).items()},
    **{
        key: row
        for module in ('torch', 'torch.cuda', 'torch.storage')
        for name in _STORAGES
        for key, row in _row(module, name, _never).items()
    },
}


def _trusted(module: str, name: str, chosen: Any) -> Global:
    """A class or function of the user's: called, made and filled as pickle does it."""
    new = (lambda *arguments: chosen.__new__(chosen, *arguments)) if isinstance(chosen, type) else None
    return Global(module, name, chosen, new, _set_state, is_trusted=True)


def _set_state(made: Any, state: Any) -> None:
    if hasattr(made, '__setstate__'):
        made.__setstate__(state)
        return
    attributes, slots = state if type(state) is tuple and len(state) == 2 else (state, None)
    vars(made).update(attributes or {})
    for key, value in (slots or {}).items():
        setattr(made, key, value)
