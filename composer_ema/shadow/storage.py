"""The tensors of one average: how they come to be, which dtype they have and where they lie."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from composer_ema.kernels.layout import Pair
from composer_ema.kernels.rules import is_inexact
from composer_ema.model.inventory import Inventory
from composer_ema.model.names import listed
from composer_ema.model.selection import Selection
from composer_ema.model.sharding import cut, is_shard, laid_out_as, lie_alike, local, split_over_ranks, wrapped
from composer_ema.settings import Settings, check_device_is_here
from composer_ema.shadow.compensation import Compensations
from composer_ema.shadow.parts import assembled
from composer_ema.spans import ArgumentError
from composer_ema.wording import counted, shown


class Storage:
    """One average of a model: a tensor for each parameter and buffer that is tracked, by canonical name.

    Args:
        settings: which tensors are tracked, in which dtype and on which device.

    Attributes:
        parameters: name to shadow, of the shape of its source; a DTensor laid out as its source is where that is one.
        buffers: likewise; floating ones are averaged or copied as the settings say, others copied. Those that the
            settings select and that are not here stay as the model has them; see :func:`can_be_kept`.
        shapes: every parameter of the model, tracked or not, as a tensor without memory, laid out alike.
        persistent: names of the buffers that the model's own state dict holds.
        statistics: names of the running means and variances of normalisation layers.
        aliases: further names of a tied tensor, each with the name it stands under.
        compensations: the Kahan terms of what is averaged; none where the settings do not ask for them.
        num_updates: updates made so far.
    """

    def __init__(self, settings: Settings) -> None:
        check_device_is_here(settings.device)
        self.settings = settings
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self.shapes: dict[str, Tensor] = {}
        self.persistent: set[str] = set()
        self.statistics: set[str] = set()
        self.aliases: dict[str, str] = {}
        self.compensations = Compensations()
        self.num_updates = 0
        self._loaded: set[str] = set()  # buffers that came with a state and that no model has confirmed

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

    def join(self, inventory: Inventory, *, frozen: Collection[str] = ()) -> None:
        """Takes in, at their value, trainable parameters that are new, and buffers that are new or of another kind.

        Buffers that the model no longer has are dropped.

        Args:
            inventory: of the model.
            frozen: names of parameters to take in although they do not require a gradient. Default: none.

        Raises:
            ValueError: a parameter to take in is sparse, or of another layout that cannot be averaged.
        """
        selection = self.selection
        new = {
            name: parameter
            for name, parameter in inventory.parameters.items()
            if name not in self.parameters and (parameter.requires_grad or name in frozen) and name in selection
        }
        for name, parameter in new.items():
            if parameter.layout is not torch.strided:
                raise ValueError(
                    f'{name} is a parameter stored as {parameter.layout}, but only dense ones can be averaged. '
                    'Exclude it by name, or make it dense.'
                )
        self.parameters |= self.copies_of(self.shared(new))
        self._drop_all_but(inventory.buffers)
        views = views_of_parameters(inventory.parameters.values(), inventory.buffers)
        self.buffers |= self.copies_of({
            name: buffer
            for name, buffer in inventory.buffers.items()
            if name in selection
            and can_be_kept(buffer)
            and name not in views
            and not are_alike(self.buffers.get(name), buffer)
        })  # fmt: skip
        for name in views & self.buffers.keys():
            del self.buffers[name]
        self.shapes = {
            name: wrapped(torch.empty_like(local(parameter), device='meta'), parameter)
            for name, parameter in self.shared(inventory.parameters).items()
        }
        self.persistent, self.aliases = inventory.persistent, inventory.aliases
        self.statistics = inventory.statistics

    def change_names(self, inventory: Inventory, renamed: Mapping[str, str], *, leaving: bool) -> None:
        """Gives shadows the new names of their sources, and forgets those of sources that have left.

        :attr:`parameters` and :attr:`buffers` become other dictionaries; the old ones stay as they are.

        Args:
            inventory: of the model as it is now.
            renamed: old name to new name.
            leaving: whether to forget the shadows of parameters that the model does not have.

        Raises:
            ValueError: an old name that is not tracked, a new one that the model does not have, has in another shape
                or that is tracked already. Nothing is changed.
        """
        tensors, tracked = inventory.tensors(), {*self.parameters, *self.buffers}
        for old, new in renamed.items():
            shadow, source = self.tensor(old), tensors.get(new)
            if shadow is None:
                raise ValueError(f'renamed: there is no average of {old}. Tracked are {listed(sorted(tracked))}.')
            if source is None or not are_alike(shadow, source):
                has = 'does not have it' if source is None else f'has it in shape {tuple(source.shape)}'
                raise ValueError(
                    f'renamed: {old} of shape {tuple(shadow.shape)} cannot become {new}: the model {has}. '
                    'Name a tensor of the same shape.'
                )
            if new in tracked and new != old and new not in renamed:
                raise ValueError(f'renamed: {old} cannot become {new}, which has an average of its own.')
        if len(set(renamed.values())) < len(renamed):
            raise ValueError('renamed gives two averages one name. Name each tensor once.')
        sources = inventory.parameters
        parameters = {renamed.get(name, name): shadow for name, shadow in self.parameters.items()}
        self.buffers = {renamed.get(name, name): shadow for name, shadow in self.buffers.items()}
        self.parameters = {
            name: shadow
            for name, shadow in parameters.items()
            if not leaving or (name in sources and are_alike(shadow, sources[name]))
        }

    def _drop_all_but(self, names: Collection[str]) -> None:
        gone = self.buffers.keys() - names
        for name in gone:
            del self.buffers[name]
        if loaded := sorted(gone & self._loaded):
            warnings.warn(
                f'the loaded average has buffers that the model does not have: {listed(loaded)}. They are dropped.',
                stacklevel=6,
            )
        self._loaded.clear()

    def assign(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        compensations: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes values into the shadows of these names. What is new here, or of another kind, gets a shadow.

        A collective call where values are shared among processes in another way than the shadows.

        Args:
            parameters: name to value, whole or shared.
            buffers: likewise.
            compensations: the Kahan terms of some of these. Where the settings do not ask for them, they are dropped.
        """
        terms = compensations or {}
        self._loaded |= buffers.keys() - self.buffers.keys()
        for kind, given in ((self.parameters, parameters), (self.buffers, buffers)):
            layouts = {**self.shapes, **kind}
            values = {name: laid_out_as(value, layouts.get(name, value)) for name, value in given.items()}
            written = {
                name: value
                for name, value in values.items()
                if are_alike(kind.get(name), value) and not (kind[name].is_meta and not self._is_outline)
            }
            for name, value in written.items():
                local(kind[name]).copy_(local(value))
            kind |= self.copies_of({name: value for name, value in values.items() if name not in written})
            if self.settings.compensated:
                for name, value in values.items():
                    if is_inexact(value):
                        term = terms.get(name)
                        self.compensations.put(kind[name], value, None if term is None else laid_out_as(term, value))

    def compensate(self) -> None:
        """Gives whatever is averaged its Kahan term, if the settings ask for it."""
        if self.settings.compensated:
            averaged = (buffer for name, buffer in self.buffers.items() if self.is_averaged(name))
            self.compensations.side_by_side([*self.parameters.values(), *averaged])

    def shared(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Parameters laid out as their shadows are to be, aliased: over all ranks if the settings say so."""
        if not self.settings.shard_over_ranks:
            return parameters
        return {name: split_over_ranks(parameter) for name, parameter in parameters.items()}

    def copies_of(self, sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """New shadows that hold the values of ``sources``, laid out as those, as the settings say."""
        device = self.settings.device
        with torch.inference_mode(False):
            parts = [
                local(source).detach().to(device or source.device, self._dtype_for(source), copy=True)
                for source in sources.values()
            ]
            return dict(zip(sources, assembled(parts, list(sources.values())), strict=True))

    def paired(self, kind: dict[str, Tensor], sources: Mapping[str, Tensor]) -> dict[str, Pair]:
        """The shadows of :attr:`parameters` or :attr:`buffers` beside their sources of the same shape and kind.

        Buffers that cannot be written stay out; see :func:`can_be_kept`. A shadow that lies on another device than it
        should is moved, and one whose source is shared among processes is shared alike.

        Raises:
            ValueError: a shadow or its source is on the meta device, so that it has no values.
        """
        pairs = {}
        layouts = self.shared(sources) if kind is self.parameters else sources
        for name, shadow in kind.items():
            source = sources.get(name)
            is_left = kind is self.buffers and source is not None and not can_be_kept(source)
            if source is not None and not is_left and are_alike(shadow, source):
                if source.is_meta or shadow.is_meta:
                    self._check_has_values(name, shadow, source)
                shadow = self._shared_as(layouts[name], shadow)
                kind[name] = self._moved(shadow, self.settings.device or source.device, shadow.dtype)
                pairs[name] = (kind[name], source)
        return pairs

    def _check_has_values(self, name: str, shadow: Tensor, source: Tensor) -> None:
        if source.is_meta and not shadow.is_meta:
            raise ValueError(
                f'{name} of the model is on the meta device, so it has no values to average. '
                "Call model.to_empty(device='cpu') and initialise or load its weights first."
            )
        if not source.is_meta and not self._is_outline:
            raise ValueError(
                f'{name} was on the meta device when the average was built, so the average has no values to start '
                'from. Build it once the model has its weights, or load a saved average into it first.'
            )

    def is_averaged(self, name: str) -> bool:
        """Whether a buffer is averaged, not copied."""
        return is_inexact(self.buffers[name]) and self.settings.averages_buffer(
            name, is_statistic=name in self.statistics
        )

    @property
    def _is_outline(self) -> bool:
        """Whether the shadows shall have no memory."""
        return self.settings.device == torch.device('meta')

    def convert(self, settings: Settings) -> None:
        """Moves and casts every shadow to the dtype and device of ``settings``."""
        check_device_is_here(settings.device)
        self.settings = settings
        for kind in (self.parameters, self.buffers):
            for name, tensor in kind.items():
                kind[name] = self._moved(tensor, settings.device or tensor.device, self._dtype_for(tensor))

    def _moved(self, shadow: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The shadow there, with its Kahan term."""
        part = local(shadow)
        moved = part.to(device, dtype)
        return shadow if moved is part else self._replaced(shadow, wrapped(moved, shadow))

    def _shared_as(self, layout: Tensor, shadow: Tensor) -> Tensor:
        """The shadow, with its Kahan term, laid out as ``layout`` if processes share that.

        A model may be sharded after its average was built, or loaded.
        """
        if not is_shard(layout) or lie_alike(shadow, layout):
            return shadow
        with torch.inference_mode(False):
            return self._replaced(shadow, cut(shadow, layout))

    def _replaced(self, shadow: Tensor, by: Tensor) -> Tensor:
        if (term := self.compensations.take(shadow)) is not None:
            self.compensations.put(by, laid_out_as(shadow, by), laid_out_as(term, by))
        return by

    def __repr__(self) -> str:
        count = sum(tensor.numel() for tensor in self.parameters.values())
        size = sum(local(tensor).numel() * tensor.element_size() for _, tensor in self.items())
        dtypes = sorted({str(tensor.dtype).removeprefix('torch.') for tensor in self.parameters.values()})
        devices = sorted({str(tensor.device) for tensor in self.parameters.values()})
        return (
            f'ShadowModel({counted(len(self.parameters), "parameter")} of {counted(count, "element")}, '
            f'{counted(len(self.buffers), "buffer")}, {size / 2**20:,.1f} MiB, '
            f'{"/".join(dtypes)} on {"/".join(devices)}, {counted(self.num_updates, "update")})'
        )

    def _dtype_for(self, source: Tensor) -> torch.dtype:
        if not source.is_floating_point():
            return source.dtype
        return self.settings.dtype or (torch.float32 if source.element_size() < 4 else source.dtype)


def check_renamed(renamed: Any) -> Mapping[str, str]:
    """The argument ``renamed`` as a mapping, empty where it is None; raises a TypeError where it maps no names."""
    if renamed is None:
        return {}
    if not isinstance(renamed, Mapping) or not all(isinstance(each, str) for pair in renamed.items() for each in pair):
        raise TypeError(f'renamed must map old names to new ones, got {shown(renamed)}. Pass for example {{old: new}}.')
    return {str.__str__(old): str.__str__(new) for old, new in renamed.items()}


def check_tensors(argument: str, tensors: Any) -> dict[str, Tensor]:
    """An argument that maps names to tensors of which an average can be made, as a dictionary of its own.

    Raises:
        TypeError: it is none.
        ValueError: a tensor has no values, or is not dense.
    """
    if not isinstance(tensors, Mapping):
        raise TypeError(f'{argument} must map names to tensors, got {shown(tensors)}. Pass a state dict.')
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f'{argument} must map names to tensors, got {shown(tensor)} for {shown(name)}.')
        if is_lazy(tensor) or tensor.is_meta or tensor.layout is not torch.strided or tensor.is_nested:
            kind = 'has no values yet' if is_lazy(tensor) or tensor.is_meta else 'is not dense'
            raise ValueError(f'{argument}: the tensor {shown(name)} {kind}. Pass dense tensors that hold values.')
    return {str.__str__(name): tensor for name, tensor in tensors.items()}


def check_buffer_patterns(patterns: Iterable[tuple[re.Pattern[str], str]], buffers: Mapping[str, Tensor]) -> None:
    """Raises unless each pattern of the setting ``buffers`` decides for a buffer, and one to average a floating one."""
    taken: dict[str, str] = {}  # the name of a buffer and the first pattern that is found in it
    for pattern, mode in patterns:
        found = [name for name in buffers if pattern.search(name)]
        if not found:
            has = f'has the buffers {listed(list(buffers))}' if buffers else 'has no buffers'
            message = (
                f'buffers pattern {pattern.pattern!r} matches nothing: the model {has}. Correct it or leave it out.'
            )
            raise ArgumentError(message, 'buffers')
        decided = [name for name in found if name not in taken]
        if not decided:
            earlier = listed([repr(each) for each in dict.fromkeys(taken[name] for name in found)])
            raise ArgumentError(
                f'buffers pattern {pattern.pattern!r} decides nothing: the first pattern found wins, and {earlier} '
                f'before it is found in {listed(found)}. Put it first, or leave it out.',
                'buffers',
            )
        taken |= dict.fromkeys(decided, pattern.pattern)
        if mode == 'average' and not any(map(is_inexact, (buffers[name] for name in decided))):
            raise ArgumentError(
                f'buffers pattern {pattern.pattern!r} averages nothing: {listed(decided)} holds whole numbers, which '
                'are copied. Leave it out.',
                'buffers',
            )


def can_be_kept(buffer: Tensor) -> bool:
    """Whether an average can hold a copy of a buffer.

    It cannot where the buffer is sparse. Where elements share memory, as after ``expand``, the buffer cannot be
    written, so it never changes.
    """
    return buffer.layout is torch.strided and not buffer.is_nested and not _overlaps_itself(buffer)


def are_alike(shadow: Tensor | None, source: Tensor) -> bool:
    """Whether ``shadow`` can become ``source``: they share shape and layout, and both hold the same kind of numbers."""
    if shadow is None or shadow.shape != source.shape or shadow.layout != source.layout:
        return False
    are_floating = shadow.is_floating_point() and source.is_floating_point()
    return shadow.dtype == source.dtype or are_floating or (shadow.is_complex() and source.is_complex())


def views_of_parameters(parameters: Iterable[Tensor], buffers: Mapping[str, Tensor]) -> set[str]:
    """Names of the buffers that lie in the memory of a parameter, and so show what that shows."""
    extents: dict[int, list[tuple[int, int]]] = {}
    for parameter in filter(_has_memory, map(local, parameters)):
        extents.setdefault(parameter.untyped_storage().data_ptr(), []).append(_extent(parameter))
    views = set()
    for name, buffer in ((name, local(buffer)) for name, buffer in buffers.items()):
        if _has_memory(buffer) and buffer.untyped_storage().data_ptr() in extents:
            start, end = _extent(buffer)
            if any(start < last and first < end for first, last in extents[buffer.untyped_storage().data_ptr()]):
                views.add(name)
    return views


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_meta and tensor.numel() > 0


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses from the first byte of a tensor up to the one behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _overlaps_itself(tensor: Tensor) -> bool:
    return not tensor.is_contiguous() and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
