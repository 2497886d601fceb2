"""What all rectified-flow models share: straight levels of our own, a network that predicts velocity, Uni-Inv."""

from __future__ import annotations

import torch
from torch import Tensor

from .backbone import Backbone
from .levels import Level, NoiseSchedule, Prediction


class Flow(Backbone):
    """`z = (1 - s) x_0 + s eps`, s from 0 to 1; the network says `v = eps - x_0`.

    The levels are even in s: their last step is 1/T long where the models' own, shifted, end with 0.06 to 0.24, by which
    an inversion loses the picture.
    """

    network_part = "transformer"
    num_train_timesteps = 1000  # of which the fit draws; the network takes any s
    inversion = "uni"
    time_scale = 1.0  # the network's time of s = 1

    def schedule(self, steps: int) -> NoiseSchedule:
        grid = [i / steps for i in range(steps + 1)]
        return NoiseSchedule.straight([Level(1 - s, s, s * self.time_scale) for s in grid])

    def level(self, t: Tensor) -> Level:
        s = (t + 0.5) / self.num_train_timesteps
        per_row = s.reshape(-1, 1, 1, 1)
        return Level(1 - per_row, per_row, s * self.time_scale)

    def prediction(self, output: Tensor, latents: Tensor, level: Level) -> Prediction:
        return Prediction(latents - level.s * output, latents + level.a * output)

    def training_target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The velocity."""
        return eps - x_0

    @staticmethod
    def times(level: Level, rows: int, device: torch.device) -> Tensor:
        """The network's time of every row, (B,) float32."""
        return torch.as_tensor(level.time, dtype=torch.float32, device=device).expand(rows)
