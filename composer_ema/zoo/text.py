"""Text as data: blocks of tokens for a language model, out of files or out of Python's own documentation."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from composer_ema.spans import ArgumentError
from composer_ema.wording import counted
from composer_ema.zoo.checks import check_whole
from composer_ema.zoo.dataset import TEST_SET, Batching, Data, dataset
from composer_ema.zoo.loading import Batches, loader
from composer_ema.zoo.tokens import CHARACTERS, Encoded, Tokens, encoded, read_texts, versions

log = logging.getLogger(__name__)

__all__ = ['python_docs', 'text_file']

TextBatch = dict[str, torch.Tensor]
_TOPICS = 'pydoc_data.topics'
_NOTHING_ELSE = 'nothing else'


class Blocks(Batches):
    """Text cut into blocks of equal length, fetched a whole batch at a time.

    A batch is a dictionary with `input_ids` and `labels`, int64 `(n, length)`, which are equal: Hugging Face's causal
    language models shift the labels themselves, and so predict all but the first token of a block.

    Args:
        tokens: In one dimension, a multiple of `length` many; not copied.
        length: Tokens in a block.

    Attributes:
        max_seq_len: `length`, under the name that Composer looks for.
    """

    def __init__(self, tokens: Tokens, length: int) -> None:
        self._blocks = tokens.reshape(-1, length)
        self.max_seq_len = length

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitems__(self, indices: Sequence[int]) -> TextBatch:
        chosen = torch.from_numpy(self._blocks[np.asarray(indices)].astype(np.int64))
        return {'input_ids': chosen, 'labels': chosen.clone()}


def _blocks_of_files(given: Mapping[str, Any]) -> int:
    _check(given['sequence_length'], given['tokenizer'])
    return _count_blocks(_of_files(given['path'], given['tokenizer']), given['sequence_length'], 'path')


def _blocks_of_docs(given: Mapping[str, Any]) -> int:
    _check(given['sequence_length'], given['tokenizer'])
    return _count_blocks(_of_docs(given['tokenizer']), given['sequence_length'], 'sequence_length')


@dataset(
    samples=_blocks_of_files,
    tokens=lambda given: given['sequence_length'],
    tokenizer=lambda given: _of_files(given['path'], given['tokenizer']).tokenizer,
    evaluation=lambda given: _NOTHING_ELSE if given['test_path'] is None else TEST_SET,
)
def text_file(
    *,
    path: str | list[str],
    tokenizer: str = CHARACTERS,
    sequence_length: int = 128,
    batch_size: int = 32,
    eval_batch_size: int = 64,
    validation_split: float = 0.1,
    test_path: str | list[str] | None = None,
    drop_last: bool = False,
    num_workers: int = 0,
    seed: int = 0,
) -> Data:
    """Plain text in UTF-8 for language models: each sample is a block of `sequence_length` tokens of the text.

    The blocks do not overlap; what is left of the text behind the last one is not used. Batches are dictionaries with
    `input_ids` and `labels`, int64 `(n, sequence_length)`, as Composer's `HuggingFaceModel` takes them. Composer counts
    their tokens, so the recipe may give times in tok. The tokens stay in memory, 2 bytes each up to 65,536 different
    ones and else 4.

    Args:
        path: The file, or several, which are read as one text in this order with nothing in between.
        tokenizer: `characters` makes each character of the text a token, in the order of Unicode, and token 0 of all
            others. Else a tokenizer of Hugging Face: a folder that `save_pretrained` has written, a `tokenizer.json`
            file, or a name on the hub. These need transformers.
        sequence_length: Tokens in a sample, at least 2.
        batch_size: Samples per training step over all processes; a multiple of their number.
        eval_batch_size: The same for evaluation.
        validation_split: Share of the blocks held out for evaluation, in [0, 1): those at the end of the text. 0 trains
            on all of them and evaluates on `test_path`.
        test_path: Another text, to evaluate on with `validation_split=0`; as `path`.
        drop_last: Whether an uneven last training batch is dropped.
        num_workers: Worker processes per loader; 0 loads in the training process, which is fast enough here.
        seed: Seed of the order of training, at least 0. Seed and epoch alone decide it.

    Returns:
        The loaders.

    Raises:
        ValueError: An argument is out of range; a file is not there, not UTF-8 or too short.
        ImportError: The tokenizer needs transformers, which is not installed.
    """
    batching = Batching(batch_size, eval_batch_size, validation_split, drop_last, num_workers, seed)
    _check(sequence_length, tokenizer)
    if (validation_split == 0) != (test_path is not None):
        raise ArgumentError(
            'validation_split holds out the end of the text, and 0 evaluates on test_path: one of the two is needed, '
            f'got validation_split={validation_split} and test_path={test_path!r}. Pass validation_split=0.1 alone, or '
            'validation_split=0 with a test_path.',
            'validation_split' if test_path is None else 'test_path',
        )
    text = _of_files(path, tokenizer)
    test = None
    if test_path is not None:
        test = text.more(read_texts(_listed(test_path, 'test_path'), 'test_path'))
    return _loaders(batching, text, sequence_length, test, 'path')


@dataset(
    samples=_blocks_of_docs,
    tokens=lambda given: given['sequence_length'],
    tokenizer=lambda given: _of_docs(given['tokenizer']).tokenizer,
    evaluation=lambda given: _NOTHING_ELSE,
)
def python_docs(
    *,
    tokenizer: str = CHARACTERS,
    sequence_length: int = 128,
    batch_size: int = 32,
    eval_batch_size: int = 64,
    validation_split: float = 0.1,
    drop_last: bool = False,
    num_workers: int = 0,
    seed: int = 0,
) -> Data:
    """The text that Python ships for `help('topics')`: most of its language reference, never downloaded.

    It is as `text_file` with a file of these topics in alphabetical order, each paragraph where it comes first: some
    topics contain others, and what is evaluated on must not be trained on. Python 3.11 has 373,422 characters of it;
    other versions have others.

    Args:
        tokenizer: As for `text_file`.
        sequence_length: Tokens in a sample, at least 2.
        batch_size: Samples per training step over all processes; a multiple of their number.
        eval_batch_size: The same for evaluation.
        validation_split: Share of the blocks held out for evaluation, above 0 and below 1: those at the end.
        drop_last: Whether an uneven last training batch is dropped.
        num_workers: Worker processes per loader.
        seed: Seed of the order of training, at least 0.

    Returns:
        The loaders.

    Raises:
        ValueError: An argument is out of range.
        ImportError: This Python lacks the text, or the tokenizer needs transformers, which is not installed.
    """
    batching = Batching(batch_size, eval_batch_size, validation_split, drop_last, num_workers, seed)
    _check(sequence_length, tokenizer)
    if validation_split == 0:
        raise ArgumentError(
            'validation_split must be above 0: there is no other text to evaluate on. Pass 0.1 to hold out the last '
            'tenth.',
            'validation_split',
        )
    return _loaders(batching, _of_docs(tokenizer), sequence_length, None, 'sequence_length')


def _loaders(batching: Batching, text: Encoded, length: int, test: Tokens | None, argument: str) -> Data:
    count = _count_blocks(text, length, argument)
    train_count = count - batching.count_held_out(count)
    batching.check_last_batch(train_count)
    train = text.tokens[: train_count * length]
    if test is None:
        held_out = text.tokens[train_count * length : count * length]
    else:
        if len(test) < length:
            raise _too_short(test, length, 1, 'test_path')
        held_out = test[: len(test) // length * length]
    return Data(
        train=loader(batching, Blocks(train, length), batching.batch_size, is_training=True),
        evaluation=loader(batching, Blocks(held_out, length), batching.eval_batch_size, is_training=False),
    )


def _count_blocks(text: Encoded, length: int, argument: str) -> int:
    count = len(text.tokens) // length
    if count < 2:
        raise _too_short(text.tokens, length, 2, argument)
    return count


def _too_short(tokens: Tokens, length: int, least: int, argument: str) -> ArgumentError:
    return ArgumentError(
        f'{counted(least, "block")} of sequence_length={length} must fit into the text, got {len(tokens):,} tokens. '
        'Pass more text or a shorter sequence_length.',
        argument,
    )


def _check(sequence_length: int, tokenizer: str) -> None:
    check_whole('sequence_length', sequence_length, 2, 'A model predicts all tokens of a sample but the first.')
    if not isinstance(tokenizer, str) or not tokenizer:
        raise ArgumentError(
            f'tokenizer must be {CHARACTERS} or name a tokenizer, got {tokenizer!r}. Leave it out for {CHARACTERS}.',
            'tokenizer',
        )


def _of_files(path: str | Sequence[str], tokenizer: str) -> Encoded:
    return _of_versions(versions(_listed(path, 'path'), 'path'), tokenizer)


def _listed(path: str | Sequence[str], argument: str) -> list[str]:
    paths = [path] if isinstance(path, str) else list(path)
    if not paths or not all(isinstance(each, str) and each for each in paths):
        raise ArgumentError(f'{argument} must be a text file or a list of them, got {path!r}.', argument)
    return paths


# The length of an epoch is asked for before the data are: the text is read once for both, and again where it changes.
@functools.lru_cache(maxsize=2)
def _of_versions(files: tuple[tuple[str, int, int], ...], tokenizer: str) -> Encoded:
    return encoded(read_texts([path for path, *_ in files], 'path'), tokenizer)


@functools.lru_cache(maxsize=1)
def _of_docs(tokenizer: str) -> Encoded:
    try:
        topics: Mapping[str, str] = importlib.import_module(_TOPICS).topics
    except ImportError as error:
        raise ImportError(
            f'this Python lacks {_TOPICS}, which is part of its standard library. Install it whole, or train on a text '
            'of your own: data: {name: text_file, path: ...}'
        ) from error
    paragraphs = '\n\n'.join(topics[name] for name in sorted(topics)).split('\n\n')
    return encoded('\n\n'.join(dict.fromkeys(paragraphs)), tokenizer)
