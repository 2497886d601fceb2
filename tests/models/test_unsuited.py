"""Models that load but do not suit, distilled to a few steps or made to edit pictures, however they are given."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FluxKontextPipeline,
    LCMScheduler,
    TCDScheduler,
)
from safetensors.torch import save_file

from conftest import tiny_flux_pipeline, tiny_pipeline, tiny_qwen_pipeline, tiny_xl_pipeline
from diffmorpher import Morpher
from diffmorpher.errors import ModelError
from diffmorpher.models.catalog import CATALOG
from diffmorpher.models.families import FAMILIES
from diffmorpher.models.loading import as_backbone, load_pipeline
from diffmorpher.models.single_file import Checkpoint
from diffmorpher.models.unsuited import check_suits, few_steps_by_name

CPU = torch.device("cpu")


def warned(pipe: Any, name: str = "") -> str:
    """What is said of a pipeline, or nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        as_backbone(pipe, name)
    return " ".join(str(each.message) for each in caught if "few-step" in str(each.message))


def test_no_ordinary_model_is_taken_for_a_few_step_one() -> None:
    others = (
        "owner/hyper-realistic-xl",
        "turbovision",
        "lightningstrike",
        "RunDiffusion/Juggernaut-XL-v9",
        "hyperrealism",
    )
    for name in (*CATALOG, *(spec.source for spec in CATALOG.values()), *others):
        assert few_steps_by_name(name) == ""


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_flux_pipeline])
def test_a_few_step_model_is_warned_of_by_any_name_it_goes_by(make: Any, tmp_path: Path) -> None:
    pipe = make()
    assert warned(pipe) == warned(pipe, "turbo-team/plain-model") == warned(pipe, "/home/turbo/plain") == ""
    for name in (
        "stabilityai/sdxl-turbo",
        "owner/Juggernaut-XI-Lightning",
        "dreamshaper-8-LCM",
        "Hyper-SD",
        "sd_turbo",
    ):
        own = name.split("/")[-1]
        assert warned(pipe, name).startswith(
            f"{own} goes by the name of a few-step model, which morphs badly: take the one"
        )
    assert warned(pipe, "/hub/models--stabilityai--sd-turbo/snapshots/b261bac6fd2c") != ""
    pipe.register_to_config(_name_or_path="stabilityai/sd-turbo")  # as diffusers does for a hub id
    assert "sd-turbo goes by" in warned(pipe)
    pipe.save_pretrained(tmp_path / "copy")
    index = tmp_path / "copy" / "model_index.json"
    assert json.loads(index.read_text())["_name_or_path"] == "stabilityai/sd-turbo"
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "copy", local_files_only=True)
    assert "sd-turbo goes by" in warned(loaded)


def test_a_folder_is_warned_of_once_when_it_is_loaded(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "sd-turbo")
    with pytest.warns(UserWarning, match="sd-turbo goes by the name of a few-step model") as caught:
        Morpher.from_pretrained(tmp_path / "sd-turbo", device="cpu")
    assert len([each for each in caught if "few-step" in str(each.message)]) == 1


def test_a_few_step_model_is_warned_of_by_its_scheduler() -> None:
    pipe = tiny_xl_pipeline()
    own = pipe.scheduler.config

    def scheduled(kind: Any, **changes: Any) -> str:
        pipe.scheduler = kind.from_config(own, **changes)
        return warned(pipe)

    assert scheduled(LCMScheduler).startswith("the scheduler is LCMScheduler, as few-step models have it")
    assert "TCDScheduler" in scheduled(TCDScheduler)
    assert "EulerAncestralDiscreteScheduler with trailing" in scheduled(
        EulerAncestralDiscreteScheduler, timestep_spacing="trailing"
    )
    zero_snr = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    for kind in (DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler):
        assert scheduled(kind, timestep_spacing="leading") == ""
        assert scheduled(kind, **zero_snr) == ""
        assert scheduled(kind, **zero_snr, prediction_type="v_prediction") == ""
    assert scheduled(DDIMScheduler, timestep_spacing="trailing") == ""


@pytest.mark.parametrize("by", ["object", "folder"])
def test_a_network_that_is_told_a_guidance_embedding_is_refused(by: str, tmp_path: Path) -> None:
    """diffusers' U-Net of a consistency model; without the embedding it would quietly predict something else."""
    pipe = tiny_pipeline(time_cond_proj_dim=8)
    pipe.save_pretrained(tmp_path / "dreamshaper")
    with pytest.raises(
        ModelError, match=r"is a consistency model \(LCM\), distilled .* take the model that it was made from\.$"
    ):
        Morpher(pipe) if by == "object" else Morpher.from_pretrained(tmp_path / "dreamshaper", device="cpu")


# ---- models that edit pictures


def kontext() -> FluxKontextPipeline:
    return FluxKontextPipeline(**{k: v for k, v in tiny_flux_pipeline().components.items() if k in KONTEXT_PARTS})


KONTEXT_PARTS = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")


def test_kontext_is_refused_as_an_object_and_by_where_it_came_from() -> None:
    with pytest.raises(
        ModelError, match=r"^FluxKontextPipeline is the pipeline of FLUX\.1 Kontext.*: take FLUX\.1 dev\.$"
    ):
        Morpher(kontext())
    plain = tiny_flux_pipeline()
    with pytest.raises(
        ModelError, match=r"^FLUX\.1-Kontext-dev goes by the name of FLUX\.1 Kontext.*: take FLUX\.1 dev\.$"
    ):
        as_backbone(plain, "black-forest-labs/FLUX.1-Kontext-dev")
    plain.register_to_config(_name_or_path="black-forest-labs/FLUX.1-Kontext-dev")
    with pytest.raises(ModelError, match="goes by the name of FLUX.1 Kontext"):
        Morpher(plain)
    with pytest.raises(ModelError, match="Qwen-Image-Edit-2509 goes by the name of Qwen-Image-Edit.*: take Qwen-Image"):
        as_backbone(tiny_qwen_pipeline(), "Qwen/Qwen-Image-Edit-2509")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("FluxKontextPipeline", r"FLUX\.1 Kontext, which edits pictures: take FLUX\.1 dev\.$"),
        ("FluxKontextInpaintPipeline", r"FLUX\.1 Kontext, which edits pictures: take FLUX\.1 dev\.$"),
        ("QwenImageEditPipeline", r"Qwen-Image-Edit, which edits pictures: take Qwen-Image\.$"),
        ("QwenImageEditPlusPipeline", r"Qwen-Image-Edit, which edits pictures: take Qwen-Image\.$"),
    ],
)
@pytest.mark.parametrize("by", ["folder", "hub"])
def test_an_editing_model_is_refused_before_its_weights_are_read(
    kind: str, said: str, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no more than the index, as with a hub id of which nothing else was fetched."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind, "vae": ["diffusers", "AutoencoderKL"]}))
    model = str(tmp_path)
    if by == "hub":
        model, own = "owner/model", DiffusionPipeline.load_config.__func__  # type: ignore[attr-defined]
        at_hub = classmethod(lambda cls, place, **_: own(cls, str(tmp_path) if place == "owner/model" else place))
        monkeypatch.setattr(DiffusionPipeline, "load_config", at_hub)
    with pytest.raises(ModelError, match=f"^{kind} is the pipeline of {said}"):
        load_pipeline(model, CPU)


FLUX = {
    "double_blocks.0.img_attn.norm.key_norm.scale": (1,),
    "guidance_in.in_layer.weight": (1,),
    "img_in.weight": (8, 64),
}
QWEN = {"txt_norm.weight": (1,), "transformer_blocks.0.img_mod.1.weight": (1,)}


def file(place: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, place)
    return place


@pytest.mark.parametrize(
    ("name", "shapes", "said"),
    [
        ("flux1-kontext-dev-Q8", FLUX, "holds FLUX.1 Kontext, which edits pictures: take FLUX.1 dev."),
        ("flux1-dev-Kontext_fp8", FLUX, "holds FLUX.1 Kontext, which edits pictures: take FLUX.1 dev."),
        ("qwen_image_edit_2509_bf16", QWEN, "holds Qwen-Image-Edit, which edits pictures: take Qwen-Image."),
        ("Qwen-Image-Edit-Rapid", QWEN, "holds Qwen-Image-Edit, which edits pictures: take Qwen-Image."),
    ],
)
def test_a_file_of_an_editing_model_is_refused_by_its_name(
    tmp_path: Path, name: str, shapes: dict[str, tuple[int, ...]], said: str
) -> None:
    """Its keys are the text-to-image model's; a folder beside it changes nothing."""
    place = file(tmp_path / f"{name}.safetensors", shapes)
    (tmp_path / name).mkdir()
    with pytest.raises(ModelError, match=re.escape(said)):
        load_pipeline(str(place), CPU)


def test_other_files_are_what_their_keys_say(tmp_path: Path) -> None:
    assert Checkpoint.read(file(tmp_path / "flux1-dev.safetensors", FLUX)).family is FAMILIES["flux"]
    assert Checkpoint.read(file(tmp_path / "qwen_image_bf16.safetensors", QWEN)).family is FAMILIES["qwen-image"]
    assert Checkpoint.read(file(tmp_path / "qwen-image-edit-flux.safetensors", FLUX)).family is FAMILIES["flux"]
    lora = file(tmp_path / "kontext.safetensors", {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 4)})
    assert Checkpoint.read(lora).family is FAMILIES["lora"]


def test_a_file_beside_an_editing_models_folder_is_refused(tmp_path: Path) -> None:
    """The file's own name says nothing, the folder's index does."""
    place = file(tmp_path / "mine.safetensors", FLUX)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model_index.json").write_text(json.dumps({"_class_name": "FluxKontextPipeline"}))
    with pytest.raises(ModelError, match="^FluxKontextPipeline is the pipeline of FLUX.1 Kontext"):
        load_pipeline(str(place), CPU)


def test_what_a_file_is_is_said_once(tmp_path: Path) -> None:
    """The rest of a file's pipeline comes from another model, which is not asked for its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_suits(tiny_pipeline(), "sd-turbo.safetensors")
