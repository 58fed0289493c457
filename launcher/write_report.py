"""Write the report of a run, or compare two: python launcher/write_report.py RUN [RUN2] [--output FILE]

The report is one HTML page that needs no network. A run writes it by itself at its end and at every
evaluation; this command writes it at any other time, also while the run goes on.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.evaluation.report import PAGE
from engine.evaluation.run_page import write_run_page
from launcher.command import stopping_at_errors


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run; two are compared")
    parser.add_argument("--output", type=Path, help=f"file to write; default: {PAGE} in the first run's folder")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    output = arguments.output or arguments.runs[0] / PAGE
    with stopping_at_errors(rank=0):
        if len(arguments.runs) > 2:
            raise ValueError(f"{len(arguments.runs)} runs were named; a report shows one run or compares two")
        write_run_page(arguments.runs, output)
    print(f"Report: {output}")


if __name__ == "__main__":
    main()
