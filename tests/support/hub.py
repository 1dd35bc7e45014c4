"""A local stand-in for the Hugging Face hub: the HTTP calls that its client makes to push and to load a model."""

import base64
import fnmatch
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_right"


class Hub(ThreadingHTTPServer):
    """Repositories in memory: by name, for each branch its commits; each commit holds all its files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refs: dict[str, dict[str, str]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.private: set[str] = set()
        self.broken: str | None = None
        """A pattern of paths whose downloads break off half-way; the hub is down afterwards."""
        self.failing = ""
        """A pattern of requests, such as "POST */commit/*", that end as a fault of the server."""
        self.asked: list[str] = []
        """Every request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str, branch: str, files: dict[str, bytes]) -> str:
        """Put a commit on a branch; returns its hash."""
        text = json.dumps([name, branch, len(self.commits), sorted(files)])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = files
        self.refs.setdefault(name, {})[branch] = sha
        return sha

    def files(self, name: str, revision: str = "main") -> dict[str, bytes] | None:
        """The files of a commit or of a branch's last one."""
        return self.commits.get(self.refs.get(name, {}).get(revision, revision))

    def add_folder(self, name: str, folder: Path) -> str:
        """A repository with what a folder holds."""
        found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return self.commit(name, "main", found)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = path.strip("/").split("/")
        if fnmatch.fnmatch(f"{self.command} {path}", self.server.failing):
            self._json({"error": "Internal error"}, 500)
        elif self.command in ("POST", "PUT") and parts[0] != "large" and not self._allowed():
            self._json({"error": "Invalid username or password."}, 401)
        elif parts[:3] == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts[:2] == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        elif parts[0] == "large":
            self.server.large[parts[1]] = body
            self._json({})
        elif parts[:2] == ["api", "models"]:
            self._model("/".join(parts[2:4]), parts[4:], body)
        elif len(parts) > 3 and parts[2:4] == ["info", "lfs"]:
            self._large_files(json.loads(body))
        elif len(parts) < 5:
            self._json({"error": "Not found"}, 404)
        else:
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        known = name in self.server.refs
        if not known:
            self.server.commit(name, "main", {".gitattributes": b""})
            if asked.get("visibility") == "private" or asked.get("private"):
                self.server.private.add(name)
        self._json({"url": f"{self.server.url}/{name}", "name": name}, 409 if known else 200)

    def _model(self, name: str, call: list[str], body: bytes) -> None:
        if name not in self.server.refs or (name in self.server.private and not self._allowed()):
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        kind, revision = (call + ["", "main"][len(call) :])[:2] if call else ("revision", "main")
        refs = self.server.refs[name]
        if kind == "branch":
            known = revision in refs
            refs.setdefault(revision, refs["main"])
            self._json({}, 409 if known else 200)
            return
        files = self.server.files(name, revision)
        if files is None:
            self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif kind == "revision":
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": name, "sha": refs.get(revision, revision), "siblings": siblings, "private": False})
        elif kind == "tree":
            listed = [
                {"type": "file", "oid": _etag(content), "size": len(content), "path": path}
                for path, content in files.items()
            ]
            self._json(listed)
        elif kind == "preupload":
            asked = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if fnmatch.fnmatch(file["path"], "*.safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": _etag(files[file["path"]]) if file["path"] in files else None,
                }
                for file in asked
            ]
            self._json({"files": modes})
        else:
            self._commit(name, revision, dict(files), body)

    def _commit(self, name: str, branch: str, files: dict[str, bytes], body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.server.commit(name, branch, files)
        self._json({"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha})

    def _large_files(self, asked: dict[str, Any]) -> None:
        objects = [
            {**file, "actions": {"upload": {"href": f"{self.server.url}/large/{file['oid']}"}}}
            for file in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        files = self.server.files(name, revision) or {}
        if path not in files:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        content = files[path]
        sha = self.server.refs[name].get(revision, revision)
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": sha}
        breaks = self.server.broken is not None and fnmatch.fnmatch(path, self.server.broken)
        if breaks and self.headers.get("Range"):
            self._json({"error": "down"}, 503)
        elif breaks and self.command == "GET":
            self._send(200, content[: len(content) // 2], headers, promised=len(content))
            self.close_connection = True
        else:
            self._send(200, content, headers)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str], promised: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) if promised is None else promised))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _etag(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def local_hub(cache: Path, patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, running, in the hub's place, with a logged-in user and an empty cache."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
