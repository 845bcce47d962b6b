"""Data sets of a user's own: from whatever their function returns to the loaders of a run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from composer import DataSpec, Evaluator
from composer.utils import dist
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from composer_ema.spans import ArgumentError
from composer_ema.zoo.dataset import Batching, Data
from composer_ema.zoo.loading import held_out_order, spread

#: What a recipe may give to every data set whose loaders it makes, with the kinds and defaults.
_SHARED: dict[str, tuple[Any, Any]] = {
    'batch_size': (int, 128),
    'eval_batch_size': (int | None, None),
    'validation_split': (float, 0.0),
    'drop_last': (bool, False),
    'num_workers': (int, 0),
    'seed': (int, 0),
}
_REMEDY = 'Return a pair for training and evaluation, each a torch Dataset, a list of samples or a DataLoader.'


def own_dataset(
    function: Callable[..., Any],
    samples: int | Callable[[Mapping[str, Any]], int] | None = None,
    tokens: int | Callable[[Mapping[str, Any]], int] | None = None,
) -> Callable[..., Data]:
    """A data set for recipes of a function that returns a pair; see :mod:`composer_ema.zoo.registering`.

    Args:
        function: It takes keyword arguments.
        samples: The number of training samples, or a function that tells it from the arguments. Default: not known.
        tokens: The number of tokens in each sample, likewise. Default: nothing counts tokens.
    """
    own = inspect.signature(function)
    takes_all = any(each.kind is each.VAR_KEYWORD for each in own.parameters.values())

    @functools.wraps(function)
    def build(**arguments: Any) -> Data:
        shared = {name: arguments.get(name, default) for name, default in defaults.items()}
        if 'validation_split' in own.parameters:  # it holds them out itself
            shared['validation_split'] = 0.0
        kept = {name: value for name, value in arguments.items() if name in own.parameters or takes_all}
        returned = function(**kept)
        # The recipe gives its own seed, whether or not there is a use for it.
        return _as_data(returned, shared, [name for name in arguments if name not in kept and name != 'seed'])

    further = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in _SHARED.items()
        if name not in own.parameters
    ]
    last = [each for each in own.parameters.values() if each.kind is each.VAR_KEYWORD]
    first = [each for each in own.parameters.values() if each.kind is not each.VAR_KEYWORD]
    full = own.replace(parameters=[*first, *further, *last])
    defaults = {name: full.parameters[name].default for name in _SHARED}
    described: Any = build
    described.__signature__ = full
    if samples is not None:
        described.training_samples = samples if callable(samples) else lambda given: samples
    if tokens is not None:
        described.tokens_in_sample = tokens if callable(tokens) else lambda given: tokens
    return build


def _as_data(returned: Any, shared: Mapping[str, Any], unused: Sequence[str]) -> Data:
    """The loaders of what a function returned.

    Args:
        returned: A pair, or Data.
        shared: The arguments for loaders.
        unused: Those of them that the recipe gives and the function does not take.

    Raises:
        TypeError: It returned something else.
        ArgumentError: The recipe says how to make loaders, and the function has made them.
    """
    if isinstance(returned, Data):
        train, evaluation = returned.train, returned.evaluation
    elif isinstance(returned, tuple | list) and len(returned) == 2:  # random_split returns a list
        train, evaluation = returned
    elif isinstance(returned, Dataset):
        train, evaluation = returned, None
    else:
        raise TypeError(f'the function of the data set returned {_kind(returned)}. {_REMEDY}')
    if _is_loader(train) and _is_loader(evaluation):
        _check_unused(unused)
        return returned if isinstance(returned, Data) else Data(train, evaluation)
    sizes = {**shared, 'eval_batch_size': shared['eval_batch_size'] or shared['batch_size']}
    batching = Batching(**sizes)
    if batching.validation_split > 0:
        train, evaluation = _split(train, batching)
    elif evaluation is None:
        raise TypeError(
            'the function of the data set returned nothing to evaluate on. Write validation_split: 0.1 in the recipe, '
            'which holds out a tenth of the training set, or return a pair.'
        )
    return Data(
        train if _is_loader(train) else _loader(train, batching, batching.batch_size, is_training=True),
        evaluation
        if _is_loader(evaluation)
        else _loader(evaluation, batching, batching.eval_batch_size, is_training=False),
    )


def _is_loader(each: Any) -> bool:
    if isinstance(each, DataLoader | DataSpec | Evaluator):
        return True
    # Composer takes any iterable of batches; a list is one of samples.
    return hasattr(each, '__iter__') and not isinstance(each, Dataset | Sequence)


def _check_unused(unused: Sequence[str]) -> None:
    if unused:
        raise ArgumentError(
            f'{unused[0]} has no effect: the function of the data set makes its own loaders. Let it take '
            f'{unused[0]}, or return data sets.',
            unused[0],
        )


def _split(train: Any, batching: Batching) -> tuple[Any, Any]:
    if _is_loader(train) or isinstance(train, IterableDataset):
        raise ArgumentError(
            f'validation_split holds samples out of a data set, and the function returned {_kind(train)} for training. '
            'Leave it out, or let the function take it.',
            'validation_split',
        )
    order = held_out_order(len(train))
    count = batching.count_held_out(len(order))
    return Subset(train, order[count:].tolist()), Subset(train, order[:count].tolist())


def _loader(dataset: Any, batching: Batching, batch_size: int, *, is_training: bool) -> DataLoader[Any]:
    """Batches of a data set, whose order is drawn from seed and epoch in training and fixed otherwise."""
    if not hasattr(dataset, '__getitem__') and not isinstance(dataset, IterableDataset):
        raise TypeError(f'the function of the data set returned {_kind(dataset)} in its pair. {_REMEDY}')
    drop_last = is_training and batching.drop_last
    sampler = None
    if not isinstance(dataset, IterableDataset):
        if is_training:
            batching.check_last_batch(len(dataset))
        sampler = dist.get_sampler(dataset, shuffle=is_training, drop_last=drop_last, seed=spread(batching.seed))
    return DataLoader(
        dataset,
        batch_size=batch_size // dist.get_world_size(),
        sampler=sampler,
        drop_last=drop_last,
        num_workers=batching.num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(batching.seed),  # see composer_ema.zoo.loading
    )


def _kind(value: Any) -> str:
    if value is None:
        return 'nothing'
    return f'a tuple of {len(value)}' if isinstance(value, tuple) else f'an object of type {type(value).__name__}'
