"""Whatever a user gets wrong, what they read is short, says what is wrong with what, and how to go on."""

import json
import re
import resource
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from conftest import load_script
from image_data import write_image_folder
from running import REPO, SCRIPTS, TRAIN_TEXT_TO_IMAGE, TRAIN_TEXT_TO_IMAGE_LORA, status_of
from shards import make_rows, write_tar
from training import train, words

from sdtune import __main__ as sdtune
from sdtune.arguments import nearest_beside
from sdtune.errors import MAKERS, InputError, counted, fitted, raise_problems, remedy_for_missing, told_in_lines
from sdtune.images import NO_CAPTION, leave_out

MAX_LINES, COLUMNS = 12, 100  # the second one is what conftest.py sets
# How a remedy begins, behind a semicolon, a full stop, a comma or an "or"; or what is accepted.
VERBS = """
    accelerate add adds check choose convert copy download drop end export follow get give go grant install leave log
    lower make mend move name put raise remove rename run see set show shrink start take use wait work write
"""
REMEDY = re.compile(
    rf"(?:[;.,(:] |\bor |\band |^\s*)(?i:{'|'.join(VERBS.split())})\b"
    r"|did you mean [\w-]+\?|\bmust be \S+|choose from |run `",
    re.MULTILINE,
)
LONG = 300 * "n"
every_script = pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])


@pytest.fixture(scope="module")
def scripts(train_script):
    """The training scripts as modules, by path."""
    return {path: train_script if path == TRAIN_TEXT_TO_IMAGE else load_script(path) for path in SCRIPTS}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", 4)


def check_message(said, values=()):
    """Asserts what holds for every message: short, no traceback, each mistake with a remedy."""
    lines = said.strip("\n").split("\n")
    assert "Traceback" not in said
    assert 1 <= len(lines) <= MAX_LINES, said
    for line in lines:
        for value in sorted(map(str, values), key=len, reverse=True):
            line = line.replace(value, "")
        is_one_word = len(line.split()) == 1  # a path, which is not cut
        assert len(line) <= COLUMNS or is_one_word or re.search(r"\S{60}", line), line
    told = re.sub(r"\n {4,}", " ", said.strip("\n"))  # lines that were broken
    first, *rest = told.split("\n")
    if re.fullmatch(r"\S+( [\w-]+)?: ", first):  # a list of mistakes
        for mistake in rest:
            assert REMEDY.search(mistake) or mistake.startswith("  and "), mistake
    else:
        assert REMEDY.search(told.partition(": ")[2] or told), told


def line_for(path, base, folder, out, **settings):
    """The settings of a command line of a script that is right, but for `settings`."""
    if "dreambooth" in path.stem and "train_data_dir" in settings:
        settings["instance_data_dir"] = settings.pop("train_data_dir")
    if "dreambooth" in path.stem:
        settings = {"train_data_dir": None, "instance_data_dir": folder, "instance_prompt": "a sks photo", **settings}
    return base, folder, out, settings


def run(scripts, path, base, folder, out, **settings):
    base, folder, out, settings = line_for(path, base, folder, out, **settings)
    return train(scripts[path], base, folder, out, **settings)


# ---------------------------------------------------------------------------------------------------- flags

VALUES = {  # words, and what the message has to name
    "int": ("--resolution=0", "--resolution: must be a whole number in [1, inf), not '0'"),
    "number": ("--learning_rate=-1", "--learning_rate: must be in (0, inf), not '-1'"),
    "nan": ("--max_grad_norm=nan", "--max_grad_norm: must be in (0, inf], not 'nan'"),
    "fraction": ("--caption_dropout=2", "--caption_dropout: must be in [0, 1], not '2'"),
    "seed": ("--seed=-1", "--seed: must be a whole number in [0, 9e18], not '-1'"),
    "choice": ("--lr_scheduler=cosin", "--lr_scheduler: invalid choice: 'cosin' (choose from "),
    "no_value": ("--output_dir", "--output_dir: lacks its value; give one behind it, such as FLAG=VALUE"),
    "switch": ("--random_flip=yes", "--random_flip/--no-random_flip: takes no value; use --random_flip or "),
    "misspelt": ("--resolutoin=32", "--resolutoin: is no flag; did you mean --resolution?"),
    "prefix": ("--resol=32", "--resol: is no flag; did you mean --resolution?"),
    "dashes": ("--output-dir=x", "--output-dir: is no flag; did you mean --output_dir?"),
    "one_dash": ("-seed=3", "-seed: is no flag; did you mean --seed?"),
    "negated": ("--no-randomflip", "--no-randomflip: is no flag; did you mean --no-random_flip?"),
    "unknown": ("--frobnicate=1", "--frobnicate: is no flag; --help lists all, drop this"),
    "stray": ("stray", "'stray': is no flag, nor the value of one; drop it, or put quotes around words"),
    "number_of_bytes": (f"--tracker_project_name={LONG}", "--tracker_project_name: holds a zero, or names of more"),
    "hub_id": (f"--hub_model_id={LONG}", "--hub_model_id: must be a name or owner/name of at most 96 letters"),
    "token": ("--hub_token=a b", "--hub_token: is empty, or holds spaces or other letters than ASCII's; copy it"),
    "no_tracker": ("--report_to=nothing", "--report_to=nothing: installed are "),
    "logs": ("--logging_dir=.", "--logging_dir=.: is --output_dir itself; name a folder in it"),
    "not_utf_8": ("--tracker_project_name=\udcff", r"--tracker_project_name=\udcff: is not UTF-8; if it is, set PYTH"),
    "warm_up": ("--validation_steps=3", "--validation_steps=3: does nothing without --validation_prompt"),
    "best": ("--keep_best", "--keep_best=True: does nothing without --num_validation_samples; add that or drop this"),
    "divided": ("--resolution=33", "--resolution=33: must be a multiple of 8 for this VAE; use 32"),
    "model": (
        "--pretrained_model_name_or_path=nobody/nothing",
        "nobody/nothing: there is no such folder here, no whole c",
    ),
    "tokenizer": ("--tokenizer_name=no/where", "--tokenizer_name=no/where: there is no such folder here, n"),
    "single": ("--single_file_config=x", "--single_file_config=x: is for a single file alone; drop this, or name one"),
    "no_file": ("--pretrained_model_name_or_path=gone.ckpt", "gone.ckpt: there is no such file; name a pipeline"),
    "resume": ("--resume_from_checkpoint=gone", "--resume_from_checkpoint=gone: is no whole checkpoint folder; name"),
    "allow": ("--allow_changed_resume", "--allow_changed_resume=True: does nothing without --resume_from_checkpoint"),
    "held_out": ("--num_validation_samples=4", "--num_validation_samples=4: must leave some of 4 images"),
    "no_config": ("--config=gone.yaml", "--config=gone.yaml: there is no such file; name one\n"),
}


@every_script
@pytest.mark.parametrize("case", VALUES)
def test_wrong_words(case, path, scripts, tiny_pipeline, images, tmp_path, capsys):
    word, told = VALUES[case]
    base, folder, out, settings = line_for(path, tiny_pipeline, images, tmp_path / "out")
    argv = [*words(base, folder, out, **settings), word]
    assert status_of(scripts[path].main, *argv) == 2
    said = capsys.readouterr().err
    assert told in re.sub(r"\n {4,}", " ", said)
    check_message(said, [tiny_pipeline, images, tmp_path])
    assert not (tmp_path / "out").exists()


@every_script
def test_all_wrong_words_at_once(path, scripts, tiny_pipeline, images, tmp_path, capsys):
    """As many as fit are told, and how many more there are."""
    argv = ["--resolutoin=3", "--output_dri", "x", "--seed=a", "--frobnicate", "1", "stray", "--caption_dropout=2"]
    argv += [f"--pretrained_model_name_or_path={tiny_pipeline}"]
    assert status_of(scripts[path].main, *argv) == 2
    said = re.sub(r"\n {4,}", " ", capsys.readouterr().err)
    for told in (
        "--resolutoin: is no flag",
        "--output_dri: is no flag; did you mean --output_dir?",
        "--seed: must be",
    ):
        assert said.count(told) == 1
    for told in ("--frobnicate: is no flag", "'stray': is no flag", "--caption_dropout: must be"):
        assert said.count(told) == 1
    assert "--output_dir=None" not in said  # which is what was meant
    check_message(said, [tiny_pipeline])


@every_script
def test_missing_flags_are_called_missing(path, scripts, capsys):
    folder_flag = "instance_data_dir" if "dreambooth" in path.stem else "train_data_dir"
    assert status_of(scripts[path].main) == 2
    raw = capsys.readouterr().err
    said = re.sub(r"\n {4,}", " ", raw)
    assert f"  --{folder_flag} is missing: give a folder of images, or a dataset by --dataset_name\n" in said
    assert "  --pretrained_model_name_or_path is missing: name a pipeline folder, a Hub id or a file\n" in said
    assert "None" not in said
    check_message(raw)


@pytest.mark.parametrize(
    "model, data, maker",
    [
        ("miniature/pipeline", "demo/creatures", "make demo"),
        ("./miniature/pipeline/", "demo/subject/", "make demo-dreambooth"),
        ("demo/model", "demo/emoji/train", "make demo-emoji"),
    ],
)
def test_a_path_of_the_readmes_says_how_it_is_made(
    model, data, maker, scripts, tiny_pipeline, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert status_of(scripts[TRAIN_TEXT_TO_IMAGE].main, *words(model, data, tmp_path / "out")) == 2
    raw = capsys.readouterr().err
    said = re.sub(r"\n {4,}", " ", raw)
    makes = f"run `{maker}` in the folder of the repository, which makes it"
    assert f"  --train_data_dir={data}: does not exist, or is no folder; {makes}\n" in said
    comes = "start in the folder of the repository, which it comes with"
    made = "run `make demo` in the folder of the repository, which makes it" if model == "demo/model" else comes
    assert f"  --pretrained_model_name_or_path={model}: does not exist; {made}\n" in said
    check_message(raw, [tmp_path])
    shutil.copytree(tiny_pipeline, Path(model))  # then it is not missed
    assert status_of(scripts[TRAIN_TEXT_TO_IMAGE].main, *words(model, data, tmp_path / "out")) == 2
    assert f"{model}: does not exist" not in capsys.readouterr().err


MISTYPED = {  # the words behind `sdtune`, and what is named
    "caption": (["caption", "my_pictres"], "FOLDER=my_pictres: does not exist, or is no folder{}; name a folder of"),
    "report": (["report", "./my_pictres"], "my_pictres: there is no such folder{}; name the --output_dir of a run"),
    "generate": (
        ["generate", "x", "--lora=my_pictres:0.5"],
        "--lora=my_pictres:0.5: my_pictres does not exist{}; name",
    ),
    "evaluate": (
        ["evaluate", "x", "--lora=my_pictres/"],
        "--lora=my_pictres/: my_pictres does not exist{}; name a Lo",
    ),
    "push_model": (["push-model", "my_pictres", "me/mine"], "FOLDER=my_pictres: is no folder{}; name "),
    "push_dataset": (["push-dataset", "my_pictres/", "me/mine"], "FOLDER=my_pictres/: is no folder{}; name "),
    "convert": (
        ["convert", "my_pictres", "x"],
        "my_pictres: is no pipeline folder and no .safetensors or .ckpt file{};",
    ),
    "convert_lora": (
        ["convert-lora", "my_pictres", "x", "--to=kohya"],
        "my_pictres: does not exist{}; give a LoRA file",
    ),
}


@pytest.mark.parametrize("case", MISTYPED)
def test_a_mistyped_path_of_a_command_is_corrected(case, tmp_path, capsys, monkeypatch):
    argv, told = MISTYPED[case]
    monkeypatch.chdir(tmp_path)
    for name, meant in (("my_pictures", " (did you mean my_pictures?)"), ("other", "")):
        (tmp_path / name).mkdir()
        assert status_of(sdtune.main, *argv) == 2
        raw = capsys.readouterr().err
        assert told.format(meant) in re.sub(r"\n {4,}", " ", raw)
        check_message(raw, [tmp_path])
        (tmp_path / name).rmdir()


@every_script
def test_a_mistyped_folder_of_images_is_corrected(path, scripts, tiny_pipeline, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(images.parent)
    for folder, meant in ((f"{images.name[:-1]}/", f" (did you mean {images.name}?)"), ("x", "")):
        flag = "instance_data_dir" if "dreambooth" in path.stem else "train_data_dir"
        assert run(scripts, path, tiny_pipeline, folder, tmp_path / "out", **{flag: folder}) == 2
        said = re.sub(r"\n {4,}", " ", capsys.readouterr().err)
        assert f"--{flag}={folder}: does not exist, or is no folder{meant}; name one\n" in said


@pytest.mark.parametrize(
    "flag, name, meant",
    [
        ("pretrained_model_name_or_path", "miniature/pipelin", "miniature/pipeline"),
        ("config", "examples/configs/demo_creature.yaml", "examples/configs/demo_creatures.yaml"),
    ],
)
def test_a_mistyped_path_in_the_repository_is_corrected(
    flag, name, meant, scripts, tiny_pipeline, images, tmp_path, capsys, monkeypatch
):
    """And not said to be of another folder than this one."""
    monkeypatch.chdir(REPO)
    line = words(tiny_pipeline, images, tmp_path / "out", **{flag: name})
    assert status_of(scripts[TRAIN_TEXT_TO_IMAGE].main, *line) == 2
    said = re.sub(r"\n {4,}", " ", capsys.readouterr().err)
    assert f"{name}: there is no such {'file' if flag == 'config' else 'folder here'} (did you mean {meant}?)" in said
    assert "start in the folder" not in said
    if flag == "config":  # which may have held all that there is not
        assert said.count("\n") == 1


def test_nothing_is_missing_where_the_settings_file_is_not_there(scripts, tmp_path, capsys):
    assert status_of(scripts[TRAIN_TEXT_TO_IMAGE].main, f"--config={tmp_path}/a.yaml") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "a.yaml: there is no such file" in said
    assert "is missing" not in said


@pytest.mark.parametrize("path", ["demo/creature", "my/demo/creatures", "demo", "miniatures/pipeline", "", None])
def test_other_paths_are_the_users_own(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert remedy_for_missing(path) == ""


def test_what_makes_a_path_is_a_target_of_the_makefile():
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    for path, maker in MAKERS.items():
        target = maker.removeprefix("make ")
        made_by = re.search(rf"^{target}: (.*\n(?:\t.*\n)+)", makefile, re.MULTILINE)[1]
        configs = "".join((REPO / name).read_text() for name in re.findall(r"examples/configs/\w+\.yaml", made_by))
        assert re.search(rf"{path}\b", made_by + configs), path


NAMES = """
    output_dir train_data_dir instance_data_dir dataset_name pretrained_model_name_or_path single_file_config cache_dir
    tokenizer_name logging_dir resume_from_checkpoint tracker_project_name hub_model_id class_data_dir config
    init_lora_weights kohya_file_name
"""


@every_script
@pytest.mark.parametrize("flag", NAMES.split())
def test_names_of_300_bytes(flag, path, scripts, capsys, tmp_path):
    script = scripts[path]
    if flag not in vars(script.make_parser().parse_args([])):
        with pytest.raises(SystemExit):
            script.main([f"--{flag}={LONG}"])
        assert f"--{flag}: is no flag" in capsys.readouterr().err
        return
    for value in (LONG, f"{tmp_path}/{LONG}/x", 150 * "\u00fc"):
        assert status_of(script.main, f"--{flag}={value}") == 2
        said = capsys.readouterr().err
        assert f"--{flag}: " in said
        assert len(said) < 2500
        check_message(said, [LONG])


def test_a_name_of_255_bytes_is_none_too_long(scripts, tiny_pipeline, images, tmp_path, capsys):
    out = tmp_path / (255 * "n")
    assert run(scripts, TRAIN_TEXT_TO_IMAGE, tiny_pipeline, images, out, max_train_steps=1) == 0
    assert (out / "model_index.json").is_file()


# ---------------------------------------------------------------------------------------------------- files

CONFIGS = {
    "bad": ("a: [1\n", "is no YAML file of flags ("),
    "list": ("- a\n", "is no YAML file of flags (it holds something else); write `flag: value`, a line each"),
    "key": ("resolutoin: 3\n", "unknown key resolutoin; did you mean resolution?"),
    "nested": ("seed: {a: 1}\n", "--seed: is no single value, nor a list of them, in "),
    "bomb": (
        "a: &a [x, x]\nb: &b [*a, *a]\nvalidation_prompts: [*b, *b]\n",
        "--validation_prompts: is no single value",
    ),
    "value": ("seed: one\n", "--seed: must be a whole number in [0, 9e18], not 'one'"),
    "code": ("seed: !!python/object/apply:os.system [exit]\n", "could not determine a constructor for the tag"),
}


@every_script
@pytest.mark.parametrize("case", CONFIGS)
def test_wrong_configurations(case, path, scripts, tiny_pipeline, images, tmp_path, capsys):
    text, told = CONFIGS[case]
    (tmp_path / "recipe.yaml").write_text(text)
    settings = {"config": tmp_path / "recipe.yaml", "resolution": None, "max_train_steps": 1}
    assert run(scripts, path, tiny_pipeline, images, tmp_path / "out", **settings) == 2
    said = capsys.readouterr().err
    assert told in re.sub(r"\n {4,}", " ", said)
    check_message(said, [tiny_pipeline, images, tmp_path])


def without_unet(model):
    shutil.rmtree(model / "unet")
    return "no whole pipeline"


def with_another_part(model):
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "text_encoder_2": ["transformers", "CLIPTextModel"]}))
    return "has a text_encoder_2 (SDXL, SD 3 or the like); use a Stable Diffusion 1.x or 2.x model"


def with_foreign_code(model):
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "unet": ["mine", "UNet"]}))
    return "its unet is of mine.UNet, code that is not run; use a model"


def with_broken_index(model):
    (model / "model_index.json").write_text("{")
    return "no whole pipeline"


def with_half_the_weights(model):
    (path,) = (model / "unet").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    return "cannot be loaded ("


def with_a_pickle(model):
    (path,) = (model / "unet").glob("*.safetensors")
    path.unlink()
    torch.save({"a": print}, model / "unet" / "diffusion_pytorch_model.bin")
    return "a file holds more than weights, maybe code, which is not run; get it as .safetensors"


MODELS = [without_unet, with_another_part, with_foreign_code, with_broken_index, with_half_the_weights, with_a_pickle]


@every_script
@pytest.mark.parametrize("break_it", MODELS)
def test_wrong_models(break_it, path, scripts, tiny_pipeline, images, tmp_path, capsys):
    model = Path(shutil.copytree(tiny_pipeline, tmp_path / "model"))
    told = break_it(model)
    assert run(scripts, path, model, images, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert told in re.sub(r"\n {4,}", " ", said)
    assert str(model) in said
    check_message(said, [model, tmp_path])


@pytest.mark.parametrize("path", [path for path in SCRIPTS if "flax" not in path.stem], ids=lambda path: path.stem)
def test_a_model_of_flax_alone(path, scripts, tiny_pipeline, images, tmp_path, capsys):
    model = Path(shutil.copytree(tiny_pipeline, tmp_path / "model"))
    for file in model.glob("*/*.safetensors"):
        file.unlink()
    (model / "unet" / "diffusion_flax_model.msgpack").write_bytes(b"")
    assert run(scripts, path, model, images, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "has Flax weights alone; use train_text_to_image_flax.py" in re.sub(r"\n {4,}", " ", said)
    check_message(said, [model])


def no_folder(folder):
    shutil.rmtree(folder)
    return "does not exist, or is no folder; name one"


def a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")
    return "does not exist, or is no folder; name one"


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    return "holds no images ("


def tables(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(folder / "train.parquet")
    return f"or its train.parquet by --dataset_name={folder}"


def shards(folder):
    shutil.rmtree(folder)
    write_tar(folder / "0.TAR", make_rows(1))
    write_tar(folder / "1.tar", make_rows(1))
    return f"or its 0.TAR by --dataset_name={folder}"


def many_bad_images(folder):
    for number in range(30):
        (folder / f"bad{number:02d}.png").write_bytes(b"no image")
    return "30 of 34 images are unusable:"


def bad_json(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png"\n')
    return "row 1 is not a file_name and a caption in UTF-8"


def another_column(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png", "words": "a"}\n')
    return "has no 'text' but ['file_name', 'words']; set --caption_column"


def numbers(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png", "text": 3}\n')
    return "the caption is a number (3), not text; name another --caption_column"


def text_of_bytes(folder):
    (folder / "metadata.jsonl").unlink()
    (folder / "00.txt").write_bytes(b"\xff\xfe")
    return "00.png: its caption, a .txt, is not UTF-8; convert it"


def outside(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "../00.png", "text": "a"}\n')
    return "the file_name '../00.png' leads out of"


def links(folder):
    for number in range(20):
        (folder / f"link{number}.png").symlink_to("/dev/null")
    return "20 files in it are links that lead out of it, such as"


DATA = [
    no_folder,
    a_file,
    empty,
    tables,
    shards,
    many_bad_images,
    bad_json,
    another_column,
    numbers,
    text_of_bytes,
    outside,
    links,
]


@every_script
@pytest.mark.parametrize("break_it", DATA)
def test_wrong_data(break_it, path, scripts, tiny_pipeline, image_folder, tmp_path, capsys):
    folder = image_folder(4)
    told = break_it(folder)
    capsys.readouterr()
    assert run(scripts, path, tiny_pipeline, folder, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert told in re.sub(r"\n {4,}", " ", said)
    assert str(folder) in said
    check_message(said, [folder])
    if break_it == many_bad_images:
        assert re.search(r"^  and 2\d more$", said, re.MULTILINE)
        assert said.endswith("Mend or remove them, or add --skip_bad_images.\n")


# ---------------------------------------------------------------------------------------------------- outputs


@pytest.fixture(scope="module")
def runs(scripts, tiny_pipeline, images, tmp_path_factory):
    """The output of two steps of each script, with a checkpoint of the first one; by the script's path."""
    folder = tmp_path_factory.mktemp("runs")
    for path in SCRIPTS:
        settings = {"max_train_steps": 2, "checkpointing_steps": 1, "checkpoints_total_limit": 2}
        assert run(scripts, path, tiny_pipeline, images, folder / path.stem, **settings) == 0
        (folder / path.stem / "README.md").unlink()  # as if it had been stopped
    return folder


def in_use(out):
    return {}, "is in use; name another, go on with its run by --resume_from_checkpoint=latest"


def other_settings(out):
    return {"resume_from_checkpoint": "latest", "seed": 7}, "was made under other settings; use those, or add --allow"


def too_few_steps(out):
    return {"resume_from_checkpoint": "latest", "max_train_steps": 1}, "is beyond the last step, 1; raise it"


def an_older_one(out):
    return {"resume_from_checkpoint": "checkpoint-1"}, "is newer; use that, or another --output_dir"


def damaged(out):
    for path in sorted((out / "checkpoint-2").rglob("*")):
        if path.is_file() and path.suffix != ".json":
            path.write_bytes(path.read_bytes()[:20])
    return {"resume_from_checkpoint": "checkpoint-2"}, "damaged"


def contradiction(out):
    more = {"resume_from_checkpoint": "latest", "overwrite_output_dir": True}
    return more, "--overwrite_output_dir: contradicts --resume_from_checkpoint; drop one"


@every_script
@pytest.mark.parametrize("spoil", [in_use, other_settings, too_few_steps, an_older_one, damaged, contradiction])
def test_wrong_outputs(spoil, path, scripts, runs, tiny_pipeline, images, tmp_path, capsys):
    out = Path(shutil.copytree(runs / path.stem, tmp_path / "out"))
    more, told = spoil(out)
    settings = {"max_train_steps": 2, **more}
    assert run(scripts, path, tiny_pipeline, images, out, **settings) == 2
    said = capsys.readouterr().err
    assert told in re.sub(r"\n {4,}", " ", said)
    check_message(said, [out, tmp_path])


@pytest.mark.parametrize(
    "path, other, told",
    [
        (
            TRAIN_TEXT_TO_IMAGE_LORA,
            TRAIN_TEXT_TO_IMAGE,
            "holds whole models, which this script does not train; use the",
        ),
        (
            TRAIN_TEXT_TO_IMAGE,
            TRAIN_TEXT_TO_IMAGE_LORA,
            "holds LoRA adapters, which this script does not train; use the",
        ),
    ],
)
def test_a_checkpoint_of_another_kind_of_script(
    path, other, told, scripts, runs, tiny_pipeline, images, tmp_path, capsys
):
    settings = {"max_train_steps": 2, "resume_from_checkpoint": runs / other.stem / "checkpoint-2"}
    assert run(scripts, path, tiny_pipeline, images, tmp_path / "out", **settings) == 2
    said = capsys.readouterr().err
    assert told in re.sub(r"\n {4,}", " ", said)
    check_message(said, [runs])


def test_an_allowed_change_is_no_refusal(scripts, runs, tiny_pipeline, images, tmp_path, capsys):
    out = Path(shutil.copytree(runs / TRAIN_TEXT_TO_IMAGE.stem, tmp_path / "out"))
    settings = {"max_train_steps": 3, "resume_from_checkpoint": "latest", "seed": 7, "allow_changed_resume": True}
    assert run(scripts, TRAIN_TEXT_TO_IMAGE, tiny_pipeline, images, out, **settings) == 0
    said = capsys.readouterr().out
    told = f"{out / 'checkpoint-2'} was made under other settings; from here on those of now hold"
    assert f"{told} (--allow_changed_resume)\n  seed: 0 there, 7 now\n" in re.sub(r"\n {4,}", " ", said)
    assert "use those" not in said


@every_script
@pytest.mark.parametrize("place", ["file", "below a file", "dead link"])
def test_an_output_folder_that_cannot_be(place, path, scripts, tiny_pipeline, images, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "dead link": tmp_path / "link"}[place]
    if place == "dead link":
        out.symlink_to("/proc/1/nowhere")
    assert run(scripts, path, tiny_pipeline, images, out) == 2
    said = capsys.readouterr().err
    assert f"--output_dir={out}: " in re.sub(r"\n {4,}", " ", said)
    check_message(said, [tmp_path])


@every_script
@pytest.mark.parametrize("limit", [1_000, 60_000])
def test_a_full_disk(limit, path, scripts, tiny_pipeline, images, tmp_path, capfd):
    """As a limit on the size of files. Nothing else goes wrong in the way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        status = run(scripts, path, tiny_pipeline, images, tmp_path / "out", checkpointing_steps=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capfd.readouterr().err
    assert status in (1, 2), said
    assert "disk is full" in said or "full disk" in said or "File too large" in said
    told = [line for line in said.split("\n") if line and "\r" not in line and not line.startswith("Generating")]
    check_message("\n".join(told), [tmp_path])


# ---------------------------------------------------------------------------------------------------- commands

MISTAKES = {  # the words behind `sdtune`, with the places of a model, images and an empty folder, and what is named
    "no_such": (["chekc"], "there is no command 'chekc'; did you mean check?"),
    "check": (["check"], "DATASET is missing: name a folder"),
    "check_gone": (["check", "{empty}/gone"], "DATASET={empty}/gone: there is no such folder or file; check its name"),
    "check_flag": (["check", "{images}", "--resolutoin=3"], "--resolutoin: is no flag; did you mean --resolution?"),
    "show": (["show", "{images}"], "--output is missing: name a file that ends in .png"),
    "caption": (["caption", "{empty}/gone"], "FOLDER={empty}/gone: does not exist, or is no folder; name a folder of"),
    "caption_none": (["caption"], "FOLDER is missing: name a folder of images"),
    "caption_demo": (
        ["caption", "demo/creatures"],
        "demo/creatures: does not exist, or is no folder; run `make demo` in",
    ),
    "caption_empty": (["caption", "{empty}", "--model={model}"], "--model={model}: "),
    "convert": (["convert", "{model}"], "give what to read and what to write: SOURCE OUTPUT"),
    "convert_three": (["convert", "{model}", "{empty}/a.safetensors", "b"], "'b': is no flag, nor the value of one"),
    "convert_no": (
        ["convert", "{empty}/gone", "{empty}/a"],
        "{empty}/gone: is no pipeline folder and no .safetensors",
    ),
    "convert_in_use": (["convert", "{model}", "{images}/00.png"], "end the name of the file to write in .safetensors"),
    "convert_lora": (["convert-lora", "{empty}/gone", "{empty}/b", "--to=kohya"], "{empty}/gone: "),
    "export": (["export", "{empty}", "{empty}/out"], "{empty}: is no whole checkpoint; give a folder checkpoint-N"),
    "generate": (["generate", "{model}"], "--prompts is missing: give this, --prompts_file or a recipe with prompts"),
    "generate_model": (["generate", "{empty}", "--prompts", "a"], "MODEL={empty}: no whole pipeline"),
    "evaluate": (
        ["evaluate", "{empty}/gone", "{images}"],
        "MODEL={empty}/gone: there is no such folder here; name one",
    ),
    "push_model": (
        ["push-model", "{empty}", "me/mine"],
        "{empty}: holds neither a pipeline with model_index.json nor",
    ),
    "generate_none": (["generate", "--prompts", "a"], "MODEL is missing: name a pipeline folder or Hub id"),
    "evaluate_none": (["evaluate", "{model}"], "DATASET is missing: name the folder or dataset that the model was"),
    "push_model_none": (["push-model"], "REPO_ID is missing: give your_name/its_name"),
    "push_model_id": (["push-model", "{model}", "a/b/c"], "REPO_ID=a/b/c: give your_name/its_name"),
    "push_dataset": (["push-dataset", "{empty}", "me/mine"], "the folder {empty} holds no images"),
    "batch": (["find-batch-size"], "a training's command is missing; give it behind --"),
    "long": (["convert", LONG, "x"], "holds a zero, or names of more than 255 bytes"),
    "long_check": (["check", LONG], "holds a zero, or names of more than 255 bytes"),
    "long_push": (["push-model", LONG, "me/mine"], "holds a zero, or names of more than 255 bytes"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_wrong_words_of_commands(case, tiny_pipeline, images, tmp_path, capsys):
    argv, told = MISTAKES[case]
    (tmp_path / "empty").mkdir()
    places = {"model": tiny_pipeline, "images": images, "empty": tmp_path / "empty"}
    assert status_of(sdtune.main, *[word.format(**places) for word in argv]) == 2
    said = capsys.readouterr().err
    assert told.format(**places) in re.sub(r"\n {4,}", " ", said)
    if case == "no_such":  # which lists the commands
        return
    check_message(said, [*places.values(), LONG])


def test_a_disk_that_is_full_while_a_command_writes(tiny_pipeline, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        status = status_of(sdtune.main, "convert", tiny_pipeline, tmp_path / "one.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert status == 2
    assert said.endswith("; make room\n")
    check_message(said, [tmp_path])
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- how they fit


SAYS_MUCH = {  # the words behind `sdtune`, and how what they say begins that is longer than a line
    "check": (["check", "photos"], "Left aside in {here}/photos: 1 of a kind that is not read (HEIC), such as "),
    "caption": (["caption", "photos", "--dry_run", "--model={captioner}"], "Left aside in {here}/photos: 1 of a kind"),
    "push_dataset": (["push-dataset", "photos", "me/mine", "--dry_run"], "Left aside in {here}/photos: 1 of a kind "),
    "push_model": (["push-model", "model", "me/mine", "--dry_run"], "Not sent: 0note.md, 10note.md, 11note.md, 12n"),
    "report": (
        ["report", "run"],
        "run: No images were held out, so that nothing can be said about learning; the loss",
    ),
}


@pytest.mark.parametrize("case", SAYS_MUCH)
def test_what_commands_say_is_broken_too(
    case, tiny_pipeline, tiny_captioner, image_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (image_folder(2, 512, name="photos") / "photo.heic").write_bytes(b"x")
    shutil.copytree(tiny_pipeline, "model")
    for number in range(20):
        Path("model", f"{number}note.md").write_text("x")
    Path("run").mkdir()
    rows = [json.dumps({"step": number, "loss": 0.5}) for number in (1, 2, 3)]
    Path("run", "log.jsonl").write_text("\n".join(rows))
    argv, told = SAYS_MUCH[case]
    assert status_of(sdtune.main, *[word.format(captioner=tiny_captioner) for word in argv]) == 0
    said = capsys.readouterr().out
    assert all(len(line) <= COLUMNS or str(tmp_path) in line for line in said.splitlines())
    assert told.format(here=tmp_path) in re.sub(r"\n {4,}", " ", said)
    assert re.search(r"\n {4}\S", said)


def test_a_message_is_broken_where_the_terminal_ends(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    assert fitted("train.py: --a=1: is not what it could be; drop it") == (
        "train.py: --a=1: is not what\n    it could be; drop it"
    )
    path = "/" + 40 * "x"
    assert fitted(f"train.py:\n  {path}: no; drop") == f"train.py:\n  {path}:\n    no; drop"
    monkeypatch.delenv("COLUMNS")
    assert [len(line) <= 100 for line in fitted(60 * "four ").split("\n")] == [True] * 4


def test_a_long_list_is_cut_and_its_remedy_stays():
    bad = [f"{number}.png: broken" for number in range(40)]
    with pytest.raises(InputError) as caught:
        leave_out(bad, 50, may_leave_out=False)
    lines = fitted(f"train.py: {caught.value}").split("\n")
    assert len(lines) == MAX_LINES
    assert lines[0] == "train.py: 40 of 50 images are unusable:"
    assert lines[1:10] == [f"  {number}.png: broken" for number in range(9)]
    assert lines[10:] == ["  and 31 more", "Mend or remove them, or add --skip_bad_images."]


@pytest.mark.parametrize("num_without", [12, 55])
def test_many_missing_captions_hide_no_other_bad_image(num_without):
    bad = [f"{number}.png: {NO_CAPTION}" for number in range(num_without)]
    bad.insert(10, "zebra.jpg: cannot be read: image file is truncated")
    with pytest.raises(InputError) as caught:
        leave_out(bad, 60, may_leave_out=False)
    lines = fitted(f"train.py: {caught.value}").split("\n")
    number = f"{num_without + 1} of 60 images are unusable, {num_without} of them for lack of a caption:"
    assert lines[:3] == [f"train.py: {number}", "  zebra.jpg: cannot be read: image file is truncated", f"  {bad[0]}"]
    assert lines[-1] == "`sdtune caption FOLDER` writes captions; mend or remove them, or add --skip_bad_images."


@pytest.mark.parametrize(
    "number, words, told",
    [
        (1, ["image"], "1 image"),
        (0, ["image"], "0 images"),
        (1234, ["image"], "1,234 images"),
        (1, ["pass", "passes"], "1 pass"),
        (2, ["pass", "passes"], "2 passes"),
    ],
)
def test_what_is_counted_is_in_the_singular_or_in_the_plural(number, words, told):
    assert counted(number, *words) == told


def test_one_unusable_image_is_told_in_the_singular():
    for num_images, told in ((25, "1 of 25 images is unusable:"), (1, "1 of 1 image is unusable:")):
        with pytest.raises(InputError) as caught:
            leave_out(["a.png: broken"], num_images, may_leave_out=False)
        assert str(caught.value).splitlines()[0] == told


def test_many_mistakes_are_cut_too():
    with pytest.raises(InputError) as caught:
        raise_problems([f"--flag_{number}: is wrong; drop it" for number in range(20)])
    lines = fitted(f"train.py: {caught.value}").split("\n")
    assert lines == ["train.py: ", *[f"  --flag_{number}: is wrong; drop it" for number in range(10)], "  and 10 more"]


def test_all_that_a_command_prints_is_shown_however_much(capsys):
    """Unlike a message, of which twelve lines are."""
    names = [f"samples/step-{number:06}.png" for number in range(60)]
    with told_in_lines():
        print("Would send", *names)
        print("and a card")
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(" ".join(lines[:-1]).split()) == " ".join(["Would send", *names])
    assert lines[-1] == "and a card"
    assert max(map(len, lines)) <= COLUMNS


def test_no_name_is_suggested_out_of_a_folder_that_is_closed(tmp_path, monkeypatch):
    (tmp_path / "my_pictures").mkdir()
    assert nearest_beside(str(tmp_path / "my_pictres")) == f" (did you mean {tmp_path / 'my_pictures'}?)"

    def refuse(folder):
        raise PermissionError(folder)

    monkeypatch.setattr("os.listdir", refuse)
    assert nearest_beside(str(tmp_path / "my_pictres")) == ""


@pytest.mark.parametrize(
    "file, told",
    [
        ("progress.json", "is a checkpoint of a training; make a model of it by `sdtune export {} OUTPUT`"),
        ("pytorch_lora_weights.safetensors", "holds LoRA weights; name the model that they were trained on"),
    ],
)
@every_script
def test_what_a_training_left_is_no_base(path, file, told, scripts, images, tmp_path, capsys):
    base = tmp_path / "base"
    base.mkdir()
    (base / file).write_text("{}")
    assert run(scripts, path, base, images, tmp_path / "out") == 2
    assert f"{base}: {told.format(base)}" in " ".join(capsys.readouterr().err.split())
