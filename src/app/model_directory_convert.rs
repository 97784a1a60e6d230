//! `weightcast model convert`: nanoGPT's `ckpt.pt` becomes a model directory that transformers loads too.
//!
//! nanoGPT names its tensors as transformers does, but keeps linear weights `[out, in]` where GPT-2's `Conv1D` has `[in, out]`.
//! At most one tensor is in memory. Nothing in the file is executed.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value as Json, json};

use super::model_directory::{ExportMeta, ModelName, Stage, check_size, write_meta};
use super::model_directory_error::CkptError;
use super::model_directory_pickle::{MAX_PICKLE_BYTES, Pickle, Value};
use super::model_directory_zip::entries;
use super::weight_files::{OutputTensor, WeightFiles};
use crate::model::{Role, Skeleton};
use crate::store::{LocalStore, ReadAt, Store, write_small};
use crate::types::{ByteRange, DType, Fqn, Shape, as_u64, as_usize};

/// What compiled models have before every name.
const COMPILED: &str = "_orig_mod.";

/// A conversion that was done.
#[derive(Clone, Debug)]
pub struct Converted {
    /// The model's name.
    pub name: ModelName,
    /// The number of parameters.
    pub parameters: u64,
    /// The bytes of the weights.
    pub bytes: u64,
}

/// A tensor of the checkpoint.
#[derive(Clone, Debug, PartialEq)]
struct Stored {
    dtype: DType,
    shape: Shape,
    bytes: ByteRange,
}

/// Converts a checkpoint of nanoGPT's form (a dict with `model` and `model_args`) into the model directory `output`, whose
/// name must be of the form. `activation` is transformers' name of the MLP's function, which a checkpoint does not say:
/// nanoGPT has the exact `gelu`; its versions before 2023 and the published GPT-2 have `gelu_new`.
///
/// # Errors
/// [`CkptError`]; the files written so far stay.
pub fn convert_ckpt(ckpt: &Path, output: &Path, activation: &str) -> Result<Converted, CkptError> {
    let name = ModelName::of(output)?;
    let store =
        LocalStore::new(ckpt.parent().filter(|parent| *parent != Path::new("")).unwrap_or_else(|| Path::new(".")));
    let file_name = ckpt.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let file = store.open(&file_name)?;
    let reader = Reader::open(store.describe(&file_name), file)?;
    let tensors = reader.tensors()?;

    let model_args = reader.json("model_args").ok_or_else(|| reader.form("model_args", "a dict", "none"))?;
    let config = reader.config(&model_args, (&tensors, activation))?;
    let text = serde_json::to_string_pretty(&config).expect("a value always becomes text");
    let skeleton = Skeleton::from_config(text.as_bytes())
        .map_err(|source| CkptError::Model { path: reader.path.clone(), source })?;
    let outputs = reader.outputs(&skeleton, &tensors)?;
    let parameters = skeleton.parameters();
    check_size(&name, &skeleton)?;

    let to = LocalStore::new(output);
    to.create_dir("adapters")?;
    let files = WeightFiles::one("model.safetensors", outputs);
    files.write(&to, |tensor, bytes| reader.fill(&skeleton, tensor, tensors.get(&tensor.0), bytes))?;
    let pretty = |value: &Json| format!("{}\n", serde_json::to_string_pretty(value).expect("a value becomes text"));
    write_small(&to, "model_args.json", pretty(&model_args).as_bytes())?;
    write_small(&to, "training_log.txt", reader.log().as_bytes())?;
    write_meta(&to, &ExportMeta::new(&name, Stage::Pretrain, parameters, &reader.path))?;
    write_small(&to, "config.json", format!("{text}\n").as_bytes())?;
    to.sync_dir("")?;
    Ok(Converted { name, parameters, bytes: files.total_bytes() })
}

struct Reader {
    path: String,
    file: Box<dyn ReadAt>,
    /// Storages by key.
    entries: BTreeMap<String, ByteRange>,
    prefix: String,
    pickle: Pickle,
}

impl Reader {
    fn open(path: String, file: Box<dyn ReadAt>) -> Result<Self, CkptError> {
        let entries = entries(&path, file.as_ref())?;
        let found = entries.iter().find(|(name, _)| *name == "data.pkl" || name.ends_with("/data.pkl"));
        let no_pickle = || CkptError::Archive { path: path.clone(), what: "it has no data.pkl" };
        let (name, range) = found.ok_or_else(no_pickle)?;
        if range.len() > MAX_PICKLE_BYTES {
            return Err(CkptError::Archive { path, what: "its data.pkl is longer than 64 MiB" });
        }
        let mut bytes = vec![0; as_usize(range.len())];
        file.read_exact_at(range.start(), &mut bytes)?;
        let prefix = name.strip_suffix("data.pkl").unwrap_or_default().to_owned();
        if let Some(order) = entries.get(&format!("{prefix}byteorder")) {
            let mut text = vec![0; as_usize(order.len().min(16))];
            file.read_exact_at(order.start(), &mut text)?;
            if text != b"little" {
                return Err(CkptError::Archive { path, what: "its numbers are not little-endian" });
            }
        }
        let pickle = Pickle::parse(&path, &bytes)?;
        Ok(Self { path, file, entries, prefix, pickle })
    }

    fn form(&self, what: &str, expected: impl Into<String>, found: impl Into<String>) -> CkptError {
        let (what, expected, found) = (what.to_owned(), expected.into(), found.into());
        CkptError::Form { path: self.path.clone(), what, expected, found }
    }

    fn json(&self, key: &str) -> Option<Json> {
        /// More plain values than any configuration has.
        const ROOM: u32 = 10_000;
        let value = self.pickle.field(self.pickle.root(), key)?;
        self.pickle.json(value, 8, &mut ROOM.clone()).filter(Json::is_object)
    }

    /// The tensors of `model` by name, without what compiling adds.
    fn tensors(&self) -> Result<BTreeMap<Fqn, Stored>, CkptError> {
        let root = self.pickle.root();
        let model = self.pickle.field(root, "model");
        let model = model.ok_or_else(|| self.form("the checkpoint", "a dict with model", Pickle::kind(root)))?;
        let Value::Dict(entries) = model else { return Err(self.form("model", "a dict", Pickle::kind(model))) };
        let mut tensors = BTreeMap::new();
        for (key, value) in entries {
            let (Value::Text(name), Value::Tensor(arguments)) = (self.pickle.get(*key), self.pickle.get(*value)) else {
                let kind = Pickle::kind(self.pickle.get(*value));
                return Err(self.form("an entry of model", "a name and a tensor", kind));
            };
            let stored = self.stored(name, self.pickle.get(*arguments))?;
            tensors.insert(name.strip_prefix(COMPILED).unwrap_or(name).into(), stored);
        }
        Ok(tensors)
    }

    /// `(storage, offset, size, stride, …)`, the storage being `("storage", type, key, device, elements)`.
    fn stored(&self, name: &str, arguments: &Value) -> Result<Stored, CkptError> {
        let bad = |what: &str| self.form(&format!("tensor {name}"), "a contiguous tensor of floats", what);
        let Value::Tuple(arguments) = arguments else { return Err(bad("no arguments")) };
        let argument = |at: usize| arguments.get(at).map_or(&Value::None, |id| self.pickle.get(*id));
        let sizes = |value: &Value| -> Option<Vec<u64>> {
            let Value::Tuple(ids) = value else { return None };
            let size = |id: &usize| match self.pickle.get(*id) {
                Value::Int(size) => u64::try_from(*size).ok(),
                _ => None,
            };
            ids.iter().map(size).collect()
        };
        let (Value::Persistent(storage), Value::Int(offset)) = (argument(0), argument(1)) else {
            return Err(bad("no storage"));
        };
        let (Some(shape), Some(strides)) = (sizes(argument(2)), sizes(argument(3))) else {
            return Err(bad("no shape"));
        };
        let Value::Tuple(storage) = self.pickle.get(*storage) else { return Err(bad("no storage")) };
        let of_storage = |at: usize| storage.get(at).map_or(&Value::None, |id| self.pickle.get(*id));
        let (Value::Class(class), Value::Text(key)) = (of_storage(1), of_storage(2)) else {
            return Err(bad("no storage"));
        };
        let dtype = match class.as_str() {
            "torch.FloatStorage" => DType::F32,
            "torch.HalfStorage" => DType::F16,
            "torch.BFloat16Storage" => DType::BF16,
            "torch.BoolStorage" => DType::Bool,
            "torch.ByteStorage" => DType::U8,
            other => return Err(bad(other)),
        };
        let mut expected = 1_u64;
        for (size, stride) in shape.iter().zip(&strides).rev() {
            if *size > 1 && *stride != expected {
                return Err(bad("strides of another order"));
            }
            expected = expected.saturating_mul(*size);
        }
        let shape = Shape(shape);
        let entry = self.entries.get(&format!("{}data/{key}", self.prefix)).ok_or_else(|| bad("a missing storage"))?;
        let len = shape.bytes(dtype).map_err(|error| bad(&error.to_string()))?;
        let skip = u64::try_from(*offset).ok().and_then(|offset| offset.checked_mul(dtype.size_bytes()));
        let start = skip.and_then(|skip| entry.start().checked_add(skip));
        let bytes = start.and_then(|start| ByteRange::with_len(start, len)).filter(|range| range.end() <= entry.end());
        Ok(Stored { dtype, shape, bytes: bytes.ok_or_else(|| bad("a storage that is too short"))? })
    }

    /// config.json of transformers, with the run's configuration in it.
    fn config(
        &self,
        model_args: &Json,
        (tensors, activation): (&BTreeMap<Fqn, Stored>, &str),
    ) -> Result<Json, CkptError> {
        let size = |key: &str| {
            let found = model_args.get(key);
            found.and_then(Json::as_u64).ok_or_else(|| {
                let found = found.map_or_else(|| "none".to_owned(), Json::to_string);
                self.form(&format!("model_args: {key}"), "a number", found)
            })
        };
        let get = |name: &str| tensors.get(&Fqn::from(name));
        let (embedding, head) = (get("transformer.wte.weight"), get("lm_head.weight"));
        let dtype = embedding.map_or(DType::F32, |tensor| tensor.dtype);
        let mut config: Map<String, Json> = Map::new();
        let fields = [
            ("architectures", json!(["GPT2LMHeadModel"])),
            ("model_type", json!("gpt2")),
            ("activation_function", json!(activation)),
            ("n_layer", json!(size("n_layer")?)),
            ("n_head", json!(size("n_head")?)),
            ("n_embd", json!(size("n_embd")?)),
            ("n_positions", json!(size("block_size")?)),
            ("n_inner", Json::Null),
            ("vocab_size", json!(size("vocab_size")?)),
            ("layer_norm_epsilon", json!(1e-5)),
            ("initializer_range", json!(0.02)),
            // Tied weights are one storage.
            ("tie_word_embeddings", json!(head.is_none() || head == embedding)),
            ("dtype", json!(dtype.torch_name())),
            ("bos_token_id", Json::Null),
            ("eos_token_id", Json::Null),
            ("training_config", self.json("config").unwrap_or_default()),
        ];
        config.extend(fields.into_iter().map(|(key, value)| (key.to_owned(), value)));
        Ok(Json::Object(config))
    }

    /// The tensors that are written; the checkpoint must have them, each in its shape, and no other. Biases may be absent
    /// (nanoGPT's `bias=False`): transformers' GPT-2 has them, and zeros compute the same.
    fn outputs(&self, skeleton: &Skeleton, tensors: &BTreeMap<Fqn, Stored>) -> Result<Vec<OutputTensor>, CkptError> {
        let dtype = tensors.get(&Fqn::from("transformer.wte.weight")).map_or(DType::F32, |tensor| tensor.dtype);
        let mut outputs = Vec::with_capacity(skeleton.tensors.len());
        for tensor in &skeleton.tensors {
            let what = format!("tensor {}", tensor.fqn);
            let Some(found) = tensors.get(&tensor.fqn) else {
                if tensor.fqn.as_str().ends_with(".bias") {
                    outputs.push((tensor.fqn.clone(), dtype, tensor.shape.clone()));
                    continue;
                }
                return Err(self.form(&what, tensor.shape.to_string(), "none"));
            };
            let mut expected = tensor.shape.clone();
            if tensor.role == Role::Linear {
                expected.0.reverse();
            }
            if found.shape != expected || !found.dtype.is_weight_float() {
                return Err(self.form(
                    &what,
                    format!("{expected} of floats"),
                    format!("{} of {}", found.shape, found.dtype),
                ));
            }
            outputs.push((tensor.fqn.clone(), found.dtype, tensor.shape.clone()));
        }
        let known = |fqn: &Fqn| {
            let name = fqn.as_str();
            let mask = name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias");
            mask || skeleton.tensors.iter().any(|tensor| tensor.fqn == *skeleton.resolve(fqn))
        };
        match tensors.keys().find(|fqn| !known(fqn)) {
            Some(fqn) => Err(self.form("model", "the tensors of GPT-2", fqn.to_string())),
            None => Ok(outputs),
        }
    }

    fn fill(
        &self,
        skeleton: &Skeleton,
        (fqn, dtype, shape): &OutputTensor,
        stored: Option<&Stored>,
        bytes: &mut Vec<u8>,
    ) -> Result<(), CkptError> {
        bytes.resize(as_usize(shape.bytes(*dtype).unwrap_or(0)), 0);
        let Some(stored) = stored else { return Ok(()) };
        self.file.read_exact_at(stored.bytes.start(), bytes)?;
        let linear = skeleton.tensors.iter().any(|tensor| tensor.fqn == *fqn && tensor.role == Role::Linear);
        if let (true, [rows, columns]) = (linear, stored.shape.0.as_slice()) {
            *bytes = transposed(bytes, (as_usize(*rows), as_usize(*columns)), as_usize(dtype.size_bytes()));
        }
        Ok(())
    }

    /// What the checkpoint says of its training, for people.
    fn log(&self) -> String {
        let mut log = format!("converted from {}\n", self.path);
        for key in ["iter_num", "best_val_loss"] {
            let value = self.pickle.field(self.pickle.root(), key);
            if let Some(value) = value.and_then(|value| self.pickle.json(value, 1, &mut 1)) {
                log.push_str(&format!("{key} {value}\n"));
            }
        }
        log
    }
}

/// A matrix `[rows, columns]` of elements of `size` bytes as `[columns, rows]`.
fn transposed(bytes: &[u8], (rows, columns): (usize, usize), size: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    for column in 0..columns {
        for row in 0..rows {
            let at = (row * columns + column) * size;
            out.extend_from_slice(bytes.get(at..at + size).unwrap_or_default());
        }
    }
    debug_assert_eq!(as_u64(out.len()), as_u64(bytes.len()), "every element is moved once");
    out
}
