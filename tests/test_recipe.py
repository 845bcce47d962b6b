"""Recipes: what is refused and how, what a run leaves behind, and that an interrupted run leaves the same."""

from __future__ import annotations

import functools
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import yaml
from composer.core import Callback, Precision
from hypothesis import given, settings
from hypothesis import strategies as st
from points import classified
from rich.console import Console

from composer_ema import load_average
from composer_ema.files import write_beside
from composer_ema.pictures import conclusion, report
from composer_ema.pictures.curves import Point
from composer_ema.pictures.report import Result
from composer_ema.recipe import named as recipe_named
from composer_ema.recipe import registry, run, schema
from composer_ema.recipe.arguments import Place, RecipeError, check_arguments, check_value
from composer_ema.recipe.build import build
from composer_ema.recipe.kinds import Kind
from composer_ema.recipe.metrics import Report
from composer_ema.recipe.named import Named
from composer_ema.recipe.schema import Plan
from composer_ema.run_folder.folder import RunFolder
from composer_ema.run_folder.recorder import Recorder
from composer_ema.spans import ArgumentError
from composer_ema.trainer.ema import EMA
from composer_ema.trainer.swa import SWA
from composer_ema.zoo import fetch

YAML_FOLDER = Path(__file__).parent.parent / 'yamls'
YAMLS = sorted(YAML_FOLDER.rglob('*.yaml'))
TINY: dict[str, Any] = {
    'max_duration': '2ep',
    'seed': 3,
    'progress_bar': False,
    'device': 'cpu',
    'model': {'name': 'fashion_cnn', 'widths': [2, 2, 2, 2], 'num_classes': 3},
    'data': {
        'name': 'fake',
        'image_size': [1, 17, 17],
        'num_classes': 3,
        'size': 40,
        'eval_size': 10,
        'batch_size': 8,
        'eval_batch_size': 10,
    },
    'optimizer': {'name': 'adamw', 'lr': 0.01},
    'algorithms': {'ema': {'half_life': '3ba'}},
    'evaluate': ['training', 'ema'],
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny recipe, with top-level keys replaced, and its runs in a folder of the test."""

    def write(**values: Any) -> Path:
        path = tmp_path / 'tiny.yaml'
        path.write_text(yaml.safe_dump({**TINY, 'runs_folder': str(tmp_path / 'runs'), **values}))
        return path

    return write


@pytest.fixture
def data_untouched(register: Callable[..., None]) -> None:
    """Makes every data set fail the test when it is built."""

    def refuse(builder: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(builder)
        def touched(**arguments: Any) -> None:
            raise AssertionError('data was touched')

        return touched

    for name, builder in registry.datasets().classes.items():
        register('datasets', name, refuse(builder))


def quiet(renderable: Any) -> None:
    """Shows nothing."""


def train(recipe: schema.Recipe, show: Callable[[Any], None]) -> Result:
    """What ``composer-ema train`` does."""
    return conclusion.of_run(run.train(recipe, show), show)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


# What is refused: override, path of the key in the file, and a piece of the message, most often the nearest legal name.
REFUSED = [
    ('algoritms.ema.half_life=3ba', 'algoritms', 'algorithms'),
    ('max_durations=3ep', 'max_durations', 'max_duration'),
    ('train_dataloader=x', 'train_dataloader', 'train_dataloader_label'),
    ('algorithms.ema.half_lif=3ba', 'algorithms.ema.half_lif', 'half_life'),
    ('algorithms.emma.half_life=3ba', 'algorithms.emma', 'ema'),
    (
        'algorithms.ema.half_life=3',
        'algorithms.ema.half_life',
        'must be a time string or a mapping or null, got 3 (an integer). A bare number has no unit: write',
    ),
    ('algorithms.ema.ema_start=0.5', 'algorithms.ema.ema_start', 'write the unit behind it, as in 0.5dur.'),
    ('algorithms.ema.update_interval=1.5', 'algorithms.ema.update_interval', 'write the unit behind it, as in 1.5ep.'),
    ('algorithms={swa: {swa_start: 1}}', 'algorithms.swa.swa_start', 'write the unit behind it, as in 1ba.'),
    (
        'scheduler={name: cosine_with_warmup, t_warmup: 10}',
        'scheduler.t_warmup',
        'must be a time string, got 10 (an integer)',
    ),
    ('eval_interval=0.5', 'eval_interval', 'write the unit behind it, as in 0.5dur.'),
    ('epochs=3', 'epochs', "Did you mean 'max_duration'?"),
    ('max_epochs=3', 'max_epochs', "Did you mean 'max_duration'?"),
    ('learning_rate=3', 'learning_rate', "Did you mean 'optimizer.lr'?"),
    ('nonsense=3', 'nonsense', 'max_duration,'),
    ('algorithms={swa: {nonsense: 1}}', 'algorithms.swa.nonsense', 'shadow_dtype'),
    ('scheduler={name: cosine_with_warmp}', 'scheduler.name', "Did you mean 'cosine_with_warmup'?"),
    ('scheduler={name: chained_schedule}', 'scheduler.name', "Did you mean 'chained_scheduler'?"),
    ('algorithms.ema.half_life=3bananas', 'algorithms.ema.half_life', 'bananas'),
    ('algorithms.ema=3ba', 'algorithms.ema', "must be a mapping, got '3ba'"),
    (
        'algorithms.ema.buffers={running: averag}',
        'algorithms.ema.buffers',
        "must be one of average, copy for each key, got 'averag' (a string) for 'running'. Did you mean 'average'?",
    ),
    ('algorithms.EMA.half_life=3ba', 'algorithms.EMA', 'algorithms.ema'),
    ('algorithms.ema.evaluate_with={eval: ema}', 'algorithms.ema.evaluate_with', 'evaluate: [training, ema]'),
    ('algorithms.mixup.alpha=much', 'algorithms.mixup.alpha', "must be a number, got 'much'"),
    ('callbacks.speed_monitr={}', 'callbacks.speed_monitr', 'speed_monitor'),
    ('callbacks.speed_monitor.window=3', 'callbacks.speed_monitor.window', 'window_size'),
    ('callbacks.speed_monitor.window_size=ten', 'callbacks.speed_monitor.window_size', "an integer, got 'ten'"),
    ('callbacks.nan_monitor.strict=true', 'callbacks.nan_monitor.strict', 'It takes none'),
    ('callbacks.early_stopper={}', 'callbacks.early_stopper', 'needs monitor, dataloader_label'),
    ('loggers.tensorbord={}', 'loggers.tensorbord', "Did you mean 'tensorboard'?"),
    ('loggers.file_logger.flush_interval=often', 'loggers.file_logger.flush_interval', "an integer, got 'often'"),
    ('optimizer.name=adamm', 'optimizer.name', 'adam'),
    ('optimizer.learning_rate=1', 'optimizer.learning_rate', 'AdamW has no such argument'),
    ('optimizer.lr=fast', 'optimizer.lr', "must be a number, got 'fast'"),
    ('optimizer.lr=true', 'optimizer.lr', 'must be a number, got True'),
    ('optimizer.betas=[0.9]', 'optimizer.betas', 'a list of 2 values'),
    ('optimizer.lr=-1', 'optimizer.lr', 'Invalid learning rate: -1'),
    ('optimizer.betas=[0.9,2]', 'optimizer.betas', 'at index 1: 2, got [0.9, 2].'),
    ('data.batch_size=0', 'data.batch_size', 'at least 1, got 0'),
    ('optimizer=adamw', 'optimizer', '{name: adamw}'),
    ('scheduler.name=cosine_with_warmup', 'scheduler', 'needs t_warmup'),
    ('model.name=fashion_cn', 'model.name', 'fashion_cnn'),
    ('model.width=3', 'model.width', 'widths'),
    ('model.widths=[1,2]', 'model.widths', '4 numbers'),
    ('model.widths=[1,2,3,x]', 'model.widths', 'must be a list, each entry an integer'),
    ('data.name=fak', 'data.name', 'fake'),
    ('data.batchsize=3', 'data.batchsize', 'batch_size'),
    ('data.batch_size=x', 'data.batch_size', "must be an integer, got 'x'"),
    ('evaluate=[emma]', 'evaluate.0', 'ema'),
    ('evaluate=[ema,ema]', 'evaluate.1', 'twice'),
    ('evaluate=3', 'evaluate', 'must be a list'),
    ('evaluate={ema: true}', 'evaluate', 'must be a list of training and ema'),
    ('algorithms=null', 'evaluate', 'Add ema: {} under algorithms'),
    ('report.targets=1', 'report.targets', 'target'),
    ('report.target_accuracy=90', 'report.target_accuracy', '[0, 1]'),
    ('runs_folder=3', 'runs_folder', 'must be a string, got 3'),
    ('max_duration=2eps', 'max_duration', "'2eps' is no time"),
    ('max_duration=1iter', 'max_duration', 'never ends a run: it has no iterations'),
    ('max_duration=1dur', 'max_duration', 'never ends a run: it has no durations'),
    ('evaluate=[EMA]', 'evaluate.0', "there are no weights called 'EMA'. Did you mean 'ema'?"),
    ('optimizer={name: sgd, lr: -1, nesterov: true}', 'optimizer.lr', 'Invalid learning rate: -1'),
    ('max_duration=0ep', 'max_duration', 'at least 1'),
    ('max_duration=null', 'max_duration', 'is missing'),
    ('eval_interval=-1ep', 'eval_interval', 'at least 0'),
    ('save_interval=often', 'save_interval', 'no time'),
    ('max_duration=100tok', 'max_duration', "'100tok' counts tokens"),
    ('eval_interval=100tok', 'eval_interval', 'Write samples'),
    ('algorithms.ema.half_life=1e3tok', 'algorithms.ema.half_life', "'1e3tok' counts tokens"),
    ('scheduler={name: cosine, t_max: 9tok}', 'scheduler.t_max', 'counts tokens'),
    ('callbacks.checkpoint_saver.save_interval=9tok', 'callbacks.checkpoint_saver.save_interval', 'counts tokens'),
    ('algorithms.ema.update_interval=1tok', 'algorithms.ema.update_interval', 'counts tokens'),
    ('precision=fp33', 'precision', 'fp32'),
    ('device=gpux', 'device', 'cpu, gpu'),
    ('seed=one', 'seed', "must be an integer or null, got 'one'"),
    ('seed=-1', 'seed', 'from 0 to'),
    ('variables.width=${nowhere}', 'variables.width', 'nowhere'),
    ('variables.width=???', 'variables.width', 'Missing'),
]


class TestRefused:
    @pytest.mark.parametrize(('override', 'key', 'said'), REFUSED, ids=[override for override, _, _ in REFUSED])
    def test_with_path_and_remedy_before_data_is_touched(self, write, data_untouched, override, key, said):
        path = write()
        with pytest.raises(RecipeError) as refused:
            build(schema.load(path, [override]))
        assert refused.value.key == key
        assert str(refused.value).startswith(f'{path}: {key}: ')
        assert said in str(refused.value)
        assert not (path.parent / 'runs').exists()

    @pytest.mark.parametrize(
        'override',
        ['max_duration', '=3', 'model..name=x', ' =3', 'model. name=x', '[=', 'evaluate[0]=ema', 'evaluate=[1'],
    )
    def test_malformed_override(self, write, override):
        with pytest.raises(RecipeError, match='override'):
            schema.load(write(), [override])

    @pytest.mark.parametrize(
        ('text', 'said'),
        [
            ('max_duration: 1ep\nmax_duration: 2ep', 'duplicate key'),
            ('data: {name: fake, size: 1, size: 2}', 'duplicate key'),
            ('max_duration: [1', 'is not legal YAML'),
            ('- max_duration', 'holds a list'),
            ('3', 'cannot be read as a recipe'),
            ('1: 2', 'a key must be a string'),
            ('run_name: !!python/object/apply:os.getcwd []', 'python/object'),
            ('run_name: !!binary aGk=', 'must be a string, a number'),
            ('run_name: ${', 'run_name'),
            ('run_name: ${run_name}', 'run_name'),
            ('', 'model: is missing. Write a mapping with a name, as in {name: fashion_cnn}.'),
            ('max_duration: 1ep\nmodel: fashion_cnn', "{name: fashion_cnn}; got 'fashion_cnn'"),
        ],
    )
    def test_file_that_is_no_recipe(self, tmp_path, text, said):
        path = tmp_path / 'broken.yaml'
        path.write_text(text)
        with pytest.raises(RecipeError) as refused:
            schema.plan(schema.load(path))
        assert said in str(refused.value)

    def test_missing_file_names_the_one_that_is_near_or_all(self, write):
        path = write()
        with pytest.raises(RecipeError, match=r"no such file\. Did you mean '.*/tiny\.yaml'\?"):
            schema.load(path.with_name('tny.yaml'))
        with pytest.raises(RecipeError, match=r'no such file\. Recipes in .*: .*/tiny\.yaml\.'):
            schema.load(path.with_name('mnist.yaml'))

    @pytest.mark.parametrize(
        ('override', 'said'),
        [
            ('nonsense=1', 'a recipe has no such key. Its keys are variables, model, data, optimizer, scheduler'),
            ('data.name=pictures', "there is no data set 'pictures'. Legal names are "),
            ('optimizer.learning_rate=1', 'AdamW has no such argument. It takes lr, betas, eps'),
            ('algorithms.averaging={}', "there is no algorithm 'averaging'. Legal names are "),
            ('evaluate=[best]', "there are no weights called 'best'. Legal names are training, ema."),
            (
                'scheduler={name: reduce_lr_on_plateau, metric: test/Loss}',
                "no evaluator 'test'. Its evaluators are eval_",
            ),
        ],
    )
    def test_where_no_name_is_near_the_legal_ones_are_listed(self, write, override, said):
        with pytest.raises(RecipeError) as refused:
            schema.plan(schema.load(write(), [override]))
        assert said in str(refused.value)
        assert 'Did you mean' not in str(refused.value)

    def test_model_that_does_not_take_the_data(self, write):
        model = {'name': 'mnist1d_cnn', 'num_classes': 3}
        with pytest.raises(RecipeError, match=r'model: cannot take inputs of shape \(1, 17, 17\)'):
            build(schema.load(write(model=model)))
        with pytest.raises(RecipeError, match=r'model\.num_classes: must be at least 3'):
            build(schema.load(write(), ['model.num_classes=2']))

    @pytest.mark.parametrize('name', ['ep1.pt', 'ep1', 'ep1.ckpt', 'ep1-rank0'])
    @pytest.mark.parametrize(
        ('damage', 'said'),
        [
            (lambda content: None, 'is missing'),
            (lambda content: b'', 'is no checkpoint'),
            (lambda content: content[:-30], 'only the beginning'),
            (lambda content: content.replace(b'\x81' * 64, b'\x81' * 63 + b'\x80'), 'checksum'),
        ],
        ids=['missing', 'empty', 'cut', 'flipped'],
    )
    def test_checkpoint_to_load_that_is_missing_or_damaged(
        self, write, data_untouched, tmp_path, monkeypatch, name, damage, said
    ):
        monkeypatch.setattr('composer_ema.recipe.schema.classifier', lambda *_, **__: pytest.fail('a model was built'))
        checkpoint = tmp_path / name
        torch.save({'state': torch.full((64,), 0x81, dtype=torch.uint8)}, checkpoint)
        content = damage(checkpoint.read_bytes())
        checkpoint.unlink() if content is None else checkpoint.write_bytes(content)
        with pytest.raises(RecipeError, match=said) as refused:
            build(schema.load(write(load_path=str(checkpoint))))
        assert refused.value.key == 'load_path'
        assert not (tmp_path / 'runs').exists()

    def test_folder_or_archive_to_load_that_is_no_checkpoint(self, write, data_untouched, tmp_path):
        with zipfile.ZipFile(tmp_path / 'data.zip', 'w') as archive:
            archive.writestr('a', 'b')
        for name, said in (('data.zip', 'archive of another kind'), ('.', r'is a folder\. Give one file of it')):
            with pytest.raises(RecipeError, match=rf'load_path: .*{said}'):
                build(schema.load(write(load_path=str(tmp_path / name))))

    def test_checkpoint_to_load_of_another_program(self, write, data_untouched, tmp_path):
        for content in ({'weight': torch.zeros(2)}, [torch.zeros(2)], {'state': torch.zeros(2)}):
            torch.save(content, tmp_path / 'other.pt')
            with pytest.raises(RecipeError, match=r'load_path: .*other\.pt was not saved by Composer'):
                build(schema.load(write(load_path=str(tmp_path / 'other.pt'))))

    def test_file_where_the_run_folder_is_to_be(self, write, data_untouched, tmp_path):
        (tmp_path / 'taken').touch()
        with pytest.raises(RecipeError, match=r'runs_folder: .*taken is a file') as refused:
            build(schema.load(write(), [f'runs_folder={tmp_path}/taken/runs']))
        assert refused.value.key == 'runs_folder'

    def test_pattern_of_the_average_that_matches_nothing_is_blamed_itself(self, write):
        with pytest.raises(RecipeError, match="'nothing' matches none") as refused:
            build(schema.load(write(), ['algorithms.ema.include=nothing']))
        assert refused.value.key == 'algorithms.ema.include'

    def test_pattern_hidden_by_one_of_the_file_can_replace_it(self, write):
        merged = ['algorithms.ema.buffers={.*: copy}', 'algorithms.ema.buffers={running_mean: average}']
        with pytest.raises(RecipeError, match=r'decides nothing.* ~algorithms\.ema\.buffers before it') as refused:
            build(schema.load(write(), merged))
        assert refused.value.key == 'algorithms.ema.buffers'
        recipe = schema.load(write(), [merged[0], '~algorithms.ema.buffers', merged[1]])
        build(recipe).trainer.close()
        assert recipe.values['algorithms']['ema']['buffers'] == {'running_mean': 'average'}

    def test_damaged_checkpoint_of_a_run_to_resume(self, write, tmp_path):
        path = write(autoresume=True, max_duration='1ep')
        train(schema.load(path), quiet)
        latest = (tmp_path / 'runs/tiny/checkpoints/latest-rank0.pt').resolve()
        content = latest.read_bytes()
        weight = next(iter(load_average(latest).values())).numpy().tobytes()
        assert weight in content
        latest.write_bytes(content.replace(weight, bytes([weight[0] ^ 1]) + weight[1:]))
        with pytest.raises(RecipeError, match=r'autoresume: .*ep1-ba5-rank0\.pt cannot be read.*load_path='):
            build(schema.load(path))

    def test_checkpoint_that_was_given_first_may_be_gone_when_the_run_resumes(self, write, tmp_path):
        train(schema.load(write(), ['run_name=first', 'max_duration=1ep']), quiet)
        first = (tmp_path / 'runs/first/checkpoints/latest-rank0.pt').resolve()
        path = write(run_name='second', autoresume=True, load_path=str(first))
        train(schema.load(path), quiet)
        first.unlink()
        assert train(schema.load(path, ['max_duration=3ep']), quiet).num_batches == 15

    def test_run_folder_that_holds_a_run(self, write, data_untouched, tmp_path):
        write_beside(tmp_path / 'runs/mine/metrics.jsonl', '{}\n')
        with pytest.raises(RecipeError, match=r'run_name: .*already holds a run.*autoresume=true'):
            build(schema.load(write(), ['run_name=mine']))

    def test_setting_that_cannot_work_in_this_run_is_told_by_its_key(self, write):
        recipe = schema.load(write(), ['algorithms.ema.half_life=2iter', 'algorithms.ema.update_interval=1ba'])
        with pytest.raises(RecipeError, match=r'algorithms\.ema\.\w+: .*iterations'):
            train(recipe, quiet)


class TestArguments:
    @staticmethod
    def takes(a: int, b: float | None = None, *, c: tuple[int, ...] = (), d: Callable | str = 'x') -> None: ...

    @pytest.mark.parametrize(
        'arguments',
        [{'a': 1}, {'a': 1, 'b': 2}, {'a': 1, 'b': None}, {'a': 1, 'c': [1, 2]}, {'a': 1, 'd': 'y'}, {'a': 10**30}],
    )
    def test_that_fit_are_handed_on_unchanged(self, arguments):
        assert check_arguments(self.takes, arguments, Place('f', 'k')) == arguments

    @pytest.mark.parametrize(
        ('arguments', 'key'),
        [({}, 'k'), ({'a': 1.5}, 'k.a'), ({'a': True}, 'k.a'), ({'a': 1, 'c': 3}, 'k.c'), ({'a': 1, 'd': 3}, 'k.d')],
    )
    def test_that_do_not_fit_are_refused_by_key(self, arguments, key):
        with pytest.raises(RecipeError) as refused:
            check_arguments(self.takes, arguments, Place('f', 'k'))
        assert refused.value.key == key

    @pytest.mark.parametrize(
        ('annotation', 'words', 'legal', 'illegal'),
        [
            (str | None, 'a string or null', ['a', None], [1, True, []]),
            (tuple[float, float], 'a list of 2 values, the first a number', [[1, 0.5]], [[1], [1, 2, 3], 'ab', 1]),
            (Iterable[int], 'a list, each entry an integer', [[1]], [['a'], [1.5], 3]),
            (Mapping[str, Literal['ema']], 'a mapping', [{'a': 'ema'}], [{'a': 'emma'}, ['ema']]),
            (str | Precision, 'one of fp32, amp_fp16, amp_bf16, amp_fp8', ['fp32'], ['fp33', [], 3]),
            (list[Precision], 'a list, each entry one of fp32, amp_fp16', [['fp32']], [['fp33'], [[]]]),
            (Callable | None, 'null', [None], ['x']),
            (list[Callable] | float, 'a number', [1], ['x']),
        ],
    )
    def test_kinds_are_what_yaml_can_say_of_an_annotation(self, annotation, words, legal, illegal):
        assert str(Kind.of(annotation)).startswith(words)
        for value in legal:
            assert check_value(annotation, value, Place('f')) == value
        for value in illegal:
            with pytest.raises(RecipeError, match='must be '):
                check_value(annotation, value, Place('f'))

    @pytest.mark.parametrize('annotation', [Callable, torch.optim.Optimizer, list[Callable], Any, Point])
    def test_what_yaml_cannot_say_is_left_to_the_constructor(self, annotation):
        assert check_value(annotation, 'x', Place('f')) == 'x'

    def test_names_that_pydantic_keeps_for_itself_are_names_like_others(self):
        def takes(*, copy: int = 1, model_config: int = 1, _x: int = 1) -> None: ...

        assert check_arguments(takes, {'copy': 1, '_x': 2}, Place('f', 'k')) == {'copy': 1, '_x': 2}
        with pytest.raises(RecipeError, match=r'k\.model_config: must be an integer'):
            check_arguments(takes, {'model_config': 'x'}, Place('f', 'k'))

    def test_a_function_that_takes_any_name_may_be_given_any(self):
        def takes(a: int = 1, **others: Any) -> None: ...

        assert check_arguments(takes, {'b': 'x'}, Place('f', 'k')) == {'b': 'x'}


class TestBlame:
    @pytest.fixture(autouse=True)
    def known(self, monkeypatch):
        monkeypatch.setattr(recipe_named, '_KNOWN_PACKAGES', (*recipe_named._KNOWN_PACKAGES, __name__))

    @staticmethod
    def built(factory: Callable[..., Any], *, is_cheap: bool = True, **arguments: Any) -> RecipeError:
        with pytest.raises(RecipeError) as refused:
            Named(Place('f', 'k'), 'name', factory, arguments, is_cheap).build()
        return refused.value

    @staticmethod
    def picky(a: int = 1, b: int = 1, *, c: int = 1) -> None:
        if a < 0 or b < 0:
            raise ValueError('something is negative, and this message does not say what, though it speaks of c')

    def test_finds_the_one_argument_without_which_it_can_be_built(self):
        assert self.built(self.picky, a=-1, b=2, c=3).key == 'k.a'
        assert self.built(self.picky, a=-1, b=2, c=3).message.endswith('got -1.')

    def test_of_several_arguments_is_that_of_the_entry(self):
        assert self.built(self.picky, a=-1, b=-1).key == 'k', 'neither alone can be left out'

        def exclusive(a: int | None = None, b: int | None = None) -> None:
            if a is not None and b is not None:
                raise ValueError('pass a or b')

        assert self.built(exclusive, a=1, b=1).key == 'k', 'either can be left out'

    def test_of_no_given_argument_is_that_of_the_entry(self):
        def never(a: int = 1) -> None:
            raise ValueError('a')

        assert self.built(never, a=1).key == 'k'

    def test_of_an_argument_that_cannot_be_left_out_is_found_by_another_value(self):
        def needs(a: int) -> None:
            if a < 0:
                raise ValueError('no')

        assert self.built(needs, a=-1).key == 'k.a'

    def test_of_two_wrong_arguments_is_the_one_that_the_error_depends_on(self):
        def checks(a: int = 1, b: int = 1) -> None:
            for value in (a, b):
                if value < 0:
                    raise ValueError(f'{value} is negative')

        assert self.built(checks, a=-1, b=-2).key == 'k.a'

    def test_what_a_stranger_wrote_is_called_once(self, monkeypatch):
        monkeypatch.setattr(recipe_named, '_KNOWN_PACKAGES', ('torch',))
        calls = []

        def opens_a_file(folder: str, a: int = 1) -> None:
            calls.append(folder)
            raise ValueError('no')

        assert self.built(opens_a_file, folder='x', a=-1).key == 'k'
        assert calls == ['x']

    @pytest.mark.parametrize(('argument', 'key'), [('a', 'k.a'), ('nothing', 'k')])
    def test_is_carried_by_the_error(self, argument, key):
        calls = []

        def refuses(**arguments: Any) -> None:
            calls.append(arguments)
            raise ArgumentError('no', argument)

        assert self.built(refuses, is_cheap=False, a=1, b=2).key == key
        assert calls == [{'a': 1, 'b': 2}], 'what may touch data is called once'

    def test_errors_survive_another_process(self):
        error = pickle.loads(pickle.dumps(ArgumentError('must be 1', 'half_life')))
        assert (str(error), error.argument) == ('must be 1', 'half_life')
        recipe = pickle.loads(pickle.dumps(Place('f', 'k').error('no')))
        assert str(recipe) == 'f: k: no'


class TestRegistry:
    @pytest.mark.parametrize(
        ('known', 'names'),
        [
            (registry.algorithms, ['gradient_clipping', 'GradientClipping', 'sam', 'SAM', 'cutmix', 'cut_mix']),
            (registry.callbacks, ['lr_monitor', 'LRMonitor', 'early_stopper', 'mlperf', 'checkpoint_saver']),
            (registry.loggers, ['tensorboard', 'tensorboard_logger', 'wandb', 'WandBLogger', 'file_logger']),
            (registry.optimizers, ['adamw', 'AdamW', 'sgd', 'decoupled_adamw', 'DecoupledSGDW', 'sparse_adam']),
            (registry.schedulers, ['cosine_with_warmup', 'ConstantScheduler', 'one_cycle_lr', 'CosineAnnealingLR']),
        ],
    )
    def test_finds_snake_case_class_names_and_short_forms(self, known, names):
        assert all(known().canonical(name) for name in names)

    def test_ours_shadows_composers_ema(self):
        assert registry.algorithms().find('ema') is EMA
        assert registry.algorithms().find('EMA') is EMA

    def test_full_class_name_wins_over_a_short_form(self):
        found = registry.schedulers().find('CosineAnnealingWarmRestarts')
        assert found is torch.optim.lr_scheduler.CosineAnnealingWarmRestarts

    @pytest.mark.parametrize(
        'known', [registry.algorithms, registry.callbacks, registry.loggers, registry.optimizers, registry.schedulers]
    )
    def test_every_class_is_found_by_its_own_name(self, known):
        for name, cls in known().classes.items():
            assert known().find(name) is cls
            assert known().find(cls.__name__) is cls


class TestLoad:
    def test_variables_overrides_and_interpolation(self, write):
        path = write(variables={'rate': 0.5, 'span': '7ba'}, run_name='r-${variables.rate}')
        overrides = [
            'variables.rate=1e-3',
            'optimizer.lr=${variables.rate}',
            'algorithms.ema.half_life=${variables.span}',
        ]
        values = schema.load(path, overrides).values
        assert values['optimizer']['lr'] == 1e-3
        assert values['run_name'] == 'r-0.001'
        assert values['algorithms']['ema']['half_life'] == '7ba'

    def test_null_arguments_are_no_arguments(self, write):
        checked = schema.plan(schema.load(write(algorithms={'ema': None, 'sam': None})))
        assert [each.name for each in checked.algorithms] == ['ema', 'sam']

    @pytest.mark.parametrize(
        ('evaluate', 'algorithms', 'expected'),
        [
            (['training', 'ema'], {'ema': {}}, ['training', 'ema']),
            (['ema'], {'ema': {}}, ['ema']),
            ('ema', {'EMA': {}}, ['ema']),
            (['training'], {'ema': {}}, ['training']),
            ([], {'ema': {}}, []),
            (None, {'ema': {}}, ['training', 'ema']),
            (None, None, ['training']),
            (None, {'swa': {}}, ['training', 'swa']),
            (['swa'], {'SWA': {}}, ['swa']),
        ],
    )
    def test_evaluate(self, write, evaluate, algorithms, expected):
        assert schema.plan(schema.load(write(evaluate=evaluate, algorithms=algorithms))).evaluate == expected


ONE_CYCLE = {'name': 'one_cycle_lr', 'max_lr': 0.3, 'interval': 'batch'}
STEP = '{name: step_lr, step_size: 3}'
DROPS = ['~variables.sgd', '~variables.rate', '~variables.one_cycle']


class TestOverrides:
    """From left to right; a changed name drops the arguments of the old one, ``~key`` drops a key."""

    @pytest.fixture
    def load(self, write) -> Callable[..., schema.Recipe]:
        variables = {'name': 'mine', 'rate': 0.5, 'sgd': {'name': 'sgd', 'lr': 1.0}, 'one_cycle': 'OneCycleLR'}
        path = write(scheduler=ONE_CYCLE, variables=variables)
        return lambda *overrides: schema.load(path, overrides)

    @pytest.mark.parametrize(
        ('overrides', 'expected'),
        [
            (['scheduler={name: cosine_annealing_lr}'], {'name': 'cosine_annealing_lr'}),
            (['scheduler.name=cosine_annealing_lr'], {'name': 'cosine_annealing_lr'}),
            (['scheduler={name: step_lr, step_size: 3}'], {'name': 'step_lr', 'step_size': 3}),
            (['scheduler.name=step_lr', 'scheduler.step_size=3'], {'name': 'step_lr', 'step_size': 3}),
            (['scheduler={max_lr: 0.1}'], {**ONE_CYCLE, 'max_lr': 0.1}),
            (['scheduler={name: OneCycleLR, max_lr: 0.1}'], {**ONE_CYCLE, 'name': 'OneCycleLR', 'max_lr': 0.1}),
            (['scheduler.name=${variables.one_cycle}'], {**ONE_CYCLE, 'name': 'OneCycleLR'}),
            (['~scheduler.interval'], {'name': 'one_cycle_lr', 'max_lr': 0.3}),
            (['~scheduler.max_lr=0.3'], {'name': 'one_cycle_lr', 'interval': 'batch'}),
            (['~scheduler'], None),
            (['scheduler=null'], None),
            (['scheduler=null', 'scheduler.name=linear_lr'], {'name': 'linear_lr'}),
            (['~scheduler', 'scheduler={name: linear_lr}'], {'name': 'linear_lr'}),
            (['scheduler.max_lr=1', '~scheduler', 'scheduler.name=linear_lr'], {'name': 'linear_lr'}),
            (['scheduler={name: linear_lr}', 'scheduler.name=one_cycle_lr'], {'name': 'one_cycle_lr'}),
            (['scheduler.max_lr=1', 'scheduler.max_lr=2'], {**ONE_CYCLE, 'max_lr': 2}),
            (['scheduler.max_lr=null'], {**ONE_CYCLE, 'max_lr': None}),
            ([f'scheduler=[{STEP}, {{name: linear_lr}}]', '~scheduler.0'], [{'name': 'linear_lr'}]),
            ([f'scheduler=[{STEP}]', 'scheduler.0.gamma=0.5'], [{'name': 'step_lr', 'step_size': 3, 'gamma': 0.5}]),
            ([f'scheduler=[{STEP}]', 'scheduler.0={name: linear_lr}'], [{'name': 'linear_lr'}]),
            (
                [f'scheduler={{name: chained, schedulers: [{STEP}]}}', 'scheduler.schedulers.0.name=linear_lr'],
                {'name': 'chained', 'schedulers': [{'name': 'linear_lr'}]},
            ),
        ],
    )
    def test_set_merge_replace_and_drop_from_left_to_right(self, load, overrides, expected):
        assert load(*overrides).values.get('scheduler') == expected

    @pytest.mark.parametrize(
        ('overrides', 'key', 'expected'),
        [
            (['optimizer.name=sgd'], 'optimizer', {'name': 'sgd'}),
            (['optimizer=${variables.sgd}', 'optimizer.lr=2'], 'optimizer', {'name': 'sgd', 'lr': 2}),
            (['model.name=mnist1d_mlp'], 'model', {'name': 'mnist1d_mlp'}),
            (['data={name: mnist1d}'], 'data', {'name': 'mnist1d'}),
            (['evaluate.0=ema', '~evaluate.1'], 'evaluate', ['ema']),
            (['evaluate=[ema]'], 'evaluate', ['ema']),
            (['~algorithms.ema', 'algorithms.swa={}'], 'algorithms', {'swa': {}}),
            (['algorithms={ema: {seed: 1}}'], 'algorithms', {'ema': {'half_life': '3ba', 'seed': 1}}),
            (['loggers.mine={name: a, id: b}', 'loggers.mine.name=c'], 'loggers', {'mine': {'name': 'c', 'id': 'b'}}),
            (['variables={name: a}', *DROPS], 'variables', {'name': 'a'}),
        ],
    )  # fmt: skip
    def test_a_name_drops_arguments_only_where_it_says_what_takes_them(self, load, overrides, key, expected):
        assert load(*overrides).values[key] == expected

    def test_what_was_dropped_is_said_by_name(self, load):
        said = 'override scheduler.name=linear_lr: drops the arguments of one_cycle_lr: interval=batch, max_lr=0.3'
        assert load('scheduler.name=linear_lr').remarks == (said,)
        assert load('scheduler.name=OneCycleLR', 'scheduler.max_lr=3', '~optimizer.lr').remarks == ()
        rehearsal = run.rehearse(load('scheduler.name=linear_lr'))
        assert rehearsal.remarks[0] == said
        assert 'max_lr' not in rehearsal.recipe
        assert load('scheduler={name: linear_lr}').replace(seed=5).remarks, 'also when trained for several seeds'

    @pytest.mark.parametrize(
        ('overrides', 'key', 'said'),
        [
            (['~scheduler.max_l'], 'scheduler.max_l', "there is no such key. Did you mean 'max_lr'?"),
            (['~scheduler.gamma'], 'scheduler.gamma', 'there is no such key. scheduler has interval, max_lr, name.'),
            (['~loggers'], 'loggers', 'there is no such key. the recipe has '),
            (['~loggers.wandb.name'], 'loggers', 'there is no such key.'),
            (['~scheduler', '~scheduler'], 'scheduler', 'there is no such key.'),
            (['~scheduler.max_lr=0.4'], 'scheduler.max_lr', 'is 0.3, and the override'),
            (['~evaluate.2'], 'evaluate.2', 'the list has 2 entries, and the first one is 0'),
            (['evaluate.first=ema'], 'evaluate.first', 'the list has 2 entries, and the first one is 0'),
            (['max_duration.ep=2'], 'max_duration', "is '2ep', which has no keys"),
            (['scheduler=${nowhere.x}', 'scheduler.max_lr=1'], 'scheduler', "'nowhere.x' not found"),
            (['scheduler.max_lr=1', 'scheduler.name=linear_lr'], 'scheduler.name', "'scheduler.max_lr=1' before it"),
            (['+optimizer.eps=1e-6'], '', 'needs no +: key=value also adds a key. Write optimizer.eps=1e-6.'),
            (['++optimizer.eps=1e-6'], '', 'Write optimizer.eps=1e-6.'),
            (['other.yaml'], '', 'A run follows one recipe'),
            (['~'], '', 'or ~key, which drops a key'),
        ],
    )  # fmt: skip
    def test_what_cannot_take_effect_is_refused_by_key(self, load, overrides, key, said):
        with pytest.raises(RecipeError) as refused:
            load(*overrides)
        assert refused.value.key == key
        assert said in str(refused.value)

    def test_before_the_recipe_has_a_remedy(self):
        with pytest.raises(RecipeError, match=r'is an override without a recipe before it\. Write RECIPE\.yaml lr=1\.'):
            schema.load('lr=1')

    @pytest.mark.slow
    def test_the_recorded_recipe_and_a_resumed_run_follow_the_changed_one(self, load, tmp_path):
        overrides = ['scheduler.name=cosine_annealing_lr', '~optimizer.lr', 'max_duration=2ep', 'autoresume=true']
        stopped = build(load(*overrides, 'run_name=stopped'), callbacks=[Interrupt(batch=7)])
        write_beside(stopped.folder / 'recipe.yaml', run.as_yaml(stopped.recipe))
        with pytest.raises(KeyboardInterrupt):
            stopped.trainer.fit()
        stopped.trainer.close()
        recorded = schema.load(stopped.folder / 'recipe.yaml')
        assert recorded.values['scheduler'] == {'name': 'cosine_annealing_lr', 'T_max': 2, 'interval': 'epoch'}
        assert recorded.remarks == ()
        train(load(*overrides, 'run_name=stopped'), quiet)
        train(load(*overrides, 'run_name=whole'), quiet)
        assert lines_of(tmp_path / 'runs/stopped') == lines_of(tmp_path / 'runs/whole')
        train(schema.load(stopped.folder / 'recipe.yaml', ['run_name=again', '~autoresume']), quiet)
        assert lines_of(tmp_path / 'runs/again') == lines_of(tmp_path / 'runs/whole')


def test_a_time_longer_than_a_run_of_one_epoch_speaks_of_one_epoch(write):
    overrides = ['max_duration=1ep', 'algorithms.ema.half_life=3ep', 'algorithms.ema.update_interval=1ba']
    with pytest.warns(UserWarning, match=r"^half_life='3ep' in a run of 1 epoch: the average will still hold 8\d % of"):
        train(schema.load(write(), overrides), quiet)


class TestBuild:
    @pytest.fixture(autouse=True)
    def _no_process_group_stays(self):
        """Composer starts one for a sharded model, also in a single process, and never ends it."""
        yield
        if dist.is_initialized():
            dist.destroy_process_group()

    @pytest.fixture
    def black_pictures(self, monkeypatch):
        """Fashion-MNIST's numbers of images without the images, so that schedules have the length of a real run."""
        tensors = {}
        for split, size in (('train', 60_000), ('test', 100)):
            tensors[f'{split}_inputs'] = torch.zeros(size, 1, 28, 28, dtype=torch.uint8)
            tensors[f'{split}_labels'] = torch.arange(size, dtype=torch.uint8) % 10
        monkeypatch.setattr(fetch, 'load_fashion_mnist', lambda root: tensors)

    @pytest.mark.parametrize('path', YAMLS, ids=lambda path: str(path.relative_to(YAML_FOLDER)))
    def test_every_recipe_of_the_package_builds(self, path, tmp_path, monkeypatch, black_pictures):
        _skip_without_its_library(path)
        monkeypatch.chdir(tmp_path)
        shown: list[Any] = []
        conclusion.of_rehearsal(run.rehearse(schema.load(path, ['progress_bar=false', 'device=cpu'])), shown.append)
        assert yaml.safe_load(shown[0])['model'] == yaml.safe_load(path.read_text())['model']
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize('path', YAMLS, ids=lambda path: str(path.relative_to(YAML_FOLDER)))
    def test_every_recipe_of_the_package_trains(self, path, tmp_path, monkeypatch, black_pictures):
        _skip_without_its_library(path)
        # Composer's warm-ups have a rate of zero for two batches.
        known = registry.callbacks()
        classes = {**known.classes, 'stop': functools.partial(Interrupt, batch=3)}
        patched = registry.Registry('callback', classes, {**known.aliases, 'stop': 'stop'})  # pyright: ignore
        monkeypatch.setattr(registry, 'callbacks', lambda: patched)
        overrides = ['progress_bar=false', 'device=cpu', f'runs_folder={tmp_path}', 'callbacks.stop={}']
        built = build(schema.load(path, overrides))
        before = {name: value.clone() for name, value in built.trainer.state.model.named_parameters()}
        with pytest.raises(KeyboardInterrupt):
            built.trainer.fit()
        built.trainer.close()
        after = dict(built.trainer.state.model.named_parameters())
        assert any(not torch.equal(before[name], after[name]) for name in before)
        assert all(value.isfinite().all() for value in after.values())

    def test_evaluators_and_weights_are_paired(self, write):
        built = build(schema.load(write()))
        built.trainer.close()
        (ema,) = built.trainer.state.algorithms
        assert isinstance(ema, EMA)
        assert ema.evaluate_with == {'eval_training': 'training', 'eval_ema': 'ema'}
        assert [evaluator.label for evaluator in built.trainer.state.evaluators] == ['eval_training', 'eval_ema']

    def test_the_evaluators_of_an_equal_average_are_paired_too(self, write):
        built = build(schema.load(write(algorithms={'swa': {'swa_start': '1ep'}}, evaluate=['swa', 'training'])))
        built.trainer.close()
        (swa,) = built.trainer.state.algorithms
        assert isinstance(swa, SWA)
        assert swa.evaluate_with == {'eval_swa': 'swa', 'eval_training': 'training'}

    @pytest.mark.parametrize(
        ('algorithms', 'evaluate', 'message'),
        [
            ({'swa': {'swa_end': '0.97dur'}}, None, 'Leave swa_end out'),
            ({'swa': {'schedule_swa_lr': True, 'anneal_steps': 10}}, None, 'Pass a number as swa_lr'),
            ({'swa': {'avg_fn': 'lambda'}}, None, r'algorithms\.swa\.avg_fn: must be null'),
            ({'swa': {'evaluate_with': {'eval': 'swa'}}}, None, r'evaluate: \[training, swa\]'),
            ({'swa': {}}, ['ema'], 'Add ema: {} under algorithms'),
            (
                {'ema': {'half_life': {'swa': '9ba'}}, 'swa': {}},
                None,
                r"algorithms\.swa: calls an average 'swa', as ema does",
            ),
        ],
    )
    def test_what_our_swa_does_not_do_is_told_with_what_to_write(self, write, algorithms, evaluate, message):
        with pytest.raises(RecipeError, match=message):
            build(schema.load(write(algorithms=algorithms, evaluate=evaluate)))

    def test_every_kind_of_plugin_and_a_torch_scheduler(self, write, tmp_path):
        recipe = write(
            algorithms={
                'ema': {'half_life': '2ba'},
                'gradient_clipping': {'clipping_type': 'norm', 'clipping_threshold': 1.0},
            },
            callbacks={'lr_monitor': {}, 'SpeedMonitor': {'window_size': 2}},
            loggers={'in_memory': None},
            scheduler={'name': 'StepLR', 'step_size': 3},
            step_schedulers_every_batch=True,
            run_name='plugged',
        )
        outcome = train(schema.load(recipe), quiet)
        lines = lines_of(tmp_path / 'runs/plugged')
        assert 'MulticlassAccuracy' in outcome.final('ema').metrics
        rates = [line['lr-AdamW/group0'] for line in lines if 'lr-AdamW/group0' in line]
        assert rates[0] == pytest.approx(0.01)
        assert rates[-1] == pytest.approx(0.01 * 0.1**3)

    def test_seed_orders_the_data_unless_the_data_have_their_own(self, write):
        def first_targets(*overrides: str) -> list[int]:
            built = build(schema.load(write(), overrides))
            built.trainer.close()
            return next(iter(built.trainer.state.train_dataloader))[1].tolist()  # pyright: ignore

        assert first_targets('seed=1') == first_targets('seed=1')
        assert first_targets('seed=1') != first_targets('seed=2')
        assert first_targets('seed=1', 'data.seed=5') == first_targets('seed=2', 'data.seed=5')

    @pytest.mark.parametrize(
        ('overrides', 'trains', 'evaluates'),
        [
            ([], 'fake, 40 training samples, 5 batches per epoch', '10 samples of the test set'),
            (
                ['data.validation_split=0.3', 'data.drop_last=true'],
                'fake, 28 training samples, 3 batches per epoch',
                '12 samples held out of the training set (validation_split=0.3)',
            ),
        ],
    )
    def test_a_rehearsal_says_how_many_samples_train_and_evaluate(self, write, overrides, trains, evaluates):
        parts = run.rehearse(schema.load(write(), overrides)).parts
        assert parts['data'] == trains
        assert parts['evaluates'] == f'eval_training, eval_ema on {evaluates}'

    def test_run_names_count_up_and_autoresume_takes_the_last(self, write, tmp_path):
        path, names = write(), []
        for overrides in ([], [], ['autoresume=true']):
            built = build(schema.load(path, overrides))
            write_beside(built.folder / 'notes.txt', 'a folder without files is removed again')
            built.trainer.close()
            names.append(built.recipe.values['run_name'])
        assert names == ['tiny', 'tiny-2', 'tiny-2']

    def test_failed_start_leaves_no_folder(self, write, tmp_path):
        path = write()
        for _ in range(2):
            with pytest.raises(RecipeError, match='typo'):
                build(schema.load(path, ['algorithms.ema.include=typo']))
            assert not (tmp_path / 'runs').exists()

    def test_failed_start_leaves_what_was_there(self, write, tmp_path):
        path = write()
        write_beside(tmp_path / 'runs/tiny/notes.txt', 'mine')
        with pytest.raises(RecipeError, match='typo'):
            build(schema.load(path, ['run_name=tiny', 'algorithms.ema.include=typo']))
        assert [each.name for each in (tmp_path / 'runs/tiny').iterdir()] == ['notes.txt']


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> tuple[Path, Result, list[Any]]:
    """A finished run: its folder, its result, and what it showed."""
    folder = tmp_path_factory.mktemp('trained')
    path = folder / 'tiny.yaml'
    path.write_text(yaml.safe_dump({**TINY, 'runs_folder': str(folder), 'run_name': 'here'}))
    shown: list[Any] = []
    return folder / 'here', train(schema.load(path), shown.append), shown


class TestRun:
    def test_leaves_checkpoints_metrics_recipe_and_pictures(self, trained):
        folder, _, _ = trained
        names = {path.name for path in folder.iterdir()}
        assert names == {'checkpoints', 'metrics.jsonl', 'recipe.yaml', 'curves.png', 'curves.svg'}
        assert (folder / 'checkpoints/latest-rank0.pt').exists()
        assert (folder / 'curves.png').read_bytes().startswith(b'\x89PNG')
        assert '</svg>' in (folder / 'curves.svg').read_text()

    def test_metrics_hold_each_batch_once_and_each_evaluation_once(self, trained):
        folder, _, _ = trained
        lines = lines_of(folder)
        assert [line['batch'] for line in lines if 'loss/train/total' in line] == list(range(1, 11))
        assert [line['epoch'] for line in lines if 'metrics/eval_ema/CrossEntropy' in line] == [1.0, 2.0]
        assert [line['ema/num_updates'] for line in lines if 'ema/num_updates' in line][-1] == 10

    def test_result_is_what_the_metrics_say(self, trained):
        folder, outcome, _ = trained
        last = [line for line in lines_of(folder) if 'metrics/eval_ema/CrossEntropy' in line][-1]
        assert outcome.final('training').metrics['CrossEntropy'] == last['metrics/eval_training/CrossEntropy']
        assert outcome.final('ema').metrics['MulticlassAccuracy'] == last['metrics/eval_ema/MulticlassAccuracy']
        assert outcome.num_batches == 10
        assert outcome.update_share is not None
        assert 0 < outcome.update_share < 1

    def test_evaluates_the_average_and_the_training_weights_apart(self, trained):
        folder, outcome, _ = trained
        saved = torch.load(folder / 'checkpoints/latest-rank0.pt', weights_only=False)['state']['model']
        averaged = load_average(folder / 'checkpoints/latest-rank0.pt')
        assert any(not torch.equal(saved[name], averaged[name]) for name in averaged)
        assert outcome.final('training').metrics != outcome.final('ema').metrics

    def test_resolved_recipe_trains_again(self, trained, tmp_path):
        folder, outcome, _ = trained
        again = schema.load(folder / 'recipe.yaml', [f'runs_folder={tmp_path}', 'run_name=again'])
        assert train(again, quiet).points == outcome.points
        assert lines_of(tmp_path / 'again') == lines_of(folder)

    def test_table_shows_both_and_the_cost(self, trained):
        _, outcome, shown = trained
        console = Console(width=100, record=True, quiet=True)
        with console.capture() as captured:
            console.quiet = False
            console.print(shown[0])
        text = captured.get()
        assert 'training weights' in text
        assert 'average' in text
        assert f'{100 * outcome.final("ema").metrics["MulticlassAccuracy"]:.2f}' in text
        assert 'measured over 10 batches' in shown[1]

    def test_training_alone_draws_nothing_and_shows_no_table(self, write, tmp_path):
        shown: list[Any] = []
        outcome = run.train(schema.load(write(), ['max_duration=1ep']), shown.append)
        assert shown == []
        assert outcome.folder == tmp_path / 'runs/tiny'
        assert {path.name for path in outcome.folder.iterdir()} == {'checkpoints', 'metrics.jsonl', 'recipe.yaml'}
        lines = lines_of(outcome.folder)
        assert outcome.evaluations == [line for line in lines if 'metrics/eval_ema/CrossEntropy' in line]

    def test_a_run_that_cannot_be_drawn_is_reported_all_the_same(self, write, tmp_path):
        shown: list[Any] = []
        outcome = run.train(schema.load(write(), ['max_duration=1ep']), shown.append)
        (outcome.folder / 'curves.png').mkdir()
        result = conclusion.of_run(outcome, shown.append)
        assert shown[0].startswith(f'no picture of the run: {outcome.folder}/curves.png cannot be written: ')
        assert shown[-1].endswith(f'run folder: {outcome.folder}')
        assert 'CrossEntropy' in result.final('ema').metrics

    def test_only_the_first_of_several_processes_draws(self, write, monkeypatch):
        outcome = run.train(schema.load(write(), ['max_duration=1ep']), quiet)
        monkeypatch.setattr('composer.utils.dist.get_global_rank', lambda: 1)
        conclusion.of_run(outcome, quiet)
        assert not (outcome.folder / 'curves.png').exists()

    def test_seeds_end_with_one_table_and_a_markdown_file(self, write, tmp_path):
        shown: list[Any] = []
        recipe = schema.load(write(), ['max_duration=1ep'])
        outcomes = [
            conclusion.of_run(outcome, shown.append) for outcome in run.train_seeds(recipe, [1, 2], shown.append)
        ]
        conclusion.of_seeds(recipe, outcomes, shown.append)
        assert [outcome.run_name for outcome in outcomes] == ['tiny-seed1', 'tiny-seed2']
        assert outcomes[0].points != outcomes[1].points
        markdown = (tmp_path / 'runs/tiny-seeds.md').read_text()
        assert markdown in shown
        assert [line.split('|')[1].strip() for line in markdown.splitlines()[2:]] == [
            '1',
            '1',
            '2',
            '2',
            'mean',
            'mean',
        ]


class Interrupt(Callback):
    """Stops the run like a crash would, before the batch counts as done in any checkpoint."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def batch_end(self, state, logger) -> None:
        if int(state.timestamp.batch) == self.batch:
            raise KeyboardInterrupt


class TestResume:
    @pytest.fixture
    def interrupted_at(self, monkeypatch) -> Callable[[int | None], None]:
        """Lets the next run be interrupted at a batch, through a callback that recipes can name."""

        def interrupt(batch: int | None) -> None:
            known = registry.callbacks()
            stop = functools.partial(Interrupt, batch=batch or 0)
            patched = registry.Registry('callback', {'interrupt': stop}, {'interrupt': 'interrupt'})  # pyright: ignore
            monkeypatch.setattr(registry, 'callbacks', lambda: patched if batch else known)

        return interrupt

    @pytest.mark.parametrize(
        ('batch', 'save_interval'),
        [
            pytest.param(
                batch, interval, marks=() if (batch, interval) in [(5, '3ba'), (6, '1ep')] else pytest.mark.slow
            )
            for batch in (2, 4, 5, 6, 9, 10)
            for interval in ('3ba', '1ep')
        ],
    )
    def test_interrupted_and_resumed_leaves_the_same_lines(self, write, tmp_path, interrupted_at, batch, save_interval):
        whole = schema.load(write(save_interval=save_interval), ['run_name=whole'])
        expected = train(whole, quiet)
        interrupted_at(batch)
        path = write(save_interval=save_interval, run_name='broken', autoresume=True, callbacks={'interrupt': {}})
        with pytest.raises(KeyboardInterrupt):
            train(schema.load(path), quiet)
        interrupted_at(None)
        resumed = train(schema.load(path, ['callbacks=null']), quiet)
        assert lines_of(tmp_path / 'runs/broken') == lines_of(tmp_path / 'runs/whole')
        assert resumed.points == expected.points
        assert resumed.num_batches == 10

    def test_checkpoint_written_but_not_yet_pointed_at_does_not_stop_the_resume(self, write, tmp_path, interrupted_at):
        interrupted_at(8)
        path = write(save_interval='3ba', run_name='broken', autoresume=True, callbacks={'interrupt': {}})
        with pytest.raises(KeyboardInterrupt):
            train(schema.load(path), quiet)
        folder = tmp_path / 'runs/broken/checkpoints'
        (folder / 'ep1-ba9-rank0.pt').write_bytes((folder / 'ep1-ba6-rank0.pt').read_bytes())
        interrupted_at(None)
        train(schema.load(path, ['callbacks=null']), quiet)
        assert [line['batch'] for line in lines_of(tmp_path / 'runs/broken')][-1] == 10

    @pytest.mark.parametrize('save_folder', [None, '{run_name}/saved'])
    def test_takes_the_last_run_that_holds_a_checkpoint(self, write, tmp_path, save_folder):
        path = write(**({} if save_folder is None else {'save_folder': f'{tmp_path}/{save_folder}'}))
        train(schema.load(path), quiet)
        train(schema.load(path, ['max_duration=1ep']), quiet)
        (tmp_path / 'runs/tiny-3/checkpoints').mkdir(parents=True)
        shown: list[Any] = []
        resumed = train(schema.load(path, ['autoresume=true', 'max_duration=3ep']), shown.append)
        assert resumed.run_name == 'tiny-2'
        assert resumed.num_batches == 15
        assert [point.epoch for point in resumed.points['ema']] == [1, 2, 3]
        assert shown[0].startswith('autoresume: going on from ')
        assert shown[0].endswith('ep1-ba5-rank0.pt, batch 5')

    @pytest.mark.parametrize(
        ('began', 'goes_on'), [([], 'data.validation_split=0.25'), (['data.validation_split=0.25'], '')]
    )
    def test_other_held_out_samples_are_refused(self, write, began, goes_on):
        path = write(run_name='split', max_duration='1ep')
        train(schema.load(path, began), quiet)
        overrides = ['autoresume=true', 'max_duration=2ep', *filter(None, [goes_on])]
        with pytest.raises(RecipeError, match=r'data\.validation_split: must stay 0.*Write 0.*or start another run'):
            build(schema.load(path, overrides))
        build(schema.load(path, [*began, 'autoresume=true', 'max_duration=2ep'])).trainer.close()

    def test_says_so_when_there_is_nothing_to_resume(self, write, tmp_path):
        shown: list[Any] = []
        train(schema.load(write(), ['autoresume=true', 'max_duration=1ep']), shown.append)
        assert shown[0] == f'autoresume: {tmp_path}/runs/tiny holds no checkpoint; training starts from the beginning'

    def test_finished_run_is_reported_again_and_not_trained_further(self, write, tmp_path):
        path = write(run_name='done', autoresume=True)
        first = train(schema.load(path), quiet)
        lines = lines_of(tmp_path / 'runs/done')
        shown: list[Any] = []
        again = train(schema.load(path), shown.append)
        assert again == first
        assert shown[1] == 'done has already trained for 2ep: nothing is left to train'
        assert lines_of(tmp_path / 'runs/done') == lines

        shown.clear()
        path, checkpoint = write(run_name='new'), tmp_path / 'runs/done/checkpoints/latest-rank0.pt'
        train(schema.load(path, [f'load_path={checkpoint}', 'max_duration=1ep']), shown.append)
        assert re.match(
            'new has already trained for 2ep: .* max_duration=1ep counts from.*load_weights_only=true', shown[0]
        )
        assert not (tmp_path / 'runs/new').exists()
        assert 'run folder' not in shown[-1]
        assert not [line for line in shown if 'no picture' in str(line)]

    @pytest.mark.slow
    def test_load_path_continues_in_a_new_folder_with_the_evaluations_so_far(self, write, tmp_path):
        path = write()
        train(schema.load(path, ['run_name=first', 'max_duration=1ep']), quiet)
        checkpoint = tmp_path / 'runs/first/checkpoints/latest-rank0.pt'
        longer = train(schema.load(path, ['run_name=second', f'load_path={checkpoint}']), quiet)
        straight = train(schema.load(path, ['run_name=straight']), quiet)
        assert longer.points == straight.points
        batches = [line['batch'] for line in lines_of(tmp_path / 'runs/second')]
        assert batches == [5, 6, 7, 8, 9, 10, 10]
        saved = torch.load(tmp_path / 'runs/second/checkpoints/latest-rank0.pt', weights_only=False)
        recorded = next(state for name, state in saved['state']['callbacks'].items() if 'Recorder' in name)
        assert recorded['num_lines'] == len(batches), 'so that it can be interrupted once more'

    def test_half_written_last_line_is_dropped(self, tmp_path):
        path = tmp_path / 'metrics.jsonl'
        path.write_text('{"batch": 1}\n{"batch": 2}\n{"bat')
        recorder = Recorder(RunFolder(tmp_path.name, tmp_path))
        recorder.load_state_dict({**recorder.state_dict(), 'num_lines': 2, 'evaluations': '[]'})
        recorder._begin()
        assert path.read_text() == '{"batch": 1}\n{"batch": 2}\n'

    def test_recorder_state_is_plain_and_survives_a_round_trip(self):
        recorder = Recorder()
        recorder.evaluations, recorder.num_lines, recorder.step_seconds = [{'epoch': 1.0, 'batch': 2}], 3, 0.5
        state = recorder.state_dict()
        assert json.loads(json.dumps(state)) == state
        # A sharded checkpoint has a key for each entry of a container, and loading asks for those of a new recorder.
        assert not any(isinstance(value, list | dict) for value in state.values())
        other = Recorder()
        other.load_state_dict(state)
        assert other.state_dict() == state
        assert other.evaluations == recorder.evaluations
        for before in (
            recorder.evaluations,
            json.dumps(recorder.evaluations),
            json.dumps({'lines': recorder.evaluations}),
        ):
            of_before = Recorder()
            of_before.load_state_dict({**state, 'evaluations': before})
            assert of_before.evaluations == recorder.evaluations


class TestReport:
    TRAINING = (
        classified(1, 0.85, 0.4),
        classified(2, 0.89, 0.3),
        classified(3, 0.91, 0.29),
        classified(4, 0.899, 0.28),
    )
    AVERAGE = (
        classified(1, 0.88, 0.35),
        classified(2, 0.90, 0.27),
        classified(3, 0.92, 0.25),
        classified(4, 0.93, 0.24),
    )

    def outcome(self, **changed: Any) -> Result:
        points = {'training': list(self.TRAINING), 'ema': list(self.AVERAGE)}
        arguments: dict[str, Any] = {'points': points, 'update_share': 0.012, 'num_batches': 40, **changed}
        return Result('r', 1, Report(target_accuracy=arguments.pop('target_accuracy', 0.9)), **arguments)

    def test_first_epoch_is_the_first_at_or_above_the_target(self):
        assert self.outcome().first_epoch('training') == 3
        assert self.outcome().first_epoch('ema') == 2
        assert self.outcome(target_accuracy=0.92).first_epoch('training') is None

    def test_first_epoch_allows_for_the_rounding_of_float32(self):
        accuracy = torch.tensor(0.9, dtype=torch.float32).item()
        assert accuracy < 0.9
        assert self.outcome(points={'ema': [classified(1, accuracy, 0.3)]}).first_epoch('ema') == 1
        assert self.outcome(points={'ema': [classified(1, 0.8999, 0.3)]}).first_epoch('ema') is None

    def test_markdown_by_hand(self):
        never = {'training': [classified(1, 0.5, 1.0)], 'ema': [classified(1, 0.91, 0.5)]}
        other = Result('s', 2, Report(), never, update_share=0.02, num_batches=40)
        assert report.seeds_markdown([self.outcome(), other]).splitlines() == [
            '| seed | weights | first epoch at 90 % | final accuracy % | final loss | cost, % of step time |',
            '| ---: | :--- | ---: | ---: | ---: | ---: |',
            '| 1 | training weights | 3 | 89.90 | 0.2800 |  |',
            '| 1 | average | 2 | 93.00 | 0.2400 | 1.20 |',
            '| 2 | training weights | not reached | 50.00 | 1.0000 |  |',
            '| 2 | average | 1 | 91.00 | 0.5000 | 2.00 |',
            '| mean | training weights | not by all | 69.95 | 0.6400 |  |',
            '| mean | average | 1.5 | 92.00 | 0.3700 | 1.60 |',
        ]

    def test_share_of_step_time_is_a_ratio_of_sums(self):
        recorder = Recorder()
        assert recorder.update_share is None
        recorder.step_seconds, recorder.update_seconds = 4.0, 0.1
        assert recorder.update_share == pytest.approx(0.025)

    def test_summary_by_hand(self):
        assert report.summary(self.outcome(target_accuracy=0.92)).splitlines() == [
            'first epoch at 92 %, training weights: not reached',
            'first epoch at 92 %, average: 3',
            'cost of the average: 1.20 % of step time, measured over 40 batches',
        ]
        assert report.summary(self.outcome(points={}, update_share=None)) == ''

    def test_failed_write_leaves_the_old_file_and_nothing_beside_it(self, tmp_path, monkeypatch):
        path = tmp_path / 'file'
        write_beside(path, 'old')

        def refuse(*_: Any) -> None:
            raise OSError('disk full')

        monkeypatch.setattr('os.replace', refuse)
        with pytest.raises(OSError, match='disk full'):
            write_beside(path, 'new')
        assert path.read_text() == 'old'
        assert list(tmp_path.iterdir()) == [path]


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(['3ba', 'ema'])
)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6), v, max_size=3))
PATHS = [
    ('max_duration',), ('seed',), ('device',), ('precision',), ('eval_interval',), ('save_folder',),
    ('load_ignore_keys',),     ('model',), ('model', 'name'), ('model', 'widths'), ('data',), ('data', 'name'),
    ('data', 'batch_size'),
    ('optimizer',), ('optimizer', 'lr'), ('optimizer', 'betas'), ('scheduler',), ('algorithms',), ('algorithms', 'ema'),
    ('algorithms', 'ema', 'half_life'), ('algorithms', 'ema', 'include'), ('algorithms', 'ema', 'shadow_dtype'),
    ('callbacks',), ('loggers',), ('evaluate',), ('report',), ('report', 'target_accuracy'), ('variables',),
]  # fmt: skip


def changed(values: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy of nested dictionaries with one entry replaced."""
    inner = values.get(path[0])
    new = value if len(path) == 1 else changed(inner if isinstance(inner, dict) else {}, path[1:], value)
    return {**values, path[0]: new}


@pytest.fixture(scope='module')
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp('hypothesis') / 'recipe.yaml'


@settings(max_examples=200, deadline=None)
@given(changes=st.lists(st.tuples(st.sampled_from(PATHS) | st.tuples(st.text(max_size=8)), VALUES), max_size=2))
def test_any_recipe_is_refused_or_planned_as_it_says(scratch, changes):
    values: dict[str, Any] = TINY
    for path, value in changes:
        values = changed(values, path, value)
    scratch.write_text(yaml.safe_dump(values, allow_unicode=True))
    try:
        checked = schema.plan(schema.load(scratch))
        for each in checked.algorithms:
            each.build()
    except RecipeError:
        return
    assert isinstance(checked, Plan)
    assert checked.model.name == values['model']['name']
    assert checked.trainer['max_duration'] == values['max_duration']
    assert checked.data.arguments == {key: value for key, value in values['data'].items() if key != 'name'}


@settings(max_examples=100, deadline=None)
@given(overrides=st.lists(st.text(max_size=12) | st.tuples(st.text(max_size=8), st.text(max_size=8)).map('='.join)))
def test_any_override_is_refused_or_merged(scratch, overrides):
    scratch.write_text(yaml.safe_dump(TINY))
    try:
        schema.plan(schema.load(scratch, overrides))
    except RecipeError:
        return


def _skip_without_its_library(recipe: Path) -> None:
    if 'name: hf_' in recipe.read_text():
        pytest.importorskip('transformers')
