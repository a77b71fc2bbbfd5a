"""A small server that answers as the hub does, for one account: who is it, make a repository, which files go which way, take
large files, commit. It keeps what it was sent."""
import base64, hashlib, json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

TOKEN = "hf_standinstandinstandinstandinstandin"

class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status >= 400: self.send_header("X-Error-Message", value["error"])
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self):
        hub, path = self.server.hub, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append((self.command, path))
        if path.startswith("/large/"):                       # a place that was signed: no token
            hub.large[path.removeprefix("/large/")] = body
            return self.answer({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}": return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/whoami-v2": return self.answer({"type": "user", "name": "me", "fullname": "Me", "orgs": [], "auth": {"type": "access_token"}})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            owner = wanted.get("organization") or "me"
            if owner != "me": return self.answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
            name = f"{owner}/{wanted['name']}"
            if name in hub.repos: return self.answer({"error": "You already created this model repo", "url": name, "name": name, "id": name}, 409)
            hub.repos[name] = {"private": wanted.get("private", wanted.get("visibility") == "private"), "files": {}}
            return self.answer({"url": f"{hub.url}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml": return self.answer({"errors": [], "warnings": []})
        for name, repo in hub.repos.items():
            if path == f"/api/models/{name}/preupload/main":
                return self.answer({"files": [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]})
            if path == f"/{name}.git/info/lfs/objects/batch":
                return self.answer({"transfer": "basic", "objects": [{"oid": o["oid"], "size": o["size"], "authenticated": True, "actions": {"upload": {"href": f"{hub.url}/large/{o['oid']}"}}} for o in json.loads(body)["objects"]]})
            if path == f"/api/models/{name}/commit/main": return self.commit(repo, name, body)
            if path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"): return self.answer({"id": name, "modelId": name, "sha": "0" * 40, "private": repo["private"], "siblings": [], "tags": []})
        self.answer({"error": f"nothing at {path}"}, 404)

    def commit(self, repo, name, body):
        for line in map(json.loads, filter(None, body.split(b"\n"))):
            value = line["value"]
            if line["key"] == "header": repo["message"] = value["summary"]
            if line["key"] == "file": repo["files"][value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                content = self.server.hub.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                repo["files"][value["path"]] = content
        self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.server.hub.url}/{name}/commit/{'1' * 40}", "hookOutput": ""})

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

def start():
    "The stand-in, serving: its `url`, `repos` by name, and what it was `asked`; `stop()` ends it."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.hub = SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", repos={}, asked=[], large={}, stop=lambda: (server.shutdown(), server.server_close()))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.hub
