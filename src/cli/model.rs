//! `weightcast model`.

use super::args::ModelCommand;
use super::output::{bytes, data, fail, json};
use crate::app::open_model;
use crate::model::inspect;

pub(super) fn run(command: &ModelCommand) -> u8 {
    let ModelCommand::Inspect { model, json: as_json } = command;
    let source = match open_model(model) {
        Ok(source) => source,
        Err(error) => return fail(&error),
    };
    let inspection = inspect(&source.skeleton, &source.index, &source.binding);
    if *as_json {
        json(&inspection);
        return 0;
    }
    data(&format!("architecture  {}", inspection.architecture));
    data(&format!("parameters    {}", inspection.parameters));
    data(&format!("layers        {}", inspection.layers));
    data(&format!("stored        {} in {} files", bytes(source.index.total_bytes()), source.index.files.len()));
    for (dtype, count) in &inspection.bytes_by_dtype {
        data(&format!("  {dtype:<11} {}", bytes(*count)));
    }
    for tie in &inspection.tied {
        data(&format!("tied          {} is {}", tie.alias, tie.target));
    }
    0
}
