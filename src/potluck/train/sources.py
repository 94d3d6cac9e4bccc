"""What does the word after `--data` mean?

    photos/                          a folder of pictures, searched recursively; sub-folders name the classes
    photos.zip                       the same, in a zip
    digits.npz, digits.safetensors   arrays x (pictures) and y (classes)
    table.parquet                    encoded pictures in rows
    hf://datasets/OWNER/NAME[@REVISION][/PATH]
    mnist5k, emoji, ...              a known set (known_sets.py), NAME=PATH for a copy that is here already

`open_source` finds out what there is and reads next to nothing; `pack` goes through it. A name is a known set
even if a folder is called the same: write ./emoji for the folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from potluck.domain.pool import nearest
from potluck.errors import DataError
from potluck.train.images import ImageFormat
from potluck.train.known_sets import KNOWN, open_known
from potluck.train.packing import Source, pack
from potluck.train.places import open_hub, open_path

__all__ = ["KNOWN", "ImageFormat", "Source", "open_source", "pack"]


def open_source(source: str, *, images: ImageFormat, cache_dir: Path, say: Callable[[str], None]) -> Source:
    """Find the pictures that `source` means. `say` hears what takes a while; errors are `DataError`."""
    if images.channels not in (1, 3) or images.size < 1:
        raise DataError(f"pictures have 1 or 3 channels and a size of at least 1, not {images}")
    name, equals, given = source.partition("=")
    if source in KNOWN:
        found = open_known(source, None, images, cache_dir, say)
    elif equals and name in KNOWN:
        found = open_known(name, _existing(given), images, cache_dir, say)
    elif source.startswith("hf://"):
        found = open_hub(source, images, cache_dir, say)
    else:
        found = open_path(_existing(source), images, cache_dir)
    if found.ignored:
        say(f"{found.ignored:,} files in {source} are no pictures and are left out")
    return found


def _existing(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(
            f"there is no file or folder `{source}`, and no known set of that name{nearest(source, list(KNOWN))}"
        )
    return path
