"""A bound on time, for what may hang."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def in_time(seconds: int) -> Iterator[None]:
    """Raises a TimeoutError in what is inside after so many seconds. For the main thread alone."""

    def stop(*_: object) -> None:
        raise TimeoutError(f'it took more than {seconds} s')

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
