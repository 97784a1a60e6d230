//! `weightcast demo`: the main job on a real model, with a crash in the middle, in a directory of its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::running::is_alive;
use crate::checkpoint::{self, Depth};
use crate::error::{Classify, Kind};
use crate::manifest::Manifest;
use crate::store::{LocalStore, Store};
use crate::types::{Step, TensorDigest};

/// How long the demo waits for something that takes a fraction of a second.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why the demo did not succeed.
#[derive(Debug, thiserror::Error)]
#[error("demo: {what}: {detail}")]
pub struct DemoError {
    /// Which step.
    pub what: &'static str,
    /// What happened.
    pub detail: String,
}

impl Classify for DemoError {
    fn kind(&self) -> Kind {
        Kind::Internal
    }
}

fn failed(what: &'static str) -> impl FnOnce(&dyn std::fmt::Display) -> DemoError {
    move |detail| DemoError { what, detail: detail.to_string() }
}

/// Runs the demo with `model` in the empty directory `work`, telling `say` what happens.
///
/// # Errors
/// [`DemoError`] at the first thing that is not as promised.
pub fn run(model: &Path, work: &Path, say: &mut dyn FnMut(String)) -> Result<(), DemoError> {
    let checkpoints = work.join("checkpoints");
    let store = LocalStore::new(&checkpoints);
    say(format!(
        "1. Load {} on 4 ranks, quantized to NF4 by rank 0, and commit a sharded checkpoint.",
        model.display()
    ));
    let mut job = start(work, &["--nproc-per-node", "4", "--hold", "--save"], Some(model), &checkpoints)?;
    let pids = match wait_for_commit(&mut job, &store) {
        Ok(()) => descendants(job.id()),
        Err(error) => {
            let _ = job.kill();
            let _ = job.wait();
            return Err(error);
        }
    };
    let first = checkpoint::newest(&store).map_err(|error| failed("opening the checkpoint")(&error))?.0;
    say(format!(
        "   Committed {}: {} tensors in {} shard files, written by {} ranks.",
        first.directory,
        first.manifest.tensors.len(),
        first.manifest.files.len(),
        first.manifest.world
    ));

    say(format!(
        "2. End the whole job with SIGKILL (launcher process {}, {} processes below it).",
        job.id(),
        pids.len()
    ));
    job.kill().map_err(|error| failed("killing the job")(&error))?;
    job.wait().map_err(|error| failed("waiting for the killed job")(&error))?;
    wait_until(|| pids.iter().all(|&pid| !is_alive(pid)))
        .ok_or_else(|| DemoError { what: "after the kill", detail: "processes were left behind".to_owned() })?;
    say("   All of its processes are gone; the checkpoint is still there.".to_owned());

    say("3. Resume on 2 ranks, each reading only its own bytes, and compare the digest of every tensor.".to_owned());
    let flags = ["--nproc-per-node", "2", "--resume", "must", "--digests", "--json"];
    let output = command(work, &flags, None, &checkpoints)
        .stdout(Stdio::piped())
        .output()
        .map_err(|error| failed("starting the resumed job")(&error))?;
    if !output.status.success() {
        return Err(DemoError { what: "resuming", detail: output.status.to_string() });
    }
    let compared = compare(&output.stdout, &first.manifest)?;
    say(format!("   {compared} tensors on 2 ranks have the digests that 4 ranks wrote."));

    say("4. Verify every byte of the checkpoint against its digests.".to_owned());
    let verified = checkpoint::verify(&store, &first, Depth::Deep).map_err(|error| failed("verifying")(&error))?;
    say(format!("   {} bytes in {} files hold.", verified.bytes, verified.files));
    Ok(())
}

fn command(work: &Path, flags: &[&str], model: Option<&Path>, checkpoints: &Path) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg("launch").args(flags).arg("--checkpoint-dir").arg(checkpoints);
    command.arg("--log-dir").arg(work.join("logs"));
    if let Some(model) = model {
        command.arg("--model").arg(model).args(["--quantize", "nf4", "--double"]);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

fn start(work: &Path, flags: &[&str], model: Option<&Path>, checkpoints: &Path) -> Result<Child, DemoError> {
    command(work, flags, model, checkpoints).spawn().map_err(|error| failed("starting a job")(&error))
}

/// Compares the digests that a job printed with a manifest's; gives their number.
fn compare(json: &[u8], manifest: &Manifest) -> Result<usize, DemoError> {
    #[derive(serde::Deserialize)]
    struct Printed {
        digests: BTreeMap<String, TensorDigest>,
    }
    let printed: Printed = serde_json::from_slice(json).map_err(|error| failed("reading the digests")(&error))?;
    for tensor in &manifest.tensors {
        let found = printed.digests.get(tensor.fqn.as_str());
        if found != Some(&tensor.digest) {
            let detail = format!("{}: expected {}, found {found:?}", tensor.fqn, tensor.digest);
            return Err(DemoError { what: "a tensor differs after the resume", detail });
        }
    }
    if printed.digests.len() == manifest.tensors.len() {
        Ok(printed.digests.len())
    } else {
        let detail = format!("expected {}, found {}", manifest.tensors.len(), printed.digests.len());
        Err(DemoError { what: "number of tensors after the resume", detail })
    }
}

fn wait_for_commit(job: &mut Child, store: &dyn Store) -> Result<(), DemoError> {
    let mut ended = None;
    let committed = || {
        if let Ok(Some(status)) = job.try_wait() {
            ended = Some(status);
            return true;
        }
        checkpoint::open(store, Step(0)).is_ok()
    };
    let in_time = wait_until(committed);
    match (ended, in_time) {
        (Some(status), _) => Err(DemoError { what: "the first job ended early", detail: status.to_string() }),
        (None, None) => Err(DemoError { what: "the first job", detail: format!("no checkpoint within {PATIENCE:?}") }),
        (None, Some(())) => Ok(()),
    }
}

/// Polls a condition that another process makes true.
fn wait_until(mut condition: impl FnMut() -> bool) -> Option<()> {
    let start = crate::clock::now();
    while start.elapsed() < PATIENCE {
        if condition() {
            return Some(());
        }
        // There is no event to wait for: the other process is a stranger by design.
        let (_keep, never) = std::sync::mpsc::sync_channel::<()>(0);
        let _ = never.recv_timeout(Duration::from_millis(20));
    }
    None
}

/// All processes below `root`, by the children lists of the kernel.
fn descendants(root: u32) -> Vec<u32> {
    let mut all = Vec::new();
    let mut open = vec![root];
    while let Some(pid) = open.pop() {
        let path = PathBuf::from(format!("/proc/{pid}/task/{pid}/children"));
        #[expect(clippy::disallowed_methods, reason = "a fact of the kernel, not a file of data")]
        let children = std::fs::read(path).unwrap_or_default();
        let children = String::from_utf8_lossy(&children).into_owned();
        for child in children.split_whitespace().filter_map(|child| child.parse().ok()) {
            all.push(child);
            open.push(child);
        }
    }
    all
}
