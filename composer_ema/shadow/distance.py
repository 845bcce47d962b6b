"""How far an average is from the training weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from composer_ema.model.sharding import local, num_replicas, share_of, sum_over


def relative_distance(shadows: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> Tensor:
    """Norm of ``shadows - sources`` over norm of ``sources``, over all tensors; a float64 scalar tensor.

    Zero when both norms are zero. Takes memory for one tensor at a time. A collective call where tensors are sharded:
    each process sums over its own parts.

    Args:
        shadows: name to tensor.
        sources: the same names or more, of equal shapes; cast to the dtype and device of the shadow.
    """
    whole: list[Tensor] = []
    shared: dict[DeviceMesh, list[Tensor]] = {}
    for name, shadow in shadows.items():
        part = local(shadow)
        source = share_of(sources[name].detach(), shadow).to(part.device, part.dtype)
        norms = torch.stack([_norm(part - source), _norm(source)])
        if isinstance(shadow, DTensor):
            shared.setdefault(shadow.device_mesh, []).append(norms / math.sqrt(num_replicas(shadow)))
        else:
            whole.append(norms)
    for mesh, norms in shared.items():
        whole.append(sum_over(mesh, _total(norms).square()).sqrt())
    if not whole:
        return torch.zeros((), dtype=torch.float64)
    distance, size = _total(whole)
    return torch.where(distance == 0, distance, distance / size)


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.complex128 if tensor.is_complex() else torch.float64)


def _total(norms: list[Tensor]) -> Tensor:
    """The norms of all tensors together."""
    return torch.linalg.vector_norm(torch.stack([each.to(norms[0].device) for each in norms]), dim=0)
