"""Two prepared models in one loop equal a plain loop: gradients flow through the other and are not stored in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from contract.engine_runs import QUIET, STRATEGIES, strategies_at, to_numpy, worst
from contract.test_user_models import user_module
from world import run_world

import disttrain
from disttrain.data import Order

SEED, STEPS, BATCH = 3, 10, 8


def train_gans(folder: Path, names: list[str], micro_batch: int) -> dict[str, Any]:
    return {name: train_gan(folder / name, STRATEGIES[name], micro_batch) for name in names}


def train_gan(folder: Path, overrides: list[str], micro_batch: int) -> dict[str, Any]:
    user = user_module()
    config = {"run": {"name": "gan", "dir": str(folder), "seed": SEED, "steps": STEPS}}
    with disttrain.Engine(config, [*QUIET, *overrides]) as engine:
        adam = lambda parameters: torch.optim.Adam(parameters, lr=0.02, betas=(0.5, 0.9))  # noqa: E731
        generator = engine.prepare("generator", user.Generator, adam)
        critic = engine.prepare("discriminator", user.Discriminator, adam)

        def judge(model: Any, batch: Any) -> Any:
            real, noise = batch
            with torch.no_grad():
                fake = generator(noise)
            return F.softplus(-model(real)).sum() + F.softplus(model(fake)).sum(), len(real)

        def deceive(model: Any, batch: Any) -> Any:
            return F.softplus(-critic(model(batch[1]))).sum(), len(batch[1])

        first = {name: to_numpy(engine.full_weights(name)) for name in ("generator", "discriminator")}
        losses: list[float] = []
        for micro_batches in engine.batches(user.Vectors(), global_batch=BATCH, micro_batch=micro_batch):
            for name, objective in (("discriminator", judge), ("generator", deceive)):
                losses.append(engine.accumulate(name, micro_batches, objective).loss)
                engine.step(name)
            engine.log()
            if engine.should_stop():
                break
        engine.save()
        last = {name: to_numpy(engine.full_weights(name)) for name in first}
        return {"losses": losses, "first": first, "last": last}


def plain_gan(first: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    user = user_module()
    generator, critic = user.Generator(), user.Discriminator()
    for model, name in ((generator, "generator"), (critic, "discriminator")):
        model.load_state_dict({key: torch.from_numpy(value) for key, value in first[name].items()})
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.02, betas=(0.5, 0.9)) for m in (critic, generator)]
    data, losses = user.Vectors(), []
    order = Order(len(data), SEED)
    for step in range(STEPS):
        epoch, position = divmod(step * BATCH, len(data))
        real, noise = (
            torch.stack(part) for part in zip(*[data[i] for i in order.indices(epoch, position, BATCH)], strict=True)
        )
        loss = (F.softplus(-critic(real)) + F.softplus(critic(generator(noise).detach()))).mean()
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        losses.append(float(loss.detach()))
        loss = F.softplus(-critic(generator(noise))).mean()
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        losses.append(float(loss.detach()))
    return losses, {**generator.state_dict(), **{f"d.{key}": value for key, value in critic.state_dict().items()}}


@pytest.mark.parametrize(
    ("size", "micro_batch"),
    [pytest.param(1, 8, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow), (3, 2)],
)
def test_equals_its_plain_loop(size: int, micro_batch: int, tmp_path: Path) -> None:
    for name, run in run_world(size, train_gans, tmp_path, strategies_at(size), micro_batch)[0].items():
        losses, last = plain_gan(run["first"])
        assert worst(run["losses"], losses) < 2e-5, name
        for key, value in run["last"]["generator"].items():
            torch.testing.assert_close(torch.from_numpy(value), last[key], rtol=1e-4, atol=1e-5, msg=f"{name} {key}")
