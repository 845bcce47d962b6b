"""A second CUDA stream beside the training stream: forked by an event, joined by an event, inert without CUDA.

Invariant: between ``fork`` and ``join`` nobody writes what the forked work reads, and nobody reads what it writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class SideStream:
    """Runs work beside one device's current stream without ever blocking the host.

    ``fork`` makes the side stream wait for all that the current stream holds so far; ``join`` makes the current
    stream wait for the forked work. Both enqueue an event and return at once. On a device other than CUDA, or with
    ``overlap=False``, work runs in line on the current stream and ``join`` does nothing.

    Args:
        device: where the work runs.
        overlap: whether to use a second stream where there is one.

    Example:
        >>> stream, total = SideStream(torch.device('cpu')), torch.zeros(())
        >>> with stream.fork():
        ...     _ = total.add_(1)
        >>> stream.join()
    """

    def __init__(self, device: torch.device, *, overlap: bool = True) -> None:
        self.device = device
        # Any: torch 2.7's stubs give its own stream and event types two incompatible bases.
        self._stream: Any = torch.cuda.Stream(device) if overlap and device.type == 'cuda' else None
        self._finished: Any = torch.cuda.Event() if self._stream is not None else None
        self._is_pending = False
        #: The stream from which the pending work was forked.
        self._origin: Any = None
        #: By stream, an event behind the last thing there that reads what this one writes.
        self._readers: dict[Any, Any] = {}

    @property
    def is_beside(self) -> bool:
        """Whether forked work runs beside the current stream, not in line on it."""
        return self._stream is not None

    @property
    def is_pending(self) -> bool:
        """Whether forked work has not been joined yet."""
        return self._is_pending

    def keep_alive(self, tensors: Iterable[torch.Tensor]) -> None:
        """Tells the allocator that the side stream uses ``tensors``: freed, their memory waits for its work."""
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(self._stream)

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Runs the body's kernels on the side stream. Joined by :meth:`join`."""
        if self._stream is None:
            yield
            return
        self._origin = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(self._origin)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._finished.record(self._stream)
            self._is_pending = True

    def join(self) -> None:
        """Orders the current stream after the last forked work. Returns at once, however long that work takes.

        On another stream than that from which the work was forked, it stays pending: that one has to join it, too.
        """
        if self._is_pending:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self._finished)
            self._is_pending = current != self._origin

    def was_read(self) -> None:
        """Notes that the current stream reads, up to now, what the work writes; see :meth:`wait_for_readers`."""
        if self.device.type == 'cuda':
            current = torch.cuda.current_stream(self.device)
            event = self._readers.setdefault(current, torch.cuda.Event())
            event.record(current)

    def wait_for_readers(self) -> None:
        """Orders the current stream, and what is forked from it, after all that was noted. Returns at once."""
        if self._readers:
            current = torch.cuda.current_stream(self.device)
            for event in self._readers.values():
                current.wait_event(event)
            self._readers.clear()
