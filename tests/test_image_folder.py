"""A folder of images as a data set: layouts, kinds of files, augmentation and what is said before training."""

from __future__ import annotations

import inspect
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import Callback, Trainer
from composer.models import ComposerClassifier
from composer.utils import dist
from PIL import Image
from torchvision.datasets import DatasetFolder
from torchvision.transforms import v2

from composer_ema.recipe import schema
from composer_ema.recipe.build import build
from composer_ema.recipe.from_data import with_data
from composer_ema.recipe.run import rehearse
from composer_ema.spans import ArgumentError
from composer_ema.zoo import augmentation, image_batches, image_files
from composer_ema.zoo import image_folder as module
from composer_ema.zoo.dataset import evaluation_set, extent, num_classes
from composer_ema.zoo.image_folder import image_folder
from composer_ema.zoo.image_reading import centre_square, decode

pytestmark = pytest.mark.filterwarnings('error')
CLASSES = ('a', 'b', 'c')
INDICES = {name: index for index, name in enumerate(CLASSES)}
AUGMENT = {'random_resized_crop': {'size': 8, 'scale': [0.3, 1]}, 'ColorJitter': {'contrast': 0.5, 'hue': 0.1}}


def write(folder: Path, count: int, *, seed: int = 0, ending: str = 'png') -> None:
    """Writes images of noise between 12 and 20 pixels a side."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        height, width = generator.integers(12, 21, 2)
        pixels = generator.integers(256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{index}.{ending}')


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp('images')
    for index, name in enumerate(CLASSES):
        write(root / 'train' / name, 4 + 2 * index, seed=index)
        write(root / 'val' / name, 2, seed=10 + index, ending='jpg')
    return root


@pytest.fixture
def root(written, tmp_path):
    """A copy that a test may change: 4, 6 and 8 images in train/, 2 of each class in val/."""
    return Path(shutil.copytree(written, tmp_path / 'images'))


def built(root: Path, **arguments):
    return image_folder(**{'root': str(root), 'image_size': 8, 'batch_size': 5, **arguments})


def batches_of(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return [(inputs.clone(), targets.clone()) for inputs, targets in loader]


def by_sample(loader, epoch=0) -> dict[int, torch.Tensor]:
    loader.sampler.set_epoch(epoch)
    inputs = torch.cat([inputs for inputs, _ in loader])
    return dict(zip(list(loader.sampler), inputs, strict=True))


def refusal(**arguments) -> str:
    with pytest.raises(ArgumentError) as error:
        image_folder(**{'image_size': 8, **arguments})
    return f'{error.value.argument}: {error.value}'


class TestLayouts:
    def test_two_folders_give_training_and_evaluation(self, root):
        data = built(root, eval_batch_size=4)
        assert data.num_classes == 3
        assert data.input_shape == (3, 8, 8)
        assert len(data.train.dataset) == 18
        targets = torch.cat([targets for _, targets in data.evaluation])
        assert targets.tolist() == [0, 0, 1, 1, 2, 2]

    @pytest.mark.parametrize('name', image_files.EVALUATION)
    def test_the_second_folder_has_any_of_four_names(self, root, name):
        (root / 'val').rename(root / name)
        assert image_files.find(str(root)).evaluated == name
        words = 'the test set' if name == 'test' else f'{name}/'
        assert evaluation_set(image_folder, {'root': str(root)}) == words

    def test_another_folder_is_evaluated_where_it_is_named(self, root):
        (root / 'val').rename(root / 'late')
        assert len(image_files.find(str(root), evaluation_folder='late').evaluation) == 6

    def test_the_length_of_an_epoch_and_the_classes_need_no_pixels(self, root, monkeypatch):
        monkeypatch.setattr(Image, 'open', None)
        for arguments in ({}, {'validation_split': 0.25}, {'batch_size': 4, 'drop_last': True}):
            found = extent(image_folder, {'root': str(root), **arguments})
            assert found is not None
            monkeypatch.undo()
            data = built(root, **{'batch_size': 64, **arguments})
            assert found.samples == len(data.train.dataset)
            assert found.batches == len(data.train)
            monkeypatch.setattr(Image, 'open', None)
        assert num_classes(image_folder, {'root': str(root)}) == 3

    def test_a_share_is_held_out_of_each_class_and_a_smaller_one_is_part_of_it(self, root):
        found = image_files.find(str(root / 'train'), validation_split=0.5)
        train, half = found.held_out(9)
        assert [half.targets.count(each) for each in range(3)] == [2, 3, 4]
        assert {*train.paths, *half.paths} == {*found.train.paths}
        assert [*train.paths] == sorted(train.paths)
        _, third = found.held_out(6)
        assert {*third.paths} < {*half.paths}

    def test_hidden_folders_and_files_are_no_images_and_others_are_counted(self, root):
        write(root / 'train' / '.ipynb_checkpoints', 1)
        write(root / 'train' / 'a' / '.trash', 1)
        (root / 'train' / 'a' / '._0.png').write_bytes(b'\0')
        (root / 'train' / 'a' / 'x.HEIC').write_bytes(b'\0')
        (root / 'val' / 'a' / 'notes.txt').write_text('')
        found = image_files.find(str(root))
        assert (found.classes, len(found.train)) == ([*CLASSES], 18)
        assert any(each.startswith('left out') and '1 .heic, 1 .txt' in each for each in built(root).remarks)


class TestRefusals:
    @pytest.mark.parametrize(
        ('change', 'said'),
        [
            (lambda root: shutil.rmtree(root), "root: root must be a folder of images, and '"),
            (lambda root: shutil.rmtree(root / 'train'), 'has val/, and train/ with folders is missing'),
            (
                lambda root: shutil.rmtree(root / 'val'),
                'or hold out a tenth of the training images with',
            ),
            (lambda root: (root / 'val').rename(root / 'dev'), 'to evaluate on, only dev. Add one, name another'),
            (
                lambda root: (root / 'val' / 'c').rename(root / 'val' / 'd'),
                'and val/ has not; val/ has d, and',
            ),
            (lambda root: shutil.rmtree(root / 'val' / 'c'), 'train/ has c, and val/ has not. Rename'),
            (lambda root: write(root / 'train' / 'x', 0), 'there are none in x: no files that end in .jpg'),
            (
                lambda root: (write(root / 'train' / 'x', 0), (root / 'train' / 'x' / '1.gif').write_bytes(b'')),
                '1 .gif',
            ),
            (
                lambda root: (shutil.rmtree(root / 'train'), write(root / 'train', 3)),
                'train/ holds 3 images and no folder of a class',
            ),
            (
                lambda root: (shutil.rmtree(root), write(root, 2)),
                'must hold a folder for each class, and holds 2 images and no folder',
            ),
        ],
        ids=range(10),
    )
    def test_another_layout_is_an_error_that_says_which(self, root, change, said):
        change(root)
        assert said in refusal(root=str(root))

    def test_one_folder_of_classes_needs_a_share(self, root):
        message = refusal(root=str(root / 'train'))
        assert message.startswith('validation_split: validation_split must be given')
        assert f'pass root: {root}.' in message

    def test_a_class_without_a_training_image_is_an_error(self, root):
        for path in sorted((root / 'train' / 'a').iterdir())[1:]:
            path.unlink()
        message = refusal(root=str(root), validation_split=0.9)
        assert "'a' has 1 image" in message

    @pytest.mark.parametrize(
        ('arguments', 'said'),
        [
            ({'root': 3}, 'root: root must be the path'),
            ({'image_size': 0}, 'image_size: '),
            ({'channels': 2}, 'channels: channels must be 1, 3 or 4, got 2'),
            ({'load_size': 7}, 'load_size must be a whole number of at least 8, got 7'),
            ({'evaluation_folder': 'vol'}, 'evaluation_folder must be a folder in'),
            ({'evaluation_folder': 'val', 'validation_split': 0.1}, 'cannot be combined with validation_split=0.1'),
            ({'batch_size': 19, 'drop_last': True}, 'every batch would be dropped'),
            ({'normalize': 'imgnet'}, "normalize: normalize must be 'data'"),
            ({'normalize': [0.5, 0]}, 'got [0.5, 0]'),
            ({'normalize': {'mean': [0.5, 0.5], 'std': 1}}, '3 numbers'),
            ({'normalize': 'imagenet', 'channels': 1}, 'is for 3 channels, got 1'),
            (
                {'augment': {'random_resized_crp': {'size': 8}}},
                'augment: augment must name a transform of torchvision, got',
            ),
            ({'augment': {'random_crop': {'siz': 8}}}, "got 'siz'. Did you mean 'size'?"),
            ({'augment': ['random_crop']}, 'must give random_crop its size'),
            ({'augment': {'random_crop': 8}}, 'a mapping of arguments, got 8'),
            (
                {'augment': {'random_horizontal_flip': {'p': 2}}},
                "flip what it takes, got {'p': 2}: ",
            ),
            ({'augment': {'resize': {'size': 8, 'interpolation': 'cubic'}}}, 'one of nearest'),
            ({'augment': {'random_crop': {'size': 15}}}, 'augment cannot change the smallest image, got 3 x 12 x'),
            ({'augment': {'Normalize': {}}}, 'Use normalize of the data set'),
            ({'augment': {'mixup': {}}}, 'Use the algorithm cutmix or mixup'),
            ({'augment': {'grayscale': {}}}, 'got torch.uint8 (1, '),
            ({'augment': []}, 'must hold transforms'),
            ({'augment': [3]}, 'must list names'),
        ],
        ids=str,
    )
    def test_an_argument_out_of_range_is_an_error_at_its_key(self, written, arguments, said):
        assert said in refusal(**{'root': str(written), **arguments})


class TestWhatIsNoFileOfAnImage:
    @pytest.mark.parametrize('target', ['..', '../..', '.'])
    def test_a_link_that_leads_back_is_refused_and_not_followed(self, root, target):
        (root / 'train/a/back').symlink_to(target)
        message = refusal(root=str(root))
        assert f'{root}/train/a/back is a link back to' in message
        assert 'Remove the link' in message

    def test_a_link_to_another_folder_is_followed_in_the_order_of_torchvision(self, root):
        (root / 'train/a/more').symlink_to(root / 'val/a')
        (root / 'train/a/.hidden').mkdir()
        shutil.copy(root / 'train/a/0.png', root / 'train/a/.hidden')
        found = image_files.find(str(root)).train
        expected = DatasetFolder.make_dataset(str(root / 'train'), extensions=('.png', '.jpg'), class_to_idx=INDICES)
        expected = [each for each in expected if '.hidden' not in each[0]]
        assert list(zip(found.paths, found.targets, strict=True)) == expected
        assert len(found) == 20

    def test_a_pipe_is_named_and_not_waited_for(self, root):
        os.mkfifo(root / 'train/a/pipe.png')
        message = refusal(root=str(root))
        assert 'pipe.png (it is no regular file)' in message

    def test_a_folder_that_cannot_be_read_is_no_empty_one(self, root, monkeypatch):
        (root / 'train/a/closed').mkdir()
        scandir = os.scandir

        def refuse(folder):
            if str(folder).endswith('closed'):
                raise PermissionError(13, 'Permission denied', str(folder))
            return scandir(folder)

        monkeypatch.setattr(os, 'scandir', refuse)
        assert 'train/a/closed cannot be read: Permission denied' in refusal(root=str(root))


class TestReading:
    def test_images_that_cannot_be_read_are_all_named_before_training(self, root):
        (root / 'train' / 'a' / '0.png').write_bytes(b'')
        (root / 'val' / 'b' / '1.jpg').write_text('no image')
        message = refusal(root=str(root))
        assert '2 of 24 images in' in message
        assert 'a/0.png (the file is empty); ' in message
        assert 'b/1.jpg (no image of a known format)' in message
        assert 'move them out of the folder' in message

    @pytest.mark.parametrize('place', ['train/b/1.png', 'val/b/1.jpg'])
    def test_a_truncated_image_of_a_small_set_is_named_too(self, root, place):
        content = (root / place).read_bytes()
        (root / place).write_bytes(content[: len(content) // 2])
        assert f'{root / place} (' in refusal(root=str(root))

    def test_in_a_large_set_it_is_named_when_it_comes_or_if_all_are_checked(self, root, monkeypatch):
        monkeypatch.setattr(module, 'MOST_BYTES', 1000)
        content = (root / 'train/b/1.png').read_bytes()
        (root / 'train/b/1.png').write_bytes(content[: len(content) // 2])
        assert 'b/1.png (' in refusal(root=str(root), check=True)
        for arguments in ({}, {'check': False}):
            data = built(root, normalize='none', **arguments)
            with pytest.raises(ArgumentError, match=r'an image cannot be read: .*b/1\.png \(.*check: true finds'):
                batches_of(data.train)

    def test_every_kind_of_file_gives_the_same_grey(self, tmp_path):
        grey = np.full((4, 6), 100, dtype=np.uint8)
        grey[0, 0] = 7
        images = {mode: Image.fromarray(grey).convert(mode) for mode in ('L', 'RGB', 'RGBA', 'LA', 'P', 'CMYK')}
        images['I;16'] = Image.fromarray(grey.astype(np.uint16) * 257 + 100)
        images['I'] = Image.fromarray(grey.astype(np.int32) * 257 - 100)
        palette = images['P'].copy()
        palette.info['transparency'] = bytes([0, 128])
        images['transparent'] = palette
        for name, image in images.items():
            path = str(tmp_path / f'{name}.{"tif" if name in ("CMYK", "I") else "png"}')
            image.save(path)
            for channels in (1, 3, 4):
                pixels = decode(path, channels)
                assert pixels.shape == (channels, 4, 6)
                assert torch.equal(pixels[0], torch.from_numpy(grey)), name

    def test_a_photo_is_turned_as_its_camera_was_held(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
        image.save(tmp_path / 'a.png', exif=exif)
        assert decode(str(tmp_path / 'a.png'), 1)[0].tolist() == [[3, 0], [4, 1], [5, 2]]

    def test_numbers_without_a_range_are_no_image(self, root):
        Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(root / 'train' / 'a' / '9.tif')
        assert 'floating-point numbers, which have no fixed range' in refusal(root=str(root))

    def test_evaluation_sees_the_middle_square(self):
        image = torch.arange(60, dtype=torch.uint8).view(1, 6, 10)
        assert torch.equal(centre_square(image, 6), image[:, :, 2:8])
        expected = v2.functional.resize(image[:, :, 2:8], [3, 3], antialias=True)
        assert torch.equal(centre_square(image, 3), expected)


class TestInputs:
    def test_normalised_by_the_data_their_mean_is_0_and_their_deviation_1(self, written):
        data = built(written)
        inputs = torch.cat([inputs for inputs, _ in data.train])
        assert inputs.mean((0, 2, 3)).abs().max() < 1e-3
        assert (inputs.std((0, 2, 3)) - 1).abs().max() < 1e-2
        assert built(written, batch_size=3, seed=4).remarks == data.remarks

    def test_measured_on_some_they_are_spread_over_all_classes(self, written, monkeypatch):
        monkeypatch.setattr(image_batches, 'MEASURED', 3)
        read = []
        images = image_files.find(str(written)).train
        image_batches.measured(images, lambda path: read.append(path) or decode(path, 3), 'root')
        assert read == [images.paths[index] for index in (0, 6, 12)]

    @pytest.mark.parametrize(
        ('normalize', 'mean', 'std'),
        [('none', 0, 1), (None, 0, 1), ([0.5, 0.25], 0.5, 0.25), ({'mean': [0.5] * 3, 'std': 0.25}, 0.5, 0.25)],
    )
    def test_a_mean_and_a_deviation_can_be_given(self, written, normalize, mean, std):
        pixels = torch.cat([inputs for inputs, _ in built(written, normalize=normalize).evaluation]) * std + mean
        path = image_files.find(str(written)).evaluation.paths[0]
        expected = centre_square(decode(path, 3, at_least=16), 8) / 255
        torch.testing.assert_close(pixels[0], expected)

    def test_images_of_one_colour_have_no_deviation(self, tmp_path):
        for name in ('a', 'b'):
            (tmp_path / name).mkdir()
            for index in range(4):
                Image.new('L', (8, 8), 30).save(tmp_path / name / f'{index}.png')
        assert 'must be above 0, got (0.0, 0.0, 0.0)' in refusal(root=str(tmp_path), validation_split=0.5)


class TestAugmentation:
    def test_it_depends_on_seed_epoch_and_sample_alone(self, written, monkeypatch):
        arguments = {'augment': AUGMENT, 'seed': 3}
        expected = by_sample(built(written, **arguments).train, epoch=2)
        others = [
            built(written, **arguments, batch_size=7),
            built(written, **arguments, check=False),
        ]
        for other in others:
            found = by_sample(other.train, epoch=2)
            assert all(torch.equal(found[each], expected[each]) for each in expected)
        for changed in (by_sample(built(written, augment=AUGMENT, seed=4).train, 2), by_sample(others[0].train, 3)):
            assert not any(torch.equal(changed[each], expected[each]) for each in expected)
        monkeypatch.setattr(dist, 'get_world_size', lambda: 2)
        for rank in range(2):
            monkeypatch.setattr(dist, 'get_global_rank', lambda rank=rank: rank)
            found = by_sample(built(written, **arguments, batch_size=4).train, epoch=2)
            assert all(torch.equal(found[each], expected[each]) for each in found)

    def test_worker_processes_draw_the_same(self, written):
        one, two = (built(written, augment=AUGMENT, num_workers=workers).train for workers in (0, 1))
        expected, found = by_sample(one, epoch=1), by_sample(two, epoch=1)
        assert all(torch.equal(found[each], expected[each]) for each in expected)

    def test_threads_and_the_global_generator_neither_change_it_nor_are_changed(self, written, monkeypatch):
        data = built(written, augment=AUGMENT)
        torch.set_num_threads(2)
        try:
            torch.manual_seed(5)
            before, seen = torch.get_rng_state(), []
            augment = data.train.dataset.augment  # pyright: ignore[reportAttributeAccessIssue]
            transform = augment.transform
            monkeypatch.setattr(augment, 'transform', lambda x: seen.append(torch.get_num_threads()) or transform(x))
            first = batches_of(data.train)
            assert torch.equal(torch.get_rng_state(), before)
            assert torch.get_num_threads() == 2
            assert {*seen} == {1}
        finally:
            torch.set_num_threads(1)
        torch.manual_seed(6)
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, batches_of(data.train), strict=True))

    def test_a_mapping_a_list_and_names_say_the_same(self):
        image = torch.randint(256, (3, 9, 9), dtype=torch.uint8)
        crop = {'size': 5, 'interpolation': 'nearest'}
        spellings = (
            {'random_resized_crop': crop, 'random_horizontal_flip': None},
            [{'RandomResizedCrop': crop}, 'random-horizontal-flip'],
            {'random_order': {'transforms': [{'random_resized_crop': crop}]}, 'random_horizontal_flip': {}},
        )
        results = []
        for spelling in spellings:
            augment = augmentation.Augmentation(augmentation.read(spelling), seed=0)
            with augmentation.own_draws():
                results.append(augment(image, 1, 1))
                assert not torch.equal(augment(image, 2, 1), results[-1])
        assert torch.equal(results[0], results[1])
        assert results[2].shape == (3, 5, 5)

    def test_what_is_offered_turns_an_image_into_an_image(self):
        image = torch.randint(256, (3, 24, 24), dtype=torch.uint8)
        needed = {
            'size': 8, 'kernel_size': 3, 'padding': 1, 'degrees': 5, 'bits': 3, 'min_size': 8, 'max_size': 9,
            'threshold': 9, 'sharpness_factor': 2, 'target_size': [8, 8], 'quality': 50,
            'transforms': ['random_invert'],
        }  # fmt: skip
        for name, kind in augmentation.offered().items():
            parameters = inspect.signature(kind).parameters.values()
            arguments = {each.name: needed[each.name] for each in parameters if each.default is each.empty}
            transform = augmentation.read({name: arguments})
            if name == 'gaussian_noise':  # older releases of torchvision take only floats
                continue
            made = transform(image)
            assert made.dtype == torch.uint8
            assert made.ndim == 3

    def test_an_image_that_it_cannot_change_in_training_is_named(self, written):
        data = built(written, augment=['random_horizontal_flip'])
        data.train.dataset.augment.transform = lambda image: image.nothing  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(ArgumentError, match=r'augment cannot change .*\.png, got 3 x 1'):
            batches_of(data.train)


class TestMemory:
    def test_images_are_decoded_once_while_there_is_room(self, written, monkeypatch):
        opened = []
        original = Image.open
        monkeypatch.setattr(Image, 'open', lambda file: opened.append(file.name) or original(file))
        data = built(written, normalize='none')
        assert len(opened) == 48  # headers, then pixels
        batches_of(data.train)
        assert len(opened) == 48
        assert any('all decoded, 0.0 MiB kept' in each for each in data.remarks)
        monkeypatch.setattr(module, 'MOST_BYTES', 10 * 3 * 8 * 8)
        data = built(written, normalize='none')
        opened.clear()
        batches_of(data.train)
        batches_of(data.train)
        assert len(opened) == 18 + 8
        assert any('only their headers were read; check: true' in each for each in data.remarks)

    def test_what_was_decoded_is_not_sent_to_processes_that_are_no_forks(self, written):
        data = built(written, augment=AUGMENT)
        sent = pickle.loads(pickle.dumps(data.train.dataset))
        assert len(data.train.dataset.load._kept) == 18  # pyright: ignore[reportAttributeAccessIssue]
        assert not sent.load._kept
        assert torch.equal(sent[3][0], data.train.dataset[3][0])

    def test_worker_processes_keep_nothing(self, monkeypatch):
        kept = image_batches.Decoded(lambda path: torch.zeros(1), image_batches.Room(100))
        monkeypatch.setattr(image_batches, 'get_worker_info', object)
        kept('path')
        assert not kept._kept

    def test_large_images_can_be_kept_smaller(self, written):
        data = built(written, load_size=9, augment=['random_horizontal_flip'])
        shapes = {min(image.shape[1:]) for image in data.train.dataset.load._kept.values()}  # pyright: ignore[reportAttributeAccessIssue]
        assert shapes == {9}


def test_resuming_in_mid_epoch_sees_the_same_batches(written, tmp_path):
    class Record(Callback):
        def __init__(self):
            self.seen = []

        def before_forward(self, state, logger):
            self.seen.append((int(state.timestamp.batch), state.batch[0].clone()))

    def run(record, **arguments):
        data = built(written, augment=AUGMENT, batch_size=3, seed=5)
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
        trainer = Trainer(
            model=ComposerClassifier(network, num_classes=3),
            train_dataloader=data.train,
            optimizers=torch.optim.SGD(network.parameters(), lr=0.1),
            max_duration='2ep',
            callbacks=record,
            progress_bar=False,
            device='cpu',
            seed=1,
            **arguments,
        )
        trainer.fit()
        trainer.close()

    whole, resumed = Record(), Record()
    run(whole, save_folder=str(tmp_path), save_interval='1ba')
    run(resumed, load_path=str(tmp_path / 'ep1-ba9-rank0.pt'))
    assert [batch for batch, _ in resumed.seen] == [9, 10, 11]
    assert all(torch.equal(seen, whole.seen[batch][1]) for batch, seen in resumed.seen)


RECIPE = """
max_duration: 2ep
model: {name: mobilenet_v3_small}
data: {name: image_folder, root: %s, image_size: 32, batch_size: 8}
optimizer: {name: adamw, lr: 0.001}
algorithms: {ema: {half_life: 2ba}}
"""


class TestRecipes:
    @pytest.fixture
    def recipe(self, root, tmp_path, monkeypatch, register):
        monkeypatch.chdir(tmp_path)
        register('datasets', 'image_folder', image_folder)
        path = tmp_path / 'mine.yaml'
        path.write_text(RECIPE % root)
        return lambda *overrides: schema.load(path, overrides)

    def test_the_model_gets_the_classes_of_the_folder(self, recipe):
        found = rehearse(recipe())
        assert 'num_classes: 3' in found.recipe
        assert 'model.num_classes: 3, as many as image_folder has' in found.remarks
        assert found.parts['evaluates'].endswith('on 6 samples of val/')
        assert 'classes, training + evaluation: a 4 + 2, b 6 + 2, c 8 + 2' in found.remarks
        given = schema.plan(recipe('model.num_classes=5'))
        assert with_data(given) is given

    def test_errors_of_the_folder_are_at_their_key(self, recipe, root):
        with pytest.raises(schema.RecipeError, match=r'mine\.yaml: data\.root: root must be a folder'):
            build(recipe('data.root=nowhere'))
        with pytest.raises(schema.RecipeError, match=r"data\.augment: .*Did you mean 'random_crop'\?$"):
            build(recipe('data.augment={random_crp: {size: 8}}'))
        (root / 'val' / 'a' / '0.jpg').write_bytes(b'')
        with pytest.raises(schema.RecipeError, match=r'data\.root: 1 of 24 images .*a/0\.jpg \(the file is empty\)'):
            build(recipe())


def test_other_files_become_inputs_as_those_of_the_evaluation_and_are_read_anew(root, tmp_path):
    evaluated: Any = image_folder(root=str(root), image_size=8, batch_size=4).evaluation.dataset
    (inputs, targets), paths = evaluated.__getitems__(range(6)), evaluated.images.paths
    assert torch.equal(evaluated.inputs(paths), inputs)
    assert [evaluated.classes[target] for target in targets] == [Path(path).parent.name for path in paths]
    other = tmp_path / 'other.png'
    for index in (0, 5):
        shutil.copyfile(paths[index], other)
        assert torch.equal(evaluated.inputs([other])[0], inputs[index])
