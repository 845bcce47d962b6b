"""The pair grid of the contract: a run for every pair of settings, and what is compared between two runs.

Every value of each axis in ``AXES`` meets every value of every other axis in at least one case.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from composer import Callback, Event, Trainer
from composer.algorithms import SAM, SWA, GradientClipping, LayerFreezing, SelectiveBackprop
from composer.optim import CosineAnnealingScheduler
from contract import (
    PredictDuringFit,
    Unfreeze,
    save_after_odd_batches,
    save_when_numpy_says_so,
)
from torch import Tensor
from toy import bits, make_evaluator, make_model, make_trainer, shadow_of

from composer_ema.trainer.weight_average import WeightAverage


def every_second_batch(state, event) -> bool:
    return event is Event.BATCH_END and int(state.timestamp.batch) % 2 == 0


AXES: dict[str, tuple[Any, ...]] = {
    'horizon': ('2ba', '1.5ep', '7sp', '30tok', '1iter', '0.25dur', '0ba', 0.75),
    'update_interval': (None, '1ba', '2ba', '1ep', '0.5ep', '5sp', '20tok', '0.3dur'),
    'evaluation': ('1ba', '2ba', '1ep', every_second_batch),
    'saving': (None, '1ba', '1ep', '1iter', save_after_odd_batches, save_when_numpy_says_so),
    'prediction': (None, Event.BATCH_END, Event.EPOCH_END),
    'others': (None, 'sam', 'swa', 'selective_backprop', 'layer_freezing', 'gradient_clipping'),
    'setting': ('plain', 'schedule', 'microbatches', 'autocast', 'two fits', 'unfreezing'),
}


class Case(NamedTuple):
    horizon: Any
    update_interval: Any
    evaluation: Any
    saving: Any
    prediction: Any
    others: Any
    setting: str


def pairs_in(case: Case) -> set[tuple[int, Any, int, Any]]:
    """Every pair of settings that ``case`` tries together."""
    return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}


def covering_cases() -> list[Case]:
    """Few cases that hold every pair of settings: each takes an uncovered pair, then what covers most of the rest."""
    values = list(AXES.values())
    uncovered = {
        (i, a, j, b): None
        for i, j in itertools.combinations(range(len(values)), 2)
        for a in values[i]
        for b in values[j]
    }
    cases = []
    while uncovered:
        i, a, j, b = next(iter(uncovered))
        chosen = {i: a, j: b}
        for axis in range(len(values)):
            if axis in chosen:
                continue
            gain = {
                value: sum(
                    ((axis, value, k, v) if axis < k else (k, v, axis, value)) in uncovered for k, v in chosen.items()
                )
                for value in values[axis]
            }
            chosen[axis] = max(gain, key=gain.__getitem__)
        case = Case(*(chosen[axis] for axis in range(len(values))))
        for pair in pairs_in(case):
            uncovered.pop(pair, None)
        cases.append(case)
    return cases


CASES = covering_cases()


class Recorder(Callback):
    """Keeps the bits of the model wherever training may be observed, and checks what evaluation runs on."""

    MOMENTS = frozenset({
        Event.FIT_START, Event.BATCH_START, Event.BATCH_END, Event.BATCH_CHECKPOINT, Event.EPOCH_END,
        Event.EPOCH_CHECKPOINT, Event.ITERATION_END, Event.ITERATION_CHECKPOINT, Event.FIT_END,
    })  # fmt: skip

    def __init__(self, algorithm: WeightAverage | None = None) -> None:
        self.algorithm = algorithm
        self.history: list[tuple[str, dict[str, bytes]]] = []
        self.forwards_with_average = 0

    def run_event(self, event, state, logger) -> None:
        if event in self.MOMENTS:
            self.history.append((event.value, bits(state.model)))
        if event not in (Event.EVAL_BEFORE_FORWARD, Event.PREDICT_BEFORE_FORWARD) or self.algorithm is None:
            return
        if self.algorithm.state_dict()['started']:
            shadow = shadow_of(self.algorithm)
            held, average = bits(state.model), {**dict(shadow.named_parameters()), **dict(shadow.named_buffers())}
            averaged = {name: tensor for name, tensor in average.items() if tensor.is_floating_point()}
            assert all(held[name] == value for name, value in bits(averaged).items())
            self.forwards_with_average += 1


def other_algorithms(name: str | None) -> list[Any]:
    return {
        None: lambda: [],
        'sam': lambda: [SAM(rho=0.1, interval=2)],
        'swa': lambda: [SWA(swa_start='0.3dur', swa_end='0.9dur', update_interval='1ba')],
        'selective_backprop': lambda: [SelectiveBackprop(start=0.0, end=1.0, keep=0.5, interrupt=2)],
        'layer_freezing': lambda: [LayerFreezing(freeze_start=0.2, freeze_level=0.7)],
        'gradient_clipping': lambda: [GradientClipping(clipping_type='norm', clipping_threshold=0.05)],
    }[name]()


def run_case(case: Case, folder: Path, algorithm: WeightAverage | None) -> tuple[Recorder, Trainer, torch.Tensor]:
    recorder = Recorder(algorithm)
    callbacks: list[Callback] = [recorder]
    predicting = None
    if case.prediction is not None:
        predicting = PredictDuringFit(case.prediction)
        callbacks.append(predicting)
    arguments: dict[str, Any] = {'eval_dataloader': make_evaluator(interval=case.evaluation)}
    if case.saving is not None:
        arguments |= {'save_folder': str(folder), 'save_interval': case.saving, 'save_overwrite': True}
    if case.setting == 'schedule':
        arguments |= {'schedulers': CosineAnnealingScheduler(), 'step_schedulers_every_batch': True}
    if case.setting == 'microbatches':
        arguments |= {'device_train_microbatch_size': 2}
    model = arguments['model'] = make_model()
    if case.others == 'layer_freezing':  # Composer cannot save the momentum of a frozen parameter
        arguments['optimizers'] = torch.optim.SGD(model.parameters(), lr=0.3)
    if case.setting == 'autocast':  # Composer has no mixed precision on the CPU; torch has
        model.forward = torch.autocast('cpu', dtype=torch.bfloat16)(model.forward)
    if case.setting == 'unfreezing':
        callbacks.append(Unfreeze())
    trainer = make_trainer(
        [*other_algorithms(case.others), *([] if algorithm is None else [algorithm])],
        iteration='1ep' if '1iter' in (case.horizon, case.saving) else None,
        callbacks=callbacks,
        **arguments,
    )
    if predicting is not None:
        predicting.trainer = trainer
    trainer.fit()
    if case.setting == 'two fits':
        trainer.fit(duration='2ba')
    return recorder, trainer, torch.get_rng_state()


@functools.cache
def reference_run(case: Case, folder: Path) -> tuple[list, dict[str, bytes], dict, bytes]:
    recorder, trainer, rng = run_case(case, folder, None)
    return recorder.history, bits(trainer.state.model), momenta(trainer), rng.numpy().tobytes()


def momenta(trainer: Trainer) -> dict[str, bytes]:
    state = trainer.state.optimizers[0].state
    tensors = {
        f'{name}.{key}': value
        for name, parameter in trainer.state.model.named_parameters()
        for key, value in state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    assert tensors or not trainer.state.optimizers[0].defaults['momentum']
    return bits(tensors)


def label(value: Any) -> str:
    return getattr(value, '__name__', None) or getattr(value, 'value', None) or str(value)
