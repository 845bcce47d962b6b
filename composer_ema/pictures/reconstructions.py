"""What a reconstructed average is made of, as a table."""

from __future__ import annotations

from rich.table import Table

from composer_ema.pictures.tables import facts
from composer_ema.posthoc.reconstruct import Reconstruction
from composer_ema.spans import NOUNS
from composer_ema.wording import counted


def of_reconstruction(found: Reconstruction, title: str) -> Table:
    """The average, its predicted error, and what it was made of, label by label."""
    rows = {
        'average': found.target,
        'run': found.run_name,
        'at': ', '.join(counted(found.clock[unit], NOUNS[unit]) for unit in ('ba', 'ep') if found.clock.get(unit)),
        'predicted error': f'{found.predicted_error:.2%} of its distance from the weights',
    }
    for label in dict.fromkeys(part.label for part in found.parts):
        own = [part for part in found.parts if part.label == label]
        total = sum(part.coefficient for part in own)
        rows[f'made of {label}'] = f'{counted(len(own), "file")}, together {total:+.3g}'
    return facts(title, rows)


def remarks(found: Reconstruction) -> list[str]:
    """What else there is to say: files that were left out, and statistics that fit badly."""
    said = list(found.left_out)
    if found.has_statistics:
        said.append(
            "The running statistics are averages, too, as EMA's are. If the average is longer than a fifth of the run, "
            'compute those that fit it: update_bn(model, train_dataloader) after loading it.'
        )
    return said
