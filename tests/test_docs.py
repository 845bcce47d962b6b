"""The documents' code runs, and what they point at exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / 'README.md', *(ROOT / 'method_cards').glob('*.md')])
_IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def blocks(path, language):
    return re.findall(rf'^```{language}\n(.*?)^```', path.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize('path', DOCUMENTS, ids=_IDS)
def test_python_blocks_run_one_after_the_other(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'yamls').symlink_to(ROOT / 'yamls')
    assert blocks(path, 'python'), f'{path} shows no Python'
    namespace = {'__name__': 'document'}
    for block in blocks(path, 'python'):
        exec(compile(block, str(path), 'exec'), namespace)


def test_the_block_for_peft_runs(tmp_path, monkeypatch):
    pytest.importorskip('peft')
    monkeypatch.chdir(tmp_path)
    path = ROOT / 'method_cards' / 'ema_optimizer.md'
    namespace = {'__name__': 'document'}
    for block in [*blocks(path, 'python'), *blocks(path, 'py')]:
        exec(compile(block, str(path), 'exec'), namespace)


@pytest.mark.parametrize('path', DOCUMENTS, ids=_IDS)
def test_commands_are_make_targets_or_console_scripts(path):
    targets = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), flags=re.MULTILINE))
    known = {'make', 'composer-ema', 'composer', 'pip', 'git', 'cd', '.venv/bin/composer-ema', '.venv/bin/composer'}
    for line in ''.join(blocks(path, 'bash')).splitlines():
        words = line.split('#')[0].split()
        if words:
            assert words[0] in known or is_benchmark(words), line
            assert words[0] != 'make' or set(words[1:2]) <= targets, line


def is_benchmark(words):
    """Whether a command is ``python -m benchmarks.<one that exists>``."""
    module = words[2] if words[:2] == ['python', '-m'] else ''
    return module.startswith('benchmarks.') and (ROOT / f'{module.replace(".", "/")}.py').exists()


@pytest.mark.parametrize('path', DOCUMENTS, ids=_IDS)
def test_recipes_in_commands_exist(path):
    for recipe in re.findall(r'yamls/[\w/.-]+\.yaml', path.read_text()):
        assert (ROOT / recipe).exists(), recipe


@pytest.mark.parametrize('path', DOCUMENTS, ids=_IDS)
def test_links_to_files_lead_somewhere(path):
    for target in re.findall(r'\]\((?!https?:|#)([^)#]+)', path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize('path', DOCUMENTS, ids=_IDS)
def test_tests_named_in_tables_exist(path):
    sources = {source.name: source.read_text() for source in (ROOT / 'tests').glob('test_*.py')}
    for module, name in re.findall(r'`(test_\w+\.py)::(test_\w+)`', path.read_text()):
        assert module in sources, module
        assert f'def {name}(' in sources[module], f'{module}::{name}'
