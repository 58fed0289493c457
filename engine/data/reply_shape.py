"""How a chat template writes a reply, found with a probe: a reply of the same parts whose words occur nowhere else.

The text around a probe's parts is the template's own, so a turn is found by its place and never by the words of a message.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from engine.data.control_tokens import (
    leading_token,
    thinking_mark,
    token_ends,
    token_tail,
    whole_token_start,
)
from engine.data.messages import (
    CLOSE,
    OPEN,
    REASONING_KEYS,
    BadSample,
    Message,
    thinking_and_words,
)

UNVERIFIED = "mask cannot be verified"
QUESTION = "First question."
NEXT = "Go on."
THOUGHT = "Zqa thought zqa."
WORDS = "Zqb words zqb."
CALL_NAME = "zqc_function"
CALL_ID = "zqd"
VALUE = "Zqe value zqe"
PARTS = (THOUGHT, WORDS, CALL_NAME, CALL_ID, VALUE)
MISTRAL_ID_LENGTH = 9

Render = Callable[[Sequence[Message], bool], str]


@dataclass(frozen=True)
class ReplyShape:
    """What a template writes around the parts of a reply.

    opening: between the generation prompt and the first part; an empty thought of the prompt that replies do not keep
        counts as no part of it. None if the reply does not follow the prompt.
    tail: the control tokens behind the last part, with blanks, up to the end of the text; "" if there are none.
    stop: number of characters of `tail` up to the end of the token at which a server stops.
    next_token: for an empty tail, the control token of the next turn that ends a reply (GLM); "" if there is none.
    always_asked: a generation prompt that the template writes even behind a reply (Command-R7B); "" if there is none.
    """

    opening: str | None
    tail: str
    stop: int
    next_token: str
    always_asked: str = ""


def probe_of(reply: Message) -> Message:
    """Return a reply with the same parts, each replaced by words that occur nowhere else."""
    thinking, words = thinking_and_words(reply)
    probe: Message = {"role": "assistant", "content": WORDS if words else ""}
    key = next((key for key in REASONING_KEYS if reply.get(key)), None)
    if key is not None:
        probe[key] = THOUGHT
    elif thinking:
        probe["content"] = f"{OPEN}\n{THOUGHT}\n{CLOSE}\n\n{probe['content']}"
    if reply.get("tool_calls"):
        probe["tool_calls"] = [_probe_call(call, index) for index, call in enumerate(reply["tool_calls"])]
    return probe


def without_thinking(reply: Message) -> Message:
    """Return a reply without its thinking, wherever it is written."""
    kept = {key: value for key, value in reply.items() if key not in REASONING_KEYS}
    _, words = thinking_and_words(reply)
    return kept | {"content": words}


def first_part(text: str) -> int:
    """Return where the first part of a probe begins in a text, -1 if the text holds none."""
    places = [text.find(part) for part in PARTS if part in text]
    return min(places, default=-1)


def behind_last_part(text: str) -> str:
    """Return the text behind the last part of a probe."""
    ends = [text.rfind(part) + len(part) for part in PARTS if part in text]
    return text[max(ends, default=len(text)) :]


def shape_of(probe: Message, render: Render, known: Sequence[str], eos: str | None, bos: str | None) -> ReplyShape:
    """Return how a template writes a probe behind a question. known: the tokenizer's special tokens.

    Raises BadSample if the template cannot write it, or writes more than control tokens behind it.
    """
    asked = [{"role": "user", "content": QUESTION}]
    prompt = render(asked, True)
    probe, text = written_probe(probe, asked, render)
    first = first_part(text)
    header_end = len(prompt) if text.startswith(prompt) else len(prompt) - len(thinking_mark(prompt).text)
    opening = text[header_end:first] if text.startswith(prompt[:header_end]) and first >= header_end else None
    behind = behind_last_part(text)
    always_asked = _always_asked(prompt, behind, known) if prompt == render(asked, False) else ""
    behind = behind[: len(behind) - len(always_asked)]
    tail = token_tail(behind, known)
    ends_with_words = WORDS in text and not probe.get("tool_calls")
    if ends_with_words and behind[: len(behind) - len(tail)].strip():
        raise BadSample(UNVERIFIED, "the chat template writes more than control tokens behind a reply")
    later = _behind_in_history(asked, probe, render)
    ending = Ending.of(behind, tail, later, known, bos)
    stop = ending.stop(eos, ends_with_words)
    return ReplyShape(opening, tail, stop, ending.next_token, always_asked)


def _always_asked(prompt: str, behind: str, known: Sequence[str]) -> str:
    """Return the generation prompt that stands behind both a question and a reply, without the token that ends a turn."""
    length = _shared_length(prompt[::-1], behind[::-1])
    shared = behind[whole_token_start(behind, len(behind) - length, known) :]
    end_token = leading_token(shared, known)
    asked = shared[len(end_token) :]
    return asked if asked.strip() else ""


def written_probe(probe: Message, before: Sequence[Message], render: Render) -> tuple[Message, str]:
    """Return a probe that the template writes behind some messages, and the text that it writes.

    A probe that only thinks, of which the template writes nothing, is replaced by words at the same place.
    Raises BadSample if the template writes no part of a reply.
    """
    plain = {"role": "assistant", "content": WORDS}
    for candidate in (probe, plain):
        text = render([*before, candidate], False)
        if first_part(text) >= 0:
            return candidate, text
        if probe.get("tool_calls") or WORDS in probe["content"]:
            break
    raise BadSample(UNVERIFIED, "the chat template leaves out words of a reply")


def _probe_call(call: dict, index: int) -> dict:
    function = call.get("function", call)
    arguments = {"query": VALUE}
    as_text = isinstance(function.get("arguments"), str)
    probe = {"name": CALL_NAME, "arguments": json.dumps(arguments) if as_text else arguments}
    identifier = f"functions.{CALL_ID}:{index}"
    if len(str(call.get("id", ""))) == MISTRAL_ID_LENGTH:
        identifier = f"{CALL_ID}{index:06d}"
    if "function" in call:
        return {"id": identifier, "type": "function", "function": probe}
    return {"id": identifier, **probe}


def _behind_in_history(asked: Sequence[Message], probe: Message, render: Render) -> str | None:
    """Return what follows a probe once another turn follows it, None if the template cannot write that."""
    following: list[Message] = [{"role": "user", "content": NEXT}]
    calls = probe.get("tool_calls")
    if calls:
        following = [{"role": "tool", "content": NEXT, "name": CALL_NAME, "tool_call_id": call["id"]} for call in calls]
    plain = {"role": "assistant", "content": WORDS}
    candidates = [probe] if calls else [probe, plain]  # a reply that only thinks may be gone from the history
    for candidate in candidates:
        with suppress(BadSample):
            written, found, _ = render([*asked, candidate, *following], False).partition(NEXT)
            if found and first_part(written) >= 0:
                return behind_last_part(written)
    return None


@dataclass(frozen=True)
class Ending:
    """Control tokens that may end a reply: (token, where it ends in the tail) of each.

    own: those that the reply ends with in the history too. last: all that end it as the last turn.
    next_token: the token that opens the next turn, where the reply has no end token of its own.
    """

    length: int
    own: tuple[tuple[str, int], ...]
    last: tuple[tuple[str, int], ...]
    next_token: str

    @classmethod
    def of(cls, behind: str, tail: str, later: str | None, known: Sequence[str], bos: str | None) -> "Ending":
        """Read the endings of a reply. behind: what follows its last part; later: the same in the history."""
        tokens = token_ends(tail, known)
        for is_end in (lambda token: token in known, _has_bars):
            ends = [(token, end) for token, end in tokens if is_end(token)]
            if ends:
                return cls(len(tail), _shared(ends, behind, tail, later), tuple(ends), "")
        next_token = "" if later is None else _token_of_next_turn(behind, later, known, bos)
        if next_token:
            return cls(len(tail), (), (), next_token)
        return cls(len(tail), _shared(tokens, behind, tail, later), tuple(tokens), "")

    def stop(self, eos: str | None, ends_with_words: bool) -> int:
        """Return how many characters of the tail a server generates.

        What stands behind the tokens that end a reply in the history too ends the conversation (Phi-3's end of text).
        Words that end otherwise in the history (GPT-OSS) end with their first token, tool calls with their last.
        """
        candidates = self.own
        if not candidates:
            candidates = self.last[:1] if ends_with_words else self.last
        if not ends_with_words and eos in [token for token, _ in self.last]:
            candidates = self.last  # tokens that close a call stand before the one that ends generation
        if not candidates:
            return self.length
        for token, end in candidates:
            if token == eos:
                return end
        return candidates[-1][1]


def _has_bars(token: str) -> bool:
    return "|" in token or "\uff5c" in token


def _shared(tokens: Sequence[tuple[str, int]], behind: str, tail: str, later: str | None) -> tuple[tuple[str, int], ...]:
    """Return the tokens of a tail that stand behind the reply in the history too."""
    offset = len(behind) - len(tail)
    shared = 0 if later is None else _shared_length(behind, later)
    return tuple((token, end) for token, end in tokens if offset + end <= shared)


def _shared_length(first: str, second: str) -> int:
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length


def _token_of_next_turn(behind: str, later: str, known: Sequence[str], bos: str | None) -> str:
    rest = later.removeprefix(behind.rstrip()).lstrip()
    tokens = token_ends(rest, known)
    if not tokens or tokens[0][0] == bos:
        return ""
    token = tokens[0][0]
    return token if token in known or _has_bars(token) else ""
