"""The downloader against a server on this machine that fails in every way that real ones do."""

import dataclasses
import hashlib
import http.server
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT
from torchvision import datasets

import download_data
from digits import files
from digits.files import DATA_FILES, DataFile, fetch
from utils import download as download_module
from utils.cli import UserError
from utils.download import download
from utils.files import checksum

CONTENT = random.Random(0).randbytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
CHECKSUM = f"md5:{MD5}"
SHIPPED_LIMIT, SHIPPED_TIMEOUT = download_module.SILENCE_SECONDS, download_module.TIMEOUT_SECONDS


class Site(http.server.ThreadingHTTPServer):
    """A site on localhost; the test sets its faults and looks at what it was asked for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), SiteHandler)
        self.files = {"/file": CONTENT}
        self.ranges_known = self.says_length = True
        self.break_after = []  # bytes to send before the connection is cut, one entry a request
        self.stalls = False  # instead of cutting, send nothing more
        self.answers_after_seconds = 0
        self.requests = []  # (path, Range header or None)
        self.bytes_sent = 0
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __exit__(self, *exception):
        self.closing.set()
        self.shutdown()
        super().__exit__(*exception)

    def url(self, path="/file"):
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def handle_error(self, request, client_address):
        """Clients that go away are part of the tests."""


class SiteHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        site, asked, site.agent = self.server, self.headers.get("Range"), self.headers.get("User-Agent")
        site.requests.append((self.path, asked))
        site.closing.wait(site.answers_after_seconds)
        content = site.files.get(self.path)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and site.ranges_known else 0
        if content is None or (start and start >= len(content)):
            self.send_error(404 if content is None else 416)
            return
        self.send_response(206 if start else 200)
        if site.says_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:][: site.break_after.pop(0) if site.break_after else None]
        site.bytes_sent += len(body)
        self.wfile.write(body)
        site.closing.wait(20 if site.stalls else 0)

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    """No proxy and no mirror of the user's own, and fractions of seconds instead of half minutes."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("DANN_MIRROR", raising=False)
    monkeypatch.setattr(download_module, "SILENCE_SECONDS", 2.0)
    monkeypatch.setattr(download_module, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(download_module, "PAUSE_SECONDS", 0.01)


@pytest.fixture
def site():
    with Site() as site:
        yield site


@pytest.fixture
def mirror():
    with Site() as mirror:
        yield mirror


@pytest.fixture
def refused_url():
    """An address that nothing listens on: bound, so that nobody else takes it, but not listening."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/file"


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def check_download(path, *urls):
    """After a download the folder holds the whole file, and nothing else."""
    download(urls, path, CHECKSUM)
    assert path.read_bytes() == CONTENT
    assert files_below(path.parent) == [path.name]


# --- one file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("says_length", [True, False])
@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_right_content_comes_into_a_new_folder_and_wrong_leaves_nothing(site, tmp_path, says_length, algorithm):
    site.says_length = says_length
    expected = hashlib.new(algorithm, CONTENT).hexdigest()
    download([site.url()], tmp_path / "new" / "folder" / "file", f"{algorithm}:{expected}")
    assert (tmp_path / "new" / "folder" / "file").read_bytes() == CONTENT
    site.files["/file"] = CONTENT[:-1] + b"?"
    with pytest.raises(UserError, match=r"checksum.* run it again") as refused:
        download([site.url()], tmp_path / "wrong", f"{algorithm}:{expected}", again="it")
    assert str(tmp_path / "wrong") in str(refused.value), "where it can be put by hand"
    assert files_below(tmp_path) == ["new/folder/file"]
    assert len(site.requests) == 2
    assert "urllib" not in site.agent


@pytest.mark.parametrize("name", ["file", "file.part"])
@pytest.mark.parametrize("kept", [CONTENT, CONTENT + b"more", b"wrong" * 1000], ids=["right", "too long", "wrong"])
def test_the_right_content_is_left_alone_and_other_replaced(site, tmp_path, name, kept):
    (tmp_path / name).write_bytes(kept)
    check_download(tmp_path / "file", site.url())
    assert (site.bytes_sent == 0) == (kept == CONTENT)
    assert bool(site.requests) == (name == "file.part" or kept != CONTENT)


@pytest.mark.parametrize("fault", ["breaks off twice", "stalls", "knows no ranges"])
def test_what_was_broken_off_is_resumed_and_no_byte_comes_twice(site, tmp_path, fault):
    """But where the server knows no ranges, and sends the whole file again."""
    site.stalls, site.ranges_known = fault == "stalls", fault != "knows no ranges"
    site.break_after = [100_000, 50_000] if fault == "breaks off twice" else [100_000]
    check_download(tmp_path / "file", site.url())
    ranges = [None, "bytes=100000-", "bytes=150000-"]
    assert [asked for _, asked in site.requests] == ranges[: 3 if fault == "breaks off twice" else 2]
    assert site.bytes_sent == len(CONTENT) + (0 if site.ranges_known else 100_000)


def test_a_second_call_resumes_what_the_first_one_kept(site, tmp_path):
    path = tmp_path / "file"
    site.break_after = [10_000] * 4
    with pytest.raises(UserError, match=r"40,000 bytes .*file\.part.*run it again"):
        download([site.url()], path, CHECKSUM, again="it")
    assert len(site.requests) == 4  # one and three retries
    assert files_below(tmp_path) == ["file.part"]
    check_download(path, site.url())
    assert site.requests[-1][1] == "bytes=40000-"
    assert site.bytes_sent == len(CONTENT)


@pytest.mark.parametrize("fault", ["wrong content", "404", "refused", "hangs", "breaks off"])
def test_the_mirror_takes_over(site, mirror, refused_url, tmp_path, fault):
    """Where the first site broke off, it resumes what that one has sent."""
    site.answers_after_seconds, site.break_after = 20 * (fault == "hangs"), [1000] * 4 * (fault == "breaks off")
    site.files = {"wrong content": {"/file": b"something else"}, "404": {}}.get(fault, site.files)
    check_download(tmp_path / "file", refused_url if fault == "refused" else site.url(), mirror.url())
    assert mirror.requests == [("/file", "bytes=4000-" if fault == "breaks off" else None)]


def test_a_slow_mirror_has_its_share_of_the_time(site, mirror, tmp_path, monkeypatch):
    site.answers_after_seconds, mirror.answers_after_seconds = 20, 0.3
    monkeypatch.setattr(download_module, "TIMEOUT_SECONDS", 10)
    check_download(tmp_path / "file", site.url(), mirror.url())


@pytest.mark.parametrize("silent", ["server", "server after some bytes", "name look-up"])
def test_silence_ends_within_the_total_whatever_the_number_of_addresses(site, tmp_path, monkeypatch, silent):
    urls = [site.url()] * 8
    site.answers_after_seconds, site.stalls = 20 * (silent == "server"), silent == "server after some bytes"
    site.break_after = [1000] + [0] * 8 if site.stalls else []
    if silent == "name look-up":
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: site.closing.wait(20))
        urls = ["http://digits.invalid/file"] * 8
    monkeypatch.setattr(download_module, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(download_module, "TIMEOUT_SECONDS", 10)
    began = time.monotonic()
    with pytest.raises(UserError, match="no answer"):
        download(urls, tmp_path / "file", CHECKSUM)
    assert time.monotonic() - began < 2
    assert silent == "name look-up" or len(site.requests) == 8 + site.stalls  # each had its share
    assert SHIPPED_LIMIT < 30


def test_who_sends_without_end_is_left(site, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "MOST_BYTES", len(CONTENT) // 2)
    with pytest.raises(UserError, match="sent more than"):
        download([site.url()], tmp_path / "file", CHECKSUM)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    ("first", "then", "followed"),
    [
        ("https://a.invalid/f", "https://b.invalid/f", True),
        ("https://a.invalid/f", "http://b.invalid/f", False),
        ("http://a.invalid/f", "https://b.invalid/f", True),
        ("http://a.invalid/f", "ftp://b.invalid/f", False),
        ("http://a.invalid/f", "file:///etc/passwd", False),
    ],
)
def test_a_redirect_never_leaves_https(first, then, followed):
    request = urllib.request.Request(first)
    asked = (request, None, 302, "Found", {}, then)
    if followed:
        assert download_module._Redirects().redirect_request(*asked).full_url == then
    else:
        with pytest.raises(urllib.error.URLError, match="redirects to"):
            download_module._Redirects().redirect_request(*asked)


def test_an_address_that_breaks_off_is_asked_again_after_longer_and_longer_pauses(site, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(download_module.time, "sleep", pauses.append)
    site.break_after = [1000] * 9
    with pytest.raises(UserError):
        download([site.url()], tmp_path / "file", CHECKSUM)
    assert pauses == [download_module.PAUSE_SECONDS * factor for factor in (1, 2, 4, 8)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_and_a_folder_that_cannot_be_made(site, tmp_path):
    """Nothing is left, and no other address asked, which would not help."""
    (tmp_path / "file.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"space .*file"):
        download([site.url(), site.url()], tmp_path / "file", CHECKSUM)
    assert files_below(tmp_path) == []
    assert len(site.requests) == 1
    (tmp_path / "occupied").write_text("a file")
    path = tmp_path / "occupied" / "sub" / "file"
    with pytest.raises(UserError, match=re.escape(str(path))):
        download([site.url()], path, CHECKSUM)
    assert len(site.requests) == 1


def test_two_at_once_do_not_spoil_each_other(site, tmp_path):
    pytest.importorskip("fcntl", reason="the lock needs fcntl")
    work = [threading.Thread(target=download, args=([site.url()], tmp_path / "file", CHECKSUM)) for _ in range(4)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join(10)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(site.requests) == 1


# --- the data sets ----------------------------------------------------------------------------------


def use_files(monkeypatch, site, *paths):
    monkeypatch.setattr(files, "DATA_FILES", {"usps": [DataFile(path, MD5, (site.url(),)) for path in paths]})


def test_the_second_time_all_is_already_there(site, tmp_path, monkeypatch, capsys):
    """fetch() leaves stdout to the script that calls it; download_data.py says there what it did."""
    use_files(monkeypatch, site, "a/file", "b/file")
    for _ in range(2):
        fetch(["usps", "synth"], tmp_path / "fetched")
        assert files_below(tmp_path / "fetched") == ["a/file", "b/file"]
        assert len(site.requests) == 2
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys, "argv", ["download_data.py", "usps", "--data-dir", str(tmp_path)])
    for state in ("downloaded", "already there"):
        download_data.main()
        shown = capsys.readouterr()
        assert all(words in shown.out for words in (state, "300,000 bytes", "licence: for research"))
    assert shown.err == ""
    assert len(site.requests) == 4


def test_what_is_there_is_left_alone(site, tmp_path, monkeypatch, capsys):
    """MNIST unpacked without a word, another file under the name with one line."""
    use_files(monkeypatch, site, "file", "t10k-labels-idx1-ubyte.gz")
    (tmp_path / "file").write_bytes(b"a subset")
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"unpacked")
    fetch(["usps"], tmp_path)
    assert (tmp_path / "file").read_bytes() == b"a subset"
    assert site.requests == []
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "file") in line
    assert f"`python download_data.py usps --data-dir {tmp_path}`" in line


def test_the_users_own_mirror_is_tried_first(site, mirror, tmp_path, monkeypatch):
    mirror.files = {"/digits/sub/file": CONTENT}
    monkeypatch.setenv("DANN_MIRROR", mirror.url("/digits/"))
    use_files(monkeypatch, site, "sub/file")
    fetch(["usps"], tmp_path)
    assert mirror.requests == [("/digits/sub/file", None)]
    assert site.requests == []
    monkeypatch.setenv("DANN_MIRROR", "/some/folder")
    (tmp_path / "sub/file").unlink()
    with pytest.raises(UserError, match=r"DANN_MIRROR.*/some/folder.*https?://"):
        fetch(["usps"], tmp_path)


def test_the_table_agrees_with_torchvision_and_has_addresses_of_each_file():
    everything = [file for name, group in DATA_FILES.items() if name != "mnist-m" for file in group]
    splits = [dataset.split_list[split] for dataset in (datasets.SVHN, datasets.USPS) for split in ("train", "test")]
    theirs = dict(datasets.MNIST.resources) | {name: md5 for _, name, md5 in splits}
    assert len(everything) == len(theirs) == 8
    assert {Path(file.path).name: file.md5 for file in everything} == theirs
    for file in everything:
        assert file.urls
        assert all(url.startswith("http") and url.endswith("/" + Path(file.path).name) for url in file.urls)


def test_real_files_are_recognised_without_a_network(real_data, monkeypatch, capsys, refused_url):
    offline = {
        name: tuple(dataclasses.replace(file, urls=(refused_url,)) for file in DATA_FILES[name])
        for name in ("mnist", "usps")
    }
    monkeypatch.setattr(files, "DATA_FILES", offline)
    fetch(offline, real_data)  # would raise if it tried to download
    said = capsys.readouterr().err
    for file in (*DATA_FILES["mnist"], *DATA_FILES["usps"]):
        path = real_data / file.path
        official = not path.exists() or checksum(path, "md5") == file.md5  # absent: MNIST unpacked
        assert (f"{path} is not the official file" in said) == (not official)
        assert official or file in DATA_FILES["usps"]  # copies of USPS packed anew are about


# --- as a user runs it ------------------------------------------------------------------------------


@pytest.fixture
def run_command(tmp_path, refused_url):
    """Run the script with every address outside this machine cut off by a proxy that is not there."""

    def run(*arguments, start=subprocess.run, **environment):
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), refused_url)
        return start(
            [sys.executable, str(ROOT / "download_data.py"), *arguments],
            cwd=tmp_path, env={**os.environ, **proxies, **environment},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return run


def one_line(stderr):
    """What is said beside the files that are being downloaded."""
    (line,) = [line for line in stderr.splitlines() if not line.startswith("downloading ")]
    return line


def test_a_failure_ends_the_command_with_one_line(site, tmp_path, run_command):
    """Wrong content, and no network at all, which is said at once."""
    site.files["/MNIST/raw/train-images-idx3-ubyte.gz"] = b"<html>Please log in</html>"
    mnist = r"train-images-idx3-ubyte.gz \(127.0.0.1:.*checksum.*`python download_data.py mnist --data-dir digits`"
    for arguments, environment, told in (
        (("mnist", "--data-dir", "digits"), {"DANN_MIRROR": site.url("")}, mnist),
        ((), {}, r"train_32x32.mat \(ufldl.stanford.edu: Connection refused\)"),
    ):
        began = time.monotonic()
        done = run_command(*arguments, **environment)
        assert time.monotonic() - began < SHIPPED_TIMEOUT
        assert done.returncode == 1
        assert re.search(rf"^error: .*{told}", one_line(done.stderr))
        assert files_below(tmp_path) == []
    assert len(site.requests) == 1


@pytest.mark.parametrize("sent", [1_000, 100_000])
def test_ctrl_c_ends_the_command_with_130_and_keeps_what_came(site, tmp_path, run_command, sent):
    site.files["/usps.bz2"] = CONTENT
    site.break_after, site.stalls = [sent], True
    process = run_command("usps", start=subprocess.Popen, DANN_MIRROR=site.url(""))
    part = tmp_path / "data" / "usps.bz2.part"
    deadline = time.monotonic() + 8  # the command itself gives a silent server ten seconds
    while not (part.exists() and part.stat().st_size == sent) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert part.stat().st_size == sent  # also what is less than a buffer, were the process killed now
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert re.search(rf"{sent:,} bytes .*data.usps.bz2.part, run .* again", one_line(stderr))
    assert files_below(tmp_path) == ["data/usps.bz2.part"]
    assert part.read_bytes() == CONTENT[:sent]


@pytest.mark.parametrize(("words", "told"), [(["svnh"], "'svnh'.*svhn mnist usps"), (["--data", "x"], ": --data$")])
def test_unknown_names_and_abbreviated_options_are_usage_mistakes(capsys, words, told):
    with pytest.raises(SystemExit) as ended:
        download_data.parse_arguments(words)
    assert ended.value.code == 2
    assert re.search(f"error: .*{told}", capsys.readouterr().err.strip())
