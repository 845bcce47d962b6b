"""Several averages of one model by label: one watch, one plan and one read of the weights for all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from typing_extensions import Unpack

from composer_ema import plain
from composer_ema.model.names import listed
from composer_ema.model.untraced import aside, is_traced, untraced
from composer_ema.model.wrappers import unwrap
from composer_ema.settings import Settings, ShadowSettings, takes_settings
from composer_ema.shadow.follower import Follower
from composer_ema.shadow.lendable import LendableAverage
from composer_ema.shadow.shadow_model import ShadowModel, number_for, storages_of
from composer_ema.shadow.state import Loaded
from composer_ema.shadow.storage import Storage, check_renamed
from composer_ema.wording import shown

#: The version that :meth:`ShadowModels.state_dict` writes and :meth:`ShadowModels.load_state_dict` reads.
VERSION = 1
_VERSION, _AVERAGES = 'version', 'averages'
#: What to update each average by: one share for all, or one for each label.
Shares = float | Mapping[str, float]


class _Member(ShadowModel):
    """One of several averages that are updated together; built by :class:`ShadowModels`."""

    _label: str
    _labels: tuple[str, ...]

    @classmethod
    def new(cls, label: str, storages: Mapping[str, Storage], follower: Follower) -> _Member:
        member = cls.__new__(cls)
        LendableAverage.__init__(member, storages[label], follower)
        member._label, member._labels = label, tuple(storages)
        return member

    def update(self, model: nn.Module, smoothing: float | None = None, *, weight: float | None = None) -> NoReturn:
        """Refuses: the averages move together."""
        del model, smoothing, weight
        shares = ', '.join(f'{label!r}: ...' for label in self._labels)
        raise RuntimeError(
            f'the average {self._label!r} is one of {self._names()}, which one read of the weights updates together. '
            f'Call update(model, smoothing={{{shares}}}) of the ShadowModels.'
        )

    def resolve(
        self,
        model: nn.Module,
        *,
        joining: bool = False,
        leaving: bool = False,
        renamed: Mapping[str, str] | None = None,
    ) -> None:
        """As for a :class:`ShadowModel`, for all averages; names change only for all of them at once."""
        if leaving or renamed:
            raise RuntimeError(
                f'the averages {self._names()} track the same names, so these change for all at once. Call '
                'resolve(model, ...) of the ShadowModels.'
            )
        super().resolve(model, joining=joining)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None) -> NoReturn:
        """Refuses: the averages have one dtype and device."""
        del device, dtype
        raise RuntimeError(
            f'the averages {self._names()} have one dtype and device for all. Call to(...) of the ShadowModels.'
        )

    def _names(self) -> str:
        return ' and '.join(map(repr, self._labels))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle and deepcopy: a copy of one average alone is a :class:`ShadowModel` of its own."""
        del protocol
        self.wait()
        return _alone, (self._storage, self._follower.overlap)


def _alone(storage: Storage, overlap: bool) -> ShadowModel:
    shadow = ShadowModel.__new__(ShadowModel)
    LendableAverage.__init__(shadow, storage, Follower([storage], overlap=overlap))
    return shadow


@takes_settings
class ShadowModels(Mapping[str, ShadowModel]):
    """Keeps several averages of one model, each a :class:`ShadowModel` by its label.

    One update moves all of them, for each tracked tensor and each label::

        shadows[label] += (1 - smoothing[label]) * (source - shadows[label])

    It looks at the model once and reads each weight once; on CUDA it is one launch, or two if parameters run beside
    training. The results are those of separate shadows, to the bit, except that ``rounding='stochastic'`` gives each
    average random bits of its own.

    The averages track the same tensors, with the same settings. What lends, reads, saves or measures one average are
    the methods of the :class:`ShadowModel`: ``shadows['long'].swapped(model)``,
    ``shadows['long'].averaged_state_dict(model)``. One average can be loaded alone, as in
    ``shadows['long'].load_state_dict(state)``; several may stand in the model, in any order. A copy of one alone, by
    ``deepcopy`` or ``pickle``, is a ShadowModel of its own, which updates itself.

    Args:
        model: the model to follow; DDP, ``torch.compile`` and the like are looked through. Only read.
        labels: names of the averages, each once, at least one.
        overlap: as for :class:`ShadowModel`.
        settings: which tensors are kept and how, as for :class:`ShadowModel`.

    Raises:
        RuntimeError: ``model`` holds an average.
        TypeError, ValueError: labels that are no names or not distinct, or as for :class:`ShadowModel`.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 0.0)
        >>> shadows = ShadowModels(model, ['short', 'long'])
        >>> _ = nn.init.constant_(model.weight, 8.0)
        >>> shadows.update(model, smoothing={'short': 0.5, 'long': 0.75})
        >>> with shadows['short'].swapped(model):
        ...     model.weight.item()
        4.0
        >>> with shadows['long'].swapped(model):
        ...     model.weight.item()
        2.0
    """

    def __init__(
        self, model: nn.Module, labels: Iterable[str], *, overlap: bool = False, **settings: Unpack[ShadowSettings]
    ) -> None:
        if is_traced():
            aside(ShadowModels.__init__, self, model, labels, overlap=overlap, **settings)
            return
        names = _check_labels(labels)
        storages = storages_of(
            model, 'ShadowModels(model, labels)', Settings.of(settings), overlap=overlap, count=len(names)
        )
        follower = Follower(storages, overlap=bool(overlap), labels=names)
        self._set_up(dict(zip(names, storages, strict=True)), follower)

    @classmethod
    def of_one(cls, label: str, shadow: ShadowModel) -> ShadowModels:
        """A single average that exists already, under a label. It stays what it is, its own updates included."""
        (label,) = _check_labels([label])
        if not isinstance(shadow, ShadowModel):
            raise TypeError(f'shadow must be a ShadowModel, got {shown(shadow)}.')
        self = cls.__new__(cls)
        self._follower, self._members = shadow._follower, {label: shadow}
        return self

    def _set_up(self, storages: Mapping[str, Storage], follower: Follower) -> None:
        self._follower = follower
        self._members: dict[str, ShadowModel] = {label: _Member.new(label, storages, follower) for label in storages}

    def __getitem__(self, label: str) -> ShadowModel:
        return self._members[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    @property
    def has_function(self) -> bool:
        """Whether ``avg_fn`` or ``multi_avg_fn`` makes the averages."""
        return self._first.has_function

    def update(self, model: nn.Module, smoothing: Shares | None = None, *, weight: Shares | None = None) -> None:
        """Moves every average towards ``model``. Runs on the current stream; with ``overlap``, a long update of
        parameters beside it.

        With ``avg_fn`` or ``multi_avg_fn`` give neither share: the function decides, for each average by its own number
        of updates.

        Args:
            model: the model followed so far, or another of the same architecture. Only read.
            smoothing: share of the old average to keep, in [0, 1]: one for all, or a mapping with one for each label.
            weight: in place of ``smoothing``, the share ``1 - smoothing`` of the model, likewise.

        Raises:
            RuntimeError: the model holds an average, one of these or another; or the function raised.
            TypeError, ValueError: a label without a share, a share out of range, a tracked parameter that the model
                lacks, or a function that does not keep to its rules. Only what a ``multi_avg_fn`` has written by then
                has changed the averages.
        """
        if is_traced():
            aside(ShadowModels.update, self, model, smoothing, weight=weight)
            return
        smoothings, weights = self._by_label('smoothing', smoothing), self._by_label('weight', weight)
        numbers = []
        for index, (label, member) in enumerate(self._members.items()):
            numbers.append(number_for(member._storage, smoothings[index], weights[index]))
            if member.is_swapped:
                raise RuntimeError(
                    f'the model holds the average {label!r}, so there is nothing to average. Call '
                    'swap_out(model) of it first.'
                )
        self._follower.update(unwrap(model), numbers)

    def wait(self) -> None:
        """Orders the current stream after the last update; see :meth:`ShadowModel.wait`."""
        self._first.wait()

    def wait_for_reads(self) -> None:
        """Orders the current stream after the last update has read the parameters, which you may then write."""
        self._first.wait_for_reads()

    @property
    def is_pending(self) -> bool:
        """Whether an update runs beside the current stream, and neither wait has been called since."""
        return self._follower.is_pending

    def poll_skipped(self) -> int:
        """How many elements of the model ``skip_nonfinite`` has left out so far, of all averages alike.

        Never waits, so on CUDA a few updates old.
        """
        return self._follower.poll_skipped()

    def refuse_on_loan(self, model: nn.Module) -> None:
        """Raises a RuntimeError while any average stands in ``model``, which these follow."""
        self._first.refuse_on_loan(model)

    @untraced
    def resolve(
        self,
        model: nn.Module,
        *,
        joining: bool = False,
        leaving: bool = False,
        renamed: Mapping[str, str] | None = None,
    ) -> None:
        """Pairs all averages with ``model`` and moves them into its place now; see :meth:`ShadowModel.resolve`.

        Raises:
            RuntimeError: something is to join, to leave or to be renamed while ``model`` holds an average. Nothing is
                changed.
            ValueError: ``model`` lacks a tracked parameter or has it in another shape, or ``renamed`` does not fit.
                Nothing is changed.

        Warns:
            UserWarning: no average is left of those that there were.
        """
        module, renamed = unwrap(model), check_renamed(renamed)
        joining, leaving = plain.flag('joining', joining), plain.flag('leaving', leaving)
        if leaving or renamed:
            for member in self._members.values():
                member._refuse_new_names(module)
            self._follower.change_names(module, renamed, leaving=leaving, joining=joining)
        else:
            self._follower.forget_plan()
            self._follower.plan_for(module, joining=joining)

    def pair(self, model: nn.Module) -> None:
        """Pairs all averages with ``model`` unless that has been done, and moves them into its place. Nothing joins."""
        self._follower.plan_for(unwrap(model))

    def leave_out(self, names: Collection[str]) -> None:
        """Forgets the averages of these names; those that the model still has join anew at the next update."""
        names = plain.names('names', names)
        for member in self._members.values():
            member.leave_out(names)

    @untraced
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None) -> ShadowModels:
        """Moves all averages to a device, casts their floating tensors to a dtype, and stays there. Returns itself.

        Raises:
            ValueError: as for :meth:`ShadowModel.to`. Nothing is changed.
        """
        storages = [member._storage for member in self._members.values()]
        changed = [storage.settings.moved_to(device, dtype) for storage in storages]
        self._follower.forget_plan()
        for storage, settings in zip(storages, changed, strict=True):
            storage.convert(settings)
        return self

    def state_dict(self) -> dict[str, Any]:
        """The averages by label as plain dictionaries of tensors, which alias them: save or copy before updating.

        Returns:
            ``{'version': ..., 'averages': {label: ...}}`` with what each :meth:`ShadowModel.state_dict` returns.
        """
        return {
            _VERSION: VERSION,
            _AVERAGES: {label: member.state_dict() for label, member in self._members.items()},
        }

    @untraced
    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned, in place. All averages are checked before the first is assigned.

        To load one average alone, call ``shadows[label].load_state_dict(state)``.

        Raises:
            RuntimeError: an average is swapped into a model.
            TypeError: ``state`` is no dictionary.
            ValueError: another version, other labels, or names and shapes that do not fit, all listed.
        """
        version = plain.mapping('state', state, 'Nothing was loaded. Pass what state_dict() returned.').get(_VERSION)
        if type(version) is not int or version != VERSION or not isinstance(state.get(_AVERAGES), Mapping):
            raise ValueError(
                f'the state has format version {shown(version)} and is not one of several averages that this release '
                f'reads, version {VERSION}. Nothing was loaded. Pass what state_dict() of ShadowModels returned; the '
                'state of one average goes to shadows[label].load_state_dict(state).'
            )
        averages = state[_AVERAGES]
        if averages.keys() != self._members.keys():
            raise ValueError(
                f'the state holds the averages {listed([repr(each) for each in averages])}, not '
                f'{listed([repr(each) for each in self._members])}. Nothing was loaded. Build ShadowModels with the '
                'labels of the state, or load single averages by shadows[label].load_state_dict(state).'
            )
        self.load_averages(averages)

    def check_averages(self, averages: Mapping[str, Mapping[str, Any]]) -> dict[str, Loaded]:
        """What the states of some averages hold, each by its label, if all of them fit. Nothing is changed.

        Raises:
            TypeError: ``averages`` maps no labels.
            RuntimeError, ValueError: there is no average of a label, or as for :meth:`load_state_dict`.
        """
        for label in plain.mapping('averages', averages, 'Pass states by label.'):
            plain.label('averages', label, self._members)
        loaded = {}
        for label, state in averages.items():
            try:
                loaded[label] = self._members[label]._checked(state)
            except (RuntimeError, ValueError) as error:
                if len(self._members) == 1:
                    raise
                raise type(error)(f'{label}: {error}') from error
        return loaded

    @torch.no_grad()
    def load_averages(self, averages: Mapping[str, Mapping[str, Any]]) -> None:
        """Loads the states of some averages, each by its label; all of them are checked before the first is assigned.

        Raises:
            TypeError, RuntimeError, ValueError: as for :meth:`check_averages`.
        """
        loaded = self.check_averages(averages)
        for label, each in loaded.items():
            self._members[label]._warn_of_lost_digits(each.parameters)
        for label, each in loaded.items():
            self._members[label]._assign(each)

    def __repr__(self) -> str:
        return f'ShadowModels({", ".join(f"{label}={member!r}" for label, member in self._members.items())})'

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the averages without the ties to a model; the copies stand in none."""
        if self._is_of_one:
            return {'one': self._members}
        self.wait()  # the averages are copied before the follower
        return {'storages': {label: each._storage for label, each in self._members.items()}, 'follower': self._follower}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        if 'one' in state:
            self._members = state['one']
            self._follower = self._first._follower
        else:
            self._set_up(state['storages'], state['follower'])

    @property
    def _is_of_one(self) -> bool:
        return not isinstance(self._first, _Member)

    @property
    def _first(self) -> ShadowModel:
        return next(iter(self._members.values()))

    def _by_label(self, name: str, shares: Shares | None) -> list[float | None]:
        """One share for each average, in their order."""
        if not isinstance(shares, Mapping):
            return [shares] * len(self._members)
        if shares.keys() != self._members.keys():
            missing = [repr(label) for label in self._members if label not in shares]
            strange = [shown(label) for label in shares if label not in self._members]
            problem = ' and '.join([f'{each} is missing' for each in missing] + [f'{each} is none' for each in strange])
            raise ValueError(
                f'{name} must give a share for each average, {listed([repr(each) for each in self._members])}, but '
                f'{problem}. A smoothing of 1, or a weight of 0, leaves an average alone.'
            )
        return [shares[label] for label in self._members]


def _check_labels(labels: Iterable[str]) -> list[str]:
    names = plain.several('labels', labels, 'a list of names', "Pass for example ['short', 'long'].")
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"labels must hold names, got {shown(labels)}. Pass for example ['short', 'long'].")
    names = [str.__str__(name) for name in names]
    if not names or len(set(names)) < len(names):
        raise ValueError(f'labels must name at least one average, each once, got {shown(names)}.')
    return names
