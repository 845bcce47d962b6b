"""How far an average is from the training weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def relative_distance(shadows: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> Tensor:
    """Norm of ``shadows - sources`` over norm of ``sources``, over all tensors; a float64 scalar tensor.

    Zero when both norms are zero. Takes memory for one tensor at a time.

    Args:
        shadows: name to tensor.
        sources: the same names or more, of equal shapes; cast to the dtype and device of the shadow.
    """
    differences, norms = [], []
    for name, shadow in shadows.items():
        source = sources[name].detach().to(shadow.device, shadow.dtype)
        differences.append(_norm(shadow - source))
        norms.append(_norm(source))
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    distance, size = _norm(_gather(differences)), _norm(_gather(norms))
    return torch.where(distance == 0, distance, distance / size)


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.complex128 if tensor.is_complex() else torch.float64)


def _gather(norms: list[Tensor]) -> Tensor:
    return torch.stack([norm.to(norms[0].device) for norm in norms])
