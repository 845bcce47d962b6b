"""llm-foundry finds the algorithms by entry point, and recipes find what any installed package registers."""

from __future__ import annotations

import configparser
import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from composer_ema import EMA, SWA
from composer_ema.recipe import registry, schema
from composer_ema.recipe.arguments import Place, RecipeError
from composer_ema.recipe.build import build
from composer_ema.recipe.named import find
from composer_ema.zoo.data import fake
from composer_ema.zoo.dataset import dataset
from composer_ema.zoo.plugins import Family, PluginError, Plugins

ROOT = Path(__file__).parents[1]
GROUP = 'llmfoundry_algorithms'
#: An argument each, as llm-foundry's YAML would hold it, that is not the default.
ARGUMENTS = {
    EMA: """
        half_life: 0.1dur
        ema_start: 0.5ep
        update_interval: 2ba
        buffers: copy
        include: [weight, bias]
        exclude: norm
        shadow_dtype: bfloat16
        shadow_device: cpu
        skip_nonfinite: true
        shard_over_ranks: true
        rounding: stochastic
        seed: 3
        evaluate_with: {eval_training: training}
        evaluate: [training, ema]
        log_interval: null
        export_weights: ema
        """,
    SWA: """
        swa_start: 0.5ep
        update_interval: 2ba
        swa_lr: [0.05, 0.1]
        anneal_strategy: cos
        anneal_length: 5ep
        refresh_batchnorm: 0.5ep
        buffers: copy
        include: [weight, bias]
        exclude: norm
        shadow_dtype: bfloat16
        shadow_device: cpu
        skip_nonfinite: true
        shard_over_ranks: true
        rounding: stochastic
        seed: 3
        evaluate_with: {eval_training: training}
        evaluate: [training, swa]
        log_interval: null
        export_weights: swa
        """,
}
#: Takes the place of another one of the arguments above.
INSTEAD = {
    EMA: [
        'smoothing: 0.99',
        'power: 0.1',
        'gamma: 6.9',
        'average: equal',
        'warmup: 0.1',
        'bias_correction: true',
        'compensated: true',
        'half_life: {short: 10ba, long: 1ep}',
        'snapshots: 0.1dur',
    ],
    SWA: ['swa_lr: 0.05', 'compensated: true'],
}
#: Functions, for programs, and what only refuses the arguments of Composer's own SWA.
NOT_IN_YAML = {'avg_fn', 'multi_avg_fn', 'swa_end', 'schedule_swa_lr', 'anneal_steps'}


@pytest.fixture(scope='module')
def installed(tmp_path_factory) -> Path:
    """A folder with the metadata that installing the package would give."""
    folder = tmp_path_factory.mktemp('site')
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg')
    points = config['options.entry_points'][GROUP]
    info = folder / 'composer_ema-9.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: composer-ema\nVersion: 9\n')
    (info / 'entry_points.txt').write_text(f'[{GROUP}]\n{textwrap.dedent(points).strip()}\n')
    return folder


def run(program: str, folder: Path) -> str:
    """Runs a program where the package is installed."""
    program = f'import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\n{textwrap.dedent(program)}'
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_catalogue_finds_each_algorithm(installed):
    pytest.importorskip('catalogue', reason='needs catalogue, which the extra dev installs')
    output = run(
        """
        import catalogue
        from composer.core import Algorithm

        algorithms = catalogue.create('llmfoundry', 'algorithms', entry_points=True)
        assert 'ema' in algorithms
        found = algorithms.get('ema')
        assert issubclass(found, Algorithm)
        print(found.__module__, found.__qualname__, found(half_life='2ba', seed=3))
        found = algorithms.get('swa')
        print(found.__module__, found.__qualname__, found('2ep', swa_lr=0.1))
        """,
        installed,
    )
    assert output.splitlines()[:2] == [
        "composer_ema.trainer.ema EMA EMA(half_life='2ba', seed=3)",
        "composer_ema.trainer.swa SWA SWA(swa_start='2ep', swa_lr=0.1)",
    ]


def test_llm_foundry_builds_each_algorithm(installed):
    pytest.importorskip('llmfoundry', reason='needs llm-foundry, which wants other versions of NumPy and protobuf')
    output = run(
        """
        from llmfoundry import registry
        from llmfoundry.utils.builders import build_algorithm

        assert {'ema', 'swa'} <= registry.algorithms.get_entry_points().keys()
        print(build_algorithm('swa', {'swa_start': '2ep', 'swa_lr': 0.1}))
        print(build_algorithm('ema', {'half_life': '2ba', 'seed': 3}))
        """,
        installed,
    )
    assert output.splitlines()[-2:] == ["SWA(swa_start='2ep', swa_lr=0.1)", "EMA(half_life='2ba', seed=3)"]


@pytest.mark.parametrize('algorithm', ARGUMENTS)
def test_every_argument_can_be_given_in_yaml(algorithm):
    arguments = yaml.safe_load(ARGUMENTS[algorithm])
    instead = [yaml.safe_load(each) for each in INSTEAD[algorithm]]
    parameters = inspect.signature(algorithm).parameters
    assert parameters.keys() - NOT_IN_YAML == arguments.keys() | set().union(*instead)
    config = algorithm(**arguments).state_dict()['config']
    assert {key: config[key] for key in arguments} == arguments
    assert all(arguments[key] != parameters[key].default for key in arguments)
    assert yaml.safe_load(yaml.safe_dump(config)) == config
    for each in instead:
        assert algorithm(**each).state_dict()['config'].items() >= each.items()


def registered() -> list[tuple[str, str]]:
    """Every kind and name that setup.cfg registers for recipes."""
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg')
    lines = {
        group.removeprefix('composer_ema.'): textwrap.dedent(points).strip().splitlines()
        for group, points in config['options.entry_points'].items()
        if group.startswith('composer_ema.') and not group.endswith('_families')
    }
    return [(kind, line.partition('=')[0].strip()) for kind, entries in lines.items() for line in entries]


@pytest.mark.parametrize(('kind', 'name'), registered())
def test_what_setup_cfg_registers_is_found(kind, name):
    """Where this fails, the metadata are older than setup.cfg: install the package anew."""
    known = getattr(registry, kind)()
    assert known.canonical(name) == name
    assert known.find(name).__module__.startswith('composer_ema.')


PLUGIN = """
    import torch
    from composer.core import Callback
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
    from composer.utils import dist
    from composer_ema.zoo.dataset import Data, dataset


    @dataset(samples=lambda given: given['points'])
    def rings(*, points: int = 12, batch_size: int = 4) -> Data:
        angle = torch.linspace(0, 6, points)
        inputs = torch.stack([angle.sin(), angle.cos()], 1)
        data = TensorDataset(inputs, (torch.arange(points) % 2).long())
        train = DataLoader(data, batch_size, sampler=dist.get_sampler(data, shuffle=True))
        evaluation = DataLoader(data, batch_size, sampler=dist.get_sampler(data))
        return Data(train, evaluation, num_classes=2, input_shape=(2,))


    class Line(torch.nn.Module):
        def __init__(self, *, num_classes: int = 2, width: int = 3) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Linear(width, num_classes))

        def forward(self, points: torch.Tensor) -> torch.Tensor:
            return self.layers(points)


    class Counter(Callback):
        def __init__(self, word: str = 'counted') -> None:
            self.word, self.batches = word, 0

        def batch_end(self, state, logger) -> None:
            self.batches += 1

        def fit_end(self, state, logger) -> None:
            print(f'{self.word} {self.batches} batches')
    """
RECIPE = """
    max_duration: 2ep
    device: cpu
    progress_bar: false
    model: {name: line, width: 5}
    data: {name: rings, points: 10}
    optimizer: {name: sgd, lr: 0.1}
    scheduler: {name: one_cycle_lr, max_lr: 0.2}
    algorithms: {ema: {half_life: 2ba}}
    callbacks: {counter: {word: saw}}
    """
BROKEN = """
    [composer_ema.callbacks]
    shattered = nowhere_at_all:Callback
    [composer_ema.models_families]
    shards = nowhere_at_all:MODELS
    """


def distribution(folder: Path, name: str, points: str) -> None:
    """Writes the metadata that installing a package into ``folder`` would leave."""
    info = folder / f'{name}-1.5.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n')
    (info / 'entry_points.txt').write_text(textwrap.dedent(points))


@pytest.fixture
def outsider(tmp_path) -> Path:
    """A folder where a package is installed that registers a data set, a model and a callback, and a broken package."""
    (tmp_path / 'rings.py').write_text(textwrap.dedent(PLUGIN))
    distribution(
        tmp_path,
        'rings',
        """
        [composer_ema.datasets]
        rings = rings:rings
        [composer_ema.models]
        line = rings:Line
        [composer_ema.callbacks]
        counter = rings:Counter
        """,
    )
    distribution(tmp_path, 'shattered-plugins', BROKEN)
    (tmp_path / 'recipe.yaml').write_text(textwrap.dedent(RECIPE) + f'runs_folder: {tmp_path}/runs\n')
    return tmp_path


@pytest.mark.slow
def test_an_outsiders_data_set_model_and_callback_train_a_recipe(outsider):
    output = run(
        f"""
        from composer_ema.pictures import report
        from composer_ema.recipe import run, schema
        from composer_ema.recipe.preview import preview

        recipe = schema.load({str(outsider / 'recipe.yaml')!r})
        print(preview(recipe).batches, 'batches foreseen')
        outcome = run.train(recipe, lambda shown: None)
        print(outcome.num_batches, sorted(report.result(outcome).points))
        assert 'composer_ema.zoo.torchvision_models' not in sys.modules
        """,
        outsider,
    )
    assert output.splitlines() == ['6 batches foreseen', 'saw 6 batches', "6 ['ema', 'training']"]


#: Override, the key to blame, and words of the message.
WRONG = [
    ('callbacks={shattered: {}}', 'callbacks.shattered', ['shattered-plugins 1.5', 'nowhere_at_all:Callback']),
    (
        'model.name=shard',
        'model.name',
        ['shattered-plugins 1.5', 'nowhere_at_all:MODELS', 'Legal names are line, fashion_cnn'],
    ),
    ('data.point=3', 'data.point', ['rings has no such argument', 'points']),
    ('callbacks.counter.word=3', 'callbacks.counter.word', ['must be a string, got 3']),
]


@pytest.mark.slow
def test_a_broken_plug_in_names_itself_where_it_is_used_and_an_outsiders_arguments_are_checked_as_ours(outsider):
    output = run(
        f"""
        from composer_ema.recipe import schema
        for override in {[override for override, _, _ in WRONG]!r}:
            try:
                schema.plan(schema.load({str(outsider / 'recipe.yaml')!r}, [override]))
            except ValueError as error:
                print(error.key, error.message)
        """,
        outsider,
    )
    for line, (_, key, words) in zip(output.splitlines(), WRONG, strict=True):
        assert line.startswith(f'{key} ')
        assert all(word in line for word in words), line


class Point:
    """An entry point, as far as plug-ins look at it."""

    dist = None
    group = 'composer_ema.models'

    def __init__(self, name, found):
        self.name, self.value, self.load = name, 'package:found', lambda: found


def test_plug_ins_are_imported_when_they_are_looked_up_and_no_earlier():
    imported = []
    points = [Point(name, name.upper()) for name in ('a', 'b')]
    for point in points:
        point.load = lambda name=point.name: imported.append(name) or name.upper()
    found = Plugins(points)  # pyright: ignore[reportArgumentType]
    assert (list(found), len(found), 'a' in found, imported) == (['a', 'b'], 2, True, [])
    assert (found['b'], found['b'], imported) == ('B', 'B', ['b'])


def test_a_family_is_asked_only_for_names_that_no_single_plug_in_has():
    family = Family(lambda: ['a', 'c'], lambda name: f'family {name}')
    found = Plugins([Point('a', 'single a')], [Point('letters', family)])  # pyright: ignore[reportArgumentType]
    assert (found['a'], '_imported_families' in vars(found)) == ('single a', False)
    assert (found['c'], sorted(found)) == ('family c', ['a', 'c'])
    with pytest.raises(KeyError):
        found['d']


def test_one_name_of_two_packages_is_refused_when_it_is_used():
    found = Plugins([Point('a', 1), Point('a', 2), Point('b', 3)])  # pyright: ignore[reportArgumentType]
    assert found['b'] == 3
    with pytest.raises(PluginError, match=r'have the same name\. Uninstall one'):
        found['a']


def test_names_that_recipes_cannot_tell_apart_are_one_name():
    found = Plugins([Point('rings', 1), Point('R-ings', 2), Point('b', 3)])  # pyright: ignore[reportArgumentType]
    for name in ('rings', 'R-ings'):
        with pytest.raises(PluginError, match=r'rings.*R-ings.*have the same name\. Uninstall one'):
            found[name]


def test_a_plug_in_of_another_kind_is_refused():
    offered = registry._Offered(
        Plugins([Point('a', 3)]),  # pyright: ignore[reportArgumentType]
        'callback',
        registry._subclass_of(registry.Callback),
        {},
    )
    with pytest.raises(RecipeError, match=r'callbacks\.a: a = package:found, .* is no callback: it is 3'):
        find('a', Place('f', 'callbacks.a'), registry.Registry('callback', offered, {'a': 'a'}))


@pytest.fixture
def tiny(tmp_path) -> dict:
    return {
        'max_duration': '2ep', 'device': 'cpu', 'progress_bar': False, 'runs_folder': str(tmp_path),
        'model': {'name': 'fashion_cnn', 'num_classes': 3}, 'data': {'name': 'mine'},
        'optimizer': {'name': 'sgd', 'lr': 0.1}, 'scheduler': {'name': 'cosine_annealing_lr', 'interval': 'batch'},
    }  # fmt: skip


def mine(*, batch_size: int = 4):
    return fake(image_size=(1, 17, 17), num_classes=3, size=10, eval_size=2, batch_size=batch_size)


def test_a_data_set_that_miscounts_itself_is_refused(tiny, tmp_path, register):
    register('datasets', 'mine', dataset(samples=lambda given: 13)(lambda *, batch_size=4: mine(batch_size=batch_size)))
    with pytest.raises(RecipeError, match=r'data: mine is registered with 13 samples, 4 batches .* its loader has 3'):
        build(schema.Recipe('a.yaml', 'a', tiny), scratch=tmp_path)


def test_a_data_set_that_does_not_count_itself_gives_the_schedule_its_length_when_built(tiny, tmp_path, register):
    register('datasets', 'mine', mine)
    built = build(schema.Recipe('a.yaml', 'a', tiny), scratch=tmp_path)
    built.trainer.close()
    assert built.recipe.values['scheduler']['T_max'] == 6


def test_a_data_set_without_a_batch_size_is_refused_when_it_is_made():
    with pytest.raises(TypeError, match='must take batch_size'):
        dataset(samples=lambda given: 1)(lambda: mine())
