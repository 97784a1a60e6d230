//! Every backward against central differences of its forward. A step of 1/64 in f32 leaves errors of about 1e-4 of the
//! curvature and 1e-5 of rounding; the tolerance is 2e-3 of the largest derivative.

use std::sync::Arc;

use super::support::random;
use crate::nn::Pass;
use crate::nn::Tokens;
use crate::nn::layers::AttentionShape;
use crate::nn::ops::attention::{self, Qkv};
use crate::nn::ops::cross_entropy::{self, in_chunks};
use crate::nn::ops::matrix::Matrix;
use crate::nn::ops::{activation, norm, rotary};
use crate::nn::tests::support::pass_of;

const STEP: f32 = 1.0 / 64.0;
const TOLERANCE: f64 = 2e-3;

/// That `gradient` is the derivative of `sum(weights * function(x))`.
fn check(what: &str, x: &[f32], gradient: &[f32], weights: &[f32], function: &dyn Fn(&[f32]) -> Vec<f32>) {
    assert_eq!(x.len(), gradient.len(), "{what}");
    let value = |x: &[f32]| -> f64 {
        let out = function(x);
        assert_eq!(out.len(), weights.len(), "{what}");
        out.iter().zip(weights).map(|(out, weight)| f64::from(*out) * f64::from(*weight)).sum()
    };
    let slopes: Vec<f64> = (0..x.len())
        .map(|index| {
            let mut moved = x.to_vec();
            moved[index] = x[index] + STEP;
            let above = value(&moved);
            moved[index] = x[index] - STEP;
            (above - value(&moved)) / (2.0 * f64::from(STEP))
        })
        .collect();
    let largest = slopes.iter().fold(0.0_f64, |largest, slope| largest.max(slope.abs()));
    assert!(largest > 1e-2, "{what}: nothing depends on it");
    for (index, (slope, found)) in slopes.iter().zip(gradient).enumerate() {
        let off = (slope - f64::from(*found)).abs();
        assert!(off <= TOLERANCE * largest, "{what} [{index}]: {found}, by differences {slope}, largest {largest}");
    }
}

#[test]
fn norms() {
    let (width, rows) = (7, 3);
    let (x, weight, bias) = (random(1, width * rows), random(2, width), random(3, width));
    let given = random(4, width * rows);
    for bias in [None, Some(bias.as_slice())] {
        let forward = |x: &[f32], weight: &[f32], bias: Option<&[f32]>| norm::forward(x, weight, bias, 1e-5);
        let (_, saved) = forward(&x, &weight, bias);
        let wanted = norm::Wanted { weight: true, bias: bias.is_some() };
        let found = norm::backward(&x, &weight, &saved, &given, (bias.is_some(), wanted));
        check("x", &x, found.input.data(), &given, &|x| forward(x, &weight, bias).0.into_vec());
        check("weight", &weight, &found.weight.expect("wanted"), &given, &|weight| {
            forward(&x, weight, bias).0.into_vec()
        });
        if let Some(bias) = bias {
            let found = found.bias.expect("wanted");
            check("bias", bias, &found, &given, &|bias| forward(&x, &weight, Some(bias)).0.into_vec());
        }
    }
}

#[test]
fn activations() {
    let x: Vec<f32> = random(1, 40).into_iter().map(|value| value * 3.0).collect();
    let (up, given) = (random(2, 40), random(3, 40));
    let mut slope = x.clone();
    activation::gelu_backward(&mut slope, &given);
    check("gelu", &x, &slope, &given, &activation::gelu);
    let mut slope = x.clone();
    activation::gelu_exact_backward(&mut slope, &given);
    check("exact gelu", &x, &slope, &given, &activation::gelu_exact);
    let (mut gate_slope, mut up_slope) = (x.clone(), up.clone());
    activation::silu_mul_backward(&mut gate_slope, &mut up_slope, &given);
    check("gate", &x, &gate_slope, &given, &|gate| activation::silu_mul(gate, &up));
    check("up", &up, &up_slope, &given, &|up| activation::silu_mul(&x, up));
}

/// Heads of 6 dims of which 4 are rotated.
#[test]
fn rotary() {
    let (rows, half, head_dim, columns) = (3, 2, 6, 12);
    let angles = random(1, rows * half);
    let cos: Vec<f32> = angles.iter().map(|angle| angle.cos()).collect();
    let sin: Vec<f32> = angles.iter().map(|angle| angle.sin()).collect();
    let apply = |x: &[f32], direction: f32| {
        let mut x = x.to_vec();
        rotary::Rotation { cos: &cos, sin: &sin, half, direction }.apply(&mut x, columns, head_dim);
        x
    };
    let (x, given) = (random(2, rows * columns), random(3, rows * columns));
    check("x", &x, &apply(&given, -1.0), &given, &|x| apply(x, 1.0));
}

/// Two rows, the second of two documents, 4 query heads on 2 key heads, with and without a window; and one row that is
/// longer than a tile.
#[test]
fn attention() {
    for (batch, seq, starts, window) in [
        (2, 5, vec![0, 0, 0, 0, 0, 0, 0, 2, 2, 2], None),
        (2, 5, vec![0, 0, 0, 0, 0, 0, 0, 2, 2, 2], Some(2)),
        (1, 70, vec![0; 70], Some(67)),
    ] {
        let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 3, window };
        let pass: Pass = pass_of(batch, seq, Arc::new(starts));
        let rows = batch * seq;
        let qkv = |query: &[f32], key: &[f32], value: &[f32]| Qkv {
            query: Matrix::new(query.to_vec(), 12),
            key: Matrix::new(key.to_vec(), 6),
            value: Matrix::new(value.to_vec(), 6),
        };
        let (query, key, value) = (random(1, rows * 12), random(2, rows * 6), random(3, rows * 6));
        let given = random(4, rows * 12);
        let all = qkv(&query, &key, &value);
        let (mixed, saved) = attention::forward(&all, shape, &pass);
        let gradient = Matrix::new(given.clone(), 12);
        let found = attention::backward(&all, (shape, &pass), &saved, (&mixed, &gradient));
        let run = |qkv: Qkv| attention::forward(&qkv, shape, &pass).0.into_vec();
        check("query", &query, found.query.data(), &given, &|query| run(qkv(query, &key, &value)));
        check("key", &key, found.key.data(), &given, &|key| run(qkv(&query, key, &value)));
        check("value", &value, found.value.data(), &given, &|value| run(qkv(&query, &key, value)));
    }
}

/// Five tokens, one without a target, two at a time.
#[test]
fn cross_entropy() {
    let (hidden, vocab) = (4, 6);
    let targets = [3, Tokens::IGNORED, 0, 5, 3];
    let (x, head) = (random(1, 5 * hidden), random(2, vocab * hidden));
    let wanted = cross_entropy::Wanted { input: true, head: true };
    let run = |x: &[f32], head: &[f32]| {
        let (x, head) = (Matrix::new(x.to_vec(), hidden), Matrix::new(head.to_vec(), hidden));
        in_chunks(&x, (head.view(), vocab), &targets, wanted, 2).expect("products")
    };
    #[expect(clippy::cast_possible_truncation, reason = "a comparison in f32")]
    let total = |loss: cross_entropy::Loss| vec![loss.total as f32];
    let found = run(&x, &head);
    let (input, table) = (found.input.expect("wanted"), found.head.expect("wanted"));
    assert!(input.data()[hidden..2 * hidden].iter().all(|value| *value == 0.0), "no target, no gradient");
    check("x", &x, input.data(), &[1.0], &|x| total(run(x, &head)));
    check("head", &head, table.data(), &[1.0], &|head| total(run(&x, head)));
}
