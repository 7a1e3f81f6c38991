"""`python -m reports RECORDS [--out DIR]`: tables and pictures from a record file."""

import argparse
import sys
from pathlib import Path

from bench.records import read_records

from .report import write_report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="reports", description=__doc__)
    parser.add_argument("records", type=Path, help="a file of records, one JSON object a line")
    parser.add_argument("--out", type=Path, help="directory to write (that of the records)")
    options = parser.parse_args(arguments)
    if not options.records.is_file():
        print(f"reports: error: no record file {str(options.records)!r}", file=sys.stderr)
        return 2
    records, complaints = read_records(options.records)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    table, files = write_report(records, options.out or options.records.parent)
    print(table)
    for file in files:
        print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
