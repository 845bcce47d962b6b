"""What a checkpoint is said to hold is what it holds, whoever wrote it; and nothing in it is executed."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

pytest.importorskip('composer', reason='needs Composer')

from composer.algorithms import SWA as ComposerSWA
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from rich.console import Console

from composer_ema import EMA, SWA, CheckpointError, EMAOptimizer, ShadowModel, export, load_average
from composer_ema.checkpoints import inspection
from composer_ema.checkpoints.inspection import (
    ABSENT,
    ALIAS,
    AVERAGE,
    BUFFER,
    COPY,
    NOT_READ,
    OF_AVERAGE,
    PARAMETER,
    SAME,
    TRAINING_WEIGHTS,
    UNKNOWN,
    UNTRACKED,
    AverageInfo,
    TensorInfo,
    describe,
    summarise,
)
from composer_ema.pictures import checkpoints
from composer_ema.pictures.tables import Whole

FIXTURES = Path(__file__).parent / 'fixtures'
TRUTHS = json.loads((FIXTURES / 'truths.json').read_text())


def save(path: Path, **state: Any) -> Path:
    """A checkpoint by hand."""
    torch.save({'state': {'run_name': 'by-hand', **state}, 'rng': []}, path)
    return path


def ema_state(parameters: dict[str, torch.Tensor], **more: Any) -> dict[str, Any]:
    average = {'version': 1, 'parameters': parameters, 'buffers': {}, 'num_updates': 7, 'aliases': {}}
    return {
        'version': 1, 'repr': 'EMA()', 'config': {'half_life': '3ba'}, 'started': True,
        'averages': {'ema': {**average, 'last_update': None, **more.pop('average', {})}}, **more,
    }  # fmt: skip


def printed(path: Path, width: int | None = None, *, all_tensors: bool = True) -> str:
    """What ``composer-ema inspect`` prints on a terminal of that width, or where there is none."""
    console = Console(width=width or 80, file=io.StringIO(), force_terminal=width is not None, color_system=None)
    for table in checkpoints.of_checkpoint(describe(path), all_tensors=all_tensors):
        console.print(Whole(table), highlight=False, crop=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def truth(name: str, key: str) -> dict[str, torch.Tensor]:
    return {tensor: torch.tensor(values) for tensor, values in TRUTHS[name][key].items()}


def roles(average: AverageInfo) -> dict[str, str]:
    return {tensor.name: tensor.role for tensor in average.tensors}


class TestByHand:
    def test_distances_are_norms_over_norms(self, tmp_path):
        model = {'a': torch.tensor([3.0, 4.0]), 'b': torch.zeros(1), 'c': torch.tensor([12.0])}
        average = {'a': torch.tensor([3.0, 9.0]), 'b': torch.zeros(1), 'c': torch.tensor([12.0])}
        path = save(tmp_path / 'a.pt', model=model, algorithms=[('EMA', ema_state(average))])
        [found] = describe(path).averages
        assert [tensor.relative_distance for tensor in found.tensors] == [1.0, 0.0, 0.0]
        assert found.relative_distance == pytest.approx(5 / 13)
        assert (found.algorithm, found.num_updates, found.config) == ('EMA', 7, {'half_life': '3ba'})
        assert found.written_as == 'composer_ema, version 1'

    def test_weights_that_are_zero_have_an_infinite_distance_unless_the_average_is_zero_too(self, tmp_path):
        state = ema_state({'a': torch.ones(1)})
        path = save(tmp_path / 'a.pt', model={'a': torch.zeros(1)}, algorithms=[('EMA', state)])
        assert describe(path).averages[0].relative_distance == math.inf

    def test_in_a_swapped_checkpoint_the_average_is_compared_with_the_stash(self, tmp_path):
        average, stash = torch.tensor([3.0, 9.0]), torch.tensor([3.0, 4.0])
        state = ema_state({'a': average}, training_weights={'a': stash})
        found = describe(save(tmp_path / 'a.pt', model={'a': average}, algorithms=[('EMA', state)]))
        assert (found.model_slot, found.has_stash) == (AVERAGE, True)
        assert found.averages[0].relative_distance == 1.0

    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
    def test_with_a_stash_the_slot_is_compared_to_tell_whose_weights_it_holds(self, tmp_path, dtype):
        average, stash = torch.tensor([3.0, 9.0]), torch.tensor([math.nan, 4.0], dtype=dtype)
        for slot, weights in ((AVERAGE, average.to(dtype)), (TRAINING_WEIGHTS, stash)):
            state = ema_state({'a': average}, training_weights={'a': stash})
            path = save(tmp_path / 'a.pt', model={'a': weights}, algorithms=[('EMA', state)])
            found = describe(path)
            assert (found.model_slot, found.has_stash) == (slot, True)
            shown = printed(path)
            assert ('the average; the training weights are in the stash' in shown) == (slot == AVERAGE)
            assert ('training weights; saved while a model held the average' in shown) == (slot == TRAINING_WEIGHTS)

    @pytest.mark.parametrize('layout', ['sparse_coo', 'sparse_csr', 'meta', 'quantized'])
    def test_tensors_of_any_kind_are_shown(self, tmp_path, layout):
        odd = {
            'sparse_coo': lambda: torch.eye(3).to_sparse(),
            'sparse_csr': lambda: torch.eye(3).to_sparse_csr(),
            'meta': lambda: torch.zeros(3, 3, device='meta'),
            'quantized': lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
        }[layout]()
        state = ema_state({'a': torch.ones(1)}, training_weights={'a': torch.ones(1), 'odd': odd})
        state['averages']['ema']['buffers'] = {'odd': odd}
        path = save(tmp_path / 'a.pt', model={'a': torch.ones(1), 'odd': odd}, algorithms=[('EMA', state)])
        found = describe(path)
        [_, tensor] = found.averages[0].tensors
        assert (tensor.name, tensor.shape, tensor.relative_distance) == ('odd', (3, 3), None)
        if 'sparse' in layout:
            assert tensor.dtype == f'float32 {layout}'
            assert tensor.num_bytes == (3 * 4 + 6 * 8 if layout == 'sparse_coo' else 3 * 4 + 7 * 8)
        assert found.model_slot == TRAINING_WEIGHTS
        assert '3 × 3' in printed(path)

    def test_an_average_in_another_dtype_is_compared_in_its_own(self, tmp_path):
        state = ema_state({'a': torch.tensor([1.0, 1.0])})
        weights = {'a': torch.ones(2, dtype=torch.bfloat16)}
        [found] = describe(save(tmp_path / 'a.pt', model=weights, algorithms=[('EMA', state)])).averages
        assert found.tensors == [TensorInfo('a', (2,), 'bfloat16', 4, PARAMETER, 'float32', 8, 0.0)]

    def test_without_the_algorithms_nothing_tells_whose_weights_they_are(self, tmp_path):
        found = describe(save(tmp_path / 'a.pt', model={'a': torch.ones(3)}))
        assert (found.model_slot, found.averages) == (UNKNOWN, [])
        assert found.tensors == [TensorInfo('a', (3,), 'float32', 12, UNTRACKED)]
        assert describe(save(tmp_path / 'a.pt', model={}, algorithms=[])).model_slot == TRAINING_WEIGHTS

    def test_summary_counts_by_role_and_dtype(self):
        tensors = [
            TensorInfo('a', (2, 3), 'bfloat16', 12, PARAMETER, 'float32', 24, 0.1),
            TensorInfo('b', (), 'int64', 8, COPY, 'int64', 8),
            TensorInfo('c', (4,), 'bfloat16', 8, PARAMETER, 'float32', 16, 0.1),
            TensorInfo('d', (4,), 'bfloat16', 8, UNTRACKED),
        ]
        assert [dataclasses.astuple(share) for share in summarise(tensors)] == [
            (PARAMETER, 'bfloat16 → float32', 2, 10, 20, 40),
            (COPY, 'int64', 1, 1, 8, 8),
            (UNTRACKED, 'bfloat16', 1, 4, 8, 0),
        ]


class TestRuns:
    def test_a_run_is_described(self, trainer, tmp_path):
        ema, logger = EMA(half_life='2ba'), InMemoryLogger()
        run = trainer(
            [ema], max_duration='2ep', run_name='the-run', save_folder=str(tmp_path), save_filename='last.pt',
            loggers=[logger], save_overwrite=True,
        )  # fmt: skip
        run.fit()
        found = describe(tmp_path / 'last.pt')
        [average] = found.averages
        assert (found.run_name, found.model_slot, found.has_stash) == ('the-run', TRAINING_WEIGHTS, False)
        assert found.trained['epoch'] == 2
        assert found.trained['batch'] == average.num_updates == int(run.state.timestamp.batch)
        assert average.is_started
        assert average.config['half_life'] == '2ba'
        assert average.last_update is not None
        assert average.last_update['ba'] == average.num_updates
        assert average.relative_distance == pytest.approx(
            ema.ema_model.relative_distance(run.state.model).item(), rel=1e-6
        )
        assert found.algorithms == ['EMA']
        assert found.num_bytes == (tmp_path / 'last.pt').stat().st_size
        live = run.state.model
        assert {t.name for t in average.tensors if t.role == PARAMETER} == {name for name, _ in live.named_parameters()}
        assert {t.name: t.shape for t in average.tensors} == {n: tuple(t.shape) for n, t in live.state_dict().items()}
        by_name = roles(average)
        assert by_name['module.1.running_mean'] == BUFFER
        assert by_name['module.1.num_batches_tracked'] == COPY

    def test_several_averages_have_their_settings_and_share_a_table(self, trainer, tmp_path):
        ema = EMA(half_life={'short': '1ba', 'long': '4ba'}, power={'wide': 0.1}, warmup=0.2)
        built = trainer([ema], max_duration='2ba')
        built.fit()
        path = tmp_path / 'a.pt'
        built.save_checkpoint(str(path))
        assert 'half_life=4ba, warmup=0.2' in printed(path)
        assert re.search(r'power=0.1, ema_start', printed(path))
        assert printed(path).count('tensors of the average ') == 3, 'each has distances of its own'
        counted = printed(path, all_tensors=False)
        assert 'tensors of the averages short by EMA, long by EMA, wide by EMA' in counted
        assert counted.count('tensors of the average') == 1
        torch.save(ema.state_dict(), tmp_path / 'alone.pt')
        assert 'half_life=4ba, warmup=0.2' in printed(tmp_path / 'alone.pt')
        assert export(path, tmp_path / 'long.safetensors', average='long')['warmup'] == '0.2'

    def test_averages_that_are_kept_for_snapshots_are_told_apart(self, trainer, tmp_path):
        built = trainer([EMA(half_life='1ba', snapshots='1ba')], max_duration='2ba', save_folder=str(tmp_path / 'run'))
        built.fit()
        path = tmp_path / 'a.pt'
        built.save_checkpoint(str(path))
        assert '│ power=0.05, ema_start=0.0dur, update_interval=1ba, kept_for=snapshots' in printed(path, 200)
        metadata = export(path, tmp_path / 'a.safetensors', average='power=0.05')
        assert metadata['power'] == '0.05'
        assert 'half_life' not in metadata

    def test_a_checkpoint_taken_while_swapped_holds_the_training_weights(self, trainer, tmp_path):
        ema = EMA(half_life='2ba')
        run = trainer([ema], max_duration='1ep')
        run.fit()
        expected = ema.ema_model.relative_distance(run.state.model).item()
        ema.get_ema_model(run.state.model)
        run.save_checkpoint(str(tmp_path / 'swapped.pt'))
        found = describe(tmp_path / 'swapped.pt')
        assert (found.model_slot, found.has_stash) == (TRAINING_WEIGHTS, False)
        assert found.averages[0].relative_distance == pytest.approx(expected, rel=1e-6)

    def test_frozen_excluded_and_tied_tensors(self, trainer, tmp_path):
        network = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
        network[3].weight = network[2].weight
        network[1].requires_grad_(False)
        ema = EMA(half_life='2ba', exclude=r'4\.bias', buffers='copy')
        run = trainer([ema], model=ComposerClassifier(network, num_classes=3), max_duration='1ep')
        run.fit()
        run.save_checkpoint(str(tmp_path / 'a.pt'))
        [average] = describe(tmp_path / 'a.pt').averages
        assert roles(average) == {
            'module.1.weight': UNTRACKED, 'module.1.bias': UNTRACKED, 'module.2.weight': PARAMETER,
            'module.2.bias': PARAMETER, 'module.3.weight': ALIAS, 'module.3.bias': PARAMETER,
            'module.4.weight': PARAMETER, 'module.4.bias': UNTRACKED,
        }  # fmt: skip
        assert [t.average_bytes for t in average.tensors if t.name == 'module.3.weight'] == [0], 'it is kept once'

    def test_an_equal_average(self, trainer, tmp_path):
        run = trainer([SWA(swa_start='1ba', update_interval='1ba', refresh_batchnorm=False)], max_duration='1ep')
        run.fit()
        run.save_checkpoint(str(tmp_path / 'a.pt'))
        found = describe(tmp_path / 'a.pt')
        [average] = found.averages
        assert (average.algorithm, found.model_slot) == ('SWA', TRAINING_WEIGHTS)
        assert average.num_updates == int(run.state.timestamp.batch)
        assert average.config['swa_start'] == '1ba'

    def test_without_an_average(self, trainer, tmp_path):
        run = trainer([], max_duration='1ep')
        run.fit()
        run.save_checkpoint(str(tmp_path / 'a.pt'))
        found = describe(tmp_path / 'a.pt')
        assert (found.model_slot, found.averages) == (TRAINING_WEIGHTS, [])
        assert {tensor.name for tensor in found.tensors} == set(run.state.model.state_dict())

    def test_before_the_start_there_is_no_average_yet(self, trainer, tmp_path):
        run = trainer([EMA(half_life='2ba', ema_start='3ba')], max_duration='2ba')
        with pytest.warns(UserWarning, match='ema_start'):
            run.fit()
        run.save_checkpoint(str(tmp_path / 'a.pt'))
        [average] = describe(tmp_path / 'a.pt').averages
        assert not average.is_started
        assert average.num_updates == 0


class TestBuiltin:
    @pytest.mark.parametrize('name', sorted(TRUTHS))
    def test_both_formats_swapped_or_not(self, name):
        written = dict(torch.load(FIXTURES / f'{name}.pt', weights_only=False)['state']['algorithms'])['EMA']
        found = describe(FIXTURES / f'{name}.pt')
        [average] = found.averages
        assert found.model_slot == (AVERAGE if written['ema_weights_active'] else TRAINING_WEIGHTS)
        assert found.has_stash == written['ema_weights_active']
        assert (average.num_updates, average.config) == (None, {})
        assert average.written_as.startswith("Composer's own")
        assert ('0.12' in average.written_as) == name.startswith('0.12')
        training, averaged = (
            {k: torch.tensor(v) for k, v in TRUTHS[name][key].items()} for key in ('training', 'average')
        )
        parameters = [t.name for t in average.tensors if t.role == PARAMETER]
        assert sorted(parameters) == [
            f'module.{n}' for n in ('0.bias', '0.weight', '1.bias', '1.weight', '2.bias', '2.weight')
        ]
        distance = math.hypot(*((averaged[n] - training[n]).norm().item() for n in parameters))
        size = math.hypot(*(training[n].norm().item() for n in parameters))
        assert average.relative_distance == pytest.approx(distance / size, rel=1e-4)

    def test_composers_own_swa(self, trainer, tmp_path):
        own = ComposerSWA(swa_start='1ep', swa_end='2ep', update_interval='1ba', schedule_swa_lr=False)
        run = trainer([own], max_duration='2ep')
        run.fit()
        run.save_checkpoint(str(tmp_path / 'a.pt'))
        found = describe(tmp_path / 'a.pt')
        [average] = found.averages
        assert found.model_slot == UNKNOWN, 'its state does not say that the model holds the average'
        assert (average.algorithm, average.written_as, average.config) == ('SWA', "Composer's own", {})
        assert average.num_updates is not None
        assert average.num_updates > 1


class TestOtherLibraries:
    @pytest.mark.parametrize(
        ('name', 'source'),
        [('timm-saver.pth.tar', 'timm'), ('ema-pytorch.pt', 'ema-pytorch'), ('lightning.ckpt', 'Lightning'),
         ('diffusers.pt', 'diffusers'), ('torch-ema.pt', 'torch-ema')],
    )  # fmt: skip
    def test_what_load_average_reads_is_described(self, name, source):
        found = describe(FIXTURES / 'foreign' / name)
        [average] = found.averages
        assert (average.algorithm, average.is_started, average.relative_distance) == (source, True, None)
        assert (found.model_slot, found.trained) == (NOT_READ, {})
        assert {tensor.role for tensor in average.tensors} == {OF_AVERAGE}
        if name in ('diffusers.pt', 'torch-ema.pt'):
            assert 'which numbers the parameters' in average.written_as
            assert [tensor.name for tensor in average.tensors] == [str(i) for i in range(len(average.tensors))]
        else:
            read = load_average(FIXTURES / 'foreign' / name)
            assert {tensor.name: tensor.shape for tensor in average.tensors} == {n: t.shape for n, t in read.items()}

    def test_torchs_averaged_model_tells_its_updates(self, tmp_path):
        averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
        averaged.update_parameters(nn.Linear(2, 2))
        torch.save(averaged.state_dict(), tmp_path / 'a.pt')
        [average] = describe(tmp_path / 'a.pt').averages
        assert (average.num_updates, [tensor.shape for tensor in average.tensors]) == (1, [(2, 2), (2,)])


class TestOwnFiles:
    @staticmethod
    def optimized(model: nn.Module, *, named: bool = True) -> EMAOptimizer:
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), decay=0.5, model=model if named else None)
        for _ in range(3):
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
        return optimizer

    @pytest.fixture
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    def test_an_average_of_ema_optimizer_is_compared_with_the_model_beside_it(self, model, tmp_path):
        optimizer = self.optimized(model)
        path = tmp_path / 'a.pt'
        torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, path)
        found = describe(path)
        [average] = found.averages
        assert (found.model_slot, average.key) == (TRAINING_WEIGHTS, 'optimizer.ema')
        assert (average.algorithm, average.num_updates) == ('EMAOptimizer', 3)
        assert average.config == {'decay': 0.5, 'every_n_steps': 1}
        assert average.relative_distance == pytest.approx(optimizer.shadow.relative_distance(model).item(), rel=1e-6)
        kinds = roles(average)
        assert (kinds['0.weight'], kinds['1.running_mean'], kinds['1.num_batches_tracked']) == (PARAMETER, BUFFER, COPY)
        with optimizer.swap_ema_weights():
            held = copy.deepcopy(model.state_dict())
        torch.save({'model': held, 'optimizer': optimizer.state_dict()}, path)
        assert describe(path).model_slot == SAME

    @pytest.mark.parametrize('of', ['state_dict', 'ema_state_dict'])
    def test_the_state_of_an_optimizer_alone_is_described(self, model, tmp_path, of):
        torch.save(getattr(self.optimized(model), of)(), tmp_path / 'a.pt')
        found = describe(tmp_path / 'a.pt')
        assert (found.model_slot, found.averages[0].key) == (ABSENT, 'ema' if of == 'state_dict' else None)
        assert {tensor.name for tensor in found.averages[0].tensors} == model.state_dict().keys()

    def test_a_state_taken_while_swapped_tells_what_the_model_holds(self, model, tmp_path):
        shadow = ShadowModel(model)
        shadow.update(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), smoothing=0.5)
        path, training = tmp_path / 'a.pt', copy.deepcopy(model.state_dict())
        with shadow.swapped(model):
            torch.save({'model': model.state_dict(), 'average': shadow.state_dict()}, path)
            assert (describe(path).model_slot, describe(path).has_stash) == (AVERAGE, True)
            torch.save({'model': training, 'average': shadow.state_dict()}, path)
            assert (describe(path).model_slot, describe(path).has_stash) == (TRAINING_WEIGHTS, True)
        torch.save(shadow.state_dict(), path)
        assert describe(path).model_slot == ABSENT

    def test_every_average_of_a_file_is_described_with_its_key(self, model, tmp_path):
        states = [self.optimized(model, named=named).state_dict() for named in (True, False)]
        path = tmp_path / 'a.pt'
        torch.save({'optimizer_states': states}, path)
        found = describe(path)
        keys = ['optimizer_states.0.ema', 'optimizer_states.1.ema']
        assert [average.key for average in found.averages] == keys
        assert 'which numbers the parameters' in found.averages[1].written_as
        assert [average.key for average in describe(path, key='optimizer_states.1').averages] == keys[1:]
        assert all(f'under {key}' in printed(path) for key in keys)

    def test_plain_weights_are_described_under_their_key(self, model, tmp_path):
        path = tmp_path / 'a.pt'
        ema = {name: 2 * tensor for name, tensor in model.state_dict().items()}
        torch.save({'model': model.state_dict(), 'ema': ema}, path)
        with pytest.raises(CheckpointError, match=r'--key ema'):
            describe(path)
        found = describe(path, key='ema')
        assert (found.model_slot, found.averages[0].relative_distance) == (UNKNOWN, pytest.approx(1))

    @pytest.mark.parametrize('name', ['a.pt', 'a.safetensors'])
    def test_what_export_wrote_is_described(self, model, tmp_path, name):
        torch.save({'model': model.state_dict(), 'optimizer': self.optimized(model).state_dict()}, tmp_path / 'c.pt')
        export(tmp_path / 'c.pt', tmp_path / name)
        [average] = describe(tmp_path / name).averages
        assert (average.algorithm, average.num_updates, average.config['decay']) == ('composer-ema export', 3, '0.5')
        assert {tensor.name for tensor in average.tensors} == model.state_dict().keys()

    def test_safetensors_of_others_are_weights(self, model, tmp_path):
        safetensors.torch.save_file(dict(model.state_dict()), tmp_path / 'a.safetensors')
        found = describe(tmp_path / 'a.safetensors')
        assert (found.model_slot, found.averages, len(found.tensors)) == (UNKNOWN, [], 7)


class TestNarrow:
    """Tables fold on a narrow terminal, and are as wide as they need where there is none; nothing in them is cut."""

    @pytest.fixture
    def path(self, tmp_path):
        model = {
            f'module.layer{i}.0.downsample.conv.weight': torch.randn(512, 512, 3, 3).bfloat16() for i in range(3)
        } | {'module.norm.running_mean': torch.randn(512)}
        average = {name: tensor.float() + 1e-6 for name, tensor in model.items()}
        return save(tmp_path / 'a-name-that-is-as-long-as-those-of-runs-are.pt', model=model,
                    algorithms=[('EMA', ema_state(average))])  # fmt: skip

    @pytest.mark.parametrize('width', [40, 60, 80, 100])
    @pytest.mark.parametrize('all_tensors', [False, True])
    def test_every_word_of_the_tensors_is_whole(self, path, width, all_tensors):
        wide, narrow = (printed(path, columns, all_tensors=all_tensors) for columns in (None, width))
        assert '…' not in narrow
        assert narrow.startswith(f'{path}\n'), 'a name is not broken, however long it is'
        table = narrow[narrow.index('tensors of the average') :].splitlines()
        assert all(len(line) <= width for line in table if not line.startswith('name: '))
        kept = re.split(r'[│┃,\s]+', '\n'.join(table))
        for word in re.split(r'[│┃,\s]+', wide[wide.index('tensors of the average') :]):
            assert word in kept or f'{word}:' in kept or set(word) <= set('━┏┳┓┡╇┩─└┴┘'), word

    @pytest.mark.parametrize('width', [60, 80, None])
    def test_a_name_and_its_shape_are_found_in_a_line(self, path, width):
        shown = printed(path, width)
        assert shown.count('module.layer1.0.downsample.conv.weight') == 1
        assert shown.count('512 × 512 × 3 × 3') == 3
        assert shown.count('4.72 MB') == 3

    def test_without_a_terminal_each_tensor_is_one_line(self, path):
        [line] = [line for line in printed(path).splitlines() if 'layer1' in line]
        assert [cell.strip() for cell in line.strip('│').split('│')][:6] == [
            'module.layer1.0.downsample.conv.weight', 'averaged parameter', 'bfloat16 → float32',
            '512 × 512 × 3 × 3', '4.72 MB', '9.44 MB',
        ]  # fmt: skip


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path('executed'),))


class TestForeignFiles:
    def test_nothing_is_executed(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        torch.save({'state': {'model': {}, 'algorithms': [Evil()]}}, 'evil.pt')
        (tmp_path / 'evil.pkl').write_bytes(pickle.dumps(Evil(), protocol=2))
        for name in ('evil.pt', 'evil.pkl'):
            with pytest.raises(CheckpointError, match=name):
                describe(name)
        assert not Path('executed').exists()

    @pytest.mark.parametrize(
        'state',
        [{}, {'model': 3}, {'model': {}, 'algorithms': 3},
         {'model': {}, 'algorithms': [('EMA', {'version': 2, 'averages': 3})]},
         {'model': {}, 'algorithms': [('EMA', {'version': 99, 'averages': {}})]}, {'model': {}, 'timestamp': 3},
         {'model': {}, 'optimizers': [1]}],
    )  # fmt: skip
    def test_a_state_of_another_kind_is_an_error_that_names_the_file(self, tmp_path, state):
        with pytest.raises(CheckpointError, match=r'a\.pt'):
            describe(save(tmp_path / 'a.pt', **state))

    @pytest.mark.parametrize('state', [{}, None, {'repr': 'EMA()'}, {'version': 3}])
    def test_a_state_that_looks_like_no_average_is_named_among_the_algorithms_alone(self, tmp_path, state):
        path = save(tmp_path / 'a.pt', model={'a': torch.ones(1)}, algorithms=[('EMA', state)])
        found = describe(path)
        assert (found.algorithms, found.averages) == (['EMA'], [])
        with pytest.raises(
            CheckpointError, match=r'holds no average: .* EMA \(.*\), whose states are of no known format'
        ):
            load_average(path)

    @given(share=st.floats(0, 0.999), flipped=st.booleans())
    def test_a_damaged_file_is_an_error(self, tmp_path_factory, share, flipped):
        whole = (FIXTURES / '0.32-single-numpy.pt').read_bytes()
        at = int(share * len(whole))
        path = tmp_path_factory.mktemp('damaged') / 'a.pt'
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] if flipped else whole[:at])
        try:
            found = describe(path)
        except CheckpointError:
            return
        assert flipped, 'half a file was read'
        assert found.averages == describe(FIXTURES / '0.32-single-numpy.pt').averages, 'the byte was of no consequence'


def test_every_role_has_its_place_in_the_order():
    assert {PARAMETER, BUFFER, COPY, OF_AVERAGE, ALIAS, UNTRACKED} == set(inspection._ROLES)


def test_numbers_of_8_bits_have_a_distance(tmp_path):
    weights = {'weight': torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)}
    average = {'weight': torch.tensor([1.0, 1.0]).to(torch.float8_e4m3fn)}
    torch.save({'model': weights, 'ema': average}, tmp_path / 'a.pt')
    [found] = describe(tmp_path / 'a.pt', key='ema').averages
    assert found.relative_distance == pytest.approx(5**-0.5)
