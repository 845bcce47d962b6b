"""An update of one model's average, prepared: tensors paired with their shadows, grouped by what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import filterfalse
from typing import Any

import torch
from torch import Tensor

from composer_ema.kernels.layout import Pair, grouped, unzip
from composer_ema.model.watch import Watch
from composer_ema.shadow.offload import HostAverage
from composer_ema.shadow.stream import SideStream


class Plan:
    """The tensors of one model paired with their shadows, and prepared steps; valid while the model stays as it is.

    Parameters and buffers of a device share a step, and so a launch, unless parameters run beside training: the next
    forward writes buffers, so these never leave the current stream.

    Args:
        sources: the model's tensors by name.
        kinds: pairs of shadow and source: parameters, buffers that are averaged, buffers that are copied.
        prepare: makes a step of pairs to average and pairs to copy, all of one device.
        may_share: whether one step may average parameters and buffers.
    """

    def __init__(
        self,
        watch: Watch,
        has_joined: bool,
        sources: Mapping[str, Tensor],
        kinds: Sequence[Sequence[Pair]],
        streams: Mapping[torch.device, SideStream],
        prepare: Callable[[Sequence[Pair], Sequence[Pair]], Callable[[Any], Any]],
        is_left_to_a_thread: Callable[[Pair], bool],
        smallest_weight: float,
        *,
        may_share: bool,
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
        parameters, averaged, copied = (
            grouped(filterfalse(is_left_to_a_thread, kind), lambda pair: pair[0].device) for kind in kinds
        )
        self.forked_steps: list[tuple[SideStream, Callable[[Any], Any]]] = []
        self.steps: list[Callable[[Any], Any]] = []
        for device in {**parameters, **averaged, **copied}:
            together, stream = [*averaged[device]], streams[device]
            if may_share and not stream.is_beside:
                together[:0] = parameters[device]
            elif parameters[device]:
                shadows, read = unzip(parameters[device])
                stream.keep_alive(shadows + [source for source in read if source.device == device])
                with stream.fork():  # joined before anything reads; what the step allocates is that stream's own
                    self.forked_steps.append((stream, prepare(parameters[device], [])))
            if together or copied[device]:
                self.steps.append(prepare(together, copied[device]))
