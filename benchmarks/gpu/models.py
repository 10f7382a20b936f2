"""Random targets made on the device, and untrained drafts of every algorithm for a target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from deepspec.decoding.drafter import Drafter
from deepspec.drafters.checkpoint import stored_weights, write_drafter
from deepspec.drafters.load import load_drafter
from deepspec.drafters.registry import algorithms
from deepspec.files import replacing
from deepspec.target.model import Target

TEMPLATE = "{% for message in messages %}<|start|>{{ message['content'] }}<|end|>{% endfor %}<|start|>"
DRAFTS = {
    "dspark": {"type": "dspark", "layers": 1},
    "dspark, gated": {"type": "dspark", "layers": 1, "markov_head": "gated"},
    "dspark, rnn": {"type": "dspark", "layers": 1, "markov_head": "rnn"},
    "dflash": {"type": "dflash", "layers": 1},
    "dflash, causal": {"type": "dflash", "layers": 1, "causal": True, "sliding_window": 8},
    "dflash2": {"type": "dflash2", "layers": 1},
    "eagle3": {"type": "eagle3"},
    "eagle3, 3.1": {"type": "eagle3", "version": "3.1"},
    "peagle": {"type": "peagle", "layers": 1},
    "medusa": {"type": "medusa"},
    "lm": {"type": "lm"},
    "lookup": {"type": "lookup"},
    "suffix": {"type": "suffix"},
}


@dataclass(frozen=True)
class Sizes:
    """Of a Llama-shaped target."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    positions: int = 4096


TINY = Sizes(hidden=64, layers=3, heads=4, kv_heads=2, intermediate=128, vocab=300)
SMALL = Sizes(hidden=512, layers=8, heads=8, kv_heads=4, intermediate=1376, vocab=8192)
LARGE = Sizes(
    hidden=2048, layers=28, heads=16, kv_heads=8, intermediate=6144, vocab=49152
)  # 1.5 billion weights


def make_target(path: Path, sizes: Sizes, dtype: str, device: torch.device) -> Path:
    """Write a target with random weights, drawn on the device, unless it is there."""
    if path.exists():
        return path
    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=sizes.positions,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    disable_progress_bar()
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:  # large enough that what it writes depends on what it read
                weight.normal_(0.0, 1.0 if "embed" in name else weight.shape[1] ** -0.5)
    with replacing(path) as scratch:
        model.save_pretrained(scratch)
        _tokenizer().save_pretrained(scratch)
    return path


def make_drafter(path: Path, name: str, target: Target, **sizes) -> Drafter:
    """An untrained draft of `DRAFTS`, written unless it is there, then loaded as a user's is."""
    if not path.exists():
        section = DRAFTS[name] | sizes
        if name == "lm":  # all layers but the last: its laws are near the target's
            section |= {"from_layers": list(range(target.num_layers - 1))}
        algorithm = algorithms()[section["type"]]
        params = algorithm.params(**section)
        torch.manual_seed(1)
        if algorithm.network is None:
            write_drafter(path, algorithm.make(params).config, {}, target, {"data_digest": None})
        else:
            network = algorithm.network(params, target)
            network.share(target, torch.arange(network.config.draft_vocab_size))
            record = {"data_digest": None}
            write_drafter(path, network.description(), stored_weights(network), target, record)
    return load_drafter(path, target)


def random_prompts(target: Target, count: int, longest: int) -> list[list[int]]:
    """Prompts of unlike lengths; the second half of each repeats the first, so that a lookup finds something."""
    rng = torch.Generator().manual_seed(2)
    lengths = [4 + (longest - 4) * i // max(count - 1, 1) for i in range(count)]
    halves = [torch.randint(2, target.vocab_size, (n // 2,), generator=rng).tolist() for n in lengths]
    return [half + half for half in halves]


def _tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, one token each: a text is never read, but a target has a tokenizer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<|start|>", "<|end|>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE
    )
