"""Cards and the hub: what an export says of itself, and its way to a stand-in of the hub and back."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml

from millrace.engine import export
from millrace.engine.checkpoint.model_weights import checkpoint_state
from millrace.engine.checkpoint.weight_formats import load_weights
from millrace.engine.util.errors import UserError

CHANGES = {"run": {"steps": 2}, "sampling": {"every_steps": 2, "steps": 2, "prompts": ["a fox", "a hen"]}}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory):
    run = tmp_path_factory.mktemp("card") / "run"
    assert runs.here(run, CHANGES).error is None
    return run


def test_the_card_says_what_was_trained_on_what(trained, tmp_path, runs):
    words = ["--checkpoint", str(trained), "--output", str(tmp_path / "fox"), "--license", "apache-2.0"]
    assert export.main(words) == 0
    text = (tmp_path / "fox" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": "apache-2.0",
        "tags": ["prx", "millrace"],
    }
    loss = runs.log(trained)[-1]["loss"]
    for line in (
        "# fox\n",
        f"| weights | EMA weights of {trained}/checkpoints/step-00000002, step 2 |",
        "| data | builtin |",
        "| pictures seen | 16 |",
        "| steps | 2 of 2, 8 pictures each |",
        "| started from | random weights |",
        f"| loss | {loss:.4f} | 2 |",
        "![samples](samples.png)\n1. a fox\n2. a hen\n",
        '"prediction": "sample"',
        f'PRXTransformer2DModel.from_pretrained("{tmp_path}/fox")',
    ):
        assert line in body, line
    assert (tmp_path / "fox" / "samples.png").read_bytes() == (
        trained / "samples" / "step-00000002.png"
    ).read_bytes()


def test_the_code_of_the_card_runs(trained, tmp_path):
    assert export.main(["--checkpoint", str(trained), "--output", str(tmp_path / "out")]) == 0
    code = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(code, names)
    assert names["transformer"].config.in_channels == 3


class StandIn(BaseHTTPRequestHandler):
    """The calls of the hub that a push and a download make; files are kept in `server.files`."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.path)
        if self.server.refuses:
            return self._answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self._answer({"url": f"{self.server.address}/someone/fox"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in files
            ]
            return self._answer({"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            found = [
                {**each, "actions": {"upload": {"href": f"{self.server.address}/lfs/{each['oid']}"}}}
                for each in objects
            ]
            return self._answer({"transfer": "basic", "objects": found})
        if self.path.endswith("/commit/main"):
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.objects[value["oid"]]
                else:
                    self.server.message = value["summary"]
            url = f"{self.server.address}/someone/fox/commit/{COMMIT}"
            return self._answer({"commitUrl": url, "commitOid": COMMIT})
        return self._answer({}, 404)

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects[self.path.rpartition("/")[2]] = content
        self._answer({})

    def do_GET(self):
        if self.server.refuses:
            return self._answer({"error": "Invalid username or password."}, 401)
        found = re.fullmatch(r"/someone/fox/resolve/\w+/(.*)", self.path)
        if found and found[1] in self.server.files:
            content = self.server.files[found[1]]
            self.send_response(200)
            self.send_header("ETag", f'"{hash(content):x}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)
            return None
        if self.path.startswith("/api/models/someone/fox/tree/"):
            files = self.server.files.items()
            tree = [{"type": "file", "path": name, "size": len(x), "oid": COMMIT} for name, x in files]
            return self._answer(tree)
        if self.path.startswith("/api/models/someone/fox"):
            names = [{"rfilename": name} for name in self.server.files]
            return self._answer({"id": "someone/fox", "sha": COMMIT, "siblings": names, "tags": []})
        return self._answer({}, 404)

    do_HEAD = do_GET

    def _answer(self, values, status=200):
        content = json.dumps(values).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.files, server.objects, server.asked, server.refuses = {}, {}, [], False
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name, value in {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_to_the_hub_and_back(trained, hub, tmp_path, capsys):
    words = ["--checkpoint", str(trained), "--output", str(tmp_path / "out"), "--push", "someone/fox"]
    assert export.main(words) == 0
    assert f"pushed to {hub.address}/someone/fox" in capsys.readouterr().out
    assert hub.created["visibility"] == "private"
    assert hub.message.startswith("Millrace: EMA weights of ")
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.files == written
    assert 'from_pretrained("someone/fox")' in hub.files["README.md"].decode()

    found = load_weights("someone/fox")
    assert found.origin.startswith("weights of the diffusers folder someone/fox (EMA weights of ")
    wanted, _ = checkpoint_state(trained)
    assert found.state.keys() == wanted.keys()
    assert all(torch.equal(found.state[name], wanted[name]) for name in wanted)
    with pytest.raises(UserError, match="someone/else: no such file or folder here, and not to be had from"):
        load_weights("someone/else")


def test_a_push_that_is_refused(trained, hub, tmp_path):
    hub.refuses = True
    words = ["--checkpoint", str(trained), "--output", str(tmp_path / "out"), "--push", "someone/fox"]
    with pytest.raises(UserError, match=r"^--push someone/fox: .*hf auth login.*the export is in ") as caught:
        export.main(words)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "out" / "config.json").is_file()
    with pytest.raises(UserError, match="--push fox: write it as OWNER/NAME"):
        export.main([*words[:-1], "fox"])
