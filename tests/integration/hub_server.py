"""A model Hub on 127.0.0.1 that keeps repositories in a folder: the calls that pushing and loading a model make."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

OWNER = "tester"
_REPOSITORY = r"(?P<repo>[\w.-]+/[\w.-]+)"


class HubServer:
    """Serves ``folder``; one branch, no history. Repository ``owner/name`` has its files in ``folder/owner/name``.

    Args:
        folder: where repositories are stored.

    Attributes:
        requests: method and path of every request that came in.
        faults: for requests whose path contains the key, a status code (``"500"``) or ``"hang up"``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects = folder / ".lfs"
        self.objects.mkdir(parents=True)
        self.requests: list[tuple[str, str]] = []
        self.faults: dict[str, str] = {}
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def repository(self, name: str) -> Path:
        return self.folder / name

    def files(self, name: str) -> dict[str, bytes]:
        """Contents of a repository by path."""
        root = self.repository(name)
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}

    def revision(self, name: str) -> str:
        """Changes with the contents, as a commit id does."""
        digest = hashlib.sha1()
        for path, content in self.files(name).items():
            digest.update(path.encode() + hashlib.sha1(content).digest())
        return digest.hexdigest()

    def environment(self, home: Path) -> dict[str, str]:
        """For a process whose huggingface_hub is to talk to this server, and to nothing else."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGINGFACE", "TRANSFORMERS_"))
        }
        return {
            **inherited,
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_local",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


@contextmanager
def serving(folder: Path) -> Iterator[HubServer]:
    """A running server, stopped on leaving."""
    hub = HubServer(folder)
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        # A client that hangs up is no error of the server.
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def do_GET(self) -> None:
        self.dispatch()

    do_HEAD = do_POST = do_PUT = do_GET

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def dispatch(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        fault = next((how for part, how in self.hub.faults.items() if part in path), None)
        if fault == "hang up":
            self.close_connection = True
            return
        if fault is not None:
            self.body()
            self.answer({"error": "broken down"}, HTTPStatus(int(fault)))
            return
        for pattern, methods, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods:
                action(self, **match.groupdict())
                return
        self.body()
        self.answer({"error": f"no route {self.command} {path}"}, HTTPStatus.NOT_IMPLEMENTED)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content: Any, status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code: str) -> None:
        self.answer({"error": code}, HTTPStatus.NOT_FOUND, {"X-Error-Code": code})

    def who_am_i(self) -> None:
        self.answer({"type": "user", "name": OWNER, "orgs": []})

    def create(self) -> None:
        asked = json.loads(self.body())
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        exists = self.hub.repository(name).is_dir()
        self.hub.repository(name).mkdir(parents=True, exist_ok=True)
        status = HTTPStatus.CONFLICT if exists else HTTPStatus.OK
        self.answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name}, status)

    def info(self, repo: str) -> None:
        if not self.hub.repository(repo).is_dir():
            self.missing("RepoNotFound")
            return
        siblings = [{"rfilename": path} for path in self.hub.files(repo)]
        sha = self.hub.revision(repo)
        self.answer({"id": repo, "modelId": repo, "sha": sha, "siblings": siblings, "tags": [], "private": False})

    def tree(self, repo: str, path: str) -> None:
        files = {p: c for p, c in self.hub.files(repo).items() if p.startswith(path)}
        if not files:
            self.missing("EntryNotFound")
            return
        self.answer(
            [{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files.items()]
        )

    def preupload(self, repo: str) -> None:
        # Weights go through LFS and everything else into the commit, as on the Hub.
        self.answer(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in json.loads(self.body())["files"]
                ]
            }
        )

    def lfs_batch(self, repo: str) -> None:
        self.answer(
            {
                "transfer": "basic",
                "objects": [
                    {**entry, "actions": {"upload": {"href": f"{self.hub.url}/lfs-store/{repo}/{entry['oid']}"}}}
                    for entry in json.loads(self.body())["objects"]
                ],
            }
        )

    def lfs_store(self, repo: str, oid: str) -> None:
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            self.answer({"error": "checksum"}, HTTPStatus.BAD_REQUEST)
            return
        (self.hub.objects / oid).write_bytes(content)
        self.answer({})

    def commit(self, repo: str) -> None:
        root = self.hub.repository(repo)
        with self.hub.lock:
            for line in self.body().splitlines():
                entry = json.loads(line)
                kind, value = entry["key"], entry["value"]
                if kind == "header":
                    continue
                target = root / value["path"]
                if not target.resolve().is_relative_to(root.resolve()):
                    raise ValueError(f"path outside the repository: {value['path']}")
                target.parent.mkdir(parents=True, exist_ok=True)
                if kind == "file":
                    target.write_bytes(base64.b64decode(value["content"]))
                elif kind == "lfsFile":
                    shutil.copyfile(self.hub.objects / value["oid"], target)
                else:
                    target.unlink()
        sha = self.hub.revision(repo)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def resolve(self, repo: str, path: str) -> None:
        file = self.hub.repository(repo) / path
        if not self.hub.repository(repo).is_dir():
            self.missing("RepoNotFound")
        elif not file.is_file():
            self.missing("EntryNotFound")
        else:
            content = file.read_bytes()
            headers = {
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Repo-Commit": self.hub.revision(repo),
                "Content-Type": "application/octet-stream",
            }
            self.answer(content, headers=headers)

    def validate_yaml(self) -> None:
        text = json.loads(self.body())["content"]
        match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        data = yaml.safe_load(match[1]) if match else None
        errors, warnings = metadata_faults(data) if isinstance(data, dict) else (["no metadata"], [])
        self.answer(
            {"errors": [{"message": error} for error in errors], "warnings": [{"message": w} for w in warnings]},
            HTTPStatus.BAD_REQUEST if errors else HTTPStatus.OK,
        )


def metadata_faults(data: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card's metadata, by the rules of the Hub that this project could break."""
    errors, warnings = [], [f"{name} is no field of model cards" for name in data.keys() - _METADATA]
    for field in ("base_model", "datasets"):
        for name in [data[field]] if isinstance(data.get(field), str) else data.get(field, []):
            try:
                validate_repo_id(name)
            except HFValidationError as error:
                errors.append(f"{field}: {error}")
    if "model-index" in data:
        try:
            _, results = model_index_to_eval_results(data["model-index"])
            values = [result.metric_value for result in results]
        except (KeyError, TypeError, ValueError) as error:
            errors.append(f"model-index: {error!r}")
        else:
            errors += [f"model-index: {v!r} is no number" for v in values if not isinstance(v, (int, float)) or v != v]
    errors += [f"tags: {tag!r}" for tag in data.get("tags", []) if not re.fullmatch(r"[\w.-]+", str(tag))]
    return errors, warnings


_METADATA = {
    *("base_model", "datasets", "language", "library_name", "license", "model-index", "pipeline_tag", "tags"),
    *("generated_from_trainer", "licence", "metrics", "model_name"),
}
_ROUTES = [
    (r"/api/whoami-v2", ("GET",), _Handler.who_am_i),
    (r"/api/repos/create", ("POST",), _Handler.create),
    (r"/api/validate-yaml", ("POST",), _Handler.validate_yaml),
    (rf"/api/models/{_REPOSITORY}(?:/revision/[^/]+)?", ("GET",), _Handler.info),
    (rf"/api/models/{_REPOSITORY}/tree/[^/]+/?(?P<path>.*)", ("GET",), _Handler.tree),
    (rf"/api/models/{_REPOSITORY}/preupload/[^/]+", ("POST",), _Handler.preupload),
    (rf"/api/models/{_REPOSITORY}/commit/[^/]+", ("POST",), _Handler.commit),
    (rf"/{_REPOSITORY}\.git/info/lfs/objects/batch", ("POST",), _Handler.lfs_batch),
    (rf"/lfs-store/{_REPOSITORY}/(?P<oid>[0-9a-f]{{64}})", ("PUT",), _Handler.lfs_store),
    (rf"/{_REPOSITORY}/resolve/[^/]+/(?P<path>.+)", ("GET", "HEAD"), _Handler.resolve),
]
