"""The step of block drafters (DFlash, DSpark) on which trainers are compared.

Each process creates the same weights, the same batch and the same anchors from a seed. The batch is
one document of assistant tokens, and every label lies within it. Trainers that differ in which rows
they learn at the end of a document, at gaps of the mask or across documents then learn the same rows.

Both sides learn the objective of the peer, with its default weights:

| peer | DFlash | DSpark | divided by |
|---|---|---|---|
| SpecForge | cross-entropy with the data's token | 0.1 of it + 0.9 of the L1 distance | sum of the weights |
| speculators | cross-entropy with the target's most likely token | 0.1 of it + 0.9 of the total variation | number of rows |

DSpark's confidence head adds a cross-entropy with weight 1.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

DFLASH, DSPARK = "dflash", "dspark"
METHODS = (DFLASH, DSPARK)
SPECFORGE, SPECULATORS = "specforge", "speculators"
ROPE_THETA = 10000.0
NORM_EPS = 1e-6


@dataclass(frozen=True)
class BlockTask:
    """One training step of a block drafter on one document, with the target's head if the objective needs it.

    method: DFLASH or DSPARK. peer: SPECFORGE or SPECULATORS, whose objective both sides learn.
    hidden_size to num_tokens: sizes; the draft is as wide as its target and shares its vocabulary.
    num_aux: auxiliary layers K. markov_rank: of DSpark's head.
    anchors: blocks N. block_size: rows B of each.
    decay: prediction `i` of a block has the weight exp(-i / decay).
    device, dtype: names in torch.
    """

    method: str
    peer: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    num_layers: int
    num_aux: int
    vocab_size: int
    num_tokens: int
    markov_rank: int
    anchors: int
    block_size: int
    decay: float
    device: str
    dtype: str

    @classmethod
    def from_json(cls, text: str) -> "BlockTask":
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def mask_token_id(self) -> int:
        return self.vocab_size - 1

    @property
    def num_predictions(self) -> int:
        """Tokens that a block drafts. The first row of a DFlash block drafts none."""
        return self.block_size if self.method == DSPARK else self.block_size - 1

    @property
    def has_confidence(self) -> bool:
        return self.method == DSPARK

    def config(self) -> dict:
        """Return the options of Transformers' `Qwen3Config`, on which the peers' drafts are built."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 2 * self.num_tokens,
            "rms_norm_eps": NORM_EPS,
            "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
            "attention_bias": False,
            "use_sliding_window": False,
        }

    def tensors(self) -> "BlockTaskTensors":
        torch.set_default_device(self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        dtype = getattr(torch, self.dtype)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype).mul_(scale)

        size = self.hidden_size
        # An anchor needs a context, and the last label of its block is at `anchor + block_size` at most.
        possible = self.num_tokens - 1 - self.block_size
        anchor_N = 1 + torch.randperm(possible, generator=generator)[: self.anchors].sort().values
        tensors = BlockTaskTensors(
            # The mask token never occurs in a text.
            input_ids_T=torch.randint(self.mask_token_id, (self.num_tokens,), generator=generator),
            anchor_N=anchor_N,
            aux_TA=draw(self.num_tokens, self.num_aux * size),
            last_hidden_TD=draw(self.num_tokens, size),
            head_VD=draw(self.vocab_size, size, scale=4.5 * size**-0.5),
            embed_VD=draw(self.vocab_size, size, scale=0.5),
            weights=self._weights(draw),
        )
        torch.set_default_device(None)
        return tensors

    def _weights(self, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
        size = self.hidden_size
        queries = self.num_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        shapes = {"fc": (size, self.num_aux * size)}
        norms = {"hidden_norm": size, "norm": size}
        for index in range(self.num_layers):
            layer = f"layers.{index}"
            attention = f"{layer}.self_attn"
            mlp = f"{layer}.mlp"
            shapes |= {f"{attention}.q_proj": (queries, size), f"{attention}.o_proj": (size, queries)}
            shapes |= {f"{attention}.k_proj": (keys, size), f"{attention}.v_proj": (keys, size)}
            shapes |= {f"{mlp}.{name}_proj": (self.intermediate_size, size) for name in ("gate", "up")}
            shapes |= {f"{mlp}.down_proj": (size, self.intermediate_size)}
            norms |= {f"{attention}.q_norm": self.head_dim, f"{attention}.k_norm": self.head_dim}
            norms |= {f"{layer}.input_layernorm": size, f"{layer}.post_attention_layernorm": size}
        if self.method == DSPARK:
            rank = self.markov_rank
            shapes |= {"markov_head.markov_w1": (self.vocab_size, rank), "markov_head.markov_w2": (self.vocab_size, rank)}
            shapes |= {"confidence_head.proj": (1, size + rank)}
        weights = {f"{name}.weight": draw(*shape, scale=shape[1] ** -0.5) for name, shape in shapes.items()}
        weights |= {f"{name}.weight": 1 + draw(width, scale=0.1) for name, width in norms.items()}
        if self.has_confidence:
            weights["confidence_head.proj.bias"] = draw(1, scale=0.1)
        return weights


@dataclass(frozen=True)
class BlockTaskTensors:
    """Tensors of a task.

    input_ids_T: token ids, not shifted. anchor_N: int64, positions of the anchors, ascending.
    last_hidden_TD: the target's states after its last norm.
    head_VD, embed_VD: weights of the target's head and embedding.
    weights: the draft's weights by name; the names are those of the checkpoint, on all sides.
    """

    input_ids_T: Tensor
    anchor_N: Tensor
    aux_TA: Tensor
    last_hidden_TD: Tensor
    head_VD: Tensor
    embed_VD: Tensor
    weights: dict[str, Tensor]
