"""The LoRA bank: interpolation, fitting all images together, and leaving a user's pipeline as it was."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from conftest import tiny_pipeline
from diffmorpher import Cancelled, FitConfig, Lora, Morpher, SampleConfig
from diffmorpher.errors import LoraError
from diffmorpher.method.fit import _timesteps, fit_loras
from diffmorpher.method.lora import LoraBank
from diffmorpher.models.conditioning import Conditioning
from diffmorpher.models.stable_diffusion import StableDiffusion


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def random_loras(ranks: list[int], start: str | None = None) -> list[Lora]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    metadata = {"start": start} if start else {}
    return [
        Lora({"first": draw(r, 6), "second": draw(r, 5)}, {"first": draw(5, r), "second": draw(7, r)}, dict(metadata))
        for r in ranks
    ]


def slow(net: TwoLayers, loras: list[Lora], x: Tensor, w: Tensor, blend: str) -> Tensor:
    """One row (N, 6) through the net in float64, each matrix element of the mixture summed by hand."""
    for layer, module in (("first", net.first), ("second", net.second)):
        y = x.double() @ module.weight.double().T + (0 if module.bias is None else module.bias.double())
        if blend == "factors":
            a = sum(float(w[k]) * lora.down[layer].double() for k, lora in enumerate(loras))
            b = sum(float(w[k]) * lora.up[layer].double() for k, lora in enumerate(loras))
            y = y + x.double() @ a.T @ b.T
        else:
            for k, lora in enumerate(loras):
                y = y + float(w[k]) * (x.double() @ lora.down[layer].double().T @ lora.up[layer].double().T)
        x = y.tanh() if layer == "first" else y
    return x


WEIGHTS = torch.tensor([[1, 0, 0], [0.3, 0.7, 0], [0, 0.5, 0.5], [0, 0, 1.0]])


@pytest.mark.parametrize(
    ("blend", "expected", "ranks", "start"),
    [
        ("factors", "factors", [4, 4, 4], None),
        ("product", "product", [4, 4, 4], "same"),
        ("product", "product", [2, 5, 3], None),  # ranks may differ
        ("auto", "factors", [4, 4, 4], "same"),
        ("auto", "product", [4, 4, 4], None),
    ],
)
def test_interpolation_is_the_formula(blend: str, expected: str, ranks: list[int], start: str | None) -> None:
    net, loras, x = TwoLayers(), random_loras(ranks, start), torch.randn(4, 9, 6)
    bank = LoraBank.stack(loras, net, ["a", "b", "c"])
    with torch.no_grad(), bank.attached(net):
        bank.set_rows(WEIGHTS, blend)  # type: ignore[arg-type]
        got = net(x)
    for b in range(4):
        want = slow(net, loras, x[b], WEIGHTS[b], expected)
        assert_close(got[b].double(), want, rtol=1e-5, atol=1e-5)


def test_loras_of_other_starts_are_not_blended_by_factors() -> None:
    one, other = random_loras([4], "one") + random_loras([4], "other")
    assert LoraBank.stack([one, other], TwoLayers(), ["a", "b"]).start is None
    assert LoraBank.stack([one, one], TwoLayers(), ["a", "b"]).start == "one"


def test_row_k_uses_lora_k_until_rows_are_set() -> None:
    net, loras, x = TwoLayers(), random_loras([4, 4, 4]), torch.randn(3, 9, 6)
    with torch.no_grad(), LoraBank.stack(loras, net, ["a", "b", "c"]).attached(net):
        got = net(x)
    for k in range(3):
        assert_close(got[k].double(), slow(net, loras, x[k], torch.eye(3)[k], "factors"), rtol=1e-5, atol=1e-5)


def test_detaching_takes_everything_off_again_even_after_an_error() -> None:
    net, x = TwoLayers(), torch.randn(1, 9, 6)
    before = net(x)
    with pytest.raises(ZeroDivisionError), LoraBank.stack(random_loras([4]), net, ["a"]).attached(net):
        assert not torch.equal(net(x), before)
        _ = 1 / 0
    assert torch.equal(net(x), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_lora_of_another_model_is_named() -> None:
    wrong_shape = Lora({"first": torch.zeros(2, 8)}, {"first": torch.zeros(5, 2)}, {})
    wrong_layer = Lora({"third": torch.zeros(2, 6)}, {"third": torch.zeros(5, 2)}, {})
    for lora, what in ((wrong_shape, "8 to 5 features"), (wrong_layer, "no such layer as third")):
        with pytest.raises(LoraError, match=f"cat.safetensors.*another model.*{what}"):
            LoraBank.stack([lora], TwoLayers(), ["cat.safetensors"])


def test_files_made_elsewhere_may_reach_1x1_convolutions() -> None:
    """SD 1.5's proj_in is a convolution, and LoRAs trained elsewhere have it: against the merged weight."""
    unet, generator = tiny_pipeline().unet, torch.Generator().manual_seed(0)
    name = "down_blocks.0.attentions.0.proj_in"
    lora = Lora({name: torch.randn(2, 32, generator=generator)}, {name: torch.randn(32, 2, generator=generator)}, {})
    z, c = torch.randn(1, 4, 8, 8), torch.randn(1, 6, 32)
    with torch.no_grad(), LoraBank.stack([lora], unet, ["a"]).attached(unet):
        got = unet(z, 500, encoder_hidden_states=c).sample
    unet.get_submodule(name).weight.data += (lora.up[name] @ lora.down[name])[:, :, None, None]
    with torch.no_grad():
        assert_close(got, unet(z, 500, encoder_hidden_states=c).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blend", ["factors", "product"])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 0, 1), ((1, 2), (0, 2), 2)])
def test_convolutions_mix_by_rows(blend: str, stride: object, padding: object, dilation: int) -> None:
    """Each row against a convolution whose weight has that row's mixture added, in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    net = nn.Sequential(nn.Conv2d(4, 5, 3, stride, padding, dilation))
    loras = [Lora({"0": draw(r, 4, 3, 3)}, {"0": draw(5, r)}, {}) for r in (2, 3, 1)]
    x, bank = draw(len(WEIGHTS), 4, 9, 9), LoraBank.stack(loras, net, "abc")
    with torch.no_grad(), bank.attached(net):
        bank.set_rows(WEIGHTS, blend)  # type: ignore[arg-type]
        got = net(x)
    padded = [(bank.down["0"][k].double(), bank.up["0"][k].double()) for k in range(3)]
    for row, w in enumerate(WEIGHTS.double()):
        if blend == "factors":
            a, b = (sum(w[k] * padded[k][i] for k in range(3)) for i in (0, 1))
            delta = torch.einsum("or,rihw->oihw", b, a)
        else:
            delta = sum(w[k] * torch.einsum("or,rihw->oihw", b, a) for k, (a, b) in enumerate(padded))
        merged = copy.deepcopy(net).double()
        merged[0].weight.data += delta
        with torch.no_grad():
            assert_close(got[row].double(), merged(x[row : row + 1].double())[0], rtol=1e-4, atol=1e-4)


def test_all_loras_start_from_one_draw_that_is_named() -> None:
    layers = StableDiffusion(tiny_pipeline()).projections()
    bank = LoraBank.create(layers, 3, rank=16, seed=5)
    assert set(bank.down) == set(layers) and all(n.rsplit(".to_", 1)[0].endswith(("attn1", "attn2")) for n in layers)
    assert {n.rsplit(".to_", 1)[1] for n in layers} == {"q", "k", "v", "out.0"}
    drawn = torch.cat([a.flatten() for a in bank.down.values()])
    assert drawn.std().item() == pytest.approx(1 / 16, rel=0.05)
    assert all(torch.equal(a[0], a[1]) and torch.equal(a[0], a[2]) for a in bank.down.values())
    assert not any(b.any() for b in bank.up.values())
    assert bank.start == LoraBank.create(layers, 1, rank=16, seed=5).start is not None
    assert bank.start != LoraBank.create(layers, 1, rank=16, seed=6).start


# ---- fitting (section 2)


def posterior(images: int) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(images, 4, 8, 8, generator=generator)
    return mean, torch.full_like(mean, 0.1), Conditioning({"text": torch.randn(images, 6, 32, generator=generator)})


@pytest.mark.parametrize(
    ("prediction_type", "draws", "decay"),
    [("epsilon", 1, False), ("v_prediction", 1, False), ("v_prediction", 3, True)],
)
def test_fitting_together_is_fitting_alone(prediction_type: str, draws: int, decay: bool) -> None:
    """Each LoRA of a pair against an independent loop: merged weights, one image, plain torch AdamW on its A and B."""
    backbone = StableDiffusion(tiny_pipeline(prediction_type))
    mean, std, conditioning = posterior(2)
    config = FitConfig(rank=3, steps=4, learning_rate=1e-2, draws=draws, decay=decay)
    together = fit_loras(backbone, mean, std, conditioning, config, seed=7)

    for k in range(2):
        unet = copy.deepcopy(backbone.network).requires_grad_(False)
        layers = {n: unet.get_submodule(n) for n in backbone.projections()}
        start = LoraBank.create(layers, 1, 3, seed=7)
        down = {n: start.down[n][0].clone().requires_grad_() for n in layers}
        up = {n: start.up[n][0].clone().requires_grad_() for n in layers}
        optimizer = torch.optim.AdamW([*down.values(), *up.values()], lr=1e-2, betas=(0.9, 0.999), weight_decay=1e-2)
        generator = torch.Generator().manual_seed(7)
        abar = backbone.pipe.scheduler.alphas_cumprod
        for step in range(4):
            timesteps = (torch.randint(1000, (draws,), generator=generator) + torch.arange(draws) * 1000) // draws
            noises = torch.randn(2, draws, 4, 8, 8, generator=generator)
            weights = {f"{n}.weight": layers[n].weight + up[n] @ down[n] for n in layers}
            optimizer.zero_grad()
            for j, t in enumerate(timesteps.tolist()):
                eps, draw = noises[:, j : j + 1]
                x_0 = mean[k : k + 1] + std[k : k + 1] * draw
                z = abar[t].sqrt() * x_0 + (1 - abar[t]).sqrt() * eps
                target = eps if prediction_type == "epsilon" else abar[t].sqrt() * eps - (1 - abar[t]).sqrt() * x_0
                output = torch.func.functional_call(
                    unet, weights, (z, t), {"encoder_hidden_states": conditioning["text"][k : k + 1]}
                ).sample
                (torch.nn.functional.mse_loss(output, target) / draws).backward(retain_graph=True)
            if decay:
                optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * step / 4)) / 2
            optimizer.step()
        for n in layers:
            # Over each matrix: AdamW's first steps are signs, so a gradient near zero may turn by rounding.
            for ours, alone in ((together.down[n][k], down[n]), (together.up[n][k], up[n])):
                assert (ours - alone).norm() < 5e-3 * alone.norm()


def test_timesteps_of_a_step_lie_one_in_each_part_of_the_range() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([_timesteps(1000, 4, generator) for _ in range(2000)])
    assert bool((drawn // 250 == torch.arange(4)).all()) and drawn.min() < 5 and drawn.max() > 994
    assert drawn.float().mean().item() == pytest.approx(499.5, abs=5)


def test_fit_lowers_the_loss_and_counts_three_rows_for_one() -> None:
    backbone = StableDiffusion(tiny_pipeline())
    mean, std, conditioning = posterior(2)
    bank = fit_loras(backbone, mean, std, conditioning, FitConfig(rank=4, steps=60, learning_rate=1e-2))
    assert backbone.unet_rows == 60 * 2 * 3
    assert all(b.any() for b in bank.up.values())
    eps, t = torch.randn(8, 1, 4, 8, 8), torch.linspace(50, 950, 8).long()

    def loss() -> float:
        with torch.no_grad():
            draws = [backbone.noised(mean, e.expand_as(mean), s[None]) for e, s in zip(eps, t, strict=True)]
            return sum(
                (backbone.predict(z, backbone.level(s[None]), conditioning).noise - e).square().mean().item()
                for z, e, s in zip(draws, eps, t, strict=True)
            )

    before = loss()
    with bank.attached(backbone.network):
        assert loss() < 0.9 * before


def test_same_seed_same_lora_whatever_it_is_fitted_with() -> None:
    backbone = StableDiffusion(tiny_pipeline())
    mean, std, conditioning = posterior(3)
    config = FitConfig(rank=2, steps=3)
    three = fit_loras(backbone, mean, std, conditioning, config, seed=1).lora(1)
    alone = fit_loras(backbone, mean[1:2], std[1:2], conditioning.rows(slice(1, 2)), config, seed=1).lora(0)
    other = fit_loras(backbone, mean[1:2], std[1:2], conditioning.rows(slice(1, 2)), config, seed=2).lora(0)
    name = next(iter(three.up))
    assert (three.up[name] - alone.up[name]).norm() < 5e-3 * alone.up[name].norm()
    assert (other.up[name] - alone.up[name]).norm() > 0.1 * alone.up[name].norm()


# ---- a user's pipeline comes back unchanged


def test_a_users_pipeline_comes_back_unchanged(pipe) -> None:  # type: ignore[no-untyped-def]
    pipe.unet.train()
    pipe.unet.conv_in.weight.requires_grad_(False)

    def state() -> tuple[object, ...]:
        modules = {
            f"{part}.{name}": (
                type(m),
                m.training,
                dict(m._forward_hooks),
                dict(m._forward_pre_hooks),
                "forward" in vars(m),
            )
            for part in ("unet", "vae", "text_encoder")
            for name, m in getattr(pipe, part).named_modules()
        }
        parameters = {
            f"{part}.{name}": (p.requires_grad, p.grad is None, p.dtype)
            for part in ("unet", "vae", "text_encoder")
            for name, p in getattr(pipe, part).named_parameters()
        }
        processors = {name: id(p) for name, p in pipe.unet.attn_processors.items()}
        return (
            modules,
            parameters,
            processors,
            id(pipe.scheduler),
            dict(pipe.scheduler.config),
            pipe.scheduler.num_inference_steps,
        )

    def weights() -> list[Tensor]:
        return [p.clone() for part in ("unet", "vae", "text_encoder") for p in getattr(pipe, part).parameters()]

    before, numbers = state(), weights()
    pictures = [Image.effect_noise((32, 32), s).convert("RGB") for s in (20, 90)]
    morpher = Morpher(pipe)
    fit, sample = FitConfig(rank=2, steps=2), SampleConfig(steps=2, guidance_scale=2)
    morpher(pictures, ["a", "b"], num_frames=3, fit=fit, sample=sample)
    assert state() == before
    for stop_in in ("fit", "invert", "sample"):

        def stop(stage: str, done: int, total: int, stop_in: str = stop_in) -> None:
            if stage == stop_in:
                raise Cancelled

        with pytest.raises(Cancelled):
            morpher(pictures, ["a", "b"], num_frames=3, fit=fit, sample=sample, progress=stop)
        assert state() == before, stop_in
    assert all(torch.equal(p, q) for p, q in zip(numbers, weights(), strict=True))
