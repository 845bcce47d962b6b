"""What is known here alone: how processes share the tensors of a model.

A sharded tensor is a DTensor, of which each process holds a part: the local tensor. Nothing here communicates unless
its docstring says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parameter import is_lazy


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP or tensor parallelism shares parameters among processes, which then run each forward together."""
    wrappers = (FullyShardedDataParallel, FSDPModule)
    return any(isinstance(module, wrappers) for module in model.modules()) or any(map(is_shard, model.parameters()))


def on_compute_device(tensor: Tensor) -> torch.device:
    """Where a module computes with a parameter: its device, or that of its mesh if shards are kept on the host."""
    if not isinstance(tensor, DTensor) or tensor.device.type == tensor.device_mesh.device_type:
        return tensor.device
    kind = tensor.device_mesh.device_type
    return torch.device(kind, torch.get_device_module(kind).current_device())


def is_shard(tensor: object) -> bool:
    """Whether processes share a tensor, so that this one may hold a part of it only."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, aliased and unseen by autograd; of a whole tensor, that itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def wrapped(part: Tensor, like: Tensor) -> Tensor:
    """A tensor whose part in this process is ``part``, shared as ``like`` is; ``part`` itself if ``like`` is whole.

    Args:
        part: of the shape of ``local(like)``, on any device, of any dtype. Aliased.
        like: only its layout is read.
    """
    if not isinstance(like, DTensor):
        return part
    kind = Piece if isinstance(like, Piece) else DTensor
    return _made(part, like.device_mesh, like.placements, like.shape, like.stride(), kind=kind)


def _made(
    part: Tensor,
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    shape: Sequence[int],
    stride: tuple[int, ...],
    *,
    kind: type[DTensor] = DTensor,
) -> DTensor:
    """A DTensor of this shape and stride from this process's part, which may lie on another device than the mesh."""
    spec = DTensorSpec(mesh, tuple(placements), TensorMeta(torch.Size(shape), stride, part.dtype))
    return kind(part, spec, requires_grad=False)  # pyright: ignore[reportCallIssue]: as __new__ takes it


class Piece(DTensor):
    """This rank's piece of a tensor that is whole in the model; see :func:`split_over_ranks`.

    Pickle, and so ``torch.save``, refuses it: under DDP it is common that rank 0 alone saves, and a file of its pieces
    would look like one of the whole. ``torch.distributed.checkpoint`` saves it as any DTensor.
    """

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        del protocol
        raise RuntimeError(
            "this is one rank's piece of an average (shard_over_ranks=True), which would be no average when it is "
            'loaded. Call state = composer_ema.gather_state_dict(state) on every rank and save what rank 0 gets, or '
            'save the state as it is with torch.distributed.checkpoint.save on every rank.'
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        del memo
        return wrapped(local(self).clone(), self)


def split_over_ranks(whole: Tensor) -> Tensor:
    """A whole tensor, which every rank must have, as a DTensor of which this rank has a view of about 1/n.

    The tensor is cut along its first dimension that has a row for every rank, or else along its longest, so that no
    rank gets much more than others. A DTensor, a scalar, and a tensor that is sparse or on the meta device come back
    as they are, and so does any tensor if there is one rank only.
    """
    is_dense = whole.layout is torch.strided and not whole.is_nested
    if isinstance(whole, DTensor) or not is_dense or whole.dim() == 0 or whole.is_meta or num_ranks() == 1:
        return whole
    shape, mesh = whole.shape, _mesh_of_ranks(whole.device.type)
    longest = max(range(len(shape)), key=shape.__getitem__)
    placement = Shard(next((dim for dim, rows in enumerate(shape) if rows >= mesh.size()), longest))
    return _made(_part(whole.detach(), mesh, [placement]), mesh, [placement], shape, whole.stride(), kind=Piece)


def num_ranks() -> int:
    """The number of ranks of the default process group; 1 without one."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process in the default process group; 0 without one."""
    return torch.distributed.get_rank() if num_ranks() > 1 else 0


#: By device type, the mesh of all ranks and the group that it was made for.
_meshes: dict[str, tuple[Any, DeviceMesh]] = {}


def _mesh_of_ranks(device_type: str) -> DeviceMesh:
    """The mesh of all ranks, of a device type that their process group can send from: ``device_type`` if it can."""
    group = torch.distributed.group.WORLD
    assert group is not None
    known, mesh = _meshes.get(device_type, (None, None))
    if known is not group or mesh is None:
        served = [device.type for device in group._device_types]
        mesh = DeviceMesh.from_group(group, device_type if device_type in served else served[0])
        _meshes[device_type] = group, mesh
    return mesh


def lie_alike(one: Tensor, other: Tensor) -> bool:
    """Whether each process holds the same part of two tensors of one shape."""
    if isinstance(one, DTensor) and isinstance(other, DTensor):
        return one.device_mesh == other.device_mesh and one.placements == other.placements
    return not (isinstance(one, DTensor) or isinstance(other, DTensor))


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """The view of a whole tensor that this process holds where it is shared as ``like`` is."""
    return _part(whole, like.device_mesh, like.placements) if isinstance(like, DTensor) else whole


def _part(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    sizes, offsets = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    part = whole
    for dimension, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        if size != part.shape[dimension]:
            part = part.narrow(dimension, min(offset, part.shape[dimension]), size)
    return part


def share_of(source: Tensor, shadow: Tensor) -> Tensor:
    """The part of ``source`` in this process that stands beside ``local(shadow)``, aliased."""
    return local(source) if isinstance(source, DTensor) else part_of(source, shadow)


def laid_out_as(value: Tensor, like: Tensor) -> Tensor:
    """``value`` shared among processes as ``like`` is, or whole where that is whole; aliased where it can be.

    A whole tensor, which every process must have, is cut without communication. A tensor that is shared in another way
    is gathered first, in a collective call.
    """
    if lie_alike(value, like):
        return value
    if isinstance(value, DTensor):
        return cut(value, like) if isinstance(like, DTensor) else whole(value)
    return wrapped(part_of(value, like), like)


def cut(value: Tensor, like: Tensor) -> Tensor:
    """As :func:`laid_out_as`, in memory of its own: a view would keep the whole there."""
    return wrapped(part_of(whole(value), like).clone(), like)


def is_of_another_process(value: Tensor) -> bool:
    """Whether this is a part that another process saved by ``torch.save``, which no process can gather from."""
    if not isinstance(value, DTensor) or local(value).shape == value.shape:
        return False
    mesh = value.device_mesh  # unpickled, it has the coordinate of the process that saved it
    coordinate = mesh.get_coordinate()
    saved_by = rank() if coordinate is None else int(mesh.mesh[tuple(coordinate)])
    return saved_by != rank() or mesh.size() > num_ranks()


def must_be_gathered(value: Tensor, like: Tensor) -> bool:
    """Whether :func:`laid_out_as` communicates."""
    return isinstance(value, DTensor) and not lie_alike(value, like)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a shared tensor, gathered in every process in a collective call; of a whole one, that itself.

    Raises:
        RuntimeError: it was split over ranks of which some are gone.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    if isinstance(tensor, Piece) and tensor.device_mesh.size() != num_ranks():  # torch would gather what there is
        raise RuntimeError(
            f"this is one rank's piece of an average that was split over {tensor.device_mesh.size()} ranks, and the "
            f'process group has {num_ranks()} now. Start as many again, or load a state that gather_state_dict made '
            'whole into a new average.'
        )
    if not tensor.numel():  # torch trips over uneven parts of nothing, on some ranks only
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    if tensor.is_complex():  # no backend sends complex numbers
        pairs = torch.view_as_real(local(tensor).detach().resolve_conj())
        strides = (*(2 * stride for stride in tensor.stride()), 1)
        real = _made(pairs, tensor.device_mesh, tensor.placements, (*tensor.shape, 2), strides)
        return torch.view_as_complex(whole(real).contiguous())
    mesh_device = tensor.device_mesh.device_type
    if tensor.device.type != mesh_device:  # as parameters that are offloaded to the host
        on_mesh = wrapped(local(tensor).to(mesh_device), tensor)
        return cast(DTensor, on_mesh).full_tensor().to(tensor.device)
    return cast(DTensor, tensor.detach()).full_tensor()


def num_replicas(tensor: Tensor) -> int:
    """How many processes hold each element of a shared tensor; 1 for a whole one."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    count = 1
    for dimension, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            count *= mesh.size(dimension)
    return count


def sum_over(mesh: DeviceMesh, part: Tensor) -> Tensor:
    """The sum of ``part`` over all processes of a mesh. A collective call."""
    total = part.to(mesh.device_type, copy=True)
    for dimension in range(mesh.ndim):
        torch.distributed.all_reduce(total, group=mesh.get_group(dimension))
    return total.to(part.device)


def difference(tensor: Tensor, other: Tensor) -> Tensor:
    """Where ``other``, cast to the dtype of ``tensor``, differs from that: booleans, laid out as ``tensor``.

    A collective call where the two are shared in different ways.
    """
    part = local(tensor)
    return wrapped(part != local(laid_out_as(other.detach(), tensor)).to(part), tensor)


def any_nonzero(tensors: Iterable[Tensor]) -> bool:
    """Whether any element is not zero, in any process that shares these tensors. The host waits.

    A collective call where tensors are sharded: all processes get the same answer.
    """
    shared: dict[DeviceMesh, Tensor] = {}
    found = False
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            count = torch.count_nonzero(local(tensor))
            earlier = shared.get(tensor.device_mesh)
            shared[tensor.device_mesh] = count if earlier is None else earlier + count.to(earlier.device)
        elif not found:
            found = tensor.is_sparse or bool(tensor.any())
    return any([int(sum_over(mesh, count)) > 0 for mesh, count in shared.items()]) or found


def reshard(module: nn.Module) -> bool:
    """Frees the whole parameters that FSDP2 keeps after a forward, so that ``module`` has its shards again.

    FSDP2 does so itself after a backward. After a forward without one, or one that raised, the root stays whole, and
    an integer ``reshard_after_forward`` leaves shards over a smaller mesh.

    Returns:
        Whether anything was whole.
    """
    changed = False
    for group in _groups_of_fsdp2(module):
        if not group.is_sharded:
            group._to_sharded()  # FSDPModule.reshard() does nothing, or asserts, after a forward that raised
            changed = True
    return changed


def _groups_of_fsdp2(module: nn.Module) -> Iterator[Any]:
    for child in module.modules():
        if isinstance(child, FSDPModule):
            state = child._get_fsdp_state()
            groups = getattr(state, '_fsdp_param_groups', None)  # newer torch keeps several
            if groups is None:
                groups = [state._fsdp_param_group]
            yield from (group for group in groups if group is not None)


def refuse_unsupported(tensors: Mapping[str, Tensor]) -> None:
    """Raises a NotImplementedError that names the first tensor whose sharding cannot be averaged, or returns.

    Every way into an average passes here. DTensors pass, unless they hold sums that are still to be reduced.

    Args:
        tensors: what is to be averaged, lent or overwritten, by name.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            if any(isinstance(placement, Partial) for placement in tensor.placements):
                raise NotImplementedError(
                    f'{name} is a DTensor of placements {tensor.placements}: its value is a sum over processes that '
                    'has not been taken. Redistribute it to Replicate() or Shard(...) first.'
                )
        elif getattr(tensor, '_fsdp_flattened', False):  # the flat parameters, and views of them (use_orig_params)
            raise NotImplementedError(
                f'{name} is a parameter of FSDP1 (FullyShardedDataParallel), which keeps it in one flat piece with '
                'others, so that no process has a part of its own that an average could follow. Shard the model with '
                'FSDP2: torch.distributed.fsdp.fully_shard(module) on each block and then on the model, or in Composer '
                "parallelism_config={'fsdp': FSDP2Config(...)}, or fsdp2: {...} in a recipe."
            )
        elif hasattr(tensor, 'ds_id'):
            _refuse_placeholder(name, tensor, 'is a parameter of DeepSpeed ZeRO')


def refuse_placeholders(tensors: Mapping[str, Tensor]) -> None:
    """Raises as :func:`refuse_unsupported`, and where all parameters are empty, as DeepSpeed leaves them.

    For models whose weights have to be here: in the middle of a loan memory may be away for a while.
    """
    refuse_unsupported(tensors)
    parameters = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
    if parameters and not any(is_lazy(tensor) or tensor.shape != (0,) for tensor in parameters.values()):
        name, tensor = next(iter(parameters.items()))
        _refuse_placeholder(name, tensor, 'and all other parameters are empty, as under DeepSpeed ZeRO stage 3')


def _refuse_placeholder(name: str, tensor: Tensor, what: str) -> None:
    raise NotImplementedError(
        f'{name} {what}: this process sees a placeholder of shape {tuple(tensor.shape)}, not the weights, which an '
        'average would never reach. Shard the model with FSDP2: torch.distributed.fsdp.fully_shard(module), or in '
        "Composer parallelism_config={'fsdp': FSDP2Config(...)}, or fsdp2: {...} in a recipe."
    )


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Overwrites ``tensors`` in every process with those of rank 0. A collective call; nothing with one process."""
    if num_ranks() > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)
