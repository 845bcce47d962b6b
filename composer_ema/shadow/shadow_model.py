"""The averaged copy of a model, as users meet it: it updates, is lent to the model, is read, saved and loaded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import Unpack

from composer_ema import plain
from composer_ema.averages import check_share, weight_from_smoothing
from composer_ema.model.inventory import Inventory
from composer_ema.model.names import listed
from composer_ema.model.sharding import broadcast_, is_shard, laid_out_as, local, num_ranks, refuse_placeholders
from composer_ema.model.untraced import aside, is_traced, untraced
from composer_ema.model.wrappers import refuse_other_ranks, unwrap
from composer_ema.settings import Settings, ShadowSettings, takes_settings
from composer_ema.shadow import averaged_model, foreign, loan
from composer_ema.shadow import state as states
from composer_ema.shadow.beside import module_beside
from composer_ema.shadow.distance import relative_distance
from composer_ema.shadow.follower import Follower
from composer_ema.shadow.lendable import LendableAverage
from composer_ema.shadow.storage import Storage, check_buffer_patterns, check_renamed, check_tensors
from composer_ema.wording import shown


@takes_settings
class ShadowModel(LendableAverage):
    """Keeps a copy of a model's trainable parameters and buffers, and averages it towards the model.

    One update is, for each tracked tensor::

        shadow += (1 - smoothing) * (source - shadow)      # in the shadow's dtype

    Tracked are the parameters that require a gradient, each once however often it is tied, and the buffers. Running
    means and variances of normalisation layers are averaged, and other buffers are copied, unless ``buffers`` says
    otherwise; sparse buffers, and those whose elements share memory, stay whatever the model holds. Where an averaged
    buffer or its average is not finite, the element is copied. Frozen parameters cost no
    memory and stay whatever the model holds; one that is unfrozen joins, at its value, at the next update. A tracked
    parameter that is frozen later stays tracked.

    Several shadows may follow one model and take turns in it. The model's training weights are stashed once, and return
    when the last average has been swapped out; see :mod:`composer_ema.shadow.loan`.

    If FSDP2, HSDP or tensor parallelism shards the model, each rank keeps the average of its own shards. Updates and
    swaps send nothing. A rank may make them alone, except after a forward without a backward: FSDP2 then keeps the root
    gathered until an average reads it, and the next forward hangs unless that has happened on every rank.

    With ``shard_over_ranks``, each rank of DDP keeps a piece of the average. A rank may update its own piece alone.
    What needs the whole average is a collective call, which every rank must make: :meth:`swap_in`, :meth:`swapped`,
    :meth:`copy_to`, :meth:`averaged_state_dict`, :meth:`to_averaged_model` and :meth:`relative_distance`, and
    :meth:`swap_out` if another such average shows again. :func:`composer_ema.gather_state_dict` makes a state whole.

    Args:
        model: the model to follow; DDP, ``torch.compile`` and the like are looked through. Only read.
        overlap: on CUDA, run the update of the parameters on a side stream if it moves a gibibyte or more, and the
            arithmetic of an average on the host in a thread. If you set this, call :meth:`wait_for_reads` before you
            modify the parameters. A shorter update runs in line, in one launch with the buffers.
        settings: which tensors are kept and how: ``buffers``, ``include``, ``exclude``, ``dtype``, ``device``,
            ``skip_nonfinite``, ``rounding``, ``compensated``, ``shard_over_ranks``, ``seed``, ``backend``, ``avg_fn``,
            ``multi_avg_fn``; see :class:`composer_ema.settings.Settings`.

    Raises:
        NotImplementedError: a tensor is sharded by FSDP1 or DeepSpeed.
        RuntimeError: ``model`` holds an average.
        TypeError, ValueError: an argument out of range, one that has no effect, or a pattern that matches nothing.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> shadow = ShadowModel(model)
        >>> _ = nn.init.constant_(model.weight, 1.0)
        >>> shadow.update(model, smoothing=0.0)
        >>> _ = nn.init.constant_(model.weight, 3.0)
        >>> shadow.update(model, smoothing=0.75)
        >>> with shadow.swapped(model):
        ...     model.weight.item()
        1.5
        >>> model.weight.item()
        3.0
    """

    def __init__(self, model: nn.Module, *, overlap: bool = False, **settings: Unpack[ShadowSettings]) -> None:
        if is_traced():
            aside(ShadowModel.__init__, self, model, overlap=overlap, **settings)
            return
        storages = storages_of(model, 'ShadowModel(model)', Settings.of(settings), overlap=overlap)
        super().__init__(storages[0], Follower(storages, overlap=bool(overlap)))

    @classmethod
    def from_tensors(
        cls, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], /, **options: Any
    ) -> ShadowModel:
        """A shadow that starts from copies of named tensors, to follow a model with these names.

        Args:
            parameters: canonical name to tensor.
            buffers: likewise.
            options: as for the class.

        Raises:
            TypeError, ValueError: what is given is no mapping of names to dense tensors that hold values, or as for the
                class.
        """
        weights, others = check_tensors('parameters', parameters), check_tensors('buffers', buffers)
        if both := weights.keys() & others.keys():
            raise ValueError(f'parameters and buffers both have {listed(sorted(both))}. Pass each tensor once.')
        shadow = cls(nn.Module(), **options)
        storage = shadow._storage
        storage.parameters, storage.buffers = storage.copies_of(weights), storage.copies_of(others)
        storage.persistent = set(others)
        return shadow

    @classmethod
    def from_averaged_model(cls, averaged: AveragedModel, **options: Any) -> ShadowModel:
        """A shadow that goes on where torch's ``AveragedModel`` is; see :meth:`to_averaged_model` for the way back.

        All parameters are tracked, those that do not require a gradient too. ``n_averaged`` becomes ``num_updates``,
        an averaging function goes on, and buffers are averaged if ``use_buffers`` says so, else copied. Without a
        function, torch's average is the equal one: ``update(model, weight=Equal().weight_at(shadow.num_updates))``.

        Args:
            averaged: copied, not changed.
            options: as for the class; they win over what ``averaged`` says.

        Raises:
            TypeError: ``averaged`` is of another kind; :meth:`load_foreign` takes a state dict.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='no trainable parameter')  # frozen ones are tracked here, too
            shadow = cls(averaged_model.module_of(averaged), **averaged_model.settings_of(averaged, options))
        storage, parameters = shadow._storage, Inventory.of(unwrap(averaged)).parameters
        storage.parameters = storage.copies_of({n: p for n, p in parameters.items() if n in storage.selection})
        storage.num_updates = int(averaged.n_averaged)
        return shadow

    @property
    def copied_buffers(self) -> frozenset[str]:
        """The canonical names of the buffers that are copied from the model, not averaged."""
        return frozenset(name for name in self._storage.buffers if not self._storage.is_averaged(name))

    @property
    def num_updates(self) -> int:
        """Updates made so far. Set, it is a whole number of at least 0."""
        return self._storage.num_updates

    @num_updates.setter
    def num_updates(self, count: int) -> None:
        self._storage.num_updates = plain.whole('num_updates', count)

    @property
    def has_function(self) -> bool:
        """Whether ``avg_fn`` or ``multi_avg_fn`` makes the average."""
        return self._storage.settings.has_function

    @untraced
    def resolve(
        self,
        model: nn.Module,
        *,
        joining: bool = False,
        leaving: bool = False,
        renamed: Mapping[str, str] | None = None,
    ) -> None:
        """Pairs the shadow with ``model`` and moves it into its place now, not at the next update.

        If parameters leave the model in the middle of a run, or change their names, as when adapters are merged or a
        parametrization is added, tell the shadow so: an update refuses a model that lacks what it follows.

        Args:
            model: the model to follow.
            joining: whether tensors that are new, or trainable now, join at their value, as at an update. Default:
                False.
            leaving: whether to forget the averages of parameters that ``model`` no longer has, or has in another
                shape. Default: False.
            renamed: old canonical name of a parameter or buffer to its new one. Its average goes on under the new name.

        Raises:
            RuntimeError: something is to join, to leave or to be renamed while ``model`` holds an average, also one
                whose state was saved while swapped, and loaded. Nothing is changed.
            ValueError: ``model`` lacks a tracked parameter or has it in another shape, or ``renamed`` does not fit.
                Nothing is changed.

        Warns:
            UserWarning: no average is left of those that there were.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> shadow = ShadowModel(model)
            >>> _ = nn.utils.parametrizations.weight_norm(model)
            >>> shadow.resolve(model, joining=True, leaving=True, renamed={'bias': 'bias'})
            >>> sorted(name for name, _ in shadow.named_parameters())
            ['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1']
        """
        module, renamed = unwrap(model), check_renamed(renamed)
        joining, leaving = plain.flag('joining', joining), plain.flag('leaving', leaving)
        if leaving or renamed:
            self._refuse_new_names(module)
            self._follower.change_names(module, renamed, leaving=leaving, joining=joining)
        else:
            self._follower.forget_plan()
            self._follower.plan_for(module, joining=joining)

    def _refuse_new_names(self, module: nn.Module) -> None:
        """Raises a RuntimeError while ``module`` holds an average under the old names."""
        loan.refuse(module)
        self._refuse_while_swapped('names change')
        if self._loaded_stash is not None:
            raise RuntimeError(
                'the model holds the average of the loaded state, whose training weights go by the old names. Call '
                'swap_out(model) before names change.'
            )

    def leave_out(self, names: Collection[str]) -> None:
        """Forgets the averages of these names; those that the model still has join anew at the next update."""
        names = set(plain.names('names', names))
        self._follower.forget_plan()
        for kind in (self._storage.parameters, self._storage.buffers):
            for name in kind.keys() & names:
                del kind[name]

    @untraced
    def outline(self, model: nn.Module) -> ShadowModel:
        """A shadow without memory that tracks what this one will track once what is new in ``model`` has joined.

        Use it to try out whether a state will load.
        """
        storage = Storage(self._storage.settings.replace(device='meta'))
        storage.join(Inventory.of(unwrap(model)))
        for name, tensor in self._storage.parameters.items():
            storage.parameters.setdefault(name, tensor.to('meta'))
        outline = ShadowModel.__new__(ShadowModel)
        LendableAverage.__init__(outline, storage, Follower([storage]))
        return outline

    def update(self, model: nn.Module, smoothing: float | None = None, *, weight: float | None = None) -> None:
        """Moves the shadow towards ``model``. Runs on the current stream; with ``overlap``, a long update of
        parameters beside it.

        With ``avg_fn`` or ``multi_avg_fn`` give neither share: the function decides.

        Args:
            model: the model followed so far, or another of the same architecture. Only read.
            smoothing: share of the old average to keep, in [0, 1]: 0 copies, 1 freezes.
            weight: in place of ``smoothing``, the share ``1 - smoothing`` of the model, for when that is known better.

        Raises:
            RuntimeError: the model holds an average, this one or another; or the function raised.
            TypeError, ValueError: a share out of range, a tracked parameter that the model lacks, or a function that
                does not keep to its rules. Only what a ``multi_avg_fn`` has written by then has changed the average.
        """
        if is_traced():
            aside(ShadowModel.update, self, model, smoothing, weight=weight)
            return
        number = number_for(self._storage, smoothing, weight)
        if self.is_swapped:
            raise RuntimeError(
                'the model holds the average, so there is nothing to average. Call swap_out(model) first.'
            )
        self._follower.update(unwrap(model), (number,))

    def wait(self) -> None:
        """Orders the current stream after the last update; does nothing without overlap.

        The host waits only for an average that it keeps itself for a model on CUDA, until its thread is done.
        """
        if is_traced():
            aside(ShadowModel.wait, self)
            return
        self._follower.wait()

    def wait_for_reads(self) -> None:
        """Orders the current stream after the last update has read the parameters, which you may then write.

        This is :meth:`wait`, except that it does not wait for the last arithmetic of an average on the host.
        """
        if is_traced():
            aside(ShadowModel.wait_for_reads, self)
            return
        self._follower.wait_for_reads()

    @property
    def is_pending(self) -> bool:
        """Whether an update runs beside the current stream, and neither wait has been called since."""
        return self._follower.is_pending

    def poll_skipped(self) -> int:
        """How many elements ``skip_nonfinite`` has left alone so far. Never waits, so on CUDA a few updates old."""
        return self._follower.poll_skipped()

    @untraced
    @torch.no_grad()
    def averaged_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """The state dict that ``model`` would have with the average in it, to save or to load elsewhere.

        It has the names and order of ``model.state_dict()``, bare of outer wrappers, and the dtypes and devices of the
        model. Tracked tensors are the average; the others are those of training, also while an average stands in the
        model. All are copies, so later updates, steps and swaps do not change them, as they would change a state dict
        that was taken inside :meth:`swapped`.

        Under FSDP2 and tensor parallelism they are sharded as the model is, and nothing is gathered. For a whole model
        of the same architecture a sharded average is gathered, in a collective call.

        Args:
            model: the model followed, or another of its architecture. Only read.

        Raises:
            ValueError: ``model`` lacks a tracked parameter or has it in another shape, or its state dict leaves one
                out.

        Example:
            >>> model = nn.Linear(1, 1)
            >>> shadow = ShadowModel(model)
            >>> _ = nn.init.zeros_(model.weight)
            >>> shadow.update(model, smoothing=0.0)
            >>> saved = shadow.averaged_state_dict(model)
            >>> _ = nn.init.ones_(model.weight)
            >>> saved['weight'].item()
            0.0
        """
        module = unwrap(model)
        lent = self._follower.plan_for(module).sources
        self.wait()
        inventory = Inventory.of(module)
        live, stashed, storage = inventory.tensors(), loan.training_weights(module), self._storage
        names = {id(tensor): name for name, tensor in live.items()}
        expected = storage.parameters.keys() | (storage.buffers.keys() & inventory.persistent)
        saved = module.state_dict(keep_vars=True)  # with the metadata that load_state_dict reads
        for key, value in saved.items():
            if not isinstance(value, Tensor):  # extra state
                saved[key] = copy.deepcopy(value)
                continue
            name = names.get(id(value), '')
            expected.discard(name)
            average = storage.tensor(name) if name in lent else None
            kept = average if average is not None else stashed.get(name, value)
            if loan.obstacle(value, kept) is not None:  # a buffer that was replaced while an average stands in
                kept = value
            saved[key] = laid_out_as(kept.detach(), value).to(value.device, value.dtype, copy=True)
        if expected:
            raise ValueError(
                f"the model's state_dict() leaves out {listed(sorted(expected))}, or replaces what it holds, so the "
                'average has no place in it. Call state_dict() of the model inside swapped(model), and copy it there.'
            )
        return saved

    @untraced
    def to_averaged_model(self, model: nn.Module, **arguments: Any) -> AveragedModel:
        """The average as torch's ``AveragedModel``: a copy of ``model`` with the average in it, ``n_averaged`` kept.

        Args:
            model: of the architecture followed, in the dtype that the copy shall have. Only read.
            arguments: of ``AveragedModel``; default ``device``: that of ``model``. Without ``avg_fn`` and
                ``multi_avg_fn``, this shadow's function goes on; without ``use_buffers``, which is for all buffers,
                they are averaged if this shadow averages any.

        Raises:
            NotImplementedError: ``model`` is sharded by FSDP2, whose modules cannot be copied. Pass a whole one: then a
                sharded average is gathered, in a collective call.
            TypeError: an argument that ``AveragedModel`` does not take.
            ValueError: ``model`` lacks a tracked name or has it in another shape.

        Warns:
            UserWarning: ``model`` has a narrower dtype than the average, and digits are lost.
        """
        storage = self._storage
        use_buffers = any(map(storage.is_averaged, storage.buffers))
        averaged = averaged_model.copy_of(model, storage.settings, arguments, use_buffers=use_buffers)
        self.copy_to(averaged.module)
        averaged.n_averaged.fill_(self.num_updates)
        averaged_model.warn_of_lost_digits(averaged, self._storage.parameters)
        return averaged

    @untraced
    def module(self, model: nn.Module, *, copy: bool = False) -> nn.Module:
        """A module that computes with the average, in the memory of the average: a teacher, a reference, a sampler.

        It has the classes of ``model``, bare of outer wrappers, and is in evaluation mode. Its forward gives to the bit
        what that of ``model`` gives inside :meth:`swapped`, after each update anew, and ``model`` may train meanwhile.

        Parameters lie in the memory of the average, and those that are not averaged in the memory of the model. None
        wants a gradient; gradients with respect to inputs flow, and a backward that an update would have falsified
        raises. Buffers are copies, which the outermost forward brings up to date before it begins, so that a forward
        that writes them, as BatchNorm's does after ``train()``, changes neither the average nor the model. Hooks and
        other attributes are copied once, as ``copy.deepcopy`` copies them, tied weights stay tied.

        Updates, ``load_state_dict``, ``to``, and other tensors in the model are followed, without another call. If the
        model gets other modules or parameters, the next forward raises, and so it does after ``to()`` of the module.
        On CUDA a forward is ordered after the last update and before the next, on whichever stream it runs.

        Assigned to an attribute of the model, it is no part of what is averaged, nor of the model's ``state_dict``, but
        ``model.train()`` reaches it. Its own ``state_dict()`` is the average; ``load_state_dict`` is refused. A copy by
        ``copy.deepcopy`` or pickle is an ordinary module with the average of that moment.

        Args:
            model: the model followed. Only read, and not kept alive.
            copy: whether parameters that the model has in another dtype or on another device than the average are
                copies, which the first forward after each update brings up to date. Default: False, refuse them.

        Raises:
            NotImplementedError: ``model`` is sharded or has scripted modules, or ``shard_over_ranks`` is set.
            ValueError: ``model`` does not fit, or cannot be copied; or a parameter needs a copy.

        Example:
            >>> model = nn.Linear(1, 1, bias=False)
            >>> shadow = ShadowModel(model)
            >>> teacher = shadow.module(model)
            >>> _ = nn.init.constant_(model.weight, 3.0)
            >>> shadow.update(model, smoothing=0.0)
            >>> teacher(torch.ones(1)).item()
            3.0
        """
        return module_beside(
            unwrap(model), self._storage, self._follower, keeper=self, may_copy=plain.flag('copy', copy)
        )

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical name and shadow of each tracked parameter: n tensors, shapes equal to their sources, aliased."""
        self.wait()
        return iter(self._storage.parameters.items())

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical name and shadow of each buffer, aliased."""
        self.wait()
        return iter(self._storage.buffers.items())

    def parameters(self) -> Iterator[Tensor]:
        """The shadows of :meth:`named_parameters`."""
        return (tensor for _, tensor in self.named_parameters())

    def buffers(self) -> Iterator[Tensor]:
        """The shadows of :meth:`named_buffers`."""
        return (tensor for _, tensor in self.named_buffers())

    @untraced
    @torch.no_grad()
    def relative_distance(self, model: nn.Module) -> Tensor:
        """Norm of shadow minus training weights over norm of the training weights; a float64 scalar tensor.

        Over all tracked parameters; zero when both norms are zero. Takes memory for one tensor at a time.
        """
        self._follower.plan_for(unwrap(model))  # checks, and moves the shadow into its place
        self.wait()
        return relative_distance(self._storage.parameters, self.training_weights(model))

    def broadcast_buffers(self) -> None:
        """Gives every process rank 0's buffers. A collective call; does nothing with one process.

        Under DDP each process sees its own batches, so BatchNorm's statistics drift apart between two forwards.
        """
        buffers = self._storage.buffers
        terms = self._storage.compensations.among(buffers)
        broadcast_(kind[name] for kind in (buffers, terms) for name in sorted(kind))

    def __repr__(self) -> str:
        return repr(self._storage)

    @untraced
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None) -> ShadowModel:
        """Moves the shadow to a device, casts its floating tensors to a dtype, and stays there. Returns itself.

        Raises:
            ValueError: a device that this machine lacks or that holds no values, such as ``'meta'``, or no floating
                dtype. Nothing is changed.
        """
        changed = self._storage.settings.moved_to(device, dtype)
        self._follower.forget_plan()
        self._storage.convert(changed)
        return self

    @untraced
    def state_dict(self) -> dict[str, Any]:
        """The average as plain dictionaries of tensors, which alias the shadow: save or copy them before updating.

        ``training_weights`` is there only while this average stands in a model, and ``compensations``, the Kahan
        terms, only in the state of a compensated average. Buffers that the model itself does not save are left out.
        """
        self.wait()
        return states.of_storage(self._storage, self._stash())

    @untraced
    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned, in place and with the shadow's own dtypes and devices.

        All is checked first; after an error the shadow is as it was. A state taken while swapped leaves this shadow
        swapped: the model it belongs to holds the average, and ``swap_out(model)`` restores its training weights. Kahan
        terms are dropped unless this average is compensated too; where the state has none, they are zero.

        Raises:
            RuntimeError: the average is swapped into a model, whose stash may be older than what is loaded.
            TypeError: ``state`` is no dictionary.
            ValueError: another version, or names and shapes that do not fit, all listed.
        """
        loaded = self._checked(plain.mapping('state', state, 'Nothing was loaded. Pass what state_dict() returned.'))
        self._warn_of_lost_digits(loaded.parameters)
        self._assign(loaded)

    def _checked(self, state: Mapping[str, Any]) -> states.Loaded:
        """What a state holds, if it can be loaded; see :meth:`load_state_dict`. Nothing is changed."""
        self._refuse_while_swapped('a state is loaded')
        return states.check(state, self._storage)

    def _assign(self, loaded: states.Loaded) -> None:
        self._follower.forget_plan()
        own = {local(tensor).untyped_storage().data_ptr() for _, tensor in self._storage.items()}
        self._storage.assign(
            _apart(loaded.parameters, own, self._storage.parameters),
            _apart(loaded.buffers, own, self._storage.buffers),
            loaded.compensations,
        )
        self._storage.num_updates = loaded.num_updates
        if loaded.seed is not None:
            self._storage.settings = self._storage.settings.replace(seed=loaded.seed)
        self._loaded_stash = None if loaded.stash is None else {n: t.clone() for n, t in loaded.stash.items()}

    @untraced
    def load_foreign(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Loads the average that another library saved, which its keys tell; all is checked first.

        Read are the state dicts of torch's ``AveragedModel``, timm's ``ModelEmaV2`` and ``V3`` and the checkpoints of
        its ``CheckpointSaver``, diffusers' ``EMAModel``, ema-pytorch, torch-ema, and Lightning's checkpoints with
        ``WeightAveraging``, also one level below, as in ``{'model': ..., 'ema': ...}``. Buffers that the library does
        not average stay. ``num_updates`` becomes the library's count, 1 where it does not count.

        Args:
            state: what the library saved, loaded with ``weights_only=True``.
            model: the model followed. Its names, or the order of its parameters, tell which tensor is which. Only read.

        Raises:
            RuntimeError: the shadow is swapped into a model.
            ValueError: no known average, or names, number or shapes that do not fit, all listed. Nothing is changed.

        Example:
            >>> model = nn.Linear(1, 1)
            >>> averaged = AveragedModel(nn.Linear(1, 1))
            >>> shadow = ShadowModel(model)
            >>> shadow.load_foreign(averaged.state_dict(), model)
            >>> torch.equal(dict(shadow.named_parameters())['weight'], averaged.module.weight)
            True
        """
        if self.is_swapped:
            raise RuntimeError('the model holds the average. Call swap_out(model) before another average is loaded.')
        inventory = Inventory.of(unwrap(model))
        refuse_placeholders(inventory.tensors())
        found = foreign.read(state)
        tensors = foreign.fit(found, inventory)
        parameters, buffers = self._storage.parameters, self._storage.buffers
        self.load_state_dict(
            {
                'version': states.VERSION,
                'num_updates': 1 if found.num_updates is None else found.num_updates,
                'parameters': {name: tensors[name] for name in parameters if name in tensors},
                'buffers': {name: tensors.get(name, buffer) for name, buffer in buffers.items()},
            }
        )

    def _warn_of_lost_digits(self, loaded: Mapping[str, Tensor]) -> None:
        kept = self._storage.parameters
        narrowed = [name for name, tensor in loaded.items() if name in kept and _loses_digits(tensor, kept[name])]
        if narrowed and self._storage.settings.dtype is None:
            warnings.warn(
                f'the saved average is {loaded[narrowed[0]].dtype}, the shadow {kept[narrowed[0]].dtype}: '
                'digits are lost. Pass the dtype of the saved run.',
                stacklevel=5,
            )


def storages_of(model: nn.Module, call: str, settings: Settings, *, overlap: bool, count: int = 1) -> list[Storage]:
    """The tensors of ``count`` averages that start at the weights of ``model``.

    Args:
        model: to follow, wrapped or not. Only read.
        call: how to build the object whose averages these are, for an error.
        settings: which tensors are kept, and how.
        overlap: checked only.

    Raises:
        RuntimeError: ``model`` holds an average.
        TypeError, ValueError: as for :class:`ShadowModel`.
    """
    module = unwrap(model, call)
    plain.flag('overlap', overlap)
    if settings.shard_over_ranks:
        refuse_other_ranks(model)
    loan.refuse(module)  # the average would start from another one
    inventory = Inventory.of(module)
    refuse_placeholders(inventory.tensors())
    storages = [Storage(settings) for _ in range(count)]
    storages[0].selection.check([*inventory.parameters, *inventory.buffers])
    check_buffer_patterns(settings.buffer_patterns, inventory.buffers)
    for storage in storages:
        storage.join(inventory)
    if inventory.parameters and not storages[0].parameters:
        warnings.warn(
            'no trainable parameter to average yet: all selected ones are frozen. They join when unfrozen.',
            stacklevel=4,
        )
    if settings.shard_over_ranks and inventory.parameters:
        _warn_where_not_split(inventory)
    return storages


def _warn_where_not_split(inventory: Inventory) -> None:
    """Warns on behalf of the caller's caller's caller if ``shard_over_ranks`` cannot take effect."""
    if num_ranks() == 1:
        why = 'there is one process, which keeps the whole average. Start several, and initialise their group first.'
    elif all(map(is_shard, inventory.parameters.values())):
        why = 'the model is sharded, so each process keeps its own share of the average anyway. Leave it out.'
    else:
        return
    warnings.warn(f'shard_over_ranks=True has no effect: {why}', stacklevel=5)


def number_for(storage: Storage, smoothing: float | None, weight: float | None) -> float:
    """What an update of an average takes: its weight, or where a function makes it, the number of updates so far.

    Raises:
        TypeError, ValueError: not exactly one share where there is no function, one where there is, or out of range.
    """
    if storage.settings.has_function:
        if smoothing is not None or weight is not None:
            raise TypeError(
                f'the average follows a function of yours, so there is no share to give, got '
                f'smoothing={shown(smoothing)} and weight={shown(weight)}. Call update(model) alone, or build the '
                'shadow without the function.'
            )
        return storage.num_updates
    if (smoothing is None) == (weight is None):
        raise TypeError(
            f'pass either smoothing or weight, got smoothing={shown(smoothing)} and weight={shown(weight)}.'
        )
    if smoothing is not None:
        return weight_from_smoothing(smoothing)
    assert weight is not None
    return check_share('weight', weight, 'It is the share of the model in the new average.')


def _apart(loaded: Mapping[str, Tensor], own: set[int], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``loaded``, with copies of what lies in the memory ``own`` of the average, unless it is that very shadow."""
    return {
        name: tensor.clone()
        if tensor is not kept.get(name) and local(tensor).untyped_storage().data_ptr() in own
        else tensor
        for name, tensor in loaded.items()
    }


def _loses_digits(saved: Tensor, shadow: Tensor) -> bool:
    return torch.promote_types(saved.dtype, shadow.dtype) != shadow.dtype
