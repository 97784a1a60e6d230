# The images that k8s/ runs: one binary, no root, nothing to write to but mounted volumes.
#
#   docker build --target cpu  -t weightcast:0.1.0 .
#   docker build --target cuda -t weightcast:0.1.0-cuda .
#
# cpu: the default build. It loads, saves and moves weights on GPUs too where the node's driver is mounted into the container, as
# the device plugin does it; between GPUs it moves them by TCP, because no NCCL is in it. cuda: also trains on GPUs (the
# feature `cuda`), and has NCCL.
ARG RUST=1.95
ARG DEBIAN=trixie
ARG CUDA=13.0.2
ARG UBUNTU=24.04

FROM rust:${RUST}-slim-${DEBIAN} AS toolchain

FROM toolchain AS build
WORKDIR /source
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,target=/source/target,sharing=locked \
    cargo build --release --locked --bin weightcast \
    && install -D --strip target/release/weightcast /out/weightcast

FROM nvidia/cuda:${CUDA}-devel-ubuntu${UBUNTU} AS build-cuda
ENV RUSTUP_HOME=/usr/local/rustup CARGO_HOME=/usr/local/cargo PATH=/usr/local/cargo/bin:$PATH
COPY --from=toolchain /usr/local/rustup /usr/local/rustup
COPY --from=toolchain /usr/local/cargo /usr/local/cargo
WORKDIR /source
COPY . .
# 80: portable to every GPU since; 90 would be compiled for one generation alone.
ENV CUDA_COMPUTE_CAP=80 CUDARC_CUDA_VERSION=13000 LIBRARY_PATH=/usr/local/cuda/lib64/stubs
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,target=/source/target,sharing=locked,id=target-cuda \
    cargo build --release --locked --features cuda --bin weightcast \
    && install -D --strip target/release/weightcast /out/weightcast

# With cuBLAS, cuRAND, NVRTC and NCCL; the driver's libraries are the node's.
FROM nvidia/cuda:${CUDA}-runtime-ubuntu${UBUNTU} AS cuda
COPY --from=build-cuda /out/weightcast /usr/local/bin/weightcast
USER 65532:65532
ENTRYPOINT ["weightcast"]

FROM debian:${DEBIAN}-slim AS cpu
COPY --from=build /out/weightcast /usr/local/bin/weightcast
USER 65532:65532
ENTRYPOINT ["weightcast"]
