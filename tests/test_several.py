"""Several averages in one Trainer: each is what it is alone; evaluators, metrics and checkpoints name them."""

import copy
import math
import pickle

import pytest
import torch
import toy
from composer import Callback
from composer.core import Event
from composer.loggers import InMemoryLogger
from toy import bits, make_evaluator

from composer_ema import EMA, SWA, ShadowModel
from composer_ema.checkpoints.labels import continued
from composer_ema.run.average import Averages
from composer_ema.trainer.weight_average import WeightAverage

#: Each average alone, and its half-life or whatever makes it, by label.
ALONE = {
    'short': {'half_life': '2ba'},
    'long': {'half_life': '7sp'},
    'wide': {'power': 0.2},
    'all': {'average': 'equal'},
}
SEVERAL = {
    'half_life': {'short': '2ba', 'long': '7sp'},
    'power': {'wide': 0.2},
    'average': {'all': 'equal'},
    'update_interval': '1ba',
}


def averages_of(algorithm: WeightAverage) -> dict[str, dict[str, bytes]]:
    return {
        label: bits({**average['parameters'], **average['buffers']})
        for label, average in algorithm.state_dict()['averages'].items()
    }


class Sees(Callback):
    """Notes which average the model holds at each forward pass of an evaluator, and at any other event none."""

    def __init__(self, *algorithms: WeightAverage) -> None:
        self.algorithms = algorithms
        self.seen: list[tuple[str | None, str]] = []
        self.training: dict[str, bytes] = {}

    def run_event(self, event, state, logger):
        if event is Event.BATCH_END:
            self.training = bits(state.model)
        if event in (Event.EVAL_BEFORE_FORWARD, Event.PREDICT_BEFORE_FORWARD):
            label = state.dataloader_label if event is Event.EVAL_BEFORE_FORWARD else 'predict'
            self.seen.append((label, self.held(state.model)))
        elif event in (Event.BATCH_START, Event.BATCH_CHECKPOINT, Event.FIT_END):
            assert not any(algorithm._averages.lent for algorithm in self.algorithms)

    def held(self, model) -> str:
        held = bits(dict(model.named_parameters()))
        if held == {name: value for name, value in self.training.items() if name in held}:
            return 'training'
        found = {label: each for algorithm in self.algorithms for label, each in averages_of(algorithm).items()}
        return next(label for label, each in found.items() if held == {name: each[name] for name in held})


@pytest.fixture(scope='module')
def plain():
    run = toy.make_trainer()
    run.fit()
    return bits(run.state.model)


def test_each_of_several_averages_is_what_it_is_alone(trainer, plain):
    several = EMA(**SEVERAL)
    run = trainer([several], eval_dataloader=make_evaluator(interval='1ba'))
    run.fit()
    assert bits(run.state.model) == plain
    for label, arguments in ALONE.items():
        alone = EMA(**arguments, update_interval='1ba')
        trainer([alone]).fit()
        assert averages_of(alone)['ema'] == averages_of(several)[label]


def test_evaluators_see_the_average_that_they_name_and_else_the_first(trainer, plain):
    ema = EMA(**SEVERAL, evaluate_with={'b': 'long', 'c': 'training', 'predict': 'all'})
    sees = Sees(ema)
    evaluators = [make_evaluator(label, '1ba') for label in 'abc']
    run = trainer([ema], callbacks=[sees], eval_dataloader=evaluators, max_duration='4ba')
    run.fit()
    assert set(sees.seen[3:]) == {('a', 'short'), ('b', 'long'), ('c', 'training')}
    sees.seen.clear()
    run.predict(toy.make_data(4, seed=3))
    assert sees.seen == [('predict', 'all')]


def test_an_evaluation_shares_the_buffers_of_its_own_average_and_the_end_those_of_all(trainer, monkeypatch):
    shared = []
    monkeypatch.setattr(ShadowModel, 'broadcast_buffers', lambda shadow: shared.append(shadow))
    ema = EMA(**SEVERAL, evaluate_with={'b': 'long', 'c': 'wide', 'd': 'training'})
    trainer([ema], eval_dataloader=[make_evaluator(label, '1ba') for label in 'abcd'], max_duration='1ba').fit()
    labels = {id(shadow): label for label, shadow in ema.ema_model.items()}
    assert [labels[id(shadow)] for shadow in shared] == ['short', 'long', 'wide', *ALONE]


@pytest.mark.parametrize('is_swa_first', [False, True])
def test_ema_and_swa_take_turns_in_one_trainer(trainer, plain, is_swa_first, tmp_path):
    ema = EMA(half_life={'short': '2ba', 'long': '4ba'}, evaluate_with={'l': 'long'})
    swa = SWA('1ba', update_interval='1ba', evaluate_with={'s': 'swa', 't': 'training'}, refresh_batchnorm=False)
    sees = Sees(ema, swa)
    evaluators = [make_evaluator(label, '1ba') for label in ('t', 'l', 's', 'unnamed')]
    run = trainer(
        [swa, ema] if is_swa_first else [ema, swa],
        callbacks=[sees],
        eval_dataloader=evaluators,
        save_folder=str(tmp_path),
        save_interval='1ba',
        save_filename='ba{batch}.pt',
    )
    run.fit()
    first = 'swa' if is_swa_first else 'short'
    assert set(sees.seen[8:]) == {('t', 'training'), ('l', 'long'), ('s', 'swa'), ('unnamed', first)}
    assert bits(run.state.model) == plain
    alone = SWA('1ba', update_interval='1ba', refresh_batchnorm=False)
    trainer([alone]).fit()
    assert averages_of(alone) == averages_of(swa)
    state = torch.load(tmp_path / 'ba4.pt', weights_only=False)['state']
    assert all('training_weights' not in algorithm for _, algorithm in state['algorithms'])
    again = [EMA(half_life={'short': '2ba', 'long': '4ba'}), SWA('1ba', update_interval='1ba', refresh_batchnorm=False)]
    trainer(again, load_path=str(tmp_path / 'ba4.pt')).fit()
    assert [averages_of(each) for each in again] == [averages_of(ema), averages_of(swa)]


class Raises(Callback):
    is_due = True

    def eval_batch_end(self, state, logger):
        if self.is_due:
            self.is_due = False
            raise KeyboardInterrupt


def test_training_goes_on_after_an_evaluation_that_raised_whoever_lent(trainer):
    """The SWA comes first and must not take the average of the EMA for the training weights."""
    ends = []
    for algorithms in ([], [SWA('1ba', update_interval='1ba', refresh_batchnorm=False), EMA('2ba')]):
        run = trainer(algorithms, callbacks=[Raises()])
        run.fit(duration='2ba')
        with pytest.raises(KeyboardInterrupt):
            run.eval(make_evaluator('eval'))
        for ema in algorithms[1:]:
            ema.get_ema_model(run.state.model)
        run.fit(duration='2ba')
        ends.append(bits(run.state.model))
    assert ends[0] == ends[1]


def test_what_cannot_stand_together_is_refused_with_a_remedy(trainer):
    with pytest.raises(ValueError, match=r"Pass one with several half-lives: EMA\(half_life=\{'short'"):
        trainer([EMA('2ba'), EMA('4ba')])
    with pytest.raises(ValueError, match=r"evaluate_with gives the evaluator 'eval' 'ema' in one .* 'swa' in another"):
        trainer([EMA('2ba', evaluate_with={'eval': 'ema'}), SWA(evaluate_with={'eval': 'swa'})])
    with pytest.raises(ValueError, match="'ema' of EMA and 'swa' of SWA, and an export holds one"):
        trainer([EMA('2ba', export_weights='ema'), SWA(export_weights='swa')])
    with pytest.raises(ValueError, match="EMA and SWA in one Trainer both call an average 'swa'"):
        trainer([EMA(half_life={'swa': '2ba'}), SWA()])


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'half_life': {'long': '1'}}, r"half_life\['long'\] takes the units .* half_life=\{'long': '1ba'\}"),
        ({'half_life': {}}, 'half_life={} names no average'),
        ({'half_life': {'a': '1ba'}, 'power': {}}, 'power={} names no average'),
        ({'half_life': {'a': '1ba'}, 'warmup': {}}, 'warmup={} names no average'),
        ({'half_life': {'1a': '1ba'}}, 'label .1a.. A label starts with a letter'),
        ({'half_life': {'a' * 65: '1ba'}}, 'at most 64 letters'),
        ({'half_life': {'a': None}}, r"half_life\['a'\] is None"),
        ({'half_life': {'a': '1ba'}, 'smoothing': 0.9}, r'smoothing=0\.9 has no label'),
        ({'half_life': {'a': '1ba'}, 'power': {'a': 0.1}}, "power and half_life both make an average 'a'"),
        ({'half_life': {'training': '1ba'}}, "calls an average 'training'"),
        ({'half_life': {'a b': '1ba'}}, "got the label 'a b'"),
        ({'average': {'a': 'exponential'}}, 'does not say which exponential average'),
        ({'smoothing': {'a': 2}}, r'a: smoothing must lie in \[0, 1\]'),
        ({'power': {'a': 0.1}, 'warmup': 0.1}, 'no average is exponential'),
        ({'power': {'a': 0.1}, 'warmup': {'a': 0.1}}, 'a: warmup has no effect on a power average'),
        ({'half_life': {'long': '1ba'}, 'warmup': {'lnog': 0.1}}, "Did you mean 'long'"),
        ({'warmup': {'a': 0.1}}, 'names averages by label, and the only average has none'),
        ({'half_life': {'a': '1ba'}, 'evaluate_with': {'eval': 'ema'}}, r"evaluate_with\['eval'\] must be 'a' or"),
        ({'half_life': {'a': '1ba'}, 'export_weights': 'ema'}, "export_weights must be 'a' or 'training'"),
        ({'half_life': {'a': '1ba'}, 'avg_fn': torch.lerp}, 'decide how much of the average is kept'),
    ],
)
def test_labels_are_checked(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        EMA(**arguments)


def test_a_horizon_too_long_for_the_run_names_its_label(trainer):
    with pytest.warns(UserWarning, match=r"half_life\['long'\]='9ep' in a run of 2 epochs: the average 'long' will"):
        trainer([EMA(half_life={'short': '2ba', 'long': '9ep'})]).fit()


def test_metrics_go_by_label_and_skipped_elements_are_counted_once(trainer):
    logger = InMemoryLogger()
    ema = EMA(half_life={'short': '2ba'}, average={'all': 'equal'}, bias_correction=True, skip_nonfinite=True)
    trainer([ema], loggers=[logger]).fit()
    logged = {
        name for name in logger.data if '/' in name and not name.startswith(('loss', 'time', 'trainer', 'metrics'))
    }
    assert logged == {
        'short/smoothing', 'short/num_updates', 'short/relative_distance', 'all/num_updates', 'all/relative_distance',
        'ema/skipped_elements',
    }  # fmt: skip


def test_several_averages_are_read_by_label(trainer):
    ema = EMA(**SEVERAL)
    assert ema.labels == ('short', 'long', 'wide', 'all')
    assert {label: str(span) for label, span in ema.half_life.items()} == SEVERAL['half_life']
    assert ema.smoothing == {'short': pytest.approx(2**-0.5), 'long': None, 'wide': None, 'all': None}
    assert str(EMA(half_life={'a': '1ep', 'b': '2ep'}).update_interval) == '1ba'
    assert ema.ema_model is None
    run = trainer([ema])
    run.fit()
    assert ema.ema_model.keys() == set(ALONE)
    assert (ema.shadow(), ema.shadow('long')) == (ema.ema_model['short'], ema.ema_model['long'])
    other = toy.make_model(1)
    for label in ALONE:
        ema.get_ema_model(other, average=label)
        assert bits(other)['module.0.weight'] == averages_of(ema)[label]['module.0.weight']
    with pytest.raises(ValueError, match=r"no average is called 'lnog'.* Did you mean 'long'"):
        ema.get_ema_model(other, 'lnog')
    with pytest.raises(ValueError, match='keeps averages by label'):
        ema.ema_model = ShadowModel(other)


def test_one_update_moves_all_averages(trainer):
    ema = EMA(**SEVERAL)
    trainer([ema]).fit()
    shadows = ema.ema_model.values()
    assert len({id(shadow._follower) for shadow in shadows}) == 1
    assert {shadow.num_updates for shadow in shadows} == {6}


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_goes_on_alone(trainer, duplicate):
    ema, swa = EMA(**SEVERAL), SWA('1ba', update_interval='1ba')
    trainer([ema, swa]).fit()
    copied = duplicate(ema)
    assert averages_of(copied) == averages_of(ema)
    run = trainer([copied])
    run.fit()
    assert averages_of(copied) == averages_of(ema)


class TestResumed:
    def saved(self, trainer, path, algorithm, batch: int = 3) -> str:
        run = trainer([algorithm], max_duration=f'{batch}ba')
        run.fit()
        return run.save_checkpoint(str(path / 'middle.pt'))

    def test_several_averages_resume_to_the_bit(self, trainer, tmp_path):
        whole, resumed = (
            EMA(**SEVERAL, bias_correction={'short': True}),
            EMA(**SEVERAL, bias_correction={'short': True}),
        )
        trainer([whole], save_folder=str(tmp_path), save_interval='1ba', save_filename='ba{batch}.pt').fit()
        trainer([resumed], load_path=str(tmp_path / 'ba2.pt')).fit()
        assert averages_of(resumed) == averages_of(whole)
        assert resumed.state_dict()['averages'].keys() == whole.state_dict()['averages'].keys()

    def test_all_continue_from_the_only_one(self, trainer, tmp_path):
        one = EMA('2ba')
        path = self.saved(trainer, tmp_path, one)
        several = EMA(half_life={'short': '2ba', 'long': '5ba'}, bias_correction={'long': True})
        with pytest.warns(UserWarning, match=r"'short' \(half_life=2ba\) continues from 'ema', 'long' .* from 'ema'"):
            run = trainer([several], load_path=path)
        assert averages_of(several) == dict.fromkeys(['short', 'long'], averages_of(one)['ema'])
        run.fit()
        whole = EMA('2ba')
        trainer([whole]).fit()
        assert averages_of(several)['short'] == averages_of(whole)['ema'] != averages_of(several)['long']
        assert several.ema_model['long'].num_updates == 6

    def test_one_continues_from_that_of_its_profile(self, trainer, tmp_path):
        several = EMA(half_life={'short': '2ba', 'long': '3ba'})
        path = self.saved(trainer, tmp_path, several)
        one = EMA('3ba')
        with pytest.warns(UserWarning, match=r"'ema' \(half_life=3ba\) continues from 'long', 'short' is not kept"):
            trainer([one], load_path=path).fit()
        whole = EMA('3ba')
        trainer([whole]).fit()
        assert averages_of(one) == averages_of(whole)

    def test_one_that_is_none_of_them_is_refused_with_the_remedy(self, trainer, tmp_path):
        path = self.saved(trainer, tmp_path, EMA(half_life={'short': '2ba', 'long': '3ba'}))
        with pytest.raises(ValueError, match=r"'short' \(half_life=2ba\), 'long' .* 'ema' \(half_life=5ba\): neither"):
            trainer([EMA('5ba')], load_path=path)
        with pytest.warns(UserWarning, match="'long' continues with half_life=5ba, 'short' is not kept any longer"):
            trainer([EMA(half_life={'long': '5ba'})], load_path=path)

    def test_a_new_one_beside_those_that_continue_starts_at_the_weights(self, trainer, tmp_path):
        path = self.saved(trainer, tmp_path, EMA(half_life={'short': '2ba', 'long': '3ba'}))
        more = EMA(half_life={'short': '2ba', 'long': '3ba'}, average={'all': 'equal'})
        sees = Sees(more)
        evaluators = [make_evaluator('a', '1ba')]
        with pytest.warns(UserWarning, match=r"'all' \(equal\) is new and starts at the weights"):
            run = trainer([more], load_path=path, callbacks=[sees], eval_dataloader=evaluators)
        run.eval()  # before its first update
        assert [label for _, label in sees.seen] == ['short']
        run.fit(duration='1ba')
        assert averages_of(more)['all']['module.0.weight'] == bits(run.state.model)['module.0.weight']
        run.fit(duration='2ba')
        counts = {label: average.shadow.num_updates for label, average in more._averages}
        assert counts == {'short': 6, 'long': 6, 'all': 3}

    def test_nothing_of_several_is_half_loaded(self, trainer, tmp_path):
        ema = EMA(**SEVERAL)
        trainer([ema]).fit()
        before, state = averages_of(ema), copy.deepcopy(ema.state_dict())
        for average in state['averages'].values():
            average['parameters']['module.0.weight'] += 1
        state['averages']['all']['last_update'] = {'ba': -1}
        with pytest.raises(ValueError, match='last_update'):
            ema.load_state_dict(state)
        state['averages']['all'] |= {'last_update': None, 'parameters': {}}
        with pytest.raises(ValueError, match=r'all: .*module\.0\.weight'):
            ema.load_state_dict(state)
        assert averages_of(ema) == before


@pytest.mark.parametrize(
    ('saved', 'wanted', 'sources'),
    [
        ({'ema': 'x'}, {'ema': 'y'}, {'ema': 'ema'}),
        ({'a': 'x', 'b': 'y'}, {'c': 'y', 'd': 'x'}, {'c': 'b', 'd': 'a'}),
        ({'a': 'x', 'b': 'y'}, {'a': 'y', 'c': 'y'}, {'a': 'a', 'c': 'b'}),
        ({'a': 'x', 'b': 'x'}, {'c': 'x', 'd': 'x', 'e': 'x'}, {'c': 'a', 'd': 'b'}),
    ],
)
def test_labels_go_before_profiles_and_each_saved_average_continues_once(saved, wanted, sources):
    assert continued(saved, wanted, 'it').sources == sources


def test_hidden_averages_are_updated_and_saved_but_not_shown(trainer, tmp_path):
    """What a second holder, such as one that writes snapshots, adds to an algorithm."""

    def hiding() -> EMA:
        ema, wide = EMA('2ba'), EMA(power=0.2)
        ema._keeper.averages = Averages(
            ema._keeper.kept, ema._keeper.settings, hidden={'wide': wide._keeper.kept['ema']}
        )
        return ema

    logger, ema = InMemoryLogger(), hiding()
    saves = {'save_folder': str(tmp_path), 'save_interval': '3ba', 'save_filename': 'ba{batch}.pt'}
    trainer([ema], loggers=[logger], eval_dataloader=make_evaluator(interval='1ba'), **saves).fit()
    assert ema.labels == ('ema',)
    assert not any(name.startswith('wide') for name in logger.data)
    alone = EMA(power=0.2)
    trainer([alone]).fit()
    assert averages_of(ema)['wide'] == averages_of(alone)['ema']
    resumed, without = hiding(), EMA('2ba')
    trainer([resumed], load_path=str(tmp_path / 'ba3.pt')).fit()
    trainer([without], load_path=str(tmp_path / 'ba3.pt'), **saves, save_overwrite=True).fit()
    assert averages_of(resumed) == averages_of(ema)
    assert averages_of(without) == {'ema': averages_of(ema)['ema']}
    later = hiding()
    trainer([later], load_path=str(tmp_path / 'ba6.pt'), max_duration='3ep').fit()
    counts = {label: average['num_updates'] for label, average in later.state_dict()['averages'].items()}
    assert counts == {'ema': 9, 'wide': 3}


@pytest.mark.parametrize(('interval', 'start'), [('1ba', '0ba'), ('2ba', '0ba'), ('2ba', '2ba'), ('1ep', '0ba')])
def test_the_unit_of_a_half_life_does_not_matter_where_batches_are_alike(trainer, interval, start):
    data = toy.make_data(12)  # three batches of four samples, of three tokens each
    ema = EMA(
        half_life={'ba': '3ba', 'ep': '1ep', 'sp': '12sp', 'tok': '36tok', 'dur': '0.5dur'},
        bias_correction=True,
        update_interval=interval,
        ema_start=start,
        shadow_dtype='float64',
    )
    trainer([ema], train_dataloader=data).fit()
    assert ema.ema_model['ba'].num_updates >= 2
    first, *others = (dict(ema.ema_model[label].named_parameters()) for label in ema.labels)
    for each in others:
        for name, tensor in each.items():
            torch.testing.assert_close(tensor, first[name], rtol=1e-12, atol=1e-14)


def test_the_first_update_after_a_start_stands_for_the_samples_of_its_batch(trainer):
    # Batches have 4, 4, 2 samples. The first update is that of batch 3, the second that of batch 4.
    ema = EMA('4sp', ema_start='3ba', update_interval='1ba', bias_correction=True)
    trainer([ema], max_duration='4ba').fit()
    state = ema.state_dict()['averages']['ema']
    assert (state['started_at']['sp'], state['started_at']['ba']) == (8, 2)
    assert state['profile']['log_kept'] == pytest.approx(-math.log(2) * (2 + 4) / 4)


def test_a_state_taken_while_the_average_of_another_algorithm_stands_in_the_model_has_the_stash(trainer):
    ema, swa = EMA('2ba'), SWA('1ba', refresh_batchnorm=False)
    run = trainer([ema, swa])
    run.fit()
    weights = bits(dict(run.state.model.named_parameters()))
    assert swa.swa_model is not None
    with swa.swa_model.swapped(run.state.model):
        assert bits(dict(run.state.model.named_parameters())) != weights
        stash = bits(copy.deepcopy(ema.state_dict()['training_weights']))
    assert {name: stash[name] for name in weights} == weights
