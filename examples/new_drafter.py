"""Write a drafter in 30 lines and decode losslessly with it.

It proposes what followed each token the last time that it occurred. To train, evaluate and export a drafter of your
own, register it: docs/drafters.md, "Add one".

python -m examples.new_drafter --target data/target
"""

from __future__ import annotations

from torch import Tensor

from deepspec import generate, load_target
from deepspec.decoding.drafter import Drafter, DraftRequest, Proposal, Session
from examples.options import parse, run


class Successors(Drafter):
    """Proposes chains of the successors that each token had last."""

    block_size = 4

    def session(self, slots: int) -> SuccessorSession:
        return SuccessorSession(slots)


class SuccessorSession(Session):
    """Keeps, for each request, token → the token that came after it last."""

    def __init__(self, slots: int):
        self.after: list[dict[int, int]] = [{} for _ in range(slots)]
        self.last: list[int | None] = [None] * slots

    def begin(self, row: int) -> None:
        self.after[row], self.last[row] = {}, None

    def extend(self, row: int, tokens: list[int], features: Tensor | None) -> None:
        for token in tokens:
            if self.last[row] is not None:
                self.after[row][self.last[row]] = token
            self.last[row] = token

    def propose(self, asks: list[DraftRequest]) -> list[Proposal]:
        return [Proposal.chain(self._path(ask)) for ask in asks]

    def _path(self, ask: DraftRequest) -> list[int]:
        path = [ask.anchor]
        while len(path) <= min(ask.room, Successors.block_size) and path[-1] in self.after[ask.row]:
            path.append(self.after[ask.row][path[-1]])
        return path[1:]

    def move(self, source: int, destination: int) -> None:
        self.after[destination], self.last[destination] = self.after[source], self.last[source]


def main(arguments: list[str] | None = None) -> tuple[list[int], list[int]]:
    """Print how many drafted tokens the target accepted, and return the plain and the drafted tokens."""
    options = parse(arguments)
    target = load_target(options.target, dtype="float32")
    prompt = target.chat_ids([{"role": "user", "content": options.prompt}])
    (plain,) = generate(target, None, prompt, max_new_tokens=options.tokens)
    (drafted,) = generate(target, Successors(), prompt, max_new_tokens=options.tokens)
    print(target.tokenizer.decode(drafted.tokens))
    print(f"τ {drafted.stats.tau:.2f}; the same tokens as plain decoding: {plain.tokens == drafted.tokens}")
    return plain.tokens, drafted.tokens


if __name__ == "__main__":
    run(main)
