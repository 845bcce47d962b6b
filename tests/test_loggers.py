"""Recipes log to TensorBoard and to Weights & Biases through Composer's loggers, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from composer_ema.recipe import run, schema

RECIPE: dict[str, Any] = {
    'max_duration': '2ep',
    'progress_bar': False,
    'device': 'cpu',
    'seed': 3,
    'run_name': 'logged',
    'model': {'name': 'fashion_cnn', 'widths': [2, 2, 2, 2], 'num_classes': 3},
    'data': {'name': 'fake', 'image_size': [1, 17, 17], 'num_classes': 3, 'size': 16, 'eval_size': 4, 'batch_size': 8},
    'optimizer': {'name': 'adamw', 'lr': 0.01},
    'algorithms': {'ema': {'half_life': '2ba'}},
    'callbacks': {'lr_monitor': {}},
    'evaluate': ['training', 'ema'],
}
#: What a reader of the logs looks for first.
NAMES = {
    'loss/train/total',
    'metrics/eval_training/MulticlassAccuracy',
    'metrics/eval_ema/MulticlassAccuracy',
    'lr-AdamW/group0',
    'ema/smoothing',
}


def train(tmp_path: Path, loggers: dict[str, Any]) -> list[dict[str, Any]]:
    """Trains with loggers and returns the lines of the run's own metrics."""
    values = {**RECIPE, 'runs_folder': str(tmp_path / 'runs'), 'loggers': loggers}
    run.train(schema.Recipe('a.yaml', 'a', values), lambda _: None)
    return [json.loads(line) for line in (tmp_path / 'runs/logged/metrics.jsonl').read_text().splitlines()]


@pytest.mark.parametrize('arguments', [{}, {'log_dir': 'elsewhere', 'flush_interval': 1}])
def test_tensorboard_holds_every_value_of_the_run(tmp_path, monkeypatch, arguments):
    accumulator = pytest.importorskip(
        'tensorboard.backend.event_processing.event_accumulator',
        reason="needs tensorboard: pip install 'composer-ema[loggers]'",
    )
    monkeypatch.chdir(tmp_path)
    lines = train(tmp_path, {'tensorboard': arguments})
    events = accumulator.EventAccumulator(str(tmp_path / arguments.get('log_dir', 'tensorboard_logs') / 'logged'))
    events.Reload()
    assert set(events.Tags()['scalars']) >= NAMES
    for name in NAMES:
        logged = [event.value for event in events.Scalars(name)]
        assert logged == pytest.approx([line[name] for line in lines if name in line])


def test_wandb_holds_every_value_of_the_run(tmp_path, monkeypatch):
    pytest.importorskip('wandb', reason="needs wandb: pip install 'composer-ema[loggers]'")
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_DIR', str(tmp_path))
    monkeypatch.setenv('WANDB_SILENT', 'true')
    monkeypatch.chdir(tmp_path)
    lines = train(tmp_path, {'wandb': {'project': 'averages', 'tags': ['ema']}})
    [file] = (tmp_path / 'wandb').glob('offline-run-*/run-*.wandb')
    logged = wandb_history(file)
    for name in NAMES:
        assert [row[name] for row in logged if name in row] == pytest.approx(
            [line[name] for line in lines if name in line]
        )


def wandb_history(file: Path) -> list[dict[str, Any]]:
    """The rows of an offline run's own file."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    store, rows = DataStore(), []
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        if record.history.item:
            items = record.history.item
            rows.append({item.key or '/'.join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_a_rehearsal_writes_nothing(tmp_path, monkeypatch):
    pytest.importorskip('tensorboard', reason="needs tensorboard: pip install 'composer-ema[loggers]'")
    monkeypatch.chdir(tmp_path)
    run.rehearse(schema.Recipe('a.yaml', 'a', {**RECIPE, 'loggers': {'tensorboard': {}}}))
    assert list(tmp_path.iterdir()) == []
