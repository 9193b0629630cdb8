"""The device that a rank takes, what is recorded of it, and what is said where memory runs out. No GPU here."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support import SMOKE, settings, summarise_run, torchrun, trainer
from trainer import api, out_of_memory, provenance
from trainer import config as configs
from trainer.errors import ConfigError, OutOfMemoryError, RunDirectoryError, WorldError
from trainer.log import events
from trainer.parallel import elastic, sharding, world
from trainer.parallel.world import pick_device

parallel = configs.Parallel


@pytest.fixture
def machine(monkeypatch) -> Any:
    """Pretend a machine with so many GPUs, and to be a rank of so many on it."""

    def pretend(gpus: int, rank: int = 0, ranks: int = 1) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        for name, value in (("RUN_ID", "here"), ("RANK", rank), ("WORLD_SIZE", ranks)):
            monkeypatch.setenv(f"TORCHELASTIC_{name}" if name == "RUN_ID" else f"LOCAL_{name}", str(value))

    return pretend


@pytest.mark.parametrize(
    ("gpus", "ranks", "given", "devices"),
    [
        (0, 2, {}, ["cpu", "cpu"]),
        (2, 2, {}, ["cuda:0", "cuda:1"]),
        (4, 2, {}, ["cuda:0", "cuda:1"]),
        (1, 2, {}, ["cpu", "cpu"]),
        (1, 1, {}, ["cuda:0"]),
        (2, 2, {"device": "cpu"}, ["cpu", "cpu"]),
        (2, 3, {"share_gpus": True}, ["cuda:0", "cuda:1", "cuda:0"]),
        (2, 3, {"share_gpus": True, "device": "cuda"}, ["cuda:0", "cuda:1", "cuda:0"]),
        (0, 2, {"share_gpus": True}, ["cpu", "cpu"]),
    ],
)
def test_ranks_take_a_gpu_each_or_the_cpu_all_or_share_gpus_if_asked(machine, gpus, ranks, given, devices):
    found = []
    for rank in range(ranks):
        machine(gpus, rank, ranks)
        found.append(str(pick_device(parallel(**given))))
    assert found == devices


def test_gpus_that_are_too_few_and_not_used_are_told_in_one_line(machine):
    machine(1, 0, 2)
    said = world.unused_gpus(parallel())
    assert said.startswith('parallel.device = "auto": 2 ranks on a machine with 1 GPU train on the CPU.')
    assert "parallel.share_gpus = true" in said and "\n" not in said
    assert not world.unused_gpus(parallel(device="cpu")) and not world.unused_gpus(parallel(share_gpus=True))
    for gpus in (0, 2):
        machine(gpus, 0, 2)
        assert not world.unused_gpus(parallel())


def test_a_run_whose_ranks_leave_a_gpu_unused_says_so_in_its_log(monkeypatch, tmp_path):
    monkeypatch.setattr(elastic, "local_size", lambda: 2)
    monkeypatch.setattr(world, "_gpus", lambda parallel: 1)
    config = configs.load(SMOKE, settings(budget__steps=1, eval__max_tokens=64, wandb__mode="disabled")[1::2])
    api.train(config, tmp_path / "run")
    said = [event.message for _, event in events.select(events.read(tmp_path / "run"), events.Warned)]
    assert [message for message in said if "2 ranks on a machine with 1 GPU" in message]


@pytest.mark.parametrize(("gpus", "rank", "named"), [(0, 0, "sees no CUDA device"), (1, 0, "rank 1"), (1, 1, "rank 1")])
def test_cuda_that_is_asked_for_and_not_there_for_every_rank_is_refused_on_all(machine, gpus, rank, named):
    machine(gpus, rank, 2)
    with pytest.raises(WorldError, match=named):
        pick_device(parallel(device="cuda"))


@pytest.mark.parametrize(("share", "backend"), [(False, "cpu:gloo,cuda:nccl"), (True, "cpu:gloo,cuda:gloo")])
def test_ranks_that_share_a_gpu_communicate_over_gloo(monkeypatch, share, backend):
    asked = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: asked.append(backend))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    world.connect(torch.device("cuda", 0), 60, share)
    assert asked == [backend]


def test_shards_on_gpus_that_are_shared_go_by_way_of_the_host_with_the_same_bits(tmp_path):
    """gloo crashes on a GPU's shards. Here the CPU's go the same way."""
    few = settings(budget__steps=4, data__micro_batches=4, eval__every_steps=0, wandb__mode="disabled")
    trainer("train", SMOKE, "--run", tmp_path / "one", *few)
    sharded = settings(parallel__strategy="hybrid", parallel__shard_ranks=2)
    torchrun(4, "train", SMOKE, "--run", tmp_path / "four", *few, *sharded, module="tests.shared_gpu_worker")
    assert summarise_run(tmp_path / "one")["state_sha256"] == summarise_run(tmp_path / "four")["state_sha256"]


@pytest.mark.parametrize(("backend", "through"), [("cpu:gloo,cuda:gloo", True), ("cpu:gloo,cuda:nccl", False)])
def test_only_gloo_needs_the_host_between_gpus(monkeypatch, backend: str, through: bool):
    monkeypatch.setattr(sharding.dist, "get_backend_config", lambda group: backend)
    group: Any = None
    assert sharding.through_host(torch.device("cuda", 0), group) is through
    assert not sharding.through_host(torch.device("cpu"), group)


@pytest.mark.parametrize(
    ("override", "needs"),
    [
        (["parallel.cuda_graphs=true", 'parallel.strategy="fsdp"'], 'a GPU, parallel.strategy = "replicate"'),
        (["parallel.cuda_graphs=true", 'sentinel.audit="1/8"'], "a GPU, .* no sentinel"),
        (["parallel.share_gpus=true", 'parallel.device="cpu"'], 'parallel.device "auto" or "cuda"'),
        (["numerics.tf32=true", 'numerics.precision="bf16"'], 'numerics.precision = "fp32" and a GPU'),
        (["model.bf16_residual=true"], 'numerics.precision = "bf16" and the built-in GPT'),
        (["model.fp8_head=true"], 'numerics.precision = "bf16" and the built-in GPT'),
        (["numerics.tf32=true", 'parallel.device="cpu"'], 'numerics.precision = "fp32" and a GPU'),
    ],
)
def test_settings_of_gpus_are_refused_where_they_have_no_effect(override, needs):
    with pytest.raises(ConfigError, match=f"has no effect here: it needs {needs}"):
        configs.load(SMOKE, override)


def test_tf32_is_mathematics_and_runs_from_before_it_keep_their_fingerprint():
    base = configs.load(SMOKE)
    assert configs.fingerprint(configs.load(SMOKE, ["numerics.tf32=true"])) != configs.fingerprint(base)
    assert configs.fingerprint(configs.load(SMOKE, ["numerics.tf32=false"])) == configs.fingerprint(base)


@pytest.fixture
def h100(monkeypatch) -> torch.device:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    return torch.device("cuda", 0)


def test_what_decides_the_bits_on_a_gpu_is_recorded(h100, monkeypatch):
    config = configs.load(SMOKE)
    found = provenance.computes_with(config, h100)
    assert (found["device"], found["device model"]) == ("cuda", "NVIDIA H100 80GB HBM3")
    assert found["attention in compiled blocks"] == "as in others"
    compiled = configs.load(SMOKE, ["numerics.compile=true", "model.context=128"])
    assert provenance.computes_with(compiled, h100)["attention in compiled blocks"] == "FlexAttention"
    assert found["CUDA"] == "13.0" and torch.__version__ in found["torch"]
    replace = monkeypatch.setattr
    changes: dict[str, Any] = {
        "attention": lambda: replace("torch.backends.cuda.cudnn_sdp_enabled", lambda: False),
        "TF32": lambda: replace("torch.get_float32_matmul_precision", lambda: "high"),
        "deterministic kernels": lambda: replace("torch.are_deterministic_algorithms_enabled", lambda: True),
        "cuBLAS workspace": lambda: monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8"),
    }
    for name, change in changes.items():
        before = provenance.computes_with(config, h100)
        change()
        now = provenance.computes_with(config, h100)
        assert {key for key in now if now[key] != before[key]} == {name}


def test_a_cpus_record_is_what_it_was_so_that_older_runs_resume():
    names = set(provenance.computes_with(configs.load(SMOKE), torch.device("cpu"))) - {*provenance.KERNEL_VARIABLES}
    assert names == {"code", "device", "device model", "CPU capability", "CPU threads", "torch"}


def test_a_run_goes_on_on_another_kind_of_device_only_on_purpose_and_is_told_what_chooses_it(h100, tmp_path):
    config = configs.load(SMOKE)
    on = {kind: provenance.computes_with(config, torch.device(kind)) for kind in ("cpu", "cuda")}
    for before, now in itertools.permutations(on):
        contents = {"computes_with": on[before], "code": provenance.code()}
        with pytest.raises(RunDirectoryError) as refused:
            provenance.compare(tmp_path, contents, [on[now]], accept=False)
        assert f'device: "{before}" → "{now}"' in str(refused.value)
        assert f'(parallel.device = "{before}" chooses the device)' in str(refused.value)
        assert provenance.compare(tmp_path, contents, [on[now]], accept=True)


def test_memory_that_a_cpu_does_not_have_is_an_error_with_what_was_asked_and_what_lowers_it():
    with pytest.raises(OutOfMemoryError) as refused, out_of_memory.explained(torch.device("cpu")):
        torch.empty(2**60, dtype=torch.uint8)
    fact, remedy = str(refused.value).splitlines()
    assert fact.startswith(f"cpu is out of memory: {2**60} bytes more were asked for; this process has held ")
    assert "parallel.activation_checkpointing = true" in remedy
    assert not refused.value.restart


def test_out_of_memory_after_steps_that_had_enough_is_worth_another_start():
    with pytest.raises(OutOfMemoryError) as refused, out_of_memory.explained(torch.device("cpu"), lambda: True):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.")
    assert refused.value.restart


@pytest.mark.parametrize(("others", "told"), [(0.0, False), (60.0, True)])
def test_memory_that_a_gpu_does_not_have_is_told_beside_what_other_processes_hold(monkeypatch, others, told):
    gib = 2**30
    free = (80 - 15 - others) * gib
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (int(free), 80 * gib))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 15 * gib)
    with pytest.raises(OutOfMemoryError) as refused, out_of_memory.explained(torch.device("cuda", 0)):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 66.00 GiB. GPU 0 has a total capacity of …")
    assert "cuda:0 is out of memory: 66.00 GiB more were asked for; this process holds 15.0 GiB" in str(refused.value)
    assert ("Other processes hold 60.0 GiB" in str(refused.value)) == told


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'",
    ],
)
def test_a_gpu_that_another_process_fills_is_told_where_not_even_cuda_has_room(monkeypatch, said: str):
    def ask(device: torch.device) -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory")  # asking takes room, too

    monkeypatch.setattr("torch.cuda.mem_get_info", ask)
    with pytest.raises(OutOfMemoryError) as refused, out_of_memory.explained(torch.device("cuda", 0)):
        raise RuntimeError(said)
    fact, remedy, _ = str(refused.value).splitlines()
    assert "no room even for what CUDA and its libraries need" in fact and "nvidia-smi tells how much is free" in fact
    assert "choose another one by CUDA_VISIBLE_DEVICES" in remedy


def test_a_gpu_that_another_process_has_for_itself_is_told():
    with (
        pytest.raises(WorldError, match=r"cuda:0 is busy.*\n.*nvidia-smi"),
        out_of_memory.explained(torch.device("cuda", 0)),
    ):
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")


def test_a_start_on_a_full_gpu_is_an_error_of_memory_and_no_traceback(machine, monkeypatch, tmp_path):
    def full(device: torch.device) -> None:
        raise RuntimeError("CUDA error: out of memory")

    machine(1)
    monkeypatch.setattr("torch.cuda.set_device", full)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (2**28, 80 * 2**30))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 0)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    config = configs.load(SMOKE, settings(wandb__mode="disabled")[1::2])
    with pytest.raises(OutOfMemoryError, match=r"Other processes hold 79\.8 GiB of this GPU"):
        api.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nodes_with_other_versions_of_torch_are_refused_with_the_ranks_and_how_to_go_on():
    versions = {"2.13.0+cu130": [0, 1], "2.11.0+cu130": [2, 3]}
    base = provenance.computes_with(configs.load(SMOKE), torch.device("cpu"))
    ranks = [base | {"torch": version} for version, members in versions.items() for _ in members]
    for contents in ({}, {"computes_with": ranks[0], "code": provenance.code()}):
        with pytest.raises(RunDirectoryError) as refused:
            provenance.compare(Path("run"), contents, ranks, accept=False)
        assert 'torch: "2.13.0+cu130" → "2.11.0+cu130" (rank 2, 3)' in str(refused.value)
        assert "its ranks differ from one another" in str(refused.value)
        assert "the same on all nodes" in str(refused.value)


def test_other_errors_of_torch_pass():
    with pytest.raises(RuntimeError, match="shape"), out_of_memory.explained(torch.device("cpu")):
        raise RuntimeError("shape mismatch")


def test_a_batch_goes_to_a_gpu_from_pinned_memory(monkeypatch):
    from trainer import step

    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: (tensor, str(device), non_blocking))
    ids = torch.arange(3)
    for device, count in (("cpu", 0), ("cuda", 1)):
        _, to, ahead = step.sent(ids, torch.device(device))
        assert (to, ahead, len(pinned)) == (device, True, count)
