//! What a step costs; run by hand.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};

use super::support::random;
use crate::model::{ModelConfig, Skeleton};
use crate::nn::{Decoder, DropoutKey, FrozenWeight, Lora, Parameter, Parameters, Tokens, module_key, seed};
use crate::types::as_usize;

const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 576, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
    "tie_word_embeddings": true, "max_position_embeddings": 8192}"#;

const TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

fn model(dropout: f32) -> (ModelConfig, Parameters) {
    let config = ModelConfig::parse(CONFIG.as_bytes()).expect("a configuration");
    let mut parameters = Parameters::default();
    for (number, tensor) in (0_u64..).zip(&Skeleton::new(config.clone()).tensors) {
        let dims: Vec<usize> = tensor.shape.0.iter().map(|&size| as_usize(size)).collect();
        let values = random(number, dims.iter().product()).into_iter().map(|value| value * 0.05).collect();
        let slot = FrozenWeight::new(tensor.fqn.clone(), tensor.shape.clone());
        slot.fill(Tensor::from_vec(values, dims.clone(), &Device::Cpu).expect("a tensor"));
        parameters.tensors.insert(tensor.fqn.clone(), Parameter::Frozen(slot));
        let module = tensor.fqn.as_str().trim_end_matches(".weight");
        if TARGETS.iter().any(|target| module.ends_with(target)) {
            let var = |rows: usize, columns: usize| {
                let values = random(number, rows * columns).into_iter().map(|value| value * 0.02).collect();
                Var::from_vec(values, (rows, columns), &Device::Cpu).expect("a variable")
            };
            let key = module_key(module);
            let (a, b) = (var(16, dims[1]), var(dims[0], 16));
            parameters.adapters.insert(module.to_owned(), Lora { a, b, scale: 2.0, dropout, magnitude: None, key });
        }
    }
    parameters.aliases.push(("lm_head.weight".into(), "model.embed_tokens.weight".into()));
    (config, parameters)
}

/// A LoRA step of SmolLM2-135M's sizes, r 16 on all linear layers, 4 x 512 tokens, with activation checkpointing by block.
/// `cargo test --lib --config profile.dev.package.weightcast.opt-level=3 -- --ignored --nocapture a_step`
#[test]
#[ignore = "measures, and asserts nothing"]
fn a_step_of_smollm2() {
    for dropout in [0.0, 0.05] {
        let (config, parameters) = model(dropout);
        let decoder = Decoder::new(&config, &parameters, Device::Cpu).expect("a model");
        let ids: Vec<u32> = (0..2048_u32).map(|i| i * 7919 % 49152).collect();
        let targets = ids.iter().map(|id| (id + 1) % 49152).collect();
        let tokens = Tokens { starts: vec![0; 2048], ids, targets, batch: 4, seq: 512 };
        for step in 0..3 {
            let began = crate::clock::now();
            let key = DropoutKey { seed: 1, step, first_sample: 0 };
            let pass = decoder.pass(&tokens, Some(key)).expect("a pass");
            let mut x = decoder.embed(&tokens).expect("embedded");
            let mut inputs = Vec::new();
            for index in 0..decoder.blocks() {
                inputs.push(x.clone());
                x = decoder.block(index, &x, &pass).expect("a block").detach();
            }
            let forward = began.elapsed();
            let leaf = Var::from_tensor(&x).expect("a leaf");
            let (loss, _) = decoder.loss(&leaf, &tokens).expect("a loss");
            let mut gradient = loss.backward().expect("a backward").remove(&leaf).expect("a gradient");
            let head = began.elapsed() - forward;
            let mut gradients = BTreeMap::new();
            for index in (0..decoder.blocks()).rev() {
                let leaf = Var::from_tensor(&inputs[index]).expect("a leaf");
                let out = decoder.block(index, &leaf, &pass).expect("a block");
                let mut store = seed(&out, &gradient).expect("a scalar").backward().expect("a backward");
                gradient = store.remove(&leaf).expect("a gradient");
                gradients.insert(index, store);
            }
            let all = began.elapsed();
            let per_second = 2048.0 / all.as_secs_f64();
            println!("dropout {dropout}: forward {forward:?}, head {head:?}, all {all:?}, {per_second:.0} tokens/s");
        }
    }
}
