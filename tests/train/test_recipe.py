"""Finding, checking and setting up recipes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from child_kit import TINY, make_dataset

from potluck.errors import BadInput, RecipeError, UnknownSetting
from potluck.protocol import RecipeRef
from potluck.train.recipe import Recipe, coerced, find_recipe, load_recipe, packaged, settings_of


class Settings(Recipe):
    batch_size: int = 8
    lr: float = 0.1
    flip: bool = True
    name: str = "x"
    depth: int | None = None
    kind: Literal["a", "b"] = "a"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return path


def write(path: Path, source: str) -> Path:
    path.write_text("from potluck.train.recipe import Recipe\n" + source)
    return path


def test_every_packaged_recipe_loads_with_its_defaults() -> None:
    assert {"dcgan", "classifier"} <= set(packaged())
    for name in packaged():
        assert load_recipe(find_recipe(name)[0]).models()


def test_a_recipe_in_a_file_is_found_by_class_or_alone(tiny: Path) -> None:
    by_class, source = find_recipe(f"{tiny}:Tiny", {"lr": "0.5"})
    alone, _ = find_recipe(str(tiny))

    assert source == tiny.read_bytes()
    assert by_class == RecipeRef("Tiny", {"lr": "0.5"}, filename="tiny.py")
    assert alone.name == "Tiny"
    assert load_recipe(by_class, tiny).lr == 0.5  # type: ignore[attr-defined]


def test_finding_a_recipe_needs_no_torch(tiny: Path) -> None:
    code = f"import sys; from potluck.train.recipe import find_recipe; find_recipe({str(tiny)!r}); print('torch' in sys.modules)"

    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert answer.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dcgam", "did you mean `dcgan`"),
        ("nonsense", "there are classifier, dcgan"),
        ("/nowhere/x.py:X", "cannot read the recipe /nowhere/x.py"),
    ],
)
def test_an_unknown_recipe_is_named(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        find_recipe(text)


def test_a_missing_class_names_those_that_are_there(tiny: Path) -> None:
    with pytest.raises(RecipeError, match=r"no class `Big`.* it has Tiny"):
        find_recipe(f"{tiny}:Big")
    with pytest.raises(RecipeError, match=r"no recipe class `Big`.* it has Tiny"):
        load_recipe(RecipeRef("Big", filename="tiny.py"), tiny)


@pytest.mark.parametrize("part", ["models", "optimizers", "step"])
def test_a_recipe_without_a_needed_part_says_which(tmp_path: Path, part: str) -> None:
    methods = "".join(f"    def {name}(self, *a): ...\n" for name in ("models", "optimizers", "step") if name != part)
    path = write(tmp_path / "r.py", "class R(Recipe):\n    batch_size: int = 1\n" + methods)

    with pytest.raises(RecipeError, match=f"has no `{part}`"):
        load_recipe(RecipeRef("R", filename="r.py"), path)


def test_a_file_that_does_not_import_shows_the_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "blob-without-suffix", "import torch\nx = torch.zeros(3) @ undefined\nclass R(Recipe): ...\n"
    )

    with pytest.raises(RecipeError, match=r"mine.py cannot be imported: NameError.*mine.py, line 3: x = torch"):
        load_recipe(RecipeRef("R", filename="mine.py"), path)


def test_a_file_that_is_not_python_shows_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "r.py", "class R(Recipe)\n")

    with pytest.raises(RecipeError, match="class R"):
        find_recipe(f"{path}:R")


def test_settings_take_text_and_keep_their_types() -> None:
    given = {"batch_size": "16", "lr": "2e-4", "flip": "no", "name": 3, "depth": "4", "kind": "b"}

    values = coerced(Settings, given)

    assert values == {"batch_size": 16, "lr": 2e-4, "flip": False, "name": "3", "depth": 4, "kind": "b"}
    assert coerced(Settings, {"depth": "none", "batch_size": 8.0}) == {"depth": None, "batch_size": 8}
    assert list(settings_of(Settings)) == ["batch_size", "lr", "flip", "name", "depth", "kind"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", "2.5"),
        ("batch_size", True),
        ("lr", "nan"),
        ("lr", "fast"),
        ("flip", "maybe"),
        ("kind", "c"),
        ("batch_size", "9" * 5000),
    ],
)
def test_a_setting_of_the_wrong_kind_is_refused(key: str, value: object) -> None:
    with pytest.raises(BadInput, match=key):
        coerced(Settings, {key: value})


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(UnknownSetting, match="did you mean `batch_size`"):
        coerced(Settings, {"batchsize": 3})


def test_settings_that_a_recipe_refuses_are_bad_input() -> None:
    with pytest.raises(BadInput, match="size is 40"):
        load_recipe(RecipeRef("dcgan", {"size": 40}))
    with pytest.raises(BadInput, match="batch_size is 0"):
        load_recipe(RecipeRef("dcgan", {"batch_size": 0}))


def test_data_of_another_shape_is_refused(tmp_path: Path) -> None:
    dataset, _ = make_dataset(tmp_path)

    with pytest.raises(BadInput, match=r"packed as \[1, 4, 4\].*works on \[3, 64, 64\]"):
        load_recipe(RecipeRef("dcgan"), "", dataset)
