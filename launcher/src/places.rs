//! Where the files of a launch are.
//!
//! Owns: `<log-dir>/<run-id>/attempt_<k>/<local-rank>/{stdout,stderr}.log` and the scratch directory. With several nodes,
//! which may share a file system, `node_<n>` stands before `attempt_<k>`: local ranks repeat from node to node.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::command::Assignment;
use crate::config::Launch;
use crate::error::LaunchError;
use crate::logs::directory_name;

/// The longest error file that is read, in bytes.
const ERROR_FILE_LIMIT: u64 = 64 * 1024;

/// The directories of one attempt.
#[derive(Debug)]
pub(crate) struct Places {
    logs: Option<PathBuf>,
    scratch: Scratch,
}

/// The directory for error files; removed at the end.
#[derive(Debug)]
struct Scratch(Option<PathBuf>);

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // What cannot be removed is a few bytes in a directory for temporary files.
            let _ = fs::remove_dir_all(path);
            // The parent is shared by the attempts; the last one removes it.
            let _ = path.parent().map(fs::remove_dir);
        }
    }
}

impl Places {
    /// Makes the directories. A temporary directory that cannot be written costs only the error files.
    pub(crate) fn make(launch: &Launch, assignment: &Assignment) -> Result<Self, LaunchError> {
        let attempt = format!("attempt_{}", assignment.restart_count);
        let logs = launch.log.dir.as_ref().map(|dir| {
            let job = dir.join(directory_name(&launch.layout.run_id));
            let node = if assignment.nnodes > 1 { job.join(format!("node_{}", assignment.node_rank)) } else { job };
            node.join(&attempt)
        });
        let scratch = launch.scratch_dir.join(&attempt);
        let scratch = fs::create_dir_all(&scratch).is_ok().then_some(scratch);
        let places = Self { logs, scratch: Scratch(scratch) };
        if let Some(dir) = &places.logs {
            fs::create_dir_all(dir).map_err(|source| LaunchError::File {
                action: "create",
                path: dir.clone(),
                source,
            })?;
        }
        Ok(places)
    }

    /// The file of a stream.
    pub(crate) fn log_file(&self, local_rank: u32, name: &str) -> Option<PathBuf> {
        self.logs.as_ref().map(|dir| dir.join(local_rank.to_string()).join(name))
    }

    /// Opens a log file; one that exists (the same job id again) is continued.
    pub(crate) fn open(path: &Path) -> Result<File, LaunchError> {
        let opened = path.parent().map_or(Ok(()), fs::create_dir_all);
        let opened = opened.and_then(|()| File::options().create(true).append(true).open(path));
        opened.map_err(|source| LaunchError::File { action: "open", path: path.to_owned(), source })
    }

    /// Where a rank may write what went wrong.
    pub(crate) fn error_file(&self, local_rank: u32) -> Option<PathBuf> {
        let dir = self.scratch.0.as_ref()?;
        Some(dir.join(format!("{local_rank}-error.json")))
    }

    /// What a rank wrote there: torch's `record` writes `{"message": {"message": …}}` or `{"message": …}`.
    pub(crate) fn read_error(&self, local_rank: u32) -> Option<String> {
        use std::io::Read;
        let mut text = String::new();
        File::open(self.error_file(local_rank)?).ok()?.take(ERROR_FILE_LIMIT).read_to_string(&mut text).ok()?;
        let message = serde_json::from_str::<serde_json::Value>(&text).ok().and_then(|json| {
            let message = json.get("message")?;
            message.get("message").unwrap_or(message).as_str().map(str::to_owned)
        });
        Some(message.unwrap_or(text)).filter(|text| !text.is_empty())
    }

    /// Writes the report beside the logs, whole or not at all.
    pub(crate) fn write_report(&self, json: &str) -> Result<(), LaunchError> {
        let Some(dir) = &self.logs else { return Ok(()) };
        let (partial, path) = (dir.join(".report.json.partial"), dir.join("report.json"));
        let written = fs::write(&partial, json).and_then(|()| fs::rename(&partial, &path));
        written.map_err(|source| LaunchError::File { action: "write", path, source })
    }
}
