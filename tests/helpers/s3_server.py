"""A real S3 server on loopback (moto's) that can fail on demand; credentials come from the environment alone.

with s3_server() as store:
    subprocess.run(command, env=os.environ | store.env)   # store.url is s3://bucket
    with store.failing():                                 # 500 for as long as the block lasts
        ...
    store.failing_for(seconds=3)                          # 500 from now on, for a while
    store.fail_next(5, status=503)                        # the next five requests
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import fsspec
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

SECRET = "loopback-secret-that-no-file-may-hold"
ANSWER = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"
CODES = {500: "InternalError", 503: "SlowDown", 403: "AccessDenied"}


@dataclass
class Store:
    """bucket: its name; env: what a process needs to reach it; seen: method, path and status of every request."""

    bucket: str
    env: dict[str, str] = field(default_factory=dict)
    seen: list[tuple[str, str, int]] = field(default_factory=list)
    _status: int = 500
    _left: int = 0
    _until: float = 0.0
    _only: str = ""

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    def fail_next(self, count: int, status: int = 500) -> None:
        self._left, self._status = count, status

    def failing_for(self, seconds: float, status: int = 500) -> None:
        self._until, self._status = time.monotonic() + seconds, status

    @contextmanager
    def failing(self, status: int = 500, only: str = "") -> Iterator[None]:
        """For the length of a block; `only` is a part of the paths that fail, if not all do."""
        self.failing_for(float("inf"), status)
        self._only = only
        try:
            yield
        finally:
            self._until, self._only = 0.0, ""

    def counts(self, method: str) -> int:
        """Requests of a method that were answered."""
        return sum(seen == method and status < 500 for seen, _, status in self.seen)

    @cached_property
    def plain(self) -> fsspec.AbstractFileSystem:
        """A file system that goes its own way, for looking behind the back of what is tested."""
        return fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)

    def keys(self, prefix: str = "") -> list[str]:
        """All objects below a prefix, sorted, as the server has them."""
        return sorted(name.removeprefix(f"{self.bucket}/") for name in self.plain.find(f"{self.bucket}/{prefix}"))

    def read(self, key: str) -> bytes:
        return self.plain.cat_file(f"{self.bucket}/{key}")

    def write(self, key: str, content: bytes) -> None:
        self.plain.pipe_file(f"{self.bucket}/{key}", content)

    def delete(self, key: str) -> None:
        self.plain.rm_file(f"{self.bucket}/{key}")

    def takes(self, path: str = "") -> int | None:
        """The status to answer the next request with, None where the server may answer it."""
        if self._only not in path:
            return None
        if self._left > 0:
            self._left -= 1
            return self._status
        return self._status if time.monotonic() < self._until else None


class _Sometimes:
    """moto's application, but for when the store is to fail."""

    store: Store

    def __init__(self):
        self.app = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: dict, start_response):
        seen = [environ["REQUEST_METHOD"], environ["PATH_INFO"]]

        def started(status, *rest):
            self.store.seen.append((*seen, int(status.split()[0])))
            return start_response(status, *rest)

        if (status := self.store.takes(seen[1])) is None:
            return self.app(environ, started)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        answer = ANSWER.format(CODES.get(status, status), f"The test says {status}.").encode()
        started(f"{status} Failing", [("Content-Type", "application/xml"), ("Content-Length", str(len(answer)))])
        return [b"" if seen[0] == "HEAD" else answer]


@contextmanager
def s3_server() -> Iterator[Store]:
    """Starts a server with an empty bucket, and puts what reaches it into this process's environment meanwhile."""
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    app = _Sometimes()
    server = make_server("127.0.0.1", 0, app, threaded=True)
    store = app.store = Store(f"sweeps-{server.server_port}")  # moto's servers of one process share their buckets
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    store.env |= {
        "AWS_ACCESS_KEY_ID": "loopback",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
    }
    before = dict(os.environ)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        os.environ.pop(name, None)
    os.environ.update(store.env)
    try:
        _forget_clients()
        store.plain.mkdir(store.bucket)
        store.seen.clear()
        yield store
    finally:
        os.environ.clear()
        os.environ.update(before)
        _forget_clients()
        server.shutdown()
        thread.join()


def _forget_clients() -> None:
    """fsspec keeps its file systems, and botocore reads the environment once for each."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
