"""Random calls of every public name, with sound and absurd values, and what is wrong with how they end.

What is called is found by introspection, so a new name, method or argument is drawn without a line here.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import enum
import functools
import importlib.util
import inspect
import math
import random
import re
import shutil
import sys
import traceback
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain import saved
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import composer_ema
from composer_ema import CheckpointError, EMAOptimizer, ShadowModel, ShadowModels, Snapshots, averages, plain
from composer_ema.shadow import loan
from composer_ema.spans import ArgumentError, Span
from composer_ema.wording import shown

HAS_COMPOSER = importlib.util.find_spec('composer') is not None
#: The public names that come with it.
OF_COMPOSER = {'EMA', 'SWA', 'safe_loading'}
PACKAGE = str(Path(composer_ema.__file__).parent)

# Values


class Whole(enum.IntEnum):
    ONE = 1


class Word(str, enum.Enum):
    EMA = 'ema'
    AVERAGE = 'average'


class Text(str):
    pass


class Mapped(dict):
    pass


class Silent:
    def __repr__(self) -> str:
        raise OSError('no words')


class Odd:
    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError

    __hash__ = None

    def __bool__(self) -> bool:
        raise ZeroDivisionError


def circle() -> list:
    around: list = []
    around.append(around)
    return around


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1, dtype=torch.float64).double()).double()


def halfway(averaged: Tensor, current: Tensor, num_averaged: Tensor) -> Tensor:
    return (averaged + current) / 2


def halfway_all(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
    torch._foreach_lerp_(averaged, current, 0.5)


def complex_model() -> nn.Module:
    return nn.Linear(2, 1, dtype=torch.complex64)


def whole_model() -> nn.Module:
    module = nn.Module()
    module.register_parameter('weight', nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False))
    return module


def sparse_model() -> nn.Module:
    module = nn.Module()
    module.register_parameter('weight', nn.Parameter(torch.eye(2).to_sparse()))
    return module


def expanded_model() -> nn.Module:
    module = nn.Module()
    module.register_parameter('weight', nn.Parameter(torch.ones(1).expand(3)))
    return module


@functools.cache
def scripted_model() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.jit.script(nn.Linear(2, 1))


#: What no argument, or hardly any, can be.
ABSURD: dict[str, Callable[[], Any]] = {
    'None': lambda: None,
    'True': lambda: True,
    'False': lambda: False,
    '0': lambda: 0,
    '1': lambda: 1,
    '-1': lambda: -1,
    '2**63': lambda: 2**63,
    '10**400': lambda: 10**400,
    '10**5000': lambda: 10**5000,
    '0.5': lambda: 0.5,
    '-0.5': lambda: -0.5,
    'nan': lambda: math.nan,
    'inf': lambda: math.inf,
    '1e308': lambda: 1e308,
    '5e-324': lambda: 5e-324,
    "''": lambda: '',
    "'False'": lambda: 'False',
    "'auto'": lambda: 'auto',
    "'ema'": lambda: 'ema',
    "'meta'": lambda: 'meta',
    "'cuda'": lambda: 'cuda',
    "'cuda:99'": lambda: 'cuda:99',
    "'1ba'": lambda: '1ba',
    "'infba'": lambda: 'infba',
    "'1e400ep'": lambda: '1e400ep',
    "'1e30ba'": lambda: '1e30ba',
    "'('": lambda: '(',
    "'x' * 500": lambda: 'x' * 500,
    "'\\x1b[31m\\n\\0'": lambda: '\x1b[31m\n\0',
    "'\\ud800'": lambda: '\ud800',
    "b'bytes'": lambda: b'bytes',
    'np.float32(0.5)': lambda: np.float32(0.5),
    'np.float64(0.5)': lambda: np.float64(0.5),
    'np.int64(3)': lambda: np.int64(3),
    'np.longdouble(0.5)': lambda: np.longdouble(0.5),
    'np.bool_(True)': lambda: np.bool_(True),
    "np.str_('ema')": lambda: np.str_('ema'),
    "np.str_('average')": lambda: np.str_('average'),
    "np.str_('10ba')": lambda: np.str_('10ba'),
    'np.array([1, 2])': lambda: np.array([1, 2]),
    'np.array(0.5)': lambda: np.array(0.5),
    "np.dtype('float32')": lambda: np.dtype('float32'),
    'torch.tensor(0.5)': lambda: torch.tensor(0.5),
    'torch.tensor(2)': lambda: torch.tensor(2),
    'torch.tensor(True)': lambda: torch.tensor(True),
    'torch.ones(2)': lambda: torch.ones(2),
    'torch.empty(0)': lambda: torch.empty(0),
    "torch.ones((), device='meta')": lambda: torch.ones((), device='meta'),
    'Fraction(1, 3)': lambda: Fraction(1, 3),
    'Fraction(10**400)': lambda: Fraction(10**400),
    "Decimal('0.5')": lambda: Decimal('0.5'),
    "Decimal('sNaN')": lambda: Decimal('sNaN'),
    '1j': lambda: 1j,
    '[]': list,
    '[1]': lambda: [1],
    "['a', 'b']": lambda: ['a', 'b'],
    "[np.str_('0')]": lambda: [np.str_('0')],
    '()': tuple,
    '{}': dict,
    "{'a': 1}": lambda: {'a': 1},
    "{'a': 0.5, 'b': Fraction(1, 2)}": lambda: {'a': 0.5, 'b': Fraction(1, 2)},
    "{'a': True}": lambda: {'a': True},
    "{np.str_('a'): np.float32(0.5)}": lambda: {np.str_('a'): np.float32(0.5)},
    '{1: 2}': lambda: {1: 2},
    "{'a': []}": lambda: {'a': []},
    "Mapped(a='1ba')": lambda: Mapped(a='1ba'),
    "MappingProxyType({'a': 'equal'})": lambda: types.MappingProxyType({'a': 'equal'}),
    '{1, 2}': lambda: {1, 2},
    'circle()': circle,
    'object()': object,
    'Silent()': Silent,
    'Odd()': Odd,
    'Odd': lambda: Odd,
    'nn.Linear': lambda: nn.Linear,
    'lambda: 0': lambda: lambda: 0,
    '(x for x in ())': lambda: (x for x in ()),
    "Path('x')": lambda: Path('x'),
    'Whole.ONE': lambda: Whole.ONE,
    'Word.EMA': lambda: Word.EMA,
    "Text('copy')": lambda: Text('copy'),
    "Text('2ba')": lambda: Text('2ba'),
    "torch.device('cpu')": lambda: torch.device('cpu'),
    'torch.int64': lambda: torch.int64,
    "Span(2, 'ba')": lambda: Span(2, 'ba'),
    "Span(math.nan, 'ba')": lambda: Span(math.nan, 'ba'),
    'network()': network,
    'network().state_dict()': lambda: network().state_dict(),
    'list(network().parameters())': lambda: list(network().parameters()),
    'network().parameters()': lambda: network().parameters(),
    'SGD(network().parameters(), 0.1)': lambda: torch.optim.SGD(network().parameters(), 0.1),
    'nn.Module()': nn.Module,
    'nn.LazyLinear(1)': lambda: nn.LazyLinear(1),
    "network().to('meta')": lambda: network().to('meta'),
    'complex_model()': complex_model,
    'whole_model()': whole_model,
    'sparse_model()': sparse_model,
    'expanded_model()': expanded_model,
    'scripted_model()': scripted_model,
    'network().requires_grad_(False)': lambda: network().requires_grad_(False),
    'AveragedModel(network())': lambda: AveragedModel(network()),
    'ShadowModel(network())': lambda: ShadowModel(network()),
    'ShadowModels(network(), ["a"])': lambda: ShadowModels(network(), ['a']),
    'ShadowModel(network()).state_dict()': lambda: ShadowModel(network()).state_dict(),
    'ShadowModel': lambda: ShadowModel,
    'sys': lambda: sys,
}


class World:
    """What a call is about: a model, its optimizer, files."""

    def __init__(self, folder: Path, files: Path) -> None:
        self.model = network()
        self.folder, self.files = folder, files

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def ema_optimizer(self) -> EMAOptimizer:
        optimizer = EMAOptimizer(self.optimizer(), decay=0.5, model=self.model)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return optimizer

    def data(self) -> list[Tensor]:
        return [torch.arange(8.0, dtype=torch.float64).reshape(4, 2), torch.ones(3, 2, dtype=torch.float64)]


SHARED: dict[str, list[tuple[str, Callable[[World], Any]]]] = {}


def sound(names: str, **values: Callable[[World], Any]) -> None:
    for name in names.split():
        SHARED.setdefault(name, []).extend((f'<{label}>', make) for label, make in values.items())


def constants(names: str, *values: Any) -> None:
    for name in names.split():
        SHARED.setdefault(name, []).extend((repr(value), lambda _, value=value: value) for value in values)


sound('model module', model=lambda w: w.model)
sound('ema_model', copy=lambda w: copy.deepcopy(w.model), shadow=lambda w: ShadowModel(w.model),
      state=lambda w: copy.deepcopy(w.model.state_dict()))  # fmt: skip
sound('optimizer', optimizer=lambda w: w.optimizer())
sound('dataloader', data=lambda w: w.data())
sound('shadow', shadow=lambda w: ShadowModel(w.model))
sound('averaged', averaged=lambda w: AveragedModel(w.model))
sound('parameters', parameters=lambda w: {n: p.detach() for n, p in w.model.named_parameters()})
sound('buffers_', buffers=lambda w: dict(w.model.named_buffers()))
sound('folder out', folder=lambda w: w.folder / 'out')
sound('checkpoint run path', file=lambda w: w.files / 'average.pt', run=lambda w: w.files / 'run')
sound('checkpoints', files=lambda w: [w.files / 'average.pt', str(w.files / 'second.pt')])
sound('avg_fn', halfway=lambda w: halfway)
sound('multi_avg_fn', halfway=lambda w: halfway_all)
sound('forward', forward=lambda w: lambda model, batch: model(batch))
sound('closure', closure=lambda w: lambda: 0.0)
sound('param_group', group=lambda w: {'params': [nn.Parameter(torch.ones(1))]})
sound('renamed', renamed=lambda w: {'0.weight': '0.weight'})
sound('state_dict state', shadow=lambda w: ShadowModel(w.model).state_dict())
sound('profile', half_life=lambda w: averages.HalfLife(3), smoothing=lambda w: averages.Smoothing(0.5))
constants('smoothing weight decay', 0.5, 0, 1, 0.9)
constants('overlap skip_nonfinite compensated shard_over_ranks overwrite synchronize progress_bar', True, False)
constants('joining leaving enabled set_to_none bias_correction equal anyway strict', True, False)
constants('buffers', 'statistics', 'average', 'copy', {'running': 'copy'})
constants('include exclude', 'weight', ['0', 'running'])
constants('dtype shadow_dtype', 'float32', torch.float64, 'bfloat16')
constants('device shadow_device', 'cpu', torch.device('cpu'))
constants('rounding', 'nearest', 'stochastic')
constants('backend', 'auto', 'reference', 'foreach', 'blocked')
constants('seed start num_samples halvings', 0, 3)
constants('labels', ['a'], ('short', 'long'))
constants('every_n_steps num_batches num_steps count', 1, 4)
constants('half_life', 3, 10.5, '10ba', '0.5dur', {'a': 3}, {'a': '2ba', 'b': '1ep'})
constants('power', 0.1, {'w': 0.2}, [0.05, 0.1])
constants('gamma', 6.94)
constants('warmup', 0.1)
constants('average', 'equal', 'ema', 'exponential')
constants('every', 2, '2ba', '0.5dur')
constants('run_name', 'mine')
constants('names', ['0.weight'], set())
constants('key', 'ema')
constants('ema_start swa_start', '0.5dur', '2ba')
constants('update_interval log_interval anneal_length interval at', '1ep', '2ba')
constants('snapshots', '0.05dur', {'every': '2ba', 'halvings': 0})
constants('evaluate_with', {'eval': 'training'})
constants('evaluate', ['training'])
constants('export_weights', 'training')
constants('copy', False)
constants('swa_lr', 0.1, [0.1, 0.2])
constants('anneal_strategy', 'cos')
constants('refresh_batchnorm', True, 3, '1ep')
constants('schedule', 'cosine', '1-sqrt:0.2dur')
constants('weights times', [0.5, 0.5], [1, 2])
constants('time', '3ba')
constants('units', ('ba', 'ep'))
constants('name unit smoothing_name', 'ba', 'steps')
constants('ratio', 0.5)
constants('elapsed since_start', 1.0)
constants('num_updates', 2)
constants('sigma_rel', 0.1)

#: What each argument can be where the name alone does not tell; by the name of the door.
OWN: dict[tuple[str, str], list[tuple[str, Callable[[World], Any]]]] = {
    ('EMAOptimizer.load_state_dict', 'state_dict'): [('<state>', lambda w: w.ema_optimizer().state_dict())],
    ('EMAOptimizer.load_ema_state_dict', 'state'): [('<state>', lambda w: w.ema_optimizer().ema_state_dict())],
    ('ShadowModels.load_state_dict', 'state'): [('<state>', lambda w: ShadowModels(w.model, ['a']).state_dict())],
    ('ShadowModel.load_foreign', 'state'): [('<state>', lambda w: AveragedModel(w.model).state_dict())],
    ('ShadowModel.from_tensors', 'buffers'): SHARED['buffers_'],
}


def sound_values(door: str, name: str) -> list[tuple[str, Callable[[World], Any]]]:
    return OWN.get((door, name)) or SHARED.get(name, [])


# What is called


@dataclass(frozen=True)
class Door:
    """Something that users call.

    Args:
        name: ``'ShadowModel.update'``.
        function: of the object that ``of`` builds, or without one.
        of: builds the object whose method it is.
    """

    name: str
    function: Callable[..., Any]
    of: Callable[[World], Any] | None = None

    @functools.cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        found = dict(inspect.signature(self.function).parameters)
        if self.of is not None:
            found.pop('self', None)
        return found


def _shadow(world: World) -> ShadowModel:
    shadow = ShadowModel(world.model)
    shadow.update(world.model, smoothing=0.5)
    return shadow


OBJECTS: dict[str, Callable[[World], Any]] = {
    'ShadowModel': _shadow,
    'ShadowModels': lambda w: ShadowModels(w.model, ['a', 'b']),
    'EMAOptimizer': lambda w: w.ema_optimizer(),
    'Snapshots': lambda w: Snapshots(w.model, w.folder / 'snapshots', every=2, num_steps=4),
}
#: What belongs to Composer's or torch's protocol, or takes nothing from a user.
NOT_CALLED = {'match', 'apply', 'param_groups', 'state', 'defaults', 'grad_scale', 'found_inf'}


def doors() -> list[Door]:
    """Every public name and every public method of the public classes."""
    found = []
    for name in composer_ema.__all__:
        if name in ('__version__', 'CheckpointError') or (name in OF_COMPOSER and not HAS_COMPOSER):
            continue
        value = getattr(composer_ema, name)
        found.append(Door(name, value))
        if isinstance(value, type):
            found += methods_of(name, value)
    for kind in (averages.HalfLife, averages.Smoothing, averages.Power, averages.WarmedUp, averages.BiasCorrected,
                 averages.Moment, averages.weight_from_smoothing):  # fmt: skip
        found.append(Door(kind.__name__, kind))
    return found


def methods_of(name: str, kind: type) -> Iterator[Door]:
    for each in sorted(dir(kind)):
        static = inspect.getattr_static(kind, each)
        if each.startswith('_') or each in NOT_CALLED:
            continue
        if isinstance(static, classmethod):
            yield Door(f'{name}.{each}', getattr(kind, each))
        elif isinstance(static, property):
            if static.fset is not None and static.fset.__module__.startswith('composer_ema') and name in BUILT:
                yield Door(f'{name}.{each}=', static.fset, BUILT[name])
        elif inspect.isfunction(static) and static.__module__.startswith('composer_ema') and name in BUILT:
            yield Door(f'{name}.{each}', static, BUILT[name])


def _algorithm(name: str) -> Callable[[World], Any]:
    def build(world: World) -> Any:
        return started(getattr(composer_ema, name)(), world.model)

    return build


def started(algorithm: Any, model: nn.Module) -> Any:
    """An algorithm with averages of ``model``, as in a Trainer that has been built."""
    from composer.core import Event
    from tensors import state_by_hand

    algorithm.apply(Event.INIT, state_by_hand(model), None)
    return algorithm


BUILT = {**OBJECTS, **({name: _algorithm(name) for name in ('EMA', 'SWA')} if HAS_COMPOSER else {})}


# A call


@dataclass
class Call:
    """A call that was drawn.

    Args:
        door: what is called.
        chosen: the label of each argument and what makes it.
        absurd: the arguments that are none, or hardly any.
        is_picky: whether there is one of these at most, so that the call comes further.
    """

    door: Door
    chosen: dict[str, tuple[str, Callable[[World], Any]]] = field(default_factory=dict)
    absurd: set[str] = field(default_factory=set)
    is_picky: bool = False

    @classmethod
    def drawn(cls, door: Door, rng: random.Random) -> Call:
        call = cls(door)
        call.is_picky = rng.random() < 0.5
        for name, parameter in door.parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                continue
            if parameter.kind is parameter.VAR_KEYWORD:
                for each in rng.sample(['dtype', 'buffers', 'seed', 'compensated', 'avg_fn', 'nonsense'], 1):
                    if rng.random() < 0.5:
                        call._choose(each, rng)
                continue
            is_required = parameter.default is parameter.empty
            chance = 1.0 if is_required else min(0.5, 2.5 / len(door.parameters))
            if rng.random() < chance:
                call._choose(name, rng, likely=is_required)
        return call

    def _choose(self, name: str, rng: random.Random, *, likely: bool = False) -> None:
        options = sound_values(self.door.name, name)
        if options and ((self.is_picky and self.absurd) or rng.random() < (0.75 if likely else 0.4)):
            self.chosen[name] = rng.choice(options)
        else:
            label = rng.choice(list(ABSURD))
            self.chosen[name] = (label, lambda _, label=label: ABSURD[label]())
            self.absurd.add(name)

    def arguments(self, world: World) -> tuple[list[Any], dict[str, Any]]:
        positional, named = [], {}
        for name, (_, make) in self.chosen.items():
            parameter = self.door.parameters.get(name)
            if parameter is not None and parameter.kind is parameter.POSITIONAL_ONLY:
                positional.append(make(world))
            else:
                named[name] = make(world)
        return positional, named

    def __str__(self) -> str:
        return f'{self.door.name}({", ".join(f"{name}={label}" for name, (label, _) in self.chosen.items())})'


# How it ends


def trial(call: Call, world: World) -> str | None:
    """What is wrong with how a call ends; None if nothing is."""
    target = None if call.door.of is None else call.door.of(world)
    before, own = weights_of(world.model), state_of(target)
    hooks = hooks_of(world.model)
    args, named = call.arguments(world)
    if target is not None:
        args = [target, *args]
    try:
        result = call.door.function(*args, **named)
        if isinstance(result, contextlib.AbstractContextManager) and target is not None:
            with result:
                pass
        elif isinstance(result, Iterator):
            list(result)
    except Exception as error:
        wrong = wrong_with(error, call, named)
        if wrong is None and weights_of(world.model) != before:
            wrong = 'refused, and the weights of the model have changed'
        if wrong is None and state_of(target) != own:
            wrong = 'refused, and the object has changed'
        if wrong is None and (hooks_of(world.model) != hooks or loan.is_open(world.model)):
            wrong = 'refused, and the model has hooks, or a loan'
        return wrong and f'{wrong}: {type(error).__name__}: {said(error)[:300]}'
    try:
        return wrong_after(call, target, result, world, before)
    except Exception as error:
        is_late = call.door.name in ('EMA', 'SWA') and isinstance(error, ArgumentError)  # when the Trainer is built
        if is_ours(error) and (call.absurd & MODELS or is_late):  # a model without values says so when it is used
            return None
        return f'accepted, and then {type(error).__name__}: {said(error)[:200]} at {place(error)}'


def said(error: Exception) -> str:
    try:
        return str(error)
    except Exception:
        return '(no words)'


def wrong_with(error: Exception, call: Call, named: Mapping[str, Any]) -> str | None:
    """What is wrong with an error that a user sees."""
    if not is_ours(error) and call.absurd & CODE:
        return None
    if not isinstance(error, (TypeError, ValueError, RuntimeError)) or not is_ours(error):
        return f'an error that is not ours, at {place(error)}'
    text = said(error)
    names = {name.removeprefix('shadow_') for name in (*call.chosen, *call.door.parameters)} | set(OTHER_NAMES)
    names |= {str(each) for name, each in named.items() if name == 'name' and isinstance(each, str)}
    names.add(call.door.name.rpartition('.')[2].removesuffix('='))
    if isinstance(error, (RuntimeError, CheckpointError)):  # the wrong moment, and the wrong file, by its name
        return None
    if not any(name in text for name in names) and not any(label in text for label, _ in call.chosen.values()):
        return 'names no argument'
    for name in call.absurd & named.keys() if isinstance(error, TypeError) else ():
        if re.search(rf'(?<!\w)(?<!each of ){name} must', text) and not shows(text, named[name]):
            return 'does not say what was passed'
    if len(text) > 1500 or '\x1b' in text:
        return 'a text that no terminal should see'
    return None


def shows(text: str, value: Any) -> bool:
    """Whether an error says what was passed, or what kind of thing it was."""
    held = [value, *(value.values() if isinstance(value, Mapping) else several(value))]
    kinds = [kind.__name__ for each in held for kind in (each, type(each)) if isinstance(kind, type)]
    held += list(value) if isinstance(value, Mapping) else []
    return any(each in text for each in kinds) or any(shown(as_plain(each))[:12] in text for each in held)


def several(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    return [*value, []] if isinstance(value, np.ndarray | Tensor) and value.ndim else []


def as_plain(value: Any) -> Any:
    try:
        return plain.scalar(value)
    except Exception:  # a Decimal that signals
        return value


@functools.cache
def _raises(path: str) -> tuple[tuple[int, int], ...]:
    tree = ast.parse(Path(path).read_text())
    return tuple(
        (node.lineno, node.end_lineno or node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Raise)
    )


def is_ours(error: BaseException) -> bool:
    """Whether a ``raise`` of the package has raised it, not what the package called."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    if not last.filename.startswith(PACKAGE):
        return False
    return any(start <= (last.lineno or 0) <= end for start, end in _raises(last.filename))


def place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
    shown = [f'{Path(frame.filename).name}:{frame.lineno}' for frame in (inside or frames)[-1:]]
    return f'{shown[0]} {type(error).__name__}'


def weights_of(model: nn.Module) -> dict[str, Any]:
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


def hooks_of(model: nn.Module) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def bits(value: Any) -> Any:
    """A value, or a nest of them, so that equal means equal to the last bit."""
    if isinstance(value, Tensor):
        if value.is_meta or value.layout is not torch.strided:
            return (str(value.dtype), tuple(value.shape))
        dense = value.detach().cpu().contiguous().clone()
        return (str(value.dtype), tuple(value.shape), dense.reshape(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(value, Mapping):
        return {key: bits(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [bits(each) for each in value]
    return value


def state_of(target: Any) -> Any:
    """All that an object would save; None where it has no state."""
    return None if target is None or not hasattr(target, 'state_dict') else bits(target.state_dict())


_PLAIN = (str, int, float, bool, type(None), dict, list, tuple)


def not_plain(value: Any, path: str = 'state') -> str | None:
    """Where a state holds something else than tensors and Python's own plain types."""
    if isinstance(value, Tensor):
        return None
    if type(value) not in (*_PLAIN, OrderedDict):
        return f'{path} is a {type(value).__module__}.{type(value).__name__}'
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, each in items:
        if type(key) not in (str, int):
            return f'{path} has the key {key!r} of type {type(key).__name__}'
        if (found := not_plain(each, f'{path}.{key}')) is not None:
            return found
    return None


def wrong_after(call: Call, target: Any, result: Any, world: World, before: Mapping[str, Any]) -> str | None:
    """What is wrong with the objects of a call that was accepted."""
    subject = target if target is not None else result
    writes = call.door.name in WRITES
    has_state = type(subject).__name__ in BUILT and hasattr(subject, 'load_state_dict')
    if has_state and (wrong := _wrong_state(subject, call, world)) is not None:
        return wrong
    if isinstance(subject, (averages.HalfLife, averages.Smoothing, averages.Power, averages.BiasCorrected)):
        memory = {name: value for name, value in vars(subject).items() if name != 'profile'}
        if (found := not_plain(memory)) is not None:
            return found
    repr(subject)
    if isinstance(subject, ShadowModel) and subject.is_swapped:
        subject.swap_out(world.model)
    if call.door.name in ('EMA.get_ema_model', 'SWA.get_swa_model'):
        subject.get_training_model(world.model)
    if not writes and weights_of(world.model) != before:
        return 'the weights of the model have changed'
    if loan.is_open(world.model):
        return 'a loan is left open'
    return None


#: What errors may name in place of an argument: what the doors call the arguments of profiles, and parts of arguments.
OTHER_NAMES = ('label', 'profile', 'power', 'warmup', 'bias_correction', 'state', 'model', 'average', 'parameter')
#: Arguments that are code of the user's, whose own errors pass.
CODE = {'closure', 'forward', 'dataloader'}
AVERAGING = ('avg_fn', 'multi_avg_fn')
#: Arguments whose faults show when they are used: a model, what one is made of, and functions of the user's.
MODELS = {'model', 'ema_model', 'optimizer', 'averaged', 'parameters', 'buffers', 'state', 'state_dict', *AVERAGING}
#: What is called to change the model.
WRITES = {
    'ShadowModel.copy_to', 'update_bn', 'EMAOptimizer.step', 'EMA.get_ema_model', 'SWA.get_swa_model',
    'EMAOptimizer.load_state_dict', 'EMA.get_training_model', 'SWA.get_training_model',
}  # fmt: skip


def _wrong_state(subject: Any, call: Call, world: World) -> str | None:
    state = subject.state_dict()
    if (found := not_plain(state)) is not None:
        return found
    loaded = saved(state)
    if (
        isinstance(subject, (ShadowModel, ShadowModels)) and subject.is_swapped
        if hasattr(subject, 'is_swapped')
        else False
    ):
        return None
    if call.door.of is None and isinstance(call.door.function, type):
        args, named = call.arguments(world)
        fresh = call.door.function(*args, **named)
        fresh.load_state_dict(loaded)
        if bits(fresh.state_dict()) != bits(loaded):
            return 'a fresh object does not hold what it has loaded'
        model = named.get('model')
        model = model if isinstance(model, nn.Module) else world.model
        _use(fresh, model, world)
        if HAS_COMPOSER and call.door.name in ('EMA', 'SWA'):
            args, named = call.arguments(world)
            return _wrong_run(call.door.function(*args, **named))
    elif call.door.of is not None:
        with contextlib.suppress(TypeError):
            copy.deepcopy(subject) if isinstance(subject, (ShadowModel, ShadowModels)) else None
    return None


def _use(subject: Any, model: nn.Module, world: World) -> None:
    """Does with a fresh object what it is for."""
    if isinstance(subject, ShadowModel):
        subject.update(model) if subject.has_function else subject.update(model, smoothing=0.5)
        with subject.swapped(model):
            pass
        copy.deepcopy(subject)
    elif isinstance(subject, ShadowModels):
        subject.update(model) if subject.has_function else subject.update(model, smoothing=0.5)
    elif isinstance(subject, EMAOptimizer):
        before = [parameter.detach().clone() for group in subject.param_groups for parameter in group['params']]
        for group in subject.param_groups:
            for parameter in group['params']:
                parameter.grad = torch.zeros_like(parameter)
        subject.step()
        with subject.swap_ema_weights():
            pass
        with torch.no_grad():
            for group in subject.param_groups:
                for parameter in group['params']:
                    parameter.copy_(before.pop(0))
    elif isinstance(subject, Snapshots):
        subject.update()
        subject.finish()
    elif HAS_COMPOSER:
        started(subject, model)
        state = subject.state_dict()
        if (found := not_plain(state)) is not None:
            raise AssertionError(found)
        subject.load_state_dict(saved(state))


def _wrong_run(algorithm: Any) -> str | None:
    """What is wrong with a run of two batches with this algorithm."""
    trained = trained_with(algorithm)
    may_differ = getattr(algorithm, '_annealing', None) is not None  # it sets the learning rate
    return None if may_differ or trained == trained_alone() else 'training has changed'


def trained_with(*algorithms: Any) -> Any:
    from toy import make_trainer

    trainer = make_trainer(algorithms, max_duration='2ba')
    try:
        trainer.fit()
        return bits(trainer.state.model.state_dict())
    finally:
        trainer.close()


@functools.cache
def trained_alone() -> Any:
    return trained_with()


# All of it


@dataclass
class Failure:
    call: Call
    number: int
    wrong: str

    @property
    def kind(self) -> str:
        """What failures have in common."""
        return re.sub(r"'[^']*'|\d+", '', self.wrong)[:120]


def run(seed: int, rounds: int, folder: Path, *, only: str = '') -> list[Failure]:
    """Makes random calls; returns those that end in another way than they should.

    Args:
        seed: of the drawing.
        rounds: how many calls.
        folder: for files, emptied often.
        only: part of the names of the doors to call.
    """
    rng, found = random.Random(seed), [door for door in doors() if only in door.name]
    files, scratch = folder / 'files', folder / 'scratch'
    make_files(files)
    failures = []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for number in range(rounds):
            call = Call.drawn(rng.choice(found), rng)
            scratch.mkdir(parents=True, exist_ok=True)
            with contextlib.chdir(scratch) if sys.version_info >= (3, 11) else contextlib.nullcontext():
                wrong = trial(call, World(scratch, files))
            shutil.rmtree(scratch, ignore_errors=True)
            if wrong is not None:
                failures.append(Failure(call, number, wrong))
    return failures


def make_files(folder: Path) -> None:
    """An average in two files, and the snapshots of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    model = network()
    for name in ('average.pt', 'second.pt'):
        torch.save({'model': model.state_dict(), 'ema': ShadowModel(model).state_dict()}, folder / name)
    snapshots = Snapshots(model, folder / 'run', every=2, num_steps=4)
    for _ in range(4):
        snapshots.update(num_samples=2)
    snapshots.finish()
