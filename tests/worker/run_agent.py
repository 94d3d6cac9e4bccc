"""An agent with the torch-free child, as a process: `run_agent.py '{"hub": …, "token": …, "home": …}'`."""

import json
import sys
from pathlib import Path

from potluck.worker.agent import Agent, AgentSettings
from potluck.worker.jobs.house import House

settings = json.loads(sys.argv[1])
settings["home"] = Path(settings["home"])
settings["house"] = House(executor=settings.pop("executor", ""))
command = [sys.executable, str(Path(__file__).parent / "fake_child.py")]
sys.exit(Agent(AgentSettings(**settings, screen=False), command=command, longest_wait_s=0.5).run())
