"""One of the comparisons here, from its spec to its dated page.

    python benchmarks/stragglers/compared.py benchmarks/stragglers/simulated.yaml DIRECTORY \
        -o benchmarks/stragglers/DATE-simulated.md

The same command goes on where it was ended; further options, such as --retry-failed, go to `jaxdist compare`. Beside
the page, as .log, goes one line of JSON for each run.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from time_to_target import write_page

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("spec", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args, options = parser.parse_known_args()
    paths = [str(HERE.parents[1]), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "jaxdist", "compare", str(args.spec), "--dir", str(args.directory), *options]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run(command, env=environment, check=True)
    about = "".join(
        line.removeprefix("#") for line in args.spec.read_text().splitlines(keepends=True) if line.startswith("#")
    )
    write_page(args.directory, args.output, about, f"compared.py {args.spec.name} DIRECTORY")


if __name__ == "__main__":
    main()
