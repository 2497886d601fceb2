"""The recipe: complete, checked, the same after a file; its files found and looked at; one table behind every face."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffmorpher import FitConfig, Recipe, SampleConfig, ScheduleConfig
from diffmorpher.cli.batch import _prepared
from diffmorpher.errors import ConfigError, ImageError, ModelError, OutputError, RecipeError
from diffmorpher.files.films import read_settings
from diffmorpher.files.pictures import image_hash
from diffmorpher.gather import gather
from diffmorpher.models.catalog import ASSETS, CATALOG, FLOW, bare_name, check_model
from diffmorpher.recipe import read_recipes
from diffmorpher.settings import BY_NAME, CONFIGS, LIMITS, PRESETS, SETTINGS, check_typed, unused

DEMO = ASSETS / "demo"


# ---- what it is


def test_what_is_not_given_suits_the_model_and_else_is_the_papers() -> None:
    assert (Recipe().fit, Recipe().sample) == (CATALOG["mini"].fit, CATALOG["mini"].sample)
    assert (Recipe(model="sd15").fit, Recipe(model="a/b").sample) == (FitConfig(), SampleConfig())
    assert Recipe(loras=("a.safetensors",)).fit is None and Recipe(fit=None).fit is None


def test_a_folder_recommends_what_suits_its_family_also_from_beside_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "films" / "flow").mkdir(parents=True)
    (tmp_path / "films" / "flow" / "model_index.json").write_text('{"transformer": ["diffusers", "X"]}')
    (tmp_path / "films" / "r.toml").write_text('recipe = 1\nmodel = "flow"\nfit.steps = 7\n')
    monkeypatch.chdir(tmp_path)
    beside, here = Recipe.read("films/r.toml"), Recipe(model="films/flow")
    assert (here.fit, here.sample) == (FLOW.fit, FLOW.sample) != (FitConfig(), SampleConfig())
    assert (beside.fit, beside.sample) == (replace(FLOW.fit, steps=7), FLOW.sample)
    assert Recipe().changed(model="films/flow") == here and here.command().endswith("--model films/flow")
    assert here.changed(paper=True).changed(model=str(tmp_path / "films/flow")).sample == SampleConfig()  # the same one
    assert here.changed(model="sd15").sample == SampleConfig()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"frames": 1}, "frames is 1, but must be a whole number from 2 to 86400"),
        ({"frames": True}, "frames is True"),
        ({"fps": 0}, "fps is 0, but must be a number from 0.01 to 240 frames per second"),
        ({"seed": -1}, "the seed is -1, but must be a whole number from 0 to 2"),
        ({"resize": "squash"}, 'resize is \'squash\', but must be "crop", "pad" or "blur"'),
        ({"seconds": 0}, "the length is 0, but must be a number of seconds above 0"),
        ({"hold": (0.5, -1)}, "hold is -1.0, but must be a number from 0 to 3600"),
        ({"hold": "1"}, "hold is '1', but must be a number from 0 to 3600"),
        ({"loop": "yes"}, "loop is 'yes', but must be true or false"),
        ({"size": (64, 4)}, "the size 64x4 is too small"),
        ({"size": (64, 64.0)}, "must be two whole numbers"),
        ({"sample": {"steps": 2}}, "sample is {'steps': 2}, but must be a SampleConfig"),
        ({"fit": 3}, "fit is 3, but must be a FitConfig"),
        (
            {"size": "5:3"},
            "the size '5:3' is not of the form WxH: give two whole numbers, such as 512x512, or one of square",
        ),
        (
            {"focus": ("0.5,2",)},
            "the focus '0.5,2' is no point: give center, auto, or two numbers from 0 to 1, such as 0.3,0.5.",
        ),
        ({"focus": "left"}, "the focus 'left' is no point"),
        ({"size": 3}, "the size is 3, but must be two whole numbers"),
        ({"pictures": (1,)}, "a recipe's lists hold texts and paths, not (1,)"),
    ],
)
def test_a_value_that_cannot_be_is_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        Recipe(**values)
    assert said in str(error.value)


def test_another_model_brings_its_own_recommendation_but_what_was_chosen_stays() -> None:
    changed = Recipe().changed(lora_steps=9, guidance=2.0).changed(model="sd15")
    assert changed.fit == FitConfig(steps=9) and changed.sample == SampleConfig(guidance_scale=2.0)
    assert changed.changed(model="mini") == Recipe().changed(lora_steps=9, guidance=2.0)


def test_a_switch_goes_both_ways() -> None:
    film = Recipe(loop=True, sample=replace(Recipe().sample, adain=False), low_memory=True)
    assert film.changed(loop=False, adain=True, low_memory=False, no_lora=False, paper=False) == Recipe()
    assert Recipe(("a", "b"), loop=True).changed(loop=False).typed() == {}


def test_presets_and_what_is_typed_with_them() -> None:
    paper = Recipe().changed(paper=True, steps=7)
    assert (paper.fit, paper.sample) == (FitConfig(), SampleConfig(steps=7)) and paper.schedule.method == "two-pass"
    quick = Recipe().changed(preview=True)
    assert quick.fit is None and not quick.schedule.enabled and quick.sample.attention_mode == "outer"
    assert quick.sample == replace(Recipe().sample, attention_mode="outer")
    assert Recipe().changed(preview=True, attention_mode="kv").sample.attention_mode == "kv"
    for model, mode in (("sdxl", "outer"), ("flux-dev", "kv")):
        assert Recipe().changed(model=model, preview=True).sample.attention_mode == mode


def test_other_loras_and_none() -> None:
    first = Recipe(loras=("a", "b"), lora_hashes=("1", "2"))
    assert first.changed(lora=["c", "d"]) == Recipe(loras=("c", "d"))
    none = first.changed(no_lora=True)
    assert (none.fit, none.loras, none.lora_hashes) == (None, (), ())


def test_contradictions_and_what_changes_nothing() -> None:
    with pytest.raises(ConfigError, match="--lora and --no-lora contradict each other"):
        check_typed({"lora", "no_lora"})
    with pytest.raises(ConfigError, match="--lora and --preview contradict each other"):
        check_typed({"preview", "lora"})

    def said(**typed: Any) -> list[str]:
        check_typed(typed)
        return unused(Recipe().changed(**typed), typed)

    assert said(lora_steps=3, fix_lora=0.5) == []
    assert said(no_lora=True, lora_rank=3, fix_lora=0.5) == [
        "--lora-rank changes nothing with --no-lora.",
        "--fix-lora changes nothing with --no-lora.",
    ]
    assert said(preview=True, lora_lr=0.1) == ["--lora-lr changes nothing with --preview."]
    assert said(lora=["a"], lora_steps=3) == ["--lora-steps changes nothing with --lora."]
    assert said(no_attention=True, attention_mode="kv", attention_lambda=0.5) == [
        "--attention-lambda changes nothing with --no-attention.",
        "--attention-mode changes nothing with --no-attention.",
    ]


# ---- the table


def test_every_setting_is_described_once_and_leads_to_a_field_that_is_there() -> None:
    assert len({each.name for each in SETTINGS}) == len({each.option for each in SETTINGS}) == len(SETTINGS)
    known = {f.name for f in fields(Recipe)}
    for each in SETTINGS:
        assert each.help and each.label and each.group
        section, _, name = each.key.rpartition(".")
        if each.name not in PRESETS:
            assert name in ({f.name for f in fields(CONFIGS[section])} if section else known), each.name
    for section, config in CONFIGS.items():
        assert set(LIMITS[section]) == {f.name for f in fields(config)}, "a field without limits"


def test_the_command_lines_options_and_the_pages_fields_are_those_of_the_table() -> None:
    import typer

    from diffmorpher.cli.app import app
    from diffmorpher.web.settings import NAMES

    morph = typer.main.get_command(app).commands["morph"]  # type: ignore[attr-defined]
    options = {option for parameter in morph.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {each.option for each in SETTINGS} <= options
    helps = {parameter.name: getattr(parameter, "help", "") for parameter in morph.params}
    assert all(helps[each.name].startswith(each.help) for each in SETTINGS)
    assert set(NAMES) - {"preset"} <= set(BY_NAME)


# ---- as a file

RECIPES = st.builds(
    Recipe,
    pictures=st.lists(st.sampled_from(["a.png", "b c.png", "ü.jpg"]), max_size=3).map(tuple),
    prompts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=3).map(tuple),
    picture_hashes=st.lists(st.sampled_from(["0f", "1e"]), max_size=3).map(tuple),
    loras=st.lists(st.sampled_from(["a.safetensors", "b.safetensors:0.5"]), max_size=2).map(tuple),
    styles=st.lists(st.sampled_from(["ink.safetensors", "c:d.safetensors:-.5"]), max_size=2).map(tuple),
    style_hashes=st.lists(st.sampled_from(["0f", "1e"]), max_size=2).map(tuple),
    model=st.sampled_from(["mini", "sd15", "owner/name"]),
    size=st.sampled_from([None, "16:9"]) | st.tuples(st.integers(8, 99), st.integers(8, 99)),
    resize=st.sampled_from(["crop", "blur"]),
    focus=st.lists(st.sampled_from(["center", "0.3,0.7"]), max_size=2).map(tuple),
    loop=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
    fit=st.none() | st.builds(FitConfig, steps=st.integers(1, 99), learning_rate=st.floats(1e-5, 1)),
    sample=st.builds(
        SampleConfig,
        steps=st.integers(1, 99),
        fix_lora=st.none() | st.floats(0, 1),
        adain=st.booleans(),
        batch_size=st.just("auto") | st.integers(1, 9),
    ),
    schedule=st.builds(
        ScheduleConfig,
        enabled=st.booleans(),
        method=st.sampled_from(["insert", "two-pass"]),
        ease=st.sampled_from(["linear", "in-out"]),
        stretch=st.lists(st.floats(0.1, 9), max_size=3).map(tuple),
    ),
    frames=st.integers(2, 99),
    seconds=st.none() | st.floats(0.1, 99),
    hold=st.lists(st.floats(0, 9), max_size=3).map(tuple),
    reverse=st.booleans(),
    quality=st.sampled_from(["small", "best"]),
    fps=st.floats(0.01, 240),
    ping_pong=st.booleans(),
    device=st.none() | st.just("cpu"),
    dtype=st.none() | st.just("bfloat16"),
    tf32=st.booleans(),
)


@given(RECIPES)
def test_a_recipe_is_the_same_after_a_file(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    folder = tmp_path_factory.mktemp("recipes")
    assert Recipe.read(recipe.write(folder / "r.toml")) == recipe
    shutil.rmtree(folder)


@given(
    st.dictionaries(st.sampled_from(sorted({*BY_NAME} - {"lora", "style", "prompt", "model", "focus"})), st.just(True)),
    st.data(),
)
def test_its_command_makes_it_again(names: dict[str, bool], data: st.DataObject) -> None:
    """`typed` finds settings that lead to any recipe that settings have led to."""
    values = {
        "frames": st.integers(2, 99),
        "fps": st.sampled_from([1.0, 12.5]),
        "size": st.just((64, 96)),
        "lora_lr": st.just(0.25),
        "fix_lora": st.just(0.5),
        "attention_lambda": st.sampled_from([0.0, 0.3]),
        "guidance": st.just(2.0),
        "audio": st.just("song.wav"),
        "device": st.just("cpu"),
        "dtype": st.just("float32"),
        "vae": st.just("vae.safetensors"),
    }
    typed: dict[str, Any] = {}
    for name in names:
        each = BY_NAME[name]
        if each.is_switch or name in PRESETS:
            typed[name] = not each.is_on
        elif each.limits is not None and each.limits.choices and name != "batch_size":
            typed[name] = data.draw(st.sampled_from(each.limits.choices))
        else:
            typed[name] = data.draw(values.get(name, st.integers(1, 9)))
    recipe = Recipe(("a.png", "b.png")).changed(**typed)
    said = recipe.typed()
    assert said is not None and (
        len(said) <= len(typed) or typed.keys() >= PRESETS.keys()
    )  # it knows one preset at a time
    assert Recipe(("a.png", "b.png")).changed(**said) == recipe
    assert recipe.command().startswith("diffmorpher morph a.png b.png -o a-b.mp4")


def test_a_command_with_loras_has_no_preset_that_takes_them_away() -> None:
    recipe = Recipe(("a", "b"), loras=("x", "y")).changed(attention_mode="outer", reschedule=False)
    assert recipe.command().endswith("--lora x --lora y -o a-b.mp4 --attention-mode outer --no-reschedule")
    assert replace(recipe, lora_hashes=("1", "2")).changed(preview=True).lora_hashes == ()


def test_one_text_is_a_list_of_one_and_an_unknown_setting_is_named() -> None:
    assert Recipe(prompts="a cat").prompts == Recipe().changed(prompt="a cat").prompts == ("a cat",)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="the key 'frame' is not known; did you mean frames"):
        Recipe().changed(frame=3)


def test_what_no_option_says_has_no_command() -> None:
    with pytest.raises(RecipeError, match="no option sets: write it with --save-recipe"):
        Recipe(fit=FitConfig(draws=7)).command()


def test_a_recipe_written_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "story.toml"
    file.write_text('pictures = ["a.png", "b.png"]\nsize = "64x96"\nframes = 24\n[fit]\nsteps = 100\n')
    recipe = Recipe.read(file)
    assert recipe == Recipe(("a.png", "b.png"), size=(64, 96), frames=24, fit=replace(Recipe().fit, steps=100))  # type: ignore[type-var]
    file.write_text('model = "sd15"\nfit = false\n')
    assert Recipe.read(file) == Recipe(model="sd15", fit=None)
    file.write_text('model = "sd15"\nfit = true\n')
    assert Recipe.read(file).fit == FitConfig()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("frame = 3", "the key 'frame' is not known; did you mean frames?"),
        ("colour = 3", "the key 'colour' is not known; there are pictures, prompts"),
        ("[fit]\nstep = 3", "the key 'fit.step' is not known; did you mean fit.steps?"),
        ("fit = 3", "fit is 3, but must be a table of settings or false"),
        ("sample = false", "sample is False, but must be a table of settings."),
        ("frames = 3\nseconds = 3", "frames and seconds contradict each other: leave one out"),
        ("schedule.ease = 'slow'", 'schedule.ease: ease is \'slow\', but must be "linear", "in", "out" or "in-out"'),
        ("schedule.stretch = [1, 0]", "schedule.stretch: stretch is 0, but must be a number above 0"),
        ("frames = '12'", "frames is '12', but must be a whole number"),
        ("frames = 1.5", "frames is 1.5, but must be a whole number"),
        ("[fit]\nsteps = 'many'", "fit.steps: LoRA steps is 'many', but must be a whole number"),
        ("[sample]\nadain = 1", "sample.adain: AdaIN is 1, but must be true or false"),
        ("pictures = 'a.png'", "pictures is 'a.png', but must be a list of texts"),
        ("prompts = [1, 2]", "prompts is [1, 2], but must be a list of texts"),
        ("size = 64", "size is 64, but must be a list"),
        ("size = 'big'", "the size 'big' is not of the form WxH"),
        ("model = 3", "model is 3, but must be a text"),
        ("device = 3", "device is 3, but must be a text"),
        ("loras = ['a']\nfit = false", "loras and fit contradict each other"),
        ("recipe = 99", "recipe is 99, which is no version that this diffmorpher knows"),
        ("recipe = 'x'", "recipe is 'x', which is no version"),
        ("recipe = true", "recipe is True, which is no version"),
        ("recipe = 0", "recipe is 0, which is no version"),
        ("frames = = 3", "cannot be read"),
        ("film = 3", "begin each film with [[film]]"),
        ("out = 3", "out is 3, but must be a text"),
        ("fps = 1" + "0" * 400, "fps is 1000"),
        ("fit.learning_rate = 1" + "0" * 400, "fit.learning_rate: LoRA rate is 1000"),
        ("images = ['a', 'b']", "the key 'images' is not known"),
        ("a = " + "[" * 3000 + "]" * 3000, "cannot be read"),
        ("[[film]]\nname = ['a']", "name is ['a'], but must be a text"),
        ("[[film]]\nframe = 3\n[[film]]\nframes = 3", "film 1: the key 'frame' is not known"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_sentence_that_names_the_key(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "story.toml"
    file.write_text(text)
    with pytest.raises(RecipeError) as error:
        read_recipes(file)
    assert said in str(error.value) and "story.toml" in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_recipe(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "empty").mkdir()
    for name, said in {
        "missing.mp4": "does not exist",
        "plain.png": "holds no recipe: diffmorpher did not make it",
        "empty": "holds no recipe",
        "a.txt": "is no recipe: give a film",
        "broken.mp4": "No settings can be read",
    }.items():
        if name in ("a.txt", "broken.mp4"):
            (tmp_path / name).write_text("nothing")
        with pytest.raises(RecipeError, match=said):
            Recipe.read(tmp_path / name)
    with pytest.raises(OutputError, match=r"must end in \.toml"):
        Recipe().write(tmp_path / "r.json")


def test_a_film_of_an_older_version_is_named_as_one(tmp_path: Path) -> None:
    from diffmorpher.files.films import save_film

    save_film([Image.new("RGB", (8, 8))], tmp_path / "old.mp4", metadata={"diffmorpher": "0.1.0", "frames": 3})
    with pytest.raises(RecipeError, match="before films carried their recipe"):
        Recipe.read(tmp_path / "old.mp4")


def test_other_types_are_named(tmp_path: Path) -> None:
    for name in ("model", "vae", "audio", "device", "dtype"):
        for bad in (5, [], "", "a\0", np.zeros(3)):
            with pytest.raises(ConfigError, match=f"{name} is .* but must be a name"):
                Recipe(("a.png", "b.png"), **{name: bad})
    with pytest.raises(ConfigError, match="model is None"):
        Recipe(model=None)  # type: ignore[arg-type]
    for bad in (None, 5):
        with pytest.raises(RecipeError, match="is read from a path"):
            Recipe.read(bad)  # type: ignore[arg-type]
        with pytest.raises(OutputError, match="is written to a path"):
            Recipe().write(bad)  # type: ignore[arg-type]
        with pytest.raises(ImageError, match="are read from a path"):
            read_settings(bad)  # type: ignore[arg-type]


DOTS, KEY = "." * 70, ".".join("a" * 200_000)


@pytest.mark.parametrize(
    "text",
    [
        f"{KEY} = 1\n",
        f'x = {{y = """\n\'""", {KEY} = 1, z=\'\'}}\n',
        f'a = """b"""", {KEY} = "\n',
        f'a = """b"""""\n{KEY} = 1\n',
        f'a = "\\\\"\n{KEY} = 1\n',
        f'# "\n{KEY} = "#"\n',
        f"[{KEY}]\n",
        "size = " + "".join("{" + ".".join("a" * 60) + " = " for _ in range(120)) + "1" + "}" * 120,
        "prompts = " + "".join("{" + ".".join("a" * 60) + " = " for _ in range(120)) + "1" + "}" * 120,
        "#" * (2**22 + 1),
    ],
    ids=range(10),
)
def test_a_recipe_that_would_take_for_ever_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    began = time.process_time()
    with pytest.raises((RecipeError, ConfigError)):
        Recipe.read(tmp_path / "r.toml")
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (f'# {DOTS}\nprompts = ["x"] # {DOTS}\n', "x"),
        (f'prompts = ["wait {DOTS}"]\n', f"wait {DOTS}"),
        (f"prompts = ['wait {DOTS}']\n", f"wait {DOTS}"),
        (f'prompts = ["""\nwait {DOTS}\n{DOTS}"""]\n', f"wait {DOTS}\n{DOTS}"),
        (f"prompts = ['''\nwait {DOTS}'''''] # it's {DOTS}\n", f"wait {DOTS}''"),
        (f'prompts = ["a \\"quoted\\" # {DOTS}"]\n', f'a "quoted" # {DOTS}'),
    ],
    ids=range(6),
)
def test_dots_in_texts_and_comments_are_no_keys(text: str, prompt: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    assert Recipe.read(tmp_path / "r.toml").prompts == (prompt,)


def test_a_batch_follows_links_of_ones_own(place: Path) -> None:
    for name in ("pear", "rose"):
        shutil.copy(DEMO / f"{name}.png", place / "work")
    recipe = Recipe(("pear.png", "rose.png"))
    (place / "films" / "one.mp4").symlink_to(place / "elsewhere.mp4")
    for name in ("one.mp4", "deep/two.mp4", "..."):
        assert _prepared(recipe, name, place / "films", "film 1")[1] == place / "films" / name
    for name in ("../one.mp4", "a/../../one.mp4", str(place / "films" / "one.mp4"), "..", ""):
        with pytest.raises(ConfigError, match="is not in the batch's folder"):
            _prepared(recipe, name, place / "films", "film 1")


def test_a_batch_with_what_is_common_and_a_table(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text(
        'frames = 5\n[fit]\nsteps = 3\n[[film]]\npictures = ["a.png", "b.png"]\nout = "x.gif"\n'
        '[[film]]\nname = "y"\npictures = ["c.png", "d.png"]\nframes = 7\n[film.fit]\nrank = 2\n'
    )
    (one, x), (two, y) = read_recipes(tmp_path / "b.toml")
    assert (x, y) == ("x.gif", "y.mp4") and (one.frames, two.frames) == (5, 7)
    assert asdict(two.fit)["rank"] == 2 and asdict(two.fit)["steps"] == 3 and asdict(one.fit)["rank"] == 16  # type: ignore[call-overload]
    unnamed = '[[film]]\npictures = ["a.png", "b.png"]\n[[film]]\npictures = ["b.png", "c.png"]\n'
    for text, outs in ((unnamed, ["a-b.mp4", "b-c.mp4"]), (unnamed.rpartition("[[film]]")[0], ["a-b.mp4"])):
        (tmp_path / "b.toml").write_text(text)
        assert [out for _, out in read_recipes(tmp_path / "b.toml")] == outs, "not taken for a batch"
    (tmp_path / "p.csv").write_text(
        "category,name,image_0,image_1,image_2,prompt_0,prompt_1,frames,fit.steps,loop,size\n"
        "cats,n,a.png,b.png,,a cat,,9,4,true,64x64\n,,c.png,d.png,e.png,,,,,,\n"
    )
    (one, n), (two, unnamed) = read_recipes(tmp_path / "p.csv")
    assert (n, unnamed) == ("n.mp4", "c-d-e.mp4")
    assert (one.pictures, one.prompts) == (("a.png", "b.png"), ("a cat",))
    assert (one.frames, asdict(one.fit)["steps"], one.loop, one.size) == (9, 4, True, (64, 64))  # type: ignore[call-overload]
    assert two == Recipe(("c.png", "d.png", "e.png"))
    (tmp_path / "p.csv").write_text("image_0,image_1\na.png,b.png\n\n,\n")  # as spreadsheets end them
    assert len(read_recipes(tmp_path / "p.csv")) == 1


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("frames", "many", "frames is 'many', but must be a whole number"),
        ("foo.bar", "1", "the key 'foo' is not known"),
        ("frames.x", "1", "frames is {'x': '1'}, but must be a whole number"),
        ("fit,fit.steps", "false,3", "a column fit and columns fit.* contradict each other"),
        ("fit.steps,fit", "3,false", "a column fit and columns fit.* contradict each other"),
        ("frames", "3,4", "more cells than there are columns"),
    ],
)
def test_a_mistake_in_a_table(tmp_path: Path, column: str, value: str, said: str) -> None:
    (tmp_path / "p.csv").write_text(f"image_0,image_1,{column}\na.png,b.png,{value}\n")
    with pytest.raises(RecipeError) as error:
        read_recipes(tmp_path / "p.csv")
    assert said in str(error.value) and "p.csv" in str(error.value)


# ---- its files


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """films/ with a recipe of pear and rose in it, and a working folder beside."""
    for folder in ("films", "work"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    hashes = tuple(image_hash(Image.open(DEMO / f"{name}.png").convert("RGB")) for name in ("pear", "rose"))
    Recipe(("pear.png", "rose.png"), picture_hashes=hashes).write(tmp_path / "films/r.toml")
    return tmp_path


def test_pictures_are_found_beside_the_recipe_and_in_the_working_folder(place: Path) -> None:
    shutil.copy(DEMO / "pear.png", place / "films")
    shutil.copy(DEMO / "rose.png", place / "work")
    shutil.copy(DEMO / "tulip.png", place / "films/rose.png")  # another one, before the right one
    recipe, pictures = gather(Recipe.read(place / "films/r.toml"))
    assert [Path(file).resolve() for file in recipe.pictures] == [place / "films/pear.png", place / "work/rose.png"]
    assert recipe.prompts == ("", "") and len(pictures) == 2


def test_a_picture_that_is_missing_or_another_one(place: Path) -> None:
    shutil.copy(DEMO / "pear.png", place / "films")
    recipe = Recipe.read(place / "films/r.toml")
    with pytest.raises(RecipeError, match=r"pictures: 'rose.png' is neither beside .*r.toml nor in the working folder"):
        gather(recipe)
    shutil.copy(DEMO / "tulip.png", place / "films/rose.png")
    with pytest.raises(RecipeError, match=r"pictures: .*rose.png' is another picture than the 'rose.png'"):
        gather(recipe)
    with pytest.raises(RecipeError, match="is another picture than the 'pear.png'"):
        gather(recipe, [DEMO / "rose.png", DEMO / "pear.png"])
    with pytest.raises(RecipeError, match="3 pictures were given for a recipe of 2"):
        gather(recipe, [DEMO / "rose.png"] * 3)
    found, _ = gather(recipe, [DEMO / "pear.png", DEMO / "rose.png"])
    assert found.pictures == (str(DEMO / "pear.png"), str(DEMO / "rose.png"))


def test_hashes_are_one_for_each_file(place: Path) -> None:
    recipe = Recipe.read(place / "films/r.toml")
    pear, tulip = DEMO / "pear.png", DEMO / "tulip.png"
    with pytest.raises(ConfigError, match="picture_hashes are 1 for 2 files: give one for each, or none"):
        gather(replace(recipe, pictures=(str(pear), str(tulip)), picture_hashes=recipe.picture_hashes[:1]))
    with pytest.raises(ConfigError, match="lora_hashes are 1 for 0 files"):
        gather(replace(recipe, lora_hashes=("1",)), [pear, tulip])
    with pytest.raises(RecipeError, match=r"tulip.png' is another picture than the 'tulip.png'"):
        gather(replace(recipe, pictures=()), [pear, tulip])


@pytest.mark.parametrize("name", ["~nosuch.png", "x" * 300, "a\0b"])
def test_names_that_are_no_places(place: Path, name: str) -> None:
    recipe = Recipe.read(place / "films/r.toml")
    for key in ("pictures", "loras"):
        with pytest.raises((RecipeError, ImageError)):
            gather(
                replace(recipe, **{"pictures": (str(DEMO / "pear.png"), str(DEMO / "rose.png"))} | {key: (name, name)})
            )
    with pytest.raises(ImageError):
        gather(Recipe(), [name, name])
    with pytest.raises(RecipeError, match="does not exist"):
        Recipe.read(name)
    with pytest.raises(ModelError, match="is not known"):
        check_model(name)
    assert bare_name(name) == name


def test_a_picture_whose_name_begins_with_a_tilde(place: Path) -> None:
    shutil.copy(DEMO / "pear.png", "~pear.png")
    assert gather(Recipe(("~pear.png", str(DEMO / "rose.png"))))[0].pictures[0] == "~pear.png"


def test_a_recipe_in_a_folder_that_is_a_link(place: Path) -> None:
    (place / "deep/er").mkdir(parents=True)
    (place / "link").symlink_to(place / "deep/er")
    recipe = Recipe((str(DEMO / "pear.png"), str(DEMO / "rose.png")))
    gather(Recipe.read(recipe.write(place / "link/r.toml")))


def test_a_name_that_is_no_utf8_cannot_be_written_down(place: Path) -> None:
    with pytest.raises(OutputError, match=r"r.toml' cannot be written \(.*surrogates"):
        Recipe(("caf\udce9.png", "b.png")).write(place / "r.toml")
    assert not (place / "r.toml").exists()


def test_what_is_changed_is_seen_from_here_and_not_from_the_film(place: Path) -> None:
    for folder in ("films", "work"):
        (place / folder / "model").mkdir()
        (place / folder / "a.safetensors").write_text(folder)
    recipe = Recipe.read(place / "films/r.toml").changed(model="model", lora=["a.safetensors", "b.safetensors"])
    assert recipe.model == str(place / "work/model")
    assert recipe.loras == (str(place / "work/a.safetensors"), "b.safetensors")


def test_neighbours_that_are_the_same_picture() -> None:
    pear, rose = str(DEMO / "pear.png"), str(DEMO / "rose.png")
    with pytest.raises(ImageError, match="are the same picture, so there is nothing to morph"):
        gather(Recipe((pear, pear)))
    gather(Recipe((pear, rose, pear)))
    with pytest.raises(ImageError, match="are the same picture"):
        gather(Recipe((pear, rose, pear), loop=True))


def test_paths_are_seen_from_the_recipes_folder_and_do_not_travel_with_a_film(place: Path) -> None:
    (place / "films/in").mkdir()
    shutil.copy(DEMO / "pear.png", place / "films/in")
    shutil.copy(DEMO / "rose.png", place / "work")
    recipe, _ = gather(Recipe((str(place / "films/in/pear.png"), "rose.png")))
    written = Recipe.read(recipe.write(place / "films/s.toml"))
    assert written.pictures == ("in/pear.png", "../work/rose.png")
    gather(written)
    assert recipe.document()["pictures"] == ["pear.png", "rose.png"]
    assert str(place) not in str(recipe.document())


def test_a_local_models_folder_does_not_travel_either(place: Path) -> None:
    (place / "films/my-model").mkdir()
    recipe = Recipe(model=str(place / "films/my-model"))
    assert recipe.document()["model"] == "my-model"
    written = Recipe.read(recipe.write(place / "films/s.toml"))
    assert written.model == "my-model"
    shutil.copy(DEMO / "pear.png", place / "films")
    shutil.copy(DEMO / "rose.png", place / "films")
    found, _ = gather(replace(written, pictures=("pear.png", "rose.png")))
    assert Path(found.model) == place / "films/my-model"


def test_lora_files_are_looked_at_too(place: Path) -> None:
    (place / "films/a.safetensors").write_bytes(b"one")
    (place / "films/b.safetensors").write_bytes(b"two")
    shutil.copy(DEMO / "pear.png", place / "films")
    shutil.copy(DEMO / "rose.png", place / "films")
    recipe = replace(Recipe.read(place / "films/r.toml"), loras=("a.safetensors", "b.safetensors"))
    found, _ = gather(recipe)
    assert len(found.lora_hashes) == 2
    (place / "films/b.safetensors").write_bytes(b"three")
    with pytest.raises(RecipeError, match=r"loras: .*b.safetensors' is another file"):
        gather(replace(recipe, lora_hashes=found.lora_hashes))
    (place / "work/b.safetensors").write_bytes(b"two")  # the right one, behind another
    assert gather(replace(recipe, lora_hashes=found.lora_hashes))[0].loras[1] == "b.safetensors"
    (place / "work/b.safetensors").unlink()
    (place / "films/b.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"loras: 'b.safetensors' is neither beside"):
        gather(recipe)
