"""Settings that cannot work in a Composer run: refused before the first batch, or warned of where they do no harm."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from composer.core import Algorithm, State
from composer.utils.parallelism import FSDPConfig

from composer_ema.model import sharding
from composer_ema.run.asked import PREDICT
from composer_ema.run.limits import warn
from composer_ema.spans import ArgumentError
from composer_ema.wording import suggestion


def warn_of_unknown_labels(evaluate_with: Collection[str], state: State) -> None:
    """Warns of labels in ``evaluate_with`` that no evaluator of the run has."""
    labels = [evaluator.label for evaluator in state.evaluators]
    for label in evaluate_with:
        if labels and label not in labels and label != PREDICT:
            remedy = suggestion(label, labels, 'Its evaluators are')
            warn(f'evaluate_with names the evaluator {label!r}, which this Trainer does not have. {remedy}')


def warn_without_evaluator(evaluate: Collection[str], split: Collection[str], state: State) -> None:
    """Warns that ``evaluate`` lists weights and no evaluator of the run is there to see them."""
    if evaluate and not any(evaluator.label in split for evaluator in state.evaluators):
        why = 'evaluate_with names all evaluators' if state.evaluators else 'this Trainer has no evaluator'
        warn(f'evaluate={list(evaluate)} has no effect: {why}. Pass eval_dataloader to the Trainer, or leave it out.')


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
