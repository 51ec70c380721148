"""A Hub in memory that speaks as much of the Hub's HTTP protocol as the huggingface_hub client needs for models.

Create repositories and branches, upload plain and LFS files, resolve files by branch or commit with the Hub's redirects
and ETags, private repositories, `Range`, and its error codes. Xet storage is not offered, so clients run with
``HF_HUB_DISABLE_XET=1``.

    with HubServer(tokens={"hf_secret": "ann"}) as server:
        environment = {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


#: Endings of files that the Hub's default .gitattributes keeps in LFS.
LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".onnx")
ID = r"(?P<repo>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"


@dataclass(frozen=True)
class File:
    """Content of a file, and whether it lies in LFS."""

    content: bytes
    lfs: bool

    @property
    def etag(self) -> str:
        """As the Hub gives them: sha256 of what is in LFS, the id of the git blob of all else."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    """A repository: commits by id, and which one each branch is at."""

    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        seed = f"{len(self.commits)} {branch} {sorted((path, file.etag) for path, file in files.items())}"
        commit = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        self.messages.append(message)
        return commit


@dataclass(frozen=True)
class Request:
    """What the server was asked, for tests to look at."""

    method: str
    path: str
    headers: Mapping[str, str]
    status: int


class HubError(Exception):
    """An answer that is an error; `code` is the Hub's X-Error-Code."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | headers


class HubServer:
    """
    Args:
        tokens: token -> name of the user whose repositories it opens.
    """

    def __init__(self, tokens: Mapping[str, str]):
        self.tokens = dict(tokens)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self._cuts: list[int] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def storage(self) -> str:
        """Address of the LFS storage: another host to clients, as the Hub's is."""
        return f"http://localhost:{self._http.server_port}"

    def cut_next_download(self, count: int) -> None:
        """Close the connection of the next download from the storage after `count` bytes."""
        self._cuts.append(count)

    def take_cut(self) -> int | None:
        return self._cuts.pop(0) if self._cuts else None

    def files(self, repo: str, revision: str = "main") -> dict[str, File]:
        return self.repos[repo].commits[self.repos[repo].branches[revision]]


def route(method: str, pattern: str) -> Callable:
    """Marks the method of the handler that answers; the pattern's groups are its arguments."""

    def mark(function):
        function.route = (method, re.compile(pattern))
        return function

    return mark


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    # repositories

    @route("POST", r"/api/repos/create")
    def create_repo(self) -> None:
        user, wanted = self.user(required=True), self.json()
        name = f"{wanted.get('organization') or user}/{wanted['name']}"
        if name.split("/")[0] != user:
            raise HubError(403, "You don't have the rights to create a model under this namespace")
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repos:
            self.answer(409, url | {"error": "You already created this model repo"})
            return
        repo = self.hub.repos[name] = Repo(private=wanted.get("visibility") == "private")
        repo.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", lfs=False)}, "initial commit")
        self.answer(200, url)

    @route("POST", rf"/api/models/{ID}/branch/(?P<branch>[^/]+)")
    def create_branch(self, repo: str, branch: str) -> None:
        opened = self.open_to_write(repo)
        if branch in opened.branches:
            raise HubError(409, "Reference already exists")
        opened.branches[branch] = opened.branches["main"]
        self.answer(200, {})

    @route("GET", rf"/api/models/{ID}(/revision/{REVISION})?")
    def info(self, repo: str, revision: str | None) -> None:
        commit, files = self.snapshot(repo, revision or "main")
        private = self.hub.repos[repo].private
        siblings = [{"rfilename": path} for path in sorted(files)]
        self.answer(200, {"id": repo, "sha": commit, "private": private, "siblings": siblings, "tags": []})

    @route("GET", rf"/api/models/{ID}/tree/{REVISION}(?P<folder>/.*)?")
    def tree(self, repo: str, revision: str, folder: str | None) -> None:
        commit, files = self.snapshot(repo, revision)
        start = f"{folder[1:]}/" if folder else ""
        entries = [
            {"type": "file", "path": path, "size": len(file.content), "oid": file.etag}
            for path, file in sorted(files.items())
            if path.startswith(start)
        ]
        if start and not entries:
            raise HubError(404, f"{start} does not exist", "EntryNotFound", **{"X-Repo-Commit": commit})
        self.answer(200, entries)

    # uploads

    @route("POST", r"/api/validate-yaml")
    def validate_card(self) -> None:
        errors = [] if self.json()["content"].startswith("---") else [{"message": "no metadata"}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    @route("POST", rf"/api/models/{ID}/preupload/{REVISION}")
    def preupload(self, repo: str, revision: str) -> None:
        self.open_to_write(repo)
        files = self.snapshot(repo, revision)[1]
        self.answer(200, {"files": [self.upload_mode(wanted["path"], files) for wanted in self.json()["files"]]})

    @staticmethod
    def upload_mode(path: str, files: dict[str, File]) -> dict:
        mode = "lfs" if path.endswith(LFS_ENDINGS) else "regular"
        known = {"oid": files[path].etag} if path in files else {}
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, **known}

    @route("POST", rf"/{ID}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: str) -> None:
        self.open_to_write(repo)
        objects = self.json()["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.storage}/storage/{wanted['oid']}"}
                wanted["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/api/verify"}}
        self.answer(200, {"transfer": "basic", "objects": objects})

    @route("PUT", r"/storage/(?P<oid>[0-9a-f]{64})")
    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content has another hash")
        self.hub.objects[oid] = self.body
        self.answer(200)

    @route("POST", r"/api/verify")
    def verify(self) -> None:
        wanted = self.json()
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(400, "The object is not there in full")
        self.answer(200)

    @route("POST", rf"/api/models/{ID}/commit/{REVISION}")
    def commit(self, repo: str, revision: str) -> None:
        opened = self.open_to_write(repo)
        if revision not in opened.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files, message = dict(self.snapshot(repo, revision)[1]), ""
        for line in self.body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "deletedFile":
                del files[value["path"]]
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise HubError(400, f"{value['path']} was not uploaded to the storage")
                files[value["path"]] = File(self.hub.objects[value["oid"]], lfs=True)
            else:
                raise HubError(400, f"{key} is not spoken here")
        commit = opened.commit(revision, files, message)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit})

    # downloads

    @route("GET", rf"/{ID}/resolve/{REVISION}/(?P<path>.+)")
    def resolve(self, repo: str, revision: str, path: str) -> None:
        commit, file = self.find(repo, revision, path)
        if file.lfs:  # kept elsewhere
            status, location = 302, f"{self.hub.storage}/storage/{file.etag}"
        else:  # by the commit, after a relative redirect
            status, location = 307, f"/api/resolve-cache/models/{repo}/{commit}/{path}"
        self.answer(status, **self.described(commit, file), Location=location)

    @route("GET", rf"/api/resolve-cache/models/{ID}/{REVISION}/(?P<path>.+)")
    def resolve_cache(self, repo: str, revision: str, path: str) -> None:
        commit, file = self.find(repo, revision, path)
        self.answer(200, file.content, **self.described(commit, file), ETag=f'"{file.etag}"')

    @route("GET", r"/storage/(?P<oid>[0-9a-f]{64})")
    def fetch(self, oid: str) -> None:
        content = self.hub.objects[oid]
        status, headers, start = 200, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}, 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.answer(status, content[start:], cut=self.hub.take_cut(), **headers)

    # parts of answers

    @staticmethod
    def described(commit: str, file: File) -> dict[str, str]:
        return {
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{file.etag}"',
            "X-Linked-Size": str(len(file.content)),
        }

    def user(self, required: bool = False) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        if required and not token:
            raise HubError(401, "Invalid username or password.")
        return self.hub.tokens.get(token)

    def open(self, name: str) -> Repo:
        repo, user = self.hub.repos.get(name), self.user()
        if repo is None or (repo.private and user != name.split("/")[0]):
            # a private repository looks as if it were not there
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def open_to_write(self, name: str) -> Repo:
        repo = self.open(name)
        if self.user(required=True) != name.split("/")[0]:
            raise HubError(403, "You don't have the rights to write to this repository")
        return repo

    def snapshot(self, name: str, revision: str) -> tuple[str, dict[str, File]]:
        repo = self.open(name)
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repo.commits[commit]

    def find(self, name: str, revision: str, path: str) -> tuple[str, File]:
        commit, files = self.snapshot(name, revision)
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit})
        return commit, files[path]

    # HTTP

    def json(self) -> dict:
        return json.loads(self.body)

    def do_GET(self) -> None:
        self.body = self.read_body()
        path = unquote(urlsplit(self.path).path)
        method = "GET" if self.command == "HEAD" else self.command
        try:
            with self.hub.lock:
                self.dispatch(method, path)
        except HubError as error:
            self.answer(error.status, {"error": str(error)}, **error.headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def dispatch(self, method: str, path: str) -> None:
        for function in vars(_Handler).values():
            wanted, pattern = getattr(function, "route", (None, None))
            if wanted == method and (match := pattern.fullmatch(path)):
                groups = match.groupdict()
                function(self, **{key: value and unquote(value) for key, value in groups.items()})
                return
        raise HubError(404, f"{method} {path} is not spoken here")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, content: dict | list | bytes = b"", cut: int | None = None, **headers: str) -> None:
        """Send `content`, JSON unless it is bytes; of a HEAD the headers; after `cut` bytes hang up."""
        self.hub.requests.append(Request(self.command, self.path, dict(self.headers), status))
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        self.close_connection = cut is not None

    def log_message(self, *_) -> None:
        """Says nothing."""
