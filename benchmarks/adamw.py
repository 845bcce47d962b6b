"""What an average costs in the optimizer's own step: torch's AdamW and our update after it, or both in one kernel.

An experiment: the kernel of adamw_kernel.py is not part of the package. It is timed only if its weights and moments
agree with those of AdamW in float64, and its average with that of ShadowModel, to float32 rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from composer_ema import ShadowModel

MODELS = ('resnet50', 'vit_b_16')
FUSED, FUSED_AND_UPDATE = 'torch fused', 'torch fused, then ShadowModel'
FOREACH = 'torch foreach'
KERNEL, KERNEL_WITH_AVERAGE = 'one kernel', 'one kernel, with the average'
COPY = 'one flat copy_'
#: Bytes that a step reads and writes for each parameter. Those of foreach are the passes of torch 2.6 to 2.14 added up:
#: mul, lerp, mul, addcmul, sqrt, div, add, addcdiv.
BYTES = {FUSED: 28, FUSED_AND_UPDATE: 40, FOREACH: 80, KERNEL: 28, KERNEL_WITH_AVERAGE: 36, COPY: 8}
CHECKED_STEPS = 20
#: Of the largest element of a tensor. float32 has 6e-8, and each step rounds each weight twice.
TOLERANCE = 2e-6
_SETTINGS: dict[str, Any] = {'lr': 1e-3, 'betas': (0.9, 0.999), 'eps': 1e-8, 'weight_decay': 1e-2}
# Of the averages that are checked. Unlike those that are timed, they go far from where they start.
_CHECKED_DECAY = 0.9


def main(arguments: Sequence[str] | None = None) -> common.Result:
    """Runs the benchmark; see ``--help``."""
    options = common.parser(__doc__ or '')
    options.add_argument('--models', default=','.join(MODELS), help='names of torchvision models')
    options.add_argument('--rounds', type=int, default=100, help='at most, for each model')
    options.add_argument('--seconds', type=float, default=20.0, help='no round is begun after these, for each model')
    parsed = options.parse_args(arguments)
    device = torch.device(parsed.device)
    # Triton's interpreter runs the kernel on a CPU too. Its times mean nothing; the tests use it.
    if device.type != 'cuda' and os.environ.get('TRITON_INTERPRET') != '1':
        raise SystemExit(f'benchmarks.adamw needs a CUDA device, got {device}: its kernel is written in Triton.')

    result = common.start('adamw', parsed)
    result.settings['optimizer'] = {'name': 'AdamW', **_SETTINGS}
    if device.type == 'cuda':
        result.measures += ['host_ms', 'device_ms']
    for name in parsed.models.split(','):
        differences = check(name, device)
        print(f'{name}: {CHECKED_STEPS} steps agree, {_listed(differences)}', flush=True)
        rows = measure(name, parsed, result)
        result.rows.extend(rows)
        result.summary[name] = {'differences': differences, **summarise(rows)}
        _show(name, rows, result)
        result.save()
        common.free(device)
    common.show(
        f'{device.type}: milliseconds that the average adds to a step',
        ['model', 'ShadowModel after it', 'in the kernel', 'the kernel to torch and ShadowModel'],
        [[name, *(found[key] for key in _SUMMARY)] for name, found in result.summary.items()],
    )
    return result


# The check


def check(name: str, device: torch.device) -> dict[str, float]:
    """The largest difference from AdamW in float64 after some steps, relative to the largest element; of averages from
    those of ShadowModel. What torch's own kernel differs by is told beside it, and not judged.

    Raises:
        SystemExit: one of the others is above the tolerance.
    """
    from benchmarks import adamw_kernel

    exact, theirs, alone, averaged = (_parameters(name, device) for _ in range(4))
    exact = exact.double()
    reference = torch.optim.AdamW(exact, foreach=False, **_SETTINGS)
    optimizer = torch.optim.AdamW(theirs, fused=True, **_SETTINGS)
    kernel = adamw_kernel.AdamW(list(alone), **_SETTINGS)
    kernel_with_average = adamw_kernel.AdamW(list(averaged), decay=_CHECKED_DECAY, **_SETTINGS)
    shadow = ShadowModel(averaged, overlap=False)
    for _ in range(CHECKED_STEPS):
        for parameters in zip(exact, theirs, alone, averaged, strict=True):
            gradient = torch.randn_like(parameters[1])
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.copy_(gradient)
        reference.step()
        optimizer.step()
        kernel.step()
        kernel_with_average.step()
        shadow.update(averaged, _CHECKED_DECAY)

    moments = {key: [reference.state[each][key] for each in exact] for key in ('exp_avg', 'exp_avg_sq')}
    differences = {
        'weights': largest_difference(alone, exact),
        'weights beside an average': largest_difference(averaged, exact),
        'first moments': largest_difference(kernel.exp_avgs, moments['exp_avg']),
        'second moments': largest_difference(kernel.exp_avg_sqs, moments['exp_avg_sq']),
        'averages': largest_difference(kernel_with_average.averages, shadow.parameters()),
    }
    of_torch = {
        "torch's weights": largest_difference(theirs, exact),
        "torch's second moments": largest_difference(
            (optimizer.state[each]['exp_avg_sq'] for each in theirs), moments['exp_avg_sq']
        ),
    }
    # A comparison with NaN is false.
    if not all(difference <= TOLERANCE for difference in differences.values()):
        raise SystemExit(
            f'{name}: after {CHECKED_STEPS} steps the kernel is too far from float64 or from ShadowModel to be timed. '
            f'{_listed(differences)}; at most {TOLERANCE:.0e} of the largest element is rounding.'
        )
    return differences | of_torch


def largest_difference(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """The largest difference of two elements, relative to the largest element of their tensor."""
    with torch.no_grad():
        found = [(a - b).abs().max() / b.abs().max() for a, b in zip(ours, theirs, strict=True)]
    return float(torch.stack(found).max())


def _parameters(name: str, device: torch.device) -> nn.ParameterList:
    """The model's parameters, with gradients of noise; without its buffers, which no optimizer steps."""
    parameters = nn.ParameterList(common.make_model(name, device).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def _listed(differences: dict[str, float]) -> str:
    return ', '.join(f'{what} to {difference:.1e}' for what, difference in differences.items())


# The times


def measure(name: str, parsed: Any, result: common.Result) -> list[dict[str, Any]]:
    """The rows of one model, fastest first. All contestants step its parameters, each with moments of its own."""
    from benchmarks import adamw_kernel

    device = result.device
    parameters = _parameters(name, device)
    count = sum(parameter.numel() for parameter in parameters)
    fused, fused_before_update = (torch.optim.AdamW(parameters, fused=True, **_SETTINGS) for _ in range(2))
    foreach = torch.optim.AdamW(parameters, foreach=True, **_SETTINGS)
    shadow = ShadowModel(parameters, overlap=False)
    kernel = adamw_kernel.AdamW(list(parameters), **_SETTINGS)
    kernel_with_average = adamw_kernel.AdamW(list(parameters), decay=common.SMOOTHING, **_SETTINGS)
    source, target = (torch.zeros(count, device=device) for _ in range(2))

    def step_and_update() -> None:
        fused_before_update.step()
        shadow.update(parameters, common.SMOOTHING)

    calls: dict[str, Callable[[], object]] = {
        FUSED: fused.step,
        FUSED_AND_UPDATE: step_and_update,
        FOREACH: foreach.step,
        KERNEL: kernel.step,
        KERNEL_WITH_AVERAGE: kernel_with_average.step,
        COPY: lambda: target.copy_(source),
    }
    timer = common.Timer(device)
    for call in calls.values():
        timer(call)
    samples = common.interleave(calls, timer, rounds=parsed.rounds, seconds=parsed.seconds)

    rows = []
    for contestant, taken in samples.items():
        row: dict[str, Any] = {
            'key': f'{name} / {contestant}',
            'model': name,
            'contestant': contestant,
            'tensors': len(parameters),
            'parameters': count,
            'rounds': len(taken),
            **common.medians(taken),
            'ratio': common.ratio(taken, samples[FUSED]),
            'bytes_per_parameter': BYTES[contestant],
        }
        if device.type == 'cuda':
            row['device_ratio'] = common.ratio(taken, samples[FUSED], 'device_ms')
            row['launches'] = common.count_launches(calls[contestant])
        row['gb_per_s'] = BYTES[contestant] * count / row.get('device_ms', row['ms']) / 1e6
        rows.append(row)
    return sorted(rows, key=lambda row: row['ms'])


_SUMMARY = ('added_after_ms', 'added_in_kernel_ms', 'kernel_over_both')


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What the average adds to a step, after it and in it, and how much is left of the time of both."""
    of = {row['contestant']: row.get('device_ms', row['ms']) for row in rows}
    added_after, added_within = of[FUSED_AND_UPDATE] - of[FUSED], of[KERNEL_WITH_AVERAGE] - of[KERNEL]
    return dict(zip(_SUMMARY, (added_after, added_within, of[KERNEL_WITH_AVERAGE] / of[FUSED_AND_UPDATE]), strict=True))


def _show(name: str, rows: Sequence[dict[str, Any]], result: common.Result) -> None:
    extra = ['host_ms', 'device_ms', 'device_ratio', 'launches'] if result.device.type == 'cuda' else []
    keys = ['contestant', 'ms', 'ratio', *extra, 'bytes_per_parameter', 'gb_per_s']
    title = f'{name}: {rows[0]["parameters"]:,} parameters in {rows[0]["tensors"]} tensors, {rows[0]["rounds"]} rounds'
    columns = [{'bytes_per_parameter': 'bytes a parameter', 'gb_per_s': 'GB/s'}.get(key) or key for key in keys]
    common.show(title, [column.replace('_', ' ') for column in columns], [[row[key] for key in keys] for row in rows])


if __name__ == '__main__':
    main()
