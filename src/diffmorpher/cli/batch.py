"""Several morphs in one go: `morph --from batch.toml`, or `--from pairs.csv`."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DiffMorpherError, ImageError
from ..files.clashes import check_apart, first_over
from ..files.films import FORMATS, check_output, read_settings
from ..gather import gather
from ..models.catalog import check_model
from ..progress import say
from ..recipe import Recipe
from . import signals
from .checks import check_loras, inputs_of
from .output import figures, print_json, save
from .terminal import StageBars

if TYPE_CHECKING:
    from ..morpher import Morpher


def run_batch(
    films: Sequence[tuple[Recipe, str]],
    folder: Path | None,
    started: float,
    as_json: bool,
    load: Callable[[Recipe], Morpher],
    ray: str | None = None,
    jobs: str = "auto",
) -> None:
    """Make each film that is not there yet; what cannot work is said before the first. A model is loaded once.

    ray: the address of a cluster whose actors make them, `jobs` of them where it is "local".

    films: recipes, each with its output's name; folder: where the outputs are, else beside the working folder's other files.
    Raises `UserError` for the first film that cannot be made, `DiffMorpherError` at the end for those that failed at work.
    """
    if folder is not None and folder.suffix.lower() in FORMATS:
        raise ConfigError(f"-o {str(folder)!r} is a film's name, but a batch needs a folder: leave the suffix out.")
    work = [_prepared(recipe, name, folder, f"film {i}") for i, (recipe, name) in enumerate(films, start=1)]
    places = Counter(os.path.realpath(out) for _, out in work)
    if twice := next((out for _, out in work if places[os.path.realpath(out)] > 1), None):
        raise ConfigError(f"two films of the batch go to {str(twice)!r}: give each an out of its own.")
    check_apart([(out, not out.suffix) for _, out in work])
    inputs = [file for recipe, _ in work for files in inputs_of(recipe).values() for file in files]
    if over := first_over([out for _, out in work], inputs):
        raise ConfigError(
            f"output {str(over)!r} writes over a file that a film of the batch is made from: choose another."
        )
    made: list[dict[str, Any]] = []
    failed: list[str] = []
    missing = []
    for i, (recipe, out) in enumerate(work, start=1):
        if is_finished(recipe, out):
            say(f"{i}/{len(work)} {out} is there already")
        else:
            missing.append((f"{i}/{len(work)}", recipe, out))
    makers = _one_by_one(missing, load) if ray is None else _on_ray(missing, ray, jobs)
    for out, outcome in makers:  # one bad film does not stop the others
        if isinstance(outcome, str):
            failed.append(f"{out}: {outcome}")
            say(f"diffmorpher: error: {failed[-1]}")
        else:
            made.append(outcome)
    say(
        f"{len(made)} made, {len(work) - len(made) - len(failed)} there already, in {time.perf_counter() - started:.1f} s."
    )
    if as_json:
        print_json({"films": made, "failed": failed})
    if failed:
        raise DiffMorpherError(f"{len(failed)} of {len(work)} films failed; run again to try them once more.")


#: What a film is called in what is said, its recipe, and where it goes.
Film = tuple[str, Recipe, Path]


def _one_by_one(
    films: Sequence[Film], load: Callable[[Recipe], Morpher]
) -> Iterator[tuple[Path, dict[str, Any] | str]]:
    """(output, its figures or why there is none) of each, made here."""
    morpher: Morpher | None = None
    loaded_for: dict[str, Any] = {}
    for number, recipe, out in films:
        wanted = recipe.loading()
        say(f"{number} {out}")
        try:
            if morpher is None or wanted != loaded_for:
                morpher = None  # two may not fit into memory
                morpher, loaded_for = load(recipe), wanted
            began = time.perf_counter()
            with StageBars() as progress:
                result = morpher.make(*gather(recipe), progress)
            yield out, figures(result, out, save(result, [out], began, began))
        except DiffMorpherError as error:
            yield out, str(error)


def _on_ray(films: Sequence[Film], address: str, jobs: str) -> Iterator[tuple[Path, dict[str, Any] | str]]:
    """The same by the actors of a cluster, as they are done; its machines see pictures, model and outputs by the same paths."""
    from ..cluster.films import make_films
    from ..cluster.slots import choose_jobs

    if not films:
        return
    signals.stop_by_exception()
    numbers = {out: number for number, _, out in films}
    count = choose_jobs(jobs, films[0][1].device)
    for out, result in make_films([(recipe, out) for _, recipe, out in films], address, count):
        if isinstance(result, str):
            yield out, result
        else:
            say(f"{numbers[out]} Wrote {out}")
            yield out, figures(result, out, result.seconds)


def _prepared(recipe: Recipe, name: str, folder: Path | None, which: str) -> tuple[Recipe, Path]:
    """A film's recipe with its files found, and where it goes."""
    out = (folder or Path()) / name
    if Path(name).is_absolute() or os.path.normpath(name).split(os.sep)[0] in (
        "",
        "..",
        ".",
    ):  # a link there is one's own
        raise ConfigError(
            f"{which} of the batch: its output {name!r:.200} is not in the batch's folder: give a name, and -o for the folder."
        )
    try:
        found, _ = gather(recipe)
        check_output(out)
        check_model(found.model)
        check_loras((*found.loras, *found.styles))
    except DiffMorpherError as error:
        raise type(error)(f"{which} of the batch: {error}") from error
    return found, out


def is_finished(recipe: Recipe, out: Path) -> bool:
    """Whether the film at `out` was made from this recipe by this version."""
    try:
        there = read_settings(out) if out.exists() else None
    except ImageError:
        return False
    wanted = recipe.document() | {"diffmorpher": version("diffmorpher")}
    return there is not None and all(there.get(key) == value for key, value in wanted.items() if key != "device")
