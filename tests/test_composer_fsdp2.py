"""Averages under FSDP2 in a Composer run of one process: when they are built, how they are saved, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback, Event, Trainer
from composer.utils.parallelism import FSDP2Config, ParallelismConfig
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.tensor import DTensor
from toy import bits, make_evaluator

from composer_ema import EMA, SWA
from composer_ema.checkpoints import sharded_format
from composer_ema.run.shards import Outline
from composer_ema.trainer import shards

pytestmark = pytest.mark.usefixtures('alone')


def fsdp2(kind: str = 'sharded') -> ParallelismConfig:
    return ParallelismConfig(fsdp2=FSDP2Config(state_dict_type=kind))


class Note(Callback):
    """Notes when there is an average, and what kind of tensors it has."""

    def __init__(self, ema: EMA) -> None:
        self.ema, self.kinds = ema, {}

    def run_event(self, event: Event, state: Any, logger: Any) -> None:
        shadow = self.ema.ema_model
        self.kinds[event] = None if shadow is None else {type(tensor) for _, tensor in shadow.named_parameters()}


def test_averages_are_built_once_the_model_is_sharded(trainer: Callable[..., Trainer]):
    ema = EMA('2ba')
    note = Note(ema)
    trainer([ema], callbacks=[note], parallelism_config=fsdp2()).fit()
    assert note.kinds[Event.INIT] is None
    assert note.kinds[Event.BEFORE_LOAD] is None
    assert note.kinds[Event.AFTER_LOAD] == note.kinds[Event.FIT_START] == note.kinds[Event.FIT_END] == {DTensor}


@pytest.mark.parametrize('kind', ['sharded', 'full'])
def test_runs_go_on_to_the_same_bits(trainer: Callable[..., Trainer], tmp_path: Path, kind: str):
    def kept() -> list[Any]:
        return [EMA({'short': '2ba', 'long': '1ep'}), SWA('1ba', update_interval='1ba', refresh_batchnorm=False)]

    common = {'parallelism_config': fsdp2(kind), 'eval_dataloader': make_evaluator(interval='2ba')}
    whole = trainer(kept(), **common, save_folder=str(tmp_path), save_interval='1ba')
    whole.fit()
    path = tmp_path / ('ep0-ba2' if kind == 'sharded' else 'ep0-ba2-rank0.pt')
    resumed = trainer(kept(), **common, load_path=str(path))
    resumed.fit()
    assert averages_of(resumed) == averages_of(whole)
    assert set(averages_of(whole)) == {'short', 'long', 'swa'}
    assert bits(local_parts(dict(resumed.state.model.state_dict()))) == bits(
        local_parts(dict(whole.state.model.state_dict()))
    )


def averages_of(run: Trainer) -> dict[str, dict[str, bytes]]:
    return {
        label: bits(local_parts({**average['parameters'], **average['buffers']}))
        for algorithm in run.state.algorithms
        for label, average in algorithm.state_dict()['averages'].items()
    }


def local_parts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def test_a_sharded_checkpoint_has_the_tensors_of_averages_as_items_of_their_own(
    trainer: Callable[..., Trainer], tmp_path: Path
):
    run = trainer([EMA('2ba')], parallelism_config=fsdp2(), save_folder=str(tmp_path), max_duration='2ba')
    run.fit()
    saved = run.state.state_dict()
    [(_, state)] = saved['algorithms']
    assert sharded_format.is_split(state)
    assert state['averages']['ema']['parameters'] == {}
    items = FileSystemReader(tmp_path / 'ep0-ba2').read_metadata().state_dict_metadata
    of_averages = {name.removeprefix('state.sharded_averages.EMA.ema.') for name in items if 'sharded_averages' in name}
    weights = {name.removeprefix('state.model.') for name in items if name.startswith('state.model.')}
    buffers = {f'module.1.{name}' for name in ('running_mean', 'running_var', 'num_batches_tracked')}
    assert of_averages == {f'parameters.{each}' for each in weights - buffers} | {f'buffers.{each}' for each in buffers}


def test_the_state_of_a_sharded_checkpoint_alone_is_refused(trainer: Callable[..., Trainer]):
    ema = EMA('2ba')
    run = trainer([ema], parallelism_config=fsdp2(), max_duration='1ba')
    run.fit()
    [(_, state)] = run.state.state_dict()['algorithms']
    before = averages_of(run)
    with pytest.raises(ValueError, match=r'of a sharded checkpoint, whose tensors lie beside it\. Pass the folder to'):
        ema.load_state_dict(state)
    assert averages_of(run) == before
    with pytest.raises(ValueError, match=r'not know its folder\. Pass the folder to the Tr'), shards.opened(run.state):
        pass


def test_a_state_that_does_not_fit_is_refused_before_a_tensor_is_read(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = trainer([EMA('2ba')], parallelism_config=fsdp2(), save_folder=str(tmp_path), max_duration='1ba')
    run.fit()
    [(_, state)] = run.state.state_dict()['algorithms']
    outline = Outline(state, shards.place('EMA'), FileSystemReader(tmp_path / 'ep0-ba1'), 'it')
    outline['averages']['ema']['parameters']['module.5.weight'] = torch.zeros(()).expand(4, 8)
    monkeypatch.setattr(outline, 'read', lambda *_: pytest.fail('a tensor was read'))
    before = averages_of(run)
    with pytest.raises(ValueError, match=r'module\.5\.weight.*\(4, 8\)'):
        run.state.algorithms[0].load_state_dict(outline)
    assert averages_of(run) == before


def test_fsdp1_is_refused_before_anything_is_changed(trainer: Callable[..., Trainer]):
    ema = EMA('2ba')
    with pytest.raises(NotImplementedError, match=r"FSDP1.*pass parallelism_config=\{'fsdp': FSDP2Config\(\.\.\.\)\}"):
        trainer([ema], parallelism_config={'fsdp': {}})
    assert ema.ema_model is None
