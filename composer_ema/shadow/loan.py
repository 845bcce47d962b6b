"""A model's training weights while any average stands in it: one loan per model, whoever lends to it.

Invariant: while an average stands in a model, the training value of every tensor that it covers lies in the stash. The
stash is filled before the model is overwritten, and emptied after the training weights are back.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from composer_ema.kernels.layout import unzip
from composer_ema.kernels.rules import is_inexact
from composer_ema.model.inventory import Inventory
from composer_ema.model.names import listed
from composer_ema.model.sharding import unwrap


class Average(Protocol):
    """What can be lent to a model. Its ``repr`` tells users who stands in the model."""

    def lent_tensors(self) -> Mapping[str, Tensor]:
        """The average by canonical name, with its last update finished."""
        ...


@dataclass(frozen=True)
class _Guest:
    """An average in a model, and the names of the tensors that it covers."""

    average: Average
    names: frozenset[str]


class Loan:
    """The training weights of one model, and the averages that stand in it.

    Averages may enter and leave in any order. The model shows the one that entered last, as if that were alone:
    whatever it does not cover holds its training value. When the last average leaves, every training weight returns.
    Copies only; the stash has the dtypes of the model. Buffers of whole numbers stay as they are: averages copy them,
    and counters that a forward counts up go on.

    Args:
        module: the model, unwrapped; referred to weakly.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._guests: list[_Guest] = []
        self._stash: dict[str, Tensor] = {}
        self._required: set[str] = set()
        self._versions: list[tuple[Tensor, int]] = []
        self._covered: dict[int, Tensor] = {}

    def __contains__(self, average: Average) -> bool:
        """Whether ``average`` stands in the model, shown or behind another."""
        return self._module() is not None and any(guest.average is average for guest in self._guests)

    @property
    def module(self) -> nn.Module | None:
        """The model; None once it has been collected."""
        return self._module()

    @property
    def shown(self) -> Average | None:
        """The average that the model holds."""
        return self._guests[-1].average if self._guests else None

    @property
    def borrowers(self) -> list[str]:
        """Who stands in the model, first come first."""
        return [repr(guest.average) for guest in self._guests]

    def training_weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The stashed training weights among ``names``, aliased."""
        return {name: self._stash[name] for name in names if name in self._stash}

    def enter(self, average: Average, live: Mapping[str, Tensor], required: Collection[str]) -> None:
        """Stashes the training weights of ``live`` and puts ``average`` in their place.

        After an exception, an interrupt included, the model shows what it showed before.

        Args:
            average: not in the model yet.
            live: the tensors of the model that the average covers, by canonical name.
            required: names of the parameters among them, which the model may not lose while the average is in.

        Raises:
            RuntimeError: another module that shares some of these tensors is on loan.
        """
        with _lock:
            covered = {name: tensor for name, tensor in live.items() if is_inexact(tensor)}
            stash = {name: t.detach().clone() for name, t in covered.items() if name not in self._stash}
            self._admit(average, covered, stash, required)
            try:
                self._show(live if self._stash.keys() <= live.keys() else self._live())
            except BaseException:
                self._guests = [guest for guest in self._guests if guest.average is not average]
                self._show(self._live())
                self._forget_unused()
                raise

    def adopt(self, average: Average, stash: Mapping[str, Tensor], required: Collection[str]) -> None:
        """Takes over training weights that were saved while ``average`` stood in the model, which holds it already."""
        with _lock:
            live = self._live()
            covered = {name: live[name] for name in stash if name in live and is_inexact(live[name])}
            self._admit(average, covered, {name: tensor.clone() for name, tensor in stash.items()}, required)
            self._note_versions(live)

    def leave(self, average: Average) -> None:
        """Takes ``average`` out; when the last one leaves, the training weights return.

        A buffer that the model has meanwhile replaced by one of another shape, as caches do, keeps its new value. An
        interrupt does not stop the return half-way.

        Raises:
            RuntimeError: the model has lost a parameter that is to be restored. The average stays in.
        """
        with _lock:
            live = self._live()
            gone = sorted(name for name in self._stash if name in self._required and name not in live)
            if gone and self._module() is not None:
                raise RuntimeError(
                    f'the model has lost {gone[0]} and {len(gone) - 1} more parameters since it was swapped in.'
                )
            was_shown = self.shown is average
            self._guests = [guest for guest in self._guests if guest.average is not average]
            try:
                if was_shown:
                    self._show(live)
            except BaseException:
                self._show(live)
                raise
            finally:
                self._forget_unused()

    @property
    def was_overwritten(self) -> bool:
        """Whether somebody has written the model's parameters since an average was shown, as loading weights does."""
        return any(_version(parameter) != version for parameter, version in self._versions)

    def abandon(self) -> None:
        """Ends the loan and leaves the model as it is, for when other weights have been loaded into it."""
        with _lock:
            self._guests = []
            self._forget_unused()

    # Helpers, in call order

    def _admit(
        self,
        average: Average,
        covered: Mapping[str, Tensor],
        stash: Mapping[str, Tensor],
        required: Collection[str],
    ) -> None:
        """Records the average and the stash, before anything is overwritten."""
        module = self._module()
        assert module is not None
        for other in list(_loans.values()):
            shared = [name for name, tensor in covered.items() if id(tensor) in other._covered]
            if other is not self and shared:
                raise RuntimeError(
                    f'{listed(shared)} share memory with a module that holds an average already: '
                    f'{listed(other.borrowers)}. Call its swap_out first.'
                )
        self._stash = {**self._stash, **stash}
        self._required |= set(required)
        self._covered |= {id(tensor): tensor for tensor in covered.values()}
        others = [guest for guest in self._guests if guest.average is not average]
        self._guests = [*others, _Guest(average, frozenset(stash) | frozenset(covered))]
        _loans[module] = self

    def _show(self, live: Mapping[str, Tensor]) -> None:
        """Writes the shown average, or what it does not cover of the training weights, into all stashed tensors."""
        values = dict(self._stash)
        if self._guests:
            guest = self._guests[-1]
            values |= {name: value for name, value in guest.average.lent_tensors().items() if name in guest.names}
        pairs = [(live[name], value) for name, value in values.items() if name in live]
        overwrite(*unzip((target, value) for target, value in pairs if target.shape == value.shape))
        self._note_versions(live)

    def _note_versions(self, live: Mapping[str, Tensor]) -> None:
        self._versions = [(live[name], _version(live[name])) for name in self._required if name in live]

    def _live(self) -> dict[str, Tensor]:
        module = self._module()
        return {} if module is None else Inventory.of(module).tensors()

    def _forget_unused(self) -> None:
        """Drops what no average in the model covers; without any, ends the loan."""
        covered = frozenset[str]().union(*(guest.names for guest in self._guests))
        self._stash = {name: value for name, value in self._stash.items() if name in covered}
        if not self._guests:
            self._covered, self._required, self._versions = {}, set(), []
            module = self._module()
            if module is not None:
                _loans.pop(module, None)


#: The loan of each unwrapped module in which an average stands, as long as the module lives.
_loans: weakref.WeakKeyDictionary[nn.Module, Loan] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def of(model: nn.Module) -> Loan:
    """The loan of ``model``, wrapped or not: the open one, or a new one that opens when an average enters."""
    module = unwrap(model)
    found = _loans.get(module)
    return Loan(module) if found is None else found


def holding(average: Average) -> Loan | None:
    """The loan in which ``average`` stands; None where it stands in no model."""
    return next((loan for loan in list(_loans.values()) if average in loan), None) if _loans else None


def is_open(model: nn.Module) -> bool:
    """Whether an average stands in ``model``, wrapped or not. Costs next to nothing."""
    return bool(_loans) and unwrap(model) in _loans


def borrowers(model: nn.Module) -> list[str]:
    """Who stands in ``model``, first come first; empty while it holds its training weights."""
    return of(model).borrowers


def recall(model: nn.Module) -> list[str]:
    """Takes every average out of ``model`` and returns who stood in it. The training weights are back then."""
    loan = of(model)
    recalled = loan.borrowers
    with _lock:
        while loan.shown is not None:
            loan.leave(loan.shown)
    return recalled


def identities(tensors: Iterable[Tensor]) -> frozenset[int]:
    """What tells tensors apart as long as they live, for :func:`refuse`."""
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
    loan = _loans.get(module)
    if loan is None:
        if tensors is None:
            tensors = identities(Inventory.of(module).tensors().values())
        loan = next((each for each in list(_loans.values()) if not tensors.isdisjoint(each._covered)), None)
    if loan is not None:
        raise RuntimeError(
            f'the model holds an average, not its training weights: {listed(loan.borrowers)} stands in it. '
            'Call swap_out(model) first.'
        )


def overwrite(targets: list[Tensor], values: list[Tensor]) -> None:
    """Copies in place unseen by autograd: a loan restores every bit, so a graph that waits for backward stays valid."""
    if targets:
        torch._foreach_copy_([target.data for target in targets], values)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
