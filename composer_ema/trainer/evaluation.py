"""Which weights each evaluator and each prediction sees."""

from __future__ import annotations

from collections.abc import Mapping

from composer.core import Event, State

#: What an evaluator asks for that wants the training weights.
TRAINING = 'training'
#: The label of predictions.
PREDICT = 'predict'

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

    Args:
        default: what an evaluator sees that ``evaluate_with`` does not name: the label of an average.
        evaluate_with: ``default`` or ``'training'`` by evaluator label. Default: none.

    Attributes:
        evaluate_with: as given, a copy.

    Raises:
        TypeError, ValueError: ``evaluate_with`` does not map labels to weights.
    """

    def __init__(self, default: str, evaluate_with: Mapping[str, str] | None) -> None:
        self.evaluate_with = _check_evaluate_with(evaluate_with, default)
        self._default = default
        self._open_passes = 0

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
        return self.evaluate_with.get(label or '', self._default)

    def _weights_for_pass(self, state: State) -> str:
        """What callbacks see before the first evaluator starts: the average, unless no evaluator wants it."""
        labels = [evaluator.label for evaluator in state.evaluators]
        return TRAINING if labels and all(self._weights_for(each) == TRAINING for each in labels) else self._default


def _check_evaluate_with(evaluate_with: Mapping[str, str] | None, default: str) -> dict[str, str]:
    if evaluate_with is None:
        return {}
    if not isinstance(evaluate_with, Mapping):
        raise TypeError(
            f"evaluate_with must map labels to weights, such as {{'eval': {default!r}}}, got {evaluate_with!r}."
        )
    for label, weights in evaluate_with.items():
        if not isinstance(label, str):
            raise TypeError(
                f'evaluate_with maps labels, which are strings, got {label!r}. Pass the label of an evaluator.'
            )
        if weights not in (default, TRAINING):
            raise ValueError(f"evaluate_with[{label!r}] must be {default!r} or 'training', got {weights!r}.")
    return dict(evaluate_with)
