"""Checkpoints as users have them: stored quantised, with another model's processor, with a tokenizer that
grew or appends EOS, with weights that are not finite. They are refused before any data
are read, or used as what they are."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from bitsandbytes.nn import Linear4bit
from llava_rows import gpt, human, row
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import processors as post_processors
from transformers import AutoTokenizer

from llavamed_peft import Curriculum, LoraSpec, Schedule, Stage, curriculum_finetune
from llavamed_peft.errors import CheckpointError, ConfigError
from llavamed_peft.modeling import quantization
from llavamed_peft.modeling.load import load_checkpoint, read_config


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    made = {kind: tiny.build(folder / kind, kind, *how) for kind, how in KINDS.items()}
    model, processor = load_checkpoint(made["llava"], "nf4")
    model.save_pretrained(folder / "nf4")
    processor.save_pretrained(folder / "nf4")
    return made | {"nf4": folder / "nf4"}


KINDS = {"llava": (), "llava_next": ("mistral",), "llava_onevision": ("qwen2", "siglip", -1)}


def changed(base: Path, out: Path, **files: Callable[[Any], object]) -> Path:
    """A copy of a checkpoint with JSON files changed, `config` for config.json."""
    shutil.copytree(base, out)
    for name, change in files.items():
        path = out / f"{name}.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")
    return out


STORED = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "hqq": {"quant_method": "hqq"},
    "torchao": {"quant_method": "torchao"},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
    "gguf": {"quant_method": "gguf"},
    "a method of tomorrow": {"quant_method": "a method of tomorrow"},
    "bitsandbytes 8 bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "bitsandbytes 4 bit, fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "an unknown method": {"bits": 4},
}


@pytest.mark.parametrize("place", ["config", "text_config"])
@pytest.mark.parametrize("method", STORED)
def test_stored_quantisation_is_refused_by_name(
    method: str, place: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    def change(config: dict[str, Any]) -> None:
        (config if place == "config" else config["text_config"])["quantization_config"] = STORED[method]

    stored = changed(bases["llava"], tmp_path / "stored", config=change)
    with pytest.raises(CheckpointError) as raised:
        call(stored, tmp_path / "run", data="not there, and not looked for.json")
    assert str(raised.value) == (
        f"{stored}: its weights are stored quantised ({method}); wanted 16 or 32 bits, or bitsandbytes NF4. "
        "Take the unquantised checkpoint; quantization='nf4' makes its language model 4 bits."
    )


def call(base: Path, out: Path, data: Any = None, trains: str = "lora", **how: Any) -> Any:
    schedule = Schedule(epochs=2, learning_rate=1e-3, global_batch=2)
    lora = LoraSpec(rank=4, alpha=8, dropout=0.0) if trains == "lora" else None
    curriculum = Curriculum((Stage("vqa", trains, schedule, lora),))
    return curriculum_finetune(base, {"vqa": data}, out, curriculum=curriculum, **how)["vqa"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    Image.effect_noise((70, 60), 60).convert("RGB").save(tmp_path / "a.jpg")
    answers = ["a heart", "no", "the left lung", "yes"]
    rows = [
        row(id=str(n), conversations=[human("<image> what?"), gpt(answer)])
        for n, answer in enumerate(answers)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path / "data.json"


def test_a_stored_nf4_base_is_what_the_keyword_makes(
    bases: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """With and without the keyword: the same losses, record and card as over the unquantised base."""
    made = {
        "made": call(bases["llava"], tmp_path / "made", data, quantization="nf4", eval_data={"vqa": data}),
        "stored": call(bases["nf4"], tmp_path / "stored", data, eval_data={"vqa": data}),
        "both": call(bases["nf4"], tmp_path / "both", data, quantization="nf4", eval_data={"vqa": data}),
    }
    losses = {name: stage.metrics["eval_loss_after"] for name, stage in made.items()}
    assert losses["stored"] == losses["both"] == losses["made"]
    assert {stage.record.computing["quantization"] for stage in made.values()} == {"nf4"}
    assert all("4-bit weights (NF4)" in (s.path / "README.md").read_text() for s in made.values())
    model, _ = load_checkpoint(bases["nf4"])
    linears = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert linears and not any(module.support_avx512bf16_for_cpu for module in linears)
    with pytest.raises(
        ConfigError, match="trains 'full' and the base is stored in NF4; wanted the unquantised"
    ):
        call(bases["nf4"], tmp_path / "full", data, trains="full")


def test_a_stored_nf4_base_with_a_quantised_tower_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    everything = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head"]
    )
    model = AutoModelForImageTextToText.from_pretrained(bases["llava"], quantization_config=everything)
    shutil.copytree(bases["llava"], tmp_path / "all")
    model.save_pretrained(tmp_path / "all")
    with pytest.raises(
        CheckpointError, match=r"in 4 bits are model\.vision_tower.*Take the unquantised checkpoint"
    ):
        load_checkpoint(tmp_path / "all")


def test_nf4_is_made_of_the_stored_weights_whatever_the_dtype(tmp_path: Path) -> None:
    """Rounding an fp16 base to bf16 first would give other 4-bit weights."""
    base = tiny.build(tmp_path / "fp16", dtype=torch.float16)
    one, two = (load_checkpoint(base, "nf4", dtype)[0] for dtype in (None, "bfloat16"))
    places = [name for name, module in one.named_modules() if isinstance(module, Linear4bit)]
    assert all(torch.equal(one.get_submodule(n).weight, two.get_submodule(n).weight) for n in places)
    assert one.dtype == torch.float16 and two.dtype == torch.bfloat16 == two.lm_head.weight.dtype


def test_on_a_gpu_4_bit_linears_compute_in_the_dtype_of_the_stage(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_checkpoint(bases["nf4"])
    linears = list(quantization.linear4bits(model).values())
    assert {module.compute_dtype for module in linears} == {torch.float32}, "on a CPU the fastest"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for dtype in (torch.float32, torch.bfloat16):
        quantization.set_nf4_dtype(model, dtype)
        assert {module.compute_dtype for module in linears} == {dtype}


def test_nf4_without_bitsandbytes_is_refused_first(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as raised:
        call(bases["llava"], tmp_path / "run", tmp_path / "no.json", quantization="nf4")
    assert str(raised.value) == (
        "quantization is 'nf4' and bitsandbytes is not installed; wanted it: pip install "
        "'llavamed-peft[quantization]'."
    )
    with pytest.raises(ConfigError, match=r"nf4 is stored in NF4 and bitsandbytes is not installed"):
        read_config(bases["nf4"])


def test_block_fp8_is_dequantised_and_fp8_without_scales_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
        config["quantization_config"]["modules_to_not_convert"] = [
            "vision_tower",
            "multi_modal_projector",
            "lm_head",
        ]

    fp8 = changed(bases["llava"], tmp_path / "fp8", config=change)
    tensors = load_file(fp8 / "model.safetensors")
    for name in [name for name in tensors if "language_model" in name and name.endswith("proj.weight")]:
        tensors[name] = (tensors[name] * 16).to(torch.float8_e4m3fn)
        blocks = [side // 32 for side in tensors[name].shape]
        tensors[f"{name}_scale_inv"] = torch.full(blocks, 1 / 16)
    save_file(tensors, fp8 / "model.safetensors", {"format": "pt"})
    plain, loaded = load_checkpoint(bases["llava"])[0], load_checkpoint(fp8)[0]
    name = "model.language_model.layers.0.self_attn.q_proj"
    weight = loaded.get_submodule(name).weight
    assert type(loaded.get_submodule(name)) is torch.nn.Linear and weight.dtype.itemsize > 1
    torch.testing.assert_close(weight.float(), plain.get_submodule(name).weight, atol=0.02, rtol=0.1)

    save_file(
        {n: t for n, t in tensors.items() if "scale" not in n}, fp8 / "model.safetensors", {"format": "pt"}
    )
    for read in (read_config, load_checkpoint):
        with pytest.raises(
            CheckpointError, match=r"14 weights are stored in fp8 without their scales \(\S*language_model"
        ):
            read(fp8)


@pytest.mark.parametrize(
    ("kind", "strategy", "wanted"),
    [("llava_next", "full", "default"), ("llava_onevision", "default", "full")],
)
def test_features_that_do_not_fit_a_grid_are_refused(
    kind: str, strategy: str, wanted: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    odd = changed(
        bases[kind], tmp_path / "odd", config=lambda c: c.update(vision_feature_select_strategy=strategy)
    )
    with pytest.raises(
        CheckpointError, match=f"vision_feature_select_strategy is '{strategy}' with a .*; wanted '{wanted}'"
    ):
        read_config(odd)
    llava = changed(
        bases["llava"], tmp_path / "full", config=lambda c: c.update(vision_feature_select_strategy="full")
    )
    load_checkpoint(llava)


PROCESSOR = {
    "another image size": (
        lambda c: c.update(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        r"makes \[1, 3, 28, 28\] of an image, the vision tower takes \[images, 3, 56, 56\]",
    ),
    "another class": (
        lambda c: c.update(processor_class="LlavaNextProcessor"),
        r"the processor is a LlavaNextProcessor, the model a llava; wanted a LlavaProcessor",
    ),
    "another model's altogether": (
        lambda c: c.update(processor_class="Qwen2VLProcessor"),
        r"no processor could be loaded|the processor is a Qwen2VLProcessor, the model a llava",
    ),
    "another image processor": (
        lambda c: c.update(
            image_processor_type="LlavaNextImageProcessor", image_grid_pinpoints=tiny.PINPOINTS
        ),
        r"makes \[1, \d, 3, 56, 56\] of an image, the vision tower takes \[images, 3, 56, 56\]",
    ),
}


@pytest.mark.parametrize("case", PROCESSOR)
def test_another_models_processor_is_refused(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    change, message = PROCESSOR[case]
    odd = changed(bases["llava"], tmp_path / "odd", preprocessor_config=change)
    with pytest.raises(CheckpointError, match=message):
        call(odd, tmp_path / "run", tmp_path / "no.json")


def with_tokenizer(base: Path, out: Path, change: Callable[[Any], object]) -> Path:
    shutil.copytree(base, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    change(tokenizer)
    tokenizer.save_pretrained(out)
    return out


def appends_eos(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = post_processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )


def test_a_tokenizer_that_appends_eos_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    odd = with_tokenizer(bases["llava"], tmp_path / "odd", appends_eos)
    with pytest.raises(
        CheckpointError, match=r"the tokenizer appends '</s>' to every text, .* Set add_eos_token to"
    ):
        load_checkpoint(odd)


def test_tokens_beyond_the_embedding(bases: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Those that every row has are refused with the checkpoint, a word's only with its row."""

    def grows(tokenizer: Any) -> None:
        tokenizer.add_tokens([f"word{number}" for number in range(400 - len(tokenizer))])

    word = with_tokenizer(bases["llava"], tmp_path / "word", grows)
    text = data.read_text(encoding="utf-8").replace("a heart", "a word1 word77")
    data.write_text(text, encoding="utf-8")
    stage = call(word, tmp_path / "run", data, max_rejected=0.5)
    assert stage.record.data[0].rejected == {"cannot be encoded": 1}
    (rejected,) = (tmp_path / "run/rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert "The words hold 'word77', which is token " in rejected and "embedding has 384 rows" in rejected

    def pads(tokenizer: Any) -> None:
        grows(tokenizer)
        tokenizer.add_special_tokens({"pad_token": "<new pad>"})

    padding = with_tokenizer(bases["llava"], tmp_path / "padding", pads)
    with pytest.raises(
        CheckpointError, match=r"the padding token '<new pad>' has id 400, .* embedding has 384 rows"
    ):
        load_checkpoint(padding)
    image = changed(
        bases["llava"], tmp_path / "image", config=lambda c: c["text_config"].update(vocab_size=3)
    )
    with pytest.raises(CheckpointError, match=r"the image token '<image>' has id 3, .* embedding has 3 rows"):
        call(image, tmp_path / "other", data)


@pytest.mark.parametrize("quantized", [None, "nf4"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_are_not_finite_are_named(
    dtype: torch.dtype, value: float, quantized: str | None, tmp_path: Path
) -> None:
    base = tiny.build(tmp_path / "base", dtype=dtype)
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][3, 5] = value
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError,
        match=r"1 of its weights hold infinity or NaN \(model\.language_model\.layers\.1\.mlp\.up_proj",
    ):
        load_checkpoint(base, quantized)
