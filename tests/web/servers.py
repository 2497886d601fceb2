"""`diffmorpher web` as a process of its own, and visitors who speak HTTP with it as a browser or a program does."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from glob import glob
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit


class Server:
    """`diffmorpher web` as a process; its temporary files lie in `folder`."""

    def __init__(self, folder: Path, *options: str, cwd: Path | None = None, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, self.url = folder, f"http://127.0.0.1:{port}/"
        self._log = folder.parent / f"{folder.name}.log"
        folder.mkdir(exist_ok=True)  # else Python takes another one for its temporary files
        self.process = subprocess.Popen(
            [sys.executable, "-m", "diffmorpher", "web", "--port", str(port), "--keep", "0", *options],
            env=os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"} | environment,
            stderr=self._log.open("w"),
            cwd=cwd,
        )
        deadline = time.monotonic() + 60
        while "Open http" not in self.log:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log
            time.sleep(0.1)
        self.own = self.files("uploads/*/*")  # the page's own pictures

    @property
    def log(self) -> str:
        return self._log.read_text()

    def files(self, pattern: str) -> list[Path]:
        # Path.glob fails where a folder goes while it looks.
        return sorted(map(Path, glob(f"{self.folder}/diffmorpher-web-*/{pattern}", include_hidden=True)))

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=30)


class Client:
    """Whoever visits the server: its pulse tells that he is there, as that of a browser and of gradio_client does."""

    def __init__(self, server: Server) -> None:
        import httpx

        self.server, self.key = server, secrets.token_hex(12)
        self.http = httpx.Client(base_url=server.url, timeout=600)
        self._config = self.http.get("config").json()
        self._parts = {part["id"]: part for part in self._config["components"]}
        pulse = self.http.build_request("GET", f"gradio_api/heartbeat/{self.key}")
        self._open = [self.http.send(pulse, stream=True)]

    def leave(self) -> None:
        for stream in self._open:
            stream.close()
        self.http.close()

    def upload(self, name: str, data: bytes, kind: str = "image/png") -> dict[str, Any]:
        answer = self.http.post("gradio_api/upload", files={"files": (name, data, kind)})
        assert answer.status_code == 200, answer.text
        return {"path": answer.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def upload_half(self, name: str, data: bytes) -> None:
        """Break off in the middle."""
        head = f'--X\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        with socket.create_connection(("127.0.0.1", urlsplit(self.server.url).port)) as wire:
            wire.sendall(
                b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=X\r\n"
                b"Content-Length: %d\r\n\r\n" % (len(head) + len(data) + 9) + head + data[: len(data) // 2]
            )
            time.sleep(0.2)

    # ---- as a program

    def call(self, images: Any, prompts: Any = None, **settings: Any) -> Iterator[str]:
        """The endpoint /morph: its messages as they come."""
        names = [each["parameter_name"] for each in self._parameters()]
        return self._asked("morph", [images, prompts, *(settings.get(name) for name in names[2:])])

    def _parameters(self) -> list[dict[str, Any]]:
        return self.http.get("gradio_api/info").json()["named_endpoints"]["/morph"]["parameters"]

    # ---- as a browser

    def add(self, *files: dict[str, Any]) -> str:
        """Pictures, as the page adds them; what it says then."""
        gallery = [{"image": file, "caption": None} for file in files]
        index, data = self._event("pick", "change", {"pick": gallery})
        body = {"data": data, "fn_index": index, "session_hash": self.key}
        answer = self.http.post("gradio_api/run/predict", json=body)
        assert answer.status_code == 200, answer.text
        return answer.text

    def press_morph(self, **fields: Any) -> Iterator[str]:
        """The button: its messages as they come. fields: values of the page, by their ids ("prompt-1")."""
        return self._asked(*self._event("morph", "click", fields))

    def _event(self, part: str, event: str, fields: dict[str, Any]) -> tuple[int, list[Any]]:
        """Number of the page's function, and what the page would send to it."""

        def named(number: int) -> str | None:
            return self._parts.get(number, {"props": {}})["props"].get("elem_id")

        (found,) = (
            each
            for each in self._config["dependencies"]
            if any((named(number), what) == (part, event) for number, what in each["targets"])
        )
        values = [fields.get(named(n) or "", self._parts[n]["props"].get("value")) for n in found["inputs"]]
        return found["id"], values

    def _asked(self, what: str | int, data: list[Any]) -> Iterator[str]:
        body = {"data": data, "session_hash": self.key}
        if isinstance(what, int):
            body["fn_index"] = what
            answer = self.http.post("gradio_api/queue/join", json=body)
        else:
            answer = self.http.post(f"gradio_api/call/{what}", json=body)
        assert answer.status_code == 200, answer.text
        stream = self.http.build_request("GET", "gradio_api/queue/data", params={"session_hash": self.key})
        self._open.append(self.http.send(stream, stream=True))
        return (line for line in self._open[-1].iter_lines() if line.startswith("data:"))


def outcome(messages: Iterator[str], seen: Callable[[str], None] = lambda line: None) -> tuple[str, str]:
    """("film", its address), or ("error", its sentence), whichever of the two ways it was asked for."""
    for line in messages:
        seen(line)
        message = json.loads(line.removeprefix("data:"))
        data = json.dumps(message.get("output", ""), ensure_ascii=False)
        said = re.search(r"note error[^>]*>([^<]*)<", data) or re.search(r'"error": "((?:[^"\\]|\\.)*)"', data)
        if said:
            return "error", unescape(json.loads(f'"{said[1]}"'))
        film = re.search(r'src=\\"([^"\\]*\.mp4)\\"', data) or re.search(r'"path": "([^"]*\.mp4)"', data)
        if film:
            return "film", film[1] if "gradio_api" in film[1] else f"gradio_api/file={quote(film[1])}"
        assert message["msg"] not in ("process_completed", "close_stream", "unexpected_error"), line
    raise AssertionError("nothing came of it")
