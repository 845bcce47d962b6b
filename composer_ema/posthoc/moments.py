"""A run's kept averages and weights, whatever files they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from composer_ema.posthoc.updates import Array


@dataclass(frozen=True, eq=False)
class KeptAverage:
    """An average, or the training weights, of one moment of a run.

    Attributes:
        label: of the average; ``'weights'`` for the training weights.
        weights: float64 of shape (moments,): the weight of every update up to its own moment, the first 1 and 0 at
            moments without an update. Those of one label share their memory. All 1 for the training weights, which are
            an average that copies.
        path: of the file.
        clock: the time of the moment by unit.
    """

    label: str
    weights: Array
    path: Path
    clock: Mapping[str, float]
    _names: Callable[[], list[str]] = field(repr=False)
    _tensor: Callable[[str], Tensor] = field(repr=False)
    _rounding: Callable[[], float] = field(default=lambda: 0.0, repr=False)
    _outline: Callable[[str], tuple[torch.dtype, tuple[int, ...]]] | None = field(default=None, repr=False)

    def names(self) -> list[str]:
        """The canonical names of its tensors."""
        return self._names()

    def tensor(self, name: str) -> Tensor:
        """One tensor, read from the disk, on the CPU and in the dtype of the average."""
        return self._tensor(name)

    def outline(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """The dtype and the shape of one tensor, without its values where the file tells them."""
        if self._outline is not None:
            return self._outline(name)
        tensor = self._tensor(name)
        return tensor.dtype, tuple(tensor.shape)

    def rounding(self) -> float:
        """The mean square of its rounding errors; 0 where it was kept in full. Reads the file once."""
        return self._rounding()


@dataclass(frozen=True, eq=False)
class History:
    """What a run has kept.

    Attributes:
        folder: of the files.
        run_name: of the run.
        run_id: what its snapshots call it; None for checkpoints.
        clocks: unit (``'ba'``, ``'ep'``, ``'sp'``, ``'tok'``, ``'iter'``) to the time of every moment, float64 of shape
            (moments,). The moments are the updates of a run with snapshots, else its batches.
        kept: all averages and weights, in the order of their moments.
        max_duration: time string of the whole run; None where it is not known.
        is_finished: whether the run is known to have ended.
        aliases: further names of tied tensors, each with the name it stands under.
        statistics: names of the running means and variances of normalisation layers.
        newest: name to a function that reads the newest value of that tensor, for every tensor that the model saves:
            what a reconstructed average takes for frozen parameters and whole numbers.
        left_out: every file, or average in one, that could not be used, in a sentence each.
        copied: names of what averages hold as the model did, such as counters and masks.
    """

    folder: Path
    run_name: str
    run_id: str | None
    clocks: Mapping[str, Array]
    kept: Sequence[KeptAverage]
    max_duration: str | None
    is_finished: bool
    aliases: Mapping[str, str]
    statistics: frozenset[str]
    newest: Mapping[str, Callable[[], Tensor]]
    left_out: Sequence[str]
    copied: frozenset[str] = frozenset()

    @property
    def num_moments(self) -> int:
        """The moments of the whole run so far."""
        return len(self.clocks['ba'])

    @property
    def labels(self) -> list[str]:
        """The labels of what was kept."""
        return list(dict.fromkeys(each.label for each in self.kept))

    def completed(self, averaged: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A whole state dict: the tensors ``averaged``, the newest value of all others, and every name of tied ones.

        Args:
            averaged: canonical name to tensor.
        """
        whole = {name: averaged[name] if name in averaged else read() for name, read in self.newest.items()}
        whole |= averaged
        whole |= {alias: whole[name] for alias, name in self.aliases.items() if name in whole}
        return whole
