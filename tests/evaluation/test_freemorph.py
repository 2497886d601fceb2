"""FreeMorph against its paper's equations, written out naively, one row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from conftest import tiny_pipeline
from diffmorpher import Morpher
from diffmorpher.errors import ConfigError
from diffmorpher.evaluation import freemorph as fm
from diffmorpher.evaluation.methods import Effort, run_method
from diffmorpher.path import to_pixels

PICTURES = [Image.effect_noise((32, 32), s).convert("RGB") for s in (20, 60)]
ALPHAS = torch.tensor([0.25, 0.5, 0.75])


@pytest.fixture(scope="module")
def layer() -> Any:
    unet = tiny_pipeline().unet
    return unet.get_submodule("up_blocks.1.attentions.0.transformer_blocks.0.attn1")


def attend(layer: Any, x: Tensor, query: int, key: int) -> Tensor:
    """ATT(Q_query, K_key, V_key), the heads side by side, (N, D)."""

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (layer.heads, -1)).transpose(0, 1)

    q, k, v = heads(layer.to_q(x[query])), heads(layer.to_k(x[key])), heads(layer.to_v(x[key]))
    return scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)


@torch.no_grad()
@pytest.mark.parametrize("equation", [5, 6, 7])
@pytest.mark.parametrize("guided", [False, True])
def test_attention_is_the_papers(layer: Any, equation: int, guided: bool) -> None:
    x = torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(0))  # left, right, three frames
    halves = [x, x.flip(1) * 2] if guided else [x]
    attention = {
        5: fm.towards_ends(torch.full((3,), 0.5)),
        6: fm.towards_all(3, torch.device("cpu")),
        7: fm.towards_ends(ALPHAS),
    }[equation]
    got = (fm.doubled(attention) if guided else attention)(layer, torch.cat(halves))
    expected = []
    for half in halves:
        for b in range(5):
            if b < 2:
                mixed = attend(layer, half, b, b)  # the images keep their own
            elif equation == 6:
                mixed = sum((attend(layer, half, b, k) for k in (2, 3, 4)), torch.zeros(())) / 3
            else:
                a = 0.5 if equation == 5 else float(ALPHAS[b - 2])
                mixed = (1 - a) * attend(layer, half, b, 0) + a * attend(layer, half, b, 1)
            expected.append(layer.to_out[0](mixed))
    torch.testing.assert_close(got, torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_noise_takes_the_place_of_high_frequencies_alone() -> None:
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    made = fm.inject_noise(z, seed=0, kept=0.5)
    before, after = torch.fft.fft2(z), torch.fft.fft2(made)
    axis = torch.fft.fftfreq(8).abs() * 2
    low = (axis[:, None] <= 0.5) & (axis[None] <= 0.5)
    torch.testing.assert_close(after[..., low], before[..., low], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after[0][..., ~low], after[2][..., ~low], atol=1e-4, rtol=1e-4)  # one draw for all
    assert (after - before).abs()[..., ~low].mean() > 1
    torch.testing.assert_close(fm.inject_noise(z, seed=0, kept=1.0), z, atol=1e-5, rtol=1e-4)
    assert not torch.equal(made, fm.inject_noise(z, seed=1, kept=0.5))


def test_each_window_has_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Algorithm 1 over ten steps: own, own, own, (6) x 3, (7) x 4 up; (7), (7), (5) x 4, own x 4 down."""
    morpher, seen = Morpher(tiny_pipeline()), []
    named: dict[int, str] = {}
    for name in ("towards_ends", "towards_all", "doubled"):
        make = getattr(fm, name)

        def note(*args: Any, name: str = name, make: Any = make) -> Any:
            made = make(*args)
            if name == "towards_ends":
                named[id(made)] = "5" if bool((args[0] == 0.5).all()) else "7"
            else:
                named[id(made)] = "6" if name == "towards_all" else named[id(args[0])]
            return made

        monkeypatch.setattr(fm, name, note)
    attn = morpher.pipe.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1")
    own = attn.processor
    handle = morpher.pipe.unet.register_forward_hook(lambda *_: seen.append(named.get(id(attn.processor), "own")))
    fm.freemorph(morpher.backbone, PICTURES, ["a", "b"], 6, 0, 10)
    handle.remove()
    assert seen[:10] == ["own"] * 3 + ["6"] * 3 + ["7"] * 4
    assert seen[10:] == ["7"] * 2 + ["5"] * 4 + ["own"] * 4
    assert attn.processor is own


@pytest.mark.parametrize(("name", "rows"), [("freemorph", 5 * 4 * 3), ("freemorph-unguided", 5 * 4 * 2)])
def test_as_a_method(name: str, rows: int) -> None:
    morpher = Morpher(tiny_pipeline())
    made = run_method(name, morpher, PICTURES, ["a", "b"], 5, 3, Effort(steps=4))
    assert made.pixels.shape == (5, 3, 32, 32) and made.alphas == [0, 0.25, 0.5, 0.75, 1] and made.unet_rows == rows
    assert torch.equal(made.pixels[[0, 4]], to_pixels(PICTURES))  # the images themselves, as in the paper
    again = run_method(name, morpher, PICTURES, ["a", "b"], 5, 3, Effort(steps=4))
    assert torch.equal(made.pixels, again.pixels)
    assert all(np.isfinite(frame).all() for frame in made.pixels.numpy())


def test_three_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="two images"):
        run_method("freemorph", Morpher(tiny_pipeline()), [*PICTURES, PICTURES[0]], ["", "", ""], 5)
