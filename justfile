# The checks of CI.
check:
    bash .ci/run

# The main job on a small real model.
demo:
    cargo run --release -- demo

# Generate the gRPC code again after a change of the contract.
proto:
    WEIGHTCAST_UPDATE_PROTO=1 cargo test -p weightcast-proto

# Fuzz one parser (fuzz/README.md), for ten minutes unless told otherwise.
fuzz target seconds="600":
    mkdir -p fuzz/corpus/{{target}}
    RUSTC_BOOTSTRAP=1 cargo fuzz run {{target}} fuzz/corpus/{{target}} fuzz/seeds/{{target}} -- -max_total_time={{seconds}} -rss_limit_mb=512 -timeout=5 -max_len=65536 -dict=fuzz/json.dict
# Compile the device kernels to PTX again after a change of their source; needs nvcc 13.0.
ptx:
    bash src/device/kernels/ptx.sh
