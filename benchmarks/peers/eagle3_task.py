"""The EAGLE-3 step on which trainers are compared.

Each process creates the same weights and the same batch from a seed.

Trainers divide their losses differently. A side therefore multiplies its own loss by a constant, so
that every side returns the sum over the rows with loss divided by all positions, with the weight
0.8**i for TTT step i. The first S - 1 tokens carry no loss, so that every step has the same rows to
learn, and the constant is the same for all of them.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

STEPS = 7
STEP_DECAY = 0.8


@dataclass(frozen=True)
class Task:
    """One training step of a draft on one document, including the target head.

    hidden_size to num_tokens: sizes; the draft is as wide as its target.
    mask: share of assistant tokens, which are the last ones, without the first S - 1 tokens and the
        last one of the document.
    hits: "all" if the target's most likely token is always in the draft vocabulary, "random" if it
    is there as often as any other token.
    device, dtype: names in torch.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    draft_vocab_size: int
    vocab_size: int
    num_tokens: int
    mask: float
    hits: str
    device: str
    dtype: str

    @classmethod
    def from_json(cls, text: str) -> "Task":
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def config(self) -> dict:
        """Return the options of the draft's config.json."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "draft_vocab_size": self.draft_vocab_size,
            "max_position_embeddings": 2 * self.num_tokens,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "pad_token_id": 0,
        }

    def tensors(self) -> "TaskTensors":
        torch.set_default_device(self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        dtype = getattr(torch, self.dtype)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype).mul_(scale)

        size = self.hidden_size
        vocab = self.vocab_size
        in_draft_V = torch.zeros(vocab, dtype=torch.bool)
        in_draft_V[torch.randperm(vocab, generator=generator)[: self.draft_vocab_size]] = True
        head_VD = draw(vocab, size, scale=4.5 * size**-0.5)
        if self.hits == "all":  # Logits near zero are never the largest.
            head_VD[~in_draft_V] *= 0.05
        position_T = torch.arange(self.num_tokens)
        first = max(round(self.num_tokens * (1 - self.mask)), STEPS - 1)
        tensors = TaskTensors(
            input_ids_T=torch.randint(vocab, (self.num_tokens,), generator=generator),
            # No token follows a document's last token, so it cannot be trained on.
            mask_T=(position_T >= first) & (position_T < self.num_tokens - 1),
            aux_TA=draw(self.num_tokens, 3 * size),
            last_hidden_TD=draw(self.num_tokens, size),
            head_VD=head_VD,
            embed_VD=draw(vocab, size, scale=0.5),
            in_draft_V=in_draft_V,
            weights=self._weights(draw),
        )
        torch.set_default_device(None)
        return tensors

    def _weights(self, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
        size = self.hidden_size
        mlp_width = self.intermediate_size
        heads = self.num_heads * self.head_dim
        groups = self.num_key_value_heads * self.head_dim
        shapes = {"fc": (size, 3 * size), "lm_head": (self.draft_vocab_size, size)}
        widths = {"q": heads, "k": groups, "v": groups}
        shapes |= {f"midlayer.self_attn.{name}_proj": (width, 2 * size) for name, width in widths.items()}
        shapes |= {"midlayer.self_attn.o_proj": (size, heads), "midlayer.mlp.gate_proj": (mlp_width, size)}
        shapes |= {"midlayer.mlp.up_proj": (mlp_width, size), "midlayer.mlp.down_proj": (size, mlp_width)}
        weights = {f"{name}.weight": draw(*shape, scale=shape[1] ** -0.5) for name, shape in shapes.items()}
        norms = ("norm", *(f"midlayer.{name}" for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")))
        return weights | {f"{name}.weight": 1 + draw(size, scale=0.1) for name in norms}


@dataclass(frozen=True)
class TaskTensors:
    """Tensors of a task.

    input_ids_T, mask_T: token ids and assistant mask, not shifted.
    head_VD, embed_VD: weights of the target's head and embedding.
    weights: the draft's weights by name.
    """

    input_ids_T: Tensor
    mask_T: Tensor
    aux_TA: Tensor
    last_hidden_TD: Tensor
    head_VD: Tensor
    embed_VD: Tensor
    in_draft_V: Tensor
    weights: dict[str, Tensor]

    def state_of(self, model: torch.nn.Module, common_name: Callable[[str], str]) -> dict[str, Tensor]:
        """Return the draft's weights under a peer's names.

        common_name: returns DraftSpeed's name of a weight of the peer's model.
        """
        names = {name: common_name(name) for name in model.state_dict()}
        return {name: self.weights[common] for name, common in names.items() if common in self.weights}


def weighted(loss_S: Tensor) -> Tensor:
    """Return the sum of the losses of the TTT steps, each with its weight."""
    weights_S = STEP_DECAY ** torch.arange(len(loss_S), device=loss_S.device)
    return (weights_S * loss_S).sum()
