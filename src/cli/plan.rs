//! `weightcast plan`.

use serde_json::json;

use super::args::PlanFlags;
use super::devices::describe;
use super::output::{bytes, data, fail, json, refuse, say};
use crate::app::{Prepared, prepare_with};
use crate::config::{JobConfig, available_memory_bytes};
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
    let world = WorldSize::new(flags.ranks).unwrap_or(WorldSize::ONE);
    let prepared = match prepare_with(&config, world, available_memory_bytes(), &super::output::download) {
        Ok(prepared) => prepared,
        Err(error) => return refuse(&error),
    };
    print(&prepared, flags.json);
    0
}

fn print(prepared: &Prepared, as_json: bool) {
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
        }));
        return;
    }
    say(&format!("model      {}", plan.model));
    say(&format!("reads      {} in {} tensors, each byte once", bytes(plan.input_bytes()), plan.tensors.len()));
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
