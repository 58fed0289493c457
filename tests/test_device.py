"""On a fake CUDA device no job mixes devices, and the host waits only where it has to."""

import json

import pytest
import torch

from engine.target.frozen import FrozenTarget
from tests.device_jobs import forward_of, random_batch, run_capture, run_training, training_options
from tests.device_tensors import DEVICE, values_of
from tests.fake_device import FakeDevice, Wait
from tests.parallel.families import tiny_model

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here")

# Where the host may wait for the device, and why. Stages of which a run has one: reason.
ONCE_PER_RUN = {
    "": "before the first stage",
    "between stages": "modules are moved, files are written",
    "Reading the data": "the vocabulary map is checked and moved",
    "Loading the target": "weights are read, and the head is compared with the model's logits",
    "Exporting": "weights are written, read again and compared",
}
# Elsewhere: (file, function): reason.
ONCE_PER_STAGE = {
    ("engine/models/draft_layers.py", "cos_sin"): "rotary frequencies are moved",
    ("engine/models/eagle3/unroll.py", "_weight_S"): "weights of the steps are moved",
    ("engine/evaluation/evaluator.py", "_reports"): "sums of all ranks",
    ("engine/hidden_states/capture.py", "run"): "the bytes that all ranks wrote are printed",
}
EVERY_MICRO_BATCH = {
    ("engine/models/eagle3/row_plan.py", "_read_counts"): "the number of rows depends on the target; one read of all counts",
}
EVERY_LOGGED_STEP = {
    ("engine/host/pinned_copy.py", "wait"): "metrics, a step late, when the device has passed them",
}
DECODING = {
    ("engine/evaluation/evaluator.py", "_first_fault"): "whether the target is finite, once per prompt",
    ("engine/evaluation/replay.py", "__init__"): "prompts come from the host, once per batch",
    ("engine/evaluation/replay.py", "decode_one_token"): "tokens and states go to the host, once per forward",
    ("engine/models/eagle3/drafts_along.py", "_read_replies"): "tokens come from the host, once per batch of replies",
    ("engine/models/eagle3/drafts_along.py", "<genexpr>"): "tokens and states come from the host, as above",
    ("engine/models/eagle3/drafts_along.py", "propose_along"): "drafted tokens go to the host, once per batch of replies",
}
STORING = {
    ("engine/hidden_states/store_writer.py", "_left_out"): "a writing thread waits, and nobody waits for it",
}


def unexpected(waits: list[Wait], *allowed: dict[tuple[str, str], str]) -> set[Wait]:
    """Waits at places that are on none of the lists."""
    places = {place for one in (ONCE_PER_STAGE, *allowed) for place in one}
    outside = [wait for wait in waits if wait.stage not in ONCE_PER_RUN]
    return {wait for wait in outside if (wait.file, wait.function) not in places}


@pytest.fixture(scope="module")
def training(tmp_path_factory, tiny_target, tiny_corpus):
    """A run from data to report: its output folder, its draft, and what the host waited for."""
    folder = tmp_path_factory.mktemp("run")
    with FakeDevice() as fake:
        draft = run_training(training_options(folder, tiny_target, tiny_corpus.train, tiny_corpus.held_out))
    return folder, draft, fake.waits


def test_a_run_waits_for_the_device_only_where_it_has_to(training):
    _, _, waits = training
    training = [wait for wait in waits if wait.stage == "Training"]
    assert training
    assert not unexpected(training, EVERY_MICRO_BATCH, EVERY_LOGGED_STEP)
    evaluation = [wait for wait in waits if wait.stage.startswith("Measuring")]
    assert evaluation
    assert not unexpected(evaluation, DECODING)
    assert not unexpected(waits, EVERY_MICRO_BATCH, EVERY_LOGGED_STEP, DECODING)


def test_a_run_on_the_device_trains_exports_and_measures(training):
    folder, _, _ = training
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert (folder / "draft" / "model.safetensors").is_file()


def test_a_training_step_waits_and_launches_no_more_than_counted(training):
    _, draft, _ = training
    (step,) = draft.steps
    places = [(wait.file, wait.function) for wait in step.waits]
    unlogged = [place for place in places if place not in EVERY_LOGGED_STEP]
    assert len(unlogged) <= 1
    # with five layers of the target, two TTT steps and an optimizer that loops over weights
    assert step.launches <= 977


@pytest.mark.parametrize(
    ("family", "launches"), [("llama", 223), ("qwen3_moe", 335), ("gemma3_text", 428), ("llama4_text", 289)]
)
def test_a_targets_forward_waits_and_launches_no_more_than_counted(family, launches):
    with FakeDevice():
        step = forward_of(tiny_model(family).bfloat16(), (0, 1, 2))
    assert not step.waits
    assert step.launches <= launches


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_target_says_there_what_it_says_on_a_cpu(family):
    torch.manual_seed(0)
    model = tiny_model(family)
    target = FrozenTarget(model, (0, 1, 2))
    batch = random_batch((9, 14, 5), target.config.vocab_size)
    slots_N = torch.arange(1, 28, 2)
    expected = target(batch, slots_N)
    with FakeDevice():
        output = FrozenTarget(model.to(DEVICE), (0, 1, 2))(batch, slots_N)
    for name, value in vars(expected).items():
        torch.testing.assert_close(values_of(getattr(output, name)), value, rtol=1e-4, atol=1e-4)


def test_a_capture_waits_for_the_device_only_where_it_has_to(tmp_path, tiny_target, tiny_corpus):
    with FakeDevice() as fake:
        report = run_capture(tmp_path / "store", tiny_target, tiny_corpus.train)
    assert report.num_tokens == 600
    assert not unexpected(fake.waits, EVERY_MICRO_BATCH, STORING)
