//! `weightcast bench`.

use super::args::{BenchCommand, BenchDevice};
use super::output::{data, fail};
use crate::bench::{
    BenchError, Figure, LoadBench, checkpoint, collective, coordinator, load, load_to_device, nccl, quantize,
    quantize_on_device, stall,
};
use crate::config::variable;
use crate::model::parse_parameters;
use crate::types::WorldSize;

pub(super) fn run(command: &BenchCommand, as_json: bool) -> u8 {
    let world = |ranks: u32| WorldSize::new(ranks).unwrap_or(WorldSize::ONE);
    let figures: Result<Vec<Figure>, BenchError> = match command {
        BenchCommand::Quantize { device: BenchDevice::Cpu } => quantize(),
        BenchCommand::Quantize { device: BenchDevice::Cuda } => quantize_on_device(),
        BenchCommand::Nccl => nccl(variable("NCCL_LIBRARY").map(Into::into)),
        BenchCommand::Collective { ranks } => collective(world(*ranks)),
        BenchCommand::Checkpoint { directory, ranks, mib } => checkpoint(directory, world(*ranks), mib << 20),
        BenchCommand::Coordinator { directory, ranks } => coordinator(directory, ranks),
        BenchCommand::Stall { directory, mib } => stall(directory, mib << 20),
        BenchCommand::Load { directory, params, ranks, reader_threads, strategy, device } => {
            let parameters = match parse_parameters(params) {
                Ok(parameters) => parameters,
                Err(error) => return fail(&error),
            };
            let (directory, ranks) = (directory.clone(), *ranks);
            let (reader_threads, strategy) = (*reader_threads, *strategy);
            let bench = LoadBench { directory, parameters, ranks, reader_threads, strategy };
            if *device == BenchDevice::Cuda { load_to_device(&bench) } else { load(&bench) }
        }
    };
    match figures {
        Ok(figures) => {
            figures.iter().for_each(|figure| print(figure, as_json));
            0
        }
        Err(error) => fail(&error),
    }
}

fn print(figure: &Figure, as_json: bool) {
    if as_json {
        data(&serde_json::to_string(figure).unwrap_or_default());
        return;
    }
    data(&format!(
        "{:<28} {:>8.3} {:<10} {:>6.2} of {:>8.3} ({})",
        figure.name, figure.value, figure.unit, figure.ratio, figure.limit, figure.limit_is
    ));
}
