"""LoRA files: written in diffusers' own layout, read from every layout in use.

Reads, recognised by content and never by suffix:

- this project's safetensors and diffusers': `unet.<path>.lora.down.weight`, older
  `unet.<path>.processor.to_q_lora.down.weight`, with the alpha of `lora_adapter_metadata` in the header;
- PEFT's: `<path>.lora_A.weight`, `base_model.model.<path>.lora_A.default.weight`, with the alpha of the
  `adapter_config.json` beside it;
- kohya's: `lora_unet_<path with underscores>.lora_down.weight`, with `.alpha` tensors;
- torch checkpoints (zip or old pickle) with any of these keys, such as the published DiffMorpher's `.ckpt`; pickled
  code is never run.

A LoRA is not checked against a U-Net here; the bank that uses it does that.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import LoraError, OutputError
from .atomic import replacing

_METADATA_PREFIX = "diffmorpher."

# "<layer>.lora_A.weight", ".lora_A.default.weight", ".lora.down.weight", "_lora.down.weight", ".lora_down.weight" and,
# in text encoders, ".lora_linear_layer.down.weight"; "mid" is the middle of a three-factor convolution.
_WEIGHT_KEY = re.compile(r"(?P<layer>.+?)[._]lora(?:_linear_layer)?[._](?P<side>A|B|down|up|mid)(?:\.[^.]+)?\.weight")
_ALPHA_KEY = re.compile(r"(?P<layer>.+)\.(?P<side>alpha)")
_SIDES = {"A": "down", "B": "up"}

# Parts of a file that change what its LoRA means, so that leaving them out would give another result.
_UNSUPPORTED = {
    "LoHa": re.compile(r"\.hada_"),
    "LoKr": re.compile(r"\.lokr_"),
    "DoRA": re.compile(r"\.dora_scale$|\.lora_magnitude_vector\b"),
    "OFT": re.compile(r"\.oft_"),
    "LoRA with a bias": re.compile(r"\blora_B\b.*\.bias$"),
}

_TRANSFORMER_PARTS = {"transformer_blocks", "single_transformer_blocks"}
_UNET_PARTS = {"conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks", "conv_out"}
# The underscores that belong to a U-Net's module names; kohya writes every other "." of a path as "_".
_WORDS = (
    "conv_in", "time_embedding", "add_embedding", "linear_1", "linear_2", "down_blocks", "mid_block", "up_blocks",
    "conv_out", "transformer_blocks", "to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out", "time_emb_proj",
    "conv_shortcut",
)  # fmt: skip
_TEXT_ENCODERS = ("text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "lora_te2_")
# Stability's own block names, in kohya's files for SDXL: a block's part 0 is a residual block, part 1 attention.
_SGM_BLOCK = re.compile(r"(?:(?P<side>input|output)_blocks_(?P<block>\d+)|middle_block)_(?P<part>\d+)_(?P<rest>.+)")
_SGM_RESNET = {
    "in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """One image's LoRA: the layer at `name` adds `up[name] @ down[name] @ x`.

    down: module path inside the U-Net (such as "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q" or
        "...attn1.to_out.0") -> (r, in), float32, CPU.
    up: the same names -> (out, r), float32, CPU; any scale (alpha / rank) is folded in.
    metadata: "prompt", "model", "rank", "image_hash", "seed", "start", where known; empty for files made elsewhere.
    """

    down: dict[str, Tensor]
    up: dict[str, Tensor]
    metadata: dict[str, str]


def save_lora(lora: Lora, path: str | os.PathLike[str]) -> Path:
    """Write `lora` as float32 safetensors that `pipe.load_lora_weights(path)` of any diffusers pipeline loads.

    The file appears whole or not at all, parent folders are made, and equal LoRAs give equal bytes. No alpha is
    written, which means scale 1 in diffusers and PEFT. The metadata goes to the header as "diffmorpher.prompt" and so
    on. Raises `OutputError` if the file cannot be written.
    Layout: diffusers `StableDiffusionLoraLoaderMixin.save_lora_weights`.
    """
    path = Path(path)
    tensors = {}
    transformer = any(name.split(".")[0] in _TRANSFORMER_PARTS for name in lora.down)
    names = (
        ("transformer.{}.lora_A", "transformer.{}.lora_B") if transformer else ("unet.{}.lora.down", "unet.{}.lora.up")
    )
    for form, matrices in zip(names, (lora.down, lora.up), strict=True):
        for name, matrix in matrices.items():
            # A copy, since safetensors refuses tensors that share memory, as slices of a bank or a common start do.
            copy = matrix.detach().to("cpu", torch.float32, copy=True)
            tensors[f"{form.format(name)}.weight"] = copy.contiguous()
    header = {"format": "pt"} | {_METADATA_PREFIX + key: value for key, value in lora.metadata.items()}
    content = _with_sorted_header(save(tensors, header))
    try:
        with replacing(path) as part:
            part.write_bytes(content)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"The LoRA cannot be written to {path} ({reason}); choose another place.") from error
    return path


def load_lora(path: str | os.PathLike[str]) -> Lora:
    """Read the U-Net's linear layers from a LoRA file (layouts: see the module), without running pickled code.

    Text-encoder layers, convolutions wider than 1x1 and other networks are skipped, with one warning that counts them.
    Raises `LoraError` if the file is missing, damaged, unsafe, no LoRA, of an unsupported kind (LoHa, LoKr, DoRA, OFT) or
    inconsistent (a matrix without its partner, ranks that differ, NaN or infinite numbers).
    """
    path = Path(path)
    tensors, header = _read(path)
    layers, skipped = _group(path, tensors)
    scale = _peft_scale(path, header, tensors)
    down: dict[str, Tensor] = {}
    up: dict[str, Tensor] = {}
    for name, parts in sorted(layers.items()):
        if _is_convolution(parts):
            skipped["convolution"] += 1
        else:
            down[name], up[name] = _pair(path, name, parts, scale)
    if not down:
        raise LoraError(f"{path} holds no LoRA for a U-Net's linear layers; give one made for Stable Diffusion.")
    if skipped:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
        warnings.warn(f"{path}: LoRA layers skipped: {counts}; only a U-Net's linear layers are used.", stacklevel=2)
    metadata = {k.removeprefix(_METADATA_PREFIX): v for k, v in header.items() if k.startswith(_METADATA_PREFIX)}
    return Lora(down, up, metadata)


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
    if not any(_WEIGHT_KEY.fullmatch(key) for key in keys):
        first = f"its first tensor is {min(keys)!r}" if keys else "it holds no tensors"
        raise LoraError(f"{path} holds no LoRA weights ({first}; is it a whole model?); give a LoRA file.")


def _group(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], Counter[str]]:
    """U-Net layers as {module path: {"down" | "up" | "mid" | "alpha": tensor}}, and the number of others by kind."""
    layers: dict[str, dict[str, Tensor]] = {}
    others: dict[str, str] = {}
    for key, tensor in tensors.items():
        match = _WEIGHT_KEY.fullmatch(key) or _ALPHA_KEY.fullmatch(key)
        layer = match["layer"] if match else key
        name = _unet_path(layer)
        if match is None or name is None:
            others[layer] = "text-encoder" if layer.startswith(_TEXT_ENCODERS) else "other"
            continue
        side = _SIDES.get(match["side"], match["side"])
        parts = layers.setdefault(name, {})
        if side in parts:
            raise LoraError(f"{path} has layer {name} twice, {key!r} being the second; give a file with a single LoRA.")
        parts[side] = tensor
    return layers, Counter(others.values())


def _unet_path(layer: str) -> str | None:
    """The module path inside the U-Net of a layer as a file names it; None for a layer of another network."""
    name = layer.removeprefix("base_model.model.").removeprefix("unet.").removeprefix("transformer.")
    if name.startswith("lora_unet_"):
        name = _from_sgm(name.removeprefix("lora_unet_")).replace("_", ".")
        for word in _WORDS:
            name = name.replace(word.replace("_", "."), word)
    name = name.replace(".processor.", ".")
    if name.endswith(".to_out"):  # older diffusers name the layer by its list, [Linear, Dropout]
        name += ".0"
    return name if name.split(".")[0] in _UNET_PARTS | _TRANSFORMER_PARTS else None


def _from_sgm(name: str) -> str:
    """A block of Stability's code by diffusers' name; two layers a block, as Stable Diffusion 1, 2 and XL have them."""
    match = _SGM_BLOCK.fullmatch(name)
    if match is None:
        return name
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


def _peft_scale(path: Path, header: Mapping[str, str], keys: Iterable[str]) -> Callable[[str, int], float]:
    """A layer's alpha / rank (alpha / sqrt(rank) for rsLoRA) by its name and rank; 1 where the file says nothing.

    The alphas are in the header as diffusers writes it, or in PEFT's own file beside.
    """
    text = header.get("lora_adapter_metadata")
    beside = path.with_name("adapter_config.json")
    try:
        if text is None and any(key.startswith("base_model.model.") for key in keys):
            if beside.exists():
                text = beside.read_text("utf-8")
            else:
                warnings.warn(f"{path}: no {beside.name} beside it, so the LoRA's scale is taken as 1.", stacklevel=3)
        config = {key.removeprefix("unet."): value for key, value in json.loads(text or "{}").items()}
        alphas = {re.compile(rf"(.*\.)?({key})$"): float(a) for key, a in (config.get("alpha_pattern") or {}).items()}
        default = float(config["lora_alpha"]) if "lora_alpha" in config else None
    except (OSError, ValueError, TypeError, AttributeError, re.error) as error:
        raise LoraError(f"The LoRA settings of {path} cannot be read ({error}); get its files again.") from error

    def scale(name: str, rank: int) -> float:
        alpha = next((alpha for pattern, alpha in alphas.items() if pattern.match(name)), default)
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale


def _is_convolution(parts: Mapping[str, Tensor]) -> bool:
    """Whether a kernel is larger than 1; a kernel of 1 is a linear layer written as a convolution."""
    return any(size > 1 for tensor in parts.values() for size in tensor.shape[2:])


def _pair(
    path: Path, name: str, parts: Mapping[str, Tensor], peft_scale: Callable[[str, int], float]
) -> tuple[Tensor, Tensor]:
    """One layer's (r, in) and (out, r) in float32, checked, with the scale folded into the second."""
    for side in ("down", "up"):
        if side not in parts:
            raise LoraError(f"{path} lacks the {side} matrix of layer {name}; the file is incomplete, get it again.")
    down, up = (_matrix(path, name, parts[side]) for side in ("down", "up"))
    rank = down.shape[0]
    if up.shape[1] != rank:
        raise LoraError(f"{path} has rank {rank} and {up.shape[1]} in layer {name}; the file is damaged, get it again.")
    alpha = parts.get("alpha")  # kohya's, one per layer
    if alpha is not None and alpha.numel() != 1:
        raise LoraError(f"{path} has an alpha of shape {tuple(alpha.shape)} in layer {name}; give a plain LoRA.")
    up = up * (peft_scale(name, rank) if alpha is None else float(alpha) / rank)
    if not (down.isfinite().all() and up.isfinite().all()):
        raise LoraError(f"{path} has NaN or infinite numbers in layer {name}; fit it again with a lower learning rate.")
    return down, up


def _matrix(path: Path, name: str, tensor: Tensor) -> Tensor:
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.is_floating_point()
    if not dense or tensor.ndim < 2 or not tensor.numel():
        shape = tuple(tensor.shape)
        raise LoraError(f"{path} has a {tensor.dtype} tensor of shape {shape} in layer {name}; give a plain LoRA.")
    return tensor.detach().flatten(1).to(torch.float32).contiguous()
