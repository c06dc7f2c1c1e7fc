"""DreamBooth with LoRA: teach Stable Diffusion 1.x or 2.x one subject from three to thirty photos, by adapters.

    python train_dreambooth_lora.py --pretrained_model_name_or_path=MODEL --instance_data_dir=my_dog \
        --instance_prompt="a photo of sks dog" --with_prior_preservation --class_data_dir=dogs \
        --class_prompt="a photo of a dog" --resolution=512 --train_batch_size=1 --learning_rate=1e-4 --rank=16 \
        --max_train_steps=500 --mixed_precision=bf16 --validation_prompt="a sks dog on a beach" --output_dir=my_lora

`my_dog` holds the photos. Prior preservation keeps the class as it was: images of it, drawn by the base before
training, are trained on beside the photos. The result is pytorch_lora_weights.safetensors, and on demand the same
adapter as A1111, Forge and ComfyUI read it. What is random in a sample depends on (seed, epoch, index of the sample)
alone, and no state of a generator is kept: a run that is killed and resumed by the same command ends in the same bits
on a CPU, and on a GPU in the same up to the order in which its kernels add.

Papers: DreamBooth (arXiv 2208.12242), LoRA (2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), latent diffusion
(2112.10752), DDPM (2006.11239), v-prediction (2202.00512), min-SNR (2303.09556), zero terminal SNR (2305.08891), input
perturbation (2301.11706).
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
    VALIDATION_FREE_ON_RESUME,
    add_adapter_arguments,
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
from sdtune.model_card import Training, describe_subject, find_trigger, use_of_adapters, write_card
from sdtune.models import check_model, make_faster
from sdtune.optimization import (
    check_optimization,
    check_optimizer,
    group_parameters,
    make_optimizer,
    peak_learning_rate,
)
from sdtune.output import check_output, check_trackers, end_training, new_result, start_trackers
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
    **ADAPTERS_REQUIRES,
    **DATASET_REQUIRES,
    **BUCKETS_REQUIRES,
    **AVERAGE_REQUIRES,
    **MEMORY_REQUIRES,
    **OUTPUT_REQUIRES,
    **CLASS_REQUIRES,
}
FREE_ON_RESUME = {
    *MODEL_FREE_ON_RESUME,
    *ADAPTERS_FREE_ON_RESUME,
    *SUBJECT_FREE_ON_RESUME,
    *CLASS_FREE_ON_RESUME,
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
}  # the state would not fit


def make_parser():
    """The flags of this script."""
    usage = "%(prog)s --pretrained_model_name_or_path MODEL --instance_data_dir FOLDER --instance_prompt TEXT [flags]"
    parser = new_parser(__doc__, usage)
    add_model_arguments(parser)
    add_adapter_arguments(parser, list(LORA_TARGETS))
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
    parser.set_defaults(output_dir="dreambooth-lora", tracker_project_name="dreambooth", train_batch_size=4)
    put_first(parser, FIRST_FLAGS)
    return parser


def check_args(args, problems=()):
    """Lists what is wrong with the flags, each with its value, what is accepted and the remedy. `problems` are those
    that were found before."""
    found = check_requirements(args, REQUIRES) + check_old_flags(args)
    found += check_data(args, "instance_data_dir") + check_subject(args)
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
    pipeline, models, noise_scheduler = load_models_with_adapters(args, accelerator)
    make_faster(args, pipeline.unet)
    counts = count_steps(args, len(images), accelerator.num_processes, images.sizes)
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
    if args.dry_run:
        class_images = stand_ins(class_images, images)
    samples = with_class_rows(images, class_images)
    cache = plan_cache(args, accelerator, pipeline, [samples, held_out])
    about = {
        "kinds": describe_kinds(images, args.repeats, args.instance_prompt),
        "data": told,
        "trained": f"LoRA of rank {args.rank} on {args.lora_target} of {' and '.join(models)}",
        "frozen": "all else",
        "result_bytes": count_adapter_bytes(args, weights.parameters),
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
    """Writes the adapters in diffusers' layout, on demand in kohya's too, and the model card, which says of the
    `photos` what they are; returns patterns that are the adapters' files."""
    with new_result(args.output_dir) as folder:
        files = save_adapters(args, folder, models, len(images), run.counts.last_step)
        usage = use_of_adapters(args, pipeline, noise_scheduler, LORA_FILE, repo_id)
        training = Training(
            trained="DreamBooth: LoRA adapters for",
            images=photos,
            trigger=args.instance_prompt or find_trigger(images.rows),
            tags=["dreambooth", "lora"],
        )
        write_card(args, make_parser(), folder, run, prompts_of(args), usage, training)
    return files


def main(argv=None):
    """Runs the script; a mistake of the user's ends with status 2 and its message."""
    run_launched_script(Path(__file__).name, make_parser(), argv, SUBJECT_REPLACED_FLAGS, check_args, train)


if __name__ == "__main__":
    main()
