"""How are .npz, .safetensors and .parquet files read as pictures with classes?

Arrays stay on disk and are mapped, never loaded whole; a compressed .npz is unfolded once into a temporary
file of the cache folder. Nothing is unpickled. Values may be uint8, other whole numbers in 0..255, booleans,
or floats in [0, 1] or [0, 255]; everything else is refused, because to guess would be to train on noise.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import safetensors

from potluck.errors import DataError
from potluck.train.files import Spill
from potluck.train.images import ImageFormat, Pixels, decode, fit_array
from potluck.train.packing import Source, disk_full_explained

Array = npt.NDArray[Any]

PICTURES = ("x", "images", "data", "image", "X", "x_train", "train_images", "arr_0")
CLASSES = ("y", "labels", "label", "targets", "target", "Y", "y_train", "train_labels", "arr_1")
MAX_ARRAY_BYTES = 256 << 30
MAX_CLASSES = 100_000
PORTION = 32 << 20  # bytes of an array looked at in one go


@dataclass(frozen=True)
class Stored:
    """An array on disk: what it is, and how to read rows of it."""

    shape: tuple[int, ...]
    dtype: str
    rows: Callable[[int, int], Array]


def npz(path: Path, images: ImageFormat, cache_dir: Path) -> Source:
    """The pictures, and classes if there are any, in a numpy archive."""
    try:
        with zipfile.ZipFile(path) as unzipped, path.open("rb") as file:
            stored = {
                info.filename.removesuffix(".npy"): _npy(unzipped, info, path, file, cache_dir)
                for info in unzipped.infolist()
                if info.filename.endswith(".npy")
            }
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path} cannot be read as an .npz file: {error}") from error
    return _from_arrays(path, stored, images)


def safetensors_file(path: Path, images: ImageFormat) -> Source:
    """The pictures, and classes if there are any, in a safetensors file."""
    try:
        opened: Any = safetensors.safe_open(str(path), "numpy")
        views = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
        stored = {
            name: Stored(tuple(view.get_shape()), str(view.get_dtype()).lower(), partial(_rows, view))
            for name, view in views.items()
        }
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a .safetensors file: {error}") from error
    return _from_arrays(path, stored, images)


def parquet(path: Path, images: ImageFormat, cache_dir: Path) -> Source:
    """The encoded pictures in a parquet table, as data sets on the Hugging Face Hub have them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f'{path} is a parquet table, and reading one needs pyarrow: pip install ".[huggingface]"'
        ) from error
    spill = Spill(cache_dir)
    y: list[int] = []
    try:
        table = pyarrow.parquet.ParquetFile(path)
        schema = table.schema_arrow
        pictures, label = _parquet_columns(path, schema, pyarrow)
        columns = [pictures] if label is None else [pictures, label]
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for cell in batch.column(0).to_pylist():
                encoded = cell.get("bytes") if isinstance(cell, dict) else cell
                spill.append(encoded or b"")  # an empty one is counted as unreadable
            if label is not None:
                y.extend(-1 if value is None else int(value) for value in batch.column(1).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        spill.close()
        raise DataError(f"{path} cannot be read as a parquet table: {error}") from error
    except DataError:
        spill.close()
        raise
    labelled = bool(y) and min(y) >= 0
    labels = _hub_class_names(schema, label) or [str(i) for i in range(max(y, default=-1) + 1)]
    return Source(
        name=path.stem,
        images=images,
        read=lambda number: decode(spill[number], images),
        count=len(spill),
        y=y if labelled else None,
        labels=labels if labelled else (),
        origin="a parquet table",
        close=spill.close,
    )


def from_memory(name: str, x: Array, y: Sequence[int], images: ImageFormat, labels: Sequence[str]) -> Source:
    """uint8 [n, C, H, W] that are in memory already."""
    return Source(
        name=name,
        images=images,
        read=lambda number: fit_array(x[number], images),
        count=len(x),
        y=y,
        labels=labels,
    )


def _rows(view: Any, lo: int, hi: int) -> Array:
    return np.asarray(view[lo:hi])


def _from_arrays(path: Path, stored: dict[str, Stored], images: ImageFormat) -> Source:
    what = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in stored.items()) or "nothing"
    name = next((name for name in PICTURES if name in stored), None)
    if name is None:
        many = [name for name, array in stored.items() if len(array.shape) >= 3]
        if len(many) != 1:
            raise DataError(f'{path} has no array "x" of pictures; it holds {what}. Save it with x=..., y=...')
        name = many[0]
    x = stored[name]
    if len(x.shape) not in (3, 4) or 0 in x.shape:
        raise DataError(
            f"{path}: {name} has the shape {list(x.shape)}; pictures are [n, H, W], [n, H, W, C] or [n, C, H, W]"
        )
    n = x.shape[0]
    axes = _channel_axes(path, name, x.shape)
    scale = _scale(path, name, x)
    labelled = next((label for label in CLASSES if label in stored), None)
    y, labels = (None, []) if labelled is None else _classes(path, labelled, stored[labelled], n)

    def read(number: int) -> Pixels:
        row = x.rows(number, number + 1)[0]
        pixels = np.asarray(row[None] if row.ndim == 2 else row.transpose(axes))
        if pixels.dtype != np.uint8:
            pixels = np.rint(pixels.astype(np.float64) * scale).astype(np.uint8)
        return fit_array(pixels, images)

    return Source(name=path.stem, images=images, read=read, count=n, y=y, labels=labels, origin=f"a {path.suffix} file")


def _channel_axes(path: Path, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """How to turn one row into [C, H, W]."""
    if len(shape) == 3:
        return ()
    if shape[3] in (1, 3, 4):
        return (2, 0, 1)
    if shape[1] in (1, 3, 4):
        return (0, 1, 2)
    raise DataError(
        f"{path}: {name} has the shape {list(shape)}, and neither its second nor its last number is 1, 3 or 4: "
        "which of them are the channels?"
    )


def _scale(path: Path, name: str, x: Stored) -> float:
    """What to multiply values by to get 0..255. Looks at every value unless the type says it all."""
    first = x.rows(0, 1)
    if first.dtype == np.uint8:
        return 1.0
    if first.dtype == np.bool_:
        return 255.0
    if first.dtype.kind not in "iuf":
        raise DataError(f"{path}: {name} holds {x.dtype}, which are no pixels: save uint8, or floats in [0, 1]")
    low, high = np.inf, -np.inf
    rows = max(1, PORTION // max(1, first.nbytes))
    for lo in range(0, x.shape[0], rows):
        part = x.rows(lo, min(x.shape[0], lo + rows))
        if part.dtype.kind == "f" and not np.isfinite(part).all():
            raise DataError(f"{path}: {name} holds NaN or infinity, which are no pixels")
        low, high = min(low, float(part.min())), max(high, float(part.max()))
    if low < 0 or high > 255:
        raise DataError(
            f"{path}: the values of {name} lie in [{low:g}, {high:g}]; pixels lie in [0, 255], or in [0, 1] as floats. "
            "Scale them before you save them."
        )
    return 255.0 if first.dtype.kind == "f" and high <= 1.0 else 1.0


def _classes(path: Path, name: str, stored: Stored, n: int) -> tuple[list[int], list[str]]:
    shape = stored.shape
    if shape not in ((n,), (n, 1)):
        raise DataError(f"{path}: {name} has the shape {list(shape)}, but there are {n} pictures: one class for each")
    values = stored.rows(0, n).reshape(n)
    if values.dtype.kind in "US":
        words, y = np.unique(values.astype(str), return_inverse=True)
        return y.tolist(), words.tolist()
    whole = values.astype(np.int64) if values.dtype.kind in "iubf" else None
    if whole is None or (whole != values).any() or whole.min() < 0 or whole.max() >= MAX_CLASSES:
        raise DataError(f"{path}: {name} must hold class numbers from 0 up, or class names; it holds {stored.dtype}")
    return whole.tolist(), [str(i) for i in range(int(whole.max()) + 1)]


def _npy(unzipped: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, file: IO[bytes], cache_dir: Path) -> Stored:
    """Map one array of an .npz: in place if it is stored, in a temporary file if it is compressed."""
    with unzipped.open(info) as member:
        shape, fortran, dtype, header_bytes = _npy_header(member)
    if dtype.hasobject:
        raise DataError(
            f"{path}: {info.filename} holds Python objects, and loading those could run any code: save numbers"
        )
    size = dtype.itemsize * int(np.prod(shape, dtype=np.object_))
    if size + header_bytes != info.file_size or size > MAX_ARRAY_BYTES:
        raise DataError(
            f"{path}: {info.filename} says {list(shape)} {dtype}, which does not fit its {info.file_size} bytes"
        )
    order = "F" if fortran else "C"
    if size == 0:
        array: Array = np.empty(shape, dtype)
    elif info.compress_type == zipfile.ZIP_STORED:
        file.seek(info.header_offset + 26)
        name_bytes, extra_bytes = np.frombuffer(file.read(4), "<u2").tolist()
        offset = info.header_offset + 30 + name_bytes + extra_bytes + header_bytes
        array = np.memmap(path, dtype, "r", offset, shape, order)  # type: ignore[call-overload]
    else:
        with disk_full_explained(cache_dir):
            cache_dir.mkdir(parents=True, exist_ok=True)
            # The map outlives the file object, and the bytes go with the map.
            with unzipped.open(info) as member, tempfile.TemporaryFile(dir=cache_dir) as unfolded:
                shutil.copyfileobj(member, unfolded, 1 << 20)
                unfolded.flush()
                array = np.memmap(unfolded, dtype, "r", header_bytes, shape, order)  # type: ignore[call-overload]
    return Stored(tuple(shape), str(dtype), partial(_rows, array))


def _npy_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    head = io.BytesIO(member.read(1 << 16))
    version = np.lib.format.read_magic(head)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"its arrays have the unknown format {version}")
    shape, fortran, dtype = read(head)
    return shape, fortran, dtype, head.tell()


def _parquet_columns(path: Path, schema: Any, pyarrow: Any) -> tuple[str, str | None]:
    """The column of encoded pictures, and the column of classes if there is one."""

    def is_picture(kind: Any) -> bool:
        if pyarrow.types.is_struct(kind):
            return any(part.name == "bytes" for part in kind)
        return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    pictures = [column.name for column in schema if is_picture(column.type)]
    if not pictures:
        raise DataError(f"{path} has no column of encoded pictures; its columns are {', '.join(schema.names)}")
    wanted = next((name for name in ("image", "img", "jpg", "png") if name in pictures), pictures[0])
    label = next((name for name in ("label", "labels", "class", "target", "fine_label") if name in schema.names), None)
    if label is not None and not pyarrow.types.is_integer(schema.field(label).type):
        label = None
    return wanted, label


def _hub_class_names(schema: Any, label: str | None) -> list[str]:
    """The names that the `datasets` library notes in a table's metadata."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])
        return [str(name) for name in noted["info"]["features"][label]["names"]]
    except (KeyError, TypeError, ValueError):
        return []
