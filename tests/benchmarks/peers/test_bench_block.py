"""DraftSpeed's side learns the objectives of the peers, written out here in plain PyTorch, and the figures have their keys."""

import json
import sys

import pytest
import torch

from benchmarks.peers import bench_block
from benchmarks.peers.block_task import DSPARK, METHODS, SPECULATORS, BlockTask
from benchmarks.peers.serve_block_draftspeed import make_step, method_of

TINY = dict(hidden_size=32, intermediate_size=48, num_heads=4, num_key_value_heads=2, head_dim=8, num_layers=2, num_aux=2)
TINY |= dict(vocab_size=64, num_tokens=40, markov_rank=4, anchors=6, block_size=4, decay=4.0)
CASES = [(peer, method) for peer in bench_block.COMPARED for method in METHODS]
KEYS = {
    "peer",
    "method",
    "anchors",
    "block_size",
    "speedup",
    "memory_ratio",
    "max_relative_loss_difference",
    "max_relative_gradient_difference",
}


def tiny_task(peer: str, method: str) -> BlockTask:
    return BlockTask(method=method, peer=peer, **TINY, device="cpu", dtype="float32")


def expected_loss(task: BlockTask, hidden_RD: torch.Tensor) -> torch.Tensor:
    """Compute the peer's loss of final states, block by block, from the formulas of its code.

    hidden_RD: of the rows with loss; those of each block follow one another.
    """
    tensors = task.tensors()
    is_dspark = task.method == DSPARK
    num_predictions = task.num_predictions
    # Slot `u` is where the target predicts the label `x[u + 1]`.
    slot_NS = tensors.anchor_N[:, None] + torch.arange(num_predictions)
    ids_T = tensors.input_ids_T
    hidden_NSD = hidden_RD.view(task.anchors, num_predictions, -1)
    logits_NSV = hidden_NSD @ tensors.head_VD.T
    target_NSV = tensors.last_hidden_TD[slot_NS] @ tensors.head_VD.T
    weights = tensors.weights
    if is_dspark:
        embed_NSr = weights["markov_head.markov_w1.weight"][ids_T[slot_NS]]
        logits_NSV = logits_NSV + embed_NSr @ weights["markov_head.markov_w2.weight"].T
    label_NS = target_NSV.argmax(-1) if task.peer == SPECULATORS else ids_T[slot_NS + 1]
    loss_NS = torch.nn.functional.cross_entropy(logits_NSV.flatten(0, 1), label_NS.flatten(), reduction="none")
    loss_NS = loss_NS.view_as(label_NS)
    if is_dspark:
        l1_NS = (logits_NSV.softmax(-1) - target_NSV.softmax(-1)).abs().sum(-1)
        distance_NS = l1_NS / 2 if task.peer == SPECULATORS else l1_NS
        features = torch.cat((hidden_NSD, embed_NSr), -1)
        logit_NS = (features @ weights["confidence_head.proj.weight"].T + weights["confidence_head.proj.bias"])[..., 0]
        confidence = torch.nn.functional.binary_cross_entropy_with_logits
        loss_NS = 0.1 * loss_NS + 0.9 * distance_NS + confidence(logit_NS, 1 - l1_NS / 2, reduction="none")
    weight_S = torch.exp(-torch.arange(num_predictions) / task.decay)
    divisor = slot_NS.numel() + 1e-5 if task.peer == SPECULATORS else weight_S.sum() * task.anchors
    return (loss_NS * weight_S).sum() / divisor


@pytest.mark.parametrize(("peer", "method"), CASES)
def test_draftspeed_learns_the_objective_of_the_peer(peer, method):
    task = tiny_task(peer, method)
    draft, forward = make_step(task)
    states = []
    draft.norm.register_forward_hook(lambda _module, _inputs, hidden_RD: states.append(hidden_RD.detach()))
    loss, losses = forward()
    loss.backward()
    torch.testing.assert_close(losses[0], expected_loss(task, states[0]), rtol=1e-5, atol=0)
    assert all(parameter.grad is not None for parameter in draft.parameters())


def test_labels_and_anchors_suit_the_rules_of_all_trainers():
    task = tiny_task(SPECULATORS, DSPARK)
    anchor_N = task.tensors().anchor_N
    assert len(anchor_N.unique()) == task.anchors
    assert anchor_N.min() >= 1
    assert anchor_N.max() + task.block_size < task.num_tokens
    assert method_of(task).rule.divisor == "rows"


def test_figures_have_the_keys_that_are_promised(tmp_path, monkeypatch):
    figures = {"speedup": 2.0, "memory_ratio": 0.3, "quartiles": [1.9, 2.1], "spread": 0.1, "too_wide": False, "busy": False}
    figures |= {"waited_share": None, "seconds": [1.0, 2.0], "peak_bytes": [1, 2], "warning": None}
    figures |= {"max_relative_loss_difference": 0.0, "max_relative_gradient_difference": 0.0}
    commands = []

    def compare(sides, _tolerances, _rounds):
        commands.append([side.module for side in sides])
        return figures | {"peer": sides[1].name}

    monkeypatch.setattr(bench_block, "compare", compare)
    monkeypatch.setattr(bench_block.PEERS[SPECULATORS].__class__, "install", lambda *_: None)
    path = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["bench_block", "--shape", "cpu-tiny", "--device", "cpu", "--json", str(path)])
    bench_block.main()
    cases = json.loads(path.read_text())
    assert [(case["peer"], case["method"]) for case in cases] == CASES
    assert all(case.keys() >= KEYS for case in cases)
    assert commands[0] == ["benchmarks.peers.serve_block_draftspeed", "benchmarks.peers.serve_block_specforge"]
    assert path.with_suffix(".machine.json").exists()
