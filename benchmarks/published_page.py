"""How runs of many recipes ended: a table for the terminal, and one in Markdown with its picture for a page."""

from __future__ import annotations

import io
import math
import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from composer_ema.files import write_beside
from composer_ema.pictures.style import strokes
from composer_ema.pictures.weights import TRAINING, averages, in_words
from composer_ema.recipe.arguments import Place

BEGIN, END = '<!-- table: begin -->', '<!-- table: end -->'
_TRAINING_WEIGHTS = in_words([TRAINING])[TRAINING]


@dataclass(frozen=True)
class Published:
    """What others reported of a run.

    Args:
        accuracy: Share of right answers, in [0, 1].
        loss: Cross entropy in nats.
    """

    accuracy: float
    loss: float


@dataclass(frozen=True)
class Ending:
    """How one run ended.

    Args:
        accuracy: Label of each set of weights to its share of right answers in the last evaluation, in [0, 1].
        loss: Likewise, cross entropy in nats.
        made_on: What it ran with: date, versions, number of threads.
    """

    accuracy: dict[str, float]
    loss: dict[str, float]
    made_on: dict[str, str]


@dataclass(frozen=True)
class Row:
    """All runs of one recipe.

    Args:
        name: The recipe's name.
        duration: How long it trains, as the recipe says it.
        published: What others reported; None if nobody did.
        endings: One per seed.
    """

    name: str
    duration: str
    published: Published | None
    endings: list[Ending]

    @property
    def words(self) -> dict[str, str]:
        """Label of each set of weights that was evaluated, to what a reader calls it."""
        return in_words(label for each in self.endings for label in (*each.accuracy, *each.loss))

    def values(self, quantity: str, words: str) -> list[float]:
        """``'accuracy'`` or ``'loss'`` of each seed; empty if these weights were not evaluated.

        Args:
            quantity: ``'accuracy'`` or ``'loss'``.
            words: What a reader calls the weights. So the only average of every recipe stands in one column.
        """
        labels = [label for label, own in self.words.items() if own == words]
        found = [getattr(each, quantity) for each in self.endings]
        return [values[label] for values in found for label in labels if label in values]

    def gain(self, words: str) -> float | None:
        """Mean accuracy of these weights less the published one; None if there are not both."""
        values = self.values('accuracy', words)
        return statistics.fmean(values) - self.published.accuracy if values and self.published else None


def as_table(rows: Sequence[Row]) -> Table:
    """The accuracies for the terminal; the page has the losses too."""
    header, *lines = _cells(rows)
    table = Table(title=_over_seeds(rows), title_justify='left', box=SIMPLE_HEAD, pad_edge=False)
    wanted = ('recipe', 'published', *_columns(rows), *map(_gain, _averages(rows)))
    shown = [header.index(name) for name in wanted if name in header]
    for column in shown:
        above, space, below = header[column].rpartition(' ')
        heading = f'{above}\n{below}' if space else below
        table.add_column(heading, justify='right' if column else 'left', no_wrap=True)
    for line in lines:
        table.add_row(*(line[column].replace(' ± ', '±') for column in shown))
    return table


def as_markdown(rows: Sequence[Row]) -> str:
    """The table for a page."""
    header, *lines = _cells(rows)
    rule = [':---' if name == 'recipe' else '---:' for name in header]
    return ''.join(f'| {" | ".join(line)} |\n' for line in (header, rule, *lines))


def draw(rows: Sequence[Row]) -> Figure:
    """A picture of every final accuracy: a line for each recipe, a mark for each seed, and what was published.

    The mean over seeds has a mark where there are several.
    """
    figure = Figure(figsize=(9, 1.2 + 0.42 * len(rows)), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours, has_means = _colours(rows), any(len(row.endings) > 1 for row in rows)
    for height, row in enumerate(reversed(rows)):
        axes.axhline(height, color='0.9', linewidth=0.8, zorder=0)
        for index, (words, colour) in enumerate(colours.items()):
            own = height + 0.28 * (index - (len(colours) - 1) / 2) / max(len(colours) - 1, 1)
            values = [100 * value for value in row.values('accuracy', words)]
            axes.plot(values, [own] * len(values), 'o', color=colour, alpha=0.45, markersize=4, mew=0)
            if has_means and values:
                axes.plot(statistics.fmean(values), own, '|', color=colour, markersize=11, markeredgewidth=2.4)
        if row.published is not None:
            axes.plot(100 * row.published.accuracy, height, 'D', color='0.15', markersize=6, markerfacecolor='none')
    for words, colour in reversed(colours.items()):
        axes.plot([], [], 'o', color=colour, markersize=5, label=words)
    if has_means:
        axes.plot([], [], '|', color='0.4', markersize=11, markeredgewidth=2.4, label='mean over seeds')
    if any(row.published for row in rows):
        axes.plot([], [], 'D', color='0.15', markersize=6, markerfacecolor='none', label='published')
    axes.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    axes.set(xlabel='final accuracy (%)', ylim=(-0.6, len(rows) - 0.4))
    axes.tick_params(axis='y', length=0)
    axes.spines[['top', 'right', 'left']].set_visible(False)
    figure.legend(loc='outside upper left', ncols=4, frameon=False, fontsize=9)
    return figure


def write(rows: Sequence[Row], page: Path, *, is_page: bool, command: str) -> list[Path]:
    """Writes the table and its picture.

    Args:
        rows: What to write.
        page: A Markdown file; the picture goes into ``images`` beside it.
        is_page: Whether the table goes between the markers of a page that exists; else the file holds it alone.
        command: The command that made it; empty for none.

    Returns:
        list[Path]: The files.

    Raises:
        RecipeError: The page cannot be read, or has no place for the table.
    """
    picture = page.parent / 'images' / f'{page.stem}_table.png'
    buffer = io.BytesIO()
    draw(rows).savefig(buffer, format='png', dpi=150)
    write_beside(picture, buffer.getvalue())
    made_by = f'Made by `{command}`' if command else 'Made'
    words = _over_seeds(rows)
    text = (
        f'{words[0].upper()}{words[1:]}; losses are cross entropies in nats. {made_by} ({_made_on(rows)}).\n\n'
        f'{as_markdown(rows)}\n'
        f'![Final accuracy of every run]({picture.relative_to(page.parent)})\n'
    )
    if is_page:
        before, after = split(page)
        text = f'{before}{BEGIN}\n\n{text}\n{END}{after}'
    write_beside(page, text)
    return [page, picture]


def split(page: Path) -> tuple[str, str]:
    """The text of a page before and after its markers.

    Raises:
        RecipeError: The page cannot be read, or has no place for the table.
    """
    place = Place(os.fspath(page))
    try:
        text = page.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise place.error(f'cannot be read: {error}.') from error
    # A page may speak of the markers, too: only those that stand alone on a line count.
    parts = re.split(f'^(?:{re.escape(BEGIN)}|{re.escape(END)})$', text, flags=re.MULTILINE)
    if len(parts) != 3 or text[len(parts[0]) :].startswith(END):
        raise place.error(f'must hold {BEGIN} and below it {END}, once each on a line alone. The table goes between.')
    before, _, after = parts
    return before, after


def _columns(rows: Sequence[Row]) -> list[str]:
    """What readers call the sets of weights of all rows, the training weights first."""
    found = dict.fromkeys(words for row in rows for words in row.words.values())
    return sorted(found, key=lambda words: words != _TRAINING_WEIGHTS)


def _averages(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.words[label] for row in rows for label in averages(row.words)))


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """The colour of each column: those that the pictures of single runs have."""
    columns = _columns(rows)
    labels = [TRAINING if words == _TRAINING_WEIGHTS else words for words in columns]
    return {words: strokes(labels)[label].colour for words, label in zip(columns, labels, strict=True)}


def _gain(words: str) -> str:
    return f'{words} − published'


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """The header and the lines, without columns of published figures if there are none."""
    columns, averaged = _columns(rows), _averages(rows)
    header = ['recipe', 'length', 'published', *columns, *map(_gain, averaged)]
    header += ['published loss', *(f'loss of {words}' for words in columns)]
    table = [header, *(_line(row, columns, averaged) for row in rows)]
    is_said = [column < 2 or any(line[column] for line in table[1:]) for column in range(len(header))]
    return [[cell for cell, said in zip(line, is_said, strict=True) if said] for line in table]


def _line(row: Row, columns: Sequence[str], averaged: Sequence[str]) -> list[str]:
    published = row.published
    gains = [row.gain(words) for words in averaged]
    return [
        *(row.name, row.duration, f'{100 * published.accuracy:.1f}' if published else ''),
        *(_spread([100 * value for value in row.values('accuracy', words)], 2) for words in columns),
        *('' if gain is None else f'{100 * gain:+.2f}' for gain in gains),
        f'{published.loss:.3f}' if published else '',
        *(_spread(row.values('loss', words), 4) for words in columns),
    ]


def _spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; a single value alone."""
    if not values:
        return '–'
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    mean = f'{statistics.fmean(values):.{digits}f}'
    return mean if math.isnan(deviation) else f'{mean} ± {deviation:.{digits}f}'


def _over_seeds(rows: Sequence[Row]) -> str:
    number = max(len(row.endings) for row in rows)
    words = f'mean ± standard deviation over {number} seeds' if number > 1 else 'one seed'
    return f'final accuracy in %, {words}'


def _made_on(rows: Sequence[Row]) -> str:
    """What the runs ran with, in words."""
    kinds = {kind: sorted({each.made_on[kind] for row in rows for each in row.endings}) for kind in _kinds(rows)}
    return ', '.join(f'{kind} {" and ".join(values)}' for kind, values in kinds.items())


def _kinds(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(kind for row in rows for each in row.endings for kind in each.made_on))
