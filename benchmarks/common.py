"""What every benchmark shares: interleaved timing, the facts about the machine, tables and result files.

Runs with torch and torchvision alone; rich makes the tables prettier where it is installed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent
RESULTS = FOLDER / 'results'
#: Smoothing of every average that is timed; no cost depends on it.
SMOOTHING = 0.999
#: What runs before a timed call, and so decides what is in the caches, see :class:`Timer`.
After = Literal['others', 'itself', 'flush', 'training']
#: What the C library does with memory that is freed, see :func:`set_heap`.
Heap = Literal['as is', 'kept', 'returned']
PRECISIONS = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}

_DISTRIBUTIONS = (
    'torch', 'torchvision', 'triton', 'mosaicml', 'timm', 'ema-pytorch', 'diffusers', 'torch-ema', 'lightning',
)  # fmt: skip
# More than the last-level cache of any processor or accelerator that this is likely to run on.
_FLUSH_BYTES = {'cpu': 2**27, 'cuda': 2**28}
# Parameters of mallopt in glibc, and their values: what a process begins with, and more than it adapts itself to.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_HEAPS = {'returned': (2**17, 2**17), 'kept': (2**31 - 1, 2**25)}
# For as long a short call is repeated, untimed and then timed; it is steady after some ten repetitions.
_LOOP_MS = 10.0
# Longest time for which a device is kept busy so that the host can get ahead of it.
_MAX_SLEEP_MS = 40.0


# The command line


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks take."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='cpu or cuda')
    options.add_argument('--out', type=Path, default=None, help='result file; results/NAME_DEVICE.json if not given')
    options.add_argument('--threads', type=int, default=None, help="threads of torch on the CPU; torch's choice if not")
    return options


def start(name: str, arguments: argparse.Namespace) -> Result:
    """Sets the threads, prints the machine and returns an empty result that knows the settings."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    out = arguments.out or RESULTS / f'{name}_{device.type}.json'
    settings = {key: value for key, value in vars(arguments).items() if key != 'out'}
    result = Result(name, device, out, settings)
    print(f'{name}: {describe_machine(result.machine)}', flush=True)
    return result


# The machine


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware, as far as it can be told without further tools."""
    facts: dict[str, Any] = {
        'cpu': _cpu_name(),
        'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        'threads': torch.get_num_threads(),
        'load': round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None,
        'device': device.type,
    }
    if device.type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        facts['gpu'] = properties.name
        facts['gpu_memory_gib'] = round(properties.total_memory / 2**30, 1)
        facts['cuda'] = torch.version.cuda
    return facts


def versions() -> dict[str, str | None]:
    """Versions of Python, this package and everything that is timed; None for what is not installed."""
    from composer_ema.version import __version__

    found: dict[str, str | None] = {'python': platform.python_version(), 'composer-ema': __version__}
    found['revision'] = _revision()
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found['torch'] = torch.__version__
    return found


def describe_machine(facts: Mapping[str, Any]) -> str:
    """One line for people."""
    gpu = f'{facts["gpu"]} with CUDA {facts["cuda"]}, ' if 'gpu' in facts else ''
    return (
        f'{gpu}{facts["cpu"]}, {facts["cores"]} cores, {facts["threads"]} threads, load {facts["load"]}; '
        f'torch {torch.__version__}, Python {platform.python_version()}, {_today()}'
    )


def _cpu_name() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.machine()


def _revision() -> str | None:
    """The commit that was measured, marked where files other than results differ from it; None outside a checkout."""
    try:
        commit = _git('rev-parse', '--short=10', 'HEAD')
        changed = _git('status', '--porcelain', '--untracked-files=no', '--', ':/', ':(top,exclude)benchmarks/results')
    except (OSError, subprocess.CalledProcessError):
        return None
    return f'{commit}-dirty' if changed else commit


def _git(*arguments: str) -> str:
    command = ['git', '-C', str(FOLDER), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _today() -> str:
    return datetime.now(timezone.utc).date().isoformat()


# Results


@dataclass
class Result:
    """Rows of one run of one benchmark, and what is needed to judge them.

    Attributes:
        name: of the benchmark.
        device: on which it ran.
        out: the result file.
        settings: the command's options.
        measures: keys of ``rows`` that hold numbers to compare; smaller is better.
        rows: each has a unique ``key`` and the measures.
        missing: what could not be measured, with the reason.
        summary: numbers over all rows.
    """

    name: str
    device: torch.device
    out: Path
    settings: dict[str, Any]
    measures: list[str] = field(default_factory=lambda: ['ms'])
    rows: list[dict[str, Any]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.machine = machine(self.device)

    def leave_out(self, name: str, reason: str) -> None:
        """Names, in the output and in the file, something that is not measured; once."""
        entry = {'name': name, 'reason': reason}
        if entry not in self.missing:
            self.missing.append(entry)
            print(f'left out: {name}: {reason}', flush=True)

    def without_rows(self) -> Result:
        """The same machine and settings, for another process to fill."""
        return Result(self.name, self.device, self.out, self.settings, self.measures)

    def save(self) -> None:
        """Writes the result file beside its place and renames it, so that a killed run leaves a whole one."""
        content = {
            'benchmark': self.name,
            'date': _today(),
            'machine': self.machine,
            'versions': versions(),
            'settings': self.settings,
            'measures': self.measures,
            'missing': self.missing,
            'summary': self.summary,
            'rows': self.rows,
        }
        self.out.parent.mkdir(parents=True, exist_ok=True)
        beside = self.out.with_name(self.out.name + '.part')
        beside.write_text(json.dumps(content, indent=1, default=str) + '\n', encoding='utf-8')
        beside.replace(self.out)


def load(path: Path) -> dict[str, Any]:
    """Reads a result file."""
    return json.loads(path.read_text(encoding='utf-8'))


# Tables


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table: with rich on a terminal, else as Markdown, which a README takes as it is."""
    cells = [[_cell(value) for value in row] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        _show_plainly(title, columns, cells)
        return
    console = Console()
    if not console.is_terminal:
        _show_plainly(title, columns, cells)
        return
    table = Table(title=title, title_justify='left')
    for index, column in enumerate(columns):
        table.add_column(column, justify='left' if index == 0 else 'right')
    for row in cells:
        table.add_row(*row)
    console.print(table)


def _show_plainly(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in (columns, *cells)) for i in range(len(columns))]
    left, *right = widths
    lines = [[row[0].ljust(left), *map(str.rjust, row[1:], right)] for row in (columns, *cells)]
    lines.insert(1, ['-' * left, *('-' * (width - 1) + ':' for width in right)])
    print(f'\n{title}\n', *(f'| {" | ".join(line)} |' for line in lines), sep='\n', flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return '–'
    if isinstance(value, float):
        return f'{value:.3f}' if abs(value) < 10 else f'{value:,.1f}'
    return f'{value:,}' if isinstance(value, int) and not isinstance(value, bool) else str(value)


# Timing


@dataclass(frozen=True)
class Sample:
    """One call, in milliseconds.

    Attributes:
        ms: from an idle device until all is done.
        host_ms: until the call returns.
        device_ms: on a device that the host is ahead of, so that launches cost nothing; None on the CPU.
    """

    ms: float
    host_ms: float
    device_ms: float | None = None


class Timer:
    """Times single calls.

    Args:
        device: on which they run.
        after: what runs untimed right before a call: ``'others'``, whatever was timed last; ``'itself'``, on a CPU in a
            loop whose mean is taken, as ``timeit`` does; ``'flush'``, which leaves nothing of the call's in the caches;
            ``'training'``.
        train: runs one training iteration, for the last of them.
    """

    def __init__(
        self, device: torch.device, after: After = 'others', train: Callable[[], object] | None = None
    ) -> None:
        self._device, self._after, self._train = device, after, train
        size = _FLUSH_BYTES[device.type] if after == 'flush' else 0
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)
        self._cycles_per_ms = _cycles_per_ms() if device.type == 'cuda' else 0.0

    def __call__(self, call: Callable[[], object]) -> Sample:
        if self._device.type != 'cuda':
            return self._on_the_host(call)
        self._prepare(call)
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        returned = time.perf_counter()
        torch.cuda.synchronize()
        ms, host_ms = (time.perf_counter() - began) * 1e3, (returned - began) * 1e3
        return Sample(ms, host_ms, self._device_ms(call, host_ms))

    def _on_the_host(self, call: Callable[[], object]) -> Sample:
        times = self._prepare(call)
        began = time.perf_counter()
        for _ in range(times):
            call()
        ms = (time.perf_counter() - began) * 1e3 / times
        return Sample(ms, ms)

    def _prepare(self, call: Callable[[], object]) -> int:
        """Returns how many calls the time is to be measured of."""
        if self._after == 'flush':
            self._flush.fill_(1)
        elif self._after == 'training':
            assert self._train is not None
            self._train()
        elif self._after == 'itself':
            return self._repeat(call)
        return 1

    def _repeat(self, call: Callable[[], object]) -> int:
        times, began = 0, time.perf_counter()
        while times == 0 or (time.perf_counter() - began) * 1e3 < _LOOP_MS:
            call()
            times += 1
        return times

    def _device_ms(self, call: Callable[[], object], host_ms: float) -> float:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._prepare(call)
        torch.cuda._sleep(int(min(2 * host_ms + 0.3, _MAX_SLEEP_MS) * self._cycles_per_ms))
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last)


def count_launches(call: Callable[[], object]) -> int | None:
    """Kernels, copies and fills that a CUDA device runs for a call; None where torch's profiler sees nothing."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    return sum(is_launch(event) for event in profiled.events() or ()) or None


def is_launch(event: Any) -> bool:
    """Whether a profiler's event is work of a CUDA device, and not a range that somebody named."""
    # Compared with ==: each event makes an enumeration's value of its own.
    return event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, 'is_user_annotation', False)


def heaps(device: torch.device) -> tuple[Heap, ...]:
    """The states of the heap that decide about a call on ``device``, and can be set; ``('as is',)`` where none can."""
    has_mallopt = platform.libc_ver()[0] == 'glibc' and hasattr(ctypes.CDLL(None), 'mallopt')
    return ('kept', 'returned') if device.type == 'cpu' and has_mallopt else ('as is',)


def set_heap(heap: Heap) -> None:
    """Says what the C library does with freed memory, for good: it no longer adapts to what is freed.

    Both are bounds, between which a process of its own accord lies. ``'returned'`` gives back to the system what is
    free at the end of the heap, and blocks of 128 KiB and more, as every process does at first; each large tensor then
    costs the system a clean page every 4 KiB. ``'kept'`` gives back nothing but blocks of 32 MiB and more; a process
    comes close to it that has freed one nearly as large, as training does.
    """
    if heap == 'as is':
        return
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in zip((_TRIM_THRESHOLD, _MMAP_THRESHOLD), _HEAPS[heap], strict=True):
        if not mallopt(parameter, value):
            raise OSError(f'the C library refused mallopt({parameter}, {value}), so the heap cannot be {heap!r}.')


def interleave(
    calls: Mapping[str, Callable[[], object]],
    time_one: Callable[[Callable[[], object]], Sample],
    *,
    rounds: int,
    seconds: float | None = None,
    min_rounds: int = 3,
) -> dict[str, list[Sample]]:
    """Times every call once a round, in another order each round, so that all see the same disturbances.

    Args:
        calls: by name.
        time_one: times one call, for example a :class:`Timer`.
        rounds: at most as many.
        seconds: no round is begun after these.
        min_rounds: but so many are.
    """
    names, order = list(calls), random.Random(0)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    began = time.monotonic()
    gc.collect()
    with no_garbage_collection():
        for number in range(rounds):
            if seconds is not None and number >= min_rounds and time.monotonic() - began > seconds:
                break
            order.shuffle(names)
            for name in names:
                samples[name].append(time_one(calls[name]))
    return samples


def medians(samples: Sequence[Sample]) -> dict[str, float]:
    """The median of each of a sample's times that was taken, and the spread of the first."""
    times = sorted(sample.ms for sample in samples)
    found = {'ms': median(times), 'ms_quartiles': [times[len(times) // 4], times[(3 * len(times)) // 4]]}
    device_times = [sample.device_ms for sample in samples if sample.device_ms is not None]
    if device_times:
        found['host_ms'] = median(sample.host_ms for sample in samples)
        found['device_ms'] = median(device_times)
    return found


def ratio(samples: Sequence[Sample], base: Sequence[Sample], of: str = 'ms') -> float:
    """Median over the rounds of how much longer a call took than another in the same round."""
    return median(getattr(a, of) / getattr(b, of) for a, b in zip(samples, base, strict=True))


def geometric_mean(values: Sequence[float]) -> float:
    """The n-th root of the product of n positive numbers."""
    return float(torch.tensor(values, dtype=torch.float64).log().mean().exp())


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Puts it off until the body ends."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _cycles_per_ms() -> float:
    cycles = 20_000_000
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(2):  # the first one compiles
        first.record()
        torch.cuda._sleep(cycles)
        last.record()
        torch.cuda.synchronize()
    return cycles / first.elapsed_time(last)


# Models


def in_own_process(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a module's function in a fresh process, which finds no heap that other measurements left."""
    pool = multiprocessing.get_context('spawn').Pool(1)
    try:
        return pool.apply(measure, arguments)
    finally:
        pool.close()  # not terminated: Composer turns that signal into an exception
        pool.join()


def make_model(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A torchvision model with random weights, made where it is needed."""
    import torchvision

    torch.manual_seed(0)
    with torch.device(device):
        return torchvision.models.get_model(name, weights=None).to(device=device, dtype=dtype)


def floating(tensors: Iterator[Tensor]) -> list[Tensor]:
    """Those of ``tensors`` that an average can hold."""
    return [tensor.detach() for tensor in tensors if tensor.is_floating_point()]


def free(device: torch.device) -> None:
    """Gives memory back between two models."""
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()
