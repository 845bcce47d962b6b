"""Averages a model on CUDA into shadows on the host: copies it out chunk by chunk, and averages in a thread.

Each source is copied once, however many averages of it there are.

Invariants: after :meth:`HostAverage.wait_for_reads` the sources may be written, and after :meth:`HostAverage.wait` the
shadows may be read. The training stream waits only for the copies, which have a whole forward and backward pass to
finish in. Training slows down only if the thread's arithmetic takes longer than that.
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
from composer_ema.kernels.layout import Row, Scratch, carve, columns, detached, packed, pieces

#: Elements in a chunk: 32 MiB of float32. Beside an H100, an update of vit_l_32 took 41 ms so, and 65 ms by 16 MiB.
CHUNK = 2**23
#: Pieces that fill a chunk: a larger tensor is cut, so that it leaves little of a chunk empty.
_PIECES = 8
_NO_LIMIT = 2**62


def can_take(shadow: Tensor, source: Tensor) -> bool:
    """Whether :class:`HostAverage` can average the pair."""
    return shadow.device.type == 'cpu' and source.device.type == 'cuda'


@dataclass(frozen=True)
class _Chunk:
    """Sources, the memory that they are copied to, and the step that takes the copies into every average."""

    sources: list[Tensor]
    copies: list[Tensor]
    step: Steps


class HostAverage:
    """Moves k averages on the host towards sources on one CUDA device, beside training. For each average::

        shadow += weight * (source - shadow)

    Parameters pass through two chunks of pinned memory: while the thread averages one, a side stream fills the other.
    If their averages have another dtype, the thread casts them piece by piece in one scratch, of 4 MiB for float32.
    The next forward pass writes buffers, so the current stream copies them at once, into pinned memory of their own.
    With sources on a CPU, which needs no streams, the thread does the same with plain copies.

    Args:
        parameters: the shadows of a tensor in each average and last their source, to average.
        buffers: likewise; their sources may be written as soon as :meth:`update` returns.
        copied: likewise, of buffers, to copy.
        chunk: elements in each of the two chunks. Tensors with gaps in memory are not cut, and may need larger ones.
            Default: 8 Mi.
    """

    def __init__(
        self, parameters: Sequence[Row], buffers: Sequence[Row], copied: Sequence[Row], *, chunk: int = CHUNK
    ) -> None:
        self.device = [*parameters, *buffers, *copied][0][-1].device
        is_cuda = self.device.type == 'cuda'
        # Any: torch 2.7's stubs give its own stream and event types two incompatible bases.
        self._stream: Any = torch.cuda.Stream(self.device) if is_cuda else None
        self._buffers_copied, self._sources_read = self._new_event(), self._new_event()
        self._rules = kernels.Rules(scratch=Scratch())  # one step after the other runs, in the thread
        self._buffers = [*self._in_chunks(buffers, self._averaging_buffers), *self._in_chunks(copied, _copying)]
        self._chunks = list(self._in_chunks(parameters, self._averaging, limit=chunk))
        self._chunk_copied = [self._new_event() for _ in range(2)]
        if is_cuda:
            for *_, source in parameters:
                source.record_stream(self._stream)  # if freed, its memory waits for the side stream
        self._thread = ThreadPoolExecutor(1, thread_name_prefix='composer_ema')
        self._thread_id: int | None = None
        self._job: Future[None] | None = None
        self._is_enqueued = threading.Event()
        self._is_reading = False

    @property
    def is_reading(self) -> bool:
        """Whether the last update may still be reading: :meth:`wait_for_reads` has not been called since."""
        return self._is_reading

    def update(self, weights: Sequence[float]) -> None:
        """Starts an update that sees the sources as the work on the current stream leaves them, and returns.

        Args:
            weights: for each average the share of the sources in the new one, in [0, 1].
        """
        self.wait()
        for chunk in self._buffers:
            torch._foreach_copy_(chunk.copies, chunk.sources, non_blocking=True)
        if self._stream is not None:
            self._buffers_copied.record(torch.cuda.current_stream(self.device))
            self._stream.wait_event(self._buffers_copied)  # joined by wait_for_reads()
        self._is_enqueued.clear()
        self._is_reading = True
        self._job = self._thread.submit(self._run, tuple(weights))

    def wait_for_reads(self) -> None:
        """Orders the current stream after the last copy of a source.

        The host waits until that copy is enqueued. With up to two chunks that is at once; otherwise the thread must
        first average all chunks but two. The device meanwhile continues with the work already on its streams.
        """
        if self._is_reading and not self._is_in_thread():
            self._is_enqueued.wait()
            if self._stream is not None:
                torch.cuda.current_stream(self.device).wait_event(self._sources_read)
            self._is_reading = False

    def wait(self) -> None:
        """Waits until the shadows hold the last update.

        Raises:
            Exception: what stopped that update half-way.
        """
        if self._is_in_thread():
            return
        self.wait_for_reads()
        if (job := self._job) is None:
            return
        try:
            job.result()
        finally:
            if job.done():  # otherwise an interrupt ends this wait, and the next one goes on with it
                self._job = None

    def _is_in_thread(self) -> bool:
        # The garbage collector may run in the thread and find a dead model there, whose plan then ends in the thread.
        # Ending a plan waits, and the thread must not wait for itself.
        return threading.get_ident() == self._thread_id

    # In the thread

    def _run(self, weights: Sequence[float]) -> None:
        self._thread_id = threading.get_ident()
        try:
            before: tuple[_Chunk, Any] | None = None
            for index, chunk in enumerate(self._chunks):
                copied = self._chunk_copied[index % 2]
                with self._on_side_stream():
                    torch._foreach_copy_(chunk.copies, chunk.sources, non_blocking=True)
                    self._record(copied)
                if before is not None:
                    self._average(*before, weights)  # frees the memory that the next chunk is copied to
                before = (chunk, copied)
            with self._on_side_stream():
                self._record(self._sources_read)
        finally:
            self._is_enqueued.set()
        if before is not None:
            self._average(*before, weights)
        for chunk in self._buffers:
            self._average(chunk, self._buffers_copied, weights)

    def _average(self, chunk: _Chunk, copied: Any, weights: Sequence[float]) -> None:
        if copied is not None:
            copied.synchronize()
        chunk.step(weights)

    def _on_side_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _record(self, event: Any) -> None:
        if event is not None:
            event.record(self._stream)

    # Set up

    def _new_event(self) -> Any:
        # Waiting for a blocking event sleeps; other events spin on a core that training may need.
        return torch.cuda.Event(blocking=True) if self._stream is not None else None

    def _in_chunks(
        self,
        rows: Sequence[Row],
        prepare: Callable[[list[list[Tensor]], list[Tensor]], Steps],
        *,
        limit: int = _NO_LIMIT,
    ) -> Iterator[_Chunk]:
        """Groups rows by the source's dtype. Every second chunk of a group is copied to the same memory."""
        by_dtype: defaultdict[torch.dtype, list[Row]] = defaultdict(list)
        for row in rows:
            by_dtype[row[-1].dtype].extend(pieces(tuple(detached(row)), max(limit // _PIECES, 1)))
        for dtype, of_dtype in by_dtype.items():
            chunks = [columns(chunk) for chunk in packed(of_dtype, lambda row: row[-1].numel(), limit)]
            size = max(sum(source.numel() for source in sources) for *_, sources in chunks)
            memory = [self._new_memory(size, dtype) for _ in chunks[:2]]
            for index, (*averages, sources) in enumerate(chunks):
                copies = carve(memory[index % 2], sources)
                yield _Chunk(sources, copies, prepare(averages, copies))

    def _new_memory(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=self._stream is not None)

    def _averaging(self, averages: list[list[Tensor]], copies: list[Tensor]) -> Steps:
        return kernels.prepare(averages, copies, rules=self._rules)

    def _averaging_buffers(self, averages: list[list[Tensor]], copies: list[Tensor]) -> Steps:
        return kernels.prepare(averages, copies, mended=range(len(copies)), rules=self._rules)


def _copying(averages: list[list[Tensor]], copies: list[Tensor]) -> Steps:
    pairs = [pair for shadows in averages for pair in zip(shadows, copies, strict=True)]
    return kernels.prepare([[] for _ in averages], [], copied=pairs)
