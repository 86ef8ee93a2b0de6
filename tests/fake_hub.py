"""A Hugging Face hub on this machine, for huggingface_hub as it is: repositories are folders of commits in memory."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants as constants

_REPOSITORY = r"(?:datasets/)?[\w.-]+/[\w.-]+"


class Hub:
    """repositories: name (datasets/ before those of data sets) -> commits, each {path: bytes}, the last one being main.

    requests: 'METHOD path' of all that was asked. denied: name -> 'private' or 'gated'. cut: the number of bytes after which
    the next download of a file ends, once. broken: a status that everything is answered with.
    """

    def __init__(self):
        self.repositories, self.requests, self.denied = {}, [], {}
        self.cut = self.broken = None
        self.private, self.stored = {}, {}

    def commit(self, name, files):
        """A commit with these files in the place of those before; returns its name."""
        commits = self.repositories.setdefault(name, {})
        commit = hashlib.sha1(f"{name}{len(commits)}".encode()).hexdigest()
        commits[commit] = dict(files)
        return commit

    def at(self, name, revision):
        """The commit and its files; None where there is none of that revision."""
        commits = self.repositories[name]
        commit = list(commits)[-1] if revision == "main" else revision
        return (commit, commits[commit]) if commit in commits else None


@contextmanager
def serving(monkeypatch, cache):
    """A hub that the library takes for the real one while the block runs, with an empty cache."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": hub.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.broken:
            return self._send(self.hub.broken, b"")
        routes = {
            rf"/api/(?:models/)?({_REPOSITORY})/revision/(.+)": self._info,
            rf"/api/(?:models/)?({_REPOSITORY})/tree/([^/]+)": self._tree,
            rf"/({_REPOSITORY})/resolve/([^/]+)/(.+)": self._file,
            r"/api/repos/create": lambda: self._create(json.loads(body)),
            r"/api/validate-yaml": lambda: self._json({"errors": [], "warnings": []}),
            rf"/api/(?:models/)?({_REPOSITORY})/preupload/.+": lambda name: self._preupload(json.loads(body)),
            rf"/({_REPOSITORY}).git/info/lfs/objects/batch": lambda name: self._batch(json.loads(body)),
            r"/lfs/(\w+)": lambda oid: self._store(oid, body),
            rf"/api/(?:models/)?({_REPOSITORY})/commit/main": lambda name: self._commit(name, body),
            rf"/api/(?:models/)?({_REPOSITORY})": lambda name: self._info(name, "main"),
        }
        for pattern, route in routes.items():
            if match := re.fullmatch(pattern, path):
                return route(*match.groups())
        return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _found(self, name, revision, of_file):
        """The commit and its files; None where that was refused."""
        denied = self.hub.denied.get(name)
        if name not in self.hub.repositories or denied == "private":
            self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif denied == "gated" and of_file:
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif (found := self.hub.at(name, revision)) is None:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return found

    def _info(self, name, revision):
        made = self.hub.repositories.get(name) == {}  # just now: there is no commit yet
        if found := ("0", {}) if made else self._found(name, revision, of_file=False):
            siblings = [{"rfilename": path} for path in found[1]]
            said = {"_id": "0", "id": name, "sha": found[0], "siblings": siblings, "tags": [], "downloads": 0}
            self._json(said | {"private": bool(self.hub.private.get(name))})

    def _tree(self, name, revision):
        if self.hub.repositories.get(name) == {}:  # just made
            self._json([])
        elif found := self._found(name, revision, of_file=False):
            self._json([
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in found[1].items()
            ])  # fmt: skip

    def _file(self, name, revision, path):
        if not (found := self._found(name, revision, of_file=True)):
            return
        if path not in found[1]:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = found[1][path]
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        headers = {"X-Repo-Commit": found[0], "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        begin = int(start[1]) if start else 0
        if start:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        self._send(206 if start else 200, data[begin:], headers)

    def _create(self, asked):
        kind = "datasets/" if asked.get("type") == "dataset" else ""
        name = f"{kind}{asked['organization']}/{asked['name']}"
        if self.hub.denied.get(name):
            return self._send(403, b"", {"X-Error-Message": "You have no rights there"})
        if name in self.hub.repositories:  # who asks changes nothing of it
            return self._send(409, json.dumps({"url": f"{self.hub.address}/{name}"}).encode())
        self.hub.repositories[name] = {}
        self.hub.private[name] = asked.get("private") or asked.get("visibility") == "private"
        self._json({"url": f"{self.hub.address}/{name}", "name": name, "id": "0"})

    def _preupload(self, asked):
        def mode(path):
            return "lfs" if path.endswith((".safetensors", ".parquet")) else "regular"

        paths = [file["path"] for file in asked["files"]]
        self._json({"files": [{"path": path, "uploadMode": mode(path), "shouldIgnore": False} for path in paths]})

    def _batch(self, asked):
        upload = [
            {**item, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{item['oid']}"}}}
            for item in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": upload})

    def _store(self, oid, body):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.stored[oid] = body
        self._send(200, b"")

    def _commit(self, name, body):
        commits = self.hub.repositories[name]
        files = dict([*commits.values()][-1]) if commits else {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.commit(name, files)
        self._json({"commitUrl": f"{self.hub.address}/{name}/commit/{commit}", "commitOid": commit})

    def _json(self, data):
        self._send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _send(self, status, data, headers=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), "Accept-Ranges": "bytes", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cut is not None and "/resolve/" in self.path and len(data) > self.hub.cut:
            data, self.hub.cut, self.close_connection = data[: self.hub.cut], None, True
        self.wfile.write(data)
