"""Fine-tune the UNet of Stable Diffusion 1.x or 2.x on captioned images.

    python train_text_to_image.py --pretrained_model_name_or_path=MODEL --train_data_dir=my_images \
        --resolution=512 --train_batch_size=4 --learning_rate=1e-5 --max_train_steps=5000 --use_ema \
        --mixed_precision=bf16 --validation_prompts "a drawing of a cat" --output_dir=my_model

`my_images` holds images and a metadata.jsonl (file_name, text), or a .txt beside each image; the result is a pipeline
folder. What is random in a sample depends on (seed, epoch, index of the sample) alone, and no state of a generator is
kept: a run that is killed and resumed by the same command ends in the same bits on a CPU, and on a GPU in the same up
to the order in which its kernels add.

Papers: latent diffusion (arXiv 2112.10752), DDPM (2006.11239), v-prediction (2202.00512), min-SNR (2303.09556), zero
terminal SNR (2305.08891), input perturbation (2301.11706).
"""

import functools
from pathlib import Path

import torch

from sdtune.arguments import (
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
    SWITCH,
    VALIDATION_FREE_ON_RESUME,
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
from sdtune.full_bf16 import check_full_bf16, make_fused_optimizer, update_in_backward
from sdtune.hub import name_repo, push
from sdtune.model_card import Training, describe_images, find_trigger, use_of_pipeline, write_card
from sdtune.models import (
    DTYPES,
    check_model,
    enable_memory_savers,
    frozen,
    load_base,
    load_unet,
    make_faster,
    make_noise_scheduler,
    read_models,
    with_whole_parts,
    write_models,
)
from sdtune.optimization import check_layout, check_optimization, check_optimizer, make_optimizer, peak_learning_rate
from sdtune.output import (
    check_output,
    check_trackers,
    count_result_bytes,
    end_training,
    new_result,
    save_pipeline,
    start_trackers,
)
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

REPLACED_FLAGS = {
    "--dream_training": "use --snr_gamma=5 to weigh timesteps",
    "--dream_detail_preservation": "use --snr_gamma=5 to weigh timesteps",
}
REQUIRES = {
    **DATASET_REQUIRES,
    **STREAM_REQUIRES,
    **BUCKETS_REQUIRES,
    **AVERAGE_REQUIRES,
    **MEMORY_REQUIRES,
    **OUTPUT_REQUIRES,
}
FREE_ON_RESUME = {
    *MODEL_FREE_ON_RESUME,
    *DATA_FREE_ON_RESUME,
    *OPTIMIZATION_FREE_ON_RESUME,
    *MEMORY_FREE_ON_RESUME,
    *CACHE_FREE_ON_RESUME,
    *OUTPUT_FREE_ON_RESUME,
    *VALIDATION_FREE_ON_RESUME,
    *RUN_FREE_ON_RESUME,
}
FIXED_ON_RESUME = {
    "full_bf16",
    "mixed_precision",
    "channels_last",
    "optimizer",
    "sharding",
    "state",
    "stream",  # which would go on from somewhere else
}  # the checkpoint's state would not fit


def make_parser():
    """The flags of this script."""
    usage = "%(prog)s --pretrained_model_name_or_path MODEL (--train_data_dir FOLDER | --dataset_name NAME) [flags]"
    parser = new_parser(__doc__, usage)
    add_model_arguments(parser)
    add = parser.add_argument_group("trained model").add_argument
    add("--non_ema_revision", help="branch, tag or commit of the UNet to train, where that is not --revision")
    add(
        "--full_bf16",
        **SWITCH,
        help="weights, gradients and moments in bfloat16, a third of the memory; needs --mixed_precision=bf16 and "
        "--max_grad_norm=inf",
    )
    add_data_arguments(parser)
    add_bucket_arguments(parser)
    add_objective_arguments(parser)
    add_optimization_arguments(parser)
    add_memory_arguments(parser)
    add_cache_arguments(parser)
    add_output_arguments(parser)
    add_validation_arguments(parser)
    add_run_arguments(parser)
    parser.set_defaults(output_dir="sd-model-finetuned")
    put_first(parser, FIRST_FLAGS)
    return parser


def check_args(args, problems=()):
    """Lists what is wrong with the flags, each with its value, what is accepted and the remedy. `problems` are those
    that were found before."""
    found = check_requirements(args, REQUIRES) + check_old_flags(args)
    found += check_data(args, "train_data_dir") + check_streaming(args)
    found += check_cache(args)
    found += check_optimization(args) + check_optimizer(args) + check_full_bf16(args) + check_layout(args)
    found += check_hardware(args) + check_environment(args) + check_trackers(args) + check_validation(args)
    found += check_output(args, foreign_result="pytorch_lora_weights.safetensors")
    found += check_model(args) + check_buckets(args)
    if args.non_ema_revision and Path(args.pretrained_model_name_or_path or "").exists():
        found.append(f"--non_ema_revision={args.non_ema_revision}: does nothing without a model on the Hub; drop this")
    return found


def load_models(args, accelerator):
    """Returns the base's pipeline, whose UNet is to be trained in float32, in bfloat16 by --full_bf16, with VAE and
    text encoder frozen in the precision of passes, and the noise scheduler. Raises `InputError`."""
    pipeline = load_base(args)
    if args.non_ema_revision:
        pipeline.register_modules(unet=load_unet(args, args.non_ema_revision))
    weight_dtype = DTYPES[accelerator.mixed_precision]
    enable_memory_savers(args, pipeline.unet, accelerator.device, weight_dtype)
    for part in (pipeline.vae, pipeline.text_encoder):
        frozen(part, accelerator.device, weight_dtype)
    pipeline.unet.requires_grad_(True).train()
    pipeline.unet.to(accelerator.device, torch.bfloat16 if args.full_bf16 else torch.float32)
    return pipeline, make_noise_scheduler(args, pipeline)


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
    pipeline, noise_scheduler = load_models(args, accelerator)
    make_faster(args, pipeline.unet)
    counts = count_steps_of(args, images, num_processes)
    groups = [{"params": list(pipeline.unet.parameters()), "lr": peak_learning_rate(args, counts)}]
    optimizer = make_fused_optimizer(args, groups) if args.full_bf16 else make_optimizer(args, groups)
    weights, optimizer = prepare(accelerator, {"unet": pipeline.unet}, optimizer, write_models, read_models)
    unet = weights.prepared["unet"]

    def training_loss(batch):
        """The loss of each sample of a batch (batch,)."""
        latents = encode(pipeline.vae, batch)
        prompt_embeds = encode_prompts(pipeline.text_encoder, batch)
        return diffusion_losses(unet, noise_scheduler, latents, prompt_embeds, batch, args.snr_gamma)

    state = make_state(args, accelerator, optimizer, weights, counts.last_step)
    run = start_run(args, accelerator, counts, state, fingerprints, weights, FREE_ON_RESUME, FIXED_ON_RESUME)
    cache = plan_cache(args, accelerator, pipeline, [images, held_out])
    about = {
        "data": told,
        "trained": "UNet",
        "frozen": "VAE, text encoder",
        "result_bytes": count_result_bytes(args, pipeline),
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
    make_gradients = update_in_backward if args.full_bf16 else add_up_gradients
    work = Work(loader, training_loss, make_gradients)
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
    """Writes the pipeline with `models`, by name, and the model card; returns patterns that are the pipeline's
    files."""
    pipeline.register_modules(**models)
    pipeline = with_whole_parts(args, pipeline, models)
    with new_result(args.output_dir) as folder:
        files = save_pipeline(args, folder, pipeline, noise_scheduler)
        usage = use_of_pipeline(args, pipeline, repo_id)
        training = Training(
            trained="The UNet of",
            images=describe_images(run),
            trigger=find_trigger(None if args.streaming else images.rows),
            tags=[],
        )
        write_card(args, make_parser(), folder, run, prompts_of(args), usage, training)
    return files


def main(argv=None):
    """Runs the script; a mistake of the user's ends with status 2 and its message."""
    run_launched_script(Path(__file__).name, make_parser(), argv, REPLACED_FLAGS, check_args, train)


if __name__ == "__main__":
    main()
