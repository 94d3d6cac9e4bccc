"""Which options do several commands share, and how are their values read?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from potluck import settings
from potluck.errors import BadInput, NotFound

if TYPE_CHECKING:
    from potluck.client import Hub
    from potluck.protocol import GangView, JobView, RunView, WorkerView

F = TypeVar("F", bound=Callable[..., Any])


class Named(Protocol):
    """What a run of the pool, a job and a gang have in common."""

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def created_at(self) -> str: ...


class Owned(Named, Protocol):
    @property
    def mine(self) -> bool: ...


N = TypeVar("N", bound=Named)
M = TypeVar("M", bound=Owned)
MANY_JOBS = 500  # as many of the newest are searched by name here; the hub knows all of them


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
    """The run of the pool that `ref` names: an id or its beginning, a name, or `last` for the newest."""
    try:
        return choose_run(hub.runs(), ref)
    except NotFound:
        if ref != "last" and (job := _exactly(hub.jobs(MANY_JOBS), ref)):
            raise BadInput(f"`{ref}` is a job, and this is for runs of the pool: `potluck show {job.id}`") from None
        raise


def find_job(hub: Hub, ref: str) -> JobView:
    """The job that `ref` names, with all that the hub tells of it; `last` is the newest job."""
    try:
        return hub.job(ref)
    except NotFound:
        if run := _exactly(hub.runs(), ref):
            raise BadInput(f"`{ref}` is a run of the pool, and this is for jobs: `potluck show {run.id}`") from None
        if gang := _exactly(gangs_of(hub), ref):
            raise BadInput(
                f"`{ref}` is a gang, and this is for jobs: `potluck show {gang.id}` lists its members, which are jobs"
            ) from None
        jobs = hub.jobs(MANY_JOBS)
        if not jobs:
            raise NotFound("this hub has no jobs yet: submit one with `potluck run -- COMMAND`") from None
        return hub.job(choose_run(jobs, ref).id)  # also by the beginning of its name; or says which is nearest


def gangs_of(hub: Hub, limit: int = MANY_JOBS) -> list[GangView]:
    """The newest gangs; none at a hub that is older than gangs."""
    try:
        return hub.gangs(limit)
    except NotFound:
        return []


def find_gang(hub: Hub, ref: str) -> GangView:
    """The gang that `ref` names; `last` is the newest one."""
    try:
        return hub.gang(ref)
    except NotFound:
        if job := _exactly(hub.jobs(MANY_JOBS), ref):
            raise BadInput(f"`{ref}` is a job, and this is for gangs: `potluck show {job.id}`") from None
        gangs = gangs_of(hub)
        if not gangs:
            raise NotFound(
                "this hub has no gangs yet: start one with `potluck run --gang 2..8 -- python train.py`"
            ) from None
        return hub.gang(choose_run(gangs, ref).id)


def find_work(hub: Hub, ref: str) -> JobView | GangView:
    """The job or the gang that `ref` names; `last` is the newest of both."""
    try:
        return _job_or_gang(hub, ref)
    except NotFound:
        return find_job(hub, ref)


def find_either(hub: Hub, ref: str) -> RunView | JobView | GangView:
    """The run of the pool, the job or the gang that `ref` names; `last` is the newest, other people's work aside."""
    from potluck.protocol import GangView, JobView

    runs = hub.runs()
    if ref != "last":
        if run := _exactly(sorted(runs, key=lambda run: run.created_at, reverse=True), ref):
            return run
        with suppress(NotFound):
            return _job_or_gang(hub, ref)
    jobs = [job for job in hub.jobs(MANY_JOBS) if not job.gang]
    gangs = gangs_of(hub)
    known: list[RunView | JobView | GangView] = [*runs, *_mine(jobs), *_mine(gangs)]
    found = choose_run(known, ref)
    if isinstance(found, GangView):
        return hub.gang(found.id)
    return hub.job(found.id) if isinstance(found, JobView) else found


def _mine(found: list[M]) -> list[M]:
    return [one for one in found if one.mine] or found


def _job_or_gang(hub: Hub, ref: str) -> JobView | GangView:
    """What the hub finds. By id, then by name, then by the front of an id; of the same rank the newer one."""
    from potluck.protocol import GangView, JobView

    found: list[JobView | GangView] = []
    asked: list[Callable[[str], JobView | GangView]] = [hub.gang, hub.job]
    for ask in asked:
        with suppress(NotFound):
            found.append(ask(ref))
    if not found:
        raise NotFound(f"no job or gang `{ref}`")
    if len(found) == 1:
        return found[0]
    gang, job = found
    assert isinstance(gang, GangView) and isinstance(job, JobView)
    ranks = [2 if ref == one.id else 1 if ref in (one.name, "last") else 0 for one in found]
    if job.gang == gang.id and ranks[1] < 2 and ref != job.name:
        return gang  # a member's id may begin as its gang's
    if ranks == [0, 0]:
        raise BadInput(f"`{ref}` could be the gang {gang.id} or the job {job.id}: write a little more of it")
    if ranks[0] == ranks[1]:
        return gang if gang.created_at >= job.created_at else job
    return gang if ranks[0] > ranks[1] else job


def find_worker(hub: Hub, ref: str) -> WorkerView:
    """The worker that `ref` names: an id or its beginning, or a name."""
    workers = hub.workers()
    found = [w for w in workers if ref in (w.id, w.name)] or [w for w in workers if ref and w.id.startswith(ref)]
    if not found:
        raise NotFound(f"no worker `{ref}`: `potluck workers` lists them")
    if len(found) > 1:
        names = ", ".join(f"{worker.name} ({worker.id})" for worker in found[:6])
        raise BadInput(f"`{ref}` names {len(found)} workers: {names}. Write the whole id.")
    return found[0]


def choose_run(runs: Iterable[N], ref: str) -> N:
    newest_first = sorted(runs, key=lambda run: run.created_at, reverse=True)
    if not newest_first:
        raise NotFound(
            "this hub has no runs yet: start one with `potluck train RECIPE --data SOURCE` or `potluck run -- COMMAND`"
        )
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


def _exactly(runs: Iterable[N], ref: str) -> N | None:
    return next((run for run in runs if ref in (run.id, run.name)), None)


def _nearest_run(runs: Iterable[Named], ref: str) -> str:
    import difflib

    near = difflib.get_close_matches(ref, [word for run in runs for word in (run.name, run.id)], n=1, cutoff=0.5)
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


def text_pairs(pairs: Iterable[str], example: str) -> dict[str, str]:
    """`K=V` pairs as they are written: every value is text."""
    found: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise BadInput(f"`{pair}` is not K=V: write it like {example}")
        found[key] = value
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
