"""What ``shard_over_ranks`` saves: the time of an update and the memory of an average in one of n ranks.

This process plays rank 0 of each number of ranks, which gets the largest piece of every parameter. An update talks to
no other rank, so nothing is missing from its time. The time to gather an average depends on the network; it is not
measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks import common
from benchmarks.memory import allocated
from composer_ema import ShadowModel

_MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> common.Result:
    """Runs the benchmark; see ``--help``."""
    options = common.parser(__doc__ or '')
    options.add_argument('--models', default='resnet50,vit_b_16', help='names of torchvision models')
    options.add_argument('--ranks', default='1,2,4,8', help='how many ranks; ratios are to the first')
    options.add_argument('--rounds', type=int, default=25, help='at most, for each model')
    options.add_argument('--seconds', type=float, default=60.0, help='no round is begun after these, for each model')
    parsed = options.parse_args(arguments)
    result = common.start('split', parsed)
    result.measures = ['ms', 'lasting_mib']
    counts = [int(count) for count in parsed.ranks.split(',')]
    for name in parsed.models.split(','):
        rows = measure(name, counts, parsed, result)
        result.rows.extend(rows)
        keys = ['ranks', 'ms', 'ratio', 'lasting_mib', 'share']
        common.show(name, keys, [[row[key] for key in keys] for row in rows])
        result.save()
        common.free(result.device)
    return result


def measure(name: str, counts: Sequence[int], parsed: Any, result: common.Result) -> list[dict[str, Any]]:
    """A row for each number of ranks, of updates in turn."""
    model = common.make_model(name, result.device)
    averages: dict[int, ShadowModel] = {}
    lasting = {count: allocated(partial(_build, averages, model, count), result.device)[0] for count in counts}
    calls = {str(count): partial(average.update, model, common.SMOOTHING) for count, average in averages.items()}
    timer = common.Timer(result.device)
    samples = common.interleave(calls, timer, rounds=parsed.rounds, seconds=parsed.seconds)
    first = samples[str(counts[0])]
    return [
        {
            'key': f'{name} / {count} ranks',
            'model': name,
            'ranks': count,
            **common.medians(samples[str(count)]),
            'ratio': common.ratio(samples[str(count)], first),
            'lasting_mib': lasting[count] / _MIB,
            'share': lasting[count] / lasting[counts[0]],
        }
        for count in counts
    ]


def _build(averages: dict[int, ShadowModel], model: nn.Module, count: int) -> None:
    with _as_rank_0_of(count):
        averages[count] = average = ShadowModel(model, shard_over_ranks=count > 1)
        average.update(model, common.SMOOTHING)


@contextmanager
def _as_rank_0_of(count: int) -> Iterator[None]:
    dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


if __name__ == '__main__':
    main()
