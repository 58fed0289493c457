"""Command lines of servers."""

import json

import pytest

from engine.config.tree_shape import TreeShape
from engine.serving.draft_kinds import draft_kind
from engine.serving.server_commands import ServerProgram, draft_arguments


def test_a_server_is_started_with_and_without_the_draft():
    program = ServerProgram("vllm", "/env/python", "target", "a draft", ("--max-model-len", "64"))
    plain = program.command(None, "127.0.0.1", 80)
    words = ["/env/python", "-m", "vllm.entrypoints.openai.api_server", "--model", "target", "--host", "127.0.0.1"]
    assert plain == [*words, "--port", "80", "--no-enable-prefix-caching", "--max-model-len", "64"]
    drafted = program.command(TreeShape(3), "127.0.0.1", 80)
    place = drafted.index("--speculative-config")
    assert json.loads(drafted[place + 1]) == {"method": "eagle3", "model": "a draft", "num_speculative_tokens": 3}
    assert drafted[:place] + drafted[place + 2 :] == plain, "the servers differ in their draft only"
    kept = ServerProgram("sglang", "python", "target", "draft", keeps_prefixes=True).command(None, "127.0.0.1", 80)
    assert "--disable-radix-cache" not in kept and "--model-path" in kept


def test_trees_are_refused_for_vllm():
    tree = TreeShape(2, 4, 8)
    arguments = draft_arguments("sglang", tree, "d")
    assert " ".join(arguments).endswith("-num-steps 2 --speculative-eagle-topk 4 --speculative-num-draft-tokens 8")
    with pytest.raises(ValueError, match="chains only, found --topk 4"):
        draft_arguments("vllm", tree, "d")


@pytest.mark.parametrize(
    ("architecture", "algorithm", "method", "tokens"),
    [
        ("DFlashDraftModel", "DFLASH", "dflash", 6),
        ("DFlash2DraftModel", "DFLASH", "dflash", 6),
        ("Qwen3DSparkModel", "DSPARK", "dspark", 7),
    ],
)
def test_servers_draft_whole_blocks_whose_size_sglang_reads_itself(architecture, algorithm, method, tokens):
    kind = draft_kind({"architectures": [architecture], "block_size": 7})
    assert kind is not None
    shape = TreeShape(tokens)
    words = ["--speculative-algorithm", algorithm, "--speculative-draft-model-path", "d"]
    assert draft_arguments("sglang", shape, "d", kind) == words
    written = json.loads(draft_arguments("vllm", shape, "d", kind)[-1])
    assert written == {"method": method, "model": "d", "num_speculative_tokens": tokens}
    for other in (TreeShape(tokens - 1), TreeShape(tokens, 2, 4)):
        with pytest.raises(ValueError, match=f"whole blocks, of {tokens} tokens"):
            draft_arguments("sglang", other, "d", kind)
