"""Train on a task of reasoning-gym: `python examples/reasoning_gym/train.py --task chain_sum [--key value]`.

Options that are not listed below are those of `colora train`, and override config.yaml.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from colora.rl.cli import main as colora
from dataset import problems

HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the problems, then run `colora train` on them; returns its exit code, 2 for an error of the user's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--task", required=True, help="name of a task, such as chain_sum or countdown")
    parser.add_argument("--task-options", type=json.loads, default={}, help="JSON, such as '{\"min_terms\": 3}'")
    parser.add_argument("--size", type=int, default=2000, help="problems to train on")
    parser.add_argument("--held-out", type=int, default=100, help="problems to evaluate on")
    options, rest = parser.parse_known_args(arguments)
    if not isinstance(options.task_options, dict):
        parser.error("--task-options: give a JSON object, such as '{\"min_terms\": 3}'")
    try:
        splits = problems(options.task, options.size, options.held_out, **options.task_options)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # The same options make the same problems, so a resumed run finds them again.
    with tempfile.TemporaryDirectory() as directory:
        splits.save_to_disk(directory)
        ours = [
            f"--dataset={directory}",
            "--eval_dataset_split=test",
            f"--output_dir=runs/reasoning_gym/{options.task}",
        ]
        return colora(["train", str(HERE / "config.yaml"), *ours, *rest])


if __name__ == "__main__":
    sys.exit(main())
