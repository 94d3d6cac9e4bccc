"""Do the pages of jobs tell the truth to those who may know it, and keep what they do not understand as text?"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_dashboard import HOSTILE, assert_harmless, text_of

from dashboard_room import Room, gpu, open_room, picture
from potluck.domain.job import JobSpec
from potluck.hub.commands import jobs, runs, secrets
from potluck.hub.dashboard import jobs as job_pages
from potluck.hub.dashboard import session
from potluck.hub.dashboard.figures import MOST_KEPT, MOST_NAMES, Figures
from potluck.hub.dashboard.regions import said
from potluck.hub.dashboard.submit import spec_of
from potluck.hub.entrance import form_token
from potluck.protocol import MachineNow, Point, Rules, SecretValue

EVIL = [*HOSTILE, "\x1b]0;title\x07\x1b[31mred\x1b[2J", "\u202eevil\u2066", "x" * 10_000]
BIG = MachineNow(32, 128_000_000_000, 90_000_000_000, 900_000_000_000, gpus=[gpu(0), gpu(1)], os="linux", arch="x86_64")


@pytest.fixture
def room(fresh_dsn: str, tmp_path: Path) -> Iterator[Room]:
    with open_room(fresh_dsn, tmp_path) as room:
        yield room


@pytest.fixture
def ada(room: Room) -> httpx.Client:
    return room.browser("member", "Ada")


@pytest.fixture
def bob(room: Room) -> httpx.Client:
    return room.browser("member", "Bob")


def press(browser: httpx.Client, path: str, **fields: str) -> httpx.Response:
    """What a form of a page does."""
    token = form_token(browser.cookies["potluck_session"])
    return browser.post(path, data={"form_token": token, **fields})


# --- what there is to see


def test_the_queue_shows_who_waits_why_and_who_is_at_work(room: Room, ada: httpx.Client) -> None:
    box = room.worker("gpu-box")
    room.ready(box, now=BIG)
    room.job(room.who(ada), name="runs-now", resources={"gpu": "1"})
    room.start(box, now=BIG)
    room.job(room.who(ada), name="waits-first", resources={"gpu": "2"}, priority=5)
    room.job(room.who(ada), name="waits-next", resources={"gpu": "2"})
    stopped = room.job(room.who(ada), name="was-stopped")
    room.do(jobs.stop(room.desk, room.who(ada), stopped.id))

    html = ada.get("/queue").text
    text = text_of(html)

    assert "2 jobs wait, 1 at work" in text
    assert re.search(r"1 waits-first Ada · 2 GPUs · priority 5 .* 2 waits-next Ada", text), text
    assert len(re.findall(r'<p class="reason">[A-Z<].{20,}</p>', html)) == 2
    assert re.search(r"runs-now running gpu-box Ada 1 GPU", text)
    assert re.search(r"Ended lately .* was-stopped cancelled", text)


def test_the_first_page_shows_jobs_beside_runs(room: Room, ada: httpx.Client) -> None:
    box = room.worker("gpu-box")
    room.ready(box)
    job = room.job(room.who(ada), name="char-lm")
    room.start(box)

    html = ada.get("/").text

    assert f'href="/jobs/{job.id}"' in html
    assert "1 at work, 0 wait" in text_of(html)
    room.run("faces")
    room.until(lambda: "faces" in ada.get("/").text)


def test_a_jobs_page_has_its_state_its_log_its_figures_and_its_files(room: Room, ada: httpx.Client) -> None:
    box = room.worker("gpu-box")
    room.ready(box)
    job = room.job(room.who(ada), "python train.py --epochs 3", name="char-lm", env={"EPOCHS": "3"})
    lease = room.start(box)
    room.prints(box, lease, "loading 1%\rloading 100%\n\x1b[32mepoch 1\x1b[0m done\n")
    shown = room.upload(picture())
    points = [Point(i, 1.0, {"loss": 4 / (i + 1)}, {"samples": shown} if i == 2 else {}, seq=i) for i in range(4)]
    room.logs(box, lease, *points)

    html = ada.get(f"/jobs/{job.id}").text
    text = text_of(html)

    for expected in ("char-lm", "running", "on gpu-box", "python train.py --epochs 3", "EPOCHS= 3", "torch==2.6.0"):
        assert expected in text
    assert "loading 100% epoch 1 done" in text
    assert "loss went from 4 to 1 to step 3" in html
    assert f'src="/api/v1/blobs/{shown.hash}"' in html
    assert "Cancel" in text

    room.finish(box, lease, outputs=room.tree({"model/weights.bin": b"w" * 2_000, "notes.txt": b"fine"}))

    text = room.until(lambda: "succeeded" in (text := text_of(ada.get(f"/jobs/{job.id}").text)) and text)
    assert re.search(r"model/weights.bin 2 kB notes.txt 4 B", text)
    assert "Run again" in text


def test_a_file_that_a_job_left_is_saved_and_never_shown(room: Room, ada: httpx.Client, bob: httpx.Client) -> None:
    box = room.worker("gpu-box")
    room.ready(box)
    job = room.job(room.who(ada))
    lease = room.start(box)
    name = 'sub/ü "page".html'
    room.finish(box, lease, outputs=room.tree({name: b"<script>alert(1)</script>"}))
    path = f"/jobs/{job.id}/files/sub/%C3%BC%20%22page%22.html"

    got = ada.get(path)

    assert got.content == b"<script>alert(1)</script>"
    assert got.headers["content-type"] == "application/octet-stream"
    assert got.headers["content-disposition"].startswith('attachment; filename="___page_.html"; filename*=UTF-8')
    assert got.headers["x-content-type-options"] == "nosniff"
    assert ada.get(f"/jobs/{job.id}/files/..%2f..%2fetc%2fpasswd").status_code == 404
    assert bob.get(path).status_code == 403
    assert room.viewer().get(path).status_code == 403
    assert httpx.get(room.url + path).status_code == 401


def test_others_see_that_a_job_is_there_and_not_what_is_in_it(room: Room, ada: httpx.Client, bob: httpx.Client) -> None:
    box = room.worker("gpu-box")
    room.ready(box)
    job = room.job(room.who(ada), "python secret-idea.py", name="idea", env={"WORD": "hush"})
    lease = room.start(box)
    room.prints(box, lease, "the answer is 42\n")

    for browser in (bob, room.viewer()):
        html = browser.get(f"/jobs/{job.id}").text
        assert "idea" in html
        for hidden in ("secret-idea", "hush", "the answer is 42", "Cancel", "log.js"):
            assert hidden not in html
        assert browser.get(f"/jobs/{job.id}/log.txt").status_code == 403
    with bob.stream("GET", "/live", params={"job": job.id}) as stream:
        event = next(line for line in stream.iter_lines() if line.startswith("data: {"))
    assert "r-job_head" in event
    assert "r-environment" not in event
    assert "secret-idea" not in event
    assert "secret-idea" in room.browser("admin").get(f"/jobs/{job.id}").text


def test_the_whole_log_can_be_saved(room: Room, ada: httpx.Client) -> None:
    box = room.worker("gpu-box")
    room.ready(box)
    job = room.job(room.who(ada), name="long")
    lease = room.start(box)
    piece = b"0123456789abcde\n" * 32_000
    for part in range(4):
        room.prints(box, lease, piece, offset=part * len(piece))

    answer = ada.get(f"/jobs/{job.id}/log.txt")

    assert answer.content == piece * 4
    assert 'filename="long-1.log"' in answer.headers["content-disposition"]
    assert len(ada.get(f"/jobs/{job.id}").text) < 100_000, "the page itself has only the end"


def test_the_page_of_machines_says_what_they_are_what_runs_there_and_what_is_allowed(room: Room) -> None:
    admin = room.browser("admin")
    box = room.worker("gpu-box")
    rules = Rules("jobs", "me", "any", 3)
    room.ready(box, now=BIG, rules=rules, labels={"room": "lab-2"})

    text = text_of(admin.get("/workers").text)

    assert "1 machine here: 32 cores, 2 GPUs with 48 GB" in text
    assert "GPU 0 NVIDIA GeForce RTX 3090 24 GB of 24 GB free" in text
    assert "jobs only, from its owner only, 3 jobs at once" in text
    assert "room=lab-2" in text
    assert "Drain" in text
    assert "Drain" not in text_of(room.browser("member").get("/workers").text)


def test_a_machine_is_drained_and_let_back_by_a_press(room: Room) -> None:
    admin = room.browser("admin")
    box = room.worker("gpu-box")
    room.ready(box)

    assert press(admin, f"/workers/{box.subject}/drain").headers["location"] == "/workers"
    assert "draining" in text_of(admin.get("/workers").text)
    assert press(admin, f"/workers/{box.subject}/undrain").status_code == 303
    assert "Take work again" not in admin.get("/workers").text
    assert press(room.browser("member"), f"/workers/{box.subject}/drain").status_code == 403


def test_cancel_and_run_again_are_presses_of_the_owner(room: Room, ada: httpx.Client, bob: httpx.Client) -> None:
    job = room.job(room.who(ada))

    assert press(bob, f"/jobs/{job.id}/stop").status_code == 403
    assert "Cancel" in ada.get(f"/jobs/{job.id}").text
    assert press(ada, f"/jobs/{job.id}/stop").headers["location"] == f"/jobs/{job.id}"
    assert "Run again" in ada.get(f"/jobs/{job.id}").text, "whoever pressed sees at once that it worked"
    assert room.do(jobs.show(room.desk, room.who(ada), job.id)).state == "cancelled"
    assert press(ada, f"/jobs/{job.id}/retry").status_code == 303
    assert room.do(jobs.show(room.desk, room.who(ada), job.id)).state == "queued"


def test_an_admin_moves_a_job_to_the_front(room: Room, ada: httpx.Client) -> None:
    admin = room.browser("admin")
    room.job(room.who(ada), name="first")
    second = room.job(room.who(ada), name="second")

    assert press(ada, f"/jobs/{second.id}/front").status_code == 403
    assert press(admin, f"/jobs/{second.id}/front").status_code == 303

    assert re.search("1 second .* 2 first", text_of(admin.get("/queue").text))


def test_a_job_that_is_not_there_is_a_friendly_page(ada: httpx.Client) -> None:
    answer = ada.get("/jobs/nothing")

    assert answer.status_code == 404
    assert "Not here" in answer.text


# --- strangers' words


def test_whatever_a_job_is_called_prints_and_logs_stays_text(room: Room, ada: httpx.Client) -> None:
    admin, box = room.browser("admin"), room.worker("box<script>alert(1)</script>")
    found = []
    for text in EVIL:
        name, label = text[:30], re.sub(r"[\x00-\x1f\x7f-\x9f\u202a-\u2069]", "", text)[:100]
        room.ready(box, labels={"room": "a"})
        job = room.job(room.who(ada), f"echo '{text}'", name=label[:30] or name, env={"E": label})
        lease = room.start(box)
        room.prints(box, lease, text + "\n" + text * 3)
        room.logs(box, lease, Point(0, 1.0, {label: 1.0}, {label: room.upload(picture())}, seq=0))
        room.finish(box, lease, 1, reason=text, outputs=room.tree({label.replace("/", "_"): b"x"}))
        found += [ada.get(f"/jobs/{job.id}").text, admin.get(f"/jobs/{job.id}").text]
    found += [ada.get(path).text for path in ("/", "/queue", "/workers", "/jobs/<script>alert(1)", "/jobs/%E2%80%AE")]
    found += [admin.get("/workers").text, press(ada, "/submit", command=EVIL[0], gpu=EVIL[2]).text]

    for html in found:
        assert_harmless(html)
        assert not re.search("[\u202a-\u202e\u2066-\u2069\u0007\x1b]", html)
    assert "<script>alert(1)</script>" in text_of(found[0])


def test_a_reason_is_a_sentence_in_which_names_are_set_off() -> None:
    assert said("`gpu-box` has room", "wait") == "<em>gpu-box</em> has room. <b>Wait</b>"
    assert said("waits for <b>`x") == "Waits for &lt;b&gt;`x"
    assert "\u202e" not in said("a\u202eb `c\u202ed`")


# --- figures


@given(st.lists(st.floats(allow_nan=True), max_size=200), st.integers(1, 3))
def test_figures_keep_their_order_and_their_bounds(values: list[float], attempts: int) -> None:
    figures = Figures()
    for attempt in range(1, attempts + 1):
        figures.add(Point(i, 0.0, {"loss": v}, seq=i, attempt=attempt) for i, v in enumerate(values))

    line = figures.series.get("loss", [])
    assert [x for x, _ in line] == sorted({x for x, _ in line}), "a new attempt takes the place of what was lost"
    assert all(math.isfinite(y) for _, y in line)


def test_a_job_that_logs_without_end_does_not_fill_the_hub() -> None:
    figures = Figures()

    figures.add(Point(i, 0.0, {"loss": 1.0, f"name {i}": 2.0}, seq=i, attempt=1) for i in range(5_000))

    assert len(figures.series["loss"]) <= MOST_KEPT
    assert figures.series["loss"][0][0] == 0
    assert figures.series["loss"][-1][0] == 4_999
    assert len(figures.series) <= MOST_NAMES
    assert len(figures.curves) + figures.more == len(figures.series)


# --- the form


def test_a_filled_in_form_is_the_job_that_it_describes() -> None:
    fields = {
        "command": "python train.py\r\n",
        "gpu": "24GB..:2",
        "cpu": "4",
        "memory": "8GB",
        "labels": "room=lab, a=b",
    }
    fields |= {"env": "A=1\nB=two=2\n\n", "secret:TOKEN": "on", "secret:../x": "on", "timeout": "2h", "priority": "-3"}

    spec = spec_of(fields)

    assert spec.command == ["/bin/sh", "-c", "python train.py"]
    assert (spec.resources.gpu, spec.resources.cpu, spec.resources.labels) == (
        "24GB..:2",
        "4",
        {"room": "lab", "a": "b"},
    )
    assert spec.env == {"A": "1", "B": "two=2"}
    assert (spec.secrets, spec.timeout_s, spec.priority) == (["TOKEN"], 7200, -3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "no command"),
        ({"command": "x", "gpu": "24XB"}, "24XB"),
        ({"command": "x", "env": "no sign"}, "name=value"),
        ({"command": "x", "priority": "high"}, "priority"),
        ({"command": "x", "timeout": "soon"}, "timeout"),
        ({"command": "x", "project": "../../etc"}, "choose the folder again"),
        ({"command": "x", "project": "0" * 64 + "-10"}, "upload it first"),
    ],
)
def test_a_form_that_is_wrong_comes_back_filled_in_with_the_reason(
    ada: httpx.Client, fields: dict[str, str], words: str
) -> None:
    answer = press(ada, "/submit", name="keep me", **fields)

    assert answer.status_code == 422
    assert words in answer.text
    assert 'value="keep me"' in answer.text
    assert 'role="alert"' in answer.text


def test_a_job_is_submitted_without_a_script_and_a_double_click_is_one_job(room: Room, ada: httpx.Client) -> None:
    room.do(secrets.put(room.desk, room.who(ada), "HF_TOKEN", SecretValue("hush")))
    html = ada.get("/submit").text
    key = re.search(r'name="key" value="(\w+)"', html)
    assert key is not None
    assert "HF_TOKEN" in html
    assert "hush" not in html
    fields = {"command": "nvidia-smi", "name": "look", "key": key[1], "secret:HF_TOKEN": "on"}

    first, second = press(ada, "/submit", **fields), press(ada, "/submit", **fields)

    assert first.status_code == 303
    assert first.headers["location"] == second.headers["location"]
    job = room.do(jobs.show(room.desk, room.who(ada), first.headers["location"].rpartition("/")[2]))
    assert job.spec is not None
    assert (job.spec.command[2], job.spec.secrets) == ("nvidia-smi", ["HF_TOKEN"])


def test_where_it_would_run_is_said_and_nothing_is_submitted(room: Room, ada: httpx.Client) -> None:
    room.ready(room.worker("gpu-box"), now=BIG)

    text = text_of(press(ada, "/submit/check", command="x", gpu="2").text)

    assert "It would start now, on gpu-box" in text
    assert room.do(jobs.list_jobs(room.desk, room.who(ada))) == []


# --- coming in and leaving


def test_a_member_link_lets_a_browser_act_under_its_own_name(room: Room) -> None:
    code = room.invite("member", uses=1)
    browser = httpx.Client(base_url=room.url, headers={"Origin": room.url})

    assert "Come in" in browser.get(f"/j/{code}").text
    entered = browser.post(f"/j/{code}/enter", data={"name": "  Ada\u202e <b>  "})

    cookie = entered.headers["set-cookie"].lower()
    assert all(word in cookie for word in ("httponly", "samesite=strict", "max-age=604800", "path=/"))
    assert "Ada &lt;b&gt;, member" in browser.get("/").text
    assert press(browser, "/submit", command="true").status_code == 303
    assert browser.post(f"/j/{code}/enter").headers["location"] == "/", "a second click uses nothing up"


def test_a_viewer_sees_the_queue_and_may_press_nothing(room: Room, ada: httpx.Client) -> None:
    job, viewer = room.job(room.who(ada), name="somebodys"), room.viewer()

    assert "somebodys" in viewer.get("/queue").text
    assert "Submit" not in text_of(viewer.get("/").text)
    assert viewer.get("/submit").status_code == 403
    viewer.headers["Origin"] = room.url
    assert press(viewer, f"/jobs/{job.id}/stop").status_code == 403
    assert press(viewer, "/submit", command="x").status_code == 403


def test_a_credential_signs_in_and_out(room: Room, ada: httpx.Client) -> None:
    assert "Ada, member" in ada.get("/").text

    answer = press(ada, "/sign-out")

    assert answer.headers["location"] == "/"
    assert 'potluck_session=""' in answer.headers["set-cookie"]
    assert ada.get("/").status_code == 401


def test_a_wrong_credential_is_explained_and_too_many_are_put_off(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "FAILURES_PER_MINUTE", 3)
    wrong = room.token("member")[:-1] + "?"

    answers = [httpx.post(room.url + "/sign-in", data={"credential": wrong}) for _ in range(4)]

    assert [answer.status_code for answer in answers] == [401, 401, 401, 429]
    assert "checksum" in answers[0].text
    assert wrong not in answers[0].text
    assert answers[3].headers["retry-after"] == "60"


def test_a_machines_credential_signs_nobody_in(room: Room) -> None:
    answer = httpx.post(room.url + "/sign-in", data={"credential": room.token("worker")})

    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


def test_patience_forgets_after_a_minute_and_remembers_only_so_many() -> None:
    patience = session.Patience()
    for _ in range(session.FAILURES_PER_MINUTE):
        patience.failed("a", 0.0)

    assert patience.is_over("a", 30.0)
    assert not patience.is_over("a", 61.0)
    assert not patience.is_over("b", 30.0)
    for number in range(3 * session.MOST_ADDRESSES):
        patience.failed(f"{number}", 100.0)
    assert len(patience._failures) <= session.MOST_ADDRESSES


# --- live


def test_what_a_job_logs_and_becomes_is_sent_as_it_comes(room: Room, ada: httpx.Client) -> None:
    box = room.worker("gpu-box")
    room.ready(box)
    job = room.job(room.who(ada), name="live")
    lease = room.start(box)
    frame = re.search(r'data-frame="([^"]+)"', ada.get(f"/jobs/{job.id}").text)
    assert frame is not None

    with ada.stream("GET", "/live", params={"job": job.id, "after": frame[1]}) as stream:
        lines = stream.iter_lines()
        room.logs(box, lease, Point(0, 1.0, {"loss": 2.5}, seq=0))
        event = next(line for line in lines if line.startswith("data: {") and "curve-1" in line)
        room.finish(box, lease, 3)
        ended = next(line for line in lines if line.startswith("data: {") and "exit code 3" in line)

    assert "loss is 2.5" in event
    assert "r-job_head" in ended


def test_a_log_is_shown_from_its_end_when_it_is_long(room: Room, ada: httpx.Client) -> None:
    box = room.worker("gpu-box")
    room.ready(box)
    job = room.job(room.who(ada))
    lease = room.start(box)
    room.prints(box, lease, "".join(f"line {number}\n" for number in range(30_000)))

    html = ada.get(f"/jobs/{job.id}").text

    assert "line 29999" in html
    assert "line 100\n" not in html
    offset = re.search(r'data-offset="(\d+)"', html)
    assert offset is not None
    assert int(offset[1]) > 100_000
    assert job_pages.TAIL_BYTES <= 65536
    assert ada.get(f"/jobs/{job.id}", params={"attempt": 7}).status_code == 200


def test_the_events_of_the_first_page_keep_what_is_in_jobs_to_themselves(room: Room, ada: httpx.Client) -> None:
    job = room.job(room.who(ada), name="idea")
    room.do(jobs.stop(room.desk, room.who(ada), job.id))

    assert "stopped by Ada" not in room.viewer().get("/").text
    assert room.do(runs.events(room.desk, limit=5))
    assert isinstance(job.spec, JobSpec)
