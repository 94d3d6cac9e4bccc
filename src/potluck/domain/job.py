"""What is a job: which command, with what, where may it run, and how long?

    potluck.yaml, flags  ──from_mapping──►  JobSpec  ──check──►  the hub stores it
                         ◄──to_mapping───

`potluck.yaml` has the keys that people write (`timeout: 2h`); the record has units in its names (`timeout_s`). Both say
the same, and `json_schema()` tells it to editors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

from potluck.domain.gangspec import GANG_KEYS, GANG_USUAL, check_gang, gang_to_mapping, read_gang
from potluck.domain.gangspec import GangSpec as GangSpec  # part of a job: others find it here
from potluck.domain.keys import (
    AMOUNT,
    TEXT,
    TEXTS,
    Key,
    check_keys,
    described,
    read_list,
    read_number,
    read_switch,
    read_text,
    read_texts,
    short,
)
from potluck.domain.names import MAX_NAME, clean_name
from potluck.domain.quantity import parse_duration, say_duration
from potluck.domain.tree import check_path
from potluck.errors import BadInput

STATES = ("queued", "placed", "preparing", "running", "succeeded", "failed", "cancelled", "lost")
ENDED = frozenset({"succeeded", "failed", "cancelled", "lost"})
"""A job in one of these stays there, unless somebody retries it."""


@dataclass(frozen=True)
class Resources:
    """What a job asks for, as people write it: `gpu: 24GB..:2`, `cpu: 4`, `memory: 8GB`. domain/resources.py reads it.

    Empty (or "0" for gpu) means: no demand. What a job asks for is also what it gets and its limit.
    """

    gpu: str = "0"  # COUNT | VRAM | VRAM:COUNT | MODEL[:VRAM][:COUNT]; each a number or a range like 24GB..40GB, 1..
    cpu: str = ""  # cores, a number or a range, fractions allowed
    memory: str = ""  # bytes
    disk: str = ""  # bytes that the job may write on the machine
    labels: dict[str, str] = field(default_factory=dict)  # the worker's must be equal
    os: str = ""  # linux | macos | windows
    arch: str = ""  # x86_64 | arm64


@dataclass(frozen=True)
class JobSpec:
    """A job as `potluck.yaml`, the command line and the API say it. Times in seconds."""

    command: list[str]  # argv; a string in potluck.yaml becomes ["/bin/sh", "-c", string]
    name: str = ""
    env: dict[str, str] = field(default_factory=dict)
    secrets: list[str] = field(default_factory=list)  # names; the values come with the lease
    resources: Resources = field(default_factory=Resources)
    image: str = ""  # of a container; empty: the machine's own Python, or `requirements`
    requirements: str = ""  # a path in the project: requirements.txt, or pyproject.toml (with uv.lock beside it)
    python: str = ""  # "3.11": the interpreter of an environment that is built; empty: the machine's
    priority: int = 0  # -100 … 100, higher first
    retries: int = 2  # how often it may be placed again
    retry_on: str = "lost"  # lost: when its worker was lost | any: also when the command failed
    timeout_s: float | None = None  # wall clock of one attempt
    grace_s: float = 30.0  # between SIGTERM and SIGKILL
    patience_s: float = 120.0  # how long its worker may be silent (a cut network) before the job counts as lost
    procs: int = 1  # processes on the machine, by torchrun
    network: bool = True
    gang: GangSpec | None = None  # several machines; one member each


# --- what is allowed ------------------------------------------------------------------------------------------------

MOST_WORDS: Final = 1_000
MOST_COMMAND: Final = 100_000  # characters: a kernel takes 128 KB in one argument
MOST_VARIABLES: Final = 200
MOST_VARIABLE: Final = 32_000  # characters of one value
MOST_SECRETS: Final = 50
VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)
"""The name of a variable, and of a secret, which becomes one."""
TIMES: Final = {  # key: the shortest and the longest, in seconds
    "timeout": (1.0, 366 * 86400.0),
    "grace": (0.0, 3600.0),
    "patience": (10.0, 86400.0),
}
NUMBERS: Final = {"priority": (-100, 100), "retries": (0, 100), "procs": (1, 64)}
RETRY_ON: Final = ("lost", "any")
SHELL: Final = ["/bin/sh", "-c"]

_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_IMAGE: Final = re.compile(
    rf"(?:[A-Za-z0-9][A-Za-z0-9.-]*(?::\d{{1,5}})?/)?{_PART}(?:/{_PART})*(?::[A-Za-z0-9_][\w.-]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?",
    re.ASCII,
)
_TRANSPORTS: Final = re.compile(
    r"(dir|oci|oci-archive|docker-archive|docker-daemon|containers-storage|ostree|sif|tarball):"
)
"""With these in front a container runtime would read the machine's own files."""
_PYTHON: Final = re.compile(r"3\.\d{1,2}(\.\d{1,2})?", re.ASCII)


def check(spec: JobSpec) -> None:
    """Refuse what could not run anywhere. BadInput begins with the key, says what is wrong with it and what to write."""
    from potluck.domain.resources import read  # it knows Resources

    _check_command(spec.command)
    if spec.name and (clean_name(spec.name, "") != spec.name or spec.name == "last"):
        raise BadInput(f"name is {spec.name[:80]!r}: one line of at most {MAX_NAME} characters, and not `last`")
    _check_env(spec.env, spec.secrets)
    read(spec.resources, image=spec.image)
    if spec.image and (not _IMAGE.fullmatch(spec.image) or len(spec.image) > 300 or _TRANSPORTS.match(spec.image)):
        raise BadInput(f"image is {spec.image[:80]!r}: write it like python:3.12-slim or ghcr.io/someone/thing:1.0")
    if spec.requirements and (why := check_path(spec.requirements)):
        raise BadInput(f"requirements is {spec.requirements[:80]!r}, which {why}: name a file of the project")
    if spec.image and spec.requirements:
        raise BadInput("image and requirements exclude one another: install the requirements in the image, or drop it")
    if spec.python and not _PYTHON.fullmatch(spec.python):
        raise BadInput(f"python is {spec.python[:80]!r}: write a version like 3.12")
    for name, (least, most) in NUMBERS.items():
        if not least <= (number := getattr(spec, name)) <= most:
            raise BadInput(f"{name} is {number}: it must lie between {least} and {most}")
    if spec.retry_on not in RETRY_ON:
        raise BadInput(f"retry_on is {spec.retry_on[:80]!r}: it must be one of {', '.join(RETRY_ON)}")
    for name, (shortest, longest) in TIMES.items():
        seconds = getattr(spec, f"{name}_s")
        if seconds is not None and not shortest <= seconds <= longest:  # nor is NaN
            limits = f"between {shortest:g} s and {say_duration(longest)}"
            raise BadInput(f"{name} is {seconds:g} s: it must lie {limits}; write it like 90s, 10m, 2h or 1d")
    if spec.gang is not None:
        check_gang(spec.gang, procs=spec.procs, network=spec.network)


def _check_command(command: Sequence[str]) -> None:
    if not command or not command[0].strip() or (command[:-1] == SHELL and not command[-1].strip()):
        raise BadInput("there is no command: say what to run, like python train.py")
    if len(command) > MOST_WORDS or sum(map(len, command)) > MOST_COMMAND:
        raise BadInput(f"command is longer than {MOST_COMMAND:,} characters: put it in a script of the project")
    if any("\0" in word for word in command) or not _is_text("".join(command)):
        raise BadInput("command has a character that no command can have: a zero byte, or half of one")


def _check_env(env: Mapping[str, str], secrets: Sequence[str]) -> None:
    if len(env) > MOST_VARIABLES:
        raise BadInput(f"env has {len(env)} variables: at most {MOST_VARIABLES}; put more in a file of the project")
    for name, value in env.items():
        _check_variable("env", name)
        if len(value) > MOST_VARIABLE:
            raise BadInput(f"env: {name} is longer than {MOST_VARIABLE:,} characters: put it in a file of the project")
        if any(c != "\t" and (c < " " or "\x7f" <= c <= "\x9f") for c in value) or not _is_text(value):
            raise BadInput(f"env: the value of {name} has control characters: it is one line of text")
    if len(secrets) > MOST_SECRETS:
        raise BadInput(f"secrets are {len(secrets)}: at most {MOST_SECRETS}")
    for name in secrets:
        _check_variable("secrets", name)
        if name in env:
            raise BadInput(f"secrets: {name} is in env too: leave it out there, its value comes from the secret")
        if secrets.count(name) > 1:
            raise BadInput(f"secrets: {name} is there twice")


def _check_variable(key: str, name: str) -> None:
    if not VARIABLE.fullmatch(name):
        raise BadInput(f"{key}: {name[:80]!r} is no name of a variable: letters, digits and _, no digit in front")
    if name.upper().startswith("POTLUCK_"):
        raise BadInput(f"{key}: {name} begins with POTLUCK_, as those that Potluck itself sets: choose another name")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


# --- potluck.yaml ---------------------------------------------------------------------------------------------------


RESOURCE_KEYS: Final[Mapping[str, Key]] = {
    "gpu": Key(
        {**AMOUNT, "default": "0", "examples": [1, "24GB..", "24GB..:2", "6GB", "A100:2", "1..4"]},
        "GPUs. How many (2, 1..4), how large (24GB.. is a whole GPU of 24 GB or more, 6GB is a part of one that others "
        "may share), which model (A100), or several of these with a colon between: A100:40GB..:2.",
    ),
    "cpu": Key(
        {**AMOUNT, "examples": [4, 0.5, "2..8"]},
        "Cores that are reserved for the job, also its limit. 2..8: eight if they are free, else at least two.",
    ),
    "memory": Key({**AMOUNT, "examples": ["8GB"]}, "Memory that is reserved for the job, also its limit."),
    "disk": Key({**AMOUNT, "examples": ["20GB"]}, "Disk that the job may fill, also its limit."),
    "labels": Key({**TEXTS, "examples": [{"room": "lab-2"}]}, "Only machines that have all these labels."),
    "os": Key({**TEXT, "enum": ["linux", "macos", "windows"]}, "Only machines with this operating system."),
    "arch": Key({**TEXT, "enum": ["x86_64", "arm64"]}, "Only machines with this kind of processor."),
}

KEYS: Final[Mapping[str, Key]] = {
    "command": Key(
        {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": AMOUNT, "minItems": 1}]},
        "What to run in the project's folder. A text is a line for the shell; a list of words goes without one.",
    ),
    "name": Key({**TEXT, "maxLength": MAX_NAME}, "What the job is called. Without it: as its folder."),
    "env": Key(
        {
            **TEXTS,
            "propertyNames": {"pattern": f"^{VARIABLE.pattern}$"},
            "maxProperties": MOST_VARIABLES,
            "examples": [{"LEARNING_RATE": "0.003"}],
        },
        "Environment variables. Everybody who may see the job sees them; what is secret goes into `secrets`.",
    ),
    "secrets": Key(
        {"type": "array", "items": {"type": "string", "pattern": f"^{VARIABLE.pattern}$"}, "maxItems": MOST_SECRETS},
        "Names of secrets (`potluck secret set NAME`) that the job gets as environment variables.",
    ),
    "resources": Key({"type": "object"}, "What the job needs of a machine. Nothing: any machine will do."),
    "image": Key(
        {**TEXT, "examples": ["python:3.12-slim"]},
        "A container image to run in. Without it: the machine's own Python, or an environment built of `requirements`.",
    ),
    "requirements": Key(
        {**TEXT, "examples": ["requirements.txt", "pyproject.toml"]},
        "A file of the project. What it asks for is installed once and kept; a uv.lock beside pyproject.toml is obeyed.",
    ),
    "python": Key({**AMOUNT, "examples": ["3.12"]}, "The version of Python of an environment that is built."),
    "priority": Key({"type": "integer", "minimum": -100, "maximum": 100, "default": 0}, "Higher goes first."),
    "retries": Key(
        {"type": "integer", "minimum": 0, "maximum": 100, "default": 2},
        "How often the job may be placed again after its machine was lost (or it failed, see retry_on).",
    ),
    "retry_on": Key(
        {**TEXT, "enum": list(RETRY_ON), "default": "lost"},
        "lost: placed again when its machine was lost. any: also when the command failed.",
    ),
    "timeout": Key(
        {**AMOUNT, "examples": ["2h", "90m"]},
        "How long one attempt may run. Jobs with a timeout can be fitted in before larger ones.",
    ),
    "grace": Key(
        {**AMOUNT, "default": "30s"}, "How long the job has to write a checkpoint between SIGTERM and SIGKILL."
    ),
    "patience": Key(
        {**AMOUNT, "default": "2m"},
        "How long its machine may be cut off from the hub before the job is started elsewhere.",
    ),
    "procs": Key(
        {"type": "integer", "minimum": 1, "maximum": 64, "default": 1},
        "Processes on the machine; more than one are started by torchrun.",
    ),
    "network": Key({"type": "boolean", "default": True}, "Whether the job may use the network."),
    "gang": Key(
        {"type": ["string", "integer", "object"], "examples": ["2..8", {"members": "2..8", "batch": 512}]},
        "Several machines that train one model together, each with the share that it can carry (docs/gangs.md). "
        "A number or a range of machines, or a mapping. What the job asks for, it asks for on each of them.",
    ),
}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of potluck.yaml, with the descriptions that editors show."""
    properties = described(KEYS)
    properties["resources"] |= {"properties": described(RESOURCE_KEYS), "additionalProperties": False}
    properties["gang"] |= {
        "properties": described(GANG_KEYS),
        "required": ["members"],
        "additionalProperties": False,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "potluck.yaml",
        "description": "A Potluck job: what `potluck run` runs, and what it needs.",
        "type": "object",
        "properties": properties,
        "required": ["command"],
        "additionalProperties": False,
    }


def from_mapping(values: Mapping[str, Any]) -> JobSpec:
    """The job that these keys and values of a potluck.yaml describe. Strict; BadInput says which key is wrong, and why."""
    check_keys(values, KEYS, "", {"resources": RESOURCE_KEYS, "gang": GANG_KEYS})
    given: dict[str, Any] = {}
    for key, value in values.items():
        if key in TIMES:
            given[f"{key}_s"] = _read_time(key, value)
        else:
            given[key] = _READERS[key](key, value)
    spec = JobSpec(**{"command": [], **(GANG_USUAL if given.get("gang") else {}), **given})
    check(spec)
    return spec


def to_mapping(spec: JobSpec) -> dict[str, Any]:
    """`spec` as a potluck.yaml says it, without what is as it would be anyway. `from_mapping` reads it back equal."""
    shell = len(spec.command) == 3 and spec.command[:2] == SHELL
    values: dict[str, Any] = {"command": spec.command[2] if shell else list(spec.command)}
    usual = JobSpec(spec.command, **(GANG_USUAL if spec.gang else {}))
    for one in fields(spec):
        value = getattr(spec, one.name)
        if one.name in ("command", "resources", "gang") or value == getattr(usual, one.name):
            continue
        values[one.name.removesuffix("_s")] = value.copy() if isinstance(value, dict | list) else value
    plain = Resources()
    resources = {
        one.name: getattr(spec.resources, one.name)
        for one in fields(plain)
        if getattr(spec.resources, one.name) != getattr(plain, one.name)
    }
    gang = {"gang": gang_to_mapping(spec.gang)} if spec.gang is not None else {}
    return values | ({"resources": resources} if resources else {}) | gang


def _read_command(key: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return [*SHELL, value] if value.strip() else []
    if not isinstance(value, Sequence):
        raise BadInput(f"{key} is {short(value)}: it is a line of text or a list of words")
    return [read_text(key, word) for word in value]


def _read_time(key: str, value: Any) -> float:
    try:
        return parse_duration(read_text(key, value))
    except BadInput as error:
        raise BadInput(f"{key}: {error}") from None


def _read_resources(key: str, value: Any) -> Resources:
    check_keys(value, RESOURCE_KEYS, f"{key}: ")
    given: dict[str, Any] = {}
    for name, text in value.items():
        reads = read_texts if name == "labels" else read_text
        given[name] = reads(f"{key}: {name}", text)
    return Resources(**given)


def _read_number(key: str, value: Any) -> int:
    return read_number(key, value, like=max(1, NUMBERS[key][0]))


_READERS: Final = {
    "command": _read_command,
    "env": read_texts,
    "secrets": read_list,
    "resources": _read_resources,
    "network": read_switch,
    "gang": read_gang,
    **dict.fromkeys(NUMBERS, _read_number),
    **dict.fromkeys(("name", "image", "requirements", "python", "retry_on"), read_text),
}
