"""As much of the Hugging Face hub as an upload calls, on this machine: what arrives is kept, and can be looked at.

    with Hub() as hub:
        ...  # HF_ENDPOINT=hub.url HF_TOKEN=Hub.TOKEN HF_HUB_DISABLE_XET=1, in a process of its own
    hub.files["me/model"]["README.md"]  # bytes

The client reads HF_ENDPOINT when it is imported, so it must be given to a new process.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml


class Hub(ThreadingHTTPServer):
    """Repositories of the user `me`, who has TOKEN; READER is the token of somebody who may not write."""

    TOKEN, READER = "hf_writer", "hf_reader"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, str] = {}
        self.large: dict[str, bytes] = {}  # by their SHA-256
        self.calls: list[str] = []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, content: dict, **headers) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, message: str) -> None:
        self.answer(status, {"error": message}, X_Error_Message=message)

    def do_GET(self):
        self.server.calls.append(f"GET {self.path}")
        self.refuse(404, "Repository not found")

    def do_PUT(self):
        self.server.calls.append("PUT large file")
        self.server.large[self.path.rpartition("/")[2]] = self.read()
        self.answer(200, {})

    def do_POST(self):
        body = self.read()
        self.server.calls.append(f"POST {self.path}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.path == "/api/validate-yaml":
            return self.validate(json.loads(body))
        if token not in (Hub.TOKEN, Hub.READER):
            return self.refuse(401, "Invalid username or password.")
        if token == Hub.READER:
            return self.refuse(403, "You don't have the rights to create a model under the namespace me")
        if self.path == "/api/repos/create":
            return self.create(json.loads(body))
        for pattern, handle in {
            r"/api/(?:models|datasets)/(.+)/preupload/main": self.preupload,
            r"/(.+)\.git/info/lfs/objects/batch": self.list_uploads,
            r"/verify/(.+)": self.verify,
            r"/api/(?:models|datasets)/(.+)/commit/main": self.commit,
        }.items():
            if found := re.fullmatch(pattern, self.path):
                return handle(found[1], body)
        return self.refuse(404, f"the loopback hub does not know {self.path}")

    def validate(self, request: dict) -> None:
        metadata = yaml.safe_load(request["content"].split("---\n")[1])
        needed = {"dataset": ["configs"], "model": ["library_name", "pipeline_tag"]}[request["repoType"]]
        errors = [{"message": f"no {key}"} for key in needed if not metadata.get(key)]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def create(self, request: dict) -> None:
        repo = f"{request['organization'] or 'me'}/{request['name']}"
        exists = repo in self.server.files
        self.server.files.setdefault(repo, {})
        self.server.visibility.setdefault(repo, request.get("visibility"))
        kind = "datasets/" if request.get("type") == "dataset" else ""
        reply = {"url": f"{self.server.url}/{kind}{repo}", "name": repo}
        self.answer(
            409 if exists else 200, reply | ({"error": "You already created this model repo"} if exists else {})
        )

    def preupload(self, repo: str, body: bytes) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer(200, {"files": files})

    def list_uploads(self, repo: str, body: bytes) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            address = {action: {"href": f"{self.server.url}/{action}/{item['oid']}"} for action in ("upload", "verify")}
            objects.append({**item, "actions": address})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def verify(self, oid: str, body: bytes) -> None:
        content = self.server.large[oid]
        intact = hashlib.sha256(content).hexdigest() == oid and len(content) == json.loads(body)["size"]
        self.answer(200 if intact else 422, {})

    def commit(self, repo: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[repo][value["path"]] = self.server.large[value["oid"]]
        url = f"{self.server.url}/{repo}/commit/{'0' * 40}"
        self.answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": url, "hookOutput": ""})
