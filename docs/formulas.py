"""Turns the formulas of a page into MathML, which browsers draw by themselves: nothing is fetched, no script runs."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex makes of $...$ and $$...$$.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
# Browsers know the attribute mathvariant only as "normal" on one letter; several letters in one element are upright.
_WORD = re.compile(r'(?:<mi mathvariant="(normal|monospace)">\w</mi>)(?:<mi mathvariant="\1">\w</mi>)+')
_CAPITAL_GREEK = re.compile(r'<mi>(&#x0039[1-9A-F];|&#x003A[0-9];)</mi>')


def on_page_content(content: str, **_: Any) -> str:
    """Replaces them; called by mkdocs with the HTML of each page."""
    return _FORMULA.sub(_drawn, content)


def _drawn(match: re.Match[str]) -> str:
    tag = match[1]
    mathml = convert(html.unescape(match[2]), display='block' if tag == 'div' else 'inline')
    mathml = _CAPITAL_GREEK.sub(r'<mi mathvariant="normal">\1</mi>', _WORD.sub(_as_one, mathml))
    return f'<{tag} class="formula">{mathml}</{tag}>'


def _as_one(letters: re.Match[str]) -> str:
    style = ' style="font-family: monospace"' if letters[1] == 'monospace' else ''
    return f'<mi{style}>{"".join(re.findall(">(.)<", letters[0]))}</mi>'
