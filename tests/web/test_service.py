"""The HTTP service: a store that forgets nothing, films that are the library's, a server that may be killed."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from conftest import ASSETS, tiny_pipeline
from diffmorpher import FitConfig, Morpher, Recipe, SampleConfig
from diffmorpher.errors import ConfigError
from diffmorpher.gather import gather
from diffmorpher.models.catalog import CATALOG
from diffmorpher.web.line import Line
from diffmorpher.web.service import MAX_BODY, build, safe_name, serve
from diffmorpher.web.store import ENDED, MAX_TRIES, Full, Store
from diffmorpher.web.worker import Worker

PICTURES = [("pictures", (f"{name}.png", (ASSETS / "demo" / f"{name}.png").read_bytes())) for name in ("pear", "rose")]


# ---- the store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "data", longest=3)
    yield store
    store.close()


def added(store: Store, count: int) -> list[str]:
    return [store.add(f"film {k}", lambda folder: None).id for k in range(count)]


def begun(store: Store) -> str:
    job = store.next(timeout=0)
    assert job is not None
    return job.id


def states(store: Store) -> list[str]:
    return [job.state for job in reversed(store.last())]


def test_jobs_are_begun_in_the_order_they_came(store: Store) -> None:
    keys = added(store, 3)
    assert [job.ahead for job in reversed(store.last())] == [0, 1, 2]
    assert [begun(store) for _ in keys] == keys
    assert store.next(timeout=0) is None
    with pytest.raises(Full):
        added(store, 4)


def test_a_job_ends_once(store: Store) -> None:
    (key,) = added(store, 1)
    with pytest.raises(ValueError, match="not running"):
        store.end(key, "done")
    begun(store)
    store.end(key, "done")
    with pytest.raises(ValueError, match="not running"):
        store.end(key, "failed")
    store.cancel(key)
    assert states(store) == ["done"]


def test_what_was_left_undone_waits_again_in_its_old_place(store: Store, tmp_path: Path) -> None:
    keys = added(store, 3)
    begun(store)
    begun(store)
    store.cancel(keys[1])
    assert store.progress(keys[1], "fit", 1, 2) is True and store.progress(keys[0], "fit", 1, 2) is False
    (tmp_path / "data" / "jobs" / "half-written").mkdir()
    store.close()
    again = Store(tmp_path / "data")
    assert states(again) == ["waiting", "cancelled", "waiting"]
    assert not (tmp_path / "data" / "jobs" / "half-written").exists()
    assert begun(again) == keys[0]
    again.close()


def test_what_ends_the_server_is_not_begun_for_ever(store: Store, tmp_path: Path) -> None:
    (key,) = added(store, 1)
    store.close()
    for _ in range(MAX_TRIES):
        again = Store(tmp_path / "data")
        assert begun(again) == key
        again.close()
    last = Store(tmp_path / "data")
    assert states(last) == ["failed"] and "ended 3 times" in last.last()[0].error
    last.close()


def test_a_second_server_leaves_the_first_ones_jobs_alone(store: Store, tmp_path: Path) -> None:
    keys = added(store, 2)
    begun(store)
    (store.folder("being-filled")).mkdir()
    for _ in range(MAX_TRIES):
        with pytest.raises(ConfigError, match="another server is at work in .*data': stop it"):
            Store(tmp_path / "data")
    assert states(store) == ["running", "waiting"] and store.folder("being-filled").is_dir()
    store.end(keys[0], "done")


def test_what_is_no_table_of_jobs_is_said(tmp_path: Path) -> None:
    for name, make in (("text", lambda file: file.write_text("mine\n" * 99)), ("folder", Path.mkdir)):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "jobs.sqlite")
        for _ in range(2):  # and the folder can be used again at once
            with pytest.raises(ConfigError, match="jobs.sqlite' is no table of jobs"):
                Store(tmp_path / name)
    for name in ("lock", "jobs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).mkdir() if name == "lock" else (tmp_path / name / name).touch()
        with pytest.raises(ConfigError, match=f"{name}' cannot be used for jobs"):
            Store(tmp_path / name)
    assert (tmp_path / "text" / "jobs.sqlite").read_text() == "mine\n" * 99


def test_old_jobs_go_with_their_files_and_others_stay(store: Store) -> None:
    keys = added(store, 2)
    store.end(begun(store), "done")
    time.sleep(0.01)
    store.tidy(hours=0)
    assert store.get(keys[0]) is None and not store.folder(keys[0]).exists()
    assert store.get(keys[1]) is not None and store.folder(keys[1]).exists()


def test_a_job_whose_files_cannot_be_written_is_none(store: Store) -> None:
    def fails(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.add("film", fails)
    assert store.last() == [] and list((store.root / "jobs").iterdir()) == []


def test_the_page_and_the_service_stand_in_one_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    line, gate, order = Line(), threading.Event(), []
    worker = Worker(store, line)
    monkeypatch.setattr(worker._maker, "make_job", lambda folder, progress: order.append(folder.name))
    worker.start()
    line.submit(lambda _: gate.wait(30))
    first, gone = added(store, 2)
    page = line.submit(lambda _: order.append("page"))
    telling, store.changed = store.changed, lambda key: None
    (late,) = added(store, 1)  # of two that come at once the second may be told of first
    store.changed = telling
    store._longest = 4
    (last,) = added(store, 1)
    store.changed(late)
    assert [job.ahead for job in reversed(store.last())] == [1, 2, 4, 5] and page.ahead == 3
    store.cancel(gone)
    assert store.get(last).ahead == 4 and page.ahead == 2  # type: ignore[union-attr]
    gate.set()
    deadline = time.monotonic() + 30
    while states(store) != ["done", "cancelled", "done", "done"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert order == [first, "page", late, last]
    worker.stop()


# ---- the service, in this process


@pytest.fixture
def client(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """With a worker, a cache, and a tiny model by the name of the bundled one."""
    monkeypatch.setenv("DIFFMORPHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DIFFMORPHER_CACHE_GB", "1")
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    quick = {"fit": FitConfig(rank=2, steps=2), "sample": SampleConfig(steps=2)}
    monkeypatch.setitem(CATALOG, "mini", replace(CATALOG["mini"], source=str(tmp_path / "tiny"), **quick))
    worker = Worker(store)
    worker.start()
    with TestClient(build(store)) as client:
        yield client
    worker.stop()


def asked(client: Any, pictures: Any = PICTURES, prompts: Any = (), **settings: Any) -> Any:
    return client.post("/jobs", files=pictures, data={"prompts": list(prompts), "settings": json.dumps(settings)})


def finished(client: TestClient, answer: Any) -> dict[str, Any]:
    """The job once it is over, by its events."""
    assert answer.status_code == 202, answer.text
    events = client.get(f"{answer.headers['location']}/events").text
    seen = [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if line.startswith("data: ")]
    assert events.count("event: end") == 1 and seen[-1]["state"] in ENDED
    return seen[-1]


def test_a_film_is_the_library_s_and_its_fit_is_made_once(client: TestClient, store: Store, tmp_path: Path) -> None:
    job = finished(client, asked(client, prompts=["a pear", "a rose"], frames=3, seed=5, fps=12))
    assert job["state"] == "done" and job["name"] == "pear-rose"
    film = client.get(f"/jobs/{job['id']}/film.mp4")
    assert film.headers["content-type"] == "video/mp4" and "pear-rose.mp4" in film.headers["content-disposition"]
    (tmp_path / "film.mp4").write_bytes(film.content)
    recipe, pictures = gather(Recipe.read(store.folder(job["id"]) / "recipe.toml"))
    Morpher.from_pretrained("mini").make(recipe, pictures).save(tmp_path / "wanted.mp4")
    assert film.content == (tmp_path / "wanted.mp4").read_bytes()
    with zipfile.ZipFile(io.BytesIO(client.get(f"/jobs/{job['id']}/frames.zip").content)) as pack:
        frames = [Image.open(io.BytesIO(pack.read(name))).size for name in pack.namelist()]
    assert frames == [(32, 32)] * 3
    assert b"seed = 5" in client.get(f"/jobs/{job['id']}/recipe.toml").content

    stages: list[str] = []
    noting, store.progress = store.progress, lambda key, stage, *rest: stages.append(stage) or noting(key, stage, *rest)
    again = finished(client, asked(client, prompts=["a pear", "a rose"], frames=4, seed=5))
    assert again["state"] == "done" and "sample" in stages and "fit" not in stages
    assert [each["id"] for each in client.get("/jobs").json()] == [again["id"], job["id"]]


def test_pacing_and_framing_are_the_library_s(client: TestClient, store: Store, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"seconds": 1.5, "hold": [0.25, 0], "reverse": True, "ease": "in"}
    settings |= {"size": "64x48", "focus": ["0.5,0.2", "center"]}
    job = finished(client, asked(client, **settings))
    film = client.get(f"/jobs/{job['id']}/film.mp4").content
    recipe, pictures = gather(Recipe.read(store.folder(job["id"]) / "recipe.toml"))
    assert recipe.seconds == 1.5 and recipe.hold == (0.25, 0) and recipe.focus == ("0.5,0.2", "center")
    Morpher.from_pretrained("mini").make(recipe, pictures).save(tmp_path / "wanted.mp4")
    assert film == (tmp_path / "wanted.mp4").read_bytes()
    stages: list[str] = []
    noting, store.progress = store.progress, lambda key, stage, *rest: stages.append(stage) or noting(key, stage, *rest)
    finished(client, asked(client, **settings | {"focus": "center"}))
    assert "fit" in stages, "a crop elsewhere is another picture"


def test_what_the_network_predicts_can_be_said(client: TestClient, store: Store, tmp_path: Path) -> None:
    quick: dict[str, Any] = {"frames": 3, "no_lora": True, "reschedule": False}
    job = finished(client, asked(client, **quick, prediction="v"))
    film = client.get(f"/jobs/{job['id']}/film.mp4").content
    recipe, pictures = gather(Recipe.read(store.folder(job["id"]) / "recipe.toml"))
    told = Morpher.from_pretrained("mini", prediction="v")
    told.make(recipe, pictures).save(tmp_path / "wanted.mp4")
    assert film == (tmp_path / "wanted.mp4").read_bytes()
    plain = finished(client, asked(client, **quick))
    assert client.get(f"/jobs/{plain['id']}/film.mp4").content != film


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"frames": 1}, "frames is 1"),
        ({"frames": 1000}, "at most 240"),
        ({"seconds": 60}, "at most 240"),
        ({"beat": True}, "needs a sound"),
        ({"focus": ["center"] * 3}, "3 focuses"),
        ({"frame": 3}, "did you mean frames"),
        ({"model": "no-such-model"}, "no-such-model"),
        ([], "must be an object"),
        ("[" * 100_000, "are no JSON"),
        ('{"a":' * 100_000, "are no JSON"),
        ({"stretch": "1e308"}, "at most 86400"),
        ({"stretch": [1e308]}, "at most 86400"),
        ({"seconds": 1e308}, "at most 86400"),
        ({"lora": "/etc/passwd"}, "does not take 'lora'; it takes model, frames"),
        ({"vae": "/etc/passwd"}, "does not take 'vae'"),
        ({"batch_size": 1e308}, "does not take 'batch_size'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_work_is_said_at_once(client: TestClient, settings: Any, said: str) -> None:
    text = settings if isinstance(settings, str) else json.dumps(settings)
    answer = client.post("/jobs", files=PICTURES, data={"settings": text})
    assert answer.status_code == 400 and said in answer.json()["detail"]
    assert client.get("/jobs").json() == []


def test_pictures_are_checked(client: TestClient, store: Store) -> None:
    one = asked(client, PICTURES[:1])
    same = asked(client, [PICTURES[0], PICTURES[0]])
    none = asked(client, [PICTURES[0], ("pictures", ("x.png", b"no picture"))])
    many = asked(client, PICTURES * 5)
    assert [each.status_code for each in (one, same, none, many)] == [400] * 4
    assert "two images" in one.json()["detail"] and "same picture" in same.json()["detail"]
    assert "x.png" in none.json()["detail"] and str(store.root) not in none.json()["detail"]
    assert "at most 8" in many.json()["detail"]
    assert list((store.root / "jobs").iterdir()) == []


def test_names_of_pictures_cannot_lead_elsewhere() -> None:
    assert safe_name("../../etc/passwd") == "passwd" and safe_name("C:\\a\\b c.png") == "b_c.png"
    assert safe_name("..") == "picture" and safe_name("") == "picture" and len(safe_name("x" * 300)) == 80
    long = safe_name("\U00020000" * 80 + ".png")
    assert len(long.encode()) <= 80 and long.endswith("\U00020000.png")


def test_cancel_stops_what_runs_and_what_waits(
    client: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = threading.Event(), threading.Event()
    noting = store.progress

    def progress(key: str, stage: str, step: int, steps: int) -> bool:
        if stage == "invert":
            reached.set()
            assert go_on.wait(60)
        return noting(key, stage, step, steps)

    monkeypatch.setattr(store, "progress", progress)
    first, second = asked(client, frames=2).json(), asked(client, frames=2, seed=1).json()
    assert reached.wait(60)
    early = client.get(f"/jobs/{first['id']}/film.mp4")
    assert early.status_code == 409 and "running" in early.json()["detail"]
    assert client.delete(f"/jobs/{second['id']}").json()["state"] == "cancelled"
    assert client.delete(f"/jobs/{first['id']}").json()["state"] == "running"
    go_on.set()
    deadline = time.monotonic() + 60
    while client.get(f"/jobs/{first['id']}").json()["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert states(store) == ["cancelled", "cancelled"]
    assert client.get("/jobs/no-such-job").status_code == 404


def test_a_token_is_asked_for(store: Store) -> None:
    client = TestClient(build(store, "secret"))
    assert client.get("/health").status_code == 200
    for path in ("/jobs", "/jobs/x", "/jobs/x/events", "/jobs/x/film.mp4"):
        assert client.get(path).status_code == 401, path
        assert client.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
    assert asked(client).status_code == 401
    assert client.get("/jobs", headers={"authorization": "Bearer secret"}).status_code == 200


def test_a_request_without_a_length_or_too_long_is_not_read(store: Store) -> None:
    client = TestClient(build(store))
    assert client.post("/jobs", content=iter([b"x"])).status_code == 411
    assert client.post("/jobs", headers={"content-length": str(MAX_BODY + 1)}, content=b"").status_code == 413


def test_the_documentation_of_the_service_names_what_it_takes(store: Store) -> None:
    paths = TestClient(build(store)).get("/openapi.json").json()["paths"]
    assert set(paths) == {"/health", "/jobs", "/jobs/{key}", "/jobs/{key}/events", "/jobs/{key}/{name}"}


def test_where_nothing_can_be_served_is_said_before_anything_is_begun(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for host, port, token, said in (
            ("127.0.0.1", taken.getsockname()[1], None, "nothing can be served at 127.0.0.1:.* already in use"),
            ("nohost.invalid", 8000, "secret", "nothing can be served at nohost.invalid:8000"),
            ("0.0.0.0", 8000, None, "set a token"),
            ("127.0.0.1", 8000, "t\u00f6k", "not every program can send"),
        ):
            with pytest.raises(ConfigError, match=said):
                serve(tmp_path / "jobs", host, port, token)
    assert not (tmp_path / "jobs").exists()


def test_a_second_serve_ends_before_it_touches_anything(tmp_path: Path) -> None:
    with Server(tmp_path / "data", tmp_path) as server:
        command = [sys.executable, "-m", "diffmorpher", "serve", "--data", str(tmp_path / "data"), "--port"]
        for port in (server.port, server.port + 1):
            done = subprocess.run([*command, str(port)], capture_output=True, text=True, timeout=60)
            assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
            assert ("already in use" if port == server.port else "another server is at work") in done.stderr


# ---- a server that is killed


class Server:
    """`diffmorpher serve` as a process, with a cache beside its data."""

    def __init__(self, data: Path, model: Path, *options: str) -> None:
        self._options = options
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._data, self.model, self._log = data, model, (data.parent / "log").open("a")
        self.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:  # a test has failed
            self.kill()

    def start(self) -> None:
        import httpx

        command = [sys.executable, "-m", "diffmorpher", "serve", "--port", str(self.port), "--data", str(self._data)]
        command += self._options
        cache = {"DIFFMORPHER_CACHE": str(self._data.parent / "cache"), "DIFFMORPHER_CACHE_GB": "1"}
        environment = os.environ | cache | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=environment, stderr=self._log, stdout=self._log)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self.process.poll() is None
            try:
                self.client.get("/health")
                return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    @property
    def jobs(self) -> list[dict[str, Any]]:
        return self.client.get("/jobs?limit=1000").json()

    @property
    def megabytes(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=30)
        self.client.close()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=30)


def test_a_killed_server_goes_on_where_it_was(tmp_path: Path) -> None:
    """What was fitted is not fitted again, what waited waits in its order, what was cancelled stays so."""
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    with Server(tmp_path / "data", tmp_path / "tiny") as server:
        quick = {"model": str(server.model), "frames": 2, "steps": 2, "lora_steps": 2, "lora_rank": 2}
        asks = [{"frames": 60, "seed": 1}, {"seed": 2}, {"seed": 3}]
        keys = [asked(server.client, **quick | ask).json()["id"] for ask in asks]
        server.client.delete(f"/jobs/{keys[1]}")
        while (job := server.client.get(f"/jobs/{keys[0]}").json())["stage"] != "sample":
            assert job["state"] in ("waiting", "running"), job
            time.sleep(0.01)
        server.kill()
        made = {file: file.stat().st_ino for file in (tmp_path / "cache").rglob("*.safetensors")}
        assert made, "nothing of the fit was kept"
        server.start()
        wait_until(server)
        assert [(job["id"], job["state"]) for job in reversed(server.jobs)] == [
            (keys[0], "done"),
            (keys[1], "cancelled"),
            (keys[2], "done"),
        ]
        done = {job["id"]: job["ended"] for job in server.jobs}
        assert done[keys[0]] < done[keys[2]]
        assert made == {file: file.stat().st_ino for file in made}, "the fit was made again"
        assert server.stop() == 0


@pytest.mark.slow
def test_no_job_is_lost_when_the_server_is_killed(tmp_path: Path) -> None:
    """50 clients, 200 jobs, a third of them cancelled, the server killed twice in the middle."""
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    started = time.monotonic()
    with Server(tmp_path / "data", tmp_path / "tiny") as server:
        settings = {"model": str(server.model), "frames": 3, "steps": 2, "preset": "preview"}

        def ask(number: int) -> str:
            answer = asked(server.client, seed=number, **settings)
            assert answer.status_code == 202, answer.text
            return answer.json()["id"]

        with ThreadPoolExecutor(50) as clients:
            keys = list(clients.map(ask, range(200)))
            list(clients.map(lambda key: server.client.delete(f"/jobs/{key}"), keys[::3]))
        for enough in (40, 80):
            wait_until(server, enough)
            server.kill()
            server.start()
        wait_until(server, 110)
        before = server.megabytes
        wait_until(server)
        print(
            f"{time.monotonic() - started:.0f} s; {before:.0f} MB with 110 films made, {server.megabytes:.0f} at the end"
        )
        assert server.megabytes < before + 20, "memory grows with every job"
        jobs = server.jobs
        assert sorted(job["id"] for job in jobs) == sorted(keys)
        assert {job["state"] for job in jobs} == {"done", "cancelled"}
        assert sum(job["state"] == "cancelled" for job in jobs) <= len(keys[::3])
        done = [job for job in reversed(jobs) if job["state"] == "done"]
        assert [job["ended"] for job in done] == sorted(job["ended"] for job in done), "the order was not kept"
        for job in done:
            assert server.client.get(f"/jobs/{job['id']}/film.mp4").content[4:8] == b"ftyp"
        assert server.stop() == 0


def wait_until(server: Server, done: int | None = None) -> None:
    """So many jobs are done, or all are over."""
    deadline = time.monotonic() + 900
    while True:
        states = [job["state"] for job in server.jobs]
        if all(state in ENDED for state in states) if done is None else states.count("done") >= done:
            return
        assert time.monotonic() < deadline and server.process.poll() is None
        time.sleep(0.1)


def ray_workers(server: Server) -> list[psutil.Process]:
    there = psutil.Process(server.process.pid).children(recursive=True)
    found = []
    for process in there:
        with suppress(psutil.Error):
            if "ray::_Actor" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.slow
def test_jobs_are_made_on_ray_though_workers_and_server_are_killed(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    with Server(tmp_path / "data", tmp_path / "tiny", "--jobs", "2", "--ray") as server:
        settings = {"model": str(server.model), "steps": 20, "lora_steps": 2, "lora_rank": 2}
        keys = [asked(server.client, seed=k, frames=40 if k % 3 else 4, **settings).json()["id"] for k in range(9)]
        wait_until(server, 1)
        for process in ray_workers(server)[:1]:
            process.kill()
        running = [job["id"] for job in server.jobs if job["state"] == "running"]
        assert running and server.client.delete(f"/jobs/{running[-1]}").status_code == 200
        wait_until(server, 3)  # the actor that was stopped makes the next one
        left = psutil.Process(server.process.pid).children(recursive=True)
        server.kill()
        psutil.wait_procs(left, timeout=30)
        server.start()
        wait_until(server)
        jobs = server.jobs
        assert [job["id"] for job in reversed(jobs)] == keys
        assert {job["id"] for job in jobs if job["state"] != "done"} <= {running[-1]}, jobs
        done = {job["id"] for job in jobs if job["state"] == "done"}
        key = next(key for k, key in enumerate(keys) if k % 3 and key in done)
        recipe, pictures = gather(Recipe.read(tmp_path / "data" / "jobs" / key / "recipe.toml"))
        Morpher.from_pretrained(str(server.model)).make(recipe, pictures).save(tmp_path / "wanted.mp4")
        assert (tmp_path / "wanted.mp4").read_bytes() == server.client.get(f"/jobs/{key}/film.mp4").content
        assert server.stop() == 0
        assert not [process for process in left if process.is_running()]


@pytest.mark.slow
def test_the_page_is_there_too_and_asks_for_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradio_client = pytest.importorskip("gradio_client")
    pytest.importorskip("gradio")
    monkeypatch.setenv("DIFFMORPHER_TOKEN", "secret")
    with Server(tmp_path / "data", tmp_path, "--page") as server:
        url = f"http://127.0.0.1:{server.port}/page/"
        with pytest.raises(ValueError, match="login"):
            gradio_client.Client(url, auth=("ann", "wrong"), verbose=False)
        page = gradio_client.Client(url, auth=("ann", "secret"), verbose=False)
        assert asked(server.client).status_code == 401
        server.client.headers["authorization"] = "Bearer secret"
        settings = {"frames": 3, "steps": 2, "preset": "preview"}
        asked(server.client, **settings)
        pictures = [
            gradio_client.handle_file(str(ASSETS / "demo" / f"{name}.png")) for name in ("fox-face", "wolf-face")
        ]
        film, figures = page.predict(pictures, None, api_name="/morph", **settings)
        assert figures["frames"] == 3 and Path(film).read_bytes()[4:8] == b"ftyp"
        assert [job["state"] for job in server.jobs] == ["done"], "the job that came first was made first"
        assert server.stop() == 0
