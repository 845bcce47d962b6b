"""Reading the average out of checkpoint files, whole or broken, and writing it where nothing can be half written."""

import os
import pickle
import re

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import toy
from composer.models import ComposerClassifier
from torch import nn

from composer_ema import EMA, CheckpointError, EMAOptimizer, export, load_average
from composer_ema.checkpoints import reading
from composer_ema.checkpoints.inspection import describe
from composer_ema.model.inventory import Inventory


def average_of(ema: EMA) -> dict[str, torch.Tensor]:
    return {**dict(ema.ema_model.named_parameters()), **dict(ema.ema_model.named_buffers())}


@pytest.fixture
def saved(trainer, tmp_path):
    """A run of one epoch and its checkpoint."""
    ema = EMA(half_life='2ba')
    run = trainer([ema], max_duration='1ep', run_name='the-run', save_folder=str(tmp_path), save_filename='last.pt')
    run.fit()
    return run, ema, tmp_path / 'last.pt'


class ToBfloat16(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16()


class TestReading:
    def test_the_average_of_a_checkpoint_is_the_average_of_the_run(self, saved):
        run, ema, path = saved
        loaded, average = load_average(path), average_of(ema)
        assert list(loaded) == list(run.state.model.state_dict())
        assert all(torch.equal(tensor, average[name]) for name, tensor in loaded.items())
        assert not torch.equal(loaded['module.0.weight'], run.state.model.module[0].weight)

    def test_it_loads_strictly_into_the_model(self, saved):
        _, ema, path = saved
        model = toy.make_model(seed=9)
        model.load_state_dict(load_average(str(path)), strict=True)
        average = average_of(ema)
        assert all(torch.equal(tensor, average[name]) for name, tensor in Inventory.of(model).tensors().items())

    def test_a_model_to_load_into_is_checked_by_name(self, saved):
        _, _, path = saved
        assert list(load_average(path, toy.make_model())) == list(toy.make_model().state_dict())
        other = ComposerClassifier(nn.Sequential(nn.Linear(2, 2)), num_classes=2)
        with pytest.raises(
            CheckpointError, match=r'module\.0\.weight \(expected \(2, 2\).*Pass the model that was trained'
        ):
            load_average(path, other)

    def test_frozen_parameters_and_unselected_names_come_from_the_model(self, trainer, tmp_path):
        model = toy.make_model()
        model.module[0].requires_grad_(False)
        run = trainer(
            [EMA(half_life='2ba', exclude='running')], model=model, max_duration='1ep',
            save_folder=str(tmp_path), save_filename='last.pt',
        )  # fmt: skip
        run.fit()
        loaded = load_average(tmp_path / 'last.pt')
        live = model.state_dict()
        assert loaded.keys() == live.keys()
        for name in ('module.0.weight', 'module.1.running_mean', 'module.1.running_var'):
            assert torch.equal(loaded[name], live[name])
        assert not torch.equal(loaded['module.5.weight'], live['module.5.weight'])

    def test_tied_weights_get_the_average_under_every_name(self, trainer, tmp_path):
        network = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.Linear(3, 3), nn.Linear(3, 3))
        network[3].weight = network[2].weight
        model = ComposerClassifier(network, num_classes=3)
        ema = EMA(half_life='2ba')
        run = trainer([ema], model=model, max_duration='1ep', save_folder=str(tmp_path), save_filename='last.pt')
        run.fit()
        loaded = load_average(tmp_path / 'last.pt')
        assert torch.equal(loaded['module.3.weight'], average_of(ema)['module.2.weight'])
        assert torch.equal(loaded['module.2.weight'], loaded['module.3.weight'])
        twin = ComposerClassifier(
            nn.Sequential(nn.Flatten(), *(nn.Linear(*s) for s in ((36, 3), (3, 3), (3, 3)))), num_classes=3
        )
        twin.load_state_dict(loaded, strict=True)

    def test_a_bfloat16_model_gives_a_float32_average(self, trainer, tmp_path):
        model = ComposerClassifier(
            nn.Sequential(ToBfloat16(), nn.Flatten(), nn.Linear(36, 3).bfloat16()), num_classes=3
        )
        run = trainer([EMA(half_life='2ba')], model=model, max_duration='1ep', save_folder=str(tmp_path),
                      save_filename='last.pt')  # fmt: skip
        run.fit()
        assert load_average(tmp_path / 'last.pt')['module.2.weight'].dtype == torch.float32

    def test_a_compiled_run_gives_the_users_names(self, trainer, tmp_path):
        model = toy.make_model()
        names = list(model.state_dict())
        model.module = torch.compile(model.module, backend='eager')
        run = trainer([EMA(half_life='1ba')], model=model, max_duration='1ba', save_folder=str(tmp_path),
                      save_interval='1ba', save_filename='last.pt')  # fmt: skip
        run.fit()
        assert list(load_average(tmp_path / 'last.pt')) == names

    def test_a_checkpoint_taken_while_swapped_gives_the_average_too(self, trainer, tmp_path):
        ema = EMA(half_life='2ba')
        run = trainer([ema], max_duration='1ep')
        run.fit()
        average = {name: tensor.clone() for name, tensor in average_of(ema).items()}
        ema.get_ema_model(run.state.model)
        path = run.save_checkpoint(str(tmp_path / 'swapped.pt'))
        assert 'training_weights' not in dict(torch.load(path, weights_only=False)['state']['algorithms'])['EMA']
        loaded = load_average(path)
        assert all(torch.equal(tensor, average[name]) for name, tensor in loaded.items())


class TestRefusing:
    """Every file that is no good gives one error, which names the file and says why."""

    @staticmethod
    def refused(path, message):
        with pytest.raises(CheckpointError, match=message) as error:
            load_average(path)
        assert str(path) in str(error.value)
        with pytest.raises(CheckpointError, match=message):
            export(path, path.parent / 'out.safetensors')
        assert not (path.parent / 'out.safetensors').exists()
        return str(error.value)

    def test_the_error_is_a_value_error(self):
        assert issubclass(CheckpointError, ValueError)

    def test_a_missing_file(self, tmp_path):
        self.refused(tmp_path / 'none.pt', 'does not exist')

    def test_a_folder(self, tmp_path):
        (tmp_path / 'ep1').mkdir()
        self.refused(tmp_path / 'ep1', r'is a folder.*pass a \.pt file')

    @pytest.mark.skipif(hasattr(os, 'geteuid') and os.geteuid() == 0, reason='root may read everything')
    def test_a_file_that_may_not_be_read(self, tmp_path):
        (tmp_path / 'shut.pt').write_bytes(b'')
        (tmp_path / 'shut.pt').chmod(0)
        self.refused(tmp_path / 'shut.pt', 'Permission denied')

    @pytest.mark.parametrize(
        'content',
        [b'', b'hello', b'PK\x03\x04', b'\x80\x02}q\x00.', bytes(1000)],
        ids=['empty', 'text', 'zip head', 'pickle', 'zeros'],
    )
    def test_what_is_no_torch_file(self, tmp_path, content):
        (tmp_path / 'odd.pt').write_bytes(content)
        self.refused(tmp_path / 'odd.pt', r'cannot be read|holds no average that can be read')

    @pytest.mark.parametrize('content', [{'model': {}}, [1, 2], torch.zeros(3), 5, {'state': None}, {'state': []}])
    def test_a_torch_file_of_another_kind(self, tmp_path, content):
        torch.save(content, tmp_path / 'other.pt')
        self.refused(
            tmp_path / 'other.pt',
            r'holds no average that can be read: (there is no average of a known kind|a saved average is a)',
        )

    @pytest.mark.parametrize('share', [0.1, 0.5, 0.9, 0.99])
    def test_a_truncated_file(self, saved, share):
        path = saved[2]
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        self.refused(path, 'cannot be read: it is truncated, damaged, or no torch file')

    def test_a_flipped_byte_is_an_error_or_harmless(self, saved):
        path = saved[2]
        content, names = path.read_bytes(), list(load_average(path))
        for position in range(0, len(content), max(1, len(content) // 60)):
            path.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
            try:
                loaded = load_average(path)
            except CheckpointError:
                continue
            assert list(loaded) == names

    def test_a_pickle_that_would_run_code_is_refused_and_not_run(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / 'executed'),)

        for number, bomb in enumerate(({'state': {'model': {}, 'algorithms': [('EMA', Bomb())]}}, Bomb())):
            path = tmp_path / f'{number}.pt'
            torch.save(bomb, path)
            message = self.refused(path, 'could run code when loaded')
            assert 'mkdir' in message
        (tmp_path / 'raw.pt').write_bytes(pickle.dumps(Bomb()))
        self.refused(tmp_path / 'raw.pt', 'cannot be read')
        assert not (tmp_path / 'executed').exists()

    def test_the_safe_types_are_forgotten_again(self, saved):
        before = torch.serialization.get_safe_globals()
        load_average(saved[2])
        assert set(torch.serialization.get_safe_globals()) == set(before)

    def test_a_run_without_an_average(self, trainer, tmp_path):
        run = trainer([], max_duration='1ba')
        run.fit()
        message = self.refused(
            type(tmp_path)(run.save_checkpoint(str(tmp_path / 'plain.pt'))), r'holds no average: .* no algorithms'
        )
        assert 'algorithms=[EMA()] or [SWA()]' in message

    def test_weights_only(self, trainer, tmp_path):
        run = trainer([EMA(half_life='1ba')], max_duration='1ba')
        run.fit()
        path = tmp_path / 'weights.pt'
        run.save_checkpoint(str(path), weights_only=True)
        assert 'without save_weights_only' in self.refused(path, 'holds no average')

    def test_an_average_that_has_not_started(self, trainer, tmp_path):
        run = trainer(
            [EMA(half_life='1ba', ema_start='3ba')], max_duration='4ba',
            save_folder=str(tmp_path), save_interval='1ba', save_filename='ba{batch}.pt',
        )  # fmt: skip
        run.fit()
        path = tmp_path / 'ba2.pt'
        self.refused(path, 'holds no average yet: ema_start had not come')

    @pytest.mark.parametrize(
        ('damage', 'message'),
        [
            (lambda s: s.pop('model'), "its 'model' is a NoneType"),
            (lambda s: s.update(model=[]), "its 'model' is a list"),
            (lambda s: dict(s['algorithms'])['EMA'].update(version=7), 'format version 7'),
            (lambda s: dict(s['algorithms'])['EMA'].update(averages=3), "'averages' .*is a int"),
            (lambda s: dict(s['algorithms'])['EMA'].update(averages={'ema': {}}), "'num_updates' .*is None"),
            (lambda s: dict(s['algorithms'])['EMA'].update(averages={'ema': None}), 'is a NoneType'),
            (lambda s: s.update(algorithms=3), 'int'),
            (lambda s: s.update(algorithms=[('EMA', None)]), 'NoneType'),
            (lambda s: dict(s['algorithms'])['EMA']['averages']['ema'].update(aliases=None), 'NoneType'),
            (lambda s: s.update(timestamp=[3]), "its 'timestamp' is a list"),
            (lambda s: s.update(timestamp=torch.zeros(2)), "its 'timestamp' is a Tensor"),
            (lambda s: s['timestamp'].update(Timestamp=torch.zeros(2)), "its 'Timestamp' is a Tensor"),
            (lambda s: s['timestamp']['Timestamp'].update(batch=torch.zeros(2)), "'batch' of its 'timestamp' is a Ten"),
            (lambda s: s.update(run_name=torch.zeros(2)), "its 'run_name' is a Tensor"),
            (lambda s: s.update(algorithms=torch.zeros(2)), "its 'algorithms' is a Tensor"),
            (lambda s: s['model'].update({'module.0.extra': torch.zeros(2, device='meta')}), 'extra in the file are o'),
            (lambda s: dict(s['algorithms'])['EMA'].update(config=3), None),
            (lambda s: dict(s['algorithms'])['EMA']['config'].update(half_life=torch.zeros(2)), "'half_life' to a T"),
            (
                lambda s: dict(s['algorithms'])['EMA']['averages']['ema'].update(last_update={'ba': torch.zeros(2)}),
                "'last_update' of .* is a dict, not numbers by unit",
            ),
        ],
        ids=[
            'no model', 'model a list', 'newer', 'averages a number', 'average empty', 'average none',
            'algorithms a number', 'state none', 'aliases none', 'timestamp a list', 'timestamp a tensor',
            'times a tensor', 'count a tensor', 'name a tensor', 'algorithms a tensor', 'model on meta',
            'config a number', 'config with a tensor', 'clock with a tensor',
        ],
    )  # fmt: skip
    def test_a_damaged_inside(self, saved, damage, message):
        path = saved[2]
        content = torch.load(path, weights_only=False)
        damage(content['state'])
        torch.save(content, path)
        if message is None:  # what is only told in the metadata may be missing
            try:
                load_average(path)
            except CheckpointError as error:
                assert str(path) in str(error)  # noqa: PT017
        else:
            self.refused(path, message)


class TestExport:
    def test_the_file_holds_what_load_average_reads(self, saved, tmp_path):
        out = tmp_path / 'deep' / 'er' / 'average.safetensors'
        export(saved[2], out)
        written, loaded = safetensors.torch.load_file(out), load_average(saved[2])
        assert written.keys() == loaded.keys()
        assert all(torch.equal(written[name], loaded[name]) for name in loaded)
        assert (out.stat().st_mode & 0o777) == 0o644
        toy.make_model().load_state_dict(written, strict=True)

    def test_the_metadata_says_which_run_which_horizon_and_how_many_updates(self, saved, tmp_path):
        metadata = export(saved[2], tmp_path / 'average.safetensors')
        with safetensors.safe_open(tmp_path / 'average.safetensors', framework='pt') as file:
            assert file.metadata() == {**metadata, 'crc32': file.metadata()['crc32']}
        assert metadata['run_name'] == 'the-run'
        assert metadata['half_life'] == '2ba'
        assert metadata['num_updates'] == str(toy.EPOCH)
        assert metadata['trained_batch'] == str(toy.EPOCH)
        assert metadata['trained_epoch'] == '1'
        assert metadata['checkpoint'] == 'last.pt'
        assert re.fullmatch(r'composer_ema \S+', metadata['written_by'])
        assert all(isinstance(value, str) for value in metadata.values())

    def test_a_place_that_cannot_be_written_is_said(self, saved, tmp_path):
        folder = tmp_path / 'out'
        folder.mkdir()
        (folder / 'a file').write_text('text')
        for out in (folder, folder / 'a file' / 'average.safetensors'):
            with pytest.raises(CheckpointError, match='cannot be written'):
                export(saved[2], out)
        assert [path.name for path in folder.iterdir()] == ['a file']
        assert not list(tmp_path.glob('.out*'))

    def test_the_extra_state_of_modules_is_left_out_and_named(self, trainer, tmp_path):
        class Remembers(nn.Identity):
            def get_extra_state(self):
                return {'seen': 3}

            def set_extra_state(self, state):
                pass

        model = toy.make_model()
        model.module.append(Remembers())
        run = trainer([EMA('1ba')], model=model, max_duration='1ba', save_folder=str(tmp_path), save_interval='1ba',
                      save_filename='last.pt')  # fmt: skip
        run.fit()
        metadata = export(tmp_path / 'last.pt', tmp_path / 'average.safetensors')
        assert metadata['left_out'].endswith('_extra_state')
        model.load_state_dict(load_average(tmp_path / 'last.pt'))

    def test_tied_weights_are_written_under_every_name(self, trainer, tmp_path):
        network = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.Linear(3, 3), nn.Linear(3, 3))
        network[3].weight = network[2].weight
        model = ComposerClassifier(network, num_classes=3)
        run = trainer([EMA(half_life='1ba')], model=model, max_duration='1ba', save_folder=str(tmp_path),
                      save_interval='1ba', save_filename='last.pt')  # fmt: skip
        run.fit()
        export(tmp_path / 'last.pt', tmp_path / 'out.safetensors')
        written = safetensors.torch.load_file(tmp_path / 'out.safetensors')
        assert torch.equal(written['module.2.weight'], written['module.3.weight'])

    @pytest.mark.parametrize('layout', ['transposed', 'channels_last'])
    def test_tensors_of_any_layout_are_written(self, saved, tmp_path, layout):
        path = saved[2]
        content = torch.load(path, weights_only=False)
        parameters = dict(content['state']['algorithms'])['EMA']['averages']['ema']['parameters']
        name = 'module.5.weight' if layout == 'transposed' else 'module.0.weight'
        tensor = parameters[name]
        odd = tensor.t().contiguous().t() if layout == 'transposed' else tensor.to(memory_format=torch.channels_last)
        parameters[name] = odd
        torch.save(content, path)
        export(path, tmp_path / 'out.safetensors')
        assert torch.equal(safetensors.torch.load_file(tmp_path / 'out.safetensors')[name], tensor)

    @pytest.mark.parametrize('moment', ['while writing', 'before renaming'])
    def test_killed_in_the_middle_the_old_file_stays_and_nothing_else(self, saved, tmp_path, monkeypatch, moment):
        out = tmp_path / 'exports' / 'average.safetensors'
        out.parent.mkdir()
        out.write_bytes(b'the old file')

        def killed(*arguments, **_):
            if moment == 'while writing':
                with open(arguments[1], 'wb') as file:
                    file.write(b'half of')
            raise KeyboardInterrupt

        if moment == 'while writing':
            monkeypatch.setattr(safetensors.torch, 'save_file', killed)
        else:
            monkeypatch.setattr(os, 'replace', killed)
        with pytest.raises(KeyboardInterrupt):
            export(saved[2], out)
        assert out.read_bytes() == b'the old file'
        assert os.listdir(out.parent) == ['average.safetensors']

    def test_what_safetensors_cannot_hold_is_said_and_the_old_file_stays(self, saved, tmp_path, monkeypatch):
        out = tmp_path / 'average.safetensors'
        out.write_bytes(b'the old file')

        def refuses(*_, **__):
            raise ValueError('no such dtype')

        monkeypatch.setattr(safetensors.torch, 'save_file', refuses)
        with pytest.raises(CheckpointError, match='cannot be written as safetensors: no such dtype'):
            export(saved[2], out)
        assert out.read_bytes() == b'the old file'

    def test_complex_weights_are_written_or_refused_by_name(self, saved, tmp_path):
        path = saved[2]
        content = torch.load(path, weights_only=False)
        content['state']['model']['module.phase'] = torch.zeros(2, dtype=torch.complex64)
        torch.save(content, path)
        try:
            export(path, tmp_path / 'out.safetensors')
        except CheckpointError as error:
            assert 'safetensors' in str(error)  # noqa: PT017
            assert not (tmp_path / 'out.safetensors').exists()


def test_numpy_scalars_and_times_of_composers_checkpoints_are_read(saved):
    path = saved[2]
    content = torch.load(path, weights_only=False)
    content['state']['numpy'] = [np.float64(1.5), np.bool_(True), np.arange(3), np.int64(3)]
    torch.save(content, path)
    assert reading.read_file(path)['state']['numpy'][0] == 1.5
    load_average(path)


class TestOutermostModule:
    """A checkpoint of a ComposerModel fits the network in it, and the other way round."""

    @pytest.fixture
    def network(self):
        return toy.make_model(seed=9).module

    def test_a_checkpoint_of_composer_fits_the_bare_network(self, saved, network):
        _, ema, path = saved
        loaded, average = load_average(path, network), average_of(ema)
        assert list(loaded) == list(network.state_dict())
        assert all(torch.equal(tensor, average[f'module.{name}']) for name, tensor in loaded.items())
        network.load_state_dict(loaded, strict=True)

    @pytest.mark.parametrize('theirs', ['module', 'model', 'body'])
    @pytest.mark.parametrize('ours', ['', 'module', 'model', 'body'])
    def test_whatever_either_calls_it(self, saved, network, tmp_path, theirs, ours):
        content = torch.load(saved[2], weights_only=False)

        def renamed(tensors):
            return {f'{theirs}.{name.removeprefix("module.")}': tensor for name, tensor in tensors.items()}

        state = content['state']
        average = dict(state['algorithms'])['EMA']['averages']['ema']
        state['model'] = renamed(state['model'])
        average.update(parameters=renamed(average['parameters']), buffers=renamed(average['buffers']))
        torch.save(content, tmp_path / 'theirs.pt')
        model = nn.ModuleDict({ours: network}) if ours else network
        loaded, expected = load_average(tmp_path / 'theirs.pt', model), load_average(saved[2], network)
        assert list(loaded) == list(model.state_dict())
        assert all(map(torch.equal, loaded.values(), expected.values()))

    def test_a_file_of_a_network_fits_a_composer_model(self, saved, tmp_path):
        export(saved[2], tmp_path / 'bare.pt', strip_prefix='auto')
        assert load_average(tmp_path / 'bare.pt').keys() == toy.make_model().module.state_dict().keys()
        loaded = load_average(tmp_path / 'bare.pt', toy.make_model())
        assert all(map(torch.equal, loaded.values(), load_average(saved[2]).values()))
        assert list(loaded) == list(toy.make_model().state_dict())

    def test_another_network_is_still_refused_by_name(self, saved):
        with pytest.raises(CheckpointError, match='unexpected: '):
            load_average(saved[2], nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))

    def test_what_lies_beside_the_module_is_all_that_an_error_names(self, saved, network):
        content = torch.load(saved[2], weights_only=False)
        content['state']['model']['loss.weight'] = torch.ones(3)
        torch.save(content, saved[2])
        with pytest.raises(CheckpointError, match=r'does not fit the model\. 1 unexpected: loss\.weight\.'):
            load_average(saved[2], network)

    @pytest.mark.parametrize('prefix', ['auto', 'module', 'module.'])
    @pytest.mark.parametrize('name', ['out.pt', 'out.safetensors'])
    def test_export_takes_the_module_off(self, saved, network, tmp_path, prefix, name):
        export(saved[2], tmp_path / name, strip_prefix=prefix)
        network.load_state_dict(load_average(tmp_path / name), strict=True)

    @pytest.mark.parametrize(
        ('names', 'prefix', 'message'),
        [
            (['a.x', 'a.y'], 'b', r"strip_prefix='b' applies to no name in .*, which holds a\.x, a\.y"),
            (['a.x', 'b.x'], 'auto', r'but those of .* begin with a, b\. Pass one'),
            (['x', 'y'], 'auto', r'begin with x, y\. Pass one'),
            (['a.x', 'x'], 'a', r'would make two names one in .*: x with a\.x'),
            (['a.x'], 'a.x', 'applies to no name'),
        ],
    )
    def test_a_prefix_that_does_not_apply_is_refused_by_name(self, tmp_path, names, prefix, message):
        torch.save({'ema': {name: torch.zeros(1) for name in names}}, tmp_path / 'a.pt')
        with pytest.raises(CheckpointError, match=message):
            export(tmp_path / 'a.pt', tmp_path / 'out.pt', key='ema', strip_prefix=prefix)
        assert not (tmp_path / 'out.pt').exists()

    def test_names_outside_of_the_module_stay_with_a_warning(self, tmp_path):
        torch.save({'ema': {'a.x': torch.zeros(1), 'loss.w': torch.zeros(1)}}, tmp_path / 'a.pt')
        with pytest.warns(UserWarning, match=r'1 names do not begin with a\. and stay as they are: loss\.w'):
            export(tmp_path / 'a.pt', tmp_path / 'out.pt', key='ema', strip_prefix='a')
        assert list(torch.load(tmp_path / 'out.pt', weights_only=True)) == ['x', 'loss.w']


class TestSparse:
    @pytest.fixture(params=['sparse_coo', 'sparse_csr'])
    def sparse(self, request, saved):
        """A checkpoint whose model has a sparse buffer, and what that is."""
        dense = torch.eye(3)
        tensor = dense.to_sparse() if request.param == 'sparse_coo' else dense.to_sparse_csr()
        content = torch.load(saved[2], weights_only=False)
        content['state']['model']['module.adjacency'] = tensor
        torch.save(content, saved[2])
        return saved[2], tensor

    def test_buffers_are_read_and_written_by_torch(self, sparse, tmp_path):
        path, tensor = sparse
        export(path, tmp_path / 'out.pt')
        for file in (path, tmp_path / 'out.pt'):
            loaded = load_average(file)['module.adjacency']
            assert loaded.layout == tensor.layout
            assert torch.equal(loaded.to_dense(), torch.eye(3))

    def test_buffers_are_named_where_safetensors_cannot_hold_them(self, sparse, tmp_path):
        path, tensor = sparse
        layout = str(tensor.layout).removeprefix('torch.')
        with pytest.raises(CheckpointError, match=rf'module\.adjacency \({layout}\).*Write a file that ends in \.pt'):
            export(path, tmp_path / 'out.safetensors')
        assert not (tmp_path / 'out.safetensors').exists()

    def test_copies_in_the_average_are_read_too(self, sparse):
        path, tensor = sparse
        content = torch.load(path, weights_only=False)
        dict(content['state']['algorithms'])['EMA']['averages']['ema']['buffers']['module.adjacency'] = tensor
        torch.save(content, path)
        assert torch.equal(load_average(path)['module.adjacency'].to_dense(), torch.eye(3))


class TestFolders:
    @pytest.mark.parametrize(
        ('files', 'advice'),
        [
            (['checkpoints/latest-rank0.pt', 'checkpoints/ep1.pt'], r'Pass .*run/checkpoints/latest-rank0\.pt'),
            (['latest-rank0.pt', 'ep1-ba2-rank0.pt'], r'Pass the checkpoint in it: .*run/latest-rank0\.pt'),
            (['checkpoints/ep1.pt'], r'Pass one checkpoint of those in it, such as .*run/checkpoints/ep1\.pt'),
            (['last.ckpt', 'notes.txt'], r'such as .*run/last\.ckpt'),
            (['checkpoints/ep1/.metadata'], r'Pass one of the sharded checkpoints in it, such as .*checkpoints/ep1'),
            (['notes.txt'], r'It holds no checkpoint: pass a \.pt file, or the folder of a sharded checkpoint'),
        ],
    )  # fmt: skip
    def test_a_folder_is_refused_with_the_file_to_pass(self, tmp_path, files, advice):
        for file in files:
            path = tmp_path / 'run' / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        for call in (load_average, describe, lambda path: export(path, tmp_path / 'out.pt')):
            with pytest.raises(CheckpointError, match=rf'run is a folder\. .*{advice}'):
                call(tmp_path / 'run')

    def test_the_file_is_the_one_that_composer_writes(self, trainer, tmp_path):
        folder = tmp_path / 'run'
        trainer([EMA('1ba')], max_duration='1ba', save_folder=str(folder / 'checkpoints'), save_interval='1ba').fit()
        with pytest.raises(CheckpointError) as error:
            load_average(folder)
        load_average(str(error.value).rpartition(': ')[2].removesuffix('.'))


class TestAverageOfAnOptimizer:
    def test_in_a_checkpoint_of_composer_is_found(self, trainer, tmp_path):
        """Composer's own checkpoints keep only an optimizer's state and groups, so a script has to add it."""
        run = trainer([], max_duration='1ba')
        run.fit()
        path = tmp_path / 'a.pt'
        run.save_checkpoint(str(path))
        content = torch.load(path, weights_only=False)
        model = toy.make_model(seed=3)
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
        model.module(torch.randn(4, 1, 6, 6)).sum().backward()
        optimizer.step()
        content['state']['optimizers'] = {'EMAOptimizer': optimizer.state_dict()}
        torch.save(content, path)
        with optimizer.swap_ema_weights():
            expected = model.state_dict()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in load_average(path).items())
        assert describe(path).averages[0].key == 'state.optimizers.EMAOptimizer.ema'
