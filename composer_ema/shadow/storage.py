"""The tensors of one average: how they come to be, which dtype they have and where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from composer_ema.kernels.layout import Pair, side_by_side
from composer_ema.kernels.rules import is_inexact
from composer_ema.model.inventory import Inventory
from composer_ema.model.selection import Selection
from composer_ema.settings import Settings


class Storage:
    """One average of a model: a tensor for each parameter and buffer that is tracked, by canonical name.

    Args:
        settings: which tensors are tracked, in which dtype and on which device.

    Attributes:
        parameters: name to shadow, of the shape of its source.
        buffers: likewise; floating ones are averaged or copied as the settings say, others copied.
        shapes: every parameter of the model, tracked or not, as a tensor without memory.
        persistent: names of the buffers that the model's own state dict holds.
        aliases: further names of a tied tensor, each with the name it stands under.
        num_updates: updates made so far.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self.shapes: dict[str, Tensor] = {}
        self.persistent: set[str] = set()
        self.aliases: dict[str, str] = {}
        self.num_updates = 0

    @property
    def selection(self) -> Selection:
        """The names that the settings let through."""
        return Selection(self.settings.included, self.settings.excluded)

    @property
    def volatile(self) -> set[str]:
        """Names of the buffers that the model does not save."""
        return self.buffers.keys() - self.persistent

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Name and shadow of all parameters, then of all buffers."""
        yield from self.parameters.items()
        yield from self.buffers.items()

    def tensor(self, name: str) -> Tensor | None:
        """The shadow of that name; None where there is none."""
        return self.parameters[name] if name in self.parameters else self.buffers.get(name)

    def join(self, inventory: Inventory) -> None:
        """Takes in, at their value, trainable parameters and buffers that are new, or buffers of a new shape.

        A buffer whose elements share memory cannot be written, so it never changes and is left out.
        """
        selection = self.selection
        self.parameters |= self.copies_of({
            name: parameter
            for name, parameter in inventory.parameters.items()
            if name not in self.parameters and parameter.requires_grad and name in selection
        })  # fmt: skip
        self.buffers |= self.copies_of({
            name: buffer
            for name, buffer in inventory.buffers.items()
            if name in selection
            and not (name in self.buffers and self.buffers[name].shape == buffer.shape)
            and not _overlaps_itself(buffer)
        })  # fmt: skip
        self.shapes = {name: torch.empty_like(t, device='meta') for name, t in inventory.parameters.items()}
        self.persistent, self.aliases = inventory.persistent, inventory.aliases

    def copies_of(self, sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """New shadows that hold the values of ``sources``, in the dtypes and on the device of the settings."""
        device = self.settings.device
        with torch.inference_mode(False):
            shadows = [
                source.detach().to(device or source.device, self._dtype_for(source), copy=True)
                for source in sources.values()
            ]
            return dict(zip(sources, side_by_side(shadows), strict=True))

    def paired(self, kind: dict[str, Tensor], sources: Mapping[str, Tensor]) -> dict[str, Pair]:
        """The shadows of :attr:`parameters` or :attr:`buffers` beside their sources of the same shape.

        A shadow that lies on another device than it should is moved.
        """
        pairs = {}
        for name, shadow in kind.items():
            source = sources.get(name)
            if source is not None and source.shape == shadow.shape:
                kind[name] = shadow.to(self.settings.device or source.device)
                pairs[name] = (kind[name], source)
        return pairs

    def is_averaged(self, buffer: Tensor) -> bool:
        """Whether a buffer is averaged, not copied."""
        return self.settings.buffers == 'average' and is_inexact(buffer)

    def convert(self, settings: Settings) -> None:
        """Moves and casts every shadow to the dtype and device of ``settings``."""
        self.settings = settings
        for kind in (self.parameters, self.buffers):
            for name, tensor in kind.items():
                kind[name] = tensor.to(settings.device or tensor.device, self._dtype_for(tensor))

    def __repr__(self) -> str:
        count = sum(tensor.numel() for tensor in self.parameters.values())
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in self.items())
        dtypes = sorted({str(tensor.dtype).removeprefix('torch.') for tensor in self.parameters.values()})
        devices = sorted({str(tensor.device) for tensor in self.parameters.values()})
        return (
            f'ShadowModel({len(self.parameters)} parameters of {count:,} elements, {len(self.buffers)} buffers, '
            f'{size / 2**20:,.1f} MiB, {"/".join(dtypes)} on {"/".join(devices)}, {self.num_updates} updates)'
        )

    def _dtype_for(self, source: Tensor) -> torch.dtype:
        if not source.is_floating_point():
            return source.dtype
        return self.settings.dtype or (torch.float32 if source.element_size() < 4 else source.dtype)


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements share memory, as after ``expand``."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
