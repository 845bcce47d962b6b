"""The recipe that tests of runs train: as small as a run can be that averages, evaluates and saves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def tiny(
    *, data: Mapping[str, Any] | None = None, optimizer: Mapping[str, Any] | None = None, **values: Any
) -> dict[str, Any]:
    """A recipe of two epochs of ten batches, of a network with four units a layer.

    Args:
        data: What the section says otherwise, or besides. Default: nothing.
        optimizer: The same for its section.
        values: Other keys, whole; each takes the place of the recipe's own.
    """
    return {
        'max_duration': '2ep',
        'device': 'cpu',
        'model': {'name': 'mnist1d_mlp', 'width': 4},
        'data': {'name': 'mnist1d', 'num_samples': 100, 'batch_size': 8, 'eval_batch_size': 20, **(data or {})},
        'optimizer': {'name': 'sgd', 'lr': 0.1, **(optimizer or {})},
        'algorithms': {'ema': {'half_life': '3ba'}},
        **values,
    }
