"""Turns what docstrings write for other tools into what this site reads: roles into links, directives into Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

#: In docstrings, and as the site's reader of Google style and its Markdown want it.
_REWRITTEN = (
    (re.compile(r'::$', re.MULTILINE), ':'),
    (re.compile(r'^( *)Example:\n(?: *\.\. code:: python\n\n)?', re.MULTILINE), r'\1Examples:\n'),
    (re.compile(r'^ *\.\. code:: python$', re.MULTILINE), ''),
)
#: Several names of one section's entry, such as ``a, b: two numbers``, with the lines that go on below it.
_SHARED_ENTRY = re.compile(r'^ {4}(\w+(?:, \w+)+)(: .*(?:\n(?: {5,}.*|(?=\n {5})))*)$', re.MULTILINE)
_ROLE = re.compile(r':(?:class|meth|func|mod|data|attr|exc):`(~?)([\w.]+)`')


class Roles(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = _ROLE.sub(lambda match: _link(obj, match[2], is_short=bool(match[1])), obj.docstring.value)
            for pattern, replacement in _REWRITTEN:
                text = pattern.sub(replacement, text)
            obj.docstring.value = _SHARED_ENTRY.sub(_one_each, text)


def _one_each(entry: re.Match[str]) -> str:
    return '\n'.join(f'    {name}{entry[2]}' for name in entry[1].split(', '))


def _link(obj: griffe.Object, target: str, *, is_short: bool) -> str:
    """A link where the target has a place on the site, which is known only later; else its name."""
    first, _, rest = target.partition('.')
    try:
        path = obj.resolve(first) + (f'.{rest}' if rest else '')
    except griffe.NameResolutionError:
        path = target
    shown = target.rpartition('.')[2] if is_short else target
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
