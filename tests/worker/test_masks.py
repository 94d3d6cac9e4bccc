"""Do secrets stay out of what a job prints?"""

from __future__ import annotations

import base64
import json
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.worker.jobs.masks import Masks

SECRET = "hf_Zq/8+Pw~9 ä!"


def masked(text: bytes, *secrets: str, piece: int = 10**9) -> bytes:
    masks = Masks(secrets)
    pieces = [masks.feed(text[at : at + piece]) for at in range(0, len(text), piece)]
    return b"".join(pieces) + masks.flush()


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 7, 1000])
def test_a_secret_is_masked_wherever_the_pieces_are_cut(piece: int) -> None:
    text = f"token={SECRET}; again {SECRET}{SECRET}.".encode()

    assert masked(text, SECRET, piece=piece) == b"token=***; again ******."


@pytest.mark.parametrize("before", ["", "u", "us", "user:"])
@pytest.mark.parametrize("after", ["", "x", "xyz"])
def test_a_secret_inside_a_base64_text_is_masked(before: str, after: str) -> None:
    encoded = base64.b64encode(f"{before}{SECRET}{after}".encode())
    safe = base64.urlsafe_b64encode(f"{before}{SECRET}{after}".encode())

    for text in (encoded, safe):
        shown = masked(b"Authorization: Basic " + text + b"\n", SECRET, piece=4)
        assert b"***" in shown
        left = shown.removeprefix(b"Authorization: Basic ").strip()
        assert len(left) <= len(before) * 4 // 3 + len(after) * 4 // 3 + 3 + 8


@pytest.mark.parametrize("form", [json.dumps, quote, lambda s: quote(s, safe=""), repr])
def test_a_secret_as_programs_write_it_is_masked(form: object) -> None:
    secret = 'pass"word\tä/1'

    shown = masked(f"<{form(secret)}>".encode(), secret)  # type: ignore[operator]

    assert b"***" in shown
    assert b"word" not in shown


def test_each_long_line_of_a_key_is_masked() -> None:
    key = "-----BEGIN KEY-----\nabcdefgh12345678\nijklmnop90123456\n-----END KEY-----\n"

    shown = masked(b"first abcdefgh12345678 then\nijklmnop90123456\n" + key.encode(), key)

    assert b"abcdefgh" not in shown
    assert b"ijklmnop" not in shown


def test_what_is_not_text_goes_through_as_it_is() -> None:
    noise = bytes(range(256)) * 3

    assert masked(noise, SECRET, piece=7) == noise
    assert masked(noise, piece=7) == noise


def test_a_value_too_short_to_be_a_secret_leaves_the_output_alone() -> None:
    assert masked(b"a b c 123", "b", "12") == b"a b c 123"


def test_only_what_may_become_a_secret_is_held_back() -> None:
    masks = Masks(["password123"])

    assert masks.feed(b"hello pass") == b"hello "
    assert masks.feed(b"able\n") == b"passable\n"
    assert masks.feed(b"password12") == b""
    assert masks.feed(b"3 ") == b"*** "
    assert masks.flush() == b""


def test_a_secret_that_begins_with_another_is_masked_whole() -> None:
    assert masked(b"abcdefgh abcd", "abcd", "abcdefgh", piece=4) == b"*** ***"
    assert masked(b"aaaaaaaaaaaaab", "aaaa", piece=3) == b"***b"


@settings(max_examples=300, deadline=None)
@given(
    secrets=st.lists(st.text("ab1", min_size=4, max_size=7), max_size=3),
    pieces=st.lists(st.text("ab1 ", max_size=9), max_size=12),
)
def test_the_cuts_never_matter_and_no_secret_is_ever_shown(secrets: list[str], pieces: list[str]) -> None:
    masks = Masks(secrets)

    shown = b"".join([*(masks.feed(piece.encode()) for piece in pieces), masks.flush()])

    assert shown == masked("".join(pieces).encode(), *secrets)
    assert not any(secret.encode() in shown for secret in secrets)
