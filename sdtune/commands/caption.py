"""Caption every image of a folder with an image-to-text model of transformers.

    sdtune caption my_images --trigger_word=sks --suffix="on a white background"

Captions go into my_images/metadata.jsonl (file_name, text), whose other rows and columns stay as they are, or with
--format=txt into a .txt beside each image; the training scripts read both. Images that have a caption keep it. Each
batch is noted in my_images/.caption_images.jsonl until the captions are in their place, so the same command goes on
where a run was stopped. BLIP: arXiv 2201.12086.
"""

import contextlib
import io
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm

from sdtune.arguments import SWITCH, nearest_beside, new_parser, parse_flags, path_name, positive_int
from sdtune.dataset import (
    METADATA_NAMES,
    check_links,
    foreign_pictures,
    list_files,
    read_metadata,
    tell_foreign_pictures,
    tell_no_images,
    text_beside,
    texts_by_name,
)
from sdtune.errors import (
    InputError,
    counted,
    fitted,
    gathered,
    in_one_line,
    last_line,
    raise_problems,
    remedy_for_missing,
    told_in_lines,
    told_to_user,
)
from sdtune.files import beside, name_in
from sdtune.images import (
    check_images,
    is_image_file,
    leave_out,
    path_of_findings,
    read_image,
    still_readable,
)
from sdtune.models import DTYPES, foreign_kernel, tell_unread

PROGRAM = "sdtune caption"
JOURNAL = ".caption_images.jsonl"
# Whoever changes one of these wants other captions than those that an interrupted run made.
CAPTION_SETTINGS = (
    "model",
    "revision",
    "max_new_tokens",
    "num_beams",
    "trigger_word",
    "prefix",
    "suffix",
    "overwrite",
)


# ------------------------------------------------------------------------------------------------------- arguments
def make_parser():
    """The flags of the command."""
    parser = new_parser(__doc__, "sdtune caption FOLDER [flags]")
    parser.add_argument(
        "folder", nargs="?", type=path_name, help="folder of images; those in folders below it are captioned too"
    )
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        type=path_name,
        default="Salesforce/blip-image-captioning-large",
        help="image-to-text model: Hub id or folder",
    )
    add("--revision", help="branch, tag or commit of the model on the Hub")
    add("--cache_dir", help="where downloads and remembered checks go, instead of the Hugging Face cache")
    add("--precision", default="no", choices=list(DTYPES), help="half precision of the model, or no")
    add("--batch_size", type=positive_int, default=8, help="images per pass [1, inf)")
    add("--max_new_tokens", type=positive_int, default=40, help="limit of a caption's length in tokens [1, inf)")
    add("--num_beams", type=positive_int, help="beams of the search for a caption; default: the model's [1, inf)")
    add = parser.add_argument_group("captions").add_argument
    add("--trigger_word", help="put this and a comma before captions that do not contain it")
    add("--prefix", help="put this before what the model says, such as: a drawing of")
    add("--suffix", help="put this after what the model says")
    add("--format", default="metadata", choices=["metadata", "txt"], help="metadata.jsonl, or .txt beside each image")
    add("--caption_column", default="text", help="column of the captions in metadata.jsonl")
    add("--overwrite", **SWITCH, help="caption images that have a caption too, and replace it")
    add("--skip_bad_images", **SWITCH, help="go on without images that cannot be used, instead of stopping")
    add("--follow_symlinks", **SWITCH, help="read what links in the folder lead to elsewhere, too")
    add = parser.add_argument_group("run").add_argument
    add("--config", metavar="FILE.yaml", help="flags by name, maybe under `training:`; the command line wins")
    add("--dry_run", **SWITCH, help="caption five images, print that and write nothing")
    return parser


def check_args(args):
    """Lists every setting that is wrong, and what is wrong with the folder; opens no image and loads no weights."""
    problems = []
    if not args.folder:
        problems.append("FOLDER is missing: name a folder of images")
    elif not Path(args.folder).is_dir():
        remedy = remedy_for_missing(args.folder) or "name a folder of images"
        problems.append(
            f"FOLDER={args.folder}: does not exist, or is no folder{nearest_beside(args.folder)}; {remedy}"
        )
    elif not args.dry_run and not os.access(args.folder, os.W_OK):
        problems.append(f"FOLDER={args.folder}: cannot be written to; grant access, or caption a copy")
    else:
        with gathered(problems), contextlib.redirect_stdout(io.StringIO()):  # it is told when they are captioned
            folder = Path(os.path.abspath(args.folder))
            read_captions(folder, args.caption_column, args.overwrite, args.format, args.follow_symlinks)
    if args.precision == "fp16" and not torch.accelerator.is_available():
        problems.append("--precision=fp16: cannot be used on a CPU; use bf16 or no")
    if args.caption_column == "file_name":
        problems.append("--caption_column=file_name: holds the names of the images; use another column")
    try:
        config = transformers.AutoConfig.from_pretrained(
            args.model, trust_remote_code=False, revision=args.revision, cache_dir=args.cache_dir
        )
    except (OSError, ValueError) as error:
        told = tell_unread("model's folder", args.model, error)
        problems.append(f"--model={args.model}: {told}")
    else:
        if strange := foreign_kernel(config.to_dict() | {"_attn_implementation": config._attn_implementation}):
            problems.append(f"--model={args.model}: {strange}")
        if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            problems.append(
                f"--model={args.model}: is a {config.model_type}, no image-to-text model such as BLIP; name one"
            )
    return problems


# --------------------------------------------------------------------------------------------------------- reading
def read_captions(folder, caption_column, overwrite, form, follows_links=False):
    """{path of an image: whether it has a caption}, sorted. Raises `InputError` where a caption could not be written
    in the form (metadata or txt) so that the training scripts see it alone, and unless it `follows_links` for links
    that lead out of the folder."""
    names = list_files(folder)
    files = [path for path in names if path.is_file()]
    images = {path: False for path in files if is_image_file(path, folder)}
    texts = texts_by_name(files)
    written = {image.with_suffix(".txt") for image in images} | {folder / JOURNAL}  # even where a link is broken
    read = {*images, *written, *[text_beside(image, texts) for image in images]}
    used = [path for path in names if path in read or path.name in METADATA_NAMES]
    check_links(used, folder, follows_links)
    if not images:
        raise InputError(tell_no_images(folder, names))
    if foreign := foreign_pictures(names, folder):
        print(f"Left aside in {folder}: {tell_foreign_pictures(foreign)}.")

    if misnamed := [path for path in files if path.suffix.lower() == ".txt" and path.with_suffix("") in images]:
        some = in_one_line(misnamed[0].relative_to(folder))
        name = in_one_line(Path(misnamed[0].stem).with_suffix(".txt"))
        told = f"holds {counted(len(misnamed), '.txt that is', '.txt that are')} not read, such as {some}"
        raise InputError(
            f"{folder}: {told}; call it {name}, or move it away, since a caption that is written now would take its "
            "place"
        )

    own_metadata = folder / "metadata.jsonl"
    for path in [path for path in files if path.name in METADATA_NAMES]:
        rows = read_metadata(path, caption_column, folder, follows_links)
        captioned = {row["file"] for row in rows if row["captions"]}
        is_replaced = form == "metadata" and path == own_metadata
        if captioned and overwrite and not is_replaced:
            raise InputError(
                f"--overwrite: the captions in {path} would stay in use beside those in --format={form}; "
                f"move that file away, or use {own_metadata} alone and --format=metadata"
            )
        for image in captioned & images.keys():
            images[image] = True

    owners = {}  # of a .txt
    for image in images:
        owners.setdefault(text_beside(image, texts), []).append(image)
    for text, sharing in owners.items():
        if form == "txt" and len(sharing) > 1:
            names = " and ".join(map(str, sharing))
            raise InputError(f"--format=txt: {names} would share {text}; use --format=metadata")
        if text.is_file() and text.read_text(encoding="utf-8-sig", errors="replace").strip():
            for image in sharing:
                images[image] = True
    return images


def read_journal(path, settings):
    """{path of an image below the folder: caption} of a run that was stopped. Raises `InputError` if that had other
    settings. A kill may have cut the last line off: what follows the last line end is not read."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        rows = [dict(json.loads(line)) for line in lines]
        captions = {row["file_name"]: row["caption"] for row in rows[1:]}
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path}: is damaged; remove it, and its images are captioned again") from None
    if rows and rows[0] != settings:
        changed = [name for name, value in settings.items() if rows[0].get(name) != value]
        other = ", ".join(f"--{name}={rows[0].get(name)}" for name in changed)
        raise InputError(
            f"{path}: holds captions of a run that was stopped, made with {other}; go on with that, or "
            "remove this file to do without them"
        )
    return captions


def usable(images, folder, cache_dir, skip_bad_images):
    """The images that can be opened. Raises one `InputError` that names all others, unless `skip_bad_images`."""
    rows = [{"image": {"path": str(image), "bytes": None}} for image in images]
    good, bad = [], []
    for image, (_, _, _, problem) in zip(images, check_images(rows, path_of_findings(folder, cache_dir))):
        if problem:
            bad.append(f"{image}: {problem}")
        else:
            good.append(image)
    leave_out(bad, len(images), skip_bad_images)
    return good


# ------------------------------------------------------------------------------------------------------ captioning
def load_models(args):
    """Returns what prepares images, what turns tokens into text, and the model. Raises `InputError`."""
    where = {"revision": args.revision, "cache_dir": args.cache_dir, "trust_remote_code": False}
    dtype = DTYPES[args.precision]
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(args.model, **where)
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, **where)
        model = transformers.AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype, **where)
    except Exception as error:  # of the connection, of a file, or of a class that does not fit
        raise InputError(f"--model={args.model}: cannot be loaded ({last_line(error)})") from None
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return processor, tokenizer, model.to(device).eval()


def open_batch(paths, processor):
    """The images as the model takes them: (batch, 3, height, width). Raises `InputError` if one has changed."""
    images = []
    for path in paths:
        with still_readable(path):
            images.append(read_image({"path": str(path), "bytes": None}))
    return processor(images=images, return_tensors="pt").pixel_values


def caption(images, models, batch_size, max_new_tokens, num_beams):
    """Yields [(path, what the model says)] of one batch after the other; while the model looks at one, the next is
    opened. Raises `InputError`."""
    processor, tokenizer, model = models
    limits = {"max_new_tokens": max_new_tokens}
    if num_beams:
        limits["num_beams"] = num_beams
    batches = [images[first : first + batch_size] for first in range(0, len(images), batch_size)]
    with ThreadPoolExecutor(1) as pool, torch.inference_mode():
        opening = pool.submit(open_batch, batches[0], processor)
        for number, batch in enumerate(batches, 1):
            try:
                pixel_values = opening.result().to(model.device, model.dtype)
                if number < len(batches):
                    opening = pool.submit(open_batch, batches[number], processor)
                tokens = model.generate(pixel_values=pixel_values, do_sample=False, **limits)
            except torch.OutOfMemoryError:
                raise InputError(f"--batch_size={batch_size}: is too much for this memory; lower it") from None
            except (AttributeError, RuntimeError, TypeError) as error:
                raise InputError(f"--model: does not caption images by themselves ({last_line(error)})") from None
            yield list(zip(batch, tokenizer.batch_decode(tokens, skip_special_tokens=True)))


def compose(said, trigger_word, prefix, suffix):
    """The caption: trigger word, prefix, what the model said, suffix; "" if that is nothing."""
    if not said.strip():
        return ""
    words = " ".join(part for part in (prefix, said, suffix) if part).split()
    text = re.sub(r" ([,.;:!?])", r"\1", " ".join(words))
    if trigger_word and not re.search(rf"(?<!\w){re.escape(trigger_word)}(?!\w)", text):
        text = f"{trigger_word}, {text}"
    return text


def captions_by_name(args, folder, images, models):
    """Yields {path below the folder: caption} of one batch after the other, whole captions as the flags ask for."""
    for batch in caption(images, models, args.batch_size, args.max_new_tokens, args.num_beams):
        captions = {}
        for path, said in batch:
            captions[name_in(folder, path)] = compose(said, args.trigger_word, args.prefix, args.suffix)
        yield captions


# --------------------------------------------------------------------------------------------------------- writing
def replace_text(path, text):
    """Writes a file beside its place, complete, and renames it; it keeps the permissions of the one it replaces."""
    with beside(os.path.realpath(path), keep_mode=True) as unfinished:
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def write_captions(folder, captions, caption_column, form):
    """Puts {path below the folder: caption} in their place. Of a metadata.jsonl, rows of other images keep their
    bytes and rows of these images their other columns."""
    if form == "txt":
        for name, text in captions.items():
            replace_text((folder / name).with_suffix(".txt"), text + "\n")
        return
    path, new, written = folder / "metadata.jsonl", dict(captions), []
    if path.exists():
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        lines = [line for line in lines if line.strip()]
        rows = read_metadata(path, caption_column, folder, follows_links=True)  # which were checked before
        for line, row in zip(lines, rows):
            name = name_in(folder, row["file"])
            if name in captions:
                line = json.dumps({**row["row"], caption_column: captions[name]}, ensure_ascii=False)
                new.pop(name, None)
            written.append(line)
    for name, text in new.items():
        written.append(json.dumps({"file_name": name, caption_column: text}, ensure_ascii=False))
    replace_text(path, "".join(f"{line}\n" for line in written))


def journal_line(name, text):
    """What the journal says of an image."""
    return json.dumps({"file_name": name, "caption": text}) + "\n"


def caption_all(args, folder, todo, made, settings):
    """Captions the images `todo` into `made`, noting each batch in the journal, and writes the captions at the end or
    when it is stopped. Replaced captions are all replaced or none: until then the journal alone has them."""
    models = load_models(args)
    journal, complete = folder / JOURNAL, False
    lines = [journal_line(name, text) for name, text in made.items()]
    replace_text(journal, "".join([json.dumps(settings) + "\n", *lines]))
    try:
        with journal.open("a", encoding="utf-8") as file, tqdm(total=len(todo), unit="image", disable=None) as bar:
            for batch in captions_by_name(args, folder, todo, models):
                new = {name: text for name, text in batch.items() if text}
                file.write("".join(journal_line(name, text) for name, text in new.items()))
                file.flush()
                made.update(new)
                bar.update(len(batch))
        complete = True
    finally:
        if complete or not args.overwrite:
            write_captions(folder, made, args.caption_column, args.format)
            journal.unlink(missing_ok=True)


def caption_folder(args):
    """Captions as `args` say. Whatever ends it, the captions that were made are written or in the journal."""
    folder = Path(os.path.abspath(args.folder))
    settings = {name: getattr(args, name) for name in CAPTION_SETTINGS}
    with told_in_lines():
        images = read_captions(folder, args.caption_column, args.overwrite, args.format, args.follow_symlinks)
    wanted = {name_in(folder, path): path for path, has_one in images.items() if args.overwrite or not has_one}
    noted = read_journal(folder / JOURNAL, settings)
    made = {name: text for name, text in noted.items() if name in wanted}
    left = [path for name, path in wanted.items() if name not in made]
    with told_in_lines():
        todo = usable(left, folder, args.cache_dir, args.skip_bad_images)
    num_kept = counted(len(images) - len(wanted), "keeps its caption", "keep their captions")
    before = f"{counted(len(made), 'was', 'were')} captioned before a stop, " if made else ""
    print(f"{counted(len(images), 'image')}: {num_kept}, {before}{len(todo):,} to be captioned.")
    if args.dry_run:
        if todo:
            for batch in captions_by_name(args, folder, todo[:5], load_models(args)):
                for name, text in batch.items():
                    print(f"  {in_one_line(name)}: {in_one_line(text)}")
        return
    if todo:
        caption_all(args, folder, todo, made, settings)
    elif made:
        write_captions(folder, made, args.caption_column, args.format)
    (folder / JOURNAL).unlink(missing_ok=True)
    silent = [in_one_line(path) for path in todo if name_in(folder, path) not in made]
    if silent:
        print(
            "\n  ".join([f"Warning: the model says nothing of {counted(len(silent), 'image')}, such as", *silent[:5]])
        )
    print(fitted(tell_written(args, len(made))))


def tell_written(args, number):
    """What was written of so many captions, and where."""
    if not number:
        return f"Nothing was written in {args.folder}."
    captions = counted(number, "new caption")
    if args.format == "txt":
        return f"Wrote {captions} in {args.folder}, each into a .txt beside its image."
    return f"Wrote {Path(args.folder, 'metadata.jsonl')}: {captions}."


def main(argv=None):
    """Runs the command; a mistake of the user's ends with status 2 and its message, Ctrl-C with status 130."""
    args, problems = parse_flags(make_parser(), argv, {})
    transformers.utils.logging.set_verbosity_error()  # its bars and remarks would drown ours
    transformers.utils.logging.disable_progress_bar()
    stopped = f"{PROGRAM}: stopped; the same command goes on from here"
    with told_to_user(PROGRAM, errors=(InputError, OSError, UnicodeError), stopped=stopped):
        raise_problems(problems + check_args(args))
        caption_folder(args)
