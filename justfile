# The checks of CI.
check:
    bash .ci/run

# The main job on a small real model.
demo:
    cargo run --release -- demo

# Generate the gRPC code again after a change of the contract.
proto:
    WEIGHTCAST_UPDATE_PROTO=1 cargo test -p weightcast-proto

# Compile the device kernels to PTX again after a change of their source; needs nvcc 13.0.
ptx:
    bash src/device/kernels/ptx.sh
