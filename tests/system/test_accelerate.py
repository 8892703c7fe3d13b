"""`accelerate launch` as another way to start the processes: a real world of two, numbers of a world of one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from launched import PROJECT, column, launch, metrics, only_run, plain

STEPS = ("run.steps=20", "report.every=1", "report.progress=false", "eval.at_end=false")
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--main_process_port=0")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None,
    reason="accelerate is not installed: pip install disttrain[accelerate]",
)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_losses_equal_a_world_of_one(strategy: str, tmp_path: Path) -> None:
    config_file = PROJECT / "configs" / "accelerate" / "fsdp.yaml"
    run = ("-m", "disttrain.run", "configs/quickstart.yaml", *STEPS, f"strategy.name={strategy}")
    launch(*LAUNCH, f"--config_file={config_file}", *run, f"run.dir={tmp_path / 'two'}", timeout_s=300)
    plain("configs/quickstart.yaml", *STEPS, f"run.dir={tmp_path / 'one'}")
    two, one = only_run(tmp_path / "two"), only_run(tmp_path / "one")
    assert {line["world_size"] for line in metrics(two)} == {2}
    for key in ("loss", "grad_norm"):
        expected = column(one, key)
        assert sorted(expected) == list(range(1, 21))
        # 2e-5: float32 sums in another order over 20 steps of AdamW, the bound
        assert column(two, key) == pytest.approx(expected, rel=2e-5)
