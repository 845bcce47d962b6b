"""Which weights each evaluator and each prediction sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from composer.core import Event, State

from composer_ema.run.asked import PREDICT, TRAINING, check_evaluate_with
from composer_ema.spans import ArgumentError
from composer_ema.trainer.evaluators import EachWeights, check_evaluate

_PASS_OPENS = frozenset({Event.EVAL_BEFORE_ALL, Event.EVAL_STANDALONE_START})
_PASS_CLOSES = frozenset({Event.EVAL_AFTER_ALL, Event.EVAL_STANDALONE_END})
#: Events at which an evaluation may find the training weights because a callback ran a prediction inside it.
GOES_ON = frozenset({Event.EVAL_BATCH_START, Event.EVAL_BEFORE_FORWARD, Event.EVAL_BATCH_END})
#: Events at which the weights that the model holds may have to change.
CHOOSES = _PASS_OPENS | _PASS_CLOSES | {Event.EVAL_START, Event.EVAL_END, Event.PREDICT_START, Event.PREDICT_END}


class Evaluation:
    """Answers at each event of an evaluation or prediction which weights the model must hold.

    Composer brackets the evaluators of one moment in a pass. Inside a pass each evaluator gets the weights that its
    label asks for, also after a callback ran a prediction of its own.

    Where several algorithms of a Trainer lend averages, an evaluator sees what the one that names it says. An evaluator
    that none of them names sees the first average of the first algorithm.

    Args:
        labels: of the averages that may be lent. An evaluator that ``evaluate_with`` does not name sees the first.
        evaluate_with: one of ``labels`` or ``'training'`` by evaluator label. Default: none.
        evaluate: weights, each of ``labels`` or ``'training'``, for each of which to run every evaluator that
            ``evaluate_with`` does not name. Default: none, run it once.

    Attributes:
        evaluate_with, evaluate: as given, copies.

    Raises:
        TypeError, ValueError: ``evaluate_with`` does not map labels to weights, or ``evaluate`` does not list any.
    """

    def __init__(
        self,
        labels: Sequence[str],
        evaluate_with: Mapping[str, str] | None,
        evaluate: Sequence[str] | None = None,
    ) -> None:
        self.evaluate_with = check_evaluate_with(evaluate_with, labels)
        self.evaluate = check_evaluate(evaluate, labels)
        self._each_weights = EachWeights()
        self._labels, self._default = tuple(labels), labels[0]
        self._of_all: Sequence[Evaluation] = (self,)
        self._open_passes = 0

    def stand_beside(self, others: Sequence[Evaluation]) -> None:
        """Shares the evaluators of a Trainer with the evaluations of other algorithms.

        Args:
            others: of all algorithms that lend averages, this one among them, in the order of the algorithms.

        Raises:
            ValueError: two of them want an evaluator to see different weights.
        """
        wanted: dict[str, str] = {}
        for each in others:
            for label, weights in each.evaluate_with.items():
                if wanted.setdefault(label, weights) != weights:
                    raise ArgumentError(
                        f'evaluate_with gives the evaluator {label!r} {wanted[label]!r} in one algorithm and '
                        f'{weights!r} in another, and it sees one. Name it in one of them.',
                        'evaluate_with',
                    )
        self._of_all = tuple(others)

    def split_evaluators(self, state: State) -> None:
        """Runs each evaluator of the Trainer once for each of the weights that the algorithms want evaluated.

        Called for each algorithm: the first acts for all.

        Raises:
            ValueError: two evaluators would have one label.
        """
        if self._of_all[0] is self:
            evaluate = dict.fromkeys(weights for each in self._of_all for weights in each.evaluate)
            named = {label for each in self._of_all for label in each.evaluate_with}
            self._each_weights.split(list(evaluate), named, state)

    def start_training(self, state: State) -> None:
        """Keeps Composer from drawing for evaluators that there would not be without this, until :meth:`go_on`."""
        self._each_weights.hide(state)

    def go_on(self) -> None:
        """Training has started."""
        self._each_weights.show()

    @property
    def has_to_go_on(self) -> bool:
        """Whether :meth:`go_on` must come before the next evaluation."""
        return self._each_weights.has_hidden

    @property
    def of_each_weights(self) -> Mapping[str, str]:
        """The weights that evaluators see because ``evaluate`` lists them, by label."""
        return self._of_all[0]._each_weights.weights

    def forget_evaluators(self) -> None:
        """Begins a run, which has evaluators of its own."""
        self._each_weights = EachWeights()

    @property
    def is_open(self) -> bool:
        """Whether a pass over evaluators has begun and not ended."""
        return self._open_passes > 0

    def abandon(self) -> None:
        """Forgets open passes. After an evaluation that raised, Composer never sends the event that closes it."""
        self._open_passes = 0

    def weights_at(self, event: Event, state: State) -> str:
        """Which weights the model must hold from ``event`` on: the label of an average, or ``'training'``.

        Counts the passes that open and close, so call it once for each event of :data:`CHOOSES` and :data:`GOES_ON`.
        """
        self._each_weights.observe(event, state)
        if event in _PASS_OPENS:
            self._open_passes += 1
            return self._weights_for_pass(state)
        if event is Event.PREDICT_START:
            return self._weights_for(PREDICT)
        if event is Event.EVAL_START or event in GOES_ON or (event is Event.EVAL_END and self.is_open):
            return self._weights_for(state.dataloader_label)
        # We cannot tell a pass that goes on around this one from one that raised. The one around it takes the average
        # back at its next event.
        self._open_passes -= event in _PASS_CLOSES and self.is_open
        return TRAINING

    def _weights_for(self, label: str | None) -> str:
        """What this algorithm does for an evaluator: the average to lend, or the training weights."""
        if (weights := self.of_each_weights.get(label or '')) is not None:
            return weights if weights in self._labels else TRAINING
        owner = next((each for each in self._of_all if label in each.evaluate_with), self._of_all[0])
        return owner.evaluate_with.get(label or '', owner._default) if owner is self else TRAINING

    def _weights_for_pass(self, state: State) -> str:
        """What callbacks see before the first evaluator starts: the first average that an evaluator wants."""
        labels = [evaluator.label for evaluator in state.evaluators]
        if not labels:
            return self._weights_for(None)
        for label in labels:
            for each in self._of_all:
                if (weights := each._weights_for(label)) != TRAINING:
                    return weights if each is self else TRAINING
        return TRAINING

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: a copy stands beside no others."""
        return {name: value for name, value in self.__dict__.items() if name != '_of_all'}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._of_all = (self,)
