# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""A server on loopback in place of the Hub, for the real `huggingface_hub` client.

It speaks what the client does when models are pushed and loaded: repos/create, auth-check, validate-yaml, preupload,
git LFS (for the suffixes of `lfs`, and only with `HF_HUB_DISABLE_XET`: the protocol of Xet storage is not spoken),
commit, branch, revision, tree, resolve with ranges. Answers and error codes are those that the client (2.4) reads.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import transformers.utils.hub
import yaml
from huggingface_hub import constants

from peft_sdpt import downloads
from tests.helpers.patience import PATIENCE

OWNER, READER = "hf_owner", "hf_reader"
HTML = b"<!doctype html><title>Sign in to the network</title>"
# Faults of an answer, apart from its status:
FAULTS = (
    "stalled",  # half of the body is sent, and then nothing
    "short",  # the body is shorter than the file, and its length is announced correctly
    "long",
    "other bytes",  # the body has the right length and another content
    "html",  # the page of a network that asks for a login, with the headers of the file
    "page",  # the same page, with its own headers
    "reset",  # no answer at all
    "loop",  # a redirection to itself
    "elsewhere",  # a redirection to another address, where nobody answers
    "no etag",
)


@dataclass
class Repository:
    """Snapshots of files by commit, and where the branches are."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        files = {**self.files(branch), **files}
        digest = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[digest], self.branches[branch] = files, digest
        return digest

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits.get(self.branches.get(revision, revision), {})


@dataclass
class Hub:
    """What the server holds, does wrong, and was asked.

    Attributes:
        repositories: by id. Those of "user" may be written with the token `OWNER`, and private ones of anybody read
            with any token.
        dropped: file name to how many downloads of it end in the middle.
        refused: part of a path to the status that requests for it get.
        faults: part of a path to what else goes wrong with it. The names of faults are those of `FAULTS`.
        lfs: ends of names of files that are not committed themselves, but by git LFS.
        requests: method and path of all that was asked.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    lfs: tuple[str, ...] = ()
    stored: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    going_on: threading.Event = field(default_factory=threading.Event)

    def add(self, name: str, folder: Path, private: bool = False) -> Repository:
        """A repository with the files of a folder."""
        repository = self.repositories.setdefault(name, Repository(private))
        repository.commit({p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
        return repository

    def fetched(self) -> list[str]:
        """Files that were downloaded."""
        found = [
            re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", path) for method, path in self.requests if method == "GET"
        ]
        return [match[1] for match in found if match]


class Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}


def etag(path: str, content: bytes, lfs: tuple[str, ...] = (".safetensors",)) -> str:
    """The digest of a file: of an object of git, or of git LFS."""
    if path.endswith(lfs):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def make_handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            hub.requests.append((self.command, path))
            self.fault = next((fault for part, fault in hub.faults.items() if part in path), None)
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                for part, status in hub.refused.items():
                    if part in path:
                        raise Refusal(status, message="refused")
                for method, pattern, answer in ROUTES:
                    if method in (self.command, "ANY") and (match := re.fullmatch(pattern, path)):
                        return answer(self, *match.groups())
                raise Refusal(404)
            except Refusal as refusal:
                self.send(b"{}", refusal.status, refusal.headers)

        do_HEAD = do_POST = do_PUT = do_GET

        def log_message(self, *_) -> None:
            pass

        def send(self, body: bytes, status: int = 200, headers: dict | None = None, sent: int | None = None) -> None:
            headers = headers or {}
            if self.fault == "reset":
                self.close_connection = True
                return
            if self.fault in ("loop", "elsewhere"):
                # Nothing listens on the port 9.
                location = hub.endpoint + self.path if self.fault == "loop" else "http://127.0.0.1:9/file"
                body, status, headers = b"", 302, {**headers, "Location": location}
            if self.fault == "no etag":
                headers = {name: value for name, value in headers.items() if name != "ETag"}
            if self.fault == "page":
                body, headers = HTML, {"Content-Type": "text/html"}
            if self.command != "HEAD":  # the client asks for the headers first
                changes = {"short": body[:-1], "long": body + b"x", "html": HTML, "other bytes": bytes(len(body))}
                body = changes.get(self.fault, body)
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command != "HEAD":
                stalled = self.fault == "stalled"
                self.wfile.write(body[: len(body) // 2 if stalled else sent])
                if stalled:
                    self.wfile.flush()
                    hub.going_on.wait(PATIENCE)
            if sent is not None or self.fault == "stalled":
                self.close_connection = True

        def send_json(self, value: object) -> None:
            self.send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

        # -- who may do what

        def token(self) -> str | None:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
            if token not in (None, OWNER, READER):
                raise Refusal(401, message="Invalid credentials in Authorization header")
            return token

        def repository(self, name: str, write: bool = False) -> Repository:
            token, repository = self.token(), hub.repositories.get(name)
            if repository is None or (repository.private and not token):
                raise Refusal(404 if token else 401, "RepoNotFound", "Repository not found")
            if write:
                self.require_write(name)
            return repository

        def require_write(self, name: str) -> None:
            if self.token() is None:
                raise Refusal(401, message="Unauthorized")
            if self.token() != OWNER or not name.startswith("user/"):
                raise Refusal(403, message="You do not have the rights")

        def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
            repository = self.repository(name)
            commit = repository.branches.get(revision, revision)
            if commit not in repository.commits:
                if revision == "main":  # an empty repository
                    raise Refusal(404, "EntryNotFound", "Entry not found")
                raise Refusal(404, "RevisionNotFound", "Invalid rev id")
            return commit, repository.commits[commit]

        # -- answers

        def create(self) -> None:
            asked = json.loads(self.body)
            name = f"{asked['organization'] or 'user'}/{asked['name']}"
            self.require_write(name)
            if name in hub.repositories:
                return self.send(json.dumps({"url": f"{hub.endpoint}/{name}"}).encode(), 409)
            hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
            self.send_json({"url": f"{hub.endpoint}/{name}", "name": name})

        def auth_check(self, name: str, write: str | None) -> None:
            self.repository(name, write=bool(write))
            self.send_json({})

        def validate_yaml(self) -> None:
            content = json.loads(self.body)["content"]
            data = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
            base = data.get("base_model")
            if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
                errors = [{"message": f'"base_model" with value "{base}" is not valid.'}]
                return self.send(json.dumps({"errors": errors}).encode(), 400)
            self.send_json({"errors": [], "warnings": []})

        def preupload(self, name: str, revision: str) -> None:
            self.repository(name, write=True)
            self.send_json(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(hub.lfs) else "regular",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(self.body)["files"]
                    ]
                }
            )

        def lfs_batch(self, name: str) -> None:
            self.repository(name, write=True)
            actions = {"upload": {"href": f"{hub.endpoint}/lfs/"}, "verify": {"href": f"{hub.endpoint}/lfs-verify"}}
            objects = [
                {
                    **asked,
                    "actions": {**actions, "upload": {"href": f"{hub.endpoint}/lfs/{asked['oid']}"}},
                }
                for asked in json.loads(self.body)["objects"]
            ]
            self.send_json({"objects": objects, "transfer": "basic"})

        def lfs_put(self, oid: str) -> None:
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise Refusal(400)
            hub.stored[oid] = self.body
            self.send_json({})

        def lfs_verify(self) -> None:
            asked = json.loads(self.body)
            if len(hub.stored[asked["oid"]]) != asked["size"]:
                raise Refusal(400)
            self.send_json({})

        def commit(self, name: str, revision: str) -> None:
            repository = self.repository(name, write=True)
            files = {}
            for line in map(json.loads, self.body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.stored[value["oid"]]
            commit = repository.commit(files, revision)
            self.send_json({"commitUrl": f"{hub.endpoint}/{name}/commit/{commit}", "commitOid": commit})

        def branch(self, name: str, branch: str) -> None:
            repository = self.repository(name, write=True)
            repository.branches.setdefault(branch, repository.branches.get("main", ""))
            self.send_json({})

        def info(self, name: str, revision: str | None) -> None:
            if revision is None and not self.repository(name).commits:
                return self.send_json({"id": name, "sha": None, "siblings": []})
            commit, files = self.files(name, revision or "main")
            self.send_json({"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]})

        def tree(self, name: str, revision: str) -> None:
            _, files = self.files(name, revision)
            self.send_json(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in files.items()
                ]
            )

        def resolve(self, name: str, revision: str, path: str) -> None:
            commit, files = self.files(name, revision)
            headers = {"X-Repo-Commit": commit}
            if path not in files:
                return self.send(b"", 404, {**headers, "X-Error-Code": "EntryNotFound"})
            content, status = files[path], 200
            headers |= {"ETag": f'"{etag(path, content)}"', "Accept-Ranges": "bytes"}
            if start := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
                first = int(start[1])
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
                content, status = content[first:], 206
            sent = None
            if self.command == "GET" and hub.dropped.get(path, 0) > 0:
                hub.dropped[path] -= 1
                # After half of the file, and after nothing where it goes on.
                sent = 0 if status == 206 else len(content) // 2
            self.send(content, status, headers, sent)

    model = r"/api/models/([^/]+/[^/]+)"
    ROUTES = [
        ("POST", r"/api/repos/create", Handler.create),
        ("GET", model + r"/auth-check(/write)?", Handler.auth_check),
        ("POST", r"/api/validate-yaml", Handler.validate_yaml),
        ("POST", model + r"/preupload/(.+)", Handler.preupload),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.lfs_batch),
        ("PUT", r"/lfs/(\w+)", Handler.lfs_put),
        ("POST", r"/lfs-verify", Handler.lfs_verify),
        ("POST", model + r"/commit/(.+)", Handler.commit),
        ("POST", model + r"/branch/(.+)", Handler.branch),
        ("GET", model + r"(?:/revision/(.+))?", Handler.info),
        ("GET", model + r"/tree/([^/]+)", Handler.tree),
        ("ANY", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.resolve),
    ]
    return Handler


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A Hub that is empty."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), make_handler(hub))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.going_on.set()
        server.shutdown()
        server.server_close()
        thread.join()


def wait_little(monkeypatch, seconds: float = 1.0) -> None:
    """Let the client wait only a short time for an answer, and not at all before another attempt."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", seconds)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", seconds)
    monkeypatch.setattr(downloads, "MAX_WAIT", seconds)
    monkeypatch.setattr(huggingface_hub.get_session(), "event_hooks", huggingface_hub.get_session().event_hooks)
    downloads.limit_waiting()


def use(hub: Hub, monkeypatch, home: Path) -> None:
    """Point the client of this process, and of those that it starts, to a Hub, with an empty cache and no token."""
    settings = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_"))]:
        monkeypatch.delenv(name)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", settings["HF_HUB_CACHE"])
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", settings["HF_TOKEN_PATH"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
    # Made when it is first needed, with the endpoint of that time.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
