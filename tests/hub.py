"""A model and data hub on this machine: the few addresses that the hub's clients ask for, from folders.

`models/ORG/NAME` and `datasets/ORG/NAME` under a folder hold the files; whatever revision is asked for, they are it.
Names with "gated" in them are refused, and files that a file NAME.torn lies beside break off half-way.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ABOUT = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/[^/]+)?")
TREE = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/[^/]+(?:/(.*))?")
PATHS = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/[^/]+")
FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)")


def entry(root: Path, path: Path) -> dict:
    """What a listing says of a file or folder of a repository."""
    about = {"type": "directory", "path": path.relative_to(root).as_posix(), "oid": COMMIT, "size": 0}
    if path.is_file():
        about |= {"type": "file", "size": path.stat().st_size, "oid": sha256(path.read_bytes()).hexdigest()[:40]}
    return about


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix != ".torn")


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    asked: list[str]  # the paths that anything was asked of, in turn

    def log_message(self, *arguments):
        pass

    def send(self, status: int, body: bytes, headers: dict[str, str], *, keep: int | None = None) -> None:
        """Answer with the body, or with no more than its first `keep` bytes."""
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:keep])
        if keep is not None:
            self.close_connection = True

    def send_json(self, value) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str) -> None:
        self.send(status, code.encode(), {"X-Error-Code": code, "X-Error-Message": code})

    def repository(self, kind: str, name: str) -> Path | None:
        """The folder of a repository; None, and answered, where there is none or it is gated."""
        root = self.folder / kind / name
        if "gated" in name:
            self.refuse(403, "GatedRepo")
        elif not root.is_dir():
            self.refuse(404, "RepoNotFound")
        else:
            return root
        return None

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlsplit(self.path).path  # a revision may have slashes, which are quoted
        self.asked.append(path)
        if found := FILE.fullmatch(path):
            return self.send_file(found[1] or "models", found[2], unquote(found[3]))
        if found := TREE.fullmatch(path):
            return self.send_tree(*found.groups())
        if found := ABOUT.fullmatch(path):
            if root := self.repository(*found.groups()):
                files = [{"rfilename": path.relative_to(root).as_posix()} for path in files_of(root) if path.is_file()]
                self.send_json({"id": found[2], "sha": COMMIT, "private": False, "gated": False, "disabled": False,
                                "tags": [], "downloads": 0, "likes": 0, "siblings": files})  # fmt: skip
            return None
        return self.send(200 if path == "/" else 404, b"", {})

    def send_tree(self, kind: str, name: str, inside: str | None) -> None:
        if not (root := self.repository(kind, name)):
            return
        top = root / unquote(inside or "")
        if not top.is_dir():
            return self.refuse(404, "EntryNotFound")
        is_recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("true", "1")
        paths = [path for path in files_of(top) if is_recursive or path.parent == top]
        self.send_json([entry(root, path) for path in paths])

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        found = PATHS.fullmatch(urlsplit(self.path).path)
        if not found:
            return self.send(404, b"", {})
        if root := self.repository(*found.groups()):
            asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            self.send_json([entry(root, root / path) for path in asked if (root / path).exists()])

    def send_file(self, kind: str, name: str, inside: str) -> None:
        if not (root := self.repository(kind, name)):
            return
        path = root / inside
        if not path.is_file():
            return self.refuse(404, "EntryNotFound")
        body = path.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256(body).hexdigest()}"', "Accept-Ranges": "bytes"}
        keep = len(body) // 2 if path.with_name(f"{path.name}.torn").exists() else None
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), int(asked[2] or len(body) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(body) - 1)}/{len(body)}"
            return self.send(206, body[first : last + 1], headers, keep=keep)
        self.send(200, body, headers, keep=keep)


@contextmanager
def running_hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub that serves the folder, and the paths that it was asked for; it is gone afterwards."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubOf", (Hub,), {"folder": folder, "asked": asked}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
