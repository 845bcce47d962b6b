"""Averages of sharded models in plain PyTorch, over gloo: every way to share a model, on 2 and 4 ranks."""

from __future__ import annotations

import pytest
import torch
from sharded import ranks
from sharded_checks import BATCHES, act_alone, act_on_gathered, follow, histories, lend, read, round_trip
from sharded_models import CASES

ON = [(name, count) for name, case in CASES.items() for count in case.ranks]

pytestmark = [pytest.mark.slow, pytest.mark.parametrize(('name', 'count'), ON)]


def test_average_follows_the_formula_on_gathered_weights(name, count):
    seen = ranks(count)(follow, name, count)
    assert CASES[name].claim([rank['facts'] for rank in seen])
    for rank in seen:
        assert len(rank['differences']) == BATCHES * len(rank['tracked'])
        assert max(rank['differences']) <= 3e-7
        assert not rank['misplaced']
        assert set(rank['trainable']) <= set(rank['tracked'])
        assert rank['dtypes'] == {torch.float32}


def test_training_weights_are_those_without_an_average_to_the_bit(name, count):
    seen = ranks(count)(histories, name, count)
    for rank in seen:
        assert rank['beside'] == rank['without']
        assert len(rank['without']) == BATCHES
    assert any(rank['without'][0] != rank['without'][-1] for rank in seen)


def test_evaluation_is_that_of_the_gathered_average_and_every_bit_returns(name, count):
    for rank in ranks(count)(lend, name, count):
        assert rank['returned'] == dict.fromkeys(rank['returned'], True)
        assert max(rank['differences']) <= 1e-6
        assert rank['from training'] > 1e-3  # else nothing would have been shown


def test_rank_0_alone_updates_lends_saves_and_loads(name, count):
    assert ranks(count)(act_alone, name, count) == [True] * count


def test_nothing_is_sent_where_an_evaluation_has_left_the_root_gathered(name, count):
    assert ranks(count)(act_on_gathered, name, count) == [True] * count


def test_a_state_returns_also_while_it_stands_in_the_model_or_comes_in_one_piece(name, count):
    for rank in ranks(count)(round_trip, name, count):
        assert rank == dict.fromkeys(rank, True)
        assert len(rank) == 5


def test_what_is_read_from_an_average_is_what_its_gathered_self_says(name, count):
    for rank in ranks(count)(read, name, count):
        assert rank['distance'] == pytest.approx(rank['expected distance'], rel=1e-6)
        assert rank['expected distance'] > 1e-3
        assert rank['state dict is the average']
        assert rank['copy is the average']
