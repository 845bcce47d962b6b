"""An average as an export wants it: which one, under which names, in which dtype, and what is said of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from composer_ema.checkpoints.lazy_tensor import in_memory, is_dense
from composer_ema.checkpoints.reading import CheckpointError, average_in
from composer_ema.model.names import listed
from composer_ema.shadow.foreign import outermost
from composer_ema.version import __version__

#: The prefix that stands for the outermost module, whatever it is called.
AUTO = 'auto'
#: The dtypes that an export can have besides that of the average.
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


@dataclass(frozen=True)
class Wanted:
    """The average that was asked for.

    Attributes:
        path: the checkpoint.
        held: what ``read_file`` returned for it.
        label: as ``average`` of ``export``.
        key: likewise.
        strip_prefix: likewise.
        dtype: of all floating tensors; None for those of the average.
    """

    path: Path
    held: Any
    label: str | None = None
    key: str | None = None
    strip_prefix: str | None = None
    dtype: torch.dtype | None = None

    def read(self, model: nn.Module | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """The weights, and what the checkpoint says of them.

        Args:
            model: whose names they get, and which they must fit. Default: the names of the checkpoint.

        Raises:
            CheckpointError: as for :func:`composer_ema.export`.
        """
        weights, facts = average_in(self.held, self.path, model, label=self.label, key=self.key)
        return self.shaped(weights), facts

    def shaped(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """``weights`` without the prefix and in the dtype, as far as one was asked for."""
        named = dict(weights) if self.strip_prefix is None else _stripped(weights, self.strip_prefix, self.path)
        return named if self.dtype is None else _cast(named, self.dtype, self.path)

    def metadata(self, facts: Mapping[str, Any]) -> dict[str, str]:
        """What is written with the tensors."""
        dtype = {} if self.dtype is None else {'dtype': f'{_name_of(self.dtype)}, rounded to nearest'}
        return {
            'format': 'pt',
            'weights': str(facts['weights']),
            'written_by': f'composer_ema {__version__}',
            'checkpoint': self.path.name,
            **{name: str(fact) for name, fact in facts.items() if fact is not None and name != 'weights'},
            **dtype,
        }


def _cast(weights: Mapping[str, Any], dtype: torch.dtype, path: Path) -> dict[str, Any]:
    """Floating tensors in ``dtype``, rounded to nearest; tied ones stay tied. The rest is as it was."""
    cast: dict[int, Tensor] = {}
    too_large = []
    for name, value in weights.items():
        if isinstance(value, Tensor) and value.is_floating_point() and is_dense(value) and id(value) not in cast:
            values = in_memory(value)
            cast[id(value)] = rounded = values.to(dtype)
            if (values.isfinite() & ~rounded.isfinite()).any():
                too_large.append(f'{name} (up to {values[values.isfinite()].abs().max().item():.4g})')
    if too_large:
        raise CheckpointError(
            f'{_name_of(dtype)} holds values up to {torch.finfo(dtype).max:.4g}, and {path} has larger ones in '
            f'{listed(too_large)}. Export with another dtype, such as bfloat16, or with none.'
        )
    return {name: cast.get(id(value), value) for name, value in weights.items()}


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def _stripped(weights: Mapping[str, Any], prefix: str, checkpoint: Path) -> dict[str, Any]:
    names = list(weights)
    module = outermost(names) if prefix == AUTO else f'{prefix.removesuffix(".")}.'
    if not module:
        modules = sorted({name.partition('.')[0] for name in names})
        raise CheckpointError(
            f"strip_prefix='auto' takes off the module in which all names stand, but those of {checkpoint} begin with "
            f'{listed(modules)}. Pass one of the modules, or leave strip_prefix out.'
        )
    outside = [name for name in names if not name.startswith(module)]
    if len(outside) == len(names):
        raise CheckpointError(
            f'strip_prefix={prefix!r} applies to no name in {checkpoint}, which holds {listed(names)}. '
            f"Pass the module that they begin with, or 'auto' for the outermost one."
        )
    stripped = {name.removeprefix(module): value for name, value in weights.items()}
    if len(stripped) < len(names) or '' in stripped:
        collide = [name for name in outside if module + name in weights]
        raise CheckpointError(
            f'strip_prefix={prefix!r} would make two names one in {checkpoint}: {listed(collide)} with '
            f'{listed([module + name for name in collide])}. Leave strip_prefix out.'
        )
    if outside:
        warnings.warn(
            f'{len(outside)} names do not begin with {module} and stay as they are: {listed(outside)}.', stacklevel=5
        )
    return stripped
