"""tune: runs real passes under several plans, keeps one, and later loads use it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from overflowml_core import planning, session
from overflowml_core.cli.tuning import tuner
from overflowml_core.cli.tuning.neighbours import Neighbourhood
from overflowml_core.cli.tuning.tuner import Outcome
from overflowml_core.cli.tuning.watching import PassClock, Ran, WatchedContest, fastest, heaviest, merged, what_of
from overflowml_core.facts import Limits, Tier, Workload
from overflowml_core.measured import MeasuredPass
from overflowml_core.plan import PhasePlan, Plan
from overflowml_core.tuned import Tried, Tuned, read_tuned, tuned_folder
from tests.cli.conftest import Planned
from tests.planner.build import GIB, llm, machine

BUDGET = ("--budget", "12MB", "--reserve", "1MB")


@pytest.fixture(scope="module")
def profiles(tmp_path_factory) -> Path:
    """One cache folder for all tests here: models are profiled once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(profiles, monkeypatch) -> None:
    monkeypatch.setenv("OVERFLOWML_CACHE", str(profiles))
    shutil.rmtree(tuned_folder(), ignore_errors=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, vocab_size=1000
    )
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_what_was_tuned_is_used_by_the_next_load_until_it_is_forgotten(run, folder, caplog):
    import transformers

    status, out, err = run("tune", folder, *BUDGET, "--seconds", "0.7", "--json")
    assert (status, "Error" in err) == (0, False)
    document = json.loads(out)
    tried = document["tried"]
    assert document["pass"] == "token"
    assert len(tried) >= 1
    assert all(one["measured_pass_s"] > 0 for one in tried)
    kept = read_tuned(Path(document["file"]))
    assert kept.plan.fingerprint == document["plan_fingerprint"]
    assert what_of(kept.plan) == tried[document["kept"]]["what"]
    with caplog.at_level(logging.INFO, "overflowml"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, overflow=Limits("12MB", None, "1MB"))
    attached = session.attachment(model)
    assert attached.plan.phases == kept.plan.phases
    assert "tuned on" in caplog.text
    session.release(model)
    assert "tuned on" in run("plan", folder, "--vram", "12MB", "--reserve", "1MB")[1]
    assert json.loads(run("tune", folder, "--forget", "--json")[1]) == {"removed": 1}
    assert "tuned on" not in run("plan", folder, "--vram", "12MB", "--reserve", "1MB")[1]
    assert run("tune", "--forget")[1] == "removed 0 tuned plans\n"


def test_a_table_for_people(run, folder, monkeypatch):
    def measured(request, plan, *_):
        tried = (Tried("stream", "1 of 6 blocks resident", None, 0.2), Tried("stream", "0 of 6 blocks resident", 0.125, 0.1))
        return Outcome(Tuned(plan, "token", tried, 1, 1.7e9), Path("/corrected.json"))

    monkeypatch.setattr(tuner, "tune", measured)
    status, out, _ = run("tune", folder, *BUDGET)
    lines = out.splitlines()
    assert status == 0
    assert lines[0] == "=== Plans that were run, seconds of a pass (token) ==="
    assert lines[1].split() == ["Strategy", "What", "is", "where", "Predicted", "Measured"]
    assert lines[2].split()[-3:] == ["?", "200", "ms"]
    assert lines[3].split()[-6:] == ["125", "ms", "100", "ms", "<-", "kept"]
    assert str(tuned_folder()) in out
    assert "/corrected.json" in out


def test_what_fits_has_nothing_to_tune(run, folder):
    status, out, _ = run("tune", folder, "--budget", "1GB")
    assert status == 0
    assert "fits as it is" in out
    assert json.loads(run("tune", folder, "--budget", "1GB", "--json")[1])["tried"] == []
    assert not tuned_folder().exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tune",), ["SOURCE"]),
        (("tune", "/no/such/folder"), ["/no/such/folder", "transformers"]),
        (("tune", "40GB"), ["40GB"]),
        (("tune", "FOLDER", "--budget", "lots"), ["--budget='lots'", "8GB"]),
        (("tune", "FOLDER", "--reserve", "-1"), ["--reserve='-1'"]),
        (("tune", "FOLDER", "--batch", "0"), ["batch=0"]),
        (("tune", "FOLDER", "--dtype", "bfloat61"), ["bfloat61"]),
        (("tune", "PART"), ["model_index.json"]),
    ],
)
def test_wrong_input_is_one_line_and_ends_with_2(run, folder, tmp_path, arguments, words):
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    places = {"FOLDER": folder, "PART": tmp_path}
    status, out, err = run(*(places.get(argument, argument) for argument in arguments))
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert all(word in err for word in words)


def test_what_does_not_fit_ends_with_1(run, folder):
    status, _, err = run("tune", folder, "--budget", "2MB", "--reserve", "100KB")
    assert status == 1
    assert "--budget" in err or "--vram" in err


def test_a_pipeline_runs_whole(run, tmp_path):
    df = pytest.importorskip("diffusers")
    unet = df.UNet2DModel(
        sample_size=8, block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3,
    )  # fmt: skip
    df.DDPMPipeline(unet, df.DDPMScheduler(num_train_timesteps=10)).save_pretrained(tmp_path / "ddpm")
    weights = sum(parameter.numel() * 4 for parameter in unet.parameters())
    budget = f"{weights * 3 // 4}B"
    status, out, _ = run("tune", tmp_path / "ddpm", "--budget", budget, "--reserve", "64KiB", "--steps", "3", "--seconds", "0.3", "--json")
    assert status == 0, out
    assert json.loads(out)["tried"][0]["measured_pass_s"] > 0


# ---- which plans are run, and which is kept

NETWORK, MACHINE = llm(layers=8), machine(4 * GIB)


def base() -> Plan:
    return planning.make_plan(NETWORK, Limits(quality="lossless"), Workload(), MACHINE)


class Decided:
    """A contest that is over after one pass."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.heard = plan, 0

    @property
    def components(self) -> frozenset[str]:
        return frozenset() if self.heard else frozenset({"model"})

    lessons: tuple[MeasuredPass, ...] = ()
    pass_s = None

    def hear(self, measured: MeasuredPass) -> Plan:
        self.heard += 1
        return self.plan

    def close(self) -> Plan:
        return self.plan

    def refuse(self, plan: Plan) -> None:
        self.plan = plan


def played(times_s: Sequence[float]) -> WatchedContest:
    """A contest that was told these times, one after the other."""
    contest = WatchedContest(Decided(base()), Neighbourhood(NETWORK, MACHINE, ()))
    for pass_s in times_s:
        assert contest.components == {"model"}
        contest.hear(MeasuredPass("model", 2, pass_s, 0.0, 0.0, ()))
    return contest


def test_neighbours_are_run_and_the_fastest_is_confirmed_beside_the_first():
    contest = played([4.0, 3.0, 2.0, 5.0, 5.0])
    assert contest.plan == contest.ran[2].plan  # once more
    contest.hear(MeasuredPass("model", 2, 2.1, 0.0, 0.0, ()))
    assert contest.plan == base()
    contest.hear(MeasuredPass("model", 2, 4.0, 0.0, 0.0, ()))
    assert contest.components == frozenset()
    assert what_of(contest.plan) == what_of(contest.ran[2].plan)
    assert contest.plan.check().estimate == contest.ran[2].plan.estimate
    assert contest.pass_s == 2.0
    assert len(merged(contest.ran)) == 5


def test_a_machine_that_was_busy_for_a_moment_does_not_choose():
    contest = played([4.0, 3.0, 2.0, 5.0, 5.0, 2.1])
    contest.hear(MeasuredPass("model", 2, 2.0, 0.0, 0.0, ()))  # the first was slow once
    assert contest.plan.phases == base().phases


def test_where_time_ends_the_fastest_so_far_stays():
    contest = played([4.0, 3.0, 2.0])
    assert what_of(contest.close()) == what_of(contest.ran[2].plan)
    assert contest.components == frozenset()


def test_a_plan_that_cannot_be_carried_out_ends_it():
    contest = played([4.0, 3.0])
    contest.refuse(base())
    assert (contest.components, contest.plan) == (frozenset(), base())


def test_less_than_three_percent_is_noise():
    plan = base()
    other = Neighbourhood(NETWORK, MACHINE, ()).splits(plan)[0]
    assert fastest([Ran(plan, "model", None, 1.0), Ran(other, "model", None, 0.98)]).plan is plan
    assert fastest([Ran(plan, "model", None, 1.0), Ran(other, "model", None, 0.96)]).plan is other


def test_neighbours_are_plans_for_the_same_limits_each_another_one():
    plan = base()
    others = Neighbourhood(NETWORK, MACHINE, ()).splits(plan)
    assert len({what_of(one) for one in [plan, *others]}) == len(others) + 1
    for one in others:
        assert one.check().limits == plan.limits
        assert (one.budget, one.network_fingerprint) == (plan.budget, plan.network_fingerprint)


def experts_of(phase: PhasePlan) -> list[Tier | None]:
    return [place.experts_home for place in phase.placements]


def test_experts_have_neighbours_with_less_cache_and_with_none(experts: Planned):
    plan, half, *rest = Neighbourhood(experts.network, experts.machine, ()).of_experts(experts.plan)
    assert plan is experts.plan
    assert half.phases[0].expert_cache_bytes == plan.phases[0].expert_cache_bytes // 2
    assert experts_of(half.phases[0]) == experts_of(plan.phases[0])
    assert half.estimate.token_s is None or half.estimate.token_s >= plan.estimate.token_s
    assert all(set(experts_of(phase)) == {None} for one in rest for phase in one.phases)


def test_the_clock_counts_passes_of_a_kind_that_follow_each_other(monkeypatch):
    torch = pytest.importorskip("torch")
    from overflowml_core.cli.tuning import watching

    now = [0.0]
    monkeypatch.setattr(watching.time, "perf_counter", lambda: now[0])
    module = torch.nn.Linear(2, 2)
    with PassClock(module) as clock:
        for rows, seconds in [(9, 5.0), (1, 1.0), (1, 9.0), (1, 2.0), (9, 5.0), (1, 2.0), (1, 2.0)]:
            module(torch.zeros(rows, 2))
            now[0] += seconds
        assert clock.pass_s() == 5.5  # of 1, 9 and 2 the second half, 9 and 2
    assert not module._forward_pre_hooks


def test_the_heaviest_component_is_named():
    plan = base()
    assert heaviest(plan) == "model"
    assert heaviest(replace(plan, phases=(replace(plan.phases[0], placements=()),))) == "model"
