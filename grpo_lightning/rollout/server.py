"""One vLLM server: what it is asked over HTTP, and whether it is still there."""

import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from threading import Event, Lock, Thread
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from grpo_lightning.rollout.engine import RolloutLostError
from grpo_lightning.types import ConfigurationError

_CONNECT_SECONDS = 10.0
_PASSING = {408, 425, 429}
"""Answers of the kind "not now"; as those from 500 on."""


class ServerError(RolloutLostError):
    """A server does not answer, or not as it should."""


class _NoAnswerInTimeError(ServerError):
    """It was asked, and did not answer in time."""


class SlowServerError(RuntimeError):
    """A server that gives signs of life takes too long for a completion."""


class Drawn(NamedTuple):
    """A completion as a server describes it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    has_stopped: bool
    """Not for its length."""


class Server:
    """A vLLM server in its development mode.

    Args:
        url: ``http://host:port``.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.heard_from = time.monotonic()
        """When it answered last."""
        self._asked: set[socket.socket] = set()
        self._lock = Lock()
        self._why_hung_up: str | None = None

    def take_up(self) -> None:
        """Ask it again, whatever there was before."""
        self.heard_from, self._why_hung_up = time.monotonic(), None

    def instances(self, *, timeout: float) -> list[str]:
        """Of each of its workers the name that it got when it was started, and how often it was sent weights."""
        return [str(name) for [name] in self.ask_workers("report_instance", timeout=timeout)]

    def ask_workers(self, method: str, *args: Any, timeout: float) -> list[Any]:
        """What each worker answers to a method of `WeightReceiver`."""
        body = {"method": method, "args": list(args)}
        results = self.post("/collective_rpc", body, timeout=timeout).get("results")
        if not isinstance(results, list):
            raise ServerError(f"{self.url}: no worker answered {method}")
        return results

    def complete(self, body: dict[str, Any], *, timeout: float) -> Drawn:
        """Draw one completion.

        Raises:
            ServerError: The server is lost, or what it says is no completion.
            SlowServerError: It takes longer than `timeout` seconds.
        """
        try:
            answer = self.post("/v1/completions", body, timeout=timeout)
        except _NoAnswerInTimeError as error:
            raise SlowServerError(
                f"model.engine.request_timeout_seconds: {self.url} took longer than {timeout:g} s for a completion, "
                "though it is there. Give it longer, or ask for fewer at once (model.engine.max_requests)."
            ) from error
        drawn = drawn_by(answer, limit=body["max_tokens"])
        if drawn is None:
            raise ServerError(f"{self.url} answered with something that is no completion: {str(answer)[:200]}")
        return drawn

    def post(self, path: str, body: dict[str, Any], *, timeout: float) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            ConfigurationError: The server refuses what it is asked for.
            ServerError: It does not answer within `timeout` seconds, or not as it should.
        """
        status, content = self._exchange(path, json.dumps(body), timeout)
        said = f"{self.url}{path} answered {status}: {content[:200]!r}"
        if 300 <= status < 500 and status not in _PASSING:
            raise ConfigurationError(
                f"model.engine.urls: {said}\nIs it started as docs/engines.md says, with VLLM_SERVER_DEV_MODE=1?"
            )
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if status >= 300 or not isinstance(answer, dict):
            raise ServerError(said)
        self.heard_from = time.monotonic()
        return answer

    def _exchange(self, path: str, body: str, timeout: float) -> tuple[int, bytes]:
        address = urlsplit(self.url)
        kind = HTTPSConnection if address.scheme == "https" else HTTPConnection
        # No proxies: servers are neighbours.
        connection = kind(address.netloc, timeout=min(timeout, _CONNECT_SECONDS))
        line: socket.socket | None = None
        try:
            connection.connect()
            line = self._register(connection.sock)  # which the connection forgets when an answer begins
            line.settimeout(timeout)
            connection.request("POST", address.path + path, body, {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                return response.status, response.read()
        except (OSError, HTTPException) as error:
            is_late = isinstance(error, TimeoutError) and line is not None
            kind_of_error = _NoAnswerInTimeError if is_late else ServerError
            raise kind_of_error(f"{self.url}{path}: {self._why_hung_up or error or type(error).__name__}") from error
        finally:
            with self._lock:
                self._asked.discard(line)
            connection.close()

    def _register(self, line: socket.socket) -> socket.socket:
        """Have `hang_up` know of a socket; nothing is asked once it has been called."""
        with self._lock:
            if self._why_hung_up is not None:
                raise ConnectionAbortedError(self._why_hung_up)
            self._asked.add(line)
            return line

    def hang_up(self, why: str) -> None:
        """Give up waiting for whatever answers are due, and ask for nothing more until `take_up`."""
        with self._lock:
            self._why_hung_up = why
            for line in self._asked:
                with suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def watched(self, *, patience: float) -> Iterator[None]:
        """Inside, the server is asked for a sign of life time and again; what waits for one that gives none fails.

        Args:
            patience: Longest silence, in seconds.
        """
        is_over = Event()

        def watch() -> None:
            while not is_over.wait(patience / 10):
                try:
                    self.instances(timeout=patience / 2)
                except (ServerError, ConfigurationError) as error:
                    if not is_over.is_set():
                        self.hang_up(f"no sign of life ({error})")
                    return

        thread = Thread(target=watch, name=f"signs of life of {self.url}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()  # and not waited for: an answer may be due for long, and nobody needs it
            self._why_hung_up = None


def patiently(
    ask: Callable[[], list[str]],
    servers: Sequence[Server],
    *,
    patience: float,
    grace: Callable[[], float] | None = None,
) -> list[str]:
    """Ask until there is an answer, at longer and longer intervals.

    Args:
        ask: Raises a `ServerError` where one of the servers does not answer.
        servers: Those that are asked.
        patience: Longest silence of one of them, in seconds.
        grace: Until when silence is to be expected.

    Raises:
        ServerError: One was silent for so long.
    """
    pause = 0.25
    while True:
        try:
            return ask()
        except ServerError as error:
            deadline = min(server.heard_from for server in servers) + patience
            if time.monotonic() + pause > max(deadline, grace() if grace else deadline):
                raise ServerError(f"model.engine.urls: no answer for {patience:g} s: {error}") from error
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def drawn_by(answer: dict[str, Any], *, limit: int) -> Drawn | None:
    """What a server's answer says; None where it is no completion.

    Args:
        answer: To a request for one completion.
        limit: Most tokens that it may have.
    """
    try:
        (choice,) = answer["choices"]
        token_ids = tuple(int(token) for token in choice["token_ids"])
        logprobs = tuple(float(logprob) for logprob in choice["logprobs"]["token_logprobs"])
        reason = choice["finish_reason"]
    except (KeyError, TypeError, ValueError):
        return None
    is_one = (
        0 < len(token_ids) == len(logprobs) <= limit
        and min(token_ids) >= 0
        and all(logprob <= 0 for logprob in logprobs)
        and reason in ("stop", "length")
    )
    return Drawn(token_ids, logprobs, reason == "stop") if is_one else None
