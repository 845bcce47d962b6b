"""The example scripts run without Composer, and a killed one goes on to the same bits."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from plain import assert_same

for needed in ('torchvision', 'tqdm'):
    pytest.importorskip(needed, reason=f'the example needs {needed}')

ROOT = Path(__file__).parents[1]

#: The script with random images for Fashion-MNIST, in an interpreter that has no Composer.
PROGRAM = textwrap.dedent("""
    import sys
    sys.modules['composer'] = None
    sys.path.insert(0, 'examples')
    import torch
    torch.set_num_threads(1)
    import plain_loop

    def random_images(root):
        generator = torch.Generator().manual_seed(0)
        data = {}
        for split in ('train', 'test'):
            labels = torch.randint(10, (600,), generator=generator, dtype=torch.uint8)
            noise = torch.randint(0, 200, (600, 1, 28, 28), generator=generator, dtype=torch.uint8)
            data |= {f'{split}_inputs': noise + 5 * labels.view(-1, 1, 1, 1), f'{split}_labels': labels}
        return data

    plain_loop.load_fashion_mnist = random_images
    plain_loop.main(sys.argv[1:])
""")


def start(checkpoint: Path, *, epochs: int, batch_size: int = 50, save_every: int = 3) -> subprocess.Popen[str]:
    options = ['--checkpoint', checkpoint, '--epochs', epochs, '--batch-size', batch_size]
    options += ['--limit', 500, '--save-every', save_every]
    return subprocess.Popen(
        [sys.executable, '-c', PROGRAM, *map(str, options), '--half-life', '5'],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )


def finished(process: subprocess.Popen[str]) -> tuple[str, str]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output, errors


def wait_for_progress(checkpoint: Path, reached: tuple[int, int], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (checkpoint.exists() and progress(checkpoint) > reached):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def progress(checkpoint: Path) -> tuple[int, int]:
    state = torch.load(checkpoint, weights_only=True)
    return state['epoch'], state['done']


def test_plain_loop_killed_twice_ends_with_the_bits_of_an_uninterrupted_run(tmp_path):
    whole, killed = tmp_path / 'whole.pt', tmp_path / 'folder' / 'killed.pt'
    epochs = 12
    output, errors = finished(start(whole, epochs=epochs))
    lines = re.findall(r'accuracy (0\.\d{4}|1\.0000) with the training weights, (\S+) with the average', output)
    assert len(lines) == epochs
    assert 'batch/s' in errors  # the progress bar

    reached = (0, 0)
    for _ in range(2):
        process = start(killed, epochs=epochs)
        wait_for_progress(killed, reached, process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        assert process.returncode == -signal.SIGKILL
        assert (0, 0) < progress(killed) < (epochs, 0)
        reached = progress(killed)
    output, _ = finished(start(killed, epochs=epochs))
    assert f'resuming from {killed}: {reached[0]} epochs and {reached[1]} batches done' in output

    ends = [torch.load(path, weights_only=True) for path in (whole, killed)]
    assert_same(*ends)
    assert ends[0]['epoch'] == epochs
    assert ends[0]['optimizer']['ema']['num_steps'] == epochs * 10


def test_plain_loop_refuses_the_checkpoint_of_a_run_with_data_in_another_order(tmp_path):
    checkpoint = tmp_path / 'run.pt'
    finished(start(checkpoint, epochs=1))
    before = checkpoint.read_bytes()
    other = start(checkpoint, epochs=2, batch_size=20)
    _, errors = other.communicate(timeout=60)
    assert other.returncode == 1
    assert "belongs to a run with {'seed': 0, 'batch_size': 50, 'limit': 500}, this one has" in errors
    assert 'Pass the same values, or another --checkpoint.' in errors
    assert checkpoint.read_bytes() == before


def test_plain_loop_takes_no_number_below_one(tmp_path):
    process = start(tmp_path / 'run.pt', epochs=1, save_every=0)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert '--save-every: must be at least 1, got 0' in errors


def test_plain_loop_learns_fashion_mnist_and_the_average_is_evaluated(tmp_path):
    from composer_ema.zoo import fetch

    kept = [fetch.DEBIAN_FOLDER, fetch.cache_folder()]
    if not any(list(folder.rglob('train-images-idx3-ubyte*')) for folder in kept):
        pytest.skip('Fashion-MNIST is not on this machine, and a test downloads nothing')
    options = ['--checkpoint', tmp_path / 'run.pt', '--epochs', 1, '--limit', 6000, '--half-life', 10]
    done = subprocess.run(
        [sys.executable, 'examples/plain_loop.py', *map(str, options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    accuracies = [float(word) for word in re.findall(r'0\.\d{4}', done.stdout)]
    assert len(accuracies) == 2
    assert min(accuracies) > 0.6
