"""What does a potluck.yaml say, and on which line is it wrong?

    command: python train.py --epochs 3     a string is a line for the shell, a list of words goes without it
    resources: {gpu: "24GB..:2", memory: 8GB}
    env: {LEARNING_RATE: "0.003"}

What the keys mean, and which values they take, is the domain's to say (domain/job.py). Here is told where each value
stands, in the file or in a flag, so that its complaint can point there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potluck.domain import job as domain
from potluck.errors import BadInput, UnknownSetting
from potluck.telemetry import clean

if TYPE_CHECKING:
    import yaml

Where = tuple[str | int, ...]  # ("resources", "gpu"): a place in the values

MAX_BYTES = 1_000_000
MAX_NODES = 10_000  # an alias can make a small file very large
MAX_DEPTH = 8
# flag: where its value goes
FLAGS: Mapping[str, tuple[str, ...]] = {
    "gpu": ("resources", "gpu"),
    "cpu": ("resources", "cpu"),
    "memory": ("resources", "memory"),
    "disk": ("resources", "disk"),
    "image": ("image",),
    "requirements": ("requirements",),
    "python": ("python",),
    "name": ("name",),
    "priority": ("priority",),
    "retries": ("retries",),
    "retry_on": ("retry_on",),
    "timeout": ("timeout",),
    "grace": ("grace",),
    "procs": ("procs",),
    "gang": ("gang", "members"),
    "gang_batch": ("gang", "batch"),
    "gang_policy": ("gang", "policy"),
    "gang_engine": ("gang", "engine"),
    "gang_compat": ("gang", "compat"),
}
NAMES: Mapping[str, str] = {"gang_batch": "--batch"}  # of a flag that is called otherwise


@dataclass(frozen=True)
class JobFile:
    """Values as `JobSpec` wants them, and where each was written."""

    path: Path | None
    values: Mapping[str, Any]
    origins: Mapping[Where, str]  # "potluck.yaml, line 3, column 9" or "--gpu"

    def with_flags(self, flags: JobFile) -> JobFile:
        """Both together: a flag wins, a variable or label wins over the one of its name, secrets add up."""
        values = _merged(_whole_gang(self.values), flags.values)
        origins = {**self.origins, **flags.origins}
        if ("gang",) in origins:
            origins.setdefault(("gang", "members"), origins["gang",])
        return JobFile(self.path, values, origins)

    def spec(self) -> domain.JobSpec:
        """The job. BadInput says where the value stands that does not fit."""
        try:
            return domain.from_mapping(self.values)
        except BadInput as error:
            raise self._blame(error) from None

    def _blame(self, error: BadInput) -> BadInput:
        """The same error with the place of the value that causes it: the one that is refused also when it is alone."""
        for where, value in _leaves(self.values):
            alone = _nested(where, value)
            if where[0] == "gang" and len(where) > 1:  # without its members no gang is right
                alone = {"gang": {"members": 2} | alone["gang"]}
            try:
                domain.from_mapping({"command": ["true"]} | alone)
            except BadInput as own:
                origin = self.origins.get(where) or self.origins.get(where[:-1])
                return type(own)(f"{origin}: {own}" if origin else str(own))
        # Only together they are wrong, like an image and requirements: the sentence begins with one of them.
        first = re.match(r"([a-z_]*)(?:: ([a-z_]+))?", str(error))
        keys = tuple(key for key in first.groups() if key) if first else ()
        origin = self.origins.get(keys) or self.origins.get(keys[:1])
        return type(error)(f"{origin or self.path}: {error}" if origin or self.path else str(error))


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings go into one another, lists add up (but a command is one thing), of all else `over` wins."""
    values = dict(under)
    for key, value in over.items():
        old = values.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            values[key] = _merged(old, value)
        elif isinstance(value, list) and isinstance(old, list) and key != "command":
            values[key] = [*old, *(one for one in value if one not in old)]
        elif not isinstance(value, dict | list) or old is None or key == "command":
            values[key] = value  # else: the file has something else there, which is refused with its line
    return values


def _whole_gang(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """`gang: 2..8` as the mapping that it is short for, so that flags can go into it."""
    gang = values.get("gang")
    return values if gang is None or isinstance(gang, dict | list) else {**values, "gang": {"members": gang}}


def _leaves(values: Mapping[str, Any], above: Where = ()) -> Iterator[tuple[Where, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*above, key))
        elif isinstance(value, list) and key != "command":
            yield from (((*above, key, index), item) for index, item in enumerate(value))
        else:
            yield (*above, key), value


def _nested(where: Where, value: Any) -> dict[str, Any]:
    """`{"resources": {"gpu": value}}` for ("resources", "gpu"); a number in `where` means a list of this one item."""
    for key in reversed(where):
        value = [value] if isinstance(key, int) else {key: value}
    return dict(value)


# --- flags ----------------------------------------------------------------------------------------------------------


def read_flags(given: Mapping[str, Any], command: tuple[str, ...]) -> JobFile:
    """What was typed, in the words of the file."""
    values: dict[str, Any] = {}
    origins: dict[Where, str] = {}

    def put(where: tuple[str, ...], value: Any, flag: str) -> None:
        inner = values
        for key in where[:-1]:
            inner = inner.setdefault(key, {})
        inner[where[-1]] = value
        origins[where] = flag

    for name, where in FLAGS.items():
        if given.get(name) is not None:
            put(where, given[name], NAMES.get(name) or f"--{name.replace('_', '-')}")
    for pair in given.get("env", ()):
        key, value = _variable(pair)
        put(("env", key), value, f"--env {key}")
    for pair in given.get("labels", ()):
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise BadInput(f"--on {pair}: a label is K=V, like --on room=B12")
        put(("resources", "labels", key), value, f"--on {key}")
    if given.get("secrets"):
        values["secrets"] = list(given["secrets"])
        origins["secrets",] = "--secret"
    if command:
        put(("command",), list(command), "the command")
    return JobFile(None, values, origins)


def _variable(pair: str) -> tuple[str, str]:
    import os

    key, equals, value = pair.partition("=")
    if not key:
        raise BadInput(f"--env {pair}: a variable is K=V, like --env SEED=7")
    if not equals:
        if key not in os.environ:
            raise BadInput(f"--env {key}: there is no such variable here to take along; give its value, {key}=…")
        value = os.environ[key]
    return key, value


def name_of(folder: Path) -> str:
    """What a job without a name is called: as its folder."""
    name = "".join(c if c.isascii() and c.isalnum() else "-" for c in folder.resolve().name.lower())
    return name.strip("-")[:40].strip("-") or "job"


# --- the file -------------------------------------------------------------------------------------------------------


def read_job_file(path: Path) -> JobFile:
    """The values of `path`. BadInput names the file, the line, the column, and the nearest key."""
    import yaml

    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path}, line {line}: this is not text in UTF-8: save the file as UTF-8") from None
    if len(content) > MAX_BYTES:
        raise BadInput(f"{path} is more than {MAX_BYTES // 1_000_000} MB large, so it is hardly a job file")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise _not_yaml(path, text, error) from None
    except RecursionError:
        raise BadInput(f"{path} is nested too deeply to be a job file") from None
    if root is None:
        return JobFile(path, {}, {})
    reader = _Reader(path)
    values = reader.mapping(root, (), "a job file", _keys())
    return JobFile(path, values, reader.origins)


def _keys() -> Mapping[str, Any]:
    """The keys that there are; below `resources` those of the resources."""
    properties: Mapping[str, Any] = domain.json_schema()["properties"]
    return properties


def _not_yaml(path: Path, text: str, error: yaml.YAMLError) -> BadInput:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    if mark is None:
        return BadInput(f"{path} is not YAML: {clean(problem)}")
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: mark.column + 1] and not line[: mark.column].strip():
        problem = "a tab: YAML is indented with spaces only"
    elif "mapping values are not allowed" in problem:
        problem = "a second `:` in one line: put the value in quotes, or begin a new line for the next key"
    elif "could not find expected ':'" in problem:
        problem = "this line, or the one above it, has no `:` behind its key"
    elif "cannot start any token" in problem and mark.column < len(line):
        problem = f"a value cannot begin with {line[mark.column]}: put it in quotes"
    return BadInput(f"{path}, line {mark.line + 1}, column {mark.column + 1}: {clean(problem)}")


class _Reader:
    """Nodes to values, with the place of each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.origins: dict[Where, str] = {}
        self._nodes = 0

    def place(self, node: yaml.Node) -> str:
        return f"{self.path}, line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"

    def mapping(self, node: yaml.Node, where: Where, what: str, known: Mapping[str, Any] | None) -> dict[str, Any]:
        """`key: value` lines. `known`: the only keys that there are, and what is below each; None: any key."""
        import yaml

        if not isinstance(node, yaml.MappingNode):
            raise BadInput(f"{self.place(node)}: {what} is made of `key: value` lines")
        values: dict[str, Any] = {}
        first: dict[str, yaml.Node] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise BadInput(f"{self.place(key_node)}: a key is one word")
            key = key_node.value
            if key in first:
                line = first[key].start_mark.line + 1
                raise BadInput(f"{self.place(key_node)}: `{clean(key)}` is there twice, first in line {line}: keep one")
            first[key] = key_node
            if known is not None and key not in known:
                raise UnknownSetting(f"{self.place(key_node)}: no key `{clean(key)}`{self._hint(key, known, where)}")
            below = (*where, key)
            self.origins[below] = self.place(value_node)
            value = self._value(value_node, below, known)
            if value is not None:
                values[key] = value
        return values

    def _hint(self, key: str, known: Mapping[str, Any], where: Where) -> str:
        resources = _below(_keys(), "resources")
        for above in ("resources", "gang") if not where else ():
            if key in (_below(_keys(), above) or {}):
                return f" here: it belongs below `{above}:`, as `{above}: {{{key}: …}}`"
        if where and key in _keys():
            return " here: it belongs one level up, to the left"
        near = difflib.get_close_matches(key.lower().replace("-", "_"), list(known), n=1, cutoff=0.5)
        if not near and not where and resources and (inner := difflib.get_close_matches(key.lower(), resources, n=1)):
            return f": did you mean `{inner[0]}` below `resources:`?"
        return f": did you mean `{near[0]}`?" if near else f": there are {', '.join(sorted(known))}"

    def _value(self, node: yaml.Node, where: Where, known: Mapping[str, Any] | None) -> Any:
        import yaml

        self._nodes += 1
        if self._nodes > MAX_NODES or len(where) > MAX_DEPTH:
            raise BadInput(f"{self.place(node)}: this is too much for a job file")
        key = where[-1]
        if isinstance(node, yaml.ScalarNode):
            # As it is written, so that `python: 3.10` is not 3.1. The domain reads numbers where it wants them.
            return None if node.tag.endswith(":null") else node.value
        if isinstance(node, yaml.MappingNode):
            if where == ("env",):
                return self._variables(node, where)
            inner = _below(known or {}, str(key))
            return self.mapping(node, where, f"`{clean(key)}`", inner)
        items = []
        for index, item in enumerate(node.value):
            self.origins[*where, index] = self.place(item)
            value = self._value(item, (*where, index), None)
            if value is None:
                raise BadInput(f"{self.place(item)}: an entry of `{clean(key)}` without a value")
            items.append(value)
        return items

    def _variables(self, node: yaml.MappingNode, where: Where) -> dict[str, Any]:
        """Variables are text. A number is taken as it is written; a yes could mean many words, so it is asked about."""
        for key_node, value_node in node.value:
            tag = value_node.tag.rpartition(":")[2]
            if tag in ("str", "int", "float") or (tag == "null" and not value_node.value):
                continue
            name = clean(getattr(key_node, "value", "?"))
            if tag in ("map", "seq"):
                raise BadInput(f"{self.place(value_node)}: the variable {name} is text, and this is {_WORDS[tag]}")
            written = clean(value_node.value)
            raise BadInput(
                f"{self.place(value_node)}: the variable {name} is text, and YAML takes {written} for "
                f'{_WORDS.get(tag, "something else")}: write {name}: "{written}"'
            )
        values = self.mapping(node, where, "`env`", None)
        return {key_node.value: values.get(key_node.value, "") for key_node, _ in node.value}


_WORDS = {"bool": "yes or no", "timestamp": "a date", "null": "nothing", "map": "a mapping", "seq": "a list"}


def _below(known: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """The keys below `key`, if they are fixed."""
    inner = known.get(key)
    found = inner.get("properties") if isinstance(inner, Mapping) else None
    return found if isinstance(found, Mapping) else None
