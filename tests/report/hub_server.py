"""A local Hub: the requests of `huggingface_hub` to create, check, upload, list and download.

    with HubServer() as hub:
        hub.fail("/commit/", 500)            # the status of the next request with this in its path; "drop" hangs up
        ...                                  # HF_ENDPOINT=hub.endpoint, HF_TOKEN=WRITE_TOKEN, HF_HUB_DISABLE_XET=1
        hub.files("someone/math")            # path -> bytes, as of the last commit

`READ_TOKEN` may read but not write. Requests without a token are refused.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

from tests.tools.waiting import PATIENCE

WRITE_TOKEN, READ_TOKEN, USER = "hf_write", "hf_read", "someone"
NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_request(self):
        hub = self.server.hub
        path = unquote(urlparse(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append(f"{self.command} {path}")
        hub.answers.wait(PATIENCE)  # cleared by a test that needs a slow Hub
        fault = hub.fault_of(path)
        if fault == "drop":
            self.close_connection = True
            return
        if fault is not None:
            self.answer(fault, {"error": f"told to answer {fault}"}, Retry_After="0")
            return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        for method, pattern, needs_write, handle in ROUTES:
            if method == self.command.replace("HEAD", "GET") and (found := re.fullmatch(pattern, path)):
                if token not in (WRITE_TOKEN, READ_TOKEN) and not path.startswith("/lfs/"):
                    self.answer(401, {"error": "Invalid username or password."})
                elif needs_write and token != WRITE_TOKEN:
                    self.answer(403, {"error": "Forbidden: you need a token that can write."})
                else:
                    with hub.lock:
                        handle(self, hub, body, **found.groupdict())
                return
        self.answer(404, {"error": f"nothing at {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request


def create(request, hub, body):
    asked = json.loads(body)
    repo = f"{asked['organization'] or USER}/{asked['name']}"
    is_new = repo not in hub.commits
    if is_new:
        hub.commits[repo] = {"main": [("first commit", {})]}
        hub.visibility[repo] = asked.get("visibility", "public")
    request.answer(200 if is_new else 409, {"url": f"{hub.endpoint}/{repo}"})


def branch(request, hub, body, repo, revision):
    is_new = revision not in hub.commits[repo]
    hub.commits[repo].setdefault(revision, hub.commits[repo]["main"][-1:])
    request.answer(200 if is_new else 409, {})


def modes(request, hub, body, repo, revision):
    files = [file["path"] for file in json.loads(body)["files"]]
    asked = [(path, "lfs" if path.endswith((".safetensors", ".png")) else "regular") for path in files]
    request.answer(200, {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in asked]})


def batch(request, hub, body, repo):
    objects = json.loads(body)["objects"]
    for wanted in (wanted for wanted in objects if wanted["oid"] not in hub.blobs):
        wanted["actions"] = {"upload": {"href": f"{hub.endpoint}/lfs/{wanted['oid']}"}}
    request.answer(200, {"transfer": "basic", "objects": objects})


def put_blob(request, hub, body, oid):
    assert hashlib.sha256(body).hexdigest() == oid
    hub.blobs[oid] = body
    request.answer(200)


def commit(request, hub, body, repo, revision):
    header, *operations = map(json.loads, body.splitlines())
    message, files = header["value"]["summary"], dict(hub.commits[repo][revision][-1][1])
    for operation in operations:
        value = operation["value"]
        is_lfs = operation["key"] == "lfsFile"
        files[value["path"]] = hub.blobs[value["oid"]] if is_lfs else base64.b64decode(value["content"])
    hub.commits[repo][revision].append((message, files))
    sha = hub.sha(repo, revision)
    request.answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{hub.endpoint}/{repo}/commit/{sha}"})


def info(request, hub, body, repo, revision="main"):
    files = [{"rfilename": path} for path in hub.files(repo, revision)]
    request.answer(200, {"id": repo, "sha": hub.sha(repo, revision), "siblings": files, "tags": []})


def tree(request, hub, body, repo, revision):
    listed = [
        {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        for path, content in hub.files(repo, revision).items()
    ]
    request.answer(200, listed)


def resolve(request, hub, body, repo, revision, path):
    content = hub.files(repo, revision).get(path)
    if content is None:
        request.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
    else:
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": hub.sha(repo, revision)}
        request.answer(200, content, **headers)


def known(handle):
    """The same handler, which answers 404 unless the repository exists."""

    def answer(request, hub, body, repo, **parts):
        if repo in hub.commits:
            handle(request, hub, body, repo, **parts)
        else:
            request.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

    return answer


def ok(request, hub, body, repo=None):
    request.answer(200, {"errors": [], "warnings": []})


MODELS = f"/api/models/{NAME}"
ROUTES = [
    ("POST", "/api/repos/create", True, create),
    ("POST", "/api/validate-yaml", False, ok),
    ("GET", f"{MODELS}/auth-check/write", True, known(ok)),
    ("POST", f"{MODELS}/branch/{REVISION}", True, known(branch)),
    ("POST", f"{MODELS}/preupload/{REVISION}", True, known(modes)),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", True, known(batch)),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", False, put_blob),
    ("POST", f"{MODELS}/commit/{REVISION}", True, known(commit)),
    ("GET", MODELS, False, known(info)),
    ("GET", f"{MODELS}/revision/{REVISION}", False, known(info)),
    ("GET", f"{MODELS}/tree/{REVISION}", False, known(tree)),
    ("GET", f"/{NAME}/resolve/{REVISION}/(?P<path>.+)", False, known(resolve)),
]


class HubServer:
    """Runs in a thread inside `with`. `commits` maps repository -> branch -> [(message, files)]."""

    def __init__(self):
        self.commits, self.visibility, self.blobs, self.requests, self.faults = {}, {}, {}, [], []
        self.lock, self.answers = threading.Lock(), threading.Event()
        self.answers.set()

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.answers.set()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, part, *outcomes):
        """Give the next requests with this in their path these outcomes, in order: a status, or "drop"."""
        self.faults += [(part, outcome) for outcome in outcomes]

    def fault_of(self, path):
        for fault in self.faults:
            if fault[0] in path:
                self.faults.remove(fault)
                return fault[1]
        return None

    def _branch(self, repo, revision):
        """The branch and number of commits of a revision, which is a branch or the hash of a commit."""
        for name, commits in self.commits[repo].items():
            for number in range(len(commits), 0, -1):
                if revision in (name, self._hash(repo, name, number)):
                    return name, number
        raise KeyError(revision)

    def _hash(self, repo, name, number):
        return hashlib.sha1(f"{repo} {name} {number}".encode()).hexdigest()

    def sha(self, repo, revision="main"):
        return self._hash(repo, *self._branch(repo, revision))

    def files(self, repo, revision="main"):
        name, number = self._branch(repo, revision)
        return self.commits[repo][name][number - 1][1]
