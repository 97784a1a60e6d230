//! `weightcast cache`.

use std::path::PathBuf;

use clap::Subcommand;

use super::output::{bytes, data, fail, json, refuse, say};
use crate::cache::{CachePlace, ListedEntry, list, make_room, verify};
use crate::config::{ConfigError, JobConfig};
use crate::error::Classify as _;

/// `weightcast cache …`
#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// All entries, the one that was used longest ago first
    List {
        /// The cache's directory [env: WEIGHTCAST_CACHE]
        directory: Option<PathBuf>,
        /// Print JSON on stdout
        #[arg(long)]
        json: bool,
    },
    /// Read every byte, and remove files that do not hold
    Verify {
        /// The cache's directory [env: WEIGHTCAST_CACHE]
        directory: Option<PathBuf>,
        /// Print JSON on stdout
        #[arg(long)]
        json: bool,
    },
    /// Remove entries, the one that was used longest ago first, until all take no more than this
    Prune {
        /// The cache's directory [env: WEIGHTCAST_CACHE]
        directory: Option<PathBuf>,
        /// What may stay, in GiB
        #[arg(long, value_name = "GIB")]
        max_gib: u64,
    },
}

pub(super) fn run(command: &CacheCommand) -> u8 {
    let (CacheCommand::List { directory, .. }
    | CacheCommand::Verify { directory, .. }
    | CacheCommand::Prune { directory, .. }) = command;
    let mut config = JobConfig::default();
    config.load.cache.clone_from(directory);
    if let CacheCommand::Prune { max_gib, .. } = command {
        config.load.cache_max_bytes = Some(max_gib << 30);
    }
    let Some(place) = config.cache_place() else {
        let (key, expected) = ("load.cache", "a directory, or the variable WEIGHTCAST_CACHE");
        return refuse(&ConfigError::Value { key, expected, found: "nothing".to_owned() });
    };
    match command {
        CacheCommand::List { json, .. } => list_all(&place, *json),
        CacheCommand::Verify { json, .. } => check(&place, *json),
        CacheCommand::Prune { .. } => prune(&place),
    }
}

fn list_all(place: &CachePlace, as_json: bool) -> u8 {
    let entries = match list(place) {
        Ok(entries) => entries,
        Err(error) => return fail(&error),
    };
    if as_json {
        json(&entries);
        return 0;
    }
    if entries.is_empty() {
        say(&format!("no entry in {}", place.root.display()));
    }
    for ListedEntry { key, about, bytes: taken, in_use, .. } in &entries {
        let text = |key: &str| about.get(key).map(ToString::to_string).unwrap_or_default();
        let used = if *in_use { "in use" } else { "" };
        data(&format!("{key}  {:>12}  {:<6}  {}  {}", bytes(*taken), used, text("model"), text("formats")));
    }
    0
}

fn check(place: &CachePlace, as_json: bool) -> u8 {
    let checked = match verify(place) {
        Ok(checked) => checked,
        Err(error) => return fail(&error),
    };
    if as_json {
        json(&checked);
    } else {
        for entry in &checked {
            data(&format!("{}  {:>12}  {} files removed", entry.key, bytes(entry.bytes), entry.damaged.len()));
            entry.damaged.iter().for_each(|reason| say(reason));
        }
    }
    let sound = checked.iter().all(|entry| entry.damaged.is_empty());
    if sound { 0 } else { crate::error::Kind::Corrupt.exit_code() }
}

fn prune(place: &CachePlace) -> u8 {
    let before = list(place).and_then(|before| Ok((before, make_room(place, "", 0)?)));
    match before.and_then(|(before, fits)| Ok((before, fits, list(place)?))) {
        Ok((before, fits, after)) => {
            let taken = |entries: &[ListedEntry]| entries.iter().map(|entry| entry.bytes).sum();
            say(&format!(
                "{} of {} entries removed; {} of {} stay",
                before.len().saturating_sub(after.len()),
                before.len(),
                bytes(taken(&after)),
                bytes(taken(&before))
            ));
            // What jobs hold stays.
            if fits { 0 } else { crate::error::Kind::Conflict.exit_code() }
        }
        Err(error) => error.kind().exit_code().max(fail(&error)),
    }
}
