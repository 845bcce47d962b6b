"""Draws absurd recipes and overrides, and judges what loading, planning, building and previewing them comes to."""

from __future__ import annotations

import contextlib
import io
import os
import random
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bounded import in_time
from omegaconf import OmegaConf

from composer_ema.recipe import registry, run, schema
from composer_ema.recipe.arguments import RecipeError, signature
from composer_ema.recipe.preview import preview

YAMLS = Path(__file__).parent.parent / 'yamls'
#: Recipes whose data are generated. They are made small, and shorter still where the drawn overrides do not touch that.
BASES = ('mnist1d', 'mnist1d_several', 'mnist1d_snapshots', 'mnist1d_swa')
SMALL = ('model.name=mnist1d_mlp', 'model.width=4', 'data.num_samples=200', 'data.batch_size=20', 'max_duration=2ep')
#: How long one input may take, in seconds, on a machine that does other things as well.
MOST_SECONDS = 30

_NUMBERS = (
    '0', '-1', '1', '2', '7', '0.5', '-0.0', '1e-300', '1e300', '1e400', '.inf', '-.inf', '.nan', '1000000000000',
    '99999999999999999999999999', '2147483648', '0x10', '1_0', '010', '1:30', 'true', 'no', 'null', '',
)  # fmt: skip
_TIMES = tuple(
    f'{value}{unit}'
    for value in ('0', '-1', '1', '3', '0.5', '1.5', 'inf', 'nan', '1e400', '1e30', '1e-300', ' 1', '١', '1_0', '')
    for unit in ('ba', 'ep', 'sp', 'tok', 'iter', 'dur', 'sec', 'EP', 'epp', ' ba', '')
)
_NAMES = (
    'x', '"[/x]"', '"{rank}"', '"{x}"', '"{"', '"}"', '..', '.', 'a/../../b', '/abs', '"   "', '-x', '"~"', '"~/x"',
    '"a\\0b"', '"a\\nb"', '"\\e[31mb"', 'é', '"e\\u0301"', '名', '"\\u202ea"', 'k' * 300, 'a//b', 'a/', '""', 'CON',
    '"%s"', "'it''s'", '"{epoch}"', '"{run_name.__class__}"', '"{rank:>99999}"', 's3://x/y', '<b>', '`x`', '$HOME',
)  # fmt: skip
_POINTERS = (
    '${missing}', '${oc.env:HOME}', '${oc.env:NOPE,1}', '${oc.decode:"[1]"}', '${', '${}', '${seed}', 'x${seed}y',
    '${.}', '${..seed}', '${...seed}', '${variables.v}', '\\${x}', '${${seed}}', '${optimizer}', 'a${optimizer}',
    '${evaluate.0}', '${evaluate[9]}', '???', '${max_duration}', '${run_name}', '${' * 40 + '}' * 40,
)  # fmt: skip
_THINGS = (
    '[]', '{}', '[[]]', '{a: 1}', '{name: x}', '{name: [x]}', '[1,2]', '[x', '{x', '"', "'", '!!python/tuple [1]',
    '&a [*a]', '*a', '!!set {a}', '!!binary aGk=', '!!timestamp 2001-01-01', '2001-01-01', '? ', '- a', 'a: b: c', '#',
    '[' * 60 + ']' * 60, '{1: 2}', '{null: 1}', '{"a.b": 1}', '|', '> x', '@x', '%x', '\t', '\ufeff1', '\x85',
    '{<<: 1}',
)  # fmt: skip
_VALUES = (_NUMBERS, _TIMES, _NAMES, _POINTERS, _THINGS)
_OFFLINE_LOGGERS = ('file_logger', 'in_memory_logger', 'tensorboard_logger', 'console_logger', 'progress_bar_logger')
#: What reads a trace of the whole process, runs other programs or waits for a network.
_NOT_HERE = ('memory_snapshot', 'oom_observer', 'mlperf', 'system_metrics_monitor', 'generate', 'load_checkpoint')
_FORMS = ('{key}', '={value}', '~{key}', '+{key}={value}', '--{key}={value}', '{key}={value}.yaml', '~{key}={value}')


@dataclass(frozen=True)
class Attempt:
    """A recipe and overrides of it.

    Args:
        base: The shipped recipe that it came from.
        text: The content of the file.
        overrides: As on the command line.
        drawn: Key and value of what was drawn, for which an error must speak.
    """

    base: str
    text: bytes
    overrides: tuple[str, ...]
    drawn: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        changed = '' if self.text == _text(self.base) else f', text={self.text!r}'
        return f'{self.base}{changed} {list(self.overrides)}'


def draw(rng: random.Random) -> Attempt:
    """Mostly overrides, now and then a damaged file."""
    base = rng.choice(BASES)
    if rng.random() < 0.2:
        return Attempt(base, _damaged(_text(base), rng), SMALL, ())
    drawn = tuple((_key(rng, base), _value(rng)) for _ in range(rng.choice((1, 1, 1, 2))))
    if rng.random() < 0.08:
        form, (key, value) = rng.choice(_FORMS), drawn[0]
        return Attempt(base, _text(base), (*SMALL, form.format(key=key, value=value)), ())
    return Attempt(base, _text(base), (*SMALL, *(f'{key}={value}' for key, value in drawn)), drawn)


def judge(attempt: Attempt, folder: Path, *, trains: bool = False) -> tuple[str, str | None]:
    """Loads, plans, builds and previews an attempt.

    Args:
        attempt: What was drawn.
        folder: An empty folder, the current one.
        trains: Whether to train three batches of what can be built.

    Returns:
        tuple: ``'refused'`` or ``'sound'``, and what is wrong with the outcome; None if nothing is.
    """
    path = folder / 'recipe.yaml'
    path.write_bytes(attempt.text)
    said, outcome = None, 'sound'
    try:
        with in_time(MOST_SECONDS), _quiet():
            recipe = schema.load(path, attempt.overrides)
            checked = schema.plan(recipe)
            run.rehearse(recipe)
            if checked.extent() is not None and checked.trainer['max_duration'] == '2ep':
                preview(recipe)
            if trains:
                run.train(recipe.replace(max_duration='3ba', run_name='t', runs_folder='t', device='cpu'), _ignore)
    except RecipeError as error:
        outcome, said = 'refused', _unsaid(attempt, str(error))
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        where = ' < '.join(f'{Path(frame.filename).name}:{frame.lineno}' for frame in reversed(frames))
        outcome, said = 'failed', f'{type(error).__name__}: {str(error)[:300]} ({where})'
    path.unlink()
    # Composer's CheckpointSaver keeps an empty temporary folder until the process ends.
    left = [
        each for each in folder.rglob('*') if not (each.parent == folder and each.is_dir() and not any(each.iterdir()))
    ]
    if not trains and left:
        said = f'{said or outcome}; left {[str(each.relative_to(folder)) for each in left[:5]]}'
    return outcome, said


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """An empty folder to work in, where temporary files go as well, so that what is left of them is seen."""
    before, temporary = Path.cwd(), tempfile.tempdir
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        os.chdir(folder)
        tempfile.tempdir = name
        try:
            yield folder
        finally:
            os.chdir(before)
            tempfile.tempdir = temporary


def _unsaid(attempt: Attempt, text: str) -> str | None:
    """What an error lacks: the key of one of the drawn overrides, and its value where that is a plain one."""
    if any(
        each in text for each in ('no such', 'needs ', 'there is no ', 'there are no ', 'has no keys')
    ):  # whatever its value
        return None
    for key, value in attempt.drawn:
        has_key = any(part in text for part in (key, key.partition('.')[0]))
        if has_key and any(each in text for each in _spellings(value)):
            return None
    return f'no key and value in: {text[:400]}' if attempt.drawn else None


def _spellings(value: str) -> list[str]:
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f'value={value}']))
        parsed = parsed['value']
    except Exception:
        return [value, repr(value)[1:-1], '']  # no YAML: the error shows the whole override
    if isinstance(parsed, str) and (len(parsed) > 200 or '\0' in parsed or '${' in parsed or '?' in parsed):
        return ['']
    spelled = [str(parsed), repr(parsed), ascii(parsed)]
    return [*spelled, value, ''] if isinstance(parsed, dict | list | None) else [*spelled, 'nan', 'more than 64 bits']


def _key(rng: random.Random, base: str) -> str:
    kinds = ('trainer', 'given', 'class', 'class', 'odd')
    match rng.choice(kinds):
        case 'trainer':
            return rng.choice(sorted({*schema.SECTIONS, *schema.trainer_arguments.legal_names()}))
        case 'given':
            return rng.choice(_paths(OmegaConf.to_container(OmegaConf.create(_text(base).decode()))))
        case 'class':
            section, known = rng.choice((('algorithms', registry.algorithms()), ('callbacks', registry.callbacks())))
            if rng.random() < 0.1:
                section, names = 'loggers', list(_OFFLINE_LOGGERS)
                known = registry.loggers()
            else:
                names = [name for name in known.classes if name not in _NOT_HERE]
            name = rng.choice(names)
            arguments = list(signature(known.find(name))) or ['x']
            return f'{section}.{name}.{rng.choice(arguments)}'
        case _:
            odd = (
                'x',
                'a.b.c',
                'seed.x',
                'evaluate.7',
                'evaluate.-1',
                'é',
                'optimizer.lr.x',
                'variables.v',
                'name',
                '0',
            )
            return rng.choice((*odd, 'data.seed', 'scheduler.name', 'optimizer.name', 'model.name', 'evaluate.00'))


def _value(rng: random.Random) -> str:
    if rng.random() < 0.15:
        names = [*registry.schedulers().classes, *registry.optimizers().classes]
        return f'{{name: {rng.choice(names)}, {rng.choice(("lr", "t_max", "T_max", "interval"))}: {_value(rng)}}}'
    return rng.choice(rng.choice(_VALUES))


def _damaged(text: bytes, rng: random.Random) -> bytes:
    lines = text.split(b'\n')
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(lines))
        line = lines[at]
        match rng.randrange(8):
            case 0:
                lines[at] = b''
            case 1:
                lines.insert(at, rng.choice(lines))
            case 2:
                lines[at] = b' ' * rng.randrange(5) + line.strip()
            case 3:
                lines = lines[: at + 1]
            case 4 if line:
                place = rng.randrange(len(line))
                lines[at] = line[:place] + bytes([rng.randrange(256)]) + line[place + 1 :]
            case 5:
                lines[at] = line.partition(b':')[0] + b': ' + _value(rng).encode()
            case 6:
                lines[at] = _value(rng).encode() + b': ' + line.partition(b':')[2]
            case _:
                lines[at] = line + rng.choice(
                    (b' &a', b' *a', b' #', b' ]', b' {', b'\t', b'\r', b': x', b' |', b'\xff')
                )
    return b'\n'.join(lines)


def _paths(value: Any, path: str = '') -> list[str]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    below = [each for key, entry in inner for each in _paths(entry, f'{path}.{key}' if path else str(key))]
    return [path, *below] if path else below


def _text(base: str) -> bytes:
    return (YAMLS / f'{base}.yaml').read_bytes()


def _ignore(renderable: Any) -> None:
    pass


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter('ignore')
        yield
