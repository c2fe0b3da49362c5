"""A transformers sequence-classification model as a reward function."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase


class RewardModel:
    """Scores prompt + completion with a sequence-classification model of one label; a callable by the reward contract.

    Texts are joined as they are; chat messages go through the tokenizer's chat template. No special tokens are added
    (the template brings its own). A tokenizer without a pad token pads with its end-of-sequence token, and the model's
    configuration is told: transformers reads the score at the last token that is not padding.

    Args:
        model: a checkpoint directory or hub id, or a loaded transformers model (it is put in evaluation mode).
        tokenizer: by default the one of the checkpoint.
        device: by default where a loaded model is; for a checkpoint the GPU if there is one.
        batch_size: texts per forward.

    Raises:
        ValueError: a model with more or less than one label or without a trained head, no tokenizer to be found, a
            tokenizer without any token to pad with.
    """

    in_process = True  # on the GPU of the training, and too much to copy to worker processes

    def __init__(
        self,
        model: str | nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | torch.device | None = None,
        batch_size: int = 16,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = _as_module(model)
        self.config = self.model.config
        path = model if isinstance(model, str) else getattr(self.config, "_name_or_path", "")
        # Named as a function is: metrics of a reward model read `rewards/<last part of its path>/mean`.
        self.__name__ = str(path).rstrip("/").rpartition("/")[2] or type(model).__name__
        if self.config.num_labels != 1:
            raise ValueError(
                f"reward model {self.__name__!r} has {self.config.num_labels} labels, a reward needs one: load it with "
                "`num_labels=1`, or write a reward function that turns its logits into a number"
            )
        if tokenizer is None:
            if not path:
                raise ValueError(
                    f"reward model {self.__name__!r} was not loaded from a checkpoint: pass its tokenizer too"
                )
            tokenizer = AutoTokenizer.from_pretrained(path)
        self.tokenizer = tokenizer
        self._agree_on_padding()
        if device is None and isinstance(model, str):
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device is not None:
            self.model.to(device)
        self.model.eval()
        self.batch_size = batch_size

    def _agree_on_padding(self) -> None:
        if self.tokenizer.pad_token is None:
            if self.tokenizer.eos_token is None:
                raise ValueError(
                    f"the tokenizer of reward model {self.__name__!r} has neither a pad nor an eos token: set one"
                )
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """One score (the raw logit) per completion. Longer texts than the model's context are the caller's to avoid."""
        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # little padding within a batch
        scores = [0.0] * len(texts)
        for start in range(0, len(texts), self.batch_size):
            indices = by_length[start : start + self.batch_size]
            for index, score in zip(indices, self._forward([texts[index] for index in indices]), strict=True):
                scores[index] = score
        return scores

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of reward model {self.__name__!r} has no chat template, but the dataset is "
                "conversational: set `tokenizer.chat_template`, or use a dataset whose prompts are plain texts"
            )
        text = self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        assert isinstance(text, str)  # one conversation, not tokenized
        return text

    @torch.no_grad()
    def _forward(self, texts: list[str]) -> list[float]:
        device = next(self.model.parameters()).device
        # Padding on the right whatever the tokenizer's habit is: the models are trained that way.
        inputs = self.tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        ).to(device)
        return self.model(**inputs).logits[:, 0].float().tolist()


def _as_module(model: str | nn.Module) -> Any:
    """The model itself, or the one of a checkpoint. Any: `nn.Module` declares no `config`."""
    if not isinstance(model, str):
        return model
    loaded, report = AutoModelForSequenceClassification.from_pretrained(model, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(
            f"checkpoint {model!r} is not a trained reward model: it lacks {sorted(report['missing_keys'])}, so its "
            "scores would be random"
        )
    return loaded
