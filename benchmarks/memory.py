"""The memory that a GPU needs for a morph of two images, and the operations of a row, counted with neither weights nor a GPU.

    python benchmarks/memory.py sdxl flux-dev     # or none, for all architectures: the table of docs/models.md

Every tensor is a shape alone. Each that lives is counted with its bytes while a step of the fit, of sampling and a decoding
run as they do on a machine, with attention that stores no scores (flash). Left out is what an allocator wastes and what
kernels use inside.
"""

from __future__ import annotations

import argparse
import gc
import sys
import weakref
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import architectures
import diffmorpher.method.fit as fitting
from architectures import ARCHITECTURES, default_dtype
from diffmorpher import DiffMorpherError, FitConfig, SampleConfig
from diffmorpher.cli.terminal import quiet_libraries
from diffmorpher.method.denoise import denoise
from diffmorpher.method.interpolate import Between
from diffmorpher.method.lora import LoraBank
from diffmorpher.models import backbone as models_backbone
from diffmorpher.models import finite, group_norm
from diffmorpher.models.backbone import Backbone
from diffmorpher.models.conditioning import Conditioning
from diffmorpher.models.levels import Level, NoiseSchedule
from diffmorpher.models.loading import as_backbone
from diffmorpher.path import MorphPath

CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch's counter does not know
TEXT_ROWS = 64  # of Qwen's, which have no length of their own
#: One step of any family: of its own noise levels, shapes alone know no numbers.
SCHEDULE = NoiseSchedule.straight([Level(1.0, 0.0, 0.0), Level(0.5, 0.5, 0.5)])


class Live(TorchDispatchMode):
    """Bytes of the tensors that live, and the most there were."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = 0
        for weight in weights:
            self._add(weight)
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


class ShapeBank(LoraBank):
    """LoRAs whose start is not drawn, which shapes alone cannot be."""

    @classmethod
    def create(cls, layers: Any, num_images: int, rank: int, seed: int, device: Any = "cpu") -> LoraBank:
        down = {name: torch.zeros(num_images, rank, layer.in_features) for name, layer in layers.items()}
        up = {name: torch.zeros(num_images, layer.out_features, rank) for name, layer in layers.items()}
        return LoraBank(down, up, [{} for _ in range(num_images)])


def told(backbone: Backbone) -> Conditioning:
    """What the network is told of two prompts."""
    config = backbone.network.config
    if "cap_feat_dim" in config:  # Z-Image
        return Conditioning(
            {"text": torch.zeros(2, TEXT_ROWS, config.cap_feat_dim), "padding": torch.zeros(2, TEXT_ROWS, 1)}
        )
    if "zero_cond_t" in config:  # Qwen-Image
        return Conditioning({"text": torch.zeros(2, TEXT_ROWS, config.joint_attention_dim)})
    with torch.no_grad():
        return backbone.encode_prompts(["a", "b"])


def attention_flop(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Of shapes."""
    return sdpa_flop_count(query, key, value)


def at_once(frames: int) -> Between:
    """The rows of a batch: two images, and frames between them."""
    alpha = torch.tensor([0.0] * 2 + [0.5] * frames, dtype=torch.float64)
    return Between(torch.tensor([0, 1] + [0] * frames), torch.tensor([0, 1] + [1] * frames), alpha)


def weights(*modules: nn.Module) -> list[Tensor]:
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def size_of(tensors: list[Tensor]) -> float:
    return sum(t.untyped_storage().nbytes() for t in {t.untyped_storage()._cdata: t for t in tensors}.values()) / 1e9


def count(name: str, side: int, low_memory: bool) -> dict[str, float]:
    """TFLOP of one row forward, without LoRAs; GB for the fit, for sampling and for decoding at side x side pixels.

    As `--low-memory` runs, each with the one network that is at work; else with all of the pipeline's.
    """
    between = {n: at_once(n) for n in (2, 4, 16, 64)}  # outside, as these have numbers
    with FakeTensorMode(allow_non_fake_inputs=True):
        with default_dtype(torch.bfloat16):
            pipe = ARCHITECTURES[name](name, False)
        backbone = as_backbone(pipe, f"random {name}", low_memory)
        idle = [] if low_memory else [part for part in backbone.parts if part not in (backbone.network, backbone.vae)]
        network = weights(backbone.network, *([] if low_memory else [backbone.vae]), *idle)
        vae = weights(backbone.vae, *([] if low_memory else [backbone.network]), *idle)
        cells = side // backbone.vae_factor
        latents = torch.zeros(2, backbone.latent_channels, cells, cells)
        conditioning = told(backbone)
        path = MorphPath(backbone, latents.to("meta"), conditioning, None, ["a", "b"])  # of a device that is no CPU
        frames = path.batch_size(SampleConfig())
        bank = ShapeBank.create(backbone.projections(), 2, FitConfig().rank, 0)
        backbone.schedule = lambda steps: SCHEDULE  # type: ignore[method-assign]
        found = {}
        images = 1 if low_memory else 2
        with Live(network) as live:
            fitting.fit_loras(
                backbone, latents[:images], latents[:images], conditioning.rows(slice(images)), FitConfig(steps=1), 0
            )
        found["fit"] = live.peak / 1e9
        with (
            FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: attention_flop}) as counter,
            torch.no_grad(),
            backbone.borrowed(),
        ):
            backbone.output(latents[:1], SCHEDULE.levels[1], conditioning.rows(slice(1)))
        found["tflop"] = counter.get_total_flops() / 1e12
        gc.collect()
        with Live(network) as live, torch.no_grad(), backbone.borrowed(), bank.attached(backbone.network):
            rows = between[frames]
            bank.set_rows(rows.weights(2), "factors")
            batch = conditioning.lerp(rows.left, rows.right, rows.alpha)
            denoise(backbone, latents.repeat(frames // 2 + 1, 1, 1, 1), batch, rows, SampleConfig(steps=1))
        found["sample"] = live.peak / 1e9
        gc.collect()
        with Live(vae) as live, torch.no_grad(), backbone.borrowed():
            backbone.decode(latents[:1].repeat(1 if low_memory else min(4, frames), 1, 1, 1))
        found["decode"] = live.peak / 1e9
        if low_memory:
            found["text"] = max(
                size_of(weights(p)) for p in backbone.parts if p not in (backbone.network, backbone.vae)
            )
        else:
            found["text"] = size_of(weights(*idle))
        found["network"] = size_of(weights(backbone.network))
        found["frames"] = frames
    gc.collect()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024])
    given = parser.parse_args()
    quiet_libraries()
    scheduler = FlowMatchEulerDiscreteScheduler()  # reads numbers, which shapes have not
    architectures.FlowMatchEulerDiscreteScheduler = lambda: scheduler  # type: ignore[assignment, misc]
    fitting.LoraBank = ShapeBank  # type: ignore[misc]
    finite.is_finite = models_backbone.is_finite = lambda *tensors: True
    group_norm.group_norm = nn.GroupNorm.forward  # type: ignore[assignment]  # a GPU's: shapes are on a CPU
    table = Table(title="GB, bfloat16, two images")
    for column in (
        "model",
        "pixels",
        "",
        "TFLOP a row",
        "network",
        "text",
        "fit",
        "sample",
        "frames at once",
        "decode",
    ):
        table.add_column(column, justify="left" if column in ("model", "") else "right")
    try:
        for name in given.names or [name for name in ARCHITECTURES if name not in ("mini", "sd15")]:
            for side in given.sides:
                for low in (False, True):
                    got = count(name, side, low)
                    cells = [f"{got[key]:.1f}" for key in ("network", "text", "fit", "sample")]
                    table.add_row(
                        name,
                        str(side),
                        "--low-memory" if low else "",
                        f"{got['tflop']:.3g}",
                        *cells,
                        str(got["frames"]),
                        f"{got['decode']:.1f}",
                    )
    except DiffMorpherError as error:
        sys.exit(f"memory.py: error: {error}")
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
