"""Which of a model's tensors the user selects, by patterns over their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from composer_ema.model.names import listed
from composer_ema.spans import ArgumentError
from composer_ema.wording import counted


class Selection:
    """The names that ``include`` and ``exclude`` of the settings let through.

    Args:
        include: patterns searched for in canonical names; a name needs one of them. None given: every name.
        exclude: patterns that take a name out again.
    """

    def __init__(self, include: Sequence[re.Pattern[str]], exclude: Sequence[re.Pattern[str]]) -> None:
        self._include, self._exclude = include, exclude

    def __contains__(self, name: str) -> bool:
        is_included = not self._include or any(pattern.search(name) for pattern in self._include)
        return is_included and not any(pattern.search(name) for pattern in self._exclude)

    def check(self, names: Iterable[str]) -> None:
        """Raises unless every pattern matches one of ``names`` and some name is left."""
        names = list(names)
        for argument, patterns in (('include', self._include), ('exclude', self._exclude)):
            for pattern in patterns:
                if not any(pattern.search(name) for name in names):
                    raise ArgumentError(
                        f'{argument} pattern {pattern.pattern!r} matches none of the '
                        f'{counted(len(names), "name")} of the model, which begin with {listed(names)}. '
                        'Correct it or leave it out.',
                        argument,
                    )
        if names and not any(name in self for name in names):
            message = 'include and exclude together leave no name to average. Widen include or narrow exclude.'
            raise ArgumentError(message, 'exclude' if self._exclude else 'include')
