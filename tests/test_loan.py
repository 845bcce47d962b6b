"""The loan belongs to the model: averages come and go in any order, and its training weights come back, bit for bit."""

import copy
import gc
import io
import itertools
import os
import pickle
import random
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from composer_ema import EMAOptimizer, ShadowModel, compute_ema, update_bn
from composer_ema.shadow import loan

TRAINING = {'a': 4.0, 'b': 2.0, 'c': 8.0}


class Net(nn.Module):
    """A parameter, BatchNorm and a counter, all of which tell training weights from averages by their values."""

    def __init__(self, value: float = 8.0) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        with torch.no_grad():
            for tensor in (*self.parameters(), self.norm.running_mean, self.norm.running_var):
                tensor.fill_(value)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(inputs))

    @property
    def value(self) -> float:
        (value,) = {tensor.item() for tensor in self.linear.weight.flatten()}
        return value


def average_of(net: nn.Module, value: float, **settings) -> ShadowModel:
    """A shadow of ``net`` that holds ``value`` everywhere."""
    shadow = ShadowModel(net, **settings)
    with torch.no_grad():
        for tensor in (*shadow.parameters(), *shadow.buffers()):
            tensor.fill_(value)
    return shadow


def bits(net: nn.Module) -> dict[str, bytes]:
    return {name: t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in net.state_dict().items()}


@contextmanager
def interrupted_once(monkeypatch) -> Iterator[None]:
    """Interrupts the first copy into a model after its first tensor; later copies work."""
    real, calls = torch._foreach_copy_, []

    def copy(targets, values):
        calls.append(len(targets))
        if len(calls) == 1:
            real(targets[:1], values[:1])
            raise KeyboardInterrupt
        real(targets, values)

    with monkeypatch.context() as patched:
        patched.setattr(torch, '_foreach_copy_', copy)
        yield


def orders(count: int) -> list[tuple[str, ...]]:
    """Every order in which averages enter and leave, each once: ``('+0', '+1', '-0', '-1')``."""
    steps = [f'{sign}{index}' for index in range(count) for sign in '+-']
    return [
        order
        for order in itertools.permutations(steps)
        if all(order.index(f'+{index}') < order.index(f'-{index}') for index in range(count))
    ]


@pytest.mark.parametrize('count', [1, 2, 3])
def test_in_every_order_of_entering_and_leaving_the_last_to_enter_shows_and_the_training_weights_return(count):
    net = Net()
    before = bits(net)
    shadows = [average_of(net, float(index)) for index in range(count)]
    for order in orders(count):
        inside: list[int] = []
        for step in order:
            index = int(step[1:])
            if step[0] == '+':
                shadows[index].swap_in(net)
                inside.append(index)
            else:
                shadows[index].swap_out(net)
                inside.remove(index)
            assert net.value == (inside[-1] if inside else 8.0)
            assert [shadow.is_swapped for shadow in shadows] == [index in inside for index in range(count)]
        assert bits(net) == before
        assert not loan.borrowers(net)


def test_blocks_that_overlap_end_with_the_training_weights():
    net = Net()
    before = bits(net)
    first, second = average_of(net, 1.0), average_of(net, 2.0)
    with first.swapped(net):
        second.swap_in(net)
    assert net.value == 2.0
    second.swap_out(net)
    assert bits(net) == before


def test_averages_of_different_tensors_show_only_their_own():
    net = Net()
    before = bits(net)
    whole, weights, biases = (
        average_of(net, 1.0),
        average_of(net, 2.0, include='weight'),
        average_of(net, 3.0, include='bias'),
    )
    whole.swap_in(net)
    weights.swap_in(net)
    assert net.linear.weight.unique().tolist() == [2.0]
    assert net.linear.bias.unique().tolist() == [8.0], 'as if the last to enter were alone'
    biases.swap_in(net)
    assert (net.linear.weight.unique().tolist(), net.linear.bias.unique().tolist()) == ([8.0], [3.0])
    weights.swap_out(net)
    whole.swap_out(net)
    assert (net.linear.weight.unique().tolist(), net.linear.bias.unique().tolist()) == ([8.0], [3.0])
    biases.swap_out(net)
    assert bits(net) == before


def test_an_average_that_shows_again_shows_its_latest_value():
    net = Net()
    first, second = average_of(net, 1.0), average_of(net, 2.0)
    first.swap_in(net)
    second.swap_in(net)
    with torch.no_grad():
        for tensor in first.parameters():
            tensor.fill_(5.0)
    second.swap_out(net)
    assert net.value == 5.0
    first.swap_out(net)
    assert net.value == 8.0


@pytest.mark.parametrize(
    'update',
    [
        lambda shadow, net: shadow.update(net, smoothing=0.5),
        lambda shadow, net: compute_ema(net, shadow, smoothing=0.5),
        lambda shadow, net: compute_ema(net, copy.deepcopy(net), smoothing=0.5),
    ],
    ids=['update', 'compute_ema into a shadow', 'compute_ema into a module'],
)
def test_no_update_averages_an_average(update):
    net = Net()
    inside, other = average_of(net, 1.0), average_of(net, 2.0)
    inside.swap_in(net)
    with pytest.raises(RuntimeError, match=r'holds an average.*ShadowModel.*swap_out'):
        update(other, net)
    assert {tensor.item() for parameter in other.parameters() for tensor in parameter.flatten()} == {2.0}
    assert other.num_updates == 0
    inside.swap_out(net)
    other.update(net, smoothing=0.5)
    assert next(other.parameters()).unique().tolist() == [5.0]


def test_a_function_is_not_called_on_an_average():
    net = Net()
    called = []
    shadow = ShadowModel(net, avg_fn=lambda averaged, current, count: called.append(current) or averaged)
    with average_of(net, 1.0).swapped(net), pytest.raises(RuntimeError, match='holds an average'):
        shadow.update(net)
    assert not called


def test_an_optimizer_takes_no_step_from_an_average_that_another_shadow_lent():
    net = Net()
    for optimizer in (
        EMAOptimizer(torch.optim.SGD(net.parameters(), lr=1.0), model=net),
        EMAOptimizer(torch.optim.SGD(net.parameters(), lr=1.0)),
    ):
        shadow = average_of(net, 1.0)
        for steps in range(2):
            net.zero_grad()
            net(torch.randn(4, 2)).sum().backward()
            before, state = bits(net), optimizer.state_dict()
            with shadow.swapped(net):
                for call in (optimizer.step, lambda: optimizer.load_state_dict(state)):  # noqa: B023
                    with pytest.raises(RuntimeError, match='holds an average'):
                        call()
            assert bits(net) == before
            assert optimizer.num_steps == steps
            optimizer.step()


def test_an_optimizers_average_and_a_shadow_take_turns_in_any_order():
    net = Net()
    before = bits(net)
    optimizer = EMAOptimizer(torch.optim.SGD(net.parameters(), lr=1.0), model=net)
    shadow = average_of(net, 1.0)
    block = optimizer.swap_ema_weights()
    block.__enter__()
    shadow.swap_in(net)
    block.__exit__(None, None, None)
    assert net.value == 1.0
    shadow.swap_out(net)
    assert bits(net) == before


@pytest.mark.parametrize('order', orders(2))
def test_averages_of_a_part_and_of_the_whole_share_a_loan(order):
    net = Net()
    before = bits(net)
    pairs = [(average_of(net, 0.0), net), (average_of(net.linear, 1.0), net.linear)]
    inside: list[int] = []
    for step in order:
        index = int(step[1:])
        shadow, module = pairs[index]
        if step[0] == '+':
            shadow.swap_in(module)
            inside.append(index)
        else:
            shadow.swap_out(module)
            inside.remove(index)
        assert net.value == (inside[-1] if inside else 8.0)
        for model in (net, net.linear):
            assert len(loan.borrowers(model)) == len(inside)
        if inside:
            for each, its_module in pairs:
                weight = 'linear.weight' if its_module is net else 'weight'
                assert each.training_weights(its_module)[weight].unique().tolist() == [8.0]
                with pytest.raises(RuntimeError, match=r'holds (an|the) average'):
                    each.update(its_module, smoothing=0.5)
                with pytest.raises(RuntimeError, match='over a stash'):
                    each.copy_to(its_module)
    assert bits(net) == before


def test_two_loans_become_one_when_an_average_of_both_comes():
    first, second = Net(1.0), Net(2.0)
    both = nn.ModuleList([first, second])
    before = bits(both)
    parts, whole = [average_of(first, 3.0), average_of(second, 4.0)], average_of(both, 5.0)
    parts[0].swap_in(first)
    parts[1].swap_in(second)
    whole.swap_in(both)
    assert (first.value, second.value) == (5.0, 5.0)
    parts[0].swap_out(first)
    whole.swap_out(both)
    assert (first.value, second.value) == (1.0, 4.0)
    parts[1].swap_out(second)
    assert bits(both) == before
    assert not loan.borrowers(both)


def test_nothing_starts_from_the_average_of_another():
    net = Net()
    with average_of(net, 1.0).swapped(net):
        for start in (lambda: ShadowModel(net), lambda: ShadowModel(net.linear)):
            with pytest.raises(RuntimeError, match='holds an average'):
                start()
        with pytest.raises(RuntimeError, match='holds an average'):
            EMAOptimizer(torch.optim.SGD(net.parameters(), lr=1.0))


def test_a_model_on_loan_is_not_overwritten_for_good():
    net = Net()
    inside, other = average_of(net, 1.0), average_of(net, 2.0)
    with inside.swapped(net):
        with pytest.raises(RuntimeError, match='holds an average'):
            other.copy_to(net)
        with pytest.raises(RuntimeError, match='holds an average'):
            inside.copy_to(net)
    assert net.value == 8.0


def test_the_distance_and_the_training_weights_are_those_of_training_whoever_is_in():
    net = Net()
    inside, other = average_of(net, 1.0), average_of(net, 4.0)
    expected = other.relative_distance(net)
    with inside.swapped(net):
        assert other.relative_distance(net) == expected > 0
        assert inside.relative_distance(net) > 0
        assert other.training_weights(net)['linear.weight'].unique().tolist() == [8.0]


def test_a_state_taken_on_loan_holds_the_training_weights_whoever_shows():
    net = Net()
    inside, other = average_of(net, 1.0), average_of(net, 2.0)
    inside.swap_in(net)
    other.swap_in(net)
    for shadow in (inside, other):
        state = shadow.state_dict()
        assert state['training_weights']['linear.weight'].unique().tolist() == [8.0]
    other.swap_out(net)
    assert 'training_weights' not in other.state_dict()
    inside.swap_out(net)


def test_a_loaded_state_that_was_saved_on_loan_gives_its_training_weights_back():
    net = Net()
    shadow = average_of(net, 1.0)
    with shadow.swapped(net):
        file = io.BytesIO()
        torch.save({'shadow': shadow.state_dict(), 'model': net.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = Net(0.0)
    resumed.load_state_dict(saved['model'])
    loaded = ShadowModel(resumed)
    loaded.load_state_dict(saved['shadow'])
    assert loaded.is_swapped
    assert resumed.value == 1.0
    other = average_of(resumed, 2.0)
    with pytest.raises(RuntimeError, match='holds the average'):
        loaded.update(resumed, smoothing=0.5)
    other.swap_in(resumed)
    loaded.swap_out(resumed)
    other.swap_out(resumed)
    assert bits(resumed) == bits(net)


def test_the_wrong_model_does_not_take_the_training_weights_of_a_loaded_state():
    net = Net()
    shadow = average_of(net, 1.0)
    with shadow.swapped(net):
        state, model = copy.deepcopy(shadow.state_dict()), copy.deepcopy(net.state_dict())
    resumed = Net(0.0)
    resumed.load_state_dict(model)
    loaded = ShadowModel(resumed)
    loaded.load_state_dict(state)
    for wrong in (nn.ReLU(), nn.Linear(3, 2)):
        with pytest.raises(RuntimeError, match='training weights of another model'):
            loaded.swap_out(wrong)
        assert loaded.is_swapped
    loaded.swap_out(resumed)
    assert bits(resumed) == bits(net)


def test_buffers_that_are_not_saved_come_back_whoever_leaves_first():
    net = Net()
    net.register_buffer('scratch', torch.full((2,), 7.0), persistent=False)
    first, second = average_of(net, 1.0), average_of(net, 2.0)
    second.swap_in(net)
    first.swap_in(net)
    second.swap_out(net)
    assert net.scratch.tolist() == [1.0, 1.0]
    first.swap_out(net)
    assert net.scratch.tolist() == [7.0, 7.0]


def test_a_model_that_is_dropped_on_loan_is_freed_whatever_refers_to_it():
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.linear.register_forward_hook(self.hook)

        def hook(self, *_: object) -> None:
            """Refers to the whole model, from a part of it."""

    model = Hooked()
    shadow = ShadowModel(model)
    shadow.swap_in(model)
    gone = [weakref.ref(model), weakref.ref(shadow)]
    del model, shadow
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


@pytest.mark.parametrize('order', ['wrapper last', 'wrapper first', 'wrapper alone'])
def test_a_wrapper_that_is_dropped_on_loan_leaves_the_training_weights_in_the_network(order):
    net = Net()
    before = bits(net)
    wrapper = nn.Sequential(net)
    of_net, of_wrapper = average_of(net, 1.0), average_of(wrapper, 2.0)
    steps = {
        'wrapper last': [(of_net, net), (of_wrapper, wrapper)],
        'wrapper first': [(of_wrapper, wrapper), (of_net, net)],
        'wrapper alone': [(of_wrapper, wrapper)],
    }[order]
    for shadow, module in steps:
        shadow.swap_in(module)
    del wrapper, module, steps
    gc.collect()
    assert not of_wrapper.is_swapped
    if order == 'wrapper alone':
        assert not loan.borrowers(net)
    else:
        assert net.value == 1.0
        assert loan.recall(net) == [repr(of_net)]
    assert bits(net) == before


def test_threads_with_models_of_their_own_do_not_disturb_one_another():
    errors: list[BaseException] = []

    def work(value: float) -> None:
        try:
            net = Net(value)
            shadow = ShadowModel(net)
            for _ in range(150):
                shadow.update(net, smoothing=0.5)
                with shadow.swapped(net):
                    assert loan.borrowers(net)
                assert net.value == value
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(float(index),)) for index in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors


def test_a_deepcopy_of_a_model_on_loan_is_a_model_of_its_own_that_holds_what_was_shown():
    net = Net()
    before = bits(net)
    shadow = average_of(net, 1.0)
    with shadow.swapped(net):
        twin = copy.deepcopy(net)
        assert not loan.borrowers(twin)
        with pytest.raises(RuntimeError, match='another model'):
            shadow.swap_out(twin)
        average_of(twin, 2.0).copy_to(twin)
    assert twin.value == 2.0
    assert bits(net) == before


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda shadow: pickle.loads(pickle.dumps(shadow))])
def test_a_copy_of_a_shadow_on_loan_is_in_no_model(duplicate):
    net = Net()
    shadow = average_of(net, 1.0)
    with shadow.swapped(net):
        twin = duplicate(shadow)
        assert not twin.is_swapped
        with pytest.raises(RuntimeError, match='nothing is swapped in'):
            twin.swap_out(net)
        assert loan.borrowers(net) == [repr(shadow)]
    assert net.value == 8.0


def test_a_model_that_is_collected_on_loan_ends_the_loan_and_the_shadow_goes_on_with_another():
    net = Net()
    shadow = average_of(net, 1.0)
    shadow.swap_in(net)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
    assert not shadow.is_swapped
    assert 'training_weights' not in shadow.state_dict()
    other = Net(3.0)
    shadow.update(other, smoothing=0)
    with shadow.swapped(other):
        assert other.value == 3.0


def test_a_shadow_that_is_dropped_on_loan_does_not_take_the_training_weights_with_it():
    net = Net()
    before = bits(net)
    other = average_of(net, 2.0)
    average_of(net, 1.0).swap_in(net)
    gc.collect()
    assert net.value == 1.0
    (who,) = loan.borrowers(net)
    assert 'ShadowModel' in who
    with other.swapped(net):
        assert net.value == 2.0
    assert net.value == 1.0
    assert loan.recall(net) == [who]
    assert bits(net) == before
    assert loan.recall(net) == []


def test_recalled_averages_are_no_longer_in():
    net = Net()
    before = bits(net)
    first, second = average_of(net, 1.0), average_of(net, 2.0)
    first.swap_in(net)
    second.swap_in(net)
    assert loan.recall(net) == [repr(first), repr(second)]
    assert bits(net) == before
    assert not first.is_swapped
    assert not second.is_swapped


@pytest.mark.parametrize('inside', [0, 1])
def test_an_exception_while_an_average_enters_leaves_what_was_shown_before(monkeypatch, inside):
    net = Net()
    before = bits(net)
    shadows = [average_of(net, 1.0), average_of(net, 2.0)]
    for shadow in shadows[:inside]:
        shadow.swap_in(net)
    shown = bits(net)
    with interrupted_once(monkeypatch), pytest.raises(KeyboardInterrupt):
        shadows[inside].swap_in(net)
    assert bits(net) == shown
    assert not shadows[inside].is_swapped
    for shadow in shadows[:inside]:
        shadow.swap_out(net)
    assert bits(net) == before


def test_an_interrupt_while_the_average_leaves_finishes_the_return(monkeypatch):
    net = Net()
    before = bits(net)
    shadow = average_of(net, 1.0)
    shadow.swap_in(net)
    with interrupted_once(monkeypatch), pytest.raises(KeyboardInterrupt):
        shadow.swap_out(net)
    assert bits(net) == before
    assert not shadow.is_swapped


@pytest.mark.parametrize('when', ['in', 'out'])
def test_a_signal_while_the_values_move_is_raised_when_all_is_as_it_was(monkeypatch, when):
    net = Net()
    before = bits(net)
    shadow = average_of(net, 1.0)
    real = torch._foreach_copy_

    def copy(*tensors):
        real(*tensors)
        os.kill(os.getpid(), signal.SIGINT)

    def block() -> None:
        if when == 'in':
            monkeypatch.setattr(torch, '_foreach_copy_', copy)
        with shadow.swapped(net):
            monkeypatch.setattr(torch, '_foreach_copy_', copy)

    with pytest.raises((KeyboardInterrupt, SystemExit)):  # Composer, once imported, makes the latter of it
        block()
    assert not shadow.is_swapped
    assert not loan.borrowers(net)
    assert bits(net) == before


@pytest.mark.parametrize('then', ['swap out', 'update', 'recall'])
def test_training_weights_that_could_not_be_copied_back_return_with_the_next_call(monkeypatch, then):
    net = Net()
    before = bits(net)
    shadow, follower = average_of(net, 1.0), ShadowModel(net)
    shadow.swap_in(net)

    def fail(*_: object) -> None:
        raise RuntimeError('the device is busy')

    with monkeypatch.context() as patched:
        patched.setattr(torch, '_foreach_copy_', fail)
        patched.setattr(torch.Tensor, 'copy_', fail)
        with pytest.raises(RuntimeError, match='busy'):
            shadow.swap_out(net)
    assert shadow.is_swapped
    assert shadow.training_weights(net)['linear.weight'].unique().tolist() == [8.0]
    if then == 'swap out':
        shadow.swap_out(net)
    elif then == 'update':
        follower.update(net, smoothing=0.0)
        assert next(follower.parameters()).unique().tolist() == [8.0]
    else:
        loan.recall(net)
    assert bits(net) == before
    assert not shadow.is_swapped


class Interrupt(BaseException):
    """What a signal handler raises, as KeyboardInterrupt is."""


class Signals:
    """Sends signals at random moments of ``work``, one or several of them, which a handler answers.

    Args:
        work: is called again and again.
        handler: called by the signals.
    """

    def __init__(self, work: Callable[[], None], handler: Callable[[], None], seed: int = 0) -> None:
        self._work, self._handler, self._random = work, handler, random.Random(seed)
        self._is_on = False
        self.answered = self.interrupted = 0

    def run(self, rounds: int, check: Callable[[], None]) -> None:
        """Does the work so many times, with ``check`` after each."""
        old = signal.signal(signal.SIGALRM, self._answer)
        try:
            for _ in range(10):
                self._work()
            span = min(self._timed() for _ in range(20))
            for _ in range(rounds):
                self._round(span, check)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)

    def _timed(self) -> float:
        start = time.perf_counter()
        self._work()
        return time.perf_counter() - start

    def _round(self, span: float, check: Callable[[], None]) -> None:
        answered, is_interrupted = self.answered, False
        try:
            try:
                self._is_on = True
                interval = self._random.choice([0.0, span]) if self._handler is interrupt else 0.0
                signal.setitimer(signal.ITIMER_REAL, max(1e-6, self._random.uniform(0, 1.2) * span), interval)
                self._work()
                self._is_on = False
            except Interrupt:
                self._is_on = False
                is_interrupted = True
                check()  # while the traceback keeps every frame alive
        except Interrupt:
            is_interrupted = True
        self._is_on = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        check()
        self.interrupted += is_interrupted
        is_raised = is_interrupted or self._handler is not interrupt or self.answered == answered
        assert is_raised or UNRAISABLE, 'an interrupt is lost'
        UNRAISABLE.clear()

    def _answer(self, *_: object) -> None:
        if self._is_on:
            self.answered += 1
            self._handler()


#: What Python could not raise: an interrupt in a callback of the garbage collector.
UNRAISABLE: list[Any] = []


def interrupt() -> None:
    raise Interrupt


def interrupt_at_random_moments(work: Callable[[], None], check: Callable[[], None]) -> None:
    signals = Signals(work, interrupt)
    signals.run(1000, check)
    assert signals.interrupted > 100


@pytest.mark.skipif(not hasattr(signal, 'setitimer'), reason='signals at random moments need setitimer')
class TestSignals:
    """At random moments of thousands of swaps."""

    @pytest.fixture(autouse=True)
    def _without_pytests_hook(self, monkeypatch):
        # An interrupt in a callback of the garbage collector goes to the hook, where the next would find pytest's.
        monkeypatch.setattr(sys, 'unraisablehook', UNRAISABLE.append)

    @pytest.mark.parametrize('kind', ['one', 'nested', 'of a part', 'optimizer'])
    def test_a_block_that_is_interrupted_leaves_the_training_weights(self, kind):
        net = Net()
        first, second, part = average_of(net, 1.0), average_of(net, 2.0), average_of(net.linear, 3.0)
        optimizer = EMAOptimizer(torch.optim.SGD(net.parameters(), lr=0.0), model=net)
        net(torch.randn(4, 2)).sum().backward()
        optimizer.step()
        before = bits(net)

        def work() -> None:
            if kind == 'one':
                with first.swapped(net):
                    pass
            elif kind == 'optimizer':
                with optimizer.swap_ema_weights():
                    pass
            else:
                inner, module = (second, net) if kind == 'nested' else (part, net.linear)
                with first.swapped(net), inner.swapped(module):
                    pass

        def check() -> None:
            assert bits(net) == before
            assert not any(shadow.is_swapped for shadow in (first, second, part, optimizer.shadow))
            assert not loan.borrowers(net)
            assert torch.is_grad_enabled()

        interrupt_at_random_moments(work, check)

    def test_an_average_is_either_in_or_out_after_an_interrupt(self):
        net = Net()
        before, shadow = bits(net), average_of(net, 1.0)

        def work() -> None:
            shadow.swap_in(net)
            shadow.swap_out(net)

        def check() -> None:
            if shadow.is_swapped:
                assert net.value == 1.0
                shadow.swap_out(net)
            assert bits(net) == before
            assert not loan.borrowers(net)

        interrupt_at_random_moments(work, check)

    def test_a_checkpoint_that_a_signal_handler_takes_holds_the_training_weights(self):
        net = Net()
        before, shadow = bits(net), average_of(net, 1.0)
        seen = set()

        def save() -> None:
            model, state = net.state_dict(), shadow.state_dict()
            seen.add('training_weights' in state)
            saved = {**model, **state.get('training_weights', {})}
            assert torch.equal(saved['linear.weight'], torch.full((2, 2), 8.0))
            assert shadow.is_swapped is ('training_weights' in state)

        def check() -> None:
            assert bits(net) == before

        def work() -> None:
            with shadow.swapped(net):
                pass

        signals = Signals(work, save)
        signals.run(600, check)
        assert seen == {False, True}

    def test_a_signal_handler_that_takes_the_average_out_has_the_last_word(self):
        net = Net()
        before, shadow, other = bits(net), average_of(net, 1.0), average_of(net, 2.0)

        def take_out() -> None:
            loan.recall(net)
            assert bits(net) == before

        def check() -> None:
            assert bits(net) == before
            assert not loan.borrowers(net)

        def work() -> None:
            with other.swapped(net):
                shadow.swap_in(net)
            loan.recall(net)

        signals = Signals(work, take_out)
        signals.run(600, check)
        assert signals.answered > 100


@pytest.mark.parametrize('kind', ['one average', 'averages of one model'])
def test_threads_that_swap_in_one_model_leave_the_training_weights(kind):
    net = Net()
    before, shared = bits(net), average_of(net, 1.0)
    shadows = [shared if kind == 'one average' else average_of(net, float(index)) for index in range(4)]
    errors: list[BaseException] = []
    swaps, refusals = itertools.count(), itertools.count()

    def work(shadow: ShadowModel) -> None:
        for _ in range(300):
            try:
                with shadow.swapped(net):
                    assert shadow.is_swapped
                    assert net.linear.weight.max() < 8.0
                    next(swaps)
            except RuntimeError as error:
                next(refusals) if 'swapped in already' in str(error) else errors.append(error)
            except BaseException as error:
                errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(shadow,)) for shadow in shadows]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert next(swaps) > 10  # of one average most are refused, on a busy machine nearly all
    assert (next(refusals) > 0) is (kind == 'one average')
    assert not any(shadow.is_swapped for shadow in shadows)
    assert bits(net) == before


def test_the_collector_does_not_wait_for_a_thread_that_swaps():
    net = Net()
    before = bits(net)
    wrappers = [nn.Sequential(net)]
    shadow, follower = average_of(wrappers[0], 1.0), ShadowModel(net)
    shadow.swap_in(wrappers[0])
    thread = threading.Thread(target=lambda: (wrappers.clear(), gc.collect()), daemon=True)
    with loan._lock:  # as in the middle of a swap
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    assert not shadow.is_swapped
    follower.update(net, smoothing=0.0)  # puts right what nobody did
    assert bits(net) == before
    assert {tensor.item() for parameter in follower.parameters() for tensor in parameter.flatten()} == {8.0}


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='there is no fork here')
def test_a_forked_child_swaps_though_another_thread_swapped_when_it_was_forked():
    net = Net()
    before, shadow, ready = bits(net), average_of(net, 1.0), threading.Event()

    def hold() -> None:
        with loan._lock:
            ready.set()
            time.sleep(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)  # Python 3.12 warns of forks beside threads
        child = os.fork()
    if child == 0:
        with shadow.swapped(net):
            was_in = net.value == 1.0
        os._exit(0 if was_in and bits(net) == before else 1)
    thread.join()
    deadline = time.monotonic() + 20
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if status == (0, 0):
        os.kill(child, signal.SIGKILL)
    assert status == (child, 0)


def test_statistics_of_an_average_behind_another_are_refused():
    net = Net()
    behind, front = average_of(net, 1.0), average_of(net, 2.0)
    behind.swap_in(net)
    front.swap_in(net)
    with pytest.raises(ValueError, match='shows another average'):
        update_bn(net, [torch.randn(4, 2)], shadow=behind)
    front.swap_out(net)
    update_bn(net, [torch.randn(4, 2)], shadow=behind)
    behind.swap_out(net)
    assert net.value == 8.0


def test_a_wrapped_model_has_the_loan_of_the_module_inside():
    net = Net()
    compiled = torch.compile(net, backend='eager')
    first, second = average_of(net, 1.0), average_of(compiled, 2.0)
    first.swap_in(compiled)
    second.swap_in(net)
    first.swap_out(net)
    assert net.value == 2.0
    second.swap_out(compiled)
    assert net.value == 8.0


def test_a_model_on_loan_does_not_slow_the_updates_of_others(monkeypatch):
    net, other, target = Net(), Net(), Net()
    shadow = ShadowModel(other)
    optimizer = EMAOptimizer(torch.optim.SGD(other.parameters(), lr=1.0))
    shadow.update(other, smoothing=0.5)
    compute_ema(other, target)
    optimizer.step()
    with average_of(net, 1.0).swapped(net), monkeypatch.context() as patched:
        for name in ('named_modules', 'modules', 'named_parameters', 'named_buffers'):
            patched.setattr(nn.Module, name, lambda *args, **kwargs: pytest.fail('a module was walked'))
        shadow.update(other, smoothing=0.5)
        compute_ema(other, target)
        optimizer.step()
    assert (shadow.num_updates, optimizer.num_steps) == (2, 2)


def test_nothing_joins_an_average_at_the_value_of_another():
    net = Net()
    net.linear.requires_grad_(False)
    shadow = ShadowModel(net)
    with average_of(Net(), 1.0).swapped(net):
        net.linear.requires_grad_(True)
        with pytest.raises(RuntimeError, match='holds an average'):
            shadow.update(net, smoothing=0.5)
    assert 'linear.weight' not in dict(shadow.named_parameters())
    shadow.update(net, smoothing=0.5)
    assert dict(shadow.named_parameters())['linear.weight'].unique().tolist() == [8.0]


def lent_by(**buffers: torch.Tensor) -> tuple[nn.Linear, ShadowModel]:
    """A layer of ones with these buffers, and an average of it whose parameters are threes."""
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1.0)
    for name, buffer in buffers.items():
        layer.register_buffer(name, buffer)
    shadow = ShadowModel(layer)
    with torch.no_grad():
        for tensor in shadow.parameters():
            tensor.fill_(3.0)
    return layer, shadow


@pytest.mark.parametrize(
    ('replace', 'what'),
    [
        (lambda old: torch.empty(0), r'has shape \(0,\) in place of \(2, 2\)'),
        (lambda old: old.to('meta'), 'is on the meta device'),
        (lambda old: old.to(torch.complex64), 'is torch.complex64 in place of torch.float32'),
        (lambda old: old[:1, :1].expand(2, 2), 'has elements that share memory'),
        (lambda old: old.to_sparse(), 'is stored as torch.sparse_coo'),
    ],
    ids=['no memory', 'meta', 'complex', 'expanded', 'sparse'],
)
@pytest.mark.parametrize('leave', ['block', 'swap_out', 'recall'])
def test_the_training_value_of_a_parameter_that_cannot_take_it_waits_until_the_parameter_is_back(replace, what, leave):
    layer, shadow = lent_by()
    before, kept = bits(layer), layer.weight

    def change() -> None:
        layer.weight = nn.Parameter(replace(kept.detach()))

    def block() -> None:
        with shadow.swapped(layer):
            change()

    if leave != 'block':
        shadow.swap_in(layer)
        change()
    leaving = {'block': block, 'swap_out': lambda: shadow.swap_out(layer), 'recall': lambda: loan.recall(layer)}[leave]
    with pytest.raises(RuntimeError, match=f'weight cannot be overwritten: weight {what}.*Put it back.*swap_out'):
        leaving()
    assert shadow.is_swapped
    assert layer.bias.tolist() == [3.0, 3.0], 'nothing has left'
    assert shadow.training_weights(layer)['weight'].unique().tolist() == [1.0]
    layer.weight = kept
    shadow.swap_out(layer)
    assert bits(layer) == before


def test_the_training_value_of_a_parameter_whose_memory_is_away_waits():
    layer, shadow = lent_by()
    before = bits(layer)
    shadow.swap_in(layer)
    kept = {name: parameter.data for name, parameter in layer.named_parameters()}
    for parameter in layer.parameters():
        parameter.data = torch.empty(0)
    with pytest.raises(RuntimeError, match='bias and 1 more parameter cannot be overwritten'):
        shadow.swap_out(layer)
    for name, parameter in layer.named_parameters():
        parameter.data = kept[name]
    shadow.swap_out(layer)
    assert bits(layer) == before


def test_a_parameter_of_another_dtype_of_the_same_kind_gets_its_training_value():
    layer, shadow = lent_by()
    with shadow.swapped(layer):
        layer.double()
        layer.bias = nn.Parameter(torch.zeros(2))
    assert (layer.weight.dtype, layer.weight.unique().tolist(), layer.bias.tolist()) == (torch.float64, [1.0], [1, 1])


def test_names_do_not_change_while_the_training_weights_of_a_loaded_state_go_by_the_old_ones():
    layer, shadow = lent_by()
    with shadow.swapped(layer):
        state, model = copy.deepcopy(shadow.state_dict()), copy.deepcopy(layer.state_dict())
    resumed = nn.Linear(2, 2)
    resumed.load_state_dict(model)
    loaded = ShadowModel(resumed)
    loaded.load_state_dict(state)
    renamed = nn.Linear(2, 2)
    renamed.w, renamed.bias = resumed.weight, resumed.bias
    del renamed.weight
    for changes in ({'renamed': {'weight': 'w'}}, {'leaving': True}):
        with pytest.raises(RuntimeError, match=r'loaded state.*old names.*swap_out\(model\) before names change'):
            loaded.resolve(renamed, **changes)
        assert [name for name, _ in loaded.named_parameters()] == ['weight', 'bias']
    loaded.swap_out(resumed)
    assert bits(resumed) == bits(layer)
    loaded.resolve(renamed, renamed={'weight': 'w'})


@pytest.mark.parametrize(
    'make',
    [
        lambda: torch.tensor([7, 8, 9]),
        lambda: torch.tensor([True, False, True]),
        lambda: torch.tensor([1j, 2j, 3j]),
        lambda: torch.tensor([7.0, 8.0]),
        lambda: torch.tensor([7.0]).expand(3),
        lambda: torch.tensor([0.0, 7.0, 0.0]).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.zeros(3, device='meta'),
    ],
    ids=['whole', 'bool', 'complex', 'shape', 'expanded', 'sparse', 'sparse csr', 'meta'],
)
def test_a_buffer_that_was_replaced_by_one_of_another_kind_keeps_its_new_value(make):
    layer, shadow = lent_by(c=torch.full((3,), 0.5))
    before, new = bits(layer), make()
    with shadow.swapped(layer):
        layer.c = new
        if not new.is_meta:
            saved = shadow.averaged_state_dict(layer)['c']
            assert (saved.dtype, saved.shape, saved.layout) == (new.dtype, new.shape, new.layout)
    assert layer.c is new
    assert new.is_meta or torch.equal(new.to_dense(), make().to_dense())
    layer.c = torch.full((3,), 0.5)
    assert bits(layer) == before
    assert not shadow.is_swapped


def test_a_buffer_that_was_replaced_by_one_of_the_same_kind_gets_its_training_value():
    layer, shadow = lent_by(c=torch.full((3,), 0.5))
    with shadow.swapped(layer):
        layer.c = torch.tensor([7.0, 8.0, 9.0], dtype=torch.float64)
    assert layer.c.tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize('is_frozen', [False, True])
def test_a_buffer_that_has_become_an_alias_of_other_memory_is_not_written(is_frozen):
    layer, shadow = lent_by(b=torch.full((3,), 0.5))
    layer.frozen = nn.Parameter(torch.full((4,), 5.0), requires_grad=False)
    with shadow.swapped(layer):
        layer.b = (layer.frozen if is_frozen else layer.weight).data.view(-1)[:3]
    assert layer.weight.unique().tolist() == [1.0]
    assert layer.frozen.unique().tolist() == [5.0]
    assert layer.b.tolist() == [5.0 if is_frozen else 1.0] * 3


def test_a_buffer_that_is_a_view_of_a_parameter_shows_what_the_parameter_shows():
    layer = nn.Linear(2, 2)
    layer.register_buffer('v', layer.weight.data.view(-1))
    shadow = ShadowModel(layer)
    before = bits(layer)
    with torch.no_grad():
        for tensor in shadow.parameters():
            tensor.fill_(3.0)
    with shadow.swapped(layer):
        assert layer.weight.unique().tolist() == [3.0]
        assert layer.v.unique().tolist() == [3.0]
    assert bits(layer) == before
    shadow.copy_to(layer)
    assert layer.weight.unique().tolist() == [3.0]


@pytest.mark.parametrize(
    'make',
    [
        lambda: torch.full((1,), 7.0).expand(2, 2),
        lambda: torch.eye(2).to_sparse(),
        lambda: torch.eye(2).to_sparse_csr(),
    ],
    ids=['expanded', 'sparse', 'sparse csr'],
)
def test_a_buffer_that_cannot_be_written_is_not_lent(make):
    layer, shadow = lent_by(mask=torch.zeros(2, 2))
    layer.mask = make()
    for _ in range(2):
        with shadow.swapped(layer):
            assert layer.weight.unique().tolist() == [3.0]
            assert torch.equal(layer.mask.to_dense(), make().to_dense())
        assert layer.weight.unique().tolist() == [1.0]
        assert torch.equal(shadow.averaged_state_dict(layer)['mask'].to_dense(), make().to_dense())
        shadow.update(layer, smoothing=1.0)
    shadow.copy_to(layer)
    assert layer.weight.unique().tolist() == [3.0]
    assert torch.equal(layer.mask.to_dense(), make().to_dense())


def test_a_parameter_that_cannot_be_written_is_refused_by_name_before_anything_is_changed():
    layer, shadow = lent_by()
    layer.weight = nn.Parameter(torch.ones(1).expand(2, 2))
    for error, write in ((RuntimeError, shadow.swap_in), (ValueError, shadow.copy_to)):
        with pytest.raises(error, match=r'weight cannot be overwritten.*share memory.*memory of its own.*exclude'):
            write(layer)
    assert layer.bias.tolist() == [1.0, 1.0]
    assert not shadow.is_swapped
    assert not loan.borrowers(layer)
    layer.weight = nn.Parameter(torch.ones(2, 2))
    with shadow.swapped(layer):
        assert layer.weight.unique().tolist() == [3.0]


@contextmanager
def unwritable(monkeypatch, broken: torch.Tensor) -> Iterator[None]:
    """Lets every copy into the memory of ``broken`` fail."""
    pointer, real, real_copy = broken.data_ptr(), torch._foreach_copy_, torch.Tensor.copy_

    def check(targets) -> None:
        if any(target.data_ptr() == pointer for target in targets):
            raise RuntimeError('the device is lost')

    def copy_many(targets, values, **kwargs):
        check(targets)
        return real(targets, values, **kwargs)

    def copy_one(target, value, *args, **kwargs):
        check([target])
        return real_copy(target, value, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch, '_foreach_copy_', copy_many)
        patched.setattr(torch.Tensor, 'copy_', copy_one)
        yield


def use(net: Net) -> None:
    """Does with a model what asks whether it is on loan."""
    shadow = ShadowModel(net)
    shadow.update(net, smoothing=0.5)
    compute_ema(net, copy.deepcopy(net), smoothing=0.5)
    with shadow.swapped(net):
        pass
    optimizer = EMAOptimizer(torch.optim.SGD(net.parameters(), lr=0.0), model=net)
    net(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    with optimizer.swap_ema_weights():
        pass


@pytest.mark.parametrize('when', ['entry', 'exit'])
def test_what_cannot_be_written_into_one_model_is_no_error_of_another(monkeypatch, when):
    layer, shadow = lent_by()
    if when == 'exit':
        shadow.swap_in(layer)
    with unwritable(monkeypatch, layer.weight):
        with pytest.raises(RuntimeError, match='lost'):
            (shadow.swap_out if when == 'exit' else shadow.swap_in)(layer)
        use(Net())
        with pytest.raises(RuntimeError, match='lost'):
            ShadowModel(layer)
    use(Net())
    shadow.swap_out(layer)
    assert layer.weight.unique().tolist() == [1.0]
    assert not shadow.is_swapped


def test_what_cannot_be_written_into_a_model_is_dropped_with_it(monkeypatch, caplog):
    others = loan._books  # of models that other tests have left on loan
    layer, shadow = lent_by()
    shadow.swap_in(layer)
    gone = weakref.ref(layer)
    with unwritable(monkeypatch, layer.weight):
        with pytest.raises(RuntimeError, match='lost'):
            shadow.swap_out(layer)
        del layer
        gc.collect()
        assert gone() is None
        use(Net())
    assert set(loan._books.guests) <= set(others.guests)
    assert loan._books.slots.keys() <= others.slots.keys()
    assert loan._books.are_settled
    assert 'the device is lost' in caplog.text


def test_a_wrapper_that_is_collected_leaves_what_cannot_be_written_to_the_network(monkeypatch):
    net = Net()
    others, before, wrapper = loan._books, bits(net), nn.Sequential(net)
    of_net, of_wrapper = average_of(net, 1.0), average_of(wrapper, 2.0)
    of_net.swap_in(net)
    of_wrapper.swap_in(wrapper)
    with unwritable(monkeypatch, net.linear.weight):
        del wrapper
        gc.collect()
        use(Net())
        with pytest.raises(RuntimeError, match='lost'):
            of_net.swap_out(net)
    of_net.swap_out(net)
    assert bits(net) == before
    assert set(loan._books.guests) <= set(others.guests)


@pytest.mark.parametrize('buffers', ['copy', 'average'])
@pytest.mark.parametrize('kind', ['conjugated', 'negated'])
def test_buffers_that_are_lazily_conjugated_or_negated_are_lent_as_others_are(kind, buffers):
    def buffer_of(value: complex) -> torch.Tensor:
        conjugated = torch.full((3,), value, dtype=torch.complex64).conj()
        return conjugated if kind == 'conjugated' else conjugated.imag

    layer = nn.Linear(2, 2)
    layer.register_buffer('c', buffer_of(4 + 2j))
    shadow = ShadowModel(layer, buffers=buffers)
    training, average = layer.c.clone(), buffer_of(6 + 8j).clone()
    dict(shadow.named_buffers())['c'].copy_(average)
    with shadow.swapped(layer):
        assert layer.c.is_conj() or layer.c.is_neg()
        assert torch.equal(layer.c, average)
    assert torch.equal(layer.c, training)
    shadow.update(layer, smoothing=0.5)
    expected = (training + average) / 2 if buffers == 'average' else training
    assert torch.equal(dict(shadow.named_buffers())['c'], expected)
    shadow.copy_to(layer)
    assert torch.equal(layer.c, expected)
    target = nn.Linear(2, 2)
    target.register_buffer('c', buffer_of(0j))
    for smoothing in (0.5, 0.0):
        compute_ema(layer, target, smoothing=smoothing, buffers=buffers)
        assert torch.equal(target.c, expected if smoothing == 0 or buffers == 'copy' else expected / 2)


@pytest.mark.parametrize('read', [lambda optimizer: optimizer.shadow, lambda optimizer: optimizer.ema_state_dict()])
def test_an_average_that_was_made_of_the_weights_is_not_taken_for_one_in_the_model(read):
    net = Net()
    optimizer = EMAOptimizer(torch.optim.SGD(net.parameters(), lr=1.0), model=net)
    with optimizer.swap_ema_weights():
        state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    net.load_state_dict(Net(3.0).state_dict())
    read(optimizer)
    net(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    assert optimizer.num_steps == 1


def test_a_model_that_was_made_in_inference_mode_is_lent_there_and_refused_outside():
    with torch.inference_mode():
        layer, shadow = lent_by(c=torch.zeros(3))
        with shadow.swapped(layer):
            assert layer.weight.unique().tolist() == [3.0]
        assert layer.weight.unique().tolist() == [1.0]
    with pytest.raises(RuntimeError, match=r'bias and 1 more parameter cannot be overwritten.*inference_mode'):
        shadow.swap_in(layer)
    assert not shadow.is_swapped
