//! `weightcast launch`.

use serde_json::json;
use weightcast_launcher::{Environment, Event, EventSink, Launch, LaunchArgs, run as run_ranks, stop_channel};

use super::args::{JobOverrides, LaunchFlags, ObserveFlags};
use super::output::{bytes, fail, fail_with, json, refuse, say};
use super::progress::ProgressLine;
use crate::app::{
    Audience, CoordinatorAddress, LaunchJob, Launched, ModelExportError, ObservePlaces, RunOutput, join, launch,
    prepare,
};
use crate::config::JobConfig;
use crate::membership::Phase;
use crate::plan::DeviceRule;
use crate::tls::TlsFiles;
use crate::types::{Sharing, WorldSize};

pub(super) fn run(flags: LaunchFlags) -> u8 {
    let LaunchFlags { job, json, coordinator, token_file, tls, observe, launch } = flags;
    let tls = tls.files();
    if let (Some(address), Some(token_file)) = (coordinator, token_file) {
        if job.names_a_job() || !launch.command.is_empty() {
            say("error: --coordinator: the coordinator knows the job; expected no model, job file or program");
            return super::EXIT_USAGE;
        }
        let JobOverrides { checkpoint_dir: checkpoint_root, device, share_devices, backend, .. } = job.clone();
        let of_this_node =
            JobOverrides { checkpoint_dir: None, device: None, share_devices: false, backend: None, ..job };
        if json || of_this_node != JobOverrides::default() {
            say(
                "error: --coordinator: the coordinator knows the job; of a job's flags expected only --checkpoint-dir, \
                 --device, --share-devices and --backend",
            );
            return super::EXIT_USAGE;
        }
        let is_told = device.is_some() || share_devices || backend.is_some();
        let device = is_told.then(|| DeviceRule {
            device: device.unwrap_or_default(),
            sharing: if share_devices { Sharing::Allowed } else { Sharing::Refused },
            backend: backend.unwrap_or_default(),
        });
        if looks(observe) {
            return super::EXIT_USAGE;
        }
        return join_job(&launch, &CoordinatorAddress { address, token_file, tls, checkpoint_root, device });
    }
    let file = launch
        .command
        .first()
        .map(std::path::PathBuf::from)
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"));
    if let (Some(file), Some(more)) = (&file, launch.command.get(1)) {
        let file = file.display();
        say(&format!(
            "error: {file} is a job file: flags go before it, and it takes no arguments; found {more:?} after it"
        ));
        return super::EXIT_USAGE;
    }
    if file.is_none() && !job.names_a_job() {
        return if looks(observe) { super::EXIT_USAGE } else { run_program(&launch) };
    }
    if file.is_none() && !launch.command.is_empty() {
        say("error: a job was named by flags, and a program too: name one of them");
        return super::EXIT_USAGE;
    }
    let mut config = match file.map_or_else(|| Ok(JobConfig::default()), |file| JobConfig::read(&file)) {
        Ok(config) => config,
        Err(error) => return fail(&error),
    };
    if restarts(&launch) {
        return super::EXIT_USAGE;
    }
    job.apply(&mut config);
    let default_nproc_per_node = config.job.ranks_per_node.map(std::num::NonZeroU32::get);
    let launch = LaunchArgs { command: Vec::new(), default_nproc_per_node, ..launch };
    run_job((config, tls), launch, (json, observe.places()))
}

/// Whether ranks are to be started again, which a job has no use for whose coordinator ends with them: says so.
fn restarts(launch: &LaunchArgs) -> bool {
    let asked = launch.max_restarts.as_deref().is_some_and(|count| count != "0");
    if asked {
        say(
            "error: --max-restarts: expected 0 with a job of this launcher alone: start the job again, and it resumes from its checkpoint",
        );
    }
    asked
}

/// Whether ports are asked for that nobody would serve, because there is no coordinator in this process: says so.
fn looks(observe: ObserveFlags) -> bool {
    let asked = observe != ObserveFlags::default();
    if asked {
        say(
            "error: --health-listen, --http-listen: expected a job with its coordinator in this process, or `weightcast coordinator`",
        );
    }
    asked
}

pub(super) fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()
}

/// Starts this node's ranks of a job that has its own coordinator.
fn join_job(args: &LaunchArgs, coordinator: &CoordinatorAddress) -> u8 {
    super::arm_faults("launcher");
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => return fail_with(&error, 70),
    };
    match runtime.block_on(join(args, coordinator, |note| say(&format!("[launcher] {note}")))) {
        Ok(report) => {
            if report.exit_code != 0 {
                say(&report.to_string());
            }
            report.exit_code
        }
        Err(error) => fail_with(&error, error.exit_code()),
    }
}

fn run_job(
    (config, tls): (JobConfig, Option<TlsFiles>),
    args: LaunchArgs,
    (as_json, observe): (bool, ObservePlaces),
) -> u8 {
    super::arm_faults("launcher");
    let layout = match weightcast_launcher::resolve(&args, &Environment::of_this_process()) {
        Ok(layout) => layout,
        Err(error) => return fail_with(&error, error.exit_code()),
    };
    if layout.nnodes > 1 {
        say(
            "error: --nnodes: expected 1 without --coordinator: the ranks of several nodes need a coordinator that all \
             reach (weightcast coordinator)",
        );
        return super::EXIT_USAGE;
    }
    let world = match WorldSize::new(layout.world_size) {
        Ok(world) => world,
        Err(error) => return fail_with(&error, super::EXIT_USAGE),
    };
    if let Err(error) = config.check_streaming() {
        return refuse(&error);
    }
    let mut prepared = match prepare(&config, world, &super::output::download) {
        Ok(prepared) => prepared,
        Err(error) => return refuse(&error),
    };
    for found in prepared.cached.iter().flatten() {
        let (cached, missing) = (bytes(found.cached_bytes), bytes(found.missing_bytes));
        say(&format!("[launcher] cache entry {}: {cached} to read, {missing} to make", found.key));
    }
    let _claim = match prepared.claim_cache() {
        Ok(claim) => claim,
        Err(error) => return refuse(&error),
    };
    for skipped in &prepared.skipped {
        say(&format!("warning: {} was passed over: {}", skipped.directory, skipped.reason));
    }
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => return fail_with(&error, 70),
    };
    let job = LaunchJob { config, prepared, args, tls, observe };
    let mut line = ProgressLine::new();
    let audience =
        Audience { note: |note| say(&format!("[launcher] {note}")), view: Box::new(move |view| line.show(view)) };
    match runtime.block_on(launch(job, audience)) {
        Ok(launched) => finish(&launched, as_json),
        Err(error) => fail_with(&error, error.exit_code()),
    }
}

/// Says how the job ended and gives its exit code: the launcher's, or the cause's when no rank failed by itself.
fn finish(launched: &Launched, as_json: bool) -> u8 {
    let cause = match &launched.view.phase {
        Phase::Aborted(cause) => Some(cause),
        _ => None,
    };
    let code = match (launched.report.exit_code, cause) {
        (0, Some(cause)) => cause.exit_code,
        (code, _) => code,
    };
    if as_json {
        json(&json!({
            "job": launched.view.job,
            "exit_code": code,
            "phase": launched.view.phase.name(),
            "generation": launched.view.generation,
            "cause": cause.map(|cause| json!({"rank": cause.rank, "message": cause.message})),
            "checkpoint": launched.view.last_checkpoint,
            "loads": launched.loads,
            "digests": launched.digests,
            "output": launched.output.as_ref().and_then(|output| output.as_ref().ok()).map(RunOutput::directory),
        }));
    }
    if let Some(cause) = cause {
        say(&format!("error: job {}: {}", launched.view.job, cause.message));
    }
    if launched.report.exit_code != 0 {
        say(&launched.report.to_string());
    } else {
        summarize(launched);
    }
    if code == 0 { output(launched.output.as_ref()) } else { code }
}

/// Says what became of a run's output and gives the job's exit code.
pub(super) fn output(output: Option<&Result<RunOutput, ModelExportError>>) -> u8 {
    match output {
        None | Some(Ok(RunOutput::Unchanged { .. })) => 0,
        Some(Ok(RunOutput::Written { directory, step })) => {
            say(&format!("wrote {}, of step {step}", directory.display()));
            0
        }
        Some(Ok(RunOutput::Older { directory, step })) => {
            say(&format!(
                "warning: {} is of an earlier step of this run and was left as it is; `weightcast model export` or \
                 `weightcast adapter export` writes step {step} elsewhere",
                directory.display()
            ));
            0
        }
        Some(Err(error)) => {
            say("the run is done and its last checkpoint is committed, but its output could not be written");
            fail(error)
        }
    }
}

fn summarize(launched: &Launched) {
    let sum = |figure: fn(&crate::load::LoadReport) -> u64| launched.loads.iter().map(figure).sum::<u64>();
    let seconds = launched.loads.iter().map(|load| load.wall_s).fold(0.0, f64::max);
    say(&format!(
        "loaded {} on {} ranks in {seconds:.2} s: {} read, {} sent, {} kept",
        launched.view.job,
        launched.loads.len(),
        bytes(sum(|load| load.storage_bytes)),
        bytes(sum(|load| load.sent_bytes)),
        bytes(sum(|load| load.weights_bytes)),
    ));
    let damaged = sum(|load| load.non_finite_values);
    if damaged > 0 {
        say(&format!("warning: {damaged} values are NaN or infinite"));
    }
    if let Some(directory) = &launched.view.last_checkpoint {
        say(&format!("committed {directory}"));
    }
}

/// Launches any program, as torchrun does.
fn run_program(args: &LaunchArgs) -> u8 {
    let environment = Environment::of_this_process();
    let mut launch = match Launch::from_args(args, &environment) {
        Ok(launch) => launch,
        Err(error) => return fail_with(&error, error.exit_code()),
    };
    launch.on_event = Some(EventSink::new(|event| {
        if let Event::Note { text } = event {
            say(&format!("[launcher] {text}"));
        }
    }));
    // One thread is enough to wait for processes, and starts faster.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail_with(&error, 70),
    };
    let report = runtime.block_on(async {
        let (stopper, stop) = stop_channel();
        tokio::select! {
            report = run_ranks(launch, stop) => report,
            Err(source) = stopper.follow_signals() => {
                Err(weightcast_launcher::LaunchError::System { action: "handle signals", source })
            }
        }
    });
    match report {
        Ok(report) => {
            if report.exit_code != 0 {
                say(&report.to_string());
            }
            report.exit_code
        }
        Err(error) => fail_with(&error, error.exit_code()),
    }
}
