"""What of sharded averages shows in one process: DTensors over a mesh of one rank, whose part is the whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from plain import STRICT
from sharded import mesh_of_one
from sharded_checks import BATCHES, act_on_gathered, follow, histories, lend, read, round_trip

# The streams that FSDP2 of torch 2.6 asks for have no counterpart on a CPU.
FSDP2 = pytest.mark.skipif(torch.__version__ < (2, 7), reason='FSDP2 of torch 2.6 needs an accelerator')
#: One of each kind: FSDP2 with its root's own group, buffers, ties, frozen and plain parameters; tensor parallelism.
NAMES = (
    *(pytest.param(name, marks=FSDP2) for name in ('uneven, one group', 'BatchNorm', 'tied')),
    *(pytest.param(name, marks=FSDP2) for name in ('frozen', 'ignored', 'bfloat16')),
    'columns and rows',
)

pytestmark = [
    STRICT,
    pytest.mark.filterwarnings('ignore:DTensor random operators may not'),  # of torch 2.6
    pytest.mark.usefixtures('_group'),
]


@pytest.fixture(scope='module')
def _group() -> Iterator[None]:
    with mesh_of_one():
        yield


@pytest.mark.parametrize('name', NAMES)
class TestOneRank:
    def test_the_average_follows_the_formula_and_lies_as_its_parameter_does(self, name):
        seen = follow(name, 1)
        assert any(fact.placements is not None for fact in seen['facts'].values())
        assert len(seen['differences']) == BATCHES * len(seen['tracked'])
        assert max(seen['differences']) <= 3e-7
        assert not seen['misplaced']

    def test_training_weights_are_those_without_an_average_to_the_bit(self, name):
        seen = histories(name, 1)
        assert seen['beside'] == seen['without']
        assert seen['without'][0] != seen['without'][-1]

    def test_evaluation_is_that_of_the_average_and_every_bit_returns(self, name):
        seen = lend(name, 1)
        assert seen['returned'] == dict.fromkeys(seen['returned'], True)
        assert max(seen['differences']) <= 1e-6
        assert seen['from training'] > 1e-3

    def test_a_state_returns_also_while_it_stands_in_the_model_or_comes_in_one_piece(self, name):
        assert set(round_trip(name, 1).values()) == {True}

    def test_nothing_is_sent_where_an_evaluation_has_left_the_root_gathered(self, name):
        assert act_on_gathered(name, 1)

    def test_what_is_read_from_an_average_is_what_its_gathered_self_says(self, name):
        seen = read(name, 1)
        assert seen['distance'] == pytest.approx(seen['expected distance'], rel=1e-6)
        assert seen['state dict is the average']
        assert seen['copy is the average']
