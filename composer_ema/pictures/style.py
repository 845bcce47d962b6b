"""How lines look: the colours, markers and dashes of runs and of sets of weights.

One run is coloured by its weights, several by run. Markers distinguish them in grey print and to colour-blind eyes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal, TypeVar

from composer_ema.pictures.weights import TRAINING, UNNAMED, in_order
from composer_ema.run_folder.outputs import Array, Curve

_T = TypeVar('_T')

# Okabe and Ito's colours, distinct to colour-blind eyes, in an order in which neighbours differ in grey too.
BLUE, ORANGE, BLACK, GREEN, VERMILION, SKY, PURPLE = (
    '#0072B2', '#E69F00', '#000000', '#009E73', '#D55E00', '#56B4E9', '#CC79A7',
)  # fmt: skip
_COLOURS = (BLUE, ORANGE, BLACK, GREEN, VERMILION, SKY, PURPLE)
_MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', '*')
GREY = '0.35'
DASHES = ('-', '--', ':', '-.')
#: What a metrics file and a reader call a momentum.
MOMENTUM_WORDS = {'momentum': 'momentum', 'beta1': 'β₁'}
# More values than this get markers at even distances: one each would run into the next.
MARKED_POINTS = 25
_MARKER_DISTANCE, _MARKER_SIZE = 0.22, 4.5
# How much wider a line may be than the last of those that cover it, in points.
_WIDEST = 12.0

#: What matplotlib is set to while a picture is drawn or written.
RC: Any = {
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


@dataclass(frozen=True)
class Stroke:
    """How the evaluations of one set of weights are drawn.

    Args:
        colour: A colour of matplotlib.
        marker: A marker of matplotlib.
        dashes: A line style of matplotlib.
        is_hollow: Whether markers are filled with white. Default: False.
    """

    colour: str
    marker: str
    dashes: Literal['-', '--', '-.', ':']
    is_hollow: bool = False

    @property
    def face(self) -> str:
        """The colour inside its markers."""
        return 'white' if self.is_hollow else self.colour


_OF_TRAINING = Stroke(VERMILION, 's', '--', is_hollow=True)
_OF_UNNAMED = Stroke(PURPLE, 'X', ':')
_OF_AVERAGES = (
    Stroke(BLUE, 'o', '-'),
    Stroke(GREEN, '^', '-.'),
    Stroke(ORANGE, 'D', ':'),
    Stroke(SKY, 'v', '-'),
    Stroke(BLACK, 'P', '-.'),
)


def strokes(labels: Iterable[str]) -> dict[str, Stroke]:
    """The stroke of each set of weights; averages take theirs from a cycle, in the order given.

    Example:
        >>> [(label, stroke.marker) for label, stroke in strokes(['fast', 'slow', 'training']).items()]
        [('training', 's'), ('fast', 'o'), ('slow', '^')]
    """
    of_averages = cycle(_OF_AVERAGES)
    own = {TRAINING: _OF_TRAINING, UNNAMED: _OF_UNNAMED}
    return {label: own[label] if label in own else next(of_averages) for label in in_order(labels)}


@dataclass(frozen=True)
class Pen:
    """How one of several runs is drawn.

    Args:
        colour: A colour of matplotlib.
        marker: A marker of matplotlib.
        offset: Where along a curve its first marker stands, as a share of the width of the panel.
    """

    colour: str
    marker: str
    offset: float

    def along(self) -> dict[str, Any]:
        """For a curve of many values: markers at even distances, shifted so that equal curves show all of them."""
        return {
            'color': self.colour,
            'marker': self.marker,
            'markevery': (self.offset, _MARKER_DISTANCE),
            'markersize': _MARKER_SIZE,
        }

    def sparse(self, count: int) -> dict[str, Any]:
        """Markers for ``count`` values: one each if they are few, else as in :meth:`along`."""
        every = None if count <= MARKED_POINTS else (self.offset, _MARKER_DISTANCE)
        return {'markersize': _MARKER_SIZE, 'markevery': every}


def with_pens(runs: Sequence[_T]) -> Iterator[tuple[_T, Pen]]:
    """Each run with the pen that draws it."""
    for index, run in enumerate(runs):
        offset = _MARKER_DISTANCE * (0.3 + index) / max(len(runs), 2)
        yield run, Pen(_COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)], offset)


def covered(curves: Sequence[tuple[Array, Array]]) -> list[dict[str, Any]]:
    """The width of each line and the size of its markers, so that a line shows on both sides of one that covers it.

    Args:
        curves: Positions and values of each line, in the order in which they are drawn.

    Example:
        >>> one, other = ([0, 1], [5, 5]), ([0, 1], [6, 6])
        >>> [style['linewidth'] for style in covered([one, other, one])]
        [4.0, 1.5, 1.5]
    """
    points = [{(float(a), float(b)) for a, b in zip(x, y, strict=True)} for x, y in curves]
    above = [
        sum(2 * len(own & other) >= len(own) > 0 for other in points[index + 1 :]) for index, own in enumerate(points)
    ]
    step = min(2.5, _WIDEST / max([1, *above]))
    return [
        {'linewidth': RC['lines.linewidth'] + step * number, 'markersize': _MARKER_SIZE + 1.4 * step * number}
        for number in above
    ]


def covered_if_few(curves: Sequence[tuple[Array, Array]]) -> list[dict[str, Any]]:
    """Like :func:`covered` for few values; many have their markers at different places, which shows each line."""
    return covered(curves) if all(len(x) <= MARKED_POINTS for x, _ in curves) else [{} for _ in curves]


def few(curve: Curve, marker: str) -> str:
    """The marker if the values are few enough to carry one each, else none."""
    return marker if len(curve) <= MARKED_POINTS else ''
