"""Fine-tune the UNet of Stable Diffusion 1.x or 2.x on captioned images, in JAX: on TPUs, GPUs or a CPU.

    python train_text_to_image_flax.py --pretrained_model_name_or_path=MODEL --train_data_dir=my_images \
        --resolution=512 --center_crop --train_batch_size=4 --learning_rate=1e-5 --max_train_steps=5000 --use_ema \
        --mixed_precision=bf16 --validation_prompts "a drawing of a cat" --output_dir=my_model

`my_images` holds images and a metadata.jsonl (file_name, text), or a .txt beside each image; the result is a pipeline
folder for PyTorch, with `--save_flax` for Flax as well. The networks are functions of PyTorch's weights. All devices
share a batch; what is random in a sample depends on (seed, epoch, index of the sample) alone. Papers: latent diffusion
(arXiv 2112.10752), DDPM (2006.11239), v-prediction (2202.00512), min-SNR (2303.09556), zero terminal SNR (2305.08891).
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp

from sdtune.arguments import (
    AVERAGE_REQUIRES,
    DATA_FREE_ON_RESUME,
    DATASET_REQUIRES,
    FIRST_FLAGS,
    MODEL_FREE_ON_RESUME,
    OPTIMIZATION_FREE_ON_RESUME,
    OUTPUT_FREE_ON_RESUME,
    OUTPUT_REQUIRES,
    RUN_FREE_ON_RESUME,
    STREAM_REQUIRES,
    SWITCH,
    VALIDATION_FREE_ON_RESUME,
    add_data_arguments,
    add_model_arguments,
    add_objective_arguments,
    add_optimization_arguments,
    add_output_arguments,
    add_run_arguments,
    add_validation_arguments,
    check_old_flags,
    check_requirements,
    new_parser,
    non_negative_int,
    positive_int,
    put_first,
)
from sdtune.dataset import check_data
from sdtune.endings import NOTHING_TRAINED, command_to_draw, tell_end
from sdtune.failures import nothing_lost
from sdtune.flax.checkpoints import write_arrays
from sdtune.flax.diffusion import diffusion_losses, encode
from sdtune.flax.encoding import encode_once, encode_pixels
from sdtune.flax.networks import apply_text_encoder, apply_unet, check_networks
from sdtune.flax.optimization import make_optimizer
from sdtune.flax.training import (
    check_hosts,
    check_shared_output,
    end_of_process,
    ended_alone,
    load_batches,
    make_accelerator,
    make_state,
    precision_of_passes,
    start_jax,
    start_output,
    start_run,
    tell_plan,
    train_steps,
)
from sdtune.flax.validation import make_measure, validate
from sdtune.flax.weights import (
    arrays_of,
    check_flax,
    copy_weights,
    frozen,
    load_flax,
    reads_flax,
    result_weights,
    write_flax,
)
from sdtune.hub import name_repo, push
from sdtune.model_card import Training, describe_images, find_trigger, use_of_pipeline, write_card
from sdtune.models import check_model, load_base, make_noise_scheduler
from sdtune.optimization import check_optimization
from sdtune.output import (
    check_output,
    check_trackers,
    end_training,
    new_result,
    save_pipeline,
    start_trackers,
)
from sdtune.plan import told_in_plan
from sdtune.script import run_script, work_of
from sdtune.signals import Stop
from sdtune.streaming import (
    LeftOut,
    check_streaming,
    count_steps_of,
    describe_stream,
    load_images,
    split_of_stream,
)
from sdtune.validation import check_validation, prompts_of

NO_NEED = "drop it; what is compiled here has no need of it"
REPLACED_FLAGS = {
    "--use_8bit_adam": NO_NEED,
    "--allow_tf32": NO_NEED,
    "--enable_xformers_memory_efficient_attention": NO_NEED,
    "--offload_ema": NO_NEED,
    "--foreach_ema": NO_NEED,
}
REQUIRES = {
    **DATASET_REQUIRES,
    **STREAM_REQUIRES,
    **AVERAGE_REQUIRES,
    **OUTPUT_REQUIRES,
    "num_hosts": "coordinator_address",
    "host_index": "coordinator_address",
}
FREE_ON_RESUME = {
    *MODEL_FREE_ON_RESUME,
    *DATA_FREE_ON_RESUME,
    *OPTIMIZATION_FREE_ON_RESUME,
    *OUTPUT_FREE_ON_RESUME,
    *VALIDATION_FREE_ON_RESUME,
    *RUN_FREE_ON_RESUME,
    "coordinator_address",
    "dataloader_num_workers",
    "host_index",
    "num_hosts",
    "save_flax",
}
FIXED_ON_RESUME = {"state", "stream"}  # the checkpoint's state would not fit, and a stream go on somewhere else


def make_parser():
    """The flags of this script."""
    usage = "%(prog)s --pretrained_model_name_or_path MODEL (--train_data_dir FOLDER | --dataset_name NAME) [flags]"
    parser = new_parser(__doc__, usage)
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_objective_arguments(parser)
    add_optimization_arguments(parser)
    add_jax_arguments(parser)
    add_output_arguments(parser)
    add_validation_arguments(parser)
    add_run_arguments(parser)
    parser.set_defaults(output_dir="sd-model-finetuned")
    put_first(parser, FIRST_FLAGS)
    return parser


def add_jax_arguments(parser):
    """Adds what only this script has: precision, Flax's files, and hosts."""
    add = parser.add_argument_group("memory and speed").add_argument
    add(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="precision of passes; no if not given; fp16: of what is frozen alone",
    )
    add(
        "--dataloader_num_workers",
        type=non_negative_int,
        default=0,
        help="threads that load images; 1 if 0 [0, inf)",
    )
    add = parser.add_argument_group("weights of Flax").add_argument
    add("--from_flax", **SWITCH, help="read the Flax weights (.msgpack) of the base, where others lie beside them")
    add("--from_pt", **SWITCH, help="read PyTorch's weights, which are read anyway unless there are none")
    add("--save_flax", **SWITCH, help="write the weights as Flax (.msgpack) too")
    add = parser.add_argument_group("several hosts").add_argument
    add("--coordinator_address", metavar="HOST:PORT|auto", help="where host 0 is found; auto: as the cluster says")
    add("--num_hosts", type=positive_int, help="hosts on which this is started; needs --coordinator_address [1, inf)")
    add(
        "--host_index",
        type=non_negative_int,
        help="number of this host, from 0; needs --coordinator_address [0, inf)",
    )


def check_args(args, problems=()):
    """Lists what is wrong with the flags, each with its value, what is accepted and the remedy. `problems` are those
    that were found before."""
    found = check_requirements(args, REQUIRES) + check_old_flags(args)
    found += check_data(args, "train_data_dir") + check_streaming(args)
    found += check_optimization(args) + check_hosts(args)
    found += check_trackers(args) + check_validation(args)
    found += check_output(args, foreign_result="pytorch_lora_weights.safetensors")
    found += check_flax(args)
    return found + (check_model(args) or check_networks(args))


def load_models(args):
    """Returns the base's pipeline in float32, whose UNet is to be trained, and the noise scheduler. Raises
    `InputError`."""
    pipeline = load_flax(args) if reads_flax(args) else load_base(args)
    return pipeline, make_noise_scheduler(args, pipeline)


def train(args, mesh):
    """Trains as `args` say, which have been checked, on the devices of `mesh`."""
    check_shared_output(args)
    is_first = jax.process_index() == 0
    told = []
    with told_in_plan(told):
        images, held_out, fingerprint = load_images(args)
    accelerator = make_accelerator(args)
    repo_id = None
    if is_first and not args.dry_run:
        repo_id = name_repo(args) if args.push_to_hub else None
        start_trackers(args, accelerator)
    pipeline, noise_scheduler = load_models(args)
    dtype = jnp.bfloat16 if precision_of_passes(args) == "bf16" else jnp.float32
    frozen_dtype = jnp.float16 if args.mixed_precision == "fp16" else dtype

    def losses(weights, batch, snr_gamma=None):
        """The loss of each sample of a batch (batch,), of a UNet with these float32 weights, computed in `dtype`."""
        weights = {name: weight.astype(dtype) for name, weight in weights.items()}
        unet = functools.partial(
            apply_unet,
            weights,
            config=dict(pipeline.unet.config),
            gradient_checkpointing=args.gradient_checkpointing,
        )
        latents = encode(batch, pipeline.vae.config.scaling_factor)
        return diffusion_losses(unet, noise_scheduler, latents, batch["prompt_embeds"], batch, snr_gamma)

    counts = count_steps_of(args, images, jax.device_count())
    optimizer = make_optimizer(args)
    state = make_state(args, arrays_of(pipeline.unet), optimizer)
    batch_size = args.train_batch_size * jax.local_device_count()  # of this host
    stream = split_of_stream(args, jax.process_count(), 1, batch_size)
    fingerprints = {"captioned_images": fingerprint, "stream": stream}
    run = start_run(args, counts, state, fingerprints, pipeline, FREE_ON_RESUME, FIXED_ON_RESUME)
    tell_plan(args, run, len(held_out), describe_stream(args, images, jax.process_count(), 1), told)
    if args.dry_run:
        end_training(accelerator)
        print(NOTHING_TRAINED)
        return

    start_output(args, run, make_parser())
    pool = ThreadPoolExecutor(args.dataloader_num_workers or 1)
    vae = frozen(encode_pixels, pipeline.vae, frozen_dtype)
    text_encoder = frozen(apply_text_encoder, pipeline.text_encoder, frozen_dtype)
    encoded = encode_once(images, vae, text_encoder, batch_size, pool)
    measure = None
    if len(held_out):
        encoded_held_out = encode_once(held_out, vae, text_encoder, batch_size, pool)
        measure = make_measure(losses, mesh, encoded_held_out, counts.samples_per_pass)
    del vae, text_encoder  # which hold weights on the devices
    prompts = prompts_of(args)
    look = functools.partial(validate, args, accelerator, run, pipeline, noise_scheduler, measure, prompts)
    left_out = LeftOut()
    batches = load_batches(args, run, encoded, batch_size, pool, left_out)
    training_loss = functools.partial(losses, snr_gamma=args.snr_gamma)
    stop = Stop(launcher=None)
    write_state = functools.partial(write_arrays, pipeline)
    with nothing_lost(args, accelerator, run, stop, write_state, end=end_of_process()):
        train_steps(args, accelerator, run, write_state, stop, mesh, batches, training_loss, optimizer, look)
        left_out.tell()
        if is_first:
            run.is_whole = False  # what is copied and rounded now is the result, and no state to go on from
            copy_weights(result_weights(run), pipeline.unet)
            files = save_model(args, pipeline, noise_scheduler, run, images, repo_id)
    if repo_id:
        push(args, repo_id, files, counts.last_step)
    end_training(accelerator)
    if is_first:
        prompt = (prompts or [find_trigger(None if args.streaming else images.rows) or "a picture"])[0]
        tell_end(args, run, files, command_to_draw(args, pipeline, noise_scheduler, prompt))


def save_model(args, pipeline, noise_scheduler, run, images, repo_id):
    """Writes the pipeline, on demand with Flax's files, and the model card; returns patterns that are the pipeline's
    files."""
    with new_result(args.output_dir) as folder:
        files = save_pipeline(args, folder, pipeline, noise_scheduler)
        if args.save_flax:
            write_flax(pipeline, folder)
        usage = use_of_pipeline(args, pipeline, repo_id)
        training = Training(
            trained="The UNet of",
            images=describe_images(run),
            trigger=find_trigger(None if args.streaming else images.rows),
            tags=[],
        )
        write_card(args, make_parser(), folder, run, prompts_of(args), usage, training)
    return files


def start(args):
    """Starts JAX, and trains; of several hosts the first one writes and prints."""
    mesh = start_jax(args)
    with work_of(args, is_first=jax.process_index() == 0), ended_alone():
        train(args, mesh)


def main(argv=None):
    """Runs the script; a mistake of the user's ends with status 2 and its message."""
    run_script(Path(__file__).name, make_parser(), argv, REPLACED_FLAGS, check_args, start)


if __name__ == "__main__":
    main()
