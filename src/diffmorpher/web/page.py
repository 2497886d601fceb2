"""The web page of `diffmorpher web`: it is put together and served here; the work is done in `jobs.py`.

Importing this module needs the extra `web`. The page is built without torch, so that it is there at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# Read by gradio and the hub when they are imported: the page sends nothing to anybody.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
from starlette.middleware import Middleware

from ..errors import UserError
from ..models.catalog import ASSETS
from ..progress import say, wait
from ..recipe import Recipe
from . import html
from .checks import MAX_FILE_BYTES
from .estimate import length
from .guard import BodyLimit, Guard
from .jobs import Studio, explain
from .line import Job
from .panel import models, placeholders, settings_panel
from .parts import Result, Updates, key_of, quietly
from .programs import STATES, Page, add_endpoint
from .settings import MAX_PICTURES, chosen, fields_of, weighted
from .storyboard import ABOUT, Storyboard

_HERE = Path(__file__).parent
_LOCAL = ("127.0.0.1", "localhost", "::1")

#: Bytes of one upload: a LoRA for each picture, and room for the rest.
MAX_BODY = MAX_PICTURES * MAX_FILE_BYTES + 2**20

#: Gives a tab of the browser a name that survives loading the page anew, and that nobody else knows.
_TOKEN = """() => {
    const made = () => [...crypto.getRandomValues(new Uint8Array(24))].map((x) => x.toString(16).padStart(2, '0')).join('');
    if (!sessionStorage.getItem('visit')) sessionStorage.setItem('visit', made());
    return [sessionStorage.getItem('visit')];
}"""


def serve(
    root: Path, host: str, port: int | None, share: bool, auth: tuple[str, str] | None, keep: float = 0.0
) -> None:
    """Serve the page until it is stopped. Raises `UserError` for a port that is taken.

    root: an empty folder for all temporary files; the uploads in it are where the environment's GRADIO_TEMP_DIR says. keep: how
    long a visit is kept after its page was left, in seconds.
    """
    typed_models = auth is not None or (host in _LOCAL and not share)
    studio = Studio(root, None if typed_models else {name for _, name in models(False)}, keep=keep)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    page = build(studio, typed_models)
    studio.uploads.own.update(Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*"))
    try:
        try:
            _, url, public = page.launch(
                server_name=host,
                server_port=port,
                share=share,
                auth=auth,
                prevent_thread_lock=True,
                quiet=True,
                state_session_capacity=STATES,
                **_served(root),
            )
        except OSError as error:
            where = f"port {port}" if port else "every port from 7860 on"
            raise UserError(f"{where} cannot be used at {host} ({error}): give another --port or --host.") from error
        _announce(url, public, host, auth is not None)
        studio.warm_up()
        wait(stop)
        say("diffmorpher: stopped; all pictures and films of the page are removed.")
    finally:
        studio.close()
        page.close(verbose=False)


def mount(app: Any, studio: Studio, path: str, auth: Callable[[str, str], bool] | None) -> None:
    """Put the page into another app, under `path`; auth: whether a name and a password may see it, None for everyone."""
    page = build(studio, typed_models=True)
    studio.uploads.own.update(Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*"))
    page.state_session_capacity = STATES
    gr.mount_gradio_app(app, page, path, auth=auth, **_served(studio.root))
    studio.warm_up()


def _served(root: Path) -> dict[str, Any]:
    """How gradio serves the page, wherever it does."""
    return {
        "theme": _theme(),
        "css_paths": _HERE / "page.css",
        "head_paths": _HERE / "head.html",
        "favicon_path": str(ASSETS / "demo" / "fox-face.png"),
        "max_file_size": MAX_FILE_BYTES,
        "allowed_paths": [str(root / "sessions")],
        "app_kwargs": {"middleware": [Middleware(Guard), Middleware(BodyLimit, most=MAX_BODY)]},
        "footer_links": [],
        "show_error": False,  # whatever is not meant for visitors
        "run_history": False,  # it would keep visitors' pictures in the browser
        "enable_monitoring": False,
        "ssr_mode": False,
        "pwa": False,
        "mcp_server": False,
    }


def _announce(url: str, public: str | None, host: str, login: bool) -> None:
    """Where the page is, and what that exposes."""
    who = "with the name and password" if login else "without a password (--auth USER:PASSWORD asks for one)"
    say(f"Open {url} in a browser; Ctrl-C stops the page.")
    if host not in _LOCAL:
        say(f"It listens at {host}: everyone who can reach this machine can open it {who} and use its processor.")
    if public:
        say(f"{public} is public: everyone with that address can open it {who}; pictures travel through gradio.live.")
    if host in _LOCAL and not public:
        say("Only this machine can open it.")


def _theme() -> gr.themes.Base:
    """System fonts alone: none are fetched."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(  # gradio's own fall short of a contrast of 4.5 to 1
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_cancel_background_fill="#b91c1c",
        button_cancel_background_fill_dark="#b91c1c",
        button_cancel_text_color="white",
        button_cancel_text_color_dark="white",
    )


def build(studio: Studio, typed_models: bool = True) -> gr.Blocks:
    """The page, with its events."""
    with Page(title="diffmorpher", delete_cache=(600, 3600), fill_width=True) as page:
        gr.HTML("<h1>diffmorpher</h1><p>Turn one picture into another, and keep the film.</p>", elem_id="head")
        with gr.Row(elem_id="columns"):
            result = Result(studio)
            with gr.Column(elem_id="left"):
                pictures = Storyboard(studio)
                panel = settings_panel(typed_models, result.buttons)
                settings = panel.settings
            with gr.Column(elem_id="right"):
                result.film()
        pictures.connect(settings)
        files = [panel.audio, panel.path, panel.loras, panel.styles, panel.weights]

        async def on_morph(request: gr.Request, *values: Any) -> AsyncIterator[Updates]:
            session = studio.session(key_of(request))
            prompts, rest = values[:MAX_PICTURES], values[MAX_PICTURES:]
            (sound, path, loras, styles, weights), sent = rest[: len(files)], rest[len(files) :]
            session.prompts = [prompt or "" for prompt in prompts]
            session.values = dict(zip(settings, sent, strict=True))

            def start() -> Job:
                for file in [*(loras or []), *(styles or []), *filter(None, (sound, path))]:
                    studio.uploads.hold(session, Path(file))
                return studio.morph(
                    session,
                    studio.recipe(dict(zip(settings, sent, strict=True))),
                    list(session.pictures),
                    [prompt or "" for prompt in prompts[: len(session.pictures)]],
                    loras=[Path(file) for file in loras or []],
                    styles=weighted([Path(file) for file in styles or []], weights),
                    path_file=Path(path) if path else None,
                    audio=Path(sound) if sound else None,
                )

            async for update in result.follow(start, session):
                yield update

        def on_film(request: gr.Request, file: str | None) -> Updates:
            """Its settings fill the form, its prompts the fields beside the pictures."""
            film_note = panel.film_note
            if file is None:
                return {film_note: gr.update(visible=False)}
            session = studio.session(key_of(request))
            studio.uploads.hold(session, Path(file))
            try:
                recipe = replace(Recipe.read(file), device=None, dtype=None)  # the page's machine decides
                values, missing = fields_of(recipe)
                studio.check_model(chosen(values).model)  # what this page allows
            except UserError as error:
                text = explain(type(error)(str(error).replace(file, Path(file).name)))
                return {film_note: gr.update(value=html.note(text, "error"), visible=True)}
            text = f"The settings are those of {Path(file).name}."
            for what, files in (
                ("pictures", recipe.pictures),
                ("LoRA files", recipe.loras),
                ("styles", recipe.styles),
                ("sound", (recipe.audio,) if recipe.audio else ()),
            ):
                text += f" Add its {what}: {' and '.join(Path(name).name for name in files)}." if files else ""
            text += f" The page has no field for {', '.join(missing)}: not taken over." if missing else ""
            texts = [*recipe.prompts, *[""] * MAX_PICTURES][:MAX_PICTURES]
            return {
                **pictures.again(session, {name: values[name] for name in ABOUT}),
                **{settings[name]: value for name, value in values.items()},
                **dict(zip(pictures.prompts, texts, strict=True)),
                film_note: gr.update(value=html.note(text), visible=True),
            }

        panel.film.change(on_film, panel.film, [*pictures.outputs, *settings.values(), panel.film_note], **quietly())

        run = result.morph.click(
            on_morph,
            [*pictures.prompts, *files, *settings.values()],
            result.outputs,
            show_progress="hidden",
            concurrency_limit=None,
            api_visibility="private",
        )
        result.after(run)
        add_endpoint(studio, settings)

        for event in pictures.added:  # the pictures that were added last are what the film is made of
            event.then(lambda: (None, gr.update(visible=False)), None, [panel.path, panel.path_note], **quietly())
        panel.path.change(
            lambda file: gr.update(
                value=html.note(
                    f"The film will be made from {Path(file).name}, not from the pictures above." if file else ""
                ),
                visible=file is not None,
            ),
            panel.path,
            panel.path_note,
            **quietly(),
        )
        model_own = placeholders("", "")
        for field in ("model", "preset"):
            settings[field].change(
                lambda model, preset: [
                    gr.update(placeholder=text) for text in placeholders(model or "", preset).values()
                ],
                [settings["model"], settings["preset"]],
                [settings[name] for name in model_own],
                **quietly(),
            )

        def expect(request: gr.Request, *sent: Any) -> str:
            """How long the film will be, and how long it will take; nothing where the settings make none."""
            count = len(studio.session(key_of(request)).pictures)
            try:
                recipe = chosen(dict(zip(settings, sent, strict=True)))
                return html.expectation(length(recipe, count), studio.speed.seconds(recipe, count)) if count > 1 else ""
            except UserError:
                return ""

        every = [part for name, part in settings.items() if name != "fix_lora"]
        for event in [*(part.change for part in every)]:
            event(expect, [*settings.values()], result.expected, **quietly(trigger_mode="always_last"))
        for added in [*pictures.added, *pictures.moved, run]:
            added.then(expect, [*settings.values()], result.expected, **quietly())

        async def on_return(request: gr.Request, token: str) -> AsyncIterator[Updates]:
            session = studio.come_back(key_of(request), token)
            if not session.values and not session.pictures:
                yield {result.status: gr.skip()}  # to yield nothing would empty every field
                return
            yield {
                **pictures.again(session, session.values or fields_of(Recipe())[0]),
                **{settings[name]: value for name, value in session.values.items()},
            }
            job = session.jobs.get("morph")
            if job is not None and not job.done.is_set():
                async for update in result.follow(lambda: job, session):
                    yield update
            elif session.film is not None:
                yield result.again(session.film, session)

        token = gr.Textbox(visible=False)
        back = page.load(
            on_return,
            token,
            [*pictures.outputs, *settings.values(), *result.outputs],
            js=_TOKEN,
            **quietly(queue=True, concurrency_limit=None),
        )
        result.after(back)

        def leave(request: gr.Request) -> None:
            studio.leave(key_of(request))
            page.forget(key_of(request))

        page.unload(leave)
    page.queue(default_concurrency_limit=None, api_open=False)  # else a call may have no session, which all such shared
    return page
