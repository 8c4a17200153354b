"""A Hub on loopback that real huggingface_hub talks to: models, in memory, with commits, branches and private repos.

`Hub.clients` is the environment its clients need from their start; what they did stands in `Hub.repos` and
`Hub.unknown`, the requests that no end point answered.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

USER, TOKEN = "me", "hf_of_me"
LFS = re.compile(r".*\.(safetensors|bin|pt|pth|png)")


class File(NamedTuple):
    content: bytes
    lfs: bool

    @property
    def oid(self):
        """What the client compares with: sha256 of a large file, git's own hash of a small one."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0%b" % (len(self.content), self.content)).hexdigest()


class Commit(NamedTuple):
    message: str
    files: dict[str, File]


class Repo:
    """Commits by their hash, oldest first, and the heads of the branches."""

    def __init__(self, private):
        self.private, self.commits, self.branches = private, {}, {}
        self.commit("main", "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})

    def commit(self, branch, message, files):
        sha = hashlib.sha1(f"{len(self.commits)} {message} {id(self)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = Commit(message, files), sha
        return sha

    def sha(self, revision):
        found = self.branches.get(unquote(revision), revision)
        return found if found in self.commits else answer(404, "RevisionNotFound")

    def files(self, revision="main"):
        return self.commits[self.sha(revision)].files


class Answer(Exception):
    """An HTTP status that is not 200, its error code, and a JSON body."""


def answer(status, error, body=()):
    raise Answer(status, error, dict(body))


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.blobs, self.unknown, self.lock = {}, {}, [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.clients = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
        self.clients |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_one(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        route, status, headers = f"{self.command} {urlsplit(self.path).path}", 200, {}
        try:
            found = [(function, match) for pattern, function in ROUTES if (match := re.fullmatch(pattern, route))]
            if not found:
                self.server.unknown.append(route)
                answer(501, "unknown to this Hub")
            ((function, match),) = found
            with self.server.lock:
                content = function(self, **{name: value for name, value in match.groupdict().items() if value})
            if isinstance(content, tuple):
                content, headers = content
        except Answer as error:
            status, code, content = error.args
            headers = {"X-Error-Code": code, "X-Error-Message": code}
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        size = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if size and status == 200:
            first, last = int(size[1]), int(size[2] or len(content) - 1)
            status, headers = 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            content = content[first : last + 1]
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": len(content)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def json(self):
        return json.loads(self.body or b"{}")

    def owner(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, repo_id):
        """As on the Hub, who may not see a repository is not told that it exists."""
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and not self.owner()):
            answer(404 if self.headers.get("Authorization") else 401, "RepoNotFound")
        if self.command == "POST" and not self.owner():
            answer(401, "Invalid username or password")
        return repo

    # end points: what they return is JSON, or (bytes, headers) -------------------------------------

    def whoami(self):
        if not self.owner():
            answer(401, "Invalid username or password")
        return {"type": "user", "name": USER, "orgs": []}

    def create(self):
        self.whoami()
        asked = self.json()
        repo_id = f"{asked['organization'] or USER}/{asked['name']}"
        made = {"url": f"{self.server.url}/{repo_id}", "id": repo_id}
        if repo_id in self.server.repos:
            answer(409, "You already created this model repo", made)
        self.server.repos[repo_id] = Repo(asked.get("visibility") == "private")
        return made

    def validate(self):
        return {"errors": [], "warnings": []}

    def info(self, repo_id, revision="main"):
        repo = self.repo(repo_id)
        sha, files = repo.sha(revision), repo.files(revision)
        card = files.get("README.md", File(b"", False)).content.decode()
        tags = [f"license:{name}" for name in re.findall(r"^license: (.*)$", card, re.MULTILINE)]
        siblings = [{"rfilename": name} for name in files]
        return {"id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings, "tags": tags}

    def branch(self, repo_id, name):
        repo = self.repo(repo_id)
        if unquote(name) in repo.branches:
            answer(409, "the branch exists")
        repo.branches[unquote(name)] = repo.sha(self.json().get("startingPoint", "main"))
        return {}

    def tree(self, repo_id, revision, folder=""):
        """Always recursive, which is what clients here ask for."""
        files, at = self.repo(repo_id).files(revision), f"{unquote(folder)}/" if folder else ""
        entries = []
        for path, file in files.items():
            size = {"size": len(file.content), "oid": file.oid}
            lfs = {"lfs": size | {"pointerSize": 130}} if file.lfs else {}
            entries += [{"type": "file", "path": path} | size | lfs] if path.startswith(at) else []
        return entries if entries or not folder else answer(404, "EntryNotFound")

    def preupload(self, repo_id, revision):
        known = self.repo(repo_id).files(revision)

        def mode(path):
            oid = known[path].oid if path in known else None
            way = "lfs" if LFS.fullmatch(path) else "regular"
            return {"path": path, "uploadMode": way, "shouldIgnore": False, "oid": oid}

        return {"files": [mode(asked["path"]) for asked in self.json()["files"]]}

    def lfs_batch(self, repo_id):
        self.repo(repo_id)

        def steps(oid):
            return {step: {"href": f"{self.server.url}/{step}/{oid}"} for step in ("upload", "verify")}

        return {"transfer": "basic", "objects": [o | {"actions": steps(o["oid"])} for o in self.json()["objects"]]}

    def lfs_put(self, oid):
        self.server.blobs[oid] = self.body
        return {}

    def lfs_verify(self, oid):
        return {} if hashlib.sha256(self.server.blobs[oid]).hexdigest() == oid else answer(422, "wrong content")

    def commit(self, repo_id, revision):
        repo = self.repo(repo_id)
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        files = dict(repo.files(revision))
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                files[value["path"]] = File(self.server.blobs[value["oid"]], True)
            else:
                assert operation["key"] == "deletedFile"
                del files[value["path"]]
        sha = repo.commit(unquote(revision), header["value"]["summary"], files)
        return {"commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}", "commitOid": sha}

    def resolve(self, repo_id, revision, path):
        repo = self.repo(repo_id)
        sha = repo.sha(revision)
        file = repo.files(sha).get(unquote(path)) or answer(404, "EntryNotFound")
        linked = {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": len(file.content)} if file.lfs else {}
        return file.content, {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"} | linked


REPO, REVISION, OID = "(?P<repo_id>[^/]+/[^/]+)", "(?P<revision>[^/]+)", "(?P<oid>[0-9a-f]{64})"
ROUTES = (
    ("GET /api/whoami-v2", Handler.whoami),
    ("POST /api/repos/create", Handler.create),
    ("POST /api/validate-yaml", Handler.validate),
    (f"GET /api/models/{REPO}(/revision/{REVISION})?", Handler.info),
    (f"POST /api/models/{REPO}/branch/(?P<name>[^/]+)", Handler.branch),
    (f"GET /api/models/{REPO}/tree/{REVISION}(/(?P<folder>.+))?", Handler.tree),
    (f"POST /api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    (f"POST /api/models/{REPO}/commit/{REVISION}", Handler.commit),
    (f"POST /{REPO}.git/info/lfs/objects/batch", Handler.lfs_batch),
    (f"PUT /upload/{OID}", Handler.lfs_put),
    (f"POST /verify/{OID}", Handler.lfs_verify),
    (f"(GET|HEAD) /{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
)
