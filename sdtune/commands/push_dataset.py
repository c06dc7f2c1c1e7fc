"""Upload a folder of captioned images to the Hub, as the training scripts read it back by --dataset_name.

    sdtune push-dataset my_images my_name/my_images --private
    python train_text_to_image.py --dataset_name=my_name/my_images ...

The folder is read and checked as the training scripts do, and stays as it is. What goes are its images and one
metadata.jsonl (file_name, text and the other columns), into which captions from .txt files are put, since `datasets`
and the Hub's viewer do not read those. The captions follow when all images have arrived; the same command goes on
with an upload that was stopped, and sends only what is new.
"""

import json
import os
import tempfile
from pathlib import Path

import datasets
import yaml
from datasets.data_files import DEFAULT_PATTERNS_ALL, get_data_patterns
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import CommitOperationAdd, DatasetCard, DatasetCardData, HfApi

from sdtune.arguments import SWITCH, new_parser, parse_flags, path_name
from sdtune.dataset import METADATA_NAMES, all_captions, list_files, read_folder, read_metadata
from sdtune.errors import InputError, counted, last_line, raise_problems, told_in_lines, told_to_user
from sdtune.files import name_in
from sdtune.images import NO_CAPTION, check_images, leave_out, path_of_findings
from sdtune.uploads import CARD, add_upload_arguments, check_upload, make_repo, silence_hub, told_if_upload_fails

PROGRAM = "sdtune push-dataset"
METADATA = "metadata.jsonl"
# Else `datasets` makes splits of names such as test.png, and leaves the other images out in silence.
CONFIGS = [{"config_name": "default", "data_files": [{"split": "train", "path": "**"}]}]


# ------------------------------------------------------------------------------------------------------- arguments
def make_parser():
    """The flags of the command."""
    parser = new_parser(__doc__, "sdtune push-dataset FOLDER REPO_ID [flags]")
    parser.add_argument(
        "folder", nargs="?", type=path_name, help="folder of images with metadata.jsonl/.csv, or a .txt beside each"
    )
    parser.add_argument("repo_id", nargs="?", help="dataset on the Hub to make or add to: your_name/its_name")
    add = parser.add_argument_group("data").add_argument
    add("--caption_column", default="text", help="column of the captions, in the folder's metadata and on the Hub")
    add("--without_captions", **SWITCH, help="send the images alone, such as photos of one subject for DreamBooth")
    add("--skip_bad_images", **SWITCH, help="go on without images that cannot be used, instead of stopping")
    add("--follow_symlinks", **SWITCH, help="read what links in the folder lead to elsewhere, and send it, too")
    add("--cache_dir", help="where remembered checks of images go, instead of the Hugging Face cache")
    add_upload_arguments(parser, "dataset")
    return parser


def check_args(args):
    """Lists every argument that is wrong."""
    problems = check_upload(args, "a folder of images")
    if args.caption_column in ("file_name", "image"):
        problems.append(f"--caption_column={args.caption_column}: is the column of the images; use another")
    return problems


# --------------------------------------------------------------------------------------------------------- reading
def name_problem(name):
    """Why `datasets` would not read a file of this name back from the Hub, or ""."""
    if any(part.startswith((".", "__")) for part in name.split("/")) or "::" in name or "\\" in name:
        return "datasets skips names that start with . or __, and misreads :: and backslashes; rename it"
    if not name.lower().endswith(tuple(ImageFolder.EXTENSIONS)):
        return f"datasets reads no {Path(name).suffix} files; convert it, to PNG for example"
    return ""


def usable_rows(folder, caption_column, without_captions, cache_dir, skip_bad_images, follows_links):
    """{name on the Hub: captions} of the images that training can use. Raises one `InputError` that names all others,
    unless `skip_bad_images`."""
    rows = read_folder(folder, caption_column, follows_links=follows_links)
    if without_captions and "problem" in rows.column_names:
        rows = rows.remove_columns("problem")  # of captions that are not sent
    findings = check_images(rows, path_of_findings(folder, cache_dir))
    good, bad = {}, []
    for row, (_, _, _, problem) in zip(rows, findings):
        path = row["image"]["path"]
        name, captions = name_in(folder, path), all_captions(row["captions"])
        problem = problem or name_problem(name)
        if not problem and not captions and not without_captions:
            problem = NO_CAPTION
        if problem:
            bad.append(f"{path}: {problem}")
        else:
            good[name] = captions
    remedy = "; images without captions can be captioned by `sdtune caption` or sent --without_captions"
    leave_out(bad, len(rows), skip_bad_images and bool(good), remedy)
    return good


def other_columns(folder, caption_column, follows_links):
    """{name of an image: its other columns} of all metadata files. Raises `InputError` for a column that `datasets`
    would take for images."""
    found = {}
    for path in [path for path in list_files(folder) if path.name in METADATA_NAMES]:
        for row in read_metadata(path, caption_column, folder, follows_links):
            columns = {key: value for key, value in row["row"].items() if key not in ("file_name", caption_column)}
            for key in columns:
                if key == "image" or key.endswith(("file_name", "file_names")):
                    raise InputError(f"{path}: datasets takes the column {key!r} for images; rename it")
            found.setdefault(name_in(folder, row["file"]), {}).update(columns)
    return found


def make_metadata(captions, columns, caption_column):
    """The text of metadata.jsonl: of every image a caption, or a list where an image has several, and the other
    columns. Raises `InputError` if a column mixes kinds of values, which `datasets` does not read."""
    has_several = any(len(found) > 1 for found in captions.values())
    keys = list(dict.fromkeys(key for name in captions for key in columns.get(name, {})))
    rows = []
    for name, found in captions.items():
        row = {"file_name": name, caption_column: found if has_several else found[0]}
        for key in keys:
            row[key] = columns.get(name, {}).get(key)
        rows.append(row)
    try:
        datasets.Dataset.from_list(rows)
    except Exception as error:  # arrow has one for every pair of types
        raise InputError(
            f"the metadata's columns {', '.join(keys)} hold values of several kinds, which datasets "
            f"does not read ({last_line(error)})"
        ) from None
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --------------------------------------------------------------------------------------------------------- writing
def size_category(num_images):
    """What the Hub calls a dataset of so many images."""
    if num_images < 1_000:
        return "n<1K"
    if num_images < 10_000:
        return "1K<n<10K"
    if num_images < 100_000:
        return "10K<n<100K"
    return "100K<n<1M"


def make_card(repo_id, num_images, caption_column, without_captions):
    """The text of the dataset card."""
    sizes = [size_category(num_images)]
    data = DatasetCardData(task_categories=["text-to-image"], size_categories=sizes, configs=CONFIGS)
    captions = "" if without_captions else f", each with a caption in the column `{caption_column}`"
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {repo_id.split('/')[-1]}\n\n{counted(num_images, 'image')}{captions}.\n\n"
        f'```python\nimport datasets\n\ndatasets.load_dataset("{repo_id}", split="train")\n```\n'
    )


def choose_card(args, folder, repo_id, keeps_card, num_images):
    """The text of the card that will be there: the Hub's, the folder's own or a new one."""
    if keeps_card:
        return DatasetCard.load(repo_id, token=args.hub_token, ignore_metadata_errors=True).content
    own = folder / CARD
    if own.is_file():
        return own.read_text(encoding="utf-8")
    return make_card(repo_id, num_images, args.caption_column, args.without_captions)


def check_repo(repo_id, present, names, staging, card, without_captions):
    """Raises `InputError` if what is in the repository would keep `datasets` from reading these images and captions.
    `card` is the text of the card that will be there."""
    own = set() if without_captions else {METADATA}
    foreign = [path for path in present - own if path.split("/")[-1] in ImageFolder.METADATA_FILENAMES]
    if foreign:
        raise InputError(
            f"REPO_ID={repo_id}: holds {min(foreign)}, which would be read too; remove it on the Hub, or "
            "name another repository"
        )
    says_what_is_read = "configs" in DatasetCard(card, ignore_metadata_errors=True).data
    if not says_what_is_read and get_data_patterns(str(staging)) != DEFAULT_PATTERNS_ALL:
        raise InputError(
            "the dataset card has no `configs`, so datasets would make splits of names such as "
            f"{names[0]}; add --overwrite_card, or to the card's header:\n"
            f"{yaml.safe_dump({'configs': CONFIGS}, sort_keys=False)}"
        )


def link_images(folder, names, staging):
    """Fills a folder with links to the images, so that nothing else of theirs can be sent."""
    for name in names:
        link = Path(staging, name)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder / name)


def push_all(args, folder, captions, metadata):
    """Sends the images, then captions and card. Raises `InputError`; ends with status 1 if the upload fails."""
    api = HfApi(token=args.hub_token)
    repo_id, present = make_repo(api, args.repo_id, "dataset", args.private)
    keeps_card = CARD in present and not args.overwrite_card
    where = {
        "repo_id": repo_id,
        "repo_type": "dataset",
        "commit_message": args.commit_message or f"Add {counted(len(captions), 'image')}",
    }
    with tempfile.TemporaryDirectory() as staging:
        link_images(folder, captions, staging)
        with told_if_upload_fails(f"{folder} is as it was"):
            card = choose_card(args, folder, repo_id, keeps_card, len(captions))
            check_repo(repo_id, present, list(captions), staging, card, args.without_captions)
            api.upload_folder(folder_path=staging, **where)
            last = []
            if metadata:
                last.append(CommitOperationAdd(METADATA, metadata.encode("utf-8")))
            if not keeps_card:
                last.append(CommitOperationAdd(CARD, card.encode("utf-8")))
            if last:
                api.create_commit(operations=last, **where)
    if keeps_card:
        print("The dataset card on the Hub is kept; --overwrite_card replaces it.")
    print(
        f"Sent {counted(len(captions), 'image')} to {api.endpoint}/datasets/{repo_id}; train on them with "
        f"--dataset_name={repo_id}"
    )


def push_folder(args):
    """Reads and checks the folder, and sends it unless --dry_run. Raises `InputError`."""
    folder = Path(os.path.abspath(args.folder))
    column, follows_links = args.caption_column, args.follow_symlinks
    where = (args.cache_dir, args.skip_bad_images, follows_links)
    with told_in_lines():
        captions = usable_rows(folder, column, args.without_captions, *where)
    metadata = None
    if not args.without_captions:
        columns = other_columns(folder, column, follows_links)
        metadata = make_metadata(captions, columns, args.caption_column)
        if captions.keys() - columns.keys():
            print(f"Captions in .txt files go into {METADATA} on the Hub; {folder} stays as it is.")
    if args.dry_run:
        also = f", {METADATA}" if metadata else ""
        print(f"Would send {counted(len(captions), 'image')}{also} and a card to {args.repo_id}.")
    else:
        push_all(args, folder, captions, metadata)


def main(argv=None):
    """Runs the command; a mistake of the user's ends with status 2 and its message, Ctrl-C with status 130."""
    args, problems = parse_flags(make_parser(), argv, {})
    silence_hub()
    stopped = f"{PROGRAM}: stopped; the same command goes on from here"
    with told_to_user(PROGRAM, errors=(InputError, OSError), stopped=stopped):
        raise_problems(problems + check_args(args))
        push_folder(args)
