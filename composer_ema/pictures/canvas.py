"""A figure of panels over one axis, with one legend below them; knows nothing of what the panels show."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from composer_ema.pictures.errors import PlotError
from composer_ema.pictures.style import GREY, MARKED_POINTS, RC
from composer_ema.run_folder.outputs import Array, Axis
from composer_ema.wording import visible

if TYPE_CHECKING:  # matplotlib takes a second to import, and most of what imports this module never draws
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_T = TypeVar('_T')
#: Positions along the axis, and values.
XY = tuple[Array, Array]

_WIDTH, _ROW_HEIGHT, _LEGEND_LINE_HEIGHT = 10.0, 2.9, 0.21
# The number of characters that fit over the picture and into its legend; over one of three panels, and one of two.
_TITLE_CHARACTERS, _LEGEND_CHARACTERS = 110, 125
PANEL_CHARACTERS, WIDE_PANEL_CHARACTERS = 44, 66
_TICK_STEPS = [1, 2, 2.5, 5, 10]
# The ticks of a logarithmic axis that goes much further overflow.
_LARGEST = 1e200
#: Values of which one is this many times the other are drawn over a logarithmic axis.
LARGE_RATIO = 20.0


@dataclass(frozen=True)
class Panel(Generic[_T]):
    """One panel of a picture.

    Args:
        draw: Draws all that is shown into it.
        has_data: Whether one of what is shown has anything for it.
    """

    draw: Callable[[Axes, Sequence[_T], Axis], None]
    has_data: Callable[[_T], bool]

    def is_needed(self, shown: Sequence[_T]) -> bool:
        """Whether any of what is shown has data for it."""
        return any(self.has_data(each) for each in shown)


def draw(
    panels: Sequence[Sequence[Panel[_T]]],
    shown: Sequence[_T],
    *,
    axis: Axis,
    end: float,
    legend: Callable[[Sequence[_T]], list[tuple[Line2D, str]]],
    title: str | None,
) -> Figure:
    """Draws the panels that are needed, row by row.

    Args:
        panels: Rows of panels.
        shown: What they show.
        axis: What to draw over.
        end: Where the axis ends.
        legend: Returns a line and a text for each entry of the legend.
        title: What stands over the picture; None for nothing.

    Raises:
        PlotError: No panel has data.
    """
    from matplotlib import rc_context

    rows = [[panel for panel in row if panel.is_needed(shown)] for row in panels]
    if not any(rows):
        raise PlotError('there is nothing to draw: no loss, metric, learning rate, momentum or average.')
    with rc_context(RC):
        figure, cells = new_figure([row for row in rows if row])
        for axes, panel in zip(cells, (panel for row in rows for panel in row), strict=True):
            panel.draw(axes, shown, axis)
            axes.set_xlabel(axis)
            _finish_axes(axes, end=end, whole=axis != 'epoch')
        add_legend(figure, legend(shown), title=title)
    return figure


def plot(axes: Axes, x: Array, y: Array, **style: Any) -> None:
    """Draws a line. One without any finite value has no markers: matplotlib fails to find places for them."""
    if not np.isfinite(y).any():
        style['marker'] = ''
    axes.plot(x, y, **style)


def limit_to(axes: Axes, curves: Sequence[XY], batches: Array | None = None) -> None:
    """Sets the limits of a loss. A loss that jumps gets a log axis, which reaches the highest.

    A linear axis leaves out the first 2 % if they are so high that they would take more than a third of it, and the
    lowest and highest 0.5 % of single batches.

    Args:
        axes: The panel.
        curves: Positions and values of each curve.
        batches: The values of single batches, if they are drawn too. Default: None.
    """
    settled = [(x[len(x) // 50 :], y[len(x) // 50 :]) for x, y in curves]
    known = _finite(y for _, y in settled)
    if not len(known):
        return
    batches = np.empty(0) if batches is None else batches
    if stretch(axes, settled):
        if axes.get_yscale() == 'log':
            lines = _finite(y for _, y in curves)
            highest = min(_finite([lines, batches]).max(), _LARGEST)
            axes.set_ylim(lines[lines > 0].min() / 1.5, highest * 1.5)
        return
    if len(usual := _finite([batches[len(batches) // 50 :]])):
        known = np.append(known, np.percentile(usual, [0.5, 99.5]))
    low, high = known.min(), known.max()
    first = max((y[np.isfinite(y)].max(initial=low) for _, y in curves), default=high)
    if low < high < first <= high + (high - low) / 2:
        high = first
    if high > low:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def stretch(axes: Axes, curves: Sequence[XY], *, only_rise: bool = False) -> bool:
    """Gives values a logarithmic axis if they would lie flat on a linear one, and returns whether it did.

    They would if one of them is 20 times the median, or 20 times a value that was reached before, as in a run that
    diverges. If some are not positive, the axis is linear around zero.

    Args:
        axes: The panel.
        curves: Positions and values of each curve.
        only_rise: Whether a curve must rise for it: for values that fall from a high start, in each run to another
            end. Default: False.
    """
    values = _finite(y for _, y in curves)
    if not len(values):
        return False
    typical = float(np.median(np.abs(values)))
    is_high = np.abs(values).max() / LARGE_RATIO > typical
    if values.min() > 0:
        is_flat = any(_rises([each]) for each in curves) if only_rise else is_high or _rises(curves)
        if not is_flat:
            return False
        if values.max() > _LARGEST:
            axes.set_ylim(values.min() / 1.2, _LARGEST)
        axes.set_yscale('log')
    else:
        if not is_high or typical == 0:
            return False
        axes.set_yscale('symlog', linthresh=typical)
        axes.set_ylim(*np.clip(axes.get_ylim(), -_LARGEST, _LARGEST))
    return True


def mark_gaps(axes: Axes, curves: Sequence[XY], colours: Sequence[str]) -> None:
    """Marks at the upper edge where a curve has a value that is NaN or infinite, and says which."""
    row, found = 0, np.empty(0)
    for (x, y), colour in zip(curves, colours, strict=True):
        is_gap = ~np.isfinite(y)
        if not is_gap.any():
            continue
        found = np.append(found, y[is_gap])
        gaps = x[is_gap]
        gaps = gaps[:: -(-len(gaps) // MARKED_POINTS)]
        height = np.full(len(gaps), 0.97 - 0.05 * (row % 8))
        axes.plot(gaps, height, 'x', color=colour, markersize=5, transform=axes.get_xaxis_transform(), clip_on=False)
        row += 1
    if row:
        kinds = [word for word, holds in (('NaN', np.isnan(found)), ('infinite', np.isinf(found))) if holds.any()]
        note(axes, f'×: {" or ".join(kinds)}'.replace(' ', '\N{NO-BREAK SPACE}'))
        if not len(_finite(y for _, y in curves)):
            axes.set_yticks([])


def note(axes: Axes, text: str, characters: int = PANEL_CHARACTERS) -> None:
    """Writes a remark over a panel, after those that it has, in as many lines as it takes."""
    remarks = [before.replace('\n', ' ')] if (before := axes.get_title(loc='left')) else []
    axes.set_title(textwrap.fill('; '.join([*remarks, text]), characters), loc='left', color=GREY)


def _rises(curves: Sequence[XY]) -> bool:
    """Whether a positive value is many times one that some curve had before, or has at the same time."""
    x, y = np.concatenate([x[np.isfinite(y)] for x, y in curves]), _finite(y for _, y in curves)
    in_time = y[np.lexsort((y, x))]
    return bool((in_time / LARGE_RATIO > np.minimum.accumulate(in_time)).any())


def _finite(arrays: Iterable[Array]) -> Array:
    values = np.concatenate([np.empty(0), *arrays])
    return values[np.isfinite(values)]


def new_figure(rows: Sequence[Sequence[object]]) -> tuple[Figure, list[Axes]]:
    """A figure with a cell for each panel; every row is as wide as the figure."""
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
    if max(map(abs, axes.get_ylim())) > _LARGEST:
        axes.set_ylim(*np.clip(axes.get_ylim(), -_LARGEST, _LARGEST))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole or end >= 3, steps=_TICK_STEPS))
    if axes.get_yscale() == 'linear' and len(axes.get_yticks()):
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_TICK_STEPS))
    axes.grid(axis='y', color='0.92', linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)


def add_legend(figure: Figure, entries: Sequence[tuple[Any, str]], *, title: str | None) -> None:
    """Adds the title over the panels and the legend below them. The figure grows by the height of the legend."""
    if title is not None:
        figure.suptitle(textwrap.fill(literally(title), _TITLE_CHARACTERS), x=0.01, ha='left', fontsize=10)
    if not entries:
        return
    labels = ['\n'.join(map(_wrapped, literally(text, keep='\n').split('\n'))) for _, text in entries]
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


def literally(text: str, keep: str = '') -> str:
    """A text as matplotlib shows it as it is, for names that a run, a recipe or a file gave.

    Dollar signs are no mathematics, and a leading underscore, which hides a legend's entry, stands behind a space.

    Args:
        text: The text.
        keep: Characters to leave as they are, though they do not print; see :func:`composer_ema.wording.visible`.
    """
    text = visible(text, keep).replace('$', r'\$')
    return f' {text}' if text.startswith('_') else text
