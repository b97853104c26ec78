"""How long training pauses for a checkpoint of divided weights, written in the background.

    torchrun --nproc-per-node 4 tests/benchmarks/checkpoint_pause.py [MEGABYTES]

The peer is the same save waited for, in the same run.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from llavakit_plugins.training.checkpoints import Checkpoints
from llavakit_plugins.training.sharded_checkpoints import ShardedCheckpoints
from llavakit_plugins.training.torchrun import join

LIMIT = 0.10
ROUNDS = 5


def main() -> None:
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    with join("cpu") as (group, _), TemporaryDirectory() as own:
        folder = Path(group.broadcast(own))
        mesh = init_device_mesh("cpu", (group.size,))
        tensors = {
            f"parameter/{number}": distribute_tensor(
                torch.randn(1 << 10, 1 << 12), mesh, [Shard(0)]
            )
            for number in range(megabytes // 16)
        }
        shards = ShardedCheckpoints(Checkpoints(folder, 1), group)
        pauses, wholes = [], []
        for step in range(1, ROUNDS + 1):
            begun = time.perf_counter()
            shards.save(step, tensors, {}, lambda: None)
            pauses.append(time.perf_counter() - begun)
            shards.finish()
            wholes.append(time.perf_counter() - begun)
        group.broadcast(None)  # the folder goes with its process
        if group.is_main:
            pause, whole = median(pauses), median(wholes)
            print(
                f"{'MB':>6} {'ranks':>5} {'pause s':>8} {'waited s':>8} {'ratio':>6} {'limit':>6}"
            )
            print(
                f"{megabytes:6} {group.size:5} {pause:8.3f} {whole:8.3f} {pause / whole:6.2f} "
                f"{LIMIT:6.2f}"
            )


if __name__ == "__main__":
    main()
