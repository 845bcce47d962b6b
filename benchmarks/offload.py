"""Time per training iteration of a model on CUDA whose average lives on the host, beside none and one on the device.

The contestants take turns of several iterations. Before each turn one more is trained, untimed, so that an update is
under way when the clock starts, as in the middle of a run; it stops when the training stream is done, whether or not
the thread is.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from benchmarks import common, peers
from benchmarks.step import PRECISIONS, Hooks, Training, set_precision
from composer_ema import ShadowModel

_WEIGHT = 1 - common.SMOOTHING
NONE, ON_DEVICE = 'none', 'on the device, every batch'
_WARM_UP_TURNS = 1


def main(arguments: Sequence[str] | None = None) -> common.Result:
    """Runs the benchmark; see ``--help``."""
    options = common.parser(__doc__ or '')
    options.add_argument('--models', default='vit_l_32', help='torchvision names')
    options.add_argument('--batch-size', type=int, default=64)
    options.add_argument('--image-size', type=int, default=224)
    options.add_argument('--precision', default='tf32,amp_bf16', help='of step.py; several by commas')
    options.add_argument('--intervals', default='1,4', help='batches from update to update of an average on the host')
    options.add_argument('--iterations', type=int, default=8, help='in a turn')
    options.add_argument('--rounds', type=int, default=20, help='at most, for each model and precision')
    options.add_argument('--seconds', type=float, default=12.0, help='no round is begun after these, for each')
    parsed = options.parse_args(arguments)
    if torch.device(parsed.device).type != 'cuda':
        options.error(
            f'benchmarks.offload needs a CUDA device, got {parsed.device}: only there is an average on the host beside '
            'training. Pass --device cuda.'
        )
    for precision in parsed.precision.split(','):
        if precision not in PRECISIONS:
            options.error(f'--precision takes {", ".join(PRECISIONS)}, several by commas, got {precision!r}.')
    result = common.start('offload', parsed)
    result.measures = ['ms']
    for name, precision in itertools.product(parsed.models.split(','), parsed.precision.split(',')):
        set_precision(precision)
        parsed.precision = precision
        result.rows.extend(measure(name, parsed, result))
        result.save()
        common.free(result.device)
    _show(result)
    return result


def measure(name: str, parsed: Any, result: common.Result) -> list[dict[str, Any]]:
    """The rows of one model in one precision."""
    train = Training(name, parsed, result.device)
    intervals = [int(part) for part in parsed.intervals.split(',')]
    hooks = {NONE: Hooks(), ON_DEVICE: _following(train, result.device, 1)}
    for interval in intervals:
        hooks[f'on the host, {_every(interval)}'] = _following(train, torch.device('cpu'), interval)
    calls = {key: _turn(train, each, parsed.iterations, result.device) for key, each in hooks.items()}
    for call in calls.values():
        for _ in range(_WARM_UP_TURNS):
            call()
    samples = common.interleave(
        calls, lambda call: common.Sample(ms := call(), ms), rounds=parsed.rounds, seconds=parsed.seconds
    )
    return [
        {
            'key': f'{name} {parsed.precision} / {key}',
            'model': name,
            'precision': parsed.precision,
            'average': key,
            'rounds': len(taken),
            'ms': median(sample.ms for sample in taken),
            'over_none': common.ratio(taken, samples[NONE]),
            'parameters': sum(parameter.numel() for parameter in train.model.parameters()),
        }
        for key, taken in samples.items()
    ]


def _every(interval: int) -> str:
    return 'every batch' if interval == 1 else f'every {interval} batches'


def _following(train: Training, device: torch.device, interval: int) -> Hooks:
    shadow, batches = ShadowModel(train.model, device=device, overlap=True), itertools.count(1)
    for _ in range(peers.WARM_UP):
        shadow.update(train.model, weight=_WEIGHT)
        shadow.wait()

    def update() -> None:
        if next(batches) % interval == 0:
            shadow.update(train.model, weight=_WEIGHT)

    return Hooks(before_step=shadow.wait_for_reads, after_step=update, at_end=shadow.wait)


def _turn(train: Training, hooks: Hooks, iterations: int, device: torch.device) -> Callable[[], float]:
    """A turn, which returns its milliseconds for each iteration."""

    def finish() -> None:
        if device.type == 'cuda':
            torch.cuda.current_stream().synchronize()  # of training alone

    def turn() -> float:
        train.iterate(hooks, 1)
        finish()
        began = time.perf_counter()
        train.iterate(hooks, iterations)
        finish()
        ms = (time.perf_counter() - began) * 1e3 / iterations
        hooks.at_end()
        return ms

    return turn


def _show(result: common.Result) -> None:
    for key, rows in itertools.groupby(result.rows, lambda row: (row['model'], row['precision'])):
        rows = list(rows)
        title = (
            f'{key[0]} in {key[1]}: {rows[0]["parameters"]:,} parameters, batches of {result.settings["batch_size"]}'
        )
        columns = ['average', 'ms an iteration', 'of none']
        common.show(title, columns, [[row['average'], row['ms'], row['over_none']] for row in rows])


if __name__ == '__main__':
    main()
