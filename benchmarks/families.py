"""Which families of the installed transformers are right here: a tiny random model of each is decoded, drafted,
distilled and exported, in a process of its own.

    python -m benchmarks.families [--only NAME ...] [--output docs/targets.md]
    python -m benchmarks.families --chains 200 --only NAME ...

A model is right if 64 greedy tokens in float32, behind a prompt longer than every window, chunk and index of its
configuration, are those of transformers' own `generate`, and if chains and trees that are partly wrong change nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.family_chains import HEADER, chains
from benchmarks.tiny_families import families, tiny_config, tiny_model
from deepspec.decoding.drafter import Drafter, DraftRequest, Session
from deepspec.decoding.engine import generate
from deepspec.decoding.shapes import BestFirst
from deepspec.decoding.tree import Proposal
from deepspec.errors import DeepSpecError
from deepspec.export.parity import check
from deepspec.export.suitable import Refused
from deepspec.features.local import OnlineFeatures
from deepspec.features.sequences import Sequence
from deepspec.target.model import Target, load_target
from deepspec.training.batches import Batches
from deepspec.training.objective import BlockObjective
from deepspec.training.params import TrainParams
from deepspec.training.trainer import Trainer
from tests.exporting import make_draft, samples, written
from tests.tiny import make_network, make_tokenizer

PROMPT, ANSWER = 110, 64
SECONDS = 60  # a family
STEPS = 10
YES = "yes"


@dataclass(frozen=True)
class Row:
    """What became of a family. Each field but the first is "yes", or says why not."""

    family: str
    made: str = YES
    loaded: str = "–"
    decodes: str = "–"
    chain: str = "–"
    tree: str = "–"
    dspark: str = "–"
    eagle3: str = "–"
    export: str = "–"
    body: str = "–"

    @property
    def verdict(self) -> str:
        if self.made != YES:
            return "not made"
        if self.loaded != YES:
            return "refused"
        if self.decodes != YES or self.chain != YES or self.tree.startswith("WRONG"):
            return "WRONG"
        return "right and trainable" if self.dspark == self.eagle3 == YES else "right"


class Hints(Drafter):
    """Proposes what is known to come, with every third token wrong; as a tree, with a wrong sibling beside each."""

    block_size = 5

    def __init__(self, answer: list[int], branching: bool):
        self.answer, self.branching = answer, branching

    def session(self, slots: int) -> Session:
        return _HintSession(self)


class _HintSession(Session):
    def __init__(self, hints: Hints):
        self.hints, self.committed = hints, 0

    def begin(self, row: int) -> None:
        self.committed = -(PROMPT - 1)

    def extend(self, row: int, tokens: list[int], features: Tensor | None) -> None:
        self.committed += len(tokens)

    def move(self, source: int, destination: int) -> None:
        pass

    def propose(self, asks: list[DraftRequest]) -> list[Proposal]:
        first = self.committed + 1
        coming = self.hints.answer[first : first + min(5, asks[0].room)]
        wrong = [(token + 7) % 500 + 2 for token in coming]
        if not self.hints.branching:
            drafted = [
                w if (first + i) % 3 == 0 else t for i, (t, w) in enumerate(zip(coming, wrong, strict=True))
            ]
            return [Proposal.chain(drafted)]
        tokens, parents, parent = [], [], -1
        for token, other in zip(coming, wrong, strict=True):
            tokens += [other, token]
            parents += [parent, parent]
            parent = len(tokens) - 1
        return [Proposal(tokens, parents)]


def examine(family: str, directory: Path, answer: int = ANSWER, trained: bool = True) -> Row:
    """Return the row of one family, its files written below `directory`; unless `trained`, of its decoding alone."""
    found: dict[str, str] = {}
    try:
        model = tiny_model(family)
        tokenizer = make_tokenizer()
        model.save_pretrained(directory / "target")
        if (
            model.config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        ):  # the text part of another model's
            tiny_config(family).save_pretrained(directory / "target")
        tokenizer.save_pretrained(directory / "target")
        ids = torch.randint(100, 500, (1, PROMPT), generator=torch.Generator().manual_seed(5))
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=answer, do_sample=False
        )[0, PROMPT:].tolist()
    except Exception as error:
        return _unmade(family, directory / "target", _words(error))
    try:
        target = load_target(directory / "target")
    except DeepSpecError as error:
        return Row(family, loaded=str(error).split("refused: ")[-1])
    found |= {"loaded": YES, "body": target.verdict.body}
    target.generation_config.eos_token_id, target.tokenizer.eos_token = None, None
    prompt = ids[0].tolist()

    def decode(drafter: Drafter | None, shape: Any = None) -> str:
        written = generate(target, drafter, prompt, answer, tree=shape)[0].tokens
        return _same(written, expected)

    found["decodes"] = _tried(lambda: decode(None))
    found["chain"] = _tried(lambda: decode(Hints(expected, False)))
    found["tree"] = _tried(lambda: decode(Hints(expected, True), BestFirst(2, 5, 16)))
    if not trained:
        return Row(family, **found)
    for kind in ("dspark", "eagle3"):
        found[kind] = _tried(lambda kind=kind: train(target, kind, directory))
    found["export"] = _tried(lambda: export(target, directory))
    return Row(family, **found)


def _unmade(family: str, directory: Path, reason: str) -> Row:
    """The row of a family that transformers itself does not generate with: refused, if there is what to refuse."""
    if not (directory / "config.json").exists():
        return Row(family, reason)
    try:
        load_target(directory)
    except DeepSpecError as error:
        return Row(family, loaded=str(error).split("refused: ")[-1])
    return Row(family, f"transformers does not generate with it: {reason}")


def train(target: Target, kind: str, directory: Path) -> str:
    """Run ten steps on ten sequences; say whether the loss fell and every weight that learns is finite."""
    model = make_network(target, kind, block_size=3, draft_vocab_size=128, target_layer_ids=[0, 1, 2])
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 500, (40,), generator=generator).tolist() for _ in range(10)]
    store = OnlineFeatures(target, [Sequence(row, [0] * 4 + [1] * 36, [1] * 40) for row in rows], (0, 1, 2))
    params = TrainParams(
        steps=STEPS,
        lr=3e-3,
        batch_size=4,
        anchors=6,
        eval_every=STEPS,
        save_every=STEPS,
        mixed_precision="no",
    )
    batches = Batches(store, list(range(2, 10)), 4, 6, 3, seed=0)
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    trainer = Trainer(
        BlockObjective(model, params.loss), batches, [0, 1], params, accelerator, directory / kind
    )
    trainer.run()
    finite = all(torch.isfinite(weight).all() for weight in trainer.best_weights().values())
    return YES if finite and trainer.step == STEPS else "weights are not finite"


def export(target: Target, directory: Path) -> str:
    """Export an untrained EAGLE-3 for vLLM and read it back."""
    try:
        draft = make_draft(directory / "drafts", target, "eagle3", target_layer_ids=[0, 1, 2])
        layout, path = written(draft, "vllm", directory / "exports")
        failed = [c.message for c in check(draft, layout, path, samples(draft)).checks if not c.passed]
    except Refused as error:
        return f"refused: {error}"
    return "; ".join(failed) or YES


def _same(answer: list[int], expected: list[int]) -> str:
    differ = next((i for i, (a, b) in enumerate(zip(answer, expected, strict=False)) if a != b), None)
    if differ is None and len(answer) == len(expected):
        return YES
    return f"WRONG from token {len(answer) if differ is None else differ} on"


def _tried(attempt: Callable[[], str]) -> str:
    try:
        return attempt()
    except DeepSpecError as error:
        return str(error)
    except Exception as error:
        return f"ERROR {_words(error)}"


def _words(error: BaseException) -> str:
    first = str(error).strip().splitlines()[:1]
    return f"{type(error).__name__}: {''.join(first)}"[:160]


def _child(family: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="family-") as directory:
        pipe.send(examine(family, Path(directory)))


def measure(names: list[str], seconds: float = SECONDS) -> list[Row]:
    """Return a row a family; one that crashes or hangs takes no other with it."""
    context = multiprocessing.get_context("fork")
    rows = []
    for name in names:
        ours, theirs = context.Pipe()
        process = context.Process(target=_child, args=(name, theirs), daemon=True)
        began = time.perf_counter()
        process.start()
        theirs.close()
        try:
            row = ours.recv() if ours.poll(seconds) else Row(name, f"took more than {seconds:.0f} s")
        except EOFError:
            row = Row(name, "its process died or hung")
        process.kill()
        process.join()
        rows.append(row)
        print(f"{name:28} {row.verdict:20} {time.perf_counter() - began:5.1f} s  {_note(row)}", flush=True)
    return rows


def _note(row: Row) -> str:
    said = {name: value for name, value in asdict(row).items() if name not in ("family", "body")}
    return "; ".join(f"{name}: {value}" for name, value in said.items() if value not in (YES, "–"))


def page(rows: list[Row]) -> str:
    """The table of docs/targets.md."""
    counts = {
        verdict: sum(row.verdict == verdict for row in rows)
        for verdict in dict.fromkeys(r.verdict for r in rows)
    }
    lines = [
        "# Targets",
        "",
        "Which families can be targets, found with a tiny random model of each by `make families` "
        f"(transformers {transformers.__version__}, torch {torch.__version__}, float32):",
        f"{ANSWER} greedy tokens behind a prompt of {PROMPT}, longer than every window, chunk and index of the model, "
        "against transformers' own",
        "`generate`; chains and trees with wrong tokens in them; ten steps of DSpark and of EAGLE-3; EAGLE-3 exported "
        "for vLLM and read back.",
        "",
        "Whatever the family, a target is tested when it enters (`deepspec/target/selftest.py`): one that differs from",
        "transformers' own forward is refused in one line. A window, chunk or index beyond the longest prompt of that "
        "test is tested",
        "by a copy of the same weights with a short one. `deepspec doctor --target X` says what was found.",
        "",
        "*Our attention* drafts chains and trees. With *transformers' own cache* (recurrent, indexed or compressed",
        "states, attention that transformers does not let us replace) chains are verified by running accepted tokens",
        "again; a state that takes *a token at a time* gains nothing from drafting.",
        "",
        ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f", of {len(rows)} families.",
        "",
        "| family | verdict | runs through | chain | tree | DSpark | EAGLE-3 | export | why not |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        marks = [_mark(x) for x in (row.chain, row.tree, row.dspark, row.eagle3, row.export)]
        lines.append(f"| {row.family} | {row.verdict} | {row.body} | {' | '.join(marks)} | {_reason(row)} |")
    return "\n".join(lines) + "\n"


def later_sections(path: Path) -> str:
    """What stands behind the table on the page as it is, from its first section on."""
    _, section, rest = path.read_text().partition("\n## ") if path.exists() else ("", "", "")
    return section + rest


def _mark(value: str) -> str:
    return value if value in (YES, "–") else "no"


def _reason(row: Row) -> str:
    said = [
        value for value in (row.made, row.loaded, row.decodes, row.chain, row.dspark, row.eagle3, row.export)
    ]
    first = next((value for value in said if value not in (YES, "–")), "")
    return (
        first.split(": ", 1)[-1].replace("|", "/")[:200]
        if first.startswith("/")
        else first.replace("|", "/")[:200]
    )


def compare_chains(names: list[str], count: int) -> None:
    """Print what partly wrong chains do to the answers of these families; end with 1 if they change one."""
    print(HEADER)
    found = []
    for name in names:
        found.append(chains(name, count))
        print(found[-1].line(), flush=True)
    if any(one.equal < one.prompts for one in found):
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="families (default: all)")
    parser.add_argument(
        "--chains", type=int, help="instead: chains against plain decoding over so many prompts"
    )
    parser.add_argument("--output", type=Path, help="write the page there")
    parser.add_argument("--json", type=Path, help="write the rows there")
    flags = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if flags.chains:
        compare_chains(flags.only or families(), flags.chains)
        return
    rows = measure(flags.only or families())
    if flags.output:
        flags.output.write_text(page(rows) + later_sections(flags.output))
    if flags.json:
        flags.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if any(row.verdict == "WRONG" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
