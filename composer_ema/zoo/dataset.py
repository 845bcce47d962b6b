"""What a data set is to a recipe: a function that returns loaders, and that knows the length of an epoch beforehand.

A package registers one under the entry point group ``composer_ema.datasets``; see :func:`dataset`.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from composer import DataSpec, Evaluator
from composer.utils import dist
from torch.utils.data import DataLoader, IterableDataset

from composer_ema.spans import ArgumentError
from composer_ema.wording import counted
from composer_ema.zoo.checks import check_whole
from composer_ema.zoo.tokens import Tokenizer

#: What a data set evaluates on that holds nothing out of its training samples.
TEST_SET = 'the test set'
Batch = tuple[torch.Tensor, torch.Tensor]
_Builder = TypeVar('_Builder', bound=Callable[..., 'Data'])


@dataclass(frozen=True)
class Data:
    """The loaders of a data set, and what a model may have to know of it.

    Attributes:
        train: Batches to train on, shuffled: what `Trainer(train_dataloader=...)` takes, such as a `DataLoader` or a
            `DataSpec`.
        evaluation: Batches of the same kind, in fixed order, each sample once; an `Evaluator` may choose its metrics
            and how many batches it takes.
        num_classes: For batches `(inputs, targets)` whose targets are int64 `(n,)` in `[0, num_classes)`. Default:
            None, batches of any structure.
        input_shape: Shape of one of those inputs, which are float32. Default: None, not told.
        remarks: Sentences about what was found, to show before training. Default: none.
    """

    train: Any
    evaluation: Any
    num_classes: int | None = None
    input_shape: tuple[int, ...] | None = None
    remarks: Sequence[str] = ()

    @property
    def batches(self) -> int | None:
        """Batches in an epoch of training; None where the loader does not tell."""
        try:
            return len(loader_of(self.train))
        except (TypeError, NotImplementedError):  # of a stream
            return None

    def evaluator(self, label: str) -> Evaluator:
        """The evaluation under a label of ours."""
        own = self.evaluation
        if not isinstance(own, Evaluator):
            return Evaluator(label=label, dataloader=own)
        copied = copy.copy(own)
        copied.label = label
        return copied

    def samples(self, count: int = 2) -> Any:
        """A batch of the first samples of the training set, made as its loader makes them.

        Nothing is drawn from the loader, whose order and random numbers are those of the training.

        Returns:
            A batch; None where the samples of the loader have no numbers, as those of a stream.
        """
        loader = loader_of(self.train)
        dataset: Any = getattr(loader, 'dataset', None)
        if (
            not isinstance(loader, DataLoader)
            or isinstance(dataset, IterableDataset)
            or not hasattr(dataset, '__len__')
        ):
            return None
        indices = list(range(min(count, len(dataset))))
        fetch = getattr(dataset, '__getitems__', None) or (lambda chosen: [dataset[index] for index in chosen])
        batch = loader.collate_fn(fetch(indices))
        return self.train.batch_transforms(batch) if isinstance(self.train, DataSpec) else batch


def loader_of(data: Any) -> Any:
    """The loader within a DataSpec or an Evaluator, or the loader itself."""
    while isinstance(data, Evaluator | DataSpec):
        data = data.dataloader
    return data


@dataclass(frozen=True)
class Extent:
    """The length of an epoch of training.

    Attributes:
        samples: Samples in an epoch, at least 1.
        batch_size: Samples per step over all processes.
        drop_last: Whether an uneven last batch is dropped.
        tokens: Tokens in each sample; 0 where nothing counts them. Default: 0.
    """

    samples: int
    batch_size: int
    drop_last: bool
    tokens: int = 0

    @property
    def batches(self) -> int:
        """Batches in an epoch, equal to `len(data.train)` in any number of processes."""
        whole, rest = divmod(self.samples, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def samples_of(self, batch_in_epoch: int) -> int:
        """Samples in one batch; batches of an epoch are counted from 0."""
        return min(self.batch_size, self.samples - batch_in_epoch * self.batch_size)

    def batches_until(self, samples: int, batches_per_epoch: int) -> int:
        """After how many batches a run has seen so many samples.

        Args:
            samples: At least 1.
            batches_per_epoch: How many batches of each epoch it trains on, at least 1.

        Example:
            >>> Extent(10, 4, drop_last=False).batches_until(25, 3)
            8
        """
        # Several processes count a few samples twice, so that each of them gets as many.
        processes = dist.get_world_size()
        counted = min(math.ceil(self.samples / processes) * processes, batches_per_epoch * self.batch_size)
        epochs, rest = divmod(samples, counted)
        return epochs * batches_per_epoch + math.ceil(rest / self.batch_size)


@dataclass(frozen=True)
class Batching:
    """The arguments that all data sets share, checked on construction.

    Args:
        batch_size: Samples per training step over all processes; a multiple of their number.
        eval_batch_size: The same for evaluation.
        validation_split: Share of the training set held out for evaluation in place of the test set, in [0, 1).
        drop_last: Whether an uneven last training batch is dropped.
        num_workers: Worker processes per loader.
        seed: Seed of the order of training and of the augmentation, at least 0.

    Raises:
        ArgumentError: An argument is out of range.
    """

    batch_size: int
    eval_batch_size: int
    validation_split: float = 0.0
    drop_last: bool = False
    num_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        world_size = dist.get_world_size()
        for name in ('batch_size', 'eval_batch_size'):
            value = getattr(self, name)
            check_whole(name, value, 1, 'It counts the samples of one step over all processes.')
            if value % world_size != 0:
                raise ArgumentError(
                    f'{name} must be divisible by the number of processes, got {value} for {world_size} processes. '
                    f'Pass {name}={math.ceil(value / world_size) * world_size}.',
                    name,
                )
        split = self.validation_split
        if isinstance(split, bool) or not isinstance(split, int | float) or not 0 <= split < 1:
            raise ArgumentError(
                f'validation_split must be a share in [0, 1), got {split!r}. '
                'Pass 0.1 to hold out a tenth of the training set, 0 to evaluate on the test set.',
                'validation_split',
            )
        check_whole('num_workers', self.num_workers, 0, 'Pass 0 to load in the training process.')
        check_whole('seed', self.seed, 0, 'Pass any whole number from 0 on.')

    def count_held_out(self, samples: int) -> int:
        """How many of the training samples are held out for evaluation."""
        return min(max(1, round(self.validation_split * samples)), samples - 1) if self.validation_split > 0 else 0

    def check_last_batch(self, samples: int) -> None:
        """Raises an ArgumentError where the only batch of an epoch would be dropped."""
        if self.drop_last and self.batch_size > samples:
            raise ArgumentError(
                f'batch_size must not exceed the {counted(samples, "training sample")} with drop_last, '
                f'got {self.batch_size}: every batch would be dropped. Pass drop_last=False or a smaller batch_size.',
                'batch_size',
            )


def dataset(
    *,
    samples: Callable[[Mapping[str, Any]], int],
    classes: Callable[[Mapping[str, Any]], int] | None = None,
    evaluation: Callable[[Mapping[str, Any]], str] | None = None,
    tokens: Callable[[Mapping[str, Any]], int] | None = None,
    tokenizer: Callable[[Mapping[str, Any]], Tokenizer] | None = None,
) -> Callable[[_Builder], _Builder]:
    """Makes a function that returns :class:`Data` into a data set that recipes can name.

    The function takes keyword arguments with defaults, among them ``batch_size``. Three further names have a fixed
    meaning where it takes them: ``validation_split`` (the share of the training samples held out for evaluation),
    ``drop_last``, and ``seed``, which is the recipe's seed unless the recipe says otherwise. Its package registers it::

        [options.entry_points]
        composer_ema.datasets =
            rings = rings.data:rings

    Args:
        samples: From the function's arguments, defaults included, to the number of training samples, without reading
            them if that can be. A recipe's schedule is checked against it before the data are touched.
        classes: Likewise, to the number of classes, which a model then gets that is given none. Default: None, a model
            keeps its own default.
        evaluation: Likewise, to what it evaluates on where nothing is held out, in words. Default: :data:`TEST_SET`.
        tokens: Likewise, to the number of tokens in each sample, as Composer will count them, so that a recipe may give
            times in tok. Default: None, samples are not made of tokens.
        tokenizer: Likewise, to what made the tokens. A model that takes ``tokenizer`` gets it, and one that takes
            ``vocab_size`` its ``size``, where the recipe gives none. Default: None, the data set has none.

    Raises:
        TypeError: The function takes no ``batch_size``.

    Example:
        >>> @dataset(samples=lambda given: 80)
        ... def rings(*, batch_size: int = 8) -> Data: ...
        >>> extent(rings, {'batch_size': 16}).batches
        5
    """

    def register(builder: _Builder) -> _Builder:
        if 'batch_size' not in inspect.signature(builder).parameters:
            raise TypeError(f'the data set {builder.__name__} must take batch_size. Add batch_size: int = 128.')
        builder.training_samples = samples  # pyright: ignore[reportFunctionMemberAccess]
        builder.classes = classes  # pyright: ignore[reportFunctionMemberAccess]
        builder.evaluation = evaluation  # pyright: ignore[reportFunctionMemberAccess]
        builder.tokens_in_sample = tokens  # pyright: ignore[reportFunctionMemberAccess]
        builder.tokenizer = tokenizer  # pyright: ignore[reportFunctionMemberAccess]
        return builder

    return register


def counts_tokens(builder: Callable[..., Data]) -> bool:
    """Whether a data set tells how many tokens its samples have."""
    return getattr(builder, 'tokens_in_sample', None) is not None


def extent(builder: Callable[..., Data], arguments: Mapping[str, Any]) -> Extent | None:
    """The length of an epoch of a data set, without reading, making or downloading it.

    Args:
        builder: A function made by :func:`dataset`.
        arguments: Of that function; its defaults stand for the rest.

    Returns:
        Extent: None for a function that was not made by :func:`dataset`.

    Raises:
        ArgumentError: An argument is out of range.
    """
    samples_of = getattr(builder, 'training_samples', None)
    if samples_of is None:
        return None
    given = _filled(builder, arguments)
    shared = {each.name: given[each.name] for each in dataclasses.fields(Batching) if given.get(each.name) is not None}
    batching = Batching(**{'eval_batch_size': given['batch_size'], **shared})
    samples = samples_of(given)
    samples -= batching.count_held_out(samples)
    batching.check_last_batch(samples)
    tokens_of = getattr(builder, 'tokens_in_sample', None)
    tokens = 0 if tokens_of is None else tokens_of(given)
    return Extent(samples, batching.batch_size, batching.drop_last, tokens)


def num_classes(builder: Callable[..., Data], arguments: Mapping[str, Any]) -> int | None:
    """The number of classes of a data set, without reading it; None where it does not tell. As for :func:`extent`."""
    classes = getattr(builder, 'classes', None)
    return None if classes is None else classes(_filled(builder, arguments))


def evaluation_set(builder: Callable[..., Data], arguments: Mapping[str, Any]) -> str:
    """What a data set evaluates on where nothing is held out, in words. As for :func:`extent`."""
    evaluation = getattr(builder, 'evaluation', None)
    return TEST_SET if evaluation is None else evaluation(_filled(builder, arguments))


def tokenizer_of(builder: Callable[..., Data], arguments: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer of a data set; None where it has none. As for :func:`extent`."""
    tokenizer = getattr(builder, 'tokenizer', None)
    return None if tokenizer is None else tokenizer(_filled(builder, arguments))


def _filled(builder: Callable[..., Data], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments and the defaults of the rest."""
    parameters = inspect.signature(builder).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty} | dict(arguments)
