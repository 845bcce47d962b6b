"""New tensors of an average, made from their parts in this process."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from composer_ema.kernels.layout import side_by_side
from composer_ema.model.sharding import is_shard, wrapped


def assembled(parts: Sequence[Tensor], layouts: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of these parts, shared among processes as the layouts are. Small whole ones lie side by side.

    Shared ones do not: torch 2.14 cannot deepcopy a DTensor whose part does not begin its storage.

    Args:
        parts: one for each layout. Aliased where they are shared or not small.
        layouts: of the same shapes in this process.
    """
    whole = [index for index, layout in enumerate(layouts) if not is_shard(layout)]
    placed = list(map(wrapped, parts, layouts))
    for index, tensor in zip(whole, side_by_side([parts[index] for index in whole]), strict=True):
        placed[index] = tensor
    return placed
