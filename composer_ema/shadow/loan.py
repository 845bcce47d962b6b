"""The training weights of models while averages stand in them, whoever lends: one loan for all that share a tensor.

Invariant: while an average stands in a model, the training value of every tensor that it covers lies in the stash. The
stash is filled before the model is overwritten, and emptied after the training weights are back.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from composer_ema.kernels.rules import is_inexact
from composer_ema.model.inventory import Inventory
from composer_ema.model.names import listed
from composer_ema.model.sharding import unwrap
from composer_ema.wording import counted


class Average(Protocol):
    """What can stand in a model. Its ``repr`` tells users what stands there. It must not refer to the model."""

    parameters: dict[str, Tensor]

    def tensor(self, name: str) -> Tensor | None:
        """The average of the tensor of that canonical name; None where there is none."""
        ...


@dataclass(frozen=True)
class _Guest:
    """An average in a module.

    Args:
        average: the average.
        module: the module, unwrapped, referred to weakly.
        slots: canonical name to the key of the slot, for each tensor that the average covers.
        number: guests are numbered in the order in which they enter.
    """

    average: Average
    module: weakref.ref[nn.Module]
    slots: Mapping[str, int]
    number: int


@dataclass(frozen=True)
class _Slot:
    """A tensor of a model as it was when an average entered, kept alive, and its training value."""

    tensor: Tensor
    training: Tensor


class Loan:
    """The training weights of a model, and the averages that stand in it.

    Modules that share tensors, such as a network and the model around it, share a loan. Averages may enter and leave in
    any order. The model shows the one that entered last, as if that were alone: whatever it does not cover holds its
    training value. When the last average leaves, every training weight returns. Copies only; the stash has the dtypes
    of the model. Buffers of whole numbers stay as they are: averages copy them, and counters that a forward counts up
    go on.
    """

    def __init__(self) -> None:
        self._guests: list[_Guest] = []
        self._slots: dict[int, _Slot] = {}

    @property
    def shown(self) -> Average | None:
        """The average that the model holds."""
        return self._guests[-1].average if self._guests else None

    @property
    def borrowers(self) -> list[str]:
        """What stands in the model, first come first."""
        return [repr(guest.average) for guest in self._guests]

    def module_of(self, average: Average) -> nn.Module | None:
        """The module in which ``average`` stands; None if in none, or if that has been collected."""
        return next((guest.module() for guest in self._guests if guest.average is average), None)

    def shares(self, tensors: frozenset[int]) -> bool:
        """Whether one of the tensors with these :func:`identities` is on loan."""
        return not tensors.isdisjoint(self._slots)

    def training_weights(self, module: nn.Module, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stashed training weights of those tensors of ``module`` that are on loan, by name, aliased."""
        keys = {name: id(tensor) for name, tensor in live.items()}
        for guest in self._guests:
            if guest.module() is module:  # a tensor may have been replaced since
                keys |= guest.slots
        return {name: self._slots[key].training for name, key in keys.items() if key in self._slots}

    # Helpers of the functions below, which hold the lock

    def admit(
        self, average: Average, module: nn.Module, live: Mapping[str, Tensor], stash: Mapping[str, Tensor]
    ) -> None:
        """Records that ``average`` covers ``live``, whose training values are in ``stash`` or in the tensors."""
        slots = {name: id(tensor) for name, tensor in live.items()}
        new = {
            slots[name]: _Slot(tensor, stash[name].clone() if name in stash else tensor.detach().clone())
            for name, tensor in live.items()
            if name in stash or slots[name] not in self._slots
        }
        # Recorded before anything is overwritten, so that an interrupt never finds an average in without a stash.
        self._slots = {**self._slots, **new}
        self._guests = [*self._guests, _Guest(average, weakref.ref(module), slots, next(_numbers))]

    def absorb(self, other: Loan) -> None:
        """Takes over another loan, when an average comes that shares tensors with both."""
        self._slots = {**self._slots, **other._slots}
        self._guests = sorted([*self._guests, *other._guests], key=lambda guest: guest.number)

    def remove(self, average: Average) -> None:
        """Takes ``average`` out and shows what remains: another average, or the training weights."""
        targets = self._targets()
        remaining = [guest for guest in self._guests if guest.average is not average]
        was_shown = self.shown is average
        self._guests = remaining
        try:
            if was_shown:
                self._show(targets)
        except BaseException:
            self._show(targets)  # an interrupt does not stop the return half-way
            raise
        finally:
            self._forget_unused()

    def remove_dead(self) -> None:
        """Takes out the averages of modules that have been collected; their tensors may live on in other modules."""
        living = [guest for guest in self._guests if guest.module() is not None]
        if len(living) < len(self._guests):
            targets, was_shown = self._targets(), self._guests[-1].module() is None
            self._guests = living
            if was_shown:
                self._show(targets)
            self._forget_unused()

    def show(self) -> None:
        """Makes the model hold the average that entered last. What that does not cover gets its training weight."""
        self._show(self._targets())

    def refuse_lost(self) -> None:
        """Raises a RuntimeError where a model has lost a parameter that is to be restored."""
        for guest in self._guests:
            module = guest.module()
            if module is None:
                continue
            live = Inventory.of(module).tensors()
            gone = sorted(name for name in guest.slots if name in guest.average.parameters and name not in live)
            if gone:
                more = f' and {counted(len(gone) - 1, "more parameter")}' if len(gone) > 1 else ''
                raise RuntimeError(f'the model has lost {gone[0]}{more} since it was swapped in.')

    def _targets(self) -> dict[int, dict[int, Tensor]]:
        """For each slot the tensors that have its place in the modules now, each once."""
        targets: dict[int, dict[int, Tensor]] = {key: {} for key in self._slots}
        for guest in self._guests:
            module = guest.module()
            live = None if module is None else Inventory.of(module).tensors()
            for name, key in guest.slots.items():
                target = self._slots[key].tensor if live is None else live.get(name)
                if target is not None:
                    targets[key][id(target)] = target
        return targets

    def _forget_unused(self) -> None:
        used = frozenset[int]().union(*(guest.slots.values() for guest in self._guests))
        self._slots = {key: slot for key, slot in self._slots.items() if key in used}

    def _show(self, targets: Mapping[int, Mapping[int, Tensor]]) -> None:
        values = {key: slot.training for key, slot in self._slots.items()}
        if self._guests:
            guest = self._guests[-1]
            shown = {key: guest.average.tensor(name) for name, key in guest.slots.items()}
            values |= {key: value for key, value in shown.items() if value is not None}
        # A buffer that the model has meanwhile replaced by one of another shape, as caches do, keeps its new value.
        pairs = [
            (target.data, value)  # unseen by autograd: a graph that waits for its backward stays valid
            for key, value in values.items()
            for target in targets[key].values()
            if target.shape == value.shape
        ]
        if pairs:
            torch._foreach_copy_([target for target, _ in pairs], [value for _, value in pairs])


#: The open loan of each unwrapped module in which an average stands, as long as the module lives. A plain dictionary,
#: not a WeakKeyDictionary: every update asks whether it is empty.
_loans: dict[weakref.ref[nn.Module], Loan] = {}
_numbers = itertools.count()
_lock = threading.RLock()


def enter(average: Average, model: nn.Module, live: Mapping[str, Tensor]) -> None:
    """Stashes the training weights of ``live`` and puts ``average`` in their place.

    After an exception, an interrupt included, the model shows what it showed before.

    Args:
        average: stands in no model yet.
        model: wrapped or not.
        live: the tensors of the model that the average covers, by canonical name.
    """
    module = unwrap(model)
    covered = {name: tensor for name, tensor in live.items() if is_inexact(tensor)}
    with _lock:
        loan = _joined(module, identities(covered.values()))
        loan.admit(average, module, covered, {})
        try:
            loan.show()
        except BaseException:
            loan.remove(average)
            _close_if_empty(loan)
            raise


def adopt(average: Average, model: nn.Module, stash: Mapping[str, Tensor]) -> None:
    """Takes over training weights that were saved while ``average`` stood in ``model``, which holds it already.

    Raises:
        RuntimeError: the stash is that of another model. Nothing is changed.
    """
    module = unwrap(model)
    live = Inventory.of(module).tensors()
    covered = {name: live[name] for name in stash if name in live and live[name].shape == stash[name].shape}
    strange = sorted(name for name in stash if name in average.parameters and name not in covered)
    if strange:
        raise RuntimeError(
            f'the loaded state holds training weights of another model: {listed(strange)} are missing here, or have '
            'another shape. Pass the model that the state belongs to.'
        )
    with _lock:
        loan = _joined(module, identities(covered.values()))
        loan.admit(average, module, covered, stash)


def leave(average: Average) -> None:
    """Takes ``average`` out of the model in which it stands; the last one to leave gives the training weights back.

    Raises:
        RuntimeError: a model has lost a parameter that is to be restored. The average stays in.
    """
    with _lock:
        loan = holding(average)
        if loan is not None:
            loan.refuse_lost()
            try:
                loan.remove(average)
            finally:
                _close_if_empty(loan)


def recall(model: nn.Module) -> list[str]:
    """Takes every average out of ``model`` and returns what stood in it. The training weights are back then."""
    with _lock:
        loan = of(model)
        recalled = [] if loan is None else loan.borrowers
        while loan is not None and loan.shown is not None:
            leave(loan.shown)
    return recalled


def holding(average: Average) -> Loan | None:
    """The loan in which ``average`` stands; None where it stands in no model that is alive."""
    if not _loans:
        return None
    with _lock:
        return next((loan for loan in _open() if loan.module_of(average) is not None), None)


def of(model: nn.Module) -> Loan | None:
    """The loan of ``model``, wrapped or not, or of a module that shares tensors with it; None without one."""
    if not _loans:
        return None
    module = unwrap(model)
    with _lock:
        found = _loans.get(weakref.ref(module))
        if found is not None and found.shown is not None:
            return found
        return _sharing(identities(Inventory.of(module).tensors().values()))


def is_open(model: nn.Module) -> bool:
    """Whether an average stands in ``model`` itself, wrapped or not. Costs next to nothing."""
    return bool(_loans) and weakref.ref(unwrap(model)) in _loans


def borrowers(model: nn.Module) -> list[str]:
    """What stands in ``model``, first come first; empty while it holds its training weights."""
    loan = of(model)
    return [] if loan is None else loan.borrowers


def identities(tensors: Iterable[Tensor]) -> frozenset[int]:
    """What tells tensors apart as long as they live."""
    return frozenset(map(id, tensors))


def refuse(module: nn.Module, tensors: frozenset[int] | None = None) -> None:
    """Raises a RuntimeError while an average stands in a module or in one that shares its tensors.

    Costs next to nothing while no model at all is on loan.

    Args:
        module: unwrapped.
        tensors: :func:`identities` of its tensors. Default: the module is walked for them while some model is on loan.
    """
    if not _loans:
        return
    with _lock:
        loan = of(module) if tensors is None else _loans.get(weakref.ref(module)) or _sharing(tensors)
    if loan is not None and loan.shown is not None:
        raise RuntimeError(
            f'the model holds an average, not its training weights: {listed(loan.borrowers)} stands in it. '
            'Call swap_out(model) first.'
        )


def _open() -> list[Loan]:
    return list({id(loan): loan for loan in list(_loans.values())}.values())


def _sharing(tensors: frozenset[int]) -> Loan | None:
    return next((loan for loan in _open() if loan.shown is not None and loan.shares(tensors)), None)


def _joined(module: nn.Module, tensors: frozenset[int]) -> Loan:
    """The one loan of ``module`` and of all that share these tensors, registered for each of their modules."""
    found = _loans.get(weakref.ref(module))
    loan = found if found is not None and found.shown is not None else Loan()
    for other in _open():
        if other is not loan and other.shown is not None and other.shares(tensors):
            loan.absorb(other)
            for member in [key for key, value in list(_loans.items()) if value is other]:
                _loans[member] = loan
    _loans[weakref.ref(module, _forget)] = loan
    return loan


def _forget(collected: weakref.ref[nn.Module]) -> None:
    loan = _loans.pop(collected, None)
    if loan is not None:
        with _lock, torch.no_grad():
            loan.remove_dead()


def _close_if_empty(loan: Loan) -> None:
    if loan.shown is None:
        for member in [key for key, value in list(_loans.items()) if value is loan]:
            _loans.pop(member, None)
