"""What the method asks of a diffusion model: pictures and prompts in, predictions of picture and noise, pictures out.

The method sees a model through `Backbone` alone. Whatever the network itself predicts, how its latents are packed, what it is
told beside the text and what it is called in a pipeline stay in the family's own file.
"""

from __future__ import annotations

import hashlib
import json
import platform
import threading
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ..errors import ModelError
from .conditioning import Conditioning
from .finite import check_finite, is_finite
from .group_norm import exact_group_norm
from .levels import Level, NoiseSchedule, Prediction
from .turns import settled


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
    `unet_rows` counts the rows of every batch of the network so far in the thread that asks; a row that is trained on (forward
    and backward) counts 3.
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
        if not missing and hasattr(getattr(pipe, self.network_part), "_orig_mod"):
            raise ModelError(
                f"the {called} is compiled (torch.compile); put the one that it was made of back: "
                f"pipe.{self.network_part} = pipe.{self.network_part}._orig_mod."
            )
        if missing or not isinstance(getattr(pipe, self.network_part), self.network_class):
            lacks = ", ".join(missing) or f"a {self.network_class.__name__}"
            raise ModelError(f"{kind} is not a {self.family} pipeline (it lacks {lacks}).")
        self.network, self.vae = getattr(pipe, self.network_part), pipe.vae
        modules = [getattr(pipe, part, None) for part in (*self.needed, *self.optional)]
        self.parts = tuple(module for module in modules if isinstance(module, nn.Module))
        self.vae_factor = int(pipe.vae_scale_factor)
        self.pipe = pipe
        self.low_memory, self.tf32 = low_memory, tf32
        self.name = name or str(getattr(pipe.config, "_name_or_path", None) or "") or type(pipe).__name__
        self._rows: Counter[int] = Counter()  # by thread
        self._adapters_before = self._adapters()
        self.fits: dict[tuple[str, int, int], int] = {}  # see `memory.in_parts`
        self._vae_overflows = False
        self.check()

    def check(self) -> None:
        """Raise `ModelError` for a network in a state in which the method would do something else; asked at each use."""
        called, modules = {"unet": "U-Net"}.get(self.network_part, self.network_part), list(self.network.modules())
        if getattr(self.pipe, self.network_part) is not self.network:
            raise ModelError(f"the pipeline has another {called} than before; make a new Morpher of it.")
        if any(_is_fused(m) for m in modules):
            raise ModelError(f"the {called}'s projections are fused; call pipe.unfuse_qkv_projections() first.")
        if self._adapters() != self._adapters_before:
            raise ModelError(f"the {called} has other LoRA adapters than before; make a new Morpher of the pipeline.")
        if any("layerwise_casting" in getattr(getattr(m, "_diffusers_hook", None), "hooks", ()) for m in modules):
            raise ModelError(
                f"the {called}'s layers are stored in another type than they work in (enable_layerwise_casting), in which no "
                "LoRA can be fitted; load the pipeline again without."
            )
        if self.network.device.type == "meta":
            raise ModelError(
                f"the {called} is under sequential offload, which is not supported; use model offload or none."
            )

    # ---- facts

    @property
    def unet_rows(self) -> int:
        return self._rows[threading.get_ident()]

    def count_rows(self, rows: int) -> None:
        """Count rows of the same network elsewhere, which worked for this thread."""
        self._rows[threading.get_ident()] += rows

    @property
    def device(self) -> torch.device:
        """Where the networks run; under model offload their weights may lie elsewhere."""
        return getattr(self.pipe, "_execution_device", self.network.device)

    @property
    @abstractmethod
    def native_size(self) -> tuple[int, int]:
        """The size the model was trained at, (width, height) in pixels. Raises `ModelError` where it does not say."""

    @property
    def latent_channels(self) -> int:
        """C of the latents (B, C, h, w)."""
        config = self.vae.config
        return int(getattr(config, "latent_channels", None) or config.z_dim)

    @abstractmethod
    def ends(self) -> tuple[Tensor, Tensor]:
        """The weights of the network's first layer and of its last, by which models are told apart."""

    def signature(self) -> dict[str, list[float]]:
        """The network's sizes and some of its weights, to be stored with what belongs to this model."""
        # Quantised weights are packed, anew for every machine: where an end is, the first or last plain weights stand in.
        plain = [p for p in self.network.parameters() if _is_plain(p)]
        ends = [w if _is_plain(w) else plain[i] for w, i in zip(self.ends(), (0, -1), strict=True)]
        sampled = [w.detach().flatten()[:: max(1, w.numel() // 32)][:32].float().tolist() for w in ends]
        adapters = [
            float((layer.lora_A[name].weight.norm() * layer.lora_B[name].weight.norm() * scale).detach())
            for layer, scales in self._adapters().items()
            for name, scale in scales.items()
        ]
        return {
            "sizes": [float(size) for w in ends for size in w.shape],
            "weights": sampled[0] + sampled[1] + ([sum(adapters)] if adapters else []),
        }

    def _adapters(self) -> dict[Any, dict[str, float]]:
        """The layers with LoRA adapters of the user's that act (PEFT's), and how much each adapter counts."""
        layers = [
            m for m in self.network.modules() if hasattr(m, "base_layer") and not getattr(m, "disable_adapters", False)
        ]
        return {
            m: {name: m.scaling[name] for name in m.active_adapters if name in getattr(m, "lora_A", ())} for m in layers
        }

    def identity(self) -> str:
        """A digest of all that the bytes of what the model makes depend on: weights, configurations, versions, the machine.

        Of each weight some numbers stand for it, evenly spread over it, so that one that was fused or trained is another.
        """
        found, samples = hashlib.sha256(), []
        for network in (self.network, self.vae):
            for name, w in network.state_dict().items():
                found.update(f"{name} {tuple(w.shape)} {w.dtype}".encode())
                if _is_plain(w) and w.numel() and w.device.type != "meta":
                    samples.append(w.detach().flatten()[:: max(1, w.numel() // 32)][:32].float())
            found.update(json.dumps(dict(network.config), sort_keys=True, default=str).encode())
        found.update(torch.cat(samples).cpu().numpy().tobytes())
        on_gpu = self.device.type == "cuda"
        device = torch.cuda.get_device_name(self.device) if on_gpu else torch.backends.cpu.get_cpu_capability()
        versions = [version(name) for name in ("diffmorpher", "torch", "diffusers")]
        scheduler = json.dumps(dict(self.pipe.scheduler.config), sort_keys=True, default=str)
        adapters = [repr(m.scaling) for m in self.network.modules() if isinstance(getattr(m, "scaling", None), dict)]
        about = [
            self.family,
            self.device.type,
            device,
            platform.machine(),
            torch.get_num_threads(),
            self.low_memory,
            self.tf32,
        ]
        found.update(repr((about, versions, scheduler, adapters)).encode())
        return found.hexdigest()

    def has_signature(self, signature: dict[str, list[float]]) -> bool:
        """Whether a stored `signature` is this model's, in whatever dtype each was loaded."""
        own = self.signature()
        if [len(own[name]) for name in own] != [len(signature[name]) for name in own]:
            return False
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

        def encoded() -> tuple[Tensor, Tensor]:
            found = self.vae.encode(pixels.to(self.device, self.vae.dtype).contiguous())
            if not hasattr(found, "latent_dist"):  # TAESD: a point in place of a distribution
                return found.latents.float(), torch.zeros_like(found.latents, dtype=torch.float32)
            return found.latent_dist.mean.float(), found.latent_dist.std.float()

        shift, scale = self._shift_and_scale()
        posterior = self._through_vae("encode", "a picture's latents", encoded)
        return ((posterior[0] - shift) * scale).contiguous(), (posterior[1] * scale).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to pictures (B, 3, H, W), float32, in [-1, 1]."""
        shift, scale = self._shift_and_scale()
        z = latents / scale + shift

        def decoded() -> tuple[Tensor]:
            return (self.vae.decode(z.to(self.device, self.vae.dtype).contiguous()).sample.float(),)

        return self._through_vae("decode", "a frame's pixels", decoded)[0].clamp(-1, 1).contiguous()

    def _through_vae(self, stage: str, what: str, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `run` gives, tensors that are finite; where the VAE overflows in float16, once more and from then on in float32.

        Raises `NumbersError`.
        """
        narrow = self.vae.dtype == torch.float16
        if narrow and not self._vae_overflows:
            found = run()
            if is_finite(*found):
                return found
        with self._wide_vae() if narrow else nullcontext():
            found = run()
            for x in found:
                check_finite(x, what, stage, [self.vae], "this VAE was made for other pictures or latents")
        if narrow and not self._vae_overflows:
            self._vae_overflows = True
            warnings.warn("the VAE overflowed in float16; it works in float32 from here on.", stacklevel=4)
        return found

    @contextmanager
    def _wide_vae(self) -> Iterator[None]:
        """While open, the VAE is in float32; afterwards in float16 again, which its weights came from."""
        try:
            self.vae.float()
            yield
        finally:
            self.vae.half()

    def _shift_and_scale(self) -> tuple[Any, Any]:
        """What is taken off the VAE's own latents, and what they are then multiplied by."""
        config = self.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor
        shift, spread = (torch.tensor(x, device=self.device).reshape(1, -1, 1, 1) for x in (mean, std))
        return shift, config.scaling_factor / spread

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

    def guided(self, both: Prediction, level: Level, scale: float) -> Prediction:
        """Classifier-free guidance of a batch of two halves at a level, the first without text; a family may have its own."""
        return both.guided(scale)

    def noised(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """`z_t = a_t x_0 + s_t eps`, for the fit; t: training timesteps, (B,)."""
        return self.level(t).noised(x_0, eps)

    @abstractmethod
    def training_target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What `output` should be for `noised(x_0, eps, t)`."""

    def _count(self, rows: int) -> None:
        self._rows[threading.get_ident()] += rows * (3 if torch.is_grad_enabled() else 1)

    @contextmanager
    def trained(self, spare: bool = False) -> Iterator[None]:
        """While open, gradients pass through the network; in low memory, or to `spare` it, blocks run again on the way back."""
        checkpoint = (spare or self.low_memory) and not self.network.is_gradient_checkpointing
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
        """While open, all networks are in eval mode, frozen and exact (`group_norm`), and torch is `settled`; afterwards each
        is as it was found. Other threads wait meanwhile. Raises `ModelError` where `check` does.
        """
        with settled(self.tf32):
            self.check()
            with self._frozen():
                yield

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        modules = [m for m in self.parts for m in m.modules()]
        training = [m.training for m in modules]
        parameters = [p for m in self.parts for p in m.parameters()]
        trainable = [p.requires_grad for p in parameters]
        try:
            for m in modules:
                m.training = False
            for p in parameters:
                p.requires_grad_(False)
            with exact_group_norm(modules):
                yield
        finally:
            for m, was in zip(modules, training, strict=True):
                m.training = was
            for p, was in zip(parameters, trainable, strict=True):
                p.requires_grad_(was)


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight is numbers as they are; not one that is quantised, which may call itself floating point."""
    return type(weight.data) is Tensor and weight.is_floating_point()


def _is_fused(module: nn.Module) -> bool:
    """Whether an attention layer takes queries, keys and values from one layer, past those that LoRAs are attached to.

    diffusers' older class keeps its mark when it is unfused; there the processor says it.
    """
    marked = getattr(module, "fused_projections", False) and not isinstance(module, Attention)
    return marked or type(getattr(module, "processor", None)).__name__.startswith("Fused")
