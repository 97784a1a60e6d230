//! How many ranks one coordinator serves: a real coordinator process, and ranks that do nothing but talk to it.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::load::{LoadBench, make_model};
use super::{BenchError, Figure, float};
use crate::plan::Strategy;
use crate::rpc::{SwarmTimes, Token, swarm};
use crate::tasks::raise_file_limit;

/// How long renewals alone are watched.
const STEADY: Duration = Duration::from_secs(3);
/// What is asked of 1,000 ranks: formed within, a barrier within, in seconds; memory in MiB.
const FORMED_S: f64 = 5.0;
const BARRIER_S: f64 = 0.1;
const MEMORY_MIB: f64 = 200.0;

/// For each number of ranks: the time until they are formed and through a barrier, the coordinator's memory, and the part of a
/// processor that their renewals take. `directory` gets a small model.
///
/// # Errors
/// [`BenchError`].
pub fn coordinator(directory: &Path, counts: &[u32]) -> Result<Vec<Figure>, BenchError> {
    raise_file_limit();
    let model = LoadBench {
        directory: directory.join("model"),
        parameters: 1_000_000,
        ranks: 1,
        reader_threads: 1,
        strategy: Strategy::LowMemory,
    };
    make_model(&model)?;
    let mut figures = Vec::new();
    for &ranks in counts {
        figures.extend(measure(directory, &model.directory, ranks)?);
    }
    Ok(figures)
}

fn measure(directory: &Path, model: &Path, ranks: u32) -> Result<Vec<Figure>, BenchError> {
    let state = tempfile_in(directory, ranks);
    let mut process = Process::start(&state, model, ranks)?;
    let address = process.address()?;
    let token = Token::at(state.join("token"));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(BenchError::of)?;
    let id = process.child.id();
    let measured = async |times: SwarmTimes| {
        let before = processor_seconds(id);
        tokio::time::sleep(STEADY).await;
        (times, (processor_seconds(id) - before) / STEADY.as_secs_f64(), peak_mib(id))
    };
    let (times, share, memory) = runtime.block_on(swarm(&address, &token, ranks, measured)).map_err(BenchError::of)?;
    let named = |what: &str| format!("{ranks} ranks: {what}");
    let asked = "asked of 1,000";
    Ok(vec![
        Figure::new(named("formed"), times.formed.as_secs_f64(), "s", (FORMED_S, asked)),
        Figure::new(named("barrier"), times.barrier.as_secs_f64(), "s", (BARRIER_S, asked)),
        Figure::new(named("all arrive at it"), times.arrivals.as_secs_f64(), "s", (FORMED_S, asked)),
        Figure::new(named("coordinator"), memory, "MiB", (MEMORY_MIB, asked)),
        Figure::new(named("renewals"), share, "cores", (1.0, "one core")),
    ])
}

fn tempfile_in(directory: &Path, ranks: u32) -> std::path::PathBuf {
    directory.join(format!("state-{ranks}-{:x}", crate::clock::unix_ns()))
}

/// The coordinator's process, which ends with this.
struct Process {
    child: Child,
}

impl Process {
    fn start(state: &Path, model: &Path, ranks: u32) -> Result<Self, BenchError> {
        let program = std::env::current_exe().map_err(BenchError::of)?;
        let mut command = Command::new(program);
        command.args(["coordinator", "--hold", "--device", "cpu", "--ranks", &ranks.to_string()]);
        command.arg("--model").arg(model).arg("--state-dir").arg(state);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        Ok(Self { child: command.spawn().map_err(BenchError::of)? })
    }

    /// Where it says that it listens; what it says after that is read and dropped.
    fn address(&mut self) -> Result<String, BenchError> {
        let stderr = self.child.stderr.take().ok_or_else(|| BenchError::of("no stderr"))?;
        let mut lines = BufReader::new(stderr).lines();
        let mut said = String::new();
        for line in lines.by_ref() {
            let line = line.map_err(BenchError::of)?;
            if let Some((_, address)) = line.split_once("listens on ") {
                let address = address.trim().to_owned();
                crate::tasks::spawn_thread("drain", move || lines.for_each(drop)).map_err(BenchError::of)?;
                return Ok(address);
            }
            said.push_str(&line);
        }
        Err(BenchError::of(format!("the coordinator does not listen: {said}")))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It holds nothing that anybody needs.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn proc_text(id: u32, name: &str) -> String {
    std::fs::read_to_string(format!("/proc/{id}/{name}")).unwrap_or_default()
}

/// User and system time that a process has used (`/proc/PID/stat`, fields 14 and 15, in ticks).
fn processor_seconds(id: u32) -> f64 {
    let text = proc_text(id, "stat");
    let after_name = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: u64 = after_name.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    float(ticks) / float(rustix::param::clock_ticks_per_second())
}

/// The largest resident size that it ever had.
fn peak_mib(id: u32) -> f64 {
    let text = proc_text(id, "status");
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib: u64 = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse().ok()).unwrap_or(0);
    float(kib) / 1024.0
}
