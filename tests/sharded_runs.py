"""Composer runs of a sharded model, whole from the first batch to the last, and what a test compares of them.

Every function here is called in all ranks at once; see :class:`sharded.Ranks`.
"""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed
from composer import Callback, Event, Trainer
from composer.core import State
from composer.loggers import LoggerDestination
from composer.models import ComposerClassifier
from composer.utils import ObjectStore
from composer.utils.checkpoint import save_checkpoint
from composer.utils.file_helpers import BACKEND_TO_OBJECT_STORE_FACTORY
from composer.utils.parallelism import FSDP2Config, ParallelismConfig
from contract import StopAfter
from sharded import bits_of, local, tensors_of, whole
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from toy import make_data, make_trainer

from composer_ema import EMA, SWA
from composer_ema.model.wrappers import unwrap
from composer_ema.trainer.weight_average import WeightAverage

#: Of all ranks together. Two epochs of three batches.
BATCH, SAMPLES, BATCHES = 8, 24, 6
CLASSES = 3

#: The algorithms that a run may have, by name.
AVERAGES: dict[str, Callable[[], list[WeightAverage]]] = {
    'none': lambda: [],
    'ema': lambda: [EMA('2ba')],
    'swa': lambda: [SWA('1ba', update_interval='1ba')],
    'both': lambda: [EMA('2ba'), SWA('1ba', update_interval='1ba')],
    'several': lambda: [EMA(half_life={'short': '2ba', 'long': '1ep'}, power={'power': 0.1})],
    'compensated': lambda: [EMA('2ba', shadow_dtype='bfloat16', compensated=True)],
    'function': lambda: [EMA(avg_fn=lambda average, source, count: average + (source - average) / (count + 2))],
    'late': lambda: [EMA('2ba', ema_start='5ba')],
}


def make_model(*, batchnorm: bool = False, wide: int = 5) -> ComposerClassifier:
    """Linear layers whose shards are uneven or empty on two and four ranks; the last one is a group of its own."""
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(36, wide), nn.BatchNorm1d(wide) if batchnorm else nn.Tanh(), nn.Linear(wide, CLASSES)
    )
    network.fsdp_wrap_fn = lambda module: module is network[3]  # pyright: ignore[reportArgumentType]: Composer looks for it
    return ComposerClassifier(network, num_classes=CLASSES)


class FolderStore(ObjectStore):
    """A folder as an object store, from which checkpoints are loaded."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def get_uri(self, object_name: str) -> str:
        return f'folder://{self.folder}/{object_name}'

    def upload_object(self, object_name: str, filename: Any, callback: Any = None, **kwargs: Any) -> None:
        raise NotImplementedError

    def get_object_size(self, object_name: str) -> int:
        return (self.folder / object_name).stat().st_size

    def download_object(self, object_name: str, filename: Any, overwrite: bool = False, callback: Any = None) -> None:
        shutil.copyfile(self.folder / object_name, filename)


class Uploads(LoggerDestination):
    """Copies what Composer uploads into a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def upload_file(self, state: State, remote_file_name: str, file_path: Path, *, overwrite: bool) -> None:
        target = self.folder / remote_file_name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file_path, target)


class Watch(Callback):
    """Notes this rank's part of the weights after every batch, all that is whole then, and what evaluations see."""

    def __init__(self, *, is_noting: bool, inside: str | None) -> None:
        self.is_noting, self.inside = is_noting, inside
        self.batches: list[dict[str, bytes]] = []
        self.noted: dict[int, dict[str, Any]] = {}
        self.evaluated: dict[int, list[Tensor]] = {}

    def run_event(self, event: Event, state: Any, logger: Any) -> None:
        batch = int(state.timestamp.batch)
        if event is Event.BATCH_END:
            self.batches.append(bits_of(tensors_of(state.model)))
            if self.is_noting:
                self.noted[batch] = contents(state)
        elif event is Event.EVAL_AFTER_FORWARD:
            self.evaluated.setdefault(batch, []).append(state.outputs.detach().clone())
        elif event is Event.EVAL_END and self.inside is not None:
            save_checkpoint(state, f'{self.inside}/ep{{epoch}}-ba{{batch}}-rank0.pt')


def run(averages: str = 'ema', sharding: str | None = 'sharded', **arguments: Any) -> dict[str, Any]:
    """Trains, and returns what there is afterwards.

    Args:
        averages: a key of :data:`AVERAGES`.
        sharding: ``'sharded'`` or ``'full'`` checkpoints under FSDP2, or ``'monolith'``, full ones that rank 0 loads
            for all; ``'by hand'`` for a model that is sharded before Composer sees it. None: DDP.
        arguments: of the Trainer. ``fsdp`` are those of FSDP2Config, ``model`` those of :func:`make_model`, ``inside``
            is a folder to save to within evaluations, ``note`` asks for what is whole after every batch, ``stop`` is
            a batch to stop after, ``store`` a folder to load from as an object store, ``uploads`` one that takes
            uploads, and ``fit=False`` leaves training out.
    """
    with averaging_gradients():
        trainer, watch, said = build(averages, sharding, **arguments)
        seen: dict[str, Any] = {'loaded': contents(trainer.state), 'layout': layout(trainer.state)}
        if arguments.get('fit', True):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter('always')
                trainer.fit()
            said += [text for each in caught if 'could not' in (text := str(each.message))]
    seen |= contents(trainer.state)
    seen |= {name: getattr(watch, name) for name in ('batches', 'noted', 'evaluated')}
    trainer.close()
    return {**seen, 'warnings': said, 'time': int(trainer.state.timestamp.batch)}


def build(averages: str, sharding: str | None, **arguments: Any) -> tuple[Trainer, Watch, list[str]]:
    """A Trainer, the callback that watches it, and what it said of averages while it was built."""
    set_local_rank()
    watch = Watch(is_noting=arguments.pop('note', False), inside=arguments.pop('inside', None))
    stop = arguments.pop('stop', None)
    model = make_model(**arguments.pop('model', {}))
    if sharding == 'monolith' and torch.distributed.get_rank() > 0:
        model.module.to('meta')  # Composer 0.32.1 hands rank 0's weights to those who have none, and to nobody else
    if sharding == 'by hand':
        fully_shard(model.module)
    fsdp, _ = dict(arguments.pop('fsdp', {})), arguments.pop('fit', None)
    if (store := arguments.pop('store', None)) is not None:
        arguments['load_object_store'] = FolderStore(store)
    if (folder := arguments.pop('uploads', None)) is not None:
        arguments['loggers'] = [Uploads(folder)]
    # Composer's object stores go by the scheme of an address.
    BACKEND_TO_OBJECT_STORE_FACTORY['folder'] = lambda bucket, path: FolderStore('/')
    defaults: dict[str, Any] = {
        'train_dataloader': data(),
        'eval_dataloader': data(seed=2),
        'eval_interval': '2ba',
        'optimizers': torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        'callbacks': [watch] if stop is None else [watch, StopAfter(stop)],
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        if sharding not in (None, 'by hand'):
            fsdp |= {'state_dict_type': 'full', 'load_monolith_rank0_only': True} if sharding == 'monolith' else {
                'state_dict_type': sharding
            }  # fmt: skip
            defaults['parallelism_config'] = ParallelismConfig(fsdp2=FSDP2Config(**fsdp))
        trainer = make_trainer(AVERAGES[averages](), model=model, **{**defaults, **arguments})
    said = [str(each.message) for each in caught]
    return trainer, watch, [each for each in said if any(word in each for word in ('EMA', 'SWA', 'average'))]


def set_local_rank() -> None:
    """Says what Composer's launcher says: all ranks are on this machine."""
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ |= {'LOCAL_RANK': str(rank), 'LOCAL_WORLD_SIZE': str(count), 'NODE_RANK': '0'}


def data(seed: int = 1) -> Any:
    """Whatever the number of ranks, each batch of all of them together has the same samples."""
    return make_data(SAMPLES, BATCH // torch.distributed.get_world_size(), seed=seed)


def contents(state: State) -> dict[str, Any]:
    """The weights and the averages, whole, and the counters. A collective call."""
    averages, counters = {}, {}
    for label, average in averages_in(state).items():
        tensors = {**average['parameters'], **average['buffers']}
        terms = {f'{name}.term': term for name, term in average.get('compensations', {}).items()}
        averages[label] = {name: whole(tensor) for name, tensor in {**tensors, **terms}.items()}
        keys = ('num_updates', 'last_update', 'started_at', 'first_update', 'start_share', 'profile')
        counters[label] = {key: average[key] for key in keys}
    weights = {name: whole(tensor) for name, tensor in tensors_of(unwrap(state.model)).items()}
    return {'weights': weights, 'averages': averages, 'counters': counters}


def averages_in(state: State) -> dict[str, Any]:
    """The states of all averages of a run by label."""
    kept = [each for each in state.algorithms if isinstance(each, WeightAverage)]
    return {label: average for each in kept for label, average in each.state_dict()['averages'].items()}


def layout(state: State) -> dict[str, bool]:
    """For each parameter that is averaged, whether every average of it is shared as it is itself."""
    tensors = tensors_of(unwrap(state.model))
    return {
        name: _is_laid_out_as(average, tensors[name])
        for each in averages_in(state).values()
        for name, average in each['parameters'].items()
    }


def _is_laid_out_as(average: Tensor, weight: Tensor) -> bool:
    if not isinstance(average, DTensor) or not isinstance(weight, DTensor):
        return False
    return (average.placements, average.device_mesh) == (weight.placements, weight.device_mesh)


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two models or averages have the same names, and tensors of the same bits."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@contextmanager
def averaging_gradients() -> Iterator[None]:
    """Mends gloo, which sums gradients where FSDP2 asks it to average them."""
    factors = 'torch.distributed.fsdp._fully_shard._fsdp_collectives._get_gradient_divide_factors'
    with mock.patch(factors, lambda group, *_: (1.0, float(group.size()))):
        yield


def path_of(folder: Path, batch: int, sharding: str | None) -> str:
    """Where a run with ``save_folder=folder`` has the checkpoint of a batch."""
    name = f'ep{(batch - 1) // (SAMPLES // BATCH)}-ba{batch}'  # before the epoch ends
    return str(folder / (name if sharding == 'sharded' else f'{name}-rank0.pt'))


def memory(kind: str, folder: str) -> dict[str, float]:
    """What an average of a model of 40 M elements takes, and what is taken at the most, as shares of the model.

    Args:
        kind: ``'sharded'`` or ``'full'`` checkpoints.
        folder: for the checkpoint.
    """
    set_local_rank()
    taken: dict[str, float] = {}
    ema = Measured(taken, 'start')
    trainer, size = wide_run(ema, kind)
    with averaging_gradients():
        trainer.fit()
    with peak(taken, 'save'):
        saved = save_checkpoint(trainer.state, f'{folder}/ep{{epoch}}-ba{{batch}}-rank0.pt')
    taken['average'] = sum(local(tensor).nbytes for _, tensor in ema.ema_model.named_parameters())
    taken['in the file'] = 0 if saved is None else Path(saved).stat().st_size
    trainer.close()
    del trainer, ema
    wide_run(Measured(taken, 'load'), kind, load_path=path_of(Path(folder), 2, kind))[0].close()
    return {name: count / size for name, count in taken.items()}


def wide_run(ema: EMA, kind: str, **arguments: Any) -> tuple[Trainer, int]:
    """A Trainer of a model of forty groups, to train for two batches, and the bytes of the model."""
    torch.manual_seed(3)
    layers = [nn.Linear(1000, 1000, bias=False) for _ in range(40)]
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 1000), *layers, nn.Linear(1000, CLASSES))
    network.fsdp_wrap_fn = lambda module: isinstance(module, nn.Linear)  # pyright: ignore[reportArgumentType]
    model = ComposerClassifier(network, num_classes=CLASSES)
    size = sum(parameter.nbytes for parameter in model.parameters())
    trainer = make_trainer(
        [ema], model=model, optimizers=torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
        train_dataloader=data(), max_duration='2ba',
        parallelism_config=ParallelismConfig(fsdp2=FSDP2Config(state_dict_type=kind)), **arguments,
    )  # fmt: skip
    return trainer, size


class Measured(EMA):
    """Measures what building its average takes, loading it included."""

    def __init__(self, taken: dict[str, float], name: str) -> None:
        super().__init__('2ba')
        self.taken, self.measured = taken, name

    def _build(self, state: State) -> None:
        with peak(self.taken, self.measured):
            super()._build(state)


@contextmanager
def peak(taken: dict[str, float], name: str) -> Iterator[None]:
    """Notes how many bytes this process takes at the most within the block, beyond those that it takes before."""
    gc.collect()
    ctypes.CDLL('libc.so.6').malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')  # the peak starts again from here
    before = _in_status('VmRSS')
    yield
    taken[name] = _in_status('VmHWM') - before


def _in_status(field: str) -> int:
    [line] = [line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(f'{field}:')]
    return 1024 * int(line.split()[1])
