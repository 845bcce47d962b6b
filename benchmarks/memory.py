"""Memory that an average keeps, and the peaks beyond it during an update and during a swap; ours and every peer's.

On CUDA from the allocator's own statistics, on the CPU from the allocations that torch.profiler records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks import common, peers

MODELS = ('resnet50', 'vit_b_16')
_MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> common.Result:
    """Runs the benchmark; see ``--help``."""
    options = common.parser(__doc__ or '')
    options.add_argument('--models', default=','.join(MODELS), help='names of torchvision models')
    options.add_argument('--precision', default='fp32,bf16', help='of the training weights; several by commas')
    parsed = options.parse_args(arguments)
    result = common.start('memory', parsed)
    result.measures = ['lasting_mib', 'update_peak_mib', 'swap_peak_mib']
    for name in parsed.models.split(','):
        for precision in parsed.precision.split(','):
            rows = measure(name, precision, result)
            result.rows.extend(rows)
            _show(f'{name} in {precision}', rows)
            result.save()
            common.free(result.device)
    return result


def measure(name: str, precision: str, result: common.Result) -> list[dict[str, Any]]:
    """The rows of one model, each contestant alone beside it."""
    model = common.make_model(name, result.device, common.PRECISIONS[precision])
    tensors = [*model.parameters(), *model.buffers()]
    weights_mib = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / _MIB
    rows = []
    for contestant in peers.CONTESTANTS:
        row = {
            'key': f'{name} {precision} / {contestant.name}',
            'model': name,
            'precision': precision,
            'contestant': contestant.name,
            'buffers': contestant.buffers,
            'weights_mib': weights_mib,
        }
        found = _measure_one(contestant, model, result)
        if found is not None:
            rows.append({**row, **found})
        common.free(result.device)
    return rows


def _measure_one(contestant: peers.Contestant, model: nn.Module, result: common.Result) -> dict[str, Any] | None:
    held: list[peers.Average | None] = []
    lasting, _ = allocated(lambda: held.append(peers.build_one(contestant, model, result)), result.device)
    average = held.pop()
    if average is None:
        return None
    _, update_peak = allocated(average.update, result.device)
    found = {'lasting_mib': lasting / _MIB, 'update_peak_mib': update_peak / _MIB, 'swap_peak_mib': None}
    if average.swap is not None:
        average.swap()
        found['swap_peak_mib'] = allocated(average.swap, result.device)[1] / _MIB
    return found


def allocated(call: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Bytes that ``call`` leaves allocated, and the most that it had allocated at one time, on ``device``."""
    with common.no_garbage_collection():
        return _allocated_on_cuda(call) if device.type == 'cuda' else _allocated_on_cpu(call)


def _allocated_on_cuda(call: Callable[[], object]) -> tuple[int, int]:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before


def _allocated_on_cpu(call: Callable[[], object]) -> tuple[int, int]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    recorded: Any = profiler.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == '[memory]']
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return now, peak


def _show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    columns = ['contestant', 'buffers', 'lasting MiB', 'peak of an update', 'peak of a swap']
    keys = ['contestant', 'buffers', 'lasting_mib', 'update_peak_mib', 'swap_peak_mib']
    weights = f'{rows[0]["weights_mib"]:.1f} MiB of weights and buffers' if rows else 'nothing could be measured'
    common.show(f'{title}: {weights}', columns, [[row[key] for key in keys] for row in rows])


if __name__ == '__main__':
    main()
