"""Compares llama.cpp's answers on an exported model with ours. Not run by CI.

    python tests/benchmarks/gguf_answers.py runs/tiny/model runs/tiny/01-scenes/images \\
        --python ENVIRONMENT/bin/python

ENVIRONMENT has llama-cpp-python, built from its source, and numpy. The images are as large as the
encoder's square, so that nobody resizes them. For each type: how many answers are the same, how
many texts have the same tokens, and the largest difference of a logit behind a text. llama.cpp puts
CLIP's class token behind the patches (ggml-org/llama.cpp issue 25814), so that answers are compared
with those of our model doing the same, too.
"""

from __future__ import annotations

import argparse
import base64
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

QUESTIONS = ("What is in the picture?", "Describe the image in detail.", "Which digit is there?")
TEXTS = (
    "Which digit is there?",
    "The picture shows a red seven and a green two.",
    "  two  spaces\n",
)
TOKENS = 48


def ours(arguments: argparse.Namespace) -> None:
    """Export the model, answer, and have the other environment do the same."""
    import torch
    from PIL import Image

    import llavakit
    from llavakit import Exporter, Registry, Turn, Use

    model: Any = llavakit.load(arguments.model, device="cpu")
    images = sorted(arguments.images.glob("*.png"))[: arguments.count]
    cases = []
    for path in images:
        with Image.open(path) as image:
            assert image.size == (model.vision.image_size,) * 2, f"{path} is {image.size}"
        for question in QUESTIONS:
            turns = (Turn("human", f"<image>\n{question}"),)
            prompt = "".join(s.text for s in model.template.segments(turns, model.tokenizer))
            answer = model.generate(question, [path], max_new_tokens=TOKENS)
            data = base64.b64encode(path.read_bytes()).decode()
            with class_token_last(model.vision):
                last = model.generate(question, [path], max_new_tokens=TOKENS)
            cases.append({"prompt": prompt, "image": data, "answer": answer, "last": last})
    texts = []
    for text in TEXTS:
        ids = model.tokenizer(text)["input_ids"]
        with torch.inference_mode():
            logits = model.logits(text, [], raw=True)[-1].tolist()
        texts.append({"text": text, "ids": ids, "logits": logits})
    stop = list(model.template.stop(model.tokenizer))
    print(f"{'type':6}{'answers':>10}{'class last':>12}{'tokens':>9}{'logits':>9}")
    with tempfile.TemporaryDirectory() as work:
        asked = Path(work) / "asked.json"
        asked.write_text(json.dumps({"cases": cases, "texts": texts, "stop": stop}))
        for kind in ("f32", "f16", "q8_0"):
            folder = Path(work) / kind
            vision = "f32" if kind == "f32" else "f16"
            use = Use[Exporter].model_validate({"use": "gguf", "type": kind, "vision_type": vision})
            Registry.installed().build(use).export(model, folder)
            command = [arguments.python, __file__, "--theirs", str(folder), str(asked)]
            done = subprocess.run(command, check=True, capture_output=True)
            found = json.loads(done.stdout)
            pairs = list(zip(found["answers"], cases, strict=True))
            same, last = (
                # bytes that are no UTF-8 are marked by us, and left out by llama-cpp-python
                sum(a == c[key].replace("\ufffd", "").strip() for a, c in pairs)
                for key in ("answer", "last")
            )
            ids = sum(a == t["ids"] for a, t in zip(found["ids"], texts, strict=True))
            apart = max(
                abs(x - y)
                for theirs, t in zip(found["logits"], texts, strict=True)
                for x, y in zip(theirs, t["logits"], strict=True)
            )
            count = len(cases)
            print(
                f"{kind:6}{same:>4} of {count:2}{last:>6} of {count:2}{ids:>4} of {len(texts)}"
                f"{apart:>9.2g}"
            )
            for theirs, case in pairs:
                if theirs != case["last"] and arguments.verbose:
                    print(f"  ours   {case['last']!r}\n  theirs {theirs!r}")


@contextmanager
def class_token_last(vision: Any) -> Iterator[None]:
    """Have CLIP's class token behind the patches, and read from the second row on."""
    import torch

    if not vision.prefix_tokens:
        yield
        return

    def forward(pixels_BCHW: Any) -> Any:
        embed = vision.inner.embeddings
        patches_BPD = embed.patch_embedding(pixels_BCHW).flatten(2).transpose(1, 2)
        class_B1D = embed.class_embedding.expand(len(patches_BPD), 1, -1)
        hidden_BPD = torch.cat([patches_BPD, class_B1D], 1) + embed.position_embedding.weight
        hidden_BPD = vision.inner.pre_layrnorm(hidden_BPD)
        for block in list(vision.blocks)[: vision.depth]:
            found = block(hidden_BPD, attention_mask=None)
            hidden_BPD = found[0] if isinstance(found, tuple) else found
        return hidden_BPD

    before = vision.forward
    vision.forward = forward
    try:
        yield
    finally:
        vision.forward = before


def theirs(folder: Path, asked: Path) -> None:
    """Answer with llama.cpp, and print what came as JSON."""
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Llava15ChatHandler

    class Handler(Llava15ChatHandler):  # type: ignore[misc]
        DEFAULT_SYSTEM_MESSAGE = None

    table = json.loads(asked.read_text())
    (mmproj,) = map(str, folder.glob("mmproj-*.gguf"))
    (path,) = map(str, folder.glob("model-*.gguf"))
    answers = []
    handler = Handler(clip_model_path=mmproj, verbose=False)
    options: dict[str, Any] = {"n_ctx": 256, "n_threads": 2, "verbose": False, "logits_all": True}
    llama = Llama(path, chat_handler=handler, **options)
    for case in table["cases"]:
        url = f"data:image/png;base64,{case['image']}"
        handler.CHAT_FORMAT = "{% raw %}" + case["prompt"].replace("<image>", url) + "{% endraw %}"
        content = [{"type": "image_url", "image_url": {"url": url}}]
        reply = llama.create_chat_completion(
            messages=[{"role": "user", "content": content}],
            max_tokens=TOKENS, temperature=0.0, top_k=1, repeat_penalty=1.0, stop=table["stop"],
        )  # fmt: skip
        answers.append(reply["choices"][0]["message"]["content"].strip())
    plain = Llama(path, **options)
    ids, logits = [], []
    for text in table["texts"]:
        ids.append(plain.tokenize(text["text"].encode(), add_bos=True, special=True))
        plain.reset()
        plain.eval(text["ids"])  # the same ids, whatever it would make of the text
        logits.append([float(value) for value in plain.scores[len(text["ids"]) - 1]])
    print(json.dumps({"answers": answers, "ids": ids, "logits": logits}))


def main() -> None:
    if sys.argv[1:2] == ["--theirs"]:
        theirs(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--python", required=True)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--verbose", action="store_true")
    ours(parser.parse_args())


if __name__ == "__main__":
    main()
