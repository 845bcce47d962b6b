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
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._finished.record(self._stream)
            self._is_pending = True

    def join(self) -> None:
        """Orders the current stream after the last forked work. Returns at once, however long that work takes."""
        if self._is_pending:
            torch.cuda.current_stream(self.device).wait_event(self._finished)
            self._is_pending = False
