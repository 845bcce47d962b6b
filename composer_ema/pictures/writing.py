"""Writes pictures as files."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from composer_ema.files import in_words, write_beside
from composer_ema.pictures.errors import PlotError
from composer_ema.pictures.style import RC

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The endings that a picture may have.
FORMATS = ('png', 'svg', 'pdf')


def write(figure: Figure, out: str | os.PathLike[str]) -> list[Path]:
    """Writes a picture. A file that exists is replaced only once the new one is whole.

    Args:
        figure: The picture.
        out: A file with an ending of :data:`FORMATS`, or a name, to which ``.png`` and ``.svg`` are added.

    Returns:
        list[Path]: The files.

    Raises:
        PlotError: ``out`` has another ending, or cannot be written to.
    """
    from matplotlib import rc_context

    paths = check_out(out)
    for path in paths:
        buffer = io.BytesIO()
        # Without a date the same curves give the same file.
        metadata = {'svg': {'Date': None}, 'pdf': {'CreationDate': None}}.get(path.suffix[1:], {})
        with rc_context(RC):
            figure.savefig(buffer, format=path.suffix[1:], dpi=150, metadata=metadata)
        try:
            write_beside(path, buffer.getvalue())
        except OSError as error:
            raise PlotError(in_words(error, 'written')) from error
    return paths


def check_out(out: str | os.PathLike[str]) -> list[Path]:
    """The files that :func:`write` writes for ``out``.

    Raises:
        PlotError: ``out`` has another ending than those of :data:`FORMATS`, or is a folder.

    Example:
        >>> [path.name for path in check_out(Path('a/curves'))], [path.name for path in check_out(Path('a/b.svg'))]
        (['curves.png', 'curves.svg'], ['b.svg'])
    """
    out = Path(out)
    ending = out.suffix[1:].lower()
    if ending in FORMATS:
        return [out]
    if out.is_dir():
        raise PlotError(f'{out} is a folder. Give the name of a picture in it, as in {out / "curves"}.')
    if ending.isalpha() and len(ending) <= 4:
        raise PlotError(f'{out} has the ending .{ending}, a picture is written as {", ".join(FORMATS)}.')
    return [out.with_name(f'{out.name}.{each}') for each in FORMATS[:2]]
