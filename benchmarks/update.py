"""Milliseconds per update of the average: ours, every peer, and the limit, which is one flat ``lerp_``.

All contestants follow one model in one process and are timed in turns; each number is a median over the rounds. On the
CPU each model has a process of its own, since how long a temporary tensor takes depends on the heap that is left by
what ran before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common, peers

MODELS = ('shufflenet_v2_x0_5', 'resnet18', 'resnet50', 'vit_b_16', 'efficientnet_b0', 'swin_t', 'regnet_y_16gf')
LIMIT, COPY = 'limit: one flat lerp_', 'one flat copy_'
_READ_AND_WRITTEN = {LIMIT: 12, COPY: 8, peers.OURS: 12}  # bytes per float32
_ALIGNMENT = 64  # floats: 256 bytes, more than any vector or transaction


def main(arguments: Sequence[str] | None = None) -> common.Result:
    """Runs the benchmark; see ``--help``."""
    options = common.parser(__doc__ or '')
    options.add_argument('--models', default=','.join(MODELS), help='names of torchvision models')
    options.add_argument('--rounds', type=int, default=25, help='at most, for each model')
    options.add_argument('--seconds', type=float, default=60.0, help='no round is begun after these, for each model')
    options.add_argument('--precision', choices=common.PRECISIONS, default='fp32', help='of the training weights')
    options.add_argument(
        '--cache', choices=('left', 'cold', 'warm'), default='left', help='what a call finds there; see common.Timer'
    )
    parsed = options.parse_args(arguments)
    result = common.start('update', parsed)
    if result.device.type == 'cuda':
        result.measures = ['ms', 'host_ms', 'device_ms']

    names = parsed.models.split(',')
    for name in names:
        if result.device.type == 'cpu' and len(names) > 1:
            part = common.in_own_process(measure, name, parsed, result.without_rows())
        else:
            part = measure(name, parsed, result)
        result.rows.extend(part.rows)
        for missing in part.missing:
            if missing not in result.missing:
                result.missing.append(missing)
        result.summary[name] = summarise(part.rows)
        _show(name, part.rows, result)
        result.save()
        common.free(result.device)
    _show_summary(result)
    return result


def measure(name: str, parsed: Any, settings: common.Result) -> common.Result:
    """The rows of one model, fastest first."""
    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    result = settings.without_rows()
    device = result.device
    model = common.make_model(name, device, common.PRECISIONS[parsed.precision])
    flat_source = flatten_(model)
    flat_shadow = torch.zeros_like(flat_source)
    averages = peers.build(peers.CONTESTANTS, model, result)

    calls: dict[str, Callable[[], object]] = {
        LIMIT: lambda: flat_shadow.lerp_(flat_source, 1 - common.SMOOTHING),
        COPY: lambda: flat_shadow.copy_(flat_source),
    }
    buffers = {LIMIT: 'averaged', COPY: 'copied'}
    for contestant, average in averages.items():
        calls[contestant.name] = average.update
        buffers[contestant.name] = contestant.buffers
    timer = common.Timer(device, parsed.cache)
    for call in calls.values():
        timer(call)
    samples = common.interleave(calls, timer, rounds=parsed.rounds, seconds=parsed.seconds)

    tensors = common.floating(model.parameters()) + common.floating(model.buffers())
    floats = sum(tensor.numel() for tensor in tensors)
    for contestant_name, taken in samples.items():
        row = {
            'key': f'{name} / {contestant_name}',
            'model': name,
            'contestant': contestant_name,
            'buffers': buffers[contestant_name],
            'tensors': len(tensors),
            'floats': floats,
            'rounds': len(taken),
            **common.medians(taken),
            'ratio': common.ratio(taken, samples[LIMIT]),
            'over_ours': common.ratio(taken, samples[peers.OURS]),
        }
        if device.type == 'cuda':
            row['device_ratio'] = common.ratio(taken, samples[LIMIT], 'device_ms')
            if contestant_name in _READ_AND_WRITTEN and parsed.precision == 'fp32':
                row['device_gb_per_s'] = _READ_AND_WRITTEN[contestant_name] * floats / row['device_ms'] / 1e6
        result.rows.append(row)
    result.rows.sort(key=lambda row: row['ms'])
    return result


def flatten_(model: nn.Module) -> Tensor:
    """Moves float32 parameters into one flat tensor, so that the limit reads the memory that everyone reads.

    Each begins where an allocator would let it begin. Buffers stay where they are, and have room at the end, as have
    parameters of another dtype; what aligning adds is left out there.

    Returns:
        A float32 tensor of as many elements as the model's floating parameters and buffers have.
    """
    parameters = list(model.parameters())
    floats = sum(tensor.numel() for tensor in common.floating(model.parameters()) + common.floating(model.buffers()))
    starts, end = [], 0
    for parameter in parameters:
        starts.append(end)
        end += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
    flat = torch.zeros(max(floats, end), device=parameters[0].device)
    for parameter, start in zip(parameters, starts, strict=True):
        if parameter.dtype is torch.float32:
            place = flat[start : start + parameter.numel()].view(parameter.shape)
            parameter.data = place.copy_(parameter.data)
    return flat[:floats]


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the project promises: the distance to the limit, to the fastest peer and to Composer's own."""
    by_name = {row['contestant']: row for row in rows}
    ours = by_name[peers.OURS]
    rivals = [row for row in rows if row['contestant'] not in (LIMIT, COPY) and not _is_ours(row)]
    fastest = min(rivals, key=lambda row: row['over_ours'])
    found = {
        'floats': ours['floats'],
        'tensors': ours['tensors'],
        'ratio_to_limit': ours['ratio'],
        'fastest_peer': fastest['contestant'],
        'fastest_peer_over_ours': fastest['over_ours'],
        'built_in_over_ours': by_name['Composer EMA']['over_ours'] if 'Composer EMA' in by_name else None,
    }
    if 'device_ms' in ours:
        found['device_ratio_to_limit'] = ours['device_ratio']
        found['share_of_copy_bandwidth'] = None
    if 'device_gb_per_s' in ours:
        found['share_of_copy_bandwidth'] = ours['device_gb_per_s'] / by_name[COPY]['device_gb_per_s']
    return found


def _is_ours(row: dict[str, Any]) -> bool:
    return row['contestant'].startswith(peers.OURS)


def _show(name: str, rows: Sequence[dict[str, Any]], result: common.Result) -> None:
    extra = ['host_ms', 'device_ms', 'device_ratio'] if result.device.type == 'cuda' else []
    title = f'{name}: {rows[0]["floats"]:,} floats in {rows[0]["tensors"]} tensors, {rows[0]["rounds"]} rounds'
    columns = ['contestant', 'buffers', 'ms', 'ratio', *(key.replace('_', ' ') for key in extra)]
    keys = ['contestant', 'buffers', 'ms', 'ratio', *extra]
    common.show(title, columns, [[row[key] for key in keys] for row in rows])


def _show_summary(result: common.Result) -> None:
    device, models = result.device.type, list(result.summary)
    key = 'device_ratio' if device == 'cuda' else 'ratio'
    ratios = {(row['contestant'], row['model']): row[key] for row in result.rows}
    names = [name for name in (LIMIT, *(each.name for each in peers.CONTESTANTS)) if (name, models[0]) in ratios]
    rows = [[name, *(ratios.get((name, model)) for model in models)] for name in names]
    common.show(f'{device}: ratios to the limit', ['contestant', *models], rows)

    keys = ['floats', 'ratio_to_limit', 'built_in_over_ours', 'fastest_peer_over_ours', 'fastest_peer']
    columns = ['model', 'floats', 'ours to the limit', 'built-in to ours', 'fastest peer to ours', 'fastest peer']
    if device == 'cuda':
        keys += ['device_ratio_to_limit', 'share_of_copy_bandwidth']
        columns += ['on the device', 'of copy bandwidth']
    rows = [[model, *(summary[key] for key in keys)] for model, summary in result.summary.items()]
    common.show(f'{device}: ours in short', columns, rows)


if __name__ == '__main__':
    main()
