"""Qwen2, Qwen2.5 and Qwen3, equal to transformers' Qwen2ForCausalLM and Qwen3ForCausalLM.

What differs from Llama:
    Qwen2, 2.5   the q, k and v projections carry a bias (o does not)
    Qwen3        q and k go through an RMSNorm of their own, per head, before the rotation
    both         no rope scaling

Letters as in llama.py: B batch, T tokens, D width, H query heads, K key/value heads, d head width, S keys in the cache.
"""

import torch.nn.functional as F
from torch import nn

from .llama import Attention, Config, Llama, RMSNorm, rotate

__all__ = ["Config", "Qwen2", "Qwen3"]


def Qwen2Attention(c):
    attention = Attention(c)
    for name, heads in ("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads), ("v_proj", c.num_key_value_heads):
        setattr(attention, name, nn.Linear(c.hidden_size, heads * c.head_dim, bias=True))
    return attention


class Qwen3Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.d = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * self.d, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.d, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.d, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * self.d, c.hidden_size, bias=False)
        self.q_norm, self.k_norm = RMSNorm(self.d, c.rms_norm_eps), RMSNorm(self.d, c.rms_norm_eps)

    def forward(self, x, positions, rope, mask, cache):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.d)).transpose(1, 2)  # (B, H, T, d)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.d)).transpose(1, 2)  # (B, K, T, d)
        v = self.v_proj(x).view(B, T, -1, self.d).transpose(1, 2)  # (B, K, T, d)
        q, k = rotate(q, rope), rotate(k, rope)
        k, v = cache.update(k, v, positions)  # (B, K, S, d)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class Qwen2(Llama):
    rope_types = ("default",)

    def __init__(self, config):
        super().__init__(config, attention=Qwen2Attention)


class Qwen3(Llama):
    rope_types = ("default",)

    def __init__(self, config):
        super().__init__(config, attention=Qwen3Attention)
