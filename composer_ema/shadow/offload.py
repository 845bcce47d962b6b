"""Averages on the host of a model on a CUDA device: copied out chunk by chunk, averaged by a thread.

Invariants: after :meth:`HostAverage.wait_for_reads` the sources may be written, after :meth:`HostAverage.wait` the
shadows may be read. The training stream waits for the copies alone, which have a whole forward and backward pass to run
beside; only where these are shorter than the thread's arithmetic does training slow down to it.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from composer_ema import kernels
from composer_ema.kernels.backend import Steps
from composer_ema.kernels.layout import Pair, carve, packed, pieces, unzip

#: Elements that are copied at once: 16 MiB of float32, some 0.7 ms of a PCI Express link.
CHUNK = 2**22
_NO_LIMIT = 2**62


def can_take(shadow: Tensor, source: Tensor) -> bool:
    """Whether the pair is one for :class:`HostAverage`."""
    return shadow.device.type == 'cpu' and source.device.type == 'cuda'


@dataclass(frozen=True)
class _Chunk:
    """Sources, where they are copied to, and what is done with the copies."""

    sources: list[Tensor]
    copies: list[Tensor]
    step: Steps


class HostAverage:
    """Moves shadows on the host towards sources on one CUDA device, beside training::

        shadow += weight * (source - shadow)

    Parameters pass through two chunks of pinned memory: while one is averaged by the thread, the other is filled on a
    side stream. Buffers are written by the next forward, so they are copied into pinned memory of their own at once, on
    the current stream. Given sources on a CPU, which needs no stream, the thread does the same with plain copies.

    Args:
        parameters: pairs of a shadow and its source, to be averaged.
        buffers: likewise; their sources may be written as soon as :meth:`update` has returned.
        copied: buffers whose shadows become copies.
        chunk: elements of each of the two chunks; a tensor with gaps in memory may make them larger.
    """

    def __init__(
        self, parameters: Sequence[Pair], buffers: Sequence[Pair], copied: Sequence[Pair], *, chunk: int = CHUNK
    ) -> None:
        self.device = [*parameters, *buffers, *copied][0][1].device
        is_cuda = self.device.type == 'cuda'
        # Any: torch 2.7's stubs give its own stream and event types two incompatible bases.
        self._stream: Any = torch.cuda.Stream(self.device) if is_cuda else None
        self._buffers_copied, self._sources_read = self._new_event(), self._new_event()
        self._buffers = [*self._in_chunks(buffers, _averaging), *self._in_chunks(copied, _copying)]
        self._chunks = list(self._in_chunks(parameters, _averaging, limit=chunk))
        self._chunk_copied = [self._new_event() for _ in range(2)]
        if is_cuda:
            for _, source in parameters:
                source.record_stream(self._stream)  # freed, its memory waits for the side stream
        self._thread = ThreadPoolExecutor(1, thread_name_prefix='composer_ema')
        self._thread_id: int | None = None
        self._job: Future[None] | None = None
        self._is_enqueued = threading.Event()
        self._is_reading = False

    @property
    def is_reading(self) -> bool:
        """Whether :meth:`wait_for_reads` has not been called since the last update."""
        return self._is_reading

    def update(self, weight: float) -> None:
        """Starts an update with the sources as the current stream will have left them, and returns."""
        self.wait()
        for chunk in self._buffers:
            torch._foreach_copy_(chunk.copies, chunk.sources, non_blocking=True)
        if self._stream is not None:
            self._buffers_copied.record(torch.cuda.current_stream(self.device))
            self._stream.wait_event(self._buffers_copied)  # joined by wait_for_reads()
        self._is_enqueued.clear()
        self._is_reading = True
        self._job = self._thread.submit(self._run, weight)

    def wait_for_reads(self) -> None:
        """Orders the current stream after the last copy of a source.

        The host waits until that copy is enqueued: not at all with up to two chunks, else until all chunks but two are
        averaged. The device meanwhile works on what it was given before.
        """
        if self._is_reading and not self._is_in_thread():
            self._is_enqueued.wait()
            if self._stream is not None:
                torch.cuda.current_stream(self.device).wait_event(self._sources_read)
            self._is_reading = False

    def wait(self) -> None:
        """Waits until the shadows hold the last update.

        Raises:
            Exception: whatever stopped that update half-way.
        """
        if self._is_in_thread():
            return
        self.wait_for_reads()
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def _is_in_thread(self) -> bool:
        # A model that the garbage collector finds may be found by it there, and its plan ends: no time to wait.
        return threading.get_ident() == self._thread_id

    # In the thread

    def _run(self, weight: float) -> None:
        self._thread_id = threading.get_ident()
        try:
            before: tuple[_Chunk, Any] | None = None
            for index, chunk in enumerate(self._chunks):
                copied = self._chunk_copied[index % 2]
                with self._on_side_stream():
                    torch._foreach_copy_(chunk.copies, chunk.sources, non_blocking=True)
                    self._record(copied)
                if before is not None:
                    self._average(*before, weight)  # and so frees the memory that the next chunk is copied to
                before = (chunk, copied)
            with self._on_side_stream():
                self._record(self._sources_read)
        finally:
            self._is_enqueued.set()
        if before is not None:
            self._average(*before, weight)
        for chunk in self._buffers:
            self._average(chunk, self._buffers_copied, weight)

    def _average(self, chunk: _Chunk, copied: Any, weight: float) -> None:
        if copied is not None:
            copied.synchronize()
        chunk.step((weight,))

    def _on_side_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _record(self, event: Any) -> None:
        if event is not None:
            event.record(self._stream)

    # Set up

    def _new_event(self) -> Any:
        # A blocking event lets the thread sleep; others would spin on a core that training may need.
        return torch.cuda.Event(blocking=True) if self._stream is not None else None

    def _in_chunks(
        self,
        pairs: Sequence[Pair],
        prepare: Callable[[list[Tensor], list[Tensor]], Steps],
        *,
        limit: int = _NO_LIMIT,
    ) -> Iterator[_Chunk]:
        """Groups by the sources' dtype; every second chunk of a group is copied to the same memory."""
        by_dtype: defaultdict[torch.dtype, list[Pair]] = defaultdict(list)
        for shadow, source in pairs:
            by_dtype[source.dtype].extend(pieces(shadow.detach(), source.detach(), limit))
        for dtype, of_dtype in by_dtype.items():
            chunks = [unzip(chunk) for chunk in packed(of_dtype, lambda pair: pair[0].numel(), limit)]
            size = max(sum(shadow.numel() for shadow in shadows) for shadows, _ in chunks)
            memory = [self._new_memory(size, dtype) for _ in chunks[:2]]
            for index, (shadows, sources) in enumerate(chunks):
                copies = carve(memory[index % 2], shadows)
                yield _Chunk(sources, copies, prepare(shadows, copies))

    def _new_memory(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=self._stream is not None)


def _averaging(shadows: list[Tensor], copies: list[Tensor]) -> Steps:
    return kernels.prepare([shadows], copies)


def _copying(shadows: list[Tensor], copies: list[Tensor]) -> Steps:
    return kernels.prepare([[]], [], copied=list(zip(shadows, copies, strict=True)))
