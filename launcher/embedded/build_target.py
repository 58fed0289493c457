"""Train the embedded target: a small Llama on conversations taken from CPython's own documentation.

This script made the target that ships in `launcher/embedded/target`. To make it again, run:

    python launcher/embedded/build_target.py --output launcher/embedded/target

It takes about half an hour on two CPU cores with bf16 matrix units. `launcher/embedded/honesty.py`
evaluates the result.
"""

import argparse
import copy
import json
import math
import random
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import cast

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine.data.cpython_corpus import write_corpus
from engine.host.freed_memory import keep_freed_memory

VOCAB_SIZE = 1024
SPECIAL_TOKENS = ["<|begin|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|user|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAX_TOKENS = 1024
BATCH_TOKENS = 4096
DROPOUT = 0.1
WEIGHT_DECAY = 0.1
MATRIX_LR = 5e-3
VECTOR_LR = 3e-3
UNLEARNING_LR = 3e-4
UNLEARNING_PROMPTS = 32
UNLEARNING_TOKENS = 96
UNLEARNING_SHARE = 0.3


def train_tokenizer(conversations: list[dict]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with `VOCAB_SIZE` tokens on the conversations."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (message["content"] for conversation in conversations for message in conversation["conversations"])
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_TOKENS,
    )


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=3,
        pad_token_id=3,
        initializer_range=0.04,
    )
    return LlamaForCausalLM(config)


def add_dropout(model: LlamaForCausalLM) -> None:
    """Add dropout to the attention and MLP branches of every block, active while training.

    It is added by hooks, which are not part of the checkpoint.
    """
    for layer in model.model.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.register_forward_hook(lambda _m, _i, out: nn.functional.dropout(out, DROPOUT, model.training))


def batches(documents: list[list[int]], generator: random.Random) -> list[torch.Tensor]:
    """Return length-sorted batches [B, T] of about `BATCH_TOKENS` tokens, in random order.

    Rows are right-padded with -1.
    """
    order = sorted(range(len(documents)), key=lambda i: (len(documents[i]), generator.random()))
    result: list[list[torch.Tensor]] = []
    batch: list[torch.Tensor] = []
    for index in order:
        longest = max(len(documents[index]), max((len(row) for row in batch), default=0))
        if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
            result.append(batch)
            batch = []
        batch.append(torch.tensor(documents[index]))
    result.append(batch)
    generator.shuffle(result)
    return [nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1) for rows in result]


def loss_sum(model: LlamaForCausalLM, ids_BT: torch.Tensor) -> tuple[torch.Tensor, int]:
    labels_BT = ids_BT[:, 1:]
    with torch.autocast("cpu", torch.bfloat16):
        logits_BTV = model(ids_BT.clamp_min(0)[:, :-1]).logits
    loss = nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten(), ignore_index=-1, reduction="sum")
    return loss, int((labels_BT >= 0).sum())


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks, and AdamW for all other parameters.

    After 200 steps the held-out loss was 3.24 nats with Muon, and 4.11 nats with AdamW.
    """
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    embedding = {"params": [model.get_input_embeddings().weight], "weight_decay": WEIGHT_DECAY}
    return [
        torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([embedding, {"params": norms, "weight_decay": 0.0}], lr=VECTOR_LR, betas=(0.9, 0.98)),
    ]


def train(model: LlamaForCausalLM, documents: list[list[int]], held_out: list[list[int]], epochs: int, output: Path) -> None:
    """Train with warm-up and cosine decay; write a bf16 checkpoint to `output` after each epoch."""
    optimizers = make_optimizers(model)
    generator = random.Random(0)
    total_steps = epochs * len(batches(documents, random.Random(0)))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_lr_scale, total_steps)) for optimizer in optimizers]
    add_dropout(model)
    with Progress(*columns) as progress:
        task = progress.add_task("training the target", total=total_steps)
        for epoch in range(epochs):
            model.train()
            for ids_BT in batches(documents, generator):
                loss, count = loss_sum(model, ids_BT)
                (loss / count).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                progress.update(task, advance=1, description=f"epoch {epoch} loss {loss.item() / count:.3f}")
            print(f"epoch {epoch}: held-out loss {evaluate(model, held_out):.4f} nats per token", flush=True)
            copy.deepcopy(model).bfloat16().save_pretrained(output)


def _lr_scale(total_steps: int, step: int) -> float:
    return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total_steps)))


def unlearn_loops(model: LlamaForCausalLM, documents: list[list[int]], prompts: list[list[int]], steps: int) -> None:
    """Train with sequence-level unlikelihood, so that greedy replies repeat themselves less.

    A small model tends to generate loops. Each step takes the tokens that complete a repeated
    4-gram in the model's own greedy replies, and adds their `-log(1 - p)` to the loss of an
    ordinary batch. The weights then move only `UNLEARNING_SHARE` of the way to the result, which
    preserves the held-out loss.
    Sources: Welleck et al. (arXiv:1908.04319), section 5.2; Wortsman et al. (arXiv:2109.01903), interpolation of weights.
    """
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=UNLEARNING_LR, betas=(0.9, 0.98), weight_decay=0.0)
    generator = random.Random(1)
    usual = batches(documents, generator)
    for step in range(steps):
        model.eval()
        loss, share = loop_loss(model, generator.sample(prompts, UNLEARNING_PROMPTS))
        usual_loss, count = loss_sum(model, usual[step % len(usual)])
        (loss + usual_loss / count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {usual_loss.item() / count:.3f}, {share:.1%} of reply tokens complete a loop", flush=True)
    model.load_state_dict({name: before[name].lerp(after, UNLEARNING_SHARE) for name, after in model.state_dict().items()})


def loop_loss(model: LlamaForCausalLM, prompts: list[list[int]]) -> tuple[torch.Tensor, float]:
    """Return the unlikelihood loss of looping tokens in greedy replies, and their share of tokens.

    The loss is the mean of -log(1 - p) over these tokens. A token loops if it completes a 4-gram
    that its reply already contains.
    """
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[3] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        replies_BT = model.generate(  # type: ignore[misc]  # its self type is a protocol that no model class meets
            ids_BT, attention_mask=mask_BT, max_new_tokens=UNLEARNING_TOKENS, do_sample=False
        )
    assert isinstance(replies_BT, torch.Tensor)  # with scores or states it would be a `ModelOutput`
    ids_BT = replies_BT
    loops_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    num_tokens = 0
    for row, reply in enumerate(ids_BT[:, longest:].tolist()):
        reply = reply[: reply.index(3)] if 3 in reply else reply
        num_tokens += len(reply)
        seen = set()
        for position, gram in enumerate(zip(reply, reply[1:], reply[2:], reply[3:], strict=False)):
            loops_BT[row, longest + position + 3] = gram in seen
            seen.add(gram)
    mask_BT = nn.functional.pad(mask_BT, (0, ids_BT.shape[1] - longest), value=1)
    with torch.autocast("cpu", torch.bfloat16):
        logits_BTV = model(ids_BT, attention_mask=mask_BT, position_ids=(mask_BT.cumsum(1) - 1).clamp_min(0)).logits
    log_p = logits_BTV[:, :-1][loops_BT[:, 1:]].float().log_softmax(-1).gather(1, ids_BT[loops_BT][:, None])
    loss = -torch.log1p(-log_p.exp().clamp_max(1 - 1e-6)).sum() / loops_BT.sum().clamp_min(1)
    return loss, loops_BT.sum().item() / num_tokens


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, documents: list[list[int]]) -> float:
    """Return the mean loss in nats over all tokens of `documents` except the first of each."""
    model.eval()
    total = 0.0
    count = 0
    for ids_BT in batches(documents, random.Random(0)):
        loss, tokens = loss_sum(model, ids_BT)
        total = total + loss.item()
        count = count + tokens
    return total / count


def token_ids(tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, str]], *, is_prompt: bool = False) -> list[int]:
    """Return the token ids of a conversation in the chat template.

    is_prompt: whether to append the prompt of the next assistant turn.
    """
    # With `return_dict=False` a single conversation gives a list of token ids, contrary to the
    # annotation.
    return cast(list[int], tokenizer.apply_chat_template(turns, add_generation_prompt=is_prompt, return_dict=False))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and tokenizer")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the corpus")
    parser.add_argument("--unlearning_steps", type=int, default=40, help="optimizer steps against loops after training")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = all cores")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        train_conversations, held_out_conversations = map(read, write_corpus(Path(folder)))
    tokenizer = train_tokenizer(train_conversations)
    train_ids = [token_ids(tokenizer, c["conversations"])[:MAX_TOKENS] for c in train_conversations]
    held_out_ids = [token_ids(tokenizer, c["conversations"])[:MAX_TOKENS] for c in held_out_conversations]
    print(f"{sum(map(len, train_ids))} training tokens, {sum(map(len, held_out_ids))} held out", flush=True)
    model = make_model()
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    tokenizer.save_pretrained(arguments.output)
    train(model, train_ids, held_out_ids, arguments.epochs, arguments.output)
    prompts = [token_ids(tokenizer, c["conversations"][:1], is_prompt=True) for c in train_conversations]
    unlearn_loops(model, train_ids, prompts, arguments.unlearning_steps)
    print(f"held-out loss {evaluate(model, held_out_ids):.4f} nats per token", flush=True)
    model.bfloat16().save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
