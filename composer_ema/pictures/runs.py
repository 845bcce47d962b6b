"""The picture of what runs did: loss, metrics, learning rate, momentum, and how far averages lie from the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from composer_ema.pictures import canvas
from composer_ema.pictures.canvas import XY, Panel, limit_to, literally, mark_gaps, note, plot, stretch
from composer_ema.pictures.curves import RunCurves, first_reaching
from composer_ema.pictures.rates import MOMENTA, RATES
from composer_ema.pictures.smoothing import smoothed
from composer_ema.pictures.style import GREY, VERMILION, Pen, Stroke, covered, covered_if_few, few, strokes, with_pens
from composer_ema.pictures.weights import in_words
from composer_ema.recipe.metrics import Goal, Report, is_share, scaled, titles
from composer_ema.run_folder.outputs import Array, Axis

if TYPE_CHECKING:  # matplotlib takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_IN_A_ROW = 3


def draw_runs(runs: Sequence[RunCurves], *, axis: Axis | None = None) -> Figure:
    """Draws runs over one another, each panel for which one of them has data.

    Args:
        runs: At least one; their names label them.
        axis: What to draw over. Default: epochs if every run has trained for at least one, else batches.
    """
    axis = _natural_axis(runs) if axis is None else axis
    title = runs[0].name if len(runs) == 1 else None
    return canvas.draw(_panels(runs), runs, axis=axis, end=_end(runs, axis), legend=_legend, title=title)


def _natural_axis(runs: Sequence[RunCurves]) -> Axis:
    return 'epoch' if all(_end([run], 'epoch') >= 1 and _has_fractions(run) for run in runs) else 'batch'


def _has_fractions(run: RunCurves) -> bool:
    """Whether epochs grow from batch to batch. They do not if the run did not know the length of an epoch."""
    return len(run.loss) < 2 or bool(np.any(run.loss.epoch % 1))


def _end(runs: Sequence[RunCurves], axis: Axis) -> float:
    ends = [getattr(point, axis) for run in runs for points in run.evaluations.values() for point in points]
    ends += [curve.over(axis)[-1] for run in runs for curve in (run.loss, *run.rates.values()) if len(curve)]
    return float(max(ends, default=0))


def _strokes(runs: Sequence[RunCurves]) -> dict[str, Stroke]:
    return strokes(label for run in runs for label in run.weights)


def _draw_training_loss(axes: Axes, runs: Sequence[RunCurves], axis: Axis) -> None:
    shown = [(run, pen, *smoothed(run.loss.value)) for run, pen in with_pens(runs) if len(run.loss)]
    drawn = [(run.loss.over(axis), values) for run, _, values, _ in shown]
    widths = {width for *_, width in shown}
    each_batch: Array | None = None
    for (run, pen, values, width), (x, _), size in zip(shown, drawn, covered_if_few(drawn), strict=True):
        if len(runs) > 1:
            plot(axes, x, values, **pen.along() | size)
            continue
        if width > 1:
            # As a picture inside an SVG: every batch of a long run would be a megabyte of path.
            axes.plot(x, run.loss.value, color='0.8', linewidth=0.6, rasterized=len(x) > 2000, zorder=1)
            each_batch = run.loss.value
        axes.plot(x, values, color=VERMILION, marker=few(run.loss, 's'), markersize=4)
    axes.set_ylabel('training loss')
    limit_to(axes, drawn, each_batch)
    if widths != {1}:
        over = f'{max(widths)} batches' if len(widths) == 1 else f'2 % of a run, {min(widths - {1})} batches or more'
        note(axes, f'mean over {over}' + (', each batch in grey' if len(runs) == 1 else ''))
    batches = [(x, run.loss.value) for (run, *_), (x, _) in zip(shown, drawn, strict=True)]
    mark_gaps(axes, batches, [pen.colour if len(runs) > 1 else VERMILION for _, pen, *_ in shown])


def _draw_metric(metric: str, title: str, axes: Axes, runs: Sequence[RunCurves], axis: Axis) -> None:
    """Draws one metric of all weights; and the goal, where that is about this metric and the same for all runs."""
    drawn = _draw_points(axes, runs, axis, metric)
    if is_share(metric):
        axes.set_ylabel(literally(f'{title} (%)'))
    else:
        stretch(axes, drawn)
        axes.set_ylabel('evaluation loss (nats)' if title == 'loss' else literally(title))
    goals = {run.goal for run in runs if run.goal is not None and run.goal.metric == metric}
    if len(goals) == 1:
        _draw_goal(axes, runs, axis, goals.pop())


def _draw_points(axes: Axes, runs: Sequence[RunCurves], axis: Axis, metric: str) -> list[XY]:
    """Draws the evaluations of all weights in one metric, and returns what it drew."""
    of_weights = _strokes(runs)
    lines, drawn = [], []
    for run, pen in with_pens(runs):
        for label, points in run.evaluations.items():
            known = [
                (getattr(point, axis), scaled(metric, point.metrics[metric]))
                for point in points
                if metric in point.metrics
            ]
            x, y = np.asarray(known, dtype=np.float64).reshape(-1, 2).T
            stroke = of_weights[label]
            if len(runs) > 1:
                stroke = Stroke(pen.colour, pen.marker, stroke.dashes, stroke.is_hollow)
            lines.append((stroke, pen))
            drawn.append((x, y))
    _draw_lines(axes, lines, drawn)
    return drawn


def _draw_lines(axes: Axes, lines: Sequence[tuple[Stroke, Pen]], drawn: Sequence[XY]) -> None:
    for (stroke, pen), (x, y), size in zip(lines, drawn, covered(drawn), strict=True):
        plot(
            axes, x, y, color=stroke.colour, linestyle=stroke.dashes, marker=stroke.marker, markerfacecolor=stroke.face,
            **pen.sparse(len(x)) | size,
        )  # fmt: skip
    mark_gaps(axes, drawn, [stroke.colour for stroke, _ in lines])


def _draw_goal(axes: Axes, runs: Sequence[RunCurves], axis: Axis, goal: Goal) -> None:
    """Draws a line at the goal, unless it is so far away that it would squeeze the curves."""
    low, high = axes.get_ylim()
    height = scaled(goal.metric, goal.value)
    if not low - (high - low) <= height <= high + (high - low):
        return
    axes.axhline(height, color='0.45', linewidth=0.9, zorder=0)
    # At the left end, where a curve is still far from its goal.
    axes.annotate(
        f'{height:g} %' if is_share(goal.metric) else f'{height:g}', (0, height), xycoords=('axes fraction', 'data'),
        xytext=(3, 3), textcoords='offset points', fontsize=8, color=GREY,
    )  # fmt: skip
    low, high = axes.get_ylim()
    if goal.lower_is_better:
        axes.set_ylim(min(low, height - 0.1 * (high - height)), high)
    else:
        axes.set_ylim(low, max(high, height + 0.1 * (height - low)))
    low, _ = axes.get_ylim()
    if len(runs) == 1:
        _draw_first_reaching(axes, runs[0], axis, goal, low)


def _draw_first_reaching(axes: Axes, run: RunCurves, axis: Axis, goal: Goal, low: float) -> None:
    of_weights = _strokes([run])
    firsts = {label: point for label, points in run.evaluations.items() if (point := first_reaching(points, goal))}
    at: dict[float, list[str]] = {}
    for label, first in firsts.items():
        at.setdefault(getattr(first, axis), []).append(label)
    for x, labels in at.items():
        for index, label in enumerate(labels):  # dots in turn, where several lines stand at one place
            dots = (2.4 * index, (1.2, 2.4 * len(labels) - 1.2))
            top, colour = scaled(goal.metric, firsts[label].metrics[goal.metric]), of_weights[label].colour
            axes.vlines(x, low, top, color=colour, linestyle=dots, linewidth=1.2)


def _draw_distances(axes: Axes, runs: Sequence[RunCurves], axis: Axis) -> None:
    of_weights = _strokes(runs)
    lines, drawn = [], []
    for run, pen in with_pens(runs):
        for label, curve in run.distances.items():
            stroke = of_weights[label]
            if len(runs) > 1:
                stroke = Stroke(pen.colour, pen.marker, stroke.dashes if len(run.distances) > 1 else '-')
            lines.append((stroke, pen))
            drawn.append((curve.over(axis), curve.value))
    _draw_lines(axes, lines, drawn)
    axes.set_ylabel('distance of the average from\nthe weights, share of their norm')
    if not stretch(axes, drawn, only_rise=True):
        highest = max((y[np.isfinite(y)].max(initial=0.0) for _, y in drawn), default=0.0)
        axes.set_ylim(0, 1.08 * highest or 1)


def _panels(runs: Sequence[RunCurves]) -> list[list[Panel[Any]]]:
    """Rows of panels: the losses, with those of training first, then the other metrics, then what drives the run."""
    report = next((run.report for run in runs if run.report is not None), Report())
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))
    metrics.sort(key=lambda name: (name != report.metric, not report.is_lower_better(name)))
    words = titles(metrics)
    shown: list[Panel[Any]] = [
        Panel(_draw_training_loss, lambda run: len(run.loss) > 0),
        *(Panel(partial(_draw_metric, name, words[name]), _measures(name)) for name in metrics),
    ]
    rows = [shown[start : start + _IN_A_ROW] for start in range(0, len(shown), _IN_A_ROW)]
    return [*rows, [RATES, MOMENTA, Panel(_draw_distances, lambda run: bool(run.distances))]]


def _measures(metric: str) -> Callable[[RunCurves], bool]:
    return lambda run: metric in run.metrics


def _legend(runs: Sequence[RunCurves]) -> list[tuple[Line2D, str]]:
    """A line for each of several runs, then one for each set of weights that was evaluated."""
    from matplotlib.lines import Line2D

    entries = []
    if len(runs) > 1:
        for run, pen in with_pens(runs):
            line = Line2D([], [], color=pen.colour, marker=pen.marker, markersize=4.5)
            entries.append((line, f'{run.name}{_equal_to(run, runs)}'))
    of_weights = _strokes(runs)
    for label, words in in_words(label for run in runs for label in run.evaluations).items():
        stroke = of_weights[label]
        if len(runs) > 1:
            stroke = Stroke(GREY, 'o', stroke.dashes, stroke.is_hollow)
        line = Line2D(
            [], [], color=stroke.colour, marker=stroke.marker, linestyle=stroke.dashes, markersize=4.5,
            markerfacecolor=stroke.face,
        )  # fmt: skip
        entries.append((line, f'evaluated: {words}{_first_epoch(runs, label)}'))
    return entries


def _equal_to(run: RunCurves, runs: Sequence[RunCurves]) -> str:
    """The first run that trained and evaluated exactly like this one, if that is another; its curves are covered."""

    def trace(each: RunCurves) -> tuple[bytes, str]:
        return each.loss.value.tobytes(), repr(each.evaluations)  # both hold where NaN does not equal itself

    first = next(each for each in runs if trace(each) == trace(run))
    return '' if first is run else f' = {first.name}'


def _first_epoch(runs: Sequence[RunCurves], label: str) -> str:
    """When a single run first reached its goal, in words; nothing for several runs."""
    goal = runs[0].goal
    if len(runs) > 1 or goal is None or all(goal.metric not in point.metrics for point in runs[0].evaluations[label]):
        return ''
    first = first_reaching(runs[0].evaluations[label], goal)
    return f', {"never" if first is None else f"in epoch {round(first.epoch, 2):g} first"} at {goal}'
