"""Shows what a checkpoint holds, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from composer_ema.checkpoints import inspection
from composer_ema.checkpoints.inspection import AverageInfo, Description, TensorInfo
from composer_ema.wording import figure

# Settings that decide how far back an average reaches, in the order in which they are shown.
_HORIZON = (
    'half_life', 'smoothing', 'decay', 'power', 'gamma', 'average', 'warmup', 'bias_correction', 'equal', 'schedule',
    'merged_by', 'predicted_error', 'ema_start', 'swa_start', 'start', 'update_interval', 'every_n_steps', 'avg_fn',
    'multi_avg_fn', 'kept_for',
)  # fmt: skip
_NOT_SAID = (None, False, 'exponential')
_SLOT = {
    inspection.TRAINING_WEIGHTS: 'training weights',
    inspection.AVERAGE: 'the average; the training weights are in the stash beside the average',
    inspection.SAME: 'weights that equal the average',
    inspection.ABSENT: 'none in the file, or none that fits',
    inspection.NOT_READ: 'not read: a file of another library',
    inspection.UNKNOWN: 'weights; nothing in the file tells whether they are an average',
}


def of_checkpoint(found: Description, *, all_tensors: bool = False) -> Iterator[Table]:
    """Yields a table of the checkpoint, then one of the tensors of each average, or of the model if it has none.

    Args:
        found: The checkpoint, from ``inspection.describe``.
        all_tensors: Whether to list every tensor. Default: False, which counts them by role and dtype.
    """
    yield _overview(found)
    tensors = _every_tensor if all_tensors else _summary
    for alike in _alike(found.averages, all_tensors=all_tensors):
        names = ', '.join(_name(average, is_one_of_several=len(found.averages) > 1) for average in alike)
        yield tensors(f'tensors of the {"average" if len(alike) == 1 else "averages"} {names}', alike[0].tensors)
    if not found.averages:
        yield tensors('tensors of the model', found.tensors)


def _alike(averages: Sequence[AverageInfo], *, all_tensors: bool) -> list[list[AverageInfo]]:
    """The averages whose tables of tensors would be the same, together; with all tensors, each has its distances."""
    if all_tensors:
        return [[average] for average in averages]
    groups: dict[tuple[Any, ...], list[AverageInfo]] = {}
    for average in averages:
        groups.setdefault(tuple(inspection.summarise(average.tensors)), []).append(average)
    return list(groups.values())


def _name(average: AverageInfo, *, is_one_of_several: bool) -> str:
    if not is_one_of_several:
        return f'by {average.algorithm}'
    where = f' under {average.key}' if average.key else ''
    return f'{f"{average.label} " if average.label else ""}by {average.algorithm}{where}'


def _overview(found: Description) -> Table:
    table = Table(title=found.path, title_justify='left', show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow='fold')
    _add(table, 'run', found.run_name)
    if found.trained:
        trained = ', '.join(_counted(count, unit) for unit, count in found.trained.items() if count)
        _add(table, 'trained', trained or 'nothing')
    slot = _SLOT[found.model_slot]
    if found.has_stash and found.model_slot == inspection.TRAINING_WEIGHTS:
        slot += '; saved while a model held the average, but they are the stash'
    _add(table, 'model slot', slot)
    for average in found.averages:
        _add_average(table, average, is_one_of_several=len(found.averages) > 1)
    if not found.averages:
        _add(table, 'average', 'none')
    _add(table, 'state of', ', '.join([*found.optimizers, *found.schedulers, *found.algorithms, *found.callbacks]))
    _add(table, 'saved by', ', '.join(f'{name} {version}' for name, version in found.versions.items()))
    _add(table, 'size', _size(found.num_bytes))
    return table


def _add_average(table: Table, average: AverageInfo, *, is_one_of_several: bool) -> None:
    horizon = [f'{name}={value}' for name in _HORIZON if (value := average.config.get(name)) not in _NOT_SAID]
    is_foreign = average.written_as.startswith(average.algorithm)
    _add(table, 'key', average.key)
    label = f'{average.label} of ' if average.label and is_one_of_several else ''
    written_by = f'{"" if is_foreign else f"{average.algorithm}, "}written by {average.written_as}'
    _add(table, 'average', f'{label}{written_by}')
    _add(table, '  horizon', ', '.join(horizon) or 'not kept by this format')
    if not average.is_started:
        _add(table, '  updates', 'none yet')
        return
    _add(
        table, '  updates', 'not counted by this format' if average.num_updates is None else f'{average.num_updates:,}'
    )
    last = average.last_update or {}
    _add(table, '  last update', ', '.join(f'{figure(count)}{unit}' for unit, count in last.items() if count))
    if average.relative_distance is not None:
        _add(table, '  distance', f'{average.relative_distance:.4g} of the norm of the training weights')


def _add(table: Table, name: str, value: str | None) -> None:
    if value:
        table.add_row(name, value)


def _summary(title: str, tensors: Sequence[TensorInfo]) -> Table:
    table = _new_table(title, 'role', 'dtype', numbers=('tensors', 'elements', 'in the model slot', 'average'))
    for share in inspection.summarise(tensors):
        sizes = (_size(share.num_bytes), _size(share.average_bytes))
        table.add_row(share.role, share.dtype, f'{share.num_tensors:,}', f'{share.num_elements:,}', *sizes)
    return table


def _every_tensor(title: str, tensors: Sequence[TensorInfo]) -> Table:
    table = _new_table(title, 'name', 'role', 'dtype', numbers=('shape', 'model slot', 'average', 'distance'))
    for tensor in tensors:
        distance = '' if tensor.relative_distance is None else f'{tensor.relative_distance:.4g}'
        shape = ' × '.join(map(str, tensor.shape)) or 'scalar'
        row = (
            tensor.role,
            inspection.dtypes(tensor),
            shape,
            _size(tensor.num_bytes),
            _size(tensor.average_bytes),
            distance,
        )
        table.add_row(tensor.name, *row)
    return table


def _new_table(title: str, *headers: str, numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify='left')
    for header in headers:
        table.add_column(header)
    for header in numbers:
        table.add_column(header, justify='right', no_wrap=True)
    return table


def _counted(count: int, unit: str) -> str:
    many = {'batch': 'batches'}.get(unit, f'{unit}s')
    return f'{count:,} {unit if count == 1 else many}'


def _size(num_bytes: int) -> str:
    """A number of bytes in three digits and a unit; empty for 0.

    Example:
        >>> _size(999), _size(1500), _size(437_000), _size(25_600_000)
        ('999 B', '1.5 kB', '437 kB', '25.6 MB')
    """
    if num_bytes == 0:
        return ''
    value, units = float(num_bytes), ('B', 'kB', 'MB', 'GB', 'TB')
    for unit in units[:-1]:
        if value < 999.5:
            return f'{value:.3g} {unit}'
        value /= 1000
    return f'{value:.3g} {units[-1]}'
