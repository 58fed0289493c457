"""The files of a store's `target/` folder, each with a SHA-256 in the manifest.

Training reads the target's config, tokenizer, embedding and head from them. Stores of earlier
versions have no checksums; of their files, only the presence is checked.
"""

from collections.abc import Mapping
from pathlib import Path

from engine.hidden_states.store_format import HEAD, TARGET_FOLDER, StoreError
from engine.host.checkpoint_files import facts_of
from engine.host.files import WRITING

REQUIRED = ("config.json", HEAD)  # in every store, also in those without checksums
FIX = "copy it again, or run the capture again, which writes it"


def sha256_of_files(store: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of `target/` but the head, by its path in that folder."""
    folder = store / TARGET_FOLDER
    return {name: facts_of(folder / name).sha256 for name in names_of_files(store) if name != HEAD}


def names_of_files(store: Path) -> list[str]:
    """Return the paths of all files within `target/`, without those that are being written."""
    folder = store / TARGET_FOLDER
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != WRITING]
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def is_as_written(store: Path, name: str, recorded: Mapping[str, str]) -> bool:
    """Return whether a file of `target/` is there and has the recorded checksum."""
    path = store / TARGET_FOLDER / name
    return name in recorded and path.is_file() and facts_of(path).sha256 == recorded[name]


def check_small_files(store: Path, recorded: Mapping[str, str]) -> None:
    """Raise StoreError for the first file of `target/`, other than the head, that is missing or altered."""
    for name in sorted({*recorded, *REQUIRED} - {HEAD}):
        check_file(store, name, recorded)


def check_file(store: Path, name: str, recorded: Mapping[str, str], *, reads: bool = True) -> None:
    """Raise StoreError if a file of `target/` is missing or was altered.

    recorded: SHA-256 by name, from the manifest. A file without a record only has to be there.
    reads: whether the contents are compared.
    """
    path = store / TARGET_FOLDER / name
    if not path.is_file():
        raise StoreError(f"{path} is missing; {FIX}")
    if not reads or name not in recorded:
        return
    found = facts_of(path).sha256
    if found != recorded[name]:
        problem = f"{path} was altered: the manifest has the SHA-256 {recorded[name]}, the file has {found}"
        raise StoreError(f"{problem}; {FIX}")


def problems_of_files(store: Path, recorded: Mapping[str, str], *, reads: bool = True) -> list[str]:
    """Return what is wrong with the files of `target/`, one line per file; `reads` as in `check_file`."""
    problems = []
    for name in sorted({*recorded, *REQUIRED}):
        try:
            check_file(store, name, recorded, reads=reads)
        except StoreError as error:
            problems.append(str(error))
    return problems
