"""Does potluck.yaml say what it means, and is every slip in it told with its place and the remedy?"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.cli.init import text_of
from potluck.cli.jobfile import name_of, read_flags, read_job_file
from potluck.domain.job import JobSpec
from potluck.errors import BadInput, PotluckError


def read(tmp_path: Path, text: str | bytes, **flags: object) -> JobSpec:
    path = tmp_path / "potluck.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_job_file(path).with_flags(read_flags(flags, flags.pop("command", ()))).spec()  # type: ignore[arg-type]


def test_a_file_says_all_of_a_job(tmp_path: Path) -> None:
    spec = read(
        tmp_path,
        "name: digits\n"
        "command: [python, train.py, --epochs, 3]\n"
        "resources: {gpu: 24GB..:2, cpu: 4, memory: 8GB, labels: {room: 12}}\n"
        "env:\n  LEARNING_RATE: 0.10\n  SEED: 007\n  EMPTY:\n"
        "secrets: [HF_TOKEN]\n"
        "python: 3.10\n"
        "requirements: requirements.txt\n"
        "retries: 5\nretry_on: any\ntimeout: 2h\ngrace: 1m\nnetwork: no\nprocs: 2\n",
    )

    assert spec.command == ["python", "train.py", "--epochs", "3"]
    assert (spec.resources.gpu, spec.resources.cpu, spec.resources.labels) == ("24GB..:2", "4", {"room": "12"})
    assert spec.env == {"LEARNING_RATE": "0.10", "SEED": "007", "EMPTY": ""}
    assert (spec.python, spec.timeout_s, spec.grace_s, spec.network) == ("3.10", 7200.0, 60.0, False)
    assert (spec.retries, spec.retry_on, spec.procs, spec.secrets) == (5, "any", 2, ["HF_TOKEN"])


def test_a_line_of_text_is_for_the_shell(tmp_path: Path) -> None:
    assert read(tmp_path, "command: python a.py > out.txt").command == ["/bin/sh", "-c", "python a.py > out.txt"]


def test_the_file_that_init_writes_is_a_job(tmp_path: Path) -> None:
    spec = read(tmp_path, text_of("potluck.yaml"))

    assert (spec.name, spec.command[-1], spec.timeout_s) == ("tiny", "python train.py --epochs 3", 1800.0)
    assert spec.resources.memory == "2GB"


def test_every_key_that_is_commented_out_in_the_file_of_init_works(tmp_path: Path) -> None:
    lines = []
    for line in text_of("potluck.yaml").splitlines():
        bare = line.lstrip().removeprefix("# ")
        is_key = bare.partition(":")[0] in ("gpu", "disk", "requirements", "env", "secrets")
        lines.append(line.replace("# ", "", 1) if line.lstrip().startswith("# ") and is_key else line)

    spec = read(tmp_path, "\n".join(line.split("      ")[0] for line in lines).replace("   #", " #"))

    assert (spec.requirements, spec.env, spec.secrets) == (
        "requirements.txt",
        {"LEARNING_RATE": "0.003"},
        ["HF_TOKEN"],
    )
    assert spec.resources.disk == "10GB"


def test_flags_win_and_what_is_a_collection_adds_up(tmp_path: Path) -> None:
    spec = read(
        tmp_path,
        "command: a\nresources: {cpu: 2, memory: 2GB, labels: {room: a, fast: yes}}\nenv: {A: 1, B: 2}\nsecrets: [X]\n",
        memory="4GB",
        env=("B=3", "C=x=y"),
        labels=("room=b",),
        secrets=("Y", "X"),
        command=("python", "-c", "print(1)"),
        retries=0,
    )

    assert spec.command == ["python", "-c", "print(1)"]
    assert (spec.resources.cpu, spec.resources.memory) == ("2", "4GB")
    assert spec.resources.labels == {"room": "b", "fast": "yes"}
    assert spec.env == {"A": "1", "B": "3", "C": "x=y"}
    assert (spec.secrets, spec.retries) == (["X", "Y"], 0)


def test_a_variable_without_a_value_comes_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_HERE", "yes")

    assert read(tmp_path, "command: a", env=("FROM_HERE",)).env == {"FROM_HERE": "yes"}
    with pytest.raises(BadInput, match="no such variable here"):
        read(tmp_path, "command: a", env=("NOT_THERE_AT_ALL",))


WRONG = {
    # what is written: (where, words of the complaint)
    "command: a\nresorces: {cpu: 1}": ("line 2, column 1", "no key `resorces`: did you mean `resources`?"),
    "command: a\nresources:\n  cpus: 1": ("line 3, column 3", "no key `cpus`: did you mean `cpu`?"),
    "command: a\ngpu: 1": ("line 2, column 1", "below `resources:`, as `resources: {gpu: …}`"),
    "command: a\nresources: {timeout: 2h}": ("line 2, column 13", "one level up"),
    "command: a\nretry-on: any": ("line 2, column 1", "did you mean `retry_on`?"),
    "command: a\nresources:\n  memory: 8X": ("line 3, column 11", "8X"),
    "command: a\nresources: {gpu: 24GB..8GB}": ("line 2, column 18", "24GB..8GB"),
    "command: a\ntimeout: soon": ("line 2, column 10", "`soon` is not a duration"),
    "command: a\nretries: some": ("line 2, column 10", "whole number"),
    "command: a\nretry_on: never": ("line 2, column 11", "lost, any"),
    "command: a\nenv: {DEBUG: yes}": ("line 2, column 14", 'write DEBUG: "yes"'),
    "command: a\nenv: {DAY: 2026-01-01}": ("line 2, column 12", 'takes 2026-01-01 for a date: write DAY: "2026-01-01"'),
    "command: a\nenv: {X: null}": ("line 2, column 10", 'write X: "null"'),
    "command: a\nenv: {X: [1]}": ("line 2, column 10", "a list"),
    "command: a\nenv: {1X: a}": ("line 2, column 11", "no name of a variable"),
    'command: a\nenv: {X: "a\\nb"}': ("line 2, column 10", "control characters"),
    "command: a\nenv: [X=1]": ("line 2, column", "names and values"),
    "command: a\nenv: X": ("line 2, column 6", "names and values"),
    "command: a\nsecrets: HF_TOKEN": ("line 2, column 10", "a list"),
    "command: a\nsecrets: [A, ./x]": ("line 2, column 14", "no name of a variable"),
    "command: a\nsecrets: [A, A]": ("line 2, column 10", "twice"),
    "command: a\ncommand: b": ("line 2, column 1", "`command` is there twice, first in line 1"),
    "command: a\nenv: {A: x, B: y, A: z}": ("line 2, column 19", "`A` is there twice, first in line 2"),
    "command: a\nresources:\n\tcpu: 1": ("line 3, column 1", "a tab"),
    "command: a\n\tname: b": ("line 2, column 1", "a tab"),
    "command: a: b": ("line 1, column 11", "a second `:`"),
    "command: @a": ("line 1, column 10", "cannot begin with @: put it in quotes"),
    "command: [a": ("line 1", "potluck.yaml"),
    "- command: a": ("line 1, column 1", "`key: value` lines"),
    "just text": ("line 1, column 1", "`key: value` lines"),
    "? [a, b]\n: c": ("line 1, column 3", "a key is one word"),
    "command: a\nresources: 3": ("line 2, column 12", "made of"),
    "command: a\nimage: x\nrequirements: r.txt": ("line 2, column 8", "exclude one another"),
    "command: a\nimage: docker-archive:/etc/x": ("line 2, column 8", "image"),
    "command: a\nrequirements: ../r.txt": ("line 2, column 15", "requirements"),
    "command: a\npriority: 1000": ("line 2, column 11", "between -100 and 100"),
    "a: &a [*a]\ncommand: x": ("line 1, column 1", "no key `a`"),
    "command: &a [*a]": ("line 1, column", "potluck.yaml"),
    'command: ""': ("line 1, column 10", "there is no command"),
    "command: []": ("line 1, column 10", "there is no command"),
    "command: [python, null]": ("line 1, column 19", "without a value"),
    "!!python/object/apply:os.system [echo]": ("line 1, column 1", "`key: value` lines"),
    "command: !!python/object/apply:os.system [echo]\nnam: x": ("line 2, column 1", "did you mean `name`?"),
}


@pytest.mark.parametrize("text", WRONG)
def test_a_slip_is_told_with_its_place_and_the_remedy(text: str, tmp_path: Path) -> None:
    where, words = WRONG[text]

    with pytest.raises(BadInput) as caught:
        read(tmp_path, text)

    assert f"potluck.yaml, {where}" in str(caught.value)
    assert words in str(caught.value)


def test_a_slip_in_a_flag_names_the_flag(tmp_path: Path) -> None:
    for flags, words in [
        ({"memory": "8X"}, "--memory: "),
        ({"gpu": "24GB..8GB"}, "--gpu: "),
        ({"timeout": "soon"}, "--timeout: "),
        ({"retry_on": "never"}, "--retry-on: "),
        ({"env": ("1X=a",)}, "--env 1X: "),
        ({"secrets": ("a-b",)}, "--secret: "),
        ({"env": ("=a",)}, "--env =a: "),
        ({"labels": ("room",)}, "--on room: "),
    ]:
        with pytest.raises(BadInput) as caught:
            read(tmp_path, "command: a", **flags)  # type: ignore[arg-type]
        assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"command: a\nname: \xff", "line 2: this is not text in UTF-8"), (b"#" * 1_100_000, "hardly a job file")],
)
def test_a_file_that_is_no_text_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=words):
        read(tmp_path, content)


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot be read: Is a directory"):
        read_job_file(tmp_path)


def test_aliases_cannot_make_a_small_file_large(tmp_path: Path) -> None:
    text = "secrets: [" + "&a [x, x, x, x, x, x, x, x, x, x], " + ", ".join(["*a"] * 2000) + "]\ncommand: a"

    with pytest.raises(BadInput, match="too much for a job file"):
        read(tmp_path, text)


@given(st.binary(max_size=300))
def test_whatever_the_file_holds_the_answer_is_a_job_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("any") / "potluck.yaml"
    path.write_bytes(content)

    try:
        read_job_file(path).spec()
    except PotluckError as error:
        assert str(path) in str(error) or "there is no command" in str(error)


@pytest.mark.parametrize(
    ("folder", "name"),
    [("My Project!", "my-project"), ("äöü", "job"), ("a" * 90, "a" * 40), ("--", "job"), ("v1.2", "v1-2")],
)
def test_a_job_without_a_name_is_called_as_its_folder(folder: str, name: str, tmp_path: Path) -> None:
    assert name_of(tmp_path / folder) == name
