"""WeightAverage in two processes of Lightning's Trainer, which share the batches, or the module as well."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('lightning.pytorch')
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize('kind', ['ddp', 'folder', 'file'])
def test_two_processes_average_save_and_go_on_to_the_same_bits(kind, tmp_path):
    command = [sys.executable, ROOT / 'tests' / 'scripts' / 'lightning_of_two.py', kind, tmp_path]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    pipes: Any = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        try:
            printed, trouble = process.communicate(timeout=120)
        finally:
            if process.poll() is None:  # processes that wait for each other, one of them the launcher's
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, trouble[-4000:]
    [line] = [line for line in printed.splitlines() if line.startswith('{')]
    found = json.loads(line)
    assert (found.pop('held by rank 0'), found.pop('updates')) == ([4, 5], 12)
    if kind != 'ddp':
        assert found.pop("Lightning's own").startswith('FSDP does not support deepcopy')
    assert found == dict.fromkeys(found, True)
