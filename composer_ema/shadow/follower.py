"""Moves k averages towards the model that they follow: prepares once, watches for changes, forks and joins.

Invariant: after the first update of an unchanged model, an update walks no module, allocates nothing and never makes
the host wait.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from composer_ema.kernels.layout import Pair
from composer_ema.model.inventory import Inventory
from composer_ema.model.names import check_same, listed
from composer_ema.model.sharding import is_shard, local, refuse_placeholders, share_of
from composer_ema.model.watch import Watch
from composer_ema.shadow import loan
from composer_ema.shadow.counter import DeviceCounter
from composer_ema.shadow.function import ByFunction
from composer_ema.shadow.offload import HostAverage
from composer_ema.shadow.plan import ByWeight, Mover, Plan, Row, Rows
from composer_ema.shadow.rounding import RoundingNotice
from composer_ema.shadow.storage import Storage
from composer_ema.shadow.stream import SideStream
from composer_ema.wording import counted

log = logging.getLogger(__name__)


class Follower:
    """Updates averages of one model, which share a watch, a plan and, where kernels can, one read of the weights.

    All averages track the same names. A parameter that one tracks although it is frozen, as after a state of an earlier
    run was loaded into it, joins the others at its value, at the next update.

    Args:
        storages: the averages; they have the same settings.
        overlap: on CUDA, run a long update of the parameters on a side stream, and the arithmetic of an average on the
            host in a thread. Then :meth:`wait_for_reads` must come before the parameters are written again.
        labels: what to call each average in a warning. Default: there is one, which needs no name.
    """

    def __init__(self, storages: Sequence[Storage], *, overlap: bool = False, labels: Sequence[str] = ()) -> None:
        self._storages = storages
        self._labels = labels
        self.overlap = overlap
        self._streams: dict[torch.device, SideStream] = {}
        self._skipped: dict[torch.device, DeviceCounter] = {}
        self._has_listed = False
        self._rounding = RoundingNotice()
        self.plan: Plan | None = None

    def update(self, module: nn.Module, numbers: Sequence[Any]) -> None:
        """Moves every average towards ``module``, and counts the update.

        Args:
            module: the model, unwrapped. Only read.
            numbers: for each average its weight, or where a function makes it, the number of updates so far.

        Raises:
            RuntimeError: an average stands in the model, or the function raised.
            ValueError: the model lacks a tracked parameter or has it in another shape.
        """
        plan = self.plan_for(module, joining=True)
        loan.refuse(module, plan.identities)
        if self._rounding.limit and min(numbers) < self._rounding.limit:
            self._rounding.tell(numbers, self._labels)
        for stream in self._streams.values():
            stream.wait_for_readers()
        plan.run(plan, numbers)
        for storage in self._storages:
            storage.num_updates += 1

    def plan_for(self, module: nn.Module, *, joining: bool = False) -> Plan:
        """The plan for ``module``, made anew where that has changed. Only an update lets new tensors join."""
        plan = self.plan
        if plan is None or (joining and not plan.has_joined) or not plan.watch.is_current(module):
            self.forget_plan()
            plan = self.plan = self._new_plan(module, joining)
        return plan

    def change_names(self, module: nn.Module, renamed: Mapping[str, str], *, leaving: bool, joining: bool) -> None:
        """Gives every average the names that ``module`` has now; see :meth:`Storage.change_names`.

        Args:
            module: the model, unwrapped. Only read.
            renamed: old name to new name.
            leaving: whether to forget the averages of parameters that the model does not have.
            joining: whether what is new joins now.

        Raises:
            ValueError: the averages and the model do not fit. They are as they were.

        Warns:
            UserWarning: on behalf of the caller's caller: no average is left of those that there were.
        """
        inventory, before = Inventory.of(module), [(each.parameters, each.buffers) for each in self._storages]
        try:
            for storage in self._storages:
                storage.change_names(inventory, renamed, leaving=leaving)
            self.forget_plan()
            self.plan_for(module, joining=joining)
        except ValueError:
            for storage, (parameters, buffers) in zip(self._storages, before, strict=True):
                storage.parameters, storage.buffers = parameters, buffers
            self.forget_plan()
            raise
        tracked, now = before[0][0], self._storages[0].parameters
        if tracked and not renamed and tracked.keys().isdisjoint(now):
            warnings.warn(
                f'none of the {counted(len(tracked), "averaged parameter")} is left: the model has '
                f'{listed(sorted(now))}, whose averages start at its values.',
                stacklevel=4,
            )

    def forget_plan(self) -> None:
        """Drops the plan, as before tensors are replaced, once the last update is finished."""
        self.wait()
        self.plan = None

    def wait(self) -> None:
        """Orders the current stream after the last update; waits for a thread that averages on the host."""
        for stream in self._streams.values():
            stream.join()
        for average in self._host_averages():
            average.wait()

    def wait_for_reads(self) -> None:
        """Orders the current stream after the last update has read the parameters, which may be written then."""
        for stream in self._streams.values():
            stream.join()
        for average in self._host_averages():
            average.wait_for_reads()

    def was_read(self) -> None:
        """Orders the next update after what the current stream holds now, which reads the averages."""
        for stream in self._streams.values():
            stream.was_read()

    @property
    def is_pending(self) -> bool:
        """Whether an update runs beside the current stream, and neither of the two waits has been called since."""
        return any(stream.is_pending for stream in self._streams.values()) or any(
            average.is_reading for average in self._host_averages()
        )

    def poll_skipped(self) -> int:
        """How many elements ``skip_nonfinite`` has left alone so far. Never waits, so on CUDA a few updates old."""
        return sum(counter.poll() for counter in self._skipped.values())

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: without the ties to a model."""
        self.wait()
        return {**self.__dict__, 'plan': None, '_streams': {}, '_skipped': {}}

    # Helpers, in call order

    def _host_averages(self) -> Sequence[HostAverage]:
        return () if self.plan is None else self.plan.host_averages

    def _new_plan(self, module: nn.Module, joining: bool) -> Plan:
        inventory = Inventory.of(module)
        refuse_placeholders(inventory.tensors())
        if joining:  # at its value, which must be one of training
            loan.refuse(module, loan.identities(inventory.tensors().values()))
        for storage in self._storages:
            check_same(
                'what the average follows',
                storage.parameters,
                {name: p for name, p in inventory.parameters.items() if name in storage.parameters},
                remedy='The average follows the architecture that it was built with; build a new one for another. '
                'Where names have left or changed, say so with shadow.resolve(model, joining=True, leaving=True, '
                'renamed={old: new}).',
            )
        if joining:
            tracked = {name for storage in self._storages for name in storage.parameters}
            for storage in self._storages:
                storage.join(inventory, frozen=tracked)
        parameter_pairs = [each.paired(each.parameters, inventory.parameters) for each in self._storages]
        buffer_pairs = [each.paired(each.buffers, inventory.buffers) for each in self._storages]
        for storage in self._storages:
            storage.compensate()
        parameters, buffers = _rows(parameter_pairs), _rows(buffer_pairs)
        sources = {name: pair[1] for pairs in (*parameter_pairs, *buffer_pairs) for name, pair in pairs.items()}
        for shadows, _ in chain(parameters.values(), buffers.values()):
            self._add_device(shadows[0].device)
        is_averaged = self._storages[0].is_averaged
        averaged = {name: row for name, row in buffers.items() if is_averaged(name)}
        copied = {name: row for name, row in buffers.items() if name not in averaged}
        rows = Rows(*(list(kind.values()) for kind in (parameters, averaged, copied)))
        self._list_buffers(inventory)
        mover = self._mover()
        self._rounding.follow(self._rounded())
        addressed = [*_addressed({**parameters, **averaged}, sources, mover), *(sources[name] for name in copied)]
        addressed = addressed or list(sources.values())[:1]  # a model moves as a whole
        watch = Watch(module, inventory, on_gone=_weakly(self.forget_plan), addressed=addressed)
        return Plan(watch, joining, sources, rows, mover, self._streams)

    def _list_buffers(self, inventory: Inventory) -> None:
        """Says once what becomes of the buffers."""
        storage = self._storages[0]
        if self._has_listed or not inventory.buffers or not log.isEnabledFor(logging.INFO):
            return
        self._has_listed = True
        averaged = [name for name in storage.buffers if storage.is_averaged(name)]
        kept = [name for name in inventory.buffers if name in storage.selection and name not in storage.buffers]
        log.info(
            'buffers: averaging %s; copying %d others; leaving %s to the model, which cannot be kept',
            listed(averaged) or 'none',
            len(storage.buffers) - len(averaged),
            listed(kept) or 'none',
        )

    def _add_device(self, device: torch.device) -> None:
        if device not in self._streams:
            self._skipped[device] = DeviceCounter(device)  # first: threads may come here together
            self._streams[device] = SideStream(device, overlap=self.overlap)

    def _rounded(self) -> set[torch.dtype]:
        """The dtypes of averaged parameters that round to the nearest, and so lose small updates."""
        settings = self._storages[0].settings
        if settings.has_function or settings.compensated or settings.rounding == 'stochastic':
            return set()
        return {tensor.dtype for storage in self._storages for tensor in storage.parameters.values()}

    def _mover(self) -> Mover:
        settings = self._storages[0].settings
        if settings.has_function:
            return ByFunction(settings)
        return ByWeight(
            settings,
            overlap=self.overlap,
            first_step=self._storages[0].num_updates,
            skipped={device: counter.value for device, counter in self._skipped.items()},
            compensations=[storage.compensations for storage in self._storages],
        )


def _rows(of_storages: Sequence[dict[str, Pair]]) -> dict[str, Row]:
    """The pairs of each storage side by side, of those names that all storages track, in their parts in this process.

    Where this process holds nothing of a tensor, there is nothing to move.
    """
    first, *others = of_storages
    return {
        name: (tuple(local(pairs[name][0]) for pairs in of_storages), share_of(source, shadow))
        for name, (shadow, source) in first.items()
        if all(name in pairs for pairs in others) and (local(shadow).numel() > 0 or not is_shard(shadow))
    }


def _addressed(rows: Mapping[str, Row], sources: Mapping[str, Tensor], mover: Mover) -> list[Tensor]:
    """The sources whose memory an update reads where it was.

    A view of a source, of which each rank averages a piece, stays in the old memory when the source moves.
    """
    return [
        sources[name] for name, row in rows.items() if row[1] is not local(sources[name]) or mover.keeps_address(row)
    ]


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """Calls a bound method as long as its object lives, without keeping it alive."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        living = reference()
        if living is not None:
            living()

    return call
