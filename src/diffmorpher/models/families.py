"""Families of models as single files: known by their keys and the shapes of what these name. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Keys of a file, and the shapes of what they name.
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Family:
    """A kind of file, as far as loading it goes.

    name: for people. pipeline: its class in diffusers. config: the bundled folder that describes it, with `config_v` where a
    file that predicts v has another one; without it a folder beside the file must. network: the class of its transformer, to
    be loaded alone where the file holds no text encoder. instead: what to take in its place, for one that cannot be used.
    """

    name: str
    pipeline: str = ""
    config: str = ""
    config_v: str = ""
    network: str = ""
    instead: str = ""


_BASE = "take the text-to-image model that it was made from"
_FEW_STEPS = "it is distilled to a few steps, from which no way leads back to noise: take"
_SD, _SD3, _SD3_NETWORK = "StableDiffusionPipeline", "StableDiffusion3Pipeline", "SD3Transformer2DModel"

#: Every family that is recognised. One that gets a backbone gets its pipeline here.
FAMILIES: dict[str, Family] = {
    "sd1": Family("Stable Diffusion 1.x", _SD, "sd1"),
    "sd2": Family("Stable Diffusion 2.x", _SD, "sd2-base", "sd2-v"),
    "sdxl": Family("Stable Diffusion XL", "StableDiffusionXLPipeline", "sdxl"),
    "sdxl-refiner": Family("Stable Diffusion XL's refiner", instead="take the base model, which needs no refiner here"),
    "sd3": Family("Stable Diffusion 3 medium", _SD3, network=_SD3_NETWORK),
    "sd3.5-medium": Family("Stable Diffusion 3.5 medium", _SD3, network=_SD3_NETWORK),
    "sd3.5-large": Family("Stable Diffusion 3.5 large", _SD3, network=_SD3_NETWORK),
    "flux": Family("FLUX.1 dev", "FluxPipeline", network="FluxTransformer2DModel"),
    "flux-schnell": Family("FLUX.1 schnell", instead=f"{_FEW_STEPS} FLUX.1 dev"),
    "flux-fill": Family("FLUX.1 Fill, for inpainting", instead="take FLUX.1 dev"),
    "flux-control": Family("FLUX.1 Depth or Canny", instead="take FLUX.1 dev"),
    "flux2": Family("FLUX.2 dev", instead="take FLUX.2 Klein base"),
    "flux2-klein": Family("FLUX.2 Klein", "Flux2KleinPipeline", network="Flux2Transformer2DModel"),
    "z-image": Family("Z-Image", "ZImagePipeline", network="ZImageTransformer2DModel"),
    "qwen-image": Family("Qwen-Image", "QwenImagePipeline", network="QwenImageTransformer2DModel"),
    "lora": Family(
        "a LoRA",
        instead="name the model that it was made for with --model, and this file with --lora, once for each picture",
    ),
    "controlnet": Family("a ControlNet", instead="take the text-to-image model that it was made for"),
    "vae": Family("an autoencoder (VAE) alone", instead="take a whole model, and this file with --vae"),
    "text-encoder": Family("a text encoder alone", instead="take a whole model"),
    "diffusers": Family(
        "one network of a model in the diffusers layout", instead="take the folder that holds its model_index.json"
    ),
    "unknown": Family(
        "no model of a family that is known here",
        instead="take one of Stable Diffusion 1.x, 2.x, XL or 3.x, FLUX, Z-Image or Qwen-Image",
    ),
}

#: Models that edit pictures with the layers of one that makes them: a pattern of their names, that one, and what they are.
_EDITING = (
    (r"kontext", "flux", Family("FLUX.1 Kontext, which edits pictures", instead="take FLUX.1 dev")),
    (
        r"qwen[-_ ]?image[-_ ]?edit",
        "qwen-image",
        Family("Qwen-Image-Edit, which edits pictures", instead="take Qwen-Image"),
    ),
)

#: What U-Nets other than text-to-image ones take beside the noisy latents, by their input channels.
_EXTRA = {5: "with depth", 7: "for upscaling", 8: "for editing", 9: "for inpainting"}


def family(shapes: Shapes) -> Family:
    """The family of a file with these keys and shapes; `FAMILIES["unknown"]` for any other file."""
    shapes = {key.removeprefix("model.diffusion_model."): shape for key, shape in shapes.items()}

    def has(*keys: str) -> bool:
        return all(key in shapes for key in keys)

    def any_is(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in shapes)

    if any_is(r"lora_(down|up|A|B)\b|\.lora\.|lora_linear_layer|\.hada_w1|\.lokr_w[12]|\.oft_blocks"):
        return FAMILIES["lora"]
    if any_is(r"^control_model\.|^controlnet_|^input_hint_block\.|^control_all_x_embedder\."):
        return FAMILIES["controlnet"]
    if any_is(r"(^|\.)(scaled_fp8|scale_weight|weight_scale|comfy_quant|absmax)$"):
        return Family(
            "weights with scales of their own (scaled fp8, nf4), which are not read",
            instead="take the same model in bfloat16, float16 or plain fp8",
        )
    if has("input_blocks.0.0.weight"):
        return _unet(shapes)
    if has("joint_blocks.0.context_block.adaLN_modulation.1.bias"):
        large = has("joint_blocks.37.x_block.mlp.fc1.weight")
        both = has("joint_blocks.0.x_block.attn2.qkv.weight")  # 3.5 medium's second attention, of the picture alone
        return FAMILIES["sd3.5-large" if large else "sd3.5-medium" if both else "sd3"]
    if has("single_stream_modulation.lin.weight"):
        return FAMILIES["flux2" if has("guidance_in.in_layer.weight") else "flux2-klein"]
    if has("distilled_guidance_layer.in_proj.bias"):
        return Family("Chroma", instead="take FLUX.1 dev")
    if has("double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight"):
        made_for = {384: "flux-fill", 128: "flux-control"}.get(shapes["img_in.weight"][1])
        return FAMILIES[made_for or ("flux" if has("guidance_in.in_layer.weight") else "flux-schnell")]
    if has("x_embedder.weight", "cap_embedder.0.weight", "layers.0.adaLN_modulation.0.weight"):
        return FAMILIES["z-image"]
    if has("txt_norm.weight", "time_text_embed.addition_t_embedding.weight"):
        return Family("Qwen-Image-Layered", instead="take Qwen-Image")
    if has("txt_norm.weight", "transformer_blocks.0.img_mod.1.weight"):
        return FAMILIES["qwen-image"]
    if any_is(r"^(encoder\.)?(down_blocks|transformer_blocks|single_transformer_blocks)\.0\.|^all_x_embedder\."):
        return FAMILIES["diffusers"]
    if any_is(r"^(first_stage_model\.|vae\.)?decoder\.conv_in\.weight$"):
        return FAMILIES["vae"]
    if any_is(r"(^|\.)text_model\.|^shared\.weight$|resblocks\.0\.attn\.|^model\.layers\.0\.self_attn\."):
        return FAMILIES["text-encoder"]
    return FAMILIES["unknown"]


def for_editing(name: str, made_from: Family | None = None) -> Family | None:
    """The model that edits pictures which a file, a folder or a pipeline's class is named after; None for any other name.

    made_from: what the keys say, which are those of the model that it was made from; None where they are not known.
    """
    return next(
        (
            edits
            for pattern, base, edits in _EDITING
            if re.search(pattern, name.lower()) and made_from in (None, FAMILIES[base])
        ),
        None,
    )


def family_of_file(file: Path) -> Family:
    """The family of a .safetensors file by its header; `FAMILIES["unknown"]` for any other file."""
    from safetensors import safe_open

    try:
        with safe_open(file, "numpy") as opened:
            return family({key: opened.get_slice(key).get_shape() for key in opened.keys()})  # noqa: SIM118
    except Exception:  # loading says what is wrong with it
        return FAMILIES["unknown"]


def _unet(shapes: Shapes) -> Family:
    """The family of an original U-Net: by the width of the texts that it reads."""
    reads = next((s[1] for key, s in shapes.items() if re.match(r"input_blocks\..*\.attn2\.to_k\.weight", key)), 0)
    name = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner"}.get(reads, "unknown")
    found, channels = FAMILIES[name], shapes["input_blocks.0.0.weight"][1]
    full = {"sd1": "middle_block.1.norm.weight", "sdxl": "input_blocks.8.1.transformer_blocks.9.norm1.weight"}
    if any("time_stack" in key for key in shapes):
        return Family("a video model", instead="take a text-to-image model")
    if name in ("unknown", "sdxl-refiner"):
        return found
    if channels in _EXTRA:
        return Family(f"{found.name} {_EXTRA[channels]}", instead=_BASE)
    if channels != 4:
        return FAMILIES["unknown"]
    if name == "sd2" and "label_emb.0.0.weight" in shapes:
        return Family(f"{found.name} that starts from pictures (unCLIP)", instead=_BASE)
    if "time_embed.cond_proj.weight" in shapes:
        return Family(f"{found.name} as a consistency model (LCM)", instead=f"{_FEW_STEPS} the model it was made from")
    if "edm_mean" in shapes or "edm_vpred.sigma_max" in shapes:
        return Family(f"{found.name} with EDM's noise levels", instead="take a model with Stable Diffusion's own")
    if full.get(name, "input_blocks.0.0.weight") not in shapes:
        return Family(f"{found.name}, cut down", found.pipeline)
    return found
