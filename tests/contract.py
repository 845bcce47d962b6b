"""What several tests of the contract share: an average of each kind, and callbacks that look, stop and fail."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from composer import Callback, Event, Trainer
from toy import bits, make_data, make_model, shadow_of

from composer_ema import EMA
from composer_ema import SWA as OurSWA
from composer_ema.trainer.weight_average import WeightAverage

SCRIPTS = Path(__file__).parent / 'scripts'


#: An average of each kind, so soon in so short a run that it differs from the weights.
AVERAGES: dict[str, Callable[..., WeightAverage]] = {
    'ema': lambda **arguments: EMA('2ba', **arguments),
    'swa': lambda **arguments: OurSWA('1ba', update_interval='1ba', **arguments),
}


each_average = pytest.mark.parametrize('average', AVERAGES.values(), ids=AVERAGES)


def save_after_odd_batches(state, event) -> bool:
    return event is Event.BATCH_CHECKPOINT and int(state.timestamp.batch) % 2 == 1


def save_when_numpy_says_so(state, event) -> np.bool_:
    return np.bool_(int(state.timestamp.batch) in (2, 3))


class PredictDuringFit(Callback):
    def __init__(self, moment: Event) -> None:
        self.moment = moment
        self.trainer: Trainer | None = None

    def run_event(self, event, state, logger) -> None:
        if event is self.moment and self.trainer is not None:
            self.trainer.predict(make_data(4, seed=3))


class Unfreeze(Callback):
    """Freezes the convolution until the end of the second batch."""

    def init(self, state, logger) -> None:
        state.model.get_parameter('module.0.weight').requires_grad_(False)

    def batch_end(self, state, logger) -> None:
        if int(state.timestamp.batch) == 2:
            state.model.get_parameter('module.0.weight').requires_grad_(True)


AVERAGE_IS_IN = frozenset({
    Event.EVAL_BEFORE_ALL, Event.EVAL_STANDALONE_START, Event.EVAL_START, Event.EVAL_BATCH_START,
    Event.EVAL_BEFORE_FORWARD, Event.EVAL_AFTER_FORWARD, Event.EVAL_BATCH_END, Event.EVAL_END, Event.PREDICT_START,
    Event.PREDICT_BATCH_START, Event.PREDICT_BEFORE_FORWARD, Event.PREDICT_AFTER_FORWARD, Event.PREDICT_BATCH_END,
})  # fmt: skip


WITHIN_A_STEP = frozenset({
    Event.BEFORE_TRAIN_BATCH, Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.BEFORE_LOSS, Event.AFTER_LOSS,
    Event.BEFORE_BACKWARD, Event.AFTER_BACKWARD, Event.AFTER_TRAIN_BATCH,
})  # fmt: skip


class Probe(Callback):
    """Notes at every event whether the model holds the training weights or the average, told apart by their bits."""

    def __init__(self, algorithm: WeightAverage) -> None:
        self.algorithm = algorithm
        self.seen: list[tuple[Event, str | None, str]] = []
        self.training: dict[str, bytes] = {}
        self.outputs_differ = 0

    def run_event(self, event, state, logger) -> None:
        if event is Event.INIT:
            state.optimizers[0].register_step_post_hook(lambda *_: self._note_training_weights(state))
            self._note_training_weights(state)
        held = bits(state.model)
        if event in WITHIN_A_STEP:  # the forward pass is writing BatchNorm's buffers
            held = {name: value for name, value in held.items() if name in dict(state.model.named_parameters())}
        is_training = all(self.training[name] == value for name, value in held.items())
        average = self._average()
        # Counters stay the model's own; those of an average whose statistics are refreshed count other batches.
        is_average = all(average.get(name) == value for name, value in held.items() if 'num_batches' not in name)
        kind = {(True, False): 'training', (False, True): 'average', (True, True): 'both'}.get(
            (is_training, is_average), 'neither'
        )
        self.seen.append((event, state.dataloader_label, kind))
        if event in (Event.EVAL_AFTER_FORWARD, Event.PREDICT_AFTER_FORWARD):
            self._compare_outputs(state, average)

    def kinds(self, event: Event, label: str | None = None) -> set[str]:
        return {kind for e, where, kind in self.seen if e is event and label in (None, where)}

    def _note_training_weights(self, state) -> None:
        self.training = bits(state.model)

    def _average(self) -> dict[str, bytes]:
        shadow = shadow_of(self.algorithm)
        return {} if shadow is None else bits({**dict(shadow.named_parameters()), **dict(shadow.named_buffers())})

    def _compare_outputs(self, state, average: dict[str, bytes]) -> None:
        """Runs the training weights by hand: the outputs must be others than those of the average."""
        other = make_model(seed=1).eval()
        for name, tensor in other.state_dict().items():
            tensor.copy_(torch.frombuffer(bytearray(self.training[name]), dtype=tensor.dtype).view(tensor.shape))
        self.outputs_differ += not torch.equal(other(state.batch), state.outputs)


class StopAfter(Callback):
    """Ends the run after a batch, as a user's own callback might."""

    def __init__(self, batch: int | None) -> None:
        self.batch = batch

    def batch_end(self, state, logger) -> None:
        if int(state.timestamp.batch) == self.batch:
            state.stop_training()


class Interrupted(Exception):
    pass


class RaiseAt(Callback):
    def __init__(self, event: Event, batch: int) -> None:
        self.event, self.batch = event, batch

    def run_event(self, event, state, logger) -> None:
        if event is self.event and int(state.timestamp.batch) == self.batch:
            self.batch = -1  # once
            raise Interrupted


BATCHES = 2 * toy.EPOCH


def saved_bits(path: Path) -> dict[str, Any]:
    state = torch.load(path, weights_only=False)['state']
    algorithms = dict(state['algorithms'])
    algorithm = algorithms.get('EMA') or algorithms['SWA']
    (average,) = algorithm['averages'].values()
    return {
        'model': bits(state['model']),
        'average': bits({**average['parameters'], **average['buffers']}),
        'counters': (average['num_updates'], average['last_update'], algorithm['started']),
    }


def error_of(call: Callable[[], object]) -> ValueError | TypeError | None:
    """The error of the user's making that ``call`` raises; any other kind passes through and fails the test."""
    try:
        call()
    except (ValueError, TypeError) as error:
        return error
    return None


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]
