"""The training weights of models while averages stand in them, whoever lends.

Invariant: while an average stands in a model, the training value of every tensor that it covers lies in the stash. The
books say what every model is to show and which training weights are stashed. They are written before a model is, in one
assignment, so after an interrupt any call about that model can finish what they say. What cannot be written into one
model is the matter of the calls about that model alone.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from composer_ema.kernels.layout import Pair, resolved
from composer_ema.kernels.rules import is_inexact
from composer_ema.model.inventory import Inventory
from composer_ema.model.names import listed
from composer_ema.model.sharding import laid_out_as, local, must_be_gathered, whole
from composer_ema.model.wrappers import unwrap
from composer_ema.shadow.interrupts import Refusal, insisting
from composer_ema.shadow.storage import can_be_kept, views_of_parameters
from composer_ema.wording import counted

log = logging.getLogger(__name__)

#: What to do about a parameter that cannot be written.
MAKE_IT_WRITABLE = 'Give it memory of its own, or leave it out by name (exclude).'
_PUT_IT_BACK = 'Put it back, then call swap_out(model); its training value is kept until then.'


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
    """A tensor of a model as it was when an average entered, kept alive, and its training value.

    Args:
        tensor: the tensor.
        training: its training value.
        is_parameter: whether the value must return. A buffer may be replaced while an average is in.
    """

    tensor: Tensor
    training: Tensor
    is_parameter: bool

    def is_out_of_place(self, target: Tensor | None, live: Mapping[str, Tensor]) -> bool:
        """Whether ``target``, which has the place of the buffer now, is none, or an alias of another live tensor."""
        if target is None:
            return True
        return target is not self.tensor and not self.is_parameter and _is_alias(target, live.values())


@dataclass(frozen=True)
class _Copies:
    """What settling writes.

    Args:
        here: tensors, and values that lie in this process. First buffers, then parameters: a buffer may be a view of a
            parameter, which has the last word then.
        gathered: whole parameters, and the average of each of which every rank has a piece.
        averages: those of which ``gathered`` shows something.
    """

    here: Sequence[tuple[list[Tensor], list[Tensor]]] = ()
    gathered: Sequence[Pair] = ()
    averages: Collection[Average] = ()


@dataclass(frozen=True, eq=False)
class _Books:
    """What stands in which model, and the training weights of all of them. Never changed, but replaced.

    Averages may enter and leave in any order. Modules that share tensors, such as a network and the model around it,
    are one model here. It shows the average that entered last, as if that were alone: whatever that does not cover
    holds its training value. Copies only; the stash has the dtypes of the model. Buffers of whole numbers stay as they
    are: averages copy them, and counters that a forward counts up go on. So do buffers that cannot be written: sparse
    ones, and those whose elements share memory.

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
        """Whether every model shows what it should. Each model by itself is asked for by :meth:`settled`."""
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
            guest.slots[name]: _Slot(
                tensor,
                stash[name].clone() if name in stash else tensor.detach().clone(),
                name in guest.average.parameters,
            )
            for name, tensor in tensors.items()
            if name in stash or guest.slots[name] not in self.slots
        }
        return self._changed((*self.guests, guest), self.leaving, {**self.slots, **new})

    def left(self, averages: Collection[Average]) -> _Books:
        """Without ``averages``, and without those whose modules have been collected."""
        gone = [g for g in self.staying if g.module() is None or any(g.average is average for average in averages)]
        return self._changed(self.guests, self.leaving.union(gone), self.slots) if gone else self

    def settled(self, guests: Collection[_Guest]) -> _Books:
        """After the models of ``guests`` show what they should: without those in them that leave, and their stash.

        These very books if that is so already.
        """
        around = frozenset(self.around(guests))
        keys = _keys(around)
        if self.stale.isdisjoint(keys) and self.leaving.isdisjoint(around):
            return self
        return self._without(self.leaving & around, stale=self.stale - keys)

    def dropped(self, guest: _Guest) -> _Books:
        """Without an average that leaves. The tensors that it alone covers stay as they are."""
        return self._without([guest], stale=self.stale)

    def _without(self, gone: Collection[_Guest], *, stale: frozenset[int]) -> _Books:
        guests = tuple(guest for guest in self.guests if guest not in gone)
        used = _keys(guests)
        slots = {key: slot for key, slot in self.slots.items() if key in used}
        return _Books(guests, self.leaving.difference(gone), slots, self.sources, stale & used)

    def _changed(self, guests: tuple[_Guest, ...], leaving: frozenset[_Guest], slots: Mapping[int, _Slot]) -> _Books:
        sources = _sources(tuple(guest for guest in guests if guest not in leaving))
        stale = {key for key in slots if self.sources.get(key) is not sources.get(key)}
        return _Books(guests, leaving, slots, sources, self.stale.union(stale))

    # What the models are to show

    def copies(self, guests: Collection[_Guest], remedy: str) -> _Copies:
        """The tensors of the models of ``guests`` that need not hold what they should, and what they should hold.

        Args:
            guests: of these books.
            remedy: last sentence of the message about what cannot be written.

        Raises:
            Refusal: a module has lost a parameter, or cannot take its value.
        """
        buffers, parameters, gathered, averages = ([], []), ([], []), [], []
        names: dict[_Guest, dict[int, str]] = {}
        for key, places in self._places(self.around(guests), remedy).items():
            slot = self.slots[key]
            value, average = slot.training, None
            if (source := self.sources.get(key)) is not None:
                if source not in names:
                    names[source] = {key: name for name, key in source.slots.items()}
                shown = source.average.tensor(names[source][key])
                value, average = (value, None) if shown is None else (shown, source.average)
            targets, values = parameters if slot.is_parameter else buffers
            for target in places:
                if target.shape != value.shape:
                    continue
                # Unseen by autograd: a graph that waits for its backward stays valid.
                if average is not None and must_be_gathered(value, target):
                    gathered.append((target.data, value))
                    if average not in averages:
                        averages.append(average)
                else:
                    place, content = resolved(local(target).data, local(laid_out_as(value, target)))
                    targets.append(place)
                    values.append(content)
        return _Copies([each for each in (buffers, parameters) if each[0]], gathered, averages)

    def _places(self, guests: Collection[_Guest], remedy: str) -> dict[int, list[Tensor]]:
        """For each stale slot of ``guests`` the tensors that are to be written in its place, each once."""
        places: dict[int, dict[int, Tensor]] = {}
        for guest in guests:
            if not guest.shares(self.stale):
                continue
            slots = {name: self.slots[key] for name, key in guest.slots.items() if key in self.stale}
            module = guest.module()
            if module is None:
                found = {name: slot.tensor for name, slot in slots.items()}
            else:
                live = Inventory.of(module).tensors()
                _check_parameters(slots, live, remedy)
                found = {n: live[n] for n, slot in slots.items() if not slot.is_out_of_place(live.get(n), live)}
            for name, target in found.items():
                if obstacle(target, slots[name].training) is None:
                    places.setdefault(guest.slots[name], {})[id(target)] = target
        return {key: list(targets.values()) for key, targets in places.items()}


def _check_parameters(slots: Mapping[str, _Slot], live: Mapping[str, Tensor], remedy: str) -> None:
    """Raises a Refusal where ``live`` lacks a parameter of ``slots``, or has it in a form that cannot be written."""
    values = {name: slot.training for name, slot in slots.items() if slot.is_parameter}
    if gone := sorted(values.keys() - live.keys()):
        raise Refusal(f'the model has lost {_and_more(gone)} since it was swapped in. {_PUT_IT_BACK}')
    if problem := why_unwritable({name: (live[name], value) for name, value in values.items()}):
        raise Refusal(f'{problem}. {remedy}')


def _is_alias(target: Tensor, tensors: Iterable[Tensor]) -> bool:
    """Whether another one of ``tensors`` lies in the same memory."""
    return bool(views_of_parameters((other for other in tensors if other is not target), {'': target}))


def _and_more(names: Sequence[str]) -> str:
    """The first name, and how many there are besides."""
    return names[0] + (f' and {counted(len(names) - 1, "more parameter")}' if len(names) > 1 else '')


def _keys(guests: Iterable[_Guest]) -> set[int]:
    return {key for guest in guests for key in guest.slots.values()}


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
        RuntimeError: the average is in a model already, or a parameter cannot be written.
    """
    covered = _lendable(stay.average, live)
    guest = _guest(stay.average, unwrap(model), covered)
    settling = _Settling(guest.touches)
    undoing = insisting(stay.end)
    try:
        next(undoing)
        with _lock:
            settling()
            _write(lambda books: settling.prepared(books.entered(guest, covered, {}), MAKE_IT_WRITABLE), stay)
            settling()
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
    fitting = {name: live[name] for name in stash if name in live and live[name].shape == stash[name].shape}
    covered = _lendable(average, fitting)
    strange = sorted(name for name in stash if name in average.parameters and name not in covered)
    if strange:
        raise RuntimeError(
            f'the loaded state holds training weights of another model: {listed(strange)} are missing here, or have '
            'another shape. Pass the model that the state belongs to.'
        )
    guest = _guest(average, module, covered)
    with _lock:
        _Settling(guest.touches)()
        if module_of(average) is None:
            # The model holds it already, so that nothing is stale.
            _write(lambda books: dataclasses.replace(books.entered(guest, covered, stash), stale=books.stale))
    _take_out_of_collected()


def leave(average: Average) -> None:
    """Takes ``average`` out of the model in which it stands; the last one to leave gives the training weights back.

    An interrupt is raised when that is done.

    Raises:
        RuntimeError: a model has lost a parameter that is to be restored, or has it in another shape, kind of numbers
            or layout, or without memory. The average stays in, and the stash waits.
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
        keys = identities(Inventory.of(module).tensors().values()) if tensors is None else tensors
        with _lock:  # until another thread has finished, or to finish what was interrupted again and again
            _Settling(lambda guest: guest.module() is module or guest.shares(keys))()
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


def _lendable(average: Average, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of ``tensors`` that an average overwrites: parameters, and buffers that can be written."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if is_inexact(tensor)
        and (name in average.parameters or (obstacle(tensor, tensor) or _obstacle_of_mode(tensor)) is None)
    }


def obstacle(target: Tensor, value: Tensor) -> str | None:
    """Why ``value`` cannot be written into ``target``; None if it can."""
    if not can_be_kept(target):
        if target.is_nested:
            return 'is a nested tensor'
        return 'has elements that share memory' if target.layout is torch.strided else f'is stored as {target.layout}'
    if target.is_meta and not value.is_meta:
        return 'is on the meta device'
    if target.shape != value.shape:
        return f'has shape {tuple(target.shape)} in place of {tuple(value.shape)}'
    if (target.is_floating_point(), target.is_complex()) != (value.is_floating_point(), value.is_complex()):
        return f'is {target.dtype} in place of {value.dtype}'
    return None


def _obstacle_of_mode(target: Tensor) -> str | None:
    if target.is_inference() and not torch.is_inference_mode_enabled():
        return 'was made in torch.inference_mode(), so it can only be written there'
    return None


def why_unwritable(copies: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    """A sentence about the first parameters, of those by name, whose values cannot be written; empty if all can.

    Args:
        copies: a tensor and the value for it.
    """
    obstacles = {n: obstacle(target, value) or _obstacle_of_mode(target) for n, (target, value) in copies.items()}
    bad = sorted(name for name, reason in obstacles.items() if reason is not None)
    return f'{_and_more(bad)} cannot be overwritten: {bad[0]} {obstacles[bad[0]]}' if bad else ''


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
        self._averages, self._settling, self._is_written = averages, _Settling(self._is_of), False

    def __call__(self) -> None:
        with _lock:
            if not self._is_written:
                _write(lambda books: self._settling.prepared(books.left(self._averages)))
                self._is_written = True
            self._settling()
        _take_out_of_collected()

    def _is_of(self, guest: _Guest) -> bool:
        return any(guest.average is average for average in self._averages)


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
    """Makes models show what the books say. The lock is held.

    It keeps what it has prepared, so that a call after an interrupt is short, and ends before the next interrupt.

    An average of which every rank has a piece is gathered, after all else, and only once: after an interrupt or an
    error in the middle, the other ranks have gone on, and would answer with other tensors. Such an average then leaves
    the model, for which this process needs no other.

    Args:
        is_meant: picks averages. The models around them are settled, and no others.
        may_gather: whether every rank is here. Default: True.
    """

    def __init__(self, is_meant: Callable[[_Guest], bool], *, may_gather: bool = True) -> None:
        self._is_meant, self._may_gather = is_meant, may_gather
        self._books: _Books | None = None
        self._settled = _Books()
        self._copies = _Copies()

    def prepared(self, books: _Books, remedy: str = _PUT_IT_BACK) -> _Books:
        """These very books, for which the copies are known now.

        Args:
            books: may not be written yet.
            remedy: last sentence of the message about a parameter that cannot be written.

        Raises:
            Refusal: a module has lost a parameter, or cannot take its value.
        """
        guests = list(filter(self._is_meant, books.guests))
        settled = books.settled(guests)
        self._books = None
        self._copies = _Copies() if settled is books else books.copies(guests, remedy)
        self._settled = settled
        self._books = books
        return books

    def __call__(self) -> None:
        """Settles the models.

        Raises:
            Refusal: a parameter cannot be written. The books wait until it can.
        """
        global _books
        while not _books.are_settled:
            books = _books
            if self._books is not books:
                self.prepared(books)
            copies, settled = self._copies, self._settled
            if settled is books:
                return
            if books is not _books:
                continue
            if copies.gathered and not self._may_gather:
                _books = books.left(copies.averages)
                continue
            try:
                for targets, values in copies.here:
                    if books is _books:
                        torch._foreach_copy_(targets, values)
            except BaseException:  # it may be interrupted every time
                for targets, values in copies.here:
                    for target, value in zip(targets, values, strict=True):
                        if books is _books:
                            target.copy_(value)
                if books is _books and not copies.gathered:
                    _books = settled
                raise
            if copies.gathered:
                self._may_gather = False
            for target, value in copies.gathered:
                if books is _books:
                    place, content = resolved(target, whole(value))
                    place.copy_(content)
            if books is _books:
                _books = settled


def _take_out_of_collected() -> None:
    """Takes out the averages of modules that have been collected; their tensors may live on in other modules.

    What cannot be written then is dropped: whoever calls has nothing to do with it.
    """
    while len(_books.living) < len(_books.guests):
        with _lock:
            _write(lambda books: books.left([]))
            for guest in _books.leaving:
                if guest.module() is None:
                    _settle_or_drop(guest)


def _settle_or_drop(gone: _Guest) -> None:
    settling = _Settling(lambda guest: guest is gone, may_gather=False)
    try:
        settling()
    except Exception:
        try:
            settling()
        except Exception as error:  # no interrupt, since it has come again
            log.warning('the training weights of a model that was collected could not be put back: %s', error)
            _write(lambda books: books.dropped(gone))
        else:
            raise


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
