"""Tells overrides from files among the arguments of a command.

Imports nothing heavy, so that a command that only reads runs need not wait for torch.
"""

from __future__ import annotations

import os


def is_override(argument: str) -> bool:
    """Whether an argument is ``key=value`` or ``~key``, and not a file.

    Example:
        >>> [each for each in ('a.yaml', 'optimizer.lr=0.1', '~scheduler', '~/a.yaml') if is_override(each)]
        ['optimizer.lr=0.1', '~scheduler']
    """
    has_form = '=' in argument or (argument.startswith('~') and '/' not in argument)
    return has_form and not os.path.exists(argument)  # Path(...).exists() raises for a name that no disk takes
