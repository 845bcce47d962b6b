"""Power function averages through every door: ShadowModel, EMAOptimizer, EMA, recipes and their previews."""

import numpy as np
import pytest
import torch
import toy
from torch import nn

from composer_ema import EMA, EMAOptimizer, ShadowModel, export
from composer_ema.averages import Power
from composer_ema.checkpoints.inspection import describe
from composer_ema.recipe.preview import preview
from composer_ema.recipe.schema import Recipe

SIGMA_REL = (2 / 36) ** 0.5  # gamma = 1: the share made up to a time t is t ** 2


def expected(values: list[torch.Tensor], times: list[float]) -> torch.Tensor:
    """The average of values taken at these times: each has the share (t ** 2 - previous ** 2) / end ** 2."""
    made = [0.0, *((time / times[-1]) ** 2 for time in times)]
    return sum((b - a) * value for value, a, b in zip(values, made, made[1:], strict=False))


class Moves(nn.Module):
    """A weight that each step sets to a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def move(self, step: int) -> torch.Tensor:
        with torch.no_grad():
            self.weight.copy_(torch.randn(2, generator=torch.Generator().manual_seed(step), dtype=torch.float64))
        return self.weight.detach().clone()


def test_a_shadow_model_follows_a_power_function():
    model = Moves()
    shadow, profile, values = ShadowModel(model), Power(SIGMA_REL), []
    for step in range(7):
        values.append(model.move(step))
        shadow.update(model, weight=profile.weight_at(shadow.num_updates))
    torch.testing.assert_close(next(shadow.parameters()), expected(values, list(range(1, 8))))


@pytest.mark.parametrize('every_n_steps', [1, 3])
@pytest.mark.parametrize('start', [0, 4])
def test_an_optimizer_follows_a_power_function(every_n_steps, start):
    model = Moves()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = EMAOptimizer(inner, power=SIGMA_REL, every_n_steps=every_n_steps, start=start, model=model)
    values, times = [], []
    for step in range(1, 13):
        model.weight.grad = torch.randn(2, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.step()
        if step in range(start or every_n_steps, 13, every_n_steps):
            values.append(model.weight.detach().clone())
            times.append(step)
    first = times[0] - every_n_steps
    average = expected(values, [time - first for time in times])
    torch.testing.assert_close(next(optimizer.shadow.parameters()), average)


@pytest.mark.parametrize(
    'arguments', [{'decay': 0.9}, {'half_life': 3}, {'bias_correction': True}, {'average': 'equal'}], ids=str
)
def test_an_optimizer_refuses_a_power_beside_what_it_replaces(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=rf'power.*{name}|{name}.*power'):
        EMAOptimizer(torch.optim.SGD(Moves().parameters(), lr=0.1), power=0.1, **arguments)


@pytest.mark.parametrize(
    ('arguments', 'updates', 'start'),
    [
        ({}, [1, 2, 3, 4, 5, 6], 0),
        ({'update_interval': '2ba'}, [1, 2, 4, 6], 0),
        ({'update_interval': '1ep'}, [3, 6], 0),
        ({'ema_start': '2ba'}, [2, 3, 4, 5, 6], 1),
        ({'ema_start': '3ba', 'update_interval': '2ba'}, [3, 5], 1),
        ({'ema_start': '2ep', 'update_interval': '1ep', 'max_duration': '4ep'}, [6, 9, 12], 3),
    ],
    ids=str,
)
def test_ema_follows_a_power_function_of_the_batches_since_its_start(trainer, arguments, updates, start):
    weights, duration = {}, arguments.get('max_duration', '2ep')

    class Witness(toy.Callback):
        def batch_end(self, state, logger) -> None:
            parameters = state.model.named_parameters()
            weights[int(state.timestamp.batch)] = {name: p.detach().double().clone() for name, p in parameters}

    ema = EMA(power=SIGMA_REL, **{name: value for name, value in arguments.items() if name != 'max_duration'})
    trainer([ema], callbacks=[Witness()], max_duration=duration).fit()
    assert ema.ema_model.num_updates == len(updates)
    times = [batch - start for batch in updates]
    for name, average in ema.ema_model.named_parameters():
        values = [weights[batch][name] for batch in updates]
        torch.testing.assert_close(average.double(), expected(values, times), rtol=1e-5, atol=1e-6)


def test_a_run_with_a_power_function_resumes_exactly(trainer, tmp_path):
    whole = trainer([EMA(power=0.2)], save_folder=str(tmp_path), save_interval='1ba')
    whole.fit()
    for batch in (1, 2, 4):
        (saved,) = tmp_path.glob(f'*-ba{batch}-rank0.pt')
        resumed = trainer([EMA(power=0.2)], load_path=str(saved))
        resumed.fit()
        assert toy.snapshot(resumed) == toy.snapshot(whole)


def test_another_power_on_resuming_is_warned_about(trainer, tmp_path):
    trainer([EMA(power=0.2)], save_folder=str(tmp_path), max_duration='1ep').fit()
    resumed = trainer([EMA(power=0.1)], load_path=str(tmp_path / 'latest-rank0.pt'))
    with pytest.warns(UserWarning, match=r'averaged with power=0\.2, this run continues with power=0\.1'):
        resumed.fit()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'power': 0.1, 'half_life': '5ba'}, r"pass either half_life or power, got half_life='5ba' and power=0\.1"),
        ({'power': 0.1, 'smoothing': 0.9}, r'pass either smoothing or power, got smoothing=0\.9 and power=0\.1'),
        ({'power': 0.5}, r'power must lie in \[1e-9, 0\.2887\].*got 0\.5'),
        ({'power': 0.1, 'avg_fn': torch.add}, r'so power=0\.1 has no effect'),
        ({'half_life': None}, 'one of half_life, smoothing, power and gamma must be given'),
    ],
)
def test_ema_says_what_a_power_may_be_and_beside_what(arguments, message):
    with pytest.raises(ValueError, match=message):
        EMA(**arguments)


def test_its_representation_and_its_state_name_it():
    ema = EMA(power=0.1)
    assert repr(ema) == 'EMA(power=0.1)'
    assert ema.state_dict()['config']['power'] == 0.1
    assert ema.smoothing is None


def test_a_recipe_previews_the_shares_of_a_power_function():
    recipe = Recipe('a.yaml', 'a', {
        'max_duration': '3ep', 'model': {'name': 'mnist1d_mlp'}, 'data': {'name': 'mnist1d', 'num_samples': 500},
        'optimizer': {'name': 'sgd', 'lr': 0.1}, 'algorithms': {'ema': {'power': SIGMA_REL}},
    })  # fmt: skip
    (profile,) = preview(recipe).profiles
    ends = np.arange(1, 13) / 12
    np.testing.assert_allclose(np.cumsum(profile.share), ends**2, atol=1e-12)


def test_what_lies_in_a_checkpoint_names_it(trainer, tmp_path):
    trainer([EMA(power=0.1)], save_folder=str(tmp_path / 'run')).fit()
    metadata = export(tmp_path / 'run' / 'latest-rank0.pt', tmp_path / 'average.safetensors')
    assert (metadata['weights'], metadata['power']) == ('power function average', '0.1')
    assert 'half_life' not in metadata
    (average,) = describe(tmp_path / 'run' / 'latest-rank0.pt').averages
    assert average.config['power'] == 0.1
