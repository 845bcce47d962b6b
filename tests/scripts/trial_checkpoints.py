"""Thousands of damaged checkpoints, and save folders in every state, through ``load_path`` and ``autoresume``.

Each must be refused by name, or load what was saved; nothing in its folder may change.

    python tests/scripts/trial_checkpoints.py [--seed 0] [--rounds 6000]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from hostile_checkpoints import Ground, attack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--rounds', type=int, default=6000)
    asked = parser.parse_args()
    warnings.simplefilter('ignore')
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(Path(folder))
        (Path(folder) / 'temporary').mkdir()
        tempfile.tempdir = str(Path(folder) / 'temporary')
        failures = attack(ground, asked.seed, asked.rounds, print)
        ground.close()
        tempfile.tempdir = None
    seconds = time.perf_counter() - start
    print(f'checkpoints: {asked.rounds:,} inputs, {failures} failed, {seconds:.0f} s')
    sys.exit(failures > 0)


if __name__ == '__main__':
    main()
