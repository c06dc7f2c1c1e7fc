"""Files: read, written beside their place and renamed when complete, with permissions."""

import contextlib
import json
import os
import shutil
import socket
from pathlib import Path

from sdtune.errors import InputError, last_line


@contextlib.contextmanager
def beside(output, keep_mode=False):
    """Gives a name to write to beside `output`, a file or a folder, and renames what is there when it is complete.
    Files get a new file's usual permissions: safetensors makes them for their owner alone. With `keep_mode` a file
    gets those of the one that it replaces."""
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    process = f"{socket.gethostname()}-{os.getpid()}"  # other machines may write there too
    new, old = [output.with_name(f".{output.name}.{process}.{word}") for word in ("new", "old")]
    try:
        yield new
        umask = os.umask(0)
        os.umask(umask)
        written = [new, *new.glob("**/*.safetensors")]
        for path in [path for path in written if path.is_file()]:
            path.chmod(0o666 & ~umask)
        if keep_mode and output.exists():
            shutil.copymode(output, new)
        if output.is_dir():  # which a rename does not replace
            output.rename(old)
        new.replace(output)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if new.is_dir():
            shutil.rmtree(new)
        else:
            new.unlink(missing_ok=True)


def write_text(path, text):
    """Writes a file whole or not at all."""
    with beside(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def sync(folder):
    """Has the system write a folder and all that is in it to the disk: until then a crash of the machine could leave a
    whole name with half a file."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("r+b") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder):
    """Has the system write the names in a folder to the disk, where it can: Windows opens no folders, and some network
    file systems know no such thing."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def move_into(staging, folder):
    """Renames what is in `staging` into `folder`, in the place of what has the same name there, and removes it. Files
    go last, and in reverse order, so that a README.md means that all is there."""
    for new in sorted(staging.iterdir(), key=lambda path: (path.is_dir(), path.name), reverse=True):
        place = folder / new.name
        if place.is_dir():  # which a rename does not replace
            old = place.rename(staging / f"{new.name}.old")
            new.rename(place)
            shutil.rmtree(old)
        else:
            new.replace(place)
    staging.rmdir()


def read_json(path):
    """The dictionary in a JSON file. Raises `InputError`."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({last_line(error)})") from None


def existing_place(path):
    """The path itself, or the nearest folder above it that exists."""
    path = Path(path).resolve()
    return next(place for place in (path, *path.parents) if place.exists())


def is_writable(path):
    """Whether something can be made at `path`, with the folders above it where they are missing."""
    place = existing_place(Path(path).resolve().parent)
    return place.is_dir() and os.access(place, os.W_OK)


def copy_mode(source, files):
    """Gives files, which safetensors makes for their owner alone, the permissions of another file."""
    for path in files:
        shutil.copymode(source, path)


def name_in(folder, path):
    """What metadata and the Hub call a file: its path below the folder, with slashes."""
    return Path(os.path.relpath(path, folder)).as_posix()
