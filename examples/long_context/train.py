"""Train on questions about long documents: `python examples/long_context/train.py [--tokens 8000] [--key value]`.

Options that are not listed below are those of `colora train`, and override the configuration file.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml
from colora.rl.cli import main as colora
from documents import problems
from transformers import AutoTokenizer

HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the documents, then run `colora train` on them; returns its exit code, 2 for an error of the user's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml", help="what is trained, and how")
    parser.add_argument("--model", help="another model than the configuration's")
    parser.add_argument("--tokens", type=int, help="of a prompt; by default the configuration's max_prompt_length")
    parser.add_argument("--facts", type=int, default=8, help="planted in each document")
    parser.add_argument("--needed", type=int, default=3, help="of those, what a question needs")
    parser.add_argument("--size", type=int, default=400, help="problems to train on")
    parser.add_argument("--held-out", type=int, default=16, help="problems to evaluate on")
    options, rest = parser.parse_known_args(arguments)
    try:
        settings = yaml.safe_load(options.config.read_text())
        model, tokens = options.model or settings["model"], options.tokens or settings["max_prompt_length"]
        splits = problems(
            AutoTokenizer.from_pretrained(model),
            tokens,
            options.size,
            options.held_out,
            facts=options.facts,
            needed=options.needed,
            chat_template_kwargs=settings.get("chat_template_kwargs"),
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # The same options make the same problems, so a resumed run finds them again.
    with tempfile.TemporaryDirectory() as directory:
        splits.save_to_disk(directory)
        ours = [
            f"--model={model}",
            f"--max_prompt_length={tokens}",
            f"--dataset={directory}",
            "--eval_dataset_split=test",
        ]
        return colora(["train", str(options.config), *ours, *rest])


if __name__ == "__main__":
    sys.exit(main())
