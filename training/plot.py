"""The loss curves as a picture: `python -m training.plot WORK training/losses.png` (needs matplotlib)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, part, names in zip(
        axes, ("autoencoder", "diffusion"), (("l1", "perceptual", "squared"), ("loss", "held_out")), strict=True
    ):
        lines = [json.loads(line) for line in (args.work / part / "log.jsonl").read_text().splitlines()]
        for name in names:
            known = [line for line in lines if name in line]
            ax.plot([line["minutes"] for line in known], [line[name] for line in known], label=name)
        checks = [(line["minutes"], line["psnr"]) for line in lines if "psnr" in line]
        if checks:
            right = ax.twinx()
            right.plot(*zip(*checks, strict=True), "k.:", label="held-out PSNR")
            right.set_ylabel("held-out PSNR (dB)")
        ax.set(title=part, xlabel="minutes of training", yscale="log")
        ax.legend()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
