//! `weightcast launch --coordinator`: this node's ranks of a job whose coordinator is another process.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use weightcast_launcher::{
    Environment, Event as LaunchEvent, EventSink, Launch, LaunchArgs, Report, is_restartable, run, stop_channel,
};

use super::launch::{LaunchJobError, tls_environment, worker_command};
use super::lines::{LineQueue, hand_on};
use crate::plan::DeviceRule;
use crate::rpc::{Clients, ProcessEnded, Token};
use crate::store::absolute;
use crate::tasks::Tasks;
use crate::tls::{Tls, TlsFiles};

/// Failed ranks that may wait to be reported; more of one node add nothing.
const QUEUE: usize = 16;
/// How long the reports may keep the launcher.
const REPORT_DEADLINE: Duration = Duration::from_millis(500);

/// Where the job's coordinator is.
#[derive(Clone, Debug)]
pub struct CoordinatorAddress {
    /// Its `host:port`.
    pub address: String,
    /// The job's token.
    pub token_file: PathBuf,
    /// The certificates, if the job has some.
    pub tls: Option<TlsFiles>,
    /// Where checkpoints are on this node, if not where the coordinator says.
    pub checkpoint_root: Option<PathBuf>,
    /// What this node's ranks may use before they know the plan; by default what the environment says.
    pub device: Option<DeviceRule>,
}

/// Runs this node's ranks to their end.
///
/// # Errors
/// [`LaunchJobError`] when they cannot be started; ranks that fail are in the report.
pub async fn join(
    args: &LaunchArgs,
    coordinator: &CoordinatorAddress,
    note: fn(&str),
) -> Result<Report, LaunchJobError> {
    let token = Token::at(&coordinator.token_file);
    // A token that cannot be read is one error here, not one of each rank.
    token.header()?;
    let tls = coordinator.tls.clone().map(Tls::open).transpose()?;
    let (token_file, root) = (absolute(&coordinator.token_file), coordinator.checkpoint_root.as_deref().map(absolute));
    let mut command = worker_command(&coordinator.address, &token_file, root.as_deref(), coordinator.device);
    command.environment.extend(tls_environment(coordinator.tls.as_ref()));
    // Each node's ranks go to the coordinator by themselves, so that one node can leave and come back while the others stay.
    let args = LaunchArgs { has_coordinator: true, ..args.clone() };
    let mut launch = Launch::with_command(&args, &Environment::of_this_process(), command)?;
    // Launchers that meet all the same know each other by the job's token, unless they have one of their own.
    launch.gathering.token_file.get_or_insert_with(|| token_file.clone());
    let (failures, queue) = mpsc::channel(QUEUE);
    let lines = Arc::new(LineQueue::default());
    let written = Arc::clone(&lines);
    let (mut processes, mut restarts_left) = (BTreeMap::new(), 0);
    let most = launch.max_restarts;
    let mut watch = move |event| match event {
        LaunchEvent::AttemptStarted { restart_count } => restarts_left = most.saturating_sub(restart_count),
        LaunchEvent::RankStarted { rank, pid } => drop(processes.insert(rank, pid)),
        LaunchEvent::RankExited { rank, end, .. } if !end.is_success() => {
            let (exit_code, message) = (end.exit_code(), end.to_string());
            let process_id = processes.get(&rank).and_then(|pid| u32::try_from(*pid).ok()).unwrap_or(0);
            let will_restart = restarts_left > 0 && is_restartable(exit_code);
            // Full: the others of this node were told already.
            let _ = failures.try_send(ProcessEnded { rank, process_id, exit_code, will_restart, message });
        }
        LaunchEvent::Note { text } => note(&text),
        _ => {}
    };
    let watch = Mutex::new(move |event| watch(event));
    launch.on_event = Some(EventSink::new(move |event| match event {
        LaunchEvent::Line { rank, stream, text } => written.push(rank, stream, text),
        event => watch.lock().unwrap_or_else(PoisonError::into_inner)(event),
    }));
    let mut tasks = Tasks::new();
    tasks.spawn("ranks' lines", hand_on(Arc::clone(&lines), coordinator.address.clone(), (token.clone(), tls.clone())));
    tasks.spawn("report failures", report(queue, coordinator.address.clone(), (token, tls)));
    let (stopper, stop) = stop_channel();
    let report = tokio::select! {
        report = run(launch, stop) => report?,
        Err(source) = stopper.follow_signals() => return Err(LaunchJobError::Signals { source }),
    };
    lines.close();
    tasks.finish(REPORT_DEADLINE).await;
    Ok(report)
}

/// Tells the coordinator of ranks that failed, so that it need not wait for their leases.
async fn report(mut queue: mpsc::Receiver<ProcessEnded>, address: String, (token, tls): (Token, Option<Tls>)) {
    while let Some(ended) = queue.recv().await {
        let rank = ended.rank;
        let told = match Clients::connect(&address, tls.as_ref()).await {
            Ok(mut clients) => clients.report_process_ended(&token, ended).await,
            Err(_) => false,
        };
        if !told {
            tracing::debug!(rank, "the coordinator was not told of a failed rank; its lease will tell");
        }
    }
}
