"""Cost of an update against the number of tensors, of parameters, of averages and of processes.

- tensors: a fixed number of floats in 10 to 10,000 tensors, a whole update and the prepared step alone;
- parameters: 1 million to 1 billion floats in 100 tensors, the prepared step;
- averages: k averages of the same weights by one step and by one ShadowModels, beside k separate ShadowModels and k
  instances of each peer. The target is (4 + 8 k) / 12 limits: the weights are read once, and each average is read and
  written;
- guard: an update of a model with ``skip_nonfinite``, beside one without;
- settings, on a CUDA device: an update with each setting that changes the kernel, in time for a byte of what it must
  read and write, beside the plain one of float32;
- ranks: an update of a model that 1, 2 and 4 processes share with FSDP2, in the slowest of them, beside one of a model
  that is whole and as large as the process's part; and what follows for more processes and a larger model.

The limit is one flat ``lerp_`` over the memory of one average, or of one process's part of it.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import common, peers, ranks
from composer_ema import ShadowModel, ShadowModels, kernels

_WEIGHT = 1 - common.SMOOTHING
LIMIT = 'limit'
PLAIN, GUARDED = 'ShadowModel.update', 'ShadowModel.update, skip_nonfinite'
#: What changes the kernel: dtype of the weights, settings of the average, and bytes read and written for a float.
SETTINGS: dict[str, tuple[torch.dtype, dict[str, Any], int]] = {
    'float32': (torch.float32, {}, 12),
    'float32, skip_nonfinite': (torch.float32, {'skip_nonfinite': True}, 12),
    'float32, compensated': (torch.float32, {'compensated': True}, 20),
    'bfloat16 weights, float32 averages': (torch.bfloat16, {}, 10),
    'float32 weights, bfloat16 averages': (torch.float32, {'dtype': torch.bfloat16}, 8),
    'float32 weights, bfloat16 averages, stochastic': (
        torch.float32,
        {'dtype': torch.bfloat16, 'rounding': 'stochastic'},
        8,
    ),
    'bfloat16 weights, bfloat16 averages': (torch.bfloat16, {'dtype': torch.bfloat16}, 6),
    'bfloat16 weights, bfloat16 averages, stochastic': (
        torch.bfloat16,
        {'dtype': torch.bfloat16, 'rounding': 'stochastic'},
        6,
    ),
}
#: The first of them, with which the others are compared.
PLAIN_SETTING = 'float32'
#: Peers of which k instances average beside our k averages.
PEERS = ('ema-pytorch, use_foreach', 'timm ModelEmaV3')
#: Bytes for each float that a sweep holds: the weights and one average.
_BYTES = 8
# Share of the memory that is free which a sweep may take.
_SHARE_OF_MEMORY = 0.5
_TENSORS_IN_PARAMETER_SWEEP = 100
_TENSORS_OF_RANKS = 64


def main(arguments: Sequence[str] | None = None) -> common.Result:
    """Runs the benchmark; see ``--help``."""
    options = common.parser(__doc__ or '')
    options.add_argument('--tensors', default='10,100,1000,10000')
    options.add_argument('--tensor-floats', type=float, default=4e6, help='floats in all, while tensors vary')
    options.add_argument('--parameters', default='1e6,1e7,1e8,1e9')
    options.add_argument('--averages', default='1,2,4,8')
    options.add_argument('--average-floats', type=float, default=25e6, help='floats of each of the averages')
    options.add_argument('--guarded', default='shufflenet_v2_x0_5,resnet50,vit_b_16', help='torchvision models')
    options.add_argument(
        '--settings', default=None, help='likewise; resnet50, vit_b_16 and vit_l_32 on a GPU, else none'
    )
    options.add_argument('--ranks', default='1,2,4', help='processes that share a model; none if empty')
    options.add_argument('--rank-floats', type=float, default=48e6, help='floats of the model that they share')
    options.add_argument('--processes', type=int, default=1024, help='to project to')
    options.add_argument('--projected', type=float, default=70e9, help='parameters to project to')
    options.add_argument('--rounds', type=int, default=25, help='at most, for each size')
    options.add_argument('--seconds', type=float, default=20.0, help='no round is begun after these, for each size')
    parsed = options.parse_args(arguments)
    if parsed.settings is None:
        parsed.settings = 'resnet50,vit_b_16,vit_l_32' if torch.device(parsed.device).type == 'cuda' else ''
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
    for name in filter(None, parsed.guarded.split(',')):
        sweep.guard(name)
    for name in filter(None, parsed.settings.split(',')):
        sweep.settings(name)
    sweep.ranks(_numbers(parsed.ranks), int(parsed.rank_floats))
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
        kinds = 3 + len(PEERS)  # each of which holds as many averages
        if not self._fits('averages', count, 4 * (kinds * count + 2) * floats):
            return
        source, flat = torch.ones(floats, device=self._device), torch.zeros(floats, device=self._device)
        views = list(source.tensor_split(_TENSORS_IN_PARAMETER_SWEEP))
        model = nn.Module()
        model.weights = nn.ParameterList(views)
        sets = [[torch.zeros_like(view) for view in views] for _ in range(count)]
        step = kernels.prepare(sets, views)
        weights = [_WEIGHT / (k + 1) for k in range(count)]
        together = ShadowModels(model, [f'average {k}' for k in range(count)])
        by_label = dict(zip(together, weights, strict=True))
        apart = [ShadowModel(model) for _ in range(count)]
        calls: dict[str, Callable[[], object]] = {
            LIMIT: lambda: flat.lerp_(source, _WEIGHT),
            'prepared step': lambda: step(weights),
            'ShadowModels.update': lambda: together.update(model, weight=by_label),
            f'{count} x ShadowModel.update': lambda: [
                shadow.update(model, weight=weight) for shadow, weight in zip(apart, weights, strict=True)
            ],
        }
        for contestant in peers.CONTESTANTS:
            if contestant.name in PEERS:
                built = [peers.build_one(contestant, model, self._result) for _ in range(count)]
                updates = [average.update for average in built if average is not None]
                if updates:
                    calls[f'{count} x {contestant.name}'] = partial(_call_each, updates)
        target = (4 + 8 * count) / 12
        for row in self._measure('averages', count, floats, calls):
            row.update(target=target, over_target=row['ratio'] / target)
        self._result.save()

    def guard(self, name: str) -> None:
        """An update of a torchvision model with and without ``skip_nonfinite``."""
        model = common.make_model(name, self._device)
        floats = sum(tensor.numel() for tensor in common.floating(itertools.chain(model.parameters(), model.buffers())))
        flat, source = torch.zeros(floats, device=self._device), torch.ones(floats, device=self._device)
        plain, guarded = ShadowModel(model), ShadowModel(model, skip_nonfinite=True)
        calls = {
            LIMIT: lambda: flat.lerp_(source, _WEIGHT),
            PLAIN: lambda: plain.update(model, weight=_WEIGHT),
            GUARDED: lambda: guarded.update(model, weight=_WEIGHT),
        }
        self._measure('guard', name, floats, calls, base=PLAIN)

    def settings(self, name: str) -> None:
        """An update of a torchvision model with each of the settings that change the kernel."""
        models = {dtype: common.make_model(name, self._device, dtype) for dtype, _, _ in SETTINGS.values()}
        model = models[torch.float32]
        floats = sum(tensor.numel() for tensor in common.floating(itertools.chain(model.parameters(), model.buffers())))
        flat, source = torch.zeros(floats, device=self._device), torch.ones(floats, device=self._device)
        calls: dict[str, Callable[[], object]] = {LIMIT: lambda: flat.lerp_(source, _WEIGHT)}
        for call, (dtype, settings, _) in SETTINGS.items():
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # of what rounding to the nearest drops, which is not asked here
                shadow = ShadowModel(models[dtype], **settings)
                shadow.update(models[dtype], weight=_WEIGHT)
            calls[call] = partial(shadow.update, models[dtype], weight=_WEIGHT)
        rows = {row['call']: row for row in self._measure('settings', name, floats, calls)}
        per_byte = {}
        for call, (_, _, bytes_moved) in SETTINGS.items():
            row = rows[call]
            per_byte[call] = row.get('device_ms', row['ms']) / bytes_moved
            row.update(bytes=bytes_moved, gb_per_s=floats / per_byte[call] / 1e6)
            row['over_plain_per_byte'] = per_byte[call] / per_byte[PLAIN_SETTING]
        self._result.save()

    def ranks(self, sizes: Sequence[int], floats: int) -> None:
        """A model of ``floats`` that as many processes share as each of ``sizes`` says, the largest last."""
        devices = torch.cuda.device_count() if self._device.type == 'cuda' else max(sizes, default=0)
        for size in sizes:
            if size > devices:
                self._result.leave_out(f'ranks {size}', f'needs a device for each process, and there are {devices}')
        sizes = [size for size in sizes if size <= devices]
        if not sizes:
            return
        parsed = self._parsed
        found = ranks.measure(
            sizes,
            self._device,
            tensors=_TENSORS_OF_RANKS,
            floats=floats,
            rounds=parsed.rounds,
            seconds=parsed.seconds,
        )
        self._result.rows.extend(ranks.rows(found))
        self._result.summary['projection'] = ranks.projection(
            ranks.Rates.of(found[max(sizes)]), processes=parsed.processes, parameters=parsed.projected
        )
        self._result.save()

    def _measure(
        self, sweep: str, size: int | str, floats: int, calls: dict[str, Callable[[], object]], base: str | None = None
    ) -> list[dict[str, Any]]:
        """Adds a row for each call, and returns them; with ``base``, a call, how much longer than it each took."""
        for call in calls.values():
            for _ in range(2):
                call()
        parsed = self._parsed
        samples = common.interleave(calls, self._timer, rounds=parsed.rounds, seconds=parsed.seconds)
        rows = []
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
            if base is not None:
                row['over_plain'] = common.ratio(taken, samples[base])
            if self._device.type == 'cuda':
                row['device_ratio'] = common.ratio(taken, samples[LIMIT], 'device_ms')
            rows.append(row)
        self._result.rows.extend(rows)
        self._result.save()
        common.free(self._device)
        return rows

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


def _call_each(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _show(result: common.Result) -> None:
    on_cuda = result.device.type == 'cuda'
    titles = {
        'tensors': 'number of tensors',
        'parameters': 'number of parameters',
        'averages': 'number of averages, in limits of one',
        'guard': 'skip_nonfinite',
        'settings': 'settings',
        'ranks': f'number of processes; {"time" if on_cuda else "CPU time"} of the slowest, memory in models',
    }
    more = {
        'averages': ['target', 'over_target'],
        'guard': ['over_plain'],
        'settings': ['bytes', 'gb_per_s', 'over_plain_per_byte'],
        'ranks': ['faster', 'lasting', 'peak'],
    }
    for sweep, title in titles.items():
        keys = ['size', 'call', 'ms', 'ratio', *more.get(sweep, [])]
        keys += ['host_ms', 'device_ms', 'device_ratio'] if on_cuda else []
        of_sweep = [row for row in result.rows if row['sweep'] == sweep]
        if of_sweep:
            sizes = f', {of_sweep[0]["floats"]:,} floats' if sweep in ('tensors', 'averages', 'ranks') else ''
            columns = [
                'model' if sweep in ('guard', 'settings') else sweep,
                *(key.replace('_', ' ') for key in keys[1:]),
            ]
            common.show(title + sizes, columns, [[row.get(key) for key in keys] for row in of_sweep])
    if projected := result.summary.get('projection'):
        settings = result.settings
        title = f'projection to {settings["processes"]:,} processes and {settings["projected"]:,.0f} parameters'
        keys = ('kind', 'what', 'value', 'unit', 'how')
        common.show(title, keys, [[row[key] for key in keys] for row in projected])


if __name__ == '__main__':
    main()
