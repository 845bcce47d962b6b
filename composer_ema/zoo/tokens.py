"""From text to tokens: characters, or a tokenizer of Hugging Face; and the text files themselves."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from composer_ema.spans import ArgumentError
from composer_ema.wording import counted

Tokens = npt.NDArray[np.integer[Any]]

#: The tokenizer whose tokens are characters.
CHARACTERS = 'characters'
#: What stands for a character that the text does not have: Unicode's own, U+FFFD.
UNKNOWN = '\ufffd'
_LARGEST_CODE = 0x110000
# What a tokenizer gives a model. Not token_type_ids, for which GPT-2 would add embeddings that nobody has trained.
_INPUTS = ('input_ids', 'attention_mask')


@runtime_checkable  # as arguments of a recipe are checked
class Tokenizer(Protocol):
    """What makes tokens of text."""

    @property
    def size(self) -> int:
        """Number of tokens that there are; each is a number in `[0, size)`."""
        ...

    def encode(self, text: str) -> Tokens:
        """The tokens of a text, in one dimension."""
        ...

    def pretrained(self) -> Any:
        """The same as a `PreTrainedTokenizerBase` of transformers, which a checkpoint and an export carry."""
        ...


@dataclass(frozen=True)
class Characters:
    """Each character is a token; token 0 stands for every other character, the rest are in the order of Unicode.

    Args:
        alphabet: The characters that have a token of their own, in that order.

    Example:
        >>> Characters.of('banana').encode('nab!').tolist()
        [3, 1, 2, 0]
    """

    alphabet: str

    @classmethod
    def of(cls, text: str) -> Characters:
        """The characters of a text."""
        counts = np.bincount(_codes(text), minlength=1)
        return cls(''.join(chr(code) for code in np.flatnonzero(counts) if chr(code) != UNKNOWN))

    @property
    def size(self) -> int:
        return len(self.alphabet) + 1

    def encode(self, text: str) -> Tokens:
        table = np.zeros(_LARGEST_CODE, np.uint16 if self.size <= 2**16 else np.int32)
        table[_codes(self.alphabet)] = np.arange(1, self.size)
        return table[_codes(text)]

    def count_unknown(self, text: str) -> int:
        """How many characters of a text have no token of their own."""
        return int(np.count_nonzero(self.encode(text) == 0)) - text.count(UNKNOWN)

    def pretrained(self) -> Any:
        from tokenizers import Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as FastTokenizer
        from transformers import PreTrainedTokenizerFast

        numbered = {UNKNOWN: 0, **{character: 1 + index for index, character in enumerate(self.alphabet)}}
        made: Any = FastTokenizer(models.WordLevel(numbered, unk_token=UNKNOWN))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        made.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(
            tokenizer_object=made,
            unk_token=UNKNOWN,
            clean_up_tokenization_spaces=False,
            model_input_names=list(_INPUTS),
        )


@dataclass(frozen=True)
class Pretrained:
    """The tokenizer of a Hugging Face model; it adds no token that is not in the text.

    Args:
        tokenizer: A `PreTrainedTokenizerBase`.
    """

    tokenizer: Any

    @property
    def size(self) -> int:
        return count_tokens(self.tokenizer)

    def encode(self, text: str) -> Tokens:
        try:
            # Not verbose, or a text longer than the model's longest input is warned of.
            found = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        except Exception as error:  # of the tokenizers in Rust
            raise ArgumentError(
                f'the tokenizer cannot encode the text: {_first_line(error)}. Pass another one.', 'tokenizer'
            ) from error
        return np.asarray(found['input_ids'], np.uint16 if self.size <= 2**16 else np.int32)

    def pretrained(self) -> Any:
        return self.tokenizer


def count_tokens(tokenizer: Any) -> int:
    """How many embeddings the tokens of a `PreTrainedTokenizerBase` need, some of which have no number below others."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


@dataclass(frozen=True)
class Encoded:
    """A text as tokens.

    Args:
        tokens: Of the whole text, in one dimension.
        tokenizer: What made them.
    """

    tokens: Tokens
    tokenizer: Tokenizer

    def more(self, text: str) -> Tokens:
        """The tokens of another text; a warning says how many of its characters the first one does not have."""
        if isinstance(self.tokenizer, Characters) and (count := self.tokenizer.count_unknown(text)):
            warnings.warn(
                f'{count:,} of {counted(len(text), "character")} to evaluate on are not in the text to train on, and '
                'all are the same token. Pass a tokenizer that knows them, or add them to the text.',
                stacklevel=2,
            )
        return self.tokenizer.encode(text)


def encoded(text: str, tokenizer: str) -> Encoded:
    """A text as tokens.

    Args:
        text: Its characters are those of the tokenizer ``'characters'``.
        tokenizer: ``'characters'``, a folder or a ``tokenizer.json`` file, or a name on the Hugging Face hub.

    Raises:
        ArgumentError: There is no such tokenizer.
        ImportError: transformers is not installed, and ``tokenizer`` needs it.
    """
    found = Characters.of(text) if tokenizer == CHARACTERS else Pretrained(_load(tokenizer))
    return Encoded(found.encode(text), found)


def read_texts(paths: Sequence[str], argument: str) -> str:
    """The text of several files, one behind the other with nothing in between.

    A byte order mark at the beginning of a file is no part of its text, and line ends are left as they are.

    Args:
        paths: The files.
        argument: The argument that named them.

    Raises:
        ArgumentError: A file cannot be read, is not UTF-8 or empty.
    """
    return ''.join(_read(Path(path).expanduser(), argument) for path in paths)


def versions(paths: Sequence[str], argument: str) -> tuple[tuple[str, int, int], ...]:
    """Each file with its size and the time of its last change, which tell one version of it from another.

    Raises:
        ArgumentError: There is no such file.
    """
    found: list[tuple[str, int, int]] = []
    for path in paths:
        try:
            status = os.stat(Path(path).expanduser())
        except OSError as error:
            raise _unreadable(path, error, argument) from error
        found.append((path, status.st_size, status.st_mtime_ns))
    return tuple(found)


def _read(path: Path, argument: str) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error, argument) from error
    try:
        text = content.decode('utf-8')
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f'{path} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}, {error.reason}. Convert it, for '
            f'example from Latin-1: iconv -f latin1 -t utf-8 {path}',
            argument,
        ) from error
    if not text:
        raise ArgumentError(f'{path} is empty. Leave it out.', argument)
    return text.removeprefix('\ufeff')


def _unreadable(path: str | Path, error: OSError, argument: str) -> ArgumentError:
    said = 'is a folder. List its files' if Path(path).expanduser().is_dir() else f'cannot be read: {error.strerror}'
    return ArgumentError(f'{path} {said}. Pass a text file, or a list of them.', argument)


def _codes(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode('utf-32-le'), np.uint32)


@functools.lru_cache(maxsize=4)
def _load(name: str) -> Any:
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError as error:
        raise ImportError(
            f'tokenizer={name!r} needs transformers. Install it with pip install "transformers>=4.46,<4.54", or pass '
            f'{CHARACTERS}.'
        ) from error
    try:
        if name.endswith('.json'):
            file = os.fspath(Path(name).expanduser())
            return PreTrainedTokenizerFast(tokenizer_file=file, model_input_names=list(_INPUTS))
        return AutoTokenizer.from_pretrained(os.path.expanduser(name), trust_remote_code=False)
    except Exception as error:  # of the file system, the hub, the tokenizers in Rust or transformers
        raise ArgumentError(
            f'tokenizer={name!r} is neither {CHARACTERS} nor a folder that save_pretrained has written, nor a '
            f'tokenizer.json file or a name on the Hugging Face hub: {_first_line(error)}',
            'tokenizer',
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition('\n')[0] or type(error).__name__
