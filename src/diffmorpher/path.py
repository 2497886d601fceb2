"""`MorphPath`: the prepared way between images, from which frames at any position are sampled."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .config import SampleConfig
from .errors import ConfigError, PathFileError
from .files.paths import not_a_path, read_path, write_path
from .method.attention import check_mode
from .method.interpolate import Between
from .method.invert import invert
from .method.lora import LoraBank
from .method.sample import sample_between
from .models.backbone import Backbone
from .models.conditioning import Conditioning
from .progress import ProgressCallback


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """8-bit RGB pictures of one size to (B, 3, H, W), float32, in [-1, 1]."""
    arrays = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def to_bytes(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] to uint8, rounded, on the CPU."""
    return ((pixels + 1) * 127.5).clamp(0, 255).round().byte().cpu()


def to_picture(picture: Tensor) -> Image.Image:
    """(3, H, W) uint8 to an RGB picture."""
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] to 8-bit RGB pictures, rounded."""
    return [to_picture(picture) for picture in to_bytes(pixels)]


@dataclass
class MorphPath:
    """Fitted LoRAs, inverted noises and text conditioning of K images; cheap to sample at any position.

    latents: (K, C, h, w) clean and scaled; conditioning: K rows; bank: the images' LoRAs, or None for none.
    Positions run over [0, K-1]; in a loop over [0, K], where K is the first image again. sample_config: how frames are
    sampled where nothing else is asked for.
    """

    backbone: Backbone
    latents: Tensor
    conditioning: Conditioning
    bank: LoraBank | None
    prompts: list[str]
    loop: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    sample_config: SampleConfig = field(default_factory=SampleConfig)
    _trajectories: dict[int, Tensor] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        return len(self.latents)

    @property
    def noises(self) -> Tensor:
        """The inverted noises, (K, C, h, w) float32, of the first inversion made."""
        return self.noises_at(next(iter(self._trajectories), self.sample_config.steps))

    def noises_at(self, steps: int, progress: ProgressCallback | None = None) -> Tensor:
        """The noises of an inversion with `steps` steps, each image with its own LoRA and prompt; made once, then kept."""
        return self._trajectory(steps, progress)[-1]

    def _trajectory(self, steps: int, progress: ProgressCallback | None = None) -> Tensor:
        """The whole of that inversion: (T + 1, K, C, h, w) float32, clean latents first."""
        SampleConfig(steps=steps)  # refuses what cannot be
        if steps not in self._trajectories:
            with self.backbone.borrowed(), self._lora():
                self._trajectories[steps] = invert(self.backbone, self.latents, self.conditioning, steps, progress)
        return self._trajectories[steps]

    def batch_size(self, config: SampleConfig) -> int:
        """Frames per batch: enough rows to fill the device, few enough to keep memory flat."""
        if config.batch_size != "auto":
            return config.batch_size
        if self.backbone.low_memory:
            return 2
        cells = self.latents.shape[-1] * self.latents.shape[-2]
        on_cpu = self.latents.device.type == "cpu"  # where batches beyond what fills the caches gain nothing
        return max(4, min(64, (16 * 16 * 16 if on_cpu else 16 * 64 * 64) // cells))

    @contextmanager
    def _lora(self) -> Iterator[None]:
        with self.bank.attached(self.backbone.network) if self.bank else nullcontext():
            yield

    # ---- sampling

    def sample(
        self,
        alphas: Sequence[float],
        config: SampleConfig | None = None,
        output: Literal["pil", "np", "pt", "latent"] = "pil",
        progress: ProgressCallback | None = None,
    ) -> Any:
        """The frames at `alphas`, positions over [0, K-1], in the order given.

        output: "pil": list of PIL images; "np": (n, H, W, 3) float32 in [0, 1]; "pt": (n, 3, H, W) float32 in [0, 1];
        "latent": (n, C, h, w) float32, scaled, before decoding. Frames do not depend on `config.batch_size`.
        Raises `ConfigError` for a position outside the path.
        """
        if output not in ("pil", "np", "pt", "latent"):
            raise ConfigError(f'output is {output!r}, but must be "pil", "np", "pt" or "latent".')
        latents = self.sample_latents(alphas, config or self.sample_config, progress)
        if output == "latent":
            return latents
        pixels = self.decode(latents)
        if output == "pil":
            return to_pil(pixels)
        scaled = (pixels + 1) / 2
        return scaled if output == "pt" else scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pictures (n, 3, H, W), float32, in [-1, 1], on the CPU: decoded and moved there a few at a time."""
        if not len(latents):
            width, height = (side * self.backbone.vae_factor for side in latents.shape[:1:-1])
            return torch.empty(0, 3, height, width)
        batch = 1 if self.backbone.low_memory else 4
        with self.backbone.borrowed():
            return torch.cat([self.backbone.decode(chunk).cpu() for chunk in latents.split(batch)])

    @torch.no_grad()
    def sample_latents(
        self, alphas: Sequence[float], config: SampleConfig, progress: ProgressCallback | None = None
    ) -> Tensor:
        """The clean latents at `alphas`, (n, C, h, w) float32: what `sample` gives as "latent"."""
        where = Between.images(alphas, self.num_images, self.loop)
        if len(where.alpha) == 0:
            return self.latents.new_empty(0, *self.latents.shape[1:])
        config.check_images(self.num_images)
        check_mode(self.backbone, config.attention_mode)
        trajectory, size = self._trajectory(config.steps, progress), self.batch_size(config)
        with self.backbone.borrowed(), self._lora():
            return sample_between(
                self.backbone, self.bank, trajectory, self.conditioning, where, config, size, self.loop, progress
            )

    # ---- files

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write everything but the model to one safetensors file, to be loaded with `MorphPath.load`.

        Raises `OutputError` if it cannot be written; an older file is then left as it was.
        """
        tensors = {"latents": self.latents}
        tensors |= {f"conditioning.{name}": x for name, x in self.conditioning.tensors.items()}
        tensors |= {f"trajectory.{steps}": z for steps, z in self._trajectories.items()}
        if self.bank:
            tensors |= {f"lora.down.{name}": a for name, a in self.bank.down.items()}
            tensors |= {f"lora.up.{name}": b for name, b in self.bank.up.items()}
        header = {
            "model": self.backbone.name,
            "signature": self.backbone.signature(),
            "prompts": self.prompts,
            "loop": self.loop,
            "loras": self.bank.metadata if self.bank else None,
            "settings": self.settings,
            "sample": asdict(self.sample_config),
        }
        return write_path(file, header, tensors)

    @classmethod
    def load(cls, file: str | os.PathLike[str], morpher: Any) -> MorphPath:
        """Read a saved path; `morpher` holds the model it was made with (a `Morpher`).

        Raises `PathFileError` for a file that is damaged, no path, or made with another model.
        """
        backbone: Backbone = morpher.backbone
        source = Path(file)
        header, tensors = read_path(source)

        def named(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t.to(backbone.device) for n, t in tensors.items() if n.startswith(prefix)}

        try:
            if not backbone.has_signature(header["signature"]):
                raise PathFileError(
                    f"{source} was made with another model, called {header['model']!r} then; load that model."
                )
            down, up, loras = named("lora.down."), named("lora.up."), header["loras"]
            return cls(
                backbone,
                tensors["latents"].to(backbone.device),
                Conditioning(named("conditioning.")),
                None if loras is None else LoraBank(down, up, loras),
                header["prompts"],
                header["loop"],
                header["settings"],
                SampleConfig(**header["sample"]),
                {int(steps): trajectory for steps, trajectory in named("trajectory.").items()},
            )
        except PathFileError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise not_a_path(source) from error
