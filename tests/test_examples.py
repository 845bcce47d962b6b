"""The example scripts run without Composer, and a killed one goes on to the same bits."""

from __future__ import annotations

import importlib
import json
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_fashion_diffusion_stopped_in_training_ends_as_an_uninterrupted_run_and_draws_its_pictures(
    tmp_path, monkeypatch
):
    pytest.importorskip('matplotlib', reason='the example draws')
    monkeypatch.syspath_prepend(str(ROOT / 'examples'))
    fashion_diffusion = importlib.import_module('fashion_diffusion')
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (600, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (600,), generator=generator, dtype=torch.uint8)
    data = {
        f'{split}_{what}': each
        for split in ('train', 'test')
        for what, each in (('inputs', images), ('labels', labels))
    }
    monkeypatch.setattr(fashion_diffusion, 'load_fashion_mnist', lambda root: data)
    options = ['--steps', '20', '--save-every', '4', '--batch-size', '4', '--images', '30', '--sampler-steps', '3']
    options += ['--classifier-batches', '3', '--half-lives', '0.1', '0.3', '--out']
    fashion_diffusion.main([*options, str(tmp_path / 'whole')])

    loss_of = fashion_diffusion.loss_of

    def interrupted(*arguments):
        if arguments[-1] == 13:
            raise KeyboardInterrupt
        return loss_of(*arguments)

    monkeypatch.setattr(fashion_diffusion, 'loss_of', interrupted)
    with pytest.raises(KeyboardInterrupt):
        fashion_diffusion.main([*options, str(tmp_path / 'stopped')])
    monkeypatch.setattr(fashion_diffusion, 'loss_of', loss_of)
    fashion_diffusion.main([*options, str(tmp_path / 'stopped')])

    models = [torch.load(tmp_path / run / 'training.pt', weights_only=True)['model'] for run in ('whole', 'stopped')]
    assert_same(*models)
    distances = [
        json.loads((tmp_path / run / 'distances.json').read_text())['distances'] for run in ('whole', 'stopped')
    ]
    assert distances[0] == distances[1]
    assert set(distances[0]) == {'training weights', '0.1', '0.3'}
    assert all(each['distance'] > 0 for each in distances[0].values())
    assert {path.name for path in (tmp_path / 'whole').glob('*.png')} == {
        'diffusion_sweep.png',
        'diffusion_samples.png',
    }
    with pytest.raises(SystemExit, match='belongs to a run with'):
        fashion_diffusion.main([*options, str(tmp_path / 'whole'), '--seed', '1'])


def test_frechet_distance_of_normal_distributions_is_that_of_the_closed_form(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'examples'))
    frechet_distance = importlib.import_module('fashion_diffusion').frechet_distance
    one = torch.tensor([1.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 9.0]).double())
    other = torch.tensor([4.0, 6.0]).double(), torch.diag(torch.tensor([1.0, 16.0]).double())
    # |(3, 4)|^2 + (2 - 1)^2 + (3 - 4)^2
    assert frechet_distance(one, other) == pytest.approx(27)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-12)


def test_byol_learns_from_a_teacher_that_lies_in_the_memory_of_the_average(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / 'examples'))
    byol = importlib.import_module('byol')
    generator = torch.Generator().manual_seed(0)
    data = {
        f'{split}_{what}': torch.randint(most, shape, generator=generator, dtype=torch.uint8)
        for split in ('train', 'test')
        for what, most, shape in (('inputs', 256, (60, 1, 28, 28)), ('labels', 10, (60,)))
    }
    monkeypatch.setattr(byol, 'load_fashion_mnist', lambda root: data)
    teachers = []

    def train(network, shadow, teacher, *others):
        teachers.append(teacher)
        before = [parameter.clone() for parameter in teacher.parameters()]
        learn(network, shadow, teacher, *others)
        assert not any(map(torch.equal, before, teacher.parameters()))
        assert [p.data_ptr() for p in teacher.parameters()] == [p.data_ptr() for p in shadow.parameters()]

    learn = byol.train
    monkeypatch.setattr(byol, 'train', train)
    byol.main(['--seeds', '0', '1', '--steps', '2', '--batch-size', '8', '--images', '50', '--labelled', '20'])
    assert len(teachers) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r'[0-9.]+ %', 'share', line) for line in lines] == [
        f'seed {seed}: random share, network share, teacher share' for seed in (0, 1)
    ]


@pytest.mark.slow
def test_byol_learns_features_that_tell_clothes_apart_better_than_random_ones(monkeypatch, capsys):
    from composer_ema.zoo import fetch

    kept = [fetch.DEBIAN_FOLDER, fetch.cache_folder()]
    if not any(list(folder.rglob('train-images-idx3-ubyte*')) for folder in kept):
        pytest.skip('Fashion-MNIST is not on this machine, and a test downloads nothing')
    monkeypatch.syspath_prepend(str(ROOT / 'examples'))
    importlib.import_module('byol').main(['--steps', '150'])
    random, network, teacher = map(float, re.findall(r'([0-9.]+) %', capsys.readouterr().out))
    assert min(network, teacher) > random + 5
