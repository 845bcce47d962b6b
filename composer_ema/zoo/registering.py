"""Decorators by which a user's own file offers data sets, models and more to recipes that name it under ``code_paths``.

They are offered by :mod:`composer_ema.recipe`::

    from composer_ema.recipe import register_dataset, register_model
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from composer_ema.zoo.plugins import Registered, register

_T = TypeVar('_T', bound=Callable[..., Any])


def register_dataset(
    name: str,
    *,
    samples: int | Callable[[Mapping[str, Any]], int] | None = None,
    tokens: int | Callable[[Mapping[str, Any]], int] | None = None,
) -> Callable[[_T], _T]:
    """Lets recipes name a data set of your own: ``data: {name: rings, points: 2000, batch_size: 32}``.

    The function takes keyword arguments, which the recipe gives. It returns a pair for training and evaluation, each a
    data set of torch or a list of samples, of which the recipe makes batches, or a ``DataLoader``, ``DataSpec`` or
    ``Evaluator`` of its own; or a :class:`composer_ema.zoo.dataset.Data`.

    Of a function that returns data sets, recipes may also give ``batch_size`` (default: 128), ``eval_batch_size``
    (the same), ``validation_split``, ``drop_last``, ``num_workers`` and ``seed``, which the function need not take.

    Args:
        name: Its name in recipes.
        samples: The number of training samples, or a function that tells it from the arguments, without reading them.
            A schedule is then checked before the data are read, and ``composer-ema plot`` can draw it. Default: None,
            not known before.
        tokens: The number of tokens in each sample, or a function that tells it from the arguments. A recipe may then
            give times in tok. Composer counts the tokens of batches that are mappings with ``input_ids``; for others,
            return a ``DataSpec`` with ``get_num_tokens_in_batch``. Default: None, nothing counts tokens.

    Raises:
        ValueError: The name is taken.

    Example:
        >>> @register_dataset('squares', samples=80)
        ... def squares(*, power: int = 2):
        ...     data = [(torch.tensor([float(x)]), torch.tensor(x**power)) for x in range(100)]
        ...     return data[:80], data[80:]
    """

    _check_name('datasets', name)

    def decorate(function: _T) -> _T:
        from composer_ema.zoo.own_data import own_dataset  # it imports Composer

        _register('datasets', name, own_dataset(function, samples, tokens), function)
        return function

    return decorate


def register_model(name: str) -> Callable[[_T], _T]:
    """Lets recipes name a model of your own: ``model: {name: mine, width: 64}``.

    The class or function takes keyword arguments, which the recipe gives. It returns a ``ComposerModel`` with its own
    loss and metrics, or a network, which is trained as a classifier of ``num_classes`` classes: an argument, or an
    attribute of the network.

    Args:
        name: Its name in recipes.

    Raises:
        ValueError: The name is taken.
    """
    return _decorator('models', name)


def register_callback(name: str) -> Callable[[_T], _T]:
    """Lets recipes name a ``composer.Callback`` of your own: ``callbacks: {mine: {}}``."""
    return _decorator('callbacks', name)


def register_algorithm(name: str) -> Callable[[_T], _T]:
    """Lets recipes name a ``composer.Algorithm`` of your own: ``algorithms: {mine: {}}``."""
    return _decorator('algorithms', name)


def register_logger(name: str) -> Callable[[_T], _T]:
    """Lets recipes name a ``LoggerDestination`` of your own: ``loggers: {mine: {}}``."""
    return _decorator('loggers', name)


def register_optimizer(name: str) -> Callable[[_T], _T]:
    """Lets recipes name a ``torch.optim.Optimizer`` of your own: ``optimizer: {name: mine, lr: 0.1}``."""
    return _decorator('optimizers', name)


def register_scheduler(name: str) -> Callable[[_T], _T]:
    """Lets recipes name a scheduler of your own, torch's kind or Composer's: ``scheduler: {name: mine}``."""
    return _decorator('schedulers', name)


def _decorator(kind: str, name: str) -> Callable[[_T], _T]:
    _check_name(kind, name)

    def decorate(value: _T) -> _T:
        _register(kind, name, value, value)
        return value

    return decorate


def _check_name(kind: str, name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f'a name in recipes is a string, got {name!r}. Write @register_{kind[:-1]}("name").')
    if not re.fullmatch(r'[A-Za-z_][\w.-]*', name):
        raise ValueError(f'a name in recipes has letters, digits, _, - and ., got {name!r}. Write another one.')


def _register(kind: str, name: str, value: Any, written: Any) -> None:
    if not callable(written):
        raise TypeError(f'{name!r} must be a class or a function, got {written!r}. Put the decorator above one.')
    register(Registered(kind, name, value, _where()))


def _where() -> str:
    """The file and the line of the user's decorator."""
    frame = sys._getframe(3)  # of this, _register() and decorate()
    return f'{frame.f_code.co_filename}, line {frame.f_lineno},'
