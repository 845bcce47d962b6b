"""The optimizer of a recipe: groups of parameters by pattern, and early errors about what it cannot train."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import nn

from composer_ema.model.names import listed
from composer_ema.recipe.arguments import Place, check_arguments
from composer_ema.recipe.named import Named

_MATCH = 'match'


@dataclass(frozen=True)
class Group:
    """Options for the parameters whose names match a pattern.

    Args:
        place: The key of the entry.
        match: Regular expression, searched for in the names of ``model.named_parameters()``.
        options: Arguments of the optimizer for these parameters alone.
    """

    place: Place
    match: str
    options: dict[str, Any]


def read(section: Any, place: Place, optimizer: Named) -> list[Group]:
    """Reads ``param_groups`` and lets the optimizer check the options of each group.

    Args:
        section: The value of the key; None means no groups.
        place: The key.
        optimizer: The optimizer that gets the groups.

    Raises:
        RecipeError: No list of mappings, no regular expression, or an option that the optimizer refuses.
    """
    if section is None:
        return []
    if not isinstance(section, list):
        example = "[{match: 'bias$', weight_decay: 0}]"
        raise place.error(f'must be a list of mappings with a pattern each, as in {example}, got {section!r}.')
    if section and issubclass(_class(optimizer), torch.optim.LBFGS):
        raise place.error('LBFGS has no options for single parameters. Leave param_groups out.')
    return [_read_group(entry, place / index, optimizer) for index, entry in enumerate(section)]


def check_can_train(optimizer: Named, trainer: Mapping[str, Any]) -> None:
    """Refuses combinations of optimizer and Trainer arguments that Composer cannot train.

    Raises:
        RecipeError: LBFGS or SparseAdam in a run that loads a checkpoint, or LBFGS with ``amp_fp16``.
    """
    cls = _class(optimizer)
    # To load, torch's distributed checkpoint takes a step with dense zero gradients and without a closure.
    if issubclass(cls, torch.optim.LBFGS | torch.optim.SparseAdam):
        for key in ('autoresume', 'load_path'):
            if trainer.get(key) and not trainer.get('load_weights_only'):
                raise optimizer.place.error(
                    f'{key} cannot restore the state of {cls.__name__}, which Composer saves but cannot load. '
                    f'Leave {key} out, take another optimizer, or load the weights alone with load_weights_only=true.'
                )
    if issubclass(cls, torch.optim.LBFGS) and trainer.get('precision') == 'amp_fp16':
        raise optimizer.place.error(
            'LBFGS needs to evaluate the loss again in each step, and Composer does not let it with precision '
            'amp_fp16. Write precision: fp32.'
        )


def check_options(optimizer: Named) -> None:
    """Builds the optimizer over a single number, so that it checks its options before there is a model.

    Raises:
        RecipeError: The optimizer refuses an option.
    """
    dataclasses.replace(optimizer, is_cheap=True).build([torch.zeros(1)])


def build_optimizer(optimizer: Named, groups: Sequence[Group], model: nn.Module) -> torch.optim.Optimizer:
    """Builds the optimizer over all parameters of a model, frozen ones included, as ``model.parameters()`` does.

    Each parameter goes to the first group whose pattern its name matches. The rest forms the last group, with the
    optimizer's own options. Without groups there is one.

    Args:
        optimizer: Class and arguments.
        groups: The result of :func:`read`.
        model: The model to train.

    Raises:
        RecipeError: A pattern matches no parameter, a value is out of range, or the optimizer cannot train the model.
    """
    _check_gradients(optimizer, model)
    if not groups:
        return optimizer.build(model.parameters())
    return optimizer.build(_split(groups, dict(model.named_parameters())))


def table(optimizer: torch.optim.Optimizer, groups: Sequence[Group]) -> Table:
    """A table of the parameter groups that :func:`build_optimizer` made."""
    shown = Table(title='parameter groups', title_justify='left')
    for column in ('group', 'pattern', 'tensors', 'elements', 'options'):
        is_number = column in ('group', 'tensors', 'elements')
        shown.add_column(column, justify='right' if is_number else 'left', overflow='fold')
    for index, group in enumerate(optimizer.param_groups):
        of_recipe = groups[index] if index < len(groups) else None
        options = of_recipe.options if of_recipe else {}
        shown.add_row(
            str(index),
            Text(of_recipe.match if of_recipe else 'all others'),
            str(len(group['params'])),
            f'{sum(parameter.numel() for parameter in group["params"]):,}',
            Text(', '.join(f'{key}: {value}' for key, value in options.items()) or "the optimizer's"),
        )
    return shown


def _read_group(entry: Any, place: Place, optimizer: Named) -> Group:
    if not isinstance(entry, dict) or not isinstance(entry.get(_MATCH), str):
        raise place.error(
            f"must be a mapping with a pattern, as in {{match: 'bias$', weight_decay: 0}}, got {entry!r}."
        )
    pattern = entry[_MATCH]
    try:
        re.compile(pattern)
    except re.error as error:
        raise (place / _MATCH).error(f'{pattern!r} is not a regular expression: {error}.') from error
    options = {key: value for key, value in entry.items() if key != _MATCH}
    merged = check_arguments(optimizer.factory, {**optimizer.arguments, **options}, place, given=('params',))
    # torch checks the ranges of an optimizer's own options only, not those of its groups.
    check_options(Named(place, optimizer.name, optimizer.factory, merged))
    return Group(place, pattern, options)


def _split(groups: Sequence[Group], parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    left, split = dict(parameters), []
    for group in groups:
        found = [name for name in parameters if re.search(group.match, name)]
        own = [name for name in found if name in left]
        if not found:
            raise (group.place / _MATCH).error(
                f'{group.match!r} matches no parameter of the model. Their names are {listed(list(parameters))}.'
            )
        if not own:
            raise (group.place / _MATCH).error(
                f'{group.match!r} matches only parameters of earlier groups, which win: {listed(found)}. '
                'Put the narrower pattern first, or leave this one out.'
            )
        split.append({'params': [left.pop(name) for name in own], **group.options})
    return [*split, {'params': list(left.values())}] if left else split


def _check_gradients(optimizer: Named, model: nn.Module) -> None:
    if not issubclass(_class(optimizer), torch.optim.SparseAdam):
        return
    sparse = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
    }
    dense = [name for name, each in model.named_parameters() if each.requires_grad and id(each) not in sparse]
    if dense:
        raise (optimizer.place / 'name').error(
            'SparseAdam trains only parameters with sparse gradients, those of Embedding(sparse=True), and these have '
            f'dense ones: {listed(dense)}. Take adam.'
        )


def _class(optimizer: Named) -> type[torch.optim.Optimizer]:
    assert isinstance(optimizer.factory, type)
    return optimizer.factory
