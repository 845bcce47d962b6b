"""A user's own code in a recipe: the files that ``code_paths`` names, and what they may register and return."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from composer import DataSpec, Evaluator
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from composer_ema.recipe import code_paths, register_callback, register_dataset, register_model, registry, run, schema
from composer_ema.recipe.arguments import Place, RecipeError
from composer_ema.recipe.build import build
from composer_ema.zoo import plugins
from composer_ema.zoo.dataset import extent
from composer_ema.zoo.models import build_model
from composer_ema.zoo.own_data import own_dataset

CODE = """
    import torch
    from torch import nn
    from composer.models import ComposerClassifier
    from torchmetrics import MeanSquaredError
    from composer_ema.recipe import register_dataset, register_model

    @register_dataset('circle', samples=lambda given: given['points'] - 8)
    def circle(points: int = 40):
        angles = torch.linspace(0, 6, points)
        data = [{'angle': a.reshape(1), 'sine': a.sin().reshape(1)} for a in angles]
        return data[8:], data[:8]

    class Sine(ComposerClassifier):
        def forward(self, batch):
            return self.module(batch['angle'])
        def loss(self, outputs, batch):
            return nn.functional.mse_loss(outputs, batch['sine'])
        def update_metric(self, batch, outputs, metric):
            metric.update(outputs, batch['sine'])

    @register_model('sine')
    def sine(width: int = 4):
        layers = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))
        return Sine(layers, train_metrics=MeanSquaredError(), val_metrics=MeanSquaredError())
    """
RECIPE = {
    'code_paths': ['code/sines.py'], 'max_duration': '2ep', 'device': 'cpu', 'progress_bar': False,
    'data': {'name': 'circle', 'batch_size': 8, 'validation_split': 0.25}, 'model': {'name': 'sine', 'width': 3},
    'optimizer': {'name': 'sgd', 'lr': 0.01}, 'algorithms': {'ema': {'half_life': '1ba', 'snapshots': '1ba'}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone_in_the_process() -> Iterator[None]:
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name, (module, _) in list(code_paths._imported.items()):
        sys.modules.pop(module.__name__, None)
        del code_paths._imported[name]


@pytest.fixture
def project(tmp_path) -> Path:
    """A folder with a recipe, and code in a folder below it."""
    (tmp_path / 'code').mkdir()
    (tmp_path / 'elsewhere').mkdir()
    write(tmp_path / 'code/sines.py', CODE)
    (tmp_path / 'own.yaml').write_text(yaml.safe_dump({**RECIPE, 'runs_folder': str(tmp_path / 'runs')}))
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def plan(*paths: object, **values: Any) -> schema.Plan:
    return schema.plan(schema.Recipe('own.yaml', 'own', {**RECIPE, 'code_paths': [*map(str, paths)], **values}))


def test_a_recipe_trains_and_sweeps_from_any_folder_with_the_code_that_it_names(call, project, monkeypatch):
    monkeypatch.chdir(project / 'elsewhere')
    said = f'code_paths: {project}/code/sines.py is imported, which registers data set circle, model sine'
    code, out, err = call('train', '../own.yaml')
    assert (code, out.splitlines()[0]) == (0, said), err
    assert 'MeanSquaredError' in out
    assert 'accuracy' not in out
    resolved = project / 'runs/own/recipe.yaml'
    assert yaml.safe_load(resolved.read_text())['code_paths'] == [f'{project}/code/sines.py']
    code, out, err = call('sweep', project / 'runs/own', '--points', '3')
    assert (code, said in out.splitlines()) == (0, True), err
    poisoned = write(project / 'code/sines.py', 'raise RuntimeError("moved on")')
    assert call('plot', project / 'runs/own')[0] == 0, 'a look at a run imports nothing'
    code, _, err = call('sweep', project / 'runs/own')
    assert code == 2
    assert f'code_paths.0: {poisoned} cannot be imported: RuntimeError: moved on ({poisoned}, line 1: raise' in err


@pytest.mark.slow
def test_a_run_goes_on_from_any_folder_with_its_own_recipe_and_a_preview_says_what_it_imports(
    call, project, monkeypatch
):
    assert call('train', project / 'own.yaml')[0] == 0
    monkeypatch.chdir(project / 'elsewhere')
    code, out, err = call('train', project / 'runs/own/recipe.yaml', 'max_duration=3ep', 'autoresume=true')
    assert (code, 'batch 6' in out) == (0, True), err
    code, out, _ = call('plot', project / 'own.yaml')
    assert (code, 'code/sines.py is imported' in out) == (0, True)


def test_a_path_in_a_file_is_relative_to_it_and_one_in_an_override_to_the_current_folder(project, monkeypatch):
    monkeypatch.chdir(project / 'elsewhere')
    load = lambda *overrides: schema.load(project / 'own.yaml', overrides).values['code_paths']  # noqa: E731
    assert load() == [f'{project}/code/sines.py']
    assert load('code_paths=[mine.py]') == [f'{project}/elsewhere/mine.py']
    assert load('variables.folder=code', 'code_paths=["${variables.folder}/a.py"]') == [
        f'{project}/elsewhere/code/a.py'
    ]
    assert load(f'code_paths=[{project}/x.py, code/sines.py]') == [f'{project}/x.py', f'{project}/code/sines.py']


MODEL = """
    from composer_ema.recipe import register_model
    @register_model({!r})
    def own(num_classes: int = 2): ...
    """
WRONG = {
    'missing': ({}, 'a.py', r'no file \S+a\.py\. A path in a recipe is relative .* Files in \S+: \S+other\.py'),
    'folder': ({'a/b.py': ''}, 'a', r'a is a folder without an __init__\.py'),
    'no Python': ({'a.txt': ''}, 'a.txt', r"does not end in \.py"),
    'no module': ({'my-code.py': ''}, 'my-code.py', r'my-code\.py cannot be the name of a module\. Rename it'),
    'taken': ({'json.py': ''}, 'json.py', r'json\.py has the name of the module json \(.*\), which others import'),
    'raises': ({'a.py': 'x = 1\n\ny = x / 0\n'}, 'a.py', r'ZeroDivisionError: .* \(\S+a\.py, line 3: y = x / 0\)'),
    'in a library': ({'a.py': 'import json\njson.loads("x")\n'}, 'a.py', r'JSONDecodeError: .*, line 2: json\.loads'),
    'syntax': ({'a.py': 'def f(:\n'}, 'a.py', r'SyntaxError: invalid syntax \(a\.py, line 1\)'),
    'exits': ({'a.py': 'import sys\nsys.exit(3)\n'}, 'a.py', r'SystemExit: 3 \(\S+a\.py, line 2'),
    'built-in': ({'a.py': MODEL.format('fashion_cnn')}, 'a.py', r"'fashion_cnn', and fashion_cnn = composer_ema"),
    'of a family': ({'a.py': MODEL.format('resnet18')}, 'a.py', r"line 3, registers the model 'resnet18'"),
    'twice': ({'a.py': MODEL.format('own') + MODEL.format('own')}, 'a.py', r"'own', and so does \S+a\.py, line 3"),
    'no name': ({'a.py': MODEL.format('my model')}, 'a.py', r"has letters, digits, _, - and \., got 'my model'"),
}  # fmt: skip


@pytest.mark.parametrize('case', WRONG)
def test_what_cannot_be_imported_is_refused_with_the_line_of_the_users_file(tmp_path, case):
    files, path, message = WRONG[case]
    write(tmp_path / 'other.py', '')
    for name, text in files.items():
        write(tmp_path / name, text)
    with pytest.raises(RecipeError, match=message) as error:
        plan(tmp_path / path)
    assert error.value.key == 'code_paths.0'


def test_it_is_a_list_of_paths():
    for wrong in ('a.py', {'a': 1}, [3]):
        with pytest.raises(RecipeError, match=r'code_paths: must be a list, each entry a string'):
            code_paths.import_all(wrong, Place('f', 'code_paths'))


def test_two_files_may_not_register_one_name_and_two_recipes_may_name_two_files_that_do(tmp_path):
    first, second = (write(tmp_path / f'{each}.py', MODEL.format('own')) for each in ('one', 'two'))
    with pytest.raises(RecipeError, match=r"code_paths\.1: .*two\.py, line 3, registers 'own', and so does .*one\.py"):
        plan(first, second)
    for path in (first, second, first):
        code_paths.import_all([str(path)], Place('f'))
        assert registry.models().find('own').__module__ == path.stem
    code_paths.import_all([], Place('f'))
    assert registry.models().canonical('own') is None, 'a recipe sees what it names, and nothing else'


def test_a_file_is_imported_once_and_again_when_it_has_changed(tmp_path, capsys):
    path = write(tmp_path / 'counted.py', 'print("once")')
    for _ in range(3):
        plan(path, model={'name': 'mnist1d_mlp'}, data={'name': 'mnist1d'})
    assert capsys.readouterr().out == 'once\n'
    path.write_text('print("twice or more")')
    plan(path, model={'name': 'mnist1d_mlp'}, data={'name': 'mnist1d'})
    assert capsys.readouterr().out == 'twice or more\n'


def test_the_line_of_an_error_is_that_of_the_file_as_it_is_now(tmp_path):
    for line in ('x = 1 / 0', 'another = 1 / 0'):
        path = write(tmp_path / 'mended.py', line)
        with pytest.raises(RecipeError, match=rf'\({path}, line 1: {line}\)'):
            plan(path)


def test_the_recipe_of_a_run_names_its_code_by_absolute_paths_whoever_made_it(project, monkeypatch):
    monkeypatch.chdir(project)
    built = build(schema.Recipe('own.yaml', 'own', dict(RECIPE)), scratch=project / 'scratch')
    built.trainer.close()
    assert built.recipe.values['code_paths'] == [f'{project}/code/sines.py']


def test_a_package_and_what_lies_beside_a_file_can_be_imported(tmp_path):
    write(tmp_path / 'helping.py', 'WIDTH = 7')
    write(tmp_path / 'mine/__init__.py', 'from helping import WIDTH\nfrom . import parts')
    write(tmp_path / 'mine/parts.py', MODEL.format('of_a_package'))
    _, (said,) = code_paths.import_all([str(tmp_path / 'mine')], Place('f'))
    assert said == f'code_paths: {tmp_path}/mine is imported, which registers model of_a_package'
    assert registry.models().find('of_a_package').__module__ == 'mine.parts'


KINDS = """
    import torch
    from composer import Algorithm, Callback
    from composer.loggers import LoggerDestination
    from composer_ema import recipe

    @recipe.register_callback('own_callback')
    class A(Callback): ...

    @recipe.register_algorithm('own_algorithm')
    class B(Algorithm):
        def match(self, event, state): return False
        def apply(self, event, state, logger): ...

    @recipe.register_logger('own_logger')
    class C(LoggerDestination): ...

    @recipe.register_optimizer('own_optimizer')
    class D(torch.optim.SGD): ...

    @recipe.register_scheduler('own_scheduler')
    class E(torch.optim.lr_scheduler.StepLR): ...
    """


def test_every_kind_of_thing_can_be_ones_own(tmp_path):
    found = plan(
        write(tmp_path / 'kinds.py', KINDS),
        data={'name': 'mnist1d'}, model={'name': 'mnist1d_mlp'}, callbacks={'own_callback': {}},
        algorithms={'own_algorithm': {}}, loggers={'own_logger': {}}, optimizer={'name': 'own_optimizer', 'lr': 0.5},
        scheduler={'name': 'own_scheduler', 'step_size': 3},
    )  # fmt: skip
    built = [*found.callbacks, *found.algorithms, *found.loggers, found.optimizer, found.schedulers[0].named]
    assert [each.factory.__name__ for each in built if each is not None] == ['A', 'B', 'C', 'D', 'E']


def test_what_a_script_registers_is_found_without_a_file_and_of_its_kind():
    @register_model('own_net')
    class Net(torch.nn.Linear):
        def __init__(self, num_classes: int = 3) -> None:
            super().__init__(2, num_classes)

    register_callback('no_callback')(Net)
    assert build_model('own_net', num_classes=4).num_classes == 4
    with pytest.raises(plugins.PluginError, match=r'no_callback, which .* registers, is no callback: it is'):
        registry.callbacks().find('no_callback')
    with pytest.raises(TypeError, match='must be a class or a function, got 3'):
        register_model('three')(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r'Write @register_model\("name"\)'):
        register_model(Net)  # pyright: ignore[reportArgumentType]: without its parentheses


def pair() -> tuple[TensorDataset, TensorDataset]:
    inputs = torch.arange(20.0).reshape(20, 1)
    return TensorDataset(inputs, torch.arange(20) % 2), TensorDataset(inputs[:6], torch.arange(6) % 2)


def batches(loader: Any) -> list[list[float]]:
    return [inputs.flatten().tolist() for inputs, _ in loader]


class TestData:
    def test_loaders_are_made_of_data_sets_by_the_arguments_of_all_recipes(self):
        data = own_dataset(pair)(batch_size=8, eval_batch_size=3, drop_last=True, seed=5)
        assert [len(each) for each in batches(data.train)] == [8, 8]
        assert batches(data.evaluation) == [[0, 1, 2], [3, 4, 5]]
        again, other = (own_dataset(pair)(batch_size=8, seed=seed, drop_last=True) for seed in (5, 6))
        assert batches(data.train) == batches(again.train) != batches(other.train)

    def test_samples_are_held_out_of_the_training_set_whatever_the_seed(self):
        for returned in (pair, lambda: pair()[0]):
            first, second = (own_dataset(returned)(validation_split=0.25, seed=seed) for seed in (0, 1))
            assert batches(first.evaluation) == batches(second.evaluation)
            (train,), (held_out,) = batches(first.train), batches(first.evaluation)
            assert (len(held_out), sorted(train + held_out)) == (5, list(range(20)))

    def test_a_function_that_takes_an_argument_itself_gets_it(self):
        def own(*, batch_size: int = 2, validation_split: float = 0.0):
            assert (batch_size, validation_split) == (4, 0.5)
            return pair()

        data = own_dataset(own)(batch_size=4, validation_split=0.5)
        assert (len(data.train), len(batches(data.evaluation))) == (5, 2)

    @pytest.mark.parametrize('wrap', [DataLoader, lambda data: DataSpec(DataLoader(data)), lambda data: iter([data])])
    def test_loaders_of_ones_own_are_taken_as_they_are_and_what_would_change_them_is_refused(self, wrap):
        train, evaluation = map(wrap, pair())
        data = own_dataset(lambda: (train, evaluation))(seed=3)
        assert (data.train, data.evaluation) == (train, evaluation)
        with pytest.raises(ValueError, match='batch_size has no effect: the function of the data set makes its own'):
            own_dataset(lambda: (train, evaluation))(batch_size=3)

    def test_an_evaluator_keeps_its_metrics_under_the_labels_of_recipes(self):
        own = Evaluator(label='mine', dataloader=DataLoader(pair()[1]), metric_names=['Accuracy'], subset_num_batches=2)
        label, again = (own_dataset(lambda: (pair()[0], own))().evaluator(label) for label in ('eval_a', 'eval_b'))
        assert (label.label, again.label, own.label) == ('eval_a', 'eval_b', 'mine')
        assert (again.metric_names, again.subset_num_batches) == (['Accuracy'], 2)

    @pytest.mark.parametrize(
        ('returned', 'message'),
        [
            (None, r'returned nothing\. Return a pair'),
            ((1, 2, 3), r'returned a tuple of 3\. Return a pair'),
            ((3, 4), r'returned an object of type int in its pair'),
            (pair()[0], r'nothing to evaluate on\. Write validation_split: 0\.1'),
        ],
        ids=['nothing', 'three', 'numbers', 'one'],
    )
    def test_anything_else_is_refused(self, returned, message):
        with pytest.raises(TypeError, match=message):
            own_dataset(lambda: returned)()

    def test_an_epoch_is_counted_where_the_number_of_samples_is_registered(self):
        counted = own_dataset(lambda points=9: pair(), samples=lambda given: given['points'] * 2)
        assert extent(counted, {'points': 10, 'batch_size': 8, 'validation_split': 0.25}).batches == 2  # pyright: ignore[reportOptionalMemberAccess]
        assert extent(own_dataset(pair, samples=20), {}).samples == 20  # pyright: ignore[reportOptionalMemberAccess]
        assert extent(own_dataset(pair), {}) is None


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield torch.zeros(40), torch.tensor(1)


def test_a_stream_without_an_end_trains_for_its_batches(tmp_path):
    register_dataset('stream')(lambda: (Stream(), pair_of_signals()))
    recipe = schema.Recipe('s.yaml', 's', {
        **RECIPE, 'code_paths': [], 'max_duration': '3ba', 'data': {'name': 'stream', 'batch_size': 2},
        'model': {'name': 'mnist1d_mlp'}, 'runs_folder': str(tmp_path), 'algorithms': {'ema': {'half_life': '1ba'}},
        'scheduler': {'name': 'one_cycle_lr', 'max_lr': 0.1}, 'eval_interval': '3ba',
    })  # fmt: skip
    shown: list[str] = []
    outcome = run.train(recipe, shown.append)
    assert [line['batch'] for line in outcome.evaluations] == [3]


def pair_of_signals() -> list[tuple[torch.Tensor, int]]:
    return [(torch.zeros(40), 1)] * 4


def test_an_error_in_the_users_function_names_its_line(tmp_path):
    path = write(
        tmp_path / 'failing.py',
        """
        from composer_ema.recipe import register_model
        @register_model('failing')
        def failing(width: int = 3):
            return {}[width]
        """,
    )
    found = plan(path, model={'name': 'failing', 'width': 9}, data={'name': 'mnist1d'})
    with pytest.raises(RecipeError, match=rf'model: 9 \({path}, line 5: return {{}}\[width\]\)'):
        found.model.build()


def keeps(function: Callable[..., Any]) -> bool:
    return function is register_dataset('kept')(function)


def test_the_decorators_leave_what_they_decorate_as_it_is():
    assert keeps(pair)
