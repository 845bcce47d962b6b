"""Composer's checkpoints, written beside and renamed into place, so that none in their folder is half of one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from composer.utils import checkpoint
from composer.utils.compression import is_compressed_pt
from composer.utils.file_helpers import is_tar

from composer_ema.files import beside
from composer_ema.trainer.safe_loading import replaced


@contextlib.contextmanager
def whole_checkpoints() -> Iterator[None]:
    """Lets checkpoints that are single files appear under their names only once they are whole.

    Composer (0.32.1) writes into the file itself. A kill or a full disk then leaves the beginning of a checkpoint, and
    where ``save_filename`` is the same each time, nothing else. Sharded checkpoints are folders, whose index torch
    writes last.
    """
    # The one function of Composer that writes the file; it has no door for another. Delete this once it writes beside.
    write = checkpoint._write_checkpoint_file

    def write_whole(state_dict: dict[str, Any], filename: str) -> None:
        # Composer chooses the format by the ending.
        is_packed = is_tar(filename) or is_compressed_pt(filename)
        with beside(Path(filename), ending=''.join(Path(filename).suffixes[-2:]) if is_packed else '') as written:
            write(state_dict, str(written))

    with replaced(checkpoint, '_write_checkpoint_file', write_whole):
        yield
