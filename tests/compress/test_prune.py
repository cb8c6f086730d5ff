"""What `prune` chooses, reports and refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastattn
from fastattn.compress.pruning import heads as heads_module
from fastattn.compress.pruning.saved import apply_shapes, load_pruned, shapes_of
from fastattn.compress.pruning.structure import sites

transformers = pytest.importorskip("transformers")

from prune_models import SMALL, assert_untouched, bert, llama, state, t5  # noqa: E402

pytestmark = [pytest.mark.model, pytest.mark.once]


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(heads=1.0), r"heads is 1.0; .*\[0, 1\)"),
            (dict(heads=-0.1), "heads is -0.1"),
            (dict(ffn=1.5), r"ffn is 1.5; .*\[0, 1\)"),
            (dict(ffn=float("nan")), "ffn is nan"),
            (dict(heads=-1), "heads is -1"),
            (dict(heads=4), "4 heads cannot be removed of 'encoder.layer.0.attention.self'"),
            (dict(ffn=24), "must keep at least one of its 24 neurons"),
            (dict(layers=3), "3 layers cannot be removed of 'encoder.layer'"),
            (dict(layers=[3]), "numbered 0 to 2"),
            (dict(layers=[1, 1]), "at most once"),
            (dict(layers={"decoder": 1}), "layers names 'decoder'; .* encoder.layer"),
            (dict(heads={"encoder.layer.7": [0]}), "heads names 'encoder.layer.7'"),
            (dict(heads={"encoder.layer.0.attention.self": [4]}), "numbered 0 to 3"),
            (dict(heads={"encoder.layer.0.attention.self": [0, 1, 2, 3]}), "at least one of its 4 heads"),
            (dict(ffn={"encoder.layer.0": [24]}), "numbered 0 to 23"),
            (dict(heads=0.5, importance="size"), "importance is 'size'"),
            (dict(heads=0.5, importance="taylor"), "needs calibration"),
            (dict(layers=1, importance="wanda"), "needs calibration"),
            (dict(heads=0.5, pattern="random"), "pattern is 'random'"),
            (dict(heads=0.5, pattern="2:4"), "takes no heads"),
            (dict(ffn=0.5, target_speedup=2.0), "target_speedup takes no ffn"),
            (dict(heads=0.5, sparsity=0.5), "sparsity is for"),
            (dict(target_speedup=0.5), "target_speedup is 0.5"),
            (dict(heads=0.5, exclude=["encoder.block"]), "exclude names 'encoder.block'"),
            (
                dict(
                    heads={"encoder.layer.0.attention.self": [0]}, exclude=["encoder.layer.0.attention.self"]
                ),
                "both named and excluded",
            ),
            (dict(layers=[1], exclude=["encoder.layer.1.output"]), "both named and excluded"),
            (dict(heads=0.5, importance="taylor", calibration=[]), "no batches"),
        ],
    )
    def test_a_clear_error_and_nothing_changed(self, options, message):
        model = bert()
        before = state(model)
        with pytest.raises(ValueError, match=message):
            fastattn.prune(model, **options)
        assert_untouched(model, before)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(heads="half"), "heads is 'half'"),
            (dict(ffn=True), "ffn is True"),
            (dict(layers=0.5), "layers must be counts or lists of indices; got 0.5"),
            (dict(heads={"encoder.layer.0.attention.self": "0"}), "must be a list of indices"),
        ],
    )
    def test_other_types(self, options, message):
        model = bert()
        before = state(model)
        with pytest.raises(TypeError, match=message):
            fastattn.prune(model, **options)
        assert_untouched(model, before)

    def test_nothing_to_prune(self):
        with pytest.raises(ValueError, match="Sequential has no attention or feed-forward layer"):
            fastattn.prune(nn.Sequential(nn.Linear(2, 2)), heads=0.5)
        with pytest.raises(TypeError, match="model is a str"):
            fastattn.prune("bert", heads=0.5)

    def test_a_quantized_model(self):
        model = bert()
        fastattn.quantize(model, "int8")
        before = state(model)
        for amount in (dict(heads=0.5), dict(ffn={"encoder.layer.0": [1]})):
            with pytest.raises(ValueError, match="prune a model before it is quantized"):
                fastattn.prune(model, **amount)
        assert_untouched(model, before)

    def test_a_parameter_of_two_layers(self):
        model = bert()
        model.encoder.layer[1].intermediate.dense.weight = model.encoder.layer[0].intermediate.dense.weight
        with pytest.raises(ValueError, match="are one parameter: untie them"):
            fastattn.prune(model, ffn=0.5)
        report = fastattn.prune(model, ffn=0.5, exclude=["encoder.layer.[01].intermediate.dense"])
        assert [part.kept for part in report.parts if part.kind == "neurons"] == [24, 24, 12]

    def test_experts(self):
        """What runs experts wants widths of a multiple of 8; what they read is seen by no hook."""
        config = transformers.GptOssConfig(
            **{**SMALL, "num_hidden_layers": 1, "head_dim": 8, "num_key_value_heads": 2},
            num_local_experts=2,
            num_experts_per_tok=1,
        )
        model = transformers.GptOssForCausalLM(config).eval()
        calibration = [{"input_ids": torch.arange(8)[None]}]
        before = state(model)
        with pytest.raises(ValueError, match="must keep a multiple of 8 of its 24 neurons, not 20"):
            fastattn.prune(model, ffn=4)
        with pytest.raises(ValueError, match="'wanda' needs what goes into the last layer"):
            fastattn.prune(model, ffn=8, importance="wanda", calibration=calibration)
        assert_untouched(model, before)
        report = fastattn.prune(model, ffn=0.5, importance="taylor", calibration=calibration)
        assert [part.kept for part in report.parts if part.kind == "neurons"] == [16]
        assert model.model.layers[0].mlp.experts.down_proj.shape == (2, 16, 32)
        assert model(**calibration[0]).logits.isfinite().all()


class TestGroupedQueries:
    def test_a_count_that_breaks_the_groups(self):
        model = llama(num_key_value_heads=2)
        before = state(model)
        with pytest.raises(ValueError, match=r"8 query heads and 2 key heads, so that 0, 2, 4, 6 can"):
            fastattn.prune(model, heads=3)
        name = "model.layers.0.self_attn"
        with pytest.raises(ValueError, match=r"breaks its grouped queries: .* they would keep \[3, 4\]"):
            fastattn.prune(model, heads={name: [1]})
        with pytest.raises(ValueError, match="breaks its grouped queries"):
            fastattn.prune(model, heads={name: [0, 1, 2, 4]})
        assert_untouched(model, before)

    def test_whole_groups_or_all_alike_whichever_costs_less(self):
        (site, *_) = sites(llama()).attentions
        assert heads_module.counts_that_fit(site) == [0, 2, 4, 6]
        by_group = torch.tensor([5.0, 5, 0, 1, 5, 5, 1, 0])
        assert heads_module.choose_heads(site, 4, by_group) == (2, 3, 6, 7)
        alike = torch.tensor([5.0, 0, 0, 5, 5, 0, 0, 5])
        assert heads_module.choose_heads(site, 4, alike) == (1, 2, 5, 6)

    def test_a_ratio_is_met_as_nearly_as_the_groups_allow(self):
        model = llama(num_key_value_heads=2)
        report = fastattn.prune(model, heads=0.6)
        assert {part.kept for part in report.parts if part.kind == "heads"} == {4}
        for site in sites(model).attentions:
            # A whole key head, or two query heads of each.
            assert (site.num_kv_heads, site.group) in ((1, 4), (2, 2))
            assert site.module.num_key_value_groups == site.group


class TestLinked:
    def test_t5s_layers_lose_the_same_heads(self):
        model = t5()
        fastattn.prune(model, heads=0.5)
        encoder, decoder = model.encoder.block, model.decoder.block
        assert {block.layer[0].SelfAttention.n_heads for block in (*encoder, *decoder)} == {2}
        assert encoder[0].layer[0].SelfAttention.relative_attention_bias.weight.shape == (32, 2)

    def test_other_heads_in_one_layer_are_refused(self):
        model = t5()
        before = state(model)
        name = "encoder.block.0.layer.0.SelfAttention"
        with pytest.raises(ValueError, match="share a bias that is made by head"):
            fastattn.prune(model, heads={name: [0], name.replace("0", "1", 1): [1]})
        assert_untouched(model, before)

    def test_fewer_layers_in_the_encoder_than_in_the_decoder(self):
        model = t5()
        fastattn.prune(model, layers={"encoder.block": 1})
        made = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False)
        again = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False, use_cache=False)
        assert torch.equal(made, again)


class TestConfiguration:
    def test_models_of_one_configuration_stay_apart(self):
        config = transformers.BertConfig(**SMALL)
        first, second = transformers.BertModel(config), transformers.BertModel(config)
        fastattn.prune(first, heads=1, layers=1)
        assert second.config is config and config.num_hidden_layers == 3
        assert first.config.num_hidden_layers == 2

    def test_restore_after_prune_leaves_the_others_configuration_alone(self):
        config = transformers.BertConfig(**SMALL)
        first, second = transformers.BertModel(config), transformers.BertModel(config)
        fastattn.optimize(first)
        fastattn.prune(first, heads=1, layers=1)
        fastattn.restore(first)
        assert first.config.num_hidden_layers == 2 and first.config.fastattn_pruning
        assert second.config is config and config.num_hidden_layers == 3
        assert not hasattr(config, "fastattn_pruning")

    def test_another_head_loads_the_pruned_body(self, tmp_path):
        model = bert("BertForSequenceClassification")
        fastattn.prune(model, heads=2, ffn=0.5)
        model.save_pretrained(tmp_path)
        body = transformers.BertModel(copy.deepcopy(model.config))
        apply_shapes(body, model.config)
        body.load_state_dict(model.bert.state_dict(), strict=False)
        ids = torch.arange(6)[None]
        assert torch.equal(body.eval()(ids).last_hidden_state, model.bert(ids).last_hidden_state)

    def test_a_model_inside_a_module_of_the_users_own(self, tmp_path):
        class Classifier(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.head = bert(), nn.Linear(32, 2)

        model = Classifier()
        fastattn.prune(model, heads=1, layers={"body.encoder.layer": [0]})
        model.body.save_pretrained(tmp_path)
        loaded = fastattn.load(tmp_path)
        ids = torch.arange(6)[None]
        assert torch.equal(loaded(ids).last_hidden_state, model.body(ids).last_hidden_state)

    def test_gpt2_keeps_the_scale_of_the_layer_it_was(self, tmp_path):
        config = transformers.GPT2Config(
            vocab_size=50, n_embd=32, n_layer=3, n_head=4, scale_attn_by_inverse_layer_idx=True
        )
        model = transformers.GPT2LMHeadModel(config).eval()
        fastattn.prune(model, layers=[0])
        fastattn.prune(model, layers=[0])
        assert model.transformer.h[0].attn.layer_idx == 0
        model.save_pretrained(tmp_path)
        loaded = load_pruned(tmp_path)
        assert loaded.transformer.h[0].attn.scaling == 8**-0.5 / 3
        ids = torch.arange(6)[None]
        assert torch.equal(loaded(ids).logits, model(ids).logits)

    def test_missing_weights_are_an_error(self, tmp_path):
        model = bert()
        fastattn.prune(model, heads=1)
        held = {name: x for name, x in model.state_dict().items() if "layer.1.output" not in name}
        model.save_pretrained(tmp_path, state_dict=held)
        with pytest.raises(ValueError, match="does not hold all of the pruned model's weights"):
            fastattn.load(tmp_path)

    def test_shapes_of_a_model_that_is_smaller(self):
        shapes = shapes_of(bert())
        small = bert(intermediate_size=8)
        with pytest.raises(ValueError, match="has 8 neurons; fastattn_pruning says 24"):
            apply_shapes(small, shapes)
        with pytest.raises(ValueError, match="version 99"):
            apply_shapes(small, {**shapes, "version": 99})

    def test_pruned_again(self, tmp_path):
        """BLOOM's slopes are those of the heads there were at first."""
        config = transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=8)
        torch.manual_seed(0)
        model = transformers.BloomForCausalLM(config).eval()
        at_once = copy.deepcopy(model)
        name, other = (site.name for site in sites(model).attentions)
        fastattn.prune(model, heads={name: [0, 5]})
        fastattn.prune(model, heads={name: [1, 4], other: [3]})
        fastattn.prune(at_once, heads={name: [0, 2, 5, 6], other: [3]})
        ids = torch.arange(6)[None]
        assert torch.equal(model(ids).logits, at_once(ids).logits)
        model.save_pretrained(tmp_path)
        assert torch.equal(fastattn.load(tmp_path)(ids).logits, model(ids).logits)


class TestReport:
    def test_says_what_is_left(self):
        model = bert()
        count = sum(parameter.numel() for parameter in model.parameters())
        report = fastattn.prune(model, heads=1, ffn=0.29, layers=1, exclude=["encoder.layer.0.attention"])
        assert report.parameters_before == count
        assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
        parts = {(part.name, part.kind): part for part in report.parts}
        assert parts["encoder.layer", "layers"].kept == 2
        excluded = parts["encoder.layer.0.attention.self", "heads"]
        assert excluded.kept == 4 and excluded.reason == "excluded by the caller"
        assert {part.kept for part in report.parts if part.kind == "neurons"} == {24 - int(0.29 * 24)}
        table = report.table()
        assert "excluded by the caller" in table and f"{report.parameters_after:,} after" in table
        assert report.to_dict()["parts"][0]["name"] == report.parts[0].name

    @pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
    def test_single_weights(self, pattern):
        model = bert()
        report = fastattn.prune(model, pattern=pattern)
        weight = model.encoder.layer[0].intermediate.dense.weight
        assert int((weight == 0).sum()) == weight.numel() // 2
        assert {part.kind for part in report.parts} == {"weights"}
