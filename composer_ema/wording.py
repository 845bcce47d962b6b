"""What messages have in common: the legal names near a wrong one, or all of them, and numbers that agree with nouns.

And :func:`visible`, which every text goes through before a terminal, a log or a picture shows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

#: How many legal names a message lists before it gives their number only: all keys of a recipe, all models.
LISTED = 100
#: Up to this length, a slip makes another name of any.
_NO_SLIP = 2
#: From this length on, two slips still leave a name that can be told from others.
_TWO_SLIPS = 6
#: From this length on, the beginning or the end of a name says which one is meant.
_SHORTEST_PART = 4
#: How many near names a message offers; where more are near, none is nearer than the others.
_OFFERED = 3
#: Up to this many letters, a message shows a value as Python writes it.
_SHOWN = 120


def visible(text: object, keep: str = '') -> str:
    r"""A text in which a file or a name cannot hide or move anything: what does not print is shown as Python writes it.

    Such are control characters, with which a terminal is told to move, to rename its window or to answer; line breaks;
    marks that turn the direction of writing, or have no width; and bytes that are no text.

    Args:
        text: what is to be shown.
        keep: characters to leave as they are, such as the line breaks of a table of ours. Default: none.

    Example:
        >>> print(visible('\x1b[31mred\n'), visible('naïve 名前 →'), visible('a\u202eb'), visible('two\nlines', '\n'))
        \x1b[31mred\n naïve 名前 → a\u202eb two
        lines
    """
    text = str(text)
    if text.isprintable():
        return text
    return ''.join(each if each.isprintable() or each in keep else repr(each)[1:-1] for each in text)


def snake_case(name: str) -> str:
    """A class name as recipes write it.

    Example:
        >>> snake_case('RandomResizedCrop'), snake_case('SGDWithWarmup')
        ('random_resized_crop', 'sgd_with_warmup')
    """
    return re.sub(r'(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])', '_', name).lower()


def squash(name: str) -> str:
    """A name as recipes compare it: case, ``_`` and ``-`` make no difference."""
    return name.lower().replace('_', '').replace('-', '')


def near(name: object, legal: Iterable[str], spellings: Mapping[str, str] | None = None) -> list[str]:
    """The legal names that ``name`` may be a slip of, at most three; none if no spelling is close.

    Case, ``_`` and ``-`` make no difference. Close is one slip (a letter too many, too few or another one, or two in
    the wrong order), two in names of six letters or more, and none in names of two. If no name is that close, it is one
    that begins or ends with ``name``, of four letters or more.

    Args:
        name: What was given.
        legal: What could have been given.
        spellings: Other spellings of legal names, each with the name that it stands for. Default: none.

    Example:
        >>> near('half_lif', ['half_life', 'smoothing']), near('lr', ['loggers'])
        (['half_life'], [])
    """
    given = squash(str(name))
    by_slips: dict[int, list[str]] = {}
    parts = []
    for spelling, each in {**{each: each for each in legal}, **(spellings or {})}.items():
        squashed = squash(spelling)
        slips = _slips(given, squashed)
        if slips <= _slips_allowed(given, squashed):
            by_slips.setdefault(slips, []).append(each)
        elif len(given) >= _SHORTEST_PART and (squashed.startswith(given) or squashed.endswith(given)):
            parts.append(each)
    found = list(dict.fromkeys(by_slips[min(by_slips)] if by_slips else parts))
    return found if len(found) <= _OFFERED else []


def suggestion(
    name: object,
    legal: Iterable[str],
    otherwise: str = 'Legal names are',
    *,
    spellings: Mapping[str, str] | None = None,
) -> str:
    """The last sentence of an error about a wrong name: the near names, or else all that are legal.

    Args:
        name: What was given.
        legal: What could have been given, in the order to list it in.
        otherwise: The words before the list.
        spellings: As for :func:`near`.

    Example:
        >>> suggestion('half_lif', ['half_life', 'smoothing'])
        "Did you mean 'half_life'?"
        >>> suggestion('lr', ['half_life', 'smoothing'], 'It takes')
        'It takes half_life, smoothing.'
    """
    legal = list(dict.fromkeys(legal))
    found = [repr(each) for each in near(name, legal, spellings)]
    if found:
        *first, last = found
        return f'Did you mean {", ".join(first)} or {last}?' if first else f'Did you mean {last}?'
    if not legal:
        return f'{otherwise} none.'
    more = f' and {len(legal) - LISTED} more' if len(legal) > LISTED else ''
    return f'{otherwise} {", ".join(legal[:LISTED])}{more}.'


def counted(number: float, noun: str) -> str:
    """A number and a noun that agrees with it.

    Args:
        number: How many.
        noun: The noun in the singular.

    Example:
        >>> counted(1, 'batch'), counted(1200, 'batch'), counted(0.5, 'epoch'), counted(2, 'more parameter')
        ('1 batch', '1,200 batches', '0.5 epochs', '2 more parameters')
    """
    amount = f'{int(number):,}' if float(number).is_integer() else f'{number:,.6g}'
    return f'{amount} {noun if number == 1 else _plural(noun)}'


def figure(number: float) -> str:
    """A number as a time string has it: a whole one with all its digits, another one with six.

    Example:
        >>> figure(1_500_928.0), figure(4.465053763)
        ('1500928', '4.46505')
    """
    return str(int(number)) if float(number).is_integer() else f'{number:g}'


def shown(value: object) -> str:
    """A value as a message shows it: as Python writes it, on one line, cut where that is long.

    Args:
        value: Anything, also what cannot say what it is.

    Example:
        >>> shown('half_life'), shown('x' * 200)[:6], shown(lambda: 0)[:10]
        ("'half_life'", "'xxxxx", '<function ')
    """
    try:
        written = visible(' '.join(repr(value).split()))
    except Exception:  # of the value's own
        return f'a {type(value).__name__}'
    return written if len(written) <= _SHOWN else f'{written[: _SHOWN - 3]}...'


def _plural(noun: str) -> str:
    if noun.endswith('ry'):
        return f'{noun[:-1]}ies'
    return f'{noun}es' if noun.endswith(('tch', 'sh', 's', 'x')) else f'{noun}s'  # but epochs


def _slips_allowed(one: str, other: str) -> int:
    if max(len(one), len(other)) <= _NO_SLIP:
        return 0
    return 1 if min(len(one), len(other)) < _TWO_SLIPS else 2


def _slips(one: str, other: str) -> int:
    """The distance of Damerau and Levenshtein, each letter moved once at most."""
    above: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, above, row = above, row, [i]
        for j, its in enumerate(other, 1):
            best = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != its))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == its:
                best = min(best, before[j - 2] + 1)
            row.append(best)
    return row[-1]
