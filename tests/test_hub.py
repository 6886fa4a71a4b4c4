"""Retry, Hub checks, pushes and downloads: the real huggingface_hub client against the Hub of hub.py.

What talks to the Hub runs in a process of its own, whose sleeps are recorded instead of slept.
"""

import json
import math
import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError, URLError

import pytest
from hub import FINE, OTHER, READ, WRITE, Hub, Static, User

import common
from common import download, passing, retry

PRELUDE = """
import json, logging, sys, time
from pathlib import Path
waits, monotonic = [], time.monotonic
time.sleep = waits.append  # before the imports: it is a default of retry
import common
common.retry.__kwdefaults__["clock"] = lambda: monotonic() + sum(waits)
logging.basicConfig(level=logging.INFO)
from common import hub_api, hub_check, hub_push, passing
"""
CARD = b"---\ntags:\n- video\n---\n# a model\n"


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub
    for name, blob in hub.blobs.items():
        assert b"Canary" not in blob, f"a token was stored in {name}"


@pytest.fixture
def run(hub, tmp_path):
    """run(code, NAME=value, ...) -> the finished process, which never shows a token; None removes a variable."""

    def run(code: str, **changes: str | None) -> subprocess.CompletedProcess:
        base = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(Path(common.__file__).parent),
            "HF_HOME": str(tmp_path),
        }
        environment = {**base, "HOME": str(tmp_path), **hub.environment(), **changes}
        environment = {name: value for name, value in environment.items() if value is not None}
        command = [sys.executable, "-c", PRELUDE + code]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert "Canary" not in done.stdout + done.stderr
        return done

    return run


def make_model(folder: Path) -> dict[str, bytes]:
    """Writes a run's model folder; returns what of it belongs on the Hub."""
    wanted = {
        "README.md": CARD,
        "config.json": b"{}",
        "model.safetensors": random.Random(0).randbytes(300_000),
        "tokenizer.model": b"\x00pieces",
        "chat_template.jinja": b"{{ messages }}",
        "merges.txt": b"a b",
        "modeling.py": b"x = 1",
        "loss.png": b"\x89PNG",
        "samples/clip.mp4": b"\x00ftyp",
        "unet/config.json": b'{"sub": 1}',
    }
    unwanted = {".env": f"HF_TOKEN={WRITE}", "training_args.bin": WRITE, "run.log": WRITE, ".cache/a.json": "{}",
                "samples/optimizer.pt": "x", "unet/README.md": "x"}  # fmt: skip
    for name, data in {**wanted, **{name: text.encode() for name, text in unwanted.items()}}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return wanted


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- Retry


class FakeTime:
    def __init__(self):
        self.now, self.waits = 0.0, []

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.waits.append(seconds)

    def clock(self) -> float:
        return self.now


def http_error(status: int, headers: dict | None = None, url: str = "https://hf.co/api/whoami-v2") -> OSError:
    from huggingface_hub.errors import HfHubHTTPError

    response = SimpleNamespace(status_code=status, headers=headers or {}, url=url, request=None)
    return HfHubHTTPError(f"{status} for {url}", response=response)


def wrapped(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


def failing(error: Exception, times: float = math.inf):
    """A call that raises `error` the first `times` times, and counts in .calls."""

    def call():
        call.calls += 1
        if call.calls <= times:
            raise error
        return "done"

    call.calls = 0
    return call


def test_delays_double_up_to_the_maximum():
    fake = FakeTime()
    call = failing(ConnectionResetError(), times=10)
    assert retry(call, "x", sleep=fake.sleep, clock=fake.clock) == "done"
    assert fake.waits == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert sum(fake.waits) > 300, "must outlast a rate-limit window of the Hub"


@pytest.mark.parametrize(
    "headers, wait",
    [
        ({"retry-after": "0"}, 1),
        ({"retry-after": "30"}, 30),
        ({"retry-after": "9999"}, 600),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, 1),
        ({"ratelimit": '"api";r=0;t=271'}, 271),
        ({"ratelimit": '"api";r=10;t=271'}, 1),
    ],
)
def test_the_longer_of_our_wait_and_the_asked_one_wins(headers, wait):
    fake = FakeTime()
    retry(failing(http_error(429, headers), times=1), "x", sleep=fake.sleep, clock=fake.clock)
    assert fake.waits == [wait]


def test_gives_up_at_the_deadline_and_after_the_attempts(caplog):
    for limits, calls, waits in [({"deadline": 10.0}, 4, [1, 2, 4]), ({"attempts": 3}, 3, [1, 2])]:
        fake = FakeTime()
        call = failing(http_error(503))
        with pytest.raises(ConnectionError, match="push to a/b: gave up.*503") as caught:
            retry(call, "push to a/b", sleep=fake.sleep, clock=fake.clock, **limits)
        assert (call.calls, fake.waits) == (calls, waits)
        assert caught.value.__cause__.response.status_code == 503
    assert caplog.messages[0].startswith("push to a/b: HfHubHTTPError: 503")
    assert caplog.messages[0].endswith("attempt 2 of 36 in 1 s")
    assert len(caplog.messages) == 5, "one line a wait"


def test_the_defaults_last_half_an_hour():
    fake = FakeTime()
    with pytest.raises(ConnectionError):
        retry(failing(TimeoutError()), "x", sleep=fake.sleep, clock=fake.clock)
    assert 1700 < fake.now <= 1800


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 412])
def test_what_cannot_pass_ends_at_once(status):
    error = http_error(status)
    call = failing(error)
    with pytest.raises(OSError) as caught:
        retry(call, "x", sleep=pytest.fail)
    assert caught.value is error
    assert call.calls == 1


def test_passing_reads_what_errors_carry():
    from huggingface_hub.errors import OfflineModeIsEnabled

    class TransportError(Exception):
        __module__ = "httpx._exceptions"

    class NetworkError(TransportError):
        __module__ = "httpx._exceptions"

    class ReadError(NetworkError):
        __module__ = "httpx._exceptions"

    class UnsupportedProtocol(TransportError):
        __module__ = "httpx._exceptions"

    commit = "https://hf.co/api/models/a/b/commit/main"
    xet = "HTTP status {} error ({}), domain: https://cas"
    can = [
        *(http_error(status) for status in (408, 429, 500, 502, 503, 504)),
        http_error(409, url=commit),
        http_error(412, url=commit),
        wrapped(RuntimeError("Error while uploading"), http_error(503)),
        wrapped(FileNotFoundError("not in the cache"), http_error(429)),
        ConnectionResetError(),
        TimeoutError(),
        ReadError(),
        json.JSONDecodeError("Expecting value", "<html>", 0),
        ConnectionError(xet.format("server", "503 Service Unavailable")),
        wrapped(URLError("x"), ConnectionRefusedError()),
        wrapped(URLError("x"), socket.gaierror(socket.EAI_AGAIN, "try again")),
        HTTPError("http://x", 503, "x", {}, None),
    ]
    cannot = [
        wrapped(RuntimeError("Error while uploading"), http_error(403)),
        ConnectionError(xet.format("client", "401 Unauthorized")),
        ConnectionError(xet.format("client", "403 Forbidden")),
        PermissionError("xet authentication"),
        OfflineModeIsEnabled("offline"),
        wrapped(FileNotFoundError("not in the cache"), OfflineModeIsEnabled("offline")),
        UnsupportedProtocol(),
        OSError(28, "No space left on device"),
        ValueError("bad repo id"),
        KeyError("a bug"),
        wrapped(URLError("x"), socket.gaierror(socket.EAI_NONAME, "no such host")),
        HTTPError("http://x", 404, "x", {}, None),
    ]
    assert [error for error in can if not passing(error)[0]] == []
    assert [error for error in cannot if passing(error)[0]] == []
    assert passing(HTTPError("http://x", 429, "x", {"retry-after": "7"}, None)) == (True, 7.0)


@pytest.mark.parametrize("token", ["hf_" + "a" * 30, "other-secret", ""])
def test_messages_hold_no_secret(monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    error = ValueError(f"{token} hf_{'b' * 30} hf_hub_download\nhttps://s3/x?X-Amz-Signature=c")
    assert common.brief(error).split() == [
        "ValueError:",
        *["***"] * (1 + bool(token)),
        "hf_hub_download",
        "https://s3/x?...",
    ]


# --- Check before training


def test_check_then_push_then_download(hub, run, tmp_path):
    wanted = make_model(tmp_path / "model")
    checked = run("print(hub_check('clips', public=False, create=True))", HF_USER_ID="tester")
    assert checked.stdout.split() == ["tester/clips"], checked.stderr
    assert hub.repo("tester/clips").private
    assert list(hub.files("tester/clips")) == ["README.md"]

    pushed = run("print(hub_push(Path('model'), 'tester/clips', 'Trained'))")
    assert pushed.stdout.split() == [f"{hub.url}/tester/clips"], pushed.stderr
    assert hub.titles("tester/clips") == ["Start training", "Trained"]
    assert hub.files("tester/clips") == wanted

    loaded = run("from huggingface_hub import snapshot_download; print(snapshot_download('tester/clips'))")
    folder = Path(loaded.stdout.strip())
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == wanted

    again = run(CHECK_AND_PUSH)
    assert again.returncode == 0, again.stderr
    assert hub.titles("tester/clips") == ["Start training", "Trained"], "nothing new, no commit"
    assert len(hub.requests("GET /api/whoami")) == 2, "rate-limited: once a check"


def test_check_alone_changes_nothing(hub, run):
    done = run("print(hub_check('tester/new', public=False, create=False))")
    assert done.stdout.split() == ["tester/new"], done.stderr
    assert "would create tester/new (private)" in done.stderr
    hub.add_repo("tester/old")
    assert "would push to tester/old" in run("hub_check('tester/old', public=False, create=False)").stderr
    assert list(hub.repos) == [("models", "tester/old")]
    assert hub.requests("POST|PUT|DELETE") == []


def test_public_and_organisation(hub, run):
    done = run(
        "hub_check('team/open', public=True, create=True); hub_check('team/open', public=True, create=True)"
    )
    assert done.returncode == 0, done.stderr
    assert not hub.repo("team/open").private
    assert hub.titles("team/open") == ["Start training"]


REFUSED = {  # case -> (environment or repo_id, words of the message)
    "no token": ({"HF_TOKEN": None}, "HF_TOKEN is not set"),
    "blank token": ({"HF_TOKEN": " "}, "HF_TOKEN is not set"),
    "broken token": ({"HF_TOKEN": "hf_Canary Canary"}, "copy it again"),
    "unknown token": ({"HF_TOKEN": "hf_unknownCanaryCanaryCanary"}, "Invalid user token"),
    "read token": ({"HF_TOKEN": READ}, "role read"),
    "foreign token": ({"HF_TOKEN": OTHER}, "writes to stranger, not to tester"),
    "foreign user": ({"HF_USER_ID": "else", "repo_id": "new"}, "not to else"),
    "public repo": ({"repo_id": "tester/public"}, "add --public"),
    "bad name": ({"repo_id": "tester/a--b"}, "HFValidationError"),
    "offline": ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
    "dead Hub": ({"HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}"}, "gave up"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_training(hub, run, case):
    changes, words = REFUSED[case]
    environment = {name: value for name, value in changes.items() if name != "repo_id"}
    hub.add_repo("tester/public", private=False)
    repo_id = changes.get("repo_id", "tester/new")
    done = run(f"hub_check({repo_id!r}, public=False, create=True)", **environment)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.requests("POST|PUT|DELETE") == []


@pytest.mark.parametrize("files", [{}, {"README.md": CARD}], ids=["empty repo", "repo with a card"])
def test_a_fine_grained_token_is_proved_by_writing(hub, run, files):
    hub.add_repo("tester/old", files=files)
    code = "hub_check('tester/old', public=False, create=True)"
    assert run(code, HF_TOKEN=FINE).returncode == 0
    hub.users[FINE] = User("tester", "fineGrained", can_write=False)
    hub.repos.clear()
    hub.add_repo("tester/old", files=files)
    done = run(code, HF_TOKEN=FINE)
    assert done.returncode == 2
    assert "write to tester/old" in done.stderr and "403" in done.stderr


def test_a_hub_that_never_answers_is_left(hub, run):
    hub.fault("whoami", kind="hang", seconds=5)
    code = (
        "try: hub_api(0.3).whoami()\nexcept Exception as error: print(type(error).__name__, *passing(error))"
    )
    assert run(code).stdout.split() == ["ReadTimeout", "True", "0.0"]


# --- Faults

CHECK_AND_PUSH = """
hub_check('tester/clips', public=False, create=True)
hub_push(Path('model'), 'tester/clips', 'Trained')
"""
PLACES = {  # request -> how often an untroubled check and push makes it
    "GET /api/whoami": 1,
    "POST /api/repos/create": 1,
    "POST /api/validate-yaml": 2,
    "POST .*/preupload/": 2,
    "POST .*/commit/": 2,
}


@pytest.mark.parametrize("place", PLACES)
def test_passing_faults_pass_without_a_second_commit(hub, run, tmp_path, place):
    """Four runs in one process: 429 once, 503 once, 429 three times in a row, 503 three times in a row."""
    wanted = make_model(tmp_path / "model")
    busy = {"status": 429, "headers": {"Retry-After": "2"}}
    broken = {"status": 503, "body": b"<html>gateway</html>"}
    for times in (1, 3):
        for fault in (busy, broken):
            hub.fault(place, times=times, **fault)
            hub.fault(place, kind="none", times=PLACES[place])
    done = run("""
for repo in ("tester/a", "tester/b", "tester/c", "tester/d"):
    hub_check(repo, public=False, create=True)
    hub_push(Path("model"), repo, "Trained")
print(json.dumps(waits))
""")
    assert done.returncode == 0, done.stderr
    assert [fault.hits for fault in hub.faults] == [fault.times for fault in hub.faults]
    assert len(json.loads(done.stdout)) == 1 + 1 + 3 + 3, "one wait a fault"
    for repo in "abcd":
        assert hub.titles(f"tester/{repo}") == ["Start training", "Trained"]
        assert hub.files(f"tester/{repo}") == wanted


def test_faults_of_large_files_pass(hub, run, tmp_path):
    wanted = make_model(tmp_path / "model")
    hub.fault("POST .*/objects/batch")
    hub.fault("PUT /lfs/", kind="reset", times=2)
    hub.fault("POST .*/verify", status=500)
    assert run(CHECK_AND_PUSH).returncode == 0
    assert hub.titles("tester/clips") == ["Start training", "Trained"]
    assert hub.files("tester/clips") == wanted


@pytest.mark.parametrize("kind", ["lost", "reset"])
@pytest.mark.parametrize("skip", [0, 1], ids=["first commit", "push"])
def test_a_lost_answer_makes_no_second_commit(hub, run, tmp_path, kind, skip):
    wanted = make_model(tmp_path / "model")
    injected = hub.fault("POST .*/commit/", kind=kind, skip=skip)
    done = run(CHECK_AND_PUSH)
    assert done.returncode == 0, done.stderr
    assert injected.hits == skip + 1
    assert hub.titles("tester/clips") == ["Start training", "Trained"]
    assert hub.files("tester/clips") == wanted
    assert len(hub.requests("PUT /lfs/")) == 4, "each large file is sent once"


def test_another_writers_commit_in_between(hub, run, tmp_path):
    make_model(tmp_path / "model")
    hub.fault("POST .*/commit/", status=412, skip=1)
    assert run(CHECK_AND_PUSH).returncode == 0
    assert hub.titles("tester/clips") == ["Start training", "Trained"]


def test_a_push_to_a_gone_hub_raises_after_half_an_hour(hub, run, tmp_path):
    make_model(tmp_path / "model")
    hub.add_repo("tester/clips")
    hub.fault("POST .*/commit/", kind="reset", times=math.inf)
    code = "try: hub_push(Path('model'), 'tester/clips', 'x')\nexcept OSError as e: print(type(e).__name__, sum(waits))"
    name, waited = run(code).stdout.split()
    assert name == "ConnectionError"
    assert 1700 < float(waited) <= 1800
    assert hub.titles("tester/clips") == []


# --- What is pushed


PUSH_ALL = """
for folder in sorted(Path("models").iterdir()):
    try:
        hub_push(folder, "tester/clips", "x")
    except ValueError as error:
        print(error)
"""


def test_nothing_is_pushed_from_a_folder_with_a_link_or_a_token(hub, run, tmp_path):
    hub.add_repo("tester/clips")
    models = tmp_path / "models"
    for name in "abcd":
        make_model(models / name)
    (models / "a/link.json").symlink_to("/etc/passwd")
    (models / "b/assets").symlink_to("/etc")
    (models / "c/notes.txt").write_text(f"use {WRITE} here")
    (models / "d/unet/config.json").write_text('{"key": "hf_' + "x" * 30 + '"}')
    (models / "e").mkdir()
    lines = run(PUSH_ALL).stdout.splitlines()
    expected = [
        "link.json",
        "assets",
        "c/notes.txt contains",
        "d/unet/config.json contains",
        "no model files",
    ]
    assert len(lines) == len(expected)
    assert all(words in line for words, line in zip(expected, lines, strict=True)), lines
    assert hub.requests("POST|PUT") == []


# --- Download


@pytest.fixture
def web(hub, monkeypatch):
    """The Hub's /files/, without real waits and without a proxy."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_TOKEN", WRITE)
    monkeypatch.setitem(retry.__kwdefaults__, "sleep", lambda seconds: None)
    return hub


def test_download_fetches_once(web, tmp_path):
    body = random.Random(0).randbytes(3_000_000)
    web.static["a/clip.mp4"] = Static(body)
    url = web.url + "/files/a/clip.mp4?x=1"
    path = download(url, tmp_path / "cache")
    assert path.read_bytes() == body
    assert path.suffix == ".mp4"
    assert download(url, tmp_path / "cache") == path
    assert len(web.log) == 1
    assert "Authorization" not in web.log[0].headers
    assert download(url.replace("x=1", "x=2"), tmp_path / "cache") != path
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".mp4", ".mp4"]


def test_download_takes_no_part_for_the_file(web, tmp_path):
    """A crash leaves the part file of its process; the next call starts over, and so does a try after a cut answer."""
    web.static["clip.mp4"] = Static(b"whole" * 1000)
    url = web.url + "/files/clip.mp4"
    path = download(url, tmp_path)
    path.rename(path.with_name(path.name + ".0123abcd.part"))
    path.with_name(path.name + ".0123abcd.part").write_bytes(b"who")
    web.fault("GET /files/", kind="cut")
    web.fault("GET /files/", kind="reset")
    web.fault("GET /files/", status=500, body=b"<html>oops</html>")
    assert download(url, tmp_path).read_bytes() == b"whole" * 1000
    assert len(web.log) == 5


def test_download_follows_http_and_quotes(web, tmp_path):
    web.static["to"] = Static(status=302, headers={"Location": "/files/a%20b.mp4"})
    web.static["a b.mp4"] = Static(b"x")
    assert download(web.url + "/files/to", tmp_path).read_bytes() == b"x"
    web.static["café x.mp4"] = Static(b"y")
    assert download(web.url + "/files/café x.mp4", tmp_path).read_bytes() == b"y"


def test_download_refuses(web, tmp_path):
    web.static["big"] = Static(b"x" * 2001)
    web.static["page"] = Static(b"<html>log in</html>", headers={"Content-Type": "text/html; charset=utf-8"})
    web.static["to_file"] = Static(status=302, headers={"Location": "file:///etc/passwd"})
    web.static["to_ftp"] = Static(status=302, headers={"Location": "ftp://127.0.0.1/x"})
    cases = [
        (web.url + "/files/big", ValueError, "the limit is 2000"),
        (web.url + "/files/page", ValueError, "a web page"),
        (web.url + "/files/to_file", OSError, "not allowed"),
        (web.url + "/files/to_ftp", OSError, "ftp"),
        (web.url + "/files/gone", OSError, "404"),
        (web.url.replace("http:", "file:") + "/files/big", ValueError, "only http"),
        ("file:///etc/passwd", ValueError, "only http"),
        ("/etc/passwd", ValueError, "only http"),
        (f"http://127.0.0.1:{closed_port()}/x", ConnectionError, "gave up after 5"),
        ("http://127.0.0.1:port/x", OSError, "port"),
    ]
    for url, error, words in cases:
        with pytest.raises(error, match=words):
            download(url, tmp_path / "cache", max_bytes=2000)
    assert list((tmp_path / "cache").iterdir()) == []


def test_download_ends_an_answer_that_does_not_end(web, tmp_path):
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    threading.Thread(target=answer_without_end, args=(listener,), daemon=True).start()
    with listener:
        with pytest.raises(ValueError, match="the limit is 1000000"):
            download(url + "fast", tmp_path, max_bytes=1_000_000)
        start = time.monotonic()
        with pytest.raises(ConnectionError, match="gave up.*bytes in 1 s"):
            download(url + "slow", tmp_path, timeout=0.6)
        assert time.monotonic() - start < 5
    assert list(tmp_path.iterdir()) == []


def answer_without_end(listener: socket.socket) -> None:
    """Serves one client after the other, each until it hangs up."""
    for _ in range(2):
        connection, _ = listener.accept()
        fast = b"/fast" in connection.recv(4096)
        try:
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                connection.sendall(b"x" * (65536 if fast else 1))
                time.sleep(0 if fast else 0.05)
        except ConnectionError:
            connection.close()
