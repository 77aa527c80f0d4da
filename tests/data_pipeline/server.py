"""A web server on the loopback interface that can break off, refuse, and serve ranges, like a bad day of figshare."""

import contextlib
import http.server
import threading
from dataclasses import dataclass, field


@dataclass
class Site:
    """files: path to content. break_after: bytes after which the first answers break off. seen: (path, Range).

    gate: no content is sent before it is set. length: what every answer says of its own, instead of its bytes.
    """

    files: dict[str, bytes]
    break_after: list[int] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    success: int = 200
    seen: list[tuple[str, str | None]] = field(default_factory=list)
    ranges: bool = True
    redirects: dict[str, str] = field(default_factory=dict)
    shift: int = 0
    url: str = ""
    gate: threading.Event | None = None
    length: str = ""


@contextlib.contextmanager
def serve(site):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            site.seen.append((self.path, wanted))
            if site.status:
                self.send_error(site.status.pop(0))
                return
            if self.path in site.redirects:
                self.send_response(302)
                self.send_header("Location", site.redirects[self.path])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if self.path not in site.files:
                self.send_error(404)
                return
            content = site.files[self.path]
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and site.ranges else 0
            if start and start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if start else site.success)
            self.send_header("Content-Length", site.length or str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start + site.shift}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if site.gate is not None:
                site.gate.wait(60)
            body = content[start:]
            if site.break_after:
                body = body[: site.break_after.pop(0)]
                self.close_connection = True
            self.wfile.write(body)

        def log_message(self, *_):
            """Keeps the test's output clean."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        site.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield site
        finally:
            server.shutdown()
            thread.join()
