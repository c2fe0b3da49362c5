"""Training on an FP4 base: it learns with both engines, resumes exactly, and not on another base."""

from pathlib import Path
from typing import Any

import pytest
from colora import GRPOConfig, GRPOTrainer
from datasets import Dataset
from peft import LoraConfig

from ..run_files import assert_same_run
from ..tiny_runs import tiny_checkpoint, tiny_config
from ..vllm_engines import VLLM_MARKS

ENGINES = ["transformers", pytest.param("vllm", marks=VLLM_MARKS)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config()
    config.hidden_size, config.intermediate_size = 64, 64
    return tiny_checkpoint(tmp_path_factory.mktemp("dense"), config)


def threes(completion_ids: list[list[int]], **_: object) -> list[float]:
    return [sum(token % 3 == 0 for token in ids) / len(ids) for ids in completion_ids]


def make(model: Path, output: Path, **options: Any) -> GRPOTrainer:
    defaults = {
        "per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 10, "max_steps": 10,
        "learning_rate": 1e-2, "report_to": [], "save_steps": 1, "device": "cpu", "disable_tqdm": True, "base": "fp4",
    }  # fmt: skip
    rows = Dataset.from_dict({"prompt": ["12+34=", "5+6=", "70+8=", "a b"]})
    lora = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return GRPOTrainer(str(model), threes, GRPOConfig(str(output), **(defaults | options)), rows, peft_config=lora)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_learns(engine: str, dense: Path, tmp_path: Path) -> None:
    trainer = make(dense, tmp_path, engine=engine, save_strategy="no")
    try:
        assert trainer.policy.weights.base == "fp4"
        trainer.train()
    finally:
        trainer.engine.close()
    history = trainer.state.log_history
    found = [entry["reward"] for entry in history if "reward" in entry]
    assert sum(found[-3:]) / 3 > sum(found[:3]) / 3 + 0.2
    assert max(entry["parity/mean_abs"] for entry in history if "parity/mean_abs" in entry) < 1e-5


def test_resumed_equals_never_stopped_and_not_on_another_base(dense: Path, tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "max_steps": 2}
    make(dense, tmp_path / "whole", **options).train()
    make(dense, tmp_path / "again", **options).train()
    last = tmp_path / "again" / "checkpoint-2"
    for file in sorted(last.rglob("*"), reverse=True):
        file.unlink()
    last.rmdir()
    make(dense, tmp_path / "again", **options).train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-1"))
    assert_same_run(tmp_path / "again", tmp_path / "whole")
    message = r"checkpoint-1: it was trained on a base that is fp4, and this run's is nf4: set base to fp4"
    with pytest.raises(ValueError, match=message):
        make(dense, tmp_path / "whole", **options | {"base": "nf4"}).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1")
        )
