"""A run over two hosts: the agent of one is killed in the middle and started again, and the result is the same."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from hosts import Host, free_port, two_hosts
from launched import ENVIRONMENT
from longtake.config.dump import to_toml
from longtake.config.schema import RunConfig
from longtake.progress import Reporter
from longtake.training.checkpoint import checkpoint_path
from longtake.training.run import train
from processes import Started, started
from runs import Scene, learnt, scene

STEPS = 16


def config_of(where: Scene, run: Path, strategy: str) -> RunConfig:
    """Enough steps to be noticed in the middle, at a rate at which a lost state would show."""
    training = {"steps": STEPS, "global_batch_size": 2, "warmup_steps": 2, "learning_rate": 1e-3}
    parallel = {"strategy": strategy}
    return where.config(run, training=training, parallel=parallel, output={"save_every": 2, "keep": STEPS})


class Launch:
    """What starts the agent of a host, each time with the same words."""

    def __init__(self, hosts: tuple[Host, Host], config: Path) -> None:
        self.hosts = hosts
        self.config = config
        self.endpoint = f"{hosts[0].address}:{free_port()}"
        self.count = 0

    def agent(self, number: int) -> AbstractContextManager[Started]:
        """Torchrun on a host. Its own name leads nowhere in a namespace, so it is told its address and its part."""
        host = self.hosts[number]
        many = ["--nnodes", 2, "--nproc-per-node", 1, "--max-restarts", 3]
        meeting = ["--rdzv-id", "job", "--rdzv-backend", "c10d", "--rdzv-endpoint", self.endpoint]
        # 3 x 15 seconds without a sign, not 3 x 5, and an agent counts as dead: on busy cores one may be silent
        own = ["--rdzv-conf", f"is_host={1 - number},keep_alive_interval=15", "--local-addr", host.address]
        torchrun = [*host.inside, sys.executable, "-m", "torch.distributed.run", *many, *meeting, *own]
        self.count += 1
        return started(
            [*torchrun, "-m", "longtake", "train", self.config],
            self.config.with_name(f"agent-{self.count}-of-host-{number}"),
            {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": host.interface, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        )


@pytest.mark.long
def test_a_run_over_two_hosts_goes_on_when_the_agent_of_one_was_killed_and_ends_as_one_process_does(
    tiny_root: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = scene("tiny-t2v", tiny_root("tiny-t2v"), tmp_path / "scene", count=6)
    whole, shared = (
        config_of(where, tmp_path / name, strategy) for name, strategy in (("whole", "single"), ("shared", "fsdp2"))
    )
    where.prepare(whole)
    train(whole, False, Reporter(quiet=True))
    (tmp_path / "shared.toml").write_text(to_toml(shared), encoding="utf-8")

    with two_hosts() as (*hosts, reason):
        with capsys.disabled():
            print(f"\ntwo agents on one loopback: {reason}" if reason else "\ntwo hosts in two network namespaces")
        launch = Launch((hosts[0], hosts[1]), tmp_path / "shared.toml")
        lines = killed_and_started_again(launch, tmp_path / "shared")

    resumed = [int(line.rpartition(" ")[2]) for line in lines if line.startswith("resumed after step ")]
    assert resumed, "\n".join(lines)  # more than once where an agent came late: each time from what was saved last
    assert 4 <= resumed[0] < STEPS
    assert resumed == sorted(resumed)
    assert_alike(tmp_path / "shared", tmp_path / "whole")


def killed_and_started_again(launch: Launch, run: Path) -> list[str]:
    """What all have said when both hosts have left with 0, and nobody of either is there any more."""
    with launch.agent(0) as first:
        with launch.agent(1) as second:
            first.until(checkpoint_path(run, 4).is_dir)
            second.process.kill()
            first.until(lambda: not second.alive, seconds=10)  # its rank with it
        assert not (run / "adapter.safetensors").exists()
        with launch.agent(1) as again:
            assert (first.status(), again.status()) == (0, 0), "\n".join([*first.lines, "--", *again.lines])
            assert first.alive == again.alive == []
            return [*first.lines, *second.lines, *again.lines]


def assert_alike(one: Path, other: Path) -> None:
    """Each step once and in order, losses and weights that differ by rounding alone."""
    logs = [learnt(run) for run in (one, other)]
    assert [steps_of(log, "loss") for log in logs] == [[*range(1, STEPS + 1)]] * 2
    assert [steps_of(log, "validation_loss") for log in logs] == [[0, STEPS]] * 2
    for here, there in zip(*logs, strict=True):
        for key in here.keys() & {"loss", "validation_loss"}:
            assert here[key] == pytest.approx(there[key], rel=2e-6)
    weights, others = (load_file(run / "adapter.safetensors") for run in (one, other))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert float((tensor - others[name]).abs().max()) <= 1e-5, name


def steps_of(log: list[dict[str, Any]], key: str) -> list[int]:
    return [line["step"] for line in log if key in line]
