"""DeepSpeed beyond plain ZeRO in float32: offload, shard-by-shard construction, a native JSON, other precisions."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.engine_runs import QUIET, STRATEGIES, train_all, train_one, worst
from contract.test_user_models import SOURCE, YAML, expected, user_module
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from world import run_world

import disttrain
from disttrain.errors import ConfigError, LaunchError

OFFLOAD = ["strategy.deepspeed.offload=cpu"]
PARAMETERS = ["strategy.deepspeed.offload_parameters=cpu"]
STEADY = ["model.args={sometimes: false}"]
"""The awkward model uses its parameters on all ranks: tied, frozen, never used and used in some micro-batches only."""


@pytest.fixture
def awkward(tmp_path: Path) -> Path:
    shutil.copy(SOURCE, tmp_path / "user_models.py")
    (tmp_path / "awkward.yaml").write_text(YAML.format(model="Awkward"))
    return tmp_path / "awkward.yaml"


@pytest.mark.parametrize("size", [1, 3, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 4))])
def test_offload_on_a_cpu_equals_a_plain_loop(size: int, awkward: Path) -> None:
    steady = STEADY if size > 1 else []
    cases = {name: [*STRATEGIES[name], *OFFLOAD, *steady] for name in ("zero1", "zero2")}
    cases["zero3"] = [*STRATEGIES["zero3"], *OFFLOAD, *PARAMETERS, *steady]
    plain = expected("Awkward", torch.float32, **({"sometimes": False} if steady else {}))
    for name, run in run_world(size, train_all, awkward, awkward.parent / "runs", cases)[0].items():
        assert worst(run["losses"], plain["losses"]) < 1e-5, name
        assert worst(run["norms"], plain["norms"]) < 1e-5, name


def train_in_turn(config: Path, turns: Sequence[Sequence[str]]) -> list[float]:
    """One run that each strategy continues in turn. Returns all losses."""
    losses: list[float] = []
    for overrides in turns:
        where = [f"run.dir={config.parent / 'runs'}", "checkpoint.at_end=true"]
        with disttrain.Engine(config, [*QUIET, *where, *overrides]) as engine:
            engine.prepare("model")
            engine.resume()
            losses += train_one(engine)["losses"]
            engine.finish()
    return losses


def test_checkpoints_load_with_and_without_offload(awkward: Path) -> None:
    turns = [
        [*STRATEGIES["zero3"], *OFFLOAD, *PARAMETERS, *STEADY, "run.steps=2"],
        [*STRATEGIES["ddp"], *STEADY, "run.steps=4"],
        [*STRATEGIES["zero2"], *OFFLOAD, *STEADY, "run.steps=6"],
        [*STRATEGIES["zero3"], *STEADY, "run.steps=8"],
    ]
    plain = expected("Awkward", torch.float32, sometimes=False)
    assert worst(run_world(2, train_in_turn, awkward, turns)[0], plain["losses"]) < 1e-5


SKIPPED = 3


def weightless_at_times(model: Any, batch: Any, context: Any) -> Any:
    """A user's loss with one step that has a gradient and no weight."""
    total, weight = user_module().token_loss(model, batch)
    return total, weight * (context.step != SKIPPED)


def train_with_a_skip(config: Path, cases: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, overrides in cases.items():
        where = [f"run.dir={config.parent / 'runs'}", f"run.name={name}"]
        with disttrain.Engine(config, [*QUIET, *overrides, *where]) as engine:
            engine.prepare("model")
            found[name] = train_one(engine, weightless_at_times)
    return found


def test_a_skipped_step_leaves_nothing_behind(awkward: Path) -> None:
    cases = {name: [*STRATEGIES[name], *STEADY] for name in ("ddp", "zero1", "zero2", "zero3")}
    cases |= {f"{name}-offload": [*STRATEGIES[name], *OFFLOAD, *STEADY] for name in ("zero1", "zero2", "zero3")}
    found = run_world(2, train_with_a_skip, awkward, cases)[0]
    plain = found.pop("ddp")
    assert plain["losses"][SKIPPED] == 0.0 and plain["norms"][SKIPPED] is None
    for name, run in found.items():
        assert worst(run["losses"], plain["losses"]) < 1e-5, name
        kept = [step for step in range(len(plain["norms"])) if step != SKIPPED]
        assert worst([run["norms"][k] for k in kept], [plain["norms"][k] for k in kept]) < 1e-5, name


GPT = """
version: 1
run: {{seed: 3, steps: {steps}, name: gpt, device: cpu}}
model: {{target: gpt, args: {{layers: {layers}, width: {width}, heads: 4, context: 32, vocab: 256}}}}
objective: {{target: next_token}}
data:
  train: {{target: byte_text, args: {{source: python-stdlib, split: train, context: 32}}}}
  global_batch: 8
  micro_batch: 2
optim: {{target: torch.optim.AdamW, args: {{lr: 0.003}}, clip_norm: 1.0}}
checkpoint: {{at_end: false}}
"""


def gpt(folder: Path, *, steps: int = 20, layers: int = 2, width: int = 64) -> Path:
    (folder / "gpt.yaml").write_text(GPT.format(steps=steps, layers=layers, width=width))
    return folder / "gpt.yaml"


def construction_peak(config: Path) -> tuple[int, int, int]:
    """Peak bytes while a ZeRO 3 model is built, bytes of all its parameters, and bytes of its largest one."""
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with disttrain.Engine(config, [*QUIET, *STRATEGIES["zero3"], f"run.dir={config.parent / 'runs'}"]) as engine:
        deepspeed: Any = importlib.import_module("deepspeed")
        initialize = deepspeed.initialize

        def built(**arguments: Any) -> Any:
            profiler.stop()
            return initialize(**arguments)

        deepspeed.initialize = built
        profiler.start()
        engine.prepare("model")
        deepspeed.initialize = initialize
        sizes = [value.numel() * value.element_size() for value in engine.full_weights("model").values()]
    live = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, sum(sizes), max(sizes)


def test_a_model_with_init_weights_is_never_complete_on_a_rank(tmp_path: Path) -> None:
    peak, whole, largest = run_world(4, construction_peak, gpt(tmp_path, layers=8, width=128))[0]
    # The rank's quarter, and for one tensor: the drawn value, the copy that is split, and its part. On a busy machine
    # the peak also includes memory that gloo's threads free last, which the profiler does not see.
    assert whole / 4 < peak < whole / 2, (peak, whole, largest)
    assert 2.5 * largest < whole / 4


# One bf16 rounding is 2^-9 = 2e-3 of a value. A loss is a mean over 256 tokens. A norm sums the roundings of all
# layers.
LOSS_BOUND, NORM_BOUND = 2e-3, 5e-2


def test_precisions_have_the_same_meaning_as_elsewhere(tmp_path: Path) -> None:
    """Mixed: bf16 products over fp32 parameters, like ddp. Pure: bf16 everywhere. First weights equal those of fp32."""
    mixed, pure = ["precision.compute=bf16"], ["precision.compute=bf16", "precision.master=bf16"]
    cases = {"fp32": STRATEGIES["ddp"], "ddp": [*STRATEGIES["ddp"], *mixed]}
    for name in ("zero1", "zero2", "zero3"):
        cases[name] = [*STRATEGIES[name], *mixed]
    cases["reduced"] = [*STRATEGIES["zero2"], *mixed, "precision.reduce=bf16"]
    cases["native"] = [
        *STRATEGIES["zero2"],
        "strategy.deepspeed.native={gradient_clipping: 1.0, bf16: {enabled: auto}}",
    ]
    cases["pure1"] = [*STRATEGIES["zero1"], *pure]
    cases["pure3"] = [*STRATEGIES["zero3"], *pure]
    found = run_world(2, train_all, gpt(tmp_path, steps=8), tmp_path / "runs", cases)[0]
    exact = found.pop("fp32")
    assert worst(found["native"]["losses"], exact["losses"]) < 1e-5
    assert worst(found.pop("native")["norms"], exact["norms"]) < 1e-5
    for name, run in found.items():
        assert run["losses"] != exact["losses"], name
        bound = 10 * LOSS_BOUND if name.startswith("pure") else LOSS_BOUND
        assert worst(run["losses"], exact["losses"]) < bound, name
        if not name.startswith("pure"):
            assert worst(run["norms"], exact["norms"]) < NORM_BOUND, name
            for key, value in exact["first"].items():
                assert (run["first"][key] == value).all(), (name, key)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (
            ["strategy.deepspeed.stage=3", "strategy.deepspeed.offload=nvme", "strategy.deepspeed.nvme_path=/tmp"],
            None,
            "nvme",
        ),
        (["precision.compute=fp16"], LaunchError, "fp16"),
        (
            [
                "strategy.deepspeed.native={gradient_accumulation_steps: 2, train_batch_size: 8, "
                "train_micro_batch_size_per_gpu: 2}"
            ],
            ConfigError,
            "2 rank(s), in a world of 1",
        ),
    ],
)
def test_impossible_settings_are_rejected_before_the_group(
    options: list[str], error: Any, says: str, tmp_path: Path
) -> None:
    with pytest.raises(error or (LaunchError, ConfigError)) as caught:
        disttrain.Engine(gpt(tmp_path), [*QUIET, f"run.dir={tmp_path}", "strategy.name=deepspeed", *options])
    assert says in str(caught.value)
    assert not torch.distributed.is_initialized()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 needs a CUDA device")
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_fp16_scales_its_loss_and_skips_what_overflows(name: str, tmp_path: Path) -> None:
    options = [*STRATEGIES[name], "run.device=cuda"]
    cases = {"fp32": options, "fp16": [*options, "precision.compute=fp16"]}
    found = run_world(1, train_all, gpt(tmp_path), tmp_path / "runs", cases)[0]
    applied = [norm is not None for norm in found["fp16"]["norms"]]
    assert sum(applied) >= 15  # the first scales may overflow: each overflow skips a step and is counted
    assert abs(found["fp16"]["losses"][-1] - found["fp32"]["losses"][-1]) < 0.3


class Tied(nn.Module):
    """One weight in two modules, each called twice; a parameter of the root module; a list of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.lines[1].weight = self.lines[0].weight
        self.own = nn.Parameter(torch.ones(6))
        self.more = nn.ParameterList([torch.full((1, 6), 0.1) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            for line in self.lines:
                x = x + 0.3 * torch.tanh(line(x)) * self.own + self.more[0]
        return x + self.more[1].mean()


def averaged(folder: Path, name: str, strategy: str, stop_at: int) -> list[float]:
    """A loop that reads all weights after every step, like one that averages weights."""
    config = {"run": {"name": name, "dir": str(folder), "seed": 1, "steps": 6}}
    losses = []
    with disttrain.Engine(config, [*QUIET, *STRATEGIES[strategy]]) as engine:
        engine.prepare("model", Tied, lambda own: torch.optim.Adam(own, lr=0.01))
        x = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
        squares = lambda model, batch: (model(batch[0]).square().sum(), len(batch[0]))  # noqa: E731
        for step in engine.batches(torch.utils.data.TensorDataset(x), global_batch=8, micro_batch=2):
            losses.append(engine.accumulate("model", step, squares).loss)
            engine.step()
            engine.log()
            assert torch.equal(engine.full_weights()["lines.0.weight"], engine.full_weights()["lines.1.weight"])
            if engine.should_stop() or engine.progress.steps == stop_at:
                break
    return losses


def test_stage_three_continues_when_all_weights_are_read_after_each_step(tmp_path: Path) -> None:
    expected = run_world(1, averaged, tmp_path, "whole", "none", 6)[0]
    run_world(2, averaged, tmp_path, "run", "zero3", 2)
    assert worst(run_world(2, averaged, tmp_path, "run", "zero3", 6)[0], expected[2:]) < 1e-5


class Hollow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line, self.nothing = nn.Linear(3, 1), nn.Parameter(torch.zeros(0, 3))


def test_an_empty_parameter_is_rejected_by_stage_three_only(tmp_path: Path) -> None:
    for strategy in ("zero3", "zero2"):
        engine = disttrain.Engine({"run": {"name": strategy, "dir": str(tmp_path)}}, [*QUIET, *STRATEGIES[strategy]])
        try:
            engine.prepare("model", Hollow, lambda own: torch.optim.SGD(own, lr=0.1))
        except ConfigError as error:
            assert strategy == "zero3" and "empty parameters: nothing" in str(error)
        else:
            assert strategy == "zero2"
        finally:
            engine.close()
