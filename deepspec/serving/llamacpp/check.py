"""`deepspec serve-check --engine llamacpp`: target and draft as GGUF in llama.cpp, beside our own engine.

All its servers run at once, the idle ones without a share of the processor, and our engine stays loaded, so every way
of decoding answers a prompt before the next prompt is asked: plain, the draft at its own length and shorter, each also
cut by its confidence, llama.cpp's own lookups, one of them before the draft, and our engine without and with the draft.
Before, passes and rounds are timed, and the advice that follows from them is said.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from deepspec.config import Params
from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import generate
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
from deepspec.target.model import Target, load_target

logger = logging.getLogger(__name__)

PRECISIONS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
OWN = ("ngram-simple", "ngram-mod", "ngram-cache")  # llama.cpp's lookups
BEFORE = OWN[0]  # the one that is also asked before the draft
PLAIN = "plain"
HERE = "DeepSpec"
TIMED = 12  # tokens of an answer by which passes are timed
MATCH = 1  # tokens that the lookup of timed passes looks for: so few that it nearly always drafts
CUT = 0.5  # confidence below which the draft is cut in some of the ways
PILOT = 64  # answers of our engine to each question, from which follows how many are drawn
Decode = Callable[[Prompt, int], Answer]  # a prompt, and at most so many tokens of it


@dataclass(frozen=True, eq=False)
class Loaded:
    """A draft with its file, what our engine made of the prompts, and our ways of decoding by name."""

    draft: Draft
    file: Path
    own: list[ours.Ours]
    ways: dict[str, Decode]


@dataclass(frozen=True, eq=False)
class Questions:
    """What is asked at T = 1: prompts, answers to each of either sample, and how surely a change is seen by them."""

    prompts: list[Prompt]
    draws: int
    power: float


@dataclass(frozen=True, eq=False)
class Setting:
    """What every draft is measured in: the work, llama.cpp and the target's file."""

    work: Work
    questions: Questions | None  # None: the law at T = 1 is not tested
    about: About
    environment: Environment
    model: Path
    precision: str
    lengths_only: bool


def run(settings: Settings, params: Params) -> list[str]:
    """Measure, write the records and print the tables. Returns why drafts failed, one line each.

    Raises:
        DeepSpecError: no such draft or export; llama.cpp does not start, answer, or serve this target.
    """
    precision = PRECISIONS.get(settings.dtype or "", settings.dtype or "f16")
    files = each(settings.drafters or params.pipeline, settings, lambda name: _file(name, settings))
    loaded, setting = _here(files, settings, params, precision, find_or_set_up())
    failures = []
    for one in loaded:
        record = _measure(one, setting)
        record.write(settings.output / f"{one.draft.name}-llamacpp-{precision}.json")
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
    files: dict[str, Path], settings: Settings, params: Params, precision: str, environment: Environment
) -> tuple[list[Loaded], Setting]:
    """Decode the prompts with our engine and write the target's file."""
    target = load_target(TARGET, dtype="bfloat16" if precision == "bf16" else "float32")
    work = work_of(target, params, settings)
    found = []
    for name, file in files.items():
        directory = draft_directory(name)
        drafter = load_drafter(directory, target)
        tokens = tokens_drafted(directory, drafter, settings)
        draft = Draft(name, draft_digest(directory), tokens, {"method": draft_kind(file)})
        own = decoded_here(target, drafter, draft, work)
        found.append(Loaded(draft, file, own, _own_ways(target, drafter, tokens)))
    model = LOGS / f"target-{target.digest[:12]}-{precision}.gguf"
    if not model.exists():
        LOGS.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(model) as scratch:
                gguf_model.write_target(target, precision, scratch)
        except Refused as refusal:
            raise DeepSpecError(f"{TARGET}: {refusal}") from None
    questions = None if settings.draws == 0 else _questions(target, settings.draws)
    about = conditions(target, settings, work, LlamaCpp.timing)
    return found, Setting(work, questions, about, environment, model, precision, settings.lengths_only)


def _own_ways(target: Target, drafter: Drafter, tokens: int) -> dict[str, Decode]:
    """Return our engine's ways of decoding, which are interleaved with llama.cpp's."""
    plain, drafting = ours.deployments(target, drafter, tokens)
    return {
        f"{HERE}, {PLAIN}": partial(ours.timed, plain),
        f"{HERE}, {tokens}": partial(ours.timed, drafting),
    }


def _questions(target: Target, draws: int | None) -> Questions:
    """Return what is asked at T = 1, and how often: `draws`, or what our engine's answers say is needed."""
    prompts = [
        Prompt("law", asked, target.chat_ids([{"role": "user", "content": asked}])) for asked in law.QUESTIONS
    ]
    ids = [prompt.ids for prompt in prompts for _ in range(PILOT)]
    pilot = [one.tokens for one in generate(target, None, ids, max_new_tokens=law.TOKENS, temperature=1.0)]
    sample = law.second_tokens([pilot[i : i + PILOT] for i in range(0, len(pilot), PILOT)])
    if draws is None:
        return Questions(prompts, *law.draws_for(sample))
    return Questions(prompts, draws, law.power(sample, draws))


def _measure(loaded: Loaded, setting: Setting) -> LlamaCppRecord:
    draft, threads, precision = loaded.draft, torch.get_num_threads(), setting.precision
    cache = "f32" if precision == "f32" else "f16"
    plain = Server(setting.model, setting.work.max_length + TIMED, threads, cache=cache)
    drafting = replace(plain, kind=draft.config["method"], draft=loaded.file, tokens=draft.tokens)
    cost: costs.Costs | None = None
    expected: list[costs.Choice] = []
    said = "costs were not measured"
    if not setting.lengths_only:
        cost = _costs(plain, drafting, setting)
        expected = costs.choices(cost, sum((one.counts for one in loaded.own), Counts()))
        said = costs.advice(expected, cost)
        logger.info("%s, llama.cpp, target in %s: %s", draft.name, precision, said)
    own = {} if setting.lengths_only else loaded.ways
    answers, law_found = _answers(plain, drafting, own, setting)
    drafted = answers[_name(drafting)]
    check_target(drafted, loaded.own, "llama.cpp")
    measured = Measured(list(setting.work.prompts), drafted, [answers[PLAIN]], loaded.own)
    figures = compare(measured, "llama.cpp")
    ways = [_way(name, found, answers[PLAIN]) for name, found in answers.items()]
    failures, warnings = figures.failures, figures.warnings
    if precision.startswith("q"):  # another target than the one our engine decodes with
        unheld = [
            f"{failure}; not held to that, since a target in {precision} writes other texts: --dtype f16 tells"
            for failure in failures
        ]
        failures, warnings = [], [*warnings, *unheld]
    told = {"failures": failures + _law_failures(law_found), "warnings": warnings}
    return LlamaCppRecord(
        **dict(setting.about) | draft.identity | dict(figures) | told,
        engine_version=described(setting.environment),
        precision=precision,
        draft_file=loaded.file.name,
        threads=threads,
        passes=_in_seconds(cost.passes, cost.plain) if cost else [],
        rounds=_in_seconds(cost.rounds, cost.plain) if cost else [],
        plain_seconds=cost.plain if cost else None,
        expected=[
            Expected(drafted=c.drafted, tau=c.tau, speedup=c.speedup, speedup_ci95=c.bounds) for c in expected
        ],
        advice=said,
        fastest=_fastest([way for way in ways if way.name != PLAIN and way.name not in own]),
        ways=ways,
        law=law_found,
    )


def _costs(plain: Server, drafting: Server, setting: Setting) -> costs.Costs:
    """Time passes and rounds, on the shortest prompt."""
    prompt = min(setting.work.prompts, key=lambda prompt: len(prompt.ids))
    with _clients(setting) as client:

        def ask(server: Server) -> costs.Ask:
            return partial(client(server).turns, prompt, TIMED)

        lengths = costs.lengths(drafting.tokens)
        lookups = {k: ask(replace(plain, kind="ngram-simple", tokens=k, match=MATCH)) for k in lengths}
        drafts = {k: ask(replace(drafting, tokens=k)) for k in lengths}
        return costs.measure(ask(plain), lookups, drafts)


@contextmanager
def _clients(setting: Setting) -> Iterator[Callable[[Server], LlamaCpp]]:
    """Yield what starts a server and asks it a first time; all of them end on leaving."""
    with ExitStack() as stack:

        def client(server: Server) -> LlamaCpp:
            name = _name(server).replace(", ", "-").replace(" ", "-").replace(",", "-")
            address = stack.enter_context(serving(setting.environment, server, name))
            found = LlamaCpp(address, setting.work.stop_ids)
            found.answer(setting.work.prompts[0], 8, False)
            return found

        yield client


def _name(server: Server) -> str:
    """Return what a way of decoding is called: its kind, tokens drafted, and what else is not the default."""
    if not server.kind:
        return PLAIN
    parts = [server.kind.replace(",", " + ")]
    parts += [str(server.tokens)] * bool(server.tokens)
    parts += [f"match {server.match}"] * bool(server.match) + [f"p_min {server.least}"] * bool(server.least)
    return ", ".join(parts)


def _ways(plain: Server, drafting: Server) -> list[Server]:
    """Return plain decoding, the draft at its length, 2 and 1, uncut and cut, lookups, and one before the draft."""
    lengths = [drafting.tokens, *(tokens for tokens in (2, 1) if tokens < drafting.tokens)]
    drafts = [
        replace(drafting, tokens=tokens, least=least) for least in (drafting.least, CUT) for tokens in lengths
    ]
    both = replace(drafting, kind=f"{BEFORE},{drafting.kind}", tokens=min(2, drafting.tokens))
    return [plain, *drafts, *(replace(plain, kind=kind) for kind in OWN), both]


def _answers(
    plain: Server, drafting: Server, own: dict[str, Decode], setting: Setting
) -> tuple[dict[str, list[Answer]], Law | None]:
    """Answer every prompt in every way, the order turned by one from prompt to prompt; then sample with and without."""
    work, servers = setting.work, [plain, drafting] if setting.lengths_only else _ways(plain, drafting)
    with _clients(setting) as client:
        clients = {_name(server): client(server) for server in servers}
        for one in clients.values():
            one.beyond = max(server.tokens for server in servers) + 1
        ways: dict[str, Decode] = {name: _decoding(one) for name, one in clients.items()} | own
        found: dict[str, list[Answer]] = {name: [] for name in ways}
        names = list(ways)
        for i, prompt in enumerate(watched(work.prompts, "all ways, interleaved")):
            start = i % len(names)
            for name in names[start:] + names[:start]:
                found[name].append(ways[name](prompt, work.limit))
        tested = None
        if setting.questions:
            tested = _law(clients[PLAIN].sample, clients[_name(drafting)].sample, setting.questions)
    return found, tested


def _decoding(client: LlamaCpp) -> Decode:
    return lambda prompt, limit: client.answer(prompt, limit, False)


def _law(
    plain: Callable[[Prompt, int, int], list[int]],
    drafted: Callable[[Prompt, int, int], list[int]],
    questions: Questions,
) -> Law:
    without, with_draft = (
        [
            [sample(prompt, law.TOKENS, 1 + 2 * i + odd) for i in range(questions.draws)]
            for prompt in watched(questions.prompts, "T = 1")
        ]
        for odd, sample in enumerate((plain, drafted))
    )
    return Law(
        prompts=len(questions.prompts),
        draws=questions.draws,
        max_new_tokens=law.TOKENS,
        change=law.CHANGE,
        power=questions.power,
        p_second_token=law.p_value(law.second_tokens(without), law.second_tokens(with_draft)),
        p_length=law.p_value(law.answer_lengths(without), law.answer_lengths(with_draft)),
    )


def _law_failures(found: Law | None) -> list[str]:
    if found is None or min(found.p_second_token, found.p_length) >= law.LEVEL:
        return []
    return [
        f"llama.cpp samples another law with the draft at T = 1: p = {found.p_second_token:.2g} of second tokens, "
        f"{found.p_length:.2g} of lengths"
    ]


def _in_seconds(ratios: dict[int, costs.Ratio], plain: float) -> list[Cost]:
    return [
        Cost(tokens=n, plain_passes=ratio.value, plain_passes_ci95=ratio.bounds, seconds=plain * ratio.value)
        for n, ratio in sorted(ratios.items())
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


def _fastest(ways: list[Way]) -> str:
    """Say which of llama.cpp's ways of drafting is the fastest."""
    best = max(ways, key=lambda way: way.speedup or 0.0)
    if not best.speedup or not best.speedup_ci95:
        return "no way of drafting could be timed"
    low, high = best.speedup_ci95
    said = f"{best.name}, {best.speedup:.2f}× plain ({low:.2f}–{high:.2f})"
    if best.speedup <= 1:
        return f"none of its ways of drafting is faster than plain decoding; the least slow is {said}"
    return f"the fastest of its ways is {said}"
