import errno
import hashlib
import ssl
import threading
from functools import partial
from http.client import IncompleteRead
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from apq_mmdet.errors import BadInputError
from apq_mmdet.files import tensor_bytes
from apq_mmdet.reproduction.checkpoints import download, expected_sha256, file_of, refuse_missing, verify
from apq_mmdet.reproduction.rows import Detector

CONTENT = b"weights"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
NAME = f"detector-{DIGEST[:8]}.pth"


def detector(weights=f"https://example.org/{NAME}", sha256=None):
    return Detector("detector", Path("config.py"), weights, sha256, None)


@pytest.fixture
def server(tmp_path):
    """Address of a server of a folder that holds the checkpoint and, under another's name, something else."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / NAME).write_bytes(CONTENT)
    (folder / "other-01234567.pth").write_bytes(CONTENT)
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_expected_digest():
    assert expected_sha256(detector()) == DIGEST[:8]
    assert expected_sha256(detector("https://example.org/detector.pth")) is None
    assert expected_sha256(detector("https://example.org/detector.pth", DIGEST)) == DIGEST


def test_the_right_file(tmp_path):
    (tmp_path / NAME).write_bytes(CONTENT)
    found = verify(detector(), tmp_path)
    assert (found.sha256, found.verified) == (DIGEST, True)


def test_a_file_without_a_published_digest_is_told_apart(tmp_path):
    (tmp_path / "detector.pth").write_bytes(CONTENT)
    found = verify(detector("https://example.org/detector.pth"), tmp_path)
    assert (found.sha256, found.verified) == (DIGEST, False)


@pytest.mark.parametrize("sha256", [None, DIGEST])
def test_another_file(tmp_path, sha256):
    (tmp_path / NAME).write_bytes(CONTENT + b"!")
    with pytest.raises(
        BadInputError, match=rf"{NAME} is not the one of detector: its sha256 starts with .* instead of"
    ):
        verify(detector(sha256=sha256), tmp_path)


def test_missing_ones_are_listed(tmp_path):
    with pytest.raises(BadInputError, match=rf"--download fetches them:\n.*{NAME}.*https://example.org/{NAME}"):
        refuse_missing([detector()], tmp_path)


def test_download(server, tmp_path):
    folder = tmp_path / "new" / "folder"
    download(detector(f"{server}/{NAME}"), folder)
    assert (folder / NAME).read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == [NAME]


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInputError, match=r"--checkpoints .*file cannot be made"):
        download(detector(), tmp_path / "file")


def test_what_is_there_is_not_fetched(tmp_path):
    (tmp_path / NAME).write_bytes(b"mine")
    download(detector("http://127.0.0.1:9/" + NAME), tmp_path)
    assert (tmp_path / NAME).read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent-01234567.pth", "HTTP Error 404"), ("other-01234567.pth", "invalid hash value")],
)
def test_a_failed_download_leaves_nothing(server, tmp_path, name, message):
    folder = tmp_path / "folder"
    wanted = detector(f"{server}/{name}")
    with pytest.raises(BadInputError, match=rf"{name} cannot be downloaded to .*{message}"):
        download(wanted, folder)
    assert not file_of(wanted, folder).exists()
    assert list(folder.iterdir()) == []


def test_a_download_without_a_digest_that_broke_off_leaves_nothing(server, tmp_path):
    folder, wanted = tmp_path / "folder", detector(f"{server}/detector.pth")
    whole = tensor_bytes({"weights": torch.zeros(100)})
    (tmp_path / "served" / "detector.pth").write_bytes(whole[:500])
    with pytest.raises(BadInputError, match="cannot be loaded safely"):
        download(wanted, folder)
    assert list(folder.iterdir()) == []
    (tmp_path / "served" / "detector.pth").write_bytes(whole)
    download(wanted, folder)
    assert [path.name for path in folder.iterdir()] == ["detector.pth"]


def test_an_address_that_does_not_answer(tmp_path):
    with pytest.raises(BadInputError, match=r"cannot be downloaded.*refused"):
        download(detector("http://127.0.0.1:9/" + NAME), tmp_path)


@pytest.mark.parametrize(
    "error", [ssl.SSLError("bad handshake"), IncompleteRead(b""), OSError(errno.ENETUNREACH, "no network")]
)
def test_whatever_breaks_a_download_is_told(tmp_path, monkeypatch, error):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr("torch.hub.download_url_to_file", broken)
    with pytest.raises(BadInputError, match="cannot be downloaded"):
        download(detector(), tmp_path)


def test_another_command_may_fetch_the_same_file(tmp_path, monkeypatch):
    first = [True]

    def fetch(_, partial, hash_prefix):
        Path(partial).write_bytes(CONTENT)
        if first:
            first.clear()
            download(detector(), tmp_path)

    monkeypatch.setattr("torch.hub.download_url_to_file", fetch)
    download(detector(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
