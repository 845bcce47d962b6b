"""Shared fixtures: one torch thread, warnings of this package as errors, a builder of tiny Trainers."""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Triton chooses when it is imported: without a CUDA device its interpreter checks the kernels.
if not list(Path('/dev').glob('nvidia[0-9]*')):
    os.environ.setdefault('TRITON_INTERPRET', '1')

import pytest
import torch
import toy
from composer import Trainer
from hypothesis import settings
from sharded import mesh_of_one
from tensors import all_tensors, copies
from torch import Tensor, nn

from composer_ema import EMA
from composer_ema.zoo import plugins

torch.set_num_threads(1)  # the toy models are too small for more

# The same examples in every run: what fails in CI fails at the desk.
settings.register_profile('repeatable', derandomize=True, deadline=None)
settings.load_profile('repeatable')
pytest.register_assert_rewrite('contract', 'grid')  # helpers whose assertions tests rely on


def pytest_configure(config: pytest.Config) -> None:
    # Composer's remarks on the toy's size and on its other algorithms say nothing about this package.
    for message in ('Cannot split tensor of length', 'S[AW][AM] has known issues', 'Checkpoints with layer freezing'):
        config.addinivalue_line('filterwarnings', f'ignore:{message}:UserWarning')
    config.addinivalue_line('filterwarnings', r'error:::composer_ema(\.|$)')
    # Runs of the toy and of tiny recipes have six to twenty batches, so hardly any half-life leaves less than a
    # hundredth of its start. Tests of the warning, and of what the documentation shows, make it an error again.
    config.addinivalue_line('filterwarnings', 'ignore:.* still hold.* of the initial weights:UserWarning')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if 'gpu' in item.keywords:
                item.add_marker(pytest.mark.skip(reason='needs a CUDA device, and this machine has none'))


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Any], None]:
    """Lets recipes name one more thing: ``register('models', 'sparse', SparseNetwork)``."""

    def register(kind: str, name: str, value: Any) -> None:
        from composer_ema.recipe import registry

        known = getattr(registry, kind)()
        classes = ChainMap({name: value}, known.classes)  # pyright: ignore[reportArgumentType]: only read
        wider = registry.Registry(known.kind, classes, {**known.aliases, name.replace('_', ''): name})
        monkeypatch.setattr(registry, kind, lambda: wider)

    return register


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Calls the command line in this process: exit code, standard output, standard error."""
    from composer_ema import cli

    monkeypatch.setenv('COLUMNS', '100')

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            cli.app([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, out, err

    return call


# What a Trainer of Composer leaves in the environment of a process that no launcher has started. Other trainers take it
# for a launch, and look for the address of the other processes.
_LEFT_BY_COMPOSER = {'RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_RANK': '0', 'LOCAL_WORLD_SIZE': '1', 'NODE_RANK': '0'}


def forget_ranks() -> None:
    """Removes what a Trainer of Composer has left in the environment of this process."""
    if 'MASTER_ADDR' not in os.environ and all(
        os.environ.get(key) == _LEFT_BY_COMPOSER[key] for key in _LEFT_BY_COMPOSER
    ):
        for key in _LEFT_BY_COMPOSER:
            del os.environ[key]


@pytest.fixture(autouse=True, scope='module')
def without_ranks_of_other_modules() -> None:
    """Each file of tests begins in the environment of a process that is alone, before its fixtures."""
    forget_ranks()


@pytest.fixture(autouse=True)
def without_what_others_register() -> Iterator[None]:
    """What a test, or a block of a card, registers for recipes is gone after it."""
    yield
    plugins.show_only([])
    if plugins._own.everywhere:
        plugins._own.everywhere.clear()
        plugins._own.changes += 1


@pytest.fixture(autouse=True)
def without_ranks_of_other_tests() -> None:
    """So does each test."""
    forget_ranks()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A process group of this process, as Composer's launcher would start it; calling it ends the group."""
    for name, value in _LEFT_BY_COMPOSER.items():
        monkeypatch.setenv(name, value)
    with mesh_of_one():
        yield torch.distributed.destroy_process_group


@pytest.fixture
def model() -> toy.ComposerClassifier:
    """A tiny classifier with BatchNorm and dropout."""
    return toy.make_model()


@pytest.fixture
def trainer() -> Iterator[Callable[..., Trainer]]:
    """Builds Trainers as :func:`toy.make_trainer` does, and closes them after the test."""
    built: list[Trainer] = []

    def build(*args, **kwargs) -> Trainer:
        built.append(toy.make_trainer(*args, **kwargs))
        return built[-1]

    yield build
    for each in built:
        each.close()


@pytest.fixture
def trained(trainer: Callable[..., Trainer]) -> tuple[EMA, nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """An EMA after a run; the model; and copies of the training weights and of the average."""
    ema = EMA(half_life='2ba')
    run = trainer([ema])
    run.fit()
    model = run.state.model
    return ema, model, copies(model), {n: t.clone() for n, t in all_tensors(ema.ema_model).items()}
