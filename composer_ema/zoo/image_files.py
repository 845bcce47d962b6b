"""Finds the images of a folder by class: which files train, which evaluate, and what is left out. Reads no image."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file

from composer_ema.spans import ArgumentError
from composer_ema.wording import counted, suggestion

TRAINING = 'train'
#: The folders to evaluate on; the first that is there counts.
EVALUATION = ('val', 'validation', 'valid', 'test')
#: How many names a message lists.
LISTED = 10
_LAYOUTS = (
    'Put images into ROOT/train/CLASS/ and ROOT/val/CLASS/, or into ROOT/CLASS/ with validation_split: 0.2, and '
    'pass root: ROOT.'
)


@dataclass(frozen=True)
class Images:
    """Image files, sorted by class and then by path.

    Args:
        paths: One per image.
        targets: The index of the class of each.
    """

    paths: Sequence[str] = ()
    targets: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Iterable[int]) -> Images:
        """The images at these indices."""
        kept = list(indices)
        return Images([self.paths[each] for each in kept], [self.targets[each] for each in kept])


@dataclass(frozen=True)
class Found:
    """The images of a folder.

    Args:
        classes: Names of the classes, in the order of their indices.
        train: What trains.
        evaluation: What evaluates. Default: nothing; :meth:`held_out` gives some.
        evaluated: Name of the folder of ``evaluation``. Default: None, there is none.
        left_out: How many files have an ending that no image has, by ending. Default: none.
    """

    classes: Sequence[str]
    train: Images
    evaluation: Images = field(default_factory=Images)
    evaluated: str | None = None
    left_out: Counter[str] = field(default_factory=Counter)

    def held_out(self, count: int) -> tuple[Images, Images]:
        """The training images without ``count`` of them, and those, of which each class gives the same share.

        Which ones depends on the files and the count alone; fewer are a part of more.

        Raises:
            ArgumentError: A class would have no training image left.
        """
        order = _by_share(self.train.targets)
        train, held_out = self.train.take(sorted(order[count:])), self.train.take(sorted(order[:count]))
        for lost in sorted({*self.train.targets} - {*train.targets}):
            raise ArgumentError(
                f'validation_split must leave each class an image to train on, and {self.classes[lost]!r} has '
                f'{counted(self.train.targets.count(lost), "image")}. Add images to it, or pass a smaller share.',
                'validation_split',
            )
        return train, held_out


def find(root: object, *, validation_split: float = 0.0, evaluation_folder: str | None = None) -> Found:
    """Lists the images of ``root/train/<class>/`` and of a second folder like it, or of ``root/<class>/``.

    An image is a file with one of torchvision's endings, in the folder of its class or below. What has a name that
    begins with a dot is left out.

    Args:
        root: The folder.
        validation_split: Above 0, no second folder is needed, and none is listed unless ``evaluation_folder`` is given.
        evaluation_folder: Name of the second folder. Default: the first of :data:`EVALUATION` that is there.

    Raises:
        ArgumentError: The folder is missing or laid out in another way, a class has no images, or the classes of the
            two folders differ.
    """
    folder = _checked(root)
    if evaluation_folder is not None and validation_split > 0:
        raise ArgumentError(
            f'evaluation_folder cannot be combined with validation_split={validation_split}, got '
            f'{evaluation_folder!r}: the one evaluates on a folder, the other on training images. Leave one out.',
            'evaluation_folder',
        )
    if not _folders(folder / TRAINING):
        return _of_one_folder(folder, validation_split, evaluation_folder)
    classes, train, left_out = _listed(folder / TRAINING)
    if validation_split > 0:
        return Found(classes, train, left_out=left_out)
    name = _second(folder, evaluation_folder)
    others, evaluation, further = _listed(folder / name)
    if others != classes:
        raise ArgumentError(_differing(folder, name, classes, others), 'root')
    return Found(classes, train, evaluation, name, left_out + further)


def named(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f' and {len(names) - LISTED:,} more' if len(names) > LISTED else ''
    return ', '.join(names[:LISTED]) + more


def by_number(numbers: Counter[str]) -> str:
    """Names with their numbers, the most frequent first: ``'12 .heic, 3 .txt'``."""
    return ', '.join(f'{count:,} {name}' for name, count in numbers.most_common(LISTED))


def _checked(root: object) -> Path:
    if not isinstance(root, str) or not root:
        raise ArgumentError(f'root must be the path of a folder of images, got {root!r}. {_LAYOUTS}', 'root')
    folder = Path(root).expanduser()
    if not folder.is_dir():
        what = 'a file' if folder.exists() else f'no folder{"" if folder.is_absolute() else f" in {Path.cwd()}"}'
        raise ArgumentError(f'root must be a folder of images, and {root!r} is {what}. {_LAYOUTS}', 'root')
    return folder


def _of_one_folder(folder: Path, validation_split: float, evaluation_folder: str | None) -> Found:
    if second := [each for each in EVALUATION if _folders(folder / each)]:
        images = len(_images(folder / TRAINING))
        raise ArgumentError(
            f'{str(folder)!r} has {second[0]}/, and {TRAINING}/ '
            + (f'holds {counted(images, "image")} and no folder of a class' if images else 'with folders is missing')
            + f'. {_LAYOUTS}',
            'root',
        )
    classes, images, left_out = _listed(folder)
    if evaluation_folder is not None or validation_split <= 0:
        beside = f' To evaluate on another folder, pass root: {folder.parent}.' if folder.name == TRAINING else ''
        raise ArgumentError(
            f'validation_split must be given for {str(folder)!r}, which has no {TRAINING}/ with folders, '
            f'only {named(classes)}; got {validation_split}. Pass 0.2 to hold out a fifth of the images.{beside}',
            'validation_split',
        )
    return Found(classes, images, left_out=left_out)


def _second(folder: Path, asked: str | None) -> str:
    """The name of the folder to evaluate on."""
    there = [each for each in _folders(folder) if each != TRAINING]
    if asked is not None:
        if asked not in there:
            remedy = suggestion(asked, there, 'There are')
            raise ArgumentError(
                f'evaluation_folder must be a folder in {str(folder)!r}, got {asked!r}. {remedy}', 'evaluation_folder'
            )
        return asked
    for each in EVALUATION:
        if each in there:
            return each
    others = f', only {named(there)}' if there else ''
    raise ArgumentError(
        f'{str(folder)!r} has {TRAINING}/ and none of {", ".join(f"{each}/" for each in EVALUATION)} to evaluate '
        f'on{others}. Add one, name another with evaluation_folder, or hold out a tenth of the training images with '
        'validation_split: 0.1.',
        'root',
    )


def _listed(folder: Path) -> tuple[list[str], Images, Counter[str]]:
    """Classes, images, and endings of other files."""
    left_out: Counter[str] = Counter()

    def is_legal(path: str) -> bool:
        if any(part.startswith('.') for part in Path(path).relative_to(folder).parts):
            return False
        if not is_image_file(path):
            left_out[os.path.splitext(path)[1].lower() or 'without an ending'] += 1
            return False
        return True

    classes = _folders(folder)
    if not classes:
        images = len(_images(folder))
        raise ArgumentError(
            f'{str(folder)!r} must hold a folder for each class, and holds {counted(images, "image")} and no folder. '
            f'{_LAYOUTS}',
            'root',
        )
    indices = {name: index for index, name in enumerate(classes)}
    samples = [
        (path, index) for name, index in indices.items() for path in _files(str(folder / name)) if is_legal(path)
    ]
    found = {target for _, target in samples}
    if empty := [name for name, index in indices.items() if index not in found]:
        others = f' Other files there: {by_number(left_out)}.' if left_out else ''
        raise ArgumentError(
            f'{str(folder)!r} must hold images for each class, and there are none in {named(empty)}: no files that end '
            f'in {", ".join(IMG_EXTENSIONS)}.{others} Add images, or move what is no class elsewhere.',
            'root',
        )
    return classes, Images([path for path, _ in samples], [target for _, target in samples]), left_out


def _differing(folder: Path, name: str, classes: Sequence[str], others: Sequence[str]) -> str:
    missing = [each for each in classes if each not in others]
    unknown = [each for each in others if each not in classes]
    said = [f'{one}/ has {named(each)}, and {two}/ has not' for one, two, each in (
        (TRAINING, name, missing), (name, TRAINING, unknown)
    ) if each]  # fmt: skip
    return (
        f'{str(folder)!r} must have the same classes in {TRAINING}/ and {name}/, and {"; ".join(said)}. Rename the '
        'folders, or add the missing ones with images.'
    )


def _by_share(targets: Sequence[int]) -> list[int]:
    """All indices, so that every beginning of the list has about the same share of each class."""
    generator = torch.Generator().manual_seed(0)  # a constant: runs with different seeds evaluate on the same samples
    drawn = torch.randperm(len(targets), generator=generator).tolist()
    sizes, before = Counter(targets), Counter[int]()
    keys = []
    for place, index in enumerate(drawn):
        keys.append(((before[targets[index]] + 0.5) / sizes[targets[index]], place, index))
        before[targets[index]] += 1
    return [index for *_, index in sorted(keys)]


def _folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted; none where that is no folder."""
    if not folder.is_dir():
        return []
    return sorted(each.name for each in _entries(folder) if each.is_dir() and not each.name.startswith('.'))


def _images(folder: Path) -> list[str]:
    return [each.name for each in _entries(folder) if is_image_file(each.name)] if folder.is_dir() else []


def _files(folder: str) -> list[str]:
    """The files in a folder and below, by folder and then by name, the order of torchvision's `ImageFolder`."""
    return [f'{place}{os.sep}{name}' for place, names in sorted(_walk(folder, ())) for name in names]


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Each folder with its files. It follows links, but for those that lead back."""
    real = os.path.realpath(folder)
    if any(Path(each).is_relative_to(real) for each in above):
        raise ArgumentError(
            f'{folder} is a link back to {real}, in which it stands: its images would count again and again, and for '
            'the wrong class. Remove the link.',
            'root',
        )
    entries = [each for each in _entries(folder) if not each.name.startswith('.')]
    folders = sorted(each.name for each in entries if each.is_dir())
    yield folder, sorted(each.name for each in entries if not each.is_dir())
    for name in folders:
        yield from _walk(f'{folder}{os.sep}{name}', (*above, real))


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except OSError as error:
        raise ArgumentError(
            f'{folder} cannot be read: {error.strerror}. Make it readable, or move it out of the folder of images.',
            'root',
        ) from error
