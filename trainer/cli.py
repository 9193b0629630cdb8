"""The command line: `toprope`, or `python -m trainer`, and a verb.

Heavy imports are inside the commands, so that `--help` and a mistyped config answer at once.
"""

import json
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer import builtin, torch_versions
from trainer.errors import EXIT_FAILED, EXIT_FINISHED, NewerFormatError, TopropeError, UsageError, of_system
from trainer.parallel import elastic
from trainer.parallel.membership import RefusedError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from trainer.checkpoint import Saved
    from trainer.fleet.slurm import SlurmJobs
    from trainer.launch import slurm

PROCESS_STARTED = time.time()

app = typer.Typer(
    name="trainer",
    help="toprope: small GPT pretraining that ends with the same bits whatever happens on the way.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _file(metavar: str, what: str, folder: str = "", option: bool = False) -> Any:
    """Return the argument, or option, of a command for a file or the name of one in a folder of configs/."""
    known = ", ".join(builtin.names(folder))

    def find(given: Path | None) -> Path | None:
        return given and builtin.find(given, folder)

    return (typer.Option if option else typer.Argument)(
        metavar=metavar, help=f"{what}, or a built-in one: {known}.", callback=find
    )


ConfigPath = Annotated[Path, _file("CONFIG", "A TOML config")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, e.g. runs/gpt_tiny.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
RunOption = Annotated[Path | None, typer.Option(help="Directory to start in or resume; default runs/CONFIG's name.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; the value is TOML or plain text."),
]
AcceptOtherBits = Annotated[bool, typer.Option("--accept-other-bits", help="Resume with other code, torch or machine.")]
SlurmOptions = Annotated[
    list[str] | None, typer.Option("--slurm", metavar="KEY=VALUE", help="Option of sbatch: partition=gpu.")
]
LIMIT, NOTICE_SECONDS = "1:00:00", 120
ANY_PORT = "127.0.0.1:0"
"""Address where `launch` listens if it is not told: for processes of this machine."""
TimeLimit = Annotated[str, typer.Option("--time", help="Limit of each start, as Slurm takes it.")]
Notice = Annotated[int, typer.Option(help="Seconds before the limit at which a run saves and leaves.")]
Before = Annotated[
    list[str] | None, typer.Option(metavar="LINE", help="Shell line that prepares a job: 'module load …'.")
]
NodesPython = Annotated[
    str, typer.Option("--python", metavar="WORDS", help="Starts Python on a node; default this one.")
]
Parent = Annotated[
    str, typer.Option("--from", metavar="RUN[@STEP]", help="Begin from a state of this run; default its newest.")
]


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that has none of the files yet.")],
) -> None:
    """Write a config, a ladder, a campaign and a README to start from. Nothing is overwritten."""
    from trainer import config as configs
    from trainer.show import terminal

    written = builtin.start(directory, json.dumps(configs.json_schema(), indent=1))
    print("\n".join(map(str, written)))
    print(f"next  cd {shlex.quote(str(directory))} && python -m trainer train train.toml")
    terminal.check()


@app.command()
def schema() -> None:
    """Print the JSON schema of a config, for editors: every setting with its type, default and description."""
    from trainer import config as configs

    _print_json(configs.json_schema())


@app.command()
def train(
    config_path: ConfigPath,
    run: RunOption = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print sizes and costs, train nothing.")] = False,
    ranks: Annotated[int | None, typer.Option(min=1, help="World size that --dry-run divides memory by.")] = None,
    accept: AcceptOtherBits = False,
    parent: Parent = "",
) -> None:
    """Train a config, or resume the run where it stopped. Under torchrun: on all its ranks."""
    from trainer import config as configs
    from trainer import signals

    config = configs.load(config_path, overrides or ())
    if dry_run:
        from trainer import costs, data
        from trainer.faults import plan as faultplan
        from trainer.log import rundir

        configs.check_world(config, ranks or 1)
        for note in data.check(config.data, config.eval, config.model.context):
            print(f"note: {note}", file=sys.stderr)
        if run is not None:
            rundir.check(run, config)
        if parent:
            from trainer import branch

            branch.find(parent, config)
        if ranks is not None:  # without a number of ranks nobody knows which of them a fault can hit
            faultplan.make(config, ranks)
        if config.model.class_ or config.optim.class_:
            from trainer import job, own_check
            from trainer.parallel import world

            job.set_numerics(config, device := world.pick_device(config.parallel))
            vocab_size = costs.padded_vocab(costs.vocabulary(config)[0], config.model.vocab_size)
            for setting, name in (("model.class", config.model.class_), ("optim.class", config.optim.class_)):
                if name:
                    own_check.attempt(setting, config, vocab_size, device, ranks or 1)
        # The rows of a table whose tokens are not made yet are known only if the config says them.
        if config.init_from and (config.model.vocab_size or config.data.tokenizer not in ("bpe", "chars")):
            from trainer import architectures

            rows = costs.padded_vocab(costs.vocabulary(config)[0], config.model.vocab_size)
            architectures.read(architectures.folder_of(config), config.model, rows)
        costs.show(config, ranks or 1)
        return
    if ranks is not None:
        raise UsageError("--ranks is for --dry-run.\n  To train on N ranks: torchrun --standalone --nproc-per-node N …")
    elastic.check_mode(config.elastic.mode)
    # Listen before torch is imported: that takes seconds, in which a stop signal may come.
    stop = signals.StopSignals()
    torch_versions.check()
    from trainer import job

    run = run or Path("runs") / config_path.stem
    if elastic.in_quorum():
        from trainer import member

        raise typer.Exit(member.train(config, run, PROCESS_STARTED, stop, accept, parent))
    raise typer.Exit(job.train(config, run, PROCESS_STARTED, stop, accept, parent))


@app.command()
def launch(
    config_path: ConfigPath,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that train together, on this node. With --islands: its clusters; all."),
    ] = None,
    run: RunOption = None,
    overrides: Overrides = None,
    apart: Annotated[
        int | None,
        typer.Option("--islands", min=1, metavar="N", help="Clusters of islands, of all nodes, that live apart."),
    ] = None,
    spares: Annotated[int, typer.Option(min=0, help="Further processes, ready to take a dead one's place.")] = 0,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where other nodes reach the arbiter, or this launcher of islands.")
    ] = ANY_PORT,
    join: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help="Add this node's workers or clusters to the job that listens there."),
    ] = "",
    arbiter_only: Annotated[
        bool, typer.Option("--arbiter-only", help="Start no worker: they join from other nodes.")
    ] = False,
    accept: AcceptOtherBits = False,
    parent: Parent = "",
) -> None:
    """Train so that a worker's death ends nobody else: the others finish the step, and its successor joins."""
    from trainer import config as configs
    from trainer.launch import quorum

    if join and (arbiter_only or listen != ANY_PORT):
        raise UsageError("--join adds to a job that listens on another node.\n  Leave out --listen and --arbiter-only.")
    if apart is not None and (arbiter_only or spares):
        raise UsageError(
            "--islands has no arbiter, and a cluster that dies is started again.\n"
            "  Leave out --spares and --arbiter-only."
        )
    if apart is None and workers is None:
        raise UsageError("launch starts --workers N processes, or --islands N clusters.\n  Give one of them.")
    mode = "quorum" if apart is None else "restart"
    config = configs.load(config_path, [*(overrides or ()), f'elastic.mode="{mode}"'])
    run = run or Path("runs") / config_path.stem
    command = ["train", str(config_path), *(["--accept-other-bits"] if accept else [])]
    if parent:
        from trainer import branch

        branch.origin(run, config, parent)  # a run that has begun needs its parent no more
        command += ["--from", parent]
    mode = "restart" if quorum.restarts_all(config) else "quorum"
    command += [part for override in [*(overrides or ()), f'elastic.mode="{mode}"'] for part in ("--set", override)]
    if apart is not None:
        from trainer.launch import islands

        where = "" if listen == ANY_PORT else listen
        raise typer.Exit(islands.launch(islands.Plan(config, command, run, apart, workers or apart, where, join)))
    assert workers is not None
    command += ["--run", str(run)]
    plan = quorum.Plan(config, command, run, workers, spares, listen, join)
    if quorum.restarts_all(config) and not arbiter_only:
        quorum.become_torchrun(plan)
    raise typer.Exit(quorum.serve(plan) if arbiter_only else quorum.launch(plan))


@app.command()
def submit(
    config_path: ConfigPath,
    on: Annotated[str, typer.Option(metavar="slurm|kubernetes|kubeflow", help="The scheduler.")],
    nodes: Annotated[str, typer.Option(metavar="N|MIN:MAX", help="With MIN:MAX it goes on with fewer.")] = "1",
    limit: TimeLimit = LIMIT,
    run: RunOption = None,
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option("--ranks-per-node", min=1, help="Default one, or one a GPU.")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus-per-node", min=1, help="GPUs of each node.")] = None,
    notice: Notice = NOTICE_SECONDS,
    options: SlurmOptions = None,
    before: Before = None,
    python: NodesPython = "",
    accept: AcceptOtherBits = False,
    exclude_after: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Slurm: leave out nodes that have failed so often."),
    ] = None,
    only_print: Annotated[bool, typer.Option("--print", help="Print the script or manifests, submit nothing.")] = False,
    image: Annotated[str, typer.Option(help="Kubernetes: container image with toprope.")] = "",
    claim: Annotated[str, typer.Option(help="Kubernetes: volume claim, mounted at the parent of --run.")] = "",
    memory: Annotated[str, typer.Option(metavar="16Gi", help="Kubernetes: memory of a node's pod.")] = "",
) -> None:
    """Submit a run to a cluster's scheduler as a job that goes on after lost nodes, preemption and time limits."""
    from trainer import config as configs
    from trainer.launch import kubernetes, slurm
    from trainer.log import rundir

    if on not in ("slurm", *kubernetes.KINDS):
        raise UsageError(
            f"--on {on!r} is no scheduler that `submit` knows.\n  Give --on slurm, --on kubernetes or --on kubeflow."
        )
    given = {"--time": limit != LIMIT, "--slurm": options, "--before": before, "--python": python}
    given |= {"--exclude-after": exclude_after}
    foreign = given if on != "slurm" else {"--image": image, "--claim": claim, "--memory": memory}
    if wrong := [option for option, is_given in foreign.items() if is_given]:
        raise UsageError(f"{', '.join(wrong)} without effect with --on {on}.\n  Leave out what is another scheduler's.")
    fewest, most = slurm.parse_nodes(nodes)
    config = configs.load(config_path, overrides or ())
    ranks = ranks or gpus or 1
    for count in range(fewest, most + 1):  # any of them may be left
        configs.check_world(config, count * ranks)
    if config.elastic.mode == "quorum":
        raise UsageError(
            'elastic.mode = "quorum" needs a launcher of its own, and a job starts torchrun.\n'
            '  Set elastic.mode = "restart": a lost node then restarts the others.'
        )
    text = f"# {config_path}, as it was submitted.\n\n{configs.as_toml(config)}"
    further = ["--accept-other-bits"] if accept else []
    if on != "slurm":
        place = PurePosixPath(run or Path("/runs") / config_path.stem)
        manifests = kubernetes.Manifests(
            place, text, image, claim, fewest, most, ranks, config.numerics.threads, gpus, memory, notice, further
        ).text(on)
        if not only_print:
            raise UsageError(
                f"--on {on} submits nothing itself: there was no cluster to try that on.\n"
                "  Add --print, and give the output to `kubectl apply -f -`."
            )
        _print_whole(manifests)
        return
    run = (run or Path("runs") / config_path.stem).absolute()
    rundir.check(run, config)
    command = ["trainer", "train", str(run / "slurm" / "config.toml"), "--run", str(run), *further]
    request = _request(limit, notice, options, before, python)
    job = slurm.Job(run, command, fewest, most, ranks, request, config.numerics.threads, gpus, exclude_after)
    if only_print:
        _print_whole(job.script())
        return
    number = slurm.submit(job, text)
    print(f"job {number}  {run}")
    print(f"watch  tail -F {shlex.quote(str(run / 'slurm'))}/job-{number}*.txt")
    print(f"story  python -m trainer inspect {shlex.quote(str(run))}")
    if reason := slurm.obstacle(number):
        print(
            f"It waits, and never starts as it is: {reason}.\n  `scontrol show partition` shows what the partition "
            f"allows. `scancel {number}`, and submit what fits.", file=sys.stderr,
        )  # fmt: skip


def _print_whole(text: str) -> None:
    """Print a text that must not be cut off unnoticed."""
    from trainer.show import terminal

    print(text, end="")
    terminal.check()


def _request(
    limit: str, notice: int, options: list[str] | None, before: list[str] | None, python: str
) -> "slurm.Request":
    from trainer.launch import slurm

    started_by = python or shlex.quote(sys.executable)
    return slurm.Request(limit, notice, slurm.parse_options(options or ()), started_by, before or ())


def _slurm_jobs(
    command: str, on: str, max_jobs: int | None, limit: str, notice: int, options: list[str] | None,
    before: list[str] | None, python: str,
) -> "SlurmJobs | None":  # fmt: skip
    """Return the back end of --on; None for this machine."""
    from trainer.fleet.slurm import SlurmJobs

    if on not in ("", "slurm"):
        raise UsageError(f"--on {on!r} is no scheduler that `{command}` knows.\n  Give --on slurm, or leave it out.")
    if not on and (max_jobs or options or before or python or limit != LIMIT or notice != NOTICE_SECONDS):
        raise UsageError(
            "--max-jobs, --time, --notice, --slurm, --before and --python are for jobs.\n  Add --on slurm."
        )
    return SlurmJobs(_request(limit, notice, options, before, python)) if on else None


@app.command()
def rendezvous(
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Address of this machine; port 0: a free one.")],
) -> None:
    """Serve the store at which the torchrun agents of a job meet, so that any of their nodes may be lost."""
    from trainer.launch import rendezvous, transport

    transport.prepare("trainer")
    rendezvous.serve(listen)


@app.command()
def inspect(
    run: RunPath,
    as_json: AsJson = False,
    compress: Annotated[
        bool, typer.Option("--compress", help="Hold the code length against gzip, bzip2, xz and zstd; 1 s per MB.")
    ] = False,
) -> None:
    """Show what happened in a run: status, attempts, losses, throughput, checkpoints."""
    from trainer import checkpoint
    from trainer.faults import attribution
    from trainer.log import code_length, rundir

    rundir.read(run)
    found = [
        {"step": saved.step, "intact": not checkpoint.verify(saved), "bytes": saved.bytes}
        for saved in reversed(checkpoint.committed(run))
    ]
    result = attribution.summarise(run, found)
    if compress:
        result["code_length"]["compressors"] = code_length.compressors(run, result["code_length"])
    if as_json:
        _print_json(result)
    else:
        from trainer.show.inspect import render

        _show(render(result), highlight=True)


@app.command()
def verify(path: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT")]) -> None:
    """Check checkpoints against their manifests: exit 0 if all are intact, 1 otherwise."""
    from trainer import checkpoint, files
    from trainer.log import rundir
    from trainer.show import terminal

    # What a directory holds says what it is: a run may be called step-lr3e-3.
    if not rundir.is_run(path) and (path.name.startswith("step-") or files.exists(path / checkpoint.MANIFEST)):
        saved = [checkpoint.open_saved(path)]
    else:
        rundir.read(path)
        saved = checkpoint.committed(path)
    if not saved:
        print(f"{path} has no checkpoints")
    all_intact = True
    for candidate in saved:
        verdict = _verdict(candidate)
        all_intact = all_intact and verdict.startswith("intact")
        print(f"{candidate.path.name}  {verdict}", flush=True)
    terminal.check()
    raise typer.Exit(EXIT_FINISHED if all_intact else EXIT_FAILED)


def _verdict(candidate: "Saved") -> str:
    from trainer import checkpoint

    try:
        checkpoint.refuse_newer(candidate)
    except NewerFormatError as error:
        return f"NEWER: {error}"

    def show_percent(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{100 * done // max(total, 1)} %\r", end="", file=sys.stderr, flush=True)

    problems = checkpoint.verify(candidate, show_percent)
    others = checkpoint.unlisted(candidate)
    beside = f" (also there, listed in no manifest: {', '.join(others)})" if others else ""
    return f"DAMAGED: {'; '.join(problems)}{beside}" if problems else f"intact{beside}"


@app.command()
def sample(
    run: RunPath,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k likeliest tokens; 0 from all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that together have this share.")] = 1.0,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**64 - 1, help="Same seed, same text.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="So many texts, of seeds SEED, SEED + 1, …")] = 1,
) -> None:
    """Generate text from a run's newest checkpoint."""
    from trainer import sample
    from trainer.show import terminal

    drawing = sample.Drawing(temperature, top_k, top_p)
    seeds = [number - 2**64 * (number >= 2**64) for number in range(seed, seed + samples)]  # after the last, the first
    for number, text in zip(seeds, sample.generate(run, prompt, tokens, drawing, seeds), strict=True):
        if samples > 1:
            print(f"{chr(10) * (number != seed)}--- seed {number}")
        for piece in text:
            print(piece, end="", flush=True)
        print()
    terminal.check()


@app.command()
def ensemble(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run directories, two or more.")],
    weights: Annotated[
        str, typer.Option(metavar="W,W,…", help="How much each run counts, relative to the others; default equally.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Score the averaged probabilities of several runs on their held-out sets, as one run is scored."""
    from trainer import ensemble

    try:
        shares = [float(weight) for weight in weights.split(",")] if weights else []
    except ValueError:
        raise UsageError(f"--weights {weights!r} is no list of numbers.\n  Write them as 3,1,1.") from None
    tree = ensemble.describe(runs, shares)
    if as_json:
        _print_json(tree)
    else:
        from trainer.show.ensemble import render

        _show(render(tree))


@app.command()
def export(run: RunPath, out: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")]) -> None:
    """Write a run's newest checkpoint for `transformers`: safetensors, config.json and tokenizer files."""
    from trainer import export

    architecture = export.export(run, out)
    print(f"{out} opens as {architecture.name}")


@app.command()
def plot(
    run: RunPath, output: Annotated[Path | None, typer.Option(help="PNG to write; default RUN/curves.png.")] = None
) -> None:
    """Draw a run's loss curves (PNG) and its timeline: attempts, faults, lost work (SVG). Prints both paths."""
    from trainer import files
    from trainer.log import rundir, summary
    from trainer.log.timeline import read_timeline
    from trainer.show import curves, figure, terminal, timeline

    rundir.read(run)
    path = output or run / "curves.png"
    curves.draw_curves({run.name: summary.summarise(run)}, path)
    drawn = path.with_name("timeline.svg")
    files.write(drawn, figure.standalone(timeline.svg(read_timeline(run))))
    print(f"{path}\n{drawn}")
    terminal.check()


@app.command()
def chaos(
    path: Annotated[Path, _file("CAMPAIGN", "A campaign", "chaos")],
    out: Annotated[Path | None, typer.Option(help="Directory to fill or resume; default runs/chaos/NAME-TIME.")] = None,
    as_json: AsJson = False,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this run; may be repeated.")] = None,
    repeat: Annotated[int | None, typer.Option(min=1, help="Repeats of each run; default as the file says.")] = None,
    shrink: Annotated[bool, typer.Option("--shrink", help="Shrink a failing schedule to what still fails.")] = False,
    on: Annotated[str, typer.Option(metavar="slurm", help="Make every case a job of this scheduler.")] = "",
    max_jobs: Annotated[int | None, typer.Option(min=1, help="Jobs at a time; default 8.")] = None,
    limit: TimeLimit = LIMIT,
    notice: Notice = NOTICE_SECONDS,
    options: SlurmOptions = None,
    before: Before = None,
    python: NodesPython = "",
) -> None:
    """Break runs on purpose and check that their results do not change: exit 0 only if every run passes."""
    from trainer.chaos import plan, report, run

    jobs = _slurm_jobs("chaos", on, max_jobs, limit, notice, options, before, python)
    if jobs and (shrink or out is None):
        raise UsageError(
            "--shrink runs here.\n  Leave it out, or --on slurm." if shrink else
            "--on slurm needs an --out.\n  The same command finds its jobs and results there. Give one that nodes see."
        )  # fmt: skip
    planned = plan.load(path, only or (), repeat)
    out = out or run.default_out(planned)
    if warning := plan.check_exact(planned):
        print(f"warning: {warning}", file=sys.stderr)
    notes = sys.stderr if as_json else sys.stdout
    elsewhere = None
    if jobs:
        from trainer.chaos.jobs import Jobs

        elsewhere = Jobs(jobs, max_jobs or 8, path, only or (), repeat)
    with report.CampaignProgress(len(planned.cases), file=notes) as live:
        done = run.run(planned, out, update=live.update, shrink=shrink, elsewhere=elsewhere)
    if as_json:
        from trainer.chaos import results

        _print_json(results.to_json(done))
    else:
        _show(report.terminal(done), highlight=True)
        print(f"\n{out / 'report.html'}")
    if (again := run.keep_replay(planned, done, out)) is not None:
        print(f"what did not pass does the same again: python -m trainer chaos {again}", file=notes)
    if done.interrupted:
        print(f"to resume: the same command with --out {out}", file=notes)
        if jobs:
            print("The jobs go on in the queue; the same command watches them again.", file=notes)
    raise typer.Exit(run.EXIT_INTERRUPTED if done.interrupted else EXIT_FINISHED if done.passed else EXIT_FAILED)


ladders = typer.Typer(help="Derisk changes on a ladder of sizes: plan, run, status, report.", no_args_is_help=True)
app.add_typer(ladders, name="ladder")
LadderPath = Annotated[Path, _file("LADDER", "A ladder", "ladders")]
LadderOut = Annotated[Path | None, typer.Option(help="Default runs/ladders/NAME; the runs go to `pool` beside it.")]


@ladders.command("plan")
def ladder_plan(path: LadderPath, out: LadderOut = None, as_json: AsJson = False) -> None:
    """Show what will run: sizes, tokens, FLOPs, hours on this machine, measured with a few steps."""
    from trainer.fleet.backend import Local
    from trainer.ladder import preregistration, run, terminal
    from trainer.ladder.plan import load

    out = out or run.default_out(path)
    ladder = preregistration.with_additions(load.load(path), out)
    backend = Local()  # its imports take seconds: not for a file that cannot be used
    status, source = run.measure(ladder, out, run.read_status(ladder, out), backend)
    edits = preregistration.write(ladder, out)
    if as_json:
        _print_json(terminal.plan_json(ladder, status, source, edits))
    else:
        _show(terminal.plan(ladder, status, source, edits))


@ladders.command("run")
def ladder_run(
    path: LadderPath,
    out: LadderOut = None,
    up_to: Annotated[str | None, typer.Option(help="Last rung to run: the report predicts those above.")] = None,
    settle: Annotated[
        float | None, typer.Option(metavar="HOURS", help="Add runs that may settle open verdicts, for so many hours.")
    ] = None,
    on: Annotated[str, typer.Option(metavar="slurm", help="Make every run a job of this scheduler.")] = "",
    max_jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Jobs at a time; default the file's slots, else as many as this machine could run."),
    ] = None,
    limit: TimeLimit = LIMIT,
    notice: Notice = NOTICE_SECONDS,
    options: SlurmOptions = None,
    before: Before = None,
    python: NodesPython = "",
    as_json: AsJson = False,
) -> None:
    """Run a ladder, or resume it: exit 0 if all of it finished, 1 if runs are missing, 75 if it was stopped."""
    from trainer.fleet.backend import Local
    from trainer.ladder import preregistration, run, terminal
    from trainer.ladder import settle as settling
    from trainer.ladder.plan import load

    if settle is not None and up_to is not None:
        raise UsageError("--settle and --up-to are given.\n  Verdicts are settled with all rungs. Leave one out.")
    jobs = _slurm_jobs("ladder run", on, max_jobs, limit, notice, options, before, python)
    given = [] if out is None else ["--out", str(out)]
    given += [] if up_to is None else ["--up-to", up_to]
    given += [] if settle is None else ["--settle", f"{settle:g}"]
    if on:
        given += ["--on", on, "--time", limit, "--notice", str(notice)]
        given += ["--max-jobs", str(max_jobs)] if max_jobs else []
        given += [part for option in options or () for part in ("--slurm", option)]
        given += [part for line in before or () for part in ("--before", line)]
        given += ["--python", python] if python else []
    command = shlex.join(["python", "-m", "trainer", "ladder", "run", str(path), *given])
    out = out or run.default_out(path)
    ladder = preregistration.with_additions(load.load(path), out)
    backend = jobs or Local()  # its imports run beside the planning
    notes = sys.stderr if as_json else sys.stdout
    if edits := str(preregistration.compare(ladder, out)):
        print(edits, file=notes, flush=True)
    if settle is not None:
        settling.check(ladder, settle)
    with terminal.LadderProgress(ladder, file=notes) as live:
        if settle is None:
            done = run.run(ladder, out, up_to=up_to, backend=backend, slots=max_jobs, update=live.update)
        else:
            done = settling.settle(
                ladder, out, settle, tell=live.print, backend=backend, slots=max_jobs, update=live.update
            )
    if as_json:
        ladder = preregistration.with_additions(ladder, out)
        _print_json(terminal.status_json(ladder, run.read_status(ladder, out)))
    else:
        _show(terminal.ended(ladder, done, command))
        if on and done.stopping:
            print("The jobs go on in the queue; the same command watches them again.")
    raise typer.Exit(done.exit_status)


@ladders.command("status")
def ladder_status(path: LadderPath, out: LadderOut = None, as_json: AsJson = False) -> None:
    """Show the state of a ladder, from its files alone."""
    from trainer.ladder import preregistration, run, terminal
    from trainer.ladder.plan import load

    out = out or run.default_out(path)
    ladder = preregistration.with_additions(load.load(path), out)
    status = run.read_status(ladder, out)
    if as_json:
        _print_json(terminal.status_json(ladder, status))
        return
    if edits := str(preregistration.compare(ladder, out)):
        print(edits)
    _show(terminal.standing(ladder, status))


@ladders.command("report")
def ladder_report(path: LadderPath, out: LadderOut = None, as_json: AsJson = False) -> None:
    """Report what a ladder's runs show: verdicts here, and OUT/report.html, report.json, pictures and a W&B run."""
    from trainer.ladder import preregistration, report, run
    from trainer.ladder.plan import load

    out = out or run.default_out(path)
    ladder = preregistration.with_additions(load.load(path), out)
    tree = report.make(ladder, out)
    if as_json:
        _print_json(tree)
        return
    if edits := str(preregistration.compare(ladder, out)):
        print(edits)
    _show(report.terminal(tree))
    print(out / report.PAGE)


@app.command()
def judge(
    source: Annotated[
        str,
        typer.Argument(
            metavar="TABLE",
            help="A csv, tsv, jsonl, json or parquet file, a folder of offline W&B runs, or wandb:ENTITY/PROJECT.",
        ),
    ],
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=NAME",
            help="Column of arm, rung, params, tokens, unique_tokens, flops, seed, loss or seconds.",
        ),
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="The arm that the others are compared with.")] = None,
    criterion: Annotated[
        Path | None, typer.Option(help="A TOML file with level, min_gain, max_slowdown, looks.")
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="FLOPs that verdicts are about; default 10 × the largest.")
    ] = None,
    more_is_better: Annotated[
        bool | None, typer.Option("--more-is-better/--less-is-better", help="Direction of the metric.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Default runs/judged/TABLE's name.")] = None,
    as_json: AsJson = False,
) -> None:
    """Judge runs that were made elsewhere: verdicts here, and OUT/report.html, report.json and pictures."""
    from trainer.ladder import judge as judging
    from trainer.ladder import report
    from trainer.log import rundir

    if out is not None:
        rundir.check_out(out, "report.json")
    tree = judging.judge(
        source, columns=judging.named_columns(column or ()), baseline=baseline, target_flops=target,
        criterion=judging.read_criterion(criterion) if criterion else None, more_is_better=more_is_better,
    )  # fmt: skip
    tree["table"]["command"] = shlex.join(["python", "-m", "trainer", *sys.argv[1:]])
    directory = out or Path("runs") / "judged" / tree["name"]
    report.write(tree, directory)
    if as_json:
        _print_json(tree)
        return
    _show(report.terminal(tree))
    print(directory / report.PAGE)


forecasts = typer.Typer(help="Training under failures at any scale: run, scale, calibrate.", no_args_is_help=True)
app.add_typer(forecasts, name="forecast")
ForecastOut = Annotated[Path | None, typer.Option(help="Write forecast.html, forecast.png and forecast.json there.")]


@forecasts.command("run")
def forecast_run(
    path: Annotated[Path, _file("SCENARIO", "A scenario", "forecast")],
    out: ForecastOut = None,
    as_json: AsJson = False,
) -> None:
    """Simulate a job under failures: goodput with its interval, time lost by cause, the best checkpoint interval."""
    from trainer.forecast import run, scenario

    _forecast(run.forecast(scenario.load(path)), out, as_json)


@forecasts.command("scale")
def forecast_scale(
    path: Annotated[Path, _file("SCALE", "A range of sizes", "forecast")],
    out: ForecastOut = None,
    as_json: AsJson = False,
) -> None:
    """Simulate policies over a range of sizes: goodput by devices, where each fails, what to improve first."""
    from trainer.forecast import scale

    _forecast(scale.scale(scale.load(path)), out, as_json)


@forecasts.command("calibrate")
def forecast_calibrate(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs, calm ones and ones with failures.")],
    out: Annotated[Path | None, typer.Option(help="Scenario to write; default: to the terminal.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a scenario's values in the event logs of runs: step, save, restart, detection."""
    from trainer import files
    from trainer.forecast import calibrate

    found = calibrate.calibrate(runs)
    if out is not None:
        files.write(out, calibrate.to_toml(found, runs))
    if as_json:
        _print_json(found)
    else:
        print(out if out is not None else calibrate.to_toml(found, runs).rstrip())


@app.command()
def ready(
    config_path: ConfigPath,
    plan: Annotated[Path, _file("PLAN", "What must hold: a plan", "ready", option=True)],
    out: Annotated[Path | None, typer.Option(help="Page, JSON and the drill's runs; default runs/ready/NAME.")] = None,
    as_json: AsJson = False,
) -> None:
    """Collect the evidence for a launch: exit 0 for go, 1 for no-go."""
    from trainer import readiness

    out = out or Path("runs") / "ready" / config_path.stem
    tree = readiness.check(config_path, plan, out, lambda text: print(text, file=sys.stderr, flush=True))
    readiness.write(tree, out)
    if as_json:
        _print_json(tree)
    else:
        for line in tree["lines"]:
            print(f"{line['answer']:8} {line['topic']:10} {line['evidence']}")
            if line["decision"]:
                print(f"{'':19} decided, {line['decision']}")
        for issue in tree["issues"]:
            if issue["decision"] in ("", "wait"):
                print(f"{'open':8} {'issue':10} {issue['title']}")
        print(f"\n{tree['summary']}\n{out / readiness.PAGE}")
    raise typer.Exit(EXIT_FINISHED if tree["go"] else EXIT_FAILED)


@app.command()
def hunt(
    run: RunPath,
    step: Annotated[list[int] | None, typer.Option(min=1, help="A step to look at; may be repeated.")] = None,
    symptoms: Annotated[
        str, typer.Option(help="auto: those that the log shows; none: only the steps of --step.")
    ] = "auto",
    out: Annotated[Path | None, typer.Option(help="Where page and script go; default runs/hunt/RUN's name.")] = None,
    as_json: AsJson = False,
) -> None:
    """From a run's symptoms to a wrong operator: exit 0 if none is accused, 1 if one is."""
    from trainer.log import rundir

    if symptoms not in ("auto", "none") or (symptoms == "none" and not step):
        about = "leaves nothing to look at" if symptoms == "none" else "is not known"
        raise UsageError(f"--symptoms {symptoms} {about}.\n  Give auto, or none with --step N.")
    out = out or Path("runs") / "hunt" / run.resolve().name
    rundir.read(run)
    rundir.check_out(out, "hunt.json")
    out.mkdir(parents=True, exist_ok=True)
    from trainer.hunt import page, search

    tree = search.hunt(run, step or (), out, lambda text: print(text, file=sys.stderr, flush=True), symptoms == "auto")
    page.write(tree, out)
    if as_json:
        _print_json(tree)
    else:
        print("\n".join(page.lines(tree)))
        print(out / search.PAGE)
    raise typer.Exit(EXIT_FAILED if tree["suspects"] else EXIT_FINISHED)


@app.command()
def burnin(
    config_path: Annotated[Path, _file("[CONFIG]", "The TOML config whose calls are checked")] = Path("gpt_tiny"),
    minutes: Annotated[float, typer.Option(min=0, help="How long to repeat the calls.")] = 2.0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; default as the config says.")] = "",
    out: Annotated[Path | None, typer.Option(help="Where report.json goes; default runs/burnin/CONFIG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine's operators against references before a run: exit 0 if all are right, 1 if not."""
    from trainer import config as configs
    from trainer import files
    from trainer.log import rundir

    if device not in ("", "auto", "cpu", "cuda"):
        raise UsageError(f"--device = {device!r} is no device.\n  Give auto, cpu or cuda.")
    config = configs.load(config_path, [f"parallel.device={json.dumps(device)}"] if device else ())
    out = out or Path("runs") / "burnin" / config_path.stem
    rundir.check_out(out, "report.json")
    out.mkdir(parents=True, exist_ok=True)
    from trainer.hunt import burnin as checks

    tree = checks.burn_in(config, minutes, lambda text: print(text, file=sys.stderr, flush=True))
    report = files.write_report(tree, out)
    if as_json:
        _print_json(tree)
    else:
        _show(checks.terminal(tree))
        print(report)
    raise typer.Exit(EXIT_FINISHED if tree["passed"] else EXIT_FAILED)


@app.command()
def advise(
    config_path: ConfigPath,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Where report.json goes; default runs/advise/CONFIG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say where a step's time goes on this machine, and which shapes of the same size would be faster."""
    from trainer import config as configs
    from trainer import files
    from trainer.log import rundir

    configs.load(config_path, overrides or ())  # its problems first: torch takes a second
    out = out or Path("runs") / "advise" / config_path.stem
    rundir.check_out(out, "report.json")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):  # a place that cannot be written is told before a minute of work
        pass
    from trainer import advise as advice
    from trainer.advise.terminal import terminal

    tree = advice.advise(config_path, overrides or (), lambda text: print(text, file=sys.stderr, flush=True))
    report = files.write_report(tree, out)
    if as_json:
        _print_json(tree)
    else:
        _show(terminal(tree))
        print(report)


def _forecast(tree: dict[str, Any], out: Path | None, as_json: bool) -> None:
    from trainer.forecast import report

    if out is not None:
        report.write(tree, out)
    if as_json:
        _print_json(tree)
        return
    _show(report.terminal(tree))
    if out is not None:
        print(f"\n{out / report.PAGE}")


def _show(what: "RenderableType", *, highlight: bool = False) -> None:
    from rich.console import Console

    from trainer.show import terminal

    Console(highlight=highlight).print(what)
    terminal.check()


def _print_json(what: object) -> None:
    from trainer.show import terminal

    print(json.dumps(what))
    terminal.check()


def main() -> None:
    """Run a command. An error meant for the user ends as one message on stderr and an exit status, not a traceback."""
    from trainer.show import terminal

    terminal.take()
    try:
        app()
    except TopropeError as error:
        # Every rank raises the same error, so one message is enough. A worker that may not take part is alone in that.
        apart = elastic.apart()
        is_first = elastic.expected_rank() == 0 if apart is None else apart.rank == 0
        if is_first or isinstance(error, RefusedError):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        else:
            # If this rank left first, torchrun would end rank 0 before it has printed. Torchrun ends this rank instead.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
            if elastic.in_quorum():  # else the launcher had ended it: the others train, and this one is refused alone
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_status) from None
    except OSError as error:
        # Only where a file is named, and not of a rank that trains: its traceback says what it was doing.
        if error.filename is None or sys.argv[1:2] == ["train"]:
            raise
        remedy = "Mend that, or name another place, and give the same command again."
        print(f"OSError: {of_system(error, 'A file cannot be used', '', remedy)}", file=sys.stderr)
        raise SystemExit(EXIT_FAILED) from None
