"""A hub on localhost for the real client (HF_ENDPOINT): a gated data set, ranges, and faults."""

import functools
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = b"<html>Please log in</html>"  # a proxy's


@functools.cache
def sha1(data):
    return hashlib.sha1(data).hexdigest()


class Hub:
    """Serves `files` ({path: bytes}) as the data set `repo`.

    `tokens`: {token: None, or the status that it gets}; no or another token gets 401. `faults`:
    what happens to the next range requests, one after the other: a status such as 503, "cut"
    (half of the body, then the line drops), "html" (another page, status 200), "wrong" (zeros),
    "long", or None. `delay`: seconds that each of them takes. `ranges`: (path, first byte, number
    of bytes sent) of those that were answered.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.reset("", {})
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def reset(self, repo, tokens):
        self.repo, self.tokens, self.files = repo, tokens, {}
        self.log_in_page = False  # a proxy's, with status 200, in place of every listing
        self.faults, self.ranges, self.requests, self.delay = [], [], [], 0

    def sha(self):
        """Of the revision: another one where a file is another."""
        contents = [(name, sha1(data)) for name, data in sorted(self.files.items())]
        return sha1(repr(contents).encode())

    def answer(self, request):
        length = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(length)
        url = urlsplit(request.path)
        path = unquote(url.path)
        self.requests.append((request.command, path, request.headers.get("Range")))
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        refused = self.tokens.get(token, 401)
        if f"/{self.repo}" not in path:
            return self.send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        if refused:
            header = {"X-Error-Message": "Invalid credentials in Authorization header"}
            if not token or refused == 403:
                header = {"X-Error-Code": "GatedRepo"}
            return self.send(request, refused, b"", header)
        if match := re.fullmatch(rf"/datasets/{self.repo}/resolve/[^/]+/(.+)", path):
            return self.send_file(request, match[1])
        if re.fullmatch(rf"/api/datasets/{self.repo}(/revision/[^/]+)?", path):
            known = {"id": self.repo, "sha": self.sha(), "tags": []}
            known["siblings"] = [{"rfilename": name} for name in self.files]
            return self.send_json(request, known)
        if match := re.fullmatch(rf"/api/datasets/{self.repo}/tree/[^/]+/?(.*)", path):
            recursive = "true" in parse_qs(url.query).get("recursive", [""])[0].lower()
            return self.send_json(request, self.tree(match[1], recursive))
        if re.fullmatch(rf"/api/datasets/{self.repo}/paths-info/[^/]+", path):
            asked = json.loads(body) if body[:1] == b"{" else parse_qs(body.decode())
            entries = self.tree("", recursive=True)
            return self.send_json(request, [x for x in entries if x["path"] in asked["paths"]])
        return self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})

    def tree(self, folder, recursive):
        """The entries of a listing of a folder, in which folders are entries, too."""
        entries = {}
        for name, data in self.files.items():
            parts = name.split("/")
            for i in range(1, len(parts)):
                path = "/".join(parts[:i])
                entries[path] = {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
            entries[name] = {"type": "file", "path": name, "size": len(data), "oid": "1" * 40}
        start = f"{folder}/" if folder else ""
        within = [path for path in entries if path.startswith(start)]
        return [entries[path] for path in within if recursive or "/" not in path[len(start) :]]

    def send_json(self, request, value):
        data = PAGE if self.log_in_page else json.dumps(value).encode()
        self.send(request, 200, data, {"Content-Type": "application/json"})

    def send_file(self, request, name):
        headers = {"X-Repo-Commit": self.sha()}
        if name not in self.files:
            return self.send(request, 404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
        data = self.files[name]
        headers |= {"ETag": f'"{sha1(data)}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range") or "")
        if not wanted:
            return self.send(request, 200, data, headers)
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        time.sleep(self.delay)
        with self.lock:
            fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            return self.send(request, fault, b"", {})
        if fault == "html":
            return self.send(request, 200, PAGE, {})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        data = data[first : last + 1]
        if fault == "cut":
            request.close_connection = True
            headers["Content-Length"] = len(data)
            return self.send(request, 206, data[: len(data) // 2], headers)
        data = {"wrong": bytes(len(data)), "long": data + b"more"}.get(fault, data)
        with self.lock:
            self.ranges.append((name, first, len(data)))
        return self.send(request, 206, data, headers)

    def send(self, request, status, data, headers):
        request.send_response(status)
        for key, value in {"Content-Length": len(data), **headers}.items():
            request.send_header(key, str(value))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)
