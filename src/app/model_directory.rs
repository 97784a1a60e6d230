//! Model directories: their names, what is recorded of where a model comes from, and the lists that people see.
//!
//! A name is `{architecture}-{size}-{dataset}-{training_type}[-{version}]`. In the directory are `config.json`,
//! `model_args.json`, `model.safetensors`, `export_meta.json`, `adapters/` and `training_log.txt`.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::adapter_source::AdapterSource;
use super::model_directory_error::DirectoryError;
use crate::adapter::{AdapterConfig, TargetModules, linears};
use crate::error::{Classify as _, Kind};
use crate::model::{Role, Skeleton, parse_parameters};
use crate::store::{LocalStore, Store, StoreError, read_small, write_small};

const META: &str = "export_meta.json";
const MAX_META_BYTES: u64 = 16 << 20;
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// The parts of a model directory's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ModelName {
    /// Such as `gpt`.
    pub architecture: String,
    /// Such as `38M`.
    pub size: String,
    /// Such as `tinystories`; it may have dashes of its own.
    pub dataset: String,
    /// Such as `pretrain`.
    pub training_type: String,
    /// Such as `v1` or `v1.2`; not all names have one.
    pub version: Option<String>,
}

impl ModelName {
    /// Reads a name.
    ///
    /// # Errors
    /// [`DirectoryError::Name`], saying which part is wrong.
    pub fn parse(name: &str) -> Result<Self, DirectoryError> {
        let bad = |what: &str| DirectoryError::Name { name: name.to_owned(), what: what.to_owned() };
        let mut parts: Vec<&str> = name.split('-').collect();
        let plain = |part: &&str| {
            !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.".contains(&byte))
        };
        if !parts.iter().all(plain) || name.starts_with('.') {
            return Err(bad("parts are letters, digits, _ and ."));
        }
        let digit_after_v =
            |part: &&&str| part.strip_prefix('v').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
        let version = parts.last().filter(digit_after_v).map(|version| (*version).to_owned());
        if version.is_some() {
            parts.pop();
        }
        let [architecture, size, dataset @ .., training_type] = parts.as_slice() else {
            return Err(bad("it has too few parts"));
        };
        let unit = size.ends_with(['K', 'M', 'B', 'T']);
        if !unit || parse_parameters(size).is_err() {
            return Err(bad("the second part is no size such as 38M"));
        }
        if dataset.is_empty() {
            return Err(bad("it has too few parts"));
        }
        let (architecture, size) = ((*architecture).to_owned(), (*size).to_owned());
        let (dataset, training_type) = (dataset.join("-"), (*training_type).to_owned());
        Ok(Self { architecture, size, dataset, training_type, version })
    }

    /// The name of a directory.
    ///
    /// # Errors
    /// As [`ModelName::parse`].
    pub fn of(directory: &Path) -> Result<Self, DirectoryError> {
        Self::parse(&directory.file_name().unwrap_or_default().to_string_lossy())
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}-{}", self.architecture, self.size, self.dataset, self.training_type)?;
        self.version.as_ref().map_or(Ok(()), |version| write!(f, "-{version}"))
    }
}

/// Where a model is in its life. The order is that of the variants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Stage {
    Pretrain,
    Lora,
    Merged,
    Deployed,
}

impl Stage {
    /// All stages in order.
    pub const ALL: [Self; 4] = [Self::Pretrain, Self::Lora, Self::Merged, Self::Deployed];

    /// The name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pretrain => "pretrain",
            Self::Lora => "lora",
            Self::Merged => "merged",
            Self::Deployed => "deployed",
        }
    }
}

/// What `export_meta.json` records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportMeta {
    /// The version of this record.
    pub weightcast_export: u32,
    /// The model's name.
    pub name: String,
    /// The stage that it has reached.
    pub stage: Stage,
    /// The number of parameters.
    pub parameters: u64,
    /// How it came here, oldest first.
    pub history: Vec<HistoryEntry>,
}

/// A step of a model's life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// The stage that was reached.
    pub stage: Stage,
    /// What it was made from, in words.
    pub from: String,
}

impl ExportMeta {
    /// A model without a history.
    #[must_use]
    pub fn new(name: &ModelName, stage: Stage, parameters: u64, from: &str) -> Self {
        let history = vec![HistoryEntry { stage, from: from.to_owned() }];
        Self { weightcast_export: 1, name: name.to_string(), stage, parameters, history }
    }
}

/// That a name's size is that of the model: within 10 %, the output head counted or not where it is the embedding, because
/// both ways of counting are in use.
pub(super) fn check_size(name: &ModelName, skeleton: &Skeleton) -> Result<(), DirectoryError> {
    let parameters = skeleton.parameters();
    let embeddings = skeleton.tensors.iter().find(|tensor| tensor.role == Role::Embedding);
    let head = embeddings.and_then(|tensor| tensor.shape.elements().ok()).unwrap_or(0);
    let wanted = parse_parameters(&name.size).unwrap_or(0);
    let near = |count: u64| count.abs_diff(wanted) <= count / 10;
    if near(parameters) || (!skeleton.aliases.is_empty() && near(parameters.saturating_add(head))) {
        return Ok(());
    }
    let (expected, found) = (name.size.clone(), format!("{parameters} parameters"));
    Err(DirectoryError::Size { name: name.to_string(), expected, found })
}

/// Writes `export_meta.json` into a directory without one.
pub(super) fn write_meta(store: &dyn Store, meta: &ExportMeta) -> Result<(), StoreError> {
    let mut text = serde_json::to_string_pretty(meta).expect("plain data becomes text");
    text.push('\n');
    write_small(store, META, text.as_bytes())
}

/// Reads a directory's record, if it has one.
fn read_meta(store: &LocalStore, directory: &str) -> Result<Option<ExportMeta>, DirectoryError> {
    if !store.list(directory)?.iter().any(|name| name == META) {
        return Ok(None);
    }
    let name = join(directory, META);
    let bytes = read_small(store, &name, MAX_META_BYTES)?;
    let parsed = serde_json::from_slice(&bytes);
    parsed.map(Some).map_err(|source| DirectoryError::Meta { path: store.describe(&name), source })
}

/// The record of the model directory `directory`, if it has one.
pub(super) fn read_meta_of(directory: &Path) -> Result<Option<ExportMeta>, DirectoryError> {
    read_meta(&LocalStore::new(directory), "")
}

/// How the model in `directory` came there; empty without a record.
pub(super) fn history_of(directory: &Path) -> Result<Vec<HistoryEntry>, DirectoryError> {
    Ok(read_meta_of(directory)?.map_or_else(Vec::new, |meta| meta.history))
}

/// Whether `directory` has a model's record, configuration or adapter.
pub(super) fn is_model(directory: &Path) -> Result<bool, DirectoryError> {
    let names = LocalStore::new(directory).list("")?;
    Ok([META, "config.json", "adapter_config.json"].iter().any(|name| names.iter().any(|found| found == name)))
}

/// The number of parameters that config.json in `directory` gives, if there is one that can be read.
pub(super) fn parameters_of(directory: &Path) -> Result<Option<u64>, DirectoryError> {
    match read_small(&LocalStore::new(directory), "config.json", MAX_CONFIG_BYTES) {
        Ok(config) => Ok(Skeleton::from_config(&config).ok().as_ref().map(Skeleton::parameters)),
        Err(error) if error.kind() == Kind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Refuses a model directory beside those of models of another size.
pub(super) fn refuse_other_sizes(directory: &Path, name: &ModelName) -> Result<(), DirectoryError> {
    let parent = directory.parent().filter(|parent| *parent != Path::new("")).unwrap_or_else(|| Path::new("."));
    for found in LocalStore::new(parent).list("")? {
        let path = parent.join(&found);
        if let Ok(other) = ModelName::parse(&found)
            && other.size != name.size
            && is_directory(&path)
            && is_model(&path)?
        {
            return Err(DirectoryError::MixedSizes {
                directory: parent.display().to_string(),
                first: name.to_string(),
                first_size: name.size.clone(),
                other: found,
                other_size: other.size,
            });
        }
    }
    Ok(())
}

fn join(directory: &str, name: &str) -> String {
    if directory.is_empty() { name.to_owned() } else { format!("{directory}/{name}") }
}

/// A model directory and what it says of itself.
#[derive(Clone, Debug, Serialize)]
pub struct ListedModel {
    /// The directory's name.
    pub directory: String,
    /// Its parts.
    pub name: ModelName,
    /// The number of parameters, if config.json or the record says it.
    pub parameters: Option<u64>,
    /// The stage: that of the record, else that of the name.
    pub stage: Stage,
    /// How it came here.
    pub history: Vec<HistoryEntry>,
    /// The names in `adapters/` that are adapters.
    pub adapters: Vec<String>,
}

/// The model directories in `root`, sorted by name. Directories of other names are passed over.
///
/// # Errors
/// [`DirectoryError`] when one of them cannot be read.
pub fn list_models(root: &Path) -> Result<Vec<ListedModel>, DirectoryError> {
    let store = LocalStore::new(root);
    let mut models = Vec::new();
    for directory in store.list("")? {
        if let Ok(name) = ModelName::parse(&directory) {
            models.extend(read_model(&store, &directory, name)?);
        }
    }
    Ok(models)
}

/// A directory is a model's when it has a record, a configuration or adapters.
fn read_model(store: &LocalStore, directory: &str, name: ModelName) -> Result<Option<ListedModel>, DirectoryError> {
    if !is_directory(&store.root().join(directory)) {
        return Ok(None);
    }
    let names = store.list(directory)?;
    let has = |name: &str| names.iter().any(|found| found == name);
    if !has(META) && !has("config.json") && !has("adapter_config.json") {
        return Ok(None);
    }
    let meta = read_meta(store, directory)?;
    let mut skeleton = None;
    if has("config.json") {
        let config = read_small(store, &join(directory, "config.json"), MAX_CONFIG_BYTES)?;
        skeleton = Skeleton::from_config(&config).ok();
    }
    let parameters = meta.as_ref().map(|meta| meta.parameters);
    let parameters = parameters.or_else(|| skeleton.as_ref().map(Skeleton::parameters));
    let by_name = || match name.training_type.as_str() {
        "lora" | "qlora" | "dora" => Stage::Lora,
        "merged" => Stage::Merged,
        "deployed" => Stage::Deployed,
        _ => Stage::Pretrain,
    };
    let stage = meta.as_ref().map_or_else(by_name, |meta| meta.stage);
    let mut adapters = Vec::new();
    let adapters_directory = join(directory, "adapters");
    if has("adapters") {
        for adapter in store.list(&adapters_directory)? {
            let path = join(&adapters_directory, &adapter);
            // A name with a dot in front is of an adapter that is being written, or was given up.
            if !adapter.starts_with('.')
                && is_directory(&store.root().join(&path))
                && store.list(&path)?.iter().any(|name| name == "adapter_config.json")
            {
                adapters.push(adapter);
            }
        }
    }
    if let Some(skeleton) = &skeleton {
        adapters_fit(&store.root().join(&adapters_directory), &adapters, skeleton)?;
    }
    let history = meta.map_or_else(Vec::new, |meta| meta.history);
    let directory = directory.to_owned();
    Ok(Some(ListedModel { directory, name, parameters, stage, history, adapters }))
}

/// That adapters are of the model that they lie with, and not of one of another size.
fn adapters_fit(directory: &Path, adapters: &[String], skeleton: &Skeleton) -> Result<(), DirectoryError> {
    let modules = linears(skeleton);
    for adapter in adapters {
        let path = directory.join(adapter).display().to_string();
        let fits = AdapterSource::open_peft(&path, &|_| {}).and_then(|source| source.check(&modules));
        fits.map_err(|source| DirectoryError::Adapter { source: Box::new(source) })?;
    }
    Ok(())
}

fn is_directory(path: &Path) -> bool {
    path.is_dir()
}

/// The life of one model: the directories of all its stages.
#[derive(Clone, Debug, Serialize)]
pub struct Lifecycle {
    /// The size of all of them.
    pub size: String,
    /// What there is at each stage, in order.
    pub stages: Vec<LifecycleStage>,
}

/// A stage and what is there.
#[derive(Clone, Debug, Serialize)]
pub struct LifecycleStage {
    /// The stage.
    pub stage: Stage,
    /// Directories of models at it; for the stage of adapters those in `adapters/` too.
    pub models: Vec<String>,
}

/// The life of the models in `directory`, which is one model's directory or has the directories of one model's stages.
///
/// # Errors
/// [`DirectoryError::MixedSizes`] when there are models of different sizes, [`DirectoryError::None`].
pub fn lifecycle(directory: &Path) -> Result<Lifecycle, DirectoryError> {
    let mut models = list_models(directory)?;
    if models.is_empty()
        && let Ok(name) = ModelName::of(directory)
    {
        let store = LocalStore::new(
            directory.parent().filter(|parent| *parent != Path::new("")).unwrap_or_else(|| Path::new(".")),
        );
        models.extend(read_model(&store, &directory.file_name().unwrap_or_default().to_string_lossy(), name)?);
    }
    let place = directory.display().to_string();
    let Some(first) = models.first() else { return Err(DirectoryError::None { directory: place }) };
    if let Some(other) = models.iter().find(|model| model.name.size != first.name.size) {
        return Err(DirectoryError::MixedSizes {
            directory: place,
            first: first.directory.clone(),
            first_size: first.name.size.clone(),
            other: other.directory.clone(),
            other_size: other.name.size.clone(),
        });
    }
    let at = |stage: Stage| {
        // A single model shows its whole life; among several each stands where it is, and what is deployed was merged.
        let lived = |model: &ListedModel| model.history.iter().any(|entry| entry.stage == stage);
        let reached = |model: &&ListedModel| {
            model.stage == stage
                || (stage == Stage::Merged && model.stage == Stage::Deployed)
                || (models.len() == 1 && lived(model))
        };
        let mut found: Vec<String> = models.iter().filter(reached).map(|model| model.directory.clone()).collect();
        if stage == Stage::Lora {
            let of = |model: &ListedModel| {
                model
                    .adapters
                    .iter()
                    .map(|adapter| format!("{}/adapters/{adapter}", model.directory))
                    .collect::<Vec<_>>()
            };
            found.extend(models.iter().flat_map(of));
        }
        LifecycleStage { stage, models: found }
    };
    Ok(Lifecycle { size: first.name.size.clone(), stages: Stage::ALL.map(at).to_vec() })
}

/// Records that a model has reached a stage: a copy of its record with one more entry.
///
/// # Errors
/// [`DirectoryError::Stage`] when the model is at that stage or past it, [`DirectoryError::None`] without a record.
pub fn record_stage(directory: &Path, stage: Stage, from: &str) -> Result<ExportMeta, DirectoryError> {
    const NEXT: &str = "export_meta.json.next";
    let store = LocalStore::new(directory);
    let place = directory.display().to_string();
    let mut meta = read_meta(&store, "")?.ok_or_else(|| DirectoryError::None { directory: place.clone() })?;
    if stage <= meta.stage {
        let (from, to) = (meta.stage.name().to_owned(), stage.name().to_owned());
        return Err(DirectoryError::Stage { directory: place, from, to });
    }
    meta.stage = stage;
    meta.history.push(HistoryEntry { stage, from: from.to_owned() });
    let mut text = serde_json::to_string_pretty(&meta).expect("plain data becomes text");
    text.push('\n');
    store.remove(NEXT)?;
    write_small(&store, NEXT, text.as_bytes())?;
    store.remove(META)?;
    store.publish(NEXT, META)?;
    Ok(meta)
}

/// Records a merge in `output` when its name is of the form: the stages of `base`, where it has a record, then this one.
///
/// # Errors
/// [`DirectoryError::Name`] when the name's size is not the model's; nothing is written then.
pub(super) fn plan_merged(
    base: &Path,
    (output, skeleton): (&Path, &Skeleton),
    adapter: (&str, &AdapterConfig),
) -> Result<Option<ExportMeta>, DirectoryError> {
    let Ok(name) = ModelName::of(output) else { return Ok(None) };
    check_size(&name, skeleton)?;
    let base_meta = read_meta(&LocalStore::new(base), "")?;
    let mut meta = ExportMeta::new(&name, Stage::Pretrain, skeleton.parameters(), &base.display().to_string());
    if let Some(base) = base_meta {
        meta.history = base.history;
    }
    let targets = match &adapter.1.target_modules {
        TargetModules::AllLinear => "all-linear".to_owned(),
        TargetModules::Pattern(pattern) => pattern.clone(),
        TargetModules::Names(names) => names.join(", "),
    };
    let lora = format!("{} (r {}, alpha {}, {targets})", adapter.0, adapter.1.r, adapter.1.lora_alpha);
    meta.history.push(HistoryEntry { stage: Stage::Lora, from: lora });
    meta.history.push(HistoryEntry { stage: Stage::Merged, from: "weightcast adapter merge".to_owned() });
    meta.stage = Stage::Merged;
    Ok(Some(meta))
}
