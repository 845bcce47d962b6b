"""What a run leaves in its folder: the names of the files, and the numbers of the metrics file as curves over training.

Imports nothing heavy, so that a command that reads runs need not wait for torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import numpy as np

#: The run's metrics, one JSON object a line; see :class:`composer_ema.run_folder.recorder.Recorder`.
METRICS_FILE = 'metrics.jsonl'
#: The recipe as it was trained, with every value filled in.
RECIPE_FILE = 'recipe.yaml'
#: The averages that ``composer-ema sweep`` has evaluated; see :class:`composer_ema.sweep.trials.TrialsFile`.
SWEEP_FILE = 'sweep.jsonl'
#: The folder of the checkpoints, unless the recipe gives another.
CHECKPOINT_FOLDER = 'checkpoints'
#: What a metrics file calls the momentum of a parameter group, before ``/group0``: by the optimizer's own argument.
MOMENTUM, BETA1 = 'momentum', 'beta1'
#: What values over training can be plotted against.
Axis = Literal['epoch', 'batch', 'sample']
# Beyond every float.
_NO_FLOAT = 2**1023
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Curve:
    """Values over training; arrays of one length.

    Args:
        epoch: Epochs done after each value's batch, with fractions where the run knows its length.
        batch: Batches done.
        sample: Samples done.
        value: float64.
    """

    epoch: Array
    batch: Array
    sample: Array
    value: Array

    def __len__(self) -> int:
        return len(self.value)

    def over(self, axis: Axis) -> Array:
        """The position of each value along ``axis``."""
        return {'epoch': self.epoch, 'batch': self.batch, 'sample': self.sample}[axis]


def curve(lines: Iterable[Mapping[str, Any]], key: str, otherwise: str | None = None) -> Curve:
    """The values of ``key`` over training. A line without it gives the value of ``otherwise``, or is left out."""
    rows = [
        (line['epoch'], line['batch'], line['sample'], value)
        for line in lines
        if is_number(value := line.get(key, line.get(otherwise) if otherwise else None))
    ]
    epoch, batch, sample, value = np.asarray(rows, dtype=np.float64).reshape(-1, 4).T
    return Curve(epoch, batch, sample, value)


def curves_by_group(lines: Sequence[Mapping[str, Any]], name: str) -> dict[str, Curve]:
    """One curve of ``name`` (``'lr'`` or ``'momentum'``) for each set of parameter groups with equal values.

    Args:
        lines: Lines of a metrics file.
        name: The part of the keys before ``/group0``; see :func:`momenta` for those of either name.

    Returns:
        dict: Label to curve, such as ``'group 0'`` or ``'groups 0, 2'``.
    """
    keys = {key for line in lines for key in line if key.startswith(f'{name}/group')}
    groups = sorted(
        int(match[1]) for key in keys if (match := re.fullmatch(rf'{name}/group(\d{{1,6}})', key, re.ASCII))
    )
    found: dict[bytes, tuple[list[int], Curve]] = {}
    for group in groups:
        own = curve(lines, f'{name}/group{group}', otherwise=f'{name}/group0')
        values = (np.where(np.isnan(own.value), np.nan, own.value) + 0.0).tobytes()  # NaNs are equal, and zeros
        found.setdefault(values, ([], own))[0].append(group)
    return {f'group{"s" * (len(members) > 1)} {", ".join(map(str, members))}': own for members, own in found.values()}


def momenta(lines: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Curve], tuple[str, ...]]:
    """The momenta of all parameter groups, and what the optimizer calls them.

    Older releases wrote the first of ``betas`` as ``momentum``, too. Where a newer one resumed such a run, its lines
    tell the name.

    Returns:
        tuple: Label to curve, as from :func:`curves_by_group`; and the names, of ``'momentum'`` and ``'beta1'``: both
        if groups differ in that, none without momentum.
    """
    names: tuple[str, ...] = ()
    found = []
    for line in lines:
        own = {key: value for key, value in line.items() if key.startswith((f'{MOMENTUM}/group', f'{BETA1}/group'))}
        if own:
            names = tuple(name for name in (MOMENTUM, BETA1) if any(key.startswith(f'{name}/') for key in own))
        under_one_name = {f'{MOMENTUM}/{key.partition("/")[2]}': value for key, value in own.items()}
        found.append({key: line[key] for key in ('epoch', 'batch', 'sample')} | under_one_name)
    return curves_by_group(found, MOMENTUM), names


def is_number(value: Any) -> TypeGuard[float]:
    """Whether ``value`` is an int or a float; a boolean is none, nor is an int that no float comes near."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < _NO_FLOAT
    return isinstance(value, float)
