"""Starts two or three runs at once, again and again, and checks that nothing of any run is lost or mixed.

python tests/scripts/trial_starts.py [--seed 0] [--rounds 20] [--spawn]

Each round forks processes that have imported everything, so that they start within milliseconds. --spawn starts
``composer-ema train`` from the beginning instead, which takes some ten seconds of import for each.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

torch.set_num_threads(1)

import hostile_starts  # noqa: E402

from composer_ema.recipe import run  # noqa: E402, F401


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--rounds', type=int, default=20)
    parser.add_argument('--spawn', action='store_true')
    asked = parser.parse_args()
    began, starts, failed = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        trial = hostile_starts.Trial(Path(folder), hostile_starts.spawned if asked.spawn else hostile_starts.forked)
        for number in range(asked.rounds):
            drawn = hostile_starts.draw(random.Random(f'{asked.seed}-{number}'))
            starts += len(drawn.starts)
            wrong = trial.play(drawn, number)
            failed += bool(wrong)
            for each in wrong:
                print(f'round {number}, {drawn}: {each}', flush=True)
    seconds = time.monotonic() - began
    print(f'starts: {asked.rounds} rounds of {starts} starts, {failed} with anything lost or mixed, {seconds:.0f} s')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
