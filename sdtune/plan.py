"""The plan that a run prints before its first step."""

from sdtune.output import chosen_tracker


def print_plan(args, run, num_held_out, num_trained, about):
    """Says, before the first step, what will be done. `about` says what only a script knows: `trained` and `frozen`
    (which models), `devices` (how many share a pass), `images` and `optimizer` (remarks)."""
    counts, side, tracker = run.counts, args.resolution, chosen_tracker(args)
    first_step, precision = run.progress["global_step"], run.settings["mixed_precision"]
    num_copies = 4 if args.use_ema else 3  # weights, the two moments of AdamW, the average
    images = f"{counts.num_images:,} to train on, {num_held_out:,} held out, at {side} x {side} pixels"
    passes = f"{args.train_batch_size} a pass x {args.gradient_accumulation_steps} passes x {about['devices']}"
    rows = {
        "images": images + about["images"],
        "steps": f"{first_step:,} to {counts.last_step:,}, {counts.last_step / counts.steps_per_epoch:,.1f} epochs",
        "per step": f"{counts.samples_per_step:,} images: {passes}",
        "trained": f"{about['trained']}, {num_trained:,} parameters in float32, passes in precision {precision!r}; "
        f"frozen: {about['frozen']}",
        "optimizer": f"AdamW at {run.settings['peak_learning_rate']:g}, {args.lr_scheduler}; {about['optimizer']}",
        "output": f"{args.output_dir}, a checkpoint of {4e-9 * num_trained * num_copies:.2g} GB every "
        f"{args.checkpointing_steps:,} steps",
        "log": f"log.jsonl and {tracker}" if tracker else "log.jsonl, no tracker",
    }
    print("\n".join(["Plan", *[f"  {name:<10} {text}" for name, text in rows.items()]]))
