"""One file of a run's snapshots: averages of one moment, or the weights themselves, with all that tells what they are.

A file is safetensors. Its tensors are called ``label/name``, with the label of an average or ``weights``. Buffers that
all averages of a moment copy from the model, such as counters, are called ``copied/name``. While a run goes on, its
files hold full tensors. When it has ended, each is rewritten with float16 differences to the last weights. Both kinds
read the same.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composer_ema.checkpoints.reading import CheckpointError
from composer_ema.kernels.rules import is_inexact
from composer_ema.posthoc.tensor_files import Entry, TensorFile, write
from composer_ema.posthoc.updates import Updates
from composer_ema.spans import Span

#: The format that this release writes, and the newest that it reads.
VERSION = 1
#: The label of the weights themselves, and the prefix of what averages share.
WEIGHTS, COPIED = 'weights', 'copied'
#: Where a run keeps them, in its folder.
SNAPSHOT_FOLDER = 'snapshots'
#: What a list of files looks for.
SUFFIX = '.safetensors'
_KEY = 'composer_ema_snapshot'
_NAME = re.compile(r'(averages|weights)-\d{8,}\.safetensors', re.ASCII)
# Differences are scaled by a power of two to just below 2**15: float16 then keeps 11 bits of each down to a part in
# 2**29 of the largest, and none overflows.
_LARGEST_EXPONENT = 15
_LEAST_EXPONENT = -1000  # its inverse is a float64
# Dtypes that half the size pays for.
_PACKED = {'float32': torch.float32, 'float64': torch.float64}


@dataclass(frozen=True)
class Identity:
    """Which run a file belongs to.

    Args:
        run_name: its name, for people.
        run_id: drawn at random when the run began, and kept when it is resumed.
    """

    run_name: str
    run_id: str

    def __str__(self) -> str:
        return f'{self.run_name} ({self.run_id})'


@dataclass(frozen=True)
class Packing:
    """How the tensors of a file are differences.

    Args:
        base: name of the file with the weights that the differences are from, in the same folder.
        exponents: for each tensor that is a difference, the power of two that it was divided by.
        dtypes: for each, the dtype of the whole.
        same: names of whole numbers that are those of the base.
    """

    base: str
    exponents: Mapping[str, int]
    dtypes: Mapping[str, str]
    same: list[str]

    @classmethod
    def checked(cls, base: Any, exponents: Any, dtypes: Any, same: Any) -> Packing:
        """What a file says of its packing.

        Raises:
            TypeError, ValueError: it cannot be.
        """
        if not _NAME.fullmatch(base):
            raise ValueError(f'{base!r} is no name of a snapshot')
        for key, exponent in exponents.items():
            if type(exponent) is not int or not _LEAST_EXPONENT <= exponent <= -_LEAST_EXPONENT:
                raise ValueError(f'{exponent!r} is no exponent')
            if dtypes[key] not in _PACKED:
                raise ValueError(f'{dtypes[key]!r} is no dtype that is packed')
        return cls(base, dict(exponents), dict(dtypes), [_text(key) for key in same])


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Args:
        identity: of the run.
        updates: all updates up to the file's moment.
        clock: the time of the file by unit.
        max_duration: of the run; None where it is not known.
        holds_weights: whether the file holds the training weights themselves, and not averages.
        is_update: whether the file is of the moment of the last update, and not of a later one.
        is_last: whether the file was written when the run had ended.
        aliases: further names of a tied tensor, each with the name it stands under.
        statistics: names of running means and variances of normalisation layers.
        packing: where the tensors are differences.
    """

    identity: Identity
    updates: Updates
    clock: Mapping[str, float]
    max_duration: str | None = None
    holds_weights: bool = False
    is_update: bool = True
    is_last: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)
    statistics: list[str] = field(default_factory=list)
    packing: Packing | None = None

    def as_metadata(self) -> dict[str, str]:
        """The header as the texts that safetensors keep."""
        plain = {
            'version': VERSION,
            **asdict(self.identity),
            'num_updates': len(self.updates),
            'clock': dict(self.clock),
            'max_duration': self.max_duration,
            'holds_weights': self.holds_weights,
            'is_update': self.is_update,
            'is_last': self.is_last,
            'aliases': dict(self.aliases),
            'statistics': list(self.statistics),
            'packing': None if self.packing is None else asdict(self.packing),
            'updates': self.updates.as_plain(),
        }
        return {'format': 'pt', _KEY: json.dumps(plain, separators=(',', ':'))}

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, str], path: Path) -> Header:
        """The header of a file.

        Raises:
            CheckpointError: the file is no snapshot, a newer one, or damaged.
        """
        if not is_snapshot(metadata):
            raise CheckpointError(f'{path} is no snapshot of a run.')
        try:
            plain = json.loads(metadata[_KEY])
            version = plain['version']
            if type(version) is int and version > VERSION:
                raise CheckpointError(
                    f'{path} has format version {version}, this release reads up to {VERSION}. Install a newer '
                    'composer_ema.'
                )
            return cls(
                identity=Identity(str(plain['run_name']), str(plain['run_id'])),
                updates=Updates.of_plain(plain['updates'], str(path)),
                clock=checked_clock(plain['clock']),
                max_duration=_checked_duration(plain['max_duration']),
                holds_weights=plain['holds_weights'] is True,
                is_update=plain['is_update'] is True,
                is_last=plain['is_last'] is True,
                aliases={_text(alias): _text(name) for alias, name in plain['aliases'].items()},
                statistics=[_text(name) for name in plain['statistics']],
                packing=None if plain['packing'] is None else Packing.checked(**plain['packing']),
            )
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise CheckpointError(f'{path} cannot be read: its header is damaged ({error}).') from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f'{value!r} is no text')
    return value


def checked_clock(clock: Mapping[str, Any]) -> dict[str, float]:
    """The time by unit that a file or a state holds.

    Raises:
        TypeError, AttributeError: it is none, or does not count batches.
    """
    if 'ba' not in clock or not all(map(_is_time, clock.values())):
        raise TypeError(f'{dict(clock)} is no clock')
    return dict(clock)


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _checked_duration(duration: Any) -> str | None:
    return None if duration is None else str(Span.parse(duration, name='max_duration', positive=True))


class SnapshotFile:
    """A file of a run's snapshots, opened for reading.

    Args:
        path: of the file.
        is_base: whether it is opened for another file that holds differences to it. Default: False.

    Raises:
        CheckpointError: the file is missing, damaged, no snapshot, or of a newer release.
    """

    def __init__(self, path: Path, *, is_base: bool = False) -> None:
        self.path = path
        self._tensors = TensorFile(path)
        self.header = Header.of_metadata(self._tensors.metadata, path)
        packing = self.header.packing
        self._keys = {*self._tensors.names(), *(packing.same if packing is not None else ())}
        self._base: SnapshotFile | None = None
        self._is_checked = False
        if packing is not None:
            if is_base:
                raise CheckpointError(f'{path} holds differences, so no other file can hold differences to it.')
            base = path.parent / packing.base
            if not base.exists():
                raise CheckpointError(
                    f'{path} holds differences to {base}, which does not exist. Put that file back beside it.'
                )
            self._base = SnapshotFile(base, is_base=True)
            if self._base.header.identity.run_id != self.header.identity.run_id:
                raise CheckpointError(
                    f'{path} holds differences to {base}, which is now a file of another run: '
                    f'{self._base.header.identity}, not {self.header.identity}.'
                )

    def checked(self) -> SnapshotFile:
        """The file itself, after a look at its checksum and at that of the file it holds differences to.

        Raises:
            CheckpointError: one has changed since it was written.
        """
        if not self._is_checked:
            for path in [self.path] if self._base is None else [self.path, self._base.path]:
                status = path.stat()
                _check(path, status.st_size, status.st_mtime_ns)
            self._is_checked = True
        return self

    @property
    def num_updates(self) -> int:
        """The updates up to its moment."""
        return len(self.header.updates)

    @property
    def labels(self) -> list[str]:
        """The labels of what it holds: averages, or ``'weights'``."""
        return [WEIGHTS] if self.header.holds_weights else self.header.updates.labels

    def names(self, label: str) -> list[str]:
        """The canonical names of the tensors of one label, those that all labels share among them."""
        return sorted(key.partition('/')[2] for key in self._keys if key.partition('/')[0] in (label, COPIED))

    def tensor(self, label: str, name: str) -> Tensor:
        """One tensor, in the dtype of the average.

        Raises:
            CheckpointError: there is none.
        """
        return self.entry(label, name).values()

    def entry(self, label: str, name: str) -> Entry:
        """One tensor, in the dtype of the average, whose values are read when they are asked for.

        Raises:
            CheckpointError: there is none.
        """
        for key in (f'{label}/{name}', f'{COPIED}/{name}'):
            if key in self._keys:
                return self._entry(key)
        raise CheckpointError(f'{self.path} has no {name} of {label}.')

    def outline(self, label: str, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """The dtype and the shape of one tensor, without its values."""
        found = self.entry(label, name)
        return found.dtype, found.shape

    def is_copied(self, name: str) -> bool:
        """Whether a tensor is no average but what the model held, as counters are."""
        return f'{COPIED}/{name}' in self._keys

    def rounding(self, label: str) -> float:
        """The mean square of the rounding errors in the tensors of one label; 0 where nothing was rounded."""
        packing = self.header.packing
        if packing is None:
            return 0.0
        total, count = 0.0, 0
        for key in packing.exponents:
            if key.startswith(f'{label}/'):
                difference = self._tensors.tensor(key).double() * 2.0 ** packing.exponents[key]
                # Half a unit in the last place at most; evenly spread, so a twelfth of its square.
                unit = torch.exp2(torch.floor(torch.log2(difference.abs().clamp_min(1e-300))) - 10)
                total += float((unit.square() / 12).sum())
                count += difference.numel()
        return total / count if count else 0.0

    def entries(self) -> dict[str, Entry]:
        """All tensors in full by label and name, each read when its turn comes."""
        return {key: self._entry(key) for key in sorted(self._keys)}

    def _entry(self, key: str) -> Entry:
        packing = self.header.packing
        if packing is not None and key in packing.same:
            return self._of_base(key)
        dtype, shape = self._tensors.outline(key)
        if packing is None or key not in packing.exponents:
            return Entry(dtype, shape, lambda: self._tensors.tensor(key))
        return Entry(getattr(torch, packing.dtypes[key]), shape, lambda: self._restored(key, packing))

    def _restored(self, key: str, packing: Packing) -> Tensor:
        base = self._of_base(key).values().double()
        difference = self._tensors.tensor(key).double()
        dtype = getattr(torch, packing.dtypes[key])
        return difference.mul_(2.0 ** packing.exponents[key]).add_(base).to(dtype)

    def _of_base(self, key: str) -> Entry:
        assert self._base is not None
        return self._base.entry(WEIGHTS, key.partition('/')[2])


@functools.lru_cache(maxsize=1024)
def _check(path: Path, size: int, changed: int) -> None:
    """Checks a file as it was last changed, once for all that hold differences to it."""
    TensorFile(path).check()


def is_snapshot(metadata: Mapping[str, str]) -> bool:
    """Whether these texts stand beside the tensors of a snapshot."""
    return _KEY in metadata


def name_of(header: Header) -> str:
    """The name of the file of a moment, which its batch tells: ``averages-00000300.safetensors``."""
    return f'{WEIGHTS if header.holds_weights else "averages"}-{int(header.clock["ba"]):08d}{SUFFIX}'


def entries_of(header: Header, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Entry]:
    """What a file of one moment holds in full.

    Args:
        header: what the tensors are.
        tensors: label to tensors by canonical name; under :data:`COPIED` those that no average changes.
    """
    entries: dict[str, Entry] = {}
    for label, named in tensors.items():
        for name, tensor in named.items():
            is_shared = not header.holds_weights and not is_inexact(tensor)
            entries.setdefault(f'{COPIED if is_shared else label}/{name}', Entry.of(tensor))
    return entries


def files_in(folder: Path) -> list[Path]:
    """Every file of ``folder`` that is named as a snapshot, by name."""
    return sorted(path for path in folder.glob(f'*{SUFFIX}') if _NAME.fullmatch(path.name))


def pack(path: Path, base: Path) -> None:
    """Rewrites a full file with float16 differences to the weights in ``base``. One tensor is in memory at a time.

    Tensors that float16 cannot make smaller or cannot hold stay as they are: those of 16 bits, complex ones, those with
    values that are not finite, and those that ``base`` does not have in this shape.
    """
    file, last = SnapshotFile(path), SnapshotFile(base)
    if file.header.packing is not None or path == base:
        return
    exponents, dtypes, same, entries = {}, {}, [], {}
    in_base = set(last.names(WEIGHTS))
    for key, whole in file.entries().items():
        name = key.partition('/')[2]
        if name not in in_base:
            entries[key] = whole
        elif not whole.dtype.is_floating_point and torch.equal(last.tensor(WEIGHTS, name), whole.values()):
            same.append(key)
        elif (exponent := _exponent(whole, last, name)) is not None:
            exponents[key], dtypes[key] = exponent, str(whole.dtype).removeprefix('torch.')
            entries[key] = Entry(torch.float16, whole.shape, _differences(whole, last, name, exponent))
        else:
            entries[key] = whole
    packing = Packing(base.name, exponents, dtypes, sorted(same))
    write(path, entries, replace(file.header, packing=packing).as_metadata())


def unpack(path: Path) -> None:
    """Rewrites a file of differences in full."""
    file = SnapshotFile(path)
    if file.header.packing is not None:
        write(path, file.entries(), replace(file.header, packing=None).as_metadata())


def _exponent(whole: Entry, last: SnapshotFile, name: str) -> int | None:
    """The power of two to divide the differences by; None where the tensor is to stay as it is."""
    base = last.tensor(WEIGHTS, name)
    if whole.dtype not in _PACKED.values() or base.shape != whole.shape or not base.is_floating_point():
        return None
    if not base.numel():
        return 0
    largest = float((whole.values().double() - base.double()).abs().max())
    if largest == 0:
        return 0
    # NaN and infinity: no difference tells what the value was.
    if not largest < math.inf:
        return None
    _, power = math.frexp(largest)  # largest < 2 ** power
    return max(power - _LARGEST_EXPONENT, _LEAST_EXPONENT)


def _differences(whole: Entry, last: SnapshotFile, name: str, exponent: int) -> Any:
    def values() -> Tensor:
        difference = whole.values().double() - last.tensor(WEIGHTS, name).double()
        return difference.mul_(2.0**-exponent).to(torch.float16)

    return values


def referenced_bases(files: Iterable[SnapshotFile]) -> set[str]:
    """Names of the files that others hold differences to."""
    return {file.header.packing.base for file in files if file.header.packing is not None}
