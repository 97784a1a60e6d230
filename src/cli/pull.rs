//! `weightcast model pull`.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::output::{bytes, data, fail, json as print_json, refuse, say};
use crate::app::{PullError, PullPlan, plan_pull, pull};

/// `weightcast model pull`
#[derive(Debug, Args)]
#[command(after_help = "\
What is fetched, and what it takes on disk and at run time, is said before it starts. A pull that is interrupted goes on where it was; the
cache is that of huggingface_hub, which finds the model there too.")]
pub struct PullFlags {
    /// A hub id (`org/name[@revision]`)
    model: String,
    /// An adapter beside it
    #[arg(long, value_name = "ADAPTER")]
    adapter: Vec<String>,
    /// Only say what would be fetched
    #[arg(long)]
    dry_run: bool,
    /// Print JSON on stdout
    #[arg(long)]
    json: bool,
}

pub(super) fn run(flags: &PullFlags) -> u8 {
    let wanted = std::iter::once((&flags.model, false)).chain(flags.adapter.iter().map(|adapter| (adapter, true)));
    let plans: Result<Vec<PullPlan>, PullError> =
        wanted.map(|(reference, is_adapter)| plan_pull(reference, is_adapter)).collect();
    let mut plans = match plans {
        Ok(plans) => plans,
        Err(error) => return refuse(&error),
    };
    if !flags.json {
        plans.iter().for_each(describe);
    }
    if flags.dry_run {
        if flags.json {
            print_json(&plans);
        }
        return 0;
    }
    let mut directories: Vec<PathBuf> = Vec::new();
    // What comes first takes room from what comes after.
    let mut taken = 0;
    for plan in &mut plans {
        plan.free_bytes = plan.free_bytes.saturating_sub(taken);
        taken += plan.missing_bytes;
        match pull(plan, &super::output::download) {
            Ok(directory) => directories.push(directory),
            Err(error) => return fail(&error),
        }
    }
    if flags.json {
        print_json(&json!({"pulled": plans, "directories": directories}));
    } else {
        directories.iter().for_each(|directory| data(&directory.display().to_string()));
    }
    0
}

fn describe(plan: &PullPlan) {
    say(&format!("{} at {}", plan.model, plan.commit));
    say(&format!(
        "  {} in {} files: {} in the cache, {} to fetch; {} free",
        bytes(plan.total_bytes),
        plan.files,
        bytes(plan.cached_bytes),
        bytes(plan.missing_bytes),
        bytes(plan.free_bytes)
    ));
    for (format, taken) in &plan.run_time_bytes {
        say(&format!("  weights on one rank, {format}: {}", bytes(*taken)));
    }
}
