"""Averages in loops with accelerate, against the real library: EMAOptimizer inside prepare, ShadowModel beside it."""

from __future__ import annotations

import pytest
import torch
from plain import STRICT, same_bits
from sharded import ranks

pytest.importorskip('accelerate')

from accelerate_loops import Loop, run_in_ranks
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from composer_ema import CheckpointError, ShadowModel, load_average

pytestmark = STRICT


def test_training_is_bit_identical_with_and_without_the_average():
    averaged = Loop()
    assert averaged.epoch() == [1, 2, 3, 4, 5]
    bare = Loop(averaged=False)
    assert bare.epoch() == []
    assert same_bits(averaged.weights(), bare.weights())


def test_the_average_is_the_formula_over_the_weights_after_each_step():
    loop = Loop(gradient_accumulation_steps=2)
    assert loop.epoch() == [0, 1, 1, 2, 3]  # an accumulated batch is no step; the last batch ends the epoch
    average = loop.average()
    for name, expected in loop.expected().items():
        torch.testing.assert_close(average[name].double(), expected)


def test_the_average_is_swapped_in_by_the_optimizer_inside():
    loop = Loop()
    loop.epoch()
    assert not hasattr(loop.optimizer, 'swap_ema_weights')
    before, average = loop.weights(), loop.average()
    with loop.optimizer.optimizer.swap_ema_weights():
        assert same_bits(loop.weights(), {**before, **average})
    assert same_bits(loop.weights(), before)


@pytest.mark.parametrize('precision', ['no', 'bf16'])
def test_load_state_goes_on_from_the_middle_of_an_epoch_to_the_same_bits(tmp_path, precision):
    whole = Loop(mixed_precision=precision)
    whole.epoch(end=3)
    whole.accelerator.save_state(str(tmp_path))
    whole.epoch(start=3)
    resumed = Loop(mixed_precision=precision)
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.ema.num_steps == 3
    resumed.epoch(start=3)
    assert same_bits(resumed.weights(), whole.weights())
    assert same_bits(resumed.average(), whole.average())
    assert resumed.ema.num_steps == whole.ema.num_steps == 5


def test_a_step_that_the_gradient_scaler_skips_makes_no_update():
    loop = Loop(scaler=torch.amp.GradScaler('cpu', init_scale=4.0))
    assert loop.epoch(damaged=2) == [1, 2, 2, 3, 4]


def test_a_shadow_is_saved_and_loaded_with_the_state_of_the_accelerator(tmp_path):
    def begin():
        loop = Loop(averaged=False)
        shadow = ShadowModel(loop.model)
        loop.accelerator.register_for_checkpointing(shadow)
        return loop, shadow

    loop, shadow = begin()
    loop.epoch()
    shadow.update(loop.model, smoothing=0.5)
    loop.accelerator.save_state(str(tmp_path))
    resumed, loaded = begin()
    resumed.accelerator.load_state(str(tmp_path))
    assert loaded.num_updates == 1
    assert same_bits(dict(loaded.named_parameters()), dict(shadow.named_parameters()))


def test_of_a_folder_of_accelerate_the_error_names_the_file_that_has_the_average(tmp_path):
    loop = Loop()
    loop.epoch()
    loop.accelerator.save_state(str(tmp_path))
    for passed in (tmp_path, tmp_path / 'model.safetensors'):
        with pytest.raises(CheckpointError, match=r'accelerate saves in several files, and .*: \S+/optimizer\.bin\.'):
            load_average(passed)
    loaded = load_average(tmp_path / 'optimizer.bin', loop.model)
    assert same_bits(loaded, {**loop.weights(), **loop.average()})


def test_torch_s_checkpoint_functions_find_the_average_through_the_optimizer_of_accelerate():
    loop = Loop()
    loop.epoch(end=2)
    state = get_optimizer_state_dict(loop.model, loop.optimizer)
    found = state['state']['0.weight']
    assert torch.equal(found['average/ema'], dict(loop.ema.shadow.named_parameters())['0.weight'])


@pytest.mark.slow
@pytest.mark.parametrize('sharded', [False, True], ids=['ddp', 'fsdp2'])
def test_two_processes_average_and_go_on_from_load_state_to_the_same_bits(tmp_path, sharded):
    first, second = ranks(2)(run_in_ranks_sharded if sharded else run_in_ranks_whole, str(tmp_path))
    assert first['wrapper'] == ('FSDPSequential' if sharded else 'DistributedDataParallel')
    for found in (first, second):
        assert found['steps'] == [3, 6]
        assert found['resumed'] == [True, True]
        assert found['untouched']
        assert found['lent']
        assert found['given back']
        assert max(found['differences']) < 1e-6


def run_in_ranks_sharded(folder: str):
    return run_in_ranks(folder, sharded=True)


def run_in_ranks_whole(folder: str):
    return run_in_ranks(folder, sharded=False)
