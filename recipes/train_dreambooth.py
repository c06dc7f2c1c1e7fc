"""DreamBooth: teach Stable Diffusion 1.x or 2.x one subject from three to thirty photos.

    python train_dreambooth.py --pretrained_model_name_or_path=MODEL --instance_data_dir=my_dog \
        --instance_prompt="a photo of sks dog" --with_prior_preservation --class_data_dir=dogs \
        --class_prompt="a photo of a dog" --resolution=512 --train_batch_size=1 --learning_rate=5e-6 \
        --max_train_steps=800 --mixed_precision=bf16 --validation_prompt="a sks dog on a beach" --output_dir=my_model

`my_dog` holds the photos. Prior preservation keeps the class as it was: images of it, drawn by the base before
training, are trained on beside the photos. The result is a pipeline folder. What is random in a sample depends on
(seed, epoch, index of the sample) alone, and no state of a generator is kept: a run that is killed and resumed by the
same command ends in the same bits on a CPU, and on a GPU in the same up to the order in which its kernels add.

Papers: DreamBooth (arXiv 2208.12242), latent diffusion (2112.10752), DDPM (2006.11239), v-prediction (2202.00512),
min-SNR (2303.09556), zero terminal SNR (2305.08891), input perturbation (2301.11706).
"""

import functools
from pathlib import Path

import torch

from sdtune.arguments import (
    AVERAGE_REQUIRES,
    BUCKETS_REQUIRES,
    CACHE_FREE_ON_RESUME,
    CLASS_FREE_ON_RESUME,
    CLASS_REQUIRES,
    DATASET_REQUIRES,
    FIRST_FLAGS,
    MEMORY_FREE_ON_RESUME,
    MEMORY_REQUIRES,
    MODEL_FREE_ON_RESUME,
    OPTIMIZATION_FREE_ON_RESUME,
    OUTPUT_FREE_ON_RESUME,
    OUTPUT_REQUIRES,
    RUN_FREE_ON_RESUME,
    SUBJECT_FREE_ON_RESUME,
    SUBJECT_REPLACED_FLAGS,
    SWITCH,
    TEXT_ENCODER_REQUIRES,
    VALIDATION_FREE_ON_RESUME,
    add_bucket_arguments,
    add_cache_arguments,
    add_class_arguments,
    add_memory_arguments,
    add_model_arguments,
    add_objective_arguments,
    add_optimization_arguments,
    add_output_arguments,
    add_run_arguments,
    add_subject_arguments,
    add_text_encoder_rate,
    add_validation_arguments,
    check_old_flags,
    check_requirements,
    new_parser,
    put_first,
)
from sdtune.batches import count_steps
from sdtune.buckets import check_buckets, describe_buckets, fit_of
from sdtune.cache import check_cache, describe_cache, fill_cache, leave_device, plan_cache
from sdtune.dataset import check_data, load_data
from sdtune.diffusion import diffusion_losses, encode, encode_prompts
from sdtune.endings import NOTHING_TRAINED, command_to_draw, tell_end
from sdtune.failures import nothing_lost, told_in_a_line
from sdtune.full_bf16 import check_full_bf16, make_fused_optimizer, update_in_backward
from sdtune.hub import name_repo, push
from sdtune.model_card import Training, describe_subject, find_trigger, use_of_pipeline, write_card
from sdtune.models import (
    DTYPES,
    check_model,
    enable_memory_savers,
    frozen,
    load_base,
    make_faster,
    make_noise_scheduler,
    read_models,
    with_whole_parts,
    write_models,
)
from sdtune.optimization import (
    check_layout,
    check_optimization,
    check_optimizer,
    group_parameters,
    keep_embeddings_whole,
    make_optimizer,
    optimizer_of,
    peak_learning_rate,
)
from sdtune.output import (
    check_output,
    check_trackers,
    count_result_bytes,
    end_training,
    new_result,
    save_pipeline,
    start_trackers,
)
from sdtune.plan import describe_kinds, told_in_plan
from sdtune.script import run_launched_script
from sdtune.sharding import whole_models
from sdtune.signals import Stop
from sdtune.states import use_average, write_state_alone
from sdtune.subject import (
    check_subject,
    draw_class_images,
    load_class_images,
    stand_ins,
    with_class_rows,
    with_classes,
)
from sdtune.training import (
    Work,
    add_up_gradients,
    agree_on_data,
    batches_of,
    check_environment,
    check_hardware,
    make_accelerator,
    make_loader,
    make_state,
    prepare,
    start_output,
    start_run,
    tell_plan,
    train_steps,
    try_steps,
)
from sdtune.validation import check_validation, encode_held_out, prompts_of, validate

REQUIRES = {
    **TEXT_ENCODER_REQUIRES,
    **DATASET_REQUIRES,
    **BUCKETS_REQUIRES,
    **AVERAGE_REQUIRES,
    **MEMORY_REQUIRES,
    **OUTPUT_REQUIRES,
    **CLASS_REQUIRES,
}
FREE_ON_RESUME = {
    *MODEL_FREE_ON_RESUME,
    *SUBJECT_FREE_ON_RESUME,
    *CLASS_FREE_ON_RESUME,
    *OPTIMIZATION_FREE_ON_RESUME,
    *MEMORY_FREE_ON_RESUME,
    *CACHE_FREE_ON_RESUME,
    *OUTPUT_FREE_ON_RESUME,
    *VALIDATION_FREE_ON_RESUME,
    *RUN_FREE_ON_RESUME,
    "skip_save_text_encoder",
}
FIXED_ON_RESUME = {
    "channels_last",
    "full_bf16",
    "mixed_precision",
    "optimizer",
    "sharding",
    "state",
    "text_encoder_apart",
    "train_text_encoder",
}  # the checkpoint's state would not fit


def make_parser():
    """The flags of this script."""
    usage = "%(prog)s --pretrained_model_name_or_path MODEL --instance_data_dir FOLDER --instance_prompt TEXT [flags]"
    parser = new_parser(__doc__, usage)
    add_model_arguments(parser)
    add = parser.add_argument_group("trained models").add_argument
    add("--train_text_encoder", **SWITCH, help="train the text encoder too: a closer likeness, more memory")
    add_text_encoder_rate(add)
    add("--skip_save_text_encoder", **SWITCH, help="leave the text encoder out of the result, which needs the base's")
    add(
        "--full_bf16",
        **SWITCH,
        help="weights, gradients and moments in bfloat16, a third of the memory; needs --mixed_precision=bf16 and "
        "--max_grad_norm=inf",
    )
    add_subject_arguments(parser)
    add_bucket_arguments(parser)
    add_class_arguments(parser)
    add_objective_arguments(parser)
    add_optimization_arguments(parser)
    add_memory_arguments(parser)
    add_cache_arguments(parser)
    add_output_arguments(parser)
    add_validation_arguments(parser)
    add_run_arguments(parser)
    parser.set_defaults(
        learning_rate=5e-6, output_dir="dreambooth-model", tracker_project_name="dreambooth", train_batch_size=4
    )
    put_first(parser, FIRST_FLAGS)
    return parser


def check_args(args, problems=()):
    """Lists what is wrong with the flags, each with its value, what is accepted and the remedy. `problems` are those
    that were found before."""
    found = check_requirements(args, REQUIRES) + check_old_flags(args)
    found += check_data(args, "instance_data_dir") + check_subject(args)
    found += check_cache(args, args.train_text_encoder)
    found += check_optimization(args) + check_optimizer(args) + check_full_bf16(args) + check_layout(args)
    found += check_hardware(args) + check_environment(args) + check_trackers(args) + check_validation(args)
    found += check_output(args, foreign_result="pytorch_lora_weights.safetensors")
    found += check_model(args) + check_buckets(args)
    if args.skip_save_text_encoder and args.train_text_encoder:
        found.append("--skip_save_text_encoder=True: would lose what --train_text_encoder trained; drop one")
    return found


def load_models(args, accelerator):
    """Returns the base's pipeline, with what is frozen in the precision of passes, its models that are trained, by
    name and in float32 (in bfloat16 by --full_bf16), and the noise scheduler. Raises `InputError`."""
    pipeline = load_base(args)
    weight_dtype = DTYPES[accelerator.mixed_precision]
    enable_memory_savers(args, pipeline.unet, accelerator.device, weight_dtype)
    frozen(pipeline.vae, accelerator.device, weight_dtype)
    models = {"unet": pipeline.unet}
    if args.train_text_encoder:
        models["text_encoder"] = pipeline.text_encoder
        if args.gradient_checkpointing:
            pipeline.text_encoder.activation_checkpointing_enable()
    else:
        frozen(pipeline.text_encoder, accelerator.device, weight_dtype)
    for model in models.values():
        model.requires_grad_(True).train()
        model.to(accelerator.device, torch.bfloat16 if args.full_bf16 else torch.float32)
    return pipeline, models, make_noise_scheduler(args, pipeline)


def train(args, launcher):
    """Trains as `args` say, which have been checked; `launcher` is the process that started this one, or None."""
    accelerator = make_accelerator(args)
    told = []
    with told_in_plan(told):
        images, held_out, fingerprint = load_data(
            args, args.instance_data_dir, args.instance_prompt, args.repeats, fit_of(args)
        )
    with told_in_plan(told):
        class_images = load_class_images(args)
    agree_on_data(accelerator, {"photos": fingerprint, "class_images_to_draw": class_images.missing})
    if class_images.missing and not args.dry_run:
        print(told.pop(), end="", flush=True)  # the plan comes when they are there
        draw_class_images(args, accelerator, class_images.missing)
        with told_in_plan(told):
            class_images = load_class_images(args)
    fingerprints = {"captioned_images": fingerprint, "class_data": class_images.fingerprint}
    agree_on_data(accelerator, fingerprints)
    repo_id = None
    if not args.dry_run:
        repo_id = name_repo(args) if args.push_to_hub and accelerator.is_main_process else None
        start_trackers(args, accelerator)
    pipeline, models, noise_scheduler = load_models(args, accelerator)
    make_faster(args, pipeline.unet)
    parts = {**pipeline.components, "scheduler": noise_scheduler}
    counts = count_steps(args, len(images), accelerator.num_processes, images.sizes)
    groups = group_parameters(args, models, peak_learning_rate(args, counts))
    if args.text_encoder_lr is None:  # one group of all, which is what checkpoints of such runs have always held
        parameters = [parameter for group in groups for parameter in group["params"]]
        groups = [{**groups[0], "params": parameters}]
    fingerprints["text_encoder_apart"] = len(groups) > 1  # by which the optimizer's state differs
    optimizer = make_fused_optimizer(args, groups) if args.full_bf16 else make_optimizer(args, groups)
    weights, optimizer = prepare(accelerator, models, optimizer, write_models, read_models)
    unet, text_encoder = weights.prepared["unet"], weights.prepared.get("text_encoder", pipeline.text_encoder)

    def training_loss(batch):
        """The loss of each sample of a batch (batch,)."""
        latents = encode(pipeline.vae, batch)
        prompt_embeds = encode_prompts(text_encoder, batch)
        return diffusion_losses(unet, noise_scheduler, latents, prompt_embeds, batch, args.snr_gamma)

    state = make_state(args, accelerator, optimizer, weights, counts.last_step)
    if optimizer_of(args) == "adamw8bit":
        keep_embeddings_whole(optimizer, models.values())
    run = start_run(args, accelerator, counts, state, fingerprints, weights, FREE_ON_RESUME, FIXED_ON_RESUME)
    if args.dry_run:
        class_images = stand_ins(class_images, images)
    samples = with_class_rows(images, class_images)
    cache = plan_cache(args, accelerator, pipeline, [samples, held_out])
    about = {
        "kinds": describe_kinds(images, args.repeats, args.instance_prompt),
        "data": told,
        "trained": "UNet, text encoder" if args.train_text_encoder else "UNet",
        "frozen": "VAE" if args.train_text_encoder else "VAE, text encoder",
        "result_bytes": count_result_bytes(args, pipeline, not args.skip_save_text_encoder),
        "buckets": describe_buckets(args, images),
        "cache": describe_cache(cache),
    }
    tell_plan(args, accelerator, run, len(held_out), about)

    prompts = prompts_of(args)
    if not (args.dry_run and cache.missing):
        with told_in_a_line(args, accelerator, "The encoding"):
            samples, held_out = fill_cache(args, accelerator, pipeline, [samples, held_out], cache)
        leave_device(pipeline, cache, prompts)
    batches = batches_of(args, accelerator, run)
    num_classes = len(class_images.checked.rows) if class_images.checked else 0
    batches = with_classes(batches, len(images), num_classes, args.prior_loss_weight, args.seed, counts.buckets)
    loader = make_loader(args, accelerator, samples, batches)
    make_gradients = update_in_backward if args.full_bf16 else add_up_gradients
    work = Work(loader, training_loss, make_gradients)
    if args.dry_run:
        try_steps(args, accelerator, run, work)
        end_training(accelerator)
        print(NOTHING_TRAINED)
        return

    start_output(args, accelerator, run, make_parser())
    with told_in_a_line(args, accelerator, "The encoding"):
        held_out = encode_held_out(accelerator, parts["vae"], parts["text_encoder"], held_out, args.train_batch_size)
    look = functools.partial(validate, args, accelerator, run, parts, held_out, prompts)
    stop = Stop(launcher)
    with nothing_lost(args, accelerator, run, stop, functools.partial(write_state_alone, accelerator)):
        train_steps(args, accelerator, run, stop, work, look)
        use_average(run)
        models = whole_models(weights)
        if accelerator.is_main_process:
            photos = describe_subject(args, len(images), num_classes)
            files = save_model(args, pipeline, models, noise_scheduler, run, images, photos, repo_id)
    if repo_id:
        push(args, repo_id, files, counts.last_step)
    end_training(accelerator)
    if accelerator.is_main_process:
        prompt = (prompts or [args.instance_prompt or find_trigger(images.rows) or "a picture"])[0]
        tell_end(args, run, files, command_to_draw(args, pipeline, noise_scheduler, prompt))


def save_model(args, pipeline, models, noise_scheduler, run, images, photos, repo_id):
    """Writes the pipeline with `models`, by name, and the model card, which says of the `photos` what they are;
    returns patterns that are the pipeline's files."""
    pipeline.register_modules(**models)
    pipeline = with_whole_parts(args, pipeline, models)
    with new_result(args.output_dir) as folder:
        if args.skip_save_text_encoder:
            pipeline.register_modules(text_encoder=None)
        files = save_pipeline(args, folder, pipeline, noise_scheduler)
        usage = use_of_pipeline(args, pipeline, repo_id)
        training = Training(
            trained=f"DreamBooth: the UNet {'and the text encoder ' if args.train_text_encoder else ''}of",
            images=photos,
            trigger=args.instance_prompt or find_trigger(images.rows),
            tags=["dreambooth"],
        )
        write_card(args, make_parser(), folder, run, prompts_of(args), usage, training)
    return files


def main(argv=None):
    """Runs the script; a mistake of the user's ends with status 2 and its message."""
    run_launched_script(Path(__file__).name, make_parser(), argv, SUBJECT_REPLACED_FLAGS, check_args, train)


if __name__ == "__main__":
    main()
