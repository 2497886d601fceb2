"""Fitting one LoRA per image, all images in one batch (method, section 2)."""

from __future__ import annotations

import time
from dataclasses import asdict

import torch
from torch import Tensor

from ..config import FitConfig
from ..files.cache import NOT_KEPT, Cache, Kept, Tensors, digest
from ..files.loras import Lora
from ..models.backbone import Backbone
from ..models.conditioning import Conditioning
from ..models.finite import check_finite
from ..models.memory import in_parts
from ..progress import ProgressCallback
from .lora import LoraBank


def fit_loras(
    backbone: Backbone,
    mean: Tensor,
    std: Tensor,
    conditioning: Conditioning,
    config: FitConfig,
    seed: int = 0,
    progress: ProgressCallback | None = None,
    kept: Kept = NOT_KEPT,
) -> LoraBank:
    """Train a bank on K images together: LoRA k learns from image k's rows of each batch alone.

    mean, std: (K, C, h, w), the scaled VAE posterior of each image; conditioning: K rows.
    Each step makes `config.draws` draws of a timestep, a noise and a posterior sample, the same for every image: so an
    image's LoRA does not depend on which other images it is fitted with, and the same one comes from `diffmorpher fit`. In
    low memory, or where memory runs out, the images therefore take turns, each fitted to its end. Raises `NumbersError` at
    the step where the loss is not finite.
    kept: a cache, where the same fit is looked for first and goes to, also half-finished; another process that makes the same
    is waited for. (Of the same images, since sums over other rows of a batch are rounded otherwise in their last digits.)
    """
    images, cells = len(mean), (mean.shape[-2], mean.shape[-1])

    def fit(at_once: int) -> LoraBank:
        if at_once < images and images > 1:
            return _fit_in_turn(backbone, mean, std, conditioning, config, seed, progress, at_once, kept)
        return _found_or_fitted(backbone, mean, std, conditioning, config, seed, progress, at_once == 0, kept)

    # 0 at once: one, whose blocks are run again on the way back.
    return in_parts(backbone, "fit", "image", cells, 0 if backbone.low_memory else images, fit, least=0)


def _found_or_fitted(
    backbone: Backbone,
    mean: Tensor,
    std: Tensor,
    conditioning: Conditioning,
    config: FitConfig,
    seed: int,
    progress: ProgressCallback | None,
    spare: bool,
    kept: Kept,
) -> LoraBank:
    if kept.cache is None:
        return _fit_together(backbone, mean, std, conditioning, config, seed, progress, spare)
    key = digest(kept.about, mean, std, conditioning.tensors, asdict(config), seed, spare)

    def waiting() -> None:
        if progress:
            progress("fit", 0, config.steps)

    with kept.cache.alone(key, waiting):
        if (found := kept.cache.load(key)) is not None:
            bank = LoraBank.create(backbone.projections(), len(mean), config.rank, seed, mean.device)
            _restore(bank.parameters(), found, "bank")
            return bank
        saving = _Saving(kept.cache, f"{key}.half")
        bank = _fit_together(backbone, mean, std, conditioning, config, seed, progress, spare, saving)
        kept.cache.save(key, _named(bank.parameters(), "bank"))
        kept.cache.remove(saving.key)
    return bank


class _Saving:
    """A fit that is under way: its state after a step, kept every now and then; found again when the same fit begins anew."""

    def __init__(self, cache: Cache, key: str) -> None:
        self.key, self._cache, self._saved = key, cache, time.monotonic()

    def begin(self, parameters: list[Tensor], optimizer: torch.optim.Optimizer, generator: torch.Generator) -> int:
        """Put back what was kept; returns how many steps that is."""
        found = self._cache.load(self.key)
        if found is None:
            return 0
        _restore(parameters, found, "bank")
        for i, p in enumerate(parameters):
            # The fused optimizer has its count of steps beside the parameter, too.
            optimizer.state[p] = {name: found[f"{name}.{i}"].to(p.device) for name in ("step", "exp_avg", "exp_avg_sq")}
        generator.set_state(found["generator"])
        return int(found["steps"])

    def after(
        self, steps: int, parameters: list[Tensor], optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> None:
        if time.monotonic() - self._saved < self._cache.save_every:
            return
        tensors = _named(parameters, "bank") | {"steps": torch.tensor(steps), "generator": generator.get_state()}
        for i, p in enumerate(parameters):
            tensors |= {f"{name}.{i}": value for name, value in optimizer.state[p].items()}
        self._cache.save(self.key, tensors)
        self._saved = time.monotonic()


def _named(parameters: list[Tensor], name: str) -> Tensors:
    return {f"{name}.{i}": p for i, p in enumerate(parameters)}


def _restore(parameters: list[Tensor], tensors: Tensors, name: str) -> None:
    with torch.no_grad():
        for i, p in enumerate(parameters):
            p.copy_(tensors[f"{name}.{i}"])


def _fit_together(
    backbone: Backbone,
    mean: Tensor,
    std: Tensor,
    conditioning: Conditioning,
    config: FitConfig,
    seed: int,
    progress: ProgressCallback | None,
    spare: bool,
    saving: _Saving | None = None,
) -> LoraBank:
    images = len(mean)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device
    device = mean.device
    with backbone.trained(spare):
        # Inference tensors cannot be trained on, their copies can. Rows: image 0's draws, then image 1's, ...
        mean, std = (x.repeat_interleave(config.draws, 0) for x in (mean, std))
        conditioning = conditioning.repeat(config.draws)
        bank = LoraBank.create(backbone.projections(), images, config.rank, seed, device)
        parameters = [p.requires_grad_() for p in bank.parameters()]
        # In float16 small gradients would vanish. AdamW does not see a scale that its eps shares.
        scale = 1024.0 if backbone.network.dtype == torch.float16 else 1.0
        optimizer = torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=(0.9, 0.999),
            eps=1e-8 * scale,
            weight_decay=config.weight_decay,
            fused=True,
        )
        done = saving.begin(parameters, optimizer, generator) if saving else 0
        cause = f"the LoRA rate of {config.learning_rate:g} is too high; lower it"
        with bank.attached(backbone.network):
            for step in range(done, config.steps):
                for group in optimizer.param_groups:
                    group["lr"] = config.rate(step)
                t = _timesteps(backbone.num_train_timesteps, config.draws, generator).to(device).repeat(images)
                noise = torch.randn(2, config.draws, *mean.shape[1:], generator=generator).to(device)
                eps, draw = noise.repeat(1, images, 1, 1, 1)
                x_0 = mean + std * draw
                output = backbone.output(backbone.noised(x_0, eps, t), backbone.level(t), conditioning)
                target = backbone.training_target(x_0, eps, t)
                # Mean over each image's draws, summed over images: every LoRA gets the gradient it would get alone.
                loss = (output - target).square().unflatten(0, (images, -1)).flatten(1).mean(1).sum()
                where = f"fit, step {step + 1} of {config.steps}"
                check_finite(loss.detach(), "the loss", where, [backbone.network], cause)
                optimizer.zero_grad()
                (loss * scale).backward()
                optimizer.step()
                if saving:
                    saving.after(step + 1, parameters, optimizer, generator)
                if progress:
                    progress("fit", step + 1, config.steps)
        for p in parameters:
            p.requires_grad_(False)
            p.grad = None
            check_finite(p, "a LoRA", f"fit, step {config.steps} of {config.steps}", [backbone.network], cause)
    return bank


def _fit_in_turn(
    backbone: Backbone,
    mean: Tensor,
    std: Tensor,
    conditioning: Conditioning,
    config: FitConfig,
    seed: int,
    progress: ProgressCallback | None,
    at_once: int,
    kept: Kept,
) -> LoraBank:
    images, each = len(mean), max(at_once, 1)
    loras: list[Lora] = []
    for k in range(0, images, each):
        part = slice(k, min(k + each, images))
        count = part.stop - part.start

        def report(stage: str, done: int, total: int, k: int = k, count: int = count) -> None:
            if progress:
                progress(stage, k * total + count * done, images * total)

        given = mean[part], std[part], conditioning.rows(part)
        bank = _found_or_fitted(backbone, *given, config, seed, report, at_once == 0, kept)
        loras += [bank.lora(i) for i in range(count)]
    return LoraBank.stack(loras, backbone.network, [f"LoRA {k}" for k in range(images)], mean.device)


def _timesteps(count: int, draws: int, generator: torch.Generator) -> Tensor:
    """Timesteps of one step's draws, int64: each uniform, and one in each of `draws` equal parts of the whole range."""
    return (torch.randint(count, (draws,), generator=generator) + torch.arange(draws) * count) // draws
