"""The result on the page, with the events that concern it alone, and what its parts share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from PIL import Image

from ..errors import Cancelled, DiffMorpherError
from . import html
from .downloads import downloads
from .jobs import Film, Session, Studio, explain
from .line import Job
from .visits import KeptFilm

#: Seconds between two looks at a job.
LOOK = 0.15

Updates = dict[Any, Any]


def key_of(request: gr.Request) -> str:
    """Tells visitors apart. Gradio makes it anew whenever the page is loaded."""
    if not request.session_hash:  # else all who send none were one visitor
        raise gr.Error("The request needs a session_hash of your own choosing.", print_exception=False)
    return str(request.session_hash)


def quietly(**options: Any) -> dict[str, Any]:
    """For events that are the page's own affair: no overlay, no place in gradio's queue, no API."""
    return {"show_progress": "hidden", "queue": False, "api_visibility": "private"} | options


class Result:
    """The button, the progress, and the film with all that can be had from it."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio

    def buttons(self) -> None:
        """Morph, Cancel and the progress."""
        with gr.Row(elem_id="run"):
            self.morph = gr.Button("Morph", variant="primary", size="lg", elem_id="morph")
            self.cancel = gr.Button("Cancel", variant="stop", size="lg", visible=False, elem_id="cancel")
        self.expected = gr.HTML(elem_id="expected")
        self.status = gr.HTML(elem_id="status")
        self.cancel.click(self._cancel, None, None, **quietly())

    def film(self) -> None:
        """The right-hand column."""
        self.empty = gr.HTML(
            '<div class="empty"><p>Your film appears here.</p><p>Add two pictures and press <b>Morph</b>.</p></div>',
            elem_id="empty",
        )
        with gr.Column(visible=False, elem_id="result") as self.panel:
            with gr.Row(elem_id="views"):
                with gr.Column():
                    gr.HTML("<h2>The film</h2>")
                    # Browsers leave a film alone that is put into a page that stands already.
                    self.video = gr.HTML(
                        elem_id="film",
                        js_on_load="""const play = () => {
                            element.querySelector('video')?.play().catch(() => {});
                            const box = element.getBoundingClientRect();
                            const seen = box.top >= 0 && box.top + Math.min(box.height, 200) <= innerHeight;
                            if (!seen && element.querySelector('video'))
                                element.scrollIntoView({block: 'center', behavior: 'smooth'});
                        };
                        watch('value', play);
                        play();
                        element.addEventListener('click', (event) => {
                            if (event.target.closest('.full')) element.querySelector('video').requestFullscreen();
                        });""",
                    )
                with gr.Column():
                    gr.HTML("<h2>Any position between</h2>")
                    self.frame = gr.HTML(elem_id="frame")
            self.alpha = gr.Slider(0, 1, 0, step=0.01, label="Position", elem_id="alpha", buttons=[])
            self.strip = gr.HTML(
                elem_id="strip",
                js_on_load="""element.addEventListener('click', (event) => {
                    const button = event.target.closest('button[data-alpha]');
                    if (button) trigger('pick', {alpha: Number(button.dataset.alpha)});
                });""",
            )
            gr.HTML("<h2>Download</h2>")
            self.downloads = gr.HTML(elem_id="downloads")
            gr.HTML("<h2>Evenness</h2>")
            self.chart = gr.HTML(elem_id="chart")
            self.earlier = gr.HTML(elem_id="films")
            with gr.Accordion("The same film again", open=False, elem_id="again"):
                self.command = gr.Textbox(label="Command line", lines=3, interactive=False, elem_id="command")
                self.copy = gr.Button("Copy as command", size="sm", elem_id="copy")
                self.settings = gr.JSON(label="Settings, as they are in the film's metadata", elem_id="settings")
        self.outputs = [
            *(self.morph, self.cancel, self.status, self.empty, self.panel, self.video, self.downloads, self.alpha),
            *(self.frame, self.strip, self.chart, self.earlier, self.command, self.settings),
        ]
        self.alpha.input(self._nearest, self.alpha, self.frame, **quietly(trigger_mode="always_last"))
        self.alpha.release(
            self._sampled,
            self.alpha,
            self.frame,
            **quietly(queue=True, concurrency_limit=None, trigger_mode="always_last"),
        )
        self.strip.pick(self._picked, None, [self.alpha, self.frame], **quietly())
        self.copy.click(
            None,
            self.command,
            None,
            js="""async (text) => {
                const button = document.querySelector('#copy');
                try { await navigator.clipboard.writeText(text); button.innerText = 'Copied'; }
                catch { document.querySelector('#command textarea').select(); document.execCommand('copy'); }
            }""",
        )

    def after(self, run: Any) -> None:
        """What follows a run: the other formats are written while the film plays already."""
        run.then(
            self._write_downloads,
            None,
            self.downloads,
            **quietly(queue=True, concurrency_limit=None),
        )

    # ---- a run

    async def follow(self, start: Callable[[], Job], session: Session) -> AsyncIterator[Updates]:
        """Start a job in a thread, tell of it until it is done, show the film or say why there is none."""
        yield {self.morph: gr.update(interactive=False), self.status: html.note("Starting …")}
        idle = {self.morph: gr.update(interactive=True), self.cancel: gr.update(visible=False)}
        job: Job | None = None
        try:
            job = await asyncio.to_thread(start)
            yield {self.cancel: gr.update(visible=True), self.status: html.progress(job)}
            shown = ""
            while not job.done.is_set():
                await asyncio.sleep(LOOK)
                now = html.progress(job)
                if now != shown:
                    yield {self.status: now}
                shown = now
            if job.error is not None:
                raise job.error
        except Cancelled:
            yield {**idle, self.status: html.note("Cancelled.")}
            return
        except Exception as error:
            yield {**idle, self.status: html.note(explain(error), "error")}
            return
        yield idle | self._shown(job.result, session)

    def again(self, film: Film, session: Session) -> Updates:
        """The film of a visitor who came back."""
        return self._shown(film, session)

    def _cancel(self, request: gr.Request) -> None:
        job = self._studio.session(key_of(request)).jobs.get("morph")
        if job:
            job.cancel()

    def _shown(self, film: Film, session: Session) -> Updates:
        result, path = film.result, film.result.path
        last = path.num_images if path.loop else path.num_images - 1
        return {
            self.status: html.note(
                f"Done in {film.seconds:.0f} s: {len(result.frames)} frames. {film.cut}"
                + (" Only the file was written again: the frames are those of before." if film.again else "")
            ),
            self.empty: gr.update(visible=False),
            self.panel: gr.update(visible=True),
            self.video: html.video(file_url(film.video), film.name),
            self.downloads: html.downloads(
                {film.video.suffix[1:]: (file_url(film.video), film.video)}, list(html.DOWNLOADS)
            ),
            self.alpha: gr.update(
                value=0,
                maximum=last,
                info=f"0 is the first picture, {last} is "
                + ("the first again." if path.loop else "the last.")
                + " Let go for a new frame.",
            ),
            self.frame: html.frame(result.frames[0], 0),
            self.strip: html.strip(result.frames, result.alphas),
            self.chart: html.chart(result.distances_before, result.distances, result.ghost),
            self.earlier: html.films([_card(each) for each in session.earlier]),
            self.command: film.command
            or "A film from a saved path has no command; in Python: MorphPath.load(file, morpher).",
            self.settings: film.metadata,
        }

    async def _write_downloads(self, request: gr.Request) -> AsyncIterator[str]:
        session = self._studio.session(key_of(request))
        film, links = session.film, {}
        if film is None:
            return
        writers = downloads(film)
        for kind, write in writers.items():
            try:
                file = await asyncio.to_thread(session.written, write)
            except (DiffMorpherError, OSError):
                return  # the film's folder is gone: another one was made, or the visitor left
            links[kind] = (file_url(file), file)
            yield html.downloads(links, list(writers))

    # ---- frames at any position

    def _nearest(self, alpha: float, request: gr.Request) -> Any:
        film = self._studio.session(key_of(request)).film
        if film is None:
            return gr.skip()
        i = min(range(len(film.result.alphas)), key=lambda i: abs(film.result.alphas[i] - alpha))
        return html.frame(film.result.frames[i], film.result.alphas[i])

    async def _sampled(self, alpha: float, request: gr.Request) -> AsyncIterator[Any]:
        session = self._studio.session(key_of(request))
        try:
            job = self._studio.frame_at(session, float(alpha))
            while not job.done.is_set():
                await asyncio.sleep(LOOK / 3)
            if job.error is not None:
                raise job.error
        except Cancelled:
            return  # the slider was moved on
        except Exception as error:
            yield html.note(explain(error), "error")
            return
        yield html.frame(job.result, alpha)

    def _picked(self, event: gr.EventData, request: gr.Request) -> Updates:
        film = self._studio.session(key_of(request)).film
        alphas = film.result.alphas if film else []
        chosen = [i for i, alpha in enumerate(alphas) if abs(alpha - float(event.alpha)) < 1e-5]
        if film is None or not chosen:
            return {self.alpha: gr.skip()}
        alpha = alphas[chosen[0]]
        return {self.alpha: round(alpha, 2), self.frame: html.frame(film.result.frames[chosen[0]], alpha)}


def _card(film: KeptFilm) -> tuple[str, str, Image.Image, str, str]:
    recipe = file_url(film.recipe) if film.recipe else ""
    return file_url(film.video), film.video.name, film.poster, film.about, recipe


def file_url(file: Path) -> str:
    """Where gradio serves a file of a visitor's folder, relative to the page."""
    return "gradio_api/file=" + quote(str(file))
