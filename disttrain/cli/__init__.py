"""Defines the commands of `disttrain`. torch is imported only when a command needs it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from disttrain.cli.ckpt.commands import ckpt
from disttrain.errors import DisttrainError
from disttrain.logs import start_logs
from disttrain.runtime.imports import end_without_collection

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train, check a config, report on a run, and manage its checkpoints. "
    "To train in several processes: torchrun --nproc_per_node=N -m disttrain.run CONFIG",
)
app.add_typer(ckpt, name="ckpt")
_Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
_Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")]


@app.command()
def train(
    config: str,
    overrides: _Overrides = None,
    processes: Annotated[
        int | None,
        typer.Option("--processes", min=1, metavar="N", help="For N > 1, print the torchrun command and do not train."),
    ] = None,
) -> None:
    """Train in one process, or print the torchrun command for several."""
    from disttrain.cli.train import train_config

    train_config(config, overrides or [], processes=processes)


@app.command()
def check(
    config: str,
    overrides: _Overrides = None,
    as_json: _Json = False,
    imports: Annotated[bool, typer.Option("--import", help="Also import the targets, which runs their code.")] = False,
    accelerate: Annotated[
        str | None, typer.Option(metavar="FILE", help="Translate accelerate's FILE, as strategy.name=accelerate does.")
    ] = None,
) -> None:
    """Validate a config, and print every value and its source."""
    from disttrain.cli.check import check_config

    raise typer.Exit(check_config(config, overrides or [], as_json=as_json, imports=imports, accelerate=accelerate))


@app.command()
def parity(
    config: str,
    overrides: _Overrides = None,
    as_json: _Json = False,
    strategies: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Such as ddp,fsdp,deepspeed:3. Default: all.")
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(metavar='"KEY=VALUE ..."', help="An additional case by its overrides. Repeatable."),
    ] = None,
    world_sizes: Annotated[str, typer.Option(metavar="N,...", help="Numbers of processes.")] = "1,2",
    micro_batches: Annotated[
        str | None, typer.Option(metavar="N,...", help="For every case. Default: the config's.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each case.")] = 5,
    limit_s: Annotated[
        float, typer.Option("--limit-s", min=1.0, help="The time limit of each case in seconds.")
    ] = 300.0,
) -> None:
    """Compare training under every strategy and world size. Explain each difference."""
    from disttrain.cli.parity import check_parity

    code = check_parity(
        config,
        overrides or [],
        strategies=strategies,
        cases=case or [],
        world_sizes=world_sizes,
        micro_batches=micro_batches,
        steps=steps,
        limit_s=limit_s,
        as_json=as_json,
    )
    raise typer.Exit(code)


@app.command()
def report(run: str, as_json: _Json = False) -> None:
    """Print the curves and tables of a run's folder."""
    from disttrain.cli.report import report_run

    report_run(run=run, as_json=as_json)


@app.command()
def sample(
    path: Annotated[str, typer.Argument(metavar="RUN_OR_CHECKPOINT")],
    prompt: Annotated[str, typer.Option(help="The beginning of the text.")] = "",
    length: Annotated[int, typer.Option("--bytes", min=1, help="The number of bytes to generate.")] = 400,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The seed of the random numbers.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always selects the most likely byte.")] = 0.8,
) -> None:
    """Generate text with a language model over bytes."""
    from disttrain.cli.sample import sample_text

    sample_text(path=path, prompt=prompt, length=length, seed=seed, temperature=temperature)


@app.command("eval")
def evaluate(
    path: Annotated[str, typer.Argument(metavar="RUN_OR_CHECKPOINT")],
    overrides: _Overrides = None,
    as_json: _Json = False,
) -> None:
    """Evaluate a run or checkpoint on the evaluation sets of its config."""
    from disttrain.cli.evaluate import evaluate_run

    evaluate_run(path=path, overrides=overrides or [], as_json=as_json)


def main() -> None:
    """Run the console script. Errors go to stderr, and their exit codes to the shell."""
    start_logs()
    try:
        app(prog_name="disttrain")
    except DisttrainError as error:
        print(f"error (exit {error.exit_code}): {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(1)
    finally:
        end_without_collection()
