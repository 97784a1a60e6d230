//! `weightcast coordinator`.

use std::time::Duration;

use serde_json::json;

use super::args::CoordinatorFlags;
use super::output::{fail, fail_with, json, refuse, say};
use super::progress::ProgressLine;
use crate::app::{Audience, Coordinated, CoordinatorPlace, coordinate, prepare_with};
use crate::config::JobConfig;
use crate::types::WorldSize;

pub(super) fn run(flags: CoordinatorFlags) -> u8 {
    let CoordinatorFlags {
        ranks,
        listen,
        insecure,
        state_dir,
        token_file,
        control_token_file,
        tls,
        job,
        rejoin_timeout,
        observe,
        json,
        job_file,
    } = flags;
    super::arm_faults("coordinator");
    let mut config = match job_file.map_or_else(|| Ok(JobConfig::default()), |file| JobConfig::read(&file)) {
        Ok(config) => config,
        Err(error) => return fail(&error),
    };
    job.apply(&mut config);
    let world = match WorldSize::new(ranks) {
        Ok(world) => world,
        Err(error) => return fail_with(&error, super::EXIT_USAGE),
    };
    if let Err(error) = config.check_streaming() {
        return refuse(&error);
    }
    let runtime = match super::launch::runtime() {
        Ok(runtime) => runtime,
        Err(error) => return fail_with(&error, 70),
    };
    let tls = tls.files();
    let place = CoordinatorPlace {
        listen,
        is_insecure: insecure,
        state_directory: state_dir,
        token_file,
        control_token_file,
        tls,
        observe: observe.places(),
        rejoin: Duration::from_secs(rejoin_timeout),
    };
    // The ranks may be on other hosts, whose memory this one does not know.
    let plan = move |config: &JobConfig| prepare_with(config, world, None, &super::output::download);
    let mut line = ProgressLine::new();
    let audience =
        Audience { note: |note| say(&format!("[coordinator] {note}")), view: Box::new(move |view| line.show(view)) };
    match runtime.block_on(coordinate(config, place, plan, audience)) {
        Ok(coordinated) => finish(&coordinated, json),
        Err(error) => refuse(&error),
    }
}

/// Says how the job ended and gives its exit code.
fn finish(coordinated: &Coordinated, as_json: bool) -> u8 {
    let Coordinated { view, loads, preempted, output } = coordinated;
    let code = view.cause().map_or(if *preempted { super::EXIT_PREEMPTED } else { 0 }, |cause| cause.exit_code);
    if as_json {
        json(&json!({
            "job": view.job,
            "exit_code": code,
            "phase": view.phase.name(),
            "generation": view.generation,
            "cause": view.cause().map(|cause| json!({"rank": cause.rank, "message": cause.message})),
            "checkpoint": view.last_checkpoint,
            "loads": loads,
        }));
    }
    match view.cause() {
        Some(cause) => say(&format!("error: job {}: {}", view.job, cause.message)),
        None => say(&format!("job {} is finished", view.job)),
    }
    if code == 0 { super::launch::output(output.as_ref()) } else { code }
}
