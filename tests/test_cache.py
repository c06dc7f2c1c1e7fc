"""Encoded images and captions are made once, kept, and give the same training."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import load_script
from copies import end_of, run_copies, start_copy
from diffusers import AutoencoderKL, StableDiffusionPipeline
from image_data import make_image, write_image_folder
from running import TRAIN_DREAMBOOTH, TRAIN_DREAMBOOTH_LORA, TRAIN_TEXT_TO_IMAGE, TRAIN_TEXT_TO_IMAGE_LORA
from safetensors.torch import load_file
from training import checkpoint_state, losses, parse, same, text_encoder, train, trains_into, unet, words
from transformers import CLIPTextModel

from sdtune import cache
from sdtune.cache import check_cache, check_entries, describe_cache

CACHED = {"center_crop": True, "cache_latents": True, "cache_text_embeddings": True}
FLIP_AND_DROP = {"random_flip": True, "caption_dropout": 0.4}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Seven images that are not square, with two captions each, one of which all have in common."""
    captions = [["a picture", f"a red circle {index}"] for index in range(7)]
    return write_image_folder(tmp_path_factory.mktemp("data") / "images", 7, (48, 40), captions)


@pytest.fixture
def fit(train_script, tiny_pipeline, images, tmp_path):
    """Trains four steps into a folder, or as the settings say, with a cache of this test's own."""
    return functools.partial(trains_into(train_script, tiny_pipeline, images), cache_dir=tmp_path / "cache")


@pytest.fixture
def encoded(monkeypatch):
    """Counts what VAE and text encoder encode."""
    counts = Counter()
    encode, forward = AutoencoderKL.encode, CLIPTextModel.forward

    def counting_encode(self, pixel_values, *rest, **options):
        counts["images"] += len(pixel_values)
        return encode(self, pixel_values, *rest, **options)

    def counting_forward(self, input_ids, *rest, **options):
        counts["captions"] += len(input_ids)
        return forward(self, input_ids, *rest, **options)

    monkeypatch.setattr(AutoencoderKL, "encode", counting_encode)
    monkeypatch.setattr(CLIPTextModel, "forward", counting_forward)
    return counts


def entries(folder, kind="*"):
    """The files of a cache, by their paths in it: content and time."""
    place = Path(folder, "encoded")
    files = [path for path in place.glob(f"{kind}/**/*") if path.is_file()]
    return {path.relative_to(place).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def taken(counts):
    """What was encoded since the last look."""
    seen = (counts["images"], counts["captions"])
    counts.clear()
    return seen


def with_sgd(script, monkeypatch):
    """Has a script train by plain gradient descent, in which a small difference stays small."""
    make = functools.partial(torch.optim.SGD, lr=0.05)
    monkeypatch.setattr(script, "make_optimizer", lambda args, groups: make([{**g, "lr": 0.05} for g in groups]))


# ------------------------------------------------------------------------------------------------- cached is uncached


@pytest.mark.parametrize("settings", [{}, FLIP_AND_DROP, {"gradient_accumulation_steps": 2, **FLIP_AND_DROP}])
def test_cached_training_is_uncached_training(fit, train_script, tiny_pipeline, tmp_path, monkeypatch, settings):
    """Up to the rounding of batches of other sizes: weights after 20 steps of SGD within 1e-3 of the distance moved,
    losses under AdamW within 1e-4."""
    settings = {"max_train_steps": 20, "center_crop": True, "learning_rate": 1e-4, **settings}
    assert fit(tmp_path / "plain", **settings) == 0
    assert fit(tmp_path / "cached", **{**settings, **CACHED}) == 0
    assert len(losses(tmp_path / "plain")) == 20
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    with_sgd(train_script, monkeypatch)
    assert fit(tmp_path / "plain_sgd", **settings) == 0
    assert fit(tmp_path / "cached_sgd", **{**settings, **CACHED}) == 0
    before, plain, cached = [unet(f) for f in (tiny_pipeline, tmp_path / "plain_sgd", tmp_path / "cached_sgd")]
    moved = torch.cat([(plain[name] - before[name]).flatten() for name in plain]).norm()
    apart = torch.cat([(plain[name] - cached[name]).flatten() for name in plain]).norm()
    assert moved > 1e-3
    assert apart < 1e-3 * moved


def test_entries_are_what_the_encoders_give(fit, train_script, tiny_pipeline, images, tmp_path):
    """Of each image and its mirror image, cropped at the centre; of each caption once, and of the empty one."""
    assert fit(tmp_path / "out", random_flip=True, **CACHED) == 0
    vae = AutoencoderKL.from_pretrained(tiny_pipeline, subfolder="vae").eval()
    encoder = CLIPTextModel.from_pretrained(tiny_pipeline, subfolder="text_encoder").eval()
    args = parse(f"--pretrained_model_name_or_path={tiny_pipeline}", "--resolution=32", f"--train_data_dir={images}")
    tokenizer = train_script.load_tokenizer(args)
    files = list((tmp_path / "cache" / "encoded").glob("latents/*/*.safetensors"))
    found = [load_file(path) for path in files]
    assert len(found) == 14
    samples, _, _ = train_script.load_data(args, args.train_data_dir)
    for index in range(7):
        for is_mirrored in (False, True):
            image = samples.open(index, samples.rows[index], (0.5, 0.5), is_mirrored)
            pixel_values = torch.from_numpy(np.array(image).transpose(2, 0, 1))[None] / 127.5 - 1
            with torch.no_grad():
                posterior = vae.encode(pixel_values).latent_dist
            near = [f for f in found if torch.allclose(f["mean"], posterior.mean[0], rtol=1e-5, atol=1e-6)]
            assert len(near) == 1
            torch.testing.assert_close(near[0]["log_variance"], posterior.logvar[0], rtol=1e-5, atol=1e-5)
    captions = ["", "a picture", *(f"a red circle {index}" for index in range(7))]
    kept = [load_file(path)["prompt_embeds"] for path in (tmp_path / "cache" / "encoded").glob("captions/*/*")]
    assert len(kept) == 9
    for caption in captions:
        tokens = tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            embeds = encoder(tokens)[0][0]
        assert sum(torch.allclose(embeds, other, rtol=1e-5, atol=1e-5) for other in kept) == 1


def test_two_runs_from_one_cache_are_equal_and_a_resume_is_exact(fit, tmp_path):
    settings = {**CACHED, **FLIP_AND_DROP, "max_train_steps": 6, "use_ema": True, "num_validation_samples": 2}
    assert fit(tmp_path / "first", **settings) == 0
    assert fit(tmp_path / "second", **settings) == 0
    assert same(unet(tmp_path / "first"), unet(tmp_path / "second"))
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    settings["checkpointing_steps"] = 3
    assert fit(tmp_path / "whole", **settings) == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    assert fit(tmp_path / "resumed", **settings, resume_from_checkpoint="latest") == 0
    assert same(checkpoint_state(tmp_path / "resumed/checkpoint-6"), checkpoint_state(tmp_path / "whole/checkpoint-6"))
    assert same(unet(tmp_path / "resumed"), unet(tmp_path / "first"))


def test_a_resume_may_begin_or_end_to_use_the_cache(fit, tmp_path):
    settings = {"center_crop": True, "max_train_steps": 4, "checkpointing_steps": 2}
    assert fit(tmp_path / "plain", **settings) == 0
    shutil.copytree(tmp_path / "plain" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    assert fit(tmp_path / "resumed", **{**settings, **CACHED}, resume_from_checkpoint="latest") == 0
    assert losses(tmp_path / "resumed")[-2:] == pytest.approx(losses(tmp_path / "plain")[-2:], rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"validation_prompt": "a red circle", "num_validation_images": 1}])
def test_result_has_vae_and_text_encoder_of_the_base(fit, tiny_pipeline, tmp_path, settings):
    """Which have left the memory meanwhile, or waited in the CPU's for samples."""
    assert fit(tmp_path / "out", **CACHED, **settings, max_train_steps=1, mixed_precision="bf16") == 0
    assert same(text_encoder(tmp_path / "out"), text_encoder(tiny_pipeline))
    file = "vae/diffusion_pytorch_model.safetensors"
    assert same(load_file(tmp_path / "out" / file), load_file(tiny_pipeline / file))
    assert (tmp_path / "out" / "samples").exists() == bool(settings)


def test_held_out_images_come_out_of_the_cache(fit, encoded, tmp_path):
    settings = {"center_crop": True, "num_validation_samples": 3, "validation_steps": 2}
    assert fit(tmp_path / "plain", **settings) == 0
    assert fit(tmp_path / "cached", **{**settings, **CACHED}) == 0
    taken(encoded)
    assert fit(tmp_path / "again", **{**settings, **CACHED}) == 0
    assert taken(encoded) == (0, 0)

    def held_out(folder):
        rows = [json.loads(line) for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]
        return [row["held_out_loss"] for row in rows if "held_out_loss" in row]

    assert len(held_out("plain")) == 3
    assert held_out("cached") == pytest.approx(held_out("plain"), rel=1e-4)
    assert held_out("again") == held_out("cached")


# ------------------------------------------------------------------------------------------- what is made, and when


def test_only_what_changed_is_encoded_again(fit, encoded, images, tiny_pipeline, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(images, data)
    run = functools.partial(fit, data=data, max_train_steps=1, overwrite_output_dir=True, **CACHED)
    assert run(tmp_path / "out") == 0
    assert taken(encoded) == (7, 9)
    others = {"learning_rate": 1e-2, "seed": 5, "train_batch_size": 3, "caption_dropout": 0.5, "noise_offset": 0.1}
    assert run(tmp_path / "out", **others, use_ema=True) == 0
    assert taken(encoded) == (0, 0)
    make_image(20, (48, 40)).save(data / "03.png")
    assert run(tmp_path / "out") == 0
    assert taken(encoded) == (1, 0)
    shutil.copy(data / "03.png", data / "99.png")  # content counts, not the name
    rows = (data / "metadata.jsonl").read_text() + json.dumps({"file_name": "99.png", "text": "a new one"}) + "\n"
    (data / "metadata.jsonl").write_text(rows)
    assert run(tmp_path / "out") == 0
    assert taken(encoded) == (0, 1)
    assert run(tmp_path / "out", random_flip=True) == 0
    assert taken(encoded) == (7, 0)
    for settings in ({"resolution": 16}, {"image_interpolation_mode": "bicubic"}):
        assert run(tmp_path / "out", **settings) == 0
        assert taken(encoded) == (7, 0)
    assert run(tmp_path / "out", tokenizer_max_length=20) == 0
    assert taken(encoded) == (0, 10)
    assert run(tmp_path / "out", mixed_precision="bf16") == 0
    assert taken(encoded) == (7, 10)


def test_another_vae_encodes_all_images_and_no_caption(fit, encoded, tiny_pipeline, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_pipeline, base)
    run = functools.partial(fit, base=base, max_train_steps=1, overwrite_output_dir=True, **CACHED)
    assert run(tmp_path / "out") == 0
    assert taken(encoded) == (7, 9)
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    with torch.no_grad():
        vae.quant_conv.bias[0] += 1e-3
    vae.save_pretrained(base / "vae")
    assert run(tmp_path / "out") == 0
    assert taken(encoded) == (7, 0)
    encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder")
    with torch.no_grad():
        next(encoder.parameters())[0] += 1e-3
    encoder.save_pretrained(base / "text_encoder")
    assert run(tmp_path / "out") == 0
    assert taken(encoded) == (0, 9)


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "empty", "of another shape"])
def test_broken_entries_are_told_and_made_anew(fit, encoded, tmp_path, capsys, damage):
    run = functools.partial(fit, max_train_steps=1, overwrite_output_dir=True, **CACHED)
    assert run(tmp_path / "out") == 0
    before = {name: content for name, (content, _) in entries(tmp_path / "cache").items()}
    whole = sorted(name for name in before if name.startswith("latents"))
    for name in whole[:2]:
        path, content = tmp_path / "cache" / "encoded" / name, bytearray(before[name])
        content[-5] ^= 1
        kinds = {"flipped bit": bytes(content), "truncated": before[name][:-7], "empty": b""}
        path.write_bytes(kinds.get(damage, before[min(before)]))
    taken(encoded)
    capsys.readouterr()
    assert run(tmp_path / "out") == 0
    broken = tmp_path / "cache" / "encoded" / whole[0]
    told = f"Warning: 2 entries of the cache are broken and made anew, such as {broken}\n"
    assert told in capsys.readouterr().out
    assert taken(encoded) == (2, 0)
    assert {name: content for name, (content, _) in entries(tmp_path / "cache").items()} == before


def test_an_entry_that_breaks_in_the_middle_of_a_run_is_named(fit, train_script, tmp_path, monkeypatch, capsys):
    fill = train_script.fill_cache

    def fill_and_break(*args):
        filled = fill(*args)
        for path in (tmp_path / "cache" / "encoded" / "latents").glob("*/*"):
            path.write_bytes(path.read_bytes()[:-9])
        return filled

    monkeypatch.setattr(train_script, "fill_cache", fill_and_break)
    assert fit(tmp_path / "out", **CACHED) == 1
    said = capsys.readouterr().err
    assert re.search(r"encoded/latents/\w\w/\w+\.safetensors: this entry of the cache was removed or broken", said)
    assert "start again, which makes it anew" in said
    assert "Traceback" not in said


def test_a_dry_run_makes_nothing_and_tells_what_is_missing(fit, encoded, tmp_path, capsys):
    assert fit(tmp_path / "out", **CACHED, dry_run=True) == 0
    assert not (tmp_path / "cache" / "encoded").exists()
    said = capsys.readouterr().out
    folder = tmp_path / "cache" / "encoded"
    told = rf"  cache +16 entries, ([\d.]+ KB), in\s+{folder}\n {{13}}16 to be made, \1; [\d.]+ [GT]B are free\n"
    assert re.search(told, said)
    assert "  cache      not used by these two steps; a run takes less time and memory" in said
    assert taken(encoded) == (4, 4)  # by two steps of two images
    assert fit(tmp_path / "out", **CACHED) == 0
    capsys.readouterr()
    assert fit(tmp_path / "dry", **CACHED, dry_run=True) == 0
    said = capsys.readouterr().out
    told = rf"  cache +16 entries, ([\d.]+) KB, in\s+{folder}\n {{13}}0 to be made; [\d.]+ [GT]B are free\n"
    (size,) = re.findall(told, said)
    entries = [load_file(path) for path in folder.rglob("*.safetensors")]
    num_bytes = sum(array.numel() * 4 for entry in entries for array in entry.values())
    assert size == f"{num_bytes / 1e3:.3g}"
    assert "not used" not in said
    assert taken(encoded) == (7, 9)  # by the run before: the two steps took what is there


def test_a_disk_that_is_too_small_is_warned_of(fit, tmp_path, monkeypatch, capsys):
    usage = SimpleNamespace(total=100, used=100, free=50)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    assert fit(tmp_path / "out", **CACHED, dry_run=True) == 0
    told = "warning the cache takes 92.3 KB more, where 0.05 KB are free; make room, or name another --cache_dir"
    assert told in " ".join(capsys.readouterr().out.split())


def test_an_image_that_changes_while_it_is_encoded_is_not_kept(
    fit, train_script, images, tmp_path, monkeypatch, capsys
):
    """Else another picture's posterior would stand under its name for all later runs."""
    data = shutil.copytree(images, tmp_path / "mine")
    plan = train_script.plan_cache

    def plan_then_change(*args):
        found = plan(*args)
        make_image(9, (48, 40)).save(data / "03.png")
        return found

    monkeypatch.setattr(train_script, "plan_cache", plan_then_change)
    assert fit(tmp_path / "out", train_data_dir=data, train_batch_size=1, **CACHED) == 2
    told = f"{data / '03.png'}: changed since it was checked; start again, and it is checked anew\n"
    assert capsys.readouterr().err.endswith(told)
    before = len(entries(tmp_path / "cache", "latents"))
    assert before < 7
    monkeypatch.undo()
    assert fit(tmp_path / "out", train_data_dir=data, **CACHED) == 0
    assert len(entries(tmp_path / "cache", "latents")) == 7


@pytest.mark.slow
def test_a_worker_that_finds_an_image_gone_ends_the_process(tiny_pipeline, images, tmp_path):
    """With a line: workers ignore signals, and would keep the process for ever."""
    data = shutil.copytree(images, tmp_path / "mine")
    code = f"""
import sys
sys.path.insert(0, {str(TRAIN_TEXT_TO_IMAGE.parent)!r})
import train_text_to_image as script
plan = script.plan_cache
def plan_then_break(*args):
    found = plan(*args)
    open({str(data / "05.png")!r}, "w").write("bad")
    return found
script.plan_cache = plan_then_break
script.main(sys.argv[1:])
"""
    settings = {**CACHED, "cache_dir": tmp_path / "cache", "train_batch_size": 1, "dataloader_num_workers": 2}
    line = words(tiny_pipeline, data, tmp_path / "out", **settings)
    ended = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert f"{data / '05.png'}: changed since it was checked; start again, and it is checked anew" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "changes",
    [{"allow_tf32": True}, {"image_interpolation_mode": "bilinear"}, {"mixed_precision": "bf16"}],
)
def test_what_goes_into_the_names_of_entries(tiny_pipeline, tmp_path, changes):
    def names(**settings):
        asked = {"allow_tf32": False, "image_interpolation_mode": "lanczos", **CACHED, **settings}
        args = SimpleNamespace(cache_dir=tmp_path, **asked)
        accelerator = Accelerator(cpu=True)
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
        precision = SimpleNamespace(
            mixed_precision=settings.get("mixed_precision", "no"),
            local_process_index=0,
            num_processes=1,
            is_local_main_process=True,
            wait_for_everyone=accelerator.wait_for_everyone,
        )
        found = cache.plan_cache(args, precision, pipeline, []).cache
        return found.images, found.captions

    here, there = names(), names(**changes)
    assert names() == here
    assert here[0] != there[0]
    assert (here[1] == there[1]) == ("image_interpolation_mode" in changes)  # which captions know nothing of


def test_each_machine_looks_for_all_entries(monkeypatch, tmp_path):
    """One may have a disk of its own, with another share of them: two of its processes look for all."""
    wanted = {f"latents/00/{number}": SimpleNamespace(path=f"{tmp_path}/latents/00/{number}") for number in range(5)}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(cache, "check_entries", lambda chunk: ([entry.path for entry in chunk], []))
    looked = []
    monkeypatch.setattr(cache, "gather_object", lambda found: (looked.extend(found[0][0]), found)[1])
    for rank in (2, 3):  # of four, the second machine's
        accelerator = SimpleNamespace(
            process_index=rank,
            local_process_index=rank - 2,
            num_processes=4,
            is_local_main_process=rank == 2,
            wait_for_everyone=lambda: None,
        )
        cache.find_missing(accelerator, wanted)
    assert sorted(looked) == sorted(entry.path for entry in wanted.values())


def test_a_full_disk_ends_the_build_with_what_is_needed(fit, train_script, tmp_path, monkeypatch, capsys):
    write, left = train_script.write_entry, [3]

    def write_three(path, arrays):
        if not left[0]:
            raise OSError(28, "No space left on device")
        left[0] -= 1
        write(path, arrays)

    monkeypatch.setattr(train_script, "write_entry", write_three)
    assert fit(tmp_path / "out", **CACHED) == 2
    said = capsys.readouterr().err
    folder = tmp_path / "cache" / "encoded"
    assert f"{folder}: the disk is full; 9" in said
    assert said.endswith("GB more are needed there; make room, or name another --cache_dir\n")
    assert len(entries(tmp_path / "cache")) == 3


def test_what_cannot_be_cached_is_refused(fit, tmp_path, capsys):
    assert fit(tmp_path / "out", cache_latents=True) == 2
    told = (
        "--cache_latents=True: a random crop is another image in every epoch; add --center_crop or "
        "--aspect_ratio_buckets, or drop this"
    )
    assert told in capsys.readouterr().err
    settings = {"cache_latents": True, "cache_text_embeddings": True}
    for center_crop, buckets in ((True, False), (False, True)):
        args = SimpleNamespace(**settings, center_crop=center_crop, aspect_ratio_buckets=buckets)
        assert check_cache(args) == []
    assert check_cache(args, trains_text_encoder=True) == [
        "--cache_text_embeddings=True: a text encoder that is trained gives others in every step; drop this or "
        "--train_text_encoder"
    ]
    args.cache_text_embeddings = False
    assert check_cache(args, trains_text_encoder=True) == []


def test_without_a_flag_there_is_no_cache():
    nothing = cache.CachePlan(None, 0, 0, [])
    assert describe_cache(nothing) == (None, [])
    assert check_entries([]) == ([], [])


# --------------------------------------------------------------------------------------------- several at a time


def test_a_killed_build_keeps_what_is_finished(train_script, tiny_pipeline, images, encoded, tmp_path, monkeypatch):
    """kill -9 after the third entry."""
    settings = {**CACHED, "cache_dir": tmp_path / "cache", "max_train_steps": 1}
    line = words(tiny_pipeline, images, tmp_path / "out", **settings)
    write, count = train_script.write_entry, []

    def write_and_die(path, arrays):
        if len(count) == 3:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).with_name(f".{Path(path).name}.1.new").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        count.append(path)
        write(path, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(train_script, "write_entry", write_and_die)
        assert end_of(start_copy(train_script, line, tmp_path / "said")) == -signal.SIGKILL
    finished = {name: found for name, found in entries(tmp_path / "cache").items() if "/." not in name}
    assert len(finished) == 3
    assert train(train_script, tiny_pipeline, images, tmp_path / "out", **settings) == 0
    assert taken(encoded) == (4, 9)
    after = entries(tmp_path / "cache")
    assert all(after[name] == found for name, found in finished.items())


def test_two_builds_at_once_make_one_cache(train_script, tiny_pipeline, images, tmp_path):
    settings = {**CACHED, "cache_dir": tmp_path / "cache", "max_train_steps": 2}
    copies = []
    for name in ("one", "two"):
        line = words(tiny_pipeline, images, tmp_path / name, **settings)
        copies.append(start_copy(train_script, line, tmp_path / f"said_{name}"))
    assert [end_of(copy) for copy in copies] == [0, 0]
    assert same(unet(tmp_path / "one"), unet(tmp_path / "two"))
    assert len(entries(tmp_path / "cache")) == 16


@pytest.mark.slow
def test_two_processes_share_the_build_and_train_as_one(train_script, tiny_pipeline, images, fit, tmp_path):
    settings = {**CACHED, **FLIP_AND_DROP, "cache_dir": tmp_path / "cache", "max_train_steps": 3}
    line = words(tiny_pipeline, images, tmp_path / "two", **settings)
    run_copies(train_script, line, tmp_path / "said")
    assert len(entries(tmp_path / "cache", "latents")) == 14
    assert len(entries(tmp_path / "cache", "captions")) == 9
    assert fit(tmp_path / "one", **{**settings, "train_batch_size": 4}) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


# ------------------------------------------------------------------------------------------------- the other scripts


@pytest.mark.parametrize("path", [TRAIN_DREAMBOOTH, TRAIN_DREAMBOOTH_LORA], ids=lambda path: path.stem)
def test_dreambooth_with_class_images(path, tiny_pipeline, images, encoded, tmp_path):
    """The old flag for captions means the new one."""
    script = load_script(path)
    settings = {
        "train_data_dir": None,
        "instance_data_dir": write_image_folder(tmp_path / "photos", 3, 40, ["a sks dog"] * 3),
        "class_data_dir": write_image_folder(tmp_path / "dogs", 2, 36, ["a dog"] * 2),
        "with_prior_preservation": True,
        "class_prompt": "a dog",
        "num_class_images": 2,
        "instance_prompt": "a sks dog",
        "repeats": 2,
        "center_crop": True,
        "cache_dir": tmp_path / "cache",
        "learning_rate": 1e-4,
    }
    assert train(script, tiny_pipeline, images, tmp_path / "plain", **settings) == 0
    taken(encoded)
    settings |= {"cache_latents": True, "pre_compute_text_embeddings": True}
    assert train(script, tiny_pipeline, images, tmp_path / "cached", **settings) == 0
    assert taken(encoded) == (5, 3)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    refused = {**settings, "train_text_encoder": True}
    assert train(script, tiny_pipeline, images, tmp_path / "refused", **refused) == 2


def test_lora_with_a_trained_text_encoder_caches_images_alone(tiny_pipeline, images, encoded, tmp_path):
    script = load_script(TRAIN_TEXT_TO_IMAGE_LORA)
    settings = {"center_crop": True, "train_text_encoder": True, "cache_dir": tmp_path / "cache"}
    assert train(script, tiny_pipeline, images, tmp_path / "plain", **settings) == 0
    taken(encoded)
    assert train(script, tiny_pipeline, images, tmp_path / "cached", **settings, cache_latents=True) == 0
    assert taken(encoded)[0] == 7
    assert not entries(tmp_path / "cache", "captions")
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
