"""What does a real browser make of the pages of jobs? Chromium, a real hub, no mocks; slow, so not in `make test`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_page import ARGS, CHROMIUM, HOSTILE, Tab

from dashboard_room import Room, gpu, open_room, picture
from potluck.hub.commands import jobs
from potluck.protocol import JobLease, MachineNow, Point, Tree

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the playwright package (pip install playwright)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="needs Chromium: apt-get install chromium"),
]
BIG = MachineNow(32, 128_000_000_000, 90_000_000_000, 900_000_000_000, gpus=[gpu(0), gpu(1)], os="linux", arch="x86_64")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture
def room(fresh_dsn: str, tmp_path: Path) -> Iterator[Room]:
    with open_room(fresh_dsn, tmp_path) as room:
        yield room


class Desk(Tab):
    """A tab of somebody who signed in by the form."""

    def __init__(self, chromium: Any, room: Room, token: str, **options: Any) -> None:
        super().__init__(chromium, **options)
        self.room = room
        self.page.goto(room.url + "/sign-in")
        self.page.get_by_label(re.compile("Credential")).fill(token)
        self.page.get_by_role("button", name="Sign in").click()
        self.page.get_by_role("button", name="Sign out").wait_for()

    def open(self, path: str) -> Any:
        self.page.goto(self.room.url + path)
        self.page.wait_for_selector("#state.live")
        return self.page


@pytest.fixture
def member(room: Room) -> str:
    return room.token("member", "Ada")


@pytest.fixture
def desk(chromium: Any, room: Room, member: str) -> Iterator[Desk]:
    desk = Desk(chromium, room, member)
    yield desk
    desk.context.close()


def running(room: Room, member: str, name: str = "char-lm", **spec: Any) -> tuple[str, Any, JobLease]:
    from potluck.hub.commands import people

    box = room.callers.get("gpu-box") or room.worker("gpu-box")
    room.ready(box, now=BIG)
    job = room.job(room.do(people.authenticate(room.desk, member)), name=name, **spec)
    return job.id, box, room.start(box, now=BIG)


def test_a_log_is_followed_searched_and_let_go(room: Room, desk: Desk, member: str) -> None:
    job_id, box, lease = running(room, member)
    page = desk.open(f"/jobs/{job_id}")
    lines = page.locator("#log-lines")

    at = room.prints(box, lease, "".join(f"line {n}\n" for n in range(200)))
    page.wait_for_selector('#log-lines > div:has-text("line 199")')
    assert page.evaluate(
        "(b => b.scrollHeight - b.scrollTop - b.clientHeight < 24)(document.getElementById('log-lines'))"
    )

    lines.evaluate("box => box.scrollTop = 0")
    page.get_by_role("button", name="Follow the end").wait_for()
    at = room.prints(box, lease, "later\n", at)
    page.wait_for_selector('#log-lines > div:has-text("later")', state="attached")
    assert lines.evaluate("box => box.scrollTop") == 0, "who reads is not pulled away"
    page.get_by_role("button", name="Follow the end").click()
    at = room.prints(box, lease, "10%\r", at)
    at = room.prints(box, lease, "\x1b[32m100%\x1b[0m\ndone\n", at)
    page.wait_for_selector('#log-lines > div:has-text("done")')
    assert lines.inner_text().endswith("later\n100%\ndone")
    assert page.locator("#log-lines .ansi2").inner_text() == "100%"

    page.get_by_label("Search in the log").fill("line 12")
    assert page.inner_text("#log-found") == "11 lines"
    page.keyboard.press("Enter")
    assert page.inner_text("#log-lines .current") == "line 129"
    room.finish(box, lease)
    page.wait_for_selector('#log-state:has-text("ended")')
    desk.assert_quiet(room)


def test_a_log_without_end_does_not_end_the_browser(room: Room, desk: Desk, member: str) -> None:
    job_id, box, lease = running(room, member)
    page = desk.open(f"/jobs/{job_id}")

    at = room.prints(box, lease, "y" * 500_000)
    for start in range(0, 24_000, 4_000):
        at = room.prints(box, lease, "".join(f"row {n}\n" for n in range(start, start + 4_000)), at)
    page.wait_for_selector('#log-lines > div:has-text("row 23999")')

    assert page.locator("#log-lines").evaluate("box => box.childElementCount") <= 5_000
    assert (
        page.locator("#log-lines").evaluate("box => Math.max(...[...box.children].map(l => l.textContent.length))")
        <= 4_000
    )
    desk.assert_quiet(room)


def test_what_a_job_prints_is_never_more_than_text(room: Room, desk: Desk, member: str) -> None:
    job_id, box, lease = running(room, member, name=HOSTILE[0][:39])
    page = desk.open(f"/jobs/{job_id}")

    at = 0
    for text in (
        *HOSTILE,
        "\x1b]8;;javascript:alert(1)\x07link\x1b]8;;\x07",
        "\u202egnp.exe",
        "\x1b[2J\x1b[1;1Htop",
        "\x00\x07\x9b31m",
    ):
        at = room.prints(box, lease, text + "\n", at)
        label = re.sub(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e]", "", text) or "x"
        room.logs(box, lease, Point(0, 1.0, {label: 1.0}, {label: room.upload(picture())}, seq=at))
    at = room.prints(box, lease, b"\xff\xfe not utf-8 \xf0\x9f\nlast\n", at)
    page.wait_for_selector('#log-lines > div:has-text("last")')

    shown = page.inner_text("#log-lines")
    assert HOSTILE[0] in shown
    assert "link" in shown and "javascript" not in shown
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown)
    assert page.evaluate("window.pwned") is None
    assert page.locator("#log-lines *:not(div):not(span)").count() == 0
    desk.assert_quiet(room)


def test_figures_and_the_state_change_without_a_reload_and_are_said(room: Room, desk: Desk, member: str) -> None:
    job_id, box, lease = running(room, member)
    page = desk.open(f"/jobs/{job_id}")
    page.evaluate("window.sameDocument = true")

    room.logs(box, lease, *[Point(n, 1.0, {"loss": 1 / (n + 1)}, seq=n) for n in range(50)])
    page.wait_for_selector('#r-curves:has-text("0.02")')
    room.finish(box, lease, 3, outputs=room.tree({"model.bin": b"w" * 5000}))

    page.wait_for_selector('#r-job_head:has-text("exit code 3")')
    page.wait_for_selector('#r-files:has-text("model.bin")')
    assert page.evaluate("document.getElementById('said').textContent") == "char-lm is failed"
    with page.expect_download() as download:
        page.get_by_role("link", name="model.bin").click()
    assert Path(download.value.path()).read_bytes() == b"w" * 5000
    assert download.value.suggested_filename == "model.bin"
    assert page.evaluate("window.sameDocument")
    desk.assert_quiet(room)


def test_a_job_is_cancelled_and_run_again_by_keyboard(room: Room, desk: Desk, member: str) -> None:
    job_id, _box, _lease = running(room, member)
    page = desk.open(f"/jobs/{job_id}")

    page.get_by_role("button", name="Cancel").focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Run again").wait_for()

    assert "Stopped by Ada" in page.inner_text("#r-job_head")
    desk.assert_quiet(room)


def folder(at: Path) -> Path:
    content = {
        "train.py": b"print('hello')",
        "run.sh": b"#!/bin/sh\n",
        "requirements.txt": b"numpy\n",
        ".gitignore": b"*.tmp\n/out\n",
        "a.tmp": b"no",
        "out/old": b"no",
        "data/big.bin": bytes(9_000_000),
        "pkg/__init__.py": b"",
        "pkg/__pycache__/x.pyc": b"no",
    }
    for path, body in content.items():
        (at / "project" / path).parent.mkdir(parents=True, exist_ok=True)
        (at / "project" / path).write_bytes(body)
    return at / "project"


def test_a_folder_and_a_command_become_a_job(room: Room, desk: Desk, member: str, tmp_path: Path) -> None:
    room.ready(room.worker("gpu-box"), now=BIG)
    desk.page.goto(room.url + "/submit")
    page = desk.page

    page.set_input_files("#folder", folder(tmp_path))
    page.wait_for_selector('#give-says:has-text("project: 6 files, 9 MB")')
    assert page.input_value("#requirements") == "requirements.txt"
    page.get_by_label("Command").fill("sh run.sh")
    page.get_by_label("GPUs").fill("1")
    page.get_by_role("button", name="Where would it run?").click()
    page.wait_for_selector('#outlook:has-text("on gpu-box")')
    assert "project: 6 files" in page.inner_text("#give-says")
    page.get_by_role("button", name="Submit").click()
    page.wait_for_url(re.compile("/jobs/"))

    from potluck.hub.commands import people

    job = room.do(jobs.show(room.desk, room.do(people.authenticate(room.desk, member)), "last"))
    assert job.project is not None
    tree = msgspec.json.decode(room.desk.blobs.read(job.project.hash), type=Tree)
    names = [".gitignore", "data/big.bin", "pkg/__init__.py", "requirements.txt", "run.sh", "train.py"]
    assert [file.path for file in tree.files] == names
    assert [file.path for file in tree.files if file.executable] == ["run.sh"]
    desk.assert_quiet(room)


def test_a_form_that_is_wrong_keeps_what_was_typed(room: Room, desk: Desk) -> None:
    page = desk.page
    page.goto(room.url + "/submit")

    page.get_by_label("Command").fill("python train.py")
    page.get_by_label("Memory").fill("much")
    page.get_by_role("button", name="Submit").click()

    page.wait_for_selector("#problem")
    assert page.input_value("#memory") == "much"
    assert page.evaluate("document.activeElement.id") == "problem", "a screen reader begins with what is wrong"


def test_a_machine_is_drained_by_a_press_of_an_admin(room: Room, chromium: Any) -> None:
    room.ready(room.worker("gpu-box"), now=BIG)
    desk = Desk(chromium, room, room.admin())
    page = desk.open("/workers")

    page.get_by_role("button", name=re.compile("Drain gpu-box")).click()
    page.get_by_role("button", name=re.compile("Let gpu-box")).wait_for()

    assert "draining" in page.inner_text("#r-machines")
    desk.assert_quiet(room)
    desk.context.close()


@pytest.mark.parametrize(("width", "height"), [(360, 740), (1280, 900), (1920, 1080)])
def test_nothing_sticks_out_and_all_has_a_name(room: Room, chromium: Any, width: int, height: int) -> None:
    admin = room.admin()
    job_id, box, lease = running(room, admin, name="a-job-with-a-rather-long-name-" + "x" * 10)
    running_labels = {"a-label-with-a-long-name": "and-a-value-" + "v" * 28}
    room.ready(box, now=BIG, labels=running_labels, holding=(lease.id,))
    room.prints(box, lease, "a line that never ends " * 100)
    room.logs(box, lease, Point(0, 1.0, {"n" * 100: 1.0, "loss": 2.0}, {"m" * 100: room.upload(picture())}, seq=0))
    from potluck.hub.commands import people

    room.job(room.do(people.authenticate(room.desk, admin)), name="waits" + "y" * 34, resources={"gpu": "2"})
    desk = Desk(chromium, room, admin, viewport={"width": width, "height": height})
    page = desk.page

    for path in ("/", "/queue", "/workers", "/submit", f"/jobs/{job_id}", "/sign-in"):
        page.goto(room.url + path)
        if path not in ("/submit", "/sign-in"):
            page.wait_for_selector("#state.live")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        assert page.locator("h1").count() == 1, path
        assert page.evaluate("[...document.images].every(image => image.hasAttribute('alt'))")
        nameless = "svg[role=img]:not([aria-labelledby]), button:empty, a:empty, [tabindex='0']:not([aria-label])"
        assert page.locator(nameless).count() == 0, path
        unlabelled = (
            "[...document.querySelectorAll('input:not([type=hidden]), textarea')].filter(i => !i.labels.length).length"
        )
        assert page.evaluate(unlabelled) == 0, path
    desk.assert_quiet(room)
    desk.context.close()


def test_the_pages_of_jobs_work_without_a_script(room: Room, chromium: Any, member: str) -> None:
    job_id, box, lease = running(room, member)
    room.prints(box, lease, "hello from the job\n")
    desk = Desk(chromium, room, member, java_script_enabled=False)
    page = desk.page

    page.goto(f"{room.url}/jobs/{job_id}")
    assert "hello from the job" in page.inner_text("#log-lines")
    page.get_by_role("button", name="Cancel").click()
    assert "cancelled" in page.inner_text("#r-job_head")

    page.goto(room.url + "/submit")
    page.get_by_label("Command").fill("echo hi")
    page.get_by_role("button", name="Submit").click()
    assert "echo hi" in page.inner_text("#r-job_head")
    page.get_by_role("button", name="Sign out").click()
    assert "opens with a link" in page.inner_text("h1")
    desk.context.close()
