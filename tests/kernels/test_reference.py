"""The specification of attention, and what must equal it on a CPU, against softmax attention written out in float64."""

import pytest
import torch

from engine.kernels import blocked_attention, reference

LENGTHS = {"one document": (13,), "several": (1, 6, 1, 11, 2), "one token": (1,)}
HEADS = {"MHA": (4, 4), "GQA": (6, 2), "MQA": (3, 1)}
QUERIES = {
    "every row": lambda total: torch.arange(total),
    "some rows": lambda total: torch.arange(total)[torch.arange(total) % 3 != 1],
    "the last row alone": lambda total: torch.tensor([total - 1]),
    "none": lambda total: torch.arange(0),
}


@pytest.fixture(params=["reference", "blocked", "blocks of 3 rows"])
def ancestor_attention(request, monkeypatch):
    if request.param == "blocks of 3 rows":
        monkeypatch.setattr(blocked_attention, "ROWS_PER_BLOCK", 3)
    return reference.ancestor_attention if request.param == "reference" else blocked_attention.ancestor_attention


def written_out(query_QHE, index_Q, key_TGE, value_TGE, extra_keys, extra_values, cu_seqlens):
    """One masked softmax over [T + Q * A] keys for each row and head."""
    num_rows, num_heads, head_dim = query_QHE.shape
    document_T = torch.searchsorted(cu_seqlens, torch.arange(key_TGE.shape[0]), right=True)
    allowed_QT = (document_T[index_Q][:, None] == document_T) & (torch.arange(key_TGE.shape[0]) <= index_Q[:, None])
    allowed_QK = torch.cat([allowed_QT] + [torch.eye(num_rows, dtype=torch.bool)] * len(extra_keys), 1)
    heads = []
    for head in range(num_heads):
        group = head // (num_heads // key_TGE.shape[1])
        key_KE = torch.cat([key_TGE[:, group], *(key[:, group] for key in extra_keys)])
        value_KE = torch.cat([value_TGE[:, group], *(value[:, group] for value in extra_values)])
        scores_QK = query_QHE[:, head] @ key_KE.T / head_dim**0.5
        heads.append(scores_QK.masked_fill(~allowed_QK, -torch.inf).softmax(1) @ value_KE)
    return torch.stack(heads, 1)


def attention_inputs(lengths, heads, num_rows, num_extra, head_dim=10, scale=1.0):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (torch.randn(*shape, generator=g) * scale).requires_grad_()

    (num_heads, num_groups), total = heads, sum(lengths)
    return (
        draw(num_rows, num_heads, head_dim),
        draw(total, num_groups, head_dim),
        draw(total, num_groups, head_dim),
        [draw(num_rows, num_groups, head_dim) for _ in range(num_extra)],
        [draw(num_rows, num_groups, head_dim) for _ in range(num_extra)],
    )


@pytest.mark.parametrize("num_extra", [0, 1, 4])
@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_attention_is_one_masked_softmax_over_prefix_and_ancestors(ancestor_attention, lengths, heads, queries, num_extra):
    lengths = LENGTHS[lengths]
    cu_seqlens, index_Q = torch.tensor((0, *lengths)).cumsum(0), QUERIES[queries](sum(lengths))
    query, key, value, keys, values = attention_inputs(lengths, HEADS[heads], len(index_Q), num_extra)
    leaves = [query, key, value, *keys, *values]
    ours = ancestor_attention(query, index_Q, key, value, keys, values, cu_seqlens.int())
    assert ours.shape == query.shape
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    our_grads = torch.autograd.grad((ours * direction).sum(), leaves)

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = written_out(*wide[:1], index_Q, *wide[1:3], wide[3 : 3 + num_extra], wide[3 + num_extra :], cu_seqlens)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    expected_grads = torch.autograd.grad((expected * direction.double()).sum(), wide)
    for ours, expected in zip(our_grads, expected_grads, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def test_leaving_out_rows_leaves_the_others_as_they_were(ancestor_attention):
    lengths, kept_Q = (4, 9, 1), torch.tensor([0, 5, 6, 12, 13])
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).int()
    query, key, value, keys, values = attention_inputs(lengths, (4, 2), sum(lengths), 3)
    every = ancestor_attention(query, torch.arange(14), key, value, keys, values, cu_seqlens)
    some = ancestor_attention(
        query[kept_Q], kept_Q, key, value, [k[kept_Q] for k in keys], [v[kept_Q] for v in values], cu_seqlens
    )
    torch.testing.assert_close(some, every[kept_Q])


def test_scores_of_a_thousand_stay_finite(ancestor_attention):
    query, key, value, keys, values = attention_inputs((5, 3), (2, 1), 8, 2, scale=30.0)
    output = ancestor_attention(query, torch.arange(8), key, value, keys, values, torch.tensor([0, 5, 8]))
    grads = torch.autograd.grad(output.sum(), [query, key, value, *keys, *values])
    assert all(tensor.isfinite().all() for tensor in (output, *grads))


def test_bf16_attention_errs_no_more_than_its_rounding(ancestor_attention):
    query, key, value, keys, values = attention_inputs((7, 6), (4, 2), 13, 3)
    low = [t.detach().bfloat16() for t in (query, key, value, *keys, *values)]
    cu_seqlens = torch.tensor([0, 7, 13])
    ours = ancestor_attention(low[0], torch.arange(13), *low[1:3], low[3:6], low[6:], cu_seqlens)
    wide = [t.double() for t in low]
    expected = written_out(wide[0], torch.arange(13), *wide[1:3], wide[3:6], wide[6:], cu_seqlens)
    assert ours.dtype == torch.bfloat16
    # all but the result is in fp32
    assert (ours.double() - expected).abs().max() <= 2**-8 * expected.abs().max()
