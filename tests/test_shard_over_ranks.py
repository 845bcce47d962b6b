"""Under DDP each rank may keep a piece of the average: the pieces are those of the whole average, to the bit.

Most tests play one rank of several: in a group of torch's fake backend collectives return at once, and what they gather
is arbitrary. What is really gathered is tested in ``test_shard_over_ranks_processes.py``.
"""

import copy
import math
import pickle
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from test_loan import UNRAISABLE, interrupt_at_random_moments
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from composer_ema import EMAOptimizer, ShadowModel, ShadowModels
from composer_ema.model.sharding import local, share_of, split_over_ranks
from composer_ema.settings import Settings
from composer_ema.shadow import loan
from composer_ema.shadow.state import gather_state_dict


@contextmanager
def as_rank(rank: int, count: int) -> Iterator[None]:
    """Makes this process one rank of ``count``; collectives return at once."""
    dist.init_process_group('fake', store=FakeStore(), rank=rank, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def _rank_1_of_3() -> Iterator[None]:
    with as_rank(1, 3):
        yield


class Net(nn.Module):
    """Parameters with more rows than ranks, as many, fewer, and none at all, beside statistics and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.head = nn.Linear(7, 2)
        self.scale = nn.Parameter(torch.rand(()))
        self.large = nn.Parameter(torch.rand(50, 60))
        self.frozen = nn.Parameter(torch.rand(3), requires_grad=False)


def step(net: nn.Module) -> None:
    """Moves the weights and the statistics, the same way each time it is called in a test."""
    with torch.no_grad():
        for index, tensor in enumerate((*net.parameters(), *net.buffers())):
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(index)))


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


def pieces(split: ShadowModel, whole: ShadowModel) -> dict[str, tuple[Tensor, Tensor]]:
    """What this rank keeps of each tensor, beside the same piece of the whole average."""
    others = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    kept = {**dict(split.named_parameters()), **dict(split.named_buffers())}
    return {name: (local(kept[name]), share_of(others[name], kept[name])) for name in others}


def memory(shadow: ShadowModel) -> int:
    """Bytes that the average takes in this process."""
    storages = {local(t).untyped_storage().data_ptr(): local(t).untyped_storage() for t in shadow.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


SETTINGS = {
    'plain': {},
    'compensated': {'compensated': True},
    'skipping': {'skip_nonfinite': True},
    'in bfloat16': {'dtype': 'bfloat16'},
    'in float64': {'dtype': 'float64'},
    'by a function': {'avg_fn': lambda averaged, current, count: averaged + (current - averaged) / (count + 1)},
    'by the reference': {'backend': 'reference'},
}


class TestPieces:
    @pytest.mark.filterwarnings('ignore:the average is kept in bfloat16')
    @pytest.mark.parametrize('settings', SETTINGS.values(), ids=SETTINGS)
    @pytest.mark.parametrize('rank', range(3))
    def test_a_rank_keeps_the_bits_of_its_piece_of_the_whole_average(self, rank, settings):
        with as_rank(rank, 3):
            net = Net()
            split = ShadowModel(net, shard_over_ranks=True, **settings)
            whole = ShadowModel(net, **settings)
            share = {} if 'avg_fn' in settings else {'smoothing': 0.9}
            for _ in range(3):
                step(net)
                split.update(net, **share)
                whole.update(net, **share)
            for name, (piece, expected) in pieces(split, whole).items():
                assert piece.shape == expected.shape, name
                assert torch.equal(piece, expected), name
            assert memory(split) <= 0.4 * memory(whole)

    def test_the_pieces_of_all_ranks_are_the_parameter(self):
        for shape in [(7, 5), (3,), (2, 7), (1, 1, 9), (2, 2), (1,), (0, 4), (3, 0)]:
            whole = torch.arange(math.prod(shape)).view(shape).float()
            found, dims = [], set()
            for rank in range(3):
                with as_rank(rank, 3):
                    split = split_over_ranks(whole)
                    assert isinstance(split, DTensor)
                    assert split.shape == whole.shape
                    dims |= {placement.dim for placement in split.placements if isinstance(placement, Shard)}
                    found.append(local(split))
            [dim] = dims
            assert torch.equal(torch.cat(found, dim), whole)

    def test_scalars_and_buffers_stay_whole(self):
        with as_rank(1, 3):
            shadow = ShadowModel(Net(), shard_over_ranks=True)
            kept = {**dict(shadow.named_parameters()), **dict(shadow.named_buffers())}
        whole = {name for name, tensor in kept.items() if type(tensor) is Tensor}
        assert whole == {'scale', 'norm.running_mean', 'norm.running_var', 'norm.num_batches_tracked'}

    @pytest.mark.parametrize('count', [2, 4, 8, 64])
    @pytest.mark.parametrize('name', ['resnet50', 'vit_b_16'])
    def test_no_rank_keeps_much_more_of_a_real_model_than_others(self, name, count):
        models = pytest.importorskip('torchvision').models
        with torch.device('meta'):
            shapes = [parameter.shape for parameter in getattr(models, name)().parameters()]
        with as_rank(0, count):  # of torch's chunks the first are the largest
            kept = sum(local(split_over_ranks(torch.empty(()).expand(shape))).numel() for shape in shapes)
        assert kept * count <= 1.01 * sum(map(math.prod, shapes))

    @pytest.mark.usefixtures('_rank_1_of_3')
    def test_several_averages_are_split_alike(self):
        net = Net()
        split, whole = (ShadowModels(net, ['a', 'b'], shard_over_ranks=each) for each in (True, False))
        step(net)
        for shadows in (split, whole):
            shadows.update(net, smoothing={'a': 0.5, 'b': 0.9})
        for label in ('a', 'b'):
            assert all(torch.equal(*pair) for pair in pieces(split[label], whole[label]).values())

    @pytest.mark.usefixtures('_rank_1_of_3')
    def test_an_optimizer_updates_its_piece(self):
        def trained(*, is_split: bool) -> ShadowModel:
            net = Net()
            optimizer = EMAOptimizer(torch.optim.SGD(net.parameters(), 0.1), decay=0.9, shard_over_ranks=is_split)
            for _ in range(3):
                step(net)
                optimizer.step()
            return optimizer.shadow

        assert all(torch.equal(*pair) for pair in pieces(trained(is_split=True), trained(is_split=False)).values())

    @pytest.mark.usefixtures('_rank_1_of_3')
    def test_a_parameter_that_moves_in_memory_is_read_where_it_is(self):
        net = Net()
        split, whole = ShadowModel(net, shard_over_ranks=True), ShadowModel(net)
        for shadow in (split, whole):
            shadow.update(net, 0.5)
        net.linear.bias.data = net.linear.bias.data + 1  # so small a vector is read from the parameter itself
        for shadow in (split, whole):
            shadow.update(net, 0.5)
        assert all(torch.equal(*pair) for pair in pieces(split, whole).values())

    @pytest.mark.usefixtures('_rank_1_of_3')
    def test_a_frozen_parameter_joins_in_pieces(self):
        net = Net()
        shadow = ShadowModel(net, shard_over_ranks=True)
        net.frozen.requires_grad_(True)
        shadow.update(net, 0.5)
        assert torch.equal(local(dict(shadow.named_parameters())['frozen']), net.frozen[1:2])

    def test_an_average_from_before_the_group_is_split_at_the_next_update(self):
        net = Net()
        with pytest.warns(UserWarning, match='there is one process'):
            shadow = ShadowModel(net, shard_over_ranks=True)
        with as_rank(1, 3):
            shadow.update(net, 0.5)
            large = dict(shadow.named_parameters())['large']
            assert torch.equal(local(large), net.large[17:34])
            assert memory(shadow) <= 0.4 * memory(ShadowModel(net))


@pytest.mark.parametrize('where', ['shadow', 'shadows', 'optimizer'])
def test_a_model_of_other_ranks_is_refused(where):
    with as_rank(0, 4):
        net = DistributedDataParallel(Net(), process_group=dist.new_group([0, 1]))
        build = {
            'shadow': lambda: ShadowModel(net, shard_over_ranks=True),
            'shadows': lambda: ShadowModels(net, ['a'], shard_over_ranks=True),
            'optimizer': lambda: EMAOptimizer(torch.optim.SGD(net.parameters()), model=net, shard_over_ranks=True),
        }
        with pytest.raises(ValueError, match=r'all 4 ranks .* joins 2 of them, .* Leave shard_over_ranks out'):
            build[where]()


class TestStates:
    @pytest.mark.usefixtures('_rank_1_of_3')
    def test_a_whole_state_loads_into_pieces(self):
        net = Net()
        whole, split = ShadowModel(net), ShadowModel(net, shard_over_ranks=True, compensated=True)
        step(net)
        whole.update(net, 0.5)
        split.load_state_dict(whole.state_dict())
        assert all(torch.equal(*pair) for pair in pieces(split, whole).values())
        assert split.num_updates == 1

    @pytest.mark.usefixtures('_rank_1_of_3')
    @pytest.mark.parametrize('where', ['shadow', 'shadows', 'optimizer'])
    @pytest.mark.parametrize('settings', [{}, {'compensated': True}], ids=['plain', 'compensated'])
    def test_pieces_are_not_pickled(self, where, settings):
        net = Net()
        if where == 'shadow':
            state = ShadowModel(net, shard_over_ranks=True, **settings).state_dict()
        elif where == 'shadows':
            state = ShadowModels(net, ['a'], shard_over_ranks=True, **settings).state_dict()
        else:
            optimizer = torch.optim.SGD(net.parameters())
            state = EMAOptimizer(optimizer, model=net, shard_over_ranks=True, **settings).state_dict()
        with pytest.raises(
            RuntimeError, match=r'one rank.s piece .* composer_ema\.gather_state_dict\(state\) on every'
        ):
            pickle.dumps(state)

    @pytest.mark.usefixtures('_rank_1_of_3')
    def test_pieces_are_copied(self):
        net = Net()
        shadow = ShadowModel(net, shard_over_ranks=True)
        state = shadow.state_dict()
        copied = copy.deepcopy(state)
        step(net)
        shadow.update(net, 0.0)
        shadow.load_state_dict(copied)
        assert all(torch.equal(*pair) for pair in pieces(shadow, ShadowModel(Net())).values())

    @pytest.mark.usefixtures('_rank_1_of_3')
    def test_a_rank_other_than_0_gathers_for_nothing(self):
        assert gather_state_dict(ShadowModel(Net(), shard_over_ranks=True).state_dict()) == {}

    @pytest.mark.parametrize('count', [1, 2])
    def test_pieces_of_ranks_that_are_gone_are_not_gathered(self, count):
        with as_rank(0, 3):
            shadow = ShadowModel(Net(), shard_over_ranks=True)
        with as_rank(0, count), pytest.raises(RuntimeError, match=rf'over 3 ranks, and the process group has {count}'):
            gather_state_dict(shadow.state_dict())

    def test_a_gathered_state_is_whole_and_plain(self):
        with as_rank(0, 3):
            state = gather_state_dict(ShadowModel(Net(), shard_over_ranks=True, compensated=True).state_dict())
        loaded = pickle.loads(pickle.dumps(state))
        ShadowModel(Net(), compensated=True).load_state_dict(loaded)

    def test_without_pieces_a_state_stays_as_it_is(self):
        state = ShadowModel(Net()).state_dict()
        gathered = gather_state_dict({'a': [state, (1, 'b', None)]})
        assert gathered['a'][1] == (1, 'b', None)
        named = namedtuple('named', 'first second')
        assert gather_state_dict({'a': named(1, [2])}) == {'a': named(1, [2])}
        assert all(gathered['a'][0]['parameters'][name] is tensor for name, tensor in state['parameters'].items())


class TestLoans:
    @pytest.mark.usefixtures('_rank_1_of_3')
    def test_the_training_weights_return(self):
        net = Net()
        before, shadow = bits(net.state_dict()), ShadowModel(net, shard_over_ranks=True)
        shadow.swap_in(net)
        assert shadow.is_swapped
        shadow.swap_out(net)
        assert bits(net.state_dict()) == before

    @pytest.mark.usefixtures('_rank_1_of_3')
    @pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
    @pytest.mark.parametrize('nth', [0, 3, 6])
    def test_a_gather_that_is_cut_short_gives_the_training_weights_back(self, monkeypatch, nth, error):
        net = Net()
        before, shadow = bits(net.state_dict()), ShadowModel(net, shard_over_ranks=True)
        with cut_short(monkeypatch, nth, error), pytest.raises(error), shadow.swapped(net):
            pytest.fail('entered')
        assert bits(net.state_dict()) == before
        assert not shadow.is_swapped
        with shadow.swapped(net):
            pass
        assert bits(net.state_dict()) == before

    @pytest.mark.usefixtures('_rank_1_of_3')
    @pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
    def test_an_average_that_cannot_be_shown_again_leaves_with_the_one_before_it(self, monkeypatch, error):
        net = Net()
        before, split, other = bits(net.state_dict()), ShadowModel(net, shard_over_ranks=True), ShadowModel(net)
        split.swap_in(net)
        other.swap_in(net)
        with cut_short(monkeypatch, 2, error) as gathered, pytest.raises(error):
            other.swap_out(net)
        assert len(gathered) == 3  # not a second time, since the other ranks would answer with other tensors
        assert not split.is_swapped
        assert not other.is_swapped
        assert bits(net.state_dict()) == before

    @pytest.mark.usefixtures('_rank_1_of_3')
    def test_the_collector_gathers_nothing(self, monkeypatch):
        net = Net()
        inner = net.linear
        before, split, outer = bits(inner.state_dict()), ShadowModel(inner, shard_over_ranks=True), ShadowModel(net)
        split.swap_in(inner)
        outer.swap_in(net)
        with cut_short(monkeypatch, 0, AssertionError) as gathered:
            del net
            loan.refuse(nn.Linear(1, 1))
        assert not gathered
        assert bits(inner.state_dict()) == before

    @pytest.mark.slow
    @pytest.mark.usefixtures('_rank_1_of_3')
    def test_a_block_that_is_interrupted_at_any_moment_leaves_the_training_weights(self, monkeypatch):
        monkeypatch.setattr('sys.unraisablehook', UNRAISABLE.append)
        net = Net()
        before, shadow = bits(net.state_dict()), ShadowModel(net, shard_over_ranks=True)

        def work() -> None:
            with shadow.swapped(net):
                pass

        def check() -> None:
            assert bits(net.state_dict()) == before
            assert not shadow.is_swapped
            assert not loan.borrowers(net)
            assert torch.is_grad_enabled()

        interrupt_at_random_moments(work, check)


@contextmanager
def cut_short(monkeypatch, nth: int, error: type[BaseException]) -> Iterator[list[Tensor]]:
    """Raises ``error`` in place of the gathers from number ``nth`` on; yields what was to be gathered."""
    real, gathered = loan.whole, []

    def whole(tensor: Tensor) -> Tensor:
        gathered.append(tensor)
        if len(gathered) > nth:
            raise error
        return real(tensor)

    with monkeypatch.context() as patched:
        patched.setattr(loan, 'whole', whole)
        yield gathered


class TestWithoutEffect:
    def test_one_process_keeps_the_whole_average_and_is_told(self):
        with pytest.warns(UserWarning, match='shard_over_ranks=True has no effect: there is one process'):
            shadow = ShadowModel(Net(), shard_over_ranks=True)
        assert all(type(tensor) is Tensor for tensor in shadow.parameters())
        assert not gather_state_dict(shadow.state_dict()).keys() ^ shadow.state_dict().keys()
        pickle.dumps(shadow.state_dict())

    def test_a_sharded_model_keeps_its_shards_and_is_told(self):
        with as_rank(0, 2):
            net = nn.Linear(4, 4)
            mesh = init_device_mesh('cpu', (2,))
            for name, parameter in list(net.named_parameters()):
                setattr(net, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
            with pytest.warns(UserWarning, match=r'has no effect: the model is sharded, .* Leave it out'):
                shadow = ShadowModel(net, shard_over_ranks=True)
            for tensor in shadow.parameters():
                assert isinstance(tensor, DTensor)
                assert tensor.device_mesh is mesh

    def test_it_is_true_or_false(self):
        with pytest.raises(TypeError, match='shard_over_ranks must be True or False, got 2'):
            Settings(shard_over_ranks=2)  # pyright: ignore[reportArgumentType]
