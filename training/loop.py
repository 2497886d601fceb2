"""What every part's training needs: a budget in minutes, slices, checkpoints that survive anything, a moving average, a log."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import math
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

PART_BYTES = 16 * 2**20  # what one file may hold on its way back from a borrowed machine
SAVE_EVERY = 300.0  # seconds


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long to train: `minutes` in all, or `steps` in all where given; at most `slice` minutes of it now.

    slim: checkpoints hold the weights and their averages in 16 bits and no optimizer's state: four times smaller, for a
    machine that lets little out. A run that goes on from one gathers its momentum anew.
    """

    minutes: float
    slice: float | None = None
    steps: int | None = None
    slim: bool = False

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser, minutes: float) -> None:
        parser.add_argument("--minutes", type=float, default=minutes, help="the budget, over all slices")
        parser.add_argument("--steps", type=int, help="the budget in steps instead of minutes")
        parser.add_argument("--slice", type=float, help="stop after so many minutes; run again to go on")
        parser.add_argument("--slim", action="store_true", help="checkpoints of a quarter of the size")
        parser.add_argument("--device", default="cpu")
        parser.add_argument("--seed", type=int, default=0)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Limits:
        return cls(args.minutes, args.slice, args.steps, args.slim)


def rate_at(fraction: float, peak: float, warmup: float = 0.02) -> float:
    """The learning rate at a share of the budget: linear warm-up, then half a cosine down to a hundredth of the peak."""
    if fraction < warmup:
        return peak * max(fraction / warmup, 0.01)
    done = (fraction - warmup) / (1 - warmup)
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


class Run:
    """Training steps within a budget of wall-clock minutes, resumable in slices.

    parts: what a checkpoint holds, objects with `state_dict` and `load_state_dict`. The learning rate follows the share of
    the budget that is spent, summed over all slices, so that a schedule always ends where the budget does, on a fast
    machine as on a slow one; with a budget in steps two runs with one seed do the same. Interrupting (Ctrl-C, SIGTERM)
    ends the slice after the step at work.
    """

    def __init__(self, folder: Path, parts: dict[str, Any], limits: Limits) -> None:
        self.folder, self.parts, self.limits = folder, parts, limits
        self.step, self.seconds = 0, 0.0
        self.sums: dict[str, float | torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.stopped = False
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "checkpoint").exists() and (folder / "checkpoint.old").exists():
            (folder / "checkpoint.old").rename(folder / "checkpoint")  # cut off between the two renames of `save`
        if (folder / "checkpoint").exists():
            self._load()

    @property
    def finished(self) -> bool:
        return self.fraction >= 1

    @property
    def fraction(self) -> float:
        """The share of the budget that is spent, in [0, 1]."""
        return min(
            self.step / self.limits.steps if self.limits.steps else self.seconds / (60 * self.limits.minutes), 1.0
        )

    def learning_rate(self, peak: float) -> float:
        return rate_at(self.fraction, peak)

    def steps(self, log_every: int = 50) -> Iterator[int]:
        """Step numbers until the budget or the slice is spent; checkpoints and the log are written in between."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        began = saved = last = time.monotonic()
        end = math.inf if self.limits.slice is None else began + 60 * self.limits.slice
        while not self.finished and not self.stopped and last < end:
            yield self.step
            now = time.monotonic()
            self.step, self.seconds, last = self.step + 1, self.seconds + now - last, now
            if self.step % log_every == 0:
                self._log()
            if now - saved > SAVE_EVERY:
                self.save()
                saved = time.monotonic()
        self.save()

    def record(self, **values: float | torch.Tensor) -> None:
        """Add to the means that the next line of the log shows."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value  # on a GPU it may still be being computed
            self.counts[name] = self.counts.get(name, 0) + 1

    def save(self) -> None:
        """Replace the checkpoint; what is on the disk is whole at every moment."""
        buffer = io.BytesIO()
        states = {name: part.state_dict() for name, part in self.parts.items()}
        if self.limits.slim:
            states = {
                name: {key: value.bfloat16() if value.is_floating_point() else value for key, value in state.items()}
                for name, state in states.items()
                if "optimizer" not in name
            }
        torch.save(states, buffer)
        data, fresh = buffer.getvalue(), self.folder / "checkpoint.new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        names = []
        for i, start in enumerate(range(0, len(data), PART_BYTES)):
            names.append(f"part-{i:03d}")
            (fresh / names[-1]).write_bytes(data[start : start + PART_BYTES])
        about = {"step": self.step, "seconds": self.seconds, "parts": names, "sha256": hashlib.sha256(data).hexdigest()}
        (fresh / "about.json").write_text(json.dumps(about))
        current, old = self.folder / "checkpoint", self.folder / "checkpoint.old"
        shutil.rmtree(old, ignore_errors=True)
        if current.exists():
            current.rename(old)
        fresh.rename(current)
        shutil.rmtree(old, ignore_errors=True)

    def _load(self) -> None:
        states, about = read_checkpoint(self.folder)
        for name, part in self.parts.items():
            if name in states:  # a slim checkpoint has no optimizer
                part.load_state_dict(states[name])
        self.step, self.seconds = about["step"], about["seconds"]

    def _log(self) -> None:
        means = {name: float(self.sums[name]) / self.counts[name] for name in self.sums}
        self.sums.clear(), self.counts.clear()
        line = {"step": self.step, "minutes": round(self.seconds / 60, 3), **{k: round(v, 6) for k, v in means.items()}}
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(f"{self.fraction:6.1%}", json.dumps(line), flush=True)

    def _stop(self, *_: object) -> None:
        self.stopped = True


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the parts' states, what about.json says) of the last checkpoint of a run's folder; changes nothing there."""
    folder = folder / "checkpoint"
    about = json.loads((folder / "about.json").read_text())
    data = b"".join((folder / name).read_bytes() for name in about["parts"])
    if hashlib.sha256(data).hexdigest() != about["sha256"]:
        raise SystemExit(
            f"{folder} is damaged: its parts do not have the digest in about.json. Delete it to start over."
        )
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), about


def moving_average(model: torch.nn.Module, decay: float = 0.999) -> AveragedModel:
    """An exponential moving average of the weights that warms up, so that it forgets the random start."""

    def update(averages: Any, current: Any, count: Any) -> None:
        weight = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(list(averages), list(current), weight)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=False)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # read by a step that was captured
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate * group.get("scale", 1.0)
