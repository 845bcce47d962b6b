"""What a model takes that the data know, and the recipe does not give: the number of classes, the tokenizer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from composer_ema.recipe.arguments import signature
from composer_ema.recipe.schema import Plan
from composer_ema.zoo.dataset import num_classes, tokenizer_of

CLASSES, TOKENIZER, VOCABULARY = 'num_classes', 'tokenizer', 'vocab_size'


def with_data(checked: Plan) -> Plan:
    """The plan with ``model.num_classes``, ``model.tokenizer`` and ``model.vocab_size`` from the data set.

    Each is filled in where the model takes it and the recipe gives none.

    Raises:
        RecipeError: The data set cannot tell, since an argument of it is wrong; or the model names another tokenizer.
    """
    return _with_vocabulary(_with_classes(checked))


def _with_classes(checked: Plan) -> Plan:
    if not _is_missing(CLASSES, checked):
        return checked
    classes = checked.data.attempt(lambda arguments: num_classes(checked.data.factory, arguments))
    if classes is None:
        return checked
    remark = f'model.{CLASSES}: {classes:,}, as many as {checked.data.name} has'
    recipe = checked.recipe
    resolved = recipe.replace(model={**recipe.values['model'], CLASSES: classes})
    remarked = dataclasses.replace(resolved, remarks=(*recipe.remarks, remark))
    return dataclasses.replace(_with_arguments(checked, {CLASSES: classes}), recipe=remarked)


def _with_vocabulary(checked: Plan) -> Plan:
    """Fills in the tokenizer, which is an object and so no part of the recipe that a run writes down, and its size."""
    place, data = checked.model.place, checked.data
    own, of_data = checked.model.arguments.get(TOKENIZER), checked.data_argument(TOKENIZER)
    if own is not None and of_data is not None and own != of_data:
        raise (place / TOKENIZER).error(
            f'{own!r} is not the tokenizer of the data, {of_data!r}. Leave it out, and the model has that of the data.'
        )
    missing = [name for name in (TOKENIZER, VOCABULARY) if _is_missing(name, checked)]
    tokenizer = data.attempt(lambda arguments: tokenizer_of(data.factory, arguments)) if missing else None
    if tokenizer is None:
        return checked
    found = {TOKENIZER: tokenizer, VOCABULARY: tokenizer.size}
    return _with_arguments(checked, {name: found[name] for name in missing})


def _is_missing(name: str, checked: Plan) -> bool:
    """Whether the model takes an argument that the recipe does not give."""
    factory = checked.model.factory
    builder = factory.args[0] if isinstance(factory, functools.partial) else factory
    return name in signature(builder) and checked.model.arguments.get(name) is None


def _with_arguments(checked: Plan, arguments: dict[str, Any]) -> Plan:
    model = checked.model
    return dataclasses.replace(checked, model=dataclasses.replace(model, arguments={**model.arguments, **arguments}))
