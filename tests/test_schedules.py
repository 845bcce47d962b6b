"""Schedules of recipes: what is filled in, and that every learning rate is the one of a loop in plain PyTorch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from composer.core import Callback
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

from composer_ema.recipe import registry, run, schema
from composer_ema.recipe.arguments import RecipeError
from composer_ema.recipe.build import build
from composer_ema.recipe.outline import Outline
from composer_ema.recipe.schedules import Length

PER_EPOCH, EPOCHS = 5, 3
# torch's own word on what SequentialLR does at a milestone, and on a step without gradients.
pytestmark = pytest.mark.filterwarnings('ignore:The epoch parameter in', 'ignore:Detected call of')

RECIPE: dict[str, Any] = {
    'max_duration': f'{EPOCHS}ep',
    'progress_bar': False,
    'device': 'cpu',
    'save_interval': '1ba',
    'autoresume': True,
    'run_name': 'run',
    'device_train_microbatch_size': 4,  # gradients are accumulated over two micro-batches
    'model': {'name': 'fashion_cnn', 'widths': [2, 2, 2, 2], 'num_classes': 3},
    'data': {  # five batches, of which the last has 5 samples
        'name': 'fake', 'image_size': [1, 17, 17], 'num_classes': 3, 'size': 37, 'eval_size': 10, 'batch_size': 8,
        'eval_batch_size': 10,
    },
    'optimizer': {'name': 'sgd', 'lr': 0.1, 'momentum': 0.9},
    'evaluate': [],
}  # fmt: skip

Make = Callable[[torch.optim.Optimizer, int], Any]
#: What the recipe says and what a program would say; the second argument is the number of steps of the run.
CASES: dict[str, tuple[dict[str, Any], Make]] = {
    'StepLR': ({'step_size': 2, 'gamma': 0.5}, lambda o, n: lrs.StepLR(o, 2, 0.5)),
    'MultiStepLR': ({'milestones': [2, 7]}, lambda o, n: lrs.MultiStepLR(o, [2, 7])),
    'ConstantLR': ({'factor': 0.5}, lambda o, n: lrs.ConstantLR(o, 0.5, total_iters=n)),
    'LinearLR': ({'end_factor': 0.1}, lambda o, n: lrs.LinearLR(o, end_factor=0.1, total_iters=n)),
    'ExponentialLR': ({'gamma': 0.9}, lambda o, n: lrs.ExponentialLR(o, 0.9)),
    'CosineAnnealingLR': ({'eta_min': 0.01}, lambda o, n: lrs.CosineAnnealingLR(o, n, 0.01)),
    'PolynomialLR': ({'power': 2.0}, lambda o, n: lrs.PolynomialLR(o, n, 2.0)),
    'CyclicLR': (
        {'base_lr': 0.01, 'max_lr': 0.1, 'step_size_up': 3, 'mode': 'triangular2'},
        lambda o, n: lrs.CyclicLR(o, 0.01, 0.1, 3, mode='triangular2'),
    ),
    'CosineAnnealingWarmRestarts': (
        {'T_0': 2, 'T_mult': 2},
        lambda o, n: lrs.CosineAnnealingWarmRestarts(o, 2, 2),
    ),
    'OneCycleLR': ({'max_lr': 0.5}, lambda o, n: lrs.OneCycleLR(o, 0.5, total_steps=n)),
    'SWALR': ({'swa_lr': 0.02, 'anneal_epochs': 4}, lambda o, n: SWALR(o, 0.02, 4)),
    'SequentialLR': (
        {
            'milestones': [2],
            'schedulers': [{'name': 'LinearLR', 'start_factor': 0.1}, {'name': 'CosineAnnealingLR'}],
        },
        lambda o, n: lrs.SequentialLR(
            o, [lrs.LinearLR(o, 0.1, total_iters=2), lrs.CosineAnnealingLR(o, max(1, n - 2))], [2]
        ),
    ),
    'ChainedScheduler': (
        {'schedulers': [{'name': 'ConstantLR', 'total_iters': 2}, {'name': 'exponential_lr', 'gamma': 0.9}]},
        lambda o, n: lrs.ChainedScheduler([lrs.ConstantLR(o, total_iters=2), lrs.ExponentialLR(o, 0.9)]),
    ),
}
Rates = list[tuple[float, float]]


def rate(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Learning rate and momentum of the first group."""
    (group, *_) = optimizer.param_groups
    return group['lr'], group['momentum'] if 'momentum' in group else group['betas'][0]


def plain(
    make: Make, interval: str, *, optimizer: type = torch.optim.SGD, batches: int = PER_EPOCH * EPOCHS, **options: Any
) -> Rates:
    """Rates of a loop in plain PyTorch."""
    options = {'lr': 0.1, **({'momentum': 0.9} if optimizer is torch.optim.SGD else {}), **options}
    stepped = optimizer([torch.nn.Parameter(torch.zeros(1))], **options)
    scheduler = make(stepped, batches if interval == 'batch' else math.ceil(batches / PER_EPOCH))
    rates = []
    for batch in range(batches):
        rates.append(rate(stepped))
        stepped.step()
        if interval == 'batch' or (batch + 1) % PER_EPOCH == 0:
            scheduler.step()
    return rates


class Watch(Callback):
    """Notes the rate that each batch is trained with, and stops the run like a crash would."""

    seen: dict[int, tuple[float, float]]

    def __init__(self, seen: dict[int, tuple[float, float]], stop_after: int | None) -> None:
        self.seen, self.stop_after = seen, stop_after

    def after_train_batch(self, state, logger) -> None:
        self.seen[int(state.timestamp.batch)] = rate(state.optimizers[0])

    def batch_checkpoint(self, state, logger) -> None:
        if int(state.timestamp.batch) == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture
def rates_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rates]:
    """Trains a recipe, interrupted and resumed after the given batches, and returns its rates batch by batch."""
    known = registry.callbacks()

    def rates_of(scheduler: Any, *, stops: tuple[int, ...] = (), **values: Any) -> Rates:
        path = tmp_path / 'recipe.yaml'
        whole = {**RECIPE, 'scheduler': scheduler, 'runs_folder': str(tmp_path / 'runs'), **values}
        path.write_text(yaml.safe_dump({**whole, 'callbacks': {'watch': {}}}))
        seen: dict[int, tuple[float, float]] = {}
        for stop in (*stops, None):
            watch = functools.partial(Watch, seen=seen, stop_after=stop)
            patched = registry.Registry('callback', {**known.classes, 'watch': watch}, {'watch': 'watch'})  # pyright: ignore
            monkeypatch.setattr(registry, 'callbacks', lambda patched=patched: patched)
            loaded = schema.load(path)
            if stop is None:
                run.train(loaded, lambda _: None)
            else:
                with pytest.raises(KeyboardInterrupt):
                    run.train(loaded, lambda _: None)
        return [seen[batch] for batch in range(len(seen))]

    return rates_of


class TestRates:
    @pytest.mark.parametrize('interval', ['batch', 'epoch'])
    @pytest.mark.parametrize('name', CASES)
    def test_are_those_of_a_plain_loop(self, rates_of, name, interval):
        arguments, make = CASES[name]
        assert rates_of({'name': name, 'interval': interval, **arguments}) == plain(make, interval)

    @pytest.mark.parametrize(('interval', 'stops'), [('batch', (3, 7)), ('epoch', (5, 12))])
    @pytest.mark.parametrize('name', CASES)
    def test_are_the_same_when_interrupted_and_resumed(self, rates_of, name, interval, stops):
        arguments, make = CASES[name]
        rates = rates_of({'name': name, 'interval': interval, **arguments}, stops=stops)
        assert rates == plain(make, interval)

    def test_every_class_of_torch_is_covered_or_refused(self):
        of_torch = {c.__name__ for c in registry.schedulers().classes.values() if issubclass(c, lrs.LRScheduler)}
        assert of_torch - CASES.keys() == {'LambdaLR', 'MultiplicativeLR', 'ReduceLROnPlateau'}

    @pytest.mark.parametrize('stops', [(), (4, 5)])
    @pytest.mark.parametrize('name', ['OneCycleLR', 'CyclicLR'])
    def test_move_the_first_beta_of_adam_too(self, rates_of, name, stops):
        arguments, make = CASES[name]
        rates = rates_of({'name': name, **arguments}, optimizer={'name': 'adam', 'lr': 0.1}, stops=stops)
        assert rates == plain(make, 'batch', optimizer=torch.optim.Adam)
        assert len({momentum for _, momentum in rates}) > 3

    def test_a_run_that_ends_within_an_epoch(self, rates_of):
        rates = rates_of({'name': 'CosineAnnealingLR', 'interval': 'epoch'}, max_duration='7ba')
        assert rates == plain(lambda o, n: lrs.CosineAnnealingLR(o, 2), 'epoch', batches=7)

    @pytest.mark.parametrize('stops', [(), (3, 5, 11)])
    def test_of_two_schedulers_at_different_times(self, rates_of, stops):
        scheduler = [
            {'name': 'linear_lr', 'start_factor': 0.1, 'total_iters': 3, 'interval': 'batch'},
            {'name': 'step_lr', 'step_size': 1, 'gamma': 0.5, 'interval': 'epoch'},
        ]
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
        warmup, decay = lrs.LinearLR(optimizer, 0.1, total_iters=3), lrs.StepLR(optimizer, 1, 0.5)
        expected = []
        for _ in range(EPOCHS):
            for _ in range(PER_EPOCH):
                expected.append(rate(optimizer))
                optimizer.step()
                warmup.step()
            decay.step()
        assert rates_of(scheduler, stops=stops) == expected

    @pytest.mark.parametrize('stops', [(), (7,)])
    def test_of_two_schedulers_of_one_class(self, rates_of, stops):
        scheduler = [{'name': 'step_lr', 'step_size': size, 'gamma': 0.5, 'interval': 'batch'} for size in (2, 3)]
        chained = plain(lambda o, n: lrs.ChainedScheduler([lrs.StepLR(o, 2, 0.5), lrs.StepLR(o, 3, 0.5)]), 'batch')
        assert rates_of(scheduler, stops=stops) == chained

    def test_of_two_schedulers_of_composer_multiply(self, rates_of):
        rates = rates_of([{'name': 'linear'}, {'name': 'StepScheduler', 'step_size': '1ep', 'gamma': 0.5}])
        # Composer steps before it moves the clock on: each batch has the factor of the batch before.
        clock = [max(0, batch - 1) for batch in range(15)]
        assert [lr for lr, _ in rates] == pytest.approx([0.1 * (1 - b / 15) * 0.5 ** (b // 5) for b in clock])

    def test_of_swalr_follow_the_closed_form(self, rates_of):
        rates = rates_of({'name': 'SWALR', 'swa_lr': 0.02, 'anneal_epochs': 10, 'interval': 'batch'})
        shares = [(1 - math.cos(math.pi * min(1, batch / 10))) / 2 for batch in range(15)]
        assert [lr for lr, _ in rates] == pytest.approx([0.1 + share * (0.02 - 0.1) for share in shares])


class TestOutline:
    @staticmethod
    def outline(scheduler: Any, **values: Any) -> Outline:
        recipe = schema.Recipe('a.yaml', 'a', {**RECIPE, 'scheduler': scheduler, **values})
        return Outline(schema.plan(recipe), batches_per_epoch=PER_EPOCH)

    @pytest.mark.parametrize('interval', ['batch', 'epoch'])
    @pytest.mark.parametrize('name', CASES)
    def test_gives_the_rates_of_a_plain_loop(self, name, interval):
        arguments, make = CASES[name]
        outline = self.outline({'name': name, 'interval': interval, **arguments})
        assert [(group['lr'], group['momentum']) for (group,) in outline.steps()] == plain(make, interval)
        assert outline.length == Length(15, 5)

    @pytest.mark.parametrize('interval', ['batch', 'epoch'])
    @pytest.mark.parametrize('name', ['cosine', 'linear_with_warmup', 'StepScheduler'])
    def test_gives_the_rates_of_a_run_with_schedulers_of_composer(self, rates_of, name, interval):
        arguments = {'StepScheduler': {'step_size': '4ba'}, 'linear_with_warmup': {'t_warmup': '0.2dur'}}
        scheduler = {'name': name, 'interval': interval, **arguments.get(name, {})}
        steps = self.outline(scheduler).steps()
        assert [(group['lr'], group['momentum']) for (group,) in steps] == rates_of(scheduler)

    def test_takes_metrics_for_a_plateau(self):
        scheduler = {'name': 'reduce_lr_on_plateau', 'metric': 'eval_training/CrossEntropy', 'patience': 0}
        outline = self.outline(scheduler, evaluate=['training'])
        for value, lr in ((1.0, 0.1), (2.0, 0.01), (0.5, 0.01)):
            outline.end_evaluation({'eval_training/CrossEntropy': value, 'eval_training/other': 9.0})
            assert outline.optimizer.param_groups[0]['lr'] == pytest.approx(lr)

    def test_of_a_run_in_samples_says_what_to_write(self):
        with pytest.raises(RecipeError, match=r"max_duration: '80sp' does not tell"):
            self.outline(None, max_duration='80sp')


def test_filled_in_values_are_in_the_resolved_recipe_which_builds_the_same(tmp_path):
    values = {**RECIPE, 'runs_folder': str(tmp_path), 'scheduler': {'name': 'one_cycle_lr', 'max_lr': 0.5}}
    built = build(schema.Recipe('a.yaml', 'a', values), scratch=tmp_path)
    built.trainer.close()
    assert built.recipe.values['scheduler'] == {
        'name': 'one_cycle_lr', 'max_lr': 0.5, 'total_steps': 15, 'interval': 'batch',
    }  # fmt: skip
    assert built.remarks == ['scheduler: OneCycleLR(max_lr=0.5, total_steps=15 (from the length of the run)) per batch']
    again = build(built.recipe, scratch=tmp_path)
    again.trainer.close()
    assert again.recipe.values == built.recipe.values
    assert again.trainer.state.schedulers[0].state_dict() == built.trainer.state.schedulers[0].state_dict()
