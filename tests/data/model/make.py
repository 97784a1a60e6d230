"""Makes the vectors of this directory: python make.py (torch 2.15, transformers 5.23, gguf 0.19)."""

import json
import pathlib
import shutil
import tempfile

import gguf
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

HERE = pathlib.Path(__file__).parent
SMALL = dict(
    hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, vocab_size=96,
    max_position_embeddings=128, num_experts_per_tok=2,
)
QWEN = dict(intermediate_size=80, moe_intermediate_size=32, num_experts=3)
MODELS = {
    "mixtral": MixtralConfig(**SMALL, intermediate_size=32, num_local_experts=3),
    "qwen2_moe": Qwen2MoeConfig(**SMALL, **QWEN, shared_expert_intermediate_size=48),
    "qwen2_moe-no-bias": Qwen2MoeConfig(
        **{**SMALL, "num_hidden_layers": 5}, **QWEN, shared_expert_intermediate_size=48, qkv_bias=False,
        decoder_sparse_step=2, mlp_only_layers=[3], tie_word_embeddings=True,
    ),
    "qwen3_moe": Qwen3MoeConfig(**SMALL, **QWEN, head_dim=24),
    "qwen3_moe-dense": Qwen3MoeConfig(**{**SMALL, "num_hidden_layers": 4}, **QWEN, head_dim=32, mlp_only_layers=[0, 2]),
}
# Sizes as in the models' own config.json on the hub.
PUBLISHED = {
    "Mixtral-8x7B-v0.1": MixtralConfig(),
    "Mixtral-8x22B-v0.1": MixtralConfig(
        hidden_size=6144, intermediate_size=16384, num_attention_heads=48, num_hidden_layers=56, vocab_size=32000,
    ),
    "Qwen1.5-MoE-A2.7B": Qwen2MoeConfig(),
    "Qwen3-30B-A3B": Qwen3MoeConfig(num_hidden_layers=48, head_dim=128),
    "Qwen3-235B-A22B": Qwen3MoeConfig(
        hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536, num_attention_heads=64,
        num_hidden_layers=94, head_dim=128,
    ),
}
KEPT = ["mixtral", "qwen2_moe"]


def shapes(path):
    with safe_open(path, "pt") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}


# llama.cpp's names, by gguf's own table of tensors and the names of the model that it fuses.
def write_gguf(config, fused, path):
    writer = gguf.GGUFWriter(path, "qwen2moe")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2MOE, config.num_hidden_layers)

    def add(name, tensor):
        kind = "bias" if name.endswith(".bias") else "weight"
        stem = names.get_name(name.removesuffix(f".{kind}"))
        values = tensor.float().numpy()
        if values.ndim == 1 or "gate_inp" in stem:
            writer.add_tensor(f"{stem}.{kind}", values.squeeze())
        else:
            blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(f"{stem}.{kind}", blocks, raw_dtype=gguf.GGMLQuantizationType.BF16)

    for name, tensor in load_file(fused).items():
        if name.endswith("gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            add(name.replace("gate_up_proj", "gate_proj.weight"), gate.contiguous())
            add(name.replace("gate_up_proj", "up_proj.weight"), up.contiguous())
        else:
            add(name if name.endswith((".weight", ".bias")) else f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    torch.manual_seed(7)
    out = {"models": {}, "published": {}}
    for name, config in MODELS.items():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with tempfile.TemporaryDirectory() as work:
            work = pathlib.Path(work)
            model.save_pretrained(work / "apart")
            model.save_pretrained(work / "fused", save_original_format=False)
            AutoModelForCausalLM.from_pretrained(work / "fused", dtype=torch.bfloat16)
            out["models"][name] = {
                "config": json.loads((work / "apart/config.json").read_text()),
                "apart": shapes(work / "apart/model.safetensors"),
                "fused": shapes(work / "fused/model.safetensors"),
                "parameters": model.num_parameters(),
            }
            for form in ["apart", "fused"] if name in KEPT else []:
                directory = HERE / f"{name}-{form}"
                directory.mkdir(exist_ok=True)
                for file in ["config.json", "model.safetensors"]:
                    shutil.copy(work / form / file, directory / file)
            if name == "qwen2_moe":
                write_gguf(config, work / "fused/model.safetensors", HERE / "qwen2_moe.gguf")
    for name, config in PUBLISHED.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        config = {key: value for key, value in config.to_dict().items() if value is not None}
        config["architectures"] = [type(model).__name__]
        out["published"][name] = {"config": config, "parameters": model.num_parameters()}
        print(name, model.num_parameters())
    (HERE / "experts.json").write_text(json.dumps(out, indent=1, sort_keys=True) + "\n")


main()
