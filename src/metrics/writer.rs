//! The files of a run's metrics.
//!
//! Owns: [`MetricsWriter`]: creating, continuing and appending. Refuses to know: what the numbers mean.
//!
//! These are logs that grow line by line and are followed while they grow; the store's files are written once, at a known
//! length, and never again. So this module opens its own files, and nothing of a checkpoint depends on them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use super::events::Event;
use super::{EvaluationRecord, MetricsLine, StepRecord, evaluation_line, line};
use crate::clock::unix_ns;
use crate::error::{Classify, Kind};

/// The file with one JSON object a line.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// The file with the lines that people see.
pub const LOG_FILE: &str = "training_log.txt";
/// Event files that one process may start within a second.
const MAX_EVENT_FILES: u32 = 1000;

/// Metrics cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetricsError {
    /// The operating system refused.
    #[error("cannot {operation} {path}: {source}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// The file.
        path: String,
        /// The system's error.
        source: io::Error,
    },
}

impl MetricsError {
    fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.display().to_string();
        move |source| Self::Io { operation, path, source }
    }
}

impl Classify for MetricsError {
    fn kind(&self) -> Kind {
        let Self::Io { source, .. } = self;
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::Exhausted,
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::NotADirectory => {
                Kind::Conflict
            }
            _ => Kind::Unavailable,
        }
    }
}

/// Writes the metrics of a run. Only one rank of a job has one. Every record is in the files when the call returns, so
/// that they can be followed and a killed run keeps what it wrote.
#[derive(Debug)]
pub struct MetricsWriter {
    metrics: Appended,
    log: Appended,
    events: Appended,
}

#[derive(Debug)]
struct Appended {
    path: PathBuf,
    file: File,
}

impl Appended {
    fn open(path: PathBuf) -> Result<Self, MetricsError> {
        let file = OpenOptions::new().append(true).create(true).open(&path);
        Ok(Self { file: file.map_err(MetricsError::io("open", &path))?, path })
    }

    /// One write for one record: a reader never sees half of one.
    fn append(&mut self, bytes: &[u8]) -> Result<(), MetricsError> {
        self.file.write_all(bytes).map_err(MetricsError::io("write", &self.path))
    }
}

impl MetricsWriter {
    /// Opens the files in `directory`, which is created, for a run that has done `from_step` optimizer steps. With 0, a
    /// new run, `metrics.jsonl` starts empty; otherwise what it says of later steps is dropped (`ME-1`). The log is
    /// continued, and there is one more event file.
    ///
    /// # Errors
    /// [`MetricsError`] when the directory cannot be written.
    pub fn open(directory: &Path, from_step: u64) -> Result<Self, MetricsError> {
        fs::create_dir_all(directory).map_err(MetricsError::io("create", directory))?;
        keep_until(&directory.join(METRICS_FILE), from_step)?;
        let mut writer = Self {
            metrics: Appended::open(directory.join(METRICS_FILE))?,
            log: Appended::open(directory.join(LOG_FILE))?,
            events: new_event_file(directory)?,
        };
        let now = wall_time();
        writer.events.append(&Event::first(now).frame())?;
        // A new run forgets the steps that another run in the same directory left.
        writer.events.append(&Event::restart(now, if from_step == 0 { 0 } else { from_step + 1 }).frame())?;
        Ok(writer)
    }

    /// Writes a step to all three.
    ///
    /// # Errors
    /// [`MetricsError`] when a file cannot be written.
    pub fn step(&mut self, record: &StepRecord, total_steps: u64) -> Result<(), MetricsError> {
        self.json(&MetricsLine::Step(*record))?;
        let scalars = [
            ("train/loss", record.loss),
            ("train/learning_rate", record.learning_rate),
            ("train/grad_norm", record.gradient_norm),
            ("train/tokens_per_second", record.tokens_per_second),
            ("train/epoch", record.epoch),
        ];
        self.events.append(&Event::scalars(wall_time(), record.step, &scalars).frame())?;
        self.log(&line(record, total_steps))
    }

    /// Writes an evaluation to all three.
    ///
    /// # Errors
    /// [`MetricsError`] when a file cannot be written.
    pub fn evaluation(&mut self, record: &EvaluationRecord, total_steps: u64) -> Result<(), MetricsError> {
        self.json(&MetricsLine::Evaluation(*record))?;
        let scalars = [("eval/loss", record.loss), ("eval/perplexity", record.perplexity)];
        self.events.append(&Event::scalars(wall_time(), record.step, &scalars).frame())?;
        self.log(&evaluation_line(record, total_steps))
    }

    /// Writes a line to the log alone.
    ///
    /// # Errors
    /// [`MetricsError`] when the file cannot be written.
    pub fn log(&mut self, line: &str) -> Result<(), MetricsError> {
        self.log.append(format!("{line}\n").as_bytes())
    }

    fn json(&mut self, line: &MetricsLine) -> Result<(), MetricsError> {
        let mut text = serde_json::to_string(line).expect("numbers and fixed keys are JSON");
        text.push('\n');
        self.metrics.append(text.as_bytes())
    }
}

/// Rewrites a metrics file without the lines of later steps than `last_step`, and without a line that a crash cut. The old
/// file stands until the new one is whole and durable.
#[expect(clippy::disallowed_methods, reason = "a growing log of the run, not a file of data (see above)")]
fn keep_until(path: &Path, last_step: u64) -> Result<(), MetricsError> {
    let old = match File::open(path) {
        Ok(file) => BufReader::new(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(MetricsError::io("open", path)(error)),
    };
    let temporary = path.with_extension("jsonl.tmp");
    let failed = || MetricsError::io("write", &temporary);
    let mut new = BufWriter::new(File::create(&temporary).map_err(failed())?);
    for line in old.split(b'\n') {
        let line = line.map_err(MetricsError::io("read", path))?;
        let step = serde_json::from_slice::<MetricsLine>(&line).map(|line| line.step());
        if last_step > 0 && step.is_ok_and(|step| step <= last_step) {
            new.write_all(&line).and_then(|()| new.write_all(b"\n")).map_err(failed())?;
        }
    }
    let file = new.into_inner().map_err(|error| failed()(error.into_error()))?;
    file.sync_all().map_err(failed())?;
    fs::rename(&temporary, path).map_err(MetricsError::io("replace", path))
}

/// `events.out.tfevents.<unix seconds>.<host>.<pid>.<n>`, with the first `n` that is free.
fn new_event_file(directory: &Path) -> Result<Appended, MetricsError> {
    let host = rustix::system::uname().nodename().to_string_lossy().replace('/', "_");
    let (seconds, process) = (unix_ns() / 1_000_000_000, std::process::id());
    let mut n = 0;
    loop {
        let path = directory.join(format!("events.out.tfevents.{seconds}.{host}.{process}.{n}"));
        match OpenOptions::new().append(true).create_new(true).open(&path) {
            Ok(file) => return Ok(Appended { path, file }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && n < MAX_EVENT_FILES => n += 1,
            Err(error) => return Err(MetricsError::io("create", &path)(error)),
        }
    }
}

/// Seconds since the Unix epoch.
#[expect(clippy::cast_precision_loss, reason = "TensorBoard's field is a double; a microsecond remains")]
fn wall_time() -> f64 {
    unix_ns() as f64 / 1e9
}

#[cfg(test)]
mod tests {
    #![expect(clippy::disallowed_methods, reason = "the tests write the files that they read")]

    use super::*;

    fn record(step: u64, loss: f64) -> StepRecord {
        StepRecord {
            step,
            epoch: 0.5,
            loss,
            learning_rate: 1e-4,
            gradient_norm: 1.5,
            tokens: 64,
            tokens_per_second: 100.0,
            seconds: 0.64,
            peak_resident_bytes: 1 << 20,
            remaining_seconds: 10.0,
        }
    }

    fn run(directory: &Path, from_step: u64, losses: &[f64]) {
        let mut writer = MetricsWriter::open(directory, from_step).expect("files");
        for (step, &loss) in (from_step + 1..).zip(losses) {
            writer.step(&record(step, loss), 9).expect("written");
        }
        let step = from_step + crate::types::as_u64(losses.len());
        let evaluation = EvaluationRecord { step, loss: 1.0, perplexity: 1.0_f64.exp(), tokens: 8, best: false };
        writer.evaluation(&evaluation, 9).expect("written");
    }

    fn lines(directory: &Path) -> Vec<MetricsLine> {
        let text = fs::read_to_string(directory.join(METRICS_FILE)).expect("a file");
        assert!(text.ends_with('\n'));
        text.lines().map(|line| serde_json::from_str(line).expect("a line")).collect()
    }

    /// What the lines say: step and loss, or the step of an evaluation.
    fn said(directory: &Path) -> Vec<(u64, Option<f64>)> {
        let loss = |line: &MetricsLine| if let MetricsLine::Step(record) = line { Some(record.loss) } else { None };
        lines(directory).iter().map(|line| (line.step(), loss(line))).collect()
    }

    /// ME-1: steps 4 and 5 are done again after a resume from 3, and stand once.
    #[test]
    fn me_1_a_resumed_run_reads_as_one() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path();
        run(path, 0, &[5.0, 4.0, 3.0, 2.0, 1.0]);
        // A crash in the middle of a line.
        let mut torn = OpenOptions::new().append(true).open(path.join(METRICS_FILE)).expect("a file");
        torn.write_all(b"{\"kind\":\"step\",\"step\":2,\"lo").expect("written");
        run(path, 3, &[2.5, 1.5]);
        let expected = [(1, Some(5.0)), (2, Some(4.0)), (3, Some(3.0)), (4, Some(2.5)), (5, Some(1.5)), (5, None)];
        assert_eq!(said(path), expected);
        assert!(!path.join("metrics.jsonl.tmp").exists());
        let log = fs::read_to_string(path.join(LOG_FILE)).expect("a log");
        assert_eq!(log.lines().count(), 9, "the log keeps both tries: {log}");
        assert_eq!(log.lines().next(), Some(line(&record(1, 5.0), 9).as_str()));
    }

    #[test]
    fn a_new_run_starts_empty() {
        let directory = tempfile::tempdir().expect("a directory");
        run(directory.path(), 0, &[5.0, 4.0]);
        run(directory.path(), 0, &[3.0]);
        assert_eq!(said(directory.path()), [(1, Some(3.0)), (1, None)]);
    }

    /// A loss that is not a number is `null`, and the line is kept at a resume.
    #[test]
    fn not_a_number_is_null() {
        let directory = tempfile::tempdir().expect("a directory");
        run(directory.path(), 0, &[f64::NAN]);
        run(directory.path(), 1, &[]);
        let text = fs::read_to_string(directory.path().join(METRICS_FILE)).expect("a file");
        assert!(text.starts_with("{\"kind\":\"step\",\"step\":1,\"epoch\":0.5,\"loss\":null,"), "{text}");
        assert_eq!(lines(directory.path()).len(), 3);
    }

    /// Frame by frame: lengths lead from one record to the next up to the end, and the files start as they must.
    #[test]
    fn event_files_are_whole_frames() {
        let directory = tempfile::tempdir().expect("a directory");
        run(directory.path(), 0, &[5.0, 4.0]);
        let entries = fs::read_dir(directory.path()).expect("entries").map(|entry| entry.expect("an entry").path());
        let files: Vec<PathBuf> = entries.filter(|path| path.display().to_string().contains("tfevents")).collect();
        assert_eq!(files.len(), 1);
        let bytes = fs::read(&files[0]).expect("a file");
        let (mut offset, mut messages) = (0, Vec::new());
        while offset < bytes.len() {
            let length = u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"));
            let end = offset + 12 + crate::types::as_usize(length);
            messages.push(bytes[offset + 12..end].to_vec());
            offset = end + 4;
        }
        assert_eq!(offset, bytes.len());
        assert_eq!(messages.len(), 5, "version, start, two steps, an evaluation");
        assert!(messages[0].ends_with(b"\x1a\x0dbrain.Event:2"));
        let has = |message: &[u8], tag: &[u8]| message.windows(tag.len()).any(|window| window == tag);
        for tag in ["train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second"] {
            assert!(has(&messages[2], tag.as_bytes()), "{tag}");
        }
        assert!(has(&messages[4], b"eval/loss"));
    }

    #[test]
    fn a_place_that_cannot_be_written_is_named() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("file");
        fs::write(&file, b"").expect("written");
        let error = MetricsWriter::open(&file, 0).expect_err("a file is no directory");
        assert!(error.to_string().starts_with(&format!("cannot create {}", file.display())), "{error}");
    }
}
