"""`python -m reports RECORDS... [--out DIR]`: tables, pictures and one page from record files."""

import argparse
import sys
from pathlib import Path

from bench.records import read_records

from .report import write_report, written

MOST_COMPLAINTS = 10


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="reports", description=__doc__)
    parser.add_argument("records", type=Path, nargs="+", help="files of records, one JSON object a line")
    parser.add_argument("--out", type=Path, help="directory to write (that of the first file)")
    options = parser.parse_args(arguments)
    try:
        return report(options.records, options.out or options.records[0].parent)
    except OSError as error:
        print(f"reports: error: {error.filename or options.out}: {error.strerror}", file=sys.stderr)
        return 1


def report(paths: list[Path], directory: Path) -> int:
    """Read, write, print; 2 where there is nothing to report. Raises OSError where a file cannot be read or written."""
    records, complaints = [], []
    for path in paths:
        if not path.is_file():
            print(f"reports: error: no record file {str(path)!r}", file=sys.stderr)
            return 2
        read, complained = read_records(path)
        records += read
        complaints += complained
    print_complaints(complaints)
    printed, files = write_report(records, directory)
    if not files:
        print(f"reports: error: {printed} in {', '.join(map(str, paths))}", file=sys.stderr)
        return 2
    print(printed)
    print(written(files))
    return 0


def print_complaints(complaints: list[str]) -> None:
    """The first complaints, one line each, and how many more there are."""
    for complaint in complaints[:MOST_COMPLAINTS]:
        print(complaint, file=sys.stderr)
    if len(complaints) > MOST_COMPLAINTS:
        print(f"and {len(complaints) - MOST_COMPLAINTS} more", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
