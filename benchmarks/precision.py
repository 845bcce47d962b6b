"""Error of long averages in float32, with and without a Kahan term, relative to one in float64.

Each element is averaged over weights that fluctuate, that walk, and that jump by 1 % half-way. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from composer_ema import kernels
from composer_ema.kernels.rules import Rules

_ELEMENTS = 16
_DRAWN_AT_ONCE = 1000


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark; see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--runs', default='1e3:20000,1e4:100000,1e5:300000', help='half-life in updates and number of updates, by colon'
    )
    runs = [run.split(':') for run in parser.parse_args(arguments).runs.split(',')]
    print('| weights | half-life | updates | float32 | compensated |\n|---|---|---|---|---|')
    for course in ('noise', 'walk', 'jump'):
        for half_life, updates in runs:
            plain, compensated = errors(course, float(half_life), int(updates))
            print(f'| {course} | {float(half_life):,.0f} | {int(updates):,} | {plain:.1e} | {compensated:.1e} |')


@torch.no_grad()
def errors(course: str, half_life: float, updates: int) -> tuple[float, float]:
    """The errors of the plain and of the compensated average after ``updates``, relative to the norm of the exact one.

    Args:
        course: ``'noise'``, ``'walk'`` or ``'jump'``.
        half_life: in updates.
        updates: how many.
    """
    weight = -math.expm1(-math.log(2) / half_life)
    source, plain, compensated, term = *(torch.ones(_ELEMENTS) for _ in range(3)), torch.zeros(_ELEMENTS)
    exact = torch.ones(_ELEMENTS, dtype=torch.float64)
    update_plain = kernels.prepare([[plain]], [source])
    update = kernels.prepare([[compensated]], [source], rules=Rules(compensated=True), compensations=[[term]])
    for weights in _course(course, updates):
        source.copy_(weights)
        update_plain((weight,))
        update((weight,))
        exact.lerp_(source.double(), weight)
    errors = ((average.double() - exact).norm() / exact.norm() for average in (plain, compensated))
    return tuple(map(float, errors))  # pyright: ignore[reportReturnType]: two of them


def _course(name: str, updates: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    steps, weights = torch.empty(_DRAWN_AT_ONCE, _ELEMENTS, dtype=torch.float64), torch.ones(_ELEMENTS).double()
    for update in range(updates):
        if update % _DRAWN_AT_ONCE == 0:
            steps.normal_(generator=generator)
        if name == 'walk':
            weights.add_(steps[update % _DRAWN_AT_ONCE], alpha=1e-3)
        elif name == 'noise':
            weights.fill_(1).add_(steps[update % _DRAWN_AT_ONCE], alpha=1e-2)
        elif update == updates // 2:
            weights.fill_(1.01)
        yield weights


if __name__ == '__main__':
    main()
