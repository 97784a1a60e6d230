"""Tiny random models, their logits, losses and gradients, as transformers and PEFT compute them in f32.

Run in this directory: python make.py   (torch 2.15, transformers 5.23, peft 0.21)
"""

import json

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB, LENGTH, BATCH = 48, 12, 2
SIZES = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=32, rms_norm_eps=1e-5, attention_dropout=0.0,
    initializer_range=0.3,
)
MODELS = {
    "mistral": ("mistral", dict(SIZES, sliding_window=5, tie_word_embeddings=False)),
    "qwen2": ("qwen2", dict(SIZES, tie_word_embeddings=True, use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "qwen3": ("qwen3", dict(SIZES, head_dim=6, tie_word_embeddings=True)),
    "gpt2": ("gpt2", dict(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=32, n_inner=24, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, initializer_range=0.3,
    )),
    "gpt2-gelu": ("gpt2", dict(
        vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        initializer_range=0.3, activation_function="gelu",
    )),
}
# What the gradients are kept of; None is every parameter.
KEPT = {
    "mistral": ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"],
    "qwen2": None,
    "qwen3": ["model.layers.0.self_attn.q_norm.weight", "model.layers.1.self_attn.k_norm.weight", "model.layers.0.mlp.gate_proj.weight"],
    "gpt2": None,
    "gpt2-gelu": ["transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.bias", "transformer.h.0.ln_1.weight"],
}
TARGETS = {"qwen3": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


def randomize(model, generator):
    """Weights that bf16 holds exactly, none of them at its usual 0 or 1."""
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.dim() == 1 else 0.3)
        if "norm" in name or ".ln_" in name:
            values += 1.0 if name.endswith("weight") else 0.0
        parameter.data.copy_(values.to(torch.bfloat16).float())


def tensors_of(parameters, prefix):
    return {f"{prefix}{name}": parameter.grad.clone() for name, parameter in parameters if parameter.grad is not None}


def adapted(name, model, ids, generator, dora):
    settings = dict(r=3, lora_alpha=5, lora_dropout=0.0, target_modules=TARGETS[name], use_dora=dora, task_type="CAUSAL_LM")
    model = get_peft_model(model, LoraConfig(fan_in_fan_out=name == "gpt2", **settings))
    kept = {}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data.copy_(parameter.data + noise if "magnitude" in path else noise)
            kept[f"tensor.{path}"] = parameter.data.clone()
    output = model(ids, labels=ids)
    output.loss.backward()
    kept.update(tensors_of(model.named_parameters(), "gradient."))
    kept.update(logits=output.logits.detach(), loss=output.loss.detach().reshape(1))
    return {path.replace("base_model.model.", "", 1).replace(".default", ""): tensor.contiguous() for path, tensor in kept.items()}


def quantized():
    """tiny-llama with the NF4 weights of ../golden dequantized to f32: bitsandbytes itself multiplies in bf16 on a CPU."""
    model = AutoModelForCausalLM.from_pretrained("../tiny-llama", dtype=torch.float32, attn_implementation="eager").eval()
    file = load_file("../golden/tiny-llama-bnb-nf4/model.safetensors")
    for name, parameter in model.named_parameters():
        if f"{name}.absmax" in file:
            packed, absmax = file[name].flatten(), file[f"{name}.absmax"].float()
            codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
            values = file[f"{name}.quant_map"][codes].reshape(-1, 64) * absmax.T.reshape(-1, 1)
            parameter.data.copy_(values.reshape(parameter.shape))
    ids = load_file("../golden/tiny-llama-reference.safetensors")["input_ids"]
    save_file({"last_logits": model(ids).logits[:, -4:].detach().contiguous()}, "tiny-llama-nf4.safetensors")


def main():
    quantized()
    for name, (kind, sizes) in MODELS.items():
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        config = AutoConfig.for_model(kind, **sizes)
        config._attn_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config).float().eval()
        randomize(model, generator)
        ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
        output = model(ids, labels=ids)
        output.loss.backward()
        gradients = tensors_of(model.named_parameters(), "gradient.")
        if KEPT[name]:
            gradients = {f"gradient.{path}": gradients[f"gradient.{path}"] for path in KEPT[name]}
        weights = {path: parameter.data.to(torch.bfloat16) for path, parameter in model.named_parameters()}
        results = dict(ids=ids, logits=output.logits.detach(), loss=output.loss.detach().reshape(1))
        save_file({path: tensor.contiguous() for path, tensor in {**weights, **gradients, **results}.items()}, f"{name}.safetensors")
        saved = json.loads(config.to_json_string(use_diff=False))
        saved["architectures"] = [type(model).__name__]
        with open(f"{name}.json", "w") as file:
            json.dump(saved, file, indent=1, sort_keys=True)
            file.write("\n")
        model.zero_grad()
        if name in TARGETS:
            save_file(adapted(name, model, ids, generator, True), f"{name}-dora.safetensors")


main()
