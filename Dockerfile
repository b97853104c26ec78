# syntax=docker/dockerfile:1
# Two images, whose program does not run as root:
#
#     docker build --target cpu -t llavakit:cpu .
#     docker build --target cuda -t llavakit:cuda .
#     docker run --rm --gpus all -v "$PWD:/work" llavakit:cuda tiny
#
# torch is the index's own build: on Linux that has CUDA in it. For a smaller CPU image give the index
# of CPU builds that pytorch.org names: --build-arg TORCH_INDEX=...
# Keys are given when it runs, from the environment: docker run -e OPENAI_API_KEY ...

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim AS base
ENV PYTHONUNBUFFERED=1 \
    HF_HOME=/work/.cache/huggingface
RUN useradd --create-home --uid 1000 llava \
    && mkdir /work \
    && chown llava:llava /work
WORKDIR /work

FROM base AS cpu
ARG TORCH_INDEX=""
ARG EXTRAS="demo,images,onnx,openai,lora"
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    if [ -n "$TORCH_INDEX" ]; then pip install --no-cache-dir --index-url "$TORCH_INDEX" torch torchvision; fi \
    && pip install --no-cache-dir "$(echo /wheels/llavakit-*.whl)[$EXTRAS]"
USER llava
ENTRYPOINT ["llava-run"]
CMD ["--help"]

FROM base AS cuda
ARG EXTRAS="demo,images,onnx,openai,lora,liger"
# Triton compiles the launchers of its kernels with a C compiler when they first run
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/llavakit-*.whl)[$EXTRAS]"
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER llava
ENTRYPOINT ["llava-run"]
CMD ["--help"]
