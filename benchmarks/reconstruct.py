"""How far averages that are made after a run are from those that training would have kept; ours and the peers'.

One small network is trained on MNIST-1D at a constant rate. On the way, the true averages are summed in float64 from
the weights after every step, and every contestant keeps what it needs. The error is the distance from the true average
over the distance of that average from the last weights, in percent. A dash stands where a contestant offers no such
average.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from benchmarks import common
from composer_ema import Snapshots, reconstruct
from composer_ema.averages import Power
from composer_ema.posthoc import shares
from composer_ema.posthoc.fit import Kept, copies, fit

Vector: TypeAlias = npt.NDArray[np.float64]

#: Widths of the two power averages that are kept.
KEPT = (0.05, 0.10)
#: Half-life of the one average that an ordinary run keeps, as a share of the run.
ORDINARY = 0.10
#: Standard deviation of fresh noise on the inputs, without which the network fits all of them and stops moving.
NOISE = 0.5
POWER, HALF_LIFE, EQUAL = 'sigma', 'half-life', 'equal'
TARGETS = (
    *((POWER, width) for width in (0.05, 0.15, 0.25)),
    *((HALF_LIFE, share) for share in (0.01, 0.03, 0.10, 0.30)),
    (EQUAL, 0.20),
)
PEER = 'ema-pytorch PostHocEMA'


@dataclass
class Run:
    """What a training run leaves.

    Attributes:
        steps: of the run.
        names: of the parameters, in their order.
        moments: steps at which contestants keep something, the last among them.
        weights: by step, training weights at the moments and after the first step.
        kept: by label, the weight that each average in memory gives each step.
        averages: by label, and there by moment: these averages, float32.
        truths: the true average of each target, float64.
        folder: of what contestants wrote.
        update_ms: milliseconds that keeping took a step, by contestant.
    """

    steps: int
    names: list[str]
    moments: list[int]
    folder: Path
    weights: dict[int, Vector] = field(default_factory=dict)
    kept: dict[str, Vector] = field(default_factory=dict)
    averages: dict[str, dict[int, Vector]] = field(default_factory=dict)
    truths: dict[tuple[str, float], Vector] = field(default_factory=dict)
    update_ms: dict[str, float] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> common.Result:
    """Runs the benchmark; see ``--help``."""
    options = common.parser(__doc__ or '')
    options.add_argument('--steps', type=int, default=6400, help='of training, a multiple of the number of files')
    options.add_argument('--files', default='16,32', help='moments at which contestants keep files')
    parsed = options.parse_args(arguments)
    result = common.start('reconstruct', parsed)
    result.measures = ['error_percent']
    counts = sorted(int(each) for each in parsed.files.split(','))
    if any(parsed.steps % count or counts[-1] % count for count in counts):
        raise SystemExit(f'--steps {parsed.steps} must be a multiple of each of --files, and the last of the others.')
    with tempfile.TemporaryDirectory() as folder:
        run, peers = train(parsed.steps, counts, Path(folder), result)
        for count in counts:
            rows = measure(run, peers, count)
            result.rows.extend(rows)
            _show(count, rows)
    result.save()
    return result


# The run


def train(
    steps: int, counts: Sequence[int], folder: Path, result: common.Result
) -> tuple[Run, dict[str, Callable[..., nn.Module]]]:
    """Trains once, beside every contestant; returns what they kept, and how each peer makes an average of it."""
    inputs, labels = _mnist1d()
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    every = steps // counts[-1]
    run = Run(steps, [name for name, _ in model.named_parameters()], list(range(every, steps + 1, every)), folder)
    snapshots = {}
    for count in counts:
        apart, name = steps // count, f'ours-{count}'
        # By default further files are written shortly before the end.
        snapshots[name] = Snapshots(model, folder / name, every=apart, num_steps=steps, power=KEPT)
        even = f'{name}-even'
        snapshots[even] = Snapshots(model, folder / even, every=apart, num_steps=steps, power=KEPT, halvings=0)
    peers = _peers(model, run, every, result)
    updates: dict[str, Callable[[], object]] = {name: each.update for name, each in snapshots.items()}
    updates |= {name: peer.update for name, peer in peers.items()}
    spent = dict.fromkeys(updates, 0.0)

    targets = np.stack([np.diff(cumulative(target, steps), prepend=0.0) for target in TARGETS])
    sums = np.zeros((len(TARGETS), parameters_to_vector(model.parameters()).numel()))
    targets_kept = {**{str(width): (POWER, width) for width in KEPT}, 'ordinary': (HALF_LIFE, ORDINARY)}
    run.kept = {label: shares.weights_of(cumulative(each, steps)) for label, each in targets_kept.items()}
    moving: dict[str, Vector] = {}
    generator = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(inputs), (100,), generator=generator)
        noise = NOISE * torch.randn(len(chosen), inputs.shape[1], generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(inputs[chosen] + noise), labels[chosen]).backward()
        optimizer.step()
        for name, update in updates.items():
            began = time.perf_counter()
            update()
            spent[name] += time.perf_counter() - began
        weights = parameters_to_vector(model.parameters()).detach().double().numpy()
        sums += targets[:, step - 1 : step] * weights
        for label, factors in run.kept.items():
            moving[label] = weights if step == 1 else moving[label] + factors[step - 1] * (weights - moving[label])
        if step == 1 or step in run.moments:
            run.weights[step] = weights
            for label, average in moving.items():
                run.averages.setdefault(label, {})[step] = average.astype(np.float32).astype(np.float64)
    for each in snapshots.values():
        each.finish()
    run.truths = dict(zip(TARGETS, sums, strict=True))
    run.update_ms = {name: 1e3 * seconds / steps for name, seconds in spent.items()}
    return run, {name: peer.synthesize_ema_model for name, peer in peers.items()}


def _mnist1d() -> tuple[torch.Tensor, torch.Tensor]:
    from mnist1d.data import get_dataset_args, make_dataset

    data = make_dataset(get_dataset_args())
    return torch.as_tensor(data['x'], dtype=torch.float32), torch.as_tensor(data['y'])


def _peers(model: nn.Module, run: Run, every: int, result: common.Result) -> dict[str, Any]:
    try:
        post_hoc = importlib.import_module('ema_pytorch').PostHocEMA
    except ImportError as error:
        result.leave_out(PEER, f'{type(error).__name__}: {error}')
        return {}
    variants: dict[str, dict[str, Any]] = {
        'defaults': {},
        'update_every=1': {'update_every': 1},
        'update_every=1, float32': {'update_every': 1, 'checkpoint_dtype': torch.float32},
    }
    return {
        f'{PEER}, {name}': post_hoc(
            model,
            sigma_rels=KEPT,
            checkpoint_every_num_steps=every,
            checkpoint_folder=str(run.folder / f'peer-{index}'),
            **arguments,
        )
        for index, (name, arguments) in enumerate(variants.items())
    }


# The averages


def cumulative(target: tuple[str, float], steps: int) -> Vector:
    """The share of the wanted average that was made up to each step."""
    kind, value = target
    times = np.arange(1, steps + 1, dtype=np.float64)
    if kind == POWER:
        return shares.power(times, Power(value).gamma)
    if kind == HALF_LIFE:
        return shares.exponential(times, value * steps)
    return shares.latest(times, value * steps)


def measure(run: Run, peers: dict[str, Callable[..., nn.Module]], count: int) -> list[dict[str, Any]]:
    """A row for each contestant and target, all with ``count`` moments."""
    apart = len(run.moments) // count
    moments = run.moments[apart - 1 :: apart]
    size = len(run.weights[1])
    rows = []

    def add(name: str, make: Callable[[tuple[str, float]], Vector | None], disk: int, updates: str | None) -> None:
        for target in TARGETS:
            began = time.perf_counter()
            made = make(target)
            seconds = time.perf_counter() - began
            if made is None:
                continue
            truth = run.truths[target]
            error = np.linalg.norm(made - truth) / np.linalg.norm(truth - run.weights[run.steps])
            rows.append(
                {
                    'key': f'{count} moments / {name} / {target[0]} {target[1]}',
                    'moments': count,
                    'contestant': name,
                    'target': f'{target[0]} {target[1]}',
                    'error_percent': 100 * float(error),
                    'disk_kib': disk / 1024,
                    'seconds': seconds,
                    'update_ms': None if updates is None else run.update_ms[updates],
                }
            )

    for index, (name, synthesize) in enumerate(peers.items()):
        folder = run.folder / f'peer-{index}'
        with _only(folder, moments):
            add(name, lambda target, make=synthesize: _of_peer(make, target), _bytes_in(folder), name)
    of_power = [(str(width), moment) for width in KEPT for moment in moments]
    both = [(Kept(run.kept[label][:moment]), run.averages[label][moment]) for label, moment in of_power]
    ends = [(copies(moment), run.weights[moment]) for moment in (1, run.steps)]
    add('continuous time, appendix C', lambda target: _continuous(run, of_power, target), 4 * size * len(both), None)
    add('shares, step by step', lambda target: _by_shares(run, both, target), 4 * size * len(both), None)
    add('LAWA, best number of checkpoints', lambda target: _lawa(run, moments, target), 4 * size * count, None)
    alone = [(copies(moment), run.weights[moment]) for moment in moments]
    add('ours, checkpoints of the weights', lambda target: _fitted(run, alone, target), 4 * size * count, None)
    ordinary = [(Kept(run.kept['ordinary'][:moment]), run.averages['ordinary'][moment]) for moment in moments]
    kept = [*ordinary, *alone]
    add('ours, checkpoints with one average', lambda target: _fitted(run, kept, target), 4 * size * len(kept), None)
    kept = [*both, *ends]
    add('ours, snapshots in float32', lambda target: _fitted(run, kept, target), 4 * size * len(kept), None)
    for title, name in (('ours, snapshots evenly apart', f'ours-{count}-even'), ('ours, snapshots', f'ours-{count}')):
        folder = run.folder / name
        add(title, lambda target, folder=folder: _of_snapshots(run, folder, target), _bytes_in(folder), name)
    return rows


def _fitted(run: Run, kept: Sequence[tuple[Kept, Vector]], target: tuple[str, float]) -> Vector:
    """Ours, in memory: the fit of cumulative shares."""
    found = fit([each for each, _ in kept], shares.weights_of(cumulative(target, run.steps)))
    return found.coefficients @ np.stack([average for _, average in kept])


def _of_snapshots(run: Run, folder: Path, target: tuple[str, float]) -> Vector:
    """Ours, from the files."""
    kind, value = target
    if kind == POWER:
        found = reconstruct(folder, power=value, anyway=True)
    elif kind == HALF_LIFE:
        found = reconstruct(folder, half_life=f'{value}dur', anyway=True)
    else:
        found = reconstruct(folder, equal=f'{value}dur', anyway=True)
    return np.concatenate([found.state_dict[name].double().reshape(-1).numpy() for name in run.names])


def _by_shares(run: Run, kept: Sequence[tuple[Kept, Vector]], target: tuple[str, float]) -> Vector:
    """The least squares of Karras et al. on the shares of single steps in place of functions of time."""
    design = np.zeros((run.steps, len(kept)))
    for column, (each, _) in enumerate(kept):
        design[: each.moment, column] = shares.shares(each.weights)
    wanted = np.diff(cumulative(target, run.steps), prepend=0.0)
    found = np.linalg.lstsq(design, wanted, rcond=None)[0]
    return found @ np.stack([average for _, average in kept])


def _continuous(run: Run, kept: Sequence[tuple[str, int]], target: tuple[str, float]) -> Vector | None:
    """Karras et al. (2024), appendix C.2: profiles are power functions of continuous time, with inner products::

    <p, q> = (a + 1) (b + 1) / (a + b + 1) * (s / t)^b / t,    s <= t, with b the exponent of the later one
    """
    kind, value = target
    if kind != POWER:
        return None
    exponents = np.array([Power(float(label)).gamma for label, _ in kept] + [Power(value).gamma])
    times = np.array([moment for _, moment in kept] + [run.steps], dtype=np.float64)
    one, other = np.meshgrid(np.arange(len(times)), np.arange(len(times)), indexing='ij')
    later = np.where(times[one] >= times[other], one, other)
    earliest, latest = np.minimum(times[one], times[other]), np.maximum(times[one], times[other])
    ratio = (earliest / latest) ** exponents[later]
    a, b = exponents[one], exponents[other]
    products = (a + 1) * (b + 1) / (a + b + 1) * ratio / latest
    found = np.linalg.solve(products[:-1, :-1], products[:-1, -1])
    return found @ np.stack([run.averages[label][moment] for label, moment in kept])


def _lawa(run: Run, moments: Sequence[int], target: tuple[str, float]) -> Vector:
    """The equal average of the latest checkpoints, as many as are best for this target, which a user cannot know."""
    latest = np.cumsum([run.weights[moment] for moment in reversed(moments)], axis=0)
    means = latest / np.arange(1, len(moments) + 1)[:, None]
    return min(means, key=lambda mean: float(np.linalg.norm(mean - run.truths[target])))


def _of_peer(synthesize: Callable[..., Any], target: tuple[str, float]) -> Vector | None:
    kind, value = target
    if kind != POWER:
        return None
    return parameters_to_vector(synthesize(sigma_rel=value).ema_model.parameters()).detach().double().numpy()


class _only:
    """Within it, the folder of a peer holds the files of these moments only."""

    def __init__(self, folder: Path, moments: Sequence[int]) -> None:
        self._folder, self._moments = folder, set(moments)
        self._aside = folder.with_name(f'{folder.name}-aside')

    def __enter__(self) -> None:
        self._aside.mkdir()
        for file in self._folder.glob('*.pt'):
            if int(file.stem.split('.')[1]) not in self._moments:
                shutil.move(file, self._aside)

    def __exit__(self, *_: object) -> None:
        for file in self._aside.iterdir():
            shutil.move(file, self._folder)
        self._aside.rmdir()


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _show(count: int, rows: Sequence[dict[str, Any]]) -> None:
    titles = [f'{kind[0]} {100 * value:g} %' if kind != POWER else f's {value:g}' for kind, value in TARGETS]
    names = [f'{kind} {value}' for kind, value in TARGETS]
    table = []
    for contestant in dict.fromkeys(row['contestant'] for row in rows):
        own = {row['target']: row for row in rows if row['contestant'] == contestant}
        first = next(iter(own.values()))
        errors = [_digits(own[name]['error_percent']) if name in own else None for name in names]
        seconds = sum(row['seconds'] for row in own.values()) / len(own)
        table.append([contestant, *errors, f'{first["disk_kib"]:.0f}', f'{1e3 * seconds:.0f}', first['update_ms']])
    columns = ['contestant', *titles, 'KiB', 'ms', 'ms a step']
    common.show(f'{count} moments: error in % of the distance from the last weights', columns, table)


def _digits(value: float) -> str:
    return f'{value:.0f}' if value >= 10 else f'{value:.1f}' if value >= 1 else f'{value:.3f}'


if __name__ == '__main__':
    main()
