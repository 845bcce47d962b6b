"""Reads thousands of damaged and absurd files through every door that takes one, and prints what fell.

    python tests/scripts/trial_files.py [--seed 0] [--rounds 10000]

Wrong is a file whose tensors were changed and that was read without complaint as something else. Slow is what took
more than ten seconds of the CPU, large more than 1.5 GB beyond what was used before. The last line is the summary; the
exit code is 1 if any fell.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import tempfile
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from hostile_doors import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--rounds', type=int, default=10_000)
    options = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    with tempfile.TemporaryDirectory() as folder:
        summary, is_sound = run(options.rounds, options.seed, Path(folder))
        print(summary)
        sys.exit(not is_sound)


if __name__ == '__main__':
    main()
