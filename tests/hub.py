"""A Hugging Face Hub on 127.0.0.1 for tests: enough of the REST API for the real client, with faults on
demand.

    with Hub() as hub:
        hub.fault("POST .*/commit/", status=503, times=2)
        subprocess.run([...], env=hub.environment())
        hub.files("tester/model")  # {path: bytes}

The client reads HF_ENDPOINT when it is imported: set it before, best for a process of its own. Large files
come by git-lfs, or with environment(xet=True) by xet, as users send them: token, chunks and shards are spoken
as the real client does, without compression and without deduplication against what is stored; downloads are
plain ones. `hub.static` serves anything under /files/.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

WRITE, READ, FINE, OTHER = (f"hf_{name}CanaryCanaryCanary" for name in ("write", "read", "fine", "other"))
XET = "xetCanaryCanary"  # the token for its storage, which never sees the Hub's
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".parquet", ".mp4", ".gif", ".png", ".wav", ".model")


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class AnsweredError(Exception):
    """The answer is on its way; nothing is left to do."""


@dataclass
class User:
    name: str
    role: str  # of the token: write, read or fineGrained
    orgs: tuple[str, ...] = ()
    can_write: bool = True  # a fineGrained token may lack the right


@dataclass
class Commit:
    sha: str
    title: str
    files: dict[str, str]  # path -> key into Hub.blobs


@dataclass
class Repo:
    kind: str  # models or datasets
    id: str
    private: bool
    commits: list[Commit] = field(default_factory=list)  # of the branch main, oldest first

    def add(self, title: str, files: dict[str, str]) -> Commit:
        sha = hashlib.sha1(f"{self.id} {len(self.commits)}".encode()).hexdigest()
        self.commits.append(Commit(sha, title, files))
        return self.commits[-1]


@dataclass
class Static:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """What to do to the requests whose "METHOD /path" matches, `times` times after letting `skip` pass.

    kind: status (answer that), reset (before reading it), lost (do the work, then reset), failed (do the
    work, then answer `status`), hang (for `seconds`, then reset), late (hang, then do the work), cut (half of
    the answer, then an orderly end), none (lets it pass: a gap before the next fault).
    """

    pattern: str
    kind: str = "status"
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b'{"error": "injected"}'
    times: float = 1
    skip: int = 0
    seconds: float = 1.0
    hits: int = 0


@dataclass
class Request:
    line: str  # METHOD /path
    query: str
    headers: dict[str, str]
    fault: str | None


class Hub:
    def __init__(self):
        self.users = {
            WRITE: User("tester", "write", orgs=("team",)),
            READ: User("tester", "read"),
            FINE: User("tester", "fineGrained"),
            OTHER: User("stranger", "write"),
        }
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}  # git:SHA1 or lfs:SHA256 -> content
        self.xorbs: dict[str, list[bytes]] = {}  # hash -> chunks that came by xet
        self.static: dict[str, Static] = {}  # path below /files/ -> what to answer
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.lock = threading.RLock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *exc) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, token: str = WRITE, xet: bool = False) -> dict[str, str]:
        """What a process needs in order to take this for the Hub; it also needs an HF_HOME of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "0" if xet else "1",
            "HF_XET_DATA_XORB_COMPRESSION_POLICY": "none",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": token,
        }

    def fault(self, pattern: str, **settings) -> Fault:
        self.faults.append(Fault(pattern, **settings))
        return self.faults[-1]

    def requests(self, pattern: str) -> list[Request]:
        return [request for request in self.log if re.search(pattern, request.line)]

    def repo(self, repo_id: str, kind: str = "models") -> Repo:
        return self.repos[kind, repo_id]

    def titles(self, repo_id: str, kind: str = "models") -> list[str]:
        """Commit titles, without the first commit, which the Hub makes itself."""
        return [commit.title for commit in self.repo(repo_id, kind).commits[1:]]

    def files(self, repo_id: str, kind: str = "models") -> dict[str, bytes]:
        return {path: self.blobs[key] for path, key in self.repo(repo_id, kind).commits[-1].files.items()}

    def add_repo(
        self, repo_id: str, private: bool = True, files: dict[str, bytes] | None = None, kind: str = "models"
    ) -> Repo:
        repo = Repo(kind, repo_id, private)
        repo.add("initial commit", {path: self.store(data) for path, data in (files or {}).items()})
        self.repos[kind, repo_id] = repo
        return repo

    def store(self, data: bytes) -> str:
        key = "git:" + git_sha1(data)
        self.blobs[key] = data
        return key

    def find_fault(self, line: str) -> Fault | None:
        """The first fault for this request that is not used up; a fault that skips it leaves it to the
        next."""
        for fault in self.faults:
            if not re.search(fault.pattern, line) or fault.hits >= fault.skip + fault.times:
                continue
            fault.hits += 1
            if fault.hits > fault.skip:
                return fault
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    # --- Plumbing

    def log_message(self, *args) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):  # ours on purpose, or the client went away
            self.close_connection = True

    def handle_any(self) -> None:
        try:
            self.dispatch()
        except AnsweredError:
            pass

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def dispatch(self) -> None:
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        line = f"{self.command} {split.path}"
        with self.hub.lock:
            self.fault = self.hub.find_fault(line)
            kind = self.fault.kind if self.fault else None
            self.hub.log.append(Request(line, split.query, dict(self.headers), kind))
        if kind in ("hang", "late"):
            time.sleep(self.fault.seconds)
        if kind in ("hang", "reset"):
            self.reset()
        self.body = self.read_body()
        if kind == "status":
            self.reply(self.fault.status, self.fault.body, self.fault.headers)
            return
        for method, pattern, answer in ROUTES:
            if self.command in method.split() and (match := pattern.fullmatch(split.path)):
                answer(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
                return
        self.error(404, "NotFound", f"the test Hub has no route for {line}")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reset(self) -> None:
        """A real RST, not an orderly end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        raise ConnectionResetError

    def reply(
        self, status: int, body: bytes | dict | list = b"", headers: dict[str, str] | None = None
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = self.fault.kind if self.fault else None
        if kind == "lost":
            self.reset()
        if kind == "failed":
            status, data, headers = self.fault.status, self.fault.body, self.fault.headers
        self.send_response(status)
        defaults = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        for name, value in {**defaults, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self.wfile.write(data)

    def error(self, status: int, code: str, message: str) -> None:
        self.reply(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})
        raise AnsweredError

    # --- Rights

    def user(self) -> User:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.hub.users:
            self.error(401, "InvalidCredentials", "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def may_write(self, owner: str) -> bool:
        user = self.user()
        return owner in (user.name, *user.orgs) and user.role != "read" and user.can_write

    def find(self, kind: str, id: str, rev: str = "main", write: bool = False) -> tuple[Repo, Commit]:
        repo = self.hub.repos.get((kind or "models", id))
        owner = id.split("/")[0]
        anonymous = not self.headers.get("Authorization")
        if repo is None or (
            repo.private and (anonymous or owner not in (self.user().name, *self.user().orgs))
        ):
            self.error(401 if anonymous else 404, "RepoNotFound", "Repository not found")
        if write and not self.may_write(owner):
            self.error(403, "Forbidden", "You don't have the rights to write to this repository")
        commit = next((c for c in repo.commits if c.sha == rev), repo.commits[-1] if rev == "main" else None)
        if commit is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return repo, commit

    def page(self, kind: str, id: str) -> str:
        return f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{id}"

    def auth_check(self, kind: str, id: str, write: str) -> None:
        self.find(kind, id, write=bool(write))
        self.reply(200, b"OK")

    # --- Account and repositories

    def whoami(self) -> None:
        user = self.user()
        token = {"displayName": "test", "role": user.role}
        orgs = [{"type": "org", "name": name} for name in user.orgs]
        self.reply(200, {"type": "user", "name": user.name, "orgs": orgs, "auth": {"accessToken": token}})

    def create(self) -> None:
        request = json.loads(self.body)
        kind = (request.get("type") or "model") + "s"
        owner = request.get("organization") or self.user().name
        id = f"{owner}/{request['name']}"
        if not self.may_write(owner):
            self.error(403, "Forbidden", "You don't have the rights to create a repo under this namespace")
        with self.hub.lock:
            if (kind, id) in self.hub.repos:
                self.reply(
                    409, {"error": "You already created this repo", "url": self.page(kind, id), "id": id}
                )
                return
            self.hub.add_repo(
                id, request.get("visibility") == "private" or bool(request.get("private")), kind=kind
            )
        self.reply(200, {"url": self.page(kind, id), "name": id, "id": id})

    def validate_yaml(self) -> None:
        self.reply(200, {"errors": [], "warnings": []})

    def info(self, kind: str, id: str, rev: str = "main") -> None:
        repo, commit = self.find(kind, id, rev)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        answer = {"_id": "0", "id": id, "sha": commit.sha, "private": repo.private, "siblings": siblings}
        self.reply(
            200,
            {**answer, "author": id.split("/")[0], "gated": False, "tags": [], "downloads": 0, "likes": 0},
        )

    def refs(self, kind: str, id: str) -> None:
        _, commit = self.find(kind, id)
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": commit.sha}
        self.reply(200, {"branches": [branch], "converts": [], "tags": []})

    def commits(self, kind: str, id: str, rev: str) -> None:
        repo, _ = self.find(kind, id, rev)
        date = "2026-01-01T00:00:00.000Z"
        rows = [
            {"id": c.sha, "title": c.title, "message": "", "date": date, "authors": []} for c in repo.commits
        ]
        self.reply(200, rows[::-1])

    # --- Reading

    def entry(self, path: str, key: str) -> dict:
        data = self.hub.blobs[key]
        row = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
        if key.startswith("lfs:"):
            row["lfs"] = {"oid": key.removeprefix("lfs:"), "size": len(data), "pointerSize": 134}
        return row

    def tree(self, kind: str, id: str, rev: str, path: str = "") -> None:
        """Folders are listed only where the client asks for one level: it derives them from the paths
        otherwise."""
        _, commit = self.find(kind, id, rev)
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        prefix = path.strip("/") + "/" if path.strip("/") else ""
        rows = {}
        for name, key in sorted(commit.files.items()):
            below = name.removeprefix(prefix)
            if not name.startswith(prefix):
                continue
            if recursive or "/" not in below:
                rows[name] = self.entry(name, key)
            else:
                folder = prefix + below.split("/")[0]
                rows[folder] = {
                    "type": "directory",
                    "path": folder,
                    "size": 0,
                    "oid": git_sha1(folder.encode()),
                }
        if prefix and not rows:
            self.error(404, "EntryNotFound", f"{path} does not exist")
        self.reply(200, list(rows.values()))

    def paths_info(self, kind: str, id: str, rev: str) -> None:
        _, commit = self.find(kind, id, rev)
        if self.body.startswith(b"{"):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode()).get("paths", [])
        self.reply(200, [self.entry(path, commit.files[path]) for path in paths if path in commit.files])

    def resolve(self, kind: str, id: str, rev: str, path: str) -> None:
        _, commit = self.find(kind, id, rev)
        head = {
            "X-Repo-Commit": commit.sha,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if path not in commit.files:
            self.reply(404, {"error": "Entry not found"}, {**head, "X-Error-Code": "EntryNotFound"})
            return
        key = commit.files[path]
        data = self.hub.blobs[key]
        head["ETag"] = f'"{key[4:]}"'
        if key.startswith("lfs:"):
            head |= {"X-Linked-Etag": head["ETag"], "X-Linked-Size": str(len(data))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            self.reply(200, data, head)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if first >= len(data):
            self.reply(416, b"", {**head, "Content-Range": f"bytes */{len(data)}"})
        else:
            self.reply(
                206, data[first : last + 1], {**head, "Content-Range": f"bytes {first}-{last}/{len(data)}"}
            )

    def file(self, path: str) -> None:
        static = self.hub.static.get(
            path, Static(b"<html>not here</html>", 404, {"Content-Type": "text/html"})
        )
        self.reply(static.status, static.body, {"Content-Type": "application/octet-stream", **static.headers})

    # --- Writing

    def preupload(self, kind: str, id: str, rev: str) -> None:
        _, commit = self.find(kind, id, rev, write=True)
        rows = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            lfs = path.endswith(LFS_SUFFIXES) or b"\0" in base64.b64decode(file["sample"])
            row = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in commit.files:  # the client compares, and leaves unchanged files out of the commit
                row["oid"] = commit.files[path][4:]
            rows.append(row)
        self.reply(200, {"files": rows})

    def lfs_batch(self, kind: str, id: str) -> None:
        self.find(kind, id, write=True)
        rows = []
        for item in json.loads(self.body)["objects"]:
            row = {"oid": item["oid"], "size": item["size"]}
            if "lfs:" + item["oid"] not in self.hub.blobs:  # an object that is here is not sent again
                href = f"{self.hub.url}/lfs/{item['oid']}"
                row["actions"] = {"upload": {"href": href}, "verify": {"href": href + "/verify"}}
            rows.append(row)
        headers = {"Content-Type": "application/vnd.git-lfs+json"}
        self.reply(200, {"transfer": "basic", "objects": rows}, headers)

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.error(400, "BadRequest", "sha256 mismatch")
        self.hub.blobs["lfs:" + oid] = self.body
        self.reply(200)

    def lfs_verify(self, oid: str) -> None:
        self.reply(200 if "lfs:" + oid in self.hub.blobs else 404, {})

    def commit(self, kind: str, id: str, rev: str) -> None:
        with self.hub.lock:
            new = self.add_commit(*self.find(kind, id, rev, write=True))
        url = f"{self.page(kind, id)}/commit/{new.sha}"
        self.reply(200, {"success": True, "commitOid": new.sha, "commitUrl": url, "hookOutput": ""})

    def add_commit(self, repo: Repo, last: Commit) -> Commit:
        files = dict(last.files)
        title = ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                title = value["summary"]
                if not last.sha.startswith(value.get("parentCommit") or ""):
                    self.error(
                        412,
                        "PreconditionFailed",
                        "A commit has happened since. Please refresh and try again.",
                    )
            elif operation["key"] == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                if "lfs:" + value["oid"] not in self.hub.blobs:
                    self.error(400, "BadRequest", f"LFS pointer to a missing object {value['oid']}")
                files[value["path"]] = "lfs:" + value["oid"]
            elif operation["key"] == "deletedFile":
                files.pop(value["path"], None)
            else:
                self.error(400, "BadRequest", f"the test Hub does not know the operation {operation['key']}")
        return repo.add(title, files)

    # --- Xet (huggingface.co/docs/xet)

    def xet_token(self, kind: str, id: str, rev: str) -> None:
        self.find(kind, id, rev, write=True)
        self.reply(200, {"casUrl": self.hub.url + "/cas", "exp": int(time.time()) + 3600, "accessToken": XET})

    def xet_user(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {XET}":
            self.error(401, "InvalidCredentials", "not a token for the storage")

    def xorb(self, hash: str) -> None:
        """A sequence of chunks, each behind a version (1 byte), its length (3), its compression (1) and its
        size (3)."""
        self.xet_user()
        chunks, at = [], 0
        while at < len(self.body):
            if self.body[at + 4]:
                self.error(400, "BadRequest", "the test Hub cannot read compressed chunks")
            end = at + 8 + int.from_bytes(self.body[at + 1 : at + 4], "little")
            chunks.append(self.body[at + 8 : end])
            at = end
        self.hub.xorbs[hash] = chunks
        self.reply(200, {"was_inserted": True})

    def shard(self) -> None:
        """Rows of 48 bytes. After the head, for each file: (hash, flags, number of segments), the segments
        (xorb, flags, size, first chunk, end), rows that verify them and one about the file, where the flags
        say so. ff... ends the files."""
        self.xet_user()
        rows = iter([self.body[at : at + 48] for at in range(48, len(self.body), 48)])
        while (file := next(rows))[:32] != b"\xff" * 32:
            flags, count = struct.unpack("<II", file[32:40])
            content = b""
            for segment in [next(rows) for _ in range(count)]:
                xorb = "".join(f"{number:016x}" for number in struct.unpack("<4Q", segment[:32]))
                first, end = struct.unpack("<II", segment[40:48])
                content += b"".join(self.hub.xorbs[xorb][first:end])
            for _ in range(count * (flags >> 31) + (flags >> 30 & 1)):
                next(rows)
            self.hub.blobs["lfs:" + hashlib.sha256(content).hexdigest()] = content
        self.reply(200, {"result": 1})


API = r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"
WEB = r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)"
REV = r"/(?P<rev>[^/]+)"
OID = r"/lfs/(?P<oid>[0-9a-f]{64})"
ROUTES = [
    (method, re.compile(pattern), answer)
    for method, pattern, answer in [
        ("GET", "/api/whoami-v2", Handler.whoami),
        ("POST", "/api/repos/create", Handler.create),
        ("POST", "/api/validate-yaml", Handler.validate_yaml),
        ("GET", API, Handler.info),
        ("GET", API + "/revision" + REV, Handler.info),
        ("GET", API + "/auth-check(?P<write>/write)?", Handler.auth_check),
        ("GET", API + "/xet-write-token" + REV, Handler.xet_token),
        ("POST", "/cas/v1/xorbs/default/(?P<hash>[0-9a-f]{64})", Handler.xorb),
        ("POST", "/cas/v1/shards", Handler.shard),
        ("GET", API + "/refs", Handler.refs),
        ("GET", API + "/commits" + REV, Handler.commits),
        ("GET", API + "/tree" + REV + "(?:/(?P<path>.*))?", Handler.tree),
        ("POST", API + "/paths-info" + REV, Handler.paths_info),
        ("POST", API + "/preupload" + REV, Handler.preupload),
        ("POST", API + "/commit" + REV, Handler.commit),
        ("POST", WEB + r"\.git/info/lfs/objects/batch", Handler.lfs_batch),
        ("PUT", OID, Handler.lfs_put),
        ("POST", OID + "/verify", Handler.lfs_verify),
        ("GET HEAD", "/files/(?P<path>.+)", Handler.file),
        ("GET HEAD", WEB + "/resolve" + REV + "/(?P<path>.+)", Handler.resolve),
    ]
]
