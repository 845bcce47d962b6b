"""The panels that runs and recipes share: the learning rate and the momentum of each parameter group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING, Protocol

import numpy as np

from composer_ema.pictures.canvas import LARGE_RATIO, Panel, mark_gaps, note, plot
from composer_ema.pictures.style import BLACK, DASHES, MOMENTUM_WORDS, covered_if_few, few, with_pens
from composer_ema.run_folder.outputs import MOMENTUM, Axis, Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# More lines than this tell a reader nothing, and their legend is laid out for minutes.
_MOST_GROUPS = 24


class Scheduled(Protocol):
    """A run or a recipe: the learning rate and the momentum of every batch, by the groups that share them."""

    @property
    def rates(self) -> Mapping[str, Curve]:
        """Learning rates."""
        ...

    @property
    def momenta(self) -> Mapping[str, Curve]:
        """Momenta; empty for an optimizer without."""
        ...

    @property
    def momentum_names(self) -> Sequence[str]:
        """What the optimizer calls them, of ``'momentum'`` and ``'beta1'``."""
        ...


def _draw_rates(axes: Axes, runs: Sequence[Scheduled], axis: Axis) -> None:
    _draw_groups(axes, runs, axis, lambda run: run.rates)
    axes.set_ylabel('learning rate')
    finite = [
        [value for curve in run.rates.values() for value in curve.value[np.isfinite(curve.value)]] for run in runs
    ]
    peaks = [max(values) for values in finite if values]
    if len(peaks) > 1 and min(peaks) > 0 and max(peaks) > LARGE_RATIO * min(peaks):
        # A rate that is annealed to nothing would stretch the axis without end.
        axes.set_yscale('log', nonpositive='mask')
        axes.set_ylim(min(peaks) / 100, max(peaks) * 2)
    elif peaks and max(peaks) > 0:
        axes.set_ylim(0, 1.08 * max(peaks))


def _draw_momenta(axes: Axes, runs: Sequence[Scheduled], axis: Axis) -> None:
    _draw_groups(axes, runs, axis, lambda run: run.momenta)
    used = {name for run in runs for name in run.momentum_names} or {MOMENTUM}
    axes.set_ylabel(', '.join(words for name, words in MOMENTUM_WORDS.items() if name in used))
    low, high = axes.get_ylim()
    if high - low < 0.1:  # the ticks of a constant momentum would differ in their last digits
        axes.set_ylim(0, 1.03)


def _draw_groups(
    axes: Axes,
    runs: Sequence[Scheduled],
    axis: Axis,
    curves: Callable[[Scheduled], Mapping[str, Curve]],
) -> None:
    """Draws one line for each parameter group that differs; the first is solid. Of very many the first ones only."""
    most = max((len(curves(run)) for run in runs), default=0)

    def shown(run: Scheduled) -> Mapping[str, Curve]:
        return dict(islice(curves(run).items(), _MOST_GROUPS))

    drawn = [(curve.over(axis), curve.value) for run in runs for curve in shown(run).values()]
    sizes = iter(covered_if_few(drawn) if len(runs) > 1 else [{}] * len(drawn))
    colours = []
    for run, pen in with_pens(runs):
        for dashes, (group, curve) in zip(cycle(DASHES), shown(run).items(), strict=False):
            style = pen.along() if len(runs) > 1 else {'color': BLACK, 'marker': few(curve, 'o'), 'markersize': 4}
            if dashes != '-':
                style['marker'] = ''
            plot(axes, curve.over(axis), curve.value, linestyle=dashes, label=group, **style | next(sizes))
            colours.append(style['color'])
    mark_gaps(axes, drawn, colours)
    if most > _MOST_GROUPS:
        note(axes, f'the first {_MOST_GROUPS} of {most:,} parameter groups')
    elif most > 1:
        if len(runs) == 1:
            axes.legend(frameon=False, handlelength=2.6)
        else:
            note(axes, 'dashed: further parameter groups')


RATES: Panel[Scheduled] = Panel(_draw_rates, lambda run: bool(run.rates))
MOMENTA: Panel[Scheduled] = Panel(_draw_momenta, lambda run: any(curve.value.any() for curve in run.momenta.values()))
