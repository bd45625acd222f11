"""The fast path: the same decoders and links in fewer and larger steps. Results are the same up to rounding.

    on a CPU    linears of one input are merged, [q; k; v] = [W_q; W_k; W_v] x, and their weights are packed for oneDNN
                once, at load; a weight that is used elsewhere too (tied embeddings) keeps its layout. A step of one
                token per row (latent or text) takes fewer operations
    on CUDA     linears of one input are merged; a step of one token per row takes five kernels a block instead of some
                thirty, and is captured as a CUDA graph and replayed: the host launches one thing per token instead of
                hundreds

    prepare.py    puts a decoder on the fast path, in place
    onednn.py     the product of oneDNN, which torch has no public name for
    hooks.py      hooks, and replaced modules and weights, which it cannot always obey
    linear.py     merged and packed linears
    norms.py      RMSNorm in fewer operations
    quantized.py  products with quantised weights
    blocks.py     a block's step of one token per row: CpuBlock, and KernelBlock in our kernels (kernels.py)
    graphs.py     steps as CUDA graphs

A decoder that went through `prepare` computes no gradients on a CPU: training loads its system with fast=False.
"""
