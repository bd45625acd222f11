"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464), twice: as the paper's recurrence, and in chunks.

A state S is a small associative memory: reading it with a key k gives the value S'k stored there (' is the transpose).
Each token lets the memory fade, looks up what its key holds, and writes back the difference to its own value, to the
degree beta:

    S <- exp(g_t) S                              forget
    S <- S + k_t (beta_t (v_t - S' k_t))'        correct the value under k_t
    o_t = S' q_t                                 read

    q, k   (B, H, T, d_k)  query and key, both of length 1 (q is divided by sqrt(d_k) besides)
    v, o   (B, H, T, d_v)  value and output
    g      (B, H, T)       log of the decay, at most 0
    beta   (B, H, T)       strength of writing, 0 to 1
    S      (B, H, d_k, d_v) state, float32 (elsewhere in this package S is a number of keys)
    C                      tokens in a chunk

A token with beta = 0 and g = 0 leaves the state as it is: that is how padding is passed over.
"""

import torch
import torch.nn.functional as F


def recurrent(q, k, v, g, beta, S):
    """The rule token by token: outputs (B, H, T, d_v) and the state after them."""
    outputs = []
    for t in range(q.shape[2]):
        S = S * g[:, :, t, None, None].exp()
        found = (S * k[:, :, t, :, None]).sum(2)  # (B, H, d_v)
        S = S + k[:, :, t, :, None] * (beta[:, :, t, None] * (v[:, :, t] - found))[:, :, None]
        outputs.append((S * q[:, :, t, :, None]).sum(2))
    return torch.stack(outputs, 2), S


def chunked(q, k, v, g, beta, S, C=64):
    """The same in matrix products, C tokens at a time.

    Within a chunk the corrections u_t = beta_t (v_t - S_t' k_t) depend on one another through the keys written before:
    u + A u = beta (v - decay k S_0), with A[t, s] = beta_t decay(s -> t) k_t.k_s below the diagonal. One triangular
    solve gives them all, as U - W S_0 (the WY form, section 3 of the paper).
    """
    T = q.shape[2]
    q, k, v, g, beta = (
        F.pad(x, (0, 0) * (x.ndim - 3) + (0, -T % C)).unflatten(2, (-1, C))
        for x in (q, k, v, g, beta)
    )
    since_start = g.cumsum(-1)  # (B, H, chunks, C): log decay from the chunk's start to the token
    whole = since_start[..., -1:]  # (B, H, chunks, 1): over the whole chunk
    ahead = torch.ones(C, C, dtype=torch.bool, device=q.device).triu(1)
    decay = (
        (since_start[..., :, None] - since_start[..., None, :]).masked_fill(ahead, -torch.inf).exp()
    )  # from s to t
    A = (beta[..., None] * (k @ k.mT) * decay).tril(-1)
    rhs = beta[..., None] * torch.cat([v, k * since_start[..., None].exp()], -1)
    U, W = torch.linalg.solve_triangular(A, rhs, upper=False, unitriangular=True).split(
        [v.shape[-1], k.shape[-1]], -1
    )
    scores = (q @ k.mT) * decay
    q_start = q * since_start[..., None].exp()  # reads the state that the chunk begins with
    k_end = k * (whole - since_start)[..., None].exp()  # writes to the state that it ends with
    outputs = []
    for c in range(q.shape[2]):
        u = U[:, :, c] - W[:, :, c] @ S  # (B, H, C, d_v)
        outputs.append(q_start[:, :, c] @ S + scores[:, :, c] @ u)
        S = S * whole[:, :, c, :, None].exp() + k_end[:, :, c].mT @ u
    return torch.cat(outputs, 2)[:, :, :T], S
