"""The capture job, which writes the store that offline training reads.

Its stages, in order: data, plan, target, shards, manifest.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from engine.batch import PackedBatch
from engine.config.sections import AHEAD_OF_DRAFT, COLOCATED, SERIAL, Config
from engine.data.corpus import read_documents
from engine.data.documents import Document, Documents
from engine.data.fingerprint import hash_of, trained_with
from engine.data.packing import collate
from engine.data.templates import load_tokenizer
from engine.hidden_states.finite import MAX_NAMED, NonFiniteError, check_share, fault_of, place_names
from engine.hidden_states.sources import OnlineSource
from engine.hidden_states.store_format import (
    HEAD,
    MANIFEST,
    TARGET_FOLDER,
    Contents,
    Layout,
    Manifest,
    Shard,
    StoreError,
    plan_shards,
)
from engine.hidden_states.store_reader import MappedShard
from engine.hidden_states.store_writer import (
    LeftOut,
    NonFiniteDocument,
    Piece,
    Place,
    ShardFile,
    StoredTensors,
    StoreWriter,
)
from engine.hidden_states.stored_target import save_head
from engine.hidden_states.target_files import is_as_written, sha256_of_files
from engine.host.checkpoint_files import facts_of
from engine.host.files import DISK_FULL, PARTIAL, write_text, writing
from engine.host.telemetry import Telemetry
from engine.models.draft_method import DraftMethod
from engine.models.method_registry import make_method
from engine.models.target_families import text_config
from engine.overlap.pipeline import Pipeline, Producer
from engine.overlap.placement import Settings, open_pipeline
from engine.overlap.schedule import limits_of
from engine.overlap.step_clock import StepClock
from engine.parallel.mesh import World
from engine.target.frozen import FrozenTarget
from engine.weights.quantised_checkpoint import check_fp8_activations

SHARDS_PER_RANK = 4  # at least, so that all ranks have work to the end
DOCUMENTS_AT_A_TIME = 512


@dataclass(frozen=True)
class CaptureReport:
    """Totals of a finished capture.

    num_documents, num_tokens, num_slots, num_bytes: totals of the whole store.
    new_bytes, seconds: bytes written by all ranks in this run, and its duration.
    num_left_out: documents left out because their states are not finite.
    """

    folder: Path
    num_documents: int
    num_tokens: int
    num_slots: int
    num_bytes: int
    new_bytes: int
    seconds: float
    num_left_out: int = 0

    def summary(self) -> str:
        per_token = self.num_bytes / max(1, self.num_tokens) / 1024
        lines = [
            f"{self.folder}: {self.num_documents:,} documents, {self.num_tokens:,} tokens, {self.num_slots:,} slots, "
            f"{self.num_bytes / 2**20:,.1f} MiB, {per_token:.2f} KiB per token",
            f"written now: {self.new_bytes / 2**20:,.1f} MiB in {self.seconds:.0f} s",
            f"Next: deepspeed launcher/train.py --ds_config ds_configs/zero2.json target.store={self.folder}",
        ]
        if self.num_left_out:
            count = f"{self.num_left_out:,} documents have states that are not finite and are left out"
            lines.insert(1, f"{count}; launcher/inspect_store.py names them")
        return "\n".join(lines)


class Capture:
    """The capture job of one rank, which writes its share of the store."""

    def __init__(self, config: Config, world: World) -> None:
        assert config.target.store is not None, "a capture needs target.store"
        self.config = config
        self.world = world
        self.folder = Path(config.target.store)
        self.method = make_method(config)
        self.telemetry = Telemetry(speaks=world.is_main)

    def run(self) -> CaptureReport:
        """Run the whole job; a collective of all ranks.

        Raises ValueError, if possible before the target is loaded, and StoreError or OSError if the
        disk is full or fails.
        """
        section = self.config.target
        tokenizer = load_tokenizer(section, self.config.data)
        source = OnlineSource(self.config, tokenizer, self.world, self.telemetry)
        target_config = source.target_config
        contents = self.contents(tokenizer, target_config, source.target_identity)
        with self.telemetry.stage("Reading the data"):
            documents, _ = read_documents(self.config.data, tokenizer, self.world, self.telemetry)
            documents.check_token_ids(contents.vocab_size)
            manifest = self.plan(contents, documents)
            missing = self.missing(manifest)
            self.check_disk(manifest, missing)
        self.world.barrier()  # until every rank has made the same plan from the same folder
        if self.world.is_main:
            manifest = self.begin(manifest, tokenizer, target_config)
        self.world.barrier()
        with self.telemetry.stage("Loading the target"):
            target = source.load_target(contents.aux_layers)
            manifest = self.keep_head(manifest, target)
        started = time.perf_counter()
        with self.telemetry.stage("Capturing"):
            new_bytes = self.capture(target, documents, manifest.contents, missing[self.world.rank :: self.world.size])
        self.world.barrier()
        manifest = self.complete(manifest)
        num_tokens, num_slots = (sum(getattr(shard, name) for shard in manifest.shards) for name in ("num_tokens", "num_slots"))
        sizes = len(documents), num_tokens, num_slots, manifest.num_bytes
        new_bytes = int(self.world.sum(torch.tensor(new_bytes, device=self.world.device)).item())
        seconds = time.perf_counter() - started
        return CaptureReport(self.folder, *sizes, new_bytes, seconds, manifest.num_left_out)

    def contents(self, tokenizer: PreTrainedTokenizerBase, target_config: PreTrainedConfig, identity: str | None) -> Contents:
        """Return the contents of the store to be written. identity: as `target_identity` returns it."""
        config = self.config
        text = text_config(target_config)
        check_fp8_activations(target_config, config.target)
        chosen = "float32" if self.world.device.type == "cpu" else "bfloat16"
        return Contents(
            target=config.target.path,
            revision=config.target.revision,
            config_hash=hash_of(text.to_dict()),
            **trained_with(tokenizer, config.data),
            aux_layers=self.method.choose_aux_layers(target_config, config.target.aux_layers),
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            mask_alignment=config.ttt.mask_alignment,
            temperature=config.loss.temperature,
            dtype=chosen if config.store.dtype == "auto" else config.store.dtype,
            fp8_activations=config.target.fp8_activations,
            target_identity=identity,
        )

    def plan(self, contents: Contents, documents: Documents) -> Manifest:
        """Return the manifest of the capture that this run continues, or a new one.

        Raises StoreError if the folder holds a capture of other contents.
        """
        checksum = f"{documents.checksum:08x}"
        slots = count_slots(documents, self.method)
        if not (self.folder / MANIFEST).exists():
            lengths = documents.lengths.tolist()
            total = sum(lengths) * contents.bytes_per_token + sum(slots) * contents.bytes_per_slot
            at_most = total // (SHARDS_PER_RANK * self.world.size) if self.world.size > 1 else total
            shards = plan_shards(lengths, slots, contents, min(self.config.store.shard_mb << 20, at_most))
            return Manifest(contents, checksum, shards)
        manifest = Manifest.read(self.folder)
        differences = contents.differences(manifest.contents)
        if manifest.corpus_checksum != checksum:
            differences.append(f"conversations: {manifest.num_documents:,} documents, now {len(documents):,}, or other content")
        elif any(sum(slots[index] for index in shard.documents) != shard.num_slots for shard in manifest.shards):
            differences.append("the positions that the draft learns: draft.method or its options select others")
        if differences:
            problem = f"{self.folder} holds another capture: " + "; ".join(differences)
            raise StoreError(f"{problem}. Restore these to continue it, or name another folder in target.store")
        if manifest.contents.target_identity is None:
            self.telemetry.note(
                "  this capture was begun before the target's identity was recorded, so it is not known whether the "
                "target's weights are still the same"
            )
        return manifest

    def missing(self, manifest: Manifest) -> list[Shard]:
        """Return the shards that are still to be written, including those that are incomplete."""
        missing = []
        for shard in manifest.shards:
            try:
                MappedShard(self.folder, manifest.contents, shard)
            except StoreError:
                missing.append(shard)
        there = len(manifest.shards) - len(missing)
        if there:
            self.telemetry.note(f"  {there} of {len(manifest.shards)} shards are already complete")
        return missing

    def check_disk(self, manifest: Manifest, missing: Sequence[Shard]) -> None:
        """Raise StoreError if the missing shards need more disk space than is free."""
        needed = sum(Layout.of(manifest.contents, shard).num_bytes for shard in missing)
        existing = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        free = shutil.disk_usage(existing).free + sum(path.stat().st_size for path in self.folder.glob(f"*{PARTIAL}"))
        self.telemetry.note(f"  {len(missing)} shards to write, {needed / 2**30:,.2f} GiB; {free / 2**30:,.2f} GiB are free")
        if needed > free:
            problem = f"{self.folder} needs {needed / 2**30:,.2f} GiB, its disk has {free / 2**30:,.2f} GiB free"
            raise StoreError(
                f"{problem}; free some space, name another disk, or set store.dtype=float8_e4m3, which takes half of bfloat16"
            )

    def begin(self, manifest: Manifest, tokenizer: PreTrainedTokenizerBase, target_config: PreTrainedConfig) -> Manifest:
        """Write the plan, and the target's config and tokenizer, to the folder of the store.

        Returns the manifest with the checksums of the target's files.
        """
        with writing(self.folder):
            (self.folder / TARGET_FOLDER).mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f"*{PARTIAL}"):
                leftover.unlink()
            target_config.save_pretrained(self.folder / TARGET_FOLDER)
            tokenizer.save_pretrained(self.folder / TARGET_FOLDER)
        target_files = sha256_of_files(self.folder)
        if HEAD in manifest.target_files:
            target_files[HEAD] = manifest.target_files[HEAD]
        manifest = replace(manifest, target_files=target_files)
        self.write_manifest(manifest)
        return manifest

    def keep_head(self, manifest: Manifest, target: FrozenTarget) -> Manifest:
        """Write the target's head and embedding from rank 0; a collective if ranks share the head.

        A head that an earlier run wrote is kept if it still has its checksum. A shared head is
        gathered only within this call. Returns the manifest with the checksum of the head.
        """
        path = self.folder / TARGET_FOLDER / HEAD
        head = target.whole_head()
        embed_weight_VD = None if target.is_tied else target.embedding.whole()
        if not self.world.is_main or is_as_written(self.folder, HEAD, manifest.target_files):
            return manifest
        save_head(path, head, embed_weight_VD)
        manifest = replace(manifest, target_files={**manifest.target_files, HEAD: facts_of(path).sha256})
        self.write_manifest(manifest)
        return manifest

    def write_manifest(self, manifest: Manifest) -> None:
        write_text(self.folder / MANIFEST, manifest.to_json())

    def capture(self, target: FrozenTarget, documents: Documents, contents: Contents, shards: Sequence[Shard]) -> int:
        """Write this rank's shards; returns the number of bytes written.

        Raises NonFiniteError if too many documents are left out, and StoreError if the disk is full
        or if target.non_finite=stop and a document's states are not finite.
        """
        threads = self.config.store.threads
        stops = self.config.target.non_finite == "stop"
        writer = StoreWriter(threads, depth=2 * threads, stops=stops)
        files: list[ShardFile] = []
        namer = Namer(documents, target.aux_layers, self.telemetry.warn)
        try:
            with self.telemetry.progress(sum(shard.num_tokens for shard in shards), "tokens") as progress:
                done = num_documents = 0
                with self.pieces(target, documents, contents, shards, files) as pieces:
                    for piece in pieces:
                        writer.put(piece)
                        done += piece.batch.num_tokens
                        num_documents += len(piece.batch.host_lengths)
                        namer.name_new(writer.left_out)
                        check_share(len(writer.left_out), num_documents)
                        progress.move_to(done, f"tokens, {writer.num_bytes / 2**20:,.0f} MiB written")
                        pieces.release()
            target.join_other_forwards()
            writer.close()
            namer.name_new(writer.left_out)
        except NonFiniteError:
            abandon(writer, files)
            raise
        except NonFiniteDocument as error:
            abandon(writer, files)
            advice = "Delete it, or set target.non_finite=leave_out to capture without it"
            raise StoreError(f"{namer.describe(error.left_out)}. {advice}") from error
        except OSError as error:
            abandon(writer, files)
            if error.errno not in DISK_FULL:
                raise
            there = sum((self.folder / shard.name).is_file() for shard in shards)
            problem = f"{self.folder}: the disk is full; {there} of this rank's {len(shards)} shards are written and whole"
            raise StoreError(f"{problem}. Free some space and run the same command: it continues with the next one") from error
        return writer.num_bytes

    def pieces(
        self,
        target: FrozenTarget,
        documents: Documents,
        contents: Contents,
        shards: Sequence[Shard],
        files: list[ShardFile],
    ) -> Pipeline[Place, Piece]:
        """Return the pipeline that runs the target, and whose pieces are on their way to the host.

        Only the target issues collectives here, so that it may run ahead of the writer in any case.
        files: gets the file of each shard when it is begun.
        """

        def places() -> Iterator[Place]:
            for shard in shards:
                file = ShardFile(self.folder, contents, shard)
                files.append(file)
                yield from self.places(documents, file)

        def run(place: Place) -> Piece:
            on_device = place.batch.to(target.device)
            stored = StoredTensors.of(on_device, target(on_device, place.slots_N), contents.dtype)
            return Piece(**vars(place), **vars(stored))

        placement = SERIAL if self.config.overlap.placement == SERIAL else COLOCATED

        def num_bytes(place: Place) -> int:
            return place.batch.num_tokens * contents.bytes_per_token + len(place.slots_N) * contents.bytes_per_slot

        section = self.config.overlap
        look_ahead = AHEAD_OF_DRAFT if section.look_ahead is None else section.look_ahead
        settings = Settings(placement, limits_of(look_ahead, section))
        clock = StepClock(self.world.device)
        return open_pipeline(Producer(places(), run, num_bytes), clock, settings, self.world.device)

    def places(self, documents: Documents, file: ShardFile) -> Iterator[Place]:
        """Yield the batches of a shard with their places in it."""
        first_document = first_token = first_slot = 0
        for batch in packed_in_order([documents[index] for index in file.shard.documents], self.config.data.max_tokens):
            slots_N = self.method.stored_slots(batch)
            yield Place(file, first_document, first_token, first_slot, batch, slots_N)
            first_document += len(batch.host_lengths)
            first_token += batch.num_tokens
            first_slot += len(slots_N)

    def complete(self, manifest: Manifest) -> Manifest:
        """Write, on rank 0, and return the manifest with checksums and left-out documents."""
        shards = []
        for shard in manifest.shards:
            mapped = MappedShard(self.folder, manifest.contents, shard)
            shards.append(replace(shard, checksum=mapped.checksum, left_out=mapped.left_out))
        manifest = replace(manifest, shards=tuple(shards))
        if self.world.is_main:
            self.write_manifest(manifest)
        return manifest


class Namer:
    """Warnings that name the documents that a capture leaves out on this rank."""

    def __init__(self, documents: Documents, aux_layers: tuple[int, ...], warn: Callable[[str], None]) -> None:
        self._documents = documents
        self._warn = warn
        self._places = place_names(aux_layers)
        self._num_named = 0

    def describe(self, entry: LeftOut) -> str:
        """Return a document's name and the first place where its states are not finite."""
        place = self._places[entry.place]
        return fault_of(self._documents.name_of(entry.document), place)

    def name_new(self, left_out: Sequence[LeftOut]) -> None:
        """Warn about each document added to `left_out` since the last call.

        Beyond `MAX_NAMED` documents, only the manifest names them.
        """
        new = left_out[self._num_named : MAX_NAMED]
        for entry in new:
            self._warn(f"  left out {self.describe(entry)}")
        self._num_named += len(new)


def abandon(writer: StoreWriter, files: Sequence[ShardFile]) -> None:
    """Stop writing, and delete the files of incomplete shards."""
    writer.stop()
    for file in files:
        file.abandon()


def count_slots(documents: Documents, method: DraftMethod) -> list[int]:
    """Return the number of slots of each document."""
    counts: list[int] = []
    for start in range(0, len(documents), DOCUMENTS_AT_A_TIME):
        batch = collate([documents[index] for index in range(start, min(start + DOCUMENTS_AT_A_TIME, len(documents)))])
        bounds = torch.searchsorted(method.stored_slots(batch), batch.cu_seqlens.long())
        counts += bounds.diff().tolist()
    return counts


def packed_in_order(documents: Sequence[Document], max_tokens: int) -> Iterator[PackedBatch]:
    """Yield batches of consecutive documents, each of as many as fit `max_tokens`."""
    together: list[Document] = []
    for document in documents:
        if together and sum(map(len, together)) + len(document) > max_tokens:
            yield collate(together)
            together = []
        together.append(document)
    yield collate(together)
