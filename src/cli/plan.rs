//! `weightcast plan`.

use serde_json::json;

use super::args::PlanFlags;
use super::devices::describe;
use super::output::{bytes, data, fail, json, refuse, say};
use crate::app::{Peeked, Prepared, prepare_peek};
use crate::config::{JobConfig, available_memory_bytes};
use crate::hub::PeekedFile;
use crate::plan::RankMemory;
use crate::types::{DeviceWish, WorldSize};

pub(super) fn run(flags: &PlanFlags) -> u8 {
    if super::estimate::is_asked(flags) {
        return super::estimate::run(flags);
    }
    let config = flags.job_file.as_deref().map_or_else(|| Ok(JobConfig::default()), JobConfig::read);
    let mut config = match config {
        Ok(config) => config,
        Err(error) => return fail(&error),
    };
    flags.job.clone().apply(&mut config);
    let world = WorldSize::new(flags.ranks(&config)).unwrap_or(WorldSize::ONE);
    let (prepared, peeked) = match prepare_peek(&config, world, available_memory_bytes()) {
        Ok(prepared) => prepared,
        Err(error) => return refuse(&error),
    };
    print(&prepared, &peeked, flags.json);
    0
}

/// The sum of a figure over the files of a model in a hub.
fn total(peeked: &Peeked, figure: impl Fn(&PeekedFile) -> u64) -> u64 {
    peeked.files.iter().map(figure).sum()
}

fn print(prepared: &Prepared, peeked: &[Peeked], as_json: bool) {
    let plan = &prepared.plan;
    let ranks: Vec<RankMemory> = plan.world.ranks().map(|rank| plan.memory(rank)).collect();
    let devices = describe();
    if as_json {
        json(&json!({
            "model": plan.model,
            "strategy": plan.strategy,
            "placement": plan.placement,
            "resumed_from": prepared.resumed_from,
            "tensors": plan.tensors.len(),
            "input_bytes": plan.input_bytes(),
            "window_bytes": plan.window_bytes(),
            "ranks": ranks,
            "gpu": devices,
            "plan": plan,
            "hub": peeked.iter().map(|peeked| json!({
                "commit": peeked.commit, "fetched_bytes": peeked.fetched_bytes,
                "total_bytes": total(peeked, |file| file.len_bytes), "cached_bytes": total(peeked, |file| file.cached_bytes),
            })).collect::<Vec<_>>(),
        }));
        return;
    }
    say(&format!("model      {}", plan.model));
    say(&format!("reads      {} in {} tensors, each byte once", bytes(plan.input_bytes()), plan.tensors.len()));
    for peeked in peeked {
        let (all, cached) = (total(peeked, |file| file.len_bytes), total(peeked, |file| file.cached_bytes));
        let (fetched, missing) = (bytes(peeked.fetched_bytes), bytes(all.saturating_sub(cached)));
        say(&format!("hub        {fetched} were fetched for this plan; a load downloads {missing} of {}", bytes(all)));
    }
    say(&format!("devices    {devices}"));
    let place = match plan.device.device {
        DeviceWish::Cuda => "on CUDA devices",
        DeviceWish::Cpu => "in host memory",
        DeviceWish::Auto => "where each rank finds memory",
    };
    say(&format!("weights    {place}"));
    data(&format!(
        "{:>5}  {:>6}  {:>12}  {:>12}  {:>12}  {:>12}  {:>12}  {:>12}",
        "rank", "reads", "weights", "window", "training", "overhead", "host peak", "device peak"
    ));
    for rank in ranks {
        let reads = if plan.reads(rank.rank) { "yes" } else { "no" };
        data(&format!(
            "{:>5}  {reads:>6}  {:>12}  {:>12}  {:>12}  {:>12}  {:>12}  {:>12}",
            rank.rank,
            bytes(rank.weights_bytes + rank.padding_bytes),
            bytes(rank.window_bytes),
            bytes(rank.training_bytes),
            bytes(rank.overhead_bytes),
            bytes(rank.peak_host_bytes),
            if rank.peak_device_bytes == 0 { "-".to_owned() } else { bytes(rank.peak_device_bytes) }
        ));
    }
}
