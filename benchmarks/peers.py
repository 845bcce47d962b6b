"""Every way to average a model's weights that is measured, behind one interface; imported only when built."""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from benchmarks.common import SMOOTHING, Result

#: What becomes of floating buffers such as BatchNorm's statistics.
Buffers = Literal['averaged', 'copied', 'ignored']
OURS = 'ours'
#: Calls after which every contestant averages: the first ones may copy, or set things up.
WARM_UP = 3


@dataclass(frozen=True)
class Average:
    """An average that follows one model.

    Attributes:
        update: moves it towards the model.
        parameters: its tensors, one for each trainable parameter of the model.
        swap: puts the average into the model and back again; None where evaluation runs on a second model instead.
    """

    update: Callable[[], object]
    parameters: Callable[[], Iterable[Tensor]]
    swap: Callable[[], object] | None = None


@dataclass(frozen=True)
class Contestant:
    """A way to average: its name in the tables, what it does with buffers, and how to start it on a model."""

    name: str
    buffers: Buffers
    build: Callable[[nn.Module], Average]

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(OURS)


def build(contestants: Sequence[Contestant], model: nn.Module, result: Result) -> dict[Contestant, Average]:
    """Starts each on ``model`` and warms it up; names those that cannot run here in ``result``."""
    built = {}
    for contestant in contestants:
        average = build_one(contestant, model, result)
        if average is not None:
            built[contestant] = average
    return built


def build_one(contestant: Contestant, model: nn.Module, result: Result) -> Average | None:
    """As :func:`build`; None for one that cannot run here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # remarks of other packages on their own imports
            average = contestant.build(model)
            for _ in range(WARM_UP):
                average.update()
    except ImportError as error:
        result.leave_out(contestant.name, f'cannot be imported: {error}')
        return None
    return average


# Ours


def _shadow_model(buffers: Literal['average', 'copy']) -> Callable[[nn.Module], Average]:
    def start(model: nn.Module) -> Average:
        from composer_ema import ShadowModel

        shadow = ShadowModel(model, buffers=buffers)

        def swap() -> None:
            shadow.swap_in(model)
            shadow.swap_out(model)

        return Average(lambda: shadow.update(model, weight=1 - SMOOTHING), shadow.parameters, swap)

    return start


def _our_compute_ema(model: nn.Module) -> Average:
    from composer_ema import compute_ema

    ema_model = copy.deepcopy(model)
    return Average(lambda: compute_ema(model, ema_model, SMOOTHING), ema_model.parameters)


class _Still(torch.optim.Optimizer):
    """Moves nothing, so that a step of what wraps it is an update of the average."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {'lr': 1.0})

    def step(self, closure: Callable[[], float] | None = None) -> None:
        del closure


def _our_optimizer(model: nn.Module) -> Average:
    from composer_ema import EMAOptimizer

    optimizer = EMAOptimizer(_Still(model), decay=SMOOTHING, model=model)

    def update() -> None:
        optimizer.step()
        optimizer.wait()  # timed in line, on the stream that the others use

    def swap() -> None:
        with optimizer.swap_ema_weights():
            pass

    return Average(update, optimizer.shadow.parameters, swap)


# What comes with PyTorch and Composer


def _built_in(model: nn.Module) -> Average:
    from composer.algorithms.ema.ema import EMAParameters, compute_ema

    average = EMAParameters(model)

    def swap() -> None:
        average.swap_params(model)
        average.swap_params(model)

    return Average(lambda: compute_ema(model, average, SMOOTHING), lambda: average.named_parameters_dict.values(), swap)


def _averaged_model(argument: str, function: Callable, use_buffers: bool) -> Callable[[nn.Module], Average]:
    def start(model: nn.Module) -> Average:
        options: dict[str, Any] = {argument: function(SMOOTHING), 'use_buffers': use_buffers}
        average = AveragedModel(model, **options)
        return Average(lambda: average.update_parameters(model), average.module.parameters)

    return start


class TwoPassWrapper:
    """The update of the optimizer wrapper that PyTorch pull request 94820 was measured beside and NeMo carries.

    What it does at each step, in our own words: waits on the host for its last update, lists the optimizer's
    parameters anew, then on a stream of its own multiplies all averages by the decay and adds the weights in a second
    pass. Buffers are not averaged.
    """

    def __init__(self, model: nn.Module) -> None:
        self._groups = [{'params': [parameter for parameter in model.parameters() if parameter.requires_grad]}]
        self.averages = tuple(parameter.data.clone() for parameter in self._parameters())
        device = self.averages[0].device
        self._stream: Any = torch.cuda.Stream(device) if device.type == 'cuda' else None

    @torch.no_grad()
    def update(self) -> None:
        self.join()
        if self._stream is None:
            self._average()
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._average()

    def join(self) -> None:
        """Blocks the host until the last update is done."""
        if self._stream is not None:
            self._stream.synchronize()

    def swap(self) -> None:
        self.join()
        for _ in range(2):
            for parameter, average in zip(self._parameters(), self.averages, strict=True):
                kept = parameter.data.clone()
                parameter.data.copy_(average)
                average.copy_(kept)

    def _average(self) -> None:
        current = tuple(parameter.data for parameter in self._parameters())
        torch._foreach_mul_(self.averages, SMOOTHING)
        torch._foreach_add_(self.averages, current, alpha=1 - SMOOTHING)

    def _parameters(self) -> Iterable[Tensor]:
        return itertools.chain.from_iterable(group['params'] for group in self._groups)


def _two_pass_wrapper(model: nn.Module) -> Average:
    wrapper = TwoPassWrapper(model)
    on_cuda = wrapper.averages[0].is_cuda

    def update() -> None:
        wrapper.update()
        if on_cuda:  # timed in line, on the stream that the others use
            torch.cuda.current_stream().wait_stream(wrapper._stream)

    return Average(update, lambda: wrapper.averages, wrapper.swap)


# Other packages


def _timm(exclude_buffers: bool) -> Callable[[nn.Module], Average]:
    def start(model: nn.Module) -> Average:
        from timm.utils.model_ema import ModelEmaV3

        average = ModelEmaV3(model, decay=SMOOTHING, exclude_buffers=exclude_buffers)
        return Average(lambda: average.update(model), average.module.parameters)

    return start


def _ema_pytorch(use_foreach: bool) -> Callable[[nn.Module], Average]:
    def start(model: nn.Module) -> Average:
        from ema_pytorch import EMA

        average = EMA(
            model,
            beta=SMOOTHING,
            update_after_step=0,
            update_every=1,
            include_online_model=False,
            use_foreach=use_foreach,
        )
        return Average(average.update, average.ema_model.parameters)

    return start


def _diffusers(foreach: bool) -> Callable[[nn.Module], Average]:
    def start(model: nn.Module) -> Average:
        from diffusers.training_utils import EMAModel

        average = EMAModel(model.parameters(), decay=SMOOTHING, foreach=foreach)

        def swap() -> None:
            average.store(model.parameters())
            average.copy_to(model.parameters())
            average.restore(model.parameters())

        return Average(lambda: average.step(model.parameters()), lambda: average.shadow_params, swap)

    return start


def _torch_ema(model: nn.Module) -> Average:
    from torch_ema import ExponentialMovingAverage

    average = ExponentialMovingAverage(model.parameters(), decay=SMOOTHING)

    def swap() -> None:
        with average.average_parameters():
            pass

    return Average(lambda: average.update(model.parameters()), lambda: average.shadow_params, swap)


def _lightning(model: nn.Module) -> Average:
    """Driven through the hooks that Lightning's Trainer calls."""
    logging.getLogger('lightning').setLevel(logging.ERROR)
    from lightning.pytorch import LightningModule
    from lightning.pytorch.callbacks import EMAWeightAveraging

    module: Any = LightningModule()
    module.network = model
    module.to(next(model.parameters()).device)
    callback: Any = EMAWeightAveraging(decay=SMOOTHING)
    trainer: Any = SimpleNamespace(global_step=0)
    callback.setup(trainer, module, 'fit')

    def update() -> None:
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, None, trainer.global_step)

    def swap() -> None:
        callback.on_validation_epoch_start(trainer, module)
        callback.on_validation_epoch_end(trainer, module)

    return Average(update, lambda: callback._average_model.module.network.parameters(), swap)


CONTESTANTS: tuple[Contestant, ...] = (
    Contestant(OURS, 'averaged', _shadow_model('average')),
    Contestant(f'{OURS}, buffers copied', 'copied', _shadow_model('copy')),
    Contestant(f'{OURS}, EMAOptimizer', 'averaged', _our_optimizer),
    Contestant(f'{OURS}, compute_ema', 'averaged', _our_compute_ema),
    Contestant('Composer EMA', 'averaged', _built_in),
    Contestant('AveragedModel avg_fn', 'copied', _averaged_model('avg_fn', get_ema_avg_fn, False)),
    Contestant('AveragedModel avg_fn, use_buffers', 'averaged', _averaged_model('avg_fn', get_ema_avg_fn, True)),
    Contestant('AveragedModel multi_avg_fn', 'copied', _averaged_model('multi_avg_fn', get_ema_multi_avg_fn, False)),
    Contestant(
        'AveragedModel multi_avg_fn, use_buffers',
        'averaged',
        _averaged_model('multi_avg_fn', get_ema_multi_avg_fn, True),
    ),
    Contestant('optimizer wrapper (mul, add)', 'ignored', _two_pass_wrapper),
    Contestant('timm ModelEmaV3', 'averaged', _timm(False)),
    Contestant('timm ModelEmaV3, exclude_buffers', 'copied', _timm(True)),
    Contestant('ema-pytorch', 'averaged', _ema_pytorch(False)),
    Contestant('ema-pytorch, use_foreach', 'averaged', _ema_pytorch(True)),
    Contestant('diffusers EMAModel', 'ignored', _diffusers(False)),
    Contestant('diffusers EMAModel, foreach', 'ignored', _diffusers(True)),
    Contestant('torch-ema', 'ignored', _torch_ema),
    Contestant('Lightning EMAWeightAveraging', 'averaged', _lightning),
)
