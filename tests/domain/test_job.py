from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.domain.job import KEYS, RESOURCE_KEYS, JobSpec, Resources, check, from_mapping, json_schema, to_mapping
from potluck.errors import BadInput, UnknownSetting

SCHEMA = Path(__file__).parents[2] / "docs" / "potluck.schema.json"


def test_a_file_says_all_of_a_job() -> None:
    spec = from_mapping(
        {
            "command": "python train.py --epochs 3",
            "name": "mnist",
            "env": {"SEED": 7, "RATE": "0.003"},
            "secrets": ["HF_TOKEN"],
            "resources": {"gpu": "24GB..:2", "cpu": 4, "memory": "8GB", "labels": {"room": "lab-2"}, "os": "linux"},
            "requirements": "requirements.txt",
            "python": "3.11",
            "priority": -5,
            "retries": 0,
            "retry_on": "any",
            "timeout": "2h",
            "grace": 5,
            "patience": "1m30s",
            "procs": 2,
            "network": False,
        }
    )

    assert spec == JobSpec(
        command=["/bin/sh", "-c", "python train.py --epochs 3"],
        name="mnist",
        env={"SEED": "7", "RATE": "0.003"},
        secrets=["HF_TOKEN"],
        resources=Resources(gpu="24GB..:2", cpu="4", memory="8GB", labels={"room": "lab-2"}, os="linux"),
        requirements="requirements.txt",
        python="3.11",
        priority=-5,
        retries=0,
        retry_on="any",
        timeout_s=7200.0,
        grace_s=5.0,
        patience_s=90.0,
        procs=2,
        network=False,
    )


def test_a_list_of_words_goes_without_a_shell() -> None:
    assert from_mapping({"command": ["grep", "", "a b", 3]}).command == ["grep", "", "a b", "3"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"comand": "x"}, "did you mean `command`"),
        ({"command": "x", "timeout_s": 5}, "did you mean `timeout`"),
        ({"command": "x", "gpu": 1}, "belongs below resources"),
        ({"command": "x", "resources": {"gpus": 1}}, "resources: no key `gpus`: did you mean `gpu`"),
        ({"command": "x", 7: 1}, "no key `7`"),
    ],
)
def test_an_unknown_key_names_the_nearest(values: dict[str, object], says: str) -> None:
    with pytest.raises(UnknownSetting, match=says):
        from_mapping(values)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"command": ""}, "no command"),
        ({"command": "   "}, "no command"),
        ({"command": []}, "no command"),
        ({"command": ["", "x"]}, "no command"),
        ({"command": ["python", "a\0b"]}, "zero byte"),
        ({"command": ["python", "\ud800"]}, "half of one"),
        ({"command": "x" * 200_000}, "longer than"),
        ({"command": [["x"]]}, "command is"),
        ({"command": {"a": "b"}}, "a line of text or a list"),
        ({"name": "a\nb"}, "name is"),
        ({"name": "a\u202eb"}, "name is"),
        ({"name": "last"}, "not `last`"),
        ({"name": "x" * 41}, "40 characters"),
        ({"env": {"A B": "x"}}, "no name of a variable"),
        ({"env": {"1A": "x"}}, "no name of a variable"),
        ({"env": {"A\n": "x"}}, "no name of a variable"),
        ({"env": {"É": "x"}}, "no name of a variable"),
        ({"env": {"": "x"}}, "no name of a variable"),
        ({"env": {"A": "x\ny"}}, "control characters"),
        ({"env": {"A": "x\0"}}, "control characters"),
        ({"env": {"A": "\x1b[2J"}}, "control characters"),
        ({"env": {"A": True}}, "put it in quotes"),
        ({"env": {"A": None}}, "env: A is None"),
        ({"env": {"A": "x" * 40_000}}, "longer than"),
        ({"env": {f"A{n}": "x" for n in range(300)}}, "300 variables"),
        ({"env": {"POTLUCK_RUN_ID": "x"}}, "POTLUCK_"),
        ({"env": ["A=1"]}, "names and values"),
        ({"env": {"A": "1"}, "secrets": ["A"]}, "is in env too"),
        ({"secrets": ["A", "A"]}, "there twice"),
        ({"secrets": ["a b"]}, "no name of a variable"),
        ({"secrets": "HF_TOKEN"}, "it is a list"),
        ({"resources": {"gpu": "3..1"}}, "gpu is"),
        ({"resources": "gpu"}, "resources is"),
        ({"resources": {"labels": ["a"]}}, "resources: labels is"),
        ({"image": "-v/:/host"}, "image is"),
        ({"image": "python:3.12 --privileged"}, "image is"),
        ({"image": "dir:/etc"}, "image is"),
        ({"image": "oci-archive:secret.tar"}, "image is"),
        ({"image": "docker://python"}, "image is"),
        ({"image": "../x"}, "image is"),
        ({"image": "python", "requirements": "requirements.txt"}, "exclude one another"),
        ({"requirements": "../requirements.txt"}, "leads out"),
        ({"requirements": "/etc/passwd"}, "is absolute"),
        ({"python": "python3"}, "a version like 3.12"),
        ({"python": "2.7"}, "a version like 3.12"),
        ({"priority": 101}, "between -100 and 100"),
        ({"priority": "high"}, "a whole number"),
        ({"retries": 1.5}, "a whole number"),
        ({"retries": -1}, "between 0 and 100"),
        ({"retries": True}, "a whole number"),
        ({"retry_on": "never"}, "one of lost, any"),
        ({"timeout": "0s"}, "timeout is 0 s"),
        ({"timeout": "soon"}, "timeout: `soon` is not a duration"),
        ({"timeout": -1}, "timeout: `-1`"),
        ({"timeout": float("inf")}, "timeout: `inf`"),
        ({"timeout": "9" * 400}, "timeout: "),
        ({"grace": "2h"}, "grace is 7200 s"),
        ({"patience": 1}, "patience is 1 s"),
        ({"procs": 0}, "between 1 and 64"),
        ({"network": "maybe"}, "yes or no"),
    ],
)
def test_bad_input_says_which_key_is_wrong(change: dict[str, object], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        from_mapping({"command": "true"} | change)


@pytest.mark.parametrize(
    "image",
    ["python", "python:3.12-slim", "ghcr.io/someone/thing:1.0", "localhost:5000/a/b", "a@sha256:" + "0" * 64, "A.b/c"],
)
def test_images_as_registries_know_them_are_taken(image: str) -> None:
    assert from_mapping({"command": "true", "image": image}).image == image


def test_a_spec_that_a_client_sends_is_checked_the_same() -> None:
    for spec in (
        JobSpec(["true"], timeout_s=float("nan")),
        JobSpec(["true"], grace_s=float("inf")),
        JobSpec([]),
        JobSpec(["true"], resources=Resources(memory="much")),
        JobSpec(["true"], priority=10**9),
    ):
        with pytest.raises(BadInput):
            check(spec)


words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
lines = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"]), max_size=20)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,9}", fullmatch=True).filter(
    lambda n: not n.upper().startswith("POTLUCK")
)
specs = st.builds(
    JobSpec,
    command=st.lists(words, min_size=1, max_size=4).filter(lambda words: bool(words[0].strip())),
    name=st.sampled_from(["", "mnist", "two words"]),
    env=st.dictionaries(names, lines, max_size=3),
    resources=st.builds(
        Resources,
        gpu=st.sampled_from(["0", "", "1", "24GB..:2", "A100"]),
        cpu=st.sampled_from(["", "0.5", "2..4"]),
        memory=st.sampled_from(["", "8GB"]),
        labels=st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from(["x", "y"])),
    ),
    priority=st.integers(-100, 100),
    retries=st.integers(0, 100),
    timeout_s=st.none() | st.floats(1, 10**6),
    grace_s=st.floats(0, 3600),
    network=st.booleans(),
)


@given(specs)
def test_a_job_survives_being_written_and_read(spec: JobSpec) -> None:
    values = json.loads(json.dumps(to_mapping(spec)))

    assert from_mapping(values) == spec


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=3), st.data()
)
def test_no_value_whatever_makes_more_than_bad_input(value: object, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(KEYS)))

    try:
        from_mapping({"command": "true", key: value})
    except BadInput as error:
        assert len(str(error)) < 1000


def test_the_schema_in_the_docs_is_the_one_of_the_code() -> None:
    """Write it anew: python -m tests.domain.test_job"""
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == json_schema()


def test_the_schema_knows_every_key_and_explains_it() -> None:
    schema = json_schema()
    resources = schema["properties"]["resources"]["properties"]

    assert set(schema["properties"]) == set(KEYS)
    assert set(resources) == set(RESOURCE_KEYS) == set(Resources.__dataclass_fields__)
    assert {f"{key}_s" if key in ("timeout", "grace", "patience") else key for key in KEYS} == set(
        JobSpec.__dataclass_fields__
    )
    assert all(len(key["description"]) > 10 for key in [*schema["properties"].values(), *resources.values()])


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
