//! `weightcast model cache`.

use clap::Subcommand;

use super::output::{bytes, data, fail, json as print_json, say};
use crate::config::variable;
use crate::hub::{HubConfig, HubError, inventory, prune_cache};

/// `weightcast model cache …`
#[derive(Debug, Subcommand)]
pub enum ModelCacheCommand {
    /// The models in the hub's cache, which Python's huggingface_hub shares
    List {
        /// Print JSON on stdout
        #[arg(long)]
        json: bool,
    },
    /// Remove downloads that broke off and files that no snapshot names; and the models that are named
    Prune {
        /// Hub ids
        models: Vec<String>,
        /// Print JSON on stdout
        #[arg(long)]
        json: bool,
    },
}

pub(super) fn run(command: &ModelCacheCommand) -> u8 {
    let done = HubConfig::from_vars(&variable).and_then(|config| match command {
        ModelCacheCommand::List { json } => list(&config, *json),
        ModelCacheCommand::Prune { models, json } => prune(&config, models, *json),
    });
    match done {
        Ok(()) => 0,
        Err(error) => fail(&error),
    }
}

fn list(config: &HubConfig, as_json: bool) -> Result<(), HubError> {
    let models = inventory(config)?;
    if as_json {
        print_json(&models);
        return Ok(());
    }
    if models.is_empty() {
        say(&format!("no model in {}", config.cache.display()));
    }
    for model in models {
        let waste = model.unnamed_bytes + model.unfinished_bytes;
        let revisions: Vec<&str> = model.revisions.iter().map(|(name, _)| name.as_str()).collect();
        data(&format!(
            "{:<40} {:>12}  {:>12} to prune  {} snapshots  {}",
            model.id,
            bytes(model.bytes),
            bytes(waste),
            model.snapshots.len(),
            revisions.join(", ")
        ));
    }
    Ok(())
}

fn prune(config: &HubConfig, models: &[String], as_json: bool) -> Result<(), HubError> {
    let freed = prune_cache(config, models)?;
    if as_json {
        print_json(&freed);
    } else {
        say(&format!("{} files removed, {}", freed.files, bytes(freed.bytes)));
    }
    Ok(())
}
