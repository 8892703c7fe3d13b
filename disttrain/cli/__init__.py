"""`disttrain`: the commands around a run. Imports no torch until a command needs it. Enters: the shell."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from disttrain.cli.ckpt.commands import ckpt
from disttrain.errors import DisttrainError
from disttrain.logs import start_logs

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Check a config, read what a run came to, look after its checkpoints. "
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
    """Train in one process, or print the torchrun command for several processes."""
    from disttrain.cli.train import train_config

    train_config(config, overrides or [], processes=processes)


@app.command()
def check(
    config: str,
    overrides: _Overrides = None,
    as_json: _Json = False,
    imports: Annotated[bool, typer.Option("--import", help="Import the targets too, which runs their code.")] = False,
    accelerate: Annotated[
        str | None, typer.Option(metavar="FILE", help="Show what strategy.name=accelerate makes of accelerate's FILE.")
    ] = None,
) -> None:
    """Validate a config; print every value and where it came from."""
    from disttrain.cli.check import check_config

    raise typer.Exit(check_config(config, overrides or [], as_json=as_json, imports=imports, accelerate=accelerate))


@app.command()
def parity(
    config: str,
    overrides: _Overrides = None,
    as_json: _Json = False,
    strategies: Annotated[str | None, typer.Option(metavar="NAME,...", help="As ddp,fsdp,deepspeed:3; all.")] = None,
    case: Annotated[
        list[str] | None, typer.Option(metavar='"KEY=VALUE ..."', help="One more case, by its overrides; repeatable.")
    ] = None,
    world_sizes: Annotated[str, typer.Option(metavar="N,...", help="Numbers of processes.")] = "1,2",
    micro_batches: Annotated[
        str | None, typer.Option(metavar="N,...", help="For every case; the config's own.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each case.")] = 5,
    limit_s: Annotated[float, typer.Option("--limit-s", min=1.0, help="Time for each case, in seconds.")] = 300.0,
) -> None:
    """Prove that a config trains the same under every strategy and world size, or say what does not and why."""
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
    """Curves and tables of a run's folder."""
    from disttrain.cli.inspect_run import report_run

    report_run(run=run, as_json=as_json)


@app.command()
def sample(
    path: Annotated[str, typer.Argument(metavar="RUN_OR_CHECKPOINT")],
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "",
    length: Annotated[int, typer.Option("--bytes", min=1, help="How many bytes to write.")] = 400,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="What the draws are keyed by.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest byte.")] = 0.8,
) -> None:
    """Write text with a language model over bytes."""
    from disttrain.cli.inspect_run import sample_text

    sample_text(path=path, prompt=prompt, length=length, seed=seed, temperature=temperature)


@app.command("eval")
def evaluate(
    path: Annotated[str, typer.Argument(metavar="RUN_OR_CHECKPOINT")],
    overrides: _Overrides = None,
    as_json: _Json = False,
) -> None:
    """Evaluate on the config's evaluation sets."""
    from disttrain.cli.inspect_run import evaluate_run

    evaluate_run(path=path, overrides=overrides or [], as_json=as_json)


def main() -> None:
    """The console script: errors to stderr, their exit codes to the shell."""
    start_logs()
    try:
        app(prog_name="disttrain")
    except DisttrainError as error:
        print(f"error (exit {error.exit_code}): {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(1)
