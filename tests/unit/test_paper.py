"""paper/: the same settings for all drafters in every profile, a pipeline that resolves, and the table's arithmetic."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from dvc.repo import Repo
from transformers import Qwen3Config

from deepspec.config import load_params
from deepspec.decoding.calibration import Blocks, conditional_logits, survival
from deepspec.drafters.registry import algorithms
from deepspec.errors import DeepSpecError
from deepspec.evaluation.record import Record
from deepspec.evaluation.runs import Run
from deepspec.reproduce.tolerance import Figures, compare, flatten
from paper import ablations, beyond, confidence, expected, figures, table
from paper.params import PaperParams
from paper.study import MEAN, Draft, Spread, Study, Taus, by_seed
from tests.records import record

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "paper"
PROFILES = sorted(file.stem.removeprefix("params.") for file in PAPER.glob("params.*.yaml"))
FULL = [name for name in PROFILES if name != "smoke"]
ABLATIONS = ["eagle3_same_loss", "dflash_same_loss", "dspark_2", "dspark_2_16", "rnn_2_16"]
TASKS = {"sums": "math", "more_sums": "math", "talk": "chat"}


def params_of(profile: str) -> PaperParams:
    return load_params(PAPER / f"params.{profile}.yaml", PaperParams)


def test_params_yaml_is_one_of_the_profiles():
    assert any(
        (PAPER / "params.yaml").read_text() == (PAPER / f"params.{p}.yaml").read_text() for p in PROFILES
    )


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_decodes_as_the_paper_does(profile):
    """Whole chains by standard speculative sampling, nothing before the draft, T = 1 among the temperatures."""
    evaluate = params_of(profile).evaluate
    decode = evaluate.decode
    assert (decode.lookup, decode.tree.type, decode.tree.depth, decode.verify) == (
        None,
        "chain",
        None,
        "standard",
    )
    assert (decode.controller.type, decode.controller.length, evaluate.controllers) == ("fixed", None, [])
    assert {0.0, 1.0} <= set(evaluate.temperatures)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_compares_drafters_under_equal_settings(profile):
    params = params_of(profile)
    chosen = [params.drafters[name] for name in ablations.drafters(params)]
    assert len({tuple(own.target_layer_ids) for own in chosen}) == 1
    assert len({own.draft_vocab_size for own in chosen}) == 1
    assert not any(getattr(own, "context_skip", False) for own in chosen)
    types = {role: params.drafters[name].type for role, name in params.study.roles.items()}
    assert types == {"EAGLE-3": "eagle3", "DFlash": "dflash", "DSpark": "dspark"}
    rank = {own.markov_rank for own in chosen if own.type == "dspark"}
    assert len(rank) == 1
    if profile in FULL:
        assert {params.drafters[name].block_size for name in params.study.roles.values()} == {7}
        assert len(chosen[0].target_layer_ids) == 5
    flash, spark = (params.drafters[name].layers for name in (params.study.dflash, params.study.dspark))
    assert flash == spark
    assert len({params.drafters[name].start for name in params.pipeline}) == 1
    assert "auto" not in {own.start for own in chosen}  # the same on every target


@pytest.mark.parametrize("profile", PROFILES)
def test_each_drafter_has_the_loss_it_was_published_with(profile):
    """EAGLE-3: the target's law, a step weighed 0.8^i; DFlash: the data's tokens; DSpark: 0.1 CE + 0.9 ‖q − p‖₁."""
    params = params_of(profile)
    eagle, flash, spark = (
        params.drafters[name].loss or params.train.loss for name in params.study.roles.values()
    )
    assert (eagle.kl, eagle.ce, eagle.tv) == (1, 0, 0)
    assert np.exp(-1 / eagle.positions.decay) == pytest.approx(0.8, abs=1e-3)
    assert (flash.kl, flash.ce, flash.tv, flash.positions.decay) == (0, 1, 0, 4)
    assert (spark.kl, spark.ce, spark.tv, spark.positions.decay) == (0, 0.1, 0.9, 4)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_ablation_differs_in_one_thing_from_another_drafter(profile):
    params = params_of(profile)
    found = set(params.changes())
    assert {name for name, *_ in found} == set(params.study.ablations)
    assert {key for *_, key in found} <= {"layers", "markov_head", "block_size", "start", "loss"}
    if profile in FULL:
        assert found >= {
            ("eagle3_same_loss", "eagle3", "loss"),
            ("dflash_same_loss", "dflash", "loss"),
            ("dspark_2", "dspark", "layers"),
            ("dspark_2_16", "dspark_2", "block_size"),
            ("rnn_2_16", "dspark_2_16", "markov_head"),
        }


@pytest.mark.parametrize(
    ("drafter", "key", "value"),
    [("dflash", "target_layer_ids", [1, 2]), ("eagle3", "draft_vocab_size", 64), ("dspark", "block_size", 5)],
)
def test_unequal_drafters_are_refused_by_the_key_that_differs(tmp_path, drafter, key, value):
    raw = yaml.safe_load((PAPER / "params.quick.yaml").read_text())
    raw["drafters"][drafter][key] = value
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(DeepSpecError, match=f"need the same {key}, found .*{drafter}"):
        load_params(file, PaperParams)


def test_a_study_without_the_tables_temperature_is_refused(tmp_path):
    raw = yaml.safe_load((PAPER / "params.quick.yaml").read_text())
    raw["evaluate"]["temperatures"] = [0.0]
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(DeepSpecError, match=r"evaluate.temperatures lacks 1.0"):
        load_params(file, PaperParams)


def test_a_study_of_a_drafter_that_is_not_trained_is_refused(tmp_path):
    raw = yaml.safe_load((PAPER / "params.quick.yaml").read_text())
    raw["study"]["dspark"] = "dsprak"
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(DeepSpecError, match=r"study names 'dsprak'.*did you mean 'dspark'"):
        load_params(file, PaperParams)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["dsprak"],
            "study names 'dsprak', which `drafters` lacks.*did you mean 'dspark'",
        ),
        (["dflash"], "study.ablations names 'dflash', which `pipeline` has"),
        (["rnn_2_16"], "study.ablations: rnn_2_16 differs from no drafter before it in one key alone"),
    ],
)
def test_an_ablation_that_cannot_be_one_is_refused(tmp_path, names, message):
    raw = yaml.safe_load((PAPER / "params.quick.yaml").read_text())
    raw["study"]["ablations"] = names
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(DeepSpecError, match=message):
        load_params(file, PaperParams)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_pipeline_resolves_for_every_profile(profile, tmp_path):
    folder = tmp_path / "paper"
    folder.mkdir()
    shutil.copy(PAPER / "dvc.yaml", folder)
    shutil.copy(PAPER / f"params.{profile}.yaml", folder / "params.yaml")
    Repo.init(tmp_path, no_scm=True).close()
    with Repo(tmp_path) as repo:
        stages = {stage.name: stage for stage in repo.index.stages}
        repo.index.check_graph()
    for stage in stages.values():
        for dep in stage.params:
            assert not set(dep.params) - set(dep.read_params()), stage.name
    params = params_of(profile)
    seeds = params.study.seeds
    names = {f"train@{name}-{seed}" for name in params.pipeline for seed in seeds}
    names |= {f"{stage}@{seed}" for stage in ("evaluate", "expected", "confidence") for seed in seeds}
    names |= {f"{stage}@{name}" for stage in ("ablate", "ablations") for name in params.study.ablations}
    names |= {"target", "prompts", "generate", "validate", "answers", "beyond", "table", "figures"}
    assert set(stages) == names
    for ablation in params.study.ablations:
        assert f"--seed {seeds[0]} --as ablations/{ablation}" in stages[f"ablate@{ablation}"].cmd
    first = f"{params.pipeline[0]}-{seeds[-1]}"
    assert f"--seed {seeds[-1]} --as seed-{seeds[-1]}/{params.pipeline[0]}" in stages[f"train@{first}"].cmd


def test_shared_stages_are_those_of_the_main_pipeline():
    main, ours = (yaml.safe_load((folder / "dvc.yaml").read_text())["stages"] for folder in (ROOT, PAPER))
    assert ours["ablate"]["deps"] == ours["train"]["deps"]
    for name in ("prompts", "generate", "validate"):
        assert {k: v for k, v in ours[name].items() if k != "deps"} == {
            k: v for k, v in main[name].items() if k != "deps"
        }


def qwen3_4b() -> SimpleNamespace:
    """What a network asks of its target, without a weight."""
    config = Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    )
    return SimpleNamespace(
        config=config,
        hidden_size=2560,
        num_layers=36,
        vocab_size=151936,
        max_length=40960,
        rope_theta=1e6,
        check_layers=lambda layers: None,
    )


@pytest.mark.parametrize("name", ablations.drafters(params_of("qwen3-4b")))
def test_the_networks_for_qwen3_4b_have_its_shapes(name):
    params = params_of("qwen3-4b")
    drafter = params.drafters[name]
    with torch.device("meta"):
        network = algorithms()[drafter.type].network(drafter, qwen3_4b())
        features = torch.empty(2, 24, 5 * 2560)
        tokens = torch.empty(2, 24, dtype=torch.int64)
        hidden = network(features, tokens, torch.empty(2, 3, dtype=torch.int64))
        assert hidden.shape == (2, 3, drafter.block_size, 2560)
        outputs = network.outputs(hidden, torch.empty(2, 3, drafter.block_size, dtype=torch.int64))
    assert {w.shape[0] for _, w in outputs.factors} == {151936}
    assert (outputs.confidence is not None) == (drafter.type == "dspark")


def test_a_step_for_qwen3_4b_can_be_shared_by_the_gpus_of_several_machines():
    train = params_of("qwen3-4b").train
    processes = yaml.safe_load((ROOT / "configs/multinode.yaml").read_text())["num_processes"]
    assert train.batch_size % (processes * train.accumulate) == 0
    assert train.features.mode == "online"


def run_of(tokens: int, rounds: int, seconds: float = 1.0) -> Run:
    """`rounds` rounds that accept `tokens` tokens in all."""
    accepted = [tokens // rounds] * rounds
    accepted[-1] += tokens - sum(accepted)
    return Run(seconds, tokens, 0.0, 0.0, [accepted], [[7] * rounds])


def made_up(
    taus: dict[str, list[list[int]]], lossless: bool = True, prompts: int = 6, more: dict | None = None
) -> Study:
    """A study whose prompt i has `taus[drafter][seed][task]` + i accepted tokens in 10 rounds, and three times as many
    where it was decoded.

    `more` is a record of ablations.
    """
    params = params_of("cpu")
    study = params.study.model_copy(update={"ablations": ABLATIONS})
    params = params.model_copy(update={"pipeline": list(taus), "study": study})
    drafts: dict[str, list[Draft]] = {}
    for name, seeds in taus.items():
        for by_task in seeds:
            own = record(name, 2.0 if lossless else None)
            entry = own["tasks"]["sums@T=1"]
            own["tasks"] = {
                f"{task}@T={t:g}": entry | {"category": category, "temperature": t}
                for task, category in TASKS.items()
                for t in (0.0, 1.0)
            }
            runs = {
                (task, t): [{"draft": run_of(3 * (tokens + i), 10)} for i in range(prompts)]
                for task, tokens in zip(TASKS, by_task, strict=True)
                for t in (0.0, 1.0)
            }
            drafts.setdefault(name, []).append(Draft(Record.parse(own, name), runs))
    rounds = [
        {
            name: {
                task: [prompt_of(tokens + i + 10, [10] * 7) for i in range(prompts)]
                for task, tokens in zip(TASKS, seeds[n], strict=True)
            }
            for name, seeds in taus.items()
        }
        for n in range(len(drafts["dspark"]))
    ]
    return Study(params, drafts, [*rounds, *([more] if more else [])])


def prompt_of(tokens: int, rounds: list[float]) -> dict:
    """A prompt of a record of `paper.expected`: every round reached position 1, half of those before all others."""
    reached = [rounds[-1] / 2**k for k in range(len(rounds))]
    return {
        "tokens": tokens,
        "rounds": rounds,
        "reached": reached,
        "stood": [*reached[1:], reached[-1] / 2],
    }


EQUAL = {"eagle3": [[10, 20, 30]] * 2, "dflash": [[10, 20, 30]] * 2, "dspark": [[10, 20, 30]] * 2}


def test_tau_of_a_domain_is_the_mean_of_its_tasks_and_of_its_seeds():
    study = made_up(
        {"eagle3": [[10, 20, 30], [30, 40, 50]], "dflash": EQUAL["dflash"], "dspark": EQUAL["dspark"]}
    )
    found = table.make(study, table.published(PAPER / "published.yaml"))["tau"]["eagle3"]
    extra = sum(range(6)) / 6  # accepted tokens of a mean prompt beyond the first one's
    tau = {tokens: 1 + (tokens + extra) / 10 for tokens in (10, 20, 30, 40, 50)}
    assert found["math"]["value"] == pytest.approx((tau[10] + tau[20] + tau[30] + tau[40]) / 4)
    assert found["chat"]["value"] == pytest.approx((tau[30] + tau[50]) / 2)
    assert found[MEAN]["value"] == pytest.approx(
        (tau[10] + tau[20] + tau[30] + tau[30] + tau[40] + tau[50]) / 6
    )
    assert found["chat"]["low"] < found["chat"]["value"] < found["chat"]["high"]


def test_what_was_decoded_is_beside_what_is_expected():
    found = table.make(
        made_up(EQUAL | {"dspark": [[40, 50, 60]] * 2}), table.published(PAPER / "published.yaml")
    )
    for name in EQUAL:
        expected = found["tau"][name][MEAN]["value"]
        assert found["drafters"][name]["tau"]["1"]["value"] == pytest.approx(1 + 3 * (expected - 1))
    ratio = found["ratios"]["EAGLE-3"]["chat"]
    assert (ratio["value"], ratio["decoded"]["value"]) == pytest.approx((7.25 / 4.25, 19.75 / 10.75))
    metrics = flatten(table.metrics(found))
    assert metrics["dspark.mean.tau"] < metrics["dspark.T=1.tau"]


def test_equal_drafters_have_the_ratio_one_without_any_width():
    """Their prompts and seeds are drawn together: what both share is no uncertainty of the ratio."""
    ratios = table.make(made_up(EQUAL), table.published(PAPER / "published.yaml"))["ratios"]
    for by_domain in ratios.values():
        for ratio in by_domain.values():
            assert (ratio["value"], ratio["low"], ratio["high"]) == pytest.approx((1, 1, 1))
            assert ratio["ahead"] == "not told apart"


def test_who_is_ahead_everywhere_is_said_to_be_and_who_is_behind_too():
    ahead = EQUAL | {"dspark": [[40, 50, 60]] * 2}
    found = table.make(made_up(ahead), table.published(PAPER / "published.yaml"))["ratios"]
    assert {ratio["ahead"] for by_domain in found.values() for ratio in by_domain.values()} == {"yes"}
    behind = EQUAL | {"dspark": [[1, 2, 3]] * 2}
    found = table.make(made_up(behind), table.published(PAPER / "published.yaml"))["ratios"]
    assert {ratio["ahead"] for by_domain in found.values() for ratio in by_domain.values()} == {"no"}


def of_seeds(*taus: float, prompts: int = 4) -> dict[str, np.ndarray]:
    """A drafter of whose drafts each has the same τ on every prompt."""
    return {"sums": np.array([[[10 * tau, 10.0]] * prompts for tau in taus])}


def test_seeds_that_disagree_widen_the_interval():
    """By Student's quantile: two seeds of one drafter say little of the next, those of four drafters more."""
    own = of_seeds(2, 4)
    found = Taus({"own": own}).tau(own, ["sums"])
    half = 3 * np.log(2) / 2 * 12.706  # the deviation of two logarithms, over √2: half of what they differ by
    assert (found.low, found.value, found.high) == pytest.approx((3 - half, 3, 3 + half), abs=1e-3)
    assert by_seed(own, ["sums"]).tolist() == [2, 4]
    four = Spread.of([own] * 4, ["sums"])
    assert (four.share, four.freedom) == pytest.approx((np.log(2) / 2**0.5, 4))
    assert four.half(3, 2) == pytest.approx(half / 12.706 * 2.776, rel=1e-3)
    assert four.half(1, 2, drafters=2) == pytest.approx(2**0.5 * four.half(1, 2))
    same = of_seeds(2, 2)
    found = Taus({"same": same}).tau(same, ["sums"])
    assert (found.low, found.value, found.high) == pytest.approx((2, 2, 2))
    assert Spread.of([of_seeds(2)], ["sums"]).half(2, 1) == 0


@pytest.mark.parametrize("seeds", [2, 3])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds):
    """τ, and the ratio of two, where seeds differ more than prompts: resampled seeds would hold it in half of cases."""
    rng, inside, trials = np.random.default_rng(0), np.zeros(2), 200
    for _ in range(trials):
        drafters = {}
        for tau in (2.0, 2.4, 3.0, 1.5):
            shared, own = rng.normal(size=8), rng.normal(size=(seeds, 1))
            tokens = 10 * tau * (1 + 0.06 * own + 0.03 * shared)
            drafters[tau] = {"sums": np.stack((tokens, np.full_like(tokens, 10.0)), axis=-1)}
        taus = Taus(drafters)
        found = taus.tau(drafters[3.0], ["sums"])
        ratio = taus.ratio(drafters[2.4], drafters[2.0], ["sums"])
        inside += found.low <= 3 <= found.high, ratio.low <= 1.2 <= ratio.high
    assert (inside / trials > 0.9).all()


def test_a_new_run_of_the_study_reproduces_the_committed_numbers_but_not_a_worse_draft():
    """Another commit and other seconds are no difference; as a file of metrics goes through `deepspec reproduce`."""
    found = table.make(made_up(EQUAL), table.published(PAPER / "published.yaml"))
    then = flatten(table.metrics(found))
    assert {"dspark.T=1.tau", "dspark.math.tau", "dspark.lossless", "over DFlash.mean.ratio"} <= set(then)
    for drafter in found["drafters"].values():
        drafter["speedup"] = {t: 1.2 * value for t, value in drafter["speedup"].items()}
    again = flatten(table.metrics(found))
    for recomputed in (False, True):
        rows = compare(Figures(then, {}), Figures(again, {}), recomputed)
        assert all(row.matches or (recomputed and row.matches is None) for row in rows)

    def differing(now: dict) -> list[str]:
        rows = compare(Figures(then, {}), Figures(now, {}), recomputed=True)
        return [row.metric for row in rows if row.matches is False]

    assert differing(again | {"dspark.T=1.tau": 0.8 * again["dspark.T=1.tau"]}) == ["dspark.T=1.tau"]
    ratio = "over DFlash.mean.ratio"
    turned = {
        f"over DFlash.mean.{end}": value for end, value in (("low", 0.9), ("ratio", 0.95), ("high", 0.99))
    }
    assert then["over DFlash.mean.low"] > 0.99
    assert differing(again | turned) == [ratio]


def test_the_published_means_are_the_papers_own_gains():
    known = table.published(PAPER / "published.yaml")
    for rival, by_domain in known["ratios"].items():
        assert round(100 * (by_domain[MEAN] - 1)) == known["gain"][rival][0]


def test_a_record_that_is_not_lossless_shows_no_speed_up():
    found = table.make(made_up(EQUAL, lossless=False), table.published(PAPER / "published.yaml"))
    assert all(set(own["speedup"].values()) == {None} for own in found["drafters"].values())
    settings = {"heldout_tau": dict.fromkeys(EQUAL, 1.5)}
    text = table._drafters(found | {"settings": settings})
    assert "2.00×" not in text
    assert text.count("| none |") == 8 and text.count("**no**") == 3


def test_the_lookup_has_a_row_under_the_drafters():
    made = made_up(EQUAL)
    before = table.lookup(made)["1"]["speedup"]
    for i, draft in enumerate(made.drafts["dspark"]):
        faster = draft.record.dump()
        faster["summary"]["by_temperature"]["1"]["beside"]["lookup"]["speedup"] += 0.3
        made.drafts["dspark"][i] = Draft(Record.parse(faster, "faster"), draft.runs)
    found = table.make(made, table.published(PAPER / "published.yaml"))
    last = table._drafters(found | {"settings": {"heldout_tau": dict.fromkeys(EQUAL, 1.5)}}).splitlines()[-1]
    assert last.startswith("| lookup alone | no training |") and f"{before + 0.1:.2f}×" in last


def test_a_task_of_one_prompt_leaves_a_mean_over_tasks_without_an_interval():
    taus = Taus({"a": {"one": np.ones((2, 1, 2)), "many": np.ones((2, 9, 2))}})
    assert taus.tau(taus.drafters["a"], ["one", "many"]).bounds is None
    assert taus.tau(taus.drafters["a"], ["many"]).bounds is not None


def test_another_way_to_verify_that_changes_a_token_shows_no_speed_up():
    rows = [{"plain": run_of(20, 20, 2.0)} | {f"d/{way}": run_of(20, 10) for way in beyond.ways(4, 1.0)}] * 3
    ways = dict.fromkeys(beyond.ways(4, 1.0), True)
    found = beyond.summary({1.0: [rows]}, {"d": ways | {"tree, sampled": False}}, ["d"])
    speedups = {row["way"]: row["speedup"] for row in found}
    assert speedups.pop("tree, sampled") is None
    assert all(own["value"] == pytest.approx(2) for own in speedups.values())
    assert {row["against_standard"]["value"] for row in found} == {1}


def test_the_table_is_put_between_the_readmes_markers_and_nowhere_else():
    text = f"a\n{table.BEGIN}\nold\n{table.END}\nb\n"
    assert table.between(text, "new\n") == f"a\n{table.BEGIN}\n\nnew\n\n{table.END}\nb\n"
    with pytest.raises(DeepSpecError, match="no place for the table"):
        table.between("a\n", "new")


def test_the_readme_shows_the_table_that_was_made():
    made = PAPER / "reports/table1.md"
    if not made.exists():
        pytest.skip("paper/ has not been run")
    assert made.read_text() in (PAPER / "README.md").read_text()


def test_logits_of_survivals_give_the_survivals_back():
    chances = [0.9, 0.5, 0.1]
    (found,) = survival(np.array([conditional_logits(chances)]))
    assert found == pytest.approx(chances, abs=1e-4)


def test_confidence_is_judged_on_blocks_it_was_not_fitted_to():
    """Logits twice too sure in one half and honest in the other: each half gets the other's temperature."""
    rng = np.random.default_rng(0)

    def made(scale: float) -> Blocks:
        logits = rng.normal(0, 1.5, (4000, 1))
        accepted = (rng.random(4000) < 1 / (1 + np.exp(-logits[:, 0]))).astype(np.int64)
        return Blocks(scale * logits, accepted, np.ones(4000, dtype=np.int64))

    both_sure = confidence.judge({"math": (made(3.0), made(3.0))})["all"]["ece"]
    assert both_sure["after"] < both_sure["before"] / 2
    unlike = confidence.judge({"math": (made(3.0), made(1.0))})["all"]["ece"]
    assert unlike["after"] > both_sure["after"] * 2


def ablation(rounds: list[float]) -> dict[str, list[dict]]:
    """Of a draft in whose blocks cut to 1 … γ each of six prompts a task makes 60 tokens in so many rounds."""
    return {task: [prompt_of(60, rounds)] * 6 for task in TASKS}


ALL = {
    "eagle3_same_loss": ablation([40.0] * 7),
    "dflash_same_loss": ablation([40.0] * 7),
    "dspark_2": ablation([60.0, 50, 40, 40, 40, 40, 40]),
    "dspark_2_16": ablation([30.0] * 16),
    "rnn_2_16": ablation([30.0] * 15 + [24.0]),
}


def test_an_ablation_is_measured_against_the_first_seeds_draft_of_its_partner():
    of_seeds = {name: [[10] * 3, [90] * 3] for name in EQUAL}  # τ 2.25 and 10.25
    rows = {row["drafter"]: row for row in ablations.ratios(made_up(of_seeds, more=ALL))}
    assert rows["dspark_2"]["values"] == [2, 5]
    assert rows["dspark_2"]["ratio"]["value"] == pytest.approx(1.5 / 2.25)
    assert rows["dspark_2_16"]["ratio"]["value"] == pytest.approx(4 / 3)
    assert rows["rnn_2_16"]["ratio"]["value"] == pytest.approx(1.25)
    text = table._ablations(list(rows.values()))
    assert "| rnn_2_16 | markov_head rnn, not vanilla | 2.50" in text
    assert "| eagle3_same_loss | loss of `train`, not kl | 1.50" in text


def test_seeds_that_disagree_widen_the_interval_of_an_ablation():
    apart = EQUAL | {"dspark": [[10, 20, 30], [20, 30, 40]]}
    narrow, wide = (ablations.ratios(made_up(taus, more=ALL))[-1]["ratio"] for taus in (EQUAL, apart))
    assert narrow["high"] - narrow["low"] < 1e-9
    assert wide["low"] < 1.2 and wide["high"] > 1.3


def test_figures_3_and_4_show_ablations_beside_the_tables_drafters():
    study = made_up({name: [[7, 7, 7]] * 2 for name in EQUAL}, more=ALL)
    depth = {(row["drafter"], row["layers"]): row["tau"] for row in figures.depth(study)}
    assert depth == pytest.approx(
        {("EAGLE-3", 1): 1.95, ("DFlash", 5): 1.95, ("DSpark", 5): 1.95, ("DSpark", 2): 1.5}
    )
    lengths = {(row["drafter"], row["length"]): row["tau"] for row in figures.lengths(study)}
    assert (lengths["rnn_2_16", 16], lengths["dspark_2", 1]) == (2.5, 1)
    assert len([name for name, _ in lengths if name == "dspark"]) == 7


def test_figure_2_is_of_the_rounds_in_which_all_before_stood():
    study = made_up({name: [[10, 20, 30]] * 2 for name in EQUAL}, prompts=4)
    rows = [
        row for row in figures.acceptance(study) if row["drafter"] == "DSpark" and row["domain"] == "chat"
    ]
    assert [row["reached"] for row in rows] == [40, 20]  # of fewer in a seed none is drawn
    assert {(row["low"], row["rate"], row["high"]) for row in rows} == {(0.5, 0.5, 0.5)}


def test_expected_rounds_of_a_prompt_are_summed_over_its_answers():
    """All stand in the first answer of 8 tokens, none in the second of 3."""
    found = expected.summed([torch.ones(8, 3), torch.zeros(3, 3)])
    assert found["tokens"] == 11
    assert found["rounds"] == [4 + 3, 3 + 3, 2 + 3]
    assert found["reached"] == [2 + 2, 2, 2] and found["stood"] == [2, 2, 2]


def test_a_share_of_few_is_not_drawn():
    rows = [{"rate": 0.5, "reached": 100}, {"rate": 1.0, "reached": 1}, {"rate": 0.0, "reached": 20}]
    half, none = figures.drawn(rows, "rate", "reached")
    assert (half["low"], half["high"]) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # Wilson 1927
    assert (none["low"], none["high"]) == pytest.approx((0.0, 0.1611), abs=1e-4)
