//! `weightcast model`.

use std::path::Path;

use serde_json::json;

use super::args::ModelCommand;
use super::output::{bytes, data, fail, json as print_json, say};
use crate::app::{
    NewModelError, Stage, convert_ckpt, lifecycle, list_models, new_model, new_preset, open_model, record_stage,
};
use crate::model::{DEFAULT_FILE_BYTES, GenerateRequest, NewModel, inspect, parse_parameters};
use crate::types::DType;

pub(super) fn run(command: &ModelCommand) -> u8 {
    match command {
        ModelCommand::Inspect { model, json } => show(model, *json),
        ModelCommand::Forward(flags) => super::forward::run(flags),
        ModelCommand::New { arch, params, preset, dtype, seed, directory } => {
            let Ok(dtype) = dtype.parse::<DType>() else {
                say(&format!("error: --dtype: expected bfloat16, float16 or float32, found {dtype:?}"));
                return super::EXIT_USAGE;
            };
            let seed = *seed;
            let made = match (preset, params) {
                (Some(preset), _) => new_preset(*preset, dtype, seed, directory),
                (None, params) => {
                    let parameters = match parse_parameters(params.as_deref().unwrap_or_default()) {
                        Ok(parameters) => parameters,
                        Err(error) => return fail(&error),
                    };
                    let (architecture, max_file_bytes) = (*arch, DEFAULT_FILE_BYTES);
                    new_model(&GenerateRequest { architecture, parameters, dtype, seed, max_file_bytes }, directory)
                }
            };
            show_new(made, directory)
        }
        ModelCommand::Convert { ckpt, output, activation, json } => match convert_ckpt(ckpt, output, activation) {
            Err(error) => fail(&error),
            Ok(converted) if *json => {
                print_json(&json!({
                    "output": output, "name": converted.name, "parameters": converted.parameters, "bytes": converted.bytes,
                }));
                0
            }
            Ok(converted) => {
                let (parameters, size) = (converted.parameters, bytes(converted.bytes));
                data(&format!("{}: {parameters} parameters, {size}", output.display()));
                0
            }
        },
        ModelCommand::List { directory, json } => list(directory, *json),
        ModelCommand::Lifecycle { directory, deployed, json } => show_lifecycle(directory, deployed.as_deref(), *json),
    }
}

fn show_new(made: Result<NewModel, NewModelError>, directory: &Path) -> u8 {
    match made {
        Ok(model) => {
            let (size, files) = (bytes(model.len_bytes()), model.files.len());
            data(&format!("{}: {} parameters, {size} in {files} files", directory.display(), model.parameters));
            0
        }
        Err(error) => fail(&error),
    }
}

fn list(directory: &Path, as_json: bool) -> u8 {
    let models = match list_models(directory) {
        Ok(models) => models,
        Err(error) => return fail(&error),
    };
    if as_json {
        print_json(&models);
        return 0;
    }
    if models.is_empty() {
        say(&format!("no model directory in {}", directory.display()));
    }
    for model in models {
        let parameters = model.parameters.map_or_else(|| "?".to_owned(), |count| count.to_string());
        let (stage, adapters) = (model.stage.name(), model.adapters.len());
        data(&format!("{:<48} {stage:<9} {parameters:>13} parameters  {adapters} adapters", model.directory));
    }
    0
}

fn show_lifecycle(directory: &Path, deployed: Option<&str>, as_json: bool) -> u8 {
    if let Some(place) = deployed
        && let Err(error) = record_stage(directory, Stage::Deployed, place)
    {
        return fail(&error);
    }
    let lifecycle = match lifecycle(directory) {
        Ok(lifecycle) => lifecycle,
        Err(error) => return fail(&error),
    };
    if as_json {
        print_json(&lifecycle);
        return 0;
    }
    data(&format!("size      {}", lifecycle.size));
    for stage in &lifecycle.stages {
        let models = if stage.models.is_empty() { "-".to_owned() } else { stage.models.join(", ") };
        data(&format!("{:<9} {models}", stage.stage.name()));
    }
    0
}

fn show(model: &str, as_json: bool) -> u8 {
    let source = match open_model(model, &super::output::download) {
        Ok(source) => source,
        Err(error) => return fail(&error),
    };
    let inspection = inspect(&source.skeleton, &source.index, &source.binding);
    if as_json {
        print_json(&inspection);
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
