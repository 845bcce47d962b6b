"""Averages in files that Composer did not write: ours, other libraries', and plain weights under a given key."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from composer_ema.checkpoints import search, states
from composer_ema.checkpoints.states import Average
from composer_ema.model.inventory import Inventory
from composer_ema.model.names import check_same, listed
from composer_ema.model.wrappers import canonical_name, unwrap
from composer_ema.shadow import foreign
from composer_ema.shadow.foreign import Foreign

# Where scripts and trainers put the weights of the model.
_MODEL_KEYS = ('model', 'state_dict', 'model_state_dict')
_NAMED_LIKE_AN_AVERAGE = re.compile('ema|avg|average|shadow|swa|teacher', re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """An average, where it stands, and the model's weights that lie beside it.

    Attributes:
        key: path of its keys in the file; ``''`` for the whole file.
        average: what it holds.
        foreign: the same, where another library keeps it.
        model_slot: weights of the model under the average's names, where the file has one state dict that fits; else
            empty.
    """

    key: str
    average: Average
    foreign: Foreign | None
    model_slot: Mapping[str, Any]


def find(held: Any, key: str | None = None) -> list[Found]:
    """Every average in ``held``, or in what lies under ``key``. Plain weights under ``key`` are one.

    Raises:
        ValueError: there is none, or one of which a part is missing or of the wrong kind.
    """
    value = held if key is None else search.at(held, key)
    found = []
    for path, state in search.averages(value).items():
        where = '.'.join(part for part in (key, path) if part)
        found += [_placed(held, where, each, theirs) for each, theirs in _read(state)]
    if found:
        return _without_repeated(found)
    if key is None:
        return [_placed(held, '', *_of_library(_read_foreign(value)))]
    return [_placed(held, key, *_plain(value, key))]


def _without_repeated(found: list[Found]) -> list[Found]:
    """Leaves out averages that stand beside an optimizer's moments where the same file has them as a state, too."""
    states_of = {_identity(each.average) for each in found if not each.average.is_by_parameter}
    return [each for each in found if not each.average.is_by_parameter or _identity(each.average) not in states_of]


def _identity(average: Average) -> tuple[int | None, frozenset[str]]:
    return average.num_updates, frozenset(average.parameters)


def choose(found: Sequence[Found], label: str | None) -> Found:
    """The only average of ``found``, or the one that an algorithm calls ``label``.

    Raises:
        ValueError: there are several, or none of this label.
    """
    labels = [each.average.label for each in found if each.average.label is not None]
    chosen = [each for each in found if label is None or each.average.label == label]
    if label is not None and not chosen:
        has = f'those in the file are {listed(sorted(labels))}' if labels else 'those in the file have no labels'
        raise ValueError(f'there is no average called {label!r}: {has}. Leave average={label!r} out, or pass key=.')
    if len(chosen) > 1:
        keys = sorted({each.key for each in chosen})
        if len(keys) == 1:
            raise ValueError(
                f'there are the averages {listed(sorted(labels))}. Pass one: average={sorted(labels)[0]!r}.'
            )
        raise ValueError(
            f'there are averages under the keys {listed(keys)}. '
            f'Pass one of them, as in key={keys[0]!r} (--key {keys[0]}).'
        )
    return chosen[0]


def named(found: Found) -> dict[str, Any]:
    """The weights by name: averaged, and those of the model slot for whatever is not averaged.

    Raises:
        ValueError: a tensor has no values.
    """
    average = found.average
    assert average.has_names
    averaged = average.tensors
    weights = {name: averaged.get(name, tensor) for name, tensor in found.model_slot.items()}
    if weights:  # a file of safetensors has one name of a tied weight
        weights |= {alias: averaged[alias] for alias in average.aliases if alias in averaged and alias not in weights}
    else:
        weights = averaged
    check_readable(weights)
    return weights


def fit(found: Found, model: nn.Module) -> dict[str, Any]:
    """A state dict of ``model`` with the average in it; the rest is the model slot's, or else the model's own.

    Raises:
        ValueError: names, number or shapes that do not fit the model, all listed.
    """
    inventory = Inventory.of(unwrap(model))
    check_readable(found.average.tensors)
    if found.foreign is not None:
        return for_model(foreign.fit(found.foreign, inventory), model)
    expected = tensors_of(model)
    if found.average.has_names or found.average.parameters.keys() <= expected.keys():
        under = foreign.under_names_of(found.average.tensors, expected)
        tensors = {name: tensor for name, tensor in under.items() if not foreign.is_extra_state(name)}
    else:
        tensors = _by_position(found.average, inventory)
    check_same(
        f'the average of {found.average.source}',
        expected,
        tensors,
        optional=expected,
        remedy='Pass the model, or one of the same architecture, that was averaged.',
    )
    _name_tied(tensors, inventory.aliases)
    slot = {n: t for n, t in foreign.under_names_of(found.model_slot, expected).items() if isinstance(t, Tensor)}
    if not found.average.has_names and not _covers(slot, expected):
        slot = {}  # without names nothing tells that it is of this model
    if slot:
        check_same(
            'the model in the file', expected, slot, optional=expected, remedy='Pass the model that was trained.'
        )
        _name_tied(tensors, states.tied(slot, tensors))
    tensors = {**slot, **tensors}
    check_readable(tensors)
    _warn_of_unaveraged(tensors, found.average.source, inventory)
    return for_model(tensors, model)


def _name_tied(tensors: dict[str, Tensor], aliases: Mapping[str, str]) -> None:
    """Puts each tied tensor under all of its names. A name that has a tensor of its own keeps it."""
    for alias, name in aliases.items():
        if alias in tensors:
            tensors.setdefault(name, tensors[alias])
    for alias, name in aliases.items():
        if name in tensors:
            tensors.setdefault(alias, tensors[name])


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors in the model's state dict, by canonical name."""
    state = unwrap(model).state_dict()
    return {canonical_name(name): value for name, value in state.items() if isinstance(value, Tensor)}


def for_model(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """A state dict of ``model`` with ``tensors`` in it; the rest is copied from the model."""
    inventory = Inventory.of(unwrap(model))
    weights = {}
    for key, value in unwrap(model).state_dict().items():
        name = canonical_name(key)
        found = tensors.get(name, tensors.get(inventory.aliases.get(name, name)))
        if found is None and isinstance(value, Tensor):
            if value.is_meta:
                raise ValueError(
                    f'{name} is not in the file, and the model that was passed has it on the meta device. Pass a model '
                    'that has its weights.'
                )
            found = value.detach().cpu().clone()
        elif found is None:
            found = value
        weights[name] = found
    return weights


def _read(state: Mapping[str, Any]) -> list[tuple[Average, Foreign | None]]:
    reader = states.recognise(state)
    return [_of_library(foreign.read(state))] if reader is None else [(each, None) for each in reader(state)]


def _of_library(found: Foreign) -> tuple[Average, Foreign]:
    weights = found.weights
    tensors = weights if isinstance(weights, Mapping) else {str(i): tensor for i, tensor in enumerate(weights)}
    share = {} if found.smoothing is None else {'smoothing': found.smoothing}
    average = Average(
        found.source,
        tensors,
        num_updates=found.num_updates,
        written_as=found.source if found.has_names else f'{found.source}, which numbers the parameters',
        config=share,
        facts=share,
        has_names=found.has_names,
    )
    return average, found


def _read_foreign(value: Any) -> Foreign:
    """What only the whole file tells, such as a state dict all under ``module.``; else the error that there is none."""
    try:
        return foreign.read(value)
    except ValueError as error:
        paths = [path for path in search.weights(value) if path]
        raise ValueError(f'{error}{advice(paths)}') from error


def advice(paths: Sequence[str]) -> str:
    """What to do about state dicts that may be averages, as the end of an error; nothing where there are none."""
    if not paths:
        return ''
    likely = next((path for path in paths if _NAMED_LIKE_AN_AVERAGE.search(path)), paths[-1])
    return (
        f' Files of EMAOptimizer, ShadowModel and composer-ema export are read, too. Weights lie under '
        f'{listed(sorted(paths))}: if one of them is an average, pass its key, as in key={likely!r} (--key {likely}).'
    )


def _plain(value: Any, key: str) -> tuple[Average, Foreign | None]:
    if search.is_weights(value):
        tensors = {canonical_name(name): t for name, t in value.items() if isinstance(t, Tensor)}
        return Average('a script', tensors, written_as='a script, which keeps weights by name'), None
    if isinstance(value, (list, tuple)) and value and all(isinstance(each, Tensor) for each in value):
        return _of_library(Foreign('a script', list(value)))
    paths = [f'{key}.{path}' for path in search.weights(value)]
    raise ValueError(
        f'what lies under {key!r} is no average of a known kind and no dictionary of tensors by name, but a '
        f'{type(value).__name__}.{advice(paths)}'
    )


def _placed(held: Any, key: str, average: Average, theirs: Foreign | None) -> Found:
    slot = {} if theirs is not None else _model_slot(held, key, average)
    if average.has_names:
        aliases = states.tied(slot, average.tensors)
        average = dataclasses.replace(average, aliases={**aliases, **average.aliases})
    return Found(key, average, theirs, slot)


def _model_slot(held: Any, key: str, average: Average) -> dict[str, Any]:
    """The one state dict beside an average that has all of its parameters, by canonical name."""
    fitting = {}
    for path, weights in search.weights(held).items():
        if path == key:
            continue
        slot = {canonical_name(name): value for name, value in weights.items()}
        if average.has_names:  # DDP, say, may have put another module around the one or the other
            slot = foreign.under_names_of(slot, average.parameters)
        if not average.has_names or _covers(slot, average.parameters):
            fitting[path] = dict(slot)
    if len(fitting) > 1:
        fitting = {path: slot for path, slot in fitting.items() if path.rpartition('.')[2] in _MODEL_KEYS}
    return next(iter(fitting.values())) if len(fitting) == 1 else {}


def _covers(slot: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    return all(isinstance(slot.get(name), Tensor) and slot[name].shape == t.shape for name, t in tensors.items())


def _by_position(average: Average, inventory: Inventory) -> dict[str, Tensor]:
    """The parameters of EMAOptimizer without a model, group after group, under the names of the model's."""
    places = sorted((tuple(map(int, name.split('.'))), name) for name in average.parameters)
    ordered = [average.parameters[name] for _, name in places]
    groups: dict[int, list[int]] = {}
    for (group, position), _ in places:
        groups.setdefault(group, []).append(position)
    has_gaps = any(positions != list(range(len(positions))) for positions in groups.values())
    names = list(inventory.parameters)
    if has_gaps:  # of frozen parameters, which count as places but are not averaged
        positions = groups.get(0, [])
        if len(groups) > 1 or not positions or positions[-1] >= len(names):
            raise ValueError(
                f'the average of {average.source} has no names, and its places {listed([name for _, name in places])} '
                f'do not tell which of the {len(names)} parameters were frozen. {_KEEP_NAMES}'
            )
        tensors = {names[position]: tensor for position, tensor in zip(positions, ordered, strict=True)}
    else:
        tensors = foreign.fit(Foreign(average.source, ordered), inventory)
    grouped = f' in {len(groups)} groups' if len(groups) > 1 else ''
    warnings.warn(
        f'the average of {average.source} has no names: its {len(ordered)} tensors{grouped} were matched to the '
        f"model's parameters by position. Shapes were compared, but parameters of one shape in another order go "
        f'unnoticed. {_KEEP_NAMES}',
        stacklevel=7,  # the caller of load_average
    )
    return tensors


_KEEP_NAMES = 'Build EMAOptimizer(..., model=model), which keeps names.'


def _warn_of_unaveraged(tensors: Collection[str], source: str, inventory: Inventory) -> None:
    kept = [name for name, parameter in inventory.parameters.items() if parameter.requires_grad]
    kept += [name for name in inventory.buffers if name in inventory.persistent]
    if left := [name for name in kept if name not in tensors]:
        warnings.warn(
            f'{len(left)} tensors are not in the average of {source} and come from the model as it is: {listed(left)}.',
            stacklevel=7,  # the caller of load_average
        )


def check_readable(tensors: Mapping[str, Any]) -> None:
    """Raises a ValueError for a tensor that has a shape and no values, or no shape."""
    if nested := [name for name, tensor in tensors.items() if isinstance(tensor, Tensor) and tensor.is_nested]:
        raise ValueError(f'{listed(sorted(nested))} in the file are nested tensors, which no average has.')
    meta = [name for name, tensor in tensors.items() if isinstance(tensor, Tensor) and tensor.is_meta]
    if meta:
        raise ValueError(
            f'{listed(sorted(meta))} in the file are on the meta device: it holds their shapes and no values. '
            'Save the average of a model that has its weights.'
        )
