"""What a run did, at a glance: tables for the terminal, Markdown for a page, and a picture of the curves."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from composer_ema.recipe.recorder import Recorder, write_beside

LABELS = {'training': 'training weights', 'ema': 'average'}
# Okabe and Ito's blue and vermilion: distinct to colour-blind eyes, and of different grey when printed.
_COLOURS = {'training': '#D55E00', 'ema': '#0072B2'}
_LINES = {'training': '--', 'ema': '-'}
_MARKERS = {'training': 's', 'ema': 'o'}


@dataclass(frozen=True)
class Point:
    """One evaluation of one set of weights.

    Args:
        epoch (float): Epochs trained by then.
        accuracy (float | None): Share of right answers, in [0, 1].
        loss (float | None): Cross entropy in nats.
    """

    epoch: float
    accuracy: float | None
    loss: float | None


@dataclass(frozen=True)
class Result:
    """The outcome of one run.

    Args:
        run_name (str): The run.
        seed (int): Its seed.
        target_accuracy (float): The accuracy whose first epoch counts, in [0, 1].
        points (dict[str, list[Point]]): ``'training'`` and ``'ema'``, as far as evaluated, oldest first.
        update_share (float | None): Share of step time that averaging cost, in [0, 1].
        num_batches (int): Over how many batches that was measured.
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
    """Per evaluation: accuracy and loss of each set of weights; below: the first epoch at the target, and the cost."""
    table = Table(title=outcome.run_name, caption=_summary(outcome), caption_justify='left', title_justify='left')
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


def seeds_table(outcomes: Sequence[Result], title: str) -> Table:
    """One row per seed and a row of means."""
    header, *rows = _seeds_rows(outcomes)
    table = Table(title=title, title_justify='left')
    for name in header:
        table.add_column(name, justify='right')
    for row in rows[:-1]:
        table.add_row(*row)
    table.add_section()
    table.add_row(*rows[-1])
    return table


def seeds_markdown(outcomes: Sequence[Result]) -> str:
    """The table of :func:`seeds_table` to be pasted into a page."""
    header, *rows = _seeds_rows(outcomes)
    lines = [header, ['---:'] * len(header), *rows]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def draw_curves(outcome: Result, folder: Path) -> list[Path]:
    """Draws accuracy and loss of each set of weights over epochs, as ``curves.png`` and ``curves.svg``.

    Args:
        outcome (Result): What to draw; nothing is drawn when no weights were evaluated.
        folder (Path): Where to; each file is written beside and renamed.

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
    figure.suptitle(outcome.run_name, x=0.01, ha='left', fontsize=11)
    paths = []
    for ending in ('png', 'svg'):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=ending, dpi=150)
        write_beside(folder / f'curves.{ending}', buffer.getvalue())
        paths.append(folder / f'curves.{ending}')
    return paths


def _draw_accuracy(axes: Any, outcome: Result) -> None:
    _draw_lines(axes, outcome, lambda point: None if point.accuracy is None else 100 * point.accuracy)
    axes.set(ylabel='accuracy (%)')
    target = 100 * outcome.target_accuracy
    low, high = axes.get_ylim()
    if not low - (high - low) <= target <= high + (high - low):
        return  # far away, the line would squeeze the curves flat
    axes.axhline(target, color='0.45', linewidth=0.9, zorder=0)
    axes.annotate(
        f'{target:g} %', (1, target), xycoords=('axes fraction', 'data'), xytext=(-2, 2), textcoords='offset points',
        ha='right', va='bottom', fontsize=8, color='0.35',
    )  # fmt: skip
    axes.set_ylim(*axes.get_ylim())
    for line, weights in enumerate(outcome.points):
        _mark_first_epoch(axes, outcome, weights, line)


def _mark_first_epoch(axes: Any, outcome: Result, weights: str, line: int) -> None:
    """A drop line from the first evaluation at the target, and in words at the foot of the panel which epoch it was."""
    epoch = outcome.first_epoch(weights)
    told = f'{LABELS[weights]}: {_epoch(epoch)}' if epoch is None else f'{LABELS[weights]}: epoch {_epoch(epoch)}'
    axes.annotate(
        told, (1, 0), xycoords='axes fraction', xytext=(-4, 6 + 13 * line), textcoords='offset points',
        ha='right', color=_COLOURS[weights], fontsize=9,
    )  # fmt: skip
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
    """Header, one row per seed, and the row of means, as text."""
    evaluated = [weights for weights in LABELS if any(weights in outcome.points for outcome in outcomes)]
    target = f'{100 * outcomes[0].target_accuracy:g} %'
    columns: list[tuple[str, Callable[[float | None], str], list[float | None]]] = []
    for weights in evaluated:
        firsts = [outcome.first_epoch(weights) for outcome in outcomes]
        columns.append((f'first epoch at {target}: {LABELS[weights]}', _epoch, firsts))
    for weights in evaluated:
        finals = [outcome.final(weights).accuracy for outcome in outcomes]
        columns.append((f'final accuracy %: {LABELS[weights]}', _percent, finals))
    for weights in evaluated:
        finals = [outcome.final(weights).loss for outcome in outcomes]
        columns.append((f'final loss: {LABELS[weights]}', _loss, finals))
    columns.append(('cost, % of step time', _percent, [outcome.update_share for outcome in outcomes]))
    body = [
        [str(outcome.seed), *(show(values[i]) for _, show, values in columns)] for i, outcome in enumerate(outcomes)
    ]
    means = ['mean', *(show(_mean(values)) for _, show, values in columns)]
    return [['seed', *(name for name, _, _ in columns)], *body, means]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _summary(outcome: Result) -> str:
    target = f'{100 * outcome.target_accuracy:g} %'
    lines = [f'first epoch at {target}, {LABELS[w]}: {_epoch(outcome.first_epoch(w))}' for w in outcome.points]
    if outcome.update_share is not None:
        share = f'{100 * outcome.update_share:.2f} % of step time, measured over {outcome.num_batches} batches'
        lines.append(f'cost of the average: {share}')
    return '\n'.join(lines)


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
