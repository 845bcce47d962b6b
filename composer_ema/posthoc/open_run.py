"""A run that has been opened for reconstruction: what it kept, and combinations of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from composer_ema.checkpoints.reading import CheckpointError
from composer_ema.model.names import listed
from composer_ema.posthoc.evidence import Evidence
from composer_ema.posthoc.fit import Kept, fit
from composer_ema.posthoc.history import Source, read_run
from composer_ema.posthoc.moments import History, KeptAverage
from composer_ema.posthoc.shares import Vector
from composer_ema.posthoc.snapshot_files import WEIGHTS
from composer_ema.posthoc.target import RunClock, Target
from composer_ema.spans import Span

_VARIANCE = 'running_var'
# From here on a look at the weights can only say the same.
_HOPELESS = 1.0


class ReadOptions(TypedDict, total=False):
    """How a folder is read; see :func:`composer_ema.posthoc.history.read_run`."""

    source: Source | None
    half_life: str | None
    update_interval: str | None
    max_duration: str | None


@dataclass(frozen=True, eq=False)
class Combination:
    """What a wanted average is made of.

    Attributes:
        coefficients: float64, one for each average that the run kept.
        predicted_error: of the average, relative to its distance from the weights at its moment.
        num_moments: moments of the run up to that of the average.
        odd_file: one that fits the others so badly that it may belong to another run; None if there is none.
    """

    coefficients: Vector
    predicted_error: float
    num_moments: int
    odd_file: Path | None = None


class OpenRun:
    """What a run kept, opened once for all averages that are made of it. Tensors are read when they are asked for.

    Args:
        run: the run's folder, or what :func:`composer_ema.posthoc.history.read_run` returned.
        options: for a folder, what :func:`composer_ema.posthoc.history.read_run` takes: ``source``, and what the
            checkpoints of Composer's built-in EMA do not say, its ``half_life`` and ``update_interval``.

    Raises:
        CheckpointError: there is nothing that can be read.
        TypeError, ValueError: an option has the wrong type or value.

    Example:
        .. code:: python

            run = OpenRun('runs/fashion_mnist')
            for share in (0.03, 0.1, 0.3):
                average = reconstruct(run, half_life=f'{share}dur')
                print(share, average.predicted_error)
    """

    def __init__(self, run: str | os.PathLike[str] | History, **options: Unpack[ReadOptions]) -> None:
        self.history = run if isinstance(run, History) else read_run(run, **options)
        self._all = self.history.kept
        duration = self.history.max_duration
        whole = None if duration is None else Span.parse(duration, name='max_duration', positive=True)
        self.run_clock = RunClock(self.history.clocks, whole)
        self._kept = [Kept(each.weights, each.label) for each in self.kept]

    @property
    def kept(self) -> Sequence[KeptAverage]:
        """All averages and weights that the run kept."""
        return self.history.kept

    @property
    def clock(self) -> dict[str, float]:
        """The time of the last moment by unit."""
        return {unit: float(times[-1]) for unit, times in self.history.clocks.items()}

    @property
    def files(self) -> list[Path]:
        """The files that averages are made of, each once."""
        return list(dict.fromkeys(each.path for each in self.kept))

    @cached_property
    def names(self) -> list[str]:
        """Names of the tensors that every kept average has and that are averaged, in the order of the newest."""
        newest, copied = self.kept[-1], self.history.copied
        common = set.intersection(*(set(each.names()) for each in self.kept))
        dtypes = {name: newest.outline(name)[0] for name in newest.names() if name in common - copied}
        return [name for name, dtype in dtypes.items() if dtype.is_floating_point or dtype.is_complex]

    def training(self) -> dict[str, Tensor]:
        """The newest weights of training that were kept: every tensor that the model saves.

        Raises:
            CheckpointError: the run kept averages only.
        """
        weights = [each for each in self._all if each.label == WEIGHTS]
        if not weights:
            raise CheckpointError(f'{self.history.folder} holds averages, and no weights of training.')
        return self.history.completed({name: weights[-1].tensor(name) for name in weights[-1].names()})

    def combine(self, target: Target, at: Span | None = None) -> Combination:
        """Returns the combination of kept averages that comes nearest to ``target``.

        The predicted error is the larger one of two: that of the fit, which looks at no weight, and that of
        :class:`composer_ema.posthoc.evidence.Evidence`, which notices files that do not fit each other.

        Args:
            target: what is wanted.
            at: its moment. Default: the last one.

        Raises:
            ArgumentError: ``at`` lies outside of the run, or ``target`` is in a unit that the run did not count.
            CheckpointError: nothing was kept up to that moment.
        """
        clock = self.run_clock.until(at)
        weights, times = target.weights(clock), clock.times['ba']
        first = min(each.moment for each in self._kept)
        if len(clock) < first:
            raise CheckpointError(
                f'{self.history.folder} holds nothing from before batch {self.run_clock.times["ba"][first - 1]:g}, so '
                f'there is nothing to make an average at {at} of. Ask for a later one.'
            )
        found = fit(self._kept, weights, times=times)
        if found.predicted_error < _HOPELESS:
            if self._leave_out_not_finite():
                return self.combine(target, at)
            found = fit(self._kept, weights, times=times, ridge=self._evidence.ridge)
        error = found.predicted_error
        if not error < _HOPELESS:
            return Combination(found.coefficients, error, len(clock))
        odd = self._evidence.odd_one
        return Combination(
            found.coefficients,
            predicted_error=max(error, self._evidence.error(found, len(clock)) or 0.0),
            num_moments=len(clock),
            odd_file=None if odd is None else self.kept[odd].path,
        )

    def foreseen_error(self, target: Target, at: Span | None = None) -> float:
        """The predicted error of the fit alone, which costs no look at any weight."""
        clock = self.run_clock.until(at)
        return fit(self._kept, target.weights(clock), times=clock.times['ba']).predicted_error

    def tensor(self, name: str, coefficients: Vector) -> Tensor:
        """One tensor of a combination, summed in float64 and rounded once to the dtype of the kept averages.

        Each element of a running variance, which negative coefficients could take below zero, is at least the smallest
        one that was kept. What is infinite in every file, as a mask may be, is that of the newest.

        Raises:
            CheckpointError: its shape differs from file to file, or some hold values in it that are not finite.
        """
        total: Tensor | None = None
        least: Tensor | None = None
        newest: Tensor | None = None
        is_mask: Tensor | None = None
        dtype = torch.float32
        for average, coefficient in zip(self.kept, coefficients, strict=True):
            if coefficient == 0:
                continue
            own = average.tensor(name)
            wide = own.to(torch.complex128 if own.is_complex() else torch.float64)
            if total is None:
                total, dtype = torch.zeros_like(wide), own.dtype
            elif total.shape != wide.shape:
                raise CheckpointError(
                    f'{name} has the shape {tuple(wide.shape)} in {average.path} and {tuple(total.shape)} in others: '
                    'they are of different models. Move those of the other one out of the folder.'
                )
            dtype = torch.promote_types(dtype, own.dtype)
            total += float(coefficient) * wide
            newest = wide
            is_mask = wide.isinf() if is_mask is None else is_mask & wide.isinf()
            if name.endswith(_VARIANCE):
                least = wide if least is None else torch.minimum(least, wide)
        assert total is not None
        assert newest is not None
        assert is_mask is not None
        broken = ~total.isfinite()
        if name not in self.history.statistics and bool((broken & ~is_mask).any()):
            self._raise_not_finite(name, coefficients)
        total = torch.where(broken, newest, total)
        return (total if least is None else torch.maximum(total, least)).to(dtype)

    def _raise_not_finite(self, name: str, coefficients: Vector) -> NoReturn:
        used = [average for average, x in zip(self.kept, coefficients, strict=True) if x != 0]
        paths = dict.fromkeys(str(each.path) for each in used if not bool(each.tensor(name).isfinite().all()))
        raise CheckpointError(
            f'{name} holds values that are not finite in {listed(list(paths))}. Move these files out of the folder, or '
            'ask for an average at an earlier moment with at= (--at).'
        )

    def _leave_out_not_finite(self) -> bool:
        """Whether some of what was kept is not finite, as weights of a run that diverged, which is now left out."""
        places = self._evidence.not_finite
        if not places:
            return False
        paths = list(dict.fromkeys(str(self.kept[place].path) for place in places))
        reason = f'values that are not finite are in {listed(paths)}.'
        kept = [each for place, each in enumerate(self.kept) if place not in places]
        if not kept:
            raise CheckpointError(f'{self.history.folder} holds no average that is finite.')
        self.history = dataclasses.replace(self.history, kept=kept, left_out=[*self.history.left_out, reason])
        self._kept = [Kept(each.weights, each.label) for each in kept]
        for name in ('names', '_evidence'):
            self.__dict__.pop(name, None)
        return True

    def state_dict(self, combination: Combination) -> dict[str, Tensor]:
        """A combination as a state dict, read and summed tensor by tensor. What is not averaged is the newest."""
        averaged = {name: self.tensor(name, combination.coefficients) for name in self.names}
        return self.history.completed(averaged)

    @cached_property
    def _evidence(self) -> Evidence:
        names = [name for name in self.names if name not in self.history.statistics]
        return Evidence(self.kept, self._kept, names, self.history.clocks['ba'])
