"""A reward given by a language model, behind any OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp, hosted ones)."""

import asyncio
import json
import logging
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .text import Completion, completion_text

logger = logging.getLogger(__name__)

TEMPLATE = """Rate how good the answer to the question is, from 0 (useless) to 10 (perfect).
End with a line of the form `Score: <number>`.

# Question
{prompt}

# Answer
{completion}"""

RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
LONGEST_PAUSE = 30.0  # seconds between two attempts, whatever the server asks for


class JudgeFailure(Exception):
    """No score for one sample, with the reason; `retry_after` (seconds) where another attempt may help."""

    def __init__(self, reason: str, retry_after: float | None = None):
        super().__init__(reason)
        self.retry_after = retry_after


class Judge:
    r"""An async reward function that asks a model for a score, which is mapped to 0..1.

    A sample that gets no score within its attempts (no connection, an error of the server, a reply without a score or
    with one out of range) is None, and the reason stands in the extra column `judge_failure`; the metric `judge/failed`
    is their share. The judge reads what the policy wrote and can be talked into a score by it: look at what it rewards.

    Args:
        model: the name that the endpoint knows the model by.
        base_url: up to and with the version, such as "http://localhost:8000/v1".
        api_key: sent as bearer token, if given.
        template: the judge's prompt, for `str.format`: {prompt}, {completion} and the dataset's columns, such as
            {answer}. Braces of your own are doubled.
        score_pattern: a regular expression whose first group is the score; its last match in the reply counts.
        score_field: read the score from this field of the JSON object in the reply instead.
        score_range: the scores that are mapped to 0 and 1.
        concurrency: requests under way at once, over all calls.
        timeout: seconds for one request. retries: further attempts after the first.
        options: further fields of the request, such as {"max_tokens": 512, "temperature": 0}.

    Raises:
        ImportError: httpx is not installed.
        ValueError: arguments out of range; when called, a template that names a column that the dataset does not have.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        api_key: str | None = None,
        *,
        template: str = TEMPLATE,
        score_pattern: str = r"[Ss]core\W*?(-?\d+(?:\.\d+)?)",
        score_field: str | None = None,
        score_range: tuple[float, float] = (0.0, 10.0),
        concurrency: int = 16,
        timeout: float = 60.0,
        retries: int = 3,
        options: Mapping[str, Any] | None = None,
    ):
        _httpx()
        if concurrency < 1 or timeout <= 0 or retries < 0 or not score_range[0] < score_range[1]:
            raise ValueError(
                "Judge needs concurrency >= 1, timeout > 0, retries >= 0 and a rising score_range, got "
                f"{concurrency=}, {timeout=}, {retries=}, {score_range=}"
            )
        if re.compile(score_pattern).groups < 1:
            raise ValueError(f"Judge: score_pattern needs a group for the score, as in '(\\d+)', got {score_pattern!r}")
        self.model, self.url = model, base_url.rstrip("/") + "/chat/completions"
        self.template, self.score_pattern, self.score_field = template, score_pattern, score_field
        self.score_range, self.timeout, self.retries = score_range, timeout, retries
        self.options = {"temperature": 0.0} if options is None else dict(options)
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._concurrency = concurrency
        self._slots = weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore]()

    async def __call__(
        self,
        prompts: Sequence[Completion],
        completions: Sequence[Completion],
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        count = len(completions)
        rows = {name: values for name, values in columns.items() if isinstance(values, list) and len(values) == count}
        requests = [
            self._request(prompts[index], completions[index], {name: values[index] for name, values in rows.items()})
            for index in range(count)
        ]
        limits = _httpx().Limits(max_connections=self._concurrency)
        # No time limit of httpx: its own is for each read or write, which a server that dribbles never meets.
        async with _httpx().AsyncClient(timeout=None, limits=limits, headers=self._headers) as client:
            results = await asyncio.gather(*(self._score(client, request) for request in requests))
        reasons = [reason for _, reason in results]
        failed = sum(reason is not None for reason in reasons)
        if failed:
            first = next(reason for reason in reasons if reason is not None)
            logger.warning("the judge %s gave no score for %d of %d completions: %s", self.model, failed, count, first)
        if log_extra is not None:
            log_extra("judge_failure", reasons)
        if log_metric is not None and count:
            log_metric("judge/failed", failed / count)
        return [score for score, _ in results]

    def _request(self, prompt: Completion, completion: Completion, row: Mapping[str, Any]) -> dict[str, Any]:
        values = {**row, "prompt": _conversation(prompt), "completion": completion_text(completion)}
        try:
            content = self.template.format_map(values)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"the judge's template does not fit: {type(error).__name__}: {error}. It can name {sorted(values)}; "
                "braces of its own are doubled."
            ) from error
        content = content.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be sent
        return {"model": self.model, "messages": [{"role": "user", "content": content}], **self.options}

    async def _score(self, client: Any, request: dict[str, Any]) -> tuple[float | None, str | None]:
        """(score in 0..1, None), or (None, reason)."""
        for attempt in range(self.retries + 1):
            try:
                async with self._semaphore():
                    return self._read_score(await self._ask(client, request)), None
            except JudgeFailure as failure:
                if failure.retry_after is None or attempt == self.retries:
                    return None, f"{failure} (attempt {attempt + 1})"
                pause = max(failure.retry_after, 0.25 * 2**attempt)
            await asyncio.sleep(min(pause, LONGEST_PAUSE))
        raise AssertionError("the last attempt returns")

    async def _ask(self, client: Any, request: dict[str, Any]) -> str:
        """The text of the reply."""
        try:
            response = await asyncio.wait_for(client.post(self.url, json=request), self.timeout)
        except TimeoutError as error:
            raise JudgeFailure(f"no reply in {self.timeout} s", retry_after=0) from error
        except _httpx().HTTPError as error:
            raise JudgeFailure(f"{type(error).__name__}: {error}", retry_after=0) from error
        if response.status_code != 200:
            pause = response.headers.get("retry-after", "")
            wait = float(pause) if re.fullmatch(r"\d+(\.\d+)?", pause) else 0.0
            retry_after = wait if response.status_code in RETRIED_STATUS else None
            raise JudgeFailure(f"status {response.status_code} from {self.url}: {response.text[:200]}", retry_after)
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise JudgeFailure(f"not a chat completion: {response.text[:200]}") from error
        if not isinstance(content, str):
            raise JudgeFailure(f"a reply without text: {response.text[:200]}")
        return content

    def _read_score(self, reply: str) -> float:
        if self.score_field is None:
            found = [match[1] for match in re.finditer(self.score_pattern, reply)]
            value: Any = found[-1] if found else None
        else:
            value = _json_field(reply, self.score_field)
        try:
            score = float(value)
        except (TypeError, ValueError):
            raise JudgeFailure(f"no score in the reply: {reply[-200:]!r}") from None
        low, high = self.score_range
        if not low <= score <= high:
            raise JudgeFailure(f"score {score} is not in {low}..{high}")
        return (score - low) / (high - low)

    def _semaphore(self) -> asyncio.Semaphore:
        """One for all calls on an event loop, which it belongs to; several threads may have one each."""
        return self._slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._concurrency))


def _conversation(prompt: Completion) -> str:
    """A prompt as text: itself, the only message, or each message under its role."""
    if isinstance(prompt, str) or len(prompt) == 1:
        return completion_text(prompt)
    return "\n\n".join(f"[{message['role']}]\n{completion_text([message])}" for message in prompt)


def _json_field(reply: str, name: str) -> Any:
    """The field of the JSON object in a reply (the widest pair of braces), or None."""
    start, end = reply.find("{"), reply.rfind("}")
    try:
        parsed = json.loads(reply[start : end + 1])
    except (ValueError, RecursionError):
        return None
    return parsed.get(name) if isinstance(parsed, dict) else None


def _httpx() -> Any:
    try:
        import httpx
    except ImportError as error:
        raise ImportError("Judge needs the package httpx: `pip install colora[judge]`") from error
    return httpx
