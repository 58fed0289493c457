"""The protocols of vLLM and SGLang, as far as a benchmark needs them: prompts and replies as token ids, and acceptance."""

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from engine.serving.draft_kinds import SGLANG_NAME, VLLM_NAME
from engine.serving.http_stream import HttpClient, ServingError, shortened

HEALTH_TIMEOUT_S = 5.0
SETTLED_AFTER_S = 0.05  # counters that have not changed for this time are final
MOST_SETTLE_READS = 20
# A sample of Prometheus' text format: the name, labels in braces, the value.
SAMPLE = re.compile(r"^(?P<name>[^\s{]+)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)")
POSITION = re.compile(r'position="(\d+)"')


@dataclass(frozen=True)
class ReplySettings:
    """How replies are generated.

    ignore_eos: whether a reply goes on after the end-of-sequence token.
    temperature: 0 = take the most likely token. top_k, top_p: tokens that sampling chooses among; top_k None = all.
    """

    max_new_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def sampling(self) -> dict[str, Any]:
        """The options of sampling, which have the same names in both servers."""
        options: dict[str, Any] = {"temperature": self.temperature, "ignore_eos": self.ignore_eos}
        if not self.is_greedy:
            options |= {"top_p": self.top_p, "top_k": -1 if self.top_k is None else self.top_k}
        return options


@dataclass(frozen=True)
class ServedReply:
    """A reply of a server, with times in seconds from the moment at which its request was sent.

    first_token_s: until the first tokens arrived. total_s: until the reply was complete.
    num_verifies: target forwards that verified drafted tokens; None if the reply does not tell.
    """

    token_ids: tuple[int, ...]
    first_token_s: float
    total_s: float
    num_verifies: int | None = None


@dataclass(frozen=True)
class ServedAcceptance:
    """What a server reports about its draft.

    length: tokens emitted per target forward that verified drafted tokens, without the token that
    the forward over the prompt yields; None if there was no such forward.
    num_verifies: number of these forwards, per request.
    accepted_per_position: share of the verified chains of which the token at each position was
    accepted; () if the server does not report it.
    own_average: the average length since the start of the server, as SGLang reports it.
    """

    length: float | None
    num_verifies: int
    accepted_per_position: tuple[float, ...] = ()
    own_average: float | None = None


class Endpoint(ABC):
    """A server, and the protocol that it speaks.

    url: its address. timeout_s: time in seconds that a request may take. api_key: "" = none.
    """

    name: ClassVar[str]
    missing_acceptance: ClassVar[str]  # what a server without a draft does not report, and how to start it with one

    def __init__(self, url: str, timeout_s: float, api_key: str = "") -> None:
        self.url = url.rstrip("/").removesuffix("/v1")  # as clients of OpenAI's protocol write it
        self.timeout_s = timeout_s
        self._api_key = api_key

    def client(self) -> HttpClient:
        """Return a connection of its own for one thread."""
        return HttpClient(self.url, self.timeout_s, self._api_key)

    def check_health(self) -> None:
        """Raise ServingError if the server is not ready for requests."""
        client = HttpClient(self.url, min(self.timeout_s, HEALTH_TIMEOUT_S), self._api_key)
        try:
            client.get_text("/health")
        finally:
            client.close()

    @abstractmethod
    def prepare(self) -> None:
        """Ask for what later requests need, once the server is ready. Raises ServingError."""

    @abstractmethod
    def version(self) -> str | None:
        """Return the version of the server, or None if it does not tell."""

    @abstractmethod
    def generate(self, client: HttpClient, token_ids: Sequence[int], settings: ReplySettings) -> ServedReply:
        """Return the reply to a prompt. Raises ServingError, also for a reply without tokens."""

    @abstractmethod
    def counters(self) -> Mapping[str, float]:
        """Return the server's counters of drafted tokens; {} if it has none. Raises ServingError."""

    @abstractmethod
    def acceptance(
        self, before: Mapping[str, float], after: Mapping[str, float], replies: Sequence[ServedReply]
    ) -> ServedAcceptance | None:
        """Return the acceptance over replies, or None if the server runs without a draft.

        before, after: counters, read before the first request and after the last one. vLLM counts the
        requests of all clients, so there should be no other.
        """

    def _get_json(self, path: str) -> Any:
        client = self.client()
        try:
            return client.get_json(path)
        finally:
            client.close()

    def _no_tokens(self, path: str, advice: str) -> ServingError:
        return ServingError(f"{self.url}{path}: a reply has no tokens; {advice}")

    def _malformed(self, path: str, event: Any, error: Exception) -> ServingError:
        found = shortened(str(event), self._api_key)
        problem = f"{type(error).__name__}: {error} in {found!r}"
        return ServingError(f"{self.url}{path}: unexpected reply ({problem}); check that the server is {self.name}")


EMPTY_REPLY = "its first token ends the sequence; pass --ignore_eos, or check the prompts and the chat template"


class VllmEndpoint(Endpoint):
    """vLLM's OpenAI-compatible server, from version 0.10.2 on, which returns token ids."""

    name = VLLM_NAME
    missing_acceptance = (
        "its /metrics has no vllm:spec_decode_num_drafts_total, so it runs without a draft or without metrics; start it with "
        "--speculative-config and without --disable-log-stats, or name it with --plain_url if it should have no draft"
    )
    path = "/v1/completions"
    prefix = "vllm:spec_decode_num_"
    drafts = "drafts_total"
    accepted = "accepted_tokens_total"
    per_position = "accepted_tokens_per_pos_total"
    _model = ""

    def prepare(self) -> None:
        models = self._get_json("/v1/models")
        try:
            self._model = str(models["data"][0]["id"])
        except (LookupError, TypeError) as error:
            raise self._malformed("/v1/models", models, error) from error

    def version(self) -> str | None:
        try:
            return str(self._get_json("/version")["version"])
        except (ServingError, LookupError, TypeError):
            return None

    def generate(self, client: HttpClient, token_ids: Sequence[int], settings: ReplySettings) -> ServedReply:
        content = {
            "model": self._model,
            "prompt": list(token_ids),
            "max_tokens": settings.max_new_tokens,
            "stream": True,
            "return_token_ids": True,
            **settings.sampling,
        }
        generated: list[int] = []
        has_text = False
        first_token_s = 0.0
        start = time.perf_counter()
        for event in client.post_events(self.path, content):
            try:
                choices = event["choices"]
                parts = [choice.get("token_ids") or () for choice in choices]
                has_text = has_text or any(choice.get("text") for choice in choices)
            except (LookupError, TypeError, AttributeError) as error:
                raise self._malformed(self.path, event, error) from error
            if any(parts) and not generated:
                first_token_s = time.perf_counter() - start
            for part in parts:
                generated.extend(part)
        if not generated:
            advice = "it has text only, so update vLLM to 0.10.2 or later" if has_text else EMPTY_REPLY
            raise self._no_tokens(self.path, advice)
        return ServedReply(tuple(generated), first_token_s, time.perf_counter() - start)

    def counters(self) -> Mapping[str, float]:
        """Return the counters once they are final: vLLM updates them shortly after it has sent a reply."""
        client = self.client()
        try:
            found = self._read_counters(client)
            for _ in range(MOST_SETTLE_READS):
                time.sleep(SETTLED_AFTER_S)
                earlier = found
                found = self._read_counters(client)
                if found == earlier:
                    break
        finally:
            client.close()
        return found

    def _read_counters(self, client: HttpClient) -> dict[str, float]:
        """Return the sum of each counter over its engines; a counter per position has its position in its name."""
        found: dict[str, float] = {}
        for line in client.get_text("/metrics").splitlines():
            sample = SAMPLE.match(line)
            if sample is None or not sample["name"].startswith(self.prefix) or not sample["name"].endswith("_total"):
                continue
            name = sample["name"].removeprefix(self.prefix)
            position = POSITION.search(sample["labels"] or "")
            if position is not None:
                name = f"{name}:{position[1]}"
            try:
                found[name] = found.get(name, 0.0) + float(sample["value"])
            except ValueError as error:
                raise self._malformed("/metrics", line, error) from error
        return found

    def acceptance(
        self, before: Mapping[str, float], after: Mapping[str, float], replies: Sequence[ServedReply]
    ) -> ServedAcceptance | None:
        if self.drafts not in after or self.accepted not in after:
            return None
        grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
        num_drafts = grown[self.drafts]
        if num_drafts <= 0:
            return ServedAcceptance(None, 0)
        num_positions = sum(name.startswith(f"{self.per_position}:") for name in grown)
        shares = [grown.get(f"{self.per_position}:{index}", 0.0) / num_drafts for index in range(num_positions)]
        return ServedAcceptance(1 + grown[self.accepted] / num_drafts, round(num_drafts), tuple(shares))


class SglangEndpoint(Endpoint):
    """SGLang's own protocol."""

    name = SGLANG_NAME
    missing_acceptance = (
        "its replies have no meta_info.spec_verify_ct, so it runs without a draft; start it with "
        "--speculative-algorithm, or name it with --plain_url if it should have no draft"
    )
    path = "/generate"

    def prepare(self) -> None:
        """Return at once: requests need nothing but the address."""

    def version(self) -> str | None:
        found = self._server_info().get("version")
        return None if found is None else str(found)

    def generate(self, client: HttpClient, token_ids: Sequence[int], settings: ReplySettings) -> ServedReply:
        sampling = {"max_new_tokens": settings.max_new_tokens, **settings.sampling}
        content = {"input_ids": list(token_ids), "sampling_params": sampling, "stream": True}
        generated: list[int] = []
        num_verifies = None
        has_text = False
        first_token_s = 0.0
        start = time.perf_counter()
        for event in client.post_events(self.path, content):
            try:
                facts = event["meta_info"]
                part = list(event.get("output_ids") or ())
                num_tokens = int(facts["completion_tokens"])
                ending = facts.get("finish_reason") or {}
                aborted = ending.get("message") or "no reason given" if ending.get("type") == "abort" else None
                num_verifies = facts.get("spec_verify_ct", num_verifies)
                has_text = has_text or bool(event.get("text"))
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise self._malformed(self.path, event, error) from error
            if aborted is not None:
                found = shortened(str(aborted), self._api_key)
                problem = f"the server aborted a request: {found}"
                raise ServingError(f"{self.url}{self.path}: {problem}; change the prompts, or the server's arguments")
            if part and not generated:
                first_token_s = time.perf_counter() - start
            generated = joined(generated, part, num_tokens)
        if not generated:
            advice = "it has text only, so update SGLang" if has_text else EMPTY_REPLY
            raise self._no_tokens(self.path, advice)
        return ServedReply(tuple(generated), first_token_s, time.perf_counter() - start, num_verifies)

    def counters(self) -> Mapping[str, float]:
        """Return SGLang's own average acceptance length, if it has one."""
        states = self._server_info().get("internal_states") or [{}]
        average = states[0].get("avg_spec_accept_length") if isinstance(states[0], dict) else None
        return {} if average is None else {"avg_spec_accept_length": float(average)}

    def acceptance(
        self, before: Mapping[str, float], after: Mapping[str, float], replies: Sequence[ServedReply]
    ) -> ServedAcceptance | None:
        counts = [reply.num_verifies for reply in replies if reply.num_verifies is not None]
        if not counts:
            return None
        own_average = after.get("avg_spec_accept_length")
        num_verifies = sum(counts)
        # The forward over the prompt yields the first token of each reply.
        num_tokens = sum(len(reply.token_ids) - 1 for reply in replies)
        return ServedAcceptance(num_tokens / num_verifies if num_verifies else None, num_verifies, (), own_average)

    def _server_info(self) -> Mapping[str, Any]:
        """Return what the server tells about itself; {} if it has no such page, as behind a router."""
        for path in ("/get_server_info", "/server_info"):
            try:
                found = self._get_json(path)
            except ServingError:
                continue
            if isinstance(found, dict):
                return found
        return {}


def joined(earlier: list[int], latest: list[int], num_tokens: int) -> list[int]:
    """Return the tokens of a reply of SGLang so far.

    An event has all tokens so far, or with `--incremental-streaming-output` the latest ones. The number of
    tokens tells which; where all are sent, the list may run ahead of the number, because SGLang sends it later.
    """
    both = earlier + latest
    has_all = abs(len(latest) - num_tokens) <= abs(len(both) - num_tokens)
    return latest if has_all else both


ENDPOINTS: Mapping[str, type[Endpoint]] = {"sglang": SglangEndpoint, "vllm": VllmEndpoint}
