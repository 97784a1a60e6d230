//! The GGUF parser on made and mutated headers, and on what llama.cpp wrote.

use proptest::prelude::*;

use super::*;
use crate::format::{Encoding, GgmlTensor, RowOrder};
use crate::types::DType;

/// Writes a GGUF file by the format's description.
#[derive(Clone, Debug, Default)]
struct Writer {
    values: Vec<u8>,
    value_count: u64,
    tensors: Vec<u8>,
    tensor_count: u64,
    data_bytes: u64,
}

impl Writer {
    fn text(into: &mut Vec<u8>, text: &str) {
        into.extend(as_u64(text.len()).to_le_bytes());
        into.extend(text.as_bytes());
    }

    fn value(mut self, key: &str, value_type: u32, bytes: &[u8]) -> Self {
        Self::text(&mut self.values, key);
        self.values.extend(value_type.to_le_bytes());
        self.values.extend(bytes);
        self.value_count += 1;
        self
    }

    fn number(self, key: &str, number: u32) -> Self {
        self.value(key, 4, &number.to_le_bytes())
    }

    fn string(self, key: &str, text: &str) -> Self {
        let mut bytes = Vec::new();
        Self::text(&mut bytes, text);
        self.value(key, 8, &bytes)
    }

    fn tensor_at(mut self, name: &str, dims: &[u64], ggml_type: u32, offset: u64) -> Self {
        Self::text(&mut self.tensors, name);
        self.tensors.extend(u32::try_from(dims.len()).expect("few").to_le_bytes());
        dims.iter().for_each(|size| self.tensors.extend(size.to_le_bytes()));
        self.tensors.extend(ggml_type.to_le_bytes());
        self.tensors.extend(offset.to_le_bytes());
        self.tensor_count += 1;
        self
    }

    /// A tensor of `bytes` bytes, at the next multiple of 32.
    fn tensor(self, name: &str, dims: &[u64], ggml_type: u32, bytes: u64) -> Self {
        let offset = self.data_bytes.next_multiple_of(32);
        let mut next = self.tensor_at(name, dims, ggml_type, offset);
        next.data_bytes = offset + bytes;
        next
    }

    /// The header, padded, and the file's length.
    fn finish(&self) -> (Vec<u8>, u64) {
        let mut head = b"GGUF\x03\0\0\0".to_vec();
        head.extend(self.tensor_count.to_le_bytes());
        head.extend(self.value_count.to_le_bytes());
        head.extend(&self.values);
        head.extend(&self.tensors);
        head.resize(head.len().next_multiple_of(32), 0);
        let file_bytes = as_u64(head.len()) + self.data_bytes.next_multiple_of(32);
        (head, file_bytes)
    }

    fn parse(&self) -> Result<Gguf, String> {
        let (head, file_bytes) = self.finish();
        match parse("m.gguf", &head, file_bytes) {
            Ok(GgufHead::Whole(gguf)) => Ok(gguf),
            Ok(GgufHead::Longer { read_bytes }) => Err(format!("longer: {read_bytes}")),
            Err(error) => Err(error.to_string()),
        }
    }

    fn index(&self) -> Result<(ModelIndex, String), String> {
        self.parse()?.into_index("m.gguf").map_err(|error| error.to_string())
    }
}

/// One layer of 64 with 4 heads of 16, one of them for keys and values.
fn small(family: &str) -> Writer {
    let key = |name: &str| format!("{family}.{name}");
    Writer::default()
        .string("general.architecture", family)
        .number(&key("block_count"), 1)
        .number(&key("context_length"), 512)
        .number(&key("embedding_length"), 64)
        .number(&key("feed_forward_length"), 96)
        .number(&key("attention.head_count"), 4)
        .number(&key("attention.head_count_kv"), 1)
        .value(&key("attention.layer_norm_rms_epsilon"), 6, &1e-5_f32.to_le_bytes())
        .value(&key("rope.freq_base"), 6, &1e6_f32.to_le_bytes())
        // Two strings, which are skipped.
        .value("tokenizer.ggml.tokens", 9, b"\x08\0\0\0\x02\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0a\x02\0\0\0\0\0\0\0bc")
        .number("tokenizer.ggml.eos_token_id", 2)
        .tensor("token_embd.weight", &[64, 100], 8, 100 * 2 * 34)
        .tensor("blk.0.attn_q.weight", &[64, 64], 3, 64 * 2 * 20)
        .tensor("blk.0.attn_k.weight", &[64, 16], 0, 64 * 16 * 4)
        .tensor("blk.0.attn_norm.weight", &[64], 0, 64 * 4)
        .tensor("blk.0.ffn_down.weight", &[96, 64], 1, 96 * 64 * 2)
}

#[test]
fn llama_names_shapes_and_row_orders() {
    let (index, config) = small("llama").index().expect("a small file");
    let head_bytes = as_u64(small("llama").finish().0.len());
    let check = |fqn: &str, shape: &[u64], dtype: DType, start: u64, encoding: Encoding| {
        let entry = &index.tensors[fqn];
        let found = (entry.shape.0.as_slice(), entry.dtype, entry.range.start(), &entry.encoding);
        assert_eq!(found, (shape, dtype, head_bytes + start, &encoding), "{fqn}");
    };
    let ggml = |ggml_type, row_order| Encoding::Ggml(GgmlTensor { ggml_type, row_order });
    let heads = RowOrder::InterleavedHalves { head_rows: 16 };
    check("model.embed_tokens.weight", &[100, 64], DType::F32, 0, ggml(GgmlType::Q8_0, RowOrder::Same));
    check("model.layers.0.self_attn.q_proj.weight", &[64, 64], DType::F32, 6816, ggml(GgmlType::Q4_1, heads));
    // F32, but not plain, because its rows are not in Hugging Face's order.
    check("model.layers.0.self_attn.k_proj.weight", &[16, 64], DType::F32, 9376, ggml(GgmlType::F32, heads));
    check("model.layers.0.input_layernorm.weight", &[64], DType::F32, 13472, Encoding::Plain);
    check("model.layers.0.mlp.down_proj.weight", &[64, 96], DType::F16, 13728, Encoding::Plain);
    let config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
    let expected = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "dtype": "float32", "eos_token_id": 2,
        "head_dim": 16, "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 96,
        "max_position_embeddings": 512, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 4,
        "num_hidden_layers": 1, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "tie_word_embeddings": true, "vocab_size": 100
    });
    assert_eq!(config, expected);
}

#[test]
fn qwen_keeps_its_rows_and_has_biases_and_norms() {
    let file = small("qwen2").tensor("blk.0.attn_q.bias", &[64], 0, 256).tensor("output.weight", &[64, 100], 30, 12800);
    let (index, config) = file.index().expect("a small file");
    let encoding = |fqn: &str| index.tensors[fqn].encoding.clone();
    let q4_1 = GgmlTensor { ggml_type: GgmlType::Q4_1, row_order: RowOrder::Same };
    assert_eq!(encoding("model.layers.0.self_attn.q_proj.weight"), Encoding::Ggml(q4_1));
    assert_eq!(encoding("model.layers.0.self_attn.k_proj.weight"), Encoding::Plain);
    assert_eq!(index.tensors["model.layers.0.self_attn.q_proj.bias"].shape.0, [64]);
    assert_eq!(index.tensors["lm_head.weight"].dtype, DType::BF16);
    assert!(config.contains("\"tie_word_embeddings\": false") && !config.contains("attention_bias"), "{config}");

    let file =
        small("qwen3").number("qwen3.attention.key_length", 32).tensor("blk.0.attn_q_norm.weight", &[32], 0, 128);
    let (index, config) = file.index().expect("a small file");
    assert_eq!(index.tensors["model.layers.0.self_attn.q_norm.weight"].shape.0, [32]);
    assert!(config.contains("\"head_dim\": 32"), "{config}");
}

/// `small` with 3 experts of 32, of which 2 compute a token, all in one tensor of each kind.
fn mixture(family: &str) -> Writer {
    let key = |name: &str| format!("{family}.{name}");
    small(family)
        .number(&key("expert_count"), 3)
        .number(&key("expert_used_count"), 2)
        .tensor("blk.0.ffn_gate_inp.weight", &[64, 3], 0, 64 * 3 * 4)
        .tensor("blk.0.ffn_gate_exps.weight", &[64, 32, 3], 8, 3 * 32 * 2 * 34)
        .tensor("blk.0.ffn_up_exps.weight", &[64, 32, 3], 8, 3 * 32 * 2 * 34)
        .tensor("blk.0.ffn_down_exps.weight", &[32, 64, 3], 8, 3 * 64 * 34)
}

/// Names and keys as gguf-py's `constants` has them.
#[test]
fn mixtures_of_experts_have_their_names_and_figures() {
    let (index, config) = mixture("llama").index().expect("a small Mixtral");
    let config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
    assert_eq!((&config["architectures"][0], &config["model_type"]), (&"MixtralForCausalLM".into(), &"mixtral".into()));
    assert_eq!((&config["num_local_experts"], &config["num_experts_per_tok"]), (&3.into(), &2.into()));
    assert_eq!(index.tensors["model.layers.0.mlp.gate.weight"].shape, [3, 64].into());
    assert_eq!(index.tensors["model.layers.0.mlp.experts.gate_proj.weight"].shape, [3, 32, 64].into());
    assert_eq!(index.tensors["model.layers.0.mlp.experts.down_proj.weight"].shape, [3, 64, 32].into());
    let rows = &index.tensors["model.layers.0.self_attn.q_proj.weight"].encoding;
    assert!(matches!(rows, Encoding::Ggml(GgmlTensor { row_order: RowOrder::InterleavedHalves { .. }, .. })));

    let file = mixture("qwen2moe")
        .number("qwen2moe.expert_feed_forward_length", 32)
        .number("qwen2moe.expert_shared_feed_forward_length", 48)
        .tensor("blk.0.attn_q.bias", &[64], 0, 256)
        .tensor("blk.0.ffn_gate_inp_shexp.weight", &[64], 0, 256)
        .tensor("blk.0.ffn_up_shexp.weight", &[64, 48], 1, 64 * 48 * 2);
    let (index, config) = file.index().expect("a small Qwen2-MoE");
    let config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
    assert_eq!((&config["model_type"], &config["qkv_bias"]), (&"qwen2_moe".into(), &true.into()));
    assert_eq!((&config["moe_intermediate_size"], &config["intermediate_size"]), (&32.into(), &96.into()));
    assert_eq!(config["shared_expert_intermediate_size"], 48);
    assert_eq!(index.tensors["model.layers.0.mlp.shared_expert_gate.weight"].shape, [1, 64].into());
    assert_eq!(index.tensors["model.layers.0.mlp.shared_expert.up_proj.weight"].shape, [48, 64].into());
    let rows = &index.tensors["model.layers.0.self_attn.q_proj.weight"].encoding;
    assert!(matches!(rows, Encoding::Ggml(GgmlTensor { row_order: RowOrder::Same, .. })));

    let error = mixture("qwen3moe").index().expect_err("no size");
    assert!(error.contains("no key qwen3moe.expert_feed_forward_length"), "{error}");
}

#[test]
fn damage_is_refused_by_name() {
    let check = |file: Writer, expected: &str| {
        let message = file.index().expect_err(expected);
        assert!(message.contains(expected), "expected {expected:?}, found {message:?}");
    };
    let bare = || Writer::default().string("general.architecture", "llama");
    check(
        small("gpt2"),
        "general.architecture: expected one of llama, qwen2, qwen3, qwen2moe, qwen3moe, found \"gpt2\"",
    );
    check(small("llama").number("llama.block_count", 2), "key \"llama.block_count\" stands twice");
    check(bare(), "there is no key llama.embedding_length");
    check(bare().number("llama.embedding_length", 0), "expected one whole number from 1 to 2^31, found Unsigned(0)");
    check(bare().value("k", 13, &[]), "key k: unknown value type 13");
    check(bare().value("k", 9, b"\x0d\0\0\0\x01\0\0\0\0\0\0\0"), "key k: unknown element type 13");
    let nest = b"\x09\0\0\0\x01\0\0\0\0\0\0\0".repeat(9);
    check(bare().value("k", 9, &nest), "more than 4 arrays");
    check(bare().number("general.alignment", 24), "expected a power of 2");
    check(small("llama").tensor("blk.0.attn_rot.weight", &[4], 0, 16), "blk.0.attn_rot.weight is none that llama has");
    check(small("llama").tensor("blk.01.attn_q.weight", &[4], 0, 16), "blk.01.attn_q.weight is none that llama has");
    check(small("llama").tensor("blk.1.attn_q.weight", &[64, 24], 0, 6144), "is not of heads of 16 rows");
    check(small("llama").tensor("rope_freqs.weight", &[8], 0, 32), "the model's config.json is needed");
    check(small("llama").string("llama.rope.scaling.type", "longrope"), "found longrope");
    // 4 was Q4_2.
    check(bare().tensor("t", &[32], 4, 32), "tensor t: unknown dtype \"ggml type 4\"");
    check(bare().tensor("t", &[16], 8, 34), "are not rows of whole Q8_0 blocks of 32 elements");
    check(bare().tensor("t", &[0], 0, 0), "dims [0] are not rows");
    check(bare().tensor("t", &[1 << 32, 1 << 32], 0, 0), "are not rows");
    check(bare().tensor("t", &[1; 5], 0, 4), "tensor t: 5 dims, expected 1 to 4");
    check(bare().tensor("t", &[8], 0, 32).tensor("t", &[8], 0, 32), "key \"t\" stands twice in the tensors");
    check(bare().tensor("t", &[16], 0, 64).tensor_at("u", &[8], 0, 32), "tensor u at 32..64 overlaps tensor t");
    check(bare().tensor("t", &[8], 0, 64).tensor_at("u", &[8], 0, 32).tensor_at("v", &[8], 0, 128), "lie outside");
    check(bare().tensor("t", &[8], 0, 256).tensor_at("u", &[8], 0, 64), "leaves a hole: expected it at 32");
    check(bare().tensor("t", &[8], 0, 33), "bytes after its last tensor");
    check(bare().tensor_at("t", &[8], 0, u64::MAX - 3), "lie outside the data of 0 bytes");
}

/// GG-1: numbers that promise more than the file has are refused at once, whatever they are.
#[test]
fn gg_1_absurd_numbers_are_refused() {
    let check = |at: usize, number: u64, expected: &str| {
        let (mut head, file_bytes) = small("llama").finish();
        head[at..at + 8].copy_from_slice(&number.to_le_bytes());
        let message = parse("m.gguf", &head, file_bytes).expect_err(expected).to_string();
        assert!(message.contains(expected), "expected {expected:?}, found {message:?}");
    };
    check(0, 0x3_0000_0000, "begins with GGUF");
    check(0, u64::from_le_bytes(*b"GGUF\0\0\0\x03"), "GGUF version 50331648: expected 2 or 3");
    for number in [u64::MAX, 1 << 40, (1 << 20) + 1] {
        check(8, number, "tensors: expected at most 1048576");
        check(16, number, "keys: expected at most 1048576");
        check(24, number, "expected at most 65535");
    }
    // Values follow the 20 bytes of the first key and 4 of its type.
    for number in [u64::MAX, 1 << 62, 1 << 40] {
        check(56, number, "m.gguf is truncated");
    }
    for element_type in [0_u8, 5, 8, 9, 12] {
        let mut array = vec![element_type, 0, 0, 0];
        array.extend(u64::MAX.to_le_bytes());
        let (head, file_bytes) = Writer::default().value("k", 9, &array).finish();
        parse("m.gguf", &head, file_bytes).expect_err("an endless array");
    }
}

/// A caller who gives what is asked for gets the header after a few reads, and a short file is named as such.
#[test]
fn heads_grow_until_they_are_whole() {
    let (head, file_bytes) = small("llama").finish();
    for length in 0..head.len() - 31 {
        match parse("m.gguf", &head[..length], file_bytes) {
            Ok(GgufHead::Longer { read_bytes }) => assert_eq!(read_bytes, file_bytes),
            Ok(GgufHead::Whole(gguf)) => assert!(gguf.tensors.len() == 5, "whole at {length}"),
            Err(error) => panic!("{length}: {error}"),
        }
        let truncated = parse("m.gguf", &head[..length], as_u64(length)).expect_err("a truncated file").to_string();
        assert!(truncated.contains("m.gguf"), "{truncated}");
    }
    // An array of 5 MiB in a file of 1 GiB.
    let file = |array_bytes: u64| {
        let mut array = vec![0, 0, 0, 0];
        array.extend(array_bytes.to_le_bytes());
        Writer::default().value("k", 9, &array).finish().0
    };
    let longer = |head: &[u8]| parse("m.gguf", head, 1 << 30);
    let head = file(100);
    assert_eq!(longer(&head[..20]).expect("short"), GgufHead::Longer { read_bytes: FIRST_HEAD_BYTES });
    let head = file(5 << 20);
    match longer(&head).expect("short") {
        GgufHead::Longer { read_bytes } => assert!(read_bytes > 5 << 20 && read_bytes < 6 << 20, "{read_bytes}"),
        GgufHead::Whole(_) => panic!("the array is not there"),
    }
    let message = longer(&file(257 << 20)).expect_err("too long").to_string();
    assert!(message.contains("expected at most 268435456"), "{message}");
}

proptest! {
    /// FO-1: no change of a good header, and no noise, makes the parser panic or accept bytes outside the file.
    #[test]
    fn fo_1_any_bytes_are_refused_or_sound(changes in prop::collection::vec((0_usize..1200, any::<u8>()), 0..6), noise: Vec<u8>) {
        let (mut head, file_bytes) = small("llama").finish();
        for (at, byte) in changes {
            if let Some(place) = head.get_mut(at) {
                *place = byte;
            }
        }
        for (bytes, file_bytes) in [(&head, file_bytes), (&noise, as_u64(noise.len()))] {
            if let Ok(GgufHead::Whole(gguf)) = parse("m.gguf", bytes, file_bytes) {
                for tensor in &gguf.tensors {
                    prop_assert!(tensor.range.end() <= file_bytes);
                }
                if let Ok((index, _)) = gguf.into_index("m.gguf") {
                    prop_assert!(index.total_bytes() <= file_bytes);
                }
            }
        }
    }
}
