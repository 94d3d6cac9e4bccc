"""Where does each setting come from, where do files live, and which hub and credential do we use?

    flag  >  environment POTLUCK_*  >  file (config.toml)  >  default

Folders, by platformdirs or all below POTLUCK_HOME:

    hub/            a hub's data: ledger, blobs, hub.json (0600: address, admin_token, fingerprint, pid)
    worker/<name>/  a worker's credential and spool          cache/   blobs that may be fetched again
    config/         config.toml, profile.json (0600: the member link that was joined last)

A secret never travels in a flag's value: it comes from the environment or from a file (`POTLUCK_TOKEN_FILE`).
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from potluck.domain.quantity import parse_duration as parse_duration
from potluck.domain.quantity import parse_number
from potluck.domain.quantity import parse_size as parse_size
from potluck.domain.tokens import check_token as check_token
from potluck.domain.tokens import hash_token as hash_token
from potluck.domain.tokens import make_token as make_token
from potluck.errors import BadInput, NotFound

DEFAULT_PORT = 8470
S = TypeVar("S")


def parse_share(text: str | float) -> float:
    """The part of a machine in `50%`, `50` or `0.5`, above 0 and at most 1."""
    word = str(text).strip()
    number = parse_number(word.removesuffix("%"))
    if number is not None and (word.endswith("%") or number > 1):
        number /= 100
    if number is None or not 0 < number <= 1:
        raise BadInput(f"`{word}` is not a share: write a percentage from 1% to 100%, like 50%")
    return number


# --- folders ------------------------------------------------------------------------------------------------


def home() -> Path | None:
    """POTLUCK_HOME, below which everything lives then."""
    root = os.environ.get("POTLUCK_HOME")
    return Path(root).expanduser() if root else None


def hub_dir() -> Path:
    return _folder("hub", "user_data_path")


def worker_dir(name: str) -> Path:
    return workers_dir() / name


def workers_dir() -> Path:
    return _folder("worker", "user_data_path")


def cache_dir() -> Path:
    return _folder("cache", "user_cache_path")


def config_dir() -> Path:
    return _folder("config", "user_config_path")


def log_dir() -> Path:
    return _folder("log", "user_state_path")


def _folder(name: str, place: str) -> Path:
    root = home()
    if root is not None:
        return root / name
    import platformdirs

    own: Path = getattr(platformdirs, place)("potluck", appauthor=False)
    return own / name


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, in one step: it is never half there, and never readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


# --- settings -----------------------------------------------------------------------------------------------


def option(default: Any, read: Callable[[str], Any], env: str, why: str, unit: str = "") -> Any:
    """A field that can also come from the environment variable `env` or from config.toml, read by `read`."""
    return field(default=default, metadata={"env": env, "read": read, "unit": unit, "why": why})


def _flag(text: str) -> bool:
    known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False}
    known["off"] = False
    if text.strip().lower() not in known:
        raise BadInput(f"`{text}` is neither yes nor no")
    return known[text.strip().lower()]


def one_of(*words: str) -> Callable[[str], str]:
    """A reader for a setting that is one of these words."""

    def read(text: str) -> str:
        word = text.strip().lower()
        if word not in words:
            raise BadInput(f"`{text}` is none of {', '.join(words)}")
        return word

    return read


def parse_labels(text: str) -> dict[str, str]:
    """The labels in `room=lab-2,fast=yes`. Keys and values: letters, digits and . _ - /, at most 63."""
    import re

    labels = {}
    for pair in filter(None, text.split(",")):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (equals and re.fullmatch(r"[\w./-]{1,63}", key) and re.fullmatch(r"[\w./-]{0,63}", value)):
            raise BadInput(f"`{pair.strip()}` is not a label: write it KEY=VALUE, like room=lab-2")
        labels[key] = value
    return labels


def _labels(text: str) -> str:
    return text if parse_labels(text) else ""


def _count(text: str) -> int:
    number = parse_number(text)
    if number is None or number != int(number) or not 1 <= number <= 1000:
        raise BadInput(f"`{text}` is not a number of jobs: write one from 1 to 1000")
    return int(number)


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _port(text: str) -> int:
    number = parse_number(text)
    if number is None or number != int(number) or number > 65535:
        raise BadInput(f"`{text}` is not a port: write a number from 0 (any free one) to 65535")
    return int(number)


@dataclass(frozen=True)
class HubSettings:
    """One hub: `potluck host`, [hub] in config.toml."""

    data_dir: Path = field(
        metadata={
            "env": "POTLUCK_DATA_DIR",
            "read": _path,
            "unit": "path",
            "why": "ledger, blobs, hub.json: the only folder to back up",
        }
    )
    database_url: str = option(
        "", str, "POTLUCK_DATABASE", "a PostgreSQL of your own (15 or newer); empty: the embedded one", "URL"
    )
    bind: str = option(
        "0.0.0.0", str, "POTLUCK_BIND", "the address to listen on; 127.0.0.1 for this machine only", "address"
    )
    port: int = option(DEFAULT_PORT, _port, "POTLUCK_PORT", "the TCP port; 0: any free one", "port")
    house_worker: bool = option(
        True, _flag, "POTLUCK_HOUSE_WORKER", "start a trusted worker here, which merges and tastes", "yes/no"
    )
    name: str = option("", str, "POTLUCK_HUB_NAME", "what people see; empty: this machine's name", "text")
    tls: bool | None = option(
        None,
        _flag,
        "POTLUCK_TLS",
        "encrypt with a certificate made at the first start, whose fingerprint is in every link; "
        "unset: yes, unless only this machine can reach the hub",
        "yes/no",
    )
    tunnel: str = option(
        "",
        one_of("", "cloudflared", "ngrok"),
        "POTLUCK_TUNNEL",
        "make the hub reachable from everywhere by this program, if it is installed: cloudflared or ngrok; "
        "the hub itself then listens on this machine only",
        "name",
    )
    log: str = option("", str, "POTLUCK_LOG", "`json` for machines, `debug` for more: json,debug", "words")

    @property
    def listen_on(self) -> str:
        """The address to listen on: behind a tunnel nobody but the tunnel's program has to reach it."""
        return "127.0.0.1" if self.tunnel else self.bind

    @property
    def use_tls(self) -> bool:
        if self.tunnel:
            return False  # the line to the tunnel's program does not leave this machine; from there on it is https
        return self.tls if self.tls is not None else not is_loopback(self.bind)


@dataclass(frozen=True)
class WorkerSettings:
    """One worker: `potluck join`, [worker] in config.toml."""

    name: str = option("", str, "POTLUCK_NAME", "what people see; empty: this machine's name", "text")
    device: str = option("auto", str, "POTLUCK_DEVICE", "auto (the fastest that works), cpu, cuda:0, mps", "device")
    share: float = option(1.0, parse_share, "POTLUCK_SHARE", "how much of the machine training may use", "part")
    threads: int = option(0, parse_size, "POTLUCK_THREADS", "threads of the training child; 0: every core", "threads")
    cache_bytes: int = option(
        5 * 10**9,
        parse_size,
        "POTLUCK_CACHE",
        "files of runs and jobs kept on disk; as much again for each person's environments",
        "bytes",
    )
    accept: str = option(
        "all", one_of("pool", "jobs", "all"), "POTLUCK_ACCEPT", "what the machine works for: pool, jobs or all", "word"
    )
    whose: str = option(
        "hub",
        one_of("me", "hub"),
        "POTLUCK_FROM",
        "whose jobs run here: only my own (me), or everybody's (hub)",
        "word",
    )
    runtime: str = option(
        "container",
        one_of("container", "any"),
        "POTLUCK_RUNTIME",
        "how other people's jobs run here: container (bubblewrap counts), or any (a plain process, too)",
        "word",
    )
    max_tasks: int = option(1, _count, "POTLUCK_MAX_TASKS", "jobs at once", "jobs")
    labels: str = option(
        "", _labels, "POTLUCK_LABELS", "what jobs can ask for with --on: room=lab-2,fast=yes", "KEY=VALUE"
    )
    executor: str = option(
        "",
        one_of("", "podman", "docker", "apptainer", "bubblewrap", "process"),
        "POTLUCK_EXECUTOR",
        "run every job in this one; empty: the best that works here",
        "name",
    )


@dataclass(frozen=True)
class ClientSettings:
    """How commands find and wait for a hub: [client] in config.toml."""

    hub: str = option("", str, "POTLUCK_HUB", "the hub's address, http(s)://HOST:PORT", "URL")
    token_file: str = option(
        "", str, "POTLUCK_TOKEN_FILE", "a file with the credential; POTLUCK_TOKEN holds it itself", "path"
    )
    request_s: float = option(
        30.0, parse_duration, "POTLUCK_REQUEST_TIMEOUT", "a request without an answer failed", "seconds"
    )


SECTIONS: Mapping[str, type] = {"hub": HubSettings, "worker": WorkerSettings, "client": ClientSettings}

OTHER_ENVIRONMENT: Mapping[str, str] = {
    "POTLUCK_HOME": "a folder that holds everything of Potluck's (hub, worker, cache, config, log)",
    "POTLUCK_CONFIG": "another config.toml",
    "POTLUCK_TOKEN": "the credential for POTLUCK_HUB",
    "POTLUCK_FINGERPRINT": "SHA-256 of the hub's own certificate, when it is self-signed",
    "POTLUCK_DATABASE_FILE": "a file with the database URL, so that its password is not in the environment",
    "POTLUCK_INSECURE": "1: talk plain http to a hub on another machine, where everybody on the way can read along",
    "POTLUCK_DEBUG": "1: show a traceback when Potluck itself breaks",
    "POTLUCK_JOIN_LINK": "the link for `potluck join`, where a command line could be read by others",
}


def load(section: type[S], flags: Mapping[str, Any] | None = None) -> S:
    """The settings of `section`. A flag that is None was not given."""
    name = next(key for key, kind in SECTIONS.items() if kind is section)
    path = config_file()
    written = _read_section(path, name, {f.name for f in fields(section)})  # type: ignore[arg-type]
    flags = flags or {}
    values: dict[str, Any] = {}
    for f in fields(section):  # type: ignore[arg-type]
        if flags.get(f.name) is not None:
            values[f.name] = flags[f.name]
        elif (text := _from_environment(f.metadata["env"])) is not None:
            values[f.name] = _read(f, text, f.metadata["env"])
        elif f.name in written:
            values[f.name] = _read(f, str(written[f.name]), f"{path} [{name}] {f.name}")
    if section is HubSettings and values.get("data_dir") is None:
        values["data_dir"] = hub_dir()
    return section(**values)


def config_file() -> Path:
    named = os.environ.get("POTLUCK_CONFIG")
    return Path(named).expanduser() if named else config_dir() / "config.toml"


def _read(f: Field[Any], text: str, origin: str) -> Any:
    try:
        return f.metadata["read"](text)
    except (BadInput, ValueError) as error:
        raise BadInput(f"{origin}: {error}") from None


def _from_environment(env: str) -> str | None:
    """The variable, or the content of the file that its `_FILE` twin names."""
    if (text := os.environ.get(env)) is not None:
        return text
    named = os.environ.get(f"{env}_FILE")
    return _read_secret(Path(named), f"{env}_FILE") if named else None


def _read_secret(path: Path, origin: str) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{origin} names {path}, which cannot be read: {error}") from None


def _read_section(path: Path, name: str, known: set[str]) -> Mapping[str, Any]:
    if not path.is_file():
        if "POTLUCK_CONFIG" in os.environ:
            raise BadInput(f"POTLUCK_CONFIG names {path}, and there is no such file")
        return {}
    import difflib
    import tomllib

    try:
        with path.open("rb") as file:
            tree = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from None
    section = tree.get(name, {})
    if not isinstance(section, dict):
        raise BadInput(f"{path}: `{name}` must be a section, [{name}]")
    for where, keys, allowed in (("there", set(tree), set(SECTIONS)), (f"in [{name}]", set(section), known)):
        for key in sorted(keys - allowed):
            near = difflib.get_close_matches(key, sorted(allowed), n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(sorted(allowed))}"
            raise BadInput(f"{path}: `{key}` is not known {where}: {hint}")
    return section


def is_loopback(address: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


# --- which hub ----------------------------------------------------------------------------------------------


class HubAccess(NamedTuple):
    address: str
    token: str
    fingerprint: str  # of a self-signed certificate; "" when the system's trust decides


@dataclass(frozen=True)
class Profile:
    """What `potluck join` of a member's or viewer's link leaves behind."""

    address: str
    token: str
    fingerprint: str = ""
    role: str = ""
    name: str = ""
    hub: str = ""


def save_profile(profile: Profile) -> Path:
    path = config_dir() / "profile.json"
    write_private(path, json.dumps(profile.__dict__, indent=2) + "\n")
    return path


def load_profile() -> Profile | None:
    written = _read_json(config_dir() / "profile.json")
    if written is None:
        return None
    known = {f.name for f in fields(Profile)}
    return Profile(**{key: str(value) for key, value in written.items() if key in known})


def remember_hub_dir(data_dir: Path) -> None:
    """So that commands on this machine find a hub that keeps its data elsewhere."""
    write_private(config_dir() / "hub_dir", f"{data_dir.resolve()}\n")


def find_hub(address: str = "", token: str = "") -> HubAccess:
    """Address and credential from: arguments, POTLUCK_HUB, the joined profile, a hub on this machine."""
    return find_hub_and_origin(address, token)[0]


def find_hub_and_origin(address: str = "", token: str = "") -> tuple[HubAccess, str]:
    """As `find_hub`, and in words where it was found. `address` may also be a hub's data folder."""
    if address and "://" not in address and Path(address).expanduser().is_dir():
        folder = Path(address).expanduser()
        local = _local_hub(folder)
        if local is None:
            raise NotFound(f"{folder} holds no hub.json: start a hub with `potluck host --data-dir {folder}`")
        return _checked(local[0]._replace(token=token or local[0].token)), local[1]
    client = load(ClientSettings)
    asked = (address or client.hub).rstrip("/")
    secret = token
    if not secret and asked == (client.hub or asked).rstrip("/"):  # a token goes only to the hub it is for
        secret = _from_environment("POTLUCK_TOKEN") or ""
        if not secret and client.token_file:
            secret = _read_secret(Path(client.token_file), "token_file")
    known = [*_saved(), *_local()]
    if asked:
        if "://" not in asked:
            raise BadInput(f"`{asked}` is not a hub's address: write it as http://HOST:PORT or https://HOST:PORT")
        same = next((access for access, _ in known if access.address.rstrip("/") == asked), None)
        fingerprint = os.environ.get("POTLUCK_FINGERPRINT") or (same.fingerprint if same else "")
        found = HubAccess(asked, secret or (same.token if same else ""), fingerprint)
        return _checked(found), "given by --hub" if address else "given by POTLUCK_HUB or config.toml"
    if not known:
        raise NotFound(
            "no hub is known here: start one with `potluck host`, join one with `potluck join LINK`, "
            "or set POTLUCK_HUB and POTLUCK_TOKEN"
        )
    access, origin = known[0]
    return _checked(access._replace(token=secret or access.token)), origin


def _checked(access: HubAccess) -> HubAccess:
    if access.token:
        check_token(access.token)
    return access


def _saved() -> list[tuple[HubAccess, str]]:
    profile = load_profile()
    if profile is None:
        return []
    access = HubAccess(profile.address, profile.token, profile.fingerprint)
    return [(access, f"joined as {profile.role or 'member'}, {config_dir() / 'profile.json'}")]


def _local() -> list[tuple[HubAccess, str]]:
    pointer = config_dir() / "hub_dir"
    folders = [Path(pointer.read_text(encoding="utf-8").strip())] if pointer.is_file() else []
    folders += [Path(os.environ["POTLUCK_DATA_DIR"])] if os.environ.get("POTLUCK_DATA_DIR") else []
    return [found for folder in [*folders, hub_dir()] if (found := _local_hub(folder))]


def _local_hub(data_dir: Path) -> tuple[HubAccess, str] | None:
    written = _read_json(data_dir / "hub.json")
    if not written or not written.get("address"):
        return None
    access = HubAccess(*(str(written.get(key) or "") for key in ("address", "admin_token", "fingerprint")))
    return access, f"the hub on this machine, {data_dir / 'hub.json'}"


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({error}): delete it and join or host again") from None
    if not isinstance(tree, dict):
        raise BadInput(f"{path} is not what Potluck wrote: delete it and join or host again")
    return tree
