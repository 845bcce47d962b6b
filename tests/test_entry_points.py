"""llm-foundry finds the algorithms by entry point, and its YAML can give every argument."""

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
        rounding: stochastic
        seed: 3
        evaluate_with: {eval_training: training}
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
        rounding: stochastic
        seed: 3
        evaluate_with: {eval_training: training}
        log_interval: null
        export_weights: swa
        """,
}
#: Takes the place of another one of the arguments above.
INSTEAD = {EMA: 'smoothing: 0.99', SWA: 'swa_lr: 0.05'}
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
    instead = yaml.safe_load(INSTEAD[algorithm])
    parameters = inspect.signature(algorithm).parameters
    assert parameters.keys() - NOT_IN_YAML == arguments.keys() | instead.keys()
    config = algorithm(**arguments).state_dict()['config']
    assert {key: config[key] for key in arguments} == arguments
    assert all(arguments[key] != parameters[key].default for key in arguments)
    assert yaml.safe_load(yaml.safe_dump(config)) == config
    assert algorithm(**instead).state_dict()['config'].items() >= instead.items()
