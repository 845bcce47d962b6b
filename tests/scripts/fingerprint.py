"""Prints a hash of every run in the contract's pair grid, to show that a change of structure has changed no bit.

    PYTHONPATH=.:tests python tests/scripts/fingerprint.py > before.txt      # in a checkout of the old commit
    PYTHONPATH=.:tests python tests/scripts/fingerprint.py > after.txt       # in the new one
    diff before.txt after.txt

Each line covers one cell: the training weights at every moment that the grid records, the training weights at the end,
and the average at the end. The last lines are runs with a second :class:`composer_ema.ShadowModel`, kept and swapped by
a callback beside the algorithm.
"""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from composer import Callback, Trainer
from grid import CASES, label, run_case
from toy import bits, make_evaluator, make_trainer, shadow_of

from composer_ema import EMA, SWA, ShadowModel


class SecondAverage(Callback):
    """Keeps an average of its own and evaluates with it."""

    def fit_start(self, state, logger) -> None:
        self.shadow = ShadowModel(state.model)

    def batch_end(self, state, logger) -> None:
        self.shadow.update(state.model, smoothing=0.5)

    def eval_before_all(self, state, logger) -> None:
        self.shadow.swap_in(state.model)

    def eval_after_all(self, state, logger) -> None:
        self.shadow.swap_out(state.model)


class TrainingWeights(Callback):
    """Hashes the training weights at the end of every batch."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def batch_end(self, state, logger) -> None:
        add(self.digest, bits(state.model))


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    with tempfile.TemporaryDirectory() as folder:
        for line in lines(Path(folder)):
            print(line, flush=True)


def lines(folder: Path) -> Iterator[str]:
    for index, case in enumerate(CASES):
        horizon = {'smoothing': case.horizon} if isinstance(case.horizon, float) else {'half_life': case.horizon}
        averages = {'ema': EMA(**horizon, update_interval=case.update_interval)}
        if index % 6 == 0 and case.others != 'swa':
            averages['swa'] = SWA('1ba', update_interval='2ba')
        for name, algorithm in averages.items():
            recorder, trainer, _ = run_case(case, folder, algorithm)
            digest = hashlib.sha256()
            for moment, weights in recorder.history:
                digest.update(moment.encode())
                add(digest, weights)
            yield f'{name} {"-".join(map(label, case))} {digest.hexdigest()[:16]} {ending(trainer, algorithm)}'
            trainer.close()
    for name, algorithm in {'ema': EMA('2ba'), 'swa': SWA('1ba', update_interval='1ba')}.items():
        weights = TrainingWeights()
        trainer = make_trainer(
            [algorithm], callbacks=[SecondAverage(), weights], eval_dataloader=make_evaluator(interval='1ba')
        )
        trainer.fit()
        yield f'{name} beside-a-callback {weights.digest.hexdigest()[:16]} {ending(trainer, algorithm)}'
        trainer.close()
    weights = TrainingWeights()
    trainer = make_trainer(callbacks=[weights])
    trainer.fit()
    yield f'no average {weights.digest.hexdigest()[:16]}'
    trainer.close()


def ending(trainer: Trainer, algorithm: EMA | SWA) -> str:
    """Hashes of the training weights and of the average at the end of a run."""
    shadow = shadow_of(algorithm)
    average = {**dict(shadow.named_parameters()), **dict(shadow.named_buffers())}
    digests = []
    for tensors in (bits(trainer.state.model), bits(average)):
        digest = hashlib.sha256()
        add(digest, tensors)
        digests.append(digest.hexdigest()[:16])
    return ' '.join(digests)


def add(digest: hashlib._Hash, tensors: Mapping[str, bytes]) -> None:
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name])


if __name__ == '__main__':
    main()
