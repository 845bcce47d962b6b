"""Finishing what was begun, whatever interrupts it: a signal handler that raises, an exception that a thread was sent.

Python delivers an interrupt where a function written in Python begins, after a call and at the end of a loop's round,
and nowhere else. So nothing comes between a call that is written in C and the work that it does, nor between an
``is`` and the assignment behind it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

T = TypeVar('T')

#: How often a step is tried. An error that is no interrupt comes back each time.
_PATIENCE = 200


class Refusal(RuntimeError):
    """Raised by a step that has changed nothing and would not do so another time."""


def insisting(step: Callable[[], object]) -> Generator[None, None, None]:
    """Waits, once started, to be closed, and calls ``step`` then until that has run to its end.

    The last interrupt of the step is raised afterwards. If ``next`` is called in place of ``close``, the step is not
    needed.

    Args:
        step: may be called again, wherever an interrupt has stopped it.

    Example:
        >>> leaving = insisting(lambda: print('left'))
        >>> next(leaving)
        >>> leaving.close()
        left
    """
    is_done, patience, interrupt = False, _PATIENCE, None
    try:
        yield
        is_done = True
    except GeneratorExit:
        pass
    except BaseException as error:
        interrupt = error
    # Three loops that do the same: an interrupt at the end of a round of the inner one leads into the outer one.
    while not is_done and patience:
        try:
            while not is_done and patience:
                try:
                    while not is_done and patience:
                        patience -= 1
                        try:
                            step()
                            is_done = True
                        except Refusal as error:
                            is_done, interrupt = True, error
                        except BaseException as error:
                            interrupt = error
                except BaseException as error:
                    interrupt = error
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        try:
            raise interrupt
        finally:
            del interrupt  # its traceback refers to this frame


class Block(io.IOBase, Generic[T]):
    """A ``with`` block that ends as it should, whatever interrupts its beginning, its body or its end.

    An ``__exit__`` in Python can be interrupted before its first line, that of ``contextlib`` included. This one is
    lent by ``io.IOBase``: it is written in C and calls ``close()``.

    Args:
        enter: begins the block and returns what ``as`` names.
        leave: ends it; a step of :func:`insisting`, which is called wherever an interrupt has stopped ``enter``, too.

    Example:
        >>> with Block(lambda: 'inside', lambda: print('left')) as where:
        ...     print(where)
        inside
        left
    """

    def __init__(self, enter: Callable[[], T], leave: Callable[[], object]) -> None:
        self._enter = enter
        self._leaving = insisting(leave)
        self.close = self._leaving.close

    def __enter__(self) -> T:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            next(self._leaving)
            return self._enter()
        except BaseException:
            self.close()
            raise
