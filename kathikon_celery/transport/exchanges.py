"""How an exchange finds its queues, where kombu's rules are not AMQP's."""

from __future__ import annotations

import re
from functools import lru_cache

from kombu.transport.virtual import exchange

#: A dot is put before each word of a routing key, so that any number of words is one part of the pattern.
_WILDCARDS = {"*": r"\.[^.]*", "#": r"(?:\.[^.]*)*"}


@lru_cache(maxsize=4096)
def _pattern(binding_key: str) -> re.Pattern[str]:
    words = binding_key.split(".") if binding_key else []
    return re.compile("".join(_WILDCARDS.get(word, r"\." + re.escape(word)) for word in words))


class TopicExchange(exchange.TopicExchange):
    """A key is words between dots; in a binding ``*`` stands for one word and ``#`` for any number, also for none."""

    def key_to_pattern(self, rkey: str) -> str:
        return rkey

    def _match(self, pattern: str, string: str) -> bool:
        return _pattern(pattern).fullmatch(f".{string}" if string else "") is not None
