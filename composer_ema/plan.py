"""An update of one model's average, prepared: tensors paired with their shadows, grouped by what becomes of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import filterfalse
from typing import Any

import torch
from torch import Tensor

from composer_ema import kernels
from composer_ema.kernels.layout import unzip
from composer_ema.naming import Watch
from composer_ema.offload import HostAverage
from composer_ema.stream import SideStream


class Plan:
    """The tensors of one model paired with their shadows, and prepared steps; valid while the model stays as it is.

    Args:
        sources: the model's tensors by name.
        kinds: pairs of shadow and source: parameters, buffers that are averaged, buffers that are copied.
    """

    def __init__(
        self,
        watch: Watch,
        has_joined: bool,
        sources: Mapping[str, Tensor],
        kinds: Sequence[Sequence[tuple[Tensor, Tensor]]],
        streams: Mapping[torch.device, SideStream],
        prepare: Callable[[Iterable[tuple[Tensor, Tensor]]], Callable[[Any], Any]],
        is_left_to_a_thread: Callable[[tuple[Tensor, Tensor]], bool],
        smallest_weight: float,
    ) -> None:
        self.smallest_weight = smallest_weight
        self.watch = watch
        self.has_joined = has_joined
        self.sources = sources

        left = [list(filter(is_left_to_a_thread, kind)) for kind in kinds]
        self.host_averages = [
            HostAverage(*([pair for pair in kind if pair[1].device == device] for kind in left))
            for device in {source.device for kind in left for _, source in kind}
        ]
        here = [list(filterfalse(is_left_to_a_thread, kind)) for kind in kinds]
        self.parameter_steps: list[tuple[SideStream, Callable[[Any], Any]]] = []
        for device, pairs in _by_device(here[0]).items():
            shadows, read = unzip(pairs)
            streams[device].keep_alive(shadows + [source for source in read if source.device == device])
            self.parameter_steps.append((streams[device], prepare(pairs)))
        self.buffer_steps = [prepare(pairs) for pairs in _by_device(here[1]).values()]
        self.copy_other_buffers = kernels.prepare_copy(*unzip(here[2]))


def _by_device(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[torch.device, list[tuple[Tensor, Tensor]]]:
    grouped: defaultdict[torch.device, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for pair in pairs:
        grouped[pair[0].device].append(pair)
    return grouped
