"""The loss fused with the head in training and evaluation: the losses and gradients of the model's own logits, for
every architecture that takes it, joint as alone; which do not, and how that is said; what stands in memory."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from finetuna_lightning.adapters import AdapterBank
from finetuna_lightning.backbone import quantize_model_
from finetuna_lightning.configs import AdapterConfig
from finetuna_lightning.nn.routing import Route
from finetuna_lightning.ops import loss as fused
from finetuna_lightning.simulation import fake_mode, to_fake_
from finetuna_lightning.training.batches import by_adapter, collate
from finetuna_lightning.training.head import HeadInput
from finetuna_lightning.training.losses import adapter_losses
from finetuna_lightning.training.module import MultiAdapterModule
from finetuna_lightning.training.tokenizing import IGNORED, Example
from tests.helpers.models import VOCAB_SIZE, excite, plain_net, tiny_config, tiny_model
from tests.helpers.sizes import Sizes
from tests.helpers.tiny import Batches, tiny_fit

Results = tuple[dict[str, Tensor], dict[str, Tensor]]

TARGETS = {"gpt2": ["c_attn", "wte"], "opt": ["q_proj"], "gptj": ["q_proj"], "falcon": ["query_key_value"]}
LENGTHS = {"sql": [7, 1, 13], "legal": [3, 9], "code": [11]}


def model_of(name: str, **more: Any) -> nn.Module:
    if name in ("gemma2", "cohere", "granite"):
        made = getattr(
            transformers, {"gemma2": "Gemma2Config", "cohere": "CohereConfig", "granite": "GraniteConfig"}[name]
        )
        sizes = dict(vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=8, bos_token_id=1, eos_token_id=2,
                     pad_token_id=0)  # fmt: skip
        if name != "gemma2":
            del sizes["head_dim"]
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(made(**sizes | more)).eval()
    return tiny_model(name, scale=3.0, **more)


def bert() -> nn.Module:
    """A language model whose head lies within another module."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(tiny_config("bert", is_decoder=True)).eval()


def module_of(name: str, scheme: str | None = None, head: str = "", dtype: torch.dtype | None = None, **options: Any
              ) -> MultiAdapterModule:  # fmt: skip
    """Adapters ``sql``, ``legal`` and ``code``; ``head``: what ``legal`` has on it, ``plain`` or ``lora``."""
    model = model_of(name, **options.pop("model", {}))
    if dtype is not None:
        model = model.to(dtype)
    if scheme:
        quantize_model_(model, scheme, 64, [])
    targets = TARGETS.get(name, ["q_proj", "embed_tokens"])
    legal: dict[str, Any] = {"plain": dict(plain_modules=["lm_head"]), "lora": {}, "": {}}[head]
    configs = {
        "sql": AdapterConfig(rank=4, target_modules=targets),
        "legal": AdapterConfig(
            rank=2, target_modules=[*targets, *["lm_head"] * (head == "lora")], **legal, dropout=0.3
        ),
        "code": AdapterConfig(rank=1, target_modules=targets[-1:]),
    }
    module = MultiAdapterModule(model, configs, **options)
    excite(module.adapters, std=0.1)
    return module.train()


def batch_of(packed: bool, names: tuple[str, ...] = ("sql", "legal", "code")) -> Any:
    generator = torch.Generator().manual_seed(3)
    made = {}
    for name, lengths in LENGTHS.items():
        ids = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator) for length in lengths]
        made[name] = [Example(row, row.clone()) for row in ids]
    made["sql"][2].labels[:6] = IGNORED  # type: ignore[index]
    return collate({name: made[name] for name in names}, packed=packed)


def results(module: MultiAdapterModule, output: Any, batch: Any) -> Results:
    """Each adapter's mean loss, and the gradients of all."""
    losses = {name: total / count for name, total, count, _ in module.losses(output, batch)}
    torch.stack(list(losses.values())).sum().backward()
    return (
        {name: value.detach() for name, value in losses.items()},
        {name: p.grad for name, p in module.adapters.named_parameters() if p.grad is not None},
    )


def both_roads(make: Any, batch: Any) -> tuple[Results, Results]:
    """With the head fused into the loss, and from the model's own logits."""
    module, other = make(), make()
    output = module._for_losses(batch, training=True)
    parts = [part for part, _ in output.parts] if module.deterministic else [output]
    assert any(isinstance(part, HeadInput) for part in parts), module.fused_loss_obstacle()
    return results(module, output, batch), results(other, other(batch, training=True), batch)


def assert_alike(one: Results, other: Results, tolerance: float = 1e-6) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys() != set()
        for key, value in mine.items():
            distance = float((value - theirs[key]).norm() / theirs[key].norm())
            assert distance < tolerance, (key, distance)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head", ["", "plain", "lora"])
@pytest.mark.parametrize("scheme", [None, "int8", "int8-blockwise", "fp8"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_losses_and_gradients_are_those_of_the_logits(name: str, scheme: str | None, head: str, packed: bool) -> None:
    """Also where an adapter trains a head of its own, with dropout, beside the others."""
    if head == "lora" and name == "gpt2":
        pytest.skip("the head is the embedding's own matrix, which has a delta already")
    assert_alike(*both_roads(lambda: module_of(name, scheme, head), batch_of(packed)), tolerance=5e-6)


def test_a_head_that_computes_in_8_bits_is_fused_too() -> None:
    """Its own logits are as far from the truth as 8 bits are; the loss is computed from 8-bit storage, not in it."""
    module = module_of("llama", "int8")
    module.adapters.backbone.lm_head.quantized.compute = "int8"
    assert module.fused_loss_obstacle() is None


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3", "opt", "gptj", "falcon", "granite", "cohere", "gemma2"])
def test_every_architecture_whose_logits_come_from_the_head_alone(name: str) -> None:
    """Those with a scale after the head too, and Gemma without its soft cap."""
    more = {"final_logit_softcapping": None} if name == "gemma2" else {}
    assert_alike(*both_roads(lambda: module_of(name, model=more), batch_of(False)), tolerance=5e-6)


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("name", ["llama", "opt", "falcon", "granite", "cohere", "gemma2"])
def test_what_is_assumed_without_values_is_what_trying_finds(name: str, cap: float | None) -> None:
    """Whether the head can be left out, and whether its output comes out of the model as it is."""
    more = {"final_logit_softcapping": cap} if name == "gemma2" else {}
    more |= {"logits_scaling": 4.0} if name == "granite" else {}
    tried, assumed = module_of(name, model=more)._fused_head(), module_of(name, model=more)._fused_head()
    model = assumed._backbone
    with fake_mode():
        to_fake_(model, torch.device("cpu"))
        ids = torch.zeros(2, 5, dtype=torch.int64)
        with assumed._bank.bare():
            assumed.assume(lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits)
    assert assumed.obstacle() == tried.obstacle()
    assert (assumed.obstacle() is None) == (name != "gemma2" or cap is None)
    assert assumed._passes_on == tried._passes_on == (assumed.obstacle() is None and name not in ("granite", "cohere"))


def test_in_the_deterministic_mode_every_adapter_has_a_pass_of_its_own() -> None:
    for packed in (False, True):
        assert_alike(*both_roads(lambda: module_of("llama", head="plain", deterministic=True), batch_of(packed)), 5e-6)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head", ["", "plain"])
def test_joint_is_as_alone(packed: bool, head: str, deterministic: bool) -> None:
    batch = batch_of(packed)
    module = module_of("llama", "int8", head, deterministic=deterministic)
    losses, gradients = results(module, module._for_losses(batch, training=True), batch)
    for name, part in zip(LENGTHS, by_adapter(batch), strict=True):
        alone = module_of("llama", "int8", head, deterministic=deterministic)
        own, own_gradients = results(alone, alone._for_losses(part, training=True), part)
        joint = {key: value for key, value in gradients.items() if key.startswith(name + ".")}
        if deterministic:
            assert torch.equal(losses[name], own[name])
            assert all(torch.equal(value, own_gradients[key]) for key, value in joint.items())
        assert_alike(({name: losses[name]}, joint), (own, own_gradients), 1e-5)


def test_an_adapter_s_tokens_are_summed_in_64_bits() -> None:
    """2^24 + 1 is 2^24 in float32, so that the order would show in the sum: with a head of two classes whose logits are
    h and 0, the loss of the second is the softplus of h."""
    head = nn.Linear(1, 2, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[1.0], [0.0]]))
    hidden = torch.full((1, 17, 1), math.log(math.e - 1))
    hidden[0, 0] = 2.0**24
    labels = torch.ones(1, 18, dtype=torch.long)
    batch = {"labels": labels, "adapters": ["a"], "rows": [1]}
    output = HeadInput(torch.cat([hidden, hidden[:, 1:2]], 1), {}, head, Route(("a",), (1,)), AdapterBank(head))
    ((_, total, count, _),) = adapter_losses(output, batch, "causal-lm")
    assert float(total) == 2.0**24 + 16 and int(count) == 17 and total.dtype == torch.float32


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("culprit", list(LENGTHS))
@pytest.mark.parametrize("head", ["", "plain"])
def test_a_neighbours_nan_changes_no_bit_of_the_others(packed: bool, culprit: str, head: str) -> None:
    found = []
    for spoil in (False, True):
        module, batch = module_of("llama", head=head), batch_of(packed)
        if spoil:
            with torch.no_grad():
                for parameter in module.adapters[culprit].parameters():
                    parameter.fill_(torch.nan)
        found.append(results(module, module._for_losses(batch, training=True), batch))
    (losses, gradients), (spoilt_losses, spoilt) = found
    assert bool(spoilt_losses[culprit].isnan())
    for other in LENGTHS.keys() - {culprit}:
        assert torch.equal(spoilt_losses[other], losses[other])
        assert all(torch.equal(spoilt[k], g) for k, g in gradients.items() if k.startswith(other + "."))


def test_the_logits_of_a_pass_without_the_head_are_there_when_asked_for() -> None:
    for packed in (False, True):
        for head in ("", "plain", "lora"):
            module, batch = module_of("llama", "int8", head).eval(), batch_of(packed)
            with torch.no_grad():
                output = module._for_losses(batch)
                assert isinstance(output, HeadInput)
                assert torch.allclose(output.logits, module(batch).logits, atol=1e-5, rtol=1e-5)


# ---- who takes it ---------------------------------------------------------------------------------------------------


def obstacle(module: MultiAdapterModule, batch: Any) -> str:
    """Why the loss comes from logits; that it does is looked at too."""
    assert not isinstance(module._for_losses(batch, training=True), HeadInput)
    return module.fused_loss_obstacle() or ""


@pytest.mark.parametrize("cap", [1.0, 30.0, 3000.0])
def test_a_soft_cap_is_noticed_and_said_once(cap: float, caplog: pytest.LogCaptureFixture) -> None:
    """Also where the random model's small logits would hardly show it."""
    module = module_of("gemma2", model={"final_logit_softcapping": cap})
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        assert obstacle(module, batch_of(False)) == "it does more to its logits than to scale them"
        results(module, module._for_losses(batch_of(False), training=True), batch_of(False))
    assert caplog.text.count("the loss is computed from whole logits") == 1


class OwnHead(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sin()


class NoLinear(nn.Module):
    out_features = VOCAB_SIZE

    def forward(self, input: Tensor) -> Tensor:
        return input @ torch.ones(32, VOCAB_SIZE)


def test_a_head_of_another_kind_is_noticed() -> None:
    model = model_of("llama")
    model.lm_head.__class__ = OwnHead
    module = MultiAdapterModule(model, {"sql": AdapterConfig(rank=2, target_modules=["q_proj"])})
    assert "are not those from its logits" in obstacle(module, batch_of(False, ("sql",)))
    model = model_of("llama")
    model.lm_head = NoLinear()
    module = MultiAdapterModule(model, {"sql": AdapterConfig(rank=2, target_modules=["q_proj"])})
    assert "its output head is a NoLinear" in obstacle(module, batch_of(False, ("sql",)))


def test_a_head_that_is_not_called_is_noticed() -> None:
    model = model_of("llama")
    apart = nn.Linear(32, VOCAB_SIZE).requires_grad_(False)
    model.get_output_embeddings = lambda: apart
    module = MultiAdapterModule(model, {"sql": AdapterConfig(rank=2, target_modules=["q_proj"])})
    assert "its output head meets []" in obstacle(module, batch_of(False, ("sql",)))


def test_a_hook_on_the_head_gets_the_logits() -> None:
    module, batch = module_of("llama"), batch_of(False)
    assert isinstance(module._for_losses(batch, training=True), HeadInput)
    seen: list[Tensor] = []
    handle = module.backbone.lm_head.register_forward_hook(lambda _, __, out: seen.append(out))
    assert obstacle(module, batch) == "a hook on the output head waits for logits"
    assert seen[0].shape[-1] == VOCAB_SIZE
    handle.remove()
    assert module.fused_loss_obstacle() is None


def test_a_head_put_in_the_place_of_another_is_tried_again() -> None:
    module, batch = module_of("llama"), batch_of(False)
    assert isinstance(module._for_losses(batch, training=True), HeadInput)
    module.backbone.lm_head = nn.Linear(32, VOCAB_SIZE)
    assert obstacle(module, batch) == "its output head is not frozen"
    module.backbone.lm_head.requires_grad_(False)
    output = module._for_losses(batch)
    assert isinstance(output, HeadInput) and torch.allclose(output.logits, module(batch).logits, atol=1e-5)
    module.backbone.lm_head = NoLinear()
    assert "its output head is a NoLinear" in obstacle(module, batch)


def test_where_all_have_heads_of_their_own_nothing_is_fused() -> None:
    module = module_of("llama", head="plain")
    assert not isinstance(module._for_losses(batch_of(False, ("legal",)), training=True), HeadInput)
    assert isinstance(module._for_losses(batch_of(False, ("legal", "code")), training=True), HeadInput)


def test_beside_a_scaled_head_one_of_an_adapter_s_own_takes_the_ordinary_road() -> None:
    """Its logits would be scaled twice or not at all."""
    module, batch = module_of("granite", head="plain", model={"logits_scaling": 4.0}), batch_of(False)
    assert module.fused_loss_obstacle() is None
    assert not isinstance(module._for_losses(batch, training=True), HeadInput)
    assert isinstance(module._for_losses(batch_of(False, ("sql", "code")), training=True), HeadInput)


def test_a_copy_of_what_is_around_the_head_is_noticed() -> None:
    """Its head is another module, which gives logits."""
    configs = {
        "sql": AdapterConfig(rank=2, target_modules=["query"]),
        "legal": AdapterConfig(rank=2, target_modules=["query"], plain_modules=["cls"]),
    }
    module = MultiAdapterModule(bert(), configs)
    assert module.fused_loss_obstacle() is None
    assert isinstance(module._for_losses(batch_of(False, ("sql",)), training=True), HeadInput)
    both = batch_of(False, ("sql", "legal"))
    output = module._for_losses(both, training=True)
    assert not isinstance(output, HeadInput)
    assert len(list(module.losses(output, both))) == 2


def test_logits_in_32_bits_are_still_fused_in_16() -> None:
    """Some models cast their logits, which here are hidden states."""
    model = model_of("llama").bfloat16()
    own = model.forward

    def forward(**inputs: Any) -> Any:
        out = own(**inputs)
        out.logits = out.logits.float()
        return out

    model.forward = forward
    module = MultiAdapterModule(model, {"sql": AdapterConfig(rank=2, target_modules=["q_proj"])})
    output = module._for_losses(batch_of(False, ("sql",)), training=True)
    assert isinstance(output, HeadInput) and output.hidden.dtype == torch.bfloat16


def test_other_tasks_have_their_reason() -> None:
    module = MultiAdapterModule(plain_net(), {"a": AdapterConfig(rank=2)}, loss=lambda output, batch: output.sum())
    assert "the task is 'custom'" in str(module.fused_loss_obstacle())


def test_a_users_own_pass_gives_logits() -> None:
    module, batch = module_of("llama"), batch_of(True)
    module._for_losses(batch, training=True)
    output = module(batch)
    assert not isinstance(output, HeadInput)
    assert output.logits.shape == (1, sum(map(sum, LENGTHS.values())), VOCAB_SIZE)
    assert "forward" not in module.backbone.lm_head.__dict__


def test_a_failed_pass_leaves_the_head_as_it_was() -> None:
    module, batch = module_of("llama"), batch_of(False)
    batch["input_ids"][0, 0] = VOCAB_SIZE
    with pytest.raises(IndexError):
        module._for_losses(batch, training=True)
    assert "forward" not in module.backbone.lm_head.__dict__
    assert not isinstance(module(batch_of(False)), HeadInput)


class Bare(MultiAdapterModule):
    def forward(self, batch: Any, training: bool = False, bare: bool = False) -> Any:
        return super().forward(batch, training, bare=True)


def test_a_pass_without_adapters_keeps_its_head() -> None:
    """Which no route leads past: that of a class of the user's, say, that evaluates the backbone."""
    module = Bare(model_of("llama"), {"sql": AdapterConfig(rank=2, target_modules=["q_proj"])})
    assert not isinstance(module._for_losses(batch_of(False, ("sql",))), HeadInput)


# ---- in a fit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_and_a_validation_hold_no_logits_of_all_tokens(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "CPU_CHUNK", 32)
    monkeypatch.setattr(fused, "PIECE_ELEMENTS", 8 * 131)
    module = module_of("llama", "int8", dtype=dtype, model={"vocab_size": 131, "tie_word_embeddings": False})
    ids = torch.randint(3, 131, (6, 24), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(),
             "adapters": list(LENGTHS), "rows": [2, 2, 2]}  # fmt: skip
    assert module.fused_loss_obstacle() is None  # tried on whole logits of a few tokens
    with Sizes(131) as sizes:
        tiny_fit(module, Batches([batch, batch]), val=Batches([batch]))
    # while operations are watched, the CPU's own kernels, which have none in float32, are left out
    # 144 tokens; float32 has the 8 of a piece, or in a float32 model, as any model's own type, the 32 of a chunk
    assert sizes.rows.pop(dtype) == 32  # also of the head, [131, 32], when it is transposed
    assert dtype == torch.float32 or sizes.rows.pop(torch.float32) == 8
    assert not sizes.rows.keys() - {torch.int8, torch.bool}
    assert torch.isfinite(module.trainer.callback_metrics["val/loss"])


def test_a_fit_has_the_losses_of_one_from_logits() -> None:
    """In training and in validation."""
    batch = batch_of(False)
    metrics = []
    for hooked in (False, True):
        module = module_of("llama", "int8", "plain")
        if hooked:  # which is an obstacle
            module.adapters.backbone.lm_head.register_forward_hook(lambda *_: None)
        tiny_fit(module, Batches([batch, batch]), val=Batches([batch]))
        assert (module.fused_loss_obstacle() is None) == (not hooked)
        metrics.append({k: v for k, v in module.trainer.callback_metrics.items() if "loss" in k})
    for key, value in metrics[0].items():
        assert float(abs(value - metrics[1][key])) < 1e-5, key
