"""A checkpoint that can take the place of any chat model in an example."""

from pathlib import Path

import pytest

from ..tiny_runs import tiny_checkpoint, tiny_config, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model whose tokenizer, one token a character, has a chat template."""
    directory = tmp_path_factory.mktemp("chat-model")
    config = tiny_config()
    config.max_position_embeddings = 2048  # the instructions of a prompt alone have some hundred characters
    tiny_checkpoint(directory, config)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant: "
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture
def root() -> Path:
    """The repository's."""
    return ROOT
