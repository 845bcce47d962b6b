"""What a sweep found: its picture, its table, and in words which average was best and what to write into the recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from composer_ema.pictures.canvas import add_legend, literally, new_figure
from composer_ema.pictures.style import BLACK, BLUE, GREY, RC, VERMILION
from composer_ema.pictures.tables import number
from composer_ema.recipe.metrics import is_share, scaled
from composer_ema.run_folder.outputs import Array
from composer_ema.sweep.choice import UNRELIABLE, Choice
from composer_ema.sweep.search import Sweep, rounded
from composer_ema.sweep.trials import Family, Trial

if TYPE_CHECKING:  # matplotlib takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

#: A picture shows so many metrics at most.
_PANELS = 3
#: Values further from the best than so many times the gain over the training weights are cut off: they would make the
#: valley flat.
_GAINS_SHOWN = 1.6
_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_AS_GOOD_COLOUR = '0.93'
_ON_TEST = 'CHOSEN ON THE TEST SET'


def picture_name(family: Family, *, on_test: bool) -> str:
    """The name of the picture in the run folder, without the ending; each kind of sweep has its own.

    Example:
        >>> picture_name('half_life', on_test=False), picture_name('power', on_test=True)
        ('sweep', 'sweep_power_test')
    """
    return '_'.join(['sweep', *(['power'] if family == 'power' else []), *(['test'] if on_test else [])])


def table(sweep: Sweep) -> Table:
    """One row for each average and one for the training weights: half-life, metrics, predicted error."""
    made = Table(title=f'{sweep.run_name}, on {sweep.samples}', title_justify='left')
    for heading in _headings(sweep):
        made.add_column(heading, justify='right')
    best = None if sweep.choice is None else sweep.choice.best
    for trial in (*sweep.trials, sweep.training):
        made.add_row(
            *_cells(sweep, trial), style='bold' if trial is best else '', end_section=trial is sweep.trials[-1]
        )
    return made


def markdown(sweep: Sweep) -> str:
    """The table of :func:`table` in Markdown."""
    headings = _headings(sweep)
    rows = [headings, ['---:'] * len(headings), *(_cells(sweep, each) for each in (*sweep.trials, sweep.training))]
    return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def in_brief(trial: Trial) -> str:
    """A trial in a line: ``'half_life=0.05dur: CrossEntropy 0.2620, MulticlassAccuracy 90.64 %'``."""
    return f'{trial.target}: ' + ', '.join(f'{name} {_number(name, value)}' for name, value in trial.metrics.items())


def conclusion(sweep: Sweep) -> Iterator[str]:
    """What a sweep found, in sentences: the best average, what to write, and what speaks against it."""
    yield from sweep.imported
    choice, metric = sweep.choice, sweep.metric
    if choice is None:
        yield (
            f'no average can be chosen: every one has a predicted error above {100 * UNRELIABLE:g} %. Keep more of the '
            'next run, as in algorithms.ema.snapshots=0.05dur, or sweep longer ones: --half-lives 0.1dur,0.2dur.'
        )
        return
    best = choice.best
    others = ', '.join(
        f'{name} {_number(name, best.metrics[name])}' for name in sweep.lower_is_better if name != metric
    )
    yield (
        f'best{" ON THE TEST SET" if sweep.on_test else ""}: {_named(sweep, best)}: {metric} '
        f'{_number(metric, best.metrics[metric])} against {_number(metric, sweep.training.metrics[metric])} of the '
        f'training weights{f" ({others})" if others else ""}; write {sweep.overrides(best.value or 0.0)}'
    )
    if sweep.on_test:
        yield (
            'this choice fits the test set, so its metrics there are too good. For figures to report, train with '
            'data.validation_split=0.1, choose on that, and look at the test set once.'
        )
    if sweep.changes:
        written = ' and '.join(f'{name}={value}' for name, value in sweep.changes.items())
        yield f'all of these averages have {written}, as in the recipe'
    if sweep.is_refreshed:
        yield (
            "BatchNorm's statistics were computed anew for each average. EMA averages them instead, so a run with this "
            'half-life may evaluate otherwise; update_bn() computes them for an average that is exported'
        )
    yield from _how_sure(sweep, choice)
    if choice.edge is not None:
        longest, longer = ('shortest', 'shorter') if choice.edge == 'short' else ('longest', 'longer')
        yield (
            f'the best is the {longest} that was tried with a predicted error of at most {100 * UNRELIABLE:g} %, so a '
            f'{longer} one may be better: {_option(sweep)} tries others'
        )
    if choice.doubtful is not None:
        yield (
            f'{_value(sweep, choice.doubtful)} looks better, {metric} '
            f'{_number(metric, choice.doubtful.metrics[metric])}, but has a predicted error of '
            f'{_percent(choice.doubtful.predicted_error)} %; more snapshots would tell'
        )


def _how_sure(sweep: Sweep, choice: Choice) -> Iterator[str]:
    """Which averages, and whether the training weights, are as good as the best as far as the samples tell."""
    error = choice.training.standard_error
    if len(choice.as_good) > 1:
        first, last = choice.as_good[0], choice.as_good[-1]
        yield (
            f'a broad valley: from {_value(sweep, first)} to {_value(sweep, last)} nothing is worse than the best by '
            'more than sampling error, two standard errors'
        )
    elif error is not None:
        yield 'its neighbours are worse by more than sampling error, two standard errors'
    if choice.training.mean <= 0:
        yield f'no average that was tried has a better {sweep.metric} than the training weights'
    elif error is not None and choice.training.is_within_sampling_error:
        yield (
            f'the training weights are worse by {choice.training.mean:.4f} with a standard error of {error:.4f}: '
            'within sampling error'
        )


def draw_sweep(sweep: Sweep) -> Figure:
    """Draws each metric over the half-life, the losses first, three at most: the one that was chosen by among them."""
    from matplotlib import rc_context

    names = sorted(sweep.lower_is_better, key=lambda name: name != sweep.metric)[:_PANELS]
    names = [name for name in sweep.lower_is_better if name in names]
    with rc_context(RC):
        figure, cells = new_figure([names])
        is_cut = [_draw_metric(axes, sweep, name) for axes, name in zip(cells, names, strict=True)]
        title = f'{sweep.run_name}, {"test set: " if sweep.on_test else "on "}{sweep.samples}'
        add_legend(figure, _legend(sweep, is_cut=any(is_cut)), title=f'{_ON_TEST}: {title}' if sweep.on_test else title)
    return figure


def _draw_metric(axes: Axes, sweep: Sweep, name: str) -> bool:
    """Draws one metric, and returns whether some of its values lie outside the picture."""
    x = np.asarray([trial.value for trial in sweep.trials], dtype=np.float64)
    y = np.asarray([scaled(name, trial.metrics[name]) for trial in sweep.trials], dtype=np.float64)
    level = scaled(name, sweep.training.metrics[name])
    is_solid = np.asarray([trial.is_reliable(UNRELIABLE) for trial in sweep.trials])
    axes.set_xscale('log')
    if sweep.choice is not None:
        values = [each.value or 0.0 for each in sweep.choice.as_good]
        if len(values) > 1:
            axes.axvspan(values[0], values[-1], color=_AS_GOOD_COLOUR, linewidth=0, zorder=0)
    axes.axhline(level, color=VERMILION, linestyle='--', zorder=2)
    axes.plot(x, y, color=BLUE, linewidth=1.2, zorder=3)
    axes.plot(x[is_solid], y[is_solid], 'o', color=BLUE, markersize=5, zorder=4)
    axes.plot(x[~is_solid], y[~is_solid], 'o', color=BLUE, markerfacecolor='white', markersize=5, zorder=4)
    if sweep.choice is not None:
        best = sweep.choice.best
        axes.plot([best.value or 0.0], [scaled(name, best.metrics[name])], '*', color=BLACK, markersize=12, zorder=5)
    _label(axes, sweep, name)
    return _limit(axes, x, y, level, lower_is_better=sweep.lower_is_better[name])


def _limit(axes: Axes, x: Array, y: Array, level: float, *, lower_is_better: bool) -> bool:
    """Shows the valley and the training weights; what lies much further is cut off, and an arrow says so."""
    finite = y[np.isfinite(y)]
    if not len(finite) or not np.isfinite(level):
        return False
    sign = 1.0 if lower_is_better else -1.0
    best = (sign * finite).min()
    gain = max(sign * level - best, float(np.median(sign * finite)) - best)
    worst = max(min((sign * finite).max(), best + _GAINS_SHOWN * gain), sign * level)
    room = 0.08 * (worst - best) or 1.0
    axes.set_ylim(*sorted((sign * (best - room), sign * (worst + room))))
    is_outside = ~np.isfinite(y) | (sign * y > worst + room)
    edge, marker = (0.985, '^') if lower_is_better else (0.015, 'v')
    axes.plot(
        x[is_outside], np.full(is_outside.sum(), edge), marker, color=GREY, markersize=4, linestyle='', zorder=4,
        transform=axes.get_xaxis_transform(),
    )  # fmt: skip
    return bool(is_outside.any())


def _label(axes: Axes, sweep: Sweep, name: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    axes.set_ylabel(literally(f'{name} (%)' if is_share(name) else name))
    if sweep.family == 'half_life':
        axes.set_xlabel('half-life (% of the run)')
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{100 * value:g}'))
    else:
        axes.set_xlabel('power (sigma_rel)')
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in _TICKS if low <= tick <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis='y', color='0.92', linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)


def _legend(sweep: Sweep, *, is_cut: bool) -> list[tuple[Line2D, str]]:
    from matplotlib.lines import Line2D

    point = {'color': BLUE, 'marker': 'o', 'markersize': 5, 'linewidth': 1.2}
    entries = [(Line2D([], [], **point), 'average, reconstructed')]
    if not all(trial.is_reliable(UNRELIABLE) for trial in sweep.trials):
        entries.append(
            (Line2D([], [], **point, markerfacecolor='white'), f'predicted error above {100 * UNRELIABLE:g} %')
        )
    if is_cut:
        entries.append(
            (Line2D([], [], color=GREY, marker='^', markersize=4, linestyle=''), 'worse, outside the picture')
        )
    entries.append((Line2D([], [], color=VERMILION, linestyle='--'), 'training weights at the end'))
    if sweep.choice is not None:
        star = Line2D([], [], color=BLACK, marker='*', markersize=11, linestyle='')
        entries.append((star, f'best {sweep.metric}: {_named(sweep, sweep.choice.best)}'))
        if len(sweep.choice.as_good) > 1:
            band = Line2D([], [], color=_AS_GOOD_COLOUR, linewidth=10)
            entries.append((band, f'{sweep.metric} as good, within sampling error'))
    return entries


def _headings(sweep: Sweep) -> list[str]:
    first = ['half-life', _unit_heading(sweep)] if sweep.family == 'half_life' else ['power']
    metrics = [f'{name} %' if is_share(name) else name for name in sweep.lower_is_better]
    return [*filter(None, first), *metrics, 'predicted error %', 'note']


def _cells(sweep: Sweep, trial: Trial) -> list[str]:
    metrics = [_number(name, trial.metrics[name]).removesuffix(' %') for name in sweep.lower_is_better]
    if trial.value is None:
        return ['training weights', *[''] * (len(_headings(sweep)) - len(metrics) - 3), *metrics, '', '']
    first = [f'{trial.value:g}dur'] if sweep.family == 'half_life' else [f'{trial.value:g}']
    if _unit_heading(sweep):
        first.append(sweep.in_own_unit(trial.value or 0.0))
    return [*first, *metrics, _percent(trial.predicted_error), _remark(sweep, trial)]


def _remark(sweep: Sweep, trial: Trial) -> str:
    remarks = ['as trained'] if trial.value in [rounded(value) for value in sweep.own] else []
    if sweep.choice is not None:
        is_as_good = any(trial is each for each in sweep.choice.as_good)
        remarks += ['best'] if trial is sweep.choice.best else ['as good'] if is_as_good else []
    return ', '.join(remarks)


def _unit_heading(sweep: Sweep) -> str:
    """A heading for the half-life in the unit of the recipe, where that is not a share of the run anyway."""
    if sweep.family != 'half_life' or sweep.trials[0].value is None:
        return ''
    return '' if sweep.in_own_unit(sweep.trials[0].value).endswith('dur') else "in the recipe's unit"


def _named(sweep: Sweep, trial: Trial) -> str:
    """``'half_life 0.07dur (176ba)'``, or ``'power 0.1'``."""
    if sweep.family == 'power':
        return f'power {trial.value:g}'
    own = sweep.in_own_unit(trial.value or 0.0)
    return f'half_life {trial.value:g}dur' + ('' if own.endswith('dur') else f' ({own})')


def _value(sweep: Sweep, trial: Trial) -> str:
    return f'{trial.value:g}dur' if sweep.family == 'half_life' else f'{trial.value:g}'


def _option(sweep: Sweep) -> str:
    return '--half-lives' if sweep.family == 'half_life' else '--power with values'


def _number(name: str, value: float) -> str:
    return f'{scaled(name, value):.2f} %' if is_share(name) else number(value)


def _percent(share: float | None) -> str:
    return '' if share is None else f'{100 * share:.2g}' if share < 0.1 else f'{100 * share:.0f}'
