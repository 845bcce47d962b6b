"""Prints tables whole: as wide as they are off the terminal, and with nothing cut on a narrow one.

Strings in a table are shown as they are: nothing in them is markup, and what does not print is escaped.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from composer_ema.wording import visible

#: Wider than any table.
_UNLIMITED = 1_000_000


def facts(title: str, rows: Mapping[str, str]) -> Table:
    """A table without headings: in each row the name of a fact, and the fact."""
    table = Table(title=title, title_justify='left', show_header=False)
    for name, fact in rows.items():
        table.add_row(name, fact)
    return table


def number(value: float) -> str:
    """A loss with four decimals; those of a run that diverges would be a row of digits, and those of a tiny one 0.

    Example:
        >>> number(0.26204), number(3e7), number(2e-6)
        ('0.2620', '3.000e+07', '2.000e-06')
    """
    return f'{value:.4f}' if value == 0 or 1e-3 <= abs(value) < 1e5 else f'{value:.3e}'


class Whole:
    """A table that breaks no name and no number into pieces. Print it with ``crop=False``.

    Off the terminal each row is one line, however long, so that ``grep`` finds what is in it. On a terminal that is too
    narrow, words move to the next line. If the longest words do not fit side by side, each row becomes a line with its
    first cell and below it the others, each after its heading. The values of a table without headings are folded.

    Args:
        table: The table; it is not changed.
    """

    def __init__(self, table: Table) -> None:
        self._table = copy.copy(table)
        self._table.columns = [
            dataclasses.replace(column, header=_text(column.header, keep='\n'), _cells=list(map(_text, column.cells)))
            for column in table.columns
        ]
        # Rich would break a title that is longer than the table.
        self._title, self._table.title = table.title, None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unlimited = options.update(width=_UNLIMITED)
        spans = [_span(console, unlimited, column) for column in self._table.columns]
        longest, shortest = [span.maximum for span in spans], [span.minimum for span in spans]
        frame = Measurement.get(console, unlimited, self._table).maximum - sum(longest)
        room = options.max_width - frame
        if self._title:
            yield _unbroken(_text(self._title, style='table.title'))
        if not console.is_terminal or sum(longest) <= room:
            yield from console.render(self._with(longest), unlimited)
        elif not self._table.show_header:
            yield from console.render(self._with([*longest[:-1], max(1, room - sum(longest[:-1]))]), unlimited)
        elif sum(shortest) <= room:
            yield from console.render(self._with(_shared(spans, room)), unlimited)
        else:
            yield from self._records(options.max_width)

    def _with(self, widths: Sequence[int]) -> Table:
        table = copy.copy(self._table)
        table.columns = [
            dataclasses.replace(column, width=width, overflow='fold', no_wrap=False)
            for column, width in zip(table.columns, widths, strict=True)
        ]
        return table

    def _records(self, width: int) -> Iterator[Text | Padding]:
        headings = [' '.join(_text(column.header).plain.split()) for column in self._table.columns]
        for row in zip(*(column.cells for column in self._table.columns), strict=True):
            first, *others = [
                Text.assemble(f'{heading}: ', _text(cell))
                for heading, cell in zip(headings, row, strict=True)
                if _text(cell).plain
            ]
            yield _unbroken(first)
            for line in _lines(others, width - 2):
                yield Padding(line, (0, 0, 0, 2))


def _span(console: Console, options: ConsoleOptions, column: Column) -> Measurement:
    """The width of the longest word of a column, and that of its longest line.

    Where a column does not wrap, its cells stay whole, and only its heading may take several lines.
    """
    heading, *cells = (Measurement.get(console, options, cell) for cell in (column.header, *column.cells))
    longest = [cell.maximum for cell in cells]
    words = longest if column.no_wrap else [cell.minimum for cell in cells]
    return Measurement(max([heading.minimum, *words]), max([heading.maximum, *longest]))


def _shared(spans: Sequence[Measurement], room: int) -> list[int]:
    """Widths between the longest words and the longest lines that fill the room, the narrowest columns first."""
    widths = [span.minimum for span in spans]
    for index in sorted(range(len(spans)), key=lambda index: spans[index].span):
        widths[index] += min(spans[index].span, room - sum(widths))
    return widths


def _lines(items: Sequence[Text], width: int) -> Iterator[Text]:
    """The items with commas between, as many to a line as fit."""
    line = Text()
    for index, item in enumerate(items):
        item = item if index == len(items) - 1 else Text.assemble(item, ',')
        if line and line.cell_len + 1 + item.cell_len > width:
            yield line
            line = Text()
        line = Text.assemble(line, ' ', item) if line else item
    if line:
        yield line


def _text(cell: RenderableType, *, style: str = '', keep: str = '') -> Text:
    return cell.copy() if isinstance(cell, Text) else Text(visible(cell, keep), style=style)


def _unbroken(text: Text) -> Text:
    text.no_wrap, text.overflow = True, 'ignore'
    return text
