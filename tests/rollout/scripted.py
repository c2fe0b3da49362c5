"""An engine whose turns are written in advance, by the conversation and the number of the turn."""

from collections import deque
from collections.abc import Callable, Sequence

from colora.rollout.engine import RolloutRequest
from colora.rollout.trajectory import Segment, Trajectory

Script = Callable[[str, int], list[int]]  # (conversation, turn) -> the sampled ids


class ScriptedEngine:
    """`RolloutEngine` that finishes the request that waits longest at each step."""

    def __init__(self, script: Script, max_context: int = 4096):
        self.script, self.max_context = script, max_context
        self.requests: list[RolloutRequest] = []  # all there were, in their order
        self._waiting: deque[RolloutRequest] = deque()

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        for request in requests:
            assert len(request.prompt_ids) + request.sampling.max_tokens <= self.max_context
            assert request.sampling.max_tokens >= 1
        self.requests += requests
        self._waiting.extend(requests)

    def step(self) -> list[Trajectory]:
        request = self._waiting.popleft()
        conversation, _, turn = request.request_id.rpartition("/")
        ids = self.script(conversation, int(turn))
        whole = len(ids) <= request.sampling.max_tokens
        ids = ids[: request.sampling.max_tokens]
        segment = Segment(ids, "model", [-0.5] * len(ids))
        reason = "stop" if whole else "length"
        return [Trajectory(request.request_id, list(request.prompt_ids), [segment], reason, request.seed)]

    @property
    def unfinished(self) -> int:
        return len(self._waiting)

    def abort(self) -> None:
        self._waiting.clear()

    def adapter_changed(self) -> None: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...
