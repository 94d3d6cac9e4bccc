"""Which figures and pictures are in a TensorBoard event file, as far as it is written?

    file     = record*                      record = length u64, crc(length) u32, bytes, crc(bytes) u32; little endian
    bytes    = protobuf `Event`: wall_time = 1, step = 2, summary = 5
    summary  = `Summary`: value = 1: tag = 1, simple_value = 2, image = 4, tensor = 8

The crc is CRC-32C, masked (https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/lib/io/record_writer.cc).
The file comes from a job, so nothing in it is believed: lengths are bounded, a record with a wrong crc ends the file, a
protobuf that cannot be read is left out. No dependency: five fields of a wire format are not worth TensorFlow.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from potluck.client.places import open_below
from potluck.errors import PotluckError

MAX_RECORD_BYTES = 64_000_000  # a longer one is no figure and no picture that we would take: the file is given up
_KEPT_BYTES = 8_000_000  # a longer record is passed over
_AT_ONCE_BYTES = 1_000_000  # of a file in one reading, so that a large one does not hold up the others
MAX_PNG_BYTES = 4_000_000
_CHECKED_BYTES = 65_536  # beyond it, plain Python takes too long for a crc; the length's own crc was right
_PNG = b"\x89PNG\r\n\x1a\n"
_FLOATS = {
    1: ("f", 4),
    2: ("d", 8),
    3: ("i", 4),
    9: ("q", 8),
    19: ("e", 2),
}  # DataType: float, double, int32, int64, half
_HEADER = struct.Struct("<QI")


class Broken(ValueError):
    """The file is no event file, or was damaged: nothing after this can be trusted."""


@dataclass
class Scalars:
    """What one event says."""

    step: int
    at: float
    values: dict[str, float] = field(default_factory=dict)
    images: dict[str, bytes] = field(default_factory=dict)  # PNG


class EventFile:
    """One file below a folder, read again and again from where the last reading ended."""

    def __init__(self, folder: Path, path: str) -> None:
        self._folder = folder
        self._path = path
        self.offset = 0
        self.broken = ""  # why nothing more is read from it
        self.behind = False  # the last reading stopped before the end

    def read(self) -> list[Scalars]:
        """The events that were added since. If it is `behind` then, there are more to read at once."""
        found: list[Scalars] = []
        self.behind = False
        if self.broken:
            return found
        start = self.offset
        try:
            with open_below(self._folder, self._path) as file:
                while (record := self._record(file)) is not None:
                    event = read_event(record)
                    if event is not None:
                        found.append(event)
                    if self.offset - start >= _AT_ONCE_BYTES:
                        self.behind = True
                        break
        except Broken as error:
            self.broken = str(error)
        except (PotluckError, OSError):
            return found  # gone, or no plain file, or it cannot be read just now
        return found

    def _record(self, file: BinaryIO) -> bytes | None:
        """The next record; None: it is not whole yet. A record too large for us is empty."""
        size = os.fstat(file.fileno()).st_size
        if size - self.offset < _HEADER.size:
            return None
        file.seek(self.offset)
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            return None
        length, crc = _HEADER.unpack(head)
        if crc != masked_crc32c(head[:8]):
            raise Broken(f"the record at byte {self.offset} has a wrong checksum of its length")
        if length > MAX_RECORD_BYTES:
            raise Broken(f"the record at byte {self.offset} has {length} bytes, more than {MAX_RECORD_BYTES}")
        end = self.offset + _HEADER.size + length + 4
        if size < end:
            return None
        if length > _KEPT_BYTES:
            self.offset = end
            return b""
        content, tail = file.read(length), file.read(4)
        if len(tail) < 4:
            return None
        if length <= _CHECKED_BYTES and struct.unpack("<I", tail)[0] != masked_crc32c(content):
            raise Broken(f"the record at byte {self.offset} has a wrong checksum")
        self.offset = end
        return content


# --- checksums ------------------------------------------------------------------------------------------------------


def _table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ 0x82F63B78 if value & 1 else value >> 1
        table.append(value)
    return tuple(table)


_TABLE = _table()


def crc32c(content: bytes) -> int:
    """CRC-32C (Castagnoli), RFC 3720 appendix B.4."""
    crc, table = 0xFFFFFFFF, _TABLE
    for byte in content:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def masked_crc32c(content: bytes) -> int:
    crc = crc32c(content)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


# --- protobuf -------------------------------------------------------------------------------------------------------


def read_event(record: bytes) -> Scalars | None:
    """The figures and pictures of an event; None if it has none, or is not readable."""
    try:
        return _event(record)
    except (Broken, struct.error, UnicodeDecodeError, OverflowError, ValueError):
        return None


def _event(record: bytes) -> Scalars | None:
    event = Scalars(0, 0.0)
    summaries = []
    for number, kind, value in _fields(record):
        if number == 1 and kind == 1:
            event.at = struct.unpack("<d", value)[0]
        elif number == 2 and kind == 0:
            event.step = _signed(value)
        elif number == 5 and kind == 2:
            summaries.append(value)
    for summary in summaries:
        for number, kind, value in _fields(summary):
            if number == 1 and kind == 2:
                _value(value, event)
    return event if event.values or event.images else None


def _value(content: bytes, event: Scalars) -> None:
    tag, figure, png = "", None, b""
    for number, kind, value in _fields(content):
        if number == 1 and kind == 2:
            tag = value.decode()
        elif number == 2 and kind == 5:
            figure = struct.unpack("<f", value)[0]
        elif number == 4 and kind == 2:
            png = next((v for n, k, v in _fields(value) if (n, k) == (4, 2)), b"")
        elif number == 8 and kind == 2:
            figure, png = _tensor(value)
    if not tag:
        return
    if png[:8] == _PNG and len(png) <= MAX_PNG_BYTES:
        event.images[tag] = png
    elif figure is not None and math.isfinite(figure):
        event.values[tag] = figure


def _tensor(content: bytes) -> tuple[float | None, bytes]:
    """The figure, or the picture, that a `TensorProto` is. Plugins write scalars of shape () and [width, height, PNG]."""
    dtype, raw, strings = 0, b"", []
    floats: list[float] = []
    for number, kind, value in _fields(content):
        if number == 1 and kind == 0:
            dtype = value
        elif number == 4 and kind == 2:
            raw = value
        elif number == 8 and kind == 2:
            strings.append(value)
        elif number in (5, 6):  # float_val, double_val; packed (2) or one by one
            form, size = ("<f", 4) if number == 5 else ("<d", 8)
            if kind in (1, 2, 5) and len(value) == size:
                floats.append(struct.unpack(form, value)[0])
        elif number in (7, 10):  # int_val, int64_val
            whole = _varint(value, 0)[0] if kind == 2 and value else value
            if isinstance(whole, int):
                floats.append(float(_signed(whole)))
    if dtype == 7:
        return None, next((text for text in strings[2:3] if text[:8] == _PNG), b"")
    if dtype in _FLOATS and len(raw) == _FLOATS[dtype][1]:
        floats.append(float(struct.unpack("<" + _FLOATS[dtype][0], raw)[0]))
    return (floats[0] if len(floats) == 1 else None), b""


def _fields(content: bytes) -> Iterator[tuple[int, int, Any]]:
    """Each field of a message: its number, its wire type, and the value: an int for varints, else bytes."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(content, at)
            yield key >> 3, kind, value
            continue
        if kind == 2:
            size, at = _varint(content, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise Broken(f"wire type {kind}")
        if size > len(content) - at:
            raise Broken("a field is longer than its message")
        yield key >> 3, kind, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(content):
            break
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise Broken("a number does not end")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
