"""What ``composer-ema plot`` is asked for: folders of runs, or recipes with their overrides, and an axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from composer_ema.pictures.curves import CURVES
from composer_ema.pictures.errors import PlotError
from composer_ema.recipe.command import is_override
from composer_ema.run_folder.outputs import METRICS_FILE, Axis


@dataclass(frozen=True)
class Asked:
    """What to draw, either runs or recipes.

    Args:
        folders: Run folders.
        recipes: Recipe files, each with its overrides.
    """

    folders: list[Path]
    recipes: list[tuple[Path, list[str]]]

    @property
    def default_out(self) -> Path:
        """Where the picture goes by default: into the folder of a single run, above several, or here for recipes."""
        if not self.folders:
            return Path('schedule')
        return (self.folders[0] if len(self.folders) == 1 else self.folders[0].resolve().parent) / CURVES


def sort_arguments(things: Sequence[str]) -> Asked:
    """Sorts arguments into run folders, recipes and overrides.

    An override belongs to the recipe before it: ``a.yaml lr=1 a.yaml lr=2`` draws one recipe twice, and in
    ``a.yaml b.yaml lr=1`` the first keeps its own rate.

    Args:
        things: Arguments of the command line. A metrics file stands for its folder.

    Raises:
        PlotError: There are runs and recipes, or an override comes before any recipe.
    """
    folders: list[Path] = []
    recipes: list[tuple[Path, list[str]]] = []
    for thing in things:
        path = Path(thing)
        if is_override(thing):
            if not recipes:
                raise PlotError(f'the override {thing!r} has no recipe before it. Write RECIPE.yaml {thing}.')
            recipes[-1][1].append(thing)
        elif path.suffix.lower() in ('.yaml', '.yml'):
            recipes.append((path, []))
        else:
            folders.append(path.parent if path.name == METRICS_FILE and path.is_file() else path)
    if folders and recipes:
        raise PlotError(
            f'{folders[0]} is a folder of a run and {recipes[0][0]} a recipe, which make two pictures. '
            'Give runs or recipes.'
        )
    return Asked(folders, recipes)


def check_axis(axis: str | None) -> Axis | None:
    """Returns ``axis`` if a picture can be drawn over it, and None for None.

    Raises:
        PlotError: ``axis`` is another word.
    """
    legal: dict[str, Axis] = {each: each for each in get_args(Axis)}
    if axis is not None and axis not in legal:
        raise PlotError(f'a picture is drawn over {", ".join(legal)}, got {axis!r}.')
    return None if axis is None else legal[axis]
