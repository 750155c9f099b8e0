# SPDX-License-Identifier: Apache-2.0
"""An image registry on loopback that stands for every registry there is."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self

from integration.lib.host_network import HostNetwork
from integration.lib.images import MANIFEST_TYPE, Image


class Registry:
    """Serves images by pull, in a host network.  A context manager.

    Args:
        images: ``repository:tag`` → image; the host that a client asks for does not count.
    """

    def __init__(self, host: HostNetwork, images: dict[str, Image]) -> None:
        self._host = host
        self._images = images
        self._blobs = {k: v for image in images.values() for k, v in image.blobs.items()}
        self._manifests = {image.manifest for image in images.values()}

    def __enter__(self) -> Self:
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                registry._answer(self, body=True)

            def do_HEAD(self) -> None:
                registry._answer(self, body=False)

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self._server = self._host.call(lambda: ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def write_hosts(self, directory: Path) -> None:
        """A directory for containerd's ``config_path``: every registry is this one."""
        port = self._server.server_address[1]
        (directory / "_default").mkdir(parents=True)
        (directory / "_default/hosts.toml").write_text(
            f'[host."http://127.0.0.1:{port}"]\n  capabilities = ["pull", "resolve"]\n'
        )

    def _answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = request.path.partition("?")[0].removeprefix("/v2/")
        data: bytes | None = b"{}"
        media_type, digest = "application/json", ""
        if path:
            repository, _, name = path.rpartition("/")
            repository, _, kind = repository.rpartition("/")
            digest = name.removeprefix("sha256:")
            if kind == "manifests" and not name.startswith("sha256:"):
                image = self._images.get(f"{repository}:{name}")
                digest = image.manifest if image is not None else ""
            data = self._blobs.get(digest)
            media_type = MANIFEST_TYPE if kind == "manifests" else "application/octet-stream"
        request.send_response(404 if data is None else 200)
        request.send_header("Content-Type", media_type)
        request.send_header("Content-Length", str(len(data or b"")))
        if data is not None and digest:
            request.send_header("Docker-Content-Digest", f"sha256:{digest}")
        request.end_headers()
        if body and data:
            request.wfile.write(data)
