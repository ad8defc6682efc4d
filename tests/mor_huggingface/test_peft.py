"""Adapters on the shared block: one of peft for all steps, or deltas for each."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import mor_huggingface
from mor_layers import DecoderConfig, ExpertChoice, RecursionConfig, Relaxation

QUERY = "model.recursions.0.layers.layers.0.attention.query"
SHARED = r".*recursions\..*\.(query|down)"


@pytest.fixture
def base() -> mor_huggingface.MoRForCausalLM:
    torch.manual_seed(0)
    recursion = RecursionConfig(num_recursions=3, router=ExpertChoice(), kv_policy="exit_state")
    config = DecoderConfig(50, 32, 64, num_unrolled_layers=5, num_heads=4, recursion=recursion)
    return mor_huggingface.MoRForCausalLM(mor_huggingface.MoRConfig.from_decoder(config))


def test_an_adapter_trains_alone_and_merges_into_the_shared_weights(base, tmp_path):
    base.save_pretrained(tmp_path / "base")
    ids = torch.randint(50, (2, 12))
    before = base(ids).logits
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=SHARED))
    assert torch.equal(model(input_ids=ids).logits, before)  # an adapter begins at zero
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 and all("recursions.0.layers.layers.0" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    model.eval()
    with torch.no_grad():
        after = model(ids).logits
        assert not torch.allclose(after, before, atol=1e-3)
        cached = model.generate(input_ids=ids[:, :4], max_new_tokens=5, do_sample=False)
        plain = model.generate(
            input_ids=ids[:, :4], max_new_tokens=5, do_sample=False, use_cache=False
        )
        assert torch.equal(cached, plain)
        again = mor_huggingface.MoRForCausalLM.from_pretrained(tmp_path / "base")
        merged = PeftModel.from_pretrained(again, str(tmp_path / "adapter")).merge_and_unload()
        torch.testing.assert_close(merged.eval()(ids).logits, after, rtol=1e-5, atol=1e-5)


def test_deltas_are_an_adapter_for_each_step(base):
    given = base.config.decoder_config
    deltas = Relaxation(2, projections=("query", "down"))
    relaxed = replace(given, recursion=replace(given.recursion, relaxation=deltas))
    model = mor_huggingface.MoRForCausalLM(mor_huggingface.MoRConfig.from_decoder(relaxed))
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected and all(".deltas." in name for name in missing)
    ids = torch.randint(50, (2, 12))
    assert torch.equal(model(ids).logits, base(ids).logits)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".deltas." in name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in missing if name.endswith(".b")} <= moved <= set(missing)
    own = [model.get_parameter(f"{QUERY}.deltas.{step}.b") for step in range(3)]
    assert not any(torch.equal(own[step], own[step - 1]) for step in range(3))


def test_arguments_of_other_models_are_refused_unless_they_say_nothing(base):
    ids = torch.randint(50, (1, 4))
    quiet = base(ids, inputs_embeds=None, output_attentions=False, return_dict=None)
    assert torch.equal(quiet.logits, base(ids).logits)
    with pytest.raises(TypeError, match="output_attentions cannot be given to this model"):
        base(ids, output_attentions=True)
    with pytest.raises(TypeError, match="inputs_embeds cannot be given"):
        base(ids, inputs_embeds=torch.zeros(1, 4, 32))
