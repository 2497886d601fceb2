"""One .safetensors file and no network: recognised by its keys, loaded with what is bundled, the same model as before."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from test_models import original_layout
from torch.testing import assert_close
from typer.testing import CliRunner

from diffmorpher import FitConfig, Morpher, Recipe, SampleConfig
from diffmorpher.cli.about import about_file, file_table
from diffmorpher.cli.app import _load, app
from diffmorpher.errors import ConfigError, ModelError
from diffmorpher.models import single_file
from diffmorpher.models.clip_vocabulary import CONFIGS, clip_tokenizer
from diffmorpher.models.families import FAMILIES, family
from diffmorpher.models.loading import load_pipeline
from diffmorpher.models.single_file import Checkpoint

CPU = torch.device("cpu")
UNET = "model.diffusion_model."
READS = UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
PICTURES = [Image.effect_noise((40, 32), s).convert("RGB") for s in (20, 90)]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was tried")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AssertionError, match="network"):
        socket.create_connection(("localhost", 9))


# ---- what is bundled


def config(name: str, part: str) -> dict[str, Any]:
    file = next((CONFIGS / name / part).glob("*config.json"))
    return json.loads(file.read_text("utf-8"))


def build(name: str, part: str, **changes: Any) -> torch.nn.Module:
    """A network of a bundled configuration, by the class that its model_index.json names."""
    index = json.loads((CONFIGS / name / "model_index.json").read_text("utf-8"))
    library, kind = index[part]
    about = config(name, part) | changes
    if library == "transformers":
        return getattr(transformers, kind)(transformers.CLIPTextConfig(**about)).eval()
    return getattr(diffusers, kind).from_config(about).eval()


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("sd1", {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
        ("sd2-base", {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}),
        ("sd2-v", {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}),
        (
            "sdxl",
            {
                "unet": 2_567_463_684,
                "vae": 83_653_863,
                "text_encoder": 123_060_480,
                "text_encoder_2": 694_659_840,
            },
        ),
    ],
)
def test_the_bundled_configurations_are_of_the_published_sizes(name: str, counts: dict[str, int]) -> None:
    for part, count in counts.items():
        with init_empty_weights():
            network = build(name, part)
        assert sum(weight.numel() for weight in network.parameters()) == count, part
    scheduler = config(name, "scheduler")
    assert scheduler["prediction_type"] == ("v_prediction" if name == "sd2-v" else "epsilon")
    abar = diffusers.DDIMScheduler.from_config(scheduler).alphas_cumprod
    assert_close(abar[[0, -1]], torch.tensor([0.99915, 0.0046602]), rtol=1e-4, atol=0)  # Stable Diffusion's own table
    side = {"sd1": 512, "sd2-base": 512, "sd2-v": 768, "sdxl": 1024}[name]
    assert config(name, "unet")["sample_size"] * 8 == side == config(name, "vae")["sample_size"]
    assert config(name, "vae")["scaling_factor"] == (0.13025 if name == "sdxl" else 0.18215)


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("sd1", "down_blocks.0.attentions.0.proj_in.weight", (320, 320, 1, 1)),
        ("sd1", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", (1280, 768)),
        ("sd2-v", "down_blocks.0.attentions.0.proj_in.weight", (320, 320)),
        ("sd2-base", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", (320, 1024)),
        ("sdxl", "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight", (1280, 2048)),
        ("sdxl", "add_embedding.linear_1.weight", (1280, 2816)),
    ],
)
def test_the_bundled_unets_have_the_known_weights(name: str, key: str, shape: tuple[int, ...]) -> None:
    with init_empty_weights():
        assert tuple(build(name, "unet").state_dict()[key].shape) == shape


@pytest.mark.parametrize(
    ("folder", "pad"),
    [
        *(("sd1/tokenizer", 49407), ("sd2-base/tokenizer", 0), ("sd2-v/tokenizer", 0)),
        *(("sdxl/tokenizer", 49407), ("sdxl/tokenizer_2", 0)),
    ],
)
def test_the_tokenizers_give_the_known_numbers(folder: str, pad: int) -> None:
    tokenizer = clip_tokenizer(CONFIGS / folder)
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("A  Diagram,\n an astronaut's").input_ids == [49406, 320, 22697, 267, 550, 18376, 568, 49407]
    padded = tokenizer("cat", padding="max_length", max_length=5).input_ids
    assert padded == [49406, 2368, 49407, pad, pad]


def test_the_vocabulary_is_the_published_file() -> None:
    digest = hashlib.sha256((CONFIGS / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).hexdigest()
    assert digest == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


# ---- loading: small networks in the bundled layout, under the original names


SMALL: dict[str, dict[str, Any]] = {
    "vae": {"block_out_channels": [16] * 4, "norm_num_groups": 8},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2},
    "text_encoder_2": {
        **{"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2},
        "projection_dim": 48,
    },
}


def small_unet(name: str) -> dict[str, Any]:
    levels = len(config(name, "unet")["block_out_channels"])
    changes: dict[str, Any] = {"block_out_channels": [32] * levels, "norm_num_groups": 8}
    if name != "sd1":
        changes["attention_head_dim"] = [2] * levels
    if name == "sdxl":
        changes |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 96}
    return changes


def small(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, width: int = 32) -> Any:
    """A small pipeline of a family; what is bundled for the family then describes it. width: of the (first) text encoder."""
    torch.manual_seed(0)
    folder, changes = tmp_path / "configs" / name, SMALL | {"unet": small_unet(name)}
    changes["text_encoder"] = changes["text_encoder"] | {"hidden_size": width}
    shutil.copytree(CONFIGS / name, folder)
    parts: dict[str, Any] = {
        "scheduler": diffusers.DDIMScheduler.from_config(config(name, "scheduler")),
        **{place.name: clip_tokenizer(place) for place in folder.glob("tokenizer*")},
    }
    for part, other in changes.items():
        if (folder / part).is_dir():
            (folder / part / "config.json").write_text(json.dumps(config(name, part) | other))
            parts[part] = build(name, part, **other)
    monkeypatch.setattr(single_file, "CONFIGS", tmp_path / "configs")
    if name == "sdxl":
        return diffusers.StableDiffusionXLPipeline(**parts)
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def original(name: str, pipe: Any) -> dict[str, torch.Tensor]:
    """Its weights as the published files of its family have them, with what these hold beside."""
    weights = original_layout(pipe) | {"alphas_cumprod": torch.zeros(1000), "model_ema.decay": torch.zeros(())}
    clip = "cond_stage_model."
    for key in [key for key in weights if key.startswith(clip) and ".text_model." not in key]:
        del weights[key]
    if name == "sd1":
        return weights | {clip + "transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    of_text = {key: weights.pop(key) for key in list(weights) if key.startswith(clip)}
    if name == "sdxl":
        for key, value in of_text.items():
            weights[key.replace(clip, "conditioner.embedders.0.")] = value
        return weights | open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    unused = {
        clip + "model.transformer.resblocks.23.ln_1.weight": torch.zeros(32),
        clip + "model.logit_scale": torch.zeros(()),
    }
    return weights | open_clip(pipe.text_encoder, clip + "model.") | unused


def open_clip(encoder: Any, prefix: str) -> dict[str, torch.Tensor]:
    """A text encoder as OpenCLIP names it: one matrix for queries, keys and values, the projection transposed."""
    weights = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    out = {
        "positional_embedding": weights.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": weights.pop("embeddings.token_embedding.weight"),
        "text_projection": weights.pop("text_projection.weight", torch.eye(encoder.config.hidden_size)).T,
    }
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for i in range(encoder.config.num_hidden_layers):
        ours, theirs = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            qkv = [weights.pop(f"{ours}self_attn.{each}_proj.{kind}") for each in "qkv"]
            out[f"{theirs}attn.in_proj_{kind}"] = torch.cat(qkv)
            out[f"{theirs}attn.out_proj.{kind}"] = weights.pop(f"{ours}self_attn.out_proj.{kind}")
            for here, there in names.items():
                out[f"{theirs}{there}.{kind}"] = weights.pop(f"{ours}{here}.{kind}")
    out |= {f"ln_final.{kind}": weights.pop(f"final_layer_norm.{kind}") for kind in ("weight", "bias")}
    assert not [key for key in weights if not key.endswith("position_ids")]
    return {prefix + key: value.clone().contiguous() for key, value in out.items()}


@pytest.mark.parametrize(("name", "tensors"), [("sd1", 1131), ("sd2-base", 1217), ("sdxl", 2513)])
def test_files_of_the_real_sizes_are_recognised(name: str, tensors: int) -> None:
    """Every key of a published file, without its weights: U-Net 686 or 1680, VAE 248, texts the rest (of 2.x: what is used)."""
    index = json.loads((CONFIGS / name / "model_index.json").read_text("utf-8"))
    with init_empty_weights():
        parts = {part: build(name, part) for part in index if part.startswith(("unet", "vae", "text"))}
        weights = original(name, SimpleNamespace(**parts))
    shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
    assert family(shapes) == FAMILIES[name.removesuffix("-base")]
    used = [key for key in shapes if key.startswith((UNET, "first_stage_model.", "cond_stage_model.", "conditioner."))]
    assert len(used) == tensors


FILES = {"sd1": "model", "sd2-base": "v2-1_512-ema-pruned", "sd2-v": "v2-1_768-ema-pruned", "sdxl": "sd_xl_base_1.0"}


@pytest.mark.parametrize("name", FILES)
def test_a_file_alone_is_the_same_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = small(name, monkeypatch, tmp_path)
    file = tmp_path / f"{FILES[name]}.safetensors"
    save_file(original(name, pipe), file)
    loaded, _ = load_pipeline(str(file), CPU, torch.float32)
    assert type(loaded) is type(pipe)
    assert loaded.scheduler.config.prediction_type == ("v_prediction" if name == "sd2-v" else "epsilon")
    z, c = torch.randn(1, 4, 8, 8), torch.randn(1, 5, pipe.unet.config.cross_attention_dim)
    added = {"text_embeds": torch.randn(1, 48), "time_ids": torch.randn(1, 6)} if name == "sdxl" else None
    with torch.no_grad():
        for mine, theirs in zip(texts(loaded), texts(pipe), strict=True):
            assert_close(mine, theirs, rtol=0, atol=1e-5)
        mine, theirs = (p.unet(z, 500, c, added_cond_kwargs=added).sample for p in (loaded, pipe))
        assert_close(mine, theirs, rtol=0, atol=1e-5)
        assert_close(loaded.vae.decode(z).sample, pipe.vae.decode(z).sample, rtol=0, atol=1e-5)
        picture = torch.rand(1, 3, 32, 32)
        mine, theirs = (p.vae.encode(picture).latent_dist.mean for p in (loaded, pipe))
        assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_a_name_in_capitals_is_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = small("sd1", monkeypatch, tmp_path)
    save_file(original("sd1", pipe), tmp_path / "MODEL.SAFETENSORS")
    loaded, _ = load_pipeline(str(tmp_path / "MODEL.SAFETENSORS"), CPU, torch.float32)
    assert torch.equal(loaded.unet.conv_in.weight, pipe.unet.conv_in.weight)
    with pytest.raises(ModelError, match="pickled checkpoints can run code"):
        load_pipeline(str(tmp_path / "MODEL.CKPT"), CPU, torch.float32)


def texts(pipe: Any) -> list[torch.Tensor]:
    """Whatever the pipeline makes of a prompt."""
    encoded = pipe.encode_prompt(
        "a photo of a cat", device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return [each for each in encoded if each is not None]


def test_a_folder_beside_the_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = small("sd1", monkeypatch, tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(original("sd1", pipe), file)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    pipe.save_pretrained(tmp_path / "model")
    for weights in (tmp_path / "model").glob("*/*.safetensors"):
        weights.unlink()
    assert Morpher.from_pretrained(str(file), device="cpu").backbone.prediction_type == "v_prediction"  # type: ignore[attr-defined]
    asked = Morpher.from_pretrained(str(file), device="cpu", prediction="epsilon")
    assert asked.backbone.prediction_type == "epsilon"  # type: ignore[attr-defined]


def test_a_file_that_lacks_a_weight_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = original("sd1", small("sd1", monkeypatch, tmp_path))
    place = str(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith("first_stage_model.")}, place)
    with pytest.raises(
        ModelError, match=r"Diffusion 1\.x without a VAE: take the whole checkpoint, or give one with --vae\.$"
    ):
        load_pipeline(place, CPU, torch.float32)
    del weights["cond_stage_model.transformer.text_model.final_layer_norm.bias"]
    save_file(weights, place)
    with pytest.raises(ModelError, match=r"text_encoder lacks final_layer_norm\.bias"):
        load_pipeline(place, CPU, torch.float32)


def test_a_flow_model_takes_the_rest_from_the_folder_beside_it(tmp_path: Path) -> None:
    """A Stable Diffusion 3 file without text encoders, its transformer under the original names."""
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "pos_embed_max_size": 8,
        },
        **{"joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 24},
    ).eval()
    encoder = transformers.CLIPTextConfig(
        **config("sdxl", "text_encoder_2") | SMALL["text_encoder"] | {"projection_dim": 12}
    )
    encoders = [transformers.CLIPTextModelWithProjection(encoder).eval() for _ in range(2)]
    tokenizers = [clip_tokenizer(CONFIGS / "sdxl" / part) for part in ("tokenizer", "tokenizer_2")]
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build("sd1", "vae", **SMALL["vae"], latent_channels=16),
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.save_pretrained(tmp_path / "sd3")
    (tmp_path / "sd3" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    save_file(original_sd3(transformer), tmp_path / "sd3.safetensors")
    options = {"device": CPU, "dtype": torch.float32}
    loaded, _ = load_pipeline(str(tmp_path / "sd3.safetensors"), **options)
    z, c, pooled = torch.randn(1, 16, 8, 8), torch.randn(1, 5, 32), torch.randn(1, 24)
    with torch.no_grad():
        mine, theirs = (
            p.transformer(z, c, pooled_projections=pooled, timestep=torch.tensor([500.0])).sample
            for p in (loaded, pipe)
        )
    assert_close(mine, theirs, rtol=0, atol=1e-5)
    with pytest.raises(ModelError, match="StableDiffusion3Pipeline predicts neither epsilon nor v"):
        load_pipeline(str(tmp_path / "sd3.safetensors"), prediction="v", **options)


def original_sd3(transformer: Any) -> dict[str, torch.Tensor]:
    """Stable Diffusion 3's own names: one matrix for queries, keys and values; shift before scale in the last layers."""
    weights = {
        key.replace("pos_embed.proj", "x_embedder.proj"): value for key, value in transformer.state_dict().items()
    }
    out = {"pos_embed": weights.pop("pos_embed.pos_embed")}
    embedders = {"t_embedder": "timestep_embedder", "y_embedder": "text_embedder"}
    last = transformer.config.num_layers - 1
    for kind in ("weight", "bias"):
        for theirs, ours in embedders.items():
            for i in (0, 2):
                out[f"{theirs}.mlp.{i}.{kind}"] = weights.pop(f"time_text_embed.{ours}.linear_{i // 2 + 1}.{kind}")
        for key in ("x_embedder.proj", "context_embedder"):
            out[f"{key}.{kind}"] = weights.pop(f"{key}.{kind}")
        out[f"final_layer.linear.{kind}"] = weights.pop(f"proj_out.{kind}")
        out[f"final_layer.adaLN_modulation.1.{kind}"] = shift_first(weights.pop(f"norm_out.linear.{kind}"))
        for i in range(last + 1):
            for block, names, fed in (
                ("x_block", ("to_q", "to_k", "to_v", "to_out.0", "norm1"), "ff"),
                (
                    "context_block",
                    ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm1_context"),
                    "ff_context",
                ),
            ):
                ours, theirs = f"transformer_blocks.{i}.", f"joint_blocks.{i}.{block}."
                qkv = [weights.pop(f"{ours}attn.{name}.{kind}") for name in names[:3]]
                out[f"{theirs}attn.qkv.{kind}"] = torch.cat(qkv)
                modulation = weights.pop(f"{ours}{names[4]}.linear.{kind}")
                is_end = (
                    block == "context_block" and i == last
                )  # which leads nowhere but to the pictures' keys and values
                out[f"{theirs}adaLN_modulation.1.{kind}"] = shift_first(modulation) if is_end else modulation
                if not is_end:
                    out[f"{theirs}attn.proj.{kind}"] = weights.pop(f"{ours}attn.{names[3]}.{kind}")
                    out[f"{theirs}mlp.fc1.{kind}"] = weights.pop(f"{ours}{fed}.net.0.proj.{kind}")
                    out[f"{theirs}mlp.fc2.{kind}"] = weights.pop(f"{ours}{fed}.net.2.{kind}")
    assert not weights
    return {UNET + key: value.clone().contiguous() for key, value in out.items()}


def shift_first(scale_and_shift: torch.Tensor) -> torch.Tensor:
    return torch.cat(scale_and_shift.chunk(2)[::-1])


# ---- what it predicts


def checkpoint(tmp_path: Path, name: str, *keys: str, text: int = 1024, **metadata: str) -> Checkpoint:
    """A file of no more than the keys that tell families apart."""
    marks = {
        UNET + "middle_block.1.norm.weight": (1,),
        UNET + "input_blocks.8.1.transformer_blocks.9.norm1.weight": (1,),
    }
    parts = {"first_stage_model.x": (1,), "cond_stage_model.x": (1,)}
    shapes = {
        UNET + "input_blocks.0.0.weight": (1, 4, 1, 1),
        READS: (1, text),
        **marks,
        **parts,
        **dict.fromkeys(keys, (1,)),
    }
    save_file({k: torch.zeros(shape) for k, shape in shapes.items()}, tmp_path / name, metadata or None)
    return Checkpoint.read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "predicts"),
    [
        ("768-v-ema", "v"),
        ("v2-1_768-nonema-pruned", "v"),
        ("512-base-ema", "epsilon"),
        ("v2-1_512-ema-pruned", "epsilon"),
        ("my_sd2_vpred", "v"),
        ("wd-1-5-beta2", None),
        ("v2-1", None),
        ("512-v", None),
    ],
)
def test_what_a_second_generation_file_predicts_by_its_name(tmp_path: Path, name: str, predicts: str | None) -> None:
    assert checkpoint(tmp_path, f"{name}.safetensors").prediction == predicts


@pytest.mark.parametrize(
    ("metadata", "keys", "predicts"),
    [
        ({"modelspec.prediction_type": "epsilon"}, (), "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, (), "epsilon"),
        (
            {"modelspec.architecture": "stable-diffusion-v2-768-v", "modelspec.prediction_type": "epsilon"},
            (),
            "epsilon",
        ),
        ({"ss_base_model_version": "sd_v2"}, (), "epsilon"),
        ({}, ("v_pred",), "v"),
        ({}, (), "v"),
    ],
)
def test_the_header_and_the_keys_come_before_the_name(
    tmp_path: Path, metadata: dict[str, str], keys: tuple[str, ...], predicts: str
) -> None:
    name = "768-v.safetensors" if predicts == "epsilon" or not keys else "512-base.safetensors"
    assert checkpoint(tmp_path, name, *keys, **metadata).prediction == predicts


def test_first_generation_and_xl_files_predict_epsilon_unless_they_say_otherwise(tmp_path: Path) -> None:
    for text in (768, 2048):
        assert checkpoint(tmp_path, "768.safetensors", text=text).prediction == "epsilon"
        assert checkpoint(tmp_path, "a-vPred10.safetensors", text=text).prediction == "v"
        assert checkpoint(tmp_path, "a.safetensors", "v_pred", text=text).prediction == "v"


def test_a_second_generation_file_that_does_not_say_asks(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, "mine.safetensors")
    with pytest.raises(
        ModelError, match=r"mine\.safetensors is a .* 2\.x file that does not say .* --prediction v .*epsilon"
    ):
        Morpher.from_pretrained(str(found.file), device="cpu")
    assert found.check("v") == CONFIGS / "sd2-v" and found.check("epsilon") == CONFIGS / "sd2-base"


def test_marks_of_v_and_of_zero_terminal_snr_reach_the_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = original("sdxl", small("sdxl", monkeypatch, tmp_path))
    save_file(weights | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "noob.safetensors")
    scheduler = load_pipeline(str(tmp_path / "noob.safetensors"), CPU, torch.float32)[0].scheduler
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.alphas_cumprod[-1] < 1e-9


def test_what_is_asked_for_is_kept_in_the_film_and_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    save_file(original("sd1", small("sd1", monkeypatch, tmp_path, width=768)), file)
    monkeypatch.chdir(tmp_path)
    quick: dict[str, Any] = {"num_frames": 2, "fit": FitConfig(rank=2, steps=1), "sample": SampleConfig(steps=1)}
    morpher = Morpher.from_pretrained(str(file), device="cpu", prediction="v")
    assert morpher.backbone.prediction_type == "v_prediction"  # type: ignore[attr-defined]
    morpher(PICTURES, "noise", size=(64, 64), **quick).save(tmp_path / "film.gif")
    again = Recipe.read(tmp_path / "film.gif")
    assert again.prediction == "v" and " --prediction v" in again.command()
    assert _load(again).backbone.prediction_type == "v_prediction"  # type: ignore[attr-defined]
    assert again.changed(model=str(file)).prediction == "v" and again.changed(model="mini").prediction is None
    plain = Morpher.from_pretrained(str(file), device="cpu")
    assert "prediction" not in plain(PICTURES, "noise", size=(64, 64), **quick).settings


def test_a_prediction_that_cannot_be_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'x' is not known; use epsilon or v"):
        load_pipeline("mini", CPU, torch.float32, prediction="x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match='the prediction is \'x\', but must be "epsilon" or "v"'):
        Recipe(prediction="x")  # type: ignore[arg-type]
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ModelError, match="neither epsilon nor v: leave out --prediction"):
        single_file.predicting(type("Pipe", (), {"scheduler": flow})(), "v")


# ---- which family


def unet(text: int, channels: int = 4, *more: str) -> dict[str, tuple[int, ...]]:
    full = ("middle_block.1.norm.weight", "input_blocks.8.1.transformer_blocks.9.norm1.weight")
    names = ["input_blocks.0.0.weight", *full, *more]
    return {**{UNET + name: (320, channels, 3, 3) for name in names}, READS: (640, text)}


def keys(*names: str, **shapes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names, (1,)) | shapes


FLUX = "double_blocks.0.img_attn.norm.key_norm.scale"
SD3 = UNET + "joint_blocks.0.context_block.adaLN_modulation.1.bias"
KNOWN: list[tuple[str, dict[str, tuple[int, ...]]]] = [
    ("sd1", unet(768)),
    ("sd2", unet(1024)),
    ("sdxl", unet(2048, 4, "label_emb.0.0.weight")),
    ("sdxl-refiner", unet(1280)),
    ("sd3", keys(SD3)),
    ("sd3.5-medium", keys(SD3, UNET + "joint_blocks.0.x_block.attn2.qkv.weight")),
    ("sd3.5-large", keys(SD3, UNET + "joint_blocks.37.x_block.mlp.fc1.weight")),
    ("flux", keys(FLUX, "guidance_in.in_layer.weight") | {"img_in.weight": (3072, 64)}),
    ("flux-schnell", keys(UNET + FLUX) | {UNET + "img_in.weight": (3072, 64)}),
    ("flux-fill", keys(FLUX, "guidance_in.in_layer.weight") | {"img_in.weight": (3072, 384)}),
    ("flux-control", keys(FLUX, "guidance_in.in_layer.weight") | {"img_in.weight": (3072, 128)}),
    ("flux2", keys(FLUX, "single_stream_modulation.lin.weight", "guidance_in.in_layer.weight")),
    ("flux2-klein", keys(FLUX, "single_stream_modulation.lin.weight")),
    ("z-image", keys("x_embedder.weight", "cap_embedder.0.weight", "layers.0.adaLN_modulation.0.weight")),
    ("qwen-image", keys("txt_norm.weight", "transformer_blocks.0.img_mod.1.weight")),
    ("lora", keys("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight")),
    ("lora", keys("transformer.transformer_blocks.0.attn.to_q.lora_A.weight")),
    ("lora", keys("unet.down_blocks.0.attentions.0.to_q.lora.down.weight")),
    ("controlnet", keys("control_model.input_blocks.0.0.weight")),
    ("vae", keys("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.up.0.block.0.conv1.weight")),
    ("vae", keys("first_stage_model.decoder.conv_in.weight")),
    ("text-encoder", keys("text_model.encoder.layers.0.self_attn.q_proj.weight")),
    ("text-encoder", keys("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight")),
    ("diffusers", keys("down_blocks.0.resnets.0.conv1.weight", "conv_in.weight")),
    ("diffusers", keys("encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight")),
    ("diffusers", keys("transformer_blocks.0.attn.add_q_proj.weight")),
    ("diffusers", keys("all_x_embedder.2-1.weight", "cap_embedder.0.weight", "layers.0.adaLN_modulation.0.weight")),
    ("unknown", keys("weight")),
    ("unknown", {}),
]


@pytest.mark.parametrize(("name", "shapes"), KNOWN, ids=[f"{i}-{name}" for i, (name, _) in enumerate(KNOWN)])
def test_every_family_is_known_by_its_keys(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    assert family(shapes) == FAMILIES[name]


def test_every_family_has_been_recognised_and_what_its_line_names_is_there() -> None:
    assert {name for name, _ in KNOWN} == set(FAMILIES)
    for each in FAMILIES.values():
        assert bool(each.pipeline) != bool(each.instead)
        assert all(hasattr(diffusers, kind) for kind in (each.pipeline, each.network) if kind)
        assert all(
            (CONFIGS / folder / "model_index.json").is_file() for folder in (each.config, each.config_v) if folder
        )


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (unet(768, 9), "Stable Diffusion 1.x for inpainting: take the text-to-image model that it was made from."),
        (unet(1024, 5), "Stable Diffusion 2.x with depth: take the text-to-image model"),
        (unet(768, 8), "Stable Diffusion 1.x for editing: take"),
        (unet(2048, 9), "Stable Diffusion XL for inpainting: take"),
        (unet(1024, 7), "Stable Diffusion 2.x for upscaling: take"),
        (unet(1024, 4, "label_emb.0.0.weight"), "starts from pictures (unCLIP): take"),
        (unet(1280), "Stable Diffusion XL's refiner: take the base model"),
        (
            keys("txt_norm.weight", "time_text_embed.addition_t_embedding.weight"),
            "Qwen-Image-Layered: take Qwen-Image",
        ),
        (unet(768, 4, "time_embed.cond_proj.weight"), "(LCM): it is distilled to a few steps"),
        (unet(2048) | {"edm_mean": (4,)}, "EDM's noise levels: take"),
        (unet(1024, 8, "input_blocks.1.1.time_stack.0.norm1.weight"), "a video model: take"),
        (
            {READS: (640, 2048), UNET + "input_blocks.0.0.weight": (320, 4, 3, 3)},
            "XL, cut down, of which no configuration",
        ),
        (keys(FLUX) | {"img_in.weight": (3072, 64)}, "FLUX.1 schnell: it is distilled to a few steps"),
        (
            keys(FLUX, "single_stream_modulation.lin.weight", "guidance_in.in_layer.weight"),
            "FLUX.2 dev: take FLUX.2 Klein base.",
        ),
        (
            keys(SD3),
            "Stable Diffusion 3 medium, of which no configuration is bundled: put the rest of its diffusers folder",
        ),
        (
            keys("x.lora_down.weight"),
            "a LoRA: name the model that it was made for with --model, and this file with --lora",
        ),
        (keys("decoder.conv_in.weight"), "an autoencoder (VAE) alone: take a whole model, and this file with --vae."),
        (keys("down_blocks.0.resnets.0.conv1.weight"), "take the folder that holds its model_index.json."),
        (keys("weight"), "no model of a family that is known here: take one of Stable Diffusion 1.x"),
    ],
)
def test_what_cannot_be_used_says_what_to_take_instead(tmp_path: Path, shapes: dict[str, Any], said: str) -> None:
    save_file({k: torch.zeros(1).expand(shape).contiguous() for k, shape in shapes.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError) as error:
        Morpher.from_pretrained(str(tmp_path / "a.safetensors"), device="cpu")
    message = str(error.value)
    assert message.startswith("a.safetensors holds ") and said in message and "\n" not in message
    assert "online" not in message and "hub" not in message


def test_a_few_step_model_is_warned_of_by_its_name(tmp_path: Path) -> None:
    for name in ("sd_xl_turbo_1.0", "juggernautXL_lightning", "dreamshaper-LCM", "z-image-turbo"):
        assert "take the one it was made from" in checkpoint(tmp_path, f"{name}.safetensors").few_steps
    for name in ("hyperrealism", "turbovision", "sd_xl_base_1.0"):
        assert checkpoint(tmp_path, f"{name}.safetensors").few_steps == ""


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[[Path], str]:
    from rich.console import Console

    def show(file: Path) -> str:
        Console(width=400).print(file_table(about_file(file)))
        return capsys.readouterr().out

    return show


def test_info_says_what_a_file_holds_and_how_it_is_used(tmp_path: Path, shown: Callable[[Path], str]) -> None:
    text = shown(checkpoint(tmp_path, "768-v-turbo.safetensors").file)
    for word in ("768-v-turbo.safetensors", "GB, F32", "Stable Diffusion 2.x", " v ", "--model", "take the one it was"):
        assert word in text
    assert "fit." not in text
    flux = {"double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(1), "img_in.weight": torch.zeros(8, 64)}
    save_file(flux | {"guidance_in.in_layer.weight": torch.zeros(1)}, tmp_path / "flux.safetensors")
    assert "fit.learning_rate 0.0001, sample.exact_ends True" in shown(tmp_path / "flux.safetensors")
    assert "give --prediction v" in shown(checkpoint(tmp_path, "mine.safetensors").file)
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    assert "take a whole model" in shown(tmp_path / "vae.safetensors")
    (tmp_path / "text.safetensors").write_text("not a model")
    with pytest.raises(ModelError, match="no .safetensors file"):
        shown(tmp_path / "text.safetensors")


def test_info_of_a_file_and_of_the_machine_in_json(tmp_path: Path) -> None:
    def told(*arguments: str) -> dict[str, Any]:
        result = CliRunner().invoke(app, ["info", *arguments, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    file = checkpoint(tmp_path, "768-v-turbo.safetensors").file
    facts = told(str(file))
    assert (
        facts["family"] == "Stable Diffusion 2.x" and facts["predicts"] == "v" and facts["bytes"] == file.stat().st_size
    )
    assert "take the one it was made from" in facts["but"] and facts["suits"] == {}
    name = "lora_unet_double_blocks_0_img_mlp_0"
    lora = {f"{name}.lora_down.weight": torch.ones(4, 3072), f"{name}.lora_up.weight": torch.ones(6 * 3072, 4)}
    save_file(lora, tmp_path / "style.safetensors")
    facts = told(str(tmp_path / "style.safetensors"))
    assert facts["made_for"] == "FLUX.2 Klein" and facts["ranks"] == [4] and not facts["usable"]
    machine = told()
    assert machine["versions"]["torch"] == torch.__version__ and "cpu" in {d["name"] for d in machine["devices"]}
    assert {m["name"]: m["where"] for m in machine["models"]}["mini"] == "bundled"
