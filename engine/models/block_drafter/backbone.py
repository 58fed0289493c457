"""The network that block drafters share. Names and shapes match SGLang's and vLLM's `DFlashDraftModel`.

Context vectors `c[t] = norm(fc(aux[t]))` are computed once per packed token. In every layer, the
rows of all blocks attend to keys and values of the context, made by the same projections as their
own, and to the rows of their block.

Shapes: T packed tokens, C context tokens that are kept, N blocks, P rows of all blocks, Q rows that
have a query, R rows with loss; D hidden size, H query heads, G key/value heads, E head dim.
Source: DFlash (arXiv:2602.06036).
"""

from dataclasses import dataclass, replace
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from engine.kernels import PLAIN, BlockRows, Kernels
from engine.kernels.elementwise import CosSin, rms_norm, rotate, swiglu
from engine.kernels.lean_layers import lean_rms_norm, swiglu_down
from engine.kernels.matmul import Linear, linear
from engine.kernels.recompute import recomputed_if
from engine.kernels.row_index import take_rows
from engine.models.block_drafter.block_config import BlockConfig
from engine.models.block_drafter.block_rows import BlockPlan
from engine.models.draft_layers import RmsNorm, RotaryTable
from engine.models.draft_method import DraftModel

ConfigT = TypeVar("ConfigT", bound=BlockConfig)
INITIAL_STD = 0.02


class BiasedLinear(nn.Linear):
    """Linear layer for two-dimensional inputs, with or without a bias."""

    def forward(self, x_QK: Tensor) -> Tensor:
        out_QN = linear(x_QK, self.weight)
        return out_QN if self.bias is None else out_QN + self.bias


class BlockNorm(RmsNorm):
    """RMSNorm that keeps only its input for the backward pass, unless a GPU kernel replaces it."""

    def forward(self, x_QD: Tensor) -> Tensor:
        if self.kernels.elementwise.rms_norm is rms_norm:
            return lean_rms_norm(x_QD, self.weight, self.eps)
        return super().forward(x_QD)


class DownProjection(Linear):
    """The down projection of a SwiGLU MLP, which takes what `gate_proj` and `up_proj` return.

    ZeRO-3 gathers a weight while the module that owns it runs, so SwiGLU runs in here.
    """

    def __init__(self, in_features: int, out_features: int, kernels: Kernels) -> None:
        super().__init__(in_features, out_features)
        self.kernels = kernels

    def forward(self, gate_QF: Tensor, up_QF: Tensor) -> Tensor:  # type: ignore[override]
        own = self.kernels.elementwise.swiglu
        if own is swiglu:
            return swiglu_down(gate_QF, up_QF, self.weight)
        return super().forward(own(gate_QF, up_QF))


class BlockMlp(nn.Module):
    """MLP with SwiGLU, of rows [Q, D], that keeps the outputs of `gate_proj` and `up_proj` only."""

    def __init__(self, size: int, width: int, kernels: Kernels) -> None:
        """Create it. size: features D. width: inner features F."""
        super().__init__()
        self.gate_proj = Linear(size, width)
        self.up_proj = Linear(size, width)
        self.down_proj = DownProjection(width, size, kernels)

    def forward(self, x_QD: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x_QD), self.up_proj(x_QD))


class BlockRotary:
    """Rotary embeddings in fp32, or in float64 for states in float64."""

    def __init__(self, config: BlockConfig) -> None:
        self._table = RotaryTable(config)
        self._theta = config.rope_parameters["rope_theta"]
        self._is_plain = config.rope_parameters["rope_type"] == "default"
        self._head_dim = config.head_dim

    def cos_sin(self, position_Q: Tensor, dtype: torch.dtype) -> CosSin:
        """Return cosine and sine, [Q, 1, E] each, for positions int64 [Q] of states in `dtype`."""
        if dtype != torch.float64 or not self._is_plain:
            return self._table.cos_sin(position_Q)
        exponent_E = torch.arange(0, self._head_dim, 2, dtype=dtype, device=position_Q.device) / self._head_dim
        angle_QE = torch.outer(position_Q.to(dtype), self._theta**-exponent_E).repeat(1, 2)[:, None]
        return angle_QE.cos(), angle_QE.sin()


class BlockAttention(nn.Module):
    """Attention of the rows of blocks to the context and to their block."""

    def __init__(self, config: BlockConfig, kernels: Kernels) -> None:
        super().__init__()
        size = config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.kernels = kernels
        self.q_proj = BiasedLinear(size, queries, config.attention_bias)
        self.k_proj = BiasedLinear(size, keys, config.attention_bias)
        self.v_proj = BiasedLinear(size, keys, config.attention_bias)
        self.o_proj = BiasedLinear(queries, size, config.attention_bias)
        self.q_norm = BlockNorm(config.head_dim, config.rms_norm_eps, kernels)
        self.k_norm = BlockNorm(config.head_dim, config.rms_norm_eps, kernels)

    def keys_and_values(self, x_QD: Tensor) -> tuple[Tensor, Tensor]:
        """Return normed keys without rotary embedding, and values, [Q, G, E] each."""
        key_QGE = self.k_norm(self._heads(self.k_proj(x_QD)))
        return key_QGE, self._heads(self.v_proj(x_QD))

    def queries(self, x_QD: Tensor) -> Tensor:
        """Return normed queries without rotary embedding, [Q, H, E]."""
        return self.q_norm(self._heads(self.q_proj(x_QD)))

    def _heads(self, x_QD: Tensor) -> Tensor:
        return x_QD.unflatten(-1, (-1, self.head_dim))


class BlockLayer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: BlockConfig, kernels: Kernels) -> None:
        super().__init__()
        size = config.hidden_size
        eps = config.rms_norm_eps
        self.kernels = kernels
        self.input_layernorm = BlockNorm(size, eps, kernels)
        self.self_attn = BlockAttention(config, kernels)
        self.post_attention_layernorm = BlockNorm(size, eps, kernels)
        self.mlp = BlockMlp(size, config.intermediate_size, kernels)

    def attend(self, query_QHE: Tensor, context: "ContextKeys", own: tuple[Tensor, Tensor], rows: BlockRows) -> Tensor:
        """Return the attention output of rows, [Q, D]."""
        attention = self.self_attn
        output_QHE = self.kernels.anchored_attention(query_QHE, context.key_CGE, context.value_CGE, *own, rows)
        return attention.o_proj(output_QHE.flatten(-2))

    def apply_mlp(self, state_QD: Tensor) -> Tensor:
        """Return the MLP's output of rows, [Q, D], without the residual."""
        return self.mlp(self.post_attention_layernorm(state_QD))


@dataclass(frozen=True)
class ContextKeys:
    """Keys and values of one layer's context, [C, G, E]; keys have rotary embedding."""

    key_CGE: Tensor
    value_CGE: Tensor


class BlockDraft(DraftModel[ConfigT], Generic[ConfigT]):
    """The backbone of block drafters; it shares the target's embedding and head.

    Attributes are named as in the checkpoint: `fc`, `hidden_norm`, `layers`, `norm`.
    mask_embed_D: the target's embedding of the mask token; frozen, and not part of the checkpoint.
    """

    mask_embed_D: Tensor

    def __init__(self, config: ConfigT, kernels: Kernels = PLAIN) -> None:
        super().__init__(config, kernels)
        size = config.hidden_size
        self.rotary = BlockRotary(config)
        self.fc = Linear(len(config.aux_layers) * size, size)
        self.hidden_norm = BlockNorm(size, config.rms_norm_eps, kernels)
        self.layers = nn.ModuleList(self.make_layer() for _ in range(config.num_hidden_layers))
        self.norm = BlockNorm(size, config.rms_norm_eps, kernels)
        self.register_buffer("mask_embed_D", torch.zeros(size), persistent=False)

    @property
    def decoder_layers(self) -> list[BlockLayer]:
        """The decoder layers, in order."""
        return cast(list[BlockLayer], list(self.layers))

    def make_layer(self) -> BlockLayer:
        """Return a new layer."""
        return BlockLayer(self.config, self.kernels)

    def draw_weights(self) -> None:
        """Draw the weights of all linear maps from a normal distribution, as the methods' own trainers do."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INITIAL_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def adjusted_logits(self, logits_NSV: Tensor, hidden_NSD: Tensor, previous_NS: Tensor) -> Tensor:
        """Return the logits of blocks after the method's own heads have changed them, [N, S, V].

        previous_NS: int64, the token before each prediction.
        """
        return logits_NSV

    def context(self, aux_TA: Tensor) -> Tensor:
        """Compute the context vectors of tokens, [T, D], from auxiliary hidden states, [T, K * D]."""
        return self.hidden_norm(self.fc(aux_TA))

    def context_keys(self, layer: BlockLayer, context_CD: Tensor, cos_sin: CosSin) -> ContextKeys:
        """Compute a layer's keys and values of context tokens."""
        key_CGE, value_CGE = layer.self_attn.keys_and_values(context_CD)
        return ContextKeys(rotate(key_CGE, cos_sin), value_CGE)

    def hidden_rows(self, aux_TA: Tensor, anchor_embed_ND: Tensor, plan: BlockPlan) -> Tensor:
        """Compute the final states of the rows with loss, [R, D], after the last norm.

        aux_TA: auxiliary hidden states of all packed tokens, [T, K * D].
        anchor_embed_ND: the target's embeddings of the anchors' tokens.
        """
        context_CD = self.context(aux_TA if plan.context_C is None else aux_TA[plan.context_C])
        dtype = context_CD.dtype
        context_cos_sin = self.rotary.cos_sin(plan.context_position_C, dtype)
        cos_sin = self.rotary.cos_sin(plan.position_P, dtype)
        run = recomputed_if(self.kernels.recompute == "layer")
        angles = (context_cos_sin, cos_sin)
        last = len(self.layers) - 1
        kept_Q = self.last_layer_rows(plan)
        state_PD = anchor_embed_ND
        for index, layer in enumerate(self.decoder_layers):
            kept = kept_Q if index == last else None
            state_PD = run(self._layer, layer, index, state_PD, context_CD, angles, plan, kept)
        if len(kept_Q) > len(plan.loss_row_R):
            state_PD = take_rows(state_PD, torch.searchsorted(kept_Q, plan.loss_row_R))
        return self.norm(state_PD)

    def last_layer_rows(self, plan: BlockPlan) -> Tensor:
        """Return the rows that need an output of the last layer, int64, ascending. All rows with loss are among them."""
        return plan.loss_row_R

    def _layer(
        self,
        layer: BlockLayer,
        index: int,
        state_PD: Tensor,
        context_CD: Tensor,
        angles: tuple[CosSin, CosSin],
        plan: BlockPlan,
        kept_Q: Tensor | None,
    ) -> Tensor:
        """Return the states after a layer.

        state_PD: before the layer; for the first one, the embeddings of the anchors' tokens, [N, D].
        kept_Q: int64, ascending, the rows that have an output; None = all. All rows have keys.
        """
        context_cos_sin, cos_sin = angles
        context = self.context_keys(layer, context_CD, context_cos_sin)
        if kept_Q is not None and len(kept_Q) == plan.num_rows:
            kept_Q = None
        inputs = self.first_inputs(layer, state_PD, plan) if index == 0 else self.inputs(layer, state_PD, plan, kept_Q)
        rows = plan.layers[index]
        query_cos_sin = cos_sin
        offset_Q = plan.offset_P
        if kept_Q is not None:
            if index == 0:
                inputs = inputs.of_rows(kept_Q)
            rows = rows.picked(kept_Q)
            query_cos_sin = (cos_sin[0][kept_Q], cos_sin[1][kept_Q])
            offset_Q = offset_Q[kept_Q]
        query_QHE = rotate(inputs.query_QHE, query_cos_sin)
        own = rotate(inputs.key_PGE, cos_sin), inputs.value_PGE
        attended_QD = layer.attend(query_QHE, context, own, rows)
        state_QD = inputs.state_QD + self.after_attention(layer, inputs, attended_QD, offset_Q)
        run = recomputed_if(self.kernels.recompute == "mlp")
        return state_QD + run(self.mlp_output, layer, state_QD, offset_Q)

    def first_inputs(self, layer: BlockLayer, anchor_embed_ND: Tensor, plan: BlockPlan) -> "LayerInputs":
        """Project the rows of the first layer. All mask rows have one input, so it is projected once."""
        distinct_MD = torch.cat((anchor_embed_ND, self.mask_embed_D.to(anchor_embed_ND.dtype)[None]))
        y_MD = layer.input_layernorm(distinct_MD)
        projected = (distinct_MD, layer.self_attn.queries(y_MD), *layer.self_attn.keys_and_values(y_MD))
        return LayerInputs(*(spread(x_M, plan) for x_M in projected))

    def inputs(self, layer: BlockLayer, state_PD: Tensor, plan: BlockPlan, kept_Q: Tensor | None = None) -> "LayerInputs":
        """Project the rows of a layer. kept_Q: int64, ascending, the rows that have a query; None = all."""
        y_PD = layer.input_layernorm(state_PD)
        mixed_PD, kernel = self.before_attention(layer, y_PD, plan)
        key_PGE, value_PGE = layer.self_attn.keys_and_values(mixed_PD)
        if kept_Q is None:
            return LayerInputs(state_PD, layer.self_attn.queries(mixed_PD), key_PGE, value_PGE, kernel)
        query_QHE = layer.self_attn.queries(take_rows(mixed_PD, kept_Q))
        kept_kernel = None if kernel is None else take_rows(kernel, kept_Q)
        return LayerInputs(take_rows(state_PD, kept_Q), query_QHE, key_PGE, value_PGE, kept_kernel)

    def before_attention(self, layer: BlockLayer, y_PD: Tensor, plan: BlockPlan) -> tuple[Tensor, Tensor | None]:
        """Return the input of attention, [P, D], and what `after_attention` needs of each row. A method may mix rows here."""
        return y_PD, None

    def after_attention(self, layer: BlockLayer, inputs: "LayerInputs", attended_QD: Tensor, offset_Q: Tensor) -> Tensor:
        """Return what attention adds to the states, [Q, D]. offset_Q: int64, index of each row in its block."""
        return attended_QD

    def mlp_output(self, layer: BlockLayer, state_QD: Tensor, offset_Q: Tensor) -> Tensor:
        """Return what the MLP adds to the states, [Q, D]. offset_Q: int64, index of each row in its block."""
        return layer.apply_mlp(state_QD)


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of a layer's attention; keys and queries without rotary embedding.

    state_QD: states of the rows that have a query. kernel: what a method's `before_attention` returned for them.
    """

    state_QD: Tensor
    query_QHE: Tensor
    key_PGE: Tensor
    value_PGE: Tensor
    kernel: Tensor | None = None

    def of_rows(self, kept_Q: Tensor) -> "LayerInputs":
        """Return the inputs with the states, queries and kernels of some rows only."""
        kernel = None if self.kernel is None else take_rows(self.kernel, kept_Q)
        state_QD = take_rows(self.state_QD, kept_Q)
        return replace(self, state_QD=state_QD, query_QHE=take_rows(self.query_QHE, kept_Q), kernel=kernel)


def spread(x_M: Tensor, plan: BlockPlan) -> Tensor:
    """Return one row per row of the blocks, [P, ...], from one per anchor and one for all mask rows, [N + 1, ...]."""
    mask_P = x_M[-1:].expand(plan.num_rows, *x_M.shape[1:])
    return mask_P.index_copy(0, plan.first_row_N, x_M[:-1])
