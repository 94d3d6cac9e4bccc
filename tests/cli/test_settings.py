from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck import settings
from potluck.errors import BadInput, NotFound, NotKnown
from potluck.settings import ClientSettings, HubSettings, WorkerSettings


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("2h", 7200), ("1d", 86400), ("1h30m", 5400), ("2.5h", 9000), ("15", 15)],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert settings.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "10x", "-5m", "1h-5m", "nan", "inf", "m10", "10m!"])
def test_what_is_no_duration_says_how_to_write_one(text: str) -> None:
    with pytest.raises(BadInput, match="like 90s, 10m, 2h or 1d"):
        settings.parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 500_000_000), ("2G", 2 * 10**9), ("1.5GiB", 3 * 2**29), ("7", 7), ("3 kB", 3000)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert settings.parse_size(text) == size


@pytest.mark.parametrize(("text", "share"), [("50%", 0.5), ("50", 0.5), ("0.5", 0.5), ("100%", 1.0), ("1", 1.0)])
def test_shares_are_read(text: str, share: float) -> None:
    assert settings.parse_share(text) == share


@pytest.mark.parametrize("text", ["0", "0%", "101%", "-3%", "half", "nan"])
def test_what_is_no_share_of_a_machine_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="from 1% to 100%"):
        settings.parse_share(text)


@given(st.floats(0, 1e9, allow_nan=False))
def test_a_duration_that_was_read_reads_the_same_again(seconds: float) -> None:
    assert settings.parse_duration(settings.parse_duration(str(seconds))) == seconds


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "config").mkdir(parents=True)
    (home / "config" / "config.toml").write_text('[hub]\nport = 1\nname = "file"\nbind = "127.0.0.1"\n')
    monkeypatch.setenv("POTLUCK_PORT", "2")
    monkeypatch.setenv("POTLUCK_HUB_NAME", "environment")

    found = settings.load(HubSettings, {"port": 3, "name": None})

    assert (found.port, found.name, found.bind, found.house_worker) == (3, "environment", "127.0.0.1", True)
    assert found.data_dir == home / "hub"


def test_the_database_url_can_come_from_a_file_so_that_its_password_is_in_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "url").write_text("postgresql://me:secret@db/potluck\n")
    monkeypatch.setenv("POTLUCK_DATABASE_FILE", str(tmp_path / "url"))

    assert settings.load(HubSettings).database_url == "postgresql://me:secret@db/potluck"


def test_a_slip_in_the_file_is_named_with_the_nearest_key(home: Path) -> None:
    (home / "config").mkdir(parents=True)
    (home / "config" / "config.toml").write_text("[worker]\nshaer = 0.5\n")

    with pytest.raises(BadInput, match=r"`shaer` is not known in .worker.: did you mean `share`"):
        settings.load(WorkerSettings)


def test_a_bad_value_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTLUCK_SHARE", "lots")

    with pytest.raises(BadInput, match="POTLUCK_SHARE: `lots` is not a share"):
        settings.load(WorkerSettings)


@pytest.mark.parametrize(
    ("bind", "asked", "encrypted"),
    [("0.0.0.0", None, True), ("127.0.0.1", None, False), ("localhost", None, False), ("127.0.0.1", True, True)],
)
def test_a_hub_that_others_can_reach_is_encrypted_unless_asked_otherwise(
    bind: str, asked: bool | None, encrypted: bool, tmp_path: Path
) -> None:
    assert HubSettings(tmp_path, bind=bind, tls=asked).use_tls is encrypted


# --- credentials


@pytest.mark.parametrize("role", ["worker", "member", "viewer", "admin"])
def test_a_token_tells_its_role_and_fits_its_checksum(role: str) -> None:
    token = settings.make_token(role)

    assert settings.check_token(token) == role
    assert token[:4] == f"pl{role[0]}_"
    assert len(token) == 4 + 43 + 6


@given(st.integers(0, 52), st.characters(min_codepoint=33, max_codepoint=126))
def test_any_single_wrong_letter_in_a_token_is_noticed(place: int, letter: str) -> None:
    token = settings.make_token("worker")
    wrong = token[:place] + letter + token[place + 1 :]

    if wrong != token:
        with pytest.raises(NotKnown, match="copy it again"):
            settings.check_token(wrong)


def test_a_token_cut_short_is_called_short() -> None:
    with pytest.raises(NotKnown, match="too short"):
        settings.check_token(settings.make_token("admin")[:-3])


def test_a_private_file_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    settings.write_private(tmp_path / "a" / "secret", "x")

    assert stat.S_IMODE((tmp_path / "a" / "secret").stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["secret"]


# --- which hub


def _write_hub(folder: Path, address: str) -> str:
    token = settings.make_token("admin")
    settings.write_private(
        folder / "hub.json", f'{{"address": "{address}", "admin_token": "{token}", "fingerprint": "ab", "pid": 1}}'
    )
    return token


def test_without_any_hub_the_message_names_the_three_ways_to_one() -> None:
    with pytest.raises(NotFound, match=r"potluck host.*potluck join LINK.*POTLUCK_HUB"):
        settings.find_hub()


def test_a_hub_on_this_machine_is_found_in_its_data_folder(home: Path) -> None:
    token = _write_hub(home / "hub", "http://127.0.0.1:8470")

    assert settings.find_hub() == ("http://127.0.0.1:8470", token, "ab")


def test_a_hub_with_a_data_folder_of_its_own_is_found_again(tmp_path: Path) -> None:
    token = _write_hub(tmp_path / "elsewhere", "http://127.0.0.1:1")
    settings.remember_hub_dir(tmp_path / "elsewhere")

    assert settings.find_hub().token == token
    assert settings.find_hub(str(tmp_path / "elsewhere")).token == token


def test_the_joined_profile_comes_before_the_local_hub_and_the_environment_before_both(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_hub(home / "hub", "http://127.0.0.1:8470")
    mine = settings.make_token("member")
    settings.save_profile(settings.Profile("https://lab:8470", mine, "cd", "member"))
    assert settings.find_hub() == ("https://lab:8470", mine, "cd")

    monkeypatch.setenv("POTLUCK_HUB", "http://other:1/")
    monkeypatch.setenv("POTLUCK_TOKEN", settings.make_token("viewer"))

    assert settings.find_hub().address == "http://other:1"
    assert settings.check_token(settings.find_hub().token) == "viewer"


def test_a_token_for_one_hub_is_never_sent_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTLUCK_HUB", "http://mine:1")
    monkeypatch.setenv("POTLUCK_TOKEN", settings.make_token("admin"))

    assert settings.find_hub("http://stranger:1").token == ""


def test_a_mangled_token_is_noticed_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTLUCK_HUB", "http://mine:1")
    monkeypatch.setenv("POTLUCK_TOKEN", settings.make_token("admin")[:-1] + "!")

    with pytest.raises(NotKnown, match="checksum"):
        settings.find_hub()


def test_the_request_timeout_is_read_as_a_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTLUCK_REQUEST_TIMEOUT", "2m")

    assert settings.load(ClientSettings).request_s == 120
