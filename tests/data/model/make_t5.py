"""Makes t5.json and t5/: python make_t5.py (torch 2.15, transformers 5.23)."""

import json
import pathlib

import torch
from safetensors import safe_open
from transformers import T5Config, T5ForConditionalGeneration, T5Model

HERE = pathlib.Path(__file__).parent
SMALL = dict(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_heads=3, relative_attention_num_buckets=8)
MODELS = {
    "relu-tied": (T5ForConditionalGeneration, dict(num_layers=2)),
    "gated-untied": (
        T5ForConditionalGeneration,
        dict(num_layers=2, num_decoder_layers=1, feed_forward_proj="gated-gelu"),
    ),
    "base": (T5Model, dict(num_layers=1, num_decoder_layers=2)),
}
# Sizes as in the models' own config.json on the hub.
PUBLISHED = {
    "t5-small": dict(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8),
    "t5-base": dict(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12),
    "t5-large": dict(d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16),
}


def made(name):
    kind, sizes = MODELS[name]
    model = kind(T5Config(**{**SMALL, **sizes}))
    if name == "gated-untied":
        # As in T5 1.1; the configuration of transformers 5 ties by itself, whatever it is given.
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.randn(SMALL["vocab_size"], SMALL["d_model"]))
    return model


def saved(model, directory):
    model.save_pretrained(directory)
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}


torch.manual_seed(0)
out = {"models": {}, "published": {}}
for name in MODELS:
    model = made(name)
    tensors = saved(model, HERE / "t5")
    config = json.loads((HERE / "t5" / "config.json").read_text())
    out["models"][name] = dict(config=config, tensors=tensors, parameters=sum(p.numel() for p in model.parameters()))
for name, sizes in PUBLISHED.items():
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(vocab_size=32128, **sizes))
    out["published"][name] = dict(sizes=sizes, parameters=sum(p.numel() for p in model.parameters()))
# The directory keeps the model with everything: a head of its own, and a gate.
saved(made("gated-untied"), HERE / "t5")
(HERE / "t5" / "generation_config.json").unlink()
(HERE / "t5" / "model.safetensors").chmod(0o644)
(HERE / "t5.json").write_text(json.dumps(out) + "\n")
