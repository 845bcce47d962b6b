"""One functional update of an averaged model, whatever form the average is kept in."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, MutableMapping

import torch
from torch import Tensor, nn

from composer_ema import kernels
from composer_ema.averages import weight_from_smoothing
from composer_ema.kernels.layout import unzip
from composer_ema.kernels.rules import is_inexact, smallest_weight
from composer_ema.model.inventory import Inventory
from composer_ema.model.names import check_same
from composer_ema.model.sharding import canonical_name, unwrap
from composer_ema.model.watch import Watch
from composer_ema.shadow.shadow_model import ShadowModel

_REMEDY = 'Nothing was changed. Pass an average of the same architecture, for example copy.deepcopy(model).'


def compute_ema(
    model: nn.Module, ema_model: nn.Module | ShadowModel | MutableMapping[str, Tensor], smoothing: float = 0.99
) -> None:
    """Moves ``ema_model`` towards ``model``, in place::

        ema = smoothing * ema + (1 - smoothing) * model

    Parameters and floating buffers are averaged, integer and boolean buffers copied. Tied tensors move once.

    Args:
        model: holds the latest weights; only read. DDP, ``torch.compile`` and the like are looked through, here and in
            ``ema_model``.
        ema_model: the average, in its own dtypes: a module, a :class:`ShadowModel`, or a state dict of tensors such
            as ``copy.deepcopy(model.state_dict())``.
        smoothing: share of the old average to keep, in [0, 1]: 0 copies, 1 leaves the average alone.
            A half-life of n updates is ``2 ** (-1 / n)``.

    Raises:
        TypeError: ``ema_model`` or ``smoothing`` is of another kind.
        ValueError: ``smoothing`` out of range, or names and shapes that do not fit, all listed. Nothing is changed.

    Example:
        >>> model, ema_model = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> _ = nn.init.ones_(model.weight), nn.init.zeros_(ema_model.weight)
        >>> compute_ema(model, ema_model, smoothing=0.9)
        >>> round(ema_model.weight.item(), 6)
        0.1
    """
    weight = weight_from_smoothing(smoothing)
    if isinstance(ema_model, ShadowModel):
        ema_model.update(model, smoothing)
    elif isinstance(ema_model, nn.Module):
        _step_between(unwrap(model), unwrap(ema_model))(weight)
    elif isinstance(ema_model, Mapping):
        sources, shadows = _tensors(unwrap(model).state_dict(keep_vars=True)), _tensors(ema_model)
        check_same('ema_model', sources, shadows, remedy=_REMEDY)
        _prepare(shadows, sources)(weight)
    else:
        raise TypeError(
            f'ema_model must be a module, a ShadowModel or a state dict, got {type(ema_model).__name__}. '
            'Pass for example copy.deepcopy(model).'
        )


def _tensors(state_dict: Mapping[str, object]) -> dict[str, Tensor]:
    """The tensors of a state dict by canonical name; a module's extra state is nothing to average."""
    return {canonical_name(name): value for name, value in state_dict.items() if isinstance(value, Tensor)}


#: A step for each averaged module that was updated before: it is used again while both modules stay as they are.
_pairings: weakref.WeakKeyDictionary[nn.Module, _Pairing] = weakref.WeakKeyDictionary()


class _Pairing:
    """A prepared step from one module to its average, and what tells that it has gone stale."""

    def __init__(self, model: nn.Module, ema_model: nn.Module) -> None:
        sources, shadows = Inventory.of(model), Inventory.of(ema_model)
        check_same('ema_model', sources.tensors(), shadows.tensors(), remedy=_REMEDY)
        average = weakref.ref(ema_model)
        self._watches = (
            Watch(model, sources, on_gone=lambda: _forget(average())),
            Watch(ema_model, shadows, on_gone=lambda: None),
        )
        self.step = _prepare(shadows.tensors(), sources.tensors())

    def is_current(self, model: nn.Module, ema_model: nn.Module) -> bool:
        return self._watches[0].is_current(model) and self._watches[1].is_current(ema_model)


def _step_between(model: nn.Module, ema_model: nn.Module) -> Callable[[float], None]:
    if model is ema_model:
        raise ValueError('model and ema_model are the same module. Pass a copy, for example copy.deepcopy(model).')
    pairing = _pairings.get(ema_model)
    if pairing is None or not pairing.is_current(model, ema_model):
        pairing = _pairings[ema_model] = _Pairing(model, ema_model)
    return pairing.step


def _forget(ema_model: nn.Module | None) -> None:
    if ema_model is not None:
        _pairings.pop(ema_model, None)


def _prepare(shadows: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> Callable[[float], None]:
    """A step that averages the floating tensors and copies the others, each storage once."""
    averaged, copied, seen = [], [], set()
    for name, shadow in shadows.items():
        if shadow.numel() and (key := (shadow.data_ptr(), shadow.shape, shadow.stride())) not in seen:
            seen.add(key)
            (averaged if is_inexact(shadow) else copied).append((shadow, sources[name].detach()))
    averages, current = unzip(averaged)
    average = kernels.prepare([averages], current, copied=copied)
    smallest = smallest_weight(shadow for shadow, _ in averaged if shadow.dtype in (torch.bfloat16, torch.float16))

    @torch.no_grad()
    def step(weight: float) -> None:
        if 0 < weight < smallest:
            warnings.warn(
                f'ema_model is kept in 16 bits, where updates of weight {weight:.2g} are mostly rounded away. '
                'Keep it in float32: ema_model.float(), or a ShadowModel.',
                stacklevel=3,
            )
        average((weight,))

    return step
