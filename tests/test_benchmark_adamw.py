"""The kernel of benchmarks/adamw_kernel.py against torch's AdamW in float64, and the benchmark that times it.

The kernel runs in Triton's interpreter, or on a CUDA device where there is one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip('triton')
from benchmarks import adamw, adamw_kernel, common

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
#: One piece and less, two, and two whole ones and a rest.
SIZES = (1, 7, 4095, 4096, 4097, 9001)
SETTINGS = {'lr': 0.02, 'betas': (0.8, 0.95), 'eps': 1e-3, 'weight_decay': 0.3}
DECAY = 0.7
STEPS = 4


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator) for size in SIZES]
    return [nn.Parameter(value.to(DEVICE, dtype)) for value in values]


def set_gradients(step, *parameter_sets):
    generator = torch.Generator().manual_seed(step)
    for each in zip(*parameter_sets, strict=True):
        gradient = torch.randn(each[0].shape, generator=generator)
        for parameter in each:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(gradient)


def assert_near(ours, expected):
    assert adamw.largest_difference((each.double() for each in ours), expected) < 3e-7


@pytest.mark.parametrize('decay', [None, DECAY])
def test_the_kernel_steps_as_torch_does_in_float64_and_averages_its_own_weights(decay):
    weights, exact = parameters(), parameters(torch.float64)
    set_gradients(0, weights, exact)
    optimizer = torch.optim.AdamW(exact, foreach=False, **SETTINGS)
    kernel = adamw_kernel.AdamW(weights, decay=decay, **SETTINGS)
    averages = [weight.detach().clone() for weight in exact]
    for step in range(STEPS):
        set_gradients(step, weights, exact)
        optimizer.step()
        kernel.step()
        for average, weight in zip(averages, exact, strict=True):
            average += (1 - DECAY) * (weight.detach() - average)
    assert_near(weights, exact)
    assert_near(kernel.exp_avgs, [optimizer.state[each]['exp_avg'] for each in exact])
    assert_near(kernel.exp_avg_sqs, [optimizer.state[each]['exp_avg_sq'] for each in exact])
    if decay is None:
        assert kernel.averages == []
    else:
        assert_near(kernel.averages, averages)


def test_a_last_piece_that_is_not_whole_ends_where_its_tensor_ends():
    room = [torch.full((12,), 5.0, device=DEVICE) for _ in range(2)]
    weight, gradient = (tensor[:9] for tensor in room)
    weight.grad = gradient
    adamw_kernel.AdamW([weight]).step()
    assert (weight != 5).all()
    assert (room[0][9:] == 5).all()
    assert (room[1] == 5).all()


def test_what_the_kernel_cannot_step_is_refused():
    weight = torch.zeros(9, device=DEVICE)
    with pytest.raises(ValueError, match='Run a backward pass first'):
        adamw_kernel.AdamW([weight])
    for refused in (weight[1:], weight[::2], weight.double()):
        refused.grad = torch.zeros_like(refused)
        with pytest.raises(ValueError, match='Clone the tensor'):
            adamw_kernel.AdamW([refused])


# The benchmark


@pytest.fixture
def tiny(monkeypatch):
    """In place of a torchvision model, one that an interpreter can step."""

    def make_model(name, device):
        torch.manual_seed(0)
        return nn.Linear(3, 5, device=device)

    monkeypatch.setattr(common, 'make_model', make_model)
    monkeypatch.setattr(adamw, 'CHECKED_STEPS', 5)


def run(out):
    adamw.main(['--device', DEVICE, '--models', 'tiny', '--rounds', '2', '--out', str(out)])
    return json.loads(out.read_text())


def test_adamw_writes_a_row_for_each_contestant_after_its_check(tiny, tmp_path, capsys):
    result = run(tmp_path / 'adamw.json')
    assert {row['contestant'] for row in result['rows']} == set(adamw.BYTES)
    assert all(row['ms'] > 0 and row['rounds'] == 2 and row['parameters'] == 20 for row in result['rows'])
    assert next(row for row in result['rows'] if row['contestant'] == adamw.FUSED)['ratio'] == 1
    differences = result['summary']['tiny']['differences']
    assert 0 < max(of for what, of in differences.items() if 'torch' not in what) <= adamw.TOLERANCE
    assert differences["torch's weights"] > 0
    printed = capsys.readouterr().out
    assert 'tiny: 5 steps agree, weights to ' in printed
    assert all(name in printed for name in adamw.BYTES)


@pytest.mark.parametrize(('name', 'wrong'), [('weight_decay', 0.02), ('decay', 0.91)])
def test_nothing_is_timed_where_weights_or_average_are_wrong(tiny, tmp_path, monkeypatch, capsys, name, wrong):
    right = adamw_kernel.AdamW

    def changed(parameters, **settings):
        return right(parameters, **{**settings, **({name: wrong} if name in settings else {})})

    monkeypatch.setattr(adamw_kernel, 'AdamW', changed)
    with pytest.raises(SystemExit, match='too far from float64 or from ShadowModel to be timed'):
        run(tmp_path / 'adamw.json')
    assert 'ratio' not in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_cpu_is_refused_before_anything_else(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    with pytest.raises(SystemExit, match='needs a CUDA device, got cpu'):
        adamw.main(['--device', 'cpu', '--models', 'tiny', '--rounds', '1', '--out', str(tmp_path / 'adamw.json')])
    assert capsys.readouterr().out == ''


@pytest.mark.slow
def test_the_kernel_compiles_with_vectors_for_whole_pieces(tmp_path):
    script = Path(__file__).parent / 'scripts' / 'compile_adamw.py'
    environment = {**os.environ, 'TRITON_INTERPRET': '0', 'TRITON_CACHE_DIR': str(tmp_path)}
    done = subprocess.run([sys.executable, script, '90'], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'compiled for sm_90' in done.stdout
