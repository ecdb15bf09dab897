"""transformers' half of the parity test of models; runs in the environment with torch.

    python transformers_side.py make FOLDER    writes FOLDER/<case>/model, a tiny random checkpoint of each family, and
                                               FOLDER/<case>/theirs.npz, its logits and its greedy continuation; and
                                               FOLDER/<case>/judge and scores.npz, a sequence classifier of a few
    python transformers_side.py load FOLDER    loads FOLDER/<case>/export, which ours wrote, and writes its logits
                                               and greedy continuation to FOLDER/<case>/again.npz

Every parameter is random and far from its initial value: norms that stay at one, or biases at zero, would hide
mistakes; and so would weights so small that dropping the rotary positions moves no logit.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

VOCABULARY, LENGTHS, NEW = 61, (24, 17, 9), 64
SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
             pad_token_id=None)  # fmt: skip
WIDE = SIZES | dict(head_dim=12)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)  # fmt: skip
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, rope_theta=1e4)
MIXED = ["sliding_attention", "full_attention", "full_attention"]
CASES = {  # name -> the architecture, and settings of its config
    "llama": ("Llama", WIDE | dict(rope_theta=5e5)),
    "llama_biased": ("Llama", SIZES | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama_linear": ("Llama", SIZES | dict(rope_scaling=dict(rope_type="linear", factor=3.0))),
    "llama3": ("Llama", SIZES | dict(rope_theta=1e4, rope_scaling=LLAMA3)),
    "qwen2": ("Qwen2", SIZES | dict(rope_theta=1e6)),
    "qwen2_tied_windows": ("Qwen2", SIZES | dict(tie_word_embeddings=True, use_sliding_window=True, sliding_window=5,
                                                 max_window_layers=2)),
    "qwen2_yarn": ("Qwen2", SIZES | dict(rope_parameters=YARN)),
    "mistral": ("Mistral", WIDE | dict(sliding_window=7)),
    "mistral_everything": ("Mistral", WIDE | dict(sliding_window=None)),
    "qwen3": ("Qwen3", WIDE | dict(tie_word_embeddings=True)),
    "qwen3_biased": ("Qwen3", WIDE | dict(attention_bias=True, rope_parameters=YARN | dict(attention_factor=1.3))),
    "mixtral": ("Mixtral", WIDE | dict(num_local_experts=3, sliding_window=7)),
    "qwen3moe": ("Qwen3Moe", WIDE | dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=20,
                                         norm_topk_prob=False)),
    "gemma": ("Gemma", WIDE),
    "gemma2": ("Gemma2", WIDE | dict(sliding_window=6, query_pre_attn_scalar=20, attn_logit_softcapping=2.0,
                                     final_logit_softcapping=1.5)),
    "gemma3": ("Gemma3Text", WIDE | dict(sliding_window=6, layer_types=MIXED, query_pre_attn_scalar=20)),
    "gemma3_linear": ("Gemma3Text", WIDE | dict(
        num_hidden_layers=6, sliding_window=6, query_pre_attn_scalar=20, rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e5),
            sliding_attention=dict(rope_type="default", rope_theta=1e3)))),
    "gpt2": ("GPT2", dict(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=96, bos_token_id=None,
                          eos_token_id=None)),
}  # fmt: skip
JUDGES = ("llama", "llama_biased", "qwen3", "gemma2", "gpt2")  # of these there is a sequence classifier too
LARGEST_SHARD = {"qwen2": "40KB"}  # so that one checkpoint is in shards


def inputs():
    """Random tokens in rows of unequal length, padded on the left: tokens [B,L], valid [B,L]."""
    width = max(LENGTHS)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (len(LENGTHS), width))
    return tokens, np.arange(width)[None] >= width - np.array(LENGTHS)[:, None]


def random_model(architecture, settings, kind="ForCausalLM"):
    """A model whose every parameter is random: vectors are 1 or 0 and a third, matrices scaled to keep sizes."""
    config = getattr(transformers, f"{architecture}Config")(**settings)
    names = {"GPT2ForCausalLM": "GPT2LMHeadModel", "Gemma3TextForCausalLM": "Gemma3ForCausalLM"}
    torch.manual_seed(0)
    model = getattr(transformers, names.get(architecture + kind, architecture + kind))(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim > 1:
                parameter.copy_(noise * (0.35 if "emb" in name or "wte" in name or "wpe" in name else 0.12))
            else:
                parameter.copy_((0.0 if "bias" in name else parameter) + 0.3 * noise)
    return model


def outputs(model):
    """Logits of the rows, and a greedy continuation of each."""
    model.set_attn_implementation("eager")
    tokens, valid = (torch.as_tensor(x) for x in inputs())
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(tokens, attention_mask=valid.long(), position_ids=positions).logits
        said = model.generate(tokens, attention_mask=valid.long(), do_sample=False, max_new_tokens=NEW,
                              min_new_tokens=NEW, pad_token_id=0)  # fmt: skip
    return {"logits": logits.numpy(), "greedy": said[:, tokens.shape[1] :].numpy()}


def scores(model):
    """What a sequence classifier says of the rows, whose padding it must know by the id."""
    model.set_attn_implementation("eager")
    tokens, valid = inputs()
    tokens = torch.as_tensor(np.where(valid, np.maximum(tokens, 1), 0))
    valid = torch.as_tensor(valid).long()
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(tokens, attention_mask=valid, position_ids=positions).logits[:, 0]
    return {"tokens": tokens.numpy(), "valid": valid.bool().numpy(), "scores": found.numpy()}


def main():
    torch.set_num_threads(1)  # the models are tiny
    command, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    for name, (architecture, settings) in CASES.items():
        if command == "make":
            model = random_model(architecture, settings)
            model.save_pretrained(folder / name / "model", max_shard_size=LARGEST_SHARD.get(name, "5GB"))
            tokens, valid = inputs()
            np.savez(folder / name / "theirs.npz", tokens=tokens, valid=valid, version=transformers.__version__,
                     **outputs(model))  # fmt: skip
            if name in JUDGES:
                judge = random_model(architecture, settings | dict(num_labels=1, pad_token_id=0),
                                     "ForSequenceClassification")  # fmt: skip
                judge.save_pretrained(folder / name / "judge")
                np.savez(folder / name / "scores.npz", **scores(judge))
        else:
            model = AutoModelForCausalLM.from_pretrained(folder / name / "export", dtype=torch.float32).eval()
            np.savez(folder / name / "again.npz", **outputs(model))


if __name__ == "__main__":
    main()
