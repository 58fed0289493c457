"""Modules of a target are replaced by fused operations where these compute what the family does."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from engine.kernels.self_check import SelfCheck
from engine.parallel.mesh import Group
from engine.parallel.norms import norm_over
from engine.target import fused_elementwise
from engine.target.fused_elementwise import FusedOperations, NormForm, fuse_elementwise, liger_operations, use_liger
from engine.target.structure import decoder_of
from tests.kernels.fake_liger import install_liger
from tests.parallel.families import LAYERS, VOCAB, tiny_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch):
    """Check norms of narrow rows on few of them: no stand-in has another kernel for many."""
    monkeypatch.setattr(fused_elementwise, "MANY_ROWS", 64)


class CountingOperations:
    """The fused operations in plain PyTorch, and how often each was called."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float, form: NormForm) -> Tensor:
        self.calls["rms_norm"] += 1
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        if form.casting == "llama":
            return normed.to(x.dtype) * (form.offset + weight_D)
        return (normed * (form.offset + weight_D.float())).to(x.dtype)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        self.calls["swiglu"] += 1
        return nn.functional.silu(gate) * up

    def rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        self.calls["rotate"] += 1
        return rotate_one(query, cos, sin), rotate_one(key, cos, sin)

    def as_fused(self) -> FusedOperations:
        return FusedOperations(self.rms_norm, self.swiglu, self.rotate)


def rotate_one(x_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
    width = cos_BTE.shape[-1]
    rotated = x_BHTE[..., :width]
    kept = x_BHTE[..., width:]
    first, second = rotated.chunk(2, -1)
    turned = rotated * cos_BTE[:, None] + torch.cat((-second, first), -1) * sin_BTE[:, None]
    return torch.cat((turned, kept), -1)


def fuse(model, operations: FusedOperations, dtype: torch.dtype = torch.float32):
    return fuse_elementwise(decoder_of(model), dtype, CPU, operations)


@torch.no_grad()
def logits_of(model) -> Tensor:
    ids_BT = 3 + torch.randint(VOCAB - 3, (2, 9), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids_BT, use_cache=False).logits


NORMS = "RMSNorm"
MLPS = "SwiGLU"
ROTARY = "rotary"
TWO_NORMS = 2 * LAYERS + 1
FAMILIES = {
    "llama": {NORMS: TWO_NORMS, MLPS: LAYERS, ROTARY: LAYERS},
    "qwen3": {NORMS: TWO_NORMS + 2 * LAYERS, MLPS: LAYERS, ROTARY: LAYERS},
    # 1 + weight, four norms per layer, GELU
    "gemma3_text": {NORMS: 6 * LAYERS + 1, ROTARY: LAYERS},
    "mixtral": {NORMS: TWO_NORMS, ROTARY: LAYERS},
    "qwen3_moe": {NORMS: TWO_NORMS + 2 * LAYERS, ROTARY: LAYERS},
    # only half of a head is rotated, by a function that takes whole heads
    "glm4_moe": {ROTARY: LAYERS},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_replaced_modules_compute_what_the_family_does(family):
    model = tiny_model(family)
    expected = logits_of(model)
    counting = CountingOperations()
    fused = fuse(model, counting.as_fused())
    for kind, count in FAMILIES[family].items():
        assert fused.replaced[kind] == count, fused
    counting.calls.clear()
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
    names = {"rms_norm": NORMS, "swiglu": MLPS, "rotate": ROTARY}
    assert counting.calls == {name: fused.replaced[kind] for name, kind in names.items() if kind in fused.replaced}


def test_interleaved_rotary_embeddings_are_left_alone():
    model = tiny_model("cohere2")
    fused = fuse(model, CountingOperations().as_fused())
    assert ROTARY not in fused.replaced


@pytest.mark.parametrize(("name", "kind"), [("rms_norm", NORMS), ("swiglu", MLPS), ("rotate", ROTARY)])
def test_an_operation_that_computes_wrongly_is_refused(name, kind):
    operations = CountingOperations().as_fused()
    right = getattr(operations, name)

    def wrong(*arguments):
        result = right(*arguments)
        return tuple(x * 1.001 for x in result) if name == "rotate" else result * 1.001

    model = tiny_model("llama")
    expected = logits_of(model)
    fused = fuse(model, replace(operations, **{name: wrong}))
    assert kind not in fused.replaced and fused.refused[kind] > 0
    assert len(fused.replaced) == 2
    assert "errs by" in fused.summary()
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)


def test_an_operation_that_raises_or_rotates_in_place_is_refused():
    def raising(gate, up):
        raise RuntimeError("no such kernel")

    def in_place(query, key, cos, sin):
        return query.copy_(rotate_one(query, cos, sin)), key.copy_(rotate_one(key, cos, sin))

    operations = replace(CountingOperations().as_fused(), swiglu=raising, rotate=in_place)
    fused = fuse(tiny_model("llama"), operations)
    assert set(fused.replaced) == {NORMS}
    assert "no such kernel" in fused.reasons[MLPS]


def test_the_form_of_a_norm_is_the_familys_own_to_the_last_bit():
    for family, form in (("llama", NormForm(0.0, "llama")), ("gemma3_text", NormForm(1.0, "gemma"))):
        forms = set()
        counting = CountingOperations()

        def rms_norm(x, weight_D, eps, form, counting=counting, forms=forms):
            forms.add(form)
            return counting.rms_norm(x, weight_D, eps, form)

        model = tiny_model(family).bfloat16()
        norm = decoder_of(model).norm
        hidden_RD = torch.randn(50, norm.weight.shape[0]).bfloat16()
        expected = norm(hidden_RD)
        fuse(model, replace(counting.as_fused(), rms_norm=rms_norm), torch.bfloat16)
        forms.clear()
        assert torch.equal(norm(hidden_RD), expected)
        assert forms == {form}


def test_modules_that_were_wrapped_stay_as_they_are():
    model = tiny_model("qwen3")
    decoder = decoder_of(model)
    norm = decoder.layers[0].self_attn.q_norm
    norm_over(norm, Group())
    shared = decoder.layers[1].mlp
    shared.forward = lambda x: type(shared).forward(shared, x)
    wrapped = norm.forward, shared.forward
    fused = fuse(model, CountingOperations().as_fused())
    assert (norm.forward, shared.forward) == wrapped
    expected = FAMILIES["qwen3"]
    assert fused.replaced == expected | {NORMS: expected[NORMS] - 1, MLPS: expected[MLPS] - 1}


def test_another_model_of_the_family_keeps_its_rotary_embedding():
    counting = CountingOperations()
    fuse(tiny_model("llama"), counting.as_fused())
    counting.calls.clear()
    logits_of(tiny_model("llama"))
    assert not counting.calls


def test_linear_maps_may_be_wrapped_after_an_mlp_was_replaced():
    model = tiny_model("llama")
    fuse(model, CountingOperations().as_fused())
    mlp = decoder_of(model).layers[0].mlp
    mlp.down_proj.forward = lambda hidden: hidden.new_ones(3)
    assert torch.equal(mlp(torch.ones(2, mlp.gate_proj.in_features)), torch.ones(3))


def test_calls_that_were_not_checked_run_the_familys_own_code():
    model = tiny_model("llama")
    counting = CountingOperations()
    fuse(model, counting.as_fused())
    decoder = decoder_of(model)
    counting.calls.clear()
    decoder.norm(torch.ones(2, decoder.norm.weight.shape[0], dtype=torch.float64))
    decoder.norm(torch.ones(0, decoder.norm.weight.shape[0]))
    decoder.layers[0].mlp(torch.ones(0, decoder.norm.weight.shape[0]))
    assert not counting.calls


def test_of_liger_kernel_only_what_is_needed_is_taken_and_nothing_is_overwritten(monkeypatch):
    class Function:
        @staticmethod
        def apply(*arguments):
            return arguments

    class Rope:
        @staticmethod
        def apply(query, key, cos, sin):
            # The real one writes to this layout, and copies others first.
            for x in (query, key):
                if x.transpose(1, 2).is_contiguous():
                    x.zero_()
            return query, key, cos, sin

    install_liger(monkeypatch, rms_norm=Function, rope=Rope, swiglu=Function)
    operations = liger_operations()
    x = torch.ones(2)
    assert operations.rms_norm(x, x, 1e-6, NormForm(1.0, "gemma")) == (x, x, 1e-6, 1.0, "gemma", False)
    projected = torch.ones(1, 5, 2, 8).transpose(1, 2)
    headwise = torch.ones(1, 2, 5, 8)
    table = torch.ones(1, 5, 8)
    assert len(operations.rotate(projected, headwise, table, table)) == 2
    assert projected.all() and headwise.all()


def test_what_another_rank_refuses_is_not_replaced():
    decoder = decoder_of(tiny_model("llama"))

    def any_rank(flags: list[bool]) -> list[bool]:
        return [True, *flags[1:]]

    fused = fuse_elementwise(decoder, torch.float32, CPU, CountingOperations().as_fused(), any_rank)
    assert sum(fused.refused.values()) == 1
    assert "another rank" in fused.summary()


def test_the_log_says_why_nothing_was_replaced(monkeypatch):
    def missing() -> FusedOperations:
        raise ModuleNotFoundError("No module named 'liger_kernel'")

    monkeypatch.setattr(fused_elementwise, "liger_operations", missing)
    decoder = decoder_of(tiny_model("llama"))
    gpu = SelfCheck(torch.device("cuda"), None, lambda flags: flags, print)
    cpu = replace(gpu, device=CPU)
    assert "kernels=reference" in use_liger(decoder, torch.float32, "reference", gpu)
    assert "CUDA" in use_liger(decoder, torch.float32, "auto", cpu)
    assert "not installed" in use_liger(decoder, torch.float32, "auto", gpu)
    monkeypatch.setattr(fused_elementwise, "liger_operations", CountingOperations().as_fused)
    elsewhere = replace(gpu, any_rank=lambda flags: [True])
    assert "another rank" in use_liger(decoder, torch.float32, "auto", elsewhere)
    assert not any("forward" in vars(module) for module in decoder.modules())
