"""What was refused, by reason: counted, and logged a line a second at most, so that a flood shows and fills no disk.

Imports no jax.
"""

from __future__ import annotations

import logging
import time
from collections import Counter

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 1.0  # of one reason
_MAX_CHARACTERS = 200  # of a text, which may quote what a client sent


class Refusals:
    """Belongs to one event loop. `counts`: calls refused, or cut off before their end, by reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._quiet_until: dict[str, float] = {}
        self._num_unsaid: Counter[str] = Counter()

    def count(self, reason: str) -> None:
        """For what is logged elsewhere. reason: a gRPC status's name, or one of HTTP's own in the same style."""
        self.counts[reason] += 1

    def note(self, reason: str, message: str, **where: str) -> None:
        """Count it, and log it unless another of its reason was logged just now. where: the caller and what it called.

        A line's `unlogged` is the number of those before it that have none.
        """
        self.count(reason)
        now = time.monotonic()
        if now < self._quiet_until.get(reason, now):
            self._num_unsaid[reason] += 1
            return
        self._quiet_until[reason] = now + _SECONDS_BETWEEN_LINES
        texts = {"reason": reason.lower(), "error": message, **where}
        fields = {name: text[:_MAX_CHARACTERS] for name, text in texts.items()}
        unsaid = self._num_unsaid.pop(reason, 0)
        log.info("refused", extra={"fields": {**fields, "unlogged": unsaid} if unsaid else fields})
