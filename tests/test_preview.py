"""What a recipe will do is what it does: schedules equal torch's, profiles equal the formula and the average itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from composer.utils import dist
from hypothesis import given
from hypothesis import strategies as st
from recipes import tiny

from composer_ema.averages import HalfLife, Moment
from composer_ema.pictures.curves import read_run
from composer_ema.posthoc.shares import shares
from composer_ema.recipe import registry, schema
from composer_ema.recipe.arguments import RecipeError
from composer_ema.recipe.build import build
from composer_ema.recipe.preview import Preview, Profile, distinct_names, preview
from composer_ema.zoo.dataset import extent

DATASETS = registry.datasets().classes

# 80 samples in 7 batches, 8 of them in the last.
TINY = tiny(seed=3, progress_bar=False, data={'batch_size': 12}, optimizer={'momentum': 0.9})


def recipe(**sections: Any) -> schema.Recipe:
    return schema.Recipe('tiny.yaml', 'tiny', {**TINY, **sections})


def look(**sections: Any) -> Preview:
    return preview(recipe(**sections))


def profile(**ema: Any) -> Profile:
    [found] = look(algorithms={'ema': ema}).profiles
    return found


def test_a_warm_up_limits_the_half_life_at_the_end():
    # 14 batches, the first update after the first of them
    assert profile(half_life='7ba').half_life_share == pytest.approx(0.5)
    assert profile(half_life='7ba', warmup=0.1).half_life_share == pytest.approx(0.1 * 13 / 14)
    assert profile(half_life='1ba', warmup=0.5).half_life_share == pytest.approx(1 / 14)


class TestShares:
    def test_by_hand(self):
        assert shares([1.0, 0.5, 0.5]).tolist() == [0.25, 0.25, 0.5]
        assert shares([1.0, 0.5, 1 / 3]) == pytest.approx([1 / 3] * 3), 'equal averages'
        assert shares([1.0]).tolist() == [1.0]

    @given(st.lists(st.floats(0, 1), max_size=50))
    def test_they_sum_to_one(self, weights):
        found = shares([1.0, *weights])
        assert found.sum() == pytest.approx(1)
        assert found.min() >= 0

    @given(st.lists(st.tuples(st.floats(0, 1), st.floats(-5, 5)), min_size=1, max_size=30))
    def test_an_average_is_the_sum_of_its_steps_times_their_shares(self, steps):
        weights = [1.0, *(weight for weight, _ in steps[1:])]
        average = 0.0
        for weight, (_, value) in zip(weights, steps, strict=True):
            average += weight * (value - average)
        assert np.dot(shares(weights), [value for _, value in steps]) == pytest.approx(average, abs=1e-9)


class TestProfile:
    def test_a_half_life_in_batches_is_the_formula(self):
        found = profile(half_life='3ba')
        weight = 1 - 2 ** (-1 / 3)
        expected = [(1 - weight) ** 13, *(weight * (1 - weight) ** (14 - n) for n in range(2, 15))]
        assert found.batch.tolist() == list(range(1, 15))
        assert found.share == pytest.approx(expected, rel=1e-9)
        assert found.half_life_share == pytest.approx(3 / 14)
        assert found.settings == 'half_life=3ba'

    @pytest.mark.parametrize(
        ('ema', 'batches', 'elapsed', 'half_life', 'share'),
        [
            ({'half_life': '1ep', 'update_interval': '1ba'}, range(1, 15), [1 / 7] * 14, 1, 0.5),
            ({'half_life': '40sp'}, range(1, 15), ([12] * 6 + [8]) * 2, 40, 40 / 160),
            ({'half_life': '0.25dur', 'update_interval': '3ba'}, [1, 3, 6, 9, 12], [0, 2 / 7] + [3 / 7] * 3, 0.5, 0.25),
            ({'half_life': '2ba', 'ema_start': '1ep'}, range(7, 15), [1] * 8, 2, 2 / 14),
            ({'half_life': '1ep', 'update_interval': '1ep'}, [7, 14], [1, 1], 1, 0.5),
        ],
    )
    def test_units_starts_and_intervals(self, ema, batches, elapsed, half_life, share):
        found = profile(**ema)
        assert found.batch.tolist() == list(batches)
        weights = [1.0, *(HalfLife(half_life).weight(Moment(each, each, 1)) for each in elapsed[1:])]
        assert found.share == pytest.approx(shares(weights), rel=1e-9)
        assert found.half_life_share == pytest.approx(share)

    def test_smoothing_has_no_half_life(self):
        found = profile(smoothing=0.5)
        assert found.share[-3:] == pytest.approx([0.125, 0.25, 0.5])
        assert found.half_life_share is None

    def test_what_concerns_tensors_changes_nothing(self):
        options = {'include': 'weight', 'shadow_dtype': 'bfloat16', 'rounding': 'stochastic', 'log_interval': '1ba'}
        assert profile(half_life='3ba', **options).share.tolist() == profile(half_life='3ba').share.tolist()

    def test_snapshots_change_nothing_and_need_no_folder(self):
        plain, kept = profile(half_life='20ba'), profile(half_life='20ba', snapshots='10ba')
        assert kept.share.tolist() == plain.share.tolist()
        assert kept.settings == plain.settings

    def test_equal_averages_are_equal(self):
        [found] = look(algorithms={'swa': {'swa_start': '1ep', 'update_interval': '2ba'}}).profiles
        assert found.name == 'swa'
        assert found.batch.tolist() == [7, 9, 11, 13]
        assert found.share == pytest.approx([1 / 4] * 4)
        assert found.effective_steps == pytest.approx(4)
        assert found.half_life_share is None

    def test_effective_steps_by_hand(self):
        equal = Profile('swa', np.arange(1.0, 9), np.full(8, 1 / 8), 10, '')
        assert equal.effective_steps == pytest.approx(8)
        assert Profile('ema', np.array([1.0, 2]), np.array([0.5, 0.5]), 2, '').effective_steps == 2
        long = Profile('ema', np.arange(1.0, 4001), shares([1.0, *[HalfLife(50).weight_at(1)] * 3999]), 4000, '')
        assert long.effective_steps == pytest.approx(2 * 50 / math.log(2), rel=0.01)

    def test_newest_half_by_hand(self):
        assert Profile('ema', np.array([2.0, 4, 6]), np.array([0.25, 0.25, 0.5]), 6, '').newest_half == 1
        assert Profile('ema', np.array([2.0, 4, 6]), np.array([0.5, 0.25, 0.25]), 7, '').newest_half == 4
        assert profile(half_life='3ba').newest_half == 3

    def test_a_start_after_the_end_keeps_no_average(self):
        with pytest.warns(UserWarning, match='no average will be kept'):
            assert look(algorithms={'ema': {'ema_start': '99ba', 'half_life': '3ba'}}).profiles == []

    def test_the_run_itself_ends_with_this_average(self, tmp_path):
        """Each step's weights times its share are the average that training leaves."""
        arguments = {'half_life': '30sp', 'update_interval': '2ba', 'ema_start': '3ba'}
        sections = {'algorithms': {'ema': arguments}, 'runs_folder': str(tmp_path), 'save_interval': '1ba'}
        run = build(recipe(**sections))
        run.trainer.fit()
        files = (run.folder / 'checkpoints').glob('ep*.pt')
        states = [torch.load(path, weights_only=False)['state'] for path in files]
        name = next(name for name in states[0]['model'] if name.endswith('weight'))
        by_batch = {int(state['timestamp']['Timestamp']['batch']): state['model'][name].double() for state in states}
        found = preview(recipe(**sections)).profiles[0]
        expected = sum(share * by_batch[int(batch)] for batch, share in zip(found.batch, found.share, strict=True))
        average = dict(run.trainer.state.algorithms[0].ema_model.named_parameters())[name]
        run.trainer.close()
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-7)


class TestSchedule:
    def test_it_equals_torchs(self):
        found = look(scheduler={'name': 'OneCycleLR', 'max_lr': 0.4})
        sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
        one_cycle = torch.optim.lr_scheduler.OneCycleLR(sgd, max_lr=0.4, total_steps=14)
        rates, momenta = [], []
        for step in range(14):
            rates.append(sgd.param_groups[0]['lr'])
            momenta.append(sgd.param_groups[0]['momentum'])
            sgd.step()
            if step < 13:
                one_cycle.step()
        assert found.rates['group 0'].value.tolist() == rates
        assert found.momenta['group 0'].value.tolist() == momenta
        assert found.rates['group 0'].epoch.tolist() == [n / 7 for n in range(1, 15)]

    @pytest.mark.parametrize(
        'scheduler',
        [None, {'name': 'cosine_annealing_with_warmup', 't_warmup': '3ba'}, {'name': 'exponential_lr', 'gamma': 0.5}],
    )
    def test_the_run_itself_records_the_same(self, tmp_path, scheduler):
        sections = {'scheduler': scheduler, 'runs_folder': str(tmp_path)}
        run = build(recipe(**sections))
        run.trainer.fit()
        run.trainer.close()
        recorded, foreseen = read_run(run.folder), preview(recipe(**sections))
        assert foreseen.rates['group 0'].value.tolist() == recorded.rates['group 0'].value.tolist()
        for axis in ('epoch', 'batch', 'sample'):
            assert foreseen.rates['group 0'].over(axis) == pytest.approx(recorded.rates['group 0'].over(axis))

    def test_a_learning_rate_that_swa_anneals_is_drawn_as_the_run_records_it(self, tmp_path):
        swa = {'swa_start': '0.5ep', 'update_interval': '2ba', 'swa_lr': 0.01, 'anneal_length': '1ep'}
        sections = {'algorithms': {'swa': swa}, 'scheduler': {'name': 'exponential_lr', 'gamma': 0.5}}
        sections['runs_folder'] = str(tmp_path)
        run = build(recipe(**sections))
        run.trainer.fit()
        run.trainer.close()
        recorded, foreseen = read_run(run.folder), preview(recipe(**sections))
        assert foreseen.rates['group 0'].value.tolist() == recorded.rates['group 0'].value.tolist()
        assert foreseen.rates['group 0'].value[-1] == 0.01
        assert foreseen.rates['group 0'].value[0] == 0.1
        [found] = foreseen.profiles
        assert found.batch.tolist() == [4, 6, 8, 10, 12, 14]
        assert found.share == pytest.approx([1 / 6] * 6)

    def test_a_rate_that_an_algorithm_sets_is_seen_as_the_run_records_it(self, tmp_path):
        swa = {'swa_start': '3ba', 'swa_lr': 0.01, 'anneal_length': '4ba', 'refresh_batchnorm': False}
        sections = {'algorithms': {'swa': swa}, 'runs_folder': str(tmp_path)}
        run = build(recipe(**sections))
        run.trainer.fit()
        run.trainer.close()
        foreseen = preview(recipe(**sections)).rates['group 0'].value
        assert foreseen.tolist() == read_run(run.folder).rates['group 0'].value.tolist()
        assert foreseen[0] == 0.1
        assert foreseen[-1] == pytest.approx(0.01)

    def test_a_schedule_that_watches_a_metric_is_remarked(self):
        scheduler = {'name': 'reduce_lr_on_plateau', 'metric': 'eval_ema/CrossEntropy'}
        found = look(scheduler=scheduler, evaluate=['ema'])
        assert found.remarks == ['ReduceLROnPlateau is drawn as if eval_ema/CrossEntropy always improved']
        assert set(found.rates['group 0'].value) == {0.1}

    def test_the_length_of_an_epoch_can_be_given(self):
        found = preview(recipe(), batches_per_epoch=5)
        assert (found.batches, found.batches_per_epoch) == (10, 5)
        with pytest.raises(RecipeError, match='--batches-per-epoch must be at least 1, got 0'):
            preview(recipe(), batches_per_epoch=0)

    @pytest.mark.parametrize(
        ('sections', 'key'),
        [
            ({'data': {**TINY['data'], 'batch_size': 0}}, 'data.batch_size'),
            ({'max_duration': '100tok'}, 'max_duration'),
            ({'algorithms': {'ema': {'half_life': '3tok'}}}, 'algorithms.ema.half_life'),
            ({'algorithms': {'ema': {'half_life': '3iter'}}}, 'algorithms.ema.half_life'),
        ],
    )
    def test_errors_name_the_key(self, sections, key):
        with pytest.raises(RecipeError) as raised:
            look(**sections)
        assert raised.value.key == key

    def test_no_data_is_read(self, monkeypatch):
        monkeypatch.setattr('composer_ema.zoo.fetch.load_fashion_mnist', lambda root: pytest.fail('it was read'))
        found = look(data={'name': 'fashion_mnist', 'batch_size': 512}, model={'name': 'fashion_cnn'})
        assert (found.batches, found.batches_per_epoch) == (236, 118)


@pytest.mark.parametrize(
    ('name', 'arguments'),
    [
        ('mnist1d', {'num_samples': number, 'batch_size': 7}) for number in (10, 57, 100, 110)
    ]
    + [
        ('mnist1d', {'num_samples': 100, 'batch_size': 9, 'validation_split': 0.33, 'drop_last': True}),
        ('fake', {'size': 10, 'eval_size': 1, 'batch_size': 4, 'image_size': [1, 2, 2]}),
        ('fake', {'size': 10, 'eval_size': 1, 'batch_size': 4, 'image_size': [1, 2, 2], 'drop_last': True}),
    ],
)  # fmt: skip
def test_extent_is_that_of_the_loader(name, arguments):
    found, loader = extent(DATASETS[name], arguments), DATASETS[name](**arguments).train
    assert found is not None
    assert found.samples == len(loader.dataset)  # pyright: ignore[reportArgumentType]
    assert found.batches == len(loader)
    assert sorted(found.samples_of(i) for i in range(found.batches)) == sorted(len(batch[1]) for batch in loader)


@pytest.mark.parametrize('processes', [2, 3])
@pytest.mark.parametrize('size', [6, 7, 11, 12, 13])
@pytest.mark.parametrize('drop_last', [False, True])
def test_extent_is_that_of_the_loader_in_several_processes(monkeypatch, processes, size, drop_last):
    monkeypatch.setattr(dist, 'get_world_size', lambda: processes)
    arguments = {'size': size, 'eval_size': 6, 'batch_size': 6, 'eval_batch_size': 6, 'image_size': [1, 2, 2]}
    for rank in range(processes):
        monkeypatch.setattr(dist, 'get_global_rank', lambda rank=rank: rank)
        found = extent(DATASETS['fake'], {**arguments, 'drop_last': drop_last})
        assert found is not None
        assert found.batches == len(DATASETS['fake'](**arguments, drop_last=drop_last).train)


def test_every_data_set_tells_its_extent():
    of_others = ('image_folder', 'text_file', 'python_docs')
    found = {name: extent(builder, {}) for name, builder in DATASETS.items() if name not in of_others}
    assert {name: each and each.samples for name, each in found.items()} == {
        'fashion_mnist': 60_000, 'cifar10': 50_000, 'mnist1d': 4000, 'fake': 1024,
    }  # fmt: skip
    assert all(each is not None and each.batches > 0 for each in found.values())
    with pytest.raises(ValueError, match='every batch would be dropped'):
        extent(DATASETS['fake'], {'size': 3, 'batch_size': 4, 'drop_last': True})


def test_names_differ_by_what_was_asked():
    a, b = recipe(), schema.Recipe('b.yaml', 'b', {})
    assert distinct_names([a, b], [['~x'], ['x={y: 1}', 'z=2']]) == ['tiny ~x', 'b x={y: 1} z=2']
    assert distinct_names([a, b], [[], []]) == ['tiny', 'b']
    assert distinct_names([a, b], [['x=1', 'run_name=tiny'], []]) == ['tiny', 'b'], 'as the user calls it'
    assert distinct_names([a, a, a], [['x=1'], ['x=2'], ['x=2']]) == ['tiny x=1', 'tiny x=2 (1)', 'tiny x=2 (2)']
