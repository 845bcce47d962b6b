"""How two sets of named tensors differ, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from composer_ema.wording import visible

# A name with more characters is shown by its ends.
_LONGEST, _END = 200, 90


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
    """The first names, and how many more there are. Those that a file made very long are cut in the middle."""
    shown = [visible(name if len(name) <= _LONGEST else f'{name[:_END]}...{name[-_END:]}') for name in names[:limit]]
    return ', '.join(shown) + (f' and {len(names) - limit} more' if len(names) > limit else '')
