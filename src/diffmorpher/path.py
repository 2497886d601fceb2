"""`MorphPath`: the prepared way between images, from which frames at any position are sampled."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .config import SampleConfig
from .errors import ConfigError, DiffMorpherError, PathFileError
from .files.cache import NOT_KEPT, Cache, Kept
from .files.paths import check_path_name, not_a_path, read_path, write_path
from .method.attention import check_mode
from .method.interpolate import Between
from .method.invert import invert
from .method.lora import LoraBank
from .method.sample import batches, sample_between
from .method.style import Styles
from .models.backbone import Backbone
from .models.conditioning import Conditioning
from .models.memory import explained, in_parts
from .models.turns import in_turn
from .progress import ProgressCallback


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """8-bit RGB pictures of one size to (B, 3, H, W), float32, in [-1, 1]."""
    arrays = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def to_bytes(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] to uint8, rounded, on the CPU."""
    return ((pixels + 1) * 127.5).clamp(0, 255).round().byte().cpu()


def to_picture(picture: Tensor) -> Image.Image:
    """(3, H, W) uint8 to an RGB picture, (4, H, W) to RGBA."""
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] to 8-bit RGB pictures, rounded."""
    return [to_picture(picture) for picture in to_bytes(pixels)]


def _check_finite(x: Tensor) -> None:
    """Raise `DiffMorpherError` for what would be a black picture."""
    if not bool(x.isfinite().all()):
        raise DiffMorpherError("the model gave no valid picture (NaN): lower the LoRA rate, or use float32.")


def _styles(down: dict[str, Tensor], up: dict[str, Tensor]) -> Styles:
    """Those of a path file, of whose names the first part is what they change."""
    banks: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    for name in down:
        part, _, layer = name.partition(".")
        own = banks.setdefault(part, ({}, {}))
        own[0][layer], own[1][layer] = down[name], up[name]
    return Styles({part: LoraBank(*each, [{}]) for part, each in banks.items()})


@dataclass
class MorphPath:
    """Fitted LoRAs, inverted noises and text conditioning of K images; cheap to sample at any position.

    latents: (K, C, h, w) clean and scaled; conditioning: K rows; bank: the images' LoRAs, or None for none; styles: those of
    every frame. opacity: (K, H, W) uint8 of the images, for films that keep their transparency.
    Positions run over [0, K-1]; in a loop over [0, K], where K is the first image again. sample_config: how frames are
    sampled where nothing else is asked for. cache: where inversions and frames that were made before are found, and go to.
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
    styles: Styles = field(default_factory=Styles)
    opacity: Tensor | None = None
    cache: Cache | None = None

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

    @in_turn
    def _trajectory(self, steps: int, progress: ProgressCallback | None = None) -> Tensor:
        """The whole of that inversion: (T + 1, K, C, h, w) float32, clean latents first."""
        SampleConfig(steps=steps)  # refuses what cannot be
        if steps not in self._trajectories:
            make = partial(
                in_parts,
                self.backbone,
                "invert",
                "image",
                self.cells,
                self.num_images,
                partial(self._invert, steps, progress),
            )
            kept = self._kept().also(self.latents, self.conditioning.tensors)
            self._trajectories[steps] = kept.tensor(make, self.latents, "trajectory", steps)
        return self._trajectories[steps]

    def _invert(self, steps: int, progress: ProgressCallback | None, at_once: int) -> Tensor:
        parts = torch.arange(self.num_images).split(at_once)
        own = torch.eye(self.num_images, dtype=torch.float64)
        trajectories: list[Tensor] = []
        with self.backbone.borrowed(), self._lora():
            for i, part in enumerate(parts):

                def report(stage: str, done: int, total: int, i: int = i) -> None:
                    if progress:
                        progress(stage, i * total + done, len(parts) * total)

                if self.bank and len(parts) > 1:
                    self.bank.set_rows(own[part])
                rows = slice(int(part[0]), int(part[-1]) + 1)
                given = self.latents[rows], self.conditioning.rows(rows)
                trajectories.append(invert(self.backbone, *given, steps, report))
        return torch.cat(trajectories, 1)

    @property
    def cells(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.latents.shape[-2], self.latents.shape[-1]

    def batch_size(self, config: SampleConfig) -> int:
        """Frames per batch: enough rows to fill the device, few enough to keep memory flat, no more than turned out to fit."""
        return min(self._wanted_size(config), self.backbone.fits.get(("sample", *self.cells), 2**30))

    def _wanted_size(self, config: SampleConfig) -> int:
        if config.batch_size != "auto":
            return config.batch_size
        if self.backbone.low_memory:
            return 2
        cells = self.latents.shape[-1] * self.latents.shape[-2]
        if self.latents.device.type == "cpu":  # where batches beyond what fills the caches gain nothing
            return max(4, min(64, 16 * 16 * 16 // cells))
        return max(4, min(64, 16 * 512 * 512 // (cells * self.backbone.vae_factor**2)))

    def _kept(self) -> Kept:
        """The cache, for what depends on the model, the LoRAs and the styles."""
        if self.cache is None:
            return NOT_KEPT
        bank = [self.bank.down, self.bank.up, self.bank.start] if self.bank else None
        return Kept.of(self.cache, self.backbone.identity(), bank, self.styles.tensors)

    @property
    def decoded_at_once(self) -> int:
        """Latents per batch of the decoder."""
        return 1 if self.backbone.low_memory else 4

    def batches(self, alphas: Sequence[float], config: SampleConfig) -> list[list[int]]:
        """Which of the frames at `alphas` are sampled together: asked for alone, a batch gives the same latents to the bit."""
        where = Between.images(alphas, self.num_images, self.loop)
        return [batch.frames for batch in batches(where, self.batch_size(config))]

    @contextmanager
    def _lora(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self.styles.attached(self.backbone))
            if self.bank:
                stack.enter_context(self.bank.attached(self.backbone.network))
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
        if config is not None and not isinstance(config, SampleConfig):
            raise ConfigError(f"config is {config!r}, but must be a SampleConfig, or None.")
        latents = self.sample_latents(alphas, config or self.sample_config, progress)
        if output == "latent":
            return latents
        with explained(self.backbone, f"hold {len(latents)} frames", self.cells):
            pixels = self.decode(latents)
            if output == "pil":
                return to_pil(pixels)
            scaled = (pixels + 1) / 2
            return scaled if output == "pt" else scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    @in_turn
    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pictures (n, 3, H, W), float32, in [-1, 1], on the CPU: decoded and moved there a few at a time.

        Raises `NumbersError` for NaN, `OutOfMemory` where not even one has room.
        """
        if not len(latents):
            width, height = (side * self.backbone.vae_factor for side in latents.shape[:1:-1])
            return torch.empty(0, 3, height, width)

        def decode(at_once: int) -> Tensor:
            with self.backbone.borrowed():
                return torch.cat([self.backbone.decode(chunk).cpu() for chunk in latents.split(at_once)])

        return in_parts(self.backbone, "decode", "frame", self.cells, min(self.decoded_at_once, len(latents)), decode)

    @in_turn
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
        self._check_trajectory(trajectory, config.steps)

        def sample(at_once: int) -> Tensor:
            with self.backbone.borrowed(), self._lora():
                return sample_between(
                    self.backbone, self.bank, trajectory, self.conditioning, where, config, at_once, self.loop, progress,
                    self._kept(),
                )  # fmt: skip

        return in_parts(self.backbone, "sample", "frame", self.cells, min(size, len(where.alpha)), sample)

    def _check_trajectory(self, trajectory: Tensor, steps: int) -> None:
        """Raise `DiffMorpherError` for what no inversion gives: it would make wrong frames, or black ones."""
        levels = len(self.backbone.schedule(steps)) + 1
        if trajectory.shape != (levels, *self.latents.shape):
            shape = tuple(trajectory.shape)
            raise DiffMorpherError(
                f"the path's inversion has the shape {shape}, which does not fit {steps} steps; make it anew."
            )
        _check_finite(trajectory)

    # ---- files

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write everything but the model to one safetensors file, to be loaded with `MorphPath.load`.

        Raises `OutputError` if it cannot be written, or is called as a picture or a film is; an older file is then left as it
        was.
        """
        check_path_name(file)
        tensors = {"latents": self.latents}
        tensors |= {f"conditioning.{name}": x for name, x in self.conditioning.tensors.items()}
        tensors |= {f"trajectory.{steps}": z for steps, z in self._trajectories.items()}
        if self.bank:
            tensors |= {f"lora.down.{name}": a for name, a in self.bank.down.items()}
            tensors |= {f"lora.up.{name}": b for name, b in self.bank.up.items()}
        if self.opacity is not None:
            tensors["opacity"] = self.opacity.float()
        for part, bank in self.styles.banks.items():
            tensors |= {f"style.down.{part}.{name}": a for name, a in bank.down.items()}
            tensors |= {f"style.up.{part}.{name}": b for name, b in bank.up.items()}
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
    @in_turn
    def load(cls, file: str | os.PathLike[str], morpher: Any) -> MorphPath:
        """Read a saved path; `morpher` holds the model it was made with (a `Morpher`).

        Raises `PathFileError` for a file that is damaged, no path, or made with another model.
        """
        backbone = getattr(morpher, "backbone", None)
        if not isinstance(backbone, Backbone):
            raise ConfigError(f"the morpher is {morpher!r:.100}, but must be a Morpher with the path's model.")
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
            path = cls(
                backbone,
                tensors["latents"].to(backbone.device),
                Conditioning(named("conditioning.")),
                None if loras is None else LoraBank(down, up, loras),
                header["prompts"],
                header["loop"],
                header["settings"],
                SampleConfig(**header["sample"]),
                {int(steps): trajectory for steps, trajectory in named("trajectory.").items()},
                _styles(named("style.down."), named("style.up.")),
                tensors["opacity"].byte() if "opacity" in tensors else None,
                getattr(morpher, "cache", None),
            )
            path._check_against_model()
            return path
        except PathFileError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, DiffMorpherError) as error:
            raise not_a_path(source) from error

    def _check_against_model(self) -> None:
        """Raise `DiffMorpherError` where a tensor does not fit the model, or another."""
        backbone, (_, channels, height, width) = self.backbone, self.latents.shape
        if channels != backbone.latent_channels:
            raise DiffMorpherError(f"{channels} channels are not this model's.")
        size = (width * backbone.vae_factor, height * backbone.vae_factor)
        if any(side % backbone.size_multiple or side < backbone.smallest_side for side in size):
            raise DiffMorpherError(f"the size {size} cannot be this model's.")
        if self.opacity is not None and self.opacity.shape[1:] != (size[1], size[0]):
            raise DiffMorpherError("the opacity has another size.")
        self.sample_config.check_images(self.num_images)
        check_mode(backbone, self.sample_config.attention_mode)
        for steps, trajectory in self._trajectories.items():
            SampleConfig(steps=steps)
            self._check_trajectory(trajectory, steps)
        if self.bank:
            self.bank.check(backbone.network)
        self.styles.check(backbone)
        with torch.no_grad(), backbone.borrowed():
            own = backbone.encode_prompts([""], self.conditioning.length)
        shapes = [{name: x.shape[1:] for name, x in each.tensors.items()} for each in (own, self.conditioning)]
        if shapes[0] != shapes[1]:
            raise DiffMorpherError("the prompts were encoded for another model.")
