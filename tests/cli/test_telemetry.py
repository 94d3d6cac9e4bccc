from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck import telemetry


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x9b31mred", "red"),
        ("a\x1b]0;own the title\x07b", "ab"),
        ("one\r\ntwo\tthree", "one  two three"),
        ("evil\u202egnp.exe", "evilgnp.exe"),
        ("bell\x07 back\x08 del\x7f null\x00", "bell back del null"),
        ("Zoë 👩\u200d💻 日本", "Zoë 👩\u200d💻 日本"),
    ],
)
def test_foreign_text_cannot_move_the_readers_cursor(text: str, plain: str) -> None:
    assert telemetry.clean(text) == plain


def test_line_breaks_stay_where_they_are_asked_for_and_long_text_is_cut() -> None:
    assert telemetry.clean("a\nb\tc", keep="\n") == "a\nb c"
    assert telemetry.clean("x" * 50, limit=10) == "x" * 9 + "…"


@given(st.text())
def test_clean_text_is_one_printable_line_and_stays_as_it_is_when_cleaned_again(text: str) -> None:
    plain = telemetry.clean(text)

    assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in plain)
    assert telemetry.clean(plain) == plain


def test_people_read_the_sentence() -> None:
    stream = io.StringIO()
    telemetry.setup("", stream=stream)

    telemetry.logger("agent").warning("hub.lost", say="The hub does not answer.", wait_s=3)

    assert stream.getvalue()[9:] == "warning: The hub does not answer.\n"


def test_machines_read_the_event_and_its_fields_also_of_libraries() -> None:
    stream = io.StringIO()
    telemetry.setup("json", stream=stream)

    telemetry.logger("agent", worker="ada").info("unit.done", say="Done.", unit=41)
    logging.getLogger("somebody.else").info("started \x1b[2J%s", 7)

    ours, theirs = (json.loads(line) for line in stream.getvalue().splitlines())
    assert ours | {"timestamp": ""} == {
        "event": "unit.done",
        "say": "Done.",
        "unit": 41,
        "worker": "ada",
        "level": "info",
        "logger": "potluck.agent",
        "timestamp": "",
    }
    assert (theirs["event"], theirs["logger"]) == ("started 7", "somebody.else")


def test_a_strangers_text_cannot_forge_a_line_of_the_log() -> None:
    stream = io.StringIO()
    telemetry.setup("", stream=stream)

    telemetry.logger("hub").info("worker.joined", say="eve\n12:00:00 error: all is lost joined")

    assert len(stream.getvalue().splitlines()) == 1


def test_debug_lines_appear_only_when_asked_for() -> None:
    for words, lines in (("", 0), ("debug", 1)):
        stream = io.StringIO()
        telemetry.setup(words, stream=stream)
        telemetry.logger("agent").debug("unit.leased")
        assert len(stream.getvalue().splitlines()) == lines
