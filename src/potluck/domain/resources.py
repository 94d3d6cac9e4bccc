"""What does a job ask of a machine, and how do people write it?

    gpu: 1                 one whole GPU                     cpu: 4      four cores, fractions allowed
    gpu: 2..4              two to four, as many as are free  cpu: 2..8   two to eight cores, as many as are free
    gpu: 24GB..            a whole GPU of 24 GB or more      memory: 8GB
    gpu: 24GB..:2          two of them                       disk: 20GB
    gpu: 6GB               6 GB of a GPU that others share   os: linux   arch: x86_64
    gpu: A100,H100:2       two whole A100 or H100            labels: {room: lab-2}
    gpu: RTX 4090:20GB..   a whole 4090 of 20 GB or more

A size with an upper end (`6GB`, `6GB..10GB`) is a *slice*: that much is reserved, and others may use the rest of the
GPU. A size without one (`24GB..`) and no size at all take whole GPUs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from potluck.domain.job import Resources
from potluck.domain.names import clean_name
from potluck.domain.quantity import parse_number, parse_size, say_count, say_size
from potluck.errors import BadInput

MOST_GPUS: Final = 64
MOST_CORES: Final = 4096
MOST_BYTES: Final = 10**16
MOST_LABELS: Final = 32

SYSTEMS: Final = {"linux": "linux", "macos": "macos", "mac": "macos", "darwin": "macos", "windows": "windows"}
ARCHS: Final = {"x86_64": "x86_64", "amd64": "x86_64", "x64": "x86_64", "arm64": "arm64", "aarch64": "arm64"}


@dataclass(frozen=True, slots=True)
class Demand:
    """What a job asks for, read. Sizes in bytes; 0 and empty: no demand."""

    gpus_min: int = 0
    gpus_max: int | None = 0  # None: as many as there are
    vram_min: int = 0  # of each GPU
    vram_max: int | None = None
    models: tuple[str, ...] = ()  # lower-case; one of them must be part of the GPU's name
    cpu: float = 0.0
    memory: int = 0
    disk: int = 0
    labels: tuple[tuple[str, str], ...] = ()  # sorted
    os: str = ""
    arch: str = ""
    image: bool = False  # it needs a machine that runs containers
    vram_slice: bool = False  # a part of a GPU is enough
    cpu_max: float = 0.0  # it takes so many cores where there is room; 0: `cpu`


@dataclass(frozen=True, slots=True)
class Grant:
    """What a job gets of a machine: reserved for it, and its limit. 0: nothing reserved, no limit."""

    gpus: tuple[int, ...] = ()  # indices
    vram: int = 0  # bytes of each of them; 0: all of it, nobody else uses them
    cpu: float = 0.0
    memory: int = 0
    disk: int = 0


def read(resources: Resources, *, image: str = "") -> Demand:
    """What `resources` ask for. BadInput names the field, what is wrong with it, and an example."""
    gpus_min, gpus_max, vram_min, vram_max, models = _read_gpu(resources.gpu)
    cpu, cpu_max = _read_cpu(resources.cpu)
    return Demand(
        gpus_min=gpus_min,
        gpus_max=gpus_max,
        vram_min=vram_min,
        vram_max=vram_max,
        models=models,
        cpu=cpu,
        memory=_read_size("memory", resources.memory),
        disk=_read_size("disk", resources.disk),
        labels=_read_labels(resources.labels),
        os=_word("os", resources.os, SYSTEMS),
        arch=_word("arch", resources.arch, ARCHS),
        image=bool(image.strip()),
        vram_slice=vram_max is not None,
        cpu_max=cpu_max,
    )


@lru_cache(maxsize=4096)
def describe(demand: Demand) -> str:
    """`2 GPUs of 24 GB or more, 4 cores, 8 GB of memory`: one line. Nothing asked for: `any machine`."""
    parts = [describe_gpus(demand)] if wants_gpu(demand) else []
    if demand.cpu:
        parts.append(
            f"{demand.cpu:g} to {say_count(demand.cpu_max, 'core')}"
            if demand.cpu_max > demand.cpu
            else say_count(demand.cpu, "core")
        )
    if demand.memory:
        parts.append(f"{say_size(demand.memory)} of memory")
    if demand.disk:
        parts.append(f"{say_size(demand.disk)} of disk")
    if demand.os or demand.arch:
        parts.append(" ".join(word for word in (demand.os, demand.arch) if word))
    if demand.image:
        parts.append("a container runtime")
    parts += [f"label {key}={value}" for key, value in demand.labels]
    return ", ".join(parts) or "any machine"


def describe_gpus(demand: Demand) -> str:
    """`2 GPUs of 24 GB or more`, `6 GB of a GPU`, `1 to 4 A100s`."""
    low, high = demand.gpus_min, demand.gpus_max
    one = high == 1 and low == 1
    if high == low:
        count = f"{low}"
    elif high is None:
        count = f"{low} or more" if low else "any number of"
    else:
        count = f"{low} to {high}" if low else f"up to {high}"
    kind = " or ".join(demand.models)
    kind = f"{kind} GPU" if kind else "GPU"
    kinds = kind if one else f"{kind}s"
    if demand.vram_slice:
        size = say_size(demand.vram_min)
        if demand.vram_max is not None and demand.vram_max > demand.vram_min:
            size = f"{size} to {say_size(demand.vram_max)}"
        article = "an" if kind[0] in "aeo" else "a"
        return f"{size} of {article} {kind}" if one else f"{size} on each of {count} {kinds}"
    return f"{count} {kinds}" + (f" of {say_size(demand.vram_min)} or more" if demand.vram_min else "")


def wants_gpu(demand: Demand) -> bool:
    return demand.gpus_max is None or demand.gpus_max > 0


@lru_cache(maxsize=4096)
def is_model(gpu_name: str, models: tuple[str, ...]) -> bool:
    """Whether a GPU of this name is one of `models` (none: any is). `a10` is in `NVIDIA A10`, and not in `NVIDIA A100`."""
    if not models:
        return True
    name = _bare(gpu_name)
    return any(re.search(_whole_numbers(_bare(model)), name) for model in models)


def _bare(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _whole_numbers(bare: str) -> str:
    """A pattern for `bare` that does not begin or end in the middle of a number: `t4` is not a `t400`."""
    front = r"(?<!\d)" if bare[:1].isdigit() else ""
    back = r"(?!\d)" if bare[-1:].isdigit() else ""
    return front + re.escape(bare) + back


# --- reading --------------------------------------------------------------------------------------------------------

_GPU_EXAMPLES = "write it like 1, 24GB..:2, 6GB or A100:2"


def _read_gpu(text: str) -> tuple[int, int | None, int, int | None, tuple[str, ...]]:
    word = _one_line("gpu", text)
    if word in ("", "0"):
        return 0, 0, 0, None, ()
    count: tuple[int, int | None] | None = None
    vram: tuple[int, int | None] | None = None
    models: tuple[str, ...] = ()
    for part in (part.strip() for part in word.split(":")):
        if not part:
            raise BadInput(f"resources: gpu is `{text}`: there is nothing beside a colon; {_GPU_EXAMPLES}")
        if re.fullmatch(r"[\d.\s]+", part):
            if count is not None:
                raise BadInput(f"resources: gpu is `{text}`: it gives two counts; {_GPU_EXAMPLES}")
            count = _read_count(part, text)
        elif re.match(r"[\d.]", part):
            if vram is not None:
                raise BadInput(f"resources: gpu is `{text}`: it gives two sizes; {_GPU_EXAMPLES}")
            vram = _read_vram(part, text)
        else:
            if models:
                raise BadInput(f"resources: gpu is `{text}`: separate models by a comma, like A100,H100:2")
            models = _read_models(part, text)
    low, high = count or (1, 1)
    if high == 0:
        raise BadInput(f"resources: gpu is `{text}`: no GPU at all has no size or model; write 0, or 1 for one GPU")
    vram_low, vram_high = vram or (0, None)
    return low, high, vram_low, vram_high, models


def _read_count(part: str, text: str) -> tuple[int, int | None]:
    low, high = _ends(part)
    for end in (low, high):
        if end and not (end.isascii() and end.isdecimal()):
            raise BadInput(f"resources: gpu is `{text}`: `{end}` is not a whole number of GPUs; {_GPU_EXAMPLES}")
    if not low and not high:
        raise BadInput(f"resources: gpu is `{text}`: a range needs an end; {_GPU_EXAMPLES}")
    least, most = int(low or 0), int(high) if high else None
    if max(least, most or 0) > MOST_GPUS:
        raise BadInput(
            f"resources: gpu is `{text}`: no machine has more than {MOST_GPUS} GPUs; "
            "a size has a unit (24GB), a model has letters (RTX4090)"
        )
    if most is not None and most < least:
        raise BadInput(f"resources: gpu is `{text}`: the range ends before it begins; write {most}..{least}")
    return least, most


def _read_vram(part: str, text: str) -> tuple[int, int | None]:
    low, high = _ends(part)
    if not low:
        raise BadInput(f"resources: gpu is `{text}`: say how much GPU memory it needs at least, like 4GB..{high}")
    try:
        least, most = _size(low), _size(high) if high else None
    except BadInput as error:
        raise BadInput(f"resources: gpu is `{text}`: {error}") from None
    if least == 0 or (most is not None and most < least):
        raise BadInput(f"resources: gpu is `{text}`: the range of memory is empty; write it like 24GB.. or 6GB..10GB")
    return least, most


def _read_models(part: str, text: str) -> tuple[str, ...]:
    models = tuple(" ".join(model.lower().split()) for model in part.split(","))
    for model in models:
        if not _bare(model) or not re.fullmatch(r"[a-z0-9][a-z0-9 ._+-]{0,63}", model):
            raise BadInput(f"resources: gpu is `{text}`: `{model}` is not the name of a GPU; {_GPU_EXAMPLES}")
        if _bare(model) == "gpu":
            raise BadInput(f"resources: gpu is `{text}`: write only how many, like gpu: 1")
    return models


def _read_cpu(text: str) -> tuple[float, float]:
    word = _one_line("cpu", text)
    if not word:
        return 0.0, 0.0
    low, high = _ends(word)
    numbers = [parse_number(end) for end in (low, high) if end]
    example = "write it like 4, 0.5 or 2..8"
    if not low or None in numbers or not numbers:
        raise BadInput(f"resources: cpu is `{text}`: it is a number of cores; {example}")
    least, most = (round(number or 0.0, 3) for number in (numbers[0], numbers[-1]))
    if most < least:
        raise BadInput(f"resources: cpu is `{text}`: the range ends before it begins; write {most:g}..{least:g}")
    if most > MOST_CORES:
        raise BadInput(f"resources: cpu is `{text}`: no machine has more than {MOST_CORES} cores; {example}")
    return least, most if most > least else 0.0


def _read_size(name: str, text: str) -> int:
    word = _one_line(name, text)
    if not word:
        return 0
    low, high = _ends(word)
    if high != low and high:
        raise BadInput(f"resources: {name} is `{text}`: it is reserved and the limit, so it is one size; write {high}")
    if not low:
        raise BadInput(f"resources: {name} is `{text}`: it is a size; write it like 8GB")
    try:
        return _size(low)
    except BadInput as error:
        raise BadInput(f"resources: {name}: {error}") from None


def _size(word: str) -> int:
    size = parse_size(word)
    if size > MOST_BYTES:
        raise BadInput(f"`{word}` is more than any machine has: write it like 8GB")
    if 0 < size < 10**6:
        raise BadInput(f"`{word}` is {say_size(size)}: a unit seems to be missing, write it like {word}GB")
    return size


def _read_labels(labels: dict[str, str]) -> tuple[tuple[str, str], ...]:
    if len(labels) > MOST_LABELS:
        raise BadInput(f"resources: there are {len(labels)} labels: at most {MOST_LABELS} are possible")
    return tuple(sorted((_label(key, key), _label(key, value)) for key, value in labels.items()))


def _label(key: str, text: str) -> str:
    if not isinstance(text, str) or not text.strip() or clean_name(text, "") != text.strip():
        raise BadInput(
            f"resources: the label {key!r} has {text!r}: key and value are words of at most 40 characters, like room: lab-2"
        )
    return text.strip()


def _word(name: str, text: str, known: dict[str, str]) -> str:
    word = _one_line(name, text).lower()
    if word and word not in known:
        raise BadInput(f"resources: {name} is `{text}`: it must be one of {', '.join(sorted(set(known.values())))}")
    return known.get(word, "")


def _ends(word: str) -> tuple[str, str]:
    """The two ends of `low..high`; a single value is both."""
    low, dots, high = (part.strip() for part in word.partition(".."))
    return (low, high) if dots else (low, low)


def _one_line(name: str, text: str) -> str:
    if not isinstance(text, str) or len(text) > 200 or not text.isprintable():
        raise BadInput(f"resources: {name} is {text!r:.80}: it is one short line of text")
    return text.strip()
