"""A stand-in for the Hub on the loopback interface: as much of its HTTP interface as huggingface_hub needs to create
a repository, upload a folder and read files back, and `datasets` to load one."""

import base64
import hashlib
import json
import math
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

USER = "tester"
TOKEN = "hf_dummy"
LFS_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".png", ".jpg", ".gif", ".parquet", ".zip", ".npz")
LFS_SIZE = 10 * 2**20
REPO_TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}


@dataclass
class Commit:
    message: str
    description: str
    paths: list


@dataclass
class Repo:
    type: str
    private: bool
    files: dict = field(default_factory=dict)  # path -> bytes
    commits: list = field(default_factory=list)

    @property
    def sha(self):
        digest = hashlib.sha1(str(len(self.commits)).encode())
        for path in sorted(self.files):
            digest.update(path.encode() + hashlib.sha1(self.files[path]).digest())
        return digest.hexdigest()


class FakeHub:
    """`repos` maps "owner/name" to what was uploaded; `fail` maps a stage to the HTTP status that it answers, and
    `hang` to how many requests it answers before it lets the others wait (`waiting` counts them), so that a client
    can be killed there. `readers` maps "owner/name" to the one token that it is there for.

    Stages: whoami, create, validate, preupload, lfs, upload, commit, info, resolve. Answer 4xx: the client repeats a
    request that got 5xx, for minutes.
    """

    def __init__(self):
        self.repos = {}
        self.fail = {}
        self.hang = {}
        self.readers = {}
        self.answered = Counter()  # requests by stage
        self.waiting = 0
        self.requests = []  # (method, path) in the order of arrival
        self.tokens = set()  # of the Authorization headers
        self._blobs = {}  # SHA-256 -> bytes of LFS objects
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.hub = self
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def env(self):
        """The environment of a process that shall talk to this Hub. It has to be a subprocess: huggingface_hub reads
        these at import, and HF_HUB_OFFLINE=1 of the tests blocks loopback too."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def add_repo(self, repo_id, files, repo_type="model", private=False):
        """Puts a repository in place, as if somebody had uploaded it before."""
        self.repos[repo_id] = Repo(repo_type, private, dict(files), [Commit("Add files", "", sorted(files))])

    def start(self):
        self._thread.start()
        return self

    def stop(self):
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def files_of(folder):
    """The files below a folder, by their paths, as `add_repo` takes them."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of the clients of `server.hub`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass  # the tests' output is for the tests

    def do_GET(self):
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self):
        hub, body, url = self.server.hub, self.read_body(), urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        with hub._lock:
            hub.requests.append((self.command, url.path))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token:
                hub.tokens.add(token)
            if any(f"/{name}/" in f"{url.path}/" and token != reader for name, reader in hub.readers.items()):
                self.reply(*_not_found("RepoNotFound"))
                return
            stage, answer = _route(hub, self.command, parts, parse_qs(url.query), body)
            if stage in hub.fail:
                self.reply(hub.fail[stage], {"error": f"the stand-in was told to fail at {stage}"})
                return
            hangs = hub.answered[stage] >= hub.hang.get(stage, math.inf)
            if hangs:
                hub.waiting += 1
            else:
                status, content, headers = answer()
                hub.answered[stage] += 1
        if hangs:
            self.close_connection = True
            hub._stopping.wait()
        else:
            self.reply(status, content, headers)

    def read_body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks, size = [], None
        while size != 0:  # the last chunk is empty
            size = int(self.rfile.readline().split(b";")[0], 16)
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(chunks)

    def reply(self, status, content, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if status >= 400 and isinstance(content, dict):
            self.send_header("X-Error-Message", content["error"])
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _route(hub, method, parts, query, body):
    """Returns the name of the stage and the function that carries it out: () -> (status, content, headers)."""
    if parts[:2] == ["api", "whoami-v2"]:
        return "whoami", lambda: (200, _whoami(), {})
    if parts[:3] == ["api", "repos", "create"]:
        return "create", lambda: _create(hub, json.loads(body))
    if parts[:2] == ["api", "validate-yaml"]:
        return "validate", lambda: (200, {"errors": [], "warnings": []}, {})
    if parts[0] == "lfs-object" and method == "PUT":
        return "upload", lambda: _put_blob(hub, parts[1], body)
    if parts[-4:] == ["info", "lfs", "objects", "batch"]:
        return "lfs", lambda: _lfs_batch(hub, json.loads(body))
    if parts[0] == "api" and parts[1] in REPO_TYPES and len(parts) >= 4:
        repo_id = "/".join(parts[2:4])
        action = parts[4] if len(parts) > 4 else "info"
        if repo_id not in hub.repos:
            return "info", lambda: _not_found("RepoNotFound")
        repo = hub.repos[repo_id]
        if action == "preupload":
            return "preupload", lambda: (200, _preupload(repo, json.loads(body)), {})
        if action == "commit":
            return "commit", lambda: _commit(hub, repo_id, repo, body)
        if action == "tree":
            recursive = query.get("recursive", [""])[0].lower() == "true"
            return "info", lambda: (200, _tree(repo, "/".join(parts[6:]), recursive), {})
        if action in ("info", "revision"):
            return "info", lambda: (200, _info(repo_id, repo), {})
    if "resolve" in parts:
        position = parts.index("resolve")
        repo_id = "/".join(parts[position - 2 : position])
        path = "/".join(parts[position + 2 :])
        return "resolve", lambda: _resolve(hub, repo_id, path)
    return "unknown", lambda: _not_found("EntryNotFound")


def _not_found(code):
    return 404, {"error": "not found"}, {"X-Error-Code": code}


def _whoami():
    token = {"role": "write"}
    return {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"accessToken": token}}


def _create(hub, request):
    repo_id = f"{request.get('organization') or USER}/{request['name']}"
    repo_type = request.get("type", "model")
    url = f"{hub.url}/{repo_id}" if repo_type == "model" else f"{hub.url}/{repo_type}s/{repo_id}"
    if repo_id in hub.repos:
        return 409, {"error": "this repository exists already", "url": url}, {}
    private = request.get("visibility") == "private" or bool(request.get("private"))
    hub.repos[repo_id] = Repo(repo_type, private)
    return 200, {"url": url, "name": repo_id}, {}


def _preupload(repo, request):
    """Says of each file how to send it, and by `oid` what is there, so that the client leaves out what is the same."""
    files = []
    for file in request["files"]:
        is_large = file["size"] >= LFS_SIZE or file["path"].endswith(LFS_SUFFIXES)
        mode = "lfs" if is_large else "regular"
        entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
        if file["path"] in repo.files:
            data = repo.files[file["path"]]
            if is_large:
                entry["oid"] = hashlib.sha256(data).hexdigest()
            else:  # as git names it
                entry["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        files.append(entry)
    return {"files": files}


def _lfs_batch(hub, request):
    objects = []
    for item in request["objects"]:
        entry = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] not in hub._blobs:
            entry["actions"] = {"upload": {"href": f"{hub.url}/lfs-object/{item['oid']}", "header": {}}}
        objects.append(entry)
    return 200, {"transfer": "basic", "objects": objects}, {}


def _put_blob(hub, oid, body):
    if hashlib.sha256(body).hexdigest() != oid:
        return 400, {"error": "the content does not have the announced SHA-256"}, {}
    hub._blobs[oid] = body
    return 200, {}, {}


def _commit(hub, repo_id, repo, body):
    """Applies the lines of a commit: a header, then files in base64, LFS pointers and deletions."""
    commit, files = Commit("", "", []), dict(repo.files)
    for line in body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            commit.message, commit.description = value["summary"], value.get("description", "")
        elif item["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
            commit.paths.append(value["path"])
        elif item["key"] == "lfsFile":
            if value["oid"] not in hub._blobs:
                return 400, {"error": f"{value['path']} was committed before its content was uploaded"}, {}
            files[value["path"]] = hub._blobs[value["oid"]]
            commit.paths.append(value["path"])
        elif item["key"] == "deletedFile":
            files.pop(value["path"], None)
    repo.files = files
    repo.commits.append(commit)
    url = f"{hub.url}/{repo_id}/commit/{repo.sha}"
    return 200, {"success": True, "commitOid": repo.sha, "commitUrl": url, "hookOutput": ""}, {}


def _info(repo_id, repo):
    siblings = [{"rfilename": path, "size": len(data)} for path, data in sorted(repo.files.items())]
    return {
        "id": repo_id,
        "modelId": repo_id,
        "sha": repo.sha,
        "private": repo.private,
        "siblings": siblings,
        "tags": [],
        "downloads": 0,
        "likes": 0,
    }


def _tree(repo, folder, recursive):
    """Lists what lies in a folder, and if recursive below it: folders and files."""
    prefix = f"{folder}/" if folder else ""
    entries = {}
    for path, data in sorted(repo.files.items()):
        if not path.startswith(prefix):
            continue
        for parent in reversed(PurePosixPath(path).parents):
            entries[str(parent)] = {"type": "directory", "path": str(parent), "size": 0, "oid": "0" * 40}
        entries[path] = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    listed = []
    for path, entry in entries.items():
        is_below = path.startswith(prefix) and path != "."
        is_direct = "/" not in path.removeprefix(prefix)
        if is_below and (recursive or is_direct):
            listed.append(entry)
    return listed


def _resolve(hub, repo_id, path):
    repo = hub.repos.get(repo_id)
    if repo is None:
        return _not_found("RepoNotFound")
    if path not in repo.files:
        status, content, headers = _not_found("EntryNotFound")
        return status, content, headers | {"X-Repo-Commit": repo.sha}
    data = repo.files[path]
    headers = {
        "X-Repo-Commit": repo.sha,
        "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
        "Content-Type": "application/octet-stream",
    }
    return 200, data, headers
