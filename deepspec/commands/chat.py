"""`deepspec chat`: a conversation in which one sees the draft at work.

Tokens that the draft proposed and the target accepted are coloured; the rest the target wrote itself. In a
terminal the answer grows above a line with the running τ and tokens/s; into a pipe it is written plainly."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from deepspec.config import load_params
from deepspec.drafters.checkpoint import DRAFTS, draft_directory
from deepspec.drafters.deployment import Deployment
from deepspec.errors import DeepSpecError
from deepspec.target.model import Target, load_target
from deepspec.training.adapt import load_adapting

ACCEPTED = "green"
TARGET = "data/target"


@dataclass(frozen=True)
class Settings:
    """The command's options; see `deepspec chat --help`."""

    target: str
    drafter: str | None
    no_draft: bool
    adapt: bool
    temperature: float
    max_new_tokens: int
    system: str | None
    seed: int
    params: Path


class Detokenizer:
    """Token ids to text as they come; bytes of an unfinished character wait for the rest of it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the tokens last shown: a token's text can depend on the one before
        self._pending: list[int] = []

    def feed(self, token: int) -> str:
        self._pending.append(token)
        text = self._decode(self._context + self._pending)
        if text.endswith("\ufffd"):
            return ""
        new = text[len(self._decode(self._context)) :]
        self._context, self._pending = self._pending, []
        return new

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""


@dataclass
class Answer:
    """An answer in the making: its tokens and its speed. `append` is the engine's callback."""

    tokenizer: Any
    write: Callable[[str, str | None], object]
    tokens: list[int] = field(default_factory=list)
    rounds: int = 0
    started: float = 0.0  # end of the first round: what came before was the prefill
    ended: float = 0.0
    first: int = 0  # tokens of that round

    def __post_init__(self) -> None:
        self._detokenizer = Detokenizer(self.tokenizer)

    def append(self, tokens: list[int], accepted: int) -> None:
        now = time.perf_counter()
        if not self.rounds:
            self.started, self.first = now, len(tokens)
        self.ended = now
        self.rounds += 1
        for i, token in enumerate(tokens):
            self.tokens.append(token)
            if piece := _harmless(self._detokenizer.feed(token)):
                self.write(piece, ACCEPTED if i < accepted else None)

    def status(self) -> str:
        """Return `τ 2.41 · 58.3 tokens/s · 128 tokens`."""
        if not self.rounds:
            return "reading the prompt …"
        seconds = self.ended - self.started
        speed = f" · {(len(self.tokens) - self.first) / seconds:.1f} tokens/s" if seconds > 0 else ""
        return f"τ {len(self.tokens) / self.rounds:.2f}{speed} · {len(self.tokens)} tokens"


def _harmless(text: str) -> str:
    """Remove control characters: what a model writes must not steer the terminal."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def run(settings: Settings) -> None:
    """Answer the lines of standard input until it ends.

    Raises:
        DeepSpecError: no such target or draft, or a draft of another target.
    """
    if settings.target == TARGET and not Path(TARGET).is_dir():
        raise DeepSpecError(f"{TARGET}: no target yet: run `dvc repro`, or name one with --target")
    target = load_target(settings.target)
    console = Console(highlight=False)
    deployment = Deployment(target) if settings.no_draft else deploy(settings, target)
    opening = [{"role": "system", "content": settings.system}] if settings.system else []
    messages = list(opening)
    for line in _lines(console):
        if line == "/reset":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": line})
        answer = _answer(deployment, messages, settings, console)
        console.print(answer.status(), style="dim")
        text = str(target.tokenizer.decode(answer.tokens, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": text})


def find_draft(settings: Settings) -> Path:
    """Return the draft's directory: the one asked for, or that of the last trained drafter of the pipeline."""
    if settings.drafter:
        return draft_directory(settings.drafter)
    for name in reversed(load_params(settings.params).pipeline):
        if (DRAFTS / name).is_dir():
            return DRAFTS / name
    raise DeepSpecError(f"{DRAFTS} has no draft yet: run `dvc repro`, or chat with --no-draft")


def deploy(settings: Settings, target: Target) -> Deployment:
    """Return the draft as the evaluation uses it: by `evaluate.decode`, or its defaults without a params file."""
    decode = load_params(settings.params).evaluate.decode if settings.params.exists() else None
    notice = Console(stderr=True, highlight=False)

    def watch(done: int, total: int) -> None:
        if done == 1:
            notice.print("measuring what a pass costs here, once for this target …", style="dim")

    draft = find_draft(settings)
    used = load_adapting(draft, target) if settings.adapt else draft
    return Deployment.of(target, used, decode, watch=watch)


def _lines(console: Console) -> Iterator[str]:
    """Yield the user's turns, blank lines left out; a prompt is shown to a person only."""
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = console.input("[bold]> [/bold]") if interactive else sys.stdin.readline()
        except EOFError:
            return
        if (line == "" and not interactive) or line.strip() == "/quit":
            return
        if line.strip():
            yield line.strip()


def _answer(deployment: Deployment, messages: list[dict], settings: Settings, console: Console) -> Answer:
    """Generate and show one answer; Ctrl-C ends it where it is."""
    show = _live if console.is_terminal else _plain
    prompt_ids = deployment.target.chat_ids(messages)

    def produce(answer: Answer) -> None:
        deployment.generate(
            prompt_ids,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=settings.seed + len(messages),
            on_tokens=answer.append,
        )

    return show(deployment.target.tokenizer, produce, console)


def _plain(tokenizer: Any, produce: Callable[[Answer], None], console: Console) -> Answer:
    answer = Answer(tokenizer, lambda piece, _: print(piece, end="", flush=True))
    produce(answer)
    print()
    return answer


def _live(tokenizer: Any, produce: Callable[[Answer], None], console: Console) -> Answer:
    """Show the end of the answer that fits on the screen while it grows, the status below; then all of it."""
    text = Text()
    answer = Answer(tokenizer, lambda piece, style: text.append(piece, style))

    def view() -> Group:
        lines = text.copy().wrap(console, console.width)[-max(console.height - 2, 1) :]
        return Group(*lines, Text(answer.status(), style="dim"))

    try:
        with Live(console=console, get_renderable=view, refresh_per_second=12, transient=True):
            produce(answer)
    except KeyboardInterrupt:
        text.append(" [stopped]", "dim")
    console.print(text)
    return answer
