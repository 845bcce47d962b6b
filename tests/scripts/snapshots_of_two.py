"""Trains on two processes with snapshots, and resumes from the middle.

    composer -n 2 snapshots_of_two.py FOLDER

Writes FOLDER/whole and FOLDER/resumed, and the messages of a refused folder to FOLDER/refused0.txt and refused1.txt.
"""

import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)

import toy  # noqa: E402
from composer.utils import dist  # noqa: E402

from composer_ema import EMA  # noqa: E402


def train(folder: Path, **arguments) -> None:
    defaults = {'run_name': 'run', 'save_folder': str(folder / 'checkpoints'), 'save_interval': '1ba', 'seed': 1}
    trainer = toy.make_trainer(
        [EMA('3ba', snapshots={'every': '2ba', 'halvings': 0})],
        train_dataloader=toy.make_data(12, 2, shuffle=True),
        save_filename='ba{batch}.pt',
        **{**defaults, **arguments},
    )
    trainer.fit()
    trainer.close()


folder = Path(sys.argv[1])
train(folder / 'whole')
dist.barrier()
if dist.get_global_rank() == 0:
    shutil.copytree(folder / 'whole', folder / 'resumed')
dist.barrier()
train(folder / 'resumed', load_path=str(folder / 'resumed' / 'checkpoints' / 'ba3.pt'), save_overwrite=True)
try:
    train(
        folder / 'resumed', run_name='other', save_folder=str(folder / 'resumed' / 'checkpoints'), save_interval='9ep'
    )
except ValueError as error:
    (folder / f'refused{dist.get_global_rank()}.txt').write_text(str(error))
