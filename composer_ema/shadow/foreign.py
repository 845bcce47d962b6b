"""Reads averages that other libraries saved: recognises the library by its keys and renames the tensors for a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from composer_ema.model.inventory import Inventory
from composer_ema.model.names import check_same, listed
from composer_ema.model.wrappers import canonical_name

_T = TypeVar('_T')

#: What is read, in the words of an error.
KNOWN = "torch's AveragedModel, timm, diffusers' EMAModel, ema-pytorch, torch-ema and Lightning's WeightAveraging"


@dataclass(frozen=True)
class Foreign:
    """An average that another library kept.

    Attributes:
        source: the library.
        weights: tensors by canonical name, or in the order of the parameters where the library keeps no names.
        num_updates: updates that the library counts; None where it does not count.
        smoothing: share of the old average that one update keeps, where the library saves it.
    """

    source: str
    weights: Mapping[str, Tensor] | Sequence[Tensor]
    num_updates: int | None = None
    smoothing: float | None = None

    @property
    def has_names(self) -> bool:
        """Whether the tensors have names, so that no model is needed to use them."""
        return isinstance(self.weights, Mapping)


def read(state: Mapping[str, Any]) -> Foreign:
    """The average in a state dict or checkpoint, or one level below, as where a script saves ``{'ema': ...}``.

    Args:
        state: what the library saved, loaded with ``weights_only=True``. Not changed; tensors are aliased.

    Raises:
        ValueError: no average, more than one, or one of which a part is missing or of the wrong kind.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f'a saved average is a dictionary, this is a {type(state).__name__}.')
    reader = _reader_of(state)
    if reader is not None:
        return reader(state)
    below = [key for key, value in state.items() if isinstance(value, Mapping) and _reader_of(value) is not None]
    if len(below) > 1:
        raise ValueError(f'there are averages under the keys {listed(sorted(map(str, below)))}. Pass one of them.')
    if below:
        return read(state[below[0]])
    if state and all(str(name).startswith('module.') and isinstance(value, Tensor) for name, value in state.items()):
        warnings.warn(
            "these weights, all under 'module.', are taken for the average of timm's ModelEmaV2 or V3, but those of a "
            'model in DDP look the same. Save the average under a name of its own, such as state_dict_ema.',
            stacklevel=2,
        )
        return Foreign('timm', _without('module.', state))
    raise ValueError(
        f'there is no average of a known kind under the keys {listed(list(map(str, state)))}. '
        f'Read are those of {KNOWN}.'
    )


def is_read(state: Mapping[str, Any]) -> bool:
    """Whether ``state`` itself is what a known library saves for an average, as far as its keys tell."""
    return _reader_of(state) is not None


def fit(foreign: Foreign, inventory: Inventory) -> dict[str, Tensor]:
    """The tensors of ``foreign`` under a model's names, each name once however often its tensor is tied.

    Parameters are all there or, where the library keeps an order only, perhaps the trainable ones alone; buffers where
    the library keeps them.

    Raises:
        ValueError: names, number or shapes that do not fit the model, all listed.
    """
    if isinstance(foreign.weights, Mapping):
        found = under_names_of(foreign.weights, {*inventory.tensors(), *inventory.aliases})
        tensors = {
            name: tensor for name, tensor in found.items() if name not in inventory.aliases and not is_extra_state(name)
        }
        for alias, name in inventory.aliases.items():
            if alias in found:
                tensors.setdefault(name, found[alias])
        optional = inventory.buffers.keys() - inventory.persistent
    else:
        tensors = dict(zip(_followed(foreign, inventory), foreign.weights, strict=True))
        optional = inventory.tensors().keys() - tensors.keys()
    check_same(
        f'the average of {foreign.source}',
        inventory.tensors(),
        tensors,
        optional=optional,
        remedy='Nothing was changed. Pass the model, or one of the same architecture, that was averaged.',
    )
    return tensors


def under_names_of(tensors: Mapping[str, _T], names: Collection[str]) -> Mapping[str, _T]:
    """``tensors`` where they meet most of ``names``, with their outermost module and that of ``names`` on or off.

    What DDP calls ``module.0.weight`` and a LightningModule perhaps ``net.0.weight``, a ComposerClassifier calls
    ``module.0.weight`` and the bare network ``0.weight``.
    """
    own, other = outermost(tensors), outermost(names)
    bare = _bare(own, tensors)
    candidates = [tensors, bare, _under(other, tensors), _under(other, bare)]
    if (
        not own
    ):  # something lies beside the module, such as the weights of a loss: an error then names no more than that
        roots = dict.fromkeys(root for root, dot, _ in (name.partition('.') for name in tensors) if dot)
        candidates += [_bare(f'{root}.', tensors) for root in roots]
    return max(candidates, key=lambda candidate: len(candidate.keys() & names))


def _bare(module: str, tensors: Mapping[str, _T]) -> Mapping[str, _T]:
    """``tensors`` without ``module`` before their names, or as they are where two names would become one."""
    bare = {name.removeprefix(module): tensor for name, tensor in tensors.items()}
    return bare if len(bare) == len(tensors) else tensors


def outermost(names: Iterable[str]) -> str:
    """The module, with its dot, in which all names stand, or nothing."""
    roots = {root if dot else None for root, dot, _ in (name.partition('.') for name in names)}
    root = roots.pop() if len(roots) == 1 else None
    return '' if root is None else f'{root}.'


def _under(module: str, tensors: Mapping[str, _T]) -> dict[str, _T]:
    return {module + name: tensor for name, tensor in tensors.items()}


def is_extra_state(name: str) -> bool:
    """Whether a state dict keeps under ``name`` what a module's ``get_extra_state`` returned: nothing to average."""
    return name == '_extra_state' or name.endswith('._extra_state')


def _followed(foreign: Foreign, inventory: Inventory) -> list[str]:
    """Names of the parameters that an average without names followed: all of them, or only the trainable ones."""
    trainable = [name for name, parameter in inventory.parameters.items() if parameter.requires_grad]
    for names in (list(inventory.parameters), trainable):
        if len(names) == len(foreign.weights):
            return names
    raise ValueError(
        f'the average of {foreign.source} holds {len(foreign.weights)} tensors without names, but the model has '
        f'{len(inventory.parameters)} parameters, {len(trainable)} of them trainable. Nothing was changed. Pass the '
        'model whose parameters were averaged, with the same ones frozen.'
    )


def _reader_of(state: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Foreign] | None:
    keys = {key for key in state if isinstance(key, str)}
    if {'state_dict', 'current_model_state', 'averaging_state'} <= keys:
        return _read_lightning
    if 'state_dict_ema' in keys:
        return _read_timm
    if {'shadow_params', 'optimization_step'} <= keys:
        return _read_diffusers
    if {'shadow_params', 'num_updates'} <= keys:
        return _read_torch_ema
    if {'initted', 'step'} <= keys and any(key.startswith('ema_model.') for key in keys):
        return _read_ema_pytorch
    if 'n_averaged' in keys and all(key == 'n_averaged' or key.startswith('module.') for key in keys):
        return _read_averaged_model
    return None


def _read_averaged_model(state: Mapping[str, Any]) -> Foreign:
    return Foreign("torch's AveragedModel", _without('module.', state), _count(state, 'n_averaged'))


def _read_timm(state: Mapping[str, Any]) -> Foreign:
    return Foreign('timm', _named(_mapping(state, 'state_dict_ema')))


def _read_lightning(state: Mapping[str, Any]) -> Foreign:
    # The model's slot holds the average, and `current_model_state` the training weights.
    averaging = _mapping(state, 'averaging_state')
    return Foreign('Lightning', _named(_mapping(state, 'state_dict')), _count(averaging, 'n_averaged'))


def _read_ema_pytorch(state: Mapping[str, Any]) -> Foreign:
    # Until the first update `initted` is False, and the average is the model as it was built.
    count = _count(state, 'step') if _count(state, 'initted') else 0
    return Foreign('ema-pytorch', _without('ema_model.', state), count)


def _read_diffusers(state: Mapping[str, Any]) -> Foreign:
    return Foreign('diffusers', _ordered(state), _count(state, 'optimization_step'), _share(state))


def _read_torch_ema(state: Mapping[str, Any]) -> Foreign:
    count = None if state['num_updates'] is None else _count(state, 'num_updates')
    return Foreign('torch-ema', _ordered(state), count, _share(state))


def _without(prefix: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    return _named({name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)})


def _named(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    wrong = [name for name, value in tensors.items() if not isinstance(value, Tensor) and not is_extra_state(name)]
    if wrong:
        raise ValueError(f'{listed(sorted(wrong))} among the averaged weights are no tensors.')
    return {canonical_name(name): value for name, value in tensors.items()}


def _ordered(state: Mapping[str, Any]) -> list[Tensor]:
    tensors = state['shadow_params']
    if not isinstance(tensors, (list, tuple)) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise ValueError("'shadow_params' is not a list of tensors.")
    return list(tensors)


def _mapping(state: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = state[key]
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError(f'{key!r} is a {type(value).__name__}, not a dictionary of weights by name.')
    return value


def _count(state: Mapping[str, Any], key: str) -> int:
    value = state.get(key)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        value = value.item()
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f'{key!r} is {value!r}, not a count.')
    return int(value)


def _share(state: Mapping[str, Any]) -> float | None:
    value = state.get('decay')
    return float(value) if isinstance(value, (int, float)) and 0 <= value <= 1 else None
