//! Weights on a device, black box: real processes with a mock driver, which keeps device memory in host memory and carries
//! copies out only when they are waited for. Digests are those of the same job on the host.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-llama");

/// A directory for one test: a library folder with the mock driver, runtime files, checkpoints.
struct Place {
    directory: tempfile::TempDir,
    devices: u32,
    bytes: u64,
    nccl: PathBuf,
}

/// Where cargo puts a library of the workspace: beside the test's own binary, or one level up.
fn library(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("a test has a binary");
    let mut found = own.ancestors().skip(1).take(2).map(|folder| folder.join(name));
    found.find(|path| path.exists()).expect("the library was built: it is a dev-dependency")
}

impl Place {
    fn new(devices: u32) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let libraries = directory.path().join("lib");
        std::fs::create_dir(&libraries).expect("a new folder");
        std::os::unix::fs::symlink(library("libweightcast_mock_cuda.so"), libraries.join("libcuda.so.1"))
            .expect("a new link");
        std::os::unix::fs::symlink(library("libweightcast_mock_cuda.so"), libraries.join("libcuda.so"))
            .expect("a new link");
        Self { directory, devices, bytes: 8 << 30, nccl: library("libweightcast_mock_nccl.so") }
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the program starts")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_weightcast"));
        command
            .args(arguments)
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("LD_LIBRARY_PATH", self.path("lib"))
            .env("WEIGHTCAST_MOCK_CUDA_DEVICES", self.devices.to_string())
            .env("WEIGHTCAST_MOCK_CUDA_BYTES", self.bytes.to_string())
            .env("NCCL_LIBRARY", &self.nccl)
            .stdin(Stdio::null());
        command
    }

    /// Runs a job to its end; it must succeed.
    fn finish(&self, ranks: u32, flags: &[&str]) -> Value {
        let (ranks, checkpoints) = (ranks.to_string(), self.path("checkpoints"));
        let mut arguments =
            vec!["launch", "--nproc-per-node", &ranks, "--checkpoint-dir", &checkpoints, "--digests", "--json"];
        arguments.extend(flags);
        let output = self.run(&arguments);
        assert!(output.status.success(), "{flags:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("JSON on stdout")
    }

    fn refuse(&self, arguments: &[&str], code: i32, expected: &str) {
        let output = self.run(arguments);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
        assert!(message.contains(expected), "{arguments:?}: expected {expected}: {message}");
    }
}

fn devices(result: &Value) -> Vec<&str> {
    result["loads"].as_array().expect("loads").iter().filter_map(|load| load["device"].as_str()).collect()
}

/// Load to devices, commit from there, resume to devices and to the host on other numbers of ranks: always the digests of
/// the load on the host.
#[test]
fn weights_on_devices_are_those_on_the_host() {
    for flags in [&["--quantize", "nf4", "--double"][..], &["--quantize", "int8"], &[]] {
        for strategy in ["low-memory", "striped", "full"] {
            let place = Place::new(2);
            let mut all = vec!["--model", MODEL, "--strategy", strategy, "--resume", "never"];
            all.extend(flags);
            let host = place.finish(2, &[&all[..], &["--device", "cpu"]].concat());
            assert_eq!(devices(&host), ["host", "host"]);
            let device = place.finish(2, &[&all[..], &["--save"]].concat());
            assert_eq!(devices(&device), ["cuda:0", "cuda:1"], "auto finds both");
            assert!(device["digests"] == host["digests"], "{all:?}");
            assert_eq!(device["checkpoint"], "step-000000000");
            for (ranks, device, expected) in [(1, "cuda", "cuda:0"), (2, "cuda", "cuda:0"), (3, "cpu", "host")] {
                let resumed = place.finish(ranks, &["--resume", "must", "--device", device]);
                assert_eq!(devices(&resumed)[0], expected);
                assert!(resumed["digests"] == host["digests"], "{all:?} resumed on {ranks} with {device}");
            }
            let verified = place.run(&["checkpoint", "verify", "--deep", &place.path("checkpoints")]);
            assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
        }
    }
}

fn backends(result: &Value) -> Vec<&str> {
    result["loads"].as_array().expect("loads").iter().filter_map(|load| load["backend"].as_str()).collect()
}

/// Between devices pieces go through NCCL, straight from device memory to device memory; without it through TCP.
#[test]
fn nccl_moves_the_same_bytes_between_devices() {
    for flags in [&["--quantize", "nf4", "--double"][..], &["--quantize", "int8"], &[]] {
        for (strategy, placement) in [("low-memory", "shard"), ("striped", "shard"), ("low-memory", "replicate")] {
            let mut place = Place::new(3);
            let mut all = vec!["--model", MODEL, "--strategy", strategy, "--placement", placement];
            all.extend(flags);
            let host = place.finish(1, &[&all[..], &["--device", "cpu"]].concat());
            assert_eq!(backends(&host), [""], "one rank has nobody to talk to");
            let nccl = place.finish(3, &all);
            assert_eq!(backends(&nccl), ["nccl"; 3]);
            assert_eq!(devices(&nccl), ["cuda:0", "cuda:1", "cuda:2"]);
            assert!(nccl["digests"] == host["digests"], "{all:?}");
            place.nccl = PathBuf::from("/nowhere/libnccl.so.2");
            let tcp = place.finish(3, &all);
            assert_eq!(backends(&tcp), ["tcp"; 3]);
            assert!(tcp["digests"] == host["digests"], "{all:?}");
        }
    }
}

#[test]
fn nccl_is_refused_where_a_rank_cannot_use_it() {
    let mut place = Place::new(2);
    let job = ["launch", "--nproc-per-node", "2", "--model", MODEL, "--backend", "nccl"];
    place.refuse(&[&job[..], &["--device", "cpu"]].concat(), 78, "it has no CUDA device");
    place.nccl = PathBuf::from("/nowhere/libnccl.so.2");
    place.refuse(&job, 78, "/nowhere/libnccl.so.2");
}

/// A rank that stops in the middle of NCCL's work is noticed, and the others end.
#[test]
fn a_fault_of_nccl_ends_the_job() {
    let place = Place::new(2);
    let job = ["launch", "--nproc-per-node", "2", "--model", MODEL];
    let mut command = place.command(&job);
    // The mock's fault 1: an asynchronous error on rank 1 at its call 5.
    let output = command.env("WEIGHTCAST_MOCK_NCCL_FAULT", "1:1:5").output().expect("the program starts");
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(69), "{message}");
    assert!(message.contains("mock fault"), "{message}");
}

#[test]
fn ranks_share_a_device_only_when_told_to() {
    let place = Place::new(1);
    let model = ["--model", MODEL, "--quantize", "nf4"];
    let auto = place.finish(2, &model);
    assert_eq!(devices(&auto), ["host", "host"]);
    let launch = [&["launch", "--nproc-per-node", "2"][..], &model].concat();
    place.refuse(&[&launch[..], &["--device", "cuda"]].concat(), 78, "2 ranks on this host and 1 CUDA devices");
    let shared = place.finish(2, &[&model[..], &["--device", "cuda", "--share-devices"]].concat());
    assert_eq!(devices(&shared), ["cuda:0", "cuda:0"]);
    assert!(shared["digests"] == auto["digests"]);
    assert_eq!(backends(&shared), ["tcp"; 2], "by itself NCCL is not tried between ranks of one device");
    let nccl = place.finish(2, &[&model[..], &["--device", "cuda", "--share-devices", "--backend", "nccl"]].concat());
    assert_eq!(backends(&nccl), ["nccl"; 2]);
    assert!(nccl["digests"] == auto["digests"]);
}

#[test]
fn a_plan_counts_device_memory_and_refuses_what_does_not_fit() {
    let mut place = Place::new(2);
    let plan = ["plan", "--ranks", "2", "--model", MODEL, "--json"];
    let output = place.run(&plan);
    let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(found["gpu"], "cuda:0 Mock CUDA device, cuda:1 Mock CUDA device");
    for rank in found["ranks"].as_array().expect("ranks") {
        let figure = |name: &str| rank[name].as_u64().expect("a figure");
        assert_eq!(figure("peak_host_bytes"), figure("window_bytes") + figure("overhead_bytes"));
        assert_eq!(figure("peak_device_bytes"), figure("weights_bytes") + figure("padding_bytes") + (576 << 20));
    }
    place.bytes = 100 << 20;
    place.refuse(&plan, 78, "device cuda:0: its 1 ranks do not fit");
    let host = place.run(&["plan", "--model", MODEL, "--device", "cpu", "--json"]);
    let host: Value = serde_json::from_slice(&host.stdout).expect("JSON");
    assert_eq!(host["ranks"][0]["peak_device_bytes"], 0);
}

#[test]
fn a_device_that_is_not_there_is_refused() {
    let place = Place::new(0);
    place.refuse(&["plan", "--model", MODEL, "--device", "cuda"], 78, "load.device: the NVIDIA driver finds no device");
}
