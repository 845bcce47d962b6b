"""Merging checkpoints: the coefficients by hand, the sums to the last bit, and what does not fit refused by name."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plain
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from composer_ema import CheckpointError, Snapshots, export, load_average, merge
from composer_ema.posthoc import coefficients, shares
from composer_ema.posthoc import merge as merging
from composer_ema.posthoc.merge import Merged

FIXTURES = Path(__file__).parent / 'fixtures'

pytestmark = plain.STRICT


def save(folder: Path, *states: Mapping[str, Any]) -> list[Path]:
    """State dicts as files ``0.pt``, ``1.pt``, ..."""
    paths = [folder / f'{i}.pt' for i in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        torch.save(dict(state), path)
    return paths


def scalars(folder: Path, *values: float, batches: Sequence[int] | None = None) -> list[Path]:
    paths = []
    for i, value in enumerate(values):
        batch = i if batches is None else batches[i]
        paths.append(plain.composer_checkpoint(folder / f'ba{i}.pt', plain.One(float(value)), batch))
    return paths


def written(out: Path) -> dict[str, Tensor]:
    if out.suffix == '.pt':
        return torch.load(out, weights_only=True)
    return safetensors.torch.load_file(out)


def weight_of(out: Path) -> float:
    return float(written(out)['weight'])


class TestCoefficients:
    def test_equal_ones_give_the_mean(self, tmp_path):
        merged = merge(scalars(tmp_path, 1, 2, 6), tmp_path / 'out.pt', equal=True)
        assert weight_of(tmp_path / 'out.pt') == 3
        assert [part.coefficient for part in merged.parts] == [1 / 3] * 3

    def test_given_ones_follow_their_files_into_the_order_of_training(self, tmp_path):
        early, late = scalars(tmp_path, 10, 20, batches=[3, 5])
        merged = merge([late, early], tmp_path / 'out.pt', weights=[0.2, 0.8])
        assert weight_of(tmp_path / 'out.pt') == np.float32(0.2 * 20 + 0.8 * 10)
        assert [(part.path, part.coefficient) for part in merged.parts] == [(early, 0.8), (late, 0.2)]

    def test_of_a_half_life_are_those_of_the_exponential_average_whose_steps_they_share(self):
        # An average that starts at batch 0 and is updated after each batch has cumulative shares (2^i - 1) / 15 at
        # batches 0 to 4. Means over batches 0, 1 and 2, 3: 1/30 and 1/3.
        assert coefficients.halving([0, 2, 4], 1) == pytest.approx([1 / 30, 3 / 10, 2 / 3], abs=1e-15)

    def test_of_a_half_life_double_with_each_half_life(self):
        found = coefficients.halving(np.arange(0, 800, 100), 100)
        assert found[2:-1] / found[1:-2] == pytest.approx(np.full(5, 2), rel=1e-9)

    def test_of_a_half_life_in_samples_are_those_in_batches_of_that_size(self, tmp_path):
        paths = scalars(tmp_path, 1, 2, 4, 3, batches=[10, 20, 25, 50])
        in_batches = merge(paths, tmp_path / 'a.pt', half_life='10ba')
        in_samples = merge(paths, tmp_path / 'b.pt', half_life='80sp')
        expected = [part.coefficient for part in in_batches.parts]
        assert [part.coefficient for part in in_samples.parts] == pytest.approx(expected, rel=1e-9)

    def test_of_a_share_of_the_run_are_measured_on_the_newest_checkpoint(self, tmp_path):
        paths = scalars(tmp_path, 1, 2, 4, batches=[10, 20, 40])
        share, batches = (merge(paths, tmp_path / f'{h}.pt', half_life=h) for h in ('0.25dur', '10ba'))
        assert [part.coefficient for part in share.parts] == [part.coefficient for part in batches.parts]

    def test_of_a_half_life_in_epochs_are_those_of_an_average_that_is_updated_all_the_time(self, tmp_path):
        paths = scalars(tmp_path, 1, 2, 4)
        merged = merge(paths, tmp_path / 'out.pt', half_life='0.1ep', times=[0.1, 0.2, 0.25])
        expected = coefficients.halving([1000, 2000, 2500], 1000)
        assert [part.coefficient for part in merged.parts] == pytest.approx(expected, abs=1e-3)

    def test_of_checkpoints_closer_together_than_the_moments_leave_none_out(self):
        found = coefficients.decaying([0, 1, 1e9], shares.linear)
        assert found == pytest.approx([0, 0.5, 0.5], abs=1e-6)

    def test_of_an_endless_half_life_are_those_of_a_linear_decay(self):
        times = [3, 7, 8, 20]
        assert coefficients.halving(times, 1e9) == pytest.approx(coefficients.decaying(times, shares.linear), abs=1e-7)

    @given(
        st.lists(st.integers(1, 50), min_size=1, max_size=8),
        st.sampled_from(sorted(shares.SCHEDULES)),
        st.integers(0, 9),
    )
    def test_of_a_schedule_give_what_a_decayed_rate_gives_where_gradients_are_constant_between_checkpoints(
        self, gaps, name, start
    ):
        times = np.cumsum([start, *gaps])
        gradients = np.repeat(np.random.default_rng(0).normal(size=len(gaps)), gaps)
        walked = np.concatenate([[0.0], np.cumsum(-gradients)])  # SGD at the rate of 1
        progress = np.arange(len(gradients)) / len(gradients)
        decayed = np.sum(-gradients * shares.SCHEDULES[name](progress))
        found = coefficients.decaying(times, shares.SCHEDULES[name])
        assert found @ walked[times - start] == pytest.approx(decayed, abs=1e-9)

    @pytest.mark.parametrize('name', sorted(shares.SCHEDULES))
    def test_of_a_schedule_give_the_run_of_sgd_whose_rate_was_decayed(self, tmp_path, name):
        steps, gradient = 12, 0.7

        def run(rate: Any, kept: Sequence[int]) -> list[Path]:
            model = plain.One(2.0)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            scheduler = LambdaLR(optimizer, rate)
            paths = []
            for step in range(steps + 1):
                if step in kept:
                    paths.append(plain.composer_checkpoint(tmp_path / f'{name}-{len(kept)}-{step}.pt', model, step))
                model.weight.grad = torch.tensor([gradient])
                optimizer.step()
                scheduler.step()
            return paths

        constant = run(lambda step: 1.0, kept=(0, 5, 6, 12))
        [decayed] = run(lambda step: float(shares.SCHEDULES[name](np.array(step / steps))), kept=(12,))
        merge(constant, tmp_path / 'out.pt', schedule=name)
        expected = float(torch.load(decayed, weights_only=True)['state']['model']['weight'])
        assert weight_of(tmp_path / 'out.pt') == pytest.approx(expected, abs=1e-6)

    @given(st.lists(st.tuples(st.integers(1, 200), st.floats(1e-3, 1e5)), min_size=1, max_size=9), st.floats(1e-3, 1e6))
    def test_sum_to_1_and_are_not_negative_over_any_times_and_batches(self, gaps, half_life):
        batches, times = np.cumsum([(0, 0), *gaps], axis=0).T
        rules = [coefficients.halving(times, half_life, batches)]
        rules += [coefficients.decaying(batches, schedule) for schedule in shares.SCHEDULES.values()]
        for found in rules:
            assert math.isclose(found.sum(), 1, rel_tol=1e-12)
            assert (found >= -1e-12).all()

    def test_of_more_batches_than_are_looked_at_one_by_one_are_nearly_the_same(self, monkeypatch):
        times = [0, 30_000, 100_000]
        expected = coefficients.decaying(times, shares.one_minus_sqrt)
        monkeypatch.setattr(coefficients, '_MOST_MOMENTS', 20_000)
        assert coefficients.decaying(times, shares.one_minus_sqrt) == pytest.approx(expected, abs=1e-4)


class Counting(plain.One):
    """Keeps a whole number, and more besides tensors."""

    def __init__(self, count: int) -> None:
        super().__init__(float(count))
        self.count: Tensor
        self.register_buffer('count', torch.tensor(count))

    def get_extra_state(self) -> dict[str, int]:
        return {'count': int(self.count)}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


class TestSums:
    def test_are_those_of_float64_rounded_once(self, tmp_path):
        generator = torch.Generator().manual_seed(0)
        states = [{'a': torch.randn(300, generator=generator) * 10.0 ** (4 - i % 3)} for i in range(40)]
        weights = np.random.default_rng(1).normal(size=40)
        weights /= math.fsum(weights)
        weights[-1] += 1 - math.fsum(weights)
        merge(save(tmp_path, *states), tmp_path / 'out.pt', weights=weights.tolist())
        products = np.stack([w * state['a'].double().numpy() for w, state in zip(weights, states, strict=True)])
        exact = [math.fsum(column) for column in products.T]
        assert written(tmp_path / 'out.pt')['a'].tolist() == np.array(exact, np.float32).tolist()

    def test_copy_whole_numbers_and_extra_state_from_the_newest_by_training_time(self, tmp_path):
        paths = []
        for batch in (9, 4):
            model = Counting(batch)
            paths.append(plain.composer_checkpoint(tmp_path / f'{batch}.pt', model, batch))
        merge(paths, tmp_path / 'out.pt', equal=True)
        found = written(tmp_path / 'out.pt')
        assert int(found['count']) == 9
        assert found['_extra_state'] == {'count': 9}
        assert found['weight'].tolist() == [6.5]

    def test_have_the_newest_last_as_given_where_files_tell_no_time(self, tmp_path):
        paths = save(tmp_path, *({'n': torch.tensor(i), 'a': torch.zeros(1)} for i in range(3)))
        merge([paths[1], paths[2], paths[0]], tmp_path / 'out.pt', equal=True)
        assert int(written(tmp_path / 'out.pt')['n']) == 0

    @pytest.mark.parametrize(
        ('dtype', 'expected'),
        [
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
            (torch.complex64, torch.complex64),
        ],
    )
    def test_have_at_least_32_bits(self, tmp_path, dtype, expected):
        states = [{'a': torch.tensor([1.0, 2.0 + i], dtype=dtype)} for i in range(2)]
        merge(save(tmp_path, *states), tmp_path / 'out.pt', equal=True)
        found = written(tmp_path / 'out.pt')['a']
        assert (found.dtype, found.tolist()) == (expected, [1, 2.5])

    def test_leave_out_what_has_no_share_even_where_it_is_infinite(self, tmp_path):
        paths = save(tmp_path, {'a': torch.tensor([math.inf])}, {'a': torch.ones(1)})
        merge(paths, tmp_path / 'out.pt', weights=[0, 1])
        assert written(tmp_path / 'out.pt')['a'].tolist() == [1]

    def test_keep_what_is_infinite_in_all_files(self, tmp_path):
        paths = []
        for step, (one, other) in enumerate([(1.0, 5.0), (2.0, -math.inf), (4.0, 7.0)], start=1):
            state = {'model': {'weight': torch.tensor([one, -math.inf, other])}, 'global_step': step}
            torch.save(state, tmp_path / f'{step}.pt')
            paths.append(tmp_path / f'{step}.pt')
        merge(paths, tmp_path / 'out.pt', weights=[-1, 0.5, 1.5])
        assert written(tmp_path / 'out.pt')['weight'].tolist() == [6.0, -math.inf, -math.inf]

    def test_keep_running_variances_above_zero_and_say_so(self, tmp_path):
        states = [
            {'norm.running_mean': torch.ones(2), 'norm.running_var': torch.tensor(variance)}
            for variance in ([4.0, 1.0], [1.0, 3.0])
        ]
        with pytest.warns(UserWarning, match=r'running variances below zero: norm\.running_var.*update_bn'):
            merged = merge(save(tmp_path, *states), tmp_path / 'out.pt', weights=[-0.5, 1.5])
        assert written(tmp_path / 'out.pt')['norm.running_var'].tolist() == [1, 4]
        assert merged.batchnorm == ('norm',)

    @pytest.mark.skipif(not os.access('/proc/self/clear_refs', os.W_OK), reason='needs the peak of /proc')
    @pytest.mark.parametrize('suffix', ['.pt', '.safetensors'])
    def test_take_the_memory_of_one_model_however_many_there_are(self, tmp_path, monkeypatch, suffix):
        monkeypatch.setattr(merging, '_AT_ONCE', 2**20)
        size, model = 2**20, {f'{i}.weight': torch.ones(2**18) for i in range(16)}
        paths = [tmp_path / f'{i}{suffix}' for i in range(5)]
        for path in paths:
            torch.save(model, path) if suffix == '.pt' else safetensors.torch.save_file(model, path)
        merge(paths, tmp_path / f'first{suffix}', equal=True)  # what the first call allocates for good
        before = peak(reset=True)
        merge(paths, tmp_path / f'out{suffix}', equal=True)
        assert peak() - before < (16 + 24) * size  # the five have 80

    def test_of_checkpoints_that_share_tensors_under_two_names_keep_both(self, tmp_path):
        weight = torch.ones(2)
        paths = save(tmp_path, {'a': weight, 'b': weight}, {'a': 3 * weight, 'b': 3 * weight})
        for out in (tmp_path / 'out.pt', tmp_path / 'out.safetensors'):
            merge(paths, out, equal=True)
            assert {name: tensor.tolist() for name, tensor in written(out).items()} == {'a': [2, 2], 'b': [2, 2]}


def peak(*, reset: bool = False) -> int:
    if reset:
        Path('/proc/self/clear_refs').write_text('5')
    lines = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
    return int(lines['VmRSS' if reset else 'VmHWM'].split()[0]) * 1024


class TestFiles:
    def test_of_averages_are_merged_by_label(self, tmp_path):
        paths = [FIXTURES / f'0.32-single-{name}.pt' for name in ('interval', 'numpy')]
        merge(paths, tmp_path / 'out.pt', weights=[1, 0], average='ema')
        expected = load_average(paths[0])
        found = written(tmp_path / 'out.pt')
        inexact = [name for name, tensor in expected.items() if tensor.is_floating_point()]
        assert plain.same_bits({n: found[n] for n in inexact}, {n: expected[n] for n in inexact})

    def test_of_training_weights_are_merged_where_the_model_slot_holds_the_average(self, tmp_path):
        truth = json.loads((FIXTURES / 'truths.json').read_text())['0.32-single-interval']['training']
        paths = [FIXTURES / f'0.32-single-{name}.pt' for name in ('interval', 'numpy')]
        merge(paths, tmp_path / 'out.pt', weights=[1, 0])
        found = written(tmp_path / 'out.pt')
        torch.testing.assert_close(found['module.0.weight'].tolist(), truth['module.0.weight'], rtol=2e-6, atol=1e-7)

    def test_under_a_key_are_merged(self, tmp_path):
        paths = save(tmp_path, *({'net': {'a': torch.ones(1) * i}, 'teacher': {'a': torch.zeros(1)}} for i in (1, 3)))
        merge(paths, tmp_path / 'out.pt', equal=True, key='net')
        assert written(tmp_path / 'out.pt')['a'].tolist() == [2]

    def test_written_are_read_by_load_average_with_the_facts_of_the_merge(self, tmp_path):
        paths = scalars(tmp_path, 1, 3, batches=[5, 10])
        for out in (tmp_path / 'out.safetensors', tmp_path / 'out.pt'):
            merged = merge(paths, out, equal=True)
            assert load_average(out)['weight'].tolist() == [2]
            facts = export(out, tmp_path / 'again.pt')
            assert facts['weights'] == 'merge of 2 checkpoints'
            assert json.loads(merged.metadata['coefficients']) == [0.5, 0.5]
            assert json.loads(merged.metadata['checkpoints']) == ['ba0.pt', 'ba1.pt']
            assert (merged.metadata['run_name'], merged.metadata['trained_batch']) == ('a-run', '10')

    def test_that_are_merges_can_be_merged_by_their_training_time(self, tmp_path):
        first, second, third = scalars(tmp_path, 1, 3, 9, batches=[5, 10, 20])
        merge([first, second], tmp_path / 'first.safetensors', equal=True)
        with pytest.warns(UserWarning, match=r'hold averages alone.*merge of 2 checkpoints'):
            merged = merge([third, tmp_path / 'first.safetensors'], tmp_path / 'out.pt', schedule='linear')
        assert [part.trained['ba'] for part in merged.parts] == [10, 20]

    def test_without_a_clock_take_the_times_that_are_given(self, tmp_path):
        paths = save(tmp_path, *({'a': torch.ones(1) * i} for i in (1, 2, 4)))
        with pytest.raises(CheckpointError, match=r'counts the training time in batches, which .*0\.pt.*--times'):
            merge(paths, tmp_path / 'out.pt', half_life='2ba')
        merged = merge(paths, tmp_path / 'out.pt', half_life='1ba', times=[0, 4, 2])
        assert [part.coefficient for part in merged.parts] == pytest.approx([1 / 30, 3 / 10, 2 / 3])
        assert [part.path for part in merged.parts] == [paths[0], paths[2], paths[1]]

    def test_of_several_runs_are_merged_with_a_warning(self, tmp_path):
        paths = [plain.composer_checkpoint(tmp_path / f'{run}.pt', plain.One(1.0), 5, run) for run in ('one', 'two')]
        with pytest.warns(UserWarning, match='of 2 runs, one, two'):
            merge(paths, tmp_path / 'out.pt', equal=True)

    def test_given_twice_through_a_link_count_once(self, tmp_path):
        paths = scalars(tmp_path, 1, 3)
        (tmp_path / 'latest.pt').symlink_to(paths[-1])
        with pytest.warns(UserWarning, match=r'counts once: .*latest\.pt is .*ba1\.pt'):
            merge([*paths, tmp_path / 'latest.pt'], tmp_path / 'out.pt', equal=True)
        assert weight_of(tmp_path / 'out.pt') == 2
        with pytest.raises(CheckpointError, match=r'latest\.pt is .*ba1\.pt\. Leave it out'):
            merge([*paths, tmp_path / 'latest.pt'], tmp_path / 'out2.pt', weights=[0.2, 0.3, 0.5])


class TestRefusals:
    """Nothing is written."""

    @pytest.fixture(autouse=True)
    def _no_file_is_written(self, tmp_path):
        yield
        assert not list(tmp_path.glob('*out*'))

    def test_of_other_names_shapes_and_dtypes_list_all_of_them(self, tmp_path):
        odd = {'b': torch.ones(3), 'c': torch.ones(2, dtype=torch.float64), 'd': torch.ones(1)}
        paths = save(tmp_path, odd, {'a': torch.ones(2), 'b': torch.ones(2), 'c': torch.ones(2)})
        with pytest.raises(CheckpointError) as caught:
            merge(paths, tmp_path / 'out.pt', equal=True)
        message = str(caught.value)
        assert '1 missing: a' in message
        assert '1 unexpected: d' in message
        assert 'b ((3,) float32, not (2,) float32), c ((2,) float64, not (2,) float32)' in message

    def test_of_a_checkpoint_as_the_file_to_write_through_any_link(self, tmp_path):
        paths = scalars(tmp_path, 1, 3)
        content = paths[0].read_bytes()
        (tmp_path / 'soft').symlink_to(paths[0])
        (tmp_path / 'hard').hardlink_to(paths[0])
        for out in (paths[0], tmp_path / 'soft', tmp_path / 'hard', tmp_path / 'x' / '..' / paths[0].name):
            (tmp_path / 'x').mkdir(exist_ok=True)
            with pytest.raises(CheckpointError, match='is the checkpoint itself'):
                merge(paths, out, equal=True, overwrite=True)
        assert paths[0].read_bytes() == content

    def test_of_a_file_that_exists_until_told_to_replace_it(self, tmp_path):
        paths = scalars(tmp_path, 1, 3, 5)
        with pytest.raises(CheckpointError, match=r'ba2\.pt exists.*overwrite'):
            merge(paths[:2], paths[2], equal=True)
        merge(paths[:2], paths[2], equal=True, overwrite=True)
        assert weight_of(paths[2]) == 2

    @pytest.mark.parametrize(
        ('arguments', 'message'),
        [
            ({}, 'got none of them'),
            ({'equal': True, 'schedule': 'linear'}, 'got schedule and equal'),
            ({'schedule': 'cosin'}, r"got 'cosin'\. Did you mean 'cosine'\?"),
            ({'half_life': '3iter'}, 'half_life takes the units ba'),
            ({'half_life': '0ba'}, 'must be above zero'),
            ({'weights': [0.5]}, 'got 1 for 2 checkpoints'),
            ({'weights': [1, 3]}, r'sum to 1, got .*Divided by their sum they are 0\.25,0\.75'),
            ({'weights': [math.nan, 1]}, 'must be finite'),
            ({'schedule': 'linear', 'times': [1]}, 'times must be one number for each checkpoint'),
            ({'schedule': 'linear', 'times': [1, math.inf]}, 'times must be finite'),
            ({'schedule': 'linear', 'times': [3, 3]}, 'were both taken at batch 3'),
            ({'half_life': '9tok'}, 'were both taken at token 0'),
        ],
    )
    def test_of_arguments_say_the_rule_and_the_remedy(self, tmp_path, arguments, message):
        with pytest.raises(ValueError, match=message):
            merge(scalars(tmp_path, 1, 3), tmp_path / 'out.pt', **arguments)

    def test_of_a_single_checkpoint_and_of_a_single_path(self, tmp_path):
        [path] = scalars(tmp_path, 1)
        with pytest.raises(ValueError, match='two or more checkpoints, got 1'):
            merge([path], tmp_path / 'out.pt', equal=True)
        with pytest.raises(CheckpointError, match=r'two or more checkpoints, but .* comes twice'):
            merge([path, path], tmp_path / 'out.pt', equal=True)
        with pytest.raises(TypeError, match='must be a list of files'):
            merge(str(path), tmp_path / 'out.pt', equal=True)

    def test_of_a_file_that_would_run_code(self, tmp_path):
        plain.write_code(tmp_path / 'code.pt', tmp_path / 'ran')
        with pytest.raises(CheckpointError):
            merge([*scalars(tmp_path, 1), tmp_path / 'code.pt'], tmp_path / 'out.pt', equal=True)
        assert not (tmp_path / 'ran').exists()

    def test_of_a_snapshot_that_may_hold_differences(self, tmp_path):
        snapshots = Snapshots(plain.One(1.0), tmp_path / 'run', every=1)
        for _ in range(3):
            snapshots.update()
        files = sorted((tmp_path / 'run').glob('averages*'))
        assert len(files) == 2
        with pytest.raises(CheckpointError, match=r'is a snapshot.*composer-ema reconstruct'):
            merge(files, tmp_path / 'out.pt', equal=True)


@pytest.mark.skipif(importlib.util.find_spec('typer') is None, reason='needs the commands')
class TestCommand:
    @pytest.fixture
    def run(self, tmp_path, monkeypatch):
        from typer.testing import CliRunner

        from composer_ema.cli import app

        monkeypatch.chdir(tmp_path)
        return lambda *arguments: CliRunner().invoke(app, ['merge', *map(str, arguments)])

    def test_prints_the_coefficients_in_a_table_and_offers_the_refresh(self, run, tmp_path):
        for batch in (5, 10):
            plain.composer_checkpoint(tmp_path / f'ba{batch}.pt', plain.Net(batch), batch)
        result = run('ba5.pt', 'ba10.pt', 'out.safetensors', '--weights', '0.25,0.75')
        assert result.exit_code == 0, result.output
        rows = [[cell.strip() for cell in line.split('│')[1:-1]] for line in result.output.splitlines() if '│' in line]
        assert rows == [['ba5.pt', '5', '1', '40', '0.250000'], ['ba10.pt', '10', '2', '80', '0.750000']]
        assert 'BatchNorm layer (norm)' in result.output
        assert 'update_bn' in result.output
        assert (tmp_path / 'out.safetensors').exists()

    def test_takes_every_argument_and_turns_errors_into_one_line(self, run, tmp_path):
        for i in range(2):
            torch.save({'net': {'a': torch.ones(1) * i}}, tmp_path / f'{i}.pt')
        given = ['--key', 'net', '--times', '1,2', '--half-life', '1ba']
        assert run('0.pt', '1.pt', 'out.pt', *given).exit_code == 0
        assert run('0.pt', '1.pt', 'out.pt', *given).exit_code == 2
        assert run('0.pt', '1.pt', 'out.pt', *given, '--overwrite').exit_code == 0
        for wrong in (['--equal', '--schedule', 'linear'], ['--weights', 'a'], ['--schedule', 'x']):
            assert run('0.pt', '1.pt', 'b.pt', *wrong).exit_code == 2


def test_the_parts_of_a_merge_are_what_was_asked_for(tmp_path):
    merged = merge(scalars(tmp_path, 1, 3), tmp_path / 'out.pt', equal=True)
    assert isinstance(merged, Merged)
    assert (merged.out, merged.weights, merged.batchnorm) == (tmp_path / 'out.pt', 'equal', ())


def test_one_tensor_larger_than_a_group_and_many_small_ones_are_all_merged(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, '_AT_ONCE', 16)
    state = {f'{i}': torch.full((size,), float(i)) for i, size in enumerate((1, 2, 30, 1, 1, 1, 1, 1, 0))}
    merge(save(tmp_path, state, state), tmp_path / 'out.pt', equal=True)
    assert plain.same_bits(written(tmp_path / 'out.pt'), state)
