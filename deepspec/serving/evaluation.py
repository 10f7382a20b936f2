"""`evaluate` where vLLM runs the target: each draft is measured in vLLM itself, into the record of every evaluation.

Ways of decoding cannot share a machine and be timed, so they come one after the other, each with a server of its own:
plain, vLLM's n-gram, each draft's export, and plain again, whose seconds are pooled with the first. One request is
under way at a time. All ways see the same contexts: in a conversation the earlier answers are the plain ones. Drafted
greedy answers must be the plain ones, token for token, but where the target's two best tokens are as near as its dtype
rounds (`TIES`).

A way that was measured is kept, and a killed evaluation goes on with the next.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deepspec.device import describe_device
from deepspec.drafters.checkpoint import draft_digest
from deepspec.drafters.load import is_trained
from deepspec.drafters.params import DEFAULT_LOOKUP
from deepspec.errors import DeepSpecError
from deepspec.evaluation.bench import check_prompts
from deepspec.evaluation.measure import Outcome, lines_of, origin_of, provenance_of
from deepspec.evaluation.params import EvaluateParams
from deepspec.evaluation.parts import Decode, DraftProvenance, TaskEntry
from deepspec.evaluation.record import DRAFT, LOOKUP, Identity, Record
from deepspec.evaluation.runs import PLAIN, PromptRuns, Run, prompt_seed
from deepspec.evaluation.summarise import Measured, Subject, build_record
from deepspec.export.draft import load_draft
from deepspec.export.engines import export
from deepspec.files import digest, write_json
from deepspec.lineage import code_digest
from deepspec.messages.prompt import Chat
from deepspec.progress import watched
from deepspec.serving.launch import speculative_config
from deepspec.serving.protocols import SLACK, VLLM, Answer, Counts
from deepspec.serving.record import first_difference
from deepspec.target.ends import Ends
from deepspec.tasks.dialogue import prompt_ids, turns_of
from deepspec.tasks.task import Task, load_task

WORK = Path(".deepspec/evaluate-vllm")
TIES = {
    "float32": 1e-3,
    "float16": 0.03,
    "bfloat16": 0.25,
}  # of log-probabilities: two steps of a logit of 16 to 32
WARM_UP = 16  # tokens
AGAIN = "plain-again"
Speculative = dict[str, Any] | None
Start = Callable[
    [str, Speculative, int], AbstractContextManager[str]
]  # (name, draft, longest) → a server's address
Key = tuple[str, float]  # task, temperature


@dataclass(frozen=True)
class Turn:
    """A turn of a prompt: what is continued, at which temperature, from which seed."""

    task: str
    temperature: float
    prompt: int
    ids: list[int]
    seed: int


@dataclass(frozen=True)
class Engine:
    """A vLLM that can be started for each way of decoding."""

    version: str
    start: Start


def evaluate_served(
    drafts: Mapping[str, Path], target: Ends, params: EvaluateParams, seed: int, engine: Engine
) -> dict[str, Outcome]:
    """Measure drafts: name → directory, name → outcome.

    Raises:
        DeepSpecError: a draft that vLLM does not serve, a server that does not start or answer.
    """
    if 0 not in params.temperatures:
        raise DeepSpecError(
            "evaluate.temperatures needs 0 where vLLM runs the target: greedy answers are compared"
        )
    tasks = [load_task(task, params.prompts_per_task, seed, params.tasks_dir) for task in params.tasks]
    check_prompts(target, tasks)
    digests = {name: draft_digest(directory) for name, directory in drafts.items()}
    device = describe_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    settings = (digests, target.digest, engine.version, params.model_dump(), seed, [t.asked for t in tasks])
    code = code_digest(__name__, "deepspec.export.engines")
    work = WORK / digest(json.dumps([*settings, device, code]))
    ways = {name: _exported(name, directory, target, work) for name, directory in drafts.items()}
    contest = _Contest(target, tasks, params, seed, engine, work)
    turns, plain = contest.plain()
    longest = max(config["num_speculative_tokens"] for config in ways.values())
    lookup = params.decode.lookup or DEFAULT_LOOKUP
    ngram = {
        "method": "ngram",
        "prompt_lookup_min": lookup.min_match,
        "prompt_lookup_max": max(8, lookup.min_match),
    }
    answers = {LOOKUP: contest.decode(LOOKUP, ngram | {"num_speculative_tokens": longest}, turns)}
    answers |= {_way(name): contest.decode(_way(name), config, turns) for name, config in ways.items()}
    again, gaps = contest.plain_again(turns, plain, answers)
    outcomes = {}
    for name, directory in drafts.items():
        both = {LOOKUP: answers[LOOKUP], DRAFT: answers[_way(name)]}
        rows = _rows(turns, {PLAIN: plain, **both}, again)
        measured = Measured(
            rows,
            {way: _identities(turns, plain, found, gaps, target) for way, found in both.items()},
            {},
            decode=Decode(lookup=None, tree={"type": "chain"}, verify=None, controller={"type": "fixed"}),
            provenance=DraftProvenance(**provenance_of(directory)),
        )
        subject = Subject(
            drafter=name,
            draft_digest=digests[name],
            target=origin_of(Path(target.source)),
            target_digest=target.digest,
            device=device,
            dtype=target.precision,
            seed=seed,
            processes=1,
            max_new_tokens=params.max_new_tokens,
            engine=f"vllm {engine.version}",
        )
        outcomes[name] = Outcome(_known(build_record(subject, tasks, measured)), lines_of(rows), [])
    return outcomes


def _exported(name: str, directory: Path, target: Ends, work: Path) -> dict[str, Any]:
    """Return vLLM's `--speculative-config` of a draft: of its export, which is written here, or of a lookup."""
    draft = load_draft(name, directory, target)
    if is_trained(directory):
        entry = export(draft, ["vllm"], work / name)["engines"]["vllm"]
        if "refused" in entry:
            raise DeepSpecError(f"{name} cannot be measured in vLLM: {entry['refused']}")
        if wrong := [check["message"] for check in entry["parity"]["checks"] if not check["passed"]]:
            raise DeepSpecError(f"{name}: its export is not the draft that was trained: {'; '.join(wrong)}")
        directory = Path(entry["path"])
    return speculative_config(directory, draft.block_size)


class _Contest:
    """Answers of every way of decoding, each kept in a file when it is whole."""

    def __init__(
        self,
        target: Ends,
        tasks: Sequence[Task],
        params: EvaluateParams,
        seed: int,
        engine: Engine,
        work: Path,
    ):
        self.target, self.tasks, self.params, self.seed = target, tasks, params, seed
        self.engine, self.work, self.stop_ids = engine, work, sorted(target.stop_ids)
        chats = [chat for task in tasks for chat in task.prompts]
        asked = max(
            len(prompt_ids(target, chat, ["answer"] * turn)) for chat in chats for turn in range(_turns(chat))
        )
        answered = max(map(_turns, chats)) * params.max_new_tokens
        self.longest = min(asked + answered + SLACK, target.max_length)

    def plain(self) -> tuple[list[Turn], list[Answer]]:
        """Return all turns, each continuing the plain answers before it, and their plain answers."""
        kept = self._kept(PLAIN)
        if kept is None:
            turns: list[Turn] = []
            answers: list[Answer] = []
            with self._client(PLAIN, None) as client:
                asked = [
                    (t, task, i)
                    for t in self.params.temperatures
                    for task in self.tasks
                    for i in range(len(task.prompts))
                ]
                for temperature, task, i in watched(asked, "plain, vLLM"):
                    said: list[str] = []
                    for number in range(_turns(task.prompts[i])):
                        ids = prompt_ids(self.target, task.prompts[i], said)
                        seed = prompt_seed(self.seed, task.name, task.asked[i], number)
                        turns.append(Turn(task.name, temperature, i, ids, seed))
                        answers.append(self._answer(client, turns[-1], False))
                        tokens = answers[-1].tokens
                        said.append(str(self.target.tokenizer.decode(tokens, skip_special_tokens=True)))
            kept = self._keep(
                PLAIN, {"turns": [asdict(turn) for turn in turns], "answers": _to_json(answers)}
            )
        return [Turn(**turn) for turn in kept["turns"]], _from_json(kept["answers"])

    def decode(self, name: str, config: dict[str, Any], turns: Sequence[Turn]) -> list[Answer]:
        """Return the drafted answers of all turns."""
        kept = self._kept(name)
        if kept is None:
            with self._client(name, config) as client:
                answers = [self._answer(client, turn, True) for turn in watched(turns, f"{name}, vLLM")]
            kept = self._keep(name, {"answers": _to_json(answers)})
        return _from_json(kept["answers"])

    def plain_again(
        self, turns: Sequence[Turn], plain: Sequence[Answer], ways: Mapping[str, Sequence[Answer]]
    ) -> tuple[list[Answer], dict[str, float]]:
        """Return plain answers after all others, and how far apart the two best tokens are wherever a way differs."""
        kept = self._kept(AGAIN)
        if kept is None:
            gaps = {}
            with self._client(PLAIN, None) as client:
                answers = [self._answer(client, turn, False) for turn in watched(turns, "plain again, vLLM")]
                for answered in ways.values():
                    for turn, one, other in zip(turns, plain, answered, strict=True):
                        if turn.temperature == 0 and (at := _differs(one, other)) is not None:
                            context = turn.ids + one.tokens[:at]
                            gaps[_place(context)] = client.top_two_gap(context)
            kept = self._keep(AGAIN, {"answers": _to_json(answers), "gaps": gaps})
        return _from_json(kept["answers"]), kept["gaps"]

    def _answer(self, client: VLLM, turn: Turn, drafting: bool) -> Answer:
        return client.decode(turn.ids, self.params.max_new_tokens, drafting, turn.temperature, turn.seed)

    @contextmanager
    def _client(self, name: str, config: Speculative) -> Iterator[VLLM]:
        with self.engine.start(name, config, self.longest) as address:
            client = VLLM(address, self.stop_ids)
            client.decode(prompt_ids(self.target, self.tasks[0].prompts[0]), WARM_UP, False)
            yield client

    def _kept(self, name: str) -> dict[str, Any] | None:
        path = self._path(name)
        return json.loads(path.read_text()) if path.exists() else None

    def _keep(self, name: str, found: dict[str, Any]) -> dict[str, Any]:
        write_json(self._path(name), found)
        return found

    def _path(self, name: str) -> Path:
        return self.work / f"{name}.answers.json"


def _way(drafter: str) -> str:
    """Return the name of a draft's way of decoding, which is none of the others'."""
    return f"{DRAFT}-{drafter}"


def _turns(chat: Chat) -> int:
    return len(turns_of(chat))


def _rows(
    turns: Sequence[Turn], ways: Mapping[str, Sequence[Answer]], again: Sequence[Answer]
) -> dict[Key, list[PromptRuns]]:
    """Return of each task and temperature the runs of its prompts; plain seconds are of both runs."""
    found: dict[Key, dict[int, PromptRuns]] = {}
    for i, turn in enumerate(turns):
        runs = found.setdefault((turn.task, turn.temperature), {}).setdefault(
            turn.prompt, {name: Run() for name in ways}
        )
        for name, answers in ways.items():
            _add(runs[name], turn, answers[i])
        runs[PLAIN].seconds += again[i].seconds
        runs[PLAIN].tokens += len(again[i].tokens)
    return {key: list(prompts.values()) for key, prompts in found.items()}


def _known(record: Record) -> Record:
    """Return a record without what an engine does not tell: the order of rounds, and which seconds are the draft's."""
    unknown = {"draft_ms": None, "verify_ms": None, "host_ms": None}

    def told(entry: TaskEntry) -> TaskEntry:
        beside = {name: figures.model_copy(update=unknown) for name, figures in entry.beside.items()}
        return entry.model_copy(update={**unknown, "tau_by_output_position": [], "beside": beside})

    return record.model_copy(update={"tasks": {key: told(entry) for key, entry in record.tasks.items()}})


def _add(run: Run, turn: Turn, answer: Answer) -> None:
    """Add a turn. An engine counts verifications by what they accepted, not in their order."""
    accepted, drafted = rounds(answer)
    run.seconds += answer.seconds
    run.tokens += len(answer.tokens)
    run.accepted.append(accepted)
    run.drafted.append(drafted)
    run.output = digest(run.output + json.dumps(answer.tokens))


def rounds(answer: Answer) -> tuple[list[int], list[int]]:
    """Return accepted and drafted tokens of each pass behind the first token, those that accepted most first."""
    counts = answer.counts
    reached = [counts.drafts, *counts.by_position, 0]
    accepted = [k for k in range(len(reached) - 2, -1, -1) for _ in range(reached[k] - reached[k + 1])]
    drafted = [-(-counts.drafted // counts.drafts)] * len(accepted) if accepted else []
    plain = [0] * max(len(answer.tokens) - 1 - sum(accepted) - len(accepted), 0)
    return accepted + plain, drafted + plain


def _identities(
    turns: Sequence[Turn],
    plain: Sequence[Answer],
    answers: Sequence[Answer],
    gaps: Mapping[str, float],
    target: Ends,
) -> dict[str, Identity]:
    """Return for each task whether the greedy answers are the plain ones."""
    found: dict[str, Identity] = {}
    most = TIES[str(target.dtype).removeprefix("torch.")]
    for turn, one, other in zip(turns, plain, answers, strict=True):
        if turn.temperature != 0:
            continue
        before = found.get(turn.task, Identity(True, 0))
        at = _differs(one, other)
        tie = at is not None and gaps[_place(turn.ids + one.tokens[:at])] < most
        found[turn.task] = Identity(
            before.lossless and (at is None or tie),
            before.ties + tie,
            turn.prompt + 1,
            before.tokens + len(one.tokens),
        )
    return found


def _differs(one: Answer, other: Answer) -> int | None:
    """Return the place of the first token that differs, None where none does."""
    return first_difference(one.tokens, other.tokens)


def _place(context: list[int]) -> str:
    return digest(json.dumps(context))


def _to_json(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    return [asdict(answer) for answer in answers]


def _from_json(answers: Sequence[dict[str, Any]]) -> list[Answer]:
    return [
        Answer(
            found["tokens"],
            found["seconds"],
            found["timed_tokens"],
            Counts(**found["counts"] | {"by_position": tuple(found["counts"]["by_position"])}),
        )
        for found in answers
    ]
