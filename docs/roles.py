"""Turns what docstrings write for other tools into what this site reads: roles into links, directives into Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

#: In docstrings, and as the site's reader of Google style and its Markdown want it.
_REWRITTEN = (
    (re.compile(r'::$', re.MULTILINE), ':'),
    (re.compile(r'^( *)Example:$', re.MULTILINE), r'\1Examples:'),
    (re.compile(r'^ *\.\. code:: python$', re.MULTILINE), ''),
)
_ROLE = re.compile(r':(?:class|meth|func|mod|data|attr|exc):`(~?)([\w.]+)`')


class Roles(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = _ROLE.sub(lambda match: _link(obj, match[2], is_short=bool(match[1])), obj.docstring.value)
            for pattern, replacement in _REWRITTEN:
                text = pattern.sub(replacement, text)
            obj.docstring.value = text


def _link(obj: griffe.Object, target: str, *, is_short: bool) -> str:
    """A link where the target has a place on the site, which is known only later; else its name."""
    first, _, rest = target.partition('.')
    try:
        path = obj.resolve(first) + (f'.{rest}' if rest else '')
    except griffe.NameResolutionError:
        path = target
    shown = target.rpartition('.')[2] if is_short else target
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
