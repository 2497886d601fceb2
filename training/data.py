"""The pictures and captions that `mini` is trained on: fetched, checked and packed; then read back as arrays.

`python -m training.data WORK` writes WORK/pictures.zip (the WebP files as published, 256 x 256 with transparency) and
WORK/captions.jsonl. Everything else reads these two, so that a machine without a network needs 17 MB and nothing more.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

# All MIT. The digests are of the tarballs that `npm pack` fetches.
PICTURES = ("@lobehub/fluent-emoji-3d@1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz")
NAMES = ("emoji-datasource-google@16.0.0", "emoji-datasource-google-16.0.0.tgz")
KEYWORDS = ("emojilib@4.0.3", "emojilib-4.0.3.tgz")
SHA256 = {
    PICTURES[1]: "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    NAMES[1]: "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    KEYWORDS[1]: "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303",
}

HELD_OUT = Path(__file__).with_name("held_out.txt")

SKIN_TONES = {
    "1f3fb": "light skin tone",
    "1f3fc": "medium-light skin tone",
    "1f3fd": "medium skin tone",
    "1f3fe": "medium-dark skin tone",
    "1f3ff": "dark skin tone",
}

# How often a picture is drawn, by category: what people morph is learnt first, and the many flags and skin tones of one
# gesture do not crowd it out.
CATEGORY_WEIGHTS = {"Flags": 0.25, "Symbols": 0.5, "People & Body": 0.6, "Component": 0.25}
# Pictures that say something else in a mirror: writing, flags, clocks, arrows, hands.
NO_FLIP = {
    "Flags",
    "Symbols",
    "Component",
    "time",
    "money",
    "mail",
    "game",
    "hand-fingers-partial",
    "hand-single-finger",
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture of the set. `weight` is how often it is drawn, relative to the others; `flip` whether it may be mirrored."""

    file: str
    name: str
    captions: tuple[str, ...]  # the first is the plain name
    category: str
    weight: float
    flip: bool
    keywords: tuple[str, ...] = ()  # what it has to do with: "pet" of a dog


def held_out_names() -> frozenset[str]:
    """The names no part of `mini` has seen: the inputs of the benchmark and of the demo are among them."""
    lines = HELD_OUT.read_text("utf-8").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def held_out_pairs() -> list[tuple[str, str]]:
    """The benchmark's 24 pairs: animals, faces, food, vehicles, nature and unlike things, four of each in this order."""
    lines = HELD_OUT.read_text("utf-8").partition("\n\n")[0].splitlines()
    names = [line for line in lines if not line.startswith("#")]
    return list(zip(names[::2], names[1::2], strict=True))


def fetch(folder: Path) -> None:
    """Bring the tarballs with `npm pack` where they are not in `folder` yet; stop where a digest is not the known one."""
    folder.mkdir(parents=True, exist_ok=True)
    for package, file in (PICTURES, NAMES, KEYWORDS):
        path = folder / file
        if not path.exists():
            subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != SHA256[file]:
            sys.exit(f"{path} has sha256 {digest}, not {SHA256[file]}: delete it and fetch it again.")


def pack(folder: Path) -> list[Picture]:
    """Write pictures.zip and captions.jsonl from the tarballs in `folder`."""
    with tarfile.open(folder / NAMES[1]) as tar:
        entries = json.load(_member(tar, "package/emoji.json"))
    with tarfile.open(folder / KEYWORDS[1]) as tar:
        keywords = json.load(_member(tar, "package/dist/emoji-en-US.json"))
    pictures = []
    with tarfile.open(folder / PICTURES[1]) as tar, zipfile.ZipFile(folder / "pictures.zip.part", "w") as pack:
        members = {Path(m.name).stem: m for m in tar if m.name.endswith(".webp")}
        for picture in _described(entries, set(members), keywords):
            pictures.append(picture)
            pack.writestr(zipfile.ZipInfo(picture.file), _member(tar, members[Path(picture.file).stem].name).read())
    (folder / "pictures.zip.part").replace(folder / "pictures.zip")
    lines = (json.dumps(dataclasses.asdict(picture), ensure_ascii=False) for picture in pictures)
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return pictures


def read_pictures(folder: Path) -> list[Picture]:
    lines = (folder / "captions.jsonl").read_text("utf-8").splitlines()
    found = map(json.loads, lines)
    return [Picture(**{k: tuple(v) if isinstance(v, list) else v for k, v in each.items()}) for each in found]


def read_images(folder: Path, pictures: Iterable[Picture], size: int) -> np.ndarray:
    """The pictures on white, uint8 (N, 3, size, size), resized as `diffmorpher` resizes its inputs (Lanczos)."""
    with zipfile.ZipFile(folder / "pictures.zip") as pack, ThreadPoolExecutor() as threads:
        packed = [pack.read(picture.file) for picture in pictures]
        return np.stack(list(threads.map(lambda one: _on_white(one, size), packed)))


def split(pictures: list[Picture]) -> tuple[list[Picture], list[Picture]]:
    """(training, held out)."""
    names = held_out_names()
    return [p for p in pictures if p.name not in names], [p for p in pictures if p.name in names]


def draw_caption(picture: Picture, draw: random.Random) -> str:
    """The plain name half of the time, another name otherwise; with an article, as a picture or with keywords now and then."""
    caption = picture.captions[0] if draw.random() < 0.5 else draw.choice(picture.captions)
    chance = draw.random()
    caption = f"a {caption}" if chance < 0.35 else f"a picture of a {caption}" if chance < 0.45 else caption
    if picture.keywords and draw.random() < 0.25:
        caption = ", ".join([caption, *draw.sample(picture.keywords, min(draw.randint(1, 2), len(picture.keywords)))])
    return caption


def _described(entries: list[dict], files: set[str], keywords: dict[str, list[str]]) -> Iterable[Picture]:
    for entry in entries:
        variants = [(entry, "")]
        variants += [(v, " and ".join(dict.fromkeys(SKIN_TONES[c] for c in codes.lower().split("-"))))
                     for codes, v in entry.get("skin_variations", {}).items()]  # fmt: skip
        found = [(file, tone) for variant, tone in variants if (file := _file(variant, files))]
        name = clean(entry["name"])
        others = dict.fromkeys([name, *(clean(short) for short in entry["short_names"]), *_plainer(name)])
        sign = "".join(chr(int(code, 16)) for code in entry["unified"].split("-"))
        words = [clean(word) for word in keywords.get(sign) or keywords.get(sign.replace("\ufe0f", "")) or []]
        for file, tone in found:
            yield Picture(
                f"{file}.webp",
                name,
                tuple(f"{caption}, {tone}" if tone else caption for caption in others if caption),
                entry["category"],
                # All tones of one name together count as one and a half pictures.
                CATEGORY_WEIGHTS.get(entry["category"], 1.0) * (1.5 / len(found) if len(found) > 1 else 1.0),
                not ({entry["category"], entry["subcategory"]} & NO_FLIP),
                tuple(dict.fromkeys(word for word in words if word and word not in others)),
            )


def clean(name: str) -> str:
    """A name as a caption: lower case, words only."""
    return re.sub(r"[^\w’&-]+", " ", name.lower().replace("_", " ")).replace("flag-", "flag ").strip()


def _plainer(name: str) -> list[str]:
    """What people call it: a "dog face" is a dog too, the "new moon symbol" a new moon."""
    return [name.removesuffix(ending) for ending in (" face", " symbol", " sign") if name.endswith(ending)]


def _file(entry: dict, files: set[str]) -> str | None:
    codes = (
        entry["unified"].lower(),
        (entry.get("non_qualified") or "").lower(),
        entry["unified"].lower().replace("-fe0f", ""),
    )
    return next((code for code in codes if code in files), None)


def _on_white(data: bytes, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as source:
        picture = Image.alpha_composite(Image.new("RGBA", source.size, "white"), source.convert("RGBA")).convert("RGB")
    return np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS)).transpose(2, 0, 1)


def _member(tar: tarfile.TarFile, name: str) -> io.BufferedReader:
    file = tar.extractfile(name)
    assert file is not None
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder for the data, some 110 MB")
    args = parser.parse_args()
    fetch(args.work)
    training, held_out = split(pack(args.work))
    if unknown := held_out_names() - {picture.name for picture in held_out}:
        sys.exit(f"{HELD_OUT.name} names pictures that the set does not have: {', '.join(sorted(unknown))}")
    names = len({p.name for p in training}), len({p.name for p in held_out})
    print(f"{len(training)} pictures of {names[0]} names to train on, {len(held_out)} of {names[1]} held out.")


if __name__ == "__main__":
    main()
