"""BatchNorm's running statistics for the weights that a model holds now, or for an average of them.

Invariant: nothing else changes. Training flags, momenta, random numbers and all other buffers are as they were, also
after an error; then the statistics are, too.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import swa_utils

from composer_ema.model.inventory import Inventory
from composer_ema.model.names import listed
from composer_ema.model.sharding import is_sharded, unwrap
from composer_ema.shadow import loan
from composer_ema.shadow.shadow_model import ShadowModel

if TYPE_CHECKING:  # this module works without Composer
    from composer.core import DataSpec

Forward = Callable[[nn.Module, Any], Any]


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
    in training fit them badly. One pass over ``dataloader`` gathers those that fit, each batch with the same share, as
    :func:`torch.optim.swa_utils.update_bn` does, which runs underneath::

        running_mean = sum_i mean(batch_i) / n        running_var = sum_i var(batch_i) / n      # var: unbiased

    With several processes, each with its own share of the data, all end with the statistics of one process that saw
    the n_1 + n_2 + ... batches of all::

        running_mean = sum_r n_r running_mean_r / sum_r n_r        running_var likewise; n_r may differ

    As in torch's, the whole model is in training mode meanwhile, so that BatchNorm sees what it saw in training;
    dropout drops. No gradient graph is built. A layer that no batch reaches keeps its statistics. A model without
    BatchNorm is not run. For mixed precision call it inside ``torch.autocast``.

    Args:
        model: holds the weights; DDP and ``torch.compile`` are looked through. Its BatchNorm buffers are written,
            unless ``shadow`` is given.
        dataloader: batches for ``model``, or a Composer ``DataSpec``, whose transforms are applied as its Trainer
            does: ``batch_transforms`` before the batch is moved, ``microbatch_transforms`` after it. It must not be in
            the middle of another iteration with persistent workers.
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
            batches only, for a call on one rank; not for SyncBatchNorm.
        progress_bar: show one on rank 0 where standard error is a terminal and rich is installed.

    Raises:
        TypeError: an argument of another kind, as when they are in the order of torch's function.
        ValueError: no batch; ``microbatch_size`` without a ``DataSpec``; the processes of a SyncBatchNorm model have
            different numbers of batches; ``shadow`` does not track the statistics, or is swapped into another model.
        NotImplementedError: the model is sharded.

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
            'Pass optimizer.shadow of an EMAOptimizer, ema.ema_model of EMA, or swa.swa_model of SWA.'
        )
    if num_batches is not None and (type(num_batches) is not int or num_batches < 1):
        raise ValueError(f'num_batches must be a whole number above 0, got {num_batches!r}. Leave it out for all.')
    if is_sharded(model):
        raise NotImplementedError('this release computes no statistics of sharded models (FSDP, tensor parallel).')

    module = unwrap(model)
    layers = _layers(module)
    if not layers:
        return
    statistics = statistics_of(module)
    if shadow is not None:
        _check_tracked(shadow, statistics)
    processes = _world_size()
    is_synced = processes > 1 and any(isinstance(layer, nn.SyncBatchNorm) for layer in layers)
    if is_synced and not synchronize:
        raise ValueError(
            'synchronize=False cannot take effect: SyncBatchNorm synchronizes all processes in its forward.'
        )
    to = _device_of(module) if device is None else torch.device(device)
    batches = _Batches(dataloader, to, num_batches, microbatch_size)
    with ExitStack() as stack:
        if shadow is not None:
            stack.enter_context(_holding_average(module, shadow, statistics))
        stack.enter_context(_restoring(module, layers, batches.sources))
        stack.enter_context(batches.bar(shown=progress_bar))
        # torch's function hands the first item of a list to the model, so a list of one hands over the batch.
        lists = ([batch] for batch in (_in_step(batches, layers[0]) if is_synced else batches))
        swa_utils.update_bn(lists, _Runs(module, forward or default_forward))
        if processes > 1 and synchronize:
            _combine(layers)
        if not any(map(_batches_of, layers)):
            raise ValueError(
                'no batch reached a BatchNorm layer, so there are no statistics; those of the model are kept. '
                'Pass a loader with data, a fresh one for an iterator that is used up.'
            )


def statistics_of(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of the BatchNorm layers that keep statistics, by canonical name, aliased."""
    owned = {id(buffer) for layer in _layers(module) for buffer in layer._buffers.values()}
    return {name: buffer for name, buffer in Inventory.of(module).buffers.items() if id(buffer) in owned}


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


def _layers(module: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers that keep statistics."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]


def _check_tracked(shadow: ShadowModel, statistics: Mapping[str, Tensor]) -> None:
    untracked = sorted(statistics.keys() - dict(shadow.named_buffers()).keys())
    if untracked:
        raise ValueError(
            f'the shadow does not track {listed(untracked)}, so it cannot keep these statistics. Let its include and '
            'exclude patterns pass them; EMAOptimizer tracks buffers with model=.'
        )


class _Runs(nn.Module):
    """A module with another way to be called."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model, self._run = model, forward

    def forward(self, batch: Any) -> Any:
        return self._run(self.model, batch)


class _Batches:
    """The batches of a loader, on a device, counted and shown."""

    def __init__(self, dataloader: Any, device: torch.device, limit: int | None, microbatch_size: float | None) -> None:
        composer_core = sys.modules.get('composer.core')
        self._spec: Any = None
        if composer_core is not None and isinstance(dataloader, composer_core.DataSpec):
            self._spec, dataloader = dataloader, dataloader.dataloader
        if microbatch_size is not None:
            _check_microbatch_size(microbatch_size, self._spec)
        self._loader, self._device, self._limit = dataloader, device, limit
        self._microbatch_size = microbatch_size
        self._on_batch: Callable[[], object] = lambda: None
        self.count = 0

    @property
    def sources(self) -> list[Any]:
        """What may draw random numbers with a generator of its own."""
        batch_sampler = getattr(self._loader, 'batch_sampler', None)
        return [self._loader, getattr(self._loader, 'sampler', None), getattr(batch_sampler, 'sampler', None)]

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
        if not shown or not sys.stderr.isatty() or (_is_distributed() and dist.get_rank() > 0):
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


def _check_microbatch_size(microbatch_size: float, spec: Any) -> None:
    is_number = isinstance(microbatch_size, (int, float)) and not isinstance(microbatch_size, bool)
    if not is_number or not microbatch_size > 0:
        raise ValueError(f'microbatch_size must be a number of samples above 0, got {microbatch_size!r}.')
    if spec is None:
        raise ValueError(
            f'microbatch_size={microbatch_size} needs a Composer DataSpec, which says how a batch is split. '
            'Pass DataSpec(dataloader), or a loader of smaller batches.'
        )


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
    return next(tensor.device for tensors in (module.parameters(), module.buffers()) for tensor in tensors)


@contextmanager
def _holding_average(module: nn.Module, shadow: ShadowModel, statistics: Mapping[str, Tensor]) -> Iterator[None]:
    """Lends ``module`` with the average in it, and afterwards keeps the statistics in the shadow instead."""
    # A swap leaves whole numbers where they are, so the counters of batches go back by hand.
    counters = {name: buffer.clone() for name, buffer in statistics.items() if not buffer.is_floating_point()}
    was_swapped = shadow.is_swapped
    if was_swapped and not shadow.is_swapped_into(module):
        raise ValueError('the shadow is swapped into another model. Pass that one, or call swap_out first.')
    if not was_swapped:
        shadow.swap_in(module)
    elif not shadow.is_shown_by(module):
        raise ValueError(f'the model shows another average: {loan.borrowers(module)[-1]}. Call its swap_out first.')
    try:
        yield
        with torch.no_grad():
            kept = dict(shadow.named_buffers())
            for name, buffer in statistics.items():
                kept[name].copy_(buffer)
    finally:
        if not was_swapped:
            shadow.swap_out(module)
        for name, counter in counters.items():
            statistics[name].copy_(counter)


@contextmanager
def _restoring(module: nn.Module, layers: Sequence[_BatchNorm], sources: Iterable[Any]) -> Iterator[None]:
    """Puts all back but the statistics of ``layers`` that batches have reached; after an error these as well."""
    flags = [(child, child.training) for child in module.modules()]
    momenta = [(layer, layer.momentum) for layer in layers]
    buffers = [
        (child, key, buffer, buffer.clone())
        for child in module.modules()
        for key, buffer in child._buffers.items()
        if buffer is not None
    ]
    done = False
    with _random_state_kept(module, sources), torch.no_grad():
        try:
            yield
            done = True
        finally:
            for child, flag in flags:
                child.training = flag
            for layer, momentum in momenta:
                layer.momentum = momentum
            reached = {layer for layer in layers if done and _batches_of(layer)}
            for child, key, buffer, value in buffers:
                if child not in reached:
                    child._buffers[key] = buffer
                    buffer.copy_(value)


@contextmanager
def _random_state_kept(module: nn.Module, sources: Iterable[Any]) -> Iterator[None]:
    generators = {
        id(g): g for source in sources if isinstance(g := getattr(source, 'generator', None), torch.Generator)
    }
    states = [(generator, generator.get_state()) for generator in generators.values()]
    python, numpy = random.getstate(), np.random.get_state()
    devices = {tensor.device for tensor in module.parameters() if tensor.is_cuda}
    with torch.random.fork_rng(devices=[device.index for device in devices]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for generator, state in states:
                generator.set_state(state)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _world_size() -> int:
    return dist.get_world_size() if _is_distributed() else 1


def _batches_of(layer: _BatchNorm) -> int:
    return 0 if layer.num_batches_tracked is None else int(layer.num_batches_tracked)


def _in_step(batches: _Batches, layer: _BatchNorm) -> Iterator[Any]:
    """Batches as long as every process has one: SyncBatchNorm waits in each forward for all of them."""
    iterator, end = iter(batches), object()
    while True:
        batch = next(iterator, end)
        having = torch.tensor(int(batch is not end), device=_device_of(layer))
        dist.all_reduce(having)
        if 0 < int(having) < _world_size():
            raise ValueError(
                f'after {batches.count - (batch is not end)} batches only {int(having)} of {_world_size()} processes '
                'have another one, and SyncBatchNorm needs one from each. Use a DistributedSampler, or pass '
                'num_batches.'
            )
        if batch is end:
            return
        yield batch


def _combine(layers: Sequence[_BatchNorm]) -> None:
    """Gives every process the means of all, each weighted with the number of its batches."""
    moments = []
    for layer in layers:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        # All processes of a SyncBatchNorm saw the same batches: these count once.
        share = _batches_of(layer) / _sharers(layer)
        moments += [layer.running_mean.double() * share, layer.running_var.double() * share]
        moments += [torch.full((1,), share, dtype=torch.float64, device=layer.running_mean.device)]
    total = torch.cat([moment.to(moments[0].device) for moment in moments])
    dist.all_reduce(total)
    sums = total.split([len(moment) for moment in moments])
    for layer, mean, var, count in zip(layers, sums[::3], sums[1::3], sums[2::3], strict=True):
        # A layer that no process has reached gets 0 / 0 here, and then its old statistics back.
        layer.running_mean.copy_(mean / count)  # type: ignore[union-attr]
        layer.running_var.copy_(var / count)  # type: ignore[union-attr]
        layer.num_batches_tracked.fill_(round(count.item()))  # type: ignore[union-attr]


def _sharers(layer: _BatchNorm) -> int:
    return dist.get_world_size(layer.process_group) if isinstance(layer, nn.SyncBatchNorm) else 1
