"""An average that models can hold: it enters a model, leaves it, or overwrites it for good."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from composer_ema.kernels.layout import Pair, resolved, unzip
from composer_ema.model.inventory import Inventory
from composer_ema.model.names import check_same
from composer_ema.model.sharding import laid_out_as, local, must_be_gathered, refuse_placeholders
from composer_ema.model.untraced import untraced
from composer_ema.model.wrappers import unwrap
from composer_ema.shadow import loan
from composer_ema.shadow.follower import Follower
from composer_ema.shadow.interrupts import Block
from composer_ema.shadow.storage import Storage, are_alike, can_be_kept


class LendableAverage:
    """The part of :class:`composer_ema.ShadowModel` that lends the average to models.

    Args:
        storage: the average.
        follower: moves it, and pairs it with the model that it follows.
    """

    def __init__(self, storage: Storage, follower: Follower) -> None:
        self._storage, self._follower = storage, follower
        #: Training weights that were saved while a model held the average, until that model is known.
        self._loaded_stash: dict[str, Tensor] | None = None

    @property
    def is_swapped(self) -> bool:
        """Whether this average stands in a model, shown or behind another that entered later."""
        return self._loaded_stash is not None or loan.module_of(self._storage) is not None

    def is_swapped_into(self, model: nn.Module) -> bool:
        """Whether this average stands in ``model``; a state saved while swapped may have left it in any model."""
        return self._loaded_stash is not None or self._module() is unwrap(model)

    def is_shown_by(self, model: nn.Module) -> bool:
        """Whether ``model`` holds this average, not another that entered later."""
        return self.is_swapped_into(model) and loan.shown(model) in (None, self._storage)

    def swap_in(self, model: nn.Module) -> None:
        """Stashes the tracked weights of ``model`` and copies the average into it, in place.

        If another average is in the model already, the model now shows this one; the training weights stay stashed.
        After an interrupt, such as a KeyboardInterrupt, the average is either in or out as a whole: ask
        :attr:`is_swapped`. In a ``with`` block of :meth:`swapped` you need not ask.

        Buffers that cannot be written, as sparse ones or those whose elements share memory, stay whatever the model
        holds. A buffer that is a view of a tracked parameter shows the average of that.

        With ``shard_over_ranks``, the average is gathered tensor by tensor, in a collective call. If that fails or is
        interrupted, the training weights return and the average is out.

        Raises:
            RuntimeError: this average is swapped in already, perhaps by another thread, or a tracked parameter cannot
                be written, as after ``expand``. Nothing is changed then.
        """
        self._enter(model, loan.Stay(self._storage))

    @untraced
    def swap_out(self, model: nn.Module) -> None:
        """Takes the average out of ``model``; the last one to leave restores every bit of the training weights.

        A buffer that the model meanwhile replaced keeps its new value if that has another shape, another kind of
        numbers (floating, complex or whole) or another layout, as caches do, if its elements share memory, or if it is
        an alias of another tensor of the model. An interrupt is raised either before anything has changed or when the
        average is out.

        Raises:
            RuntimeError: the average is in no model, or in another one; or ``model`` has lost a parameter, or cannot
                take its training value: it has another shape or kind now, or is on the meta device. The average stays
                in and the training weights stay stashed: put the parameter back and call this again.
        """
        if self._loaded_stash is not None:
            loan.adopt(self._storage, model, self._loaded_stash)
            self._loaded_stash = None
        module = self._module()
        if module is None:
            raise RuntimeError('nothing is swapped in. Call swap_in(model) first.')
        if module is not unwrap(model):
            raise RuntimeError('the average is swapped into another model. Pass that one to swap_out.')
        loan.leave(self._storage)

    @untraced
    def swapped(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Lends ``model`` with the average in it for a ``with`` block, and takes the average out again.

        Whatever happens: after an interrupt, at whatever moment of the block, of its beginning or its end, the
        training weights are back when the interrupt reaches you, unless another average is in the model, too.

        Threads may lend at the same time. While one has lent this average, it is refused to the others. If several
        lend different averages to one model, the model shows the one that entered last, and its training weights
        return when the last has left. An update in one thread does not wait for a swap in another: order the two
        yourself.

        ``model.state_dict()`` refers to the model's own tensors: one that is taken here and saved after the block
        holds the training weights. To save the average, call ``averaged_state_dict(model)``, anywhere.

        Raises:
            RuntimeError: as for :meth:`swap_in`, when the block is entered.
        """
        stay = loan.Stay(self._storage)

        def enter() -> nn.Module:
            self._enter(model, stay)
            return model

        return Block(enter, stay.end)

    def refuse_on_loan(self, model: nn.Module) -> None:
        """Raises a RuntimeError while any average stands in ``model``, which this one follows.

        Call it before you write the training weights. It costs next to nothing while no model is on loan.
        """
        plan = self._follower.plan
        loan.refuse(unwrap(model), None if plan is None else plan.identities)

    @untraced
    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrites the tracked tensors of ``model`` with the average, for good. Other tensors stay.

        Each process writes its own shards. Where ``model`` is whole and the average is sharded, or shared in another
        way, the average is gathered tensor by tensor, in a collective call.

        A buffer that is copied, not averaged, stays as well if ``model`` has it in another shape, and any buffer that
        cannot be written, as one whose elements share memory.

        Raises:
            RuntimeError: ``model`` holds an average, this one or another.
            ValueError: ``model`` lacks a tracked name, has it in another shape, or in a form that cannot be written;
                nothing is written then.
        """
        module = unwrap(model)
        if inside := loan.borrowers(module):
            raise RuntimeError(
                f'this model holds an average over a stash of its training weights: {inside[-1]}. '
                'Call swap_out(model) first.'
            )
        live, parameters = Inventory.of(module).tensors(), self._storage.parameters
        refuse_placeholders(live)
        shadows = {
            name: shadow
            for name, shadow in self.lent_tensors().items()
            if name in parameters or self._has_place_for(name, shadow, live.get(name))
        }
        check_same(
            'the model given to copy_to',
            shadows,
            {name: live[name] for name in shadows if name in live},
            remedy='Pass the same architecture.',
        )
        if problem := loan.why_unwritable({name: (live[name], shadow) for name, shadow in parameters.items()}):
            raise ValueError(f'{problem}. {loan.MAKE_IT_WRITABLE}')
        # Parameters last: a buffer may be a view of one. In the order of the names, which is that of all ranks.
        for are_parameters in (False, True):
            names = [name for name in shadows if (name in parameters) is are_parameters]
            elsewhere = {name for name in names if must_be_gathered(shadows[name], live[name])}
            if here := [name for name in names if name not in elsewhere]:
                torch._foreach_copy_(*unzip(_copy_into(live[name], shadows[name]) for name in here))
            for name in filter(elsewhere.__contains__, names):  # one whole tensor at a time
                place, content = _copy_into(live[name], shadows[name])
                place.copy_(content)

    def lent_tensors(self) -> dict[str, Tensor]:
        """All shadows by canonical name, aliased; what a model shows while it holds the average."""
        self._follower.wait()
        return dict(self._storage.items())

    @untraced
    def training_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The tracked training weights, aliased: the stash while ``model`` holds an average, else the live tensors."""
        live = Inventory.of(unwrap(model)).tensors()
        tracked = {name: live[name].detach() for name, _ in self._storage.items() if name in live}
        return {**tracked, **self.stashed_weights(model), **(self._loaded_stash or {})}

    def stashed_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The tracked training weights that are stashed while ``model`` holds any average, aliased; else nothing."""
        stash = loan.training_weights(model)
        return {name: stash[name] for name, _ in self._storage.items() if name in stash}

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the average without the ties to a model; the copy stands in none."""
        self._follower.wait()  # the storage is copied before the follower
        return {**self.__dict__, '_loaded_stash': None}

    @untraced
    def _enter(self, model: nn.Module, stay: loan.Stay) -> None:
        if self.is_swapped:
            raise RuntimeError('the average is swapped in already. Call swap_out(model) first.')
        plan = self._follower.plan_for(unwrap(model))
        self._follower.wait()
        loan.enter(stay, model, plan.sources)

    def _has_place_for(self, name: str, shadow: Tensor, buffer: Tensor | None) -> bool:
        """Whether the shadow of a buffer can go into ``buffer``, or has to."""
        if buffer is not None and not can_be_kept(buffer):
            return False
        return self._storage.is_averaged(name) or (buffer is not None and are_alike(shadow, buffer))

    def _module(self) -> nn.Module | None:
        """The model in which this average stands."""
        return loan.module_of(self._storage)

    def _stash(self) -> dict[str, Tensor] | None:
        """The training weights of the model in which this average stands; None where it stands in none."""
        module = self._module()
        return self._loaded_stash if module is None else self.stashed_weights(module)

    def _refuse_while_swapped(self, what: str) -> None:
        """Raises a RuntimeError while this average stands in a model that is known."""
        if self._module() is not None:
            raise RuntimeError(f'the model holds the average. Call swap_out(model) before {what}.')


def _copy_into(target: Tensor, value: Tensor) -> Pair:
    """The copy of ``value`` into ``target`` in terms of what this process has in memory."""
    return resolved(local(target), local(laid_out_as(value, target)))
