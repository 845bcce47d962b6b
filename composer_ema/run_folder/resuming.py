"""Which checkpoint autoresume goes on from: the one that Composer's link leads to, or the newest whole one.

Composer writes a checkpoint, removes the link ``latest``, and makes it anew. A process that is killed in between leaves
a checkpoint that no link leads to, or half a checkpoint, or no link at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer_ema.checkpoints.reading import is_of_composer, run_name_of, trained
from composer_ema.checkpoints.safely import load_safely
from composer_ema.checkpoints.sharded import open_folder
from composer_ema.run_folder.packed import unpacked
from composer_ema.run_folder.save_folder import SaveFolder
from composer_ema.wording import counted

_NAMED = 3  # of the checkpoints that an error or a remark has to name
_REMEDY = (
    'To go on from another one, give load_path=... and leave autoresume out; to begin anew, move them away, or give '
    'another run_name.'
)


class CannotResumeError(Exception):
    """There is something to go on from, and none of it can be taken. The message says why and what to do."""


@dataclass(frozen=True)
class Found:
    """The checkpoint to go on from.

    Args:
        path: Of the file or folder itself, not of a link to it.
        remark: Why it is not the one that ``latest`` leads to, and what was passed over; empty where there is nothing
            to say.
    """

    path: Path
    remark: str = ''


@dataclass(frozen=True)
class _Candidate:
    """A checkpoint by its name, and what it says of itself.

    Args:
        path: Of the file or folder.
        batch: Batches trained, by its name where it cannot be read; 0 where that does not tell it either.
        run_name: The run that saved it; None where it does not say.
        is_of_run: Whether it holds the state of a run, as far as we can tell, and not weights alone.
    """

    path: Path
    batch: int
    run_name: str | None = None
    is_of_run: bool = True


def find(folder: SaveFolder, run_name: str, damage: Callable[[Path], str | None]) -> Found | None:
    """The newest whole checkpoint of a run; None where there is no checkpoint at all.

    The newest one has trained for most batches, by its own state. Where ``latest`` leads to a whole one, only a
    checkpoint that was written after that can be newer: files of before with more batches are what is left of a run
    that was taken back to an earlier checkpoint.

    Args:
        folder: Where the run saves.
        run_name: The run.
        damage: Returns what is wrong with a checkpoint, in a sentence; None for a whole one. It reads it through.

    Raises:
        CannotResumeError: Every checkpoint is damaged or another run's, or ``latest`` leads to one that is missing.
    """
    try:
        return _find(folder, run_name, damage)
    except OSError as error:
        raise CannotResumeError(f'{folder.path} cannot be searched for checkpoints: {error}.') from error


def _find(folder: SaveFolder, run_name: str, damage: Callable[[Path], str | None]) -> Found | None:
    named, pointed = folder.checkpoints(), folder.pointed_at()
    if pointed is not None:
        named.setdefault(pointed, None)
    if not named:
        if why := _why_not_latest(folder):
            raise CannotResumeError(
                f'{why}, and there is no other checkpoint in {folder.path}. Put it back, or delete the link to begin '
                'anew.'
            )
        return None
    wrong: dict[Path, str] = {}
    others: dict[Path, str] = {}
    for candidates in _in_turn(named, pointed):
        for each in candidates:
            if not folder.is_own and each.run_name not in (None, run_name):
                others[each.path] = str(each.run_name)
            elif reason := damage(each.path):
                wrong[each.path] = reason
            elif not each.is_of_run:
                wrong[each.path] = f'{each.path} holds weights alone, and not the state of a run.'
            else:
                return Found(each.path, '; '.join(_remarks(each.path, folder, pointed, wrong, others, candidates)))
    if others and not wrong:
        raise CannotResumeError(
            f'{folder.path} holds {counted(len(others), "checkpoint")} of {_listed(sorted(set(others.values())))}, and '
            f'none of {run_name}, which would overwrite them. Give each run its own folder, as in '
            'save_folder=.../{run_name}, or run_name=' + f'{next(iter(others.values()))} to go on with that run.'
        )
    raise CannotResumeError(f'there is nothing whole to go on from. {" ".join(_first(wrong.values()))} {_REMEDY}')


def _in_turn(named: Mapping[Path, int | None], pointed: Path | None) -> Iterator[list[_Candidate]]:
    """The checkpoints in the order in which they are to be taken: what the link leads to and newer ones, then the rest.

    Args:
        named: The checkpoints, and the batches that their names tell.
        pointed: What the link leads to.
    """
    first: list[_Candidate] = []
    if pointed is not None:
        own, since = _look_at(pointed, named[pointed]), _written(pointed)
        after = (_look_at(path, named[path]) for path in named if path != pointed and _written(path) >= since)
        first = [own, *(each for each in after if each.batch > own.batch)]
        yield _newest_first(first)
    done = {each.path for each in first}
    yield _newest_first([_look_at(path, batch) for path, batch in named.items() if path not in done])


def _newest_first(candidates: list[_Candidate]) -> list[_Candidate]:
    return sorted(candidates, key=lambda each: (each.batch, _written(each.path)), reverse=True)


def _look_at(path: Path, batch_in_name: int | None) -> _Candidate:
    """What a checkpoint says of itself, without reading its tensors."""
    by_name = _Candidate(path, batch_in_name or 0)
    try:
        if path.is_dir():
            held = open_folder(path)
        elif path.is_file():  # a pipe would make us wait
            with unpacked(path) as file:
                held = load_safely(file, mmap=True)
        else:
            return by_name
        state: Mapping[str, Any] = held['state'] if is_of_composer(held) else {}
        batch = trained(state).get('batch')
        return _Candidate(path, batch or 0, run_name_of(state), is_of_run=batch is not None)
    except Exception:  # damaged, or with types of the user's own
        return by_name


def _remarks(
    taken: Path,
    folder: SaveFolder,
    pointed: Path | None,
    wrong: Mapping[Path, str],
    others: Mapping[Path, str],
    looked_at: Iterable[_Candidate],
) -> Iterable[str]:
    """What is worth a word about the choice of ``taken``."""
    latest = '' if folder.latest is None else folder.latest.name
    if pointed is None and latest:
        yield _why_not_latest(folder) or f'{latest} is missing'
    elif pointed is not None and pointed in others:
        yield f'{latest} leads to {pointed.name} of the run {others[pointed]}'
    elif pointed not in (None, taken) and pointed not in wrong:
        yield f'{latest} is an older one' if pointed == folder.latest else f'{latest} leads to the older {pointed.name}'
    if wrong:
        yield f'passed over: {" ".join(_first(wrong.values()))}'
    later = max((each.path for each in looked_at if each.path not in (*wrong, *others)), key=_written)
    if pointed is None and _written(later) > _written(taken):
        yield f'{later.name} was written later, with fewer batches; to go on from that one, give load_path=...'


def _why_not_latest(folder: SaveFolder) -> str:
    """Why the link leads to nothing; empty where there is no link."""
    if folder.latest is None or not folder.latest.is_symlink():
        return ''
    target = os.readlink(folder.latest)
    if os.path.lexists(folder.latest.parent / target):
        return f'{folder.latest.name} leads in a circle'
    return f'{folder.latest.name} leads to {target}, which is not there'


def _first(sentences: Iterable[str]) -> list[str]:
    sentences = list(sentences)
    more = len(sentences) - _NAMED
    return sentences if more < 1 else [*sentences[:_NAMED], f'And {more} more.']


def _listed(names: list[str]) -> str:
    return ', '.join(names[:_NAMED]) + (f' and {len(names) - _NAMED} more' if len(names) > _NAMED else '')


def _written(path: Path) -> int:
    """When, in nanoseconds; of a link that leads nowhere, when that was made."""
    return path.stat(follow_symlinks=path.exists()).st_mtime_ns
