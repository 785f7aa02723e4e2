"""The command line with a network of a few channels: a whole training run takes a second.

    tiny_run.py FLAG ...    one run, as the script itself would do it; the environment variable
                            DIE_ONCE=RANK:BATCH:FILE kills that process of a torchrun job before
                            that batch, once
    tiny_run.py             a server: reads a request a line, JSON, and answers with JSON.
                            {"arguments": [...], "log": FILE, ...} forks a process for a run and
                            answers with its process ID; {"wait": PID} answers with its exit code,
                            or minus the signal that ended or stopped it; {"poll": PID} does so, or
                            answers 1000 where it is still running. Further keys of a run:
                            "environment": {NAME: VALUE},
                            "batch_norm": false for a network that has none,
                            "signal", and "operation": N or "batch": N: the process sends itself
                            this signal just before it renames or removes a file for the N-th time
                            (from 0), or before its N-th batch,
                            "stop_at_states": true to stop before each state that is saved,
                            "save_network": FILE for the weights at the end of training
"""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from conftest import mura
from PIL import Image
from torch import nn
from tqdm.auto import tqdm


class TinyClassifier(nn.Module):
    """Stands in for torchvision's networks: two convolutions, 6 channels."""

    def __init__(self, batch_norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 8, 8, bias=not batch_norm)
        self.norm1 = nn.BatchNorm2d(4) if batch_norm else nn.Identity()
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 6, 4, 4)
        self.fc = nn.Linear(6, 2)


def tiny_architecture(batch_norm: bool = True) -> mura.Architecture:
    """Return the entry of ARCHITECTURES.

    Without batch normalisation how a batch is divided makes no difference to what is learnt.
    """
    stages = (mura.Stage("conv1 norm1 relu1", 8, 3.5), mura.Stage("conv2 relu1", 32, 15.5))
    return mura.Architecture(lambda: TinyClassifier(batch_norm), "", "fc", stages)


def blank_picture(*arguments: Any, **options: Any) -> bytes:
    """Return a PNG of one pixel, in the place of the plots, which take longer than a tiny run."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, format="png")
    return file.getvalue()


def signal_at_batch(batch: int, signum: int, marker: Path | None = None) -> None:
    """Send this process a signal before its N-th batch; with a marker only if that is not there."""
    calls, draw = itertools.count(), mura.draw_augmentation

    def counted(*arguments: Any) -> torch.Tensor:
        if next(calls) == batch and not (marker and marker.exists()):
            if marker:
                marker.touch()
            os.kill(os.getpid(), signum)
        return draw(*arguments)

    mura.draw_augmentation = counted


def stop_at_states() -> None:
    """Have this process stop before each saved state, until it is told to continue."""
    write = mura.write_checkpoint

    def stopping(path: Path, content: dict[str, Any]) -> str:
        if content["kind"] == "state":
            os.kill(os.getpid(), signal.SIGSTOP)
        return write(path, content)

    mura.write_checkpoint = stopping


def signal_at_operation(operation: int, signum: int) -> None:
    """Send this process a signal just before its N-th rename or removal of a file."""
    left = itertools.count(operation, -1)
    for name in ("replace", "unlink"):
        real = getattr(os, name)

        def counted(path: Any, *arguments: Any, real: Any = real, **options: Any) -> Any:
            if os.path.lexists(path) and next(left) == 0:
                os.kill(os.getpid(), signum)
            return real(path, *arguments, **options)

        setattr(os, name, counted)


def save_network(file: str) -> None:
    """Have each process save its weights when training ends, to the file with its rank appended."""
    fit = mura.Trainer.fit

    def saved(trainer: mura.Trainer) -> None:
        fit(trainer)
        torch.save(trainer.network.state_dict(), f"{file}.{os.environ.get('RANK', 0)}")

    mura.Trainer.fit = saved


def run(arguments: list[str]) -> int:
    """Run a command; returns its exit code."""
    torch.set_num_threads(1)
    try:
        return int(mura.main(mura.parse_options(arguments)))
    except SystemExit as left:
        return int(left.code or 0)


def start(task: dict[str, Any]) -> int:
    """Fork a process for a run; returns its ID."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        tqdm.set_lock(threading.RLock())  # the inherited one is shared: a killed sibling may hold it
        log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(task.get("environment", {}))
        mura.ARCHITECTURES["resnet50"] = tiny_architecture(task.get("batch_norm", True))
        if "operation" in task:
            signal_at_operation(task["operation"], task["signal"])
        if "batch" in task:
            signal_at_batch(task["batch"], task["signal"])
        if "stop_at_states" in task:
            stop_at_states()
        if "save_network" in task:
            save_network(task["save_network"])
        code = run(task["arguments"])
    finally:
        sys.stdout.flush()
        os._exit(code)


def poll(process: int) -> int:
    """Return a process's exit code or minus its signal; 1000 where it is running."""
    found, status = os.waitpid(process, os.WNOHANG | os.WUNTRACED)
    if not found:
        return 1000
    return -os.WSTOPSIG(status) if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)


def wait(process: int, limit: float = 120) -> int:
    """Return as `poll`, when the process has ended or stopped; one that hangs is killed."""
    deadline = time.monotonic() + limit
    while (code := poll(process)) == 1000 and time.monotonic() < deadline:
        time.sleep(0.002)
    if code == 1000:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return code


def serve() -> None:
    """Answer requests until stdin ends."""
    import matplotlib.pyplot  # noqa: F401 (once here, rather than in each process)

    for name in [name for name in vars(mura) if name.startswith("plot_")]:
        setattr(mura, name, blank_picture)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(request["wait"])
        elif "poll" in request:
            answer = poll(request["poll"])
        else:
            answer = start(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    mura.ARCHITECTURES["resnet50"] = tiny_architecture(batch_norm="RANK" not in os.environ)
    if "DIE_ONCE" in os.environ:
        wanted, at, file = os.environ["DIE_ONCE"].split(":")
        if os.environ.get("RANK") == wanted:
            signal_at_batch(int(at), signal.SIGKILL, Path(file))
    if len(sys.argv) > 1:
        sys.exit(run(sys.argv[1:]))
    serve()
