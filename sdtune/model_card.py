"""The model card, README.md of a result."""

import contextlib
import os
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

# Places, secrets and how it was started.
NOT_ON_CARD = re.compile(r"_dir$|_path$|_token|_address$|host|local_rank|config|resume")


def write_card(args, folder, step, prompts, loader, tags, instance_prompt=None):
    """Writes the model card into a folder: licence of the base, how to load the result, samples, settings; no paths,
    no secrets."""
    base, name = args.pretrained_model_name_or_path, Path(args.output_dir).resolve().name
    is_local = Path(base).exists()
    licence = None
    with contextlib.suppress(Exception):  # no card, no connection, bad YAML: a licence must not cost a result
        licence = ModelCard.load(Path(base) / "README.md" if is_local else base).data.license
    data = ModelCardData(
        base_model=None if is_local else base,
        license=licence or "other",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags,
        instance_prompt=instance_prompt,
    )
    text = f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n"
    text += f"Fine-tuned for {step} steps from {Path(base).name if is_local else base}. Load it with {loader}.\n\n"
    if prompts:
        text += f"![samples](samples/step-{step:06d}.png)\n\n{'; '.join(dict.fromkeys(prompts))}\n\n"
    text += "| setting | value |\n|---|---|\n"
    for flag, value in vars(args).items():
        is_given = value is not None and value is not False
        is_file = isinstance(value, str) and os.path.exists(value)
        if is_given and not is_file and not NOT_ON_CARD.search(flag):
            shown = str(value).replace("|", " ")
            text += f"| {flag} | {shown} |\n"
    Path(folder, "README.md").write_text(text, encoding="utf-8")
