"""``compute_ema``: one functional update of an averaged model, which may be a module, a shadow or a state dict."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, MutableMapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from composer_ema import kernels
from composer_ema.averages import weight_from_smoothing
from composer_ema.kernels.layout import unzip
from composer_ema.kernels.rules import is_inexact
from composer_ema.model.inventory import Inventory
from composer_ema.model.names import check_same
from composer_ema.model.sharding import is_shard, lie_alike, local, refuse_placeholders, share_of
from composer_ema.model.untraced import aside, is_traced
from composer_ema.model.watch import Watch
from composer_ema.model.wrappers import canonical_name, unwrap, wrapper_prefix
from composer_ema.settings import Buffers, Settings
from composer_ema.shadow import loan, rounding
from composer_ema.shadow.shadow_model import ShadowModel
from composer_ema.shadow.storage import can_be_kept, check_buffer_patterns, views_of_parameters
from composer_ema.wording import shown

_SHARD_ALIKE = (
    'Nothing was changed. Shard ema_model as model is sharded, or pass a ShadowModel(model), which is sharded as its '
    'model is. So is a state dict of clones: {name: tensor.clone() for name, tensor in model.state_dict().items()}.'
)
_REMEDY = 'Nothing was changed. Pass an average of the same architecture, for example copy.deepcopy(model).'


def compute_ema(
    model: nn.Module,
    ema_model: nn.Module | ShadowModel | MutableMapping[str, Tensor],
    smoothing: float = 0.99,
    *,
    buffers: Buffers | None = None,
) -> None:
    """Moves ``ema_model`` towards ``model``, in place::

        ema = smoothing * ema + (1 - smoothing) * model

    Averages parameters, and the running means and variances of normalisation layers; copies every other buffer, unless
    ``buffers`` says otherwise. Where an averaged buffer is not finite in ``model`` or in the average, the element is
    copied. Updates tied tensors once.

    Under FSDP2 and tensor parallelism each process updates its own shards, without communication, where both are
    sharded alike. The weights of a whole ``model`` may also go into a sharded ``ema_model``: each process takes its
    part of them.

    Args:
        model: the module with the latest weights, bare or wrapped by DDP, ``torch.compile`` or the like; only read.
        ema_model: the average, which keeps its dtypes: a module, bare or wrapped, a :class:`ShadowModel`, or a state
            dict of tensors such as ``copy.deepcopy(model.state_dict())``.
        smoothing: share of the old average to keep, in [0, 1]: 0 copies the model, 1 keeps the average. For a half-life
            of n updates pass ``2 ** (-1 / n)``. Default: 0.99.
        buffers: ``'statistics'``, ``'average'``, ``'copy'`` or a mapping of patterns to the latter two, as for
            :class:`composer_ema.settings.Settings`. A :class:`ShadowModel` has its own setting, so leave it out there.
            Default: ``'statistics'``.

    Raises:
        NotImplementedError: a tensor is sharded by FSDP1 or DeepSpeed.
        RuntimeError: a :class:`ShadowModel` has been swapped into one of the models.
        TypeError: ``ema_model`` is none of these, ``smoothing`` is not a number, or ``buffers`` is given beside a
            :class:`ShadowModel`.
        ValueError: ``smoothing`` or ``buffers`` is out of range, or the two have different names or shapes; the message
            lists them. Or ``model`` is sharded and ``ema_model`` is not, or in another way. Nothing is changed.

    Example:
        >>> model, ema_model = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> _ = nn.init.ones_(model.weight), nn.init.zeros_(ema_model.weight)
        >>> compute_ema(model, ema_model, smoothing=0.9)
        >>> round(ema_model.weight.item(), 6)
        0.1
    """
    if is_traced():
        aside(compute_ema, model, ema_model, smoothing, buffers=buffers)
        return
    weight = weight_from_smoothing(smoothing)
    if isinstance(ema_model, ShadowModel):
        if buffers is not None:
            raise TypeError(
                f'a ShadowModel averages buffers as it was built to, got buffers={shown(buffers)}. Leave it out '
                'here, and pass it to ShadowModel.'
            )
        ema_model.update(model, smoothing)
    elif isinstance(ema_model, nn.Module):
        _step_between(unwrap(model), unwrap(ema_model), _settings_of(buffers))(weight)
    elif isinstance(ema_model, Mapping):
        loan.refuse(unwrap(model))
        if strange := [name for name in ema_model if not isinstance(name, str)]:
            raise TypeError(
                f'ema_model must map names to tensors, got the name {shown(strange[0])}. Pass '
                'copy.deepcopy(model.state_dict()).'
            )
        inventory = Inventory.of(unwrap(model))  # first: under FSDP2 it brings the shards back
        sources, shadows = _tensors(unwrap(model).state_dict(keep_vars=True)), _tensors(ema_model)
        refuse_placeholders(shadows)
        refuse_placeholders(inventory.tensors())
        shadows = _bare(shadows, model, sources)
        check_same('ema_model', sources, shadows, remedy=_REMEDY)
        _prepare(shadows, sources, inventory, _settings_of(buffers))(weight)
    else:
        raise TypeError(
            f'ema_model must be a module, a ShadowModel or a state dict, got {type(ema_model).__name__}. '
            'Pass for example copy.deepcopy(model).'
        )


def _tensors(state_dict: Mapping[str, object]) -> dict[str, Tensor]:
    """Returns the tensors of a state dict by canonical name. A module's extra state cannot be averaged."""
    return {canonical_name(name): value for name, value in state_dict.items() if isinstance(value, Tensor)}


def _bare(shadows: dict[str, Tensor], model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """The tensors under the names of the module that ``model`` wraps, if they have those of the wrapper."""
    prefix = wrapper_prefix(model)
    bare = {name.removeprefix(prefix): tensor for name, tensor in shadows.items()}
    return bare if bare.keys() == set(names) else shadows


_DEFAULT = Settings()


def _settings_of(buffers: Buffers | None) -> Settings:
    return _DEFAULT if buffers is None else Settings(buffers=buffers)


#: The step that last updated each averaged module, to use again while neither module's tensors are replaced.
_pairings: weakref.WeakKeyDictionary[nn.Module, _Pairing] = weakref.WeakKeyDictionary()


class _Pairing:
    """A prepared step from one module to its average, and the watches that tell when it is stale."""

    def __init__(self, model: nn.Module, ema_model: nn.Module, settings: Settings) -> None:
        sources, shadows = Inventory.of(model), Inventory.of(ema_model)
        refuse_placeholders(sources.tensors())
        refuse_placeholders(shadows.tensors())
        check_same('ema_model', sources.tensors(), shadows.tensors(), remedy=_REMEDY)
        average = weakref.ref(ema_model)
        self._watches = (
            Watch(model, sources, on_gone=lambda: _forget(average())),
            Watch(ema_model, shadows, on_gone=lambda: None),
        )
        self.identities = loan.identities([*sources.tensors().values(), *shadows.tensors().values()])
        self._settings = settings
        self.step = _prepare(shadows.tensors(), sources.tensors(), sources, settings)

    def is_current(self, model: nn.Module, ema_model: nn.Module, settings: Settings) -> bool:
        """Whether the step still moves the tensors of these two modules, as ``settings`` say."""
        is_alike = settings is self._settings or settings.buffers == self._settings.buffers
        return is_alike and self._watches[0].is_current(model) and self._watches[1].is_current(ema_model)


def _step_between(model: nn.Module, ema_model: nn.Module, settings: Settings) -> Callable[[float], None]:
    if model is ema_model:
        raise ValueError('model and ema_model are the same module. Pass a copy, for example copy.deepcopy(model).')
    pairing = _pairings.get(ema_model)
    if pairing is None or not pairing.is_current(model, ema_model, settings):
        pairing = _pairings[ema_model] = _Pairing(model, ema_model, settings)
    loan.refuse(model, pairing.identities)
    return pairing.step


def _forget(ema_model: nn.Module | None) -> None:
    if ema_model is not None:
        _pairings.pop(ema_model, None)


def _prepare(
    shadows: Mapping[str, Tensor], sources: Mapping[str, Tensor], inventory: Inventory, settings: Settings
) -> Callable[[float], None]:
    """Returns a step that averages parameters and some buffers and copies the others, each piece of memory once.

    Of sharded tensors it moves the parts that this process holds.

    Args:
        shadows: by canonical name.
        sources: likewise; tensors of the module of ``inventory``, under all of their names.
        inventory: tells buffers and statistics from parameters.
        settings: say which buffers are averaged.
    """
    check_buffer_patterns(settings.buffer_patterns, inventory.buffers)
    for name, source in sources.items():
        if source.is_meta or shadows[name].is_meta:
            whose = 'model' if source.is_meta else 'ema_model'
            raise ValueError(
                f'{name} of {whose} is on the meta device, so it has no values. Nothing was changed. Call '
                "to_empty(device='cpu') and initialise or load its weights first."
            )
        if source.layout is not torch.strided or source.is_nested:
            kind = 'nested' if source.is_nested else f'stored as {source.layout}'
            raise ValueError(
                f'{name} is {kind}, and compute_ema moves dense tensors only. Pass a ShadowModel, which leaves such a '
                'buffer to the model.'
            )
    _check_layouts(shadows, sources)
    parameters, averaged, copied, seen = [], [], [], set()
    buffers = {n: shadow for n, shadow in shadows.items() if inventory.aliases.get(n, n) in inventory.buffers}
    views = views_of_parameters((s for n, s in shadows.items() if n not in buffers), buffers)
    for name, shadow in shadows.items():
        if name in views or not (can_be_kept(shadow) or can_be_kept(sources[name])):
            continue  # it shows what the parameter shows, or never changes
        if not can_be_kept(shadow):
            raise ValueError(
                f'{name} of ema_model cannot be written, since its elements share memory, but that of model can. '
                f'Give ema_model a buffer of its own, as in ema_model.{name} = ema_model.{name}.clone().'
            )
        source, shadow = share_of(sources[name].detach(), shadow), local(shadow)
        if shadow.numel() and (key := (shadow.data_ptr(), shadow.shape, shadow.stride())) not in seen:
            seen.add(key)
            first = inventory.aliases.get(name, name)
            if not is_inexact(shadow):
                rows = copied
            elif first not in inventory.buffers:
                rows = parameters
            else:
                is_statistic = first in inventory.statistics
                rows = averaged if settings.averages_buffer(first, is_statistic=is_statistic) else copied
            rows.append((shadow, source))
    averages, current = unzip([*parameters, *averaged])
    mended = range(len(parameters), len(averages))
    average = kernels.prepare([averages], current, mended=mended, copied=copied)
    dtype = rounding.coarsest(shadow.dtype for shadow in averages)
    least, has_warned = rounding.least_weight(dtype), False

    def step(weight: float) -> None:
        nonlocal has_warned
        if 0 < weight < least and not has_warned and dtype is not None:
            has_warned = True
            wider = 'float' if torch.finfo(dtype).bits == 16 else 'double'
            warnings.warn(
                f'ema_model is {rounding.in_words(dtype, weight)}. Call ema_model.{wider}(), '
                'or pass a ShadowModel(model, compensated=True).',
                stacklevel=3,
            )
        average((weight,))

    return step


def _check_layouts(shadows: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Raises a ValueError unless each process holds what it needs of the sources; see :func:`compute_ema`."""
    for name, shadow in shadows.items():
        source = sources[name]
        if is_shard(source) and not lie_alike(source, shadow):
            raise ValueError(
                f'{name} of model is {_layout(source)}, that of ema_model {_layout(shadow)}, and compute_ema gathers '
                f'nothing. {_SHARD_ALIKE}'
            )


def _layout(tensor: Tensor) -> str:
    return f'sharded, {tensor.placements} over {tensor.device_mesh}' if isinstance(tensor, DTensor) else 'whole'
