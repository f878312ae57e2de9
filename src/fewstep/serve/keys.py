"""Who may use the service, and how much of it.

A key file is TOML, one table for each key; a key stands as it is, or as its SHA-256:

    [shop]
    key = "sk-..."
    rate = 120          # requests in a minute
    concurrent = 8      # requests at a time

    [lab]
    sha256 = "9f86d081884c7d65..."
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.data.bounds import read_bytes
from fewstep.records import as_slug, shown
from fewstep.serve.errors import ApiError

__all__ = ["Client", "Clients", "Key", "read_keys"]

MOST_CLIENTS = 10_000  # addresses that are remembered
FIELDS = {"key", "sha256", "rate", "concurrent"}


@dataclass(frozen=True)
class Key:
    """A key by its hash.

    Attributes:
        name: who has it
        digest: SHA-256, in hexadecimal
        rate: requests in a minute; None for any number
        concurrent: requests at a time; None for the service's own limit
    """

    name: str
    digest: str
    rate: int | None = None
    concurrent: int | None = None


def read_keys(path: Path | str) -> tuple[Key, ...]:
    """The keys of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: that names the file and the key's name, never the key.
    """
    try:
        tables = tomllib.loads(read_bytes(path, 1 << 20).decode())
        keys = tuple(_key(name, table) for name, table in tables.items())
        if not keys:
            raise ValueError("it has no key")
        if len({key.digest for key in keys}) < len(keys):
            raise ValueError("two names have the same key")
    except ValueError as error:
        raise ValueError(f"{path} is not a key file: {error}") from None
    return keys


def _key(name: str, table: Any) -> Key:
    if not isinstance(table, dict) or (unknown := set(table) - FIELDS):
        extra = f", got {', '.join(map(shown, sorted(unknown)))}" if isinstance(table, dict) else ""  # type: ignore[possibly-unbound]
        raise ValueError(f"[{name!r:.40}] must have key or sha256, rate, concurrent{extra}")
    if ("key" in table) == ("sha256" in table):
        raise ValueError(f"[{name!r:.40}] must have either key or sha256")
    if "key" in table:
        if not isinstance(table["key"], str) or len(table["key"]) < 16:
            raise ValueError(f"the key of [{name!r:.40}] must be text of at least 16 characters")
        digest = hashlib.sha256(table["key"].encode()).hexdigest()
    else:
        digest = str(table["sha256"]).lower()
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError(f"sha256 of [{name!r:.40}] must be 64 hexadecimal digits")
    for limit in ("rate", "concurrent"):
        value = table.get(limit)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{limit} of [{name!r:.40}] must be a whole number from 1 on")
    return Key(as_slug(name), digest, table.get("rate"), table.get("concurrent"))


@dataclass(eq=False)
class Client:
    """Somebody with a key, or without one an address.

    Attributes:
        name: for logs
        rate: requests in a minute, or None
        concurrent: requests at a time
        active: requests now
    """

    name: str
    rate: int | None
    concurrent: int
    active: int = 0
    tokens: float = field(default=0.0)
    when: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.tokens = float(self.rate or 0)

    def enter(self) -> None:
        """Begin a request. Raises ApiError where there are too many."""
        if self.active >= self.concurrent:
            raise ApiError(
                429,
                f"at most {self.concurrent} requests at a time; wait for one to end",
                code="too_many_requests",
                retry_after=1,
            )
        if self.rate is not None:
            now = time.monotonic()
            self.tokens = min(self.rate, self.tokens + (now - self.when) * self.rate / 60)
            self.when = now
            if self.tokens < 1:
                raise ApiError(
                    429,
                    f"at most {self.rate} requests a minute",
                    code="rate_limit_exceeded",
                    retry_after=(1 - self.tokens) * 60 / self.rate,
                )
            self.tokens -= 1
        self.active += 1

    def leave(self) -> None:
        """End a request."""
        self.active -= 1


class Clients:
    """All clients: by their keys where there are any, else by their addresses."""

    def __init__(self, keys: tuple[Key, ...], concurrent: int) -> None:
        self.keys, self._concurrent = keys, concurrent
        self._known: dict[str, Client] = {}

    def of(self, authorization: str | None, address: str) -> Client:
        """Who asks. Raises ApiError 401 where a key is needed and there is none."""
        if not self.keys:
            return self._client(address, None, None)
        scheme, _, token = (authorization or "").partition(" ")
        digest = hashlib.sha256(token.strip().encode("utf-8", "replace")).hexdigest()
        found = None
        for key in self.keys:  # all of them, so that the time says nothing
            if hmac.compare_digest(key.digest, digest):
                found = key
        if found is None or scheme.lower() != "bearer":
            raise ApiError(
                401, "give a key of this service: Authorization: Bearer KEY", code="invalid_api_key"
            )
        return self._client(found.name, found.rate, found.concurrent)

    def _client(self, name: str, rate: int | None, concurrent: int | None) -> Client:
        client = self._known.get(name)
        if client is None:
            if len(self._known) >= MOST_CLIENTS:
                self._known = {n: one for n, one in self._known.items() if one.active}
            client = Client(name, rate, concurrent or self._concurrent)
            self._known[name] = client
        return client
