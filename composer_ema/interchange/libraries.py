"""Finds the libraries whose files are written, and builds their models without memory for the weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from composer_ema.checkpoints.safely import CheckpointError


def library(name: str) -> Any:
    """The library ``name``.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CheckpointError(
            f'format={format!r} needs {name}, which cannot be imported: {error}. Install it with: '
            "pip install 'composer-ema[doors]'"
        ) from error


def built(build: Callable[[], nn.Module], what: str) -> nn.Module:
    """A model with names and shapes, and no values.

    Args:
        build: builds it.
        what: the model and its settings, in the words of an error.

    Raises:
        CheckpointError: the library refuses the settings.
    """
    try:
        try:
            with torch.device('meta'):
                return build()
        except (RuntimeError, NotImplementedError):  # it computes with values as it is built
            return build()
    except Exception as error:  # of the library, in whatever words
        raise CheckpointError(
            f'{what} cannot be built: {error}. Pass the config of the model, as in config=...'
        ) from error
