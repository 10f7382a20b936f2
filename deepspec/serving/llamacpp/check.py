"""`deepspec serve-check --engine llamacpp`: target and draft as GGUF in llama.cpp, beside our own engine.

All its servers run at once, the idle ones without a share of the processor, so every way of decoding answers a prompt
before the next prompt is asked: plain, the draft at its own length and shorter, cut by its confidence, and llama.cpp's
own lookups. Before, passes and rounds are timed, and the advice that follows from them is said.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from deepspec.config import Params
from deepspec.drafters.checkpoint import draft_digest, draft_directory
from deepspec.drafters.load import is_trained, load_drafter
from deepspec.errors import DeepSpecError
from deepspec.evaluation.stats import Pair, speedup
from deepspec.export import gguf_model
from deepspec.export.readers.directory import Unreadable
from deepspec.export.readers.gguf import draft_file, draft_kind
from deepspec.export.suitable import Refused
from deepspec.files import replacing
from deepspec.progress import watched
from deepspec.serving import ours
from deepspec.serving.engines import Draft, Work
from deepspec.serving.launch import LOGS
from deepspec.serving.llamacpp import costs, law
from deepspec.serving.llamacpp.client import LlamaCpp
from deepspec.serving.llamacpp.environment import Environment, described, find_or_set_up
from deepspec.serving.llamacpp.launch import Server, serving
from deepspec.serving.llamacpp.record import Cost, Expected, Law, LlamaCppRecord, Way
from deepspec.serving.llamacpp.table import show
from deepspec.serving.prepare import (
    TARGET,
    Settings,
    conditions,
    decoded_here,
    each,
    exported,
    tokens_drafted,
    work_of,
)
from deepspec.serving.protocols import Answer, Counts, Prompt
from deepspec.serving.record import About, Measured, agreement, check_target, compare, tokens_per_second
from deepspec.target.model import load_target

logger = logging.getLogger(__name__)

PRECISIONS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
OWN = ("ngram-simple", "ngram-mod", "ngram-cache")  # llama.cpp's lookups
PLAIN = "plain"
TIMED = 24  # tokens of an answer by which passes are timed
CUT = 0.5  # confidence below which the draft is cut in one of the ways
SAMPLED_PROMPTS, SAMPLED_TOKENS, DRAWS = 4, 16, 25
LEAST_P = 1e-3


@dataclass(frozen=True, eq=False)
class Loaded:
    """A draft with its file and what our engine made of the prompts."""

    draft: Draft
    file: Path
    own: list[ours.Ours]


def run(settings: Settings, params: Params) -> list[str]:
    """Measure, write the records and print the tables. Returns why drafts failed, one line each.

    Raises:
        DeepSpecError: no such draft or export; llama.cpp does not start, answer, or serve this target.
    """
    precision = PRECISIONS.get(settings.dtype or "", settings.dtype or "f16")
    files = each(settings.drafters or params.pipeline, settings, lambda name: _file(name, settings))
    environment = find_or_set_up()
    loaded, work, about, model = _here(files, settings, params, precision)
    failures = []
    for one in loaded:
        record = _measure(one, work, about, model, precision, environment, settings)
        record.write(settings.output / f"{one.draft.name}-llamacpp.json")
        show(record)
        failures += [f"{record.drafter}: {failure}" for failure in record.failures]
    return failures


def _file(name: str, settings: Settings) -> Path:
    """Return the draft's GGUF file."""
    directory = draft_directory(name)
    if not is_trained(directory):
        raise DeepSpecError(
            f"{name}: llama.cpp has lookups of its own, which are measured beside every draft"
        )
    place = settings.exported or exported(name, directory, "llamacpp", "llama.cpp")
    try:
        return draft_file(place)
    except Unreadable as error:
        raise DeepSpecError(f"{place}: {error}; deepspec export --drafter {name} --to llamacpp") from None


def _here(
    files: dict[str, Path], settings: Settings, params: Params, precision: str
) -> tuple[list[Loaded], Work, About, Path]:
    """Decode the prompts with our engine and write the target's file. The target is gone when this returns."""
    target = load_target(TARGET, dtype="bfloat16" if precision == "bf16" else "float32")
    work = work_of(target, params, settings)
    found = []
    for name, file in files.items():
        directory = draft_directory(name)
        drafter = load_drafter(directory, target)
        tokens = tokens_drafted(directory, drafter, settings)
        draft = Draft(name, draft_digest(directory), tokens, {"method": draft_kind(file)})
        found.append(Loaded(draft, file, decoded_here(target, drafter, draft, work)))
    model = LOGS / f"target-{target.digest[:12]}-{precision}.gguf"
    if not model.exists():
        LOGS.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(model) as scratch:
                gguf_model.write_target(target, precision, scratch)
        except Refused as refusal:
            raise DeepSpecError(f"{TARGET}: {refusal}") from None
    return found, work, conditions(target, settings, work, LlamaCpp.timing), model


def _measure(
    loaded: Loaded,
    work: Work,
    about: About,
    model: Path,
    precision: str,
    environment: Environment,
    settings: Settings,
) -> LlamaCppRecord:
    draft, threads = loaded.draft, torch.get_num_threads()
    context = work.max_length + TIMED
    plain = Server(model, context, threads, cache="f32" if precision == "f32" else "f16")
    drafting = replace(plain, kind=draft.config["method"], draft=loaded.file, tokens=draft.tokens)

    def timed(server: Server, name: str) -> Answer:
        with serving(environment, server, f"{draft.name}-{name}") as address:
            client = LlamaCpp(address, ())  # an answer is not to end early
            client.answer(work.prompts[0], 4, False)
            return client.answer(work.prompts[0], TIMED, False)

    found = costs.measure(timed, plain, drafting)
    expected = costs.choices(found, sum((one.counts for one in loaded.own), Counts()))
    said = costs.advice(expected, found)
    logger.info("%s, llama.cpp, target in %s: %s", draft.name, precision, said)
    ways = _ways(plain, drafting)
    answers, law_found = _answers(ways, work, environment, settings.draws)
    main = next(name for name, server in ways.items() if server is drafting)
    check_target(answers[main], loaded.own, "llama.cpp")
    measured = Measured(list(work.prompts), answers[main], [answers[PLAIN]], loaded.own)
    figures = compare(measured, "llama.cpp")
    failures = figures.failures + _law_failures(law_found)
    return LlamaCppRecord(
        **dict(about) | draft.identity | dict(figures) | {"failures": failures},
        engine_version=described(environment),
        precision=precision,
        draft_file=loaded.file.name,
        threads=threads,
        passes=[Cost(tokens=n, seconds=s) for n, s in sorted(found.passes.items())],
        rounds=[Cost(tokens=n, seconds=s) for n, s in sorted(found.rounds.items())],
        expected=[Expected(drafted=c.drafted, tau=c.tau, speedup=c.speedup) for c in expected],
        advice=said,
        ways=[_way(name, answers[name], answers[PLAIN]) for name in ways],
        law=law_found,
    )


def _ways(plain: Server, drafting: Server) -> dict[str, Server]:
    """Return the servers by name: plain, the draft, shorter, cut by confidence, and llama.cpp's lookups."""
    found = {PLAIN: plain, f"{drafting.kind}, {drafting.tokens}": drafting}
    for tokens in (2, 1):
        if tokens < drafting.tokens:
            found[f"{drafting.kind}, {tokens}"] = replace(drafting, tokens=tokens)
    found[f"{drafting.kind}, {drafting.tokens}, p_min {CUT}"] = replace(drafting, least=CUT)
    return found | {kind: replace(plain, kind=kind) for kind in OWN}


def _answers(
    ways: dict[str, Server], work: Work, environment: Environment, draws: int | None
) -> tuple[dict[str, list[Answer]], Law | None]:
    """Answer every prompt in every way, the order turned by one from prompt to prompt; then sample with and without."""
    with ExitStack() as stack:
        clients = {
            name: LlamaCpp(
                stack.enter_context(serving(environment, server, name.replace(", ", "-").replace(" ", "-"))),
                work.stop_ids,
            )
            for name, server in ways.items()
        }
        for client in clients.values():
            client.beyond = max(server.tokens for server in ways.values()) + 1
            client.answer(work.prompts[0], 8, False)
        found: dict[str, list[Answer]] = {name: [] for name in ways}
        names = list(ways)
        for i, prompt in enumerate(watched(work.prompts, "llama.cpp, all ways")):
            turned = names[i % len(names) :] + names[: i % len(names)]
            for name in turned:
                found[name].append(clients[name].answer(prompt, work.limit, False))
        tested = None
        if draws != 0:
            main = next(name for name in names if name != PLAIN)
            tested = _law(clients[PLAIN].sample, clients[main].sample, work, draws or DRAWS)
    return found, tested


def _law(
    plain: Callable[[Prompt, int, int], list[int]],
    drafted: Callable[[Prompt, int, int], list[int]],
    work: Work,
    draws: int,
) -> Law:
    prompts, tokens = work.prompts[:SAMPLED_PROMPTS], min(SAMPLED_TOKENS, work.limit)
    samples = [
        [
            [sample(prompt, tokens, 1 + 2 * i + odd) for i in range(draws)]
            for prompt in watched(prompts, "T = 1")
        ]
        for odd, sample in enumerate((plain, drafted))
    ]
    without, with_draft = samples
    second = law.p_value(law.second_tokens(without), law.second_tokens(with_draft))
    length = law.p_value(law.answer_lengths(without), law.answer_lengths(with_draft))
    return Law(
        prompts=len(prompts), draws=draws, max_new_tokens=tokens, p_second_token=second, p_length=length
    )


def _law_failures(found: Law | None) -> list[str]:
    if found is None or min(found.p_second_token, found.p_length) >= LEAST_P:
        return []
    return [
        f"llama.cpp samples another law with the draft at T = 1: p = {found.p_second_token:.2g} of second tokens, "
        f"{found.p_length:.2g} of lengths"
    ]


def _way(name: str, answers: list[Answer], plain: list[Answer]) -> Way:
    pairs = [
        Pair(p.seconds, p.timed_tokens, a.seconds, a.timed_tokens)
        for a, p in zip(answers, plain, strict=True)
    ]
    gain = speedup(pairs)
    turns = [turn for answer in answers for turn in answer.turns]
    return Way(
        name=name,
        tokens_per_second=tokens_per_second(answers),
        speedup=gain.value if gain else None,
        speedup_ci95=gain.bounds if gain else None,
        tokens_per_turn=sum(1 + turn.accepted for turn in turns) / len(turns) if turns else None,
        drafted_per_turn=sum(turn.drafted for turn in turns) / len(turns) if turns else None,
        same_as_plain=agreement([a.tokens for a in plain], [a.tokens for a in answers]),
    )
