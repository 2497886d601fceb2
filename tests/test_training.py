"""The recipe of the bundled model: two steps of each part on real pictures, from the command line."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import math
import shutil
import signal
import subprocess
import sys
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image
from torch.testing import assert_close
from transformers import CLIPTextModel, CLIPTokenizer

from conftest import ASSETS
from diffmorpher import Morpher

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # training/ is beside the package, not in it

from training import data, flow, tries  # noqa: E402
from training.autoencoder import CONFIGS, build, fold_latent_statistics, psnr, reconstruct  # noqa: E402
from training.diffusion import CONFIGS as DIFFUSION  # noqa: E402
from training.diffusion import DiffusionTraining, build_tokenizer, token_ids, varied  # noqa: E402
from training.loop import Limits, Run, moving_average, read_checkpoint  # noqa: E402
from training.optim import Muon, orthogonal  # noqa: E402


def run(module: str, *arguments: object, apart: bool = False) -> subprocess.CompletedProcess[str]:
    """`python -m training.MODULE`, in this process, which has imported already what takes a new one seconds, or apart."""
    command = [sys.executable, "-m", f"training.{module}", *map(str, arguments)]
    if apart:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", command[2:])
        patch.chdir(ROOT)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            importlib.import_module(f"training.{module}").main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            err.write(str(end.code))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


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
        done = run(module, work, "--preset", "tiny", "--steps", "2", apart=module == "autoencoder")
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


def test_a_flow_model_in_slices_and_as_diffusers_loads_it(work: Path, tmp_path: Path) -> None:
    """Two slices end with the bytes of one go; the folder holds the averaged weights and makes a picture as any FLUX folder."""
    slices, once = (shutil.copytree(work, tmp_path / name) for name in ("slices", "once"))
    for folder, *arguments in ((slices, "--slice", 1e-5), (slices,), (once,)):
        done = run("flow", folder, "--preset", "tiny", "--steps", "3", *arguments)
        assert done.returncode == 0, done.stderr
        assert read_checkpoint(folder / "flow")[1]["step"] == (1 if arguments else 3)
    states, expected = (read_checkpoint(folder / "flow")[0] for folder in (slices, once))
    for part in ("model", "average"):
        torch.testing.assert_close(states[part], expected[part], rtol=0, atol=0)

    done = run("export", slices, "--flow")
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) not in "".join(file.read_text() for file in (slices / "mini-flow").rglob("*.json"))
    pipe = FluxPipeline.from_pretrained(slices / "mini-flow")
    assert pipe.vae_scale_factor == 16 and pipe.vae.config.sample_size == 256
    assert pipe.scheduler.config.shift == 1 and not pipe.scheduler.config.use_dynamic_shifting
    for name, module in (("transformer", pipe.transformer), ("text", pipe.text_encoder_2)):
        for key, value in module.state_dict().items():
            trained = expected["average"][f"module.{name}.{key}"]
            torch.testing.assert_close(value, trained.half().float(), rtol=0, atol=0)
    bundled = AutoencoderKL.from_pretrained(ASSETS / "mini/vae").state_dict()
    torch.testing.assert_close(dict(pipe.vae.state_dict()), dict(bundled), rtol=0, atol=0)
    latents = torch.load(slices / "flow/latents.pt").float()
    scaled = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    assert scaled.mean().abs() < 1e-3 and scaled.std() == pytest.approx(1, abs=1e-3)
    picture = pipe(
        "a red apple",
        height=256,
        width=256,
        num_inference_steps=2,
        max_sequence_length=pipe.tokenizer_2.model_max_length,
    ).images[0]
    assert picture.size == (256, 256)


@pytest.fixture
def tiny_flow() -> flow.FlowTraining:
    torch.manual_seed(0)
    config = flow.CONFIGS["tiny"]
    tokenizers = CLIPTokenizer.from_pretrained(ASSETS / "mini/tokenizer"), flow.build_tokenizer(["a red apple"], 100)
    pooling = CLIPTextModel.from_pretrained(ASSETS / "mini/text_encoder", dtype=torch.float32)
    return flow.FlowTraining(config, tokenizers, pooling, (16, 16, 16), torch.device("cpu"))


def test_a_flow_is_trained_on_what_the_pipeline_gives_it(tiny_flow: flow.FlowTraining) -> None:
    """One Euler step of diffusers' pipeline from s = 0.7 misses x_0 by 0.7 times the velocity's error."""
    draw = torch.Generator().manual_seed(0)
    for parameter in tiny_flow.model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=draw)
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(),
        AutoencoderKL.from_pretrained(ASSETS / "mini/vae"),
        tiny_flow.pooling,
        tiny_flow.tokenizers[0],
        tiny_flow.model["text"],
        tiny_flow.tokenizers[1],
        tiny_flow.model["transformer"],
    )
    pipe.set_progress_bar_config(disable=True)
    captions, s = ["a red apple", ""], 0.7
    latents, noise = torch.randn(2, 2, 16, 16, 16, generator=draw)
    found = pipe(
        captions,
        height=256,
        width=256,
        sigmas=[s],
        latents=flow.pack(torch.lerp(latents, noise, s)),
        num_inference_steps=1,
        max_sequence_length=flow.MAX_TOKENS,
        output_type="latent",
    ).images
    with torch.no_grad():
        tokens = tiny_flow.tokens(captions)
        errors = tiny_flow.errors(tiny_flow.model, latents, torch.full((2,), s), noise, *tokens)
    expected = ((found - flow.pack(latents)) / s).square().mean((1, 2))
    torch.testing.assert_close(errors, expected, rtol=2e-3, atol=0)  # bfloat16 there, float32 here
    assert abs(expected[0] - expected[1]) > 1e-2 * expected[0], "the caption makes a difference"


def test_a_flow_learns(tiny_flow: flow.FlowTraining) -> None:
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 16, 1, 1, generator=draw).expand(4, 16, 16, 16)
    before = tiny_flow.check(latents, ["a red apple"] * 4).mean()
    assert before == pytest.approx(1 + latents.square().mean().item(), rel=0.1)  # it predicts nothing at first
    for _ in range(30):
        tiny_flow.step(latents, ["a red apple"] * 4, 1e-2, draw)
    assert tiny_flow.check(latents, ["a red apple"] * 4).mean() < 0.8 * before


def test_times_of_a_flow(tiny_flow: flow.FlowTraining) -> None:
    even = (torch.arange(10_000) + 0.5) / 10_000
    s = tiny_flow.times(even, torch.Generator().manual_seed(0))
    assert 0 < s.min() and s.max() < 1 and s.mean() == pytest.approx(0.5, abs=0.01)
    middle = 0.5 * 0.5 + 0.5 * 0.7286  # a normal draw is within log(3) with 0.728, and is then between 1/4 and 3/4
    assert ((s > 0.25) & (s < 0.75)).float().mean() == pytest.approx(middle, abs=0.01)


def test_a_tokenizer_of_whole_words(tmp_path: Path) -> None:
    made = flow.build_tokenizer(["dog face, pet", "cat face", "red dog"], 40)
    made.save_pretrained(tmp_path)
    for tokenizer in (made, type(made).from_pretrained(tmp_path)):
        assert tokenizer.tokenize("Red dog, face") == ["▁red", "▁dog", ",", "▁face"]
        assert tokenizer.tokenize("doge") == ["▁dog", "e"]
        assert tokenizer.decode(tokenizer("red dog").input_ids, skip_special_tokens=True) == "red dog"
        ids = token_ids(tokenizer, ["", "dog " * 99])
        assert ids.shape == (2, flow.MAX_TOKENS)
        assert ids[0].tolist() == [1, *[0] * (flow.MAX_TOKENS - 1)] and ids[1, -1] == 1


def test_tries_differ_in_what_they_say(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tries, "BASE", dataclasses.replace(DIFFUSION["tiny"], text_width=64))
    for file in ("pictures.zip", "captions.jsonl"):
        shutil.copy(work / file, tmp_path)
    large = ("128-256-320", "64-128-192, text 128 x 3", "batches of 96")  # which are slow, and differ in numbers alone
    found = {
        name: tries.attempt(variant, tmp_path, 0.002, 0)
        for name, variant in tries.VARIANTS.items()
        if name not in large
    }
    base = next(iter(found.values()))
    for name, result in found.items():
        assert result["steps"] >= 1 and all(math.isfinite(error) for error in result["held out"].values()), name
    assert found["two layers a block"]["parameters"] > base["parameters"]

    kinds = [DiffusionTraining, tries.LogitNormal, tries.Unweighted, tries.Wide]
    even, snr = (torch.arange(1000) + 0.5) / 1000, torch.tensor([0.01, 1.0, 100.0])
    plain, middle, unweighted, wide = (kind.__new__(kind) for kind in kinds)
    for part in (plain, middle):
        part.abar, part.config = torch.zeros(1000), DIFFUSION["tiny"]
    draw = torch.Generator()
    assert 0.24 < (plain.times(even, draw) < 250).float().mean() < 0.26
    assert (middle.times(even, draw) < 250).float().mean() == pytest.approx(0.136, abs=0.01)  # P(N < ln(1/3))
    assert_close(plain.weight(snr), snr.clamp(max=5) / (snr + 1))
    assert unweighted.weight(snr).tolist() == [1, 1, 1]
    assert wide.autocast is False and plain.autocast is True


@pytest.mark.gpu
def test_a_captured_step_learns_what_a_plain_one_does() -> None:
    """Six steps, three of them replayed, with a rate that changes: the same losses."""
    losses = []
    for captured in (False, True):
        torch.manual_seed(0)
        tokenizer = build_tokenizer(["a red apple", "a dog face"] * 4, 540)
        part = DiffusionTraining(DIFFUSION["tiny"], tokenizer, (8, 16, 16), torch.device("cuda"))
        if not captured:
            part.learn = part._learn
        draw = torch.Generator().manual_seed(0)
        latents = torch.randn(4, 8, 16, 16, generator=draw)
        losses.append([part.step(latents, ["a red apple"] * 4, 1e-2 / (1 + i), draw).item() for i in range(6)])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2) and losses[0][-1] < 0.95 * losses[0][0]
