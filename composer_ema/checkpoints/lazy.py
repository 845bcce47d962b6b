"""The weights in a file or a sharded folder, one tensor at a time: many are combined in the memory of one tensor each.

Invariant: what a file holds is never executed, and no tensor is read before it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composer_ema.checkpoints import formats, others, search, states
from composer_ema.checkpoints.lazy_tensor import in_memory, is_dense
from composer_ema.checkpoints.opening import UNKNOWN_CONTENT, checkpoint_of, is_safetensors, metadata_of, read_file
from composer_ema.checkpoints.reading import (
    CheckpointError,
    algorithms_of,
    average_in,
    check_texts,
    has_averages,
    is_of_composer,
    mapping_in,
    run_name_of,
    trained,
)
from composer_ema.checkpoints.sharded import METADATA, is_sharded
from composer_ema.model.names import listed
from composer_ema.model.wrappers import canonical_name
from composer_ema.shadow import foreign

TRAINING_WEIGHTS = 'training weights'
#: The units of a file's clock, each with Composer's word for it.
UNITS = {'ba': 'batch', 'ep': 'epoch', 'sp': 'sample', 'tok': 'token'}
# Under these, scripts keep the weights that they train.
_MODEL_KEYS = ('model', 'state_dict', 'model_state_dict')


class LazyWeights:
    """The weights in a file, read one tensor at a time; see :func:`open_weights`, which builds it.

    Attributes:
        path: the file.
        names: canonical names of the tensors, in the order of the file.
        weights: whose they are, in words: :data:`TRAINING_WEIGHTS`, or how they were averaged.
        trained: how far training had come, by unit (``'ba'``, ``'ep'``, ``'sp'``, ``'tok'``), as far as the file tells.
        run_name: the run that wrote the file; None where it does not tell.
        metadata: what a safetensors file, or :func:`composer_ema.export`, keeps beside the tensors. Else empty.
        extra_state: what modules keep besides tensors, by name.
        odd: names of tensors that are sparse, quantized or nested.
    """

    def __init__(self, path: Path, average: str | None, key: str | None) -> None:
        self.path = path
        self._average, self._key = average, key
        self._tensors: Mapping[str, Tensor] | None = None
        self._written, self._is_folder = _identity(path), path.is_dir()
        held = read_file(path, mmap=True)
        self._tensors, self.extra_state, self.weights = self._chosen(held)
        self.names = tuple(self._tensors)
        self.odd = tuple(name for name, tensor in self._tensors.items() if not is_dense(tensor))
        self._described = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}
        self.metadata = metadata_of(path) if is_safetensors(path) else dict(states.exported_with(held) or {})
        try:
            self.trained = _trained(held, self.metadata)
            self.run_name = run_name_of(held['state']) if is_of_composer(held) else self.metadata.get('run_name')
        except (ValueError, TypeError) as error:
            raise CheckpointError(f'{path} cannot be read: {error}') from error

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the tensor ``name``, which is not read."""
        return self._described[name]

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name`` on the CPU: writing to it changes neither the file nor the next one.

        A view of a file; of a sharded checkpoint it is read anew, chunk by chunk.

        Raises:
            CheckpointError: the file has been closed and has changed since it was opened, or a sharded checkpoint has;
                a chunk is damaged.
        """
        if (self._tensors is None or self._is_folder) and _identity(self.path) != self._written:
            raise CheckpointError(f'{self.path} has changed while it was being read. Run it again.')
        if self._tensors is None:
            self._tensors = self._chosen(read_file(self.path, is_checked=True, mmap=True))[0]
        return in_memory(self._tensors[name])

    def close(self) -> None:
        """Lets go of the file and of the memory of what was read of it. The next :meth:`tensor` opens it again.

        Of a sharded checkpoint nothing is kept open or in memory but its index, which stays.
        """
        if not self._is_folder:
            self._tensors = None

    def _chosen(self, held: Any) -> tuple[dict[str, Tensor], dict[str, Any], str]:
        values, weights = _weights_in(held, self.path, self._average, self._key)
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        try:
            others.check_readable(tensors)
        except ValueError as error:
            raise CheckpointError(f'{self.path}: {error}') from error
        return tensors, {name: value for name, value in values.items() if name not in tensors}, weights


def open_weights(checkpoint: str | os.PathLike[str], average: str | None = None, key: str | None = None) -> LazyWeights:
    """Opens the weights in a file without reading them. Executes nothing in the file; checks its sums.

    Args:
        checkpoint: what :func:`composer_ema.load_average` reads, a safetensors file, or a state dict. Of a sharded
            checkpoint the index is checked, and the sums of each chunk when it is read.
        average: the average to open, such as ``'ema'``. Default: the training weights, or in a file that holds an
            average alone, this.
        key: where in the file to look, keys joined with dots: ``'model'``, ``'state.model'``. Default: where Composer
            and other trainers keep the weights that they train.

    Raises:
        CheckpointError: the file is missing, damaged, or of another kind; it would run code; it does not tell which
            weights are meant, which the message lists.
        TypeError: an argument has the wrong type.

    Example:
        .. code:: python

            weights = open_weights('runs/fashion_mnist/checkpoints/latest-rank0.pt')
            print(weights.trained['ba'], {name: weights.describe(name) for name in weights.names})
            norms = {name: weights.tensor(name).norm() for name in weights.names}
    """
    path = checkpoint_of(checkpoint, 'checkpoint')
    check_texts(average=average, key=key)
    return LazyWeights(path, average, key)


def _weights_in(held: Any, path: Path, average: str | None, key: str | None) -> tuple[Mapping[str, Any], str]:
    """The weights that are meant, and whose they are."""
    try:
        if average is None and key is None:
            training = training_weights(held)
            if training is not None:
                return training, TRAINING_WEIGHTS
        if average is not None:
            _refuse_without_labels(held, path, average, key)
        weights, facts = average_in(held, path, label=average, key=key)
        return weights, facts['weights']
    except CheckpointError:
        raise
    # The file is sound, so something that we do not know wrote what it holds.
    except UNKNOWN_CONTENT as error:
        raise CheckpointError(f'{path} cannot be read: {error}') from error


def training_weights(held: Any) -> dict[str, Any] | None:
    """The weights that are trained, by canonical name; None where the file holds an average alone.

    Raises:
        ValueError: several could be meant.
    """
    if is_of_composer(held):
        return _of_composer(held['state'])
    if states.exported_with(held) is not None:
        return None
    found = search.weights(held)
    if isinstance(held, Mapping) and foreign.is_read(held):  # a library's file is not entered, but its parts may be
        found = {str(name): value for name, value in held.items() if search.is_weights(value)}
    of_model = [place for place in found if place.rpartition('.')[2] in _MODEL_KEYS]
    if len(found) > 1 and (len(of_model) != 1 or foreign.is_read(held)):
        raise ValueError(
            f'there are weights under the keys {listed(sorted(found))}. '
            f'Pass one of them, as in key={sorted(found)[0]!r} (--key {sorted(found)[0]}).'
        )
    places = of_model if len(found) > 1 else list(found)
    return _canonical(found[places[0]]) if places else None


def _of_composer(state: Mapping[str, Any]) -> dict[str, Any]:
    model = _canonical(mapping_in(state, 'model'))
    if not has_averages(state):
        return model
    algorithms = algorithms_of(state)
    for name in formats.find(algorithms):
        upgraded = formats.upgrade(algorithms[name], model_slot=model, what=f'the saved {name} state')
        # Composer's own EMA, and a checkpoint of a model on loan, keep the training weights beside the average.
        model |= upgraded.get(formats.STASH, {})
    return model


def _canonical(weights: Mapping[str, Any]) -> dict[str, Any]:
    return {canonical_name(name): value for name, value in weights.items()}


def _refuse_without_labels(held: Any, path: Path, average: str, key: str | None) -> None:
    """Raises where only Composer's algorithms would have labels, and these averages are not theirs."""
    if key is None and is_of_composer(held) and has_averages(held['state']):
        return
    found = others.find(held, key)
    if all(each.average.label is None for each in found):
        keys = [each.key for each in found if each.key]
        remedy = f'Pass its key, as in key={keys[0]!r} (--key {keys[0]})' if keys else 'Leave the label out'
        raise CheckpointError(f'{path} holds an average without a label, so none is called {average!r}. {remedy}.')


def _trained(held: Any, metadata: Mapping[str, str]) -> dict[str, int]:
    if is_of_composer(held):
        counts: Mapping[str, Any] = trained(held['state'])
    else:
        counts = {word: _count(metadata.get(f'trained_{word}')) for word in UNITS.values()}
        if isinstance(held, Mapping) and not metadata and type(held.get('global_step')) is int:
            counts = {'batch': held['global_step']}  # Lightning's, and many a script's
    return {unit: counts[word] for unit, word in UNITS.items() if counts.get(word) is not None}


def _count(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdecimal() else None


def _identity(path: Path) -> tuple[int, ...]:
    """What tells a file from another one that took its place. Missing files are reported on reading."""
    if not path.exists():
        return ()
    status = (path / METADATA if is_sharded(path) else path).stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
