"""Train on writing small functions: `python examples/code/train.py [--most 5] [--key value]`.

Options that are not listed below are those of `colora train`, and override the configuration file.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from colora.rl.cli import main as colora
from tasks import problems

HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the tasks, then run `colora train` on them; returns its exit code, 2 for an error of the user's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml", help="what is trained, and how")
    parser.add_argument("--least", type=int, default=2, help="operations of a task at least")
    parser.add_argument("--most", type=int, default=4, help="operations of a task at most, up to 5")
    parser.add_argument("--size", type=int, default=2000, help="tasks to train on")
    parser.add_argument("--held-out", type=int, default=100, help="tasks to evaluate on")
    options, rest = parser.parse_known_args(arguments)
    try:
        splits = problems(options.size, options.held_out, least=options.least, most=options.most)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # The same options make the same tasks, so a resumed run finds them again.
    with tempfile.TemporaryDirectory() as directory:
        splits.save_to_disk(directory)
        ours = [f"--dataset={directory}", "--eval_dataset_split=test"]
        return colora(["train", str(options.config), *ours, *rest])


if __name__ == "__main__":
    sys.exit(main())
