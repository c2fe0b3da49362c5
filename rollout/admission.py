"""What an engine refuses before it takes requests."""

from collections.abc import Sequence, Set

from .engine import RolloutRequest


def check_requests(requests: Sequence[RolloutRequest], in_flight: Set[str], max_context: int, vocab_size: int) -> None:
    """Raise ValueError, by the request's id, for the first request that cannot be served.

    Refused: an empty prompt, a token or stop token outside the vocabulary, prompt + max_tokens over `max_context`, a
    negative seed, a request id that is in flight or occurs twice.
    """
    seen = set(in_flight)
    for request in requests:
        _check(request, max_context, vocab_size)
        if request.request_id in seen:
            raise ValueError(f"request {request.request_id!r}: the id is in flight; give every request its own")
        seen.add(request.request_id)


def _check(request: RolloutRequest, max_context: int, vocab_size: int) -> None:
    name, prompt, max_tokens = request.request_id, request.prompt_ids, request.sampling.max_tokens
    if not prompt:
        raise ValueError(f"request {name!r}: the prompt is empty; give at least one token, such as BOS")
    if len(prompt) + max_tokens > max_context:
        raise ValueError(
            f"request {name!r}: {len(prompt)} prompt tokens + max_tokens {max_tokens} are over max_context "
            f"{max_context}; shorten the prompt, lower max_tokens or raise max_context"
        )
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        outside = min(prompt) if min(prompt) < 0 else max(prompt)
        raise ValueError(
            f"request {name!r}: token id {outside} is outside the vocabulary (0 to {vocab_size - 1}); "
            "use the tokenizer of this model"
        )
    stops = [token for token in request.sampling.stop_token_ids if not 0 <= token < vocab_size]
    if stops:
        raise ValueError(
            f"request {name!r}: stop token {stops[0]} is outside the vocabulary (0 to {vocab_size - 1}), so the model "
            "can never end with it; use the tokenizer and the generation_config.json of this model"
        )
    if request.seed < 0:
        raise ValueError(f"request {name!r}: the seed must not be negative, got {request.seed}")
