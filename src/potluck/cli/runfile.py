"""What does a run.yaml say, and on which line is it wrong?

    recipe: dcgan
    data: photos/
    samples: 200k
    set: {batch_size: 64, unit_s: 20}

The keys are the flags of `potluck train` without their dashes. A flag on the command line wins.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potluck.errors import BadInput

if TYPE_CHECKING:
    import yaml


def read_run_file(path: Path, known: Collection[str]) -> dict[str, Any]:
    """The values in `path` by key; `set` is a dictionary of its own. BadInput names the line and the nearest key."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise BadInput(f"{path}{where} is not YAML: {getattr(error, 'problem', None) or error}") from None
    if root is None:
        return {}
    values: dict[str, Any] = {}
    for key, node in _entries(root, path, "the run"):
        if key not in known:
            near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(sorted(known))}"
            raise BadInput(f"{path}, line {_line(node)}: no key `{key}`: {hint}")
        if key == "set":
            values[key] = {name: _scalar(value, path) for name, value in _entries(node, path, "`set`")}
        else:
            values[key] = _scalar(node, path)
    return values


def _entries(node: yaml.Node, path: Path, what: str) -> list[tuple[str, yaml.Node]]:
    import yaml

    if not isinstance(node, yaml.MappingNode):
        raise BadInput(f"{path}, line {_line(node)}: {what} must be `key: value` lines")
    entries = [(str(key.value), value) for key, value in node.value]
    names = [name for name, _ in entries]
    for index, (name, value) in enumerate(entries):
        if name in names[:index]:
            raise BadInput(f"{path}, line {_line(value)}: `{name}` is there twice: keep one of them")
    return entries


def _scalar(node: yaml.Node, path: Path) -> Any:
    import yaml

    if not isinstance(node, yaml.ScalarNode):
        raise BadInput(f"{path}, line {_line(node)}: one value is wanted here, not a list or a mapping")
    return yaml.safe_load(yaml.serialize(node))


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
