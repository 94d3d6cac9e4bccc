from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_kit import HERE, AgentThread
from fake_hub import FakeHub

from potluck.worker.agent import AgentSettings


@pytest.fixture
def edge(tmp_path: Path) -> Iterator[FakeHub]:
    """A hub on a real socket, with everything in memory."""
    hub = FakeHub(tmp_path).start()
    yield hub
    hub.stop()


@pytest.fixture(autouse=True)
def child_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    log = tmp_path / "child.jsonl"
    monkeypatch.setenv("FAKE_CHILD_LOG", str(log))
    return log


@pytest.fixture
def start(edge: FakeHub, tmp_path: Path) -> Iterator[Any]:
    """Start an agent in a thread; it is stopped at the end."""
    agents: list[AgentThread] = []

    def begin(**settings: Any) -> AgentThread:
        token = edge.worker()
        given = AgentSettings(edge.address, token, tmp_path / "home", worker_id="w1", screen=False, **settings)
        agent = AgentThread(given)
        agents.append(agent)
        return agent

    yield begin
    for agent in agents:
        agent.end()


@pytest.fixture
def start_process(edge: FakeHub, tmp_path: Path) -> Iterator[Any]:
    """Start an agent as a process of its own, for signals."""
    processes: list[subprocess.Popen[str]] = []

    def begin(**settings: Any) -> subprocess.Popen[str]:
        token = edge.worker()
        given = {"hub": edge.address, "token": token, "home": str(tmp_path / "home"), "worker_id": "w1", **settings}
        process = subprocess.Popen(
            [sys.executable, str(HERE / "run_agent.py"), json.dumps(given)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=dict(os.environ),
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.communicate()
