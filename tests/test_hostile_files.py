"""Files that are damaged, absurd or no files: an error in words, or the right answer, in bounded time and memory."""

from __future__ import annotations

import codecs
import functools
import json
import os
import socket
import struct
import zipfile
from pathlib import Path
from random import Random
from typing import ClassVar

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hostile_doors import run
from hostile_files import ABSURD, averaged_model, damaged, mutated, of_composer, repacked, same, sound_files
from safetensors.torch import load_file
from torch import nn

from composer_ema import CheckpointError, export, load_average, merge, read_checkpoint
from composer_ema.checkpoints.inspection import describe
from composer_ema.checkpoints.lazy import open_weights
from composer_ema.pictures.curves import RunCurves, read_run
from composer_ema.pictures.errors import PlotError
from composer_ema.pictures.runs import draw_runs
from composer_ema.pictures.writing import write
from composer_ema.posthoc.reconstruct import Reconstruction


@pytest.fixture(scope='module')
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return sound_files(tmp_path_factory.mktemp('sound'))


def fails_everywhere(path: Path, match: str) -> None:
    """Every door that takes one file says the same, and writes nothing."""
    before = sorted(path.parent.iterdir()) if path.parent.exists() else []
    out = path.with_name('never-written.safetensors')
    for door in (load_average, describe, read_checkpoint, open_weights, lambda path: export(path, out)):
        with pytest.raises(CheckpointError, match=match):
            door(path)
    with pytest.raises(CheckpointError, match=match):
        merge([path, path.with_name('other.pt')], out, equal=True)
    assert (sorted(path.parent.iterdir()) if path.parent.exists() else []) == before


class TestReadCheckpoint:
    @pytest.mark.parametrize('name', ['script', 'optimizer', 'shadow', 'composer', 'export', 'export_of_torch'])
    def test_returns_what_torch_or_safetensors_would(self, sound, name):
        read = load_file if name == 'export' else functools.partial(torch.load, weights_only=True)
        assert same(dict(sorted(read_checkpoint(sound[name]).items())), dict(sorted(read(sound[name]).items())))

    def test_resumes_model_and_optimizer(self, sound):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        model.load_state_dict(read_checkpoint(str(sound['script']))['model'])
        assert same(dict(model.state_dict()), dict(torch.load(sound['script'])['model']))

    def test_reads_a_sharded_folder_as_plain_values(self, tmp_path):
        held = {'model': {'a': torch.arange(6.0).reshape(2, 3)}, 'list': [{'b': torch.ones(2)}], 'step': 3}
        dcp.save(held, checkpoint_id=tmp_path / 'folder', no_dist=True)
        found = read_checkpoint(tmp_path / 'folder')
        assert same(found, held)
        assert type(found['model']['a']) is torch.Tensor

    def test_of_what_is_no_path_says_so(self):
        with pytest.raises(TypeError, match='checkpoint must be the path of a file'):
            read_checkpoint(3)  # pyright: ignore[reportArgumentType]: what is tested


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('name', ['script', 'composer', 'export', 'export_of_torch'])
def test_a_changed_byte_is_noticed(sound, name, seed, tmp_path):
    random, content, truth = Random(seed), sound[name].read_bytes(), read_checkpoint(sound[name])
    for _ in range(12):
        path = tmp_path / sound[name].name
        path.write_bytes(damaged(content, random))
        try:
            found = read_checkpoint(path)
        except CheckpointError:
            continue
        assert same(found, truth)  # what nothing depends on, such as the time in a zip


@pytest.mark.parametrize('name', ['script', 'optimizer', 'shadow', 'composer', 'export', 'export_of_torch'])
def test_a_changed_weight_is_damage_to_every_door(sound, name, tmp_path):
    content = bytearray(sound[name].read_bytes())
    if name == 'export':
        at = len(content) - 1
    else:
        with zipfile.ZipFile(sound[name]) as archive:
            [part] = [part for part in archive.infolist() if part.filename.endswith('/data/0')]
        at = part.header_offset + 30 + sum(struct.unpack_from('<HH', content, part.header_offset + 26))
    content[at] ^= 1
    (tmp_path / sound[name].name).write_bytes(content)
    fails_everywhere(tmp_path / sound[name].name, 'it is damaged, (its|the) checksum')


class TestClaims:
    def test_a_file_that_claims_more_than_it_has_is_refused(self, tmp_path):
        views = torch.zeros(2**20).unfold(0, 2**19, 2**10)
        for name, weights in (
            ('expanded', {'a': torch.zeros(1).expand(10**6, 10**6)}),
            ('views', {str(i): views[i % len(views)] for i in range(400)}),
        ):
            torch.save(weights, tmp_path / f'{name}.pt')
            fails_everywhere(tmp_path / f'{name}.pt', r'has [\d,]+ bytes and its tensors would take [\d,]+')

    def test_an_expanded_mask_and_tied_weights_are_read(self, tmp_path):
        weight = torch.randn(4, 4)
        weights = {'mask': torch.ones(1, 1, 64).expand(32, 64, 64), **{f'layer{i}': weight for i in range(100)}}
        torch.save(weights, tmp_path / 'a.pt')
        assert same(read_checkpoint(tmp_path / 'a.pt'), weights)

    @pytest.mark.parametrize('count', [5, 2**28, 2**62, -4])
    def test_a_storage_that_is_larger_than_its_record_is_refused(self, tmp_path, count):
        torch.save({'a': torch.zeros(4)}, tmp_path / 'small.pt')
        numel = b'\x8a\x08' + struct.pack('<q', count)  # torch up to 2.7 would read the memory behind it

        def enlarge(name: str, content: bytes) -> bytes:
            return content.replace(b'K\x04tq', numel + b'tq', 1) if name.endswith('data.pkl') else content

        path = repacked(tmp_path / 'small.pt', tmp_path / 'large.pt', enlarge)
        fails_everywhere(path, 'storage 0 claims .* bytes, and 16 lie in the file|cannot be read')

    def test_a_zip_that_is_compressed_overlaps_itself_or_names_a_part_twice_is_refused(self, tmp_path):
        torch.save({'a': torch.zeros(2**20)}, tmp_path / 'a.pt')
        path = repacked(tmp_path / 'a.pt', tmp_path / 'b.pt', lambda _, content: content, zipfile.ZIP_DEFLATED)
        fails_everywhere(path, 'compressed inside, which torch.save never does')
        with zipfile.ZipFile(tmp_path / 'a.pt', 'a') as archive, pytest.warns(UserWarning, match='Duplicate name'):
            archive.writestr('a/data.pkl', b'\x80\x02}.')
        fails_everywhere(tmp_path / 'a.pt', 'no zip that torch.save wrote')


class TestNoFiles:
    def test_what_would_be_waited_for_is_refused_at_once(self, tmp_path):
        os.mkfifo(tmp_path / 'pipe.pt')
        (tmp_path / 'zero.pt').symlink_to('/dev/zero')
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / 'socket.pt'))
        for name, kind in (('pipe', 'a pipe'), ('zero', 'a device'), ('socket', 'a socket')):
            fails_everywhere(tmp_path / f'{name}.pt', f'is no file but {kind}, and is not read')

    def test_a_path_that_no_file_can_have_is_refused_in_words(self, tmp_path):
        (tmp_path / 'circle.pt').symlink_to(tmp_path / 'circle.pt')
        (tmp_path / 'dangling.pt').symlink_to('nowhere.pt')
        fails_everywhere(tmp_path / f'{"a" * 400}.pt', 'File name too long')
        fails_everywhere(tmp_path / 'a\0b.pt', r'a\\x00b.pt.* is the name of no file')
        fails_everywhere(tmp_path / 'circle.pt', 'Too many levels of symbolic links')
        fails_everywhere(tmp_path / 'dangling.pt', "is a link to 'nowhere.pt', which is not there")
        fails_everywhere(tmp_path / 'missing' / 'a.pt', 'does not exist')

    @pytest.mark.parametrize('suffix', ['.pt', '.safetensors', ''])
    def test_an_empty_file_and_one_of_text_are_refused(self, tmp_path, suffix):
        for name, content in (('empty', b''), ('text', b'hello\n'), ('zip', b'PK\x03\x04'), ('pickle', b'\x80\x02.')):
            (tmp_path / f'{name}{suffix}').write_bytes(content)
            fails_everywhere(tmp_path / f'{name}{suffix}', 'cannot be read')


@pytest.fixture(scope='module')
def states() -> dict[str, dict]:
    """What is in sound files, by kind."""
    model, optimizer = averaged_model()
    script = {'model': dict(model.state_dict()), 'optimizer': optimizer.state_dict()}
    return {'composer': of_composer(model, optimizer), 'script': script, 'shadow': optimizer.shadow.state_dict()}


class TestAbsurdContents:
    @pytest.mark.filterwarnings('ignore')
    @pytest.mark.parametrize('seed', range(4))
    def test_something_absurd_anywhere_is_read_or_refused_in_words(self, states, seed, tmp_path):
        for number in range(10):
            random = Random(1000 * seed + number)
            held, _ = mutated(states[random.choice(list(states))], random)
            torch.save(held, tmp_path / 'a.pt')
            for door in random.sample([load_average, describe, read_checkpoint, open_weights], 2):
                try:
                    door(tmp_path / 'a.pt')
                except CheckpointError:
                    continue
                # No other error is caught.

    @pytest.mark.parametrize('kind', ['nested', 'sparse', 'sparse rows', 'huge sparse', 'meta'])
    @pytest.mark.filterwarnings('ignore')
    def test_a_tensor_that_is_not_dense_is_not_merged(self, tmp_path, kind):
        for name in ('a', 'b'):
            torch.save({'model': {'w': ABSURD[kind](), 'b': torch.ones(2)}}, tmp_path / f'{name}.pt')
        with pytest.raises(CheckpointError, match=r'\bw\b.*(dense|meta)|holds nested tensors, which'):
            merge([tmp_path / 'a.pt', tmp_path / 'b.pt'], tmp_path / 'c.pt', equal=True)
        assert not (tmp_path / 'c.pt').exists()

    def test_an_algorithm_that_is_a_huge_sparse_tensor_is_not_iterated(self, states, tmp_path):
        state = states['composer']['state'] | {'algorithms': [ABSURD['huge sparse']()]}
        torch.save({'state': state}, tmp_path / 'a.pt')
        with pytest.raises(CheckpointError, match="'algorithms' is no list of pairs"):
            describe(tmp_path / 'a.pt')

    def test_a_setting_that_would_be_a_billion_numbers_is_refused(self, states, tmp_path):
        optimizer = states['script']['optimizer']
        own = optimizer['ema'] | {'settings': optimizer['ema']['settings'] | {'warmup': ABSURD['shared lists']()}}
        torch.save(optimizer | {'ema': own}, tmp_path / 'a.pt')
        with pytest.raises(CheckpointError, match="maps 'warmup' to a list"):
            describe(tmp_path / 'a.pt')


class TestInputsAreNeverReplaced:
    @pytest.fixture(name='run')
    def run_folder(self, sound, tmp_path) -> Path:
        """The folder of a run, by hand: two checkpoints, the link to the newest, and what else a run leaves."""
        checkpoints = tmp_path / 'run' / 'checkpoints'
        checkpoints.mkdir(parents=True)
        for name in ('ep1.pt', 'ep2.pt'):
            (checkpoints / name).write_bytes(sound['composer'].read_bytes())
        (checkpoints / 'latest-rank0.pt').symlink_to('ep2.pt')
        for name in ('metrics.jsonl', 'recipe.yaml', 'sweep.jsonl', 'averages-00000010.safetensors'):
            (tmp_path / 'run' / name).write_text('{}\n')
        os.link(checkpoints / 'ep1.pt', tmp_path / 'hard.pt')
        (tmp_path / 'soft.pt').symlink_to(checkpoints / 'ep1.pt')
        (tmp_path / 'elsewhere').symlink_to(checkpoints)
        return tmp_path / 'run'

    @pytest.mark.parametrize(
        'out',
        [
            'run/checkpoints/ep1.pt', 'run/checkpoints/../checkpoints/ep1.pt', 'hard.pt', 'soft.pt', 'elsewhere/ep1.pt',
            'run/checkpoints/ep2.pt', 'run/checkpoints/latest-rank0.pt', 'run/metrics.jsonl', 'run/recipe.yaml',
            'run/sweep.jsonl', 'run/averages-00000010.safetensors',
        ],
    )  # fmt: skip
    def test_by_any_writer_through_any_name(self, run, call, out, tmp_path):
        before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
        source, out = run / 'checkpoints' / 'ep1.pt', tmp_path / out
        average = Reconstruction('half_life=1ba', {'ba': 3.0}, load_average(source), 0.0, (), 3, 'run', False, ())
        (tmp_path / 'other.pt').write_bytes(source.read_bytes())
        writers = [
            lambda: export(source, out),
            lambda: merge([source, tmp_path / 'other.pt'], out, equal=True, overwrite=True),
            lambda: average.save(out),
        ]
        # A reconstruction knows no checkpoint; of a second name of one, it would replace the name alone.
        for writer in writers[: 2 if out.name == 'hard.pt' else 3]:
            with pytest.raises(CheckpointError, match='Write to another file'):
                writer()
        (tmp_path / 'other.pt').unlink()
        assert call('export', source, out)[0] == 2
        assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before

    def test_nor_is_a_file_of_a_sharded_checkpoint(self, sound, tmp_path):
        dcp.save({'model': {'a': torch.ones(2)}}, checkpoint_id=tmp_path / 'folder', no_dist=True)
        [shard] = (tmp_path / 'folder').glob('*.distcp')
        for out in (shard, tmp_path / 'folder' / '.metadata'):
            content = out.read_bytes()
            with pytest.raises(CheckpointError, match='a file of the checkpoint'):
                export(sound['script'], out)
            assert out.read_bytes() == content

    def test_an_export_may_be_replaced_by_another(self, sound, tmp_path):
        for out in (tmp_path / 'a.pt', tmp_path / 'a.safetensors'):
            export(sound['script'], out)
            export(sound['composer'], out)


class TestMetricsFiles:
    LINE: ClassVar[dict] = {
        'epoch': 1.0, 'batch': 1, 'sample': 8, 'loss/train/total': 1.0, 'lr/group0': 0.1, 'momentum/group0': 0.9,
        'metrics/eval_ema/Accuracy': 0.5, 'metrics/eval_ema/CrossEntropy': 1.5, 'ema/relative_distance': 0.1,
    }  # fmt: skip

    def read(self, folder: Path, content: bytes) -> RunCurves:
        (folder / 'metrics.jsonl').write_bytes(content)
        return read_run(folder)

    def drawn(self, folder: Path, content: bytes) -> list[Path]:
        return write(draw_runs([self.read(folder, content)]), folder / 'out.svg')

    @pytest.mark.parametrize('value', ['1' * 400, '-1e308'], ids=['digits', 'huge'])
    def test_absurd_values_are_drawn_as_gaps_or_left_out(self, tmp_path, value):
        odd = {'lr/group': 0, 'lr/groupx': 1, 'lr/group-1': 1}
        lines = [json.dumps({**self.LINE, **odd, 'batch': batch}) for batch in (1, 2, 3)]
        for key in ('loss/train/total', 'lr/group0', 'metrics/eval_ema/CrossEntropy', 'ema/relative_distance'):
            lines[1] = f'{lines[1][:-1]}, {json.dumps(key)}: {value}}}'
        assert self.drawn(tmp_path, '\n'.join(lines).encode())

    @pytest.mark.parametrize('value', ['-1', 'NaN', 'Infinity', '1' * 400, '"1"', 'null', '[]', '1e300'])
    @pytest.mark.parametrize('key', ['epoch', 'batch', 'sample'])
    def test_a_place_that_is_none_is_named_by_its_line(self, tmp_path, key, value):
        line = json.dumps(self.LINE)
        broken = f'{line[:-1]}, {json.dumps(key)}: {value}}}'
        with pytest.raises(PlotError, match='line 2 is no line of metrics: it does not give epoch'):
            self.read(tmp_path, f'{line}\n{broken}\n{line}\n'.encode())

    @pytest.mark.parametrize(
        ('middle', 'reason'),
        [
            (b'{"a\xff": 1}', "'utf-8' codec"),
            (b'[' * 100_000, 'nested too deeply'),
            (b'\0' * 100, 'Expecting value'),
            (b'{"epoch": 1', 'Expecting'),
            (b'a' * (2**24 + 5), 'Expecting value'),
        ],
        ids=['bytes', 'deep', 'zeros', 'cut', 'endless'],
    )
    def test_a_broken_line_is_named_and_of_the_last_one_no_word_is_said(self, tmp_path, middle, reason):
        line = json.dumps(self.LINE).encode()
        with pytest.raises(PlotError, match=f'line 2 is no line of metrics: .*{reason}') as caught:
            self.read(tmp_path, line + b'\n' + middle + b'\n' + line + b'\n')
        assert len(str(caught.value)) < 500
        if len(middle) < 2**24:
            assert len(self.read(tmp_path, line + b'\n' + middle).loss) == 1

    def test_a_byte_order_mark_and_line_separators_in_names_are_read(self, tmp_path):
        line = json.dumps({**self.LINE, 'a\u2028b': 1}, ensure_ascii=False).encode()
        assert len(self.read(tmp_path, codecs.BOM_UTF8 + line + b'\r\n' + line + b'\r\n').loss) == 2

    def test_of_thousands_of_parameter_groups_the_first_are_drawn_and_a_remark_says_so(self, tmp_path):
        line = {**self.LINE, **{f'lr/group{group}': group for group in range(3000)}}
        [svg] = self.drawn(tmp_path, json.dumps(line).encode() + b'\n')
        assert 'the first 24 of 3,000' in svg.read_text()

    def test_a_recipe_that_is_a_pipe_or_grows_without_end_is_passed_over(self, tmp_path):
        line = json.dumps(self.LINE).encode() + b'\n'
        os.mkfifo(tmp_path / 'recipe.yaml')
        assert self.read(tmp_path, line)
        (tmp_path / 'recipe.yaml').unlink()
        levels = '\n'.join(f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 9)}]' for i in range(1, 30))
        (tmp_path / 'recipe.yaml').write_text(f'a0: &a0 [x]\n{levels}\n')
        assert self.read(tmp_path, line)


@pytest.mark.filterwarnings('ignore')
def test_a_small_trial_falls_nowhere(tmp_path):
    summary, is_sound = run(40, 1, tmp_path)
    assert is_sound, summary
