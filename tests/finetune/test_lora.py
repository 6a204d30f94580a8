"""Adapters: what of a network learns, what a checkpoint holds, and what becomes of it in the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from export import bundle
from finetune import lora, optim, trainer
from finetune.admission import Refused, admit
from finetune.automatic import Chosen, choose
from finetune.data.validation import inspect
from finetune.objectives.next_token import NextToken
from finetune.recipe import AdamW, Hyperparameters, Lora, Recipe, Sgd, Stopping, Transfer
from finetune.recipe import NextToken as LearnsNextToken
from finetune.run import JobFailed, run
from finetune.run_request import Cancelled, FileRef, RunRequest
from finetune.trainer import FitResult
from models import registry
from models.ensemble import ensemble
from models.network import Network
from models.spec import Classification, LanguageModel, ModelSpec, Task
from tests.finetune.small import Recorder, differing, weights
from tests.finetune.test_language_models import VOCABULARY, items_of, objective_of, rows
from tests.models.narrow import TRANSFORMER

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "bert": transformers.BertConfig(**SIZES),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def built(architecture: str, hyperparameters: dict[str, Any], task: Task) -> Network:
    return registry.build(ModelSpec(architecture=architecture, hyperparameters=hyperparameters, task=task))


def network_of(name: str, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    if name == "ours":
        hyperparameters: dict[str, Any] = {"vocabulary": VOCABULARY, **TRANSFORMER}
        return built("transformer_decoder", hyperparameters, LanguageModel())
    config = CONFIGS[name].to_dict()
    if name == "bert":
        return built("text_encoder", {"config": config, "max_length": 32}, Classification(3))
    return built("causal_decoder", {"config": config}, LanguageModel())


def answer(network: Network) -> Tensor:
    ids = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found: Tensor = network.eval()(ids, torch.ones_like(ids))["logits"]
    return found


def scatter(network: Network) -> None:
    """As if the adapter had learned something: its second matrices are no longer nothing."""
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))


def written(files: dict[str, bytes], folder: Path) -> None:
    for file, content in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(content)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "ours"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_begins_as_nothing_and_ends_in_the_weights(name: str, rslora: bool) -> None:
    network = network_of(name)
    before, unadapted = weights(network), answer(network)
    lora.adapt(network, Lora(rank=4, alpha=6.0, rslora=rslora), [], "base")
    assert torch.equal(answer(network), unadapted)
    scatter(network)
    adapted = answer(network)
    assert (adapted - unadapted).abs().max() > 1e-2
    with lora.adapters_off(network):
        assert torch.equal(answer(network), unadapted)
    assert torch.equal(answer(network), adapted)
    thin = {n: p.detach().clone() for n, p in network.named_parameters() if "lora_" in n}
    files = lora.merge(network)
    assert sorted(files) == ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    torch.testing.assert_close(answer(network), adapted, rtol=1e-5, atol=1e-5)
    after = weights(network)
    changed = differing(before, after)
    assert changed == {n.replace(".lora_A.default", "") for n in thin if "lora_A" in n}
    for weight in changed:
        a, b = (thin[weight.replace(".weight", f".lora_{side}.default.weight")] for side in "AB")
        added = 6.0 / (2.0 if rslora else 4.0) * b @ a
        expected = before[weight] + (added.T if name == "gpt2" else added)
        torch.testing.assert_close(after[weight], expected, rtol=1e-5, atol=1e-6)


def test_every_linear_layer_of_the_trunk_and_no_other_is_adapted() -> None:
    network = network_of("bert")
    lora.adapt(network, Lora(), [], "base")
    plain = {n for n, m in network.named_modules() if type(m) is nn.Linear and "lora_" not in n and "base" not in n}
    assert plain == {"head"}
    untied = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)
    decoder = built("causal_decoder", {"config": untied.to_dict()}, LanguageModel())
    lora.adapt(decoder, Lora(), [], "base")
    plain = {n for n, m in decoder.named_modules() if type(m) is nn.Linear and "lora_" not in n and "base" not in n}
    assert plain == {"decoder.lm_head"}, "as peft has it"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_adapter_loads_onto_the_base_in_peft(name: str, tmp_path: Path) -> None:
    network = network_of(name)
    base = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
    state = {n.removeprefix("decoder."): t for n, t in weights(network).items()}
    base.load_state_dict(state)
    lora.adapt(network, Lora(rank=4, targets="all-linear"), [], "some/base")
    scatter(network)
    written(lora.merge(network), tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("some/base", "CAUSAL_LM")
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ids = torch.randint(0, VOCABULARY, (2, 9))
    with torch.no_grad():
        ours = network.eval()(ids, torch.ones_like(ids))["logits"]
        torch.testing.assert_close(loaded(ids).logits, ours, rtol=1e-5, atol=1e-5)
        with loaded.disable_adapter():
            assert (loaded(ids).logits - ours).abs().max() > 1e-2


def test_the_adapter_of_an_encoder_loads_onto_it_too(tmp_path: Path) -> None:
    network = network_of("bert")
    base = transformers.BertModel(CONFIGS["bert"], add_pooling_layer=False)
    inside = "trunk.encoder."
    base.load_state_dict({n.removeprefix(inside): t for n, t in weights(network).items() if n.startswith(inside)})
    lora.adapt(network, Lora(rank=4, rslora=True), [], "some/base")
    scatter(network)
    written(lora.merge(network), tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ids = torch.randint(0, VOCABULARY, (2, 9))
    with torch.no_grad():
        states = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        embedding = network.eval()(ids, torch.ones_like(ids))["embedding"]
    torch.testing.assert_close(states.mean(1), embedding, rtol=1e-5, atol=1e-5)


def test_each_network_of_an_ensemble_has_its_own() -> None:
    members = [network_of("bert", seed) for seed in (1, 2)]
    for member in members:
        lora.adapt(member, Lora(rank=2), [], "base")
        scatter(member)
    network = ensemble(members, "mean")
    ids = torch.randint(0, VOCABULARY, (2, 9))
    with torch.no_grad():
        before = network.eval()(ids, torch.ones_like(ids))["logits"]
        files = lora.merge(network)
        after = network(ids, torch.ones_like(ids))["logits"]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert {name.partition("/")[0] for name in files} == {"member-01-adapter", "member-02-adapter"}
    assert not any("lora_" in name for name in network.state_dict())


def test_only_named_layers_and_only_in_blocks_that_learn() -> None:
    network = network_of("llama")
    lora.adapt(network, Lora(targets=("q_proj", "layers.1.mlp.down_proj")), [], "base")
    adapted = {n.partition(".lora_A")[0] for n, _ in network.named_parameters() if "lora_A" in n}
    inside = "decoder.model.layers"
    queries = {f"{inside}.{i}.self_attn.q_proj" for i in (0, 1)}
    assert adapted == queries | {f"{inside}.1.mlp.down_proj"}
    network = network_of("llama")
    transfer = Transfer(train_last=1, lora=Lora())
    lora.adapt(network, Lora(), optim.frozen_blocks(network, None, 1), "base")
    assert {n.split(".")[3] for n in optim.learning(network, transfer)} == {"1"}
    with pytest.raises(ValueError, match=r"targets: no linear layer 'c_attn'; there are q_proj, k_proj"):
        lora.adapt(network_of("llama"), Lora(targets=("c_attn",)), [], "base")


def test_the_optimizer_knows_the_adapter_and_the_head_alone() -> None:
    network = network_of("bert")
    lora.adapt(network, Lora(rank=2), [], "base")
    transfer = Transfer(layer_decay=0.5, lora=Lora(rank=2))
    for section in (AdamW(weight_decay=0.1), Sgd(momentum=0.9)):
        optimizer = optim.build(network, section, transfer)
        names = {n for group in optimizer.param_groups for n in group["names"]}
        assert names == {n for n, _ in network.named_parameters() if "lora_" in n or n.startswith("head.")}
        assert {p for group in optimizer.param_groups for p in group["params"]} >= set(optimizer.state)
    optimizer = optim.build(network, AdamW(weight_decay=0.1), transfer)
    groups = {name: group for group in optimizer.param_groups for name in group["names"]}
    assert groups["head.bias"]["weight_decay"] == 0.0
    assert groups["head.weight"]["weight_decay"] == 0.1
    last = groups["trunk.encoder.encoder.layer.1.output.dense.lora_A.default.weight"]
    first = groups["trunk.encoder.encoder.layer.0.output.dense.lora_A.default.weight"]
    assert (last["scale"], first["scale"]) == (0.5, 0.25)
    optim.set_mode(network, [])
    network(torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long))["logits"].sum().backward()
    assert {n for n, p in network.named_parameters() if p.grad is not None} == names


def trained(folder: Path, reporter: Recorder, base: int = 0, **recipe: Any) -> tuple[Network, FitResult]:
    texts = rows([4 + i % 9 for i in range(40)])
    items = items_of(texts)
    network = network_of("llama", base)
    torch.manual_seed(1)
    section = Lora(rank=2, dropout=0.1)
    lora.adapt(network, section, [], "base")
    result = trainer.fit(
        network,
        items.select(np.arange(32)),
        items.select(np.arange(32, 40)),
        objective_of(NextToken, texts),
        Recipe(
            model="small",
            training_file="small",
            transfer=Transfer(lora=section),
            **{"checkpoint_seconds": 0.0, **recipe},
        ),
        Chosen(epochs=3, batch_size=8, learning_rate=0.01),
        seed=1,
        run="run",
        folder=folder,
        reporter=reporter,
    )
    return network, result


def test_a_resumed_run_is_the_same_in_every_bit_though_its_checkpoints_hold_the_adapter_alone(tmp_path: Path) -> None:
    before = weights(network_of("llama"))
    whole, result = trained(tmp_path / "whole", Recorder())
    with pytest.raises(Cancelled):
        trained(tmp_path / "killed", Recorder(cancel_at=8))
    checkpoints = sorted((tmp_path / "killed").glob("step-*"))
    assert checkpoints
    learned = {name for name in weights(whole) if "lora_" in name}
    for file in (checkpoints[-1] / "weights.safetensors", *(tmp_path / "killed").glob("best-*.safetensors")):
        assert set(load_file(file)) == learned
    assert {n.partition(":")[2] for n in load_file(checkpoints[-1] / "optimizer.safetensors")} == learned
    assert sum(p.stat().st_size for p in checkpoints[-1].iterdir()) < 4 * sum(t.nbytes for t in before.values()) / 2
    reporter = Recorder()
    again, resumed = trained(tmp_path / "killed", reporter)
    assert "going on from the checkpoint" in reporter.messages()
    assert differing(weights(whole), weights(again)) == set()
    assert (resumed.curve, resumed.evaluations) == (result.curve, result.evaluations)
    lora.merge(again)
    assert {n for n in differing(before, weights(again)) if not n.endswith("_proj.weight")} == set()
    assert result.evaluations[-1]["validation_loss"] < result.evaluations[0]["validation_loss"]


def test_a_checkpoint_is_not_gone_on_from_on_other_weights(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        trained(tmp_path, Recorder(cancel_at=8))
    reporter = Recorder()
    trained(tmp_path, reporter, base=1)
    assert "or from other weights" in reporter.messages()
    assert "going on" not in reporter.messages()


def texts_file(path: Path) -> FileRef:
    lines = [{"text": f"{'good' if i % 3 else 'bad'} news of number {i} and of number {i // 2}"} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return FileRef(path=path, filename=path.name, sha256=bundle.sha256_of(path).sha256, id=path.stem)


def job(folder: Path, name: str, **fields: Any) -> RunRequest:
    training = texts_file(folder / "texts.jsonl")
    recipe = Recipe(
        **{
            "training_file": training.id,
            "objective": LearnsNextToken(),
            "seed": 1,
            "hyperparameters": Hyperparameters(n_epochs=1, batch_size=8, learning_rate=0.01),
            **fields,
        }
    )
    return RunRequest(
        recipe=recipe,
        training=training,
        folder=folder / f"run-{name}",
        repository=folder / "repository",
        name=name,
        job_id=f"job-{name}",
    )


@pytest.mark.slow
def test_a_whole_job_publishes_the_merged_network_and_the_adapter_beside_it(tmp_path: Path) -> None:
    sizes = {"vocabulary_size": 300, **TRANSFORMER}
    model = ModelSpec(architecture="transformer_decoder", hyperparameters=sizes)
    run(job(tmp_path, "base", model=model), Recorder())
    reporter = Recorder()
    how = {"transfer": Transfer(lora=Lora(rank=2)), "gradient_checkpointing": True, "stopping": Stopping()}
    manifest = run(job(tmp_path, "adapted", model="base", **how), reporter)
    folder = tmp_path / "repository" / "adapted" / "1"
    assert bundle.verify(folder) == manifest
    assert manifest.lineage.base_model == "base:1"
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= set(manifest.files)
    before = load_file(tmp_path / "repository" / "base" / "1" / "weights.safetensors")
    after = load_file(folder / "weights.safetensors")
    assert before.keys() == after.keys()
    linear = ("query.weight", "key.weight", "value.weight", "out.weight", "widen.weight", "narrow.weight")
    assert differing(before, after) == {name for name in before if name.endswith(linear)}
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    layer = "stack.layers.1.feed.narrow"
    a, b = (adapter[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
    expected = before[f"{layer}.weight"] + 32.0 / 2 * b @ a
    torch.testing.assert_close(after[f"{layer}.weight"], expected, rtol=1e-5, atol=1e-6)
    count = sum(t.numel() for t in adapter.values())
    whole = count + sum(t.numel() for t in before.values())
    assert f"{100 * count / whole:.1f} % of {whole:,} parameters learn" in reporter.messages()
    assert manifest.metrics["perplexity"] < 300
    assert "in `adapter/` for peft" in (folder / "MODEL_CARD.md").read_text()
    assert "adapter" not in (tmp_path / "repository" / "base" / "1" / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize(
    ("transfer", "words"),
    [
        ({"lora": {}, "freeze": "all"}, "no layer is left to adapt"),
        ({"lora": {}, "train_last": 0}, "no layer is left to adapt"),
        ({"lora": {}, "freeze": "layer0", "unfreeze_epoch": 1}, "with lora the trunk stays as it is"),
        ({"lora": {"targets": []}}, "length >= 1"),
        ({"lora": {"rank": 0}}, ">= 1"),
        ({"lora": {"dropout": 1.0}}, "< 1.0"),
    ],
)
def test_what_contradicts_itself_is_refused(transfer: dict[str, Any], words: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=words):
        msgspec.convert(transfer, Transfer)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"model": "mlp", "transfer": Transfer(lora=Lora())}, "transfer.lora", "mlp is none"),
        (
            {"model": "transformer_decoder", "transfer": Transfer(lora=Lora())},
            "transfer.lora",
            "with random weights",
        ),
        ({"model": "gru", "gradient_checkpointing": True}, "gradient_checkpointing", "gru is none"),
    ],
)
def test_admission_refuses_what_has_no_layers_to_adapt(
    fields: dict[str, Any], param: str, words: str, tmp_path: Path
) -> None:
    training = texts_file(tmp_path / "texts.jsonl")
    language = fields["model"] == "transformer_decoder"
    recipe = Recipe(training_file="texts", **{"objective": LearnsNextToken() if language else None, **fields})
    report = inspect(training.path, training.filename)
    with pytest.raises(Refused, match=words) as refused:
        admit(recipe, report=report, backbones={}, repository=tmp_path / "repository", allow_hub=False)
    assert refused.value.param == param
    model = ModelSpec(architecture=fields["model"])
    with pytest.raises(JobFailed, match=words):
        run(job(tmp_path, "refused", **{**fields, "model": model, "objective": recipe.objective}), Recorder())


def test_an_adapter_learns_faster_than_its_trunk_would() -> None:
    recipe = Recipe(model="smollm2-135m-instruct", training_file="texts")
    adapting = Recipe(model="smollm2-135m-instruct", training_file="texts", transfer=Transfer(lora=Lora()))
    whole, adapter = (choose(one, "text", 1000, beginning="backbone").learning_rate for one in (recipe, adapting))
    assert adapter == pytest.approx(10 * whole)
