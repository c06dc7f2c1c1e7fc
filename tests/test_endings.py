"""What a run says when it ends is true, short, and leads on."""

import datetime
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import load_script
from image_data import write_image_folder
from running import REPO, TRAIN_DREAMBOOTH, TRAIN_DREAMBOOTH_LORA, TRAIN_TEXT_TO_IMAGE, TRAIN_TEXT_TO_IMAGE_LORA
from training import parse, train

from sdtune import endings
from sdtune.commands import generate
from sdtune.plan import as_row, tell_size
from sdtune.runs import judge, read_run

MINIATURE = REPO / "miniature" / "pipeline"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", 6)


def bytes_in(folder, pattern="**/*"):
    return sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file())


def words_of(command):
    """The words that a shell makes of a command."""
    done = subprocess.run(["sh", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def ending_of(said):
    """The rows behind Done by name, each without its line breaks."""
    rows = {}
    for line in said[said.rindex("\nDone\n") :].splitlines()[2:]:
        if name := line[:13].strip():
            rows[name] = line[13:]
            last = name
        else:
            rows[last] += f"\n{line[13:]}"
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("path", [TRAIN_TEXT_TO_IMAGE, TRAIN_TEXT_TO_IMAGE_LORA], ids=lambda path: path.stem)
def test_the_end_of_a_run(path, images, tmp_path, monkeypatch, capsys):
    """What it says of files is so, its verdict is that of `sdtune report`, and its commands work."""
    monkeypatch.chdir(tmp_path)
    script, is_lora = load_script(path), path == TRAIN_TEXT_TO_IMAGE_LORA
    settings = {"max_train_steps": 2, "checkpointing_steps": 1, "num_validation_samples": 2, "resolution": 32}
    assert train(script, MINIATURE, images, "my out", **settings) == 0
    said = capsys.readouterr().out
    rows, folder = ending_of(said), Path("my out")
    lines = said[said.rindex("\nDone\n") :].splitlines()[1:]
    assert len(lines) <= 12
    assert all(len(line) <= 100 or "miniature" in line for line in lines)  # whose path is as long as it is
    assert list(rows) == ["made", "took", "learnt", "draw", "extend", "look"]
    pattern = "pytorch_lora_weights.safetensors" if is_lora else "[!cl.]*/**/*"
    result = bytes_in(folder, pattern) + (0 if is_lora else (folder / "model_index.json").stat().st_size)
    checkpoints = tell_size(bytes_in(folder / "checkpoint-1") + bytes_in(folder / "checkpoint-2"))
    made = f"{'LoRA adapters' if is_lora else 'a pipeline'} in my out: {tell_size(result)}"
    assert rows["made"] == f"{made} ({tell_size(bytes_in(folder))} in all, of them {checkpoints} in 2 checkpoints)"
    assert re.fullmatch(r"0:00:\d\d, from step 0 to 2", rows["took"])
    assert " ".join(rows["learnt"].split()) == judge(read_run(folder, "x"))[0]
    assert "on 2 images that were not trained on" in rows["learnt"]
    assert rows["look"] == "sdtune report 'my out'"

    command, code = rows["draw"].rsplit("\n", 1)
    assert code == "or by the code in my out/README.md"
    program, name, *words = words_of(command)
    assert (program, name) == ("sdtune", "generate")
    assert words[-4:] == ["--prompts", "a picture", "--height=32", "--width=32"]
    assert generate.main([*words, "--num_inference_steps=1"]) in (0, None)
    assert len(list(Path("generated").glob("*.png"))) >= 1

    assert rows["extend"] == "the same command with --resume_from_checkpoint=latest --max_train_steps=4"
    more = {"resume_from_checkpoint": "latest", "max_train_steps": 4}
    assert train(script, MINIATURE, images, "my out", **{**settings, **more}) == 0
    rows = ending_of(capsys.readouterr().out)
    assert rows["took"].endswith(", from step 2 to 4")
    assert rows["extend"].endswith(" --max_train_steps=8")
    assert "after step 4" in " ".join(rows["learnt"].split())


def test_each_held_out_loss_is_told_once(train_script, tiny_pipeline, images, tmp_path, capsys):
    settings = {"max_train_steps": 3, "num_validation_samples": 2, "validation_steps": 1, "lr_scheduler": "constant"}
    assert train(train_script, tiny_pipeline, images, tmp_path / "out", **settings) == 0
    said = " ".join(capsys.readouterr().out.split())
    told = re.findall(
        r"Step 0: the loss on 2 held-out|not trained on \w+ from [\d.]+ to [\d.]+ after step \d|Done", said
    )
    assert [words.split()[-1] for words in told] == ["held-out", "1", "2", "Done", "3"]


def test_what_a_run_without_held_out_images_says(train_script, tiny_pipeline, images, tmp_path, capsys):
    assert train(train_script, tiny_pipeline, images, tmp_path / "out") == 0
    learnt = " ".join(ending_of(capsys.readouterr().out)["learnt"].split())
    assert learnt.startswith(
        "No images were held out, so that nothing can be said about learning; the loss in training"
    )
    assert learnt.endswith("--num_validation_samples holds some out.")


def pipeline_stub(prediction_type="epsilon", **others):
    config = SimpleNamespace(prediction_type=prediction_type, get={"prediction_type": prediction_type, **others}.get)
    config.rescale_betas_zero_snr = others.get("rescale_betas_zero_snr", False)
    scheduler = SimpleNamespace(config=config)
    return SimpleNamespace(
        unet=SimpleNamespace(config=SimpleNamespace(sample_size=64)), vae_scale_factor=8, scheduler=scheduler
    )


@pytest.fixture
def flags(tmp_path):
    """Flags of a run of LoRA, whose file is there, with more words."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pytorch_lora_weights.safetensors").touch()
    flags = ["--pretrained_model_name_or_path=me/base", f"--output_dir={tmp_path / 'out'}", "--resolution=512"]
    return lambda *words: parse(*flags, *words)


def test_samples_are_drawn_as_the_run_drew_them(flags, tmp_path):
    args = flags(
        "--validation_prompt=a cat",
        "--validation_guidance_scale=5",
        "--validation_negative_prompt=blurred, dull",
        "--validation_num_inference_steps=10",
    )
    stub = pipeline_stub()
    words = endings.command_to_draw(args, stub, stub.scheduler, "a cat")
    assert words[:4] == ["sdtune", "generate", "me/base", f"--lora={tmp_path / 'out'}"]
    assert words[4:] == [
        *["--prompts", "a cat", "--negative_prompt=blurred, dull", "--num_inference_steps=10"],
        "--guidance_scale=5.0",
    ]


@pytest.mark.parametrize(
    "word, trained",
    [
        ("--revision=main", {}),
        ("--variant=fp16", {}),
        ("--single_file_config=me/config", {}),
        ("--seed=1", {"prediction_type": "v_prediction"}),
        ("--seed=1", {"rescale_betas_zero_snr": True}),
    ],
)
def test_what_the_command_cannot_draw_is_left_to_the_code(flags, word, trained):
    args, base = flags(word), pipeline_stub()
    assert endings.command_to_draw(args, base, pipeline_stub(**trained).scheduler, "a cat") is None
    assert endings.command_to_draw(flags(), base, base.scheduler, "a cat")


@pytest.mark.parametrize("has_text_encoder", [False, True])
def test_a_pipeline_without_its_text_encoder_is_left_to_the_code(tmp_path, has_text_encoder):
    args, stub = parse(f"--output_dir={tmp_path}"), pipeline_stub()
    if has_text_encoder:
        (tmp_path / "text_encoder").mkdir()
    words = endings.command_to_draw(args, stub, stub.scheduler, "a cat")
    assert words == (["sdtune", "generate", f"{tmp_path}", "--prompts", "a cat"] if has_text_encoder else None)


def test_a_schedule_and_an_overwritten_folder_need_more_words_to_extend():
    run = SimpleNamespace(counts=SimpleNamespace(last_step=300), settings={"schedule_steps": None})
    plain = ["--resume_from_checkpoint=latest", "--max_train_steps=600"]
    assert endings.words_to_extend(parse(), run) == plain
    run.settings["schedule_steps"] = 300
    assert endings.words_to_extend(parse("--overwrite_output_dir"), run) == [
        *plain,
        "--allow_changed_resume",
        "and without --overwrite_output_dir",
    ]


def test_the_time_is_that_since_the_newest_start():
    rows = [
        {"time": "2026-11-27T03:00:00+00:00", "event": "started", "step": 0},
        {"time": "2026-11-27T04:00:00+00:00", "event": "stopped", "step": 1000},
        {"time": "2026-11-27T08:00:00+00:00", "event": "resumed", "step": 1000},
        {"time": "2026-11-27T09:30:15+00:00", "event": "finished", "step": 1500},
    ]
    now = datetime.datetime(2026, 11, 27, 9, 30, 16, tzinfo=datetime.UTC)
    assert endings.tell_duration(rows, 1500, now) == "1:30:16, from step 1,000 to 1,500"
    assert endings.tell_duration(rows[:2], 1000, now) == "6:30:16, from step 0 to 1,000"
    assert endings.tell_duration([], 1000, now) is None


def test_long_commands_come_in_lines_that_a_shell_joins():
    words = ["sdtune", "generate", "a model's folder", *["a picture of a cat that sleeps"] * 6]
    lines = endings.in_lines(words).split("\n")
    assert len(lines) > 2
    assert all(line.endswith(" \\") for line in lines[:-1])
    assert words_of("\n".join(lines)) == words
    for length in range(1, 80):  # a row of the end breaks no line once more
        command = endings.in_lines(["sdtune", "generate", "x" * length, "a picture of a cat", "--height=64"])
        assert as_row("draw", command).splitlines()[0] == f"  draw       {command.splitlines()[0]}"


@pytest.mark.slow
@pytest.mark.parametrize("path", [TRAIN_DREAMBOOTH, TRAIN_DREAMBOOTH_LORA], ids=lambda path: path.stem)
def test_the_prompt_of_dreambooth_is_the_instance_prompt(path, images, tiny_pipeline, tmp_path, capsys):
    settings = {"train_data_dir": None, "instance_data_dir": images, "instance_prompt": "a sks star"}
    settings |= {"max_train_steps": 1, "train_batch_size": 1}
    assert train(load_script(path), tiny_pipeline, images, tmp_path / "out", **settings) == 0
    words = words_of(ending_of(capsys.readouterr().out)["draw"].partition("\nor by")[0])
    assert words[words.index("--prompts") + 1] == "a sks star"
