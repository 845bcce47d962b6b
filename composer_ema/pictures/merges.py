"""What a merge of checkpoints is made of, as a table."""

from __future__ import annotations

from rich.table import Table

from composer_ema.model.names import listed
from composer_ema.posthoc.merge import Merged
from composer_ema.spans import UNITS
from composer_ema.wording import counted


def of_merge(merged: Merged) -> Table:
    """One row for each checkpoint, the oldest first: its training time and its coefficient."""
    first = merged.parts[0].trained
    units = [unit for unit in first if all(part.trained.get(unit) for part in merged.parts[1:])]
    has_runs = len({part.run_name for part in merged.parts}) > 1
    table = Table(title=f'{merged.out}: {merged.weights}', title_justify='left')
    table.add_column('checkpoint', overflow='fold')
    if has_runs:
        table.add_column('run', overflow='fold')
    for unit in units:
        table.add_column(UNITS[unit], justify='right')
    table.add_column('coefficient', justify='right')
    for part in merged.parts:
        run = [part.run_name or ''] if has_runs else []
        times = [f'{part.trained[unit]:,.10g}' for unit in units]
        table.add_row(str(part.path), *run, *times, f'{part.coefficient:.6f}')
    return table


def remarks(merged: Merged) -> list[str]:
    """What to do with the merge."""
    lines = [f'written: {merged.out}']
    if merged.batchnorm:
        layers = counted(len(merged.batchnorm), 'BatchNorm layer')
        lines.append(
            f'Merged statistics fit merged weights badly: {layers} ({listed(merged.batchnorm, limit=3)}). Compute them '
            'anew: model.load_state_dict(load_average(file, model)), then update_bn(model, train_dataloader).'
        )
    return lines
