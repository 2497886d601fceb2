"""What programs meet: the endpoint `/morph` for `gradio_client` and plain HTTP, and what is sent to any part of the page."""

from __future__ import annotations

import asyncio
import inspect
import secrets
import time
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from ..errors import ConfigError
from .jobs import Studio, explain, figures
from .line import Job
from .parts import LOOK, key_of

#: Seconds for which a program's film can be fetched; most programs tell when they leave, plain HTTP does not.
KEPT = 3600.0
#: Visits whose fields gradio keeps, 0.4 MB each: more are forgotten, those that were used longest ago first.
STATES = 200


class Page(gr.Blocks):
    """Says in a sentence what gradio meets with exceptions of its own: what a page never sends, but a program may."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *more: Any, **named: Any) -> list[Any]:
        try:
            if _is_elsewhere(inputs):
                raise ValueError("an address, which gradio would fetch")
            return await super().preprocess_data(block_fn, inputs, *more, **named)
        except gr.Error:
            raise
        except Exception:
            raise gr.Error(
                "The request cannot be read: send the values that gradio_api/info lists, and pictures as files that were "
                "uploaded here before.",
                print_exception=False,
            ) from None

    async def postprocess_data(self, *given: Any, **named: Any) -> list[Any]:
        try:
            return await super().postprocess_data(*given, **named)
        except Exception as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise gr.Error("The film is gone, as its visitor has left.", print_exception=False) from None
            raise

    def forget(self, key: str) -> None:
        """Drop the fields of a visit that is over, which gradio would keep."""
        self.state_holder.session_data.pop(key, None)
        self.state_holder.time_last_used.pop(key, None)


def _is_elsewhere(sent: Any) -> bool:
    """Whether a file in it is an address."""
    if isinstance(sent, dict):
        return "://" in str(sent.get("path")) or any(map(_is_elsewhere, sent.values()))
    return isinstance(sent, (list, tuple)) and any(map(_is_elsewhere, sent))


def add_endpoint(studio: Studio, settings: dict[str, Any]) -> None:
    """The endpoint `/morph`, by parts that nobody sees; it takes the page's settings by name."""
    with gr.Row(visible=False):
        pictures = gr.File(label="Pictures, two or more", file_count="multiple", file_types=["image"])
        prompts = gr.JSON(label="Prompts: a list with one for all or one each, or nothing")
        film, facts = gr.File(label="The film, an mp4"), gr.JSON(label="The figures that --json prints")
        button = gr.Button()

    async def api(request: gr.Request, images: Any, prompts: Any = None, *sent: Any) -> tuple[str, Any]:
        program = studio.session(key_of(request))
        # Each call is a visit of its own, as a program may ask for several films at once.
        call = f"{key_of(request)} {secrets.token_hex(8)}"
        session = studio.session(call)

        def start() -> Job:
            files = [Path(image["path"]) for image in images or []]
            for file in files:
                studio.uploads.hold(program, file)  # it may be sent with other settings too
            texts = _texts(prompts)
            recipe = studio.recipe(dict(zip(settings, sent, strict=True)))
            for file in files:
                studio.add_picture(session, file, held=True)
            job = program.jobs[call] = studio.morph(session, recipe, session.pictures, texts)
            if program.closed:  # it has left meanwhile
                job.cancel()
            return job

        try:
            job = await asyncio.to_thread(start)
            while not job.done.is_set():
                await asyncio.sleep(LOOK)
            if job.error is not None:
                raise job.error
            out = Path(save_file_to_cache(job.result.video, film.GRADIO_CACHE))
            studio.uploads.hold(program, out)
            return str(out), figures(job.result)
        except Exception as error:
            raise gr.Error(explain(error), print_exception=False) from None
        finally:
            program.jobs.pop(call, None)
            program.until = time.monotonic() + KEPT
            studio.end(call)

    # Clients learn the names of the parameters from the signature.
    keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
    given = list(inspect.signature(api).parameters.values())[:3]
    named = [inspect.Parameter(name, keyword, default=None) for name in settings]
    api.__signature__ = inspect.Signature([*given, *named])  # type: ignore[attr-defined]
    button.click(
        api,
        [pictures, prompts, *settings.values()],
        [film, facts],
        api_name="morph",
        preprocess=False,  # what is wrong with a setting is said by the setting's name, as on the page
        concurrency_limit=None,
    )


def _texts(prompts: Any) -> list[str]:
    texts = [prompts] if isinstance(prompts, str) else prompts or []
    if not isinstance(texts, list) or not all(text is None or isinstance(text, str) for text in texts):
        raise ConfigError(f"prompts are {str(prompts)[:40]!r}, but must be a list of texts: one for all, or one each.")
    return [text or "" for text in texts]
