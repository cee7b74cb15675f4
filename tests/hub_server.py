"""A small Hub for tests: what the client asks while it pushes and pulls, over real HTTP, in memory.

Tokens: ``hf_writer`` may write to ``me/*`` and ``user/*``, and ``hf_reader`` may read; no other is known.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

WRITER, READER = "hf_writer", "hf_reader"
OWN = ("me", "user")
LFS_SUFFIXES = (".safetensors", ".png", ".bin", ".pth")


@dataclass(frozen=True)
class File:
    """A file of a commit; a large one is named by its sha256, another one by git's hash."""

    content: bytes
    large: bool = False

    @property
    def size(self):
        return len(self.content)

    @property
    def oid(self):
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % self.size + self.content).hexdigest()


@dataclass(frozen=True)
class XetFile:
    """A file whose bytes are in the xet store."""

    oid: str
    size: int
    xet_hash: str
    large: bool = True
    content: bytes = b""


@dataclass
class Repo:
    """Commits by name, each a message and all files, and what points to them."""

    private: bool
    commits: dict = field(default_factory=dict)
    refs: dict = field(default_factory=dict)
    pulls: int = 0

    def commit(self, ref, message, files):
        parent = self.refs.get(ref)
        content = sorted((path, file.oid) for path, file in files.items())
        oid = hashlib.sha1(f"{parent} {message} {content}".encode()).hexdigest()
        self.commits[oid] = (message, files)
        self.refs[ref] = oid
        return oid

    def files(self, ref="main"):
        return self.commits[self.refs.get(ref, ref)][1]

    def messages(self, ref="main"):
        """Messages of all commits; a test pushes to one branch at a time."""
        return [message for message, _ in self.commits.values()]


class HubServer(ThreadingHTTPServer):
    """The server, with all that it holds.

    Attributes:
        repos: By name.
        stored: Large files by sha256.
        xet: Folder of a xet store that the client works on itself, or null for plain LFS.
        failures: Answer by a part of the address, as ``{"preupload": 503}``.
        codes: What the Hub calls an answer of ``failures``, by its status.
        renamed: Names of repositories that were renamed, and what they are called now.
        meanwhile: What happens once before an answer, by a part of the address.
        stall_s: Wait so long before each answer.
        requests: ``(verb, path)`` of each request.
    """

    daemon_threads = True

    def __init__(self, xet: Path | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.stored, self.failures, self.requests = {}, {}, {}, []
        self.codes, self.meanwhile, self.renamed = {}, {}, {}
        self.xet, self.stall_s, self.lock = xet, 0.0, threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def add_repo(self, name, files, private=False):
        """A repository with a commit, as another client would have made it."""
        repo = self.repos[name] = Repo(private)
        for path, content in files.items():
            if path.endswith(LFS_SUFFIXES):
                self.stored[hashlib.sha256(content).hexdigest()] = content
        return repo.commit("main", "files", {p: File(c, p.endswith(LFS_SUFFIXES)) for p, c in files.items()})


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: HubServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.server.requests.append((self.command, url.path))
        time.sleep(self.server.stall_s)
        for part in [part for part in self.server.meanwhile if part in self.path]:
            self.server.meanwhile.pop(part)()
        try:
            for part, status in self.server.failures.items():
                if part in self.path:
                    message, code = self.server.codes.get(status, ("as the test asked for", None))
                    raise Refused(status, message, code)
            with self.server.lock:
                status, content, headers = self._route(url.path, parse_qs(url.query), body)
        except Refused as refused:
            status, content = refused.status, {"error": str(refused)}
            headers = {"X-Error-Message": str(refused)}
            if refused.code:
                headers["X-Error-Code"] = refused.code
        self._send(status, content, headers)

    def _send(self, status, content, headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, path, query, body):
        """Status, content and headers of the answer."""
        for old, new in self.server.renamed.items():
            if f"/{old}/" in f"{path}/" and old not in self.server.repos:
                return 307, {}, {"Location": path.replace(old, new, 1)}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            self.server.stored[match[1]] = body
            return 200, {}, {}
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            self._repo(match[1], write=True)
            return 200, {"transfer": "basic", "objects": [self._lfs(o) for o in json.loads(body)["objects"]]}, {}
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(match[1], unquote(match[2]), unquote(match[3]))
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/([\w-]+)/(.+))?", path):
            name, verb, rest = match[1], match[2], unquote(match[3] or "main")
            return self._model(name, verb or "revision", rest, query, body)
        raise Refused(404, f"no such page: {path}")

    def _model(self, name, verb, rest, query, body):
        repo = self._repo(name, write=self.command != "GET" or verb == "xet-write-token")
        if verb == "branch" or verb == "tag":
            ref, given = (rest, json.loads(body or "{}"))
            ref, start = (given["tag"], rest) if verb == "tag" else (ref, given.get("startingPoint", "main"))
            if ref in repo.refs:
                raise Refused(409, "Reference already exists")
            repo.refs[ref] = self._oid(repo, start)
            return 201, {}, {}
        if verb == "commit":
            return self._commit(name, repo, rest, "create_pr" in query, body)
        if verb in ("xet-read-token", "xet-write-token") and self.server.xet is not None:
            cas, expires = f"local://{self.server.xet}", int(time.time()) + 3600
            headers = {
                "X-Xet-Cas-Url": cas,
                "X-Xet-Access-Token": "xet",
                "X-Xet-Token-Expiration": str(expires),
            }
            return 200, {"casUrl": cas, "accessToken": "xet", "exp": expires}, headers
        oid = self._oid(repo, rest)
        if verb == "revision":
            return 200, {"id": name, "sha": oid, "private": repo.private, "siblings": []}, {}
        if verb == "tree":
            files = [tree_entry(path, file) for path, file in repo.files(oid).items()]
            return 200, files, {}
        if verb == "preupload":
            return 200, {"files": [self._preupload(repo.files(oid), f["path"]) for f in json.loads(body)["files"]]}, {}
        raise Refused(404, f"no such page: {verb}")

    def _token(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token not in (None, WRITER, READER):
            raise Refused(401, "Invalid credentials in Authorization header")
        return token

    def _repo(self, name, write=False):
        token, repo = self._token(), self.server.repos.get(name)
        if repo is None or (repo.private and token is None):
            raise Refused(404 if token else 401, "Repository not found", "RepoNotFound")
        if write and (token != WRITER or name.partition("/")[0] not in OWN):
            raise Refused(403 if token else 401, "You don't have the rights to do that")
        return repo

    def _oid(self, repo, revision):
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def _create(self, given):
        name = f"{given['organization']}/{given['name']}"
        if self._token() is None:
            raise Refused(401, "Invalid username or password.")
        if self._token() != WRITER or given["organization"] not in OWN:
            raise Refused(403, f"You don't have the rights to create a model under {given['organization']}")
        answer = {"url": f"{self.server.url}/{name}", "id": name}
        if name in self.server.repos:
            return 409, {**answer, "error": "You already created this model repo"}, {}
        repo = self.server.repos[name] = Repo(given.get("visibility") == "private")
        repo.commit("main", "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
        return 200, answer, {}

    def _validate(self, content):
        errors = yaml_errors(content)
        return (400, {"errors": [{"message": e} for e in errors]}, {}) if errors else (200, {"warnings": []}, {})

    def _preupload(self, files, path):
        large = path.endswith(LFS_SUFFIXES)
        info = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        return {**info, "oid": files[path].oid} if path in files else info

    def _lfs(self, wanted):
        if wanted["oid"] in self.server.stored:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}", "header": {}}}}

    def _commit(self, name, repo, revision, create_pr, body):
        lines = [json.loads(line) for line in body.splitlines()]
        if lines[0]["value"].get("parentCommit", self._oid(repo, revision)) != self._oid(repo, revision):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.files(self._oid(repo, revision)))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                files[value["path"]] = self._large(value["oid"], value["size"])
            elif line["key"] == "deletedFile" and files.pop(value["path"], None):
                pass
            else:
                raise Refused(400, f"unexpected operation {line['key']}")
        ref, pull = revision, None
        if create_pr:
            repo.pulls += 1
            ref, pull = f"refs/pr/{repo.pulls}", f"{self.server.url}/{name}/discussions/{repo.pulls}"
            repo.refs[ref] = self._oid(repo, revision)
        oid = repo.commit(ref, lines[0]["value"]["summary"], files)
        url = f"{self.server.url}/{name}/commit/{oid}"
        return 200, {"commitOid": oid, "commitUrl": url, "pullRequestUrl": pull, "success": True}, {}

    def _large(self, oid, size):
        if self.server.xet is None and oid in self.server.stored:
            return File(self.server.stored[oid], large=True)
        hashes = xet_hashes(self.server.xet) if self.server.xet is not None else {}
        if oid not in hashes:
            raise Refused(400, f"no large file {oid} was uploaded")
        return XetFile(oid, size, hashes[oid])

    def _resolve(self, name, revision, path):
        repo = self._repo(name)
        oid = self._oid(repo, revision)
        if path not in repo.files(oid):
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        file = repo.files(oid)[path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.oid}"', "X-Linked-Etag": f'"{file.oid}"'}
        headers |= {"X-Linked-Size": str(file.size), "Content-Type": "application/octet-stream"}
        if isinstance(file, XetFile):
            route = f"{self.server.url}/api/models/{name}/xet-read-token/{oid}"
            headers |= {"X-Xet-Hash": file.xet_hash, "X-Xet-Refresh-Route": route}
        return 200, file.content, headers


def tree_entry(path, file):
    entry = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
    if isinstance(file, XetFile):
        entry["xetHash"] = file.xet_hash
    return {**entry, "lfs": {"oid": file.oid, "size": file.size, "pointerSize": 134}} if file.large else entry


def xet_hashes(store):
    """The xet hash of each file in a store, by its sha256.

    A shard is made of 48 bytes a record: a header, then for each file its hash and its number of segments,
    these segments, as many checksums, and its sha256. A file of all ones ends the list.
    """
    hashes = {}
    for shard in store.glob("**/shards/*.mdb"):
        records = [shard.read_bytes()[i : i + 48] for i in range(48, shard.stat().st_size, 48)]
        i = 0
        while records[i][:32] != b"\xff" * 32:
            segments = int.from_bytes(records[i][36:40], "little")
            hashes[_hex(records[i + 1 + 2 * segments])] = _hex(records[i])
            i += 2 + 2 * segments
    return hashes


def _hex(record):
    """A hash, which is stored as four little-endian numbers."""
    return "".join(record[i : i + 8][::-1].hex() for i in range(0, 32, 8))


def yaml_errors(card):
    """What the Hub would say against a model card's metadata, by the rules of its model card guide."""
    head = REGEX_YAML_BLOCK.search(card)
    try:
        data = yaml.safe_load(head[2]) if head else None
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    if data is None:
        return []  # of this it only warns
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"]
    name = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
    errors = [
        f"{key} must be a string" for key in ("license", "library_name", "pipeline_tag") if not _is_text(data, key)
    ]
    for key in ("base_model", "datasets"):
        values = data.get(key, [])
        values = values if isinstance(values, list) else [values]
        errors += [
            f"{key}: {v} is no name on the Hub" for v in values if not isinstance(v, str) or not name.fullmatch(v)
        ]
    if not all(isinstance(tag, str) and 0 < len(tag) <= 100 for tag in data.get("tags", [])):
        errors.append("tags must be strings")
    for model in data.get("model-index", []):
        errors += [] if _is_text(model, "name") else ["model-index needs a name"]
        for result in model["results"]:
            needed = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
            errors += [f"{part}.{key} is needed" for part, key in needed if not _is_text(result.get(part, {}), key)]
            if "config" in result["dataset"] and not _is_text(result["dataset"], "config"):
                errors.append("dataset.config must be a string")
            for metric in result["metrics"]:
                if not _is_text(metric, "type") or not isinstance(metric.get("value"), (int, float, str)):
                    errors.append(f"metric {metric} needs a type and a value")
    return errors


def _is_text(data, key):
    return isinstance(data.get(key), str) and bool(data[key])
