"""Which options do several commands share, and how are their values read?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from potluck import settings
from potluck.errors import BadInput, NotFound

if TYPE_CHECKING:
    from potluck.client import Hub
    from potluck.protocol import RunView

F = TypeVar("F", bound=Callable[..., Any])


class Value(click.ParamType[Any]):
    """A value that one of the `parse_*` functions of settings.py reads."""

    def __init__(self, name: str, read: Callable[[str], Any]) -> None:
        self.name = name
        self.read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self.read(value)
        except BadInput as error:
            self.fail(str(error), param, ctx)


def read_samples(text: str) -> int:
    """A count of samples: `4096`, `50k`, `2M`."""
    try:
        count = settings.parse_size(text.replace(",", "").replace("_", ""))
    except BadInput:
        raise BadInput(f"`{text}` is not a number of samples: write it like 4096, 50k or 2M") from None
    if count < 1:
        raise BadInput("at least one sample is needed")
    return count


DURATION = Value("duration", settings.parse_duration)
SHARE = Value("share", settings.parse_share)
SAMPLES = Value("samples", read_samples)


def hub_options(command: F) -> F:
    """`--hub` and `--token-file`; the command gets a function `connect` that opens the hub they name."""

    @click.option("--hub", "address", metavar="ADDRESS", help="http(s)://HOST:PORT, or the hub's data folder.")
    @click.option(
        "--token-file",
        type=click.Path(dir_okay=False),
        metavar="FILE",
        help="A file with the credential (never the credential itself).",
    )
    @functools.wraps(command)
    def with_hub(*args: Any, address: str | None, token_file: str | None, **kwargs: Any) -> Any:
        opener = functools.partial(connect, address or "", token_file or "")
        return command(*args, connect=opener, **kwargs)

    return with_hub  # type: ignore[return-value]


def connect(address: str = "", token_file: str = "") -> Hub:
    """A client for the hub that the options, the environment, the profile or this machine's own hub name."""
    access = settings.find_hub(address, read_token(token_file))
    from potluck.client import Hub

    timeout_s = settings.load(settings.ClientSettings).request_s
    return Hub(access.address, access.token, access.fingerprint, timeout_s=timeout_s)


def read_token(path: str) -> str:
    if not path:
        return ""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--token-file {path} cannot be read: {error}") from None


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def timeout_option(what: str) -> Callable[[F], F]:
    words = f"{what} after so long (90s, 10m), with exit code 124."
    return click.option("--timeout", type=DURATION, metavar="TIME", help=words)


def find_run(hub: Hub, ref: str) -> RunView:
    """The run that `ref` names: an id or its beginning, a name, or `last` for the newest."""
    return choose_run(hub.runs(), ref)


def choose_run(runs: Iterable[RunView], ref: str) -> RunView:
    newest_first = sorted(runs, key=lambda run: run.created_at, reverse=True)
    if not newest_first:
        raise NotFound("this hub has no runs yet: start one with `potluck train RECIPE --data SOURCE`")
    if ref == "last":
        return newest_first[0]
    exact = [run for run in newest_first if ref in (run.id, run.name)]
    if exact:
        return exact[0]  # of several with one name, the newest
    found = [run for run in newest_first if ref and (run.id.startswith(ref) or run.name.startswith(ref))]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(f"{run.name} ({run.id})" for run in found[:6])
        raise BadInput(f"`{ref}` is the beginning of {len(found)} runs: {names}. Write a little more of it.")
    raise NotFound(f"no run `{ref}`{_nearest_run(newest_first, ref)}")


def _nearest_run(runs: list[RunView], ref: str) -> str:
    import difflib

    near = difflib.get_close_matches(ref, [run.name for run in runs], n=1, cutoff=0.5)
    return f": did you mean `{near[0]}`?" if near else ": `potluck ps` lists them"


def key_values(pairs: Iterable[str]) -> dict[str, Any]:
    """`lr=1e-3` pairs as a dictionary. A number, true/false or null is read as such; the rest is text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise BadInput(f"`{pair}` is not KEY=VALUE: write it like lr=0.001")
        found[key.strip()] = _scalar(value.strip())
    return found


def _scalar(text: str) -> Any:
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for read in (int, float):
        try:
            number = read(text)
        except ValueError:
            continue
        return number if abs(number) < float("inf") else text
    return text
