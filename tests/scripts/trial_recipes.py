"""Gives absurd recipes and overrides to what ``composer-ema train`` calls: each is refused in words, or sound.

``python tests/scripts/trial_recipes.py [--seed 0] [--rounds 3000] [--train-every 40]`` prints each failure and a
summary, and exits 1 if there was any.
"""

from __future__ import annotations

import argparse
import collections
import random
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from hostile_recipes import draw, judge, workplace

#: Memory that one process may take, in bytes: an absurd size must be refused, not granted.
MOST_MEMORY = 16 * 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--rounds', type=int, default=3000)
    parser.add_argument('--train-every', type=int, default=40, help='train three batches of every n-th input')
    asked = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    rng, began, outcomes, wrong = random.Random(asked.seed), time.monotonic(), collections.Counter(), 0
    for index in range(asked.rounds):
        attempt = draw(rng)
        with workplace() as folder:
            outcome, fault = judge(attempt, folder, trains=index % asked.train_every == 0)
        outcomes[outcome] += 1
        if fault is not None:
            wrong += 1
            print(f'{index}: {attempt}\n    {fault}', flush=True)
    print(
        f'recipes: {asked.rounds:,} inputs, {outcomes["refused"]:,} refused in words, {outcomes["sound"]:,} sound, '
        f'{outcomes["failed"]} tracebacks, {wrong - outcomes["failed"]} wordless or with a file left, '
        f'{time.monotonic() - began:.0f} s'
    )
    return 1 if wrong else 0


if __name__ == '__main__':
    raise SystemExit(main())
