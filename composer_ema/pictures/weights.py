"""The sets of weights that a run evaluates: their order, and what a reader calls them.

A run names them itself: what the evaluator ``eval_<label>`` sees has the name ``<label>``.
"""

from __future__ import annotations

from collections.abc import Iterable

#: The label of the weights that the optimizer steps.
TRAINING = 'training'
#: The label of an evaluator that Composer named ``eval`` by itself: nothing says which weights it sees.
UNNAMED = 'eval'


def in_order(labels: Iterable[str]) -> list[str]:
    """Each label once: the training weights first, then the others in the order given.

    Example:
        >>> in_order(['slow', 'training', 'fast', 'slow'])
        ['training', 'slow', 'fast']
    """
    return sorted(dict.fromkeys(labels), key=lambda label: label != TRAINING)


def averages(labels: Iterable[str]) -> list[str]:
    """The labels of averages, each once, in the order given."""
    return [label for label in dict.fromkeys(labels) if label not in (TRAINING, UNNAMED)]


def in_words(labels: Iterable[str]) -> dict[str, str]:
    """What a reader calls each set of weights: the only average is 'average', several go by their labels.

    Example:
        >>> in_words(['training', 'ema'])
        {'training': 'training weights', 'ema': 'average'}
        >>> in_words(['slow', 'fast', 'training'])
        {'training': 'training weights', 'slow': 'slow', 'fast': 'fast'}
    """
    found = in_order(labels)
    words = {TRAINING: 'training weights', UNNAMED: 'evaluated weights'}
    if len(averages(found)) == 1:
        words[averages(found)[0]] = 'average'
    return {label: words.get(label, label) for label in found}
