"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464), twice: as the paper's recurrence, and in chunks.

The state S is a small associative memory. Reading it with a key k gives the value S'k that is stored there (' is the
transpose). Each token lets the memory fade, looks up what its key holds, and writes back the difference to its own
value, to the degree beta:

    S <- exp(g_t) S                              forget
    S <- S + k_t (beta_t (v_t - S' k_t))'        correct the value under k_t
    o_t = S' q_t                                 read

Notation                                                                                  in the paper
    B           batch
    T           tokens
    H           heads
    d_k, d_v    widths of a key and of a value
    q, k        (B, H, T, d_k)    query and key, both of length 1; q / sqrt(d_k) comes in   q, k
    v, o        (B, H, T, d_v)    value and output                                          v, o
    g           (B, H, T)         log of the decay, at most 0                               log alpha
    beta        (B, H, T)         strength of writing, 0 to 1                               beta
    S           (B, H, d_k, d_v)  state, float32 (in other files S is a number of keys)     S' (S is transposed there)
    C                             tokens in a chunk                                         C
and in `chunked`, for each chunk
    since_start (..., C)          log decay from the chunk's start to a token               log gamma
    decay       (..., C, C)       decay from token s to token t, 0 if s comes later         Gamma
    U, W        (..., C, d)       the corrections are U - W S                               U, W
    u           (B, H, C, d_v)    the corrections: what is written under the keys           U - W S'

A token with beta = 0 and g = 0 leaves the state as it is: that is how padding is passed over.
"""

import torch
import torch.nn.functional as F


def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    S: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule token by token: outputs (B, H, T, d_v) and the state after them."""
    outputs = []
    for t in range(q.shape[2]):
        q_t = q[:, :, t, :, None]  # (B, H, d_k, 1)
        k_t = k[:, :, t, :, None]
        S = S * g[:, :, t, None, None].exp()
        found = (S * k_t).sum(2)  # (B, H, d_v): S' k
        correction = beta[:, :, t, None] * (v[:, :, t] - found)  # (B, H, d_v)
        S = S + k_t * correction[:, :, None]
        outputs.append((S * q_t).sum(2))
    return torch.stack(outputs, 2), S


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    S: torch.Tensor,
    C: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in matrix products, C tokens at a time.

    Within a chunk the corrections u_t = beta_t (v_t - S_t' k_t) depend on one another through the keys written before:

        u_t + sum over s < t of A[t, s] u_s = beta_t (v_t - exp(since_start_t) S' k_t)
        A[t, s] = beta_t decay(s -> t) k_t.k_s

    with the state S that the chunk begins with. One triangular solve gives them all, as U - W S (the WY form, section 3
    of the paper). All of this but S is computed for all chunks at once; only the last loop goes from chunk to chunk.
    """
    T = q.shape[2]
    d_k = k.shape[-1]
    d_v = v.shape[-1]
    q = in_chunks(q, C)  # (B, H, chunks, C, d_k)
    k = in_chunks(k, C)
    v = in_chunks(v, C)  # (B, H, chunks, C, d_v)
    g = in_chunks(g, C)  # (B, H, chunks, C)
    beta = in_chunks(beta, C)[..., None]  # (B, H, chunks, C, 1)

    since_start = g.cumsum(-1)  # (B, H, chunks, C)
    whole = since_start[..., -1:]  # (B, H, chunks, 1): log decay over the whole chunk
    later = torch.ones(C, C, dtype=torch.bool, device=q.device).triu(1)
    log_decay = since_start[..., :, None] - since_start[..., None, :]  # (B, H, chunks, C, C)
    decay = log_decay.masked_fill(later, -torch.inf).exp()

    A = (beta * (k @ k.mT) * decay).tril(-1)  # (B, H, chunks, C, C)
    right = beta * torch.cat([v, k * since_start[..., None].exp()], -1)  # (..., C, d_v + d_k)
    UW = torch.linalg.solve_triangular(A, right, upper=False, unitriangular=True)
    U, W = UW.split([d_v, d_k], -1)  # (B, H, chunks, C, d_v) and (B, H, chunks, C, d_k)

    scores = (q @ k.mT) * decay  # (B, H, chunks, C, C)
    q_start = q * since_start[..., None].exp()  # reads the state that the chunk begins with
    k_end = k * (whole - since_start)[..., None].exp()  # writes to the state that it ends with
    outputs = []
    for c in range(q.shape[2]):
        u = U[:, :, c] - W[:, :, c] @ S  # (B, H, C, d_v)
        outputs.append(q_start[:, :, c] @ S + scores[:, :, c] @ u)
        S = S * whole[:, :, c, :, None].exp() + k_end[:, :, c].mT @ u
    return torch.cat(outputs, 2)[:, :, :T], S


def in_chunks(x: torch.Tensor, C: int) -> torch.Tensor:
    """x (B, H, T, ...) -> (B, H, chunks, C, ...). Zeros fill the last chunk: they leave the state as it is."""
    missing = -x.shape[2] % C  # tokens up to a multiple of C
    padding = [0, 0] * (x.ndim - 3) + [0, missing]  # F.pad begins at the last dimension
    return F.pad(x, padding).unflatten(2, (-1, C))
