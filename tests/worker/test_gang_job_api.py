"""What does `import potluck` find in a job whose Python has no Potluck?"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import potluck
from potluck.worker.jobs.environments import job_path


def test_the_job_api_is_small_and_put_right_again(tmp_path: Path) -> None:
    folder = job_path(tmp_path)
    (folder / "potluck" / "job.py").write_text("raise SystemExit('spoilt')")

    assert job_path(tmp_path) == folder
    assert sorted(path.name for path in (folder / "potluck").iterdir()) == [
        *["__init__.py", "domain", "errors.py", "job.py", "train"]
    ]
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import potluck; print(potluck.log)"],
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("<function log")


def test_the_job_api_has_all_that_the_gang_library_imports_and_nothing_else_of_ours(tmp_path: Path) -> None:
    package = job_path(tmp_path) / "potluck"
    there = {".".join(path.relative_to(package.parent).with_suffix("").parts) for path in package.rglob("*.py")}
    names = {name.removesuffix(".__init__") for name in there}
    wanted = {"potluck.job", "potluck.train.gang.__main__"}
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("potluck"):
                below = {f"{node.module}.{alias.name}" for alias in node.names}
                wanted |= {node.module or ""} | {name for name in below if _is_module(name)}

    folders = {"potluck", "potluck.domain", "potluck.train", "potluck.train.gang"}
    assert wanted - names == set(), "environments.JOB_API lacks them"
    assert names - wanted - folders == set(), "nobody needs them"


def _is_module(name: str) -> bool:
    path = Path(potluck.__file__).parent.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.slow
def test_a_script_trains_with_the_job_api_alone(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    packages = Path(torch.__file__).parent.parent
    script = """
import sys, torch, potluck
gang = potluck.gang.join()
loader = gang.loader(torch.utils.data.TensorDataset(torch.randn(8, 2)), batch_size=4)
model = torch.nn.Linear(2, 1)
model, optimizer = gang.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
for (x,) in loader:
    model(x).sum().backward()
    optimizer.step()
print(potluck.__file__, gang.steps)
"""
    folder = job_path(tmp_path)
    # The packages without the links of editable installs, one of which is this very package.
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        env={"PYTHONPATH": f"{folder}{os.pathsep}{packages}"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.stdout == f"{folder / 'potluck' / '__init__.py'} 2\n", done.stderr
