"""Each formula of the method against a slow, independent version written here in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from conftest import tiny_pipeline
from diffmorpher.errors import ConfigError
from diffmorpher.method.interpolate import Between, adain, lerp, noise_between, slerp
from diffmorpher.method.invert import invert
from diffmorpher.method.schedule import even_alphas, even_positions, share_gaps, uniform_positions
from diffmorpher.models.conditioning import Conditioning
from diffmorpher.models.levels import Prediction
from diffmorpher.models.stable_diffusion import StableDiffusion

# ---- slerp and AdaIN (section 5), conditioning (section 6)


def slow_slerp(x: np.ndarray, y: np.ndarray, a: float) -> np.ndarray:
    dot = sum(float(p) * float(q) for p, q in zip(x.ravel(), y.ravel(), strict=True))
    cos = dot / math.sqrt(sum(float(p) ** 2 for p in x.ravel())) / math.sqrt(sum(float(q) ** 2 for q in y.ravel()))
    theta = math.acos(min(max(cos, -1 + 1e-7), 1 - 1e-7))
    return math.sin((1 - a) * theta) / math.sin(theta) * x + math.sin(a * theta) / math.sin(theta) * y


def slow_adain(z: np.ndarray, x: np.ndarray, y: np.ndarray, a: float) -> np.ndarray:
    out = np.empty_like(z)
    for c in range(len(z)):
        n = z[c].size
        mean = z[c].sum() / n
        normal = (z[c] - mean) / math.sqrt(((z[c] - mean) ** 2).sum() / n + 1e-5)
        mean_0, mean_1 = x[c].sum() / n, y[c].sum() / n
        std_0 = math.sqrt(((x[c] - mean_0) ** 2).sum() / (n - 1) + 1e-5)
        std_1 = math.sqrt(((y[c] - mean_1) ** 2).sum() / (n - 1) + 1e-5)
        out[c] = normal * ((1 - a) * std_0 + a * std_1) + (1 - a) * mean_0 + a * mean_1
    return out


def noises(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2, rows, 4, 5, 6, generator=generator, dtype=torch.float64)
    return z[0] * 1.3 + 0.2, z[1] * 0.8 - 0.1


@settings(max_examples=25, deadline=None)
@given(alpha=st.floats(0, 1), seed=st.integers(0, 1000))
def test_slerp_is_the_formula(alpha: float, seed: int) -> None:
    x, y = noises(2, seed)
    got = slerp(x, y, torch.tensor([alpha, 1 - alpha], dtype=torch.float64)).numpy()
    assert_close(got[0], slow_slerp(x[0].numpy(), y[0].numpy(), alpha))
    assert_close(got[1], slow_slerp(x[1].numpy(), y[1].numpy(), 1 - alpha))


@pytest.mark.parametrize("factor", [1.0, -1.0, 2.0])
def test_slerp_of_parallel_noises_is_finite(factor: float) -> None:
    x, _ = noises(3)
    got = slerp(x, factor * x, torch.tensor([0.0, 0.5, 1.0]))
    assert torch.isfinite(got).all()
    assert_close(got[0], x[0])
    assert_close(got[2], factor * x[2])


def test_slerp_keeps_the_dtype_and_computes_in_float64() -> None:
    x, y = (z.float() for z in noises(1))
    got = slerp(x, y, torch.tensor([0.3]))
    assert got.dtype == torch.float32
    exact = slow_slerp(x[0].double().numpy(), y[0].double().numpy(), float(torch.tensor(0.3)))
    assert np.abs(got[0].numpy() - exact).max() < 2e-7


@settings(max_examples=25, deadline=None)
@given(alpha=st.floats(0, 1), seed=st.integers(0, 1000))
def test_adain_is_the_formula(alpha: float, seed: int) -> None:
    x, y = noises(1, seed)
    z = torch.randn(1, 4, 5, 6, dtype=torch.float64) * 3 + 1
    got = adain(z, x, y, torch.tensor([alpha], dtype=torch.float64))
    assert_close(got[0].numpy(), slow_adain(z[0].numpy(), x[0].numpy(), y[0].numpy(), alpha))


def test_noise_between_takes_each_rows_own_neighbours() -> None:
    z = torch.cat(noises(2))  # 4 images
    rows = Between.images([0.25, 2.5, 3.0], 4)
    got = noise_between(z, rows, use_adain=True)
    for row, (left, right, a) in enumerate([(0, 1, 0.25), (2, 3, 0.5), (2, 3, 1.0)]):
        x, y = z[left].numpy(), z[right].numpy()
        assert_close(got[row].numpy(), slow_adain(slow_slerp(x, y, a), x, y, a))
        assert_close(noise_between(z, rows, use_adain=False)[row].numpy(), slow_slerp(x, y, a))


def test_lerp_is_exact_at_the_ends() -> None:
    x, y = torch.full((3, 2), 1e8), torch.full((3, 2), 1.1)
    got = lerp(x, y, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert torch.equal(got[0], x[0]) and torch.equal(got[2], y[2])
    assert_close(got[1], torch.full((2,), (1e8 + 1.1) / 2))


def test_positions_split_into_neighbours_and_weights() -> None:
    rows = Between.images([0, 0.25, 1, 1.5, 2], 3)
    assert rows.left.tolist() == [0, 0, 1, 1, 1] and rows.right.tolist() == [1, 1, 2, 2, 2]
    assert rows.weights(3).tolist() == [[1, 0, 0], [0.75, 0.25, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]]
    ring = Between.images([2.25, 3], 3, loop=True)
    assert ring.weights(3).tolist() == [[0.25, 0, 0.75], [1, 0, 0]]
    for bad in (-0.1, 2.1, math.nan):
        with pytest.raises(ConfigError, match="from 0 to 2"):
            Between.images([0, bad], 3)


# ---- DDIM inversion (section 4) and sampling


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_inversion_is_the_formula(prediction_type: str) -> None:
    """Three rows at once against a per-image loop with the formula written out in float64."""
    pipe = tiny_pipeline(prediction_type)
    pipe.unet.double()
    z_0, c = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 32)
    got = invert(StableDiffusion(pipe), z_0, Conditioning({"text": c}), steps=7, rule="plain")
    assert got.shape == (8, 3, 4, 8, 8) and torch.equal(got[0], z_0)

    scheduler = pipe.scheduler
    scheduler.set_timesteps(7)
    timesteps = sorted(int(t) for t in scheduler.timesteps)
    for k in range(3):
        z = z_0[k : k + 1].double()
        before = float(scheduler.final_alpha_cumprod)
        for i, t in enumerate(timesteps):
            abar = float(scheduler.alphas_cumprod[t])
            with torch.no_grad():
                e = pipe.unet(z, t, encoder_hidden_states=c[k : k + 1].double()).sample
            if prediction_type == "v_prediction":  # v = a eps - s x_0 and z = a x_0 + s eps, at t
                e = math.sqrt(abar) * e + math.sqrt(1 - abar) * z
            x_0 = (z - math.sqrt(1 - before) * e) / math.sqrt(before)
            z = math.sqrt(abar) * x_0 + math.sqrt(1 - abar) * e
            before = abar
            assert_close(got[i + 1, k : k + 1].double(), z, rtol=1e-4, atol=1e-4)


def test_uni_inversion_is_the_formula_and_nearer_to_the_samplers_inverse() -> None:
    """Two rows against a loop written out in float64; then both rules' way there and back."""
    pipe = tiny_pipeline()
    pipe.unet.double()
    pipe.unet.conv_out.weight.data *= 0.2  # a random network is rougher than a trained one
    backbone, z_0, c = StableDiffusion(pipe), torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    text = Conditioning({"text": c})
    got = invert(backbone, z_0, text, steps=7, rule="uni")
    levels = backbone.schedule(7).levels

    def up(z: torch.Tensor, e: torch.Tensor, i: int) -> torch.Tensor:
        below, here = levels[i - 1], levels[i]
        return here.a * (z - below.s * e) / below.a + here.s * e

    z, e = z_0.double(), None
    for i in range(1, 8):
        with torch.no_grad():
            e = pipe.unet(z if e is None else up(z, e, i), levels[i].time, encoder_hidden_states=c.double()).sample
        z = up(z, e, i)
        assert_close(got[i].double(), z, rtol=1e-4, atol=1e-4)

    def lost(rule: str) -> float:
        schedule = backbone.schedule(20)
        z = invert(backbone, z_0, text, 20, rule=rule)[-1]  # type: ignore[arg-type]
        with torch.no_grad():
            for level in range(20, 0, -1):
                z = schedule.down(backbone.predict(z, schedule.levels[level], text), level)
        return float((z - z_0).square().mean().sqrt())

    assert lost("uni") < 0.5 * lost("plain")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_sampling_step_is_diffusers_ddim(prediction_type: str) -> None:
    backbone = StableDiffusion(tiny_pipeline(prediction_type))
    schedule, oracle = backbone.schedule(10), DDIMScheduler.from_config(backbone.pipe.scheduler.config)
    oracle.set_timesteps(10)
    c = torch.randn(2, 5, 32)
    text = Conditioning({"text": c})
    ours = theirs = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        for i, t in enumerate(oracle.timesteps):
            level = 10 - i
            assert schedule.levels[level].time == int(t)
            ours = schedule.down(backbone.predict(ours, schedule.levels[level], text), level)
            theirs = oracle.step(
                backbone.network(theirs, t, encoder_hidden_states=c).sample, t, theirs, eta=0
            ).prev_sample
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_inversion_and_sampling_undo_each_other_step_by_step() -> None:
    schedule = StableDiffusion(tiny_pipeline()).schedule(50)
    z, eps = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    for level in range(1, 51):
        up = schedule.up(z, Prediction(z, eps), level)
        here = schedule.levels[level]
        assert_close(schedule.down(Prediction((up - here.s * eps) / here.a, eps), level), z)


def test_zero_terminal_snr_stays_finite() -> None:
    pipe = tiny_pipeline("v_prediction")
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    backbone = StableDiffusion(pipe)
    schedule, z = backbone.schedule(5), torch.randn(1, 4, 8, 8)
    c = Conditioning({"text": torch.randn(1, 5, 32)})
    assert schedule.levels[-1].time == 999
    with torch.no_grad():
        for level in range(5, 0, -1):
            z = schedule.down(backbone.predict(z, schedule.levels[level], c), level)
    assert torch.isfinite(z).all()


@pytest.mark.parametrize(
    ("attention_lambda", "steps", "expected"),
    [(0.6, 50, 30), (0, 50, 0), (1, 50, 50), (0.28, 25, 7), (0.5, 5, 3), (0.6, 20, 12), (0.01, 50, 1), (0.07, 100, 7)],
)
def test_replaced_steps_are_exact(attention_lambda: float, steps: int, expected: int) -> None:
    schedule = StableDiffusion(tiny_pipeline()).schedule(steps)
    replaced = [schedule.replaces(attention_lambda, level) for level in range(steps, 0, -1)]
    assert replaced == [True] * expected + [False] * (steps - expected)


# ---- rescheduling (section 8)


def test_uniform_curve_stays_uniform() -> None:
    assert_close(even_alphas(np.linspace(0, 1, 6), [0.2] * 5, 6), np.linspace(0, 1, 6).tolist())


def test_one_jump_draws_the_frames_into_it() -> None:
    # Everything happens between 0.4 and 0.6: 11 frames lie evenly in there, but for the ends.
    new = even_alphas([0, 0.2, 0.4, 0.6, 0.8, 1], [0, 0, 1, 0, 0], 11)
    assert_close(new, [0.0, *np.linspace(0.4, 0.6, 11)[1:-1], 1.0])


def test_known_two_speed_curve() -> None:
    # Half the way is done in the first quarter: cumulated (0, 1/2, 1) at alpha (0, 1/4, 1).
    assert_close(even_alphas([0, 0.25, 1], [3, 3], 5), [0.0, 0.125, 0.25, 0.625, 1.0])


def test_flat_stretch_divides_by_nothing_and_is_jumped() -> None:
    new = even_alphas([0, 0.25, 0.5, 0.75, 1], [1, 0, 0, 1], 5)
    assert all(math.isfinite(a) for a in new) and new == sorted(new)
    assert new[0] == 0 and new[-1] == 1
    assert_close([new[1], new[3]], [0.125, 0.875])
    assert 0.25 <= new[2] <= 0.75


def test_no_distance_at_all_is_uniform() -> None:
    assert even_alphas([0, 0.3, 1], [0, 0], 5) == [0, 0.25, 0.5, 0.75, 1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(2, 30))
def test_even_alphas_invert_the_curve(distances: list[float], num: int) -> None:
    """Read off the new alphas on the curve itself, by hand: the heights are uniform (but over flat stretches)."""
    alphas = np.linspace(0, 1, len(distances) + 1)
    new = even_alphas(alphas, distances, num)
    total = sum(distances)
    assert len(new) == num and new == sorted(new) and new[0] == 0 and new[-1] == 1
    if total > 1e-9:
        for i, a in enumerate(new[1:-1], 1):
            height = sum(
                d * min(max((a - x) / (y - x), 0), 1) for d, x, y in zip(distances, alphas, alphas[1:], strict=False)
            )
            assert height / total == pytest.approx(i / (num - 1), abs=1e-6)


def test_positions_pass_through_every_image() -> None:
    assert_close(uniform_positions(16, 2), np.linspace(0, 1, 16).tolist())
    assert uniform_positions(5, 3) == [0, 0.5, 1, 1.5, 2]
    assert uniform_positions(4, 2, loop=True) == [0, 0.5, 1, 1.5]
    for n in range(3, 20):
        assert {0.0, 1.0, 2.0} <= set(uniform_positions(n, 3)) and len(uniform_positions(n, 3)) == n
    with pytest.raises(ConfigError, match="at least 4"):
        uniform_positions(3, 4)


def test_gaps_go_where_the_way_is_long() -> None:
    assert share_gaps(10, [1, 1]) == [5, 5]
    assert share_gaps(8, [5, 1]) == [6, 2]
    assert share_gaps(4, [0, 1]) == [1, 3]
    assert share_gaps(5, [0, 0, 0]) == [2, 2, 1]


def test_film_of_three_images_is_rescheduled_stretch_by_stretch() -> None:
    # Stretch 0 is three times as long as stretch 1 and all of it lies in its second half.
    positions = even_positions([0, 0.5, 1, 1.5, 2], [0, 6, 1, 1], 11, 3)
    assert len(positions) == 11 and {0.0, 1.0, 2.0} <= set(positions)
    first = [p for p in positions if 0 < p < 1]
    assert len(first) == 6 and min(first) > 0.5
    assert_close([p for p in positions if p > 1], [4 / 3, 5 / 3, 2.0])


def test_loop_leaves_out_the_repeated_frame() -> None:
    positions = even_positions([0, 0.5, 1, 1.5], [1, 1, 1, 1], 6, 2, loop=True)
    assert_close(positions, [0.0, 1 / 3, 2 / 3, 1.0, 4 / 3, 5 / 3])
