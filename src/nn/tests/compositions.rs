//! Fused functions against compositions of the tensor library's differentiable operations, and what must not change a bit.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};

use super::support::{Model, Train, assert_close, difference, random, values};
use crate::nn::head::{self, Head};
use crate::nn::layers::{Block, Finder, Linear, Norm, Order};
use crate::nn::ops::adapter::AdapterSaved;
use crate::nn::ops::fused::{Function, Gradients, apply};
use crate::nn::ops::matrix::{Held, Matrix};
use crate::nn::ops::{dropout_mask, linear};
use crate::nn::{
    DropoutKey, FrozenWeight, Lora, Parameter, Parameters, Pass, Tokens, block, composed, module_key, seed,
};

const KEY: DropoutKey = DropoutKey { seed: 7, step: 3, first_sample: 10 };
const TOLERANCE: f32 = 2e-5;

fn tensor(seed: u64, rows: usize, columns: usize) -> Tensor {
    Tensor::from_vec(random(seed, rows * columns), (rows, columns), &Device::Cpu).expect("a tensor")
}

fn variable(seed: u64, rows: usize, columns: usize) -> Var {
    Var::from_tensor(&tensor(seed, rows, columns)).expect("a variable")
}

/// Two rows of 150 tokens: more than two tiles, documents in between, the last targets absent.
fn input() -> Tokens {
    let (batch, seq) = (2, 150);
    let starts = (0..2_u32).flat_map(|row| (0..150).map(move |i| if i >= 90 - 20 * row { 90 - 20 * row } else { 0 }));
    let ids: Vec<u32> = (0..300).map(|i| (i * i + 5) % 48).collect();
    let targets = ids.iter().map(|id| if id % 5 == 0 { Tokens::IGNORED } else { (id * 7 + 1) % 48 }).collect();
    Tokens { starts: starts.collect(), ids, targets, batch, seq }
}

/// Adds adapters to some modules: plain, with dropout, as `DoRA`, as both.
fn adapt(model: &mut Model) {
    let mut number = 0;
    let modules: Vec<(String, usize, usize)> = model
        .parameters
        .tensors
        .iter()
        .filter_map(|(fqn, parameter)| {
            let dims = parameter.tensor().expect("filled").dims().to_vec();
            let module = fqn.as_str().strip_suffix(".weight").filter(|name| dims.len() == 2 && name.contains(".0."))?;
            let [first, second] = [dims[0], dims[1]];
            let conv = module.starts_with("transformer");
            Some((module.to_owned(), if conv { first } else { second }, if conv { second } else { first }))
        })
        .collect();
    for (module, inputs, outputs) in modules {
        number += 1;
        let magnitude = Var::from_vec(random(number + 50, outputs), outputs, &Device::Cpu).expect("a variable");
        let adapter = Lora {
            a: variable(number, 3, inputs),
            b: variable(number + 100, outputs, 3),
            scale: 0.7,
            dropout: if number % 2 == 0 { 0.25 } else { 0.0 },
            magnitude: (number % 3 == 0).then_some(magnitude),
            key: module_key(&module),
        };
        model.parameters.adapters.insert(module, adapter);
    }
    assert!(number >= 4, "all kinds of adapters");
}

/// All variables by name.
fn variables(parameters: &Parameters) -> BTreeMap<String, Var> {
    let mut found = BTreeMap::new();
    for (fqn, parameter) in &parameters.tensors {
        found.extend(parameter.variable().map(|variable| (fqn.to_string(), variable)));
    }
    for (module, adapter) in &parameters.adapters {
        found.insert(format!("{module}.a"), adapter.a.clone());
        found.insert(format!("{module}.b"), adapter.b.clone());
        found.extend(adapter.magnitude.clone().map(|magnitude| (format!("{module}.magnitude"), magnitude)));
    }
    found
}

struct Case {
    block: Arc<Block>,
    variables: BTreeMap<String, Var>,
    pass: Pass,
    x: Var,
    gradient: Tensor,
}

impl Case {
    fn new(name: &str, train: Train) -> Self {
        let (mut model, _) = Model::tiny(name, train);
        // GPT-2's test model has 32 positions, which only its embedding needs.
        model.config.max_position_embeddings = 32;
        adapt(&mut model);
        let block = Arc::new(Finder::new(&model.parameters).block(&model.config, 0).expect("a block"));
        let tokens = input();
        let pass = match name {
            "gpt2" | "gpt2-gelu" => Pass::new(&tokens, None, Some(KEY)),
            _ => model.decoder().pass(&tokens, Some(KEY)).expect("a pass"),
        };
        let mut variables = variables(&model.parameters);
        variables.retain(|name, _| name.contains(".0."));
        Self { block, variables, pass, x: variable(1000, 300, 16), gradient: tensor(1001, 300, 16) }
    }

    fn run(&self, fused: bool) -> (Tensor, GradStore) {
        let out = if fused {
            block::forward(&self.block, &self.x, &self.pass)
        } else {
            composed::block(&self.block, &self.x, &self.pass)
        };
        let out = out.expect("a block");
        let store = seed(&out, &self.gradient).expect("a scalar").backward().expect("a backward");
        (out, store)
    }
}

#[test]
fn nn_2_blocks_equal_their_composition() {
    for (name, train) in [
        ("mistral", Train::Nothing),
        ("qwen2", Train::Everything),
        ("qwen3", Train::Nothing),
        ("qwen3", Train::Everything),
        ("gpt2", Train::Nothing),
        ("gpt2", Train::Everything),
        ("gpt2-gelu", Train::Everything),
    ] {
        let case = Case::new(name, train);
        let ((out, store), (expected, reference)) = (case.run(true), case.run(false));
        assert_close(name, &out, &expected, TOLERANCE);
        let (found, expected) = (store.get(&case.x).expect("dx"), reference.get(&case.x).expect("dx"));
        assert_close(&format!("{name} dx"), found, expected, TOLERANCE);
        for (part, variable) in &case.variables {
            let what = format!("{name} {part}");
            let found = store.get(variable).unwrap_or_else(|| panic!("{what} has no gradient"));
            let expected = reference.get(variable).expect("a gradient");
            // A key's bias has none but rounding, see models.rs.
            if values(expected).iter().any(|value| value.abs() > 1e-3) {
                assert_close(&what, found, expected, 10.0 * TOLERANCE);
            }
        }
    }
}

/// NN-3: one, two and three threads.
#[test]
fn nn_3_threads_change_no_bit() {
    let case = Case::new("qwen3", Train::Everything);
    let bits = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        pool.install(|| {
            let (out, store) = case.run(true);
            let all = [&out, store.get(&case.x).expect("dx")].into_iter();
            let all = all.chain(case.variables.values().map(|variable| store.get(variable).expect("a gradient")));
            all.flat_map(values).map(f32::to_bits).collect::<Vec<u32>>()
        })
    };
    let one = bits(1);
    assert!(one == bits(2) && one == bits(3));
}

#[test]
fn the_loss_equals_its_composition() {
    for train in [Train::Nothing, Train::Everything] {
        let (model, _) = Model::tiny("gpt2", train);
        let parameter = |name: &str| model.parameters.tensors[name].clone();
        let norm = Norm {
            weight: parameter("transformer.ln_f.weight"),
            bias: Some(parameter("transformer.ln_f.bias")),
            eps: 1e-5,
        };
        let head = Arc::new(Head { norm, weight: parameter("transformer.wte.weight"), vocab: 48 });
        let (x, tokens) = (variable(5, 300, 16), input());
        let found = head::loss(&head, &x, &tokens).expect("a loss");
        let normed = composed::norm(&head.norm, &x).expect("a norm");
        let expected = composed::loss(&normed, &head.weight, &tokens).expect("a loss");
        assert_close("loss", &found, &expected, TOLERANCE);
        // Gradients of half the loss, so that a factor that is forgotten shows.
        let backward = |loss: Tensor| (loss * 0.5).expect("a half").backward().expect("a backward");
        let (found, expected) = (backward(found), backward(expected));
        assert_close("dx", found.get(&x).expect("dx"), expected.get(&x).expect("dx"), TOLERANCE);
        for variable in [&head.weight, &head.norm.weight, head.norm.bias.as_ref().expect("one")]
            .into_iter()
            .filter_map(Parameter::variable)
        {
            let (found, expected) = (found.get(&variable).expect("found"), expected.get(&variable).expect("found"));
            assert_close("parameter", found, expected, TOLERANCE);
        }
    }
}

/// A linear layer alone.
struct Alone(Linear, Pass);

impl Function for Alone {
    type Saved = Option<AdapterSaved>;

    const NAME: &'static str = "linear";

    fn variables(&self) -> Vec<Var> {
        self.0.variables()
    }

    fn forward(&self, x: &Tensor, wanted: bool) -> candle_core::Result<(Vec<f32>, candle_core::Shape, Self::Saved)> {
        let x = Matrix::new(Held::new(x)?.data()?.to_vec(), self.0.inputs);
        let (out, saved) = linear::forward(&self.0, (&x, &self.1), wanted)?;
        let shape = (out.rows(), out.columns()).into();
        Ok((out.into_vec(), shape, saved))
    }

    fn backward(
        &self,
        x: &Tensor,
        saved: Self::Saved,
        gradient: &Tensor,
        found: &mut Gradients,
    ) -> candle_core::Result<Tensor> {
        let x = Matrix::new(Held::new(x)?.data()?.to_vec(), self.0.inputs);
        let gradient = Matrix::new(Held::new(gradient)?.data()?.to_vec(), self.0.outputs);
        let mut back = |onto| linear::backward(&self.0, (&x, &self.1), saved.as_ref(), (&gradient, onto), found);
        let out = back(None)?;
        // Added to itself it is twice itself.
        for (twice, once) in back(Some(out.clone()))?.data().iter().zip(out.data()) {
            assert!((twice - 2.0 * once).abs() <= 1e-5 * (1.0 + once.abs()), "{twice} is not twice {once}");
        }
        out.into_tensor()
    }
}

/// Two rows of three tokens.
fn two_rows() -> Pass {
    let tokens = Tokens { starts: vec![0; 6], ids: vec![0; 6], targets: vec![0; 6], batch: 2, seq: 3 };
    Pass::new(&tokens, None, Some(KEY))
}

const OUTPUTS: usize = 4;
const CASES: u32 = 64;

/// More and fewer than the six rows: an adapter is merged into the weight for a layer with fewer.
fn inputs_of(case: u32) -> usize {
    if case >> 5 & 1 == 1 { 7 } else { 5 }
}

/// The kind `case`: the weight's order, whether it is trained, dropout, DoRA, whether there is an adapter, and inputs.
fn layer_of(case: u32) -> Linear {
    let (inputs, outputs) = (inputs_of(case), OUTPUTS);
    let on = |bit: u32| case >> bit & 1 == 1;
    let order = if on(0) { Order::InOut } else { Order::OutIn };
    let [rows, columns] = if on(0) { [inputs, outputs] } else { [outputs, inputs] };
    let weight = variable(1, rows, columns);
    let weight = if on(1) {
        Parameter::Trainable(weight)
    } else {
        let slot = FrozenWeight::new("w".into(), super::support::shape(&weight));
        slot.fill(weight.as_tensor().clone());
        Parameter::Frozen(slot)
    };
    let bias = Var::from_vec(random(2, outputs), outputs, &Device::Cpu).expect("a variable");
    let magnitude = Var::from_vec(random(3, outputs), outputs, &Device::Cpu).expect("a variable");
    let adapter = Lora {
        a: variable(4, 2, inputs),
        b: variable(5, outputs, 2),
        scale: 1.5,
        dropout: if on(2) { 0.4 } else { 0.0 },
        magnitude: on(3).then_some(magnitude),
        key: 9,
    };
    Linear { weight, order, inputs, outputs, bias: Some(Parameter::Trainable(bias)), adapter: on(4).then_some(adapter) }
}

/// Every kind of linear layer, with every kind of adapter, against the composition; values and gradients. The
/// composition's own gradients are those of PEFT (models.rs) where no dropout is.
#[test]
fn linear_layers_equal_their_composition() {
    for case in 0..CASES {
        let layer = layer_of(case);
        let (pass, x, given) = (two_rows(), variable(6, 6, inputs_of(case)), tensor(7, 6, OUTPUTS));
        let expected = composed::linear(&layer, &x, &pass).expect("a composition");
        let variables = layer.variables();
        let found = apply(Alone(layer, pass), &x).expect("a node");
        let what = format!("case {case:06b}");
        assert_close(&what, &found, &expected, TOLERANCE);
        let backward = |out: &Tensor| seed(out, &given).expect("a scalar").backward().expect("a backward");
        let (found, expected) = (backward(&found), backward(&expected));
        for variable in variables.iter().chain([&x]) {
            let (found, expected) = (found.get(variable).expect("found"), expected.get(variable).expect("found"));
            assert_close(&what, found, expected, TOLERANCE);
        }
    }
}

/// The same layers against central differences of their forward, within 2e-3 of the largest slope. DoRA takes the norm for a
/// constant (liu2024, section 4.3), so matrices beneath it have other gradients than the function has slopes; those are
/// compared with PEFT's (models.rs).
#[test]
fn linear_layers_have_the_slopes_of_their_function() {
    const STEP: f32 = 1.0 / 64.0;
    let given = tensor(7, 6, OUTPUTS);
    let given_values = super::support::values(&given);
    for case in 0..CASES {
        let x = variable(6, 6, inputs_of(case));
        let node = apply(Alone(layer_of(case), two_rows()), &x).expect("a node");
        let twin = layer_of(case);
        let dora = twin.adapter.as_ref().is_some_and(|adapter| adapter.magnitude.is_some());
        let variables = twin.variables();
        let alone = Alone(twin, two_rows());
        let value = || -> f64 {
            let (out, ..) = alone.forward(&x, false).expect("a forward");
            out.iter().zip(&given_values).map(|(out, given)| f64::from(*out) * f64::from(*given)).sum()
        };
        let gradients = seed(&node, &given).expect("a scalar").backward().expect("a backward");
        let of_x = super::support::values(gradients.get(&x).expect("found"));
        check_slopes(&format!("case {case:06b} x"), &x, &of_x, STEP, &value);
        for (index, variable) in
            variables.iter().enumerate().filter(|(_, variable)| !dora || variable.dims().len() == 1)
        {
            let found = gradient_of(case, index, &x, &given);
            check_slopes(&format!("case {case:06b} variable {index}"), variable, &found, STEP, &value);
        }
    }
}

/// The gradient of variable `index` of a fresh layer of the kind `case`.
fn gradient_of(case: u32, index: usize, x: &Var, given: &Tensor) -> Vec<f32> {
    let layer = layer_of(case);
    let variables = layer.variables();
    let node = apply(Alone(layer, two_rows()), x).expect("a node");
    let gradients = seed(&node, given).expect("a scalar").backward().expect("a backward");
    super::support::values(gradients.get(&variables[index]).expect("found"))
}

/// That `found` is the derivative of `value` by `variable`, which is moved and put back.
fn check_slopes(what: &str, variable: &Var, found: &[f32], step: f32, value: &dyn Fn() -> f64) {
    let values = super::support::values(variable);
    let put = |values: &[f32]| {
        let moved = Tensor::from_slice(values, variable.shape(), &Device::Cpu).expect("a tensor");
        variable.set(&moved).expect("the same shape");
    };
    let slopes: Vec<f64> = (0..values.len())
        .map(|index| {
            let mut moved = values.clone();
            moved[index] = values[index] + step;
            put(&moved);
            let above = value();
            moved[index] = values[index] - step;
            put(&moved);
            (above - value()) / (2.0 * f64::from(step))
        })
        .collect();
    put(&values);
    let largest = slopes.iter().fold(0.0_f64, |largest, slope| largest.max(slope.abs()));
    assert!(largest > 1e-2, "{what}: nothing depends on it");
    for (slope, found) in slopes.iter().zip(found) {
        let off = (slope - f64::from(*found)).abs();
        assert!(off <= 2e-3 * largest, "{what}: {found}, by differences {slope}, largest {largest}");
    }
}

/// NN-4: a batch of two rows gives the masks of its rows alone; another step, another mask; a quarter is zeroed.
#[test]
fn nn_4_dropout_follows_the_sample() {
    let lora = Lora {
        a: variable(1, 2, 8),
        b: variable(2, 8, 2),
        scale: 1.0,
        dropout: 0.25,
        magnitude: None,
        key: module_key("q"),
    };
    let (seq, features) = (100, 50);
    let mask = |adapter: &Lora, key: DropoutKey, rows: usize| {
        values(&dropout_mask(adapter, key, seq, (rows, features), &Device::Cpu).expect("a mask"))
    };
    let both = mask(&lora, KEY, 2 * seq);
    let (first, second) = both.split_at(seq * features);
    assert_eq!(first, mask(&lora, KEY, seq));
    assert_eq!(second, mask(&lora, DropoutKey { first_sample: KEY.first_sample + 1, ..KEY }, seq));
    assert_ne!(first, second);
    assert_ne!(first, mask(&lora, DropoutKey { step: KEY.step + 1, ..KEY }, seq));
    assert_ne!(first, mask(&lora, DropoutKey { seed: KEY.seed + 1, ..KEY }, seq));
    assert_ne!(first, mask(&Lora { key: module_key("k"), ..lora.clone() }, KEY, seq));
    assert!(both.iter().all(|value| *value == 0.0 || (value - 4.0 / 3.0).abs() < 1e-6));
    // 10,000 draws of a quarter: 2,500 with a deviation of 43; four of them.
    let zeros = both.iter().filter(|value| **value == 0.0).count();
    assert!(zeros.abs_diff(2500) < 173, "{zeros}");
}

/// The vector exponential against the standard library's in f64.
#[test]
fn the_exponential_is_exact_to_two_units() {
    for step in -8_700_i16..=8_700 {
        let x = f32::from(step) / 100.0;
        let (found, expected) = (f64::from(crate::nn::ops::vector::exp(x)), f64::from(x).exp());
        assert!((found - expected).abs() <= 2.4e-7 * expected, "exp({x}) = {found}, expected {expected}");
    }
    assert_eq!(crate::nn::ops::vector::exp(-1000.0), 0.0);
    assert_eq!(crate::nn::ops::vector::exp(f32::NEG_INFINITY), 0.0);
    assert!(crate::nn::ops::vector::exp(f32::NAN).is_nan());
    assert!(difference(&[crate::nn::ops::vector::exp(0.0)], &[1.0]) == 0.0);
}
