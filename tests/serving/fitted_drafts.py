"""Block drafters fitted to a few replies of a target, which accept long chains there after little training."""

from collections.abc import Sequence
from pathlib import Path

import torch

from engine.batch import PackedBatch
from engine.config.block_sections import BlockSection
from engine.config.sections import Config, DataSection, DraftSection, TargetSection
from engine.evaluation.decoding import plain_decode
from engine.hidden_states.micro_batches import MicroBatchMaker
from engine.kernels import PLAIN
from engine.models.block_drafter.block_method import BlockMethod
from engine.models.method_registry import make_method
from engine.models.normaliser import Normaliser
from engine.models.vocab_map import VocabMap
from engine.parallel.mesh import World
from engine.target.configuration import load_target_config
from engine.target.frozen import FrozenTarget

LEARNING_RATE = 3e-3
CPU = torch.device("cpu")

RANKS = {"dspark": {"markov_rank": 32}, "dflash2": {"selector_rank": 32}}


def block_recipe(method: str, target: Path, num_tokens: int) -> Config:
    """Return the recipe of a draft of two layers. num_tokens: that a block drafts."""
    block_size = num_tokens if method == "dspark" else num_tokens + 1
    return Config(
        target=TargetSection(path=str(target), dtype="float32"),
        data=DataSection(max_tokens=4096),
        draft=DraftSection(method=method, num_layers=2),
        block=BlockSection(size=block_size, mask_token_id=0, anchors=None, **RANKS.get(method, {})),
    )


def write_fitted_draft(recipe: Config, prompts: Sequence[list[int]], new_tokens: int, num_steps: int, folder: Path) -> None:
    """Fit a block drafter to the target's replies to some prompts, and export it.

    new_tokens: per reply. num_steps: optimizer steps, each on all replies.
    """
    torch.manual_seed(0)
    method = make_method(recipe)
    assert isinstance(method, BlockMethod)
    config = method.derive_config(load_target_config(recipe.target), None)
    target = FrozenTarget.load(recipe.target, CPU, config.aux_layers)
    every_token = VocabMap.whole(config.vocab_size)
    draft = method.new_draft(config, PLAIN, target, every_token)
    objective = method.make_objective(target, every_token)
    micro = MicroBatchMaker(method, target, torch.float32, CPU)(replies(target, prompts, new_tokens))
    (norms,) = Normaliser(objective, lambda micro, norms: objective(draft, micro, norms), World.alone())([micro])
    trained = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    for _ in range(num_steps):
        optimizer.zero_grad()
        objective(draft, micro, norms).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    method.export(folder, draft.state_dict().items(), config, every_token, None)


def replies(target: FrozenTarget, prompts: Sequence[list[int]], new_tokens: int) -> PackedBatch:
    """Return the prompts with the target's greedy replies, of which the replies carry loss."""
    documents = []
    masks = []
    for prompt in prompts:
        reply = plain_decode(target, prompt, new_tokens, eos_ids=()).token_ids
        documents.append(torch.tensor([*prompt, *reply]))
        masks.append(torch.arange(len(documents[-1])) >= len(prompt))
    lengths = torch.tensor([0, *map(len, documents)])
    return PackedBatch(torch.cat(documents), torch.cat(masks), lengths.cumsum(0).int())
