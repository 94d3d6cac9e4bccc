"""A hub that is told to stop stops: by itself, soon, and with everything that it started."""

from __future__ import annotations

import signal

import psutil
import pytest

from potluck.testing import LocalCluster


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_hub_that_is_told_to_stop_takes_its_house_worker_and_postgres_along(
    cluster: LocalCluster, number: signal.Signals
) -> None:
    cluster.until(
        lambda: any(worker.trusted for worker in cluster.hub.workers()), timeout_s=60, what="the house worker"
    )
    hub = cluster.processes["hub"].popen
    house = psutil.Process(cluster.house_pid())

    hub.send_signal(number)

    assert hub.wait(60) == 0
    house.wait(30)
    started = [p for p in psutil.process_iter(["cwd"]) if str(cluster.data_dir) in (p.info["cwd"] or "")]
    assert not started
