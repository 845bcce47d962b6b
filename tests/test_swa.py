"""SWA in Composer: which weights are in the average, the learning rate on its way, BatchNorm at the end.

What every average has to hold in a Composer run is tested in test_contract_*.py, for SWA as for EMA.
"""

import contextlib
import copy
import functools
import inspect
import itertools
import logging
import math
import warnings

import pytest
import torch
import toy
from composer import Callback, DataSpec
from composer.algorithms import EMA as ComposerEMA
from composer.algorithms import SWA as ComposerSWA
from composer.algorithms import GhostBatchNorm, GyroDropout
from composer.core import Event, Time
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from composer.optim import CosineAnnealingScheduler, ExponentialScheduler
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_swa_multi_avg_fn, update_bn
from toy import bits, make_data, make_evaluator, make_model, snapshot

from composer_ema import SWA, export, load_average
from composer_ema.checkpoints.inspection import TRAINING_WEIGHTS, describe

pytestmark = pytest.mark.filterwarnings('error:::composer_ema')


def held(swa: SWA) -> dict[str, torch.Tensor]:
    return {**dict(swa.swa_model.named_parameters()), **dict(swa.swa_model.named_buffers())}


class Path(Callback):
    """Keeps copies of the model and the learning rates at the ends of batches and epochs."""

    def __init__(self) -> None:
        self.after_batch: list[nn.Module] = []
        self.after_epoch: list[nn.Module] = []
        self.rates: list[float] = []

    def run_event(self, event, state, logger) -> None:
        if event is Event.BEFORE_TRAIN_BATCH:
            self.rates.append(float(state.optimizers[0].param_groups[0]['lr']))
        elif event is Event.BATCH_END:
            self.after_batch.append(copy.deepcopy(state.model))
        elif event is Event.EPOCH_END:
            self.after_epoch.append(copy.deepcopy(state.model))


# The average


@pytest.mark.parametrize(
    ('arguments', 'batches'),
    [
        ({'swa_start': '0.5dur'}, [6, 9, 12]),
        ({'swa_start': '2ep', 'update_interval': '2ba'}, [6, 8, 10, 12]),
        ({'swa_start': '5ba', 'update_interval': '3ba'}, [5, 8, 11]),
        ({'swa_start': '0ba', 'update_interval': '1ep'}, [3, 6, 9, 12]),
        ({'swa_start': Time(3, 'ep')}, [9, 12]),
        ({'swa_start': '20sp', 'update_interval': '1ba'}, list(range(6, 13))),
    ],
)
def test_the_average_is_the_mean_of_the_weights_at_its_moments(trainer, arguments, batches):
    swa, path = SWA(**arguments, refresh_batchnorm=False), Path()
    trainer([swa], callbacks=[path], max_duration='4ep').fit()
    assert swa.swa_model.num_updates == len(batches)
    moments = [path.after_batch[batch - 1].state_dict() for batch in batches]
    for name, average in held(swa).items():
        values = torch.stack([moment[name] for moment in moments])
        if average.is_floating_point():
            torch.testing.assert_close(average, values.double().mean(0).float(), rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(average, values[-1])


def test_the_average_is_torchs_averaged_model_to_the_bit(trainer):
    swa, path = SWA('2ba', update_interval='1ba', buffers='copy', refresh_batchnorm=False), Path()
    trainer([swa], callbacks=[path]).fit()
    # On a CPU torch's default is another kernel, which rounds otherwise.
    by_lerp, by_default = (
        AveragedModel(path.after_batch[1], multi_avg_fn=function) for function in (get_swa_multi_avg_fn(), None)
    )
    for model in path.after_batch[1:]:
        by_lerp.update_parameters(model)
        by_default.update_parameters(model)
    assert bits(held(swa)) == bits(by_lerp.module.state_dict())
    torch.testing.assert_close(held(swa), dict(by_default.module.state_dict()), rtol=2e-6, atol=1e-7)


def test_a_function_makes_the_average_in_place_of_the_mean(trainer):
    plain, by_function = (
        SWA('2ba', update_interval='1ba', multi_avg_fn=function) for function in (None, get_swa_multi_avg_fn())
    )
    for swa in (plain, by_function):
        trainer([swa]).fit()
    assert bits(held(plain)) == bits(held(by_function))
    latest = SWA('2ba', update_interval='1ba', avg_fn=lambda averaged, current, _: current, refresh_batchnorm=False)
    run = trainer([latest])
    run.fit()
    assert bits(held(latest)) == bits(run.state.model)
    assert latest.state_dict()['config']['avg_fn'].endswith('<lambda>')


@pytest.mark.parametrize(('asked_for', 'kept_on'), [(None, 'cpu'), ('cpu', 'cpu')])
def test_the_average_is_beside_the_weights_or_where_it_is_asked_for(trainer, asked_for, kept_on):
    swa = SWA(shadow_device=asked_for)
    trainer([swa])
    assert {tensor.device.type for tensor in held(swa).values()} == {kept_on}


def test_updates_and_distance_are_logged(trainer):
    memory = InMemoryLogger()
    trainer([SWA('1ep')], loggers=[memory], max_duration='3ep').fit()
    assert [value for _, value in memory.data['swa/num_updates']] == [1, 2, 3]
    distances = [value for _, value in memory.data['swa/relative_distance']]
    assert distances[0] == 0
    assert all(distance > 0 for distance in distances[1:])


def test_the_two_sets_of_weights_stay_within_reach(trainer):
    swa = SWA('1ep')
    run = trainer([swa], max_duration='3ep')
    run.fit()
    training, average = bits(run.state.model), bits(held(swa))
    assert bits(swa.get_swa_model(make_model(seed=3))) == average
    assert bits(swa.get_training_model(make_model(seed=3))) == training
    assert swa.get_swa_model(run.state.model) is run.state.model
    assert swa.swa_weights_active
    assert swa.get_training_model(run.state.model) is run.state.model
    assert bits(run.state.model) == training
    assert not swa.swa_weights_active


# The learning rate


@pytest.mark.parametrize('strategy', ['linear', 'cos'])
def test_the_learning_rate_meets_torchs_swalr_wherever_that_takes_a_step(trainer, strategy):
    path, length = Path(), 4
    swa = SWA('2ep', swa_lr=0.03, anneal_strategy=strategy, anneal_length=f'{length}ep')
    trainer([swa], callbacks=[path], max_duration='8ep').fit()
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    schedule = SWALR(optimizer, swa_lr=0.03, anneal_epochs=length, anneal_strategy=strategy)
    torchs = []
    for _ in range(6):
        torchs.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        schedule.step()
    first_of_epoch = path.rates[:: toy.EPOCH]
    assert first_of_epoch[:2] == [0.3, 0.3]
    assert first_of_epoch[2:] == pytest.approx(torchs, rel=1e-12)
    # Between them it goes on batch by batch.
    on_the_way = path.rates[2 * toy.EPOCH : 6 * toy.EPOCH + 1]
    assert all(later < earlier for earlier, later in itertools.pairwise(on_the_way))
    middle = 0.3 + (0.03 - 0.3) * (0.5 if strategy == 'linear' else (1 - math.cos(math.pi / 2)) / 2)
    assert path.rates[4 * toy.EPOCH] == pytest.approx(middle, rel=1e-12)
    assert set(path.rates[6 * toy.EPOCH :]) == {0.03}


@pytest.mark.parametrize('every_batch', [True, False])
@pytest.mark.parametrize(
    'schedule',
    [
        lambda optimizer: CosineAnnealingScheduler(),
        lambda optimizer: ExponentialScheduler(gamma=0.5),
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9),
    ],
    ids=['cosine', 'exponential', 'step'],
)
def test_the_runs_scheduler_is_overruled_from_the_start_on_and_not_before(trainer, schedule, every_batch):
    def rates(algorithms) -> list[float]:
        model, path = make_model(), Path()
        optimizer = toy.make_optimizer(model)
        trainer(
            algorithms, model=model, optimizers=optimizer, schedulers=schedule(optimizer), callbacks=[path],
            step_schedulers_every_batch=every_batch, max_duration='6ep',
        ).fit()  # fmt: skip
        return path.rates

    without, annealed = rates([]), rates([SWA('2ep', swa_lr=0.2, anneal_length='3ep')])
    start = 2 * toy.EPOCH
    assert annealed[: start + 1] == without[: start + 1]
    expected = [annealed[start] + (0.2 - annealed[start]) * min(1, k / 9) for k in range(len(annealed) - start)]
    assert annealed[start:] == pytest.approx(expected, rel=1e-12)


def test_a_length_of_nothing_jumps(trainer):
    path = Path()
    trainer([SWA('1ep', swa_lr=0.01, anneal_length='0ba')], callbacks=[path], max_duration='3ep').fit()
    assert path.rates == [0.3] * 3 + [0.01] * 6


def groups_of(model: nn.Module) -> list[dict]:
    parameters = list(model.parameters())
    return [{'params': parameters[:2], 'lr': 0.5}, {'params': parameters[2:], 'lr': 0.1}]


def test_every_parameter_group_goes_to_its_own_learning_rate(trainer):
    model = make_model()
    optimizer = torch.optim.SGD(groups_of(model))
    swa = SWA('1ep', swa_lr=[0.05, 0.02], anneal_length='1ep')
    run = trainer([swa], model=model, optimizers=optimizer, max_duration='3ep')
    run.fit()
    assert [group['lr'] for group in optimizer.param_groups] == [0.05, 0.02]
    assert swa.state_dict()['annealing']['learning_rates'] == [0.5, 0.1]


def test_a_learning_rate_in_a_tensor_is_set_in_place(trainer):
    model = make_model()
    rate = torch.tensor(0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, foreach=False)
    run = trainer([SWA('1ep', swa_lr=0.05, anneal_length='1ep')], model=model, optimizers=optimizer, max_duration='3ep')
    run.fit()
    assert optimizer.param_groups[0]['lr'] is rate
    assert rate.item() == pytest.approx(0.05)


def test_as_many_learning_rates_as_groups(trainer):
    with pytest.raises(ValueError, match=r'gives 2 learning rates, but the optimizer has 1 parameter group\. Pass one'):
        trainer([SWA('1ep', swa_lr=[0.1, 0.2])], max_duration='3ep').fit()


# BatchNorm


def statistics_by_hand(average: dict[str, torch.Tensor], batches) -> dict[str, torch.Tensor]:
    model = make_model()
    model.load_state_dict(average)
    torch.manual_seed(0)
    update_bn([[batch] for batch in batches], model)  # torch's own, which takes the first item of a list
    return {name: value for name, value in model.state_dict().items() if 'module.1.' in name and 'running' in name}


@pytest.mark.parametrize('duration', ['3ep', '7ba', '9ba', '28sp'])
def test_at_the_end_the_statistics_are_those_of_the_averaged_weights(trainer, duration):
    swa = SWA('2ba', update_interval='2ba')
    run = trainer([swa], max_duration=duration)
    run.fit()
    # The statistics come before dropout, so its random numbers do not matter.
    for name, value in statistics_by_hand(held(swa), make_data().dataloader).items():
        torch.testing.assert_close(held(swa)[name], value, rtol=1e-5, atol=1e-6)
    assert held(swa)['module.1.num_batches_tracked'] == toy.EPOCH
    assert run.state.model.module[1].num_batches_tracked == int(run.state.timestamp.batch)


@pytest.mark.parametrize('duration', ['3ep', '7ba', '9ba'])
def test_the_refresh_touches_neither_training_nor_random_numbers(trainer, duration):
    finals = []
    for algorithms in ([], [SWA('2ba', update_interval='2ba')]):
        data = DataSpec(
            torch.utils.data.DataLoader(make_data().dataloader.dataset, 4, shuffle=True),
            get_num_tokens_in_batch=lambda batch: 0,
        )
        run = trainer(algorithms, train_dataloader=data, max_duration=duration)
        run.fit()
        flags = [module.training for module in run.state.model.modules()]
        finals.append((bits(run.state.model), torch.get_rng_state().tolist(), flags))
        run.fit(duration='2ba')
        finals[-1] += (bits(run.state.model), torch.get_rng_state().tolist())
    assert finals[0] == finals[1]


class CountsItsCalls(nn.Module):
    """Its output depends on how often it has been called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.history = 0, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.history.append(x.detach().mean())
        return x * (1 + self.calls / 50) + torch.stack(self.history).mean()


def with_a_counter() -> tuple[nn.Module, list]:
    model = make_model()
    model.module.insert(3, CountsItsCalls())
    return model, []


class Follows(nn.Module):
    """A momentum encoder: a frozen parameter follows a trained one in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.follower = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.follower.mul_(0.9).add_(self.trained, alpha=0.1)
        return x * self.trained + self.follower


def with_a_momentum_encoder() -> tuple[nn.Module, list]:
    model = make_model()
    model.module.insert(4, Follows())
    return model, []


def with_gyro_dropout() -> tuple[nn.Module, list]:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # it cannot be resumed
        return make_model(), [GyroDropout(sigma=2, tau=2)]


@pytest.mark.filterwarnings('ignore:No instances of .torch.nn.Dropout. were found')
@pytest.mark.parametrize('build', [with_a_counter, with_a_momentum_encoder, with_gyro_dropout])
def test_training_goes_on_after_a_refresh_as_if_the_model_had_not_been_run(trainer, build):
    finals = []
    for refresh in (False, True):
        model, algorithms = build()
        swa = SWA('1ep', refresh_batchnorm=refresh)
        run = trainer([*algorithms, swa], model=model, max_duration='3ep')
        run.fit()
        refreshed = held(swa)['module.1.num_batches_tracked'] == toy.EPOCH
        assert refreshed == refresh
        finals.append([bits(run.state.model)])
        run.fit(duration='3ep')
        finals[-1].append(bits(run.state.model))
    assert finals[0] == finals[1]


@pytest.mark.parametrize(
    ('update_interval', 'duration', 'interval'),
    [('1ep', '3ep', '1ep'), ('1ba', '7ba', '1ba'), ('1ep', '9ba', '1ep'), ('1ba', '3ep', '1ep')],
)
def test_the_last_evaluation_and_checkpoint_have_the_refreshed_statistics(
    trainer, tmp_path, update_interval, duration, interval
):
    class Evaluated(Callback):
        seen = None

        def eval_start(self, state, logger) -> None:
            self.seen = bits(state.model)

    swa, evaluated = SWA('2ba', update_interval=update_interval), Evaluated()
    run = trainer(
        [swa], callbacks=[evaluated], max_duration=duration, eval_dataloader=make_evaluator(interval=interval),
        save_folder=str(tmp_path), save_interval=interval,
    )  # fmt: skip
    run.fit()
    average, saved = bits(held(swa)), load_average(tmp_path / 'latest-rank0.pt')
    # Composer saves before the end of an epoch when the run's last batch is an epoch's as well.
    assert (bits(saved) == average) == (duration != '9ba')
    for name, value in statistics_by_hand(saved, make_data().dataloader).items():
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-6)
    counts = 'module.1.num_batches_tracked'  # whole numbers stay the model's own while the average is swapped in
    assert {n: b for n, b in evaluated.seen.items() if n != counts} == {n: b for n, b in average.items() if n != counts}


class Counting(Callback):
    """Counts passes of the model in training mode without a gradient: those of a refresh."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def init(self, state, logger) -> None:
        state.model.module[1].register_forward_pre_hook(self.count)

    def count(self, layer: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if layer.training and not torch.is_grad_enabled():
            self.sizes.append(len(inputs[0]))


@pytest.mark.parametrize(
    ('refresh', 'sizes'),
    [
        (True, [4, 4, 2]),
        (False, []),
        (2, [4, 4]),
        ('2ba', [4, 4]),
        ('0.3ep', [4]),
        ('1ep', [4, 4, 2]),
        (Time(1, 'ba'), [4]),
        (7, [4, 4, 2]),
    ],
)
def test_as_many_batches_as_asked_for_are_run_once(trainer, refresh, sizes):
    counting = Counting()
    trainer([SWA('1ep', refresh_batchnorm=refresh)], callbacks=[counting], max_duration='3ep').fit()
    assert counting.sizes == sizes


@pytest.mark.parametrize('refresh', [True, 7])
def test_a_subset_of_an_epoch_is_refreshed_with_a_subset(trainer, refresh):
    swa, counting = SWA('1ep', refresh_batchnorm=refresh), Counting()
    trainer([swa], callbacks=[counting], max_duration='3ep', train_subset_num_batches=2).fit()
    assert counting.sizes == [4, 4]


def test_the_transforms_of_the_trainers_data_are_applied(trainer):
    spec = make_data()
    shifted = DataSpec(
        spec.dataloader,
        batch_transforms=lambda batch: [batch[0] + 5, batch[1]],
        get_num_tokens_in_batch=lambda batch: 0,
    )
    swa = SWA('1ep')
    trainer([swa], train_dataloader=shifted, max_duration='3ep').fit()
    batches = [[images + 5, labels] for images, labels in spec.dataloader]
    for name, value in statistics_by_hand(held(swa), batches).items():
        torch.testing.assert_close(held(swa)[name], value, rtol=1e-5, atol=1e-5)


def test_batches_are_transformed_and_split_as_in_training(trainer):
    seen: dict[bool, list] = {True: [], False: []}

    def note(what: str, batch):
        seen[torch.is_grad_enabled()].append((what, len(batch[0])))
        return batch

    data = DataSpec(
        make_data().dataloader,
        batch_transforms=functools.partial(note, 'batch'),
        microbatch_transforms=functools.partial(note, 'microbatch'),
        get_num_tokens_in_batch=lambda batch: 0,
    )
    counting = Counting()
    trainer(
        [SWA('1ep', update_interval='1ba')], callbacks=[counting], train_dataloader=data, max_duration='3ep',
        device_train_microbatch_size=2,
    ).fit()  # fmt: skip
    assert counting.sizes == [2, 2, 2, 2, 2]
    assert seen[False][:3] == [('batch', 4), ('microbatch', 2), ('microbatch', 2)]
    assert seen[False] == seen[True][: len(seen[True]) // 3]


def test_a_model_without_batchnorm_says_so_in_the_log(trainer, caplog):
    torch.manual_seed(0)
    model = ComposerClassifier(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), num_classes=3)
    swa = SWA('1ep')
    with caplog.at_level(logging.INFO, 'composer_ema'):
        trainer([swa], model=model, max_duration='3ep').fit()
    assert sum('the model has no BatchNorm layer' in message for message in caplog.messages) == 1


def test_a_refresh_that_cannot_work_is_refused_before_training(trainer):
    with pytest.raises(
        ValueError, match=r'refresh_batchnorm=True needs statistics .*: module\.1\.running_mean.* Let them'
    ):
        trainer([SWA('1ep', include='weight')], max_duration='3ep').fit()
    swa = SWA('1ep', include='weight', refresh_batchnorm=False)
    trainer([swa], max_duration='3ep').fit()
    assert swa.swa_model.num_updates == 3

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield torch.zeros(1, 6, 6), 0

    loader = torch.utils.data.DataLoader(Endless(), batch_size=2)
    with pytest.raises(ValueError, match=r"refresh_batchnorm=True is a share .*such as refresh_batchnorm='100ba'"):
        trainer([SWA('2ba', update_interval='1ba')], train_dataloader=loader, max_duration='4ba').fit()
    swa = SWA('2ba', update_interval='1ba', refresh_batchnorm='2ba')
    trainer([swa], train_dataloader=loader, max_duration='4ba').fit()
    assert held(swa)['module.1.num_batches_tracked'] == 2


def test_with_ghost_batchnorm_the_statistics_are_the_means_over_ghost_batches(trainer):
    swa = SWA('1ep')
    trainer([GhostBatchNorm(ghost_batch_size=2), swa], max_duration='3ep').fit()
    average = {name.replace('.batchnorm', ''): value for name, value in held(swa).items()}
    ghosts = [[images, None] for batch in make_data().dataloader for images in batch[0].split(2)]
    assert average['module.1.num_batches_tracked'] == len(ghosts) == 5
    for name, value in statistics_by_hand(average, ghosts).items():
        torch.testing.assert_close(average[name], value, rtol=1e-5, atol=1e-6)


class FailsInTheRefresh(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and not torch.is_grad_enabled():
            raise self.error('no more of this')
        return x


def failing_model(error: type[BaseException]) -> nn.Module:
    model = make_model()
    model.module.insert(3, FailsInTheRefresh(error))
    return model


@pytest.mark.parametrize('duration', ['3ep', '7ba'])
@pytest.mark.parametrize('error', [AssertionError, torch.OutOfMemoryError])
def test_a_refresh_that_fails_does_not_lose_the_run(trainer, tmp_path, error, duration):
    finals = []
    for refresh in (True, False):
        swa, folder = SWA('2ba', update_interval='1ba', refresh_batchnorm=refresh), tmp_path / str(refresh)
        run = trainer(
            [swa], model=failing_model(error), max_duration=duration, eval_dataloader=make_evaluator(),
            save_folder=str(folder),
        )  # fmt: skip
        message = rf'{error.__name__}: no more of this\. Compute them after training: update_bn\('
        with pytest.warns(UserWarning, match=message) if refresh else contextlib.nullcontext() as warned:
            run.fit()
        assert warned is None or sum('could not be computed' in str(each.message) for each in warned) == 1
        assert swa.state_dict()['refreshed_at'] is None
        assert bits(load_average(folder / 'latest-rank0.pt')) == bits(held(swa))
        finals.append((bits(run.state.model), bits(held(swa))))
    assert finals[0] == finals[1]


def test_an_interrupt_of_the_refresh_ends_the_run(trainer):
    with pytest.raises(KeyboardInterrupt):
        trainer([SWA('1ep')], model=failing_model(KeyboardInterrupt), max_duration='3ep').fit()


class StaysInEvaluation(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


@pytest.mark.parametrize('settings', [{}, {'exclude': r'module\.1\.running'}])
def test_frozen_batchnorm_keeps_its_statistics_and_the_run_says_so(trainer, settings):
    model = make_model()
    model.module[1] = StaysInEvaluation(2)
    model.module[1].running_mean.fill_(0.1)
    swa = SWA('1ep', **settings)
    run = trainer([swa], model=model, max_duration='3ep')
    with pytest.warns(UserWarning, match=r'frozen keep their statistics.*: module\.1\.'):
        run.fit()
    assert run.state.model.module[1].running_mean.tolist() == [torch.tensor(0.1).item()] * 2
    if not settings:
        assert held(swa)['module.1.running_mean'].tolist() == [torch.tensor(0.1).item()] * 2


def test_stopped_early_the_statistics_are_refreshed_too(trainer):
    class Stop(Callback):
        def batch_end(self, state, logger) -> None:
            if state.timestamp.batch == 4:
                state.stop_training()

    swa, counting = SWA('2ba', update_interval='1ba'), Counting()
    trainer([swa], callbacks=[Stop(), counting], max_duration='3ep').fit()
    assert counting.sizes == [4, 4, 2]


@pytest.mark.parametrize('interval', ['1ba', '1ep'])
def test_stopped_by_an_evaluation_the_last_checkpoint_has_the_refreshed_statistics(trainer, tmp_path, interval):
    class Stop(Callback):
        def eval_end(self, state, logger) -> None:
            if state.timestamp.batch == 2 * toy.EPOCH:
                state.stop_training()

    swa, counting = SWA('1ep', update_interval='1ba'), Counting()
    trainer(
        [swa], callbacks=[Stop(), counting], max_duration='4ep', eval_dataloader=make_evaluator(interval=interval),
        save_folder=str(tmp_path), save_interval=interval,
    ).fit()  # fmt: skip
    assert counting.sizes == [4, 4, 2]
    assert bits(load_average(tmp_path / 'latest-rank0.pt')) == bits(held(swa))


# Checkpoints


def test_interrupted_during_the_annealing_and_resumed_it_equals_the_whole_run(trainer, tmp_path):
    def build(**more):
        return trainer(
            [SWA('1ep', update_interval='2ba', swa_lr=0.05, anneal_strategy='cos', anneal_length='1.5ep')],
            schedulers=CosineAnnealingScheduler(), max_duration='3ep', train_dataloader=make_data(shuffle=True), **more,
        )  # fmt: skip

    whole = build(save_folder=str(tmp_path), save_interval='1ba', save_filename='ba{batch}.pt')
    whole.fit()
    expected = snapshot(whole)
    assert expected['rates'] == [0.05]
    for batch in range(1, 9):
        resumed = build(load_path=str(tmp_path / f'ba{batch}.pt'))
        resumed.fit()
        assert snapshot(resumed) == expected, f'resumed after batch {batch}'


def test_load_average_and_export_read_the_average(trainer, tmp_path):
    swa = SWA('1ep')
    run = trainer([swa], max_duration='3ep', run_name='equal')
    run.fit()
    run.save_checkpoint(str(tmp_path / 'end.pt'))
    assert bits(load_average(tmp_path / 'end.pt')) == bits(held(swa))
    metadata = export(tmp_path / 'end.pt', tmp_path / 'end.safetensors')
    assert metadata['weights'] == 'equal average'
    assert (metadata['swa_start'], metadata['num_updates'], metadata['update_interval']) == ('1ep', '3', '1ep')
    make_model().load_state_dict(load_average(tmp_path / 'end.pt'))


def test_inspect_tells_what_the_checkpoint_holds(trainer, tmp_path):
    swa = SWA('1ep', log_interval=None)
    run = trainer([swa], max_duration='3ep')
    run.fit()
    run.save_checkpoint(str(tmp_path / 'end.pt'))
    found = describe(tmp_path / 'end.pt')
    assert found.model_slot == TRAINING_WEIGHTS
    (average,) = found.averages
    assert (average.algorithm, average.num_updates, average.is_started) == ('SWA', 3, True)
    assert average.config['swa_start'] == '1ep'
    expected = swa.swa_model.relative_distance(run.state.model).item()
    assert average.relative_distance == pytest.approx(expected, rel=1e-6)


def test_the_average_of_composers_own_swa_is_read_and_goes_on(trainer, tmp_path):
    theirs = ComposerSWA(swa_start='1ep', swa_end='6ep', update_interval='1ep')
    run = trainer([theirs], max_duration='3ep')
    run.fit()
    path = str(tmp_path / 'theirs.pt')
    run.save_checkpoint(path)
    average = {name.removeprefix('module.'): t for name, t in theirs.swa_model.state_dict().items() if '.' in name}
    assert bits(load_average(path)) == bits(average)

    swa = SWA('1ep', buffers='copy', refresh_batchnorm=False)
    resumed = trainer([swa], max_duration='4ep', load_path=path)
    assert bits(held(swa)) == bits(average)
    assert swa.swa_model.num_updates == theirs.swa_model.n_averaged == 3
    resumed.fit()
    whole = SWA('1ep', buffers='copy', refresh_batchnorm=False)
    trainer([whole], max_duration='4ep').fit()
    torch.testing.assert_close(held(swa), held(whole), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        (
            'annealing',
            {'since': {'ep': 1}, 'learning_rates': [0.1]},
            "'annealing' of the saved SWA state must give iter",
        ),
        ('annealing', {'learning_rates': [0.1]}, "'annealing' .* must give since and learning_rates"),
        ('annealing', [0.1], "'annealing' .* must give since and learning_rates"),
        ('refreshed_at', 3, "'refreshed_at' of the saved SWA state must give numbers"),
        ('averages', {'ema': {}}, "the saved SWA state holds the averages ema, not 'swa'"),
        ('version', 99, 'the saved SWA state has format version 99'),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(trainer, key, value, message):
    swa = SWA('1ep', swa_lr=0.05, anneal_length='1ep')
    run = trainer([swa], max_duration='3ep')
    run.fit()
    before, state = snapshot(run), swa.state_dict()
    with pytest.raises(ValueError, match=message):
        swa.load_state_dict({**state, key: value})
    assert snapshot(run) == before


def test_resuming_with_other_arguments_is_warned_of(trainer, tmp_path):
    run = trainer([SWA('1ep', swa_lr=0.05)], max_duration='4ep')
    run.fit(duration='2ep')
    run.save_checkpoint(str(tmp_path / 'middle.pt'))
    resumed = trainer([SWA('1ep', swa_lr=0.01)], load_path=str(tmp_path / 'middle.pt'), max_duration='4ep')
    with pytest.warns(UserWarning, match=r'averaged with swa_lr=0\.05, this run continues with swa_lr=0\.01'):
        resumed.fit()


# Arguments


EVERY_ARGUMENT = [
    {},
    {'swa_start': '6ep'},
    {'swa_start': Time(0.5, 'dur'), 'update_interval': '10ba'},
    {'swa_lr': 0.05},
    {'swa_lr': [0.05, 0.1], 'anneal_strategy': 'cosine', 'anneal_length': '5ep'},
    {'swa_lr': 0.05, 'schedule_swa_lr': True},
    {'schedule_swa_lr': False},
    {'refresh_batchnorm': False},
    {'refresh_batchnorm': '100ba'},
    {'refresh_batchnorm': '0.5ep'},
    {'buffers': 'copy', 'include': 'weight', 'exclude': ['bias'], 'shadow_dtype': 'bfloat16', 'shadow_device': 'cpu'},
    {'export_weights': 'swa'},
    {'skip_nonfinite': True, 'log_interval': None, 'evaluate_with': {'eval': 'swa', 'raw': 'training'}},
    {'shadow_dtype': 'bfloat16', 'rounding': 'stochastic', 'seed': 7},
]


@pytest.mark.parametrize('arguments', EVERY_ARGUMENT, ids=repr)
def test_the_repr_evaluates_to_an_equal_configuration(arguments):
    swa = SWA(**arguments)
    twin = eval(repr(swa), {'SWA': SWA})
    assert repr(twin) == repr(swa)
    assert twin.state_dict() == swa.state_dict()


def test_the_arguments_of_the_builtin_stand_in_its_order():
    builtin, ours = inspect.signature(ComposerSWA).parameters, inspect.signature(SWA).parameters
    assert list(ours)[: len(builtin)] == list(builtin)
    for name in ('update_interval', 'anneal_strategy', 'swa_lr'):
        assert ours[name].default == builtin[name].default
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(ours)[len(builtin) :])
    assert SWA.__qualname__ == ComposerSWA.__qualname__


@pytest.mark.parametrize(
    ('arguments', 'kind', 'message'),
    [
        ({'swa_end': '0.97dur'}, ValueError, r"swa_end='0\.97dur' is where .* Leave swa_end out; load_average"),
        ({'schedule_swa_lr': True}, ValueError, r'does not say where the learning rate goes.*Pass a number as swa_lr'),
        ({'schedule_swa_lr': False, 'swa_lr': 0.1}, ValueError, r'swa_lr=0\.1 anneals .*Leave schedule_swa_lr out'),
        ({'anneal_steps': 20, 'update_interval': '8ba'}, ValueError, r"Write anneal_length='160ba' in its place"),
        ({'anneal_steps': 10}, ValueError, r"anneal_length='10ep'"),
        ({'swa_start': '1iter'}, ValueError, r"swa_start takes the units ba .*got '1iter'"),
        ({'swa_start': 6}, TypeError, 'swa_start must be a time string'),
        ({'update_interval': '0ba'}, ValueError, r"update_interval must be above zero, got '0ba'"),
        ({'anneal_strategy': 'exp'}, ValueError, r"anneal_strategy must be 'linear' or 'cos', got 'exp'"),
        ({'swa_lr': -0.1}, ValueError, r'swa_lr must be a number of at least 0.*got -0\.1'),
        ({'swa_lr': math.nan}, ValueError, r'swa_lr must be a number'),
        ({'swa_lr': []}, ValueError, r'swa_lr must be a number'),
        ({'swa_lr': True}, TypeError, r'swa_lr must be a number'),
        ({'swa_lr': '0.1'}, TypeError, r"swa_lr must be a number .*got '0\.1'"),
        ({'anneal_length': '-1ep'}, ValueError, 'anneal_length must not be negative'),
        ({'refresh_batchnorm': 0}, ValueError, r'at least 1 batch, got 0\. Pass False'),
        ({'refresh_batchnorm': '2ep'}, ValueError, r"at most one epoch, got '2ep'\. Pass True"),
        ({'refresh_batchnorm': '5sp'}, ValueError, r"refresh_batchnorm takes the units ba"),
        ({'refresh_batchnorm': None}, TypeError, r'refresh_batchnorm must be a time string'),
        ({'evaluate_with': {'eval': 'ema'}}, ValueError, r"evaluate_with\['eval'\] must be 'swa' or 'training'"),
        ({'buffers': 'none'}, ValueError, "buffers must be 'statistics', 'average', 'copy', or"),
        ({'skip_nonfinite': 'yes'}, TypeError, 'skip_nonfinite must be True or False'),
        ({'avg_fn': torch.lerp, 'skip_nonfinite': True}, ValueError, 'skip_nonfinite=True has no effect'),
    ],
)  # fmt: skip
def test_arguments_out_of_range_name_value_rule_and_remedy(arguments, kind, message):
    with pytest.raises(kind, match=message):
        SWA(**arguments)


@pytest.mark.parametrize('build', [lambda: SWA('6ep', '8ep', '1ep'), lambda: SWA('0.7dur', '0.97dur')])
def test_positional_arguments_of_composers_swa_are_told_what_to_write(build):
    with pytest.raises(ValueError, match=r"swa_end='(8ep|0\.97dur)' is where Composer's SWA replaces"):
        build()


@pytest.mark.parametrize(
    ('arguments', 'duration', 'message'),
    [
        ({}, '2ep', r"swa_start='0\.75dur' with update_interval='1ep' takes a single moment .*'100ba'"),
        ({'swa_start': '5ba', 'update_interval': '4ba'}, '6ba', 'takes a single moment'),
        ({'swa_start': '5ba', 'update_interval': '2ba'}, '6ba', 'takes a single moment'),
        ({'swa_start': '9ba'}, '2ep', r"swa_start='9ba' is longer than the run of 6 batches: no average"),
        ({'swa_start': '1ep', 'update_interval': '4ep'}, '3ep', r"update_interval='4ep' is longer than the run"),
        ({'swa_start': '1ep', 'swa_lr': 0.1, 'anneal_length': '3ep'}, '3ep', r"anneal_length='3ep' is longer than"),
        ({'swa_start': '1ep', 'anneal_length': '1ep'}, '3ep', r"anneal_length='1ep' has no effect without swa_lr"),
        ({'swa_start': '1ep', 'anneal_strategy': 'cos'}, '3ep', r"anneal_strategy='cos' has no effect without swa_lr"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings('ignore:training ended before the first update:UserWarning')
def test_what_cannot_take_effect_is_warned_of(trainer, arguments, duration, message):
    run = trainer([SWA(**arguments)], max_duration=duration)
    with pytest.warns(UserWarning, match=message):
        run.fit()


@pytest.mark.parametrize(
    ('arguments', 'duration'),
    [
        ({}, '8ep'),
        ({'swa_start': '1ep', 'swa_lr': 0.1, 'anneal_length': '2ep'}, '3ep'),
        ({'swa_start': '3ba', 'update_interval': '3ba'}, '6ba'),
        ({'swa_start': '0ep', 'update_interval': '2ep'}, '2ep'),
    ],
)
def test_what_works_warns_of_nothing(trainer, arguments, duration):
    swa = SWA(**arguments)
    trainer([swa], max_duration=duration).fit()
    assert swa.swa_model.num_updates >= 1


@pytest.mark.parametrize(
    'algorithms',
    [
        lambda: [SWA(), SWA()],
        lambda: [SWA(), ComposerEMA('1ba')],
        lambda: [SWA(), ComposerSWA()],
    ],
)
def test_two_averages_in_one_trainer_are_refused_with_a_remedy(trainer, algorithms):
    with pytest.raises(ValueError, match=r'in one Trainer.*Pass (one|EMA and SWA of composer_ema)'):
        trainer(algorithms())


def test_copies_continue_the_same_run(trainer):
    swa = SWA('1ep', swa_lr=0.05, avg_fn=lambda averaged, current, n: averaged + (current - averaged) / (n + 1))
    twin = copy.deepcopy(swa)
    finals = []
    for algorithm in (swa, twin):
        run = trainer([algorithm], max_duration='3ep')
        run.fit()
        finals.append(snapshot(run))
    assert finals[0] == finals[1]
