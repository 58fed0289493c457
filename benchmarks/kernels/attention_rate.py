"""The rate of an attention kernel, as its benchmarks show it."""

PRODUCTS_PER_PAIR = 2 + 5  # of the forward pass, and of a backward pass that computes the scores again


def tera_flops_per_s(num_pairs: int, heads: tuple[int, int, int], seconds: float) -> float:
    """Return 10^12 floating-point operations per second of a forward and a backward pass.

    num_pairs: pairs of a row and a key that it attends to. heads: (H, G, E).
    """
    num_heads, _, head_dim = heads
    return 2 * PRODUCTS_PER_PAIR * num_pairs * num_heads * head_dim / seconds / 1e12
