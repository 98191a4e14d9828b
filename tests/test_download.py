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
from pathlib import Path

import pytest

import download_data
from utils import data_files
from utils import download as download_module
from utils.cli import Interrupted, UserError
from utils.data_files import DATA_FILES, DataFile, md5_of
from utils.download import download

ROOT = Path(__file__).resolve().parent.parent
CONTENT = random.Random(0).randbytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
CHECKSUM = f"md5:{MD5}"


class Site(http.server.ThreadingHTTPServer):
    """A site on localhost; the test sets its faults and reads what it was asked for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), SiteHandler)
        self.files = {"/file": CONTENT}
        self.ranges_known = True
        self.says_length = True
        self.break_after = []  # bytes to send before the connection is cut, one entry a request
        self.stalls = False  # instead of cutting, say nothing more
        self.hangs = False  # never answer
        self.answers_after_seconds = 0
        self.requests = []  # (path, Range header or None)
        self.bytes_sent = 0
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def url(self, path="/file"):
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def handle_error(self, request, client_address):
        """Clients that go away are part of the tests."""


class SiteHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        site = self.server
        asked = self.headers.get("Range")
        site.requests.append((self.path, asked))
        site.agent = self.headers.get("User-Agent")
        if site.hangs:
            site.closing.wait(20)
            return
        site.closing.wait(site.answers_after_seconds)
        if self.path not in site.files:
            self.send_error(404)
            return
        content = site.files[self.path]
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and site.ranges_known else 0
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if site.says_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if site.break_after:
            body = body[: site.break_after.pop(0)]
        site.bytes_sent += len(body)
        self.wfile.write(body)
        if site.stalls:
            site.closing.wait(20)

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    """No proxy and no mirror of the user's own, and seconds instead of half minutes."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("DANN_MIRROR", raising=False)
    monkeypatch.setattr(download_module, "SILENCE_SECONDS", 2.0)


@pytest.fixture
def make_site():
    sites = []

    def make():
        sites.append(Site())
        return sites[-1]

    yield make
    for site in sites:
        site.closing.set()
        site.shutdown()
        site.server_close()


@pytest.fixture
def site(make_site):
    return make_site()


@pytest.fixture
def refused_url():
    """An address that nothing listens on: bound, so that nobody else takes it, but not listening."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/file"


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def use_files(monkeypatch, *files):
    monkeypatch.setattr(data_files, "DATA_FILES", {"usps": files})


# --- one file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("says_length", [True, False])
def test_plain_download_into_a_new_folder(site, tmp_path, says_length):
    site.says_length = says_length
    path = tmp_path / "new" / "folder" / "file"
    download([site.url()], path, CHECKSUM)
    assert path.read_bytes() == CONTENT
    assert files_below(tmp_path) == ["new/folder/file"]
    assert "urllib" not in site.agent


def test_sha256_is_checked_too(site, tmp_path):
    download([site.url()], tmp_path / "right", "sha256:" + hashlib.sha256(CONTENT).hexdigest())
    with pytest.raises(UserError, match="checksum"):
        download([site.url()], tmp_path / "wrong", "sha256:" + "0" * 64)
    assert files_below(tmp_path) == ["right"]


def test_a_file_with_the_right_checksum_is_left_alone_and_another_replaced(site, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    download([site.url()], path, CHECKSUM)
    assert site.requests == []
    path.write_bytes(b"an older one")
    download([site.url()], path, CHECKSUM)
    assert path.read_bytes() == CONTENT


def test_broken_connections_are_resumed_and_no_byte_comes_twice(site, tmp_path):
    site.break_after = [100_000, 50_000]
    download([site.url()], tmp_path / "file", CHECKSUM)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [asked for _, asked in site.requests] == [None, "bytes=100000-", "bytes=150000-"]
    assert site.bytes_sent == len(CONTENT)


def test_a_second_call_resumes_what_the_first_one_kept(site, tmp_path):
    path = tmp_path / "file"
    site.break_after = [10_000] * 4
    with pytest.raises(UserError, match=r"broke off.*40,000 bytes are kept in .*file\.part.*run it again, it resumes"):
        download([site.url()], path, CHECKSUM, again="it")
    assert len(site.requests) == 4  # one and three retries
    assert files_below(tmp_path) == ["file.part"]
    download([site.url()], path, CHECKSUM)
    assert path.read_bytes() == CONTENT
    assert site.requests[-1][1] == "bytes=40000-"
    assert site.bytes_sent == len(CONTENT)


def test_a_mirror_resumes_what_the_first_site_broke_off(make_site, tmp_path):
    first, mirror = make_site(), make_site()
    first.break_after = [1000] * 4
    download([first.url(), mirror.url()], tmp_path / "file", CHECKSUM)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert mirror.requests == [("/file", "bytes=4000-")]


def test_a_stalled_connection_is_resumed(site, tmp_path):
    site.stalls = True
    site.break_after = [100_000]
    download([site.url()], tmp_path / "file", CHECKSUM, timeout_seconds=0.3)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [asked for _, asked in site.requests] == [None, "bytes=100000-"]


def test_a_server_that_ignores_range_is_read_from_the_start(site, tmp_path):
    site.ranges_known = False
    site.break_after = [100_000]
    download([site.url()], tmp_path / "file", CHECKSUM)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [asked for _, asked in site.requests] == [None, "bytes=100000-"]  # the second answered by 200


@pytest.mark.parametrize("kept", [CONTENT, CONTENT + b"more", b"wrong" * 1000], ids=["whole", "too long", "wrong"])
def test_odd_partial_files_are_mended(site, tmp_path, kept):
    (tmp_path / "file.part").write_bytes(kept)
    download([site.url()], tmp_path / "file", CHECKSUM)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert files_below(tmp_path) == ["file"]
    assert (site.bytes_sent == 0) == (kept == CONTENT)


def test_wrong_content_is_refused_and_leaves_nothing(site, tmp_path):
    site.files["/file"] = CONTENT[:-1] + b"?"
    with pytest.raises(UserError, match=r"checksum.*run .*copy the file to .*file by hand"):
        download([site.url()], tmp_path / "file", CHECKSUM)
    assert files_below(tmp_path) == []
    assert len(site.requests) == 1


@pytest.mark.parametrize("fault", ["wrong content", "404", "refused", "hangs"])
def test_the_mirror_takes_over(make_site, refused_url, tmp_path, fault):
    bad, mirror = make_site(), make_site()
    bad.hangs = fault == "hangs"
    bad.files = {"/file": b"something else"} if fault == "wrong content" else {}
    first = refused_url if fault == "refused" else bad.url()
    download([first, mirror.url()], tmp_path / "file", CHECKSUM, timeout_seconds=0.3)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert files_below(tmp_path) == ["file"]
    assert mirror.requests == [("/file", None)]


def test_a_slow_mirror_has_its_share_of_the_time(make_site, tmp_path, monkeypatch):
    bad, mirror = make_site(), make_site()
    bad.hangs = True
    mirror.answers_after_seconds = 0.3
    monkeypatch.setattr(download_module, "SILENCE_SECONDS", 1.4)
    download([bad.url(), mirror.url()], tmp_path / "file", CHECKSUM, timeout_seconds=10)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_refused_connections_are_said_at_once(refused_url, tmp_path):
    began = time.monotonic()
    with pytest.raises(UserError, match=r"Connection refused\): check the network and run .* again"):
        download([refused_url] * 3, tmp_path / "file", CHECKSUM)
    assert time.monotonic() - began < 1
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("silent", ["server", "name look-up"])
def test_silence_ends_within_the_total_whatever_the_number_of_addresses(site, tmp_path, monkeypatch, silent):
    site.hangs = True
    urls = [site.url()] * 8
    if silent == "name look-up":
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: site.closing.wait(20))
        urls = ["http://digits.invalid/file"] * 8
    monkeypatch.setattr(download_module, "SILENCE_SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(UserError, match="no answer"):
        download(urls, tmp_path / "file", CHECKSUM, timeout_seconds=10)
    assert time.monotonic() - began < 3
    assert files_below(tmp_path) == []
    assert silent != "server" or len(site.requests) == 8  # each had its share


def test_the_shipped_limit_on_silence_is_below_30_seconds():
    source = (ROOT / "utils" / "download.py").read_text()
    assert float(re.search(r"^SILENCE_SECONDS = ([\d.]+)", source, re.MULTILINE)[1]) < 30


def test_a_folder_that_cannot_be_made(site, tmp_path):
    (tmp_path / "occupied").write_text("a file")
    with pytest.raises(UserError, match=r"cannot use .*occupied.sub.file .*choose another folder"):
        download([site.url()], tmp_path / "occupied" / "sub" / "file", CHECKSUM)
    assert site.requests == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_nothing(site, tmp_path):
    (tmp_path / "file.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"no space left for .*file: free some and run"):
        download([site.url()], tmp_path / "file", CHECKSUM)
    assert files_below(tmp_path) == []
    assert len(site.requests) == 1  # a mirror would not help


def test_ctrl_c_keeps_the_partial_file_and_says_so(site, tmp_path, monkeypatch):
    read = download_module._read

    def interrupted_read(response, received_bytes):
        if received_bytes:
            raise KeyboardInterrupt
        return read(response, received_bytes)

    monkeypatch.setattr(download_module, "_read", interrupted_read)
    with pytest.raises(Interrupted, match=r"bytes are kept in .*file\.part, run it again, it resumes"):
        download([site.url()], tmp_path / "file", CHECKSUM, again="it")
    kept = (tmp_path / "file.part").read_bytes()
    assert kept
    assert kept == CONTENT[: len(kept)]
    assert files_below(tmp_path) == ["file.part"]


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


def test_fetch_downloads_what_is_missing_and_the_second_time_nothing(site, tmp_path, monkeypatch, capsys):
    use_files(monkeypatch, DataFile("a/file", MD5, (site.url(),)), DataFile("b/file", MD5, (site.url(),)))
    assert [file.path for file in download_data.missing_files("usps", tmp_path)] == ["a/file", "b/file"]
    download_data.fetch(["usps", "synth"], tmp_path)
    assert files_below(tmp_path) == ["a/file", "b/file"]
    assert len(site.requests) == 2
    assert download_data.missing_files("usps", tmp_path) == []
    download_data.fetch(["usps"], tmp_path)
    assert len(site.requests) == 2
    assert capsys.readouterr().out == ""  # stdout belongs to the script that calls


def test_the_script_says_already_there_the_second_time(site, tmp_path, monkeypatch, capsys):
    use_files(monkeypatch, DataFile("file", MD5, (site.url(),)))
    monkeypatch.setattr(sys, "argv", ["download_data.py", "usps", "--data-dir", str(tmp_path)])
    download_data.main()
    first = capsys.readouterr().out
    assert "downloaded" in first
    assert "300,000 bytes" in first
    assert "licence: for research" in first
    download_data.main()
    second = capsys.readouterr()
    assert "already there" in second.out
    assert "downloaded" not in second.out
    assert second.err == ""
    assert len(site.requests) == 1


def test_another_file_under_the_name_is_left_alone_with_one_line(site, tmp_path, monkeypatch, capsys):
    use_files(monkeypatch, DataFile("file", MD5, (site.url(),)))
    (tmp_path / "file").write_bytes(b"a subset")
    download_data.fetch(["usps"], tmp_path)
    assert (tmp_path / "file").read_bytes() == b"a subset"
    assert site.requests == []
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(r"file is not the official file .* delete it and run `python download_data.py usps ", lines[0])


def test_an_unpacked_mnist_file_counts_as_there(site, tmp_path, monkeypatch):
    use_files(monkeypatch, DataFile("MNIST/raw/t10k-labels-idx1-ubyte.gz", MD5, (site.url(),)))
    (tmp_path / "MNIST/raw").mkdir(parents=True)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte").write_bytes(b"unpacked")
    assert download_data.missing_files("usps", tmp_path) == []
    download_data.fetch(["usps"], tmp_path)
    assert site.requests == []


def test_the_users_own_mirror_is_tried_first(make_site, tmp_path, monkeypatch):
    official, own = make_site(), make_site()
    own.files = {"/digits/sub/file": CONTENT}
    monkeypatch.setenv("DANN_MIRROR", own.url("/digits/"))
    use_files(monkeypatch, DataFile("sub/file", MD5, (official.url(),)))
    download_data.fetch(["usps"], tmp_path)
    assert own.requests == [("/digits/sub/file", None)]
    assert official.requests == []
    monkeypatch.setenv("DANN_MIRROR", "/some/folder")
    (tmp_path / "sub/file").unlink()
    with pytest.raises(UserError, match="DANN_MIRROR is /some/folder: set it to a base URL"):
        download_data.fetch(["usps"], tmp_path)


def test_a_failed_fetch_names_the_command_that_resumes(site, tmp_path, monkeypatch):
    use_files(monkeypatch, DataFile("file", MD5, (site.url(),)))
    site.break_after = [1000] * 4
    expected = f"run `python download_data.py usps --data-dir {tmp_path}` again, it resumes"
    with pytest.raises(UserError, match=re.escape(expected)):
        download_data.fetch(["usps"], tmp_path)


def test_every_official_file_has_a_checksum_and_addresses_of_its_own():
    files = [file for group in DATA_FILES.values() for file in group]
    assert sorted(DATA_FILES) == ["mnist", "svhn", "usps"]
    assert len(files) == len({file.path for file in files}) == len({file.md5 for file in files}) == 8
    for file in files:
        assert re.fullmatch("[0-9a-f]{32}", file.md5)
        assert file.urls
        assert all(url.startswith("http") and url.endswith("/" + Path(file.path).name) for url in file.urls)


def test_the_table_agrees_with_torchvision():
    datasets = pytest.importorskip("torchvision.datasets")
    ours = {Path(file.path).name: file.md5 for group in DATA_FILES.values() for file in group}
    theirs = dict(datasets.MNIST.resources)
    for split in ("train", "test"):
        for reader in (datasets.SVHN, datasets.USPS):
            _, name, md5 = reader.split_list[split]
            theirs[name] = md5
    assert ours == theirs


@pytest.mark.skipif("DANN_DATA_DIR" not in os.environ, reason="DANN_DATA_DIR names no folder with the real files")
def test_real_files_are_recognised_without_a_network(monkeypatch, capsys, refused_url):
    folder = Path(os.environ["DANN_DATA_DIR"])
    offline = {
        name: tuple(dataclasses.replace(file, urls=(refused_url,)) for file in DATA_FILES[name])
        for name in ("mnist", "usps")
    }
    monkeypatch.setattr(data_files, "DATA_FILES", offline)
    download_data.fetch(["mnist", "usps"], folder)  # would raise if it tried to download
    said = capsys.readouterr().err
    for file in (*DATA_FILES["mnist"], *DATA_FILES["usps"]):
        path = folder / file.path
        official = not path.exists() or md5_of(path) == file.md5  # absent: MNIST unpacked
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
            cwd=tmp_path,
            env={**os.environ, **proxies, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return run


def error_lines(stderr):
    assert "Traceback" not in stderr
    return [line for line in stderr.splitlines() if not line.startswith("downloading ")]


def test_wrong_content_ends_the_command_with_one_line(site, tmp_path, run_command):
    site.files["/MNIST/raw/train-images-idx3-ubyte.gz"] = b"<html>Please log in</html>"
    done = run_command("mnist", "--data-dir", "digits", DANN_MIRROR=site.url(""))
    assert done.returncode == 1
    (line,) = error_lines(done.stderr)
    assert line.startswith("error: cannot download train-images-idx3-ubyte.gz (127.0.0.1:")
    assert "another checksum" in line
    assert "run `python download_data.py mnist --data-dir digits` again" in line
    assert "by hand" in line
    assert len(site.requests) == 1
    assert files_below(tmp_path) == []


def test_no_network_ends_the_command_with_one_line(tmp_path, run_command):
    began = time.monotonic()
    done = run_command()
    assert time.monotonic() - began < 30
    assert done.returncode == 1
    (line,) = error_lines(done.stderr)
    assert line.startswith("error: cannot download train_32x32.mat (ufldl.stanford.edu: Connection refused)")
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("sent", [1_000, 100_000])
def test_ctrl_c_ends_the_command_with_130_and_the_next_run_resumes(site, tmp_path, run_command, sent):
    site.files["/usps.bz2"] = CONTENT
    site.break_after = [sent]
    site.stalls = True
    process = run_command("usps", start=subprocess.Popen, DANN_MIRROR=site.url(""))
    part = tmp_path / "data" / "usps.bz2.part"
    deadline = time.monotonic() + 8  # the command itself gives a silent server ten seconds
    while not (part.exists() and part.stat().st_size == sent) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert part.stat().st_size == sent  # also what is less than a buffer
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    (line,) = error_lines(stderr)
    assert re.search(rf"interrupted: {sent:,} bytes are kept in data.usps.bz2.part, run .* again, it resumes", line)
    assert files_below(tmp_path) == [str(Path("data/usps.bz2.part"))]


def test_help_and_usage(tmp_path, run_command):
    shown = run_command("--help")
    assert shown.returncode == 0
    assert "DANN_MIRROR" in shown.stdout
    assert shown.stdout.count("  python download_data.py") == 2
    wrong = run_command("svnh")
    assert wrong.returncode == 2
    assert "unknown domain 'svnh' (choose from svhn mnist usps)" in wrong.stderr
    assert run_command("--data", "x").returncode == 2  # no abbreviations
    assert files_below(tmp_path) == []
