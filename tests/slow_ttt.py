"""docs/ttt.md read aloud: one row at a time, in float64, sharing no arithmetic with the engine."""

import math
from dataclasses import dataclass

import torch

from engine.batch import MicroBatch, PackedBatch
from engine.config.sections import TttSection
from engine.models.eagle3.draft import Eagle3Draft


@dataclass(frozen=True)
class SlowRow:
    """One mask-allowed row."""

    carries_loss: bool
    correct: bool
    cross_entropy: torch.Tensor
    acceptance: torch.Tensor


def slow_allowed(batch: PackedBatch, ttt: TttSection) -> torch.Tensor:
    """Rows that the mask allows, bool [S, T], by the double loop over (t, i)."""
    allowed_ST = torch.zeros(ttt.steps, batch.num_tokens, dtype=torch.bool)
    bounds = batch.cu_seqlens.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        mask = {position: batch.assistant_mask_T[position].item() for position in range(start, end)}
        for t in range(start, end):
            for i in range(ttt.steps):
                u = t + 1 + i
                if ttt.mask_alignment == "specforge":
                    on = mask.get(u - 1, False)
                else:
                    on = all(mask.get(position, False) for position in range(t + 1, u + 2))
                allowed_ST[i, t] = u < end and on
    return allowed_ST


def slow_losses(draft: Eagle3Draft, micro: MicroBatch, task) -> tuple[list[list[SlowRow]], dict[str, torch.Tensor]]:
    """Mask-allowed rows of each step, and the float64 weights that they were computed from."""
    weights = {name: p.detach().double().requires_grad_() for name, p in draft.named_parameters()}
    batch = micro.batch
    allowed_ST = slow_allowed(micro.batch, task.ttt)
    slot_index = {slot: index for index, slot in enumerate(micro.target.slots_N.tolist())}
    head_VD = task.head.weight_VD.double()
    ids_U = task.vocab_map.target_ids_U
    rows: list[list[SlowRow]] = [[] for _ in range(task.ttt.steps)]
    bounds = batch.cu_seqlens.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        outputs = _unroll_document(weights, draft, micro, start, end, task.ttt.steps)
        for i, t in allowed_ST[:, start:end].nonzero().tolist():
            z_V = head_VD @ micro.target.last_hidden_ND[slot_index[start + t + 1 + i]].double() / task.loss.temperature
            q_U = torch.softmax(weights["lm_head.weight"] @ _norm(outputs[i][t], weights["norm.weight"], draft), 0)
            p_U = torch.softmax(z_V[ids_U], 0)
            p_full_U = torch.softmax(z_V, 0)[ids_U]
            best = z_V.argmax().item()
            rows[i].append(
                SlowRow(
                    carries_loss=best in ids_U.tolist(),
                    correct=ids_U[q_U.argmax()].item() == best,
                    cross_entropy=-(p_U * q_U.log()).sum(),
                    acceptance=torch.minimum(p_full_U, q_U).sum(),
                )
            )
    return rows, weights


def _unroll_document(weights, draft: Eagle3Draft, micro: MicroBatch, start: int, end: int, steps: int):
    """Pre-norm outputs [step][position] of one document; tokens past its end embed to zero."""
    config = draft.config
    length = end - start
    many = config.num_hidden_layers > 1
    prefixes = [f"layers.{layer}." if many else "midlayer." for layer in range(config.num_hidden_layers)]
    prefix_keys = [[] for _ in prefixes]
    chain_keys = [[[] for _ in range(length)] for _ in prefixes]
    outputs: list[list[torch.Tensor]] = []
    for i in range(steps):
        outputs.append([])
        for t in range(length):
            state = _first_state(weights, draft, micro.target.aux_TA[start + t].double())
            if i:
                state = outputs[i - 1][t]
                state = _norm(state, weights["norm.weight"], draft) if config.norm_output else state
            inside = t + 1 + i < length
            embed = micro.embed_TD[start + t + 1 + i].double() if inside else torch.zeros(32, dtype=torch.float64)
            if "embed_projection.weight" in weights:
                embed = weights["embed_projection.weight"] @ embed
            for layer, name in enumerate(prefixes):
                w = {key.removeprefix(name): value for key, value in weights.items() if key.startswith(name)}
                new = chain_keys[layer][t] if i else prefix_keys[layer]
                seen = (prefix_keys[layer][: t + 1], chain_keys[layer][t]) if i else (prefix_keys[layer], [])
                state = _layer(w, draft, embed if layer == 0 else None, state, t + i, new, seen)
            outputs[i].append(state)
    return outputs


def _first_state(weights, draft: Eagle3Draft, aux: torch.Tensor) -> torch.Tensor:
    chunks = aux.chunk(3)
    if draft.config.fc_norm:
        chunks = [_norm(chunk, weights[f"fc_norm.{index}.weight"], draft) for index, chunk in enumerate(chunks)]
    return weights["fc.weight"] @ torch.cat(list(chunks))


def _layer(w, draft: Eagle3Draft, embed, state, position: int, new: list, seen: tuple[list, list]) -> torch.Tensor:
    config = draft.config
    x = _norm(state, w["hidden_norm.weight"], draft)
    if embed is not None:
        x = torch.cat([_norm(embed, w["input_layernorm.weight"], draft), x])
    query = _turn((w["self_attn.q_proj.weight"] @ x).view(config.num_attention_heads, config.head_dim), position)
    key = _turn((w["self_attn.k_proj.weight"] @ x).view(config.num_key_value_heads, config.head_dim), position)
    new.append((key, (w["self_attn.v_proj.weight"] @ x).view(config.num_key_value_heads, config.head_dim)))
    keys = [*seen[0], *seen[1]]
    heads = []
    for head in range(config.num_attention_heads):
        group = head * config.num_key_value_heads // config.num_attention_heads
        scores = torch.stack([query[head] @ k[group] for k, _ in keys]) / math.sqrt(config.head_dim)
        heads.append(sum(share * v[group] for share, (_, v) in zip(scores.softmax(0), keys, strict=True)))
    state = state + w["self_attn.o_proj.weight"] @ torch.cat(heads)
    x = _norm(state, w["post_attention_layernorm.weight"], draft)
    gate = w["mlp.gate_proj.weight"] @ x
    return state + w["mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * (w["mlp.up_proj.weight"] @ x))


def _norm(x: torch.Tensor, weight: torch.Tensor, draft: Eagle3Draft) -> torch.Tensor:
    return weight * x / torch.sqrt((x * x).mean() + draft.config.rms_norm_eps)


def _turn(x_HE: torch.Tensor, position: int) -> torch.Tensor:
    """Rotate the pairs (e, e + E/2) by `position * 10000**(-2e/E)`, as complex numbers."""
    half = x_HE.shape[1] // 2
    angle = position * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x_HE[:, :half], x_HE[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], 1)
