"""Ghost: whether the middle of a morph shows a new picture or the two ends on top of each other (method, section 9)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def ghost(frames: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """How much each frame is a cross-fade of the ends: 1 for a blend of their pixels, 0 where no blend is nearer than an end.

    frames: (n, C, H, W); a, b: (C, H, W), float, on one scale. With |.| the root of the sum of squares over all pixels,

        ghost(f) = 1 - min over t in [0, 1] of |f - ((1 - t) a + t b)| / min(|f - a|, |f - b|)

    and 0 for a frame that is one of the ends. A frame that has nothing to do with either end, all three as far from each other,
    has 1 - sqrt(3)/2 = 0.13. Returns (n,).
    """
    frames, way = (frames - a).flatten(1).double(), (b - a).flatten().double()
    length = way.square().sum()
    t = (frames @ way / length.clamp(min=1e-12)).clamp(0, 1)  # the nearest blend is the foot of the perpendicular
    blend = (frames - t[:, None] * way).norm(dim=1)
    end = frames.norm(dim=1).minimum((frames - way).norm(dim=1))
    return (1 - blend / end.clamp(min=1e-12)).where(end > 1e-9, end.new_zeros(()))


#: Above it a film is called a cross-fade: half-way between what films of known kind have on the 24 pairs of `mini`, in 8 bits:
#: cross-fades 0.98 or more, warps along the optical flow 0.43 at most, the model of then (10 steps, no LoRA) 0.32.
CROSS_FADE = 0.7


def said_ghost(value: float | None) -> str:
    """One sentence where a film of that ghost is a cross-fade, on what helps; else ""."""
    if value is None or value <= CROSS_FADE:
        return ""
    return (
        f"In the middle the pictures lie on top of each other (ghost {value:.2f}; a cross-fade has 1): say in a prompt what "
        "each shows, learn a LoRA if there is none, or give a picture that lies between them."
    )


def middle_third(start: int, end: int) -> list[int]:
    """The frames in the middle third of the way from one picture's frame to the next one's, by their numbers."""
    return [i for i in range(start + 1, end) if end - start <= 3 * (i - start) <= 2 * (end - start)]


def some_of(frames: Sequence[int], most: int) -> list[int]:
    """At most so many of them, spread evenly."""
    if len(frames) <= most:
        return list(frames)
    return [frames[round(i * (len(frames) - 1) / (most - 1))] for i in range(most)]
