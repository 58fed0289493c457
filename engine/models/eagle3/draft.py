"""The EAGLE-3 draft model. Parameter names and shapes match SGLang's `LlamaForCausalLMEagle3`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from engine.kernels import PLAIN, AttentionRows, Kernels
from engine.kernels.elementwise import CosSin, rotate
from engine.kernels.matmul import Linear
from engine.kernels.recompute import recomputed
from engine.kernels.row_index import take_rows
from engine.models.draft_layers import RmsNorm, RotaryTable, SwigluMlp
from engine.models.draft_method import DraftModel
from engine.models.eagle3.draft_config import Eagle3Config
from engine.models.eagle3.flops import NUM_AUX


@dataclass(frozen=True)
class LayerKeys:
    """Keys and values of one layer: a packed prefix and the ancestors of each row.

    position_Q: int64 [Q], position of each row in the prefix.
    cu_seqlens: int [num_documents + 1], starts of the documents, then the total.
    ancestors: for each tensor of extra keys, the index of each row's ancestor in it, int64 [Q].
    is_dense, is_tree, longest: as in `AttentionRows`.
    """

    position_Q: torch.Tensor
    cu_seqlens: torch.Tensor
    key_TGE: torch.Tensor | None = None
    value_TGE: torch.Tensor | None = None
    extra_keys: tuple[torch.Tensor, ...] = ()
    extra_values: tuple[torch.Tensor, ...] = ()
    ancestors: tuple[torch.Tensor, ...] = ()
    is_dense: bool = False
    is_tree: bool = False
    longest: int | None = None

    def kept(self, index_Q: torch.Tensor, is_dense: bool) -> "LayerKeys":
        """Return the keys for a subset of the rows. The key tensors stay unchanged.

        index_Q: int64, ascending. is_dense: of the remaining rows.
        """
        ancestors = tuple(ancestor_Q[index_Q] for ancestor_Q in self.ancestors)
        return replace(self, position_Q=self.position_Q[index_Q], ancestors=ancestors, is_dense=is_dense)

    def extended(self, key_QGE: torch.Tensor, value_QGE: torch.Tensor) -> "LayerKeys":
        """Return the keys and values together with those of this step.

        They form the prefix at step 0, and an ancestor of each row at later steps.
        """
        if self.key_TGE is None:
            return replace(self, key_TGE=key_QGE, value_TGE=value_QGE)
        own_Q = torch.arange(key_QGE.shape[0], device=key_QGE.device)
        extras = (*self.extra_keys, key_QGE), (*self.extra_values, value_QGE)
        return replace(self, extra_keys=extras[0], extra_values=extras[1], ancestors=(*self.ancestors, own_Q))


class Eagle3Attention(nn.Module):
    def __init__(self, config: Eagle3Config, input_size: int, kernels: Kernels) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.kernels = kernels
        self.q_proj = Linear(input_size, config.num_attention_heads * config.head_dim)
        self.k_proj = Linear(input_size, config.num_key_value_heads * config.head_dim)
        self.v_proj = Linear(input_size, config.num_key_value_heads * config.head_dim)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)

    def forward(self, x_QD, cos_sin: CosSin, keys: LayerKeys, rows_R=None) -> tuple[torch.Tensor, LayerKeys]:
        """Compute the attention output, and the keys extended by those of the rows.

        rows_R: int64, indices of the rows that have a query; None = all. Every row provides a key.
        """
        key_QGE, value_QGE = (proj(x_QD).unflatten(-1, (-1, self.head_dim)) for proj in (self.k_proj, self.v_proj))
        if rows_R is None:
            query_QHE = self.q_proj(x_QD).unflatten(-1, (-1, self.head_dim))
            query_QHE, key_QGE = self.kernels.elementwise.rotate_both(query_QHE, key_QGE, cos_sin)
        else:
            query_QHE = self.q_proj(take_rows(x_QD, rows_R)).unflatten(-1, (-1, self.head_dim))
            cos_QE, sin_QE = cos_sin
            query_QHE = rotate(query_QHE, (cos_QE[rows_R], sin_QE[rows_R]))
            key_QGE = rotate(key_QGE, cos_sin)
        keys = keys.extended(key_QGE, value_QGE)
        rows = AttentionRows(
            keys.position_Q,
            keys.cu_seqlens,
            keys.ancestors,
            is_tree=keys.is_tree,
            is_dense=keys.is_dense,
            longest=keys.longest,
        )
        seen = keys.key_TGE, keys.value_TGE, keys.extra_keys, keys.extra_values
        output_QHE, _ = self.kernels.attention(query_QHE, *seen, rows)
        return self.o_proj(output_QHE.flatten(-2)), keys


class Eagle3Layer(nn.Module):
    """One decoder layer. The first one reads the token embedding as well as the state."""

    def __init__(self, config: Eagle3Config, reads_embedding: bool, kernels: Kernels) -> None:
        super().__init__()
        size = config.hidden_size
        eps = config.rms_norm_eps
        self.kernels = kernels
        self.input_layernorm = RmsNorm(size, eps, kernels) if reads_embedding else None
        self.hidden_norm = RmsNorm(size, eps, kernels)
        self.self_attn = Eagle3Attention(config, 2 * size if reads_embedding else size, kernels)
        self.post_attention_layernorm = RmsNorm(size, eps, kernels)
        self.mlp = SwigluMlp(size, config.intermediate_size, kernels)

    def forward(self, embed_QD, state_QD, cos_sin: CosSin, keys: LayerKeys, rows_R=None) -> tuple[torch.Tensor, LayerKeys]:
        x_QD = self.hidden_norm(state_QD)
        if self.input_layernorm is not None:
            x_QD = torch.cat((self.input_layernorm(embed_QD), x_QD), -1)
        state_QD = state_QD if rows_R is None else take_rows(state_QD, rows_R)
        attended_QD, keys = self.self_attn(x_QD, cos_sin, keys, rows_R)
        state_QD = state_QD + attended_QD
        return state_QD + (recomputed(self._mlp, state_QD) if self.kernels.recompute == "mlp" else self._mlp(state_QD)), keys

    def _mlp(self, state_QD: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.post_attention_layernorm(state_QD))


class Eagle3Draft(DraftModel[Eagle3Config]):
    """The trained draft model. It uses the target's token embedding; callers pass rows of it.

    Attributes are named as in the checkpoint: `fc`, `fc_norm` (EAGLE-3.1), `midlayer` or `layers`,
    `norm`, `lm_head`. `embed_projection` exists if the draft's width differs from the target's;
    export folds it into `embed_tokens`.
    """

    def __init__(self, config: Eagle3Config, kernels: Kernels = PLAIN) -> None:
        super().__init__(config, kernels)
        target_size = config.target_hidden_size
        size = config.hidden_size
        self.rotary = RotaryTable(config)
        self.embed_projection = Linear(target_size, size) if target_size != size else None
        norms = (RmsNorm(target_size, config.rms_norm_eps, kernels) for _ in range(NUM_AUX))
        self.fc_norm = nn.ModuleList(norms) if config.fc_norm else None
        self.fc = Linear(NUM_AUX * target_size, size)
        if config.num_hidden_layers == 1:
            self.midlayer = Eagle3Layer(config, True, kernels)
        else:
            self.layers = nn.ModuleList(Eagle3Layer(config, i == 0, kernels) for i in range(config.num_hidden_layers))
        self.norm = RmsNorm(size, config.rms_norm_eps, kernels)
        self.lm_head = Linear(size, config.draft_vocab_size)

    @property
    def decoder_layers(self) -> list[Eagle3Layer]:
        """The decoder layers, in order."""
        if self.config.num_hidden_layers == 1:
            return [self.midlayer]
        return cast(list[Eagle3Layer], list(self.layers))

    def fuse(self, aux_TA: torch.Tensor) -> torch.Tensor:
        """Compute the first state [T, D] from auxiliary hidden states [T, 3 * target D]."""
        if self.fc_norm is not None:
            chunks = zip(self.fc_norm, aux_TA.chunk(NUM_AUX, -1), strict=True)
            aux_TA = torch.cat([norm(chunk) for norm, chunk in chunks], -1)
        return self.fc(aux_TA)

    def embed(self, target_embed_TD: torch.Tensor) -> torch.Tensor:
        """Project rows of the target's embedding to the draft's width if the widths differ."""
        return target_embed_TD if self.embed_projection is None else self.embed_projection(target_embed_TD)

    def step(
        self, embed_QD, state_QD, position_Q: torch.Tensor, keys: Sequence[LayerKeys], rows_R=None
    ) -> tuple[torch.Tensor, list[LayerKeys]]:
        """Run one TTT or drafting step: return the pre-norm outputs [Q, D] and the extended keys.

        embed_QD, state_QD: [Q, D], token embeddings and states of the rows.
        position_Q: int64 [Q], rotary positions.
        keys: one `LayerKeys` per layer.
        rows_R: int64 [R], ascending. If given, all rows still provide keys, but only these rows
            have an output, [R, D], and appear as rows in the last layer's keys.
        """
        cos_sin = self.rotary.cos_sin(position_Q)
        seen = []
        for layer, layer_keys in zip(self.decoder_layers, keys, strict=True):
            asking_R = rows_R if layer is self.decoder_layers[-1] else None
            state_QD, layer_keys = layer(embed_QD, state_QD, cos_sin, layer_keys, asking_R)
            seen.append(layer_keys)
        return state_QD, seen

    def next_state(self, output_QD: torch.Tensor) -> torch.Tensor:
        """The state that the next step reads: the pre-norm output, or the normed one in EAGLE-3.1."""
        return self.norm(output_QD) if self.config.norm_output else output_QD

    def logits(self, output_QD: torch.Tensor) -> torch.Tensor:
        """Compute logits [Q, U] over the draft vocabulary from pre-norm outputs [Q, D]."""
        return self.lm_head(self.norm(output_QD))
