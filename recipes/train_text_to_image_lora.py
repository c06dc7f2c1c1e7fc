"""Train LoRA adapters for Stable Diffusion 1.x or 2.x on captioned images.

    python train_text_to_image_lora.py --pretrained_model_name_or_path=MODEL --train_data_dir=my_images \
        --resolution=512 --train_batch_size=4 --learning_rate=1e-4 --max_train_steps=5000 --rank=16 \
        --mixed_precision=bf16 --validation_prompts "a drawing of a cat" --output_dir=my_lora

`my_images` holds images and a metadata.jsonl (file_name, text), or a .txt beside each image; the result is
pytorch_lora_weights.safetensors, and on demand the same adapter as A1111, Forge and ComfyUI read it. What is random in
a sample depends on (seed, epoch, index of the sample) alone, and no state of a generator is kept: a run that is killed
and resumed by the same command ends in the same bits on a CPU, and on a GPU in the same up to the order in which its
kernels add.

Papers: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), latent diffusion (2112.10752), DDPM
(2006.11239), v-prediction (2202.00512), min-SNR (2303.09556), zero terminal SNR (2305.08891), input perturbation
(2301.11706).
"""

import functools
from pathlib import Path

from sdtune.arguments import (
    ADAPTERS_FIXED_ON_RESUME,
    ADAPTERS_FREE_ON_RESUME,
    ADAPTERS_REQUIRES,
    AVERAGE_REQUIRES,
    BUCKETS_REQUIRES,
    CACHE_FREE_ON_RESUME,
    DATA_FREE_ON_RESUME,
    DATASET_REQUIRES,
    FIRST_FLAGS,
    MEMORY_FREE_ON_RESUME,
    MEMORY_REQUIRES,
    MODEL_FREE_ON_RESUME,
    OPTIMIZATION_FREE_ON_RESUME,
    OUTPUT_FREE_ON_RESUME,
    OUTPUT_REQUIRES,
    RUN_FREE_ON_RESUME,
    STREAM_REQUIRES,
    VALIDATION_FREE_ON_RESUME,
    add_adapter_arguments,
    add_bucket_arguments,
    add_cache_arguments,
    add_data_arguments,
    add_memory_arguments,
    add_model_arguments,
    add_objective_arguments,
    add_optimization_arguments,
    add_output_arguments,
    add_run_arguments,
    add_validation_arguments,
    check_old_flags,
    check_requirements,
    new_parser,
    put_first,
)
from sdtune.buckets import check_buckets, describe_buckets, fit_of
from sdtune.cache import check_cache, describe_cache, fill_cache, leave_device, plan_cache
from sdtune.dataset import check_data
from sdtune.diffusion import diffusion_losses, encode, encode_prompts
from sdtune.endings import NOTHING_TRAINED, command_to_draw, tell_end
from sdtune.failures import name_of_process, nothing_lost, told_in_a_line
from sdtune.hub import name_repo, push
from sdtune.lora import (
    LORA_TARGETS,
    check_adapters,
    count_adapter_bytes,
    load_models_with_adapters,
    read_adapters_into,
    save_adapters,
    write_adapters,
)
from sdtune.lora_layouts import LORA_FILE
from sdtune.model_card import Training, describe_images, find_trigger, use_of_adapters, write_card
from sdtune.models import check_model, make_faster
from sdtune.optimization import (
    check_optimization,
    check_optimizer,
    group_parameters,
    make_optimizer,
    peak_learning_rate,
)
from sdtune.output import check_output, check_trackers, end_training, new_result, start_trackers
from sdtune.plan import told_in_plan
from sdtune.script import run_launched_script
from sdtune.sharding import whole_models
from sdtune.signals import Stop
from sdtune.states import use_average, write_state_alone
from sdtune.streaming import (
    LeftOut,
    check_streaming,
    count_steps_of,
    describe_stream,
    load_images,
    split_of_stream,
)
from sdtune.training import (
    Work,
    add_up_gradients,
    agree_on_data,
    check_environment,
    check_hardware,
    choose_num_workers,
    load_batches,
    make_accelerator,
    make_state,
    prepare,
    start_output,
    start_run,
    tell_plan,
    train_steps,
    try_steps,
)
from sdtune.validation import check_validation, encode_held_out, prompts_of, validate

REPLACED_FLAGS = {}
REQUIRES = {
    **ADAPTERS_REQUIRES,
    **DATASET_REQUIRES,
    **STREAM_REQUIRES,
    **BUCKETS_REQUIRES,
    **AVERAGE_REQUIRES,
    **MEMORY_REQUIRES,
    **OUTPUT_REQUIRES,
}
FREE_ON_RESUME = {
    *MODEL_FREE_ON_RESUME,
    *ADAPTERS_FREE_ON_RESUME,
    *DATA_FREE_ON_RESUME,
    *OPTIMIZATION_FREE_ON_RESUME,
    *MEMORY_FREE_ON_RESUME,
    *CACHE_FREE_ON_RESUME,
    *OUTPUT_FREE_ON_RESUME,
    *VALIDATION_FREE_ON_RESUME,
    *RUN_FREE_ON_RESUME,
}
FIXED_ON_RESUME = {
    *ADAPTERS_FIXED_ON_RESUME,
    "mixed_precision",
    "channels_last",
    "optimizer",
    "sharding",
    "state",
    "stream",  # which would go on from somewhere else
}  # the state would not fit


def make_parser():
    """The flags of this script."""
    usage = "%(prog)s --pretrained_model_name_or_path MODEL (--train_data_dir FOLDER | --dataset_name NAME) [flags]"
    parser = new_parser(__doc__, usage)
    add_model_arguments(parser)
    add_adapter_arguments(parser, list(LORA_TARGETS))
    add_data_arguments(parser)
    add_bucket_arguments(parser)
    add_objective_arguments(parser)
    add_optimization_arguments(parser)
    add_memory_arguments(parser)
    add_cache_arguments(parser)
    add_output_arguments(parser)
    add_validation_arguments(parser)
    add_run_arguments(parser)
    parser.set_defaults(output_dir="sd-model-finetuned-lora")
    put_first(parser, FIRST_FLAGS)
    return parser


def check_args(args, problems=()):
    """Lists what is wrong with the flags, each with its value, what is accepted and the remedy. `problems` are those
    that were found before."""
    found = check_requirements(args, REQUIRES) + check_old_flags(args)
    found += check_data(args, "train_data_dir") + check_streaming(args)
    found += check_cache(args, args.train_text_encoder)
    found += check_optimization(args) + check_optimizer(args)
    found += check_hardware(args) + check_environment(args) + check_trackers(args) + check_validation(args)
    found += check_output(args, foreign_result="model_index.json")
    found += check_model(args) + check_buckets(args)
    if problems or found:  # the layers are not known, or not how their adapters are to be
        return found
    return check_adapters(args)


def train(args, launcher):
    """Trains as `args` say, which have been checked; `launcher` is the process that started this one, or None."""
    accelerator = make_accelerator(args)
    told = []
    with told_in_plan(told):
        images, held_out, fingerprint = load_images(args, fit=fit_of(args))
    num_processes, num_workers = accelerator.num_processes, choose_num_workers(args.dataloader_num_workers)
    stream = split_of_stream(args, num_processes, num_workers, args.train_batch_size)
    fingerprints = {"captioned_images": fingerprint, "stream": stream}
    agree_on_data(accelerator, fingerprints)
    repo_id = None
    if not args.dry_run:
        repo_id = name_repo(args) if args.push_to_hub and accelerator.is_main_process else None
        start_trackers(args, accelerator)
    pipeline, models, noise_scheduler = load_models_with_adapters(args, accelerator)
    make_faster(args, pipeline.unet)
    counts = count_steps_of(args, images, num_processes)
    groups = group_parameters(args, models, peak_learning_rate(args, counts))
    weights, optimizer = prepare(accelerator, models, make_optimizer(args, groups), write_adapters, read_adapters_into)
    unet, text_encoder = weights.prepared["unet"], weights.prepared.get("text_encoder", pipeline.text_encoder)

    def training_loss(batch):
        """The loss of each sample of a batch (batch,)."""
        latents = encode(pipeline.vae, batch)
        prompt_embeds = encode_prompts(text_encoder, batch)
        return diffusion_losses(unet, noise_scheduler, latents, prompt_embeds, batch, args.snr_gamma)

    state = make_state(args, accelerator, optimizer, weights, counts.last_step)
    run = start_run(args, accelerator, counts, state, fingerprints, weights, FREE_ON_RESUME, FIXED_ON_RESUME)
    cache = plan_cache(args, accelerator, pipeline, [images, held_out])
    about = {
        "data": told,
        "trained": f"LoRA of rank {args.rank} on {args.lora_target} of {' and '.join(models)}",
        "frozen": "all else",
        "result_bytes": count_adapter_bytes(args, weights.parameters),
        "buckets": describe_buckets(args, images),
        "stream": describe_stream(args, images, num_processes, num_workers),
        "cache": describe_cache(cache),
    }
    tell_plan(args, accelerator, run, len(held_out), about)

    prompts = prompts_of(args)
    if not (args.dry_run and cache.missing):
        with told_in_a_line(args, accelerator, "The encoding"):
            images, held_out = fill_cache(args, accelerator, pipeline, [images, held_out], cache)
        leave_device(pipeline, cache, prompts)
    left_out = LeftOut()
    loader = load_batches(args, accelerator, run, images, left_out)
    work = Work(loader, training_loss, add_up_gradients)
    if args.dry_run:
        try_steps(args, accelerator, run, work)
        end_training(accelerator)
        print(NOTHING_TRAINED)
        return

    start_output(args, accelerator, run, make_parser())
    parts = {**pipeline.components, "scheduler": noise_scheduler}
    with told_in_a_line(args, accelerator, "The encoding"):
        held_out = encode_held_out(accelerator, parts["vae"], parts["text_encoder"], held_out, args.train_batch_size)
    look = functools.partial(validate, args, accelerator, run, parts, held_out, prompts)
    stop = Stop(launcher)
    with nothing_lost(args, accelerator, run, stop, functools.partial(write_state_alone, accelerator)):
        train_steps(args, accelerator, run, stop, work, look)
        left_out.tell(name_of_process(accelerator))
        use_average(run)
        models = whole_models(weights)
        if accelerator.is_main_process:
            files = save_model(args, pipeline, models, noise_scheduler, run, images, repo_id)
    if repo_id:
        push(args, repo_id, files, counts.last_step)
    end_training(accelerator)
    if accelerator.is_main_process:
        prompt = (prompts or [find_trigger(None if args.streaming else images.rows) or "a picture"])[0]
        tell_end(args, run, files, command_to_draw(args, pipeline, noise_scheduler, prompt))


def save_model(args, pipeline, models, noise_scheduler, run, images, repo_id):
    """Writes the adapters in diffusers' layout, on demand in kohya's too, and the model card; returns patterns that
    are the adapters' files."""
    with new_result(args.output_dir) as folder:
        files = save_adapters(args, folder, models, run.counts.num_images, run.counts.last_step)
        usage = use_of_adapters(args, pipeline, noise_scheduler, LORA_FILE, repo_id)
        training = Training(
            trained="LoRA adapters for",
            images=describe_images(run),
            trigger=find_trigger(None if args.streaming else images.rows),
            tags=["lora"],
        )
        write_card(args, make_parser(), folder, run, prompts_of(args), usage, training)
    return files


def main(argv=None):
    """Runs the script; a mistake of the user's ends with status 2 and its message."""
    run_launched_script(Path(__file__).name, make_parser(), argv, REPLACED_FLAGS, check_args, train)


if __name__ == "__main__":
    main()
