"""Levels of noise: `z_i = a_i x_0 + s_i eps`, from the clean end to noise, for diffusion and for rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Level:
    """How much of the picture and of the noise a latent holds, `z = a x_0 + s eps`, and what the network calls that.

    One level for a whole batch: numbers; one for each row: a and s (B, 1, 1, 1), time (B,), all on the latents' device.
    time: the network's own: a timestep of Stable Diffusion, `s` of FLUX, `1000 s` of Stable Diffusion 3.
    """

    a: float | Tensor
    s: float | Tensor
    time: float | Tensor

    def noised(self, x_0: Tensor, eps: Tensor) -> Tensor:
        """`a x_0 + s eps`."""
        return self.a * x_0 + self.s * eps


@dataclass(frozen=True)
class Prediction:
    """What the network says of latents z at a level, whatever its own output is: `z = a clean + s noise`."""

    clean: Tensor  # x_0  (B, C, h, w)
    noise: Tensor  # eps  (B, C, h, w)

    def guided(self, scale: float) -> Prediction:
        """Classifier-free guidance of a batch of two halves, the first without text: `free + scale (conditional - free)`."""

        def guide(x: Tensor) -> Tensor:
            free, conditional = x.chunk(2)
            return free + scale * (conditional - free)

        return Prediction(guide(self.clean), guide(self.noise))


@dataclass(frozen=True)
class NoiseSchedule:
    """T + 1 levels, level 0 the clean end, level T noise; a step goes from one to its neighbour, the same solver both ways.

    done: at each level, what share of evenly spaced steps from noise would have been taken there; in it the window of
    interpolated attention is measured. flow: whether the way is straight (`a = 1 - s`): a step there keeps the velocity
    `eps - x_0` where diffusion's keeps eps.
    """

    levels: tuple[Level, ...]
    done: tuple[float, ...]
    flow: bool = False

    @classmethod
    def diffusion(cls, timesteps: Sequence[int], abar: Tensor) -> NoiseSchedule:
        """`a = sqrt(abar)`, `s = sqrt(1 - abar)`; T ascending timesteps, the first of T + 1 abar being the clean end's.

        The clean end has no timestep of its own and is called by the first.
        """
        times, count = (timesteps[0], *timesteps), len(timesteps)
        levels = (Level(float(x.sqrt()), float((1 - x).sqrt()), t) for x, t in zip(abar.double(), times, strict=True))
        return cls(tuple(levels), tuple((count - i) / count for i in range(count + 1)))

    @classmethod
    def straight(cls, levels: Sequence[Level]) -> NoiseSchedule:
        """A rectified flow's, `a = 1 - s`; evenly spaced steps of it are even in s."""
        return cls(tuple(levels), tuple(1 - float(level.s) for level in levels), flow=True)

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.levels) - 1

    def replaces(self, attention_lambda: float, level: int) -> bool:
        """Whether the step down from `level` is in the window: evenly spaced steps, one with index `i < lambda T`."""
        return round(attention_lambda - self.done[level], 9) > 0

    def down(self, prediction: Prediction, level: int) -> Tensor:
        """The latents one level below that of the prediction: DDIM with eta 0, Euler's step of a flow (section 7)."""
        return self.levels[level - 1].noised(prediction.clean, prediction.noise)

    def up(self, z: Tensor, prediction: Prediction, level: int) -> Tensor:
        """From z, one level below `level`, up to it, by a prediction for about there; the exact inverse of `down` where the
        prediction is that of what comes out (method, section 4; Uni-Inv, arXiv 2504.13109).
        """
        below, here = self.levels[level - 1], self.levels[level]
        if self.flow:
            return z + (here.s - below.s) * (prediction.noise - prediction.clean)
        return here.noised((z - below.s * prediction.noise) / below.a, prediction.noise)
