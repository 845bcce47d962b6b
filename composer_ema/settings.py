"""What is kept of a model and how: one frozen object, checked once, and written into the signatures of all who take it.

The arguments are described here and nowhere else. :class:`ShadowModel`, :class:`EMAOptimizer`, :class:`EMA` and
:class:`SWA` collect them as ``**settings``; :func:`takes_settings` lists them one by one in the signatures, which
recipes and other registries read.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeVar

import torch
from torch import Tensor

from composer_ema import plain
from composer_ema.spans import ArgumentError
from composer_ema.wording import shown, suggestion

BufferMode = Literal['average', 'copy']
#: One mode for all floating buffers, or patterns over their names with a mode each.
Buffers = Literal['statistics', 'average', 'copy'] | Mapping[str, BufferMode]
Rounding = Literal['nearest', 'stochastic']
Backend = Literal['auto', 'fused', 'foreach', 'blocked', 'reference']
#: ``avg_fn(averaged, current, num_averaged)`` returns the new average of one tensor.
AvgFn = Callable[[Tensor, Tensor, Any], Tensor]
#: ``multi_avg_fn(averaged, current, num_averaged)`` writes the new averages of many tensors into ``averaged``.
MultiAvgFn = Callable[[list[Tensor], list[Tensor], Any], Any]

_Class = TypeVar('_Class', bound=type)
#: The Composer algorithms put this before ``dtype`` and ``device``, which could otherwise be those of the model.
_PREFIX = 'shadow_'


@dataclass(frozen=True)
class Settings:
    """Which tensors of a model an average keeps, and how it keeps them.

    Args:
        buffers: ``'statistics'`` averages the running means and variances of normalisation layers, which their module
            type tells (BatchNorm, SyncBatchNorm, InstanceNorm, subclasses), and takes the latest value of every other
            buffer, such as a mask or a scale. ``'average'`` averages all floating buffers, ``'copy'`` none. A mapping
            of regular expressions to ``'average'`` or ``'copy'`` decides by canonical name, the first that is found
            wins, and what none finds follows ``'statistics'``. Each pattern must decide for some buffer. Integer and
            boolean buffers are always copied, and so is an element of a buffer where the average or the model is not
            finite.
        include: regular expressions searched for in canonical names; only matching names are kept. Default: all.
        exclude: regular expressions that take names out again.
        dtype: floating dtype of the average, or its name. Default: float32 for 16-bit tensors, else each tensor's own.
        device: where the average lives. Default: beside each tensor. On ``'cpu'``, the average of a model on CUDA
            takes no memory of the device; with ``overlap``, as in EMA and EMAOptimizer, training does not wait for it.
        skip_nonfinite: an element whose training weight is NaN or infinite leaves its average alone and is counted.
        rounding: how a bfloat16 average is rounded: ``'nearest'``, which drops small updates, or ``'stochastic'``, up
            or down at random in proportion, which keeps them on average.
        compensated: keep beside each averaged tensor a Kahan term, which holds what rounding has left out. No small
            update is lost then: the average is within 1e-6 of one in float64, for any half-life. The terms take as
            much memory again as averages in float32 or float64, and twice as much as averages in 16 bits. They are
            saved with the average. On the host, training waits for the update. What is lent and exported is the
            average itself, as its dtype holds it.
        shard_over_ranks: under DDP, split the average over all ranks. Each of n ranks keeps and updates about 1/n of
            it, a piece of every parameter, from its own copy of the weights and without communication. Buffers, which
            are small, stay whole on each rank. The whole average is gathered, tensor by tensor, only to put it into a
            model, to copy it, or to save it in one file; every rank must make such a call. With one process, or on a
            model that is sharded already, the setting has no effect, and a warning says so.
        seed: key of the random bits, at least 0; kept in the state, so that a resumed run draws the same.
        backend: ``'fused'``, ``'foreach'``, ``'blocked'``, ``'reference'``, or ``'auto'``: for each tensor the first of
            them that can take it. ``'blocked'`` is for compensated averages, ``'foreach'`` for all others. On CUDA
            the fused one also skips and rounds at random; on a CPU foreach skips, and the slow float64 reference
            rounds at random.
        avg_fn: a function that makes the average in place of the formula: ``avg_fn(averaged, current, num_averaged)``
            returns the new average of a tensor, of the same shape and dtype, as for
            ``torch.optim.swa_utils.AveragedModel``. The first update copies; ``num_averaged`` counts the updates so
            far, as an int64 scalar tensor on the CPU. ``current`` is cast to the dtype and device of ``averaged``.
            Results are written when all have been computed, so an update takes memory for one more copy. Never saved:
            pass it again to an average that loads a state.
        multi_avg_fn: the same for all parameters of a dtype and device at once, and then for its averaged buffers:
            ``multi_avg_fn(averaged, current, num_averaged)`` takes lists and writes into the tensors of the first.

    Raises:
        TypeError, ValueError: an argument out of range, or two that cannot take effect together.

    Example:
        >>> Settings.of({'dtype': 'bfloat16', 'rounding': 'stochastic'}).dtype
        torch.bfloat16
    """

    buffers: Buffers = 'statistics'
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    skip_nonfinite: bool = False
    rounding: Rounding = 'nearest'
    compensated: bool = False
    shard_over_ranks: bool = False
    seed: int = 0
    backend: Backend = 'auto'
    avg_fn: AvgFn | None = None
    multi_avg_fn: MultiAvgFn | None = None

    def __post_init__(self) -> None:
        checked = {
            'buffers': _check_buffers(self.buffers),
            'rounding': plain.choice('rounding', self.rounding, typing.get_args(Rounding)),
            'backend': plain.choice('backend', self.backend, typing.get_args(Backend)),
            **{name: plain.flag(name, getattr(self, name)) for name in _FLAGS},
            'seed': check_seed(self.seed),
            'dtype': parse_dtype(self.dtype),
            'device': parse_device(self.device),
            **{name: _check_patterns(name, getattr(self, name)) for name in ('include', 'exclude')},
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        _ = self.included, self.excluded, self.buffer_patterns
        _check_rounding(self.rounding, self.dtype)
        _check_compensated(self.compensated, self.rounding, self.backend)
        _check_functions(self.avg_fn, self.multi_avg_fn)
        if self.has_function:
            self._check_function_stands_alone()

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Settings:
        """Settings from what a constructor collected; ``shadow_dtype`` and ``shadow_device`` count as the short names.

        Raises:
            TypeError: an argument that is none of the settings.
            ValueError: an argument out of range; the meta device among them, on which an average has no values.
        """
        settings = cls(**{name.removeprefix(_PREFIX): value for name, value in arguments.items()})
        settings.refuse_meta()
        return settings

    def refuse_meta(self) -> None:
        """Raises a ValueError if the average shall live on the meta device."""
        if self.device is not None and self.device.type == 'meta':
            raise ValueError(
                "the shadow's device must hold values, got 'meta'. Pass 'cpu' or 'cuda', or leave the device out."
            )

    def as_arguments(self) -> dict[str, Any]:
        """The arguments by their short names, for another object that takes settings."""
        return {name: getattr(self, name) for name in _DEFAULTS}

    def replace(self, **changed: Any) -> Settings:
        """The same with some arguments changed, and checked again."""
        return dataclasses.replace(self, **changed)

    def moved_to(self, device: torch.device | str | None, dtype: torch.dtype | str | None) -> Settings:
        """The same for another device and dtype; None leaves either as it is.

        Raises:
            TypeError, ValueError: as for the class, and the device holds no values.
        """
        changed = self.replace(device=parse_device(device) or self.device, dtype=parse_dtype(dtype) or self.dtype)
        changed.refuse_meta()
        return changed

    @property
    def has_function(self) -> bool:
        """Whether ``avg_fn`` or ``multi_avg_fn`` makes the average."""
        return self.avg_fn is not None or self.multi_avg_fn is not None

    @property
    def function_name(self) -> str | None:
        """What the user's function is called, for messages; None without one."""
        function = self.avg_fn if self.avg_fn is not None else self.multi_avg_fn
        return None if function is None else name_of(function)

    @functools.cached_property
    def included(self) -> tuple[re.Pattern[str], ...]:
        """The patterns of ``include``; none where every name is included."""
        return _compile('include', self.include)

    @functools.cached_property
    def excluded(self) -> tuple[re.Pattern[str], ...]:
        """The patterns of ``exclude``."""
        return _compile('exclude', self.exclude)

    @functools.cached_property
    def buffer_patterns(self) -> tuple[tuple[re.Pattern[str], BufferMode], ...]:
        """The patterns of ``buffers`` with their modes, in order; none where one mode is for all."""
        if isinstance(self.buffers, str):
            return ()
        modes = tuple(self.buffers.values())
        return tuple(zip(_compile('buffers', tuple(self.buffers)), modes, strict=True))

    def averages_buffer(self, name: str, *, is_statistic: bool) -> bool:
        """Whether a floating buffer is averaged, not copied.

        Args:
            name: its canonical name.
            is_statistic: whether it is a running mean or variance of a normalisation layer.
        """
        mode = next((mode for pattern, mode in self.buffer_patterns if pattern.search(name)), self.buffers)
        return mode == 'average' or (mode != 'copy' and is_statistic)

    def as_plain(self, names: Collection[str]) -> dict[str, Any]:
        """The settings called ``names``, as they are or behind ``shadow_``, as strings, numbers, lists and None."""
        written = {}
        for name in names:
            value = getattr(self, name.removeprefix(_PREFIX))
            if isinstance(value, torch.dtype):
                value = str(value).removeprefix('torch.')
            elif isinstance(value, torch.device):
                value = str(value)
            elif callable(value):
                value = name_of(value)
            elif isinstance(value, Mapping):
                value = dict(value)
            elif isinstance(value, Sequence) and not isinstance(value, str):
                value = list(value)
            written[name] = value
        return written

    def _check_function_stands_alone(self) -> None:
        """Only the formula can skip, round and choose a backend."""
        for name in ('skip_nonfinite', 'rounding', 'compensated', 'backend'):
            value = getattr(self, name)
            if value != _DEFAULTS[name]:
                raise ValueError(
                    f'{name}={value!r} has no effect on an average by a function of yours. '
                    'Leave it out, or do it in the function.'
                )


class _Shared(TypedDict, total=False):
    buffers: Buffers
    include: str | Sequence[str] | None
    exclude: str | Sequence[str] | None
    skip_nonfinite: bool
    rounding: Rounding
    compensated: bool
    shard_over_ranks: bool
    seed: int
    avg_fn: AvgFn | None
    multi_avg_fn: MultiAvgFn | None


class ShadowSettings(_Shared, total=False):
    """The settings that :class:`composer_ema.ShadowModel` takes."""

    dtype: str | torch.dtype | None
    device: str | torch.device | None
    backend: Backend


class OptimizerSettings(_Shared, total=False):
    """The settings that :class:`composer_ema.EMAOptimizer` takes; ``device`` stands among its own arguments."""

    dtype: str | torch.dtype | None
    backend: Backend


class TrainerSettings(_Shared, total=False):
    """The settings that the Composer algorithms take."""

    shadow_dtype: str | torch.dtype | None
    shadow_device: str | torch.device | None


_FLAGS = ('skip_nonfinite', 'compensated', 'shard_over_ranks')
# Where a class keeps the names of the settings that it takes.
_TAKEN = '_settings_taken'
_DEFAULTS = {each.name: each.default for each in dataclasses.fields(Settings)}


def takes_settings(cls: _Class) -> _Class:
    """Lists the settings one by one in the signature of a class whose constructor collects ``**settings``.

    The annotation ``Unpack[...]`` of ``settings`` says which. A call with an argument that is none of them fails as it
    would for any other function, with the legal name that is near, or all of them.
    """
    constructor = cls.__init__
    hints = typing.get_type_hints(constructor)
    (taken,) = typing.get_args(hints.pop('settings'))
    kinds = typing.get_type_hints(taken)
    own = [
        parameter.replace(annotation=hints.get(parameter.name, parameter.annotation))
        for parameter in inspect.signature(constructor).parameters.values()
        if parameter.name != 'settings'
    ]
    listed = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS[name.removeprefix(_PREFIX)], annotation=kind
        )
        for name, kind in kinds.items()
    ]
    signature = inspect.Signature([*own, *listed])

    @functools.wraps(constructor)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        unknown = next((name for name in kwargs if name not in signature.parameters), None)
        if unknown is not None:
            remedy = suggestion(unknown, list(signature.parameters)[1:], 'It takes')
            raise TypeError(f'{cls.__name__} takes no argument {unknown!r}. {remedy}')
        constructor(self, *args, **kwargs)

    checked.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]: inspect reads it
    checked.__annotations__ = {each.name: each.annotation for each in (*own[1:], *listed)}
    cls.__init__ = checked
    setattr(cls, _TAKEN, tuple(name for name in signature.parameters if name.removeprefix(_PREFIX) in _DEFAULTS))
    return cls


def settings_of(cls: type) -> list[str]:
    """The names of the settings that a class takes, as its signature spells them.

    A subclass takes what its base does, whatever its own constructor spells out.
    """
    return list(getattr(cls, _TAKEN, ()))


def check_seed(seed: int) -> int:
    """Returns ``seed`` as an int, or raises a TypeError or ValueError: it is a whole number in [0, 2**63)."""
    return plain.whole('seed', seed)


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating dtype from itself or its name, or None.

    Raises:
        ValueError: no floating dtype.
    """
    if dtype is None:
        return None
    parsed: Any = getattr(torch, dtype.removeprefix('torch.'), None) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype) or parsed not in _DTYPES:
        raise ValueError(f"the shadow's dtype must be float64, float32, bfloat16 or float16, got {shown(dtype)}.")
    return parsed


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def parse_device(device: torch.device | str | None) -> torch.device | None:
    """A device from itself or its name, or None.

    Raises:
        ValueError: torch does not know the device.
    """
    if device is None or isinstance(device, torch.device):
        return device
    try:
        if not isinstance(device, (str, int)) or isinstance(device, bool):
            raise TypeError
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        remedy = f' A dtype is passed as dtype={device}.' if isinstance(device, torch.dtype) else ''
        message = f"the shadow's device must be one such as 'cpu' or 'cuda:0', got {shown(device)}.{remedy}"
        raise ValueError(message) from error


def check_device_is_here(device: torch.device | None, argument: str = f'{_PREFIX}device') -> None:
    """Raises where an average is about to be kept on a device that this machine lacks.

    Not when the device is parsed, since a recipe may be read where it does not run. CUDA is not initialised by this, so
    that processes forked later can use it.

    Args:
        device: the device; None is always here.
        argument: what the user calls it. Default: that of the shadow.

    Raises:
        ArgumentError: torch finds no such device.
    """
    if device is None or device.type == 'cpu':
        return
    # Backends of others add themselves to torch by name. What cannot count its devices is left to torch.
    count_devices = getattr(getattr(torch, device.type, None), 'device_count', None)
    count = None if count_devices is None else count_devices()
    if count is not None and (device.index or 0) >= count:
        found = f'{count or "no"} {device.type} device{"" if count == 1 else "s"}'
        is_of_shadow = argument.startswith(_PREFIX)
        named, else_ = (
            ("the shadow's device", ' to keep the average beside the weights') if is_of_shadow else (argument, '')
        )
        raise ArgumentError(
            f"{named} must be one of this machine, got '{device}', and torch finds {found} here. Pass 'cpu', or leave "
            f'the device out{else_}.',
            argument,
        )


def name_of(function: Callable[..., Any]) -> str:
    """A function's own name, for messages and for the record of a run."""
    name = getattr(function, '__qualname__', None)
    return str.__str__(name) if isinstance(name, str) and name else type(function).__qualname__


def _check_buffers(buffers: Any) -> Buffers:
    if isinstance(buffers, Mapping):
        for pattern, mode in buffers.items():
            if not isinstance(mode, str) or mode not in typing.get_args(BufferMode):
                raise ArgumentError(
                    f"buffers must give each pattern 'average' or 'copy', got {shown(mode)} for {shown(pattern)}.",
                    'buffers',
                )
        if not buffers:
            raise ArgumentError("buffers is a mapping without patterns. Leave it out, or pass 'statistics'.", 'buffers')
        # The caller's may change.
        own: Any = {_check_pattern('buffers', pattern): str.__str__(mode) for pattern, mode in buffers.items()}
        return own
    if not isinstance(buffers, str) or buffers not in ('statistics', 'average', 'copy'):
        raise ArgumentError(
            f"buffers must be 'statistics', 'average', 'copy', or a mapping of patterns to the latter two, "
            f'got {shown(buffers)}.',
            'buffers',
        )
    one: Any = str.__str__(buffers)
    return one


def _check_rounding(rounding: Rounding, dtype: object) -> None:
    """Only bfloat16 can be rounded at random."""
    if rounding == 'stochastic' and dtype is not torch.bfloat16:
        raise ValueError(
            f"rounding='stochastic' rounds a bfloat16 average, but its dtype is {dtype or 'that of the weights'}. "
            "Set the shadow's dtype to 'bfloat16', or leave rounding out."
        )


def _check_compensated(compensated: bool, rounding: Rounding, backend: Backend) -> None:
    """Raises unless averages are compensated where the backend is for such, and round to the nearest then."""
    if compensated and rounding == 'stochastic':
        raise ValueError(
            "compensated=True keeps what rounding leaves out, and rounding='stochastic' rounds at random in place of "
            'that. Pass one of the two.'
        )
    if compensated and backend == 'foreach':
        raise ValueError(
            "backend='foreach' keeps no Kahan term, as compensated=True asks. Pass backend='blocked', or leave it out."
        )
    if backend == 'blocked' and not compensated:
        raise ValueError(
            "backend='blocked' is for averages with a Kahan term. Pass compensated=True as well, or leave backend out."
        )


def _check_functions(avg_fn: AvgFn | None, multi_avg_fn: MultiAvgFn | None) -> None:
    """Raises unless at most one of the two is given, and is callable."""
    for name, function in (('avg_fn', avg_fn), ('multi_avg_fn', multi_avg_fn)):
        if function is not None and not callable(function):
            raise TypeError(
                f'{name} must be a function of averaged, current and num_averaged, got {shown(function)}. '
                'Pass for example torch.optim.swa_utils.get_ema_multi_avg_fn(0.999) as multi_avg_fn.'
            )
    if avg_fn is not None and multi_avg_fn is not None:
        raise ValueError('pass either avg_fn or multi_avg_fn, got both. multi_avg_fn is the faster one.')


def _check_patterns(argument: str, patterns: Any) -> str | tuple[str, ...] | None:
    """Regular expressions as strings of their own: the caller's list may change."""
    if patterns is None:
        return None
    if isinstance(patterns, str):
        return str.__str__(patterns)
    if not isinstance(patterns, Sequence) or isinstance(patterns, bytes | bytearray):
        raise TypeError(f'{argument} must be a regular expression or a list of them, got {shown(patterns)}.')
    return tuple(_check_pattern(argument, pattern) for pattern in patterns)


def _check_pattern(argument: str, pattern: Any) -> str:
    if not isinstance(pattern, str):
        raise TypeError(f'{argument} must hold strings, got {shown(pattern)} of type {type(pattern).__name__}.')
    return str.__str__(pattern)


def _compile(argument: str, patterns: str | Sequence[str] | None) -> tuple[re.Pattern[str], ...]:
    compiled = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        try:
            compiled.append(re.compile(pattern))
        except (re.error, RecursionError, OverflowError) as error:
            raise ArgumentError(
                f'{argument} pattern {shown(pattern)} is not a regular expression: {error}. '
                f'To match it literally pass {shown(re.escape(pattern))}.',
                argument,
            ) from error
    return tuple(compiled)
