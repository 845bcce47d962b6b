"""Writes weights as files that a model loads, with what they are beside them."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from composer_ema.checkpoints import states
from composer_ema.checkpoints.checksum import CHECKSUM, ZEROS, seal
from composer_ema.checkpoints.opening import files_of
from composer_ema.checkpoints.safely import CheckpointError, load_safely
from composer_ema.checkpoints.sharded import is_sharded
from composer_ema.checkpoints.trainer_folder import is_trainer_folder
from composer_ema.files import beside, in_words
from composer_ema.model.names import listed

# What a run leaves in its folder besides checkpoints.
_OF_A_RUN = ('metrics.jsonl', 'recipe.yaml', 'sweep.jsonl')
_SNAPSHOT = re.compile(r'(averages|weights)-\d{8,}\.safetensors', re.ASCII)
# Composer's name for the link to the newest checkpoint, with the rank.
_LATEST = 'latest-rank*'
#: Endings of the files that torch writes; any other file is written as safetensors.
TORCH_SUFFIXES = ('.pt', '.pth', '.ckpt')


def write_weights(
    weights: Mapping[str, Any], metadata: dict[str, str], what: str, out: Path, *, by_torch: bool | None = None
) -> None:
    """Writes ``weights`` to ``out``, beside and renamed into place.

    Args:
        weights: tensors by name, and what modules keep besides them.
        metadata: to be written with the tensors. Names that safetensors cannot hold are added to it.
        what: the weights, in the words of an error.
        out: the file; its folder is made if it is missing.
        by_torch: whether torch writes it, or else safetensors. Default: torch where ``out`` has one of its endings.

    Raises:
        CheckpointError: the format cannot hold a tensor, or the file cannot be written; ``out`` is a file that a run
            needs. It is not touched.
    """
    if out.suffix in TORCH_SUFFIXES if by_torch is None else by_torch:
        write_torch(torch_copy(weights, metadata), what, out)
        return
    _refuse_replacing_of_a_run(out, what)
    tensors = dense(weights, metadata, what)
    with in_our_words(what), beside(out) as written:
        save_dense(tensors, metadata, written)


def write_torch(value: Any, what: str, out: Path) -> None:
    """Writes ``value`` as torch does to ``out``, beside and renamed into place.

    Raises:
        CheckpointError: as for :func:`write_weights`.
    """
    _refuse_replacing_of_a_run(out, what)
    try:
        # Given a path in place of a file, torch does not say why it cannot write.
        with beside(out) as written, written.open('wb') as file:
            torch.save(value, file)
    except OSError as error:
        raise CheckpointError(in_words(error, 'written')) from error
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f'{what} cannot be written by torch: {error}') from error


@contextmanager
def in_our_words(what: str) -> Iterator[None]:
    """Turns an error of the disk or of safetensors, while ``what`` is written, into a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(in_words(error, 'written')) from error
    except (ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f'{what} cannot be written as safetensors: {error}') from error


def refuse_overwriting(checkpoint: Path, out: Path, what: str) -> None:
    """Raises if ``out`` is the checkpoint, be it through a link such as ``latest-rank0.pt``."""
    own = [checkpoint, *files_of(checkpoint)]
    if out.exists() and any(each.exists() and each.samefile(out) for each in own):
        same = '' if checkpoint == out else f', which is the same file as {checkpoint}'
        is_itself = f'a file of the checkpoint {checkpoint}' if checkpoint.is_dir() else f'the checkpoint itself{same}'
        raise CheckpointError(
            f'{out} is {is_itself}: {what} would replace what training resumes from. Write to another file.'
        )


def _refuse_replacing_of_a_run(out: Path, what: str) -> None:
    """Raises if ``out`` is a file by which a run is resumed, drawn or reconstructed, be it through a link."""
    if not out.exists():
        return
    target = out.resolve()
    folder = target.parent
    if target.name in _OF_A_RUN or _SNAPSHOT.fullmatch(target.name):
        kind = 'a file of a run'
    elif is_sharded(folder) or is_trainer_folder(folder):
        kind = f'a file of the checkpoint {folder}'
    elif target.suffix in TORCH_SUFFIXES and next(folder.glob(_LATEST), None) is not None and not _is_an_export(target):
        kind = f'one of the checkpoints of a run, in {folder}'
    else:
        return
    raise CheckpointError(f'{out} is {kind}: {what} would replace it. Write to another file.')


def _is_an_export(path: Path) -> bool:
    try:
        return bool(states.exported_with(load_safely(path, mmap=True)))
    except Exception:  # damaged, and so perhaps a checkpoint
        return False


def dense(weights: Mapping[str, Any], metadata: dict[str, str], what: str) -> dict[str, Tensor]:
    """``weights`` as safetensors take them. Names that they cannot hold are added to ``metadata``.

    Raises:
        CheckpointError: a tensor is not dense.
    """
    tensors = {name: tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    sparse = [f'{name} ({_layout(tensor)})' for name, tensor in tensors.items() if tensor.layout is not torch.strided]
    if sparse:
        raise CheckpointError(
            f'{what} cannot be written as safetensors, which hold dense tensors only: {listed(sparse)}. '
            'Write a file that ends in .pt.'
        )
    if left_out := sorted(weights.keys() - tensors.keys()):
        metadata['left_out'] = ', '.join(left_out)  # the extra state of modules, which safetensors cannot hold
    with in_our_words(what):
        return _in_memory_of_their_own(tensors)


def save_dense(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Writes what :func:`dense` returned, or a part of it, with a checksum."""
    safetensors.torch.save_file(dict(tensors), path, metadata={**metadata, CHECKSUM: ZEROS})
    seal(path)


def torch_copy(weights: Mapping[str, Any], metadata: Mapping[str, str]) -> Any:
    """``weights`` as torch writes a state dict, no more of each storage than the tensor needs."""
    tensors = _in_memory_of_their_own({name: each for name, each in weights.items() if isinstance(each, Tensor)})
    copies: Any = OrderedDict((name, tensors.get(name, each)) for name, each in weights.items())
    # As torch keeps the versions of modules: in an attribute, which load_state_dict passes over.
    setattr(copies, states.EXPORTED_KEY, dict(metadata))
    return copies


def _in_memory_of_their_own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, copied where two share memory, which safetensors refuse, or one is a part of something larger.

    torch would write all of what a view looks at.
    """
    taken: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        own = tensor.detach()
        if tensor.layout is not torch.strided:
            own = own.clone()
        else:
            storage = own.untyped_storage()
            if not own.is_contiguous() or storage.nbytes() != own.nbytes or storage.data_ptr() in taken:
                own = own.contiguous().clone()
            taken.add(own.untyped_storage().data_ptr())
        found[name] = own
    return found


def _layout(tensor: Tensor) -> str:
    return str(tensor.layout).removeprefix('torch.')
