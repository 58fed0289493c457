"""A kernel that is wrong on the machine at hand is found before training, and plain PyTorch takes
its place.

Triton's interpreter runs the kernels on a CPU, see conftest.py; here some are broken on purpose.
"""

import json
from dataclasses import replace

import pytest
import torch

from engine import kernels as package
from engine.kernels import (
    FlashWhereDense,
    Kernels,
    TargetKernels,
    TokenPermute,
    anchored_blocks,
    blocked_attention,
    check_cases,
    choose_packed_attention,
    choose_target_kernels,
    choose_token_permute,
    flash,
    flash_where_dense,
    kernel_cache,
    packed_attention,
    self_check,
    stop_using,
)
from engine.kernels.elementwise import Elementwise, rms_norm
from engine.kernels.packed_attention import PackedAttention
from engine.kernels.self_check import SelfCheck, check_kernels, without_failed
from engine.kernels.token_loss import TokenPass
from engine.kernels.vocab_loss import LossPass
from engine.kernels.vocab_loss import row_loss as plain_row_loss

ancestor_attention = pytest.importorskip(
    "engine.kernels.ancestor_attention", reason="Triton is not installed"
).ancestor_attention
from engine.kernels import fp8_linear as fp8_linear_file  # noqa: E402
from engine.kernels import head_stats as head_stats_file  # noqa: E402
from engine.kernels import row_loss as row_loss_file  # noqa: E402
from engine.kernels import token_permute as token_permute_file  # noqa: E402
from engine.kernels import token_row_loss as token_row_loss_file  # noqa: E402
from engine.kernels.anchored_attention import anchored_attention  # noqa: E402
from tests.kernels.plain_flash import PLAIN  # noqa: E402

CPU = torch.device("cpu")
GPU = torch.device("cuda")
DEVICE = GPU if torch.cuda.is_available() else CPU
TRITON = Kernels(ancestor_attention, loss_pass=LossPass(row_loss_file.row_loss, in_place=True), reason="Triton")
BLOCKS = Kernels(anchored_attention=anchored_attention, token_pass=TokenPass(token_row_loss_file.token_row_loss))
TARGET = TargetKernels(
    PackedAttention(PLAIN, "stand-in"),
    fp8_linear_file.fp8_linear,
    head_stats=head_stats_file.head_stats,
)


@pytest.fixture(autouse=True)
def small_cases(monkeypatch):
    """Keep the interpreter's time short; sizes stay odd, and each kernel still needs two blocks."""
    monkeypatch.setattr(check_cases, "LENGTHS", (1, 4, 6))
    monkeypatch.setattr(check_cases, "BLOCK_LENGTHS", (2, 9))
    monkeypatch.setattr(check_cases, "NUM_SLOTS", 7)
    monkeypatch.setattr(check_cases, "SLOTS_PER_CHUNK", 4)
    monkeypatch.setattr(check_cases, "VOCAB_SIZE", 67)
    monkeypatch.setattr(row_loss_file, "MAX_BLOCK_U", 64)
    monkeypatch.setattr(token_row_loss_file, "MAX_BLOCK_V", 64)
    monkeypatch.setattr(check_cases, "FP8_COUNTS", (3, 0, 2))
    monkeypatch.setattr(check_cases, "FP8_SIZES", (160, 320))
    monkeypatch.setattr(check_cases, "FP8_MANY", 7)
    monkeypatch.setattr(fp8_linear_file, "MANY_ROWS", 7)
    monkeypatch.setattr(check_cases, "PERMUTED", (3, 2, 67))
    monkeypatch.setattr(token_permute_file, "MAX_BLOCK_D", 64)
    monkeypatch.setattr(flash, "available_flash", lambda: PLAIN)


def checks_of(kernels=TRITON, target=None, dtype=torch.float32, cache_dir=None, head_dim=16):
    found = check_kernels(kernels, DEVICE, dtype, cache_dir, target=target, head_dim=head_dim)
    return {check.name: check for check in found}


class BreaksBackward(torch.autograd.Function):
    """The identity, with a gradient that is wrong."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


def another_rms_norm() -> Elementwise:
    """Operations of which one is not plain PyTorch's, and right."""
    return Elementwise(rms_norm=lambda *arguments: rms_norm(*arguments))


def wrong_attention(*arguments):
    output, lse = ancestor_attention(*arguments)
    row = output.shape[0] // 2
    return torch.cat((output[:row], output[row : row + 1] * 1.5, output[row + 1 :])), lse


def wrong_backward(query, *others):
    return ancestor_attention(BreaksBackward.apply(query), *others)


def wrong_log_sum_exp(*arguments):
    output, lse = ancestor_attention(*arguments)
    return output, lse + 0.01


def raising(*arguments, **options):
    raise RuntimeError("out of resource: shared memory")


def nan_of_one_row(chunk, with_gradients):
    stats_4r = row_loss_file.row_loss(chunk, with_gradients)
    stats_4r[0, 0] = torch.nan
    return stats_4r


def gradient_of_another_row(chunk, with_gradients):
    stats_4r = row_loss_file.row_loss(chunk, with_gradients)
    chunk.logits_rU.copy_(chunk.logits_rU.roll(1, 0))
    return stats_4r


BROKEN_ATTENTION = {
    "one row is wrong": (wrong_attention, "result 0 errs"),
    "the gradient is wrong": (wrong_backward, "gradient of argument 0 errs"),
    "the log-sum-exp is wrong": (wrong_log_sum_exp, "result 1 errs"),
    "it raises": (raising, "RuntimeError: out of resource"),
    "one head is missing": (
        lambda *arguments: tuple(x[:, 1:] for x in ancestor_attention(*arguments)),
        "has the shape",
    ),
}
BROKEN_LOSS = {
    "a number is NaN": (nan_of_one_row, "is not finite"),
    "gradients are in the wrong rows": (gradient_of_another_row, "gradient of argument"),
    "it raises": (raising, "RuntimeError: out of resource"),
}


def test_sound_kernels_pass():
    checks = checks_of(flash_where_dense(TRITON), TARGET, torch.float16)
    of_the_draft = ["prefix_flash", "ancestor_attention", "row_loss"]
    assert list(checks) == [*of_the_draft, "packed_attention", "head_stats", "fp8_linear"]
    for check in checks.values():
        assert check.ok and not check.message, check
        assert 0 < check.error <= check.bound < 0.02


def test_what_plain_pytorch_computes_is_not_checked():
    assert checks_of(Kernels(), TargetKernels()) == {}
    assert checks_of(package.choose_kernels("reference", DEVICE, torch.float32, 16)) == {}


@pytest.mark.parametrize("kind", BROKEN_ATTENTION)
def test_an_attention_that_is_wrong_is_replaced(kind):
    broken, message = BROKEN_ATTENTION[kind]
    kernels = replace(TRITON, attention=broken)
    checks = checks_of(Kernels(broken))
    assert not checks["ancestor_attention"].ok
    assert message in checks["ancestor_attention"].message
    sound = without_failed(kernels, {"ancestor_attention"})
    assert sound.attention is blocked_attention.ancestor_attention
    assert sound.loss_pass is kernels.loss_pass and "ancestor_attention" in sound.reason


@pytest.mark.parametrize("kind", BROKEN_LOSS)
def test_a_loss_that_is_wrong_is_replaced(kind):
    broken, message = BROKEN_LOSS[kind]
    kernels = replace(TRITON, loss_pass=LossPass(broken, in_place=True))
    checks = checks_of(Kernels(loss_pass=kernels.loss_pass))
    assert not checks["row_loss"].ok
    assert message in checks["row_loss"].message
    sound = without_failed(kernels, {"row_loss"})
    assert sound.loss_pass == LossPass(plain_row_loss) and sound.attention is kernels.attention


def test_kernels_of_draft_blocks_that_are_wrong_are_replaced():
    assert all(check.ok for check in checks_of(BLOCKS).values())

    def wrong_keys(query_QHE, key_TGE, *others):
        return anchored_attention(query_QHE, BreaksBackward.apply(key_TGE), *others)

    def without_total_variation(chunk, with_gradients):
        terms = replace(chunk.terms, total_variation=0.0)
        return token_row_loss_file.token_row_loss(replace(chunk, terms=terms), with_gradients)

    broken = Kernels(anchored_attention=wrong_keys, token_pass=TokenPass(without_total_variation))
    checks = checks_of(broken)
    assert "gradient of argument 1 errs" in checks["anchored_attention"].message
    assert "gradient of argument 0 errs" in checks["token_row_loss"].message
    sound = without_failed(broken, set(checks))
    assert sound.anchored_attention is anchored_blocks.anchored_attention and sound.token_pass == TokenPass()
    assert "anchored_attention, token_row_loss" in sound.reason


def test_flash_attention_gives_way_to_the_other_attention():
    both = flash_where_dense(TRITON)
    without_flash = without_failed(both, {"prefix_flash"})
    assert without_flash.attention is ancestor_attention
    without_other = without_failed(both, {"ancestor_attention"})
    assert without_other.attention == FlashWhereDense(blocked_attention.ancestor_attention)
    neither = without_failed(both, {"prefix_flash", "ancestor_attention"})
    assert neither.attention is blocked_attention.ancestor_attention
    assert without_failed(both, set()) is both


def test_a_broken_flash_attention_is_told_from_the_other_one(monkeypatch):
    monkeypatch.setattr(flash, "available_flash", lambda: replace(PLAIN, backward=raising))
    checks = checks_of(flash_where_dense(replace(TRITON, loss_pass=LossPass())))
    assert not checks["prefix_flash"].ok and checks["ancestor_attention"].ok


@pytest.mark.parametrize("name", self_check.ELEMENTWISE)
def test_an_elementwise_operation_that_is_wrong_is_replaced_alone(name):
    plain = Elementwise()

    def sound(*arguments):
        return getattr(plain, name)(*arguments)

    def wrong(*arguments):
        results = getattr(plain, name)(*arguments)
        if isinstance(results, tuple):
            return results[0], 1.01 * results[1]
        return 1.01 * results

    others = replace(plain, **{name: sound})
    assert checks_of(Kernels(elementwise=others))[name].ok
    broken = Kernels(elementwise=replace(plain, **{name: wrong}))
    assert not checks_of(broken)[name].ok
    assert without_failed(broken, {name}).elementwise == plain


def test_a_target_s_kernel_that_is_wrong_is_replaced(monkeypatch):
    monkeypatch.setattr(package, "_failed", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def wrong(*arguments):
        return 1.01 * fp8_linear_file.fp8_linear(*arguments)

    silent = replace(PLAIN, forward=lambda inputs: tuple(0 * x for x in PLAIN.forward(inputs)))

    def last_of_equals(logits_NV, transform):
        best_N, argmax_N, lse_N = head_stats_file.head_stats(logits_NV.flip(1), transform)
        return best_N, logits_NV.shape[1] - 1 - argmax_N, lse_N

    target = TargetKernels(PackedAttention(silent, ""), wrong, head_stats=last_of_equals)
    checks = checks_of(Kernels(), target)
    failed = {check.name for check in checks.values() if not check.ok}
    assert failed == {"packed_attention", "fp8_linear", "head_stats"}
    assert choose_target_kernels(GPU, torch.bfloat16, fp8=True).fp8_linear is not None
    stop_using(failed)
    assert choose_target_kernels(GPU, torch.bfloat16, fp8=True) == TargetKernels()
    chosen = choose_packed_attention(GPU, torch.bfloat16)
    assert chosen.flash is None and "failed its self-check" in chosen.reason
    assert packed_attention.in_blocks  # what `PackedAttention` runs without flash attention


def test_token_permute_that_is_wrong_is_replaced(monkeypatch):
    monkeypatch.setattr(package, "_failed", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    triton_functions = choose_token_permute(GPU)
    assert choose_target_kernels(GPU, torch.bfloat16, experts=True).token_permute == triton_functions
    for dtype in (torch.float32, torch.float16):  # the interpreter cuts numbers off where it stores them as bf16
        assert checks_of(Kernels(), TargetKernels(token_permute=triton_functions), dtype)["token_permute"].ok

    def unweighted(rows_MD, place_TJ, out_TD, weight_TJ=None):
        return triton_functions.unpermute_rows(rows_MD, place_TJ, out_TD)

    broken = replace(triton_functions, unpermute_rows=unweighted)
    assert not checks_of(Kernels(), TargetKernels(token_permute=broken))["token_permute"].ok
    stop_using({"token_permute"})
    assert choose_token_permute(GPU) == TokenPermute()
    assert choose_target_kernels(GPU, torch.bfloat16, experts=True).token_permute is None


def test_results_are_kept_until_something_changes(tmp_path, monkeypatch):
    runs = []

    def counted(*arguments):
        runs.append(1)
        return wrong_attention(*arguments)

    kernels = replace(Kernels(), attention=counted)
    first = checks_of(kernels, cache_dir=tmp_path)
    num_runs = len(runs)
    assert checks_of(kernels, cache_dir=tmp_path) == first and len(runs) == num_runs
    checks_of(kernels, cache_dir=tmp_path, dtype=torch.float16)
    assert len(runs) > num_runs
    num_runs = len(runs)
    monkeypatch.setattr(kernel_cache, "_version", lambda package: "another")
    checks_of(kernels, cache_dir=tmp_path)
    assert len(runs) > num_runs
    assert len(list(tmp_path.iterdir())) == 2  # a file for each environment, and nothing partial


def test_a_kernel_that_raised_stays_replaced_and_the_file_is_json(tmp_path):
    kernels = replace(Kernels(), attention=raising)
    first = checks_of(kernels, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()

    def refuse(name):
        raise AssertionError(f"{name} is not valid JSON")

    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert set(content) == {"environment", "self_check"}
    assert checks_of(replace(Kernels(), attention=wrong_attention), cache_dir=tmp_path) == first


@pytest.mark.parametrize("text", ["", "{", "[]", '{"self_check": []}', '{"self_check": {}}'])
def test_a_damaged_file_counts_as_none(tmp_path, text):
    kernels = replace(Kernels(), elementwise=another_rms_norm())
    checks_of(kernels, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(text, encoding="utf-8")
    assert checks_of(kernels, cache_dir=tmp_path)["rms_norm"].ok
    assert json.loads(path.read_text(encoding="utf-8"))["self_check"]


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    kernels = replace(Kernels(), elementwise=another_rms_norm())
    assert checks_of(kernels, cache_dir=tmp_path / "file" / "cache")["rms_norm"].ok


def test_ranks_agree_and_every_replacement_is_announced(tmp_path):
    lines = []
    here = SelfCheck(DEVICE, tmp_path, lambda flags: flags, lines.append, even_on_cpu=True)
    broken = Kernels(wrong_attention, elementwise=another_rms_norm())
    sound = here.sound(broken, torch.float32, 16)
    assert sound.attention is blocked_attention.ancestor_attention
    assert sound.elementwise == broken.elementwise
    (line,) = lines
    assert "ancestor_attention" in line and "report" in line and str(tmp_path) in line

    elsewhere = replace(here, any_rank=lambda flags: [True] * len(flags))
    assert elsewhere.sound(broken, torch.float32, 16).elementwise == Elementwise()
    assert "another rank" in lines[-1]
    on_cpu = replace(here, device=CPU, even_on_cpu=False)
    assert on_cpu.sound(broken, torch.float32, 16) is broken


def test_a_device_that_a_kernel_left_unusable_ends_the_run_and_is_remembered(tmp_path, monkeypatch):
    def unusable(name, device):
        raise RuntimeError(f"the kernel {name} left {device} unusable")

    monkeypatch.setattr(self_check, "_check_device", unusable)
    kernels = Kernels(raising, elementwise=another_rms_norm())
    with pytest.raises(RuntimeError, match="ancestor_attention left"):
        checks_of(kernels, cache_dir=tmp_path)
    checks = checks_of(kernels, cache_dir=tmp_path)  # the next start does without it
    assert not checks["ancestor_attention"].ok and checks["rms_norm"].ok


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == CPU, reason="no CUDA device: the kernels are interpreted above")
def test_on_a_gpu_every_kernel_passes():
    chosen = package.choose_kernels("auto", GPU, torch.bfloat16, 128)
    target = choose_target_kernels(GPU, torch.bfloat16, fp8=True, fp8_activations=True, experts=True)
    for check in checks_of(chosen, target, torch.bfloat16, head_dim=128).values():
        assert check.ok, check
