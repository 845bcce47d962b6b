"""Draws damaged and absurd files, for the tests and the trial of what reads them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from composer_ema import EMAOptimizer, ShadowModel, export


def averaged_model() -> tuple[nn.Module, EMAOptimizer]:
    """A small network with BatchNorm after three steps of EMAOptimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = EMAOptimizer(torch.optim.Adam(model.parameters(), lr=0.1), decay=0.5, model=model)
    for _ in range(3):
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def of_composer(model: nn.Module, optimizer: EMAOptimizer) -> dict[str, Any]:
    """What Composer's Trainer would save of a run with this average, by hand."""
    shadow = optimizer.shadow.state_dict()
    average = {
        'parameters': shadow['parameters'], 'buffers': shadow['buffers'], 'aliases': {}, 'num_updates': 3, 'seed': 0,
        'last_update': {'ba': 3, 'ep': 0}, 'started_at': {'ba': 0, 'ep': 0}, 'first_update': {'ba': 1, 'ep': 0},
        'start_share': 0.125, 'profile': {'description': 'smoothing=0.5'},
    }  # fmt: skip
    ema = {
        'version': 3, 'repr': 'EMA(smoothing=0.5)', 'config': {'smoothing': 0.5, 'half_life': None}, 'started': True,
        'averages': {'ema': average},
    }  # fmt: skip
    state = {
        'model': model.state_dict(),
        'algorithms': [('EMA', ema)],
        'run_name': 'by-hand',
        'timestamp': {'Timestamp': {'epoch': 0, 'batch': 3, 'sample': 15, 'token': 0}},
        'optimizers': {'Adam': {}},
        'metadata': {'torch_version': '2', 'composer_env_info': {'composer_version': '0.32.1'}},
    }
    return {'state': state, 'rng': []}


def sound_files(folder: Path) -> dict[str, Path]:
    """One file of each kind that has checksums, by what it is."""
    model, optimizer = averaged_model()
    states = {
        'composer': of_composer(model, optimizer),
        'script': {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'step': 3},
        'optimizer': optimizer.state_dict(),
        'shadow': ShadowModel(model).state_dict() | {'num_updates': 1},
    }
    files = {name: folder / f'{name}.pt' for name in states}
    for name, state in states.items():
        torch.save(state, files[name])
    for name, suffix in (('export', '.safetensors'), ('export_of_torch', '.pt')):
        export(files['script'], files.setdefault(name, folder / f'{name}{suffix}'))
    return files


def damaged(content: bytes, random: Random) -> bytes:
    """The content of a file after something happened to it; never the same."""
    data = bytearray(content)
    at, size = random.randrange(len(data)), min(len(data), 2 ** random.randrange(12))
    match random.randrange(8):
        case 0:
            data[at] ^= 1 << random.randrange(8)
        case 1:
            data[at] = random.randrange(256)
        case 2:
            del data[at:]
        case 3:
            del data[at : at + size]
        case 4:
            data[at : at + size] = bytes(len(data[at : at + size]))
        case 5:
            data[at:at] = random.randbytes(size)
        case 6:
            data[at : at + size] = random.randbytes(len(data[at : at + size]))
        case 7:
            other = random.randrange(len(data))
            data[at : at + size] = data[other : other + len(data[at : at + size])]
    return bytes(data) if bytes(data) != content else damaged(content, random)


def repacked(
    path: Path, out: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED
) -> Path:
    """Writes a zip of torch anew, with right sums, each part changed by a function of its name and content."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, 'w', compression) as target:
        for part in source.infolist():
            target.writestr(zipfile.ZipInfo(part.filename), change(part.filename, source.read(part)), compression)
    return out


def same(one: Any, other: Any) -> bool:
    """Whether two values that were read are the same to the bit."""
    if isinstance(one, Tensor):
        is_alike = isinstance(other, Tensor) and (one.dtype, one.shape) == (other.dtype, other.shape)
        return is_alike and one.cpu().contiguous().numpy().tobytes() == other.cpu().contiguous().numpy().tobytes()
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other


def deep(levels: int) -> Any:
    """A list in a list in a list."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def circle() -> dict[str, Any]:
    """A dictionary that holds itself."""
    value: dict[str, Any] = {'a': torch.ones(2)}
    value['self'] = value
    return value


#: Values that no trainer would write where they are put.
ABSURD: dict[str, Callable[[], Any]] = {
    'none': lambda: None,
    'true': lambda: True,
    'text': lambda: 'text',
    'escape': lambda: '\x1b]0;title\x07\x1b[31m[bold]$x$\u202e\n',
    'surrogate': lambda: '\udcff',
    'zero': lambda: 0,
    'huge number': lambda: 10**400,
    'negative': lambda: -1,
    'nan': lambda: float('nan'),
    'infinite': lambda: float('inf'),
    'complex number': lambda: 1j,
    'bytes': lambda: b'bytes',
    'empty list': list,
    'list': lambda: [1, 'a', None],
    'empty dict': dict,
    'dict of numbers': lambda: {1: 2, (1, 2): 3},
    'set': lambda: {1, 2},
    'deep': lambda: deep(10_000),
    'circle': circle,
    'long name': lambda: {'n' * 400: torch.ones(2)},
    'odd names': lambda: {'a\0b': torch.ones(2), '../../x/y': torch.ones(2), '': torch.ones(1), '.': torch.ones(1)},
    'many': lambda: dict.fromkeys(map(str, range(20_000)), 0),
    'shared lists': lambda: [[0] * 5_000] * 5_000,
    'scalar': lambda: torch.tensor(1.0),
    'empty tensor': lambda: torch.empty(0, 3),
    'other shape': lambda: torch.ones(7, 7),
    'whole numbers': lambda: torch.arange(4),
    'booleans': lambda: torch.tensor([True, False]),
    'complex': lambda: torch.ones(4, dtype=torch.complex64),
    'conjugate': lambda: torch.ones(4, dtype=torch.complex64).conj(),
    'float8': lambda: torch.ones(4).to(torch.float8_e4m3fn),
    'half': lambda: torch.ones(4, dtype=torch.float16),
    'not finite': lambda: torch.tensor([float('nan'), float('inf')]),
    'sparse': lambda: torch.sparse_coo_tensor(torch.tensor([[0], [1]]), torch.ones(1), (4, 4)),
    'huge sparse': lambda: torch.sparse_coo_tensor(torch.tensor([[0], [1]]), torch.ones(1), (10**6, 10**6)),
    'sparse rows': lambda: torch.eye(4).to_sparse_csr(),
    'quantized': lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    'nested': lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    'meta': lambda: torch.ones(4, device='meta'),
    'expanded': lambda: torch.zeros(1).expand(1000, 1000),
    'expanded too far': lambda: torch.zeros(1).expand(10**6, 10**6),
    'strided': lambda: torch.arange(24.0).reshape(4, 6)[:, ::2].t(),
    'parameter': lambda: nn.Parameter(torch.ones(4)),
}  # fmt: skip


def mutated(held: Any, random: Random) -> tuple[Any, str]:
    """A copy of nested dictionaries and lists with something absurd in one place, and what was done in words."""
    places = list(_places(held))
    path = random.choice(places)
    kind = random.choice(list(ABSURD))
    return _changed(held, path, kind, random.randrange(10)), f'{kind} at {path}'


def _places(held: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(held, dict):
        for key, value in held.items():
            yield from _places(value, (*path, key))
    elif isinstance(held, list | tuple):
        for place, value in enumerate(held):
            yield from _places(value, (*path, place))


def _changed(held: Any, path: tuple[Any, ...], kind: str, how: int) -> Any:
    if not path:
        return ABSURD[kind]()
    key, *rest = path
    if isinstance(held, dict):
        own = dict(held)
        if not rest and how == 0:
            del own[key]
        elif not rest and how == 1:
            own['\x1b[31mname' if kind == 'escape' else 'n' * 400] = own.pop(key)
        elif not rest and how == 2:
            own[3] = own.pop(key)
        else:
            own[key] = _changed(held[key], tuple(rest), kind, how)
        return own
    changed = [_changed(value, tuple(rest), kind, how) if place == key else value for place, value in enumerate(held)]
    return tuple(changed) if isinstance(held, tuple) else changed
