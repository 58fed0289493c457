"""Cache of tokenised conversations on disk.

An entry is built once, by several worker processes, and memory-mapped by every rank and every later
run. It is a folder whose name is a hash of the conversations' bytes, the tokenizer, the template,
the options and the code of this package. One process per machine builds it, under a lock that other
machines and runs respect. The other ranks wait for the folder to appear, not in a collective. The
folder gets its final name once it is complete. Every process that opens an entry reads it once and
compares it with its checksums; a damaged entry is built again.
"""

import fcntl
import json
import multiprocessing
import os
import pickle
import shutil
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile

import jinja2
import numpy as np
import tokenizers
import transformers
import xxhash
from transformers import PreTrainedTokenizerBase
from transformers.dynamic_module_utils import init_hf_modules

from engine.config.sections import DataSection
from engine.data.dataset import (
    Chunk,
    DataReport,
    Progress,
    Rendered,
    Renderer,
    Scan,
    Tally,
    check_bad_share,
    check_template,
    stamp,
)
from engine.data.documents import Document, Documents, add_counts, document_checksum
from engine.data.fingerprint import hash_of, tokenizer_hash
from engine.data.templates import template_sources
from engine.host.processes import end_with_parent

WORTH_PROCESSES_BYTES = 16 << 20  # for less data, one process finishes before others have started
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_WITHOUT_SIGN = 300  # waiting ranks give up if no process builds the entry for so long
REPORT = "report.json"
NOT_RENDERING = {"corpus.py", "dataset_stats.py", "dataset_stats_page.py"}  # these do not change what is rendered
IDS = "input_ids.int32"
MASK = "assistant_mask.bool"
ARRAYS = "arrays.npz"
HASHED = (IDS, MASK, ARRAYS)  # files whose XXH3-64 the report has
BLOCK_BYTES = 1 << 20  # read at once, small enough for the processor's cache

_render: Renderer  # set in each worker process


class TokenisedDocuments(Documents):
    """The documents of a cache entry; their tokens are memory-mapped from disk."""

    def __init__(self, folder: Path, paths: Sequence[str]) -> None:
        """Open the entry in `folder`.

        Raises OSError, ValueError or another error of `open_entry` if it is missing or incomplete.
        """
        self.paths = tuple(paths)
        with np.load(folder / ARRAYS) as arrays:
            self._token_bounds, self._turn_bounds, self._ends = (
                arrays[name] for name in ("token_bounds", "turn_bounds", "ends")
            )
            self.assistant_tokens = arrays["assistant_tokens"]
            self.token_counts = arrays["token_counts"]
            self.checksum = int(arrays["checksum"])
            self._places = arrays["places"]
            largest, holder = arrays["largest_token_id"].tolist()
            self.largest_token_id = largest, holder
        self.lengths = np.diff(self._token_bounds)
        num_tokens = int(self._token_bounds[-1])
        self._ids = np.memmap(folder / IDS, dtype=np.int32, mode="r", shape=(num_tokens,))
        self._mask = np.memmap(folder / MASK, dtype=np.bool_, mode="r", shape=(num_tokens,))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = self._token_bounds[index : index + 2]
        first, last = self._turn_bounds[index : index + 2]
        turn_ends = tuple(self._ends[first:last].tolist())
        file, line = self._places[index].tolist()
        return Document(self._ids[start:stop], self._mask[start:stop], turn_ends, place=(file, line))


class DamagedEntry(ValueError):
    """A cache entry that cannot be read, or with a file whose contents are not those that were written."""


def file_hash(path: Path) -> str:
    """Return the XXH3-64 of a file's contents, 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    block = bytearray(BLOCK_BYTES)
    view = memoryview(block)
    with path.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(block):
            digest.update(view[:num_bytes])
    return digest.hexdigest()


class Writer:
    """Writes a cache entry: tokens as documents are added, indices and report on `close`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True)
        self._ids = (folder / IDS).open("wb")
        self._mask = (folder / MASK).open("wb")
        self._lengths: list[int] = []
        self._assistant_tokens: list[int] = []
        self._num_turns: list[int] = []
        self._ends: list[int] = []
        self._counts = np.zeros(0, dtype=np.int64)
        self._checksum = 0
        self._places: list[tuple[int, int]] = []
        self._largest_token_id = (-1, 0)

    def add(self, documents: Sequence[Document]) -> None:
        for document in documents:
            self._ids.write(document.input_ids.tobytes())
            self._mask.write(document.assistant_mask.tobytes())
            self._lengths.append(len(document))
            self._assistant_tokens.append(int(document.assistant_mask.sum()))
            self._num_turns.append(len(document.turn_ends))
            self._ends += document.turn_ends
            self._checksum = document_checksum(document, self._checksum)
            self._counts = add_counts(self._counts, document)
            assert document.place is not None  # it was rendered from a line of a file
            self._places.append(document.place)
            largest = int(document.input_ids.max(initial=-1))
            if largest > self._largest_token_id[0]:
                self._largest_token_id = (largest, len(self._places) - 1)

    def close(self, paths: Sequence[str], report: DataReport) -> None:
        for file in (self._ids, self._mask):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        bounds = {name: np.cumsum([0, *sizes]) for name, sizes in (("token", self._lengths), ("turn", self._num_turns))}
        np.savez(
            self._folder / ARRAYS,
            token_bounds=bounds["token"],
            turn_bounds=bounds["turn"],
            ends=np.array(self._ends, dtype=np.int32),
            assistant_tokens=np.array(self._assistant_tokens, dtype=np.int64),
            token_counts=self._counts,
            checksum=np.array(self._checksum),
            places=np.array(self._places, dtype=np.int64).reshape(-1, 2),
            largest_token_id=np.array(self._largest_token_id, dtype=np.int64),
        )
        hashes = {name: file_hash(self._folder / name) for name in HASHED}
        facts = {"paths": list(paths), "report": asdict(report), "xxh3_64": hashes}
        (self._folder / REPORT).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def tokenise(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    section: DataSection,
    *,
    builds: bool,
    on_progress: Progress | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> tuple[TokenisedDocuments, DataReport]:
    """Return documents and report from `section.cache_dir`, building the entry if needed.

    The result is that of `load_documents`, which also describes the ValueErrors raised.
    builds: whether this process may build the entry; other processes wait until it exists.
    on_progress: see `load_documents`. warn: called before a damaged entry is built again.
    """
    assert section.cache_dir is not None, "without data.cache_dir, conversations are read by `load_documents`"
    check_template(tokenizer, section.template_kwargs, section.template)
    scan = Scan.of(paths)
    entry = Path(section.cache_dir) / entry_name(scan, tokenizer, section)
    found = _open_undamaged(entry, paths, warn if builds else lambda text: None)
    if found is None and builds:
        found = _build_once(entry, paths, scan, Renderer(tokenizer, section), on_progress)
    elif found is None:
        found = _await(entry, paths)
    documents, report = found
    check_bad_share(report, section.max_bad_share)
    return documents, report


def entry_name(scan: Scan, tokenizer: PreTrainedTokenizerBase, section: DataSection) -> str:
    """Return the name of a cache entry: a hash of everything that determines its documents."""
    options = ("template_kwargs", "train_on", "turns", "lost_thinking", "long_documents", "max_tokens")
    files = [path for path in sorted(Path(__file__).parent.glob("*.py")) if path.name not in NOT_RENDERING]
    code = [xxhash.xxh3_64_hexdigest(path.read_bytes()) for path in files]
    made_by = [*code, transformers.__version__, tokenizers.__version__, jinja2.__version__]
    template = [tokenizer.chat_template, tokenizer.special_tokens_map]
    if any("strftime_now" in source for source in template_sources(tokenizer)):
        template.append(date.today().isoformat())  # the template writes the date
    rendered = [tokenizer_hash(tokenizer), template, [getattr(section, name) for name in options]]
    return hash_of([scan.content, rendered, made_by])


def open_entry(entry: Path, paths: Sequence[str]) -> tuple[TokenisedDocuments, DataReport] | None:
    """Open a cache entry; return its documents and report, or None if there is none.

    All of its files are read once and compared with their hashes.
    paths: current paths of the files. They replace those of the time of the build in the report.
    Raises DamagedEntry if the entry cannot be read, or names the first file that was altered.
    """
    if not entry.is_dir():
        return None
    try:
        facts = json.loads((entry / REPORT).read_text(encoding="utf-8"))
        altered = [name for name in HASHED if file_hash(entry / name) != facts["xxh3_64"][name]]
        if altered:
            raise DamagedEntry(f"{entry / altered[0]} was altered after it was written")
        documents = TokenisedDocuments(entry, paths)
    except DamagedEntry:
        raise
    except (OSError, ValueError, LookupError, EOFError, BadZipFile) as error:
        raise DamagedEntry(f"{entry} cannot be read ({type(error).__name__}: {error})") from error
    named = dict(zip(facts["paths"], paths, strict=True))
    report = facts["report"]

    def placed(place: str) -> str:
        path, _, line = place.rpartition(":")
        return f"{named[path]}:{line}"

    for kind in ("bad", "long"):
        report[kind] = tuple((placed(place), *rest) for place, *rest in report[kind])
    return documents, DataReport(**report)


def _open_undamaged(
    entry: Path, paths: Sequence[str], warn: Callable[[str], None]
) -> tuple[TokenisedDocuments, DataReport] | None:
    """Open a cache entry; return None, after a warning, if it is damaged, as if it were missing."""
    try:
        return open_entry(entry, paths)
    except DamagedEntry as error:
        warn(f"  {error}; the conversations are tokenised again. Check the disk of data.cache_dir if this repeats")
        return None


def _build_once(
    entry: Path, paths: Sequence[str], scan: Scan, renderer: Renderer, on_progress: Progress | None
) -> tuple[TokenisedDocuments, DataReport]:
    """Open an entry, after building it under its lock unless another process has done so meanwhile.

    Raises ValueError if the entry cannot be written, or cannot be read afterwards.
    """
    advice = "free some space, or name another folder in data.cache_dir"
    try:
        with _locked(entry):
            found = _open_undamaged(entry, paths, lambda text: None)  # the caller has warned
            if found is None:
                _build(entry, paths, scan, renderer, on_progress)
                found = open_entry(entry, paths)
    except OSError as error:
        problem = f"{entry.parent}: tokenised conversations cannot be written there: {error.strerror or error}"
        raise ValueError(f"{problem}; {advice}") from error
    if found is None:
        raise ValueError(f"{entry}: the tokenised conversations that were just written there cannot be read; {advice}")
    return found


def _build(entry: Path, paths: Sequence[str], scan: Scan, renderer: Renderer, on_progress: Progress | None) -> None:
    # This process holds the lock, so these were left by a process that died.
    for leftover in entry.parent.glob(f"{entry.name}.partial-*"):
        shutil.rmtree(leftover)
    shutil.rmtree(entry, ignore_errors=True)  # an entry that could not be opened
    partial = entry.with_name(f"{entry.name}.partial-{socket.gethostname()}-{os.getpid()}")
    tally = Tally(paths, scan, on_progress)
    try:
        writer = Writer(partial)
        for chunk, rendered in rendered_chunks(scan, renderer):
            writer.add(rendered.documents)
            tally.add(chunk, rendered)
        writer.close(paths, tally.report)
        if changed := [path for path, before in zip(paths, scan.stamps, strict=True) if stamp(Path(path)) != before]:
            raise ValueError(f"{', '.join(changed)}: changed while it was read; run again once no process writes to it")
        partial.rename(entry)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def rendered_chunks(scan: Scan, renderer: Renderer) -> Iterator[tuple[Chunk, Rendered]]:
    """Yield each chunk with its rendered documents, in order; several processes render larger data.

    The number of chunks in progress is bounded. Raises ValueError if a process dies.
    """
    workers = renderer.section.workers or len(os.sched_getaffinity(0))
    if workers == 1 or (not renderer.section.workers and scan.num_bytes < WORTH_PROCESSES_BYTES):
        yield from ((chunk, renderer(chunk)) for chunk in scan.chunks)
        return
    context = multiprocessing.get_context("spawn")
    pickled = pickle.dumps(renderer)
    with ProcessPoolExecutor(workers, context, _start_worker, (pickled,)) as pool:
        try:
            under_way: deque = deque()
            for chunk in scan.chunks:
                under_way.append((chunk, pool.submit(_render_chunk, chunk)))
                if len(under_way) > 2 * workers:
                    first, future = under_way.popleft()
                    yield first, future.result()
            yield from ((chunk, future.result()) for chunk, future in under_way)
        except BrokenProcessPool as error:
            problem = "a tokenising process died, possibly because it ran out of memory"
            raise ValueError(f"{problem}; run again with a lower data.workers than {workers}") from error


def _start_worker(pickled: bytes) -> None:
    global _render
    end_with_parent()
    init_hf_modules()  # needed to unpickle tokenizers defined by remote code
    _render = pickle.loads(pickled)


def _render_chunk(chunk: Chunk) -> Rendered:
    return _render(chunk)


def _await(entry: Path, paths: Sequence[str]) -> tuple[TokenisedDocuments, DataReport]:
    """Wait for an entry that another process of this machine builds, and open it.

    Raises ValueError if no process builds it for SECONDS_WITHOUT_SIGN seconds.
    """
    last_sign = time.monotonic()
    while (found := _open_undamaged(entry, paths, lambda text: None)) is None:
        if any(entry.parent.glob(f"{entry.name}.partial-*")) and not _is_free(entry):
            last_sign = time.monotonic()
        if time.monotonic() - last_sign > SECONDS_WITHOUT_SIGN:
            problem = f"no process is building {entry}, and this rank is waiting for it"
            raise ValueError(f"{problem}; the first rank of this machine has ended, or uses another data.cache_dir")
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return found


@contextmanager
def _locked(entry: Path) -> Iterator[None]:
    """Hold the entry's lock, which the operating system releases if the process dies."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with _lock_file(entry) as file:
        while not _take(file):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        yield


def _is_free(entry: Path) -> bool:
    """Return whether no process holds the entry's lock."""
    with suppress(FileNotFoundError), _lock_file(entry) as file:
        return _take(file)
    return True


def _lock_file(entry: Path) -> BinaryIO:
    """Open the entry's lock file.

    It is opened read-only, so that users who share a folder can use each other's lock files.
    """
    return os.fdopen(os.open(entry.with_suffix(".lock"), os.O_RDONLY | os.O_CREAT, 0o666), "rb")


def _take(file: BinaryIO) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
