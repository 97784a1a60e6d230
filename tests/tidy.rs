//! The shape of the source tree: rings, sizes and first lines. Each message names what to do instead.

use std::fs;
use std::path::{Path, PathBuf};

/// The modules by ring, as docs/ARCHITECTURE.md draws them. A module imports its own ring and lower ones.
const RINGS: [&[&str]; 5] = [
    &["types", "clock", "error", "faults"],
    &["format", "model", "quant", "plan", "manifest", "membership", "adapter", "recipe", "estimate", "k8s"],
    &["store", "hub", "device", "comm", "tasks", "state", "nn", "data", "metrics", "tls", "telemetry"],
    &["checkpoint", "cache", "load", "train", "coordinator", "worker"],
    &["rpc", "config", "web", "app", "bench", "cli"],
];

/// Imports that go upward, each with its reason.
const EXCEPTIONS: [(&str, &str, &str); 3] = [
    ("worker", "rpc", "the worker is the client of the contract; its session sends the messages"),
    ("membership", "clock", "an argument's type, never a reading of the clock"),
    ("load", "checkpoint", "same ring: a checkpoint's files are read through its verified reader"),
];

/// Lines of a file without its tests: about 300, never more than this.
const MAX_LINES: usize = 500;

fn sources(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).expect("a source folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// A file's text up to its unit tests.
fn without_tests(text: &str) -> &str {
    text.split("\n#[cfg(test)]\nmod tests {").next().unwrap_or(text)
}

fn ring(module: &str) -> Option<usize> {
    RINGS.iter().position(|ring| ring.contains(&module))
}

/// imports go downward.
#[test]
fn rings_import_downward_only() {
    let source = root().join("src");
    let mut faults = Vec::new();
    for path in sources(&source) {
        let relative = path.strip_prefix(&source).expect("below src");
        let module = relative.components().next().expect("a name").as_os_str().to_string_lossy().replace(".rs", "");
        let Some(own) = ring(&module) else {
            assert!(
                module == "lib" || module == "main",
                "module {module} is in no ring: add it to RINGS and to the docs"
            );
            continue;
        };
        let text = fs::read_to_string(&path).expect("a source file");
        for used in without_tests(&text).split("crate::").skip(1) {
            let used: String = used.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
            let excepted = EXCEPTIONS.iter().any(|exception| exception.0 == module && exception.1 == used);
            if ring(&used).is_some_and(|ring| ring > own) && !excepted {
                faults.push(format!("{}: {module} (ring {own}) uses {used}", relative.display()));
            }
        }
    }
    assert!(faults.is_empty(), "move the code down, or pass the data as an argument:\n{}", faults.join("\n"));
}

/// only `rpc` and the worker's session name the contract's types; people's answers are printed from them.
#[test]
fn proto_types_stay_at_the_edge() {
    let source = root().join("src");
    for path in sources(&source) {
        let text = fs::read_to_string(&path).expect("a source file");
        let relative = path.strip_prefix(&source).expect("below src").display().to_string();
        let of_session = ["session", "calls", "reports", "joining", "renewing"].map(|file| format!("worker/{file}.rs"));
        let session = of_session.contains(&relative);
        let allowed = relative.starts_with("rpc/")
            || session
            || ["cli/job.rs", "cli/logs.rs", "cli/queue.rs"].contains(&relative.as_str());
        assert!(allowed || !text.contains("weightcast_proto"), "{relative} names a proto type: translate it in rpc");
    }
}

#[test]
fn files_are_small_and_say_what_they_are() {
    let mut faults = Vec::new();
    for folder in ["src", "launcher/src", "tests"] {
        for path in sources(&root().join(folder)) {
            let text = fs::read_to_string(&path).expect("a source file");
            let lines = without_tests(&text).lines().count();
            if lines > MAX_LINES {
                faults.push(format!("{}: {lines} lines without tests; split it", path.display()));
            }
            if !text.starts_with("//!") {
                faults.push(format!("{}: no first line //! that says what it owns", path.display()));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// `unsafe` stands only where conventions allow it.
#[test]
fn unsafe_is_confined() {
    let source = root().join("src");
    for path in sources(&source) {
        let relative = path.strip_prefix(&source).expect("below src").display().to_string();
        let text = fs::read_to_string(&path).expect("a source file");
        let found = text
            .lines()
            .any(|line| line.contains("unsafe {") || line.contains("unsafe impl") || line.contains("unsafe fn"));
        let allowed = ["device/", "comm/nccl/", "quant/kernels/", "nn/ops/product.rs"]
            .iter()
            .any(|folder| relative.starts_with(folder));
        assert!(
            allowed || !found,
            "{relative} has unsafe code: it belongs in device, comm/nccl, quant/kernels or nn/ops/product.rs"
        );
    }
}
