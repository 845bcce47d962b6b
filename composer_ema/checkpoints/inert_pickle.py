"""Reads a pickle as records: what it would build is noted, nothing is imported, called or built.

Invariant: the work and the memory grow with the length of the pickle alone, whatever it says.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_MARK = object()


class InertPickleError(ValueError):
    """A pickle is broken, or asks for what is not known. The message says for what."""


@dataclass(frozen=True)
class Global:
    """A class, function or constant that a pickle names.

    Attributes:
        module: where it is.
        name: likewise.
        make: returns what a call of it with these arguments stands for, instead of a :class:`Record`. It takes the
            time and memory of a few numbers at the most, however large the arguments are.
    """

    module: str
    name: str
    make: Callable[..., Any] | None = None


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


def loads(data: bytes, known: Known) -> Any:
    """What ``data`` holds: strings, numbers, None, tuples, lists and dictionaries, records and globals.

    Args:
        data: a pickle of protocol 2 to 5, as the standard library writes it.
        known: returns the global of a module and a name, or None to refuse it.

    Raises:
        InertPickleError: the pickle is broken, names what is not known, or does what data never does.
    """
    try:
        return _Machine(data, known).run()
    except InertPickleError:
        raise
    # A broken pickle fails in as many ways as there are bytes in it: it is short, or takes what is not there.
    except (IndexError, KeyError, TypeError, ValueError, struct.error, RecursionError) as error:
        raise InertPickleError(f'the pickle is truncated or damaged ({type(error).__name__}).') from error


class _Machine:
    """The stack machine of the pickle format, without what imports, calls or builds."""

    def __init__(self, data: bytes, known: Known) -> None:
        self._data, self._at, self._known = data, 0, known
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._globals: dict[tuple[str, str], Global] = {}

    def run(self) -> Any:
        data, operations = self._data, _OPERATIONS
        while True:
            code = data[self._at]
            self._at += 1
            if code == _STOP:
                return self._stack.pop()
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

    def _line(self) -> str:
        end = self._data.index(b'\n', self._at)
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
        if type(target) is not dict:
            raise TypeError
        keys = items[::2]
        # Others are hashed whole: a tuple that holds another one twice, and so on, takes as long as it likes.
        if not all(type(key) is str or type(key) is Record for key in keys):
            raise InertPickleError('a key of a dictionary in it is neither a string nor an object.')
        target.update(zip(keys, items[1::2], strict=True))

    def _set_one(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise TypeError
        target.extend(items)

    def _global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        found = self._globals.get((module, name)) or self._known(module, name)
        if found is None:
            raise InertPickleError(f'it names {module}.{name}, which has no place in it and could run code.')
        self._globals[module, name] = found
        self._stack.append(found)

    def _named(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._global(module, name)

    def _call(self) -> None:
        arguments, kind = self._stack.pop(), self._stack.pop()
        if type(kind) is not Global or type(arguments) is not tuple:
            raise TypeError
        self._stack.append(Record(kind, arguments) if kind.make is None else kind.make(*arguments))

    def _build(self) -> None:
        state, record = self._stack.pop(), self._stack[-1]
        if type(record) is not Record or record.state is not None:
            raise TypeError
        record.state = state


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
        b'\x81': lambda m: m._call(),  # NEWOBJ
        b'b': lambda m: m._build(),
    }.items()
}
