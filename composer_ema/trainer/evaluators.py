"""One evaluator of a Trainer, run once for each of several weights.

Invariant: training draws the same random numbers as with the one evaluator.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from composer.core import Evaluator, Event, State

from composer_ema import plain
from composer_ema.run.asked import check_weights
from composer_ema.spans import ArgumentError
from composer_ema.wording import shown


class EachWeights:
    """Puts, in the place of each evaluator, one for each of the weights that ``evaluate`` lists.

    That of the weights ``'ema'`` in place of the evaluator ``'eval'`` is called ``'eval_ema'``. They share data,
    subset and interval, which is asked once for all of them. Each has metrics of its own.

    Attributes:
        weights: which weights each of these evaluators sees, by its label.
    """

    def __init__(self) -> None:
        self.weights: dict[str, str] = {}
        #: Labels of evaluators that there would not be without this; what they draw is undrawn.
        self._further: set[str] = set()
        self._drawn: Any = None
        #: The data of those evaluators while they are hidden.
        self._hidden: list[tuple[Evaluator, Any]] = []

    def split(self, evaluate: Sequence[str], named: Collection[str], state: State) -> None:
        """Replaces those evaluators of the Trainer that have not been, except those that are ``named``.

        Raises:
            ArgumentError: a label that is taken.
        """
        taken = {*named, *(evaluator.label for evaluator in state.evaluators)}
        found: list[Evaluator] = []
        for evaluator in state.evaluators:
            if not evaluate or evaluator.label in self.weights or evaluator.label in named:
                found.append(evaluator)
                continue
            metrics, interval = state.eval_metrics.pop(evaluator.label), _AskedOnce(evaluator.eval_interval)
            for index, weights in enumerate(evaluate):
                each = copy.copy(evaluator)
                each.label = f'{evaluator.label}_{weights}'
                if each.label in taken:
                    raise ArgumentError(
                        f'evaluate runs the evaluator {evaluator.label!r} as {each.label!r} for the weights '
                        f'{weights!r}, and there is an evaluator of that label already. Rename it.',
                        'evaluate',
                    )
                each.eval_interval = interval if index == 0 else interval.again
                state.eval_metrics[each.label] = metrics if index == 0 else copy.deepcopy(metrics)
                self.weights[each.label] = weights
                if index > 0:
                    self._further.add(each.label)
                found.append(each)
        state.evaluators = found

    @property
    def has_hidden(self) -> bool:
        """Whether the data of some evaluators are hidden."""
        return bool(self._hidden)

    def hide(self, state: State) -> None:
        """Hides the data of further evaluators until :meth:`show`.

        When training starts, Composer fetches a batch of each evaluator's data, and so draws (0.32.1).
        """
        self.show()
        self._hidden = [(each, each.dataloader) for each in state.evaluators if each.label in self._further]
        for each, _ in self._hidden:
            each.dataloader = SimpleNamespace(dataloader=())  # pyright: ignore[reportAttributeAccessIssue]: for a moment

    def show(self) -> None:
        """Gives hidden data back."""
        for each, data in self._hidden:
            each.dataloader = data
        self._hidden = []

    def observe(self, event: Event, state: State) -> None:
        """Keeps random numbers for training that an evaluator between the two events would draw."""
        if event is Event.EVAL_START:  # what one that raised has left is forgotten
            self._drawn = _random_states() if state.dataloader_label in self._further else None
        elif event is Event.EVAL_END and self._drawn is not None:
            drawn, self._drawn = self._drawn, None
            _restore(drawn)


class _AskedOnce:
    """Whether an evaluator is due; the answer for one serves the others that follow it."""

    def __init__(self, interval: Any) -> None:
        self._interval, self._is_due = interval, False

    def __call__(self, state: State, event: Event) -> bool:
        self._is_due = self._interval(state, event)
        return self._is_due

    def again(self, state: State, event: Event) -> bool:
        del state, event
        return self._is_due


def check_evaluate(evaluate: Sequence[str] | None, labels: Sequence[str]) -> list[str]:
    """Returns the argument ``evaluate`` as a list, empty where it is None.

    Raises:
        TypeError, ValueError: it does not list weights, each once.
    """
    if evaluate is None:
        return []
    remedy = f"Pass for example ['training', {labels[0]!r}]."
    listed = [
        check_weights('each of evaluate', each, labels)
        for each in plain.several('evaluate', evaluate, 'a list of weights', remedy)
    ]
    if not listed or len(set(listed)) < len(listed):
        raise ArgumentError(f'evaluate must list weights, each once, got {shown(evaluate)}. {remedy}', 'evaluate')
    return listed


def _random_states() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), cuda


def _restore(states: tuple[Any, ...]) -> None:
    of_python, of_numpy, of_torch, of_cuda = states
    random.setstate(of_python)
    numpy.random.set_state(of_numpy)
    torch.set_rng_state(of_torch)
    if of_cuda is not None:
        torch.cuda.set_rng_state_all(of_cuda)
