# Two commands matter: `make demo` shows what the scripts do, `make test` proves it. Both install by themselves.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install demo demo-lora demo-dreambooth demo-flax demo-emoji test torture scripts check clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Tests run in processes of their own with one thread each: more threads on few cores only wait for each other.
TEST_WORKERS ?= 2
PYTEST_ARGS ?=

# `accelerate launch` gives a process one thread unless it is told otherwise.
THREADS ?= $(shell nproc)
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(THREADS)

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## fill .venv, all but xFormers, by constraints.txt (other targets do it too)

# The stamp is written last, so that an interrupted install is taken up again by the next target.
$(INSTALLED): constraints.txt $(wildcard requirements*.txt) setup.cfg pyproject.toml
	$(BIN)/python -c "" 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--requirement requirements_flax.txt --editable ".[tools,trackers,deepspeed,dev]"
	@touch $@

demo: $(INSTALLED) demo/creatures/metadata.jsonl  ## fine-tune the miniature on drawn creatures, show before and after
	HF_HUB_OFFLINE=1 $(LAUNCH) examples/text_to_image/train_text_to_image.py \
		--config examples/configs/demo_creatures.yaml --overwrite_output_dir
	@HF_HUB_OFFLINE=1 $(BIN)/python miniature/compare.py \
		--base miniature/pipeline --model demo/model --output demo/base_above_result.png

demo-lora: $(INSTALLED) demo/creatures/metadata.jsonl  ## the same with LoRA adapters
	HF_HUB_OFFLINE=1 $(LAUNCH) examples/text_to_image/train_text_to_image_lora.py \
		--config examples/configs/demo_creatures_lora.yaml --overwrite_output_dir
	@HF_HUB_OFFLINE=1 $(BIN)/python miniature/compare.py \
		--base miniature/pipeline --model demo/lora --output demo/base_above_lora.png

demo-dreambooth: $(INSTALLED) demo/subject/metadata.jsonl  ## five views teach the miniature one subject
	HF_HUB_OFFLINE=1 $(LAUNCH) examples/dreambooth/train_dreambooth.py \
		--config examples/configs/dreambooth.yaml --overwrite_output_dir
	@HF_HUB_OFFLINE=1 $(BIN)/python miniature/compare.py --base miniature/pipeline --model demo/dreambooth \
		--recipe examples/configs/dreambooth.yaml --photos demo/subject --output demo/subject.png

demo-flax: $(INSTALLED) demo/creatures/metadata.jsonl  ## fine-tune the miniature in JAX
	HF_HUB_OFFLINE=1 $(BIN)/python examples/text_to_image/train_text_to_image_flax.py \
		--config examples/configs/demo_creatures_flax.yaml --overwrite_output_dir
	@HF_HUB_OFFLINE=1 $(BIN)/python miniature/compare.py \
		--base miniature/pipeline --model demo/flax --output demo/base_above_flax.png

demo-emoji: $(INSTALLED) demo/emoji/train/metadata.jsonl  ## teach the miniature real pictures: Noto emoji, by LoRA
	HF_HUB_OFFLINE=1 $(LAUNCH) examples/text_to_image/train_text_to_image_lora.py \
		--config examples/configs/emoji.yaml --overwrite_output_dir
	@HF_HUB_OFFLINE=1 $(BIN)/python miniature/measure_emoji.py --model demo/emoji_lora --base miniature/pipeline \
		--output demo/emoji.json --picture demo/emoji.png
	@for split in "train --num_validation_samples 47" "held_out --num_validation_samples 6 --num_images 3"; do \
		echo "Evaluation of demo/emoji/$$split"; \
		HF_HUB_OFFLINE=1 $(BIN)/python -m sdtune evaluate miniature/pipeline demo/emoji/$$split \
			--lora demo/emoji_lora --base miniature/pipeline --config examples/configs/emoji.yaml \
			--output_dir demo/emoji_evaluation/$${split%% *} --overwrite || exit; \
	done

# The stars in demo/stars are drawn by the miniature, and are to be those of the one that is here.
demo/subject/metadata.jsonl: miniature/render.py $(wildcard miniature/pipeline/*/*.safetensors) | $(INSTALLED)
	rm -rf demo/subject demo/stars
	$(BIN)/python miniature/render.py subject --output_dir demo/subject --num_images 5 --seed 0

demo/creatures/metadata.jsonl: miniature/render.py | $(INSTALLED)
	rm -rf demo/creatures
	$(BIN)/python miniature/render.py creatures --output_dir demo/creatures --num_images 240 --seed 0 --split train

# Fetched first, so that without a network nothing else is tried.
demo/noto/icons.json: | $(INSTALLED)
	@$(BIN)/python miniature/emoji.py fetch --package_dir demo/noto

$(VENV)/.installed_emoji: constraints.txt requirements_emoji.txt demo/noto/icons.json | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--requirement requirements_emoji.txt
	@touch $@

demo/emoji/train/metadata.jsonl: miniature/emoji.py demo/noto/icons.json $(VENV)/.installed_emoji
	rm -rf demo/emoji
	$(BIN)/python miniature/emoji.py render --package_dir demo/noto --output_dir demo/emoji

test: $(INSTALLED)  ## run all tests, offline and on the CPU; PYTEST_ARGS="-k resume" picks some
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

torture: $(INSTALLED)  ## kill, fill and damage runs of every script, for half an hour; `make test` does some of it
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal --torture \
		$(PYTEST_ARGS) tests/torture

scripts: $(INSTALLED)  ## build the scripts in examples/ from recipes/ and sdtune/, and list their flags in docs/
	$(BIN)/python tools/build_scripts.py
	$(BIN)/python tools/write_flags.py

check: $(INSTALLED)  ## lint, formatting, and whether scripts and docs/flags.md are as they are made
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/build_scripts.py --check
	$(BIN)/python tools/write_flags.py --check

clean:  ## remove what the demo and the tests left (not .venv)
	rm -rf demo .pytest_cache .ruff_cache .coverage htmlcov
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
