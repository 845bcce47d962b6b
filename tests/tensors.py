"""Models as dictionaries of tensors: copied, compared and averaged by hand; and a Composer State without a Trainer."""

from __future__ import annotations

import itertools

import torch
from composer.core import State
from composer.devices import DeviceCPU


def all_tensors(model) -> dict[str, torch.Tensor]:
    return {name: t.detach() for name, t in itertools.chain(model.named_parameters(), model.named_buffers())}


def copies(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in all_tensors(model).items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def mixed(average, model, smoothing: float) -> dict[str, torch.Tensor]:
    """The formula; counters are copied."""
    return {
        name: smoothing * tensor + (1 - smoothing) * model[name] if tensor.is_floating_point() else model[name]
        for name, tensor in average.items()
    }


def assert_close(got, expected, **tolerances) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            got[name], tensor.to(got[name].dtype), **tolerances, msg=lambda text, n=name: f'{n}: {text}'
        )


def state_by_hand(model) -> State:
    return State(
        model=model,
        rank_zero_seed=0,
        run_name='by-hand',
        device=DeviceCPU(),
        device_train_microbatch_size=1,
        max_duration='100ep',
    )
