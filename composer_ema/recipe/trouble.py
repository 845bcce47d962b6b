"""Where an error in a user's own code was raised: the last line of it that is theirs."""

from __future__ import annotations

import linecache
import os
import sysconfig
import traceback
from pathlib import Path

#: Code below these folders is nobody's own.
_OF_OTHERS = tuple(os.path.join(path, '') for path in {*sysconfig.get_paths().values(), str(Path(__file__).parents[1])})


def line_of(error: BaseException) -> str:
    """The line of the user's that an error comes from, as ``' (my_code.py, line 12: x = 1 / 0)'``; empty if none is."""
    for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))):
        path = frame.f_code.co_filename
        if path.startswith('<') or path.startswith(_OF_OTHERS):
            continue
        linecache.checkcache(path)  # a user mends a file, and tries again
        text = linecache.getline(path, number).strip()
        return f' ({path}, line {number}{": " if text else ""}{text})'
    return ''
