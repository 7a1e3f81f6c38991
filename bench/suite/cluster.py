"""Cells on a Ray cluster: workers measure them, and only the driver, which receives the records, writes them.

Ray is the extra `cluster` and is imported on first use.
"""

import functools
import logging
import socket
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..efficiency.memory import release
from ..records import Case, Record
from .cases import failed
from .workbench import Workbench

RETRIES = 3  # of a cell whose worker died
# what a worker must share with the driver, or its figures are not those of the case
SHARED = ("model_hash", "evaluation_sha256", "evaluation_ids", "evaluation_windows", "dtype", "device", "code")


def measured(bench: Workbench, case: Case) -> Record:
    """The record of a case; of one that fails, a record that says why, and nothing is left of its tensors."""
    try:
        return bench.measure(case)
    except Exception as error:
        record = failed(case, error, bench.environment())
        logging.getLogger(__name__).error(traceback.format_exc())  # as text: the error has hold of its tensors
    release(bench.dense.device)
    return record


@functools.lru_cache(maxsize=1)
def workbench_of(settings: tuple[tuple[str, object], ...]) -> Workbench:
    """The workbench with these arguments, made once in a process."""
    return Workbench(**dict(settings))


def measure_cell(settings: tuple[tuple[str, object], ...], case: Case) -> Record:
    """What a worker does. A worker whose model, text, device or code is not the driver's measures nothing."""
    bench = workbench_of(settings)
    ours = replace(bench.dense_case, other_sha256=bench.with_other_texts(case).other_sha256)
    for name in (*SHARED, "other_sha256"):
        own, wanted = getattr(ours, name), getattr(case, name)
        if own != wanted:
            return failed(case, ValueError(f"the worker's {name} is {own}, the driver's {wanted}"), bench.environment())
    return measured(bench, case)


def check_address(address: str) -> None:
    """Raise ValueError where nobody listens at a "host:port" address: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local"):
        return
    if not host or not port.isdecimal():
        raise ValueError(f"ray address must be auto, local, host:port or ray://host:port, got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"no Ray cluster at {address}: {error}") from error


def connect(address: str):
    """The module `ray`, connected to a cluster ("auto": the one of this machine, "local": one made for this run).

    Raises ValueError, in one line, where Ray is not installed or the cluster cannot be reached.
    """
    check_address(address)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        try:
            import ray
        except ImportError as error:
            raise ValueError("--ray needs Ray: python -m pip install -c constraints.txt ray") from error
        packages = [str(Path(__file__).parents[2] / name) for name in ("transact", "bench")]
        local = {"include_dashboard": False} if address == "local" else {}
        environment = {} if address == "local" else {"runtime_env": {"py_modules": packages}}
        try:
            ray.init(address, log_to_driver=False, logging_level="ERROR", **local, **environment)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ValueError(f"no Ray cluster at {address}: {' '.join(str(error).split())[:200]}") from error
    return ray


def records_from(
    ray, measure: Callable[[Case], Record], cases: Sequence[Case], *, gpus_per_cell: float = 0
) -> Iterator[Record]:
    """The record of every case, each as soon as it is measured. A cell whose worker dies is measured again.

    A worker is a process that keeps its CPU, its share of a GPU and what it has made, and takes the next cell when it
    is done with one. Yields a failed record for a cell whose worker died too often.
    """

    class Worker:  # here and not outside: Ray sends it along
        def start(self) -> None:
            pass

        def cell(self, case: Case) -> Record:
            return measure(case)

    remote = ray.remote(num_cpus=1, num_gpus=gpus_per_cell)(Worker)
    workers = [remote.remote() for _ in cases]  # as many start as the cluster has room for
    running = {worker.start.remote(): (worker, None) for worker in workers}
    left, deaths = list(cases), Counter()
    del workers
    while running:
        [finished], _ = ray.wait(list(running), num_returns=1)
        (worker, case), record = running.pop(finished), None
        if case is not None:
            try:
                record = ray.get(finished)
            except ray.exceptions.RayError as error:
                worker, deaths[case] = remote.remote(), deaths[case] + 1
                if deaths[case] > RETRIES:
                    record = failed(case, error, {})
                else:
                    left.insert(0, case)
        if left:
            following = left.pop(0)
            running[worker.cell.remote(following)] = worker, following
        else:  # those that have not started are not needed
            running = {cell: (one, its) for cell, (one, its) in running.items() if its is not None}
        worker = None  # a worker that is done lives, and keeps its CPU, as long as anything refers to it
        if record is not None:
            yield record
