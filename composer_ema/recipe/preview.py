"""What a recipe will do, before it runs: its schedule, and the weight of each step in the average at the end.

The algorithms themselves go through the events of the run with a model of one weight. After each event the preview
reads what the average became, so the code that decides a weight in a run decides it here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from composer.core import Event, State, TimeUnit, ensure_time
from composer.devices import DeviceCPU
from torch import nn

from composer_ema.checkpoints.formats import config_of
from composer_ema.posthoc.shares import shares
from composer_ema.recipe.from_data import with_data
from composer_ema.recipe.named import Named
from composer_ema.recipe.outline import Outline
from composer_ema.recipe.schema import Plan, Recipe, plan
from composer_ema.run.clock import resolve_share
from composer_ema.run_folder.outputs import Array, Curve, curves_by_group, momenta
from composer_ema.run_folder.recorder import step_settings
from composer_ema.settings import settings_of
from composer_ema.trainer.run import ComposerRun
from composer_ema.trainer.weight_average import WeightAverage
from composer_ema.zoo.dataset import Extent

#: The longest run to step through, at about 10,000 batches a second.
MOST_BATCHES = 20_000_000
# Arguments about the run, which do not change the weight of a step.
_OF_THE_RUN = frozenset(
    {'evaluate_with', 'evaluate', 'log_interval', 'export_weights', 'refresh_batchnorm', 'snapshots'}
)


@dataclass(frozen=True)
class Profile:
    """The weight of each step in the average at the end of a run.

    Args:
        name: The label of the average, ``'ema'``.
        batch: The batches after which the average was updated, rising.
        share: The share of each update in the average at the end; they sum to 1.
        batches: Length of the run.
        settings: The arguments that decide the weights, such as ``'half_life=100ba'``.
        half_life_share: The half-life at the end, which a warm-up may limit, as a share of the run; None without one.

    Example:
        >>> Profile('swa', np.array([8.0, 9.0, 10.0]), np.full(3, 1 / 3), 10, 'defaults').newest_half
        2
    """

    name: str
    batch: Array
    share: Array
    batches: int
    settings: str
    half_life_share: float | None = None

    @property
    def effective_steps(self) -> float:
        """``1 / sum(share ** 2)``: an equal average of this many independent steps would have the same variance.

        For equal shares it is their number, for a long-running exponential average about 2.9 half-lives.
        """
        return float(1 / np.square(self.share).sum())

    @property
    def newest_half(self) -> int:
        """The smallest number of last batches that make up at least half of the average."""
        newest_first = np.cumsum(self.share[::-1])
        index = int(np.searchsorted(newest_first, 0.5 - 1e-12))
        return self.batches - int(self.batch[::-1][index]) + 1


@dataclass(frozen=True)
class Preview:
    """What is known of a run before it starts.

    Args:
        name: The name for a legend.
        batches: Length of the run.
        batches_per_epoch: Length of an epoch.
        rates: The learning rate of every batch, by the parameter groups that share it.
        momenta: The same for momentum.
        profiles: One for each average of the recipe.
        remarks: What the preview cannot know.
        momentum_names: What the optimizer calls its momentum, of ``'momentum'`` and ``'beta1'``.
    """

    name: str
    batches: int
    batches_per_epoch: int
    rates: dict[str, Curve]
    momenta: dict[str, Curve]
    profiles: list[Profile] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    momentum_names: tuple[str, ...] = ()


def preview(
    recipe: Recipe,
    *,
    name: str | None = None,
    batches_per_epoch: int | None = None,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Preview:
    """Steps the schedule and the averages of a recipe through the whole run; no data is read.

    Args:
        recipe: The result of ``schema.load``.
        name: The name for a legend. Default: the recipe's run name, or the name of its file.
        batches_per_epoch: Length of an epoch. Default: that of the recipe's data set.
        track: Wraps the range of batches to show progress, at about 10,000 a second.

    Raises:
        RecipeError: The recipe is wrong, or the number of batches of the run is not known.
    """
    checked = with_data(plan(recipe))
    size = _extent(checked, batches_per_epoch)
    outline = Outline(checked, size)
    if outline.length.batches > MOST_BATCHES:
        raise (checked.place / 'max_duration').error(
            f'{checked.trainer["max_duration"]!r} is {outline.length.batches:,} batches, and a picture of more than '
            f'{MOST_BATCHES:,} would take hours. Draw a shorter run.'
        )
    state = _state(checked, outline, size)
    averaging = {id(named): named for named in checked.averages.values()}
    probes = [_Probe(named, state) for named in averaging.values()]
    lines = []
    for probe in probes:
        probe.start()
    per_epoch = outline.length.batches_per_epoch
    for batch in track(range(outline.length.batches)):
        _send(Event.BATCH_START, probes)  # an algorithm may overrule the scheduler here
        settings = step_settings([outline.optimizer])
        outline.end_batch()
        samples = size.samples_of(batch % per_epoch)
        _advance(state, state.timestamp.to_next_batch(samples, samples * size.tokens))
        sample = int(state.timestamp.sample)
        lines.append({'epoch': (batch + 1) / per_epoch, 'batch': batch + 1, 'sample': sample, **settings})
        _send(Event.BATCH_END, probes)
        if (batch + 1) % per_epoch == 0:
            outline.end_epoch()
            _advance(state, state.timestamp.to_next_epoch())
            _send(Event.EPOCH_END, probes)
    momentum, momentum_names = momenta(lines)
    return Preview(
        name=name or recipe.run_name or recipe.name,
        batches=outline.length.batches,
        batches_per_epoch=per_epoch,
        rates=curves_by_group(lines, 'lr'),
        momenta=momentum,
        momentum_names=momentum_names,
        profiles=[found for probe in probes for found in probe.profiles(outline.length.batches)],
        remarks=[
            *checked.imported,
            *(f'{each.name} is drawn as if {each.metric} always improved' for each in outline.scheduled if each.metric),
            *(remark for each in outline.scheduled for remark in each.beyond(outline.length)),
        ],
    )


def distinct_names(recipes: Sequence[Recipe], overrides: Sequence[Sequence[str]]) -> list[str]:
    """A different name for each recipe: its run name, or that of its file with its overrides; equal ones get a number.

    A run name that stands among the overrides is how the user wants it called, unless another one is called the same.

    Args:
        recipes: The results of ``schema.load``.
        overrides: The overrides of each.
    """
    names = [recipe.run_name or recipe.name for recipe in recipes]
    said = [' '.join([name, *own]) for name, own in zip(names, overrides, strict=True)]
    is_called = [any(each.startswith('run_name=') for each in own) for own in overrides]
    names = [
        name if called and names.count(name) == 1 else longer
        for name, called, longer in zip(names, is_called, said, strict=True)
    ]
    return [f'{name} ({names[: i + 1].count(name)})' if names.count(name) > 1 else name for i, name in enumerate(names)]


class _Probe:
    """An averaging algorithm over a model of one weight; records the weight of each update of each of its averages.

    Before every event the weight of the model is set to more than the averages, by 1 for the largest. An update then
    moves each average by its weight times what it lacks.
    """

    def __init__(self, named: Named, state: State) -> None:
        self.named, self.state = named, state
        self.settings = _of_weights(named)
        plain = dataclasses.replace(named, arguments={**self.settings, 'log_interval': None})
        built: Any = plain.build()
        self.algorithm: WeightAverage = built
        self.batches: list[int] = []
        self.weights: dict[str, list[float]] = {label: [] for label in self.algorithm.labels}
        self._logger: Any = SimpleNamespace(log_metrics=lambda metrics: None)
        state.algorithms.append(self.algorithm)

    def start(self) -> None:
        for event in (Event.INIT, Event.AFTER_LOAD, Event.FIT_START):
            self.send(event)

    def send(self, event: Event) -> None:
        """Sends an event to the algorithm and records what it did to the averages."""
        before, updates = self._averages()
        value = max(before.values(), default=0.0) + 1.0
        weight: nn.Parameter = self.state.model.weight  # pyright: ignore[reportAssignmentType]
        weight.data.fill_(value)
        try:
            if self.algorithm.match(event, self.state):
                self.algorithm.apply(event, self.state, self._logger)
        except ValueError as error:
            raise self.named.blame(error).error(str(error)) from error
        after, now = self._averages()
        if now > updates:
            self.batches.append(int(self.state.timestamp.batch))
            for label, weights in self.weights.items():
                old = before.get(label, 0.0)
                # Rounding may take the quotient of a copy just above 1.
                weights.append(min(1.0, (after[label] - old) / (value - old)) if weights else 1.0)

    def profiles(self, batches: int) -> Iterator[Profile]:
        """The result for each average; none where the run is too short for a first update."""
        for label, weights in self.weights.items():
            if weights:
                own = config_of(self.settings, label)
                yield Profile(
                    name=label,
                    batch=np.asarray(self.batches, dtype=np.float64),
                    share=shares(weights),
                    batches=batches,
                    settings=', '.join(f'{name}={value}' for name, value in own.items() if value is not None)
                    or 'defaults',
                    half_life_share=self._half_life_share(label, own.get('warmup'), batches),
                )

    def _half_life_share(self, label: str, warmup: float | None, batches: int) -> float | None:
        half_life = getattr(self.algorithm, 'half_life', None)
        if isinstance(half_life, dict):
            half_life = half_life.get(label)
        if half_life is None:
            return None
        run = ComposerRun(self.state)
        half_life = resolve_share(half_life, run, 'half_life')
        length = run.length(half_life.unit)
        share = None if not length else half_life.value / length
        if share is None or warmup is None:
            return share
        return min(share, warmup * (1 - self.batches[0] / batches))

    def _averages(self) -> tuple[dict[str, float], int]:
        """The averages by label, and the number of updates; none before the algorithm is built."""
        averages, updates = {}, 0
        for label in self.weights:
            shadow = self.algorithm.shadow(label)
            if shadow is not None:
                [(_, average)] = shadow.named_parameters()
                averages[label], updates = average.item(), shadow.num_updates
        return averages, updates


def _of_weights(named: Named) -> dict[str, Any]:
    """The arguments that decide the weight of each step: neither settings of tensors nor arguments about the run."""
    others = {*settings_of(named.factory), *_OF_THE_RUN}  # pyright: ignore[reportArgumentType]: it is a class
    return {name: value for name, value in named.arguments.items() if name not in others}


class _OneWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))


@dataclass(frozen=True)
class _Samples:
    """The attributes of a data set that the clock of a run reads."""

    count: int
    max_seq_len: int

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class _Loader:
    """The attributes of a loader that the clock of a run reads."""

    dataset: _Samples
    batch_size: int
    batches: int

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError('it has no data')


def _extent(checked: Plan, batches_per_epoch: int | None) -> Extent:
    if batches_per_epoch is not None and batches_per_epoch < 1:
        raise checked.place.error(f'--batches-per-epoch must be at least 1, got {batches_per_epoch}.')
    found = checked.extent()
    if found is None:
        batch_size = checked.data_argument('batch_size')
        if batches_per_epoch is None or not isinstance(batch_size, int):
            raise checked.data.place.error(
                f'{checked.data.name} does not tell how many samples it has before it is read. Give the length of an '
                'epoch by --batches-per-epoch, or register the data set with samples=...'
            )
        return Extent(batches_per_epoch * batch_size, batch_size, drop_last=False)
    if batches_per_epoch is None:
        return found
    return Extent(batches_per_epoch * found.batch_size, found.batch_size, drop_last=False, tokens=found.tokens)


def _state(checked: Plan, outline: Outline, size: Extent) -> State:
    """The state of a run at its first batch: time, the optimizer and one weight."""
    state = State(
        model=_OneWeight(),
        rank_zero_seed=0,
        run_name='preview',
        device=DeviceCPU(),
        max_duration=ensure_time(checked.trainer['max_duration'], TimeUnit.EPOCH),
        optimizers=outline.optimizer,
    )
    loader = _Loader(_Samples(size.samples, size.tokens), size.batch_size, size.batches)
    state.set_dataloader(loader, 'train', outline.length.batches_per_epoch)
    return state


def _advance(state: State, timestamp: Any) -> None:
    state.previous_timestamp, state.timestamp = state.timestamp, timestamp


def _send(event: Event, probes: Iterable[_Probe]) -> None:
    for probe in probes:
        probe.send(event)
