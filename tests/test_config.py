"""The rules about settings: every message of `check`, and the way to JSON and back."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from runs import DESCRIBED

from pipetrain import config, rules
from pipetrain.config import (
    AdafactorConfig,
    AdamConfig,
    AmoebaNetConfig,
    AnythingConfig,
    Config,
    ImagesConfig,
    LrRuleConfig,
    MuonConfig,
    NadamConfig,
    RmspropConfig,
    RotatedAdamConfig,
    Seq2SeqConfig,
    SgdConfig,
    SyntheticConfig,
    TextConfig,
    TransformerConfig,
    TransformerXLConfig,
    TranslationConfig,
)
from pipetrain.derived import num_microbatches, num_stages, wanted_ranks
from pipetrain.errors import ConfigError


def settings(**changes: Any) -> Config:
    """Good settings, except for `changes`; a key such as `model__layers` reaches into a group."""
    cfg = Config(
        name="test",
        model=TransformerConfig(),
        data=TextConfig(),
        optimizer=AdamConfig(name="adamw"),
        lr_rule=LrRuleConfig(),
        steps=10,
    )
    for key, value in changes.items():
        group, _, name = key.rpartition("__")
        node = getattr(cfg, group) if group else cfg
        assert hasattr(node, name)
        setattr(node, name, value)
    return cfg


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"devices": 4, "balance": [1, 2, 3, 2]},
        {"devices": "auto", "partitions": 3, "balance": [1, 2, 3]},
        {"steps": None, "epochs": 2},
        {"threads": "auto"},
        {"schedule": "auto", "micro_batches": "auto", "recompute": "auto", "partitions": "auto", "devices": 2},
        {"schedule": "auto", "partitions": 4, "devices": 2, "balance": [2, 2, 2, 2]},
        {"partitions": "auto", "devices": 2, "balance": [2, 2, 2, 2]},
        {"ema": 0.9999},
        {"logit_clip": 5.0, "grad_clip": None, "logit_clip_kind": "soft"},
        {"lr_rule": LrRuleConfig(name="cosine", warmup_steps=2, decay_steps=10)},
        {"lr_rule": LrRuleConfig(name="exponential", decay_factor=0.97, decay_every=5, end_fraction=1e-4)},
        {"data__tokenizer": "sentencepiece", "data__vocab_size": 100},
        {"data__valid_fraction": 0.0, "data__test_fraction": 0.0},
        {"micro_batches": 16, "batch_size": 16},
        {"micro_batches": 3, "batch_size": 16},
        {"eval__every": 0, "checkpoint__every": 0, "seed": 0},
        {"model": AnythingConfig(factory="resnet18"), "data": SyntheticConfig()},
        {"model": AnythingConfig(factory="my_models:build", arguments={"width": 8})},
        {"model": AmoebaNetConfig(), "data": SyntheticConfig(shape=[1, 28, 28])},
        {"model": AmoebaNetConfig(aux_weight=0.0), "data": SyntheticConfig(), "micro_batches": 16},
        {"model": AmoebaNetConfig(stem="small", filters=20), "data": SyntheticConfig()},
    ],
)
def test_good_settings(changes: dict[str, Any]) -> None:
    rules.check(settings(**changes), num_gpus=0)


RESNET = AnythingConfig(factory="resnet18")


def images(**changes: Any) -> dict[str, Any]:
    return {"model": RESNET, "data": ImagesConfig(**changes)}


def amoebanet(**changes: Any) -> dict[str, Any]:
    return {"model": AmoebaNetConfig(**changes), "data": SyntheticConfig()}


def exponential(**changes: Any) -> dict[str, Any]:
    return {"lr_rule": LrRuleConfig(**({"name": "exponential", "decay_factor": 0.9, "decay_every": 2} | changes))}


def rmsprop(**changes: float) -> dict[str, Any]:
    return {"optimizer": RmspropConfig(name="rmsprop", **changes)}


def seq2seq(**changes: Any) -> dict[str, Any]:
    return {"model": Seq2SeqConfig(**changes), "data": TranslationConfig()}


def translation(**changes: Any) -> dict[str, Any]:
    return {"model": Seq2SeqConfig(), "data": TranslationConfig(**changes)}


BAD = [
    ({"model": AnythingConfig()}, "model=anything needs model.factory"),
    ({"model": RESNET, "logit_clip": 5.0}, "logit_clip=5.0 is for pipetrain's own"),
    ({"data": SyntheticConfig()}, "data=synthetic gives numbers, but model=transformer reads tokens; use data=text"),
    ({"model": RESNET, "data": SyntheticConfig(shape=[3, 0])}, "data.shape[1]=0 must be at least 1"),
    ({"model": RESNET, "data": SyntheticConfig(shape=[])}, "data.shape=[] must have at least one size"),
    ({"model": RESNET, "data": SyntheticConfig(classes=0)}, "data.classes=0 must be at least 1"),
    ({"model": RESNET, "data": SyntheticConfig(samples=0)}, "data.samples=0 must be at least 1"),
    ({"data": ImagesConfig()}, "data=images gives numbers, but model=transformer reads tokens; use data=text"),
    (images(set="mnist"), "data.set=mnist: no such choice."),
    (images(set="folder"), "data.set=folder needs data.path, the folder that holds it"),
    (images(path="photos"), "data.path=photos means nothing to data.set=digits; for your images: data.set=folder"),
    (images(channels=4), "data.channels=4 must be 1 (grey), 3 (colour) or null (the set's own)"),
    (images(augment=["crop", "mirror"]), "data.augment=mirror: no such choice."),
    (images(valid_fraction=1.0), "data.valid_fraction=1.0 must be at least 0 and below 1"),
    (images(on_error="skip"), "data.on_error=skip is for single files"),
    (images(on_error="ignore"), "data.on_error=ignore: no such choice. Choose one of: fail, skip"),
    (images(size=0), "data.size=0 must be at least 1"),
    (images(workers=-1), "data.workers=-1 must be at least 0"),
    (amoebanet(num_classes=1), "model.num_classes=1 must be at least 2, or null for the data's number"),
    ({"model": AmoebaNetConfig()}, "data=text gives tokens, but model=amoebanet looks at images; use data=images"),
    (
        amoebanet() | {"data": SyntheticConfig(shape=[32, 32])},
        "data.shape=[32,32] must be the channels, height and width of an image for model=amoebanet, such as",
    ),
    (amoebanet() | {"logit_clip": 5.0}, "logit_clip=5.0 is for language models; type logit_clip=null"),
    (amoebanet(genotype="A"), "model.genotype=A: no such choice. Choose one of: D, B"),
    (amoebanet(stem="cifar"), "model.stem=cifar: no such choice. Choose one of: imagenet, small"),
    (amoebanet(layers=0), "model.layers=0 must be divisible by 3; try model.layers=3"),
    (amoebanet(layers=17), "model.layers=17 must be divisible by 3; try model.layers=18"),
    (amoebanet(filters=30), "model.filters=30 must be divisible by 4; try model.filters=32"),
    (amoebanet(filters=-8), "model.filters=-8 must be divisible by 4; try model.filters=4"),
    (amoebanet(filters=196, stem="imagenet"), "model.filters=196 must be divisible by 8; try model.filters=192"),
    (amoebanet(dropout=1.0), "model.dropout=1.0 must be at least 0 and below 1"),
    (amoebanet(drop_path=-0.1), "model.drop_path=-0.1 must be at least 0 and below 1"),
    (amoebanet(label_smoothing=1.0), "model.label_smoothing=1.0 must be at least 0 and below 1"),
    (amoebanet(drop_path=0.1, drop_path_steps=-1), "model.drop_path_steps=-1 must be at least 0"),
    (amoebanet(drop_path_steps=5), "model.drop_path_steps=5 needs model.drop_path, such as 0.3"),
    (amoebanet(aux_weight=-1.0), "model.aux_weight=-1.0 must be at least 0 and finite"),
    (amoebanet(bn_momentum=0.0), "model.bn_momentum=0.0 must be above 0 and at most 1"),
    (amoebanet(bn_eps=0.0), "model.bn_eps=0.0 must be above 0 and finite"),
    (
        amoebanet() | {"micro_batches": 9},
        "micro_batches=9 of batch_size=16 leave one sample in a micro-batch, and the auxiliary head normalises over "
        "nothing else; use a larger batch_size, or micro_batches=8, or model.aux_weight=0",
    ),
    (amoebanet() | {"batch_size": 1}, "normalises over nothing else; use a larger batch_size, or model.aux_weight=0"),
    ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ({"micro_batches": 0}, "micro_batches=0 must be at least 1"),
    ({"data_parallel": 0}, "data_parallel=0 must be at least 1"),
    (
        {"data": TranslationConfig()},
        "model=transformer does not go with data=translation; use model=seq2seq, or leave data=translation out",
    ),
    (seq2seq(embeddings="some"), "model.embeddings=some: no such choice. Choose one of: all, output, none"),
    (seq2seq(norm="mid"), "model.norm=mid: no such choice. Choose one of: pre, post"),
    (seq2seq(label_smoothing=1.0), "model.label_smoothing=1.0 must be at least 0 and below 1"),
    (seq2seq(heads=0), "model.heads=0 must be at least 1"),
    (seq2seq(d_model=33), "model=seq2seq needs an even model.d_model (got 33)"),
    (
        translation(direction="to"),
        "data.direction=to: no such choice. Did you mean 'into'?",
    ),
    (translation(sampling=1.5), "data.sampling=1.5 must be at least 0 (all languages alike)"),
    (translation(valid_fraction=0.9, test_fraction=0.2), "must be at least 0 and leave something to train on"),
    (translation(max_tokens=2), "data.max_tokens=2 must be at least 4"),
    (translation(languages=["en"]), "data.languages=[en] must name languages that data.pivot=en is paired with"),
    ({"data_parallel": "two"}, "data_parallel=two must be a whole number or auto; try data_parallel=4"),
    (
        {"devices": 5, "data_parallel": 2},
        "5 devices cannot be shared evenly by data_parallel=2 replicas; use data_parallel=1 or 5, or devices=4",
    ),
    (
        {"devices": 4, "data_parallel": 4, "micro_batches": 6},
        "micro_batches=6, of the whole mini-batch, cannot be shared evenly by data_parallel=4 replicas; use "
        "micro_batches=8",
    ),
    (
        {"devices": 4, "data_parallel": 4, "batch_size": 3},
        "data_parallel=4 is more than batch_size=3 samples to share; use a larger batch_size",
    ),
    (
        {"devices": 4, "data_parallel": 2, "action": "check"},
        "action=check compares sums to the last bit, but data_parallel=2 adds them up in another order",
    ),
    (
        {"devices": 4, "data_parallel": 2, "balance": [1, 1, 1, 1]},
        "balance=[1,1,1,1] names 4 stages, but there are 2 devices in each replica; use devices=8, or a list of 2",
    ),
    (
        {"devices": 4, "data_parallel": "auto", "partitions": 3},
        "partitions=3, but schedule=gpipe runs one stage on each of the 4 devices",
    ),
    ({"steps": 0}, "steps=0 must be at least 1"),
    ({"steps": None, "epochs": 0}, "epochs=0 must be at least 1"),
    ({"log_every": 0}, "log_every=0 must be at least 1"),
    ({"eval__every": -1}, "eval.every=-1 must be at least 0"),
    ({"eval__batches": 0}, "eval.batches=0 must be at least 1"),
    ({"checkpoint__every": -1}, "checkpoint.every=-1 must be at least 0"),
    ({"checkpoint__keep": 0}, "checkpoint.keep=0 must be at least 1"),
    ({"seed": -1}, "seed=-1 must be at least 0"),
    ({"optimizer__weight_decay": -0.5}, "optimizer.weight_decay=-0.5 must be at least 0"),
    ({"lr_rule__warmup_steps": -1}, "lr_rule.warmup_steps=-1 must be at least 0"),
    ({"lr_rule__end_fraction": -1.0}, "lr_rule.end_fraction=-1.0 must be at least 0"),
    ({"data__seq_len": 0}, "data.seq_len=0 must be at least 1"),
    ({"data__vocab_size": 0, "data__tokenizer": "sentencepiece"}, "data.vocab_size=0 must be at least 1"),
    ({"threads": 0}, "threads=0 must be at least 1"),
    ({"threads": "many"}, "threads=many must be a whole number or auto; try threads=4"),
    ({"micro_batches": "four"}, "micro_batches=four must be a whole number or null or auto; try micro_batches=4"),
    ({"partitions": 1.5}, "partitions=1.5 must be a whole number or null or auto; try partitions=4"),
    ({"partitions": True}, "partitions=True must be a whole number"),
    (
        {"devices": 2, "schedule": "auto", "partitions": 3},
        "partitions=3 cannot be spread evenly over 2 devices; use a multiple of 2, or partitions=auto",
    ),
    (
        {"devices": 2, "schedule": "auto", "balance": [1, 2, 3]},
        "balance=[1,2,3] names 3 stages, which cannot be spread evenly over 2 devices; use a list of 2,",
    ),
    ({"devices": 2, "partitions": "auto", "recompute": ["never"] * 3}, "recompute=[never,never,never] names 3 stages"),
    ({"recompute": ["auto"], "devices": 1}, "recompute=[auto]: no such choice. Choose one of: always, except_last"),
    (
        {"recompute": "auto", "recompute_layers": ["blocks.*"]},
        "recompute=auto and recompute_layers=[blocks.*] do not go together: type recompute=selective",
    ),
    ({"schedule": "aut"}, "schedule=aut: no such choice. Did you mean 'auto'?"),
    ({"threads": True}, "threads=True must be a whole number or auto"),
    ({"logit_clip": 0.0}, "logit_clip=0.0 must be greater than 0 and finite; use null to switch it off"),
    ({"logit_clip": float("nan")}, "logit_clip=nan must be greater than 0 and finite"),
    ({"grad_clip": float("inf")}, "grad_clip=inf must be greater than 0 and finite; use null to switch it off"),
    ({"optimizer__lr": -1.0}, "optimizer.lr=-1.0 must be greater than 0 and finite; 1e-3 is a common value"),
    ({"schedule": "gpip"}, "schedule=gpip: no such choice. Did you mean 'gpipe'? Choose one of: gpipe"),
    ({"recompute": "sometimes"}, "recompute=sometimes: no such choice. Choose one of: always, except_last, never"),
    ({"recompute": ["always", "nver"]}, "recompute=[always,nver]: no such choice. Did you mean 'never'?"),
    (
        {"recompute": ["always"] * 3, "devices": 2},
        "recompute=[always,always,always] must have a policy for each of the 2",
    ),
    ({"recompute": "selective"}, "recompute=selective and recompute_layers=null do not go together"),
    ({"recompute_layers": ["blocks.*"]}, "recompute=always and recompute_layers=[blocks.*] do not go together"),
    ({"precision": "16"}, "precision=16: no such choice. Did you mean 'bf16'? Choose one of: fp32, bf16"),
    ({"messages": "bf1"}, "messages=bf1: no such choice. Did you mean 'bf16'? Choose one of: exact, bf16"),
    ({"logit_clip_kind": "sof"}, "logit_clip_kind=sof: no such choice. Did you mean 'soft'?"),
    ({"lr_rule__name": "cosin"}, "lr_rule.name=cosin: no such choice. Did you mean 'cosine'?"),
    (
        {"model": TransformerXLConfig(memory=8)},
        "data.order=shuffled: model.memory=8 remembers the sample before, which is then some other text; use "
        "data.order=contiguous, or model.memory=0",
    ),
    ({"model": TransformerXLConfig(memory=-1)}, "model.memory=-1 must be at least 0"),
    (
        {"model": TransformerXLConfig(attention_dropout=1.0, memory=0)},
        "model.attention_dropout=1.0 must be at least 0 and below 1",
    ),
    (
        {"model": TransformerXLConfig(d_model=33, heads=3, memory=0)},
        "model=transformer_xl needs an even model.d_model (got 33)",
    ),
    ({"optimizer": MuonConfig(name="muon", momentum=1.0)}, "optimizer.momentum=1.0 must be at least 0 and below 1"),
    ({"optimizer": NadamConfig(name="nadam", momentum_decay=-1)}, "optimizer.momentum_decay=-1 must be at least 0"),
    ({"optimizer": RotatedAdamConfig(name="rotated_adam", refresh=0)}, "optimizer.refresh=0 must be at least 1"),
    ({"model__positions": "rotary"}, "model.positions=rotary: no such choice. Choose one of: learned, sinusoidal"),
    ({"model__init_scale": "depth"}, "model.init_scale=depth: no such choice."),
    ({"data__order": "random"}, "data.order=random: no such choice. Choose one of: shuffled, contiguous"),
    (
        {"lr_rule__name": "cosine"},
        "needs lr_rule.decay_steps, the step at which the decay ends; try lr_rule.decay_steps=10",
    ),
    ({"lr_rule__name": "linear", "steps": None, "epochs": 1}, "lr_rule=linear needs lr_rule.decay_steps"),
    (
        {"lr_rule": LrRuleConfig(name="linear", warmup_steps=5, decay_steps=5)},
        "lr_rule.decay_steps=5 must be greater than lr_rule.warmup_steps=5",
    ),
    ({"lr_rule__decay_steps": 5}, "lr_rule.decay_steps=5 means nothing to lr_rule=constant; use lr_rule=cosine"),
    ({"lr_rule__end_fraction": 0.1}, "lr_rule.end_fraction=0.1 means nothing to lr_rule=constant; use lr_rule=cosine"),
    (
        {"lr_rule__decay_factor": 0.5},
        "lr_rule.decay_factor=0.5 means nothing to lr_rule=constant; use lr_rule=exponential, or leave it out",
    ),
    ({"lr_rule__decay_every": 3}, "lr_rule.decay_every=3 means nothing to lr_rule=constant; use lr_rule=exponential"),
    (exponential(decay_steps=9), "lr_rule.decay_steps=9 means nothing to lr_rule=exponential; use lr_rule=cosine or"),
    (exponential(decay_factor=None), "lr_rule.decay_factor=null must be above 0 and at most 1 for lr_rule=exponential"),
    (exponential(decay_factor=1.5), "lr_rule.decay_factor=1.5 must be above 0 and at most 1 for lr_rule=exponential"),
    (exponential(decay_every=0), "lr_rule.decay_every=0 must be at least 1 for lr_rule=exponential: the steps between"),
    (exponential(decay_every=None), "lr_rule.decay_every=null must be at least 1 for lr_rule=exponential"),
    (exponential(end_fraction=2.0), "lr_rule.end_fraction=2.0 must be at most 1; 1e-4 is the ImageNet recipe's"),
    ({"devices": 0}, "devices=0 must be at least 1"),
    (
        {"devices": 2, "partitions": 3},
        "schedule=gpipe runs one stage on each of the 2 devices; use partitions=2 or leave partitions out, or",
    ),
    (
        {"devices": 2, "partitions": 3, "schedule": "interleaved"},
        "schedule=interleaved runs the same number of stages, at least 2, on each of the 2 devices; use partitions=4",
    ),
    (
        {"devices": 2, "partitions": 6, "schedule": "zb_v"},
        "partitions=6, but schedule=zb_v runs two stages on each of the 2 devices; use partitions=4",
    ),
    (
        {"devices": 2, "balance": [2, 3], "schedule": "zb_v"},
        "balance=[2,3] names 2 stages, but there are 4 stages on 2 devices; use a list of 4, or balance=even",
    ),
    (
        {"devices": 3, "balance": [2, 3]},
        "balance=[2,3] names 2 stages, but there are 3 devices; use devices=2, or a list of 3, or balance=even",
    ),
    ({"devices": 2, "balance": [0, 3]}, "balance=[0,3] must be a list of whole numbers, each at least 1"),
    ({"devices": 2, "balance": [1.5, 3]}, "balance=[1.5,3] must be a list of whole numbers"),
    ({"devices": 2, "balance": []}, "balance=[] must be a list of whole numbers"),
    ({"balance": "best"}, "balance=best must be auto, even, least_variance or a list of layers per stage, such as"),
    (
        {"plan__memory_gib": -1.0},
        "plan.memory_gib=-1.0 must be greater than 0 and finite; use null for what the devices",
    ),
    ({"plan__timeout_s": 0.5}, "plan.timeout_s=0.5 must be at least 1"),
    ({"plan__device": DESCRIBED}, "plan.device=X asks what would be elsewhere: it goes with action=plan"),
    ({"plan__devices": [8]}, "plan.devices=[8] asks what would be elsewhere: it goes with action=plan"),
    (
        {"action": "plan", "plan__devices": []},
        "plan.devices=[] must be numbers of devices, such as plan.devices=[8,128]",
    ),
    ({"action": "plan", "plan__devices": [8, 0]}, "plan.devices=[8, 0] must be numbers of devices"),
    (
        {"action": "plan", "plan__device": dataclasses.replace(DESCRIBED, fp64_tflops=0.0)},
        "plan.device.fp64_tflops=0.0 of X must be greater than 0 and finite",
    ),
    (
        {"action": "plan", "plan__device": dataclasses.replace(DESCRIBED, efficiency=1.5)},
        "plan.device.efficiency=1.5 of X is the share of its speeds that training reaches: above 0, at most 1",
    ),
    (
        {"micro_batches": 9, "batch_size": 8},
        "micro_batches=9 is more than batch_size=8: a micro-batch needs at least one sample; use micro_batches=8",
    ),
    ({"model__layers": 0}, "model.layers=0 must be at least 1"),
    ({"model__d_model": 0}, "model.d_model=0 must be at least 1"),
    ({"model__d_ff": 0}, "model.d_ff=0 must be at least 1"),
    ({"model__heads": 0}, "model.heads=0 must be at least 1"),
    ({"model__dropout": 1.0}, "model.dropout=1.0 must be at least 0 and below 1"),
    ({"model__heads": 5}, "model.heads=5 does not divide model.d_model=256; try model.heads=4"),
    (
        {"model__positions": "sinusoidal", "model__d_model": 33, "model__heads": 3},
        "model.positions=sinusoidal needs an even model.d_model (got 33)",
    ),
    (
        {"data__valid_fraction": 0.5, "data__test_fraction": 0.5},
        "data.valid_fraction=0.5 and data.test_fraction=0.5 must be at least 0 and leave something to train on",
    ),
    ({"data__valid_fraction": -0.1}, "data.valid_fraction=-0.1 and"),
    (
        {"data__tokenizer": "sentencepiece"},
        "data.tokenizer=sentencepiece needs data.vocab_size; try data.vocab_size=8000",
    ),
    (
        {"data__vocab_size": 100},
        "data.vocab_size=100 is only for data.tokenizer=sentencepiece and words; data.tokenizer=bytes brings",
    ),
    ({"optimizer__weight_decay": float("nan")}, "optimizer.weight_decay=nan must be at least 0"),
    ({"optimizer__betas": [0.9]}, "optimizer.betas=[0.9] must be two numbers from 0 to below 1"),
    ({"optimizer__betas": [0.9, 1.0]}, "optimizer.betas=[0.9,1.0] must be two numbers"),
    ({"optimizer__eps": -1.0}, "optimizer.eps=-1.0 must be at least 0"),
    ({"optimizer": SgdConfig(name="sgd", momentum=-1.0)}, "optimizer.momentum=-1.0 must be at least 0"),
    (
        {"optimizer": SgdConfig(name="sgd", nesterov=True)},
        "optimizer.nesterov=true needs momentum",
    ),
    (
        {"optimizer": AdafactorConfig(name="adafactor", clip_threshold=0.5)},
        "clip_threshold=0.5 must be at least 1",
    ),
    ({"optimizer": AdafactorConfig(name="adafactor", beta2_decay=0.5)}, "optimizer.beta2_decay=0.5 must be 0 or less"),
    (
        {"action": "check", "init_from": "runs/a"},
        "action=check compares with plain PyTorch from the seed on: leave init_from out",
    ),
    ({"ema": 1.0}, "ema=1.0 must be above 0 and below 1; 0.9999 is common, null is off"),
    ({"ema": 0.0}, "ema=0.0 must be above 0 and below 1; 0.9999 is common, null is off"),
    (rmsprop(decay=1.0), "optimizer.decay=1.0 must be at least 0 and below 1; 0.9 is common"),
    (rmsprop(momentum=-0.1), "optimizer.momentum=-0.1 must be at least 0 and below 1; 0.9 is common"),
    (rmsprop(eps=0.0), "optimizer.eps=0.0 must be greater than 0 and finite; 0.1 is the paper's"),
    ({"steps": None}, "steps=null and epochs=null leave open how long to train; type steps=300 or epochs=1"),
    ({"epochs": 3}, "steps=10 and epochs=3 are both set: type steps=null epochs=3, or epochs=null steps=10"),
]


@pytest.mark.parametrize(("changes", "text"), BAD)
def test_message_of_every_rule(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rules.check(settings(**changes), num_gpus=0)
    assert text in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


TWO_RANKS = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"


@pytest.mark.parametrize(
    ("text", "changes", "problem"),
    [
        (TWO_RANKS, {"devices": 3}, "has 2 lines, one for each device, but there are 3 devices; use devices=2"),
        (TWO_RANKS, {"devices": 2, "partitions": 4}, "partitions=4, but schedule="),
        (TWO_RANKS, {"devices": 2, "micro_batches": 4}, "has 2; leave micro_batches out"),
        (TWO_RANKS, {"devices": 2, "batch_size": 1}, "more than batch_size=1 samples; use batch_size=2 or more"),
        (TWO_RANKS, {"devices": 2, "balance": [1, 1, 2]}, "balance=[1,1,2] names 3 stages, but there are 2 devices"),
        (TWO_RANKS.replace(",1B1", ""), {"devices": 2}, "1B1 is missing"),
        ("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n", {"devices": 2}, "-->0B0<--"),
        ("0F0,0B0\n0F1,0B1\n", {"devices": 2}, "a stage lives on one rank"),
        (None, {"devices": 2}, "cannot be read"),
    ],
)
def test_a_schedule_of_ones_own_is_checked(
    tmp_path: Path, text: str | None, changes: dict[str, Any], problem: str
) -> None:
    path = tmp_path / "mine.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        rules.check(settings(schedule=str(path), **changes), num_gpus=0)
    assert problem in str(caught.value)


def test_a_sound_schedule_of_ones_own_says_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(TWO_RANKS)
    cfg = settings(schedule=str(path), devices="auto")
    rules.check(cfg, num_gpus=0)
    assert (num_microbatches(cfg), num_stages(cfg, 2), wanted_ranks(cfg)) == (2, 2, 2)


def test_torchrun_chooses_the_devices() -> None:
    rules.check(settings(balance=[1, 2, 3]), num_gpus=0, world_size=3)
    for changes, text in [
        ({"devices": 3}, "devices=3, but torchrun started 3 processes and chooses the devices; leave devices out"),
        ({"balance": [1, 2]}, "balance=[1,2] names 2 stages, but there are 3 devices"),
    ]:
        with pytest.raises(ConfigError) as caught:
            rules.check(settings(**changes), num_gpus=0, world_size=3)
        assert text in str(caught.value)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        rules.check(settings(steps=0, model__heads=5, recompute="no"), num_gpus=0)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("balance", "num_layers", "num_stages", "text"),
    [
        ([2, 3], 6, 2, "balance=[2,3] sums to 5, but the model has 6 layers (the last number could be 4)"),
        ([7, 3], 6, 2, "balance=[7,3] sums to 10, but the model has 6 layers (use smaller numbers or balance=even)"),
        ("even", 6, 7, "7 stages, but the model has only 6 layers and every stage needs one; use devices=6 or fewer"),
    ],
)
def test_balance_must_fit_the_model(balance: Any, num_layers: int, num_stages: int, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rules.check_model(settings(balance=balance), num_layers, num_stages)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("schedule", "remedy"),
    [("1f1b", "devices=6"), ("ouroboros", "devices=5"), ("pipedream", "devices=6"), ("interleaved", "devices=3")],
)
def test_as_many_devices_as_the_layers_are_enough_for(schedule: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"use {remedy} or fewer, or a deeper model"):
        rules.check_model(settings(schedule=schedule, devices=9), 6, 10)


def test_fitting_balance() -> None:
    rules.check_model(settings(balance=[2, 4]), 6, 2)
    rules.check_model(settings(), 6, 6)


@pytest.mark.parametrize(("batch_size", "given", "count"), [(8, None, 8), (64, None, 16), (64, 5, 5)])
def test_micro_batches(batch_size: int, given: int | None, count: int) -> None:
    assert num_microbatches(settings(batch_size=batch_size, micro_batches=given)) == count
    assert num_microbatches(settings(batch_size=batch_size, micro_batches=given, devices=8)) == count


@pytest.mark.parametrize(("batch_size", "given", "count"), [(3, None, 1), (16, None, 4), (99, None, 16), (16, 8, 8)])
def test_micro_batches_of_a_model_with_batchnorm_have_four_samples(
    batch_size: int, given: int | None, count: int
) -> None:
    cfg = settings(batch_size=batch_size, micro_batches=given, **amoebanet())
    assert num_microbatches(cfg) == count


@pytest.mark.parametrize(
    "optimizer",
    [
        AdamConfig(name="adam", betas=[0.5, 0.6]),
        SgdConfig(name="sgd", momentum=0.9),
        AdafactorConfig(name="adafactor"),
        RmspropConfig(name="rmsprop", decay=0.8),
    ],
)
def test_json_round_trip(optimizer: config.OptimizerConfig) -> None:
    cfg = settings(optimizer=optimizer, balance=[1, 2], devices=["cpu", "cpu"], logit_clip=3.0, eval__every=7)
    assert config.from_json(config.to_json(cfg)) == cfg


def test_every_setting_is_explained() -> None:
    schemas = [schema for group in config.SCHEMAS.values() for schema in group.values()]
    for schema in [Config, LrRuleConfig, config.EvalConfig, config.CheckpointConfig, *schemas]:
        for field in dataclasses.fields(schema):
            assert field.metadata.get("help"), f"{schema.__name__}.{field.name}"
