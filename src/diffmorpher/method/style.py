"""Styles: LoRAs that act on every frame, and on what the text encoders make of the prompts, beside the pictures' own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType

from torch import Tensor, nn

from ..errors import LoraError
from ..files.loras import Lora
from ..models.backbone import Backbone
from .lora import LoraBank

#: What the network is called among the parts that a style adds to; text encoders go by their names in a pipeline.
NETWORK = "network"
#: Attention layers of text encoders as diffusers' oldest files name them.
_OLD_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class Styles:
    """All styles of a film together: for each part of the pipeline that they change, a bank of one LoRA."""

    def __init__(self, banks: Mapping[str, LoraBank] = MappingProxyType({})) -> None:
        self.banks = dict(banks)

    @classmethod
    def of(cls, loras: Sequence[Lora], names: Sequence[str], backbone: Backbone) -> Styles:
        """From LoRAs with their weights in them; names: what an error calls each. Raises `LoraError` for another model's."""
        device, banks = backbone.device, {}
        if any(lora.down or lora.gains for lora in loras):
            banks[NETWORK] = LoraBank.joined(loras, backbone.network, names, device, backbone.family)
        of_text = [_by_encoder(lora, name, backbone) for lora, name in zip(loras, names, strict=True)]
        for part in sorted({part for each in of_text for part in each}):
            mine = [(each[part], name) for each, name in zip(of_text, names, strict=True) if part in each]
            banks[part] = LoraBank.joined(
                [lora for lora, _ in mine], _encoder(backbone, part), [name for _, name in mine], device
            )
        return cls(banks)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything in them, by part and layer."""
        return {
            f"{kind}.{part}.{name}": x
            for part, bank in self.banks.items()
            for kind, layers in (("down", bank.down), ("up", bank.up))
            for name, x in layers.items()
        }

    @contextmanager
    def attached(self, backbone: Backbone) -> Iterator[None]:
        """While open, they act."""
        with ExitStack() as stack:
            for part, bank in self.banks.items():
                module = backbone.network if part == NETWORK else _encoder(backbone, part)
                stack.enter_context(bank.attached(module))
            yield

    def check(self, backbone: Backbone) -> None:
        """Raise `LoraError` where they do not fit the model."""
        for part, bank in self.banks.items():
            module = backbone.network if part == NETWORK else getattr(backbone.pipe, part, None)
            if not isinstance(module, nn.Module):
                raise LoraError(f"the style is for another model (this one has no {part}).")
            bank.check(module)


def _encoder(backbone: Backbone, part: str) -> nn.Module:
    module: nn.Module = getattr(backbone.pipe, part)
    return module


def _by_encoder(lora: Lora, name: str, backbone: Backbone) -> dict[str, Lora]:
    """A LoRA's layers of text encoders, for each that the pipeline has, by the paths of its modules."""
    found: dict[str, Lora] = {}
    for (part, layer), (down, up) in lora.text.items():
        part = (
            part if getattr(backbone.pipe, part, None) is not None else "text_encoder_2"
        )  # kohya counts T5 as the third
        encoder = getattr(backbone.pipe, part, None)
        if not isinstance(encoder, nn.Module):
            raise LoraError(f"{name}: the LoRA is for another model (this one has no such text encoder).")
        own = found.setdefault(part, Lora({}, {}, {}))
        path = _path(layer, encoder)
        own.down[path], own.up[path] = down, up
    return found


def _path(layer: str, encoder: nn.Module) -> str:
    """The module that a file's layer is, whose dots may be underscores there; as it is written where there is none."""
    known = {path.replace(".", "_"): path for path, _ in encoder.named_modules()}
    old = re.sub(r"(?<=self_attn[._])(to_q|to_k|to_v|to_out)$", lambda match: _OLD_NAMES[match[0]], layer)
    bare = old.replace(".", "_").removeprefix("text_model_")
    return known.get(bare) or known.get(f"text_model_{bare}") or layer
