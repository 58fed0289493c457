"""The EAGLE-3 draft: parameter names and shapes are those of SGLang's `LlamaForCausalLMEagle3`."""

import copy
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.kernels import AttentionRows, ancestor_attention
from engine.kernels.matmul import Linear
from engine.kernels.rows import take_rows
from engine.models.draft_config import DraftConfig
from engine.models.vocab_map import VocabMap


@dataclass
class LayerKeys:
    """Keys and values of one layer that rows attend to: a packed prefix and, per row, its own ancestors.

    query_index_Q: int64 [Q], the position of the prefix a row stands at. cu_seqlens: int [num_documents + 1].
    ancestors: for each of the extra keys, the row of it that is a row's own, int64 [Q].
    """

    query_index_Q: torch.Tensor
    cu_seqlens: torch.Tensor
    key_TGE: torch.Tensor | None = None
    value_TGE: torch.Tensor | None = None
    extra_keys: list[torch.Tensor] = field(default_factory=list)
    extra_values: list[torch.Tensor] = field(default_factory=list)
    ancestors: tuple[torch.Tensor, ...] = ()

    def keep(self, index_Q: torch.Tensor) -> None:
        """Go on with these rows alone; index_Q: int64, ascending. Keys stay where they are."""
        self.query_index_Q = self.query_index_Q[index_Q]
        self.ancestors = tuple(ancestor_Q[index_Q] for ancestor_Q in self.ancestors)

    def attend(self, query_QHE: torch.Tensor, key_QGE: torch.Tensor, value_QGE: torch.Tensor) -> torch.Tensor:
        """Add this step's keys (the prefix at step 0, an ancestor of each row later) and attend: [Q, H, E]."""
        if self.key_TGE is None:
            self.key_TGE, self.value_TGE = key_QGE, value_QGE
        else:
            self.extra_keys.append(key_QGE)
            self.extra_values.append(value_QGE)
            self.ancestors += (torch.arange(key_QGE.shape[0], device=key_QGE.device),)
        rows = AttentionRows(self.query_index_Q, self.cu_seqlens, self.ancestors)
        return ancestor_attention(query_QHE, self.key_TGE, self.value_TGE, self.extra_keys, self.extra_values, rows)[0]


class RotaryTable:
    """Rotary embeddings in fp32. Not a module: a cast of the draft to bf16 must not touch its frequencies."""

    def __init__(self, config: DraftConfig) -> None:
        llama = LlamaConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=dict(config.rope_parameters),
        )
        rotary = LlamaRotaryEmbedding(llama)
        self.inv_freq = rotary.inv_freq.float()
        self.attention_scaling = rotary.attention_scaling

    def cos_sin(self, position_Q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 [Q, 1, E] each, for positions int64 [Q]."""
        self.inv_freq = self.inv_freq.to(position_Q.device)
        angle_QE = torch.outer(position_Q.float(), self.inv_freq).repeat(1, 2)[:, None]
        return angle_QE.cos() * self.attention_scaling, angle_QE.sin() * self.attention_scaling


def apply_rotary(x_QHE: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = cos_sin
    first, second = x_QHE.float().chunk(2, -1)
    return (x_QHE.float() * cos + torch.cat((-second, first), -1) * sin).to(x_QHE.dtype)


class Eagle3Attention(nn.Module):
    def __init__(self, config: DraftConfig, input_size: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(input_size, config.num_attention_heads * config.head_dim)
        self.k_proj = Linear(input_size, config.num_key_value_heads * config.head_dim)
        self.v_proj = Linear(input_size, config.num_key_value_heads * config.head_dim)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)

    def forward(self, x_QD, cos_sin: tuple[torch.Tensor, torch.Tensor], keys: LayerKeys, rows_R=None) -> torch.Tensor:
        """rows_R: int64, the rows that ask, of those that give keys; None = all."""
        key_QGE = apply_rotary(self.k_proj(x_QD).unflatten(-1, (-1, self.head_dim)), cos_sin)
        value_QGE = self.v_proj(x_QD).unflatten(-1, (-1, self.head_dim))
        if rows_R is not None:
            x_QD, cos_sin = take_rows(x_QD, rows_R), tuple(table[rows_R] for table in cos_sin)
        query_QHE = apply_rotary(self.q_proj(x_QD).unflatten(-1, (-1, self.head_dim)), cos_sin)
        return self.o_proj(keys.attend(query_QHE, key_QGE, value_QGE).flatten(-2))


class Eagle3Mlp(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_QD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x_QD)) * self.up_proj(x_QD))


class Eagle3Layer(nn.Module):
    """One decoder layer. The first reads the token embedding beside the state; later ones the state alone."""

    def __init__(self, config: DraftConfig, reads_embedding: bool) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(size, eps) if reads_embedding else None
        self.hidden_norm = nn.RMSNorm(size, eps)
        self.self_attn = Eagle3Attention(config, 2 * size if reads_embedding else size)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        self.mlp = Eagle3Mlp(config)

    def forward(self, embed_QD, state_QD, cos_sin, keys: LayerKeys, rows_R=None) -> torch.Tensor:
        x_QD = self.hidden_norm(state_QD)
        if self.input_layernorm is not None:
            x_QD = torch.cat((self.input_layernorm(embed_QD), x_QD), -1)
        state_QD = state_QD if rows_R is None else take_rows(state_QD, rows_R)
        state_QD = state_QD + self.self_attn(x_QD, cos_sin, keys, rows_R)
        return state_QD + self.mlp(self.post_attention_layernorm(state_QD))


class Eagle3Draft(nn.Module):
    """The trained model. The token embedding is the target's and stays outside: callers hand in looked-up rows.

    Attributes named as in the checkpoint: `fc`, `fc_norm` (EAGLE-3.1), `midlayer` or `layers`, `norm`, `lm_head`.
    `embed_projection` exists where the draft is narrower or wider than its target; export folds it into `embed_tokens`.
    """

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        target_size, size = config.target_hidden_size, config.hidden_size
        self.rotary = RotaryTable(config)
        self.embed_projection = Linear(target_size, size) if target_size != size else None
        self.fc_norm = nn.ModuleList(nn.RMSNorm(target_size, config.rms_norm_eps) for _ in range(3)) if config.fc_norm else None
        self.fc = Linear(3 * target_size, size)
        if config.num_hidden_layers == 1:
            self.midlayer = Eagle3Layer(config, reads_embedding=True)
        else:
            self.layers = nn.ModuleList(Eagle3Layer(config, reads_embedding=i == 0) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.lm_head = Linear(size, config.draft_vocab_size)

    @property
    def decoder_layers(self) -> list[Eagle3Layer]:
        return [self.midlayer] if self.config.num_hidden_layers == 1 else list(self.layers)

    def fuse(self, aux_TA: torch.Tensor) -> torch.Tensor:
        """Auxiliary hidden states [T, 3D of the target] -> first state [T, D]."""
        if self.fc_norm is not None:
            chunks = zip(self.fc_norm, aux_TA.chunk(3, -1), strict=True)
            aux_TA = torch.cat([norm(chunk) for norm, chunk in chunks], -1)
        return self.fc(aux_TA)

    def embed(self, target_embed_TD: torch.Tensor) -> torch.Tensor:
        """Rows of the target's embedding, projected to the draft's width where it differs."""
        return target_embed_TD if self.embed_projection is None else self.embed_projection(target_embed_TD)

    def step(self, embed_QD, state_QD, position_Q: torch.Tensor, keys: list[LayerKeys], rows_R=None) -> torch.Tensor:
        """One TTT or drafting step of rows: token embeddings and states [Q, D] -> pre-norm outputs [Q, D].

        position_Q: int64 [Q] rotary positions; keys: one `LayerKeys` a layer, extended by this step. rows_R: int64 [R],
        ascending; then all rows give keys, but only these have an output, [R, D].
        """
        cos_sin = self.rotary.cos_sin(position_Q)
        *below, last = zip(self.decoder_layers, keys, strict=True)
        for layer, layer_keys in below:
            state_QD = layer(embed_QD, state_QD, cos_sin, layer_keys)
        layer, layer_keys = last
        return layer(embed_QD, state_QD, cos_sin, layer_keys, rows_R)

    def next_state(self, output_QD: torch.Tensor) -> torch.Tensor:
        """The state that the next step reads: the pre-norm output, or the normed one in EAGLE-3.1."""
        return self.norm(output_QD) if self.config.norm_output else output_QD

    def logits(self, output_QD: torch.Tensor) -> torch.Tensor:
        """Logits [Q, U] over the draft vocabulary from pre-norm outputs."""
        return self.lm_head(self.norm(output_QD))


@dataclass(frozen=True)
class ServedDraft:
    """A draft ready to propose tokens: weights, vocabulary map and the embedding table in its own width.

    embed_weight_VD: [V, D]; the target's own table where the widths agree.
    """

    model: Eagle3Draft
    vocab_map: VocabMap
    embed_weight_VD: torch.Tensor

    def to(self, dtype: torch.dtype) -> "ServedDraft":
        """A copy that computes in `dtype`."""
        return ServedDraft(copy.deepcopy(self.model).to(dtype), self.vocab_map, self.embed_weight_VD.to(dtype))

    def embed(self, token_ids_Q: torch.Tensor) -> torch.Tensor:
        """Target token ids int64 [Q] -> [Q, D]."""
        return nn.functional.embedding(token_ids_Q, self.embed_weight_VD)

    @torch.no_grad()
    def propose_id(self, output_QD: torch.Tensor) -> torch.Tensor:
        """Most likely target token id, int64 [Q], from pre-norm outputs."""
        return self.vocab_map.target_ids_U[self.model.logits(output_QD).argmax(-1)]
