"""Reading images on one core: ours, of both backends and fast, against transformers' processors.

    python tests/benchmarks/images_cpu.py [--rounds 5] [--images 24]

From JPEG files to normalised pixels of 224 and 336 pixels, decoding included. CPU time, the ways in
alternation, median of the rounds. What Pillow takes for two of its steps alone stands beside them,
and where numba is installed what our loops take from the first image on. Exits with 1 where our
pixels are not those of transformers' processor of the same backend to the last bit.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llavakit.stream.images import open_image
from llavakit_plugins.media import resizing
from llavakit_plugins.vision.preprocessing import MEAN, STD, Square, to_square

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "images"
Way = Callable[[Path], Tensor]


def write_photographs(folder: Path, size: tuple[int, int], count: int) -> list[Path]:
    """Write JPEGs of one size: cuts of real photographs where they are at hand, else blobs."""
    draw = np.random.default_rng(0)
    sources = [open_image(path, "x") for path in sorted(PHOTOS.glob("*.jpg"))]
    if not sources:
        noise = draw.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        sources = [Image.fromarray(noise).resize((1000, 750), Image.Resampling.BICUBIC)]
    files = []
    for number in range(count):
        source = sources[number % len(sources)]
        width = int(source.width * draw.uniform(0.7, 1))
        height = min(source.height, int(width * size[1] / size[0]))
        cut = source.crop((0, 0, width, height)).resize(size, Image.Resampling.LANCZOS)
        files.append(folder / f"{size[0]}-{number}.jpg")
        cut.save(files[-1], quality=90)
    return files


def ways(size: int) -> dict[str, Way]:
    edges = {"height": size, "width": size}
    shape: dict[str, Any] = {"size": {"shortest_edge": size}, "crop_size": edges}
    pil, torchvision = CLIPImageProcessorPil(**shape), CLIPImageProcessor(**shape)
    exact = Square(size, "crop", MEAN, STD)
    fast, default = exact._replace(fast=True), exact._replace(backend="torchvision")

    def theirs(processor: Any, path: Path) -> Tensor:
        with Image.open(path) as file:
            image = file.convert("RGB")
        pixels: Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def ours(square: Square, compiled: bool) -> Way:
        def read(path: Path) -> Tensor:
            resizing._Resized.pixels = resizing._MANY + 1 if compiled else 0
            return to_square(open_image(path, "x", size if square.fast else None), square)

        return read

    made = {
        "transformers, PIL": lambda path: theirs(pil, path),
        "transformers, default": lambda path: theirs(torchvision, path),
    }
    for name, square in {"": exact, ", torchvision": default, ", fast": fast}.items():
        made[f"ours{name}"] = ours(square, False)
        if resizing._load():
            made[f"ours{name}, numba"] = ours(square, True)
    return made


def steps_of_pillow(image: tuple[int, int], size: int) -> dict[str, Callable[[Path], object]]:
    """Return what no way that goes through Pillow can do without, were all else free."""
    whole = size * image[0] // image[1], size

    def decode(path: Path) -> Image.Image:
        with Image.open(path) as file:
            file.load()
        return file

    return {
        "Pillow's decoding": decode,
        "... and its resize": lambda path: decode(path).resize(whole, Image.Resampling.BICUBIC),
    }


def cpu_seconds(way: Callable[[Path], object], files: list[Path]) -> float:
    begun = time.process_time()
    for path in files:
        way(path)
    return time.process_time() - begun


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    equal = True
    print(f"{'images/s, one core':27}{'pixels':>8}{'rate':>9}{'ratio':>8}{'levels apart':>14}")
    with tempfile.TemporaryDirectory() as folder:
        for size, image in ((224, (640, 480)), (336, (640, 480)), (336, (1280, 960))):
            files = write_photographs(Path(folder), image, options.images)
            made = ways(size)
            steps = steps_of_pillow(image, size)
            timed = made | steps
            times: dict[str, list[float]] = {name: [] for name in timed}
            for number in range(options.rounds + 1):
                for name, way in timed.items():
                    spent = cpu_seconds(way, files)
                    if number:  # the first round warms up
                        times[name].append(spent)
            base = times["transformers, PIL"]
            print(f"{image[0]}x{image[1]}")
            for name in timed:
                ratio = statistics.median(a / b for a, b in zip(base, times[name], strict=True))
                rate = len(files) / statistics.median(times[name])
                if name in steps:
                    print(f"  {name:25}{size:8}{rate:9.0f}{ratio:7.2f}x")
                    continue
                apart = [made["transformers, PIL"](path) - made[name](path) for path in files]
                levels = 255 * float(
                    (torch.stack(apart) * torch.tensor(STD)[:, None, None]).abs().mean()
                )
                equal &= name not in ("ours", "ours, numba") or levels == 0
                if name.startswith("ours, torchvision"):
                    equal &= all(
                        torch.equal(made[name](path), made["transformers, default"](path))
                        for path in files
                    )
                print(f"  {name:25}{size:8}{rate:9.0f}{ratio:7.2f}x{levels:14.3f}")
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
