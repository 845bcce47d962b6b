"""Data sets: where they come from, what a batch is, and that order survives a resume and a change of processes."""

import gzip
import hashlib
import http.server
import inspect
import io
import logging
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from composer import Callback, Trainer
from composer.utils import dist
from torch.utils.data import DistributedSampler

from composer_ema.recipe import registry
from composer_ema.zoo import fetch
from composer_ema.zoo.data import cifar10, fake, fashion_mnist, mnist1d
from composer_ema.zoo.models import build_model
from composer_ema.zoo.transforms import CropAndMirror, Normalise

DATASETS = registry.datasets().classes
#: Arguments without a default.
NEEDED = {'text_file': {'path': 'a.txt'}}

pytestmark = pytest.mark.filterwarnings(
    'error',
    'ignore:Implicitly cleaning up:ResourceWarning',  # a folder of a Composer Trainer that another test has left
)

FILES = tuple(fetch.FASHION_MNIST_SHA256)


def idx_files():
    """A data set of Fashion-MNIST's format with 40 training and 20 test images."""
    generator = np.random.default_rng(0)
    files = {}
    for prefix, count in (('train', 40), ('t10k', 20)):
        pixels = generator.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = b''.join(number.to_bytes(4, 'big') for number in (0x803, count, 28, 28))
        files[f'{prefix}-images-idx3-ubyte'] = header + pixels.tobytes()
        files[f'{prefix}-labels-idx1-ubyte'] = (0x801).to_bytes(4, 'big') + count.to_bytes(4, 'big') + labels.tobytes()
    return files


def write(folder, files, *, compressed=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f'{name}{".gz" * compressed}').write_bytes(gzip.compress(content) if compressed else content)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Every place of the look-up inside `tmp_path`, all empty; `.files` are what a place may hold."""

    class Places:
        files = idx_files()
        root, cache, debian = tmp_path / 'root', tmp_path / 'cache', tmp_path / 'debian'
        fetched: list[str]

        def offer(self, name, files=None):
            def fetcher(scratch):
                assert not any(scratch.iterdir())
                self.fetched.append(name)
                if files is None:
                    raise fetch.Unusable(f'{name} is down')
                write(scratch, files)
                return scratch

            monkeypatch.setitem(fetch.FASHION_MNIST_FETCHERS, name, fetcher)

    places = Places()
    places.fetched = []
    monkeypatch.setenv(fetch.CACHE_VARIABLE, str(places.cache))
    monkeypatch.setattr(fetch, 'DEBIAN_FOLDER', places.debian)
    monkeypatch.setattr(
        fetch,
        'FASHION_MNIST_SHA256',
        {name: hashlib.sha256(content).hexdigest() for name, content in places.files.items()},
    )
    for name in tuple(fetch.FASHION_MNIST_FETCHERS):
        places.offer(name)
    return places


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(dist, 'get_world_size', lambda: 2)

    def as_rank(rank):
        monkeypatch.setattr(dist, 'get_global_rank', lambda: rank)

    return as_rank


def batches_of(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return [(inputs.clone(), targets.clone()) for inputs, targets in loader]


def assert_same_batches(first, second):
    assert len(first) == len(second)
    for (inputs, targets), (other_inputs, other_targets) in zip(first, second, strict=True):
        assert torch.equal(inputs, other_inputs)
        assert torch.equal(targets, other_targets)


class TestLookUp:
    def test_the_first_place_that_has_it_wins(self, places):
        for folder in (places.root, places.cache, places.debian):
            write(folder, places.files)
        read = []
        original = fetch._read_idx_files
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fetch, '_read_idx_files', lambda folder: read.append(folder) or original(folder))
            for expected in (places.root, places.cache, places.debian):
                read.clear()
                fetch.load_fashion_mnist(places.root)
                assert read[-1] == expected
                for file in expected.iterdir():
                    file.unlink()
        assert places.fetched == []

    def test_downloads_come_last_torchvision_before_apt(self, places):
        places.offer('apt-get download', places.files)
        fetch.load_fashion_mnist()
        assert places.fetched == ['torchvision download', 'apt-get download']

    def test_a_download_is_kept_and_not_repeated(self, places):
        places.offer('torchvision download', places.files)
        first = fetch.load_fashion_mnist()
        second = fetch.load_fashion_mnist()
        assert places.fetched == ['torchvision download']
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert sorted(path.name for path in (places.cache / 'FashionMNIST' / 'raw').iterdir()) == sorted(FILES)

    @pytest.mark.parametrize('inside', ['.', 'FashionMNIST/raw'])
    @pytest.mark.parametrize('compressed', [False, True])
    def test_a_folder_may_hold_plain_or_compressed_files_in_either_layout(self, places, inside, compressed):
        write(places.root / inside, places.files, compressed=compressed)
        tensors = fetch.load_fashion_mnist(places.root)
        assert tensors['train_inputs'].shape == (40, 1, 28, 28)
        assert tensors['test_inputs'].shape == (20, 1, 28, 28)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.uint8}
        assert tensors['test_labels'].tolist() == [index % 10 for index in range(20)]
        assert tensors['train_inputs'][0, 0, 0, 0] == places.files['train-images-idx3-ubyte'][16]

    @pytest.mark.parametrize('compressed', [False, True])
    @pytest.mark.parametrize('damage', ['flipped', 'truncated', 'empty'])
    def test_a_damaged_file_is_reported_and_the_next_place_is_tried(self, places, caplog, damage, compressed):
        name = 'train-images-idx3-ubyte'
        whole = places.files[name]
        bad = {'flipped': whole[:-1] + bytes([whole[-1] ^ 1]), 'truncated': whole[:-100], 'empty': b''}[damage]
        write(places.cache, {**places.files, name: bad}, compressed=compressed)
        write(places.debian, places.files, compressed=True)
        with caplog.at_level(logging.WARNING):
            assert len(fetch.load_fashion_mnist()['train_inputs']) == 40
        path = places.cache / f'{name}{".gz" * compressed}'
        for part in (str(path), fetch.FASHION_MNIST_SHA256[name], hashlib.sha256(bad).hexdigest()):
            assert part in caplog.text

    @pytest.mark.parametrize('kept', [0, 5, 200])
    def test_a_truncated_gzip_stream_is_reported_and_the_next_place_is_tried(self, places, caplog, kept):
        name = 'train-images-idx3-ubyte'
        write(places.root, places.files, compressed=True)
        path = places.root / f'{name}.gz'
        path.write_bytes(path.read_bytes()[:kept])
        write(places.debian, places.files)
        with caplog.at_level(logging.WARNING):
            fetch.load_fashion_mnist(places.root)
        assert str(path) in caplog.text
        assert fetch.FASHION_MNIST_SHA256[name] in caplog.text

    def test_what_is_no_gzip_stream_is_reported(self, places):
        write(places.root, places.files)
        (places.root / FILES[0]).rename(places.root / f'{FILES[0]}.gz')
        with pytest.raises(FileNotFoundError, match=rf'{FILES[0]}\.gz cannot be read'):
            fetch.load_fashion_mnist(places.root)

    def test_a_damaged_download_is_not_kept(self, places):
        places.offer('torchvision download', {**places.files, FILES[3]: b'error page'})
        places.offer('apt-get download', places.files)
        fetch.load_fashion_mnist()
        assert places.fetched == ['torchvision download', 'apt-get download']
        places.offer('apt-get download')
        fetch.load_fashion_mnist()

    def test_a_download_replaces_a_damaged_file_in_the_cache(self, places):
        write(places.cache / 'FashionMNIST' / 'raw', {**places.files, FILES[0]: b'damaged'})
        places.offer('torchvision download', places.files)
        fetch.load_fashion_mnist()
        fetch.load_fashion_mnist()
        assert places.fetched == ['torchvision download']

    def test_when_all_fail_the_error_names_every_place_and_what_it_said(self, places):
        write(places.debian, {FILES[0]: b'damaged'})
        with pytest.raises(FileNotFoundError) as caught:
            fetch.load_fashion_mnist(places.root)
        said = str(caught.value)
        for part in (
            f'1. root {places.root}: no {FILES[0]}',
            f'2. cache {places.cache}: no {FILES[0]}',
            f'3. Debian package {places.debian}: {places.debian / FILES[0]} is damaged',
            '4. torchvision download: torchvision download is down',
            '5. apt-get download: apt-get download is down',
            'Pass root=',
        ):
            assert part in said

    def test_a_root_without_the_data_is_not_passed_over_in_silence(self, places, caplog):
        write(places.cache, places.files)
        with caplog.at_level(logging.WARNING):
            fetch.load_fashion_mnist(places.root)
        assert str(places.root) in caplog.text

    def test_a_cache_that_cannot_be_written_is_named(self, places, monkeypatch, tmp_path):
        (tmp_path / 'file').write_text('in the way')
        monkeypatch.setenv(fetch.CACHE_VARIABLE, str(tmp_path / 'file' / 'cache'))
        with pytest.raises(FileNotFoundError, match=r'cannot write to the cache.*set COMPOSER_EMA_CACHE'):
            fetch.load_fashion_mnist()

    @pytest.mark.parametrize('broken_at', [1, 2, 4])
    def test_an_exception_in_the_middle_leaves_only_whole_files(self, places, monkeypatch, broken_at):
        places.offer('torchvision download', places.files)
        written = []
        original = Path.write_bytes

        def write_half(self, content):
            if self.name.endswith('.unfinished'):
                written.append(self)
                if len(written) == broken_at:
                    original(self, content[: len(content) // 2])
                    raise KeyboardInterrupt
            return original(self, content)

        monkeypatch.setattr(Path, 'write_bytes', write_half)
        with pytest.raises(KeyboardInterrupt):
            fetch.load_fashion_mnist()
        left = {path.name: path.read_bytes() for path in places.cache.rglob('*') if path.is_file()}
        left.pop('.lock')
        assert len(left) == broken_at - 1
        assert left.items() <= places.files.items()
        fetch.load_fashion_mnist()

    def test_what_a_killed_process_left_is_cleared(self, places):
        write(places.cache / '.unfinished', {'half': b'a download'})
        places.offer('torchvision download', places.files)
        fetch.load_fashion_mnist()
        assert not (places.cache / '.unfinished').exists()

    def test_of_racing_processes_one_fetches_and_all_read(self, places, tmp_path):
        write(tmp_path / 'mirror', places.files)
        script = tmp_path / 'race.py'
        script.write_text(
            'import hashlib, os, pathlib, shutil, sys, time\n'
            'from composer_ema.zoo import fetch\n'
            'here = pathlib.Path(sys.argv[1])\n'
            "mirror = here / 'mirror'\n"
            "fetch.DEBIAN_FOLDER = here / 'debian'\n"
            'sha256 = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()\n'
            'fetch.FASHION_MNIST_SHA256 = {path.name: sha256(path) for path in mirror.iterdir()}\n'
            'def slow(scratch):\n'
            "    with open(here / 'fetched', 'a') as log: log.write(f'{os.getpid()}\\n')\n"
            '    time.sleep(0.5)\n'
            "    return pathlib.Path(shutil.copytree(mirror, scratch / 'all'))\n"
            "fetch.FASHION_MNIST_FETCHERS = {'slow': slow}\n"
            "(here / f'ready-{os.getpid()}').touch()\n"
            "while len(list(here.glob('ready-*'))) < 2: time.sleep(0.01)\n"
            "assert len(fetch.load_fashion_mnist()['train_inputs']) == 40\n"
        )
        racers = [subprocess.Popen([sys.executable, str(script), str(tmp_path)]) for _ in range(2)]
        assert [racer.wait(timeout=120) for racer in racers] == [0, 0]
        assert len((tmp_path / 'fetched').read_text().split()) == 1

    def test_the_cache_folder_follows_the_environment(self, monkeypatch):
        monkeypatch.delenv(fetch.CACHE_VARIABLE, raising=False)
        monkeypatch.setenv('HOME', '/home/someone')
        monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
        assert fetch.cache_folder() == Path('/home/someone/.cache/composer_ema')
        monkeypatch.setenv('XDG_CACHE_HOME', '/var/caches')
        assert fetch.cache_folder() == Path('/var/caches/composer_ema')
        monkeypatch.setenv(fetch.CACHE_VARIABLE, '/data')
        assert fetch.cache_folder() == Path('/data')


class TestApt:
    @pytest.fixture
    def tools(self, tmp_path, monkeypatch, places):
        """Stand-ins for apt-get, which finds the package only after an update into lists of its own, and dpkg-deb."""
        monkeypatch.setattr(fetch, 'DEBIAN_FOLDER', Path('/usr/share/datasets/fashion-mnist'))
        write(tmp_path / 'package', places.files, compressed=True)
        folder = tmp_path / 'tools'
        folder.mkdir()
        (folder / 'apt-get').write_text(
            '#!/bin/sh\n'
            f'echo "$*" >> {tmp_path}/calls\n'
            'lists=$(printf "%s\\n" "$@" | sed -n "s/^Dir::State::lists=//p")\n'
            'case " $* " in\n'
            '*" update "*)\n'
            f'    if test -e {tmp_path}/offline; then echo "W: no network" >&2; exit 0; fi\n'
            '    test -d "$lists/partial" || { echo "E: no folder $lists/partial" >&2; exit 100; }\n'
            '    touch "$lists/Packages";;\n'
            '*)\n'
            '    test -e "$lists/Packages" || { echo "E: Unable to locate package" >&2; exit 100; }\n'
            '    touch found.deb;;\n'
            'esac\n'
        )
        (folder / 'dpkg-deb').write_text(
            '#!/bin/sh\n'
            f'mkdir -p "$3/usr/share/datasets"; cp -r {tmp_path}/package "$3/usr/share/datasets/fashion-mnist"\n'
        )
        for tool in folder.iterdir():
            tool.chmod(0o755)
        monkeypatch.setenv('PATH', str(folder), prepend=':')
        return tmp_path

    def test_without_package_lists_it_makes_its_own(self, tools, tmp_path):
        scratch = tmp_path / 'scratch'
        scratch.mkdir()
        assert fetch._read_idx_files(fetch._fetch_from_apt(scratch)) == idx_files()
        verbs = [line.split()[-2:] for line in (tools / 'calls').read_text().splitlines()]
        assert [pair[-1] for pair in verbs] == ['dataset-fashion-mnist', 'update', 'dataset-fashion-mnist']

    def test_without_network_it_says_what_apt_said(self, tools, tmp_path):
        (tools / 'offline').touch()
        scratch = tmp_path / 'scratch'
        scratch.mkdir()
        with pytest.raises(fetch.Unusable, match=r'code 100: E: Unable to locate.*apt-get update: W: no network'):
            fetch._fetch_from_apt(scratch)

    def test_a_machine_without_apt_is_told_so(self, monkeypatch, tmp_path):
        monkeypatch.setenv('PATH', str(tmp_path))
        with pytest.raises(fetch.Unusable, match='apt-get is not installed'):
            fetch._fetch_from_apt(tmp_path)


class TestTorchvisionDownload:
    @pytest.fixture
    def mirror(self, monkeypatch, places, tmp_path):
        """A mirror on this machine; `.stalls` makes it answer HEAD and then fall silent."""
        served = tmp_path / 'served'
        write(served, places.files, compressed=True)
        released = threading.Event()

        class Handler(http.server.SimpleHTTPRequestHandler):
            stalls = False

            def __init__(self, *arguments):
                super().__init__(*arguments, directory=str(served))

            def do_GET(self):
                if self.stalls:
                    released.wait(30)
                else:
                    super().do_GET()

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        source = torchvision.datasets.FashionMNIST
        md5 = {name: hashlib.md5((served / f'{name}.gz').read_bytes()).hexdigest() for name in FILES}
        monkeypatch.setattr(source, 'mirrors', [f'http://127.0.0.1:{server.server_port}/'])
        monkeypatch.setattr(source, 'resources', [(f'{name}.gz', md5[name]) for name in FILES])
        monkeypatch.setenv('no_proxy', '127.0.0.1')
        yield Handler
        released.set()
        server.shutdown()
        thread.join()
        server.server_close()

    def test_it_downloads_what_the_look_up_verifies(self, mirror, places, tmp_path):
        assert fetch._read_idx_files(fetch._fetch_from_torchvision(tmp_path / 'scratch')) == places.files

    def test_a_download_that_stalls_ends_in_bounded_time(self, mirror, monkeypatch, tmp_path):
        mirror.stalls = True
        monkeypatch.setattr(fetch, '_STALL_SECONDS', 0.2)
        with pytest.raises(fetch.Unusable, match='timed out'):
            fetch._fetch_from_torchvision(tmp_path / 'scratch')
        assert socket.getdefaulttimeout() is None

    def test_a_mirror_that_never_answers_is_given_up(self, monkeypatch):
        monkeypatch.setattr(fetch, '_ANSWER_SECONDS', 0.2)
        monkeypatch.setenv('no_proxy', '127.0.0.1')
        with socket.create_server(('127.0.0.1', 0)) as silent, pytest.raises(fetch.Unusable, match=r'answer|timed out'):
            fetch._require_answer(f'http://127.0.0.1:{silent.getsockname()[1]}/file')

    def test_not_even_a_look_up_of_the_name_that_hangs_takes_longer(self, monkeypatch):
        released = threading.Event()
        monkeypatch.setattr(fetch, '_ANSWER_SECONDS', 0.1)
        monkeypatch.setattr('urllib.request.urlopen', lambda *_, **__: released.wait(30) and io.BytesIO())
        begun = time.monotonic()
        with pytest.raises(fetch.Unusable, match=r'http://mirror/file did not answer within 0\.1 s'):
            fetch._require_answer('http://mirror/file')
        assert time.monotonic() - begun < 5
        released.set()


class TestCifar10:
    def test_when_all_fail_the_error_names_every_place(self, tmp_path, monkeypatch):
        monkeypatch.setenv(fetch.CACHE_VARIABLE, str(tmp_path / 'cache'))
        monkeypatch.setattr(
            fetch, '_require_answer', lambda url: (_ for _ in ()).throw(fetch.Unusable(f'{url} is down'))
        )
        with pytest.raises(FileNotFoundError) as caught:
            fetch.load_cifar10(tmp_path / 'root')
        for part in ('1. root', '2. cache', '3. torchvision download', 'is down', 'Pass root='):
            assert part in str(caught.value)

    @pytest.fixture
    def pixels(self, monkeypatch):
        generator = torch.Generator().manual_seed(0)
        tensors = {
            f'{split}_{kind}': torch.randint(10 if kind == 'labels' else 256, shape, generator=generator).to(
                torch.uint8
            )
            for split, count in (('train', 24), ('test', 8))
            for kind, shape in (('inputs', (count, 3, 32, 32)), ('labels', (count,)))
        }
        monkeypatch.setattr(fetch, 'load_cifar10', lambda root: tensors)
        return tensors

    def test_without_augmentation_inputs_are_the_normalised_pixels(self, pixels):
        made = cifar10(batch_size=8, eval_batch_size=8, augment=False)
        ((inputs, targets),) = made.evaluation
        mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
        std = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)
        torch.testing.assert_close(inputs, (pixels['test_inputs'] / 255 - mean) / std)
        assert torch.equal(targets, pixels['test_labels'].long())
        assert made.input_shape == (3, 32, 32)

    def test_augmentation_depends_on_sample_seed_and_epoch_alone(self, pixels, two_processes):
        def by_sample(rank_loaders, epoch):
            seen = {}
            for loader in rank_loaders:
                loader.sampler.set_epoch(epoch)
                order = list(loader.sampler)
                images = torch.cat([inputs for inputs, _ in loader])
                seen.update(zip(order, images, strict=True))
            return torch.stack([seen[index] for index in range(24)])

        with pytest.MonkeyPatch.context() as single:
            single.setattr(dist, 'get_world_size', lambda: 1)
            alone = by_sample([cifar10(batch_size=6, seed=3).train], epoch=2)
            other_epoch = by_sample([cifar10(batch_size=6, seed=3).train], epoch=1)
            other_seed = by_sample([cifar10(batch_size=6, seed=4).train], epoch=2)
        loaders = []
        for rank in (0, 1):
            two_processes(rank)
            loaders.append(cifar10(batch_size=8, seed=3).train)
        assert torch.equal(alone, by_sample(loaders, epoch=2))
        assert not torch.equal(alone, other_epoch)
        assert not torch.equal(alone, other_seed)

    def test_workers_see_the_epoch(self, pixels):
        with_workers = cifar10(batch_size=8, num_workers=1).train
        in_process = cifar10(batch_size=8).train
        for epoch in (0, 1):
            assert_same_batches(batches_of(with_workers, epoch), batches_of(in_process, epoch))

    def test_a_crop_is_a_shifted_and_perhaps_mirrored_window_of_the_padded_image(self):
        images = np.random.default_rng(0).integers(1, 256, size=(64, 3, 32, 32), dtype=np.uint8)
        cropped = CropAndMirror(64, seed=0)(images, np.arange(64), epoch=0)
        padded = np.pad(images, ((0, 0), (0, 0), (4, 4), (4, 4)))
        found = set()
        for image, window in zip(padded, cropped, strict=True):
            (match,) = [
                (down, right, mirrored)
                for down in range(9)
                for right in range(9)
                for mirrored in (1, -1)
                if np.array_equal(image[:, down : down + 32, right : right + 32][:, :, ::mirrored], window)
            ]
            found.add(match)
        assert {mirrored for _, _, mirrored in found} == {1, -1}
        assert {down for down, _, _ in found} == {right for _, right, _ in found} == set(range(9))


class TestLoaders:
    def test_fashion_mnist_batches_are_normalised_tensors(self, places):
        write(places.cache, places.files)
        made = fashion_mnist(batch_size=16, eval_batch_size=20)
        assert [len(targets) for _, targets in made.train] == [16, 16, 8]
        ((inputs, targets),) = made.evaluation
        assert isinstance(next(iter(made.evaluation)), tuple)
        assert (inputs.dtype, inputs.shape, targets.dtype) == (torch.float32, (20, 1, 28, 28), torch.int64)
        pixel = places.files['t10k-images-idx3-ubyte'][16]
        assert inputs[0, 0, 0, 0].item() == pytest.approx((pixel / 255 - 0.2860) / 0.3530, abs=1e-6)
        assert targets.tolist() == [index % 10 for index in range(20)]
        assert (made.num_classes, made.input_shape) == (10, (1, 28, 28))

    def test_fashion_mnist_moves_training_images_alone_and_only_when_asked(self, places):
        write(places.cache, places.files)

        def batch(loader):
            return next(iter(loader))[0]

        plain, moved = (fashion_mnist(batch_size=40, eval_batch_size=20, shift=pixels) for pixels in (0, 1))
        assert torch.equal(batch(plain.evaluation), batch(moved.evaluation))
        padded = torch.nn.functional.pad(batch(plain.train), (1, 1, 1, 1), value=-0.2860 / 0.3530)
        found = set()
        for image, seen in zip(padded, batch(moved.train), strict=True):
            windows = {(d, r): image[:, d : d + 28, r : r + 28] for d in range(3) for r in range(3)}
            (match,) = [place for place, window in windows.items() if torch.allclose(window, seen, atol=1e-6)]
            found.add(match)
        assert len(found) > 4
        mirrored = batch(fashion_mnist(batch_size=40, eval_batch_size=20, mirror=True).train)
        is_same = [torch.equal(a, b) for a, b in zip(mirrored, batch(plain.train), strict=True)]
        is_flipped = [torch.equal(a, b.flip(2)) for a, b in zip(mirrored, batch(plain.train), strict=True)]
        assert 0 < sum(is_same) < 40
        assert sum(is_same) + sum(is_flipped) == 40

    @pytest.mark.parametrize(
        ('arguments', 'message'),
        [
            ({'shift': -1}, r'shift must be a whole number of at least 0, got -1\. Pass 1'),
            ({'shift': 28}, r'shift must lie below 28, the side of an image, got 28\. Pass 1'),
            ({'mirror': 1}, r'mirror must be True or False, got 1\. Pass True'),
        ],
    )
    def test_an_augmentation_out_of_range_is_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            fashion_mnist(**arguments)

    def test_three_channels_repeat_the_grey_value(self, places):
        write(places.cache, places.files)
        made = fashion_mnist(batch_size=16, eval_batch_size=20, channels=3)
        inputs, _ = next(iter(made.evaluation))
        grey, _ = next(iter(fashion_mnist(batch_size=16, eval_batch_size=20).evaluation))
        assert made.input_shape == (3, 28, 28)
        assert torch.equal(inputs, grey.expand(-1, 3, -1, -1))

    def test_normalisation_by_hand(self):
        normalised = Normalise((0.5,), (0.25,))(np.array([0, 51, 255], dtype=np.uint8).reshape(1, 1, 1, 3))
        assert normalised.dtype == np.float32
        np.testing.assert_allclose(normalised.ravel(), [-2, (0.2 - 0.5) / 0.25, 2], rtol=1e-6)

    def test_drop_last_drops_the_uneven_batch_of_training_only(self, places):
        write(places.cache, places.files)
        made = fashion_mnist(batch_size=16, eval_batch_size=16, drop_last=True)
        assert [len(targets) for _, targets in made.train] == [16, 16]
        assert [len(targets) for _, targets in made.evaluation] == [16, 4]

    def test_one_sample_can_be_indexed(self):
        made = mnist1d(num_samples=100)
        inputs, target = made.evaluation.dataset[3]
        all_inputs, all_targets = next(iter(made.evaluation))
        assert torch.equal(inputs, all_inputs[3])
        assert target == all_targets[3]

    def test_an_epoch_is_a_function_of_seed_and_epoch(self):
        def epochs(seed):
            loader = mnist1d(num_samples=200, batch_size=32, seed=seed).train
            return [batches_of(loader, epoch) for epoch in (0, 1, 2)]

        first, again, other = epochs(1), epochs(1), epochs(2)
        for one, two in zip(first, again, strict=True):
            assert_same_batches(one, two)
        firsts = [batches[0][1].tolist() for batches in (*first, *other)]
        assert len({tuple(targets) for targets in firsts}) == 6, 'orders repeat: seed 2 is seed 1 one epoch on'

    def test_every_sample_comes_once_an_epoch(self):
        made = mnist1d(num_samples=200, batch_size=32)
        inputs = torch.cat([inputs for inputs, _ in made.train])
        assert sorted(map(tuple, inputs.tolist())) == sorted(map(tuple, made.train.dataset.inputs.tolist()))

    def test_composer_sees_a_distributed_sampler_and_a_batch_size(self):
        made = mnist1d(num_samples=200, batch_size=32, eval_batch_size=8)
        for loader, size in ((made.train, 32), (made.evaluation, 8)):
            assert isinstance(loader.sampler, DistributedSampler)
            assert loader.batch_size == size

    def test_two_processes_share_the_global_batch_and_split_the_epoch(self, two_processes):
        seen = []
        for rank in (0, 1):
            two_processes(rank)
            loader = mnist1d(num_samples=200, batch_size=32).train
            assert loader.batch_size == 16
            seen.append(torch.cat([inputs for inputs, _ in loader]))
        assert [len(part) for part in seen] == [80, 80]
        assert len(set(map(tuple, torch.cat(seen).tolist()))) == 160

    def test_iterating_a_loader_leaves_the_global_generator_alone(self):
        made = mnist1d(num_samples=100)
        before = torch.get_rng_state()
        for loader in (made.train, made.evaluation):
            list(loader)
        assert torch.equal(before, torch.get_rng_state())

    def test_held_out_samples_are_training_samples_and_do_not_depend_on_the_seed(self):
        whole = mnist1d(num_samples=200)
        split = [mnist1d(num_samples=200, validation_split=0.25, seed=seed) for seed in (0, 1)]
        rows = [set(map(tuple, torch.cat([x for x, _ in loader]).tolist())) for loader in (whole.train, split[0].train)]
        held_out = [torch.cat([x for x, _ in made.evaluation]) for made in split]
        assert torch.equal(*held_out)
        assert len(held_out[0]) == 40
        assert rows[1] | set(map(tuple, held_out[0].tolist())) == rows[0]
        assert len(rows[1]) == 120

    def test_a_smaller_share_holds_out_a_subset_of_a_larger_one(self):
        few, many = (mnist1d(num_samples=200, validation_split=share).evaluation.dataset for share in (0.1, 0.25))
        assert (len(few), len(many)) == (16, 40)
        assert np.array_equal(few.inputs, many.inputs[:16])

    def test_all_processes_hold_out_the_same_samples_and_train_on_the_others(self, two_processes):
        alone = mnist1d(num_samples=200, batch_size=32, validation_split=0.25, drop_last=True)
        trained, evaluated = [], []
        for rank in (0, 1):
            two_processes(rank)
            made = mnist1d(num_samples=200, batch_size=32, validation_split=0.25, drop_last=True)
            assert (len(made.train), len(alone.train)) == (3, 3), 'an uneven last batch of 24 is dropped'
            trained.append(torch.cat([inputs for inputs, _ in made.train]))
            evaluated.append(torch.cat([inputs for inputs, _ in made.evaluation]))
        held_out = set(map(tuple, alone.evaluation.dataset.inputs.tolist()))
        assert set(map(tuple, torch.cat(evaluated).tolist())) == held_out
        assert set(map(tuple, torch.cat(trained).tolist())).isdisjoint(held_out)

    def test_random_images_can_be_held_out_too(self):
        arguments = {'image_size': (1, 4, 4), 'size': 20, 'eval_size': 6, 'batch_size': 5}
        whole, made = fake(**arguments), fake(**arguments, validation_split=0.25)
        assert (len(made.train.dataset), len(made.evaluation.dataset)) == (15, 5)
        both = np.concatenate([made.train.dataset.inputs, made.evaluation.dataset.inputs]).reshape(20, -1)
        assert set(map(tuple, both)) == set(map(tuple, whole.train.dataset.inputs.reshape(20, -1)))

    def test_resuming_in_mid_epoch_sees_the_same_batches(self, tmp_path):
        class Record(Callback):
            def __init__(self):
                self.seen = []

            def before_forward(self, state, logger):
                self.seen.append((int(state.timestamp.batch), state.batch[0].clone(), state.batch[1].clone()))

        def run(record, **arguments):
            made = mnist1d(num_samples=120, batch_size=16, eval_batch_size=24, seed=5)
            model = build_model('mnist1d_mlp')
            Trainer(
                model=model,
                train_dataloader=made.train,
                eval_dataloader=made.evaluation,
                optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
                max_duration='2ep',
                eval_interval='1ep',
                callbacks=record,
                progress_bar=False,
                device='cpu',
                seed=1,
                **arguments,
            ).fit()
            return {name: value.clone() for name, value in model.state_dict().items()}

        whole, resumed = Record(), Record()
        weights = run(whole, save_folder=str(tmp_path), save_interval='1ba')
        again = run(resumed, load_path=str(tmp_path / 'ep1-ba9-rank0.pt'))
        expected = [entry for entry in whole.seen if entry[0] >= 9]
        assert [entry[0] for entry in resumed.seen] == [entry[0] for entry in expected] == [9, 10, 11]
        for one, two in zip(expected, resumed.seen, strict=True):
            assert torch.equal(one[1], two[1])
            assert torch.equal(one[2], two[2])
        assert all(torch.equal(weights[name], again[name]) for name in weights)


class TestMnist1d:
    def test_the_default_is_the_set_of_the_paper(self):
        made = mnist1d()
        assert made.input_shape == (40,)
        assert (len(made.train.dataset), len(made.evaluation.dataset)) == (4000, 1000)
        inputs, targets = next(iter(made.train))
        assert (inputs.dtype, inputs.shape, targets.dtype) == (torch.float32, (100, 40), torch.int64)
        everything = np.concatenate([made.train.dataset.inputs, made.evaluation.dataset.inputs])
        assert everything.mean() == pytest.approx(0, abs=1e-6)
        assert everything.std() == pytest.approx(1, abs=1e-6)
        assert (
            np.bincount(np.concatenate([made.train.dataset.targets, made.evaluation.dataset.targets])).tolist()
            == [500] * 10
        )

    def test_data_depend_on_the_data_seed_alone(self):
        first = mnist1d(num_samples=100, seed=1).evaluation.dataset.inputs
        np.random.seed(9)
        random.seed(9)
        again = mnist1d(num_samples=100, seed=2).evaluation.dataset.inputs
        other = mnist1d(num_samples=100, data_seed=43).evaluation.dataset.inputs
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)

    def test_the_global_generators_are_as_before(self):
        def states():
            return repr((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))

        before = states()
        mnist1d(num_samples=50)
        assert states() == before


class TestFake:
    def test_shapes_range_and_reproducibility(self):
        made = fake(image_size=[1, 8, 9], num_classes=3, size=20, eval_size=6, batch_size=8, eval_batch_size=6)
        inputs, targets = next(iter(made.train))
        assert (inputs.dtype, inputs.shape, targets.dtype) == (torch.float32, (8, 1, 8, 9), torch.int64)
        assert (made.num_classes, made.input_shape) == (3, (1, 8, 9))
        assert inputs.min() >= -1
        assert inputs.max() <= 1
        again = fake(image_size=[1, 8, 9], num_classes=3, size=20, eval_size=6, batch_size=8, eval_batch_size=6)
        assert_same_batches(batches_of(made.train), batches_of(again.train))
        both = np.concatenate([made.train.dataset.inputs, made.evaluation.dataset.inputs]).reshape(26, -1)
        assert len(np.unique(both, axis=0)) == 26

    def test_the_global_generator_is_as_before(self):
        before = torch.get_rng_state()
        fake(image_size=(3, 4, 4), size=4, eval_size=2)
        assert torch.equal(before, torch.get_rng_state())


class TestArguments:
    @pytest.fixture(autouse=True)
    def _no_data(self, monkeypatch):
        def touched(*_, **__):
            raise AssertionError('data were touched before the arguments were checked')

        for name in ('load_fashion_mnist', 'load_cifar10'):
            monkeypatch.setattr(fetch, name, touched)
        monkeypatch.setattr('mnist1d.data.make_dataset', touched)
        monkeypatch.setattr(torchvision.datasets, 'FakeData', touched)

    def test_every_argument_is_keyword_only_with_a_default(self):
        for function in DATASETS.values():
            for parameter in inspect.signature(function).parameters.values():
                assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
                is_needed = parameter.name in NEEDED.get(function.__name__, {})
                assert is_needed == (parameter.default is inspect.Parameter.empty)

    @pytest.mark.parametrize('name', DATASETS)
    @pytest.mark.parametrize(
        ('argument', 'value'),
        [
            ('batch_size', 0),
            ('batch_size', '512'),
            ('batch_size', 3.0),
            ('batch_size', True),
            ('eval_batch_size', -1),
            ('num_workers', -1),
            ('seed', -1),
            ('seed', None),
        ],
    )
    def test_a_value_out_of_range_is_refused_with_value_and_rule(self, name, argument, value):
        with pytest.raises(
            ValueError, match=rf'{argument} must be a whole number of at least [01], got {value!r}\. \w'
        ):
            DATASETS[name](**NEEDED.get(name, {}), **{argument: value})

    @pytest.mark.parametrize(
        ('name', 'arguments', 'message'),
        [
            ('fashion_mnist', {'channels': 2}, r'channels must be 1 or 3, got 2\. Pass 3'),
            ('fashion_mnist', {'validation_split': 1.0}, r'share in \[0, 1\), got 1\.0\. Pass 0\.1'),
            ('fashion_mnist', {'validation_split': '10%'}, r"got '10%'"),
            ('fashion_mnist', {'root': 3}, r'root must be the path of a folder, got 3'),
            ('cifar10', {'root': ''}, r"root must be the path of a folder, got ''"),
            ('mnist1d', {'num_samples': 9}, r'num_samples must be a whole number of at least 10, got 9'),
            ('mnist1d', {'data_seed': 2**32}, r'data_seed must lie below 2\*\*32'),
            (
                'fake',
                {'image_size': 32},
                r'image_size must hold channels, height and width, got 32\. Pass \[3, 32, 32\]',
            ),
            ('fake', {'image_size': [3, 0, 32]}, r'image_size \(height\) must be a whole number of at least 1, got 0'),
            ('fake', {'image_size': [5, 8, 8]}, r'1 to 4 channels, got 5'),
            ('fake', {'num_classes': 0}, r'num_classes must be'),
            ('fake', {'size': 0}, r'size must be'),
        ],
    )
    def test_a_setting_that_cannot_be_is_refused_with_a_remedy(self, name, arguments, message):
        with pytest.raises(ValueError, match=message):
            DATASETS[name](**arguments)

    def test_a_batch_that_does_not_divide_among_the_processes_is_refused(self, monkeypatch):
        monkeypatch.setattr(dist, 'get_world_size', lambda: 3)
        with pytest.raises(
            ValueError, match=r'batch_size must be divisible.*got 512 for 3 processes\. Pass batch_size=513'
        ):
            fashion_mnist()


def test_drop_last_with_too_large_a_batch_is_refused():
    with pytest.raises(ValueError, match=r'must not exceed the 80 training samples.*got 100'):
        mnist1d(num_samples=100, batch_size=100, drop_last=True)


def test_the_real_fashion_mnist_is_the_canonical_one():
    made = fashion_mnist()
    for loader, per_class in ((made.train, 6000), (made.evaluation, 1000)):
        assert np.bincount(loader.dataset.targets).tolist() == [per_class] * 10
        assert loader.dataset.inputs.shape == (10 * per_class, 1, 28, 28)
    inputs = torch.cat([inputs for inputs, _ in made.train])
    assert inputs.shape == (60000, 1, 28, 28)
    assert inputs.mean().item() == pytest.approx(0, abs=1e-3)
    assert inputs.std().item() == pytest.approx(1, abs=1e-3)
