"""A DeepSpeed that lacks one of its undocumented names is rejected by that name, before or in `prepare`."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import disttrain
from disttrain.errors import LaunchError
from disttrain.strategy.deepspeed import deepspeed_internals as internals

QUIET = ["report.progress=false", "report.plot=false", "report.trackers=[]", "run.device=cpu"]
FOLDER = Path(internals.__file__).parent
VERSION = "0.0"


def engine_at(folder: Path, stage: int, *options: str) -> disttrain.Engine:
    config = {"run": {"dir": str(folder), "seed": 1, "steps": 2}}
    return disttrain.Engine(config, [*QUIET, "strategy.name=deepspeed", f"strategy.deepspeed.stage={stage}", *options])


def prepare(engine: disttrain.Engine) -> nn.Module:
    return engine.prepare("model", lambda: nn.Linear(3, 2), lambda own: torch.optim.Adam(own, lr=0.1))


@contextmanager
def missing(owner: Any, name: str) -> Iterator[None]:
    """Inside the context `owner` has no attribute of that dotted name, wherever it is defined."""
    *path, last = name.split(".")
    holder = reduce(getattr, path, owner)
    kind = holder if isinstance(holder, type) else type(holder)
    if last in getattr(holder, "__dict__", {}) and not isinstance(holder, type):
        place: Any = holder
    else:
        place = next(one for one in kind.__mro__ if last in vars(one))
    kept = vars(place)[last]
    delattr(place, last)
    try:
        yield
    finally:
        setattr(place, last, kept)


@contextmanager
def initialized(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The engines that DeepSpeed makes inside the context."""
    deepspeed: Any = importlib.import_module("deepspeed")
    found: list[Any] = []
    initialize = deepspeed.initialize

    def noted(**arguments: Any) -> Any:
        made = initialize(**arguments)
        found.append(made[0])
        return made

    with monkeypatch.context() as patch:
        patch.setattr(deepspeed, "initialize", noted)
        yield found


@pytest.mark.parametrize(
    ("stage", "options"), [(1, []), (2, ["strategy.deepspeed.offload=cpu"]), (3, [])], ids=["1", "2-offload", "3"]
)
def test_each_missing_name_of_an_optimizer_is_named(
    stage: int, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_at(tmp_path, stage, *options) as engine, initialized(monkeypatch) as engines:
        model = prepare(engine)
        zero, parameters = engines[0].optimizer, list(model.parameters())

        def probe() -> None:
            internals.probe_optimizer(zero, parameters, stage=stage, version=VERSION)

        parameter: Any = parameters[0]
        owners: list[tuple[Any, tuple[str, ...]]] = [(zero, internals.OPTIMIZER_NAMES)]
        if stage == 3:
            coordinator = zero.parameter_offload.get_param_coordinator()
            owners += [(zero, internals.STAGE_3_NAMES), (coordinator, internals.COORDINATOR_NAMES)]
            owners += [(parameter, internals.STAGE_3_PARAMETER_NAMES)]
        else:
            owners += [(zero, internals.STAGES_1_AND_2_NAMES), (parameter._hp_mapping, internals.MAPPING_NAMES)]
            owners += [(parameter, internals.STAGES_1_AND_2_PARAMETER_NAMES)]
        if stage < 3 and options:
            owners += [(zero, internals.STAGES_1_AND_2_OFFLOAD_NAMES)]
        probe()
        for owner, names in owners:
            for name in names:
                with missing(owner, name), pytest.raises(LaunchError) as caught:
                    probe()
                message = str(caught.value)
                assert f"DeepSpeed {VERSION} has no " in message and f".{name}\n" in message
                assert message.startswith("Cannot use strategy deepspeed")
        probe()


@pytest.mark.parametrize(("stage", "name"), [(1, "update_lp_params"), (3, "grad_position")])
def test_prepare_rejects_the_strategy(stage: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed: Any = importlib.import_module("deepspeed")
    initialize = deepspeed.initialize

    def lacking(**arguments: Any) -> Any:
        made = initialize(**arguments)
        zero = made[0].optimizer
        place = zero if name in vars(zero) else type(zero)
        monkeypatch.delattr(place, name)
        return made

    monkeypatch.setattr(deepspeed, "initialize", lacking)
    with pytest.raises(LaunchError, match=rf"has no \w+\.{name}\n"), engine_at(tmp_path, stage) as engine:
        prepare(engine)


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in internals.PACKAGE_NAMES.items() for name in names]
)
def test_a_missing_name_of_the_package_is_named_before_the_process_group(
    module: str, name: str, tmp_path: Path
) -> None:
    with (
        missing(importlib.import_module(module), name),
        pytest.raises(LaunchError, match=rf"has no {module}\.{name}\n"),
    ):
        engine_at(tmp_path, 2)
    assert not torch.distributed.is_initialized()


def trained(folder: Path) -> torch.Tensor:
    with engine_at(folder, 3) as engine:
        prepare(engine)
        data = torch.utils.data.TensorDataset(torch.arange(24.0).view(8, 3))
        for step in engine.batches(data, global_batch=4, micro_batch=2):
            engine.accumulate("model", step, lambda model, batch: (model(batch[0]).square().sum(), len(batch[0])))
            engine.step()
            engine.log()
            if engine.should_stop():
                break
        return engine.full_weights("model")["weight"]


def test_public_partitioning_trains_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = importlib.import_module("deepspeed").zero.Init
    expected = trained(tmp_path / "private")
    real = init.__init__
    converted = init._convert_to_zero_parameters

    def built(self: Any, *args: Any, module: Any = None, **more: Any) -> None:
        """Like DeepSpeed's, where only the constructor knows the private function."""
        with monkeypatch.context() as patch:
            patch.setattr(init, "_convert_to_zero_parameters", converted, raising=False)
            real(self, *args, module=module, **more)

    monkeypatch.setattr(init, "__init__", built)
    monkeypatch.delattr(init, "_convert_to_zero_parameters")
    assert torch.equal(trained(tmp_path / "public"), expected)


def test_stage_three_leaves_torchs_linear_function_in_place(tmp_path: Path) -> None:
    before = torch.nn.functional.linear
    with engine_at(tmp_path, 3) as engine:
        prepare(engine)
        assert torch.nn.functional.linear is not before
    assert torch.nn.functional.linear is before


class Hollow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line, self.nothing = nn.Linear(3, 1), nn.Parameter(torch.zeros(0, 3))


def test_a_parameter_without_elements_is_saved_and_loaded(tmp_path: Path) -> None:
    for steps in (1, 2):
        with engine_at(tmp_path, 2, f"run.steps={steps}") as engine:
            engine.prepare("model", Hollow, lambda own: torch.optim.Adam(own, lr=0.1))
            data = torch.utils.data.TensorDataset(torch.ones(4, 3))
            for step in engine.batches(data, global_batch=4):
                engine.accumulate("model", step, lambda model, batch: (model.line(batch[0]).sum(), len(batch[0])))
                engine.step()
                engine.log()
                if engine.should_stop():
                    break
            engine.finish()
            assert engine.progress.steps == steps


def attributes(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Every `owner.name` in the source, with the owner's text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node.value), node.attr


def test_the_probe_knows_every_name_that_is_used() -> None:
    known = {*internals.OPTIMIZER_NAMES, *internals.STAGES_1_AND_2_NAMES, *internals.STAGES_1_AND_2_OFFLOAD_NAMES}
    known |= {*internals.STAGE_3_NAMES, *internals.STAGES_1_AND_2_PARAMETER_NAMES, *internals.STAGE_3_PARAMETER_NAMES}
    known |= {*internals.MAPPING_NAMES, *internals.COORDINATOR_NAMES}
    parts = {part for name in known for part in name.split(".")} | {"zero_grad"}  # as torch's optimizers have it
    public = {"shape", "values", "zero_"}  # of tensors and dictionaries
    used = {
        name
        for owner, name in attributes(ast.parse(Path(internals.__file__).read_text()))
        if owner.split(".")[0] in ("zero", "mapping", "coordinator", "parameter")
    }
    assert used <= parts | public
    assert len(used) > 30


def test_no_other_module_uses_a_private_name() -> None:
    for path in sorted(FOLDER.glob("*.py")):
        if path.name == Path(internals.__file__).name:
            continue
        for owner, name in attributes(ast.parse(path.read_text())):
            private = name.startswith(("_", "ds_")) and not name.startswith("__")
            assert not private or owner in ("self", "super()"), f"{path.name}: {owner}.{name}"
