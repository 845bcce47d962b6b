"""Processes over gloo that stay up and serve many cases, and what tests of sharded models share.

Importing torch takes each process two seconds, so a group of :func:`ranks` starts once and is sent one function
after another. What runs in a rank returns numbers, and the test asserts: assertions there are not rewritten.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from composer_ema import ShadowModel
from composer_ema.model.wrappers import canonical_name

#: Seconds after which a rank gives up waiting for another, and after which a rank that hangs says where and ends.
COLLECTIVE, CALL = 30, 100


class Ranks:
    """``count`` processes in one gloo group, which run a function together as often as asked; see :func:`ranks`."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context('spawn')
        self.count = count
        self._folder = tempfile.TemporaryDirectory()  # where they meet
        self._connections, self._processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            arguments = (rank, count, self._folder.name, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Calls ``function(*arguments)`` in every rank at once.

        Args:
            function: of a module's top level, since processes find it by its name.
            arguments: for it; pickled.

        Returns:
            What each rank returned, in order.

        Raises:
            AssertionError: a rank raised, with its traceback, or died.
        """
        for connection in self._connections:
            connection.send_bytes(pickle.dumps((function, arguments)))
        answers = [self._answer(rank) for rank in range(self.count)]
        # The rank that failed first closes the group, so that the others fail after it: its traceback is the cause.
        failures = sorted(answer for answer in answers if answer[0] is not None)
        assert not failures, '\n'.join(text for _, text in failures)
        return [value for _, value in answers]

    def _answer(self, rank: int) -> tuple[float | None, Any]:
        try:
            return pickle.loads(self._connections[rank].recv_bytes())
        except EOFError:
            return 0.0, f'rank {rank} of {self.count} died; its last words are on standard error.'


@functools.cache
def ranks(count: int) -> Ranks:
    """The processes of a group of ``count``, started at the first call; they end with this process."""
    return Ranks(count)


def _serve(rank: int, count: int, folder: str, connection: Any) -> None:
    torch.set_num_threads(1)
    calls = 0
    _join(rank, count, f'{folder}/{calls}')
    while True:
        try:
            function, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            os._exit(0)  # without the teardown of gloo's threads, which may wait for the interpreter's lock
        calls += 1
        faulthandler.dump_traceback_later(CALL, exit=True)
        torch.manual_seed(0)
        try:
            answer = None, function(*arguments)
            dist.barrier()  # a rank that has failed makes this fail, so that all of them join anew
        except Exception:
            answer = time.monotonic(), f'rank {rank} of {count}:\n{traceback.format_exc()}'
            dist.destroy_process_group()
            _join(rank, count, f'{folder}/{calls}')
        faulthandler.cancel_dump_traceback_later()
        connection.send_bytes(pickle.dumps(answer))


def _join(rank: int, count: int, store: str) -> None:
    dist.init_process_group(
        'gloo',
        init_method=f'file://{store}',
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=COLLECTIVE),
    )


@contextmanager
def mesh_of_one() -> Iterator[None]:
    """A process group of this process alone, so that DTensors need no other one. The block may end it earlier."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch may warn of what earlier tests have left, whenever that is collected
        gc.collect()
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """A copy of the tensor that the ranks share, gathered on each. A collective call for a DTensor."""
    with torch.no_grad():
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, aliased."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by canonical name, as they are at the moment."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {canonical_name(name): tensor for name, tensor in named}


def bits_of(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """The bits of this rank's part of each tensor."""
    return {name: local(t).contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


def averages_of(shadow: ShadowModel) -> dict[str, Tensor]:
    """The average's parameters and buffers by canonical name, aliased."""
    return {**dict(shadow.named_parameters()), **dict(shadow.named_buffers())}


def gathered(state: Any) -> Any:
    """A copy of a dictionary, of dictionaries perhaps, in which every tensor is whole."""
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    return whole(state) if isinstance(state, Tensor) else state


def difference(got: Tensor, expected: Tensor, *scales: Tensor) -> float:
    """The largest difference between elements over the largest element, in float64; inf where one is not finite.

    Args:
        got: what was computed.
        expected: what it should be; its largest element is the scale.
        scales: tensors whose largest elements count as well, as those of a sum whose terms cancel.
    """
    if not expected.numel():
        return 0.0
    scale = max(float(tensor.abs().max()) for tensor in (expected, *scales))
    apart = (got.double() - expected.double()).abs().max() / max(scale, 1e-12)
    return float(apart.nan_to_num(float('inf')))


class Silence(TorchDispatchMode):
    """Within it, whatever talks to another process raises an AssertionError."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert 'c10d' not in func.namespace, f'{func} is a collective call'
        return func(*args, **(kwargs or {}))
