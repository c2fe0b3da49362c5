"""RewardModel with a tiny Qwen3 sequence classifier and a word-level tokenizer, both made on the spot."""

import pytest
import torch
from colora.rewards.model import RewardModel
from colora.rewards.runner import RewardRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

WORDS = ["<pad>", "<eos>", "<unk>", "user", "assistant", "a", "b", "c", "d", "e"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def make_tokenizer(pad=True, template=TEMPLATE):
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = template
    if pad:
        tokenizer.pad_token = "<pad>"
    return tokenizer


def make_config(num_labels=1):
    return Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_labels=num_labels,
        pad_token_id=None,
        initializer_range=0.5,
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Qwen3ForSequenceClassification(make_config()).eval()


def alone(model, ids):
    """The score of one unpadded sequence, read at its last token."""
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        return model.score(hidden).item()


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_padded_batches_score_as_single_texts(model, pad, batch_size):
    reward = RewardModel(model, make_tokenizer(pad), batch_size=batch_size)
    scores = reward(prompts=["a b ", "a ", "e ", "b "], completions=["c d e", "b", "d", "c c"], answer=["x"] * 4)
    expected = [alone(model, ids) for ids in ([5, 6, 7, 8, 9], [5, 6], [9, 8], [6, 7, 7])]
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert len(set(scores)) == 4


def test_conversations_go_through_the_chat_template(model):
    prompt, completion = [{"role": "user", "content": "a b"}], [{"role": "assistant", "content": "c"}]
    (score,) = RewardModel(model, make_tokenizer())([prompt], [completion])
    assert score == pytest.approx(alone(model, [3, 5, 6, 4, 7]), abs=1e-5)
    with pytest.raises(ValueError, match="no chat template"):
        RewardModel(model, make_tokenizer(template=None))([prompt], [completion])


def test_checkpoint_with_its_name_in_the_runner(model, tmp_path):
    path = tmp_path / "org" / "tiny-judge"
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    runner = RewardRunner([RewardModel(f"{path}/", device="cpu")])
    assert runner.names == ["tiny-judge"]
    scores = runner.score(["a "], ["b"], [[6]], {})
    assert scores.values.item() == pytest.approx(alone(model, [5, 6]), abs=1e-5)
    assert RewardModel(Qwen3ForSequenceClassification.from_pretrained(path)).__name__ == "tiny-judge"


def test_models_that_are_no_reward_models(model, tmp_path):
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="has 2 labels"):
        RewardModel(Qwen3ForSequenceClassification(make_config(num_labels=2)), tokenizer)
    Qwen3ForCausalLM(make_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not a trained reward model: it lacks \['score.weight'\]"):
        RewardModel(str(tmp_path), tokenizer)
    with pytest.raises(ValueError, match="pass its tokenizer"):
        RewardModel(model)
    with pytest.raises(ValueError, match="batch_size"):
        RewardModel(model, tokenizer, batch_size=0)
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a pad nor an eos token"):
        RewardModel(model, tokenizer)
