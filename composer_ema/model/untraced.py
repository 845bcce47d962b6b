"""Keeps dynamo out of functions that swap, watch and update: a compiled region breaks there and calls them eagerly.

Dynamo cannot trace the weak references, data pointers, locks and streams that these rest on; some of them, such as a
decorator inside a function, end in an InternalTorchDynamoError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C._dynamo.eval_frame import set_eval_frame  # pyright: ignore[reportMissingImports]
from torch.compiler import is_dynamo_compiling

Result = TypeVar('Result')
Function = TypeVar('Function', bound=Callable[..., Any])


def is_traced() -> bool:
    """Whether dynamo traces the caller, or will trace what that calls."""
    if is_dynamo_compiling():  # dynamo takes this for True and reads no further
        return True
    # Dynamo runs a frame that it gives up as it stands, and traces what that calls.
    callback = set_eval_frame(None)
    if callback is None:
        return False
    set_eval_frame(callback)
    return True


@torch._disable_dynamo  # torch.compiler.disable would import dynamo now, which takes longer than importing torch
def aside(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Calls ``function`` eagerly, with all that it calls."""
    return function(*args, **kwargs)


def untraced(function: Function) -> Function:
    """Makes a call of ``function`` in a compiled region break the graph, as ``torch.compiler.disable`` does.

    Outside of one it costs half of that. Where even this counts, ask :func:`is_traced` in the function itself.

    Example:
        >>> @untraced
        ... def traced() -> bool:
        ...     return torch.compiler.is_dynamo_compiling()
        >>> torch.compile(lambda: traced(), backend='eager')()
        False
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        if is_traced():
            return aside(function, *args, **kwargs)
        return function(*args, **kwargs)

    # Dynamo counts recompilations by code object, so each function gets one of its own.
    call.__code__ = call.__code__.replace(co_name=function.__name__)
    return functools.wraps(function)(call)  # pyright: ignore[reportReturnType]
