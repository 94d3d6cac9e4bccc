"""What do people, workers and hub say to one another: joining, leases, reports, bytes, pool runs?

Positions are half-open `[lo, hi)` on one endless line: position `p` of a data set with `n` samples is the sample at
place `p % n` in the order of epoch `p // n`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PROTOCOL = 1
"""The version this code speaks. It rises when a message changes meaning; new optional fields do not raise it."""
OLDEST_PROTOCOL = 1
"""The oldest version that the hub still answers."""
PROTOCOL_HEADER = "Potluck-Protocol"

Json = Any
Positions = list[tuple[int, int]]
"""Half-open ranges, sorted and disjoint."""


# --- joining ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hardware:
    """What a machine is, as far as it can be known without torch. Absent means unknown or none, never a guess."""

    hostname: str = ""
    os: str = ""  # "Linux 6.1", "macOS 15.2", "Windows 11"
    arch: str = ""  # "x86_64", "arm64"
    cpu: str = ""  # the model's name
    cpu_cores: int = 0  # those this process may use
    memory_bytes: int = 0
    gpus: list[dict[str, Json]] = field(default_factory=list)  # {"kind": "cuda"|"mps", "name", "memory_bytes"}
    python: str = ""
    potluck: str = ""


@dataclass(frozen=True)
class JoinRequest:
    """`token_sha256`: the machine made its own 256-bit secret; the hub only ever learns this hash of it."""

    code: str
    name: str
    token_sha256: str
    hardware: Hardware = field(default_factory=Hardware)
    device: str = "cpu"
    share: float = 1.0
    protocol: int = PROTOCOL


@dataclass(frozen=True)
class JoinAnswer:
    id: str  # the worker's id, or the member's
    name: str  # as the hub keeps it: made unique, control characters removed
    role: str
    hub: str


@dataclass(frozen=True)
class HubInfo:
    name: str
    version: str
    protocol: int
    oldest_protocol: int
    now: str


@dataclass(frozen=True)
class InviteRequest:
    role: str = "worker"  # worker | member | viewer
    uses: int = 30
    ttl_s: float = 3 * 3600
    name: str = ""  # the name its users get, or its prefix if it may be used more than once
    trusted: bool = False  # workers only: may lease merges and tastes


@dataclass(frozen=True)
class InviteAnswer:
    id: str
    code: str  # shown once; the hub keeps its hash
    role: str
    uses: int
    expires_at: str
    url: str  # the whole link to paste


# --- work ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blob:
    """Immutable bytes by their SHA-256 (64 hex digits)."""

    hash: str
    size_bytes: int


@dataclass(frozen=True)
class RecipeRef:
    """Which recipe: a packaged one by name, or a class in a file that the hub keeps as a blob."""

    name: str  # "dcgan", or the class's name when `source` is given
    settings: dict[str, Json] = field(default_factory=dict)
    source: Blob | None = None
    filename: str = ""


@dataclass(frozen=True)
class Shard:
    blob: Blob
    samples: int


@dataclass(frozen=True)
class Dataset:
    """A packed data set: uint8 arrays in shards of a few MB. Shard `i` holds samples after those of shards before it."""

    name: str
    samples: int
    shards: list[Shard]
    shape: list[int]  # of one sample: [channels, height, width] for images
    dtype: str = "uint8"
    labels: list[str] = field(default_factory=list)  # class names; empty when there are none
    held_out: int = 0  # the last so many samples are for evaluation only; positions never reach them
    skipped: int = 0  # files that could not be read
    licence: str = ""
    origin: str = ""

    @property
    def train_samples(self) -> int:
        return self.samples - self.held_out


@dataclass(frozen=True)
class Layout:
    """How a flat vector of weights is cut into named tensors. Parameters and float buffers are fp32, counters int64.

    Names are "<model>.<tensor>". `params`, `buffers` and `counters` are each in a fixed order; a tensor's slice starts
    where the one before it ends.
    """

    params: list[tuple[str, list[int]]]
    buffers: list[tuple[str, list[int]]] = field(default_factory=list)
    counters: list[tuple[str, list[int]]] = field(default_factory=list)

    @property
    def param_count(self) -> int:
        return sum(_size(shape) for _, shape in self.params)

    @property
    def buffer_count(self) -> int:
        return sum(_size(shape) for _, shape in self.buffers)

    @property
    def counter_count(self) -> int:
        return sum(_size(shape) for _, shape in self.counters)


def _size(shape: list[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


@dataclass(frozen=True)
class Version:
    """One set of shared weights. A worker at `number - 1` applies `delta`; anybody may start from `snapshot`."""

    number: int
    weights_sha256: str  # of the canonical bytes: params fp32 LE, buffers fp32 LE, counters int64 LE
    codec: str = "int8"  # of the delta
    delta: Blob | None = None
    snapshot: Blob | None = None
    state: Blob | None = None  # the outer state that goes with it (residual, EMA); the newest version's only


@dataclass(frozen=True)
class UnitSpec:
    """Train locally on `positions` and hand in the change of weights."""

    positions: Positions
    box_s: float  # T: the room hands in about every T seconds
    next_tick_s: float  # seconds from the grant to the run's next common hand-in time; ticks repeat every `box_s`
    overlap_s: float  # how long the child may step on old weights while its last update travels (at most box_s / 5)
    codec: str
    strategy: str = "local"  # local | gradient (the predecessor's way, kept to compare)
    seed: int = 0


@dataclass(frozen=True)
class MergeInput:
    task_id: int
    blob: Blob
    codec: str
    base_version: int
    samples: int
    steps: int


@dataclass(frozen=True)
class MergePolicy:
    """How updates become a step. `average` is for GANs, `nesterov` for the rest; see domain/pool.py."""

    outer: str = "average"  # average | nesterov | adam (with strategy=gradient)
    outer_lr: float = 1.0
    momentum: float = 0.0
    clip_to_median: bool = True
    s_max: int = 4  # an update more merges behind than this is superseded
    ema_decay: float = 0.0  # per 1,000 applied samples; 0: no EMA
    codec: str = "int8"  # of the outgoing delta


@dataclass(frozen=True)
class MergeSpec:
    base: Version
    state: Blob | None  # the outer state that goes with `base`
    inputs: list[MergeInput]
    active: int  # M: workers active in the run, so the outer step is scaled by len(inputs) / M
    policy: MergePolicy
    applied_samples: int  # by the run so far, for the EMA's warm-up
    snapshot: bool  # also write a snapshot


@dataclass(frozen=True)
class TasteSpec:
    version: Version
    state: Blob | None  # holds the EMA
    count: int
    seed: int
    evaluate: bool = True


@dataclass(frozen=True)
class Lease:
    """One worker's right to one task. It lapses `ttl_s` after the grant or the last heartbeat that named it."""

    id: str
    task_id: int
    kind: str  # init | unit | merge | taste
    run_id: str
    ttl_s: float
    recipe: RecipeRef
    dataset: Dataset
    layout: Layout | None  # None only for init
    seed: int
    unit: UnitSpec | None = None
    merge: MergeSpec | None = None
    taste: TasteSpec | None = None


@dataclass(frozen=True)
class LeaseRequest:
    kinds: list[str]
    share: float = 1.0
    device: str = "cpu"
    samples_per_s: dict[str, float] = field(default_factory=dict)  # measured, by run id
    except_runs: list[str] = field(default_factory=list)  # those that fail on this machine again and again


@dataclass(frozen=True)
class Progress:
    lease_id: str
    steps: int = 0
    samples: int = 0
    samples_per_s: float = 0.0
    loss: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HeartbeatRequest:
    leases: list[Progress] = field(default_factory=list)
    state: str = "idle"  # idle | working | leaving


@dataclass(frozen=True)
class HeartbeatAnswer:
    drop: list[str] = field(default_factory=list)  # leases that are no longer yours: stop, do not report
    hand_in: list[str] = field(default_factory=list)  # leases to finish now with what is done
    messages: list[str] = field(default_factory=list)  # for the person at the machine
    samples_applied: int = 0  # credit so far


@dataclass(frozen=True)
class Report:
    """The outcome of a lease. Sent again after a lost answer, it is answered the same.

    outcome "done": a unit's update, a merge's version, a taste's figures; "returned": nothing was done, give it to
    somebody else; "failed": it was tried and `reason` says what happened.
    """

    outcome: str
    reason: str = ""
    code: str = ""  # with "failed": "nan" for a loss that was not finite; otherwise free
    # a unit
    update: Blob | None = None
    codec: str = ""
    base_version: int = 0
    steps: int = 0
    samples: int = 0
    done: Positions = field(default_factory=list)  # the positions trained on; the others go back
    seconds: float = 0.0  # of training
    exchange_s: float = 0.0  # download + upload of this unit
    bytes_up: int = 0
    bytes_down: int = 0
    # a merge, and init (version 0)
    version: int = -1
    weights_sha256: str = ""
    delta: Blob | None = None
    snapshot: Blob | None = None
    state: Blob | None = None
    layout: Layout | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    # a taste
    image: Blob | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # also a unit's mean losses


@dataclass(frozen=True)
class Verdict:
    """What the merge made of one update."""

    task_id: int
    fate: str  # applied | late | superseded | rejected
    reason: str
    weight: float = 0.0
    norm: float = 0.0
    cosine: float = 0.0  # to the merged step


@dataclass(frozen=True)
class ReportAnswer:
    accepted: bool
    reason: str


# --- blobs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UploadRequest:
    blob: Blob


@dataclass(frozen=True)
class UploadAnswer:
    """`offset == blob.size_bytes` with `done` means that the hub has it already. Send the rest from `offset`."""

    upload_id: str
    offset: int
    done: bool


# --- runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunRequest:
    recipe: RecipeRef
    dataset: Dataset
    name: str = ""
    samples: int | None = None  # train on so many samples; None: until stopped or `duration_s` is over
    duration_s: float | None = None
    settings: dict[str, Json] = field(default_factory=dict)  # of the pool: domain/pool.py PoolSettings
    seed: int = 0
    mode: str = "pool"


@dataclass(frozen=True)
class Fates:
    """Samples by what became of them. `handed_out` is the sum of the other fields."""

    handed_out: int = 0
    applied: int = 0
    late: int = 0
    superseded: int = 0
    rejected: int = 0
    lost: int = 0
    pending: int = 0  # being trained on, or reported and waiting for a merge


@dataclass(frozen=True)
class RunView:
    id: str
    name: str
    mode: str
    recipe: RecipeRef
    dataset: Dataset
    state: str  # queued | running | paused | finishing | done | stopped | failed
    reason: str
    version: int
    created_at: str
    started_at: str | None
    ended_at: str | None
    target_samples: int | None
    duration_s: float | None
    elapsed_s: float
    fates: Fates
    epoch: float  # applied and late samples / train samples
    active_workers: int
    samples_per_s: float  # applied, over the last minute
    losses: dict[str, float]
    metrics: dict[str, float]  # of the newest taste
    first_metrics: dict[str, float]  # of version 0's taste
    settings: dict[str, Json]
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True)
class WorkerView:
    id: str
    name: str
    state: str  # working | idle | away | left | revoked
    device: str
    share: float
    trusted: bool
    hardware: Hardware
    joined_at: str
    last_seen: str
    doing: str  # "unit 41 of dcgan-k3f2, 64 %"
    samples_per_s: float
    fates: Fates
    units: int
    owner: str = ""  # a person's name; empty: nobody said
    labels: dict[str, str] = field(default_factory=dict)  # its owner's and the hub's
    rules: dict[str, Json] = field(default_factory=dict)  # jobs.py `Rules`; empty: it never asked for jobs
    executors: list[str] = field(default_factory=list)
    machine: dict[str, Json] = field(default_factory=dict)  # jobs.py `MachineNow`
    draining: bool = False
    jobs: list[str] = field(default_factory=list)  # "digits on gpu 0"


@dataclass(frozen=True)
class Contribution:
    """One worker's part in one run."""

    worker: str
    worker_id: str
    device: str
    share: float
    units: int
    fates: Fates
    seconds: float  # of training
    samples_per_s: float
    first: str
    last: str
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class Taste:
    version: int
    at: str
    samples: int  # applied by then
    metrics: dict[str, float]
    image: Blob | None


@dataclass(frozen=True)
class Curve:
    """One point a merge: what the updates of that version said of their losses."""

    version: int
    at: str
    samples: int
    losses: dict[str, float]
    updates: int
    active: int
    reason: str


@dataclass(frozen=True)
class Event:
    id: int
    at: str
    kind: str  # "run.started", "unit.lost", "merge.done", ...
    subject: str  # a run's, worker's or task's id
    text: str  # a sentence
    actor: str = ""


@dataclass(frozen=True)
class Why:
    subject: str
    text: str
    advice: str = ""


@dataclass(frozen=True)
class Problem:
    """RFC 9457, with our stable `code`."""

    type: str
    title: str
    status: int
    detail: str
    code: str
