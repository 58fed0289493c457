"""What tests of decoding share: tiny targets, a random draft, prompts of odd lengths, a drafter that was told the reply."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.models.drafter import ROOT, TokenTree
from engine.models.eagle3.draft import Eagle3Draft
from engine.models.eagle3.draft_config import Eagle3Config
from engine.models.eagle3.served_draft import ServedEagle3
from engine.models.vocab_map import VocabMap
from engine.parallel.mesh import ALONE, TargetMesh
from engine.target.frozen import FrozenTarget

VOCAB = 41
WIDTH = 24
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
OPTIONS = {
    "llama": {},
    "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS
    | LINEAR
    | {"shared_expert_intermediate_size": 8, "layer_types": ["linear_attention"] * 4 + ["full_attention"]},
}


def tiny_target(family: str, mesh: TargetMesh = ALONE) -> FrozenTarget:
    """A target of random weights, the same ones every time; whole, or this rank's part of it."""
    torch.manual_seed(5)
    config = AutoConfig.for_model(family, **SHAPE, **OPTIONS[family])
    return FrozenTarget(AutoModelForCausalLM.from_config(config, dtype=torch.float32), (0, 1, 3), mesh=mesh)


def random_draft(
    target: FrozenTarget, *, num_layers: int = 1, fc_norm: bool = False, norm_output: bool = False
) -> ServedEagle3:
    """A draft as wide as its target over two thirds of its vocabulary, with norms away from one."""
    torch.manual_seed(1)
    config = Eagle3Config(
        hidden_size=WIDTH,
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        num_hidden_layers=num_layers,
        rms_norm_eps=1e-5,
        hidden_act="silu",
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        vocab_size=VOCAB,
        draft_vocab_size=27,
        target_hidden_size=WIDTH,
        aux_layers=target.aux_layers,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        fc_norm=fc_norm,
        norm_output=norm_output,
        dtype="float32",
    )
    model = Eagle3Draft(config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3 + (1 if parameter.dim() == 1 else 0)
    vocab_map = VocabMap.most_frequent(torch.randint(0, 9, (VOCAB,)), 27)
    return ServedEagle3(model.requires_grad_(False), vocab_map, target.embedding.whole())


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    lengths = [1, 2, 3, *torch.randint(4, 40, (count - 3,), generator=generator).tolist()]
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


class Oracle:
    """Drafts from a reply it was told, wrong at every token whose index satisfies `wrong`.

    width: 1 for a chain; otherwise each token has siblings, and the told one is the last of them.
    """

    def __init__(self, prompt_ids: list[int], reply_ids: list[int], wrong=lambda index: False, depth=5, width=1) -> None:
        self.depth = depth
        self.width = width
        self.told = [(token_id + wrong(index)) % VOCAB for index, token_id in enumerate(reply_ids)]
        self.num_prompt = len(prompt_ids)

    def start(self, token_ids, aux_TA):
        self.read_ids = token_ids[:1]
        self.read_aux = []
        self.extend(token_ids[1:], aux_TA)

    def extend(self, token_ids, aux_QA):
        assert aux_QA.shape == (len(token_ids), 3 * WIDTH)
        self.read_ids += token_ids
        self.read_aux.append(aux_QA)

    def propose(self):
        done = len(self.read_ids) - self.num_prompt
        token_ids = []
        parents = []
        parent = ROOT
        for told in self.told[done : done + self.depth]:
            token_ids += [(told + sibling) % VOCAB for sibling in range(self.width - 1, -1, -1)]
            parents += [parent] * self.width
            parent = len(token_ids) - 1
        return TokenTree(token_ids, parents)
