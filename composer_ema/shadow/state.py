"""An average as a dictionary of tensors, and back; everything is checked before anything is assigned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from composer_ema.kernels.rules import is_inexact
from composer_ema.model.names import check_same
from composer_ema.model.sharding import is_of_another_process, is_shard, rank, whole
from composer_ema.settings import check_seed
from composer_ema.shadow.storage import Storage
from composer_ema.wording import shown

#: The version that :func:`of_storage` writes and :func:`check` reads.
VERSION = 1

_VERSION = 'version'
#: The other keys of a state. All but the training weights are there in any, and the Kahan terms where they are kept.
NUM_UPDATES, SEED, ALIASES, TRAINING_WEIGHTS = 'num_updates', 'seed', 'aliases', 'training_weights'
PARAMETERS, BUFFERS, COMPENSATIONS = 'parameters', 'buffers', 'compensations'
#: What of a state holds tensors of the average.
SECTIONS = (PARAMETERS, BUFFERS, COMPENSATIONS)
_REMEDY = (
    'Nothing was loaded. Build the same model with the same include, exclude and frozen parameters, '
    "or start a new average; a Composer Trainer does with load_ignore_keys=['state/algorithms']."
)


@dataclass(frozen=True)
class Loaded:
    """A state that fits a storage.

    Args:
        num_updates: updates made so far.
        seed: key of the random bits; None where the state does not say.
        parameters, buffers: name to tensor, of the shapes in the storage.
        compensations: name to the Kahan term of a parameter or buffer, where the state has them.
        stash: the training weights, where the state was taken while a model held the average.
    """

    num_updates: int
    seed: int | None
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    compensations: dict[str, Tensor]
    stash: dict[str, Tensor] | None


def gather_state_dict(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with every sharded tensor gathered on rank 0, to save in one file. A collective call: make it everywhere.

    For what :meth:`ShadowModel.state_dict`, :meth:`ShadowModels.state_dict` and :meth:`EMAOptimizer.state_dict` return
    with ``shard_over_ranks=True``, or for a sharded model. Tensors are gathered one by one, so no rank but 0 ever holds
    more than one whole tensor, and rank 0 keeps them on the host. It loads on any number of ranks, with
    ``shard_over_ranks`` or without.

    Args:
        state: dictionaries, lists and tuples of tensors and plain values. Every rank must have the same names in the
            same order. Rank 0 of the default process group must be among those that share the tensors.

    Returns:
        On rank 0 the state, in which tensors that were whole are the same ones; on other ranks an empty dictionary.

    Raises:
        TypeError: ``state`` is no dictionary.

    Example:
        .. code:: python

            optimizer = EMAOptimizer(AdamW(model.parameters()), model=model, shard_over_ranks=True)
            ...
            state = composer_ema.gather_state_dict(optimizer.state_dict())
            if torch.distributed.get_rank() == 0:
                torch.save({'model': model.module.state_dict(), 'optimizer': state}, 'checkpoint.pt')
    """
    if not isinstance(state, Mapping):
        raise TypeError(f'state must be a dictionary, got {shown(state)}. Pass what state_dict() returned.')
    is_kept = rank() == 0
    whole_state = gathered(state, is_kept=is_kept)
    return whole_state if is_kept else {}


def gathered(value: Any, *, is_kept: bool) -> Any:
    """A state, or a part of one, with every sharded tensor whole, on the host. A collective call where there is one.

    Args:
        value: dictionaries, lists and tuples of tensors and plain values.
        is_kept: whether this process keeps what it gathers. Otherwise it holds one whole tensor at a time, and the
            state that is returned lacks the sharded ones.
    """
    if isinstance(value, Mapping):
        found = {key: gathered(each, is_kept=is_kept) for key, each in value.items()}
        return {key: each for key, each in found.items() if is_kept or not is_shard(value[key])}
    if isinstance(value, list | tuple):
        parts, kind = [gathered(each, is_kept=is_kept) for each in value], cast(Any, type(value))
        return kind(*parts) if hasattr(value, '_fields') else kind(parts)  # a named tuple takes its fields one by one
    if is_shard(value):
        tensor = whole(value)
        return tensor.cpu() if is_kept else None
    return value


def of_storage(storage: Storage, stash: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """The state of an average in plain types; tensors alias the average and the stash.

    Buffers that the model itself does not save are left out. A compensated average gets its Kahan terms by this if it
    had none: a distributed checkpoint loads into the tensors of a state, and leaves out what the state lacks.

    Args:
        storage: the average.
        stash: the training weights while a model holds the average, else None.
    """
    state: dict[str, Any] = {
        _VERSION: VERSION,
        NUM_UPDATES: storage.num_updates,
        SEED: storage.settings.seed,
        PARAMETERS: dict(storage.parameters),
        BUFFERS: {name: buffer for name, buffer in storage.buffers.items() if name in storage.persistent},
        ALIASES: dict(storage.aliases),
    }
    if storage.settings.compensated:
        storage.compensate()
        state[COMPENSATIONS] = storage.compensations.among({**state[PARAMETERS], **state[BUFFERS]})
    if stash is not None:
        state[TRAINING_WEIGHTS] = {name: tensor for name, tensor in stash.items() if name not in storage.volatile}
    return state


def check(state: Mapping[str, Any], storage: Storage) -> Loaded:
    """What a state holds, if it fits ``storage``. Nothing is changed.

    Raises:
        ValueError: another version, a part of another type, or names and shapes that do not fit, all listed.
    """
    version = state.get(_VERSION) if isinstance(state, Mapping) else None
    if type(version) is not int or version != VERSION:
        raise ValueError(
            f'the state has format version {shown(version)}, this release reads {VERSION}. Nothing was loaded.'
            + (' Pass what state_dict() of a ShadowModel returned; this is something else.' if version is None else '')
        )
    for key, kind in ((NUM_UPDATES, int), (PARAMETERS, Mapping), (BUFFERS, Mapping)):
        if not isinstance(value := state.get(key), kind) or isinstance(value, bool):
            raise ValueError(
                f"the state's {key!r} is a {type(value).__name__}, not a {kind.__name__}. Nothing was loaded."
            )
    if not 0 <= state[NUM_UPDATES] < 2**63:
        rule = 'below zero' if state[NUM_UPDATES] < 0 else 'above any count'
        raise ValueError(f"the state's num_updates is {shown(state[NUM_UPDATES])}, {rule}. Nothing was loaded.")
    seed = state.get(SEED)
    if seed is not None or SEED in state:
        try:
            seed = check_seed(seed)  # pyright: ignore[reportArgumentType]: None is refused there
        except (TypeError, ValueError) as error:
            raise ValueError(f'{error} Nothing was loaded.') from error
    parameters, buffers, stash = dict(state[PARAMETERS]), dict(state[BUFFERS]), state.get(TRAINING_WEIGHTS)
    _check_names(storage, parameters, buffers)
    terms = _checked_compensations(state.get(COMPENSATIONS, {}), {**parameters, **buffers})
    if stash is not None:
        _check_stash(storage, parameters, buffers, stash)
    for name, tensor in (*parameters.items(), *buffers.items(), *terms.items(), *(stash or {}).items()):
        if tensor.is_meta or tensor.layout is not torch.strided:
            kind = 'on the meta device' if tensor.is_meta else f'stored as {tensor.layout}'
            raise ValueError(f'{name} in the state is {kind}, not a dense tensor. Nothing was loaded.')
        if is_of_another_process(tensor):
            raise ValueError(
                f"{name} in the state is another process's part of a sharded tensor, so the file lacks the others. "
                'Nothing was loaded. Save with torch.distributed.checkpoint.save on every rank, or call '
                'gather_state_dict(state) on every rank and save what rank 0 gets.'
            )
    return Loaded(int(state[NUM_UPDATES]), seed, parameters, buffers, terms, None if stash is None else dict(stash))


def _check_names(storage: Storage, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """A parameter that is frozen here may have been trainable in the saved run, so it may have an average."""
    selection = storage.selection
    frozen = {n: shape for n, shape in storage.shapes.items() if n not in storage.parameters and n in selection}
    check_same('the saved average', {**frozen, **storage.parameters}, parameters, optional=frozen, remedy=_REMEDY)
    # A model may register, replace, resize and drop its buffers, apart from statistics, so these may differ.
    free = {n: b for n, b in buffers.items() if n in selection and n not in storage.statistics}
    loose = storage.volatile | {name for name in storage.buffers if name not in storage.statistics}
    expected = {**storage.buffers, **{n: b for n, b in free.items() if isinstance(b, Tensor)}}
    check_same("the saved average's buffers", expected, buffers, optional=loose, remedy=_REMEDY)


def _checked_compensations(terms: Any, averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(terms, Mapping):
        raise ValueError(
            f"the state's {COMPENSATIONS!r} is a {type(terms).__name__}, not a mapping. Nothing was loaded."
        )
    check_same('the saved Kahan terms', averages, terms, optional=averages, remedy=_REMEDY)
    for name, term in terms.items():
        if not is_inexact(term):
            raise ValueError(f'the saved Kahan term of {name} is {term.dtype}, not floating. Nothing was loaded.')
    return dict(terms)


def _check_stash(storage: Storage, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], stash: Any) -> None:
    if not isinstance(stash, Mapping):
        raise ValueError(f"the state's {TRAINING_WEIGHTS!r} is a {type(stash).__name__}. Nothing was loaded.")
    shapes = {**storage.shapes, **storage.parameters}
    tracked = {**{name: shapes[name] for name in parameters}, **storage.buffers, **buffers}
    whole = {name for name, buffer in tracked.items() if not is_inexact(buffer)}
    optional = whole | storage.volatile | ({*storage.buffers, *buffers} - storage.statistics)
    check_same('the saved training weights', tracked, stash, optional=optional, remedy=_REMEDY)
