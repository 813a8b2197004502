"""Loading: complete or not at all, in the dtype asked for, and what the processor lacks filled in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM, LlavaConfig, PixtralVisionConfig

from llavamed_peft.adapters.record import _has_all_weights
from llavamed_peft.errors import CheckpointError
from llavamed_peft.modeling.load import load_checkpoint

COMBINATIONS = [
    ("llava", "llama", "clip", -2),
    ("llava", "qwen2", "siglip", [-2, -1]),
    ("llava", "mistral", "clip", [1, -2]),
    ("vipllava", "llama", "clip", [-2, -1, 1]),
    ("vipllava", "qwen2", "siglip", -2),
    ("llava_next", "mistral", "clip", -2),
    ("llava_next", "qwen2", "siglip", -1),
    ("llava_onevision", "qwen2", "siglip", -1),
    ("llava_onevision", "llama", "clip", -1),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("checkpoints") / "base")


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "copy")


@pytest.mark.parametrize(("kind", "language", "tower", "layers"), COMBINATIONS)
def test_image_tokens_match_features(
    kind: str, language: str, tower: str, layers: int | list[int], tmp_path: Path
) -> None:
    """The model itself checks that there are as many image tokens as features."""
    from PIL import Image

    from llavamed_peft import Conversation, Turn
    from llavamed_peft.packing import PackedCollator

    model, processor = load_checkpoint(tiny.build(tmp_path / "base", kind, language, tower, layers))
    for i, size in enumerate([(64, 64), (150, 40), (40, 150)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    one = [
        Conversation(
            str(i), (Turn("user", "<image> what?"), Turn("assistant", "no")), (str(tmp_path / f"{i}.png"),)
        )
        for i in range(3)
    ]
    both = Conversation(
        "both", (Turn("user", "<image><image> same?"), Turn("assistant", "no")), one[0].images + one[1].images
    )
    text = Conversation("text", (Turn("user", "why?"), Turn("assistant", "no")))
    with torch.no_grad():
        assert model(**PackedCollator(processor)([*one, both, text])).loss.isfinite()
        assert model(**PackedCollator(processor)([text])).loss.isfinite()


def test_dtype_none_is_the_stored_one(base: Path, tmp_path: Path) -> None:
    stored = tiny.build(tmp_path / "bf16", dtype=torch.bfloat16)
    assert load_checkpoint(stored)[0].dtype == torch.bfloat16
    assert load_checkpoint(stored, dtype="float32")[0].dtype == torch.float32
    assert load_checkpoint(base)[0].dtype == torch.float32
    assert load_checkpoint(base, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_hub_processor_is_completed(base: Path) -> None:
    assert AutoProcessor.from_pretrained(base).patch_size is None
    processor = load_checkpoint(base)[1]
    assert (processor.patch_size, processor.num_additional_image_tokens) == (tiny.PATCH, 1)
    assert processor.vision_feature_select_strategy == "default"


class TestNF4:
    @pytest.mark.parametrize(
        ("kind", "language", "tower", "layers"), [COMBINATIONS[0], COMBINATIONS[3], *COMBINATIONS[-4:-1]]
    )
    def test_only_the_language_models_linears(
        self, kind: str, language: str, tower: str, layers: int | list[int], tmp_path: Path
    ) -> None:
        model, _ = load_checkpoint(
            tiny.build(tmp_path / "base", kind, language, tower, layers), quantization="nf4"
        )
        kinds = {
            name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
        }
        for name, module in kinds.items():
            assert isinstance(module, Linear4bit) == name.startswith("model.language_model."), name
        quantized = model.model.language_model.layers[0].self_attn.q_proj.weight
        assert quantized.quant_type == "nf4" and quantized.quant_state.nested

    def test_a_forward_in_eval_mode_leaves_the_weights_and_the_gradients(self, base: Path) -> None:
        """bitsandbytes repacks weights in place on a CPU with avx512_bf16, after which nothing gets a
        gradient."""
        model, _ = load_checkpoint(base, quantization="nf4")
        linear = model.model.language_model.layers[0].mlp.up_proj
        before = linear.weight.data.clone()
        x = torch.randn(2, 64, requires_grad=True)
        model.eval()
        with torch.no_grad():
            linear(x)
        assert torch.equal(linear.weight.data, before)
        model.train()
        linear(x).sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0

    @pytest.mark.skipif(torch.cuda.is_available(), reason="the fault is the CPU kernel's")
    def test_width_that_is_no_multiple_of_a_block(self, copy: Path) -> None:
        config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
        config["text_config"]["intermediate_size"] = 96
        (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(
            CheckpointError, match="intermediate_size is 96; NF4 on a CPU needs a multiple of 64"
        ):
            load_checkpoint(copy, quantization="nf4")


class TestRefusals:
    def change_weights(self, folder: Path, **how: object) -> None:
        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in tensors if "multi_modal_projector.linear_1.weight" in name)
        if "drop" in how:
            del tensors[name]
        if "add" in how:
            tensors["surplus.weight"] = torch.zeros(2)
        if "shape" in how:
            tensors[name] = torch.zeros(3, 5)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            (
                {"drop": True},
                r"weights 1 missing \(.*multi_modal_projector.linear_1.weight\); wanted each of the model's",
            ),
            ({"add": True}, r"weights 1 unexpected \(surplus.weight\)"),
            ({"shape": True}, r"weights 1 of another shape \(.*multi_modal_projector.linear_1.weight\)"),
        ],
    )
    def test_weights_that_do_not_fit(self, how: dict[str, bool], message: str, copy: Path) -> None:
        self.change_weights(copy, **how)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(copy)

    def test_truncated_weights(self, copy: Path) -> None:
        weights = copy / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match="the weights cannot be loaded"):
            load_checkpoint(copy)

    def test_no_weights(self, copy: Path) -> None:
        (copy / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="the weights cannot be loaded"):
            load_checkpoint(copy)

    def test_text_only_model(self, tmp_path: Path) -> None:
        LlamaForCausalLM(
            LlamaConfig(vocab_size=8, hidden_size=64, intermediate_size=8, num_hidden_layers=1)
        ).save_pretrained(tmp_path)
        with pytest.raises(
            CheckpointError, match="model_type is 'llama'; wanted one of llava, llava_next, vipllava"
        ):
            load_checkpoint(tmp_path)

    def test_another_tower(self, tmp_path: Path) -> None:
        LlavaConfig(vision_config=PixtralVisionConfig(), text_config=LlamaConfig()).save_pretrained(tmp_path)
        with pytest.raises(
            CheckpointError, match="its vision tower is 'pixtral'; wanted one of clip_vision_model, siglip"
        ):
            load_checkpoint(tmp_path)

    def test_original_llava_format(self, copy: Path) -> None:
        (copy / "config.json").write_text(json.dumps({"model_type": "llava_mistral"}), encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"model_type is 'llava_mistral'.* must be converted first"):
            load_checkpoint(copy)

    def test_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(
            CheckpointError, match=r"has no config\.json; wanted a folder of a checkpoint or a Hub id"
        ):
            load_checkpoint(tmp_path)

    def test_no_image_processor(self, copy: Path) -> None:
        (copy / "preprocessor_config.json").unlink()
        with pytest.raises(CheckpointError, match="processor"):
            load_checkpoint(copy)

    def test_no_tokenizer(self, copy: Path) -> None:
        for path in copy.glob("tokenizer*"):
            path.unlink()
        with pytest.raises(CheckpointError, match="processor"):
            load_checkpoint(copy)

    def test_image_token_of_another_id(self, copy: Path) -> None:
        config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
        config["image_token_index"] = 7
        (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(
            CheckpointError, match="image token '<image>' has id 3, the model's image_token_id is 7"
        ):
            load_checkpoint(copy)


def test_a_download_that_was_cut_off_has_no_hash_yet(tmp_path: Path) -> None:
    assert not _has_all_weights(tmp_path)
    index = {
        "weight_map": {
            "a.weight": "model-00001-of-00002.safetensors",
            "b.weight": "model-00002-of-00002.safetensors",
        }
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert not _has_all_weights(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").touch()
    assert _has_all_weights(tmp_path)
