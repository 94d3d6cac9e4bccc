"""The header reader believes nothing: every lie is a BadUpdate that names it, and costs little memory."""

import contextlib
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.domain import tensorfile
from potluck.errors import BadInput, BadUpdate
from potluck.protocol import Layout

LAYOUT = Layout([("g.w", [3, 5]), ("g.b", [4097])], [("g.running_mean", [2])], [("g.n", [])])
SIZES = {"values": 4112, "scales": 12, "buffers": 8, "counters": 8}


def listing() -> dict[str, Any]:
    """A right int8 update's header, widest tensors first."""
    return {
        "counters": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
        "buffers": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        "scales": {"dtype": "F32", "shape": [3], "data_offsets": [16, 28]},
        "values": {"dtype": "I8", "shape": [4112], "data_offsets": [28, 4140]},
    }


def head(content: object) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text


def check(content: object, data: int = 4140) -> tensorfile.Header:
    first = head(content)
    return tensorfile.check_update(first, len(first) + data, LAYOUT, "int8")


def test_a_right_update_passes_and_tells_where_its_tensors_are() -> None:
    found = check(listing() | {"__metadata__": {"by": "w1"}})

    assert found.tensors["values"].begin == 28
    assert found.metadata == {"by": "w1"}


def test_bytes_after_the_header_do_no_harm() -> None:
    first = head(listing())

    tensorfile.check_update(first + b"\0" * 100, len(first) + 4140, LAYOUT, "int8")


def changed(name: str, **fields: object) -> dict[str, Any]:
    found = listing()
    found[name] = found[name] | fields
    return found


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({k: v for k, v in listing().items() if k != "values"}, "bytes"),
        (changed("values", dtype="U8"), "'values' is U8, expected I8"),
        (changed("scales", dtype="I32"), "'scales' is I32, expected F32"),
        (changed("values", shape=[4, 1028]), r"'values' has the shape \[4, 1028\], expected \[4112\]"),
        (changed("values", shape=[4111]), "takes 4111 bytes, its offsets span 4112"),
        (changed("values", shape=[-4112]), "impossible shape"),
        (changed("values", shape=[4112.0]), "impossible shape"),
        (changed("values", shape=[True]), "impossible shape"),
        (changed("values", shape="4112"), "impossible shape"),
        (changed("values", shape=[1] * 8 + [4112]), "at most 8 dimensions"),
        (changed("values", shape=[10**400]), "impossible shape"),
        (changed("values", dtype="PICKLE"), "unknown dtype 'PICKLE'"),
        (changed("values", dtype=["I8"]), "unknown dtype"),
        (changed("values", data_offsets=[29, 4141]), "leaves a gap"),
        (changed("values", data_offsets=[27, 4139]), "overlaps"),
        (changed("values", data_offsets=[28]), "impossible data_offsets"),
        (changed("values", data_offsets=[4140, 28]), "offsets span -4112"),
        (changed("values", more=1), "nothing else"),
        (listing() | {"extra": {"dtype": "F32", "shape": [0], "data_offsets": [4140, 4140]}}, "unknown tensor 'extra'"),
        (listing() | {"__metadata__": {"n": 1}}, "__metadata__"),
        (listing() | {"__metadata__": []}, "__metadata__"),
        (listing() | {"x" * 600: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, "600 characters"),
        ({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10_001)}, "10001 tensors"),
        ([], "not a JSON object"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a": NaN}', "not a number"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": {}, "a": {}}', "occurs twice"),
        (b'{"a": {"dtype": "F32", "dtype": "I8", "shape": [], "data_offsets": [0, 4]}}', "occurs twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": 3}', "nothing else"),
    ],
)
def test_a_wrong_header_is_refused_with_its_reason(content: object, says: str) -> None:
    with pytest.raises(BadUpdate, match=says):
        check(content)


def test_a_missing_tensor_is_named() -> None:
    content = listing()
    del content["values"]

    with pytest.raises(BadUpdate, match="'values' is missing"):
        check(content, data=28)


@pytest.mark.parametrize("data", [4139, 4141, 0, 1 << 40])
def test_a_file_of_another_size_than_its_tensors_is_refused(data: int) -> None:
    with pytest.raises(BadUpdate, match="header accounts for"):
        check(listing(), data)


@pytest.mark.parametrize(
    ("first", "size", "says"),
    [
        (b"", 0, "too short"),
        (b"\0\0\0", 3, "too short"),
        ((1 << 63).to_bytes(8, "little"), 1 << 40, "at most 1048576"),
        ((1 << 20).to_bytes(8, "little"), 5000, "whole file has 5000"),
        ((100).to_bytes(8, "little") + b"{}", 5000, "only 10 of them arrived"),
    ],
)
def test_a_lying_length_is_refused_before_anything_is_read(first: bytes, size: int, says: str) -> None:
    with pytest.raises(BadUpdate, match=says):
        tensorfile.parse(first, size)


def test_refusing_a_huge_header_takes_little_memory() -> None:
    first = head(b'{"a":' + b"[" * 500 + b"],[" * 100_000 + b"]" * 500 + b"}")
    tracemalloc.start()

    with pytest.raises(BadUpdate):
        tensorfile.check_update(first, 1 << 50, LAYOUT, "int8")

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def test_a_codec_that_does_not_exist_is_answered_with_the_nearest() -> None:
    with pytest.raises(BadInput, match="did you mean int8"):
        tensorfile.expected_update(LAYOUT, "int4")


@pytest.mark.parametrize(("codec", "values"), [("fp32", "F32"), ("bf16", "BF16"), ("int8", "I8")])
def test_what_is_expected_follows_the_layout_and_the_codec(codec: str, values: str) -> None:
    expected = tensorfile.expected_update(LAYOUT, codec)

    assert expected["values"] == (values, (4112,))
    assert expected.get("scales") == (("F32", (3,)) if codec == "int8" else None)  # 15 values, 4096, and 1
    assert expected["counters"] == ("I64", (1,))


@given(st.binary(max_size=300), st.integers(0, 1 << 62))
def test_any_bytes_are_parsed_or_refused(content: bytes, size: int) -> None:
    for first in (content, head(content)):
        with contextlib.suppress(BadUpdate):  # and nothing else
            tensorfile.parse(first, size)
