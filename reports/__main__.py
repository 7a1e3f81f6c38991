"""`python -m reports RECORDS... [--out DIR]`: tables, pictures and one page from record files.

A directory stands for its `records*.jsonl`: one run's, or those of its shards. Other packages' `peers.jsonl`
beside them is shown too.
"""

import argparse
import sys
from pathlib import Path

from bench.records import read_records

from .peers import read_peers
from .report import write_report, written

MOST_COMPLAINTS = 10


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="reports", description=__doc__)
    parser.add_argument("records", type=Path, nargs="+", help="files of records, or directories of them")
    parser.add_argument("--out", type=Path, help="directory to write (that of the first records)")
    options = parser.parse_args(arguments)
    try:
        first = options.records[0]
        return report(options.records, options.out or (first if first.is_dir() else first.parent))
    except OSError as error:
        print(f"reports: error: {error.filename or options.out}: {error.strerror}", file=sys.stderr)
        return 1


def report(paths: list[Path], directory: Path) -> int:
    """Read, write, print; 2 where there is nothing to report. Raises OSError where a file cannot be read or written."""
    files = [file for path in paths for file in (sorted(path.glob("records*.jsonl")) if path.is_dir() else [path])]
    missing = [path for path in files if not path.is_file()] or (paths if not files else [])
    if missing:
        print(f"reports: error: no record file {str(missing[0])!r}", file=sys.stderr)
        return 2
    records, complaints = [], []
    for file in files:
        read, complained = read_records(file)
        records += read
        complaints += complained
    beside, complained = read_peers(dict.fromkeys(file.parent for file in files))
    print_complaints(complaints + complained)
    printed, made = write_report(records, directory, beside)
    if not made:
        print(f"reports: error: {printed} in {', '.join(map(str, paths))}", file=sys.stderr)
        return 2
    print(printed)
    print(written(made))
    return 0


def print_complaints(complaints: list[str]) -> None:
    """The first complaints, one line each, and how many more there are."""
    for complaint in complaints[:MOST_COMPLAINTS]:
        print(complaint, file=sys.stderr)
    if len(complaints) > MOST_COMPLAINTS:
        print(f"and {len(complaints) - MOST_COMPLAINTS} more", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
