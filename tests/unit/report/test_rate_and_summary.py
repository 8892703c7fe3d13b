"""Rates with a manual clock; summaries and plots of runs of any shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from disttrain.report import Rate, RunFolder, plot_loss, render_summary, summarize_run
from disttrain.report.plot import shortened, smooth, write_head
from disttrain.report.rate import peak_flops


def test_rates_are_those_since_the_last_measure() -> None:
    now = [100.0]
    rate = Rate(device="cpu", parameters=1000, world_size=2, now=lambda: now[0])
    rate.start(samples=50, tokens=500, step=5)
    now[0] += 7.0
    rate.measure(samples=60, tokens=600, step=6)

    def batches() -> Iterator[str]:
        now[0] += 1.0
        yield "a batch"

    for batch in rate.loading(batches()):
        assert batch == "a batch"
        now[0] += 3.0
    found = rate.measure(samples=100, tokens=1000, step=10)
    assert found.pop("mem_peak_bytes") > 2**20
    assert found == {"step_time_s": 1.0, "data_time_s": 0.25, "samples_per_s": 10.0, "tokens_per_s": 100.0, "mfu": None}


def test_waiting_for_data_counts_even_if_it_raises() -> None:
    now = [0.0]
    rate = Rate(device="cpu", parameters=1, world_size=1, now=lambda: now[0])
    rate.start(samples=0, tokens=0, step=0)

    def batches() -> Iterator[str]:
        now[0] += 2.0
        raise KeyError
        yield "never"

    with pytest.raises(KeyError):
        next(rate.loading(batches()))
    assert rate.measure(samples=1, tokens=0, step=1)["data_time_s"] == 2.0


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GB200", 2500),
        ("NVIDIA RTX A1000 Laptop GPU", 0),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 0),
        ("NVIDIA GeForce GTX 1080", 0),
    ],
)
def test_peaks_are_looked_up_by_the_devices_name(name: str, tera: float) -> None:
    assert peak_flops(name) == tera * 1e12


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.integers(0, 50))
def test_smoothing_is_a_mean_over_a_window(values: list[float], radius: int) -> None:
    for place, found in enumerate(smooth(values, radius)):
        reach = min(radius, place)
        window = values[place - reach : place + reach + 1]
        assert found == pytest.approx(sum(window) / len(window), abs=1e-9)


@given(st.text(max_size=60), st.integers(3, 60))
def test_a_long_name_keeps_both_ends_and_the_requested_length(name: str, most: int) -> None:
    found = shortened(name, most)
    assert len(found) == min(len(name), most)
    assert found == name or (found[0], found[-1]) == (name[0], name[-1])


def filled(path: Path, steps: int) -> RunFolder:
    folder = RunFolder(path)
    folder.append_ledger("segment", step=0, total_steps=steps)
    for step in range(1, steps + 1):
        line = {"step": step, "samples": step * 8, "tokens": 0, "loss": 4.0 / step, "lr": 1e-3, "strategy": "ddp"}
        folder.append_metrics(line | {"world_size": 2, "step_time_s": 0.5 if step > 1 else 9.0, "data_time_s": 0.05})
    folder.append_metrics({"step": steps, "eval/a/loss": 1.5, "eval/a/accuracy": 0.75})
    folder.write_status("finished", steps, 0, None)
    return folder


def test_a_summary_repeats_the_metrics(tmp_path: Path) -> None:
    summary = summarize_run(filled(tmp_path / "mine", 200))
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["run"], summary["state"], summary["step"], summary["total_steps"]) == ("mine", "finished", 200, 200)
    loss = summary["losses"]["loss"]
    assert (loss["first"], loss["last"], loss["best"], loss["best_step"]) == (4.0, 0.02, 0.02, 200)
    assert len(loss["curve"]) == 60
    assert summary["evaluation"] == {"eval/a/loss": 1.5, "eval/a/accuracy": 0.75}
    assert summary["rates"]["step_time_s"] == 0.5
    text = render_summary(summary)
    assert "mine: finished, step 200/200, ddp on 2 ranks, 1.6k samples" in text
    assert "500 ms per step (10% waiting for data)" in text
    assert "eval/a/accuracy  0.75" in text


def test_a_run_that_has_just_started_is_summarized(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new")
    folder.metrics.parent.mkdir()
    folder.metrics.touch()
    assert "no finite loss" in render_summary(summarize_run(folder))
    folder.append_metrics({"step": 1, "loss": float("nan"), "eval/a/loss": float("inf")})
    text = render_summary(summarize_run(folder))
    assert "not finite in 1 lines" in text


@pytest.mark.parametrize("steps", [1, 5, 200])
def test_a_plot_is_a_png_of_any_run(tmp_path: Path, steps: int) -> None:
    folder = filled(tmp_path, steps)
    plot_loss(folder.read_metrics(), folder.loss_png)
    assert folder.loss_png.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".loss*"))


@pytest.mark.parametrize("name", ["m" * 200, "i" * 200, "costs_$5_or_$\\frac{"])
def test_a_runs_name_does_not_overlap_its_neighbours(name: str) -> None:
    figure = Figure(figsize=(9, 5.4), dpi=160)
    FigureCanvasAgg(figure)
    write_head(figure, name, "ddp  ·  2 ranks  ·  800 steps")
    title, beside = figure.texts
    assert title.get_window_extent().x1 < beside.get_window_extent().x0
    assert len(title.get_text()) == len(name) or len(title.get_text()) > 30


def test_a_plot_without_data_is_drawn_too(tmp_path: Path) -> None:
    plot_loss([{"step": 1, "loss": float("nan")}], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000
