"""Time per training iteration: without an average, with ours, with AveragedModel and with Composer's built-in.

One model and one optimizer train on one batch; the contestants take turns of a few iterations each, in another order
each round. Beside each speed-up over AveragedModel stands the published one (torchvision_iteration_ms.csv).
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import common, peers

PUBLISHED = common.FOLDER / 'torchvision_iteration_ms.csv'
NONE, OVERLAPPED, IN_LINE, OPTIMIZER = 'none', 'ours, overlapped', 'ours, in line', 'ours, EMAOptimizer'
AVERAGED, AVERAGED_ONE_BY_ONE, BUILT_IN = 'AveragedModel multi_avg_fn', 'AveragedModel avg_fn', 'Composer EMA'
WRAPPER = 'optimizer wrapper (mul, add)'
CONTESTANTS = (NONE, OVERLAPPED, IN_LINE, OPTIMIZER, AVERAGED, AVERAGED_ONE_BY_ONE, BUILT_IN, WRAPPER)
_SHORT = {
    'none': NONE, 'overlap': OVERLAPPED, 'inline': IN_LINE, 'optimizer': OPTIMIZER, 'multi': AVERAGED,
    'avg': AVERAGED_ONE_BY_ONE, 'builtin': BUILT_IN, 'wrapper': WRAPPER,
}  # fmt: skip
_DEFAULT = 'none,overlap,inline,optimizer,multi,avg,builtin'
_SPEEDUPS = {OVERLAPPED: 'speedup_overlapped', IN_LINE: 'speedup_in_line', OPTIMIZER: 'speedup_EMAOptimizer'}
PRECISIONS = ('fp32', 'tf32', 'amp_bf16', 'bf16')
_CPU_MODELS = ('squeezenet1_1', 'shufflenet_v2_x0_5', 'resnet18')
# Iterations in a turn: long enough that the first of them, which nothing overlaps, weighs little.
_TURN_MS, _MIN_TURN, _MAX_TURN, _MIN_ROUNDS = 150.0, 2, 8, 3
_WARM_UP_TURNS = 2


def main(arguments: Sequence[str] | None = None) -> common.Result:
    """Runs the benchmark; see ``--help``."""
    options = common.parser(__doc__ or '')
    options.add_argument('--models', default=None, help='torchvision names; all 42 published on a GPU, 3 on the CPU')
    options.add_argument('--batch-size', type=int, default=None, help='64 on a GPU, 4 on the CPU')
    options.add_argument('--image-size', type=int, default=224)
    options.add_argument('--precision', choices=PRECISIONS, default='fp32')
    options.add_argument('--channels-last', action='store_true')
    options.add_argument('--rounds', type=int, default=40, help='at most, for each model')
    options.add_argument('--budget-seconds', type=float, default=None, help='for all models; 360 on a GPU, 120 else')
    options.add_argument('--contestants', default=_DEFAULT, help=', '.join(_SHORT))
    parsed = options.parse_args(arguments)
    is_cuda = torch.device(parsed.device).type == 'cuda'
    published = read_published()
    names = parsed.models.split(',') if parsed.models else list(published) if is_cuda else list(_CPU_MODELS)
    parsed.batch_size = parsed.batch_size or (64 if is_cuda else 4)
    parsed.budget_seconds = parsed.budget_seconds or (360.0 if is_cuda else 120.0)
    set_precision(parsed.precision)

    result = common.start('step', parsed)
    result.measures = ['times_ms', 'over_none']
    # Mostly of convolutions: PyTorch lets them use TF32 unless told otherwise, as the published runs did.
    result.settings.update(models=names, cudnn_allow_tf32=torch.backends.cudnn.allow_tf32, optimizer='SGD momentum 0.9')
    end = time.monotonic() + parsed.budget_seconds
    for number, name in enumerate(names):
        seconds = (end - time.monotonic()) / (len(names) - number)
        try:
            row = measure(name, parsed, seconds, result)
        except torch.OutOfMemoryError:
            result.leave_out(name, f'does not fit into memory with batches of {parsed.batch_size}')
            common.free(result.device)
            continue
        row.update(published_speedup=published.get(name))
        result.rows.append(row)
        result.summary = summarise(result.rows)
        result.save()
        print(_line(row), flush=True)
        common.free(result.device)
    _show(result)
    return result


def read_published() -> dict[str, float]:
    """Published speed-up over AveragedModel by model, from the two times rather than the rounded ratio."""
    with PUBLISHED.open(encoding='utf-8') as file:
        rows = csv.DictReader(line for line in file if not line.startswith('#'))
        return {row['model']: float(row['averaged_model_ms']) / float(row['ema_optimizer_ms']) for row in rows}


def set_precision(precision: str) -> None:
    """Says for the process how CUDA multiplies float32 matrices; cuDNN's convolutions are left as PyTorch has them."""
    torch.backends.cuda.matmul.allow_tf32 = precision == 'tf32'


@dataclass(frozen=True)
class Hooks:
    """What a contestant adds to a training iteration."""

    before_step: Callable[[], object] = lambda: None
    step: Callable[[torch.optim.Optimizer], object] = lambda optimizer: optimizer.step()
    after_step: Callable[[], object] = lambda: None
    at_end: Callable[[], object] = lambda: None


def measure(name: str, parsed: Any, seconds: float, result: common.Result) -> dict[str, Any]:
    """One row: milliseconds per iteration of each contestant."""
    began = time.monotonic()
    device = result.device
    train = Training(name, parsed, device)
    hooks = _start([_SHORT[key] for key in parsed.contestants.split(',')], train, result)
    train.turn(hooks[NONE], 1)  # picks algorithms, makes the optimizer's state
    turn_length = _turn_length(train, hooks[NONE])
    for _ in range(_WARM_UP_TURNS):
        for each in hooks.values():
            train.turn(each, 1)

    calls = {key: _turn(train, each, turn_length) for key, each in hooks.items()}
    samples = common.interleave(
        calls,
        lambda call: _per_iteration(call, turn_length),
        rounds=parsed.rounds,
        seconds=max(seconds - (time.monotonic() - began), 0.0),
        min_rounds=_MIN_ROUNDS,
    )
    base = samples[NONE]
    row: dict[str, Any] = {'key': name, 'model': name, 'ms': median(s.ms for s in base)}
    row['parameters'] = sum(parameter.numel() for parameter in train.model.parameters())
    row['tensors'] = len(list(train.model.parameters()))
    row.update(rounds=len(base), iterations_per_turn=turn_length)
    row['times_ms'] = {key: median(s.ms for s in taken) for key, taken in samples.items()}
    row['quartiles_ms'] = {key: common.medians(taken)['ms_quartiles'] for key, taken in samples.items()}
    row['over_none'] = {key: common.ratio(taken, base) for key, taken in samples.items()}
    for ours, key in _SPEEDUPS.items():
        if ours in samples and AVERAGED in samples:
            row[key] = common.ratio(samples[AVERAGED], samples[ours])
    return row


class Training:
    """A model, an optimizer and one batch of noise."""

    def __init__(self, name: str, parsed: Any, device: torch.device) -> None:
        dtype = torch.bfloat16 if parsed.precision == 'bf16' else torch.float32
        layout = torch.channels_last if getattr(parsed, 'channels_last', False) else torch.contiguous_format
        self.model = common.make_model(name, device, dtype).to(memory_format=layout).train()
        size = (parsed.batch_size, 3, parsed.image_size, parsed.image_size)
        self._images = torch.randn(size, device=device, dtype=dtype).to(memory_format=layout)
        self._labels = torch.randint(1000, (parsed.batch_size,), device=device)
        # A rate so small that noise for labels does not blow the weights up.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6, momentum=0.9)
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=parsed.precision == 'amp_bf16')
        self._is_cuda = device.type == 'cuda'

    def turn(self, hooks: Hooks, iterations: int) -> None:
        """Trains; returns when the device has finished."""
        self.iterate(hooks, iterations)
        hooks.at_end()
        if self._is_cuda:
            torch.cuda.synchronize()

    def iterate(self, hooks: Hooks, iterations: int) -> None:
        """Trains; returns when the device has been told."""
        for _ in range(iterations):
            self.optimizer.zero_grad()
            with self._autocast:
                loss = nn.functional.cross_entropy(self._forward(), self._labels)
            loss.backward()
            hooks.before_step()
            hooks.step(self.optimizer)
            hooks.after_step()

    def _forward(self) -> Tensor:
        return self.model(self._images)


def _start(names: Sequence[str], train: Training, result: common.Result) -> dict[str, Hooks]:
    """The contestants that can run here; what cannot is named in ``result``."""
    hooks, model = {NONE: Hooks()}, train.model
    for name in names:
        if name in (OVERLAPPED, IN_LINE):
            if name == IN_LINE or result.device.type == 'cuda':
                hooks[name] = _ours(model, overlap=name == OVERLAPPED)
            else:
                result.leave_out(name, 'there is no second stream on the CPU')
        elif name == OPTIMIZER:
            hooks[name] = _our_optimizer(train)
        elif name == WRAPPER:
            wrapper = peers.TwoPassWrapper(model)
            hooks[name] = Hooks(before_step=wrapper.join, after_step=wrapper.update, at_end=wrapper.join)
        elif name != NONE:
            contestant = next(each for each in peers.CONTESTANTS if each.name == name)
            average = peers.build_one(contestant, model, result)
            if average is not None:
                hooks[name] = Hooks(after_step=average.update)
    return hooks


def _ours(model: nn.Module, *, overlap: bool) -> Hooks:
    from composer_ema import ShadowModel
    from composer_ema.shadow import plan

    shadow = ShadowModel(model, overlap=overlap)
    with mock.patch.object(plan, 'WORTH_FORKING', 0):  # however short an update is
        for _ in range(peers.WARM_UP):
            shadow.update(model, weight=1 - common.SMOOTHING)
    return Hooks(
        before_step=shadow.wait,
        after_step=lambda: shadow.update(model, weight=1 - common.SMOOTHING),
        at_end=shadow.wait,
    )


def _our_optimizer(train: Training) -> Hooks:
    from composer_ema import EMAOptimizer

    wrapped = EMAOptimizer(train.optimizer, decay=common.SMOOTHING, model=train.model)
    return Hooks(step=lambda _: wrapped.step(), at_end=wrapped.wait)


def _turn_length(train: Training, hooks: Hooks) -> int:
    train.turn(hooks, 1)
    began = time.perf_counter()
    train.turn(hooks, 1)
    ms = (time.perf_counter() - began) * 1e3
    return min(max(round(_TURN_MS / ms), _MIN_TURN), _MAX_TURN)


def _turn(train: Training, hooks: Hooks, iterations: int) -> Callable[[], None]:
    return lambda: train.turn(hooks, iterations)


def _per_iteration(call: Callable[[], object], iterations: int) -> common.Sample:
    began = time.perf_counter()
    call()
    ms = (time.perf_counter() - began) * 1e3 / iterations
    return common.Sample(ms, ms)


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Geometric means over the models, and the worst of them."""
    summary: dict[str, Any] = {'models': len(rows)}
    for key in (*_SPEEDUPS.values(), 'published_speedup'):
        values = [row[key] for row in rows if row.get(key)]
        if values:
            summary[key] = {'geometric_mean': common.geometric_mean(values), 'smallest': min(values)}
    for name in CONTESTANTS:
        values = [row['over_none'][name] for row in rows if name in row['over_none']]
        if values and name != NONE:
            summary[f'{name} / none'] = {'geometric_mean': common.geometric_mean(values), 'largest': max(values)}
    return summary


def _line(row: Mapping[str, Any]) -> str:
    times = ', '.join(f'{name} {ms:.2f}' for name, ms in row['times_ms'].items())
    return f'{row["model"]}: {times} ms ({row["rounds"]} rounds of {row["iterations_per_turn"]} iterations)'


def _show(result: common.Result) -> None:
    if not result.rows:
        return
    present = [name for name in CONTESTANTS if name != NONE and any(name in r['over_none'] for r in result.rows)]
    speedups = [key for key in _SPEEDUPS.values() if key in result.summary]
    columns = ['model', 'ms without', *(f'{name} / none' for name in present)]
    columns += [key.replace('_', ' ') for key in speedups] + ['published']
    table = [
        [row['model'], row['ms'], *(row['over_none'].get(name) for name in present)]
        + [row.get(key) for key in (*speedups, 'published_speedup')]
        for row in result.rows
    ]
    means = [result.summary[f'{name} / none']['geometric_mean'] for name in present]
    means += [result.summary.get(key, {}).get('geometric_mean') for key in (*speedups, 'published_speedup')]
    settings = result.settings
    title = (
        f'iterations of {settings["batch_size"]} images of {settings["image_size"]} px in {settings["precision"]}; '
        'speed-up: time with AveragedModel multi_avg_fn (use_buffers=False) over time with ours'
    )
    common.show(title, columns, [*table, ['geometric mean', None, *means]])


if __name__ == '__main__':
    main()
