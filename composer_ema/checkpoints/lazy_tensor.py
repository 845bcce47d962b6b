"""A tensor whose values are read from the disk by each operation that needs them, and kept by none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor


class LazyTensor(Tensor):
    """Stands for a tensor on the disk: shape and dtype are known, values are read when something computes with them.

    Any operation of torch takes it and returns ordinary tensors. Whoever needs the values more than once asks
    :func:`in_memory` for them first. It owns no memory, so it shares none with another tensor.

    Args:
        shape: of the tensor.
        dtype: likewise.
        read: returns the values, an ordinary tensor of that shape and dtype on the CPU.
    """

    _read: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls: type[LazyTensor], shape: Sequence[int], dtype: torch.dtype, read: Callable[[], Tensor]
    ) -> LazyTensor:
        make: Any = torch.Tensor._make_wrapper_subclass  # pyright: ignore[reportAttributeAccessIssue]: not declared
        made = make(cls, tuple(shape), dtype=dtype, device='cpu')
        made._read = read
        return made

    # Operations go straight to the one below.
    __torch_function__: ClassVar[Any] = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        return func(*_with_values(args), **_with_values(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        del tensor_contents
        return f'LazyTensor({tuple(self.shape)}, {self.dtype})'

    def __deepcopy__(self, memo: Any) -> LazyTensor:
        del memo
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return in_memory(self).__reduce_ex__(protocol)


def in_memory(tensor: Tensor) -> Tensor:
    """The values of a tensor that may be on the disk; an ordinary tensor is returned as it is."""
    return tensor._read() if isinstance(tensor, LazyTensor) else tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether every element has a value of its own to compute with."""
    is_strided = tensor.layout is torch.strided and not tensor.is_nested
    return is_strided and not tensor.is_meta and not tensor.is_quantized


def _with_values(value: Any) -> Any:
    if isinstance(value, Tensor):
        return in_memory(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_with_values(each) for each in value)
    return {key: _with_values(each) for key, each in value.items()} if isinstance(value, Mapping) else value
