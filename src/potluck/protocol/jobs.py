"""What do people, hub and workers say to one another about jobs?

    person  ──►  hub      `JobRequest` in, `JobView` out
    worker  ◄─►  hub      one long-poll, `POST /orders`: where the worker stands; what it shall do

The hub places a job by writing a lease for a worker. The lease reaches it in the answer to its next (mostly: its waiting)
`POST /orders`. That request is the sign of life of the worker's jobs, and the channel by which they are ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from potluck.domain.job import JobSpec
from potluck.protocol.gangs import Door, Knock, Meeting, MeetOrder, Membership, Reached
from potluck.protocol.pool import Blob, Json

# --- files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TreeFile:
    path: str  # relative, with /, no empty part, no . or ..
    blob: Blob
    executable: bool = False


@dataclass(frozen=True)
class Tree:
    """A folder: a project, what a job left behind, a checkpoint. Itself a blob of JSON, so one hash names all of it."""

    files: list[TreeFile] = field(default_factory=list)  # sorted by path, each path once
    skipped: list[str] = field(default_factory=list)  # what was left out and why: "data/link: a symbolic link"

    @property
    def size_bytes(self) -> int:
        return sum(file.blob.size_bytes for file in self.files)


@dataclass(frozen=True)
class GitState:
    """Where the code came from. `diff` is a blob with the changes that were not committed."""

    commit: str
    branch: str = ""
    dirty: bool = False
    diff: Blob | None = None
    remote: str = ""  # without credentials


# --- asking ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JobRequest:
    spec: JobSpec
    project: Blob  # of a Tree
    git: GitState | None = None


@dataclass(frozen=True)
class Usage:
    """What an attempt used of its machine."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    max_memory_bytes: int = 0


@dataclass(frozen=True)
class AttemptView:
    number: int  # from 1
    worker: str
    worker_id: str
    state: str  # placed | preparing | running | succeeded | failed | cancelled | lost
    reason: str
    executor: str
    environment: dict[str, Json]  # python, packages, image digest, torch: what really ran
    placed_at: str
    started_at: str | None  # the command's process
    ended_at: str | None
    exit_code: int | None
    signal: str  # "SIGKILL"; empty: it left by itself
    usage: Usage
    log_bytes: int
    outputs: Blob | None  # of a Tree
    checkpoint: Blob | None  # of a Tree, the newest


@dataclass(frozen=True)
class JobView:
    """`spec`, `project`, `git` and `attempts` are only for the job's owner and admins; others see that it is there."""

    id: str
    name: str
    owner: str  # the person's name
    state: str
    reason: str
    mine: bool  # the caller is its owner or an admin
    priority: int
    needs: str  # "2 GPUs of 24 GB, 4 cores, 8 GB": one line
    created_at: str
    started_at: str | None
    ended_at: str | None
    worker: str  # where it is, or was last
    exit_code: int | None
    retries_left: int
    spec: JobSpec | None = None
    project: Blob | None = None
    git: GitState | None = None
    attempts: list[AttemptView] = field(default_factory=list)  # oldest first
    gang: str = ""  # the gang that it is a member of
    member: int = 0  # which one, from 1


@dataclass(frozen=True)
class Near:
    """A machine that does not take the job, and what is missing."""

    worker: str
    lacks: str  # "has 16 GB of GPU memory free, the job wants 24 GB"


@dataclass(frozen=True)
class Outlook:
    """What the placement says of a job that waits, or of one that was not even submitted (--dry-run)."""

    job: str
    position: int  # in the queue, from 1; 0: it does not wait
    would_run_on: str  # the worker that takes it now; empty: none
    reason: str  # one sentence
    advice: str = ""  # what would help
    near: list[Near] = field(default_factory=list)


@dataclass(frozen=True)
class QueueMove:
    job: str
    before: str = ""  # another job; empty: to the front


@dataclass(frozen=True)
class Point:
    """Figures and pictures of one step, from `potluck.log` or TensorBoard files."""

    step: int
    at: float  # seconds since 1970, the worker's clock
    values: dict[str, float] = field(default_factory=dict)
    images: dict[str, Blob] = field(default_factory=dict)  # PNG
    seq: int = 0  # of this attempt, from 0: a point sent again is known by it
    attempt: int = 0  # filled in by the hub


@dataclass(frozen=True)
class LogPiece:
    """A part of an attempt's output. Ask again from `next_offset`."""

    attempt: int
    offset: int  # where `text` begins; later than asked for if the front was rotated away
    next_offset: int
    text: str  # UTF-8; bytes that are not are replaced. Control sequences are in it: whoever shows it cleans it
    over: bool  # the attempt has ended and this is its end


@dataclass(frozen=True)
class SecretView:
    name: str
    changed_at: str


@dataclass(frozen=True)
class SecretValue:
    value: str = field(repr=False)


@dataclass(frozen=True)
class Quota:
    """What one person may use. None: no limit."""

    owner: str  # a member's name or id
    running: int | None = None  # jobs at once
    gpu_hours: float | None = None  # in the last seven days
    cpu_hours: float | None = None


@dataclass(frozen=True)
class Missing:
    hashes: list[str]


# --- the worker's side ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GpuNow:
    index: int
    name: str
    memory_bytes: int
    free_bytes: int
    busy: float = 0.0  # 0 … 1
    temperature_c: float | None = None


@dataclass(frozen=True)
class MachineNow:
    """What the machine has to offer to jobs, and what is free of it at this moment."""

    cpu_cores: int = 0
    memory_bytes: int = 0
    memory_free_bytes: int = 0
    disk_free_bytes: int = 0
    load: float = 0.0  # processes that want a core
    gpus: list[GpuNow] = field(default_factory=list)
    os: str = ""  # linux | macos | windows
    arch: str = ""  # x86_64 | arm64
    engines: list[str] = field(
        default_factory=list
    )  # of gangs, in the machine's own Python: plain (any torch), torchft


@dataclass(frozen=True)
class Rules:
    """What the machine's owner allows. The worker itself enforces it too."""

    accept: str = "all"  # pool | jobs | all
    whose: str = "hub"  # me: only the owner's jobs | hub: everybody's
    runtime: str = "container"  # container: foreign code only in one (bubblewrap counts) | any: as a plain process too
    max_tasks: int = 1  # jobs at once


@dataclass(frozen=True)
class OrdersRequest:
    agent: str  # a new random id at each start of the agent
    holding: list[str] = field(default_factory=list)  # leases of jobs that are here, until their end was answered
    now: MachineNow = field(default_factory=MachineNow)
    rules: Rules = field(default_factory=Rules)
    executors: list[str] = field(default_factory=list)  # that work here: podman, docker, apptainer, bubblewrap, process
    labels: dict[str, str] = field(default_factory=dict)
    door: Door | None = None  # where other workers can knock; None: this worker takes part in no gang
    reached: list[Reached] = field(default_factory=list)  # what came of the knocks that the last answer asked for
    meetings: list[Meeting] = field(default_factory=list)  # of the gang members here: the meeting place that they know


@dataclass(frozen=True)
class JobLease:
    """One worker's right to one attempt of a job. It lapses `ttl_s` after the last `POST /orders` that arrived."""

    id: str
    task_id: int
    run_id: str
    name: str
    attempt: int
    owner: str  # the person's id
    owner_name: str
    owns_worker: bool  # the job's owner is the machine's owner
    ttl_s: float
    spec: JobSpec
    project: Blob
    gpus: list[int] = field(default_factory=list)  # indices that are the job's
    vram_bytes: int = 0  # reserved on each of them; 0: all of it
    cpu: float = 0.0  # cores reserved, and the limit; 0: no limit
    memory_bytes: int = 0
    disk_bytes: int = 0
    secrets: dict[str, str] = field(default_factory=dict, repr=False)
    resume_from: Blob | None = None  # of a Tree: the newest checkpoint of an earlier attempt
    gang: Membership | None = None


@dataclass(frozen=True)
class End:
    """End this job now: SIGTERM, `grace_s`, SIGKILL; then report."""

    lease_id: str
    reason: str
    grace_s: float


@dataclass(frozen=True)
class OrdersAnswer:
    leases: list[JobLease] = field(default_factory=list)  # new here, or not in `holding` although they were given
    end: list[End] = field(default_factory=list)
    drop: list[str] = field(default_factory=list)  # in `holding`, but no longer this worker's: kill, do not report
    draining: bool = False
    knock: list[Knock] = field(default_factory=list)  # find out whether these workers can be reached
    meet: list[MeetOrder] = field(default_factory=list)  # gang members here that meet elsewhere now


@dataclass(frozen=True)
class JobProgress:
    """An attempt moves on."""

    state: str  # preparing | running
    text: str = ""  # "building the environment 3f2a", "the image python:3.12 is pulled"
    executor: str = ""
    environment: dict[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointReport:
    tree: Blob
    files: int
    size_bytes: int


@dataclass(frozen=True)
class JobReport:
    """How an attempt ended. Sent again after a lost answer, it is answered the same.

    outcome "exited": the command ran and ended (exit_code, or signal); "failed": it could not be started, or was ended
    by a limit, and `reason` says which; "cancelled": ended because the hub said so; "returned": nothing was done, give
    it to somebody else.
    """

    outcome: str
    exit_code: int | None = None
    signal: str = ""
    reason: str = ""  # "killed by the memory limit: asked 2 GB, used 2.0"
    code: str = ""  # memory | disk | timeout | environment | image | project | executor | rules | ""
    usage: Usage = field(default_factory=Usage)
    outputs: Blob | None = None
    environment: dict[str, Json] = field(default_factory=dict)
    executor: str = ""
    log_bytes: int = 0
