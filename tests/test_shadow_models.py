"""Several averages of one model over one follower: each is what a separate shadow would be, and is used as one."""

import copy
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import STRICT, Net, One, assert_same, same_bits, saved, set_, sgd, train, weights
from torch.optim.swa_utils import get_ema_avg_fn

from composer_ema import ShadowModel, ShadowModels
from composer_ema.model.watch import Watch

pytestmark = STRICT
LABELS = ('short', 'long')
SHARES = st.one_of(st.floats(0, 0.98), st.just(1.0))  # no update that bfloat16 rounds away


def kept(shadow: ShadowModel) -> dict[str, torch.Tensor]:
    """Copies of all averages, by name."""
    return {name: tensor.clone() for name, tensor in (*shadow.named_parameters(), *shadow.named_buffers())}


def all_kept(shadows: ShadowModels) -> dict[str, dict[str, torch.Tensor]]:
    return {label: kept(shadow) for label, shadow in shadows.items()}


def trained(**options) -> tuple[Net, ShadowModels]:
    """A model after a few steps, and two averages of it."""
    model = Net()
    shadows, optimizer = ShadowModels(model, LABELS, **options), sgd(model)
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        shadows.update(model, smoothing={'short': 0.5, 'long': 0.9})
    return model, shadows


@pytest.mark.filterwarnings('ignore:the average.* is kept in bfloat16')
@settings(max_examples=8, deadline=None)
@given(
    smoothings=st.lists(st.tuples(SHARES, SHARES, SHARES), min_size=1, max_size=3),
    dtype=st.sampled_from([None, 'bfloat16', 'float64']),
    skip_nonfinite=st.booleans(),
)
def test_several_averages_equal_separate_ones_to_the_bit(smoothings, dtype, skip_nonfinite):
    model = Net()
    shadows = ShadowModels(model, ['a', 'b', 'c'], dtype=dtype, skip_nonfinite=skip_nonfinite)
    separate = {label: ShadowModel(model, dtype=dtype, skip_nonfinite=skip_nonfinite) for label in shadows}
    optimizer = sgd(model)
    for step, shares in enumerate(smoothings):
        train(model, optimizer, range(step, step + 1))
        by_label = dict(zip(shadows, shares, strict=True))
        shadows.update(model, smoothing=by_label)
        for label, shadow in separate.items():
            shadow.update(model, smoothing=by_label[label])
    for label, shadow in separate.items():
        assert same_bits(kept(shadows[label]), kept(shadow))
        assert shadows[label].num_updates == len(smoothings)


def test_all_averages_share_one_watch_and_one_plan(monkeypatch):
    asked = []
    is_current = Watch.is_current
    monkeypatch.setattr(Watch, 'is_current', lambda watch, module: asked.append(watch) or is_current(watch, module))
    model, shadows = trained()
    plan = shadows['short']._follower.plan
    assert plan is not None
    assert plan is shadows['long']._follower.plan
    asked.clear()
    shadows.update(model, weight=0.5)
    assert asked == [plan.watch]
    assert len(plan.steps) == 1


def test_each_average_is_lent_alone_and_in_any_order():
    model, shadows = trained()
    before, averages = weights(model), all_kept(shadows)
    shadows['short'].swap_in(model)
    shadows['long'].swap_in(model)
    assert same_bits({name: weights(model)[name] for name in averages['long']}, averages['long'])
    shadows['long'].swap_out(model)
    assert same_bits({name: weights(model)[name] for name in averages['short']}, averages['short'])
    with pytest.raises(RuntimeError, match=r"the model holds the average 'short'.* swap_out"):
        shadows.update(model, smoothing=0.5)
    shadows['short'].swap_out(model)
    assert same_bits(weights(model), before)
    assert_same(shadows['long'].averaged_state_dict(model)['last.weight'], averages['long']['last.weight'])


def test_a_member_does_not_update_itself():
    model, shadows = trained()
    remedy = r"update\(model, smoothing=\{'short': \.\.\., 'long': \.\.\.\}\) of the ShadowModels"
    with pytest.raises(RuntimeError, match=rf"'long' is one of 'short' and 'long', .*{remedy}"):
        shadows['long'].update(model, smoothing=0.5)
    with pytest.raises(RuntimeError, match=r'one dtype and device for all\. Call to'):
        shadows['long'].to(dtype='float64')
    with pytest.raises(RuntimeError, match=r'names, so these change for all at once\. Call resolve'):
        shadows['long'].resolve(model, leaving=True)
    assert shadows['long'].num_updates == 4


def test_a_share_for_each_label_or_one_for_all():
    model = One(0.0)
    shadows = ShadowModels(model, LABELS)
    set_(model.weight, 8)
    shadows.update(model, weight=0.5)
    shadows.update(model, weight={'long': 0, 'short': 1})
    assert [shadow.copy_to(model) or model.weight.item() for shadow in shadows.values()] == [8, 4]
    for shares, problem in (
        ({'short': 0.5}, "'long' is missing"),
        ({'short': 0.5, 'long': 0.5, 'lnog': 0.5}, "'lnog' is none"),
    ):
        with pytest.raises(ValueError, match=rf'smoothing must give a share for each .*{problem}'):
            shadows.update(model, smoothing=shares)
    with pytest.raises(ValueError, match=r'smoothing must lie in \[0, 1\], got 2'):
        shadows.update(model, smoothing={'short': 0.5, 'long': 2})
    with pytest.raises(TypeError, match='pass either smoothing or weight'):
        shadows.update(model)
    assert [shadow.num_updates for shadow in shadows.values()] == [2, 2]


@pytest.mark.parametrize(
    ('labels', 'error'),
    [([], 'at least one average'), (['a', 'a'], 'each once'), ('ab', 'a list of names'), ([1], 'must hold names')],
)
def test_labels_are_distinct_names(labels, error):
    with pytest.raises((TypeError, ValueError), match=error):
        ShadowModels(One(), labels)


def test_a_function_sees_the_number_of_updates_of_each_average():
    model, counts = One(1.0), []

    def count(averaged, current, num_averaged):
        counts.append(int(num_averaged))
        return averaged

    shadows = ShadowModels(model, LABELS, avg_fn=count)
    shadows['long'].num_updates = 5
    shadows.update(model)
    shadows.update(model)
    assert counts == [5, 1, 6]
    with pytest.raises(TypeError, match='follows a function of yours'):
        shadows.update(model, smoothing=0.5)


def test_a_state_is_loaded_and_goes_on():
    model, shadows = trained()
    state = saved(shadows.state_dict())
    other = Net(1)
    resumed = ShadowModels(other, LABELS)
    resumed.update(other, smoothing=0.5)  # prepared for tensors that the state may replace
    resumed.load_state_dict(state)
    for each in (shadows, resumed):
        each.update(model, smoothing={'short': 0.5, 'long': 0.9})
    assert_same(all_kept(shadows), all_kept(resumed))
    assert resumed['long'].num_updates == 5


def test_nothing_of_several_averages_is_half_loaded():
    model, shadows = trained()
    state = saved(shadows.state_dict())
    del state['averages']['long']['parameters']['last.weight']
    resumed = ShadowModels(model, LABELS)
    before = all_kept(resumed)
    with pytest.raises(ValueError, match=r'long: .*last\.weight'):
        resumed.load_state_dict(state)
    with pytest.raises(ValueError, match=r"holds the averages 'short', not 'short', 'long'"):
        resumed.load_state_dict({'version': 1, 'averages': {'short': state['averages']['short']}})
    with pytest.raises(ValueError, match='version 2'):
        resumed.load_state_dict({**state, 'version': 2})
    with pytest.raises(ValueError, match=r'shadows\[label\]\.load_state_dict'):
        resumed.load_state_dict(shadows['short'].state_dict())
    assert_same(all_kept(resumed), before)


def test_one_average_is_loaded_alone():
    model, shadows = trained()
    other = ShadowModel(model)
    shadows['long'].load_state_dict(other.state_dict())
    short = kept(shadows['short'])
    assert same_bits(kept(shadows['long']), kept(other))
    shadows.update(model, weight={'short': 0, 'long': 0.5})
    other.update(model, weight=0.5)
    assert same_bits(kept(shadows['long']), kept(other))
    assert short['last.weight'].equal(kept(shadows['short'])['last.weight'])


def test_a_frozen_parameter_of_a_loaded_average_joins_the_others():
    model = Net()
    state = saved(ShadowModel(model).state_dict())
    model.first.requires_grad_(False)
    set_(model.first.weight, 3.0)
    shadows = ShadowModels(model, LABELS)
    shadows['long'].load_state_dict(state)
    with shadows['long'].swapped(model):  # lent before the others have it
        assert same_bits({'': model.first.weight}, {'': state['parameters']['first.weight']})
    with shadows['short'].swapped(model):
        assert model.first.weight.eq(3).all()
    shadows.update(model, smoothing=0.5)
    assert kept(shadows['short'])['first.weight'].eq(3).all()
    expected = torch.lerp(state['parameters']['first.weight'], model.first.weight.detach(), 0.5)
    assert torch.equal(kept(shadows['long'])['first.weight'], expected)


def test_what_one_average_leaves_out_joins_it_again():
    model, shadows = trained()
    shadows['long'].leave_out(['last.weight'])
    shadows.update(model, weight=0)
    assert torch.equal(kept(shadows['long'])['last.weight'], model.last.weight)
    assert not torch.equal(kept(shadows['short'])['last.weight'], model.last.weight)


def test_names_change_for_all_averages_or_for_none():
    model, shadows = trained()
    before = all_kept(shadows)
    model.head = model.last
    del model.last
    with pytest.raises(ValueError, match='nobody'):
        shadows.resolve(model, renamed={'last.weight': 'nobody'})
    assert_same(all_kept(shadows), before)
    shadows['long'].leave_out(['last.weight'])  # so that the second one fails after the first has changed
    with pytest.raises(ValueError, match=r'no average of last\.weight'):
        shadows.resolve(model, renamed={'last.weight': 'head.weight'})
    assert 'last.weight' in kept(shadows['short'])
    shadows.resolve(model, leaving=True, joining=True)
    assert all('head.weight' in each and 'last.weight' not in each for each in all_kept(shadows).values())


def test_names_do_not_change_while_any_of_the_averages_stands_in_a_model():
    model, shadows = trained()
    other, before = copy.deepcopy(model), all_kept(shadows)
    shadows['long'].swap_in(other)
    for changes in ({'renamed': {'last.weight': 'last.weight'}}, {'leaving': True}):
        with pytest.raises(RuntimeError, match=r'swap_out\(model\) before names change'):
            shadows.resolve(model, **changes)
        assert_same(all_kept(shadows), before)
    shadows['long'].swap_out(other)
    assert same_bits(weights(other), weights(model))


def test_all_averages_are_converted_together_and_keep_their_seeds():
    model, shadows = trained()
    shadows['long'].load_state_dict({**shadows['long'].state_dict(), 'seed': 7})
    assert shadows.to(dtype='float64') is shadows
    assert {label: each.state_dict()['seed'] for label, each in shadows.items()} == {'short': 0, 'long': 7}
    shadows.update(model, smoothing=0.5)
    assert {t.dtype for each in shadows.values() for t in each.parameters()} == {torch.float64}


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_of_all_goes_on_together_and_a_copy_of_one_alone(duplicate):
    model, shadows = trained()
    shadows['short'].swap_in(model)
    copied, alone = duplicate(shadows), duplicate(shadows['long'])
    shadows['short'].swap_out(model)
    assert type(alone) is ShadowModel
    assert not copied['short'].is_swapped
    for each in (shadows, copied):
        each.update(model, smoothing={'short': 0.5, 'long': 0.9})
    alone.update(model, smoothing=0.9)
    assert_same(all_kept(copied), all_kept(shadows))
    assert same_bits(kept(alone), kept(shadows['long']))
    assert copied['short']._follower is copied['long']._follower


def test_a_state_of_swapped_averages_returns_the_training_weights():
    model, shadows = trained()
    before = weights(model)
    for shadow in shadows.values():
        shadow.swap_in(model)
    state, held = saved(shadows.state_dict()), saved(model.state_dict())
    other = Net(1)
    resumed = ShadowModels(other, LABELS)
    other.load_state_dict(held)
    resumed.load_state_dict(state)
    for shadow in resumed.values():
        shadow.swap_out(other)
    assert same_bits(weights(other), before)
    resumed.update(other, smoothing=0.5)


def test_a_skipped_element_is_counted_once_for_all_averages():
    model = One(1.0)
    shadows = ShadowModels(model, LABELS, skip_nonfinite=True)
    set_(model.weight, float('nan'))
    shadows.update(model, smoothing=0.5)
    assert shadows.poll_skipped() == 1
    assert all(shadow['weight'].item() == 1 for shadow in all_kept(shadows).values())


def test_one_existing_shadow_stays_what_it_is_under_a_label():
    model = One(0.0)
    shadow = ShadowModel(model)
    shadows = ShadowModels.of_one('ema', shadow)
    assert shadows['ema'] is shadow
    set_(model.weight, 8)
    shadow.update(model, smoothing=0.5)
    shadows.update(model, smoothing={'ema': 0.5})
    copied = copy.deepcopy(shadows)
    assert kept(copied['ema'])['weight'].item() == 6
    copied.update(model, weight=1)
    assert kept(copied['ema'])['weight'].item() == 8
    assert kept(shadow)['weight'].item() == 6
    assert re.fullmatch(r'ShadowModels\(ema=ShadowModel\(.*2 updates\)\)', repr(shadows))


def test_torchs_averaging_function_makes_each_average_as_torch_does():
    model = One(0.0)
    shadows = ShadowModels(model, LABELS, avg_fn=get_ema_avg_fn(0.5))
    for value in (4, 8):
        set_(model.weight, value)
        shadows.update(model)
    assert [each['weight'].item() for each in all_kept(shadows).values()] == [6, 6]
