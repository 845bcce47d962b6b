"""The training weights of models while averages stand in them, whoever lends.

Invariant: while an average stands in a model, the training value of every tensor that it covers lies in the stash. The
books say what every model is to show and which training weights are stashed. They are written before a model is, in one
assignment, so after an interrupt anybody can finish what they say.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from composer_ema.kernels.rules import is_inexact
from composer_ema.model.inventory import Inventory
from composer_ema.model.names import listed
from composer_ema.model.sharding import unwrap
from composer_ema.shadow.interrupts import Refusal, insisting
from composer_ema.wording import counted


class Average(Protocol):
    """What can stand in a model. Its ``repr`` tells users what stands there. It must not refer to the model."""

    parameters: dict[str, Tensor]

    def tensor(self, name: str) -> Tensor | None:
        """The average of the tensor of that canonical name; None where there is none."""
        ...


class Stay:
    """The time that an average is in a model, from one call of :func:`enter` on.

    Args:
        average: what is put in.
    """

    def __init__(self, average: Average) -> None:
        self.average, self.has_begun = average, False
        self._leaving = _Leaving([average])

    def end(self) -> None:
        """Takes the average out, wherever an interrupt has stopped its entry; nothing if that was refused.

        A step of :func:`~composer_ema.shadow.interrupts.insisting`.
        """
        if self.has_begun:
            self._leaving()


@dataclass(frozen=True, eq=False)
class _Guest:
    """An average in a module.

    Args:
        average: the average.
        module: the module, unwrapped, referred to weakly.
        slots: canonical name to the key of the slot, for each tensor that the average covers.
    """

    average: Average
    module: weakref.ref[nn.Module]
    slots: Mapping[str, int]

    def touches(self, other: _Guest) -> bool:
        """Whether both stand in one module, or share a tensor."""
        module = self.module()
        return (module is not None and module is other.module()) or self.shares(other.slots.values())

    def shares(self, keys: Iterable[int]) -> bool:
        return not frozenset(self.slots.values()).isdisjoint(keys)


@dataclass(frozen=True)
class _Slot:
    """A tensor of a model as it was when an average entered, kept alive, and its training value."""

    tensor: Tensor
    training: Tensor


@dataclass(frozen=True, eq=False)
class _Books:
    """What stands in which model, and the training weights of all of them. Never changed, but replaced.

    Averages may enter and leave in any order. Modules that share tensors, such as a network and the model around it,
    are one model here. It shows the average that entered last, as if that were alone: whatever that does not cover
    holds its training value. Copies only; the stash has the dtypes of the model. Buffers of whole numbers stay as they
    are: averages copy them, and counters that a forward counts up go on.

    Args:
        guests: the averages, first come first.
        leaving: those of them that leave; they are guests until their tensors hold what they should.
        slots: the stash, by the identity of the tensor.
        sources: for each tensor that is to show an average, the stay of that.
        stale: keys of the slots whose tensors need not hold what they should yet.
    """

    guests: tuple[_Guest, ...] = ()
    leaving: frozenset[_Guest] = frozenset()
    slots: Mapping[int, _Slot] = field(default_factory=dict)
    sources: Mapping[int, _Guest] = field(default_factory=dict)
    stale: frozenset[int] = frozenset()

    @property
    def are_settled(self) -> bool:
        """Whether every model shows what it should."""
        return not (self.stale or self.leaving)

    @property
    def staying(self) -> tuple[_Guest, ...]:
        return tuple(guest for guest in self.guests if guest not in self.leaving)

    @property
    def living(self) -> tuple[_Guest, ...]:
        """The averages in modules that have not been collected."""
        return tuple(guest for guest in self.guests if guest.module() is not None)

    def guest(self, average: Average) -> _Guest | None:
        """The stay of ``average`` in a module that is alive."""
        return next((guest for guest in self.living if guest.average is average), None)

    def around(self, guests: Collection[_Guest]) -> tuple[_Guest, ...]:
        """The averages in the models of ``guests``, first come first."""
        found = frozenset(group for group in _groups(self.guests) if not group.isdisjoint(guests))
        return tuple(guest for guest in self.guests if any(guest in group for group in found))

    def within(self, module: nn.Module) -> tuple[_Guest, ...]:
        """The averages in ``module`` and in what shares tensors with it, first come first."""
        if not self.guests:
            return ()
        keys = identities(Inventory.of(module).tensors().values())
        return self.around([guest for guest in self.living if guest.module() is module or guest.shares(keys)])

    # Changes

    def entered(self, guest: _Guest, tensors: Mapping[str, Tensor], stash: Mapping[str, Tensor]) -> _Books:
        """With an average that covers ``tensors``, whose training values are in ``stash`` or in the tensors.

        Raises:
            RuntimeError: it is in a model already.
        """
        if self.guest(guest.average) is not None:
            raise RuntimeError('the average is swapped in already. Call swap_out(model) first.')
        new = {
            guest.slots[name]: _Slot(tensor, stash[name].clone() if name in stash else tensor.detach().clone())
            for name, tensor in tensors.items()
            if name in stash or guest.slots[name] not in self.slots
        }
        return self._changed((*self.guests, guest), self.leaving, {**self.slots, **new})

    def left(self, averages: Collection[Average]) -> _Books:
        """Without ``averages``, and without those whose modules have been collected."""
        gone = [g for g in self.staying if g.module() is None or any(g.average is average for average in averages)]
        return self._changed(self.guests, self.leaving.union(gone), self.slots) if gone else self

    def settled(self) -> _Books:
        """After everything has been shown: without those that leave, and without what nobody needs any more."""
        used = {key for guest in self.staying for key in guest.slots.values()}
        slots = {key: slot for key, slot in self.slots.items() if key in used}
        return _Books(self.staying, slots=slots, sources=self.sources)

    def _changed(self, guests: tuple[_Guest, ...], leaving: frozenset[_Guest], slots: Mapping[int, _Slot]) -> _Books:
        sources = _sources(tuple(guest for guest in guests if guest not in leaving))
        stale = {key for key in slots if self.sources.get(key) is not sources.get(key)}
        return _Books(guests, leaving, slots, sources, self.stale.union(stale))

    # What the models are to show

    def copies(self) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors that need not hold what they should, and what they should hold."""
        places, targets, values = self._places(), [], []
        for key in self.stale:
            value = self.slots[key].training
            if (source := self.sources.get(key)) is not None:
                shown = source.average.tensor(next(name for name, slot in source.slots.items() if slot == key))
                value = value if shown is None else shown
            for target in places[key].values():
                # A buffer that the model has meanwhile replaced by another shape, as caches do, keeps its new value.
                if target.shape == value.shape:
                    targets.append(target.data)  # unseen by autograd: a graph that waits for its backward stays valid
                    values.append(value)
        return targets, values

    def refuse_lost(self, averages: Collection[Average]) -> None:
        """Raises where a model in which ``averages`` stand has lost a parameter that is to be restored."""
        for guest in self.around([g for g in self.living if any(g.average is average for average in averages)]):
            module = guest.module()
            if module is None:
                continue
            live = Inventory.of(module).tensors()
            gone = sorted(name for name in guest.slots if name in guest.average.parameters and name not in live)
            if gone:
                more = f' and {counted(len(gone) - 1, "more parameter")}' if len(gone) > 1 else ''
                raise Refusal(f'the model has lost {gone[0]}{more} since it was swapped in.')

    def _places(self) -> dict[int, dict[int, Tensor]]:
        """For each stale slot the tensors that have its place in the modules now, each once."""
        places: dict[int, dict[int, Tensor]] = {key: {} for key in self.stale}
        for guest in self.guests:
            if not guest.shares(self.stale):
                continue
            module = guest.module()
            live = None if module is None else Inventory.of(module).tensors()
            for name, key in guest.slots.items():
                target = self.slots[key].tensor if live is None else live.get(name)
                if key in places and target is not None:
                    places[key][id(target)] = target
        return places


def _groups(guests: Sequence[_Guest]) -> list[frozenset[_Guest]]:
    """The averages of each model."""
    groups: list[frozenset[_Guest]] = []
    for guest in guests:
        joined = [group for group in groups if any(guest.touches(other) for other in group)]
        groups = [group for group in groups if group not in joined]
        groups.append(frozenset([guest]).union(*joined))
    return groups


def _sources(guests: tuple[_Guest, ...]) -> dict[int, _Guest]:
    """For each tensor that is to show one of these averages, the stay of that: each model shows the last to enter."""
    sources: dict[int, _Guest] = {}
    for group in _groups(guests):
        last = next(guest for guest in reversed(guests) if guest in group)
        sources |= dict.fromkeys(last.slots.values(), last)
    return sources


#: Every update asks whether these are empty.
_books = _Books()
#: Held while the books are written and the models after them. A signal handler may come back here in the same thread.
_lock = threading.RLock()
if hasattr(os, 'register_at_fork'):  # not on Windows, which has no fork
    # A child must not inherit a lock that another thread holds, nor a model half-way.
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def enter(stay: Stay, model: nn.Module, live: Mapping[str, Tensor]) -> None:
    """Stashes the training weights of ``live`` and puts an average in their place.

    After an error the model shows what it showed before. After an interrupt it shows either that or the average.

    Args:
        stay: of the average; has not begun.
        model: wrapped or not.
        live: the tensors of the model that the average covers, by canonical name.

    Raises:
        RuntimeError: the average is in a model already.
    """
    covered = {name: tensor for name, tensor in live.items() if is_inexact(tensor)}
    guest = _guest(stay.average, unwrap(model), covered)
    undoing = insisting(stay.end)
    try:
        next(undoing)
        with _lock:
            _Settling()()
            _write(lambda books: books.entered(guest, covered, {}), stay)
            _Settling()()
        next(undoing, None)
    except BaseException:
        undoing.close()
        raise
    _take_out_of_collected()


def adopt(average: Average, model: nn.Module, stash: Mapping[str, Tensor]) -> None:
    """Takes over training weights that were saved while ``average`` stood in ``model``, which holds it already.

    Nothing if that has been done before.

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
    guest = _guest(average, module, covered)
    with _lock:
        _Settling()()
        if module_of(average) is None:
            # The model holds it already, so that nothing is stale.
            _write(lambda books: dataclasses.replace(books.entered(guest, covered, stash), stale=books.stale))
    _take_out_of_collected()


def leave(average: Average) -> None:
    """Takes ``average`` out of the model in which it stands; the last one to leave gives the training weights back.

    An interrupt is raised when that is done.

    Raises:
        RuntimeError: a model has lost a parameter that is to be restored. The average stays in.
    """
    _insist(_Leaving([average]))


def recall(model: nn.Module) -> list[str]:
    """Takes every average out of ``model`` and returns what stood in it. The training weights are back then."""
    guests = _books.within(unwrap(model))
    if guests:
        _insist(_Leaving([guest.average for guest in guests]))
    return _names(guests)


def module_of(average: Average) -> nn.Module | None:
    """The module in which ``average`` stands; None if in none, or if that has been collected."""
    guest = _books.guest(average) if _books.guests else None
    return None if guest is None else guest.module()


def shown(model: nn.Module) -> Average | None:
    """The average that ``model`` holds, or a module that shares tensors with it."""
    guests = _books.within(unwrap(model))
    return guests[-1].average if guests else None


def training_weights(model: nn.Module) -> dict[str, Tensor]:
    """The stashed training weights of those tensors of ``model`` that are on loan, by name, aliased."""
    books, module = _books, unwrap(model)
    if not books.guests:
        return {}
    keys = {name: id(tensor) for name, tensor in Inventory.of(module).tensors().items()}
    for guest in books.guests:
        if guest.module() is module:  # a tensor may have been replaced since
            keys |= guest.slots
    return {name: books.slots[key].training for name, key in keys.items() if key in books.slots}


def is_open(model: nn.Module) -> bool:
    """Whether an average stands in ``model`` itself, wrapped or not. Costs next to nothing."""
    return bool(_books.guests) and _stands_in(unwrap(model))


def borrowers(model: nn.Module) -> list[str]:
    """What stands in ``model``, first come first; empty while it holds its training weights."""
    return _names(_books.within(unwrap(model)))


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
    if not _books.guests:
        return
    if not _books.are_settled:
        with _lock:  # until another thread has finished, or to finish what was interrupted again and again
            _Settling()()
    _take_out_of_collected()
    if tensors is not None and tensors.isdisjoint(_books.slots) and not _stands_in(module):
        return
    if inside := borrowers(module):
        raise RuntimeError(
            f'the model holds an average, not its training weights: {listed(inside)} stands in it. '
            'Call swap_out(model) first.'
        )


def _stands_in(module: nn.Module) -> bool:
    return any(guest.module() is module for guest in _books.guests)


def _names(guests: Iterable[_Guest]) -> list[str]:
    return [repr(guest.average) for guest in guests]


def _guest(average: Average, module: nn.Module, covered: Mapping[str, Tensor]) -> _Guest:
    return _Guest(average, weakref.ref(module, _on_collected), {name: id(t) for name, t in covered.items()})


def _insist(step: Callable[[], None]) -> None:
    insistence = insisting(step)
    try:
        next(insistence)
    finally:
        insistence.close()


class _Leaving:
    """Takes averages out of their models: a step of :func:`insisting`, which goes on where it was stopped."""

    def __init__(self, averages: Sequence[Average]) -> None:
        self._averages, self._settling, self._is_written = averages, _Settling(), False

    def __call__(self) -> None:
        with _lock:
            if not self._is_written:
                _books.refuse_lost(self._averages)
                _write(lambda books: books.left(self._averages))
                self._is_written = True
            self._settling()
        _take_out_of_collected()


def _write(change: Callable[[_Books], _Books], stay: Stay | None = None) -> None:
    """Replaces the books by what ``change`` makes of them. The lock is held."""
    global _books
    while True:
        books = _books
        changed = change(books)
        if books is _books:  # else a signal handler or the garbage collector has come here meanwhile, in this thread
            _books = changed
            if stay is not None:
                stay.has_begun = True
            return


class _Settling:
    """Makes the models show what the books say. The lock is held.

    It keeps what it has prepared, so that a call after an interrupt is short, and ends before the next interrupt.
    """

    def __init__(self) -> None:
        self._books: _Books | None = None

    def __call__(self) -> None:
        global _books
        while not _books.are_settled:
            books = _books
            if self._books is not books:
                self._targets, self._values = books.copies()
                self._settled = books.settled()
                self._books = books
            targets, values, settled = self._targets, self._values, self._settled
            if books is not _books:
                continue
            try:
                if targets:
                    torch._foreach_copy_(targets, values)
            except BaseException:  # it may be interrupted every time
                for target, value in zip(targets, values, strict=True):
                    if books is _books:
                        target.copy_(value)
                if books is _books:
                    _books = settled
                raise
            if books is _books:
                _books = settled


def _take_out_of_collected() -> None:
    """Takes out the averages of modules that have been collected; their tensors may live on in other modules."""
    while len(_books.living) < len(_books.guests):
        with _lock:
            _write(lambda books: books.left([]))
            _Settling()()


def _on_collected(_: weakref.ref[nn.Module]) -> None:
    """Called by the garbage collector, at any time and in any thread."""
    if threading.get_ident() == threading.main_thread().ident:
        _insist(_take_out_of_collected)
    elif _lock.acquire(blocking=False):  # no signal handler can run before the try: they run in the main thread
        try:
            _take_out_of_collected()
        finally:
            _lock.release()
    # Otherwise whoever holds the lock does it next. Who may wait for this thread, as for one that averages on the
    # host, may be the holder, so this thread does not wait.
