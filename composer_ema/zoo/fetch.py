"""Image data sets from the first place that has them; content is returned or kept only when its checksum is right."""

import contextlib
import fcntl
import functools
import hashlib
import http.client
import logging
import os
import shlex
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
import torchvision

log = logging.getLogger(__name__)

CACHE_VARIABLE = 'COMPOSER_EMA_CACHE'
DEBIAN_FOLDER = Path('/usr/share/datasets/fashion-mnist')
DEBIAN_PACKAGE = 'dataset-fashion-mnist'

# SHA-256 of the idx files themselves. The MD5 sums that torchvision publishes are those of the .gz files, whose gzip
# headers Debian rewrote; with the original file name and time put back into them, Debian's files have those sums too.
FASHION_MNIST_SHA256 = {
    'train-images-idx3-ubyte': 'c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888',
    'train-labels-idx1-ubyte': 'bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9',
    't10k-images-idx3-ubyte': '5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b',
    't10k-labels-idx1-ubyte': '0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34',
}

Content = TypeVar('Content')

_TORCHVISION_LAYOUT = Path('FashionMNIST', 'raw')
_ANSWER_SECONDS = 10.0  # for the first answer of a mirror: a network that drops packets must not cost minutes
_STALL_SECONDS = 30.0  # for one read of a download that has begun
_APT_SECONDS = 180.0  # for one apt-get or dpkg-deb command
_APT_OPTIONS = ('-o', 'Acquire::Retries=1', '-o', 'Acquire::http::Timeout=15', '-o', 'Acquire::https::Timeout=15')


class Unusable(Exception):
    """Why one place does not yield the data set; the look-up goes on to the next place."""


class Damaged(Unusable):
    """A file is there, with other content than the data set has."""


def cache_folder() -> Path:
    """The folder that keeps fetched data: `$COMPOSER_EMA_CACHE`, else `composer_ema` in the user's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    base = os.environ.get('XDG_CACHE_HOME')
    return (Path(base) if base else Path.home() / '.cache') / 'composer_ema'


def load_fashion_mnist(root: str | Path | None = None) -> dict[str, torch.Tensor]:
    """Reads Fashion-MNIST, and fetches it into the cache if no place on this machine has it.

    The order is: `root`; the cache folder; Debian's `/usr/share/datasets/fashion-mnist`; torchvision's download;
    Debian's or Ubuntu's package `dataset-fashion-mnist`, downloaded and unpacked without root. A folder may hold the
    four idx files, plain or as `.gz`, or torchvision's `FashionMNIST/raw/`. A damaged file is logged and the next place
    is tried. Several processes may call this at once: one fetches, the others wait and read.

    Args:
        root: The folder to look in first; `None` starts with the cache.

    Returns:
        `train_inputs` (60000, 1, 28, 28), `train_labels` (60000,), `test_inputs` (10000, 1, 28, 28), `test_labels`
        (10000,); all uint8.

    Raises:
        FileNotFoundError: No place has it; the message names every place and what it said.
    """
    places = _folders(root, ('cache', cache_folder()), ('Debian package', DEBIAN_FOLDER), read=_read_idx_files)
    for name, fetch in FASHION_MNIST_FETCHERS.items():
        places[name] = functools.partial(_fetch_into_cache, fetch, _read_idx_files, _install_idx_files)
    wanted = ', '.join(f'{name}[.gz]' for name in FASHION_MNIST_SHA256)
    return _as_tensors(_first_usable('Fashion-MNIST', places, wanted))


def load_cifar10(root: str | Path | None = None) -> dict[str, torch.Tensor]:
    """Reads CIFAR-10 through torchvision, which verifies it, from `root`, the cache, or torchvision's download.

    Args:
        root: The folder that holds `cifar-10-batches-py/`; `None` starts with the cache.

    Returns:
        `train_inputs` (50000, 3, 32, 32) uint8, `train_labels` (50000,) int64, `test_inputs` (10000, 3, 32, 32) uint8,
        `test_labels` (10000,) int64.

    Raises:
        FileNotFoundError: No place has it; the message names every place and what it said.
    """
    places = _folders(root, ('cache', cache_folder()), read=_read_cifar10)
    places['torchvision download'] = functools.partial(
        _fetch_into_cache, _fetch_cifar10, _read_cifar10, _install_cifar10
    )
    return _first_usable('CIFAR-10', places, 'cifar-10-batches-py/')


def _folders(
    root: str | Path | None, *others: tuple[str, Path], read: Callable[[Path], Content]
) -> dict[str, Callable[[], Content]]:
    named = [] if root is None else [('root', Path(root).expanduser())]
    return {f'{name} {folder}': functools.partial(read, folder) for name, folder in (*named, *others)}


def _first_usable(data_set: str, places: dict[str, Callable[[], Content]], wanted: str) -> Content:
    refusals: list[str] = []
    for name, read in places.items():
        try:
            return read()
        except Unusable as reason:
            refusals.append(f'{name}: {reason}')
            if isinstance(reason, Damaged) or name.startswith('root '):
                log.warning('%s: passing over %s', data_set, refusals[-1])
    listed = '\n'.join(f'  {number}. {refusal}' for number, refusal in enumerate(refusals, start=1))
    raise FileNotFoundError(
        f'{data_set} was found in no place:\n{listed}\n'
        f'Pass root=, a folder with {wanted}, or put that into {cache_folder()}.'
    )


def _read_idx_files(folder: Path) -> dict[str, bytes]:
    return {name: _read_verified(folder, name, sha256) for name, sha256 in FASHION_MNIST_SHA256.items()}


def _read_verified(folder: Path, name: str, sha256: str) -> bytes:
    problems: list[str] = []
    for path in (base / file for base in (folder, folder / _TORCHVISION_LAYOUT) for file in (name, f'{name}.gz')):
        try:
            content = path.read_bytes()
            if path.suffix == '.gz':
                # Unlike gzip.open, this hands back what a truncated stream holds, so its checksum can be reported.
                content = zlib.decompressobj(wbits=31).decompress(content)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, zlib.error) as error:
            problems.append(f'{path} cannot be read ({error}); SHA-256 of its content must be {sha256}')
            continue
        if (found := hashlib.sha256(content).hexdigest()) == sha256:
            return content
        problems.append(f'{path} is damaged: SHA-256 of its content must be {sha256}, got {found}. Delete it')
    if problems:
        raise Damaged('; '.join(problems))
    raise Unusable(f'no {name} and no {name}.gz there')


def _as_tensors(files: dict[str, bytes]) -> dict[str, torch.Tensor]:
    # The checksum has fixed every byte, headers included: 16 for images and 8 for labels.
    # torchvision's reader of idx files accepts only a path, and would read a second time what was verified.
    tensors: dict[str, torch.Tensor] = {}
    for split, prefix in (('train', 'train'), ('test', 't10k')):
        images, labels = files[f'{prefix}-images-idx3-ubyte'], files[f'{prefix}-labels-idx1-ubyte']
        tensors[f'{split}_inputs'] = torch.frombuffer(bytearray(images), dtype=torch.uint8)[16:].view(-1, 1, 28, 28)
        tensors[f'{split}_labels'] = torch.frombuffer(bytearray(labels), dtype=torch.uint8)[8:]
    return tensors


def _fetch_into_cache(
    fetch: Callable[[Path], Path],
    read: Callable[[Path], Content],
    install: Callable[[Content, Path, Path], None],
) -> Content:
    """Content that `fetch` brings, verified by `read`, kept by `install(content, folder with it, cache)`."""
    cache = cache_folder()
    try:
        with _sole_fetcher(cache):
            with contextlib.suppress(Unusable):  # another process may have fetched it while this one waited
                return read(cache)
            with _scratch_folder(cache) as scratch:
                folder = fetch(scratch)
                content = read(folder)
                install(content, folder, cache)
            return content
    except OSError as error:
        raise Unusable(f'cannot write to the cache ({error}); set {CACHE_VARIABLE} to another folder') from None


def _install_idx_files(files: dict[str, bytes], fetched: Path, cache: Path) -> None:
    target = cache / _TORCHVISION_LAYOUT
    target.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        unfinished = fetched / f'{name}.unfinished'
        unfinished.write_bytes(content)
        unfinished.replace(target / name)


def _install_cifar10(_: dict[str, torch.Tensor], fetched: Path, cache: Path) -> None:
    name = torchvision.datasets.CIFAR10.base_folder
    shutil.rmtree(cache / name, ignore_errors=True)
    (fetched / name).replace(cache / name)


def _fetch_from_torchvision(scratch: Path) -> Path:
    source = torchvision.datasets.FashionMNIST
    _download_with_torchvision(
        source.mirrors[0] + source.resources[0][0], lambda: source(root=str(scratch), download=True)
    )
    return scratch


def _fetch_cifar10(scratch: Path) -> Path:
    source = torchvision.datasets.CIFAR10
    _download_with_torchvision(source.url, lambda: source(root=str(scratch), download=True))
    return scratch


def _fetch_from_apt(scratch: Path) -> Path:
    for tool in ('apt-get', 'dpkg-deb'):
        if shutil.which(tool) is None:
            raise Unusable(f'{tool} is not installed; this place is for Debian and Ubuntu')
    download = ('apt-get', 'download', DEBIAN_PACKAGE)
    try:
        _run(download, *_APT_OPTIONS, folder=scratch)
    except Unusable as without_lists:
        # Package lists of its own need neither root nor that anyone ever ran apt-get update here.
        own = ('-o', f'Dir::State::lists={scratch / "lists"}', '-o', f'Dir::Cache={scratch / "cache"}')
        for folder in ('lists/partial', 'cache/archives/partial'):  # apt-get creates these only for root
            (scratch / folder).mkdir(parents=True)
        update_said = _run(('apt-get', 'update'), *_APT_OPTIONS, *own, folder=scratch, must_succeed=False)
        try:
            _run(download, *_APT_OPTIONS, *own, folder=scratch)
        except Unusable as with_lists:
            raise Unusable(f'{without_lists}; apt-get update: {update_said}; then {with_lists}') from None
    for package in scratch.glob('*.deb'):
        _run(('dpkg-deb', '-x', package.name, '.'), folder=scratch)
    return scratch / DEBIAN_FOLDER.relative_to('/')


FASHION_MNIST_FETCHERS: dict[str, Callable[[Path], Path]] = {
    'torchvision download': _fetch_from_torchvision,
    'apt-get download': _fetch_from_apt,
}


def _run(command: tuple[str, ...], *options: str, folder: Path, must_succeed: bool = True) -> str:
    shown = shlex.join(command)
    try:
        done = subprocess.run(
            [command[0], *options, *command[1:]],
            cwd=folder,
            env={**os.environ, 'LC_ALL': 'C'},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors='replace',
            timeout=_APT_SECONDS,
            check=False,
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        raise Unusable(f'{shown}: {error}') from None
    said = ' / '.join(line for line in done.stderr.splitlines() if line.strip())[-1000:] or 'no message'
    if must_succeed and done.returncode != 0:
        raise Unusable(f'{shown} ended with code {done.returncode}: {said}')
    return said


def _read_cifar10(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for split in ('train', 'test'):
        try:
            source = torchvision.datasets.CIFAR10(root=str(folder), train=split == 'train')
        except (RuntimeError, OSError) as error:
            raise Unusable(f'holds no intact cifar-10-batches-py ({error})') from None
        tensors[f'{split}_inputs'] = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
        tensors[f'{split}_labels'] = torch.tensor(source.targets)
    return tensors


def _download_with_torchvision(first_url: str, download: Callable[[], object]) -> None:
    _require_answer(first_url)
    # torchvision opens its connections without a timeout and has no argument for one.
    earlier = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_STALL_SECONDS)
    try:
        download()
    except (OSError, RuntimeError, http.client.HTTPException, EOFError, zlib.error) as error:
        raise Unusable(str(error)) from None
    finally:
        socket.setdefaulttimeout(earlier)


def _require_answer(url: str) -> None:
    answers: list[Exception | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method='HEAD'), timeout=_ANSWER_SECONDS).close()
            answers.append(None)
        except urllib.error.HTTPError:
            answers.append(None)  # the mirror is there; what it refuses, the download itself reports
        except Exception as error:
            answers.append(error)

    # A thread, since neither the look-up of the name nor a mirror with many addresses keeps to urlopen's timeout.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_ANSWER_SECONDS)
    if not answers:
        raise Unusable(f'{url} did not answer within {_ANSWER_SECONDS:g} s')
    if answers[0] is not None:
        raise Unusable(f'{url}: {answers[0]}')


@contextlib.contextmanager
def _sole_fetcher(cache: Path) -> Iterator[None]:
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / '.lock', 'a') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # closing the file, or the end of the process, releases it
        yield


@contextlib.contextmanager
def _scratch_folder(cache: Path) -> Iterator[Path]:
    # One fixed name inside the cache: the holder of the lock may clear what a killed process left, and a rename from
    # here stays on one file system, where it is atomic.
    scratch = cache / '.unfinished'
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
