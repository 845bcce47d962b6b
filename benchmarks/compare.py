"""Reads two result files of one benchmark and prints, row by row, the second over the first.

python -m benchmarks.compare before.json after.json --fail-above 1.1
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if some ratio is above ``--fail-above``, 2 if nothing compares, else 0."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument('before', type=Path)
    options.add_argument('after', type=Path)
    options.add_argument('--measure', default=None, help="a key of the rows, such as 'ratio'; default: the file's own")
    options.add_argument('--fail-above', type=float, default=None, help='exit with 1 if some ratio is above this')
    parsed = options.parse_args(arguments)
    before, after = common.load(parsed.before), common.load(parsed.after)
    if before['benchmark'] != after['benchmark']:
        print(f'these are results of two benchmarks, {before["benchmark"]} and {after["benchmark"]}.', file=sys.stderr)
        return 2
    for difference in differences(before, after):
        print(difference)
    measures = [parsed.measure] if parsed.measure else after['measures']
    ratios = compare(before, after, measures)
    if not ratios:
        print(f'no row of both files has a number for {", ".join(measures)}.', file=sys.stderr)
        return 2
    common.show(
        f'{before["benchmark"]}: {parsed.after.name} over {parsed.before.name}',
        ['row', 'measure', 'before', 'after', 'ratio'],
        ratios,
    )
    positive = [ratio for *_, ratio in ratios if ratio > 0]
    worst = max(ratio for *_, ratio in ratios)
    mean = common.geometric_mean(positive) if positive else 0.0
    print(f'geometric mean {mean:.3f}, largest {worst:.3f}')
    if parsed.fail_above is not None and worst > parsed.fail_above:
        print(f'the largest is above {parsed.fail_above}.', file=sys.stderr)
        return 1
    return 0


def compare(
    before: Mapping[str, Any], after: Mapping[str, Any], measures: Sequence[str]
) -> list[tuple[str, str, float, float, float]]:
    """Row, measure, both numbers and the second over the first, for what both files have.

    Nothing twice is a ratio of 1; something after nothing is infinite.
    """
    old, new = dict(_numbers(before, measures)), dict(_numbers(after, measures))
    return [(*key, old[key], new[key], _ratio(old[key], new[key])) for key in old if key in new]


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """What else differs between the two runs, and the rows that only one of them has."""
    for part in ('machine', 'versions', 'settings'):
        for key in {**before[part], **after[part]}:
            one, other = before[part].get(key), after[part].get(key)
            if one != other:
                yield f'{part}: {key} was {one}, is {other}'
    rows, other_rows = ({row['key'] for row in result['rows']} for result in (before, after))
    for key in sorted(rows ^ other_rows):
        yield f'only in the {"first" if key in rows else "second"} file: {key}'


def _numbers(result: Mapping[str, Any], measures: Sequence[str]) -> Iterator[tuple[tuple[str, str], float]]:
    for row in result['rows']:
        for measure in measures:
            value = row.get(measure)
            parts = value.items() if isinstance(value, Mapping) else [(None, value)]
            for name, number in parts:
                if isinstance(number, (int, float)):
                    yield (row['key'], measure if name is None else f'{measure}: {name}'), number


def _ratio(old: float, new: float) -> float:
    if old == 0:
        return 1.0 if new == 0 else float('inf')
    return new / old


if __name__ == '__main__':
    sys.exit(main())
