"""Names of a model's tensors: which are there, which a user selects, and how two sets of them differ."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, is_

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from composer_ema.sharding import canonical_name


@dataclass
class Inventory:
    """A module's tensors by canonical name, each once.

    Attributes:
        parameters: name to parameter; tied parameters under the first of their names.
        buffers: name to buffer, likewise.
        persistent: names of the buffers that the module's own ``state_dict`` holds.
        aliases: further names of a tied tensor, each with the name it stands under.
    """

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    persistent: set[str] = field(default_factory=set)
    aliases: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> Inventory:
        """Walks ``module``, which :func:`~composer_ema.sharding.unwrap` has freed of outer wrappers.

        Raises:
            ValueError: a lazy parameter has no shape yet.
        """
        inventory, first_names = cls(), {}
        for prefix, child in module.named_modules(remove_duplicate=False):
            path = f'{prefix}.' if prefix else ''
            for key, parameter in child._parameters.items():
                if parameter is not None:
                    name = canonical_name(path + key)
                    if is_lazy(parameter):
                        raise ValueError(f'{name} is a lazy parameter without a shape. Run one forward pass first.')
                    inventory._add(inventory.parameters, first_names, name, parameter)
            for key, buffer in child._buffers.items():
                if buffer is not None:
                    name = canonical_name(path + key)
                    inventory._add(inventory.buffers, first_names, name, buffer)
                    if key not in child._non_persistent_buffers_set:
                        inventory.persistent.add(name)
        return inventory

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return {**self.parameters, **self.buffers}

    def _add(self, tensors: dict, first_names: dict[int, str], name: str, tensor: Tensor) -> None:
        first_name = first_names.setdefault(id(tensor), name)
        if first_name != name:
            self.aliases[name] = first_name
        else:
            tensors[name] = tensor


class Watch:
    """Tells at the cost of a few list comparisons whether a module still is what it was.

    Compared are every parameter, buffer and sub-module by identity, in their order but not by name, the storage of
    ``addressed``, and ``requires_grad`` where it was False: unfrozen parameters join an average, while frozen ones
    stay. Keeps the module's tensors alive, not the module: drop the watch when ``on_gone`` is called.

    Args:
        module: what to watch.
        inventory: its tensors.
        on_gone: called when the module has been collected.
        addressed: those of its tensors whose memory must stay where it is. Default: all.
    """

    def __init__(
        self,
        module: nn.Module,
        inventory: Inventory,
        on_gone: Callable[[], None],
        *,
        addressed: Iterable[Tensor] | None = None,
    ) -> None:
        self._module = weakref.ref(module, lambda _: on_gone())
        registries = [r for child in module.modules() for r in (child._modules, child._parameters, child._buffers)]
        self._empty = [registry for registry in registries if not registry]
        self._views = [registry.values() for registry in registries if registry]
        self._entries = list(chain.from_iterable(self._views))
        self._frozen = [parameter for parameter in inventory.parameters.values() if not parameter.requires_grad]
        self._tensors = list(inventory.tensors().values() if addressed is None else addressed)
        self._pointers = list(map(_pointer, self._tensors))

    def is_current(self, module: nn.Module) -> bool:
        """Whether ``module`` is the watched one, with the same tensors at the same places."""
        entries = list(chain.from_iterable(self._views))
        return (
            self._module() is module
            and len(entries) == len(self._entries)
            and all(map(is_, entries, self._entries))
            and not any(self._empty)
            and not any(map(_requires_grad, self._frozen))
            and list(map(_pointer, self._tensors)) == self._pointers
        )


_requires_grad = attrgetter('requires_grad')
_pointer = Tensor.data_ptr


class Selection:
    """The names that ``include`` and ``exclude`` let through.

    Args:
        include: regular expressions, searched for in canonical names; a name needs one of them. None: every name.
        exclude: regular expressions that take a name out again.

    Raises:
        TypeError: a pattern is not a string.
        ValueError: a pattern is not a regular expression.
    """

    def __init__(self, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None) -> None:
        self._include = _compile('include', include)
        self._exclude = _compile('exclude', exclude)

    def __contains__(self, name: str) -> bool:
        is_included = not self._include or any(pattern.search(name) for pattern in self._include)
        return is_included and not any(pattern.search(name) for pattern in self._exclude)

    def check(self, names: Iterable[str]) -> None:
        """Raises unless every pattern matches one of ``names`` and some name is left."""
        names = list(names)
        for argument, patterns in (('include', self._include), ('exclude', self._exclude)):
            for pattern in patterns:
                if not any(pattern.search(name) for name in names):
                    raise ValueError(
                        f'{argument} pattern {pattern.pattern!r} matches none of the {len(names)} names of the model, '
                        f'which begin with {listed(names)}. Correct it or leave it out.'
                    )
        if names and not any(name in self for name in names):
            raise ValueError('include and exclude together leave no name to average. Widen include or narrow exclude.')


def _compile(argument: str, patterns: str | Sequence[str] | None) -> list[re.Pattern[str]]:
    if patterns is not None and not isinstance(patterns, (str, Sequence)):
        raise TypeError(f'{argument} must be a regular expression or a list of them, got {patterns!r}.')
    compiled = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        if not isinstance(pattern, str):
            raise TypeError(f'{argument} must hold strings, got {pattern!r} of type {type(pattern).__name__}.')
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(f'{argument} pattern {pattern!r} is not a regular expression: {error}.') from error
    return compiled


def check_same(
    what: str,
    expected: Mapping[str, Tensor],
    got: Mapping[str, Tensor],
    *,
    optional: Iterable[str] = (),
    remedy: str,
) -> None:
    """Raises a ValueError that lists every missing, unexpected and mis-shaped name, or returns.

    Args:
        what: subject of the message, for example ``'the state'``.
        expected: names and tensors that ``got`` must have.
        got: what is checked. Values that are no tensors are reported too.
        optional: names of ``expected`` that ``got`` may lack.
        remedy: last sentence of the message.
    """
    missing = expected.keys() - got.keys() - set(optional)
    unexpected = got.keys() - expected.keys()
    misshaped = [
        f'{name} (expected {_kind(expected[name])}, got {_kind(got[name])})'
        for name in got
        if name in expected and _kind(got[name]) != _kind(expected[name])
    ]
    problems = [
        f'{len(names)} {label}: {listed(sorted(map(str, names)))}'
        for label, names in (('missing', missing), ('unexpected', unexpected), ('of another shape or kind', misshaped))
        if names
    ]
    if problems:
        raise ValueError(f'{what} does not fit the model. {"; ".join(problems)}. {remedy}')


def _kind(value: object) -> str:
    """The shape, and whether it holds complex or whole numbers: what tensors must share for one to become the other."""
    if not isinstance(value, Tensor):
        return f'a {type(value).__name__}'
    kind = 'complex ' if value.is_complex() else '' if value.is_floating_point() else 'whole '
    return f'{kind}{tuple(value.shape)}'


def listed(names: Sequence[str], limit: int = 12) -> str:
    """The first names, and how many more there are."""
    return ', '.join(names[:limit]) + (f' and {len(names) - limit} more' if len(names) > limit else '')
