//! The committed generated code equals what the `.proto` files generate.

#![expect(clippy::disallowed_methods, reason = "a test reads and writes its files")]

use std::fs;
use std::path::Path;

use prost::Message as _;

const FILES: [&str; 3] = ["weightcast/v1/common.proto", "weightcast/v1/worker.proto", "weightcast/v1/job.proto"];

#[test]
fn committed_code_is_what_the_contract_generates() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let committed = root.join("src/gen");
    let update = std::env::var_os("WEIGHTCAST_UPDATE_PROTO").is_some();
    let fresh = if update { committed.clone() } else { Path::new(env!("CARGO_TARGET_TMPDIR")).join("gen") };
    fs::create_dir_all(&fresh).expect("create the output folder");

    let descriptors = protox::compile(FILES, [root]).expect("the contract compiles");
    fs::write(fresh.join("descriptors.bin"), descriptors.encode_to_vec()).expect("write the descriptors");
    tonic_prost_build::configure()
        .build_transport(false)
        .out_dir(&fresh)
        .compile_fds(descriptors)
        .expect("generate the code");

    for name in ["weightcast.v1.rs", "descriptors.bin"] {
        let fresh = fs::read(fresh.join(name)).expect("fresh code");
        let committed = fs::read(committed.join(name)).unwrap_or_default();
        assert!(fresh == committed, "{name} is stale: run WEIGHTCAST_UPDATE_PROTO=1 cargo test -p weightcast-proto");
    }
}
