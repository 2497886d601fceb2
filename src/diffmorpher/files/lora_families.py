"""LoRAs under other names than diffusers', by these: without dots, or the first code's; and which family a LoRA is for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

#: A key of kohya's, ComfyUI's or PEFT's files for a model's first code, such as
#: "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight" and "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight".
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?:lora_unet_|(?:model\.)?diffusion_model\.)?(?P<layer>.+?)"
    r"\.(?:lora[_.](?P<side>down|up|A|B)(?:\.[^.]+)?\.weight|alpha)"
)
_SIDES = {"A": "down", "B": "up"}
_ENDS = {"down": "lora_A.weight", "up": "lora_B.weight", "alpha": "alpha"}

#: What is fused in an attention layer of the first code, by diffusers' names of its equal parts.
_PICTURE = ("attn.to_q", "attn.to_k", "attn.to_v")
_TEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

_FLUX_BLOCK = re.compile(r"(?P<kind>double|single)_blocks_(?P<block>\d+)_(?P<layer>.+)")
_FLUX = re.compile(rf"{_FLUX_BLOCK.pattern}|(img|txt)_in|(time|vector|guidance)_in_.+|final_layer_.+")
#: XLabs' names of FLUX.1's attention, which diffusers knows.
_XLABS = re.compile(
    r"(diffusion_model\.)?(double|single)_blocks\.\d+\.processor\.(proj|qkv)_lora[12]?\.(down|up)\.weight"
)
_FLUX2_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in_in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "single_stream_modulation_lin": "single_stream_modulation.linear",
    "double_stream_modulation_img_lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt_lin": "double_stream_modulation_txt.linear",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}
_FLUX2_LAYERS: dict[str, dict[str, tuple[str, ...]]] = {
    "double": {
        "img_attn_qkv": _PICTURE,
        "img_attn_proj": ("attn.to_out.0",),
        "img_mlp_0": ("ff.linear_in",),
        "img_mlp_2": ("ff.linear_out",),
        "txt_attn_qkv": _TEXT,
        "txt_attn_proj": ("attn.to_add_out",),
        "txt_mlp_0": ("ff_context.linear_in",),
        "txt_mlp_2": ("ff_context.linear_out",),
    },
    "single": {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
}
#: By what FLUX.2's layers differ from FLUX.1's of the same name: how many times as many outputs as inputs, or the other way.
_FLUX2_WIDTHS = {"linear1": (9, 1), "linear2": (1, 4), "_mlp_0": (6, 1), "_mlp_2": (1, 3)}

_SD3 = re.compile(r"joint_blocks_(?P<block>\d+)_(?P<stream>x|context)_block_(?P<layer>.+)")
_SD3_LAYERS: dict[str, dict[str, tuple[str, ...]]] = {
    "x": {
        "attn_qkv": _PICTURE,
        "attn_proj": ("attn.to_out.0",),
        "attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "attn2_proj": ("attn2.to_out.0",),
        "mlp_fc1": ("ff.net.0.proj",),
        "mlp_fc2": ("ff.net.2",),
        "adaLN_modulation_1": ("norm1.linear",),
    },
    "context": {
        "attn_qkv": _TEXT,
        "attn_proj": ("attn.to_add_out",),
        "mlp_fc1": ("ff_context.net.0.proj",),
        "mlp_fc2": ("ff_context.net.2",),
        "adaLN_modulation_1": ("norm1_context.linear",),
    },
}

_Z_IMAGE = re.compile(r"(?P<blocks>layers|noise_refiner|context_refiner)_(?P<block>\d+)_attention_(?P<layer>qkv|out)")
#: The only ends that diffusers calls otherwise; "2-1" is for 2 x 2 latents of one frame.
_Z_IMAGE_ENDS = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer_linear": "all_final_layer.2-1.linear",
    "final_layer_adaLN_modulation_1": "all_final_layer.2-1.adaLN_modulation.1",
}
_Z_IMAGE_BLOCK = re.compile(r"(layers|noise_refiner|context_refiner)_\d+_(attention|feed_forward|adaLN_modulation)_")


# The underscores that belong to module names of U-Nets and transformers; kohya writes every other "." of a path as "_".
_WORDS = (
    "conv_in", "time_embedding", "add_embedding", "linear_1", "linear_2", "down_blocks", "mid_block", "up_blocks",
    "conv_out", "single_transformer_blocks", "transformer_blocks", "to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out",
    "time_emb_proj", "conv_shortcut", "x_embedder", "context_embedder", "time_text_embed", "text_embedder",
    "to_qkv_mlp_proj", "linear_in", "linear_out", "time_guidance_embed", "double_stream_modulation_img",
    "double_stream_modulation_txt", "single_stream_modulation",
    "noise_refiner", "context_refiner", "feed_forward", "adaLN_modulation", "t_embedder", "cap_embedder", "all_x_embedder",
    "all_final_layer", "img_in", "txt_in", "img_mlp", "txt_mlp", "img_mod", "txt_mod",
    "timestep_embedder", "guidance_embedder", "pos_embed", "norm_out", "norm1_context", "ff_context", "proj_mlp",
    "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip
#: Any of the words with its underscores written as dots, the longest that stands there.
_WORD = re.compile(
    rf"(?<![^.])({'|'.join(re.escape(word.replace('_', '.')) for word in sorted(_WORDS, key=len, reverse=True))})(?![^.])"
)


def with_dots(name: str) -> str:
    """A module path that was written without its dots."""
    return _WORD.sub(lambda word: word[0].replace(".", "_"), name.replace("_", "."))


def with_diffusers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those under the first code's names of FLUX.1, FLUX.2, Stable Diffusion 3 and Z-Image by diffusers' names;
    others stay as they are. (Qwen-Image's first code is diffusers' own.)

    Raises `ValueError` for what has FLUX.1's names and is no LoRA for it.
    """
    xlabs = {key: tensor.float() for key, tensor in tensors.items() if _XLABS.fullmatch(key)}
    tensors = {key: tensor for key, tensor in tensors.items() if key not in xlabs}
    read = {key: match for key in tensors if (match := _KEY.fullmatch(key))}
    layers = {key: match["layer"].replace(".", "_") for key, match in read.items()}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, layer in layers.items():
        side = read[key]["side"]
        parts.setdefault(layer, {})[_SIDES.get(side, side) or "alpha"] = tensors[key]
    renamed = _names(parts)
    is_flux = any(_FLUX_BLOCK.match(layer) for layer in parts) and not renamed
    named: dict[str, Tensor] = {}
    flux: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layer = layers.get(key, "")
        if is_flux and _FLUX.fullmatch(layer):
            # As kohya writes it, which is what diffusers knows best; in float32, as a scale is multiplied in.
            side = _SIDES.get(read[key]["side"], read[key]["side"])
            flux[f"lora_unet_{layer}.{f'lora_{side}.weight' if side else 'alpha'}"] = tensor.float()
        elif layer not in renamed:
            named[key] = tensor
    for layer, names in renamed.items():
        named |= _split(parts[layer], names)
    return named | _of_flux(flux) | _of_flux(xlabs)


def _names(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[str, ...]]:
    """Diffusers' names of the layers that each of these was made of, none where a file has these layers too.

    parts: layers by the first code's name with underscores. FLUX.1's are left out, as are those of diffusers' names.
    """
    flux2, z_image = any(_is_flux2(*layer) for layer in parts.items()), any(map(_Z_IMAGE_BLOCK.match, parts))
    found: dict[str, tuple[str, ...]] = {}
    for layer in parts:
        if block := _SD3.fullmatch(layer):
            names = _SD3_LAYERS[block["stream"]].get(block["layer"], ())
            found[layer] = tuple(f"transformer_blocks.{block['block']}.{name}" for name in names)
        elif block := _Z_IMAGE.fullmatch(layer):
            ends = ("to_q", "to_k", "to_v") if block["layer"] == "qkv" else ("to_out.0",)
            names = tuple(f"{block['blocks']}.{block['block']}.attention.{end}" for end in ends)
            written_out = all(name.replace(".", "_") in parts for name in names)  # some trainers write both
            found[layer] = () if written_out else names
        elif z_image and layer in _Z_IMAGE_ENDS:
            found[layer] = (_Z_IMAGE_ENDS[layer],)
        elif flux2 and (block := _FLUX_BLOCK.fullmatch(layer)):
            names = _FLUX2_LAYERS[block["kind"]].get(block["layer"], ())
            blocks = {"double": "transformer_blocks", "single": "single_transformer_blocks"}[block["kind"]]
            found[layer] = tuple(f"{blocks}.{block['block']}.{name}" for name in names)
        elif flux2 and layer in _FLUX2_ENDS:
            found[layer] = (_FLUX2_ENDS[layer],)
    return {layer: names for layer, names in found.items() if names or _Z_IMAGE.fullmatch(layer)}


def _is_flux2(layer: str, matrices: Mapping[str, Tensor]) -> bool:
    """Whether a layer is one that FLUX.2 has and FLUX.1 has not, by its name or its widths."""
    if "_stream_modulation" in layer and layer in _FLUX2_ENDS:
        return True
    if not (_FLUX_BLOCK.fullmatch(layer) and {"down", "up"} <= matrices.keys()):
        return False
    into, out = matrices["down"].shape[-1], matrices["up"].shape[0]
    return any(layer.endswith(end) and a * into == b * out for end, (a, b) in _FLUX2_WIDTHS.items())


def _split(parts: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """A layer's matrices and alpha by the names of the layers that it was fused of, each of which has an equal part of it."""
    named = {f"{name}.{_ENDS[part]}": tensor for name in names for part, tensor in parts.items()}
    if "up" not in parts or not names:
        return named
    ups = list(parts["up"].tensor_split(len(names)))
    halves = "down" in parts and len(ups[0]) == 2 * parts["down"].shape[1]
    if names[0] == "norm_out.linear" or (halves and "norm1_context" in names[0]):
        ups = [ups[0].roll(len(ups[0]) // 2, 0)]  # the last one's shift and scale, which diffusers turns round
    return named | {f"{name}.{_ENDS['up']}": up for name, up in zip(names, ups, strict=True)}


def _of_flux(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What diffusers' pipeline makes of kohya's names; its converter knows single blocks of the published width alone."""
    if not tensors:
        return {}
    from diffusers import FluxPipeline

    try:
        return dict(FluxPipeline.lora_state_dict(tensors))
    except Exception as error:  # of many types, for what the converter does not expect
        reason = str(error).strip() or type(error).__name__
        raise ValueError(reason.splitlines()[0][:200].rstrip(" :.")) from error


#: Families that have no backbone here, by what is in the names of their layers, with dots or underscores.
_OTHERS = {
    "Wan": r"\bblocks[._]\d+[._](self|cross)_attn[._][qkvo]\b|_blocks_\d+_(self|cross)_attn_[qkvo]\b",
    "HiDream": r"double_stream_blocks[._]\d+",
}


def of_no_family_here(keys: Iterable[str]) -> str:
    """The family that is named by the keys of a LoRA for a network that no family here has; "" where they do not tell."""
    keys = list(keys)
    return next((family for family, pattern in _OTHERS.items() if any(re.search(pattern, key) for key in keys)), "")


def made_for(down: Mapping[str, Tensor]) -> str:
    """The family of models that a LoRA is for, by its layers' names in diffusers and their widths; "" where they do not tell.

    down: the first matrix of each layer, (r, in).
    """

    def some(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in down)

    def width(ends: str) -> int:
        return next((matrix.shape[1] for name, matrix in down.items() if name.endswith(ends)), 0)

    if some(r"^(down|mid|up)_block"):
        xl = width("attn2.to_k") == 2048 or some(r"transformer_blocks\.[1-9]")  # 1.x and 2.x have one in each place
        return "Stable Diffusion XL" if xl else "Stable Diffusion 1.x or 2.x"
    if some(r"\.to_qkv_mlp_proj$|^single_transformer_blocks\.\d+\.attn\.to_out$|\.ff(_context)?\.linear_(in|out)$"):
        dev = 6144 in (width(".attn.to_qkv_mlp_proj"), width(".attn.to_q"), width(".ff.linear_in"))
        return "FLUX.2" if dev else "FLUX.2 Klein"
    if some(r"^single_transformer_blocks\."):
        return "FLUX.1"
    if some(r"^(layers|noise_refiner|context_refiner|all_x_embedder|all_final_layer)\."):
        return "Z-Image"
    if some(r"^transformer_blocks\.\d+\.attn1\."):
        return "LTX-Video or PixArt"
    if some(r"^transformer_blocks\."):
        if some(r"\.(img|txt)_m(lp|od)\."):
            return "Qwen-Image"
        if some(r"\.attn2\.") or width(".attn.to_q") in (1536, 2432):
            return "Stable Diffusion 3"
        if width(".attn.to_q") in (4096, 6144):
            return "FLUX.2 Klein" if width(".attn.to_q") == 4096 else "FLUX.2"
        if width(".attn.to_q") == 3072:
            return "Qwen-Image" if some(r"^transformer_blocks\.(19|[2-5]\d)\.") else "FLUX.1"
    return ""
