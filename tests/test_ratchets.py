"""What must not change by accident, and what must stay true of all the code at once?"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path

import click
import pytest

from potluck import settings
from potluck.cli import COMMANDS, app
from potluck.domain.job import json_schema
from potluck.domain.pool import PoolSettings

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src" / "potluck").rglob("*.py"))
DOCS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def commands(group: click.Group = app, before: str = "") -> Iterator[tuple[str, click.Command]]:
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        yield before + name, command
        if isinstance(command, click.Group):
            yield from commands(command, f"{before}{name} ")


# --- the command line is a promise: scripts and lesson plans are written against it

HUB = ["--hub", "--token-file"]
OPTIONS = {
    "host": ["--database", "--data-dir", "--bind", "--port", "--house-worker", "--name", "--tls", "--tunnel"],
    "invite": ["--role", "--uses", "--ttl", "--name", "--trusted", "--json", *HUB],
    "invites": ["--all", "--json", *HUB],
    "invites revoke": ["ID"],
    "join": [
        *["LINK", "--name", "--device", "--share", "--once", "--for", "--threads", "--no-screen", "--home"],
        *["--accept", "--from", "--runtime", "--max-tasks", "--label", "--executor", "--yes"],
    ],
    "train": [
        *["RECIPE", "--data", "--samples", "--epochs", "--for", "--set", "--file", "--name", "--seed", "--local"],
        *["--resume", "--out", "--device", "--share", "--wait", "--detach", "--timeout", "--json", *HUB],
    ],
    "init": ["[DIR]"],
    "run": [
        *["[-- COMMAND...]", "--file", "--folder", "--gpu", "--cpu", "--memory", "--disk", "--image", "--requirements"],
        *["--python", "--name", "--priority", "--retries", "--retry-on", "--timeout", "--grace", "--env", "--secret"],
        *["--on", "--procs", "--wait", "--wait-at-most", "--local", "--to", "--dry-run", "--json", *HUB],
        *["--gang", "--batch", "--gang-policy", "--gang-engine", "--gang-compat", "--detach"],
    ],
    "gang": [],
    "gang ls": ["--open", "--json", *HUB],
    "gang show": ["GANG", "--follow", "--timeout", "--json", *HUB],
    "gang logs": ["GANG", "--follow", "--tail", "--member", "--timeout", *HUB],
    "gang stop": ["GANG", "--wait", "--timeout", "--json", *HUB],
    "gang top": ["[GANG]", "--once", "--timeout", *HUB],
    "gang profile": [
        *["[-- COMMAND...]", "--file", "--folder", "--batch", "--seconds", "--steps", "--gpu", "--cpu", "--memory"],
        *["--image", "--requirements", "--on", "--timeout", "--json", *HUB],
    ],
    "ps": ["--json", *HUB],
    "show": ["RUN", "--follow", "--timeout", "--json", *HUB],
    "why": ["ID", "--json", *HUB],
    "logs": ["JOB", "--follow", "--tail", "--offset", "--attempt", "--since-start", "--member", "--timeout", *HUB],
    "top": ["--once", "--timeout", *HUB],
    "set": ["RUN", "KEY=VALUE...", "--json", *HUB],
    "pause": ["RUN", "--json", *HUB],
    "resume": ["RUN", "--json", *HUB],
    "stop": ["RUN", "--wait", "--timeout", "--json", *HUB],
    "retry": ["JOB", "--json", *HUB],
    "pull": ["JOB", "[PATH]", "--to", "--what", "--attempt", "--member", "--force", "--json", *HUB],
    "queue": ["--json", *HUB],
    "queue move": ["JOB", "--before", "--first", "--json"],
    "secret": [],
    "secret set": ["NAME", "--file", *HUB],
    "secret list": ["--json", *HUB],
    "secret rm": ["NAME", *HUB],
    "events": ["--after", "--last", "--json", *HUB],
    "workers": ["--json", *HUB],
    "workers revoke": ["ID"],
    "workers drain": ["ID", "--reason"],
    "workers undrain": ["ID"],
    "workers label": ["ID", "[K=V...]", "--clear"],
    "export": ["RUN", "DIR", "--json", *HUB],
    "generate": ["RUN|DIR", "--count", "--seed", "--out", *HUB],
    "doctor": ["--hub", "--token-file", "--json"],
}


def test_the_command_line_is_the_one_that_is_written_down() -> None:
    found = {
        name: [
            max(p.opts, key=len) if isinstance(p, click.Option) else (p.metavar or str(p.name).upper())
            for p in command.params
        ]
        for name, command in commands()
    }

    assert {name: sorted(words) for name, words in found.items()} == {
        name: sorted(words) for name, words in OPTIONS.items()
    }


def test_the_list_of_commands_says_what_the_commands_themselves_say() -> None:
    said = {name: command.get_short_help_str(limit=200) for name, command in commands() if " " not in name}

    assert said == {name: sentence for name, (_, sentence) in COMMANDS.items()}


def test_every_option_has_a_help() -> None:
    silent = [
        f"{name} {p.opts[0]}"
        for name, command in commands()
        for p in command.params
        if isinstance(p, click.Option) and not p.help and p.name not in ("out",)
    ]

    assert silent == []


def test_every_list_takes_json_and_every_wait_a_timeout() -> None:
    names = {name: {opt for p in command.params for opt in p.opts} for name, command in commands()}

    assert all(
        "--json" in names[name] for name in ("ps", "workers", "invites", "events", "show", "why", "doctor", "queue")
    )
    assert all("--timeout" in opts for opts in names.values() if opts & {"--wait", "--follow"})


# --- settings


def test_every_setting_has_a_variable_a_unit_and_a_reason() -> None:
    for section in settings.SECTIONS.values():
        for f in fields(section):
            assert f.metadata["env"].startswith("POTLUCK_"), f.name
            assert f.metadata["unit"], f.name
            assert len(f.metadata["why"]) > 10, f.name


def environment_variables() -> set[str]:
    own = {f.metadata["env"] for section in settings.SECTIONS.values() for f in fields(section)}
    return own | set(settings.OTHER_ENVIRONMENT)


def test_docs_catalogue_every_setting_and_no_other() -> None:
    page = ROOT / "docs" / "settings.md"
    named = set(re.findall(r"`(POTLUCK_[A-Z_]+)`", page.read_text(encoding="utf-8")))

    assert named == environment_variables()


BETWEEN_AGENT_AND_CHILD = {"POTLUCK_EVENTS_FD", "POTLUCK_CHILD_CACHE", "POTLUCK_GANG", "POTLUCK_GANG_SOLO"}
SEEN_BY_JOBS = {
    *["POTLUCK_RUN_ID", "POTLUCK_ATTEMPT", "POTLUCK_DEADLINE", "POTLUCK_OUTPUT_DIR", "POTLUCK_CHECKPOINT_DIR"],
    *["POTLUCK_RESUME_FROM", "POTLUCK_METRICS_DIR"],
}


def test_the_code_reads_only_catalogued_variables() -> None:
    read = {
        node.value
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"POTLUCK_[A-Z_]+", node.value)
    }

    twins = {f"{name}_FILE" for name in environment_variables()}
    assert read - environment_variables() - twins == BETWEEN_AGENT_AND_CHILD | SEEN_BY_JOBS


def test_docs_list_the_variables_that_a_job_sees() -> None:
    text = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")

    assert set(re.findall(r"^\| `(POTLUCK_[A-Z_]+)` \|", text, re.MULTILINE)) == SEEN_BY_JOBS


def test_docs_explain_every_key_of_a_job_file() -> None:
    properties = json_schema()["properties"]
    text = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")
    table = " ".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))

    assert [key for key in properties if key != "resources" and f"`{key}`" not in table] == []
    assert [key for key in properties["resources"]["properties"] if f".{key}`" not in table] == []


def test_docs_name_every_setting_of_the_pool_with_its_default() -> None:
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")

    for f in fields(PoolSettings):
        assert f.default is not MISSING
        shown = f'"{f.default}"' if isinstance(f.default, str) else f"{f.default:g}"
        assert f"| `{f.name}` | {shown.strip(chr(34))} |" in text, f"docs/settings.md: `{f.name}` | {shown}"


# --- docs

WORDS = re.compile(r"(?:^|[`$(;&|]\s*|\n\s*)potluck ([a-z][a-z-]*)(?: ([a-z]+))?")


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_docs_name_only_commands_that_exist(path: Path) -> None:
    known = {name for name, _ in commands()}

    unknown = [first for first, _ in WORDS.findall(path.read_text(encoding="utf-8")) if first not in known]

    assert unknown == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_messages_advise_only_commands_that_exist(path: Path) -> None:
    known = {name for name, _ in commands()}
    texts = [
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]

    advised = [word for text in texts for word in re.findall(r"`potluck ([a-z][a-z-]*)", text)]

    assert [word for word in advised if word not in known] == []


# --- imports


@pytest.mark.parametrize("module", ["potluck.cli", "potluck.worker.agent", "potluck.hub.app", "potluck.client"])
def test_imports_without_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'numpy'}} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)

    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_every_command_can_be_imported_without_torch() -> None:
    code = (
        "import sys, importlib\n"
        "from potluck.cli import COMMANDS\n"
        "for module in sorted({m for m, _ in COMMANDS.values()}): importlib.import_module(f'potluck.cli.{module}')\n"
        "print(sorted({'torch', 'numpy', 'rich', 'fastapi', 'psycopg'} & set(sys.modules)))\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)

    assert (done.stdout, done.stderr) == ("[]\n", "")


# --- weights and messages are data, never code

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    *[("torch", "load"), ("torch", "save"), ("np", "load"), ("numpy", "load"), ("yaml", "load")],
    *[("yaml", "unsafe_load"), ("yaml", "full_load"), ("pandas", "read_pickle"), ("torch.hub", "load")],
}


def code_that_runs_data(tree: ast.AST) -> Iterator[str]:
    """Imports and calls that can execute what they read."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] in FORBIDDEN_MODULES or tuple(name.rsplit(".", 1)) in FORBIDDEN_CALLS:
                yield f"line {node.lineno}: import {name}"
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                called = (ast.unparse(node.func.value), node.func.attr)
                safe = called[1] == "load" and called[0] in ("np", "numpy") and _refuses_pickle(node)
                if called in FORBIDDEN_CALLS and not safe:
                    yield f"line {node.lineno}: {'.'.join(called)}"
            if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                yield f"line {node.lineno}: {node.func.id}"
            if any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords):
                yield f"line {node.lineno}: allow_pickle"


def _refuses_pickle(call: ast.Call) -> bool:
    return any(k.arg == "allow_pickle" and ast.unparse(k.value) == "False" for k in call.keywords)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_was_read_is_ever_run(path: Path) -> None:
    assert list(code_that_runs_data(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "np.load(p)",
        "np.load(p, allow_pickle=True)",
        "yaml.load(t, Loader=L)",
        "eval(t)",
    ],
)
def test_the_lint_itself_notices(text: str) -> None:
    assert list(code_that_runs_data(ast.parse(text)))


# --- recipes


def recipe_names() -> list[str]:
    return sorted(p.stem for p in (ROOT / "src" / "potluck" / "recipes").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_loads_and_has_weights(name: str) -> None:
    from potluck.protocol import RecipeRef
    from potluck.train.recipe import load_recipe
    from potluck.train.tasks import build
    from potluck.train.weights import layout_of

    recipe = load_recipe(RecipeRef(name))

    assert layout_of(build(recipe)).param_count > 0


# --- modules


@pytest.mark.parametrize("path", [p for p in SOURCES if p.stat().st_size], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_opens_with_the_question_that_it_answers(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_every_command_lives_in_the_module_that_the_table_names() -> None:
    for name, (module, _) in COMMANDS.items():
        assert hasattr(import_module(f"potluck.cli.{module}"), f"{name}_command")
