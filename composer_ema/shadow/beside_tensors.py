"""The tensors of a module that computes with an average: where each of them lies, or what it is a copy of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from composer_ema.kernels.layout import Pair, grouped, unzip
from composer_ema.shadow.storage import Storage, can_be_kept


class OwnParameter:
    """A parameter of the module.

    Args:
        name: canonical.
        live: the model's, whose class and attributes it gets.
        may_copy: whether it may be a copy where the average has another dtype or lies on another device.

    Attributes:
        parameter: None before the first :meth:`bind`.
    """

    def __init__(self, name: str, live: nn.Parameter, *, may_copy: bool) -> None:
        self._name, self._kind, self._attributes, self._may_copy = name, type(live), dict(vars(live)), may_copy
        self.parameter: nn.Parameter | None = None
        #: The tensor in whose memory the parameter lies, kept alive, and where that is.
        self._home: Tensor | None = None
        self._place: tuple[Any, ...] | None = None
        #: The memory of a copy, and what it was copied from when.
        self._memory: Tensor | None = None
        self._copied: tuple[Any, ...] | None = None
        self.follow(live, is_averaged=False)

    def follow(self, live: nn.Parameter, *, is_averaged: bool) -> None:
        """Takes dtype and device from ``live``, and the value too unless that is averaged."""
        self._dtype, self._device, self._strides = live.dtype, live.device, live.stride()
        self._live = None if is_averaged else live  # what is averaged may be freed while the module lives

    def bind(self, storage: Storage, stash: Mapping[str, Tensor]) -> None:
        """Makes the parameter lie in the memory of its value, or copies that.

        Args:
            storage: the average.
            stash: training weights that another average has replaced in the model.
        """
        if self._live is not None:
            self._lie_in(stash.get(self._name, self._live))
            return
        average = storage.parameters.get(self._name)
        if average is None:
            raise RuntimeError(f'the average of {self._name} is gone, and so is the model. Load it anew.')
        if average.dtype == self._dtype and average.device == self._device:
            self._lie_in(average)
        else:
            self._copy(average, storage.num_updates)

    def _lie_in(self, value: Tensor) -> None:
        place = _place_of(value)
        if place != self._place:
            self._home, self._place = value.detach(), place
            if self.parameter is None:
                self.parameter = _new_parameter(self._home, self._kind, self._attributes)
            else:
                self.parameter.data = self._home
        elif _has_address(value) and _place_of(self.parameter) != place:
            raise RuntimeError(
                f'{self._name} of the module no longer lies in the memory of the average, as after to(), half() or an '
                'assignment of another tensor. Move the average, with shadow.to(...), and the module follows; or call '
                'shadow.module(model) again.'
            )

    def _copy(self, average: Tensor, num_updates: int) -> None:
        if not self._may_copy:
            raise ValueError(
                f'the average of {self._name} is {average.dtype} on {average.device}, and the model has it as '
                f'{self._dtype} on {self._device}, so a module cannot compute with the memory of the average. Build '
                'the shadow with the dtype and the device of the model, or pass copy=True: then the first forward '
                'after each update copies the average.'
            )
        if self._memory is None or (self._memory.dtype, self._memory.device) != (self._dtype, self._device):
            self._memory, self._copied = _empty(average, self._strides, self._dtype, self._device), None
        self._lie_in(self._memory)
        if (source := (id(average), average._version, num_updates)) != self._copied:
            assert self.parameter is not None
            self.parameter.copy_(average)
            self._copied = source


class BufferSource:
    """Where a buffer of the module gets its value.

    Args:
        live: the model's buffer.
        name: canonical.
        is_averaged: whether the average has a value for it.
        parent: for a view of a parameter, that of the module in its place, and how far into that the view begins.
    """

    def __init__(self, live: Tensor, name: str, *, is_averaged: bool, parent: tuple[nn.Parameter, int] | None) -> None:
        self.live, self._name, self._parent = live, name, parent
        self.can_be_written = can_be_kept(live)
        self._is_averaged = is_averaged and self.can_be_written

    def value(self, storage: Storage, stash: Mapping[str, Tensor]) -> Tensor:
        if self._parent is not None:
            parameter, offset = self._parent
            live, start = self.live, parameter.storage_offset() + offset
            return parameter.detach().as_strided(live.size(), live.stride(), start)
        average = storage.buffers.get(self._name) if self._is_averaged else None
        return stash.get(self._name, self.live) if average is None else average


class OwnBuffers:
    """The buffers of a part of the module.

    Args:
        own: the part.
        sources: by key; None for a buffer that is None.
        volatile: the keys of those that the model does not save.
    """

    def __init__(self, own: nn.Module, sources: Mapping[str, BufferSource | None], volatile: set[str]) -> None:
        self._own, self._sources, self._volatile = own, sources, volatile
        self._copies: dict[str, Tensor] = {}

    def refresh(self, storage: Storage, stash: Mapping[str, Tensor], copies: Copies) -> None:
        """Makes the buffers of the part those of the model, as copies, whatever a forward has made of them."""
        own = self._own._buffers
        for key in own.keys() - self._sources.keys():
            del own[key]
        for key, source in self._sources.items():
            own[key] = None
            if source is not None:
                own[key] = self._copies[key] = copies.of(source, source.value(storage, stash), self._copies.get(key))
        self._own._non_persistent_buffers_set = set(self._volatile)


class Copies:
    """Copies of buffers, tied ones once.

    Args:
        in_place: whether earlier copies may be written. Otherwise a graph may still need them for its backward.
    """

    def __init__(self, *, in_place: bool) -> None:
        self._in_place = in_place
        self._made: dict[int, Tensor] = {}
        self._pairs: list[Pair] = []

    def of(self, source: BufferSource, value: Tensor, earlier: Tensor | None) -> Tensor:
        """A copy of ``value`` in the dtype of ``source``; it has that value after :meth:`run`."""
        live = source.live
        if id(live) not in self._made:
            if not source.can_be_written:
                made = live.detach()
            elif self._in_place and earlier is not None and earlier.shape == live.shape:
                made = earlier
                self._pairs.append((made, value))
            else:
                made = value.detach().to(live.device, live.dtype, copy=True)
            self._made[id(live)] = made
        return self._made[id(live)]

    def run(self) -> None:
        """Writes the earlier copies."""
        for pairs in grouped(self._pairs, lambda pair: (pair[0].dtype, pair[0].device, pair[1].dtype)).values():
            torch._foreach_copy_(*unzip(pairs))


def _new_parameter(value: Tensor, kind: type, attributes: Mapping[str, Any]) -> nn.Parameter:
    """A parameter in the memory of ``value`` that wants no gradient, and whose changes autograd sees."""
    if type(value) in (Tensor, nn.Parameter):
        parameter = torch.Tensor._make_subclass(kind, value, False)
    else:
        parameter = nn.Parameter(value, requires_grad=False)
    vars(parameter).update(attributes)
    return parameter  # pyright: ignore[reportReturnType]


def _empty(like: Tensor, strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty_strided(like.shape, strides, dtype=dtype, device=device)


def _has_address(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def _place_of(tensor: Tensor | None) -> tuple[Any, ...]:
    assert tensor is not None, 'bind comes first'
    return (tensor.data_ptr() if _has_address(tensor) else id(tensor)), tensor.dtype
