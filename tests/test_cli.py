"""The command line: its commands, and one clear message with exit status 2 for wrong usage, before any work."""

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tests import support
from tests.support import ROOT, SMOKE, inspect, settings, summarise_run, torchrun, trainer
from trainer import config as configs
from trainer.log import rundir

INSPECT_KEYS = {
    "status", "step", "steps", "tokens", "weights_sha256", "state_sha256", "attempts", "checkpoints", "train", "eval",
    "faults", "tokens_per_second",
}  # fmt: skip
TINY = settings(budget__steps=4, checkpoint__every_steps=2, eval__every_steps=2)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path, config: Path = SMOKE, run: Path) -> str:
    """The message of a refused `trainer train`, which exits with 2 and no traceback. In this process, for speed."""
    from trainer import cli

    before = sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    sys.argv = ["trainer", "train", str(config), "--run", str(run), *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as left:
            cli.main()
    finally:
        sys.argv = before
        for number, handler in handlers.items():  # other tests share the process
            signal.signal(number, handler)
    captured = capsys.readouterr()
    assert left.value.code == 2, captured
    assert not (run / "events").exists(), "there was work"
    return captured.err


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tiny") / "run"
    trainer("train", SMOKE, "--run", run, *TINY)
    return run


@pytest.fixture
def finished(tiny: Path, run: Path) -> Path:
    """A run of four steps, with checkpoints of steps 2 and 4."""
    return shutil.copytree(tiny, run)


def taken_back(run: Path) -> Path:
    """A copy of the run that has not come beyond step 2."""
    half = shutil.copytree(run, run.with_name("half"))
    shutil.rmtree(half / "checkpoints" / "step-00000004")
    return half


def test_all_wrong_settings_are_reported_at_once(capsys, run):
    message = refusal(capsys, "--set", "model.n_heads=3", "--set", "budget.steps=0", run=run)
    assert "budget.steps = 0" in message
    message = refusal(capsys, "--set", "model.n_heads=3", "--set", "optim.warmup_steps=1000", run=run)
    assert "model.n_heads = 3 does not divide model.width = 32" in message
    assert "optim.warmup_steps = 1000 is longer than budget.steps" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.widht=3", "model.widht is no setting.\n  Did you mean model.width?"),
        ('model.width="wide"', 'model.width = "wide"'),
        ("optim.learning_rate=3e-", "the right side is not TOML"),
        ("data.source=", "the right side is not TOML"),
        ('data.source="some/path', "quotes"),
        ("parallel.strategy=fdsp", "parallel.strategy = \"fdsp\" does not fit.\n  Input should be 'replicate', "),
        ("optim.muon_learning_rate=0.1", "has no effect"),
        ("model.vocab_size=100", "model.vocab_size = 100 is smaller than the tokenizer's 257 tokens"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(capsys, run, override, message):
    assert message in refusal(capsys, "--set", override, run=run)


@pytest.mark.parametrize("named", ["g++", "no-such-compiler", "./not-a-program"])
def test_compiling_without_a_compiler_is_refused_before_any_work(capsys, run, tmp_path, monkeypatch, named):
    from torch._inductor import config as inductor
    from torch._inductor import cpp_builder

    (tmp_path / "not-a-program").write_text("a file that nobody may execute")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    cpp_builder.cpp_compiler_search.cache_clear()
    with inductor.patch({"cpp.cxx": (None, named)}):  # torch reads CXX once
        message = refusal(capsys, "--set", "numerics.compile=true", run=run)
    assert f"needs a C++ compiler, and this machine has none that runs (tried {named})" in message
    assert "CXX" in message


def test_text_needs_no_quotes_where_a_setting_takes_nothing_else():
    """A shell removes the quotes of --set parallel.strategy="fsdp"."""
    bare = [
        "parallel.strategy=fsdp",
        "data.source=some/*.txt",
        "eval.sources.mine=a b.txt",
        'eval.sets=["val", "mine"]',
    ]
    quoted = ['parallel.strategy="fsdp"', 'data.source="some/*.txt"', 'eval.sources.mine="a b.txt"', bare[-1]]
    assert configs.load(SMOKE, bare) == configs.load(SMOKE, quoted)


def test_a_config_that_is_not_there_is_refused(capsys, run, tmp_path):
    assert "does not exist" in refusal(capsys, config=tmp_path / "none.toml", run=run)
    message = refusal(capsys, config=ROOT / "configs", run=run)
    assert "configs is a directory.\n" in message and "smoke.toml" in message and "Errno" not in message
    (tmp_path / "picture.toml").write_bytes(b"\xff\xd8\xff")
    assert "picture.toml is no text" in refusal(capsys, config=tmp_path / "picture.toml", run=run)


def test_a_campaign_is_no_config_and_says_what_takes_it(capsys, run):
    path = ROOT / "configs" / "chaos" / "smoke.toml"
    message = refusal(capsys, config=path, run=run)
    assert f"{path} is a campaign" in message and f"trainer chaos {path}" in message
    assert "no setting" not in message


@pytest.mark.parametrize(
    ("override", "fact", "remedy"),
    [
        ("budget=3", "budget = 3 is a value, but budget is a section.", "Set what is in it: budget.steps."),
        ('eval.sets="val"', 'eval.sets = "val" is no list.', 'eval.sets = ["val"]'),
        ("faults=[{}]", "faults[0] has no kind.", "Write [[faults]]"),
        ("faults=[3]", "faults[0] = 3 is no fault.", "Write [[faults]]"),
        ('faults={kind="sigkill"}', 'faults = {"kind": "sigkill"} is no list of faults.', "Write [[faults]]"),
    ],
)
def test_a_value_of_the_wrong_shape_is_refused_with_the_right_one(capsys, run, override, fact, remedy):
    first, second = refusal(capsys, "--set", override, run=run).splitlines()
    assert first == f"ConfigError: {fact}" and remedy in second


def test_a_corpus_that_is_not_there_or_empty_is_refused(capsys, run, tmp_path):
    assert "nowhere.txt" in refusal(capsys, "--set", f'data.source="{tmp_path}/nowhere.txt"', run=run)
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "empty" in refusal(capsys, "--set", f'data.source="{empty}"', run=run)


def test_ranks_without_a_dry_run_and_a_dry_run_without_ranks_are_refused(capsys, run):
    assert "--nproc-per-node N" in refusal(capsys, "--ranks", "2", run=run)
    assert "--ranks" in refusal(capsys, "--dry-run", "--ranks", "0", run=run)


def test_cuda_where_there_is_none_is_refused(capsys, run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "sees no CUDA device" in refusal(capsys, "--set", 'parallel.device="cuda"', run=run)


def test_a_run_directory_that_cannot_be_written_is_refused(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be written" in refusal(capsys, run=tmp_path / "file" / "run")
    assert "is a file" in refusal(capsys, run=tmp_path / "file")


def test_a_directory_that_is_no_run_is_refused_and_left_alone(capsys, tmp_path):
    (tmp_path / "thesis.txt").write_text("a user's file")
    assert "holds files but no config.json" in refusal(capsys, run=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_whose_start_died_at_any_file_can_be_started_again(run):
    for name in ("config.json", "tokenizer.json"):
        command = [sys.executable, "-m", "tests.dies_writing", name, "train", str(SMOKE), "--run", str(run), *TINY]
        died = support.run(command, check=False, timeout=100)
        assert died.returncode == 9, died.stderr
        assert (run / f".{name}.0123abcd.partial").exists()
    trainer("train", SMOKE, "--run", run, *TINY)
    assert summarise_run(run)["status"] == "finished"
    assert not list(run.glob("*.partial"))


def test_more_ranks_than_micro_batches_and_meshes_that_do_not_fit_are_refused_by_all_ranks(run):
    many = torchrun(3, "train", SMOKE, "--run", run, "--set", "data.micro_batches=2", check=False)
    assert many.returncode == 2
    assert many.stderr.count("leaves 1 of 3 ranks without work") == 1, many.stderr
    assert "Traceback" not in many.stderr
    mesh = torchrun(3, "train", SMOKE, "--run", run, "--set", 'parallel.strategy="hybrid"', check=False)
    assert mesh.returncode == 2
    assert "does not divide the world of 3 ranks" in mesh.stderr
    assert not run.exists()


@pytest.mark.parametrize("start", [trainer, lambda *a, **k: torchrun(2, *a, restarts=2, **k)], ids=["one", "torchrun"])
def test_errors_that_only_rank_0_can_see_are_raised_by_all_ranks_at_once(run, monkeypatch, start):
    """Two restarts are allowed; an error that the next start would repeat must not use them."""
    monkeypatch.setenv("WANDB_MODE", "onlin")
    mode = start("train", SMOKE, "--run", run, check=False)
    assert mode.returncode == 2 and "Traceback" not in mode.stderr, mode.stderr
    assert mode.stderr.count("WANDB_MODE = 'onlin' is no mode") == 1
    assert not run.exists()
    monkeypatch.delenv("WANDB_MODE")
    (run / "events").mkdir(parents=True)
    (run / "events" / "attempt-0000-rank-00000.jsonl").write_text("no event\n")
    rundir.record(run, configs.load(SMOKE), {"data_sha256": "0" * 64})
    log = start("train", SMOKE, "--run", run, check=False)
    assert log.returncode == 2 and "Traceback" not in log.stderr, log.stderr
    assert log.stderr.count("attempt-0000-rank-00000.jsonl:1 is no event") == 1
    assert len(list((run / "events").iterdir())) == 1, "there was work"


def test_a_finished_run_stays_as_it_is_and_another_config_is_refused_with_a_diff(finished):
    run, first = finished, inspect(finished)
    assert first.keys() >= INSPECT_KEYS and len(first["weights_sha256"]) == 64
    assert first["status"] == "finished" and first["step"] == first["steps"] == 4
    assert [step for step, _ in first["train"]] == [1, 2, 3, 4]
    assert [step for step, _, _ in first["eval"]["val"]] == [2, 4]
    assert [(saved["step"], saved["intact"]) for saved in first["checkpoints"]] == [(2, True), (4, True)]

    other = trainer("train", SMOKE, "--run", run, *TINY, "--set", "optim.learning_rate=0.5", check=False)
    assert other.returncode == 2
    assert "optim.learning_rate: 0.003 → 0.5" in other.stderr

    resumed = trainer("train", SMOKE, "--run", run, *TINY, "--set", 'parallel.strategy="fsdp"')
    assert first["weights_sha256"] in resumed.stdout
    again = summarise_run(run)
    assert again["weights_sha256"] == first["weights_sha256"] and again["state_sha256"] == first["state_sha256"]
    assert len(again["attempts"]) == 2 and again["train"] == first["train"]


def test_a_run_resumed_from_its_middle_ends_with_the_same_bits_on_other_ranks_and_sharding(finished):
    half = taken_back(finished)
    torchrun(3, "train", SMOKE, "--run", half, *TINY, "--set", 'parallel.strategy="fsdp"')
    whole, resumed = summarise_run(finished), summarise_run(half)
    assert resumed["attempts"][-1]["from_step"] == 2 and resumed["attempts"][-1]["world_size"] == 3
    assert (resumed["weights_sha256"], resumed["state_sha256"]) == (whole["weights_sha256"], whole["state_sha256"])


def test_two_jobs_on_one_run_directory_are_kept_apart(run):
    with rundir.claim(run, configs.load(SMOKE)):
        second = trainer("train", SMOKE, "--run", run, check=False)
    assert second.returncode == 2
    assert f"in use by process {os.getpid()}" in second.stderr


def test_sample_writes_text_verify_checks_and_plot_draws(finished):
    run = finished
    text = trainer("sample", run, "--prompt", "def ", "--tokens", "20").stdout
    assert text.startswith("def ") and len(text) > 5
    assert text == trainer("sample", run, "--prompt", "def ", "--tokens", "20").stdout
    several = trainer("sample", run, "--prompt", "def ", "--tokens", "20", "--seed", "-1", "--samples", "2").stdout
    assert several.startswith("--- seed -1\ndef ") and several.endswith(f"\n--- seed 0\n{text}"), "by its seed alone"

    picture, timeline = map(Path, trainer("plot", run).stdout.split())
    assert timeline.read_text().startswith("<svg")
    assert picture.read_bytes().startswith(b"\x89PNG")

    assert trainer("verify", run).stdout.count("intact") == 2
    shard = next((run / "checkpoints" / "step-00000004").glob("*.distcp"))
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    verdict = trainer("verify", run, check=False)
    assert verdict.returncode == 1
    assert "DAMAGED" in verdict.stdout and shard.name in verdict.stdout
    older = trainer("sample", run)
    assert "step-00000004 is damaged and passed over" in older.stderr
    resumed = trainer("train", SMOKE, "--run", run, *TINY)
    assert "is damaged and was passed over" in resumed.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", b"\xff"], "--prompt is no text: its character 1 stands for bytes that are not UTF-8"),
        (["--prompt", "ab\udc80"], "its character 3"),
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "inf"], "--temperature = inf is no size"),
        (["--top-p", "0"], "--top-p = 0.0 is no probability"),
        (["--top-p", "nan"], "--top-p"),
        (["--seed", str(2**64)], "--seed"),
        (["--seed", str(-(2**63) - 1)], "--seed"),
    ],
)
def test_sampling_with_impossible_settings_is_wrong_usage(capsys, tiny, monkeypatch, options, message):
    from trainer import cli

    monkeypatch.setattr(sys, "argv", ["trainer", "sample", str(tiny), *map(os.fsdecode, options)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**64 - 1])
@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-10, 1e300])
def test_a_token_is_drawn_at_any_temperature_and_seed(temperature: float, seed: int):
    import torch

    from trainer.sample import Drawing, draw

    generator = torch.Generator().manual_seed(seed)
    for largest in (1.0, -3e38, 3e38):
        logits = torch.tensor([-3.4e38, largest, -3.4e38, -3.1e38])
        token = draw(logits, Drawing(temperature, 2), generator)
        assert token == 1 if temperature < 1 else token in (1, 3), "only the two likeliest may be drawn"


def test_a_run_that_a_newer_toprope_has_taken_further_is_refused_and_left_as_it_is(finished):
    run = finished
    manifest = run / "checkpoints" / "step-00000004" / "manifest.json"
    body = json.loads(manifest.read_text())["body"] | {"format": 2}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps({"sha256": digest, "body": body}))
    again = torchrun(2, "train", SMOKE, "--run", run, *TINY, check=False)
    for refused in (again, trainer("sample", run, check=False)):
        assert refused.returncode == 2 and "Traceback" not in refused.stderr, refused.stderr
        assert "written by a newer toprope (format 2" in refused.stderr
    verdict = trainer("verify", run, check=False)
    assert verdict.returncode == 1
    assert "NEWER" in verdict.stdout and "DAMAGED" not in verdict.stdout and verdict.stdout.count("intact") == 1
    assert json.loads(manifest.read_text())["body"] == body


def test_a_path_that_is_no_run_or_checkpoint_is_wrong_usage(tmp_path):
    wrong = [(verb, tmp_path, "is no run") for verb in ("inspect", "sample", "verify", "plot")]
    for verb, path, why in (*wrong, ("verify", tmp_path / "step-00000009", "step-00000009 is no checkpoint")):
        done = trainer(verb, path, check=False)
        assert done.returncode == 2 and why in done.stderr, verb


def test_the_124m_config_passes_a_dry_run_that_shows_its_size():
    shown = trainer("train", ROOT / "configs" / "gpt2_124m.toml", "--dry-run", "--ranks", "8").stdout
    assert "124," in shown.replace(" ", "") and "FLOPs per token" in shown and "memory per rank" in shown


@pytest.mark.parametrize("vocabulary", [[], ["--set", "model.vocab_size=300"]], ids=["tokenizer's", "set"])
def test_a_dry_run_counts_the_parameters_that_the_run_has(run, vocabulary):
    few = [*settings(budget__steps=1, eval__max_tokens=64), *vocabulary]
    trainer("train", SMOKE, "--run", run, *few)
    recorded = rundir.read(run)
    shown = trainer("train", SMOKE, "--dry-run", *few).stdout
    assert f"{recorded['parameters']:,} (" in shown and f"{recorded['vocab_size']:,} rows for 257 tokens" in shown


def test_a_dry_run_says_what_it_takes_the_vocabulary_from(tmp_path):
    from trainer import costs
    from trainer.data import tokenizer

    own = tmp_path / "tokenizer.json"
    tokenizer.train("chars", ["abc"], 0).save(own)
    expected = {"bytes": (257, "bytes"), "bpe": (4096, "fewer"), "chars": (100, "assumed"), str(own): (5, str(own))}
    for kind, (tokens, whence) in expected.items():
        found = costs.vocabulary(configs.parse({"data": {"tokenizer": kind}}))
        assert found[0] == tokens and found[1].startswith(whence)


def test_every_config_loads():
    found = sorted((ROOT / "configs").glob("*.toml"))
    assert len(found) >= 6
    for path in found:
        config = configs.load(path)
        assert path.read_text().startswith("#"), f"{path.name} does not say what it asks"
        assert configs.fingerprint(config) != configs.fingerprint(configs.Config()) or path.name == "smoke.toml"


def test_the_fingerprint_sees_mathematics_and_nothing_else():
    base = configs.fingerprint(configs.load(SMOKE))
    same = ['parallel.strategy="fsdp"', "checkpoint.every_steps=7", "eval.every_steps=3", 'wandb.group="x"',
            "elastic.step_timeout_seconds=9.0", 'data.cache_dir="/tmp/elsewhere"']  # fmt: skip
    other = ["seed=1", "optim.learning_rate=0.1", "data.micro_batches=4", "numerics.threads=2", "budget.steps=61"]
    assert all(configs.fingerprint(configs.load(SMOKE, [override])) == base for override in same)
    assert len({base, *(configs.fingerprint(configs.load(SMOKE, [override])) for override in other)}) == 6


def test_extends_goes_one_level_deep(tmp_path):
    (tmp_path / "a.toml").write_text("seed = 1\n[model]\nwidth = 64\n")
    (tmp_path / "b.toml").write_text('extends = "a.toml"\n[model]\nn_layers = 3\n')
    (tmp_path / "c.toml").write_text('extends = "b.toml"\n')
    config = configs.load(tmp_path / "b.toml")
    assert (config.seed, config.model.width, config.model.n_layers) == (1, 64, 3)
    with pytest.raises(configs.ConfigError, match="One level is allowed"):
        configs.load(tmp_path / "c.toml")


@pytest.mark.gpu
def test_on_a_gpu_a_resumed_run_ends_with_the_bits_of_an_undisturbed_one(run):
    cuda = [*TINY, "--set", 'parallel.device="cuda"']
    trainer("train", SMOKE, "--run", run, *cuda)
    half = taken_back(run)
    trainer("train", SMOKE, "--run", half, *cuda, "--set", 'parallel.strategy="fsdp"')
    assert summarise_run(run)["state_sha256"] == summarise_run(half)["state_sha256"]
