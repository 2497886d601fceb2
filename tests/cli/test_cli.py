"""The command line as a user runs it: a process of its own, judged by its exit status, its output and its files."""

from __future__ import annotations

import base64
import json
import os
import pickle
import re
import resource
import shlex
import signal
import struct
import subprocess
import sys
import time
import wave
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffmorpher.cli import signals
from diffmorpher.cli.app import DEMO, _explain
from diffmorpher.cli.terminal import StageBars
from diffmorpher.config import FitConfig, SampleConfig, ScheduleConfig
from diffmorpher.errors import ConfigError, OutputError
from diffmorpher.files.films import read_settings, save_film
from diffmorpher.files.loras import load_lora
from diffmorpher.models.catalog import ASSETS, CATALOG
from diffmorpher.settings import MAX_FRAMES, parse_size

PEAR, ROSE = str(ASSETS / "demo" / "pear.png"), str(ASSETS / "demo" / "rose.png")
COMMAND = [sys.executable, "-m", "diffmorpher"]
SMALL = ["--steps", "2", "--frames", "3"]
STAGES = ["fit", "invert", "schedule", "sample"]


def run(*arguments: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=cwd, capture_output=True, text=True, timeout=timeout)


def stage_lines(stderr: str) -> list[str]:
    """The names of the stages that were announced as finished."""
    return re.findall(r"^(\w+) \d+/\d+, [\d.]+ s$", stderr, re.MULTILINE)


# ---- good runs


def test_morph_writes_everything_asked_for_and_prints_one_json_object(tmp_path: Path) -> None:
    done = run(
        *("morph", PEAR, ROSE, "-p", "a pear", "-p", "a rose", "-o", "films/a.mp4", *SMALL, "--lora-steps", "1"),
        *("--json", "--save-frames", "frames", "--save-path", "paths/a.morph"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert list(figures) == [
        *(
            "output",
            "frames",
            "alphas",
            "times",
            "distances",
            "ppl",
            "pdv",
            "ghost",
            "seconds",
            "unet_rows",
            "model",
            "device",
            "seed",
        ),
        "settings",
    ]
    assert figures["settings"] == read_settings(tmp_path / "films/a.mp4")
    assert figures["output"] == "films/a.mp4"
    assert (figures["frames"], figures["model"], figures["seed"]) == (3, "mini", 0)
    assert figures["alphas"][0] == 0 and figures["alphas"][-1] == 1 and len(figures["distances"]) == 2
    assert figures["ppl"] == pytest.approx(sum(figures["distances"]))
    assert list(figures["seconds"]) == ["load", *STAGES, "save"]
    assert all(seconds > 0 for seconds in figures["seconds"].values())
    # 2 images x 4 draws of the fit x 3; 2 images x 2 steps inverted; 2 steps of the 2 ends, then of the ends and a frame
    assert figures["unet_rows"] == 2 * 4 * 3 + 2 * 2 + 2 * 2 + 3 * 2

    assert sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()) == [
        *("films/a.mp4", "frames/frame_0000.png", "frames/frame_0001.png", "frames/frame_0002.png", "paths/a.morph")
    ]
    settings: dict[str, Any] = read_settings(tmp_path / "films/a.mp4") or {}
    assert settings["prompts"] == ["a pear", "a rose"]
    own = CATALOG["mini"]  # its settings hold for what was not typed
    assert settings["sample"] == asdict(replace(own.sample, steps=2))
    assert settings["fit"] == asdict(replace(own.fit, steps=1))

    assert stage_lines(done.stderr) == ["fit", "invert", "sample"]  # the schedule has no pass of its own
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines[3:6] == ["Wrote films/a.mp4", "Wrote frames", "Wrote paths/a.morph"]
    assert lines[6].split() == ["load", *STAGES, "save", "total"]
    assert lines[-1] == "3 frames, 0.375 s.", "its figures are in --json, in words for those who ask for them"
    assert len(lines) == 10, f"something else was printed:\n{done.stderr}"


def test_fit_then_morph_with_its_lora_and_every_option(tmp_path: Path) -> None:
    # The fit runs in a terminal: bars, and the warning about a prompt too long in one line.
    status, shown = run_in_terminal(
        *("fit", PEAR, "-p", "pear " * 200, "-o", "loras/pear.safetensors", "--lora-steps", "2", "--lora-rank", "3"),
        *("--lora-lr", "1e-3", "--size", "64x64", "--resize", "pad", "--seed", "7", "--low-memory"),
        cwd=tmp_path,
    )
    assert status == 0, shown
    assert "━" in shown and "2/2" in shown and "left:" in shown
    assert shown.count("diffmorpher: warning: the prompt 'pear pear") == 1
    lora = load_lora(tmp_path / "loras/pear.safetensors")
    assert {len(matrix) for matrix in lora.down.values()} == {3}
    assert lora.metadata["seed"] == "7"

    done = run(
        *("morph", PEAR, ROSE, "-o", "a.webp", *SMALL, "--lora", "loras/pear.safetensors", "--lora"),
        *("loras/pear.safetensors", "--no-attention", "--no-adain", "--no-reschedule", "--fix-lora", "0.5"),
        *("--guidance", "2", "--size", "64x96", "--resize", "pad", "--loop", "--seed", "5", "--batch-size", "1"),
        *(
            "--attention-mode",
            "kv",
            "--lora-blend",
            "product",
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--fps",
            "4",
            "--low-memory",
        ),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert stage_lines(done.stderr) == ["invert", "sample"]
    assert "warning: --attention-mode changes nothing with --no-attention." in done.stderr
    assert "warning: loras/pear.safetensors was fitted to another picture, or at another size." in done.stderr
    settings: dict[str, Any] = read_settings(tmp_path / "a.webp") or {}
    expected = SampleConfig(
        steps=2,
        attention_lambda=0,
        attention_mode="kv",
        lora_blend="product",
        adain=False,
        guidance_scale=2,
        fix_lora=0.5,
        batch_size=1,
        exact_ends=True,  # the bundled model's own setting, as none was typed
    )
    assert settings["sample"] == asdict(expected)
    assert ScheduleConfig(**settings["schedule"]) == ScheduleConfig(enabled=False)
    assert (settings["size"], settings["resize"], settings["loop"], settings["seed"]) == ([64, 96], "pad", True, 5)
    assert settings["loras"] == ["pear.safetensors"] * 2
    with Image.open(tmp_path / "a.webp") as film:
        film.load()
        assert film.size == (64, 96)
        assert (film.n_frames, film.info["duration"]) == (3, 250)


def test_the_papers_settings(tmp_path: Path) -> None:
    done = run("morph", PEAR, ROSE, "-o", "a.mp4", *SMALL, "--lora-steps", "1", "--paper", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    # 2 images x 1 draw of the fit x 3; 2 images x 2 steps inverted; twice 3 rows x 2 steps sampled
    assert figures["unet_rows"] == 2 * 3 + 2 * 2 + 2 * 3 * 2
    settings = figures["settings"]
    assert settings["fit"] == asdict(FitConfig(steps=1)) and settings["sample"] == asdict(SampleConfig(steps=2))
    assert settings["schedule"]["method"] == "two-pass"


def test_preview(tmp_path: Path) -> None:
    done = run("morph", PEAR, ROSE, "-o", "a.gif", *SMALL, "--preview", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["unet_rows"] == 2 * 2 + 3 * 2  # nothing fitted, one pass
    assert figures["settings"]["fit"] is False and not figures["settings"]["schedule"]["enabled"]
    assert figures["settings"]["sample"] == asdict(SampleConfig(steps=2, attention_mode="outer", exact_ends=True))
    assert stage_lines(done.stderr) == ["invert", "sample"]


def run_in_terminal(*arguments: str, cwd: Path, interrupt_at: str | None = None) -> tuple[int, str]:
    """Exit status, and what standard error showed on a terminal; Ctrl-C is pressed once it shows `interrupt_at`."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=cwd,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=theirs,
        # As a shell starts it: a test run in the background would hand down that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
            if interrupt_at and interrupt_at.encode() in shown:
                process.send_signal(signal.SIGINT)
                interrupt_at = None
    except OSError:  # how Linux says that the other side has closed
        pass
    os.close(ours)
    process.communicate()
    return process.returncode, shown.decode()


@pytest.mark.parametrize(
    ("said", "spins"), [({}, "1500"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")]
)
def test_torchs_threads_do_not_spin_for_long_unless_told_to(said: dict[str, str], spins: str) -> None:
    """As OpenMP itself says it, once torch has been imported."""
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-m", "diffmorpher", "info"],
        env=plain | said | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    assert found == [spins] or (not found and sys.platform != "linux"), done.stderr[-500:]


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    done = run("demo", "--json", "--out", "out", cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    stem = "-".join(name for name, _ in DEMO)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [f"{stem}{s}" for s in (".gif", ".mp4", ".png")]
    figures = json.loads(done.stdout)
    assert (figures["output"], figures["frames"]) == (f"out/{stem}.mp4", 16)
    settings: dict[str, Any] = read_settings(tmp_path / figures["output"]) or {}
    assert settings["sample"] == asdict(SampleConfig())
    assert settings["fit"] == asdict(CATALOG["mini"].fit)


def test_demo_pictures_are_in_the_package() -> None:
    assert len(DEMO) == 2
    assert all((ASSETS / "demo" / f"{name}.png").is_file() and prompt for name, prompt in DEMO)


def test_info_lists_versions_devices_and_models(tmp_path: Path) -> None:
    # A cache with one model of the catalog, one other diffusers model, and one repository that is no such model.
    cache = tmp_path / "hub"
    for repo, file in ((CATALOG["sd15"].source, "model_index.json"), ("a/model", "model_index.json"), ("b/c", "x.bin")):
        snapshot = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / file).write_text("{}")
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "COLUMNS": "200"}
    done = subprocess.run([*COMMAND, "info"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert torch.__version__ in rows["torch"]
    assert "cpu" in rows
    assert "bundled" in rows["mini"] and "not for photographs" in rows["mini"]
    assert "13.9 GB to fetch; 19.3 GB on a GPU, 9.9 with --low-memory" in " ".join(done.stdout.split())
    assert all(len(spec.described()) > len(spec.about) + 10 for spec in CATALOG.values())
    assert "in the cache" in rows["sd15"]
    assert "not downloaded" in rows["sd21"]
    assert "in the cache" in rows["a/model"]
    assert "b/c" not in rows
    assert str(cache) in done.stdout


def test_help_shows_the_defaults_of_the_model_that_is_chosen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffmorpher.cli import app

    def said(*words: str) -> str:
        monkeypatch.setenv("COLUMNS", "300")
        monkeypatch.setattr(sys, "argv", ["diffmorpher", *words])
        with pytest.raises(SystemExit):
            app.main()
        return " ".join(capsys.readouterr().out.split())

    own = CATALOG["mini"]
    for text in (said("morph", "--help"), said("fit", "--help")):
        assert f"Default: {own.fit.steps}, which suits mini (the paper: 200)." in text and "200 *" not in text
    text = said("morph", "--model", "flux-dev", "--help")
    assert "Default: 0.0001, which suits flux-dev (the paper: 0.0002)." in text
    assert "Default: 200, which suits flux-dev, as in the paper." in text and "suits mini" not in text
    assert "Default: 50, which suits sd15, as in the paper." in said("morph", "--help", "--model=sd15")


def test_help_and_version(tmp_path: Path) -> None:
    for arguments, expected in (
        (["--help"], ["demo", "morph", "fit", "info"]),
        ([], ["demo", "morph", "fit", "info"]),
        (["morph", "--help"], ["--attention-lambda", f"{SampleConfig().attention_lambda}", "--save-path"]),
        (["--version"], ["0."]),
    ):
        done = run(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert all(word in done.stdout for word in expected)


# ---- bad input


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files and folders that cannot be used."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "folder").mkdir()
    (folder / "text.png").write_text("not a picture\n")
    (folder / "empty.png").write_bytes(b"")
    whole = Path(PEAR).read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    (folder / "huge.png").write_bytes(_png_header(20_000, 20_000))
    (folder / "damaged.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{not json")
    (folder / "code.ckpt").write_bytes(pickle.dumps(_RunsCode(folder / "code-ran")))
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora"
    matrices = {f"{layer}.down.weight": torch.zeros(4, 999), f"{layer}.up.weight": torch.zeros(999, 4)}
    save_file(matrices, folder / "other-model.safetensors")
    (folder / "fr").mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(folder / "fr" / f"frame_{i:04d}.png")
    (folder / "model" / "unet").mkdir(parents=True)
    (folder / "model" / "unet" / "a.bin").write_text("weights")
    (folder / "model" / "model_index.json").write_text("{}")
    (folder / "picture.safetensors").write_bytes(whole)
    (folder / "loop.mp4").symlink_to("loop.mp4")
    with wave.open(str(folder / "song.wav"), "wb") as song:
        song.setparams((1, 2, 8000, 0, "NONE", ""))
        song.writeframes(bytes(8000))
    os.mkfifo(folder / "pipe.toml")
    os.mkfifo(folder / "pipe.mp4")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "k").mkdir()
    (folder / "k" / "keyframes.json").write_text('{"mine": 1}')
    films = {
        "absolute": [str(folder / "elsewhere.mp4")],
        "upwards": ["a/../../x.mp4"],
        "frame": ["fo", "fo/frame_0001.png"],
        "in-a-file": ["q.mp4", "q.mp4/r.mp4"],
    }
    for name, outs in films.items():
        tables = [f'[[film]]\npictures = [{PEAR!r}, {ROSE!r}]\nout = "{out}"\n' for out in outs]
        (folder / f"{name}.toml").write_text("".join(tables))
    (folder / "size.csv").write_text(f"image_0,image_1,size\n{PEAR},{ROSE},999999999x64\n")
    (folder / "null.toml").write_text('pictures = ["a.png", "b.png"]\nmodel = "a\\u0000b"\n')
    (folder / "dots.toml").write_text(".".join("a" * 40_000) + " = 1\n")
    (folder / "votes.json").write_text(
        json.dumps(
            {
                "key": base64.b64encode(json.dumps([{"left": "votes against", "right": "x"}]).encode()).decode(),
                "votes": [{"trial": 0, "choice": "left"}],
            }
        )
    )
    (folder / "pairs.jsonl").write_text(json.dumps({"image_0": PEAR, "image_1": ROSE, "name": "results.json"}))
    (folder / "results.csv").write_text("image_0,image_1\ntext.png,dot.png\n")
    return folder


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000)))


class _RunsCode:
    """Unpickled, it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.file,)


#: name: (command line, words of its error). {bad} is the folder above; -o film.mp4 is added where no -o is given.
BAD_INPUT: dict[str, tuple[str, str]] = {
    # pictures
    "missing file": ("morph {bad}/nosuch.png {rose}", "nosuch.png' does not exist"),
    "folder as picture": ("morph {pear} {bad}/folder", "is a folder"),
    "text named .png": ("morph {bad}/text.png {rose}", "text.png' is not a picture"),
    "zero bytes": ("morph {bad}/empty.png {rose}", "is empty"),
    "truncated": ("morph {pear} {bad}/truncated.png", "truncated.png' is damaged"),
    "1x1": ("morph {bad}/dot.png {rose}", "1x1 pixels"),
    "20000x20000": ("morph {bad}/huge.png {rose}", "100 megapixels"),
    "same picture twice": ("morph {pear} {pear}", "are the same picture"),
    "same picture at the ends of a loop": ("morph {pear} {rose} {pear} --loop", "are the same picture"),
    "one picture": ("morph {pear}", "at least two images"),
    "no picture": ("morph", "Missing argument 'IMAGE'"),
    # numbers
    "size nan": ("morph {pear} {rose} --size nanx128", "'nanx128'"),
    "size 0": ("morph {pear} {rose} --size 0x0", "0x0"),
    "size negative": ("morph {pear} {rose} --size -64x64", "'-64x64'"),
    "frames 0": ("morph {pear} {rose} --frames 0", "frames is 0"),
    "frames 1": ("morph {pear} {rose} --frames 1", "frames is 1"),
    "frames fewer than pictures": ("morph {pear} {rose} {pear} --frames 2", "2 frames are too few for 3 images"),
    "frames beyond memory": (f"morph {{pear}} {{rose}} --frames {10**12}", str(MAX_FRAMES)),
    "frames no number": ("morph {pear} {rose} --frames abc", "'abc'"),
    "seed no number": ("morph {pear} {rose} --seed x", "'--seed'"),
    "seed negative": ("morph {pear} {rose} --seed -1", "seed is -1"),
    "steps negative": ("morph {pear} {rose} --steps -5", "steps is -5"),
    "lambda 2": ("morph {pear} {rose} --attention-lambda 2", "attention lambda is 2"),
    "lambda nan": ("morph {pear} {rose} --attention-lambda nan", "attention lambda is nan"),
    "guidance 0": ("morph {pear} {rose} --guidance 0", "guidance is 0"),
    "fixed mix beyond the pictures": ("morph {pear} {rose} --fix-lora 1.5", "fixed LoRA mix is 1.5"),
    "batch size 0": ("morph {pear} {rose} --batch-size 0", "batch size is 0"),
    "batch size a word": ("morph {pear} {rose} --batch-size many", "batch size is 'many'"),
    "fps 0": ("morph {pear} {rose} --fps 0", "fps is 0"),
    "fps nan": ("morph {pear} {rose} --fps nan", "fps is nan"),
    "rate negative": ("morph {pear} {rose} --lora-lr -1", "LoRA rate is -1"),
    "rank 0": ("morph {pear} {rose} --lora-rank 0", "LoRA rank is 0"),
    "rank 0 of fit": ("fit {pear} -p pear -o a.safetensors --lora-rank 0", "LoRA rank is 0"),
    # counts and contradictions
    "prompts": ("morph {pear} {rose} -p 1 -p 2 -p 3", "3 prompts were given for 2 images"),
    "LoRAs": ("morph {pear} {rose} --lora a --lora b --lora c", "3 LoRA files were given for 2 images"),
    "one LoRA for all": ("morph {pear} {rose} --lora {bad}/damaged.safetensors", "is a damaged safetensors file"),
    "LoRA and preview": ("morph {pear} {rose} --preview --lora a --lora b", "--lora and --preview contradict"),
    "LoRA and none": ("morph {pear} {rose} --no-lora --lora a --lora b", "--lora and --no-lora contradict"),
    "resize": ("morph {pear} {rose} --resize stretch", "'stretch'"),
    "unknown option": ("morph {pear} {rose} --colour red", "--colour"),
    "unknown command": ("mrph {pear} {rose}", "'mrph'"),
    # outputs
    "no output": ("fit {pear} -p pear", "'-o'"),
    "unknown suffix": ("morph {pear} {rose} -o film.avi", "'.avi'"),
    "a file where a folder is needed": ("morph {pear} {rose} -o {bad}/text.png/film.mp4", "is not a folder"),
    "frames with a suffix": ("morph {pear} {rose} --save-frames frames.png", "frames.png"),
    "path in a file": ("morph {pear} {rose} --save-path {bad}/text.png/a.morph", "text.png/a.morph"),
    "over a picture": ("morph {pear} {rose} -o {rose}", "is a picture to be morphed"),
    "two outputs in one": ("morph {pear} {rose} --save-path film.mp4", "asked for twice"),
    "fit to another format": ("fit {pear} -p pear -o a.ckpt", ".safetensors"),
    "over a LoRA": ("morph {pear} {rose} --lora {other} --lora {other} --save-path {other}", "is a LoRA to be used"),
    "over a LoRA by a recipe": ("morph {pear} {rose} --lora {other} --lora {other} --save-recipe {other}", "a LoRA to"),
    "over the sound": ("morph {pear} {rose} --audio {bad}/song.wav --save-path {bad}/song.wav", "is the sound to be"),
    "a text as sound": ("morph {pear} {rose} --audio {bad}/text.png", "the sound"),
    "over the model": ("morph {pear} {rose} --model {other} --save-path {other}", "is the model to be used"),
    "over the model's folder": (
        "morph {pear} {rose} --model {bad}/model --save-path {bad}/model/unet/a.bin",
        "the model to",
    ),
    "fit over the model": ("fit {pear} -p pear --model {other} -o {other}", "is the model to be used"),
    "fit over the picture": (
        "fit {bad}/picture.safetensors -p pear -o {bad}/picture.safetensors",
        "is a picture to be",
    ),
    "frames over pictures": ("morph {bad}/fr/frame_0000.png {bad}/fr/frame_0001.png -o {bad}/fr", "would write over"),
    "frames over others": (
        "morph {pear} {rose} -o {bad}/fr",
        "holds frame_0000.png, which is no frame of this program",
    ),
    "more frames over others": ("morph {pear} {rose} --save-frames {bad}/fr", "holds frame_0000.png"),
    "demo into /proc": ("demo --out /proc/demo", "'/proc' takes no files"),
    "into /proc": ("morph {pear} {rose} -o /proc/film.mp4", "'/proc' takes no files"),
    "path into /proc": ("morph {pear} {rose} --save-path /proc/a.morph", "'/proc' takes no files"),
    "an address": ("morph {pear} {rose} -o http://host/film.mp4", "is an address"),
    "standard output": ("morph {pear} {rose} -o -", "standard output"),
    "a link to itself": ("morph {pear} {rose} -o {bad}/loop.mp4", "symbolic links"),
    "a picture that is a link to itself": ("morph {bad}/loop.mp4 {rose}", "loop.mp4' cannot be read"),
    "bench over its data": ("bench {bad}/results.csv --methods ddim -o {bad}", "is the data set"),
    "bench into a file": ("bench mini --methods ddim -o {bad}/text.png", "text.png"),
    "study over results": ("study {bad} -o {bad}/results.csv", "must end in .html"),
    "path as a frame": ("morph {pear} {rose} -o fr --save-path fr/frame_0000.png", "among the frames of another"),
    "path as the keyframes": (
        "morph {pear} {rose} --keyframes k --stills 2 --save-path k/keyframes.json",
        "asked for twice",
    ),
    "recipe in the film": ("morph {pear} {rose} --save-recipe film.mp4/r.toml", "which is to be a file"),
    "frames in the film": ("morph {pear} {rose} --save-frames film.mp4/frames", "which is to be a file"),
    "keyframes in the film": ("morph {pear} {rose} --keyframes film.mp4/k", "which is to be a file"),
    "film in the path": ("morph {pear} {rose} -o new/film.mp4 --save-path new", "which is to be a file"),
    "keyframes over others": ("morph {pear} {rose} --keyframes {bad}/k", "keyframes.json' is there, and not from this"),
    "a name of 300 letters": (f"morph {{pear}} {{rose}} -o new/{'n' * 300}/x.mp4", "is too long"),
    "a path of 300 letters": (f"morph {{pear}} {{rose}} --save-path new/{'n' * 300}", "is too long"),
    "batch elsewhere": ("morph --from {bad}/absolute.toml -o films", "is not in the batch's folder"),
    "batch upwards": ("morph --from {bad}/upwards.toml -o films", "is not in the batch's folder"),
    "batch upwards of here": ("morph --from {bad}/upwards.toml -o .", "is not in the batch's folder"),
    "batch over its frames": ("morph --from {bad}/frame.toml -o films", "among the frames of another"),
    "batch in its film": ("morph --from {bad}/in-a-file.toml -o films", "which is to be a file"),
    # more numbers
    "batch size beyond all": ("morph --from {bad}/size.csv -o films", "is too large"),
    "seconds beyond all": ("morph {pear} {rose} --seconds 1e308", "at most 86400"),
    "stretch beyond all": ("morph {pear} {rose} --stretch 1e308", "at most 86400"),
    "guidance beyond all": ("morph {pear} {rose} --guidance 1e308", "to 100"),
    "LoRA steps beyond all": ("morph {pear} {rose} --lora-steps 99999999999999", "to 100000"),
    "frames of bench beyond all": ("bench mini --methods dissolve --frames 99999999999 -o o", "frames is 99999999999"),
    # what is no file, or takes for ever
    "a pipe as recipe": ("morph --from {bad}/pipe.toml -o o.mp4", "no plain file"),
    "a pipe as film": ("morph --from {bad}/pipe.mp4 -o o.mp4", "no plain file"),
    "a pipe as picture": ("morph {bad}/pipe.mp4 {rose}", "no plain file"),
    "a pipe as votes": ("study --tally {bad}/pipe.jsonl", "no file of votes"),
    "a pipe as results": ("compare {bad}/pipe.jsonl {bad}/pipe.jsonl", "no results.json"),
    "a key without an end": ("morph --from {bad}/dots.toml -o o.mp4", "more than 64 parts"),
    "votes for what is counted": ("study --tally {bad}/votes.json", "no file of votes"),
    "a pair named as a file": ("bench {bad}/pairs.jsonl --methods dissolve -o o", "'results.json'"),
    # names
    "a model with a NUL": ("morph --from {bad}/null.toml -o o.mp4", "must be a name"),
    "a model of 5000 letters": (f"morph {{pear}} {{rose}} --model {'m' * 5000}", "is not known"),
    "the whole disk as model": ("morph {pear} {rose} --model /", "holds no model_index.json"),
    "serve from a file": ("serve --port 18473 --data {bad}/text.png", "is not a folder"),
    "serve from /proc": ("serve --port 18473 --data /proc/x", "takes no files"),
    "serve from an address": ("serve --port 18473 --data http://x/y", "is an address"),
    "demo into a file": ("demo --out {bad}/text.png", "text.png"),
}

#: The same, for those that take longer to find out.
SLOWER_BAD_INPUT: dict[str, tuple[str, str]] = {
    "unknown model": ("morph {pear} {rose} --model mino", "did you mean 'mini'"),
    "folder without a model": ("morph {pear} {rose} --model {bad}/folder", "no model_index.json"),
    "unknown device": ("morph {pear} {rose} --device abacus", "'abacus'"),
    "unknown dtype": ("fit {pear} -p pear -o a.safetensors --dtype float7", "'float7'"),
    "missing LoRA": ("morph {pear} {rose} --lora {bad}/no --lora {bad}/no", "does not exist"),
    "damaged LoRA": ("morph {pear} {rose} --lora {damaged} --lora {damaged}", "damaged.safetensors"),
    "LoRA that runs code": ("morph {pear} {rose} --lora {bad}/code.ckpt --lora {bad}/code.ckpt", "code.ckpt"),
    "LoRA of another model": ("morph {pear} {rose} --lora {other} --lora {other}", "other-model.safetensors"),
    "size no multiple": ("morph {pear} {rose} --size 100x128", "100x128"),
}


@pytest.mark.parametrize("name", [*BAD_INPUT, *SLOWER_BAD_INPUT])
def test_bad_input_ends_in_one_line_and_leaves_nothing(name: str, bad: Path, tmp_path: Path) -> None:
    command, words = (BAD_INPUT | SLOWER_BAD_INPUT)[name]
    paths = {"damaged": bad / "damaged.safetensors", "other": bad / "other-model.safetensors"}
    arguments = [word.format(bad=bad, pear=PEAR, rose=ROSE, **paths) for word in command.split()]
    if arguments[0] == "morph" and "-o" not in arguments:
        arguments += ["-o", "film.mp4"]
    inputs = {file: file.lstat().st_mtime_ns for file in (*bad.rglob("*"), Path(PEAR), Path(ROSE))}

    done = run(*arguments, cwd=tmp_path)

    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n"), done.stderr
    assert done.stderr.startswith("diffmorpher: error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
    assert inputs == {file: file.lstat().st_mtime_ns for file in (*bad.rglob("*"), Path(PEAR), Path(ROSE))}


def test_debug_shows_the_traceback_too(tmp_path: Path) -> None:
    done = run("morph", "nosuch.png", ROSE, "-o", "film.mp4", "--debug", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("diffmorpher: error: Picture 'nosuch.png' does not exist")


def test_an_error_is_one_line_even_if_a_file_name_is_not(tmp_path: Path) -> None:
    done = run("morph", "a\nb\x1b[31m.png", ROSE, "-o", "film.mp4", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr


def test_what_needs_no_model_is_checked_before_torch_is_imported(tmp_path: Path) -> None:
    """`--help` and most mistakes are answered at once."""
    script = (
        "import sys\n"
        "import diffmorpher.cli.app\n"
        f"sys.argv = ['diffmorpher', 'morph', {PEAR!r}, {PEAR!r}, '-o', 'film.mp4']\n"  # the last of those checks
        "try:\n"
        "    diffmorpher.cli.app.main()\n"
        "except SystemExit as exit:\n"
        "    print(exit.code, *({'torch', 'diffusers', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "2\n", done.stderr


def test_size_is_parsed() -> None:
    assert parse_size("512x384") == (512, 384)
    assert parse_size(None) is None
    for text in ("", "512", "512 x 384", "512x384x3", "1e3x1e3", "infx8", "٣٢x32", "x"):
        with pytest.raises(ConfigError, match="WxH"):
            parse_size(text)


def test_running_out_of_memory_is_explained() -> None:
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ):
        message, status = _explain(error)
        assert (status, "--low-memory" in message) == (1, True)
    assert _explain(RuntimeError("boom"))[1] == 1


# ---- ends before the end


def test_ctrl_c_stops_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    command = ["morph", PEAR, ROSE, "-o", "film.mp4", "--lora-steps", "9999"]
    status, shown = run_in_terminal(*command, cwd=tmp_path, interrupt_at="/9999")
    assert status == 130
    after_bars = shown.rpartition("\x1b[?25h")[2]  # the cursor is shown again
    assert after_bars.split("\r\n") == ["diffmorpher: stopped", ""]
    assert "Traceback" not in shown and "rror" not in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "number"), [("film.mp4", signal.SIGTERM), ("frames", signal.SIGHUP), ("frames", signal.SIGINT)]
)
def test_a_request_to_end_cleans_up_as_ctrl_c_does(out: str, number: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "morph", PEAR, ROSE, "-o", out, "--no-lora", "--steps", "2", "--frames", "9999", "--no-reschedule"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    while not list(tmp_path.glob(".diffmorpher-*.part")):  # the film is being written
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, shown = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert shown.splitlines()[-1] == "diffmorpher: stopped" and "Traceback" not in shown
    assert not list(tmp_path.iterdir())


def test_ctrl_c_at_any_moment_of_the_start_stops_at_once(tmp_path: Path) -> None:
    """In the midst of imports an exception showed a traceback, or was swallowed, or broke a library ("terminate called")."""
    command = [*COMMAND, "morph", PEAR, ROSE, "-o", "film.mp4", "--lora-steps", "9999"]
    for delay in (0.15, 0.3, 0.6, 1.2, 2.4, 4.0):
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
        )
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=30)
        assert (process.returncode, shown.splitlines()[-1:]) == (130, ["diffmorpher: stopped"]), f"{delay}: {shown}"
        assert not list(tmp_path.iterdir())


def test_an_interruption_that_was_swallowed_is_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_asked", None)
    progress = StageBars()
    progress("fit", 1, 9)
    with pytest.raises(KeyboardInterrupt):
        signals._raise(signal.SIGTERM, None)  # and let us say that a callback in C lost it
    with pytest.raises(KeyboardInterrupt):
        progress("fit", 2, 9)
    assert signals.status() == 143


@pytest.mark.parametrize("streams", ["2>&1 | head -n 1", "2>/dev/full", "<&- >&- 2>&-", "--json | true"])
def test_a_film_is_made_whoever_reads_what_is_said(streams: str, tmp_path: Path) -> None:
    film = shlex.join([*COMMAND, "morph", PEAR, ROSE, "-o", "film.gif", *SMALL, "--no-lora"])
    shell = ["bash", "-o", "pipefail", "-c", f"{film} {streams}"]
    done = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["film.gif"]
    assert "Traceback" not in done.stderr and "rror" not in done.stderr


def test_help_into_head(tmp_path: Path) -> None:
    shell = ["bash", "-o", "pipefail", "-c", f"{shlex.join(COMMAND)} morph --help | head -n 1 >/dev/null"]
    for _ in range(3):
        done = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_python_without_texts_is_said(tmp_path: Path) -> None:
    command = [sys.executable, "-OO", "-m", "diffmorpher", "morph", PEAR, ROSE, "-o", "film.mp4", *SMALL]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "start it without" in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_is_no_utf_8_is_said(tmp_path: Path) -> None:
    for command in (["morph", PEAR, ROSE, "-o", "a.mp4"], ["fit", PEAR, "-o", "a.safetensors"]):
        prompt = [b"-p", b"caf\xe9"]
        done = subprocess.run([*COMMAND, *command, *prompt], cwd=tmp_path, capture_output=True)
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1
        assert b"is not UTF-8" in done.stderr


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    """The one that a relative output is in; an absolute one needs it not."""
    shell = f"mkdir gone; cd gone; rmdir ../gone; {shlex.join([*COMMAND, 'morph', PEAR, ROSE, '-o', 'film.mp4'])}"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True)
    expected = "diffmorpher: error: the folder this was started in is gone: change to another."
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, expected)


def test_a_reader_that_has_gone_is_no_error(tmp_path: Path) -> None:
    process = subprocess.Popen([*COMMAND, "--help"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.close()  # long before the first line
    assert process.stderr.read() == b""
    process.wait()


def test_a_full_disk_is_a_failure_at_work_and_what_was_written_is_said(tmp_path: Path) -> None:
    """`ulimit -f`: files beyond 200 kB cannot be written, which the film is not and the path is."""
    done = subprocess.run(
        [*COMMAND, "morph", PEAR, ROSE, "-o", "film.mp4", *SMALL, "--lora-steps", "1", "--save-path", "a.morph"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert done.returncode == 1, done.stderr
    lines = done.stderr.splitlines()
    assert "Wrote film.mp4" in lines
    assert lines[-1] == (
        "diffmorpher: error: the path file a.morph cannot be written (File too large): free some space or choose another "
        "place."
    )
    assert [file.name for file in tmp_path.iterdir()] == ["film.mp4"]


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ""])
def test_every_kind_of_output_says_so_alike(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught:
        film_on_a_full_disk(tmp_path / f"a{suffix}")
    message, status = _explain(caught.value)
    assert status == 1 and "free some space" in message


def film_on_a_full_disk(out: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        save_film([Image.effect_noise((64, 64), 50)] * 3, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_a_fit_that_breaks_up_is_a_failure_at_work(tmp_path: Path) -> None:
    broken = ("--lora-steps", "2", "--lora-lr", "1e30", "--no-reschedule")
    done = run("morph", PEAR, ROSE, "-o", "film.mp4", *SMALL, *broken, cwd=tmp_path)
    assert done.returncode == 1
    assert "NaN" in done.stderr.splitlines()[-1] and "LoRA rate" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
