"""The house: who may import whom, what works without Composer, and that every example runs."""

import ast
import doctest
import graphlib
import importlib
import inspect
import pkgutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import composer_ema

ROOT = Path(composer_ema.__file__).parent
HAS_COMPOSER = importlib.util.find_spec('composer') is not None

#: The rooms of the house from the top down; a room imports only from those below it.
HOUSE = (
    'cli',
    'pictures',
    'sweep',
    'recipe',
    'zoo',
    'run_folder',
    'trainer',
    'transformers',
    'lightning',
    'run',
    'optimizer',
    'optimizer_average',
    'optimizer_entries',
    'optimizer_state',
    'wrapper',
    'functional',
    'batchnorm',
    'posthoc',
    'interchange',
    'checkpoints',
    'shadow',
    'kernels',
    'model',
    'labelled',
    'profiles',
    'averages',
    'settings',
    'plain',
    'spans',
    'wording',
    'files',
    'version',
)
#: Only these may name Composer; the rest works without it.
MAY_NAME_COMPOSER = {'cli', 'pictures', 'sweep', 'recipe', 'zoo', 'run_folder', 'trainer', '__init__'}
#: Rooms that are for another library, and that library, which is imported with the room.
DOORS = {'transformers': 'transformers', 'lightning': 'lightning'}
#: What the package needs where Composer is missing. Triton comes with torch where there is CUDA, and only there.
CORE_REQUIREMENTS = {'torch', 'safetensors', 'numpy', 'triton', 'typing_extensions'}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix('.py')


def sources() -> list[Path]:
    return sorted(ROOT.rglob('*.py'))


def imported(path: Path, *, at_run_time: bool = False) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    names = set()
    tree = ast.parse(path.read_text())
    ignored = {
        id(node)
        for branch in ast.walk(tree)
        if at_run_time and isinstance(branch, ast.If) and 'TYPE_CHECKING' in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in ignored:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path} imports relatively'
            module = node.module or ''
            names.add(module)
            names |= {f'{module}.{alias.name}' for alias in node.names if module == 'composer_ema'}
    return names


def modules_imported(path: Path) -> set[str]:
    """Dotted names within the package of the modules that a file imports: ``'shadow.plan'``."""
    found = set()
    for name in imported(path):
        parts = name.split('.')[1:] if name.startswith('composer_ema.') else []
        while parts and not ((ROOT / Path(*parts)).is_dir() or (ROOT / Path(*parts)).with_suffix('.py').exists()):
            parts.pop()
        found |= {'.'.join(parts)} if parts else set()
    return found


def test_every_room_stands_in_the_plan_of_the_house():
    assert {part_of(path) for path in sources()} <= {*HOUSE, '__init__'}


@pytest.mark.parametrize('path', sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    part = part_of(path)
    if part == '__init__':
        return
    below = HOUSE[HOUSE.index(part) :]
    assert {module.split('.')[0] for module in modules_imported(path)} <= set(below)


def test_no_modules_import_each_other_in_a_circle():
    graph = {
        '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): modules_imported(path)
        for path in sources()
    }
    # Raises a CycleError that names the circle. A package may offer what its own modules define.
    order = graphlib.TopologicalSorter(
        {
            name: {other for other in imports if other != name and not other.startswith(f'{name}.')}
            for name, imports in graph.items()
        }
    )
    assert set(order.static_order()) >= graph.keys()


@pytest.mark.parametrize('path', sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_upper_modules_name_composer(path):
    names_composer = any(name.split('.')[0] == 'composer' for name in imported(path, at_run_time=True))
    assert not names_composer or part_of(path) in MAY_NAME_COMPOSER


@pytest.mark.parametrize('part', [part for part in HOUSE if part not in MAY_NAME_COMPOSER])
def test_the_core_imports_little_besides_torch(part):
    paths = [p for p in sources() if part_of(p) == part]
    roots = {name.split('.')[0] for path in paths for name in imported(path, at_run_time=True)}
    roots -= {'rich'} if part == 'batchnorm' else set()  # its progress bar, where rich is installed
    roots -= {DOORS.get(part)}
    assert roots <= CORE_REQUIREMENTS | sys.stdlib_module_names | {'composer_ema', '__future__'}


def run(program: str) -> str:
    """Runs a program in a fresh interpreter in which Composer cannot be imported."""
    blocked = """
        import sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split('.')[0] == 'composer':
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Blocked())
    """
    program = textwrap.dedent(blocked) + textwrap.dedent(program)
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=ROOT.parent, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_composer_the_core_works_and_ema_names_the_extra():
    output = run("""
        import composer_ema
        import torch
        from torch import nn

        model = nn.Linear(2, 2)
        shadow = composer_ema.ShadowModel(model)
        shadow.update(model, smoothing=0.9)
        composer_ema.compute_ema(model, nn.Linear(2, 2))
        composer_ema.update_bn(nn.BatchNorm1d(2), [torch.randn(4, 2)])
        print(callable(composer_ema.load_average), callable(composer_ema.export), composer_ema.CheckpointError)
        try:
            composer_ema.EMA
        except ImportError as error:
            print(error)
        try:
            from composer_ema import EMA
        except ImportError as error:
            print(error)
        try:
            composer_ema.nothing
        except AttributeError as error:
            print(error)
        assert not [name for name in sys.modules if name.split('.')[0] == 'composer']
    """)
    assert output.count("pip install 'composer-ema[composer]'") == 2
    assert 'composer_ema.EMA needs MosaicML Composer' in output
    assert "module 'composer_ema' has no attribute 'nothing'" in output


def test_importing_the_package_does_not_import_composer():
    program = 'import sys, composer_ema; assert "composer" not in sys.modules'
    subprocess.run([sys.executable, '-c', program], cwd=ROOT.parent, check=True, timeout=120)


@pytest.mark.skipif(not HAS_COMPOSER, reason='the commands come with Composer')
def test_the_help_of_the_commands_costs_no_torch():
    program = """
        import sys
        from composer_ema import cli
        sys.argv = ['composer-ema', 'plot', '--help']
        try:
            cli.main()
        except SystemExit as done:
            assert done.code == 0
        heavy = {'torch', 'numpy', 'composer', 'matplotlib', 'omegaconf'} & sys.modules.keys()
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, '-c', textwrap.dedent(program)], cwd=ROOT.parent, check=True, timeout=120)


def test_every_public_name_is_listed_by_dir():
    assert set(composer_ema.__all__) <= set(dir(composer_ema))


@pytest.mark.skipif(not HAS_COMPOSER, reason='needs Composer')
def test_every_public_name_is_imported_by_a_star():
    names: dict = {}
    exec('from composer_ema import *', names)
    assert set(composer_ema.__all__) <= names.keys()


PRESENT = {part_of(path) for path in sources()}
MISSING = {part for part, library in DOORS.items() if importlib.util.find_spec(library) is None}
MISSING |= set() if HAS_COMPOSER else MAY_NAME_COMPOSER
CORE = [part for part in HOUSE if part in PRESENT - MISSING]


@pytest.mark.parametrize('part', CORE)
def test_every_example_of_the_docstrings_runs(part):
    module = importlib.import_module(f'composer_ema.{part}')
    assert doctest.testmod(module).failed == 0
    for child in pkgutil.iter_modules(getattr(module, '__path__', ()), f'{module.__name__}.'):
        try:
            assert doctest.testmod(importlib.import_module(child.name)).failed == 0
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split('.')[0] != 'triton':
                raise


def test_some_examples_ran():
    from composer_ema import averages, functional, spans
    from composer_ema.shadow import shadow_model, stream

    for module in (averages, functional, shadow_model, spans, stream):
        assert doctest.testmod(module).attempted > 0, module.__name__


def _public() -> list[str]:
    return [name for name in composer_ema.__all__ if name not in ('EMA', 'SWA', 'safe_loading') or HAS_COMPOSER]


@pytest.mark.parametrize('name', _public())
def test_public_names_exist_and_say_what_they_do(name):
    value = getattr(composer_ema, name)
    if name == '__version__':
        assert value.count('.') >= 2
        return
    documented = inspect.getdoc(value)
    assert documented
    assert documented.split('\n')[0].rstrip().endswith(('.', '::'))


def test_every_public_name_is_listed_once_and_in_order():
    assert len(composer_ema.__all__) == len(set(composer_ema.__all__))


def _documented_objects() -> list:
    found = []
    for part in CORE:
        module = importlib.import_module(f'composer_ema.{part}')
        found.append((module.__name__, module))
        for name, value in vars(module).items():
            is_own = getattr(value, '__module__', '').startswith(module.__name__)
            if name.startswith('_') or not is_own or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            found.append((f'{part}.{name}', value))
            if inspect.isclass(value):
                found += [
                    (f'{part}.{name}.{key}', member)
                    for key, member in vars(value).items()
                    if not key.startswith('_') and (inspect.isfunction(member) or isinstance(member, property))
                ]
    return found


def test_modules_classes_and_public_methods_have_docstrings():
    assert not [name for name, value in _documented_objects() if not inspect.getdoc(value)]


def test_the_package_says_that_it_is_typed():
    assert (ROOT / 'py.typed').exists()
