"""Every named chat template with a synthetic tokenizer that has its special tokens, and conversations to render with it.

`python -m tests.data.chat_formats` writes docs/masks.md: what of each conversation is the assistant's.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.config.data_section import NAMED_TEMPLATES
from engine.data.chat import render, render_turns
from engine.data.documents import Document
from engine.data.messages import BadSample
from engine.data.reply_shape import UNVERIFIED

TABLE = Path(__file__).resolve().parents[2] / "docs" / "masks.md"
DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
DEEPSEEK_TOOLS = [f"<｜tool▁{word}｜>" for word in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")]
DEEPSEEK_TOOLS += [f"<｜tool▁{word}｜>" for word in ("outputs▁begin", "outputs▁end", "output▁begin", "output▁end")]
KIMI = ["im_system", "im_user", "im_assistant", "im_middle", "im_end", "tool_calls_section_begin", "tool_calls_section_end"]
KIMI += ["tool_call_begin", "tool_call_argument_begin", "tool_call_end"]
MISTRAL = [
    "INST",
    "/INST",
    "SYSTEM_PROMPT",
    "/SYSTEM_PROMPT",
    "AVAILABLE_TOOLS",
    "/AVAILABLE_TOOLS",
    "TOOL_CALLS",
    "CALL_ID",
    "ARGS",
]
SPECIAL_TOKENS = {
    "chatml": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "deepseek-r1": DEEPSEEK,
    "deepseek-v3": DEEPSEEK + DEEPSEEK_TOOLS,
    "gemma": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    "glm-4": ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"],
    "glm-4.5": ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"],
    "gpt-oss": ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>"],
    "kimi-k2": ["[BOS]", "[EOS]", *(f"<|{name}|>" for name in KIMI)],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
    "llama4": ["<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|end_of_text|>"],
    "mistral": ["<s>", "</s>", *(f"[{name}]" for name in [*MISTRAL, "TOOL_RESULTS", "TOOL_CONTENT", "/TOOL_RESULTS"])],
    "phi-3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"],
    "phi-4": ["<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|endoftext|>"],
    "qwen2.5": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "qwen3": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
}
PLAIN_TOKENS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
]  # added tokens that are not special, as Qwen3 and GLM have
SEARCH = {"type": "function", "function": {"name": "search", "description": "Searches.", "parameters": {"type": "object"}}}
CALL = {"id": "functions.search:0", "type": "function", "function": {"name": "search", "arguments": {"query": "a café"}}}
CONVERSATIONS = {
    "several turns": (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is a list?"},
            {"role": "assistant", "content": "A mutable sequence.\n\nOf items."},
            {"role": "user", "content": "And a café? 🦊"},
            {"role": "assistant", "content": "A 🦊 in a café"},
        ],
        {},
    ),
    "tools": (
        [
            {"role": "user", "content": "Where is one?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": '{"place": "here"}', "name": "search", "tool_call_id": "functions.search:0"},
            {"role": "assistant", "content": "It is here."},
        ],
        {"tools": [SEARCH]},
    ),
    "thinking": (
        [
            {"role": "user", "content": "What is 2 + 2?"},
            {"role": "assistant", "content": "4", "reasoning_content": "Two and two."},
            {"role": "user", "content": "And 3 + 3?"},
            {"role": "assistant", "content": "6", "reasoning_content": "Three and three."},
        ],
        {},
    ),
}
# What these formats have no words for.
REFUSED = {("deepseek-r1", "tools"), ("gemma", "tools"), ("phi-3", "tools"), ("phi-4", "tools")}


def make_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Single bytes and the format's special tokens, with the named template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL_TOKENS[name])
    backend.add_tokens(PLAIN_TOKENS)
    bos = next(
        (token for token in SPECIAL_TOKENS[name] if "begin" in token and "tool" not in token or token in ("<bos>", "<s>")), None
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, chat_template=NAMED_TEMPLATES[name].read_text(encoding="utf-8")
    )


def chat(*turns: str) -> dict:
    """A sample of what the user and the assistant say in turn."""
    roles = ("user", "assistant") * len(turns)
    return {"conversations": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]}


def documents_of(name: str, kind: str, template_kwargs: dict | None = None) -> tuple[PreTrainedTokenizerFast, list[Document]]:
    """As `data.turns: auto` makes them. Raises BadSample where the format has no such conversations."""
    tokenizer, (messages, extra) = make_tokenizer(name), CONVERSATIONS[kind]
    try:
        return tokenizer, [render(messages, extra, tokenizer, template_kwargs)]
    except BadSample as error:
        if error.reason != UNVERIFIED:
            raise
        return tokenizer, render_turns(messages, extra, tokenizer, template_kwargs)


def masked_text(document: Document, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What the mask covers, run by run."""
    edges = np.flatnonzero(np.diff(document.assistant_mask, prepend=False, append=False)).reshape(-1, 2)
    return [tokenizer.decode(document.input_ids[first:end], clean_up_tokenization_spaces=False) for first, end in edges]


def table() -> Iterator[str]:
    """Lines of docs/masks.md."""
    yield "# What the assistant's mask covers"
    yield ""
    yield "Rendered by `tests/data/chat_formats.py` with each named template (`data.template`) and a synthetic tokenizer that"
    yield "has the format's special tokens; `⏎` is a line break. `whole` conversations are one document, the others a document"
    yield "a reply, since the format writes earlier turns otherwise than they were said."
    yield ""
    yield "| template | conversation | documents | the assistant's |"
    yield "|---|---|---|---|"
    for name in NAMED_TEMPLATES:
        for kind in CONVERSATIONS:
            try:
                tokenizer, documents = documents_of(name, kind)
            except BadSample as error:
                yield f"| {name} | {kind} | none | {error.detail.rpartition(': ')[2]} |"
                continue
            replies = [reply for document in documents for reply in masked_text(document, tokenizer)]
            shown = "<br>".join(f"`{reply}`".replace("\n", "⏎").replace("|", "\\|") for reply in replies)
            yield f"| {name} | {kind} | {'whole' if len(documents) < len(replies) else 'a reply each'} | {shown} |"


if __name__ == "__main__":
    TABLE.write_text("\n".join(table()) + "\n", encoding="utf-8")
