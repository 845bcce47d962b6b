"""Cost of an update against the number of tensors, the number of parameters and the number of averages.

- tensors: a fixed number of floats in 10 to 10,000 tensors, a whole update and the prepared step alone;
- parameters: 1 million to 1 billion floats in 100 tensors, the prepared step;
- averages: k averages of the same weights by one prepared step, beside k steps of one average each.

The limit is a flat ``lerp_`` over the same memory; for k averages, k of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import common
from composer_ema import ShadowModel, kernels

_WEIGHT = 1 - common.SMOOTHING
LIMIT = 'limit'
#: Bytes for each float that a sweep holds: the weights and one average.
_BYTES = 8
# Share of the memory that is free which a sweep may take.
_SHARE_OF_MEMORY = 0.5
_TENSORS_IN_PARAMETER_SWEEP = 100


def main(arguments: Sequence[str] | None = None) -> common.Result:
    """Runs the benchmark; see ``--help``."""
    options = common.parser(__doc__ or '')
    options.add_argument('--tensors', default='10,100,1000,10000')
    options.add_argument('--tensor-floats', type=float, default=4e6, help='floats in all, while tensors vary')
    options.add_argument('--parameters', default='1e6,1e7,1e8,1e9')
    options.add_argument('--averages', default='1,2,4,8')
    options.add_argument('--average-floats', type=float, default=25e6, help='floats of each of the averages')
    options.add_argument('--rounds', type=int, default=25, help='at most, for each size')
    options.add_argument('--seconds', type=float, default=20.0, help='no round is begun after these, for each size')
    parsed = options.parse_args(arguments)
    result = common.start('scaling', parsed)
    if result.device.type == 'cuda':
        result.measures = ['ms', 'host_ms', 'device_ms']
    sweep = Sweep(parsed, result)
    for count in _numbers(parsed.tensors):
        sweep.tensors(count, int(parsed.tensor_floats))
    for floats in _numbers(parsed.parameters):
        sweep.parameters(floats)
    for count in _numbers(parsed.averages):
        sweep.averages(count, int(parsed.average_floats))
    _show(result)
    return result


class Sweep:
    """Measures one size after the other and writes the result file after each."""

    def __init__(self, parsed: Any, result: common.Result) -> None:
        self._parsed, self._result, self._device = parsed, result, result.device
        self._timer = common.Timer(result.device)

    def tensors(self, count: int, floats: int) -> None:
        """``count`` tensors of ``floats`` in all."""
        source = torch.ones(floats, device=self._device)
        views = list(source.tensor_split(count))
        model = nn.Module()
        model.weights = nn.ParameterList(views)
        shadow = ShadowModel(model)
        flat = torch.zeros(floats, device=self._device)
        step = kernels.prepare([flat.tensor_split(count)], views)
        self._measure(
            'tensors',
            count,
            floats,
            {
                LIMIT: lambda: flat.lerp_(source, _WEIGHT),
                'ShadowModel.update': lambda: shadow.update(model, weight=_WEIGHT),
                'prepared step': lambda: step((_WEIGHT,)),
            },
        )

    def parameters(self, floats: int) -> None:
        """``floats`` in a hundred tensors."""
        if not self._fits('parameters', floats, _BYTES * floats):
            return
        source, flat = torch.ones(floats, device=self._device), torch.zeros(floats, device=self._device)
        shadows, sources = (t.tensor_split(_TENSORS_IN_PARAMETER_SWEEP) for t in (flat, source))
        step = kernels.prepare([shadows], sources)
        self._measure(
            'parameters',
            floats,
            floats,
            {LIMIT: lambda: flat.lerp_(source, _WEIGHT), 'prepared step': lambda: step((_WEIGHT,))},
        )

    def averages(self, count: int, floats: int) -> None:
        """``count`` averages of ``floats`` each, in a hundred tensors."""
        if not self._fits('averages', count, 4 * (count + 1) * floats):
            return
        source = torch.ones(floats, device=self._device)
        flats = [torch.zeros(floats, device=self._device) for _ in range(count)]
        views, *sets = ([*t.tensor_split(_TENSORS_IN_PARAMETER_SWEEP)] for t in (source, *flats))
        together, one_by_one = kernels.prepare(sets, views), [kernels.prepare([s], views) for s in sets]
        weights = [_WEIGHT / (k + 1) for k in range(count)]
        self._measure(
            'averages',
            count,
            floats,
            {
                LIMIT: lambda: [flat.lerp_(source, _WEIGHT) for flat in flats],
                'one step for all': lambda: together(weights),
                'a step for each': lambda: [step((weight,)) for step, weight in zip(one_by_one, weights, strict=True)],
            },
        )

    def _measure(self, sweep: str, size: int, floats: int, calls: dict[str, Callable[[], object]]) -> None:
        for call in calls.values():
            for _ in range(2):
                call()
        parsed = self._parsed
        samples = common.interleave(calls, self._timer, rounds=parsed.rounds, seconds=parsed.seconds)
        for name, taken in samples.items():
            row = {
                'key': f'{sweep} {size} / {name}',
                'sweep': sweep,
                'size': size,
                'floats': floats,
                'call': name,
                'rounds': len(taken),
                **common.medians(taken),
                'ratio': common.ratio(taken, samples[LIMIT]),
            }
            if self._device.type == 'cuda':
                row['device_ratio'] = common.ratio(taken, samples[LIMIT], 'device_ms')
            self._result.rows.append(row)
        self._result.save()
        common.free(self._device)

    def _fits(self, sweep: str, size: int, needed: int) -> bool:
        available = _free_memory(self._device)
        if needed <= _SHARE_OF_MEMORY * available:
            return True
        self._result.leave_out(
            f'{sweep} {size}', f'needs {needed / 2**30:.1f} GiB, of {available / 2**30:.1f} GiB only half may be taken'
        )
        return False


def _free_memory(device: torch.device) -> int:
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path('/proc/meminfo').read_text(encoding='utf-8').splitlines()
        facts = dict(line.split(':', 1) for line in lines)
        return int(facts['MemAvailable'].split()[0]) * 2**10  # unlike free pages, with those of caches
    except (OSError, KeyError):
        return os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


def _numbers(text: str) -> list[int]:
    return [int(float(part)) for part in text.split(',') if part]


def _show(result: common.Result) -> None:
    on_cuda = result.device.type == 'cuda'
    keys = ['size', 'call', 'ms', 'ratio', *(['host_ms', 'device_ms', 'device_ratio'] if on_cuda else [])]
    for sweep in ('tensors', 'parameters', 'averages'):
        rows = [[row[key] for key in keys] for row in result.rows if row['sweep'] == sweep]
        if rows:
            floats = next(row['floats'] for row in result.rows if row['sweep'] == sweep)
            title = f'number of {sweep}' + ('' if sweep == 'parameters' else f', {floats:,} floats')
            common.show(title, [sweep, *(key.replace('_', ' ') for key in keys[1:])], rows)


if __name__ == '__main__':
    main()
