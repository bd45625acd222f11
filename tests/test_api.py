"""What a researcher does from Python: hooks, weights, copies, gradients, options, and changes of what agents hear."""

import copy
import inspect
import pickle
import re
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import fields, replace

import checkpoints
import pytest
import torch

import minimas
from minimas import InputError, Settings
from minimas.fast.graphs import Graphs
from minimas.link import InnerLink, OuterLink
from minimas.prompts import Question

CHAIN = "7 +5 *3 -4 +8 *7 -1 +6"  # 5; 2 after one round, 9 after two
OTHER = "7 +5 *3 +3 +8 *7 -1 +6"  # 4
EDGE = ("planner", "critic")
NAMED = re.escape(repr(EDGE))
OPTIONS = {"rounds": 2, "latent_steps": 2, "max_new_tokens": 3, "retry": False, "temperature": 0.0}


@pytest.fixture(scope="module")
def tiny():
    return minimas.load_mas_system("tiny", device="cpu")


@pytest.fixture(scope="module")
def donor(tiny):
    """What was thought of the other chain."""
    return tiny.run([OTHER], keep_states=True, keep_latents=True)[0]


def answers(system, edit=None, questions=(CHAIN,), **options):
    options |= {"edit": edit} if edit else {}
    return [result.answer for result in system.run(list(questions), **options)]


# Modules


@pytest.mark.parametrize("style", ["tiny", *checkpoints.SYSTEMS])
def test_every_hook_fires(folders, style):
    """On every module of every family, and on links and their parts."""
    where = None if style == "tiny" else folders(style)
    system = minimas.load_mas_system(style, checkpoints=where, device="cpu")
    fired = set()
    expected = set()
    for role, agent in system.agents.items():
        roots = {role: agent.model, f"{role}'s link": agent.inner_link}
        for root, whole in roots.items():
            for name, module in whole.named_modules():
                if isinstance(module, torch.nn.ModuleList):
                    continue
                key = (root, name)
                expected.add(key)
                module.register_forward_hook(lambda *_, key=key: fired.add(key))
    for edge, link in system.outer_links.items():
        for name, module in link.named_modules():
            expected.add((edge, name))
            module.register_forward_hook(lambda *_, key=(edge, name): fired.add(key))
    writer = system.style.order[-1]
    question = CHAIN if style == "tiny" else "What is 1 + 1?"
    system.run([question], **OPTIONS)
    silent = {(role, "lm_head") for role in system.agents if role != writer}  # they write nothing
    assert expected - fired == silent


def test_a_hook_changes_a_thought(tiny):
    attention = tiny.agents["critic"].model.layers[1].self_attn
    before = answers(tiny)
    hook = attention.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    try:
        assert answers(tiny) != before == ["5"]
    finally:
        hook.remove()
    assert answers(tiny) == before


def test_a_hook_may_be_set_between_turns(tiny):
    """What the planner read in earlier rounds, without the hook, is not used then, nor what it reads with it later."""
    planner = tiny.agents["planner"]
    attention = planner.model.layers[0].self_attn
    hooks = []

    def set_hook(turn, questions, drop=False):
        if (turn.round, turn.role) == (2, "solver"):
            hooks.append(attention.register_forward_hook(lambda module, args, output: 0 * output))
        if (turn.round, turn.role) == (3, "solver"):
            hooks.pop().remove()
        if drop:
            tiny.drop_prefixes()

    def set_and_drop(turn, questions):
        set_hook(turn, questions, drop=True)

    expected, found = (
        tiny.run([CHAIN], rounds=5, edit=edit, keep_states=True)[0]
        for edit in (set_and_drop, set_hook)
    )
    assert hooks == [] and found.states.keys() == expected.states.keys()
    for key, states in expected.states.items():
        assert torch.allclose(found.states[key], states, atol=1e-4), key
    assert not torch.allclose(found.states[3, "planner"], found.states[2, "planner"], atol=0.1)


def zeroed_by_a_hook(agent):
    return agent.model.layers[0].self_attn.register_forward_hook(lambda *args: 0 * args[-1]).remove


def zeroed_by_a_hook_on_all_modules(agent):
    register = torch.nn.modules.module.register_module_forward_hook
    attention = agent.model.layers[0].self_attn
    return register(lambda *args: 0 * args[-1] if args[0] is attention else None).remove


@torch.no_grad()
def weight_zeroed(agent):
    weight = agent.model.layers[0].self_attn.q_proj.weight
    before = weight.clone()
    weight.zero_()
    return lambda: weight.data.copy_(before)


def weight_replaced(agent):
    projection = agent.model.layers[0].self_attn.q_proj
    before = projection.weight
    projection.weight = torch.nn.Parameter(torch.zeros_like(before))
    return lambda: setattr(projection, "weight", before)


def data_replaced(agent):
    weight = agent.model.layers[0].self_attn.q_proj.weight
    before = weight.data
    weight.data = torch.zeros_like(before)
    return lambda: setattr(weight, "data", before)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        zeroed_by_a_hook,
        zeroed_by_a_hook_on_all_modules,
        weight_zeroed,
        weight_replaced,
        data_replaced,
    ],
)
def test_what_was_read_is_read_again_by_a_changed_model(tiny, change):
    agent = tiny.agents["planner"]
    prompts = tiny.prompts_for("planner", tiny.style.questions([CHAIN]), {})
    agent.drop_prefix()
    before = agent.think(prompts, 3)
    kept = agent.prefix_cache
    assert torch.allclose(agent.think(prompts, 3), before, atol=1e-4)
    assert agent.prefix_cache.cache is kept.cache, "an unchanged model does not read again"
    undo = change(agent)
    try:
        found = agent.think(prompts, 3)
        agent.drop_prefix()
        expected = agent.think(prompts, 3)
    finally:
        undo()
        agent.drop_prefix()
    assert torch.equal(found, expected) and not torch.allclose(found, before, atol=0.1)


@pytest.mark.parametrize("style", checkpoints.SYSTEMS)
def test_every_weight_is_there_under_its_name(folders, style):
    system = minimas.load_mas_system(style, checkpoints=folders(style), device="cpu")
    for role, agent in system.agents.items():
        state = agent.model.state_dict()
        assert set(state) == {
            name for name, _ in agent.model.named_parameters(remove_duplicate=False)
        }
        assert all(tensor.numel() for tensor in state.values()), role
        again = type(agent.model)(agent.model.config)
        again.load_state_dict(state)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_system_answers_alike(fast, copied):
    system = minimas.load_mas_system("tiny", device="cpu", fast=fast)
    expected = system.run([CHAIN, OTHER], keep_latents=True)
    again = copied(system)
    found = again.run([CHAIN, OTHER], keep_latents=True)
    for a, b in zip(expected, found, strict=True):
        assert a.token_ids == b.token_ids
        assert all(torch.equal(a.latents[key], b.latents[key]) for key in a.latents)
    assert again.agents["critic"].model is not system.agents["critic"].model
    assert copied(expected[0]).text == expected[0].text


def test_a_copy_of_graphs_captures_its_own(tiny):
    graphs = Graphs(tiny.agents["planner"].model)
    graphs.make_cache(2, 10)
    assert copy.deepcopy(graphs).base is None and graphs.base is not None


def test_gradients_reach_every_weight():
    system = minimas.load_mas_system("tiny", device="cpu")
    agent = system.agents["planner"]
    agent.model.requires_grad_(True)
    prompts = system.prompts_for("planner", system.style.questions([CHAIN]), {})
    H = agent.think(prompts, 2, gradient=True)
    agent.model.logits(H).logsumexp(-1).sum().backward()
    without = [name for name, p in agent.model.named_parameters() if p.grad is None]
    assert without == []


def test_the_fast_form_says_what_it_cannot_do():
    system = minimas.load_mas_system("tiny", device="cpu", fast=True)
    agent = system.agents["planner"]
    projection = agent.model.layers[0].self_attn.q_proj
    for method in "register_forward_hook", "register_forward_pre_hook":
        with pytest.raises(InputError, match="fast=False"):
            getattr(projection, method)(lambda *_: None)
    seen = []
    agent.model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
    system.run([CHAIN], rounds=1)
    assert seen, "what is not merged takes hooks"
    x = agent.model.embed(torch.tensor([[5]])).requires_grad_(True)
    with pytest.raises(InputError, match="fast=False"):
        agent.model(x, torch.zeros(1, 1, dtype=torch.long), agent.model.make_cache(1))


def test_the_fast_form_gives_no_state_dict_that_lacks_weights():
    system = minimas.load_mas_system("tiny", device="cpu", fast=True)
    model = system.agents["planner"].model
    links = [system.agents["planner"].inner_link, *system.outer_links.values()]
    for module in model, model.layers[0].self_attn.q_proj, model.layers[1].mlp, *links:
        for copied in module, copy.deepcopy(module):
            with pytest.raises(InputError, match="state_dict would lack them: .* fast=False"):
                copied.state_dict()
    assert list(model.norm.state_dict()) == ["weight"], "what is whole is given"


def test_an_offloaded_system_is_plain(tiny):
    system = minimas.load_mas_system("tiny", device="cpu", fast=True, offload=True)
    links = [agent.inner_link for agent in system.agents.values()] + [*system.outer_links.values()]
    assert {type(link) for link in links} == {InnerLink, OuterLink}
    assert system.agents["planner"].model.layers[0].self_attn.q_proj.weight is not None
    assert answers(system) == ["5"]


@pytest.mark.parametrize("plain", [False, True])
def test_plain_still_works_and_warns(plain):
    with pytest.warns(DeprecationWarning, match="fast="):
        system = minimas.load_mas_system("tiny", device="cpu", plain=plain)
    assert (system.agents["planner"].model.layers[0].self_attn.q_proj.weight is None) != plain


# Options and results


def test_every_setting_is_in_the_signature(tiny):
    parameters = inspect.signature(tiny.run).parameters
    assert {one.name for one in fields(Settings)} <= set(parameters)
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    with pytest.raises(TypeError):
        tiny.run([CHAIN], round=2)


def test_a_settings_object_and_options_over_it(tiny):
    settings = Settings(rounds=1, channel="text")
    (result,) = tiny.run([CHAIN], settings)
    assert (result.answer, result.rounds) == ("2", 1) and result.heard_tokens > 0
    (result,) = tiny.run([CHAIN], settings, rounds=2, channel="latent")
    assert (result.answer, result.rounds, result.heard_tokens) == ("9", 2, 0)
    with pytest.raises(InputError, match="rounds is 0"):
        tiny.run([CHAIN], settings, rounds=0)


def test_a_result_says_whether_it_was_retried(tiny, folders):
    style = "sequential_light"
    system = minimas.load_mas_system(style, checkpoints=folders(style), device="cpu")
    (retried,) = system.run(["1 + 1"], **OPTIONS | {"retry": True})
    (not_asked,) = system.run(["1 + 1"], **OPTIONS)
    (whole,) = tiny.run([CHAIN])
    assert [retried.retried, not_asked.retried, whole.retried] == [True, False, False]
    assert retried.new_tokens > not_asked.new_tokens == 3


def test_timings_have_names(tiny):
    (result,) = tiny.run([CHAIN], rounds=1, keep_states=True)
    assert list(result.timings) == list(result.prompts) == [(1, role) for role in tiny.style.order]
    assert sorted(result.timings.values()) == list(result.timings.values())
    assert result.stages == {
        key: (result.timings[key], result.prompts[key]) for key in result.prompts
    }


def test_results_can_be_compared(tiny, donor):
    again = tiny.run([OTHER], keep_states=True, keep_latents=True)[0]
    assert again == donor and again != tiny.run([CHAIN])[0]


def test_no_questions(tiny):
    assert tiny.run([]) == []
    assert tiny.answer([], Settings().completed(tiny.style)) == []


def test_tools_are_a_list(tiny):
    with pytest.raises(InputError, match=r"tools is 'python', expected a list .* \['python'\]"):
        tiny.run([CHAIN], tools="python")


def test_what_is_shown_fits_a_screen(tiny, donor):
    for shown in tiny, tiny.style, donor:
        lines = repr(shown).split("\n")
        assert len(lines) <= 25 and max(map(len, lines)) <= 240
    assert all(role in repr(tiny) for role in tiny.style.order) and "float32 on cpu" in repr(tiny)
    for role, family in (("planner", "Qwen3"), ("critic", "Llama"), ("solver", "Qwen2")):
        assert f"{role}: {family}, 2 layers" in repr(tiny)
        agent = tiny.agents[role]
        assert repr(agent).startswith(f"Agent({family}, 2 layers of width ")
        assert f"  {role}: {agent.summary()}\n" in repr(tiny)
    assert "planner" in donor._repr_html_() and donor._repr_html_().startswith("<iframe srcdoc=")
    (bare,) = tiny.run(["7 +5"])
    assert bare._repr_html_().startswith("<pre>")


@pytest.mark.parametrize(
    "questions, options, complaint",
    [
        ("7 +5", {}, "questions is one text: give a list of them"),
        ({"7 +5": "2"}, {}, "questions is {'7 .5': '2'}, expected a list of texts"),
        (None, {}, "questions is None, expected a list of texts"),
        (["7 +5"], {"dataset": 5}, "dataset is 5, expected a name"),
        (["7 +5"], {"fn_names": "f"}, "fn_names is 'f', expected a list"),
        (["7 +5"], {"fn_names": [5]}, "fn_names has 5, expected the name of a function"),
        (["7 +5"], {"fn_names": []}, "0 fn_names for 1 questions: give one for each"),
    ],
)
def test_what_is_no_list_of_questions(tiny, questions, options, complaint):
    with pytest.raises(InputError, match=complaint):
        tiny.run(questions, **options)


@pytest.mark.parametrize("question", ["7" + " +1" * 10000, b"7 +5" * 10000, "\ud800" * 10000])
def test_a_message_shows_the_beginning_of_a_long_question(tiny, question):
    with pytest.raises(InputError) as error:
        tiny.run([question])
    assert len(str(error.value)) < 300


# Changes of what agents hear


def test_states_before_the_outer_link(tiny, donor):
    """Replaced, or changed in place: what the others hear is made of the states as they are then."""

    def replaced(turn, questions):
        if (turn.round, turn.role) == (1, "solver"):
            turn.states = donor.states[1, "solver"][None]

    def in_place(turn, questions):
        if (turn.round, turn.role) == (1, "solver"):
            turn.states[0] = donor.states[1, "solver"]

    assert answers(tiny, replaced) == answers(tiny, in_place) == answers(tiny, None, [OTHER])


def test_latents_after_the_outer_link(tiny, donor):
    def patch(turn, questions):
        for edge in turn.sent:
            turn.sent[edge] = donor.latents[(turn.round, *edge)][None]

    assert answers(tiny, patch) == answers(tiny, None, [OTHER]) == ["4"]


@pytest.mark.parametrize("channel", ["latent", "text"])
def test_a_muted_edge_is_silence(tiny, channel):
    """Muted by name, deleted, or sent without latents: it is all the same, and never last round's message."""

    def muted(turn, questions):
        if turn.round == 2 and turn.role == "planner":
            turn.mute(EDGE)

    def deleted(turn, questions):
        if turn.round == 2 and turn.role == "planner":
            del turn.sent[EDGE]

    def nothing(turn, questions):
        if turn.round == 2 and turn.role == "planner":
            silent = [""] * len(questions) if channel == "text" else turn.sent[EDGE][:, :0]
            turn.sent[EDGE] = silent

    heard = []
    for edit in muted, deleted, nothing:

        def watched(turn, questions, edit=edit):
            edit(turn, questions)
            if (turn.round, turn.role) == (2, "critic"):
                heard.append(turn.prompts[0])

        found = answers(tiny, watched, channel=channel)
        assert found == answers(tiny, nothing, channel=channel) != ["5"]
    whole = tiny.run([CHAIN], channel=channel, keep_states=True)[0].prompts[2, "critic"]
    sizes = [sum(map(len, tiny.agents["critic"].tokens(prompt))) for prompt in [*heard, whole]]
    assert sizes[0] == sizes[1] == sizes[2] < sizes[3]


@pytest.mark.parametrize("channel", ("latent", "text"))
def test_a_question_that_is_stopped_is_answered_as_in_fewer_rounds(tiny, channel):
    """Among others that go on, whichever turn of the round stops it: nothing more is kept of it, or counted."""
    asked = [CHAIN, OTHER, "3 +1 *3"]
    options = {"channel": channel, "keep_latents": True, "keep_states": True}
    options["hear"] = (
        "solver>planner=none"  # the others hear nothing of what the stopped turn would have sent
    )
    fewer = tiny.run(asked, rounds=2, **options)[0]
    others = tiny.run(asked, rounds=3, **options)[1:]
    last = tiny.style.order[-1]
    for role in tiny.style.order:
        rows = []

        def stop_first(turn, questions, role=role, rows=rows):
            assert len(questions) == len(turn.rows) == len(turn.prompts)
            if (turn.round, turn.role) == (2, last):
                rows.append((turn.answers, turn.rows))
            if turn.round == 2 and turn.role == role and not turn.answers:
                turn.stop([0])

        stopped, *found = tiny.run(asked, rounds=3, edit=stop_first, **options)
        if role == last:
            assert rows == [(False, [0, 1, 2]), (True, [0])]
        else:
            assert rows == [(True, [0]), (False, [1, 2])], "it does not think for nobody"
        assert [result.rounds for result in (stopped, *found)] == [2, 3, 3]
        assert stopped.token_ids == fewer.token_ids
        assert [result.text for result in found] == [result.text for result in others]
        assert stopped.heard_tokens == fewer.heard_tokens
        assert stopped.replaced == fewer.replaced
        for name in "latents", "states", "timings", "prompts":
            assert getattr(stopped, name).keys() == getattr(fewer, name).keys(), name
        for key, states in fewer.states.items():
            assert torch.allclose(stopped.states[key], states, atol=1e-4)
        for key, message in fewer.latents.items():
            if channel == "text":
                assert stopped.latents[key] == message
            else:
                assert torch.allclose(stopped.latents[key], message, atol=1e-4)


@pytest.mark.parametrize("channel", ("latent", "text"))
def test_a_question_that_is_dropped_is_not_answered(tiny, channel):
    """It leaves the batch after that turn, whichever that is, and the others are answered as before."""
    asked = [CHAIN, OTHER, "3 +1 *3", "1 +1 *3"]
    expected = tiny.run(asked, rounds=3, channel=channel)
    for role in tiny.style.order:
        rows = []

        def drop_second(turn, questions, role=role, rows=rows):
            rows.append(turn.rows)
            if (turn.round, turn.role) == (2, role) and not turn.answers:
                turn.drop([1])
                turn.stop([1, 3])

        results = tiny.run(asked, rounds=3, channel=channel, edit=drop_second)
        turns = tiny.style.order.index(role) + 1 + len(tiny.style.order)
        assert rows[:turns] == [[0, 1, 2, 3]] * turns and [1] not in rows[turns:]
        assert all(1 not in own for own in rows[turns:])
        assert {result.question: result.rounds for result in results} == {
            asked[0]: 3, asked[2]: 3, asked[3]: 2,
        }  # fmt: skip
        texts = {result.question: result.text for result in results}
        assert all(texts[expected[i].question] == expected[i].text for i in (0, 2))


def test_all_may_be_dropped(tiny):
    for number in (1, 4):
        turns = []

        def drop(turn, questions, number=number, turns=turns):
            turns.append(turn)
            if len(turns) == number:
                turn.drop()

        assert tiny.run([CHAIN, OTHER], rounds=3, edit=drop) == [] and len(turns) == number


def test_a_question_whose_thoughts_settle_is_done(tiny):
    """Chains of one round and of three: each takes a round more than it needs."""
    before = {}

    def settled(turn, questions):
        if turn.role != "solver" or turn.answers:
            return
        same = []
        for i, question in enumerate(questions):
            thought = turn.states[i].flatten()
            last = before.get(question.text)
            if last is not None and torch.cosine_similarity(thought, last, 0) > 0.999:
                same.append(i)
            before[question.text] = thought
        turn.stop(same)

    results = tiny.run(["3 +1 *3", CHAIN], rounds=5, edit=settled)
    assert [(result.answer, result.rounds) for result in results] == [("2", 3), ("5", 4)]


def test_all_may_stop_at_once(tiny):
    def stop(turn, questions):
        turn.stop()

    assert [result.rounds for result in tiny.run([CHAIN, OTHER], rounds=3, edit=stop)] == [1, 1]


def read_already(turn):
    turn.prompts[0] = ["something else"]


def sent_already(turn):
    assert turn.sent
    turn.states = turn.states + 1


def sent_already_in_place(turn):
    assert turn.sent
    turn.states += 1


def to_nobody(turn):
    turn.sent["critic", "planner"] = turn.states


def too_few(turn):
    turn.sent[EDGE] = turn.sent[EDGE][:0]


def swapped(turn):
    """The states of before are let go of first, so that those that follow could have their place in memory."""
    assert turn.sent
    shape = turn.states.shape
    turn.states = None
    turn.states = torch.zeros(shape)


def sends(message):
    def change(turn):
        turn.sent[EDGE] = message(turn) if callable(message) else message

    return change


def sends_all(messages):
    def change(turn):
        turn.sent = messages

    return change


def thinks(states):
    def change(turn):
        turn.states = states(turn) if callable(states) else states
        assert turn.sent

    return change


@pytest.mark.parametrize(
    "change, complaint",
    [
        (sends(None), "is None, expected a tensor or a list"),
        (sends(["hello"]), r"holds 'hello', expected latents \(m, 128\)"),
        (sends(torch.tensor(1.0)), "holds 0 messages, expected one for each of 1"),
        (
            sends(lambda turn: turn.sent[EDGE].long()),
            r"holds Tensor \(5, 128\) of int64, expected latents \(m, 128\) of floats",
        ),
        (
            sends(lambda turn: turn.sent[EDGE].numpy()),
            r"is ndarray \(1, 5, 128\) of float32, expected a tensor or a list",
        ),
        (
            sends(lambda turn: turn.sent[EDGE] * float("nan")),
            r"round 1, planner: turn.sent\[.*\] holds numbers that are not finite",
        ),
        (
            thinks(lambda turn: turn.states / 0),
            "round 1, planner: turn.states holds numbers that are not finite",
        ),
        (thinks(None), r"turn.states was set to None.*turn.mute\(\)"),
        (sends_all([]), r"turn.sent was set to \[\], expected a dict"),
        (sends_all(None), "turn.sent was set to None, expected a dict.*mute the edges"),
        (
            thinks(lambda turn: turn.states.numpy()),
            r"is ndarray \(1, 5, 96\) of float32, expected a",
        ),
        (thinks("hello"), "turn.states is 'hello', expected a tensor or a list"),
        (
            thinks(lambda turn: turn.states[..., :5]),
            r"turn.states holds Tensor \(5, 5\) of float32",
        ),
        (lambda turn: turn.stop([False]), "stop takes the indices of questions, and False is"),
        (lambda turn: turn.drop(torch.tensor([True])), "drop takes the indices of questions, and"),
        (read_already, "prompts were changed, but they have been read"),
        (sent_already, "states were changed, but turn.sent was made of them"),
        (sent_already_in_place, "states were changed, but turn.sent was made of them"),
        (to_nobody, "nobody hears it"),
        (too_few, "holds 0 messages, expected one for each of 1"),
        (lambda turn: turn.mute(("critic", "solver")), "planner has no edge"),
        (lambda turn: turn.stop([1]), "no question 1 to stop"),
        (lambda turn: turn.drop([1]), "no question 1 to drop"),
        (
            lambda turn: turn.stop(0),
            "stop takes the indices of questions in a list, and was given 0",
        ),
        (
            lambda turn: turn.mute([EDGE]),
            "planner has no edge .* to mute, expected one of: " + NAMED,
        ),
        (lambda turn: turn.mute(list(EDGE)), "no edge .* to mute, expected one of: " + NAMED),
        (lambda turn: setattr(turn, "state", turn.states), "turn.state cannot be set: set turn.st"),
        (lambda turn: setattr(turn, "role", "critic"), "turn.role cannot be set"),
        (lambda turn: setattr(turn, "answers", True), "turn.answers cannot be set"),
        (lambda turn: turn.rows.pop(), "turn.rows were changed: call stop or drop"),
        (lambda turn: turn.stopped.add(9), "turn.stopped or turn.dropped were changed"),
        (swapped, "states were changed, but turn.sent was made of them"),
    ],
)
def test_a_change_that_cannot_take_effect_is_refused(tiny, change, complaint):
    def edit(turn, questions):
        if turn.role == "planner":
            change(turn)

    with pytest.raises(InputError, match=complaint):
        tiny.run([CHAIN], rounds=1, edit=edit)


def test_without_an_edge_all_are_muted(tiny):
    asked = [CHAIN, "1 +1 *3"]
    muted = tiny.run(asked, keep_latents=True, edit=lambda turn, questions: turn.mute())
    silent = tiny.run(asked, keep_latents=True, hear="none")
    assert [result.text for result in muted] == [result.text for result in silent]
    assert all(len(latents) == 0 for latents in muted[0].latents.values())


def test_what_run_cannot_use_is_refused(tiny):
    for given in {"edit": None}, {"fn_names": [None]}, {"fn_names": [""]}:
        assert tiny.run([CHAIN], **given)[0].text == tiny.run([CHAIN])[0].text
    for given, complaint in (
        ({"edit": 3}, "edit is 3, expected a function of a turn"),
        ({"settings": {"rounds": 1}}, "settings is .*, expected a Settings object"),
        ({"tools": 3}, "tools is 3, expected a list of names"),
        ({"fn_names": ["f"]}, "fn_names has 'f', but the task is math"),
    ):
        with pytest.raises(InputError, match=complaint):
            tiny.run([CHAIN], **given)


def test_an_edit_finds_a_question_in_the_list_that_was_asked(tiny):
    """In whichever batch it is, and if it was asked twice. What it does with the list of its questions is its own."""
    asked = [CHAIN, "1 +1 *3", CHAIN, "3 *7 *9", "1 +1 *3"]
    found = set()

    def edit(turn, questions):
        for question in questions:
            found.add((question.index, question.typed))
        questions.clear()

    texts = [result.text for result in tiny.run(asked, batch_size=2, edit=edit)]
    assert texts == [result.text for result in tiny.run(asked)]
    assert found == set(enumerate(asked))


def test_a_question_cannot_be_dropped_while_it_is_answered(tiny):
    def edit(turn, questions):
        if turn.answers:
            turn.drop()

    with pytest.raises(InputError, match="round 1, solver: this turn answers"):
        tiny.run([CHAIN], rounds=1, edit=edit)


def test_inference_mode(tiny):
    """In which torch counts no changes of a tensor."""
    with torch.inference_mode():
        assert answers(tiny, None) == ["5"]
    assert answers(tiny, None) == ["5"]


def test_texts_have_no_states_to_change(tiny):
    def edit(turn, questions):
        if not turn.answers:
            turn.states = torch.zeros(1, 2, 3)

    with pytest.raises(InputError, match="it has none to send"):
        tiny.run([CHAIN], channel="text", edit=edit)


def test_the_prompt_of_the_answer_may_be_changed(tiny):
    """It is read after the turn was shown."""
    said = []

    def edit(turn, questions):
        if turn.answers:
            turn.prompts = [
                tiny.agents["solver"].tokenizer.chat("", "tiny 7 a+5 notes a+5=2.")
                for _ in questions
            ]
            turn.prompts = [[text] for text in turn.prompts]
            said.append(turn.role)

    changed = tiny.run([CHAIN], edit=edit, retry=False)[0]
    assert said == ["solver"] and changed.token_ids != tiny.run([CHAIN])[0].token_ids


@pytest.mark.parametrize(
    "prompts, complaint",
    [
        (lambda prompts: prompts[:1], "turn.prompts holds 1 prompts, expected one for each of 2"),
        (lambda prompts: "text", "turn.prompts is 'text', expected a tensor or a list"),
        (lambda prompts: [*prompts[:1], "text"], "turn.prompts holds 'text', expected lists of"),
        (lambda prompts: [*prompts[:1], []], "turn.prompts holds an empty one"),
        (lambda prompts: [*prompts[:1], [5]], "turn.prompts holds 5, expected texts, token ids"),
        (
            lambda prompts: [*prompts[:1], [torch.zeros(2, 3)]],
            r"turn.prompts holds Tensor \(2, 3\) of float32, expected texts, .* latents \(m, \d+\) of",
        ),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(tiny, prompts, complaint):
    def edit(turn, questions):
        if turn.answers:
            turn.prompts = prompts(turn.prompts)

    with pytest.raises(InputError, match=complaint):
        tiny.run([CHAIN, OTHER], rounds=1, edit=edit)


def test_each_agent_checks_the_ids_that_it_embeds(tiny):
    """Also where a tokenizer is another agent's too, and the ids come from an edit."""
    agent = copy.copy(tiny.agents["solver"])
    agent.model = copy.deepcopy(agent.model)
    agent.model.config = replace(agent.model.config, vocab_size=10)
    with pytest.raises(InputError, match="has token 44, .* embeddings for 10: fetch"):
        agent.read([[torch.tensor([3, 44])]])
    tiny.agents["solver"].read([[torch.tensor([3, 44])]])
    with pytest.raises(InputError, match="token ids hold -1, expected 0 to"):
        tiny.agents["solver"].read([[torch.tensor([-1, 44])]])


# Threads


class Worker:
    """A thread that does one thing after another, as those of a web framework."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(1)

    def start(self, task):
        return self.pool.submit(task)

    def do(self, task):
        return self.start(task).result(60)


def test_a_text_may_be_taken_by_one_thread_after_another(tiny):
    """As a web framework iterates: what one thread began another one ends. Who asks meanwhile waits, each of them."""
    first, second, third = Worker(), Worker(), Worker()
    settings = Settings(retry=False).completed(tiny.style)
    pieces = tiny.write(tiny.style.questions([CHAIN]), settings)
    first.do(lambda: next(pieces))
    with pytest.raises(InputError, match="this system is writing a text"):
        first.do(lambda: answers(tiny))
    second.do(lambda: next(pieces))
    waiting = [worker.start(lambda: answers(tiny)) for worker in (first, third)]
    done, _ = wait(waiting, timeout=1)
    assert not done
    found = second.do(lambda: list(pieces))
    assert found[-1].result.answer == "5"
    assert [one.result(60) for one in waiting] == [["5"], ["5"]]


def test_an_edit_may_ask_where_another_thread_goes_on(tiny):
    """A question that is stopped in round 1 is written then; the other one goes on, and an edit asks for a third."""
    first, second, third = Worker(), Worker(), Worker()
    asked = []
    started = []

    def edit(turn, questions):
        if turn.round == 1 and turn.role == "planner":
            turn.stop([0])
        if turn.round == 2 and turn.role == "planner":
            for worker in (first, third):
                started.append(worker.start(lambda: answers(tiny)))
            done, _ = wait(started, timeout=1)
            assert not done
            asked.extend(answers(tiny, questions=[OTHER]))

    settings = Settings().completed(tiny.style)
    pieces = tiny.write(tiny.style.questions([CHAIN, CHAIN]), settings, edit=edit)
    first.do(lambda: next(pieces))
    found = second.do(lambda: list(pieces))
    assert [new.result.answer for new in found if new.result] == ["2", "5"]
    assert asked == ["4"]
    assert [one.result(60) for one in started] == [["5"], ["5"]]


def test_a_system_that_writes_refuses_its_own_thread(tiny):
    """It writes into its agents' memory. Between two turns it may be asked something else."""
    settings = Settings().completed(tiny.style)
    pieces = tiny.write(tiny.style.questions([CHAIN]), settings)
    next(pieces)
    with pytest.raises(InputError, match="this system is writing a text"):
        tiny.run([OTHER])
    pieces.close()
    assert tiny.lock.holder is None

    def wanted(question, rollout):
        tiny.run([OTHER])

    with pytest.raises(InputError, match="this system is writing a text"):
        list(tiny.write(tiny.style.questions([CHAIN]), settings, wanted=wanted))
    assert answers(tiny) == ["5"]


def test_a_question_made_by_hand_is_in_its_result(tiny):
    settings = Settings(rounds=1).completed(tiny.style)
    (result,) = tiny.answer([Question(CHAIN)], settings)
    assert result.question == CHAIN


def test_nothing_is_printed(tiny, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.run([CHAIN], keep_states=True)
    assert capsys.readouterr() == ("", "")
