"""A target for tests of the data path: a real tokenizer made on the spot, chat templates, and no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepspec.decoding.request import Generation, Request, Stats
from deepspec.target.chat import Templated

SPECIAL = ["<bos>", "<eos>", "<|start|>", "<|end|>"]
CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
LLAMA = (
    "<bos>{% for m in messages %}<|start|>{{ m.role }}<|start|>\n\n{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|start|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>model\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}<bos>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} <|end|>{% endif %}{% endfor %}"
)
DEAF = "{% for m in messages if m.role == 'user' %}{{ m.content }}<|end|>{% endfor %}"
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "gemma": GEMMA, "plain": PLAIN, "inst": INST}


class FakeTarget(Templated):
    """What the data path needs of a target. A token is a byte; "<|end|>" or "<eos>" ends an answer."""

    digest = "0123456789abcdef"
    source = "fake"
    max_length = 4096

    def __init__(
        self,
        template: str = CHATML,
        special: Sequence[str] = SPECIAL,
        stops: Sequence[str] = ("<|end|>", "<eos>"),
        **chat_template_kwargs: object,
    ) -> None:
        self.chat_template_kwargs = chat_template_kwargs
        self.tokenizer = _tokenizer(template, special, stops[0])
        self.vocab_size = len(self.tokenizer)
        self.end, *others = self.tokenizer.convert_tokens_to_ids(list(stops))
        self.eos = others[0] if others else self.end
        self.stop_ids = frozenset({self.end, *others})

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


def _tokenizer(template: str, special: Sequence[str], eos: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=special[0], eos_token=eos, chat_template=template
    )


Answer = Callable[[Request], tuple[list[int], str]]


def scripted_stream(answer: Answer) -> Callable[..., Iterator[Generation]]:
    """Stands in for the engine's `stream`: up to batch_size requests in flight, the newest finishes first."""

    def stream(target, drafter, next_request, batch_size, recorder=None) -> Iterator[Generation]:
        active: list[Request] = []
        while True:
            while len(active) < batch_size and (request := next_request()) is not None:
                active.append(request)
            if not active:
                return
            request = active.pop()
            tokens, reason = answer(request)
            if request.on_tokens:
                request.on_tokens(tokens, 0)
            error = "the logits are not finite" if reason == "error" else None
            yield Generation(request.id, request.prompt_ids, tokens, reason, Stats(), error)

    return stream
