"""What the method asks of a diffusion model: pictures and prompts in, noise predictions, pictures out.

The method sees a model through `Backbone` alone, and its noise schedule as pairs `(a_t, s_t)` with `z_t = a_t x_0 + s_t eps`;
whether the network itself predicts noise or velocity, and what it is called in a pipeline, stays in the family's own file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .group_norm import exact_group_norm


@dataclass(frozen=True)
class NoiseSchedule:
    """T timesteps and the T + 1 noise levels they move between.

    Level 0 is the clean end (`final_alpha_cumprod`), level i + 1 that of `timesteps[i]`. The prediction at `timesteps[i]`
    moves a latent from level i to i + 1 (inversion) or from i + 1 to i (sampling): the same solver both ways.
    """

    timesteps: tuple[int, ...]  # T, ascending
    a: Tensor  # (T + 1,) float64, sqrt(abar)
    s: Tensor  # (T + 1,) float64, sqrt(1 - abar)

    def __len__(self) -> int:
        return len(self.timesteps)

    def move(self, z: Tensor, eps: Tensor, level: int, to: int) -> Tensor:
        """DDIM with eta 0: `x_0 = (z - s e) / a`, then `a' x_0 + s' e` (method, sections 4 and 7)."""
        a, s, a_to, s_to = (float(x) for x in (self.a[level], self.s[level], self.a[to], self.s[to]))
        return a_to * ((z - s * eps) / a) + s_to * eps


class Backbone(ABC):
    """A diffusers pipeline as the method sees it; each family of models is a subclass in a file of its own.

    pipe: never changed outside a `with` block. low_memory: spare memory at the cost of time, see `Morpher`; what comes out is
    the same. tf32: on a GPU, let float32 products be rounded to TF32, which is faster.
    Pictures and latents may have any strides, which change no byte of what comes out; that is always contiguous.
    `unet_rows` counts the rows of every batch of the network so far; a row that is trained on (forward and backward) counts 3.
    """

    network: Any  # the U-Net: what LoRAs and attention mixing attach to
    parts: tuple[Any, ...]  # all networks of the pipeline
    vae_factor: int  # pixels per latent cell along a side
    smallest_side: int  # the smallest working size in pixels: one cell at the network's deepest level
    num_train_timesteps: int

    def __init__(self, pipe: Any, name: str = "", low_memory: bool = False, tf32: bool = False) -> None:
        self.pipe = pipe
        self.low_memory, self.tf32 = low_memory, tf32
        self.name = name or getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__
        self.unet_rows = 0

    # ---- facts

    @property
    def device(self) -> torch.device:
        """Where the networks run; under model offload their weights may lie elsewhere."""
        return getattr(self.pipe, "_execution_device", self.network.device)

    @property
    @abstractmethod
    def native_size(self) -> tuple[int, int]:
        """The size the model was trained at, (width, height) in pixels. Raises `ModelError` where it does not say."""

    @abstractmethod
    def signature(self) -> dict[str, list[float]]:
        """The network's sizes and some of its weights, to be stored with what belongs to this model."""

    def has_signature(self, signature: dict[str, list[float]]) -> bool:
        """Whether a stored `signature` is this model's, in whatever dtype each was loaded."""
        own = self.signature()
        return own["sizes"] == signature["sizes"] and torch.allclose(
            torch.tensor(own["weights"]), torch.tensor(signature["weights"]), rtol=0.02, atol=1e-3
        )

    @abstractmethod
    def schedule(self, steps: int) -> NoiseSchedule:
        """The noise schedule of a run of `steps` steps."""

    # ---- pictures and prompts

    @abstractmethod
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and spread of the VAE's posterior as scaled latents (method, section 1).

        pixels: (B, 3, H, W) in [-1, 1]. Returns two (B, C, h, w), float32.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to pictures (B, 3, H, W), float32, in [-1, 1]."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings padded to the tokenizer's length; a longer prompt is cut, with a warning.   # (B, L, D) float32"""

    # ---- the network

    @abstractmethod
    def predict(self, latents: Tensor, timestep: int | Tensor, conditioning: Tensor) -> Tensor:
        """The network's own output (see `training_target`), float32.                                # (B, C, h, w)

        latents: (B, C, h, w); timestep: one for all rows, or (B,); conditioning: (B, L, D).
        """

    @abstractmethod
    def predict_noise(self, latents: Tensor, timestep: int | Tensor, conditioning: Tensor) -> Tensor:
        """eps(z, t, c), float32.                                                                      # (B, C, h, w)"""

    @abstractmethod
    def add_noise(self, x_0: Tensor, eps: Tensor, timestep: int | Tensor) -> Tensor:
        """`z_t = a_t x_0 + s_t eps`."""

    @abstractmethod
    def training_target(self, x_0: Tensor, eps: Tensor, timestep: int | Tensor) -> Tensor:
        """What `predict` should return for `z_t`."""

    @contextmanager
    def trained(self) -> Iterator[None]:
        """While open, gradients pass through the network; in low memory blocks are run again on the way back."""
        checkpoint = self.low_memory and not self.network.is_gradient_checkpointing
        try:
            if checkpoint:
                self.network.enable_gradient_checkpointing()
            with torch.inference_mode(False), torch.enable_grad(), self.borrowed():
                yield
        finally:
            if checkpoint:
                self.network.disable_gradient_checkpointing()

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """While open, all networks are in eval mode, frozen and exact (`group_norm`); afterwards each is as it was found."""
        modules = [m for m in self.parts for m in m.modules()]
        training = [m.training for m in modules]
        parameters = [p for m in self.parts for p in m.parameters()]
        trainable = [p.requires_grad for p in parameters]
        try:
            for m in modules:
                m.training = False
            for p in parameters:
                p.requires_grad_(False)
            with float32_products(self.tf32), exact_group_norm(modules):
                yield
        finally:
            for m, was in zip(modules, training, strict=True):
                m.training = was
            for p, was in zip(parameters, trainable, strict=True):
                p.requires_grad_(was)


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """While open, float32 products on a GPU are rounded to TF32 or not; torch's own default is to do so in convolutions."""
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = tf32
        yield
    finally:
        for place, was in zip(places, before, strict=True):
            place.allow_tf32 = was
