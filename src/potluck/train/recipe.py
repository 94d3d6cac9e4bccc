"""What does an author write to have something trained, and how is it found and checked?

    class Faces(Recipe):                      # in faces.py; `potluck train faces.py:Faces --data photos/`
        preset = "average"                    # how updates are merged: "average" for GANs, "nesterov" for the rest
        batch_size: int = 32                  # annotated attributes are settings: --set batch_size=64
        lr: float = 2e-4

        def models(self): return {"net": nn.Sequential(...)}
        def optimizers(self, models): return {"net": torch.optim.Adam(models["net"].parameters(), self.lr)}
        def step(self, models, optimizers, x, y): ...; return {"loss": loss}

Everything else (leases, time boxes, versions, files) is Potluck's. Nothing here needs torch until a recipe is loaded,
so that the command line can name and check a recipe on a machine that does not train.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import importlib.util
import linecache
import math
import pkgutil
import sys
import traceback
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, dataclass_transform

from potluck.domain.pool import nearest
from potluck.errors import BadInput, RecipeError, UnknownSetting
from potluck.protocol import Dataset, RecipeRef

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn
    from torch.optim import Optimizer

Losses = Mapping[str, "Tensor | float"]
MAX_SOURCE_BYTES = 1 << 20


@dataclass(frozen=True)
class ImageFormat:
    """How pictures are packed for a recipe: squares of `size` pixels with 1 (gray) or 3 (RGB) channels."""

    size: int
    channels: int


@dataclass_transform()
class Recipe:
    """What people train. Subclasses are made dataclasses; their annotated attributes with a default are settings.

    Promises to authors: `models` is called under a fixed seed; `x` is float32 in [-1, 1] on the device of the models,
    [b, C, H, W] for pictures; `y` is int64 [b], or None for data without labels; models are in train mode in `step`,
    in eval mode in `sample` and `evaluate`, where no gradients are recorded.
    """

    preset: ClassVar[str] = "nesterov"  # "average" | "nesterov": the outer step of the merge
    ema: ClassVar[tuple[str, ...]] = ()  # models that are sampled, evaluated and exported by their running average
    batch_size: int

    dataset: ClassVar[Dataset | None] = None  # set on the loaded recipe before `models` is called, if known

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclass(cls)

    def models(self) -> dict[str, nn.Module]:
        """The networks by name, freshly initialised."""
        raise NotImplementedError

    def optimizers(self, models: dict[str, nn.Module]) -> dict[str, Optimizer]:
        """The optimizers by name. Their state stays on the machine; it is never sent."""
        raise NotImplementedError

    def step(
        self, models: dict[str, nn.Module], optimizers: dict[str, Optimizer], x: Tensor, y: Tensor | None
    ) -> Losses:
        """Train on one batch. Returns figures to watch; one that is not finite fails the unit."""
        raise NotImplementedError

    def sample(self, models: dict[str, nn.Module], count: int, generator: Generator) -> Tensor:
        """`count` pictures in [-1, 1], [count, C, H, W]. Draw all noise from `generator`, on the CPU."""
        raise NotImplementedError

    def evaluate(self, models: dict[str, nn.Module], x: Tensor, y: Tensor | None) -> dict[str, float]:
        """Figures on one held-out batch; their mean over all held-out samples is reported."""
        raise NotImplementedError

    @property
    def images(self) -> ImageFormat | None:
        """How pictures are packed for this recipe: its settings `size` and `channels`, if it has them."""
        size, channels = getattr(self, "size", None), getattr(self, "channels", None)
        return ImageFormat(size, channels) if isinstance(size, int) and isinstance(channels, int) else None

    @property
    def labels(self) -> list[str]:
        """The data's class names; empty if it has none or is not known yet."""
        return self.dataset.labels if self.dataset else []


def has(recipe: Recipe | type[Recipe], part: str) -> bool:
    """Does the recipe itself define `part` ("sample", "evaluate", ...)?"""
    cls = recipe if isinstance(recipe, type) else type(recipe)
    return getattr(cls, part) is not getattr(Recipe, part)


# --- finding one -----------------------------------------------------------------------------------------------------


def packaged() -> list[str]:
    """Names of the recipes that come with Potluck."""
    package = importlib.import_module("potluck.recipes")  # a string: train never imports recipes, which import it
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name[0] != "_")


def find_recipe(text: str, settings: Mapping[str, Any] | None = None) -> tuple[RecipeRef, bytes | None]:
    """What `dcgan`, `faces.py:Faces` or (with one class in it) `faces.py` names; the source's bytes if it is a file.

    Reads the file but does not run it; `load_recipe` does, and checks the rest.
    """
    path, _, name = (text, "", "") if text.endswith(".py") else text.rpartition(":")
    if not path.endswith(".py"):
        if text not in (known := packaged()):
            raise RecipeError(f"no recipe `{text}`{nearest(text, known)} (one of your own is named FILE.py:CLASS)")
        return RecipeRef(text, dict(settings or {})), None
    source = _read(Path(path))
    classes = _class_names(source, path)
    if not name:
        if len(classes) != 1:
            raise RecipeError(f"which class of {path}? Write {path}:CLASS with one of {_listed(classes)}.")
        name = classes[0]
    if name not in classes:
        raise RecipeError(f"no class `{name}` in {path}: it has {_listed(classes)}.")
    return RecipeRef(name, dict(settings or {}), filename=Path(path).name), source


def load_recipe(ref: RecipeRef, path: str | Path = "", dataset: Dataset | None = None) -> Recipe:
    """The recipe with its settings. `path` is where the source of a recipe from a file lies."""
    cls = _from_file(ref, Path(path)) if ref.source or ref.filename or str(path) else _from_package(ref.name)
    check(cls, ref.name)
    try:
        recipe = cls(**coerced(cls, ref.settings))
    except (ValueError, TypeError) as error:
        raise BadInput(f"recipe {ref.name} refuses its settings: {error}") from error
    if recipe.batch_size < 1:
        raise BadInput(f"batch_size is {recipe.batch_size}: it must be at least 1")
    if dataset:
        fit(recipe, dataset)
    return recipe


def fit(recipe: Recipe, dataset: Dataset) -> None:
    """Tell the recipe which data it trains on. BadInput if they do not go together."""
    wanted = recipe.images
    if wanted and dataset.shape != (shape := [wanted.channels, wanted.size, wanted.size]):
        raise BadInput(
            f"the data {dataset.name} was packed as {dataset.shape} [channels, height, width] and the recipe works on "
            f"{shape}: pack it again, or change the recipe with --set size=… --set channels=…"
        )
    recipe.dataset = dataset  # type: ignore[misc]  # of this instance


def check(cls: type[Recipe], name: str) -> None:
    """RecipeError if a part that every recipe needs is missing."""
    for part in ("models", "optimizers", "step"):
        if not has(cls, part):
            raise RecipeError(f"recipe {name} has no `{part}`: write a method {part}(self, …), see docs/recipes.md.")
    if cls.preset not in ("average", "nesterov"):
        raise RecipeError(f"recipe {name} has preset `{cls.preset}`: it must be average (GANs) or nesterov.")
    if not hasattr(cls, "batch_size"):
        raise RecipeError(f"recipe {name} has no `batch_size`: add a line `batch_size: int = 32`.")


def _from_package(name: str) -> type[Recipe]:
    if name not in (known := packaged()):
        raise RecipeError(f"no recipe `{name}`{nearest(name, known)}")
    module = importlib.import_module(f"potluck.recipes.{name}")
    (found,) = [c for c in vars(module).values() if _is_recipe(c) and c.__module__ == module.__name__]
    return typing.cast(type[Recipe], found)


def _from_file(ref: RecipeRef, path: Path) -> type[Recipe]:
    source = _read(path)
    shown = ref.filename or path.name
    unique = f"{_FILES}{hashlib.sha256(source).hexdigest()[:16]}"
    module = sys.modules.get(unique) or _import(unique, path, shown)
    found = getattr(module, ref.name, None)
    if not _is_recipe(found):
        names = [n for n, c in vars(module).items() if _is_recipe(c) and c.__module__ == unique]
        raise RecipeError(f"no recipe class `{ref.name}` in {shown}: it has {_listed(names)}.")
    return typing.cast(type[Recipe], found)


class _Source(SourceFileLoader):
    """Loads a file whatever its name, and leaves no bytecode beside it."""

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        return


def _import(unique: str, path: Path, shown: str) -> types.ModuleType:
    spec = importlib.util.spec_from_loader(unique, _Source(unique, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    setattr(module, _SHOWN, shown)
    sys.modules[unique] = module  # dataclasses and pickling of types look a class's module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[unique]
        raise RecipeError(f"{shown} cannot be imported: {where(error)}") from error
    return module


def where(error: BaseException) -> str:
    """The error with the recipe's line that it comes from, if it comes from one."""
    sentence = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        sentence += " (a recipe is one file; what it imports must be installed on every worker)"
    if isinstance(error, SyntaxError):
        return f"{sentence}: {(error.text or '').strip()}"
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = frame.f_globals.get("__name__", "")
        if module.startswith((_FILES, "potluck.recipes.")):
            path = frame.f_code.co_filename
            shown = frame.f_globals.get(_SHOWN, Path(path).name)
            return f"{sentence} ({shown}, line {line}: {linecache.getline(path, line).strip()})"
    return sentence


_FILES = "potluck_recipe_"  # modules of recipes from files
_SHOWN = "__shown_as__"  # in such a module: its author's name of the file


def _is_recipe(thing: object) -> bool:
    return isinstance(thing, type) and issubclass(thing, Recipe) and thing is not Recipe


def _read(path: Path) -> bytes:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror or error}.") from None
    if len(source) > MAX_SOURCE_BYTES:
        raise RecipeError(f"{path} has {len(source):,} bytes: a recipe is a source file of at most 1 MiB.")
    return source


def _class_names(source: bytes, path: str) -> list[str]:
    try:
        tree = ast.parse(source, path)
    except (SyntaxError, ValueError) as error:
        raise RecipeError(f"{path} is not Python: {where(error)}") from None
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.bases]


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none that is a recipe"


# --- settings --------------------------------------------------------------------------------------------------------


def settings_of(cls: type[Recipe]) -> dict[str, tuple[Any, Any]]:
    """Type and default of each setting, by name."""
    hints = typing.get_type_hints(cls)
    return {
        f.name: (hints[f.name], f.default if f.default is not dataclasses.MISSING else None)
        for f in dataclasses.fields(typing.cast(Any, cls))
    }


def coerced(cls: type[Recipe], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` as the types that the recipe declares; values may be text, as `--set` gives them."""
    known = settings_of(cls)
    for key in settings:
        if key not in known:
            raise UnknownSetting(f"recipe {cls.__name__} has no setting `{key}`{nearest(key, known)}")
    return {key: _coerce(key, value, known[key][0]) for key, value in settings.items()}


def current(recipe: Recipe) -> dict[str, Any]:
    """The settings of a loaded recipe, defaults included."""
    return {name: getattr(recipe, name) for name in settings_of(type(recipe))}


_WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


def _coerce(key: str, value: Any, kind: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        is_none = value is None or (isinstance(value, str) and value.lower() in ("none", "null", ""))
        if is_none and type(None) in arguments:
            return None
        return _coerce(key, value, next(a for a in arguments if a is not type(None)))
    if origin is Literal:
        if (found := [a for a in arguments if str(a) == str(value)]) == []:
            raise BadInput(f"{key} is `{value}`: it must be one of {', '.join(map(str, arguments))}")
        return found[0]
    try:
        return _CASTS[kind](value) if kind in _CASTS else value
    except (ValueError, TypeError, OverflowError):
        raise BadInput(f"{key} is `{value}`: it must be {_NAMES[kind]}") from None


def _to_int(value: Any) -> int:
    number = int(value)
    if isinstance(value, bool) or (isinstance(value, float) and number != value):
        raise ValueError
    return number


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _to_bool(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in _WORDS:
        return _WORDS[value.lower()]
    if isinstance(value, bool):
        return value
    raise ValueError


def _to_str(value: Any) -> str:
    if not isinstance(value, str | int | float):
        raise ValueError
    return str(value)


_CASTS: dict[Any, Any] = {int: _to_int, float: _to_float, bool: _to_bool, str: _to_str}
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
