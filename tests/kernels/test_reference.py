"""The specification against softmax attention and losses written out in float64."""

import pytest
import torch
import torch.nn.functional as F

from engine.kernels.reference import ancestor_attention, vocab_loss

LENGTHS = {"one document": (13,), "several": (1, 6, 1, 11, 2), "one token": (1,)}
HEADS = {"MHA": (4, 4), "GQA": (6, 2), "MQA": (3, 1)}
QUERIES = {
    "every row": lambda total: torch.arange(total),
    "some rows": lambda total: torch.arange(total)[torch.arange(total) % 3 != 1],
    "the last row alone": lambda total: torch.tensor([total - 1]),
    "none": lambda total: torch.arange(0),
}


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
def test_attention_is_one_masked_softmax_over_prefix_and_ancestors(lengths, heads, queries, num_extra):
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


def test_leaving_out_rows_leaves_the_others_as_they_were():
    lengths, kept_Q = (4, 9, 1), torch.tensor([0, 5, 6, 12, 13])
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).int()
    query, key, value, keys, values = attention_inputs(lengths, (4, 2), sum(lengths), 3)
    every = ancestor_attention(query, torch.arange(14), key, value, keys, values, cu_seqlens)
    some = ancestor_attention(
        query[kept_Q], kept_Q, key, value, [k[kept_Q] for k in keys], [v[kept_Q] for v in values], cu_seqlens
    )
    torch.testing.assert_close(some, every[kept_Q])


def test_scores_of_a_thousand_stay_finite():
    query, key, value, keys, values = attention_inputs((5, 3), (2, 1), 8, 2, scale=30.0)
    output = ancestor_attention(query, torch.arange(8), key, value, keys, values, torch.tensor([0, 5, 8]))
    grads = torch.autograd.grad(output.sum(), [query, key, value, *keys, *values])
    assert all(tensor.isfinite().all() for tensor in (output, *grads))


def test_bf16_attention_errs_no_more_than_its_rounding():
    query, key, value, keys, values = attention_inputs((7, 6), (4, 2), 13, 3)
    low = [t.detach().bfloat16() for t in (query, key, value, *keys, *values)]
    cu_seqlens = torch.tensor([0, 7, 13])
    ours = ancestor_attention(low[0], torch.arange(13), *low[1:3], low[3:6], low[6:], cu_seqlens)
    wide = [t.double() for t in low]
    expected = written_out(wide[0], torch.arange(13), *wide[1:3], wide[3:6], wide[6:], cu_seqlens)
    assert ours.dtype == torch.bfloat16
    # scores, weights, products and the sum of two parts are each rounded to 8 bits
    assert (ours.double() - expected).abs().max() < 8 * 2**-8


def loss_inputs(num_rows=11, vocab=37, full_vocab=61, scale=1.0):
    g = torch.Generator().manual_seed(2)
    full_QV = torch.randn(num_rows, full_vocab, generator=g) * scale
    draft_QU = (torch.randn(num_rows, vocab, generator=g) * scale).requires_grad_()
    return draft_QU, full_QV[:, :vocab].contiguous(), full_QV


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_losses_are_those_of_torch(scale):
    draft_QU, target_QU, full_QV = loss_inputs(scale=scale)
    rows = vocab_loss(draft_QU, target_QU, full_QV.logsumexp(1))
    wide_QU = draft_QU.detach().double().requires_grad_()
    expected_Q = F.cross_entropy(wide_QU, target_QU.double().softmax(1), reduction="none")
    torch.testing.assert_close(rows.cross_entropy_Q.double(), expected_Q, rtol=1e-5, atol=1e-5)
    p_full_QU = full_QV.double().softmax(1)[:, : target_QU.shape[1]]
    acceptance_Q = torch.minimum(p_full_QU, wide_QU.softmax(1)).sum(1)
    torch.testing.assert_close(rows.acceptance_Q.double(), acceptance_Q, rtol=1e-5, atol=1e-6)
    assert torch.equal(rows.argmax_Q, draft_QU.argmax(1))
    for ours_Q, theirs_Q in ((rows.cross_entropy_Q, expected_Q), (rows.acceptance_Q, acceptance_Q)):
        (ours,) = torch.autograd.grad(ours_Q.sum(), draft_QU, retain_graph=True)
        (theirs,) = torch.autograd.grad(theirs_Q.sum(), wide_QU, retain_graph=True)
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


def test_cross_entropy_is_least_and_acceptance_greatest_where_the_draft_is_the_target():
    _, target_QU, _ = loss_inputs()
    same = vocab_loss(target_QU, target_QU, target_QU.logsumexp(1))
    other = vocab_loss(target_QU.roll(1, 1), target_QU, target_QU.logsumexp(1))
    torch.testing.assert_close(same.acceptance_Q, torch.ones(11))
    assert (same.cross_entropy_Q < other.cross_entropy_Q).all() and (other.acceptance_Q < 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saturated_logits_give_finite_losses_and_gradients(dtype):
    draft_QU, target_QU, full_QV = loss_inputs(scale=1e4)
    draft_QU = draft_QU.detach().to(dtype).requires_grad_()
    rows = vocab_loss(draft_QU, target_QU, full_QV.logsumexp(1))
    (gradient,) = torch.autograd.grad(rows.cross_entropy_Q.sum() + rows.acceptance_Q.sum(), draft_QU)
    assert rows.cross_entropy_Q.dtype == torch.float32
    assert all(tensor.isfinite().all() for tensor in (rows.cross_entropy_Q, rows.acceptance_Q, gradient))
    assert rows.cross_entropy_Q.max() > 1e3


def test_no_rows_are_no_trouble():
    draft_QU = torch.empty(0, 5, requires_grad=True)
    rows = vocab_loss(draft_QU, torch.empty(0, 5), torch.empty(0))
    rows.cross_entropy_Q.sum().backward()
    assert draft_QU.grad.shape == (0, 5)
