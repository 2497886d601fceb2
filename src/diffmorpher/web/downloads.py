"""What a visitor can take along: his film in every format, its frames, path and LoRAs."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from .jobs import Film


def downloads(film: Film) -> dict[str, Callable[[], Path]]:
    """What a film can be downloaded as: name of the kind -> a function that writes the file and returns its path."""
    result = film.result

    def film_as(suffix: str) -> Callable[[], Path]:
        file = film.folder / f"{film.name}{suffix}"
        return lambda: file if file.exists() else result.save(file)

    def frames() -> Path:
        folder = result.save(film.folder / "frames")
        return _zip(film.folder / f"{film.name}-frames.zip", sorted(folder.iterdir()))

    def loras() -> Path:
        from ..files.loras import save_lora

        bank = result.path.bank
        count = result.path.num_images if bank else 0
        files = [film.folder / f"{film.name}-lora-{i + 1}.safetensors" for i in range(count)]
        for i, file in enumerate(files):
            if bank:
                save_lora(bank.lora(i), file)
        return _zip(film.folder / f"{film.name}-loras.zip", files)

    kinds = {kind: film_as(f".{kind}") for kind in ("mp4", "gif", "webp", "webm", "mov")} | {"frames": frames}
    kinds["path"] = lambda: result.path.save(film.folder / f"{film.name}.morph")
    return kinds | ({"loras": loras} if result.path.bank else {})


def _zip(out: Path, files: Sequence[Path]) -> Path:
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for file in files:
            archive.write(file, file.name)
    return out
