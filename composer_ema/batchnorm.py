"""BatchNorm's running statistics for the weights that a model holds now, or for an average of them.

Invariant: nothing else changes. Weights, training flags, momenta, random numbers, all other buffers and what the code
of the modules keeps in Python are as they were, also after an error; then the statistics are, too.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import random
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader

from composer_ema import plain
from composer_ema.model.inventory import Inventory, is_normalisation
from composer_ema.model.names import listed
from composer_ema.model.rollback import Rollback, rewinding
from composer_ema.model.sharding import (
    is_shard,
    is_sharded,
    num_ranks,
    on_compute_device,
    rank,
    refuse_placeholders,
    reshard,
)
from composer_ema.model.untraced import untraced
from composer_ema.model.wrappers import canonical_name, unwrap
from composer_ema.settings import check_device_is_here
from composer_ema.shadow import loan
from composer_ema.shadow.shadow_model import ShadowModel
from composer_ema.wording import shown

if TYPE_CHECKING:  # this module works without Composer
    from composer.core import DataSpec

Forward = Callable[[nn.Module, Any], Any]
log = logging.getLogger(__name__)


@untraced
def update_bn(
    model: nn.Module,
    dataloader: Iterable[Any] | DataSpec,
    device: torch.device | str | int | None = None,
    *,
    shadow: ShadowModel | None = None,
    forward: Forward | None = None,
    num_batches: int | None = None,
    microbatch_size: float | None = None,
    synchronize: bool = True,
    progress_bar: bool = True,
) -> None:
    r"""Recomputes the running statistics of every BatchNorm layer, for the weights of ``model`` or of ``shadow``.

    Averaged weights give other activations than the weights that they were averaged from, so the statistics gathered
    in training fit them badly. One pass over ``dataloader`` gathers those that fit, each batch with the same share, to
    the bit as :func:`torch.optim.swa_utils.update_bn` does::

        running_mean = sum_i mean(batch_i) / n        running_var = sum_i var(batch_i) / n      # var: unbiased

    With several processes, each with its own share of the data, all end with the statistics of one process that saw
    the n_1 + n_2 + ... batches of all::

        running_mean = sum_r n_r running_mean_r / sum_r n_r        running_var likewise; n_r may differ

    Under FSDP2 and tensor parallelism this is so, too, except that every forward takes all processes: n_r must be the
    same. Where processes see the same batches, as under tensor parallelism, each counts. Nothing is gathered but what
    the forward gathers, and each process has its shards again afterwards.

    The model runs as it does in training, so that BatchNorm sees what it saw there; dropout drops. Its ``train()`` is
    called; what is in evaluation mode in a model that is in training mode stays so. A frozen layer keeps its
    statistics, and they normalize what it passes on: one that is in evaluation mode then, since its ``train()``, the
    model's, its ``forward`` or you have put it there, or one with ``track_running_stats`` off. A layer that no batch
    reaches keeps its statistics, too. A model without BatchNorm is not run, nor one in which every layer is frozen.
    InstanceNorm that tracks statistics, and layers that refuse the ``momentum=None`` that torch's function gives them,
    as in Composer's GhostBatchNorm, are computed alike; each part of a batch that a layer is called with counts as a
    batch there. Scripted layers keep their statistics.

    No gradient graph is built, and compiled parts run uncompiled. For mixed precision call it inside
    ``torch.autocast``. Afterwards the model is as before, but for the statistics, whatever its forward writes: into a
    momentum encoder or a codebook, for example. That takes memory until then: for a copy of all parameters and buffers,
    on their devices; with ``shadow``, as for any swap, of the parameters that it tracks, and of those that it does not,
    such as frozen ones. See :class:`composer_ema.model.rollback.Rollback` for what else is put back. What hooks and
    other code write outside of the model, in closures, classes, globals or a Trainer, stays written. The random
    generators of the data set, its transforms and samplers return, too, but what else these remember is theirs.

    Args:
        model: holds the weights; DDP and ``torch.compile`` are looked through. Its BatchNorm buffers are written,
            unless ``shadow`` is given.
        dataloader: batches for ``model``, or a Composer ``DataSpec``, whose transforms are applied as its Trainer
            does: ``batch_transforms`` before the batch is moved, ``microbatch_transforms`` after it. Persistent workers
            of a ``DataLoader`` are left alone: the pass starts as many of its own.
        device: where batches go, however nested. Default: to the first parameter of ``model``.
        shadow: an average that follows ``model``. The statistics are computed for the average and kept in the
            shadow's own buffers; the model has its training weights and buffers, to the bit, before and after. Inside
            ``with shadow.swapped(model)`` the model holds the new statistics until the end of the block; without this
            argument they would be gone then.
        forward: called as ``forward(model, batch)``. Default: a ComposerModel takes the batch as it is; any other
            module the first item of a tuple or list, and a mapping as keyword arguments where its ``forward`` takes
            these, else whole.
        num_batches: stop after so many batches, on each process. Default: all.
        microbatch_size: samples to run at once, for batches that do not fit the device's memory: each batch of a
            ``DataSpec`` is split by its ``split_batch``, and each part counts as a batch above. Default: whole batches.
        synchronize: whether to combine the statistics of all processes, a collective call. False: this process's
            batches only, for a call on one rank; not for SyncBatchNorm or a sharded model. If a process fails, all
            raise an error; with those two, only if it fails to get a batch.
        progress_bar: show one on rank 0 where standard error is a terminal and rich is installed.

    Raises:
        TypeError: an argument of another kind, as when they are in the order of torch's function.
        ValueError: no batch; ``microbatch_size`` without a ``DataSpec``; the processes of a model that is sharded or
            has SyncBatchNorm have different numbers of batches; ``shadow`` does not track the statistics, or is swapped
            into another model; a lazy layer or parameter has no shape yet.
        RuntimeError: another process could not run its batches.
        NotImplementedError: the model is sharded by FSDP1 or DeepSpeed, or statistics are sharded themselves.

    Warns:
        UserWarning: a layer is frozen or scripted; its name is given.

    Example:
        >>> model = nn.BatchNorm1d(1)
        >>> update_bn(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [9.0]])])
        >>> model.running_mean.item(), model.running_var.item()  # (2 + 7) / 2, (2 + 8) / 2
        (4.5, 5.0)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f'model must be a module, got {type(model).__name__}. The order is update_bn(model, dataloader), '
            "the other way round than torch's."
        )
    if shadow is not None and not isinstance(shadow, ShadowModel):
        raise TypeError(
            f'shadow must be a ShadowModel, got {type(shadow).__name__}. '
            + (
                f'Pass one of the averages, shadow[{next(iter(shadow))!r}].'
                if isinstance(shadow, Mapping) and shadow
                else 'Pass optimizer.shadow of an EMAOptimizer, ema.ema_model of EMA, or swa.swa_model of SWA.'
            )
        )
    loader: Any = getattr(dataloader, 'dataloader', None) if _is_spec(dataloader) else dataloader
    if isinstance(loader, str | bytes | type) or not (isinstance(loader, Iterable) or hasattr(loader, '__getitem__')):
        raise TypeError(f'dataloader must give batches, got {shown(dataloader)}. Pass a DataLoader or a list of them.')
    if num_batches is not None:
        remedy = 'Leave it out for all.'
        num_batches = plain.whole('num_batches', num_batches, least=1, below=sys.maxsize, remedy=remedy)
    if forward is not None and not callable(forward):
        raise TypeError(f'forward must be a function of the model and a batch, got {shown(forward)}.')
    synchronize, progress_bar = plain.flag('synchronize', synchronize), plain.flag('progress_bar', progress_bar)
    to = _parse_device(device)
    if microbatch_size is not None:
        microbatch_size = _check_microbatch_size(microbatch_size, dataloader)
    module = unwrap(model)
    reshard(module)
    refuse_placeholders({**dict(module.named_parameters()), **dict(module.named_buffers())})
    layers = _layers(module)
    if scripted := _scripted(module):
        warnings.warn(
            f'scripted BatchNorm layers keep their statistics: {listed(scripted)}. Their momentum is compiled in. '
            'Compute the statistics of the module that was scripted.',
            stacklevel=2,
        )
    if not layers:
        return
    batches = _Batches(dataloader, _device_of(module) if to is None else to, num_batches, microbatch_size)
    combining = num_ranks() > 1 and synchronize
    with ExitStack() as stack:
        # Where a forward waits for all processes, nobody could be told of an error in it.
        telling = combining and not _waits(module, layers)
        with _failing_together(module) if telling else nullcontext():
            was_swapped = shadow is not None and shadow.is_swapped
            if shadow is not None:  # first, so that the training weights return when all else is back
                stack.enter_context(_holding_average(module, shadow))
            returning = {} if shadow is None or was_swapped else shadow.stashed_weights(module)
            written = stack.enter_context(_restoring(module, batches.sources, returning))
            unfrozen = _unfrozen(module, layers)
            if not unfrozen:
                _warn_of_frozen(layers)
                return
            is_synced = num_ranks() > 1 and _waits(module, unfrozen)
            if is_synced and not synchronize:
                who = 'a sharded model' if is_sharded(module) else 'SyncBatchNorm'
                raise ValueError(f'synchronize=False cannot take effect: {who} needs all processes in its forward.')
            if shadow is not None:
                _check_tracked(shadow, _statistics(module, unfrozen))
            stack.enter_context(batches.bar(shown=progress_bar))
            gathered = {name: _Gathered(layer) for name, layer in layers.items()}
            run = forward or default_forward
            for batch in _in_step(batches, module) if is_synced else batches:
                run(module, batch)
        if combining:
            _combine(list(gathered.values()))
        reached = {name: each.layer for name, each in gathered.items() if each.count}
        if frozen := _keeping(gathered, batches.count):
            _warn_of_frozen(frozen)
        for each in gathered.values():
            each.settle()
        statistics = _statistics(module, reached)
        if shadow is None:
            written += statistics.values()
            return
        kept = dict(shadow.named_buffers())
        for name, buffer in statistics.items():
            kept[name].copy_(buffer)
        if was_swapped:  # whole numbers stay where they are in a swap
            written += [buffer for buffer in statistics.values() if buffer.is_floating_point()]


def statistics_of(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of the BatchNorm layers that keep statistics, by canonical name, aliased."""
    return _statistics(module, _layers(module))


def unfrozen_statistics_of(module: nn.Module) -> dict[str, Tensor]:
    """Those of :func:`statistics_of` that :func:`update_bn` would compute. The module is as before, afterwards."""
    with _restoring(module):
        return _statistics(module, _unfrozen(module, _layers(module)))


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Runs a module on a batch the way its kind takes it, see :func:`update_bn`."""
    composer_models = sys.modules.get('composer.models')  # without it there is no ComposerModel
    if composer_models is not None and isinstance(model, composer_models.ComposerModel):
        return model(batch)
    if isinstance(batch, (list, tuple)):
        batch = batch[0]
    if isinstance(batch, Mapping) and _takes_keywords(model, batch):
        return model(**batch)
    return model(batch)


def _takes_keywords(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(model.forward).bind(**batch)
    except TypeError:
        return False
    return True


def _layers(module: nn.Module) -> dict[str, _NormBase]:
    """The layers that keep statistics, by canonical name.

    Raises:
        NotImplementedError: the statistics of one are sharded.
        ValueError: one of them is lazy and has not seen a batch.
    """
    layers: dict[str, _NormBase] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, _NormBase) and layer.running_mean is not None:
            if is_lazy(layer.running_mean):
                raise ValueError(f'{name} is a lazy layer without a shape. Run one forward pass first.')
            if is_shard(layer.running_mean):
                raise NotImplementedError(
                    f'the statistics of {name} are DTensors, which update_bn cannot combine. Keep the buffers of the '
                    'layer whole in every process, as fully_shard and parallelize_module do.'
                )
            layers[canonical_name(f'{name}.').removesuffix('.')] = layer
    return layers


def _scripted(module: nn.Module) -> list[str]:
    """Names of the layers with statistics that are no Python modules any more."""
    scripted = ((name, child) for name, child in module.named_modules() if isinstance(child, torch.jit.ScriptModule))
    return [
        canonical_name(name) or 'the model itself'
        for name, child in scripted
        if is_normalisation(child) and 'running_mean' in dict(child.named_buffers(recurse=False))
    ]


def _statistics(module: nn.Module, layers: Mapping[str, _NormBase]) -> dict[str, Tensor]:
    """The buffers of these layers of ``module``, by canonical name, aliased."""
    owned = {id(buffer) for layer in layers.values() for buffer in layer._buffers.values()}
    return {name: buffer for name, buffer in Inventory.of(module).buffers.items() if id(buffer) in owned}


def _unfrozen(module: nn.Module, layers: Mapping[str, _NormBase]) -> dict[str, _NormBase]:
    """Puts ``module`` in training mode and returns the layers that track statistics then."""
    by_hand = [child for child in module.modules() if not child.training] if module.training else []
    module.train()
    for child in by_hand:
        child.training = False
    return {name: layer for name, layer in layers.items() if layer.training and layer.track_running_stats}


def _warn_of_frozen(names: Iterable[str]) -> None:
    warnings.warn(
        'layers that are frozen keep their statistics: while the model trains, these are in evaluation mode, or do not '
        f'track statistics: {listed([name or "the model itself" for name in names])}. To have theirs computed, put '
        'them in training mode first.',
        stacklevel=3,
    )


def _check_tracked(shadow: ShadowModel, statistics: Mapping[str, Tensor]) -> None:
    untracked = sorted(statistics.keys() - dict(shadow.named_buffers()).keys())
    if untracked:
        raise ValueError(
            f'the shadow does not track {listed(untracked)}, so it cannot keep these statistics. Let its include and '
            'exclude patterns pass them; EMAOptimizer tracks buffers with model=.'
        )


class _Gathered:
    """Makes a layer gather the means over all that it is called with in training mode, from now on.

    The n-th gets the share 1 / n, which torch's BatchNorm gives it where its momentum is None. Others refuse None, or
    take it for 0.

    Attributes:
        layer: the layer, whose ``forward`` is replaced.
        count: how often it was called in training mode; :func:`_combine` adds what other processes count.
        evaluated: how often it was called in evaluation mode.
    """

    def __init__(self, layer: _NormBase) -> None:
        self.layer, self.count, self.evaluated = layer, 0.0, 0.0
        self._buffers, self._forward = dict(layer._buffers), layer.forward
        layer.forward = self._call

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        if not (layer.training and layer.track_running_stats):
            self.evaluated += 1
            return self._forward(*args, **kwargs)
        if not self.count:
            self._reset()
        self.count += 1
        momentum = layer.momentum
        layer.momentum = 1.0 / self.count
        try:
            return self._forward(*args, **kwargs)
        finally:
            layer.momentum = momentum

    def _reset(self) -> None:
        """Forgets the old statistics, which may not be finite."""
        layer = self.layer
        layer.running_mean.zero_()  # type: ignore[union-attr]
        layer.running_var.fill_(1)  # type: ignore[union-attr]
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.zero_()

    def settle(self) -> None:
        """Writes the statistics into the buffers that the layer had, where it has replaced them."""
        for key, buffer in self._buffers.items():
            if buffer is not None and (held := self.layer._buffers[key]) is not buffer:
                buffer.copy_(held)  # type: ignore[arg-type]
                self.layer._buffers[key] = buffer


def _keeping(gathered: Mapping[str, _Gathered], num_batches: int) -> list[str]:
    """The frozen layers among those that keep their statistics; the others, missed by all batches, are logged.

    Raises:
        ValueError: no batch has reached any layer.
    """
    if not any(each.count or each.evaluated for each in gathered.values()):
        remedy = 'Pass a loader with data, a fresh one for an iterator that is used up.'
        if num_batches:
            remedy = f'{num_batches} batches were run. Pass forward, to run the model as in training.'
        raise ValueError(
            f'no batch reached a BatchNorm layer, so there are no statistics; those of the model are kept. {remedy}'
        )
    keeping = {name: each for name, each in gathered.items() if not each.count}
    frozen = [name for name, each in keeping.items() if _is_frozen(each)]
    if missed := [name for name in keeping if name not in frozen]:
        log.info('no batch reached these BatchNorm layers, which keep their statistics: %s', listed(missed))
    return frozen


def _is_frozen(each: _Gathered) -> bool:
    return each.evaluated > 0 or not (each.layer.training and each.layer.track_running_stats)


@contextmanager
def _failing_together(module: nn.Module) -> Iterator[None]:
    """If the body raises in one process, all raise an error after it. A collective call."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    _raise_on_all(failure, module)


def _raise_on_all(failure: Exception | None, module: nn.Module) -> None:
    """Raises ``failure`` where there is one, and an error that says so in all other processes. A collective call."""
    failing = torch.tensor(int(failure is not None), device=_device_of(module))
    dist.all_reduce(failing)
    if failure is not None:
        raise failure
    if int(failing):
        raise RuntimeError(
            f'{int(failing)} of {num_ranks()} processes could not run their batches, so no process has new '
            'statistics. Their own errors tell why.'
        )


class _Batches:
    """The batches of a loader, on a device, counted and shown."""

    def __init__(self, dataloader: Any, device: torch.device, limit: int | None, microbatch_size: float | None) -> None:
        self._spec: Any = None
        if _is_spec(dataloader):
            self._spec, dataloader = dataloader, dataloader.dataloader
        self._loader, self._device, self._limit = _with_workers_of_its_own(dataloader), device, limit
        self._microbatch_size = microbatch_size
        self._on_batch: Callable[[], object] = lambda: None
        self.count = 0

    @property
    def sources(self) -> list[Any]:
        """What may draw random numbers with generators of its own."""
        return [self._loader, self._spec]

    def __iter__(self) -> Iterator[Any]:
        for batch in islice(self._loader, self._limit):
            for part in self._parts(batch):
                self.count += 1
                yield part
            self._on_batch()

    def _parts(self, batch: Any) -> Iterator[Any]:
        """What the model is run on for a batch, in the order in which Composer's Trainer transforms and moves it."""
        spec = self._spec
        if spec is None:
            yield _to_device(batch, self._device)
            return
        batch = spec.batch_transforms(batch)
        for part in [batch] if self._microbatch_size is None else spec.split_batch(batch, self._microbatch_size):
            yield spec.microbatch_transforms(_to_device(part, self._device))

    @contextmanager
    def bar(self, *, shown: bool) -> Iterator[None]:
        """Shows how many batches have been run."""
        if not shown or not sys.stderr.isatty() or rank() > 0:
            yield
            return
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ModuleNotFoundError:
            yield
            return
        columns = TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task('BatchNorm statistics', total=self._total())
            self._on_batch = lambda: progress.advance(task)
            yield

    def _total(self) -> int | None:
        try:
            length = len(self._loader) if isinstance(self._loader, Sized) else None
        except TypeError:  # a DataLoader over an iterable data set
            length = None
        return min((n for n in (length, self._limit) if n is not None), default=None)


def _with_workers_of_its_own(dataloader: Any) -> Any:
    """The same loader, but where its workers persist, one whose workers live for one pass.

    Persistent workers go on with the random numbers and the data set that their last pass left, and serve one pass at a
    time, perhaps one in which training is.
    """
    if not (isinstance(dataloader, DataLoader) and dataloader.persistent_workers):
        return dataloader
    fresh = copy.copy(dataloader)
    vars(fresh).update(_iterator=None, persistent_workers=False)  # a DataLoader refuses to have them set
    return fresh


def _parse_device(device: Any) -> torch.device | None:
    if device is None:
        return None
    try:
        if isinstance(device, bool) or not isinstance(device, torch.device | str | int):
            raise TypeError
        parsed = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        message = f"device must be where batches go, such as 'cpu' or 'cuda:0', got {shown(device)}."
        raise (ValueError if isinstance(device, str | int) else TypeError)(message) from error
    check_device_is_here(parsed, 'device')
    return parsed


def _is_spec(dataloader: Any) -> bool:
    """Whether it is Composer's DataSpec, of which there is none without Composer."""
    composer_core = sys.modules.get('composer.core')
    return composer_core is not None and isinstance(dataloader, composer_core.DataSpec)


def _check_microbatch_size(microbatch_size: Any, dataloader: Any) -> float:
    kind = 'a number of samples above 0'
    size = plain.number('microbatch_size', microbatch_size, kind=kind)
    if not 0 < size < math.inf:
        raise ValueError(f'microbatch_size must be {kind}, got {shown(microbatch_size)}.')
    if not _is_spec(dataloader):
        raise ValueError(
            f'microbatch_size={shown(microbatch_size)} needs a Composer DataSpec, which says how a batch is split. '
            'Pass DataSpec(dataloader), or a loader of smaller batches.'
        )
    return size


def _to_device(batch: Any, device: torch.device) -> Any:
    if hasattr(batch, 'to'):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, '_fields'):
        return type(batch)(*(_to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_to_device(value, device) for value in batch)
    return batch


def _device_of(module: nn.Module) -> torch.device:
    return on_compute_device(next(tensor for tensors in (module.parameters(), module.buffers()) for tensor in tensors))


def _waits(module: nn.Module, layers: Mapping[str, _NormBase]) -> bool:
    """Whether a forward of ``module``, which has these layers, waits for other processes."""
    return is_sharded(module) or any(isinstance(layer, nn.SyncBatchNorm) for layer in layers.values())


def _holding_average(module: nn.Module, shadow: ShadowModel) -> AbstractContextManager[object]:
    """Lends ``module`` with the average in it, unless it holds that already."""
    if not shadow.is_swapped:
        return shadow.swapped(module)
    if not shadow.is_swapped_into(module):
        raise ValueError('the shadow is swapped into another model. Pass that one, or call swap_out first.')
    if not shadow.is_shown_by(module):
        raise ValueError(f'the model shows another average: {loan.borrowers(module)[-1]}. Call its swap_out first.')
    return nullcontext()


@contextmanager
def _restoring(
    module: nn.Module, sources: Iterable[Any] = (), returning: Collection[str] = ()
) -> Iterator[list[Tensor]]:
    """Puts all back but the values of the buffers that are in the list by then.

    Args:
        module: the module.
        sources: what may draw random numbers with generators of its own.
        returning: names of the parameters whose values come back without us.
    """
    stashed = [parameter for name, parameter in Inventory.of(module).parameters.items() if name in returning]
    rollback, written = Rollback(module, stashed=stashed), []
    if rollback.left_alone:
        log.info('not restored if the forward of the model changes them: %s', listed(rollback.left_alone))
    with _random_state_kept(module, sources), _uncompiled(), torch.no_grad():
        try:
            yield written
        except BaseException:
            written.clear()
            raise
        finally:
            reshard(module)  # FSDP2 keeps the root whole after a forward without a backward
            rollback.restore(but=written)


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Compiled code would be compiled anew for another momentum, or not notice that a ``forward`` was replaced."""
    if 'torch._dynamo' not in sys.modules:
        yield
        return
    with torch.compiler.set_stance('force_eager'):
        yield


@contextmanager
def _random_state_kept(module: nn.Module, sources: Iterable[Any]) -> Iterator[None]:
    rewind = rewinding(sources)
    python, numpy = random.getstate(), np.random.get_state()
    devices = {tensor.device for tensor in module.parameters() if tensor.is_cuda}
    with torch.random.fork_rng(devices=[device.index for device in devices]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for each in rewind:
                each()


def _in_step(batches: _Batches, module: nn.Module) -> Iterator[Any]:
    """Batches as long as every process has one: each forward waits for all of them."""
    iterator, end = iter(batches), object()
    while True:
        batch, failure = end, None
        try:
            batch = next(iterator, end)
        except Exception as error:
            failure = error
        _raise_on_all(failure, module)
        having = torch.tensor(int(batch is not end), device=_device_of(module))
        dist.all_reduce(having)
        if 0 < int(having) < num_ranks():
            raise ValueError(
                f'after {batches.count - (batch is not end)} batches only {int(having)} of {num_ranks()} processes '
                f'have another one, and {"a sharded model" if is_sharded(module) else "SyncBatchNorm"} needs one from '
                'each. Use a DistributedSampler, or pass num_batches.'
            )
        if batch is end:
            return
        yield batch


def _combine(gathered: Sequence[_Gathered]) -> None:
    """Gives every process the means of all, each weighted with the number of its batches."""
    moments = []
    for each in gathered:
        mean, var = each.layer.running_mean, each.layer.running_var
        assert mean is not None
        assert var is not None
        # All processes of a SyncBatchNorm saw the same batches: these count once.
        share = each.count / _sharers(each.layer)
        # What a layer holds that no batch has reached need not be finite.
        moments += [moment.double() * share if share else torch.zeros_like(moment).double() for moment in (mean, var)]
        moments += [torch.tensor([share, each.evaluated], dtype=torch.float64, device=mean.device)]
    total = torch.cat([moment.to(moments[0].device) for moment in moments])
    dist.all_reduce(total)
    sums = total.split([len(moment) for moment in moments])
    for each, mean, var, counts in zip(gathered, sums[::3], sums[1::3], sums[2::3], strict=True):
        each.count, each.evaluated = counts.tolist()
        if each.count:
            layer = each.layer
            layer.running_mean.copy_(mean / each.count)  # type: ignore[union-attr]
            layer.running_var.copy_(var / each.count)  # type: ignore[union-attr]
            if isinstance(layer, _BatchNorm) and layer.num_batches_tracked is not None:  # InstanceNorm does not count
                layer.num_batches_tracked.fill_(round(each.count))


def _sharers(layer: _NormBase) -> int:
    return dist.get_world_size(layer.process_group) if isinstance(layer, nn.SyncBatchNorm) else 1
