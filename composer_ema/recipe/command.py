"""Tells overrides from files among the arguments of a command, and writes the command that goes on with a run.

Imports nothing heavy, so that a command that only reads runs need not wait for torch.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: What YAML reads as something else than text.
_NO_TEXT = ('null', 'true', 'false', 'yes', 'no', 'on', 'off', 'y', 'n')


def is_override(argument: str) -> bool:
    """Whether an argument is ``key=value`` or ``~key``, and not a file.

    Example:
        >>> [each for each in ('a.yaml', 'optimizer.lr=0.1', '~scheduler', '~/a.yaml') if is_override(each)]
        ['optimizer.lr=0.1', '~scheduler']
    """
    has_form = '=' in argument or (argument.startswith('~') and '/' not in argument)
    return has_form and not os.path.exists(argument)  # Path(...).exists() raises for a name that no disk takes


@dataclass(frozen=True)
class Standing:
    """How far a stopped run has come.

    Args:
        run_name: The run.
        seed: Its seed.
        batch: Batches done.
        checkpoint: The newest one of this run; None before the first.
        checkpoint_batch: Batches done in it.
        flag: The override with which the run goes on from it, or begins anew.
    """

    run_name: str
    seed: int
    batch: int
    checkpoint: Path | None
    checkpoint_batch: int
    flag: str

    def how_to_go_on(self, command: str, first: str = '') -> str:
        """A sentence.

        Args:
            command: That goes on with the run.
            first: What has to be done before, as in ``'make room'``. Default: nothing.
        """
        if self.checkpoint is None:
            rest = 'start again with'
        else:
            rest = f'go on from {self.checkpoint} (batch {self.checkpoint_batch}) with'
        sentence = f'{first}, then {rest}' if first else rest
        none = 'No checkpoint has been saved yet. ' if self.checkpoint is None else ''
        return f'{none}{sentence[:1].upper()}{sentence[1:]}: {command}'


def that_goes_on(recipe: Path, overrides: Sequence[str], standing: Standing, seeds: Sequence[int] = ()) -> str:
    """The command that goes on with a run that was started with these arguments.

    Args:
        recipe: The file.
        overrides: As they were given.
        standing: Of the run.
        seeds: Those of ``--seeds``, if the run is one of several. Default: none.

    Example:
        >>> standing = Standing('a-2', 0, 7, None, 0, 'autoresume=true')
        >>> that_goes_on(Path('a.yaml'), ['optimizer.lr=0.1', 'autoresume=false'], standing)
        'composer-ema train a.yaml optimizer.lr=0.1 run_name=a-2 autoresume=true'
    """
    named, options = [f'run_name={_as_yaml(standing.run_name)}'], []
    kept = [each for each in overrides if not _sets(each, standing.flag)]
    if seeds and standing.run_name.endswith(f'-seed{standing.seed}'):  # all of them go on under the same names
        named, options = [], ['--seeds', ','.join(map(str, seeds))]
    else:
        kept = [each for each in kept if not _sets(each, 'run_name')]
        named = [*([f'seed={standing.seed}'] if seeds else []), *named]
    command = shlex.join([*_program(), 'train', str(recipe), *kept, *named, standing.flag, *options])
    processes, here = _processes()
    return command if processes == here else f'{command} (in each of {processes} processes, as before)'


def _program() -> list[str]:
    """What starts ``composer-ema`` in as many processes as there are now, if they are all on this machine."""
    processes, here = _processes()
    if processes == 1 or processes != here:
        return ['composer-ema']
    launcher = ['torchrun', '--nproc-per-node'] if 'TORCHELASTIC_RUN_ID' in os.environ else ['composer', '-n']
    return [*launcher, str(here), '-m', 'composer_ema.cli']


def _processes() -> tuple[int, int]:
    """How many processes train a run, and how many of them on this machine."""
    return int(os.environ.get('WORLD_SIZE', '1')), int(os.environ.get('LOCAL_WORLD_SIZE', '1'))


def _sets(override: str, key: str) -> bool:
    return override.partition('=')[0].strip(' ~') == key.partition('=')[0]


def _as_yaml(name: str) -> str:
    """A name as YAML reads it: in quotation marks where it would otherwise be a number or the like."""
    is_plain = re.fullmatch('[A-Za-z][A-Za-z0-9_./-]*', name) and name.lower() not in _NO_TEXT
    return name if is_plain else json.dumps(name)
