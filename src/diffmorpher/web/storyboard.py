"""The storyboard on the page: pictures in their order, what each shows, what is cut off it, how long it stands still."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..errors import UserError
from ..files.focus import settled_focus
from ..files.pictures import crop_box, load_image
from ..models.catalog import ASSETS, spec_of
from ..settings import SHAPES, parse_focus, parse_size
from . import html
from .jobs import Session, Studio, explain
from .parts import Updates, key_of, quietly
from .settings import MAX_PICTURES, MAX_PROMPT, long_enough, one_each, together

#: Pictures of assets/demo to try: (label, [(name, prompt), ...]).
EXAMPLES = (
    ("Tiger → wolf", [("tiger-face", "a tiger face"), ("wolf-face", "a wolf face")]),
    ("Apple → pear", [("red-apple", "a red apple"), ("pear", "a pear")]),
    ("Car → bus", [("automobile", "a car"), ("bus", "a bus")]),
    ("Cat → dog → fox", [("cat-face", "a cat face"), ("dog-face", "a dog face"), ("fox-face", "a fox face")]),
)
#: The settings that are shown, and chosen, beside the pictures.
ABOUT = ("hold", "stretch", "focus", "loop", "size", "resize", "model")


class Storyboard:
    """The visitor's pictures. The pictures are on the server, under the visitor's key; hold, stretch and focus of each are
    parts of the settings by these names."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        gr.HTML("<h2>1. Pictures, in the order of the film</h2>")
        self.pick = gr.Gallery(
            label="Add pictures",
            sources=["upload", "webcam", "clipboard"],
            file_types=["image"],
            interactive=True,
            elem_id="pick",
            buttons=[],
        )
        self.note = gr.HTML(visible=False, elem_id="pictures-note")
        with gr.Row(elem_id="examples"):
            gr.HTML("<span>or try</span>", elem_classes="or-try")
            self._examples = [
                gr.Button(label, size="sm", elem_classes="example", icon=str(ASSETS / "demo" / f"{shown[0][0]}.png"))
                for label, shown in EXAMPLES
            ]
        self.rows: list[gr.Row] = []
        self.thumbs: list[gr.HTML] = []
        self.prompts: list[gr.Textbox] = []
        self.holds: list[gr.Textbox] = []
        self.stretches: list[gr.Textbox] = []
        self._buttons: list[tuple[int, str, gr.Button]] = []
        for i in range(MAX_PICTURES):
            self._add_row(i + 1)

    def _add_row(self, n: int) -> None:
        script = (Path(__file__).parent / "storyboard.js").read_text(encoding="utf-8")
        with gr.Row(visible=False, elem_classes="picture") as row:
            self.thumbs.append(gr.HTML(elem_classes="thumb-box", elem_id=f"thumb-{n}", js_on_load=script))
            with gr.Column(elem_classes="about"):
                self.prompts.append(
                    gr.Textbox(
                        label=f"{n}. What it shows (optional)",
                        placeholder="a cat",
                        max_length=MAX_PROMPT,
                        max_lines=1,
                        elem_id=f"prompt-{n}",
                    )
                )
                with gr.Row(elem_classes="times"):
                    small: dict[str, Any] = {"max_lines": 1, "max_length": 10, "min_width": 60}
                    self.holds.append(gr.Textbox(label="Hold (s)", placeholder="0", elem_id=f"hold-{n}", **small))
                    self.stretches.append(
                        gr.Textbox(label="To next", placeholder="even", elem_id=f"stretch-{n}", **small)
                    )
                    with gr.Row(elem_classes="picture-buttons"):
                        # The style sheet shows a sign in place of the words, which are what a screen reader says.
                        for what, said in (("earlier", "Move earlier"), ("later", "Move later"), ("remove", "Remove")):
                            look: dict[str, Any] = {"elem_classes": f"icon {what}", "elem_id": f"{what}-{n}"}
                            button = gr.Button(f"{said}: picture {n}", size="sm", **look)
                            self._buttons.append((n - 1, what, button))
        self.rows.append(row)

    def connect(self, settings: Mapping[str, Any]) -> None:
        """Let it act; settings: the page's fields by name."""
        self._settings = settings
        about = [settings[name] for name in ABOUT]
        texts = [*self.prompts, *about]
        shown = [self.pick, self.note, *self.rows, *self.thumbs, *self.prompts, *self.holds, *self.stretches]
        self.outputs = outputs = [*shown, *(settings[name] for name in ("hold", "stretch", "focus"))]
        # Not `upload`, which says nothing of the camera and the clipboard.
        #: What follows pictures that were added.
        self.added = [self.pick.change(self._add, [self.pick, *texts], outputs, **quietly())]
        for button, (_, names) in zip(self._examples, EXAMPLES, strict=True):
            self.added.append(button.click(self._example(names), texts, outputs, **quietly()))
        #: What follows pictures that were moved or removed.
        self.moved = [
            button.click(self._change(i, what), texts, outputs, **quietly()) for i, what, button in self._buttons
        ]
        self.moved += [thumb.pick(self._picked(i), texts, outputs, **quietly()) for i, thumb in enumerate(self.thumbs)]
        last = quietly(trigger_mode="always_last")
        for name, fields in (("hold", self.holds), ("stretch", self.stretches)):
            typed = [event for field in fields for event in (field.input, field.blur)]
            gr.on(typed, self._joined(name), [settings["loop"], *fields], settings[name], **last)
        texts_of = [settings[name] for name in ("hold", "stretch", "focus", "size")]
        changed = [event for field in texts_of for event in (field.input, field.blur)]
        changed += [settings[name].change for name in ("resize", "model", "loop")]
        gr.on(changed, self._again, about, [*self.thumbs, *self.holds, *self.stretches], **last)

    def again(self, session: Session, values: Mapping[str, Any]) -> Updates:
        """The pictures and prompts of a visitor who came back; values: of the page's fields."""
        return self._shown(session, session.prompts, values)

    # Gradio passes the request to functions whose hints ask for it, which those of a partial do not.

    def _add(self, request: gr.Request, picked: list[tuple[str, Any]] | None, *sent: Any) -> Updates:
        if not picked:  # emptied by the event before
            return {self.pick: gr.skip()}
        session = self._studio.session(key_of(request))
        problems = []
        for file, _ in picked:
            try:
                self._studio.add_picture(session, Path(file))
            except Exception as error:
                problems.append(explain(error))
        prompts, values = _read(sent)
        return self._shown(session, prompts, values, problems)

    def _example(self, shown: list[tuple[str, str]]) -> Callable[..., Updates]:
        def load(request: gr.Request, *sent: Any) -> Updates:
            session = self._studio.session(key_of(request))
            session.pictures.clear()
            for name, _ in shown:
                self._studio.add_picture(session, ASSETS / "demo" / f"{name}.png", held=True)
            return self._shown(session, [prompt for _, prompt in shown], _read(sent)[1])

        return load

    def _change(self, i: int, what: str) -> Callable[..., Updates]:
        def change(request: gr.Request, *sent: Any) -> Updates:
            session = self._studio.session(key_of(request))
            order = [*range(len(session.pictures))]
            j = i + (1 if what == "later" else -1)
            if what == "remove" and i < len(order):
                order.pop(i)
                session.pictures[i].file.unlink(missing_ok=True)
            elif 0 <= min(i, j) and max(i, j) < len(order):
                order[i], order[j] = order[j], order[i]
            return self._ordered(session, order, *_read(sent))

        return change

    def _picked(self, i: int) -> Callable[..., Updates]:
        """Another picture was dropped on picture i, which takes that place, those between move on by one; or its crop moved."""

        def picked(event: gr.EventData, request: gr.Request, *sent: Any) -> Updates:
            session, (prompts, values) = self._studio.session(key_of(request)), _read(sent)
            count, told = len(session.pictures), dict(event._data or {})
            if i < count and "focus" in told:
                points = one_each("focus", values["focus"], count)
                points[i] = _checked(str(told["focus"]))
                return {self._settings["focus"]: together("focus", points)}
            came = int(told.get("moved", 0)) - 1
            order = [*range(count)]
            if max(i, came) < count and came >= 0:
                order.insert(i, order.pop(came))
            return self._ordered(session, order, prompts, values)

        return picked

    def _ordered(self, session: Session, order: Sequence[int], prompts: list[str], values: dict[str, Any]) -> Updates:
        """The pictures in another order, or without one, each with all that is its own; a stretch belongs to its place."""
        count = len(session.pictures)
        for name in ("hold", "focus"):
            each = one_each(name, values[name], count)
            values[name] = together(name, [each[j] for j in order])
        if len(order) < count:
            values["stretch"] = together("stretch", one_each("stretch", values["stretch"], _gaps(len(order), values)))
        session.pictures[:] = [session.pictures[j] for j in order]
        return self._shown(session, [prompts[j] for j in order], values)

    def _joined(self, name: str) -> Callable[..., str]:
        def joined(request: gr.Request, loop: bool, *each: str) -> str:
            count = len(self._studio.session(key_of(request)).pictures)
            return together(name, each[: count if name == "hold" else _gaps(count, {"loop": loop})])

        return joined

    def _again(self, request: gr.Request, *about: Any) -> Updates:
        """Its crops and times, after the fields have changed."""
        return self._beside(self._studio.session(key_of(request)), dict(zip(ABOUT, about, strict=True)))

    def _beside(self, session: Session, values: Mapping[str, Any]) -> Updates:
        count = len(session.pictures)
        updates: Updates = {self.thumbs[0]: gr.skip()}  # nothing at all is not allowed
        holds = one_each("hold", values["hold"], count)
        focuses = one_each("focus", values["focus"], count)
        gaps = _gaps(count, values)
        stretches = one_each("stretch", values["stretch"], gaps)
        shape = _shape(values)
        for i, picture in enumerate(session.pictures):
            image = load_image(picture.file)
            box = _crop(str(picture.file), image, focuses[i], shape) if shape and values["resize"] == "crop" else None
            updates[self.thumbs[i]] = html.thumbnail(image, picture.name, box)
            updates[self.holds[i]] = holds[i]
            updates[self.stretches[i]] = gr.update(
                value=stretches[i] if i < gaps else "",
                visible=i < gaps,
                label="To first" if i == count - 1 else "To next",
            )
        return updates

    def _shown(
        self, session: Session, prompts: list[str], values: Mapping[str, Any], problems: Sequence[str] = ()
    ) -> Updates:
        count = len(session.pictures)
        places = {"hold": count, "stretch": _gaps(count, values), "focus": count}
        values = {**values, **{name: long_enough(name, values[name], most) for name, most in places.items()}}
        updates: Updates = {
            self.pick: None,
            self.note: gr.update(value=html.note(" ".join(problems), "error"), visible=bool(problems)),
            **{self._settings[name]: values[name] for name in places},
        }
        for i in range(MAX_PICTURES):
            here = i < len(session.pictures)
            updates[self.rows[i]] = gr.update(visible=here)
            updates[self.prompts[i]] = prompts[i] if here and i < len(prompts) else ""
        return updates | self._beside(session, values)


def _read(sent: Sequence[Any]) -> tuple[list[str], dict[str, Any]]:
    """What a browser sent, as prompts and what else is beside the pictures."""
    return [text or "" for text in sent[:MAX_PICTURES]], dict(zip(ABOUT, sent[MAX_PICTURES:], strict=True))


def _gaps(count: int, values: Mapping[str, Any]) -> int:
    """How many ways from picture to picture there are."""
    return count if values["loop"] and count > 1 else max(count - 1, 0)


def _shape(values: Mapping[str, Any]) -> tuple[float, float] | None:
    """Width and height of the film, in proportion; None where the fields do not say."""
    try:
        size = parse_size(str(values["size"] or "").strip().lower().replace("×", "x") or None)
        return SHAPES[size] if isinstance(size, str) else size or spec_of(values["model"] or "mini").size or (1, 1)
    except UserError:
        return None


def _checked(focus: str) -> str:
    """A point, or what stands for none."""
    try:
        parse_focus(focus)
    except UserError:
        return ""
    return focus


def _crop(
    file: str, image: Image.Image, focus: str, shape: tuple[float, float]
) -> tuple[float, float, float, float] | None:
    """(left, top, width, height) of what is kept of a picture, in shares of it; None where nothing is cut off."""
    point = _matters(file) if focus == "auto" else parse_focus(_checked(focus))
    left, top, right, bottom = crop_box(image.size, shape, point)
    box = (left / image.width, top / image.height, (right - left) / image.width, (bottom - top) / image.height)
    return box if min(box[2:]) < 0.995 else None


@lru_cache(64)
def _matters(file: str) -> tuple[float, float]:
    """What a visitor's picture shows; the file is never another one."""
    return parse_focus(settled_focus(["auto"], [load_image(file)])[0])
