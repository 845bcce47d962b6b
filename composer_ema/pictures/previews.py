"""The picture of what recipes will do: learning rate, momentum, and how much each step will weigh in the average."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from composer_ema.pictures import canvas
from composer_ema.pictures.canvas import LARGE_RATIO, WIDE_PANEL_CHARACTERS, Panel, note
from composer_ema.pictures.rates import MOMENTA, RATES
from composer_ema.pictures.style import BLUE, DASHES, MARKED_POINTS, Pen, covered_if_few, with_pens
from composer_ema.run_folder.outputs import Array, Axis

if TYPE_CHECKING:  # both take seconds to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from composer_ema.recipe.preview import Preview, Profile


def draw_previews(previews: Sequence[Preview], *, axis: Axis | None = None) -> Figure:
    """Draws recipes over one another, each panel for which one of them has data.

    Args:
        previews: At least one; their names label them.
        axis: ``'epoch'`` or ``'batch'``. Default: epochs if every recipe trains for at least one, else batches.
    """
    if axis is None:
        axis = 'epoch' if all(each.batches >= each.batches_per_epoch for each in previews) else 'batch'
    end = max(each.batches / (each.batches_per_epoch if axis == 'epoch' else 1) for each in previews)
    title = previews[0].name if len(previews) == 1 else None
    return canvas.draw(_PANELS, previews, axis=axis, end=end, legend=_legend, title=title)


def describe(profile: Profile) -> str:
    """A profile in words: its settings, its half-life as a share of the run if it has one, its effective steps."""
    share = '' if profile.half_life_share is None else f' ({_three_digits(100 * profile.half_life_share)} % of the run)'
    steps = f'effective number of steps 1/Σw² = {_three_digits(profile.effective_steps)} of {len(profile.batch):,}'
    return f'{profile.name}: {profile.settings}{share}, {steps}'


def _three_digits(value: float) -> str:
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def _draw_profiles(axes: Axes, previews: Sequence[Preview], axis: Axis) -> None:
    """Draws the share of each update, in per cent."""
    heights = []
    profiles = list(_profiles(previews, axis))
    sizes = covered_if_few([(x, profile.share) for profile, x, _ in profiles])
    for (profile, x, style), size in zip(profiles, sizes, strict=True):
        if len(x) <= MARKED_POINTS:
            style = {'marker': 'o', 'markersize': 4.5, **style, **size}
        axes.plot(x, 100 * profile.share, **style)
        heights += _heights(profile)
    if len(previews) == 1 and len(previews[0].profiles) == 1:
        _shade_newest_half(axes, previews[0], axis)
    if max(heights) > LARGE_RATIO / 4 * min(heights):
        axes.set_yscale('log')
        axes.set_ylim(min(heights) / 100, 2 * max(heights))
        axes.yaxis.set_major_formatter('{x:g}')
    else:
        axes.set_ylim(0, 1.08 * max(heights))
    axes.set_ylabel('weight of each step in\nthe average at the end (%)')


def _heights(profile: Profile) -> list[float]:
    """The largest share in per cent; if the first copy stands far above the rest, the largest of the rest too."""
    share = 100 * profile.share
    has_heavy_start = len(share) > 1 and share[0] == share.max() and share[0] > LARGE_RATIO * np.median(share)
    return [share.max(), share[1:].max()] if has_heavy_start else [share.max()]


def _shade_newest_half(axes: Axes, preview: Preview, axis: Axis) -> None:
    [(profile, x, _)] = _profiles([preview], axis)
    is_new = profile.batch > profile.batches - profile.newest_half
    axes.fill_between(x, 0, 100 * profile.share, where=is_new.tolist(), color=BLUE, alpha=0.2, linewidth=0)
    batches = 'batch' if profile.newest_half == 1 else f'{profile.newest_half:,} batches'
    note(axes, f'shaded: half of the average, made in the last {batches}', WIDE_PANEL_CHARACTERS)


def _draw_cumulated_profiles(axes: Axes, previews: Sequence[Preview], axis: Axis) -> None:
    profiles = list(_profiles(previews, axis))
    lines = [(np.append(x, x[-1]), 100 * np.append(0, np.cumsum(profile.share))) for profile, x, _ in profiles]
    for (x, y), (*_, style), size in zip(lines, profiles, covered_if_few(lines), strict=True):
        axes.plot(x, y, drawstyle='steps-pre', **style | size)
    axes.axhline(50, color='0.45', linewidth=0.9, linestyle=':', zorder=0)
    axes.set_ylim(0, 104)
    axes.set_ylabel('part of the average that is\nmade up to here (%)')


def _profiles(previews: Sequence[Preview], axis: Axis) -> Iterator[tuple[Profile, Array, dict[str, Any]]]:
    """Every profile, the position of its updates along the axis, and how it is drawn."""
    for preview, pen in with_pens(previews):
        for (profile, own), style in zip(with_pens(preview.profiles), _styles(preview, pen, previews), strict=True):
            x = profile.batch / (preview.batches_per_epoch if axis == 'epoch' else 1)
            if 'marker' in style:
                style |= (pen if len(previews) > 1 else own).sparse(len(x))
            yield profile, x, style


def _styles(preview: Preview, pen: Pen, previews: Sequence[Preview]) -> list[dict[str, Any]]:
    """How the averages of a recipe are drawn: each in a colour if it is the only recipe, else in the recipe's pen."""
    dashes = [dashes for dashes, _ in zip(cycle(DASHES), preview.profiles, strict=False)]
    if len(previews) > 1:
        return [{'color': pen.colour, 'linestyle': each, 'marker': pen.marker} for each in dashes]
    if len(preview.profiles) == 1:
        return [{'color': BLUE, 'linestyle': '-'}]
    pens = with_pens(preview.profiles)
    return [
        {'color': own.colour, 'linestyle': each, 'marker': own.marker}
        for (_, own), each in zip(pens, dashes, strict=True)
    ]


_PANELS: tuple[tuple[Panel[Any], ...], ...] = (
    (RATES, MOMENTA),
    (
        Panel(_draw_profiles, lambda preview: bool(preview.profiles)),
        Panel(_draw_cumulated_profiles, lambda preview: bool(preview.profiles)),
    ),
)


def _equal_to(preview: Preview, previews: Sequence[Preview]) -> str:
    """The first recipe that does exactly what this one does, if that is another; its curves are covered."""

    def trace(each: Preview) -> list[bytes]:
        scheduled = [*each.rates.values(), *each.momenta.values()]
        return [*(curve.value.tobytes() for curve in scheduled), *(own.share.tobytes() for own in each.profiles)]

    first = next(each for each in previews if trace(each) == trace(preview))
    return '' if first is preview else f' = {first.name}'


def _legend(previews: Sequence[Preview]) -> list[tuple[Line2D, str]]:
    from matplotlib.lines import Line2D

    entries = []
    for preview, pen in with_pens(previews):
        name = [f'{preview.name}{_equal_to(preview, previews)}'] if len(previews) > 1 else []
        described, remarks = [*map(describe, preview.profiles)], '; '.join(preview.remarks)
        styles = [{'markersize': 4.5, **style} for style in _styles(preview, pen, previews)]
        if len(described) > 1:
            own = [(Line2D([], [], **style), said) for style, said in zip(styles, described, strict=True)]
            heading = '\n'.join(filter(None, [*name, remarks]))
            entries += [(Line2D([], [], linestyle='none'), heading), *own] if heading else own
            continue
        said = '; '.join(filter(None, [*described, remarks]))
        style = styles[0] if styles else {'color': pen.colour if name else BLUE, 'marker': pen.marker if name else None}
        if name or said:
            entries.append((Line2D([], [], **style), '\n'.join(filter(None, [*name, said]))))
    return entries
