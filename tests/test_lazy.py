"""The weights in a file, one tensor at a time: of every kind of file, none read before it is asked for."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import plain
import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from composer_ema import CheckpointError, EMAOptimizer, export, load_average
from composer_ema.checkpoints.lazy import TRAINING_WEIGHTS, LazyWeights, open_weights

FIXTURES = Path(__file__).parent / 'fixtures'
TRUTHS = json.loads((FIXTURES / 'truths.json').read_text())

pytestmark = plain.STRICT


def tensors_of(weights: LazyWeights) -> dict[str, Tensor]:
    return {name: weights.tensor(name) for name in weights.names}


class TestTrainingWeights:
    @pytest.mark.parametrize('name', sorted(TRUTHS))
    def test_of_a_checkpoint_whose_model_slot_may_hold_the_average_are_the_training_weights(self, name):
        weights = open_weights(FIXTURES / f'{name}.pt')
        assert weights.weights == TRAINING_WEIGHTS
        for key, values in TRUTHS[name]['training'].items():
            torch.testing.assert_close(weights.tensor(key).tolist(), values, rtol=2e-6, atol=1e-7)

    def test_of_a_composer_checkpoint_come_with_its_clock_and_its_run(self, tmp_path):
        model = plain.Net()
        weights = open_weights(plain.composer_checkpoint(tmp_path / 'a.pt', model))
        assert plain.same_bits(tensors_of(weights), dict(model.state_dict()))
        assert (weights.run_name, weights.trained) == ('a-run', {'ba': 7, 'ep': 1, 'sp': 56, 'tok': 0})

    @pytest.mark.parametrize('form', ['safetensors', 'state dict', 'script', 'legacy'])
    def test_of_other_files_are_found_by_themselves(self, tmp_path, form):
        model, path = plain.Net(), tmp_path / 'file'
        if form == 'safetensors':
            safetensors.torch.save_file(dict(model.state_dict()), path)
        elif form == 'script':
            torch.save({'model': model.state_dict(), 'ema': model.state_dict(), 'global_step': 12}, path)
        else:
            torch.save(model.state_dict(), path, _use_new_zipfile_serialization=form != 'legacy')
        weights = open_weights(path)
        assert plain.same_bits(tensors_of(weights), dict(model.state_dict()))
        assert weights.trained == ({'ba': 12} if form == 'script' else {})
        assert weights.describe('first.weight') == ((4, 3), torch.float32)

    def test_that_several_dictionaries_could_be_are_asked_for_by_key(self, tmp_path):
        torch.save({'student': plain.Net().state_dict(), 'teacher': plain.Net(1).state_dict()}, tmp_path / 'a.pt')
        with pytest.raises(CheckpointError, match=r'under the keys student, teacher.*--key student'):
            open_weights(tmp_path / 'a.pt')
        weights = open_weights(tmp_path / 'a.pt', key='teacher')
        assert plain.same_bits(tensors_of(weights), dict(plain.Net(1).state_dict()))

    def test_beside_an_average_that_a_library_names_are_asked_for_by_key(self, tmp_path):
        weights = {'state_dict': plain.Net().state_dict(), 'state_dict_ema': plain.Net(1).state_dict()}
        torch.save(weights, tmp_path / 'a')
        with pytest.raises(CheckpointError, match='under the keys state_dict, state_dict_ema'):
            open_weights(tmp_path / 'a')

    def test_keep_what_modules_store_besides_tensors(self, tmp_path):
        torch.save({**plain.Net().state_dict(), 'norm._extra_state': {'calls': 3}}, tmp_path / 'a.pt')
        weights = open_weights(tmp_path / 'a.pt')
        assert weights.extra_state == {'norm._extra_state': {'calls': 3}}
        assert 'norm._extra_state' not in weights.names


class TestAverage:
    @pytest.mark.parametrize('name', sorted(TRUTHS))
    def test_of_a_label_is_what_load_average_returns(self, name):
        path = FIXTURES / f'{name}.pt'
        weights = open_weights(path, average='ema')
        assert plain.same_bits(tensors_of(weights), load_average(path))
        assert weights.weights == 'exponential moving average'

    def test_alone_in_a_file_needs_no_label(self, tmp_path):
        model = plain.Net()
        averaged = AveragedModel(model)
        averaged.update_parameters(model)
        torch.save(averaged.state_dict(), tmp_path / 'a.pt')
        weights = open_weights(tmp_path / 'a.pt')
        assert plain.same_bits(tensors_of(weights), dict(model.state_dict()))
        assert weights.weights != TRAINING_WEIGHTS

    def test_that_was_exported_keeps_the_clock_of_its_checkpoint(self, tmp_path):
        for out in (tmp_path / 'average.safetensors', tmp_path / 'average.pt'):
            export(FIXTURES / '0.32-single-interval.pt', out)
            weights, checkpoint = open_weights(out), open_weights(FIXTURES / '0.32-single-interval.pt')
            assert weights.weights == 'exponential moving average'
            assert weights.trained == checkpoint.trained != {}
            assert weights.run_name == checkpoint.run_name is not None

    def test_without_a_label_is_not_found_by_one(self, tmp_path):
        model = plain.Net()
        optimizer = EMAOptimizer(plain.sgd(model), decay=0.5, model=model)
        plain.train(model, optimizer, range(2))
        torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, tmp_path / 'a.pt')
        with pytest.raises(CheckpointError, match=r"without a label, so none is called 'ema'.*--key optimizer"):
            open_weights(tmp_path / 'a.pt', average='ema')
        weights = open_weights(tmp_path / 'a.pt', key='optimizer')
        assert plain.same_bits(tensors_of(weights), load_average(tmp_path / 'a.pt'))
        assert plain.same_bits(tensors_of(open_weights(tmp_path / 'a.pt')), plain.weights(model))


class TestReading:
    @pytest.mark.parametrize('form', ['torch', 'safetensors'])
    def test_takes_no_memory_before_a_tensor_is_used_and_gives_it_back_when_closed(self, tmp_path, form):
        path, size = tmp_path / 'large', 32 * 2**20
        large = {f'{i}.weight': torch.ones(size // 8) for i in range(2)}
        torch.save(large, path) if form == 'torch' else safetensors.torch.save_file(large, path)
        del large
        open_weights(path)  # what the first call allocates for good
        before = resident()
        weights = open_weights(path)
        assert resident() - before < size // 4
        assert float(weights.tensor('1.weight').sum()) == size // 8
        weights.close()
        assert resident() - before < size // 4
        assert float(weights.tensor('0.weight')[-1]) == 1

    def test_leaves_the_file_as_it_is_whatever_is_written_to_a_tensor(self, tmp_path):
        torch.save({'a': torch.zeros(3)}, tmp_path / 'a.pt')
        weights = open_weights(tmp_path / 'a.pt')
        weights.tensor('a').fill_(5)
        weights.close()
        assert weights.tensor('a').tolist() == [0, 0, 0]

    def test_of_a_file_that_was_replaced_in_between_is_refused(self, tmp_path):
        path = tmp_path / 'a.pt'
        torch.save({'a': torch.zeros(3)}, path)
        weights = open_weights(path)
        weights.close()
        torch.save({'a': torch.zeros(400)}, tmp_path / 'b.pt')
        os.replace(tmp_path / 'b.pt', path)
        with pytest.raises(CheckpointError, match='has changed while it was being read'):
            weights.tensor('a')

    def test_executes_nothing(self, tmp_path):
        plain.write_code(tmp_path / 'a.pt', tmp_path / 'ran')
        with pytest.raises(CheckpointError):
            open_weights(tmp_path / 'a.pt')
        assert not (tmp_path / 'ran').exists()

    def test_finds_a_byte_that_changed(self, tmp_path):
        path = tmp_path / 'a.pt'
        torch.save({'a': torch.arange(100.0)}, path)
        content = path.read_bytes()
        place = content.index(torch.arange(100.0).numpy().tobytes()) + 40
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match='checksum'):
            open_weights(path)

    def test_of_values_that_are_not_there_is_refused(self, tmp_path):
        torch.save({'a': torch.zeros(3, device='meta')}, tmp_path / 'a.pt')
        with pytest.raises(CheckpointError, match='a in the file are on the meta device'):
            open_weights(tmp_path / 'a.pt')


def resident() -> int:
    status = Path('/proc/self/status')
    if not status.exists() or importlib.util.find_spec('resource') is None:
        pytest.skip('needs /proc')
    lines = dict(line.split(':', 1) for line in status.read_text().splitlines())
    return int(lines['VmRSS'].split()[0]) * 1024
