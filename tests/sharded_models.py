"""Every way of PyTorch's to share a small model among ranks, each with the facts that show it is what its name says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from sharded import local, tensors_of, whole
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

FEATURES, CLASSES, BATCH = 6, 4, 5


@dataclass(frozen=True)
class Fact:
    """What one rank holds of one parameter."""

    placements: str | None  # None: a plain tensor
    mesh: tuple[int, ...]
    part: tuple[int, ...]
    whole: tuple[int, ...]
    dtype: torch.dtype
    is_trainable: bool

    @property
    def share(self) -> float:
        """This rank's part of the elements."""
        return torch.Size(self.part).numel() / max(torch.Size(self.whole).numel(), 1)


#: By name, of every rank.
Facts = Sequence[dict[str, Fact]]


def facts_of(model: nn.Module) -> dict[str, Fact]:
    """What this rank holds of each parameter."""
    parameters = {name: tensor for name, tensor in tensors_of(model).items() if isinstance(tensor, nn.Parameter)}
    return {
        name: Fact(
            placements=str(tensor.placements) if isinstance(tensor, DTensor) else None,
            mesh=tuple(tensor.device_mesh.shape) if isinstance(tensor, DTensor) else (),
            part=tuple(local(tensor).shape),
            whole=tuple(tensor.shape),
            dtype=tensor.dtype,
            is_trainable=tensor.requires_grad,
        )
        for name, tensor in parameters.items()
    }


class Mlp(nn.Module):
    """Three linear layers, of which the last one is small; ``norm``: a BatchNorm after the first."""

    def __init__(self, width: int, *, inner: int = 0, norm: bool = False) -> None:
        super().__init__()
        inner = inner or width
        self.up = nn.Linear(FEATURES, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.mid = nn.Sequential(nn.Linear(width, inner), nn.Tanh())
        self.down = nn.Linear(inner, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.down(self.mid(self.norm(self.up(inputs)).tanh()))


class Tied(nn.Module):
    """A language model of seven words whose embedding is also its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, FEATURES)
        self.mid = nn.Linear(FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, inputs: Tensor) -> Tensor:
        words = (inputs.abs() * 7).long() % 7
        return self.head(self.mid(self.embedding(words[:, 0])).tanh())


@dataclass(frozen=True)
class Case:
    """One way to share one model.

    Attributes:
        whole: builds the model that is shared, in one piece.
        share: shares it, given the number of ranks; returns the model to train.
        claim: whether the ranks hold what the name of the case says.
        ranks: the numbers of ranks for which it can be had.
        computes_in: dtype in which the shared model computes; None: that of its weights.
        batches: how many batches the ranks, given their number, can train on at a time: parts of one layer see the
            same one. All see the same here if it is not a batch for each.
        backward: False where torch's own backward pass does not run on a CPU: gradients are written by hand.
    """

    whole: Callable[[], nn.Module]
    share: Callable[[nn.Module, int], nn.Module]
    claim: Callable[[Facts], bool]
    ranks: tuple[int, ...] = (2, 4)
    computes_in: torch.dtype | None = None
    batches: Callable[[int], int] = lambda ranks: ranks
    backward: bool = True


@dataclass
class Run:
    """A shared model in training, alike on every rank that builds it.

    Args:
        case: how it is shared.
        ranks: among how many.
        is_one_batch: whether all ranks train on the same batch, so that their number makes no difference.
    """

    case: Case
    ranks: int
    is_one_batch: bool = False
    model: nn.Module = field(init=False)
    twin: nn.Module = field(init=False)  # whole, of the same weights at first

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.twin = self.case.whole()
        torch.manual_seed(0)
        self.model = self.case.share(self.case.whole(), self.ranks)
        # One by one: torch's foreach kernels refuse lists in which only some tensors are sharded.
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trainable, lr=0.2, momentum=0.9, foreach=False)

    def step(self, index: int) -> None:
        """One training step on batch ``index``, of which each rank that counts as one of its own sees other samples."""
        if self.case.backward:
            self.optimizer.zero_grad()
            inputs, labels = batch(index, 0 if self.is_one_batch or self.divisor < self.ranks else dist.get_rank())
            loss = nn.functional.cross_entropy(self.model(inputs.to(self.dtype)).float(), labels)
            (loss / self.divisor).backward()
            self._add_up_gradients()
        else:
            self._write_gradients(index)
        self.optimizer.step()

    def evaluate(self, model: nn.Module | None = None, *, grad: bool = False) -> Tensor:
        """What ``model`` (default: the shared one) answers; without gradients FSDP2 leaves its root gathered."""
        model = self.model if model is None else model
        was_training = model.training
        model.eval()
        try:
            with torch.set_grad_enabled(grad):
                return model(batch(99)[0].to(self.dtype)).float()
        finally:
            model.train(was_training)

    def reshard(self) -> None:
        """Frees what FSDP2 has left gathered, so that the parameters are this rank's parts."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def load_own_state(self) -> None:
        """Loads a copy of the shared model's own state dict, on which FSDP2 lays out its uneven parts anew."""
        self.reshard()
        self.model.load_state_dict({name: tensor.clone() for name, tensor in self.model.state_dict().items()})

    def whole_with(self, tensors: dict[str, Tensor]) -> nn.Module:
        """A model in one piece that holds these tensors and computes as the shared one does."""
        torch.manual_seed(0)
        model = self.case.whole()
        own = tensors_of(model)
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
        if self.case.computes_in is None:
            return model
        return _InDtype(model.to(self.case.computes_in))

    def fill_twin(self) -> None:
        """Copies the gathered weights into the twin."""
        own = tensors_of(self.twin)
        with torch.no_grad():
            for name, tensor in tensors_of(self.model).items():
                own[name].copy_(whole(tensor))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.twin.parameters()).dtype

    @property
    def divisor(self) -> int:
        """gloo adds up where FSDP2 asks for the mean, so the loss is divided by the number of batches."""
        return self.case.batches(self.ranks)

    def _add_up_gradients(self) -> None:
        """As DDP would for the parameters that each rank of FSDP2 holds whole."""
        for parameter in self.model.parameters():
            if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.ranks / self.divisor

    def _write_gradients(self, index: int) -> None:
        """Random gradients, after a forward pass, which gathers and frees parameters as in training."""
        self.evaluate()
        self.reshard()
        generator = torch.Generator().manual_seed(1000 * index)
        for _, parameter in sorted(tensors_of(self.model).items()):
            if parameter.requires_grad:
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = _as_laid_out(gradient, parameter)


def batch(index: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * index + rank)
    inputs = torch.randn(BATCH, FEATURES, generator=generator)
    return inputs, torch.randint(CLASSES, (BATCH,), generator=generator)


class _InDtype(nn.Module):
    """Casts what goes in, as MixedPrecisionPolicy does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Tensor:
        return self.module(inputs.to(next(self.module.parameters()).dtype))


def _as_laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def _fsdp2(model: nn.Module, ranks: int, **options: Any) -> nn.Module:
    """Each child a group of its own, and the root another."""
    options.setdefault('mesh', init_device_mesh('cpu', (ranks,)))
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, **options)
    return fully_shard(model, **options)


def _fsdp2_in_one(model: nn.Module, ranks: int, **options: Any) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh('cpu', (ranks,)), **options)


def _frozen(model: nn.Module, ranks: int) -> nn.Module:
    model.mid.requires_grad_(False)
    model.down.bias.requires_grad_(False)
    return _fsdp2(model, ranks)


def _ignored(model: nn.Module, ranks: int) -> nn.Module:
    return _fsdp2_in_one(model, ranks, ignored_params={model.up.weight, model.down.bias})


def _checkpointed(model: nn.Module, ranks: int) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, nn.Linear))
    return _fsdp2(model, ranks)


def _compiled(model: nn.Module, ranks: int) -> nn.Module:
    return torch.compile(_fsdp2(model, ranks), backend='aot_eager')


def _compiled_inside(model: nn.Module, ranks: int) -> nn.Module:
    model.up, model.mid = (torch.compile(child, backend='aot_eager') for child in (model.up, model.mid))
    return _fsdp2(model, ranks)


def _columns(model: nn.Module, ranks: int) -> nn.Module:
    mesh = init_device_mesh('cpu', (ranks,))
    return parallelize_module(model, mesh, {'up': ColwiseParallel(output_layouts=Replicate())})


def _rows(model: nn.Module, ranks: int) -> nn.Module:
    mesh = init_device_mesh('cpu', (ranks,))
    return parallelize_module(model, mesh, {'mid.0': RowwiseParallel(input_layouts=Replicate())})


def _tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(model, mesh, {'mid.0': ColwiseParallel(), 'down': RowwiseParallel()})


def _two_dimensional(model: nn.Module, ranks: int) -> nn.Module:
    mesh = init_device_mesh('cpu', (ranks // 2, 2), mesh_dim_names=('data', 'tensor'))
    return _fsdp2(_tensor_parallel(model, mesh['tensor']), ranks, mesh=mesh['data'])


def _hybrid(model: nn.Module, ranks: int) -> nn.Module:
    return _fsdp2(model, ranks, mesh=init_device_mesh('cpu', (2, ranks // 2), mesh_dim_names=('copy', 'shard')))


def _second_dimension(parameter: nn.Parameter) -> Shard | None:
    return Shard(1) if parameter.ndim > 1 and parameter.shape[1] % 4 == 0 else None


def _all(facts: Facts, holds: Callable[[Fact], bool]) -> bool:
    return all(holds(fact) for rank in facts for fact in rank.values())


def _are_sharded(facts: Facts) -> bool:
    return _all(facts, lambda fact: fact.placements == '(Shard(dim=0),)')


def _are_even(facts: Facts) -> bool:
    return _are_sharded(facts) and _all(facts, lambda fact: fact.share == 1 / len(facts))


def _are_uneven(facts: Facts) -> bool:
    return _are_sharded(facts) and len({rank['up.weight'].part for rank in facts}) == 2


def _are_empty(facts: Facts) -> bool:
    return _are_sharded(facts) and any(0 in rank['mid.0.weight'].part for rank in facts)


def _is_a_half_frozen(facts: Facts) -> bool:
    return _are_sharded(facts) and {fact.is_trainable for fact in facts[0].values()} == {True, False}


def _is_partly_whole(facts: Facts) -> bool:
    plain = {name for name, fact in facts[0].items() if fact.placements is None}
    return plain == {'up.weight', 'down.bias'} and facts[0]['up.bias'].placements == '(Shard(dim=0),)'


def _is_bfloat16(facts: Facts) -> bool:
    return _are_sharded(facts) and _all(facts, lambda fact: fact.dtype is torch.bfloat16)


def _is_split(name: str, dim: int, *others: str) -> Callable[[Facts], bool]:
    def claim(facts: Facts) -> bool:
        sharded = {name for name, fact in facts[0].items() if fact.placements not in (None, '(Replicate(),)')}
        return facts[0][name].placements == f'(Shard(dim={dim}),)' and sharded == {name, *others}

    return claim


def _is_two_dimensional(facts: Facts) -> bool:
    columns, rows = facts[0]['mid.0.weight'], facts[0]['down.weight']
    return (
        columns.mesh == rows.mesh == (2, 2)
        and columns.share == rows.share == 1 / 4
        and columns.placements == '(_StridedShard(dim=0, sf=2), Shard(dim=0))'
        and rows.placements == '(Shard(dim=0), Shard(dim=1))'
    )


def _is_hybrid(facts: Facts) -> bool:
    return _all(facts, lambda fact: fact.mesh == (2, 2) and fact.placements == '(Replicate(), Shard(dim=0))') and facts[
        0
    ]['up.weight'].part != (0, FEATURES)


def _is_second_dimension(facts: Facts) -> bool:
    return facts[0]['mid.0.weight'].placements == '(Shard(dim=1),)' and facts[0]['mid.0.weight'].share == 1 / len(facts)


def _even() -> nn.Module:
    return Mlp(8)


def _uneven() -> nn.Module:
    return Mlp(7)


CASES = {
    'even': Case(_even, _fsdp2, _are_even),
    'uneven': Case(_uneven, _fsdp2, _are_uneven),
    'uneven, one group': Case(_uneven, _fsdp2_in_one, _are_uneven),
    'empty': Case(lambda: Mlp(5, inner=1), _fsdp2, _are_empty),
    'second dimension': Case(
        _even, lambda model, ranks: _fsdp2(model, ranks, shard_placement_fn=_second_dimension), _is_second_dimension
    ),
    'tied': Case(Tied, _fsdp2_in_one, lambda facts: _are_sharded(facts) and 'head.weight' not in facts[0]),
    'frozen': Case(_uneven, _frozen, _is_a_half_frozen),
    'ignored': Case(_uneven, _ignored, _is_partly_whole),
    'bfloat16': Case(lambda: _uneven().bfloat16(), _fsdp2, _is_bfloat16),
    'mixed precision': Case(
        _uneven,
        lambda model, ranks: _fsdp2(
            model, ranks, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        ),
        lambda facts: _are_uneven(facts) and _all(facts, lambda fact: fact.dtype is torch.float32),
        computes_in=torch.bfloat16,
    ),
    'CPU offload': Case(
        _uneven,
        lambda model, ranks: _fsdp2(model, ranks, offload_policy=CPUOffloadPolicy(pin_memory=False)),
        _are_uneven,
    ),
    'kept gathered': Case(_uneven, lambda model, ranks: _fsdp2(model, ranks, reshard_after_forward=False), _are_uneven),
    'always freed': Case(_uneven, lambda model, ranks: _fsdp2(model, ranks, reshard_after_forward=True), _are_uneven),
    'freed to pairs': Case(
        _uneven, lambda model, ranks: _fsdp2(model, ranks, reshard_after_forward=2), _are_uneven, ranks=(4,)
    ),
    'activation checkpointing': Case(_uneven, _checkpointed, _are_uneven),
    'compiled': Case(_uneven, _compiled, _are_uneven),
    'compiled inside': Case(_uneven, _compiled_inside, _are_uneven),
    'BatchNorm': Case(lambda: Mlp(7, norm=True), _fsdp2, _are_uneven),
    'hybrid': Case(_uneven, _hybrid, _is_hybrid, ranks=(4,), backward=False),
    'columns': Case(_uneven, _columns, _is_split('up.weight', 0, 'up.bias'), batches=lambda ranks: 1),
    'rows': Case(_uneven, _rows, _is_split('mid.0.weight', 1), batches=lambda ranks: 1),
    'columns and rows': Case(
        _even,
        lambda model, ranks: _tensor_parallel(model, init_device_mesh('cpu', (ranks,))),
        _is_split('mid.0.weight', 0, 'mid.0.bias', 'down.weight'),
        batches=lambda ranks: 1,
    ),
    'columns and rows in FSDP2': Case(
        _even, _two_dimensional, _is_two_dimensional, ranks=(4,), batches=lambda ranks: ranks // 2
    ),
}
