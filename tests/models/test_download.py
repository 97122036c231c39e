"""reproduce.models.download: resumed, checked, atomic; served by this machine alone."""

from __future__ import annotations

import hashlib
import socket
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from questlib.errors import CheckpointError, ConfigError, QuestError
from reproduce.models import download as module
from reproduce.models.__main__ import main
from reproduce.models.compvis_files import config_names
from reproduce.models.download import (
    CHECKPOINTS,
    RemoteFile,
    download_checkpoint,
    download_file,
)

CONTENT = bytes(range(256)) * 400
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """files: path -> bytes; ranges: what was asked for; it honours Range."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body, asked = self.server.files.get(self.path), self.headers.get("Range")
            self.server.ranges.append(asked)
            if body is None:
                return self.send_error(404)
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
            if asked and start >= len(body):
                return self.send_error(416)
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.end_headers()
            self.wfile.write(body[start:])

        def log_message(self, *args) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.files, http.ranges = {"/model.ckpt": CONTENT}, []
    http.url = f"http://127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield http
    http.shutdown()
    http.server_close()


def test_download_and_digest(server, tmp_path):
    path = download_file(f"{server.url}/model.ckpt", tmp_path / "new" / "a.ckpt", DIGEST)
    assert path.read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == ["a.ckpt"]
    download_file(f"{server.url}/model.ckpt", path, DIGEST)
    assert server.ranges == [None]  # not asked again


def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path):
    (tmp_path / "a.ckpt.part").write_bytes(CONTENT[:1000])
    assert (
        download_file(f"{server.url}/model.ckpt", tmp_path / "a.ckpt", DIGEST).read_bytes()
        == CONTENT
    )
    assert server.ranges == ["bytes=1000-"]


def test_a_download_that_was_stopped_at_its_very_end(server, tmp_path):
    """All of it is there, but not renamed yet: the server has nothing left to send."""
    (tmp_path / "a.ckpt.part").write_bytes(CONTENT)
    assert (
        download_file(f"{server.url}/model.ckpt", tmp_path / "a.ckpt", DIGEST).read_bytes()
        == CONTENT
    )
    assert server.ranges == [f"bytes={len(CONTENT)}-"]


def test_a_server_that_does_not_answer(server, tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}"
    (tmp_path / "a.ckpt.part").write_bytes(b"kept")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
    with pytest.raises(QuestError, match=f"download {closed}/model.ckpt: .*kept in .*a.ckpt.part"):
        download_file(f"{closed}/model.ckpt", tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt.part").read_bytes() == b"kept"


def test_wrong_digest_and_missing_file(server, tmp_path):
    with pytest.raises(CheckpointError, match=DIGEST):
        download_file(f"{server.url}/model.ckpt", tmp_path / "a.ckpt", "0" * 64)
    assert not list(tmp_path.iterdir())
    (tmp_path / "b.ckpt.part").write_bytes(b"kept")
    with pytest.raises(QuestError, match="404.*b.ckpt.part"):
        download_file(f"{server.url}/none", tmp_path / "b.ckpt")
    assert (tmp_path / "b.ckpt.part").read_bytes() == b"kept"


def test_archives_are_unpacked(server, tmp_path, monkeypatch, capsys):
    archive = tmp_path / "made.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("model.ckpt", CONTENT)
    server.files["/beds.zip"] = archive.read_bytes()
    monkeypatch.setitem(
        module.CHECKPOINTS,
        "lsun_beds256",
        RemoteFile(f"{server.url}/beds.zip", member="model.ckpt"),
    )
    assert main(["download", "lsun_beds256", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "lsun_beds256.ckpt").read_bytes() == CONTENT
    assert "reproduce.models convert" in capsys.readouterr().out
    monkeypatch.setitem(
        module.CHECKPOINTS,
        "lsun_beds256",
        RemoteFile(f"{server.url}/beds.zip", member="other.ckpt"),
    )
    with pytest.raises(QuestError, match="other.ckpt"):
        download_checkpoint("lsun_beds256", tmp_path / "out2")


def test_every_model_has_a_source_and_a_config():
    assert sorted(CHECKPOINTS) == config_names()
    with pytest.raises(ConfigError, match="sd-v1-4"):
        download_checkpoint("sd-v9", None)
