"""The frozen target, run on packed documents to compute the states that the draft learns from."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.batch import PackedBatch, TargetOutput, to_device
from engine.config.sections import TargetSection
from engine.kernels import choose_packed_attention
from engine.models.target_families import (
    check_aux_layers,
    check_family,
    default_aux_layers,
    final_logits,
    num_layers,
    num_streams,
    runs_packed,
    text_config,
)
from engine.parallel.collectives import gather_objects
from engine.parallel.expert_products import compute_experts_in_order
from engine.parallel.mesh import ALONE, TargetMesh
from engine.parallel.plan import TargetPlan, cut_decoder, let_exchange
from engine.parallel.rules import check_proven, part_of_rows
from engine.parallel.tokens import Tokens, bounds, tokens_of_forward
from engine.parallel.vocab_shard import VocabShard
from engine.target.attention import NAME, ONE, one_document, packed_attention
from engine.target.configuration import load_target_config
from engine.target.embedding import SharedEmbedding, TargetEmbedding, gives_rows
from engine.target.head import TargetHead
from engine.target.loading import read_target
from engine.target.packed_row import PackedRow
from engine.target.rotary import rotate_by_length
from engine.target.shared_head import SharedHead
from engine.target.structure import (
    cut_head,
    decoder_of,
    drop_other_towers,
    head_of,
    layers_of,
)
from engine.weights.quantised_checkpoint import (
    check_fp8_activations,
    check_quantisation,
)
from engine.weights.weight_loader import Bar


class ForwardCapture:
    """Outputs captured from the last forward of a model."""

    def __init__(self, aux_layers: tuple[int, ...], num_streams: int = 1) -> None:
        self._aux_layers = aux_layers
        self._by_layer: dict[int, Tensor] = {}
        self._num_streams = num_streams
        self._last_hidden: Tensor | None = None
        # The rows, and their version counter at the time of the capture.
        self._embedded: tuple[Tensor, int] | None = None

    def aux(self) -> Tensor:
        """Return the outputs of the auxiliary layers in ascending order, [batch, tokens, A * D].

        Each output is the mean over the layer's residual streams.
        Raises ValueError if one of the layers did not run.
        """
        skipped = [layer for layer in self._aux_layers if layer not in self._by_layer]
        if skipped:
            raise ValueError(f"target.aux_layers: layers {skipped} did not run on text alone; choose others")
        return torch.cat([self._by_layer[layer] for layer in sorted(self._aux_layers)], dim=-1)

    def last_hidden(self) -> Tensor:
        """Return the state after the final norm, the input of the LM head, [batch, tokens, D]."""
        assert self._last_hidden is not None, "no forward was captured"
        return self._last_hidden

    def embedded(self) -> Tensor | None:
        """Return the output of the token embedding, [batch, tokens, D].

        Returns None if it was not captured, or if it was modified in place after the capture.
        """
        if self._embedded is None:
            return None
        rows, version = self._embedded
        return rows if rows._version == version else None

    def _hook(self, layer: int):
        def keep(module, args, output) -> None:
            state = output if isinstance(output, Tensor) else output[0]
            if self._num_streams > 1:  # [batch, tokens, streams, D] or [batch, tokens, streams * D]
                state = state.flatten(2).unflatten(2, (self._num_streams, -1)).mean(2)
            self._by_layer[layer] = state

        return keep

    def _keep_last(self, module, args, output) -> None:
        self._last_hidden = output[0]

    def _keep_embedded(self, module, args, output) -> None:
        self._embedded = output, output._version


@contextmanager
def capture(model: PreTrainedModel, aux_layers: tuple[int, ...], embeds: bool = False) -> Iterator[ForwardCapture]:
    """Context manager that captures auxiliary and last hidden states of each forward of `model`.

    model: a causal LM. embeds: whether to capture the output of its token embedding as well.
    """
    decoder = decoder_of(model)
    layers = layers_of(decoder)
    seen = ForwardCapture(aux_layers, num_streams(model.config))
    hooks = [layers[layer].register_forward_hook(seen._hook(layer)) for layer in aux_layers]
    hooks.append(decoder.register_forward_hook(seen._keep_last))
    if embeds:
        hooks.append(decoder.get_input_embeddings().register_forward_hook(seen._keep_embedded))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class LayerGroups:
    """Layers of a target, divided into groups of about the same number.

    num_pauses: places between two groups.
    """

    def __init__(self, layers: nn.ModuleList, num_groups: int) -> None:
        self._layers = layers
        self._num_groups = min(num_groups, len(layers))
        self.num_pauses = self._num_groups - 1

    @contextmanager
    def calling(self, function: Callable[[], None]) -> Iterator[None]:
        """Context manager in which every forward calls a function between two groups."""
        firsts = [group * len(self._layers) // self._num_groups for group in range(1, self._num_groups)]
        hooks = [self._layers[first].register_forward_pre_hook(lambda module, args: function()) for first in firsts]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class FrozenTarget:
    """A Hugging Face causal LM that is never trained.

    model: the causal LM. Outside of `__call__` it uses its family's own attention, so that it can
    decode with a cache.
    config: the config of its language model.
    aux_layers: 0-based ids of the layers whose outputs are captured, ascending.
    head, embedding: its LM head and token embedding. is_tied: whether they are one tensor.
    dtype, device: precision and device of its states.
    packs: whether documents share a forward. In some families one document would affect another;
    these run one document at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        aux_layers: tuple[int, ...] | None,
        temperature: float = 1.0,
        mesh: TargetMesh = ALONE,
        plan: TargetPlan | None = None,
    ) -> None:
        """Prepare a loaded model.

        mesh: the ranks that share the target.
        plan: how the weights have been sharded; None = they are whole, and are sharded here.
        Raises ValueError if the family's head or layers cannot be read, or if `aux_layers` names a
        layer that does not exist.
        """
        self.model = model.eval().requires_grad_(False)
        self.config = text_config(model.config)
        check_family(self.config)
        count = num_layers(self.config)
        self.aux_layers: tuple[int, ...] = check_aux_layers(aux_layers or default_aux_layers(count), count)
        self.decoder = decoder_of(model)
        drop_other_towers(model, self.decoder)
        if getattr(self.config, "attn_logit_softcapping", None) is not None:
            # Transformers' sdpa attention ignores the soft cap of the scores.
            model.set_attn_implementation("eager")
        self.packs = self.decoder._supports_attention_backend and runs_packed(self.config)
        if self.packs:
            rotate_by_length(self.decoder)
        self.mesh = mesh
        self.plan = plan or TargetPlan()
        compute_experts_in_order(self.decoder)
        table: Any = model.get_input_embeddings()
        head = head_of(model)
        self.is_tied = head.weight_VD.data_ptr() == table.weight.data_ptr()
        if mesh.size > 1:
            # Set before modules get copies of their configs below, so that the copies have it too.
            self.decoder.set_attn_implementation(NAME if self.packs else ONE)
            if plan is None:
                self.plan = cut_decoder(self.decoder, mesh)
                cut_head(model, mesh.tp, self.is_tied)
            let_exchange(self.decoder, self.plan, mesh, self.packs)
        self.dtype: torch.dtype = table.weight.dtype
        self.device: torch.device = table.weight.device
        self.embedding: TargetEmbedding | SharedEmbedding = TargetEmbedding(table.weight)
        if self.plan.embedding is not None:
            self.embedding = SharedEmbedding(table.weight, VocabShard(table.num_embeddings, mesh.tp))
        self._has_head_stats = True
        self.head: TargetHead | SharedHead = replace(head_of(model, mesh.tp), temperature=temperature)
        self._check_head(self.head)
        if mesh.tp.size > 1:
            self.head = SharedHead(self.head, VocabShard(model.get_output_embeddings().out_features, mesh.tp))

    @classmethod
    def load(
        cls,
        section: TargetSection,
        device: torch.device,
        aux_layers: tuple[int, ...] | None = None,
        temperature: float = 1.0,
        mesh: TargetMesh = ALONE,
        allow_unverified: bool = False,
        bar: Bar | None = None,
    ) -> "FrozenTarget":
        """Load the target of a recipe on `device` in `section.dtype`.

        Weights are read straight to the device, one tensor at a time.

        aux_layers: None = those of the section, or else the default rule.
        mesh: the ranks that share the target; each rank reads only its part of the weights.
        allow_unverified: whether to accept a family not shown to give the same results when it is shared.
        bar: shows the progress of reading.
        Raises ValueError, before any weight is read, if the checkpoint does not fit the config, a
        file is incomplete, or the quantisation is not supported.
        """
        config = load_target_config(section)
        if config.is_encoder_decoder:
            raise ValueError(f"target.path={section.path}: {config.model_type!r} is an encoder-decoder; expected a causal LM")
        check_family(config)
        check_fp8_activations(config, section)
        check_quantisation(config, section.path, is_shared=mesh.size > 1)
        if mesh.size > 1 and not allow_unverified:
            check_proven(text_config(config))
        aux_layers = aux_layers or section.aux_layers
        model, plan = read_target(config, section, device, mesh, bar)
        return cls(model, aux_layers, temperature, mesh, plan)

    @property
    def attention(self) -> str:
        """Phrase for the log that describes how documents attend."""
        if not self.packs:
            return "a document at a time, under its family's own masks"
        return choose_packed_attention(self.device, self.dtype).reason

    def with_head_stats(self, wanted: bool) -> "FrozenTarget":
        """Return this target with or without `argmax_N` and `lse_N` in its outputs.

        Without them, a forward saves a product with the head. Ranks that share the target must all choose the same.
        """
        if wanted == self._has_head_stats:
            return self
        target = copy(self)
        target._has_head_stats = wanted
        return target

    def whole_head(self) -> TargetHead:
        """Return the head with all of its rows; a collective if ranks share it."""
        return self.head.whole()

    def head_rows(self, target_ids_U: Tensor) -> TargetHead:
        """Return the head of `target_ids_U` only, int64 [U]; a collective if ranks share it."""
        return self.head.rows(target_ids_U)

    def layer_groups(self, num_groups: int) -> "LayerGroups":
        """Return a division of the layers into at most `num_groups` groups."""
        return LayerGroups(layers_of(self.decoder), num_groups)

    @torch.no_grad()
    def __call__(self, batch: PackedBatch, slots_N: Tensor) -> TargetOutput:
        """Run the target on the documents of `batch`, each of which attends only to itself.

        slots_N: int64 [N], positions at which the draft learns the target distribution, ascending.
        """
        batch = batch.to(self.device)
        if self.mesh.size > 1:
            return self._shared(batch, to_device(slots_N, self.device))
        if self.packs:
            row = PackedRow(batch.host_lengths, self.device)
            with capture(self.model, self.aux_layers) as seen, packed_attention(self.decoder, row):
                ids_1T = batch.input_ids_T[None]
                self.decoder(input_ids=ids_1T, position_ids=row.position_1T, use_cache=False)
            slots_N = to_device(slots_N, self.device)
            aux_TA = seen.aux()[0]
            last_hidden_ND = seen.last_hidden()[0, slots_N]
        else:
            aux_TA, last_hidden_ND = self._one_by_one(batch, slots_N)
            slots_N = to_device(slots_N, self.device)
        return TargetOutput(aux_TA, slots_N, last_hidden_ND, *self._head_stats(last_hidden_ND))

    def _head_stats(self, last_hidden_ND: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the most likely token and the log-sum-exp of each slot, if they were asked for; a collective."""
        return self.head.argmax_and_lse(last_hidden_ND) if self._has_head_stats else (None, None)

    def _one_by_one(self, batch: PackedBatch, slots_N: Tensor) -> tuple[Tensor, Tensor]:
        """Run each document in a separate forward.

        Returns auxiliary states [T, A * D] and last hidden states of the slots [N, D].
        """
        aux: list[Tensor] = []
        last_hidden: list[Tensor] = []
        host_slots_N = slots_N.cpu()
        for start, end in bounds(batch.host_lengths):
            first_slot, end_slot = torch.searchsorted(host_slots_N, torch.tensor((start, end))).tolist()
            row = PackedRow((end - start,), self.device)
            with capture(self.model, self.aux_layers) as seen, one_document(row):
                self.decoder(input_ids=batch.input_ids_T[None, start:end], use_cache=False)
            own_slots_N = to_device(host_slots_N[first_slot:end_slot] - start, self.device)
            aux.append(seen.aux()[0])
            last_hidden.append(seen.last_hidden()[0, own_slots_N])
        return torch.cat(aux), torch.cat(last_hidden)

    def _shared(self, batch: PackedBatch, slots_N: Tensor) -> TargetOutput:
        """Run the target on `batch` together with the other ranks of the mesh.

        This is a collective of the mesh: every other rank calls it with its own batch, or `join_other_forwards`.
        """
        seen = self._run_shared(batch.input_ids_T, gather_objects(batch.host_lengths, self.mesh.whole))
        last_hidden_ND = seen.last_hidden()[0, slots_N]
        embedded = seen.embedded()
        embed_TD = None if embedded is None else embedded[0]
        return TargetOutput(seen.aux()[0], slots_N, last_hidden_ND, *self._head_stats(last_hidden_ND), embed_TD)

    @torch.no_grad()
    def join_other_forwards(self) -> None:
        """Take part in the forwards of the mesh's other ranks until every rank calls this method."""
        one_T = torch.zeros(1, dtype=torch.long, device=self.device)
        while self.mesh.size > 1 and any(everyone := gather_objects((), self.mesh.whole)):
            seen = self._run_shared(one_T, everyone)
            self._head_stats(seen.last_hidden()[0, :0])

    def _run_shared(self, input_ids_T: Tensor, everyone: list[tuple[int, ...]]) -> ForwardCapture:
        """Run one forward of the shared target and return what was captured on this rank.

        everyone: document lengths of each rank of the mesh; empty for a rank that has no batch.
        """
        tp = self.mesh.tp
        first = self.mesh.whole.rank // tp.size * tp.size
        tokens = Tokens(tuple(documents or (1,) for documents in everyone[first : first + tp.size]), tp.rank)
        embeds = self.plan.embedding is not None and gives_rows(self.decoder.get_input_embeddings())
        with capture(self.model, self.aux_layers, embeds) as seen, self._forward_of(tokens) as arguments:
            self.decoder(input_ids=input_ids_T[None], use_cache=False, **arguments)
        return seen

    @contextmanager
    def _forward_of(self, tokens: Tokens) -> Iterator[dict[str, Tensor]]:
        """Context manager in which the ranks of the mesh run a forward of `tokens`.

        Yields the decoder's arguments other than this rank's token ids.
        """
        row = PackedRow(tokens.documents, self.device)
        with tokens_of_forward(tokens), packed_attention(self.decoder, row, self.packs):
            yield {"position_ids": row.position_1T}

    @torch.no_grad()
    def _check_head(self, head: TargetHead) -> None:
        """Compare `head`, or this rank's part of it, with the model's logits on two tokens.

        Models with remote code may transform their logits in ways that `TargetHead` does not know.
        Raises ValueError if the logits differ or the auxiliary states have an unexpected shape.
        """
        ids_1T = torch.arange(2, device=self.device)[None]
        tp = self.mesh.tp
        shared: AbstractContextManager[dict[str, Tensor]] = nullcontext({})
        if self.mesh.size > 1:
            shared = self._forward_of(Tokens(((2,),) * tp.size, tp.rank))
        with capture(self.model, self.aux_layers) as seen, shared as arguments:
            expected = self.model(input_ids=ids_1T, use_cache=False, **arguments).logits.float()
        ours = replace(head, temperature=1.0).logits(seen.last_hidden())
        aux = seen.aux()
        family = self.config.model_type
        width = self.config.hidden_size
        expected_shape = (1, 2, len(self.aux_layers) * width)
        if aux.shape != expected_shape:
            raise ValueError(
                f"target family {family!r} gives auxiliary states {list(aux.shape)}; expected {list(expected_shape)}"
            )
        count = final_logits(self.config).num_tokens
        if count is not None:  # rows from here on are not tokens
            first, _ = part_of_rows(self.model.get_output_embeddings().out_features, tp)
            ours, expected = (logits[..., : max(0, count - first)] for logits in (ours, expected))
        tolerance = 1e-4 if self.dtype == torch.float32 else 2e-2
        if ours.shape != expected.shape or not (ours - expected).abs().max() <= tolerance * expected.abs().max():
            raise ValueError(f"target family {family!r} changes its logits after the head in an unknown way; use another")
