"""Write the hidden states of some documents to disk as a peer does, for bench_disk_bytes.py.

    python -m benchmarks.peers.write_features --peer NAME --folder FOLDER --documents 4

The states are random, of the width and draft vocabulary of an 8B target, in bf16. No target runs.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.bench_store import DOCUMENT_TOKENS, HIDDEN

DRAFT_VOCAB = 32000
TOP_K = 64
NUM_AUX = 3


def specforge(folder: Path, index: int) -> None:
    """Write the file of one document in the format of SpecForge's scripts/prepare_hidden_states.py.

    The script itself runs SGLang on a GPU. The keys are those that `offline_reader.py` requires.
    """
    from specforge.runtime.data_plane.offline_reader import _OFFLINE_EAGLE3_KEYS

    record = {
        "input_ids": token_ids(),
        "loss_mask": token_ids(),
        "hidden_state": states(HIDDEN)[None],
        "aux_hidden_state": states(NUM_AUX * HIDDEN)[None],
    }
    if record.keys() != set(_OFFLINE_EAGLE3_KEYS):
        raise RuntimeError(f"SpecForge reads the keys {_OFFLINE_EAGLE3_KEYS}, this file writes {tuple(record)}")
    torch.save(record, folder / f"data_{index}.ckpt")


def speculators(folder: Path, index: int) -> None:
    """Write the file of one document as the connector in vLLM does: all captured layers of all tokens."""
    save_file({"hidden_states": layers(), "token_ids": token_ids()}, folder / f"hs_{index}.safetensors")


def speculators_fp8(folder: Path, index: int) -> None:
    """Write the file of one document as the fp8 connector in vLLM does, with its own quantiser."""
    from hs_connectors.fp8_utils import SCALES_KEY, quantize_tensor_to_fp8

    states_TLD, scales_T = quantize_tensor_to_fp8(layers())
    tensors = {"hidden_states": states_TLD, SCALES_KEY: scales_T, "token_ids": token_ids()}
    save_file(tensors, folder / f"hs_{index}.safetensors")


def nemo_automodel(folder: Path, index: int) -> None:
    """Write a shard with NeMo Automodel's `write_shard`, with all probabilities of the draft vocabulary."""
    _nemo_shard(folder, index, {"target_probs": states(DRAFT_VOCAB).softmax(-1)[None]})


def nemo_automodel_top_k(folder: Path, index: int) -> None:
    """Write a shard with NeMo Automodel's `write_shard`, with the 64 largest probabilities per token."""
    from nemo_automodel.components.datasets.llm.eagle3_cache import compress_target_probs

    values_TK, indices_TK = compress_target_probs(states(DRAFT_VOCAB).softmax(-1)[None], TOP_K)
    _nemo_shard(folder, index, {"target_probs_values": values_TK, "target_probs_indices": indices_TK})


def _nemo_shard(folder: Path, index: int, probabilities: dict[str, Tensor]) -> None:
    from nemo_automodel.components.datasets.llm.eagle3_cache import write_shard

    tokens = {name: token_ids()[None] for name in ("input_ids", "attention_mask", "loss_mask")}
    features = {
        "aux_hidden_states": states(NUM_AUX * HIDDEN)[None],
        "position_mask": torch.ones(1, DOCUMENT_TOKENS, 1, dtype=torch.bool),
    }
    write_shard(str(folder), index, tokens | features | probabilities)


def token_ids() -> Tensor:
    return torch.ones(DOCUMENT_TOKENS, dtype=torch.long)


def states(width: int) -> Tensor:
    return torch.randn(DOCUMENT_TOKENS, width).bfloat16()


def layers() -> Tensor:
    return states((NUM_AUX + 1) * HIDDEN).view(DOCUMENT_TOKENS, NUM_AUX + 1, HIDDEN)


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "specforge": specforge,
    "speculators": speculators,
    "speculators_fp8": speculators_fp8,
    "nemo_automodel": nemo_automodel,
    "nemo_automodel_top_k": nemo_automodel_top_k,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=WRITERS, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--documents", type=int, required=True)
    options = parser.parse_args()
    for index in range(options.documents):
        WRITERS[options.peer](options.folder, index)


if __name__ == "__main__":
    main()
