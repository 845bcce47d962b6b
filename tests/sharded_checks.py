"""What a rank does in the tests of sharded averages: it trains one case and returns what the test asserts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from sharded import Silence, averages_of, bits_of, difference, gathered, local, tensors_of, whole
from sharded_models import CASES, Run, facts_of
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from composer_ema import ShadowModel
from composer_ema.model.wrappers import canonical_name

BATCHES = 8
WEIGHTS = (0.5, 0.1, 0.25, 0.4, 0.05, 0.3, 0.2, 0.15)


def follow(name: str, count: int) -> dict[str, Any]:
    """The differences from the formula in float64 on gathered weights after every batch, and the shadow's layout."""
    run = Run(CASES[name], count)
    facts = facts_of(run.model)
    shadow = ShadowModel(run.model)
    tracked = [name for name, _ in [*shadow.named_parameters(), *shadow.named_buffers()]]
    expected = {name: whole(tensor).double() for name, tensor in tensors_of(run.model).items()}
    differences, misplacements = [], set()
    for index in range(BATCHES):
        run.step(index)
        if index % 3 == 1:
            run.evaluate()  # leaves the root of FSDP2 gathered
        if index == 4:
            run.load_own_state()  # moves uneven shards
        shadow.update(run.model, weight=WEIGHTS[index])
        run.reshard()
        live, averages = tensors_of(run.model), averages_of(shadow)
        misplacements |= misplaced(shadow, run.model)
        for name, average in averages.items():
            now = whole(live[name])
            old = expected[name]
            expected[name] = old + WEIGHTS[index] * (now.double() - old) if now.is_floating_point() else now.double()
            differences.append(difference(whole(average), expected[name], now))
    return {
        'facts': facts,
        'differences': differences,
        'misplaced': misplacements,
        'tracked': tracked,
        'trainable': [name for name, fact in facts.items() if fact.is_trainable],
        'dtypes': {tensor.dtype for _, tensor in shadow.named_parameters()},
    }


def histories(name: str, count: int) -> dict[str, Any]:
    """This rank's weights after every batch, without an average, and with one that is lent and saved."""
    alone = Run(CASES[name], count)
    without = []
    for index in range(BATCHES):
        alone.step(index)
        alone.reshard()
        without.append(bits_of(tensors_of(alone.model)))
    run = Run(CASES[name], count)
    shadow = ShadowModel(run.model)
    beside = []
    for index in range(BATCHES):
        run.step(index)
        shadow.update(run.model, weight=WEIGHTS[index])
        if index % 2:
            with shadow.swapped(run.model):
                run.evaluate()
                shadow.state_dict()
        shadow.state_dict()
        run.reshard()
        beside.append(bits_of(tensors_of(run.model)))
    return {'without': without, 'beside': beside}


def lend(name: str, count: int) -> dict[str, Any]:
    """What the average answers, beside its gathered self in one piece; and whether every bit came back."""
    run, shadow = _averaged(name, count)
    before = bits_of(tensors_of(run.model))
    own, averages = gathered(tensors_of(run.model)), gathered(averages_of(shadow))
    expected = run.evaluate(run.whole_with({**own, **averages}))
    training = run.evaluate()

    def returned() -> bool:
        return bits_of(tensors_of(run.model)) == before

    with shadow.swapped(run.model):  # whose root the evaluation above has left gathered
        answer = run.evaluate()
        again = run.evaluate()
    seen = {'after an evaluation': returned()}
    for grad in (False, True):
        run.evaluate()
        with shadow.swapped(run.model):
            raised = _raises_inside(run, grad=grad)
        seen[f'after a forward that raised, {grad=}'] = raised and returned()
    with shadow.swapped(run.model):
        last = run.evaluate()
    seen['at last'] = returned()
    run.step(3)
    return {
        'returned': seen,
        'differences': [difference(each, expected) for each in (answer, again, last)],
        'from training': difference(training, expected),
    }


def act_alone(name: str, count: int) -> bool:
    """Rank 0 makes, updates, lends, saves and loads an average that no other rank has; then all go on training."""
    run = Run(CASES[name], count)
    run.step(0)
    if torch.distributed.get_rank() == 0:
        _do_all(run)
    run.step(1)
    return True


def act_on_gathered(name: str, count: int) -> bool:
    """As rank 0 alone above, but on all ranks, since FSDP2 has left the root gathered on all of them."""
    run = Run(CASES[name], count)
    run.step(0)
    run.evaluate()
    _do_all(run)
    run.step(1)
    return True


def round_trip(name: str, count: int) -> dict[str, bool]:
    """States on one rank, through memory: of an average, and of one that stands in the model."""
    run, shadow = _averaged(name, count)
    average, training = bits_of(averages_of(shadow)), bits_of(tensors_of(run.model))
    other = ShadowModel(run.model)
    other.load_state_dict(copy.deepcopy(shadow.state_dict()))
    seen = {'loads': bits_of(averages_of(other)) == average and other.num_updates == 3}
    other = ShadowModel(run.model)
    other.load_state_dict(gathered(shadow.state_dict()))
    seen['loads what is whole'] = bits_of(averages_of(other)) == average and not misplaced(other, run.model)

    shadow.swap_in(run.model)
    state, shown = copy.deepcopy(shadow.state_dict()), copy.deepcopy(run.model.state_dict())
    shadow.swap_out(run.model)
    resumed = Run(CASES[name], count)
    resumed.model.load_state_dict(shown)
    third = ShadowModel(resumed.model)
    third.load_state_dict(state)
    seen['is in the model again'] = third.is_swapped
    third.swap_out(resumed.model)
    seen['training weights return'] = bits_of(tensors_of(resumed.model)) == training
    seen['average stays'] = bits_of(averages_of(third)) == average
    return seen


def read(name: str, count: int) -> dict[str, Any]:
    """The distance, the state dict and the copy of an average, beside what its gathered self gives."""
    run = Run(CASES[name], count)
    shadow = ShadowModel(run.model)
    run.step(0)
    shadow.update(run.model, weight=0.5)
    run.step(1)
    run.reshard()
    live, averages = gathered(tensors_of(run.model)), gathered(averages_of(shadow))
    parameters = [(averages[name].double(), live[name].double()) for name, _ in shadow.named_parameters()]
    between = sum(float((average - weight).square().sum()) for average, weight in parameters)
    norm = sum(float(weight.square().sum()) for _, weight in parameters)
    run.evaluate()
    distance = float(shadow.relative_distance(run.model))
    state = gathered(shadow.averaged_state_dict(run.model))
    shadow.copy_to(run.model)
    copied = gathered(tensors_of(run.model))
    expected = {name: averages[name].to(live[name].dtype) for name in averages}
    return {
        'distance': distance,
        'expected distance': (between / norm) ** 0.5,
        'state dict is the average': all(
            torch.equal(tensor, expected[canonical_name(name)])
            for name, tensor in state.items()
            if canonical_name(name) in expected
        )
        and expected.keys() <= set(map(canonical_name, state)),
        'copy is the average': all(torch.equal(copied[name], expected[name]) for name in expected),
    }


def _averaged(name: str, count: int) -> tuple[Run, ShadowModel]:
    """A run of three batches, and the average of its weights."""
    run = Run(CASES[name], count)
    shadow = ShadowModel(run.model)
    for index in range(3):
        run.step(index)
        shadow.update(run.model, weight=WEIGHTS[index])
    run.reshard()
    return run, shadow


def _do_all(run: Run) -> None:
    """All that must not be a collective call."""
    with Silence():
        shadow = ShadowModel(run.model)
        shadow.update(run.model, smoothing=0.5)
        shadow.swap_in(run.model)
        shadow.state_dict()
        shadow.swap_out(run.model)
        shadow.load_state_dict(shadow.state_dict())
        shadow.averaged_state_dict(run.model)
        shadow.update(run.model, smoothing=0.5)


def misplaced(shadow: ShadowModel, model: nn.Module) -> set[str]:
    """The names of the averages that this rank does not hold as it holds the model's tensor."""
    live = tensors_of(model)
    return {name for name, average in averages_of(shadow).items() if _layout(average) != _layout(live[name])}


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    shared = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ()
    return *shared, tensor.shape, tensor.stride(), local(tensor).shape


def _raises_inside(run: Run, *, grad: bool) -> bool:
    """Whether a forward pass got as far as the last layer, which refuses to run."""

    def refuse(module: nn.Module, inputs: Any) -> None:
        raise ArithmeticError('an evaluation that goes wrong')

    children = [child for child in run.model.modules() if isinstance(child, nn.Linear)]
    hook = children[-1].register_forward_pre_hook(refuse)
    try:
        run.evaluate(grad=grad)
    except ArithmeticError:
        return True
    finally:
        hook.remove()
    return False
