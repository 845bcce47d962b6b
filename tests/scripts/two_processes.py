"""Trains on two processes: whole, without the average, resumed after every batch, and from a one-process checkpoint.

    composer -n 2 two_processes.py FOLDER

Reads FOLDER/one/ba*.pt, writes FOLDER/two/ba*.pt and what each rank saw to FOLDER/rank0.pt and FOLDER/rank1.pt.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)

import toy  # noqa: E402
from composer import Callback, Event, Trainer  # noqa: E402
from composer.utils import dist  # noqa: E402
from composer.utils.checkpoint import save_checkpoint  # noqa: E402

from composer_ema import EMA, SWA  # noqa: E402


class Watch(Callback):
    """Notes the weights after every batch, and those that every evaluation runs on; may save inside evaluations."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.history: list[dict[str, bytes]] = []
        self.evaluated: list[dict[str, bytes]] = []

    def run_event(self, event, state, logger) -> None:
        if event is Event.BATCH_END:
            self.history.append(toy.bits(state.model))
        elif event is Event.EVAL_BATCH_START:
            self.evaluated.append(toy.bits(state.model))
        elif event is Event.EVAL_END and self.folder is not None:
            save_checkpoint(state, str(self.folder / f'ba{state.timestamp.batch.value}.pt'))


def ema() -> EMA:
    return EMA('1.5ep', update_interval='2ba')


def several() -> EMA:
    return EMA({'short': '1ba', 'long': '1.5ep'}, update_interval='2ba', evaluate_with={'second': 'long'})


def swa() -> SWA:
    return SWA('1ba', update_interval='2ba')


def build(watch: Watch, algorithm: Callable[[], Any] | None = ema, **arguments: Any) -> Trainer:
    return toy.make_trainer(
        [] if algorithm is None else [algorithm()],
        callbacks=[watch],
        train_dataloader=toy.make_data(10, 2, shuffle=True),
        **{'eval_dataloader': toy.make_evaluator(interval='2ba'), **arguments},
    )


def main(folder: Path) -> None:
    seen: dict[str, Any] = {'resumed': {}, 'from_one': {}}
    watch = Watch(folder / 'inside')
    whole = build(watch, save_folder=str(folder / 'two'), save_interval='1ba', save_filename='ba{batch}.pt')
    assert dist.get_world_size() == 2
    whole.fit()
    seen |= {'whole': toy.snapshot(whole), 'history': watch.history, 'evaluated': watch.evaluated}

    watch = Watch()
    build(watch, None).fit()
    seen['history_without'] = watch.history

    watch = Watch()
    build(watch, several, eval_dataloader=[toy.make_evaluator(label, '2ba') for label in ('first', 'second')]).fit()
    seen['evaluated_several'] = watch.evaluated

    watch = Watch()
    equal = build(watch, swa, save_folder=str(folder / 'equal'), save_interval='1ba', save_filename='ba{batch}.pt')
    equal.fit()
    resumed = build(Watch(), swa, load_path=str(folder / 'equal' / 'ba4.pt'))
    resumed.fit()
    means: list[Any] = [None, None]
    torch.distributed.all_gather_object(means, watch.history[-1]['module.1.running_mean'])
    seen |= {
        'equal': toy.snapshot(equal),
        'equal_resumed': toy.snapshot(resumed),
        'history_equal': watch.history,
        # Each rank's own statistics are others, so what is equal has been made so.
        'statistics_differ_before': means[0] != means[1],
    }

    for batch in range(1, 2 * toy.EPOCH):
        resumed = build(
            Watch(),
            load_path=str(folder / 'two' / f'ba{batch}.pt'),
            save_folder=str(folder / f'resumed_{batch}'),
            save_interval='2ba',
        )
        resumed.fit()
        seen['resumed'][batch] = toy.snapshot(resumed)

    for batch in (2, toy.EPOCH, 5):
        watch = Watch()
        run = build(watch, load_path=str(folder / 'one' / f'ba{batch}.pt'))
        loaded = toy.snapshot(run)
        run.fit()
        seen['from_one'][batch] = (loaded, toy.snapshot(run), watch.evaluated)
    torch.save(seen, folder / f'rank{dist.get_global_rank()}.pt')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
