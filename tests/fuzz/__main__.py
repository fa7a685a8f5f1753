"""Fuzz every decoder: `python -m tests.fuzz`; exit code 1 with the first input that breaks one."""

from __future__ import annotations

import argparse
import sys
import traceback

from tests.fuzz.engine import FoundError, judge, run
from tests.fuzz.targets import TARGETS


def main() -> int:
    """Run the targets that are asked for."""
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", choices=[target.name for target in TARGETS], action="append")
    parser.add_argument("--hex", help="feed this one input to the one target")
    args = parser.parse_args()
    failed = False
    for kind in TARGETS:
        if args.target and kind.name not in args.target:
            continue
        target = kind()
        try:
            if args.hex is None:
                print(run(target, args.inputs, args.seed), flush=True)
            else:
                print(judge(target, bytes.fromhex(args.hex), (), target.state()))
        except FoundError as found:
            failed = True
            print(f"{found}\n  seed {args.seed}", flush=True)
            if found.__cause__ is not None:
                traceback.print_exception(found.__cause__)
        finally:
            target.close()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
