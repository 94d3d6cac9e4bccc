"""docs/gang-api.md: its Python runs as it stands, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "gang-api.md"


def test_the_python_in_the_docs_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("POTLUCK_GANG", raising=False)
    monkeypatch.delenv("POTLUCK_METRICS_DIR", raising=False)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)

    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102 - it is our own page

    assert len(blocks) == 2
    assert capsys.readouterr().out.count("members alone") == 3
