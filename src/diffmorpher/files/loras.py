"""LoRA files: written in diffusers' own layout or kohya's, read from every layout in use.

Reads, recognised by content and never by suffix:

- diffusers' safetensors: `unet.<path>.lora.down.weight`, older
  `unet.<path>.processor.to_q_lora.down.weight`, with the alpha of `lora_adapter_metadata` in the header;
- PEFT's: `<path>.lora_A.weight`, `base_model.model.<path>.lora_A.default.weight`, with the alpha of the
  `adapter_config.json` beside it;
- kohya's: `lora_unet_<path with underscores>.lora_down.weight`, with `.alpha` tensors, and OneTrainer's `lora_transformer_...`;
- those with Stability's own block names, `lora_unet_input_blocks_...`, `diffusion_model.input_blocks...` or, as the Open Model
  Initiative has it, `unet.input_blocks...`;
- LyCORIS' LoCon, whose convolutions are in two factors or three, and its and PEFT's LoHa, LoKr and whole differences of weights
  (`lora_factors.py`); DoRA, and PEFT's IA3;
- kohya's, ComfyUI's (`diffusion_model.<path>`) and PEFT's for transformers under their first code's names: `lora_families.py`;
- torch checkpoints (zip or old pickle) with any of these keys, such as the published DiffMorpher's `.ckpt`; pickled
  code is never run.

A LoRA is not checked against a model here; the bank that uses it does that.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import ConfigError, LoraError, OutputError
from .atomic import cannot_write, replacing
from .kohya import with_kohyas_names
from .lora_factors import is_part, pair, peft_scale, with_factors
from .lora_families import of_no_family_here, with_diffusers_names, with_dots

_METADATA_PREFIX = "diffmorpher."

# "<layer>.lora_A.weight", ".lora_A.default.weight", ".lora.down.weight", "_lora.down.weight", ".lora_down.weight" and,
# in text encoders, ".lora_linear_layer.down.weight"; "mid" is the middle of a three-factor convolution.
_WEIGHT_KEY = re.compile(r"(?P<layer>.+?)[._]lora(?:_linear_layer)?[._](?P<side>A|B|down|up|mid)(?:\.[^.]+)?\.weight")
_ALPHA_KEY = re.compile(r"(?P<layer>.+)\.(?P<side>alpha)")
#: What changes a layer in proportion to its own weights: DoRA's lengths, and IA3's factors as PEFT writes them.
_GAIN_KEY = re.compile(
    r"(?P<layer>.+?)(?:\.(?P<dora>dora_scale)|[._]lora_(?P<side>magnitude)_vector(?:\.[^.]+)*|\.(?P<ia3>ia3)_l(?:\.[^.]+)?)"
)
_SIDES = {"A": "down", "B": "up"}
_GAINS = {"dora_scale", "magnitude", "ia3"}

# Parts of a file that change what its LoRA means, so that leaving them out would give another result.
_UNSUPPORTED = {
    "OFT": re.compile(r"\.oft_"),
    "LyCORIS IA3": re.compile(r"\.on_input$"),  # beside it only `.weight`, as a whole model has
    "LoRA with a bias": re.compile(r"\blora_B\b.*\.bias$|\.diff_b$"),
}

_TRANSFORMER_PARTS = {
    "transformer_blocks", "single_transformer_blocks", "x_embedder", "context_embedder", "time_text_embed", "pos_embed",
    "norm_out", "proj_out",
    "time_guidance_embed", "double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation",  # FLUX.2
    "layers", "noise_refiner", "context_refiner", "t_embedder", "cap_embedder", "all_x_embedder", "all_final_layer",  # Z-Image
    "img_in", "txt_in",  # Qwen-Image
}  # fmt: skip
_UNET_PARTS = {"conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks", "conv_out"}
#: A text encoder's layer as files name it: the encoder's number, and its path with dots or underscores.
_TEXT_LAYER = re.compile(r"(?:text_encoder(?:_(?P<number>\d))?\.|lora_te(?P<kohyas>\d)?_)(?P<layer>.+)")
# Stability's own block names, in kohya's files for SDXL: a block's part 0 is a residual block, part 1 attention.
_SGM_BLOCK = re.compile(r"(?:(?P<side>input|output)_blocks_(?P<block>\d+)|middle_block)_(?P<part>\d+)_(?P<rest>.+)")
_SGM_RESNET = {
    "in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip

_SGM_ENDS = {
    "input_blocks_0_0": "conv_in", "out_2": "conv_out", "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2", "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}  # fmt: skip
_SGM_PARTS = {"input_blocks", "middle_block", "output_blocks", "out", "time_embed", "label_emb"}
#: Tensors of a textual inversion, in its several forms.
_EMBEDDING = re.compile(r"emb_params|clip_[lg]|string_to_param.*|<.+>")


@dataclass(frozen=True)
class Lora:
    """One image's LoRA: the layer at `name` adds `up[name] @ down[name] @ x`, a convolution `up[name] @ (down[name] * x)`.

    down: module path inside the U-Net or transformer (such as "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q" or
        "...attn1.to_out.0") -> (r, in), of a convolution (r, in, h, w), float32, CPU.
    up: the same names -> (out, r), float32, CPU; any scale (alpha / rank) is folded in.
    metadata: "prompt", "model", "rank", "image_hash", "seed", "start", where known; empty for files made elsewhere.
    text: layers of the text encoders, where asked for: (encoder's name in a pipeline, layer as the file names it) -> A, B.
    gains: what goes by the model's own weights, by layer: "dora_scale" (kohya's), "magnitude" (PEFT's DoRA) or "ia3", and its
        tensor; `LoraBank` makes up and down of them. strength: theirs; in other layers it is part of `up`.
    """

    down: dict[str, Tensor]
    up: dict[str, Tensor]
    metadata: dict[str, str]
    text: dict[tuple[str, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    gains: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    strength: float = 1.0

    def scaled(self, weight: float) -> Lora:
        """It at another strength."""
        up = {name: matrix * (1 if name in self.gains else weight) for name, matrix in self.up.items()}
        text = {name: (a, b * weight) for name, (a, b) in self.text.items()}
        return Lora(self.down, up, self.metadata, text, self.gains, self.strength * weight)


def save_lora(lora: Lora, path: str | os.PathLike[str], format: Literal["diffusers", "kohya"] | None = None) -> Path:
    """Write `lora` as float32 safetensors that `pipe.load_lora_weights(path)` of any diffusers pipeline loads.

    format: "kohya" is what most programs read for a U-Net, "diffusers" for a transformer; None takes that.
    The file appears whole or not at all, parent folders are made, and equal LoRAs give equal bytes. The metadata goes to the
    header as "diffmorpher.prompt" and so on. Raises `OutputError` if the file cannot be written, `ConfigError` for kohya's
    layout of a transformer's LoRA.
    """
    if not isinstance(lora, Lora):
        raise ConfigError(f"a LoRA is {lora!r:.100}, but must be a Lora.")
    if not isinstance(path, (str, os.PathLike)) or "\0" in os.fspath(path):
        raise OutputError(f"the LoRA file is {path!r:.100}, but must be a path.")
    path = Path(path)
    if lora.gains:
        raise ConfigError("a DoRA or IA3 is a LoRA only beside its model: use the file that it came from.")
    transformer = any(name.split(".")[0] in _TRANSFORMER_PARTS for name in lora.down)
    if format not in (None, "diffusers", "kohya"):
        raise ConfigError(f'the format is {format!r}, but must be "diffusers" or "kohya".')
    if transformer and format == "kohya":
        raise ConfigError(
            "kohya's format is for U-Nets (Stable Diffusion 1, 2 and XL): leave the format out, ComfyUI reads that of a "
            "transformer's LoRA too."
        )
    # A convolution's second factor is one too. Copies, since safetensors refuses tensors that share memory, as slices do.
    up = {name: matrix[(...,) + (None,) * (lora.down[name].ndim - 2)] for name, matrix in lora.up.items()}
    if transformer or format == "diffusers":
        a, b = (".lora_A", ".lora_B") if transformer else (".lora.down", ".lora.up")
        prefix = "transformer." if transformer else "unet."
        tensors = {f"{prefix}{name}{a}.weight": matrix for name, matrix in lora.down.items()}
        tensors |= {f"{prefix}{name}{b}.weight": matrix for name, matrix in up.items()}
    else:
        tensors = with_kohyas_names(lora.down, up)
    copies = {key: x.detach().to("cpu", torch.float32, copy=True).contiguous() for key, x in tensors.items()}
    header = {"format": "pt"} | {_METADATA_PREFIX + key: value for key, value in lora.metadata.items()}
    content = _with_sorted_header(save(copies, header))
    try:
        with replacing(path) as part:
            part.write_bytes(content)
    except OSError as error:
        raise cannot_write(f"The LoRA {path}", error) from error
    return path


def load_lora(path: str | os.PathLike[str], text: bool = False) -> Lora:
    """Read the U-Net's or transformer's layers from a LoRA file (layouts: see the module), without running pickled code.

    text: read the text encoders' layers too. What is left out is counted in one warning.
    Raises `LoraError` if the file is missing, damaged, unsafe, no LoRA, of an unsupported kind (OFT, LyCORIS' own IA3,
    biases) or inconsistent (a matrix without its partner, ranks that differ, NaN or infinite numbers).
    """
    if not isinstance(path, (str, os.PathLike)):
        raise LoraError(f"a LoRA file is {path!r:.100}, but must be a path.")
    path = Path(path)
    tensors, header = _read(path)
    scale = peft_scale(path, header, tensors)
    tensors = with_factors(path, tensors, scale)
    try:
        tensors = with_diffusers_names(tensors)
    except ValueError as error:
        raise LoraError(
            f"{path} has FLUX.1's names but is no LoRA for it that diffusers can convert ({error}); give it in diffusers' own "
            "layout, if it is one."
        ) from error
    layers, skipped, encoders = _group(path, tensors, text)
    down: dict[str, Tensor] = {}
    up: dict[str, Tensor] = {}
    gains = {name: gain for name, parts in layers.items() if (gain := _gain(path, name, parts))}
    for name, parts in sorted(layers.items()):
        if name not in gains or gains[name][0] != "ia3" or "down" in parts:
            down[name], up[name] = pair(path, name, parts, scale)
    words = {
        encoder: pair(path, encoder[1], parts, peft_scale(path, header, (), encoder[0]))
        for encoder, parts in sorted(encoders.items())
    }
    if not down and not gains and not words:
        found = f", but one for {other}" if (other := of_no_family_here(tensors)) else ""
        raise LoraError(
            f"{path} holds no LoRA for the network of a Stable Diffusion or FLUX model{found}; give one made for the model in "
            "use."
        )
    if skipped:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
        warnings.warn(
            f"{path}: LoRA layers skipped: {counts}; only layers of the U-Net or transformer are used.",
            stacklevel=2,
        )
    metadata = {k.removeprefix(_METADATA_PREFIX): v for k, v in header.items() if k.startswith(_METADATA_PREFIX)}
    return Lora(down, up, metadata, words, gains)


def _with_sorted_header(content: bytes) -> bytes:
    """Safetensors bytes with the header's keys in order: the library writes its metadata in random order."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # keeps the tensors aligned
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of the file and its header's metadata."""
    try:
        if not path.exists():
            raise LoraError(f"The LoRA file {path} does not exist; check the path.")
        if not path.is_file():
            raise LoraError(f"{path} is not a file; give the LoRA file itself, for example one inside that folder.")
        with path.open("rb") as file:
            start = file.read(9)
        if not start:
            raise LoraError(f"{path} is empty; get the LoRA file again.")
        if start[8:] == b"{":  # safetensors: 8 bytes of length, then JSON
            return _read_safetensors(path)
        if start.startswith((b"PK\x03\x04", b"\x80")):  # a zip file, or a binary pickle
            return _read_pickle(path), {}
    except OSError as error:
        raise LoraError(f"{path} cannot be read ({error.strerror or error}); check the file.") from error
    raise LoraError(f"{path} is neither a safetensors file nor a torch checkpoint; give a LoRA file.")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            _check_keys(path, file.keys())  # before a whole model is read into memory
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise LoraError(f"{path} is a damaged safetensors file ({error}); get it again.") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:  # given the path, torch goes by the suffix
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise LoraError(f"{path} is a pickle that might run code and was refused; get it as safetensors.") from error
    except OSError:
        raise
    except Exception as error:  # torch lets errors of many types through when the bytes make no sense
        raise LoraError(f"{path} is a damaged torch checkpoint or none at all; get the LoRA file again.") from error
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # as trainers write checkpoints
    if isinstance(content, dict) and "string_to_param" in content:
        content = content["string_to_param"]
        content = (
            {f"string_to_param.{key}": value for key, value in content.items()} if isinstance(content, dict) else {}
        )
    if not isinstance(content, dict):
        raise LoraError(f"{path} holds a {type(content).__name__}, not named tensors; give a LoRA file.")
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    _check_keys(path, tensors)
    return tensors


def _check_keys(path: Path, keys: Iterable[str]) -> None:
    """Refuse files that are no LoRA, or of a kind that cannot be read."""
    keys = list(keys)
    for kind, pattern in _UNSUPPORTED.items():
        if any(pattern.search(key) for key in keys):
            raise LoraError(f"{path} is a {kind} file, which is not supported; give a plain LoRA.")
    if keys and all(_EMBEDDING.fullmatch(key) for key in keys):
        raise LoraError(
            f"{path} is a textual inversion (an embedding), no LoRA; load it into a pipeline of your own with "
            "pipe.load_textual_inversion, and give that to Morpher."
        )
    if not any(_WEIGHT_KEY.fullmatch(key) or _GAIN_KEY.fullmatch(key) or is_part(key) for key in keys):
        first = f"its first tensor is {min(keys)!r}" if keys else "it holds no tensors"
        raise LoraError(f"{path} holds no LoRA weights ({first}; is it a whole model?); give a LoRA file.")


_Parts = dict[str, Tensor]  # "down", "up", "mid", "alpha"


def _group(
    path: Path, tensors: Mapping[str, Tensor], text: bool
) -> tuple[dict[str, _Parts], Counter[str], dict[tuple[str, str], _Parts]]:
    """The network's layers by module path, the number of others by kind, and the text encoders' layers if asked for."""
    layers: dict[str, _Parts] = {}
    encoders: dict[tuple[str, str], _Parts] = {}
    others: dict[str, str] = {}
    for key, tensor in tensors.items():
        match = _WEIGHT_KEY.fullmatch(key) or _ALPHA_KEY.fullmatch(key) or _GAIN_KEY.fullmatch(key)
        layer = match["layer"] if match else key
        name = _network_path(layer)
        side = _side(match) if match else ""
        if match and text and (encoder := _TEXT_LAYER.fullmatch(layer)):
            if side in _GAINS:
                raise LoraError(
                    f"{path} is a DoRA or IA3 of a text encoder, which is not supported; give a plain LoRA."
                )
            number = encoder["number"] or encoder["kohyas"] or "1"
            part = "text_encoder" if number == "1" else f"text_encoder_{number}"
            encoders.setdefault((part, encoder["layer"]), {})[side] = tensor
            continue
        if match is None or name is None:
            others[layer] = (
                "text-encoder" if _TEXT_LAYER.match(layer) or layer.startswith("text_encoders.") else "other"
            )
            continue
        parts = layers.setdefault(name, {})
        if side in parts:
            raise LoraError(f"{path} has layer {name} twice, {key!r} being the second; give a file with a single LoRA.")
        parts[side] = tensor
    return layers, Counter(others.values()), encoders


def _side(match: re.Match[str]) -> str:
    groups = match.groupdict()
    return groups.get("ia3") or groups.get("dora") or _SIDES.get(groups["side"], groups["side"])


def _gain(path: Path, name: str, parts: _Parts) -> tuple[str, Tensor] | None:
    """What in a layer's parts goes by the model's own weights."""
    for kind in parts.keys() & _GAINS:
        gain = parts[kind]
        fits = gain.is_floating_point() and gain.ndim and 0 < gain.numel() == max(gain.shape)
        if not fits or not gain.isfinite().all():
            shape = tuple(gain.shape)
            raise LoraError(
                f"{path} has a {gain.dtype} tensor of shape {shape}, or NaN, in layer {name}; get it again."
            )
        return kind, gain.detach().to(torch.float32)
    return None


def _network_path(layer: str) -> str | None:
    """The module path inside the U-Net or transformer of a layer as a file names it; None for a layer of another network."""
    name = re.sub(r"^(base_model\.model\.)?(unet\.|transformer\.)?(model\.)?", "", layer)
    name, named = name.removeprefix("diffusion_model."), re.search(r"\b(diffusion_model|unet)\.", layer)
    if named and name.split(".")[0] in _SGM_PARTS:
        name = "lora_unet_" + name.replace(".", "_")
    if name.startswith(("lora_unet_", "lora_transformer_")):
        name = with_dots(_from_sgm(re.sub("^lora_(unet|transformer)_", "", name)))
    name = name.replace(".processor.", ".")
    if name.endswith(".to_out") and not name.startswith("single_transformer_blocks"):  # there a layer of its own
        # Older diffusers name the layer by its list, [Linear, Dropout].
        name += ".0"
    return name if name.split(".")[0] in _UNET_PARTS | _TRANSFORMER_PARTS else None


def _from_sgm(name: str) -> str:
    """A block of Stability's code by diffusers' name; two layers a block, as Stable Diffusion 1, 2 and XL have them."""
    match = _SGM_BLOCK.fullmatch(name)
    if match is None:
        return _SGM_ENDS.get(name, name)
    part, rest = int(match["part"]), match["rest"]
    if match["side"] is None:  # residual block, attention, residual block
        kind = f"attentions_0_{rest}" if part == 1 else f"resnets_{part // 2}_{_SGM_RESNET.get(rest, rest)}"
        return f"mid_block_{kind}"
    block, layer = divmod(int(match["block"]) - (match["side"] == "input"), 3)
    side = "down" if match["side"] == "input" else "up"
    if rest in ("op", "conv"):
        return f"{side}_blocks_{block}_{side}samplers_0_conv"
    kind = f"attentions_{layer}_{rest}" if part == 1 else f"resnets_{layer}_{_SGM_RESNET.get(rest, rest)}"
    return f"{side}_blocks_{block}_{kind}"
