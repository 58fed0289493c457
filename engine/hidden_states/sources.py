"""The two built-in sources of hidden states: the running target, and a store of captured states."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from engine.config.sections import ONLINE, STORED, Config
from engine.data.corpus import read_documents
from engine.data.documents import Documents
from engine.data.fingerprint import trained_with
from engine.hidden_states.protocol import HiddenStateSource, find_source, register_source
from engine.hidden_states.store_reader import open_store
from engine.hidden_states.stored_target import StoredTarget
from engine.host.telemetry import Telemetry
from engine.kernels.self_check import SelfCheck
from engine.models.target_families import check_family
from engine.parallel.mesh import TargetMesh, World
from engine.target.checked_kernels import check_target_kernels
from engine.target.configuration import load_target_config
from engine.target.frozen import FrozenTarget
from engine.target.fused_elementwise import use_liger
from engine.target.identity import shared_identity
from engine.weights.quantised_checkpoint import check_quantisation


class OnlineSource:
    """Source that runs the frozen target on conversations within this job."""

    can_decode = True
    counted = "the assistant tokens"
    aux_layers: tuple[int, ...] | None
    target_identity: str | None

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, world: World, telemetry: Telemetry) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._world = world
        self._telemetry = telemetry
        self.mesh = TargetMesh.of(config.parallel, world)
        self.target_config = load_target_config(config.target)
        self.aux_layers = config.target.aux_layers
        identity = self._identify()
        self.target_identity = identity
        self.trained_with = trained_with(tokenizer, config.data) | {"target_identity": identity}

    def _identify(self) -> str:
        """Check that the target can be read, and return its identity; a collective of all ranks.

        This comes first, before anything else takes time.
        """
        section = self._config.target
        check_family(self.target_config)
        check_quantisation(self.target_config, section.path, is_shared=self.mesh.size > 1)
        with self._telemetry.stage("Checking the target's files"):
            return shared_identity(section, self._world)

    def documents(self) -> Documents:
        """Read the conversations of `data.train`. Raises ValueError for conversations that cannot be used."""
        return read_documents(self._config.data, self._tokenizer, self._world, self._telemetry)[0]

    def count_tokens(self, documents: Documents, vocab_size: int) -> torch.Tensor:
        """Return how often each token occurs among the assistant tokens, int64 [V]."""
        return torch.from_numpy(documents.count_assistant_tokens(vocab_size))

    def load_target(self, aux_layers: tuple[int, ...]) -> FrozenTarget:
        """Load the target with kernels that passed the self-check; a collective of all ranks."""
        section = self._config.target
        temperature = self._config.loss.temperature
        self_check = SelfCheck.of(self._world, self._config.data.cache_dir, self._telemetry.warn)
        check_target_kernels(self.target_config, section, self_check)
        target = FrozenTarget.load(
            section,
            self._world.device,
            aux_layers,
            temperature,
            self.mesh,
            self._config.parallel.allow_unverified,
            self._telemetry.progress,
        )
        self._telemetry.note(f"  attention: {target.attention}")
        replaced = use_liger(target.decoder, target.dtype, self._config.kernels, self_check)
        self._telemetry.note(f"  liger: {replaced}")
        for line in target.plan.summary(self.mesh):
            self._telemetry.note(f"  {line}")
        return target


class StoredSource:
    """Source that reads captured hidden states from a store."""

    can_decode = False
    aux_layers: tuple[int, ...] | None
    target_identity: str | None

    def __init__(self, config: Config, world: World, telemetry: Telemetry) -> None:
        """Open the store of a recipe.

        Raises StoreError if the store cannot be read or was captured with other options.
        """
        self._world = world
        self._telemetry = telemetry
        self._by_argmax = config.draft.vocab_from == "argmax"
        self.counted = "the target's most likely tokens" if self._by_argmax else OnlineSource.counted
        assert config.target.store is not None  # `Config` refuses this source without a store
        self._store = open_store(Path(config.target.store), config.store.skip_bad)
        self._store.check(
            aux_layers=config.target.aux_layers,
            mask_alignment=config.ttt.mask_alignment,
            temperature=config.loss.temperature,
            fp8_activations=config.target.fp8_activations,
        )
        for problem in self._store.problems:
            telemetry.note(f"  left out: {problem}")
        num_left_out = sum(len(shard.left_out) for shard in self._store.documents.shards)
        if num_left_out:
            telemetry.note(f"  {num_left_out:,} documents were left out by the capture: their states are not finite")
        self.aux_layers = self._store.contents.aux_layers
        self.target_identity = self._store.contents.target_identity
        self.trained_with = self._store.trained_with
        if self.target_identity is not None:
            self.trained_with |= {"target_identity": self.target_identity}

    def documents(self) -> Documents:
        return self._store.documents

    def count_tokens(self, documents: Documents, vocab_size: int) -> torch.Tensor:
        """Return how often each token counts for the draft vocabulary, int64 [V].

        Counted are the target's most likely tokens, or the assistant tokens.
        """
        count = self._store.documents.count_argmax if self._by_argmax else documents.count_assistant_tokens
        return torch.from_numpy(count(vocab_size))

    def load_target(self, aux_layers: tuple[int, ...]) -> StoredTarget:
        documents = len(self._store.documents)
        self._telemetry.note(f"  {documents:,} documents of {self._store.folder}; the target itself is not loaded")
        return StoredTarget(self._store, self._world.device)


def open_source(config: Config, tokenizer: PreTrainedTokenizerBase, world: World, telemetry: Telemetry) -> HiddenStateSource:
    """Open the source of a recipe.

    This is `target.source` if set, else the store of `target.store`, else the running target.
    """
    default = ONLINE if config.target.store is None else STORED
    open_it = find_source(config.target.source or default)
    return open_it(config, tokenizer, world, telemetry)


def _open_store(config: Config, tokenizer: PreTrainedTokenizerBase, world: World, telemetry: Telemetry) -> StoredSource:
    return StoredSource(config, world, telemetry)


register_source(ONLINE, OnlineSource)
register_source(STORED, _open_store)
