"""Updates averages by the user's own function, called as ``torch.optim.swa_utils.AveragedModel`` calls it.

Invariant: no average is written before every call that returns new values has returned valid ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from composer_ema import kernels
from composer_ema.kernels.layout import detached, grouped, unzip
from composer_ema.settings import AvgFn, MultiAvgFn, Settings, name_of
from composer_ema.shadow.plan import Plan, Row, Rows, Step

#: Takes the number of updates so far and returns what writes the next average.
Compute = Callable[[int], Callable[[], object]]


class ByFunction:
    """Moves rows by a function of the user's, with the signature that torch's ``AveragedModel`` gives it.

    The first update copies, and buffers that are not averaged are copied whatever the function. Parameters and buffers
    go to it in separate calls.

    Args:
        settings: hold ``avg_fn``, called for each tensor, or ``multi_avg_fn``, called for each dtype and device.
    """

    may_share = False

    def __init__(self, settings: Settings) -> None:
        self._avg_fn, self._multi_avg_fn = settings.avg_fn, settings.multi_avg_fn

    def prepare(self, rows: Rows) -> Step:
        """A step that takes the number of updates so far of each average and returns what writes the next values.

        A ``multi_avg_fn`` has written them by then.
        """
        first, _ = (*rows.parameters, *rows.averaged, *rows.copied)[0]
        computes = [self._prepare_one(rows, which) for which in range(len(first))]
        if len(computes) == 1:
            return lambda counts: [computes[0](counts[0])]
        return lambda counts: [compute(n) for compute, n in zip(computes, counts, strict=True)]

    def is_left_to_a_thread(self, row: Row) -> bool:
        del row
        return False

    def keeps_address(self, row: Row) -> bool:
        del row
        return True

    def run(self, plan: Plan, numbers: Sequence[int]) -> None:
        """Calls the function for all tensors before the first result is written."""
        forked_writes = []
        for stream, step in plan.forked_steps:
            with stream.fork():  # joined by wait(), as in ByWeight.run
                forked_writes.append(step(numbers))
        writes = [step(numbers) for step in plan.steps]
        for (stream, _), of_stream in zip(plan.forked_steps, forked_writes, strict=True):
            with stream.fork():
                for write in of_stream:
                    write()
        for write in chain.from_iterable(writes):
            write()

    def _prepare_one(self, rows: Rows, which: int) -> Compute:
        averaged = [*rows.parameters, *rows.averaged]  # never both, since they may not share a step
        shadows, sources = [row[which] for row, _ in averaged], [source for _, source in averaged]
        computes: list[Compute] = []
        if self._avg_fn is not None and shadows:
            computes.append(_prepare_one_by_one(shadows, sources, self._avg_fn))
        if self._multi_avg_fn is not None:
            computes.extend(_prepare_together(shadows, sources, self._multi_avg_fn))
        copy = kernels.prepare([[]], [], copied=[(row[which], source) for row, source in rows.copied])
        mend = partial(_mend, [row[which] for row, _ in rows.averaged], [source for _, source in rows.averaged])

        def compute(num_averaged: int) -> Callable[[], object]:
            writes = [each(num_averaged) for each in computes]

            def write_all() -> None:
                for write in writes:
                    write()
                mend()
                copy((1.0,))

            return write_all

        return compute


def _prepare_together(shadows: Sequence[Tensor], sources: Sequence[Tensor], multi_avg_fn: MultiAvgFn) -> list[Compute]:
    groups = grouped(zip(shadows, sources, strict=True), lambda pair: (pair[0].device, pair[0].dtype))
    return [_Together(*unzip(group), multi_avg_fn) for group in groups.values()]


def _prepare_one_by_one(shadows: Sequence[Tensor], sources: Sequence[Tensor], avg_fn: AvgFn) -> Compute:
    averaged, current = detached(shadows), detached(sources)

    @torch.no_grad()
    def step(num_averaged: int) -> Callable[[], object]:
        if num_averaged == 0:
            return partial(_copy, averaged, current)
        count = torch.tensor(num_averaged)
        return partial(_copy, averaged, [_next(avg_fn, *pair, count) for pair in zip(averaged, current, strict=True)])

    return step


def _next(avg_fn: AvgFn, averaged: Tensor, current: Tensor, count: Tensor) -> Tensor:
    given = current.to(averaged.device, averaged.dtype)
    with _Reading('avg_fn', avg_fn, [averaged], [given]):
        result = avg_fn(averaged, given, count)
    if not isinstance(result, Tensor):
        raise TypeError(
            f'avg_fn must return the new average as a tensor, but {name_of(avg_fn)} returned a '
            f'{type(result).__name__}. Pass a function that writes into lists of tensors as multi_avg_fn.'
        )
    if result.shape != averaged.shape or result.dtype != averaged.dtype:
        raise ValueError(
            f'avg_fn must return a tensor of the shape and dtype of the average, {_kind(averaged)}, but '
            f'{name_of(avg_fn)} returned {_kind(result)}. If only the dtype differs, return value.to(averaged.dtype).'
        )
    return result


class _Together:
    """A step for all tensors of one dtype and device: one call, which writes in place."""

    def __init__(self, shadows: Sequence[Tensor], sources: Sequence[Tensor], multi_avg_fn: MultiAvgFn) -> None:
        self._shadows, self._sources = list(shadows), detached(sources)
        self._function = multi_avg_fn
        self._has_written = False

    @torch.no_grad()
    def __call__(self, num_averaged: int) -> Callable[[], object]:
        if num_averaged == 0:
            return partial(_copy, self._shadows, self._sources)
        # The function gets views, in a list of its own, so that rebinding either cannot move the average.
        averaged = detached(self._shadows)
        given = list(averaged)
        current = [source.to(s.device, s.dtype) for s, source in zip(averaged, self._sources, strict=True)]
        # Some ways of writing do not raise a tensor's version, so we also compare the values of one tensor.
        versions, first = _versions(averaged), None if self._has_written else averaged[0].clone()
        with _Reading('multi_avg_fn', self._function, averaged, current):
            result = self._function(given, current, torch.tensor(num_averaged))
        is_rebound = self._is_rebound(given, averaged)
        if is_rebound or (first is not None and self._has_missed(first, self._sources[0], versions)):
            done = 'replaced the tensors instead' if is_rebound else 'wrote nothing'
            done += '' if result is None else f' and returned a {type(result).__name__}'
            raise ValueError(
                f'multi_avg_fn must write the new averages into the tensors of its first list, but '
                f'{name_of(self._function)} {done}. '
                'Write in place, as torch._foreach_lerp_ does, or pass a function of single tensors as avg_fn.'
            )
        self._has_written = True
        return _nothing

    def _is_rebound(self, given: list[Tensor], averaged: list[Tensor]) -> bool:
        """Whether the function replaced a tensor in the list, or a tensor's storage."""
        if len(given) != len(averaged):
            return True
        triples = zip(given, averaged, self._shadows, strict=True)
        return any(a is not b or a.data_ptr() != shadow.data_ptr() for a, b, shadow in triples)

    def _has_missed(self, before: Tensor, source: Tensor, versions: list[int]) -> bool:
        """Whether the function wrote nothing although it should have. Synchronises, so we ask only once."""
        if _versions(self._shadows) != versions:
            return False
        current = source.to(before.device, before.dtype)
        return torch.equal(self._shadows[0], before) and not torch.equal(before, current)


class _Reading:
    """Guards a call of the user's function: attributes its errors to it, and refuses writes to training weights."""

    def __init__(
        self, argument: str, function: Callable[..., Any], averaged: list[Tensor], current: list[Tensor]
    ) -> None:
        self._argument, self._function = argument, function
        self._averaged, self._current = averaged[0], current
        self._versions = _versions(current)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        function = f'{self._argument} {name_of(self._function)}'
        if isinstance(error, Exception):
            raise RuntimeError(
                f'{function} failed on an average that is {_kind(self._averaged)}: {error}. We call it as torch '
                f'does, with averaged, current and num_averaged.'
            ) from error
        if error is None and _versions(self._current) != self._versions:
            raise RuntimeError(
                f'{function} wrote into the current weights, which it may only read, so training would continue with '
                'what it wrote. Load the last checkpoint, and write only into averaged.'
            )


def _copy(averaged: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(averaged, values)


@torch.no_grad()
def _mend(buffers: list[Tensor], sources: list[Tensor]) -> None:
    """Copies the elements of averaged buffers that are not finite."""
    for buffer, source in zip(buffers, sources, strict=True):
        buffer.copy_(torch.where(buffer.isfinite(), buffer, source.to(buffer.device, buffer.dtype)))


def _nothing() -> None:
    """Has nothing left to write."""


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _kind(tensor: Tensor) -> str:
    return f'{tuple(tensor.shape)} {str(tensor.dtype).removeprefix("torch.")} on {tensor.device}'
