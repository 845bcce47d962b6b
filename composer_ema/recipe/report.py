"""What a run did, at a glance: tables for the terminal, Markdown for a page, and a picture of the curves."""

from __future__ import annotations

import io
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from composer_ema.files import write_beside
from composer_ema.recipe.recorder import Recorder

LABELS = {'training': 'training weights', 'ema': 'average'}
# Okabe and Ito's blue and vermilion: distinct to colour-blind eyes, and of different grey when printed.
_COLOURS = {'training': '#D55E00', 'ema': '#0072B2'}
_LINES = {'training': '--', 'ema': '-'}
_MARKERS = {'training': 's', 'ema': 'o'}
# As many characters as fit: over the picture at 11 points, over one of its two panels at 9.
_PICTURE_CHARACTERS, _PANEL_CHARACTERS = 80, 52


@dataclass(frozen=True)
class Point:
    """One evaluation of one set of weights.

    Args:
        epoch: Epochs trained by then.
        accuracy: Share of right answers, in [0, 1].
        loss: Cross entropy in nats.
    """

    epoch: float
    accuracy: float | None
    loss: float | None


@dataclass(frozen=True)
class Result:
    """The outcome of one run.

    Args:
        run_name: The run.
        seed: Its seed.
        target_accuracy: The accuracy whose first epoch counts, in [0, 1].
        points: ``'training'`` and ``'ema'``, as far as evaluated, oldest first.
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
        points = [point for point in self.points.get(weights, []) if point.accuracy is not None]
        return next((point.epoch for point in points if self._reaches_target(point)), None)

    def _reaches_target(self, point: Point) -> bool:
        # Metrics are float32, where 9 of 10 right answers are 0.8999999762: allow for its rounding.
        return point.accuracy is not None and point.accuracy >= self.target_accuracy - 1e-6

    def final(self, weights: str) -> Point:
        """The last evaluation; a point of Nones when there was none."""
        points = self.points.get(weights, [])
        return points[-1] if points else Point(0.0, None, None)


def result(recorder: Recorder, *, run_name: str, seed: int, target_accuracy: float) -> Result:
    """Reads the outcome of a run from what its recorder wrote down."""
    points: dict[str, list[Point]] = {}
    for line in recorder.evaluations:
        for weights in LABELS:
            metrics = _metrics(line, f'metrics/eval_{weights}/')
            if metrics:
                accuracy, loss = _first(metrics, 'Accuracy'), _first(metrics, 'CrossEntropy')
                points.setdefault(weights, []).append(Point(line['epoch'], accuracy, loss))
    return Result(run_name, seed, target_accuracy, points, recorder.update_share, recorder.num_batches)


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


def draw_curves(outcome: Result, folder: Path) -> list[Path]:
    """Draws accuracy and loss of each set of weights over epochs, as ``curves.png`` and ``curves.svg``.

    Args:
        outcome: What to draw; nothing is drawn when no weights were evaluated.
        folder: Where to; each file is written beside and renamed.

    Returns:
        list[Path]: The files.
    """
    # matplotlib takes a second to import, and most of what imports this module never draws.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not outcome.points:
        return []
    figure = Figure(figsize=(9, 4), layout='constrained')
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_accuracy(left, outcome)
    _draw_loss(right, outcome)
    figure.suptitle(textwrap.fill(outcome.run_name, _PICTURE_CHARACTERS), x=0.01, ha='left', fontsize=11)
    paths = []
    for ending in ('png', 'svg'):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=ending, dpi=150)
        write_beside(folder / f'curves.{ending}', buffer.getvalue())
        paths.append(folder / f'curves.{ending}')
    return paths


def _draw_accuracy(axes: Any, outcome: Result) -> None:
    _draw_lines(axes, outcome, lambda point: None if point.accuracy is None else 100 * point.accuracy)
    firsts = ', '.join(f'{LABELS[weights]} {_epoch(outcome.first_epoch(weights))}' for weights in outcome.points)
    axes.set(ylabel='accuracy (%)')
    title = f'first epoch at {_target(outcome)}: {firsts}'
    axes.set_title(title if len(title) <= _PANEL_CHARACTERS else title.replace(': ', ':\n'), loc='left', fontsize=9)
    target = 100 * outcome.target_accuracy
    low, high = axes.get_ylim()
    if not low - (high - low) <= target <= high + (high - low):
        return  # far away, the line would squeeze the curves flat
    axes.axhline(target, color='0.45', linewidth=0.9, zorder=0)
    # At the left end, where a curve is still far below its target.
    axes.annotate(
        _target(outcome), (0, target), xycoords=('axes fraction', 'data'), xytext=(3, 3), textcoords='offset points',
        fontsize=9, color='0.35',
    )  # fmt: skip
    axes.set_ylim(*axes.get_ylim())
    for weights in outcome.points:
        _drop_line(axes, outcome, weights)


def _drop_line(axes: Any, outcome: Result, weights: str) -> None:
    """A line from the first evaluation at the target down to the axis."""
    epoch = outcome.first_epoch(weights)
    if epoch is not None:
        height = next(100 * (point.accuracy or 0.0) for point in outcome.points[weights] if point.epoch == epoch)
        axes.vlines(epoch, axes.get_ylim()[0], height, color=_COLOURS[weights], linestyle=':', linewidth=1.4, zorder=0)


def _draw_loss(axes: Any, outcome: Result) -> None:
    _draw_lines(axes, outcome, lambda point: point.loss)
    axes.set(ylabel='loss (cross entropy, nats)')
    axes.legend(frameon=False, fontsize=9)


def _draw_lines(axes: Any, outcome: Result, value: Callable[[Point], float | None]) -> None:
    from matplotlib.ticker import MaxNLocator

    for weights, points in outcome.points.items():
        drawn = [(point.epoch, number) for point in points if (number := value(point)) is not None]
        axes.plot(
            [epoch for epoch, _ in drawn], [number for _, number in drawn], label=LABELS[weights], markersize=4,
            color=_COLOURS[weights], linestyle=_LINES[weights], marker=_MARKERS[weights], linewidth=1.8,
        )  # fmt: skip
    axes.set(xlabel='epoch')
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.spines[['top', 'right']].set_visible(False)


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
        _percent(_mean([outcome.update_share for outcome in outcomes])) if weights == 'ema' else '',
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _target(outcome: Result) -> str:
    return f'{100 * outcome.target_accuracy:g} %'


def _metrics(line: dict[str, Any], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}


def _first(metrics: dict[str, float], part: str) -> float | None:
    return next((value for name, value in metrics.items() if part in name), None)


def _percent(share: float | None) -> str:
    return '–' if share is None else f'{100 * share:.2f}'


def _loss(loss: float | None) -> str:
    return '–' if loss is None else f'{loss:.4f}'


def _epoch(epoch: float | None) -> str:
    return 'not reached' if epoch is None else f'{round(epoch, 2):g}'
