"""Which of a model's tensors the user selects, by patterns over their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from composer_ema.model.names import listed


class Selection:
    """The names that ``include`` and ``exclude`` let through.

    Args:
        include: regular expressions, searched for in canonical names; a name needs one of them. None: every name.
        exclude: regular expressions that take a name out again.

    Raises:
        TypeError: a pattern is not a string.
        ValueError: a pattern is not a regular expression.
    """

    def __init__(self, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None) -> None:
        self._include = _compile('include', include)
        self._exclude = _compile('exclude', exclude)

    def __contains__(self, name: str) -> bool:
        is_included = not self._include or any(pattern.search(name) for pattern in self._include)
        return is_included and not any(pattern.search(name) for pattern in self._exclude)

    def check(self, names: Iterable[str]) -> None:
        """Raises unless every pattern matches one of ``names`` and some name is left."""
        names = list(names)
        for argument, patterns in (('include', self._include), ('exclude', self._exclude)):
            for pattern in patterns:
                if not any(pattern.search(name) for name in names):
                    raise ValueError(
                        f'{argument} pattern {pattern.pattern!r} matches none of the {len(names)} names of the model, '
                        f'which begin with {listed(names)}. Correct it or leave it out.'
                    )
        if names and not any(name in self for name in names):
            raise ValueError('include and exclude together leave no name to average. Widen include or narrow exclude.')


def _compile(argument: str, patterns: str | Sequence[str] | None) -> list[re.Pattern[str]]:
    if patterns is not None and not isinstance(patterns, (str, Sequence)):
        raise TypeError(f'{argument} must be a regular expression or a list of them, got {patterns!r}.')
    compiled = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        if not isinstance(pattern, str):
            raise TypeError(f'{argument} must hold strings, got {pattern!r} of type {type(pattern).__name__}.')
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(f'{argument} pattern {pattern!r} is not a regular expression: {error}.') from error
    return compiled
