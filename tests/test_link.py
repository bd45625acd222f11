import pickle

import checkpoints
import pytest
import torch

from minimas import InputError
from minimas.link import InnerLink, OuterLink
from minimas.load import load_link
from minimas.train.save import save_link


def test_formulas_term_by_term():
    """Both links against their formulas in float64, written without torch.nn."""

    def norm(x, state, name):
        mean = x.mean(-1, keepdim=True)
        std = (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return (x - mean) / std * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, state, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    h = torch.randn(3, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    inner = checkpoints.randomize(InnerLink(12), 1, 0.3).double()
    s = inner.state_dict()
    y = linear(gelu(linear(norm(h, s, "pre_ln"), s, "proj1")), s, "proj2")
    assert torch.allclose(inner(h), norm(h + y, s, "post_ln"), atol=1e-12)

    outer = checkpoints.randomize(OuterLink(12, 7), 2, 0.3).double()
    s = outer.state_dict()
    y = linear(gelu(linear(norm(h, s, "ln_source"), s, "proj1")), s, "proj2")
    y = y + linear(h, s, "residual_proj")
    assert torch.allclose(outer(h), norm(y, s, "ln_target"), atol=1e-12)


@pytest.mark.parametrize(
    "kind, widths, released",
    [
        (InnerLink, (2048,), 16_805_005 - 3_213),
        (OuterLink, (2560, 2560), 65_581_269 - 4_309),
        (OuterLink, (1536, 2048), 35_686_613 - 4_309),
        (OuterLink, (4096, 2048), 67_154_133 - 4_309),
    ],
)
def test_sizes_are_those_of_the_released_files(kind, widths, released):
    with torch.device("meta"):
        link = kind(*widths)
    assert 2 * sum(t.numel() for t in link.state_dict().values()) == released


def test_saved_and_loaded(tmp_path):
    link = checkpoints.randomize(OuterLink(12, 7), 3, 0.3)
    save_link(link, tmp_path / "link.pt")
    state = torch.load(tmp_path / "link.pt", weights_only=True)
    modules = ("proj1", "proj2", "residual_proj", "ln_source", "ln_target")
    assert set(state) == {f"{m}.{p}" for m in modules for p in ("weight", "bias")}
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert [file.name for file in tmp_path.iterdir()] == ["link.pt"]
    loaded = load_link(OuterLink(12, 7), tmp_path / "link.pt")
    h = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    assert loaded(h).dtype == torch.bfloat16, "a link computes in the dtype of its file"
    assert torch.equal(loaded(h), link.bfloat16()(h))


class Trap:
    def __reduce__(self):
        return open, ("/dev/null",)


def nested():
    """A nested tensor, made when it is needed: torch imports its compiler for it, which takes two seconds."""
    return torch.nested.nested_tensor([torch.ones(3)] * 2, layout=torch.jagged)


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "not a readable state dict"),
        (b"not a pickle", "not a readable state dict"),
        (pickle.dumps(Trap(), 2), "not a readable state dict"),
        (Trap(), "not a readable state dict"),
        ([1, 2], "not a plain state dict"),
        ({"proj1.weight": torch.ones(3, 3)}, 'Missing key.*"post_ln.bias"'),
        ({**InnerLink(6).state_dict(), "more": torch.ones(1)}, 'Unexpected key.*"more"'),
        (InnerLink(5).state_dict(), "size mismatch for pre_ln.weight"),
        ({k: t.long() for k, t in InnerLink(6).state_dict().items()}, "floating"),
        ({**InnerLink(6).state_dict(), 5: torch.ones(1)}, "wrong: 5"),
        (
            {k: t.to(torch.float8_e4m3fn) for k, t in InnerLink(6).state_dict().items()},
            "wrong: 'pre_ln.weight'",
        ),
        *[
            ({**InnerLink(6).state_dict(), "proj1.bias": bad}, "wrong: 'proj1.bias'")
            for bad in (
                torch.ones(6).to_sparse(),
                torch.ones(6, device="meta"),
                [1.0],
                nested,
                torch.tensor([0, 0, 0, 0, 0, float("nan")]),
                torch.tensor([0, 0, 0, 0, 0, float("-inf")]),
            )
        ],
    ],
)
def test_bad_files_are_told_and_never_run(tmp_path, content, complaint):
    if isinstance(content, dict):
        content = {key: value() if value is nested else value for key, value in content.items()}
    file = tmp_path / "adapter.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(InputError, match=complaint) as told:
        load_link(InnerLink(6), file)
    assert str(file) in str(told.value)


def test_truncated(tmp_path):
    file = tmp_path / "adapter.pt"
    save_link(InnerLink(6), file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(InputError, match="fetch the file again"):
        load_link(InnerLink(6), file)
