"""How a chat template writes a reply, found by rendering a probe.

A probe is a reply with the same parts as a real one, whose words occur nowhere else. The text
around the parts of a probe is written by the template, so a turn is located by its position and
never by the words of a message. For a probe that follows a conversation, `unused_words` chooses
words that the conversation does not contain.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

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
    as_object,
    thinking_and_words,
)

UNVERIFIED = "mask cannot be verified"
QUESTION = "First question."
NEXT = "Go on."
MISTRAL_ID_LENGTH = 9

Render = Callable[[Sequence[Message], bool], str]


@dataclass(frozen=True)
class ProbeWords:
    """The words of a probe.

    suffix: digits at the end of each word, which distinguish it from the words of a conversation.
    """

    suffix: str = ""

    @property
    def thought(self) -> str:
        return f"Zqa thought zqa{self.suffix}."

    @property
    def words(self) -> str:
        return f"Zqb words zqb{self.suffix}."

    @property
    def call_name(self) -> str:
        return f"zqc_function{self.suffix}"

    @property
    def call_id(self) -> str:
        return f"zqd{self.suffix}"

    @property
    def value(self) -> str:
        return f"Zqe value zqe{self.suffix}"

    @property
    def last_message(self) -> str:
        """Words for the message before the probe. They are not part of the probe."""
        return f"Zqf message zqf{self.suffix}"

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.thought, self.words, self.call_name, self.call_id, self.value)


PROBE_WORDS = ProbeWords()
WORDS = PROBE_WORDS.words


def unused_words(text: str) -> ProbeWords:
    """Return words for a probe, none of which occurs in `text`."""
    words = PROBE_WORDS
    for number in count(1):
        if not any(part in text for part in (*words.parts, words.last_message)):
            break
        words = ProbeWords(str(number))
    return words


@dataclass(frozen=True)
class ReplyShape:
    """Text that a template writes around the parts of a reply.

    opening: text between the generation prompt and the first part. A thinking block at the end of
        the prompt that replies do not keep does not count as part of the prompt. None if the reply
        does not follow the prompt.
    tail: control tokens and whitespace after the last part, up to the end of the text; "" if there
        are none.
    stop: number of characters of `tail` up to the end of the token at which a server stops.
    next_token: for an empty tail, the control token of the next turn that ends a reply (GLM); "" if
        there is none.
    unasked_prompt: generation prompt that the template writes even after a reply (Command-R7B); ""
        if there is none.
    """

    opening: str | None
    tail: str
    stop: int
    next_token: str
    unasked_prompt: str = ""


def probe_of(reply: Message, probe_words: ProbeWords = PROBE_WORDS) -> Message:
    """Return a reply with the same parts, each replaced by words that occur nowhere else."""
    thinking, words = thinking_and_words(reply)
    probe: Message = {"role": "assistant", "content": probe_words.words if words else ""}
    key = next((key for key in REASONING_KEYS if reply.get(key)), None)
    if key is not None:
        probe[key] = probe_words.thought
    elif thinking:
        probe["content"] = f"{OPEN}\n{probe_words.thought}\n{CLOSE}\n\n{probe['content']}"
    if reply.get("tool_calls"):
        calls = enumerate(reply["tool_calls"])
        probe["tool_calls"] = [_probe_call(call, index, probe_words) for index, call in calls]
    return probe


def without_thinking(reply: Message) -> Message:
    """Return a reply without its thinking, whether that is under a key or in the content."""
    kept = {key: value for key, value in reply.items() if key not in REASONING_KEYS}
    _, words = thinking_and_words(reply)
    return kept | {"content": words}


def first_part(text: str, words: ProbeWords = PROBE_WORDS) -> int:
    """Return the position of the first part of a probe in a text, or -1 if the text holds none."""
    places = [text.find(part) for part in words.parts if part in text]
    return min(places, default=-1)


def behind_last_part(text: str) -> str:
    """Return the text after the last part of a probe."""
    ends = [text.rfind(part) + len(part) for part in PROBE_WORDS.parts if part in text]
    return text[max(ends, default=len(text)) :]


def shape_of(probe: Message, render: Render, known: Sequence[str], eos: str | None, bos: str | None) -> ReplyShape:
    """Return how a template writes a probe after a question.

    render(messages, add_generation_prompt): renders the template.
    known: the tokenizer's special tokens.
    eos, bos: the tokenizer's tokens for end and start of text, if it has them.
    Raises BadSample if the template cannot write the probe, or writes more than control tokens
    after it.
    """
    asked = [{"role": "user", "content": QUESTION}]
    prompt = render(asked, True)
    probe, text = written_probe(probe, asked, render)
    first = first_part(text)
    header_end = len(prompt) if text.startswith(prompt) else len(prompt) - len(thinking_mark(prompt).text)
    opening = text[header_end:first] if text.startswith(prompt[:header_end]) and first >= header_end else None
    behind = behind_last_part(text)
    unasked_prompt = _unasked_prompt(prompt, behind, known) if prompt == render(asked, False) else ""
    behind = behind[: len(behind) - len(unasked_prompt)]
    tail = token_tail(behind, known)
    ends_with_words = WORDS in text and not probe.get("tool_calls")
    if ends_with_words and behind[: len(behind) - len(tail)].strip():
        raise BadSample(UNVERIFIED, "the chat template writes more than control tokens behind a reply")
    later = _behind_in_history(asked, probe, render)
    ending = Ending.of(behind, tail, later, known, bos)
    stop = ending.stop(eos, ends_with_words)
    return ReplyShape(opening, tail, stop, ending.next_token, unasked_prompt)


def _unasked_prompt(prompt: str, behind: str, known: Sequence[str]) -> str:
    """Return the generation prompt that follows both a question and a reply; "" if there is none.

    It excludes the end-of-turn token.
    """
    length = shared_length(prompt[::-1], behind[::-1])
    shared = behind[whole_token_start(behind, len(behind) - length, known) :]
    end_token = leading_token(shared, known)
    asked = shared[len(end_token) :]
    return asked if asked.strip() else ""


def written_probe(
    probe: Message,
    before: Sequence[Message],
    render: Render,
    words: ProbeWords = PROBE_WORDS,
) -> tuple[Message, str]:
    """Return a probe that the template writes after the messages `before`, and the rendered text.

    A probe with thinking only, which the template omits, is replaced by a probe with words.
    Raises BadSample if the template writes no part of a reply.
    """
    plain = {"role": "assistant", "content": words.words}
    for candidate in (probe, plain):
        text = render([*before, candidate], False)
        if first_part(text, words) >= 0:
            return candidate, text
        if probe.get("tool_calls") or words.words in probe["content"]:
            break
    raise BadSample(UNVERIFIED, "the chat template leaves out words of a reply")


def _probe_call(call: dict, index: int, words: ProbeWords) -> dict:
    function = call.get("function", call)
    probe = {
        "name": words.call_name,
        "arguments": _probe_arguments(function.get("arguments"), words),
    }
    identifier = f"functions.{words.call_id}:{index}"
    if len(str(call.get("id", ""))) == MISTRAL_ID_LENGTH:
        digits = MISTRAL_ID_LENGTH - len(words.call_id)
        identifier = words.call_id + str(index).zfill(digits)
    if "function" in call:
        return {"id": identifier, "type": "function", "function": probe}
    return {"id": identifier, **probe}


def _probe_arguments(arguments: object, words: ProbeWords) -> object:
    """Return probe arguments of the same form; none if the call has none.

    Some formats close each argument (GLM-4.5), so a call without arguments ends differently.
    """
    if arguments is None:
        return {}
    if not as_object(arguments):
        return arguments
    probe = {"query": words.value}
    return json.dumps(probe) if isinstance(arguments, str) else probe


def _behind_in_history(asked: Sequence[Message], probe: Message, render: Render) -> str | None:
    """Return the text between a probe and a following turn; None if it cannot be rendered."""
    following: list[Message] = [{"role": "user", "content": NEXT}]
    calls = probe.get("tool_calls")
    if calls:
        following = [
            {"role": "tool", "content": NEXT, "name": PROBE_WORDS.call_name, "tool_call_id": call["id"]} for call in calls
        ]
    plain = {"role": "assistant", "content": WORDS}
    # A template may omit a reply with thinking only from the history.
    candidates = [probe] if calls else [probe, plain]
    for candidate in candidates:
        with suppress(BadSample):
            written, found, _ = render([*asked, candidate, *following], False).partition(NEXT)
            if found and first_part(written) >= 0:
                return behind_last_part(written)
    return None


@dataclass(frozen=True)
class Ending:
    """Control tokens that may end a reply, each as (token, its end position in the tail).

    length: number of characters of the tail.
    own: tokens that end the reply both as the last turn and in the history.
    last: tokens that end the reply as the last turn.
    next_token: token that starts the next turn, if the reply has no end token of its own.
    """

    length: int
    own: tuple[tuple[str, int], ...]
    last: tuple[tuple[str, int], ...]
    next_token: str

    @classmethod
    def of(cls, behind: str, tail: str, later: str | None, known: Sequence[str], bos: str | None) -> "Ending":
        """Find the control tokens that may end a reply.

        behind: text after the last part of the reply as the last turn.
        tail: control tokens and whitespace at the end of `behind`.
        later: text after the last part once another turn follows; None if unknown.
        """
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
        """Return the number of characters of the tail that a server generates.

        Tokens after those that also end the reply in the history end the conversation (Phi-3's end
        of text). If a reply ends differently in the history (GPT-OSS), words end with the first
        token of the tail, and tool calls with the last one.
        """
        candidates = self.own
        if not candidates:
            candidates = self.last[:1] if ends_with_words else self.last
        if not ends_with_words and eos in [token for token, _ in self.last]:
            candidates = self.last  # tokens that close a call precede the one that ends generation
        if not candidates:
            return self.length
        for token, end in candidates:
            if token == eos:
                return end
        return candidates[-1][1]


def _has_bars(token: str) -> bool:
    return "|" in token or "\uff5c" in token


def _shared(tokens: Sequence[tuple[str, int]], behind: str, tail: str, later: str | None) -> tuple[tuple[str, int], ...]:
    """Return the tokens of a tail that also follow the reply in the history."""
    offset = len(behind) - len(tail)
    shared = 0 if later is None else shared_length(behind, later)
    return tuple((token, end) for token, end in tokens if offset + end <= shared)


def shared_length(first: str, second: str) -> int:
    """Return the length of the common prefix of two texts."""
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
