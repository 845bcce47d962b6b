"""A batch whose step GradScaler leaves out makes no update, and counts as no time."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import toy
from composer import Callback, Trainer
from composer.algorithms import SAM
from composer.core import Precision
from composer.trainer._scaler import ClosureGradScaler
from tensors import all_tensors, assert_close, copies, mixed
from torch.amp.grad_scaler import GradScaler

from composer_ema import EMA, SWA, EMAOptimizer
from composer_ema.trainer.weight_average import WeightAverage


class Overflow(Callback):
    """Makes a gradient of some batches infinite, and averages the others by the closed form, in float64.

    Args:
        batches: which, counted from 1.
        half_lives: passed in each step, the first excepted.
    """

    def __init__(self, *batches: int, half_lives: dict[int, float] | None = None) -> None:
        self.batches, self.half_lives = batches, half_lives or {}
        self.average: dict[str, torch.Tensor] = {}

    def after_backward(self, state, logger) -> None:
        if int(state.timestamp.batch) + 1 in self.batches:
            next(state.model.parameters()).grad.fill_(torch.inf)

    def batch_end(self, state, logger) -> None:
        batch = int(state.timestamp.batch)
        if batch not in self.batches:
            now = {name: t.double() if t.is_floating_point() else t for name, t in copies(state.model).items()}
            self.average = mixed(self.average or now, now, 2.0 ** -self.half_lives.get(batch, 0.5))


def scaled(run: Trainer, kind: type[GradScaler] = GradScaler) -> Trainer:
    """Composer scales gradients in amp_fp16 only, and trains in amp_fp16 on CUDA only; torch scales on a CPU, too."""
    run.state.precision, run.state.scaler = Precision.AMP_FP16, kind('cpu')
    return run


@pytest.mark.parametrize(
    ('arguments', 'skipped', 'half_lives'),
    [
        ({'half_life': '2ba'}, (2,), {}),
        ({'half_life': '2ba'}, (1, 2), {}),
        ({'half_life': '2ba'}, (2, 3, 4), {}),
        ({'smoothing': 2**-0.5}, (3,), {}),
        ({'half_life': f'{1 / 3}dur'}, (2,), {}),
        # Samples and epochs of a step that was left out were not trained on: batches of 4, 4, 2, 4, 4, 2.
        ({'half_life': '8sp'}, (2,), {3: 2 / 8, 6: 2 / 8}),
        ({'half_life': '24tok'}, (3, 4), {6: 2 / 8}),
        ({'half_life': f'{2 / 3}ep', 'update_interval': '1ba'}, (2, 4), {}),
    ],
)
def test_a_skipped_step_makes_no_update_and_counts_as_no_time(trainer, arguments, skipped, half_lives):
    ema, by_hand = EMA(**arguments), Overflow(*skipped, half_lives=half_lives)
    run = scaled(trainer([ema], callbacks=[by_hand], max_duration='6ba'))
    run.fit()
    assert run.state.scaler.get_scale() == 2.0 ** (16 - len(skipped))
    assert ema.ema_model.num_updates == 6 - len(skipped)
    assert_close(all_tensors(ema.ema_model), by_hand.average, rtol=3e-6, atol=1e-7)


def test_an_update_that_is_due_at_a_skipped_step_comes_at_the_next(trainer):
    ema, swa = EMA('2ba', update_interval='2ba'), SWA('2ba', update_interval='2ba')
    for algorithm, batches in ((ema, [1, 2, 5, 6]), (swa, [2, 5, 6])):
        counts = CountUpdates(algorithm)
        scaled(trainer([algorithm], callbacks=[Overflow(4), counts])).fit()
        assert counts.batches == batches


class CountUpdates(Callback):
    """Notes the batches after which there was an update."""

    def __init__(self, algorithm: WeightAverage) -> None:
        self.algorithm, self.batches = algorithm, []

    def batch_end(self, state, logger) -> None:
        if toy.shadow_of(self.algorithm).num_updates > len(self.batches):
            self.batches.append(int(state.timestamp.batch))


def test_an_update_at_the_end_of_an_epoch_counts_the_steps_in_it(trainer):
    ema = EMA('1ep', update_interval='1ep')
    run = scaled(trainer([ema], callbacks=[Overflow(6, 7, 8, 9)], max_duration='4ep'))
    smoothings: list[float | None] = []
    original = ema._averages.update

    def update(*args, **options):
        original(*args, **options)
        weight, _ = ema._averages['ema'].last_move
        smoothings.append(1 - weight)

    ema._averages.update = update
    run.fit()
    # The first copies. Two of three steps in the second epoch, none in the third, three in the fourth.
    assert smoothings == pytest.approx([0, 2 ** (-2 / 3), 2**-1])


def test_it_counts_the_updates_of_an_optimizer_which_hears_of_steps_only(trainer):
    model, ema = toy.make_model(), EMA('2ba')
    optimizer = EMAOptimizer(toy.make_optimizer(model), half_life=2, model=model)
    scaled(trainer([ema], model=model, optimizers=optimizer, callbacks=[Overflow(2, 5)])).fit()
    assert ema.ema_model.num_updates == optimizer.shadow.num_updates == 4


def test_the_age_of_a_power_function_average_counts_steps(trainer):
    skipping, short = EMA(power=0.2), EMA(power=0.2)
    scaled(trainer([skipping], callbacks=[Overflow(1, 3)], max_duration='6ba')).fit()
    trainer([short], max_duration='4ba').fit()
    assert skipping.ema_model.num_updates == 4
    states = [ema.state_dict()['averages']['ema'] for ema in (skipping, short)]
    ages = [state['last_update']['ba'] - state['started_at']['ba'] for state in states]
    assert ages == [4, 4]


def test_a_run_resumes_exactly_from_a_skipped_step(trainer, tmp_path):
    """The checkpoints make torch build an empty optimizer state by a step, which moves nothing."""
    overflow = Overflow(1, 2, 4)
    whole = scaled(
        trainer([EMA('2ba')], callbacks=[overflow], save_folder=str(tmp_path), save_interval='1ba',
                save_filename='ba{batch}.pt')
    )  # fmt: skip
    whole.fit()
    whole.close()
    assert toy.snapshot(whole)['num_updates'] == 3
    for batch in (1, 2, 4):
        resumed = trainer([EMA('2ba')], callbacks=[overflow], load_path=str(tmp_path / f'ba{batch}.pt'))
        scaled(resumed).fit()
        resumed.close()
        assert toy.snapshot(resumed) == toy.snapshot(whole)


def test_sam_steps_only_where_its_own_optimizer_does(trainer):
    ema = EMA('2ba')
    scaled(trainer([SAM(), ema], callbacks=[Overflow(2, 3)]), ClosureGradScaler).fit()
    assert ema.ema_model.num_updates == 4


def test_a_fused_optimizer_decides_on_the_device_so_every_batch_counts(trainer):
    model, ema = toy.make_model(), EMA('2ba')
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    scaled(trainer([ema], model=model, optimizers=optimizer, callbacks=[Overflow(2)])).fit()
    assert ema.ema_model.num_updates == 6


def test_an_optimizer_that_tells_nobody_of_its_steps_makes_every_batch_count(trainer):
    class Silent(torch.optim.SGD):
        pass

    model, ema = toy.make_model(), EMA('2ba')
    optimizer = Silent(model.parameters(), lr=0.1)
    Silent.step = torch.optim.SGD.step.__wrapped__  # runs no hooks
    scaled(trainer([ema], model=model, optimizers=optimizer, callbacks=[Overflow(2)])).fit()
    assert ema.ema_model.num_updates == 6


def test_nothing_is_left_on_the_optimizer_and_a_copy_watches_nobody(trainer):
    ema = EMA('2ba')
    run = scaled(trainer([ema], callbacks=[Copy(ema)]))
    run.fit()
    assert not run.state.optimizers[0]._optimizer_step_post_hooks
    run.state.precision = Precision.FP32
    run.fit(duration='1ba')
    assert ema.ema_model.num_updates == 7


class Copy(Callback):
    def __init__(self, ema: EMA) -> None:
        self.ema = ema

    def batch_end(self, state, logger) -> None:
        watching: list[Any] = [self.ema, copy.deepcopy(self.ema), pickle.loads(pickle.dumps(self.ema))]
        is_scaled = state.precision is Precision.AMP_FP16
        assert [each._steps.is_watching for each in watching] == [is_scaled, False, False]
