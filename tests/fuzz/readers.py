"""Every reader of the program, with whole files to start from: small, and one of each layout."""

from __future__ import annotations

import base64
import io
import json
import wave
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from conftest import tiny_pipeline
from diffmorpher import FitConfig, Morpher, MorphPath, Recipe
from diffmorpher.evaluation.datasets import load_dataset
from diffmorpher.evaluation.metrics import FIGURES
from diffmorpher.evaluation.results import as_json, compare, read_results
from diffmorpher.evaluation.study import tally, write_study
from diffmorpher.files.films import save_film
from diffmorpher.files.loras import load_lora
from diffmorpher.files.pictures import READ_FORMATS, load_image
from diffmorpher.files.sound import read_sound
from diffmorpher.method.lora import LoraBank
from diffmorpher.recipe import read_recipes


@dataclass(frozen=True)
class Reader:
    """seeds: (a file's name, its content), made in an empty folder; read: what the program does with one such file."""

    seeds: Callable[[Path], list[tuple[str, bytes]]]
    read: Callable[[Path], Any]


# ---- pictures, sounds, films


def _noise(size: int = 16, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8))


def _pictures(folder: Path) -> list[tuple[str, bytes]]:
    from PIL import ImageCms

    found = []
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[274] = 6
    more: dict[str, dict[str, Any]] = {
        "PNG": {"icc_profile": profile, "exif": exif}, "JPEG": {"icc_profile": profile, "exif": exif},
        "WEBP": {"exif": exif}, "TIFF": {"exif": exif, "compression": "tiff_lzw"}, "GIF": {"transparency": 3},
    }  # fmt: skip
    for name in READ_FORMATS:
        for picture in (_noise(), _noise().convert("L"), _noise().convert("P")):
            for options in ({}, more.get(name, {})):
                buffer = io.BytesIO()
                try:
                    picture.save(buffer, format=name, **options)
                except (OSError, KeyError, ValueError):  # not a mode that the format has
                    continue
                found.append(("picture", buffer.getvalue()))
    for kind in ("WEBP", "GIF", "PNG", "MPO"):
        buffer = io.BytesIO()
        _noise().save(buffer, format=kind, save_all=True, append_images=[_noise(seed=1)])
        found.append(("picture", buffer.getvalue()))
    return found


def _sounds(folder: Path) -> list[tuple[str, bytes]]:
    import av

    samples = (np.sin(np.arange(4000) / 20) * 9000).astype(np.int16)
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", "NONE"))
        file.writeframes(samples.tobytes())
    for name, codec in (("a.flac", "flac"), ("a.ogg", "libopus"), ("a.m4a", "aac")):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=48000)
            frame = av.AudioFrame.from_ndarray(np.repeat(samples, 6)[None], format="s16", layout="mono")
            frame.sample_rate = 48000
            for packet in (*stream.encode(frame), *stream.encode(None)):
                container.mux(packet)
    return [("sound", file.read_bytes()) for file in sorted(folder.iterdir())]


_RECIPE = Recipe(pictures=("a.png", "b.png"), prompts=("a cat", "a dog"), frames=5, fps=8.0, loop=True)


def _films(folder: Path) -> list[tuple[str, bytes]]:
    found = []
    for name in ("a.mp4", "a.webm", "a.mov", "a.mkv", "a.gif", "a.webp", "a.apng", "a.png"):
        save_film([_noise(seed=1), _noise(seed=2)], folder / name, fps=8, metadata=_RECIPE.document())
        found.append((name, (folder / name).read_bytes()))
    return found


# ---- recipes and the evaluation's files


def _recipes(folder: Path) -> list[tuple[str, bytes]]:
    _RECIPE.write(folder / "a.toml")
    table = "image_0,image_1,prompt_0,prompt_1,frames,fit.steps,name\na.png,b.png,a cat,a dog,5,10,film\nb.png,a.png,,,6,,\n"
    batch = 'frames = 5\n[fit]\nsteps = 3\n[[film]]\npictures = ["a.png", "b.png"]\nout = "x.mp4"\n[[film]]\nprompts = ["a"]\n'
    return [("a.toml", (folder / "a.toml").read_bytes()), ("a.csv", table.encode()), ("b.toml", batch.encode())]


def _manifests(folder: Path) -> list[tuple[str, bytes]]:
    rows = [
        {"image_0": "a.png", "image_1": "a.png", "prompt_0": "a", "category": "c", "name": f"n{k}"} for k in range(2)
    ]
    table = "image_0,image_1,prompt_0,name\na.png,a.png,a cat,one\na.png,a.png,a dog,two\n"
    return [
        ("m.jsonl", "\n".join(map(json.dumps, rows)).encode()),
        ("m.csv", table.encode()),
        ("prompts.json", b'{"a": ["b", "c"]}'),
    ]


def _load_dataset(file: Path) -> None:
    if not (file.parent / "a.png").exists():
        for name in ("a.png", "a_0.png", "a_1.png"):
            _noise().save(file.parent / name)
    load_dataset(str(file if file.suffix != ".json" else file.parent))


def _run() -> dict[str, Any]:
    figures = {name: 1.0 + i for i, name in enumerate(FIGURES)}
    results = [
        {"pair": pair, "method": method, "figures": figures} for pair in "ab" for method in ("ddim", "diffmorpher")
    ]
    dataset = {"name": "x", "pairs": {"a": "digest-1", "b": "digest-2"}}
    return {"protocol": {"frames": 17, "seed": 0}, "dataset": dataset, "results": results}


def _read_results(file: Path) -> None:
    whole = file.parent / "whole.json"
    if not whole.exists():
        whole.write_text(json.dumps(_run()))
        for name in ("a/ddim", "a/diffmorpher", "b/ddim", "b/diffmorpher"):
            (file.parent / name).mkdir(parents=True)
            (file.parent / name / "film.mp4").write_bytes(b"film")
    json.loads(as_json(compare(read_results(whole), read_results(file))), parse_constant=_no_constant)
    write_study(file.parent, ("ddim", "diffmorpher"), file.parent / "study.html")


def _no_constant(text: str) -> None:
    raise AssertionError(f"{text} is no JSON")


def _votes(folder: Path) -> list[tuple[str, bytes]]:
    key = [{"pair": f"p{i}", "left": "ddim", "right": "diffmorpher"} for i in range(3)]
    votes = [{"trial": i, "choice": choice, "seconds": 1.0} for i, choice in enumerate(("left", "right", "equal"))]
    text = base64.b64encode(json.dumps(key).encode()).decode()
    # The key changed in itself too: as it would be in a page that somebody has edited.
    return [
        ("votes.json", json.dumps({"study": "x", "key": text, "votes": votes}).encode()),
        ("key.json", json.dumps(key).encode()),
    ]


def _tally(file: Path) -> None:
    if file.name == "key.json":
        record = {
            "study": "x",
            "key": base64.b64encode(file.read_bytes()).decode(),
            "votes": [{"trial": 0, "choice": "left"}],
        }
        file = file.with_name("votes.json")
        file.write_text(json.dumps(record))
    tally([file])


# ---- LoRAs and paths


def _loras(folder: Path) -> list[tuple[str, bytes]]:
    layer, conv = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1"
    kohyas = "lora_unet_" + layer.replace(".", "_")

    def filled(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
        return {name: torch.full(shape, 0.1) for name, shape in shapes.items()}

    def named(form: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {form.format(part): tensor for part, tensor in parts.items()}

    matrices = filled(down=(2, 64), up=(64, 2))
    tucker = filled(t1=(2, 2, 3, 3), w1_a=(2, 64), w1_b=(2, 64), t2=(2, 2, 3, 3), w2_a=(2, 64), w2_b=(2, 64))
    layouts: list[dict[str, Tensor]] = [
        named(f"unet.{layer}.lora.{{}}.weight", matrices),
        named(f"unet.{layer.removesuffix('.to_q')}.processor.to_q_lora.{{}}.weight", matrices),
        named(f"{kohyas}.lora_{{}}.weight", matrices) | {f"{kohyas}.alpha": torch.tensor(1.0)},
        named(f"base_model.model.{layer}.lora_{{}}.weight", {"A": matrices["down"], "B": matrices["up"]}),
        named("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight", filled(down=(2, 32), up=(32, 2))),
        named("diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.lora_{}.weight", matrices),
        named(f"unet.{conv}.lora.{{}}.weight", filled(down=(2, 64, 3, 3), up=(64, 2, 1, 1))),
        named(f"unet.{conv}.lora_{{}}.weight", filled(down=(2, 64, 1, 1), mid=(2, 2, 3, 3), up=(64, 2, 1, 1))),
        named(f"{kohyas}.hada_{{}}", filled(w1_a=(64, 2), w1_b=(2, 64), w2_a=(64, 2), w2_b=(2, 64))),
        named(f"unet.{conv}.hada_{{}}", tucker),
        named(f"{kohyas}.lokr_{{}}", filled(w1=(8, 8), w2_a=(8, 2), w2_b=(2, 8))) | {f"{kohyas}.alpha": torch.tensor(1.0)},
        named(f"unet.{conv}.lokr_{{}}", filled(w1=(8, 8), w2=(8, 8, 3, 3))),
        named(f"{kohyas}.lora_{{}}.weight", matrices) | {f"{kohyas}.dora_scale": torch.ones(64, 1)},
        named(f"base_model.model.{layer}.{{}}", filled(ia3_l=(64, 1))),
        named(f"{kohyas}.{{}}", filled(diff=(64, 64))),
        named("lora_unet_double_blocks_0_img_attn_qkv.lora_{}.weight", filled(down=(2, 8), up=(24, 2))),
        named("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_{}.weight", filled(down=(2, 8), up=(24, 2))),
    ]  # fmt: skip
    settings = {
        "lora_adapter_metadata": json.dumps({"unet.lora_alpha": 4, "unet.r": 2, "unet.alpha_pattern": {"to_q": 2}})
    }
    metadata = {"format": "pt", "diffmorpher.prompt": "a cat", **settings}
    found = [
        ("lora" if k < len(layouts) - 2 else "another model's", save(tensors, metadata if k % 2 else None))
        for k, tensors in enumerate(layouts)
    ]
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save({"state_dict": layouts[0]}, buffer, _use_new_zipfile_serialization=zipped)
        found.append(("lora", buffer.getvalue()))
    return found


@cache
def _morpher() -> Morpher:
    return Morpher(tiny_pipeline())


def _read_lora(file: Path) -> None:
    lora = load_lora(file, text=True)
    if lora.down or lora.gains:
        LoraBank.stack([lora], _morpher().backbone.network, ["the file"])


def _paths(folder: Path) -> list[tuple[str, bytes]]:
    pictures, fit = [_noise(32, 1), _noise(32, 2)], FitConfig(rank=1, steps=1)
    files = [
        _morpher().prepare(pictures, ["a", "b"], fit=fit, steps=2).save(folder / "a.morph"),
        _morpher().prepare(pictures, fit=None, steps=1, loop=True).save(folder / "b.morph"),
    ]
    return [("a.morph", file.read_bytes()) for file in files]


READERS = {
    "pictures": Reader(_pictures, load_image),
    "loras": Reader(_loras, _read_lora),
    "paths": Reader(_paths, lambda file: MorphPath.load(file, _morpher())),
    "recipes": Reader(_recipes, read_recipes),
    "films": Reader(_films, read_recipes),
    "manifests": Reader(_manifests, _load_dataset),
    "results": Reader(lambda folder: [("results.json", json.dumps(_run()).encode())], _read_results),
    "votes": Reader(_votes, _tally),
    "sounds": Reader(_sounds, lambda file: read_sound(file, 1.0)),
}
