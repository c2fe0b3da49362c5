"""What a run is made of, from what the user named: tokenizer, stop tokens, engine, policy."""

import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from colora import GRPOConfig, load
from colora.rl import setup
from colora.rl.option_values import OF_BITSANDBYTES, optimizer_state_bytes
from colora.rl.policy import Policy
from colora.rollout import vllm_engine
from colora.weightshare.guard import ParityError
from colora.weightshare.linear import LoraSlot
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedConfig, Trainer

from ..tiny_runs import CHARACTERS, EOS, PAD, tiny_checkpoint, tiny_config, tiny_tokenizer
from ..vllm_engines import VLLM_MARKS

FULL_STOP = CHARACTERS.index(".")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


@pytest.mark.parametrize(
    ("generation_eos", "expected"),
    [([FULL_STOP, PAD], (FULL_STOP, EOS, PAD)), (FULL_STOP, (FULL_STOP, EOS)), (EOS, (EOS,)), (None, (EOS,))],
)
def test_stop_tokens_of_tokenizer_and_generation_config(
    checkpoint: Path, generation_eos: list[int] | int | None, expected: tuple[int, ...]
) -> None:
    GenerationConfig(eos_token_id=generation_eos).save_pretrained(checkpoint)
    tokenizer = tiny_tokenizer()
    assert setup.stop_token_ids(checkpoint, tokenizer) == expected
    assert setup.stop_token_ids(str(checkpoint), tokenizer) == expected
    assert setup.stop_token_ids(AutoModelForCausalLM.from_pretrained(checkpoint), tokenizer) == expected


def test_stop_tokens_without_a_generation_config(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").unlink()
    assert setup.stop_token_ids(checkpoint, tiny_tokenizer()) == (EOS,)


def test_stop_tokens_of_the_generation_config_alone(checkpoint: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    assert setup.stop_token_ids(checkpoint, tokenizer) == (EOS,)
    (checkpoint / "generation_config.json").unlink()
    with pytest.raises(ValueError, match=r"completions would never end; set tokenizer\.eos_token"):
        setup.stop_token_ids(checkpoint, tokenizer)


def test_a_checkpoint_in_the_home_directory(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    name = f"~/{checkpoint.name}"
    assert setup.model_config(name).model_type == "qwen3"
    assert len(setup.load_tokenizer(name)) == len(setup.load_tokenizer(checkpoint))
    setup.check_model(name, None)


def test_the_tokenizer_beside_the_checkpoint(saved: Path) -> None:
    tokenizer = setup.load_tokenizer(saved)
    assert tokenizer("12+3=")["input_ids"] == [CHARACTERS.index(character) for character in "12+3="]


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=PAD + 1, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )


# Without files transformers makes up a Qwen tokenizer of one token, and raises for Llama.
@pytest.mark.parametrize("config", [tiny_config(), llama_config()], ids=["qwen3", "llama"])
def test_a_missing_tokenizer_is_said_with_the_remedy(tmp_path: Path, config: PreTrainedConfig) -> None:
    tiny_checkpoint(tmp_path, config)
    for path in tmp_path.glob("*token*"):
        path.unlink()
    with pytest.raises(ValueError, match="no tokenizer found for .*: pass processing_class, or save the tokenizer"):
        setup.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "device", "installed", "expected"),
    [
        ("auto", "cuda", True, "vllm"),
        ("auto", "cuda", False, "transformers"),
        ("auto", "cpu", True, "transformers"),
        ("vllm", "cpu", False, "vllm"),
        ("transformers", "cuda", True, "transformers"),
    ],
)
def test_choice_of_the_engine(
    monkeypatch: pytest.MonkeyPatch, name: str, device: str, installed: bool, expected: str
) -> None:
    monkeypatch.setattr(setup, "find_spec", lambda module: ModuleSpec(module, None) if installed else None)
    assert setup.choose_engine(name, torch.device(device)) == expected


def slots(policy: Policy) -> list[LoraSlot]:
    return [linear.slot for linear in policy.weights.linears.values() if linear.slot is not None]


def test_name_and_config_of_whatever_is_given(saved: Path) -> None:
    in_memory = AutoModelForCausalLM.from_pretrained(saved)
    policy = load(str(saved), setup.DEFAULT_LORA, device="cpu")
    for model in (saved, str(saved), in_memory, policy):
        assert setup.model_name(model) == str(saved)
        assert setup.model_config(model).hidden_size == 32


def test_a_policy_is_trained_as_it_is_and_a_checkpoint_gets_the_default_adapter(saved: Path, tmp_path: Path) -> None:
    args = GRPOConfig(str(tmp_path), device="cpu")
    policy, _ = setup.build(str(saved), args, None, max_context=64)
    assert {slot.a.shape[0] // len(slot.parts) for slot in slots(policy)} == {setup.DEFAULT_LORA.r}
    assert setup.build(policy, args, None, max_context=64)[0] is policy


def test_a_policy_without_an_adapter_is_refused(saved: Path, tmp_path: Path) -> None:
    bare = load(str(saved), device="cpu")
    with pytest.raises(ValueError, match=r"no adapter to train: load it with colora\.load\(model, lora="):
        setup.build(bare, GRPOConfig(str(tmp_path), device="cpu"), None, max_context=64)


@pytest.mark.parametrize("engine", [pytest.param("vllm", marks=VLLM_MARKS)])
def test_an_engine_that_fails_the_self_test_is_closed(saved: Path, tmp_path: Path, engine: str) -> None:
    """The error is kept, as a notebook does, and with it the engine: another one can be opened all the same."""
    args = GRPOConfig(str(tmp_path), engine=engine, device="cpu", parity_limit=1e-12, report_to="none")
    with pytest.raises(ParityError, match="step 0: engine and trainer disagree") as kept:
        setup.build(str(saved), args, None, 64)
    with pytest.raises(ParityError, match="step 0: engine and trainer disagree"):
        setup.build(str(saved), args, None, 64)
    assert kept.value.__traceback__ is not None


def test_a_model_with_an_adapter_of_pefts_is_refused_with_the_remedy(saved: Path, tmp_path: Path) -> None:
    inner = AutoModelForCausalLM.from_pretrained(saved)
    wrapped = get_peft_model(inner, LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"model is a PeftModel: pass .*merge_and_unload.*peft_config"):
        setup.check_model(wrapped, None)
    with pytest.raises(ValueError, match=r"model has an adapter of PEFT's in it: merge.*peft_config"):
        setup.check_model(inner, None)
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a PEFT adapter, not a model: merge it"):
        setup.check_model(tmp_path, None)


def test_options_that_a_policy_in_memory_settled_already_are_refused(saved: Path, tmp_path: Path) -> None:
    policy = load(saved, LoraConfig(r=2, target_modules="all-linear"), device="cpu")
    setup.check_model(policy, None)
    with pytest.raises(ValueError, match=r"peft_config is given, but the Policy has its adapter already"):
        setup.check_model(policy, LoraConfig(r=4))
    args = GRPOConfig(str(tmp_path), device="cpu", engine="transformers", dtype="bfloat16")
    with pytest.raises(ValueError, match=r"dtype='bfloat16', but the Policy is in torch.float32: load it with"):
        setup.build(policy, args, None, 32)


OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", *OF_BITSANDBYTES)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_the_state_of_an_optimizer_is_counted_as_what_it_is_or_a_little_more(tmp_path: Path, optim: str) -> None:
    if optim in OF_BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
    module = torch.nn.Linear(2048, 16, bias=False)  # smaller than what bitsandbytes pages, which takes a GPU
    kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(GRPOConfig(str(tmp_path), device="cpu", optim=optim), module)
    optimizer = kind(module.parameters(), **kwargs)
    module.weight.grad = torch.ones_like(module.weight)
    optimizer.step()
    values = [value for value in optimizer.state[module.weight].values() if isinstance(value, torch.Tensor)]
    kept = sum(value.nbytes for value in values if value.numel() not in (1, 256))  # steps, and a table of codes for all
    counted, spare = optimizer_state_bytes(optim) * module.weight.numel(), module.weight.numel()
    assert kept <= counted < kept + spare + 1 or optim in ("adafactor", "sgd")


def test_the_kv_cache_leaves_room_for_the_optimizer_of_the_run(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        pass

    def engine(*_: object, state_bytes: int, **options: object) -> None:
        raise Asked(state_bytes)

    monkeypatch.setattr(vllm_engine, "VLLMEngine", engine)
    for optim, bytes_ in (("adamw_torch", "8"), ("paged_adamw_8bit", "3"), ("ademamix", "12")):
        with pytest.raises(Asked, match=bytes_):
            setup.build(saved, GRPOConfig(str(tmp_path), device="cpu", engine="vllm", optim=optim), None, 64)
