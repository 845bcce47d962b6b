"""Sends a first batch through a model before it trains, so that the error for a misfit names the recipe's keys."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from composer.models import ComposerClassifier, ComposerModel

from composer_ema.recipe.arguments import Place, said
from composer_ema.recipe.schema import Plan
from composer_ema.recipe.trouble import line_of
from composer_ema.zoo.dataset import Data
from composer_ema.zoo.models import is_plain_classifier


def check(model: ComposerModel, data: Data, checked: Plan) -> None:
    """Computes outputs, loss and evaluation metrics of a first batch, where the data can tell one without a draw.

    Of a data set that tells its ``input_shape``, that is one sample of zeros. The model and the random numbers of the
    run are left as they were.

    Raises:
        RecipeError: At the model, whose metrics cannot be read, or which cannot take the batch; at
            ``model.num_classes``, where the data have more classes than it predicts; or at the data, whose first
            samples cannot be read.
    """
    place, is_told = checked.model.place, data.input_shape is not None and data.num_classes is not None
    with _untouched(model), torch.no_grad():
        metrics = _metrics(model, place)
        batch = _zeros(data) if is_told else _first(data, checked.data.place)
        if batch is None:
            return
        if is_plain_classifier(model) and not is_told:
            _check_are_classes(batch, checked.model.name, place)
        try:
            outputs = model(batch) if is_told else _run(model, batch, metrics)
        except Exception as error:  # the model or its metrics may be anybody's
            if is_told and not isinstance(error, RuntimeError | ValueError):
                raise
            what = f'inputs of shape {data.input_shape}' if is_told else f'a batch of {describe(batch)}'
            raise place.error(f'cannot take {what}, which data gives: {said(error)}{line_of(error)}') from error
    is_of_logits = isinstance(model, ComposerClassifier) and isinstance(outputs, torch.Tensor) and outputs.ndim > 1
    predicted = outputs.shape[-1] if is_of_logits else getattr(model, 'num_classes', None)
    if isinstance(predicted, int):
        _check_classes(predicted, data, place)


def describe(batch: Any) -> str:
    """The kinds and shapes in a batch: ``'float32 (2, 40), int64 (2,)'``."""
    if isinstance(batch, torch.Tensor):
        return f'{str(batch.dtype).removeprefix("torch.")} {tuple(batch.shape)}'
    if isinstance(batch, Mapping):
        return ', '.join(f'{name}: {describe(each)}' for name, each in batch.items())
    if isinstance(batch, tuple | list):
        return ', '.join(map(describe, batch))
    return type(batch).__name__


def _metrics(model: ComposerModel, place: Place) -> Mapping[str, Any]:
    """Those of evaluations. Composer asks for both kinds before training."""
    try:
        model.get_metrics(is_train=True)
        return model.get_metrics(is_train=False)
    except Exception as error:  # the model may be anybody's
        raise place.error(
            f'its metrics cannot be read: {said(error)}{line_of(error)}. Pass one metric of torchmetrics, or several '
            'as a MetricCollection([...]).'
        ) from error


def _zeros(data: Data) -> Any:
    assert data.input_shape is not None
    return torch.zeros(1, *data.input_shape), torch.zeros(1, dtype=torch.long)


def _first(data: Data, place: Place) -> Any:
    try:
        return data.samples()
    except Exception as error:  # the data may be anybody's
        raise place.error(f'its first samples cannot be read: {said(error)}{line_of(error)}') from error


def _run(model: ComposerModel, batch: Any, metrics: Mapping[str, Any]) -> Any:
    outputs = model(batch)
    model.loss(outputs, batch)
    batch = copy.deepcopy(batch)  # HuggingFaceModel takes the labels out and changes them
    evaluated = model.eval_forward(batch)
    for metric in metrics.values():
        model.update_metric(batch, evaluated, copy.deepcopy(metric))
    return outputs


def _check_are_classes(batch: Any, name: str, place: Place) -> None:
    is_pair = isinstance(batch, tuple | list) and len(batch) == 2
    targets = batch[1] if is_pair else None
    if isinstance(targets, torch.Tensor) and targets.ndim == 1 and not targets.is_floating_point():
        return
    raise place.error(
        f'{name} returns a network, which is trained to predict the classes in batches (inputs, targets) with targets '
        f'int64 (n,), and data gives {describe(batch)}. Let it return a ComposerModel with its own loss and metrics, '
        'such as ComposerClassifier(network, loss_fn=..., train_metrics=..., val_metrics=...).'
    )


def _check_classes(predicted: int, data: Data, place: Place) -> None:
    if data.num_classes is not None and predicted < data.num_classes:
        raise (place / 'num_classes').error(
            f'must be at least {data.num_classes}, the classes of the data, got {predicted}.'
        )


@contextlib.contextmanager
def _untouched(model: torch.nn.Module) -> Iterator[None]:
    """Puts back the mode of the model and the generators that a stranger's code may draw from."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        model.train(was_training)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
