"""Milliseconds per update of the average: ours, every peer, and the limit, which is one flat ``lerp_``.

All contestants follow one model in one process and are timed in turns; each number is a median over the rounds. How
long a temporary tensor takes on a CPU depends on what the C library does with freed memory, so there each model is
measured at both bounds, in processes of their own: with memory kept, as it mostly is in training, and returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common, peers

MODELS = ('shufflenet_v2_x0_5', 'resnet18', 'resnet50', 'vit_b_16', 'efficientnet_b0', 'swin_t', 'regnet_y_16gf')
LIMIT, COPY = 'limit: one flat lerp_', 'one flat copy_'
_DESCRIBED = {'kept': 'freed memory kept', 'returned': 'freed memory returned', 'as is': 'the heap as it is'}
_READ_AND_WRITTEN = {LIMIT: 12, COPY: 8, peers.OURS: 12}  # bytes per float32
_ALIGNMENT = 64  # floats: 256 bytes, more than any vector or transaction
_BATCH = 2  # images of a training iteration


def main(arguments: Sequence[str] | None = None) -> common.Result:
    """Runs the benchmark; see ``--help``."""
    options = common.parser(__doc__ or '')
    options.add_argument('--models', default=','.join(MODELS), help='names of torchvision models')
    options.add_argument('--rounds', type=int, default=25, help='at most, for each model')
    options.add_argument(
        '--seconds', type=float, default=60.0, help='no round is begun after these, for each model and heap'
    )
    options.add_argument('--precision', choices=common.PRECISIONS, default='fp32', help='of the training weights')
    options.add_argument(
        '--after',
        choices=('others', 'itself', 'flush', 'training'),
        default=None,
        help='what runs before a timed call, see common.Timer; itself on the CPU, others on a GPU',
    )
    options.add_argument(
        '--heap',
        choices=('both', 'kept', 'returned', 'as is'),
        default=None,
        help='see common.set_heap; both on the CPU, but after training as it is',
    )
    parsed = options.parse_args(arguments)
    parsed.after = parsed.after or ('others' if torch.device(parsed.device).type == 'cuda' else 'itself')
    result = common.start('update', parsed)
    heaps = _heaps(parsed, result.device)
    result.settings['heap'] = ' and '.join(heaps)
    result.measures = ['ms', 'ms_returned'] if len(heaps) == 2 else ['ms']
    if result.device.type == 'cuda':
        result.measures += ['host_ms', 'device_ms']

    names = parsed.models.split(',')
    for name in names:
        if heaps == ('as is',) and (result.device.type == 'cuda' or len(names) == 1):
            parts = [measure(name, parsed, heaps[0], result)]
        else:
            parts = [common.in_own_process(measure, name, parsed, heap, result.without_rows()) for heap in heaps]
        rows = _side_by_side(*(part.rows for part in parts))
        result.rows.extend(rows)
        for missing in parts[0].missing:
            if missing not in result.missing:
                result.missing.append(missing)
        result.summary[name] = summarise(rows)
        _show(name, rows, result)
        result.save()
        common.free(result.device)
    _show_summary(result, heaps)
    return result


def _heaps(parsed: Any, device: torch.device) -> tuple[common.Heap, ...]:
    known = common.heaps(device)
    if parsed.heap is None:
        return ('as is',) if parsed.after == 'training' else known
    wanted = ('kept', 'returned') if parsed.heap == 'both' else (parsed.heap,)
    if wanted != ('as is',) and not set(wanted) <= set(known):
        raise SystemExit(f'--heap {parsed.heap} needs a CPU and the GNU C library. Leave it out.')
    return wanted


def _side_by_side(rows: Sequence[dict[str, Any]], *others: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """``rows`` with the times of a second measurement, with freed memory returned, beside their own."""
    for again in others:
        by_key = {row['key']: row for row in again}
        for row in rows:
            row.update({f'{key}_returned': by_key[row['key']][key] for key in ('ms', 'ratio', 'over_ours')})
    return rows


def measure(name: str, parsed: Any, heap: common.Heap, settings: common.Result) -> common.Result:
    """The rows of one model, fastest first."""
    common.set_heap(heap)
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
    timer = common.Timer(device, parsed.after, partial(_train, model))
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
            row['launches'] = common.count_launches(calls[contestant_name])
            row['device_ratio'] = common.ratio(taken, samples[LIMIT], 'device_ms')
            if contestant_name in _READ_AND_WRITTEN and parsed.precision == 'fp32':
                row['device_gb_per_s'] = _READ_AND_WRITTEN[contestant_name] * floats / row['device_ms'] / 1e6
        result.rows.append(row)
    result.rows.sort(key=lambda row: row['ms'])
    return result


def _train(model: nn.Module) -> None:
    """One iteration of plain SGD on a batch of noise, at a rate that leaves the weights finite."""
    like = next(model.parameters())
    images = torch.randn(_BATCH, 3, 224, 224, device=like.device, dtype=like.dtype)
    labels = torch.randint(1000, (_BATCH,), device=like.device)
    model.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=1e-6)


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
        'built_in_over_ours': by_name.get('Composer EMA', {}).get('over_ours'),
        'built_in_over_ours_returned': by_name.get('Composer EMA', {}).get('over_ours_returned'),
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
    extra = ['host_ms', 'device_ms', 'device_ratio', 'launches'] if result.device.type == 'cuda' else []
    if 'ms_returned' in rows[0]:
        extra += ['ms_returned', 'ratio_returned']
    title = f'{name}: {rows[0]["floats"]:,} floats in {rows[0]["tensors"]} tensors, {rows[0]["rounds"]} rounds'
    columns = ['contestant', 'buffers', 'ms', 'ratio', *(key.replace('_', ' ') for key in extra)]
    keys = ['contestant', 'buffers', 'ms', 'ratio', *extra]
    common.show(title, columns, [[row[key] for key in keys] for row in rows])


def _show_summary(result: common.Result, heaps: Sequence[common.Heap]) -> None:
    device = result.device.type
    if device == 'cuda':
        _show_ratios('cuda: ratios to the limit', 'device_ratio', result)
        _show_ratios('cuda: kernels, copies and fills of one update', 'launches', result)
    else:
        for heap, key in zip(heaps, ('ratio', 'ratio_returned'), strict=False):
            _show_ratios(f'{device}: ratios to the limit, {_DESCRIBED[heap]}', key, result)

    keys = ['floats', 'ratio_to_limit', 'fastest_peer_over_ours', 'fastest_peer', 'built_in_over_ours']
    columns = ['model', 'floats', 'ours to the limit', 'fastest peer to ours', 'fastest peer', 'built-in to ours']
    if 'ms_returned' in result.measures:
        keys.append('built_in_over_ours_returned')
        columns.append('the same, memory returned')
    if device == 'cuda':
        keys += ['device_ratio_to_limit', 'share_of_copy_bandwidth']
        columns += ['on the device', 'of copy bandwidth']
    rows = [[model, *(summary[key] for key in keys)] for model, summary in result.summary.items()]
    common.show(f'{device}: ours in short', columns, rows)


def _show_ratios(title: str, key: str, result: common.Result) -> None:
    models = list(result.summary)
    ratios = {(row['contestant'], row['model']): row[key] for row in result.rows}
    names = [name for name in (LIMIT, *(each.name for each in peers.CONTESTANTS)) if (name, models[0]) in ratios]
    common.show(title, ['contestant', *models], [[name, *(ratios.get((name, m)) for m in models)] for name in names])


if __name__ == '__main__':
    main()
