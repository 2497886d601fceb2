"""Memory that runs out, on a GPU or a CPU: the work goes on in halves, says so, and makes the same film."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import tiny_flux_pipeline, tiny_pipeline
from diffmorpher import FitConfig, Morpher, MorphResult, SampleConfig
from diffmorpher.errors import OutOfMemory
from diffmorpher.models import memory
from diffmorpher.models.memory import is_out_of_memory

PICTURES = [Image.effect_noise((32, 32), s).convert("RGB") for s in (20, 60, 90)]
FIT, SAMPLE = FitConfig(rank=2, steps=3, learning_rate=1e-2), SampleConfig(steps=3)
#: As torch says it on a GPU, on a CPU, in a convolution there, and as Python does.
ERRORS: list[Callable[[], BaseException]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    lambda: RuntimeError("could not create a primitive"),
    lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError,
]


class Room:
    """A network that holds batches of so many rows, fewer while gradients are kept; `refused` counts those that were larger."""

    def __init__(self, network: torch.nn.Module, rows: int, trained: int | None = None, error: Any = ERRORS[0]) -> None:
        self.refused = self.taken = 0
        self.rows, self.trained, self.error = rows, rows if trained is None else trained, error
        self.network = network
        network.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: Any, args: Any, kwargs: Any) -> None:
        batch = args[0] if args else kwargs["hidden_states"]
        kept = torch.is_grad_enabled() and not getattr(module, "is_gradient_checkpointing", False)
        if len(batch) > (self.trained if kept else self.rows):
            self.refused += 1
            raise self.error()
        self.taken = max(self.taken, len(batch))


def film(morpher: Morpher, **options: Any) -> MorphResult:
    return morpher(PICTURES, ["a", "b", "c"], 7, fit=FIT, sample=SAMPLE, **options)


def said(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, [str(w.message) for w in caught if "memory" in str(w.message)]


def assert_near(one: MorphResult, other: MorphResult) -> None:
    for a, b in zip(one.frames, other.frames, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 2


@pytest.mark.parametrize("error", ERRORS)
def test_each_way_of_saying_it_is_known(error: Callable[[], BaseException]) -> None:
    wrapped = RuntimeError("the callback failed")
    wrapped.__cause__ = error()
    assert is_out_of_memory(error()) and is_out_of_memory(wrapped)


def test_batches_are_halved_until_they_fit_and_the_film_is_the_same() -> None:
    plain = film(Morpher(tiny_pipeline()))
    morpher = Morpher(tiny_pipeline())
    room = Room(morpher.backbone.network, rows=4, trained=2)
    encoder, decoder = (
        Room(morpher.pipe.vae.encoder, 1, error=ERRORS[1]),
        Room(morpher.pipe.vae.decoder, 1, error=ERRORS[2]),
    )
    result, sentences = said(lambda: film(morpher))
    assert_near(result, plain)
    assert room.refused and encoder.refused and decoder.refused and room.taken <= 4
    assert sentences[:2] == [
        "not enough memory to encode 3 pictures at once; going on with 1 at once.",
        "not enough memory to fit 3 images at once; going on with 1 at once.",
    ]
    assert "not enough memory to decode 2 frames at once; going on with 1 at once." in sentences
    assert any("to sample" in sentence for sentence in sentences)

    before = room.refused + encoder.refused + decoder.refused
    again, sentences = said(lambda: film(morpher))  # what fits is known now
    assert (room.refused + encoder.refused + decoder.refused, sentences) == (before, [])
    assert [f.tobytes() for f in again.frames] == [f.tobytes() for f in result.frames]


def test_the_inversion_takes_turns_with_each_images_own_lora() -> None:
    plain = Morpher(tiny_pipeline()).prepare(PICTURES, ["a", "b", "c"], fit=FIT, steps=3)
    morpher = Morpher(tiny_pipeline())
    Room(morpher.backbone.network, rows=2)
    reports: list[tuple[str, int, int]] = []
    path, sentences = said(
        lambda: morpher.prepare(PICTURES, ["a", "b", "c"], fit=FIT, steps=3, progress=lambda *now: reports.append(now))
    )
    assert "not enough memory to invert 3 images at once; going on with 1 at once." in sentences
    torch.testing.assert_close(path.noises, plain.noises, rtol=1e-3, atol=1e-4)
    assert reports[-1] == ("invert", 9, 9) and ("fit", 9, 9) in reports


def test_one_image_that_has_no_room_is_fitted_with_checkpointing() -> None:
    morpher = Morpher(tiny_flux_pipeline())
    room = Room(morpher.backbone.network, rows=8, trained=0)
    _, sentences = said(lambda: film(morpher))
    assert room.refused == 2 and sentences == [
        "not enough memory to fit 3 images at once; going on with 1 at once.",
        "not enough memory to fit 1 image at once; going on with gradient checkpointing, which takes longer.",
    ]
    assert not morpher.backbone.network.is_gradient_checkpointing


@pytest.mark.parametrize("low_memory", [False, True])
def test_where_not_even_one_fits_the_settings_that_need_less_are_named(low_memory: bool) -> None:
    morpher = Morpher(tiny_pipeline(), low_memory=low_memory)
    room = Room(morpher.backbone.network, rows=0)
    less = "" if low_memory else r"--low-memory \(low_memory=True\), "
    tips = rf"at 32x32; what needs less: {less}--dtype bfloat16, --size 20x20\.$"
    with (
        pytest.warns() if not low_memory else warnings.catch_warnings(),
        pytest.raises(OutOfMemory, match=f"fit one image {tips}"),
    ):
        film(morpher)
    room.rows = 3  # in which no frame fits beside its two ends
    path = morpher.prepare(PICTURES, fit=None, steps=3)
    room.rows = 2
    with pytest.raises(OutOfMemory, match=f"not enough memory to sample one frame {tips}"):
        path.sample([0.5], SAMPLE)
    assert not any(m._forward_hooks for m in morpher.backbone.network.modules())
    Room(morpher.pipe.text_encoder, rows=0, error=MemoryError)
    with pytest.raises(OutOfMemory, match=f"not enough memory to encode the prompts {tips}"):
        morpher.prepare(PICTURES, fit=None)


def test_memory_that_runs_out_beside_the_batches_is_explained() -> None:
    morpher = Morpher(tiny_pipeline())
    path = morpher.prepare(PICTURES, fit=None, steps=3)

    def write(frames: Any, settings: Any) -> None:
        list(frames)
        raise MemoryError

    with pytest.raises(OutOfMemory, match="not enough memory to make the film at 32x32; what needs less"):
        morpher.film(path, 3, SAMPLE, write=write)


def test_other_errors_pass_through_at_once() -> None:
    for error in (
        RuntimeError("shapes do not match"),
        OSError("no such file"),
        KeyboardInterrupt(),
        ValueError("memory"),
    ):
        assert not is_out_of_memory(error)
        morpher = Morpher(tiny_pipeline())
        room = Room(morpher.backbone.network, rows=0, error=lambda error=error: error)
        with pytest.raises(type(error)) as caught:
            film(morpher)
        assert caught.value is error and room.refused == 1


def test_what_a_failed_batch_held_is_free_when_the_next_begins() -> None:
    """Else two halves would need more than the whole."""
    held: list[int] = []
    alive: list[Any] = []

    class Piece:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    def work(size: int) -> int:
        held.append(len(alive))
        piece = Piece()
        piece.itself = piece  # type: ignore[attr-defined]
        if size > 1:
            raise MemoryError(piece)
        return size

    backbone = Morpher(tiny_pipeline()).backbone
    with pytest.warns(UserWarning, match="going on"):
        assert memory.in_parts(backbone, "try", "thing", (4, 4), 8, work) == 1
    assert held == [0, 0, 0, 0] and backbone.fits == {("try", 4, 4): 1}


# ---- a real limit

LIMITED = """
import resource, sys, warnings
import torch
from PIL import Image
from conftest import tiny_pipeline
from diffmorpher import Morpher, SampleConfig
torch.set_num_threads(1)
room = int(sys.argv[1])
warnings.showwarning = lambda message, *_, **__: print(message)
pictures = [Image.effect_noise((128, 128), s).convert("RGB") for s in (20, 60)]
path = Morpher(tiny_pipeline()).prepare(pictures, size=(128, 128), fit=None, steps=2)
path.sample([0.5], SampleConfig(steps=2))
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + room * 2**20, -1))
try:
    frames = path.sample([i / 65 for i in range(1, 65)], SampleConfig(steps=2, batch_size=64))
    print("made", len(frames))
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS")
@pytest.mark.parametrize(
    ("room", "end"), [(2000, "made 64"), (230, "made 64"), (4, "OutOfMemory: not enough memory to ")]
)
def test_a_real_limit_of_memory(tmp_path: Path, room: int, end: str) -> None:
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    run = subprocess.run(
        [sys.executable, str(script), str(room)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].startswith(end), run.stdout + run.stderr[-2000:]
    assert ("going on with" in run.stdout) == (room != 2000)
