"""Damaged and foreign files are refused and nothing is written: contract, item 6."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import (
    error_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import bits, make_trainer

from composer_ema import EMA, CheckpointError, export, load_average


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('checkpoint') / 'sound.pt'
    trainer = make_trainer([EMA('2ba')])
    trainer.fit()
    trainer.save_checkpoint(str(path))
    return path


@pytest.mark.parametrize('share', [0.0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_a_truncated_checkpoint_is_refused_and_nothing_written(checkpoint, tmp_path, share):
    content = checkpoint.read_bytes()
    damaged = tmp_path / 'damaged.pt'
    damaged.write_bytes(content[: int(share * len(content))])
    refuses(damaged, tmp_path)


def refuses(damaged: Path, folder: Path) -> None:
    content, out = damaged.read_bytes(), folder / 'out.safetensors'
    out.write_bytes(b'an earlier export')
    with pytest.raises(CheckpointError, match=re.escape(str(damaged))):
        load_average(damaged)
    with pytest.raises(CheckpointError, match=re.escape(str(damaged))):
        export(damaged, out)
    with pytest.raises(CheckpointError):
        export(damaged, folder / 'new' / 'out.safetensors')
    assert out.read_bytes() == b'an earlier export'
    assert damaged.read_bytes() == content
    assert {path.name for path in folder.iterdir()} <= {'out.safetensors', damaged.name, 'new'}
    assert not list(folder.glob('new/*'))


@pytest.mark.parametrize(
    'content', [b'', b'not a checkpoint', b'PK\x03\x04', b'\x80\x02}q\x00.', bytes(4096)], ids=lambda c: repr(c[:6])
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / 'other.pt'
    path.write_bytes(content)
    refuses(path, tmp_path)


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_a_checkpoint_with_damaged_bytes_is_refused_or_gives_the_same_average(checkpoint, tmp_path_factory, data):
    content = bytearray(checkpoint.read_bytes())
    start = data.draw(st.integers(0, len(content) - 1))
    for offset in range(start, min(start + data.draw(st.integers(1, 64)), len(content))):
        content[offset] ^= 0x5A
    path = tmp_path_factory.getbasetemp() / 'bytes_damaged.pt'
    path.write_bytes(content)
    error = error_of(lambda: load_average(path))
    if error is None:
        assert bits(load_average(path)) == bits(load_average(checkpoint))
    else:
        assert type(error) is CheckpointError, error
        assert str(path) in str(error)


def test_a_checkpoint_with_one_flipped_bit_in_a_weight_is_refused(checkpoint, tmp_path):
    content = checkpoint.read_bytes()
    weight = load_average(checkpoint)['module.5.weight'].numpy().tobytes()
    where = content.index(weight)
    path = tmp_path / 'flipped.pt'
    path.write_bytes(content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :])
    refuses(path, tmp_path)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda s: s.pop('model'), 'model'),
        (lambda s: s.update(model='text'), 'model'),
        (lambda s: s.pop('algorithms'), 'no average'),
        (lambda s: s.update(algorithms=7), 'algorithms'),
        (lambda s: s.update(algorithms=[('EMA', None)]), 'NoneType'),
        (lambda s: s.update(algorithms=[('EMA', {})]), 'no known format'),
        (lambda s: ema_of(s).update(averages=3), 'averages'),
        (lambda s: ema_of(s).update(version=99), '99'),
        (lambda s: ema_of(s).update(started=False), 'no average yet'),
        (lambda s: ema_of(s)['averages'].update(ema=3), 'ema'),
        (lambda s: average_of(s).update(parameters=[1]), 'parameters'),
        (lambda s: average_of(s).update(aliases=[1]), 'aliases'),
        (lambda s: average_of(s)['parameters'].update({'module.5.bias': 'text'}), 'module.5.bias'),
        (lambda s: average_of(s)['parameters'].update({'module.5.bias': torch.ones(9)}), 'module.5.bias'),
        (lambda s: average_of(s)['parameters'].update(other=torch.ones(9)), 'other'),
    ],
    ids=[
        'no model', 'model a string', 'no algorithms', 'algorithms a number', 'state None', 'state empty',
        'averages a number', 'newer version', 'not started', 'average a number', 'parameters a list',
        'aliases a list', 'weight a string', 'weight of other shape', 'unknown weight',
    ],
)  # fmt: skip
def test_a_checkpoint_of_the_wrong_structure_is_refused(checkpoint, tmp_path, change, message):
    content = torch.load(checkpoint, weights_only=False)
    change(content['state'])
    path = tmp_path / 'changed.pt'
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        load_average(path)
    refuses(path, tmp_path)


def ema_of(state: dict[str, Any]) -> dict[str, Any]:
    return dict(state['algorithms'])['EMA']


def average_of(state: dict[str, Any]) -> dict[str, Any]:
    return ema_of(state)['averages']['ema']
