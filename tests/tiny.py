"""Tiny random targets made on the spot: a few layers of 64 dimensions with a tokenizer and a chat template.

python -m tests.tiny data/smoke-target --family qwen3
"""

from __future__ import annotations

import argparse
import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

from deepspec.drafters.algorithms.dspark import DSparkConfig, DSparkModel
from deepspec.drafters.network import Network
from deepspec.drafters.params import DSparkParams
from deepspec.drafters.registry import algorithms
from deepspec.target.model import Target

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 48}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),  # biases of queries, keys and values
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    # Every other layer sees a short window only, as in the real ones.
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}
START, END = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = """
What is the sum of the numbers from one to ten? The sum is fifty-five: one and ten make eleven, and there
are five such pairs. Tom has 12 apples and gives 5 of them to his sister; how many does he have left? He
has 7 apples left. Write a function that returns the largest of the numbers in a list, and explain how it
works in a few sentences.

    def largest(numbers: list[int]) -> int:
        best = numbers[0]
        for number in numbers[1:]:
            if number > best:
                best = number
        return best

The function starts with the first number, then looks at the rest of the list, and keeps whichever is
larger. The user asks and the assistant answers. A train leaves the station at 9:30 and arrives at 11:15;
how long is the trip? Please write a short story about a cat that wants to learn how to swim, and give
some advice to a new student. There was a cat in the garden who watched the water for hours. Then one
day, while it was raining, she thought that swimming could not be harder than walking. Return the answer
with an explanation, and check that it is correct.
"""


def make_tokenizer(vocab: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text goes in and comes back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(START, special=True), AddedToken(END, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.split("\n"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, chat_template=CHAT_TEMPLATE
    )


def make_model(
    family: str = "llama",
    vocab: int = 512,
    layers: int = 4,
    hidden: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    end_id: int = 1,
) -> PreTrainedModel:
    """A model with random weights, large enough that what it writes depends on what it read."""
    config_class, model_class, extra = FAMILIES[family]
    if "layer_types" in extra:
        extra = {**extra, "layer_types": (extra["layer_types"] * layers)[:layers]}
    config = config_class(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=end_id,
        **extra,
    )
    torch.manual_seed(seed)
    model = model_class(config).to(dtype).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0.0, 1.0 if "embed" in name else weight.shape[1] ** -0.5)
            elif name.endswith("bias"):
                weight.normal_()
    model.generation_config.eos_token_id = end_id
    return model


def make_target(
    path: str | Path,
    family: str = "llama",
    vocab: int = 512,
    layers: int = 4,
    hidden: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a target directory: model, tokenizer, template. The same arguments give the same files."""
    tokenizer = make_tokenizer(vocab)
    model = make_model(family, len(tokenizer), layers, hidden, seed, dtype, tokenizer.eos_token_id)
    disable_progress_bar()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)


SCALINGS: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


def scaled_target(path: Path, scaling: dict[str, Any], **sizes) -> Path:
    """Write a Qwen3 whose rotary embedding is scaled."""
    directory = make_target(path, "qwen3", **sizes)
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0, **scaling}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@cache
def cached_target(family: str = "llama", **sizes) -> Path:
    """Return the directory that `make_target` writes for these arguments, made once a process; not to be written to."""
    directory = Path(tempfile.mkdtemp(prefix="deepspec-tiny-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return make_target(directory / "target", family, **sizes)


def make_draft(target: Target, **sizes) -> DSparkModel:
    """An untrained DSpark network for `target`; with `draft_vocab_size` it knows the last ids of the vocabulary."""
    torch.manual_seed(0)
    small = {"layers": 1, "block_size": 3, "markov_rank": 4, "target_layer_ids": [0, 1]}
    config = DSparkConfig.for_target(DSparkParams(type="dspark", **small | sizes), target)
    model = DSparkModel(config)
    model.share(target, torch.arange(target.vocab_size - config.draft_vocab_size, target.vocab_size))
    return model


def make_network(target: Target, type: str, **sizes) -> Network:
    """An untrained network of any algorithm, all its weights random; it knows the last ids of the vocabulary."""
    algorithm = algorithms()[type]
    torch.manual_seed(0)
    model = algorithm.network(algorithm.params(type=type, **sizes), target)
    known = model.config.draft_vocab_size
    model.share(target, torch.arange(target.vocab_size - known, target.vocab_size))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a tiny random target.")
    parser.add_argument("path")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="llama")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    print(make_target(flags.path, flags.family, seed=flags.seed))


if __name__ == "__main__":
    main()
