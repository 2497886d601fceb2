"""What the command line checks before a model is loaded: each mistake raises a `UserError` within a second."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import ConfigError, OutputError
from ..files.clashes import check_apart, writes_over
from ..files.films import check_output
from ..files.keyframes import NAME, check_keyframes
from ..files.places import check_place, same_place
from ..models.catalog import CATALOG
from ..recipe import Recipe
from ..settings import split_weight


def check_port(port: int | None) -> None:
    if port is not None and not 1 <= port <= 65535:
        raise ConfigError(f"the port is {port}, but must be a whole number from 1 to 65535.")


def parse_auth(text: str | None) -> tuple[str, str] | None:
    """ "name:password" as a pair; None stays None. The message does not repeat what may be a password."""
    if text is None:
        return None
    user, _, password = text.partition(":")
    if not user or not password:
        raise ConfigError("--auth needs a name and a password with a colon between them, such as ann:secret.")
    return user, password


def check_loras(files: Sequence[str]) -> None:
    """Read them once, as far as that goes without the model; imports torch if there are any."""
    for file in files:
        from ..files.loras import load_lora

        load_lora(split_weight(file)[0], text=True)


def check_outputs(
    out: Path | None,
    folders: Sequence[Path | None],
    files: Sequence[Path | None],
    inputs: Mapping[str, Sequence[Path]],
) -> None:
    """Can the film, the folders of frames and of stills, the path file and the recipe be written, each in a place of its own?

    inputs: files and folders that must stay, by what they are.
    """
    for option, frames in zip(("--save-frames", "--keyframes"), folders, strict=True):
        if frames is not None and frames.suffix:
            raise OutputError(f"{option} {str(frames)!r} is a folder's name, which must not have a suffix here.")
    outputs = [place for place in (out, *folders, *files) if place is not None]
    for place in outputs:
        check_inputs_stay(place, inputs)  # before what else is wrong with it
    for film in (out, *folders):
        if film is not None:
            check_output(film)
    for file in files:
        if file is not None:
            check_place(file)
    stills = folders[1]
    named = [] if stills is None else [stills / NAME]
    if stills is not None:
        check_keyframes(stills)
    check_apart(
        [
            *((place, not place.suffix) for place in (out, *folders) if place is not None),
            *((place, False) for place in (*files, *named) if place is not None),
        ]
    )


def inputs_of(recipe: Recipe) -> dict[str, list[Path]]:
    """The files that a film is made from, by what they are; of a model that is a folder, all in it."""
    models = [] if recipe.model in CATALOG else _files_of(recipe.model)
    return {
        "a picture to be morphed": [*map(Path, recipe.pictures)],
        "a LoRA to be used": [Path(split_weight(each)[0]) for each in (*recipe.loras, *recipe.styles)],
        "the sound to be used": [Path(recipe.audio)] if recipe.audio else [],
        "the model to be used": models,
        "the VAE to be used": _files_of(recipe.vae) if recipe.vae is not None else [],
    }


def _files_of(model: str) -> list[Path]:
    """The files of a model or an autoencoder; of a folder that is none, itself: it may be the whole disk."""
    place = Path(os.path.expanduser(model))
    if not any(os.path.isfile(place / index) for index in ("model_index.json", "config.json", "vae/config.json")):
        return [place]
    return [file for file in place.rglob("*") if file.is_file()]


def check_inputs_stay(out: Path, inputs: Mapping[str, Sequence[Path]]) -> None:
    """Raise `OutputError` where writing to `out` would replace one of these files, which are called what their key says."""
    for what, files in inputs.items():
        for file in files:
            if writes_over(out, file):
                how = "is" if same_place(out, file) else f"would write over {str(file)!r},"
                raise OutputError(f"output {str(out)!r} {how} {what}: choose another name.")


def check_ray(ray: str | None, jobs: str | None) -> None:
    """Raise `ConfigError` for workers of no cluster."""
    if jobs is not None and ray is None:
        raise ConfigError("--jobs says how many workers --ray starts: give --ray too, or leave it out.")
