"""Settings that cannot work in a Composer run: refused before the first batch, or warned of where they do no harm."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from composer.core import Algorithm, Event, State
from composer.utils.parallelism import FSDPConfig

from composer_ema.model import sharding
from composer_ema.spans import NOUNS, UNITS, ArgumentError, multiples
from composer_ema.trainer.clock import TimeArgument, knows_fractions, run_length
from composer_ema.trainer.due import Interval, Start
from composer_ema.trainer.evaluation import PREDICT
from composer_ema.wording import counted, suggestion


@dataclass(frozen=True)
class Limit:
    """A time that the run must be able to count.

    Args:
        time: the argument.
        effect: what happens if the time is longer than the run, for the warning. Default: no warning.
        measured_at: for a time that is measured from update to update, the interval of the updates. Default: the clock
            is compared with the time itself.
    """

    time: TimeArgument
    effect: str | None = None
    measured_at: Interval | None = None


def warn(message: str) -> None:
    """Warns on behalf of the caller's caller."""
    warnings.warn(message, stacklevel=2)


def check_times(limits: Iterable[Limit], state: State) -> None:
    """Refuses times that this run cannot count, then warns of times longer than the run.

    Raises:
        ValueError: a time in a unit that the run does not have, or needs fractions of a unit of unknown length.
    """
    limits = list(limits)
    for limit in limits:
        if limit.time.span.value != 0:
            _check_time(limit, state)
    for limit in limits:
        if limit.effect is not None:
            _warn_if_longer(limit.time, limit.effect, state)


def effect_of_rare_updates(interval: Interval, state: State) -> str:
    """What happens if the interval between updates is longer than the run: only the first one is made, if any."""
    unit = {Event.EPOCH_END: 'ep', Event.ITERATION_END: 'iter'}.get(interval.event, 'ba')
    moments = run_length(unit, state)
    if moments is not None and moments < 1:  # the first update waits for the end of an epoch or iteration
        return 'no update will be made'
    return 'no update will be made after the first, which copies the weights'


def _check_time(limit: Limit, state: State) -> None:
    time, interval = limit.time, limit.measured_at
    resolved = time.resolve(state)
    if resolved.unit == 'iter' and state._iteration_length is None:
        raise ArgumentError(f'{time} counts iterations, but this run has none. Pass epochs or batches.', time.name)
    if interval is None:
        is_whole = float(resolved.value).is_integer()
    else:  # what passes between two updates is whole if they come at the ends of whole epochs or iterations
        is_whole = interval.event is not Event.BATCH_END and resolved.unit == interval.span.unit
    if not is_whole and not knows_fractions(resolved.unit, state):
        raise ArgumentError(
            f'{time} needs parts of {UNITS[resolved.unit]}, but the dataloader has no length. '
            'Pass batches or samples, or set train_subset_num_batches.',
            time.name,
        )


def _warn_if_longer(time: TimeArgument, effect: str, state: State) -> None:
    span = time.resolve(state)
    length = run_length(span.unit, state)
    if length is not None and span.value > length:
        warn(
            f'{time} is longer than the run of {counted(length, NOUNS[span.unit])}: {effect}. '
            f"Pass a shorter {time.written}, for example a share of the run such as {time.written}='0.1dur'."
        )


def warn_of_rare_updates(half_life: TimeArgument, interval: Interval, state: State) -> None:
    """Warns that the average is updated as rarely as the unit of the half-life comes, which nobody asked for."""
    unit = interval.span.unit
    updates, batches = run_length(unit, state), run_length('ba', state)
    if updates is not None and updates < 1:
        return  # warned of already: there is no update at all
    effect, remedy = '', ''
    if updates is not None and batches is not None:
        if batches <= updates:
            return  # an epoch of one batch
        count, in_batches = math.floor(updates), math.ceil(half_life.span.value * batches / updates)
        effect = f', at most {count} {"time" if count == 1 else "times"} in this run of {batches:g} batches'
        remedy = f" or half_life='{in_batches}ba'"
    warn(
        f'{half_life} without an update_interval updates the average once an {NOUNS[unit]}{effect}. Pass '
        f"update_interval='1ba'{remedy} to average every batch, or update_interval='{interval.span}' to keep it so."
    )


def warn_of_unknown_labels(evaluate_with: Collection[str], state: State) -> None:
    """Warns of labels in ``evaluate_with`` that no evaluator of the run has."""
    labels = [evaluator.label for evaluator in state.evaluators]
    for label in evaluate_with:
        if labels and label not in labels and label != PREDICT:
            remedy = suggestion(label, labels, 'Its evaluators are')
            warn(f'evaluate_with names the evaluator {label!r}, which this Trainer does not have. {remedy}')


def warn_of_other_arguments(names: Iterable[str], saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Warns of arguments in ``names`` that differ from those that a loaded average was ``saved`` with."""
    for name in names:
        if name in saved and saved[name] != given[name]:
            warn(
                f'the checkpoint was averaged with {name}={saved[name]!r}, this run continues with '
                f'{name}={given[name]!r}.'
            )


def warn_of_no_update(start: Start, interval: Interval) -> None:
    """Warns that training has ended without an average."""
    warn(
        f'training ended before the first update: {start}, {interval}. Evaluation uses the training weights. '
        'Start earlier, or update more often.'
    )


def warn_without_exporter(export_weights: str) -> None:
    """Warns that ``export_weights`` asks for an average and no callback exports the model."""
    warn(
        f'export_weights={export_weights!r} has no effect: no callback of this Trainer exports the model. '
        'Add ExportForInferenceCallback, or leave export_weights out.'
    )


def warn_without_rate(name: str, value: str) -> None:
    """Warns that an argument of the annealing was given without a learning rate to anneal to."""
    warn(
        f'{name}={value!r} has no effect without swa_lr: the learning rate is left alone. '
        f'Pass swa_lr, or leave {name} out.'
    )


def warn_if_not_reached(length: TimeArgument, start: Start, state: State) -> None:
    """Warns if the learning rate cannot reach ``swa_lr`` before the run ends."""
    span, begin = length.resolve(state), start.resolve(state)
    whole, until_start = run_length(span.unit, state), run_length(begin.unit, state)
    if whole is None or until_start is None or not until_start:
        return
    left = whole * max(0.0, 1 - begin.value / until_start)
    if span.value > left * (1 + 1e-9):
        warn(
            f'{length} is longer than what is left of the run after {start}: '
            f'swa_lr is not reached. Pass a shorter {length.name}, or start earlier.'
        )


def warn_of_a_single_update(start: Start, interval: Interval, state: State) -> None:
    """Warns if only one update fits between the start of the average and the end of the run."""
    span, begin = interval.resolve(state), start.resolve(state)
    whole, until_start = run_length(span.unit, state), run_length(begin.unit, state)
    if whole is None or not until_start or begin.value > until_start or span.value > whole:
        return  # longer than the run, which is warned of already
    first = begin.value / until_start * whole
    if interval.event is not Event.BATCH_END:
        first = max(1, math.ceil(first - 1e-9))
    second = first + span.value
    if begin.value == 0:  # the interval counts from the start of training, not from the first update
        second = (multiples(first, span.value) + 1) * span.value
    if first > 0 and second > whole * (1 + 1e-9):
        warn(
            f'{start} with {interval} takes a single moment of this run into the average, which is then the training '
            'weights of that moment. Start earlier, or pass a shorter update_interval, for example '
            "update_interval='100ba'."
        )


def refuse_rivals(algorithm: Algorithm, rivals: tuple[type[Algorithm], ...], state: State) -> None:
    """Raises a ValueError if another algorithm of the run keeps an average that ``algorithm`` cannot stand beside."""
    name = type(algorithm).__qualname__
    namesakes = [each for each in state.algorithms if type(each).__qualname__ == name]
    if len(namesakes) > 1:
        remedy = (
            "Pass one with several half-lives: EMA(half_life={'short': '100ba', 'long': '1ep'})."
            if name == 'EMA'
            else 'Pass one.'
        )
        raise ValueError(
            f'{len(namesakes)} algorithms called {name} in one Trainer, {namesakes}: '
            f'a checkpoint would keep the state of only one. {remedy}'
        )
    found = [each for each in state.algorithms if each is not algorithm and isinstance(each, rivals)]
    if found:
        raise ValueError(
            f'{name} and {type(found[0]).__module__}.{type(found[0]).__qualname__} in one Trainer: both keep an '
            'average, and an evaluation could use only one. Pass EMA and SWA of composer_ema, which take turns.'
        )


def refuse_equal_labels(labels: Mapping[str, Sequence[str]]) -> None:
    """Raises a ValueError if two algorithms call an average the same; ``labels`` are theirs by name."""
    owners: dict[str, str] = {}
    for name, own in labels.items():
        for label in own:
            if owners.setdefault(label, name) != name:
                raise ValueError(
                    f'{owners[label]} and {name} in one Trainer both call an average {label!r}. Label it by another '
                    "name, as in EMA(half_life={'short': '100ba'})."
                )


def refuse_two_exports(export_weights: Mapping[str, str]) -> None:
    """Raises a ValueError if two algorithms ask for their averages to be exported, by name."""
    if len(export_weights) > 1:
        said = ' and '.join(f'{weights!r} of {name}' for name, weights in export_weights.items())
        raise ArgumentError(f'export_weights asks for {said}, and an export holds one. Keep one.', 'export_weights')


def refuse_unsupported(state: State) -> None:
    """Raises a NotImplementedError if Composer shards the model by FSDP1, or has done so."""
    if isinstance(state.fsdp_config, FSDPConfig):
        raise NotImplementedError(
            "parallelism_config={'fsdp': ...} shards the model by FSDP1, whose flat pieces have no layout that an "
            'average could be saved and loaded in. Shard it by FSDP2, which needs no other change: import FSDP2Config '
            "from composer.utils.parallelism and pass parallelism_config={'fsdp': FSDP2Config(...)}."
        )
    sharding.refuse_placeholders(dict(state.model.named_parameters()))
