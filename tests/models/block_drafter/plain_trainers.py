"""Objectives of the public trainers of block drafters, written from their rules alone, block by block in float64.

Nothing here is shared with the engine: which blocks start where, what a row sees, what it learns, and what
losses are divided by follow from the rules of each trainer. Every position that may start a block does.

Shapes: T packed tokens, B rows of a block, V vocabulary, D hidden size, E head dim, K candidates.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, silu

from engine.batch import PackedBatch

HEADS, KEY_HEADS, HEAD_DIM, LAYERS, EPS, THETA = 4, 2, 8, 2, 1e-5, 10000.0


@dataclass(frozen=True)
class Trainer:
    """A trainer and its options. windows: of each layer, 0 = none. top_k: candidates of DFlash2's selector."""

    name: str
    method: str
    block_size: int
    decay: float
    is_dpace: bool = False
    windows: tuple[int, ...] = (0,) * LAYERS
    is_causal: bool = False
    top_k: int = 12
    dpace_alpha: float = 0.5

    @property
    def shift(self) -> int:
        """Distance of the token that row `k` drafts from position `a + k`."""
        return 1 if self.method == "dspark" else 0


@dataclass(frozen=True)
class Text:
    """A packed batch with the target's states and tables, in float64."""

    batch: PackedBatch
    aux_TA: Tensor
    last_hidden_TD: Tensor
    embed_VD: Tensor
    head_VD: Tensor
    mask_token: int

    @property
    def documents(self) -> list[tuple[int, int]]:
        """First position of each document, and the one after its last."""
        bounds = self.batch.cu_seqlens.tolist()
        return list(zip(bounds, bounds[1:], strict=False))


@dataclass(frozen=True)
class Block:
    """A block at position `anchor` of a document that begins at `start`. rows: those that learn."""

    anchor: int
    start: int
    rows: list[int]


@dataclass
class Losses:
    """Losses of the rows of one block, by row."""

    token: dict[int, Tensor] = field(default_factory=dict)
    cross_entropy: dict[int, Tensor] = field(default_factory=dict)
    head: dict[int, Tensor] = field(default_factory=dict)
    covered: dict[int, bool] = field(default_factory=dict)


def plain_loss(trainer: Trainer, weights: dict[str, Tensor], text: Text) -> Tensor:
    """Return the loss of a micro-batch on one rank."""
    blocks = blocks_of(trainer, text)
    losses = [losses_of(trainer, weights, text, block) for block in blocks]
    token_sum = torch.zeros((), dtype=torch.float64)
    head_sum = torch.zeros((), dtype=torch.float64)
    weight_sum = 0.0
    covered_sum = 0.0
    num_rows = 0
    for block_losses in losses:
        weight = row_weights(trainer, block_losses.cross_entropy)
        head_weight = head_weights(trainer, block_losses, weight)
        for row, loss in block_losses.token.items():
            token_sum = token_sum + weight[row] * loss
            weight_sum += weight[row]
            num_rows += 1
        for row, loss in block_losses.head.items():
            head_sum = head_sum + head_weight[row] * loss
            covered_sum += head_weight[row] * block_losses.covered.get(row, True)
    divisor = weight_sum
    if trainer.is_dpace:
        divisor = len(text.documents) if trainer.name == "specforge" else num_rows
    if trainer.name == "speculators":
        divisor = num_rows + 1e-5
    if trainer.name in ("automodel", "deepspec"):
        divisor = weight_sum + 1e-6
    if trainer.name == "automodel" and trainer.method == "dflash2":
        return token_sum / divisor + head_sum / (covered_sum + 1e-6)
    return (token_sum + head_sum) / divisor


def blocks_of(trainer: Trainer, text: Text) -> list[Block]:
    """Return the blocks that learn something."""
    mask = text.batch.assistant_mask_T.tolist()
    found = []
    for start, end in text.documents:
        for anchor in range(start + 1, end):  # a document's first position starts no block in DraftSpeed
            rows = rows_of(trainer, mask, anchor, end)
            if rows:
                found.append(Block(anchor, start, rows))
    return found


def rows_of(trainer: Trainer, mask: list[bool], anchor: int, end: int) -> list[int]:
    """Return the rows that a block at an anchor learns; [] if the trainer starts none there."""
    size = trainer.block_size
    is_dspark = trainer.method == "dspark"
    if not mask[anchor]:
        return []
    if trainer.name == "speculators":
        # Only the pack has an end, and the mask is read at the row's own position.
        if anchor >= len(mask) - size:
            return []
        return [row for row in range(0 if is_dspark else 1, size) if mask[anchor + row]]
    if trainer.name == "automodel" and not is_dspark and anchor + size > end:
        return []
    labels = {row: anchor + row + trainer.shift for row in range(1 - trainer.shift, size)}
    rows = [row for row, label in labels.items() if label < end and mask[label]]
    needs_next = not (trainer.name == "automodel" and not is_dspark)
    if needs_next and 1 - trainer.shift not in rows:
        return []
    if is_dspark or trainer.name in ("none", "deepspec"):
        return [row for row in rows if all(earlier in rows for earlier in range(1 - trainer.shift, row))]
    return rows


def row_weights(trainer: Trainer, cross_entropy: dict[int, Tensor]) -> dict[int, float]:
    """Return the weight of each row: decayed, or D-PACE's from its cross-entropy."""
    if not trainer.is_dpace:
        first = 1 - trainer.shift
        return {row: math.exp(-(row - first) / trainer.decay) for row in cross_entropy}
    reached = {}
    product = 1.0
    for row in sorted(cross_entropy):
        product *= (1 - trainer.dpace_alpha) * math.exp(-cross_entropy[row].item()) + trainer.dpace_alpha
        reached[row] = product
    return {row: sum(reached[later] for later in reached if later >= row) for row in reached}


def head_weights(trainer: Trainer, losses: Losses, weight: dict[int, float]) -> dict[int, float]:
    """Return the weights of the loss of a method's own head."""
    if trainer.name != "speculators":
        return weight
    if trainer.method == "dspark":
        return {row: math.exp(-row / trainer.decay) for row in weight}
    return row_weights(trainer, losses.head)


def losses_of(trainer: Trainer, weights: dict[str, Tensor], text: Text, block: Block) -> Losses:
    ids = text.batch.input_ids_T
    hidden_BD = hidden_rows(trainer, weights, text, block)
    losses = Losses()
    for row in block.rows:
        label_at = block.anchor + row + trainer.shift
        previous = int(ids[label_at - 1])
        state_D = hidden_BD[row]
        unary_V = text.head_VD @ state_D
        logits_V = unary_V
        if trainer.method == "dspark":
            markov = weights["markov_head.markov_w1.weight"][previous]
            logits_V = unary_V + weights["markov_head.markov_w2.weight"] @ markov
        target_V = (text.head_VD @ text.last_hidden_TD[label_at - 1]).log_softmax(-1)
        label = int(target_V.argmax()) if trainer.name == "speculators" else int(ids[label_at])
        draft_V = logits_V.log_softmax(-1)
        entropy = -draft_V[label]
        distance = (draft_V.exp() - target_V.exp()).abs().sum()
        losses.cross_entropy[row] = entropy.detach()
        losses.token[row] = token_loss(trainer, entropy, distance, draft_V, target_V)
        if trainer.method == "dspark":
            logit = weights["confidence_head.proj.weight"][0] @ torch.cat((state_D, markov))
            logit = logit + weights["confidence_head.proj.bias"][0]
            losses.head[row] = binary_cross_entropy_with_logits(logit, 1 - distance.detach() / 2)
        if trainer.method == "dflash2":
            select(trainer, weights, losses, row, unary_V, state_D, previous, label)
    return losses


def token_loss(trainer: Trainer, entropy: Tensor, distance: Tensor, draft_V: Tensor, target_V: Tensor) -> Tensor:
    """Return the default loss of a row. distance: sum of |p - q|."""
    is_speculators = trainer.name == "speculators"
    if is_speculators and trainer.is_dpace:
        return entropy
    if trainer.method == "dspark":
        return 0.1 * entropy + 0.9 * (distance / 2 if is_speculators else distance)
    if trainer.method == "dflash2" and is_speculators:
        return (target_V.exp() * (target_V - draft_V)).sum()
    return entropy


def select(
    trainer: Trainer,
    weights: dict[str, Tensor],
    losses: Losses,
    row: int,
    unary_V: Tensor,
    state_D: Tensor,
    previous: int,
    label: int,
) -> None:
    """Add the selector's cross-entropy of a row, over the candidates."""
    candidates = unary_V.topk(trainer.top_k).indices.tolist()
    losses.covered[row] = label in candidates
    if trainer.name == "speculators" and label not in candidates:
        candidates[-1] = label
    if label not in candidates:
        losses.head[row] = torch.zeros((), dtype=torch.float64)
        return
    state_r = weights["candidate_selector.hidden_projection.weight"] @ state_D
    query_r = weights["candidate_selector.predecessor_codebook"][previous] * state_r
    successor_Kr = weights["candidate_selector.successor_codebook"][candidates]
    scores_K = unary_V[candidates] + successor_Kr @ query_r
    losses.head[row] = -scores_K.log_softmax(-1)[candidates.index(label)]


def hidden_rows(trainer: Trainer, weights: dict[str, Tensor], text: Text, block: Block) -> Tensor:
    """Return the final states of a block's rows, [B, D]."""
    size = trainer.block_size
    context = slice(block.start, block.anchor)
    context_CD = norm(text.aux_TA[context] @ weights["fc.weight"].T, weights["hidden_norm.weight"])
    state_BD = text.embed_VD[[int(text.batch.input_ids_T[block.anchor])] + [text.mask_token] * (size - 1)]
    context_position = torch.arange(block.anchor - block.start)
    position = block.anchor - block.start + torch.arange(size)
    for layer, window in enumerate(trainer.windows):
        own = {name: weight for name, weight in layer_weights(weights, layer).items()}
        y_BD = norm(state_BD, own["input_layernorm.weight"])
        y_BD, output_kernel = convolve_input(own, "attention_conv", y_BD)
        query_BHE = turn(norm(heads(y_BD, own["self_attn.q_proj.weight"]), own["self_attn.q_norm.weight"]), position)
        both_XD = torch.cat((context_CD, y_BD))
        key_XGE = norm(heads(both_XD, own["self_attn.k_proj.weight"]), own["self_attn.k_norm.weight"])
        key_XGE = turn(key_XGE, torch.cat((context_position, position)))
        value_XGE = heads(both_XD, own["self_attn.v_proj.weight"])
        groups = HEADS // KEY_HEADS
        scores_HBX = torch.einsum("bhe,xhe->hbx", query_BHE, key_XGE.repeat_interleave(groups, 1)) / HEAD_DIM**0.5
        scores_HBX = scores_HBX.masked_fill(~seen(trainer, window, len(context_CD)), -math.inf)
        mixed_BHE = torch.einsum("hbx,xhe->bhe", scores_HBX.softmax(-1), value_XGE.repeat_interleave(groups, 1))
        attended_BD = mixed_BHE.flatten(1) @ own["self_attn.o_proj.weight"].T
        state_BD = state_BD + convolve(attended_BD, output_kernel)
        z_BD = norm(state_BD, own["post_attention_layernorm.weight"])
        z_BD, output_kernel = convolve_input(own, "mlp_conv", z_BD)
        gated = silu(z_BD @ own["mlp.gate_proj.weight"].T) * (z_BD @ own["mlp.up_proj.weight"].T)
        state_BD = state_BD + convolve(gated @ own["mlp.down_proj.weight"].T, output_kernel)
    return norm(state_BD, weights["norm.weight"])


def seen(trainer: Trainer, window: int, num_context: int) -> Tensor:
    """Return which keys the rows of a block see, bool [B, C + B]."""
    size = trainer.block_size
    sees = torch.ones(size, num_context + size, dtype=torch.bool)
    for row in range(size):
        for key in range(num_context):
            # Both count from the document's start, where the anchor lies at `num_context`.
            distance = num_context - key if trainer.name == "speculators" else num_context + row - key + 1
            sees[row, key] = not window or distance <= window
        for other in range(size):
            is_near = not window or row - other < window or trainer.name in ("specforge", "automodel", "speculators")
            sees[row, num_context + other] = not trainer.is_causal or (other <= row and is_near)
    return sees


def layer_weights(weights: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    prefix = f"layers.{layer}."
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def heads(x_XD: Tensor, weight: Tensor) -> Tensor:
    return (x_XD @ weight.T).unflatten(1, (-1, HEAD_DIM))


def turn(x_XHE: Tensor, position_X: Tensor) -> Tensor:
    """Return queries or keys with the rotary embedding of their positions."""
    half = HEAD_DIM // 2
    frequency = THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    angle_X1e = (position_X[:, None] * frequency)[:, None]
    first, second = x_XHE[..., :half], x_XHE[..., half:]
    cos, sin = angle_X1e.cos(), angle_X1e.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def convolve_input(own: dict[str, Tensor], name: str, y_BD: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the convolved input of attention or MLP, and the kernel of its output; without convolutions, the input."""
    if f"{name}.base_kernel" not in own:
        return y_BD, None
    base_2JD = own[f"{name}.base_kernel"]
    dynamic = y_BD @ own[f"{name}.kernel_projection.weight"].T
    grouped_B2Jd = dynamic.view(len(y_BD), *base_2JD.shape[:2], -1)
    group = base_2JD.shape[2] // grouped_B2Jd.shape[3]
    kernel_B2JD = base_2JD + grouped_B2Jd.repeat_interleave(group, -1)
    return convolve(y_BD, kernel_B2JD[:, 0]), kernel_B2JD[:, 1]


def convolve(x_BD: Tensor, kernel_BJD: Tensor | None) -> Tensor:
    if kernel_BJD is None:
        return x_BD
    mixed_BD = torch.zeros_like(x_BD)
    for tap in range(kernel_BJD.shape[1]):
        shifted_BD = torch.cat((torch.zeros_like(x_BD[:tap]), x_BD[: len(x_BD) - tap]))
        mixed_BD = mixed_BD + kernel_BJD[:, tap] * shifted_BD
    return mixed_BD
