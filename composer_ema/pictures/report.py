"""What a run did, as tables for the terminal, as Markdown for a page, and in words."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from composer_ema.pictures.curves import Point, evaluations, first_reaching, metrics_of
from composer_ema.pictures.tables import facts, number
from composer_ema.pictures.weights import TRAINING, averages, in_words
from composer_ema.recipe.metrics import Goal, Report, is_share, titles
from composer_ema.wording import counted, visible

if TYPE_CHECKING:  # it imports Composer, which a reader of finished runs need not wait for
    from composer_ema.recipe.run import Outcome


@dataclass(frozen=True)
class Result:
    """What one run came to.

    Args:
        run_name: The run.
        seed: Its seed.
        report: Which metric counts, and the target whose first epoch is told.
        points: Label of a set of weights to its evaluations, oldest first. ``'training'`` comes first.
        update_share: Share of step time spent on averaging, in [0, 1]; None if nothing was averaged. Default: None.
        num_batches: Number of batches over which ``update_share`` was measured. Default: 0.
    """

    run_name: str
    seed: int
    report: Report
    points: dict[str, list[Point]]
    update_share: float | None = None
    num_batches: int = 0

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics, in the order of tables."""
        return self.report.in_order(metrics_of(self.points))

    @property
    def goal(self) -> Goal | None:
        """What the run is to reach; None where it measured nothing that a target is given for."""
        return self.report.goal(metrics_of(self.points))

    def first_epoch(self, weights: str) -> float | None:
        """The epoch of the first evaluation as good as the goal; None if the run did not reach it, or has none.

        Example:
            >>> points = [Point(1, {'Accuracy': 0.88}), Point(2, {'Accuracy': 0.90})]
            >>> Result('r', 1, Report(target_accuracy=0.9), {'ema': points}).first_epoch('ema')
            2
        """
        first = None if self.goal is None else first_reaching(self.points.get(weights, []), self.goal)
        return None if first is None else first.epoch

    def final(self, weights: str) -> Point:
        """The last evaluation; a point without metrics if there was none."""
        points = self.points.get(weights, [])
        return points[-1] if points else Point(0.0, {})


def result(outcome: Outcome) -> Result:
    """The evaluations of a run as points, and what averaging cost."""
    return Result(
        run_name=outcome.run_name,
        seed=outcome.seed,
        report=outcome.report,
        points=evaluations(outcome.evaluations),
        update_share=outcome.update_share,
        num_batches=outcome.num_batches,
    )


def parts_table(parts: Mapping[str, str]) -> Table:
    """What a recipe builds, one row for each kind of part."""
    return facts('built, not trained', parts)


def epochs_table(outcome: Result) -> Table:
    """The metrics of each set of weights, one row per evaluation."""
    words = in_words(outcome.points)
    table = Table(title=outcome.run_name, title_justify='left')
    table.add_column('epoch', justify='right')
    for heading in _headings(outcome.metrics).values():
        for label in outcome.points:
            table.add_column(f'{heading}\n{words[label]}', justify='right')
    by_epoch = [{point.epoch: point for point in points} for points in outcome.points.values()]
    for epoch in sorted({epoch for points in by_epoch for epoch in points}):
        row = [points.get(epoch, Point(epoch, {})) for points in by_epoch]
        cells = (_cell(name, point.metrics.get(name)) for name in outcome.metrics for point in row)
        table.add_row(f'{round(epoch, 3):g}', *cells)
    return table


def summary(outcome: Result) -> str:
    """In words: the first epoch at which each set of weights reached the target, and what averaging cost."""
    lines = [
        f'first epoch at {goal}, {words}: {_epoch(outcome.first_epoch(label))}'
        for goal in filter(None, [outcome.goal])
        for label, words in in_words(outcome.points).items()
    ]
    if outcome.update_share is not None:
        share = (
            f'{100 * outcome.update_share:.2f} % of step time, measured over {counted(outcome.num_batches, "batch")}'
        )
        lines.append(f'cost of the average{"s" * (len(averages(outcome.points)) > 1)}: {share}')
    return '\n'.join(lines)


def seeds_table(outcomes: Sequence[Result], title: str) -> Table:
    """One row for each set of weights, per seed and for the mean over seeds."""
    header, *rows = _seeds_rows(outcomes)
    table = Table(title=title, title_justify='left')
    for name in header:
        table.add_column(name, justify='left' if name == 'weights' else 'right', no_wrap=name == 'weights')
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(*row, end_section=following is not None and following[0] != row[0])
    return table


def seeds_markdown(outcomes: Sequence[Result]) -> str:
    """The table of :func:`seeds_table` in Markdown."""
    header, *rows = _seeds_rows(outcomes)
    rule = [':---' if name == 'weights' else '---:' for name in header]
    cells = ([visible(cell).replace('|', r'\|') for cell in line] for line in (header, rule, *rows))
    return ''.join(f'| {" | ".join(line)} |\n' for line in cells)


def _seeds_rows(outcomes: Sequence[Result]) -> list[list[str]]:
    """The header, a row for each seed and set of weights, then the means, as text."""
    metrics = list(dict.fromkeys(name for outcome in outcomes for name in outcome.metrics))
    goal = next(filter(None, (outcome.goal for outcome in outcomes)), None)
    header = ['seed', 'weights', *([] if goal is None else [f'first epoch at {goal}'])]
    header += [f'final {heading}' for heading in _headings(metrics).values()]
    evaluated = in_words(label for outcome in outcomes for label in outcome.points)
    by_seed = [(str(outcome.seed), [outcome]) for outcome in outcomes]
    rows = [
        [seed, words, *([] if goal is None else [_mean_epoch(label, of_seed)]), *_seeds_cells(label, metrics, of_seed)]
        for seed, of_seed in [*by_seed, ('mean', outcomes)]
        for label, words in evaluated.items()
    ]
    return [[*header, 'cost, % of step time'], *rows]


def _mean_epoch(label: str, outcomes: Sequence[Result]) -> str:
    """The mean of the first epochs, if every outcome has one."""
    first_epochs = [outcome.first_epoch(label) for outcome in outcomes]
    is_partial = None in first_epochs and any(epoch is not None for epoch in first_epochs)
    return 'not by all' if is_partial else _epoch(_mean(first_epochs))


def _seeds_cells(label: str, metrics: Sequence[str], outcomes: Sequence[Result]) -> list[str]:
    """Means over the outcomes."""
    finals = [outcome.final(label) for outcome in outcomes]
    means = [_cell(name, _mean([point.metrics.get(name) for point in finals])) for name in metrics]
    return [*means, _percent(_mean([outcome.update_share for outcome in outcomes])) if label != TRAINING else '']


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _headings(metrics: Sequence[str]) -> dict[str, str]:
    return {name: f'{title} %' if is_share(name) else title for name, title in titles(metrics).items()}


def _cell(metric: str, value: float | None) -> str:
    if value is None:
        return '–'
    return _percent(value) if is_share(metric) else number(value)


def _percent(share: float | None) -> str:
    return '–' if share is None else f'{100 * share:.2f}'


def _epoch(epoch: float | None) -> str:
    return 'not reached' if epoch is None else f'{round(epoch, 2):g}'
