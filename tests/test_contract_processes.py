"""Two processes train, evaluate and resume with the same bits: contract, item 5; run by scripts/two_processes.py."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import toy
from contract import (
    BATCHES,
    SCRIPTS,
    free_port,
    saved_bits,
)
from toy import make_trainer, snapshot

from composer_ema import EMA


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two gloo processes saw, given a one-process run's checkpoints; see scripts/two_processes.py."""
    folder = tmp_path_factory.mktemp('two_processes')
    run = make_trainer(
        [EMA('1.5ep', update_interval='2ba')],
        save_folder=str(folder / 'one'),
        save_interval='1ba',
        save_filename='ba{batch}.pt',
    )
    run.fit()
    command = [sys.executable, '-m', 'composer.cli.launcher', '-n', '2', '--master_port', str(free_port())]
    finished = subprocess.run(
        [*command, str(SCRIPTS / 'two_processes.py'), str(folder)],
        capture_output=True, text=True, timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
    return [{'folder': folder, **torch.load(folder / f'rank{rank}.pt', weights_only=False)} for rank in (0, 1)]


def test_two_processes_end_with_the_same_bits_on_both_ranks(two_processes):
    first, second = (rank['whole'] for rank in two_processes)
    assert first['num_updates'] >= 2
    assert first['average'] != first['weights']
    # Under DDP each rank's BatchNorm statistics are its own until the next forward pass; the average's are shared.
    assert first['average'] == second['average']
    assert parameters_of(first['weights']) == parameters_of(second['weights'])
    assert {k: first[k] for k in ('num_updates', 'last_update', 'started', 'momentum', 'time')} == {
        k: second[k] for k in ('num_updates', 'last_update', 'started', 'momentum', 'time')
    }


def parameters_of(weights: dict[str, bytes]) -> dict[str, bytes]:
    return {name: value for name, value in weights.items() if 'running' not in name}


def test_two_processes_train_alike_with_and_without_the_average(two_processes):
    for rank in two_processes:
        assert len(rank['history']) == BATCHES
        assert rank['history'] == rank['history_without']


def test_two_processes_evaluate_with_the_same_bits_on_both_ranks(two_processes):
    first, second = (rank['evaluated'] for rank in two_processes)
    assert len(first) >= 3
    assert first == second
    assert first[-1] == two_processes[0]['whole']['average']


def test_two_processes_evaluate_each_of_several_averages_with_the_same_bits_on_both_ranks(two_processes):
    first, second = (rank['evaluated_several'] for rank in two_processes)
    assert first == second
    assert any('running_mean' in name for name in first[-1])
    assert first[-1] != first[0]


def test_two_processes_save_the_training_weights_inside_an_evaluation_too(two_processes):
    folder = two_processes[0]['folder']
    inside = sorted(path.name for path in (folder / 'inside').iterdir())
    assert inside == ['ba2.pt', 'ba4.pt', 'ba6.pt']
    for name in inside:
        assert saved_bits(folder / 'inside' / name) == saved_bits(folder / 'two' / name)


@pytest.mark.parametrize('batch', range(1, BATCHES))
def test_two_processes_resumed_after_any_batch_equal_the_uninterrupted_run(two_processes, batch):
    for rank in two_processes:
        assert rank['resumed'][batch] == rank['whole']


@pytest.mark.parametrize('batch', [2, toy.EPOCH, 5])
def test_a_checkpoint_of_one_process_loads_exactly_on_two(two_processes, batch):
    saved = saved_bits(two_processes[0]['folder'] / 'one' / f'ba{batch}.pt')
    ends = []
    for rank in two_processes:
        loaded, end, evaluated = rank['from_one'][batch]
        assert loaded['weights'] == saved['model']
        assert loaded['average'] == saved['average']
        assert (loaded['num_updates'], loaded['last_update'], loaded['started']) == saved['counters']
        assert evaluated
        ends.append((end['average'], parameters_of(end['weights']), end['num_updates'], end['last_update'], evaluated))
    assert ends[0] == ends[1]


@pytest.mark.parametrize('batch', [2, toy.EPOCH, 5])
def test_a_checkpoint_of_two_processes_loads_exactly_on_one(trainer, two_processes, batch):
    path = two_processes[0]['folder'] / 'two' / f'ba{batch}.pt'
    saved = saved_bits(path)
    run = trainer([EMA('1.5ep', update_interval='2ba')], load_path=str(path))
    loaded = snapshot(run)
    assert loaded['weights'] == saved['model']
    assert loaded['average'] == saved['average']
    assert (loaded['num_updates'], loaded['last_update'], loaded['started']) == saved['counters']
    run.fit()
    assert snapshot(run)['time'][1] == BATCHES


def test_two_processes_refresh_and_average_equally_with_the_same_bits_on_both_ranks(two_processes):
    first, second = (rank['equal'] for rank in two_processes)
    assert first['average'] == second['average']
    assert first['num_updates'] == second['num_updates'] >= 3
    for rank in two_processes:
        assert rank['history_equal'] == rank['history_without']
        assert rank['equal_resumed'] == rank['equal']
        assert rank['statistics_differ_before']
