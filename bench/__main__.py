"""`python -m bench`: measure a model; the last line printed is one JSON object."""

import argparse
import dataclasses
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from transact.commands.parser import OneLineParser, add_model_options, run_command
from transact.devices import resolve_device
from transact.entry import check_vocabulary, counted
from transact.models import DTYPES, EMBEDDED_MODEL, load_model, load_tokenizer, read_config
from transact.texts import DEFAULT_CALIBRATION, SELF, TEXTS, load_text

from . import gpu
from .efficiency.engines import ENGINES, QUICK_ENGINES, compare_engines
from .efficiency.memory import kv_bytes_per_token, peak_memory_mib, weight_bytes
from .efficiency.quantise import FORMATS, check_format, packed_weight_bytes, quantised
from .efficiency.scale import SIZES, SIZES_OF_A_CPU, WAYS, run_scale
from .efficiency.shapes import SHAPES
from .efficiency.speed import GRIDS, MODES, PREFIX, REPEATS, decode_rate, speedup_metrics
from .quality.peers import PEERS, peer_rows
from .quality.perplexity import WINDOWINGS, evaluation_windows, measure_perplexity
from .quality.texts import EVALUATION_TEXTS, load_evaluation_texts, windows_of
from .records import PEERS_SCHEMA, append_line, finite, sole_writer
from .suite import regression


def print_json(value: dict) -> None:
    """One line of strict JSON: what is no number is null."""
    print(json.dumps(finite(value), allow_nan=False))


def print_report(table: str, files: Sequence[Path]) -> None:
    print(table)
    for file in files:
        print(f"wrote {file}")


def perplexity_command(options: argparse.Namespace) -> None:
    texts = load_evaluation_texts(options.text)
    model, tokenizer = load_model(options.model, dtype=options.dtype, device=options.device)
    settings = {"length": options.seq_len, "count": options.windows, "windowing": options.windowing, "bos": options.bos}
    windows_by_text = [windows_of(text, tokenizer, **settings) for text in texts]
    for text, windows in zip(texts, windows_by_text, strict=True):
        result = dataclasses.asdict(measure_perplexity(model, windows, progress=True))
        del result["losses"]
        print_json({
            "model": options.model, "text": text.name, "sha256": text.sha256, "windows": len(windows.ids),
            "seq_len": options.seq_len, "windowing": options.windowing, "bos": options.bos,
            "dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device),
            **result,
        })  # fmt: skip


def memory_command(options: argparse.Namespace) -> None:
    model, _ = load_model(options.model, dtype=options.dtype, device=options.device)
    print_json({
        "model": options.model, "parameters": model.num_parameters(), "weight_bytes": weight_bytes(model),
        "kv_bytes_per_token": kv_bytes_per_token(model), "peak_memory_mib": round(peak_memory_mib(model.device), 1),
        "dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device),
    })  # fmt: skip


def quantise_command(options: argparse.Namespace) -> None:
    formats = options.formats.split(",")
    for name in formats:
        check_format(name)
    if options.decode < 1:
        raise ValueError(f"decode must be at least 1 token, got {options.decode}")
    text = load_text(options.text, split="evaluation")
    paths, windows = [*filter(None, (options.dense, options.model))], {}
    for path in paths:  # what is wrong with the second is known before the first is measured
        windows[path] = evaluation_windows(text, load_tokenizer(path), length=options.seq_len, count=options.windows)
        config, longest = read_config(path), max(windows[path].ids.shape[1] - 1, PREFIX + options.decode)
        check_vocabulary(config, windows[path].ids)
        if longest > config.max_position_embeddings:
            raise ValueError(
                f"{longest} tokens are longer than the model's context of {config.max_position_embeddings}"
            )
    print("| model | weights | perplexity | MiB in memory | MiB packed | decoded tokens per second |")
    print("|---|---|---|---|---|---|")
    for path in paths:
        model, _ = load_model(path, dtype=options.dtype, device=options.device)
        for name in ("", *formats):
            copied = quantised(model, name) if name else model
            perplexity = measure_perplexity(copied, windows[path], progress=True).perplexity
            rate, error, _ = decode_rate(copied, options.decode)
            held, packed = weight_bytes(copied) / 2**20, packed_weight_bytes(copied) / 2**20
            weights = name or str(model.dtype).removeprefix("torch.")
            shown = f"{perplexity:,.2f}" if perplexity < math.inf else "> 1e308"
            print(f"| {Path(path).name} | {weights} | {shown} | {held:.1f} | {packed:.1f} | "
                  f"{rate:.1f} ± {error:.1f} |", flush=True)  # fmt: skip


def zero_shot_command(options: argparse.Namespace) -> None:
    from .quality.zero_shot import evaluate_tasks, resolve_tasks  # lm-eval takes seconds to import

    tasks = resolve_tasks(options.tasks.split(","), options.tasks_path)
    model, tokenizer = load_model(options.model, dtype=options.dtype, device=options.device)
    results = {}
    for name, result in evaluate_tasks(model, tokenizer, tasks, limit=options.limit, progress=True):
        results[name] = result
        for metric, value in result.metrics.items():
            error = result.standard_errors[metric]
            spread = f" +- {error:.4f}" if error is not None else ""
            print(f"{name:24} {metric:24} {value:.4f}{spread}  ({counted(result.items, 'item')}, "
                  f"{counted(result.shots, 'shot')}, version {result.version})", flush=True)  # fmt: skip
    plain = {name: dataclasses.asdict(result) for name, result in results.items()}
    for result in plain.values():
        del result["scores"]
    print_json({
        "model": options.model, "dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device),
        "tasks": plain,
    })  # fmt: skip


def probes_command(options: argparse.Namespace) -> None:
    from .quality.probes import PROBES, write_probes

    try:
        options.out.mkdir(parents=True, exist_ok=True)
        write_probes(options.out, seed=options.seed)
    except OSError as error:
        raise ValueError(f"probes cannot be written to {str(options.out)!r}: {error.strerror}") from error
    print(f"wrote {len(PROBES)} tasks to {options.out}; lm_eval --include_path {options.out} --tasks probes")


def regression_command(options: argparse.Namespace) -> int:
    if options.bless:
        regression.check_clean_tree(options.baseline)
        regression.write_baseline(options.baseline, regression.measure_cells(device=options.device))
        print(f"wrote {options.baseline}: review and commit it")
        return 0
    baseline = regression.read_baseline(options.baseline)
    verdicts = regression.compare(baseline, regression.measure_cells(device=options.device, baseline=baseline))
    print(regression.table(verdicts))
    return int(any(verdict.complaint for verdict in verdicts))


def speed_command(options: argparse.Namespace) -> None:
    from .efficiency.report import read_speed, write_speed_report  # matplotlib takes a second to import
    from .efficiency.speed import fitting, run_grid

    if options.memory_gib is not None:
        for row in fitting(options.models, options.memory_gib, context=options.context):
            print_json(row)
        return
    path = options.results / "speed.jsonl"
    if resolve_device(options.device).type != "cuda":
        print("no GPU is used: the CPU's own figures follow, CUDA graphs are plain compilation", file=sys.stderr)
    with results_written(options.results):
        for record in run_grid(
            options.models, lengths=GRIDS[options.grid], batches=options.batches, modes=options.modes,
            dtype=options.dtype, device=options.device, repeats=options.repeats,
        ):  # fmt: skip
            append_line(path, record)
            if record["status"] != "success":
                case = record["case"]
                print(f"{case['model']}, {case['prefix']}+{case['decode']} tokens, batch {case['batch']}, "
                      f"{case['mode']}: {record['status']}: {record['error']}", file=sys.stderr)  # fmt: skip
    frame, complaints = read_speed(path)
    print_complaints(complaints)
    print_report(*write_speed_report(frame, options.results))


def scale_command(options: argparse.Namespace) -> None:
    from .efficiency.report import read_scale, write_scale_report

    path = options.results / "scale.jsonl"
    with results_written(options.results):
        for record in run_scale(
            options.shapes or None, ways=options.ways, samples=options.samples, seq_len=options.seq_len,
            dtype=options.dtype, device=options.device, path=path,
            seconds=None if options.minutes is None else 60 * options.minutes,
        ):  # fmt: skip
            append_line(path, record)
            case, status = record["case"], record["status"]
            said = f"{record['seconds']['total']:.1f} s, {record['how']}" if status == "success" else record["error"]
            print(f"{case['shape']}, {case['way']}, {case['samples']} x {case['seq_len']}: {status}: {said}",
                  file=sys.stderr)  # fmt: skip
    frame, complaints = read_scale(path)
    print_complaints(complaints)
    if len(frame):
        print_report(*write_scale_report(frame, options.results))


def gpu_command(options: argparse.Namespace) -> int:
    if options.requirements:
        print("\n".join(gpu.requirements()))
        return 0
    if options.list:
        print("\n".join(gpu.listing(options.minutes)))
        return 0
    device = resolve_device(options.device)
    out = options.out.resolve()
    if options.inside:
        return gpu.run_inside(options.inside, out, 60 * options.minutes, device)
    if device.type != "cuda" and options.device == "auto":
        raise ValueError("bench gpu needs a CUDA device, there is none; --device cpu tries its parts out, small")
    with results_written(out), sole_writer(out / "gpu.jsonl"):
        for record in gpu.run_parts(
            [part for part in gpu.PARTS if part in options.only], out, minutes=options.minutes, device=options.device
        ):
            append_line(out / "gpu.jsonl", record)
            error = f": {record['error']}" if record.get("error") else ""
            print(f"{record['part']}: {record['status']} in {record['seconds']:.0f} s{error}", flush=True)
        from .gpu_report import write_gpu_report

        gpu.report_quality(out)
        files = write_gpu_report(out)
    print(f"wrote {files[-1]} and {len(files) - 1} tables and pictures")
    return 0


def print_complaints(complaints: Sequence[str]) -> None:
    """Say what could not be read of a file of records."""
    for complaint in complaints:
        print(complaint, file=sys.stderr)


@contextmanager
def results_written(directory: Path) -> Iterator[None]:
    """Make the directory; what cannot be made or written there is the user's to know, in one line."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"results {str(directory)!r} cannot be made: {error.strerror}") from error
    try:
        yield
    except OSError as error:
        raise ValueError(f"results {str(directory)!r} cannot be written: {error.strerror}") from error


def engines_command(options: argparse.Namespace) -> None:
    from .efficiency.report import read_engines, write_engines_report

    path = options.results / "engines.jsonl"
    with results_written(options.results):
        for record in compare_engines(engines=options.engines, ratio=options.ratio):
            append_line(path, record)
    frame, complaints = read_engines(path)
    print_complaints(complaints)
    print_report(*write_engines_report(frame, options.results))


def peers_command(options: argparse.Namespace) -> None:
    import pandas as pd

    from .environment import environment
    from .output.tables import markdown_table, write_table

    def timed(model: nn.Module, dense: nn.Module) -> dict[str, float]:
        return speedup_metrics(decode_rate(model, options.decode, reference=dense)[2])

    rows, where = [], environment(resolve_device("cpu"))
    with results_written(options.results):
        for case, row in peer_rows(
            options.model, peers=options.peers, ratio=options.ratio, samples=options.samples, length=options.seq_len,
            calibration=options.calibration, evaluation=options.text, timed=timed,
        ):  # fmt: skip
            line = {"case": case, "row": row, "environment": where, "schema": PEERS_SCHEMA}
            append_line(options.results / "peers.jsonl", line)
            shown = {name: value for name, value in row.items() if name not in ("perplexity", "losses")}
            rows += [shown | {"text": text, "perplexity": value} for text, value in row["perplexity"].items()]
        frame = pd.DataFrame(rows)
        note = (
            f"{where['device']}, float32; {options.ratio:.0%} of the decoder layers' linear parameters asked of each, "
            f"on the same {counted(case['samples'], 'calibration window')} of {case['seq_len']} tokens, without "
            f"training; perplexity of {counted(case['windows'], 'window')}."
        )
        files = write_table(options.results / "peers", "Other packages' pruning beside ours", note, frame, list(frame))
    print_report(markdown_table(frame, list(frame)), files)


def served_command(options: argparse.Namespace) -> None:
    import pandas as pd

    from .efficiency.served import served_rows
    from .efficiency.vllm_server import ENVIRONMENT
    from .environment import environment
    from .output.tables import markdown_table, write_table

    with results_written(options.results):
        rows = served_rows(
            options.models, options.vllm_python or ENVIRONMENT, options.results, requests=options.requests,
            rounds=options.rounds, dtype=options.dtype, start_seconds=60 * options.start_minutes, port=options.port,
            options=["--enforce-eager"] if options.eager else [],
        )  # fmt: skip
        note = (
            f"{environment(resolve_device(options.device))['device']}; so many requests at once, the models in turn, "
            f"median of {counted(options.rounds, 'round')}{', without torch.compile' if options.eager else ''}; "
            "`tokens_per_s` of all requests together, `first_token_ms` of the median one; `same_tokens`: as in "
            "transformers, each greedy continuation counted up to its first difference."
        )
        frame = pd.DataFrame(rows)
        files = write_table(options.results / "served", "Checkpoints in vLLM's server", note, frame, list(frame))
    print_report(markdown_table(frame, list(frame)), files)


def interpreter(text: str) -> Path:
    """The full path of an interpreter, or of a command of that name; links stay, since environments hang on them."""
    return Path(os.path.abspath(shutil.which(text) or text))


def numbers(text: str) -> list[int]:
    """Whole positive numbers separated by commas."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"numbers of at least 1, separated by commas, got {text!r}")
    return values


def number(text: str) -> int:
    """One whole positive number."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text!r}")
    return value


def minutes(text: str) -> float:
    """A positive number of minutes."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"minutes must be positive, got {text!r}")
    return value


def some_of(what: str, allowed: Collection[str]) -> Callable[[str], list[str]]:
    """A reader of names separated by commas, each of which must be one of those allowed."""

    def read(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in allowed]:
            raise argparse.ArgumentTypeError(f"unknown {what} {unknown[0]!r}, allowed: {', '.join(allowed)}")
        return chosen

    return read


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    perplexity = commands.add_parser("perplexity", help="perplexity and bits per byte on a text")
    perplexity.set_defaults(run=perplexity_command)
    texts = f"{', '.join(EVALUATION_TEXTS)} or text files, with commas, a line for each"
    perplexity.add_argument("--text", default="embedded", help=f"{texts} (embedded)")
    perplexity.add_argument("--seq-len", type=int, default=256, help="tokens of a window (256)")
    perplexity.add_argument("--windows", type=int, help="the first N windows (all of the text)")
    windowing = "blocks: windows by themselves; rolling: every token once, as lm-eval (blocks)"
    perplexity.add_argument("--windowing", default="blocks", choices=WINDOWINGS, help=windowing)
    perplexity.add_argument("--bos", action="store_true", help="begin each block with a BOS token")
    memory = commands.add_parser("memory", help="parameters, weight bytes, KV bytes per token, peak memory")
    memory.set_defaults(run=memory_command)
    quantise = commands.add_parser("quantise", help="a table of a model in its dtype and quantised by torchao")
    quantise.set_defaults(run=quantise_command)
    quantise.add_argument("--formats", default=",".join(FORMATS), help="with commas (int8,int4)")
    quantise.add_argument("--dense", help="a model to compare with, quantised as well")
    quantise.add_argument("--text", default="embedded", help=f"{', '.join(TEXTS)} or a text file (embedded)")
    quantise.add_argument("--seq-len", type=int, default=256, help="tokens of a window (256)")
    quantise.add_argument("--windows", type=int, default=20, help="the first N windows (20)")
    quantise.add_argument("--decode", type=int, default=16, help="tokens decoded to time it (16)")
    zero_shot = commands.add_parser("zero-shot", help="zero-shot and few-shot tasks by lm-eval")
    zero_shot.set_defaults(run=zero_shot_command)
    zero_shot.add_argument("--tasks", default="probes", help="tasks separated by commas: probes, paper, names; "
                           "name@25 for 25 shots (probes)")  # fmt: skip
    zero_shot.add_argument("--tasks-path", type=Path, help="a folder of lm-eval task files (*.yaml)")
    zero_shot.add_argument("--limit", type=int, help="the first N items of each task (all)")
    for command in (perplexity, memory, quantise, zero_shot):
        command.add_argument("model", help="smollm2-135m (embedded), a checkpoint directory or a Hugging Face id")
        add_model_options(command)
    probes = commands.add_parser("probes", help="write the bundled probes as lm-eval tasks, for other clients")
    probes.set_defaults(run=probes_command)
    probes.add_argument("out", type=Path, help="directory to write")
    probes.add_argument("--seed", type=int, default=0, help="that the items are drawn with (0)")
    speed = commands.add_parser("speed", help="latency, throughput and memory of shapes or checkpoints")
    speed.set_defaults(run=speed_command)
    speed.add_argument("models", nargs="+", help=f"shapes ({', '.join(SHAPES)}) or checkpoint directories")
    speed.add_argument("--grid", default="quick", choices=GRIDS, help="lengths: the paper's, or a few (quick)")
    speed.add_argument("--batches", type=numbers, default=[1], help="with commas (1)")
    speed.add_argument(
        "--modes", type=some_of("mode", MODES), default=["eager"], help=f"of {', '.join(MODES)}, with commas (eager)"
    )
    speed.add_argument(
        "--repeats", type=int, default=REPEATS, help=f"runs of a cell, of which the median counts ({REPEATS})"
    )
    speed.add_argument("--memory-gib", type=float, help="measure nothing: say what fits in so much memory, in 16 bits")
    speed.add_argument("--context", type=int, default=4096, help="tokens, for the largest batch that fits (4096)")
    add_model_options(speed)
    scale = commands.add_parser("scale", help="seconds and peak memory of pruning by size, on random weights")
    scale.set_defaults(run=scale_command)
    scale.add_argument("shapes", nargs="*", help=f"shapes ({', '.join(SIZES)}; on a CPU {', '.join(SIZES_OF_A_CPU)})")
    scale.add_argument(
        "--ways", type=some_of("way", WAYS), default=[*WAYS], help=f"of {', '.join(WAYS)}, with commas (all)"
    )
    scale.add_argument("--samples", type=number, help="calibration windows (128; on a CPU 8)")
    scale.add_argument("--seq-len", type=number, help="tokens of a window (2048; on a CPU 512)")
    scale.add_argument("--minutes", type=minutes, help="in all: fewer windows, then fewer layers, where time is short")
    add_model_options(scale)
    on_gpu = commands.add_parser("gpu", help="what only a GPU can say, part by part, within so many minutes")
    on_gpu.set_defaults(run=gpu_command)
    on_gpu.add_argument(
        "--minutes", type=minutes, default=gpu.MINUTES, help="in all; what there is no time for is skipped (25)"
    )
    on_gpu.add_argument("--out", type=Path, default=Path("results/gpu"), help="directory to write (results/gpu)")
    on_gpu.add_argument("--only", type=some_of("part", gpu.PARTS), default=[*gpu.PARTS],
                        help=f"of {', '.join(gpu.PARTS)}, with commas (all)")  # fmt: skip
    on_gpu.add_argument("--list", action="store_true", help="run nothing: what the parts are and how long they take")
    on_gpu.add_argument("--requirements", action="store_true", help="run nothing: what to install, for pip")
    on_gpu.add_argument("--inside", help=argparse.SUPPRESS)
    on_gpu.add_argument("--device", default="auto", help="auto, cuda, cuda:1 ... (auto)")
    engines = commands.add_parser("engines", help="pruned models in other engines beside transformers")
    engines.set_defaults(run=engines_command)
    engines.add_argument("--ratio", type=float, default=0.3, help="fraction removed of the pruned ones (0.3)")
    engines.add_argument("--engines", type=some_of("engine", ENGINES), default=[*QUICK_ENGINES],
                         help=f"of {', '.join(ENGINES)}, with commas ({','.join(QUICK_ENGINES)})")  # fmt: skip
    peers = commands.add_parser("peers", help="other packages' pruning beside ours, on the same windows and texts")
    peers.set_defaults(run=peers_command)
    peers.add_argument("model", nargs="?", default=EMBEDDED_MODEL, help=f"a dense model ({EMBEDDED_MODEL})")
    peers.add_argument("--ratio", type=float, default=0.3, help="fraction to remove (0.3)")
    peers.add_argument(
        "--peers", type=some_of("peer", PEERS), default=[*PEERS], help=f"of {', '.join(PEERS)}, with commas (all)"
    )
    beside = "embedded,sources,probes"  # those of the front in the suite's first profile
    peers.add_argument("--text", default=beside, help=f"{texts} ({beside})")
    sources = f"{SELF}, {', '.join(TEXTS)} or files, in turn, with commas ({DEFAULT_CALIBRATION})"
    peers.add_argument("--calibration", default=DEFAULT_CALIBRATION, metavar="TEXTS", help=sources)
    peers.add_argument("--samples", type=number, default=24, help="calibration windows (24, as profile quick)")
    peers.add_argument("--seq-len", type=number, default=256, help="tokens of a window (256)")
    peers.add_argument("--decode", type=number, default=16, help="tokens, in turn with the dense model (16)")
    served = commands.add_parser("served", help="checkpoints in vLLM's server: tokens, throughput, first token")
    served.set_defaults(run=served_command)
    served.add_argument("models", nargs="+", help="smollm2-135m (embedded) or checkpoint directories, asked in turn")
    served.add_argument(
        "--vllm-python", type=interpreter, metavar="PATH", help="of an environment with vLLM (nox -s vllm's)"
    )
    served.add_argument("--requests", type=numbers, default=[1, 4, 16], help="at a time, with commas (1,4,16)")
    served.add_argument("--rounds", type=number, default=3, help="of which the median counts (3)")
    served.add_argument("--start-minutes", type=minutes, default=10, help="a server may take to answer (10)")
    served.add_argument("--port", type=number, help="of the first server, the next has the next (free ones)")
    served.add_argument("--eager", action="store_true", help="without torch.compile: servers start sooner")
    served.add_argument("--dtype", default="float32", choices=DTYPES, help=f"{', '.join(DTYPES)} (float32)")
    served.add_argument("--device", default="auto", help="that is named in the table: vLLM takes its own (auto)")
    for command in (speed, scale, engines, served, peers):
        command.add_argument("--results", type=Path, default=Path("results"), help="directory to write (results)")
    check = commands.add_parser("regression", help="compare with the baseline; exit code 1 where something moved")
    check.set_defaults(run=regression_command)
    check.add_argument("--bless", action="store_true", help="write a new baseline instead (on a clean tree)")
    check.add_argument(
        "--baseline", type=Path, default=regression.BASELINE, help="baseline file (reports/baseline.json)"
    )
    check.add_argument("--device", default="auto", help="auto, cpu, cuda ... (auto)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, 1 for a regression, or 2 for a mistake of the user's."""
    return run_command(build_parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
