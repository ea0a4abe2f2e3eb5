"""What other people's model directories may have us open and run: files inside of them, and no code.

A directory may come from anywhere: its index files, configs and links name other files, its configs may name Python
code. Everything that opens one asks here before a library reads it.

A file counts as inside where its path, with all links resolved, lies in the directory; a hub cache, whose files are
links into the `blobs` folder beside them, counts as inside too.
"""

from __future__ import annotations

import functools
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from landmark_cli.console import info, warn
from landmark_cli.errors import LandmarkError, shown
from landmark_cli.file_errors import reading
from landmark_cli.file_reading import read_json

MAX_JSON_BYTES = 32 << 20
# The header of a safetensors file; those of the largest models have less than a hundredth of it.
MAX_HEADER_BYTES = 32 << 20
# Whatever is no weights, vocabularies above all; the largest ones have some 40 MB.
MAX_TEXT_BYTES = 256 << 20
# What belongs to a model, besides whatever else stands in its directory.
WEIGHTS = {".safetensors", ".bin", ".pt", ".gguf"}
OPENED = {*WEIGHTS, ".json", ".model", ".txt", ".jinja", ".tiktoken", ".py"}
TEMPLATES = "additional_chat_templates"
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json", "*.index.json")
PICKLES = ("pytorch_model*.bin", "adapter_model.bin", "*.pt")
HUB_REPOSITORIES = ("models--", "datasets--")
# Keys under which transformers takes names of files from a config.
NAMES_FILES = ("weight_map", "transformers_weights", "configuration_files", "fast_tokenizer_files")
# Keys under which old versions of transformers stored the place where the model was once saved; nothing opens it.
NEVER_OPENED = ("special_tokens_map_file", "added_tokens_file", "tokenizer_config_file", "chat_template_file")
# Keys under which transformers takes an implementation, which may be compiled code of the hub.
NAMES_CODE = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def inside(folder: Path, name: str, what: str = "") -> Path:
    """The path of a file of a directory by the name that an index in it gives.

    what: how the user knows the directory, such as "--path-diff". Raises LandmarkError for a file outside of it.
    """
    parts = PurePosixPath(name).parts
    odd = any(character in name for character in "\\:\0") or not name.isprintable()
    if not parts or name.startswith("/") or ".." in parts or odd:
        raise LandmarkError(f"{what} {folder}: it names a file outside of the directory: {shown(name)}".lstrip())
    check_link(folder, folder / name, what)
    return folder / name


def check_link(folder: Path, path: Path, what: str = "") -> None:
    """Raise LandmarkError where `path`, a file of `folder`, is or goes through a link that leaves it."""
    if leaves(folder, path):
        raise LandmarkError(
            f"{what} {folder}: {path.name} is a link to {os.path.realpath(path)}, outside of the directory; copy the "
            "file into it, or name the directory that the file lies in".lstrip()
        )


def leaves(folder: Path, path: Path) -> bool:
    """Whether a path leads out of a directory, all links resolved."""
    real, root = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([real, root]) != root and not _in_hub_cache(Path(real))


def check_directory(folder: Path, what: str = "") -> None:
    """Refuse a model directory, before a library opens it, whose files lie or lead outside of it, or are no ordinary
    files, or name files outside of it.

    Raises LandmarkError naming the first such file.
    """
    for path in _files_of(folder):
        check_link(folder, path, what)
        with reading(path, what):
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("it is no ordinary file")
            if path.suffix not in WEIGHTS and found.st_size > MAX_TEXT_BYTES:
                raise ValueError(f"it has {found.st_size:,} bytes, and at most {MAX_TEXT_BYTES:,} are read")
            if path.suffix == ".safetensors":
                check_header(path, found.st_size)
        if any(path.match(pattern) for pattern in CONFIGS):
            _check_names(folder, read_json(path, what, max_bytes=MAX_JSON_BYTES), what)
        elif any(path.match(pattern) for pattern in PICKLES):
            check_pickle(path, what)


def check_header(path: Path, size: int) -> None:
    """Raise ValueError for a safetensors file of so many bytes whose header would take a library long to read. A header
    that goes beyond its file is left to who reads it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if MAX_HEADER_BYTES < length < size:
        raise ValueError(f"its header has {length:,} bytes, and at most {MAX_HEADER_BYTES:,} are read")


def check_pickle(path: Path, what: str = "") -> None:
    """Refuse a file of torch.save that unpacks to more than it is. Files that torch.save did not write are
    left to whoever reads them."""
    with reading(path, what):
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, as no file of torch.save is")


@contextmanager
def opening(path: str | Path, what: str, trust_remote_code: bool) -> Iterator[dict[str, bool]]:
    """Stand around a library's call that opens a model or tokenizer; gives the arguments that every such call takes.

    trust_remote_code: whether Python code that comes with it may run, as --trust-remote-code says; the user is then
    told whose code that is. Every call gets the argument: without it, transformers asks whoever sits at the terminal.

    Raises LandmarkError for whatever the library raises.
    """
    if trust_remote_code:
        _warn_of_code(str(path))
    missing = "" if os.path.exists(path) else "there is no such directory, and the hub gave none"
    if missing:
        tell_of_hub(str(path))
    with reading(path, what, to_do=missing or "copy it again with all of its files, if some are missing or damaged"):
        try:
            yield {"trust_remote_code": trust_remote_code}
        except ValueError as error:
            if trust_remote_code or "trust_remote_code" not in str(error):
                raise
            raise LandmarkError(
                f"{what} {path} comes with Python code of its own, which is not run; --trust-remote-code runs it, with "
                "all your rights"
            ) from error


@functools.cache
def tell_of_hub(name: str) -> None:
    """Say, once, that a name which is no directory is looked for on the hub: without a network its library goes on
    trying for half a minute, and the name may be a misspelt path. Nothing is said of what the hub's cache has, of what
    is no name there, nor where the hub may not be asked."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return
    cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    if not constants.HF_HUB_OFFLINE and not cached.exists():
        info(f"there is no directory {name}: asking {constants.ENDPOINT} for a model of that name")


def check_no_code(config: dict[str, Any], path: str | Path) -> None:
    """Raise LandmarkError for a model's config.json that names compiled code of the hub as its implementation."""
    for key in NAMES_CODE:
        named = config.get(key)
        for value in named.values() if isinstance(named, dict) else [named]:
            if isinstance(value, str) and "/" in value:
                raise LandmarkError(
                    f"{path}: its config.json asks for code of another repository ({key}: {shown(value)}), which is "
                    "not run; take the entry out"
                )


_warned: set[str] = set()


def _warn_of_code(path: str) -> None:
    if path not in _warned:
        _warned.add(path)
        warn(f"--trust-remote-code: Python code that comes with {path} may run, with all your rights")


def _in_hub_cache(real: Path) -> bool:
    return real.parent.name == "blobs" and real.parent.parent.name.startswith(HUB_REPOSITORIES)


def _files_of(folder: Path) -> Iterator[Path]:
    for root in (folder, folder / TEMPLATES):
        if root.is_dir():
            yield from (path for path in sorted(root.iterdir()) if path.suffix in OPENED and not path.is_dir())


def _check_names(folder: Path, config: dict[str, Any], what: str) -> None:
    """Raise LandmarkError where a config names a file outside of its directory that a library would open."""
    for key in NAMES_FILES:
        named = config.get(key)
        values = named.values() if isinstance(named, dict) else named if isinstance(named, list) else [named]
        for name in dict.fromkeys(name for name in values if isinstance(name, str)):
            inside(folder, name, what)
    for key, name in config.items():
        if key.endswith("_file") and key not in NEVER_OPENED and isinstance(name, str):
            # The place where the model was once saved often stands here; it matters if this machine has such a file.
            with reading(folder, what):
                outside = os.path.exists(name) and leaves(folder, Path(name))
            if outside:
                raise LandmarkError(
                    f"{what} {folder}: it names a file outside of the directory ({key}: {shown(name)})".lstrip()
                )
