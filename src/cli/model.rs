//! `weightcast model`.

use super::args::ModelCommand;
use super::output::{bytes, data, fail, json, say};
use crate::app::{new_model, open_model};
use crate::model::{DEFAULT_FILE_BYTES, GenerateRequest, inspect, parse_parameters};
use crate::types::DType;

pub(super) fn run(command: &ModelCommand) -> u8 {
    match command {
        ModelCommand::Inspect { model, json } => show(model, *json),
        ModelCommand::Forward(flags) => super::forward::run(flags),
        ModelCommand::New { arch, params, dtype, seed, directory } => {
            let parameters = match parse_parameters(params) {
                Ok(parameters) => parameters,
                Err(error) => return fail(&error),
            };
            let Ok(dtype) = dtype.parse::<DType>() else {
                say(&format!("error: --dtype: expected bfloat16, float16 or float32, found {dtype:?}"));
                return super::EXIT_USAGE;
            };
            let (architecture, max_file_bytes, seed) = (*arch, DEFAULT_FILE_BYTES, *seed);
            let request = GenerateRequest { architecture, parameters, dtype, seed, max_file_bytes };
            match new_model(&request, directory) {
                Ok(model) => {
                    let size = bytes(model.len_bytes());
                    data(&format!(
                        "{}: {} parameters, {size} in {} files",
                        directory.display(),
                        model.parameters,
                        model.files.len()
                    ));
                    0
                }
                Err(error) => fail(&error),
            }
        }
    }
}

fn show(model: &str, as_json: bool) -> u8 {
    let source = match open_model(model, &super::output::download) {
        Ok(source) => source,
        Err(error) => return fail(&error),
    };
    let inspection = inspect(&source.skeleton, &source.index, &source.binding);
    if as_json {
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
