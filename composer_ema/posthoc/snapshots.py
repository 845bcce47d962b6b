"""Snapshots of any PyTorch loop: averages written while it trains, from which any other is reconstructed afterwards."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Unpack

from composer_ema import plain
from composer_ema.averages import Moment, Power
from composer_ema.checkpoints.opening import path_of
from composer_ema.model.inventory import Inventory
from composer_ema.model.sharding import is_shard
from composer_ema.model.wrappers import canonical_name, unwrap
from composer_ema.posthoc.snapshot_files import COPIED
from composer_ema.posthoc.snapshot_folder import Folder, NoFolder, SharedFolder, SnapshotFolder, Tensors
from composer_ema.posthoc.tensor_files import check_writable
from composer_ema.posthoc.writer import SnapshotWriter, spacing_of
from composer_ema.settings import ShadowSettings, takes_settings
from composer_ema.shadow import loan
from composer_ema.shadow.shadow_model import ShadowModel
from composer_ema.shadow.shadow_models import ShadowModels
from composer_ema.spans import ArgumentError, Span
from composer_ema.wording import shown

log = logging.getLogger(__name__)

#: The widths of the power averages that are kept by default.
DEFAULT_POWER = (0.05, 0.10)
VERSION = 1
_VERSION, _STEPS, _SAMPLES, _SHADOWS, _WRITER = 'version', 'num_steps', 'num_samples', 'averages', 'writer'


@takes_settings
class Snapshots:
    """Writes averages of a model while it trains, from which any average can be made after the run.

    Kept are power function averages, by default two, which every update moves beside the training weights; the weights
    at the first update; and the last weights. :func:`composer_ema.reconstruct` makes of them what an average of any
    half-life would have been. While training goes on, files hold the averages in full. :meth:`finish` writes the last
    weights and rewrites the others with float16 differences to them, which takes half of the space. A run that is
    killed leaves full files, which can be used as they are.

    With several processes, rank 0 writes. Under DDP the other ranks may make the same calls, which keep their averages.
    Of a model that ranks share (FSDP2, tensor parallelism), and with ``shard_over_ranks``, every rank must make every
    call: at the moment of a file, the tensors are gathered one after the other, so that no rank holds more than one
    whole tensor. The files are the same as those of one process, so a run may be resumed on another number of ranks.

    Args:
        model: the model in training; DDP, ``torch.compile`` and the like are looked through. Only read.
        folder: for the files, of this run alone. Made when the first one is written.
        every: time between two files: steps, as ``100`` or ``'100ba'``; samples, as ``'50000sp'``; or a share of the
            run, as ``'0.05dur'``. Default: ``'0.05dur'``.
        num_steps: steps of the whole run. A share of the run and ``halvings`` need it. Default: None.
        power: widths of the averages to keep, as shares of the time trained so far; see
            :class:`composer_ema.averages.Power`. Default: 0.05 and 0.10.
        halvings: how many more files to write towards the end, half of ``every`` before it, a quarter, and so on, as
            averages over a hundredth of the run need them. Default: 5 if the end is known, else 0.
        run_name: what to call the run in the files. Default: the name of the folder.
        overwrite: whether to remove the snapshots of another run from ``folder``, or those of an earlier start that
            this one does not go on from. Default: False; a start that was killed before it wrote averages is removed.
        overlap, settings: as for :class:`composer_ema.ShadowModel`. Averages by a function of yours are not possible.

    Attributes:
        shadows: the averages by label, a :class:`composer_ema.ShadowModels`.

    Raises:
        TypeError, ValueError: an argument out of range, or a tensor that the files cannot hold.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> model = nn.Linear(1, 1)
        >>> snapshots = Snapshots(model, folder, every=10, num_steps=20)
        >>> for _ in range(20):
        ...     snapshots.update()  # after each step of the optimizer
        >>> snapshots.finish()
        >>> sorted(os.listdir(folder))[:3]
        ['averages-00000010.safetensors', 'averages-00000015.safetensors', 'averages-00000018.safetensors']
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str],
        *,
        every: int | str = '0.05dur',
        num_steps: int | None = None,
        power: float | Sequence[float] = DEFAULT_POWER,
        halvings: int | None = None,
        run_name: str | None = None,
        overwrite: bool = False,
        overlap: bool = False,
        **settings: Unpack[ShadowSettings],
    ) -> None:
        path = path_of(folder, 'folder')
        for name in ('avg_fn', 'multi_avg_fn'):
            if settings.get(name) is not None:
                raise ValueError(f'{name} has no effect on snapshots, which are power averages. Leave it out.')
        length = None if num_steps is None else Span(check_count('num_steps', num_steps), 'ba')
        self._spacing = spacing_of(interval_of(every), length, check_halvings(halvings))
        self._length = length
        self._overwrite = plain.flag('overwrite', overwrite)
        if run_name is not None:
            run_name = plain.text('run_name', run_name, 'Leave it out for the name of the folder.')
        self._profiles = profiles_of(power)
        self._model = model
        #: The averages by label.
        self.shadows = ShadowModels(model, list(self._profiles), overlap=overlap, **settings)
        check_contents(model)
        profiles = {label: str(profile) for label, profile in self._profiles.items()}
        kept_in = folder_of(path, model, self.shadows.values())
        self._writer = SnapshotWriter(kept_in, run_name or path.name, profiles)
        self._num_steps = self._num_samples = 0
        self._has_begun = False

    @property
    def num_updates(self) -> int:
        """Updates made so far, one a step."""
        return self._num_steps

    def update(self, num_samples: int = 0) -> None:
        """Moves the averages towards the model, and writes a file if one is due. Call it after each optimizer step.

        Args:
            num_samples: samples in the step, over all processes and the same in each, for ``every`` and for half-lives
                in samples. Default: they are not counted.

        Raises:
            ArgumentError: the folder holds the snapshots of another run, or ``num_samples`` is below 0.
            TypeError: ``num_samples`` is no whole number.
            OSError: a file cannot be written; ranks that do not write it raise a RuntimeError with the reason.
            RuntimeError: the model holds an average.
        """
        if type(num_samples) is not int or not 0 <= num_samples < 2**63:
            num_samples = check_count('num_samples', num_samples, least=0)
        if not self._has_begun:
            self._begin()
        moment = Moment.of_update(self._num_steps)
        weights = {label: profile.weight(moment) for label, profile in self._profiles.items()}
        self.shadows.update(self._model, weight=weights)
        self._num_steps += 1
        self._num_samples += num_samples
        self._writer.record(self._clock, {label: (weight, moment) for label, weight in weights.items()})
        if self._writer.is_due():
            self._writer.write(averages_in(self.shadows), weights_in(self._model), facts_of(self._model))

    def wait_for_reads(self) -> None:
        """Orders the current stream after the last update has read the parameters, which you may then write."""
        self.shadows.wait_for_reads()

    def finish(self) -> None:
        """Writes the last averages and the last weights, and packs all files. Call it when training has ended.

        Raises:
            RuntimeError: no update was made.
        """
        if not self._num_steps:
            raise RuntimeError('no update was made, so there is nothing to write. Call update() after each step.')
        if not self._has_begun:
            self._begin()
        self._writer.finish(self._clock, averages_in(self.shadows), weights_in(self._model), facts_of(self._model))
        log.info('%s', self._writer.disk_use())

    def state_dict(self) -> dict[str, Any]:
        """The averages, the run's identity and its updates, to go on from; tensors alias the averages.

        Every value is a tensor, a number or a text under keys that never change, so ``torch.distributed.checkpoint``
        saves it, and loads it into that of new snapshots. Those of a sharded model hold DTensors.
        """
        return {
            _VERSION: VERSION,
            _STEPS: self._num_steps,
            _SAMPLES: self._num_samples,
            _SHADOWS: self.shadows.state_dict(),
            _WRITER: json.dumps(self._writer.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the run that :meth:`state_dict` is of. Files that it wrote later are removed at the next update.

        Raises:
            TypeError: ``state`` is no dictionary.
            ValueError: another version, other averages, or names and shapes that do not fit. Nothing is changed.
        """
        version = plain.mapping('state', state, 'Nothing was loaded. Pass what state_dict() returned.').get(_VERSION)
        if type(version) is not int or version != VERSION:
            raise ValueError(
                f'the state has format version {shown(version)}, this release reads {VERSION}. Nothing was loaded. '
                'Pass what state_dict() of Snapshots returned.'
            )
        try:
            steps, samples = (check_count(name, state.get(name), least=0) for name in (_STEPS, _SAMPLES))
        except TypeError as error:
            raise ValueError(f'the saved state of the snapshots is damaged: {error} Nothing was loaded.') from error
        writer = copy.copy(self._writer)
        writer.load_state_dict(_of_text(state.get(_WRITER)))
        self.shadows.load_state_dict(state.get(_SHADOWS, {}))
        self._writer, self._num_steps, self._num_samples = writer, steps, samples
        self._has_begun = False

    @property
    def _clock(self) -> dict[str, float]:
        return {'ba': self._num_steps, 'sp': self._num_samples}

    def _begin(self) -> None:
        self._writer.begin(
            self._spacing,
            self._clock,
            max_duration=None if self._length is None else str(self._length),
            overwrite=self._overwrite,
        )
        log.info('%s', self._writer.announcement(self._spacing, *sizes_of(self.shadows, self._model)))
        self._has_begun = True


def _of_text(state: Any) -> Mapping[str, Any]:
    try:
        return json.loads(state)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f'the saved state of the snapshots is damaged: {error!r}. Nothing was loaded.') from error


def folder_of(path: Path, model: nn.Module, shadows: Iterable[ShadowModel]) -> Folder:
    """The folder at ``path``, and which processes write the snapshots of ``model`` to it.

    Args:
        path: of the folder.
        model: wrapped as it trains. If it is wrapped in DDP, all ranks hold the same.
        shadows: its averages, which may be split over the ranks of DDP.
    """
    averaged = (tensor for shadow in shadows for tensor in shadow.parameters())
    if any(map(is_shard, (*Inventory.of(unwrap(model)).tensors().values(), *averaged))):
        return SharedFolder(path)
    is_replica = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    return NoFolder(path) if is_replica and dist.get_rank() != 0 else SnapshotFolder(path)


def profiles_of(power: Any) -> dict[str, Power]:
    """The profiles of the averages to keep, by label: ``'power=0.05'``.

    Raises:
        TypeError, ValueError: a width that is none, or one that is given twice.
    """
    widths: Any = power if isinstance(power, Sequence) else [power]
    if isinstance(widths, str | bytes) or not widths:
        raise TypeError(
            f'power must be a number, or a list of them, got {shown(power)}. Pass for example [0.05, 0.10].'
        )
    if any(width is None for width in widths):
        raise TypeError(
            f'power must be a number, or a list of them, got {shown(power)}. Pass for example [0.05, 0.10].'
        )
    profiles = {str(profile): profile for profile in (Power(width, 'ba') for width in widths)}
    if len(profiles) < len(widths):
        raise ValueError(f'power must name each width once, got {shown(widths)}.')
    return profiles


def interval_of(every: Any) -> Span:
    """The time between two files; a whole number counts steps.

    Raises:
        TypeError, ArgumentError: no time, or one in another unit.
    """
    with contextlib.suppress(TypeError):  # a time, or nothing that is one
        every = Span(plain.whole('every', every), 'ba')
    span = Span.parse(every, name='every', units=('ba', 'sp', 'dur'), positive=True)
    if span.unit == 'dur' and span.value > 1:
        raise ArgumentError(f'every must be at most the whole run, 1dur, got {span}.', 'every')
    return span


def check_count(name: str, value: Any, *, least: int = 1) -> int:
    """Returns a whole number of at least ``least``, or raises."""
    return plain.whole(name, value, least=least)


def check_halvings(halvings: Any) -> int | None:
    """Returns the number of files that halve what is left of a run; None for the default."""
    return None if halvings is None else check_count('halvings', halvings, least=0)


def averages_in(shadows: Mapping[str, ShadowModel]) -> dict[str, Tensors]:
    """What a file holds: for each label what is averaged, and once the buffers that all of them copy from the model."""
    averages: dict[str, Tensors] = {label: functools.partial(_averages_of, shadow) for label, shadow in shadows.items()}
    return averages | {COPIED: functools.partial(_copies_in, next(iter(shadows.values())))}


def _averages_of(shadow: ShadowModel) -> dict[str, Tensor]:
    state, copied = shadow.state_dict(), shadow.copied_buffers
    buffers = {name: tensor for name, tensor in state['buffers'].items() if name not in copied}
    return {**state['parameters'], **buffers}


def _copies_in(shadow: ShadowModel) -> dict[str, Tensor]:
    copied = shadow.copied_buffers
    return {name: tensor for name, tensor in shadow.state_dict()['buffers'].items() if name in copied}


def weights_in(model: nn.Module) -> Tensors:
    """What a file holds of the training weights: all tensors of the model's state dict, tied ones once."""
    return functools.partial(_weights_of, model)


def _weights_of(model: nn.Module) -> dict[str, Tensor]:
    module = unwrap(model)
    aliases, stash = Inventory.of(module).aliases, loan.training_weights(module)
    named = {canonical_name(name): value for name, value in module.state_dict().items()}
    return {
        name: stash.get(name, value).detach()
        for name, value in named.items()
        if isinstance(value, Tensor) and name not in aliases
    }


def facts_of(model: nn.Module) -> dict[str, Any]:
    """What a file says of the model's tensors: fields of :class:`composer_ema.posthoc.snapshot_files.Header`."""
    inventory = Inventory.of(unwrap(model))
    return {'aliases': inventory.aliases, 'statistics': sorted(inventory.statistics)}


def check_contents(model: nn.Module) -> None:
    """Raises a ValueError where a tensor of the model cannot stand in a file."""
    check_writable(_weights_of(model), 'the snapshots of the model')


def sizes_of(shadows: Mapping[str, ShadowModel], model: nn.Module) -> tuple[int, int]:
    """Bytes of the averages of one moment, and of the training weights."""
    averages = [tensor for tensors in averages_in(shadows).values() for tensor in tensors().values()]
    return sum(map(_num_bytes, averages)), sum(map(_num_bytes, _weights_of(model).values()))


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
