"""What the Composer algorithm costs the host per batch: every ``match`` of a batch's events, and the update.

With every tensor shrunk to one element there is no arithmetic to speak of: what remains is the host's work, and the
kernel call's own overhead, which is timed beside it. With the tensors at full size, on a CPU, the arithmetic is on the
host too and hides the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks import common, peers
from composer_ema import ShadowModel, kernels
from composer_ema.kernels.layout import unzip

MATCH_TARGET_US, BEYOND_KERNEL_TARGET_US = 10.0, 60.0
_WEIGHT = 1 - common.SMOOTHING
KERNEL, UPDATE, MATCH, BATCH = 'kernel calls', 'ShadowModel.update', 'match, all events', 'match and apply, whole batch'


def main(arguments: Sequence[str] | None = None) -> common.Result:
    """Runs the benchmark; see ``--help``."""
    options = common.parser(__doc__ or '')
    options.add_argument('--model', default='shufflenet_v2_x0_5', help='name of a torchvision model')
    options.add_argument('--rounds', type=int, default=1000)
    options.add_argument('--seconds', type=float, default=30.0, help='no round is begun after these, for each size')
    parsed = options.parse_args(arguments)
    result = common.start('host', parsed)
    result.measures = ['us']
    for is_shrunk in (True, False):
        model = common.make_model(parsed.model, result.device)
        if is_shrunk:
            shrink_(model)
        result.rows.extend(measure(model, 'one element' if is_shrunk else 'full size', parsed, result))
    result.summary = summarise(result.rows)
    result.save()
    _show(result)
    return result


def shrink_(model: nn.Module) -> None:
    """Replaces every floating parameter and buffer by one of one element, in the same places."""
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(parameter.detach().reshape(-1)[:1].clone())
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[key] = buffer.reshape(-1)[:1].clone()


def measure(model: nn.Module, size: str, parsed: Any, result: common.Result) -> list[dict[str, Any]]:
    """The rows for one size of the tensors."""
    shadow = ShadowModel(model)
    calls: dict[str, Callable[[], object]] = {
        KERNEL: kernel_calls(model),
        UPDATE: lambda: shadow.update(model, weight=_WEIGHT),
    }
    between: Callable[[], object] = lambda: None  # noqa: E731 - replaced where there is a clock to move on
    try:
        batch = Batch(model, result.device)
    except ImportError as error:
        result.leave_out(f'{MATCH}; {BATCH}', f'the algorithm cannot be imported: {error}')
    else:
        calls.update({MATCH: batch.match, BATCH: batch.run})
        between = batch.advance
    for _ in range(peers.WARM_UP):
        for call in calls.values():
            between()
            call()

    def time_one(call: Callable[[], object]) -> common.Sample:
        between()
        if result.device.type == 'cuda':
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        ms = (time.perf_counter() - began) * 1e3
        return common.Sample(ms, ms)

    samples = common.interleave(calls, time_one, rounds=parsed.rounds, seconds=parsed.seconds)
    counts = {'parameters': len(list(model.parameters())), 'buffers': len(common.floating(model.buffers()))}
    return [
        {
            'key': f'{size} / {name}',
            'size': size,
            'call': name,
            'us': 1e3 * median(sample.ms for sample in taken),
            'rounds': len(taken),
            **counts,
        }
        for name, taken in samples.items()
    ]


def kernel_calls(model: nn.Module) -> Callable[[], None]:
    """What an update cannot do without: a prepared step for parameters and buffers that copies the counters too."""
    shadow = ShadowModel(model)  # for tensors that lie in memory as those of an update do
    pairs = [(average, model.get_parameter(name)) for name, average in shadow.named_parameters()]
    pairs += [(average, model.get_buffer(name)) for name, average in shadow.named_buffers()]
    averaged = [pair for pair in pairs if pair[0].is_floating_point()]
    counters = [pair for pair in pairs if not pair[0].is_floating_point()]
    shadows, sources = unzip(averaged)
    step = kernels.prepare([shadows], sources, copied=counters)
    return lambda: step((_WEIGHT,))


class Batch:
    """The events of one batch, asked and applied as Composer's engine would, without Composer's own cost."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        from composer import Event, Trainer
        from composer.models import ComposerClassifier
        from torch.utils.data import DataLoader, TensorDataset

        from composer_ema import EMA

        self._ema = EMA('1000ba', log_interval=None)
        loader = DataLoader(TensorDataset(torch.zeros(8, 1), torch.zeros(8, dtype=torch.int64)), batch_size=1)
        self._trainer = Trainer(
            model=ComposerClassifier(model, num_classes=1000),
            train_dataloader=loader,
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
            max_duration='1000000ba',
            algorithms=[self._ema],
            device='gpu' if device.type == 'cuda' else 'cpu',
            progress_bar=False,
            log_to_console=False,
        )
        self._state, self._logger = self._trainer.state, self._trainer.logger
        self._trainer.engine.run_event(Event.FIT_START)
        self._events = [
            Event.BEFORE_DATALOADER, Event.AFTER_DATALOADER, Event.BATCH_START, Event.BEFORE_TRAIN_BATCH,
            Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.BEFORE_LOSS, Event.AFTER_LOSS, Event.BEFORE_BACKWARD,
            Event.AFTER_BACKWARD, Event.AFTER_TRAIN_BATCH, Event.BATCH_END, Event.BATCH_CHECKPOINT,
        ]  # fmt: skip

    def advance(self) -> None:
        """Moves the clock on, which is the Trainer's work."""
        self._state.previous_timestamp = self._state.timestamp
        self._state.timestamp = self._state.timestamp.to_next_batch(samples=1)

    def match(self) -> None:
        """Asks at every event, and does nothing."""
        ema, state = self._ema, self._state
        for event in self._events:
            ema.match(event, state)

    def run(self) -> None:
        """Asks at every event, and applies where the answer is yes."""
        ema, state, logger = self._ema, self._state, self._logger
        for event in self._events:
            if ema.match(event, state):
                ema.apply(event, state, logger)


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers that have a target, from the tensors of one element; None for what was not measured."""
    us = {row['call']: row['us'] for row in rows if row['size'] == 'one element'}
    beyond = us[BATCH] - us[KERNEL] if BATCH in us else None
    return {
        'match_us': us.get(MATCH),
        'match_target_us': MATCH_TARGET_US,
        'beyond_kernel_us': beyond,
        'beyond_kernel_target_us': BEYOND_KERNEL_TARGET_US,
        'update_beyond_kernel_us': us[UPDATE] - us[KERNEL],
    }


def _show(result: common.Result) -> None:
    sizes = ('one element', 'full size')
    us = {(row['size'], row['call']): row['us'] for row in result.rows}
    names = [name for name in (KERNEL, UPDATE, MATCH, BATCH) if (sizes[0], name) in us]
    first = result.rows[0]
    title = f'{result.settings["model"]}: {first["parameters"]} parameters, {first["buffers"]} floating buffers'
    common.show(
        f'{title}; µs of host time per batch',
        ['call', 'tensors of one element', 'tensors of full size'],
        [[name, *(us[size, name] for size in sizes)] for name in names],
    )
    summary = result.summary
    if summary['beyond_kernel_us'] is not None:
        print(f'beyond the kernel calls: {summary["beyond_kernel_us"]:.1f} µs (target {BEYOND_KERNEL_TARGET_US:g})')
        print(f'of which match:          {summary["match_us"]:.1f} µs (target {MATCH_TARGET_US:g})')
    else:
        print(f'the update beyond the kernel calls: {summary["update_beyond_kernel_us"]:.1f} µs')


if __name__ == '__main__':
    main()
