"""An average for Composer's ``ExportForInferenceCallback``, which exports whatever the model holds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

from composer.callbacks import ExportForInferenceCallback
from composer.core import State
from composer.loggers import Logger

#: ``lending(state)`` puts the average into the model for the length of a ``with`` block.
Lending = Callable[[State], AbstractContextManager[None]]


def lend_to_exporters(state: State, lending: Lending) -> int:
    """Wraps every exporter of the run in ``lending``, and returns how many there are.

    An exporter runs at FIT_END, after the algorithms and with no event in between that could lend the average.
    """
    exporters = [callback for callback in state.callbacks if isinstance(callback, ExportForInferenceCallback)]
    for exporter in exporters:
        exporter.export_model = functools.partial(_export, exporter, lending)
    return len(exporters)


def _export(exporter: ExportForInferenceCallback, lending: Lending, state: State, logger: Logger) -> None:
    with lending(state):
        type(exporter).export_model(exporter, state, logger)
