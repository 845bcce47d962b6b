"""What rank 0 does for all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from composer.utils import dist

from composer_ema.recipe.arguments import RecipeError

Result = TypeVar('Result')


def on_rank_0(do: Callable[[], Result]) -> Result:
    """Returns on every rank what ``do`` returns on rank 0, or raises on every rank the RecipeError that it raises."""
    outcome: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            outcome[0] = do()
        except RecipeError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    result, error = outcome
    if error is not None:
        raise error
    return result
