"""What channels_last and exact group normalisation cost on a CPU: milliseconds of a U-Net row, a fit row and a decoded frame.

    python benchmarks/layouts.py --rounds 8 --threads 2

The variants take turns, and medians over the rounds are shown. With one thread its processor time is taken, which other work
on the machine disturbs little; with more, the time on the clock.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from diffmorpher import Morpher
from diffmorpher.models.group_norm import exact_group_norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    backbone = Morpher.from_pretrained(options.model, device="cpu").backbone
    side, channels = backbone.network.config.sample_size, backbone.network.config.in_channels
    latents = torch.randn(18, channels, side, side)
    with torch.no_grad():
        prompt = backbone.encode_prompts(["a cat"])["text"]

    times: dict[tuple[str, str], dict[str, list[float]]] = {}
    networks = {}
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        networks[name] = tuple(copy.deepcopy(m).to(memory_format=layout) for m in (backbone.network, backbone.vae))
        for part in networks[name]:
            part.requires_grad_(False)
    for turn in range(options.rounds + 1):  # the first is the warm-up
        for name, (unet, vae) in networks.items():
            for norm in ("torch's", "exact"):
                modules = [*unet.modules(), *vae.modules()]

                def row(count: int, z: torch.Tensor, unet: torch.nn.Module = unet) -> torch.Tensor:
                    return unet(z, 500, encoder_hidden_states=prompt.expand(count, -1, -1)).sample

                def fit(row: Callable[..., torch.Tensor] = row) -> None:
                    row(8, latents[:8].clone().requires_grad_()).square().mean().backward()

                jobs: dict[str, tuple[int, Callable[[], object]]] = {
                    "U-Net row": (18, torch.no_grad()(lambda row=row: row(18, latents))),
                    "fit row": (8, fit),
                    "frame": (4, torch.no_grad()(lambda vae=vae: vae.decode(latents[:4]).sample)),
                }
                with exact_group_norm(modules) if norm == "exact" else nullcontext():
                    for job, (count, run) in jobs.items():
                        start = clock()
                        run()
                        if turn:
                            taken = times.setdefault((name, norm), {}).setdefault(job, [])
                            taken.append((clock() - start) / count * 1000)

    print("| layout | group norm | " + " | ".join(f"{job}, ms" for job in jobs) + " |\n| --- | --- | --- | --- | --- |")
    for (name, norm), jobs_times in times.items():
        print(f"| {name} | {norm} | " + " | ".join(f"{statistics.median(t):.1f}" for t in jobs_times.values()) + " |")


if __name__ == "__main__":
    main()
