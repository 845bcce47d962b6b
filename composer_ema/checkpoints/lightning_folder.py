"""A sharded checkpoint of Lightning: the shards, and what rank 0 has pickled beside them, as one dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from composer_ema.checkpoints import sharded_format

#: The file beside the shards.
META = 'meta.pt'
_CALLBACKS, _WRITTEN_BY = 'callbacks', 'pytorch-lightning_version'


def combined(shards: Mapping[str, Any], meta: Any) -> Mapping[str, Any]:
    """The dictionary that Lightning would have saved to one file, with averages in the states of their callbacks.

    Args:
        shards: what lies in the folder by parts: the model, the optimizers, and averages listed as if they were one.
        meta: what the file beside them holds. Where that is not of Lightning, ``shards`` is returned as it is.

    Raises:
        ValueError: the averages of a callback are missing or broken.
    """
    if not isinstance(meta, Mapping) or _WRITTEN_BY not in meta:
        return shards
    whole, averages = {}, {}
    for key, value in shards.items():
        if isinstance(value, Mapping) and list(value) == [sharded_format.AVERAGES]:
            averages.update(value[sharded_format.AVERAGES])
        else:
            whole[key] = value
    states = meta.get(_CALLBACKS)
    if isinstance(states, Mapping):
        joined = {
            key: sharded_format.joined(state, averages.get(key, {}), f'the state of the callback {key}')
            for key, state in states.items()
            if sharded_format.is_split(state)
        }
        whole[_CALLBACKS] = {**states, **joined}
    return {**meta, **whole}
