"""What a LoRA file says of one layer as two factors, `up @ down`: LoRA itself, LoHa, LoKr and whole differences of weights.

All are exact. A LoHa of rank r becomes factors of rank r^2, a LoKr those of the product of its parts' ranks; where that would
be more than the layer itself, and for whole differences, one factor is the identity.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LoraError

#: A tensor of LyCORIS' kinds, by any trainer's and PEFT's names.
_PART = re.compile(
    r"(?P<layer>.+)\.(?P<part>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|diff)(?:\.(?!weight)[^.]+)?(?:\.weight)?"
)
#: A layer of so many weights is larger than any model's; a few bytes can declare one.
_MOST = 2**28

Scale = Callable[[str, int], float]


def is_part(key: str) -> bool:
    """It is a tensor that `with_factors` turns into factors."""
    return _PART.fullmatch(key) is not None


def with_factors(path: object, tensors: Mapping[str, Tensor], scale_of: Scale) -> dict[str, Tensor]:
    """The tensors, those of LoHa, LoKr and whole differences as kohya's `lora_down`, `lora_up` and `alpha`; others stay.

    Formulas: those of PEFT's `get_delta_weight`. A convolution's kernel may lie flat in `lora_down`, (r, in x h x w), where the
    file does not say its sides. Raises `LoraError` for what is inconsistent.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in tensors.items():
        match = _PART.fullmatch(key)
        # Differences of norms, one number a channel, can be no factors: a file in which they matter is refused.
        if match and match["part"] == "diff" and tensor.ndim < 2:
            if tensor.count_nonzero():
                raise LoraError(f"{path} changes {match['layer']}, which is no matrix; give a LoRA of matrices alone.")
        elif match:
            layers.setdefault(match["layer"], {})[match["part"]] = tensor
        else:
            rest[key] = tensor
    for layer, parts in layers.items():
        alpha = rest.pop(f"{layer}.alpha", None)
        if f"{layer}.lora_down.weight" in rest:
            raise LoraError(f"{path} has layer {layer} twice; give a file with a single LoRA.")
        if alpha is not None and alpha.numel() != 1:
            raise LoraError(f"{path} has an alpha of shape {tuple(alpha.shape)} in layer {layer}; give a plain LoRA.")
        for tensor in parts.values():
            _check_dense(path, layer, tensor)
        exact = {part: tensor.detach().to(torch.float32) for part, tensor in parts.items()}
        try:
            down, up, rank = _factors(exact)
        except (KeyError, RuntimeError, IndexError, ValueError) as error:
            raise LoraError(
                f"{path} has parts that do not fit in layer {layer}; the file is damaged, get it again."
            ) from error
        if rank is None:  # whole matrices have no rank, so an alpha means nothing; PEFT's own file has both
            scale = 1.0 if alpha is not None or "diff" in parts else scale_of(layer, 0)
        else:
            scale = scale_of(layer, rank) if alpha is None else float(alpha) / rank
        rest[f"{layer}.lora_down.weight"] = down
        rest[f"{layer}.lora_up.weight"] = (up * scale)[(...,) + (None,) * (down.ndim - 2)]
        rest[f"{layer}.alpha"] = torch.tensor(
            float(len(down)), dtype=torch.float32, device="cpu"
        )  # scale 1: it is in the factor
    return rest


def _factors(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int | None]:
    """(r, in ...), (out, r), and the rank that an alpha is divided by, if there is one."""
    if "diff" in parts:
        return *_of_whole(parts["diff"]), None
    if "hada_w1_a" in parts:
        rank = parts["hada_w1_b"].shape[0]
        if "hada_t1" in parts:
            one, two = (_tucker(parts[f"hada_t{k}"], parts[f"hada_w{k}_a"], parts[f"hada_w{k}_b"]) for k in "12")
            return *_of_whole(one * two), rank
        (up_1, down_1), (up_2, down_2) = ((parts[f"hada_w{k}_a"], parts[f"hada_w{k}_b"].flatten(1)) for k in "12")
        if up_1.shape[1] * up_2.shape[1] >= min(len(up_1), down_1.shape[1]):
            _check_size(len(up_1), down_1.shape[1])
            return *_of_whole((up_1 @ down_1) * (up_2 @ down_2)), rank
        # (U1 D1) * (U2 D2), element by element, is one product of every column of U1 with every column of U2.
        up = torch.einsum("or,os->ors", up_1, up_2).flatten(1)
        return torch.einsum("ri,si->rsi", down_1, down_2).flatten(0, 1), up, rank
    ranks = [len(parts[f"lokr_w{k}_b"]) for k in "12" if f"lokr_w{k}_b" in parts]
    down_1, up_1 = _of_whole(parts["lokr_w1"]) if "lokr_w1" in parts else (parts["lokr_w1_b"], parts["lokr_w1_a"])
    if "lokr_w2" in parts:
        down_2, up_2 = _of_whole(parts["lokr_w2"])
    elif "lokr_t2" in parts:
        down_2, up_2 = _of_whole(_tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"]))
    else:
        down_2, up_2 = parts["lokr_w2_b"], parts["lokr_w2_a"]
    kernel = down_2.shape[2:]
    outputs, inputs = len(up_1) * len(up_2), down_1.shape[1] * down_2.flatten(1).shape[1]
    rank = len(down_1) * len(down_2)
    _check_size(rank, inputs)
    _check_size(outputs, rank)
    # The Kronecker product of two products is the product of their Kronecker products.
    down = torch.kron(down_1, down_2.flatten(1)).reshape(rank, -1, *kernel)
    return down, torch.kron(up_1, up_2), (ranks[-1] if ranks else None)


def _of_whole(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of which one is the identity."""
    flat = weight.flatten(1)
    if len(flat) <= flat.shape[1]:
        return weight, torch.eye(len(flat), dtype=torch.float32, device="cpu")
    return torch.eye(flat.shape[1], dtype=torch.float32, device="cpu").reshape(flat.shape[1], *weight.shape[1:]), flat


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A convolution's weights, (out, in, h, w), of a core (r, r, h, w) and (r, out), (r, in)."""
    _check_size(a.shape[1], b.shape[1] * core.shape[2] * core.shape[3])
    return torch.einsum("ijhw,jc,io->ochw", core, b, a).contiguous()


def _check_size(rows: int, columns: int) -> None:
    if rows * columns > _MOST:
        raise ValueError(f"{rows} x {columns}")


def pair(path: object, name: str, parts: Mapping[str, Tensor], scale_of: Scale) -> tuple[Tensor, Tensor]:
    """One layer's (r, in), or (r, in, h, w) of a convolution, and (out, r) in float32, checked; the scale is in the second.

    parts: "down", "up", and "mid" and "alpha" where there are such.
    """
    for side in ("down", "up"):
        if side not in parts:
            raise LoraError(f"{path} lacks the {side} matrix of layer {name}; the file is incomplete, get it again.")
    down, up = _matrix(path, name, parts["down"]), _matrix(path, name, parts["up"])
    rank = down.shape[0]
    if "mid" in parts:  # LyCORIS' convolution in three factors, the outer ones 1 x 1
        mid = _matrix(path, name, parts["mid"])
        if down.ndim > 2 or mid.shape[1] != rank:
            raise LoraError(f"{path} has factors that do not fit in layer {name}; the file is damaged, get it again.")
        down = torch.tensordot(mid, down, dims=([1], [0])).movedim(-1, 1).contiguous()  # (r, in, h, w)
        rank = down.shape[0]
    if up.ndim > 2:
        raise LoraError(f"{path} has a convolution as the second factor of layer {name}; give a plain LoRA.")
    if up.shape[1] != rank:
        raise LoraError(f"{path} has rank {rank} and {up.shape[1]} in layer {name}; the file is damaged, get it again.")
    alpha = parts.get("alpha")  # kohya's, one per layer
    if alpha is not None and alpha.numel() != 1:
        raise LoraError(f"{path} has an alpha of shape {tuple(alpha.shape)} in layer {name}; give a plain LoRA.")
    up = up * (scale_of(name, rank) if alpha is None else float(alpha) / rank)
    if not (down.isfinite().all() and up.isfinite().all()):
        raise LoraError(f"{path} has NaN or infinite numbers in layer {name}; fit it again with a lower learning rate.")
    return down, up


def _matrix(path: object, name: str, tensor: Tensor) -> Tensor:
    """A matrix, also one written as a 1 x 1 convolution; or the kernels of a convolution, (r, in, h, w)."""
    _check_dense(path, name, tensor)
    tensor = tensor.detach().to(torch.float32)
    return (tensor if any(size > 1 for size in tensor.shape[2:]) else tensor.flatten(1)).contiguous()


def _check_dense(path: object, name: str, tensor: Tensor) -> None:
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.is_floating_point()
    if not dense or tensor.ndim not in (2, 4) or not tensor.numel():
        shape = tuple(tensor.shape)
        raise LoraError(f"{path} has a {tensor.dtype} tensor of shape {shape} in layer {name}; give a plain LoRA.")


def peft_scale(path: Path, header: Mapping[str, str], keys: Iterable[str], part: str = "unet|transformer") -> Scale:
    """A layer's alpha / rank (alpha / sqrt(rank) for rsLoRA) by its name and rank; 1 where the file says nothing.

    The alphas are in the header as diffusers writes it, for each part of a pipeline, or in PEFT's own file beside.
    """
    text = header.get("lora_adapter_metadata")
    beside = path.with_name("adapter_config.json")
    try:
        if text is None and any(key.startswith("base_model.model.") for key in keys):
            if beside.exists():
                text = beside.read_text("utf-8")
            else:
                warnings.warn(f"{path}: no {beside.name} beside it, so the LoRA's scale is taken as 1.", stacklevel=3)
        config = {re.sub(rf"^({part})\.", "", key): value for key, value in json.loads(text or "{}").items()}
        alphas = {re.compile(rf"(.*\.)?({key})$"): float(a) for key, a in (config.get("alpha_pattern") or {}).items()}
        default = next((float(config[key]) for key in ("lora_alpha", "alpha") if key in config), None)
        own_rank = int(config.get("r") or 1)
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError, re.error) as error:
        raise LoraError(f"The LoRA settings of {path} cannot be read ({error}); get its files again.") from error

    def scale(name: str, rank: int) -> float:
        alpha = next((alpha for pattern, alpha in alphas.items() if pattern.match(name)), default)
        rank = rank or own_rank  # 0: of whole matrices
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale
