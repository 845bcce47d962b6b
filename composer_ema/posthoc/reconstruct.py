"""Makes an average that a run did not keep from those that it did keep, and refuses where it would be far off."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from composer_ema import plain
from composer_ema.checkpoints.lazy import UNITS
from composer_ema.checkpoints.opening import path_of
from composer_ema.checkpoints.reading import CheckpointError
from composer_ema.checkpoints.writing import write_weights
from composer_ema.model.inventory import Inventory
from composer_ema.model.sharding import local, share_of
from composer_ema.model.wrappers import unwrap
from composer_ema.posthoc import target as targets
from composer_ema.posthoc.moments import History
from composer_ema.posthoc.open_run import Combination, OpenRun
from composer_ema.posthoc.target import ByHalfLife, Target
from composer_ema.shadow import foreign, loan, state
from composer_ema.shadow.foreign import Foreign
from composer_ema.shadow.shadow_model import ShadowModel
from composer_ema.spans import Span
from composer_ema.version import __version__
from composer_ema.wording import counted

#: A reconstruction whose predicted error is larger is refused, unless it is asked for anyway.
LARGEST_ERROR = 0.05
# Half-lives that an error tries, as shares of the run.
_TRIED = np.geomspace(0.005, 0.5, 40)


class ReconstructionError(CheckpointError):
    """A run has not kept enough for the average that is wanted. The message says what would help."""


@dataclass(frozen=True)
class Part:
    """Something that a run kept, in a reconstruction.

    Attributes:
        label: of the average; ``'weights'`` for weights of training.
        path: the file.
        batch: the batches that had been trained by then.
        coefficient: what it was multiplied with.
    """

    label: str
    path: Path
    batch: int
    coefficient: float


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """An average that was made after the run; see :func:`composer_ema.reconstruct`.

    Attributes:
        target: the average, as ``'half_life=0.1dur'``.
        clock: the time of its moment by unit: ``{'ba': 6000.0, 'ep': 12.0, ...}``.
        state_dict: every tensor that the model saves, on the CPU. Averaged ones have the dtype of the kept averages,
            which is float32 for a 16-bit model. Whole numbers and frozen parameters are the newest that were kept.
        predicted_error: expected distance from the average that training would have kept, relative to the distance of
            that average from the weights at its moment.
        parts: what it was made of, in the order of their moments. The coefficients sum to 1.
        num_updates: moments of the run up to its own.
        run_name: the run.
        has_statistics: whether the model has running statistics, such as those of BatchNorm. Statistics that are
            averaged fit averaged weights badly; :func:`composer_ema.update_bn` computes those that fit.
        left_out: every file that was not used, and why, in a sentence each.
    """

    target: str
    clock: Mapping[str, float]
    state_dict: Mapping[str, Tensor] = field(repr=False)
    predicted_error: float
    parts: tuple[Part, ...] = field(repr=False)
    num_updates: int
    run_name: str
    has_statistics: bool
    left_out: tuple[str, ...]

    def load_into(self, model: nn.Module) -> None:
        """Puts the average into ``model`` in place, in the model's dtypes and on its devices.

        Args:
            model: of the architecture that was trained; its names may stand in another outermost module, so a
                ComposerModel's average also fits the bare network. Of a sharded model, each rank writes its own share,
                without communication.

        Raises:
            RuntimeError: another average stands in the model.
            ValueError: names or shapes that do not fit, all listed. Nothing was changed.
        """
        module = unwrap(model)
        loan.refuse(module)
        inventory = Inventory.of(module)
        tensors = foreign.fit(self._as_foreign(), inventory)
        with torch.no_grad():
            for name, own in inventory.tensors().items():
                if name in tensors:
                    local(own).copy_(share_of(tensors[name], own))

    def shadow(self, model: nn.Module, **settings: Any) -> ShadowModel:
        """Returns a shadow of ``model`` that goes on from this average.

        In a Composer Trainer it goes on as ``ema.ema_model = shadow``, once the Trainer is built.

        Args:
            model: in training. Only read.
            settings: as for :class:`composer_ema.ShadowModel`.

        Raises:
            ValueError: names or shapes that do not fit, all listed.

        Example:
            .. code:: python

                shadow = reconstruct('runs/fashion_mnist', half_life='0.1dur').shadow(model)
                shadow.update(model, smoothing=0.999)
        """
        shadow = ShadowModel(model, **settings)
        tensors = foreign.fit(self._as_foreign(), Inventory.of(unwrap(model)))
        own = shadow.state_dict()
        shadow.load_state_dict(
            {
                'version': state.VERSION,
                'num_updates': self.num_updates,
                'parameters': {name: tensors[name] for name in own['parameters']},
                'buffers': {name: tensors.get(name, buffer) for name, buffer in own['buffers'].items()},
            }
        )
        return shadow

    def save(self, out: str | os.PathLike[str]) -> dict[str, str]:
        """Writes the average as :func:`composer_ema.export` does, for :func:`composer_ema.load_average` to read.

        Args:
            out: file to write; its folder is made if it is missing. One that ends in ``.pt``, ``.pth`` or ``.ckpt`` is
                a state dict that ``torch.load(out, weights_only=True)`` returns; any other is a safetensors file.

        Returns:
            The metadata written with the tensors.

        Raises:
            CheckpointError: the file cannot be written. Nothing was.
        """
        out = path_of(out, 'out')
        name, _, value = self.target.partition('=')  # as an export says how its average was made
        metadata = {
            'format': 'pt',
            'weights': f'average, reconstructed ({self.target})',
            'written_by': f'composer_ema {__version__}',
            'run_name': self.run_name,
            name: value,
            'num_updates': str(self.num_updates),
            'predicted_error': f'{self.predicted_error:.3g}',
            **{f'trained_{word}': str(int(self.clock[unit])) for unit, word in UNITS.items() if self.clock.get(unit)},
        }
        write_weights(self.state_dict, metadata, 'the reconstruction', out)
        return metadata

    def _as_foreign(self) -> Foreign:
        return Foreign('the run', self.state_dict, self.num_updates)


def reconstruct(
    run: str | os.PathLike[str] | History | OpenRun,
    *,
    half_life: str | Span | None = None,
    power: float | None = None,
    gamma: float | None = None,
    equal: str | Span | None = None,
    schedule: str | None = None,
    at: str | Span | None = None,
    anyway: bool = False,
) -> Reconstruction:
    """Returns an average that a run could have kept, made from those that it did keep::

        average = sum_m x_m kept_m,    sum_m x_m = 1

    with the coefficients that bring its cumulative shares nearest to those that are wanted; see
    :func:`composer_ema.posthoc.fit.fit`. Files are read one tensor at a time, sums are float64. Exactly one of
    ``half_life``, ``power``, ``gamma``, ``equal`` and ``schedule`` says what is wanted.

    Args:
        run: folder of a run with snapshots, as ``EMA(snapshots=...)`` keeps them, or with several checkpoints. To make
            many averages, pass a :class:`composer_ema.posthoc.open_run.OpenRun`, which opens the files once, and takes
            what the checkpoints of Composer's built-in EMA do not say.
        half_life: time string above 0, such as ``'0.1dur'``, ``'500ba'``, ``'2ep'`` or ``'50000sp'``: the average that
            ``EMA(half_life=...)`` keeps.
        power: the average that ``EMA(power=...)`` keeps, above 0 and at most ``1 / sqrt(12)``.
        gamma: the same by its exponent, at least 0.
        equal: time string above 0: an equal average of the last so much, ``'0.25dur'``.
        schedule: ``'linear'``, ``'cosine'`` or ``'1-sqrt'``: what a learning rate that falls so to zero over the whole
            run would have given, if it had only scaled the steps; ``'1-sqrt:0.2dur'``: over the last fifth. For runs
            with a constant rate.
        at: time string: the moment of the average. Between two moments at which something was kept, the predicted error
            is large. Default: the last one.
        anyway: return it whatever its predicted error is. Default: no.

    Raises:
        ArgumentError: an argument cannot have its value.
        CheckpointError: the run has kept nothing that can be read.
        ReconstructionError: the predicted error is above 5 %. The message says what would help.
        TypeError: an argument has the wrong type.

    Example:
        .. code:: python

            average = reconstruct('runs/fashion_mnist', half_life='0.1dur')
            print(f'{average.predicted_error:.2%}')
            average.load_into(model)
    """
    anyway = plain.flag('anyway', anyway)
    target = targets.choose(half_life=half_life, power=power, gamma=gamma, equal=equal, schedule=schedule)
    moment = None if at is None else Span.parse(at, name='at')
    opened = run if isinstance(run, OpenRun) else OpenRun(run)
    combination = opened.combine(target, moment)
    if not anyway and not combination.predicted_error <= LARGEST_ERROR:
        raise ReconstructionError(_refusal(opened, target, moment, combination))
    history, place = opened.history, combination.num_moments - 1
    return Reconstruction(
        target=str(target),
        clock={unit: float(times[place]) for unit, times in history.clocks.items()},
        state_dict=opened.state_dict(combination),
        predicted_error=combination.predicted_error,
        parts=_parts(opened, combination),
        num_updates=combination.num_moments,
        run_name=history.run_name,
        has_statistics=bool(history.statistics),
        left_out=tuple(history.left_out),
    )


def _parts(opened: OpenRun, combination: Combination) -> tuple[Part, ...]:
    pairs = zip(opened.kept, combination.coefficients, strict=True)
    return tuple(Part(each.label, each.path, int(each.clock['ba']), float(x)) for each, x in pairs if x != 0)


def _refusal(opened: OpenRun, target: Target, at: Span | None, combination: Combination) -> str:
    history = opened.history
    error = combination.predicted_error
    size = f'{error:.0%}' if error < 10 else 'far more than 100%'
    odd = combination.odd_file
    if odd is not None:
        return (
            f'{target} cannot be made well from the files in {history.folder}: {odd.name} fits the others so badly '
            'that it may belong to another run. Move it out of the folder, or pass anyway=True (--anyway).'
        )
    remedies = [
        _nearer_moment(opened, target, at),
        _nearer_half_life(opened, target, at),
        'Keep more snapshots in the next run.' if history.run_id is not None else _KEEP_SNAPSHOTS,
        f'Not used: {" ".join(history.left_out[:_LISTED])}' if history.left_out else '',
        'To get it all the same, pass anyway=True (--anyway).',
    ]
    moment = '' if at is None else f' at {at}'
    files = counted(len(opened.files), 'file')
    return (
        f'{target}{moment} cannot be made well from the {files} in {history.folder}: its predicted error is {size} of '
        f'its distance from the weights, and {LARGEST_ERROR:.0%} is the most. ' + ' '.join(filter(None, remedies))
    )


# How many of the files that were left out an error names.
_LISTED = 3
_KEEP_SNAPSHOTS = "Train with EMA(snapshots='0.05dur') next time: checkpoints alone serve few averages."


def _nearer_moment(opened: OpenRun, target: Target, at: Span | None) -> str:
    """The kept moment that is nearest to ``at``, if the average could be made there."""
    if at is None:
        return ''
    last = len(opened.run_clock.until(at))
    kept = {len(each.weights) for each in opened.kept}
    if last in kept:
        return ''
    batches = opened.history.clocks['ba']
    by_distance = sorted(kept, key=lambda moment: abs(batches[moment - 1] - batches[last - 1]))
    for moment in by_distance[:4]:
        there = Span(int(batches[moment - 1]), 'ba')
        if opened.foreseen_error(target, there) <= LARGEST_ERROR:
            return f'Nothing was kept at that moment; pass at={str(there)!r}, where it can be made.'
    return 'Nothing was kept at that moment.'


def _nearer_half_life(opened: OpenRun, target: Target, at: Span | None) -> str:
    """The half-life nearest to the one that is wanted with which an average could be made."""
    if not isinstance(target, ByHalfLife):
        return ''
    times, wanted = opened.run_clock.within(target.half_life, 'half_life')
    asked = wanted / float(times[-1]) if target.half_life.unit != 'dur' else target.half_life.value
    for share in sorted(_TRIED, key=lambda share: abs(math.log(share / asked))):
        near = ByHalfLife(Span(float(f'{share:.2g}'), 'dur'))
        if opened.foreseen_error(near, at) <= LARGEST_ERROR:
            return f'The nearest half-life that can be made is {near.half_life}.'
    return ''
