"""GGUF files that `model convert --to gguf` writes, in the hands of gguf-py and transformers. formats.py runs it.

Names come from gguf-py's tensor_mapping, the order of rows from the two lines of llama.cpp's converter that are repeated here,
blocks from gguf.quants, keys from gguf.constants. Expected values are transformers' weights, logits and token ids.
"""

import json
import math
import subprocess

import gguf
import numpy
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

IDS = torch.arange(1, 65).reshape(2, 32) * 7 % 96
U32, F32, TEXT, BOOL = (gguf.GGUFValueType[name] for name in ("UINT32", "FLOAT32", "STRING", "BOOL"))
# llama_ftype of each --type.
TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_k": 14, "q5_k": 16, "q6_k": 18, "q4_k_m": 15, "q5_k_m": 17}
# Bits of a code by type of blocks, of those that gguf.quants does not make.
BITS = {"Q4_K": 4, "Q5_K": 5, "Q6_K": 6}
SENTENCES = ["The quick brown fox jumps over the lazy dog.", "  two spaces\n\nand 1234 lines\ttab", "naïve café – 你好 🙂", "don't I'LL <s>x</s>"]


def convert(binary, model, output, file_type):
    output.unlink(missing_ok=True)
    command = [binary, "model", "convert", model, "--to", "gguf", "--type", file_type, "--output", output]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise AssertionError(f"{output.name}: exit {done.returncode}: {done.stderr.strip()}")
    return gguf.GGUFReader(output)


def permuted(weights, heads):
    """llama.cpp's LlamaModel.permute."""
    shape = weights.shape
    return weights.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def expected_tensors(model, arch):
    """Name in the file to values, for a dense model."""
    config, names = model.config, gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    tensors = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().float().numpy()
        module, kind = name.rsplit(".", 1)
        if arch == gguf.MODEL_ARCH.LLAMA and module.endswith(("q_proj", "k_proj")):
            values = permuted(values, config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads)
        if arch == gguf.MODEL_ARCH.GPT2 and values.ndim == 2 and ".h." in name:
            values = values.T
        tensors[f"{names.get_name(module)}.{kind}"] = numpy.ascontiguousarray(values)
    return tensors


def step(values, bits):
    """The distance of two codes in each run of 256 at most, and a tenth for the rounding of the scales."""
    runs = values.reshape(-1, 256)
    # Codes reach as far down as up; Q6_K's greatest positive value may be a whole step away.
    spread = 2 * numpy.abs(runs).max(1)
    return numpy.repeat(spread / (2**bits - 1), 256).reshape(values.shape) * 1.1 + 1e-6


def worst_tensor(reader, expected):
    """The largest error in units of what its type allows; 0 means the very bytes."""
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    worst, exact = 0.0, 0
    for name, values in expected.items():
        tensor, kind = found[name], found[name].tensor_type
        assert list(tensor.shape) == list(reversed(values.shape)), (name, tensor.shape, values.shape)
        try:
            same = numpy.array_equal(tensor.data.view(numpy.uint8), gguf.quants.quantize(values, kind).view(numpy.uint8))
        except NotImplementedError:
            same = False
        if same:
            exact += 1
            continue
        assert kind.name in BITS, f"{name}: other {kind.name} bytes than gguf.quants'"
        error = numpy.abs(gguf.quants.dequantize(tensor.data, kind) - values)
        worst = max(worst, (error / step(values, BITS[kind.name])).max().item())
    return worst, exact, len(found)


def keys(reader, case, name, expected):
    wrong = []
    for key, (kind, value) in expected.items():
        field = reader.get_field(key)
        found = None if field is None else field.contents()
        same = math.isclose(found, value, rel_tol=1e-6) if kind == F32 and found is not None else found == value
        if field is None or field.types[0] != kind or not same:
            wrong.append(f"{key}: {found!r}")
    case(f"{name}: {len(expected)} keys {' '.join(wrong)}", float(len(wrong)), 0.0, "wrong ones")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def tiny_llama(binary, directory, work, case):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected = expected_tensors(model, gguf.MODEL_ARCH.LLAMA)
    config = json.loads((directory / "config.json").read_text())
    for name, file_type in TYPES.items():
        reader = convert(binary, directory, work / f"{name}.gguf", name)
        worst, exact, count = worst_tensor(reader, expected)
        case(f"written {name}: {count} tensors, {exact} of them gguf.quants' very bytes", worst, 1.0, "largest error in steps of its block")
        keys(reader, case, f"written {name}", {
            "general.architecture": (TEXT, "llama"), "general.type": (TEXT, "model"), "general.file_type": (U32, file_type),
            "general.quantization_version": (U32, gguf.GGML_QUANT_VERSION), "general.name": (TEXT, directory.name),
            "llama.block_count": (U32, config["num_hidden_layers"]), "llama.context_length": (U32, config["max_position_embeddings"]),
            "llama.embedding_length": (U32, config["hidden_size"]), "llama.feed_forward_length": (U32, config["intermediate_size"]),
            "llama.attention.head_count": (U32, config["num_attention_heads"]), "llama.vocab_size": (U32, config["vocab_size"]),
            "llama.attention.head_count_kv": (U32, config["num_key_value_heads"]), "llama.rope.freq_base": (F32, 10000.0),
            "llama.attention.layer_norm_rms_epsilon": (F32, config["rms_norm_eps"]),
            "llama.rope.dimension_count": (U32, config["head_dim"]), "llama.attention.key_length": (U32, config["head_dim"]),
            "llama.attention.value_length": (U32, config["head_dim"]), "tokenizer.ggml.model": (TEXT, "gpt2"),
            "tokenizer.ggml.pre": (TEXT, "gpt-2"), "tokenizer.ggml.bos_token_id": (U32, 0),
            "tokenizer.ggml.eos_token_id": (U32, 1), "tokenizer.ggml.add_bos_token": (BOOL, False),
        })
    loaded = AutoModelForCausalLM.from_pretrained(work, gguf_file="f32.gguf", dtype=torch.float32)
    case("written f32: transformers' logits", relative(logits(loaded), logits(model)), 1e-3)
    same_tokens(directory, work, "f32.gguf", case, "written f32")


def same_tokens(directory, work, file, case, name, sentences=SENTENCES):
    theirs, ours = AutoTokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(work, gguf_file=file)
    wrong = [text for text in sentences if theirs(text, add_special_tokens=False).input_ids != ours(text, add_special_tokens=False).input_ids]
    case(f"{name}: token ids of transformers {wrong or ''}", float(len(wrong)), 0.0, "sentences of other ids")


COMMON = dict(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              intermediate_size=96, max_position_embeddings=128, tie_word_embeddings=False)
FAMILIES = {
    "llama with biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama with linear scaling": ("llama", dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})),
    "small mistral": ("mistral", dict(head_dim=32, sliding_window=None)),
    "qwen2 tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=32)),
    "gpt2": ("gpt2", dict(n_embd=64, n_layer=2, n_head=4, n_positions=128)),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "qwen2_moe": ("qwen2_moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                                    shared_expert_intermediate_size=64, norm_topk_prob=False)),
    "qwen3_moe": ("qwen3_moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True, head_dim=32)),
}
# Of its own it does not take sizes of heads and experts, biases and scaling from the keys; with its configuration it does not
# know Mixtral's tensors.
NOT_BY_TRANSFORMERS = ("mixtral",)
# We do not read GPT-2's.
NOT_BY_US = ("gpt2",)


def random_model(kind, options, directory):
    options = {**({"vocab_size": 96, "tie_word_embeddings": False} if kind == "gpt2" else COMMON), **options}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options))
    with torch.no_grad():
        # Norms of 1 and biases of 0 would hide those that are lost.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return model


def families(binary, work, case, ours):
    for name, (kind, options) in FAMILIES.items():
        directory = work / name.replace(" ", "-")
        model = random_model(kind, options, directory)
        file = directory / "files" / "f32.gguf"
        reader = convert(binary, directory, file, "f32")
        arch = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
        if kind in ("llama", "mistral", "qwen2", "qwen3", "gpt2"):
            arch = arch["llama" if kind == "mistral" else kind]
            worst, exact, count = worst_tensor(reader, expected_tensors(model, arch))
            case(f"written {name}: {count} tensors", worst + count - exact, 0.0, "0 for the very values")
        expected = logits(model)
        if name not in NOT_BY_TRANSFORMERS:
            # llama.cpp has no family of that name.
            config = {} if kind == "mistral" else {"config": AutoConfig.from_pretrained(directory)}
            loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **config)
            case(f"written {name}: transformers' logits", relative(logits(loaded), expected), 1e-3)
        if name in NOT_BY_US:
            continue
        if hasattr(model.config, "num_experts_per_tok"):
            # `model forward` computes no mixtures.
            command = [binary, "model", "convert", file, "--to", "hf", "--dtype", "float32", "--output", file.parent / "again"]
            subprocess.run(list(map(str, command)), capture_output=True, timeout=300, check=True)
            loaded = AutoModelForCausalLM.from_pretrained(file.parent / "again", dtype=torch.float32)
            case(f"written {name}: logits of what we read", relative(logits(loaded), expected), 1e-3)
        else:
            case(f"written {name}: our logits", relative(ours(file), expected), 1e-3)


def scaled_frequencies(binary, work, case, ours):
    """llama3's factors against llama.cpp's formula, and YaRN's keys."""
    scaling = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    model = random_model("llama", dict(rope_parameters=scaling, head_dim=64), work / "llama3")
    reader = convert(binary, work / "llama3", work / "llama3.gguf", "f32")
    case("written llama3: our logits", relative(ours(work / "llama3.gguf"), logits(model)), 1e-3)
    found = {tensor.name: tensor.data for tensor in reader.tensors}["rope_freqs.weight"]
    expected = []
    for index in range(0, 64, 2):
        frequency = 1.0 / 500000.0 ** (index / 64)
        wavelength = 2 * math.pi / frequency
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        expected.append(1.0 if wavelength < 8192 / 4.0 else 8.0 if wavelength > 8192 else 1 / ((1 - smooth) / 8.0 + smooth))
    case("written llama3: rope_freqs", numpy.abs(found / numpy.array(expected, numpy.float32) - 1).max().item(), 1e-5, "relative")
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
    random_model("qwen2", dict(rope_parameters=yarn), work / "yarn")
    reader = convert(binary, work / "yarn", work / "yarn.gguf", "q8_0")
    keys(reader, case, "written yarn", {
        "qwen2.rope.scaling.type": (TEXT, "yarn"), "qwen2.rope.scaling.factor": (F32, 4.0),
        "qwen2.rope.scaling.original_context_length": (U32, 32), "tokenizer.ggml.model": (TEXT, "none"),
    })


def trained(tokenizer, text, special, alphabet):
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def save(tokenizer, model, directory, settings):
    model.config.vocab_size = tokenizer.get_vocab_size() + 8
    model = AutoModelForCausalLM.from_config(model.config)
    model.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def tokenizers_of(binary, data, work, case):
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    text = [" ".join(json.loads(line).values()) for line in data.read_text().splitlines()[:400]]
    llama = random_model("llama", {}, work / "base")
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ x }}"}
    for pre in ("llama-bpe", "qwen2", "tekken", "gpt-4o"):
        tokenizer = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
        split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        trained(tokenizer, text, ["<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet())
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        directory = work / pre
        save(tokenizer, llama, directory, settings)
        reader = convert(binary, directory, work / f"{pre}.gguf", "q8_0")
        keys(reader, case, f"written {pre}", {
            "tokenizer.ggml.pre": (TEXT, pre), "tokenizer.ggml.add_bos_token": (BOOL, True), "tokenizer.ggml.add_eos_token": (BOOL, False),
            "tokenizer.ggml.eos_token_id": (U32, 1), "tokenizer.chat_template": (TEXT, "{{ x }}"),
        })
        same_tokens(directory, work, f"{pre}.gguf", case, f"written {pre}")
    # As transformers writes Llama 2's: merges of characters, and bytes to fall back on.
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained(tokenizer, text, special, [])
    saved = json.loads(tokenizer.to_str())
    # The trainer makes bytes special tokens, which they are not.
    saved["added_tokens"] = [token for token in saved["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    save(tokenizer, llama, work / "spm", {**settings, "unk_token": "<unk>", "add_bos_token": True})
    reader = convert(binary, work / "spm", work / "spm.gguf", "q8_0")
    keys(reader, case, "written spm", {
        "tokenizer.ggml.model": (TEXT, "llama"), "tokenizer.ggml.unknown_token_id": (U32, 0), "tokenizer.ggml.bos_token_id": (U32, 1),
        "tokenizer.ggml.add_bos_token": (BOOL, True), "tokenizer.ggml.add_space_prefix": (BOOL, True),
    })
    kinds = reader.get_field("tokenizer.ggml.token_type").contents()
    counts = [sum(kind == wanted for kind in kinds) for wanted in (gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.BYTE, gguf.TokenType.UNUSED)]
    case(f"written spm: unknown, control, byte, unused {counts}", 0.0 if counts == [1, 2, 256, 8] else 1.0, 0.0, "0 for 1, 2, 256, 8")
    # transformers' tokenizer for such files puts no second space before the one that a text begins with, nor after <s>.
    plain = [text for text in SENTENCES if not text.startswith(" ") and "<s>" not in text]
    same_tokens(work / "spm", work, "spm.gguf", case, "written spm", plain)


def written(binary, directory, work, case, ours):
    """`case` notes a result; `ours` gives the logits of `model forward` for IDS."""
    work.mkdir(parents=True, exist_ok=True)
    tiny_llama(binary, directory, work, case)
    families(binary, work, case, ours)
    scaled_frequencies(binary, work, case, ours)
    tokenizers_of(binary, directory.parent / "devils-dictionary.jsonl", work, case)
