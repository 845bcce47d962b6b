"""Files that try to execute something, or to crash who reads them; for the tests and the trial of what reads them."""

from __future__ import annotations

import contextlib
import io
import pickle
import resource
import shutil
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from folders import metadata_of, save, write_metadata

from composer_ema import export, load_average, merge, read_checkpoint, reconstruct
from composer_ema.checkpoints.inert_pickle import InertPickleError
from composer_ema.checkpoints.inspection import describe
from composer_ema.checkpoints.safely import load_safely

_NOTHING = object()


@dataclass(frozen=True)
class Call:
    """A call that a pickle asks for.

    Attributes:
        target: full name of the function or class.
        arguments: as values, calls or storages.
        state: what is given to the result. Default: nothing.
        new: whether ``__new__`` alone is called.
        named: by which operation the target is named: GLOBAL, or STACK_GLOBAL of protocol 4.
    """

    target: tuple[str, str]
    arguments: tuple[Any, ...] = ()
    state: Any = _NOTHING
    new: bool = False
    named: str = 'GLOBAL'


@dataclass(frozen=True)
class Name:
    """A class or function itself."""

    target: tuple[str, str]


@dataclass(frozen=True)
class Stored:
    """A storage of a torch file."""

    kind: str = 'FloatStorage'
    count: Any = 16
    key: Any = '0'


@dataclass(frozen=True)
class Raw:
    """Operations of a pickle as they are."""

    operations: bytes


def encoded(value: Any) -> bytes:
    """The operations of a pickle that make ``value``, of protocol 2 except where they cannot be."""
    match value:
        case Raw():
            return value.operations
        case Name():
            return f'c{value.target[0]}\n{value.target[1]}\n'.encode()
        case Call():
            module, name = value.target
            start = encoded(Name(value.target))
            if value.named == 'STACK_GLOBAL':
                start = encoded(module) + encoded(name) + b'\x93'
            made = start + encoded(tuple(value.arguments)) + (b'\x81' if value.new else b'R')
            return made if value.state is _NOTHING else made + encoded(value.state) + b'b'
        case Stored():
            identifier = ('storage', Name(('torch', value.kind)), value.key, 'cpu', value.count)
            return encoded(identifier) + b'Q'
        case None | bool():
            return {None: b'N', True: b'\x88', False: b'\x89'}[value]
        case int():
            size = (value.bit_length() + 8) // 8
            return b'\x8a' + bytes([size]) + value.to_bytes(size, 'little', signed=True)
        case float():
            return b'G' + struct.pack('>d', value)
        case str():
            text = value.encode('utf-8', 'surrogatepass')
            return b'X' + struct.pack('<I', len(text)) + text
        case bytes():
            return encoded(Call(('_codecs', 'encode'), (value.decode('latin1'), 'latin1')))
        case tuple():
            return b'(' + b''.join(map(encoded, value)) + b't'
        case list():
            return b'](' + b''.join(map(encoded, value)) + b'e'
        case dict():
            return b'}(' + b''.join(encoded(key) + encoded(each) for key, each in value.items()) + b'u'
    raise TypeError(value)


def pickled(value: Any) -> bytes:
    return b'\x80\x02' + encoded(value) + b'.'


def write_torch_file(
    path: Path, value: Any, storages: dict[str, bytes] | None = None, *, order: bytes = b'little'
) -> Path:
    """Writes a zip as ``torch.save`` does, with any pickle in it."""
    parts = {'data.pkl': pickled(value), 'byteorder': order, 'version': b'3\n'}
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in parts.items():
            archive.writestr(f'a/{name}', content)
        for key, content in (STORAGES if storages is None else storages).items():
            archive.writestr(f'a/data/{key}', content)
    return path


#: Sixteen floats, and twice sixteen whole numbers of 8 bytes.
STORAGES = {
    '0': struct.pack('<16f', *range(16)), '1': struct.pack('<16q', *([0, 1] * 8)), '2': struct.pack('<16q', *range(16)),
}  # fmt: skip


# What would execute something. Each of these makes a file or a folder at a path when Python unpickles it.


def payloads(trap: Path) -> dict[str, Any]:
    """Values by what they do."""
    at, code = str(trap), f'open({str(trap)!r}, "w").close()'
    inner = b'\x80\x02' + encoded(Call(('os', 'mkdir'), (at,))) + b'.'
    calls = {
        'os.mkdir': Call(('os', 'mkdir'), (at,)),
        'posix.mkdir': Call(('posix', 'mkdir'), (at,)),
        'os.makedirs': Call(('os', 'makedirs'), (at,)),
        'os.system': Call(('os', 'system'), (f'mkdir {at}',)),
        'posix.system': Call(('posix', 'system'), (f'mkdir {at}',)),
        'subprocess.call': Call(('subprocess', 'call'), (['mkdir', at],)),
        'subprocess.getoutput': Call(('subprocess', 'getoutput'), (f'mkdir {at}',)),
        'builtins.eval': Call(('builtins', 'eval'), (code,)),
        'builtins.exec': Call(('builtins', 'exec'), (code,)),
        'eval of Python 2': Call(('__builtin__', 'eval'), (code,)),
        'builtins.open': Call(('builtins', 'open'), (at, 'w')),
        'io.open': Call(('io', 'open'), (at, 'w')),
        'io.FileIO, new': Call(('io', 'FileIO'), (at, 'w')),
        'pickle.loads': Call(('pickle', 'loads'), (inner,)),
        '_pickle.loads': Call(('_pickle', 'loads'), (inner,)),
        '_load_from_bytes': Call(('torch.storage', '_load_from_bytes'), (_torch_bytes(trap),)),
        'torch.save': Call(('torch', 'save'), (3, at)),
        'numpy.savetxt': Call(('numpy', 'savetxt'), (at, [1.0])),
        'numpy.save': Call(('numpy', 'save'), (Call(('builtins', 'open'), (at, 'wb')), [1.0])),
        'runpy': Call(('runpy', '_run_code'), (Call(('builtins', 'compile'), (code, 'x', 'exec')), {})),
        'functools.partial': Call(('functools', 'reduce'), (Name(('os', 'makedirs')), [at, 511])),
        'builtins.map': Call(('builtins', 'list'), (Call(('builtins', 'map'), (Name(('os', 'mkdir')), [at])),)),
        'shutil.copyfile': Call(('shutil', 'copyfile'), ('/etc/hostname', at)),
        'zipfile.ZipFile': Call(('zipfile', 'ZipFile'), (at, 'w')),
        'sqlite3.connect': Call(('sqlite3', 'connect'), (at,)),
        'logging.FileHandler': Call(('logging', 'FileHandler'), (at,)),
        'timeit.timeit': Call(('timeit', 'timeit'), (code, 'pass', Name(('time', 'perf_counter')), 1)),
        'STACK_GLOBAL': Call(('os', 'mkdir'), (at,), named='STACK_GLOBAL'),
        'INST': Raw(b'(' + encoded(at) + b'ios\nmkdir\n'),
        'OBJ': Raw(b'(' + encoded(Name(('os', 'mkdir'))) + encoded(at) + b'o'),
        'a tensor of another class': Call(
            ('torch._tensor', '_rebuild_from_type_v2'),
            (Name(('os', 'makedirs')), Name(('torch', 'Tensor')), (at,), {'x': 1}),
        ),
    }
    return calls | {
        'forgotten at once': Raw(encoded(Name(('os', 'mkdir'))) + encoded((at,)) + b'R0' + encoded(1)),
        'as a key': Raw(b'}' + encoded(calls['os.mkdir']) + b'Ns'),
        'in a tensor': Call(
            ('torch._utils', '_rebuild_tensor_v2'), (Stored(), 0, (calls['os.mkdir'],), (1,), False, None)
        ),
        'as a storage': Raw(encoded(('storage', calls['os.mkdir'], '0', 'cpu', 1)) + b'Q'),
        'as a state': Call(('argparse', 'Namespace'), (), {'a': calls['builtins.exec']}),
    }


def _torch_bytes(trap: Path) -> bytes:
    buffer = io.BytesIO()

    class Bomb:
        def __reduce__(self) -> Any:
            import os

            return os.mkdir, (str(trap),)

    torch.save(Bomb(), buffer)
    return buffer.getvalue()


def in_checkpoint(payload: Any) -> Iterator[tuple[str, Any]]:
    """The payload in several places of what looks like a checkpoint."""
    tensor = Call(('torch._utils', '_rebuild_tensor_v2'), (Stored(), 0, (4,), (1,), False, None))
    yield 'alone', payload
    yield 'in the state', {'state': {'model': {'weight': tensor}, 'algorithms': [('EMA', payload)]}}
    yield 'in the model', {'state': {'model': {'weight': payload}}, 'rng': []}


#: Texts that Composer would pass to ``eval``: what a checkpoint says of an algorithm that the model needs.
def texts(trap: Path) -> list[str]:
    code = f'__import__("os").mkdir({str(trap)!r})'
    return [
        f'BlurPool({code})', f'BlurPool(min_channels={code})', f'{code}', f'__class__ and {code}',
        f'BlurPool() if {code} else BlurPool()', f'BlurPool(*[{code}])', f'BlurPool(**{{"a": {code}}})',
        f'BlurPool(min_channels=(lambda: {code})())', f'blurpool.os and {code}', f'BlurPool([{code} for _ in "a"])',
        f'BlurPool(f"{{{code}}}")', '(' * 150 + ')' * 150, '-' * 900 + '1', 'BlurPool(', '',
    ]  # fmt: skip


def tar_that_leaves_its_folder(path: Path, name: str) -> Path:
    """A packed checkpoint with a second file, whose name leads elsewhere."""
    buffer = io.BytesIO()
    torch.save({'state': {}}, buffer)
    with tarfile.open(path, 'w') as archive:
        for each, content in (('composer_states.pt', buffer.getvalue()), (name, b'x')):
            info = tarfile.TarInfo(each)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


#: Tags with which a YAML file asks for objects of Python.
YAML_TAGS = (
    'a: !!python/object/apply:os.mkdir [{at}]',
    'a: !!python/object/apply:os.system ["mkdir {at}"]',
    'a: !!python/object/new:os.mkdir [{at}]',
    'a: !!python/object:os.mkdir {{}}',
    'a: !!python/name:os.mkdir',
    'a: !!python/module:os',
    "!!python/object/apply:builtins.exec [\"open('{at}', 'w')\"]",
    'a: !!python/object/new:type {{args: [z, !!python/tuple [], {{extend: !!python/name:exec}}], listitems: "{at}"}}',
    'a: &x !!python/object/apply:subprocess.check_call [[mkdir, {at}]]\nb: *x',
)


# What would crash a reader: calls of what is allowed, with arguments that nobody checks.


@dataclass(frozen=True)
class Draw:
    """Draws a call of an allowed function, right at first, and then with some of its arguments replaced."""

    random: Random
    depth: int = 3
    _integers: tuple[int, ...] = field(
        default=(-1, 0, 1, 2, 3, 4, 5, 15, 16, 17, 64, 65, 255, 2**31, 2**32, 2**40, 2**61 - 1, 2**62, 2**63 - 1, 2**63,
                 2**64, 2**100, -(2**31), -(2**63)),
        repr=False,
    )  # fmt: skip

    def call(self) -> Any:
        """An allowed call."""
        return self.mutated(self.random.choice(list(self.templates().values())), 0.15)

    def mutated(self, value: Any, rate: float) -> Any:
        """The value with parts of it replaced."""
        if self.random.random() < rate:
            return self.value(self.depth)
        match value:
            case Call():
                arguments = tuple(self.mutated(each, rate) for each in value.arguments)
                if self.random.random() < rate:
                    arguments = arguments[: self.random.randrange(len(arguments) + 1)]
                if self.random.random() < rate:
                    arguments = (*arguments, self.value(1))
                state = value.state
                if state is not _NOTHING:
                    state = self.mutated(state, rate)
                elif self.random.random() < rate / 2:
                    state = self.value(2)
                return Call(value.target, arguments, state, value.new ^ (self.random.random() < rate / 3))
            case Stored():
                return Stored(
                    self.random.choice(['FloatStorage', value.kind, 'LongStorage', 'UntypedStorage', 'QInt8Storage']),
                    self.mutated(value.count, rate), self.mutated(value.key, rate / 3),
                )  # fmt: skip
            case tuple() | list():
                return type(value)(self.mutated(each, rate) for each in value)
            case dict():
                return {key: self.mutated(each, rate) for key, each in value.items()}
        return value

    def value(self, depth: int) -> Any:
        """Anything that a pickle can hold."""
        random = self.random
        kind = random.randrange(14 if depth else 7)
        if kind < 3:
            return random.choice(self._integers)
        if kind < 7:
            others = [None, True, 0.5, float('nan'), float('inf'), 'a', 'latin1', '', b'', b'abcd' * 4, (), [], {}]
            return random.choice([*others, Stored(), Stored('LongStorage', 16, '1'), Name(random.choice(self.names()))])
        if kind < 10:
            return tuple(self.value(depth - 1) for _ in range(random.randrange(5)))
        if kind < 11:
            return [self.value(depth - 1) for _ in range(random.randrange(5))]
        if kind < 12:
            return {random.choice(['a', '_metadata', 'items', 'conj', 1]): self.value(depth - 1)}
        return self.mutated(random.choice(list(self.templates().values())), 0.3) if depth > 1 else 0

    def names(self) -> list[tuple[str, str]]:
        """What is allowed."""
        constants = [
            ('torch', name) for name in ('float32', 'int64', 'bool', 'qint8', 'strided', 'sparse_coo', 'uint1')
        ]
        return [*(('torch', name) for name in constants), *(each.target for each in self.templates().values())]

    def templates(self) -> dict[str, Call]:
        """A right call of each function and class that is allowed."""
        of = lambda name: Name(('torch', name))  # noqa: E731
        hooks = Call(('collections', 'OrderedDict'))

        def dense(storage: Stored, size: tuple[int, ...], stride: tuple[int, ...]) -> Call:
            return Call(('torch._utils', '_rebuild_tensor_v2'), (storage, 0, size, stride, False, hooks))

        tensor, values, blocks = (dense(Stored(), size, (1,) * len(size)) for size in ((2, 3), (2,), (2, 1, 1)))
        whole = dense(Stored('LongStorage', 16, '1'), (2, 2), (2, 1))
        row, columns = (dense(Stored('LongStorage', 16, '2'), (size,), (1,)) for size in (3, 2))
        layout = lambda name: Call(('torch.serialization', '_get_layout'), (f'torch.{name}',))  # noqa: E731
        dtype = Call(('numpy', 'dtype'), ('f4', False, True), (3, '<', None, None, None, -1, -1, 0))
        array = Call(
            ('numpy.core.multiarray', '_reconstruct'), (Name(('numpy', 'ndarray')), (0,), b'b'),
            (1, (2, 2), dtype, False, b'abcd' * 4),
        )  # fmt: skip
        device = Call(('torch', 'device'), ('cpu',))
        utils = lambda name, *arguments: Call(('torch._utils', name), arguments)  # noqa: E731
        return {
            'tensor': tensor,
            'tensor 1': utils('_rebuild_tensor', Stored(), 0, (2, 3), (3, 1)),
            'tensor 3': utils('_rebuild_tensor_v3', Stored('UntypedStorage', 64), 0, (4,), (1,), False, hooks,
                              of('float32')),
            'complex': utils('_rebuild_tensor_v2', Stored('ComplexFloatStorage', 8), 0, (4,), (1,), False, hooks,
                             {'conj': True}),
            'parameter': utils('_rebuild_parameter', tensor, True, hooks),
            'parameter with state': utils('_rebuild_parameter_with_state', tensor, True, hooks, {'data': tensor}),
            'typed': Call(('torch._tensor', '_rebuild_from_type_v2'),
                          (Name(('torch._utils', '_rebuild_tensor_v2')), of('Tensor'), tensor.arguments, {'grad': 1})),
            'DTensor': Call(('torch._tensor', '_rebuild_from_type_v2'),
                            (Name(('torch._utils', '_rebuild_wrapper_subclass')),
                             Name(('torch.distributed.tensor', 'DTensor')),
                             (Name(('torch.distributed.tensor', 'DTensor')), of('float32'), (2, 3), (3, 1), 0),
                             {'_local_tensor': tensor, '_spec': None})),
            'wrapper': utils('_rebuild_wrapper_subclass', of('Tensor'), of('float32'), (2,), (1,), 0,
                             layout('strided'), device, False),
            'sparse': utils('_rebuild_sparse_tensor', layout('sparse_coo'), (whole, values, (2, 2), False)),
            'sparse rows': utils('_rebuild_sparse_tensor', layout('sparse_csr'), (row, columns, values, (2, 2))),
            'sparse blocks': utils('_rebuild_sparse_tensor', layout('sparse_bsr'), (row, columns, blocks, (2, 2))),
            'quantized': utils('_rebuild_qtensor', Stored('QInt8Storage', 64), 0, (2, 3), (3, 1),
                               (of('per_tensor_affine'), 0.5, 0), False, hooks),
            'quantized channels': utils('_rebuild_qtensor', Stored('QInt8Storage', 64), 0, (2, 3), (3, 1),
                                        (of('per_channel_affine_float_qparams'), values, values, 0), False, hooks),
            'nested': utils('_rebuild_nested_tensor', tensor, whole, whole, row),
            'meta': utils('_rebuild_meta_tensor_no_storage', of('float32'), (2, 3), (3, 1), False),
            'of a device': utils('_rebuild_device_tensor_from_cpu_tensor', tensor, of('float64'), 'xla:0', False),
            'of numpy': utils('_rebuild_device_tensor_from_numpy', array, of('float64'), 'xla:0', False),
            'Tensor': Call(('torch', 'Tensor'), (4,)),
            'Parameter': Call(('torch.nn.parameter', 'Parameter'), (tensor,)),
            'FloatStorage': Call(('torch', 'FloatStorage'), (4,)),
            'UntypedStorage': Call(('torch.storage', 'UntypedStorage'), (4,)),
            'Size': Call(('torch', 'Size'), ((2, 3),)),
            'device': device,
            'layout': layout('strided'),
            'array': array,
            'new array': Call(('numpy', 'ndarray'), ((4,), dtype)),
            'dtype': dtype,
            'scalar': Call(('numpy._core.multiarray', 'scalar'), (dtype, b'abcd')),
            'OrderedDict': Call(('collections', 'OrderedDict'), ([['a', 1]],), {'_metadata': {}}),
            'Counter': Call(('collections', 'Counter'), ({'a': 1},)),
            'defaultdict': Call(('collections', 'defaultdict'), (Name(('builtins', 'list')),)),
            'encode': Call(('_codecs', 'encode'), ('abc', 'latin1')),
            'bytes': Call(('builtins', 'bytes')),
            'bytearray': Call(('builtins', 'bytearray'), (b'abc',)),
            'set': Call(('builtins', 'set'), ([1, 2],)),
            'frozenset': Call(('builtins', 'frozenset'), ([1, 2],)),
            'complex number': Call(('builtins', 'complex'), (1.0, 2.0)),
            'timedelta': Call(('datetime', 'timedelta'), (1, 2, 3)),
            'TorchVersion': Call(('torch.torch_version', 'TorchVersion'), ('2.7.0',), new=True),
            'Namespace': Call(('argparse', 'Namespace'), (), {'a': 1}),
            'mesh': Call(('torch.distributed.device_mesh', 'DeviceMesh'), (), {'device_type': 'cpu'}, new=True),
        }  # fmt: skip


def touched(value: Any) -> int:
    """Goes through all the values in what was read, as those who use it do; how many there are."""
    waiting, seen, count = [value], set(), 0
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        count += 1
        if isinstance(each, torch.Tensor):
            count += _bytes_of(each.detach())
        elif isinstance(each, dict):
            waiting += [*each, *each.values()]
        elif isinstance(each, (list, tuple, set, frozenset)):
            waiting += each
        elif hasattr(each, 'tobytes') and each.size < 10**6:
            count += len(each.tobytes())
    return count


def _bytes_of(tensor: torch.Tensor) -> int:
    if tensor.is_meta or tensor.numel() > 10**6:
        return 0
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout is not torch.strided:
        return tensor.to_dense().nbytes
    return tensor.resolve_conj().resolve_neg().clone().nbytes


def executes(value: Any, trap: Path) -> bool:
    """Whether Python's unpickler makes the trap of this value, so that it is an attack at all."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return None

    with contextlib.suppress(Exception):  # it may fail when it is done
        Unpickler(io.BytesIO(pickled(value))).load()
    made = trap.exists()
    if made:
        trap.rmdir() if trap.is_dir() else trap.unlink()
    return made


_ROOM = 2**30  # bytes that reading a file of a few KB may ask for, which no machine lacks


def fuzz(seed: int, rounds: int, folder: Path) -> int:
    """Reads calls of what is allowed with arguments that nobody checks, and goes through what comes of them.

    To be run in a process of its own, which may crash. Prints each failure, and then how many files were read.

    Returns:
        How many failed.
    """
    warnings.simplefilter('ignore')
    used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, used + _ROOM))
    failed = read = 0
    for number in range(rounds):
        (folder / 'number').write_text(str(number))  # the one that crashes
        value = Draw(Random(f'{seed}/{number}')).call()
        path = write_torch_file(folder / 'drawn.pt', value)
        try:
            held = load_safely(path, mmap=number % 2 == 1)
        except InertPickleError:
            continue
        except BaseException as error:
            print(f'arguments {seed}/{number}: {type(error).__name__}: {error}: {value}')
            failed += 1
            continue
        try:
            touched(held)
        except (RuntimeError, NotImplementedError, TypeError):  # torch cannot copy tensors of every kind
            pass
        except BaseException as error:
            print(f'arguments {seed}/{number}, read: {type(error).__name__}: {error}: {value}')
            failed += 1
        read += 1
    print(f'{read} read')
    return failed


# The doors, each with what may be raised.


def files(folder: Path, trap: Path) -> Iterator[tuple[str, Path]]:
    """A file for each attack and each place in a checkpoint, and files that are pickles alone."""
    for name, payload in payloads(trap).items():
        for where, value in in_checkpoint(payload):
            yield f'{name}, {where}', write_torch_file(folder / 'attack.pt', value)
        (folder / 'attack.pt').write_bytes(pickled(payload))
        yield f'{name}, a pickle', folder / 'attack.pt'
        (folder / 'attack.pt').write_bytes(b''.join(map(pickled, (_MAGIC, 1001, {}, payload, []))))
        yield f'{name}, as before 1.6', folder / 'attack.pt'


_MAGIC = 0x1950A86A20F9469CFC6C


def readers(out: Path) -> dict[str, Callable[[Path], Any]]:
    """What reads a file and runs no training, by name."""
    return {
        'load_average': load_average,
        'read_checkpoint': read_checkpoint,
        'inspect': describe,
        'export': lambda path: export(path, out),
        'merge': lambda path: merge([path, path], out, equal=True),
        'reconstruct': lambda path: reconstruct(path.parent, half_life='2ba'),
    }


def folders(folder: Path, trap: Path) -> Iterator[tuple[str, Path]]:
    """Sharded checkpoints with an attack in the index, in a value and in a chunk."""
    sound = folder / 'sound'
    if not sound.exists():
        save({'state': {'model': {'weight': torch.ones(4)}, 'note': [('EMA', {'text': 'x'})]}}, sound)
    for name, payload in payloads(trap).items():
        for where in ('the index', 'the index alone', 'a value', 'a chunk'):
            shutil.rmtree(folder / 'attack', ignore_errors=True)
            shutil.copytree(sound, folder / 'attack')
            if where == 'the index alone':
                (folder / 'attack' / '.metadata').write_bytes(pickled(payload))
            elif where == 'the index':
                index = (sound / '.metadata').read_bytes()
                (folder / 'attack' / '.metadata').write_bytes(index[:-1] + encoded(payload) + b'0.')
            else:
                _put(folder / 'attack', 'state.model.weight' if where == 'a chunk' else 'state.note', payload)
            yield f'{name}, in {where}', folder / 'attack'


def _put(folder: Path, item: str, payload: Any) -> None:
    """Puts an attack in place of an item of a sharded checkpoint."""
    content = write_torch_file(folder / '__9_0.distcp', payload).read_bytes()
    metadata = metadata_of(folder)
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == item)
    info.relative_path, info.offset, info.length = '__9_0.distcp', 0, len(content)
    write_metadata(folder, metadata)
