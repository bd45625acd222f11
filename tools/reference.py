"""The released procedure written on transformers alone, as plainly as possible: the judge of minimas' recursion.

One question at a time; in the roll-out no cache, the whole sequence again at every step; `generate` for the text. It
shares no code with minimas: prompts, chat, links and loop are written again here.
"""

import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from checkpoints import without_adapter
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = json.loads((Path(__file__).parent.parent / "minimas" / "prompts.json").read_text())


def load_model(folder, dtype, **options):
    """transformers' model of an agent's folder, in eval mode."""
    with without_adapter(folder) as view:
        return AutoModelForCausalLM.from_pretrained(view, dtype=dtype, **options).eval()


def hidden_and_logits(folder, ids, mask=None, dtype=torch.float32):
    """Last hidden states and logits of transformers' model for token ids (B, T)."""
    model = load_model(folder, dtype, attn_implementation="eager")
    with torch.no_grad():
        out = model(ids, attention_mask=mask, output_hidden_states=True)
    return out.hidden_states[-1], out.logits


def link_weights(folder, *names):
    """A link's weights in float32, from the first of the files that is there."""
    file = next(file for name in names if (file := Path(folder) / name).is_file())
    return {name: weight.float() for name, weight in torch.load(file, weights_only=True).items()}


def inner(state, h):
    d = h.shape[-1]
    y = F.layer_norm(h, (d,), state["pre_ln.weight"], state["pre_ln.bias"])
    y = F.gelu(F.linear(y, state["proj1.weight"], state["proj1.bias"]))
    y = h + F.linear(y, state["proj2.weight"], state["proj2.bias"])
    return F.layer_norm(y, (d,), state["post_ln.weight"], state["post_ln.bias"])


def outer(state, h):
    y = F.layer_norm(h, (h.shape[-1],), state["ln_source.weight"], state["ln_source.bias"])
    y = F.gelu(F.linear(y, state["proj1.weight"], state["proj1.bias"]))
    y = F.linear(y, state["proj2.weight"], state["proj2.bias"]) + F.linear(
        h, state["residual_proj.weight"], state["residual_proj.bias"]
    )
    return F.layer_norm(y, (y.shape[-1],), state["ln_target.weight"], state["ln_target.bias"])


def render(tokenizer, system, text):
    """A system and a user message in the chat template of transformers' tokenizer."""
    options = dict(
        tokenize=False, add_generation_prompt=True, enable_thinking=False, date_string="26 Jul 2024"
    )
    try:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError:  # Mistral
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{system}\n\n{text}"}], **options
        )


class Peer:
    """One agent on transformers."""

    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = load_model(folder, torch.float32, attn_implementation="eager")
        self.inner = link_weights(folder, "adapter(math).pt", "adapter.pt")
        self.E = self.model.get_input_embeddings()

    def embed(self, system, text, slots):
        """A user message, with `<<role>>` where slots[role] (m, D) goes, in the chat template -> (1, T, D)."""
        chat = render(self.tokenizer, system, text)
        parts = re.split("<<([a-z]+)>>", chat)
        return torch.cat(
            [slots[part] if i % 2 else self.tokens(part) for i, part in enumerate(parts)]
        )[None]

    def tokens(self, text):
        return self.E(
            torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)
        )

    def forced(self, x, text):
        """States (T + N, D) of a prompt x (1, T, D) with the N tokens of a text and of its end behind it,
        and these tokens.
        """
        ids = self.tokenizer(
            text + self.tokenizer.eos_token, add_special_tokens=False, return_tensors="pt"
        ).input_ids[0]
        return self.model.model(
            inputs_embeds=torch.cat([x, self.E(ids)[None]], 1), use_cache=False
        ).last_hidden_state[0], ids

    def think(self, x, m):
        H = []
        for _ in range(m):
            h = self.model.model(inputs_embeds=x, use_cache=False).last_hidden_state[:, -1:]
            H.append(h)
            x = torch.cat([x, inner(self.inner, h)], 1)
        return torch.cat(H, 1)[0]

    def write(self, x, n):
        out = self.model.generate(
            inputs_embeds=x,
            attention_mask=torch.ones(x.shape[:2]),
            max_new_tokens=n,
            do_sample=False,
            top_k=None,
            top_p=None,
            temperature=None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return out[0].tolist()


def user_message(style, role, question, later):
    """The prompt of `role` for a math question, slots as <<role>>; `later`: in a round after the first."""
    lists_options = any(
        line[:1] in list("ABCDabcd") and line[1:2] in list(".):-") and line[2:3] == " "
        for line in question.split("\n")
    )
    if style.startswith("sequential"):
        strings = PROMPTS["sequential"]["text"]
        final = strings["final"]["letter" if lists_options else "number"]
    else:
        strings = PROMPTS[style]
        final = PROMPTS["final"]["letter" if lists_options else "number"]
    name = f"{role}_with_feedback" if later and f"{role}_with_feedback" in strings else role
    text = strings[name].replace("{context}", PROMPTS["context"]["math"]).replace("{final}", final)
    for other in ROLES[style]:
        text = text.replace("{" + other + "}", f"<<{other}>>")
    return text.replace("{question}", question)


ROLES = {
    "sequential_light": ["planner", "critic", "solver"],
    "sequential_scaled": ["planner", "critic", "solver"],
    "mixture": ["math", "code", "science", "summarizer"],
    "distillation": ["expert", "learner"],
    "deliberation": ["reflector", "toolcaller"],
}


def parts(style, folders):
    """The agents of a style and its outer links' weights by edge."""
    agents = {role: Peer(folders[role]) for role in ROLES[style]}
    config = json.loads((Path(folders["links"]) / "outerlink_config.json").read_text())
    adapters = (config["tasks"]["math"] if "tasks" in config else config)["adapters"]
    return agents, {
        (a["source_role"], a["target_role"]): link_weights(folders["links"], a["filename"])
        for a in adapters
    }


def outer_loss(style, agents, links, question, texts, rounds, m, teacher):
    """Losses of the last agent's text in every round; `teacher`: states at the first m tokens of their texts are sent,
    as the release was trained, instead of thoughts. texts: by role."""
    roles, system = (
        ROLES[style],
        PROMPTS["system_deliberation" if style == "deliberation" else "system"],
    )
    slots, losses = {role: {} for role in roles}, []
    for r in range(1, rounds + 1):
        for role in roles:
            x = agents[role].embed(system, user_message(style, role, question, r > 1), slots[role])
            if teacher or role == roles[-1]:
                states, ids = agents[role].forced(x, texts[role])
            if role == roles[-1]:
                losses.append(
                    F.cross_entropy(agents[role].model.lm_head(states[-len(ids) - 1 : -1]), ids)
                )
            H = states[-len(ids) :][:m] if teacher else agents[role].think(x, m)
            for (source, target), link in links.items():
                if source == role:
                    slots[target][source] = outer(link, inner(agents[role].inner, H))
    return losses


@torch.no_grad()
def released(style, folders, question, rounds, m, max_new_tokens):
    """Latents {(round, source, target): (m, D)} and greedy token ids of a style's agents for a math question."""
    roles, system = (
        ROLES[style],
        PROMPTS["system_deliberation" if style == "deliberation" else "system"],
    )
    agents, links = parts(style, folders)
    latents, slots = {}, {role: {} for role in roles}
    for r in range(1, rounds + 1):
        for role in roles:
            x = agents[role].embed(system, user_message(style, role, question, r > 1), slots[role])
            if r == rounds and role == roles[-1]:
                return latents, agents[role].write(x, max_new_tokens)
            H = agents[role].think(x, m)
            for (source, target), link in links.items():
                if source == role:
                    slots[target][source] = latents[r, source, target] = outer(
                        link, inner(agents[role].inner, H)
                    )
