"""Averages made after the run from what it kept: right, predicted, refused where they would be wrong."""

import dataclasses
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import composer_ema
from composer_ema import CheckpointError, Snapshots, load_average, reconstruct
from composer_ema.averages import Power
from composer_ema.checkpoints.inspection import describe
from composer_ema.posthoc import shares
from composer_ema.posthoc.moments import History, KeptAverage
from composer_ema.posthoc.open_run import OpenRun
from composer_ema.posthoc.reconstruct import ReconstructionError
from composer_ema.spans import ArgumentError

MOMENTS = 400
BATCHES = 5.0 * np.arange(1, MOMENTS + 1)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def by_power(sigma: float) -> np.ndarray:
    return shares.weights_of(shares.power(BATCHES, Power(sigma).gamma))


FLOATING = ('0.weight', '0.bias', '1.weight', '1.bias', '2.weight', '2.bias')


class Walk:
    """A run whose weights walk at random, and what it kept of averages whose updates had given weights.

    Args:
        kept: label to the weights of the updates; ``'weights'`` for the weights themselves.
        moments: at which they are kept, counted from 1, by label.
        rounded: as the tensors in the files are.
        bits: of the differences to the last weights that the files keep. Default: files keep the values.
    """

    def __init__(
        self,
        kept: Mapping[str, np.ndarray],
        moments: Mapping[str, list[int]],
        seed: int = 0,
        rounded: torch.dtype = torch.float32,
        bits: int | None = None,
    ) -> None:
        generator = np.random.default_rng(seed)
        model = network()
        self.states = {
            name: (0.02 * generator.standard_normal((MOMENTS, tensor.numel()))).cumsum(0) + tensor.flatten().numpy()
            for name, tensor in model.state_dict().items()
        }
        self.states['1.running_var'] = 1 + 0.1 * abs(self.states['1.running_var'])
        self.states['1.num_batches_tracked'] = BATCHES[:, None]
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.rounded, self.bits, self.was_read = rounded, bits, []
        self._made: dict[tuple[str, Path], np.ndarray] = {}
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most_alive = 0
        pairs = sorted((moment, label) for label in kept for moment in moments[label])
        self.kept = [self._keep(label, kept[label][:moment], moment) for moment, label in pairs]

    def average(self, name: str, weights: np.ndarray) -> np.ndarray:
        return shares.shares(weights) @ self.states[name][: len(weights)]

    def _keep(self, label: str, weights: np.ndarray, moment: int) -> KeptAverage:
        path = Path(f'{label}-{moment}.safetensors')

        def tensor(name: str) -> Tensor:
            self.was_read.append(name)
            if name == '1.num_batches_tracked':
                return torch.tensor(int(BATCHES[moment - 1]))
            if (name, path) not in self._made:
                self._made[name, path] = self._written(name, weights)
            found = torch.tensor(self._made[name, path]).to(self.rounded).reshape(self.shapes[name])
            self.alive.add(found)
            self.most_alive = max(self.most_alive, len(self.alive))
            return found

        def rounding() -> float:
            pairs = [(self._written(name, weights), self.average(name, weights)) for name in FLOATING]
            return float(np.mean(np.concatenate([(one - other) ** 2 for one, other in pairs])))

        clock = {'ba': BATCHES[moment - 1]}
        return KeptAverage(label, weights, path, clock, lambda: list(self.shapes), tensor, rounding)

    def _written(self, name: str, weights: np.ndarray) -> np.ndarray:
        average, last = self.average(name, weights), self.states[name][-1]
        if self.bits is None:
            return average
        unit = 2.0 ** (np.floor(np.log2(np.maximum(abs(average - last), 1e-30))) - self.bits)
        return last + np.round((average - last) / unit) * unit

    def history(self, **changes) -> History:
        newest = self.kept[-1]
        arguments = {
            'folder': Path('runs/walk'),
            'run_name': 'walk',
            'run_id': 'abc',
            'clocks': {'ba': BATCHES, 'ep': BATCHES / 100, 'sp': 8 * BATCHES, 'tok': 0 * BATCHES},
            'kept': self.kept,
            'max_duration': '20ep',
            'is_finished': True,
            'aliases': {},
            'statistics': frozenset({'1.running_mean', '1.running_var'}),
            'newest': {name: lambda name=name: newest.tensor(name) for name in self.shapes},
            'left_out': ['old.safetensors belongs to another run.'],
        }
        return History(**{**arguments, **changes})


EVENLY = list(range(25, MOMENTS + 1, 25))
ENDS = [1, MOMENTS]


def sixteen_of_two(**arguments) -> Walk:
    """Sixteen snapshots of two power averages, and the first and the last weights."""
    return Walk(
        {'short': by_power(0.05), 'long': by_power(0.1), 'weights': np.ones(MOMENTS)},
        {'short': EVENLY, 'long': EVENLY, 'weights': ENDS},
        **arguments,
    )


@pytest.fixture(scope='module')
def walk() -> Walk:
    """A walk that all tests share, which only read it."""
    return sixteen_of_two()


def error_of(found: composer_ema.posthoc.reconstruct.Reconstruction, walk: Walk, weights: np.ndarray) -> float:
    """The distance from the true average, relative to the distance of that from the last weights."""
    true = [walk.average(name, weights) for name in FLOATING]
    made = [found.state_dict[name].double().numpy().ravel() for name in FLOATING]
    last = [walk.states[name][len(weights) - 1] for name in FLOATING]
    error, move = (np.concatenate([a - b for a, b in zip(x, true, strict=True)]) for x in (made, last))
    return float(np.linalg.norm(error) / np.linalg.norm(move))


def by_half_life(batches: float) -> np.ndarray:
    return shares.weights_of(shares.exponential(BATCHES, batches))


WANTED = {
    'half_life=0.05dur': by_half_life(100),
    'half_life=200ba': by_half_life(200),
    'half_life=6ep': by_half_life(600),
    'power=0.15': by_power(0.15),
    'power=0.25': by_power(0.25),
    'equal=0.5dur': shares.weights_of(shares.latest(BATCHES, 1000)),
    'schedule=cosine': shares.weights_of(shares.decayed(BATCHES, shares.cosine, 2000)),
}


@pytest.mark.parametrize('target', WANTED)
def test_a_reconstruction_is_as_good_as_it_predicts(walk, target):
    name, value = target.split('=')
    found = reconstruct(walk.history(), **{name: float(value) if name == 'power' else value})
    error = error_of(found, walk, WANTED[target])
    assert error < 0.03
    assert found.predicted_error / 3 < error < 3 * found.predicted_error
    assert sum(part.coefficient for part in found.parts) == pytest.approx(1, abs=1e-9)


def test_what_was_kept_comes_back(walk):
    found = reconstruct(walk.history(), power=0.1)
    for name in ('0.weight', '2.bias'):
        np.testing.assert_allclose(
            found.state_dict[name].numpy().ravel(), walk.average(name, by_power(0.1)), rtol=1e-5, atol=1e-6
        )
    assert found.predicted_error < 1e-3
    assert {part.label for part in found.parts if abs(part.coefficient) > 0.5} == {'long'}


def test_an_earlier_moment_uses_nothing_that_is_later(walk):
    found = reconstruct(walk.history(), power=0.1, at='1000ba')
    np.testing.assert_allclose(
        found.state_dict['0.weight'].numpy().ravel(), walk.average('0.weight', by_power(0.1)[:200]), atol=1e-5
    )
    assert max(part.batch for part in found.parts) == 1000
    assert (found.clock['ba'], found.clock['ep'], found.num_updates) == (1000, 10, 200)


class TestRefusals:
    def test_what_would_be_far_off_is_refused_before_any_weight_is_read(self, walk):
        with pytest.raises(ReconstructionError, match=r'half_life=0.002dur cannot be made well from the 34 files') as e:
            reconstruct(walk.history(), half_life='0.002dur')
        assert 'nearest half-life that can be made is 0.0' in str(e.value)
        assert 'Keep more snapshots' in str(e.value)
        assert 'anyway=True (--anyway)' in str(e.value)
        nearest = str(e.value).split('can be made is ')[1].split('. Keep')[0]
        assert reconstruct(walk.history(), half_life=nearest).predicted_error < 0.05

    def test_it_is_made_anyway_when_told_to(self, walk):
        found = reconstruct(walk.history(), half_life='0.002dur', anyway=True)
        assert found.predicted_error > 0.05
        assert error_of(found, walk, by_half_life(4)) > 0.05

    def test_a_moment_between_those_kept_is_refused_with_the_nearest(self, walk):
        with pytest.raises(ReconstructionError, match="Nothing was kept at that moment; pass at='1000ba'"):
            reconstruct(walk.history(), half_life='0.05dur', at='1060ba')
        assert reconstruct(walk.history(), half_life='0.05dur', at='1000ba').predicted_error < 0.05

    def test_checkpoints_alone_are_told_what_would_help(self):
        walk = Walk({'weights': np.ones(MOMENTS)}, {'weights': EVENLY})
        with pytest.raises(ReconstructionError, match=r"EMA\(snapshots='0.05dur'\)"):
            reconstruct(walk.history(run_id=None), half_life='0.1dur')
        assert reconstruct(walk.history(run_id=None), half_life='0.1dur', anyway=True).predicted_error > 0.05

    def test_a_file_that_does_not_belong_to_the_others_is_named(self, walk):
        stale = Walk({'long': by_power(0.1)}, {'long': [300]}, seed=1).kept[0]
        mixed = [stale if each.path == stale.path else each for each in walk.kept]
        assert reconstruct(walk.history(), power=0.25).predicted_error < 0.01
        with pytest.raises(ReconstructionError, match=r'long-300\.safetensors fits the others so badly') as error:
            reconstruct(walk.history(kept=mixed), power=0.25)
        assert 'Move it out of the folder' in str(error.value)

    def test_shapes_that_differ_name_the_file(self, walk):
        odd = walk.kept[3]
        cut = KeptAverage(odd.label, odd.weights, odd.path, odd.clock, odd.names, lambda name: torch.zeros(2, 2))
        run = OpenRun(walk.history(kept=[*walk.kept[:3], cut, *walk.kept[4:]]))
        with pytest.raises(CheckpointError, match=r'0.weight has the shape \(2, 2\) in .*they are of different models'):
            run.tensor('0.weight', np.ones(len(run.kept)))

    def test_before_anything_was_kept_there_is_nothing(self):
        walk = Walk({'short': by_power(0.05)}, {'short': EVENLY})
        with pytest.raises(CheckpointError, match='holds nothing from before batch 125'):
            reconstruct(walk.history(), power=0.1, at='100ba')

    def test_one_average_is_asked_for(self, walk):
        with pytest.raises(ArgumentError, match='exactly one of'):
            reconstruct(walk.history(), power=0.1, gamma=3)


class TestWholeStates:
    def test_whole_numbers_are_the_newest(self, walk):
        assert reconstruct(walk.history(), power=0.2).state_dict['1.num_batches_tracked'].item() == 2000

    def test_a_running_variance_stays_above_the_smallest_that_was_kept(self, walk):
        run = OpenRun(walk.history())
        variances = [each.tensor('1.running_var') for each in run.kept]
        coefficients = np.zeros(len(run.kept))
        coefficients[3], coefficients[-1] = -20.0, 21.0
        below = 21.0 * variances[-1] - 20.0 * variances[3] < torch.minimum(variances[-1], variances[3])
        assert below.any()
        found = run.tensor('1.running_var', coefficients)
        assert torch.equal(found[below], torch.minimum(variances[-1], variances[3])[below])

    def test_tensors_that_not_all_files_have_are_the_newest(self, walk):
        late = [KeptAverage(e.label, e.weights, e.path, e.clock, lambda: ['0.weight'], e.tensor) for e in walk.kept[:1]]
        found = reconstruct(walk.history(kept=[*late, *walk.kept[1:]]), power=0.2)
        assert torch.equal(found.state_dict['2.weight'], walk.kept[-1].tensor('2.weight'))
        assert not torch.equal(found.state_dict['0.weight'], walk.kept[-1].tensor('0.weight'))

    def test_tied_tensors_stand_under_every_name(self, walk):
        found = reconstruct(walk.history(aliases={'head.weight': '0.weight'}), power=0.2)
        assert torch.equal(found.state_dict['head.weight'], found.state_dict['0.weight'])

    def test_what_was_left_out_is_said(self, walk):
        assert reconstruct(walk.history(), power=0.2).left_out == ('old.safetensors belongs to another run.',)

    def test_only_a_few_tensors_are_in_memory_at_once(self, walk):
        run = OpenRun(walk.history())
        combination = run.combine(composer_ema.posthoc.target.choose(power=0.2))
        walk.most_alive = 0
        run.state_dict(combination)
        assert walk.most_alive <= 4  # of 34 files with 7 tensors each

    def test_files_are_looked_at_once_for_many_averages(self, walk):
        run = OpenRun(walk.history())
        reconstruct(run, power=0.2)
        walk.was_read.clear()
        reconstruct(run, power=0.15)
        assert walk.was_read.count('0.weight') <= len(run.kept)


class TestIntoModels:
    def test_it_loads_into_the_model_and_into_the_bare_network(self, walk):
        found = reconstruct(walk.history(), power=0.2)
        model = network(seed=1)
        found.load_into(model)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, found.state_dict[name])
        wrapped = nn.ModuleDict({'module': network(seed=1)})
        found.load_into(wrapped)
        assert torch.equal(wrapped['module'][0].weight, model[0].weight)

    def test_a_model_keeps_its_dtypes(self, walk):
        model = network().bfloat16()
        found = reconstruct(walk.history(), power=0.2)
        found.load_into(model)
        assert torch.equal(model[0].weight, found.state_dict['0.weight'].bfloat16())

    def test_another_model_is_refused_and_unchanged(self, walk):
        model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 3))
        before = model[0].weight.clone()
        with pytest.raises(ValueError, match=r'0\.weight'):
            reconstruct(walk.history(), power=0.2).load_into(model)
        assert torch.equal(model[0].weight, before)

    def test_a_model_that_holds_another_average_is_left_alone(self, walk):
        model = network()
        shadow = composer_ema.ShadowModel(model)
        with shadow.swapped(model), pytest.raises(RuntimeError, match='average'):
            reconstruct(walk.history(), power=0.2).load_into(model)

    def test_it_goes_on_as_an_average_in_training(self, walk):
        found, model = reconstruct(walk.history(), power=0.2), network(seed=1)
        shadow = found.shadow(model)
        assert shadow.num_updates == MOMENTS
        shadow.update(model, smoothing=0.75)
        averaged = dict(shadow.named_parameters())['0.weight']
        torch.testing.assert_close(averaged, 0.75 * found.state_dict['0.weight'] + 0.25 * model[0].weight)
        assert torch.equal(network(seed=1)[0].weight, model[0].weight)

    def test_a_saved_average_is_read_as_an_export_is(self, walk, tmp_path):
        found, out = reconstruct(walk.history(), power=0.2), tmp_path / 'folder' / 'average.safetensors'
        metadata = found.save(out)
        loaded = load_average(out, network())
        assert all(torch.equal(loaded[key], found.state_dict[key]) for key in network().state_dict())
        assert metadata['weights'] == 'average, reconstructed (power=0.2)'
        assert describe(out).averages[0].algorithm == 'composer-ema reconstruct'
        assert float(metadata['predicted_error']) == pytest.approx(found.predicted_error, rel=0.01)
        found.save(tmp_path / 'average.pt')
        assert torch.equal(torch.load(tmp_path / 'average.pt', weights_only=True)['0.bias'], loaded['0.bias'])
        assert load_average(tmp_path / 'average.pt', network()).keys() == loaded.keys()


def test_rounded_files_keep_the_coefficients_small_and_the_prediction_honest(walk):
    rounded = sixteen_of_two(rounded=torch.bfloat16)
    exact, coarse = (reconstruct(each.history(), half_life='0.02dur', anyway=True) for each in (walk, rounded))
    sizes = [sum(part.coefficient**2 for part in each.parts) for each in (exact, coarse)]
    assert sizes[1] < sizes[0]
    error = error_of(coarse, rounded, by_half_life(40))
    assert coarse.predicted_error / 4 < error < 4 * coarse.predicted_error
    assert coarse.predicted_error > exact.predicted_error


@pytest.mark.parametrize('target', ['power=0.05', 'power=0.1', 'half_life=0.03dur'])
def test_files_of_rounded_differences_are_predicted_to_be_as_good_as_they_are(target):
    name, value = target.split('=')
    walk = sixteen_of_two(bits=6)
    found = reconstruct(walk.history(), **{name: float(value) if name == 'power' else value})
    weights = by_power(float(value)) if name == 'power' else by_half_life(60)
    error = error_of(found, walk, weights)
    assert error > 0.001
    assert found.predicted_error / 2.5 < error < 2.5 * found.predicted_error


def test_rounded_files_close_to_the_end_spoil_no_prediction_and_no_file_is_blamed():
    moments = sorted({*EVENLY, 388, 394, 397, 398, 399})
    kept = {'short': by_power(0.05), 'long': by_power(0.1), 'weights': np.ones(MOMENTS)}
    walk = Walk(kept, {'short': moments, 'long': moments, 'weights': [1, MOMENTS]}, bits=6)
    run = OpenRun(walk.history())
    assert run.combine(composer_ema.posthoc.target.choose(power=0.2)).odd_file is None
    found = reconstruct(run, half_life='0.01dur', anyway=True)
    error = error_of(found, walk, by_half_life(20))
    assert error / 2 < found.predicted_error < 2 * error


class Masked(nn.Linear):
    """A layer with a mask, which is infinite, and a temperature, which it changes itself."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_buffer('mask', torch.tensor([0.0, -torch.inf]))
        self.register_buffer('temperature', torch.tensor(1.0))


class TestValues:
    def run(self, folder: Path, *, nan_from: int = 1000) -> Masked:
        torch.manual_seed(0)
        model = Masked()
        snapshots = Snapshots(model, folder, every=5, num_steps=100)
        for step in range(1, 101):
            with torch.no_grad():
                model.weight += 0.1 * torch.randn(2, 2)
                model.temperature *= 0.99
                if step >= nan_from:
                    model.weight[0, 0] = torch.nan
            snapshots.update()
        snapshots.finish()
        return model

    def test_that_averages_copy_are_the_newest(self, tmp_path):
        model = self.run(tmp_path)
        found = reconstruct(tmp_path, half_life='20ba').state_dict
        assert torch.equal(found['temperature'], model.temperature)
        assert torch.equal(found['mask'], model.mask)

    def test_that_are_not_finite_are_named_and_an_earlier_average_can_be_made(self, tmp_path):
        self.run(tmp_path / 'whole')
        self.run(tmp_path / 'diverged', nan_from=83)
        with pytest.raises(ReconstructionError, match=r'values that are not finite are in .*averages-00000085'):
            reconstruct(tmp_path / 'diverged', half_life='20ba')
        one, other = (reconstruct(tmp_path / name, half_life='20ba', at='80ba') for name in ('whole', 'diverged'))
        torch.testing.assert_close(one.state_dict['weight'], other.state_dict['weight'], rtol=1e-3, atol=1e-3)

    def test_that_no_look_noticed_stop_the_average(self, walk):
        odd = walk.kept[3]
        broken = dataclasses.replace(odd, _tensor=lambda name: odd.tensor(name) * torch.nan)
        run = OpenRun(walk.history(kept=[*walk.kept[:3], broken, *walk.kept[4:]]))
        with pytest.raises(CheckpointError, match=f'0.weight holds values that are not finite in {odd.path}'):
            run.tensor('0.weight', np.ones(len(run.kept)))
