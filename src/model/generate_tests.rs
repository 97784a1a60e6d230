use super::*;
use crate::format::{FileEntry, merge, parse_index_json};

const FAMILIES: [Architecture; 5] =
    [Architecture::Llama, Architecture::Mistral, Architecture::Qwen2, Architecture::Qwen3, Architecture::Bert];

fn tensor(dtype: DType, role: Role, index: u64) -> GeneratedTensor {
    GeneratedTensor { fqn: "layer.weight".into(), dtype, shape: [1 << 20].into(), index, role }
}

/// The files of every design are those of a model: headers parse, agree with the index, bind, and have the parameters.
#[test]
fn designs_have_the_parameters_and_bind() {
    for architecture in FAMILIES {
        for wanted in [250_000, 1_000_000, 10_000_000, 135_000_000, 1_000_000_000, 7_000_000_000, 70_000_000_000] {
            let model = design(architecture, wanted, DType::BF16).expect("a size that can be had");
            let entries = model.files.iter().map(|file| {
                let len_bytes = as_u64(file.header.len()) + file.data_bytes;
                assert!(len_bytes <= MAX_FILE_BYTES || file.tensors.len() == 1, "{} has {len_bytes} bytes", file.name);
                let header = crate::format::safetensors::parse_header(&file.name, &file.header[8..], len_bytes);
                (FileEntry { name: file.name.clone(), len_bytes }, header.expect("a header of our own"))
            });
            let json = model.index_json.as_ref();
            let index = json.map(|text| parse_index_json("index.json", text.as_bytes()).expect("an index of our own"));
            assert_eq!(index.is_some(), model.files.len() > 1);
            let merged = merge(entries.collect(), index.as_ref()).expect("files that agree");
            let skeleton = Skeleton::from_config(model.config_json.as_bytes()).expect("a config of our own");
            assert_eq!(skeleton.architecture, architecture);
            skeleton.bind(&merged).expect("all tensors");
            let found: u64 = merged.tensors.values().map(|tensor| tensor.shape.elements().expect("countable")).sum();
            assert!(found.abs_diff(wanted) <= wanted / 25, "{architecture:?}: wanted {wanted}, found {found}");
            assert_eq!((found, found * 2), (model.parameters, merged.total_bytes()));
        }
    }
}

#[test]
fn what_cannot_be_had_is_refused() {
    let message = |architecture, parameters, dtype| {
        design(architecture, parameters, dtype).expect_err("it cannot be had").to_string()
    };
    assert!(message(Architecture::Generic, 1_000_000, DType::BF16).contains("architecture Generic"));
    assert!(message(Architecture::Llama, 1_000_000, DType::I8).contains("dtype I8: expected F16, BF16 or F32"));
    assert!(message(Architecture::Llama, 0, DType::F32).contains("model of 0 parameters: the nearest has"));
    assert!(message(Architecture::Bert, u64::MAX, DType::F32).contains("the nearest has 50000000000000"));
}

/// GE-1: any cut gives the bytes of the whole.
#[test]
fn ge_1_values_do_not_depend_on_the_cut() {
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        let size = as_usize(dtype.size_bytes());
        let tensor = tensor(dtype, Role::Linear, 3);
        let mut whole = vec![0; 1001 * size];
        tensor.fill(7, 0, &mut whole);
        for (first, count) in [(0, 1), (1, 1), (1, 2), (2, 1), (3, 500), (500, 501), (1000, 1), (5, 0)] {
            let mut part = vec![0xAA; count * size];
            tensor.fill(7, as_u64(first * size), &mut part);
            assert_eq!(part, &whole[first * size..(first + count) * size], "{dtype}: {count} from {first}");
        }
        let mut other = whole.clone();
        tensor.fill(8, 0, &mut other);
        assert_ne!(other, whole, "another seed");
        GeneratedTensor { index: 4, ..tensor }.fill(7, 0, &mut other);
        assert_ne!(other, whole, "another tensor");
    }
}

/// Mean 0 and standard deviation 0.02 within four standard errors of 2^20 samples; neighbours are not correlated; 68.3 %
/// within one deviation, as of a normal (a sum of four uniform values has 67.8 to 68.5 %).
#[test]
fn values_are_about_normal() {
    let mut bytes = vec![0; 4 << 20];
    tensor(DType::F32, Role::Linear, 0).fill(0, 0, &mut bytes);
    let (chunks, _) = bytes.as_chunks::<4>();
    let values: Vec<f64> = chunks.iter().map(|&chunk| f64::from(f32::from_le_bytes(chunk))).collect();
    let count = f64::from(1 << 20);
    let mean = values.iter().sum::<f64>() / count;
    let deviation = (values.iter().map(|value| value * value).sum::<f64>() / count - mean * mean).sqrt();
    assert!(mean.abs() < 4.0 * 0.02 / 1024.0, "{mean}");
    assert!((deviation - 0.02).abs() < 4.0 * 0.02 / 1448.0, "{deviation}");
    for step in [1, 2, 64, 4096] {
        let together: f64 = values.iter().zip(values.iter().skip(step)).map(|(a, b)| a * b).sum();
        let correlation = together / count / (deviation * deviation);
        assert!(correlation.abs() < 4.0 / 1024.0, "{correlation} between elements {step} apart");
    }
    let within = values.iter().filter(|value| value.abs() < 0.02).map(|_| 1.0).sum::<f64>() / count;
    assert!((0.675..0.69).contains(&within), "{within}");
}

/// 1.0 is 0x3f80 in bf16 and 0x3c00 in f16.
#[test]
fn norms_are_one_and_their_biases_zero() {
    let fill = |dtype, fqn: &str| {
        let mut bytes = vec![0xAA; 4];
        GeneratedTensor { fqn: fqn.into(), ..tensor(dtype, Role::Norm, 0) }.fill(1, 6, &mut bytes);
        bytes
    };
    assert_eq!(fill(DType::BF16, "norm.weight"), [0x80, 0x3f, 0x80, 0x3f]);
    assert_eq!(fill(DType::F16, "norm.weight"), [0x00, 0x3c, 0x00, 0x3c]);
    assert_eq!(fill(DType::F16, "norm.bias"), [0; 4]);
}
