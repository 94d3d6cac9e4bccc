"""How does a training script say what it measures?

    import potluck
    potluck.log(step, loss=0.31, accuracy=0.9, sample=image)

A number (or a tensor or array of one element) is a figure; an array H×W, H×W×3 or 3×H×W, or a PIL image, is a picture.
Each call appends one line to `$POTLUCK_METRICS_DIR/points.jsonl`, from where the worker takes it. Any number of threads
and processes may call at once. It never raises: what cannot be recorded is said once on stderr, and the training goes
on. Where nobody collects (the variable is not set), nothing is written.

This file goes into every job's environment by itself, whatever Python and packages are there: it needs the standard
library only, must run on old Pythons (3.8), and never imports numpy or torch. It uses them if the script has.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
import sys
import threading
import time
import zlib
from typing import Any

LINES = "points.jsonl"
PICTURES = "pictures"
MAX_LINE_BYTES = 64_000  # one write of it is one piece, whoever else appends
MAX_VALUES = 1000  # figures and pictures in a call
MAX_NAME = 100  # characters
MAX_PIXELS = 2048 * 2048
MAX_PNG_BYTES = 4_000_000
_MAX_STEP = 1 << 53  # beyond it, a step is no exact number in a browser
_MAX_COMPLAINTS = 50

_complaints = set()  # type: set[str]
_files = {}  # type: dict[str, int]
_opening = threading.Lock()
_numbers = itertools.count()


def log(step: int, **values: object) -> None:
    """Record `values` for `step`. Floats, ints, one-element tensors: figures. Arrays and PIL images: pictures."""
    try:
        folder = os.environ.get("POTLUCK_METRICS_DIR", "")
        if not folder:
            _complain("no job", "potluck.log: this is not a Potluck job, so nothing is recorded")
            return
        number = _step(step)
        if number is None:
            _complain("step", f"potluck.log: the step must be a whole number, not {_shown(step)}: not recorded")
            return
        if len(values) > MAX_VALUES:
            _complain("many", f"potluck.log: {len(values)} values at once: only the first {MAX_VALUES} are recorded")
            values = dict(itertools.islice(values.items(), MAX_VALUES))
        figures, pictures = {}, {}
        for name, value in values.items():
            figure = _figure(value)
            if len(name) > MAX_NAME:
                _complain(f"name {name[:MAX_NAME]}", f"potluck.log: `{name[:MAX_NAME]}…` is too long a name")
            elif figure is None:
                picture = _picture(folder, name, value)
                if picture:
                    pictures[name] = picture
            elif math.isfinite(figure):
                figures[name] = figure
            else:
                _complain(f"nan {name}", f"potluck.log: `{name}` is {figure} at step {number}: not recorded")
        _write(folder, number, figures, pictures)
    except Exception as error:  # noqa: BLE001 - a figure is never worth a training
        _complain(type(error).__name__, f"potluck.log: not recorded: {type(error).__name__}: {error}")


def _complain(about: str, sentence: str) -> None:
    """Say it on stderr, once for each cause."""
    if about in _complaints or len(_complaints) >= _MAX_COMPLAINTS:
        return
    _complaints.add(about)
    try:
        print(sentence, file=sys.stderr, flush=True)
    except Exception:  # noqa: BLE001 - stderr may be closed or replaced by anything
        return


def _shown(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"


def _step(step: Any) -> int | None:
    number = _figure(step)
    if number is None or not math.isfinite(number) or number != int(number) or abs(number) >= _MAX_STEP:
        return None
    return int(number)


def _figure(value: Any) -> float | None:
    """The number that it is, or None: then it may be a picture."""
    if isinstance(value, (int, float)):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    if isinstance(value, (str, bytes)) or value is None:
        return None
    if _count(value) == 1 and hasattr(value, "item"):
        value = value.item()  # of a tensor, an array, a numpy number
    elif not hasattr(value, "__float__") or hasattr(value, "shape"):
        return None
    return None if isinstance(value, complex) else float(value)


def _count(value: Any) -> int:
    """How many elements; numpy's own numbers have the shape ()."""
    shape = getattr(value, "shape", None)
    return -1 if shape is None else math.prod(int(size) for size in shape)


# --- writing --------------------------------------------------------------------------------------------------------


def _write(folder: str, step: int, figures: dict[str, float], pictures: dict[str, str]) -> None:
    if not figures and not pictures:
        return
    line = _line(step, figures, pictures)
    if len(line) <= MAX_LINE_BYTES:
        _append(folder, line)
        return
    # Several lines of the same step are read as well as one.
    for part in _parts(figures):
        _append(folder, _line(step, part, {}))
    for part in _parts(pictures):
        _append(folder, _line(step, {}, part))


def _parts(values: dict[str, Any]) -> Any:
    items = iter(values.items())
    while True:
        part = dict(itertools.islice(items, 48))  # 48 names of 100 characters fit, each escaped at worst to 12 bytes
        if not part:
            return
        yield part


def _line(step: int, figures: dict[str, float], pictures: dict[str, str]) -> bytes:
    point = {"step": step, "at": round(time.time(), 3), "values": figures}  # type: dict[str, Any]
    if pictures:
        point["images"] = pictures
    return (json.dumps(point, separators=(",", ":")) + "\n").encode()


def _append(folder: str, line: bytes) -> None:
    file = _files.get(folder)
    if file is None:
        with _opening:
            file = _files.get(folder)
            if file is None:
                os.makedirs(folder, exist_ok=True)
                flags = (
                    os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
                )
                _files[folder] = file = os.open(os.path.join(folder, LINES), flags, 0o644)
    if os.write(file, line) != len(line):
        os.write(file, b"\n")  # half a line (a full disk): it must not spoil the next one
        raise OSError("the disk is full")


# --- pictures -------------------------------------------------------------------------------------------------------


def _picture(folder: str, name: str, value: Any) -> str:
    """The name of the PNG file that was written below `folder`; empty if `value` is no picture."""
    found = _pixels(value)
    if isinstance(found, str):
        _complain(f"picture {name}", f"potluck.log: `{name}` is {found}: not recorded")
        return ""
    png = encode_png(*found)
    if len(png) > MAX_PNG_BYTES:
        _complain(f"picture {name}", f"potluck.log: `{name}` has {len(png)} bytes as PNG, at most {MAX_PNG_BYTES} fit")
        return ""
    short = f"{os.getpid()}-{threading.get_ident()}-{next(_numbers)}.png"
    path = os.path.join(folder, PICTURES, short)
    try:
        file = open(path + ".part", "xb")  # noqa: SIM115 - closed below, in both cases
    except FileNotFoundError:
        os.makedirs(os.path.join(folder, PICTURES), exist_ok=True)
        file = open(path + ".part", "xb")  # noqa: SIM115
    with file:
        file.write(png)
    os.replace(path + ".part", path)
    return short


def _pixels(value: Any) -> tuple[int, int, int, bytes] | str:
    """Width, height, channels and the bytes row by row; or what is wrong, as the end of a sentence."""
    if hasattr(value, "getbands") and hasattr(value, "convert"):  # PIL
        mode = value.mode if value.mode in ("L", "RGB", "RGBA") else "RGB"
        if value.size[0] * value.size[1] > MAX_PIXELS:
            return _too_large(*value.size)
        return value.size[0], value.size[1], len(mode), value.convert(mode).tobytes()
    shape = getattr(value, "shape", None)
    if shape is None:
        return f"{_shown(value)}, neither a number nor a picture"
    sizes = tuple(int(size) for size in shape)
    if len(sizes) not in (2, 3) or 0 in sizes:
        return f"an array of shape {sizes}: a picture is H×W, H×W×3 or 3×H×W"
    is_torch = type(value).__module__.split(".")[0] == "torch"
    front = len(sizes) == 3 and sizes[0] in (1, 3, 4) and (is_torch or sizes[2] not in (1, 3, 4))
    if len(sizes) == 2:
        height, width, channels = sizes[0], sizes[1], 1
    elif front:
        channels, height, width = sizes
    elif sizes[2] in (1, 3, 4):
        height, width, channels = sizes
    else:
        return f"an array of shape {sizes}: a picture is H×W, H×W×3 or 3×H×W"
    if width * height > MAX_PIXELS:
        return _too_large(width, height)
    if is_torch:
        value = value.detach().cpu()
        if value.is_floating_point():
            value = value.float()  # numpy knows no bfloat16
    numpy = sys.modules.get("numpy")
    flat = _flat_numpy(numpy, value) if numpy is not None else _flat(value)
    if isinstance(flat, str):
        return flat
    if front and channels > 1:
        plane, whole = width * height, bytearray(len(flat))
        for channel in range(channels):
            whole[channel::channels] = flat[channel * plane : (channel + 1) * plane]
        flat = bytes(whole)
    return width, height, channels, flat


def _too_large(width: int, height: int) -> str:
    return f"a picture of {width}×{height}: at most {MAX_PIXELS} pixels are kept, so scale it down"


def _flat_numpy(numpy: Any, value: Any) -> bytes | str:
    """All elements as bytes, in the order in which they lie. Floats: 0 … 1 becomes 0 … 255."""
    array = numpy.asarray(value)
    if array.dtype.kind == "b":
        array = array.astype("uint8") * 255
    elif array.dtype.kind == "f":
        array = numpy.rint(numpy.clip(numpy.nan_to_num(array, nan=0.0), 0.0, 1.0) * 255)
    elif array.dtype.kind not in "iu":
        return f"an array of {array.dtype}: a picture is of floats from 0 to 1, or of integers from 0 to 255"
    made = numpy.clip(array, 0, 255).astype("uint8").tobytes()
    assert isinstance(made, bytes)
    return made


def _flat(value: Any) -> bytes | str:
    """The same without numpy, by the buffer protocol or `tolist`: slower, so nobody has to load numpy for it."""
    try:
        view = memoryview(value)
    except TypeError:
        rows = value.tolist()
    else:
        if view.format == "B":
            return view.tobytes()
        rows = view.tolist()
    for _ in range(len(value.shape) - 1):
        rows = list(itertools.chain.from_iterable(rows))
    if not all(isinstance(one, (int, float)) for one in rows):
        return "an array of something else than numbers"
    if any(isinstance(one, bool) for one in rows[:1]):
        return bytes(255 if one else 0 for one in rows)
    if any(isinstance(one, float) for one in rows):
        return bytes(0 if one != one else round(min(max(one, 0.0), 1.0) * 255) for one in rows)
    return bytes(min(max(one, 0), 255) for one in rows)


def encode_png(width: int, height: int, channels: int, pixels: bytes) -> bytes:
    """`pixels` (8 bits each, row by row; 1, 3 or 4 channels) as a PNG file."""
    stride = width * channels
    if len(pixels) != stride * height:
        raise ValueError(f"{len(pixels)} bytes are no picture of {width}×{height}×{channels}")
    rows = b"".join(b"\0" + pixels[start : start + stride] for start in range(0, len(pixels), stride))  # no filter
    colour = {1: 0, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", _chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(rows, 3)), _chunk(b"IEND", b"")]
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
