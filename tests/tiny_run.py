"""The command line with a network of a few channels, so that a whole training run takes about a second.

    tiny_run.py FLAG ...    one run, as the script itself would do it; the environment variable DIE_ONCE=RANK:BATCH:FILE
                            kills that process of a torchrun job before that batch, once
    tiny_run.py             reads trials from stdin, a JSON object a line: {"arguments": [...], "log": FILE, "delay":
                            SECONDS, "operation": N}; each runs in a process of its own and is killed with SIGKILL after
                            the delay, or just before its N-th fsync or rename; answers, as JSON, with the exit code (-9
                            when killed) and the seconds
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

SCRIPT = Path(__file__).resolve().parent.parent / "mura_anomaly_detection.py"
sys.path.insert(0, str(SCRIPT.parent))

import mura_anomaly_detection as mad  # noqa: E402


class TinyNetwork(mad.Network):
    """Stands in for the real networks: features and head as theirs, but 6 channels and two layers."""

    def __init__(self, model: str, batch_norm: bool = True) -> None:
        nn.Module.__init__(self)
        self.model = model
        first = [nn.Conv2d(3, 4, 8, 8, bias=False), nn.BatchNorm2d(4)] if batch_norm else [nn.Conv2d(3, 4, 8, 8)]
        self.backbone = nn.Sequential(*first, nn.ReLU(), nn.Conv2d(4, 6, 4, 4), nn.ReLU())
        self.head = nn.Linear(6, 1)


class PlainNetwork(TinyNetwork):
    """The same without batch normalisation: how a batch is divided then makes no difference to what is learnt."""

    def __init__(self, model: str) -> None:
        super().__init__(model, batch_norm=False)


def dot(*arguments: Any) -> None:
    """Draw next to nothing, in the place of the figures, which take longer than all else in a tiny run."""
    Image.new("L", (1, 1)).save(arguments[-1], format="png")


def die_once(rank: str, batch: int, marker: Path) -> None:
    """Kill the process of that rank before its batch-th optimiser step, unless the marker says that it has happened."""
    if os.environ.get("RANK") != rank or marker.exists():
        return
    steps, update = itertools.count(), mad.Trainer.update

    def fatal(trainer: mad.Trainer) -> None:
        if next(steps) == batch:
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        update(trainer)

    mad.Trainer.update = fatal


def die_at(operation: int) -> None:
    """Kill this process just before its N-th operation that makes a file durable or gives it its name."""
    left = itertools.count(operation, -1)
    for owner, name in ((os, "fsync"), (Path, "replace")):
        real = getattr(owner, name)

        def counted(*arguments: Any, real: Any = real) -> Any:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        setattr(owner, name, counted)


def trial(task: dict[str, Any]) -> tuple[int, float]:
    """Fork a process for a run and kill it when the task says so; gives its exit code (-9: killed) and the seconds."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        if task.get("operation") is not None:
            die_at(task["operation"])
        code = 1
        try:
            code = mad.main(mad.parse_options(task["arguments"]))
        finally:
            sys.stdout.flush()
            os._exit(code)
    if task.get("delay") is not None:
        time.sleep(task["delay"])
        os.kill(child, signal.SIGKILL)  # a process that has ended is still there to be waited for
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic() - began


if __name__ == "__main__":
    mad.Network = PlainNetwork if os.environ.get("RANK") else TinyNetwork
    if "DIE_ONCE" in os.environ:
        wanted, at, file = os.environ["DIE_ONCE"].split(":")
        die_once(wanted, int(at), Path(file))
    if len(sys.argv) > 1:
        torch.set_num_threads(1)
        sys.exit(mad.main(mad.parse_options(sys.argv[1:])))
    mad.draw_report = mad.draw_history = dot
    for line in sys.stdin:
        print(json.dumps(trial(json.loads(line))), flush=True)
