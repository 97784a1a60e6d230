//! Logits, losses and gradients as transformers and PEFT computed them.

use super::support::*;
use crate::nn::{NnError, Parameter, Tokens, seed};
use crate::quant::{Kernels, QuantState, Source};
use crate::types::{DType as ElementType, as_usize};
use candle_core::{Device, Tensor, Var};

const LOGITS: f32 = 1e-4;
const GRADIENTS: f32 = 1e-3;

#[test]
fn tiny_llama_gives_transformers_logits() {
    let golden = load("golden/tiny-llama-reference.safetensors");
    let found = logits(&Model::tiny_llama().decoder(), &tokens(&golden["input_ids"]));
    assert_close("logits", &found, &golden["logits_f32"], LOGITS);
}

/// The 4-bit weights of transformers' file, dequantized into the slots.
#[test]
fn quantized_tiny_llama_gives_transformers_logits() {
    let golden = load("golden/tiny-llama-reference.safetensors");
    let model = Model::tiny_llama();
    let file = load("golden/tiny-llama-bnb-nf4/model.safetensors");
    let mut count = 0;
    for (name, packed) in &file {
        let Some(state) = file.get(&format!("{name}.quant_state.bitsandbytes__nf4")) else { continue };
        let state: Vec<u8> = state.to_vec1().expect("bytes");
        let state = QuantState::parse(&state).expect("a state");
        let packed: Vec<u8> = packed.flatten_all().expect("bytes").to_vec1().expect("bytes");
        let fqn = name.as_str().into();
        let slot = model.frozen(&fqn);
        let weights = values(&slot.tensor().expect("filled"));
        let bytes: Vec<u8> = weights.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut again = vec![0; packed.len()];
        let mut absmax = vec![0.0; state.format.blocks(weights.len())];
        let kernels = Kernels::detect();
        let source = Source::new(ElementType::F32, &bytes).expect("whole values");
        kernels.quantize_4bit(state.format, source, &mut again, &mut absmax).expect("lengths fit");
        assert_eq!(again, packed, "{name}");
        let mut out = vec![0.0; weights.len()];
        kernels.dequantize_4bit(state.format, &packed, &absmax, &mut out).expect("lengths fit");
        let dims: Vec<usize> = state.shape.0.iter().map(|&size| as_usize(size)).collect();
        slot.fill(Tensor::from_vec(out, dims, &Device::Cpu).expect("a tensor"));
        count += 1;
    }
    assert_eq!(count, 42);
    let found = logits(&model.decoder(), &tokens(&golden["input_ids"]));
    let exact = &load("nn/tiny-llama-nf4.safetensors")["last_logits"];
    assert_close("logits", &found.narrow(0, 18, 4).expect("the last rows"), exact, LOGITS);
    // bitsandbytes on a CPU multiplies in bf16, of 8 bits.
    assert_close("logits", &found, &golden["logits_nf4"], 1.0 / 256.0);
    assert!(difference(&values(&found), &values(&golden["logits_f32"])) > 1.0 / 64.0, "quantized weights differ more");
}

#[test]
fn an_adapter_gives_pefts_logits_loss_and_gradients() {
    let golden = load("golden/tiny-llama-peft-r4-gradients.safetensors");
    let input = tokens(&load("golden/tiny-llama-reference.safetensors")["input_ids"]);
    let prefix = "base_model.model.";
    let mut model = Model::tiny_llama();
    model.adapt(&load("golden/tiny-llama-peft-r4/adapter_model.safetensors"), prefix, 2.0, 0.0);
    let decoder = model.decoder();
    let expected = &load("golden/tiny-llama-peft-r4-logits.safetensors")["logits"];
    assert_close("logits", &logits(&decoder, &input), expected, LOGITS);
    let (loss, store) = gradients(&decoder, &input);
    let expected = values(&golden["loss"])[0];
    assert!((loss - expected).abs() <= 1e-5 * expected, "{loss} {expected}");
    let mut count = 0;
    for (module, adapter) in &model.parameters.adapters {
        for (part, variable) in [("lora_A", &adapter.a), ("lora_B", &adapter.b)] {
            let name = format!("{prefix}{module}.{part}.weight");
            let found = store.get(variable).unwrap_or_else(|| panic!("{name} has no gradient"));
            assert_close(&name, found, &golden[&name], GRADIENTS);
            count += 1;
        }
    }
    assert_eq!(count, golden.len() - 1);
}

/// Logits and loss, and every gradient that the file has, when all parameters are trained.
fn check_tiny(name: &str, at_least: usize) {
    let (model, golden) = Model::tiny(name, Train::Everything);
    let decoder = model.decoder();
    let input = tokens(&golden["ids"]);
    assert_close(name, &logits(&decoder, &input), &golden["logits"], LOGITS);
    let (loss, store) = gradients(&decoder, &input);
    let expected = values(&golden["loss"])[0];
    assert!((loss - expected).abs() <= 1e-5 * expected, "{loss} {expected}");
    let mut count = 0;
    for (fqn, parameter) in &model.parameters.tensors {
        let Parameter::Trainable(variable) = parameter else { panic!("{fqn} is frozen") };
        let found = store.get(variable).unwrap_or_else(|| panic!("{fqn} has no gradient"));
        assert_eq!(shape(found), shape(variable), "{fqn}");
        if let Some(expected) = golden.get(&format!("gradient.{fqn}")) {
            // A key's bias shifts all scores of a row alike, which softmax takes away: rounding is all that there is.
            if values(expected).iter().all(|value| value.abs() < 1e-6) {
                assert!(values(found).iter().all(|value| value.abs() < 1e-6), "{fqn}");
            } else {
                assert_close(fqn.as_str(), found, expected, GRADIENTS);
            }
            count += 1;
        }
    }
    assert!(count >= at_least, "{count} gradients");
    // Frozen, the same logits come from the slots.
    let (frozen, golden) = Model::tiny(name, Train::Nothing);
    assert_close(name, &logits(&frozen.decoder(), &input), &golden["logits"], LOGITS);
}

/// A window of 5 in rows of 12.
#[test]
fn mistral_equals_transformers() {
    check_tiny("mistral", 4);
}

/// Biases, tied embeddings, every parameter's gradient, and a window in the second layer only.
#[test]
fn qwen2_equals_transformers() {
    check_tiny("qwen2", 26);
}

#[test]
fn qwen3_equals_transformers() {
    check_tiny("qwen3", 3);
}

/// Every parameter's gradient.
#[test]
fn gpt2_equals_transformers() {
    check_tiny("gpt2", 28);
}

/// The exact function in the MLP, as nanoGPT has it.
#[test]
fn gpt2_with_the_exact_gelu_equals_transformers() {
    check_tiny("gpt2-gelu", 3);
}

/// PEFT's DoRA, r 3, alpha 5, over frozen weights.
fn check_dora(name: &str) {
    let (mut model, golden) = Model::tiny(name, Train::Nothing);
    let adapter = load(&format!("nn/{name}-dora.safetensors"));
    model.adapt(&adapter, "tensor.", 5.0 / 3.0, 0.0);
    let decoder = model.decoder();
    let input = tokens(&golden["ids"]);
    assert_close(name, &logits(&decoder, &input), &adapter["logits"], LOGITS);
    let (loss, store) = gradients(&decoder, &input);
    let expected = values(&adapter["loss"])[0];
    assert!((loss - expected).abs() <= 1e-5 * expected, "{loss} {expected}");
    let mut count = 0;
    for (module, lora) in &model.parameters.adapters {
        let magnitude = lora.magnitude.as_ref().expect("DoRA");
        for (part, variable) in [("lora_A", &lora.a), ("lora_B", &lora.b), ("lora_magnitude_vector", magnitude)] {
            let name = format!("gradient.{module}.{part}.weight");
            let found = store.get(variable).unwrap_or_else(|| panic!("{name} is absent"));
            assert_close(&name, found, &adapter[&name], GRADIENTS);
            count += 1;
        }
    }
    assert_eq!(count, adapter.keys().filter(|name| name.starts_with("gradient.")).count());
}

#[test]
fn dora_equals_peft() {
    check_dora("qwen3");
    check_dora("gpt2");
}

/// Two documents in one row give what they give in two rows.
#[test]
fn documents_in_one_row_do_not_see_each_other() {
    for name in ["mistral", "gpt2"] {
        let (model, golden) = Model::tiny(name, Train::Nothing);
        let apart = tokens(&golden["ids"]);
        let starts = [[0_u32; 12], [12; 12]].concat();
        let packed = Tokens { starts, batch: 1, seq: 24, ..apart };
        assert_close(name, &logits(&model.decoder(), &packed), &golden["logits"], LOGITS);
    }
}

/// NN-1: block by block, with slots that are empty between, the gradients of one graph.
#[test]
fn nn_1_blocks_are_recomputed_with_weights_that_came_again() {
    let golden = load("golden/tiny-llama-peft-r4-gradients.safetensors");
    let input = tokens(&load("golden/tiny-llama-reference.safetensors")["input_ids"]);
    let mut model = Model::tiny_llama();
    model.adapt(&load("golden/tiny-llama-peft-r4/adapter_model.safetensors"), "base_model.model.", 2.0, 0.0);
    let decoder = model.decoder();
    let pass = decoder.pass(&input, None).expect("a pass");
    let weights: Vec<Vec<_>> = (0..decoder.blocks())
        .map(|index| decoder.block_tensors(index).iter().map(|fqn| model.frozen(fqn)).collect())
        .collect();
    let saved: Vec<Vec<Tensor>> =
        weights.iter().map(|all| all.iter().map(|weight| weight.tensor().expect("filled")).collect()).collect();
    let fill = |index: usize| {
        for (weight, tensor) in weights[index].iter().zip(&saved[index]) {
            weight.fill(tensor.copy().expect("a copy"));
        }
    };
    let clear = |index: usize| weights[index].iter().for_each(crate::nn::FrozenWeight::clear);
    (0..decoder.blocks()).for_each(clear);
    let mut x = decoder.embed(&input).expect("embedded").detach();
    let mut inputs = Vec::new();
    for index in 0..decoder.blocks() {
        let error = decoder.block(index, &x, &pass).expect_err("an empty slot");
        assert!(
            error.to_string().contains(&format!("model.layers.{index}.input_layernorm.weight: its slot is empty")),
            "{error}"
        );
        fill(index);
        inputs.push(x.clone());
        let inferred = decoder.infer_block(index, &x, &pass).expect("a block");
        x = decoder.block(index, &x, &pass).expect("a block").detach();
        assert_close("without a graph", &inferred, &x, GRADIENTS);
        clear(index);
    }
    let leaf = Var::from_tensor(&x).expect("a leaf");
    let (sum, count) = decoder.loss(&leaf, &input).expect("a loss");
    assert_eq!(count, 21);
    let mut gradient = (sum / 21.0).expect("a mean").backward().expect("a backward").remove(&leaf).expect("a gradient");
    for index in (0..decoder.blocks()).rev() {
        let leaf = Var::from_tensor(&inputs[index]).expect("a leaf");
        fill(index);
        let out = decoder.block(index, &leaf, &pass).expect("a block");
        clear(index);
        let root = seed(&out, &gradient).expect("a scalar");
        assert!(root.backward().is_err(), "the backward reads slots, and they are empty");
        fill(index);
        let mut store = root.backward().expect("a backward");
        let (again, found) = decoder.block_backward(index, (&inputs[index], &gradient), &pass).expect("a backward");
        clear(index);
        gradient = store.remove(&leaf).expect("a gradient");
        assert_close("the input's gradient from the input alone", &again, &gradient, GRADIENTS);
        for (module, adapter) in &model.parameters.adapters {
            if module.contains(&format!("layers.{index}.")) {
                let name = format!("base_model.model.{module}.lora_A.weight");
                assert_close(&name, store.get(&adapter.a).expect("a gradient"), &golden[&name], GRADIENTS);
                assert_close(&name, found.get(&adapter.a).expect("a gradient"), &golden[&name], GRADIENTS);
                let name = format!("base_model.model.{module}.lora_B.weight");
                assert_close(&name, found.get(&adapter.b).expect("a gradient"), &golden[&name], GRADIENTS);
            }
        }
    }
}

#[test]
fn what_is_wrong_is_named() {
    let (mut model, golden) = Model::tiny("qwen2", Train::Nothing);
    let decoder = model.decoder();
    let mut input = tokens(&golden["ids"]);
    input.ids[3] = 48;
    let error = decoder.embed(&input).expect_err("no such token").to_string();
    assert_eq!(error, "tokens: ids at index 3: expected below 48, found 48");
    input.ids[3] = 0;
    input.starts[14] = 3;
    let error = decoder.pass(&input, None).expect_err("a document that starts later").to_string();
    assert_eq!(error, "tokens: starts at index 14: expected at most 2, found 3");
    let fqn = "model.layers.1.mlp.up_proj.weight".into();
    let removed = model.parameters.tensors.remove(&fqn).expect("there");
    let error = crate::nn::Decoder::new(&model.config, &model.parameters, Device::Cpu).expect_err("missing");
    assert!(matches!(&error, NnError::MissingParameter { fqn: found } if *found == fqn), "{error}");
    model.parameters.tensors.insert(fqn, removed);
    model.adapt(&load("nn/qwen3-dora.safetensors"), "tensor.", 1.0, 0.0);
    let error = crate::nn::Decoder::new(&model.config, &model.parameters, Device::Cpu).expect_err("other sizes");
    assert!(matches!(&error, NnError::ParameterShape { .. }), "{error}");
}
