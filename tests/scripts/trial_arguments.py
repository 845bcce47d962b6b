"""Calls every public name with random arguments, sound and absurd, and prints each call that ends as it should not.

    python tests/scripts/trial_arguments.py [--seed 0] [--rounds 20000] [--only ShadowModel]

A call may succeed: then its object must work, and save a state of plain types that loads. Or it may be refused: by an
error of this package that names the argument, and with everything as it was before.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import hostile_arguments as hostile


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--rounds', type=int, default=20_000)
    parser.add_argument('--only', default='', help='part of the names to call')
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        failures = hostile.run(given.seed, given.rounds, Path(folder), only=given.only)
    for failure in failures:
        print(f'{failure.number}: {failure.call}\n    {failure.wrong}')
    for kind, count in Counter(failure.kind for failure in failures).most_common(20):
        print(f'{count:6,} {kind}')
    seconds = time.monotonic() - started
    print(f'arguments: {given.rounds:,} calls, {len(failures):,} wrong, {seconds:.0f} s')
    return 1 if failures else 0


if __name__ == '__main__':
    raise SystemExit(main())
