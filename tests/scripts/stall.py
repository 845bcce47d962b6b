"""Trains with autoresume, and stalls for ever at one event of one batch, to be killed there.

python stall.py FOLDER MARKER EVENT BATCH
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)

import toy  # noqa: E402
from composer import Callback, Event, Trainer  # noqa: E402

from composer_ema import EMA  # noqa: E402


class Stall(Callback):
    def __init__(self, event: Event, batch: int, marker: Path) -> None:
        self.event, self.batch, self.marker = event, batch, marker

    def run_event(self, event, state, logger) -> None:
        if event is self.event and int(state.timestamp.batch) == self.batch:
            self.marker.touch()
            time.sleep(600)


def build(folder: Path, **arguments: Any) -> Trainer:
    return toy.make_trainer(
        [EMA('1ep', update_interval='2ba')],
        run_name='stalled',
        autoresume=True,
        save_folder=str(folder),
        save_interval='1ba',
        train_dataloader=toy.make_data(shuffle=True),
        eval_dataloader=toy.make_evaluator(interval='1ba'),
        **arguments,
    )


if __name__ == '__main__':
    folder, marker, event, batch = sys.argv[1:]
    build(Path(folder), callbacks=[Stall(Event(event), int(batch), Path(marker))]).fit()
