"""Flash attention written out in plain PyTorch: as exacting, and as free with what it need not write.

It wants every key in a segment and leaves the gradients of others undefined.
"""

import torch

from engine.kernels.flash import FlashAttention


def segments_of(inputs):
    """Slices of queries and keys of each segment, and the keys that each query sees, aligned to the bottom right corner."""
    cu_queries, cu_keys, max_queries, max_keys = inputs.segments
    assert cu_queries.dtype == cu_keys.dtype == torch.int32 and len(cu_queries) == len(cu_keys)
    assert cu_keys[0] == 0 and cu_keys[-1] == len(inputs.key_TGE) and cu_queries[-1] == len(inputs.query_QHE)
    for cu_seqlens, most in ((cu_queries, max_queries), (cu_keys, max_keys)):
        assert cu_seqlens.diff().min() >= 0 and cu_seqlens.diff().max() <= most
    assert max_queries > 1  # else flash attention believes that every segment has one
    assert len(inputs.query_QHE)  # flash attention is not asked about no row at all
    bounds = zip(cu_queries.tolist(), cu_queries.tolist()[1:], cu_keys.tolist(), cu_keys.tolist()[1:], strict=False)
    for first, end, start, stop in bounds:
        is_seen_qk = torch.ones(end - first, stop - start, dtype=torch.bool, device=cu_keys.device)
        corner = (stop - start) - (end - first)
        left = inputs.window_sizes["window_size_left"]
        is_seen_qk = is_seen_qk.tril(corner) if left < 0 else is_seen_qk.tril(corner).triu(corner - left)
        yield slice(first, end), slice(start, stop), is_seen_qk


def scores_of(inputs, queries: slice, keys: slice, is_seen_qk) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64 [H, q, k], and the group of each head."""
    num_heads = inputs.query_QHE.shape[1]
    group_H = torch.arange(num_heads, device=is_seen_qk.device) // (num_heads // inputs.key_TGE.shape[1])
    key_kHE = inputs.key_TGE[keys][:, group_H].double()
    scores_Hqk = torch.einsum("qhe,khe->hqk", inputs.query_QHE[queries].double(), key_kHE) * inputs.scale
    if inputs.softcap is not None:
        scores_Hqk = inputs.softcap * (scores_Hqk / inputs.softcap).tanh()
    return scores_Hqk.masked_fill(~is_seen_qk, -torch.inf), group_H


def plain_forward(inputs):
    output_QHE = torch.full_like(inputs.query_QHE, torch.nan)
    lse_HQ = output_QHE.new_full(output_QHE.shape[1::-1], torch.nan, dtype=torch.float32)
    for queries, keys, is_seen_qk in segments_of(inputs):
        scores_Hqk, group_H = scores_of(inputs, queries, keys, is_seen_qk)
        value_kHE = inputs.value_TGE[keys][:, group_H].double()
        output_QHE[queries] = torch.einsum("hqk,khe->qhe", scores_Hqk.softmax(-1), value_kHE).to(output_QHE.dtype)
        lse_HQ[:, queries] = scores_Hqk.logsumexp(-1).float()
    return output_QHE, lse_HQ


def plain_backward(inputs, grad_QHE, output_QHE, lse_HQ):
    assert all(x.is_contiguous() for x in (grad_QHE, output_QHE, lse_HQ))
    grads = [torch.full_like(x, torch.nan) for x in inputs[:3]]
    delta_HQ = (grad_QHE.double() * output_QHE.double()).sum(-1).t()
    for queries, keys, is_seen_qk in segments_of(inputs):
        scores_Hqk, group_H = scores_of(inputs, queries, keys, is_seen_qk)
        weights_Hqk = (scores_Hqk - lse_HQ[:, queries, None].double()).exp()
        grad_qHE, (key_kHE, value_kHE) = grad_QHE[queries].double(), (x[keys][:, group_H].double() for x in inputs[1:3])
        scores_grad_Hqk = torch.einsum("qhe,khe->hqk", grad_qHE, value_kHE) - delta_HQ[:, queries, None]
        scores_grad_Hqk *= weights_Hqk * inputs.scale
        query_kHE = torch.einsum("hqk,qhe->khe", scores_grad_Hqk, inputs.query_QHE[queries].double())
        shape = (-1, inputs.key_TGE.shape[1], len(group_H) // inputs.key_TGE.shape[1], key_kHE.shape[-1])
        grads[0][queries] = torch.einsum("hqk,khe->qhe", scores_grad_Hqk, key_kHE).to(grad_QHE.dtype)
        grads[1][keys] = query_kHE.reshape(shape).sum(2).to(grad_QHE.dtype)
        grads[2][keys] = torch.einsum("hqk,qhe->khe", weights_Hqk, grad_qHE).reshape(shape).sum(2).to(grad_QHE.dtype)
    return tuple(grads)


PLAIN = FlashAttention("plain", plain_forward, plain_backward, has_softcap=True)
