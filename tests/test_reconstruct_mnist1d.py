"""Reconstructions of a real run against the averages that it would have kept: MNIST-1D at a constant learning rate.

``python -m pytest -m slow -s tests/test_reconstruct_mnist1d.py`` prints the table of ``method_cards/reconstruct.md``.
"""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mnist1d.data import get_dataset_args, make_dataset
from torch import nn

from composer_ema import reconstruct
from composer_ema.averages import Moment, Power
from composer_ema.posthoc import shares
from composer_ema.posthoc.fit import Kept, copies, fit
from composer_ema.posthoc.history import read_run
from composer_ema.posthoc.moments import History
from composer_ema.posthoc.open_run import OpenRun
from composer_ema.posthoc.reconstruct import Reconstruction
from composer_ema.posthoc.snapshots import Snapshots

pytestmark = pytest.mark.slow

STEPS = 6016  # 32 times 188
TIMES = np.arange(1.0, STEPS + 1)


def power(sigma: float) -> np.ndarray:
    return shares.weights_of(shares.power(TIMES, Power(sigma).gamma))


def half_life(share: float) -> np.ndarray:
    return shares.weights_of(shares.exponential(TIMES, share * STEPS))


SIGMAS = {f'power={sigma}': power(sigma) for sigma in (0.05, 0.1, 0.15, 0.2, 0.25)}
HALF_LIVES = {f'half_life={share}dur': half_life(share) for share in (0.01, 0.03, 0.05, 0.1, 0.2, 0.3)}
WANTED = {**SIGMAS, **HALF_LIVES}
SHORTEST = 'half_life=0.01dur'


class Run:
    """A run, all of its weights, and its snapshots: in full, and packed when it had ended.

    Attributes:
        walk: float64[steps, elements].
        full: folder of 32 snapshots of two power averages and the first weights.
        packed: the same, and the last weights.
    """

    def __init__(self, walk: np.ndarray, full: Path, packed: Path) -> None:
        self.walk, self.full, self.packed = walk, full, packed
        self._true = dict(zip(WANTED, self.averages(list(WANTED.values())), strict=True))

    def averages(self, weights: list[np.ndarray]) -> np.ndarray:
        padded = [np.append(shares.shares(each), np.zeros(STEPS - len(each))) for each in weights]
        return np.stack(padded) @ self.walk

    def error(self, made: np.ndarray, target: str) -> float:
        """The distance from the true average, relative to the distance of that from the last weights."""
        true = self._true[target]
        return float(np.linalg.norm(made - true) / np.linalg.norm(true - self.walk[-1]))

    def errors(self, kept: list[Kept]) -> dict[str, float]:
        """The errors of the best combinations of averages in float32."""
        averages = self.averages([each.weights for each in kept]).astype(np.float32)
        return {
            target: self.error(fit(kept, weights).coefficients @ averages, target) for target, weights in WANTED.items()
        }


@pytest.fixture(scope='module', params=['adam', 'sgd'])
def run(request, tmp_path_factory) -> Run:
    torch.manual_seed(0)
    data = make_dataset(get_dataset_args())
    inputs, labels = torch.tensor(data['x'], dtype=torch.float32), torch.tensor(data['y'])
    model = nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    if request.param == 'sgd':
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    packed = tmp_path_factory.mktemp('runs') / 'packed'
    full = packed.with_name('full')
    snapshots = Snapshots(model, packed, every=STEPS // 32, num_steps=STEPS, halvings=0)
    walk = np.empty((STEPS, sum(each.numel() for each in model.parameters())), dtype=np.float32)
    for step in range(STEPS):
        chosen = torch.randint(0, len(inputs), (64,))
        nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        snapshots.update()
        walk[step] = torch.cat([each.detach().flatten() for each in model.parameters()]).numpy()
    shutil.copytree(packed, full)
    snapshots.finish()
    return Run(walk.astype(np.float64), full, packed)


def every_second(history: History) -> History:
    """Sixteen of the 32 snapshots."""
    step = STEPS // 16
    kept = [each for each in history.kept if each.label == 'weights' or each.clock['ba'] % step == 0]
    return replace(history, kept=kept)


def errors(run: Run, history: History) -> dict[str, tuple[float, float]]:
    """Actual and predicted errors of all that is wanted."""
    found, opened = {}, OpenRun(history)
    for target in WANTED:
        name, value = target.split('=')
        made = reconstruct(opened, anyway=True, **{name: float(value) if name == 'power' else value})
        found[target] = run.error(flat(made), target), made.predicted_error
    return found


def flat(made: Reconstruction) -> np.ndarray:
    names = [f'{layer}.{kind}' for layer in (0, 2, 4) for kind in ('weight', 'bias')]
    return torch.cat([made.state_dict[name].flatten() for name in names]).double().numpy()


def show(title: str, found: dict[str, tuple[float, float]]) -> None:
    print(
        f'\n{title:34}',
        *(f'{100 * error:.2f} ({100 * predicted:.2f})'.rjust(14) for error, predicted in found.values()),
    )


def test_sixteen_snapshots_of_two_averages_and_the_first_weights(run):
    history = every_second(read_run(run.full))
    assert len(history.kept) == 33
    found = errors(run, history)
    print('', *WANTED)
    show('16 x 2 and the first, float32', found)
    assert all(error < 0.005 for target, (error, _) in found.items() if target != SHORTEST)


def test_thirty_two_snapshots(run):
    found = errors(run, read_run(run.full))
    show('32 x 2 and the first, float32', found)
    assert all(error < 0.0015 for target, (error, _) in found.items() if target != SHORTEST)


def test_float16_differences_add_at_most_a_twentieth_of_a_point(run):
    exact, packed = read_run(run.full), read_run(run.packed)
    for some in (every_second, lambda history: history):
        full, halves = errors(run, some(exact)), errors(run, some(packed))
        show('the same as float16 differences', halves)
        assert all(halves[each][0] <= full[each][0] + 0.0005 for each in WANTED if each != SHORTEST)


def test_predictions_are_within_five_times_of_the_errors_in_nine_of_ten_cases(run):
    packed = read_run(run.packed)
    ratios = [
        error / predicted
        for history in (packed, every_second(packed), read_run(run.full), every_second(read_run(run.full)))
        for error, predicted in errors(run, history).values()
        if error > 1e-4  # smaller ones are rounding
    ]
    print(f'\nactual over predicted error: {np.percentile(ratios, [5, 50, 95]).round(2)}')
    assert np.mean([0.2 < each < 5 for each in ratios]) >= 0.9


def test_a_run_resumed_with_other_settings(run):
    half = STEPS // 2
    updated = [*range(8, half + 1, 8), *range(half + 3, STEPS, 3), STEPS]  # every 8 steps, and every 3 once resumed
    resumed = [np.zeros(STEPS), np.zeros(STEPS)]
    for weights, sigmas in zip(resumed, ((0.05, 0.04), (0.1, 0.08)), strict=True):
        for count, (last, step) in enumerate(itertools.pairwise([0, *updated])):
            profile = Power(sigmas[step > half])
            weights[step - 1] = profile.weight(Moment(step - last, step, count))
        weights[: updated[0]] = 1.0
    ends = range(STEPS // 16, STEPS + 1, STEPS // 16)
    kept = [Kept(weights[:end]) for weights in resumed for end in ends] + [copies(1)]
    found = run.errors(kept)
    print('\nresumed with other settings', *(f'{100 * error:.2f}' for error in found.values()))
    assert all(error < 0.005 for target, error in found.items() if target != SHORTEST)


def test_more_snapshots_near_the_end_serve_short_averages(run):
    ends = list(range(STEPS // 16, STEPS + 1, STEPS // 16))
    closer = [STEPS - round(STEPS / 16 / 2**each) for each in range(1, 6)]
    evenly = [round(STEPS * each / 21) for each in range(1, 22)]
    found = {}
    for title, places in {'16': ends, '21': evenly, '16 + 5 near the end': sorted(ends + closer)}.items():
        kept = [Kept(power(sigma)[:end]) for sigma in (0.05, 0.1) for end in places] + [copies(1), copies(STEPS)]
        found[title] = run.errors(kept)
        print(f'\n{title:34}', *(f'{100 * error:.2f}'.rjust(8) for error in found[title].values()))
    assert found['16 + 5 near the end'][SHORTEST] < found['21'][SHORTEST] / 5


def test_the_checkpoints_of_a_run_with_one_average(run):
    ends = range(STEPS // 16, STEPS + 1, STEPS // 16)
    kept = [copies(end) for end in ends] + [Kept(half_life(0.1)[:end]) for end in ends]
    found = run.errors(kept)
    print('\n16 checkpoints with an EMA of 10 %', *(f'{100 * error:.2f}' for error in found.values()))
    assert found['power=0.1'] < 0.005
    assert found['power=0.25'] < 0.01
    alone = run.errors(kept[:16])
    print('\n16 checkpoints of training weights', *(f'{100 * error:.2f}' for error in alone.values()))
    assert alone['power=0.1'] > 0.05
