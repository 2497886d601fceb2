"""The recipe of the bundled model: two steps of each part on real pictures, from the command line, in real processes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from conftest import ASSETS
from diffmorpher import Morpher

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # training/ is beside the package, not in it

from training import data  # noqa: E402
from training.autoencoder import CONFIGS, build, fold_latent_statistics, psnr, reconstruct  # noqa: E402
from training.diffusion import build_tokenizer, varied  # noqa: E402
from training.loop import Limits, Run, moving_average  # noqa: E402
from training.optim import Muon, orthogonal  # noqa: E402


def run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"training.{module}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A handful of pictures packed as `training.data` packs them: the demo's, two held out, six under other names."""
    folder = tmp_path_factory.mktemp("work")
    lines = []
    with zipfile.ZipFile(folder / "pictures.zip", "w") as pack:
        for i, file in enumerate(sorted((ASSETS / "demo").glob("*.png"))[:8]):
            Image.open(file).convert("RGBA").save(folder / "picture.webp", lossless=True)
            pack.write(folder / "picture.webp", f"{i}.webp")
            name = ("dog face", "cat face")[i] if i < 2 else f"thing {i}"
            picture = data.Picture(f"{i}.webp", name, (name, file.stem), "Objects", 1.0, i % 2 == 0)
            lines.append(json.dumps(dataclasses.asdict(picture)))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_two_steps_of_each_part_make_a_model_that_morphs(work: Path) -> None:
    for module in ("autoencoder", "diffusion"):
        done = run(module, work, "--preset", "tiny", "--steps", "2")
        assert done.returncode == 0, done.stderr
        about = json.loads((work / module / "checkpoint" / "about.json").read_text())
        assert about["step"] == 2
    done = run("export", work)
    assert done.returncode == 0, done.stderr
    assert "_name_or_path" not in "".join(file.read_text() for file in (work / "mini").rglob("*.json"))
    morpher = Morpher.from_pretrained(str(work / "mini"), device="cpu")
    assert next(morpher.pipe.unet.parameters()).dtype == torch.float32
    pictures = [Image.open(file) for file in sorted((ASSETS / "demo").glob("*.png"))[:2]]
    path = morpher.prepare(pictures, "a thing", fit=None, steps=2)
    assert path.noises.shape == (2, 8, 16, 16)

    # A finished run that is asked for more goes on from its checkpoint.
    done = run("autoencoder", work, "--preset", "tiny", "--steps", "3")
    assert done.returncode == 0, done.stderr
    assert json.loads((work / "autoencoder" / "checkpoint" / "about.json").read_text())["step"] == 3


def test_an_autoencoder_starts_from_weights_at_hand(work: Path, tmp_path: Path) -> None:
    def trained(folder: Path, *arguments: object) -> torch.Tensor:
        folder.mkdir()
        for file in ("pictures.zip", "captions.jsonl"):
            shutil.copy(work / file, folder)
        done = run("autoencoder", folder, "--preset", "tiny", "--steps", "1", *arguments)
        assert done.returncode == 0, done.stderr
        return AutoencoderKL.from_pretrained(folder / "vae").encoder.conv_in.weight.detach()

    start = trained(tmp_path / "first", "--seed", "5")
    on = trained(tmp_path / "second", "--start", tmp_path / "first/vae")
    assert (on - start).abs().max() < 0.01  # from another seed's own start it would be ten times as much


def test_the_same_seed_trains_the_same_weights(work: Path, tmp_path: Path) -> None:
    states = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("pictures.zip", "captions.jsonl"):
            (folder / file).write_bytes((work / file).read_bytes())
        done = run("autoencoder", folder, "--preset", "tiny", "--steps", "2", "--seed", "5")
        assert done.returncode == 0, done.stderr
        states.append((folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert states[0] == states[1]


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """Stopped after two of four steps and begun again: the same weights as four steps in one go."""

    def train(folder: Path, stops: list[int]) -> torch.Tensor:
        for stop in stops:
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
            optimizer = Muon(model, 1e-2)
            average = moving_average(model)
            training = Run(folder, {"model": model, "optimizer": optimizer, "average": average}, Limits(60, steps=4))
            for step in training.steps():
                inputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
                optimizer.zero_grad()
                model(inputs).square().sum().backward()
                optimizer.step()
                average.update_parameters(model)
                training.stopped = step + 1 == stop
        return average.module[0].weight

    torch.testing.assert_close(train(tmp_path / "a", [2, 4]), train(tmp_path / "b", [4]), rtol=0, atol=0)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    Run(tmp_path, {"model": model}, Limits(1)).save()
    part = tmp_path / "checkpoint" / "part-000"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(SystemExit, match="damaged"):
        Run(tmp_path, {"model": model}, Limits(1))


def test_checkpoints_come_in_parts_of_sixteen_mebibytes(tmp_path: Path) -> None:
    model = torch.nn.Linear(2048, 2560)  # 21 MB
    Run(tmp_path, {"model": model}, Limits(1)).save()
    sizes = [file.stat().st_size for file in sorted((tmp_path / "checkpoint").glob("part-*"))]
    assert len(sizes) == 2 and max(sizes) == 16 * 2**20


def test_a_slim_checkpoint_holds_the_weights_in_sixteen_bits(tmp_path: Path) -> None:
    model = torch.nn.Linear(8, 8)
    optimizer = Muon(model, 1e-2)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    parts = {"model": model, "optimizer": optimizer}
    Run(tmp_path, parts, Limits(1, slim=True)).save()
    weight = model.weight.detach().clone()
    torch.nn.init.zeros_(model.weight)
    Run(tmp_path, parts, Limits(1))
    torch.testing.assert_close(model.weight.detach(), weight.bfloat16().float(), rtol=0, atol=0)


def test_a_checkpoint_that_was_being_replaced_is_found(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    run_ = Run(tmp_path, {"model": model}, Limits(1))
    run_.step = 7
    run_.save()
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    assert Run(tmp_path, {"model": model}, Limits(1)).step == 7


def test_the_held_out_tenth() -> None:
    names = data.held_out_names()
    pairs = data.held_out_pairs()
    assert len(names) == 185 and len(pairs) == 24
    assert {name for pair in pairs for name in pair} < names
    demo = {file.stem.replace("-", " ") for file in (ASSETS / "demo").glob("*.png")}
    assert demo <= names, "the demo's pictures are among those that the model has never seen"
    pictures = [data.Picture("a.webp", name, (name,), "", 1, True) for name in ("dog face", "dog", "girl", "girl")]
    training, held_out = data.split(pictures)
    assert [p.name for p in training] == ["dog"] and [p.name for p in held_out] == ["dog face", "girl", "girl"]


def test_a_wrong_digest_stops_the_preparation(tmp_path: Path) -> None:
    for file in data.SHA256:
        (tmp_path / file).write_bytes(b"something else")
    done = run("data", tmp_path)
    assert done.returncode == 1 and "has sha256" in done.stderr and "Traceback" not in done.stderr


def test_latents_are_standardised_inside_the_model() -> None:
    torch.manual_seed(0)
    vae = build(CONFIGS["tiny"]).eval()
    images = torch.rand(6, 3, 32, 32) * 2 - 1
    before = reconstruct(vae, images)
    with torch.no_grad():
        spread = vae.encode(images).latent_dist.std
        fold_latent_statistics(vae, images)
        posterior = vae.encode(images).latent_dist
    torch.testing.assert_close(posterior.mean.mean((0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(posterior.mean.std((0, 2, 3)), torch.ones(8), rtol=1e-3, atol=0)
    ratio = posterior.std / spread  # one factor for each channel
    torch.testing.assert_close(ratio, ratio[:1, :, :1, :1].expand_as(ratio), rtol=1e-3, atol=0)
    torch.testing.assert_close(reconstruct(vae, images), before, rtol=1e-3, atol=1e-3)


def test_psnr_of_a_known_error() -> None:
    a = torch.zeros(1, 3, 4, 4)
    assert psnr(a + 0.2, a).item() == pytest.approx(20.0)  # an error of a tenth of the range


def test_orthogonal() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((8, 32), (32, 8)):
        made = orthogonal(torch.randn(shape, generator=generator))
        values = torch.linalg.svdvals(made)
        assert 0.6 < values.min() and values.max() < 1.3
        u, _, v = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(1)), full_matrices=False)
        # A matrix that is orthogonal already keeps its directions.
        kept = orthogonal(u @ v)
        cosine = torch.nn.functional.cosine_similarity(kept.flatten(), (u @ v).flatten(), dim=0)
        assert cosine > 0.99


def test_varied_pictures_stay_on_white_and_flip_only_where_allowed() -> None:
    images = torch.ones(64, 3, 32, 32)
    images[:, :, 8:24, 8:14] = -1  # a black bar left of the middle
    made = varied(images, torch.tensor([True, False]).repeat(32), torch.Generator().manual_seed(0))
    assert made.min() >= -1 and made.max() <= 1
    torch.testing.assert_close(made[:, :, :2], torch.ones(64, 3, 2, 32))
    columns = torch.arange(32.0)
    ink = (1 - made).mean((1, 2))
    centre = (ink * columns).sum(1) / ink.sum(1)
    assert (centre[1::2] < 15.5).all(), "not mirrored where that is not allowed"
    assert (centre[::2] > 15.5).float().mean() == pytest.approx(0.5, abs=0.25)


def test_captions() -> None:
    assert data.clean("DOG FACE") == "dog face" and data.clean("flag-eg") == "flag eg"
    tokenizer = build_tokenizer(["a dog face", "a cat face"] * 4, 540)
    assert tokenizer.decode(tokenizer("a dog face").input_ids, skip_special_tokens=True).strip() == "a dog face"
    assert tokenizer.model_max_length == 24


def test_images_are_read_on_white(work: Path) -> None:
    pictures = data.read_pictures(work)
    images = data.read_images(work, pictures, 64)
    assert images.shape == (8, 3, 64, 64) and images.dtype == np.uint8
    assert (images[:, :, 0, 0] == 255).all()
