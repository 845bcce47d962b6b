"""EMAOptimizer in every training loop: it steps as if alone, and averages each step that really happens."""

from __future__ import annotations

import copy
import faulthandler
import importlib.util
import inspect
import math
import os
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from plain import (
    OPTIMIZERS,
    SCHEDULERS,
    STRICT,
    Net,
    One,
    assert_same,
    averaged,
    batch,
    loss_of,
    same_bits,
    same_values,
    saved,
    sgd,
    train,
    weights,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler

from composer_ema import EMAOptimizer
from composer_ema.shadow import plan

pytestmark = STRICT


LBFGS, SPARSE = 'LBFGS', 'SparseAdam'


class Reference:
    """The average by its equation, in float64, beside a run."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: tensor.double() for name, tensor in weights(model).items()}

    def update(self, model: nn.Module, weight: float) -> None:
        for name, tensor in weights(model).items():
            self.tensors[name] += weight * (tensor.double() - self.tensors[name])

    def check(self, got: dict[str, Tensor], names: list[str]) -> None:
        for name, tensor in zip(names, got.values(), strict=True):
            # float32: half a unit in the last place per update, and a hundred times as much for cancellation
            torch.testing.assert_close(tensor.double(), self.tensors[name], rtol=1e-5, atol=1e-6)


def sparse_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Embedding(5, 3, sparse=True)


def run_with(name: str, wrap: bool, options: dict | None = None) -> tuple[nn.Module, torch.optim.Optimizer, Reference]:
    """Six steps of an optimizer by its name; the reference averages with decay 0.9."""
    model = sparse_net() if name == SPARSE else Net()
    inner = OPTIMIZERS[name](model.parameters(), **{'lr': 0.05, **(options or {})})
    optimizer = EMAOptimizer(inner, decay=0.9) if wrap else inner
    reference = Reference(model)
    for index in range(6):

        def closure(index: int = index) -> Tensor:
            optimizer.zero_grad()
            loss = model(torch.tensor([index % 5, 1])).square().sum() if name == SPARSE else loss_of(model, index)
            loss.backward()
            return loss

        if name == LBFGS or index % 2:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        reference.update(model, 1 - 0.9)
    return model, optimizer, reference


def variants() -> list:
    found = []
    for name, kind in OPTIMIZERS.items():
        arguments = inspect.signature(kind.__init__).parameters
        found.append(pytest.param(name, {}, id=name))
        for option in ('foreach', 'fused', 'capturable', 'amsgrad', 'maximize', 'nesterov', 'differentiable'):
            if option not in arguments or option == 'differentiable':
                continue
            options = {option: True, **({'momentum': 0.9} if option == 'nesterov' and name == 'SGD' else {})}
            found.append(pytest.param(name, options, id=f'{name}-{option}'))
    return found


class TestEveryOptimizer:
    @pytest.mark.parametrize(('name', 'options'), variants())
    def test_it_steps_as_if_alone_and_its_weights_are_averaged(self, name, options):
        try:
            bare, _, _ = run_with(name, wrap=False, options=options)
        except Exception as refusal:
            pytest.skip(f'torch {torch.__version__} refuses this on a CPU: {refusal}')
        model, optimizer, reference = run_with(name, wrap=True, options=options)
        assert same_bits(weights(model), weights(bare))
        reference.check(averaged(optimizer), [key for key, _ in model.named_parameters()])
        assert not same_values(averaged(optimizer), dict(model.named_parameters()))

    @pytest.mark.parametrize('name', OPTIMIZERS)
    def test_it_resumes_bit_for_bit_in_the_middle(self, name):
        model, optimizer, _ = run_with(name, wrap=True)
        resumed_model = sparse_net() if name == SPARSE else Net(seed=3)
        resumed = EMAOptimizer(OPTIMIZERS[name](resumed_model.parameters(), lr=0.05), decay=0.9)
        resumed.load_state_dict(saved(copy.deepcopy(optimizer.state_dict())))
        resumed_model.load_state_dict(model.state_dict())
        for one, opt in ((model, optimizer), (resumed_model, resumed)):

            def closure(one=one, opt=opt) -> Tensor:
                opt.zero_grad()
                loss = one(torch.tensor([2, 1])).square().sum() if name == SPARSE else loss_of(one, 9)
                loss.backward()
                return loss

            opt.step(closure)
        assert same_bits(weights(resumed_model), weights(model))
        assert same_bits(averaged(resumed), averaged(optimizer))
        assert resumed.num_steps == optimizer.num_steps == 7

    def test_fused_is_among_the_variants_that_run_on_a_cpu(self):
        run_with('Adam', wrap=True, options={'fused': True})

    def test_per_group_options_are_the_wrapped_optimizers(self):
        def build(model: Net) -> torch.optim.Optimizer:
            groups = [{'params': model.first.parameters(), 'lr': 0.5}, {'params': model.last.parameters()}]
            return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.3)

        bare, model = Net(), Net()
        train(bare, build(bare), range(4))
        optimizer = EMAOptimizer(build(model))
        optimizer.param_groups[1]['weight_decay'] = 0.3
        train(model, optimizer, range(4))
        assert same_bits(weights(model), weights(bare))
        assert [group['lr'] for group in optimizer.param_groups] == [0.5, 0.01]

    def test_gradients_are_accumulated_over_backward_passes_and_averaged_once(self):
        models = Net(), Net()
        optimizers = sgd(models[0]), EMAOptimizer(sgd(models[1]), decay=0.5)
        for model, optimizer in zip(models, optimizers, strict=True):
            for step in range(2):
                for part in range(3):
                    (loss_of(model, 10 * step + part) / 3).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert same_bits(weights(models[0]), weights(models[1]))
        assert optimizers[1].num_steps == optimizers[1].shadow.num_updates == 2

    def test_zero_grad_sets_to_none_or_to_zero(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model))
        loss_of(model, 0).backward()
        optimizer.zero_grad(set_to_none=False)
        assert all(not p.grad.any() for p in model.parameters())
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())

    def test_a_compiled_model_is_averaged_and_swapped_without_compiling_again(self):
        model = Net()
        passes = []

        def backend(graph, _):
            passes.append(graph)
            return graph

        compiled = torch.compile(model, backend=backend)
        optimizer = EMAOptimizer(sgd(model), decay=0.5, model=compiled)
        train(compiled, optimizer, range(3))
        count = len(passes)
        with optimizer.swap_ema_weights():
            during = compiled(batch(3)[0])
        loss_of(compiled, 3)
        assert len(passes) == count
        assert not torch.equal(during, compiled(batch(3)[0]))
        bare = Net()
        train(bare, sgd(bare), range(3))
        model.norm.load_state_dict(bare.norm.state_dict())  # evaluated in training mode above
        assert same_bits(weights(model), weights(bare))


#: What each scheduler needs besides the optimizer.
SCHEDULER_ARGUMENTS = {
    'LambdaLR': lambda _: {'lr_lambda': lambda step: 0.9**step},
    'MultiplicativeLR': lambda _: {'lr_lambda': lambda step: 0.9},
    'StepLR': lambda _: {'step_size': 2},
    'MultiStepLR': lambda _: {'milestones': [1, 3]},
    'ExponentialLR': lambda _: {'gamma': 0.9},
    'CosineAnnealingLR': lambda _: {'T_max': 5},
    'CosineAnnealingWarmRestarts': lambda _: {'T_0': 2},
    'CyclicLR': lambda _: {'base_lr': 0.01, 'max_lr': 0.1},
    'OneCycleLR': lambda _: {'max_lr': 0.1, 'total_steps': 9},
    'ReduceLROnPlateau': lambda _: {'patience': 0},
    'SequentialLR': lambda opt: {
        'schedulers': [lr_scheduler.ConstantLR(opt), lr_scheduler.ExponentialLR(opt, 0.9)],
        'milestones': [2],
    },
}


def scheduled(name: str, wrap: bool) -> tuple[list[float], Net, torch.optim.Optimizer]:
    model = Net()
    optimizer = EMAOptimizer(sgd(model), decay=0.5) if wrap else sgd(model)
    if name == 'ChainedScheduler':
        scheduler = lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(optimizer, 0.9)])
    elif name == 'SWALR':
        scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=3)
    else:
        arguments = SCHEDULER_ARGUMENTS.get(name, lambda _: {})(optimizer)
        scheduler = SCHEDULERS[name](optimizer, **arguments)
    rates = []
    for index in range(5):
        train(model, optimizer, range(index, index + 1))
        scheduler.step(*([1.0] if name == 'ReduceLROnPlateau' else []))
        rates.append(optimizer.param_groups[0]['lr'])
    return rates, model, optimizer


class TestEveryScheduler:
    @pytest.mark.parametrize('name', [*(name for name in SCHEDULERS if name != 'LRScheduler'), 'SWALR'])
    def test_built_on_the_wrapper_it_gives_the_same_run(self, name):
        rates, bare, _ = scheduled(name, wrap=False)
        wrapped_rates, model, optimizer = scheduled(name, wrap=True)
        assert wrapped_rates == rates
        assert same_bits(weights(model), weights(bare))
        assert optimizer.num_steps == 5


def scaled_steps(fused: bool, wrap: bool, scale: float = 1024.0) -> tuple[list, Net, torch.optim.Optimizer]:
    """Five steps under a GradScaler and autocast, of which the second and the last meet an infinite gradient."""
    model = Net()
    inner = torch.optim.Adam(model.parameters(), lr=0.05, fused=fused)
    optimizer = EMAOptimizer(inner, decay=0.5, model=model) if wrap else inner
    scaler = torch.amp.GradScaler('cpu', init_scale=scale)
    seen = []
    for index in range(5):
        optimizer.zero_grad()
        with torch.autocast('cpu', dtype=torch.bfloat16):
            loss = loss_of(model, index)
        scaler.scale(loss).backward()
        if index == 3:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if index in (1, 4):
            model.first.weight.grad[0, 0] = math.inf
        before = averaged(optimizer) if wrap else {}
        scaler.step(optimizer)
        scaler.update()
        seen.append((scaler.get_scale(), wrap and same_bits(before, averaged(optimizer))))
    return seen, model, optimizer


class TestGradScaler:
    @pytest.mark.parametrize('fused', [False, True])
    @pytest.mark.parametrize('scale', [1024.0, 1000.0])
    def test_a_skipped_step_is_not_averaged_and_training_is_as_without(self, fused, scale):
        expected, bare, _ = scaled_steps(fused, wrap=False, scale=scale)
        seen, model, optimizer = scaled_steps(fused, wrap=True, scale=scale)
        assert [scale for scale, _ in seen] == [scale for scale, _ in expected]
        assert same_bits(weights(model), weights(bare))
        assert [kept for _, kept in seen] == [False, True, False, False, True]
        assert optimizer.num_steps == optimizer.shadow.num_updates == 3
        for name in ('grad_scale', 'found_inf'):
            assert not hasattr(optimizer, name)

    def test_a_disabled_scaler_changes_nothing(self):
        bare, model = Net(), Net()
        train(bare, sgd(bare), range(2))
        optimizer = EMAOptimizer(sgd(model))
        scaler = torch.amp.GradScaler('cpu', enabled=False)
        for index in range(2):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, index)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert same_bits(weights(model), weights(bare))
        assert optimizer.num_steps == 2


class TestPhantomStep:
    @pytest.mark.parametrize('kind', ['SGD', 'Adam', 'AdamW'])
    @pytest.mark.parametrize('tensor_lr', [False, True])
    def test_the_step_that_builds_empty_state_is_not_averaged(self, kind, tensor_lr):
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

        model = Net()
        optimizer = EMAOptimizer(
            OPTIMIZERS[kind](model.parameters(), lr=torch.tensor(0.1) if tensor_lr else 0.1), decay=0.5
        )
        before = weights(model)
        state = get_optimizer_state_dict(model, optimizer)
        assert optimizer.num_steps == optimizer.shadow.num_updates == 0
        assert same_bits(weights(model), before)
        set_optimizer_state_dict(model, optimizer, state)
        assert optimizer.num_steps == 0
        train(model, optimizer, range(1))
        assert optimizer.num_steps == 1

    def test_an_average_that_is_saved_beside_such_a_checkpoint_still_loads(self):
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

        model, resumed_model = Net(), Net(seed=2)
        optimizer = EMAOptimizer(torch.optim.Adam(model.parameters(), lr=0.1), decay=0.5, model=model)
        train(model, optimizer, range(3))
        state = {
            'model': model.state_dict(),
            'optimizer': get_optimizer_state_dict(model, optimizer),
            'ema': optimizer.ema_state_dict(),
        }
        state = saved(copy.deepcopy(state))
        resumed_model.load_state_dict(state['model'])
        resumed = EMAOptimizer(torch.optim.Adam(resumed_model.parameters(), lr=0.1), decay=0.5, model=resumed_model)
        set_optimizer_state_dict(resumed_model, resumed, state['optimizer'])
        resumed.load_ema_state_dict(state['ema'])
        for one, opt in ((model, optimizer), (resumed_model, resumed)):
            train(one, opt, range(3, 5))
        assert same_bits(weights(resumed_model), weights(model))
        assert same_bits(averaged(resumed), averaged(optimizer))

    def test_a_first_step_of_a_warm_up_from_zero_is_averaged(self):
        model = Net()
        optimizer = EMAOptimizer(torch.optim.Adam(model.parameters(), lr=0.0))
        train(model, optimizer, range(1))
        assert optimizer.num_steps == 1

    @pytest.mark.parametrize('closure', [None, lambda: 0.0])
    def test_steps_at_rate_zero_without_gradients_count_once_there_is_state_or_a_closure(self, closure):
        model = Net()
        optimizer = EMAOptimizer(torch.optim.Adam(model.parameters(), lr=0.0))
        if closure is None:
            train(model, optimizer, range(1))
        before = optimizer.num_steps
        optimizer.zero_grad(set_to_none=False)
        optimizer.step(closure)
        assert optimizer.num_steps == before + 1


class Journal:
    """Notes in which order the average is updated and joined, and when a closure and a step write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, optimizer: EMAOptimizer) -> None:
        self.lines: list[str] = []
        shadow, inner = optimizer.shadows, optimizer.optimizer
        update, wait, step = shadow.update, shadow.wait_for_reads, inner.step
        monkeypatch.setattr(shadow, 'update', lambda *a, **k: self.note('fork') or update(*a, **k))
        monkeypatch.setattr(shadow, 'wait_for_reads', lambda: self.note('join') or wait())
        monkeypatch.setattr(inner, 'step', lambda *a, **k: self.note('step') or step(*a, **k))

    def note(self, line: str) -> None:
        self.lines.append(line)


class TestOrder:
    """On a CPU forks and joins do nothing, so their order is read from a journal; the gpu test sees their effect."""

    def started(self, monkeypatch, inner_kind=torch.optim.SGD) -> tuple[One, EMAOptimizer, Journal]:
        model = One(1.0)
        optimizer = EMAOptimizer(inner_kind(model.parameters(), lr=0.1))
        model.weight.grad = torch.ones(1)
        optimizer.step(lambda: 0.0)
        return model, optimizer, Journal(monkeypatch, optimizer)

    def test_without_a_closure_the_last_update_is_joined_before_the_step(self, monkeypatch):
        _, optimizer, journal = self.started(monkeypatch)
        optimizer.step()
        assert journal.lines == ['join', 'step', 'fork']

    def test_with_a_closure_it_is_joined_when_the_closure_returns_first(self, monkeypatch):
        model, optimizer, journal = self.started(monkeypatch, torch.optim.LBFGS)

        def closure() -> Tensor:
            journal.note('closure')
            optimizer.zero_grad()
            loss = (model.weight - 3).square().sum() + model.weight.exp().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert journal.lines[:3] == ['step', 'closure', 'join']
        assert journal.lines.count('closure') > 2
        assert journal.lines[-1] == 'fork'
        assert journal.lines.count('fork') == 1

    def test_an_unknown_optimizer_may_write_before_its_closure_so_it_is_joined_first(self, monkeypatch):
        class Perturbing(torch.optim.SGD):
            pass

        _, optimizer, journal = self.started(monkeypatch, Perturbing)
        optimizer.step(lambda: 0.0)
        assert journal.lines[:2] == ['join', 'step']

    def test_hooks_that_may_write_are_joined_first(self, monkeypatch):
        _, optimizer, journal = self.started(monkeypatch)
        optimizer.register_step_pre_hook(lambda *_: journal.note('hook'))
        optimizer.step(lambda: 0.0)
        assert journal.lines[:3] == ['join', 'hook', 'step']
        journal.lines.clear()
        _, optimizer, journal = self.started(monkeypatch)
        optimizer.optimizer.register_step_pre_hook(lambda *_: journal.note('hook'))
        optimizer.step(lambda: 0.0)
        assert journal.lines[:2] == ['join', 'step']

    def test_after_the_first_update_no_module_is_walked(self, monkeypatch):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), model=model)
        train(model, optimizer, range(3))
        from composer_ema.model.inventory import Inventory

        monkeypatch.setattr(Inventory, 'of', lambda *_: pytest.fail('walked the module'))
        optimizer.step()

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
    @pytest.mark.parametrize('with_closure', [False, True])
    def test_on_cuda_an_update_is_late_but_reads_the_weights_of_its_step(self, with_closure, monkeypatch):
        monkeypatch.setattr(plan, 'WORTH_FORKING', 0)
        model = nn.Linear(2048, 2048, bias=False, device='cuda')
        with torch.no_grad():
            model.weight.fill_(0.0)
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), decay=0.5)
        expected, value = 0.0, 0.0
        for _ in range(6):
            model.weight.grad = torch.full_like(model.weight, -1.0)
            for stream in optimizer.shadow._follower._streams.values():
                with torch.cuda.stream(stream._stream):
                    torch.cuda._sleep(20_000_000)  # an update that is late: a missing join would read newer weights
            optimizer.step(*([lambda: 0.0] if with_closure else []))
            value += 1
            expected += (value - expected) / 2
        assert averaged(optimizer)['0.0'].cpu().unique().tolist() == [expected]


def _on_each_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(60, exit=True)  # a process that waits for the other for ever says where
    store, patience = f'file://{folder}/store', timedelta(seconds=30)
    dist.init_process_group('gloo', init_method=store, rank=rank, world_size=2, timeout=patience)
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    nn.init.ones_(model[0].weight)
    wrapped = DistributedDataParallel(model)
    optimizer = EMAOptimizer(sgd(wrapped), decay=0.5, model=wrapped)
    for index in range(4):
        inputs, labels = batch(index)
        half = slice(4 * rank, 4 * rank + 4)
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(inputs[half]), labels[half]).backward()
        optimizer.step()
    with optimizer.swap_ema_weights():
        during = weights(model)
    torch.save([averaged(optimizer), weights(model), during, optimizer.state_dict()], f'{folder}/{rank}.new')
    Path(folder, f'{rank}.new').rename(Path(folder, f'{rank}.pt'))
    while not Path(folder, f'{1 - rank}.pt').exists():
        time.sleep(0.01)
    # Torch 2.13's DDP, destroyed, joins gloo's threads while it holds the interpreter's lock, which they may wait for.
    os._exit(0)


def test_on_two_processes_every_rank_has_the_average_of_the_whole_batch(tmp_path):
    mp.start_processes(_on_each_rank, args=(str(tmp_path),), nprocs=2, start_method='spawn')
    ranks = [torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in (0, 1)]
    for first, second in zip(*ranks, strict=True):
        assert_same(first, second)
    average, trained, during, state = ranks[0]
    assert list(average) == ['0.weight']
    assert same_bits(average, during)

    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    nn.init.ones_(model[0].weight)
    alone = EMAOptimizer(sgd(model), decay=0.5, model=model)
    train(model, alone, range(4))
    # A mean of two means rounds differently from the mean of all.
    torch.testing.assert_close(trained, weights(model), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(average, averaged(alone), rtol=1e-5, atol=1e-6)
    alone.load_state_dict(state)
    assert same_bits(averaged(alone), average)


needs_composer = pytest.mark.skipif(importlib.util.find_spec('composer') is None, reason='needs Composer')


@needs_composer
def test_composers_trainer_takes_the_wrapped_optimizer_and_trains_the_same(tmp_path):
    import toy

    def run(optimizer: torch.optim.Optimizer, model: nn.Module, **arguments) -> None:
        trainer = toy.make_trainer(model=model, optimizers=optimizer, **arguments)
        trainer.fit()
        trainer.close()

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Composer's own
        bare, model, resumed_model = toy.make_model(), toy.make_model(), toy.make_model()
        run(toy.make_optimizer(bare), bare)
        optimizer = EMAOptimizer(toy.make_optimizer(model), decay=0.5)
        run(optimizer, model, save_folder=str(tmp_path), save_interval='1ep', save_filename='ep{epoch}.pt')
        assert toy.bits(model) == toy.bits(bare)
        assert optimizer.num_steps == optimizer.shadow.num_updates == 2 * toy.EPOCH
        with optimizer.swap_ema_weights():
            assert toy.bits(model) != toy.bits(bare)

        resumed = EMAOptimizer(toy.make_optimizer(resumed_model), decay=0.5)
        run(resumed, resumed_model, load_path=str(tmp_path / 'ep1.pt'))
        assert toy.bits(resumed_model) == toy.bits(bare)
        assert resumed.num_steps == 2 * toy.EPOCH
        assert same_bits(averaged(resumed), averaged(optimizer))
