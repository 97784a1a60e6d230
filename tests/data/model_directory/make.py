"""A small checkpoint of nanoGPT's form, one of a compiled model without biases, and one that calls os.system when it is unpickled by Python."""
import os
import sys

import torch

LAYERS, HEADS, HIDDEN, VOCABULARY, POSITIONS = 1, 2, 16, 32, 8


def state(prefix, bias):
    generator = torch.Generator().manual_seed(5)
    def rand(*shape):
        return torch.randn(*shape, generator=generator)
    tensors = {"transformer.wte.weight": rand(VOCABULARY, HIDDEN), "transformer.wpe.weight": rand(POSITIONS, HIDDEN)}
    norm, linear = [], []
    for layer in range(LAYERS):
        h = f"transformer.h.{layer}."
        norm += [h + "ln_1", h + "ln_2"]
        linear += [(h + "attn.c_attn", 3 * HIDDEN, HIDDEN), (h + "attn.c_proj", HIDDEN, HIDDEN),
                   (h + "mlp.c_fc", 4 * HIDDEN, HIDDEN), (h + "mlp.c_proj", HIDDEN, 4 * HIDDEN)]
    for name in norm + ["transformer.ln_f"]:
        tensors[name + ".weight"] = 1 + 0.1 * rand(HIDDEN)
        if bias:
            tensors[name + ".bias"] = 0.1 * rand(HIDDEN)
    for name, out, columns in linear:
        tensors[name + ".weight"] = 0.2 * rand(out, columns)
        if bias:
            tensors[name + ".bias"] = 0.1 * rand(out)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    return {prefix + name: tensor for name, tensor in tensors.items()}


def checkpoint(prefix, bias):
    args = dict(n_layer=LAYERS, n_head=HEADS, n_embd=HIDDEN, block_size=POSITIONS, bias=bias, vocab_size=VOCABULARY, dropout=0.0)
    return {"model": state(prefix, bias), "optimizer": {"state": {}, "param_groups": [{"lr": 6e-4, "betas": (0.9, 0.95)}]},
            "model_args": args, "iter_num": 2000, "best_val_loss": torch.tensor(1.5),
            "config": {"dataset": "tinystories", "learning_rate": 6e-4, "compile": True}}


class Evil:
    def __reduce__(self):
        return os.system, ("touch pickle-was-executed",)


if __name__ == "__main__":
    os.chdir(os.path.dirname(os.path.abspath(sys.argv[0])))
    torch.save(checkpoint("", True), "ckpt.pt")
    torch.save(checkpoint("_orig_mod.", False), "compiled.pt")
    torch.save(dict(checkpoint("", True), evil=Evil()), "evil.pt")
    # The logits that nanoGPT's own arithmetic gives, on a checkpoint as it is.
    import torch.nn.functional as F
    t = state("", True)
    ids = torch.arange(POSITIONS)[None] * 3 % VOCABULARY
    x = t["transformer.wte.weight"][ids] + t["transformer.wpe.weight"]
    for layer in range(LAYERS):
        h = f"transformer.h.{layer}."
        lin = lambda name, x: F.linear(x, t[h + name + ".weight"], t[h + name + ".bias"])
        norm = lambda name, x: F.layer_norm(x, (HIDDEN,), t[h + name + ".weight"], t[h + name + ".bias"], 1e-5)
        q, k, v = (y.view(1, POSITIONS, HEADS, -1).transpose(1, 2) for y in lin("attn.c_attn", norm("ln_1", x)).split(HIDDEN, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(1, POSITIONS, HIDDEN)
        x = x + lin("attn.c_proj", y)
        x = x + lin("mlp.c_proj", F.gelu(lin("mlp.c_fc", norm("ln_2", x))))
    x = F.layer_norm(x, (HIDDEN,), t["transformer.ln_f.weight"], t["transformer.ln_f.bias"], 1e-5)
    from safetensors.torch import save_file
    tensors = {name: tensor.clone() for name, tensor in t.items()}
    save_file(tensors | {"ids": ids, "logits": x @ t["lm_head.weight"].T}, "ckpt.safetensors")
