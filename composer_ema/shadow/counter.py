"""A count that is kept on a device and read by the host without ever waiting for it."""

from __future__ import annotations

from typing import Any

import torch


class DeviceCounter:
    """An int64 count on ``device``, for kernels to add to.

    Attributes:
        value: the count, an int64 scalar tensor on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.zeros((), dtype=torch.int64, device=device)
        self._is_cuda = device.type == 'cuda'
        self._arriving: torch.Tensor | None = None
        self._arrived: Any = None  # torch's stubs give its events two incompatible bases
        self._latest = 0

    def poll(self) -> int:
        """The latest count that has reached the host; on CUDA a few calls old, since a copy is on its way meanwhile."""
        if not self._is_cuda:
            return int(self.value)
        if self._arrived is not None and self._arrived.query():
            assert self._arriving is not None
            self._latest, self._arrived = int(self._arriving), None
        if self._arrived is None:
            if self._arriving is None:
                self._arriving = torch.zeros((), dtype=torch.int64, pin_memory=True)
            self._arriving.copy_(self.value, non_blocking=True)
            self._arrived = torch.cuda.current_stream(self.value.device).record_event()
        return self._latest
