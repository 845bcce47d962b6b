"""The card of data sets and models: its tables are those of the signatures, and its example trains."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from composer_ema.recipe import code_paths
from composer_ema.zoo import plugins

ROOT = Path(__file__).parents[1]
CARD = (ROOT / 'method_cards/data_and_models.md').read_text(encoding='utf-8')


def built_ins() -> Any:
    spec = importlib.util.spec_from_file_location('built_ins', ROOT / 'docs/built_ins.py')
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_card_are_those_of_the_signatures():
    assert built_ins().with_tables(CARD) == CARD, 'write them anew: python docs/built_ins.py'


def block(language: str) -> str:
    found = re.search(rf'^```{language}\n(.*?)^```', CARD, flags=re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.filterwarnings('error:.* of the initial weights')
def test_ones_own_data_set_and_model_train_in_fifteen_lines(tmp_path, call, monkeypatch):
    code = block('py')
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    (tmp_path / 'my_code.py').write_text(code)
    (tmp_path / 'rings.yaml').write_text(block('yaml'))
    monkeypatch.chdir(tmp_path)
    try:
        status, out, err = call('train', 'rings.yaml', 'device=cpu')
    finally:
        code_paths._imported.clear()
        plugins.show_only([])
    assert status == 0, err
    assert out.startswith(f'code_paths: {tmp_path}/my_code.py is imported, which registers data set rings, model wide')
    assert (tmp_path / 'runs/rings/curves.png').exists()
    status, _, err = call('train', 'rings.yaml', 'data.pionts=9', 'run_name=other')
    assert (status, "Did you mean 'points'?" in err) == (2, True)
