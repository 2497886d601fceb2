"""What a network is told beside the latents: text embeddings and what else a family has, as named tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Named float tensors, batch first: row b of each belongs to row b of the latents.

    `text` is the sequence that the network attends to, (B, L, D); a family may have more, such as `pooled`, (B, D).
    """

    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def length(self) -> int:
        """Rows of the text sequence."""
        return self["text"].shape[1]

    def rows(self, index: Tensor | slice) -> Conditioning:
        """The rows that `index` names."""
        return self._each(lambda x: x[index])

    def repeat(self, each: int) -> Conditioning:
        """Every row `each` times, one after the other, as copies (which may be trained on where these may not)."""
        return self._each(lambda x: x.repeat_interleave(each, 0))

    def expand(self, rows: int) -> Conditioning:
        """The only row as `rows` rows."""
        return self._each(lambda x: x.expand(rows, *x.shape[1:]))

    def lerp(self, left: Tensor, right: Tensor, alpha: Tensor) -> Conditioning:
        """Row b is `(1 - alpha_b)` of row `left_b` and `alpha_b` of row `right_b` (method, section 6)."""

        def mix(x: Tensor) -> Tensor:
            a = alpha.to(x).reshape(-1, *[1] * (x.ndim - 1))
            return (1 - a) * x[left.to(x.device)] + a * x[right.to(x.device)]

        return self._each(mix)

    @classmethod
    def cat(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all parts, which are of one family and one length of text."""
        return cls({name: torch.cat([part[name] for part in parts]) for name in parts[0].tensors})

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning({name: change(x) for name, x in self.tensors.items()})
