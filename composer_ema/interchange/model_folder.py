"""Writes folders of safetensors as Hugging Face's libraries do: one file, or several and an index."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from composer_ema.checkpoints.safely import CheckpointError
from composer_ema.checkpoints.weights_folder import INDEX, SAFETENSORS
from composer_ema.checkpoints.writing import dense, in_our_words, save_dense
from composer_ema.files import folder_beside
from composer_ema.interchange.libraries import library
from composer_ema.model.names import listed


def write_folder(
    weights: Mapping[str, Any],
    metadata: dict[str, str],
    what: str,
    out: Path,
    *,
    stem: str,
    files: Mapping[str, bytes],
    max_shard_size: str | None = None,
) -> None:
    """Writes ``weights`` to the folder ``out``, beside and renamed into place.

    Args:
        weights: tensors by name.
        metadata: written with the tensors, into each file of them.
        what: the weights, in the words of an error.
        out: the folder. It may be there only if it is empty.
        stem: name of a file of weights, without its ending: ``'model'``.
        files: what stands beside the weights, by name.
        max_shard_size: size above which the weights are split into several files, such as ``'5GB'``. Default: never.

    Raises:
        CheckpointError: safetensors cannot hold a tensor, or the folder cannot be written. Nothing was.
    """
    tensors = dense(weights, metadata, what)
    parts, index = {f'{stem}{SAFETENSORS}': list(tensors)}, {}
    if max_shard_size is not None:
        parts, index = _split(tensors, stem, max_shard_size)
    if taken := sorted(files.keys() & {*parts, *index}):
        raise CheckpointError(f'{listed(taken)} beside {what} has the name of a file of weights. Rename it.')
    with in_our_words(what), folder_beside(out) as folder:
        for name, names in parts.items():
            save_dense({each: tensors[each] for each in names}, metadata, folder / name)
        for name, content in {**files, **index}.items():
            (folder / name).write_bytes(content)


def _split(
    tensors: Mapping[str, Tensor], stem: str, max_shard_size: str
) -> tuple[dict[str, list[str]], dict[str, bytes]]:
    """Which tensors go into which file, and the index by its name, where there are several files."""
    hub = library('huggingface_hub')  # with which the libraries that read it do the same
    try:
        if not re.search(r'\A[^-]*[1-9]', max_shard_size):  # with which each tensor would get a file of its own
            raise ValueError(max_shard_size)
        split = hub.split_torch_state_dict_into_shards(
            dict(tensors), filename_pattern=f'{stem}{{suffix}}{SAFETENSORS}', max_shard_size=max_shard_size
        )
    except (ValueError, OverflowError) as error:
        raise CheckpointError(
            f"max_shard_size must be a size such as '5GB' or '500MB', got {max_shard_size!r}."
        ) from error
    index = {'metadata': split.metadata, 'weight_map': split.tensor_to_filename}
    written = {f'{stem}{INDEX}': json.dumps(index, indent=2, sort_keys=True).encode()} if split.is_sharded else {}
    return split.filename_to_tensors, written
