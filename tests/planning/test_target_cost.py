"""What is computed for a target from its configuration is what a rank really holds, multiplies and sends."""

import gc
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from engine.batch import PackedBatch
from engine.config.sections import TargetSection
from engine.kernels import matmul
from engine.parallel.mesh import ALONE, Group, TargetMesh
from engine.planning.target_cost import Forward, TargetCost
from engine.target.frozen import FrozenTarget
from engine.target.structure import without_weights
from engine.weights.quantised_checkpoint import StaysQuantised
from tests.collectives import CountCollectives
from tests.distributed import run_ranks
from tests.live_bytes import LiveBytes
from tests.parallel.families import tiny_config, tiny_model
from tests.weights.test_quantised_checkpoint import to_fp8, to_int4

LENGTHS = (9, 7)
TOKENS = sum(LENGTHS)
SLOTS = torch.tensor([3, 4, 11])
FAMILIES = ("llama", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "phi3", "gemma2", "mixtral")
FAMILIES += ("qwen3_next", "minimax", "nemotron_h")
MESHES = {"tp 2": (2, 1), "ep 2": (1, 2), "tp 2, ep 2": (2, 2)}
AUX_LAYERS = (0, 1, 2)


def forward() -> Forward:
    return Forward(TOKENS, len(SLOTS), sum(length * (length + 1) // 2 for length in LENGTHS))


def cost(family: str, tp_size: int = 1, ep_size: int = 1) -> TargetCost:
    mesh = TargetMesh(Group(tp_size, 0), Group(ep_size, 0))
    return TargetCost(without_weights(tiny_config(family), TargetSection(), torch.device("cpu")), mesh)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_head_that_does_not_run_costs_nothing(tp_size):
    runs = cost("llama", tp_size)
    rests = TargetCost(runs.model, runs.mesh, runs_head=False)
    head = runs.model.get_output_embeddings().weight
    assert runs.flops(forward()) - rests.flops(forward()) == 2 * len(SLOTS) * head.numel()
    no_longer_sent = runs.traffic(forward()).keys() - rests.traffic(forward()).keys()
    assert no_longer_sent == ({"all-gather of slots (head)"} if tp_size > 1 else set())
    assert runs.least_bytes(forward(), 3) - rests.least_bytes(forward(), 3) == -(-head.nbytes // tp_size)


def batch() -> PackedBatch:
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return PackedBatch(torch.arange(TOKENS) % 32, torch.ones(TOKENS, dtype=torch.bool), cu_seqlens)


def shared_forward(world, families: tuple[str, ...], sizes: tuple[int, int]) -> dict[str, tuple[int, dict[str, int]]]:
    """Bytes of a rank's weights, and bytes of states and token ids in a forward's collectives by kind."""
    found = {}
    mesh = TargetMesh.make(world, *sizes)
    for family in families:
        target = FrozenTarget(tiny_model(family), AUX_LAYERS, mesh=mesh)
        held = sum(weight.nbytes for weight in {*target.model.parameters()})
        with CountCollectives() as count:
            target(batch(), SLOTS)
        calls = count.issued
        found[family] = held, {kind: calls.num_bytes("between", kind) for kind in ("_allgather_base", "reduce_scatter")}
    return found


@pytest.mark.parametrize("sizes", MESHES)
def test_weights_are_those_a_rank_holds(sizes):
    families = (
        FAMILIES if MESHES[sizes][1] == 1 else tuple(name for name in FAMILIES if cost(name, *MESHES[sizes]).plan.experts)
    )
    found = run_ranks(shared_forward, 2, families, MESHES[sizes])[0]
    for family, (held, _) in found.items():
        assert cost(family, *MESHES[sizes]).weight_bytes == held, family


@pytest.mark.parametrize("layout", ["fp8", "int4", "dequantised"])
def test_weights_that_stay_quantised_are_counted_so(layout, tmp_path):
    tiny_model("deepseek_v3").save_pretrained(tmp_path)
    to_int4(tmp_path, group=8) if layout == "int4" else to_fp8(tmp_path, (8, 8))
    section = TargetSection(path=str(tmp_path), keep_quantised="none" if layout == "dequantised" else "all", dtype="bfloat16")
    target = FrozenTarget.load(section, torch.device("cpu"), AUX_LAYERS)
    config = AutoConfig.from_pretrained(tmp_path)
    quantised = StaysQuantised.of(config, section.keep_quantised)
    config.quantization_config = None
    planned = TargetCost(without_weights(config, section, torch.device("cpu")), ALONE, quantised)
    held = sum(weight.nbytes for weight in {*target.model.parameters()})
    # weights this small end within blocks, and are given scales in fp32
    assert planned.weight_bytes == pytest.approx(held, rel=0 if quantised is None else 0.1)
    assert (quantised is None) == (layout == "dequantised")


@pytest.mark.parametrize("tied", [False, True])
def test_a_forward_reads_each_weight_once_and_of_the_embedding_only_rows(tied):
    config = tiny_config("llama")
    config.tie_word_embeddings = tied
    planned = TargetCost(without_weights(config, TargetSection(), torch.device("cpu")), ALONE)
    model = tiny_model("llama")
    layers = sum(weight.nbytes for name, weight in model.model.named_parameters() if "embed_tokens" not in name)
    row = 4 * config.hidden_size  # fp32
    written = (len(AUX_LAYERS) * TOKENS + TOKENS + len(SLOTS)) * row
    head = model.lm_head.weight.nbytes  # which a tied model reads as a whole too
    assert planned.least_bytes(forward(), len(AUX_LAYERS)) == layers + head + TOKENS * row + written


def causal_flops(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    """Of PyTorch's attention on a CPU, which its counter does not know: scores and outputs of the keys that are not masked."""
    batch_size, heads, length, width = query_shape
    return 2 * batch_size * heads * length * (length + 1) // 2 * (width + value_shape[-1])


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3", "mixtral"])
def test_flops_are_those_that_products_take(family, monkeypatch):
    # In fp32 the head's product may go to oneDNN, which the counter does not see; so does bf16 on CPUs without such products.
    monkeypatch.setattr(matmul, "_has_fast_products", lambda dtype: True)
    model = tiny_model(family).to(torch.bfloat16)
    model.set_experts_implementation("eager")
    target = FrozenTarget(model, AUX_LAYERS)
    known = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: causal_flops}
    with FlopCounterMode(display=False, custom_mapping=known) as counted, torch.no_grad():
        target(batch(), SLOTS)
    planned = cost(family).flops(forward())
    if family == "deepseek_v3":  # its values are padded to the width of its keys
        config = target.config
        padding = config.qk_nope_head_dim + config.qk_rope_head_dim - config.v_head_dim
        planned += 2 * forward().num_pairs * config.num_attention_heads * padding * config.num_hidden_layers
    assert counted.get_total_flops() == planned


@pytest.mark.parametrize("family", ["llama", "qwen3_5_text"])
def test_traffic_of_tensor_parallelism_is_what_is_sent(family):
    (_, sent), planned = run_ranks(shared_forward, 2, (family,), (2, 1))[0][family], cost(family, 2).traffic(forward())
    # the whole of both ranks' rows is counted at the call, of which each sends the other's half, or its own half
    assert sent["reduce_scatter"] == 2 * planned["reduce-scatter of tokens (TP)"]
    of_states = 2 * (planned["all-gather of tokens (TP)"] + planned["all-gather of slots (head)"])
    assert sent["_allgather_base"] == of_states + 2 * batch().input_ids_T.nbytes  # the embedding is asked for token ids


def test_traffic_of_experts_is_what_an_even_router_sends():
    torch.manual_seed(0)
    planned = cost("qwen3_moe", 1, 2)
    config = tiny_config("qwen3_moe")
    num_tokens = 100_000
    chosen_TK = torch.rand(num_tokens, config.num_experts).topk(config.num_experts_per_tok).indices
    share = (chosen_TK >= config.num_experts // 2).any(-1).float().mean().item()  # of tokens that the other rank is sent
    states = len(planned.plan.experts) * TOKENS * config.hidden_size * planned.itemsize
    error = 3 * (share * (1 - share) / num_tokens) ** 0.5
    assert 0 < share < 1
    assert planned.traffic(forward())["all-to-all of tokens (EP)"] / states == pytest.approx(share, abs=error)


def test_passing_memory_is_near_what_a_forward_takes():
    torch.manual_seed(0)
    target = FrozenTarget(tiny_model("llama"), AUX_LAYERS)
    live = LiveBytes()
    peaks = []
    with live:
        for _ in range(2):
            gc.collect()
            live.peak = 0
            output = target(batch(), SLOTS)
            peaks.append(live.peak)
            del output
    planned = cost("llama")
    most = planned.passing_bytes(forward()) + planned.output_bytes(forward(), num_aux=3)
    assert peaks[-1] / 2 < most < 2 * peaks[-1]


# Attentions of tiny models: also linear attention elsewhere, two in a layer, and those that stay whole on every rank.
PAIRING = {"llama": 4, "qwen3_next": 2, "minimax": 2, "jamba": 1, "longcat_flash": 8, "deepseek_v4": 4, "inkling_text": 4}
PAIRING |= {"zaya": 4, "gemma4_text": 4, "gemma4_unified_text": 4}


@pytest.mark.parametrize(("family", "layers"), PAIRING.items())
def test_only_layers_that_compare_pairs_pay_for_pairs(family, layers):
    planned = cost(family)
    more = planned.flops(replace(forward(), num_pairs=forward().num_pairs + 1)) - planned.flops(forward())
    attentions = list(planned._attentions())
    assert len(attentions) == layers and more == sum(map(planned.pair_flops, attentions)) > 0
    assert planned.passing_bytes(forward()) > 0


def test_quantised_activations_pass_beside_what_they_are_made_of():
    config = tiny_config("llama")
    of_an_input = 1 + 4 / 128
    model = without_weights(config, TargetSection(), torch.device("cpu"))
    plain, quantised = (TargetCost(model, ALONE, StaysQuantised(1.0, False, (), size)) for size in (0.0, of_an_input))
    added = quantised.passing_bytes(forward()) - plain.passing_bytes(forward())
    assert added == pytest.approx(TOKENS * config.intermediate_size * of_an_input, abs=1), "the MLP's are the widest"


def test_sizes_that_do_not_fit_are_named():
    assert not cost("llama", 2).misfits
    assert "cannot be shared by 3 ranks" in cost("llama", 3).misfits[0]
