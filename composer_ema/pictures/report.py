"""What a run did, as tables for the terminal, as Markdown for a page, and in words."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from composer_ema.pictures.curves import LABELS, Point, evaluations, first_reaching

if TYPE_CHECKING:  # it imports Composer, which a reader of finished runs need not wait for
    from composer_ema.recipe.run import Outcome


@dataclass(frozen=True)
class Result:
    """The outcome of one run.

    Args:
        run_name: The run.
        seed: Its seed.
        target_accuracy: The accuracy whose first epoch counts, in [0, 1].
        points: ``'training'`` and ``'ema'`` or ``'swa'``, as far as evaluated, oldest first.
        update_share: Share of step time that averaging cost, in [0, 1]; None when nothing was averaged.
        num_batches: Over how many batches that was measured.
    """

    run_name: str
    seed: int
    target_accuracy: float
    points: dict[str, list[Point]]
    update_share: float | None = None
    num_batches: int = 0

    def first_epoch(self, weights: str) -> float | None:
        """The epoch of the first evaluation at or above the target; None when it was not reached.

        Example:
            >>> Result('r', 1, 0.9, {'ema': [Point(1, 0.88, 0.3), Point(2, 0.90, 0.3)]}).first_epoch('ema')
            2
        """
        first = first_reaching(self.points.get(weights, []), self.target_accuracy)
        return None if first is None else first.epoch

    def final(self, weights: str) -> Point:
        """The last evaluation; a point of Nones when there was none."""
        points = self.points.get(weights, [])
        return points[-1] if points else Point(0.0, None, None)


def result(outcome: Outcome) -> Result:
    """The evaluations of a run as points, and what averaging cost."""
    return Result(
        run_name=outcome.run_name,
        seed=outcome.seed,
        target_accuracy=outcome.target_accuracy,
        points=evaluations(outcome.evaluations),
        update_share=outcome.update_share,
        num_batches=outcome.num_batches,
    )


def parts_table(parts: Mapping[str, str]) -> Table:
    """What a recipe builds, one row for each kind of part."""
    table = Table(title='built, not trained', title_justify='left', show_header=False)
    for kind, words in parts.items():
        table.add_row(kind, words)
    return table


def epochs_table(outcome: Result) -> Table:
    """Per evaluation: accuracy and loss of each set of weights."""
    table = Table(title=outcome.run_name, title_justify='left')
    table.add_column('epoch', justify='right')
    for weights in outcome.points:
        table.add_column(f'accuracy %\n{LABELS[weights]}', justify='right')
    for weights in outcome.points:
        table.add_column(f'loss\n{LABELS[weights]}', justify='right')
    by_epoch = {w: {point.epoch: point for point in points} for w, points in outcome.points.items()}
    for epoch in sorted({epoch for points in by_epoch.values() for epoch in points}):
        row = [points.get(epoch, Point(epoch, None, None)) for points in by_epoch.values()]
        table.add_row(f'{epoch:g}', *(_percent(p.accuracy) for p in row), *(_loss(p.loss) for p in row))
    return table


def summary(outcome: Result) -> str:
    """In words: the first epoch at which each set of weights reached the target, and what averaging cost."""
    lines = [
        f'first epoch at {_target(outcome)}, {LABELS[w]}: {_epoch(outcome.first_epoch(w))}' for w in outcome.points
    ]
    if outcome.update_share is not None:
        share = f'{100 * outcome.update_share:.2f} % of step time, measured over {outcome.num_batches} batches'
        lines.append(f'cost of the average: {share}')
    return '\n'.join(lines)


def seeds_table(outcomes: Sequence[Result], title: str) -> Table:
    """Per seed, and for the mean over seeds, one row for each set of weights."""
    header, *rows = _seeds_rows(outcomes)
    table = Table(title=title, title_justify='left')
    for name in header:
        table.add_column(name, justify='left' if name == 'weights' else 'right', no_wrap=name == 'weights')
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(*row, end_section=following is not None and following[0] != row[0])
    return table


def seeds_markdown(outcomes: Sequence[Result]) -> str:
    """The table of :func:`seeds_table` to be pasted into a page."""
    header, *rows = _seeds_rows(outcomes)
    rule = [':---' if name == 'weights' else '---:' for name in header]
    return ''.join(f'| {" | ".join(line)} |\n' for line in (header, rule, *rows))


def _seeds_rows(outcomes: Sequence[Result]) -> list[list[str]]:
    """Header, then a row for each seed and set of weights, then the means, as text."""
    header = ['seed', 'weights', f'first epoch at {_target(outcomes[0])}', 'final accuracy %', 'final loss']
    evaluated = [weights for weights in LABELS if any(weights in outcome.points for outcome in outcomes)]
    rows = [_seeds_row(str(outcome.seed), weights, [outcome]) for outcome in outcomes for weights in evaluated]
    means = [_seeds_row('mean', weights, outcomes) for weights in evaluated]
    return [[*header, 'cost, % of step time'], *rows, *means]


def _seeds_row(seed: str, weights: str, outcomes: Sequence[Result]) -> list[str]:
    """Means over the outcomes; a mean of first epochs exists only if all of them do."""
    finals = [outcome.final(weights) for outcome in outcomes]
    first_epochs = [outcome.first_epoch(weights) for outcome in outcomes]
    is_partial = None in first_epochs and any(epoch is not None for epoch in first_epochs)
    return [
        seed,
        LABELS[weights],
        'not by all' if is_partial else _epoch(_mean(first_epochs)),
        _percent(_mean([point.accuracy for point in finals])),
        _loss(_mean([point.loss for point in finals])),
        _percent(_mean([outcome.update_share for outcome in outcomes])) if weights != 'training' else '',
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _target(outcome: Result) -> str:
    return f'{100 * outcome.target_accuracy:g} %'


def _percent(share: float | None) -> str:
    return '–' if share is None else f'{100 * share:.2f}'


def _loss(loss: float | None) -> str:
    return '–' if loss is None else f'{loss:.4f}'


def _epoch(epoch: float | None) -> str:
    return 'not reached' if epoch is None else f'{round(epoch, 2):g}'
