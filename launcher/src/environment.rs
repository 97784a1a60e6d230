//! The surroundings of the launcher, as data.
//!
//! Owns: every look at the environment variables and at the machine (processors, GPUs, host name). No other file of this
//! crate reads them, so that all decisions are functions of an [`Environment`] and can be tested without a machine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Where Kubernetes reads the last words of a container.
const TERMINATION_LOG: &str = "/dev/termination-log";

/// What the launcher knows of its surroundings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Environment {
    /// The environment variables that are valid UTF-8.
    pub variables: BTreeMap<String, String>,
    /// The name of this host; in a pod, the name of the pod.
    pub hostname: String,
    /// Processors that this process may use.
    pub processors: u32,
    /// GPUs that this process may use.
    pub gpus: u32,
    /// Where temporary files may be made.
    pub temporary_directory: PathBuf,
    /// The file for the container's last words, when this is a container on Kubernetes.
    pub termination_log: Option<PathBuf>,
    /// A random number that tells this launch from every other.
    pub nonce: u64,
}

impl Environment {
    /// Looks at this process's surroundings.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "this is the one place that reads the environment")]
    pub fn of_this_process() -> Self {
        let variables: BTreeMap<String, String> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        let processors =
            std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(1));
        let gpus = count_gpus(&variables, Path::new("/dev"));
        let hostname = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let termination_log = Some(PathBuf::from(TERMINATION_LOG)).filter(|path| path.exists());
        let temporary_directory = std::env::temp_dir();
        Self { variables, hostname, processors, gpus, temporary_directory, termination_log, nonce: random() }
    }

    /// The surroundings that a test describes: only these variables, one processor, no GPU.
    #[must_use]
    pub fn of_variables<'a>(variables: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let variables = variables.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Self { variables, hostname: "localhost".to_owned(), processors: 1, ..Self::default() }
    }

    /// The value of a variable; an empty one counts as absent.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }
}

/// GPUs that a CUDA program would see: those of `CUDA_VISIBLE_DEVICES` up to the first invalid entry, as the driver reads
/// it, else the device files of this container.
fn count_gpus(variables: &BTreeMap<String, String>, devices: &Path) -> u32 {
    let count = match variables.get("CUDA_VISIBLE_DEVICES") {
        Some(visible) => visible.split(',').map(str::trim).take_while(|id| !id.is_empty() && *id != "-1").count(),
        None => std::fs::read_dir(devices).map_or(0, |entries| {
            let is_gpu = |name: &str| {
                name.strip_prefix("nvidia").is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
            };
            entries
                .filter(|entry| entry.as_ref().is_ok_and(|entry| entry.file_name().to_str().is_some_and(is_gpu)))
                .count()
        }),
    };
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn random() -> u64 {
    let mut bytes = [0_u8; 8];
    // Only a kernel older than 3.17 refuses; then launches of one process id would share a directory name.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    u64::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visible_devices_end_at_the_first_invalid_one() {
        for (visible, expected) in [("0,1,2", 3), ("", 0), ("-1", 0), ("3,-1,4", 1), ("GPU-8f1c, GPU-77aa", 2)] {
            let variables = BTreeMap::from([("CUDA_VISIBLE_DEVICES".to_owned(), visible.to_owned())]);
            assert_eq!(count_gpus(&variables, Path::new("/nowhere")), expected, "{visible}");
        }
    }

    #[test]
    fn device_files_are_counted_without_the_control_device() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        for name in ["nvidia0", "nvidia7", "nvidiactl", "nvidia-uvm", "null"] {
            std::fs::write(directory.path().join(name), "").expect("it is writable");
        }
        assert_eq!(count_gpus(&BTreeMap::new(), directory.path()), 2);
    }
}
