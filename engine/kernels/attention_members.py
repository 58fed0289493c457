"""Parts that the Triton kernels of ancestor attention share: members of a block, and a running softmax.

A member is a pair of a row and one of the R query heads of a group. R is padded to a power of two.
"""

import triton
import triton.language as tl


@triton.jit
def members_of(first, end, R: tl.constexpr, R_PAD: tl.constexpr, M: tl.constexpr):
    """Return the row and query head of each member of a block, and whether the member exists.

    first: first row of the block. end: index after the last row that exists. A padding member
    repeats an existing one. The group of heads is the second index of the program.
    """
    member_M = tl.arange(0, M)
    row_M = first + member_M // R_PAD
    head_M = member_M % R_PAD
    exists_M = (row_M < end) & (head_M < R)
    return tl.minimum(row_M, end - 1), tl.program_id(1) * R + tl.minimum(head_M, R - 1), exists_M


@triton.jit
def add_key(most_M, total_M, sum_ME, score_M, value_ME):
    """Add one key per member to a running softmax to base 2.

    Return the new maximum of the scores, total of the weights and weighted sum of the values.
    """
    new_M = tl.maximum(most_M, score_M)
    weight_M = tl.exp2(score_M - new_M)
    shrink_M = tl.exp2(most_M - new_M)
    return new_M, total_M * shrink_M + weight_M, sum_ME * shrink_M[:, None] + weight_M[:, None] * value_ME
