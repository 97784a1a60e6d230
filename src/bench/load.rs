//! The whole load in real processes, beside each of its stages alone.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{BenchError, Figure, GIGA, float, limits, median_s, timed};
use crate::app::{ModelSource, new_model, open_model};
use crate::load::LoadReport;
use crate::model::{Architecture, GenerateRequest};
use crate::plan::Strategy;
use crate::quant::{BlockSize, FourBit, FourBitCode, Kernels, Source};
use crate::store::LocalStore;
use crate::types::DType;

const RUNS: usize = 5;
const FILE_BYTES: u64 = 1_000_000_000;

/// What is loaded.
#[derive(Clone, Debug)]
pub struct LoadBench {
    /// Where the generated model is, or will be made.
    pub directory: PathBuf,
    /// Parameters of the model: 1e9 are 2 GB of bf16.
    pub parameters: u64,
    /// Ranks.
    pub ranks: u32,
    /// Threads of the reader.
    pub reader_threads: u32,
    /// Which ranks read.
    pub strategy: Strategy,
}

/// Times of an NF4 load with double quantization from the page cache, and of its stages alone with as many threads.
///
/// # Errors
/// [`BenchError`].
pub fn load(bench: &LoadBench) -> Result<Vec<Figure>, BenchError> {
    let source = make_model(bench)?;
    let names: Vec<(String, u64)> = source.index.files.iter().map(|file| (file.name.clone(), file.len_bytes)).collect();
    let store = LocalStore::new(&bench.directory);
    let bytes = source.index.total_bytes();
    let threads = u64::from(bench.reader_threads);
    // The first read brings the files into the page cache.
    limits::read(&store, &names, threads)?;
    let read = median_s(RUNS, || limits::read(&store, &names, threads))?;
    let quantize = median_s(RUNS, || quantize_alone(bytes / 2, threads))?;

    let mut walls = Vec::new();
    let mut last = Vec::new();
    let whole = median_s(RUNS, || {
        let start = crate::clock::now();
        last = job(bench, &["--quantize", "nf4", "--double", "--device", "cpu"])?;
        walls.push(last.iter().map(|report| report.wall_s).fold(0.0, f64::max));
        Ok::<_, BenchError>(start.elapsed())
    })?;
    walls.sort_by(f64::total_cmp);
    let wall = walls.get(walls.len() / 2).copied().unwrap_or(f64::NAN);
    let (slowest, name) = if read > quantize { (read, "reading alone") } else { (quantize, "quantizing alone") };
    let moved = traffic(&last, bytes);
    let stages = |stage: fn(&LoadReport) -> f64| last.iter().map(stage).sum::<f64>();
    let limit = (slowest, name);
    let mut figures = vec![
        Figure::new("load: read", read, "s", (read, "itself")),
        Figure::new("load: quantize", quantize, "s", (quantize, "itself")),
        Figure::new(format!("load on {} ranks", bench.ranks), wall, "s", limit),
        Figure::new("job from start to end", whole, "s", limit),
        Figure::new("load rate", float(bytes) / wall / GIGA, "GB/s", (float(bytes) / slowest / GIGA, name)),
        Figure::new("reader threads in read", stages(|report| report.stages.read_s), "s", limit),
        Figure::new("reader threads in encode", stages(|report| report.stages.encode_s), "s", limit),
        Figure::new("ranks in exchange", stages(|report| report.stages.exchange_s), "s", limit),
    ];
    figures.extend(moved);
    Ok(figures)
}

/// The bench's model, made when it is not there.
pub(super) fn make_model(bench: &LoadBench) -> Result<ModelSource, BenchError> {
    if !bench.directory.join("config.json").exists() {
        let request = GenerateRequest {
            architecture: Architecture::Llama,
            parameters: bench.parameters,
            dtype: DType::BF16,
            seed: 0,
            max_file_bytes: FILE_BYTES,
        };
        new_model(&request, &bench.directory).map_err(BenchError::of)?;
    }
    open_model(&bench.directory.display().to_string(), &|_| {}).map_err(BenchError::of)
}

/// Bytes read, sent and kept in memory, beside what must be.
fn traffic(reports: &[LoadReport], weights: u64) -> Vec<Figure> {
    const MIB: f64 = 1_048_576.0;
    let sum = |figure: fn(&LoadReport) -> u64| float(reports.iter().map(figure).sum());
    let mut figures = vec![
        Figure::new(
            "storage bytes of all ranks",
            sum(|report| report.storage_bytes),
            "bytes",
            (float(weights), "the weights"),
        ),
        Figure::new(
            "payload received",
            sum(|report| report.received_bytes),
            "bytes",
            (
                float(
                    reports.iter().filter(|report| report.storage_bytes == 0).map(|report| report.weights_bytes).sum(),
                ),
                "what ranks that do not read keep",
            ),
        ),
    ];
    for (name, reads) in [("peak of a rank that reads", true), ("peak of a rank that does not", false)] {
        let largest = reports
            .iter()
            .filter(|report| (report.storage_bytes > 0) == reads)
            .max_by_key(|report| report.peak_resident_bytes);
        if let Some(report) = largest {
            let limit = (float(report.weights_bytes) / MIB, "its shards");
            figures.push(Figure::new(name, float(report.peak_resident_bytes) / MIB, "MiB", limit));
        }
    }
    figures
}

/// The reports of a job that loads the model with `flags`.
pub(super) fn job(bench: &LoadBench, flags: &[&str]) -> Result<Vec<LoadReport>, BenchError> {
    #[derive(serde::Deserialize)]
    struct Printed {
        loads: Vec<LoadReport>,
    }
    let output = Command::new("/proc/self/exe")
        .args(["launch", "--nproc-per-node", &bench.ranks.to_string(), "--json"])
        .args(flags)
        .args(["--reader-threads", &bench.reader_threads.to_string(), "--strategy", bench.strategy.name(), "--model"])
        .arg(&bench.directory)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(BenchError::of)?;
    if !output.status.success() {
        return Err(BenchError(format!("the job ended with {}", output.status)));
    }
    let printed: Printed = serde_json::from_slice(&output.stdout).map_err(BenchError::of)?;
    Ok(printed.loads)
}

/// Quantizing `values` values in cache-sized chunks on `threads` threads, with nothing read or sent.
fn quantize_alone(values: u64, threads: u64) -> Result<Duration, BenchError> {
    const CHUNK_VALUES: u64 = 1 << 17;
    let kernels = Kernels::detect();
    let format = FourBit { code: FourBitCode::Nf4, block: BlockSize::B64 };
    let chunks = values / CHUNK_VALUES / threads;
    let mut result = Ok(());
    let time = timed(|| {
        result = std::thread::scope(|scope| {
            let work = || {
                // bf16 patterns of both signs around 0.02; their values do not change the work.
                let bytes: Vec<u8> = (0..CHUNK_VALUES)
                    .flat_map(|index| (0x3c80 | u16::try_from(index & 0x807f).unwrap_or(0)).to_le_bytes())
                    .collect();
                let source = Source::new(DType::BF16, &bytes).map_err(BenchError::of)?;
                let mut packed = vec![0; source.len() / 2];
                let mut absmax = vec![0.0; source.len() / 64];
                for _ in 0..chunks {
                    kernels.quantize_4bit(format, source, &mut packed, &mut absmax).map_err(BenchError::of)?;
                }
                Ok(())
            };
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            running
                .into_iter()
                .try_for_each(|one| one.join().unwrap_or_else(|_| Err(BenchError("a thread panicked".into()))))
        });
    });
    result.map(|()| time)
}
