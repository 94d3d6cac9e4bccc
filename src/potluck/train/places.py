"""How is a data set opened that lies on this machine, or on the Hugging Face Hub?"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from potluck.errors import DataError
from potluck.integrations import huggingface
from potluck.train import arrays, files
from potluck.train.images import SUFFIXES, ImageFormat
from potluck.train.packing import Source, join

HUB = "hf://datasets/"


def open_path(path: Path, images: ImageFormat, cache_dir: Path) -> Source:
    """A folder or file on this machine."""
    if path.is_dir():
        return files.folder(path, images)
    match path.suffix.lower():
        case ".zip":
            return files.archive(path, images)
        case ".npz":
            return arrays.npz(path, images, cache_dir)
        case ".safetensors":
            return arrays.safetensors_file(path, images)
        case ".parquet":
            return arrays.parquet(path, images, cache_dir)
    raise DataError(
        f"{path} is not a kind of file that Potluck can train on: give a folder or a .zip of pictures, an .npz, "
        ".safetensors or .parquet file"
    )


def open_hub(address: str, images: ImageFormat, cache_dir: Path, say: Callable[[str], None]) -> Source:
    """`hf://datasets/OWNER/NAME[@REVISION][/PATH]`: the repository's tables, archives, arrays or pictures."""
    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?", address)
    if match is None:
        raise DataError(f"{address} is not an address of a data set: write {HUB}OWNER/NAME[@REVISION][/PATH]")
    repo, revision, below = match[1], match[2] or "main", match[3] or ""
    fetched = huggingface.fetch_dataset(repo, below, revision, cache_dir / "huggingface", say, choose=what_to_take)
    origin = f"{HUB}{repo}@{fetched.commit[:12]}" + (f"/{below}" if below else "")
    name = PurePosixPath(repo).name
    if fetched.paths[0].suffix.lower() in SUFFIXES:
        return replace(
            files.pictures(fetched.root, fetched.paths, images),
            name=name,
            origin=origin,
            licence=fetched.licence,
        )
    sources = [open_path(path, images, cache_dir) for path in fetched.paths]
    return join(sources, name=name, origin=origin, licence=fetched.licence)


def what_to_take(names: list[str]) -> list[str]:
    """Of a repository's files, those to train on: one kind, tables first; its training split, if it names
    one.

    Pictures come last because many repositories of tables have a few in their README.
    """
    by_suffix: dict[str, list[str]] = {}
    for name in sorted(names):
        suffix = PurePosixPath(name).suffix.lower()
        by_suffix.setdefault("picture" if suffix in SUFFIXES else suffix, []).append(name)
    for kind in (".parquet", ".zip", ".npz", ".safetensors", "picture"):
        if kind in by_suffix:
            training = [name for name in by_suffix[kind] if PurePosixPath(name).name.startswith("train")]
            return training if kind == ".parquet" and training else by_suffix[kind]
    return []
