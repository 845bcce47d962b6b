"""Pictures of runs and of recipes: panels that share one legend, readable in print and to colour-blind eyes.

One run is coloured by its weights, several by run. Markers tell them apart where there is no colour.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from composer_ema.files import write_beside
from composer_ema.pictures.curves import (
    LABELS,
    Array,
    Axis,
    Curve,
    PlotError,
    Point,
    RunCurves,
    first_reaching,
    smoothed,
)

if TYPE_CHECKING:  # matplotlib takes a second to import, and most of what imports this module never draws
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from composer_ema.recipe.preview import Preview, Profile

#: What a picture may be written as.
FORMATS = ('png', 'svg', 'pdf')
_AXES = {'epoch': 'epoch', 'batch': 'batch', 'sample': 'sample'}

_T = TypeVar('_T')

# Okabe and Ito's colours, distinct to colour-blind eyes, in an order in which neighbours differ in grey too.
_BLUE, _ORANGE, _BLACK, _GREEN, _VERMILION, _SKY, _PURPLE = (
    '#0072B2', '#E69F00', '#000000', '#009E73', '#D55E00', '#56B4E9', '#CC79A7',
)  # fmt: skip
_COLOURS = (_BLUE, _ORANGE, _BLACK, _GREEN, _VERMILION, _SKY, _PURPLE)
_MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', '*')
_OF_WEIGHTS = {'training': (_VERMILION, 's', '--'), 'ema': (_BLUE, 'o', '-'), 'swa': (_GREEN, '^', '-.')}
_GREY = '0.35'
_DASHES = ('-', '--', ':', '-.')
_STYLE: Any = {
    'font.size': 9,
    'axes.labelsize': 9,
    'axes.titlesize': 8,
    'legend.fontsize': 9,
    'lines.linewidth': 1.5,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.formatter.limits': (-3, 5),
    'axes.formatter.use_mathtext': True,
    'svg.hashsalt': 'composer_ema',
}
_WIDTH, _ROW_HEIGHT, _LEGEND_LINE_HEIGHT = 10.0, 2.9, 0.21
# As many characters as fit: over the picture, in its legend, over one of three panels, of two.
_TITLE_CHARACTERS, _LEGEND_CHARACTERS, _PANEL_CHARACTERS, _WIDE_PANEL_CHARACTERS = 110, 125, 44, 66
_TICK_STEPS = [1, 2, 2.5, 5, 10]
# Beyond so many evaluations their markers would run into one another.
_MARKED_POINTS = 25
# Rates of different size, or a loss that jumps, are drawn over a logarithmic axis.
_LARGE_RATIO = 20.0


@dataclass(frozen=True)
class _Pen:
    """How one run is drawn: its colour and marker, and where along a curve its first marker stands."""

    colour: str
    marker: str
    offset: float

    def along(self, **changed: Any) -> dict[str, Any]:
        """For a curve of many values: markers at even distances, shifted so that equal curves show all of them."""
        style = {'color': self.colour, 'marker': self.marker, 'markevery': (self.offset, 0.22), 'markersize': 4.5}
        return {**style, **changed}


def draw_runs(runs: Sequence[RunCurves], *, axis: Axis | None = None) -> Figure:
    """Draws what runs did: loss, accuracy, learning rate, momentum, and how far the average lies from the weights.

    A panel that no run has anything for is left out.

    Args:
        runs: At least one; their names label them.
        axis: What to draw over. Default: epochs where every run has trained at least one, else batches.
    """
    axis = _natural_axis(runs) if axis is None else axis
    return _draw(_RUN_PANELS, runs, axis, _end(runs, axis), _legend_of_runs)


def draw_previews(previews: Sequence[Preview], *, axis: Axis | None = None) -> Figure:
    """Draws what recipes will do: learning rate, momentum, and how much each step weighs in the average at the end.

    Args:
        previews: At least one; their names label them.
        axis: ``'epoch'`` or ``'batch'``. Default: epochs where every recipe trains for at least one, else batches.
    """
    if axis is None:
        axis = 'epoch' if all(each.batches >= each.batches_per_epoch for each in previews) else 'batch'
    end = max(each.batches / (each.batches_per_epoch if axis == 'epoch' else 1) for each in previews)
    return _draw(_PREVIEW_PANELS, previews, axis, end, _legend_of_previews)


def _draw(panels: Any, shown: Sequence[Any], axis: Axis, end: float, legend_of: Callable[[Any], Any]) -> Figure:
    """The panels that one of ``shown`` needs, row by row, over an axis that ends at ``end``, and a legend."""
    from matplotlib import rc_context

    rows = [[panel for panel in row if panel.is_needed(shown)] for row in panels]
    with rc_context(_STYLE):
        figure, cells = _new_figure([row for row in rows if row])
        for axes, panel in zip(cells, (panel for row in rows for panel in row), strict=True):
            panel.draw(axes, shown, axis)
            axes.set_xlabel(_AXES[axis])
            _finish_axes(axes, end=end, whole=axis != 'epoch')
        _add_legend(figure, legend_of(shown), title=shown[0].name if len(shown) == 1 else None)
    return figure


def write(figure: Figure, out: Path) -> list[Path]:
    """Writes a picture, each file beside and renamed into place.

    Args:
        figure: What to write.
        out: With an ending of :data:`FORMATS` that one file; else ``out`` is a name to which ``.png`` and ``.svg`` are
            added.

    Returns:
        The files.

    Raises:
        PlotError: another ending, or a place that cannot be written to.
    """
    from matplotlib import rc_context

    paths = check_out(out)
    for path in paths:
        buffer = io.BytesIO()
        # Without a date the same curves give the same file.
        metadata = {'svg': {'Date': None}, 'pdf': {'CreationDate': None}}.get(path.suffix[1:], {})
        with rc_context(_STYLE):
            figure.savefig(buffer, format=path.suffix[1:], dpi=150, metadata=metadata)
        try:
            write_beside(path, buffer.getvalue())
        except OSError as error:
            raise PlotError(f'{path} cannot be written: {error.strerror or error}.') from error
    return paths


def check_out(out: Path) -> list[Path]:
    """The files that :func:`write` makes of ``out``.

    Example:
        >>> [path.name for path in check_out(Path('a/curves'))], [path.name for path in check_out(Path('a/b.svg'))]
        (['curves.png', 'curves.svg'], ['b.svg'])
    """
    ending = out.suffix[1:].lower()
    if ending in FORMATS:
        return [out]
    if out.is_dir():
        raise PlotError(f'{out} is a folder. Give the name of a picture in it, as in {out / "curves"}.')
    if ending.isalpha() and len(ending) <= 4:
        raise PlotError(f'{out} has the ending .{ending}, a picture is written as {", ".join(FORMATS)}.')
    return [out.with_name(f'{out.name}.{each}') for each in FORMATS[:2]]


@dataclass(frozen=True)
class _Panel(Generic[_T]):
    draw: Callable[[Axes, Sequence[_T], Axis], None]
    has_data: Callable[[_T], bool]

    def is_needed(self, runs: Sequence[_T]) -> bool:
        return any(self.has_data(run) for run in runs)


def _draw_training_loss(axes: Axes, runs: Sequence[RunCurves], axis: Axis) -> None:
    widths, drawn = set(), []
    for run, pen in _with_pens(runs):
        if not len(run.loss):
            continue
        values, width = smoothed(run.loss.value)
        widths.add(width)
        drawn.append(values)
        x = run.loss.over(axis)
        if len(runs) == 1:
            if width > 1:
                # As a picture inside an SVG: every batch of a long run would be a megabyte of path.
                axes.plot(x, run.loss.value, color='0.8', linewidth=0.6, rasterized=len(x) > 2000, zorder=1)
                finite = run.loss.value[len(x) // 50 :][np.isfinite(run.loss.value[len(x) // 50 :])]
                drawn.append(np.repeat(np.percentile(finite, [0.5, 99.5]), 2))
            axes.plot(x, values, color=_VERMILION, marker='s' if len(x) <= _MARKED_POINTS else '', markersize=4)
        else:
            axes.plot(x, values, **pen.along())
    axes.set_ylabel('training loss')
    _limit_to(axes, drawn)
    if widths != {1}:
        over = f'{max(widths)} batches' if len(widths) == 1 else f'2 % of a run, {min(widths - {1})} batches or more'
        _note(axes, f'mean over {over}' + (', each batch in grey' if len(runs) == 1 else ''))


def _draw_evaluation_loss(axes: Axes, runs: Sequence[RunCurves], axis: Axis) -> None:
    _draw_points(axes, runs, axis, lambda point: point.loss)
    axes.set_ylabel('evaluation loss (nats)')


def _draw_accuracy(axes: Axes, runs: Sequence[RunCurves], axis: Axis) -> None:
    _draw_points(axes, runs, axis, lambda point: None if point.accuracy is None else 100 * point.accuracy)
    axes.set_ylabel('accuracy (%)')
    targets = {run.target_accuracy for run in runs if run.target_accuracy is not None}
    if len(targets) == 1:
        _draw_target(axes, runs, axis, targets.pop())


def _draw_target(axes: Axes, runs: Sequence[RunCurves], axis: Axis, target: float) -> None:
    """A line at the accuracy that epochs are counted to, unless it is so far away that it would squeeze the curves."""
    low, high = axes.get_ylim()
    height = 100 * target
    if not low - (high - low) <= height <= high + (high - low):
        return
    axes.axhline(height, color='0.45', linewidth=0.9, zorder=0)
    # At the left end, where a curve is still far below its target.
    axes.annotate(
        f'{height:g} %', (0, height), xycoords=('axes fraction', 'data'), xytext=(3, 3), textcoords='offset points',
        fontsize=8, color=_GREY,
    )  # fmt: skip
    low, high = axes.get_ylim()
    axes.set_ylim(low, max(high, height + 0.1 * (height - low)))
    if len(runs) > 1:
        return
    for weights, points in runs[0].evaluations.items():
        first = first_reaching(points, target)
        if first is not None:
            x, colour = getattr(first, axis), _of_weights(weights)[0]
            axes.vlines(x, low, 100 * (first.accuracy or 0.0), color=colour, linestyle=':', linewidth=1.2)


def _draw_rates(axes: Axes, runs: Sequence[RunCurves | Preview], axis: Axis) -> None:
    _draw_groups(axes, runs, axis, lambda run: run.rates)
    axes.set_ylabel('learning rate')
    peaks = [
        max(np.nanmax(curve.value) for curve in run.rates.values()) for run in runs if any(map(len, run.rates.values()))
    ]
    if len(peaks) > 1 and min(peaks) > 0 and max(peaks) > _LARGE_RATIO * min(peaks):
        # A rate that is annealed to nothing would stretch the axis without end.
        axes.set_yscale('log', nonpositive='mask')
        axes.set_ylim(min(peaks) / 100, max(peaks) * 2)
    elif peaks and max(peaks) > 0:
        axes.set_ylim(0, 1.08 * max(peaks))


def _draw_momenta(axes: Axes, runs: Sequence[RunCurves | Preview], axis: Axis) -> None:
    _draw_groups(axes, runs, axis, lambda run: run.momenta)
    axes.set_ylabel('momentum, β₁')
    low, high = axes.get_ylim()
    if high - low < 0.1:  # a constant one would be drawn over ticks of its last digits
        axes.set_ylim(0, 1.03)


def _draw_groups(
    axes: Axes,
    runs: Sequence[RunCurves | Preview],
    axis: Axis,
    curves: Callable[[RunCurves | Preview], dict[str, Curve]],
) -> None:
    """One line for each parameter group that differs; the first is solid."""
    for run, pen in _with_pens(runs):
        for dashes, (group, curve) in zip(_cycle(_DASHES), curves(run).items(), strict=False):
            style = pen.along() if len(runs) > 1 else {'color': _BLACK, 'marker': _few(curve, 'o'), 'markersize': 4}
            if dashes != '-':
                style['marker'] = ''
            axes.plot(curve.over(axis), curve.value, linestyle=dashes, label=group, **style)
    if any(len(curves(run)) > 1 for run in runs):
        if len(runs) == 1:
            axes.legend(frameon=False, handlelength=2.6)
        else:
            _note(axes, 'dashed: further parameter groups')


def _draw_distances(axes: Axes, runs: Sequence[RunCurves], axis: Axis) -> None:
    for run, pen in _with_pens(runs):
        for name, curve in run.distances.items():
            if len(runs) > 1:
                style = {'color': pen.colour, 'marker': pen.marker}
            else:
                style = dict(zip(('color', 'marker', 'linestyle'), _of_weights(name), strict=True))
            axes.plot(curve.over(axis), curve.value, **style, **_sparse(len(curve), pen))
    axes.set_ylabel('distance of the average from\nthe weights, share of their norm')
    axes.set_ylim(bottom=0)


def _draw_points(axes: Axes, runs: Sequence[RunCurves], axis: Axis, value: Callable[[Point], float | None]) -> None:
    for run, pen in _with_pens(runs):
        for weights, points in run.evaluations.items():
            drawn = [(getattr(point, axis), number) for point in points if (number := value(point)) is not None]
            colour, marker, dashes = _of_weights(weights)
            if len(runs) > 1:
                colour, marker = pen.colour, pen.marker
            axes.plot(
                [x for x, _ in drawn], [y for _, y in drawn], color=colour, linestyle=dashes,
                marker=marker, markerfacecolor='white' if weights == 'training' else colour,
                **_sparse(len(drawn), pen),
            )  # fmt: skip


def _draw_profiles(axes: Axes, previews: Sequence[Preview], axis: Axis) -> None:
    """The share of each update, in per cent."""
    heights = []
    for profile, x, style in _profiles(previews, axis):
        if len(x) <= _MARKED_POINTS:
            style = {'marker': 'o', 'markersize': 4.5, **style}
        axes.plot(x, 100 * profile.share, **style)
        heights.append(100 * profile.share.max())
        has_heavy_start = len(x) > 1 and profile.share[0] > _LARGE_RATIO * np.median(profile.share)
        heights += (
            [100 * profile.share[1:].max()] if has_heavy_start and profile.share[0] == profile.share.max() else []
        )
        if len(previews) == 1 and len(previews[0].profiles) == 1:
            is_new = profile.batch > profile.batches - profile.newest_half
            axes.fill_between(x, 0, 100 * profile.share, where=is_new.tolist(), color=_BLUE, alpha=0.2, linewidth=0)
            batches = 'batch' if profile.newest_half == 1 else f'{profile.newest_half:,} batches'
            _note(axes, f'shaded: half of the average, made in the last {batches}', _WIDE_PANEL_CHARACTERS)
    if max(heights) > _LARGE_RATIO / 4 * min(heights):
        axes.set_yscale('log')
        axes.set_ylim(min(heights) / 100, 2 * max(heights))
        axes.yaxis.set_major_formatter('{x:g}')
    else:
        axes.set_ylim(0, 1.08 * max(heights))
    axes.set_ylabel('weight of each step in\nthe average at the end (%)')


def _draw_cumulated_profiles(axes: Axes, previews: Sequence[Preview], axis: Axis) -> None:
    for profile, x, style in _profiles(previews, axis):
        axes.plot(np.append(x, x[-1]), 100 * np.append(0, np.cumsum(profile.share)), drawstyle='steps-pre', **style)
    axes.axhline(50, color='0.45', linewidth=0.9, linestyle=':', zorder=0)
    axes.set_ylim(0, 104)
    axes.set_ylabel('part of the average that is\nmade up to here (%)')


def _profiles(previews: Sequence[Preview], axis: Axis) -> Iterator[tuple[Profile, Array, dict[str, Any]]]:
    """Every profile, where its updates stand along the axis, and how it is drawn."""
    for preview, pen in _with_pens(previews):
        for dashes, profile in zip(_cycle(_DASHES), preview.profiles, strict=False):
            x = profile.batch / (preview.batches_per_epoch if axis == 'epoch' else 1)
            style: dict[str, Any] = {'color': _BLUE if len(previews) == 1 else pen.colour, 'linestyle': dashes}
            if len(previews) > 1:
                style |= {'marker': pen.marker, **_sparse(len(x), pen)}
            yield profile, x, style


_PREVIEW_PANELS = (
    (
        _Panel(_draw_rates, lambda preview: bool(preview.rates)),
        _Panel(_draw_momenta, lambda preview: any(curve.value.any() for curve in preview.momenta.values())),
    ),
    (
        _Panel(_draw_profiles, lambda preview: bool(preview.profiles)),
        _Panel(_draw_cumulated_profiles, lambda preview: bool(preview.profiles)),
    ),
)


def describe(profile: Profile) -> str:
    """A profile in words: its horizon, as a share of the run where it has a half-life, and its effective steps."""
    share = '' if profile.half_life_share is None else f' ({_three_digits(100 * profile.half_life_share)} % of the run)'
    steps = f'effective number of steps 1/Σw² = {_three_digits(profile.effective_steps)} of {len(profile.batch):,}'
    return f'{profile.name}: {profile.settings}{share}, {steps}'


def _three_digits(value: float) -> str:
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def _legend_of_previews(previews: Sequence[Preview]) -> list[tuple[Line2D, str]]:
    from matplotlib.lines import Line2D

    entries = []
    for preview, pen in _with_pens(previews):
        said = '; '.join([*map(describe, preview.profiles), *preview.remarks])
        if len(previews) > 1:
            line = Line2D([], [], color=pen.colour, marker=pen.marker, markersize=4.5)
            entries.append((line, f'{preview.name}\n{said}' if said else preview.name))
        elif said:
            entries.append((Line2D([], [], color=_BLUE), said))
    return entries


def _is_evaluated(run: RunCurves, quantity: str) -> bool:
    return any(getattr(point, quantity) is not None for points in run.evaluations.values() for point in points)


_RUN_PANELS = (
    (
        _Panel(_draw_training_loss, lambda run: len(run.loss) > 0),
        _Panel(_draw_evaluation_loss, lambda run: _is_evaluated(run, 'loss')),
        _Panel(_draw_accuracy, lambda run: _is_evaluated(run, 'accuracy')),
    ),
    (
        _Panel(_draw_rates, lambda run: bool(run.rates)),
        _Panel(_draw_momenta, lambda run: any(curve.value.any() for curve in run.momenta.values())),
        _Panel(_draw_distances, lambda run: bool(run.distances)),
    ),
)


def _of_weights(weights: str) -> tuple[str, str, Any]:
    return _OF_WEIGHTS.get(weights, (_PURPLE, 'D', ':'))


def _with_pens(runs: Sequence[_T]) -> list[tuple[_T, _Pen]]:
    pens = [
        _Pen(_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)], 0.22 * (0.3 + i) / max(len(runs), 2))
        for i in range(len(runs))
    ]
    return list(zip(runs, pens, strict=True))


def _cycle(items: Sequence[str]) -> Iterable[str]:
    while True:
        yield from items


def _few(curve: Curve, marker: str) -> str:
    """The marker where values are few enough to carry one each."""
    return marker if len(curve) <= _MARKED_POINTS else ''


def _sparse(count: int, pen: _Pen) -> dict[str, Any]:
    """Every value gets a marker where they are few, else some at even distances."""
    return {'markersize': 4.5, 'markevery': None if count <= _MARKED_POINTS else (pen.offset, 0.22)}


def _natural_axis(runs: Sequence[RunCurves]) -> Axis:
    return 'epoch' if all(_end([run], 'epoch') >= 1 and _tells_fractions(run) for run in runs) else 'batch'


def _tells_fractions(run: RunCurves) -> bool:
    """Whether epochs grow from batch to batch; they do not where the run did not know its length."""
    return len(run.loss) < 2 or bool(np.any(run.loss.epoch % 1))


def _end(runs: Sequence[RunCurves], axis: Axis) -> float:
    ends = [getattr(point, axis) for run in runs for points in run.evaluations.values() for point in points]
    ends += [curve.over(axis)[-1] for run in runs for curve in (run.loss, *run.rates.values()) if len(curve)]
    return float(max(ends, default=0))


def _new_figure(rows: Sequence[Sequence[object]]) -> tuple[Figure, list[Axes]]:
    """Rows of panels, each row as wide as the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = int(np.lcm.reduce([len(row) for row in rows]))
    layout = ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.06, hspace=0.04, wspace=0.03)
    figure = Figure(figsize=(_WIDTH, _ROW_HEIGHT * len(rows)), layout=layout)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(rows), columns)
    cells = []
    for index, row in enumerate(rows):
        width = columns // len(row)
        cells += [figure.add_subplot(grid[index, i * width : (i + 1) * width]) for i in range(len(row))]
    return figure, cells


def _finish_axes(axes: Axes, *, end: float, whole: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, end * 1.03 or 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole or end >= 3, steps=_TICK_STEPS))
    if axes.get_yscale() == 'linear':
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_TICK_STEPS))
    axes.grid(axis='y', color='0.92', linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)


def _limit_to(axes: Axes, curves: Sequence[Array]) -> None:
    """Leaves the first 2 % of a run, which may start high, out of the limits; makes a loss that jumps logarithmic."""
    settled = np.concatenate([curve[len(curve) // 50 :] for curve in curves])
    known = settled[np.isfinite(settled)]
    if not len(known):
        return
    low, high = known.min(), known.max()
    if low > 0 and high > _LARGE_RATIO * np.median(known):
        axes.set_yscale('log')
        axes.set_ylim(low / 1.2, high * 1.2)
    elif high > low:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def _note(axes: Axes, text: str, characters: int = _PANEL_CHARACTERS) -> None:
    """A remark over a panel, in as many lines as it takes."""
    axes.set_title(textwrap.fill(text, characters), loc='left', color=_GREY)


def _legend_of_runs(runs: Sequence[RunCurves]) -> list[tuple[Line2D, str]]:
    """A line for each run, where there are several, then one for each set of weights that was evaluated."""
    from matplotlib.lines import Line2D

    entries = []
    if len(runs) > 1:
        for run, pen in _with_pens(runs):
            entries.append((Line2D([], [], color=pen.colour, marker=pen.marker, markersize=4.5), run.name))
    evaluated = dict.fromkeys(weights for run in runs for weights in run.evaluations)
    for weights in evaluated:
        colour, marker, dashes = _of_weights(weights)
        if len(runs) > 1:
            colour, marker = _GREY, 'o'
        face = 'white' if weights == 'training' else colour
        line = Line2D([], [], color=colour, marker=marker, linestyle=dashes, markersize=4.5, markerfacecolor=face)
        entries.append((line, f'evaluated: {LABELS.get(weights, weights)}{_first_epoch(runs, weights)}'))
    return entries


def _first_epoch(runs: Sequence[RunCurves], weights: str) -> str:
    """When a single run first reached the target of its report."""
    target = runs[0].target_accuracy
    if len(runs) > 1 or target is None or all(point.accuracy is None for point in runs[0].evaluations[weights]):
        return ''
    first = first_reaching(runs[0].evaluations[weights], target)
    return f', {"never" if first is None else f"in epoch {round(first.epoch, 2):g} first"} at {100 * target:g} %'


def _add_legend(figure: Figure, entries: Sequence[tuple[Any, str]], *, title: str | None) -> None:
    """Under the panels, one column for long names; the figure grows by what it takes."""
    if title is not None:
        figure.suptitle(_literally(textwrap.fill(title, _TITLE_CHARACTERS)), x=0.01, ha='left', fontsize=10)
    if not entries:
        return
    labels = [
        _literally(
            '\n'.join(textwrap.fill(line, _LEGEND_CHARACTERS, subsequent_indent='  ') for line in text.split('\n'))
        )
        for _, text in entries
    ]
    longest = max(len(line) for text in labels for line in text.split('\n'))
    columns = max(1, min(len(entries), _LEGEND_CHARACTERS // (longest + 8)))
    lines = sum(text.count('\n') + 1 for text in labels) / columns
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + _LEGEND_LINE_HEIGHT * (lines + 1))
    figure.legend(
        [line for line, _ in entries], labels, loc='outside lower left', ncols=columns, frameon=False, handlelength=3
    )


def _wrapped(line: str) -> str:
    return textwrap.fill(line, _LEGEND_CHARACTERS, subsequent_indent='  ')


def _literally(text: str) -> str:
    """Text that matplotlib neither reads as mathematics nor, for a leading underscore, leaves out of a legend."""
    text = text.replace('$', r'\$')
    return f' {text}' if text.startswith('_') else text
