"""WeightAverage in the Trainer of transformers: the contract, against the real library."""

from __future__ import annotations

import copy
import functools
import gc
import json
import pickle
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from plain import assert_same, same_bits
from safetensors.torch import load_file
from sharded import ranks

pytest.importorskip('transformers')
pytest.importorskip('accelerate')

from torch.utils.data import IterableDataset
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers_runs import SAMPLES, STEPS, Record, Sentences, averaged, build, network, run_in_ranks, weights

from composer_ema import CheckpointError, load_average, read_checkpoint
from composer_ema.checkpoints.inspection import TRAINING_WEIGHTS, describe
from composer_ema.shadow.shadow_model import ShadowModel
from composer_ema.transformers import WeightAverage

pytestmark = pytest.mark.filterwarnings(
    'ignore:mtime may not be reliable:UserWarning',  # of the Trainer, which saves more often than once a second
    'ignore:.*pin_memory.*:UserWarning',
)
FILE = 'weight_average.pt'


def by_formula(trained, half_life=2.0):
    """The average of the weights before training and after each step, in float64; the first step is copied."""
    _, first, *later = trained
    average = {name: tensor.double() for name, tensor in first.items()}
    for one in later:
        for name, tensor in average.items():
            tensor += (1 - 2 ** (-1 / half_life)) * (one[name] - tensor)
    return average


def assert_close(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name].double(), tensor, rtol=1e-5, atol=1e-7)


def distance(average, weights):
    one, other = (torch.cat([each[name].double().flatten() for name in weights]) for each in (average, weights))
    return float((one - other).norm() / other.norm())


@pytest.fixture(scope='module', autouse=True)
def _quick_collections():
    """The Trainer collects garbage before it trains, and would look at all that the other libraries have imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run with an average, and one without; what both trained."""
    folder = tmp_path_factory.mktemp('run')
    bare, record, average = Record(), Record(), WeightAverage('2ba')
    build(folder / 'bare', record=bare).train()  # evaluation draws random numbers, without an average, too
    trainer = build(folder / 'averaged', average, record=record)
    trainer.train()
    assert len(record.trained) == STEPS + 1
    return SimpleNamespace(
        folder=folder / 'averaged', average=average, trainer=trainer, record=record, bare=bare,
        evaluated=list(record.evaluated),
    )  # fmt: skip


def checkpoint(run, step):
    return run.folder / f'checkpoint-{step}'


class TestTraining:
    def test_training_is_bit_identical_with_and_without_the_average(self, run):
        for averaged_run, bare in zip(run.record.trained, run.bare.trained, strict=True):
            assert same_bits(averaged_run, bare)

    def test_the_average_is_the_formula_over_the_steps_of_the_optimizer(self, run):
        assert run.average.shadow().num_updates == STEPS
        assert_close(averaged(run.average), by_formula(run.record.trained))

    def test_after_training_the_model_holds_the_training_weights(self, run):
        assert same_bits(weights(run.trainer.model), run.record.trained[-1])

    def test_evaluations_during_training_see_the_average(self, run):
        assert [step for step, _ in run.evaluated] == [2, 4, 6]
        for step, seen in run.evaluated:
            assert_close(seen, by_formula(run.record.trained[: step + 1]))

    @pytest.mark.parametrize('ask', ['evaluate', 'predict', 'legacy'])
    def test_evaluation_and_prediction_after_training_see_the_average(self, run, ask, monkeypatch):
        trainer = run.trainer
        monkeypatch.setattr(trainer.args, 'use_legacy_prediction_loop', ask == 'legacy')
        run.record.evaluated.clear()
        trainer.predict(Sentences(4)) if ask == 'predict' else trainer.evaluate()
        [(_, seen)] = run.record.evaluated
        assert same_bits(seen, averaged(run.average))
        assert same_bits(weights(trainer.model), run.record.trained[-1])

    def test_after_an_evaluation_that_raises_the_model_holds_the_training_weights(self, run):
        def raises(_):
            raise KeyboardInterrupt

        run.trainer.compute_metrics = raises
        try:
            with pytest.raises(KeyboardInterrupt):
                run.trainer.evaluate()
        finally:
            run.trainer.compute_metrics = None
        assert same_bits(weights(run.trainer.model), run.record.trained[-1])

    def test_a_prediction_inside_an_evaluation_leaves_the_average_in_the_model(self, run):
        seen = []

        def metrics(_):
            run.trainer.compute_metrics = None
            run.trainer.predict(Sentences(4))
            seen.append(weights(run.trainer.model))
            return {}

        run.trainer.compute_metrics = metrics
        run.trainer.evaluate()
        assert same_bits(seen[0], averaged(run.average))
        assert same_bits(weights(run.trainer.model), run.record.trained[-1])

    def test_the_average_is_saved_as_a_model_inside_swapped(self, run, tmp_path):
        with run.average.swapped(run.trainer.model):
            run.trainer.save_model(str(tmp_path))
        assert same_bits(load_file(tmp_path / 'model.safetensors'), averaged(run.average))
        assert same_bits(weights(run.trainer.model), run.record.trained[-1])
        run.trainer.save_model(str(tmp_path))
        assert same_bits(load_file(tmp_path / 'model.safetensors'), run.record.trained[-1])


class TestCheckpoints:
    def test_checkpoints_hold_the_training_weights_and_the_average_beside_them(self, run):
        for step in (1, 4):
            folder = checkpoint(run, step)
            assert same_bits(load_file(folder / 'model.safetensors'), run.record.trained[step])
            assert_close(load_average(folder), by_formula(run.record.trained[: step + 1]))
            with pytest.raises(CheckpointError, match=rf'The average is beside it: pass the folder, {folder}\.'):
                load_average(folder / 'model.safetensors')
        assert not [file.name for file in run.folder.rglob('*') if 'unfinished' in file.name]

    def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(self, run):
        record, average = Record(), WeightAverage('2ba')
        trainer = build(run.folder, average, record=record, save_strategy='no')
        trainer.train(resume_from_checkpoint=str(checkpoint(run, 4)))  # in the middle of an epoch
        assert len(record.trained) == 3
        assert same_bits(record.trained[0], run.record.trained[4])
        assert same_bits(record.trained[-1], run.record.trained[-1])
        assert_same(average._keeper.state_dict(), run.average._keeper.state_dict())

    def test_the_newest_checkpoint_is_found_as_the_trainer_finds_it(self, run, tmp_path):
        shutil.copytree(checkpoint(run, 3), tmp_path / 'checkpoint-3')
        average = WeightAverage('2ba')
        build(tmp_path, average, save_strategy='no').train(resume_from_checkpoint=True)
        assert_same(average._keeper.state_dict(), run.average._keeper.state_dict())

    def test_without_its_file_a_new_average_starts_with_a_warning(self, run, tmp_path):
        folder = tmp_path / 'checkpoint-4'
        shutil.copytree(checkpoint(run, 4), folder)
        (folder / FILE).unlink()
        record, average = Record(), WeightAverage('2ba')
        trainer = build(tmp_path, average, record=record, save_strategy='no', eval_strategy='no')
        with pytest.warns(UserWarning, match=rf'{folder} holds no {FILE}.* average begins after step 4\.'):
            trainer.train(resume_from_checkpoint=str(folder))
        assert_close(averaged(average), by_formula(record.trained))

    def test_a_damaged_average_ends_the_run_before_training(self, run, tmp_path):
        folder = tmp_path / 'checkpoint-4'
        shutil.copytree(checkpoint(run, 4), folder)
        content = bytearray((folder / FILE).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / FILE).write_bytes(content)
        with pytest.raises(CheckpointError, match='damaged'):
            build(tmp_path, WeightAverage('2ba'), save_strategy='no').train(resume_from_checkpoint=str(folder))

    def test_a_checkpoint_resumes_without_the_callback(self, run):
        record = Record()
        build(run.folder, record=record, save_strategy='no').train(resume_from_checkpoint=str(checkpoint(run, 4)))
        assert same_bits(record.trained[-1], run.record.trained[-1])

    def test_inspect_and_export_read_the_folder(self, run, tmp_path):
        from composer_ema import export

        folder = checkpoint(run, 6)
        found = describe(folder)
        assert (found.model_slot, found.averages[0].algorithm) == (TRAINING_WEIGHTS, 'WeightAverage')
        assert found.averages[0].num_updates == STEPS
        export(folder, tmp_path / 'average.safetensors')
        assert same_bits(load_file(tmp_path / 'average.safetensors'), averaged(run.average))
        model = network()
        model.load_state_dict(load_average(folder, model))
        assert same_bits(weights(model), averaged(run.average))
        with pytest.raises(CheckpointError, match='would replace what training resumes from'):
            export(folder, folder / 'model.safetensors')
        with pytest.raises(CheckpointError, match=r'a file of the checkpoint .*checkpoint-5: .* would replace it'):
            export(folder, checkpoint(run, 5) / 'model.safetensors')
        with pytest.raises(CheckpointError, match=r'Pass one of the checkpoints in it, such as .*checkpoint-'):
            load_average(run.folder)

    def test_tied_weights_and_files_in_parts_are_read(self, tmp_path):
        class Tokens(Sentences):
            def __getitem__(self, index):
                return {'input_ids': self.tokens[index], 'labels': self.tokens[index]}

        config = GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8, loss_type='ForCausalLM')
        model, average = GPT2LMHeadModel(config), WeightAverage('2ba')
        options = {'train_dataset': Tokens(8), 'max_steps': 1, 'eval_strategy': 'no'}
        build(tmp_path, average, model=model, **options).train()
        folder = tmp_path / 'checkpoint-1'
        loaded = load_average(folder)
        assert loaded.keys() == model.state_dict().keys()  # the file has one name of the tied weight
        assert same_bits(loaded, {**loaded, **averaged(average)})
        model.save_pretrained(folder, max_shard_size='2KB')
        (folder / 'model.safetensors').unlink()
        assert same_bits(load_average(folder), loaded)
        (folder / 'model.safetensors.index.json').write_text('{}')
        with pytest.raises(CheckpointError, match='has no weight_map'):
            load_average(folder)

    def test_adapters_are_averaged_alone_and_resume(self, tmp_path):
        peft = pytest.importorskip('peft')

        def adapted():
            return peft.get_peft_model(network(), peft.LoraConfig(target_modules=['query'], r=2, task_type='SEQ_CLS'))

        average, resumed, model = WeightAverage('2ba'), WeightAverage('2ba'), adapted()
        options = {'label_names': ['labels'], 'eval_steps': 1}
        build(tmp_path, average, model=model, **options).train()
        assert all('lora' in name or 'classifier' in name for name in averaged(average))
        again = build(
            tmp_path, resumed, model=adapted(), load_best_model_at_end=True, metric_for_best_model='score',
            greater_is_better=True, compute_metrics=lambda _: {'score': again.state.global_step}, **options,
        )  # fmt: skip
        again.train(resume_from_checkpoint=str(tmp_path / 'checkpoint-4'))
        assert same_bits(averaged(resumed), averaged(average))
        held = weights(again.model)
        assert same_bits({name: held[name] for name in averaged(average)}, averaged(average))  # the best was the last


class TestBest:
    """``load_best_model_at_end``: what scored best is an average, and so the model holds that."""

    def trained(self, folder, average, score, **arguments):
        trainer = build(
            folder, average, record=Record(), load_best_model_at_end=True, metric_for_best_model='score',
            greater_is_better=True, eval_steps=1, save_total_limit=1,
            compute_metrics=lambda _: {'score': score[trainer.state.global_step]}, **arguments,
        )  # fmt: skip
        trainer.train()
        return trainer

    def test_the_model_holds_the_average_of_the_best_checkpoint(self, tmp_path, caplog):
        average = WeightAverage('2ba')
        trainer = self.trained(tmp_path, average, {1: 0, 2: 1, 3: 9, 4: 2, 5: 3, 6: 4})
        assert trainer.state.best_model_checkpoint.endswith('checkpoint-3')
        record = next(each for each in trainer.callback_handler.callbacks if isinstance(each, Record))
        assert_close(weights(trainer.model), by_formula(record.trained[:4]))
        assert 'holds the average' in caplog.text
        assert {path.name for path in tmp_path.glob('checkpoint-*')} == {'checkpoint-3'}
        record.evaluated.clear()
        trainer.evaluate()
        assert same_bits(record.evaluated[0][1], weights(trainer.model))

    def test_it_holds_the_training_weights_where_those_were_evaluated(self, tmp_path):
        average = WeightAverage('2ba', evaluate_with={'eval': 'training'})
        trainer = self.trained(tmp_path, average, {1: 0, 2: 1, 3: 9, 4: 2, 5: 3, 6: 4})
        record = next(each for each in trainer.callback_handler.callbacks if isinstance(each, Record))
        assert same_bits(weights(trainer.model), record.trained[3])


class TestSettings:
    def test_several_averages_are_evaluated_by_the_name_of_the_data(self, tmp_path):
        average = WeightAverage(
            {'short': '1ba', 'long': '4ba'}, evaluate_with={'eval_raw': 'training', 'eval_long': 'long'}
        )
        record = Record()
        data = {name: Sentences(4) for name in ('first', 'long', 'raw')}
        build(tmp_path, average, record=record, eval_dataset=data, save_strategy='no').train()
        seen = [one for step, one in record.evaluated if step == 6]
        assert_close(seen[0], by_formula(record.trained, 1.0))
        assert_close(seen[1], by_formula(record.trained, 4.0))
        assert same_bits(seen[2], record.trained[-1])

    @pytest.mark.parametrize(
        ('half_life', 'options', 'steps'),
        [
            ('0.5dur', {}, 3),
            ('0.5dur', {'max_steps': 4}, 2),
            ('1ep', {}, 3),
            ('16sp', {}, 2),
            ('96tok', {'include_num_input_tokens_seen': True}, 2),
        ],
    )
    def test_half_lives_in_every_unit(self, tmp_path, half_life, options, steps):
        average, record = WeightAverage(half_life), Record()
        options = {'save_strategy': 'no', 'eval_strategy': 'no', **options}
        build(tmp_path, average, record=record, **options).train()
        assert_close(averaged(average), by_formula(record.trained, steps))

    def test_samples_of_an_uneven_epoch_are_counted_as_they_are(self, tmp_path):
        average = WeightAverage('10sp')
        options = {'save_strategy': 'no', 'eval_strategy': 'no'}
        build(tmp_path, average, train_dataset=Sentences(18), **options).train()  # 5 batches, 3 steps: 8 + 8 + 2
        [state] = average._keeper.state_dict()['averages'].values()
        assert state['last_update'] == {'iter': 0, 'ep': 2.0, 'ba': 6, 'sp': 36, 'tok': 0}

    def test_updates_once_an_epoch_come_at_its_end(self, tmp_path):
        average, record = WeightAverage(average='equal', update_interval='1ep'), Record()
        options = {'save_strategy': 'no', 'eval_strategy': 'no', 'max_steps': 8}
        build(tmp_path, average, record=record, **options).train()  # ends within the third epoch
        assert average.shadow().num_updates == 2
        ends = [record.trained[3], record.trained[6]]
        assert_close(averaged(average), {name: (ends[0][name].double() + ends[1][name]) / 2 for name in ends[0]})

    def test_an_epoch_has_ended_where_its_last_step_is_evaluated_and_saved(self, tmp_path):
        average, again = (WeightAverage(average='equal', update_interval='1ep') for _ in range(2))
        build(tmp_path / 'whole', average, record=(record := Record()), eval_steps=3).train()
        assert [same_bits(seen, record.trained[step]) for step, seen in record.evaluated] == [True, False]
        resumed = build(tmp_path / 'again', again)
        resumed.train(resume_from_checkpoint=str(tmp_path / 'whole' / 'checkpoint-3'))
        assert again.shadow().num_updates == average.shadow().num_updates == 2
        assert_same(averaged(again), averaged(average))

    @pytest.mark.filterwarnings('ignore:update_interval=.* is longer than the run')
    def test_an_epoch_that_does_not_end_makes_no_update(self, tmp_path):
        average = WeightAverage('2ba', update_interval='1ep')
        trainer = build(tmp_path, average, save_strategy='no', eval_strategy='no', max_steps=2)
        with pytest.warns(UserWarning, match='training ended before the first update'):
            trainer.train()
        assert average.shadow().num_updates == 0

    @pytest.mark.parametrize(
        ('arguments', 'message'),
        [
            ({'half_life': '100tok'}, "half_life='100tok' counts tokens, but the Trainer counts none"),
            ({'half_life': '1iter'}, "half_life='1iter' counts iterations, but this run has none"),
            ({'update_interval': '1ep'}, "update_interval='1ep' counts epochs, but the dataloader has no length"),
            ({'half_life': '9sp'}, "half_life='9sp' counts samples, but the dataloader does not tell"),
        ],
    )
    def test_times_that_the_run_does_not_count_are_refused_before_training(self, tmp_path, arguments, message):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(Sentences(SAMPLES))

        record, average = Record(), WeightAverage(**arguments)
        trainer = build(tmp_path, average, record=record, save_strategy='no', max_steps=2, train_dataset=Stream())
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert not record.trained

    @pytest.mark.parametrize('optimizer', ['adamw_torch', 'adamw_torch_fused'])  # a fused one skips steps by itself
    def test_a_step_that_the_gradient_scaler_skips_is_no_time(self, tmp_path, optimizer):
        average, record = WeightAverage('2ba'), Record()

        class Damaged(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, *, model, **_):
                if state.global_step == 2:
                    next(model.parameters()).grad.fill_(float('inf'))

        options = {'save_strategy': 'no', 'eval_strategy': 'no', 'max_grad_norm': 0, 'optim': optimizer}
        trainer = build(tmp_path, average, record=record, **options)
        trainer.accelerator.scaler = torch.amp.GradScaler('cpu', init_scale=2.0)
        trainer.add_callback(Damaged())
        trainer.train()
        assert same_bits(record.trained[2], record.trained[3])
        assert average.shadow().num_updates == STEPS - 1
        assert_close(averaged(average), by_formula(record.trained[:3] + record.trained[4:]))

    def test_bf16_and_frozen_parameters(self, tmp_path, monkeypatch):
        monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'no')  # TrainingArguments writes it, for Trainers to come, too
        model, record = network(), Record()
        model.bert.embeddings.requires_grad_(False)
        average = WeightAverage('2ba')
        build(tmp_path, average, record=record, model=model, bf16=True, save_strategy='no').train()
        names = averaged(average).keys()
        assert not [name for name in names if 'embeddings' in name]
        expected = by_formula(record.trained)
        assert_close(averaged(average), {name: expected[name] for name in names})

    def test_names_in_evaluate_with_that_no_evaluation_has_are_warned_of(self, tmp_path):
        trainer = build(tmp_path, WeightAverage('2ba', evaluate_with={'evla': 'training'}), max_steps=1)
        with pytest.warns(UserWarning, match="evaluate_with names 'evla', and no evaluation during training has it"):
            trainer.train()


class TestLogs:
    """Rows of the Trainer have the averages beside the loss."""

    @pytest.mark.parametrize(
        ('interval', 'every', 'expected'),
        [
            ('0.05dur', 2, [2, 4, 6]),
            ('0.05dur', 4, [4]),  # no more often than the Trainer logs, and not in the rows of its evaluations
            ('4ba', 1, [4]),
            ('3ba', 2, [4, 6]),  # in the next row
            ('1ep', 1, [3, 6]),
            (None, 1, []),
        ],
    )
    def test_they_are_in_the_rows_of_the_interval(self, tmp_path, monkeypatch, interval, every, expected):
        measured, real = [], ShadowModel.relative_distance
        monkeypatch.setattr(ShadowModel, 'relative_distance', lambda *of: measured.append(of) or real(*of))
        average, options = WeightAverage('2ba', log_interval=interval), {'logging_strategy': 'steps'}
        trainer = build(tmp_path, average, save_strategy='no', logging_steps=every, **options)
        trainer.train()
        rows = [row for row in trainer.state.log_history if 'ema/num_updates' in row]
        assert [(row['step'], row['ema/num_updates']) for row in rows] == [(step, step) for step in expected]
        assert all('loss' in row for row in rows)
        assert len(measured) == len(expected)

    def test_they_say_how_far_the_average_is(self, tmp_path):
        seen, record, average = [], Record(), WeightAverage({'a': '2ba'}, average={'b': 'equal'}, skip_nonfinite=True)
        record.on_log = lambda *_, logs, **__: seen.append(logs)
        trainer = build(
            tmp_path, average, record=record, save_strategy='no', eval_strategy='no', logging_strategy='epoch'
        )
        trainer.train()
        *_, row = [logs for logs in seen if 'a/smoothing' in logs]
        assert row['a/smoothing'] == pytest.approx(2**-0.5)
        assert row['b/num_updates'] == STEPS
        assert row['ema/skipped_elements'] == 0
        assert 'b/smoothing' not in row
        expected = distance(averaged(average, 'a'), weights(trainer.model))
        assert row['a/relative_distance'] == pytest.approx(expected, rel=1e-4)

    def test_they_are_in_no_row_that_a_subclass_logs(self, tmp_path):
        # It may do so in one process only, but measuring shards takes every process.
        class Logging(Trainer):
            def compute_loss(self, *args, **kwargs):
                self.log({'loss': 0.0, 'own': 1.0})
                return super().compute_loss(*args, **kwargs)

        trainer = build(
            tmp_path, WeightAverage('2ba', log_interval='1ba'), kind=Logging, save_strategy='no', eval_strategy='no',
            logging_strategy='steps', logging_steps=3,
        )  # fmt: skip
        trainer.train()
        rows = [row for row in trainer.state.log_history if 'ema/num_updates' in row]
        assert [row['step'] for row in rows] == [3, 6]
        assert not any('own' in row for row in rows)

    def test_an_interval_longer_than_the_run_is_warned_of_also_if_it_is_the_default_elsewhere(self, tmp_path):
        options = {'max_steps': 2, 'save_strategy': 'no', 'logging_strategy': 'steps', 'logging_steps': 1}
        trainer = build(tmp_path, WeightAverage('2ba', log_interval='1ep'), **options)
        with pytest.warns(UserWarning, match="log_interval='1ep' is longer than the run of .*: no distance will be"):
            trainer.train()

    @pytest.mark.parametrize(
        ('interval', 'options', 'why'),
        [
            ('1ba', {'logging_strategy': 'no'}, "logging_strategy is 'no'. Pass logging_strategy='steps', or"),
            ('1ba', {'logging_strategy': 'steps'}, 'logging_steps=500 is longer than the run of 1 step. Pass fewer'),
            ('1ba', {'logging_strategy': 'epoch'}, None),
            ('1ba', {'logging_strategy': 'no', 'logging_first_step': True}, None),
            ('0.05dur', {'logging_strategy': 'no'}, None),  # which nobody asked for
            (None, {'logging_strategy': 'no'}, None),
        ],
    )
    def test_an_interval_in_a_run_without_rows_is_warned_of(self, tmp_path, interval, options, why):
        average = WeightAverage('1ba', log_interval=interval)
        trainer = build(tmp_path, average, max_steps=1, save_strategy='no', eval_strategy='no', **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            trainer.train()
        told = [str(each.message) for each in caught if 'logs nothing' in str(each.message)]
        assert len(told) == (why is not None)
        assert all(each.startswith(f"log_interval='1ba' logs nothing: {why}") for each in told)
        rows = [row for row in trainer.state.log_history if 'ema/num_updates' in row]
        assert bool(rows) == (why is None and interval == '1ba')

    def test_what_a_run_has_not_shown_is_in_no_row_of_another(self, tmp_path):
        average = WeightAverage('2ba', log_interval='6ba')
        options = {'save_strategy': 'no', 'eval_strategy': 'no', 'logging_strategy': 'steps', 'logging_steps': 4}
        first, second = (build(tmp_path / name, average, **options) for name in ('first', 'second'))
        second.train()
        first.log({'loss': 1.0})
        second.train()
        assert [row['step'] for row in second.state.log_history if 'loss' in row] == [4]
        assert not any('ema/num_updates' in row for each in (first, second) for row in each.state.log_history)


class TestTrainer:
    """How the callback meets the Trainer."""

    def test_one_that_is_added_later_evaluates_and_resumes(self, run):
        average, record = WeightAverage('2ba'), Record()
        trainer = build(run.folder, record=record, save_strategy='no')
        trainer.add_callback(average.attach(trainer))
        trainer.train(resume_from_checkpoint=str(checkpoint(run, 4)))
        assert_same(average._keeper.state_dict(), run.average._keeper.state_dict())
        assert same_bits(record.evaluated[-1][1], averaged(average))

    def test_one_that_was_not_attached_evaluates_and_refuses_to_resume_blindly(self, run, tmp_path):
        average, record = WeightAverage('2ba'), Record()
        trainer = build(tmp_path, record=record, save_strategy='no')
        trainer.add_callback(average)
        trainer.train()
        assert same_bits(record.evaluated[-1][1], averaged(average))
        trainer = build(tmp_path, save_strategy='no')
        trainer.add_callback(WeightAverage('2ba'))
        with pytest.raises(RuntimeError, match=r'trainer\.add_callback\(average\.attach\(trainer\)\)'):
            trainer.train(resume_from_checkpoint=str(checkpoint(run, 4)))

    def test_two_callbacks_and_other_callers_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match='2 WeightAverage callbacks'):
            build(tmp_path, WeightAverage(), record=WeightAverage())
        with pytest.raises(TypeError, match=r'must be a transformers\.Trainer, got a str'):
            WeightAverage().attach('trainer')
        with pytest.raises(RuntimeError, match='something else has called it'):
            WeightAverage().on_init_end(None, TrainerState(), TrainerControl())

    def test_a_callback_that_moves_to_another_trainer_leaves_the_first_alone(self, run, tmp_path):
        average, record = WeightAverage('2ba'), Record()
        first = build(tmp_path / 'first', average, record=record, save_strategy='no', max_steps=2)
        first.train()
        build(tmp_path / 'second', average, save_strategy='no', max_steps=2).train()
        record.evaluated.clear()
        with pytest.warns(UserWarning, match=r'uses the weights as they are: the average is of another Trainer\.'):
            first.evaluate()
        assert same_bits(record.evaluated[0][1], weights(first.model))

    @pytest.mark.parametrize('copied', [copy.deepcopy, lambda average: pickle.loads(pickle.dumps(average))])
    def test_a_copy_keeps_the_average_and_belongs_to_no_trainer(self, run, tmp_path, copied):
        other = copied(run.average)
        assert_same(averaged(other), averaged(run.average))
        build(tmp_path, other, save_strategy='no', eval_strategy='no').train()
        assert other.shadow().num_updates == STEPS
        assert run.average._trainer() is run.trainer

    def test_before_training_there_is_no_average(self, tmp_path):
        average, record = WeightAverage('2ba'), Record()
        trainer = build(tmp_path, average, record=record)
        with pytest.warns(UserWarning, match=r'evaluation_loop uses the weights as they are: there is no'):
            trainer.evaluate()
        assert average.shadow() is None
        with pytest.raises(RuntimeError, match='no average before training has started'):
            average.swapped(trainer.model)
        with pytest.raises(ValueError, match="no average is called 'wide'"):
            average.shadow('wide')

    def test_training_again_begins_a_new_average(self, tmp_path):
        average, record = WeightAverage('2ba'), Record()
        trainer = build(tmp_path, average, record=record, save_strategy='no', eval_strategy='no', max_steps=2)
        trainer.train()
        trainer.train()
        assert_close(averaged(average), by_formula(record.trained[3:]))

    def test_early_stopping_judges_the_average(self, tmp_path):
        average = WeightAverage('2ba')
        trainer = build(
            tmp_path, average, load_best_model_at_end=True, metric_for_best_model='loss', eval_steps=1,
            learning_rate=0.0,
        )  # fmt: skip
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
        trainer.train()
        assert trainer.state.global_step == 3
        assert json.loads((tmp_path / 'checkpoint-3' / 'trainer_state.json').read_text())['best_global_step'] == 1


def test_the_state_in_a_checkpoint_is_read_without_executing_it(run):
    state = read_checkpoint(checkpoint(run, 6) / FILE)
    assert state['repr'] == "WeightAverage(half_life='2ba')"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert torch.load(checkpoint(run, 6) / FILE, weights_only=True)['config']['half_life'] == '2ba'


@pytest.mark.slow
@pytest.mark.parametrize('how', ['ddp', 'ddp in pieces', 'fsdp2'])
def test_two_processes_keep_the_contract(tmp_path, how):
    call = functools.partial(run_in_ranks, sharded=how == 'fsdp2', shard_over_ranks=how == 'ddp in pieces')
    for found in ranks(2)(call, str(tmp_path)):
        wrapper = 'FSDPBertForSequenceClassification' if how == 'fsdp2' else 'DistributedDataParallel'
        assert found['wrapper'] == wrapper
        assert all(found['untouched'])
        assert found['resumed'] == [True, True, True]
        assert found['seen']
        assert found['given back']
        trained = [{name: torch.tensor(values) for name, values in one.items()} for one in found['trained']]
        expected = [distance(by_formula(trained[: step + 1]), trained[step]) for step in (STEPS // 2, STEPS)]
        assert found['distances'] == pytest.approx(expected, rel=1e-3)
        assert_close({name: torch.tensor(values) for name, values in found['average'].items()}, by_formula(trained))
    load_average(tmp_path / 'whole' / 'checkpoint-6')


@pytest.mark.slow
def test_a_compiled_model_keeps_the_contract(run, tmp_path):
    average, record = WeightAverage('2ba'), Record()
    trainer = build(tmp_path, average, record=record, torch_compile=True, torch_compile_backend='eager')
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == 'OptimizedModule'
    assert_close(averaged(average), by_formula(record.trained))
    assert same_bits(record.evaluated[-1][1], averaged(average))
    assert same_bits(weights(trainer.model), record.trained[-1])
    assert_close(load_average(tmp_path / 'checkpoint-6'), by_formula(record.trained))
