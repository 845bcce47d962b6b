"""What a file or a name brings is shown, never obeyed: by terminals, tables, progress, errors, JSON and pictures."""

from __future__ import annotations

import io
import json
import logging
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import yaml
from hostile_files import averaged_model, of_composer
from hypothesis import given
from hypothesis import strategies as st
from points import classified
from rich.console import Console
from rich.table import Table

from composer_ema import CheckpointError, cli, load_average
from composer_ema.model.names import listed
from composer_ema.pictures import report
from composer_ema.pictures.curves import read_runs
from composer_ema.pictures.runs import draw_runs
from composer_ema.pictures.tables import Whole, facts
from composer_ema.pictures.writing import write
from composer_ema.posthoc.snapshot_files import Identity
from composer_ema.posthoc.snapshot_folder import SnapshotFolder
from composer_ema.recipe.metrics import Report
from composer_ema.wording import visible

#: A title for the window, a colour, a question to the terminal, markup, mathematics, a turn of the writing, a line.
EVIL = '\x1b]0;owned\x07\x1b[31m\x9b6n[bold]x[/bold][/y]$\\frac{$\u202eabc\u200b\x7f|\n\rwarning: forged'


def assert_harmless(*texts: str) -> None:
    """Nothing in texts that were printed moves, colours, hides or turns anything; lines end where we end them."""
    for text in texts:
        found = {char for char in text if unicodedata.category(char) in ('Cc', 'Cf', 'Cs', 'Zl', 'Zp')} - {'\n'}
        assert not found, ascii(found)
        assert '\nwarning: forged' not in text


@given(st.text(alphabet=st.characters()))
def test_visible_text_prints_is_stable_and_keeps_what_prints(text):
    shown = visible(text)
    assert shown.isprintable()
    assert visible(shown) == shown
    assert (shown == text) == text.isprintable()


@pytest.mark.parametrize('text', ['naïve', '名前', 'β₁ → ∞', "[a/b]: 'c'", 'emoji 🎉', ''])
def test_text_of_any_language_is_shown_as_it_is(text):
    assert visible(text) == text


def test_names_in_a_list_are_visible_and_very_long_ones_cut():
    assert_harmless(listed([EVIL]))
    assert len(listed(['n' * 10**6, 'b'])) < 250


def test_an_error_about_a_file_quotes_what_is_in_it_visibly(tmp_path):
    path = tmp_path / f'{EVIL.replace("/", "")}.pt'
    torch.save({EVIL: 1, 'model': {EVIL: torch.ones(2)}}, path)
    with pytest.raises(CheckpointError) as caught:
        load_average(path)
    assert 'owned' in str(caught.value)
    assert_harmless(str(caught.value))


class TestTables:
    @staticmethod
    def printed(table: Table, *, width: int | None) -> str:
        console = Console(width=width or 80, file=io.StringIO(), force_terminal=width is not None, color_system=None)
        console.print(Whole(table), highlight=False, crop=False)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    @pytest.mark.parametrize('width', [None, 400, 60, 20])
    def test_show_titles_headings_and_cells_as_they_are(self, width):
        table = Table(title=EVIL, title_justify='left')
        table.add_column('name')
        table.add_column(f'loss\n{EVIL}')
        table.add_row(EVIL, '[red]1[/red]')
        for each in (table, facts(EVIL, {EVIL: EVIL})):
            shown = self.printed(each, width=width)
            assert_harmless(shown)
            assert width == 20 or 'warning: forged' in shown or '[bold]' in shown
        assert '[red]1[/red]' in self.printed(table, width=None)
        assert r'\x1b[31m\x9b6n[bold]x[/bold][/y]$\frac{$\u202eabc\u200b\x7f|\n\rwarning' in self.printed(
            table, width=None
        )

    def test_of_a_run_with_such_labels(self):
        points = {
            'training': [classified(1, 0.5, 1.0)],
            EVIL: [classified(1, 0.5, 1.0)],
            'b|c': [classified(1, 0.5, 1.0)],
        }
        result = report.Result(EVIL, 1, Report(), points, 0.1, 10)
        assert_harmless(self.printed(report.epochs_table(result), width=None))
        markdown = report.seeds_markdown([result])
        assert_harmless(markdown)
        assert len(markdown.splitlines()) == 2 + 2 * 3
        assert r'b\|c' in markdown


class TestCommands:
    @pytest.fixture
    def checkpoint(self, tmp_path) -> Path:
        model, optimizer = averaged_model()
        held = of_composer(model, optimizer)
        state = held['state']
        state['run_name'], state['optimizers'] = EVIL, {EVIL: {}}
        state['model'] = {**state['model'], EVIL: torch.ones(2)}
        state['metadata']['torch_version'] = EVIL
        [(_, ema)] = state['algorithms']
        ema['config']['half_life'] = EVIL
        state['algorithms'].append((EVIL, {EVIL: 1}))
        torch.save(held, tmp_path / 'a.pt')
        return tmp_path / 'a.pt'

    def test_inspect_and_export_show_what_is_in_the_file(self, call, checkpoint, tmp_path):
        for arguments in (('inspect', checkpoint, '--all'), ('export', checkpoint, tmp_path / 'out.safetensors')):
            code, out, err = call(*arguments)
            assert code == 0, err
            assert r'\x1b]0;owned\x07' in out
            assert_harmless(out, err)

    def test_inspect_as_json_is_json_in_ascii(self, call, checkpoint):
        code, out, _ = call('inspect', checkpoint, '--json')
        assert code == 0
        assert json.loads(out)['run_name'] == EVIL
        assert out.isascii()
        assert_harmless(out)

    def test_errors_and_arguments_are_quoted_visibly(self, call, tmp_path):
        evil = EVIL.replace('/', '')
        (tmp_path / 'a.yaml').write_text(yaml.safe_dump({EVIL: EVIL, 'model': EVIL}))
        (tmp_path / 'b.yaml').write_bytes(b'a: \x1b[31m\n')
        for arguments in (
            ('inspect', tmp_path / evil),
            ('inspect', evil, evil),
            ('inspect', f'--{evil}'),
            (evil,),
            ('plot', tmp_path / evil),
            ('plot', tmp_path, '--over', evil),
            ('train', tmp_path / 'a.yaml'),
            ('train', tmp_path / 'b.yaml'),
            ('train', tmp_path / 'a.yaml', f'{evil}={evil}'),
            ('train', 'x.yaml', '--seeds', evil),
            ('merge', evil, evil, 'out.pt', '--weights', evil),
        ):
            code, out, err = call(*arguments)
            assert code == 2, arguments
            assert_harmless(out, err)

    def test_warnings_take_one_line(self, capfd):
        cli._show_warning(UserWarning(EVIL))
        err = capfd.readouterr().err
        assert len(err.splitlines()) == 1
        assert_harmless(err)

    def test_what_is_logged_of_a_file_is_visible(self, tmp_path, caplog):
        folder = tmp_path / EVIL.replace('/', '')
        folder.mkdir()
        (folder / 'averages-00000001.safetensors').write_text(EVIL)
        with caplog.at_level(logging.INFO):
            SnapshotFolder(folder).prepare(Identity('run', 'id'), {'ba': 0})
        assert 'It is left alone.' in caplog.text
        assert_harmless(*caplog.messages)


class TestPictures:
    def test_show_names_as_they_are_in_legal_svg(self, tmp_path):
        folder = tmp_path / EVIL.replace('/', '')
        folder.mkdir()
        line = {'epoch': 1.0, 'batch': 1, 'sample': 1, 'loss/train/total': 1.0, 'lr/group0': 0.1}
        evil = {f'metrics/eval_{EVIL.replace("/", "")}/Accuracy': 0.5, f'{EVIL}/relative_distance': 0.5}
        lines = [{**line, **evil, 'batch': batch, 'metrics/eval__b/CrossEntropy$': 1.0} for batch in range(1, 4)]
        (folder / 'metrics.jsonl').write_text(''.join(f'{json.dumps(each)}\n' for each in lines))
        [svg] = write(draw_runs(read_runs([folder])), tmp_path / 'out.svg')
        text = svg.read_text()
        ElementTree.fromstring(text)
        assert_harmless(text)
        for drawn in ([folder], [folder, tmp_path / 'twin']):
            if drawn[1:]:
                (tmp_path / 'twin').mkdir()
                (tmp_path / 'twin' / 'metrics.jsonl').write_bytes((folder / 'metrics.jsonl').read_bytes())
            write(draw_runs(read_runs(drawn)), tmp_path / 'out.png')
