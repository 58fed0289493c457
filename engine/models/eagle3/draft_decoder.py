"""The draft's forward pass for one prompt, with few operations per step.

Drafting reads a handful of rows at a time, and its time is that of launching operations, not of
computing. Compared with `Eagle3Draft.step`, projections of the same input are one product, keys and
values are written to one buffer, rotary tables are computed once, and attention is one call.

Shapes: Q rows that are read, K keys that they may attend to, P projected heads: those of queries,
keys and values.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.elementwise import rms_norm
from engine.models.eagle3.draft import Eagle3Draft, Eagle3Layer

if TYPE_CHECKING:
    from engine.models.eagle3.served_draft import ServedEagle3

FEWEST_KEYS = 256  # capacity of new buffers


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one layer. Those of projections that share an input are copies, laid end to end.

    project_PI: q, k and v. attended_AD: o, transposed. gate_up_FD: gate and up. down_FD: transposed.
    input_norm_D: None in layers that do not read the embedding.
    """

    num_query_heads: int
    head_dim: int
    input_norm_D: Tensor | None
    hidden_norm_D: Tensor
    project_PI: Tensor
    attended_AD: Tensor
    mlp_norm_D: Tensor
    gate_up_FD: Tensor
    down_FD: Tensor

    @classmethod
    def of(cls, layer: Eagle3Layer) -> "LayerWeights":
        attention = layer.self_attn
        mlp = layer.mlp
        projections = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        return cls(
            num_query_heads=attention.q_proj.weight.shape[0] // attention.head_dim,
            head_dim=attention.head_dim,
            input_norm_D=None if layer.input_layernorm is None else layer.input_layernorm.weight,
            hidden_norm_D=layer.hidden_norm.weight,
            project_PI=torch.cat(projections),
            attended_AD=attention.o_proj.weight.t(),
            mlp_norm_D=layer.post_attention_layernorm.weight,
            gate_up_FD=torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)),
            down_FD=mlp.down_proj.weight.t(),
        )


class RotaryPositions:
    """Rotary tables of successive positions, which double their size when they are too short.

    With the pairs (e, e + E/2), the rotated vector is x cos + x[swap] sin, where sin is negative in the
    first half.
    """

    def __init__(self, draft: Eagle3Draft, head_dim: int, device: torch.device) -> None:
        half = head_dim // 2
        self.swap_E = torch.arange(head_dim, device=device).roll(half)
        self._rotary = draft.rotary
        self._sign_E = torch.ones(head_dim, device=device)
        self._sign_E[:half] = -1
        self._device = device
        self._tables = self._table(FEWEST_KEYS)

    def at(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return the tables of `count` positions from `first` on, fp32 [count, 1, E] each."""
        end = first + count
        if end > len(self._tables[0]):
            self._tables = self._table(2 * end)
        cos_N1E, sin_N1E = self._tables
        return cos_N1E[first:end], sin_N1E[first:end]

    def _table(self, count: int) -> tuple[Tensor, Tensor]:
        cos_N1E, sin_N1E = self._rotary.cos_sin(torch.arange(count, device=self._device))
        return cos_N1E, sin_N1E * self._sign_E


class KeyBuffer:
    """Keys and values of one layer, [2 G, capacity, E]: committed positions, then drafted nodes."""

    def __init__(self, weights: LayerWeights) -> None:
        num_heads = weights.project_PI.shape[0] // weights.head_dim - weights.num_query_heads
        self._rows = weights.project_PI.new_empty(num_heads, FEWEST_KEYS, weights.head_dim)

    def write(self, rows_QXE: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write keys and values from `start` on, and return all up to them, [1, G, K, E] each.

        rows_QXE: the keys of all heads, then their values, [Q, 2 G, E].
        """
        end = start + len(rows_QXE)
        if end > self._rows.shape[1]:
            larger = self._rows.new_empty(self._rows.shape[0], 2 * end, self._rows.shape[2])
            larger[:, :start] = self._rows[:, :start]
            self._rows = larger
        self._rows[:, start:end] = rows_QXE.transpose(0, 1)
        key_1GKE, value_1GKE = self._rows[None, :, :end].chunk(2, dim=1)
        return key_1GKE, value_1GKE


class DecodingWeights:
    """What `DraftDecoder` reads of a draft."""

    def __init__(self, draft: "ServedEagle3") -> None:
        model = draft.model
        config = model.config
        device = draft.embed_weight_VD.device
        self.eps = config.rms_norm_eps
        self.norm_output = config.norm_output
        self.layers = [LayerWeights.of(layer) for layer in model.decoder_layers]
        self.rotary = RotaryPositions(model, self.layers[0].head_dim, device)
        self.embed_weight_VD = draft.embed_weight_VD
        self.fc_DA = model.fc.weight
        self.fc_norms = [] if model.fc_norm is None else list(model.fc_norm.parameters())
        self.norm_D = model.norm.weight
        self.head_UD = model.lm_head.weight


class DraftDecoder:
    """Decoder of one prompt.

    num_committed: committed positions whose keys are held.
    """

    def __init__(self, weights: DecodingWeights) -> None:
        self.num_committed = 0
        self._weights = weights
        self._buffers = [KeyBuffer(layer) for layer in weights.layers]

    def commit(self, token_Q: Tensor, aux_QA: Tensor) -> Tensor:
        """Read committed tokens and the target's states before them; return the pre-norm outputs, [Q, D]."""
        count = len(token_Q)
        mask_QK = None
        if count > 1:
            seen = (count, self.num_committed + count)
            mask_QK = torch.ones(seen, dtype=torch.bool, device=token_Q.device).tril(self.num_committed)
        tables = self._weights.rotary.at(self.num_committed, count)
        output_QD = self._read(token_Q, self._fuse(aux_QA), self.num_committed, tables, mask_QK)
        self.num_committed += count
        return output_QD

    def draft(self, token_Q: Tensor, state_QD: Tensor, step: int, mask_QM: Tensor | None) -> Tensor:
        """Read the drafted nodes of one level, and return their pre-norm outputs, [Q, D].

        step: level of the nodes; 1 for those that follow the newest committed token.
        mask_QM: whether a row attends to each of the M nodes of this level and those before it, of
        which there are equally many per level; None = to all.
        """
        first = self.num_committed + len(token_Q) * (step - 1)
        mask_QK = None if mask_QM is None else F.pad(mask_QM, (self.num_committed, 0), value=True)
        tables = self._weights.rotary.at(self.num_committed - 1 + step, 1)
        return self._read(token_Q, state_QD, first, tables, mask_QK)

    def predict(self, output_QD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits over the draft vocabulary, [Q, U], and the states that the next level reads, [Q, D]."""
        weights = self._weights
        normed_QD = rms_norm(output_QD, weights.norm_D, weights.eps)
        logits_QU = F.linear(normed_QD, weights.head_UD)
        return logits_QU, normed_QD if weights.norm_output else output_QD

    def _fuse(self, aux_QA: Tensor) -> Tensor:
        """Compute `Eagle3Draft.fuse`."""
        weights = self._weights
        if weights.fc_norms:
            chunks = zip(aux_QA.chunk(len(weights.fc_norms), 1), weights.fc_norms, strict=True)
            aux_QA = torch.cat([rms_norm(chunk_QD, weight_D, weights.eps) for chunk_QD, weight_D in chunks], 1)
        return F.linear(aux_QA, weights.fc_DA)

    def _read(
        self, token_Q: Tensor, state_QD: Tensor, first: int, tables: tuple[Tensor, Tensor], mask_QK: Tensor | None
    ) -> Tensor:
        """Run all layers; the keys of the rows are written from `first` on."""
        embed_QD = F.embedding(token_Q, self._weights.embed_weight_VD)
        for layer, buffer in zip(self._weights.layers, self._buffers, strict=True):
            attended_QA = self._attend(layer, buffer, self._input(layer, embed_QD, state_QD), first, tables, mask_QK)
            state_QD = torch.addmm(state_QD, attended_QA, layer.attended_AD)
            gate_up_QF = F.linear(rms_norm(state_QD, layer.mlp_norm_D, self._weights.eps), layer.gate_up_FD)
            gate_QF, up_QF = gate_up_QF.chunk(2, dim=1)
            state_QD = torch.addmm(state_QD, F.silu(gate_QF) * up_QF, layer.down_FD)
        return state_QD

    def _input(self, layer: LayerWeights, embed_QD: Tensor, state_QD: Tensor) -> Tensor:
        eps = self._weights.eps
        hidden_QD = rms_norm(state_QD, layer.hidden_norm_D, eps)
        if layer.input_norm_D is None:
            return hidden_QD
        return torch.cat((rms_norm(embed_QD, layer.input_norm_D, eps), hidden_QD), 1)

    def _attend(
        self,
        layer: LayerWeights,
        buffer: KeyBuffer,
        x_QI: Tensor,
        first: int,
        tables: tuple[Tensor, Tensor],
        mask_QK: Tensor | None,
    ) -> Tensor:
        cos_N1E, sin_N1E = tables
        heads_QPE = F.linear(x_QI, layer.project_PI).unflatten(1, (-1, layer.head_dim))
        num_queries = layer.num_query_heads
        num_keys = (heads_QPE.shape[1] - num_queries) // 2
        turned_QRE = heads_QPE[:, : num_queries + num_keys]  # the values stay as they are
        swapped_QRE = turned_QRE.index_select(2, self._weights.rotary.swap_E)
        rotated_QRE = torch.addcmul(turned_QRE * cos_N1E, swapped_QRE, sin_N1E).to(x_QI.dtype)
        keys_values_QXE = torch.cat((rotated_QRE[:, num_queries:], heads_QPE[:, num_queries + num_keys :]), 1)
        key_1GKE, value_1GKE = buffer.write(keys_values_QXE, first)
        query_1HQE = rotated_QRE[None, :, :num_queries].transpose(1, 2)
        is_grouped = num_queries != key_1GKE.shape[1]
        attended_1HQE = F.scaled_dot_product_attention(
            query_1HQE, key_1GKE, value_1GKE, attn_mask=mask_QK, enable_gqa=is_grouped
        )
        return attended_1HQE[0].transpose(0, 1).flatten(1)
