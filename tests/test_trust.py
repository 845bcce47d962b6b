"""Files that attack: nothing in them runs, what is allowed is harmless whatever its arguments, and a run asks first."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import hostile_trust as hostile
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import toy
from composer import Callback
from composer.algorithms import BlurPool, LabelSmoothing, LayerFreezing, LowPrecisionLayerNorm, StochasticDepth
from composer.callbacks import MemoryMonitor, OptimizerMonitor, RuntimeEstimator, SpeedMonitor
from composer.optim import DecoupledAdamW, LinearWithWarmupScheduler
from composer.utils import checkpoint
from folders import save
from hostile_trust import Call, Name, Stored, write_torch_file

from composer_ema import EMA, CheckpointError, load_average, read_checkpoint, safe_loading
from composer_ema.checkpoints.inert_pickle import InertPickleError, UnknownNamesError
from composer_ema.checkpoints.safely import load_safely
from composer_ema.recipe import build, schema
from composer_ema.recipe.arguments import RecipeError
from composer_ema.recipe.run import train
from composer_ema.trainer.safe_loading import _algorithm, reading_safely

RECIPE = Path(__file__).parent.parent / 'yamls' / 'mnist1d.yaml'
EVERY = 23  # of the attacks, which the trial tries all


class Mine:
    """A class of the user's in a checkpoint."""

    def __init__(self) -> None:
        self.value = 3


class Settings(dict):
    """Likewise, one that is filled item by item."""


class TestAttacks:
    def test_each_is_one(self, tmp_path):
        trap = tmp_path / 'trap'
        attacks = hostile.payloads(trap)
        assert len(attacks) >= 30
        assert [name for name, attack in attacks.items() if not hostile.executes(attack, trap)] == []

    def test_no_reader_runs_one(self, tmp_path):
        trap, number = tmp_path / 'trap', 0
        (tmp_path / 'files').mkdir()
        doors = hostile.readers(tmp_path / 'out.safetensors')
        for name, path in hostile.files(tmp_path / 'files', trap):
            for door, read in doors.items():
                number += 1
                if number % EVERY == 0:
                    with pytest.raises((CheckpointError, ValueError)):
                        read(path)
                    assert not trap.exists(), f'{door} ran {name}'

    def test_a_sharded_checkpoint_runs_none_where_torch_loads_it(self, tmp_path):
        trap = tmp_path / 'trap'
        for number, (name, folder) in enumerate(hostile.folders(tmp_path, trap)):
            if number % EVERY:
                continue
            held = {'state': {'model': {'weight': torch.zeros(4)}, 'note': None}}
            with pytest.raises(CheckpointError, match=r'could run code|has no place in it|damaged'):
                load_sharded(held, folder)
            assert not trap.exists(), name

    def test_the_types_that_are_met_are_all_named(self, tmp_path):
        path = write_torch_file(tmp_path / 'a.pt', [Call(('os', 'mkdir'), ('x',)), Call(('my.module', 'Mine'))])
        with pytest.raises(CheckpointError, match=r'holds the types my\.module\.Mine, os\.mkdir, which could run code'):
            load_average(path)

    @pytest.mark.parametrize('text', hostile.YAML_TAGS)
    def test_a_recipe_makes_no_objects(self, text, tmp_path):
        (tmp_path / 'a.yaml').write_text(text.format(at=tmp_path / 'trap'))
        with pytest.raises(RecipeError):
            schema.load(tmp_path / 'a.yaml')
        assert not (tmp_path / 'trap').exists()


def load_sharded(held: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings(), reading_safely():
        warnings.simplefilter('ignore')  # that there is one process
        dcp.load(held, checkpoint_id=folder)


def dense(storage: Stored, offset: Any, size: Any, stride: Any) -> Call:
    return Call(('torch._utils', '_rebuild_tensor_v2'), (storage, offset, size, stride, False, None))


FLOATS, COUNTS = Stored(), Stored('LongStorage', 16, '1')
DTYPE = Call(('numpy', 'dtype'), ('f4', False, True), (3, '<', None, None, None, -1, -1, 0))
ARRAY = (('numpy.core.multiarray', '_reconstruct'), (Name(('numpy', 'ndarray')), (0,), b'b'))
SPARSE = Call(('torch.serialization', '_get_layout'), ('torch.sparse_coo',))
CRASHES: dict[str, Any] = {
    'an array at an address': Call(('numpy', 'ndarray'), ((2**40,), DTYPE), new=True),
    'an array on an array': Call(('numpy', 'ndarray'), ((4,), DTYPE, Call(*ARRAY), 2**40)),
    'an array of objects': Call(*ARRAY, (1, (1,), Call(('numpy', 'dtype'), ('O', False, True)), False, b'\1' * 8)),
    'an array of fields': Call(
        *ARRAY,
        (1, (1,), Call(DTYPE.target, ('f4', False, True), (3, '|', None, ('a',), {}, 4, 1, 0)), False, b'abcd')),
    'an array with few values': Call(*ARRAY, (1, (2**40,), DTYPE, False, b'abcd')),
    'an array that is filled twice': hostile.Raw(
        hostile.encoded(Call(*ARRAY, (1, (1,), DTYPE, False, b'abcd')))
        + hostile.encoded((1, (2,), DTYPE, False, b'abcdabcd')) + b'b'),
    'a number with few bytes': Call(('numpy.core.multiarray', 'scalar'), (DTYPE, b'a')),
    'a number that is an object': Call(
        ('numpy.core.multiarray', 'scalar'), (Call(('numpy', 'dtype'), ('O8', False, True)), b'abcdabcd')),
    'a tensor beyond its storage': dense(FLOATS, 0, (17,), (1,)),
    'a tensor that strides out': dense(FLOATS, 0, (2, 2), (100, 1)),
    'a tensor that begins outside': dense(FLOATS, 16, (1,), (1,)),
    'a tensor that begins before': dense(FLOATS, -1, (1,), (1,)),
    'a tensor that goes backwards': dense(FLOATS, 4, (4,), (-1,)),
    'a tensor of too many elements': dense(FLOATS, 0, (2**40, 2**40), (0, 0)),
    'a tensor of too many dimensions': dense(FLOATS, 0, (1,) * 65, (1,) * 65),
    'a storage that claims more': dense(Stored(count=2**40), 0, (2**40,), (1,)),
    'a storage that is not there': dense(Stored(key='7'), 0, (1,), (1,)),
    'a storage by itself': Call(('torch.storage', 'UntypedStorage'), (2**50,)),
    'a tensor by itself': Call(('torch', 'Tensor'), (2**50,)),
    'many zeros': Call(('builtins', 'bytearray'), (2**50,)),
    'a mark that real numbers lack': Call(
        ('torch._utils', '_rebuild_tensor_v2'), (COUNTS, 0, (2,), (1,), False, None, {'conj': True})),
    'sparse indices out of the size': Call(
        ('torch._utils', '_rebuild_sparse_tensor'),
        (SPARSE, (dense(COUNTS, 0, (1, 2), (2, 1)), dense(FLOATS, 0, (2,), (1,)), (1,), False))),
    'sparse indices without end': Call(
        ('torch._utils', '_rebuild_sparse_tensor'),
        (SPARSE, (dense(COUNTS, 0, (1, 2**40), (0, 0)), dense(FLOATS, 0, (2**40,), (0,)), (2,), False))),
    'fewer scales than channels': Call(
        ('torch._utils', '_rebuild_qtensor'),
        (Stored('QInt8Storage', 64), 0, (8, 8), (8, 1),
         (Name(('torch', 'per_channel_affine')), dense(FLOATS, 0, (2,), (1,)), dense(COUNTS, 0, (2,), (1,)), 0))),
    'a nested tensor': Call(
        ('torch._utils', '_rebuild_nested_tensor'),
        (dense(FLOATS, 0, (16,), (1,)), *[dense(COUNTS, 0, (1, 1), (1, 1))] * 2, dense(COUNTS, 0, (1,), (1,)))),
    'a tensor without values': Call(
        ('torch._utils', '_rebuild_wrapper_subclass'),
        (Name(('torch', 'Tensor')), Name(('torch', 'float32')), (2**20,), (1,), 0, None, None, False)),
    'an expanded tensor that is converted': Call(
        ('torch._utils', '_rebuild_device_tensor_from_cpu_tensor'),
        (dense(FLOATS, 0, (2**30,), (0,)), Name(('torch', 'float64')), 'cpu', False)),
    'a key of tuples': hostile.Raw(b'}' + b')' + b'q\x00h\x00\x86' * 60 + b'Ns'),
    'members of tuples': Call(
        ('builtins', 'set'), (hostile.Raw(b'](' + b')' + b'q\x00h\x00\x86' * 60 + b'e'),)),
    'a time out of bounds': Call(('datetime', 'timedelta'), (2**62,)),
}  # fmt: skip


@pytest.mark.parametrize('is_in_place', [False, True])
@pytest.mark.parametrize('crash', CRASHES)
def test_what_would_crash_a_reader_is_refused(crash, is_in_place, tmp_path):
    path = write_torch_file(tmp_path / 'a.pt', {'model': CRASHES[crash]})
    with pytest.raises(InertPickleError):
        load_safely(path, mmap=is_in_place)


@pytest.mark.parametrize(
    'crash', ['a tensor beyond its storage', 'a tensor that strides out', 'a tensor that begins outside']
)
def test_a_tensor_beyond_its_storage_is_refused_before_torch_sees_it(crash, tmp_path):
    with pytest.raises(InertPickleError, match='larger than its storage'):
        load_safely(write_torch_file(tmp_path / 'a.pt', CRASHES[crash]))


def test_random_arguments_of_what_is_allowed_crash_nothing(tmp_path):
    code = f'import hostile_trust as h, pathlib; print(h.fuzz(7, 150, pathlib.Path({str(tmp_path)!r})))'
    own = {**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, (Path(__file__).parent, RECIPE.parent.parent)))}
    done = subprocess.run(
        [sys.executable, '-c', code], env=own, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, (tmp_path / 'number').read_text() + done.stderr
    read, failed = done.stdout.splitlines()[-2:]
    assert failed == '0', done.stdout
    assert int(read.split()[0]) > 30


class TestWhatIsAllowed:
    @pytest.mark.parametrize('is_old', [False, True])
    def test_comes_back_as_torch_would_read_it(self, is_old, tmp_path):
        shared = torch.arange(24.0).reshape(2, 3, 4)
        held = {
            'views': [shared, shared[1:, :, 2], shared.transpose(0, 2), shared],
            'tensors': [
                torch.ones(2, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bool), torch.tensor(3.0),
                torch.zeros(0, 3), torch.ones(1).expand(5), shared.to(torch.complex64).conj(), torch.eye(2).to_sparse(),
                torch.nn.Parameter(torch.ones(2)), torch.quantize_per_tensor(torch.ones(2), 0.1, 3, torch.quint8),
            ],
            'arrays': [np.arange(3), np.asfortranarray(np.ones((2, 3))), np.array(['ab']), np.float64(2), np.zeros(0)],
            'random': np.random.RandomState(0).get_state(),
            'plain': [1, 2**90, -5, 1.5, 1 + 2j, None, True, 'x', b'ab', bytearray(b'ab'), (1, (2,))],
            'sets': [{1}, frozenset({1})],
            'torch': [torch.Size([1]), torch.float16, torch.device('cuda', 1), torch.__version__],
            'modules': torch.nn.BatchNorm1d(2).state_dict(),
        }  # fmt: skip
        torch.save(held, tmp_path / 'a.pt', _use_new_zipfile_serialization=not is_old)
        found = load_safely(tmp_path / 'a.pt')
        assert repr(found) == repr(held)
        assert found['modules']._metadata == held['modules']._metadata  # pyright: ignore[reportAttributeAccessIssue]
        assert found['views'][0].untyped_storage().data_ptr() == found['views'][3].untyped_storage().data_ptr()
        for tensor, true in zip(found['tensors'], held['tensors'], strict=True):
            assert (tensor.dtype, tensor.requires_grad) == (true.dtype, true.requires_grad)

    def test_a_file_without_checksums_is_read_without_comparing_any(self, tmp_path):
        torch.serialization.set_crc32_options(False)
        try:
            torch.save({'weight': torch.arange(4.0)}, tmp_path / 'a.pt')
        finally:
            torch.serialization.set_crc32_options(True)
        for in_place in (False, True):
            assert load_safely(tmp_path / 'a.pt', mmap=in_place)['weight'].tolist() == [0, 1, 2, 3]
        assert read_checkpoint(tmp_path / 'a.pt')['weight'].tolist() == [0, 1, 2, 3]

    def test_bytes_in_another_order_are_turned(self, tmp_path):
        storages = {'0': struct.pack('>4f', 1, 2, 3, 4)}
        path = write_torch_file(tmp_path / 'a.pt', dense(Stored(count=4), 0, (4,), (1,)), storages, order=b'big')
        for is_in_place in (False, True):
            assert load_safely(path, mmap=is_in_place).tolist() == [1, 2, 3, 4]

    def test_a_dictionary_keeps_its_methods(self, tmp_path):
        state = {'items': 3, '_metadata': {'': {'version': 1}}}
        held = load_safely(write_torch_file(tmp_path / 'a.pt', Call(('collections', 'OrderedDict'), (), state)))
        assert list(held.items()) == []
        assert held._metadata == {'': {'version': 1}}

    def test_classes_that_the_user_registers_are_made(self, tmp_path):
        torch.save([Mine(), Settings(a=1)], tmp_path / 'a.pt')
        with pytest.raises(UnknownNamesError):
            load_safely(tmp_path / 'a.pt')
        with torch.serialization.safe_globals([Mine, Settings]):
            mine, settings = load_safely(tmp_path / 'a.pt')
        assert (type(mine), mine.value, type(settings), settings) == (Mine, 3, Settings, {'a': 1})


class Keeps(Callback):
    """A callback of the user's that saves an object of theirs."""

    def state_dict(self) -> dict[str, Any]:
        return {'mine': Mine()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state['mine']


class TestComposer:
    def test_what_its_own_parts_save_loads_safely(self, trainer, tmp_path):
        def parts() -> dict[str, Any]:
            model = toy.make_model()
            return {
                'model': model,
                'algorithms': [BlurPool(), LabelSmoothing(), LayerFreezing(), EMA(half_life='2ba')],
                'callbacks': [SpeedMonitor(), MemoryMonitor(), OptimizerMonitor(), RuntimeEstimator()],
                'optimizers': DecoupledAdamW(model.parameters(), lr=0.01),
                'schedulers': LinearWithWarmupScheduler('1ba'),
                'eval_dataloader': [toy.make_evaluator()],
            }

        whole = trainer(**parts(), max_duration='4ba')
        whole.fit()
        first = trainer(**parts(), max_duration='2ba')
        first.fit()
        path = first.save_checkpoint(str(tmp_path / 'a.pt'))
        with safe_loading():
            second = trainer(**parts(), max_duration='4ba', load_path=path)
        second.fit()
        assert toy.bits(second.state.model) == toy.bits(whole.state.model)

    def test_texts_that_it_would_evaluate_are_not_run(self, trainer, tmp_path):
        run = trainer([EMA(half_life='2ba')], max_duration='1ba')
        run.fit()
        saved = torch.load(run.save_checkpoint(str(tmp_path / 'a.pt')), weights_only=False)
        for text in hostile.texts(tmp_path / 'trap'):
            saved['state']['algorithms'] = [('BlurPool', {'repr': text})]
            torch.save(saved, tmp_path / 'a.pt')
            with safe_loading(), warnings.catch_warnings():
                warnings.simplefilter('ignore')  # that the algorithm cannot be made
                checkpoint.load_checkpoint(str(tmp_path / 'a.pt'), run.state, run.logger)
            assert not (tmp_path / 'trap').exists(), text

    def test_an_algorithm_that_the_model_needs_is_still_added(self, trainer, tmp_path):
        run = trainer([BlurPool(replace_maxpools=False)], max_duration='1ba')
        run.fit()
        path = run.save_checkpoint(str(tmp_path / 'a.pt'))
        with (
            safe_loading(),
            pytest.warns(UserWarning, match='Automatically adding required_on_load algorithm BlurPool'),
        ):
            again = trainer(max_duration='1ba', load_path=path)
        assert repr(again.state.algorithms[-1]) == repr(run.state.algorithms[-1])

    @pytest.mark.parametrize(
        'made', [LowPrecisionLayerNorm, lambda: StochasticDepth('ResNetBottleneck', drop_warmup='0.5dur')]
    )
    def test_an_algorithm_of_an_event_or_a_time_is_made_from_its_text(self, made):
        text = repr(made())
        assert repr(_algorithm(f'algorithms.{text}')) == text

    def test_an_archive_stays_in_its_folder(self, trainer, tmp_path):
        run = trainer()
        path = hostile.tar_that_leaves_its_folder(tmp_path / 'a.tar', f'../../../../..{tmp_path}/trap')
        with safe_loading(), pytest.raises(Exception, match='outside the destination'):
            checkpoint.load_checkpoint(str(path), run.state, run.logger)
        assert not (tmp_path / 'trap').exists()

    def test_everything_is_put_back(self):
        before = torch.load, checkpoint.load_checkpoint, dcp.FileSystemReader.read_metadata
        with safe_loading(), reading_safely():
            assert torch.load is not before[0]
        assert (torch.load, checkpoint.load_checkpoint, dcp.FileSystemReader.read_metadata) == before
        assert not hasattr(sys.modules['composer.core.state'], 'eval')

    def test_a_sharded_checkpoint_is_loaded_as_torch_would(self, tmp_path):
        held = {
            'a': torch.arange(6.0).reshape(2, 3),
            'b': {'c': torch.tensor(3)},
            'n': [('EMA', {'x': 1})],
            'e': torch.ones(0),
        }
        save(held, tmp_path / 'a')
        loaded = {'a': torch.zeros(2, 3), 'b': {'c': torch.tensor(0)}, 'n': None, 'e': torch.ones(0)}
        load_sharded(loaded, tmp_path / 'a')
        assert repr(loaded) == repr(held)


@pytest.fixture(scope='module')
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run with a class of the user's in it."""
    folder = tmp_path_factory.mktemp('run')
    train(recipe(folder, 'first', 'save_interval=1ba'), print, callbacks=[Keeps()])
    return folder / 'first' / 'checkpoints' / 'ep0-ba1-rank0.pt'


def recipe(folder: Path, name: str, *overrides: str) -> schema.Recipe:
    return schema.load(
        RECIPE,
        ['max_duration=1ba', 'eval_interval=0', 'evaluate=[]', f'runs_folder={folder}', f'run_name={name}', *overrides],
    )


class TestRecipe:
    @pytest.mark.parametrize('how', ['load_path', 'autoresume'])
    def test_a_class_that_it_does_not_know_is_refused_with_both_remedies(self, saved, how, tmp_path):
        given = f'load_path={saved}' if how == 'load_path' else 'autoresume=true'
        folder, name = (tmp_path, 'a') if how == 'load_path' else (saved.parents[2], 'first')
        with pytest.raises(RecipeError) as error:
            build.build(recipe(folder, name, given))
        for part in (how, 'the types test_trust.Mine', 'safe_types: [test_trust.Mine]', 'trust_checkpoint: true'):
            assert part in str(error.value)

    def test_safe_types_lets_it_through(self, saved, tmp_path):
        keeps = Keeps()
        run = build.build(
            recipe(tmp_path, 'a', f'load_path={saved}', 'safe_types=[test_trust.Mine]'), callbacks=[keeps]
        )
        run.trainer.close()
        assert keeps.loaded.value == 3

    def test_trust_checkpoint_lets_it_through_and_says_so(self, saved, tmp_path):
        keeps = Keeps()
        with pytest.warns(UserWarning, match=r'trust_checkpoint: .*ep0-ba1-rank0\.pt is unpickled, and can run code'):
            run = build.build(recipe(tmp_path, 'a', f'load_path={saved}', 'trust_checkpoint=true'), callbacks=[keeps])
        run.trainer.close()
        assert keeps.loaded.value == 3

    def test_a_file_that_is_exchanged_after_the_check_runs_nothing(self, saved, tmp_path, monkeypatch):
        path, trap, check = tmp_path / 'a.pt', tmp_path / 'trap', build.check_loaded
        content = load_safely_with_mine(saved)
        torch.save(content, path)
        attack = write_torch_file(tmp_path / 'b.pt', {'state': Call(('os', 'mkdir'), (str(trap),))}).read_bytes()

        def check_and_exchange(*arguments: Any) -> Any:
            found = check(*arguments)
            path.write_bytes(attack)
            return found

        monkeypatch.setattr(build, 'check_loaded', check_and_exchange)
        with pytest.raises(RecipeError, match=r'load_path: .*holds the types os\.mkdir, .*trust_checkpoint: true'):
            build.build(recipe(tmp_path, 'a', f'load_path={path}', 'safe_types=[test_trust.Mine]'))
        assert not trap.exists()

    @pytest.mark.parametrize(
        ('override', 'message'),
        [
            ('trust_checkpoint=perhaps', r'trust_checkpoint: '),
            ('safe_types=test_trust.Mine', r'safe_types: '),
            ('safe_types=[Mine]', r"'Mine' names no module"),
            ('safe_types=[no_such_module.Mine]', r'no_such_module cannot be imported: ModuleNotFoundError'),
            ('safe_types=[test_trust.Nobody]', r"there is no class 'Nobody' in test_trust"),
            ('safe_types=[os.getcwd]', r"there is no class 'getcwd' in os"),
            ('safe_types=[test_trust.EMA]', r'is defined in composer_ema\.trainer\.ema'),
        ],
    )
    def test_what_is_wrong_with_the_keys_is_said(self, override, message, tmp_path):
        with pytest.raises(RecipeError, match=message):
            schema.plan(recipe(tmp_path, 'a', override))

    def test_both_keys_contradict_each_other(self, tmp_path):
        with pytest.raises(RecipeError, match='has no effect beside trust_checkpoint: true'):
            schema.plan(recipe(tmp_path, 'a', 'trust_checkpoint=true', 'safe_types=[test_trust.Mine]'))


def load_safely_with_mine(path: Path) -> Any:
    with torch.serialization.safe_globals([Mine]):
        return load_safely(path)
