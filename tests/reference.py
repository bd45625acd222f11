"""The released procedure written on transformers alone, as plainly as possible: the judge of minimas' recursion.

One question at a time; in the roll-out no cache, the whole sequence again at every step; `generate` for the text. It
shares no code with minimas: prompts, chat, links and loop are written again here.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = json.loads((Path(__file__).parent.parent / "minimas" / "prompts.json").read_text())


def hidden_and_logits(folder, ids, mask=None, dtype=torch.float32):
    """Last hidden states and logits of transformers' model for token ids (B, T)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        out = model(ids, attention_mask=mask, output_hidden_states=True)
    return out.hidden_states[-1], out.logits


def inner(state, h):
    d = h.shape[-1]
    y = F.layer_norm(h, (d,), state["pre_ln.weight"], state["pre_ln.bias"])
    y = F.gelu(F.linear(y, state["proj1.weight"], state["proj1.bias"]))
    y = h + F.linear(y, state["proj2.weight"], state["proj2.bias"])
    return F.layer_norm(y, (d,), state["post_ln.weight"], state["post_ln.bias"])


def outer(state, h):
    y = F.layer_norm(h, (h.shape[-1],), state["ln_source.weight"], state["ln_source.bias"])
    y = F.gelu(F.linear(y, state["proj1.weight"], state["proj1.bias"]))
    y = F.linear(y, state["proj2.weight"], state["proj2.bias"]) + F.linear(h, state["residual_proj.weight"], state["residual_proj.bias"])
    return F.layer_norm(y, (y.shape[-1],), state["ln_target.weight"], state["ln_target.bias"])


class Peer:
    """One agent on transformers."""

    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self.inner = torch.load(Path(folder) / "adapter.pt", weights_only=True)
        self.E = self.model.get_input_embeddings()

    def embed(self, text, slots):
        """A user message, with `<<role>>` where slots[role] (m, D) goes, in the chat template -> (1, T, D)."""
        messages = [{"role": "system", "content": PROMPTS["system"]}, {"role": "user", "content": text}]
        chat = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False, date_string="26 Jul 2024")
        parts = []
        for role, latents in slots.items():
            before, chat = chat.split(f"<<{role}>>")
            parts += [self.tokens(before), latents]
        return torch.cat([*parts, self.tokens(chat)])[None]

    def tokens(self, text):
        return self.E(torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long))

    def think(self, x, m):
        H = []
        for _ in range(m):
            h = self.model.model(inputs_embeds=x, use_cache=False).last_hidden_state[:, -1:]
            H.append(h)
            x = torch.cat([x, inner(self.inner, h)], 1)
        return torch.cat(H, 1)[0]

    def write(self, x, n):
        out = self.model.generate(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2]), max_new_tokens=n, do_sample=False,
                                  top_k=None, top_p=None, temperature=None, pad_token_id=self.tokenizer.pad_token_id)
        return out[0].tolist()


@torch.no_grad()
def sequential(folders, question, rounds, m, max_new_tokens):
    """Latents {(round, source, target): (m, D)} and greedy token ids of planner, critic, solver for a math question."""
    agents = {role: Peer(folders[role]) for role in ("planner", "critic", "solver")}
    config = json.loads((Path(folders["links"]) / "outerlink_config.json").read_text())
    links = {(a["source_role"], a["target_role"]): torch.load(Path(folders["links"]) / a["filename"], weights_only=True) for a in config["adapters"]}
    texts, latents = PROMPTS["sequential"]["text"], {}
    final = texts["final"]["number"]

    def send(r, source, target, H):
        latents[r, source, target] = outer(links[source, target], inner(agents[source].inner, H))
        return latents[r, source, target]

    feedback = None
    for r in range(1, rounds + 1):
        if feedback is None:
            x = agents["planner"].embed(texts["planner"].replace("{question}", question), {})
        else:
            text = texts["planner_with_feedback"].replace("{solver}", "<<solver>>").replace("{question}", question)
            x = agents["planner"].embed(text, {"solver": feedback})
        plan = send(r, "planner", "critic", agents["planner"].think(x, m))
        text = texts["critic"].replace("{planner}", "<<planner>>").replace("{question}", question)
        refined = send(r, "critic", "solver", agents["critic"].think(agents["critic"].embed(text, {"planner": plan}), m))
        text = texts["solver"].replace("{critic}", "<<critic>>").replace("{final}", final).replace("{question}", question)
        x = agents["solver"].embed(text, {"critic": refined})
        if r == rounds:
            return latents, agents["solver"].write(x, max_new_tokens)
        feedback = send(r, "solver", "planner", agents["solver"].think(x, m))
