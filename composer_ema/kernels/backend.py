"""What every backend implements: it says which tensors it cannot take, and prepares steps for the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from composer_ema.kernels.layout import Pair
from composer_ema.kernels.rules import Rules

#: Performs one update in place. Takes one weight per average, each in [0, 1]: 0 keeps the average, 1 copies the source.
Steps = Callable[[Sequence[float]], None]


class Backend(Protocol):
    """One way to move tensors; each backend is a module with these functions.

    The three refusals return None for what the backend can take, and otherwise the reason, worded to follow "no NAME:"
    in a log line and "the backend NAME cannot take this pair:" in an error.
    """

    def refusal_of_device(self, device: torch.device, *, is_asked: bool) -> str | None:
        """Why the backend cannot run on ``device`` at all.

        Args:
            device: the device of the source.
            is_asked: whether the user named this backend, rather than leaving the choice to us.
        """
        ...

    def refusal(self, shadow: Tensor, source: Tensor, rules: Rules) -> str | None:
        """Why the backend cannot average ``source`` into ``shadow`` under ``rules``."""
        ...

    def refusal_to_copy(self, copy: Tensor, source: Tensor) -> str | None:
        """Why the backend cannot copy ``source`` into ``copy``."""
        ...

    def keeps_address(self, shadow: Tensor, source: Tensor) -> bool:
        """Whether a step keeps the address that ``source`` had when the step was prepared.

        Such a step must be prepared again when ``source`` moves to other memory. Other steps look the address up at
        each update.
        """
        ...

    def prepare(
        self,
        shadow_sets: Sequence[Sequence[Tensor]],
        sources: Sequence[Tensor],
        rules: Rules,
        copied: Sequence[Pair],
        are_mended: Sequence[bool],
        compensations: Sequence[Sequence[Tensor]] | None,
    ) -> Steps:
        """Prepares k averages of ``sources``, and copies.

        The caller has checked shapes, has dropped empty tensors, and passes only pairs that the backend does not
        refuse. All tensors that the step writes are on one device.

        Args:
            shadow_sets: k >= 1 lists of shadows, each as long as ``sources``; written in place.
            sources: what the shadows average; only read.
            rules: how elements are guarded and rounded.
            copied: pairs of a tensor and its source. Each update copies them, whatever the weights.
            are_mended: for each source whether an element of it is copied where it or its average is not finite,
                by every weight but 0. Where ``rules`` skip the element, they win.
            compensations: the Kahan terms of the shadows, as many and of their strides; None where ``rules`` are not
                compensated.

        Returns:
            A step that takes k weights.
        """
        ...
