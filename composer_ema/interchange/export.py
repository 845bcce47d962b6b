"""Writes the average of a checkpoint as a file of its own, or as another library keeps it."""

from __future__ import annotations

import os
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from composer_ema.checkpoints.opening import checkpoint_of, path_of, read_file
from composer_ema.checkpoints.reading import CheckpointError, check_texts
from composer_ema.checkpoints.writing import TORCH_SUFFIXES, refuse_overwriting, write_weights
from composer_ema.interchange import to_diffusers, to_peft, to_timm, to_transformers
from composer_ema.interchange.wanted import DTYPES, Wanted
from composer_ema.wording import shown, suggestion

SAFETENSORS, TORCH = 'safetensors', 'torch'
#: What an export can be: files, then folders.
FORMATS = (SAFETENSORS, TORCH, to_timm.FORMAT, to_transformers.FORMAT, to_diffusers.FORMAT, to_peft.FORMAT)
_FOLDERS = FORMATS[3:]
#: Endings by which a name tells another format.
_OTHERWISE = {
    SAFETENSORS: TORCH_SUFFIXES,
    TORCH: ('.safetensors',),
    to_timm.FORMAT: ('.safetensors',),
    **dict.fromkeys(_FOLDERS, (*TORCH_SUFFIXES, '.safetensors', '.bin', '.tar')),
}


def export(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    average: str | None = None,
    key: str | None = None,
    strip_prefix: str | None = None,
    format: str | None = None,
    dtype: str | torch.dtype | None = None,
    config: str | os.PathLike[str] | None = None,
    max_shard_size: str | None = None,
) -> dict[str, str]:
    """Writes the averaged weights of ``checkpoint`` to ``out``, beside and renamed into place.

    Args:
        checkpoint: as for :func:`load_average`.
        out: file or folder to write; the folder that it is in is made if it is missing. A file that is there is
            replaced; a folder, a device such as ``/dev/null`` and a pipe are not.
        average: as for :func:`load_average`.
        key: as for :func:`load_average`.
        strip_prefix: module to take off the names, such as ``'module'``, so that the network of a ComposerModel loads
            the file without it. ``'auto'`` takes off the outermost module, in which all names must stand. Names outside
            of a module that is given stay, with a warning. Default: names are written as they are, and with
            ``'huggingface'``, ``'diffusers'`` and ``'peft'`` always as these have them.
        format: one of

            - ``'safetensors'``: a file with a checksum among its metadata that every reader of this package compares;
            - ``'torch'``: a state dict that ``torch.load(out, weights_only=True)`` returns;
            - ``'huggingface'``: a folder that transformers' ``from_pretrained`` loads: config, tokenizer, safetensors;
            - ``'diffusers'``: a folder that diffusers' ``from_pretrained`` loads, and its ``EMAModel.from_pretrained``
              continues;
            - ``'timm'``: a file of timm's ``CheckpointSaver``, the average under ``state_dict_ema`` beside the training
              weights, for ``timm.models.load_checkpoint(model, out, use_ema=True)``;
            - ``'peft'``: a folder with the adapter alone, for ``PeftModel.from_pretrained(model, out)``.

            Default: ``'torch'`` if ``out`` ends in ``.pt``, ``.pth`` or ``.ckpt``, else ``'safetensors'``.
        dtype: ``'float32'``, ``'bfloat16'`` or ``'float16'``, of all floating tensors, rounded to nearest. Default:
            that of the average.
        config: file, or folder with it, that says what the weights are of.

            - ``'huggingface'``: a ``config.json``; from a folder, the tokenizer and what else belongs to the model come
              along. Default: what a HuggingFaceModel of Composer put into the checkpoint, or the Trainer of
              transformers into its folder.
            - ``'diffusers'``: the ``config.json`` of the model; required.
            - ``'peft'``: an ``adapter_config.json``. Default: that of HuggingFaceModel(peft_config=...), or of the
              Trainer.
            - ``'timm'``: the name of the architecture, which is written, and by which names are checked. Default:
              neither is done.

        max_shard_size: of ``'huggingface'`` and ``'diffusers'``: size above which the weights are split into several
            files with an index. Default: ``'5GB'`` and ``'10GB'``, as the libraries have it.

    Returns:
        The metadata written with the tensors: the run, the horizon, the number of updates, how far training had come.

    Raises:
        CheckpointError: as for :func:`load_average`; the prefix does not apply or makes two names one; safetensors
            cannot hold a tensor; the dtype cannot hold a value; there is no config, or weights do not fit it; ``out``
            is ``checkpoint`` itself, also under another name, or a folder that is not empty, or ends in what ``format``
            is not. ``out`` is not touched.
        TypeError: an argument has the wrong type.
    """
    path, out = checkpoint_of(checkpoint, 'checkpoint'), path_of(out, 'out')
    check_texts(average=average, key=key, strip_prefix=strip_prefix, format=format, max_shard_size=max_shard_size)
    chosen, wanted_dtype = _format_of(out, format), _dtype_of(dtype)
    settings = _config_of(config, chosen)
    _check_options(chosen, out, strip_prefix=strip_prefix, max_shard_size=max_shard_size)
    refuse_overwriting(path, out, 'the export')
    wanted = Wanted(path, read_file(path), average, key, strip_prefix, wanted_dtype)
    if chosen == to_transformers.FORMAT:
        return to_transformers.write(wanted, out, settings, max_shard_size)
    if chosen == to_diffusers.FORMAT:
        return to_diffusers.write(wanted, out, settings, max_shard_size)
    if chosen == to_peft.FORMAT:
        return to_peft.write(wanted, out, settings)
    if chosen == to_timm.FORMAT:
        return to_timm.write(wanted, out, None if config is None else str(config))
    weights, facts = wanted.read()
    metadata = wanted.metadata(facts)
    write_weights(weights, metadata, str(checkpoint), out, by_torch=chosen == TORCH)
    return metadata


def _format_of(out: Path, format: str | None) -> str:
    if format is None:
        return TORCH if out.suffix in TORCH_SUFFIXES else SAFETENSORS
    if format not in FORMATS:
        raise CheckpointError(f'there is no format {format!r}. {suggestion(format, FORMATS, "There are")}')
    if out.suffix in _OTHERWISE[format]:
        kind = 'a folder' if format in _FOLDERS else 'safetensors' if format == SAFETENSORS else 'a file of torch'
        raise CheckpointError(
            f'format={format!r} writes {kind}, and {out} is named like something else. Take {out.suffix} off, or leave '
            'the format out.'
        )
    return format


def _dtype_of(dtype: Any) -> torch.dtype | None:
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in DTYPES.values()):
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if not isinstance(dtype, str | torch.dtype):
        raise TypeError(
            f'dtype must be a string or a torch.dtype, got {shown(dtype)}. Pass one of {", ".join(DTYPES)}.'
        )
    raise CheckpointError(f'dtype must be one of {", ".join(DTYPES)}, got {shown(dtype)}.')


def _config_of(config: Any, format: str) -> Path | None:
    if not isinstance(config, str | os.PathLike | NoneType):
        raise TypeError(f'config must be the path of a file or a folder, got {shown(config)}.')
    if config is not None and format in (SAFETENSORS, TORCH):
        raise CheckpointError(
            f'config={str(config)!r} has no effect on format={format!r}, which has no config. Leave it out, or pass '
            f'format={to_transformers.FORMAT!r}.'
        )
    return None if config is None or format == to_timm.FORMAT else path_of(config, 'config')


def _check_options(format: str, out: Path, *, strip_prefix: str | None, max_shard_size: str | None) -> None:
    if strip_prefix is not None and format in _FOLDERS:
        raise CheckpointError(
            f'strip_prefix={strip_prefix!r} has no effect on format={format!r}, whose names are those of the model. '
            'Leave it out.'
        )
    if max_shard_size is not None and format not in (to_transformers.FORMAT, to_diffusers.FORMAT):
        raise CheckpointError(f'max_shard_size has no effect on format={format!r}, which is one file. Leave it out.')
    if format in _FOLDERS and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        kind = 'a file' if out.is_file() else 'a folder that is not empty'
        raise CheckpointError(f'{out} is {kind}, and format={format!r} writes a new folder. Pass another one.')
