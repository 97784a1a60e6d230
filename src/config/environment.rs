//! The environment of a worker, as the launcher or a scheduler gives it, and a few facts of the host.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use crate::error::{Classify, Kind};
use crate::store::RemoteSettings;
use crate::types::{DeviceWish, Rank, Sharing, WorldSize};

/// Reads one variable; a value that is not UTF-8 counts as absent.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "this is the one place that reads the environment")]
pub fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// How remote places are reached, by the variables of their clouds, of proxies and of certificate authorities.
#[must_use]
pub fn remote_settings() -> RemoteSettings {
    let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        Some((name.into_string().ok()?, value.into_string().ok()?))
    };
    RemoteSettings::from_variables(std::env::vars_os().filter_map(text))
}

/// What a worker finds in its environment.
#[derive(Clone, Debug)]
pub struct WorkerEnvironment {
    /// `RANK`.
    pub rank: Rank,
    /// `WORLD_SIZE`.
    pub world: WorldSize,
    /// `WEIGHTCAST_COORDINATOR`: `host:port`.
    pub coordinator: String,
    /// `WEIGHTCAST_TOKEN_FILE`.
    pub token_file: PathBuf,
    /// `WEIGHTCAST_DATA_ADDRESS`: the address that the data plane listens on.
    pub data_ip: Option<IpAddr>,
    /// `WEIGHTCAST_CHECKPOINT_DIRECTORY`.
    pub checkpoint_root: Option<PathBuf>,
    /// `WEIGHTCAST_DEVICE`: `auto`, `cpu` or `cuda`; `auto` by default.
    pub device: DeviceWish,
    /// `WEIGHTCAST_SHARE_DEVICES`: `1` where ranks may share a CUDA device.
    pub sharing: Sharing,
    /// `LOCAL_RANK`: the rank among those of this host; 0 by default.
    pub local_rank: u32,
    /// `LOCAL_WORLD_SIZE`: the ranks of this host; 1 by default.
    pub local_ranks: u32,
    /// `NCCL_LIBRARY`: the path of libnccl; where the dynamic linker finds it by default.
    pub nccl_library: Option<PathBuf>,
    /// `WEIGHTCAST_JOIN_TIMEOUT`: how long the coordinator is looked for at the beginning, in seconds; 600 by default, as
    /// launchers look for each other.
    pub join_deadline: Duration,
}

/// The environment cannot work.
#[derive(Debug, thiserror::Error)]
#[error("environment variable {name}: expected {expected}, found {found}")]
pub struct EnvironmentError {
    /// The variable.
    pub name: &'static str,
    /// What it must be.
    pub expected: &'static str,
    /// What it is.
    pub found: String,
}

impl Classify for EnvironmentError {
    fn kind(&self) -> Kind {
        Kind::Conflict
    }
}

impl WorkerEnvironment {
    /// Reads and checks the environment; `get` reads one variable.
    ///
    /// # Errors
    /// [`EnvironmentError`] with the first variable that cannot work.
    pub fn read(get: &dyn Fn(&str) -> Option<String>) -> Result<Self, EnvironmentError> {
        let world: u32 = parsed(get, "WORLD_SIZE", "a number of at least 1, as a launcher sets it")?;
        let world = WorldSize::new(world).map_err(|_| EnvironmentError {
            name: "WORLD_SIZE",
            expected: "a number of at least 1",
            found: "0".to_owned(),
        })?;
        let rank = Rank(parsed(get, "RANK", "a number below WORLD_SIZE, as a launcher sets it")?);
        if !world.contains(rank) {
            let found = format!("{rank} in a world of {world}");
            return Err(EnvironmentError { name: "RANK", expected: "a number below WORLD_SIZE", found });
        }
        let data_ip = match get("WEIGHTCAST_DATA_ADDRESS") {
            None => None,
            Some(_) => Some(parsed(get, "WEIGHTCAST_DATA_ADDRESS", "an IP address of this host")?),
        };
        let or = |name: &'static str, default: u32, expected| match get(name) {
            None => Ok(default),
            Some(_) => parsed(get, name, expected),
        };
        let device = match get("WEIGHTCAST_DEVICE") {
            None => DeviceWish::Auto,
            Some(_) => parsed(get, "WEIGHTCAST_DEVICE", "auto, cpu or cuda")?,
        };
        let shared = or("WEIGHTCAST_SHARE_DEVICES", 0, "0 or 1")? > 0;
        Ok(Self {
            device,
            sharing: if shared { Sharing::Allowed } else { Sharing::Refused },
            local_rank: or("LOCAL_RANK", 0, "a number below LOCAL_WORLD_SIZE, as a launcher sets it")?,
            local_ranks: or("LOCAL_WORLD_SIZE", 1, "a number of at least 1, as a launcher sets it")?,
            nccl_library: get("NCCL_LIBRARY").map(PathBuf::from),
            join_deadline: Duration::from_secs(or("WEIGHTCAST_JOIN_TIMEOUT", 600, "a number of seconds")?.into()),
            rank,
            world,
            coordinator: parsed(get, "WEIGHTCAST_COORDINATOR", "the coordinator's host:port")?,
            token_file: parsed(get, "WEIGHTCAST_TOKEN_FILE", "the path of the job's token")?,
            data_ip,
            checkpoint_root: get("WEIGHTCAST_CHECKPOINT_DIRECTORY").map(PathBuf::from),
        })
    }
}

fn parsed<T: FromStr>(
    get: &dyn Fn(&str) -> Option<String>,
    name: &'static str,
    expected: &'static str,
) -> Result<T, EnvironmentError> {
    let text = get(name);
    let value = text.as_deref().and_then(|text| text.parse().ok());
    value.ok_or_else(|| EnvironmentError {
        name,
        expected,
        found: text.map_or_else(|| "nothing".to_owned(), |text| format!("{text:?}")),
    })
}

/// This host's name.
#[must_use]
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Where files of running jobs are: `XDG_RUNTIME_DIR`, else the temporary directory, below a name of this user's.
#[must_use]
pub fn runtime_directory() -> PathBuf {
    let user = rustix::process::getuid().as_raw();
    match variable("XDG_RUNTIME_DIR") {
        Some(directory) => PathBuf::from(directory).join("weightcast"),
        None => std::env::temp_dir().join(format!("weightcast-{user}")),
    }
}

/// `MemAvailable` of /proc/meminfo in bytes, where it exists.
#[must_use]
pub fn available_memory_bytes() -> Option<u64> {
    #[expect(clippy::disallowed_methods, reason = "a fact of the host, not a file of data")]
    let text = std::fs::read("/proc/meminfo").ok()?;
    let text = String::from_utf8_lossy(&text).into_owned();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let bytes = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024;
    Some(bytes.min(left_of_control_group(Path::new("/sys/fs/cgroup")).unwrap_or(u64::MAX)))
}

/// What the limit of this container leaves (cgroup v2): `memory.max` without `memory.current`, of which pages of files that
/// nobody uses are given back when they are needed. Nothing where there is no limit.
fn left_of_control_group(directory: &Path) -> Option<u64> {
    #[expect(clippy::disallowed_methods, reason = "a fact of the host, not a file of data")]
    let read = |name: &str| String::from_utf8(std::fs::read(directory.join(name)).ok()?).ok();
    // `max` stands for no limit, and is no number.
    let limit: u64 = read("memory.max")?.trim().parse().ok()?;
    let used: u64 = read("memory.current")?.trim().parse().ok()?;
    let stat = read("memory.stat").unwrap_or_default();
    let files = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.parse::<u64>().ok()).unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(files)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand: 1000 of which 600 are used, 250 of those by files: 650 are left.
    #[test]
    #[expect(clippy::disallowed_methods, reason = "a test writes what the kernel would")]
    fn a_container_has_what_its_limit_leaves() {
        let place = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| std::fs::write(place.path().join(name), text).expect("written");
        assert_eq!(left_of_control_group(place.path()), None);
        write("memory.max", "max\n");
        write("memory.current", "600\n");
        assert_eq!(left_of_control_group(place.path()), None);
        write("memory.max", "1000\n");
        assert_eq!(left_of_control_group(place.path()), Some(400));
        write("memory.stat", "anon 300\ninactive_file 250\n");
        assert_eq!(left_of_control_group(place.path()), Some(650));
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let with = |rank: &'static str, world: &'static str| {
            move |name: &str| match name {
                "RANK" => Some(rank.to_owned()),
                "WORLD_SIZE" => Some(world.to_owned()),
                "WEIGHTCAST_COORDINATOR" => Some("127.0.0.1:1".to_owned()),
                "WEIGHTCAST_TOKEN_FILE" => Some("/t".to_owned()),
                _ => None,
            }
        };
        assert!(WorkerEnvironment::read(&with("1", "2")).is_ok());
        let error = |rank, world| WorkerEnvironment::read(&with(rank, world)).expect_err("wrong").to_string();
        assert!(error("2", "2").contains("RANK: expected a number below WORLD_SIZE, found 2 in a world of 2"));
        assert!(error("x", "2").contains("RANK"));
        assert!(error("0", "0").contains("WORLD_SIZE"));
        let nothing = WorkerEnvironment::read(&|_| None).expect_err("nothing").to_string();
        assert!(nothing.contains("found nothing"));
    }
}
