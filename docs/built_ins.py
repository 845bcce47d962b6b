"""Writes the tables of data sets and models in their card from the signatures: ``python docs/built_ins.py``."""

from __future__ import annotations

import configparser
import importlib
import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CARD = ROOT / 'method_cards/data_and_models.md'


def table(kind: str) -> str:
    """The rows of one kind, ``'datasets'`` or ``'models'``, as setup.cfg registers them."""
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg')
    points = textwrap.dedent(config['options.entry_points'][f'composer_ema.{kind}']).strip().splitlines()
    rows = [_row(*(part.strip() for part in point.split('='))) for point in points]
    return '\n'.join(['| name | what it is | arguments and defaults |', '|---|---|---|', *rows])


def with_tables(text: str) -> str:
    """The text of the card with each table between its two marks replaced by the one of the signatures."""
    for kind in ('datasets', 'models'):
        begin, end = f'<!-- {kind} -->\n\n', f'\n\n<!-- end of {kind} -->'
        before, _, rest = text.partition(begin)
        _, _, after = f'\n\n{rest}'.partition(end)
        text = f'{before}{begin}{table(kind)}{end}{after}'
    return text


def _row(name: str, where: str) -> str:
    module, _, attribute = where.partition(':')
    found = getattr(importlib.import_module(module), attribute)
    what = re.sub(r'\s+', ' ', inspect.getdoc(found).split('\n\n')[0]).replace('|', r'\|')  # pyright: ignore[reportOptionalMemberAccess]: each has one
    arguments = ', '.join(f'`{each.name}: {_as_yaml(each.default)}`' for each in _parameters(found))
    return f'| `{name}` | {what} | {arguments} |'


def _parameters(found: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(found).parameters.values())


def _as_yaml(default: Any) -> str:
    if default is inspect.Parameter.empty:
        return '...'
    return json.dumps(list(default) if isinstance(default, tuple) else default)


if __name__ == '__main__':
    CARD.write_text(with_tables(CARD.read_text(encoding='utf-8')), encoding='utf-8')
