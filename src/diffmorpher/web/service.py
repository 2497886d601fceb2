"""The HTTP service of `diffmorpher serve`: films for programs. Importing this module needs the extra `serve`."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from socket import AI_PASSIVE, SOCK_STREAM, create_server, getaddrinfo
from socket import socket as Socket
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import Depends, FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse

from ..errors import ConfigError, UserError
from ..files.places import check_place
from ..models.catalog import check_model
from ..progress import say
from ..recipe import Recipe, film_name
from .checks import MAX_PICTURE_BYTES, check_picture, of_pictures, with_pictures
from .guard import BodyLimit
from .jobs import Studio
from .settings import MAX_PICTURES, NAMES, chosen, different_names
from .store import Full, Store, StoredJob
from .worker import RayWorker, Worker

#: Bytes of one request: the pictures, and room for the rest.
MAX_BODY = MAX_PICTURES * MAX_PICTURE_BYTES + 2**20
#: Bytes of a picture's name.
MAX_NAME = 80
#: Seconds between looks at a job whose progress is followed.
LOOK = 0.2
#: What a finished job can be asked for.
FILES = {"film.mp4": "video/mp4", "frames.zip": "application/zip", "recipe.toml": "application/toml"}
_LOCAL = ("127.0.0.1", "localhost", "::1")


def build(store: Store, token: str | None = None) -> FastAPI:
    """The service on a store. token: asked for with every request but that for its health; None asks for none."""

    def allowed(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token is not None and not hmac.compare_digest(given.encode("latin-1"), token.encode()):
            raise HTTPException(401, "give the token: Authorization: Bearer TOKEN.", {"www-authenticate": "Bearer"})

    def job(key: str) -> StoredJob:
        found = store.get(key)
        if found is None:
            raise HTTPException(404, f"there is no job {key!r}.")
        return found

    app = FastAPI(title="diffmorpher", description=__doc__.splitlines()[0])
    app.add_middleware(BodyLimit, most=MAX_BODY)
    guarded: dict[str, Any] = {"dependencies": [Depends(allowed)]}

    @app.exception_handler(UserError)
    def mistake(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 400)

    @app.exception_handler(Full)
    def full(request: Request, error: Full) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 429, {"retry-after": "60"})

    @app.get("/health")
    def health() -> dict[str, str]:
        """Whether the service is there."""
        return {"status": "ok"}

    @app.post("/jobs", status_code=202, **guarded)
    def add(
        pictures: Annotated[list[UploadFile], File(description="two or more, in order")],
        prompts: Annotated[list[str], Form(description="one for all, one for each, or none")] = [],  # noqa: B006
        settings: Annotated[str, Form(description='JSON, by the names of docs/web.md, such as {"frames": 24}')] = "{}",
    ) -> JSONResponse:
        """Have a film made. What cannot work is said at once."""
        recipe = replace(read_settings(settings), prompts=tuple(prompts))
        names = [safe_name(each.filename or "picture") for each in pictures]
        added = store.add(film_name(names), lambda folder: fill(folder, recipe, different_names(names), pictures))
        return JSONResponse(added.described(), 202, {"location": f"/jobs/{added.id}"})

    @app.get("/jobs", **guarded)
    def listed(limit: int = 100, state: str | None = None) -> list[dict[str, Any]]:
        """The last jobs, the newest first."""
        return [each.described() for each in store.last(max(1, min(limit, 1000)), state)]

    @app.get("/jobs/{key}", **guarded)
    def shown(found: StoredJob = Depends(job)) -> dict[str, Any]:
        """How far it is."""
        return found.described()

    @app.delete("/jobs/{key}", **guarded)
    def cancel(found: StoredJob = Depends(job)) -> dict[str, Any]:
        """Cancel it: at once while it waits, within one step while it runs."""
        store.cancel(found.id)
        return job(found.id).described()

    @app.get("/jobs/{key}/events", **guarded)
    def events(found: StoredJob = Depends(job)) -> StreamingResponse:
        """Its progress as server-sent events, until it is over."""
        return StreamingResponse(follow(store, found.id), media_type="text/event-stream")

    @app.get("/jobs/{key}/{name}", **guarded)
    def file(name: Literal["film.mp4", "frames.zip", "recipe.toml"], found: StoredJob = Depends(job)) -> FileResponse:
        """What came of it."""
        path = store.folder(found.id) / name
        if not path.is_file() or (name != "recipe.toml" and found.state != "done"):
            raise HTTPException(409, f"this job is {found.state}, so it has no {name}.")
        called = f"{found.name}{PurePath(name).suffix}"
        return FileResponse(path, media_type=FILES[name], filename=called)

    return app


def read_settings(text: str) -> Recipe:
    """The recipe that a client's settings ask for, within the page's limits. Raises `ConfigError`."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the settings are no JSON: {error}.") from error
    if not isinstance(said, dict):
        raise ConfigError(f"the settings are {text[:40]!r}, but must be an object of names and values.")
    Recipe().changed(**{name: None for name in said if name != "preset"})  # names what is not known
    if unheard := next(
        (name for name, value in said.items() if name not in NAMES and value not in (None, "", [])), None
    ):
        raise ConfigError(f"the service does not take {unheard!r}; it takes {', '.join(NAMES)}.")
    recipe = chosen(said)
    check_model(recipe.model)
    return recipe


def safe_name(name: str) -> str:
    """A client's name for a picture as one that a file can have."""
    plain = re.sub(r"[^\w.-]", "_", PurePath(name.replace("\\", "/")).name)
    return plain.encode()[-MAX_NAME:].decode(errors="ignore").lstrip(".-") or "picture"


def fill(folder: Path, recipe: Recipe, names: Sequence[str], pictures: Sequence[UploadFile]) -> None:
    """Put the pictures and their recipe into a job's folder. Raises `UserError` for what cannot be made."""
    recipe = of_pictures(recipe, names, recipe.prompts)
    (folder / "pictures").mkdir()
    files = [folder / "pictures" / name for name in names]
    for path, picture in zip(files, pictures, strict=True):
        path.write_bytes(picture.file.read())
        check_picture(path)
    recipe, _ = with_pictures(recipe, names, files)
    replace(recipe, pictures=tuple(map(str, files))).write(folder / "recipe.toml")


async def follow(store: Store, key: str) -> AsyncIterator[str]:
    """A job's states as server-sent events, each when it differs from the one before."""
    last: dict[str, Any] = {}
    while True:
        job = await asyncio.to_thread(store.get, key)
        if job is None:
            return
        if job.described() != last:
            last = job.described()
            yield f"event: {'end' if job.is_over else 'progress'}\ndata: {json.dumps(last)}\n\n"
        if job.is_over:
            return
        await asyncio.sleep(LOOK)


def serve(
    root: Path, host: str, port: int, token: str | None, ray: str | None = None, jobs: int = 1, page: Path | None = None
) -> None:
    """Serve until it is stopped. Raises `ConfigError` where others could ask without a token, or there is no such cluster.

    ray: the address of a cluster whose actors make the films, "local" starts one of `jobs` workers. page: an empty folder for
    the files of the page, which is then at /page; whoever knows the token may open it, with any name.
    """
    if host not in _LOCAL and not token:
        raise ConfigError("others can reach that --host: set a token in the environment as DIFFMORPHER_TOKEN first.")
    if token is not None and not (token.isascii() and token.isprintable() and token == token.strip()):
        raise ConfigError("DIFFMORPHER_TOKEN has signs that not every program can send: take plain letters and digits.")
    check_place(root, folder=True)
    socket = listening(host, port)
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again once it has stopped
        signal.signal(number, lambda *_: None)
    try:
        store = Store(root)
    except BaseException:
        socket.close()
        raise
    app = build(store, token)
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=2))
    studio = None
    if ray is not None:
        worker: Worker | RayWorker = RayWorker(store, ray, jobs, lambda: setattr(server, "should_exit", True))
    elif page is not None:
        studio = mounted(app, page, token)
        worker = Worker(store, studio.line, studio.model)
    else:
        worker = Worker(store)
    try:
        worker.start()
        where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        say(f"Films are made at {where}/jobs; {where}/docs says how to ask. Ctrl-C stops it.")
        if page is not None:
            say(f"The page is at {where}/page.")
        server.run(sockets=[socket])
    finally:
        worker.stop()
        store.close()
        socket.close()
        if studio is not None:
            studio.close()
    if isinstance(worker, RayWorker) and worker.error is not None:
        raise worker.error


def listening(host: str, port: int) -> Socket:
    """A socket that others can connect to. Raises `ConfigError` where the port is taken, or is no one's to take."""
    try:
        family, _, _, _, address = getaddrinfo(host, port, type=SOCK_STREAM, flags=AI_PASSIVE)[0]
        return create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"nothing can be served at {host}:{port} ({reason}): give another --port or --host."
        ) from error


def mounted(app: FastAPI, folder: Path, token: str | None) -> Studio:
    """The page of `diffmorpher web`, in this service under /page. Raises `UserError` where its packages are missing."""
    try:
        from .page import mount
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("gradio", "gradio_client"):
            raise
        raise UserError("the page needs another package: pip install 'diffmorpher[web]'.") from error
    studio = Studio(folder)
    mount(app, studio, "/page", None if token is None else lambda name, given: hmac.compare_digest(given, token))
    return studio
