"""Client for a server of the target with an OpenAI-compatible API, e.g. SGLang or vLLM."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from engine.config.secret_values import hidden_in_text
from engine.config.strict import ConfigError
from engine.conversations.journal import as_line
from engine.data.messages import BadSample, Message, as_object, with_arguments

CHECK_ATTEMPTS = 3
CHECK_TIMEOUT_S = 30.0
WHOLE = ("stop", "tool_calls", "function_call")  # finish reasons of complete replies
WORTH_ANOTHER_TRY = (408, 409, 429)  # and all from 500 on; the statuses that the client retries
TOO_LONG = "reply longer than regenerate.max_new_tokens"
NO_ANSWER = "no answer from the server"
REFUSED = "refused by the server"
MALFORMED = "malformed answer"


@dataclass(frozen=True)
class ServerReply:
    """A reply of the server.

    message: the assistant's turn.
    num_tokens: number of tokens generated for it; 0 if the server does not report it.
    """

    message: Message
    num_tokens: int


class Server:
    """Client for one server.

    Failed requests are repeated, after increasing pauses or those that the server requests.
    address: address for messages, without a password.
    unanswered: requests given up since the server last answered one.
    """

    def __init__(self, address: str, attempts: int, timeout_s: float, api_key: str) -> None:
        """Create a client for the server at `address`.

        attempts: how often a request is sent at most.
        timeout_s: time in seconds without an answer after which a request counts as lost.
        """
        self.address = hidden_in_text(address)
        self.unanswered = 0
        self._api_key = api_key
        self._openai = _import_openai()
        self._client = self._openai.AsyncOpenAI(base_url=address, api_key=api_key, max_retries=attempts - 1, timeout=timeout_s)
        self._check_client = self._client.with_options(
            max_retries=min(attempts, CHECK_ATTEMPTS) - 1, timeout=min(timeout_s, CHECK_TIMEOUT_S)
        )

    async def models(self) -> list[str]:
        """Return the names of the models it serves. Raises ConfigError if it does not answer."""
        try:
            answer = await self._check_client.get("/models", cast_to=object)
            return [str(model["id"]) for model in answer["data"]]
        except self._openai.APIError as error:
            came = self._words(error)
        except (ValueError, LookupError, TypeError) as error:
            came = f"expected a list of models, got {type(error).__name__}: {error}"
        problem = f"{self.address}/models does not answer ({came}); start the server, or fix its address"
        raise ConfigError(problem, key="regenerate.servers")

    async def reply(self, request: dict[str, Any]) -> ServerReply:
        """Send a request to /chat/completions and return the reply.

        Raises BadSample if there is no answer, or if it cannot be used.
        """
        try:
            answer = await self._client.post("/chat/completions", body=request, cast_to=object)
        except self._openai.APIError as error:
            status = error.status_code if isinstance(error, self._openai.APIStatusError) else None
            if status is None or status in WORTH_ANOTHER_TRY or status >= 500:
                self.unanswered += 1
                raise BadSample(NO_ANSWER, self._words(error)) from error
            self.unanswered = 0
            raise BadSample(REFUSED, self._words(error)) from error
        except ValueError as error:
            self.unanswered = 0
            raise BadSample(MALFORMED, f"expected JSON: {error}") from error
        self.unanswered = 0
        return read_reply(answer, request["max_tokens"])

    async def close(self) -> None:
        """Close the connections to the server."""
        await self._client.close()

    def _words(self, error: Exception) -> str:
        """Return the server's error message, or the connection error, on one line."""
        if isinstance(error, self._openai.APIStatusError):
            body = error.body
            text = f"{error.status_code}: {body['message'] if isinstance(body, dict) and 'message' in body else body}"
        else:
            text = f"{error} {error.__cause__ or ''}"
        return hidden_in_text(" ".join(text.split())[:300], self._api_key)


async def served_model(servers: Sequence[Server], wanted: str | None) -> str:
    """Return the name of the model that all servers serve.

    wanted: the name to look for; None = each server must serve exactly one model.
    Raises ConfigError if the servers do not serve one common model.
    """
    offers = await asyncio.gather(*(server.models() for server in servers))
    for server, offered in zip(servers, offers, strict=True):
        if wanted is None and len(offered) != 1 or wanted is not None and wanted not in offered:
            problem = f"{server.address} serves {', '.join(offered) or 'nothing'}; name a model that it serves"
            raise ConfigError(problem, key="regenerate.model", value=wanted)
    found = {wanted} if wanted is not None else {offered[0] for offered in offers}
    if len(found) > 1:
        served = ", ".join(f"{server.address} {offered[0]}" for server, offered in zip(servers, offers, strict=True))
        raise ConfigError(f"expected servers of one model; these serve {served}", key="regenerate.servers")
    return found.pop()


def as_sent(message: Message) -> Message:
    """Convert a message to the API's format, in which tool call arguments are text.

    Raises BadSample if a tool call is malformed.
    """
    calls = message.get("tool_calls")
    if not calls:
        return message
    try:
        return message | {"tool_calls": [call | {"function": with_arguments(call["function"], _as_text)} for call in calls]}
    except (LookupError, TypeError, AttributeError) as error:
        raise BadSample("malformed tool call", f"{type(error).__name__}: {error} in {calls!r:.200}") from error


def read_reply(answer: Any, max_new_tokens: int) -> ServerReply:
    """Return the assistant's turn from an answer of /chat/completions.

    Tool call arguments are converted to objects, which chat templates read.
    Raises BadSample if the reply is empty or cut short, or if the answer is malformed.
    """
    try:
        choice = answer["choices"][0]
        usage = answer.get("usage") or {}
        message = choice["message"]
        ending = choice["finish_reason"]
        calls = message.get("tool_calls") or ()
        parts: Message = {
            "content": message.get("content") or "",
            "reasoning_content": message.get("reasoning_content") or message.get("reasoning") or "",
            "tool_calls": [call | {"function": with_arguments(call["function"], as_object)} for call in calls],
        }
        num_tokens = int(usage.get("completion_tokens") or 0)
        empty = not (parts["content"] + parts["reasoning_content"]).strip() and not parts["tool_calls"]
        as_line(parts)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadSample(MALFORMED, f"{type(error).__name__}: {error} in {str(answer)[:200]!r}") from error
    if ending == "length":
        raise BadSample(TOO_LONG, f"cut at {max_new_tokens} tokens")
    if ending not in WHOLE:
        raise BadSample("reply cut short", f"finish_reason {ending!r}")
    if empty:
        raise BadSample("empty reply", "no content, no reasoning, no tool call")
    return ServerReply(
        {"role": "assistant", **{key: part for key, part in parts.items() if part or key == "content"}}, num_tokens
    )


def _as_text(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _import_openai() -> ModuleType:
    try:
        import openai
    except ImportError as error:
        raise ValueError("regenerate_data.py needs the package openai: pip install 'draftspeed[data]'") from error
    return openai
