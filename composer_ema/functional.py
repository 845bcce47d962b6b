"""``compute_ema``: one functional update of an averaged model, which may be a module, a shadow or a state dict."""

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
from composer_ema.shadow import loan
from composer_ema.shadow.shadow_model import ShadowModel

_REMEDY = 'Nothing was changed. Pass an average of the same architecture, for example copy.deepcopy(model).'


def compute_ema(
    model: nn.Module, ema_model: nn.Module | ShadowModel | MutableMapping[str, Tensor], smoothing: float = 0.99
) -> None:
    """Moves ``ema_model`` towards ``model``, in place::

        ema = smoothing * ema + (1 - smoothing) * model

    Averages parameters and floating buffers, and copies integer and boolean buffers. Updates tied tensors once.

    Args:
        model: the module with the latest weights, bare or wrapped by DDP, ``torch.compile`` or the like; only read.
        ema_model: the average, which keeps its dtypes: a module, bare or wrapped, a :class:`ShadowModel`, or a state
            dict of tensors such as ``copy.deepcopy(model.state_dict())``.
        smoothing: share of the old average to keep, in [0, 1]: 0 copies the model, 1 keeps the average. For a half-life
            of n updates pass ``2 ** (-1 / n)``. Default: 0.99.

    Raises:
        RuntimeError: a :class:`ShadowModel` has been swapped into one of the models.
        TypeError: ``ema_model`` is none of these, or ``smoothing`` is not a number.
        ValueError: ``smoothing`` is out of range, or the two have different names or shapes; the message lists them.
            Nothing is changed.

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
        loan.refuse(unwrap(model))
        sources, shadows = _tensors(unwrap(model).state_dict(keep_vars=True)), _tensors(ema_model)
        check_same('ema_model', sources, shadows, remedy=_REMEDY)
        _prepare(shadows, sources)(weight)
    else:
        raise TypeError(
            f'ema_model must be a module, a ShadowModel or a state dict, got {type(ema_model).__name__}. '
            'Pass for example copy.deepcopy(model).'
        )


def _tensors(state_dict: Mapping[str, object]) -> dict[str, Tensor]:
    """Returns the tensors of a state dict by canonical name. A module's extra state cannot be averaged."""
    return {canonical_name(name): value for name, value in state_dict.items() if isinstance(value, Tensor)}


#: The step that last updated each averaged module, to use again while neither module's tensors are replaced.
_pairings: weakref.WeakKeyDictionary[nn.Module, _Pairing] = weakref.WeakKeyDictionary()


class _Pairing:
    """A prepared step from one module to its average, and the watches that tell when it is stale."""

    def __init__(self, model: nn.Module, ema_model: nn.Module) -> None:
        sources, shadows = Inventory.of(model), Inventory.of(ema_model)
        check_same('ema_model', sources.tensors(), shadows.tensors(), remedy=_REMEDY)
        average = weakref.ref(ema_model)
        self._watches = (
            Watch(model, sources, on_gone=lambda: _forget(average())),
            Watch(ema_model, shadows, on_gone=lambda: None),
        )
        self.identities = loan.identities([*sources.tensors().values(), *shadows.tensors().values()])
        self.step = _prepare(shadows.tensors(), sources.tensors())

    def is_current(self, model: nn.Module, ema_model: nn.Module) -> bool:
        """Whether the step still moves the tensors of these two modules."""
        return self._watches[0].is_current(model) and self._watches[1].is_current(ema_model)


def _step_between(model: nn.Module, ema_model: nn.Module) -> Callable[[float], None]:
    if model is ema_model:
        raise ValueError('model and ema_model are the same module. Pass a copy, for example copy.deepcopy(model).')
    pairing = _pairings.get(ema_model)
    if pairing is None or not pairing.is_current(model, ema_model):
        pairing = _pairings[ema_model] = _Pairing(model, ema_model)
    loan.refuse(model, pairing.identities)
    return pairing.step


def _forget(ema_model: nn.Module | None) -> None:
    if ema_model is not None:
        _pairings.pop(ema_model, None)


def _prepare(shadows: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> Callable[[float], None]:
    """Returns a step that averages floating tensors and copies the others, each piece of memory once."""
    averaged, copied, seen = [], [], set()
    for name, shadow in shadows.items():
        if shadow.numel() and (key := (shadow.data_ptr(), shadow.shape, shadow.stride())) not in seen:
            seen.add(key)
            (averaged if is_inexact(shadow) else copied).append((shadow, sources[name].detach()))
    averages, current = unzip(averaged)
    average = kernels.prepare([averages], current, copied=copied)
    smallest = smallest_weight(shadow for shadow, _ in averaged if shadow.dtype in (torch.bfloat16, torch.float16))

    def step(weight: float) -> None:
        if 0 < weight < smallest:
            warnings.warn(
                f'ema_model is kept in 16 bits, which round most updates of weight {weight:.2g} away. '
                'Keep it in float32: call ema_model.float(), or pass a ShadowModel.',
                stacklevel=3,
            )
        average((weight,))

    return step
