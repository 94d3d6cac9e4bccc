"""Does `potluck train` ask for what was typed, whether by flags or by run.yaml, in the pool or here?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_double import HubDouble, make_run

from potluck.cli.train import split_settings
from potluck.errors import BadInput, UnknownSetting
from potluck.protocol import UploadAnswer

Potluck = Callable[..., tuple[int, str, str]]


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    path = tmp_path / "digits.npz"
    np.savez(path, x=random.integers(0, 255, (120, 1, 28, 28), dtype=np.uint8), y=random.integers(0, 10, 120))
    return path


@pytest.fixture
def pool(hub: HubDouble) -> HubDouble:
    """A hub that takes uploads and runs."""
    hub.routes["POST", "/uploads"] = lambda body: UploadAnswer("u", body["blob"]["size_bytes"], True)
    hub.routes["GET", "/workers"] = lambda _: []
    hub.routes["POST", "/runs"] = lambda _: make_run(state="queued")
    hub.knows(make_run(state="done"))
    return hub


def request_of(pool: HubDouble) -> dict[str, Any]:
    return next(body for method, path, body in pool.asked if (method, path) == ("POST", "/runs"))


def test_a_run_is_asked_for_with_settings_where_they_belong(pool: HubDouble, potluck: Potluck, digits: Path) -> None:
    code, out, err = potluck(
        *["train", "classifier", "--data", digits, "--epochs", "2", "--for", "10m", "--name", "night"],
        *["--set", "lr=0.01", "--set", "unit_s=20", "--seed", "7", "--detach"],
    )

    assert code == 0, err
    assert "Started faces (dcgan-aaaa)" in out
    request = request_of(pool)
    assert request["recipe"]["name"] == "classifier"
    assert request["recipe"]["settings"] == {"lr": 0.01}
    assert request["settings"]["unit_s"] == 20
    assert request["settings"]["preset"] == "nesterov"
    assert (request["samples"], request["duration_s"], request["seed"], request["name"]) == (216, 600, 7, "night")
    assert (request["dataset"]["samples"], request["dataset"]["held_out"]) == (120, 12)
    assert "120 samples, 12 of them held out" in err


def test_a_recipe_in_a_file_travels_with_the_run(
    pool: HubDouble, potluck: Potluck, digits: Path, tmp_path: Path
) -> None:
    source = tmp_path / "mine.py"
    source.write_text(
        "import torch\nfrom torch import nn\nfrom potluck.train.recipe import Recipe\n"
        "class Mine(Recipe):\n    batch_size: int = 8\n    size: int = 28\n    channels: int = 1\n"
        "    def models(self): return {'net': nn.Linear(784, 10)}\n"
        "    def optimizers(self, models): return {'net': torch.optim.SGD(models['net'].parameters(), 0.1)}\n"
        "    def step(self, models, optimizers, x, y): return {'loss': 0.0}\n"
    )

    code, _, err = potluck("train", f"{source}:Mine", "--data", digits, "--samples", "1k", "--detach")

    assert code == 0, err
    recipe = request_of(pool)["recipe"]
    assert (recipe["name"], recipe["filename"]) == ("Mine", "mine.py")
    assert recipe["source"]["size_bytes"] == source.stat().st_size


def test_waiting_ends_with_the_run_and_prints_it(pool: HubDouble, potluck: Potluck, digits: Path) -> None:
    code, out, _ = potluck("train", "classifier", "--data", digits, "--samples", "100", "--wait", "--json")

    assert code == 0
    assert json.loads(out)["state"] == "done"


def test_a_hub_that_does_not_know_us_is_told_before_anything_is_packed(
    pool: HubDouble, potluck: Potluck, digits: Path
) -> None:
    pool.routes["GET", "/hub"] = lambda _: (401, "not_known", "this hub does not know this credential")

    code, _, err = potluck("train", "classifier", "--data", digits, "--samples", "10")

    assert code == 4
    assert "held out" not in err


def test_resume_goes_on_with_the_paused_run_of_this_recipe(pool: HubDouble, potluck: Potluck) -> None:
    pool.knows(make_run(state="paused"))
    pool.routes["POST", "/runs/dcgan-aaaa/resume"] = lambda _: make_run(state="running")

    code, out, err = potluck("train", "dcgan", "--data", "x", "--resume", "--detach")

    assert code == 0, err
    assert ("POST", "/runs/dcgan-aaaa/resume", None) in pool.asked
    assert "faces" in out


def test_a_run_that_ended_cannot_be_resumed(pool: HubDouble, potluck: Potluck) -> None:
    assert potluck("train", "dcgan", "--data", "x", "--resume")[0] == 5


# --- run.yaml


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_file_gives_what_flags_do_not_and_settings_of_both_are_joined(
    pool: HubDouble, potluck: Potluck, digits: Path, tmp_path: Path
) -> None:
    file = write(
        tmp_path / "run.yaml",
        f"recipe: classifier\ndata: {digits}\nsamples: 5k\nfor: 10m\nname: filed\nset: {{lr: 0.5, unit_s: 7}}\n",
    )

    code, _, err = potluck("train", "-f", file, "--epochs", "1", "--name", "typed", "--set", "lr=0.25", "--detach")

    assert code == 0, err
    request = request_of(pool)
    assert (request["name"], request["samples"], request["duration_s"]) == ("typed", 108, 600)
    assert request["recipe"]["settings"] == {"lr": 0.25}
    assert request["settings"]["unit_s"] == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: dcgan\nsampels: 3\n", "line 2: no key `sampels`: did you mean `samples`?"),
        ("recipe: [dcgan]\n", "line 1: one value is wanted here"),
        ("recipe: dcgan\ndata: a\nrecipe: b\n", "line 3: `recipe` is there twice"),
        ("- dcgan\n", "line 1: the run must be `key: value` lines"),
        ("recipe: dcgan\nset: 3\n", "line 2: `set` must be `key: value` lines"),
        ("recipe: 'dcgan\n", "is not YAML"),
        ("recipe: !!python/object/apply:os.system ['true']\n", "line 1"),
    ],
)
def test_a_slip_in_the_file_names_its_line(text: str, message: str, potluck: Potluck, tmp_path: Path) -> None:
    code, _, err = potluck("train", "-f", write(tmp_path / "run.yaml", text))

    assert code == 2
    assert message in err


def test_a_bad_value_in_the_file_is_read_by_the_same_rules(potluck: Potluck, tmp_path: Path) -> None:
    code, _, err = potluck("train", "-f", write(tmp_path / "run.yaml", "recipe: dcgan\ndata: x\nfor: soon\n"))

    assert code == 2
    assert "like 90s, 10m, 2h or 1d" in err


# --- settings


def test_a_setting_that_both_have_is_the_recipes() -> None:
    assert split_settings({"momentum": 0.5, "quorum": 0.7}, ["momentum"], "x") == ({"momentum": 0.5}, {"quorum": 0.7})


def test_an_unknown_setting_names_the_nearest_of_recipe_and_pool() -> None:
    with pytest.raises(UnknownSetting, match="did you mean `batch_size`"):
        split_settings({"batchsize": 1}, ["batch_size"], "x")
    with pytest.raises(UnknownSetting, match="did you mean `unit_s`"):
        split_settings({"units": 1}, ["batch_size"], "x")


def test_a_value_that_the_pool_cannot_take_is_refused_here() -> None:
    with pytest.raises(BadInput, match="quorum"):
        split_settings({"quorum": 7}, [], "x")


# --- on this machine alone


def test_local_mode_trains_and_goes_on_where_it_stopped(potluck: Potluck, digits: Path, tmp_path: Path) -> None:
    words = ["train", "classifier", "--data", digits, "--local", "--out", tmp_path / "out", "--json"]
    words += ["--set", "taste_every_s=0"]

    first = potluck(*words, "--samples", "64")
    second = potluck(*words, "--samples", "128", "--resume")

    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert (json.loads(first[1])["samples"], json.loads(second[1])["samples"]) == (64, 128)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_local_mode_refuses_settings_that_only_a_pool_has(potluck: Potluck, digits: Path) -> None:
    code, _, err = potluck("train", "classifier", "--data", digits, "--local", "--set", "quorum=0.5")

    assert code == 2
    assert "`quorum` is about the pool" in err
