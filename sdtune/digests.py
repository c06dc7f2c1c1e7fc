"""Digests of the files in a folder, by which a damaged one is found."""

import fnmatch
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

from sdtune.errors import InputError
from sdtune.files import name_in, read_json

DIGESTS_FILE = "digests.json"


def write_digests(folder):
    """Writes digests.json into a folder: for all files in it, by their paths below it, their bytes and SHA-256."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / DIGESTS_FILE]
    with ThreadPoolExecutor(4) as pool:  # hashing leaves Python's lock to others
        sums = list(pool.map(sha256_of, paths))
    digests = {name_in(folder, path): [path.stat().st_size, sha256] for path, sha256 in zip(paths, sums)}
    (folder / DIGESTS_FILE).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")


def find_damage(folder, unused=""):
    """What is wrong with the first file of a folder that is missing, or of another size or content than digests.json
    says, or that cannot be read; None for a folder that is whole but for files whose names match the pattern
    `unused`."""
    if not (folder / DIGESTS_FILE).exists():
        return f"{DIGESTS_FILE} is missing"
    try:
        digests = {name: (size, sha256) for name, (size, sha256) in read_json(folder / DIGESTS_FILE).items()}
    except (InputError, ValueError, TypeError):
        return f"{DIGESTS_FILE} cannot be read"
    digests = {name: known for name, known in digests.items() if not fnmatch.fnmatchcase(name, unused)}
    for name, (size, _) in digests.items():  # first what costs nothing
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size} bytes instead of {size}"
    with ThreadPoolExecutor(4) as pool:
        sums = list(pool.map(readable_sha256_of, [folder / name for name in digests]))
    for (name, (_, sha256)), found in zip(digests.items(), sums):
        if found is None:
            return f"{name} cannot be read"
        if found != sha256:
            return f"the content of {name} has changed since it was written"
    return None


def readable_sha256_of(path):
    """The SHA-256 of a file, or None for one that cannot be read: the disk may be what is damaged."""
    try:
        return sha256_of(path)
    except OSError:
        return None


def sha256_of(path):
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
