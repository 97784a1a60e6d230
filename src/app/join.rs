//! `weightcast launch --coordinator`: this node's ranks of a job whose coordinator is another process.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use weightcast_launcher::{
    Environment, Event as LaunchEvent, EventSink, Launch, LaunchArgs, Report, run, stop_channel,
};

use super::launch::{LaunchJobError, tls_environment, worker_command};
use super::lines::{LineQueue, hand_on};
use crate::plan::DeviceRule;
use crate::rpc::{Clients, Token};
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
    let mut launch = Launch::with_command(args, &Environment::of_this_process(), command)?;
    // The launchers of the nodes know each other by the job's token, unless they have one of their own.
    launch.gathering.token_file.get_or_insert_with(|| token_file.clone());
    let (failures, queue) = mpsc::channel(QUEUE);
    let lines = Arc::new(LineQueue::default());
    let written = Arc::clone(&lines);
    launch.on_event = Some(EventSink::new(move |event| match event {
        LaunchEvent::RankExited { rank, end, .. } if !end.is_success() => {
            // Full: the others of this node were told already.
            let _ = failures.try_send((rank, end.to_string(), end.exit_code()));
        }
        LaunchEvent::Note { text } => note(&text),
        LaunchEvent::Line { rank, stream, text } => written.push(rank, stream, text),
        _ => {}
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
async fn report(mut queue: mpsc::Receiver<(u32, String, u8)>, address: String, (token, tls): (Token, Option<Tls>)) {
    while let Some((rank, message, exit_code)) = queue.recv().await {
        let told = match Clients::connect(&address, tls.as_ref()).await {
            Ok(mut clients) => clients.report_process_ended(&token, rank, message, exit_code).await,
            Err(_) => false,
        };
        if !told {
            tracing::debug!(rank, "the coordinator was not told of a failed rank; its lease will tell");
        }
    }
}
