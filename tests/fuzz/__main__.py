"""Fuzz every decoder: `python -m tests.fuzz`; exit code 1 if an input broke one."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from tests.fuzz.engine import FoundError, Target, judge
from tests.fuzz.targets import TARGETS


def fuzz(kind: type[Target], inputs: int, seed: int) -> subprocess.CompletedProcess[str]:
    """Feed a target in a process of its own; its output has the figures or the finding."""
    where = f"{kind.__module__}:{kind.__qualname__}"
    command = [sys.executable, "-m", "tests.fuzz.run_target", where, str(inputs), str(seed)]
    same = {**os.environ, "PYTHONHASHSEED": "0"}  # otherwise a seed does not repeat a run
    return subprocess.run(command, env=same, capture_output=True, text=True, check=False)


def feed(kind: type[Target], data: bytes) -> bool:
    """Feed a target one input; return whether it broke a rule."""
    target = kind()
    try:
        print(judge(target, data, (), target.state()))
    except FoundError as found:
        found.report()
        return True
    finally:
        target.close()
    return False


def main() -> int:
    """Run the targets named on the command line, or all."""
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
        if args.hex is not None:
            failed |= feed(kind, bytes.fromhex(args.hex))
            continue
        done = fuzz(kind, args.inputs, args.seed)
        print(done.stdout, end="", flush=True)
        if done.returncode or not done.stdout:
            failed = True
            print(done.stderr, end="", file=sys.stderr, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
