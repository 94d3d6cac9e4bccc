"""How is one key of potluck.yaml described, and its value read?

What a job's keys are is told in job.py, a gang's in gangspec.py. Every complaint begins with the key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from potluck.domain.pool import nearest
from potluck.errors import BadInput, UnknownSetting


class Key(NamedTuple):
    """A key of potluck.yaml. `schema` is its JSON Schema without the description."""

    schema: Mapping[str, Any]
    help: str


TEXT: Final = {"type": "string"}
AMOUNT: Final = {"type": ["string", "number"]}
TEXTS: Final = {"type": "object", "additionalProperties": AMOUNT}


def described(keys: Mapping[str, Key]) -> dict[str, dict[str, Any]]:
    """The `properties` of a JSON Schema."""
    return {name: {"description": key.help, **key.schema} for name, key in keys.items()}


def check_keys(
    values: Any, known: Mapping[str, Key], where: str, elsewhere: Mapping[str, Iterable[str]] | None = None
) -> None:
    """UnknownSetting for a key that is not known; `elsewhere`: where its place would be, by the key above it."""
    if not isinstance(values, Mapping):
        raise BadInput(f"{where.rstrip(': ') or 'a job'} is {short(values)}: it is made of keys and values")
    for key in values:
        if key in known:
            continue
        for above, names in (elsewhere or {}).items():
            if key in names:
                raise UnknownSetting(f"no key `{key}` here: it belongs below {above}")
        raise UnknownSetting(f"{where}no key `{str(key)[:80]}`{nearest(str(key), known)}")


def read_text(key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadInput(f"{key} is {short(value)}: it is text; put it in quotes")
    return value if isinstance(value, str) else f"{value}"


def read_texts(key: str, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise BadInput(f"{key} is {short(value)}: it is made of names and values, like {{NAME: value}}")
    return {read_text(key, name): read_text(f"{key}: {name}", text) for name, text in value.items()}


def read_list(key: str, value: Any) -> list[str]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise BadInput(f"{key} is {short(value)}: it is a list, like [HF_TOKEN]")
    return [read_text(key, word) for word in value]


def read_number(key: str, value: Any, *, like: int) -> int:
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,9}", value.strip(), re.ASCII):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadInput(f"{key} is {short(value)}: it is a whole number, like {like}")
    return value


def read_switch(key: str, value: Any) -> bool:
    words = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}
    if isinstance(value, str):
        value = words.get(value.strip().lower(), value)
    if not isinstance(value, bool):
        raise BadInput(f"{key} is {short(value)}: it is yes or no")
    return value


def short(value: Any) -> str:
    return f"{value!r:.80}"
