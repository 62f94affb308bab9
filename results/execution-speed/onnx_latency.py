"""ResNet-18 dense and at half the MACs, in PyTorch and in ONNX Runtime, one thread, in turns.

    python results/execution-speed/onnx_latency.py PLAN [SECONDS]

PLAN is a plan for torchvision:resnet18. Times are CPU seconds of the one thread.
"""

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from torch import nn

import kronsearch as ks


def session(model: nn.Module, folder: Path, images: torch.Tensor) -> Callable[[], object]:
    """Return what runs the network in ONNX Runtime, its outputs compared before."""
    path = folder / "network.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images,), path, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    made = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name, given = made.get_inputs()[0].name, images.numpy()
    expected = model(images)
    found = torch.from_numpy(made.run(None, {name: given})[0])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    return lambda: made.run(None, {name: given})


def main(plan: str, seconds: float) -> None:
    torch.set_num_threads(1)
    dense = ks.load_model("torchvision:resnet18").eval()
    networks = {"dense": dense, "compressed": ks.apply_plan(dense, ks.load_plan(plan)).eval()}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for batch in (1, 8):
            images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
            last = images.to(memory_format=torch.channels_last)
            runs: dict[str, Callable[[], object]] = {}
            for name, network in networks.items():
                runs[f"{name}, PyTorch"] = lambda network=network, images=images: network(images)
                runs[f"{name}, PyTorch channels_last"] = lambda network=network, last=last: network(last)
                place = Path(folder) / f"{name}{batch}"
                place.mkdir()
                runs[f"{name}, ONNX Runtime"] = session(network, place, images)
            times: dict[str, list[float]] = {name: [] for name in runs}
            began, turn = time.perf_counter(), 0
            while turn < 7 or time.perf_counter() - began < seconds:
                for name, run in runs.items():
                    before = time.thread_time()
                    run()
                    if turn >= 2:
                        times[name].append(time.thread_time() - before)
                turn += 1
            for name, own in times.items():
                print(f"| {batch} | {name} | {1e3 * statistics.median(own):.1f} | {len(own)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 20.0)
