"""What a reader of a result's README.md finds there: code that runs, what was trained on what, how well it went, and
nothing of the user's own."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cards import code_in, run_code
from conftest import load_script
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from huggingface_hub import ModelCard
from image_data import write_image_folder
from PIL import Image
from reach_hub import reaching
from running import SCRIPTS
from shards import write_shards
from training import parse, read_log, train

from sdtune import model_card
from sdtune.model_card import describe_gain, find_licence, find_trigger, load_base_lines, plain

TORCH = [path for path in SCRIPTS if not path.stem.endswith("_flax")]
SECRETS = ("hf_a_secret_token", "private_recipe", "private_cache", "private_photos", "private_classes", "my_project")
PROMPT = "a sks star"


@pytest.fixture(scope="module")
def place(tiny_pipeline, tmp_path_factory):
    """A folder with a base that has a licence, and 12 images of a folder whose name nobody is to know."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "small_base").symlink_to(tiny_pipeline, target_is_directory=True)
    captions = [f"sks, a {colour} square" for colour in ("red", "green", "blue")] * 4
    write_image_folder(folder / "private_photos", 12, captions=captions)
    (folder / "private_recipe.yaml").write_text("noise_offset: 0.05\n")
    return folder


@pytest.fixture(scope="module")
def scripts():
    """The scripts in PyTorch as modules, by name."""
    return {path.stem: load_script(path) for path in TORCH}


def fit(scripts, name, place, output, **settings):
    """Trains four steps of a script from the base and images in `place`; returns the exit status."""
    own = {
        "config": place / "private_recipe.yaml",
        "cache_dir": place / "private_cache",
        "hub_token": "hf_a_secret_token",
        "tracker_project_name": "my_project",
        "num_validation_samples": 2,
        "validation_prompt": PROMPT,
        "num_validation_images": 2,
        "validation_num_inference_steps": 2,
        "validation_guidance_scale": 2.0,
    }
    if "dreambooth" in name:
        own |= {"train_data_dir": None, "instance_data_dir": place / "private_photos", "instance_prompt": PROMPT}
        own |= {"with_prior_preservation": True, "class_data_dir": place / "private_classes", "num_class_images": 3}
        own |= {"class_prompt": "a star", "repeats": 2}
    return train(scripts[name], place / "small_base", place / "private_photos", output, **{**own, **settings})


@pytest.fixture(scope="module")
def results(scripts, place):
    """Factory: results(name of a script) -> the output folder of a run, its name that of the script."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = place / f"out_{name}"
            assert fit(scripts, name, place, made[name]) == 0
        return made[name]

    return make


every_script = pytest.mark.parametrize("name", [path.stem for path in TORCH])


def card_of(folder):
    """The text of a card below its front matter."""
    return ModelCard.load(Path(folder) / "README.md").text


def section(text, heading):
    """The lines below a heading that are not empty."""
    inside = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [line for line in inside.splitlines() if line]


# ----------------------------------------------------------------------------------------------------- a run of each


@every_script
def test_code_draws_with_the_result(results, place, tiny_pipeline, name, monkeypatch):
    """In the size of training, as samples were drawn; and something else than the base. Of adapters at scale 0, just
    what the base draws."""
    code = code_in(card_of(results(name)))
    picture, pipe = run_code(code, place, monkeypatch)
    torch.manual_seed(0)
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 32, "width": 32}
    base = StableDiffusionPipeline.from_pretrained(tiny_pipeline)(PROMPT, **settings).images[0]
    assert picture.shape == (32, 32, 3)
    assert np.abs(picture - np.asarray(base, dtype=int)).max() > 0
    assert type(pipe.scheduler) is PNDMScheduler
    if name.endswith("_lora"):
        assert code.count('{"scale": 1.0}') == 1
        without, _ = run_code(code.replace('{"scale": 1.0}', '{"scale": 0.0}'), place, monkeypatch)
        assert np.array_equal(without, np.asarray(base, dtype=int))
        assert len([line for line in code.splitlines() if len(line) > 100]) == 0


@every_script
def test_front_matter_is_what_the_hub_reads(results, name):
    data = ModelCard.load(results(name) / "README.md").data.to_dict()
    is_subject, is_lora = "dreambooth" in name, name.endswith("_lora")
    tags = ["text-to-image", "stable-diffusion", "stable-diffusion-diffusers"]
    assert data == {
        "license": "other",
        "license_name": "as-the-base",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": tags + is_subject * ["dreambooth"] + is_lora * ["lora"],
        "instance_prompt": PROMPT if is_subject else "sks",
        "widget": [{"text": PROMPT, "output": {"url": "samples/step-000004.png"}}],
    }


@every_script
def test_card_says_what_was_trained(results, name):
    folder = results(name)
    text = card_of(folder)
    is_subject, is_lora = "dreambooth" in name, name.endswith("_lora")
    images = "10 photos of one subject, beside 3 images of its class" if is_subject else "10 images with captions"
    trained = ("DreamBooth: " if is_subject else "") + ("LoRA adapters for" if is_lora else "the UNet of")
    trigger = PROMPT if is_subject else "sks"
    first = f"{trained[0].upper()}{trained[1:]} *small_base*, trained on {images}."
    lines = [line for line in text.splitlines() if line]
    assert lines[:2] == [f"# out_{name}", f"{first} Put **{trigger}** into a prompt to draw what it learnt."]
    assert lines[2:4] == ["![samples](samples/step-000004.png)", f"Prompt: {PROMPT}"]
    assert lines[5] == "![samples of the base](samples/step-000000.png)"
    assert (folder / "samples" / "step-000000.png").is_file()
    with Image.open(folder / "samples" / "step-000004.png") as image:
        assert image.size == (64, 32)

    before, after = [row for row in read_log(folder) if "held_out_loss" in row]
    loss, gain = after["held_out_loss"], after["held_out_gain"]
    assert loss + gain == pytest.approx(before["held_out_loss"], abs=1e-6)
    epochs = "0.4 epochs" if is_subject else "0.8 epochs"  # 8 of 20, where each photo counts twice, or of 10 images
    assert section(text, "How it was trained")[:3] == [
        f"- On {images}, at 32 x 32 pixels.",
        f"- For 4 steps of 2 images each, which is {epochs}, at a learning rate of at most 0.001.",
        f"- On 2 images that were not trained on, the loss {'fell' if gain >= 0 else 'rose'} by {abs(gain):.4f}, from "
        f"{loss + gain:.4f} to {loss:.4f}; these are too few to say how sure that is.",
    ]
    assert section(text, "Licence") == ["Not known here: the licence of the base holds."]


SETTINGS = {
    "train_text_to_image": [],
    "train_text_to_image_lora": [],
    "train_dreambooth": ["instance_prompt | a sks star | -", "repeats | 2 | 1"],
    "train_dreambooth_lora": ["instance_prompt | a sks star | -", "repeats | 2 | 1"],
}
OF_CLASS = ["with_prior_preservation | True | False", "class_prompt | a star | -", "num_class_images | 3 | -"]
RATES = {"train_dreambooth": "5e-06"}


@every_script
def test_card_lists_the_settings_that_are_no_defaults(results, name):
    rows = section(card_of(results(name)), "How it was trained")[3:]
    is_subject = "dreambooth" in name
    expected = [*SETTINGS[name], "resolution | 32 | 512", *(OF_CLASS if is_subject else [])]
    expected += ["noise_offset | 0.05 | 0.0", f"learning_rate | 0.001 | {RATES.get(name, '0.0001')}"]
    expected += [f"train_batch_size | 2 | {4 if is_subject else 16}"]
    assert rows[0] == "Settings that are not the script's defaults:"
    assert rows[1:3] == ["| setting | here | default |", "|---|---|---|"]
    assert rows[3:] == [f"| `--{row.replace(' |', '` |', 1)} |" for row in expected]


@every_script
def test_card_holds_nothing_of_the_user_s_own(results, place, tiny_pipeline, name):
    text = (results(name) / "README.md").read_text()
    for private in (*SECRETS, str(place), str(tiny_pipeline), tiny_pipeline.name, place.name):
        assert private not in text


@every_script
def test_card_of_a_run_that_was_resumed_is_that_of_one_that_was_not(scripts, results, place, tmp_path, name):
    folder = tmp_path / f"out_{name}"
    assert fit(scripts, name, place, folder, max_train_steps=2) == 0
    assert "- For 2 steps of 2 images each, " in card_of(folder)
    assert fit(scripts, name, place, folder, resume_from_checkpoint="latest") == 0
    assert (folder / "README.md").read_text() == (results(name) / "README.md").read_text()


def test_card_says_that_settings_changed(scripts, place, tmp_path):
    folder, name = tmp_path / "out", "train_text_to_image"
    assert fit(scripts, name, place, folder, max_train_steps=2) == 0
    changed = {"resume_from_checkpoint": "latest", "allow_changed_resume": True, "learning_rate": 2e-3}
    assert fit(scripts, name, place, folder, **changed) == 0
    (line,) = [line for line in card_of(folder).splitlines() if line.startswith("- For ")]
    told = "The run was resumed under changed settings: those below are of its last part."
    assert line.endswith(f"at a learning rate of at most 0.002. {told}")


# --------------------------------------------------------------------------------------------------------- scheduler


ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def test_adapters_come_with_the_schedule_that_they_were_trained_under(scripts, place, tmp_path, monkeypatch):
    (tmp_path / "small_base").symlink_to(place / "small_base")
    for number, settings in enumerate([{"prediction_type": "v_prediction"}, ZERO_SNR]):
        folder = tmp_path / f"out{number}"
        assert fit(scripts, "train_text_to_image_lora", place, folder, max_train_steps=1, **settings) == 0
        text = card_of(folder)
        _, pipe = run_code(code_in(text), tmp_path, monkeypatch)
        assert pipe.scheduler.config.prediction_type == "v_prediction"
        is_zero_snr = settings == ZERO_SNR
        assert type(pipe.scheduler) is (DDIMScheduler if is_zero_snr else PNDMScheduler)
        assert ("guidance_rescale=0.7" in text) == is_zero_snr
        if is_zero_snr:
            assert pipe.scheduler.config.rescale_betas_zero_snr
            assert pipe.scheduler.config.timestep_spacing == "trailing"
        assert "trained under another schedule than the base's" in text
        assert "It predicts `v_prediction`." in text


def test_adapters_for_a_base_that_predicts_v_set_nothing(scripts, tiny_pipeline_v, place, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    assert fit(scripts, "train_text_to_image_lora", place, folder, pretrained_model_name_or_path=tiny_pipeline_v) == 0
    text = card_of(folder)
    assert "scheduler" not in code_in(text)
    assert "It predicts `v_prediction`." in text
    (tmp_path / tiny_pipeline_v.name).symlink_to(tiny_pipeline_v)
    _, pipe = run_code(code_in(text), tmp_path, monkeypatch)
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_a_pipeline_brings_its_schedule(scripts, place, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    assert fit(scripts, "train_text_to_image", place, folder, max_train_steps=1, **ZERO_SNR) == 0
    text = card_of(folder)
    _, pipe = run_code(code_in(text), tmp_path, monkeypatch)
    assert type(pipe.scheduler) is DDIMScheduler
    assert pipe.scheduler.config.rescale_betas_zero_snr
    assert '`timestep_spacing="trailing"`. If pictures look burnt, give `guidance_rescale=0.7` to `pipe`.' in text


def test_a_pipeline_without_text_encoder_takes_the_base_s(scripts, place, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    assert fit(scripts, "train_dreambooth", place, folder, max_train_steps=1, skip_save_text_encoder=True) == 0
    assert not (folder / "text_encoder").exists()
    (tmp_path / "small_base").symlink_to(place / "small_base")
    _, pipe = run_code(code_in(card_of(folder)), tmp_path, monkeypatch)
    assert pipe.text_encoder is not None


# ------------------------------------------------------------------------------------------------------------- parts


def test_text_of_others_stays_text():
    assert plain("two\nlines  and `a` *b* [c](d) <e> | f & g") == (
        r"two lines and \`a\` \*b\* \[c\](d) \<e\> \| f \& g"
    )
    assert plain("_a_ snake_case") == r"\_a\_ snake_case"


def test_code_takes_any_prompt(tmp_path):
    prompt = 'say "hi"\n```\nimport os \\ end'
    usage = model_card.Usage([], [], {"negative_prompt": prompt, "height": 8}, [])
    code = code_in(model_card.code_of(usage, prompt)).split("pipe.to", 1)[1].split("\n", 1)[1]
    drawn = []

    def pipe(*args, **settings):
        drawn.append((args, settings))
        return SimpleNamespace(images=[Image.new("RGB", (8, 8))])

    exec(code.replace("picture.png", str(tmp_path / "picture.png")), {"pipe": pipe})
    assert drawn == [((prompt,), {"negative_prompt": prompt, "height": 8})]


@pytest.mark.parametrize(
    "captions, trigger",
    [
        ([["sks, a cat"], ["sks, a dog"]], "sks"),
        ([["a b c, one", "a b c, two"]], "a b c"),
        ([["sks, a cat"], ["a dog"]], None),
        ([["a cat"], ["a cat"]], None),
        ([["sks, a cat"]], None),  # of one caption nobody can tell
        ([[", a"], [", b"]], None),
        ([], None),
    ],
)
def test_trigger_is_what_all_captions_begin_with(captions, trigger):
    assert find_trigger({"captions": captions}) == trigger


@pytest.mark.parametrize("name", ["train_text_to_image", "train_text_to_image_lora"])
def test_card_of_a_stream_counts_no_images(scripts, place, tmp_path, name):
    shards, folder = write_shards(tmp_path / "private_shards", "tar", [5, 4]), tmp_path / "out"
    settings = {"train_data_dir": None, "dataset_name": shards, "streaming": True, "max_train_steps": 2}
    assert fit(scripts, name, place, folder, **settings) == 0
    text = card_of(folder)
    assert section(text, "How it was trained")[:2] == [
        "- On a stream of images with captions, at 32 x 32 pixels.",
        "- For 2 steps of 2 images each, at a learning rate of at most 0.001.",
    ]
    assert "Put **" not in text
    assert "private" not in (folder / "README.md").read_text()


def run_with(log, number, folder):
    """A run with so many held-out images and a log."""
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return SimpleNamespace(progress={"base_losses": [0.5] * number})


@pytest.mark.parametrize(
    "gain, error, number, said",
    [
        (
            0.2,
            0.01,
            24,
            "the loss fell by 0.2000, from 0.6000 to 0.4000. With a confidence of about 95 % the gain is "
            "between 0.1800 and 0.2200",
        ),
        (
            -0.1,
            0.02,
            10,
            "the loss rose by 0.1000, from 0.3000 to 0.4000. With a confidence of about 95 % the gain is "
            "between -0.1400 and -0.0600",
        ),
        (
            0.01,
            0.01,
            30,
            "the loss fell by 0.0100, from 0.4100 to 0.4000. With a confidence of about 95 % the gain is "
            "between -0.0100 and 0.0300: it may be chance",
        ),
        (0.2, 0.0, 1, "the loss fell by 0.2000, from 0.6000 to 0.4000; these are too few to say how sure that is"),
    ],
)
def test_gain_comes_with_its_interval(tmp_path, gain, error, number, said):
    rows = [{"step": 0, "held_out_loss": 9.0, "held_out_gain": 0.0, "gain_error": 0.0}, {"step": 1, "loss": 1.0}]
    rows += [{"step": 8, "held_out_loss": 0.4, "held_out_gain": gain, "gain_error": error}]
    run = run_with(rows, number, tmp_path)
    images = "1 image that was" if number == 1 else f"{number} images that were"
    assert describe_gain(parse(f"--output_dir={tmp_path}"), run) == f"On {images} not trained on, {said}"


def test_no_gain_is_made_up(tmp_path):
    args = parse(f"--output_dir={tmp_path}")
    assert describe_gain(args, SimpleNamespace(progress={"base_losses": [1.0]})) is None  # there is no log
    assert describe_gain(args, run_with([{"step": 1, "loss": 1.0}], 0, tmp_path)) is None


@pytest.mark.parametrize(
    "front_matter, found, said",
    [
        ("license: mit", {"license": "mit"}, "mit, which is that of the base."),
        (
            "license: other\nlicense_name: my-own\nlicense_link: https://example.org/a",
            {"license": "other", "license_name": "my-own", "license_link": "https://example.org/a"},
            "[my-own](<https://example.org/a>), which is that of the base.",
        ),
        (
            "license: other\nlicense_name: x\nlicense_link: javascript:a",
            {"license": "other", "license_name": "x"},
            "x, which is that of the base.",
        ),
        ("tags: [a]", {}, "Not known here: the licence of the base holds."),
        ("license: [mit]\nlicense_name: x", {}, "Not known here: the licence of the base holds."),
        ("license: [", {}, "Not known here: the licence of the base holds."),
    ],
)
def test_licence_is_that_of_the_base(tmp_path, front_matter, found, said):
    (tmp_path / "README.md").write_text(f"---\n{front_matter}\n---\n# A base\n")
    assert find_licence(parse(f"--pretrained_model_name_or_path={tmp_path}")) == found
    assert model_card.describe_licence(found) == said


def test_licence_of_a_base_of_the_hub_is_asked_for_there(fake_hub, monkeypatch):
    fake_hub.add_repo("somebody/base", {"README.md": b"---\nlicense: openrail++\n---\n# A base\n"})
    args = parse("--pretrained_model_name_or_path=somebody/base")
    assert find_licence(args) == {}  # which costs nothing without a connection
    with reaching(fake_hub, monkeypatch):
        assert find_licence(args) == {"license": "openrail++"}


def test_a_link_of_a_hub_card_to_a_file_beside_it_becomes_one_to_the_base(fake_hub, monkeypatch):
    card = b"---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE.md\n---\n# A base\n"
    fake_hub.add_repo("somebody/base", {"README.md": card})
    with reaching(fake_hub, monkeypatch):
        found = find_licence(parse("--pretrained_model_name_or_path=somebody/base"))
    assert found["license_link"] == "https://huggingface.co/somebody/base"


def test_a_base_that_is_gone_is_no_name_of_the_hub(tmp_path):
    """A run may outlive the scratch disk that it loaded from."""
    args = parse(f"--pretrained_model_name_or_path={tmp_path / 'gone'}")
    training = model_card.Training("LoRA adapters for", "4 images", None, ["lora"])
    data = model_card.make_front_matter(args, {}, ["a"], None, training)
    assert (data.base_model, data.to_dict().get("license_link")) == (None, None)
    assert str(tmp_path) not in data.to_yaml()


def test_a_base_of_the_hub_is_linked_and_loaded_as_it_was(tmp_path, monkeypatch):
    base = "--pretrained_model_name_or_path=somebody/base"
    args = parse(base, "--revision=v2", "--variant=fp16", "--dataset_name=somebody/photos")
    lines, load = load_base_lines(args)
    assert lines == ['base = "somebody/base"']
    assert load == 'StableDiffusionPipeline.from_pretrained(base, revision="v2", variant="fp16")'
    training = model_card.Training("LoRA adapters for", "4 images", None, ["lora"])
    data = model_card.make_front_matter(args, {}, ["a", "b", "a"], "samples/step-000001.png", training)
    assert data.base_model == "somebody/base"
    assert data.datasets == ["somebody/photos"]
    assert data.license_link == "https://huggingface.co/somebody/base"
    assert data.to_dict()["widget"] == [{"text": "a"}, {"text": "b"}]  # one picture of both is neither's

    monkeypatch.chdir(tmp_path)
    Path("somebody/photos").mkdir(parents=True)  # a folder of that name is what was trained on
    data = model_card.make_front_matter(args, {}, [], None, training)
    assert data.datasets is None
    assert data.widget is None


def test_a_base_in_one_file_is_named_without_its_path(tmp_path):
    file = tmp_path / "v1-5-pruned.safetensors"
    file.write_bytes(b"")
    lines, load = load_base_lines(parse(f"--pretrained_model_name_or_path={file}", "--single_file_config=a/b"))
    assert lines == ['base = "v1-5-pruned.safetensors"  # which is not on the Hub: give the path to it']
    assert load == 'StableDiffusionPipeline.from_single_file(base, config="a/b")'
    _, load = load_base_lines(parse(f"--pretrained_model_name_or_path={file}", f"--single_file_config={tmp_path}"))
    assert load == "StableDiffusionPipeline.from_single_file(base)"


@pytest.mark.parametrize("path", TORCH, ids=[path.stem for path in TORCH])
def test_no_flag_brings_a_path_or_a_secret_onto_the_card(scripts, path, tmp_path, monkeypatch):
    """Whatever flags of text there are or will be: those of paths, names and tokens by their type."""
    parser = scripts[path.stem].make_parser()
    open_texts = "revision non_ema_revision variant instance_prompt class_prompt lr_step_rules".split()
    texts = [action.dest for action in parser._actions if action.nargs is None and isinstance(action.dest, str)]
    numbers = (int, float, bool)
    args = parser.parse_args([])
    texts = [name for name in texts if name in args and not isinstance(vars(args)[name], numbers)]
    choices = [action.dest for action in parser._actions if action.choices]
    typed = [action.dest for action in parser._actions if action.type and "name" not in action.type.__name__]
    texts = [name for name in texts if name not in [*choices, *set(typed) - {"hub_token"}]]
    assert {"hub_token", "output_dir", "dataset_name", "report_to", "config", "logging_dir"} <= set(texts)
    args = SimpleNamespace(**{**vars(args), **{name: f"SECRET_{name}" for name in texts}})
    run = SimpleNamespace(settings={"mixed_precision": "bf16"})
    rows = scripts[path.stem].list_settings(args, parser, run)
    shown = {match[1] for row in rows if (match := re.search("SECRET_([a-z_]+)", row))}
    assert shown == set(open_texts) & set(texts)
    monkeypatch.chdir(tmp_path)
    Path("SECRET_variant").mkdir()
    assert "SECRET_variant" not in "".join(scripts[path.stem].list_settings(args, parser, run))
    assert "| `--mixed_precision` | bf16 | no |" in rows
    assert len(rows) == 5 + len(shown)
