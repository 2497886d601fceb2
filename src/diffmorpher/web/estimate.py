"""How long a film will take, by what the last ones took on this machine."""

from __future__ import annotations

from ..recipe import Recipe


def rows(recipe: Recipe, images: int) -> int:
    """About how many rows of the network's batches a film of so many pictures takes; a row that is trained on counts 3."""
    frames, steps = recipe.frame_count(images), recipe.sample.steps
    fit = 3 * recipe.fit.steps * recipe.fit.draws * images if recipe.fit and not recipe.loras else 0
    # Frames that even speed needs beside those of the film: all of them twice over, or a few to spare.
    more = (frames if recipe.schedule.method == "two-pass" else 2) if recipe.schedule.enabled else 0
    guided = 2 if recipe.sample.guidance_scale != 1 else 1
    return fit + images * steps + (frames + more + images) * steps * guided


def length(recipe: Recipe, images: int) -> float:
    """How long a film of so many pictures is, in seconds."""
    frames = recipe.frame_count(images)
    recipe.playback.check_images(images)
    positions = [
        0.0,
        *[0.5] * (frames - images),
        *map(float, range(1, images)),
    ]  # a hold asks which are pictures, no more
    return len(recipe.playback.order(positions, recipe.loop)) / recipe.fps


class Speed:
    """Seconds of work for each row, by model, size and device, as the last film of each took them."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], float] = {}

    def learn(self, recipe: Recipe, made: int, seconds: float) -> None:
        """made: rows that were really made, in so many seconds; too few of them say nothing."""
        if made >= 50:
            self._known[self._key(recipe)] = seconds / made

    def seconds(self, recipe: Recipe, images: int) -> float | None:
        """About how long a film will take from nothing; None where none of its kind was made here."""
        each = self._known.get(self._key(recipe))
        return None if each is None else each * rows(recipe, images)

    @staticmethod
    def _key(recipe: Recipe) -> tuple[object, ...]:
        return recipe.model, recipe.size, recipe.low_memory
