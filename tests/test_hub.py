"""Retry, secrets, Hub checks, pushes and downloads: the real huggingface_hub client against the Hub of
hub.py.

What talks to the Hub runs in a process of its own, whose sleeps are recorded instead of slept. It sends large
files by xet, as users do, and where it matters also by git-lfs. Of xet, hf_xet's real upload is covered
(token, chunks, shards, and faults in each); not covered are compressed chunks, chunks that the storage has
already, and xet downloads. hf_xet's own retries are cut to one.
"""

import json
import math
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
from types import SimpleNamespace

import pytest
import requests
from hub import FINE, OTHER, READ, WRITE, Hub, Static, User

import common
from common import download, passing, redact, retry

PRELUDE = """
import json, logging, sys, time
from pathlib import Path
waits, monotonic = [], time.monotonic
time.sleep = waits.append  # before the imports: it is a default of retry
import common
common.retry.__kwdefaults__["clock"] = lambda: monotonic() + sum(waits)
logging.basicConfig(level=logging.INFO)
from common import hub_api, hub_check, hub_push, passing, push_finished, push_rows
"""
# hub_api's time-outs, for tests with an answer that does not come
IMPATIENT = "patient = common.hub_api; common.hub_api = lambda timeout: patient(0.4)\n"
CARD = b"---\ntags:\n- video\n---\n# a model\n"


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub
    for name, blob in hub.blobs.items():
        assert b"Canary" not in blob, f"a token was stored in {name}"


@pytest.fixture
def run(hub, tmp_path):
    """run(code, xet=False, NAME=value, ...) -> the finished process, which never shows a token; None removes
    a variable."""

    def run(code: str, xet: bool = True, **changes: str | None) -> subprocess.CompletedProcess:
        process = start(code, hub.environment(xet=xet) | changes, tmp_path)
        stdout, stderr = process.communicate(timeout=60)
        assert "Canary" not in stdout + stderr
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run


both = pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])


def start(code: str, variables: dict[str, str | None], folder: Path) -> subprocess.Popen:
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(common.__file__).parent),
        "HF_HOME": str(folder),
        "HOME": str(folder),
        "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1",
        "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
        "HF_XET_CLIENT_READ_TIMEOUT": "1s",
        **variables,
    }
    environment = {name: value for name, value in environment.items() if value is not None}
    command = [sys.executable, "-c", PRELUDE + code]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=folder, stdout=pipe, stderr=pipe, text=True)


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
        wrapped(requests.ConnectionError("x"), ConnectionRefusedError()),
        wrapped(requests.ReadTimeout("x"), TimeoutError()),
        wrapped(requests.ConnectionError("x"), socket.gaierror(socket.EAI_AGAIN, "try again")),
        requests.HTTPError("x", response=answer(503)),
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
        wrapped(requests.ConnectionError("x"), socket.gaierror(socket.EAI_NONAME, "no such host")),
        requests.exceptions.InvalidSchema("ftp"),
        requests.HTTPError("x", response=answer(404)),
    ]
    assert [error for error in can if not passing(error)[0]] == []
    assert [error for error in cannot if passing(error)[0]] == []
    busy = answer(429)
    busy.headers["Retry-After"] = "7"
    assert passing(requests.HTTPError("x", response=busy)) == (True, 7.0)


def answer(status: int) -> requests.Response:
    made = requests.Response()
    made.status_code = status
    return made


# --- Secrets

LONG = "Ab3" * 20
HIDDEN = {  # text -> how it reads
    f"see hf_{LONG}.": "see ***.",
    f'{{"text": "a\\nhf_{LONG}"}}': '{"text": "a\\n***"}',
    f"AKIA{'A1' * 8} and ASIA{'A1' * 8}": "*** and ***",
    f"ghp_{LONG} gho_{LONG} github_pat_{LONG} glpat-{LONG}": "*** *** *** ***",
    f"xoxb-{LONG} sk-{LONG} sk-proj-{LONG} AIza{'a' * 35}": "*** *** *** ***",
    f"eyJ{LONG}.eyJ{LONG}.{LONG}": "***",
    f"Authorization: Bearer {LONG}==": "Authorization: ***",
    "-----BEGIN RSA PRIVATE KEY-----": "***",
    "https://s3/x.mp4?X-Amz-Credential=A%2Fs3&X-Amz-Date=1&X-Amz-Security-Token=q&X-Amz-Signature=c":
        "https://s3/x.mp4?X-Amz-Credential=***&X-Amz-Date=1&X-Amz-Security-Token=***&X-Amz-Signature=***",
    "https://gcs/x?X-Goog-Credential=a%40b&X-Goog-Signature=c": "https://gcs/x?X-Goog-Credential=***&X-Goog-Signature=***",
    "https://az/x?sv=2022&sig=a%2Fb%3D": "https://az/x?sv=2022&sig=***",
    "https://cf/x?Expires=1&Signature=a~b&Key-Pair-Id=K1&Policy=ey_": "https://cf/x?Expires=1&Signature=***&Key-Pair-Id=***&Policy=***",
    "http://x/?token=a&access_token=b&api_key=c&key=d#access_token=e": "http://x/?token=***&access_token=***&api_key=***&key=***#access_token=***",
    '"http://x/?v=1\\u0026sig=b"': '"http://x/?v=1\\u0026sig=***"',
    "rtsp://me:pa55@host/x postgres://:p@ss@host": "rtsp://me:***@host/x postgres://:***@host",
    "MY_API_KEY=abc password=def": "MY_API_KEY=*** password=***",
}  # fmt: skip
READABLE = [
    "https://www.youtube.com/watch?v=dQw4w9WgXcQ&t=12s",
    "https://host:8080/a@b/clip.mp4?monkey=1&design=2",
    "hf_hub_download hf_xet sk-learn ask-me-anything-about-the-video-please eyJ AKIA",
    "the bearer of this message is a basic-authentication-free-client",
    "a" * 5000,
]


@pytest.mark.parametrize("text", HIDDEN)
def test_secrets_are_hidden_and_addresses_stay_readable(text):
    assert redact(text) == HIDDEN[text]
    assert redact(HIDDEN[text]) == HIDDEN[text]


@pytest.mark.parametrize("text", READABLE)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


def test_no_line_of_a_log_shows_a_secret(monkeypatch, capsys):
    import logging

    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(common.hide_secrets)
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.info("%s of %d", "0123456789abcdef", 2)
    try:
        raise ValueError(WRITE)
    except ValueError:
        logger.exception("failed")
    output = capsys.readouterr().out
    assert output.startswith("*** of 2\nfailed\nTraceback")
    assert output.endswith("ValueError: ***\n")


def test_our_own_files_and_tokenizers_raise_no_alarm(tmp_path):
    """A push looks into them."""
    letters = random.Random(0)
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-=./?&:@+"
    words = ["".join(letters.choices(alphabet, k=letters.randint(1, 24))) for _ in range(30_000)]
    words += "hf_ sk- ?key= &token= Bearer AKIA eyJ :// @ https://user:password@host ?key=your_key".split()
    vocabulary = {
        "model": {"vocab": {word: n for n, word in enumerate(words)}, "merges": ["a b", "://u :p@"]}
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))
    rows = [
        {"video": f"https://host/clip{n}.mp4?v={n}", "answer": " ".join(words[n : n + 9])} for n in range(500)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    root = Path(common.__file__).parent
    ours = [path for path in root.iterdir() if path.is_file()]
    assert len(ours) > 8
    assert [str(path) for path in [*ours, *tmp_path.iterdir()] if common.file_holds_secret(path)] == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-be"])
@pytest.mark.parametrize(
    "secret", [f"hf_{LONG}", f"https://s3/x?X-Amz-Signature={LONG}", f"https://me:{LONG}@host"]
)
def test_a_secret_is_found_in_a_file(tmp_path, secret, encoding):
    path = tmp_path / "notes.txt"
    path.write_bytes(f"café: {secret}\n".encode(encoding))
    assert common.file_holds_secret(path)
    path.write_bytes(f"café: {secret[:12]}\n".encode(encoding))
    assert not common.file_holds_secret(path)


def test_a_secret_is_found_in_a_large_file_between_two_blocks(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes((b"a word " * 2**22)[: 2**24 - 10] + f" hf_{LONG}".encode())
    assert common.file_holds_secret(path)


@pytest.mark.parametrize("token", ["hf_" + "a" * 30, "other-secret", ""])
def test_messages_hold_no_secret(monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    error = ValueError(f"{token} hf_{'b' * 30} hf_hub_download\nhttps://s3/x?X-Amz-Signature=c")
    assert common.brief(error).split() == [
        "ValueError:",
        *["***"] * (1 + bool(token)),
        "hf_hub_download",
        "https://s3/x?X-Amz-Signature=***",
    ]


# --- Check before training


@both
def test_check_then_push_then_download(hub, run, tmp_path, xet):
    wanted = make_model(tmp_path / "model")
    checked = run("print(hub_check('clips', public=False, create=True))", HF_USER_ID="tester")
    assert checked.stdout.split() == ["tester/clips"], checked.stderr
    assert hub.repo("tester/clips").private
    assert hub.titles("tester/clips") == [], "the Hub's own commit alone"

    pushed = run("print(hub_push(Path('model'), 'tester/clips', 'Trained'))", xet)
    assert pushed.stdout.split() == [f"{hub.url}/tester/clips"], pushed.stderr
    assert hub.titles("tester/clips") == ["Trained"]
    assert hub.files("tester/clips") == wanted
    assert bool(hub.requests("/cas/v1/shards")) == xet
    assert bool(hub.requests("PUT /lfs/")) != xet

    loaded = run("from huggingface_hub import snapshot_download; print(snapshot_download('tester/clips'))")
    folder = Path(loaded.stdout.strip())
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == wanted

    again = run(CHECK_AND_PUSH, xet)
    assert again.returncode == 0, again.stderr
    assert hub.titles("tester/clips") == ["Trained"], "nothing new, no commit"
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
    assert hub.titles("team/open") == []


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


RIGHTS = [  # (repo, token, may it write there)
    ("tester/old", WRITE, True),
    ("tester/old", FINE, True),
    ("tester/old", "hf_weakCanaryCanaryCanary", False),
    ("tester/old", READ, False),
    ("tester/old", OTHER, False),
    ("tester/public", OTHER, False),
    ("team/old", WRITE, True),
]


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize("repo_id, token, may_write", RIGHTS)
def test_the_right_to_write_is_proved_without_writing(hub, run, repo_id, token, may_write, create):
    hub.users["hf_weakCanaryCanaryCanary"] = User("tester", "fineGrained", can_write=False)
    for name in ("tester/old", "team/old", "tester/public"):
        hub.add_repo(name, private=name != "tester/public")
    asked = f"""
try: hub_api(5).auth_check({repo_id!r}, write=True)
except OSError as error: print(error.response.status_code)
hub_check({repo_id!r}, public=False, create={create})"""
    done = run(asked, HF_TOKEN=token)
    assert (done.stdout == "") == may_write
    assert done.returncode == (0 if may_write else 2), done.stderr
    assert "Traceback" not in done.stderr
    assert hub.requests("POST|PUT|DELETE") == []


def test_a_new_repo_needs_the_right_too(hub, run):
    hub.users[FINE] = User("tester", "fineGrained", can_write=False)
    done = run("hub_check('tester/new', public=False, create=True)", HF_TOKEN=FINE)
    assert done.returncode == 2
    assert "403" in done.stderr and "--no_push_to_hub" in done.stderr


HTML = {"status": 200, "body": b"<html>log in to the hotel</html>", "headers": {"Content-Type": "text/html"}}
DOWN = {
    "throttled": {"status": 429, "headers": {"Retry-After": "9"}},
    "broken": {"status": 503},
    "reset": {"kind": "reset"},
    "hanging": {"kind": "hang", "seconds": 1},
    "web page": HTML,
}


@pytest.mark.parametrize(
    "place", ["GET /api/whoami", "GET /api/models/tester/clips$", "POST /api/repos/create"]
)
@pytest.mark.parametrize("fault", DOWN)
def test_a_hub_that_is_down_does_not_end_a_run_that_goes_on(hub, run, place, fault):
    hub.fault(place, times=math.inf, **DOWN[fault])
    code = IMPATIENT + "print(hub_check('clips', public=False, create=True, must_answer={}))"
    done = run(code.format(False), HF_USER_ID="tester")
    assert done.stdout.split() == ["tester/clips"], done.stderr
    assert "goes on" in done.stderr.splitlines()[-1]
    done = run(code.format(True), HF_USER_ID="tester")
    assert done.returncode == 2
    assert "attempt 2" in done.stderr and "--no_push_to_hub" in done.stderr.splitlines()[-1]


REFUSED_ALL_THE_SAME = {
    "no owner": ({"HF_USER_ID": ""}, {"status": 503}),
    "unknown token": ({"HF_TOKEN": "hf_unknownCanaryCanaryCanary"}, None),
    "read token": ({"HF_TOKEN": READ}, None),
    "foreign token": ({"HF_TOKEN": OTHER}, None),
    "no token": ({"HF_TOKEN": ""}, None),
    "forbidden": ({}, {"status": 403}),
    "offline": ({"HF_HUB_OFFLINE": "1"}, None),
}


@pytest.mark.parametrize("case", REFUSED_ALL_THE_SAME)
def test_a_run_that_goes_on_needs_a_right_token_all_the_same(hub, run, case):
    changes, fault = REFUSED_ALL_THE_SAME[case]
    if fault:
        hub.fault("GET /api/whoami", times=math.inf, **fault)
    code = "hub_check('clips', public=False, create=True, must_answer=False)"
    done = run(code, **{"HF_USER_ID": "tester", **changes})
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "status, body", [(409, b"{}"), (409, b"<html>"), (200, b"{}"), (200, b"[]"), (200, b"null")]
)
@pytest.mark.parametrize(
    "place", ["GET /api/whoami", "GET /api/models/tester/clips$", "POST /api/repos/create"]
)
def test_odd_answers_are_refused_in_one_line(hub, run, place, status, body):
    hub.fault(place, times=math.inf, status=status, body=body)
    done = run("hub_check('tester/clips', public=False, create=True)")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "--no_push_to_hub" in done.stderr.splitlines()[-1]


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
    "GET /api/models/[^/]+/[^/]+$": 3,  # is it there, whose is it, what is its last commit
    "POST /api/repos/create": 1,
    "GET .*/auth-check/write": 1,
    "POST /api/validate-yaml": 1,
    "POST .*/preupload/": 1,
    "POST .*/commit/": 1,
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
        assert hub.titles(f"tester/{repo}") == ["Trained"]
        assert hub.files(f"tester/{repo}") == wanted


def test_faults_of_large_files_pass(hub, run, tmp_path):
    wanted = make_model(tmp_path / "model")
    hub.fault("POST .*/objects/batch")
    hub.fault("PUT /lfs/", kind="reset", times=2)
    hub.fault("POST .*/verify", status=500)
    assert run(CHECK_AND_PUSH, xet=False).returncode == 0
    assert hub.titles("tester/clips") == ["Trained"]
    assert hub.files("tester/clips") == wanted


@pytest.mark.parametrize("place", ["GET .*/xet-write-token", "POST /cas/v1/xorbs", "POST /cas/v1/shards"])
@pytest.mark.parametrize("fault", ["broken", "throttled", "reset", "hanging"])
def test_faults_of_xet_pass(hub, run, tmp_path, place, fault):
    wanted = make_model(tmp_path / "model")
    settings = DOWN[fault] | {"headers": {}, "seconds": 2}
    hub.fault(place, times=3, **settings)
    done = run(CHECK_AND_PUSH)
    assert done.returncode == 0, done.stderr
    assert hub.titles("tester/clips") == ["Trained"]
    assert hub.files("tester/clips") == wanted


@pytest.mark.parametrize("place", ["GET .*/xet-write-token", "POST /cas/v1/xorbs"])
@pytest.mark.parametrize("status", [401, 403])
def test_what_xet_refuses_ends_the_push_at_once(hub, run, tmp_path, place, status):
    make_model(tmp_path / "model")
    hub.add_repo("tester/clips")
    hub.fault(place, times=math.inf, status=status)
    done = run("push_finished(Path('model'), 'tester/clips', 'Trained', again='python x.py')")
    assert done.returncode == 3, done.stderr
    assert str(status) in done.stderr and "Traceback" not in done.stderr
    assert len(hub.requests(place)) <= 2
    assert hub.titles("tester/clips") == []


LOST = {  # what becomes of the answer to a commit
    "lost": {"kind": "lost"},
    "lost twice": {"kind": "lost", "times": 2},
    "reset": {"kind": "reset"},
    "cut": {"kind": "cut"},
    "failed": {"kind": "failed", "status": 504, "body": b"<html>gateway</html>"},
    "failed three times": {"kind": "failed", "status": 500, "times": 3},
    "web page": {"kind": "failed", **HTML},
    "hang": {"kind": "hang", "seconds": 0.8},
    "late": {"kind": "late", "seconds": 0.8},
    "late twice": {"kind": "late", "seconds": 0.8, "times": 2},
}


@both
@pytest.mark.parametrize("case", LOST)
def test_a_lost_answer_makes_no_second_commit(hub, run, tmp_path, case, xet):
    wanted = make_model(tmp_path / "model")
    hub.add_repo("tester/clips", files={"theirs.txt": b"stays"})
    injected = hub.fault("POST .*/commit/", **LOST[case])
    done = run(IMPATIENT + CHECK_AND_PUSH, xet)
    assert done.returncode == 0, done.stderr
    assert injected.hits >= 1
    time.sleep(1 if "late" in case else 0)  # until the last late commit is refused
    assert hub.titles("tester/clips") == ["Trained"]
    assert hub.files("tester/clips") == wanted | {"theirs.txt": b"stays"}
    if not xet:
        assert len(hub.requests("PUT /lfs/")) == 4, "each large file is sent once"


@pytest.mark.parametrize("kind", ["lost", "late", "failed"])
def test_a_hub_that_never_confirms(hub, run, tmp_path, kind):
    make_model(tmp_path / "model")
    hub.fault("POST .*/commit/", kind=kind, times=math.inf, seconds=0.1)
    assert run(CHECK_AND_PUSH).returncode == 0
    assert hub.titles("tester/clips") == ["Trained"]


@both
def test_more_files_than_the_client_puts_in_one_commit(hub, run, tmp_path, xet):
    make_model(tmp_path / "model")
    for n in range(300):
        (tmp_path / f"model/part{n:03}.json").write_text(str(n))
    hub.fault("POST .*/commit/", kind="lost")
    done = run(CHECK_AND_PUSH, xet)
    assert done.returncode == 0, done.stderr
    assert hub.titles("tester/clips") == ["Trained"]
    assert hub.files("tester/clips")["part299.json"] == b"299"


@both
def test_another_writers_commit_in_between(hub, run, tmp_path, xet):
    wanted = make_model(tmp_path / "model")
    repo = hub.add_repo("tester/clips")
    hub.fault("POST .*/commit/", kind="late", seconds=1)

    def write() -> None:
        while not hub.requests("POST .*/commit/"):
            time.sleep(0.01)
        repo.add("theirs", {"theirs.txt": hub.store(b"stays")})

    writer = threading.Thread(target=write)
    writer.start()
    done = run(CHECK_AND_PUSH, xet)
    writer.join()
    assert done.returncode == 0, done.stderr
    assert hub.titles("tester/clips") == ["theirs", "Trained"]
    assert hub.files("tester/clips") == wanted | {"theirs.txt": b"stays"}


@pytest.mark.parametrize("body", [b"{}", b"[]", b"<html>"])
@pytest.mark.parametrize("place", ["GET /api/models/tester/clips$", "POST .*/preupload/", "POST .*/commit/"])
def test_odd_answers_to_a_push(hub, run, tmp_path, place, body):
    make_model(tmp_path / "model")
    hub.add_repo("tester/clips")
    hub.fault(place, times=math.inf, status=200, body=body)
    done = run("push_finished(Path('model'), 'tester/clips', 'Trained', again='python x.py')")
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr


HANGING = [
    (True, "POST .*/commit/"),
    (True, "/cas/v1/xorbs"),
    (False, "PUT /lfs/"),
    (False, "POST .*/commit/"),
]


@pytest.mark.parametrize("xet, place", HANGING)
def test_a_signal_ends_a_push_at_once(hub, tmp_path, xet, place):
    make_model(tmp_path / "model")
    hub.add_repo("tester/clips")
    hub.fault(place, kind="hang", seconds=30, times=math.inf)
    code = "common.run(lambda: hub_push(Path('model'), 'tester/clips', 'Trained'))"
    variables = hub.environment(xet=xet) | {"HF_XET_CLIENT_READ_TIMEOUT": "30s"}
    process = start(code, variables, tmp_path)
    while not hub.requests(place):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    time.sleep(0.2)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143
    assert time.monotonic() - sent < 3


def test_the_command_that_was_typed_pushes_it_later(hub, run, tmp_path):
    make_model(tmp_path / "model")
    hub.add_repo("tester/clips")
    hub.fault("POST .*/commit/", status=403, times=math.inf)
    done = run("push_finished(Path('model'), 'tester/clips', 'x', again=\"python t2v.py --prompt 'a cat'\")")
    assert done.returncode == 3
    assert re.search(
        "error: trained, not pushed: .*403.*; model is whole; the same command pushes it later:", done.stderr
    )
    assert done.stderr.splitlines()[-1].endswith("    python t2v.py --prompt 'a cat'")


def test_a_push_to_a_gone_hub_raises_after_half_an_hour(hub, run, tmp_path):
    make_model(tmp_path / "model")
    hub.add_repo("tester/clips")
    hub.fault("POST .*/commit/", kind="reset", times=math.inf)
    code = (
        "try: hub_push(Path('model'), 'tester/clips', 'x')\nexcept OSError as e: print(type(e).__name__, "
        "sum(waits))"
    )
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
    for name in "abcdf":
        make_model(models / name)
    (models / "f/modeling.py").write_text(f"key = '{WRITE}'", encoding="utf-16")
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
        "f/modeling.py contains",
    ]
    assert len(lines) == len(expected)
    assert all(words in line for words, line in zip(expected, lines, strict=True)), lines
    assert hub.requests("POST|PUT") == []


def test_rows_are_pushed_without_secrets(hub, run, tmp_path):
    """A signed url of the user's own data is cut; its name stays."""
    (tmp_path / "data").mkdir()
    url = f"https://s3/clip.mp4?v=1&X-Amz-Signature={LONG}"
    rows = [
        {"video": url, "question": "what?", "n": 1},
        {"video": "b.mp4", "question": f"hf_{LONG}?", "n": 2},
    ]
    done = run(
        f"push_rows(Path('data'), 'tester/clips', False, {{'train': {rows}, 'test': []}}, 'about', 'x.py')"
    )
    assert done.returncode == 0, done.stderr
    files = hub.files("tester/clips", "datasets")
    assert sorted(files) == ["README.md", "train.jsonl"]
    pushed = [json.loads(line) for line in files["train.jsonl"].splitlines()]
    assert pushed[0] == {"video": "https://s3/clip.mp4?v=1&X-Amz-Signature=***", "question": "what?", "n": 1}
    assert pushed[1]["question"] == "***?"
    assert "| train | 2 | 2 |" in files["README.md"].decode()


# --- Download


@pytest.fixture
def web(hub, monkeypatch):
    """The Hub's /files/, as the samples' mirror, without real waits and without a proxy."""
    monkeypatch.setenv("SAMPLES_URL", hub.url)
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
    """A crash leaves the part file of its process; the next call starts over, and so does a try after a cut
    answer."""
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


def test_download_sends_no_secret(web, tmp_path, monkeypatch, caplog):
    """No password of a proxy or of .netrc; a plain proxy is used; an url's own signature stays out of the
    messages."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password Canary\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    web.static["x"] = Static(b"x")
    download(web.url + "/files/x", tmp_path)
    assert "Authorization" not in web.log[0].headers
    monkeypatch.delenv("no_proxy")
    gone = f"http://127.0.0.1:{closed_port()}/files/x?sig=Canary"
    monkeypatch.setenv("http_proxy", web.url)
    assert download(gone, tmp_path).read_bytes() == b"x"
    monkeypatch.setenv("http_proxy", web.url.replace("//", "//me:Canary@"))
    with pytest.raises(ConnectionError, match=r"files/x\?\.\.\.: gave up") as caught:
        download(gone + "2", tmp_path)
    assert "Canary" not in str(caught.value) + caplog.text
    assert len(web.log) == 2


def test_download_refuses(web, tmp_path):
    web.static["big"] = Static(b"x" * 2001)
    web.static["page"] = Static(b"<html>log in</html>", headers={"Content-Type": "text/html; charset=utf-8"})
    web.static["to_file"] = Static(status=302, headers={"Location": "file:///etc/passwd"})
    web.static["to_ftp"] = Static(status=302, headers={"Location": "ftp://127.0.0.1/x"})
    cases = [
        (web.url + "/files/big", ValueError, "the limit is 2000"),
        (web.url + "/files/page", ValueError, "a web page"),
        (web.url + "/files/to_file", OSError, "file:///etc/passwd"),
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


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433", "169.254.169.254"],
)
def test_download_asks_neither_this_machine_nor_its_link(web, tmp_path, monkeypatch, host):
    """Where clouds keep secrets and others their services; nor by way of a redirect."""
    web.static["to"] = Static(status=302, headers={"Location": f"http://{host}/x"})
    port = web.url.rsplit(":", 1)[1]
    monkeypatch.setenv("SAMPLES_URL", "http://127.0.0.2")
    with pytest.raises(ValueError, match="this machine or its link"):
        download(f"http://{host}:{port}/files/to", tmp_path)
    assert not web.log
    monkeypatch.setenv("SAMPLES_URL", web.url)
    if host != "127.0.0.1":
        with pytest.raises(ValueError, match="this machine or its link"):
            download(f"{web.url}/files/to", tmp_path)
        assert len(web.log) == 1


def test_download_ends_an_answer_that_does_not_end(web, tmp_path):
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    threading.Thread(target=answer_without_end, args=(listener,), daemon=True).start()
    with listener:
        with pytest.raises(ValueError, match="the limit is 1000000"):
            download(url + "fast", tmp_path, max_bytes=1_000_000)
        with pytest.raises(ValueError, match="the limit is 1000000"):
            download(url + "redirect", tmp_path, max_bytes=1_000_000)
        start = time.monotonic()
        with pytest.raises(ConnectionError, match="gave up.*bytes in 1 s"):
            download(url + "slow", tmp_path, timeout=0.6)
        assert time.monotonic() - start < 5
    assert list(tmp_path.iterdir()) == []


def answer_without_end(listener: socket.socket) -> None:
    """Serves one client after the other, each until it hangs up; /redirect leads to /fast."""
    for _ in range(4):
        connection, _ = listener.accept()
        asked = connection.recv(4096)
        head = b"302 Found\r\nLocation: /fast" if b"/redirect" in asked else b"200 OK"
        try:
            connection.sendall(b"HTTP/1.1 %s\r\n\r\n" % head)
            while True:
                connection.sendall(b"x" * (1 if b"/slow" in asked else 65536))
                time.sleep(0.05 if b"/slow" in asked else 0)
        except ConnectionError:
            connection.close()
