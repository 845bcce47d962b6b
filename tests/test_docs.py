"""The documents' code runs, and what they point at exists."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / 'README.md', *(ROOT / 'method_cards').glob('*.md')])
#: Documents that are about libraries which are not always installed.
_NEEDS = {'transformers': ['transformers', 'accelerate'], 'lightning': ['lightning']}
_IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def blocks(path, language):
    return re.findall(rf'^```{language}\n(.*?)^```', path.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings('error:.* of the initial weights')
@pytest.mark.parametrize('path', DOCUMENTS, ids=_IDS)
def test_python_blocks_run_one_after_the_other(path, tmp_path, monkeypatch):
    for library in _NEEDS.get(path.stem, ()):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'yamls').symlink_to(ROOT / 'yamls')
    assert blocks(path, 'python'), f'{path} shows no Python'
    namespace = {'__name__': 'document'}
    for block in blocks(path, 'python'):
        exec(compile(block, str(path), 'exec'), namespace)


@pytest.mark.parametrize(
    ('card', 'needed'), [('ema_optimizer', ['peft']), ('hand_on', ['transformers', 'diffusers', 'timm', 'peft'])]
)
@pytest.mark.filterwarnings('ignore')
def test_blocks_that_need_other_libraries_run(card, needed, tmp_path, monkeypatch):
    for library in needed:
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    path = ROOT / 'method_cards' / f'{card}.md'
    of_them = [block for block in blocks(path, 'py') if 'torch.distributed' not in block]  # of several processes
    assert of_them
    namespace = {'__name__': 'document'}
    for block in [*blocks(path, 'python'), *of_them]:
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


# What the site is built from; README.md gets a link that leads nowhere.
SITE_SOURCES = (
    'docs',
    'method_cards',
    'benchmarks',
    'examples',
    'yamls',
    'composer_ema',
    *ROOT.glob('[A-Z]*.md'),
    'LICENSE',
)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The documentation as `make docs` builds it, with one broken link, and what the build said."""
    for module in ('mkdocs', 'material', 'mkdocstrings', 'latex2mathml'):
        pytest.importorskip(module, reason='pip install .[docs]')
    checkout = tmp_path_factory.mktemp('checkout')
    for source in (ROOT / name for name in SITE_SOURCES):
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, checkout / source.name)
    with (checkout / 'README.md').open('a') as readme:
        readme.write('\n[a page that is not there](nowhere.md)\n')
    [command] = re.findall(
        r'^\tNO_MKDOCS_2_WARNING=1 \$\(BIN\)/(mkdocs .*)$', (ROOT / 'Makefile').read_text(), re.MULTILINE
    )
    built = subprocess.run(
        [sys.executable, '-m', *command.split()],
        cwd=checkout, env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return checkout / 'site', built


def test_a_broken_link_and_nothing_else_stops_the_building_of_the_site(site):
    _, built = site
    assert built.returncode == 1
    [warning] = [line for line in built.stderr.splitlines() if line.startswith('WARNING')]
    assert "contains a link 'nowhere.md'" in warning


def test_every_formula_of_the_cards_is_drawn_on_the_site(site):
    folder, _ = site
    for card in (ROOT / 'method_cards').glob('*.md'):
        written = re.sub(r'```.*?```|`[^`\n]*`', '', card.read_text(), flags=re.DOTALL)
        page = (folder / f'method_cards/{card.stem}.html').read_text()
        assert page.count('</math>') == len(re.findall(r'\$\$.+?\$\$|\$[^$\n]+\$', written, flags=re.DOTALL)), card
        assert '$$' not in page
        assert 'arithmatex' not in page
    assert '<mi style="font-family: monospace">power</mi>' in (folder / 'method_cards/ema.html').read_text()


def test_on_the_site_tests_stand_below_their_rows_and_pictures_are_links_to_themselves(site):
    folder, _ = site
    page, card = (
        (folder / name).read_text() for name in ('method_cards/ema_optimizer.html', 'method_cards/plots.html')
    )
    assert page.count('<tr class="test">') == page.count('<td colspan="4"><code>test_') > 30
    assert not re.search(r'<th[^>]*>test</th>', page)
    assert '<a href="images/runs.png"><img ' in card


def test_on_the_site_a_module_is_described_below_its_name(site):
    folder, _ = site
    for source in (ROOT / 'docs/pages/api').glob('*.md'):
        page = (folder / f'api/{source.stem}.html').read_text()
        for module in re.findall(r'^::: ([a-z_.]+)\n +options', source.read_text(), re.MULTILINE):
            assert re.search(rf'<h2 id="{module}"[^>]*>\s*<span[^>]*>{module}</span>', page), module
