"""When an engine may be asked what: awake, asleep or closed, with requests unfinished or none."""

from typing import Literal


class Lifecycle:
    """The state both engines have, and the refusals that follow from it."""

    _state: Literal["awake", "asleep", "closed"] = "awake"

    @property
    def unfinished(self) -> int:
        """Requests submitted and not yet returned."""
        raise NotImplementedError

    def _require_awake(self, action: str) -> None:
        if self._state != "awake":
            remedy = "call wake() first" if self._state == "asleep" else "make a new one"
            raise RuntimeError(f"{action}: the engine is {self._state}; {remedy}")

    def _require_idle(self, action: str) -> None:
        if self._state == "closed":
            raise RuntimeError(f"{action}: the engine is closed; make a new one")
        if self.unfinished:
            raise RuntimeError(
                f"{action}: {self.unfinished} requests are unfinished; call step() until `unfinished` is 0, or abort()"
            )
