"""Schedules of recipes: what is filled in, and that every learning rate is the one of a loop in plain PyTorch."""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

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
from composer_ema.recipe.scheduled import Length
from composer_ema.zoo.data import fake

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
    @pytest.mark.parametrize('name', CASES)
    def test_are_those_of_a_plain_loop(self, rates_of, name):
        arguments, make = CASES[name]
        assert rates_of({'name': name, 'interval': 'batch', **arguments}) == plain(make, 'batch')

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
        plan = schema.plan(recipe)
        size = plan.extent()
        assert size is not None
        return Outline(plan, size)

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

    def test_gives_the_rates_of_a_run_with_schedulers_at_different_times(self, rates_of):
        scheduler = [
            {'name': 'linear_lr', 'total_iters': 3, 'interval': 'batch'},
            {'name': 'step_lr', 'step_size': 1, 'interval': 'epoch'},
        ]
        steps = self.outline(scheduler).steps()
        assert [(group['lr'], group['momentum']) for (group,) in steps] == rates_of(scheduler)

    def test_takes_metrics_for_a_plateau(self):
        scheduler = {'name': 'reduce_lr_on_plateau', 'metric': 'eval_training/CrossEntropy', 'patience': 0}
        outline = self.outline(scheduler, evaluate=['training'])
        for value, lr in ((1.0, 0.1), (2.0, 0.01), (0.5, 0.01)):
            outline.end_evaluation({'eval_training/CrossEntropy': value, 'eval_training/other': 9.0})
            assert outline.optimizer.param_groups[0]['lr'] == pytest.approx(lr)

    @pytest.mark.parametrize(('samples', 'batches'), [(37, 5), (38, 6), (74, 10), (32, 4), (1, 1)])
    def test_of_a_run_in_samples_ends_with_the_batch_that_reaches_them(self, samples, batches):
        outline = self.outline({'name': 'linear_lr', 'interval': 'batch'}, max_duration=f'{samples}sp')
        assert outline.length == Length(batches, PER_EPOCH)
        assert len(list(outline.steps())) == batches


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


class TestPlateau:
    SCHEDULER: ClassVar = {'name': 'ReduceLROnPlateau', 'metric': 'eval_ema/MulticlassAccuracy', 'patience': 0}
    WITH_EMA: ClassVar = {'algorithms': {'ema': {'half_life': '3ba'}}, 'evaluate': ['training', 'ema']}

    @staticmethod
    def plain(folder: Path, metric: str, **arguments: Any) -> list[float]:
        """The rate of each batch, by torch's own scheduler on the metrics that the run wrote down."""
        lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
        measured = {line['batch']: line[f'metrics/{metric}'] for line in lines if f'metrics/{metric}' in line}
        assert len(set(measured.values())) > 1, 'a metric that stands still would prove little'
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler, rates = lrs.ReduceLROnPlateau(optimizer, **arguments), []
        for batch in range(1, PER_EPOCH * EPOCHS + 1):
            rates.append(optimizer.param_groups[0]['lr'])
            if batch in measured:
                scheduler.step(measured[batch])
        assert len(set(rates)) > 1, 'the rate never fell'
        return rates

    @pytest.mark.parametrize('eval_interval', ['2ba', '1ep'])
    @pytest.mark.parametrize('stops', [(), (2, 5, 9)])
    @pytest.mark.parametrize('metric', ['eval_ema/MulticlassAccuracy', 'eval_training/CrossEntropy'])
    def test_lowers_the_rate_as_torch_does_also_when_resumed(self, rates_of, tmp_path, metric, stops, eval_interval):
        # So strict that the rate falls although the metric becomes better.
        arguments = {'patience': 0, 'threshold': 0.5, 'factor': 0.5}
        rates = rates_of(
            {'name': 'ReduceLROnPlateau', 'metric': metric, **arguments},
            stops=stops, eval_interval=eval_interval, **self.WITH_EMA,
        )  # fmt: skip
        mode = 'max' if metric.endswith('Accuracy') else 'min'
        assert [lr for lr, _ in rates] == self.plain(tmp_path / 'runs/run', metric, mode=mode, **arguments)

    def test_beside_a_warmup_of_batches(self, rates_of):
        warmup = {'name': 'linear_lr', 'total_iters': 4, 'start_factor': 0.25, 'interval': 'batch'}
        rates = [lr for lr, _ in rates_of([warmup, {**self.SCHEDULER, 'threshold': 9.0}], **self.WITH_EMA)]
        assert rates == pytest.approx([0.025, 0.04375, 0.0625, 0.08125, 0.1, *[0.1] * 5, *[0.01] * 5])

    def test_is_not_stepped_by_an_evaluation_outside_the_run(self, tmp_path):
        values = {**RECIPE, **self.WITH_EMA, 'scheduler': self.SCHEDULER, 'runs_folder': str(tmp_path)}
        built = build(schema.Recipe('a.yaml', 'a', {**values, 'max_duration': '1ep', 'autoresume': False}))
        built.trainer.fit()
        before = built.trainer.state.schedulers[0].state_dict()
        built.trainer.eval()
        built.trainer.close()
        assert before['states'][0]['last_epoch'] == 1
        assert built.trainer.state.schedulers[0].state_dict() == before

    def test_takes_its_mode_from_the_metric(self, tmp_path):
        # Composer's CrossEntropy does not say which values are better; torch's default, min, is right for it.
        for metric, filled in (('MulticlassAccuracy', {'mode': 'max'}), ('CrossEntropy', {})):
            scheduler = {'name': 'reduce_lr_on_plateau', 'metric': f'metrics/eval_training/{metric}'}
            values = {**RECIPE, 'evaluate': ['training'], 'scheduler': scheduler, 'runs_folder': str(tmp_path)}
            built = build(schema.Recipe('a.yaml', 'a', values), scratch=tmp_path)
            built.trainer.close()
            assert built.recipe.values['scheduler'] == {
                'name': 'reduce_lr_on_plateau', 'metric': f'eval_training/{metric}', **filled,
            }  # fmt: skip


SEQUENCE = {'name': 'sequential_lr', 'milestones': [2], 'schedulers': [{'name': 'linear_lr'}, {'name': 'linear_lr'}]}
PLATEAU = {'name': 'reduce_lr_on_plateau', 'metric': 'eval_training/CrossEntropy'}
ACCURACY = {'name': 'reduce_lr_on_plateau', 'metric': 'eval_training/MulticlassAccuracy'}
REFUSED: list[tuple[Any, dict[str, Any], str, str]] = [
    ({'name': 'one_cycle'}, {}, 'scheduler.name', "Did you mean 'one_cycle_lr'?"),
    ({'name': 'one_cycle_lr'}, {}, 'scheduler', 'OneCycleLR needs max_lr'),
    ({'name': 'one_cycle_lr', 'max_lr': 1, 'pct_start': 2.0}, {}, 'scheduler.pct_start', 'between 0 and 1'),
    ({'name': 'one_cycle_lr', 'max_lr': 1, 'max_momentun': 1}, {}, 'scheduler.max_momentun', 'max_momentum'),
    ({'name': 'one_cycle_lr', 'max_lr': [1, 2]}, {}, 'scheduler.max_lr', 'same length as optimizer.param_groups'),
    ({'name': 'one_cycle_lr', 'max_lr': 1}, {'optimizer': {'name': 'adagrad'}}, 'scheduler', 'must support momentum'),
    ({'name': 'cosine_annealing_lr', 'T_max': 'long'}, {}, 'scheduler.T_max', 'must be an integer'),
    ({'name': 'step_lr'}, {}, 'scheduler', 'StepLR needs step_size'),
    ({'name': 'step_lr', 'step_size': 0}, {}, 'scheduler.step_size', 'must be at least 1, got 0'),
    ({'name': 'cosine_annealing_lr', 'T_max': 0}, {}, 'scheduler.T_max', 'must be at least 1, got 0'),
    (
        {'name': 'one_cycle_lr', 'max_lr': 1, 'steps_per_epoch': 0},
        {},
        'scheduler.steps_per_epoch',
        'must be at least 1, got 0',
    ),
    (
        {'name': 'cyclic_lr', 'base_lr': 0.1, 'max_lr': 1, 'step_size_up': 0},
        {},
        'scheduler.step_size_up',
        'must be at least 1, got 0',
    ),
    ({'name': 'multi_step_lr', 'milestones': 5}, {}, 'scheduler.milestones', 'a list, each entry an integer, got 5'),
    ({'name': 'multi_step_lr', 'milestones': ['a']}, {}, 'scheduler.milestones', 'a list, each entry an integer'),
    ({'name': 'step_lr', 'step_size': 2, 'last_epoch': 3}, {}, 'scheduler.last_epoch', 'no such argument'),
    ({'name': 'step_lr', 'step_size': 2, 'metric': 'a/b'}, {}, 'scheduler.metric', 'watches no metric'),
    ({'name': 'linear_lr', 'interval': 'iter'}, {}, 'scheduler.interval', 'must be batch or epoch'),
    ({'name': 'linear_lr'}, {'optimizer': None}, 'scheduler', 'needs an optimizer'),
    (
        {'name': 'linear_lr', 'interval': 'epoch'},
        {'step_schedulers_every_batch': True},
        'scheduler.interval',
        'says epoch, and step_schedulers_every_batch=true says batch. Keep interval.',
    ),
    ({'name': 'lambda_lr', 'lr_lambda': 'x'}, {}, 'scheduler.name', 'needs a function'),
    ({'name': 'multiplicative_lr'}, {}, 'scheduler.name', 'needs a function'),
    ({'name': 'cyclic_lr', 'base_lr': 0.1, 'max_lr': 1, 'scale_fn': 'x'}, {}, 'scheduler.scale_fn', 'must be null'),
    (
        {'name': 'swalr', 'swa_lr': 1, 'anneal_strategy': 'cosine'},
        {},
        'scheduler.anneal_strategy',
        'must be one of cos, linear',
    ),
    ({'name': 'cosine', 't_max': '3eps'}, {}, 'scheduler.t_max', "'3eps' is no time"),
    ({'name': 'multistep', 'milestones': ['1ep', '2']}, {}, 'scheduler.milestones.1', "'2' counts seconds"),
    ({**SEQUENCE, 'schedulers': []}, {}, 'scheduler.schedulers', 'must be a list of schedulers'),
    ({**SEQUENCE, 'schedulers': {'name': 'linear_lr'}}, {}, 'scheduler.schedulers', 'must be a list of schedulers'),
    ({**SEQUENCE, 'milestones': [2, 3]}, {}, 'scheduler.milestones', 'one fewer than the 2 schedulers'),
    ({**SEQUENCE, 'milestones': [0]}, {}, 'scheduler.milestones', 'whole numbers that rise'),
    ({**SEQUENCE, 'milestones': [True]}, {}, 'scheduler.milestones', 'must be a list, each entry an integer'),
    ({**SEQUENCE, 'schedulers': [{'name': 'step_lr'}] * 2}, {}, 'scheduler.schedulers.0', 'StepLR needs step_size'),
    (
        {**SEQUENCE, 'schedulers': [{'name': 'linear_lr', 'interval': 'batch'}] * 2},
        {},
        'scheduler.schedulers.0.interval',
        'the scheduler around this one',
    ),
    ({**SEQUENCE, 'schedulers': [{'name': 'cosine'}] * 2}, {}, 'scheduler.schedulers.0.name', "Only torch's"),
    ({**SEQUENCE, 'schedulers': [PLATEAU] * 2}, {}, 'scheduler.schedulers.0.name', 'List it beside'),
    ([{'name': 'cosine'}, {'name': 'linear_lr'}], {}, 'scheduler', 'Write all of the one kind'),
    ([{'name': 'cosine'}, {'name': 'linear', 'interval': 'epoch'}], {}, 'scheduler', 'Give one'),
    ([{'name': 'linear_lr'}, {'name': 'step'}], {}, 'scheduler.1', 'needs step_size'),
    ({'name': 'reduce_lr_on_plateau'}, {}, 'scheduler', 'Write metric: eval_training/CrossEntropy'),
    ({**PLATEAU, 'metric': 'loss'}, {}, 'scheduler.metric', 'an evaluator and a metric'),
    ({**PLATEAU, 'metric': 'eval_ema/CrossEntropy'}, {}, 'scheduler.metric', 'Its evaluators are eval_training'),
    ({**PLATEAU, 'metric': 'eval_training/Accuracy'}, {}, 'scheduler.metric', 'eval_training/MulticlassAccuracy'),
    ({**ACCURACY, 'mode': 'min'}, {}, 'scheduler.mode', 'Write max, or leave it out'),
    ({**PLATEAU, 'mode': 'most'}, {}, 'scheduler.mode', 'one of min, max'),
    ({**PLATEAU, 'factor': 2.0}, {}, 'scheduler.factor', 'Factor should be < 1.0, got 2.0.'),
    ({**PLATEAU, 'interval': 'epoch'}, {}, 'scheduler.interval', 'which eval_interval times'),
    (PLATEAU, {'step_schedulers_every_batch': True}, 'step_schedulers_every_batch', 'Leave it out'),
    (PLATEAU, {'evaluate': []}, 'scheduler.metric', 'the run evaluates nothing'),
    (PLATEAU, {'eval_interval': 0}, 'scheduler.metric', 'the run evaluates nothing'),
]


@pytest.mark.parametrize(('scheduler', 'values', 'key', 'said'), REFUSED)
def test_refused_before_data_is_touched(tmp_path, register, scheduler, values, key, said):
    @functools.wraps(fake)
    def touched(**_: Any) -> None:
        raise AssertionError('data was touched')

    register('datasets', 'fake', touched)
    values = {**RECIPE, 'evaluate': ['training'], 'runs_folder': str(tmp_path / 'runs'), **values}
    with pytest.raises(RecipeError) as refused:
        build(schema.Recipe('a.yaml', 'a', {**values, 'scheduler': scheduler}))
    assert refused.value.key == key
    assert said in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('scheduler', 'values', 'key', 'said'),
    [
        (
            {'name': 'one_cycle_lr', 'max_lr': 1, 'total_steps': 14},
            {},
            'scheduler',
            'after 14 steps and the run has 15',
        ),
        ({'name': 'one_cycle_lr', 'max_lr': 1, 'epochs': 2}, {}, 'scheduler', 'after 10 steps and the run has 15'),
        ({**SEQUENCE, 'milestones': [3]}, {}, 'scheduler.milestones', 'no step for LinearLR in a run of 3'),
        ({'name': 'cosine_with_warmup', 't_warmup': '1ba', 't_max': '9ba'}, {}, 'scheduler.t_max', 't_max'),
    ],
)
def test_what_does_not_fit_the_length_of_the_run_is_refused_before_data_is_touched(
    tmp_path, register, scheduler, values, key, said
):
    @functools.wraps(fake)
    def touched(**_: Any) -> None:
        raise AssertionError('data was touched')

    register('datasets', 'fake', touched)
    values = {**RECIPE, 'runs_folder': str(tmp_path / 'runs'), **values, 'scheduler': scheduler}
    with pytest.raises(RecipeError) as refused:
        build(schema.Recipe('a.yaml', 'a', values))
    assert refused.value.key == key
    assert said in str(refused.value)
    assert list(tmp_path.iterdir()) == []


PLAIN = {'name': 'linear_lr'}


@pytest.mark.parametrize(
    ('scheduler', 'said'),
    [
        ({'name': 'multi_step_lr', 'milestones': [1, 2]}, []),
        ({'name': 'multi_step_lr', 'milestones': [2, 3]}, ['milestones=[2, 3] goes beyond the 3 steps']),
        ({'name': 'multi_step_lr', 'milestones': [2, 3], 'interval': 'batch'}, []),
        ({'name': 'step_lr', 'step_size': 3}, ['write interval: batch']),
        ({'name': 'step_lr', 'step_size': 2}, []),
        ({'name': 'cosine_annealing_lr', 'T_max': 15}, ['T_max=15 goes beyond the 3 steps']),
        ({'name': 'cosine_annealing_lr', 'T_max': 3}, []),
        ({'name': 'cosine_annealing_lr'}, []),
        (
            {**SEQUENCE, 'milestones': [2], 'schedulers': [{'name': 'linear_lr', 'total_iters': 3}, PLAIN]},
            ['LinearLR: total_iters=3 goes beyond the 2 steps that it has in this run, counted by epoch.'],
        ),
        ({'name': 'cosine_with_warmup', 't_warmup': '4ep'}, ['t_warmup=4ep goes beyond the 15 batches of the run']),
        ({'name': 'cosine_with_warmup', 't_warmup': '2ep'}, []),
        ({'name': 'cosine_with_warmup', 't_warmup': '0.5dur'}, []),
    ],
)  # fmt: skip
def test_what_of_a_schedule_the_run_does_not_reach_is_shown_before_it_trains(tmp_path, scheduler, said):
    values = {**RECIPE, 'runs_folder': str(tmp_path / 'runs'), 'scheduler': scheduler}
    remarks = build(schema.Recipe('a.yaml', 'a', values), scratch=tmp_path / 'scratch').remarks
    shown = [remark for remark in remarks if 'goes beyond' in remark]
    assert len(shown) == len(said)
    assert all(part in remark for part, remark in zip(said, shown, strict=True))


class TestFilledIn:
    @staticmethod
    def filled(scheduler: Any, **values: Any) -> Any:
        outline = TestOutline.outline(scheduler, **values)
        [filled] = [each.as_values() for each in outline.scheduled]
        return {key: value for key, value in filled.items() if key not in ('name', 'interval')}

    @pytest.mark.parametrize(
        ('scheduler', 'expected'),
        [
            ({'name': 'one_cycle_lr', 'max_lr': 1}, {'max_lr': 1, 'total_steps': 15}),
            ({'name': 'one_cycle_lr', 'max_lr': 1, 'total_steps': 20}, {'max_lr': 1, 'total_steps': 20}),
            ({'name': 'one_cycle_lr', 'max_lr': 1, 'epochs': 4}, {'max_lr': 1, 'epochs': 4, 'steps_per_epoch': 5}),
            (
                {'name': 'one_cycle_lr', 'max_lr': 1, 'steps_per_epoch': 7},
                {'max_lr': 1, 'epochs': 3, 'steps_per_epoch': 7},
            ),
            (
                {'name': 'one_cycle_lr', 'max_lr': 1, 'epochs': 3, 'interval': 'epoch'},
                {'max_lr': 1, 'epochs': 3, 'steps_per_epoch': 1},
            ),
            ({'name': 'one_cycle_lr', 'max_lr': 1, 'interval': 'epoch'}, {'max_lr': 1, 'total_steps': 3}),
            ({'name': 'cosine_annealing_lr'}, {'T_max': 3}),
            ({'name': 'cosine_annealing_lr', 'T_max': None}, {'T_max': 3}),
            ({'name': 'cosine_annealing_lr', 'interval': 'batch'}, {'T_max': 15}),
            ({'name': 'polynomial_lr', 'total_iters': 2}, {'total_iters': 2}),
            ({'name': 'swalr', 'swa_lr': 1}, {'swa_lr': 1}),
            ({'name': 'cosine'}, {}),
        ],
    )
    def test_only_what_is_left_out(self, scheduler, expected):
        assert self.filled(scheduler) == expected

    def test_each_part_of_a_sequence_to_the_next_milestone(self):
        parts = [{'name': 'linear_lr'}, {'name': 'chained_scheduler', 'schedulers': [{'name': 'cosine_annealing_lr'}]}]
        scheduler = {'name': 'sequential_lr', 'milestones': [4], 'schedulers': parts, 'interval': 'batch'}
        assert self.filled(scheduler) == {
            'milestones': [4],
            'schedulers': [
                {'name': 'linear_lr', 'total_iters': 4},
                {'name': 'chained_scheduler', 'schedulers': [{'name': 'cosine_annealing_lr', 'T_max': 11}]},
            ],
        }

    @pytest.mark.parametrize(
        ('values', 'steps'),
        [
            ({'max_duration': '7ba'}, 7),
            ({'max_duration': 2}, 10),
            ({'train_subset_num_batches': 2}, 6),
            ({'train_subset_num_batches': 9}, 15),
        ],
    )
    def test_from_what_the_run_will_do(self, tmp_path, values, steps):
        scheduler = {'name': 'cosine_annealing_lr', 'interval': 'batch'}
        assert self.filled(scheduler, **values) == {'T_max': steps}
        whole = {**RECIPE, 'runs_folder': str(tmp_path), 'autoresume': False, **values, 'scheduler': scheduler}
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='DataloaderNumBatchesWarning')
            built = build(schema.Recipe('a.yaml', 'a', whole))
            built.trainer.fit()
        built.trainer.close()
        assert int(built.trainer.state.timestamp.batch) == steps
        assert built.trainer.state.schedulers[0].T_max == steps


class TestResume:
    @pytest.mark.parametrize(
        ('scheduler', 'changed', 'key', 'said'),
        [
            ({'name': 'cosine_annealing_lr'}, {'max_duration': '4ep'}, 'scheduler.T_max', 'is 4 in this run and 3 in'),
            (
                {'name': 'step_lr', 'step_size': 2},
                {'scheduler': {'name': 'step_lr', 'step_size': 1}},
                'scheduler.step_size',
                'is 1 in this run and 2 in the checkpoint',
            ),
            (
                SEQUENCE,
                {'max_duration': '5ep'},
                'scheduler.schedulers.1.total_iters',
                'is 3 in this run and 1 in the checkpoint',
            ),
        ],
    )
    def test_with_another_schedule_is_refused_by_key(self, tmp_path, scheduler, changed, key, said):
        values = {**RECIPE, 'runs_folder': str(tmp_path), 'scheduler': scheduler}
        run.train(schema.Recipe('a.yaml', 'a', values), lambda _: None)
        with pytest.raises(RecipeError) as refused:
            build(schema.Recipe('a.yaml', 'a', {**values, **changed}))
        assert refused.value.key == key
        assert said in str(refused.value)

    def test_with_the_schedule_begun_anew_as_the_error_says(self, tmp_path):
        values = {**RECIPE, 'runs_folder': str(tmp_path), 'scheduler': {'name': 'cosine_annealing_lr'}}
        run.train(schema.Recipe('a.yaml', 'a', values), lambda _: None)
        again = {'load_path': str(tmp_path / 'run/checkpoints/latest-rank0.pt'), 'autoresume': False, 'run_name': 'b'}
        values = {**values, **again, 'max_duration': '4ep', 'load_ignore_keys': ['state/schedulers']}
        built = build(schema.Recipe('a.yaml', 'a', values))
        built.trainer.close()
        assert built.trainer.state.schedulers[0].T_max == 4

    @pytest.mark.parametrize('scheduler', [{'name': name, **CASES[name][0]} for name in CASES])
    def test_every_state_is_read_without_executing_anything(self, tmp_path, scheduler):
        values = {**RECIPE, 'runs_folder': str(tmp_path), 'scheduler': scheduler}
        built = build(schema.Recipe('a.yaml', 'a', values), scratch=tmp_path)
        built.trainer.close()
        state = [each.state_dict() for each in built.trainer.state.schedulers]
        torch.save(state, tmp_path / 'state.pt')
        assert torch.load(tmp_path / 'state.pt', weights_only=True) == state

    def test_of_several_with_others_is_refused(self, tmp_path):
        steps = [{'name': 'step_lr', 'step_size': size} for size in (2, 3)]
        values = {**RECIPE, 'runs_folder': str(tmp_path), 'scheduler': steps, 'max_duration': '1ep'}
        run.train(schema.Recipe('a.yaml', 'a', values), lambda _: None)
        values['scheduler'] = [*steps, {'name': 'step_lr', 'step_size': 4}]
        with pytest.raises(RecipeError, match='the checkpoint has the schedulers StepLR, StepLR, and the run has'):
            build(schema.Recipe('a.yaml', 'a', values))
