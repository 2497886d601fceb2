"""What the method asks of a diffusion model: pictures and prompts in, predictions of picture and noise, pictures out.

The method sees a model through `Backbone` alone. Whatever the network itself predicts, how its latents are packed, what it is
told beside the text and what it is called in a pipeline stay in the family's own file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .conditioning import Conditioning
from .group_norm import exact_group_norm
from .levels import Level, NoiseSchedule, Prediction


@dataclass(frozen=True)
class AttentionSite:
    """A linear layer that makes keys and values of the image's own rows, to be mixed from the two end images.

    rows: where the image lies in the layer's sequence: all of it, or its first or last rows beside text. columns: which of the
    layer's outputs are keys and values, (from, to); None means all.
    """

    layer: str  # module path inside the network
    rows: Literal["all", "first", "last"] = "all"
    columns: tuple[int, int] | None = None


class Backbone(ABC):
    """A diffusers pipeline as the method sees it; each family of models is a subclass in a file of its own.

    pipe: never changed outside a `with` block. low_memory: spare memory at the cost of time, see `Morpher`; what comes out is
    the same. tf32: on a GPU, let float32 products be rounded to TF32, which is faster.
    Latents are always unpacked, (B, C, h, w). Pictures and latents may have any strides, which change no byte of what comes
    out; that is always contiguous.
    `unet_rows` counts the rows of every batch of the network so far; a row that is trained on (forward and backward) counts 3.
    """

    family: ClassVar[str]  # for people
    network_part: ClassVar[str]  # what a pipeline, and a LoRA file, calls the network: "unet" or "transformer"
    network_class: ClassVar[type]
    needed: ClassVar[tuple[str, ...]]  # parts that a pipeline must have
    optional: ClassVar[tuple[str, ...]] = ()

    network: Any  # the U-Net or transformer: what LoRAs and attention mixing attach to
    vae: Any
    parts: tuple[Any, ...]  # all networks of the pipeline
    vae_factor: int  # pixels per latent cell along a side
    size_multiple: int  # each side of a picture is a multiple of so many pixels
    smallest_side: int  # the smallest working size in pixels
    num_train_timesteps: int

    lora_layers: ClassVar[tuple[str, ...]]  # ends of the paths of layers that a LoRA is fitted to
    embeds_guidance: bool = False  # guidance is a number that the network is told, not a second row of the batch
    inversion: ClassVar[Literal["plain", "uni"]] = "plain"  # see `method.invert`

    def __init__(self, pipe: Any, name: str = "", low_memory: bool = False, tf32: bool = False) -> None:
        kind, called = type(pipe).__name__, {"unet": "U-Net"}.get(self.network_part, self.network_part)
        missing = [part for part in self.needed if getattr(pipe, part, None) is None]
        if missing or not isinstance(getattr(pipe, self.network_part), self.network_class):
            lacks = ", ".join(missing) or f"a {self.network_class.__name__}"
            raise ModelError(f"{kind} is not a {self.family} pipeline (it lacks {lacks}).")
        self.network, self.vae = getattr(pipe, self.network_part), pipe.vae
        modules = [getattr(pipe, part, None) for part in (*self.needed, *self.optional)]
        self.parts = tuple(module for module in modules if isinstance(module, nn.Module))
        self.vae_factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        if any(getattr(m, "fused_projections", False) for m in self.network.modules()):
            raise ModelError(f"the {called}'s projections are fused; call pipe.unfuse_qkv_projections() first.")
        if any(hasattr(m, "base_layer") for m in self.network.modules()):
            raise ModelError(
                f"the {called} has LoRA adapters loaded; call pipe.unload_lora_weights() first (after pipe.fuse_lora() to "
                "keep them)."
            )
        if self.network.device.type == "meta":
            raise ModelError(
                f"the {called} is under sequential offload, which is not supported; use model offload or none."
            )
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
    def ends(self) -> tuple[Tensor, Tensor]:
        """The weights of the network's first layer and of its last, by which models are told apart."""

    def signature(self) -> dict[str, list[float]]:
        """The network's sizes and some of its weights, to be stored with what belongs to this model."""
        sampled = [w.detach().flatten()[:: max(1, w.numel() // 32)][:32].float().tolist() for w in self.ends()]
        return {"sizes": [float(size) for w in self.ends() for size in w.shape], "weights": sampled[0] + sampled[1]}

    def has_signature(self, signature: dict[str, list[float]]) -> bool:
        """Whether a stored `signature` is this model's, in whatever dtype each was loaded."""
        own = self.signature()
        return own["sizes"] == signature["sizes"] and torch.allclose(
            torch.tensor(own["weights"]), torch.tensor(signature["weights"]), rtol=0.02, atol=1e-3
        )

    @abstractmethod
    def schedule(self, steps: int) -> NoiseSchedule:
        """The noise levels of a run of `steps` steps."""

    @abstractmethod
    def level(self, t: Tensor) -> Level:
        """The level of each row's training timestep t, (B,) int64 from 0 to `num_train_timesteps` - 1."""

    def projections(self) -> dict[str, nn.Linear]:
        """The layers that a LoRA is fitted to, by module path: the image's queries, keys, values and outputs."""
        return {name: module for name, module in self.network.named_modules() if name.endswith(self.lora_layers)}

    @abstractmethod
    def attention_sites(self) -> list[AttentionSite]:
        """Where keys and values of the image's own rows are made, in the blocks in which they are mixed (section 7)."""

    def image_rows(self, latents: Tensor) -> int:
        """How many rows the image has in a sequence where it stands beside text: one for each 2 x 2 latents."""
        return latents.shape[-2] * latents.shape[-1] // 4

    # ---- pictures and prompts

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and spread of the VAE's posterior as scaled latents (method, section 1).

        pixels: (B, 3, H, W) in [-1, 1]. Returns two (B, C, h, w), float32.
        """
        if self.low_memory and len(pixels) > 1:
            mean, std = zip(*map(self.encode, pixels.split(1)), strict=True)
            return torch.cat(mean), torch.cat(std)
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype).contiguous()).latent_dist
        shift, scale = self._shift_and_scale()
        mean, std = (posterior.mean.float() - shift) * scale, posterior.std.float() * scale
        return mean.contiguous(), std.contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to pictures (B, 3, H, W), float32, in [-1, 1]."""
        shift, scale = self._shift_and_scale()
        z = latents / scale + shift
        return self.vae.decode(z.to(self.device, self.vae.dtype).contiguous()).sample.float().clamp(-1, 1).contiguous()

    def _shift_and_scale(self) -> tuple[Any, Any]:
        """What is taken off the VAE's own latents, and what they are then multiplied by."""
        return getattr(self.vae.config, "shift_factor", None) or 0.0, self.vae.config.scaling_factor

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str], length: int = 0) -> Conditioning:
        """Text embeddings, float32; a prompt that is too long is cut, with a warning.

        length: where a family's texts have no length of their own, all have that of the longest, and at least this one.
        """

    def unconditional(self, length: int = 0) -> Conditioning:
        """One row: what the network is told without a prompt, for classifier-free guidance."""
        return self.encode_prompts([""], length)

    # ---- the network

    @abstractmethod
    def output(self, latents: Tensor, level: Level, conditioning: Conditioning, guidance: float = 1.0) -> Tensor:
        """The network's own output (see `training_target`), float32.                                # (B, C, h, w)

        latents: (B, C, h, w); guidance: for a network that is told it (`embeds_guidance`).
        """

    @abstractmethod
    def prediction(self, output: Tensor, latents: Tensor, level: Level) -> Prediction:
        """Clean latents and noise as the network's output says they are, `z = a x_0 + s eps`."""

    def predict(self, latents: Tensor, level: Level, conditioning: Conditioning, guidance: float = 1.0) -> Prediction:
        """x_0 and eps of latents at a level, float32.                                          # (B, C, h, w) each"""
        latents = latents.contiguous()
        return self.prediction(self.output(latents, level, conditioning, guidance), latents, level)

    def noised(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """`z_t = a_t x_0 + s_t eps`, for the fit; t: training timesteps, (B,)."""
        return self.level(t).noised(x_0, eps)

    @abstractmethod
    def training_target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What `output` should be for `noised(x_0, eps, t)`."""

    def _count(self, rows: int) -> None:
        self.unet_rows += rows * (3 if torch.is_grad_enabled() else 1)

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
