"""A resumed run equals the uninterrupted one, to the bit: contract, item 5."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from contract import (
    BATCHES,
    SCRIPTS,
    Probe,
    StopAfter,
    Unfreeze,
    save_after_odd_batches,
    saved_bits,
)
from torch import nn
from toy import bits, make_data, make_evaluator, make_model, snapshot

from composer_ema import EMA
from composer_ema import SWA as OurSWA

RESUMED_SETTINGS = {
    'batches': {'half_life': '2ba'},
    'epochs': {'half_life': '1ep', 'update_interval': '1ep'},
    'parts of epochs': {'half_life': '1.5ep', 'update_interval': '0.5ep'},
    'samples': {'half_life': '9sp', 'update_interval': '5sp'},
    'tokens, every second batch': {'half_life': '20tok', 'update_interval': '2ba'},
    'share of the run, late start': {'half_life': '0.3dur', 'ema_start': '0.4dur'},
    'smoothing, copied buffers': {'smoothing': 0.6, 'buffers': 'copy'},
    'iterations': {'half_life': '1iter', 'update_interval': '1iter'},
    '16-bit shadow': {'half_life': '3ba', 'shadow_dtype': 'bfloat16'},
    'equal': {'swa_start': '1ba', 'update_interval': '1ba'},
    'equal, annealed': {'swa_start': '1ep', 'update_interval': '2ba', 'swa_lr': 0.05, 'anneal_length': '2ba'},
}


@pytest.mark.parametrize('arguments', RESUMED_SETTINGS.values(), ids=RESUMED_SETTINGS)
def test_resuming_after_any_batch_equals_the_uninterrupted_run(trainer, tmp_path, arguments):
    def build(**more: Any) -> Trainer:
        return trainer(
            [(OurSWA if 'swa_start' in arguments else EMA)(**arguments)],
            iteration='1ep' if arguments.get('half_life') == '1iter' else None,
            train_dataloader=make_data(shuffle=True),
            eval_dataloader=make_evaluator(interval='2ba'),
            save_filename='ep{epoch}-ba{batch}.pt',
            save_latest_filename=None,
            **more,
        )

    whole = build(save_folder=str(tmp_path), save_interval='1ba')
    whole.fit()
    expected = snapshot(whole)
    assert expected['num_updates'] >= 2
    other_intervals = itertools.cycle(['2ba', '1ep', save_after_odd_batches])
    compared = 0
    for batch in range(1, BATCHES):
        folder, (path,) = tmp_path / f'resumed_{batch}', tmp_path.glob(f'ep*-ba{batch}.pt')
        resumed = build(load_path=str(path), save_folder=str(folder), save_interval=next(other_intervals))
        resumed.fit()
        assert snapshot(resumed) == expected, f'resumed after batch {batch}'
        # What the resumed run saves is what the whole one saved at that moment.
        for path in folder.glob('*.pt'):
            if (tmp_path / path.name).exists():
                assert saved_bits(path) == saved_bits(tmp_path / path.name), f'{path.name}, resumed after batch {batch}'
                compared += 1
    assert compared >= 4


def test_resuming_from_the_end_of_an_epoch_equals_the_uninterrupted_run(trainer, tmp_path):
    def build(**more: Any) -> Trainer:
        return trainer(
            [EMA('1ep', update_interval='1ep')], eval_dataloader=make_evaluator(), save_filename='ep{epoch}.pt', **more
        )

    whole = build(save_folder=str(tmp_path), save_interval='1ep')
    whole.fit()
    resumed = build(load_path=str(tmp_path / 'ep1.pt'))
    resumed.fit()
    assert snapshot(resumed) == snapshot(whole)


class Counting(nn.Module):
    """Passes on what it gets; its buffer takes its size in the first batch, and from a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('seen', torch.zeros(0))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self.seen.numel():
            self.seen = torch.zeros(inputs.shape[1])
        self.seen = self.seen + inputs.detach().sum(0)
        return inputs

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        self.seen = torch.zeros_like(state_dict[f'{prefix}seen'])
        super()._load_from_state_dict(state_dict, prefix, *args)


@pytest.mark.parametrize(
    'algorithm', [lambda: EMA('3ba'), lambda: OurSWA('1ba', update_interval='1ba')], ids=['ema', 'swa']
)
def test_a_buffer_that_takes_its_size_in_the_first_batch_resumes(trainer, tmp_path, algorithm):
    def build(**more: Any) -> Trainer:
        model = make_model()
        model.module.insert(5, Counting())
        return trainer([algorithm()], model=model, save_filename='ba{batch}.pt', **more)

    whole = build(save_folder=str(tmp_path), save_interval='2ba')
    whole.fit()
    resumed = build(load_path=str(tmp_path / 'ba2.pt'))
    resumed.fit()
    assert resumed.state.model.module[5].seen.shape == (8,)
    assert snapshot(resumed) == snapshot(whole)


def test_resuming_before_and_after_a_parameter_is_unfrozen_equals_the_uninterrupted_run(trainer, tmp_path):
    def build(**more: Any) -> Trainer:
        model = make_model()
        # Composer cannot load the momentum of a parameter that had none when it was saved.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        return trainer(
            [EMA('2ba')],
            model=model,
            optimizers=optimizer,
            callbacks=[Unfreeze()],
            save_filename='ba{batch}.pt',
            **more,
        )

    whole = build(save_folder=str(tmp_path), save_interval='1ba')
    whole.fit()
    assert 'module.0.weight' in dict(whole.state.algorithms[0].ema_model.named_parameters())
    for batch in range(1, BATCHES):
        resumed = build(load_path=str(tmp_path / f'ba{batch}.pt'))
        if batch >= 2:
            resumed.state.model.get_parameter('module.0.weight').requires_grad_(True)
        resumed.fit()
        assert snapshot(resumed) == snapshot(whole), f'resumed after batch {batch}'


@pytest.mark.parametrize(
    'algorithm',
    [lambda: EMA('1.5ep', update_interval='2ba'), lambda: OurSWA('2ba', update_interval='2ba')],
    ids=['ema', 'swa'],
)
@pytest.mark.filterwarnings('ignore:training ended before the first update:UserWarning')
def test_a_chain_of_resumes_equals_the_uninterrupted_run(trainer, tmp_path, algorithm):
    path = None
    for end in range(1, BATCHES + 1):
        run = trainer([algorithm()], load_path=path, callbacks=[StopAfter(end)])
        run.fit()
        path = str(tmp_path / f'{end}.pt')
        run.save_checkpoint(path)
    whole = trainer([algorithm()])
    whole.fit()
    assert snapshot(run) == snapshot(whole)


def test_loading_a_checkpoint_and_evaluating_uses_its_average_without_training(trainer, tmp_path):
    run = trainer([EMA('2ba')])
    run.fit()
    run.save_checkpoint(str(tmp_path / 'end.pt'))
    run.eval(eval_dataloader=make_data(4))

    ema = EMA('2ba')
    probe = Probe(ema)
    loaded = trainer([ema], callbacks=[probe], load_path=str(tmp_path / 'end.pt'))
    loaded.eval(eval_dataloader=make_data(4))
    loaded.predict(make_data(4))
    assert bits(dict(ema.ema_model.named_parameters())) == bits(
        dict(run.state.algorithms[0].ema_model.named_parameters())
    )
    assert probe.outputs_differ == 2
    assert {m: v.item() for m, v in loaded.state.eval_metric_values.items()} == {
        m: v.item() for m, v in run.state.eval_metric_values.items()
    }
    assert bits(loaded.state.model) == bits(run.state.model)


@pytest.mark.parametrize('moment', ['eval_batch_end', 'after_backward'])
def test_a_killed_run_that_resumes_by_itself_equals_the_uninterrupted_run(tmp_path, moment, request):
    folder, marker = tmp_path / 'run', tmp_path / 'reached'
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / 'stall.py'), str(folder), str(marker), moment, '4'],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )  # fmt: skip
    try:
        wait_for(marker, process)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (folder / 'latest-rank0.pt').exists()

    sys.path.insert(0, str(SCRIPTS))
    request.addfinalizer(lambda: sys.path.remove(str(SCRIPTS)))
    import stall

    resumed = stall.build(folder)
    assert 1 <= int(resumed.state.timestamp.batch) < BATCHES
    resumed.fit()
    whole = stall.build(tmp_path / 'whole')
    whole.fit()
    assert snapshot(resumed) == snapshot(whole)


def wait_for(marker: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not marker.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, 'the run never got there'
        time.sleep(0.05)
