"""Every way into an average and out of it takes a sharded model. In one process, over a mesh of one."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed.checkpoint as dcp
from plain import STRICT, Net, loss_of, same_bits, train
from sharded import mesh_of_one
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim.swa_utils import AveragedModel

from composer_ema import CheckpointError, EMAOptimizer, ShadowModel, compute_ema, load_average, update_bn
from composer_ema.checkpoints.inspection import describe
from composer_ema.model.sharding import local, whole
from composer_ema.shadow import lendable

pytestmark = [
    STRICT,
    pytest.mark.usefixtures('_process_group'),
    pytest.mark.filterwarnings('ignore:TypedStorage is deprecated:UserWarning'),
    pytest.mark.skipif(torch.__version__.startswith('2.6.'), reason='FSDP2 of torch 2.6 cannot run a forward on a CPU'),
]


@pytest.fixture(scope='module')
def _process_group() -> Iterator[None]:
    with mesh_of_one():
        yield


def sharded(model: Net) -> Net:
    mesh = init_device_mesh('cpu', (1,))
    fully_shard(model.first, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def parallel(model: Net) -> Net:
    mesh = init_device_mesh('cpu', (1,))
    return parallelize_module(model, mesh, {'first': ColwiseParallel(), 'last': RowwiseParallel()})


WAYS = {'FSDP2': sharded, 'tensor parallelism': parallel}
Way = Callable[[Net], Net]


@pytest.fixture(params=WAYS)
def way(request) -> Way:
    return WAYS[request.param]


def bits_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(tensor.detach()).clone() for name, tensor in tensors.items()}


def average_of(shadow: ShadowModel) -> dict[str, Tensor]:
    return bits_of(dict((*shadow.named_parameters(), *shadow.named_buffers())))


def run_without_gradient(model: Net) -> None:
    """Under FSDP2 leaves the root whole."""
    with torch.no_grad():
        model.eval()(torch.ones(2, 3))
    model.train()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.05)


class TestComputeEma:
    def test_each_process_moves_its_own_shards(self, way):
        model, ema_model, reference = way(Net(1)), way(Net(0)), Net(0)
        for _ in range(2):
            run_without_gradient(model)
            compute_ema(model, ema_model, smoothing=0.75)
            compute_ema(Net(1), reference, smoothing=0.75)
        assert same_bits(bits_of(ema_model.state_dict()), bits_of(reference.state_dict()))
        assert isinstance(ema_model.last.weight, DTensor)

    def test_a_state_dict_of_shards_is_moved_too(self, way):
        model, reference = way(Net(1)), Net(0)
        state = copy.deepcopy(way(Net(0)).state_dict())
        compute_ema(model, state, smoothing=0.75)
        compute_ema(Net(1), reference, smoothing=0.75)
        assert same_bits(bits_of(state), bits_of(reference.state_dict()))

    def test_whole_weights_go_into_a_sharded_average(self, way):
        ema_model, reference = way(Net(0)), Net(0)
        compute_ema(Net(1), ema_model, smoothing=0.75)
        compute_ema(Net(1), reference, smoothing=0.75)
        assert same_bits(bits_of(ema_model.state_dict()), bits_of(reference.state_dict()))

    def test_sharded_weights_are_not_gathered_for_a_whole_average(self, way):
        model, ema_model = way(Net(1)), Net(0)
        for average in (ema_model, dict(ema_model.state_dict())):
            with pytest.raises(
                ValueError, match=r'first\.weight of model is sharded.*whole.*gathers nothing.*ShadowModel'
            ):
                compute_ema(model, average)
        assert same_bits(bits_of(ema_model.state_dict()), bits_of(Net(0).state_dict()))

    def test_shards_of_another_layout_are_refused(self):
        ema_model = Net(0)
        weight = distribute_tensor(ema_model.first.weight.detach(), init_device_mesh('cpu', (1,)), [Replicate()])
        ema_model.first.weight = nn.Parameter(weight)
        with pytest.raises(
            ValueError, match=r'first\.weight of model is sharded, \(Shard.*, that of ema_model sharded, \(Rep'
        ):
            compute_ema(sharded(Net(1)), ema_model)


class TestUpdateBn:
    def batches(self) -> list[Tensor]:
        return [torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

    def test_the_statistics_are_those_of_the_whole_model(self, way):
        model, reference = way(Net(0)), Net(0)
        update_bn(model, self.batches())
        update_bn(reference, self.batches())
        assert same_bits(bits_of(model.state_dict()), bits_of(reference.state_dict()))
        assert isinstance(model.last.weight, DTensor)

    def test_an_average_gets_its_own_and_the_model_keeps_every_bit(self, way):
        model, reference = way(Net(0)), Net(0)
        shadows = [ShadowModel(each) for each in (model, reference)]
        for each, shadow in zip((model, reference), shadows, strict=True):
            each.load_state_dict(Net(1).state_dict()) if each is reference else ShadowModel(Net(1)).copy_to(each)
            shadow.update(each, smoothing=0.5)
        before = bits_of(model.state_dict())
        for each, shadow in zip((model, reference), shadows, strict=True):
            update_bn(each, self.batches(), shadow=shadow)
        assert same_bits(average_of(shadows[0]), average_of(shadows[1]))
        assert same_bits(bits_of(model.state_dict()), before)

    def test_what_a_forward_writes_into_a_shard_is_put_back(self, way):
        model = way(Net(0))
        before = bits_of(dict(model.named_parameters()))

        def writing(network: nn.Module, batch: Tensor) -> None:
            network(batch)
            for module in network.modules():
                if hasattr(module, 'reshard'):
                    module.reshard()
            local(network.last.weight.data).add_(1)

        update_bn(model, self.batches(), forward=writing)
        assert same_bits(bits_of(dict(model.named_parameters())), before)

    def test_after_a_forward_that_raises_the_shards_are_back(self):
        model = sharded(Net(0))
        before = bits_of(model.state_dict())
        with pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
            update_bn(model, [torch.ones(2, 4)])
        assert isinstance(model.last.weight, DTensor)
        assert same_bits(bits_of(model.state_dict()), before)
        loss_of(model, 0).backward()

    def test_sharded_statistics_are_refused(self):
        model = Net(0)
        mean = distribute_tensor(torch.zeros(4), init_device_mesh('cpu', (1,)), [Replicate()])
        model.norm.running_mean = mean
        with pytest.raises(NotImplementedError, match='the statistics of norm are DTensors'):
            update_bn(model, self.batches())


class TestShadow:
    def pair(self, way: Way) -> tuple[Net, ShadowModel, ShadowModel]:
        """A sharded model with its average, and the average of the same model in one piece."""
        model, plain = way(Net(0)), Net(0)
        shadows = ShadowModel(model), ShadowModel(plain)
        for each, shadow in zip((model, plain), shadows, strict=True):
            ShadowModel(Net(1)).copy_to(each)
            shadow.update(each, smoothing=0.5)
        return model, *shadows

    def test_its_state_dict_is_laid_out_as_the_model_it_is_for(self, way):
        model, shadow, reference = self.pair(way)
        run_without_gradient(model)
        own, for_whole = shadow.averaged_state_dict(model), shadow.averaged_state_dict(Net(2))
        assert isinstance(own['last.weight'], DTensor)
        assert not any(isinstance(tensor, DTensor) for tensor in for_whole.values())
        expected = reference.averaged_state_dict(Net(2))
        assert same_bits(bits_of(own), expected)
        assert same_bits(for_whole, expected)

    def test_it_overwrites_whole_models_and_sharded_ones(self, way):
        _, shadow, reference = self.pair(way)
        one, other = Net(3), way(Net(3))
        shadow.copy_to(one)
        reference.copy_to(other)
        expected = reference.averaged_state_dict(Net(2))
        assert same_bits(bits_of(one.state_dict()), expected)
        assert same_bits(bits_of(other.state_dict()), expected)

    def test_torchs_averaged_model_of_it_is_whole(self, way):
        model, shadow, reference = self.pair(way)
        averaged = shadow.to_averaged_model(Net(2))
        assert same_bits(bits_of(averaged.module.state_dict()), reference.averaged_state_dict(Net(2)))
        if way is sharded:
            with pytest.raises(
                NotImplementedError, match=r'torch cannot copy one that is sharded.*averaged_state_dict'
            ):
                shadow.to_averaged_model(model)

    def test_it_goes_on_from_an_averaged_model_that_is_sharded(self, way):
        averaged = AveragedModel(Net(0))
        way(averaged.module)
        shadow = ShadowModel.from_averaged_model(averaged)
        assert isinstance(dict(shadow.named_parameters())['last.weight'], DTensor)
        assert same_bits(average_of(shadow), average_of(ShadowModel(Net(0))))

    def test_another_librarys_whole_average_loads(self, way):
        model, shadow, _ = self.pair(way)
        shadow.load_foreign(AveragedModel(Net(5)).state_dict(), model)
        assert isinstance(dict(shadow.named_parameters())['last.weight'], DTensor)
        weights = dict(Net(5).named_parameters())
        assert same_bits(bits_of(dict(shadow.named_parameters())), bits_of(weights))

    @pytest.mark.parametrize('copied', [copy.deepcopy, lambda shadow: pickle.loads(pickle.dumps(shadow))])
    def test_copies_go_on(self, way, copied):
        model, shadow, reference = self.pair(way)
        twin = copied(shadow)
        twin.update(model, smoothing=0.5)
        reference.update(Net(1), smoothing=0.5)
        assert same_bits(bits_of(dict(twin.named_parameters())), bits_of(dict(reference.named_parameters())))
        assert not same_bits(average_of(shadow), average_of(twin))

    def test_its_state_is_read_without_running_code(self, way):
        model, shadow, _ = self.pair(way)
        file = io.BytesIO()
        torch.save(shadow.state_dict(), file)
        file.seek(0)
        other = ShadowModel(model)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert same_bits(average_of(other), average_of(shadow))

    @pytest.mark.parametrize('coordinate', [0, 1])
    def test_one_of_two_processes_parts_in_a_file_are_no_average(self, coordinate, tmp_path):
        mesh = DeviceMesh('cpu', [0, 1], _init_backend=False)
        mesh._coordinate_on_dim = [coordinate]
        model = nn.Linear(3, 4)
        state, shadow = ShadowModel(model).state_dict(), ShadowModel(model)
        meta = TensorMeta(torch.Size((4, 3)), (3, 1), torch.float32)
        spec = DTensorSpec(mesh, (Shard(0),), meta)
        state['parameters']['weight'] = DTensor(torch.zeros(2, 3), spec, requires_grad=False)
        torch.save({'ema': state}, tmp_path / 'part.pt')
        before = average_of(shadow)
        with pytest.raises(ValueError, match=r"weight in the state is another process's part.*gather_state_dict"):
            shadow.load_state_dict(torch.load(tmp_path / 'part.pt', weights_only=True)['ema'])
        assert same_bits(average_of(shadow), before)
        for read in (load_average, describe):
            with pytest.raises(
                CheckpointError, match=r"part\.pt holds one process's part of weight, \(2, 3\) of \(4, 3\)"
            ):
                read(tmp_path / 'part.pt')

    def test_the_parts_of_a_single_process_in_a_file_are_the_whole_average(self, way, tmp_path):
        _, shadow, _ = self.pair(way)
        torch.save({'ema': shadow.state_dict()}, tmp_path / 'whole.pt')
        read = load_average(tmp_path / 'whole.pt')
        assert not any(isinstance(tensor, DTensor) for tensor in read.values())
        assert same_bits({name: read[name] for name in average_of(shadow)}, average_of(shadow))

    def test_shared_buffers_go_into_a_whole_model_in_the_same_order_on_every_rank(self, monkeypatch):
        names = [f'buffer{index}' for index in range(10)]
        models = [nn.Linear(1, 1), nn.Linear(1, 1)]
        for model in models:
            for name in names:
                model.register_buffer(name, torch.ones(2))
        shared, mesh = models[0], init_device_mesh('cpu', (1,))
        for name in names:
            setattr(shared, name, distribute_tensor(torch.ones(2), mesh, [Replicate()]))
        gathered, laid_out_as = [], lendable.laid_out_as

        def noted(value, like):
            gathered.extend(name for name in names if getattr(models[1], name) is like)
            return laid_out_as(value, like)

        shadow = ShadowModel(shared)
        monkeypatch.setattr(lendable, 'laid_out_as', noted)
        shadow.copy_to(models[1])
        assert gathered == names  # a set would have an order of its own in each process

    def test_it_is_cast_and_counted_and_its_buffers_are_broadcast(self, way):
        model, shadow, reference = self.pair(way)
        shadow.broadcast_buffers()
        assert '20 elements' in repr(shadow)
        assert same_bits(average_of(shadow.to(dtype='bfloat16')), average_of(reference.to(dtype='bfloat16')))
        assert {type(tensor) for tensor in shadow.parameters()} == {DTensor}
        shadow.update(model, smoothing=0.5)

    def test_training_weights_are_those_of_training(self, way):
        model, shadow, reference = self.pair(way)
        before = bits_of(shadow.training_weights(model))
        assert shadow.relative_distance(model).item() == pytest.approx(reference.relative_distance(Net(1)).item())
        with shadow.swapped(model):
            run_without_gradient(model)
            assert same_bits(bits_of(shadow.training_weights(model)), before)


class TestOptimizer:
    def build(self, way: Way, seed: int = 0, **options) -> tuple[Net, EMAOptimizer]:
        model = way(Net(seed))
        return model, EMAOptimizer(adam(model), model=model, **(options or {'decay': 0.5}))

    @pytest.mark.parametrize(
        'options', [{}, {'half_life': {'short': 2, 'long': 20}, 'average': {'mean': 'equal'}}], ids=['one', 'several']
    )
    def test_it_trains_averages_and_lends_as_with_a_whole_model(self, way, options):
        model, optimizer = self.build(way, **options)
        plain = Net(0)
        reference = EMAOptimizer(adam(plain), model=plain, **(options or {'decay': 0.5}))
        for step in range(4):
            train(model, optimizer, range(step, step + 1))
            train(plain, reference, range(step, step + 1))
            run_without_gradient(model)
        for label, shadow in optimizer.shadows.items():
            torch.testing.assert_close(average_of(shadow), average_of(reference.shadows[label]))
        before = bits_of(model.state_dict())
        with optimizer.swap_ema_weights():
            run_without_gradient(model)
            average = bits_of(dict(optimizer.shadow.named_parameters()))
            assert same_bits(bits_of(dict(model.named_parameters())), average)
        assert same_bits(bits_of(model.state_dict()), before)
        torch.testing.assert_close(bits_of(optimizer.averaged_state_dict()), bits_of(reference.averaged_state_dict()))

    def test_its_own_state_resumes_also_one_that_was_taken_while_the_model_held_the_average(self, way):
        model, optimizer = self.build(way)
        train(model, optimizer, range(3))
        with optimizer.swap_ema_weights():
            state = copy.deepcopy({'model': model.state_dict(), 'optimizer': optimizer.state_dict()})
        twin, resumed = self.build(way, seed=1)
        twin.load_state_dict(state['model'])
        resumed.load_state_dict(state['optimizer'])
        assert same_bits(bits_of(twin.state_dict()), bits_of(model.state_dict()))
        twin.load_state_dict(state['model'])
        with pytest.raises(RuntimeError, match='the model holds the average, not its training weights'):
            resumed.step()

    def test_the_step_that_builds_empty_state_moves_nothing(self, way):
        model, optimizer = self.build(way)
        before = bits_of(model.state_dict()), average_of(optimizer.shadow)
        get_optimizer_state_dict(model, optimizer)
        assert optimizer.num_steps == 0
        assert same_bits(bits_of(model.state_dict()), before[0])
        assert same_bits(average_of(optimizer.shadow), before[1])

    def test_a_first_step_at_rate_zero_with_gradients_counts(self, way):
        model, optimizer = self.build(way)
        optimizer.param_groups[0]['lr'] = 0.0
        train(model, optimizer, range(1))
        assert optimizer.num_steps == 1

    def test_the_state_for_a_checkpoint_can_be_had_right_after_a_forward_without_a_gradient(self):
        model, optimizer = self.build(sharded)
        train(model, optimizer, range(1))
        run_without_gradient(model)
        with pytest.raises(KeyError):
            get_optimizer_state_dict(model, optimizer.optimizer)  # torch looks for the whole parameters
        state = get_optimizer_state_dict(model, optimizer)
        run_without_gradient(model)
        with pytest.raises(KeyError):
            set_optimizer_state_dict(model, optimizer, state)  # it has looked before we are asked
        model.reshard()
        set_optimizer_state_dict(model, optimizer, state)

    @pytest.mark.parametrize('how', ['sharded', 'flat', 'full'])
    def test_torchs_functions_carry_the_average(self, way, how, tmp_path):
        options = StateDictOptions(flatten_optimizer_state_dict=how == 'flat', full_state_dict=how == 'full')
        model, optimizer = self.build(way)
        train(model, optimizer, range(3))
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        twin, resumed = self.build(way, seed=1)
        if how == 'full':
            assert not isinstance(state['state']['last.weight']['average/ema'], DTensor)
        else:
            dcp.save(state, checkpoint_id=tmp_path)
            state = get_optimizer_state_dict(twin, resumed, options=options)
            dcp.load(state, checkpoint_id=tmp_path)
        ShadowModel(model).copy_to(twin)
        set_optimizer_state_dict(twin, resumed, state, options=options)
        assert same_bits(average_of(resumed.shadow), average_of(optimizer.shadow))
        assert resumed.num_steps == 3
        for one, opt in ((model, optimizer), (twin, resumed)):
            train(one, opt, range(3, 5))
        assert same_bits(average_of(resumed.shadow), average_of(optimizer.shadow))
