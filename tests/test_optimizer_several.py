"""EMAOptimizer with several averages, with a warm-up, and what it says of an average that is mostly its start."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain import STRICT, Net, One, averaged, same_bits, saved, sgd, step_to, train
from torch import nn

from composer_ema import EMAOptimizer
from composer_ema.checkpoints.reading import load_average

FIXTURES = Path(__file__).parent / 'fixtures'
sys.path.insert(0, str(FIXTURES))
from make_version_2 import OPTIMIZERS, make_net, make_optimizer  # noqa: E402

pytestmark = STRICT

SEVERAL: dict[str, Any] = {
    'half_life': {'short': 2, 'long': 20},
    'power': {'wide': 0.25},
    'average': {'mean': 'equal'},
    'warmup': {'long': 0.2},
}
#: The same averages alone.
ALONE: dict[str, dict[str, Any]] = {
    'short': {'half_life': 2},
    'long': {'half_life': 20, 'warmup': 0.2},
    'wide': {'power': 0.25},
    'mean': {'average': 'equal'},
}


def several(model: nn.Module, **options: Any) -> EMAOptimizer:
    return EMAOptimizer(sgd(model), model=model, **{**SEVERAL, **options})


def averages(optimizer: EMAOptimizer) -> dict[str, dict[str, torch.Tensor]]:
    return {
        label: {**dict(shadow.named_parameters()), **dict(shadow.named_buffers())}
        for label, shadow in optimizer.shadows.items()
    }


class TestSeveral:
    @given(interval=st.integers(1, 3), start=st.integers(0, 4), steps=st.integers(1, 9))
    def test_they_are_those_of_separate_optimizers_to_the_bit(self, interval, start, steps):
        model = Net()
        together = several(model, every_n_steps=interval, start=start)
        train(model, together, range(steps))
        for label, options in ALONE.items():
            twin = Net()
            alone = EMAOptimizer(sgd(twin), model=twin, every_n_steps=interval, start=start, **options)
            train(twin, alone, range(steps))
            assert same_bits(averages(together)[label], averages(alone)['ema'])

    def test_each_can_be_lent_and_saved_by_its_label_and_the_first_without(self):
        model = Net()
        optimizer = several(model)
        train(model, optimizer, range(9))
        found = averages(optimizer)
        assert list(found) == ['short', 'long', 'wide', 'mean']
        for label in (None, 'short', 'wide'):
            with optimizer.swap_ema_weights(average=label):
                held = {name: tensor.clone() for name, tensor in model.named_parameters()}
            own = found[label or 'short']
            assert same_bits(held, {name: own[name] for name in held})
            assert same_bits(optimizer.averaged_state_dict(label), {**model.state_dict(), **own})
        assert optimizer.shadow is optimizer.shadows['short']
        with pytest.raises(ValueError, match=r"no average is called 'log'\. Did you mean 'long'"):
            optimizer.averaged_state_dict('log')

    @pytest.mark.parametrize('start', [0, 4])
    def test_a_resumed_run_equals_an_uninterrupted_one(self, start):
        model, twin = Net(), Net(seed=1)
        optimizer = several(model, start=start)
        train(model, optimizer, range(3))
        resumed = several(twin, start=start)
        twin.load_state_dict(model.state_dict())
        resumed.load_state_dict(saved(optimizer.state_dict()))
        for each, own in ((model, optimizer), (twin, resumed)):
            train(each, own, range(3, 7))
        for label, average in averages(optimizer).items():
            assert same_bits(averages(resumed)[label], average)
        assert resumed.ema_state_dict()['averages'].keys() == ALONE.keys()

    def test_one_average_goes_on_as_several_and_several_as_one_in_words(self):
        model = Net()
        one = EMAOptimizer(sgd(model), model=model, half_life=20)
        train(model, one, range(3))
        twin = Net()
        two = EMAOptimizer(sgd(twin), model=twin, half_life={'short': 2, 'long': 20})
        with pytest.warns(
            UserWarning, match=r"'short' \(half_life=2\) continues from 'ema'.*'long' \(half_life=20\) cont"
        ):
            two.load_state_dict(saved(one.state_dict()))
        before = averages(one)['ema']
        assert all(same_bits(average, before) for average in averages(two).values())
        back = EMAOptimizer(sgd(twin), model=twin, half_life=20)
        with pytest.warns(UserWarning, match="'ema' .* continues from 'long'.*'short' is not kept any longer"):
            back.load_state_dict(saved(two.state_dict()))
        assert same_bits(averages(back)['ema'], before)
        assert back.ema_state_dict()['start_share'] == pytest.approx(2 ** (-3 / 20))

    def test_averages_that_none_continues_are_refused_and_the_remedy_works(self):
        model, twin = Net(), Net()
        two = EMAOptimizer(sgd(model), model=model, half_life={'short': 2, 'long': 20})
        train(model, two, range(3))
        other = EMAOptimizer(sgd(twin), model=twin, half_life=9)
        state = saved(two.state_dict())
        with pytest.raises(ValueError, match=r"call state\.pop\('ema'\) before load_state_dict\(state\)\.$"):
            other.load_state_dict(state)
        state.pop('ema')
        with pytest.warns(UserWarning, match='A new average starts'):
            other.load_state_dict(state)

    def test_a_state_without_the_share_of_the_start_is_refused(self):
        model = Net()
        optimizer = several(model)
        train(model, optimizer, range(3))
        state = saved(optimizer.ema_state_dict())
        del state['averages']['wide']['start_share']
        with pytest.raises(ValueError, match=r"average 'wide' lacks 'start_share'\. Nothing was loaded"):
            optimizer.load_ema_state_dict(state)

    def test_a_new_label_starts_at_the_weights_and_the_others_go_on(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), model=model, half_life={'short': 2})
        train(model, optimizer, range(3))
        before = copy.deepcopy(averages(optimizer)['short'])
        more = EMAOptimizer(sgd(model), model=model, half_life={'short': 2}, power={'wide': 0.1})
        state = optimizer.ema_state_dict()
        state['averages']['other'] = {**state['averages']['short'], 'description': 'half_life=9'}
        with pytest.warns(UserWarning, match=r"'wide' \(power=0\.1\) is new and starts at the weights"):
            more.load_ema_state_dict(saved(state))
        found = averages(more)
        assert same_bits(found['short'], before)
        assert same_bits(found['wide'], {name: model.state_dict()[name] for name in found['wide']})

    def test_the_age_of_a_new_label_counts_from_where_the_others_go_on(self):
        model = One(8.0)
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), half_life={'old': 1000, 'other': 9})
        for value in (7, 6, 5):
            step_to(optimizer, model, value)
        more = EMAOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0), half_life={'old': 1000, 'new': 1000}, warmup={'new': 1.0}
        )
        with pytest.warns(UserWarning, match="'new' .* is new and starts at the weights"):
            more.load_ema_state_dict(saved(optimizer.ema_state_dict()))
        step_to(more, model, 1)
        [(_, average)] = more.shadows['new'].named_parameters()
        assert average.item() == pytest.approx(3), 'a half-life of one step, not of four'

    def test_a_state_in_a_file_gives_each_average_by_its_label(self, tmp_path):
        model = Net()
        optimizer = several(model)
        train(model, optimizer, range(9))
        torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, tmp_path / 'run.pt')
        for label in ALONE:
            loaded = load_average(tmp_path / 'run.pt', model, average=label)
            own = averages(optimizer)[label]
            assert same_bits({name: loaded[name] for name in own}, own)

    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            ({'half_life': {'a': 1}, 'decay': 0.9}, 'decay=0.9 has no label, and other averages have'),
            ({'half_life': {'a': 1}, 'power': {'a': 0.1}}, "power and half_life both make an average 'a'"),
            ({'half_life': {'a': 1, 'b': None}}, r"half_life\['b'\] is None, which makes no average"),
            ({'half_life': {}}, 'half_life={} names no average'),
            ({'half_life': {'a': 1}, 'power': {}}, 'power={} names no average'),
            ({'half_life': {'a': 1}, 'warmup': {}}, 'warmup={} names no average'),
            ({'half_life': {'1a': 1}}, 'label .1a.. A label starts with a letter'),
            ({'half_life': {'a' * 65: 1}}, 'at most 64 letters'),
            ({'half_life': {'a b': 1}}, "got the label 'a b'"),
            ({'half_life': {'a': -1}}, 'a: half_life must be finite'),
            ({'average': {'a': 'exponential'}}, 'does not say which exponential average'),
            ({'half_life': {'a': 1}, 'warmup': {'b': 0.1}}, "warmup names the average 'b', which there is not"),
            ({'power': {'a': 0.1}, 'warmup': 0.1}, 'warmup=0.1 has no effect: no average is exponential'),
            ({'power': {'a': 0.1}, 'warmup': {'a': 0.1}}, 'a: warmup has no effect on a power average'),
            ({'half_life': 1, 'warmup': {'a': 0.1}}, 'names averages by label, and the only average has none'),
            ({'half_life': {'a': 1}, 'avg_fn': torch.lerp}, 'has no effect on an average by a function'),
        ],
    )
    def test_what_contradicts_is_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            EMAOptimizer(sgd(Net()), **options)


class TestProfiles:
    def test_a_warm_up_by_hand(self):
        model = One(8.0)
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), half_life=1000, warmup=1.0)
        for value, expected in ((0, 4), (2, 4 * 2**-0.5 + 2 * (1 - 2**-0.5))):  # half-lives of 1 and 2 steps
            step_to(optimizer, model, value)
            assert averaged(optimizer)['0.0'].item() == pytest.approx(expected)

    def test_gamma_is_another_name_of_a_power(self):
        for options in ({'gamma': 0}, {'power': 12**-0.5}):
            model = One(8.0)
            optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), **options)
            for value in (0, 3, 6):
                step_to(optimizer, model, value)
            assert averaged(optimizer)['0.0'].item() == pytest.approx(3)

    @pytest.mark.parametrize(
        ('start', 'interval', 'steps'), [(25, 10, [25, 35, 45]), (3, 5, [3, 8, 13]), (0, 4, [4, 8])]
    )
    def test_updates_come_every_interval_from_the_start_on(self, start, interval, steps):
        model = One(0.0)
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), start=start, every_n_steps=interval)
        updates = []
        for step in range(1, steps[-1] + 3):
            before = optimizer.shadow.num_updates
            step_to(optimizer, model, step)
            updates += [step] * (optimizer.shadow.num_updates - before)
        assert updates == steps


class TestVersion2:
    @pytest.mark.parametrize('name', OPTIMIZERS)
    def test_it_goes_on_as_the_same_average_that_is_saved_anew(self, name):
        held = torch.load(FIXTURES / 'version-2-optimizer.pt', weights_only=True)[name]
        assert held['state']['ema']['version'] == 2
        ends = []
        for anew in (False, True):
            net = make_net()
            net.load_state_dict(held['model'])
            optimizer = make_optimizer(net, name)
            optimizer.load_state_dict(copy.deepcopy(held['state']))
            if anew:
                state = saved(optimizer.state_dict())
                assert state['ema']['version'] == 3
                optimizer = make_optimizer(net, name)
                optimizer.load_state_dict(state)
            assert optimizer.ema_state_dict()['start_share'] is None
            for _ in range(4):
                for parameter in net.parameters():
                    parameter.grad = torch.ones_like(parameter)
                optimizer.step()
            ends.append(averages(optimizer)['ema'])
        assert same_bits(*ends)


@pytest.mark.filterwarnings('error')
class TestStart:
    MESSAGE = (
        r'^After 3 steps the average still holds 100 % of the initial weights\. Pass warmup=0\.1 or a smaller decay\.$'
    )

    def test_the_default_decay_on_a_short_run_is_warned_of_once(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), model=model)
        train(model, optimizer, range(3))
        optimizer.state_dict()  # a checkpoint in the middle of a run does no harm
        with pytest.warns(UserWarning, match=self.MESSAGE) as caught, optimizer.swap_ema_weights():
            pass
        assert caught[0].filename == __file__
        with optimizer.swap_ema_weights():
            pass
        optimizer.averaged_state_dict()

    def test_so_is_its_state_dict(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), model=model)
        train(model, optimizer, range(3))
        with pytest.warns(UserWarning, match=self.MESSAGE) as caught:
            optimizer.averaged_state_dict()
        assert caught[0].filename == __file__

    @pytest.mark.parametrize(
        'options', [{'warmup': 0.1}, {'bias_correction': True}, {'average': 'equal'}, {'power': 0.1}]
    )
    def test_what_forgets_its_start_is_not(self, options):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), model=model, **options)
        with optimizer.swap_ema_weights():  # before the first step the average is the weights
            pass
        train(model, optimizer, range(3))
        with optimizer.swap_ema_weights():
            pass

    def test_the_share_is_in_the_state_and_goes_on(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), model=model, decay=0.5)
        train(model, optimizer, range(3))
        state = saved(optimizer.state_dict())
        assert state['ema']['start_share'] == 0.5**3
        resumed = EMAOptimizer(sgd(model), model=model, decay=0.5)
        resumed.load_state_dict(state)
        train(model, resumed, range(3, 5))
        assert resumed.ema_state_dict()['start_share'] == 0.5**5

    def test_of_several_the_label_is_named(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), model=model, half_life={'short': 0, 'long': 100})
        train(model, optimizer, range(3))
        optimizer.averaged_state_dict('short')
        with pytest.warns(UserWarning, match=r"the average 'long' still holds 98 % .* a shorter half_life"):
            optimizer.averaged_state_dict('long')
