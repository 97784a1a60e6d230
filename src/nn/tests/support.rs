//! Models of the test data, and comparisons.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};

use crate::model::{ModelConfig, Skeleton};
use crate::nn::{Decoder, FrozenWeight, Lora, Parameter, Parameters, Pass, Tokens, module_key};
use crate::types::{Fqn, Shape, as_u64};

pub(super) fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

pub(super) fn load(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path(name), &Device::Cpu).expect("test data")
}

pub(super) fn text(name: &str) -> Vec<u8> {
    std::io::Read::bytes(std::fs::OpenOptions::new().read(true).open(path(name)).expect("test data"))
        .collect::<Result<_, _>>()
        .expect("test data")
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Train {
    Nothing,
    Everything,
}

/// A configuration with its parameters.
pub(super) struct Model {
    pub(super) config: ModelConfig,
    pub(super) parameters: Parameters,
}

impl Model {
    pub(super) fn new(config: &[u8], files: &HashMap<String, Tensor>, train: Train) -> Self {
        let config = ModelConfig::parse(config).expect("a configuration");
        let skeleton = Skeleton::new(config.clone());
        let mut tensors = BTreeMap::new();
        for tensor in &skeleton.tensors {
            let values = files[tensor.fqn.as_str()].to_dtype(DType::F32).expect("floats");
            let parameter = if train == Train::Everything {
                Parameter::Trainable(Var::from_tensor(&values).expect("a variable"))
            } else {
                let slot = FrozenWeight::new(tensor.fqn.clone(), tensor.shape.clone());
                slot.fill(values);
                Parameter::Frozen(slot)
            };
            tensors.insert(tensor.fqn.clone(), parameter);
        }
        let aliases = skeleton.aliases.iter().map(|alias| (alias.alias.clone(), alias.target.clone())).collect();
        Self { config, parameters: Parameters { tensors, adapters: BTreeMap::new(), aliases } }
    }

    pub(super) fn tiny_llama() -> Self {
        let mut files = HashMap::new();
        for part in 1..=3 {
            files.extend(load(&format!("tiny-llama/model-0000{part}-of-00003.safetensors")));
        }
        Self::new(&text("tiny-llama/config.json"), &files, Train::Nothing)
    }

    pub(super) fn tiny(name: &str, train: Train) -> (Self, HashMap<String, Tensor>) {
        let files = load(&format!("nn/{name}.safetensors"));
        (Self::new(&text(&format!("nn/{name}.json")), &files, train), files)
    }

    /// Adds the adapters of a file, whose names start with `prefix`.
    pub(super) fn adapt(&mut self, files: &HashMap<String, Tensor>, prefix: &str, scale: f64, dropout: f32) {
        for (name, a) in files {
            let Some(module) = name.strip_prefix(prefix).and_then(|name| name.strip_suffix(".lora_A.weight")) else {
                continue;
            };
            let var = |part: &str| {
                let tensor = files.get(&format!("{prefix}{module}.{part}.weight"));
                tensor.map(|tensor| Var::from_tensor(tensor).expect("a variable"))
            };
            let adapter = Lora {
                a: Var::from_tensor(a).expect("a variable"),
                b: var("lora_B").expect("both"),
                scale,
                dropout,
                magnitude: var("lora_magnitude_vector"),
                key: module_key(module),
            };
            self.parameters.adapters.insert(module.to_owned(), adapter);
        }
        assert!(!self.parameters.adapters.is_empty());
    }

    pub(super) fn decoder(&self) -> Decoder {
        Decoder::new(&self.config, &self.parameters, Device::Cpu).expect("a whole model")
    }

    pub(super) fn frozen(&self, fqn: &Fqn) -> FrozenWeight {
        match &self.parameters.tensors[fqn] {
            Parameter::Frozen(weight) => weight.clone(),
            Parameter::Trainable(_) => panic!("{fqn} is trainable"),
        }
    }
}

/// Whole rows as one document each; targets are the ids, shifted.
pub(super) fn tokens(ids: &Tensor) -> Tokens {
    let (batch, seq) = ids.dims2().expect("two dims");
    let ids: Vec<u32> = ids.to_dtype(DType::U32).expect("ids").flatten_all().expect("ids").to_vec1().expect("ids");
    let targets = ids.chunks(seq).flat_map(|row| row.iter().skip(1).copied().chain([Tokens::IGNORED])).collect();
    Tokens { starts: vec![0; ids.len()], ids, targets, batch, seq }
}

pub(super) fn hidden(decoder: &Decoder, tokens: &Tokens, pass: &Pass) -> Tensor {
    let mut x = decoder.embed(tokens).expect("embedded");
    for index in 0..decoder.blocks() {
        x = decoder.block(index, &x, pass).expect("a block");
    }
    x
}

pub(super) fn logits(decoder: &Decoder, tokens: &Tokens) -> Tensor {
    let pass = decoder.pass(tokens, None).expect("a pass");
    decoder.logits(&hidden(decoder, tokens, &pass)).expect("logits")
}

/// The mean loss and its gradients.
pub(super) fn gradients(decoder: &Decoder, tokens: &Tokens) -> (f32, GradStore) {
    let pass = decoder.pass(tokens, None).expect("a pass");
    let (sum, count) = decoder.loss(&hidden(decoder, tokens, &pass), tokens).expect("a loss");
    #[expect(clippy::cast_precision_loss, reason = "few tokens")]
    let mean = (sum / count as f64).expect("a mean");
    (mean.to_scalar().expect("a scalar"), mean.backward().expect("a backward"))
}

pub(super) fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).expect("floats").flatten_all().expect("floats").to_vec1().expect("floats")
}

/// The largest difference, relative to the largest expected magnitude.
pub(super) fn difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().all(|value| value.is_finite()), "not finite");
    let largest = expected.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    let off = found.iter().zip(expected).fold(0.0_f32, |off, (found, expected)| off.max((found - expected).abs()));
    assert!(largest > 0.0, "nothing to compare with");
    off / largest
}

pub(super) fn assert_close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f32) {
    let off = difference(&values(found), &values(expected));
    assert!(off <= tolerance, "{what}: off by {off:e} of the largest, tolerance {tolerance:e}");
}

pub(super) fn shape(tensor: &Tensor) -> Shape {
    Shape(tensor.dims().iter().map(|&size| as_u64(size)).collect())
}

/// Numbers from -1 to 1 (a linear congruential generator of Knuth's constants).
pub(super) fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let bits = u16::try_from(state >> 48).expect("16 bits");
        f32::from(bits) / 32_768.0 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// A pass without rotary embedding and dropout.
pub(super) fn pass_of(batch: usize, seq: usize, starts: std::sync::Arc<Vec<u32>>) -> Pass {
    let rows = batch * seq;
    let tokens = Tokens { ids: vec![0; rows], targets: vec![0; rows], starts: starts.to_vec(), batch, seq };
    Pass::new(&tokens, None, None)
}
