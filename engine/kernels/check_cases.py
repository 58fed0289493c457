"""Inputs on which kernels are compared with `reference.py`.

They are small, with odd sizes and fixed seeds. Every input is drawn on the CPU, so all devices and
ranks compare the same numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from engine.kernels import (
    FlashWhereDense,
    Kernels,
    TargetKernels,
    TokenPermute,
    anchored_blocks,
    blocked_attention,
    packed_attention,
    plain_anchored_attention,
    plain_attention,
    reference,
)
from engine.kernels.elementwise import Elementwise
from engine.kernels.interface import (
    AttentionRows,
    BlockRows,
    FrozenHead,
    LogitBias,
    LogitTransform,
    LossRows,
    RowWeights,
    SlotDistributions,
    SlotTargets,
    TokenLoss,
    TokenRows,
    TokenTerms,
    VocabLoss,
)
from engine.kernels.packed_attention import PackedAttention, Scores, Segments
from engine.kernels.token_loss import token_row_loss
from engine.kernels.vocab_loss import row_loss

Operation = Callable[..., tuple[Tensor, ...]]

LENGTHS = (1, 33, 63)  # tokens of each document
HEADS = 8
GROUPS = 2
NUM_ANCESTORS = 2
BLOCK_LENGTHS = (20, 150)  # tokens of each document for draft blocks, of which some blocks see a whole tile of keys
BLOCK_SIZE, ANCHOR_STEP, BLOCK_WINDOW = 4, 7, 33  # rows per block, tokens between anchors, and a sliding window
BIAS_RANK = 8
NUM_SLOTS, SLOTS_PER_CHUNK, HIDDEN_SIZE, VOCAB_SIZE = 19, 8, 48, 4099  # above row_loss.MAX_BLOCK_U
FP8_BLOCK = (128, 128)
FP8_SIZES = (160, 1056)  # outputs and inputs, neither a multiple of the block
FP8_EVEN_SIZES = (256, 1024)  # multiples of the sizes that cuBLAS's scaled products require
FP8_MANY = 1025  # enough rows for a weight to be dequantised in memory
FP8_COUNTS = (3, 0, 37, 1)  # rows of each expert
PERMUTED = (7, 3, 2051)  # tokens, experts per token, and a width of more than one block
EPS = 1e-5
# A GPU's exponential has an error of 2**-22 in fp32, and differences of scores magnify it.
FLOOR = 1e-5
# Tensor cores of compute capability 9.0 accumulate fp8 products with about 13 bits.
FP8_SUMS_FLOOR = 2**-9
PLAIN_ATTENTION = (
    plain_attention,
    reference.ancestor_attention,
    blocked_attention.ancestor_attention,
)


PLAIN_ANCHORED = (
    plain_anchored_attention,
    reference.anchored_attention,
    anchored_blocks.anchored_attention,
)


@dataclass(frozen=True)
class Case:
    """One comparison of one kernel on one input.

    leaves: input tensors, fp32, on the CPU.
    ours: the kernel; takes the leaves and returns tensors.
    plain: the same operation in plain PyTorch, which also runs in float64.
    differentiates: whether the gradients of the leaves are compared as well.
    roundings: how often the kernel rounds a result to the precision of the run; plain PyTorch
        rounds once.
    floor: smallest error bound, relative to the norm.
    """

    name: str
    leaves: tuple[Tensor, ...]
    ours: Operation
    plain: Operation
    differentiates: bool = True
    roundings: int = 1
    floor: float = FLOOR


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Return normally distributed numbers from a seed, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * scale


def draft_cases(kernels: Kernels, head_dim: int, device: torch.device) -> Iterator[Case]:
    """Yield cases for a draft's kernels that are not plain PyTorch, identical on every device."""
    attention = kernels.attention
    if isinstance(attention, FlashWhereDense):
        yield _attention_case("prefix_flash", attention, head_dim, True, device)
        attention = attention.otherwise
    if attention not in PLAIN_ATTENTION:
        yield _attention_case("ancestor_attention", attention, head_dim, False, device)
    has_loss_kernel = kernels.loss_pass.row_loss is not row_loss
    if has_loss_kernel and kernels.vocab_loss is not reference.vocab_loss:
        for weights in _loss_weights(device):
            yield _loss_case(kernels, weights, device)
    if kernels.anchored_attention not in PLAIN_ANCHORED:
        for window in (None, BLOCK_WINDOW):
            yield _anchored_case(kernels.anchored_attention, head_dim, window, device)
    has_token_kernel = kernels.token_pass.row_loss is not token_row_loss
    if has_token_kernel and kernels.token_loss is not reference.token_loss:
        for is_simple in (True, False):
            yield _token_case(kernels, is_simple, device)
    yield from _elementwise_cases(kernels.elementwise, head_dim, device)


def target_cases(kernels: TargetKernels, head_dim: int, device: torch.device) -> Iterator[Case]:
    """Yield cases for a frozen target's kernels that are not plain PyTorch."""
    if kernels.packed_attention is not None:
        for window in (None, 9):
            attention = kernels.packed_attention
            yield _packed_attention_case(attention, head_dim, window, device)
    if kernels.head_stats is not None:
        for transform in (LogitTransform(), LogitTransform(0.5, 3.0, 0.7)):
            yield _head_case(kernels.head_stats, transform)
    if kernels.fp8_linear is not None:
        yield from _fp8_cases("fp8_linear", kernels.fp8_linear, reference.fp8_linear, device)
    if kernels.fp8_activations is not None:
        ours = partial(kernels.fp8_activations, group=FP8_BLOCK[1])
        plain = partial(reference.fp8_activations, group=FP8_BLOCK[1])
        for case in _fp8_cases("fp8_activations", ours, plain, device):
            yield replace(case, floor=FP8_SUMS_FLOOR)
    if kernels.token_permute is not None:
        for is_fp8 in (False, True):
            yield _token_permute_case(kernels.token_permute, is_fp8, device)


def _attention_case(name: str, attention: Operation, head_dim: int, is_dense: bool, device: torch.device) -> Case:
    """Return an attention case with chains of ancestors.

    is_dense: use all rows of each document; otherwise two of three.
    """
    total = sum(LENGTHS)
    position_Q = torch.arange(total)
    if not is_dense:
        position_Q = position_Q[position_Q % 3 != 1]
    num_rows = len(position_Q)
    ancestors = []
    for index in range(NUM_ANCESTORS):
        # An earlier step has more rows than this one, so the indices into its rows are shifted.
        ancestors.append((torch.arange(num_rows) + index).to(device))
    cu_seqlens = torch.tensor((0, *LENGTHS)).cumsum(0).int().to(device)
    rows = AttentionRows(
        position_Q.to(device),
        cu_seqlens,
        tuple(ancestors),
        is_dense=is_dense,
        longest=max(LENGTHS),
    )
    leaves = [draw(num_rows, HEADS, head_dim, seed=1)]
    leaves += [draw(total, GROUPS, head_dim, seed=seed) for seed in (2, 3)]
    for seed in range(2 * NUM_ANCESTORS):
        leaves.append(draw(num_rows + NUM_ANCESTORS, GROUPS, head_dim, seed=4 + seed))

    def run(function: Operation, query, key, value, *extras) -> tuple[Tensor, ...]:
        keys = list(extras[:NUM_ANCESTORS])
        values = list(extras[NUM_ANCESTORS:])
        return function(query, key, value, keys, values, rows)

    # Flash attention rounds the prefix's results, and the merge with the ancestors rounds again.
    roundings = 2 if name == "prefix_flash" else 1
    ours = partial(run, attention)
    plain = partial(run, reference.ancestor_attention)
    return Case(name, tuple(leaves), ours, plain, roundings=roundings)


def _loss_weights(device: torch.device) -> list[RowWeights]:
    """Return weights of cross-entropy alone and of all three parts.

    The kernel is compiled separately for each.
    """
    alone_S = torch.tensor([1.0, 0.8], device=device)
    return [RowWeights(alone_S), RowWeights(alone_S, alone_S / 2, alone_S / 4)]


def _loss_rows(device: torch.device) -> LossRows:
    """Return rows of two steps: one with a row for every slot, one that lacks every third."""
    slot_N = torch.arange(NUM_SLOTS)
    steps = [slot_N, slot_N[slot_N % 3 != 1]]
    bounds = []
    first = 0
    for slot_R in steps:
        starts = range(0, NUM_SLOTS + SLOTS_PER_CHUNK, SLOTS_PER_CHUNK)
        bounds.append([first + int((slot_R < start).sum()) for start in starts])
        first += len(slot_R)
    return LossRows(torch.cat(steps).to(device), bounds, SLOTS_PER_CHUNK)


def _loss_case(kernels: Kernels, weights: RowWeights, device: torch.device) -> Case:
    """Return a loss case with a draft close enough to its target that some rows are correct."""
    rows = _loss_rows(device)
    target_ND = draw(NUM_SLOTS, HIDDEN_SIZE, seed=1)
    head_UD = draw(VOCAB_SIZE, HIDDEN_SIZE, seed=2, scale=3 * HIDDEN_SIZE**-0.5)
    logits_NU = target_ND @ head_UD.mT
    lse_N = (logits_NU.logsumexp(-1) + 0.1).to(device)  # about a tenth of the mass lies outside
    draft_id_N = logits_NU.argmax(-1).to(device)
    slot_R = rows.slot_R.cpu()
    noise_RD = draw(len(slot_R), HIDDEN_SIZE, seed=3, scale=0.3)
    leaves = (target_ND[slot_R] + noise_RD, head_UD + draw(*head_UD.shape, seed=4, scale=0.1))
    target_ND = target_ND.to(device)
    head_UD = head_UD.to(device)

    def run(function: Callable[..., VocabLoss], hidden_RD: Tensor, weight_UD: Tensor) -> tuple[Tensor, ...]:
        own_head_UD = head_UD.to(hidden_RD.dtype)

        def logits(hidden_ND: Tensor) -> Tensor:
            return reference.upcast(hidden_ND @ own_head_UD.mT)

        targets = SlotTargets(target_ND.to(hidden_RD.dtype), logits, lse_N, draft_id_N)
        loss = function(hidden_RD, weight_UD, rows, targets, weights, kernels.loss_pass)
        # A count is either exact or off by one, so its relative error says little. It is compared
        # together with the sums.
        return loss.total, torch.cat((*loss.sums[:3], loss.correct_S / len(slot_R)))

    ours = partial(run, kernels.vocab_loss)
    plain = partial(run, reference.vocab_loss)
    return Case("row_loss", leaves, ours, plain)


def _anchored_case(attention: Callable[..., Tensor], head_dim: int, window: int | None, device: torch.device) -> Case:
    """Return a case of draft blocks. With a window, rows also see only the earlier rows of their block."""
    total = sum(BLOCK_LENGTHS)
    starts = torch.tensor((0, *BLOCK_LENGTHS)).cumsum(0)
    anchor_P = torch.arange(1, total, ANCHOR_STEP).repeat_interleave(BLOCK_SIZE)
    begin_P = starts[torch.searchsorted(starts, anchor_P, right=True) - 1]
    row_P = torch.arange(len(anchor_P))
    own_begin_P = row_P - row_P % BLOCK_SIZE
    own_end_P = own_begin_P + BLOCK_SIZE
    if window is not None:
        begin_P = torch.maximum(begin_P, anchor_P - window + row_P % BLOCK_SIZE).clamp_max(anchor_P)
        own_end_P = row_P + 1
    bounds = [bound_P.to(device) for bound_P in (begin_P, anchor_P, own_begin_P, own_end_P)]
    rows = BlockRows(*bounds)
    leaves = [draw(len(row_P), HEADS, head_dim, seed=1)]
    leaves += [draw(total, GROUPS, head_dim, seed=seed) for seed in (2, 3)]
    leaves += [draw(len(row_P), GROUPS, head_dim, seed=seed) for seed in (4, 5)]

    def run(function: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        return (function(*tensors, rows),)

    ours = partial(run, attention)
    plain = partial(run, reference.anchored_attention)
    return Case("anchored_attention", tuple(leaves), ours, plain)


def _token_case(kernels: Kernels, is_simple: bool, device: torch.device) -> Case:
    """Return a case of the loss against tokens: the cross-entropy alone, or all parts with a bias and a soft cap."""
    terms = TokenTerms() if is_simple else TokenTerms(0.1, 0.4, 0.9)
    transform = LogitTransform() if is_simple else LogitTransform(soft_cap=10.0)
    slot_R = torch.arange(NUM_SLOTS).repeat_interleave(2)
    target_ND = draw(NUM_SLOTS, HIDDEN_SIZE, seed=1)
    head_VD = draw(VOCAB_SIZE, HIDDEN_SIZE, seed=2, scale=3 * HIDDEN_SIZE**-0.5)
    likeliest_N = (target_ND @ head_VD.mT).argmax(-1)
    rows = TokenRows(likeliest_N[slot_R].to(device), slot_R.to(device), torch.ones_like, host_slot_R=slot_R)
    leaves = [target_ND[slot_R] + draw(len(slot_R), HIDDEN_SIZE, seed=3, scale=0.3)]
    if not is_simple:
        leaves += [draw(len(slot_R), BIAS_RANK, seed=4), draw(VOCAB_SIZE, BIAS_RANK, seed=5, scale=0.3)]
    target_ND = target_ND.to(device)
    head_VD = head_VD.to(device)

    def run(function: Callable[..., TokenLoss], hidden_RD: Tensor, *of_bias: Tensor) -> tuple[Tensor, ...]:
        own_head_VD = head_VD.to(hidden_RD.dtype)

        def logits(hidden_ND: Tensor) -> Tensor:
            return reference.upcast(hidden_ND @ own_head_VD.mT)

        targets = None
        bias = None
        if not is_simple:
            targets = SlotDistributions(target_ND.to(hidden_RD.dtype), logits)
            bias = LogitBias(*of_bias)
        head = FrozenHead(own_head_VD, transform)
        loss = function(hidden_RD, head, rows, terms, targets, bias, kernels.token_pass)
        # As above, the count is compared together with the sums.
        sums = [loss.cross_entropy_R.sum(), loss.correct_R.mean()]
        if loss.kl_R is not None and loss.total_variation_R is not None:
            sums += [loss.kl_R.sum(), loss.total_variation_R.sum()]
        return loss.total, torch.stack([reference.upcast(value) for value in sums])

    ours = partial(run, kernels.token_loss)
    plain = partial(run, reference.token_loss)
    # Gradients are rounded by the product with the head and again when they are weighted.
    return Case("token_row_loss", tuple(leaves), ours, plain, roundings=2)


def _elementwise_cases(own: Elementwise, head_dim: int, device: torch.device) -> Iterator[Case]:
    plain = Elementwise()
    rows = 37
    x_QD = draw(rows, 200, seed=1)
    weight_D = 1 + draw(200, seed=2, scale=0.25)
    if own.rms_norm is not plain.rms_norm:

        def norm(operations: Elementwise, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return (operations.rms_norm(x, weight, EPS),)

        leaves = (x_QD, weight_D)
        yield Case("rms_norm", leaves, partial(norm, own), partial(norm, plain), roundings=2)
    if own.swiglu is not plain.swiglu:

        def swiglu(operations: Elementwise, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
            return (operations.swiglu(gate, up),)

        leaves = (3 * x_QD, draw(rows, 200, seed=3))
        yield Case("swiglu", leaves, partial(swiglu, own), partial(swiglu, plain))
    if own.rotate_both is not plain.rotate_both:
        angle_QE = draw(rows, head_dim // 2, seed=4).repeat(1, 2)
        cos_sin = angle_QE.cos()[:, None].to(device), angle_QE.sin()[:, None].to(device)

        def rotate(operations: Elementwise, query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
            # Some implementations rotate in place, which autograd does not allow on leaves.
            return operations.rotate_both(query.clone(), key.clone(), cos_sin)

        leaves = (draw(rows, HEADS, head_dim, seed=5), draw(rows, GROUPS, head_dim, seed=6))
        yield Case("rotate_both", leaves, partial(rotate, own), partial(rotate, plain))


def _packed_attention_case(attention: PackedAttention, head_dim: int, window: int | None, device: torch.device) -> Case:
    total = sum(LENGTHS)
    segments = Segments(LENGTHS, device, window)
    scores = Scores(head_dim**-0.5)
    leaves = [draw(HEADS, total, head_dim, seed=1)]
    leaves += [draw(GROUPS, total, head_dim, seed=seed) for seed in (2, 3)]

    def run(function: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        return (function(*tensors, segments, scores),)

    ours = partial(run, attention)
    plain = partial(run, packed_attention.in_blocks)
    return Case("packed_attention", tuple(leaves), ours, plain, differentiates=False)


def _token_permute_case(permute: TokenPermute, is_fp8: bool, device: torch.device) -> Case:
    """Return a case that sorts rows by expert and then sums them by token with weights.

    is_fp8: quantise the rows before they are sorted.
    """
    num_tokens, num_choices, width = PERMUTED
    order_M = torch.randperm(num_tokens * num_choices, generator=torch.Generator().manual_seed(1))
    row_M = (order_M // num_choices).to(device)
    place_TK = order_M.argsort().view(num_tokens, num_choices)
    place_TK[0, 0] = -1
    place_TK = place_TK.to(device)

    def run(functions: TokenPermute, rows_TD: Tensor, weight_TK: Tensor) -> tuple[Tensor, ...]:
        scale_T = None
        if is_fp8:
            # The leaves were rounded to e4m3 below, so every precision represents them exactly.
            codes_TD = torch.empty(rows_TD.shape, dtype=torch.float8_e4m3fn, device=rows_TD.device)
            scale_T = torch.empty(num_tokens, device=rows_TD.device)
            functions.quantise_rows(rows_TD, None, codes_TD, scale_T)
        sorted_MD = rows_TD.new_empty(len(row_M), width)
        functions.permute_rows(codes_TD if is_fp8 else rows_TD, row_M, sorted_MD, scale_T)
        summed_TD = functions.unpermute_rows(sorted_MD, place_TK, torch.empty_like(rows_TD), weight_TK)
        return sorted_MD, summed_TD

    leaves = draw(num_tokens, width, seed=1), draw(num_tokens, num_choices, seed=2)
    if is_fp8:
        leaves = leaves[0].to(torch.float8_e4m3fn).float(), leaves[1]
    ours = partial(run, permute)
    plain = partial(run, TokenPermute())
    return Case("token_permute", leaves, ours, plain, differentiates=False)


def _head_case(ours: Operation, transform: LogitTransform) -> Case:
    """Return a case in which several logits tie for the largest; the first one is correct."""
    logits_NV = draw(NUM_SLOTS, VOCAB_SIZE, seed=1)
    logits_NV[::2, [VOCAB_SIZE // 2, VOCAB_SIZE - 1]] = 5.0

    def run(function: Operation, logits_NV: Tensor) -> tuple[Tensor, ...]:
        best_N, argmax_N, lse_N = function(logits_NV, transform)
        return best_N, argmax_N.double(), lse_N

    ours = partial(run, ours)
    plain = partial(run, reference.head_stats)
    return Case("head_stats", (logits_NV,), ours, plain, differentiates=False)


def _fp8_cases(name: str, ours: Callable[..., Tensor], plain: Callable[..., Tensor], device: torch.device) -> Iterator[Case]:
    """Yield cases with one weight for few and for many rows, and with experts, one without rows.

    On a GPU, also yield the sizes and row counts for which library products are used.
    """
    shapes = [(FP8_SIZES, (sum(FP8_COUNTS),)), (FP8_SIZES, (FP8_MANY,)), (FP8_SIZES, FP8_COUNTS)]
    if device.type == "cuda":
        shapes += [(FP8_EVEN_SIZES, (FP8_MANY,)), (FP8_EVEN_SIZES, (FP8_MANY, FP8_MANY))]
    for sizes, counts in shapes:
        num_outputs, num_inputs = sizes
        values_XNK = draw(len(counts), num_outputs, num_inputs, seed=1)
        codes_XNK = values_XNK.to(torch.float8_e4m3fn).to(device)
        blocks = [-(-size // step) for size, step in zip(sizes, FP8_BLOCK, strict=True)]
        scale_XGJ = (draw(len(counts), *blocks, seed=2).abs() + 0.5).to(device)
        ends_X = None
        if len(counts) > 1:
            ends_X = torch.tensor(counts).cumsum(0).int().to(device)
        weight = codes_XNK, scale_XGJ, FP8_BLOCK, ends_X

        def run(function: Callable[..., Tensor], rows_MK: Tensor, weight=weight):
            return (function(rows_MK, *weight),)

        leaves = (draw(sum(counts), num_inputs, seed=3),)
        yield Case(name, leaves, partial(run, ours), partial(run, plain), differentiates=False)
