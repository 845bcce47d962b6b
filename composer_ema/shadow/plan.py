"""One update of k averages of a model, prepared: tensors grouped by what becomes of them, and a step for each group."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, filterfalse
from typing import Any, Protocol

import torch
from torch import Tensor

from composer_ema import kernels
from composer_ema.kernels import layout
from composer_ema.kernels.rules import FIRST_PIECE_OF_BUFFERS
from composer_ema.model.watch import Watch
from composer_ema.settings import Settings
from composer_ema.shadow import loan, offload
from composer_ema.shadow.compensation import Compensations
from composer_ema.shadow.offload import HostAverage
from composer_ema.shadow.stream import SideStream

log = logging.getLogger(__name__)

#: The shadows of one tensor in each of k averages, and the tensor itself.
Row = tuple[tuple[Tensor, ...], Tensor]
#: Bytes that an update of a device's parameters must read and write to run beside training: 0.35 ms of an H100. Below,
#: no training iteration there was 1 % longer in line, and an update in line has one launch, no fork and no join.
WORTH_FORKING = 2**30
#: Moves rows of one device. Takes one number for each average, a weight or a count.
Step = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Rows:
    """The rows of a model by what becomes of them: averaged parameters, averaged buffers, copied buffers."""

    parameters: Sequence[Row]
    averaged: Sequence[Row]
    copied: Sequence[Row]


def bytes_moved(rows: Iterable[Row]) -> int:
    """What an update of these rows reads and writes: sources once, averages twice; Kahan terms are left out."""
    return sum(source.nbytes + 2 * sum(shadow.nbytes for shadow in shadows) for shadows, source in rows)


class Mover(Protocol):
    """How rows move: by weights, or by a function of the user's."""

    #: Whether one step may average parameters and buffers.
    may_share: bool

    def prepare(self, rows: Rows) -> Step:
        """A step for rows of one device; an element of an averaged buffer is copied where it is not finite."""
        ...

    def is_left_to_a_thread(self, row: Row) -> bool:
        """Whether a thread averages this row on the host."""
        ...

    def keeps_address(self, row: Row) -> bool:
        """Whether the step of this row reads the source where its memory was when the step was prepared."""
        ...

    def run(self, plan: Plan, numbers: Sequence[Any]) -> None:
        """Performs one update."""
        ...


class Plan:
    """The rows of one model and the prepared steps that move them; valid while the model stays as it is.

    Parameters and buffers of a device share a step, and so a launch, unless parameters run beside training, as a long
    update does where its device has a side stream: the next forward writes buffers, so these never leave the current
    stream.

    Args:
        watch: tells whether the model is still what it was.
        has_joined: whether tensors that were new have been taken in.
        sources: the model's tracked tensors by name, which the plan keeps alive.
        rows: what moves.
        mover: how it moves.
        streams: the side stream of each device.

    Attributes:
        identities: tell the sources apart from other tensors.
        host_averages: for each device what a thread averages on the host.
        forked_steps: steps that run on the side stream of their device.
        steps: steps that run on the current stream.
    """

    def __init__(
        self,
        watch: Watch,
        has_joined: bool,
        sources: Mapping[str, Tensor],
        rows: Rows,
        mover: Mover,
        streams: Mapping[torch.device, SideStream],
    ) -> None:
        self.watch, self.has_joined, self.sources = watch, has_joined, sources
        self.identities = loan.identities(sources.values())
        self.run = mover.run
        kinds = (rows.parameters, rows.averaged, rows.copied)
        left = [list(filter(mover.is_left_to_a_thread, kind)) for kind in kinds]
        self.host_averages = _host_averages(left)
        parameters, averaged, copied = (
            layout.grouped(filterfalse(mover.is_left_to_a_thread, kind), lambda row: row[0][0].device) for kind in kinds
        )
        self.forked_steps: list[tuple[SideStream, Step]] = []
        self.steps: list[Step] = []
        for device in {**parameters, **averaged, **copied}:
            here, stream = Rows(parameters[device], averaged[device], copied[device]), streams[device]
            alone, rest = Rows(here.parameters, [], []), dataclasses.replace(here, parameters=[])
            if here.parameters and stream.is_beside and bytes_moved(here.parameters) >= WORTH_FORKING:
                stream.keep_alive(_tensors_on(device, here.parameters))
                with stream.fork():  # joined before anything reads; what the step allocates is that stream's own
                    self.forked_steps.append((stream, mover.prepare(alone)))
                in_line = [rest]
            else:
                in_line = [here] if mover.may_share else [alone, rest]
            self.steps.extend(
                mover.prepare(rows) for rows in in_line if rows.parameters or rows.averaged or rows.copied
            )


class ByWeight:
    """Moves rows by ``shadow += weight * (source - shadow)``, with one weight for each average.

    Args:
        settings: how elements are guarded and rounded, and by which backend.
        overlap: whether averages on the host are left to a thread.
        first_step: number of the next update, by which random bits are counted.
        skipped: for each device the count of skipped elements.
        compensations: for each average its Kahan terms; without effect unless the settings ask for them.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        overlap: bool,
        first_step: int,
        skipped: Mapping[torch.device, Tensor],
        compensations: Sequence[Compensations],
    ) -> None:
        is_stochastic = settings.rounding == 'stochastic'
        self.may_share = not is_stochastic  # buffers draw bits of their own, whether or not parameters run beside
        self._backend = settings.backend
        follows_rules = settings.skip_nonfinite or is_stochastic or settings.compensated
        self._has_thread = overlap and not follows_rules and self._backend == 'auto'
        self._rules = kernels.Rules(
            skip_nonfinite=settings.skip_nonfinite,
            stochastic=is_stochastic,
            seed=settings.seed,
            first_step=first_step,
            compensated=settings.compensated,
        )
        self._skipped = skipped
        self._compensations = compensations

    def prepare(self, rows: Rows) -> Step:
        averaged = [*rows.parameters, *rows.averaged]
        first, _ = (*averaged, *rows.copied)[0]
        rules = dataclasses.replace(
            self._rules,
            skipped=self._skipped[first[0].device],
            first_piece=0 if rows.parameters else FIRST_PIECE_OF_BUFFERS,
        )
        shadows = [[row[which] for row, _ in averaged] for which in range(len(first))]
        sources = [source for _, source in averaged]
        if averaged and log.isEnabledFor(logging.INFO):
            log.info('averaging %s', kernels.describe(shadows, sources, backend=self._backend, rules=rules))
        buffers = range(len(rows.parameters), len(averaged))
        from_model, from_first = _copies(rows.copied)
        step = kernels.prepare(
            shadows,
            sources,
            mended=buffers,
            copied=from_model,
            backend=self._backend,
            rules=rules,
            compensations=self._terms(shadows) if rules.compensated else None,
        )
        if not from_first:
            return step
        copy = kernels.prepare([[] for _ in first], [], copied=from_first, backend=self._backend)

        def step_and_copy(weights: Sequence[float]) -> None:
            step(weights)
            copy(weights)

        return step_and_copy

    def _terms(self, shadows: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """The Kahan terms of these shadows, kept until the stream that writes them is done."""
        terms = [compensations.of(each) for compensations, each in zip(self._compensations, shadows, strict=True)]
        for term in chain.from_iterable(terms):
            if term.is_cuda:
                term.record_stream(torch.cuda.current_stream(term.device))
        return terms

    def is_left_to_a_thread(self, row: Row) -> bool:
        return self._has_thread and offload.can_take(row[0][0], row[1])

    def keeps_address(self, row: Row) -> bool:
        return any(kernels.keeps_address(shadow, row[1], backend=self._backend, rules=self._rules) for shadow in row[0])

    def run(self, plan: Plan, numbers: Sequence[float]) -> None:
        for averages in plan.host_averages:
            averages.update(numbers)  # waited for as the forks are
        for stream, step in plan.forked_steps:
            with stream.fork():  # joined by wait_for_reads(), and by wait(), which every read of the average calls
                step(numbers)
        for step in plan.steps:
            step(numbers)


def _host_averages(kinds: Sequence[Sequence[Row]]) -> list[HostAverage]:
    devices = dict.fromkeys(source.device for kind in kinds for _, source in kind)
    return [HostAverage(*(_rows_of(device, kind) for kind in kinds)) for device in devices]


def _rows_of(device: torch.device, rows: Sequence[Row]) -> list[layout.Row]:
    return [(*shadows, source) for shadows, source in rows if source.device == device]


def _copies(rows: Sequence[Row]) -> tuple[list[layout.Pair], list[layout.Pair]]:
    """The pairs to copy in one step, and those to copy after it.

    On the host only the first average copies from the model, and the others from the first: a copy from a device waits
    for it. On a device one launch makes all copies, in any order.
    """
    is_on_host = all(shadows[0].device.type == 'cpu' for shadows, _ in rows)
    first = [(shadows[0], source) for shadows, source in rows]
    others = [[(shadow, shadows[0] if is_on_host else source) for shadow in shadows[1:]] for shadows, source in rows]
    by_average = list(chain.from_iterable(zip(*others, strict=True)))  # what lies side by side is copied in one call
    return (first, by_average) if is_on_host else (first + by_average, [])


def _tensors_on(device: torch.device, rows: Sequence[Row]) -> list[Tensor]:
    """Shadows, and those sources that lie on their device."""
    tensors = [tensor for shadows, source in rows for tensor in (*shadows, source)]
    return [tensor for tensor in tensors if tensor.device == device]
