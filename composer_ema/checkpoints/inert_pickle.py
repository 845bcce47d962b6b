"""Reads a pickle as records: what it would build is noted, and nothing is called but what the reader's table makes.

Invariant: the work and the memory grow with the length of the pickle alone, whatever it says, as far as the functions
of the table keep to that.
"""

from __future__ import annotations

import mmap
import numbers
import struct
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from composer_ema.model.names import listed

_MARK = object()
# Of a tuple that is a key or a member of a set, all that is inside of it counted.
_MAX_KEY_PARTS = 64
# Compared with each other they take seconds.
_MAX_TUPLES = 10_000


class InertPickleError(ValueError):
    """A pickle is broken, or asks for what is not known. The message says for what."""


class UnknownNamesError(InertPickleError):
    """A pickle names what is not known, and what could run code therefore.

    Attributes:
        names: all of them, sorted.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = sorted(names)
        super().__init__(f'it names {listed(self.names)}, which has no place in it and could run code.')


@dataclass(frozen=True)
class Global:
    """A class, function or constant that a pickle names.

    Attributes:
        module: where it is.
        name: likewise.
        make: returns what a call of it with these arguments stands for, instead of a :class:`Record`. Whatever the
            arguments are, it takes no more time and memory than the file is long.
        new: likewise for a class whose ``__new__`` alone is called. Default: ``make``.
        build: gives what ``make`` returned the state that the pickle holds for it, once. Default: it takes none.
        value: what stands for a constant, instead of the Global.
        is_trusted: whether what it makes is filled as pickle does it, through methods of its own.
    """

    module: str
    name: str
    make: Callable[..., Any] | None = None
    new: Callable[..., Any] | None = None
    build: Callable[[Any, Any], None] | None = None
    value: Any = None
    is_trusted: bool = False


class Record:
    """An object that a pickle would build.

    Attributes:
        kind: its class.
        arguments: of the call that would build it.
        state: what it would be given afterwards; None for nothing.
    """

    __slots__ = ('arguments', 'kind', 'state')

    def __init__(self, kind: Global, arguments: tuple[Any, ...]) -> None:
        self.kind, self.arguments = kind, arguments
        self.state: Any = None


Known = Callable[[str, str], 'Global | None']
Data = bytes | mmap.mmap


def loads(data: Data, known: Known) -> Any:
    """What ``data`` holds: strings, numbers, None, tuples, lists, sets and dictionaries, records and globals.

    Args:
        data: a pickle of protocol 2 to 5, as the standard library writes it.
        known: returns the global of a module and a name, or None to refuse it.

    Raises:
        InertPickleError: the pickle is broken, names what is not known, or does what data never does.
    """
    return load_at(data, 0, known)[0]


def load_at(data: Data, start: int, known: Known, persistent: Callable[[Any], Any] | None = None) -> tuple[Any, int]:
    """What a pickle that begins at ``start`` holds, and where it ends.

    Args:
        data: as for :func:`loads`; more may follow the pickle.
        start: of the pickle.
        known: as for :func:`loads`.
        persistent: returns what an identifier stands for. Default: there are none.

    Raises:
        InertPickleError: as for :func:`loads`.
    """
    machine = _Machine(data, start, known, persistent)
    try:
        return machine.run()
    # A broken pickle fails in as many ways as there are bytes in it: it is short, or takes what is not there.
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError, struct.error) as error:
        # What stands for the unknown is not what the pickle takes it for, and that is no damage.
        if machine.unknown:
            raise UnknownNamesError(machine.unknown) from error
        if isinstance(error, InertPickleError):
            raise
        raise InertPickleError(f'the pickle is truncated or damaged ({type(error).__name__}).') from error


def is_key(value: Any) -> bool:
    """Whether a value may be a key of a dictionary or a member of a set.

    A tuple that holds another one twice, and so on, would be hashed for ever; and of numbers beyond the modulus of
    Python's hashes, of complex ones and of sets a file could hold a million with the same hash.
    """
    left, waiting = _MAX_KEY_PARTS, [value]
    while waiting:
        each = waiting.pop()
        if type(each) is tuple:
            left -= len(each)
            if left < 0:
                return False
            waiting += each
        elif isinstance(each, numbers.Integral):
            if abs(int(each)) >= sys.hash_info.modulus:
                return False
        elif not isinstance(each, (str, bytes, numbers.Real, NoneType, Global)) and not _is_hashed_by_identity(each):
            return False
    return True


def are_keys(values: Collection[Any]) -> bool:
    """Whether each of the values may be a key, and all of them together: tuples of one hash are easily made, too."""
    return all(map(is_key, values)) and sum(type(each) is tuple for each in values) <= _MAX_TUPLES


def _is_hashed_by_identity(value: Any) -> bool:
    return type(value).__hash__ is object.__hash__


class _Machine:
    """The stack machine of the pickle format, without what imports or calls anything that is not in a table.

    Attributes:
        unknown: the names that the table lacks.
    """

    def __init__(self, data: Data, start: int, known: Known, persistent: Callable[[Any], Any] | None) -> None:
        self.unknown: set[str] = set()
        self._data, self._at, self._known, self._persistent = data, start, known, persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._globals: dict[tuple[str, str], Global] = {}
        # By identity, what may still be given a state, which keeps it alive, and how.
        self._unbuilt: dict[int, tuple[Any, Callable[[Any, Any], None]]] = {}
        self._trusted: dict[int, Any] = {}

    def run(self) -> tuple[Any, int]:
        data, operations = self._data, _OPERATIONS
        while True:
            code = data[self._at]
            self._at += 1
            if code == _STOP:
                if self.unknown:
                    raise UnknownNamesError(self.unknown)
                return self._stack.pop(), self._at
            operation = operations.get(code)
            if operation is None:
                raise InertPickleError(f'the pickle holds the operation {bytes([code])!r}, which data does not need.')
            operation(self)

    def _take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise IndexError
        self._at += count
        return taken

    def _number(self, form: struct.Struct) -> int:
        (number,) = form.unpack(self._take(form.size))
        return number

    def _text(self, form: struct.Struct) -> None:
        self._stack.append(self._take(self._number(form)).decode('utf-8', 'surrogatepass'))

    def _bytes(self, form: struct.Struct) -> None:
        self._stack.append(self._take(self._number(form)))

    def _text_or_bytes(self, form: struct.Struct) -> None:
        """A string of Python 2, which is either."""
        taken = self._take(self._number(form))
        try:
            self._stack.append(taken.decode())
        except UnicodeDecodeError:
            self._stack.append(taken)

    def _line(self) -> str:
        end = self._data.find(b'\n', self._at)
        if end < 0:
            raise IndexError
        line = self._take(end - self._at).decode()
        self._at += 1
        return line

    def _long(self, form: struct.Struct) -> None:
        self._stack.append(int.from_bytes(self._take(self._number(form)), 'little', signed=True))

    def _to_mark(self) -> list[Any]:
        stack = self._stack
        for place in range(len(stack) - 1, -1, -1):
            if stack[place] is _MARK:
                items = stack[place + 1 :]
                del stack[place:]
                return items
        raise IndexError

    def _tuple(self, count: int) -> None:
        stack = self._stack
        if len(stack) < count:
            raise IndexError
        stack[-count:] = [tuple(stack[-count:])]

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _put(self, form: struct.Struct) -> None:
        self._memo[self._number(form)] = self._stack[-1]

    def _get(self, form: struct.Struct) -> None:
        self._stack.append(self._memo[self._number(form)])

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) not in _DICTIONARIES and id(target) not in self._trusted:
            raise TypeError
        keys = items[::2]
        if not are_keys([key for key in keys if id(key) not in self._trusted]):
            raise InertPickleError('a key of a dictionary in it is none that data has.')
        for key, value in zip(keys, items[1::2], strict=True):
            target[key] = value

    def _set_one(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list and id(target) not in self._trusted:
            raise TypeError
        target.extend(items)

    def _add(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not set or not are_keys(items):
            raise TypeError
        target.update(items)

    def _frozen(self, items: list[Any]) -> None:
        if not are_keys(items):
            raise TypeError
        self._stack.append(frozenset(items))

    def _global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        found = self._globals.get((module, name)) or self._known(module, name)
        if found is None:
            self.unknown.add(f'{module}.{name}')
            found = Global(module, name)
        self._globals[module, name] = found
        self._stack.append(found if found.value is None else found.value)

    def _named(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._global(module, name)

    def _call(self, *, is_new: bool = False) -> None:
        arguments, kind = self._stack.pop(), self._stack.pop()
        if type(kind) is not Global or type(arguments) is not tuple:
            raise TypeError
        make = (kind.new or kind.make) if is_new else kind.make
        made = Record(kind, arguments) if make is None else make(*arguments)
        if kind.build is not None:
            self._unbuilt[id(made)] = made, kind.build
        if kind.is_trusted:
            self._trusted[id(made)] = made
        self._stack.append(made)

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) is Record:
            if target.state is not None:
                raise TypeError
            target.state = state
            return
        # A second state would change what others may have taken hold of: an array gives its memory back.
        unbuilt = self._unbuilt.pop(id(target), None)
        if unbuilt is None:
            raise TypeError
        unbuilt[1](target, state)

    def _refer(self) -> None:
        if self._persistent is None:
            raise InertPickleError('the pickle refers to something outside of it.')
        self._stack.append(self._persistent(self._stack.pop()))


_DICTIONARIES = (dict, OrderedDict, Counter, defaultdict)
_U1, _U2, _U4, _U8, _I4 = (struct.Struct(form) for form in ('<B', '<H', '<I', '<Q', '<i'))
_FLOAT = struct.Struct('>d')
_STOP = ord('.')

_OPERATIONS: Mapping[int, Callable[[_Machine], None]] = {
    ord(code): operation
    for code, operation in {
        b'\x80': lambda m: m._take(1) and None,  # PROTO
        b'\x95': lambda m: m._take(8) and None,  # FRAME, which only says how much to read at once
        b'(': lambda m: m._stack.append(_MARK),
        b'N': lambda m: m._stack.append(None),
        b'\x88': lambda m: m._stack.append(True),
        b'\x89': lambda m: m._stack.append(False),
        b'K': lambda m: m._stack.append(m._number(_U1)),
        b'M': lambda m: m._stack.append(m._number(_U2)),
        b'J': lambda m: m._stack.append(m._number(_I4)),
        b'\x8a': lambda m: m._long(_U1),
        b'G': lambda m: m._stack.append(m._number(_FLOAT)),
        b'\x8c': lambda m: m._text(_U1),
        b'X': lambda m: m._text(_U4),
        b'\x8d': lambda m: m._text(_U8),
        b')': lambda m: m._stack.append(()),
        b'\x85': lambda m: m._tuple(1),
        b'\x86': lambda m: m._tuple(2),
        b'\x87': lambda m: m._tuple(3),
        b't': lambda m: m._stack.append(tuple(m._to_mark())),
        b']': lambda m: m._stack.append([]),
        b'a': lambda m: m._extend([m._stack.pop()]),
        b'e': lambda m: m._extend(m._to_mark()),
        b'}': lambda m: m._stack.append({}),
        b's': lambda m: m._set_one(),
        b'u': lambda m: m._set(m._to_mark()),
        b'\x94': lambda m: m._memoize(),
        b'q': lambda m: m._put(_U1),
        b'r': lambda m: m._put(_U4),
        b'h': lambda m: m._get(_U1),
        b'j': lambda m: m._get(_U4),
        b'c': lambda m: m._global(m._line(), m._line()),
        b'\x93': lambda m: m._named(),
        b'R': lambda m: m._call(),
        b'\x81': lambda m: m._call(is_new=True),  # NEWOBJ
        b'b': lambda m: m._build(),
        b'Q': lambda m: m._refer(),  # BINPERSID
        b'\x8f': lambda m: m._stack.append(set()),
        b'\x90': lambda m: m._add(m._to_mark()),
        b'\x91': lambda m: m._frozen(m._to_mark()),
        b'C': lambda m: m._bytes(_U1),
        b'B': lambda m: m._bytes(_U4),
        b'\x8e': lambda m: m._bytes(_U8),
        b'U': lambda m: m._text_or_bytes(_U1),
        b'T': lambda m: m._text_or_bytes(_U4),
    }.items()
}
