"""The averaged copy of a model: storage, update, swap and state.

Invariants: the shadow holds the average at all times; a swap copies and never exchanges; after the first update on an
unchanged model an update walks no module, allocates nothing and never makes the host wait.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import Unpack

from composer_ema import kernels
from composer_ema.averages import check_share, weight_from_smoothing
from composer_ema.kernels.layout import Pair, side_by_side, unzip
from composer_ema.kernels.rules import is_inexact, smallest_weight
from composer_ema.model.inventory import Inventory
from composer_ema.model.names import check_same
from composer_ema.model.selection import Selection
from composer_ema.model.sharding import broadcast_, unwrap
from composer_ema.model.watch import Watch
from composer_ema.settings import Settings, ShadowSettings, check_seed, parse_device, parse_dtype, takes_settings
from composer_ema.shadow import foreign, function, offload
from composer_ema.shadow.counter import DeviceCounter
from composer_ema.shadow.offload import HostAverage
from composer_ema.shadow.plan import Plan
from composer_ema.shadow.stream import SideStream

log = logging.getLogger(__name__)

#: Version of the state that :meth:`ShadowModel.state_dict` writes.
STATE_VERSION = 1

_RESUME_REMEDY = (
    'Nothing was loaded. Build the same model with the same include, exclude and frozen parameters, '
    "or start a new average; a Composer Trainer does with load_ignore_keys=['state/algorithms']."
)


@takes_settings
class ShadowModel:
    """Keeps a copy of a model's trainable parameters and buffers, and averages it towards the model.

    One update is, for each tracked tensor::

        shadow += (1 - smoothing) * (source - shadow)      # in the shadow's dtype

    Tracked are the parameters that require a gradient, each once however often it is tied, and the buffers. Floating
    buffers are averaged or copied as ``buffers`` says; integer and boolean ones are copied. Frozen parameters cost no
    memory and stay whatever the model holds; one that is unfrozen joins, at its value, at the next update. A tracked
    parameter that is frozen later stays tracked.

    Args:
        model: the model to follow; DDP, ``torch.compile`` and the like are looked through. Only read.
        overlap: on CUDA, run the update of the parameters on a side stream, and the arithmetic of an average on the
            host in a thread. Whoever sets it calls :meth:`wait_for_reads` before the parameters are written again.
        settings: which tensors are kept and how: ``buffers``, ``include``, ``exclude``, ``dtype``, ``device``,
            ``skip_nonfinite``, ``rounding``, ``seed``, ``backend``, ``avg_fn``, ``multi_avg_fn``; see
            :class:`composer_ema.settings.Settings`.

    Raises:
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

    def __init__(
        self,
        model: nn.Module,
        *,
        overlap: bool = False,
        **settings: Unpack[ShadowSettings],
    ) -> None:
        self._settings = Settings.of(settings)
        self._selection = Selection(self._settings.included, self._settings.excluded)
        self._overlap = overlap

        self.num_updates = 0
        self._has_warned = False
        self._parameters: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._stash: dict[str, Tensor] | None = None
        self._swapped_model: weakref.ref[nn.Module] | None = None
        self._streams: dict[torch.device, SideStream] = {}
        self._skipped: dict[torch.device, DeviceCounter] = {}
        self._plan: Plan | None = None

        inventory = Inventory.of(unwrap(model))
        self._selection.check([*inventory.parameters, *inventory.buffers])
        self._join(inventory)

    @classmethod
    def from_tensors(
        cls, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], /, **options: Any
    ) -> ShadowModel:
        """A shadow that starts from copies of named tensors, to follow a model with these names.

        Args:
            parameters: canonical name to tensor.
            buffers: likewise.
            options: as for the class.
        """
        shadow = cls(nn.Module(), **options)
        shadow._parameters, shadow._buffers = shadow._new_shadows(parameters), shadow._new_shadows(buffers)
        shadow._persistent = set(buffers)
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
        if not isinstance(averaged, AveragedModel):
            raise TypeError(
                f"averaged must be torch's AveragedModel, got {type(averaged).__name__}. "
                'load_foreign takes a state dict.'
            )
        kept: dict[str, Any] = {'buffers': 'average' if averaged.use_buffers else 'copy'}
        if not options.keys() & {'avg_fn', 'multi_avg_fn'}:
            kept |= {'avg_fn': averaged.avg_fn, 'multi_avg_fn': averaged.multi_avg_fn}
        shadow = cls(averaged.module, **{**kept, **options})
        parameters = Inventory.of(unwrap(averaged)).parameters
        shadow._parameters = shadow._new_shadows({n: p for n, p in parameters.items() if n in shadow._selection})
        shadow.num_updates = int(averaged.n_averaged)
        return shadow

    def resolve(self, model: nn.Module) -> None:
        """Pairs the shadow with ``model`` and puts it in its place now, rather than at the next update.

        Raises:
            ValueError: ``model`` lacks a tracked parameter, or has it in another shape.
        """
        self._forget_plan()
        self._plan_for(model)

    # Updating

    def update(self, model: nn.Module, smoothing: float | None = None, *, weight: float | None = None) -> None:
        """Moves the shadow towards ``model``. Runs on the current stream, parameters beside it with ``overlap``.

        Args:
            model: the model followed so far, or another of the same architecture. Only read.
            smoothing: share of the old average to keep, in [0, 1]: 0 copies, 1 freezes.
            weight: instead of ``smoothing``, the share ``1 - smoothing`` of the model, for when that is known better.

        With ``avg_fn`` or ``multi_avg_fn`` neither is given: the function decides.

        Raises:
            RuntimeError: the shadow is swapped into a model, or the function raised.
            TypeError, ValueError: a share out of range, a tracked parameter that the model lacks, or a function that
                does not keep to its rules. Only what a ``multi_avg_fn`` has written by then has changed the average.
        """
        if self.has_function:
            if smoothing is not None or weight is not None:
                raise TypeError(
                    f'the average follows a function of yours, so there is no share to give, got smoothing={smoothing} '
                    f'and weight={weight}. Call update(model) alone, or build the shadow without the function.'
                )
            self._update_by_function(model)
            return
        if (smoothing is None) == (weight is None):
            raise TypeError(f'pass either smoothing or weight, got smoothing={smoothing} and weight={weight}.')
        if smoothing is not None:
            weight = weight_from_smoothing(smoothing)
        assert weight is not None
        check_share('weight', weight, 'It is the share of the model in the new average.')
        self._refuse_while_swapped()
        plan = self._plan_for(model, joining=True)
        if 0 < weight < plan.smallest_weight and not self._has_warned:
            self._warn_of_rounding(weight)
        for host_average in plan.host_averages:
            host_average.update(weight)  # waited for as the forks are
        weights = (weight,)
        for stream, average in plan.forked_steps:
            with stream.fork():  # joined by wait_for_reads(), and by wait(), which every read below calls
                average(weights)
        for average in plan.steps:
            average(weights)
        self.num_updates += 1

    @property
    def has_function(self) -> bool:
        """Whether ``avg_fn`` or ``multi_avg_fn`` makes the average."""
        return self._settings.has_function

    def _update_by_function(self, model: nn.Module) -> None:
        self._refuse_while_swapped()
        plan = self._plan_for(model, joining=True)
        forked_writes = []
        for stream, compute in plan.forked_steps:
            with stream.fork():  # joined by wait(), as in update()
                forked_writes.append(compute(self.num_updates))
        writes = [compute(self.num_updates) for compute in plan.steps]
        for (stream, _), write in zip(plan.forked_steps, forked_writes, strict=True):
            with stream.fork():
                write()
        for write in writes:
            write()
        self.num_updates += 1

    def _refuse_while_swapped(self) -> None:
        if self.is_swapped:
            raise RuntimeError(
                'the model holds the average, so there is nothing to average. Call swap_out(model) first.'
            )

    def _warn_of_rounding(self, weight: float) -> None:
        self._has_warned = True
        dtypes = '/'.join(sorted({str(t.dtype).removeprefix('torch.') for t in self._parameters.values()}))
        warnings.warn(
            f'an update of weight {weight:.2g} is mostly rounded away in an average kept in {dtypes}. '
            "Keep it in a wider dtype, update less often, or round bfloat16 with rounding='stochastic'.",
            stacklevel=3,
        )

    def wait(self) -> None:
        """Orders the current stream after the last update; does nothing without overlap.

        The host is blocked only by an average that it keeps itself for a model on CUDA, until its thread is done.
        """
        for stream in self._streams.values():
            stream.join()
        for host_average in self._host_averages():
            host_average.wait()

    def wait_for_reads(self) -> None:
        """Orders the current stream after the last update has read the parameters, which may be written then.

        :meth:`wait` but for an average on the host, whose last arithmetic it does not wait for.
        """
        for stream in self._streams.values():
            stream.join()
        for host_average in self._host_averages():
            host_average.wait_for_reads()

    @property
    def is_pending(self) -> bool:
        """Whether an update runs beside the current stream, and neither of the two has been called since."""
        return any(stream.is_pending for stream in self._streams.values()) or any(
            host_average.is_reading for host_average in self._host_averages()
        )

    def _host_averages(self) -> Sequence[HostAverage]:
        return () if self._plan is None else self._plan.host_averages

    def poll_skipped(self) -> int:
        """How many elements ``skip_nonfinite`` has left alone so far. Never waits, so on CUDA a few updates old."""
        return sum(counter.poll() for counter in self._skipped.values())

    # Swapping

    @property
    def is_swapped(self) -> bool:
        """Whether a model holds the average while its training weights are stashed here."""
        return self._stash is not None

    def is_swapped_into(self, model: nn.Module) -> bool:
        """Whether it is ``model`` that holds the average; after loading a state saved while swapped, any model may."""
        return self.is_swapped and (self._swapped_model is None or self._swapped_model() is unwrap(model))

    @torch.no_grad()
    def swap_in(self, model: nn.Module) -> None:
        """Stashes the tracked weights of ``model`` and copies the average into it, in place.

        Raises:
            RuntimeError: swapped in already.
        """
        if self.is_swapped:
            raise RuntimeError('the average is swapped in already. Call swap_out(model) first.')
        plan = self._plan_for(model)
        self.wait()
        # Whole-number buffers stay: they are copies of the model's own, and counters that a forward counts up go on.
        live = {name: source for name, source in plan.sources.items() if is_inexact(source)}
        stash = {name: source.detach().clone() for name, source in live.items()}
        try:
            _overwrite(live.values(), [self._tensor(name) for name in live])
        except BaseException:
            _overwrite(live.values(), stash.values())
            raise
        self._stash, self._swapped_model = stash, weakref.ref(unwrap(model))

    @torch.no_grad()
    def swap_out(self, model: nn.Module) -> None:
        """Restores every bit of the training weights that :meth:`swap_in` stashed.

        A buffer that the model meanwhile replaced by one of another shape, as caches do, keeps its new value.

        Raises:
            RuntimeError: nothing is swapped in, or the average is in another model.
        """
        if self._stash is None:
            raise RuntimeError('nothing is swapped in. Call swap_in(model) first.')
        module = unwrap(model)
        if self._swapped_model is not None and self._swapped_model() is not module:
            raise RuntimeError('the average is swapped into another model. Pass that one to swap_out.')
        inventory = Inventory.of(module)
        live = inventory.tensors()
        gone = sorted(name for name in self._stash if name not in live and name in self._parameters)
        if gone:
            raise RuntimeError(
                f'the model has lost {gone[0]} and {len(gone) - 1} more parameters since it was swapped in.'
            )
        names = [name for name, kept in self._stash.items() if name in live and live[name].shape == kept.shape]
        _overwrite([live[name] for name in names], [self._stash[name] for name in names])
        self._stash = self._swapped_model = None

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[nn.Module]:
        """Lends ``model`` with the average in it, and restores the training weights whatever happens."""
        self.swap_in(model)
        try:
            yield model
        finally:
            if self.is_swapped:
                self.swap_out(model)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrites the tracked tensors of ``model`` with the average, for good. Other tensors stay.

        Raises:
            RuntimeError: the average is swapped into this very model.
            ValueError: ``model`` lacks a tracked name or has it in another shape; nothing is written then.
        """
        module = unwrap(model)
        if self._swapped_model is not None and self._swapped_model() is module:
            raise RuntimeError('this model holds the average already, over a stash. Call swap_out(model) first.')
        live = Inventory.of(module).tensors()
        shadows = {**self._parameters, **self._buffers}
        check_same(
            'the model given to copy_to',
            shadows,
            {n: live[n] for n in shadows if n in live},
            remedy='Pass the same architecture.',
        )
        self.wait()
        torch._foreach_copy_([live[name] for name in shadows], list(shadows.values()))

    def to_averaged_model(self, model: nn.Module, **arguments: Any) -> AveragedModel:
        """The average as torch's ``AveragedModel``: a copy of ``model`` with the average in it, ``n_averaged`` kept.

        Args:
            model: of the architecture followed, in the dtype that the copy shall have. Only read.
            arguments: of ``AveragedModel``; default ``device``: that of ``model``. Without ``avg_fn`` and
                ``multi_avg_fn``, this shadow's function goes on; without ``use_buffers``, buffers are averaged if this
                shadow averages them.

        Raises:
            ValueError: ``model`` lacks a tracked name or has it in another shape.

        Warns:
            ``model`` has a narrower dtype than the average, and digits are lost.
        """
        kept: dict[str, Any] = {'use_buffers': self._settings.buffers == 'average'}
        if not arguments.keys() & {'avg_fn', 'multi_avg_fn'}:
            kept |= {'avg_fn': self._settings.avg_fn, 'multi_avg_fn': self._settings.multi_avg_fn}
        averaged = AveragedModel(unwrap(model), **{**kept, **arguments})
        self.copy_to(averaged.module)
        averaged.n_averaged.fill_(self.num_updates)
        held = Inventory.of(unwrap(averaged)).tensors()
        narrowed = [name for name, kept in self._parameters.items() if not torch.equal(held[name].to(kept), kept)]
        if narrowed:
            warnings.warn(
                f'the average is {self._parameters[narrowed[0]].dtype}, the model {held[narrowed[0]].dtype}: '
                'digits are lost. Pass the model in the wider dtype, for example copy.deepcopy(model).float().',
                stacklevel=2,
            )
        return averaged

    # Reading

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical name and shadow of each tracked parameter: n tensors, shapes equal to their sources, aliased."""
        self.wait()
        return iter(self._parameters.items())

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical name and shadow of each buffer, aliased."""
        self.wait()
        return iter(self._buffers.items())

    def parameters(self) -> Iterator[Tensor]:
        """The shadows of :meth:`named_parameters`."""
        return (tensor for _, tensor in self.named_parameters())

    def buffers(self) -> Iterator[Tensor]:
        """The shadows of :meth:`named_buffers`."""
        return (tensor for _, tensor in self.named_buffers())

    def training_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The tracked training weights: the stash while swapped, else the live tensors of ``model``, aliased."""
        live = Inventory.of(unwrap(model)).tensors()
        tracked = {name: live[name].detach() for name in (*self._parameters, *self._buffers) if name in live}
        return {**tracked, **(self._stash or {})}

    @torch.no_grad()
    def relative_distance(self, model: nn.Module) -> Tensor:
        """Norm of shadow minus weights over norm of weights, of all tracked parameters; a float64 scalar tensor.

        Zero when both norms are zero. Takes memory for one tensor at a time.
        """
        plan = self._plan_for(model)
        self.wait()
        differences, weights = [], []
        for name, shadow in self._parameters.items():
            source = plan.sources[name].detach().to(shadow.device, shadow.dtype)
            differences.append(_norm(shadow - source))
            weights.append(_norm(source))
        if not weights:
            return torch.zeros((), dtype=torch.float64)
        distance, size = _norm(_gather(differences)), _norm(_gather(weights))
        return torch.where(distance == 0, distance, distance / size)

    def broadcast_buffers(self) -> None:
        """Gives every process rank 0's buffers. A collective call; does nothing with one process.

        Under DDP each process sees its own batches, so BatchNorm's statistics drift apart between two forwards.
        """
        broadcast_(self._buffers[name] for name in sorted(self._buffers))

    def __repr__(self) -> str:
        count = sum(tensor.numel() for tensor in self._parameters.values())
        size = sum(t.numel() * t.element_size() for t in (*self._parameters.values(), *self._buffers.values()))
        dtypes = sorted({str(t.dtype).removeprefix('torch.') for t in self._parameters.values()})
        devices = sorted({str(t.device) for t in self._parameters.values()})
        return (
            f'ShadowModel({len(self._parameters)} parameters of {count:,} elements, {len(self._buffers)} buffers, '
            f'{size / 2**20:,.1f} MiB, {"/".join(dtypes)} on {"/".join(devices)}, {self.num_updates} updates)'
        )

    # Moving and saving

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None) -> ShadowModel:
        """Moves the shadow to a device, casts its floating tensors to a dtype, and stays there. Returns itself."""
        self._settings = self._settings.replace(
            device=parse_device(device) or self._settings.device, dtype=parse_dtype(dtype) or self._settings.dtype
        )
        self._forget_plan()
        for tensors in (self._parameters, self._buffers):
            for name, tensor in tensors.items():
                tensors[name] = tensor.to(self._settings.device or tensor.device, self._dtype_for(tensor))
        return self

    def state_dict(self) -> dict[str, Any]:
        """The average as plain dictionaries of tensors, which alias the shadow: save or copy them before updating.

        ``training_weights`` is there only while swapped. Buffers that the model itself does not save are left out.
        """
        self.wait()
        state: dict[str, Any] = {
            'version': STATE_VERSION,
            'num_updates': self.num_updates,
            'seed': self._settings.seed,
            'parameters': dict(self._parameters),
            'buffers': {name: self._buffers[name] for name in self._buffers if name in self._persistent},
            'aliases': dict(self._aliases),
        }
        if self._stash is not None:
            state['training_weights'] = {name: t for name, t in self._stash.items() if name not in self._volatile()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned, in place and with the shadow's own dtypes and devices.

        All is checked first; after an error the shadow is as it was. A state taken while swapped leaves this shadow
        swapped: the model it belongs to holds the average, and ``swap_out(model)`` restores its training weights.

        Raises:
            ValueError: another version, or names and shapes that do not fit, all listed.
        """
        parameters, buffers, stash = self._checked(state)
        self.wait()
        if self._settings.dtype is None:
            narrowed = [
                n for n, t in parameters.items() if n in self._parameters and _loses_digits(t, self._parameters[n])
            ]
            if narrowed:
                warnings.warn(
                    f'the saved average is {parameters[narrowed[0]].dtype}, the shadow '
                    f'{self._parameters[narrowed[0]].dtype}: digits are lost. Pass the dtype of the saved run.',
                    stacklevel=2,
                )
        self._forget_plan()
        for shadows, loaded in ((self._parameters, parameters), (self._buffers, buffers)):
            for name, tensor in loaded.items():
                if name in shadows:
                    shadows[name].copy_(tensor)
            # Frozen here, trainable in the saved run.
            shadows |= self._new_shadows({name: tensor for name, tensor in loaded.items() if name not in shadows})
        self.num_updates = state['num_updates']
        self._settings = self._settings.replace(seed=state.get('seed', self._settings.seed))
        self._stash = None if stash is None else {name: tensor.clone() for name, tensor in stash.items()}
        self._swapped_model = None

    def load_foreign(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Loads the average that another library saved, told by its keys; all is checked first.

        Read are the state dicts of torch's ``AveragedModel``, timm's ``ModelEmaV2`` and ``V3`` and the checkpoints of
        its ``CheckpointSaver``, diffusers' ``EMAModel``, ema-pytorch, torch-ema, and Lightning's checkpoints with
        ``WeightAveraging``, also one level below, as in ``{'model': ..., 'ema': ...}``. Buffers that the library does
        not average stay. ``num_updates`` becomes the library's count, 1 where it does not count.

        Args:
            state: what the library saved, loaded with ``weights_only=True``.
            model: the model followed, by whose names, or order of parameters, the average is told. Only read.

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
        found = foreign.read(state)
        tensors = foreign.fit(found, Inventory.of(unwrap(model)))
        self.load_state_dict(
            {
                'version': STATE_VERSION,
                'num_updates': 1 if found.num_updates is None else found.num_updates,
                'parameters': {name: tensors[name] for name in self._parameters if name in tensors},
                'buffers': {name: tensors.get(name, buffer) for name, buffer in self._buffers.items()},
            }
        )

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the average without the ties to a model; the copy is not swapped into any."""
        self.wait()
        return {**self.__dict__, '_plan': None, '_streams': {}, '_skipped': {}, '_stash': None, '_swapped_model': None}

    # Helpers, in call order

    def _join(self, inventory: Inventory) -> None:
        """Lets trainable parameters and buffers that are not tracked yet, or have a new shape, join at their value."""
        self._parameters |= self._new_shadows({
            name: parameter
            for name, parameter in inventory.parameters.items()
            if name not in self._parameters and parameter.requires_grad and name in self._selection
        })  # fmt: skip
        self._buffers |= self._new_shadows({
            name: buffer
            for name, buffer in inventory.buffers.items()
            if name in self._selection
            and not (name in self._buffers and self._buffers[name].shape == buffer.shape)
            and not _overlaps_itself(buffer)
        })  # fmt: skip
        self._shapes = {name: torch.empty_like(t, device='meta') for name, t in inventory.parameters.items()}
        self._persistent, self._aliases = inventory.persistent, inventory.aliases

    def _new_shadows(self, sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.inference_mode(False):
            shadows = [
                source.detach().to(self._settings.device or source.device, self._dtype_for(source), copy=True)
                for source in sources.values()
            ]
            return dict(zip(sources, side_by_side(shadows), strict=True))

    def _dtype_for(self, source: Tensor) -> torch.dtype:
        if not source.is_floating_point():
            return source.dtype
        return self._settings.dtype or (torch.float32 if source.element_size() < 4 else source.dtype)

    def _tensor(self, name: str) -> Tensor:
        return self._parameters[name] if name in self._parameters else self._buffers[name]

    def _volatile(self) -> set[str]:
        return self._buffers.keys() - self._persistent

    def _plan_for(self, model: nn.Module, *, joining: bool = False) -> Plan:
        """The plan for ``model``, made anew where that has changed. Only an update lets new tensors join."""
        module = unwrap(model)
        plan = self._plan
        if plan is None or (joining and not plan.has_joined) or not plan.watch.is_current(module):
            self._forget_plan()
            plan = self._plan = self._new_plan(module, joining)
        return plan

    def _new_plan(self, module: nn.Module, joining: bool) -> Plan:
        inventory = Inventory.of(module)
        check_same(
            'what the average follows',
            self._parameters,
            {name: p for name, p in inventory.parameters.items() if name in self._parameters},
            remedy='The average follows the architecture that it was built with; build a new one for another.',
        )
        if joining:
            self._join(inventory)
        parameters = self._paired(self._parameters, inventory.parameters)
        buffers = self._paired(self._buffers, inventory.buffers)
        for tensor, _ in (*parameters.values(), *buffers.values()):
            if tensor.device not in self._streams:
                self._streams[tensor.device] = SideStream(tensor.device, overlap=self._overlap)
                self._skipped[tensor.device] = DeviceCounter(tensor.device)
        averaged = [pair for pair in buffers.values() if self._is_averaged(pair[0])]
        copied = [pair for pair in buffers.values() if not self._is_averaged(pair[0])]
        addressed = self._addressed([*parameters.values(), *averaged], copied)
        watch = Watch(module, inventory, on_gone=_weakly(self._forget_plan), addressed=addressed)
        smallest = (
            0.0
            if self._settings.rounding == 'stochastic' or self.has_function
            else smallest_weight(self._parameters.values())
        )
        return Plan(
            watch,
            joining,
            {name: source for name, (_, source) in (*parameters.items(), *buffers.items())},
            [list(parameters.values()), averaged, copied],
            self._streams,
            self._prepare,
            self._is_left_to_a_thread,
            smallest,
            # A function is called for parameters and for buffers, and random bits are counted for each.
            may_share=not self.has_function and self._settings.rounding == 'nearest',
        )

    def _addressed(self, averaged: Sequence[Pair], copied: Sequence[Pair]) -> list[Tensor]:
        """The sources whose memory an update reads where it was; at least one, since a model moves as a whole."""
        rules = kernels.Rules(
            skip_nonfinite=self._settings.skip_nonfinite, stochastic=self._settings.rounding == 'stochastic'
        )
        addressed = [
            source
            for shadow, source in averaged
            if self.has_function or kernels.keeps_address(shadow, source, backend=self._settings.backend, rules=rules)
        ]
        return [*addressed, *(source for _, source in copied)] or [source for _, source in averaged[:1]]

    def _is_averaged(self, buffer: Tensor) -> bool:
        return self._settings.buffers == 'average' and is_inexact(buffer)

    def _is_left_to_a_thread(self, pair: Pair) -> bool:
        has_rules = (
            self._settings.skip_nonfinite or self._settings.rounding == 'stochastic' or self._settings.backend != 'auto'
        )
        return self._overlap and not has_rules and not self.has_function and offload.can_take(*pair)

    def _prepare(self, averaged: Sequence[Pair], copied: Sequence[Pair]) -> Callable[[Any], Any]:
        """Prepares an update of pairs on one device: a step by weights, or with a function by ``num_updates``."""
        shadows, sources = unzip(averaged)
        if self.has_function:
            return function.prepare(
                shadows, sources, copied, avg_fn=self._settings.avg_fn, multi_avg_fn=self._settings.multi_avg_fn
            )
        device = (*averaged, *copied)[0][0].device
        rules = kernels.Rules(
            skip_nonfinite=self._settings.skip_nonfinite,
            stochastic=self._settings.rounding == 'stochastic',
            seed=self._settings.seed,
            first_step=self.num_updates,
            skipped=self._skipped[device].value,
        )
        if averaged and log.isEnabledFor(logging.INFO):
            log.info('averaging %s', kernels.describe([shadows], sources, backend=self._settings.backend, rules=rules))
        return kernels.prepare([shadows], sources, copied=copied, backend=self._settings.backend, rules=rules)

    def _paired(self, shadows: dict[str, Tensor], sources: Mapping[str, Tensor]) -> dict[str, Pair]:
        """Shadows, moved to where they belong, beside their sources of the same shape."""
        pairs = {}
        for name, shadow in shadows.items():
            source = sources.get(name)
            if source is not None and source.shape == shadow.shape:
                shadows[name] = shadow.to(self._settings.device or source.device)
                pairs[name] = (shadows[name], source)
        return pairs

    def _forget_plan(self) -> None:
        self.wait()
        self._plan = None

    def _checked(
        self, state: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor] | None]:
        version = state.get('version') if isinstance(state, Mapping) else None
        if type(version) is not int or version != STATE_VERSION:
            raise ValueError(
                f'the state has format version {version!r}, this release reads {STATE_VERSION}. Nothing was loaded.'
            )
        for key, kind in (('num_updates', int), ('parameters', Mapping), ('buffers', Mapping)):
            if not isinstance(value := state.get(key), kind) or isinstance(value, bool):
                raise ValueError(
                    f"the state's {key!r} is a {type(value).__name__}, not a {kind.__name__}. Nothing was loaded."
                )
        try:
            check_seed(state.get('seed', self._settings.seed))
        except ValueError as error:
            raise ValueError(f'{error} Nothing was loaded.') from error
        if state['num_updates'] < 0:
            raise ValueError(f"the state's num_updates is {state['num_updates']}, below zero. Nothing was loaded.")
        frozen = {
            name: shape
            for name, shape in self._shapes.items()
            if name not in self._parameters and name in self._selection
        }
        check_same(
            'the saved average',
            {**frozen, **self._parameters},
            state['parameters'],
            optional=frozen,
            remedy=_RESUME_REMEDY,
        )
        check_same(
            "the saved average's buffers",
            self._buffers,
            state['buffers'],
            optional=self._volatile(),
            remedy=_RESUME_REMEDY,
        )
        stash = state.get('training_weights')
        if stash is not None:
            if not isinstance(stash, Mapping):
                raise ValueError(f"the state's 'training_weights' is a {type(stash).__name__}. Nothing was loaded.")
            tracked = {**{n: self._shapes[n] for n in state['parameters']}, **self._buffers}
            whole = {name for name, buffer in self._buffers.items() if not is_inexact(buffer)}
            check_same(
                'the saved training weights', tracked, stash, optional=self._volatile() | whole, remedy=_RESUME_REMEDY
            )
        for name, tensor in (*state['parameters'].items(), *state['buffers'].items(), *(stash or {}).items()):
            if tensor.is_meta or tensor.layout is not torch.strided:
                kind = 'on the meta device' if tensor.is_meta else f'stored as {tensor.layout}'
                raise ValueError(f'{name} in the state is {kind}, not a dense tensor. Nothing was loaded.')
        return dict(state['parameters']), dict(state['buffers']), None if stash is None else dict(stash)


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """Calls a bound method as long as its object lives, without keeping it alive."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        living = reference()
        if living is not None:
            living()

    return call


def _overwrite(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Copies in place unseen by autograd: a swap restores every bit, so a graph that waits for backward stays valid."""
    torch._foreach_copy_([tensor.data for tensor in tensors], list(values))


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements share memory, as after ``expand``: such a buffer cannot be written, so it never changes."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.complex128 if tensor.is_complex() else torch.float64)


def _gather(norms: list[Tensor]) -> Tensor:
    return torch.stack([norm.to(norms[0].device) for norm in norms])


def _loses_digits(saved: Tensor, shadow: Tensor) -> bool:
    return torch.promote_types(saved.dtype, shadow.dtype) != shadow.dtype
