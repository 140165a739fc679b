"""A Hub on 127.0.0.1 that holds repositories in memory and speaks what describing one needs: the model API, and files with ranges."""

from __future__ import annotations

import contextlib
import json
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def safetensors_file(tensors, header_padding=0):
    """A file of (name: (dtype, shape, bytes an element)) whose weights are as long as they say, all zero."""
    document, end = {}, 0
    for name, (dtype, shape, element) in tensors.items():
        size = element
        for dim in shape:
            size *= dim
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(document).encode() + b" " * header_padding
    return struct.pack("<Q", len(header)) + header + bytes(end)


class Hub:
    """Repositories by id, each its files; and what was asked."""

    def __init__(self):
        self.repositories = {}
        self.errors = {}  # repository -> (status, X-Error-Code)
        self.honours_ranges = True
        self.requests = []
        self.sent_bytes = 0
        self.endpoint = ""


@contextlib.contextmanager
def serve():
    """A running Hub; ``endpoint`` is its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_GET(self):
            path = unquote(self.path.partition("?")[0]).strip("/")
            if not path.startswith("api/models/") and "/resolve/" not in path:
                return self.fail(404, "")  # the library may ask for other things of its own
            hub.requests.append(path)
            if path.startswith("api/models/"):
                name, _, revision = path.removeprefix("api/models/").partition("/revision/")
                return self.describe(name, revision)
            name, _, rest = path.partition("/resolve/")
            return self.send_part(hub.repositories.get(name, {}).get(rest.partition("/")[2]))

        def describe(self, name, revision):
            if name in hub.errors:
                return self.fail(*hub.errors[name])
            if name not in hub.repositories:
                return self.fail(404, "RepoNotFound")
            if revision not in ("", "main", COMMIT):
                return self.fail(404, "RevisionNotFound")
            siblings = [{"rfilename": path, "size": len(raw)} for path, raw in hub.repositories[name].items()]
            return self.answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())

        def send_part(self, raw):
            if raw is None:
                return self.fail(404, "EntryNotFound")
            asked = self.headers.get("range")
            if asked is None or not hub.honours_ranges:
                return self.answer(200, raw)
            first, _, last = asked.removeprefix("bytes=").partition("-")
            part = raw[int(first) : int(last) + 1]
            return self.answer(206, part, {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(raw)}"})

        def fail(self, status, code):
            return self.answer(status, b"", {"X-Error-Code": code})

        def answer(self, status, body, headers=()):
            self.send_response(status)
            for key, value in dict(headers).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the client hangs up when it has enough
                self.wfile.write(body)
                hub.sent_bytes += len(body)

    return Handler
