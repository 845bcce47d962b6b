"""Evaluates any weights of a finished run as the run itself did: with the data, model and metrics of its recipe."""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from composer.core import Callback, State, get_precision_context
from composer.loggers import Logger
from composer.models import HuggingFaceModel
from composer.utils import dist
from torch import Tensor

from composer_ema.batchnorm import statistics_of, update_bn
from composer_ema.model.names import check_same
from composer_ema.model.wrappers import unwrap
from composer_ema.recipe import schema
from composer_ema.recipe.arguments import Place, RecipeError
from composer_ema.recipe.build import Run, build
from composer_ema.recipe.metrics import directions
from composer_ema.recipe.run import evaluated_on
from composer_ema.recipe.schema import Recipe
from composer_ema.run_folder.outputs import RECIPE_FILE
from composer_ema.sweep.trials import Measured
from composer_ema.trainer.refresh import Refresh
from composer_ema.trainer.weight_average import WeightAverage
from composer_ema.zoo.dataset import TEST_SET

#: Into so many parts the samples are divided, to tell from their spread how much chance there is in a mean.
PARTS = 50
#: What of a recipe decides what an evaluation gives. The rest starts, steers and records training.
_KEPT = (
    'variables', 'model', 'data', 'optimizer', 'algorithms', 'max_duration', 'seed', 'precision', 'precision_config',
    'device', 'device_train_microbatch_size', 'train_subset_num_batches', 'report', 'code_paths',
)  # fmt: skip
#: Where data lie and how they are read. Whatever else describes them decides which samples were held out.
_MAY_DIFFER = ('root', 'eval_batch_size', 'num_workers')


class Measure:
    """A model, its data and its metrics, ready to evaluate one set of weights after another.

    Args:
        run: built from the recipe of a finished run; see :func:`measure_of`.
        num_batches: how many batches to evaluate on. Default: None, all of them.
        refresh: whether, and over how many batches of the training data, to compute BatchNorm's statistics anew for
            each average, as SWA's ``refresh_batchnorm``. Default: None, never.
    """

    def __init__(self, run: Run, *, num_batches: int | None = None, refresh: Refresh | None = None) -> None:
        self._run = run
        self._num_batches = num_batches
        self._refresh = refresh
        state = run.trainer.state
        (self._evaluator,) = state.evaluators
        self._names = tuple(state.eval_metrics[self._evaluator.label])
        self._parts = next(each for each in state.callbacks if isinstance(each, _Parts))
        self._parts.divide_into(math.ceil(PARTS / max(1, self._batches())))

    @property
    def metrics(self) -> dict[str, bool]:
        """Name of each metric to whether its small values are the good ones; the one that counts comes first."""
        report = self._run.plan.report
        found = directions(self._run.trainer.state.eval_metrics[self._evaluator.label])
        if report.metric is not None and report.lower_is_better is not None:
            found[report.metric] = report.lower_is_better
        return dict(sorted(found.items(), key=lambda entry: (entry[0] != report.metric, not entry[1])))

    @property
    def samples(self) -> str:
        """Which samples it evaluates on, in words: ``'400 samples held out of the training set'``."""
        words = evaluated_on(self._run).removeprefix(' on ')
        whole = len(self._evaluator.dataloader.dataloader)  # pyright: ignore[reportArgumentType]: loaders of recipes have a length
        return words if self._batches() == whole else f'{self._batches()} of {whole} batches of {words}'

    @property
    def imported(self) -> list[str]:
        """Which files of the user's were imported for the recipe, in sentences."""
        return self._run.plan.imported

    @property
    def has_batchnorm(self) -> bool:
        """Whether the model has statistics that :class:`Refresh` computes."""
        return bool(statistics_of(unwrap(self._run.trainer.state.model)))

    def evaluate(self, tensors: Mapping[str, Tensor], *, is_average: bool = True) -> Measured:
        """Puts weights into the model and evaluates them.

        Args:
            tensors: every tensor of the model by its name in the state dict.
            is_average: whether BatchNorm's statistics are to be computed anew, if at all. Default: True.

        Raises:
            ValueError: names or shapes are not those of the model.
        """
        trainer = self._run.trainer
        model = unwrap(trainer.state.model)
        own = {name: each for name, each in model.state_dict().items() if isinstance(each, Tensor)}
        check_same('what the run kept', own, tensors, remedy='The recipe in its folder builds another model.')
        model.load_state_dict(tensors, strict=False)  # of what is no tensor, nothing depends on the average
        if is_average and self._refresh is not None and self.has_batchnorm:
            self._compute_statistics()
        trainer.eval(subset_num_batches=-1 if self._num_batches is None else self._num_batches)
        metrics = trainer.state.eval_metrics[self._evaluator.label]
        return Measured({name: float(metrics[name].compute()) for name in self._names}, self._parts.take())

    def _compute_statistics(self) -> None:
        trainer, state = self._run.trainer, self._run.trainer.state
        assert self._refresh is not None
        assert trainer._train_data_spec is not None
        with get_precision_context(state.precision, state.precision_config, fp8_autocast_enabled=False):
            update_bn(
                state.model,
                trainer._train_data_spec,
                num_batches=self._refresh.num_batches(state),
                microbatch_size=state.device_train_microbatch_size,
                progress_bar=False,
            )

    def _batches(self) -> int:
        whole = len(self._evaluator.dataloader.dataloader)  # pyright: ignore[reportArgumentType]
        return whole if self._num_batches is None else min(whole, self._num_batches)


@contextmanager
def measure_of(
    recipe: Recipe,
    *,
    num_batches: int | None = None,
    refresh: Refresh | None = None,
) -> Iterator[Measure]:
    """Builds what a recipe evaluates with, leaves no file, and closes it at the end.

    Args:
        recipe: from :func:`recipe_of`.
        num_batches: as for :class:`Measure`.
        refresh: likewise.

    Raises:
        RecipeError: the recipe cannot be built here.
    """
    with tempfile.TemporaryDirectory() as scratch:
        run = build(_for_evaluation(recipe), scratch=Path(scratch), callbacks=[_Parts()])
        try:
            yield Measure(run, num_batches=num_batches, refresh=refresh)
        finally:
            run.trainer.close()


def recipe_of(folder: Path, overrides: Sequence[str] = (), *, on_test: bool = False) -> Recipe:
    """The recipe of a finished run, for an evaluation on what it held out of its training set, or on its test set.

    Args:
        folder: of the run.
        overrides: of where the data lie, how they are read, and the device: ``data.root=...``, ``device=cpu``.
        on_test: whether to evaluate on the test set, also where the run held samples out. Default: False.

    Raises:
        RecipeError: the folder has no recipe, the run held nothing out, or an override would change which samples the
            run has not trained on.
    """
    trained = schema.load(folder / RECIPE_FILE)
    recipe = schema.load(folder / RECIPE_FILE, overrides)
    place = Place(trained.source) / 'data'
    for key in {*trained.values.get('data', {}), *recipe.values.get('data', {})} - {*_MAY_DIFFER}:
        before, now = (each.values.get('data', {}).get(key) for each in (trained, recipe))
        if before != now:
            raise (place / key).error(
                f'the run was trained with {before}, and {now} may evaluate it on samples that it has trained on. '
                f'Leave it out; {", ".join(_MAY_DIFFER)} may differ.'
            )
    checked = schema.plan(recipe)
    if dist.get_world_size() > 1:
        raise Place(trained.source).error('a sweep runs in one process. Start it without a launcher.')
    if on_test:
        whole = _without_split(recipe) if checked.validation_split else recipe
        if (evaluated := schema.plan(whole).evaluation_set) != TEST_SET:
            raise place.error(f'this run evaluates on {evaluated}, which is no test set. Leave --on-test out.')
        return whole
    if not checked.validation_split and checked.evaluation_set == TEST_SET:
        raise _nothing_held_out(place, checked.data.name, takes_split=checked.validation_split is not None)
    return recipe


def _nothing_held_out(place: Place, data: str, *, takes_split: bool) -> RecipeError:
    remedy = (
        'Train the next run with data.validation_split=0.1, which holds out a tenth of the training set, and with '
        'algorithms.ema.snapshots=0.05dur, which leaves more moments to make averages of.'
        if takes_split
        else f'Let the function of {data} take validation_split, and train the next run with it.'
    )
    return (place / 'validation_split').error(
        'this run held out no samples to choose on. An average chosen on the test set fits that test set, and its '
        f'metrics there say too much. {remedy} --on-test chooses on the test set all the same.'
    )


def _without_split(recipe: Recipe) -> Recipe:
    data = {key: value for key, value in recipe.values['data'].items() if key != 'validation_split'}
    return recipe.replace(data=data)


def _for_evaluation(recipe: Recipe) -> Recipe:
    """What is left of a recipe that only evaluates: no average of its own, no files, no schedule, one evaluator."""
    algorithms = {each.place.key.rpartition('.')[2]: each for each in schema.plan(recipe).algorithms}
    others = {
        name: recipe.values['algorithms'][name]
        for name, each in algorithms.items()
        if not (isinstance(each.factory, type) and issubclass(each.factory, WeightAverage))
    }
    values = {key: recipe.values[key] for key in _KEPT if key in recipe.values}
    optimizer = values.get('optimizer')
    if isinstance(optimizer, dict):
        values['optimizer'] = {key: value for key, value in optimizer.items() if key != 'param_groups'}
    values |= {'algorithms': others, 'evaluate': ['training'], 'run_name': 'sweep', 'save_folder': None}
    return dataclasses.replace(recipe, values=values)


class _Parts(Callback):
    """Computes the metrics of every batch in parts as well, from the outputs that are there."""

    def __init__(self) -> None:
        self._per_batch = 1
        self._found: dict[str, list[float]] = {}

    def divide_into(self, per_batch: int) -> None:
        """Sets into how many parts a batch is divided."""
        self._per_batch = per_batch

    def take(self) -> dict[str, list[float]]:
        """The values over all parts of the last evaluation, by metric."""
        return self._found

    def eval_start(self, state: State, logger: Logger) -> None:
        self._found = {}

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        (evaluator,) = state.evaluators
        spec, outputs = evaluator.dataloader, cast(Any, state.outputs)
        size = spec.get_num_samples_in_batch(state.batch)
        model: Any = unwrap(state.model)
        # HuggingFaceModel keeps the labels of the last batch, and compares all outputs with them.
        labels: Any = model.labels if isinstance(model, HuggingFaceModel) else None
        parts: list[Any] = [(state.batch, outputs, labels)]
        if _has_length(outputs, size) and (labels is None or _has_length(labels, size)):
            step = math.ceil(size / self._per_batch)
            batches, pieces = spec.split_batch(state.batch, step), outputs.split(step)
            parts = list(zip(batches, pieces, labels.split(step) if labels is not None else pieces, strict=True))
        with get_precision_context(state.precision, state.precision_config):
            for name, metric in state.eval_metrics[evaluator.label].items():
                own = copy.deepcopy(metric)
                for batch, output, of_part in parts:
                    own.reset()
                    if labels is not None:
                        model.labels = of_part
                    model.update_metric(batch, output, own)
                    self._found.setdefault(name, []).append(float(own.compute()))
        if labels is not None:
            model.labels = labels


def _has_length(values: Any, size: Any) -> bool:
    return isinstance(values, Tensor) and isinstance(size, int) and values.ndim > 0 and len(values) == size
