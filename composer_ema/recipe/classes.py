"""The number of classes of the data, for a model that takes one and is given none."""

from __future__ import annotations

import dataclasses
import functools

from composer_ema.recipe.arguments import signature
from composer_ema.recipe.schema import Plan
from composer_ema.zoo.dataset import num_classes

KEY = 'num_classes'


def with_classes(checked: Plan) -> Plan:
    """The plan with ``model.num_classes`` from the data set, where the model takes it and the recipe gives none.

    Raises:
        RecipeError: The data set cannot tell, since an argument of it is wrong.
    """
    model, recipe = checked.model, checked.recipe
    builder = model.factory.args[0] if isinstance(model.factory, functools.partial) else model.factory
    if KEY in model.arguments or KEY not in signature(builder):
        return checked
    classes = checked.data.attempt(lambda arguments: num_classes(checked.data.factory, arguments))
    if classes is None:
        return checked
    remark = f'model.{KEY}: {classes:,}, as many as {checked.data.name} has'
    resolved = recipe.replace(model={**recipe.values['model'], KEY: classes})
    return dataclasses.replace(
        checked,
        recipe=dataclasses.replace(resolved, remarks=(*recipe.remarks, remark)),
        model=dataclasses.replace(model, arguments={**model.arguments, KEY: classes}),
    )
