//! The names of tensors, llama.cpp's and Hugging Face's: one table, read in both directions.
//! Source: llama.cpp's `gguf-py`, `tensor_mapping.py`.

use crate::types::Fqn;

/// Tensors outside the layers, without `.weight`.
const GLOBAL: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// Modules of a layer. Those of experts hold all experts of the layer.
const LAYER: [(&str, &str); 20] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("ffn_gate_inp", "mlp.gate"),
    ("ffn_gate_exps", "mlp.experts.gate_proj"),
    ("ffn_up_exps", "mlp.experts.up_proj"),
    ("ffn_gate_up_exps", "mlp.experts.gate_up_proj"),
    ("ffn_down_exps", "mlp.experts.down_proj"),
    ("ffn_gate_shexp", "mlp.shared_expert.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_expert.up_proj"),
    ("ffn_down_shexp", "mlp.shared_expert.down_proj"),
    ("ffn_gate_inp_shexp", "mlp.shared_expert_gate"),
];

/// GPT-2's tensors outside the layers, which Hugging Face has below `transformer.`.
const GPT2_GLOBAL: [(&str, &str); 3] = [("token_embd", "wte"), ("position_embd", "wpe"), ("output_norm", "ln_f")];

/// Modules of GPT-2's layers.
const GPT2_LAYER: [(&str, &str); 6] = [
    ("attn_norm", "ln_1"),
    ("attn_qkv", "attn.c_attn"),
    ("attn_output", "attn.c_proj"),
    ("ffn_norm", "ln_2"),
    ("ffn_up", "mlp.c_fc"),
    ("ffn_down", "mlp.c_proj"),
];

/// What llama.cpp calls a tensor of Hugging Face's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LlamaCppName {
    /// The tensor's name in the file.
    pub name: String,
    /// The expert whose matrix it is, where the file's tensor holds those of all experts of the layer.
    pub expert: Option<u64>,
}

/// `model.layers.7.self_attn.q_proj.weight` is `blk.7.attn_q.weight`; nothing for a name that llama.cpp has none for.
#[must_use]
pub fn llama_cpp_name(fqn: &Fqn) -> Option<LlamaCppName> {
    let (module, kind) = fqn.as_str().rsplit_once('.').filter(|(_, kind)| matches!(*kind, "weight" | "bias"))?;
    let find = |table: &[(&'static str, &str)], module: &str| {
        table.iter().find(|(_, theirs)| *theirs == module).map(|(ours, _)| *ours)
    };
    if let Some(name) = find(&GLOBAL, module) {
        return Some(LlamaCppName { name: format!("{name}.{kind}"), expert: None });
    }
    if let Some(layered) = module.strip_prefix("model.layers.") {
        let (layer, module) = layered.split_once('.')?;
        let (module, expert) = without_expert(module);
        let name = find(&LAYER, &module)?;
        return Some(LlamaCppName { name: format!("blk.{layer}.{name}.{kind}"), expert });
    }
    let module = module.strip_prefix("transformer.")?;
    let name = match module.strip_prefix("h.") {
        None => format!("{}.{kind}", find(&GPT2_GLOBAL, module)?),
        Some(layered) => {
            let (layer, module) = layered.split_once('.')?;
            format!("blk.{layer}.{}.{kind}", find(&GPT2_LAYER, module)?)
        }
    };
    Some(LlamaCppName { name, expert: None })
}

/// `mlp.experts.3.gate_proj` is `mlp.experts.gate_proj` and 3; Mixtral's names become those of the others.
fn without_expert(module: &str) -> (String, Option<u64>) {
    let module =
        module.strip_prefix("block_sparse_moe.").map_or_else(|| module.to_owned(), |rest| format!("mlp.{rest}"));
    let Some((number, matrix)) = module.strip_prefix("mlp.experts.").and_then(|rest| rest.split_once('.')) else {
        return (module, None);
    };
    let matrix = match matrix {
        "w1" => "gate_proj",
        "w2" => "down_proj",
        "w3" => "up_proj",
        other => other,
    };
    match number.parse() {
        Ok(expert) => (format!("mlp.experts.{matrix}"), Some(expert)),
        Err(_) => (module, None),
    }
}

/// `blk.7.attn_q.weight` is `model.layers.7.self_attn.q_proj.weight`.
pub(super) fn hugging_face_name(name: &str) -> Option<Fqn> {
    let (module, kind) = name.rsplit_once('.').filter(|(_, kind)| matches!(*kind, "weight" | "bias"))?;
    let find = |table: &[(&str, &'static str)], module: &str| {
        table.iter().find(|(theirs, _)| *theirs == module).map(|(_, ours)| *ours)
    };
    let Some(layered) = module.strip_prefix("blk.") else {
        return find(&GLOBAL, module).map(|ours| format!("{ours}.{kind}").into());
    };
    let (layer, module) = layered.split_once('.')?;
    // As it would be written: no sign, no leading zero, so that no two names become one.
    let number: u32 = layer.parse().ok().filter(|number: &u32| number.to_string() == layer)?;
    find(&LAYER, module).map(|ours| format!("model.layers.{number}.{ours}.{kind}").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(fqn: &str) -> Option<(String, Option<u64>)> {
        llama_cpp_name(&fqn.into()).map(|found| (found.name, found.expert))
    }

    /// Every name of the tables is there and back again.
    #[test]
    fn names_in_both_directions() {
        let layered = LAYER.iter().map(|(theirs, ours)| (format!("blk.7.{theirs}"), format!("model.layers.7.{ours}")));
        let global = GLOBAL.iter().map(|(theirs, ours)| ((*theirs).to_owned(), (*ours).to_owned()));
        for (theirs, ours) in layered.chain(global) {
            let fqn = hugging_face_name(&format!("{theirs}.weight")).expect("a name");
            assert_eq!(fqn.as_str(), format!("{ours}.weight"));
            assert_eq!(name(fqn.as_str()), Some((format!("{theirs}.weight"), None)));
        }
    }

    /// By `tensor_mapping.py`.
    #[test]
    fn experts_and_gpt2() {
        let some = |name: &str, expert| Some((name.to_owned(), expert));
        assert_eq!(name("model.layers.2.mlp.experts.11.up_proj.weight"), some("blk.2.ffn_up_exps.weight", Some(11)));
        let mixtral = "model.layers.2.block_sparse_moe.";
        assert_eq!(name(&format!("{mixtral}experts.3.w2.weight")), some("blk.2.ffn_down_exps.weight", Some(3)));
        assert_eq!(name(&format!("{mixtral}gate.weight")), some("blk.2.ffn_gate_inp.weight", None));
        assert_eq!(name("transformer.h.0.attn.c_attn.bias"), some("blk.0.attn_qkv.bias", None));
        assert_eq!(name("transformer.wpe.weight"), some("position_embd.weight", None));
        assert_eq!(name("transformer.ln_f.bias"), some("output_norm.bias", None));
        for none in
            ["model.layers.0.self_attn.rotary.weight", "model.layers.0.mlp.gate_proj.scale", "bert.pooler.weight"]
        {
            assert_eq!(name(none), None, "{none}");
        }
    }
}
